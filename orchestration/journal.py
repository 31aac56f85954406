"""Append-only journal: JSON records with a checksum, durable before anyone is told, replayed after a crash.

A record is one line, ``crc32 json``. A torn last line (the process died while writing it) is dropped; a damaged line with
others behind it is an error that names file and offset, because what follows it may depend on it.
"""

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

    def append(self, records: Iterable[dict[str, Any]]) -> None:
        """Write records and wait until the disk has them: one write and one fsync, however many there are."""
        lines = b"".join(_line(record) for record in records)
        self._file.write(lines)
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def read_journal(path: Path) -> list[dict[str, Any]]:
    """The whole records of a journal that nobody may be writing; an absent file has none.

    Raises: JournalError naming file and byte offset of a damaged record that is not the last.
    """
    return _read(path)[0]


def _line(record: dict[str, Any]) -> bytes:
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
        if not line.endswith(b"\n") or line[:8] != b"%08x" % zlib.crc32(body):
            if end < len(content):
                raise JournalError(
                    f"{path}: record at byte {offset} is corrupted; restore the file from a copy, or remove the sweep and run it again"
                )
            break
        records.append(json.loads(body))
        offset = end
    return records, offset


def _lines(content: bytes) -> Iterator[tuple[bytes, int]]:
    end = 0
    for line in content.splitlines(keepends=True):
        end += len(line)
        yield line, end


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
