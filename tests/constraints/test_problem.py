"""Units turned into `metric - threshold <= 0` once, and requests that can never hold refused by name."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dualsweep.constraints.domains import Capped, SumBelow
from dualsweep.constraints.problem import UNITS, Constraint, Problem, resolved_threshold

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


@pytest.mark.parametrize("unit", UNITS)
@given(data=st.data())
def test_user_and_canonical_values_invert_and_the_sense_says_which_side_is_satisfied(unit, data):
    constraint = Constraint(name="c", unit=unit, threshold=data.draw(RANGES[unit]))
    value = data.draw(RANGES[unit])
    # -log and exp of a number below 1 lose a few units in the last place
    assert constraint.to_user(constraint.canonical(value)) == pytest.approx(value, rel=1e-12)
    satisfied = value >= constraint.threshold if constraint.sense == ">=" else value <= constraint.threshold
    difference = constraint.canonical(value) - constraint.canonical_threshold
    assert (difference <= 0) == satisfied or value == pytest.approx(constraint.threshold, rel=1e-12)


def test_a_tenth_of_the_samples_is_log_ten_nats():
    problem = fairness(0.1, 0.2)
    assert problem.thresholds == pytest.approx([math.log(10), math.log(5)])
    assert problem.violation([math.log(20), math.log(5)]) == pytest.approx([math.log(2), 0.0])


def test_a_share_of_nothing_is_infinitely_far():
    assert Constraint(name="c", unit="share", threshold=0.1).canonical(0.0) == math.inf


def test_standard_errors_follow_the_unit():
    share = Constraint(name="c", unit="share", threshold=0.1)
    assert share.to_user_stderr(math.log(5), 0.1) == pytest.approx(0.02)
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


def test_a_loss_of_zero_is_a_request_only_where_it_may_be_relaxed():
    assert Constraint(name="c", unit="loss", threshold=0, relaxation_cost=0.1).threshold == 0.0
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
    with pytest.raises(ValueError, match=r"unknown keys \['weight'\]"):
        Problem.from_dict({**problem.to_dict(), "weight": 1})


def test_an_unconstrained_problem_has_empty_vectors():
    problem = fairness()
    assert problem.names == ()
    assert problem.violation([]).shape == (0,)


def test_a_factor_multiplies_the_pretrained_loss():
    assert resolved_threshold({"factor": 1.1}, "loss", pretrained=0.03) == pytest.approx(0.033)
    assert resolved_threshold(0.05, "loss") == 0.05
    for value, unit, pretrained, message in [
        ({"factor": 1.1}, "share", 0.1, "unit loss"),
        ({"factor": 1.1}, "loss", None, "no pretrained loss"),
        ({"factor": -1}, "loss", 0.1, "threshold.factor=-1"),
        ({"factor": 1.1}, "loss", math.nan, "pretrained loss=nan"),
        ({"times": 1.1}, "loss", 0.1, "factor"),
    ]:
        with pytest.raises(ValueError, match=message):
            resolved_threshold(value, unit, pretrained=pretrained)
