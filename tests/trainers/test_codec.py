"""Latents for samples: encoded once a storage, seen by the loop as they are, decoded where images are meant."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DModel
from safetensors.torch import load_file

from dualsweep.datasets import DatasetSpec, MinoritySpec, build
from dualsweep.orchestration.config import SweepConfig
from dualsweep.orchestration.local_dual import LocalDual
from dualsweep.orchestration.preflight import preflight
from dualsweep.orchestration.sampling import draw_samples
from dualsweep.orchestration.sweep import adopt_pretrained
from dualsweep.trainers import codec as codec_module
from dualsweep.trainers.assignment import Assignment
from dualsweep.trainers.codec import AS_THEY_ARE, Autoencoder, check_latents, codec_of, distinct
from dualsweep.trainers.loop import run_trial
from dualsweep.trainers.methods.alignment import Alignment
from dualsweep.trainers.models import build_denoiser, load_model, save_model
from dualsweep.trainers.noise_schedule import NoiseSchedule
from dualsweep.trainers.rewards import brightness
from dualsweep.trainers.store import Store
from dualsweep.trainers.workspace import Workspace

DIGITS = DatasetSpec(dataset="digits", minority=MinoritySpec(classes=(4, 7), keep=0.1))
SHAPE = (4, 4, 4)  # of the latents of 8x8 digits


@pytest.fixture(scope="module")
def digits():
    return build(DIGITS)


@pytest.fixture(scope="module")
def vae(tmp_path_factory, digits) -> Path:
    """An autoencoder of the digits, trained for some seconds, with a scale and a shift."""
    torch.manual_seed(0)
    network = AutoencoderKL(
        in_channels=1, out_channels=1, block_out_channels=(8, 16), layers_per_block=1, latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=4,
        sample_size=8, scaling_factor=0.5, shift_factor=0.25,
    )  # fmt: skip
    images = torch.from_numpy(digits.reference.samples)
    optimizer = torch.optim.Adam(network.parameters(), lr=5e-3)
    for _ in range(150):
        batch = images[torch.randint(len(images), (32,))]
        optimizer.zero_grad()
        (network.decode(network.encode(batch).latent_dist.mean).sample - batch).square().mean().backward()
        optimizer.step()
    folder = tmp_path_factory.mktemp("vae")
    network.save_pretrained(folder)
    return folder


@pytest.fixture
def encoded(monkeypatch) -> list[int]:
    """How many images went through an encoder, by call."""
    sizes, encode = [], AutoencoderKL.encode

    def counted(self, images, *given, **named):
        sizes.append(len(images))
        return encode(self, images, *given, **named)

    monkeypatch.setattr(AutoencoderKL, "encode", counted)
    return sizes


@pytest.fixture
def make_config(tiny_config, vae):
    """The tiny sweep, on latents."""
    return lambda **sections: tiny_config(**{"model": {"autoencoder": str(vae)}, **sections})


def workspace_of(config: SweepConfig) -> Workspace:
    return Workspace(config.to_dict(), config.data)


def caches(root: Path) -> list[str]:
    return sorted(path.name for path in (root / "bases" / "latents").iterdir() if path.is_dir())


# -- the cache ----------------------------------------------------------------------------------------------------------


def test_every_image_is_encoded_once_and_then_read(vae, digits, encoded, tmp_path, monkeypatch):
    monkeypatch.setattr(codec_module, "PIXELS_AT_ONCE", 64 * 500)
    first = Autoencoder(vae).encoded(digits, Store(tmp_path))
    sets = [digits.main.samples, digits.held_out_main.samples]
    sets += [*digits.constraints.values(), *digits.held_out_constraints.values()]
    images = {image.tobytes() for one in sets for image in one}
    assert sum(encoded) == len(images) < sum(map(len, sets)) and max(encoded) == 500
    again = Autoencoder(vae).encoded(digits, Store(tmp_path))
    assert sum(encoded) == len(images) and len(caches(tmp_path)) == 1
    for part in (first, again):
        assert part.main.samples.shape == (len(digits.main), *SHAPE) and part.main.samples.dtype == np.float32
        assert part.sample_shape == SHAPE and part.reference is digits.reference
    direct = Autoencoder(vae).encode(list(digits.constraints["digit_4"]))
    torch.testing.assert_close(torch.from_numpy(first.constraints["digit_4"]), direct)  # float32, another batch
    for name in ("main", "held_out_main"):
        assert np.array_equal(getattr(first, name).samples, getattr(again, name).samples)
        assert np.array_equal(getattr(first, name).labels, getattr(digits, name).labels)
    for name in digits.constraints:
        assert np.array_equal(first.held_out_constraints[name], again.held_out_constraints[name])
        assert len(first.held_out_constraints[name]) == len(digits.held_out_constraints[name])


def test_other_data_and_another_autoencoder_have_their_own_cache(vae, digits, encoded, tmp_path):
    store, other = Store(tmp_path / "runs"), shutil.copytree(vae, tmp_path / "other")
    config = json.loads((other / "config.json").read_text(encoding="utf-8"))
    (other / "config.json").write_text(json.dumps(config | {"scaling_factor": 1.0}), encoding="utf-8")
    fewer = build(replace(DIGITS, seed=1))
    given = [(vae, digits), (other, digits), (vae, fewer)]
    latents = [Autoencoder(folder).encoded(data, store) for folder, data in given]
    prints = {Autoencoder(folder).fingerprint(data) for folder, data in given}
    assert len(caches(store.root)) == 3 == len(prints)
    np.testing.assert_allclose(latents[1].main.samples, 2 * latents[0].main.samples, rtol=1e-4, atol=1e-5)
    network = AutoencoderKL.from_pretrained(other)
    network.decoder.conv_out.bias.data += 1.0
    network.save_pretrained(other)
    assert Autoencoder(other).fingerprint(digits) not in prints


@pytest.mark.parametrize("damage", ["a bit", "cut", "no checksum", "no tensors"])
def test_a_damaged_cache_is_made_again(vae, digits, encoded, tmp_path, damage):
    store, codec = Store(tmp_path), Autoencoder(vae)
    first, once = codec.encoded(digits, store), sum(encoded)
    folder = tmp_path / "bases" / "latents" / caches(tmp_path)[0]
    tensors = folder / "tensors.safetensors"
    content = bytearray(tensors.read_bytes())
    if damage == "a bit":
        content[-100] ^= 1
        tensors.write_bytes(content)
    elif damage == "cut":
        tensors.write_bytes(content[:-100])
    else:
        (folder / "sha256" if damage == "no checksum" else tensors).unlink()
    again = codec.encoded(digits, store)
    assert sum(encoded) == 2 * once and np.array_equal(first.main.samples, again.main.samples)
    codec.encoded(digits, store)
    assert sum(encoded) == 2 * once


def test_a_killed_encoding_leaves_no_cache(vae, digits, tmp_path, monkeypatch):
    (tmp_path / "bases" / "latents").mkdir(parents=True)
    codec = Autoencoder(vae)
    left = tmp_path / "bases" / "latents" / f"{codec.fingerprint(digits)[:32]}.part1"  # of a process that was killed
    left.mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(Autoencoder, "_keep_copy", lambda self, folder, store: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            codec.encoded(digits, Store(tmp_path))
    assert caches(tmp_path) == []
    codec.encoded(digits, Store(tmp_path))
    assert len(caches(tmp_path)) == 1


def test_distinct_images_are_numbered_in_the_order_of_their_first_place():
    images = np.arange(4, dtype=np.float32)[:, None]
    places, rows = distinct({"a": images[[2, 0, 2]], "b": images[[0, 3]]})
    assert places == [("a", 0), ("a", 1), ("b", 1)]
    assert {name: found.tolist() for name, found in rows.items()} == {"a": [0, 1, 0], "b": [1, 2]}


# -- there and back -----------------------------------------------------------------------------------------------------


def test_latents_are_scaled_means_and_decode_to_their_images(vae, digits, monkeypatch):
    images = digits.main.samples[:40]
    codec, network = Autoencoder(vae), AutoencoderKL.from_pretrained(vae)
    latents = codec.encode(list(images))
    mean = network.encode(torch.from_numpy(images)).latent_dist.mean
    torch.testing.assert_close(latents, ((mean - 0.25) * 0.5).detach())
    assert codec.sample_shape((1, 8, 8)) == SHAPE == tuple(latents.shape[1:])
    assert codec.image_shape(SHAPE) == (1, 8, 8)
    back = codec.decode(latents)
    assert float((back - torch.from_numpy(images)).square().mean()) < 0.1  # of pixels whose variance is 0.56
    assert back.abs().max() <= 1
    monkeypatch.setattr(codec_module, "PIXELS_AT_ONCE", 64 * 7)
    torch.testing.assert_close(codec.decode(latents), back)  # float32, in parts
    assert codec._decoder.encoder is None and codec._decoder.quant_conv is None


def test_gradients_pass_through_the_decoder(vae, digits, monkeypatch):
    codec = Autoencoder(vae)
    latents = codec.encode(list(digits.main.samples[:4]))
    with torch.inference_mode():
        codec = Autoencoder(vae)
        codec.decode(latents)  # what is first read in here serves gradients too
    monkeypatch.setattr(codec_module, "PIXELS_AT_ONCE", 64 * 3)
    latents.requires_grad_(True)
    brightness(codec.decode(latents)).sum().backward()
    direction, step = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0)), 1e-2
    with torch.no_grad():
        ends = [brightness(codec.decode(latents + sign * step * direction)).double().sum() for sign in (1, -1)]
    slope = float((latents.grad * direction).sum())
    assert abs(slope) > 1e-2
    assert abs((float(ends[0] - ends[1]) / (2 * step)) - slope) < 0.05 * abs(slope)  # float32, and pixels cut off at 1


# -- the loop -----------------------------------------------------------------------------------------------------------


class Interrupting(LocalDual):
    """Asks for a checkpoint and an end at one dual step."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at = at

    def report(self, trial_id, attempt, dual_step, measurement):
        reply = super().report(trial_id, attempt, dual_step, measurement)
        return replace(reply, directive="interrupt") if dual_step == self.at else reply


