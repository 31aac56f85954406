"""What the training loop needs from whoever holds the multipliers. No Ray here: tests and notebooks pass a plain object."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

Directive = Literal["continue", "stop", "interrupt"]
NOT_THE_RULES = (
    "start",
    "primal_steps_per_dual_step",
    "mode",
)  # fields of the config's `dual` that the loop reads itself


@dataclass(frozen=True)
class Reply:
    """Answer to a report: the multipliers of the next primal steps, and whether to go on.

    `stop` ends the trial here (a scheduler's or the user's decision); `interrupt` asks for a checkpoint first, to be resumed.
    """

    multipliers: tuple[float, ...]
    directive: Directive
    dual_state: dict[str, Any]  # goes into the checkpoint, for the rewind on restore


class DualClient(Protocol):
    """Every call carries (trial, attempt): a repeated call changes nothing, one of an older attempt is refused."""

    def begin(
        self, trial_id: str, attempt: int, *, problem: dict, rule: dict, start: list[float], dual_state: dict | None
    ) -> Reply:
        """Start or resume a trial; `dual_state` of a checkpoint rewinds the trial to it, None starts afresh."""
        ...

    def report(self, trial_id: str, attempt: int, dual_step: int, measurement: dict[str, Any]) -> Reply:
        """One dual step: measured objective and constraint metrics in, multipliers out."""
        ...

    def submit(self, trial_id: str, attempt: int, dual_step: int, measurement: dict[str, Any]) -> Callable[[], Reply]:
        """The same without waiting: send the report, and return what waits for its answer. One may be under way."""
        ...

    def checkpointed(self, trial_id: str, attempt: int, dual_step: int, path: str) -> None:
        """A complete checkpoint exists at `path`."""
        ...

    def note(self, trial_id: str, attempt: int, text: str) -> None:
        """Something a user should know of this attempt, such as a damaged checkpoint that was passed over."""
        ...

    def trace(self, trial_id: str) -> list[dict[str, Any]]:
        """Every row so far, in dual-step order."""
        ...
