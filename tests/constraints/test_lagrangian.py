"""The Lagrangian for any arithmetic type, and the parts of the KKT residual."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dualsweep.constraints.domains import NonNegative, Simplex
from dualsweep.constraints.dual_rules import Ascent
from dualsweep.constraints.lagrangian import (
    above_level,
    complementarity_residual,
    infeasibility,
    kkt_residual,
    lagrangian,
    min_max_level,
)
from dualsweep.constraints.multipliers import DualState


def state(*multipliers, relaxations=None):
    names = tuple(f"c{i}" for i in range(len(multipliers)))
    return DualState(names=names, multipliers=multipliers, relaxations=relaxations)


def test_the_lagrangian_is_objective_plus_multiplier_times_violation():
    assert lagrangian(1.0, [2.0, 3.0], [0.5, -1.0]) == -1.0
    assert lagrangian(1.0, [], []) == 1.0
    per_sample = lagrangian(np.array([1.0, 2.0]), [2.0], [np.array([0.5, 1.0])])
    assert per_sample.tolist() == [2.0, 4.0]
    with pytest.raises(ValueError):
        lagrangian(1.0, [2.0], [0.5, 1.0])


def test_the_lagrangian_is_differentiable_in_the_terms_of_a_tensor_library():
    torch = pytest.importorskip("torch", reason="torch is not needed by constraints, only by this twin")
    value = torch.tensor(2.0, requires_grad=True)
    lagrangian(value**2, np.array([3.0]), [value * 5]).backward()
    assert value.grad.item() == pytest.approx(2 * 2.0 + 3 * 5)


def test_infeasibility_is_the_largest_excess_over_the_relaxation():
    assert infeasibility([-1.0, 0.3]) == 0.3
    assert infeasibility([-1.0, -0.3]) == 0.0
    assert infeasibility([0.5, 0.3], [0.4, 0.0]) == pytest.approx(0.3)
    assert infeasibility([]) == 0.0


@given(st.lists(st.tuples(st.floats(0, 10), st.floats(-10, 10)), min_size=1, max_size=5))
def test_complementarity_is_the_largest_absolute_minimum_of_multiplier_and_slack(pairs):
    multipliers, violation = map(list, zip(*pairs, strict=True))
    expected = max(abs(min(m, -v)) for m, v in pairs)
    assert complementarity_residual(state(*multipliers), violation) == pytest.approx(expected, abs=1e-12)


def test_complementarity_is_zero_at_optimal_pairs_and_sees_each_kind_of_fault():
    optimal = state(2.0, 0.0)
    assert complementarity_residual(optimal, [0.0, -3.0]) == 0.0
    assert complementarity_residual(optimal, [-0.5, -3.0]) == 0.5  # multiplier on a slack constraint
    assert complementarity_residual(optimal, [0.0, 0.7]) == 0.7  # violated without a multiplier


def test_relaxed_constraints_are_complementary_at_their_relaxation():
    assert complementarity_residual(state(2.0, relaxations=[0.5]), [0.5]) == 0.0
    assert complementarity_residual(state(2.0), [0.5]) == 0.5


def test_on_the_simplex_equal_violations_are_at_rest():
    assert complementarity_residual(state(0.5, 0.5), [0.3, 0.3], Simplex()) == pytest.approx(0.0, abs=1e-15)
    assert complementarity_residual(state(0.5, 0.5), [0.3, 0.1], Simplex()) > 0.05


MEANS, SIGMA = np.array([-1.0, 0.3, 2.0]), 0.8


def composed(multipliers):
    """KL(p || N(mean_i, sigma^2)) of the geometric mean p with these weights, and min over p of their weighted sum."""
    mean = multipliers @ MEANS
    dual_value = (multipliers @ MEANS**2 - mean**2) / (2 * SIGMA**2)  # -log integral of prod q_i^multiplier_i
    return (mean - MEANS) ** 2 / (2 * SIGMA**2), dual_value


def test_composition_of_gaussians_rests_at_the_centre_of_the_enclosing_ball():
    """methods.md H6: means -1, 0.3 and 2 give multipliers (1/2, 0, 1/2) and the level R^2 / (2 sigma^2), R = 1.5."""
    rule, domain = Ascent(0.1), Simplex()
    start = rule.initial(("a", "b", "c"), 1 / 3, domain)
    assert complementarity_residual(start, composed(start.multipliers)[0], domain) > 0.05  # where nothing is optimal
    optimum = start
    for _ in range(2000):
        optimum = rule.step(optimum, composed(optimum.multipliers)[0], domain)
    violation, dual_value = composed(optimum.multipliers)
    assert optimum.multipliers == pytest.approx([0.5, 0, 0.5], abs=1e-9)
    assert complementarity_residual(optimum, violation, domain) < 1e-9
    assert kkt_residual(optimum, violation, 0.0, domain) < 1e-9
    assert kkt_residual(optimum, violation, 0.0) > 1  # its constraints are no "<= 0": only the level counts
    level = min_max_level(optimum.multipliers, violation, domain)
    assert level == pytest.approx(1.5**2 / (2 * SIGMA**2), abs=1e-9)
    assert level == pytest.approx(dual_value, abs=1e-9)
    assert level == pytest.approx(violation.max(), abs=1e-9)


def test_thresholds_and_a_slack_vertex_shift_the_level_with_them():
    domain, thresholds = Simplex(), np.array([0.0, 0.0, 5.0])  # the third may stay 5 nats worse: it drops out
    rule = Ascent(0.05)
    optimum = rule.initial(("a", "b", "c"), 1 / 3, domain)
    for _ in range(4000):
        optimum = rule.step(optimum, composed(optimum.multipliers)[0] - thresholds, domain)
    violation = composed(optimum.multipliers)[0] - thresholds
    assert optimum.multipliers == pytest.approx([0.5, 0.5, 0], abs=1e-6)
    assert complementarity_residual(optimum, violation, domain) < 1e-6
    assert kkt_residual(optimum, violation, 0.0, domain) < 1e-6
    # the same problem with one number more in every threshold has a level as much lower
    lower = min_max_level(optimum.multipliers, violation - 0.2, domain)
    assert lower == pytest.approx(min_max_level(optimum.multipliers, violation, domain) - 0.2)


def test_a_level_belongs_to_the_simplex_alone():
    assert min_max_level([0.5, 0.5], [1.0, 3.0], Simplex()) == 2.0
    assert min_max_level([0.5, 0.5], [1.0, 3.0], NonNegative()) is None
    assert min_max_level([0.5, 0.5], [1.0, 3.0]) is None


def test_relaxations_are_granted_before_the_level_is_taken():
    relaxed = state(0.5, 0.5, relaxations=[0.3, 0.0])
    assert kkt_residual(relaxed, [1.3, 1.0], 0.0, Simplex()) == pytest.approx(0.0, abs=1e-15)
    assert kkt_residual(relaxed, [1.0, 1.3], 0.0, Simplex()) == pytest.approx(0.3)  # 0.6 apart, the level half-way


@pytest.mark.parametrize("correlation, share", [(1.0, None), (0.0, None), (-1.0, 1.0)])
def test_the_error_above_the_level_holds_for_any_correlation(correlation, share):
    """Two components of weights 0.7 and 0.3: violation_0 - level is 0.3 (v_0 - v_1), with errors 0.1 and 0.2."""
    multipliers, stderr = np.array([0.7, 0.3]), np.array([0.1, 0.2])
    excess, bound = above_level(multipliers, [1.0, 2.0], stderr)
    assert excess == pytest.approx([-0.3, 0.7])
    covariance = np.outer(stderr, stderr) * np.array([[1, correlation], [correlation, 1]])
    weights = np.eye(2) - multipliers
    exact = np.sqrt(np.diag(weights @ covariance @ weights.T))
    assert (exact <= bound + 1e-15).all()
    assert bound == pytest.approx([0.3 * 0.3, 0.7 * 0.3])
    if share is not None:
        assert exact == pytest.approx(bound)  # reached where the two move against each other


@pytest.mark.parametrize(
    "violation, stationarity, expected", [([0.0], 0.2, 0.2), ([0.3], 0.2, 0.3), ([-0.4], 0.2, 0.4)]
)
def test_the_kkt_residual_is_its_largest_part(violation, stationarity, expected):
    assert kkt_residual(state(1.0), violation, stationarity) == pytest.approx(expected)


def test_no_constraints_leave_only_stationarity():
    assert kkt_residual(state(), [], 0.1) == 0.1


def test_non_finite_parts_are_refused():
    with pytest.raises(ValueError, match=r"non-finite violation for \['c0'\]"):
        kkt_residual(state(1.0), [math.nan], 0.1)
    with pytest.raises(ValueError, match="stationarity=nan"):
        kkt_residual(state(1.0), [0.0], math.nan)
    with pytest.raises(ValueError, match="non-finite violation"):
        infeasibility([math.nan])
