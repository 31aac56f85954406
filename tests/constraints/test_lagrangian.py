"""The Lagrangian for any arithmetic type, and the parts of the KKT residual."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dualsweep.constraints.domains import Simplex
from dualsweep.constraints.lagrangian import complementarity_residual, infeasibility, kkt_residual, lagrangian
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
