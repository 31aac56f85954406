"""Checkpoints: bit-exact when whole, refused by name when not, and passed over for the one before."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch

from dualsweep.datasets import Streams
from dualsweep.trainers.checkpoints import find_checkpoint
from dualsweep.trainers.methods.base import Batch
from dualsweep.trainers.methods.fairness import Fairness
from dualsweep.trainers.mlp import MLPDenoiser
from dualsweep.trainers.models import Denoiser
from dualsweep.trainers.noise_schedule import NoiseSchedule
from dualsweep.trainers.primal import primal_step
from dualsweep.trainers.state import CheckpointError, TrainState, read_checkpoint_meta
from dualsweep.trainers.store import Store

CONFIG = {
    "lr": 1e-2,
    "weight_decay": 1e-2,
    "ema_decay": 0.9,
    "steps": 200,
    "warmup_steps": 20,
    "final_lr_fraction": 0.1,
}
SCHEDULE = NoiseSchedule(num_train_timesteps=50)
DATA = torch.randn(64, 2, generator=torch.Generator().manual_seed(0))
STREAMS = Streams(
    sizes={"main": 64}, batch_sizes={"main": 16}, seed=0, num_shards=2, num_train_timesteps=50, sample_shape=(2,)
)
METHOD = Fairness(SimpleNamespace(schedule=SCHEDULE, optimizer={"normalize": True}))
WINDOW = [[[1 / 3, 0.1, 8.0]], [[2.0, 1e-300, 8.0]]]


def make_train(*, seed: int = 0, width: int = 16) -> TrainState:
    torch.manual_seed(seed)
    modules = [Denoiser(MLPDenoiser(dim=2, width=width, depth=1, num_train_timesteps=50)) for _ in range(2)]
    return TrainState(*modules, CONFIG)


def advance(train: TrainState, accelerator, steps: int) -> None:
    """Primal steps whose data follow from the step counter, as in the training loop."""
    for _ in range(steps):
        indices, timesteps, noise = STREAMS.draw(train.primal_step, range(2))["main"]
        batch = Batch(
            DATA[torch.from_numpy(indices)], torch.from_numpy(noise), torch.from_numpy(timesteps), (16,), (16,)
        )
        primal_step(train, METHOD, batch, torch.zeros(0), accelerator=accelerator, grad_clip=1.0)


def content(train: TrainState) -> dict:
    return {name: tensor.numpy().tobytes() for name, tensor in train.tensors().items()}


def counters(train: TrainState) -> tuple:
    lr = [group["lr"] for group in train.optimizer.param_groups]
    return train.primal_step, train.dual_step, train.extra, train.ema.optimization_step, train.lr, lr


@pytest.fixture
def saved(tmp_path, accelerator):
    """A checkpoint of five steps."""
    train = make_train()
    advance(train, accelerator, 5)
    train.dual_step = 3
    folder = tmp_path / "checkpoints" / "step-000003"
    train.save(folder, dual_state={"multipliers": [0.1]}, fingerprint="mine")
    return folder


def test_a_hundred_steps_and_a_hundred_resumed_equal_two_hundred(tmp_path, accelerator):
    whole = make_train()
    advance(whole, accelerator, 100)
    whole.dual_step, whole.extra["window"] = 7, WINDOW
    at_hundred = content(whole)
    folder = tmp_path / "step-000007"
    dual_state = {"multipliers": [0.1, 1 / 3], "step": 7}
    whole.save(folder, dual_state=dual_state, fingerprint="mine")
    assert content(whole) == at_hundred  # saving changes nothing

    resumed = make_train(seed=1)  # other weights: everything has to come from the file
    advance(resumed, accelerator, 3)
    resumed.extra["window"] = [[[9.0, 9.0, 9.0]]]
    assert resumed.restore(folder, fingerprint="mine") == dual_state
    assert content(resumed) == at_hundred
    assert counters(resumed) == counters(whole)
    assert resumed.extra["window"] == WINDOW  # floats to the last bit
    assert {name.split(".")[0] for name in at_hundred} == {"model", "ema", "optimizer"}

    advance(whole, accelerator, 100)
    advance(resumed, accelerator, 100)
    assert content(resumed) == content(whole) != at_hundred
    assert counters(resumed) == counters(whole)


def test_the_ema_goes_on_sharing_the_sampling_modules_memory_after_a_restore(saved, accelerator):
    train = make_train(seed=1)
    train.restore(saved, fingerprint="mine")
    before = [p.clone() for p in train.ema_denoiser.parameters()]
    advance(train, accelerator, 1)
    assert any(not torch.equal(a, b) for a, b in zip(before, train.ema_denoiser.parameters(), strict=True))


def test_a_checkpoint_before_the_first_step_restores_an_untouched_optimizer(tmp_path, accelerator):
    make_train().save(tmp_path / "step-000000", dual_state=None, fingerprint="mine")
    resumed, fresh = make_train(seed=1), make_train()
    advance(resumed, accelerator, 2)
    assert resumed.restore(tmp_path / "step-000000", fingerprint="mine") is None
    assert content(resumed) == content(fresh)
    assert not resumed.optimizer.state


def newest_checkpoint(folder, fingerprint):
    return find_checkpoint(folder, fingerprint, Store(folder))[0]


def flip(path, position: float):
    """Turn one bit of the byte at this fraction of the file."""
    raw = bytearray(path.read_bytes())
    raw[int(position * (len(raw) - 1))] ^= 1
    path.write_bytes(bytes(raw))


def cut(path, length: float):
    raw = path.read_bytes()
    path.write_bytes(raw[: int(length * len(raw))])


def rewrite(path, **changes):
    meta = json.loads(path.read_text(encoding="utf-8")) | changes
    path.write_text(json.dumps({k: v for k, v in meta.items() if v is not ...}), encoding="utf-8")


DAMAGES = {
    "a bit of the tensors' header": ("tensors.safetensors", lambda path: flip(path, 0.0)),
    "a bit of a tensor": ("tensors.safetensors", lambda path: flip(path, 0.7)),
    "the last bit": ("tensors.safetensors", lambda path: flip(path, 1.0)),
    "tensors cut in half": ("tensors.safetensors", lambda path: cut(path, 0.5)),
    "tensors empty": ("tensors.safetensors", lambda path: cut(path, 0.0)),
    "tensors missing": ("tensors.safetensors", lambda path: path.unlink()),
    "state cut in half": ("state.json", lambda path: cut(path, 0.5)),
    "state empty": ("state.json", lambda path: cut(path, 0.0)),
    "state missing": ("state.json", lambda path: path.unlink()),
    "state not text": ("state.json", lambda path: path.write_bytes(b"\xff\xfe\x00")),
    "state not a mapping": ("state.json", lambda path: path.write_text("[1]", encoding="utf-8")),
    "another version": ("state.json", lambda path: rewrite(path, version=0)),
    "a counter changed": ("state.json", lambda path: rewrite(path, primal_step=4)),
    "a multiplier changed": ("state.json", lambda path: rewrite(path, dual_state={"multipliers": [0.3]})),
    "a field missing": ("state.json", lambda path: rewrite(path, ema_step=...)),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_refused_by_name(saved, damage):
    name, harm = DAMAGES[damage]
    harm(saved / name)
    train = make_train(seed=1)
    before = content(train)
    with pytest.raises(CheckpointError) as caught:
        train.restore(saved, fingerprint="mine")
    assert str(saved) in str(caught.value) and "remove" in str(caught.value)
    assert content(train) == before


def test_a_checkpoint_of_another_configuration_is_refused(saved):
    with pytest.raises(CheckpointError, match="another configuration"):
        make_train().restore(saved, fingerprint="other")
    assert read_checkpoint_meta(saved)["fingerprint"] == "mine"  # reading it without a claim is fine


def test_tensors_of_another_architecture_are_refused(saved):
    with pytest.raises(CheckpointError, match="do not fit the model"):
        make_train(width=32).restore(saved, fingerprint="mine")


def test_the_newest_whole_checkpoint_is_found(tmp_path, saved):
    trial = saved.parent.parent
    assert newest_checkpoint(tmp_path / "empty", "mine") is None
    assert newest_checkpoint(trial, "mine") == saved
    for step in (4, 10):
        shutil.copytree(saved, saved.with_name(f"step-{step:06d}"))
    shutil.copytree(saved, saved.with_name("step-000011.part123"))  # a writer died half-way
    assert newest_checkpoint(trial, "mine").name == "step-000010"
    flip(saved.with_name("step-000010") / "tensors.safetensors", 0.5)
    assert newest_checkpoint(trial, "mine").name == "step-000004"
    (saved.with_name("step-000004") / "state.json").unlink()
    assert newest_checkpoint(trial, "mine") == saved
    cut(saved / "tensors.safetensors", 0.9)
    with pytest.raises(CheckpointError, match="step-000010"):  # the newest is the one to name
        newest_checkpoint(trial, "mine")


def test_saving_leaves_no_part_behind_and_replaces_an_older_try(saved, accelerator):
    train = make_train()
    advance(train, accelerator, 7)
    train.save(saved, dual_state=None, fingerprint="mine")
    assert [entry.name for entry in saved.parent.iterdir()] == ["step-000003"]
    assert sorted(entry.name for entry in saved.iterdir()) == ["state.json", "tensors.safetensors"]
    assert read_checkpoint_meta(saved, fingerprint="mine")["primal_step"] == 7


def test_a_save_that_fails_half_way_leaves_the_older_checkpoint_whole(saved):
    train = make_train()
    train.extra["not JSON"] = object()
    with pytest.raises(TypeError):
        train.save(saved, dual_state=None, fingerprint="mine")  # the tensors are written, the state is not
    assert read_checkpoint_meta(saved, fingerprint="mine")["primal_step"] == 5
    assert newest_checkpoint(saved.parent.parent, "mine") == saved
