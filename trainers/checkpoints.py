"""The checkpoints of a trial's folder: the newest whole one, at most two kept, and what killed processes left removed."""

import os
import re
import shutil
from pathlib import Path
from typing import Any

from dualsweep.trainers.state import CheckpointError, TrainState, read_checkpoint_meta
from dualsweep.trainers.store import MANIFEST, DamagedError, Store

KEPT_CHECKPOINTS = 2
_STEP = re.compile(r"step-\d{6}")
_PART = re.compile(r".*\.part(\d+)")


def find_checkpoint(
    folder: Path, fingerprint: str | None, store: Store, *, at_most: int | None = None
) -> tuple[Path | None, list[tuple[Path, CheckpointError]]]:
    """The newest checkpoint that is whole; a damaged one is passed over for the one before.

    Args:
        folder: the trial's; checkpoints that this node lacks are fetched from a remote store.
        at_most: the last dual step whose row is known; a later checkpoint would leave a gap in the trace.
    Returns: the checkpoint, None when there are none; and those passed over, with what is wrong with them.
    Raises: CheckpointError, the newest damaged one's, when there are such and none can be used.
    """
    passed: list[tuple[Path, CheckpointError]] = []
    ahead: list[tuple[Path, CheckpointError]] = []
    for candidate in sorted(_complete(folder / "checkpoints", store), reverse=True):
        if at_most is not None and int(candidate.name.removeprefix("step-")) > at_most:
            text = f"checkpoint {candidate}: the journal knows {at_most} dual steps and none beyond"
            ahead.append((candidate, CheckpointError(text)))
            continue
        try:
            store.fetch(candidate)
            read_checkpoint_meta(candidate, fingerprint=fingerprint)
        except DamagedError as error:
            passed.append((candidate, CheckpointError(str(error))))
        except CheckpointError as error:
            passed.append((candidate, error))
        else:
            return candidate, ahead + passed
    if passed:
        raise passed[0][1]
    return None, ahead


def save_checkpoint(
    train: TrainState, folder: Path, store: Store, *, dual_state: dict[str, Any] | None, fingerprint: str
) -> Path:
    """Write the checkpoint of this dual step, push it, and remove all but the newest `KEPT_CHECKPOINTS`.

    Raises: StorageError when it cannot be written here or pushed; the checkpoints before it are whole then.
    """
    target = folder / "checkpoints" / f"step-{train.dual_step:06d}"
    target.parent.mkdir(parents=True, exist_ok=True)
    train.save(target, dual_state=dual_state, fingerprint=fingerprint)
    store.push(target)
    for old in sorted(path for path in target.parent.glob("step-??????"))[:-KEPT_CHECKPOINTS]:
        _remove(old, store)
    return target


def tidy(folder: Path, store: Store, passed: list[tuple[Path, CheckpointError]]) -> None:
    """Before an attempt: drop what was passed over, which would keep a slot, and what killed processes left half-written."""
    for damaged, _ in passed:
        _remove(damaged, store)
    remove_leftovers(folder)
    remove_leftovers(folder / "checkpoints")
    if store.uri is not None:
        whole = {path.name for path in _complete(folder / "checkpoints", store)}
        here = {path.name for path in (folder / "checkpoints").glob("step-??????")}
        for name in (here | set(store.folders(folder / "checkpoints"))) - whole:
            _remove(folder / "checkpoints" / name, store)


def remove_leftovers(folder: Path) -> None:
    """Files and folders named `*.part<pid>` whose process is gone."""
    for path in folder.glob("*.part*"):
        match = _PART.fullmatch(path.name)
        if match and not _alive(int(match[1])):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _complete(folder: Path, store: Store) -> list[Path]:
    """Checkpoints moved into place here or, with a remote store, those whose manifest is there."""
    if store.uri is None:
        return list(folder.glob("step-??????"))
    names = [name.removesuffix(MANIFEST) for name in store.files(folder) if name.endswith(MANIFEST)]
    return [folder / name for name in names if _STEP.fullmatch(name)]


def _remove(path: Path, store: Store) -> None:
    store.remove(path)
    path.with_name(path.name + MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(path, ignore_errors=True)
