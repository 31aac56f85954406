"""Denoisers behind one interface, ``denoiser(x_t, timestep, condition) -> noise prediction``, and their layout on disk.

diffusers is imported where it is used: it takes seconds, and checking a sweep needs none of it.
"""

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from dualsweep.trainers.codec import AS_THEY_ARE, Autoencoder, Codec
from dualsweep.trainers.noise_schedule import NoiseSchedule

PROMPTS_FILE = "prompts.safetensors"  # in a model's folder: what its text encoder said of its prompts
CACHED_BYTES = 2**21  # of the widest activation: above it one forward of many images is slower than several of few


class Denoiser(nn.Module):
    """Calls the wrapped network and unwraps diffusers' output objects; parameters keep the network's own names.

    A condition is an int64 (batch,): 0 stands for the main law q, i for the i-th constraint set; None means 0.

    Args: prompts: embeddings (num_conditions, tokens, width) of a text-to-image network's prompts, see prompts.py. They are no
        weights: they are in no state dict, and `save_model` writes them beside the network.
    """

    def __init__(self, network: nn.Module, prompts: torch.Tensor | None = None) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("prompts", prompts, persistent=False)

    @property
    def num_conditions(self) -> int:
        """How many laws the network tells apart; 0 where it takes no condition."""
        if self.prompts is not None:
            return len(self.prompts)
        return int(getattr(self.network.config, "num_conditions", None) or self._class_embeds or 0)

    @property
    def takes_text(self) -> bool:
        """Whether the network wants embeddings of a text, which are `prompts`."""
        return "cross_attention_dim" in self.network.config

    @property
    def _class_embeds(self) -> int | None:
        return getattr(self.network.config, "num_class_embeds", None)

    def forward(self, x_t: torch.Tensor, timestep: torch.Tensor, condition: torch.Tensor | None = None) -> torch.Tensor:
        parts = self._num_parts(x_t)
        if parts == 1:
            return self._whole(x_t, timestep, condition)
        given = (None,) * parts if condition is None else condition.tensor_split(parts)
        split = zip(x_t.tensor_split(parts), timestep.tensor_split(parts), given, strict=True)
        return torch.cat([self._whole(*part) for part in split])

    def _num_parts(self, x_t: torch.Tensor) -> int:
        """Into how many forwards a batch of images is split on the CPU, by its size alone; see docs/performance.md."""
        channels = getattr(self.network.config, "block_out_channels", None)
        if channels is None or x_t.device.type != "cpu":
            return 1
        widest = channels[0] * x_t.shape[-2] * x_t.shape[-1] * x_t.element_size()
        return min(len(x_t), math.ceil(len(x_t) * widest / CACHED_BYTES)) or 1

    def _whole(self, x_t: torch.Tensor, timestep: torch.Tensor, condition: torch.Tensor | None) -> torch.Tensor:
        if self._class_embeds or self.prompts is not None:
            given = timestep.new_zeros(len(x_t)) if condition is None else condition
            if self.prompts is not None:
                return self.network(x_t, timestep, encoder_hidden_states=self.prompts[given]).sample
            return self.network(x_t, timestep, class_labels=given).sample
        if self.num_conditions:
            return self.network(x_t, timestep, condition)
        output = self.network(x_t, timestep)
        return output if isinstance(output, torch.Tensor) else output.sample


def build_denoiser(
    model: dict[str, Any], sample_shape: tuple[int, ...], schedule: NoiseSchedule, *, num_conditions: int = 0
) -> Denoiser:
    """A freshly initialised denoiser.

    Args:
        model: the `model` section of the config.
        sample_shape: (channels, height, width) for `unet`, (dim,) for `mlp`.
        num_conditions: laws it tells apart by a condition; 0 for one law and no embedding.
    Raises: ValueError when height or width do not halve once a level.
    """
    if model["kind"] == "mlp":
        from dualsweep.trainers.mlp import MLPDenoiser

        (dim,) = sample_shape
        network = MLPDenoiser(
            dim=dim,
            width=model["width"],
            depth=model["depth"],
            num_train_timesteps=schedule.num_train_timesteps,
            num_conditions=num_conditions,
        )
        network.alpha_bar.copy_(torch.from_numpy(schedule.alpha_bar))
        return Denoiser(network)
    from diffusers import UNet2DModel

    check_image_size(model, sample_shape)
    channels, height, width = sample_shape
    levels = len(model["channels"])
    attention = model["attention"] or [False] * levels
    network = UNet2DModel(
        sample_size=height if height == width else (height, width),
        in_channels=channels,
        out_channels=channels,
        layers_per_block=model["layers_per_block"],
        block_out_channels=tuple(model["channels"]),
        down_block_types=tuple("AttnDownBlock2D" if on else "DownBlock2D" for on in attention),
        up_block_types=tuple("AttnUpBlock2D" if on else "UpBlock2D" for on in reversed(attention)),
        norm_num_groups=model["norm_groups"],
        add_attention=any(attention),
        num_class_embeds=num_conditions or None,
    )
    return Denoiser(network)


