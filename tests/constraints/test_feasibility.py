"""Certificates: each verdict on both sides, the joint confidence they promise, and the trip through JSON."""

import json
import math

import numpy as np
import pytest

from dualsweep.constraints.closed_forms import class_restriction_multipliers, class_restriction_objective
from dualsweep.constraints.domains import Capped, NonNegative, Simplex
from dualsweep.constraints.feasibility import Certificate, certify
from dualsweep.constraints.multipliers import DualState
from dualsweep.constraints.problem import Constraint, Problem
from dualsweep.constraints.symptoms import find_symptoms


def problem(count=2, **changes):
    constraints = tuple(Constraint(name=f"c{i}", unit="share", threshold=0.1) for i in range(count))
    return Problem(**{"method": "fairness", "objective": "KL(q||p)", "constraints": constraints, **changes})


def state(*multipliers, relaxations=None):
    names = tuple(f"c{i}" for i in range(len(multipliers)))
    return DualState(names=names, multipliers=multipliers, relaxations=relaxations)


def verdict(violation, stderr, tolerance=0.05, count=1000, **changes):
    return certify(problem(), state(1.0, 0.0), violation, stderr, count, tolerance, **changes)


def test_each_verdict():
    assert verdict([-0.1, -0.2], [0.01, 0.01]).verdict == "feasible"
    assert verdict([-0.1, 0.2], [0.01, 0.01]).verdict == "infeasible"
    assert verdict([-0.1, 0.04], [0.01, 0.01]).verdict == "undecided"
    assert verdict([-0.1, 0.06], [0.01, 0.01]).verdict == "undecided"


def test_a_wide_interval_is_undecided_whichever_side_its_middle_lies_on():
    assert verdict([-0.1, -0.1], [0.01, 1.0]).verdict == "undecided"
    assert not verdict([-0.1, -0.1], [0.01, 1.0]).feasible
    assert verdict([-0.1, 0.5], [0.01, 1.0]).verdict == "undecided"


def test_one_shown_violation_outweighs_another_undecided_constraint():
    certificate = verdict([0.3, 0.4], [0.01, 1.0])
    assert certificate.verdict == "infeasible"
    assert any(reason.startswith("c0: violation") and "above the tolerance" in reason for reason in certificate.reasons)
    assert any(reason.startswith("c1: violation") and "straddles" in reason for reason in certificate.reasons)


def test_the_tolerance_counts_from_above():
    assert verdict([0.02, 0.0], [0.01, 0.01], tolerance=0.05).verdict == "feasible"
    assert verdict([0.02, 0.0], [0.001, 0.001], tolerance=0.0).verdict == "infeasible"


def test_an_exact_value_at_the_tolerance_is_feasible():
    assert verdict([0.0, 0.0], [0.0, 0.0], tolerance=0.0, count=0).verdict == "feasible"
    assert verdict([1e-12, 0.0], [0.0, 0.0], tolerance=0.0, count=0).verdict == "infeasible"


def test_the_worst_constraint_is_the_one_with_the_largest_violation():
    certificate = verdict([0.3, -0.4], [0.01, 0.02], count=[500, 900])
    assert (certificate.worst_constraint, certificate.worst_violation, certificate.stderr) == ("c0", 0.3, 0.01)
    assert certificate.count == 500
    low, high = certificate.interval
    assert low < 0.3 < high
    assert certificate.intervals["c0"] == (low, high)
    assert set(certificate.intervals) == {"c0", "c1"}


def test_the_interval_is_bonferroni_over_the_constraints():
    def half_width(count):
        certificate = certify(problem(count), state(*[0.0] * count), [0.0] * count, [1.0] * count, 10**9, 0.0)
        return certificate.interval[1]

    assert half_width(1) == pytest.approx(1.959964, abs=1e-5)  # normal quantiles at 97.5 % and 98.75 %
    assert half_width(2) == pytest.approx(2.241403, abs=1e-5)


@pytest.mark.parametrize("count, quantile", [(10, 2.26216), (11, 2.22814), (31, 2.04227)])
def test_small_samples_widen_the_interval_like_student(count, quantile):
    certificate = certify(problem(1), state(0.0), [0.0], [1.0], count, 0.0)
    assert certificate.interval[1] == pytest.approx(quantile, rel=0.01)  # as the docstring promises, tables of t