def assigned(root: Path, kind: str, trial_id: str, **changes) -> Assignment:
    given = {"label": kind, "attempt": 1, "fixed_weight": None, "thresholds": {}}
    given |= {"trial_dir": str(root / "tiny" / "trials" / trial_id), "base_dir": str(root / "bases" / "one")}
    return Assignment(kind=kind, trial_id=trial_id, **given | changes)


def test_a_sweep_on_latents_resumes_to_the_same_bits_and_leaves_images(make_config, encoded, tmp_path, monkeypatch):
    config, root = make_config(), tmp_path / "runs"
    workspace = workspace_of(config)
    assert not workspace.schedule.scheduler.config.clip_sample
    assert run_trial(workspace, assigned(root, "base", "base"), LocalDual())["status"] == "completed"
    images = sum(encoded)
    asked = {"thresholds": dict.fromkeys(workspace.constraint_names, 0.1)}
    calm = assigned(root, "constrained", "calm", **asked)
    seen = []
    label = workspace.evaluation_labeller.label
    workspace._evaluation_labeller = replace(
        workspace.evaluation_labeller, label=lambda images: seen.append(images) or label(images)
    )
    result = run_trial(workspace, calm, LocalDual())
    assert [one.shape for one in seen] == [(64, 1, 8, 8)] * 2  # metric and histogram
    assert np.array_equal(seen[0], seen[1]) and np.abs(seen[0]).max() <= 1
    assert result["histogram"]["total"] == 64

    split, dual = assigned(root, "constrained", "split", **asked), Interrupting(5)
    assert run_trial(workspace_of(config), split, dual) is None
    again = run_trial(workspace_of(config), replace(split, attempt=2), dual)
    assert sum(encoded) == images  # by the first workspace alone
    folders = [Path(one.trial_dir) / "model" for one in (calm, split)]
    weights = [load_file(folder / "unet" / "diffusion_pytorch_model.safetensors") for folder in folders]
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())
    assert again["multipliers"] == result["multipliers"] and again["certificate"] == result["certificate"]

    kept = np.load(Path(calm.trial_dir) / "samples.npy")
    assert kept.shape == (40, 1, 8, 8) and np.array_equal(kept, seen[0][:40])
    folder = folders[0]
    assert sorted(path.name for path in folder.iterdir()) == ["autoencoder.json", "scheduler", "unet"]
    network = UNet2DModel.from_pretrained(folder, subfolder="unet")  # as a user reads it
    assert network.config.in_channels == 4 and network.config.sample_size == 4
    assert load_model(folder).network.config.in_channels == 4
    assert len(list((root / "bases" / "autoencoders").iterdir())) == 1

    shown = []
    monkeypatch.setattr("matplotlib.image.imsave", lambda path, picture: shown.append(picture.shape))
    draw_samples(folder, tmp_path / "four.png", count=4, steps=3, seed=0)
    assert shown == [(64, 64, 3)]  # four images of 8x8 in a square, each pixel four wide


