"""The trial's loop on a CUDA device, in every precision; run where one is at hand with `pytest -m gpu`."""

import math

import pytest
import torch
from accelerate.state import AcceleratorState, PartialState

from dualsweep.orchestration.config import SweepConfig
from dualsweep.orchestration.local_dual import LocalDual
from dualsweep.trainers.assignment import Assignment
from dualsweep.trainers.bad_numbers import DeferredChecks
from dualsweep.trainers.batches import BatchLoader
from dualsweep.trainers.loop import run_trial
from dualsweep.trainers.methods import METHODS, StreamSums
from dualsweep.trainers.primal import primal_step
from dualsweep.trainers.state import TrainState
from dualsweep.trainers.workspace import Workspace

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(autouse=True)
def own_accelerator_state():
    """A process has one precision; here every test has its own, and other tests' accelerators find theirs again."""
    states = (AcceleratorState, PartialState)
    kept = [dict(state._shared_state) for state in states]
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    for state, was in zip(states, kept, strict=True):
        state._shared_state.clear()
        state._shared_state.update(was)


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


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_primal_steps_do_not_wait_for_the_device(precision, accumulate):
    """Whole steps from the draw to the EMA, after the first two, which compile kernels and make what is kept."""
    settings = config(precision)
    workspace = Workspace(settings.to_dict(), settings.data)
    optimizer = workspace.config["primal"]
    method = METHODS["fairness"](workspace.setting(workspace.constraint_names, optimizer))
    workspace.fill(None)
    train = TrainState(*workspace.modules(), optimizer)
    streams = workspace.streams(method, optimizer, seed=0)
    tensors = {name: samples for name, (samples, _) in method.streams().items()}
    sums, checks = StreamSums(1 + len(workspace.constraint_names), workspace.device), DeferredChecks()
    multipliers = torch.full((len(workspace.constraint_names),), 0.3, device=workspace.device)
    given = {"steps": 8, "accumulate": accumulate}
    with BatchLoader(streams, range(streams.num_shards), tensors, workspace.device, **given) as batches:
        try:
            for step in range(8):
                batch, *further = batches.take(step)
                norm = primal_step(
                    train,
                    method,
                    batch,
                    multipliers,
                    accelerator=workspace.accelerator,
                    grad_clip=1.0,
                    sums=sums,
                    checks=checks,
                    further=further,
                )
                assert norm is None
                if step == 1:
                    torch.cuda.set_sync_debug_mode("error")
            with pytest.raises(RuntimeError, match="synchroniz"):  # the mode is on
                float(multipliers.sum())
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert math.isfinite(checks.read()) and torch.isfinite(sums.table).all()


def test_batches_on_the_device_are_those_on_the_host():
    settings = config("fp32")
    workspace = Workspace(settings.to_dict(), settings.data)
    optimizer = workspace.config["primal"]
    method = METHODS["fairness"](workspace.setting(workspace.constraint_names, optimizer))
    streams = workspace.streams(method, optimizer, seed=0)
    tensors = {name: samples for name, (samples, _) in method.streams().items()}
    hosted = {name: samples.cpu() for name, samples in tensors.items()}
    shards, steps = range(streams.num_shards), 50
    plain = BatchLoader(streams, shards, hosted, torch.device("cpu"), steps=steps)
    with BatchLoader(streams, shards, tensors, workspace.device, steps=steps) as batches:
        # All taken before any is looked at: page-locked memory must not be filled again while a copy from it is queued.
        torch.cuda._sleep(100_000_000)
        taken = [batches.take(step)[0] for step in range(steps)]
    for step, batch in enumerate(taken):
        (expected,) = plain.take(step)
        for name in ("x_0", "noise", "timestep"):
            assert torch.equal(getattr(batch, name).cpu(), getattr(expected, name))