@pytest.mark.parametrize("count, stderr", [(9, 0.01), (9, 0.0), (1, 0.0)])
def test_too_few_draws_decide_nothing(count, stderr):
    """One draw, or a few that happen to agree, have no spread: that is not a standard error of 0."""
    certificate = verdict([-5.0, -5.0], [stderr, stderr], count=count)
    assert certificate.verdict == "undecided"
    assert any(f"only {count} draws" in reason for reason in certificate.reasons)


def test_a_feasible_verdict_at_the_edge_is_wrong_no_more_often_than_it_says():
    """Both true violations exactly at the tolerance: at most 5 % may be called either way. Seeded; 2000 trials give a
    standard error of 0.5 %, and the bound below lies 3 of them above."""
    rng, wrong = np.random.default_rng(0), 0
    for _ in range(2000):
        draws = rng.normal(size=(2, 30))
        estimate, stderr = draws.mean(axis=1), draws.std(axis=1, ddof=1) / math.sqrt(30)
        wrong += verdict(estimate, stderr, tolerance=0.0, count=30).verdict != "undecided"
    assert wrong / 2000 <= 0.05 + 3 * 0.005


def test_without_constraints_everything_is_feasible():
    certificate = certify(problem(0), state(), [], [], 100, 0.0)
    assert certificate.feasible
    assert certificate.worst_constraint is None
    assert Certificate.from_dict(json.loads(json.dumps(certificate.to_dict()))) == certificate


def test_a_saturated_multiplier_is_named():
    capped = problem(domain=Capped((0.2, 0.5)))
    at_guard = state(*capped.domain.project([9.0, 0.1]))
    certificate = certify(capped, at_guard, [0.5, -0.1], [0.01, 0.01], 100, 0.0)
    assert certificate.saturated == ("c0",)
    assert any("c0: its multiplier sits at the limit" in reason for reason in certificate.reasons)


def test_a_threshold_met_only_relaxed_is_not_feasible_and_says_what_was_reached():
    certificate = certify(problem(1), state(1.0, relaxations=[math.log(2)]), [math.log(2)], [0.01], 100, 0.05)
    assert certificate.verdict == "infeasible"
    assert any("relaxed by 0.6931 to 0.05 (share)" in reason for reason in certificate.reasons)


def test_complementarity_is_reported():
    assert verdict([-0.5, -0.1], [0.01, 0.01]).complementarity == pytest.approx(0.5)


def test_a_certificate_survives_json():
    certificate = verdict([0.3, -0.4], [0.01, 0.02])
    assert Certificate.from_dict(json.loads(json.dumps(certificate.to_dict()))) == certificate


def test_a_certificate_stored_before_these_fields_existed_still_loads():
    stored = json.loads(json.dumps(verdict([0.3, -0.4], [0.01, 0.02]).to_dict()))
    for key in ("level", "duality_gap", "duality_gap_stderr", "symptoms"):
        del stored[key]
    assert Certificate.from_dict(stored) == verdict([0.3, -0.4], [0.01, 0.02])
    del stored["count"]
    with pytest.raises(ValueError, match=r"missing keys \['count'\]"):
        Certificate.from_dict(stored)
    with pytest.raises(ValueError, match=r"unknown keys \['gap'\]"):
        Certificate.from_dict({**verdict([0.3, -0.4], [0.01, 0.02]).to_dict(), "gap": 0})


def composition(*thresholds):
    constraints = tuple(Constraint(name=f"c{i}", unit="nats", threshold=b) for i, b in enumerate(thresholds))
    return problem(constraints=constraints, domain=Simplex())


def test_on_the_simplex_a_constraint_is_held_up_to_the_level():
    balanced = certify(composition(0, 0, 0), state(0.5, 0.5, 0), [0.8, 0.8, 0.3], [1e-3] * 3, 1000, 0.05)
    assert balanced.verdict == "feasible"  # none of the violations is <= 0: they are level, and that is what is asked
    assert balanced.level == pytest.approx(0.8)
    assert balanced.worst_violation == pytest.approx(0.0, abs=1e-12)
    assert balanced.intervals["c2"][1] < -0.4
    assert balanced.complementarity == pytest.approx(0.0, abs=1e-12)
    assert balanced.reasons[0].endswith("above the level 0.8")
    uneven = certify(composition(0, 0, 0), state(0.5, 0.5, 0), [0.8, 0.8, 1.0], [1e-3] * 3, 1000, 0.05)
    assert (uneven.verdict, uneven.worst_constraint) == ("infeasible", "c2")
    assert uneven.worst_violation == pytest.approx(0.2)
    assert certify(composition(0, 0, 0), state(0.5, 0.5, 0), [0.8, 0.8, 1.0], [0.1] * 3, 1000, 0.05).verdict == (
        "undecided"
    )
    assert Certificate.from_dict(json.loads(json.dumps(balanced.to_dict()))) == balanced
    assert verdict([0.0, 0.0], [0.1, 0.1]).level is None


