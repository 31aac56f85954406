"""Text-to-image networks: prompts read once, a row of embeddings a condition, and the formulations that compare laws."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel, UNet2DModel
from safetensors.torch import load_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from dualsweep.orchestration.config import ConfigError, SweepConfig
from dualsweep.orchestration.local_dual import LocalDual
from dualsweep.orchestration.preflight import Plan, preflight
from dualsweep.orchestration.sampling import draw_samples
from dualsweep.orchestration.sweep import adopt_pretrained
from dualsweep.trainers import ratios
from dualsweep.trainers.assignment import Assignment
from dualsweep.trainers.loop import run_trial
from dualsweep.trainers.methods import base, composed
from dualsweep.trainers.models import load_model
from dualsweep.trainers.prompts import Prompts
from dualsweep.trainers.store import Store
from dualsweep.trainers.workspace import Workspace

TEXTS = {"main": "a digit", "four": "a four", "curved": "a zero or an eight"}
LETTERS = "abcdefghijklmnopqrstuvwxyz"
TOKENS, WIDTH = 24, 12
SETS = {"sets": {"four": {"classes": [4]}, "curved": {"classes": [0, 8]}}, "minority": None}
LEVELS = {"levels": 4, "pool": 16}
# method -> sections of a sweep that compares the laws of main and both sets through the network
COMPARING = {
    "esd": {
        "formulation": LEVELS,
        "dual": {"rule": "fixed", "start": 0.5, "step_size": None, "primal_steps_per_dual_step": 2},
        "thresholds": {"unit": "likelihood_ratio", "grid": {"sets": [0.5]}},
    },
    "unlearn_reverse_kl": {
        "formulation": LEVELS | {"sampling_levels": 4, "langevin_steps": 1, "primal": "distill"},
        "thresholds": {"unit": "nats", "grid": {"sets": [0.5]}},
    },
    "composition": {
        "formulation": LEVELS | {"sampling_levels": 4, "langevin_steps": 1, "law": "and"},
        "measure": {"num_samples": 16, "num_sampling_steps": 2, "window": 1},
        "thresholds": {"unit": "nats", "grid": {"sets": [0.5]}},
    },
}


def network_of(**changes) -> UNet2DConditionModel:
    return UNet2DConditionModel(**{
        "sample_size": 8, "in_channels": 1, "out_channels": 1, "block_out_channels": (8, 16), "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "norm_num_groups": 4, "attention_head_dim": 4,
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "cross_attention_dim": WIDTH, **changes,
    })  # fmt: skip


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory) -> Path:
    """A folder as Stable Diffusion's: unet, tokenizer and text encoder, tiny and untrained."""
    folder = tmp_path_factory.mktemp("pipeline")
    torch.manual_seed(0)
    network_of().save_pretrained(folder / "unet")
    words = ["<|startoftext|>", "<|endoftext|>", *LETTERS, *(f"{letter}</w>" for letter in LETTERS)]
    vocabulary = {word: number for number, word in enumerate(words)}
    CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=TOKENS).save_pretrained(folder / "tokenizer")
    config = CLIPTextConfig(
        vocab_size=len(words), hidden_size=WIDTH, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=TOKENS, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    CLIPTextModel(config).save_pretrained(folder / "text_encoder")
    return folder


@pytest.fixture
def read(monkeypatch) -> list[int]:
    """How many texts went through a text encoder, by call."""
    counts, forward = [], CLIPTextModel.forward

    def counted(self, input_ids, *given, **named):
        counts.append(len(input_ids))
        return forward(self, input_ids, *given, **named)

    monkeypatch.setattr(CLIPTextModel, "forward", counted)
    return counts


@pytest.fixture
def make_config(tiny_config, pipeline):
    """`make(method, **sections)`: a tiny sweep of a method that compares laws, on the pipeline's network."""

    def make(method: str = "esd", **sections) -> SweepConfig:
        given = {"method": method, "data": SETS, "model": {"pretrained": str(pipeline), "prompts": TEXTS}}
        given |= COMPARING[method]
        return tiny_config(**given | sections)

    return make


def workspace_of(plan: Plan) -> Workspace:
    return Workspace(plan.config.to_dict(), plan.config.data, plan.store)


# -- the table ----------------------------------------------------------------------------------------------------------


def test_a_condition_is_the_prompt_of_its_set(pipeline, tmp_path):
    table = Prompts(pipeline, TEXTS).embeddings(Store(tmp_path))
    assert table.shape == (3, TOKENS, WIDTH) and table.dtype == torch.float32
    tokenizer = CLIPTokenizer.from_pretrained(pipeline / "tokenizer")
    encoder = CLIPTextModel.from_pretrained(pipeline / "text_encoder").eval()
    denoiser, network = (
        load_model(pipeline, table).eval(),
        UNet2DConditionModel.from_pretrained(pipeline / "unet").eval(),
    )
    x_t, timestep = torch.randn(3, 1, 8, 8), torch.tensor([3, 40, 700])
    with torch.no_grad():
        for row, text in enumerate(TEXTS.values()):
            given = tokenizer(text, padding="max_length", max_length=TOKENS, return_tensors="pt").input_ids
            torch.testing.assert_close(table[row : row + 1], encoder(given).last_hidden_state)  # float32, another batch
        answers = denoiser(x_t, timestep, torch.tensor([2, 0, 1]))
        expected = network(x_t, timestep, encoder_hidden_states=table[[2, 0, 1]]).sample
        assert torch.equal(answers, expected)
        assert torch.equal(denoiser(x_t, timestep), denoiser(x_t, timestep, torch.zeros(3, dtype=torch.int64)))
    assert (answers - denoiser(x_t, timestep)).flatten(1).abs().amax(1).gt(1e-6).tolist() == [True, False, True]
    assert denoiser.num_conditions == 3 and not any("prompts" in name for name in denoiser.state_dict())


def test_prompts_are_read_once_and_again_for_other_texts_or_another_encoder(pipeline, read, tmp_path):
    store, other = Store(tmp_path / "runs"), shutil.copytree(pipeline, tmp_path / "other")
    first = Prompts(pipeline, TEXTS).embeddings(store)
    assert torch.equal(Prompts(pipeline, TEXTS).embeddings(store), first) and read == [3]
    encoder = CLIPTextModel.from_pretrained(other / "text_encoder")
    with torch.no_grad():
        next(encoder.parameters()).mul_(2)
    encoder.save_pretrained(other / "text_encoder")
    swapped = {"main": TEXTS["four"], "four": TEXTS["main"]}
    others = [Prompts(other, TEXTS), Prompts(pipeline, TEXTS | {"main": "a nine"}), Prompts(pipeline, swapped)]
    tables = [one.embeddings(store) for one in others]
    assert read == [3, 3, 3, 2] and len({one.digest for one in [*others, Prompts(pipeline, TEXTS)]}) == 4
    torch.testing.assert_close(tables[2], first[[1, 0]])
    assert not torch.equal(tables[0], first)


# -- the loop -----------------------------------------------------------------------------------------------------------


class Interrupting(LocalDual):
    """Asks for a checkpoint and an end at one dual step."""

    def report(self, trial_id, attempt, dual_step, measurement):
        reply = super().report(trial_id, attempt, dual_step, measurement)
        return replace(reply, directive="interrupt") if dual_step == 3 else reply


@pytest.mark.parametrize("method", ["composition", "unlearn_reverse_kl", pytest.param("esd", marks=pytest.mark.heavy)])
def test_laws_are_compared_through_prompts_and_resume_to_the_same_bits(
    make_config, read, tmp_path, monkeypatch, method
):
    for module, name in ((base, "CALIBRATION_DRAWS"), (composed, "CALIBRATION_DRAWS"), (composed, "DUAL_VALUE_DRAWS")):
        monkeypatch.setattr(module, name, 16)  # thousands of images through 64 noise levels would take minutes
    monkeypatch.setattr(ratios, "FEWEST_LEVELS", 4)
    plan = preflight(make_config(method, primal={"steps": 8, "num_shards": 1}, evaluation={"num_samples": 16}))
    adopt_pretrained(plan)
    workspace = workspace_of(plan)
    assert read == [3]  # when the network became the sweep's base
    point = next(point for point in plan.points if point["kind"] == "constrained")

    def assigned(name: str, attempt: int = 1) -> Assignment:
        given = {key: point[key] for key in ("label", "kind", "thresholds", "fixed_weight")}
        folders = {"trial_dir": str(plan.folder / "trials" / name), "base_dir": str(plan.base_dir)}
        return Assignment(trial_id=name, attempt=attempt, **given, **folders)

    result = run_trial(workspace, assigned("calm"), LocalDual())
    assert result["status"] == "completed" and [row["name"] for row in result["constraints"]] == ["four", "curved"]
    dual = Interrupting()
    assert run_trial(workspace_of(plan), assigned("split"), dual) is None
    again = run_trial(workspace_of(plan), assigned("split", 2), dual)
    assert again["multipliers"] == result["multipliers"] and again["constraints"] == result["constraints"]
    assert read == [3]
    folders = [plan.folder / "trials" / name / "model" for name in ("calm", "split")]
    weights = [load_file(folder / "unet" / "diffusion_pytorch_model.safetensors") for folder in folders]
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())
    loaded = load_model(folders[0])  # without its text encoder
    assert isinstance(loaded.network, UNet2DConditionModel) and torch.equal(loaded.prompts, workspace.prompts)
    draw_samples(folders[0], tmp_path / "four.png", count=4, steps=3, seed=0)
    preflight(make_config(method, name="on", model={"pretrained": str(folders[0])}))  # and it can be continued from


