"""Where a sweep's files live: a local folder, or a local working folder in front of a remote file system.

All other code works on local paths. With a remote address (`s3://bucket/prefix`, anything pyarrow's `FileSystem.from_uri`
takes) each node has a working folder of the same layout; what is finished there is pushed, what is missing is fetched. The
remote copy is the truth: a folder counts once its manifest is there, which is written last, and a local file that was never
pushed counts for nothing. Without an address every method here does nothing, or looks at the folder itself.
"""

import errno
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TypeVar
from urllib.parse import parse_qsl, urlencode, urlsplit

from pyarrow import ArrowException, ArrowInvalid
from pyarrow import fs as pafs
from safetensors import SafetensorError

MANIFEST = ".manifest.json"  # beside the folder it speaks for
PATIENCE_VARIABLE = "DUALSWEEP_STORAGE_PATIENCE_S"
PATIENCE_S = 90.0
LONGEST_PAUSE_S = 10.0
# One request for a small S3 object instead of the three of a multipart upload; Google's client would retry for ever.
DEFAULT_OPTIONS = {
    "s3": {"allow_delayed_open": "true"},
    "gs": {"retry_limit_seconds": "10"},
    "gcs": {"retry_limit_seconds": "10"},
}
NO_SUCH_CALL = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)  # what a file system cannot do
# Trouble of this machine's own disk, which waiting does not mend.
LOCAL_TROUBLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG)

T = TypeVar("T")


class StorageError(OSError):
    """Storage cannot be read or written; the message names the address, what happened and the remedy."""


class DamagedError(StorageError):
    """What was fetched is not what was pushed."""


def patience_s() -> float:
    """Seconds that a remote address may stay silent before whoever needs it fails."""
    return float(os.environ.get(PATIENCE_VARIABLE) or PATIENCE_S)


def local_trouble(path: Path, error: Exception) -> StorageError:
    """The error for a local file or folder that could not be written."""
    reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error)
    return StorageError(
        f"storage: {path} could not be written ({reason}); make room or give write permission there, then `dualsweep "
        "resume NAME` goes on"
    )


def disk_trouble(error: BaseException | None) -> OSError | None:
    """What this machine's disk refused, somewhere among an error's causes."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in LOCAL_TROUBLE:
            return error
        error = error.__cause__ or error.__context__
    return None


@contextmanager
def writing_to(path: Path, part: Path | None = None) -> Iterator[None]:
    """Turns trouble with the disk into a StorageError that names `path`; a half-written `part` is removed, for the room."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if part is not None:
            with suppress(OSError):  # a read-only disk lets nothing go; the first error counts
                shutil.rmtree(part) if part.is_dir() else part.unlink(missing_ok=True)
        if isinstance(error, StorageError):
            raise
        raise local_trouble(path, error) from error


@contextmanager
def in_place_of(path: Path) -> Iterator[Path]:
    """A place beside `path` for a file or a folder, which is moved there when the block is left; the disk has it then.

    So `path` is whole, or what it was before, also after a power cut; a folder that it replaces may be absent for a moment.
    Raises: StorageError when it cannot be written. Nothing is left beside `path` after an exception.
    """
    part = path.with_name(f"{path.name}.part{os.getpid()}")
    try:
        with writing_to(path):
            _discard(part)
            path.parent.mkdir(parents=True, exist_ok=True)
            yield part
            sync(part)
            if path.is_dir():
                shutil.rmtree(path)  # a folder takes the place of none but an empty one
            os.replace(part, path)
            sync_folder(path.parent)
    except BaseException:  # an interrupt, too, must leave nothing beside `path`
        with suppress(OSError):  # a read-only disk lets nothing go; the first error counts
            _discard(part)
        raise


def sync(path: Path) -> None:
    """Wait until the disk has a file, or a folder with all that is in it."""
    if path.is_dir():
        for inner in path.iterdir():
            sync(inner)
        sync_folder(path)
    else:
        with open(path, "rb") as written:
            os.fsync(written.fileno())


