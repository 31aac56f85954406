"""The books of all trials: who may report, what the multipliers are, and the trace. Plain Python, no Ray.

Every change is first turned into journal records by the methods here and takes effect through `apply` alone, so that
replaying the journal rebuilds exactly the same state.
"""

import json
import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dualsweep.constraints import (
    DualRule,
    DualState,
    NonFiniteError,
    Problem,
    complementarity_residual,
    infeasibility,
    min_max_level,
    rule_from_config,
)
from dualsweep.constraints.checks import checked_number
from dualsweep.trainers.dual_client import Reply

FINAL = ("completed", "stopped", "failed", "diverged")


class StaleAttemptError(RuntimeError):
    """A worker of an older attempt reported; it must stop writing."""


class ProtocolError(RuntimeError):
    """A report skipped ahead, or came for a trial nobody began."""


@dataclass
class TrialBook:
    """One trial."""

    trial_id: str
    attempt: int = 0
    status: str = "waiting"  # waiting, running, interrupted, or one of FINAL
    directive: str = "continue"
    problem: Problem | None = None
    rule: DualRule | None = None
    state: DualState | None = None
    checkpoint_step: int = 0
    superseded_rows: int = 0
    result: dict[str, Any] | None = None
    error: str | None = None
    notes: list[str] = field(default_factory=list)
    attempt_limit: int = 0
    leases: int = 0  # times it was handed to workers since an attempt began
    group_size: int | None = None  # workers of the group that it was handed to last
    assignment: dict[str, Any] | None = None  # the last one that handed it to a slot
    _rows: list[dict[str, Any]] = field(default_factory=list, repr=False)
    _packed: bytes | None = field(default=None, repr=False)

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The trace: one row a dual step."""
        if self._packed is not None:
            self._rows, self._packed = json.loads(zlib.decompress(self._packed)), None
        return self._rows

    def put_away(self) -> None:
        """Hold the rows of a trial that is over compressed, until somebody asks: a row is 4 kB of Python objects."""
        if self._packed is None:
            self._packed = zlib.compress(json.dumps(self._rows).encode(), level=1)
            self._rows = []


class DualLedger:
    """State of the DualServer. Methods that change something return (records, answer); `apply` performs a record."""

    def __init__(self) -> None:
        self.trials: dict[str, TrialBook] = {}
        self.slots: dict[str, dict[str, Any] | None] = {}  # slot -> its assignment; None: the slot is closed

    def book(self, trial_id: str) -> TrialBook:
        if trial_id not in self.trials:
            self.trials[trial_id] = TrialBook(trial_id)
        return self.trials[trial_id]

    def begin(
        self, trial_id: str, attempt: int, *, problem: dict, rule: dict, start: list[float], dual_state: dict | None
    ) -> list[dict[str, Any]]:
        """Open an attempt: fence older ones, and rewind to `dual_state` (or to the start)."""
        book = self.book(trial_id)
        if attempt < book.attempt:
            raise StaleAttemptError(f"trial {trial_id}: attempt {attempt} began after attempt {book.attempt}")
        if attempt == book.attempt and book.state is not None:
            return []  # delivered twice: reports of this attempt may have followed
        if dual_state is not None and dual_state["step"] > len(book.rows):
            raise ProtocolError(
                f"trial {trial_id}: its checkpoint is of dual step {dual_state['step']}, the journal knows {len(book.rows)} of "
                "them; remove the checkpoint to start the trial again, or restore the journal"
            )
        if dual_state is None:
            parsed = Problem.from_dict(problem)
            dual_state = (
                rule_from_config(rule, parsed.relaxation_costs)
                .initial(parsed.names, np.asarray(start, dtype=np.float64), parsed.domain)
                .to_dict()
            )
        return [
            {
                "kind": "begin",
                "trial": trial_id,
                "attempt": attempt,
                "problem": problem,
                "rule": rule,
                "state": dual_state,
            }
        ]

    def report(self, trial_id: str, attempt: int, dual_step: int, measurement: dict[str, Any]) -> list[dict[str, Any]]:
        """One dual step.

        Returns: the record to make durable, or nothing when this report was answered before.
        Raises: StaleAttemptError, ProtocolError, NonFiniteError naming a metric; nothing has changed then.
        """
        book = self.book(trial_id)
        if book.state is None or book.problem is None or book.rule is None:
            raise ProtocolError(f"trial {trial_id} reported dual step {dual_step} before it began")
        if attempt != book.attempt:
            raise StaleAttemptError(f"trial {trial_id}: report of attempt {attempt}, current is {book.attempt}")
        if dual_step <= book.state.step:
            return []
        if book.status != "running":
            raise StaleAttemptError(f"trial {trial_id}: report of attempt {attempt}, but the trial is {book.status}")
        if dual_step != book.state.step + 1:
            raise ProtocolError(f"trial {trial_id}: dual step {dual_step} follows {book.state.step}")
        violation = book.problem.violation(measurement["metrics"])
        state = book.rule.step(book.state, violation, book.problem.domain)
        row = _row(book.problem, state, attempt, violation, measurement)
        for name, value in row.items():
            if not _finite(value):
                raise NonFiniteError(
                    f"trial {trial_id}: {name}={value} at dual step {dual_step} is not finite; look at its data"
                )
        record = {"kind": "step", "trial": trial_id, "row": row}
        if memory := {key: kept.tolist() for key, kept in state.rule_state.items() if key != "smoothed_violation"}:
            record["memory"] = memory
        return [record]

    def reply(self, trial_id: str) -> Reply:
        book = self.book(trial_id)
        return Reply(
            multipliers=tuple(book.state.multipliers.tolist()),
            directive=book.directive,
            dual_state=book.state.to_dict(),
        )

    def apply(self, record: dict[str, Any]) -> None:
        """Perform one journal record. Replaying all of them in order gives the same ledger."""
        kind = record["kind"]
        if kind == "close":
            self.slots[record["slot"]] = None
            return
        book = self.book(record["trial"])
        if kind == "assign":
            self.slots[record["slot"]], book.attempt_limit = record["assignment"], record["attempt_limit"]
            book.assignment, book.leases, book.group_size = record["assignment"], 0, None
        elif kind == "leased":
            book.leases += 1
            book.group_size = record.get("workers")  # journals of older versions have none
        elif kind == "resized":
            book.attempt_limit += 1
        elif kind == "begin":
            book.attempt, book.status, book.directive = record["attempt"], "running", "continue"
            book.leases = 0
            book.problem = Problem.from_dict(record["problem"])
            book.rule = rule_from_config(record["rule"], book.problem.relaxation_costs)
            book.state = DualState.from_dict(record["state"])
            book.superseded_rows += max(len(book.rows) - book.state.step, 0)
            del book.rows[book.state.step :]
            book.checkpoint_step, book.error = book.state.step, None
        elif kind == "step":
            book.state = _state_after(book.problem, record)
            book.rows.append(record["row"])
        elif kind == "checkpoint":
            book.checkpoint_step = max(book.checkpoint_step, record["dual_step"])
        elif kind == "note":
            book.notes.append(f"attempt {record['attempt']}: {record['text']}")
        elif kind == "directive":
            book.directive = record["directive"]
        elif kind == "retry":
            book.attempt, book.status, book.error = max(book.attempt, record["attempt"]), "waiting", record["error"]
        elif kind == "reopen":
            book.status, book.result, book.error = "waiting", None, None
        elif kind == "end":
            book.status, book.result, book.error = record["status"], record.get("result"), record.get("error")
        else:
            raise ValueError(f"journal record of unknown kind {kind!r}")


def check_dual_steps(records: Sequence[dict[str, Any]], trial_id: str) -> TrialBook:
    """Proof that no dual step of a trial is missing or doubled, whatever happened to its workers and servers.

    The rule is run again from the first attempt's start over the violations of the final trace: its multipliers must be
    those of the trace, bit for bit.
    Returns: the trial's book.
    Raises: ValueError naming the first dual step that is not what it should be.
    """
    ledger, start = DualLedger(), None
    for record in records:
        ledger.apply(record)
        if start is None and record["kind"] == "begin" and record["trial"] == trial_id:
            start = DualState.from_dict(record["state"])
    book = ledger.book(trial_id)
    if start is None or book.problem is None or book.rule is None:
        raise ValueError(f"trial {trial_id}: it never began")
    state = start
    for number, row in enumerate(book.rows, start=start.step + 1):
        state = book.rule.step(state, np.array(row["violations"]), book.problem.domain)
        if row["dual_step"] != number or state.multipliers.tolist() != row["multipliers"]:
            raise ValueError(
                f"trial {trial_id}: row {number} of its trace is not the dual step that follows the one before"
            )
    return book


def _state_after(problem: Problem, record: dict[str, Any]) -> DualState:
    """The dual state of a step's record: what its row shows, and the rest of the rule's memory."""
    row = record["row"]
    return DualState(
        names=problem.names,
        multipliers=row["multipliers"],
        relaxations=row["relaxations"],
        rule_state={"smoothed_violation": row["smoothed_violations"], **record.get("memory", {})},
        step=row["dual_step"],
    )


def _finite(value: float | Sequence[float]) -> bool:
    return all(map(math.isfinite, value)) if isinstance(value, list) else math.isfinite(value)


def _row(
    problem: Problem, state: DualState, attempt: int, violation: np.ndarray, measurement: dict[str, Any]
) -> dict[str, Any]:
    """The trace row of a dual step; `state` is the one after it."""
    grad_norm = checked_number(measurement["grad_norm"], field="stationarity", at_least=0)
    relaxed = violation - state.relaxations
    level = min_max_level(state.multipliers, relaxed, problem.domain)
    infeasible = infeasibility(relaxed, 0.0 if level is None else level)
    complementarity = complementarity_residual(state, violation, problem.domain)
    return {
        "dual_step": state.step,
        "primal_step": measurement["primal_step"],
        "attempt": attempt,
        "workers": measurement["workers"],
        "lag": measurement.get("lag", 0),
        "wall_time": measurement["wall_time"],
        "lr": measurement["lr"],
        "grad_norm": grad_norm,
        "objective": measurement["objective"],
        "objective_stderr": measurement["objective_stderr"],
        "lagrangian": measurement["lagrangian"],
        "multipliers": state.multipliers.tolist(),
        "relaxations": state.relaxations.tolist(),
        "metrics": list(measurement["metrics"]),
        "metric_stderrs": list(measurement["metric_stderrs"]),
        "thresholds": problem.thresholds.tolist(),
        "violations": violation.tolist(),
        "violation_stderrs": list(measurement["metric_stderrs"]),
        "smoothed_violations": state.rule_state["smoothed_violation"].tolist(),
        "infeasibility": infeasible,
        "complementarity": complementarity,
        "stationarity": grad_norm,
        "kkt_residual": max(infeasible, complementarity, grad_norm),
    }