# -- what is refused ----------------------------------------------------------------------------------------------------


def without(folder: Path, part: str) -> None:
    shutil.rmtree(folder / part)


def with_network(folder: Path, network) -> None:
    shutil.rmtree(folder / "unet")
    network.save_pretrained(folder / "unet")


def cut(folder: Path) -> None:
    weights = folder / "text_encoder" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def of_velocities(folder: Path) -> None:
    DDPMScheduler(prediction_type="v_prediction").save_pretrained(folder / "scheduler")


PLAIN = {
    "sample_size": 8, "in_channels": 1, "out_channels": 1, "layers_per_block": 1, "norm_num_groups": 4,
    "block_out_channels": (8, 8), "down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2,
}  # fmt: skip
FOLDERS = {
    "no text encoder": (lambda folder: without(folder, "text_encoder"), r"no folder 'text_encoder'"),
    "no tokenizer": (lambda folder: without(folder, "tokenizer"), r"no folder 'tokenizer'"),
    "a text encoder cut short": (cut, r"text_encoder cannot be loaded"),
    "a network of velocities": (of_velocities, r"predicts 'v_prediction'"),
    "a network of another width": (
        lambda folder: with_network(folder, network_of(cross_attention_dim=8)),
        r"embeddings of width 12, unet takes 8",
    ),
    "a network that takes no text": (lambda folder: with_network(folder, UNet2DModel(**PLAIN)), r"takes no text"),
    "a network that wants more": (
        lambda folder: with_network(folder, network_of(num_class_embeds=2)),
        r"wants more than a text \(num_class_embeds=2\)",
    ),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_a_folder_that_is_no_text_to_image_pipeline_is_refused_by_name(case, make_config, pipeline, tmp_path):
    change, message = FOLDERS[case]
    folder = shutil.copytree(pipeline, tmp_path / "bad")
    change(folder)
    with pytest.raises(ConfigError, match=message) as caught:
        preflight(make_config(model={"pretrained": str(folder), "prompts": TEXTS}))
    assert str(folder) in str(caught.value)
    assert not (tmp_path / "runs").exists()


PROMPTS = {
    "none": (None, r"model\.prompts is missing: .*text-to-image network"),
    "no main": ({"four": "a four", "curved": "an eight"}, r"model\.prompts\.main is missing"),
    "a set without one": ({"main": "a digit", "four": "a four"}, r"model\.prompts\.curved is missing: method esd"),
    "an unknown set": (
        TEXTS | {"five": "a five"},
        r"model\.prompts\.five: method esd asks .* main, four, curved alone",
    ),
    "a blank one": (TEXTS | {"four": "  "}, r"model\.prompts\.four is empty"),
    "a long one": (TEXTS | {"four": "four " * TOKENS}, r"model\.prompts\.four has \d+ tokens, .* 24: shorten it"),
}


@pytest.mark.parametrize("case", PROMPTS)
def test_prompts_that_do_not_fit_the_sets_are_refused_by_name(case, make_config, pipeline, tmp_path):
    prompts, message = PROMPTS[case]
    with pytest.raises(ConfigError, match=message):
        preflight(make_config(model={"pretrained": str(pipeline), "prompts": prompts}))
    assert not (tmp_path / "runs").exists()


def test_prompts_without_a_network_are_refused(make_config):
    with pytest.raises(ConfigError, match=r"model\.prompts need a text-to-image network"):
        make_config(model={"prompts": TEXTS})


def test_a_method_of_one_law_takes_mains_prompt_alone(tiny_config, pipeline):
    given = {"pretrained": str(pipeline), "prompts": {"main": "a digit"}}
    assert preflight(tiny_config(model=given)).constraint_names == ("digit_4", "digit_7")
    with pytest.raises(ConfigError, match=r"model\.prompts\.digit_4: method fairness asks the network for main alone"):
        preflight(tiny_config(model=given | {"prompts": {"main": "a digit", "digit_4": "a four"}}))


def test_latents_and_prompts_go_together_in_the_layout_of_stable_diffusion(tiny_config, pipeline, tmp_path):
    folder = shutil.copytree(pipeline, tmp_path / "sd")
    with_network(folder, network_of(sample_size=4, in_channels=2, out_channels=2))
    AutoencoderKL(
        in_channels=1, out_channels=1, block_out_channels=(4, 4), latent_channels=2, norm_num_groups=2,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    ).save_pretrained(folder / "vae")  # fmt: skip
    given = {"pretrained": str(folder), "autoencoder": str(folder), "prompts": {"main": "a digit"}}
    plan = preflight(tiny_config(model=given, primal={"steps": 4}, evaluation={"num_samples": 16}))
    adopt_pretrained(plan)
    point = next(point for point in plan.points if point["kind"] == "constrained")
    folders = {"trial_dir": str(plan.folder / "trials" / "one"), "base_dir": str(plan.base_dir)}
    result = run_trial(workspace_of(plan), Assignment(**point | folders, attempt=1), LocalDual())
    assert result["status"] == "completed" and result["histogram"]["total"] == 16
    assert np.load(plan.folder / "trials" / "one" / "samples.npy").shape == (16, 1, 8, 8)
    left = sorted(path.name for path in (plan.folder / "trials" / "one" / "model").iterdir())
    assert left == ["autoencoder.json", "prompts.safetensors", "scheduler", "unet"]
    draw_samples(plan.folder / "trials" / "one" / "model", tmp_path / "four.png", count=4, steps=3, seed=0)
