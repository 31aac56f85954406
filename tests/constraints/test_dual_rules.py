"""Each rule by hand on a few numbers, their common smoothing and warm-up, and settings that are refused."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dualsweep.constraints.domains import Capped, NonNegative, Simplex, SumBelow
from dualsweep.constraints.dual_rules import RULES, Ascent, Fixed, NuPI, Resilient, ResilientExplicit, rule_from_config

NAMES = ("a", "b")
# every rule with settings that move it; step sizes well inside the stable range
EVERY_RULE = [
    Ascent(0.1),
    Resilient(0.1, 0.5),
    ResilientExplicit(0.1, 0.2, 0.5),
    NuPI(0.1, 0.3, 0.5),
    Fixed(),
]
SMOOTHED = [Ascent(0.1, smoothing=0.9, warmup_steps=3), Fixed(smoothing=0.5)]
finite = st.floats(-100, 100)


def walk(rule, violations, *, start=0.0, domain=None):
    state = rule.initial(NAMES, start, domain)
    for violation in violations:
        state = rule.step(state, violation, domain)
    return state


def test_ascent_by_hand():
    state = walk(Ascent(0.5), [[1.0, -1.0]], start=0.2)
    assert state.multipliers == pytest.approx([0.7, 0.0])
    assert state.step == 1
    assert state.relaxations.tolist() == [0.0, 0.0]


def test_resilient_by_hand():
    state = walk(Resilient(0.1, 0.25), [[1.0, -1.0]], start=0.4)  # 0.4 + 0.1 * (g - 2 * 0.25 * 0.4)
    assert state.multipliers == pytest.approx([0.48, 0.28])
    assert state.relaxations == pytest.approx([0.24, 0.14])


def test_explicit_relaxations_by_hand():
    state = walk(ResilientExplicit(0.1, 0.2, 0.25), [[1.0, -5.0]], start=0.4)
    assert state.relaxations == pytest.approx([0.08, 0.08])  # 0 + 0.2 * (0.4 - 0)
    assert state.multipliers == pytest.approx([0.4 + 0.1 * 0.92, 0.0])
    state = ResilientExplicit(0.1, 0.2, 0.25).step(state, [1.0, 1.0])
    assert state.relaxations[0] == pytest.approx(0.08 + 0.2 * (0.492 - 0.08 / 0.5))
    assert state.relaxations[1] == pytest.approx(0.08 + 0.2 * (0.0 - 0.08 / 0.5))


def test_nupi_by_hand():
    rule = NuPI(0.1, 2.0, nu=0.5)
    state = walk(rule, [[1.0, 1.0]])
    assert state.multipliers == pytest.approx([0.1 + 2 * 0.5] * 2)
    state = rule.step(state, [1.0, -1.0])  # filtered: 0.5 -> 0.75 and 0.5 -> -0.25
    assert state.multipliers == pytest.approx([1.1 + 0.1 + 2 * 0.25, 0.0])


def test_nupi_damps_the_oscillation_that_plain_ascent_shows_on_a_bilinear_game():
    """min_x max_lambda lambda (x - 1), x moved by gradient descent: ascent circles outwards, nuPI settles."""

    def distance(rule):
        x, state = 0.0, rule.initial(("a",), 1.0)
        for _ in range(300):
            state = rule.step(state, [x - 1.0])
            x -= 0.1 * (state.multipliers[0] - 1.0)  # objective -x, so that lambda* = 1 and x* = 1
        return abs(x - 1.0) + abs(state.multipliers[0] - 1.0)

    assert distance(NuPI(0.1, 1.0)) < 1e-3 < 0.1 < distance(Ascent(0.1))


def test_fixed_never_moves_but_remembers_the_violation_and_counts_steps():
    state = walk(Fixed(), [[1.0, 2.0]] * 3, start=[0.3, 7.0], domain=SumBelow(1))
    assert state.multipliers.tolist() == [0.3, 7.0]
    assert state.step == 3
    assert state.rule_state["smoothed_violation"].tolist() == [1.0, 2.0]


@given(st.lists(st.tuples(finite, finite), min_size=1, max_size=30), st.floats(0.05, 2))
def test_explicit_relaxations_with_the_exact_step_size_are_the_quadratic_cost_form(violations, alpha):
    step_size = 0.1 / alpha
    implicit = walk(Resilient(step_size, alpha), violations)
    explicit = walk(ResilientExplicit(step_size, 2 * alpha, alpha), violations)
    # same arithmetic in another order over at most 30 contracting steps
    assert explicit.multipliers == pytest.approx(implicit.multipliers, rel=1e-9, abs=1e-9)


@given(st.lists(st.tuples(finite, finite), min_size=1, max_size=10))
def test_a_relaxation_cost_of_zero_for_one_constraint_leaves_it_to_plain_ascent(violations):
    plain = walk(Ascent(0.1), violations)
    for rule in (Resilient(0.1, (0.5, 0.0)), ResilientExplicit(0.1, 0.2, (0.5, 0.0))):
        state = walk(rule, violations)
        assert state.multipliers[1] == plain.multipliers[1]
        assert state.relaxations[1] == 0


@pytest.mark.parametrize("rule", EVERY_RULE + SMOOTHED, ids=str)
@given(data=st.data())
def test_multipliers_and_relaxations_never_leave_their_domain(rule, data):
    domains = [NonNegative(), SumBelow(1), Capped((0.5, 2.0)), Simplex()]
    domain = data.draw(st.sampled_from(domains))
    start = domain.project(data.draw(st.tuples(st.floats(0, 10), st.floats(0, 10))))
    state = walk(rule, data.draw(st.lists(st.tuples(finite, finite), max_size=8)), start=start, domain=domain)
    assert domain.project(state.multipliers) == pytest.approx(state.multipliers, abs=1e-12)
    assert (state.multipliers >= 0).all()
    assert (state.relaxations >= 0).all()


@given(st.floats(0, 1e3), st.floats(-1e3, 1e3), st.floats(1e-3, 10))
def test_an_ascent_step_follows_the_sign_of_the_violation(multiplier, violation, step_size):
    after = walk(Ascent(step_size), [[violation, 0.0]], start=multiplier).multipliers[0]
    assert (after - multiplier) * violation >= 0


@pytest.mark.parametrize("rule", EVERY_RULE + SMOOTHED, ids=str)
def test_a_step_changes_neither_the_old_state_nor_the_violation(rule):
    state, violation = rule.initial(NAMES, 0.5), np.array([1.0, -2.0])
    before = state.to_dict()
    first, second = rule.step(state, violation), rule.step(state, violation)
    assert state.to_dict() == before
    assert violation.tolist() == [1.0, -2.0]
    assert first.to_dict() == second.to_dict()


def test_smoothing_is_the_bias_corrected_exponential_average():
    violations, smoothing = np.random.default_rng(1).normal(size=(12, 2)), 0.8
    state = walk(Ascent(0.1, smoothing=smoothing), violations)
    weights = smoothing ** np.arange(12)[::-1]
    expected = weights @ violations / weights.sum()
    assert state.rule_state["smoothed_violation"] == pytest.approx(expected, abs=1e-12)


def test_smoothing_drives_the_step_and_its_first_average_is_the_first_violation():
    rule = Ascent(1.0, smoothing=0.5)
    state = walk(rule, [[3.0, 3.0]])
    assert state.multipliers == pytest.approx([3.0, 3.0])
    state = rule.step(state, [0.0, 0.0])
    assert state.multipliers == pytest.approx([4.0, 4.0])  # weights 1/3 and 2/3 on 3 and 0


def test_without_smoothing_the_raw_violation_is_used_to_the_last_bit():
    violations = [[0.1, 1 / 3], [0.7, -1e-17]]
    assert walk(Ascent(0.1), violations).rule_state["smoothed_violation"].tolist() == violations[-1]


@pytest.mark.parametrize("make", [Ascent, lambda step, **common: NuPI(step, 0.0, **common)], ids=["ascent", "nupi"])
def test_warm_up_ramps_the_step_linearly(make):
    rule, state, moves = make(1.0, warmup_steps=4), Ascent(1.0).initial(NAMES), []
    for _ in range(6):
        after = rule.step(state, [1.0, 1.0])
        moves.append(after.multipliers[0] - state.multipliers[0])
        state = after
    assert moves == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0, 1.0])


def test_steps_fall_as_one_over_their_number_after_the_given_one():
    rule, state, moves = Ascent(1.0, decay_after=2), Ascent(1.0).initial(NAMES), []
    for _ in range(4):
        after = rule.step(state, [1.0, 1.0])
        moves.append(after.multipliers[0] - state.multipliers[0])
        state = after
    assert moves == pytest.approx([1.0, 1.0, 2 / 3, 0.5])


@pytest.mark.parametrize(
    "violation, message",
    [([0.0, math.nan], r"non-finite violation for \['b'\]"), ([math.inf, 0], r"\['a'\]"), ([0.0], r"shape \(1,\)")],
)
@pytest.mark.parametrize("rule", EVERY_RULE, ids=str)
def test_a_bad_report_is_refused_by_name(rule, violation, message):
    with pytest.raises(ValueError, match=message):
        rule.step(rule.initial(NAMES), violation)


def test_a_step_that_overflows_is_refused_by_name():
    state = Ascent(1e300).initial(NAMES, 1e300)
    with pytest.raises(ValueError, match=r"non-finite multiplier for \['a'\]"), np.errstate(over="ignore"):
        Ascent(1e300).step(state, [1e300, 0.0])


@pytest.mark.parametrize("start", [0.5, {"a": 0.5, "b": 0.5}, [0.5, 0.5], np.array([0.5, 0.5])])
def test_a_start_may_be_one_number_a_mapping_or_a_vector(start):
    assert Ascent(0.1).initial(NAMES, start).multipliers.tolist() == [0.5, 0.5]


@pytest.mark.parametrize("start", [-0.1, {"a": 1.0}, [1.0], math.nan])
def test_a_bad_start_is_refused(start):
    with pytest.raises(ValueError, match="multiplier"):
        Ascent(0.1).initial(NAMES, start)


def test_a_start_is_moved_into_the_domain():
    assert Ascent(0.1).initial(NAMES, 0.0, Simplex()).multipliers == pytest.approx([0.5, 0.5])


CONFIGS = {
    "ascent": ({"step_size": 0.1, "warmup_steps": 5}, Ascent(0.1, warmup_steps=5)),
    "resilient": ({"step_size": 0.1, "relaxation_cost": [0.5, 0]}, Resilient(0.1, (0.5, 0.0))),
    "resilient_explicit": (
        {"step_size": 0.1, "relaxation_step_size": 0.2, "relaxation_cost": 0.5, "smoothing": 0.5},
        ResilientExplicit(0.1, 0.2, 0.5, smoothing=0.5),
    ),
    "nupi": ({"step_size": 1, "proportional_gain": 2.0, "nu": 0.1}, NuPI(1.0, 2.0, 0.1)),
    "fixed": ({}, Fixed()),
}


@pytest.mark.parametrize("name", sorted(RULES))
def test_every_rule_comes_from_its_config(name):
    settings, expected = CONFIGS[name]
    assert rule_from_config({"rule": name, **settings}) == expected


def test_costs_of_the_constraints_stand_in_for_a_missing_relaxation_cost():
    config = {"rule": "resilient", "step_size": 0.1}
    assert rule_from_config(config, [0.5, None]) == Resilient(0.1, (0.5, 0.0))
    assert rule_from_config({**config, "relaxation_cost": 0.2}, [0.5, None]) == Resilient(0.1, 0.2)
    with pytest.raises(ValueError, match="relaxation_cost"):
        rule_from_config(config, [None, None])


@pytest.mark.parametrize(
    "config, message",
    [
        ({"rule": "adam", "step_size": 0.1}, r"dual.rule='adam'.*'ascent'.*'resilient_explicit'"),
        ({"step_size": 0.1}, "dual.rule=None"),
        ("ascent", "dual.rule='ascent'"),
        ({"rule": ["ascent"]}, "dual.rule"),
        ({"rule": "ascent"}, r"needs \['step_size'\]"),
        ({"rule": "ascent", "step_size": 0.1, "stepsize": 1}, r"unknown settings \['stepsize'\].*step_size"),
        ({"rule": "ascent", "step_size": -0.1}, r"dual.step_size=-0.1.*> 0"),
        ({"rule": "ascent", "step_size": "0.1"}, "dual.step_size='0.1'"),
        ({"rule": "ascent", "step_size": True}, "dual.step_size=True"),
        ({"rule": "ascent", "step_size": math.nan}, "dual.step_size=nan"),
        ({"rule": "ascent", "step_size": 0.1, "smoothing": 1.0}, "dual.smoothing=1.0"),
        ({"rule": "ascent", "step_size": 0.1, "warmup_steps": 1.5}, "dual.warmup_steps=1.5"),
        ({"rule": "fixed", "warmup_steps": -1}, "dual.warmup_steps=-1"),
        ({"rule": "ascent", "step_size": 0.1, "decay_after": -1}, "dual.decay_after=-1"),
        ({"rule": "resilient", "step_size": 0.1, "relaxation_cost": 0}, "dual.relaxation_cost=0"),
        ({"rule": "resilient", "step_size": 0.1, "relaxation_cost": [0, 0]}, "at least one"),
        ({"rule": "resilient", "step_size": 10, "relaxation_cost": 0.5}, r"dual.step_size=10.*oscillates.*< 2"),
        (
            {"rule": "resilient_explicit", "step_size": 0.1, "relaxation_step_size": 9, "relaxation_cost": 0.5},
            r"relaxation_step_size=9.*oscillates.*< 2",
        ),
        ({"rule": "nupi", "step_size": 0.1, "nu": 1.0}, "dual.nu=1.0"),
    ],
)
def test_a_bad_config_is_refused_with_field_value_and_remedy(config, message):
    with pytest.raises(ValueError, match=message):
        rule_from_config(config)


def test_one_cost_a_constraint_must_match_the_constraints():
    with pytest.raises(ValueError, match="relaxation_cost has shape"):
        Resilient(0.1, (0.5, 0.5, 0.5)).initial(NAMES)