def check_image_size(model: dict[str, Any], sample_shape: tuple[int, ...]) -> None:
    """Raises: ValueError naming model.channels when the images, or their latents, do not halve once a level."""
    what = "latents" if model.get("autoencoder") else "images"
    factor = 2 ** (len(model["channels"]) - 1)
    if sample_shape[-1] % factor or sample_shape[-2] % factor:
        raise ValueError(
            f"model.channels={list(model['channels'])} halves {what} {len(model['channels']) - 1} times, but their size "
            f"{sample_shape[-2]}x{sample_shape[-1]} is not a multiple of {factor}: set data.size to one or use fewer levels"
        )


def save_model(denoiser: Denoiser, schedule: NoiseSchedule, folder: Path, codec: Codec = AS_THEY_ARE) -> None:
    """Write the diffusers layout: a DDPMPipeline for U-Nets, a model folder with its scheduler for vectors.

    A U-Net of latents is left without a pipeline, which would show latents as if they were images, and so is one of prompts:
    `unet`, `scheduler`, the name of the autoencoder, the embeddings of the prompts. Safetensors only.
    """
    from diffusers import DDPMPipeline, UNet2DModel

    from dualsweep.trainers.mlp import MLPDenoiser

    if isinstance(denoiser.network, MLPDenoiser):
        denoiser.network.save_pretrained(folder, safe_serialization=True)
        schedule.scheduler.save_pretrained(folder / "scheduler")
    elif isinstance(denoiser.network, UNet2DModel) and not isinstance(codec, Autoencoder):
        DDPMPipeline(unet=denoiser.network, scheduler=schedule.scheduler).save_pretrained(
            folder, safe_serialization=True
        )
    else:
        denoiser.network.save_pretrained(folder / "unet", safe_serialization=True)
        schedule.scheduler.save_pretrained(folder / "scheduler")
        codec.name_in(folder)
        if denoiser.prompts is not None:
            save_file({"embeddings": denoiser.prompts.cpu()}, folder / PROMPTS_FILE)


def load_model(folder: str | Path, prompts: torch.Tensor | None = None) -> Denoiser:
    """Read what `save_model` wrote, or any diffusers folder that holds a UNet2DModel or a UNet2DConditionModel, or hub name
    of the former.

    Its dropout is switched off: it draws from a generator that is in no checkpoint, so a resumed run would be another one.
    Args: prompts: embeddings of a text-to-image network's prompts; None: those in the folder, if there are any.
    Raises: ValueError naming the folder when it is not such a model.
    """
    denoiser = _read_model(str(folder), prompts)
    for module in denoiser.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return denoiser


def _read_model(folder: str, prompts: torch.Tensor | None) -> Denoiser:
    from diffusers import UNet2DConditionModel, UNet2DModel

    from dualsweep.trainers.mlp import MLPDenoiser

    root = Path(folder)
    alone = (root / "config.json").is_file() and not (root / "model_index.json").is_file()
    config = root / "config.json" if alone else root / "unet" / "config.json"
    try:
        stored = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}  # {}: a hub name
        known = {one.__name__: one for one in (MLPDenoiser, UNet2DConditionModel)}
        kind = known.get(stored.get("_class_name"), UNet2DModel)
        network = kind.from_pretrained(folder, subfolder=None if alone else "unet", use_safetensors=True)
        if prompts is None and (root / PROMPTS_FILE).is_file():
            prompts = load_file(root / PROMPTS_FILE)["embeddings"]
        return Denoiser(network, prompts)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ValueError(f"model {folder!r} cannot be loaded as a diffusers UNet2DModel: {error}") from error


def load_schedule(folder: str | Path) -> NoiseSchedule:
    """The noise schedule stored beside a pipeline's model. Raises: ValueError when there is none."""
    path = Path(folder) / "scheduler" / "scheduler_config.json"
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        return NoiseSchedule(
            kind=stored["beta_schedule"],
            num_train_timesteps=stored["num_train_timesteps"],
            beta_start=stored["beta_start"],
            beta_end=stored["beta_end"],
            clip_sample=stored["clip_sample"],
        )
    except (OSError, json.JSONDecodeError, KeyError) as error:
        raise ValueError(
            f"model {str(folder)!r}: no noise schedule in {path} ({error}); give a folder saved by a sweep"
        ) from error