def test_the_level_shares_the_draws_of_the_constraints_that_weigh_in_it():
    def intervals(counts):
        return certify(composition(0, 0, 0), state(0.5, 0.5, 0), [0.8, 0.8, 0.3], [0.1] * 3, counts, 0.05).intervals

    assert intervals([20, 1000, 1000]) == intervals([20, 20, 20])  # c0 is part of every difference
    assert intervals([1000, 1000, 20])["c0"] == intervals(1000)["c0"]  # c2 is not


def test_a_single_component_is_its_own_level():
    alone = certify(composition(0), state(1.0), [3.0], [0.2], 1000, 0.0)
    assert (alone.verdict, alone.level, alone.worst_violation) == ("feasible", 3.0, 0.0)


def test_a_min_max_verdict_at_the_edge_is_wrong_no_more_often_than_it_says():
    """Two level violations whose estimates move against each other, the worst case for their difference; tolerance 0:
    at most 5 % may be called infeasible. Seeded; 2000 trials give a standard error of 0.5 %, and the bound below lies
    3 of them above."""
    rng, wrong = np.random.default_rng(0), 0
    for _ in range(2000):
        draws = np.outer([1, -1], rng.normal(size=30))
        estimate, stderr = 1 + draws.mean(axis=1), draws.std(axis=1, ddof=1) / math.sqrt(30)
        wrong += certify(composition(0, 0), state(0.5, 0.5), estimate, stderr, 30, 0.0).verdict == "infeasible"
    assert wrong / 2000 <= 0.05 + 3 * 0.005


def gap(case, multipliers, objective, dual_value):
    certificate = certify(
        case,
        state(*multipliers),
        np.zeros(len(multipliers)),
        np.zeros(len(multipliers)),
        100,
        0.0,
        objective=(objective, 0.3),
        dual_value=(dual_value, 0.4),
    )
    assert certificate.duality_gap_stderr == pytest.approx(0.5)
    return certificate.duality_gap


PRIOR = np.array([0.2, 0.06])  # masses of the two constrained classes in q


def restricted_dual_value(multipliers, sign):
    """min over p of KL(q||p) + sign * sum_i multiplier_i KL(q^i||p), q^i the class i of q; methods.md H1 and H3.

    With w = q + sign * sum_i multiplier_i q^i of mass M the minimum is at p = w / M.
    """
    data = np.append(PRIOR, 1 - PRIOR.sum())
    weights = data + sign * np.append(multipliers, 0)
    model = weights / weights.sum()
    return float(data @ np.log(data) - weights @ np.log(model))  # KL(q^i||p) = -log p_i


def test_the_duality_gap_vanishes_at_the_optimum_of_at_most():
    """Fairness: KL(q^i||p) <= -log share; at other multipliers the gap is positive, whichever way they are off."""
    case = problem()  # both classes at least a tenth
    exact = class_restriction_multipliers(case.thresholds, PRIOR)
    best = class_restriction_objective(exact, PRIOR)
    assert exact[0] == 0 < exact[1]  # one constraint slack, one active
    assert gap(case, exact, best, restricted_dual_value(exact, 1)) == pytest.approx(0, abs=1e-12)
    for factor in (0.5, 1.5):
        off = factor * exact
        assert gap(case, off, best, restricted_dual_value(off, 1)) > 1e-3


