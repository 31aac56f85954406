"""Where sweeps live: a local or shared folder, or a remote address with a working folder on every node."""

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import socket
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from urllib.parse import unquote, urlsplit

from dualsweep.orchestration.config import ConfigError
from dualsweep.orchestration.journal import read_remote_journal
from dualsweep.trainers.store import MANIFEST, StorageError, Store, in_place_of

CACHE_VARIABLE = "DUALSWEEP_CACHE"
CHECK_WAIT_S = 5.0  # a first try's own time-outs come on top
DRIVER_FILE = "driver.json"
BEAT_S = 10.0
LIFE_S = 60.0  # a driver that gave no sign for so long is dead


def open_store(storage: str) -> Store:
    """The store of a config's `storage`: a folder, or a URI of any file system that pyarrow knows.

    Nothing is contacted or made. Raises: ConfigError for an address that cannot be one.
    """
    parts = urlsplit(storage)
    if not parts.scheme:
        return Store(Path(storage).expanduser().absolute())
    if parts.scheme == "file":
        return Store(Path(unquote(parts.path)).absolute())
    if "@" in parts.netloc and not parts.netloc.startswith("anonymous@"):
        raise ConfigError(
            f"storage: {parts.scheme}://…@{parts.netloc.rpartition('@')[2]} holds credentials, which would end up in files and "
            "in MLflow; give them in the environment (AWS_ACCESS_KEY_ID, GOOGLE_APPLICATION_CREDENTIALS, ...)"
        )
    address = f"{parts.scheme}://{parts.netloc}{parts.path}".rstrip("/")
    # One folder an address, so that two of them never mix; readable, for a user who looks for room on a disk.
    readable = re.sub(r"[^A-Za-z0-9.-]+", "-", address)[:60]
    digest = hashlib.sha256(address.encode()).hexdigest()[:8]
    cache = os.environ.get(CACHE_VARIABLE) or "~/.cache/dualsweep"
    return Store(Path(cache).expanduser().absolute() / f"{readable}-{digest}", storage)


def store_of(storage: str, root: Path) -> Store:
    """The store of a running sweep, for a process that was told its working folder."""
    return Store(root, open_store(storage).uri)


def impatient(store: Store) -> Store:
    """For commands that somebody waits for: a few seconds until an address that does not answer is refused."""
    return replace(store, wait_s=CHECK_WAIT_S)


def sweep_id(storage: str, folder: Path) -> str:
    """What tells a sweep from others of its name in MLflow: the same on every machine that a remote sweep runs on."""
    return store_of(storage, folder.parent).address(folder)


def storage_root(storage: str) -> Path:
    """The local folder of a storage: itself, or this node's working folder."""
    return open_store(storage).root


def check_storage(store: Store) -> None:
    """Raises: ConfigError when the storage, or this node's working folder, cannot be written. Leaves nothing behind."""
    check_writable(store.root)
    if store.uri is None:
        return
    probe = store.root / f".dualsweep-check-{uuid.uuid4().hex[:8]}"
    try:
        impatient(store).write(probe, b"dualsweep")
        impatient(store).remove_file(probe)
    except (StorageError, OSError, ValueError) as error:
        reason = " ".join(str(error).removeprefix("storage: ").split())
        raise ConfigError(
            f"storage: {store.address(store.root)} cannot be written ({reason}); start or reach it, or give another with "
            "storage=..."
        ) from None


def check_writable(root: Path) -> None:
    """Raises: ConfigError when the folder, or the nearest one above it that exists, cannot be written. Leaves nothing behind."""
    nearest = root
    try:
        while not nearest.exists():
            nearest = nearest.parent
    except OSError as error:
        raise ConfigError(
            f"storage: {root} cannot be a folder ({os.strerror(error.errno or 0)}); give another folder with storage=PATH"
        ) from None
    if not nearest.is_dir():
        raise ConfigError(f"storage: {nearest} is a file, not a folder; give another folder with storage=PATH")
    try:
        with tempfile.NamedTemporaryFile(dir=nearest, prefix=".dualsweep-check-") as probe:
            probe.write(b"dualsweep" * 1000)  # a full disk still makes empty files
            probe.flush()
    except OSError as error:
        raise ConfigError(
            f"storage: {root} is not writable ({os.strerror(error.errno or 0)}); give another folder with storage=PATH"
        ) from None


def bring(store: Store, name: str, *, trials: bool = False, models: bool = False) -> Path:
    """This node's copy of a sweep's folder, made or renewed from the remote one; a local storage's is the folder itself.

    Args:
        trials: with the single files of every trial (results, traces, samples), which a report reads.
        models: with the models too.
    Raises: ConfigError when the address does not answer or the journal is damaged.
    """
    folder = store.root / name
    if store.uri is None:
        return folder
    try:
        if not store.exists(folder / "sweep.yaml"):
            if not is_running(folder):  # it was removed there; a driver that has just started will push it
                (folder / "sweep.yaml").unlink(missing_ok=True)
            return folder
        (folder / DRIVER_FILE).unlink(missing_ok=True)
        store.fetch_files(folder)
        folder.mkdir(parents=True, exist_ok=True)
        with in_place_of(folder / "journal.jsonl") as part:
            part.write_bytes(read_remote_journal(store, folder))
        store.fetch(folder / "report")
        if trials or models:
            with ThreadPoolExecutor(8) as pool:
                here = [folder / "trials" / trial for trial in store.folders(folder / "trials")]
                list(pool.map(lambda trial: bring_trial(store, trial, models=models), here))
    except (StorageError, ValueError) as error:
        raise ConfigError(f"sweep {name!r}: {error}") from None
    return folder


