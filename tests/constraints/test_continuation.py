"""Where a grid point starts: multipliers moved by what is known of their answer, and chains of nearest neighbours."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dualsweep.constraints import NonNegative, Simplex
from dualsweep.constraints.closed_forms import class_restriction_multipliers, class_restriction_shares
from dualsweep.constraints.continuation import REACH, Solved, chains, start_multipliers

PRIOR = np.array([0.03, 0.05])


def solved_share(*shares, prior=PRIOR):
    place = -np.log(shares)
    multipliers = class_restriction_multipliers(place, prior)
    return Solved(place, multipliers, -np.log(class_restriction_shares(multipliers, prior)))


@pytest.mark.parametrize("target", [(0.1, 0.1), (0.3, 0.2), (0.06, 0.25)])
def test_shares_are_predicted_exactly_from_one_solved_point(target):
    place = -np.log(target)
    found = start_multipliers(place, [solved_share(0.15, 0.2)], NonNegative(), shares=True)
    assert found == pytest.approx(class_restriction_multipliers(place, PRIOR), rel=1e-9)


def test_more_solved_points_average_the_noise_of_the_shares_out():
    place, exact = -np.log([0.2, 0.2]), class_restriction_multipliers(-np.log([0.2, 0.2]), PRIOR)
    random, errors = np.random.default_rng(0), {1: [], 6: []}
    for _ in range(200):
        points = [solved_share(s, s) for s in (0.18, 0.16, 0.14, 0.12, 0.1, 0.08)]
        noisy = [Solved(p.place, p.multipliers, p.metrics + 0.03 * random.standard_normal(2)) for p in points]
        for count in errors:
            found = start_multipliers(place, noisy[:count], NonNegative(), shares=True)
            errors[count].append(np.abs(found - exact).max())
    assert np.mean(errors[6]) < 0.75 * np.mean(errors[1]) < 0.02


def test_a_labeller_that_sees_only_part_of_a_class_is_corrected_for():
    """A slope of 0.8: what the solved points show counts, not the law alone."""
    multipliers = np.array([0.1, 0.2, 0.3])
    points = [Solved(np.zeros(1), np.array([m]), -np.log([(0.03 + 0.8 * m) / (1 + m)])) for m in multipliers[::-1]]
    wanted = (0.03 + 0.8 * 0.4) / 1.4
    found = float(start_multipliers([-np.log(wanted)], points, NonNegative(), shares=True)[0])
    by_law = float(start_multipliers([-np.log(wanted)], points[:1], NonNegative(), shares=True)[0])
    assert abs(found - 0.4) < 0.9 * abs(by_law - 0.4)


def test_a_class_that_has_enough_by_itself_gets_no_multiplier():
    prior = np.array([0.03, 0.4])
    found = start_multipliers(-np.log([0.1, 0.2]), [solved_share(0.2, 0.2, prior=prior)], NonNegative(), shares=True)
    assert found[1] == 0 and found[0] == pytest.approx(0.1 * (1 - 0.03) / (1 - 0.1) - 0.03, rel=1e-9)


def test_one_solved_point_of_another_unit_hands_on_its_multipliers():
    nearest = Solved(np.array([1.0, 2.0]), np.array([0.3, 0.7]), np.array([1.0, 2.0]))
    assert start_multipliers([0.8, 1.9], [nearest], NonNegative(), shares=False).tolist() == [0.3, 0.7]


def test_two_solved_points_of_another_unit_make_a_line():
    slope = np.array([-0.5, 0.2])
    points = [Solved(np.full(2, x), np.array([1.0, 1.0]) + slope * x, np.full(2, x)) for x in (0.6, 0.8)]
    found = start_multipliers([0.5, 0.5], points, NonNegative(), shares=False)
    assert found == pytest.approx(np.array([1.0, 1.0]) + slope * 0.5, rel=1e-12)


def test_a_line_is_not_followed_far():
    points = [Solved(np.array([x]), np.array([1.0 - x]), np.array([x])) for x in (0.1, 0.2)]
    for place in (-50.0, 50.0):
        found = float(start_multipliers([place], points, NonNegative(), shares=False)[0])
        assert found == pytest.approx(0.9 * REACH if place < 0 else 0.9 / REACH)


def test_a_multiplier_of_zero_does_not_hold_stricter_starts_at_zero():
    points = [Solved(np.full(2, x), np.array([0.0, m]), np.full(2, x)) for x, m in ((0.6, 0.4), (0.8, 0.3))]
    strict, mild = (
        start_multipliers([x, x], points, NonNegative(), shares=False, cold=0.1).tolist() for x in (0.5, 0.7)
    )
    assert strict == pytest.approx([0.1, 0.45]) and mild == pytest.approx([0.0, 0.35])
    assert start_multipliers([0.5, 0.5], points[:1], NonNegative(), shares=False, cold=0.1).tolist() == [0.1, 0.4]


def test_the_start_lies_in_the_domain():
    nearest = Solved(np.zeros(3), np.array([0.5, 0.6, 0.1]), np.zeros(3))
    found = start_multipliers(np.ones(3), [nearest], Simplex(), shares=False)
    assert found.sum() == pytest.approx(1) and (found >= 0).all()


def test_one_chain_goes_from_the_mildest_to_the_strictest():
    places = np.array([[0.3], [0.9], [0.5], [0.7]])
    assert chains(places, 1) == [(1, None), (3, 1), (2, 3), (0, 2)]


def test_two_chains_grow_from_their_middle():
    places = np.arange(6.0)[::-1, None]
    assert chains(places, 2) == [(2, None), (1, 2), (3, 2), (0, 1), (4, 3), (5, 4)]


@settings(derandomize=True, deadline=None, max_examples=100)
@given(st.lists(st.tuples(st.floats(-5, 5), st.floats(-5, 5)), min_size=1, max_size=20, unique=True), st.integers(1, 6))
def test_every_point_comes_once_after_what_it_starts_from(places, count):
    plan = chains(np.array(places), count)
    order = [point for point, _ in plan]
    assert sorted(order) == list(range(len(places)))
    assert [source for _, source in plan].count(None) == 1 and plan[0][1] is None
    assert all(order.index(source) < order.index(point) for point, source in plan[1:])


@settings(derandomize=True, deadline=None, max_examples=50)
@given(st.lists(st.integers(-99, 99), min_size=2, max_size=20, unique=True), st.integers(1, 2))
def test_on_a_line_everyone_starts_from_its_neighbour(places, count):
    rank = {point: place for place, point in enumerate(np.argsort(places, kind="stable").tolist())}
    assert all(abs(rank[point] - rank[source]) == 1 for point, source in chains(np.array(places)[:, None], count)[1:])
