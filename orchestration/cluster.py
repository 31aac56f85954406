"""Joining a Ray cluster or starting a local one, quietly and bound to loopback; what it can place."""

import atexit
import logging
import os
import shutil
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from dualsweep.orchestration.config import ComputeConfig, ConfigError

AUTOSCALED_VARIABLE = "DUALSWEEP_AUTOSCALED"
NODE_WATCH_S = 1.0
LEFT_GROUPS_S = 5.0
JOB_MARK = "dualsweep"  # in the metadata of our Ray jobs

# Ray reads these when it is imported or starts its processes, so they are set before `import ray` wherever possible.
_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_DEDUP_LOGS": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_GLOBAL_CHECKPOINT_S": "86400",  # Tune's own books, which nobody restores: the journal is what a resume reads
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}


def quiet_environment() -> None:
    """Settings for Ray's processes; a user's own values win."""
    for key, value in _QUIET.items():
        os.environ.setdefault(key, value)


def leave_repository_root() -> None:
    """Move to an empty folder and take the old one off the import path, here and for Ray's processes.

    Ray puts the driver's working directory in front of site-packages of every worker, and workers inherit PYTHONPATH.
    Started from this repository's root, `import datasets` would then find our folder instead of Hugging Face's library.
    Resolve relative paths before calling this.
    """
    here = Path.cwd().resolve()

    def is_here(entry: str) -> bool:
        return Path(entry or ".").resolve() == here

    # Judged before the move: "" and relative entries mean the folder we are still in.
    sys.path[:] = [entry for entry in sys.path if not is_here(entry)]
    if "PYTHONPATH" in os.environ:
        kept = [entry for entry in os.environ["PYTHONPATH"].split(os.pathsep) if not is_here(entry)]
        os.environ["PYTHONPATH"] = os.pathsep.join(kept)
    neutral = tempfile.mkdtemp(prefix="dualsweep-")
    atexit.register(shutil.rmtree, neutral, ignore_errors=True)
    os.chdir(neutral)


@dataclass(frozen=True)
class ClusterInfo:
    """What the joined cluster can hold."""

    local: bool
    cpus: float
    gpus: float
    nodes: int
    autoscaled: bool = False


def cluster_address(address: str | None) -> str | None:
    """The cluster to join: the address given, RAY_ADDRESS, or one that `ray start` left running here; None: start locally.

    "local" always means a Ray of our own. Ray itself would wait for minutes for a cluster whose machine-wide note
    (ray_current_cluster) outlived it, so the note counts only if something answers at its address.
    """
    given = address or os.environ.get("RAY_ADDRESS")
    if given == "local":
        return None
    if given and given != "auto":
        return given
    noted = _noted_address()
    if noted is not None:
        try:
            _check_answers(noted)
        except OSError:
            noted = None
    if given == "auto" and noted is None:
        raise ConfigError(
            "address: 'auto' finds no Ray running on this machine; give its address, or use --address local"
        )
    return noted


def _noted_address() -> str | None:
    note = Path(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()) / "ray" / "ray_current_cluster"
    try:
        return note.read_text(encoding="utf-8").strip() or None
    except OSError:
        return None


def _check_answers(address: str, timeout_s: float = 5.0) -> None:
    """Raises: OSError when nothing listens there. Ray client addresses (ray://) are probed at their port as well."""
    host, separator, port = address.removeprefix("ray://").rpartition(":")
    if not separator or not port.isdigit():
        raise ValueError(f"expected host:port, got {address!r}")
    socket.create_connection((host.strip("[]"), int(port)), timeout=timeout_s).close()