def sync_folder(folder: Path) -> None:
    """Wait until the disk has a folder's names, where its file system knows how to (a mounted bucket may not)."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in NO_SUCH_CALL:
            raise
    finally:
        os.close(handle)


def _discard(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


@dataclass(frozen=True)
class Store:
    """See the module. `root`: the local folder that holds sweeps; `uri`: its remote twin, None when `root` is the storage."""

    root: Path
    uri: str | None = None
    wait_s: float | None = None  # patience of this handle; None: `patience_s`

    def address(self, path: Path) -> str:
        """What a user may be shown, and what stays the same on every machine: no query, no working folder."""
        if self.uri is None:
            return str(path)
        parts = urlsplit(self.uri)
        below = path.relative_to(self.root).as_posix()
        return f"{parts.scheme}://{parts.netloc}{parts.path}".rstrip("/") + ("" if below == "." else f"/{below}")

    # -- single files --------------------------------------------------------------------------------------------

    def exists(self, path: Path) -> bool:
        if self.uri is None:
            return path.exists()
        found = self._patiently(path, lambda remote, key: remote.get_file_info(key).type)
        return found is pafs.FileType.File

    def read(self, path: Path) -> bytes | None:
        """The remote content of a file; None when there is none."""

        def read(remote: pafs.FileSystem, key: str) -> bytes:
            with remote.open_input_stream(key) as stream:
                return stream.read()

        try:
            return self._patiently(path, read)
        except FileNotFoundError:
            return None

    def write(self, path: Path, content: bytes) -> None:
        """Put a remote file, whole or not at all; it is durable on return."""

        def write(remote: pafs.FileSystem, key: str) -> None:
            with remote.open_output_stream(key) as stream:
                stream.write(content)

        self._patiently(path, write)

    def remove(self, path: Path) -> None:
        """Remove a remote file or folder, and its manifest before it."""
        if self.uri is not None:
            self.remove_file(path.with_name(path.name + MANIFEST))
            self.remove_file(path)
            self._patiently(path, _delete_folder)

    def remove_file(self, path: Path) -> None:
        """Remove a remote file, if it is there."""

        def delete(remote: pafs.FileSystem, key: str) -> None:
            if remote.get_file_info(key).type is pafs.FileType.File:
                remote.delete_file(key)

        self._patiently(path, delete)

    # -- folders -------------------------------------------------------------------------------------------------

    def push(self, path: Path) -> None:
        """Upload a file, or a folder with its manifest last, so that it is complete or absent for everyone else.

        Raises: StorageError when the address stays silent for longer than `patience_s`.
        """
        if self.uri is None:
            return
        if path.is_file():
            self._patiently(path, lambda remote, key: pafs.copy_files(str(path), key, _LOCAL, remote))
            return
        marker = path.with_name(path.name + MANIFEST)
        manifest = _manifest(path)
        if self.read(marker) != manifest:
            self.remove(path)
            self._patiently(path, lambda remote, key: pafs.copy_files(str(path), key, _LOCAL, remote))
            self.write(marker, manifest)
        _replace(marker, manifest)

    def fetch(self, path: Path) -> bool:
        """Bring a folder that was pushed, unless it is here already.

        Returns: whether there is a whole one. Raises: DamagedError when its files are not those of its manifest.
        """
        if self.uri is None:
            return path.is_dir()
        marker = path.with_name(path.name + MANIFEST)
        manifest = self.read(marker)
        if manifest is None:
            return False
        with self._alone():  # several workers of a node want the same folder
            if path.is_dir() and marker.is_file() and marker.read_bytes() == manifest:
                return True
            with in_place_of(path) as part:
                part.mkdir()
                try:
                    self._patiently(path, lambda remote, key: pafs.copy_files(key, str(part), remote, _LOCAL))
                except FileNotFoundError:
                    raise DamagedError(f"storage: {self.address(path)} lost its files; remove its manifest") from None
                found = _manifest(part)
                if found != manifest:
                    raise DamagedError(
                        f"storage: {self.address(path)} is damaged ({_difference(manifest, found)}); remove it, or "
                        "restore its files"
                    )
            _replace(marker, manifest)
        return True

    def fetch_files(self, folder: Path, *, skip: tuple[str, ...] = ()) -> None:
        """Bring the single files of a remote folder (not of those below it)."""
        if self.uri is not None:
            for info in self._listing(folder):
                name = info.base_name
                if info.type is pafs.FileType.File and not name.endswith(MANIFEST) and name not in skip:
                    content = self.read(folder / name)
                    if content is not None:
                        _replace(folder / name, content)

    def folders(self, folder: Path) -> list[str]:
        """Names of the folders below a remote folder, whole or not, in order."""
        return sorted(info.base_name for info in self._listing(folder) if info.type is pafs.FileType.Directory)

    def files(self, folder: Path) -> list[str]:
        """Names of the files of a remote folder, manifests too, in order."""
        return sorted(info.base_name for info in self._listing(folder) if info.type is pafs.FileType.File)

    def _listing(self, folder: Path) -> list[pafs.FileInfo]:
        return self._patiently(
            folder, lambda remote, key: remote.get_file_info(pafs.FileSelector(key, allow_not_found=True))
        )

    # -- the connection ------------------------------------------------------------------------------------------

    def _patiently(self, path: Path, call: Callable[[pafs.FileSystem, str], T]) -> T:
        """Try again with growing pauses while the address does not answer.

        Raises: FileNotFoundError at once; StorageError naming the address when the time is over.
        """
        patience = patience_s() if self.wait_s is None else self.wait_s
        began, pause = time.monotonic(), 0.2
        while True:
            try:
                remote, base = _connect(self.uri)
                return call(remote, f"{base}/{path.relative_to(self.root).as_posix()}")
            except (FileNotFoundError, ArrowInvalid):  # not there; not an address
                raise
            except (OSError, ArrowException) as error:
                if isinstance(error, OSError) and error.errno in LOCAL_TROUBLE:
                    raise local_trouble(path, error) from error
                waited = time.monotonic() - began
                if waited + pause > patience:
                    reason = " ".join(str(error).split())[:300]
                    raise StorageError(
                        f"storage: {self.address(path)} could not be reached for {waited:.0f} s ({reason}); look at the "
                        "address, the credentials and the network"
                    ) from error
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE_S)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        self.root.mkdir(parents=True, exist_ok=True)
        with open(self.root / ".fetch.lock", "w", encoding="utf-8") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


_LOCAL = pafs.LocalFileSystem()


@lru_cache
def _connect(uri: str) -> tuple[pafs.FileSystem, str]:
    """The file system of an address, and the path in it."""
    parts = urlsplit(uri)
    query = {**DEFAULT_OPTIONS.get(parts.scheme, {}), **dict(parse_qsl(parts.query))}
    parts = parts._replace(query=urlencode(query))
    remote, path = pafs.FileSystem.from_uri(parts.geturl())
    return remote, path.rstrip("/")


def _delete_folder(remote: pafs.FileSystem, key: str) -> None:
    if remote.get_file_info(key).type is pafs.FileType.Directory:
        remote.delete_dir(key)


def _manifest(folder: Path) -> bytes:
    """Sizes and checksums of all files of a folder."""
    files = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        with open(path, "rb") as source:
            digest = hashlib.file_digest(source, "sha256").hexdigest()
        files[path.relative_to(folder).as_posix()] = {"size": path.stat().st_size, "sha256": digest}
    return json.dumps({"files": files}, sort_keys=True).encode()


def _difference(wanted: bytes, found: bytes) -> str:
    wanted_files, found_files = json.loads(wanted)["files"], json.loads(found)["files"]
    for name, entry in wanted_files.items():
        other = found_files.get(name)
        if other is None:
            return f"{name} is missing"
        if other["size"] != entry["size"]:
            return f"{name} has {other['size']} bytes instead of {entry['size']}"
        if other != entry:
            return f"{name} has another checksum"
    return "it holds files that its manifest does not know"


def _replace(path: Path, content: bytes) -> None:
    with in_place_of(path) as part:
        part.write_bytes(content)
