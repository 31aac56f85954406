"""Every form of `thresholds`, ids that depend on the thresholds alone, and errors that name the path."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dualsweep.constraints.threshold_grid import grid_point, grid_points

GROUPS = {"minority": ("digit_4", "digit_5"), "other": ("digit_7",)}


def values(points):
    return [tuple(point.thresholds.values()) for point in points]


def test_a_grid_is_the_product_of_its_axes_and_a_group_shares_its_value():
    points = grid_points({"grid": {"minority": [0.1, 0.2], "digit_7": [0.05, 0.3]}}, GROUPS, "share")
    expected = [(m, m, s) for s, m in itertools.product([0.05, 0.3], [0.1, 0.2])]
    assert values(points) == expected
    assert points[0].label == "digit_7 >= 0.05, minority >= 0.1"
    assert list(points[0].thresholds) == ["digit_4", "digit_5", "digit_7"]


def test_a_list_gives_its_points_one_by_one():
    points = grid_points({"list": [{"minority": 0.1, "other": 0.2}, {"other": 0.3, "minority": 0.1}]}, GROUPS, "share")
    assert values(points) == [(0.1, 0.1, 0.2), (0.1, 0.1, 0.3)]


def test_spaced_axes_reach_both_ends():
    spec = {"grid": {"minority": {"logspace": [0.05, 0.2, 3]}, "other": {"linspace": [0.1, 0.3, 2]}}}
    points = grid_points(spec, GROUPS, "share")
    assert sorted({v[0] for v in values(points)}) == [0.05, 0.1, 0.2]
    assert sorted({v[2] for v in values(points)}) == [0.1, 0.3]


def test_random_points_lie_in_their_ranges_and_follow_the_seed_not_the_order_of_the_axes():
    axes = {"minority": {"loguniform": [0.01, 0.2]}, "other": {"uniform": [0.1, 0.3]}}
    spec = {"random": {"points": 20, "seed": 3, "axes": axes}}
    points = grid_points(spec, GROUPS, "share")
    assert len(points) == 20
    assert all(0.01 <= m == n <= 0.2 and 0.1 <= s <= 0.3 for m, n, s in values(points))
    reversed_axes = {"random": {"points": 20, "seed": 3, "axes": dict(reversed(axes.items()))}}
    assert grid_points(reversed_axes, GROUPS, "share") == points
    other_seed = {"random": {**spec["random"], "seed": 4}}
    assert {p.id for p in grid_points(other_seed, GROUPS, "share")}.isdisjoint(p.id for p in points)


def test_random_axes_are_drawn_independently_of_each_other():
    axes = {"minority": {"uniform": [0.1, 0.3]}, "other": {"uniform": [0.1, 0.3]}}
    points = grid_points({"random": {"points": 5, "axes": axes}}, GROUPS, "share")
    assert all(m != s for m, _, s in values(points))


def test_a_search_is_left_to_ray_tune_but_its_axes_are_checked():
    spec = {"search": {"axes": {"minority": {"uniform": [0.05, 0.2]}, "other": {"choice": [0.1, 0.2]}}, "points": 8}}
    assert grid_points(spec, GROUPS, "share") is None
    rounded = {"search": {"axes": {"minority": {"quniform": [0.05, 0.2, 0.05]}, "other": {"loguniform": [0.1, 0.2]}}}}
    assert grid_points(rounded, GROUPS, "share") is None
    point = grid_point({"minority": 0.1, "other": 0.2}, GROUPS, "share")
    assert point == grid_points({"list": [{"minority": 0.1, "other": 0.2}]}, GROUPS, "share")[0]


def test_the_unconstrained_case_has_one_point_without_thresholds():
    points = grid_points({"list": [{}]}, {}, "share")
    assert values(points) == [()]


@given(st.permutations(["digit_4", "digit_5", "digit_7"]), st.randoms(use_true_random=False))
def test_ids_depend_on_neither_axis_order_nor_grouping_nor_position(order, shuffle):
    """The ids written here are what finished sweeps carry: changing them would orphan every stored trial."""
    rows = [(0.1, 0.1, 0.2), (0.1, 0.1, 0.3)]
    shuffle.shuffle(rows)
    listed = [
        {name: dict(zip(["digit_4", "digit_5", "digit_7"], row, strict=True))[name] for name in order} for row in rows
    ]
    by_name = {tuple(p.thresholds.values()): p.id for p in grid_points({"list": listed}, GROUPS, "share", order)}
    grouped = grid_points({"grid": {"minority": [0.1], "other": [0.2, 0.3]}}, dict(reversed(GROUPS.items())), "share")
    assert by_name == {tuple(p.thresholds.values()): p.id for p in grouped}
    assert by_name == {(0.1, 0.1, 0.2): "share-c3236e98", (0.1, 0.1, 0.3): "share-29208ea4"}


def test_the_unit_is_part_of_the_id_and_whole_numbers_equal_floats():
    one = {"c": ("c",)}
    assert grid_point({"c": 1}, one, "nats").id == grid_point({"c": 1.0}, one, "nats").id
    assert grid_point({"c": 1}, one, "nats").id != grid_point({"c": 1}, one, "loss").id
    assert grid_point({"c": 1}, one, "nats").id.startswith("nats-")


@pytest.mark.parametrize(
    "unit, value, label",
    [
        ("share", 0.1, "c >= 0.1"),
        ("nats", math.log(10), "c <= 2.303 nats"),
        ("loss", 0.05, "c <= 0.05 loss"),
        ("loss", {"factor": 1.1}, "c <= 1.1 x pretrained loss"),
        ("likelihood_ratio", 0.5, "c <= 0.5"),
        ("reward", -0.5, "c >= -0.5 sd"),
        ("nats", {"factor": 0.5}, "c <= 0.5 x pretrained divergence"),
        ("likelihood_ratio", {"factor": 0.5}, "c <= 0.5 x pretrained likelihood ratio"),
    ],
)
def test_labels_read_like_the_request(unit, value, label):
    assert grid_point({"c": value}, {"c": ("c",)}, unit).label == label


@pytest.mark.parametrize(
    "unit, value, sense, label",
    [
        ("nats", 3.0, ">=", "c >= 3 nats"),
        ("nats", {"factor": 1.9}, ">=", "c >= 1.9 x pretrained divergence"),
        ("share", 0.01, "<=", "c <= 0.01"),
    ],
)
def test_a_sense_of_its_own_changes_the_label_and_nothing_else(unit, value, sense, label):
    one = {"c": ("c",)}
    (point,) = grid_points({"grid": {"c": [value]}}, one, unit, sense=sense)
    own = grid_point({"c": value}, one, unit)
    assert point.label == label
    assert (point.id, point.thresholds) == (own.id, own.thresholds)


def test_a_sense_of_its_own_decides_what_is_possible():
    shares = {"list": [{"minority": 0.6, "other": 0.7}]}
    assert len(grid_points(shares, GROUPS, "share", sense="<=")) == 1  # at most 0.6 of each can hold together
    drawn = {"random": {"points": 2, "axes": {axis: {"uniform": [0.1, 0.9]} for axis in GROUPS}}}
    assert len(grid_points(drawn, GROUPS, "share", sense="<=")) == 2
    with pytest.raises(ValueError, match=r"sum to 1\.9"):
        grid_points(shares, GROUPS, "share")
    with pytest.raises(ValueError, match=r"thresholds\.grid\.c\[0\]=0: a divergence of at least"):
        grid_points({"grid": {"c": [0]}}, {"c": ("c",)}, "nats", sense=">=")
    with pytest.raises(ValueError, match=r"sense='=': give one of"):
        grid_points(shares, GROUPS, "share", sense="=")


@pytest.mark.parametrize("unit", ["loss", "nats", "likelihood_ratio"])
def test_factors_of_the_pretrained_value_work_in_every_form(unit):
    one = {"c": ("c",)}
    factors = [{"factor": 0.5}, {"factor": 1.0}]
    for spec in (
        {"grid": {"c": [{"factor": 0.5}, {"factor": 1.0}]}},
        {"grid": {"c": {"factor": [0.5, 1]}}},
        {"grid": {"c": {"factor": {"linspace": [0.5, 1.0, 2]}}}},
        {"list": [{"c": {"factor": 0.5}}, {"c": {"factor": 1.0}}]},
    ):
        assert [point.thresholds["c"] for point in grid_points(spec, one, unit)] == factors
    drawn = grid_points({"random": {"points": 2, "axes": {"c": {"factor": {"uniform": [0.5, 1]}}}}}, one, unit)
    assert all(0.5 <= point.thresholds["c"]["factor"] <= 1 for point in drawn)
    assert grid_points({"search": {"axes": {"c": {"factor": {"uniform": [0.5, 1]}}}}}, one, unit) is None


FULL = {"minority": [0.1], "other": [0.1]}


@pytest.mark.parametrize(
    "spec, message",
    [
        ({}, "exactly one of"),
        ({"grid": FULL, "list": []}, r"found \['grid', 'list'\]"),
        ({"gird": FULL}, r"unknown keys \['gird'\].*'grid'"),
        ({"grid": FULL, "unit": "nats"}, "thresholds.unit='nats': expected 'share'"),
        (
            {"grid": {**FULL, "minority": [0.1, 0.2, 1.4]}},
            r"thresholds.grid.minority\[2\]=1.4: a share must be in \(0, 1\)",
        ),
        ({"grid": {**FULL, "minority": [True]}}, r"minority\[0\]=True"),
        ({"grid": {**FULL, "minority": ["a"]}}, r"minority\[0\]='a'"),
        ({"grid": {**FULL, "minority": []}}, r"thresholds.grid.minority=\[\].*at least one"),
        ({"grid": {**FULL, "minority": 0.1}}, "thresholds.grid.minority=0.1: give a list"),
        ({"grid": {**FULL, "minority": "0.1"}}, "give a list"),
        ({"grid": {**FULL, "minority": {"range": [0, 1, 2]}}}, "give a list, {linspace"),
        ({"grid": {**FULL, "minority": {"linspace": [0.1, 0.2]}}}, "number of values"),
        ({"grid": {**FULL, "minority": {"linspace": [0.1, 0.2, 1]}}}, r"linspace\[2\]=1"),
        ({"grid": {**FULL, "minority": {"logspace": [0.2, 0.1, 3]}}}, "lo must be below hi"),
        ({"grid": {**FULL, "minority": {"logspace": [0.0, 0.1, 3]}}}, r"logspace\[0\]=0.0: a share"),
        ({"grid": {**FULL, "minority": {"factor": [1.0]}}}, "a factor needs the unit loss, nats, .*already a fraction"),
        ({"grid": {**FULL, "minority": [{"times": 2}]}}, "only {factor: number > 0} in the units loss, nats"),
        ({"grid": {"minority": [0.1]}}, r"no threshold for \['digit_7'\]"),
        ({"grid": {**FULL, "digit_4": [0.1]}}, "'digit_4' already gets a value from 'digit_4'; drop"),
        ({"grid": {**FULL, "majority": [0.1]}}, "thresholds.grid.majority: unknown axis.*'minority'"),
        ({"grid": [0.1]}, "give a mapping from axis"),
        ({"grid": {"minority": [0.4], "other": [0.1, 0.3]}}, "thresholds.grid: shares.*sum to 1.1"),
        ({"grid": {**FULL, "minority": [0.1, 0.1]}}, "repeats"),
        ({"list": []}, "no points"),
        ({"list": {"minority": 0.1}}, "give a list of mappings"),
        ({"list": [0.1]}, r"thresholds.list\[0\]=0.1"),
        ({"list": [{"minority": 0.1, "other": 0.1}, {"minority": 0.1, "other": 0}]}, r"thresholds.list\[1\].other=0"),
        ({"list": [{"minority": 0.1, "other": 0.1}] * 2}, r"list\[1\] .*repeats thresholds.list\[0\]"),
        ({"random": {"points": 2}}, r"missing keys \['axes'\]"),
        ({"random": {"points": 0, "axes": {}}}, "thresholds.random.points=0"),
        ({"random": {"points": 2, "seed": -1, "axes": {}}}, "thresholds.random.seed=-1"),
        ({"random": {"points": 2, "axes": {"minority": {"uniform": [0.1, 0.2]}}}}, r"no threshold for \['digit_7'\]"),
        (
            {"random": {"points": 2, "axes": {"minority": {"normal": [0.1, 0.2]}, "other": {"uniform": [0.1, 0.2]}}}},
            "random.axes.minority=.*give {uniform",
        ),
        (
            {"random": {"points": 2, "axes": {"minority": {"uniform": [0.1, 0.5]}, "other": {"uniform": [0.1, 0.2]}}}},
            "at the upper ends the shares.*sum to 1.2",
        ),
        ({"search": {"points": 3}}, "thresholds.search=.*give {axes"),
        ({"search": {"axes": {"minority": {"uniform": [0.1, 2]}, "other": {"choice": [0.1]}}}}, r"uniform\[1\]=2"),
        ({"search": {"axes": {"minority": {"uniform": [0.1, 0.4]}, "other": {"choice": [0.1, 0.3]}}}}, "sum to 1.1"),
        ({"search": {"axes": {"minority": {"quniform": [0.1, 0.2]}, "other": {"choice": [0.1]}}}}, "rounding step"),
    ],
)
def test_a_bad_spec_is_refused_with_its_path(spec, message):
    with pytest.raises(ValueError, match=message):
        grid_points(spec, GROUPS, "share")


def test_a_logarithmic_reward_range_must_start_above_zero():
    with pytest.raises(ValueError, match="must start above 0"):
        grid_points({"grid": {"c": {"logspace": [-1, 1, 3]}}}, {"c": ("c",)}, "reward")


def test_an_unknown_unit_is_refused():
    with pytest.raises(ValueError, match=r"thresholds\.unit='percent'"):
        grid_points({"grid": FULL}, GROUPS, "percent")
