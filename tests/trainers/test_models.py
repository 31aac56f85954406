"""Models on disk: the diffusers layout, and errors that name the folder or the field."""

import json
import shutil

import pytest
import torch
from diffusers import DDPMPipeline, UNet2DModel

from dualsweep.trainers import models
from dualsweep.trainers.mlp import MLPDenoiser
from dualsweep.trainers.models import (
    Denoiser,
    build_denoiser,
    check_image_size,
    load_model,
    load_schedule,
    save_model,
)
from dualsweep.trainers.noise_schedule import NoiseSchedule

UNET = {
    "kind": "unet",
    "channels": [8, 16],
    "layers_per_block": 1,
    "attention": None,
    "norm_groups": 8,
    "width": 1,
    "depth": 1,
}
MLP = {**UNET, "kind": "mlp", "width": 16, "depth": 2}
SCHEDULE = NoiseSchedule(kind="scaled_linear", num_train_timesteps=70, beta_start=2e-4, beta_end=0.05, clip_sample=True)


def make(model, shape) -> Denoiser:
    torch.manual_seed(0)
    return build_denoiser(model, shape, SCHEDULE)


def answers(denoiser, shape) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    with torch.inference_mode():
        return denoiser.eval()(torch.randn(3, *shape, generator=generator), torch.tensor([0, 30, 69]))


@pytest.fixture(scope="module")
def unet_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unet")
    save_model(make(UNET, (1, 8, 8)), SCHEDULE, folder)
    return folder


@pytest.mark.parametrize(
    "model, shape",
    [(UNET, (1, 8, 8)), ({**UNET, "attention": [False, True]}, (3, 8, 4)), (MLP, (2,))],
    ids=["unet", "unet with attention", "mlp"],
)
def test_a_saved_model_answers_the_same_after_loading(tmp_path, model, shape):
    denoiser = make(model, shape)
    save_model(denoiser, SCHEDULE, tmp_path / "model")
    loaded = load_model(tmp_path / "model")
    assert answers(denoiser, shape).shape == (3, *shape)
    assert torch.equal(answers(loaded, shape), answers(denoiser, shape))
    assert loaded.state_dict().keys() == denoiser.state_dict().keys()
    stored = [path.name for path in (tmp_path / "model").rglob("*") if path.is_file()]
    assert any(name.endswith(".safetensors") for name in stored)
    assert not any(name.endswith((".bin", ".pt", ".pkl")) for name in stored)  # nothing that unpickles


def test_attention_sits_at_the_same_levels_on_the_way_down_and_up():
    config = make({**UNET, "attention": [False, True]}, (1, 8, 8)).network.config
    assert config["down_block_types"] == ("DownBlock2D", "AttnDownBlock2D")
    assert config["up_block_types"] == ("AttnUpBlock2D", "UpBlock2D")
    assert "Attn" not in str(make(UNET, (1, 8, 8)).network.config["down_block_types"])


def test_the_timestep_and_every_sample_matter_to_the_mlp():
    denoiser = make(MLP, (2,))
    x_t = torch.ones(2, 2)
    first, second = denoiser(x_t, torch.tensor([0, 60]))
    assert not torch.allclose(first, second)


def test_diffusers_own_pipeline_loads_and_samples_the_folder(unet_folder):
    pipeline = DDPMPipeline.from_pretrained(unet_folder)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(
        batch_size=2, num_inference_steps=3, output_type="np", generator=torch.Generator().manual_seed(0)
    ).images
    assert images.shape == (2, 8, 8, 1)
    assert pipeline.scheduler.config.num_train_timesteps == 70
    loaded = load_model(unet_folder)
    assert torch.equal(answers(Denoiser(pipeline.unet), (1, 8, 8)), answers(loaded, (1, 8, 8)))


def test_a_bare_diffusers_unet_folder_loads_too(unet_folder):
    assert torch.equal(
        answers(load_model(unet_folder / "unet"), (1, 8, 8)), answers(load_model(unet_folder), (1, 8, 8))
    )


def test_the_stored_schedule_comes_back(unet_folder):
    loaded = load_schedule(unet_folder)
    assert loaded.alpha_bar.tolist() == SCHEDULE.alpha_bar.tolist()
    stored, given = ({k: v for k, v in s.scheduler.config.items() if k[0] != "_"} for s in (loaded, SCHEDULE))
    assert stored == given  # private entries say which version wrote them


def narrower(folder):
    path = folder / "unet" / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(config | {"block_out_channels": [8, 8]}), encoding="utf-8")


WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
BAD_FOLDERS = {
    "no unet": lambda folder: shutil.rmtree(folder / "unet"),
    "no weights": lambda folder: (folder / WEIGHTS).unlink(),
    "weights cut short": lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:1000]),
    "weights not safetensors": lambda folder: (folder / WEIGHTS).write_bytes(b"x" * 4000),
    "config not JSON": lambda folder: (folder / "unet" / "config.json").write_text("{", encoding="utf-8"),
    "weights of another width": narrower,
}