def start_ray(*, address: str | None = None, num_cpus: int | None = None) -> ClusterInfo:
    """Join the cluster that `cluster_address` finds, or start a local one bound to loopback.

    A local one has no dashboard: its ten processes would take 4 s of two cores to start and 4 % of one all along. Who wants
    it starts Ray with `ray start --head` and joins that. Raises: ConfigError when the given address does not answer.
    """
    quiet_environment()
    import ray

    logging.getLogger("ray").setLevel(logging.ERROR)
    wanted = cluster_address(address)
    if not ray.is_initialized():
        mark = ray.job_config.JobConfig(metadata={JOB_MARK: "sweep"})
        if wanted:
            try:
                _check_answers(wanted)
                ray.init(address=wanted, job_config=mark, logging_level=logging.ERROR, log_to_driver=False)
            except (OSError, ValueError, RuntimeError) as error:
                raise ConfigError(
                    f"address: no Ray cluster answers at {wanted!r} ({' '.join(str(error).split())[:200]}); start one "
                    "with `ray up cluster.yaml`, or run on this machine alone with --address local"
                ) from None
        else:
            # One machine, loopback only: a token would only leave a file in the home folder.
            os.environ.setdefault("RAY_AUTH_MODE", "disabled")
            with _stderr_to_null():
                ray.init(
                    address="local",
                    num_cpus=num_cpus,
                    job_config=mark,
                    include_dashboard=False,
                    _node_ip_address="127.0.0.1",
                    logging_level=logging.ERROR,
                    log_to_driver=False,
                )
    resources = ray.cluster_resources()
    nodes = [node for node in ray.nodes() if node["Alive"]]
    return ClusterInfo(
        local=not wanted,
        cpus=resources.get("CPU", 0.0),
        gpus=resources.get("GPU", 0.0),
        nodes=len(nodes),
        autoscaled=bool(wanted) and _is_autoscaled(),
    )


def _is_autoscaled() -> bool:
    """Whether nodes may come that are not there yet. Ray's own status does not tell (a plain head reports one too), so
    cluster.yaml and deploy/kuberay.yaml say so in the environment of their nodes."""
    return os.environ.get(AUTOSCALED_VARIABLE, "").lower() in ("1", "true", "yes")


def stop_ray() -> None:
    """Leave a joined cluster; end a local one."""
    import ray

    ray.shutdown()


def local_cpus() -> int:
    """CPUs a local Ray would offer: those this process may run on."""
    return len(os.sched_getaffinity(0))


def slots_for(compute: ComputeConfig, info: ClusterInfo) -> int:
    """Worker groups that run side by side.

    Raises: ConfigError when not even one group fits into what the cluster has.
    """
    fit = groups_that_fit(compute, info.cpus, info.gpus)
    if compute.elastic and fit >= 1:
        # Each group counts the whole cluster as its own room, so more than fit at their largest would wait for each other.
        fit = max(1, groups_that_fit(compute, info.cpus, info.gpus, at_most=True))
    if fit < 1 and info.autoscaled:  # nodes come once somebody waits for them
        return 1 if compute.concurrent_trials == "auto" else compute.concurrent_trials
    if fit < 1:
        raise ConfigError(_too_large(compute, info.cpus, info.gpus, "the cluster"))
    if compute.concurrent_trials == "auto":
        return fit
    if info.autoscaled:
        return compute.concurrent_trials
    return min(compute.concurrent_trials, fit)


