"""The dual state: exact through JSON, read-only, and never holding a number no state can have."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dualsweep.constraints.multipliers import DualState

weights = st.lists(st.floats(0, allow_infinity=False, allow_subnormal=True), min_size=2, max_size=2)
numbers = st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=2, max_size=2)


@given(multipliers=weights, relaxations=weights, memory=numbers, step=st.integers(0, 2**40))
def test_a_state_survives_json_to_the_last_bit(multipliers, relaxations, memory, step):
    state = DualState(
        names=("a", "b"), multipliers=multipliers, relaxations=relaxations, rule_state={"x": memory}, step=step
    )
    again = DualState.from_dict(json.loads(json.dumps(state.to_dict())))
    for one, other in [
        (state.multipliers, again.multipliers),
        (state.relaxations, again.relaxations),
        (state.rule_state["x"], again.rule_state["x"]),
    ]:
        assert one.tobytes() == other.tobytes()
    assert (again.names, again.step) == (state.names, state.step)


def test_a_trial_without_constraints_has_an_empty_state():
    state = DualState(names=(), multipliers=[])
    assert DualState.from_dict(state.to_dict()).multipliers.shape == (0,)


def test_arrays_are_copies_that_nobody_can_change():
    given_array = np.array([1.0, 2.0])
    state = DualState(names=("a", "b"), multipliers=given_array)
    given_array[0] = 9.0
    assert state.multipliers.tolist() == [1.0, 2.0]
    with pytest.raises(ValueError, match="read-only"):
        state.multipliers[0] = 9.0


@pytest.mark.parametrize(
    "change, message",
    [
        ({"multipliers": [-1e-9, 0.0]}, r"negative multiplier in \{'a': -1e-09"),
        ({"multipliers": [0.0, math.nan]}, r"non-finite multiplier for \['b'\]"),
        ({"multipliers": [0.0]}, "shape"),
        ({"relaxations": [0.0, -1.0]}, "negative relaxation"),
        ({"relaxations": [math.inf, 0.0]}, r"non-finite relaxation for \['a'\]"),
        ({"rule_state": {"smoothed_violation": [0.0, math.nan]}}, r"non-finite smoothed_violation for \['b'\]"),
        ({"rule_state": {"filtered": [0.0]}}, "filtered has shape"),
        ({"step": -1}, "step=-1"),
        ({"step": 1.5}, "step=1.5"),
        ({"extra": 1}, r"unknown keys \['extra'\]"),
    ],
)
def test_a_state_that_cannot_be_is_refused_by_name(change, message):
    data = DualState(names=("a", "b"), multipliers=[0.0, 1.0]).to_dict()
    with pytest.raises(ValueError, match=message):
        DualState.from_dict({**data, **change})


def test_a_truncated_state_is_refused_by_the_missing_key():
    data = DualState(names=("a",), multipliers=[0.0]).to_dict()
    del data["step"]
    with pytest.raises(ValueError, match=r"missing keys \['step'\]"):
        DualState.from_dict(data)
