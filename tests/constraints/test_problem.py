"""Units turned into `metric - threshold <= 0` once, and requests that can never hold refused by name."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dualsweep.constraints.domains import Capped, SumBelow
from dualsweep.constraints.problem import UNITS, Constraint, Problem, resolved_threshold, threshold_error

RANGES = {
    "loss": st.floats(1e-6, 1e3),
    "nats": st.floats(0, 1e3),
    "share": st.floats(1e-9, 1 - 1e-9),
    "likelihood_ratio": st.floats(1e-6, 1e3),
    "reward": st.floats(-1e3, 1e3),
}


def fairness(*shares, **changes):
    constraints = tuple(Constraint(name=f"c{i}", unit="share", threshold=s) for i, s in enumerate(shares))
    return Problem(**{"method": "fairness", "objective": "KL(q||p)", "constraints": constraints, **changes})


@pytest.mark.parametrize("sense", [None, "<=", ">="])
@pytest.mark.parametrize("unit", UNITS)
@given(data=st.data())
def test_user_and_canonical_values_invert_and_the_sense_says_which_side_is_satisfied(unit, sense, data):
    threshold = data.draw(RANGES[unit].filter(lambda b: threshold_error(b, unit, sense=sense) is None))
    constraint = Constraint(name="c", unit=unit, threshold=threshold, sense=sense)
    value = data.draw(RANGES[unit])
    # -log and exp of a number below 1 lose a few units in the last place
    assert constraint.to_user(constraint.canonical(value)) == pytest.approx(value, rel=1e-12)
    wanted = sense or (">=" if unit in ("share", "reward") else "<=")
    assert constraint.sense == wanted
    satisfied = value >= constraint.threshold if wanted == ">=" else value <= constraint.threshold
    difference = constraint.canonical(value) - constraint.canonical_threshold
    assert (difference <= 0) == satisfied or value == pytest.approx(constraint.threshold, rel=1e-12)


def test_a_tenth_of_the_samples_is_log_ten_nats():
    problem = fairness(0.1, 0.2)
    assert problem.thresholds == pytest.approx([math.log(10), math.log(5)])
    assert problem.violation([math.log(20), math.log(5)]) == pytest.approx([math.log(2), 0.0])


@pytest.mark.parametrize(
    "unit, sense, value, canonical",
    [
        ("loss", "<=", 0.03, 0.03),
        ("loss", ">=", 0.03, -0.03),
        ("nats", "<=", 2.0, 2.0),
        ("nats", ">=", 2.0, -2.0),
        ("share", "<=", 0.1, -math.log(10)),
        ("share", ">=", 0.1, math.log(10)),
        ("likelihood_ratio", "<=", 0.3, 0.3),
        ("likelihood_ratio", ">=", 0.3, -0.3),
        ("reward", "<=", 0.5, 0.5),
        ("reward", ">=", 0.5, -0.5),
    ],
)
def test_the_canonical_metric_of_every_unit_and_sense(unit, sense, value, canonical):
    constraint = Constraint(name="c", unit=unit, threshold=value, sense=sense)
    assert constraint.canonical_threshold == constraint.canonical(value) == pytest.approx(canonical, abs=1e-15)
    assert constraint.to_user(canonical) == pytest.approx(value, rel=1e-15)


def test_forgetting_a_class_and_keeping_another_are_violated_on_opposite_sides():
    """Forward-KL unlearning of a class is "at most this share", which is -KL(q^i||p) <= log of it (methods.md H3)."""
    forget = Constraint(name="forget", unit="share", threshold=0.01, sense="<=")
    keep = Constraint(name="keep", unit="share", threshold=0.2)
    problem = fairness(constraints=(forget, keep))
    metrics = [forget.canonical(0.02), keep.canonical(0.1)]
    assert problem.violation(metrics) == pytest.approx([math.log(2), math.log(2)])
    assert (problem.violation([forget.canonical(0.005), keep.canonical(0.4)]) < 0).all()


def test_a_share_of_nothing_is_infinitely_far():
    assert Constraint(name="c", unit="share", threshold=0.1).canonical(0.0) == math.inf
    assert Constraint(name="c", unit="share", threshold=0.1, sense="<=").canonical(0.0) == -math.inf


def test_standard_errors_follow_the_unit():
    share = Constraint(name="c", unit="share", threshold=0.1)
    assert share.to_user_stderr(math.log(5), 0.1) == pytest.approx(0.02)
    at_most = Constraint(name="c", unit="share", threshold=0.1, sense="<=")
    assert at_most.to_user_stderr(-math.log(5), 0.1) == pytest.approx(0.02)
    assert Constraint(name="c", unit="reward", threshold=1.0).to_user_stderr(-1.0, 0.1) == 0.1


@pytest.mark.parametrize(
    "unit, threshold, message",
    [
        ("share", 0.0, r"'c'.*threshold=0.0: a share must be in \(0, 1\)"),
        ("share", 1.0, "a share must be"),
        ("share", 1.4, "threshold=1.4"),
        ("loss", -0.1, "a loss must be > 0"),
        ("loss", 0, "a loss must be > 0"),
        ("nats", -1, "must be >= 0"),
        ("likelihood_ratio", 0, "must be > 0"),
        ("reward", math.inf, "finite"),
        ("share", math.nan, "finite"),
        ("loss", "0.1", "finite number"),
        ("loss", True, "finite number"),
        ("percent", 10, r"unit='percent'.*'share'"),
    ],
)
def test_a_threshold_that_can_never_hold_is_refused(unit, threshold, message):
    with pytest.raises(ValueError, match=message):
        Constraint(name="c", unit=unit, threshold=threshold)


def test_zero_nats_are_a_request_from_above_alone():
    assert Constraint(name="c", unit="nats", threshold=0).canonical_threshold == 0.0
    with pytest.raises(ValueError, match="at least so many nats must be > 0"):
        Constraint(name="c", unit="nats", threshold=0, sense=">=")


@pytest.mark.parametrize("sense", ["=", "", "ge", 1])
def test_an_unknown_sense_is_refused(sense):
    with pytest.raises(ValueError, match=r"'c': sense=.*'<=', '>='"):
        Constraint(name="c", unit="nats", threshold=1.0, sense=sense)
    with pytest.raises(ValueError, match=r"sense=.*'<=', '>='"):
        threshold_error(1.0, "nats", sense=sense)


def test_a_loss_of_zero_is_a_request_only_where_it_may_be_relaxed():
    assert Constraint(name="c", unit="loss", threshold=0, relaxation_cost=0.1).threshold == 0.0
    with pytest.raises(ValueError, match=r"a loss must be > 0$"):
        Constraint(name="c", unit="loss", threshold=0, relaxation_cost=0.1, sense=">=")
    with pytest.raises(ValueError, match="relaxation_cost=-1"):
        Constraint(name="c", unit="loss", threshold=0, relaxation_cost=-1)


@pytest.mark.parametrize("name", ["", None, 3])
def test_a_constraint_needs_a_name(name):
    with pytest.raises(ValueError, match="name"):
        Constraint(name=name, unit="loss", threshold=1.0)


@pytest.mark.parametrize("shares", [(0.5, 0.5), (0.1,) * 10, (0.9, 0.2)])
def test_shares_that_leave_nothing_for_the_rest_are_refused(shares):
    with pytest.raises(ValueError, match=r"thresholds: shares \{'c0'.*sum to 1.*lower them"):
        fairness(*shares)


def test_shares_below_one_and_large_thresholds_of_other_units_are_accepted():
    assert len(fairness(*(0.1,) * 9).constraints) == 9
    at_most = tuple(Constraint(name=f"c{i}", unit="share", threshold=0.9, sense="<=") for i in range(3))
    assert len(fairness(constraints=at_most).constraints) == 3
    losses = tuple(Constraint(name=f"c{i}", unit="loss", threshold=0.9) for i in range(3))
    assert len(fairness(constraints=losses).constraints) == 3


def test_repeated_names_and_caps_that_do_not_match_are_refused():
    twice = (Constraint(name="c", unit="loss", threshold=1.0),) * 2
    with pytest.raises(ValueError, match=r"repeated names \['c'\]"):
        fairness(constraints=twice)
    with pytest.raises(ValueError, match=r"domain\.caps"):
        fairness(0.1, 0.2, domain=Capped((0.1,)))


def test_a_bad_metric_is_refused_by_the_name_of_its_constraint():
    with pytest.raises(ValueError, match=r"non-finite metric for \['c1'\]"):
        fairness(0.1, 0.2).violation([0.0, math.nan])
    with pytest.raises(ValueError, match="shape"):
        fairness(0.1, 0.2).violation([0.0])


def test_new_thresholds_replace_all_or_none():
    assert fairness(0.1, 0.2).with_thresholds({"c1": 0.3, "c0": 0.4}).thresholds == pytest.approx(-np.log([0.4, 0.3]))
    with pytest.raises(ValueError, match=r"missing keys \['c1'\], unknown keys \['c2'\]"):
        fairness(0.1, 0.2).with_thresholds({"c0": 0.3, "c2": 0.3})


def test_a_problem_survives_json():
    problem = fairness(0.1, 0.2, domain=SumBelow(1.0))
    assert Problem.from_dict(json.loads(json.dumps(problem.to_dict()))) == problem
    forget = Constraint(name="c", unit="nats", threshold=3.0, sense=">=")
    assert Constraint.from_dict(json.loads(json.dumps(forget.to_dict()))) == forget
    older = {key: value for key, value in forget.to_dict().items() if key != "sense"}
    assert Constraint.from_dict(older).sense == "<="
    with pytest.raises(ValueError, match=r"unknown keys \['weight'\]"):
        Problem.from_dict({**problem.to_dict(), "weight": 1})


def test_an_unconstrained_problem_has_empty_vectors():
    problem = fairness()
    assert problem.names == ()
    assert problem.violation([]).shape == (0,)


@pytest.mark.parametrize("unit", ["loss", "nats", "likelihood_ratio"])
def test_a_factor_multiplies_the_pretrained_value(unit):
    assert resolved_threshold({"factor": 1.1}, unit, pretrained=0.03) == pytest.approx(0.033)
    assert resolved_threshold(0.05, unit) == 0.05
    with pytest.raises(ValueError, match=f"no pretrained {words(unit)} to multiply"):
        resolved_threshold({"factor": 1.1}, unit)
    for pretrained in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match=f"pretrained {words(unit)}={pretrained}"):
            resolved_threshold({"factor": 1.1}, unit, pretrained=pretrained)


def words(unit):
    return {"nats": "divergence", "likelihood_ratio": "likelihood ratio"}.get(unit, unit)


@pytest.mark.parametrize(
    "value, unit, message",
    [
        ({"factor": 1.1}, "share", r"loss, nats, likelihood_ratio, got 'share' \(a share is already a fraction"),
        ({"factor": 1.1}, "reward", "already counts standard deviations from the pretrained model"),
        ({"factor": 1.1}, "percent", "unknown unit 'percent'"),
        ({"factor": -1}, "loss", "threshold.factor=-1"),
        ({"times": 1.1}, "loss", "factor"),
    ],
)
def test_a_factor_of_nothing_is_refused(value, unit, message):
    with pytest.raises(ValueError, match=message):
        resolved_threshold(value, unit, pretrained=0.1)
