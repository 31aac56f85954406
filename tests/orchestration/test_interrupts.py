"""Signals as a sweep takes them: real ones, sent to this process."""

import os
import signal
import sys

import pytest

from dualsweep.orchestration.interrupts import as_interrupt, interruptible

ASKING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@pytest.fixture(autouse=True)
def handlers_stay():
    hangup = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it is ignored, and stays so
    before = [signal.getsignal(number) for number in ASKING]
    yield
    after = [signal.getsignal(number) for number in ASKING]
    signal.signal(signal.SIGHUP, hangup)
    assert after == before


def send(number):
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("first", ASKING)
@pytest.mark.parametrize("second", ASKING)
def test_the_first_signal_asks_and_a_second_one_insists_unless_a_terminal_closes(first, second, monkeypatch):
    monkeypatch.setattr("dualsweep.orchestration.interrupts.leave_terminal", lambda: None)  # pytest's own may be one
    said = []

    def ask():
        said.append("asked")
        return len(said) == 1

    with interruptible(ask, insist=lambda: said.append("insisted")):
        send(first)
        assert said == ["asked"]
        send(second)
    assert said == ["asked", "asked"] + ["insisted"] * (second != signal.SIGHUP)


@pytest.mark.parametrize("number", ASKING[1:])
def test_outside_of_training_the_first_signal_is_a_ctrl_c_and_later_ones_are_ignored(number, monkeypatch):
    monkeypatch.setattr("dualsweep.orchestration.interrupts.leave_terminal", lambda: None)
    before = signal.signal(number, lambda signum, frame: sys.exit(15))  # as Ray does when it starts
    try:
        with as_interrupt():
            with pytest.raises(KeyboardInterrupt):
                send(number)
            send(number)
    finally:
        signal.signal(number, before)
