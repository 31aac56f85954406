"""The central Ray actor: multipliers, trace and leases of every trial of a sweep.

It holds no CPU. Changes are written to the journal and synced before the answer leaves; reports that arrive while the
disk is busy share the next sync (group commit). Reports come on connections of their own (`report_line.py`), everything
else as calls of the actor. Ray restarts a dead actor, and the journal brings it back to the state that every answer was
given from.
"""

import asyncio
import hashlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray

from dualsweep.constraints import NonFiniteError
from dualsweep.orchestration.dual_ledger import FINAL, DualLedger, ProtocolError, StaleAttemptError, TrialBook
from dualsweep.orchestration.group_commit import GroupCommit
from dualsweep.orchestration.journal import Journal, RemoteJournal, encode_record
from dualsweep.orchestration.report_line import Line, LineLost, LineServer
from dualsweep.orchestration.storage import store_of
from dualsweep.trainers.dual_client import Reply
from dualsweep.trainers.store import StorageError, patience_s

NAMESPACE = "dualsweep"
BASE_TRIAL = "pretrained"
CALL_TIMEOUT_S = 120.0  # longer than Ray needs to restart the actor, also on another node


class DualServer:
    """See the module; run as an asyncio actor by `start_dual_server`."""

    def __init__(self, folder: str, storage: str) -> None:
        self.ledger = DualLedger()
        self.store = store_of(storage, Path(folder).parent)
        journal: Journal | RemoteJournal
        if self.store.uri is None:
            journal = Journal(Path(folder) / "journal.jsonl")
        else:
            journal = RemoteJournal(self.store, Path(folder))
        for record in journal.records:
            self.ledger.apply(record)
        journal.records = []
        self._bases: set[str] = set()  # pretrained models known to be there
        self._halting = False
        self._commit = GroupCommit(journal)
        self._line = LineServer()
        self._waiting: dict[str, set[asyncio.Future[None]]] = {}  # trial or slot -> who waits for a change of it

    # -- worker groups -------------------------------------------------------------------------------------------

    async def lease(self, slot: str, finished: str | None, workers: int = 1) -> dict[str, Any] | None:
        """The work of a slot, waiting for it: a new assignment, or after a restart the one the group had.

        Args:
            finished: trial the caller has just ended, or None when its process is new.
            workers: how many the group has now. A group that was resized has not failed: its trial keeps all its retries.
        Returns: an assignment with its attempt number raised and the dual steps in the books, or None when the slot is
            closed. A lease that no `begin` follows counts as an attempt: its workers died while they made ready.
        """
        current = self.ledger.slots.get(slot)
        if finished is None and current is not None:
            before = self.ledger.book(current["trial_id"]).group_size
            if before is not None and before != workers:
                await self._perform([{"kind": "resized", "trial": current["trial_id"]}])
        while True:
            if slot in self.ledger.slots:
                assignment = self.ledger.slots[slot]
                if assignment is None:
                    return None
                book = self.ledger.book(assignment["trial_id"])
                if (error := _no_more_tries(book)) is not None:
                    await self._perform(
                        [{"kind": "end", "trial": book.trial_id, "status": "failed", "result": None, "error": error}]
                    )
                if assignment["trial_id"] != finished and book.status not in FINAL and not self._halting:
                    if assignment["kind"] == "base" or await self._has_base(assignment["base_dir"]):
                        await self._perform([{"kind": "leased", "trial": book.trial_id, "workers": workers}])
                        if self.ledger.slots[slot] is not assignment:  # the slot has got another one meanwhile
                            continue
                        return {**assignment, "attempt": book.attempt + 1, "known_steps": len(book.rows)}
                    await self._give_up_without_base(assignment["trial_id"])
            await self._wait(slot)

    async def give_up(self, slot: str, error: str) -> None:
        """A group of this slot cannot even be made ready: the trial it would take fails with that error."""
        assignment = self.ledger.slots.get(slot)
        if assignment is not None and self.ledger.book(assignment["trial_id"]).status not in FINAL:
            failed = {
                "kind": "end",
                "trial": assignment["trial_id"],
                "status": "failed",
                "result": None,
                "error": error,
            }
            await self._perform([failed])

    async def settle(self) -> None:
        """Every slot is closed: trials that were told to stop, and whose workers died before they heard it, are stopped."""
        for book in list(self.ledger.trials.values()):
            if book.status == "running" and book.directive == "stop":
                await self._perform(
                    [{"kind": "end", "trial": book.trial_id, "status": "stopped", "result": None, "error": None}]
                )

    async def _has_base(self, base_dir: str) -> bool:
        if base_dir not in self._bases:
            found = await asyncio.to_thread(self.store.exists, Path(base_dir) / "base.json")
            self._bases |= {base_dir} if found else set()
        return base_dir in self._bases

    async def _give_up_without_base(self, trial_id: str) -> None:
        """Trials wait while another slot trains the pretrained model; if that failed there is nothing to continue from."""
        base = self.ledger.trials.get(BASE_TRIAL)
        if base is not None and base.status in ("failed", "diverged"):
            error = f"the pretrained model every trial continues from could not be trained:\n{base.error}"
            await self._perform(
                [{"kind": "end", "trial": trial_id, "status": "failed", "result": None, "error": error}]
            )

    async def begin(
        self, trial_id: str, attempt: int, problem: dict, rule: dict, start: list[float], dual_state: dict | None
    ) -> Reply:
        await self._perform(
            self.ledger.begin(trial_id, attempt, problem=problem, rule=rule, start=start, dual_state=dual_state)
        )
        return self.ledger.reply(trial_id)

    async def report(self, trial_id: str, attempt: int, dual_step: int, measurement: dict[str, Any]) -> Reply:
        durable, answer = self._book_report(trial_id, attempt, dual_step, measurement)
        if durable is not None:
            await durable
        return answer()

    def _book_report(
        self, trial_id: str, attempt: int, dual_step: int, measurement: dict[str, Any]
    ) -> tuple[asyncio.Future[None] | None, Callable[[], Reply]]:
        """See `report_line.Book`. Raises: as `DualLedger.report`."""
        durable = self._apply(self.ledger.report(trial_id, attempt, dual_step, measurement))
        return durable, lambda: self.ledger.reply(trial_id)

    async def line(self) -> tuple[str, int, str]:
        """Where reports may be sent without Ray: host, port and token."""
        return await self._line.address(ray.util.get_node_ip_address(), self._book_report)

    async def checkpointed(self, trial_id: str, attempt: int, dual_step: int, path: str) -> None:
        self._fence(trial_id, attempt)
        await self._perform([{"kind": "checkpoint", "trial": trial_id, "dual_step": dual_step, "path": path}])

    async def end(self, trial_id: str, attempt: int, status: str, result: dict | None, error: str | None) -> None:
        """A trial is over (completed, stopped, failed, diverged) or put aside (interrupted).

        An attempt that diverged without a result met numbers that are not finite: the trial is handed out again, from its
        last checkpoint, while it has retries left. Every worker of a group may say how its attempt ended; the first counts.
        """
        self._fence(trial_id, attempt)
        book = self.ledger.book(trial_id)
        if book.status in FINAL or (book.attempt == attempt and book.status != "running"):
            return
        if status == "diverged" and result is None:
            if attempt < book.attempt_limit:
                said = (error or "numbers that are not finite").strip().splitlines()[-1].split("; ")[0]
                note = {"kind": "note", "trial": trial_id, "attempt": attempt, "text": f"tried again after {said}"}
                await self._perform([{"kind": "retry", "trial": trial_id, "attempt": attempt, "error": error}, note])
                return
            error = f"{(error or '').rstrip()} (attempt {attempt}, the last that compute.max_failures allows)"
        await self._perform([{"kind": "end", "trial": trial_id, "status": status, "result": result, "error": error}])

    async def note(self, trial_id: str, attempt: int, text: str) -> None:
        """Something to tell the user of an attempt."""
        self._fence(trial_id, attempt)
        await self._perform([{"kind": "note", "trial": trial_id, "attempt": attempt, "text": text}])

    async def trace(self, trial_id: str) -> list[dict[str, Any]]:
        return self.ledger.book(trial_id).rows

    def _fence(self, trial_id: str, attempt: int) -> None:
        current = self.ledger.book(trial_id).attempt
        if attempt < current:
            raise StaleAttemptError(f"trial {trial_id}: attempt {attempt} is over, current is {current}")

    # -- the Tune side -------------------------------------------------------------------------------------------

    async def assign(self, slot: str, assignment: dict[str, Any] | None, max_failures: int = 0) -> None:
        """Hand a slot its next trial; None closes the slot. The trial it had, if unfinished, is told to stop.

        A trial belongs to one slot: one that Tune starts again elsewhere, its node being lost, is taken from the old one,
        whose group would otherwise fetch it back. Ray repeats a call that a dead server may not have answered; the second one changes nothing.
        """
        slots = self.ledger.slots
        if slot in slots and slots[slot] == assignment:
            return
        previous = slots.get(slot)
        if previous is not None:
            await self._direct(previous["trial_id"], "stop")
        if assignment is None:
            await self._perform([{"kind": "close", "slot": slot}])
            return
        book = self.ledger.book(assignment["trial_id"])
        reopen = [{"kind": "reopen", "trial": book.trial_id}] if book.status != "waiting" else []
        deserted = [s for s, other in slots.items() if other and other["trial_id"] == book.trial_id and s != slot]
        closed = [{"kind": "close", "slot": other} for other in deserted]
        limit = book.attempt + 1 + max_failures
        given = {
            "kind": "assign",
            "trial": book.trial_id,
            "slot": slot,
            "assignment": assignment,
            "attempt_limit": limit,
        }
        await self._perform([*closed, *reopen, given])

    async def assignments(self) -> dict[str, dict[str, Any]]:
        """What every trial that was ever handed out was handed out with: a resumed sweep starts it from the same."""
        books = self.ledger.trials.items()
        return {trial_id: book.assignment for trial_id, book in books if book.assignment is not None}

    async def reopen(self, trial_ids: list[str]) -> None:
        """Trials that a resume runs again wait from here on, so that nobody takes their old end for the new one's."""
        ended = [trial for trial in trial_ids if self.ledger.book(trial).status in FINAL]
        await self._perform([{"kind": "reopen", "trial": trial} for trial in ended])

    async def progress(
        self, trial_id: str, seen: int, every: int, timeout_s: float, last: int | None = None
    ) -> dict[str, Any]:
        """Wait until `every` more dual steps than `seen` are there, or the trial has ended, or the time is over.

        Answers depend on whole multiples of `every`, so a scheduler sees the same milestones however fast it polls. That of
        the dual step `last` waits for the end: a trial that is being evaluated has no steps left for a scheduler to save.
        """
        deadline = time.monotonic() + timeout_s
        book = self.ledger.book(trial_id)

        def reached() -> bool:
            return len(book.rows) >= seen + every and seen + every != last

        while not reached() and not self._over(book):
            left = deadline - time.monotonic()
            if left <= 0:
                break
            await self._wait(trial_id, timeout_s=left)
        step = min(len(book.rows), seen + every)
        ended = self._over(book) and len(book.rows) <= seen + every
        status = "running" if not ended else book.status if book.status in FINAL else "interrupted"
        row = book.rows[step - 1] if step else None
        return {"status": status, "reached": step, "row": row, "result": book.result if ended else None}

    def _over(self, book: TrialBook) -> bool:
        """Ended, put aside, or never to be started because the sweep is being interrupted."""
        return book.status in (*FINAL, "interrupted") or (self._halting and book.status == "waiting")

    async def interrupt(self) -> None:
        """Ask every running trial for a checkpoint and start no other; returns at once."""
        self._halting = True
        for trial_id in list(self.ledger.trials):
            await self._direct(trial_id, "interrupt")
        self._wake(*self._waiting)

    async def close(self) -> None:
        """Everything answered is on disk already; what a failed write left is tried once more before the actor goes."""
        self._line.close()
        await self._commit.close()

    async def _direct(self, trial_id: str, directive: str) -> None:
        if self.ledger.book(trial_id).status == "running":
            await self._perform([{"kind": "directive", "trial": trial_id, "directive": directive}])

    async def snapshot(self, cursors: dict[str, int], ended: list[str]) -> dict[str, dict[str, Any]]:
        """Every trial as a watcher sees it.

        Args:
            cursors: rows the caller has of each trial; the rest come along once a checkpoint or the end made them final.
            ended: trials that are over and whose rows and result the caller has: left out, and put away.
        """
        done = set(ended)
        for trial_id in done:
            self.ledger.book(trial_id).put_away()
        books = self.ledger.trials.items()
        return {trial_id: watched(book, cursors.get(trial_id, 0)) for trial_id, book in books if trial_id not in done}

    # -- durability ----------------------------------------------------------------------------------------------

    def _apply(self, records: list[dict[str, Any]]) -> asyncio.Future[None] | None:
        """Apply records. Returns: what is done once they, and all before them, are on disk; None if they are already."""
        lines = [encode_record(record) for record in records]  # what cannot be written must not take effect
        for record in records:
            self.ledger.apply(record)
        durable = self._commit.add(lines)
        if durable is not None:
            changed = {record[key] for record in records for key in ("trial", "slot") if key in record}
            durable.add_done_callback(lambda _: self._wake(*changed))
        return durable

    async def _perform(self, records: list[dict[str, Any]]) -> None:
        """Apply records and return once they, and all before them, are on disk."""
        durable = self._apply(records)
        if durable is not None:
            await durable

    def _wake(self, *keys: str) -> None:
        for key in keys:
            for waiter in self._waiting.get(key, ()):
                if not waiter.done():
                    waiter.set_result(None)

    async def _wait(self, key: str, *, timeout_s: float = 0.5) -> None:
        """Until a record of this trial or slot is durable, or the time is over."""
        waiter = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(key, set()).add(waiter)
        try:
            await asyncio.wait_for(waiter, timeout_s)
        except TimeoutError:
            return
        finally:
            waiters = self._waiting[key]
            waiters.discard(waiter)
            if not waiters:
                del self._waiting[key]


