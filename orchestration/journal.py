"""Append-only journal: JSON records with a checksum, durable before anyone is told, replayed after a crash.

A record is one line, ``crc32 json``. A torn last line (the process died while writing it) is dropped; a damaged line with
others behind it is an error that names file and offset, because what follows it may depend on it.

An object store cannot append, so there every group of records is an object of its own, `journal/<epoch>-<writer>/<number>`.
Opening begins a new epoch whose object 0 holds all records so far. A replay reads the newest epoch alone: what a superseded
writer (an actor thought dead on a node that lost its network) still writes counts for nothing.
"""

import contextlib
import fcntl
import io
import json
import os
import time
import uuid
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from dualsweep.trainers.store import Store, local_trouble, sync_folder

EPOCH_OBJECTS = 1000


PREDECESSOR_S = 60.0  # the actors of a driver that was killed live, train and write for some seconds more


class JournalError(ValueError):
    """A journal is damaged in the middle, or another process goes on writing it."""


class Journal:
    """One open journal file. Opening it replays and, if needed, cuts a torn tail off.

    It has one writer at a time: the file is locked before it is read, so that nothing a writer before us still
    answered is missed. Raises: JournalError when that one does not end within `PREDECESSOR_S`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115  (lives as long as the journal)
        _lock(self._file, path)
        self.records, whole = _read(path)
        if self._file.tell() > whole:
            self._file.truncate(whole)
            self._file.seek(whole)
            os.fsync(self._file.fileno())
        sync_folder(path.parent)
        self._durable = whole  # where the last append that succeeded ended
        self._torn = False  # what a failed one wrote behind it could not be cut off yet

    def append(self, records: Iterable[dict[str, Any] | bytes]) -> None:
        """Write records (plain or encoded) and wait until the disk has them: one write and one fsync for all."""
        lines = (record if isinstance(record, bytes) else encode_record(record) for record in records)
        left = memoryview(b"".join(lines))
        try:
            self._cut()
            self._durable, self._torn = os.fstat(self._file.fileno()).st_size, True
            while left:  # a raw write may do only a part, without an error
                left = left[self._file.write(left) :]
            os.fsync(self._file.fileno())
        except OSError as error:
            with contextlib.suppress(OSError):  # then the next append tries it again
                self._cut()
            raise local_trouble(self.path, error) from error
        self._torn = False

    def _cut(self) -> None:
        """Remove what a failed append left: a torn record with others behind it would make the journal unreadable."""
        if self._torn:
            self._file.truncate(self._durable)
            self._torn = False

    def close(self) -> None:
        self._file.close()


class RemoteJournal:
    """A journal on a remote store. Opening it replays, and begins an epoch; `append` returns once the store has the records.

    A superseded writer is not told at once, which would cost a request a record; at the latest when its epoch is full.
    """

    def __init__(self, store: Store, folder: Path) -> None:
        self._store, self._folder, self._writer = store, folder / "journal", uuid.uuid4().hex[:8]
        content = read_remote_journal(store, folder)
        self.records, whole = _parse(content, store.address(self._folder))
        self._history = [content[:whole]]
        self._begin_epoch()

    def append(self, records: Iterable[dict[str, Any] | bytes]) -> None:
        """Write records (plain or encoded) as one object. Raises: StorageError; the same number is written again then."""
        content = b"".join(record if isinstance(record, bytes) else encode_record(record) for record in records)
        if self._number >= EPOCH_OBJECTS:
            newest = self._store.folders(self._folder)[-1:]
            # Ours also after an outage in the middle of a change: it may have arrived, or have left a folder.
            if not newest or not newest[0].endswith(f"-{self._writer}"):
                raise JournalError(
                    f"{self._store.address(self._folder)}: another DualServer goes on writing it ({newest})"
                )
            self._begin_epoch()
        self._store.write(self._epoch / _object_name(self._number), content)
        self._history.append(content)
        self._number += 1

    def _begin_epoch(self) -> None:
        """A replay reads at most `EPOCH_OBJECTS` objects; the epochs before are removed."""
        before = self._store.folders(self._folder)
        newest = int(before[-1].partition("-")[0]) if before else 0
        epoch = self._folder / f"{newest + 1:06d}-{self._writer}"
        self._history = [b"".join(self._history)]
        self._store.write(epoch / _object_name(0), self._history[0])
        self._epoch, self._number = epoch, 1
        for name in before:
            self._store.remove(self._folder / name)

    def close(self) -> None:
        return None


def read_remote_journal(store: Store, folder: Path) -> bytes:
    """The newest epoch's records as a journal file holds them; nobody needs to be kept from writing.

    Raises: JournalError naming a missing object; StorageError.
    """
    place = folder / "journal"
    for last_try in (False, False, True):
        try:
            # An epoch without its object 0 was never begun.
            for epoch in reversed(store.folders(place)):
                numbers = store.files(place / epoch)
                if numbers and numbers[0] == _object_name(0):
                    return _joined(store, place / epoch, numbers)
        except _Vanished as error:  # another epoch began while this one was read
            if last_try:
                raise JournalError(f"{store.address(place)}: {error}; restore it, or remove the sweep") from None
        else:
            return b""
    return b""


class _Vanished(Exception):
    """An object of an epoch is not there."""


def _joined(store: Store, epoch: Path, names: list[str]) -> bytes:
    wanted = [_object_name(number) for number in range(len(names))]
    if names != wanted:
        raise _Vanished(f"object {next(name for name in wanted if name not in names)} of {epoch.name} is missing")
    with ThreadPoolExecutor(16) as pool:
        contents = list(pool.map(lambda name: store.read(epoch / name), names))
    for name, content in zip(names, contents, strict=True):
        if content is None:
            raise _Vanished(f"object {name} of {epoch.name} is missing")
    return b"".join(contents)


def _object_name(number: int) -> str:
    return f"{number:09d}"


def read_journal(path: Path) -> list[dict[str, Any]]:
    """The whole records of a journal that nobody may be writing; an absent file has none.

    Raises: JournalError naming file and byte offset of a damaged record.
    """
    return _read(path)[0]


def encode_record(record: dict[str, Any]) -> bytes:
    """The journal's line of a record. Raises: ValueError for NaN or infinity, which JSON cannot hold."""
    body = json.dumps(record, separators=(",", ":"), allow_nan=False).encode()
    return b"%08x %s\n" % (zlib.crc32(body), body)


