"""Pareto front against a plain loop, its invariances, and the slope of the front against the multipliers."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dualsweep.constraints.closed_forms import class_restriction_multipliers, class_restriction_objective
from dualsweep.constraints.pareto import dominated, hypervolume, pareto_front, slopes_and_multipliers

# few distinct values, so that ties and repeated points occur
level = st.integers(0, 5).map(float)
clouds = st.lists(st.tuples(level, level, st.booleans()), min_size=1, max_size=15)


def beaten(a, b):
    return b[0] <= a[0] and b[1] >= a[1] and b[:2] != a[:2]


@given(clouds)
def test_the_front_is_what_a_plain_loop_over_pairs_finds(cloud):
    objective, requirement, feasible = map(np.array, zip(*cloud, strict=True))
    expected = [i for i, a in enumerate(cloud) if a[2] and not any(b[2] and beaten(a, b) for b in cloud)]
    front = pareto_front(objective, requirement, feasible)
    assert sorted(front.tolist()) == expected
    assert (np.diff(requirement[front]) >= 0).all()
    assert (np.diff(objective[front]) >= 0).all()


@given(clouds, st.floats(0.1, 3), st.floats(0, 3))
def test_adding_a_dominated_point_leaves_the_front_and_the_hypervolume_alone(cloud, worse, lower):
    objective, requirement, feasible = map(np.array, zip(*cloud, strict=True))
    before = pareto_front(objective, requirement, feasible)
    objective_more = np.append(objective, objective[0] + worse)
    requirement_more = np.append(requirement, requirement[0] - lower)
    feasible_more = np.append(feasible, feasible[0])
    assert pareto_front(objective_more, requirement_more, feasible_more).tolist() == before.tolist()
    volume = hypervolume(objective, requirement, reference=(6, -1), feasible=feasible)
    more = hypervolume(objective_more, requirement_more, reference=(6, -1), feasible=feasible_more)
    assert more == volume


@given(clouds)
def test_the_hypervolume_is_the_number_of_unit_cells_beaten(cloud):
    """On integer coordinates the area is a count of cells, each beaten by some feasible point."""
    objective, requirement, feasible = map(np.array, zip(*cloud, strict=True))
    cells = sum(any(f and o <= x and r >= y + 1 for o, r, f in cloud) for x in range(6) for y in range(-1, 5))
    assert hypervolume(objective, requirement, reference=(6, -1), feasible=feasible) == cells


def test_a_wrong_direction_is_seen():
    objective, requirement = [0.0, 1.0, 2.0], [0.1, 0.3, 0.2]
    assert pareto_front(objective, requirement).tolist() == [0, 1]
    assert dominated(objective, requirement).tolist() == [False, False, True]


def test_equal_points_do_not_beat_each_other():
    assert pareto_front([1.0, 1.0], [0.1, 0.1]).tolist() == [0, 1]


def test_infeasible_points_neither_lie_on_the_front_nor_need_numbers():
    assert pareto_front([0.0, 1.0, math.nan], [0.9, 0.1, math.nan], [False, True, False]).tolist() == [1]
    assert pareto_front([0.0], [0.9], [False]).tolist() == []
    assert pareto_front([], [], []).tolist() == []


def test_a_feasible_point_without_numbers_is_refused_by_its_index():
    with pytest.raises(ValueError, match=r"points \[1\]"):
        pareto_front([0.0, math.nan], [0.9, 0.1], [True, True])
    with pytest.raises(ValueError, match="shapes"):
        pareto_front([0.0], [0.9, 0.1])
    with pytest.raises(ValueError, match="reference"):
        hypervolume([0.0], [0.9], reference=(math.nan, 0))


def test_points_that_do_not_beat_the_reference_add_nothing():
    assert hypervolume([5.0, 0.0], [0.5, -1.0], reference=(4.0, 0.0)) == 0.0


@pytest.mark.parametrize("classes", [1, 3])
def test_the_slope_of_the_front_is_minus_the_multiplier(classes):
    """Exact front of the class restriction; a group of thresholds moved together has the sum of its multipliers."""
    prior = np.full(classes, 0.02)
    thresholds = -np.log(np.linspace(0.08, 0.25, 30))[:, None] * np.ones(classes)
    multipliers = np.array([class_restriction_multipliers(epsilon, prior) for epsilon in thresholds])
    objective = np.array([class_restriction_objective(m, prior) for m in multipliers])
    shuffled = np.random.default_rng(0).permutation(30)
    slope, minus = slopes_and_multipliers(objective[shuffled], thresholds[shuffled], multipliers[shuffled])
    # trapezoid rule: error of order spacing^2, spacing at most 0.08 nats; relative to the curvature of the front
    assert slope == pytest.approx(minus, rel=2e-2)
    middle = (multipliers[1:] + multipliers[:-1]).sum(axis=1) / 2
    assert np.sort(-minus) == pytest.approx(np.sort(middle))
    assert slope != pytest.approx(-minus, rel=0.5)  # control: the sign matters


def test_slopes_need_distinct_complete_points():
    with pytest.raises(ValueError, match="share a mean threshold"):
        slopes_and_multipliers([0.0, 1.0], [1.0, 1.0], [0.1, 0.1])
    with pytest.raises(ValueError, match="non-finite"):
        slopes_and_multipliers([0.0, math.nan], [1.0, 2.0], [0.1, 0.1])
    with pytest.raises(ValueError, match="at least two points"):
        slopes_and_multipliers([0.0], [1.0], [0.1])
