"""The trial's loop on a CUDA device, in every precision; run where one is at hand with `pytest -m gpu`."""

import math

import pytest
import torch

from dualsweep.orchestration.config import SweepConfig
from dualsweep.orchestration.local_dual import LocalDual
from dualsweep.trainers.assignment import Assignment
from dualsweep.trainers.loop import run_trial
from dualsweep.trainers.workspace import Workspace

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def config(precision: str, **model) -> SweepConfig:
    optimizer = {"batch_size": 32, "warmup_steps": 2, "num_shards": 2, "precision": precision}
    return SweepConfig.from_dict(
        {
            "name": "cuda",
            "data": {"dataset": "digits", "minority": {"classes": [4, 7], "keep": 0.1}},
            "model": {"kind": "unet", "channels": [16, 32], **model},
            "pretrain": {**optimizer, "steps": 30},
            "primal": {**optimizer, "steps": 40, "constraint_batch_size": 8},
            "dual": {"rule": "ascent", "step_size": 0.02, "primal_steps_per_dual_step": 5},
            "measure": {"num_samples": 32, "num_sampling_steps": 4},
            "thresholds": {"unit": "share", "grid": {"minority": [0.2]}},
            "evaluation": {"num_samples": 64, "num_sampling_steps": 4, "noise_levels": 8},
            "compute": {"workers": 1, "gpus_per_worker": 1},
            "checkpoint_every_dual_steps": 2,
        }
    )


class InterruptedAt(LocalDual):
    def __init__(self, dual_step: int) -> None:
        super().__init__()
        self.dual_step = dual_step

    def report(self, trial_id, attempt, dual_step, measurement):
        if dual_step == self.dual_step:
            self.ledger.book(trial_id).directive = "interrupt"
        return super().report(trial_id, attempt, dual_step, measurement)


def assignment(folder, trial_id: str, attempt: int = 1) -> Assignment:
    kind = "base" if trial_id == "base" else "constrained"
    return Assignment(
        trial_id=trial_id,
        label=trial_id,
        kind=kind,
        attempt=attempt,
        thresholds={} if kind == "base" else {"digit_4": 0.2, "digit_7": 0.2},
        fixed_weight=None,
        trial_dir=str(folder / trial_id),
        base_dir=str(folder / "base"),
    )


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_trial_trains_stops_and_resumes_on_the_device(tmp_path, precision):
    settings = config(precision)
    workspace = Workspace(settings.to_dict(), settings.data)
    assert workspace.device.type == "cuda" and (workspace.accelerator.scaler is not None) == (precision == "fp16")
    calm = LocalDual()
    run_trial(workspace, assignment(tmp_path, "base"), calm)
    whole = run_trial(workspace, assignment(tmp_path, "calm"), calm)
    assert math.isfinite(whole["objective"]["value"]) and all(value > 0 for value in whole["multipliers"].values())
    faulty = InterruptedAt(3)
    assert run_trial(workspace, assignment(tmp_path, "broken"), faulty) is None
    resumed = run_trial(workspace, assignment(tmp_path, "broken", attempt=2), faulty)
    # Not to the bit: some CUDA kernels add in any order. The dual steps are all there, once, and agree.
    assert [row["dual_step"] for row in faulty.trace("broken")] == list(range(1, 9))
    for name, value in whole["multipliers"].items():
        assert resumed["multipliers"][name] == pytest.approx(value, abs=0.02)


def test_channels_last_and_compile_give_the_same_losses(tmp_path):
    losses = {}
    for name, options in {"plain": {}, "fast": {"channels_last": True, "compile": True}}.items():
        settings = config("fp32", **options)
        dual = LocalDual()
        run_trial(Workspace(settings.to_dict(), settings.data), assignment(tmp_path / name, "base"), dual)
        losses[name] = [row["objective"] for row in dual.trace("base")]
    assert losses["fast"] == pytest.approx(losses["plain"], rel=1e-2)