def _read(path: Path) -> tuple[list[dict[str, Any]], int]:
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return [], 0
    return _parse(content, str(path))


def _parse(content: bytes, source: str) -> tuple[list[dict[str, Any]], int]:
    """The whole records, and where they end. Raises: JournalError."""
    records, offset = [], 0
    for line, end in _lines(content):
        body = line[9:].rstrip(b"\n")
        if not line.endswith(b"\n"):
            break  # torn: a write that was cut short never got as far as the line's end
        if line[:9] != b"%08x " % zlib.crc32(body):
            raise JournalError(
                f"{source}: record at byte {offset} is corrupted; restore the file from a copy, or remove the sweep and "
                "run it again"
            )
        records.append(json.loads(body))
        offset = end
    return records, offset


def _lines(content: bytes) -> Iterator[tuple[bytes, int]]:
    end = 0
    for line in io.BytesIO(content):  # unlike splitlines, ends lines at \n alone
        end += len(line)
        yield line, end


def _lock(file: Any, path: Path) -> None:
    """Wait for the only right to write; the kernel takes it back when the process ends, however it ends."""
    deadline = time.monotonic() + PREDECESSOR_S
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                file.close()
                raise JournalError(
                    f"{path}: another process has been writing it for {PREDECESSOR_S:g} s; end what runs this sweep"
                ) from None
        except OSError:  # a mounted bucket knows no locks; the attempt numbers are left as the fence
            return
        else:
            return
        time.sleep(0.05)
