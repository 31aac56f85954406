"""Append-only journal: JSON records with a checksum, durable before anyone is told, replayed after a crash.

A record is one line, ``crc32 json``. A torn last line (the process died while writing it) is dropped; a damaged line with
others behind it is an error that names file and offset, because what follows it may depend on it.
"""

import io
import json
import os
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any


class JournalError(ValueError):
    """A journal is damaged in the middle."""


class Journal:
    """One open journal file. Opening it replays and, if needed, cuts a torn tail off."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self.records, whole = _read(path)
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115  (lives as long as the journal)
        if self._file.tell() > whole:
            self._file.truncate(whole)
            self._file.seek(whole)
            os.fsync(self._file.fileno())
        _sync_folder(path.parent)

    def append(self, records: Iterable[dict[str, Any] | bytes]) -> None:
        """Write records (plain or encoded) and wait until the disk has them: one write and one fsync for all."""
        lines = (record if isinstance(record, bytes) else encode_record(record) for record in records)
        left = memoryview(b"".join(lines))
        start = os.fstat(self._file.fileno()).st_size
        try:
            while left:  # a raw write may do only a part, without an error
                left = left[self._file.write(left) :]
            os.fsync(self._file.fileno())
        except OSError:
            self._file.truncate(start)  # a torn record with others behind it would make the journal unreadable
            raise

    def close(self) -> None:
        self._file.close()


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
    records, offset = [], 0
    for line, end in _lines(content):
        body = line[9:].rstrip(b"\n")
        if not line.endswith(b"\n"):
            break  # torn: a write that was cut short never got as far as the line's end
        if line[:9] != b"%08x " % zlib.crc32(body):
            raise JournalError(
                f"{path}: record at byte {offset} is corrupted; restore the file from a copy, or remove the sweep and "
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


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
