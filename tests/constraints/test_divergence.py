"""What counts as running away: growth beyond any bound, and nothing that healthy or merely infeasible runs do."""

import json
import math

import numpy as np
import pytest

from dualsweep.constraints import NonFiniteError, RunawayDetector

ROWS = 5


def first_alarm(objectives, multipliers=None, *, start=0.0, scale=1.0, factor=1e4, again_at=None):
    """(dual step, what is said) of the first alarm, or None; at `again_at` the detector goes through a checkpoint."""
    starts = {"a": start} if multipliers is not None else {}
    given = {"objective_scale": scale, "factor": factor, "dual_steps": ROWS}
    detector = RunawayDetector(starts, **given)
    for step, objective in enumerate(objectives, 1):
        said = detector.see(objective, [] if multipliers is None else [multipliers[step - 1]])
        if said:
            return step, said
        if step == again_at:
            detector = RunawayDetector(starts, **given, state=json.loads(json.dumps(detector.state)))
    return None


STEPS = np.arange(1, 1001)
NOISE = np.random.default_rng(0).normal(size=1000)
HEALTHY = {
    "a loss that falls": np.exp(-STEPS / 100) + 0.05 * NOISE,
    "a divergence that rises from zero and levels off": 40 * (1 - np.exp(-STEPS / 50)),
    "an infeasible threshold's multiplier": 0.05 * 5 * STEPS,
    "a multiplier that rings": 3e3 * np.abs(np.sin(STEPS / 7)),
    "a spike of fewer rows than asked": np.where((STEPS % 50) < ROWS - 1, 1e9, 0.3),
    "a spike that comes down by itself": 0.3 + 1e9 * np.exp(-STEPS / 2),
}


@pytest.mark.parametrize("name", HEALTHY)
def test_what_does_not_run_away_raises_no_alarm(name):
    assert first_alarm(HEALTHY[name]) is None
    assert first_alarm(np.full(1000, 0.3), np.abs(HEALTHY[name])) is None


def test_what_grows_without_bound_is_named_with_its_numbers_long_before_it_overflows():
    loss = 0.3 * 1.5 ** np.minimum(STEPS, 200)
    step, said = first_alarm(loss)
    beyond = next(int(s) for s in STEPS if loss[s - 1] > 1e4)
    assert step == beyond + ROWS - 1 and loss[step - 1] < 1e6
    assert said.startswith(f"objective grew to {loss[step - 1]:.3g}, from {loss[step - ROWS]:.3g} 4 dual steps before")
    assert "divergence.factor" in said
    step, said = first_alarm(np.full(1000, 0.3), loss)
    assert step == beyond + ROWS - 1 and said.startswith("multiplier of a grew")
    assert first_alarm(-loss)[0] == step  # down without bound as well


def test_the_limit_is_of_the_scale_and_held_in_a_row():
    rising = np.array([0.5] * 3 + [20.0] * 4 + [0.5] + [20.0] * 5)
    assert first_alarm(rising, factor=10)[0] == len(rising)
    assert first_alarm(rising * 1000, scale=1000, factor=10)[0] == len(rising)
    assert first_alarm(rising, scale=2.1, factor=10) is None
    assert first_alarm([20.0, 19.0, 18.0, 17.0, 16.0] + [0.5] * 5, factor=10) is None
    assert first_alarm([1e8] * 5)[0] == 5  # lost before the first dual step


def test_a_multiplier_counts_from_where_it_starts():
    calm = np.full(1000, 0.3)
    assert first_alarm(calm, np.full(1000, 1e38), start=1e38) is None  # a fixed weight of any size
    assert first_alarm(calm, 10 * STEPS, start=0.0) is None
    assert first_alarm(calm, 11 * STEPS, start=0.0)[0] == 914
    assert first_alarm(calm, 11 * STEPS, start=5.0) is None


@pytest.mark.parametrize("again_at", [1, 9, 25, 27])
def test_a_resumed_run_is_stopped_where_the_undisturbed_one_is(again_at):
    loss = 0.3 * 1.5 ** STEPS[:60]
    assert first_alarm(loss, again_at=again_at) == first_alarm(loss)


@pytest.mark.parametrize(
    "wrong", [{"factor": 1.0}, {"factor": math.inf}, {"dual_steps": 1}, {"dual_steps": 2.5}, {"objective_scale": 0}]
)
def test_limits_out_of_range_are_refused_by_name(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        RunawayDetector({}, **{"factor": 10.0, "dual_steps": 5} | wrong)


def test_a_number_that_is_not_finite_is_refused():
    with pytest.raises(NonFiniteError, match="multiplier of a"):
        RunawayDetector({"a": 0.0}, factor=10, dual_steps=2).see(1.0, [math.nan])
