"""The driver's watcher: what it writes of each trial, whatever fails for a while or for one trial alone."""

import threading
from types import SimpleNamespace

import pytest

from dualsweep.orchestration import watch
from dualsweep.orchestration.config import SweepConfig
from dualsweep.orchestration.dual_ledger import FINAL, DualLedger
from dualsweep.orchestration.dual_server import watched
from dualsweep.orchestration.trace import read_trace
from dualsweep.orchestration.watch import Watcher
from dualsweep.trainers.store import Store

CONFIG = SweepConfig.from_dict(
    {
        "name": "small",
        "data": {"dataset": "digits", "minority": {"classes": [4], "keep": 0.2}},
        "thresholds": {"unit": "loss", "grid": {"minority": [0.5]}},
    }
)
PROBLEM = {
    "method": "fairness",
    "objective": "loss",
    "constraints": [{"name": "a", "unit": "loss", "threshold": 0.5}],
}


class Server:
    """The DualServer's answers out of a ledger; a call named in `broken` fails."""

    def __init__(self) -> None:
        self.ledger, self.broken, self.calls = DualLedger(), set(), []
        self.called = threading.Condition()

    def call(self, method, *args):
        with self.called:
            self.calls.append(method)
            self.called.notify_all()
        if method in self.broken:
            raise RuntimeError(f"the DualServer did not answer {method}")
        if method == "snapshot":
            cursors, ended = args
            books = self.ledger.trials.items()
            return {name: watched(book, cursors.get(name, 0)) for name, book in books if name not in ended}
        return list(self.ledger.book(args[0]).rows) if method == "trace" else None

    def wait_for(self, method, times):
        with self.called:
            assert self.called.wait_for(lambda: self.calls.count(method) >= times, 20)

    def begin(self, trial_id, attempt=1, state=None):
        given = {"problem": PROBLEM, "rule": {"rule": "ascent", "step_size": 0.1}, "start": [0.0], "dual_state": state}
        self.apply(self.ledger.begin(trial_id, attempt, **given))

    def step(self, trial_id, attempt=1):
        number = self.ledger.book(trial_id).state.step + 1
        numbers = ("lr", "grad_norm", "objective", "objective_stderr", "lagrangian")
        counters = {"primal_step": number, "workers": 1, "wall_time": 0.0}
        row = {**dict.fromkeys(numbers, 1.0), **counters, "metrics": [1.0], "metric_stderrs": [0.1], "counts": [8]}
        self.apply(self.ledger.report(trial_id, attempt, number, row))

    def end(self, trial_id):
        self.apply([{"kind": "end", "trial": trial_id, "status": "failed", "result": None, "error": "no"}])

    def apply(self, records):
        for record in records:
            self.ledger.apply(record)


class Tracker:
    """Notes what it is told of which trial."""

    def __init__(self) -> None:
        self.told = []

    def __getattr__(self, name):
        return lambda *args, **kwargs: self.told.append((name, args[0] if args else None))


@pytest.fixture
def make_watcher(tmp_path, monkeypatch):
    monkeypatch.setattr(watch, "INTERVAL_S", 0.01)

    def make(server, *trials):
        points = [
            {"trial_id": name, "label": name, "kind": "constrained", "thresholds": {}, "fixed_weight": None}
            for name in trials
        ]
        plan = SimpleNamespace(config=CONFIG, folder=tmp_path / "small", points=points, store=Store(tmp_path))
        return Watcher(plan, server, Tracker(), slots=1)

    return make


def test_a_ctrl_c_gets_through_while_looking_fails_and_only_the_last_look_counts(make_watcher):
    server = Server()
    watcher = make_watcher(server, "a")
    server.broken = {"snapshot"}
    watcher.start()
    server.wait_for("snapshot", 2)
    server.broken = {"snapshot", "interrupt"}
    watcher.interrupt()
    server.wait_for("interrupt", 2)
    server.broken = set()
    watcher.stop()
    assert watcher.error is None

    again = make_watcher(server, "a")
    server.broken = {"snapshot"}
    again.start()
    again.stop()
    assert "did not answer snapshot" in str(again.error)


def test_a_trial_that_cannot_be_written_is_named_and_hides_no_other(make_watcher, monkeypatch):
    server, real = Server(), watch.write_trace

    def write_trace(rows, path, **given):
        if given["trial_id"] == "bad":
            raise ValueError("dual step 3 is missing")
        real(rows, path, **given)

    monkeypatch.setattr(watch, "write_trace", write_trace)
    for name in ("bad", "good"):
        server.begin(name)
        server.step(name)
        server.end(name)
    watcher = make_watcher(server, "bad", "good")
    watcher.look()
    assert watcher.unkept == {"bad": "ValueError: dual step 3 is missing"}
    assert watcher.views["good"].result["status"] == "failed" and all(v.status in FINAL for v in watcher.views.values())
    monkeypatch.setattr(watch, "write_trace", real)
    watcher.look()
    assert watcher.unkept == {}


def test_the_trace_holds_the_rows_that_count_after_a_rewind_behind_a_checkpoint(make_watcher, tmp_path):
    """Its newest checkpoint was damaged; the watcher had its rows already."""
    server = Server()
    watcher = make_watcher(server, "a")
    server.begin("a")
    server.step("a")
    first = server.ledger.book("a").state.to_dict()
    server.step("a")
    server.step("a")
    server.apply([{"kind": "checkpoint", "trial": "a", "dual_step": 3}])
    watcher.look()
    server.begin("a", attempt=2, state=first)
    for _ in range(3):
        server.step("a", attempt=2)
    server.end("a")
    watcher.look()
    rows = read_trace(tmp_path / "small" / "trials" / "a" / "trace.parquet")
    assert rows == server.ledger.book("a").rows and [row["attempt"] for row in rows] == [1, 2, 2, 2]


def test_what_a_driver_that_died_had_not_told_of_the_pretraining_is_told_by_the_next(make_watcher):
    """Its model is there, so a resume trains it no more and shows it no more; MLflow may still miss its rows and its end."""
    server = Server()
    for name in ("pretrained", "a"):
        server.begin(name)
        server.step(name)
        server.end(name)
    watcher = make_watcher(server, "a")
    watcher.look()
    watcher.look()
    assert list(watcher.views) == ["a"]
    told = [name for name, trial_id in watcher.tracker.told if trial_id == "pretrained"]
    assert told == ["start_trial", "log_rows", "finish_trial"]
