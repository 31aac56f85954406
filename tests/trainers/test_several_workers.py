"""One, two and four workers train the same trial: real processes, one gloo group, the whole loop.

Every sample, timestep and noise is the same to the last bit, whoever draws it. Results differ by the order in which float32
sums are made alone, a relative 1e-7 that the steps amplify: 1e-6 was seen after these.
"""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from dualsweep.orchestration.config import SweepConfig
from dualsweep.orchestration.local_dual import LocalDual
from dualsweep.trainers import loop
from dualsweep.trainers.assignment import Assignment
from dualsweep.trainers.loop import run_trial
from dualsweep.trainers.workspace import Workspace

SIZES = (1, 2, 4)
TOLERANCE = 1e-5  # of the largest entry
PRIMAL_STEPS = 8
VALUES = {
    "name": "groups",
    "data": {
        "dataset": "gaussian_mixture",
        "means": [[-1.0, 0.0], [1.0, 0.5]],
        "stds": [0.3, 0.2],
        "weights": [0.8, 0.2],
        "count": 200,
        "minority": {"classes": [1]},
    },
    "model": {"kind": "mlp", "width": 16, "depth": 1},
    "schedule": {"num_train_timesteps": 50, "beta_end": 0.2},
    "pretrain": {"steps": 8, "batch_size": 16, "warmup_steps": 1, "num_shards": 5},
    "primal": {  # five shards of unequal sizes: nothing divides evenly among two or four
        "steps": PRIMAL_STEPS,
        "batch_size": 18,
        "constraint_batch_size": 7,
        "warmup_steps": 2,
        "num_shards": 5,
        "ema_decay": 0.5,
    },
    "dual": {"rule": "ascent", "step_size": 0.5, "primal_steps_per_dual_step": 2},
    "measure": {"num_samples": 33, "num_sampling_steps": 4},
    "evaluation": {"num_samples": 48, "num_sampling_steps": 4, "noise_levels": 6, "grid_samples": 9},
    "checkpoint_every_dual_steps": 2,
}
CASES = {
    "counted samples": {"thresholds": {"unit": "share", "grid": {"minority": [0.4]}}},
    "losses": {"thresholds": {"unit": "loss", "grid": {"minority": [0.1]}}},
    "rewards on trajectories": {
        "method": "alignment",
        "formulation": {
            "rewards": {"right": {"kind": "linear", "direction": [1.0, 0.0]}},
            "num_sampling_steps": 6,
            "pool": 128,
        },
        "thresholds": {"unit": "reward", "grid": {"rewards": [0.3]}},
        # From a multiplier of 0 the first gradients are 0 but for rounding, and AdamW makes whole steps of rounding.
        "dual": VALUES["dual"] | {"start": 1.0},
    },
}


def assignment_of(config: SweepConfig, folder: Path, kind: str, names: tuple[str, ...]) -> Assignment:
    (asked,) = config.to_dict()["thresholds"]["grid"].values()
    return Assignment(
        trial_id=kind,
        label=kind,
        kind=kind,
        attempt=1,
        thresholds=dict.fromkeys(names, asked[0]) if kind == "constrained" else {},
        fixed_weight=None,
        trial_dir=str(folder / "trial"),
        base_dir=str(folder.parent / "base"),
    )


def work(config: SweepConfig, folder: Path, rank: int, world_size: int) -> None:
    """What one worker of a group does, as Ray Train sets it up; its batches and rank 0's rows are left in `folder`."""
    torch.set_num_threads(1)
    where = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    os.environ.update(
        {key: str(value) for key, value in where.items()} | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    )
    AcceleratorState._reset_state(reset_partial_state=True)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=world_size)
    taken, drawn = loop.primal_step, {}

    def primal_step(train, method, batch, *arguments, **given):
        for name in ("x_0", "timestep", "noise"):
            parts = getattr(batch, name).split(list(batch.counts))
            drawn.update({f"{train.primal_step} {name} {stream}": part.numpy() for stream, part in enumerate(parts)})
        return taken(train, method, batch, *arguments, **given)

    loop.primal_step = primal_step
    workspace, dual = Workspace(config.to_dict(), config.data), LocalDual()
    assert (workspace.rank, workspace.world_size) == (rank, world_size)
    run_trial(workspace, assignment_of(config, folder, "constrained", workspace.constraint_names), dual)
    np.savez(folder / f"drawn-{rank}.npz", **drawn)
    if rank == 0:
        (folder / "rows.json").write_text(json.dumps(dual.trace("constrained")), encoding="utf-8")
    torch.distributed.destroy_process_group()


def train_by(world_size: int, config: SweepConfig, root: Path) -> tuple[dict, list[dict], dict]:
    """What a group of this size drew, over all its workers in the order of their ranks; its rows; and its last checkpoint."""
    folder = root / f"{world_size}-workers"
    folder.mkdir()
    context = torch.multiprocessing.get_context("fork")  # a spawned worker would import torch for seconds
    ranks = [context.Process(target=work, args=(config, folder, rank, world_size)) for rank in range(world_size)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(120)
        assert rank.exitcode == 0
    parts = [np.load(folder / f"drawn-{rank}.npz") for rank in range(world_size)]
    drawn = {key: np.concatenate([part[key] for part in parts]) for key in parts[0].files}
    newest = max((folder / "trial" / "checkpoints").glob("step-??????"))
    rows = json.loads((folder / "rows.json").read_text(encoding="utf-8"))
    return drawn, rows, load_file(newest / "tensors.safetensors")


@pytest.mark.parametrize("case", CASES)
def test_groups_of_one_two_and_four_draw_the_same_numbers_and_agree(case, tmp_path):
    config = SweepConfig.from_dict({**VALUES, **CASES[case]})
    workspace = Workspace(config.to_dict(), config.data)
    run_trial(workspace, assignment_of(config, tmp_path / "base", "base", ()), LocalDual())
    alone, *groups = (train_by(size, config, tmp_path) for size in SIZES)
    assert len({key.split()[0] for key in alone[0]}) == PRIMAL_STEPS
    assert any(alone[1][-1]["multipliers"]), "multipliers that never moved would agree anyway"
    for size, (drawn, rows, tensors) in zip(SIZES[1:], groups, strict=True):
        assert {row["workers"] for row in rows} == {size}
        for key, values in alone[0].items():
            np.testing.assert_array_equal(drawn[key], values, err_msg=f"{key} on {size} workers")
        for name in ("objective", "lagrangian", "grad_norm", "multipliers", "violations"):
            assert_close([row[name] for row in rows], [row[name] for row in alone[1]], f"{name} on {size} workers")
        assert set(tensors) == set(alone[2])
        for name, wanted in alone[2].items():
            assert_close(tensors[name].double(), wanted.double(), f"{name} on {size} workers")


def assert_close(found, wanted, what: str) -> None:
    largest = np.abs(np.asarray(wanted)).max()
    np.testing.assert_allclose(found, wanted, rtol=0.0, atol=TOLERANCE * largest, err_msg=what)
