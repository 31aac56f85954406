"""The DualServer is killed at moments drawn at random: multipliers and traces are those of a calm run, to the last bit."""

import asyncio
import threading
import time

import psutil
import pytest
from ray.exceptions import ActorDiedError, RayTaskError
from rich.console import Console

from dualsweep.constraints import Constraint, NonNegative, Problem
from dualsweep.orchestration.config import load_config
from dualsweep.orchestration.dual_ledger import check_dual_steps
from dualsweep.orchestration.dual_server import DualServer, RayDual
from dualsweep.orchestration.group_commit import GroupCommit
from dualsweep.orchestration.journal import Journal, read_journal
from dualsweep.orchestration.sweep import run_sweep
from dualsweep.orchestration.trace import read_trace

PROBLEM = Problem(
    method="fairness",
    objective="loss",
    constraints=(Constraint(name="a", unit="loss", threshold=0.5, metric="loss", sense="<="),),
    domain=NonNegative(),
).to_dict()
RULE = {"rule": "ascent", "step_size": 0.1}


class Killer(threading.Thread):
    """SIGKILL to the sweep's DualServer again and again, a random while after it is there."""

    def __init__(self, moment):
        super().__init__(daemon=True)
        self.moment, self.kills, self.over = moment, 0, threading.Event()

    def run(self):
        while not self.over.wait(self.moment.uniform(0.5, 3.0)):
            for child in psutil.Process().children(recursive=True):
                try:
                    if child.name().startswith("ray::DualServer"):
                        child.kill()
                        self.kills += 1
                except psutil.NoSuchProcess:
                    continue


@pytest.mark.ray
@pytest.mark.slow
def test_kills_at_random_moments_change_nothing(write_small, moment, assert_books_whole, assert_as_calm):
    killer = Killer(moment)
    killer.start()
    try:
        stormy = run_sweep(load_config(write_small(), environment=False), console=Console(quiet=True))
    finally:
        killer.over.set()
        killer.join()
    assert stormy.status == "completed"
    assert killer.kills >= 3
    assert_books_whole(stormy.folder)
    assert_as_calm(stormy.folder)
    for path in (stormy.folder / "trials").glob("*/trace.parquet"):
        assert [row["dual_step"] for row in read_trace(path)] == list(range(1, 401))


def measurement(step, metric=1.0):
    numbers = ("lr", "grad_norm", "objective", "objective_stderr", "lagrangian")
    counters = {"primal_step": step, "workers": 1, "wall_time": 0.0}
    return {**dict.fromkeys(numbers, 1.0), **counters, "metrics": [metric], "metric_stderrs": [0.1], "counts": [8]}


def assignment(tmp_path, trial_id="t"):
    return {"trial_id": trial_id, "kind": "base", "base_dir": str(tmp_path), "handed_over": time.time()}


def test_a_server_that_comes_back_knows_who_was_doing_what(tmp_path):
    """Its slots, how often a trial may still be tried, and answers to calls that Ray repeats."""

    async def before():
        server = DualServer(str(tmp_path / "s"), "")
        await server.assign("slot", assignment(tmp_path) | {"handed_over": 1.0}, 2)
        lease = await server.lease("slot", None)
        await server.begin("t", lease["attempt"], PROBLEM, RULE, [0.0], None)
        return (await server.report("t", 1, 1, measurement(1))).multipliers

    async def after(multipliers):
        server = DualServer(str(tmp_path / "s"), "")
        await server.assign("slot", assignment(tmp_path) | {"handed_over": 1.0}, 2)  # repeated by Ray
        reply = await server.report("t", 1, 1, measurement(1, metric=9.0))  # repeated: the recorded answer counts
        assert (reply.multipliers, reply.directive) == (multipliers, "continue")
        assert (await server.lease("slot", None))["attempt"] == 2
        await server.begin("t", 2, PROBLEM, RULE, [0.0], None)
        assert (await server.lease("slot", None, 2))["attempt"] == 3  # a group of another size: no failure of the trial
        await server.begin("t", 3, PROBLEM, RULE, [0.0], None)
        assert (await server.lease("slot", None, 2))["attempt"] == 4
        await server.begin("t", 4, PROBLEM, RULE, [0.0], None)
        waiting = asyncio.create_task(
            server.lease("slot", None, 2)
        )  # a third failure: given up, the slot waits for more
        while server.ledger.book("t").status != "failed":
            await asyncio.sleep(0.01)
        await server.assign("slot", None)
        assert await waiting is None

    multipliers = asyncio.run(before())
    assert multipliers == (0.05,)
    asyncio.run(after(multipliers))
    assert asyncio.run(DualServer(str(tmp_path / "s"), "").lease("slot", None)) is None


def test_a_server_that_comes_back_knows_a_resize_from_a_failure(tmp_path):
    """The node that dies may be the server's own: then it starts again before the smaller group asks for its trial."""

    async def before():
        server = DualServer(str(tmp_path / "s"), "")
        await server.assign("slot", assignment(tmp_path), 0)
        await server.begin("t", (await server.lease("slot", None, 2))["attempt"], PROBLEM, RULE, [0.0], None)

    async def after():
        server = DualServer(str(tmp_path / "s"), "")
        given = await server.lease("slot", None, 1)
        assert given["attempt"] == 2
        await server.begin("t", 2, PROBLEM, RULE, [0.0], None)
        waiting = asyncio.create_task(server.lease("slot", None, 1))  # the same size: a failure, and none is allowed
        while server.ledger.book("t").status != "failed":
            await asyncio.sleep(0.01)
        waiting.cancel()

    asyncio.run(before())
    asyncio.run(asyncio.wait_for(after(), 30))