def groups_that_fit(compute: ComputeConfig, cpus: float, gpus: float, *, at_most: bool = False) -> int:
    """How many worker groups have room, elastic ones at their smallest, or at their largest (`at_most`)."""
    workers = max(1, compute.most_workers if at_most else compute.fewest_workers)
    fit = int(cpus // (workers * compute.cpus_per_worker))
    if compute.gpus_per_worker:
        fit = min(fit, int(gpus / (workers * compute.gpus_per_worker) + 1e-9))
    return fit


def check_fits_locally(compute: ComputeConfig) -> None:
    """Refuse what this machine can never hold, before Ray starts. Raises: ConfigError."""
    import torch

    cpus, gpus = local_cpus(), torch.cuda.device_count()
    if groups_that_fit(compute, cpus, gpus) < 1:
        raise ConfigError(_too_large(compute, cpus, gpus, "this machine"))


def _too_large(compute: ComputeConfig, cpus: float, gpus: float, where: str) -> str:
    workers = max(1, compute.fewest_workers)
    field = "compute.workers.min" if compute.elastic else "compute.workers"
    gpu = f" and {workers * compute.gpus_per_worker:g} GPUs" if compute.gpus_per_worker else ""
    return (
        f"{field}={compute.fewest_workers}: one trial needs {workers * compute.cpus_per_worker} CPUs{gpu}, but {where} has "
        f"{cpus:g} CPUs and {gpus:g} GPUs; lower {field}, cpus_per_worker or gpus_per_worker, or join a larger cluster"
    )


@contextmanager
def cluster_tended(*, elastic: bool) -> Iterator[None]:
    """Do for Ray, while the block runs, what it leaves undone when machines and drivers die.

    What slots and drivers that died left reserved is freed (`free_left_groups`). With elastic groups, Ray's coordinator, whose view
    sizes them, is told of every node that comes or goes: by itself it looks every 20 s, a constant. It is started
    here because it is bound to the node it is started from: elsewhere that node's death would leave groups on other
    nodes with nobody to ask.
    """
    over = threading.Event()
    view = _NodeView() if elastic else None
    free_left_groups()

    def tend() -> None:
        next_round = time.monotonic() + LEFT_GROUPS_S
        while not over.wait(NODE_WATCH_S):
            if view is not None:
                view.announce_changes()
            if time.monotonic() > next_round:
                free_left_groups()
                next_round = time.monotonic() + LEFT_GROUPS_S

    tender = threading.Thread(target=tend, daemon=True, name="cluster-tender")
    tender.start()
    try:
        yield
    finally:
        over.set()
        tender.join(15.0)


class _NodeView:
    """Keeps the coordinator's view of the nodes fresh.

    Its `recompute` is not in Ray's public interface: without it a resize takes longer, nothing else.
    """

    def __init__(self) -> None:
        try:
            from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import (
                get_or_create_autoscaling_coordinator,
            )

            self._coordinator = get_or_create_autoscaling_coordinator()
        except ImportError:
            self._coordinator = None
        self._known = self._living()

    def announce_changes(self) -> None:
        import ray

        if self._coordinator is None:
            return
        try:
            living = self._living()
            if living != self._known:
                ray.get(self._coordinator.get_reserved_resources.remote("dualsweep", recompute=True), timeout=10.0)
                self._known = living
        except ray.exceptions.RayError:  # just starting again, or busy: asked at the next turn
            return
        except TypeError:  # a Ray that knows no `recompute`
            self._coordinator = None

    def _living(self) -> set[str]:
        import ray

        return {node["NodeID"] for node in ray.nodes() if node["Alive"]}


def free_left_groups() -> int:
    """Remove the placement groups whose worker group lost its controller. Returns: how many.

    Ray itself frees a group once both its creator, a slot's actor, and its job have ended. Not so that of a slot that died
    while the sweep goes on; nor one that was asked for in the moment in which the creator outlived its job: Ray has removed
    the dead job's groups by then and never looks again. A job of ours is known by its metadata; we make no groups that are
    meant to stay.
    """
    import ray
    from ray.core.generated.gcs_pb2 import PlacementGroupTableData
    from ray.util.placement_group import PlacementGroup, remove_placement_group

    try:
        jobs = ray._private.worker.global_worker.gcs_client.get_all_job_info()
        ours = {job_id.hex() for job_id, job in jobs.items() if JOB_MARK in job.config.metadata}
        dead = {job_id for job_id in ours if jobs[ray.JobID(bytes.fromhex(job_id))].is_dead}
        packed = ray._private.state.state._connect_and_get_accessor().get_placement_group_table()
        left = []
        for group in map(PlacementGroupTableData.FromString, packed):
            job = group.placement_group_id.hex()[-8:]
            # A driver's own group has no actor, which Ray counts as a dead one.
            orphaned = group.creator_actor_dead and not ray.ActorID(group.creator_actor_id).is_nil()
            if group.state != PlacementGroupTableData.REMOVED and (job in dead or (job in ours and orphaned)):
                left.append(group.placement_group_id)
        for group_id in left:
            remove_placement_group(PlacementGroup(ray.PlacementGroupID(group_id)))
    except (AttributeError, ImportError, ray.exceptions.RayError):  # not a public interface; or busy, and asked again soon
        return 0
    return len(left)


@dataclass(frozen=True)
class Held:
    """What a sweep still holds of the cluster after its end; both should be 0."""

    cpus: float
    placement_groups: int


def wait_until_free(timeout_s: float = 20.0) -> Held:
    """Wait until every CPU is free again and no placement group is left, at most `timeout_s`."""
    import ray
    from ray.util import placement_group_table

    deadline = time.monotonic() + timeout_s
    while True:
        cpus = ray.cluster_resources().get("CPU", 0.0) - ray.available_resources().get("CPU", 0.0)
        groups = sum(group["state"] != "REMOVED" for group in placement_group_table().values())
        if (cpus <= 0 and groups == 0) or time.monotonic() >= deadline:
            return Held(max(0.0, cpus), groups)
        time.sleep(0.2)


@contextmanager
def _stderr_to_null():
    """Ray's C++ core writes start-up notes straight to the file descriptor."""
    saved = os.dup(2)
    null = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(null)