def _no_more_tries(book: TrialBook) -> str | None:
    """Why a trial whose workers died is not handed out again; None: it may be.

    One lease that no attempt followed is free: it may have been given to a group that died while it waited for it.
    """
    died = book.status == "running" or (book.status not in FINAL and book.leases > 0)
    if not died or book.attempt + max(book.leases - 1, 0) < book.attempt_limit:
        return None
    how = f"died in each of {book.attempt} attempts" if book.attempt else "never got as far as its first step"
    if book.attempt and book.leases > 1:
        how += f", and {book.leases} times before the next one began"
    return f"its workers {how}, without a Python error; look at memory and at the Ray logs"


def watched(book: TrialBook, cursor: int) -> dict[str, Any]:
    """One trial for the live table and the tracker."""
    over = book.status in FINAL
    final = len(book.rows) if over else min(book.checkpoint_step, len(book.rows))
    return {
        "status": book.status,
        "attempt": book.attempt,
        "dual_step": len(book.rows),
        "row": book.rows[-1] if book.rows else None,
        "started": book.rows[0]["wall_time"] if book.rows else None,
        "names": list(book.problem.names) if book.problem else [],
        "new_rows": book.rows[cursor:final],
        "result": book.result if over else None,
        "error": book.error,
        "notes": list(book.notes),
        "start": (book.assignment or {}).get("start"),
        "superseded_rows": book.superseded_rows,
    }