def test_workers_that_die_before_their_trial_begins_use_its_budget_up(tmp_path):
    """SIGKILL while the pretrained model is loaded: no attempt begins, and Ray Train restarts the group for ever."""

    async def before():
        server = DualServer(str(tmp_path / "s"), "")
        await server.assign("slot", assignment(tmp_path), 1)
        return [(await server.lease("slot", None))["attempt"] for _ in range(2)]

    async def after():
        server = DualServer(str(tmp_path / "s"), "")
        assert (await server.lease("slot", None))["attempt"] == 1  # one more than the budget: see `lease`
        waiting = asyncio.create_task(server.lease("slot", None))
        while server.ledger.book("t").status != "failed":
            await asyncio.sleep(0.01)
        assert "never got as far as its first step" in server.ledger.book("t").error
        await server.assign("slot", assignment(tmp_path, "next"), 1)
        assert (await waiting)["trial_id"] == "next"
        await server.begin("next", 1, PROBLEM, RULE, [0.0], None)
        await server.report("next", 1, 1, measurement(1))
        assert server.ledger.book("next").leases == 0
        given = await server.lease("slot", None)
        assert (given["attempt"], given["known_steps"]) == (2, 1)

    assert asyncio.run(before()) == [1, 1]
    asyncio.run(asyncio.wait_for(after(), 30))


def test_a_group_that_cannot_be_made_ready_fails_the_trial_of_its_slot(tmp_path):
    async def sweep():
        server = DualServer(str(tmp_path / "s"), "")
        await server.give_up("slot", "a slot that nobody knows")
        await server.assign("slot", assignment(tmp_path), 1)
        await server.give_up("slot", "FileNotFoundError: /data")
        await server.give_up("slot", "the second worker's words")
        book = server.ledger.book("t")
        assert (book.status, book.error) == ("failed", "FileNotFoundError: /data")

    asyncio.run(sweep())


def test_a_trial_whose_workers_died_before_they_heard_that_it_is_stopped_is_stopped(tmp_path):
    async def sweep():
        server = DualServer(str(tmp_path / "s"), "")
        for trial_id in ("t", "other"):
            await server.assign(trial_id, assignment(tmp_path, trial_id), 1)
            await server.begin(trial_id, 1, PROBLEM, RULE, [0.0], None)
        await server.assign("t", None)
        await server.settle()
        assert [server.ledger.book(trial_id).status for trial_id in ("t", "other")] == ["stopped", "running"]

    asyncio.run(sweep())


def test_a_server_that_cannot_start_says_why(monkeypatch):
    cause = RayTaskError(
        "DualServer.__init__", "Traceback\nJournalError: journal.jsonl: record at byte 7 is corrupted", None
    )

    def get(reference, timeout):
        raise ActorDiedError(cause)

    monkeypatch.setattr("dualsweep.orchestration.dual_server.ray.get", get)
    with pytest.raises(
        RuntimeError, match=r"DualServer died: JournalError: journal\.jsonl: record at byte 7 is corrupted"
    ):
        RayDual(None)._get("snapshot", None, 120.0)


def test_whoever_waits_for_a_write_is_told_whatever_went_wrong(tmp_path):
    class Broken(Journal):
        def append(self, records):
            raise MemoryError("no room")

    async def wait():
        with pytest.raises(MemoryError, match="no room"):
            await asyncio.wait_for(GroupCommit(Broken(tmp_path / "journal.jsonl")).add([b"a record"]), 5)

    asyncio.run(wait())


def test_a_trial_that_is_started_again_elsewhere_leaves_its_old_slot(tmp_path):
    async def sweep():
        server = DualServer(str(tmp_path / "s"), "")
        await server.assign("lost", assignment(tmp_path), 5)
        await server.begin("t", (await server.lease("lost", None))["attempt"], PROBLEM, RULE, [0.0], None)
        await server.assign("new", assignment(tmp_path), 5)
        assert await server.lease("lost", None) is None
        assert (await server.lease("new", None))["attempt"] == 2

    asyncio.run(sweep())


def test_the_proof_of_a_trace_sees_a_missing_a_doubled_and_a_changed_step(tmp_path):
    async def sweep():
        server = DualServer(str(tmp_path / "s"), "")
        await server.begin("t", 1, PROBLEM, RULE, [0.0], None)
        for step in range(1, 5):
            await server.report("t", 1, step, measurement(step, metric=float(step)))

    asyncio.run(sweep())
    records = read_journal(tmp_path / "s" / "journal.jsonl")
    assert len(check_dual_steps(records, "t").rows) == 4
    steps = [i for i, record in enumerate(records) if record["kind"] == "step"]
    changed = [{**r, "row": {**r["row"], "multipliers": [7.0]}} if i == steps[1] else r for i, r in enumerate(records)]
    missing = [r for i, r in enumerate(records) if i != steps[1]]
    doubled = [*records[: steps[2]], records[steps[1]], *records[steps[2] :]]
    for wrong in (changed, missing, doubled):
        with pytest.raises(ValueError, match=r"row [23] of its trace"):
            check_dual_steps(wrong, "t")
