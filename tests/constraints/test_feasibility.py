"""Certificates: each verdict on both sides, the joint confidence they promise, and the trip through JSON."""

import json
import math

import numpy as np
import pytest

from dualsweep.constraints.domains import Capped
from dualsweep.constraints.feasibility import Certificate, certify
from dualsweep.constraints.multipliers import DualState
from dualsweep.constraints.problem import Constraint, Problem


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


def test_too_few_draws_decide_nothing():
    certificate = verdict([-5.0, -5.0], [0.01, 0.01], count=9)
    assert certificate.verdict == "undecided"
    assert any("only 9 draws" in reason for reason in certificate.reasons)


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


@pytest.mark.parametrize(
    "change, message",
    [
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
