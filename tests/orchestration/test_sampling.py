"""`dualsweep sample` on every kind of model a sweep leaves, and the closing table of the command line."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from dualsweep.cli import _closing_table
from dualsweep.orchestration.config import ConfigError
from dualsweep.orchestration.sampling import draw_samples
from dualsweep.trainers.annealed import AnnealedSampler
from dualsweep.trainers.chains import build_chain, save_chain
from dualsweep.trainers.methods.composed import ComposedLaw, save_composition
from dualsweep.trainers.models import build_denoiser, save_model
from dualsweep.trainers.noise_schedule import NoiseSchedule
from dualsweep.trainers.samplers import ddim_sample, starting_noise

STEPS = {"num_train_timesteps": 50, "beta_end": 0.2}
MLP = {"kind": "mlp", "width": 16, "depth": 1}
UNET = {"kind": "unet", "channels": [8, 16], "layers_per_block": 1, "attention": None, "norm_groups": 4}


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def vectors(tmp_path):
    """A trial's model of the plane that tells three laws apart, in the folder of its sweep."""
    torch.manual_seed(3)
    schedule = NoiseSchedule(**STEPS, clip_sample=False)
    denoiser = build_denoiser(MLP, (2,), schedule, num_conditions=3)
    folder = tmp_path / "plane" / "trials" / "a"
    folder.mkdir(parents=True)
    save_model(denoiser, schedule, folder / "model")
    return folder / "model", denoiser, schedule


def test_a_model_with_a_chain_is_sampled_by_it(vectors, tmp_path):
    model, denoiser, schedule = vectors
    chain = build_chain(schedule, 8)
    save_chain(chain, model)
    _, array = draw_samples(model, tmp_path / "points.png", count=40, steps=10, seed=7)
    expected = chain.sample(denoiser.eval(), start_of(40, (2,)), seed=7)
    np.testing.assert_array_equal(np.load(array), expected.detach().numpy())
    text = (model / "chain.json").read_text(encoding="utf-8")
    for damaged in (text[:-9], text.replace('"stds": [', '"stds": [0.0,')):
        (model / "chain.json").write_text(damaged, encoding="utf-8")
        with pytest.raises(ConfigError, match=r"chain\.json"):
            draw_samples(model, tmp_path / "points.png", count=4, steps=10, seed=7)


class UnderCondition(torch.nn.Module):
    """A denoiser that is always asked for one law."""

    def __init__(self, denoiser, condition):
        super().__init__()
        self.denoiser, self.condition = denoiser, condition

    def forward(self, x_t, timestep):
        return self.denoiser(x_t, timestep, torch.full_like(timestep, self.condition))


def start_of(count, shape, seed=7):
    return starting_noise(seed=seed, counter=0, shards=[0], counts={0: count}, shape=shape)


def test_vectors_are_numbers_and_a_picture_under_the_main_law(vectors, tmp_path):
    model, denoiser, schedule = vectors
    picture, array = draw_samples(model, tmp_path / "points.png", count=40, steps=10, seed=7)
    found = np.load(array)
    expected = ddim_sample(denoiser, start_of(40, (2,)), schedule, num_sampling_steps=10)
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-6)
    wrong = ddim_sample(UnderCondition(denoiser, 1), start_of(40, (2,)), schedule, num_sampling_steps=10)
    assert np.abs(found - wrong.numpy()).max() > 1e-3
    with Image.open(picture) as image:
        assert image.format == "PNG" and np.asarray(image.convert("L")).std() > 5


def test_a_model_without_its_scheduler_is_refused(vectors, tmp_path):
    shutil.rmtree(vectors[0] / "scheduler")
    with pytest.raises(ConfigError, match="no noise schedule"):
        draw_samples(vectors[0], tmp_path / "points.png", count=4, steps=10, seed=7)


