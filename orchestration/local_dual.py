"""A DualClient in this process, without Ray or journal: notebooks, tests and `workers: 0` debugging."""

from collections.abc import Callable
from typing import Any

from dualsweep.orchestration.dual_ledger import DualLedger
from dualsweep.trainers.dual_client import Reply


class LocalDual:
    """The same books as the DualServer's, kept in memory."""

    def __init__(self) -> None:
        self.ledger = DualLedger()

    def begin(
        self, trial_id: str, attempt: int, *, problem: dict, rule: dict, start: list[float], dual_state: dict | None
    ) -> Reply:
        self._perform(
            self.ledger.begin(trial_id, attempt, problem=problem, rule=rule, start=start, dual_state=dual_state)
        )
        return self.ledger.reply(trial_id)

    def report(self, trial_id: str, attempt: int, dual_step: int, measurement: dict[str, Any]) -> Reply:
        self._perform(self.ledger.report(trial_id, attempt, dual_step, measurement))
        return self.ledger.reply(trial_id)

    def submit(self, trial_id: str, attempt: int, dual_step: int, measurement: dict[str, Any]) -> Callable[[], Reply]:
        try:
            reply = self.report(trial_id, attempt, dual_step, measurement)
        except (RuntimeError, ValueError) as error:  # a refusal is an answer, and comes when it is asked for
            refusal = error

            def refused() -> Reply:
                raise refusal

            return refused
        return lambda: reply

    def checkpointed(self, trial_id: str, attempt: int, dual_step: int, path: str) -> None:
        self._perform([{"kind": "checkpoint", "trial": trial_id, "dual_step": dual_step}])

    def note(self, trial_id: str, attempt: int, text: str) -> None:
        self._perform([{"kind": "note", "trial": trial_id, "attempt": attempt, "text": text}])

    def trace(self, trial_id: str) -> list[dict[str, Any]]:
        return list(self.ledger.book(trial_id).rows)

    def _perform(self, records: list[dict[str, Any]]) -> None:
        for record in records:
            self.ledger.apply(record)
