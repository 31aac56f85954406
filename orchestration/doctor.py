"""`dualsweep doctor`: what this machine and a cluster can run, and what is missing."""

import os
import shutil
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from packaging.version import Version

from dualsweep.orchestration.config import ConfigError
from dualsweep.orchestration.storage import check_storage
from dualsweep.trainers.store import Store

# Oldest releases the project is tested with; the same bounds as in pyproject.toml.
PACKAGES = {
    "torch": "2.6",
    "diffusers": "0.35",
    "accelerate": "1.6",
    "ray": "2.60",
    "mlflow": "3.17",
    "pyarrow": "16",
    "peft": "0.15",
    "optuna": "4.0",
}
NEEDED_GB = 1.0


@dataclass(frozen=True)
class Finding:
    ok: bool
    what: str
    found: str
    remedy: str = ""


def check_everything(store: Store, address: str | None) -> list[Finding]:
    """Every check with what to do about it; starts Ray only to look at a cluster that was named."""
    rows = [
        _python(),
        *(_package(name, least) for name, least in PACKAGES.items()),
        _processors(),
        _gpus(),
        _storage(store),
        _disk(store.root),
    ]
    if address or os.environ.get("RAY_ADDRESS"):
        rows.append(_cluster(address))
    return rows


def _python() -> Finding:
    found = ".".join(map(str, sys.version_info[:3]))
    return Finding(
        sys.version_info >= (3, 11),
        "Python",
        found,
        "" if sys.version_info >= (3, 11) else "install Python 3.11 or newer",
    )


def _package(name: str, least: str) -> Finding:
    try:
        found = version(name)
    except PackageNotFoundError:
        return Finding(False, name, "not installed", f"pip install '{name}>={least}'")
    new_enough = Version(found).release >= Version(least).release
    return Finding(new_enough, name, found, "" if new_enough else f"pip install -U '{name}>={least}'")


def _processors() -> Finding:
    cpus = len(os.sched_getaffinity(0))
    return Finding(True, "processors", f"{cpus} CPUs: {cpus} one-CPU worker groups at a time")


def _gpus() -> Finding:
    import torch

    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    if names:
        return Finding(True, "GPUs", ", ".join(names), "use them with compute.gpus_per_worker=1")
    hidden = shutil.which("nvidia-smi") is not None and not torch.cuda.is_available()
    remedy = "this torch build cannot use the GPU here: install a CUDA build" if hidden else ""
    return Finding(not hidden, "GPUs", "none", remedy)


def _storage(store: Store) -> Finding:
    where = store.address(store.root)
    try:
        check_storage(store)
    except ConfigError as error:
        return Finding(False, "storage", where, str(error))
    return Finding(True, "storage", f"{where} is writable")


def _disk(root: Path) -> Finding:
    while not root.exists():
        root = root.parent
    free = shutil.disk_usage(root).free / 2**30
    return Finding(
        free >= NEEDED_GB, "disk", f"{free:.1f} GiB free", "" if free >= NEEDED_GB else f"free some space under {root}"
    )


def _cluster(address: str | None) -> Finding:
    from dualsweep.orchestration.cluster import start_ray, stop_ray

    try:
        info = start_ray(address=address)
    except ConfigError as error:
        return Finding(False, "cluster", "no answer", str(error))
    stop_ray()
    return Finding(True, "cluster", f"{info.nodes} nodes, {info.cpus:g} CPUs, {info.gpus:g} GPUs")
