"""A queue that delivers in the background and in order, and keeps what cannot be delivered.

It knows threads and failures, not MLflow: an item brings its own delivery.
"""

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

LINGER_SECONDS = 1.0  # rows wait this long for company: a metric in a full batch costs 1/30 of a single one
ATTEMPTS = 5  # tries against a server that answers, until others go first; one that does not answer is waited for
LONGEST_PAUSE = 30.0  # seconds between two tries
PATIENCE = 15.0  # seconds a flush goes on while every try fails


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
    """One delivery: what of which trial (None: the sweep), how, and how often it was tried; `rows` may grow while queued.

    The rows are the caller's own and he keeps them anyway, so a queue of any length costs hardly any memory.
    """

    what: str
    trial_id: str | None
    deliver: Callable[[], None] = lambda: None
    rows: list[dict[str, Any]] = field(default_factory=list)
    born: float = field(default_factory=time.monotonic)
    not_before: float = 0.0  # on the monotonic clock: an item that was set aside lets the others go first until then
    attempts: int = 0  # tries that a server answered
    failures: int = 0  # all of them
    error: str = ""

    def undelivered(self) -> Undelivered:
        count = len(self.rows) if self.what == "rows" else 1
        return Undelivered(what=self.what, trial_id=self.trial_id, count=count, error=self.error)


class Outbox:
    """Delivers items in order from one daemon thread; `answers()` says whether the other side is there at all.

    An item leaves the queue when it is delivered, or when no try could ever succeed. A server that is away holds up
    the queue; an item that a working server refuses `ATTEMPTS` times is set aside and tried again after the others.
    """

    def __init__(self, answers: Callable[[], bool]) -> None:
        self._answers = answers
        self._changed = threading.Condition()  # guards what follows
        self._queue: deque[Item] = deque()
        self._lost: list[Undelivered] = []
        self._gaps: dict[str | None, str] = {}  # trials of which rows were lost -> why: curves only grow at their end
        self._collecting: dict[str | None, Item] = {}  # queued rows that later rows of the trial may join
        self._flushing, self._closing = 0, False
        self._failing = False  # nothing was delivered since the last failure
        self._thread: threading.Thread | None = None
        self._hurry = threading.Event()  # ends a pause between two tries

    def put(self, item: Item) -> None:
        """Queue an item; rows join the queued rows of their trial unless another item of the trial lies between."""
        with self._changed:
            waiting = self._collecting.get(item.trial_id) if item.what == "rows" else None
            if self._closing:
                item.error = "the tracker is closed"
            elif item.what == "rows" and item.trial_id in self._gaps:
                item.error = self._gaps[item.trial_id]
            if item.error:
                self._lose(item)
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

    def flush(self, timeout: float) -> int:
        """Wait for the queue to empty, at most `timeout` seconds, or `PATIENCE` while nothing gets through.

        Returns: the items left, each row counting one.
        """
        begin = time.monotonic()
        self._hurry.set()
        with self._changed:
            self._flushing += 1
            for item in self._queue:
                item.not_before = 0.0
            self._changed.notify_all()
            while self._queue:
                waited = time.monotonic() - begin
                if waited >= timeout or (self._failing and waited >= PATIENCE):
                    break
                self._changed.wait(min(timeout - waited, 1.0))
            self._flushing -= 1
        return sum(item.count for item in self.undelivered())

    def close(self, timeout: float) -> int:
        deadline = time.monotonic() + timeout
        left = self.flush(timeout)
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._hurry.set()
        if self._thread is not None:
            # With items left it hangs in a request that nobody waits for any more.
            self._thread.join(0.5 if left else max(deadline - time.monotonic(), 0.5))
        return sum(item.count for item in self.undelivered())

    def _next(self) -> Item | None:
        with self._changed:
            while not self._closing:
                now = time.monotonic()
                item = next((item for item in self._queue if item.not_before <= now), None)
                if item is not None:
                    linger = item.born + LINGER_SECONDS - now
                    if item.what != "rows" or self._flushing or linger <= 0:
                        if self._collecting.get(item.trial_id) is item:
                            del self._collecting[item.trial_id]
                        return item
                    self._changed.wait(linger)
                elif self._queue:
                    self._changed.wait(min(item.not_before for item in self._queue) - now)
                else:
                    self._changed.wait()
            return None

    def _work(self) -> None:
        while (item := self._next()) is not None:
            try:
                item.deliver()
            except Exception as error:  # noqa: BLE001 - nothing may reach the sweep; it is recorded in the item
                item.error = f"{type(error).__name__}: {error}".strip().split("\n")[0][:300]
                item.failures += 1
                self._failing = True
                if _is_final(error):
                    self._remove(item, lost=True)
                    continue
                item.attempts += int(self._answers())
                if item.attempts >= ATTEMPTS:
                    self._set_aside(item)
                    continue
                # While someone waits for a flush, a server that is back must be noticed soon.
                self._hurry.wait(min(0.25 * 2 ** min(item.failures, 10), self._pause()))
                self._hurry.clear()
            else:
                self._failing = False
                self._remove(item, lost=False)

    def _pause(self) -> float:
        return 1.0 if self._flushing else LONGEST_PAUSE

    def _remove(self, item: Item, *, lost: bool) -> None:
        with self._changed:
            self._queue.remove(item)
            if lost:
                self._lose(item)
            self._changed.notify_all()

    def _lose(self, item: Item) -> None:
        """Give an item up. After lost rows the later ones of their trial are not sent either: `dualsweep sync` goes on
        behind the newest step of a curve, so it can deliver all of them but could not fill a gap."""
        lost = item.undelivered()
        if item.what == "rows":
            self._gaps[item.trial_id] = item.error
            self._collecting.pop(item.trial_id, None)
            waiting = [one for one in self._queue if (one.what, one.trial_id) == ("rows", item.trial_id)]
            before = [one for one in self._lost if (one.what, one.trial_id) == ("rows", item.trial_id)]
            for one in waiting:
                self._queue.remove(one)
            for one in before:
                self._lost.remove(one)
            count = len(item.rows) + sum(len(one.rows) for one in waiting) + sum(one.count for one in before)
            lost = replace(lost, count=count)
        self._lost.append(lost)

    def _set_aside(self, item: Item) -> None:
        """To the end of the queue. A trial's rows stay in their order: later ones join these."""
        with self._changed:
            self._queue.remove(item)
            item.attempts, item.not_before = 0, time.monotonic() + self._pause()
            if item.what == "rows":
                later = [other for other in self._queue if (other.what, other.trial_id) == ("rows", item.trial_id)]
                for other in later:
                    item.rows.extend(other.rows)
                    self._queue.remove(other)
                self._collecting[item.trial_id] = item
            self._queue.append(item)
            self._changed.notify_all()


def _is_final(error: Exception) -> bool:
    """Whether the same request would fail again: our own refusals, absent files, values MLflow does not accept."""
    if isinstance(error, (GiveUp, FileNotFoundError, ValueError, TypeError, KeyError)):
        return True
    return getattr(error, "error_code", None) == "INVALID_PARAMETER_VALUE"