def test_a_model_finds_its_autoencoder_by_what_it_holds(vae, digits, tmp_path):
    original, root = shutil.copytree(vae, tmp_path / "vae"), tmp_path / "runs"
    codec, model = Autoencoder(original), root / "sweep" / "trials" / "one" / "model"
    model.mkdir(parents=True)
    assert codec_of(model) is AS_THEY_ARE
    codec.encoded(digits, Store(root))
    codec.name_in(model)
    assert codec_of(model).folder == root / "bases" / "autoencoders" / codec.digest[:32]
    check_latents(model, codec)
    with pytest.raises(ValueError, match=r"give it as model\.autoencoder"):
        check_latents(model, AS_THEY_ARE)
    shutil.rmtree(root / "bases")
    assert codec_of(model).folder == original
    (original / "config.json").write_text((original / "config.json").read_text() + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match="restore one of them"):
        codec_of(model)
    with pytest.raises(ValueError, match=r"give it as model\.autoencoder"):
        check_latents(model, Autoencoder(original))


def test_a_pretrained_network_of_latents_becomes_the_base_without_any_encoding(make_config, vae, encoded, tmp_path):
    fresh = build_denoiser(make_config().to_dict()["model"], SHAPE, NoiseSchedule())
    save_model(fresh, NoiseSchedule(clip_sample=False), tmp_path / "mine", Autoencoder(vae))
    plan = preflight(make_config(model={"autoencoder": str(vae), "pretrained": str(tmp_path / "mine")}))
    adopt_pretrained(plan)
    assert encoded == []  # the driver encodes nothing
    workspace = Workspace(plan.config.to_dict(), plan.config.data, plan.store)
    base = workspace.load_base(plan.base_dir)
    assert torch.equal(base.network.conv_in.weight, fresh.network.conv_in.weight)
    assert workspace.modules()[0].network.config.in_channels == 4
    assert (plan.base_dir / "model" / "autoencoder.json").is_file()


