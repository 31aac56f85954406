"""Closed forms against the numbers of methods.md, against dual ascent, and against the KKT conditions."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dualsweep.constraints.closed_forms import (
    alignment_gaussian_multiplier,
    class_restriction_multipliers,
    class_restriction_objective,
    class_restriction_shares,
    disjoint_multipliers,
    forward_kl_unlearning_multipliers,
    likelihood_ratio_multiplier,
    resilient_class_restriction_multipliers,
    reverse_kl_gaussian_multiplier,
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
    assert reverse_kl_gaussian_multiplier(-1.5, 0.8, 1.9 * 1.5**2 / (2 * 0.64)) == pytest.approx(0.2745, abs=5e-5)
    assert forward_kl_unlearning_multipliers([4, 5], [0.2, 0.06]) == pytest.approx([0.1861, 0.05489], abs=5e-5)
    assert likelihood_ratio_multiplier(0.3, 0.2) == pytest.approx(0.27305, abs=5e-6)
    assert alignment_gaussian_multiplier(1.4, 0.3, 0.9) == pytest.approx(1.1 / 0.81, abs=1e-12)


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


@given(st.lists(st.floats(0, 8), min_size=3, max_size=3), priors)
def test_forward_unlearning_multipliers_satisfy_the_kkt_conditions_below_their_caps(threshold, prior):
    multipliers = forward_kl_unlearning_multipliers(threshold, prior)
    prior = np.array(prior)
    assert (multipliers >= 0).all()
    assert (multipliers < prior)[multipliers > 0].all()
    shares = (prior - multipliers) / (1 - multipliers.sum())
    excess = shares - np.exp(-np.array(threshold))  # KL(q^i||p) = -log share_i >= threshold_i
    assert excess.max() <= 1e-9  # round-off of shares with 1 - sum lambda down to 0.01
    assert np.abs(excess[multipliers > 0]).max(initial=0) <= 1e-9


def test_forgetting_one_class_activates_another_that_gains_from_it():
    threshold, prior = -np.log([0.1, 0.3]), [0.5, 0.25]
    assert forward_kl_unlearning_multipliers(threshold[1:], prior[1:])[0] == 0.0
    multipliers = forward_kl_unlearning_multipliers(threshold, prior)
    assert (multipliers > 0).all()
    assert (np.array(prior) - multipliers) / (1 - multipliers.sum()) == pytest.approx([0.1, 0.3], abs=1e-12)


def test_the_whole_of_the_data_cannot_be_forgotten_unless_a_class_may_take_it():
    with pytest.raises(ValueError, match=r"threshold=.*none is left"):
        forward_kl_unlearning_multipliers([2.0, 2.0], [0.6, 0.4])
    shares = -np.log([0.5, 0.8])
    assert forward_kl_unlearning_multipliers(shares, [0.7, 0.3]) == pytest.approx([0.4, 0.0], abs=1e-12)


@given(st.floats(0.01, 0.99), st.floats(0.01, 0.99))
def test_the_ratio_multiplier_leaves_the_class_the_share_asked_for(threshold, prior):
    multiplier = likelihood_ratio_multiplier(threshold, prior)
    weights = np.array([prior * math.exp(-multiplier / prior), 1 - prior])  # q e^{-lambda r}
    assert multiplier > 0
    assert weights[0] / weights.sum() == pytest.approx(threshold * prior, rel=1e-9)


def test_thresholds_that_hold_by_themselves_cost_nothing():
    assert likelihood_ratio_multiplier(1.0, 0.2) == 0.0
    assert reverse_kl_gaussian_multiplier(1.5, 0.8, 0.0) == 0.0
    assert reverse_kl_gaussian_multiplier(1.5, 0.8, 1.5**2 / (2 * 0.64)) == 0.0
    assert alignment_gaussian_multiplier(0.2, 0.3, 0.9) == 0.0
    assert forward_kl_unlearning_multipliers([0.5, 1.0], [0.2, 0.1]).tolist() == [0.0, 0.0]
    assert forward_kl_unlearning_multipliers([], []).shape == (0,)


@given(st.floats(-3, 3).filter(lambda gap: abs(gap) > 0.01), st.floats(0.1, 3), st.floats(1.01, 50))
def test_the_reverse_multiplier_puts_the_model_at_the_threshold(gap, std, factor):
    threshold = factor * gap**2 / (2 * std**2)
    multiplier = reverse_kl_gaussian_multiplier(gap, std, threshold)
    mean = gap / (1 - multiplier)  # (m_0 - lambda m_1) / (1 - lambda) with q at `gap` and q^1 at 0
    assert mean**2 / (2 * std**2) == pytest.approx(threshold, rel=1e-9)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: reverse_kl_gaussian_multiplier(0.0, 1.0, 1.0), r"\|mean_gap\|=0"),
        (lambda: reverse_kl_gaussian_multiplier(1.0, 0.0, 1.0), "std=0"),
        (lambda: reverse_kl_gaussian_multiplier(1.0, 1.0, -1.0), "threshold=-1"),
        (lambda: forward_kl_unlearning_multipliers([-1.0], [0.1]), r"threshold=\[-1"),
        (lambda: forward_kl_unlearning_multipliers([1.0], [0.1, 0.2]), "shapes of threshold"),
        (lambda: likelihood_ratio_multiplier(0.0, 0.2), "threshold=0"),
        (lambda: likelihood_ratio_multiplier(0.5, 1.0), "prior=1"),
        (lambda: alignment_gaussian_multiplier(math.nan, 0.0, 1.0), "threshold=nan"),
        (lambda: alignment_gaussian_multiplier(1.0, 0.0, -1.0), "std=-1"),
    ],
)
def test_values_out_of_range_are_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call()