def test_a_composed_law_is_drawn_by_its_own_sampler(vectors, tmp_path):
    _, denoiser, schedule = vectors
    law = ComposedLaw(
        law="product",
        coefficients=(0.0, 0.5, 0.5),
        names=("near", "far"),
        sampler=AnnealedSampler(levels=6, langevin_steps=1),
        schedule={"kind": "linear", "beta_start": 1e-4, **STEPS, "clip_sample": False},
    )
    folder = tmp_path / "composed"
    save_composition(denoiser, law, schedule, folder)
    _, array = draw_samples(folder, tmp_path / "points.png", count=40, steps=10, seed=7)
    expected = law.sample(denoiser.eval(), start_of(40, (2,)), schedule, num_sampling_steps=10)
    np.testing.assert_allclose(np.load(array), expected.numpy(), atol=1e-5)
    main = ddim_sample(denoiser, start_of(40, (2,)), schedule, num_sampling_steps=10)
    assert np.abs(np.load(array) - main.numpy()).max() > 1e-2
    save_composition(denoiser, replace(law, coefficients=(0.5, 0.5)), schedule, folder)
    with pytest.raises(ConfigError, match="2 coefficients for a model of 3 conditions"):
        draw_samples(folder, tmp_path / "points.png", count=4, steps=10, seed=7)
    (folder / "composition.json").write_text("{", encoding="utf-8")
    with pytest.raises(ConfigError, match="no composition can be read"):
        draw_samples(folder, tmp_path / "points.png", count=4, steps=10, seed=7)


@pytest.mark.parametrize("conditions", [0, 3])
def test_images_are_a_square_grid(tmp_path, conditions):
    torch.manual_seed(3)
    schedule = NoiseSchedule(**STEPS)
    denoiser = build_denoiser(UNET, (1, 8, 8), schedule, num_conditions=conditions)
    save_model(denoiser, schedule, tmp_path / "model")
    (picture,) = draw_samples(tmp_path / "model", tmp_path / "grid.png", count=5, steps=4, seed=7)
    expected = ddim_sample(denoiser, start_of(5, (1, 8, 8)), schedule, num_sampling_steps=4).numpy()
    with Image.open(picture) as image:
        pixels = np.asarray(image.convert("L")) / 255
    assert pixels.shape == (3 * 8 * 4, 3 * 8 * 4)
    np.testing.assert_allclose(pixels[:32:4, 32:64:4], (expected[1, 0].clip(-1, 1) + 1) / 2, atol=0.01)  # 8 bits
    assert (pixels[64:, 64:] == 0).all()  # five of nine places are taken


@pytest.mark.parametrize(("out", "words"), [("points.txt", "ends in .png"), ("nowhere/points.png", "make it first")])
def test_a_picture_that_cannot_be_written_is_refused_before_drawing(vectors, tmp_path, out, words):
    with pytest.raises(ConfigError, match=words):
        draw_samples(vectors[0], tmp_path / out, count=4, steps=10, seed=7)


def point_row(label, **changes):
    row = {"label": label, "status": "completed", "verdict": "", "on_front": False, "unit": "nats", "sense": ">="}
    row |= {"requested": float("nan"), "achieved": 1.9, "achieved_stderr": 0.01, "warnings": ""}
    row |= {"objective": 0.1, "objective_stderr": 0.002, "objective_unit": "nats"}
    return {**row, **changes}


def test_the_closing_table_words_the_unit_in_its_sense(capsys):
    rows = [point_row("unconstrained"), point_row("sets >= 3 nats", requested=3.0, achieved=3.1, verdict="feasible")]
    console = Console(width=160)
    console.print(_closing_table(rows))
    text = capsys.readouterr().out
    assert "asked ≥ (nats)" in text and "smallest divergence (nats)" in text and "cost (nats)" in text
    last = next(line for line in text.splitlines() if "sets >= 3" in line)
    assert [cell.strip() for cell in last.strip("│ ").split("│")][2:6] == [
        "3",
        "3.100 ± 0.020",
        "0.1000 ± 0.0039",
        "feasible",
    ]
    assert "signs of trouble" not in text
    console.print(_closing_table([*rows, point_row("b", sense="<=", warnings="plateau (near)")]))
    assert "plateau (near)" in capsys.readouterr().out
    console.print(_closing_table([point_row("a", unit="share", sense="<=", requested=0.05, achieved=0.04)]))
    text = capsys.readouterr().out
    assert "largest share (%)" in text and "asked ≤ (%)" in text and "│ 5 " in text and "4.0 ± 2.0" in text