@pytest.mark.parametrize("fault", BAD_FOLDERS)
def test_a_bad_folder_is_a_value_error_that_names_it(unet_folder, tmp_path, fault):
    folder = shutil.copytree(unet_folder, tmp_path / "bad")
    BAD_FOLDERS[fault](folder)
    with pytest.raises(ValueError) as caught:
        load_model(folder)
    assert str(folder) in str(caught.value)


def test_an_mlp_folder_cut_short_is_a_value_error_that_names_it(tmp_path):
    save_model(make(MLP, (2,)), SCHEDULE, tmp_path)
    weights = tmp_path / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:500])
    with pytest.raises(ValueError, match=r"model '.*cannot be loaded") as caught:
        load_model(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_an_empty_folder_is_a_value_error_that_names_it(tmp_path):
    for load in (load_model, load_schedule):
        with pytest.raises(ValueError) as caught:
            load(tmp_path)
        assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("shape", [(1, 9, 8), (1, 8, 7), (3, 5, 5)])
def test_an_image_size_that_does_not_halve_names_the_field_and_the_remedy(shape):
    with pytest.raises(ValueError, match=r"model\.channels=\[8, 16\].*data\.size"):
        build_denoiser(UNET, shape, SCHEDULE)


def test_image_sizes_that_halve_pass():
    check_image_size({"channels": [8, 16, 16]}, (1, 12, 4))
    check_image_size({"channels": [8]}, (1, 7, 5))


def test_an_mlp_stays_an_mlp(tmp_path):
    save_model(make(MLP, (2,)), SCHEDULE, tmp_path)
    network = load_model(tmp_path).network
    assert isinstance(network, MLPDenoiser)
    assert network.config["dim"] == 2 and network.config["num_train_timesteps"] == 70


@pytest.mark.parametrize("conditions", [0, 3])
def test_images_too_many_for_the_cache_go_through_in_several_forwards_with_the_same_answer(monkeypatch, conditions):
    """12 images of 64x64 under 8 channels: 128 KiB each of the widest activation, so 1.5 MiB; allowed are 0.5 MiB."""
    torch.manual_seed(0)
    model = build_denoiser({**UNET, "channels": [8, 8]}, (1, 64, 64), SCHEDULE, num_conditions=conditions)
    x_t, timestep = torch.randn(12, 1, 64, 64), torch.arange(12) * 5
    condition = torch.arange(12) % 3 if conditions else None
    sizes = []
    model.network.register_forward_pre_hook(lambda network, given: sizes.append(len(given[0])))

    def answer():
        model.zero_grad()
        prediction = model(x_t, timestep, condition)
        prediction.square().mean().backward()
        return prediction.detach(), [p.grad.clone() for p in model.parameters()]

    whole, gradients = answer()
    monkeypatch.setattr(models, "CACHED_BYTES", 2**19)
    split, added = answer()
    assert sizes == [12, 4, 4, 4]
    torch.testing.assert_close(split, whole, rtol=1e-5, atol=1e-5)  # float32, maybe other kernels
    for one, other in zip(added, gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)  # and sums over pixels in another order


def test_a_pretrained_models_dropout_is_off_so_that_a_resumed_run_is_the_same(tmp_path):
    network = make(UNET, (1, 8, 8)).network
    fields = {key: value for key, value in network.config.items() if not key.startswith("_")}
    UNet2DModel(**{**fields, "dropout": 0.5}).save_pretrained(tmp_path)
    denoiser, x_t = load_model(tmp_path).train(), torch.ones(2, 1, 8, 8)
    first, second = (denoiser(x_t, torch.tensor([3, 7])) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("how", ["in place", "replaced", "moved"])
def test_an_mlp_whose_schedule_changed_forgets_the_old_ones_features(how):
    """The output against its formula, before and after; what depends on the timestep alone is kept between calls."""
    torch.manual_seed(0)
    network = MLPDenoiser(dim=2, width=16, depth=1, num_train_timesteps=50)
    x_t, timestep = torch.randn(6, 2), torch.tensor([0, 7, 7, 20, 33, 49])

    def direct():
        power = network.alpha_bar[timestep][:, None]
        level = (power.log() - (-power).log1p()) / 10
        phase = level * network.frequencies
        hidden = network.enter(torch.cat([x_t, level, phase.sin(), phase.cos()], dim=1))
        for block in network.blocks:
            hidden = hidden + block(hidden)
        noise = 1 - power
        scale = (power * noise / (noise + network.detail**2)).sqrt()
        return noise.sqrt() * x_t + scale * network.leave(hidden)

    before = network(x_t, timestep)
    assert torch.allclose(before, direct(), rtol=0, atol=1e-6)
    other = torch.linspace(0.95, 0.02, 50)
    if how == "in place":
        network.alpha_bar.copy_(other)
    elif how == "replaced":
        network.alpha_bar = other
    else:
        network.load_state_dict({**network.state_dict(), "alpha_bar": other}, assign=True)
    after = network(x_t, timestep)
    assert torch.allclose(after, direct(), rtol=0, atol=1e-6) and not torch.allclose(after, before, atol=1e-2)
