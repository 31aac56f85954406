"""Tensors that cost much to make and that many processes read: made once a storage, found by what they are made of."""

import fcntl
import hashlib
import shutil
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from dualsweep.trainers.store import DamagedError, Store, in_place_of

TENSORS, CHECKSUM = "tensors.safetensors", "sha256"


def cached_tensors(folder: Path, store: Store, make: Callable[[], dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The tensors in `folder`, on the CPU; made first where there are none, or where they are damaged.

    Of processes that want the same ones at once the first makes them while the others of its machine, or of a shared file
    system, wait. Two machines with a remote store may both make them; what was pushed first is what both use.

    Args:
        folder: below the store's root, named after what the tensors are made of: it is never asked how old they are.
    Raises: StorageError when they can neither be read nor written, and whatever `make` raises.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.with_name(f"{folder.name}.lock"), "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        found = _read(folder, store)
        if found is None:
            for left in folder.parent.glob(f"{folder.name}.part*"):  # of a process that was killed
                shutil.rmtree(left, ignore_errors=True)
            made = make()
            found = _read(folder, store) or made  # another machine may have pushed them meanwhile
            if found is made:
                with in_place_of(folder) as part:
                    part.mkdir()
                    save_file(made, part / TENSORS)
                    (part / CHECKSUM).write_text(digest_of([part / TENSORS]), encoding="utf-8")
                store.push(folder)
    return found


def _read(folder: Path, store: Store) -> dict[str, torch.Tensor] | None:
    """The tensors as they were written; None where there are none, and where damaged ones had to be removed."""
    for _ in range(2):  # a remote store may have them whole where this node's copy is damaged
        try:
            if not store.fetch(folder):
                return None
            if (folder / CHECKSUM).read_text(encoding="utf-8") != digest_of([folder / TENSORS]):
                raise DamagedError(f"{folder / TENSORS} is not what was written")
            return load_file(folder / TENSORS)
        except (DamagedError, FileNotFoundError, UnicodeDecodeError, SafetensorError):
            with suppress(FileNotFoundError):
                shutil.rmtree(folder)
    store.remove(folder)
    return None


def digest_of(files: Iterable[Path]) -> str:
    """SHA-256 over the names and contents of files, in this order."""
    digest = hashlib.sha256()
    for path in files:
        with open(path, "rb") as source:
            content = hashlib.file_digest(source, "sha256").hexdigest()
        digest.update(f"{path.name}\0{content}\n".encode())
    return digest.hexdigest()
