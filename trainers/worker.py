"""What every worker of a warm group runs: take an assignment, train it, report its end, take the next.

The only file of `trainers` that knows Ray. `Server` is the DualServer's handle, given by orchestration.
"""

import traceback
from typing import Any, Protocol

import numpy as np
import torch
from accelerate.utils import broadcast_object_list

from dualsweep.constraints import NonFiniteError
from dualsweep.datasets import DatasetSpec
from dualsweep.trainers.allocator import keep_freed_memory
from dualsweep.trainers.assignment import Assignment
from dualsweep.trainers.dual_client import DualClient
from dualsweep.trainers.loop import run_trial
from dualsweep.trainers.store import Store
from dualsweep.trainers.workspace import Workspace


class Server(DualClient, Protocol):
    """A DualClient that also hands out work."""

    def lease(self, slot: str, finished: str | None, workers: int = 1) -> dict[str, Any] | None: ...

    def give_up(self, slot: str, error: str) -> None: ...

    def end(
        self, trial_id: str, attempt: int, status: str, *, result: dict | None = None, error: str | None = None
    ) -> None: ...


def serve(
    server: Server,
    slot: str,
    config: dict[str, Any],
    data_spec: DatasetSpec,
    *,
    num_threads: int,
    store: Store | None = None,
) -> None:
    """Train assignments until the slot is closed; called by every worker of a group, or in-process without Ray Train.

    A trial that raises is recorded with its traceback and the group goes on with the next one. Where a number was not
    finite the server hands the trial out again while it has retries left, and the worker forgets all it had cached: a
    pool or a labeller may have got it, too. With several workers the others may be inside a collective call, so the group
    ends instead, and is restarted by Ray Train; whichever rank raised first has said why, the server drops what follows.
    """
    torch.set_num_threads(num_threads)
    keep_freed_memory()
    grouped = torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1
    workspace = _early_workspace(server, slot, config, data_spec, store, grouped=grouped)
    finished = None
    while True:
        rank, world_size = (workspace.rank, workspace.world_size) if grouped else (0, 1)
        given = [server.lease(slot, finished, world_size) if rank == 0 else None]
        if grouped:
            broadcast_object_list(given, from_process=0)
        if given[0] is None:
            return
        assignment = Assignment(**given[0])
        try:
            workspace = workspace or Workspace(config, data_spec, store)
            result = run_trial(workspace, assignment, server)
        except Exception as error:  # the trial boundary: whatever it was, it is recorded and the sweep goes on
            bad = isinstance(error, NonFiniteError)
            if not _lost_peer(error):
                text = traceback.format_exc()
                server.end(assignment.trial_id, assignment.attempt, "diverged" if bad else "failed", error=text)
            if grouped:
                raise
            finished = None if bad else assignment.trial_id
            if bad:
                workspace = None
        else:
            if rank == 0:
                status = result["status"] if result is not None else "interrupted"
                error = result.get("error") if result is not None else None
                server.end(assignment.trial_id, assignment.attempt, status, result=_plain(result), error=error)
            finished = assignment.trial_id


def _early_workspace(
    server: Server, slot: str, config: dict[str, Any], data_spec: DatasetSpec, store: Store | None, *, grouped: bool
) -> Workspace | None:
    """The workspace, made while the first trial may still be waited for.

    A worker alone that cannot make it (data missing on this node, a device that does not answer) tries again inside its
    first trial, which then fails by name. Without it a group cannot agree which trial that is, so the server looks it up by the slot.
    """
    try:
        return Workspace(config, data_spec, store)
    except Exception:  # the trial's failure, whatever it was: told by name, now or inside the trial
        if not grouped:
            return None
        server.give_up(slot, traceback.format_exc())
        raise


def _lost_peer(error: Exception) -> bool:
    """Whether another worker is gone: this one did nothing wrong, and the group starts again from the checkpoint."""
    return isinstance(error, torch.distributed.DistError) or (
        isinstance(error, RuntimeError) and any(name in str(error) for name in ("gloo", "NCCL"))
    )


def _plain(value: Any) -> Any:
    """NumPy numbers as Python's, so that a result is JSON everywhere."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    return value.item() if isinstance(value, np.generic) else value
