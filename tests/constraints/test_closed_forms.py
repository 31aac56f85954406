"""Closed forms against the numbers of methods.md, against dual ascent, and against the KKT conditions."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dualsweep.constraints.closed_forms import (
    class_restriction_multipliers,
    class_restriction_objective,
    class_restriction_shares,
    disjoint_multipliers,
    resilient_class_restriction_multipliers,
)

PRIOR = [0.06, 0.04]
# three classes with requests that can hold together, anywhere between inactive and far above the prior
requests = st.lists(st.floats(1e-3, 0.3), min_size=3, max_size=3)
priors = st.lists(st.floats(0, 0.33), min_size=3, max_size=3)


def test_the_examples_of_methods_md():
    fifth = [math.log(5)] * 2
    multipliers = class_restriction_multipliers(fifth, PRIOR)
    assert multipliers == pytest.approx([0.24, 0.26], abs=1e-12)
    assert class_restriction_shares(multipliers, PRIOR) == pytest.approx([0.2, 0.2], abs=1e-12)
    assert disjoint_multipliers([1.5, 2.0]) == pytest.approx([0.3478, 0.2110], abs=5e-5)  # four printed digits
    resilient = resilient_class_restriction_multipliers([0, 0], PRIOR, 0.25)
    assert resilient == pytest.approx([1.8128, 1.8231], abs=5e-5)
    assert class_restriction_shares(resilient, PRIOR) == pytest.approx([0.404, 0.402], abs=5e-4)


def test_the_objective_is_the_divergence_of_the_whole_mixture():
    data = np.array([0.4, 0.3, 0.2, *PRIOR])
    multipliers = np.array([0.24, 0.26])
    mixture = (data + np.array([0, 0, 0, *multipliers])) / 1.5
    expected = float(data @ np.log(data / mixture))
    assert class_restriction_objective(multipliers, PRIOR) == pytest.approx(expected, abs=1e-12)
    assert class_restriction_objective([0.0, 0.0], PRIOR) == 0.0
    assert class_restriction_objective([0.5], [0.0]) == pytest.approx(math.log(1.5))  # a class absent from the data


@given(requests, priors)
def test_exact_multipliers_satisfy_the_kkt_conditions(shares, prior):
    epsilon = -np.log(shares)
    multipliers = class_restriction_multipliers(epsilon, prior)
    violation = -np.log(class_restriction_shares(multipliers, prior) + 1e-300) - epsilon
    assert (multipliers >= 0).all()
    assert violation.max() <= 1e-9  # round-off of log over shares down to 1e-3
    assert np.abs(np.minimum(multipliers, -violation)).max() <= 1e-9


def test_a_class_whose_prior_is_enough_alone_becomes_active_when_others_push_it_down():
    prior, share = [0.02, 0.105], [0.3, 0.1]
    assert class_restriction_multipliers([-math.log(share[1])], [prior[1]])[0] == 0.0
    multipliers = class_restriction_multipliers(-np.log(share), prior)
    assert (multipliers > 0).all()
    assert class_restriction_shares(multipliers, prior) == pytest.approx(share, abs=1e-12)


def test_a_request_already_met_costs_nothing():
    multipliers = class_restriction_multipliers([math.log(10)] * 2, [0.2, 0.3])
    assert multipliers.tolist() == [0.0, 0.0]
    assert class_restriction_objective(multipliers, [0.2, 0.3]) == 0.0


@given(requests, priors, st.floats(0.05, 5))
def test_resilient_multipliers_stand_where_the_resilient_rule_stands_still(shares, prior, alpha):
    epsilon = -np.log(shares)
    multipliers = resilient_class_restriction_multipliers(epsilon, prior, alpha)
    violation = -np.log(np.maximum(class_restriction_shares(multipliers, prior), 1e-300)) - epsilon
    excess = violation - 2 * alpha * multipliers
    active = multipliers > 1e-12
    assert np.abs(excess[active]).max(initial=0) <= 1e-8  # round-off over shares down to 1e-3
    assert excess[~active].max(initial=-1) <= 1e-8


@pytest.mark.parametrize("alpha", [1e-9, 1e-3, 1.0, 1e4])
def test_the_resilient_fixed_point_is_found_over_many_orders_of_the_cost(alpha):
    epsilon, prior = np.zeros(3), np.array([0.0, 0.04, 0.1])
    multipliers = resilient_class_restriction_multipliers(epsilon, prior, alpha)
    # the violation here is of order 1; a multiplier of order 1 / alpha carries its round-off
    violation = -np.log(class_restriction_shares(multipliers, prior))
    assert violation == pytest.approx(2 * alpha * multipliers, rel=1e-6)


@given(requests, priors)
def test_a_cheap_enough_relaxation_cost_recovers_the_plain_multipliers(shares, prior):
    epsilon = -np.log(shares)
    plain = class_restriction_multipliers(epsilon, prior)
    resilient = resilient_class_restriction_multipliers(epsilon, prior, 1e-9)
    assert resilient == pytest.approx(plain, abs=1e-5)  # 2 alpha lambda is at most 1e-6 here


def test_each_class_may_have_its_own_relaxation_cost():
    epsilon, prior, alpha = [math.log(4)] * 2, [0.05, 0.05], np.array([0.1, 2.0])
    multipliers = resilient_class_restriction_multipliers(epsilon, prior, alpha)
    violation = -np.log(class_restriction_shares(multipliers, prior)) - epsilon
    assert violation == pytest.approx(2 * alpha * multipliers, abs=1e-10)
    assert multipliers[0] > multipliers[1]


def test_the_slope_of_the_cost_is_minus_the_multiplier():
    step = 1e-5
    cost = [
        class_restriction_objective(class_restriction_multipliers([e], [0.02]), [0.02])
        for e in (math.log(5) - step, math.log(5) + step)
    ]
    slope = (cost[1] - cost[0]) / (2 * step)
    exact = class_restriction_multipliers([math.log(5)], [0.02])[0]
    assert slope == pytest.approx(-exact, abs=1e-8)  # central difference, error of order step^2


@pytest.mark.parametrize(
    "epsilon, prior, message",
    [
        ([math.log(2)] * 2, PRIOR, "shares e.*sum to 1"),
        ([math.nan, 1.0], PRIOR, "finite thresholds"),
        ([-0.1, 1.0], PRIOR, "thresholds >= 0"),
        ([1.0], PRIOR, "one entry a class"),
        ([3.0, 3.0], [0.7, 0.7], "sum <= 1"),
        ([3.0, 3.0], [math.nan, 0.7], "sum <= 1"),
        ([3.0, 3.0], [-0.1, 0.7], "masses >= 0"),
    ],
)
def test_impossible_requests_and_priors_are_refused(epsilon, prior, message):
    with pytest.raises(ValueError, match=message):
        class_restriction_multipliers(epsilon, prior)


def test_bad_costs_and_multipliers_are_refused():
    with pytest.raises(ValueError, match=r"relaxation_cost\[0\]=0"):
        resilient_class_restriction_multipliers([1.0], [0.1], 0)
    with pytest.raises(ValueError, match="multipliers"):
        class_restriction_shares([-1.0], [0.1])
    with pytest.raises(ValueError, match="sum to 1"):
        disjoint_multipliers([math.log(2)] * 2)


def test_no_constraints_give_an_empty_answer_and_no_cost():
    assert class_restriction_multipliers([], []).shape == (0,)
    assert resilient_class_restriction_multipliers([], [], 0.5).shape == (0,)
    assert class_restriction_objective([], []) == 0.0