@pytest.mark.parametrize("unit", ["nats", "share"])
def test_the_duality_gap_vanishes_at_the_optimum_of_at_least(unit):
    """Forward-KL unlearning: KL(q^i||p) >= b_i, canonical -KL <= -b_i; H3 gives p_i = e^-b_i and the multipliers."""
    bounds = np.array([4.0, 5.0])
    kept = (1 - PRIOR.sum()) / (1 - np.exp(-bounds).sum())
    exact = PRIOR - np.exp(-bounds) * kept
    constraints = tuple(
        Constraint(name=f"c{i}", unit="nats", threshold=b, sense=">=")
        if unit == "nats"
        else Constraint(name=f"c{i}", unit="share", threshold=math.exp(-b), sense="<=")
        for i, b in enumerate(bounds)
    )
    case = problem(constraints=constraints, domain=Capped(tuple(PRIOR)))
    objective = float(PRIOR @ (np.log(PRIOR) + bounds) + (1 - PRIOR.sum()) * math.log(kept))
    assert gap(case, exact, objective, restricted_dual_value(exact, -1)) == pytest.approx(0, abs=1e-12)
    for factor in (0.5, 0.99):
        off = factor * exact
        assert gap(case, off, objective, restricted_dual_value(off, -1)) > 1e-4


def test_the_duality_gap_of_a_composition_counts_from_the_largest_violation():
    """Two Gaussians of variance 1 at 0 and 2 (methods.md H6): level and dual value 1/2 less the equal thresholds."""

    def composed(weight, threshold):
        multipliers, mean = np.array([1 - weight, weight]), 2 * weight
        violation = np.array([mean**2, (mean - 2) ** 2]) / 2 - threshold
        return gap(composition(threshold, threshold), multipliers, violation.max(), 2 * weight * (1 - weight))

    assert composed(0.5, 0.0) == pytest.approx(0, abs=1e-12)
    assert composed(0.5, 0.3) == pytest.approx(0, abs=1e-12)
    assert composed(0.4, 0.3) == pytest.approx(0.72 - 0.48)  # (0.8 - 2)^2 / 2 against 2 * 0.4 * 0.6


def test_without_both_values_there_is_no_gap():
    for known in ({}, {"objective": (1.0, 0.1)}, {"dual_value": (1.0, 0.1)}):
        certificate = verdict([0.0, 0.0], [0.1, 0.1], **known)
        assert (certificate.duality_gap, certificate.duality_gap_stderr) == (None, None)
    unconstrained = certify(problem(0), state(), [], [], 100, 0.0, objective=(1.0, 0.0), dual_value=(0.75, 0.1))
    assert (unconstrained.duality_gap, unconstrained.duality_gap_stderr) == (0.25, 0.1)


def test_symptoms_are_kept_as_text():
    row = {
        "multipliers": [1.0],
        "violations": [0.3],
        "violation_stderrs": [0.01],
        "thresholds": [1.0],
        "objective": 1.0,
    }
    rows = [{**row, "dual_step": i} for i in range(30)]
    seen = find_symptoms(rows, names=("c0",), domain=NonNegative(), tolerance=0.1)
    certificate = certify(problem(1), state(1.0), [0.3], [0.01], 100, 0.1, symptoms=seen)
    assert len(certificate.symptoms) == 1
    assert certificate.symptoms[0].startswith("persistent violation of c0: violation 0.3")
    assert Certificate.from_dict(json.loads(json.dumps(certificate.to_dict()))) == certificate
    assert verdict([0.0, 0.0], [0.1, 0.1]).symptoms == ()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"objective": (math.nan, 0.1)}, "objective=nan"),
        ({"dual_value": (-math.inf, 0.1)}, "dual_value=-inf"),
        ({"dual_value": (0.0, -0.1)}, "dual_value stderr=-0.1"),
        ({"violation": [0.0, math.nan]}, r"non-finite violation for \['c1'\]"),
        ({"stderr": [math.nan, 0.0]}, r"non-finite standard error for \['c0'\]"),
        ({"stderr": [-0.1, 0.0]}, "standard errors >= 0"),
        ({"violation": [0.0]}, "shape"),
        ({"tolerance": -1}, "feasibility_tolerance=-1"),
        ({"confidence": 1.0}, "confidence=1.0"),
    ],
)
def test_bad_numbers_are_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        verdict(**{"violation": [0.0, 0.0], "stderr": [0.1, 0.1], **change})


def test_a_state_of_another_problem_is_refused():
    with pytest.raises(ValueError, match="give its own state"):
        certify(problem(1), state(1.0, 0.0), [0.0], [0.1], 100, 0.0)
