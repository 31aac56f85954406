"""Group commit: records that arrive while others are being made durable share the next sync."""

import asyncio
import contextlib
import time
from collections.abc import Sequence

from dualsweep.orchestration.journal import Journal, RemoteJournal
from dualsweep.trainers.store import StorageError

QUICK_S = (
    0.01  # a sync up to this long is waited for in the event loop: handing it to a thread costs more than it frees
)


class GroupCommit:
    """Encoded records on their way into a journal; belongs to one event loop.

    A failed write keeps its records for the next try; everyone who waited for it gets the error instead of an answer: a
    remote store was given its time by then.
    """

    def __init__(self, journal: Journal | RemoteJournal) -> None:
        self.journal = journal
        self._pending: list[bytes] = []
        self._accepted = self._durable = 0  # records taken, records on disk
        self._waiters: list[tuple[int, asyncio.Future[None]]] = []
        self._writer: asyncio.Task[None] | None = None
        self._last_s = 0.0 if isinstance(journal, Journal) else float("inf")  # a remote store is never quick

    def add(self, lines: Sequence[bytes]) -> asyncio.Future[None] | None:
        """Take records. Returns: what is done once they, and all before them, are durable; None if they are already."""
        self._pending += lines
        self._accepted += len(lines)
        if self._durable == self._accepted:
            return None
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters.append((self._accepted, waiter))
        if self._writer is None:
            self._writer = asyncio.create_task(self._write())
        return waiter

    async def _write(self) -> None:
        """Write until nobody waits any more."""
        loop = asyncio.get_running_loop()
        try:
            while self._waiters:
                await asyncio.sleep(0)  # calls that have arrived by now join this sync
                batch, started = list(self._pending), time.perf_counter()
                error: Exception | None = None
                try:
                    if self._last_s < QUICK_S:
                        self.journal.append(batch)
                    else:
                        await loop.run_in_executor(None, self.journal.append, batch)
                except Exception as failed:  # noqa: BLE001 - whoever waits is told; nobody else would be
                    error = failed
                else:
                    del self._pending[: len(batch)]
                    self._durable += len(batch)
                if isinstance(self.journal, Journal):
                    self._last_s = time.perf_counter() - started
                self._tell(error)
        finally:
            self._writer = None

    def _tell(self, error: Exception | None) -> None:
        told = [waiter for target, waiter in self._waiters if error or target <= self._durable]
        self._waiters = [] if error else [one for one in self._waiters if one[0] > self._durable]
        for waiter in told:
            if waiter.done():  # its caller has gone
                continue
            if error is None:
                waiter.set_result(None)
            else:
                waiter.set_exception(error)

    async def close(self) -> None:
        """Everything answered is durable already; what a failed write left is tried once more."""
        if waiter := self.add([]):
            with contextlib.suppress(StorageError):  # nobody was told of these records
                await waiter
        self.journal.close()