def test_a_base_of_another_autoencoder_is_refused(make_config, vae, tmp_path):
    config, root = make_config(), tmp_path / "runs"
    other = shutil.copytree(vae, tmp_path / "other")
    run_trial(workspace_of(config), assigned(root, "base", "base"), LocalDual())
    (other / "config.json").write_text((other / "config.json").read_text() + "\n", encoding="utf-8")
    workspace = workspace_of(make_config(model={"autoencoder": str(other)}))
    with pytest.raises(ValueError, match="latents of another autoencoder"):
        workspace.load_base(root / "bases" / "one")


def test_rewards_are_of_decoded_images_and_move_the_weights_through_the_decoder(make_setting, vae, digits, tmp_path):
    codec = Autoencoder(vae)
    data = codec.encoded(digits, Store(tmp_path))
    options = {"rewards": {"up": {"kind": "brightness"}}, "gradient": "backpropagation"}
    options |= {"num_sampling_steps": 4, "pool": 32}
    setting = make_setting(
        data=data, codec=codec, names=("up",), unit="reward", options=options,
        schedule=NoiseSchedule(num_train_timesteps=50, clip_sample=False),
    )  # fmt: skip
    method = Alignment(setting)
    latents = torch.from_numpy(data.main.samples[:5])
    found = method.raw_values(latents, torch.zeros(5))
    assert torch.equal(found[0], brightness(codec.decode(latents)))
    latents.requires_grad_(True)
    (gradient,) = torch.autograd.grad(method.raw_values(latents, torch.zeros(5)).sum(), latents)
    assert float(gradient.abs().max()) > 1e-4