def bring_all(store: Store, name: str | None, **what: bool) -> Path:
    """As `bring`, of one sweep or of every one. Returns: the local folder that holds them. Raises: ConfigError."""
    if store.uri is not None:
        try:
            names = [name] if name else [name for name in store.folders(store.root) if name != "bases"]
        except (StorageError, ValueError) as error:
            raise ConfigError(str(error)) from None
        for each in names:
            bring(store, each, **what)
    return store.root


def bring_trial(store: Store, folder: Path, *, models: bool) -> None:
    """What a trial has left so far, without its checkpoints."""
    folder.mkdir(parents=True, exist_ok=True)
    store.fetch_files(folder)
    if models:
        store.fetch(folder / "model")


def push_outcome(store: Store, folder: Path) -> None:
    """Results as they are now (an objective may have been restated), traces and the report, to a remote store."""
    if store.uri is None:
        return
    for trial in sorted((folder / "trials").glob("*")):
        for name in ("trace.parquet", "result.json"):
            if (trial / name).is_file():
                store.push(trial / name)
    if (folder / "report").is_dir():
        store.push(folder / "report")


def bring_model(model: str) -> Path:
    """A model folder given by path or address. Raises: ConfigError when a remote one is not there or not whole."""
    if "://" not in model:
        return Path(model)
    parts = urlsplit(model)
    above, _, name = parts.path.rstrip("/").rpartition("/")
    store = open_store(parts._replace(path=above).geturl())
    if store.uri is None:
        return store.root / name
    try:
        if store.fetch(store.root / name):
            return store.root / name
    except (StorageError, ValueError) as error:
        raise ConfigError(f"MODEL: {error}") from None
    raise ConfigError(f"MODEL: no model at {store.address(store.root / name)} ({name}{MANIFEST} is missing there)")


def forget(store: Store, folder: Path) -> None:
    """Empty this node's copy of a sweep that the remote store does not have: it was removed there."""
    if store.uri is not None:
        for path in folder.glob("*"):
            if path.name != "driver.lock":
                shutil.rmtree(path) if path.is_dir() else path.unlink()


@contextlib.contextmanager
def sign_of_life(store: Store, folder: Path) -> Iterator[None]:
    """One driver a remote sweep: while it lives it says so every `BEAT_S` seconds in `driver.json`.

    The file lock of a local sweep does not reach other machines. Two drivers that start within the same moment are not
    told apart here; the journal's epochs then keep the records of one of them.
    Raises: ConfigError when the driver of another machine has given a sign within `LIFE_S` seconds.
    """
    if store.uri is None:
        yield
        return
    path, ended = folder / DRIVER_FILE, threading.Event()
    other = _driver_of(store.read(path))
    if other is not None:
        raise ConfigError(
            f"name: sweep {folder.name!r} is being run by process {other['pid']} on {other['host']} (its last sign of life is "
            f"{time.time() - other['time']:.0f} s old); interrupt it there, or wait {LIFE_S:g} s after its end"
        )

    def beat() -> None:
        while True:
            mine = {"host": socket.gethostname(), "pid": os.getpid(), "time": time.time()}
            with contextlib.suppress(StorageError):  # an outage; whoever needs the store says so
                impatient(store).write(path, json.dumps(mine).encode())
            if ended.wait(BEAT_S):
                return

    thread = threading.Thread(target=beat, daemon=True, name="sign-of-life")
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        with contextlib.suppress(StorageError):
            impatient(store).remove_file(path)


def is_running(folder: Path) -> bool:
    """Whether a driver on this machine holds the sweep, or that of another machine has just given a sign of life."""
    try:
        with open(folder / "driver.lock", encoding="utf-8") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # never run here, or a file system without locks, where no driver starts
        pass
    return has_living_driver(folder)


def has_living_driver(folder: Path) -> bool:
    """Whether the driver of some machine runs this sweep, by the sign of life that `bring` fetched."""
    try:
        return _driver_of((folder / DRIVER_FILE).read_bytes()) is not None
    except OSError:
        return False


def _driver_of(content: bytes | None) -> dict | None:
    """The living driver that a sign of life speaks of."""
    try:
        driver = json.loads(content or b"null")
    except ValueError:
        return None
    if driver is None or time.time() - driver["time"] > LIFE_S:
        return None
    gone = driver["host"] == socket.gethostname() and not Path(f"/proc/{driver['pid']}").exists()
    return None if gone else driver
