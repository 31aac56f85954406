"""Reports on a connection of their own: the same answers to the bit, durable before they leave, nothing for strangers."""

import asyncio
import socket
import threading
from contextlib import contextmanager, suppress

import pytest

from dualsweep.constraints import Constraint, Problem
from dualsweep.orchestration.dual_server import DualServer
from dualsweep.orchestration.journal import read_journal
from dualsweep.orchestration.local_dual import LocalDual
from dualsweep.orchestration.report_line import Line, LineLost, frame

PROBLEM = Problem(
    method="fairness", objective="loss", constraints=(Constraint(name="a", unit="loss", threshold=0.1),)
).to_dict()
BEGIN = {"problem": PROBLEM, "rule": {"rule": "ascent", "step_size": 0.3}, "start": [0.1], "dual_state": None}


def measured(metric):
    numbers = ("primal_step", "wall_time", "lr", "grad_norm", "objective", "objective_stderr", "lagrangian")
    return {**dict.fromkeys(numbers, 1.0), "workers": 1, "metrics": [metric], "metric_stderrs": [0.01], "counts": [8]}


class Served:
    """A DualServer in the event loop of a thread, as the actor has it."""

    def __init__(self, folder):
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever)
        self.thread.start()
        self.server = DualServer(str(folder), "")
        self.journal = folder / "journal.jsonl"
        self.run(self.server.begin("t", 1, *BEGIN.values()))

    def run(self, coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(30)

    def find(self):
        return self.run(self.server._line.address("127.0.0.1", self.server._book_report))

    def line(self):
        return Line(self.find)


@contextmanager
def served(folder):
    there = Served(folder)
    try:
        yield there
    finally:
        there.run(there.server.close())
        there.loop.call_soon_threadsafe(there.loop.stop)
        there.thread.join()


def test_answers_are_the_ledgers_and_on_disk_before_they_leave(tmp_path):
    local = LocalDual()
    local.begin("t", 1, **BEGIN)
    with served(tmp_path / "s") as there:
        line = there.line()
        for step in range(1, 6):
            report = ("t", 1, step, measured(0.1 + 0.7 / step))
            line.send(*report)
            answer = line.receive(30)
            assert answer == local.report(*report)
            assert read_journal(there.journal)[-1]["row"]["dual_step"] == step
        assert answer.multipliers[0] > 0.1
        line.send(*report)  # repeated
        assert line.receive(30) == answer
        line.close()


def test_many_callers_at_once_share_syncs_and_each_gets_its_own_answer(tmp_path):
    callers, steps = 6, 20
    with served(tmp_path / "s") as there:
        syncs = []
        append = there.server._commit.journal.append
        there.server._commit.journal.append = lambda batch: (append(batch), syncs.append(len(batch)))
        answers = {}

        def call(name):
            there.run(there.server.begin(name, 1, *BEGIN.values()))
            line = there.line()
            for step in range(1, steps + 1):
                line.send(name, 1, step, measured(0.2 + 0.1 * int(name)))
                answers[name] = line.receive(30)
            line.close()

        threads = [threading.Thread(target=call, args=(str(i),)) for i in range(callers)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
        assert sum(syncs) == callers * (steps + 1) > len(syncs)
        for name, answer in answers.items():
            assert answer.multipliers[0] == pytest.approx(0.1 + steps * 0.3 * (0.1 + 0.1 * int(name)))


def test_refusals_come_by_name_and_the_line_goes_on(tmp_path):
    with served(tmp_path / "s") as there:
        line = there.line()
        for report, name, text in [
            (("t", 1, 3, measured(0.2)), "ProtocolError", "dual step 3 follows 0"),
            (("t", 0, 1, measured(0.2)), "StaleAttemptError", "attempt 0, current is 1"),
            (("t", 1, 1, measured(float("nan"))), "NonFiniteError", "non-finite metric for ['a']"),
            (("t", 1), "TypeError", "missing 2 required"),
        ]:
            line.send(*report)
            refused, said = line.receive(30)
            assert refused == name and text in said
        line.send("t", 1, 1, measured(0.2))
        assert line.receive(30).dual_state["step"] == 1
        line.close()


@pytest.mark.parametrize("greeting", [frame("f" * 64), frame("x" * 300), b"GET / HTTP/1.1\r\n\r\n"])
def test_a_stranger_is_hung_up_on_and_nothing_is_done(greeting, tmp_path):
    with served(tmp_path / "s") as there:
        host, port, token = there.find()
        assert len(token) == 64
        with socket.create_connection((host, port), timeout=30) as stranger:
            stranger.sendall(greeting + frame(["t", 1, 1, measured(0.2)]))
            with suppress(ConnectionResetError):
                assert stranger.recv(1) == b""
        assert there.server.ledger.book("t").rows == []


def test_a_lost_line_is_told_and_found_again(tmp_path):
    """What the report did is unknown then; sent again it is answered from the books, once."""
    with served(tmp_path / "s") as there:
        line = there.line()
        line.send("t", 1, 1, measured(0.2))
        line._socket.shutdown(socket.SHUT_RD)
        with pytest.raises(LineLost):
            line.receive(30)
        line.send("t", 1, 1, measured(0.2))
        assert line.receive(30).dual_state["step"] == 1
        line.close()
        assert len(there.server.ledger.book("t").rows) == 1


def test_an_answer_nobody_waited_for_is_not_taken_for_the_next_one(tmp_path):
    """An attempt may end while its report is under way; the next one goes on with the same line."""
    with served(tmp_path / "s") as there:
        there.run(there.server.begin("u", 1, *BEGIN.values()))
        line = there.line()
        line.send("t", 1, 1, measured(0.9))
        line.send("u", 1, 1, measured(0.2))
        assert line.receive(30).multipliers == (0.1 + 0.3 * 0.1,)
        line.close()


def test_a_port_that_does_not_answer_is_left_alone_for_a_while():
    asked = []
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]

    def find():
        asked.append(port)
        return "127.0.0.1", port, "token"

    line = Line(find)
    for _ in range(3):
        with pytest.raises(LineLost):
            line.send("t", 1, 1, {})
    assert len(asked) == 1
