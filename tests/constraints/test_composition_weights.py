"""Composition weights: the smallest ball is checked by its own optimality conditions, capacities by known channels."""

import math

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from dualsweep.constraints.composition_weights import capacity_weights, enclosing_ball_weights

# whole numbers make ties, collinear points, points on a common sphere and duplicates likely
lattices = st.tuples(st.integers(1, 9), st.integers(1, 4)).flatmap(
    lambda shape: arrays(int, shape, elements=st.integers(-2, 2))
)


def test_the_example_of_methods_md():
    assert enclosing_ball_weights([[-1.0], [0.3], [2.0]]) == pytest.approx([0.5, 0, 0.5], abs=1e-12)


def test_known_balls():
    assert enclosing_ball_weights([[3.0, 4.0]]).tolist() == [1.0]
    assert enclosing_ball_weights([[1.0, 2.0]] * 2).sum() == 1.0
    corners = [[math.cos(angle), math.sin(angle)] for angle in np.arange(3) * 2 * math.pi / 3]
    assert enclosing_ball_weights([*corners, [0.1, 0.2]]) == pytest.approx([1 / 3, 1 / 3, 1 / 3, 0], abs=1e-12)
    obtuse = enclosing_ball_weights([[-2.0, 0.0], [2.0, 0.0], [0.0, 0.5]])  # the third corner lies inside
    assert obtuse == pytest.approx([0.5, 0.5, 0], abs=1e-12)


@given(lattices)
@example(np.array([[3, 1], [1, 3], [2, -3], [-3, 3], [-3, -4]]))  # a fourth corner joins a triangle: affinely dependent
@example(np.array([[-3, 2], [-1, -3], [-1, 0], [-3, 0], [8, 1]]))
def test_every_weighted_mean_lies_on_the_sphere_and_no_mean_outside(means):
    weights = enclosing_ball_weights(means)
    assert (weights >= 0).all()
    assert weights.sum() == pytest.approx(1, abs=1e-12)
    squares = np.square(means - weights @ means).sum(axis=1)
    assert np.abs(squares.max() - squares[weights > 1e-12]).max() <= 1e-10  # squares are at most 64


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_the_ball_moves_and_scales_with_the_means(scale):
    means = np.random.default_rng(0).standard_normal((8, 3))
    moved = enclosing_ball_weights(scale * (means + 5.0))
    assert moved == pytest.approx(enclosing_ball_weights(means), abs=1e-9)


def test_the_binary_symmetric_and_erasure_channels():
    flip = 0.11
    weights = capacity_weights([[1 - flip, flip], [flip, 1 - flip]], 1.0)
    assert weights == pytest.approx([0.5, 0.5], abs=1e-9)
    erasing = capacity_weights([[0.7, 0.3, 0.0], [0.0, 0.3, 0.7]], 1.0)
    assert erasing == pytest.approx([0.5, 0.5], abs=1e-9)


def test_the_z_channel():
    """Input 1 is received as 0 half the time: capacity log(5/4), reached with two fifths on it."""
    laws = np.array([[1.0, 0.0], [0.5, 0.5]])
    weights = capacity_weights(laws, 1.0, tolerance=1e-13)
    assert weights == pytest.approx([0.6, 0.4], abs=1e-6)  # the value is flat: its root of 1e-13
    mixture = weights @ laws
    assert -math.log(mixture[0]) == pytest.approx(math.log(1.25), abs=1e-6)


def test_disjoint_sets_count_alike_whatever_their_spread_and_a_mixture_of_them_counts_nothing():
    grid = np.linspace(-8, 8, 1601)
    narrow, wide = np.exp(-0.5 * ((grid - 4) / 0.2) ** 2), np.exp(-0.5 * ((grid + 4) / 0.6) ** 2)
    between = narrow / narrow.sum() + wide / wide.sum()
    weights = capacity_weights([narrow, 7 * wide, between], np.full(1601, 0.01))
    assert weights == pytest.approx([0.5, 0.5, 0.0], abs=1e-4)  # KL of the mixture is 0, of the others log 2


def test_unequal_cells_count_by_their_volume():
    """Two uniform laws overlapping on half their length; merging cells of equal densities changes nothing."""
    fine = capacity_weights([[1, 1, 0, 0], [0, 1, 1, 1]], 1.0)
    merged = capacity_weights([[1, 1, 0], [0, 1, 1]], [1.0, 1.0, 2.0])
    assert merged == pytest.approx(fine, abs=1e-12)
    assert capacity_weights([[1, 1, 0], [0, 1, 1]], 1.0) != pytest.approx(fine, abs=1e-3)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: enclosing_ball_weights([1.0, 2.0]), "means="),
        (lambda: enclosing_ball_weights([[math.nan]]), "finite points"),
        (lambda: enclosing_ball_weights(np.zeros((0, 2))), "means="),
        (lambda: capacity_weights([0.5, 0.5], 1.0), r"densities have shape \(2,\)"),
        (lambda: capacity_weights([[0.5, -0.5]], 1.0), "values >= 0"),
        (lambda: capacity_weights([[0.5, 0.5]], [1.0]), r"masses have shape \(1,\)"),
        (lambda: capacity_weights([[0.5, 0.5]], 0.0), "volumes > 0"),
        (lambda: capacity_weights([[0.5, 0.5], [0.0, 0.0]], 1.0), r"sets \[1\] are 0"),
        (lambda: capacity_weights([[0.6, 0.4], [0.5, 0.5], [0.1, 0.9]], 1.0, max_iterations=2), "after 2 iterations"),
    ],
)
def test_bad_input_is_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call()
