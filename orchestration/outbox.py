"""A queue that delivers in the background and in order, and keeps what cannot be delivered.

It knows threads and failures, not MLflow: an item brings its own delivery.
"""

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

LINGER_SECONDS = 1.0  # rows wait this long for company: a metric in a full batch costs 1/30 of a single one
ATTEMPTS = 5  # tries of one item against a server that answers; a server that does not answer is waited for
LONGEST_PAUSE = 30.0  # seconds between two tries
MAX_BUFFERED_ROWS = 200_000  # more are left to the trace file, which delivers them when the trial ends


class GiveUp(Exception):
    """Trying this item again cannot help."""


@dataclass(frozen=True, kw_only=True)
class Undelivered:
    """Something MLflow has not got: `count` rows, or one of a trial's other items, or the sweep's (`trial_id` None)."""

    what: str
    trial_id: str | None
    count: int
    error: str

    def __str__(self) -> str:
        owner = "the sweep" if self.trial_id is None else f"trial {self.trial_id}"
        return f"{self.count} x {self.what} of {owner} ({self.error or 'not tried yet'})"


@dataclass(kw_only=True, eq=False)
class Item:
    """One delivery: what of which trial (None: the sweep), how, and how often it was tried; `rows` may grow while queued."""

    what: str
    trial_id: str | None
    deliver: Callable[[], None] = lambda: None
    rows: list[dict[str, Any]] = field(default_factory=list)
    born: float = field(default_factory=time.monotonic)
    attempts: int = 0  # tries that a server answered
    failures: int = 0  # all of them
    error: str = ""

    def undelivered(self) -> Undelivered:
        count = len(self.rows) if self.what == "rows" else 1
        return Undelivered(what=self.what, trial_id=self.trial_id, count=count, error=self.error)


class Outbox:
    """Delivers items in order from one daemon thread; `answers()` says whether the other side is there at all."""

    def __init__(self, answers: Callable[[], bool]) -> None:
        self._answers = answers
        self._changed = threading.Condition()  # guards what follows
        self._queue: deque[Item] = deque()
        self._lost: list[Undelivered] = []
        self._collecting: dict[str | None, Item] = {}  # queued rows that later rows of the trial may join
        self._flushing, self._closing = 0, False
        self._thread: threading.Thread | None = None
        self._hurry = threading.Event()  # ends a pause between two tries

    def put(self, item: Item) -> None:
        """Queue an item; rows join the queued rows of their trial unless another item of the trial lies between."""
        with self._changed:
            waiting = self._collecting.get(item.trial_id) if item.what == "rows" else None
            if self._closing:
                item.error = "the tracker is closed"
            elif item.what == "rows" and sum(len(other.rows) for other in self._queue) > MAX_BUFFERED_ROWS:
                item.error = "the buffer is full; trace.parquet still holds them"
            if item.error:
                self._lost.append(item.undelivered())
            elif waiting is not None:
                waiting.rows.extend(item.rows)
            else:
                self._queue.append(item)
                self._collecting.pop(item.trial_id, None)
                if item.what == "rows":
                    self._collecting[item.trial_id] = item
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="dualsweep-tracker", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def undelivered(self) -> list[Undelivered]:
        with self._changed:
            return [*self._lost, *(item.undelivered() for item in self._queue)]

    def take_lost_rows(self, trial_id: str) -> list[Undelivered]:
        """The rows of a trial that were given up, no longer counted as lost."""
        with self._changed:
            taken = [lost for lost in self._lost if (lost.what, lost.trial_id) == ("rows", trial_id)]
            self._lost = [lost for lost in self._lost if lost not in taken]
            return taken

    def give_back(self, lost: list[Undelivered]) -> None:
        with self._changed:
            self._lost.extend(lost)

    def flush(self, timeout: float) -> int:
        self._hurry.set()
        with self._changed:
            self._flushing += 1
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._queue, timeout)
            self._flushing -= 1
        return sum(item.count for item in self.undelivered())

    def close(self, timeout: float) -> int:
        deadline = time.monotonic() + timeout
        self.flush(timeout)
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._hurry.set()
        if self._thread is not None:
            self._thread.join(max(deadline - time.monotonic(), 0.5))
        return sum(item.count for item in self.undelivered())

    def _next(self) -> Item | None:
        with self._changed:
            while not self._closing:
                if self._queue:
                    item = self._queue[0]
                    linger = item.born + LINGER_SECONDS - time.monotonic()
                    if item.what != "rows" or self._flushing or linger <= 0:
                        if self._collecting.get(item.trial_id) is item:
                            del self._collecting[item.trial_id]
                        return item
                    self._changed.wait(linger)
                else:
                    self._changed.wait()
            return None

    def _work(self) -> None:
        while (item := self._next()) is not None:
            try:
                item.deliver()
            except Exception as error:  # noqa: BLE001 - nothing may reach the sweep; it is recorded in the item
                item.error = f"{type(error).__name__}: {error}".strip().split("\n")[0][:300]
                item.attempts += ATTEMPTS if _is_final(error) else int(self._answers())
                item.failures += 1
                if item.attempts < ATTEMPTS:
                    # While someone waits for a flush, a server that is back must be noticed soon.
                    pause = min(0.25 * 2 ** min(item.failures, 10), 1.0 if self._flushing else LONGEST_PAUSE)
                    self._hurry.wait(pause)
                    self._hurry.clear()
                    continue
            with self._changed:
                self._queue.popleft()
                if item.attempts >= ATTEMPTS:
                    self._lost.append(item.undelivered())
                self._changed.notify_all()


def _is_final(error: Exception) -> bool:
    """Whether the same request would fail again: our own refusals, absent files, values MLflow does not accept."""
    if isinstance(error, (GiveUp, FileNotFoundError, ValueError, TypeError, KeyError)):
        return True
    return getattr(error, "error_code", None) == "INVALID_PARAMETER_VALUE"