_REFUSALS = {
    kind.__name__: kind for kind in (StaleAttemptError, ProtocolError, StorageError, NonFiniteError, ValueError)
}


def _timeout_s() -> float:
    """An answer may have to wait for a remote store."""
    return max(CALL_TIMEOUT_S, patience_s() + 30.0)


class RayDual:
    """DualClient over the actor's handle: every call has a time limit and survives a restart of the actor."""

    def __init__(self, handle) -> None:
        self.handle = handle
        self._line = Line(lambda: self.call("line"))

    def begin(
        self, trial_id: str, attempt: int, *, problem: dict, rule: dict, start: list[float], dual_state: dict | None
    ) -> Reply:
        return self.call("begin", trial_id, attempt, problem, rule, start, dual_state)

    def report(self, trial_id: str, attempt: int, dual_step: int, measurement: dict[str, Any]) -> Reply:
        return self.submit(trial_id, attempt, dual_step, measurement)()

    def submit(self, trial_id: str, attempt: int, dual_step: int, measurement: dict[str, Any]) -> Callable[[], Reply]:
        """Where the line is lost, Ray carries the report again: the server answers a repeated one from its books."""
        report, timeout_s = (trial_id, attempt, dual_step, measurement), _timeout_s()
        try:
            self._line.send(*report)
        except LineLost:
            reference = self.handle.report.remote(*report)
            return lambda: self._get("report", reference, timeout_s)

        def answer() -> Reply:
            try:
                answered = self._line.receive(timeout_s)
            except LineLost:
                return self.call("report", *report)
            if isinstance(answered, Reply):
                return answered
            name, text = answered
            raise _REFUSALS[name](text) if name in _REFUSALS else RuntimeError(f"DualServer: {name}: {text}")

        return answer

    def checkpointed(self, trial_id: str, attempt: int, dual_step: int, path: str) -> None:
        self.call("checkpointed", trial_id, attempt, dual_step, path)

    def note(self, trial_id: str, attempt: int, text: str) -> None:
        self.call("note", trial_id, attempt, text)

    def trace(self, trial_id: str) -> list[dict[str, Any]]:
        return self.call("trace", trial_id)

    def end(
        self, trial_id: str, attempt: int, status: str, *, result: dict | None = None, error: str | None = None
    ) -> None:
        self.call("end", trial_id, attempt, status, result, error)

    def call(self, method: str, *args: Any, timeout_s: float | None = None) -> Any:
        """Raises: StaleAttemptError, ProtocolError, ValueError as the server does; RuntimeError when it does not answer."""
        reference = getattr(self.handle, method).remote(*args)
        return self._get(method, reference, _timeout_s() if timeout_s is None else timeout_s)

    def _get(self, method: str, reference: Any, timeout_s: float) -> Any:
        try:
            return ray.get(reference, timeout=timeout_s)
        except ray.exceptions.RayTaskError as error:
            cause = error.as_instanceof_cause()
            if isinstance(cause, (StaleAttemptError, ProtocolError, StorageError, ValueError)):
                raise type(error.cause)(str(error.cause)) from None
            raise
        except ray.exceptions.GetTimeoutError as error:
            raise RuntimeError(f"the DualServer did not answer {method} within {timeout_s:g} s") from error
        except ray.exceptions.ActorDiedError as error:  # its last line says why: a damaged journal, for one
            raise RuntimeError(f"the DualServer died: {str(error).strip().splitlines()[-1].strip()}") from error

    def lease(self, slot: str, finished: str | None, workers: int = 1) -> dict[str, Any] | None:
        return ray.get(self.handle.lease.remote(slot, finished, workers))

    def give_up(self, slot: str, error: str) -> None:
        self.call("give_up", slot, error)

    def shutdown(self) -> None:
        """End the actor for good; its journal stays."""
        self.call("close")
        ray.kill(self.handle)


def server_name(folder: Path) -> str:
    """Two sweeps of one name in two storage folders may share a cluster, so the whole path counts."""
    return f"dual-server-{folder.name}-{hashlib.sha256(str(folder).encode()).hexdigest()[:8]}"


def start_dual_server(folder: Path, storage: str = "") -> RayDual:
    """Start the sweep's DualServer: no CPU, restarted for ever, found by name from every worker.

    Args:
        storage: the config's; its journal lies there if that is a remote address, else in the folder.
    """
    actor = ray.remote(DualServer).options(
        name=server_name(folder),
        namespace=NAMESPACE,
        num_cpus=0,
        max_restarts=-1,
        max_task_retries=-1,
        max_concurrency=1000,  # long polls (lease, progress) wait inside the actor
    )
    return RayDual(actor.remote(str(folder), storage))


def find_dual_server(folder: Path) -> RayDual:
    return RayDual(ray.get_actor(server_name(folder), namespace=NAMESPACE))
