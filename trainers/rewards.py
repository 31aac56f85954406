"""Rewards of samples: what alignment asks a model to raise, one number a sample.

Images come as (n, channels, height, width) in [-1, 1]; formulas are stated for [0, 1], and luminance is
0.2126 R + 0.7152 G + 0.0722 B, or the one channel there is. Standard deviations are over pixels, divided by their number.
Source: methods.md 3d; colorfulness: Hasler and Suesstrunk (2003), here on [0, 1].
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from dualsweep.trainers.labellers import Labeller

OVERSHOOT = (
    0.5  # how far pixels may lie outside [-1, 1], by the sampler's last noise; further out they are no such images
)
BLUR_SIZE, BLUR_STD = 5, 1.0
TINY = 1e-12  # below every root, where a constant image has no gradient


Reward = Callable[[torch.Tensor], torch.Tensor]  # samples (n, *sample_shape) -> (n,), in their floating type


def unit_range(images: torch.Tensor) -> torch.Tensor:
    """Images in [-1, 1] as [0, 1], what overshoots cut off.

    Raises: ValueError for numbers that are no such images, uint8 pixels among them.
    """
    low, high = (float(end) for end in images.detach().aminmax())
    if not images.is_floating_point() or not -1 - OVERSHOOT <= low <= high <= 1 + OVERSHOOT:
        raise ValueError(
            f"images of type {images.dtype} range from {low:g} to {high:g}: rewards take floating-point images in [-1, 1]"
        )
    return ((images + 1) / 2).clamp(0, 1)


def luminance(images: torch.Tensor) -> torch.Tensor:
    """Y in [0, 1], shape (n, height, width). Raises: ValueError for other than 1 or 3 channels."""
    unit = unit_range(images)
    if images.shape[1] == 1:
        return unit[:, 0]
    red, green, blue = _channels(unit, "luminance")
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def brightness(images: torch.Tensor) -> torch.Tensor:
    """Mean luminance."""
    return luminance(images).mean((1, 2))


def contrast(images: torch.Tensor) -> torch.Tensor:
    """Standard deviation of the luminance."""
    return _std(luminance(images))


def local_contrast(images: torch.Tensor) -> torch.Tensor:
    """Mean distance of the luminance from its Gaussian blur (5x5, std 1 pixel, mirrored at the edges).

    Raises: ValueError for images of fewer than 3x3 pixels.
    """
    plane = luminance(images)[:, None]
    reach = BLUR_SIZE // 2
    if min(plane.shape[2:]) <= reach:
        raise ValueError(f"images are {tuple(plane.shape[2:])} pixels large: local_contrast needs at least 3x3")
    offsets = torch.arange(-reach, reach + 1, dtype=plane.dtype, device=plane.device)
    weights = torch.exp(-0.5 * (offsets / BLUR_STD).square())
    weights = weights / weights.sum()
    padded = torch.nn.functional.pad(plane, [reach] * 4, mode="reflect")
    blurred = torch.nn.functional.conv2d(padded, weights.outer(weights)[None, None])
    return (plane - blurred).abs().mean((1, 2, 3))


def saturation(images: torch.Tensor) -> torch.Tensor:
    """Mean of (max - min) / max over the channels. Raises: ValueError for other than 3 channels."""
    colors = torch.stack(_channels(unit_range(images), "saturation"))
    high, low = colors.amax(0), colors.amin(0)
    return ((high - low) / (high + 1e-8)).mean((1, 2))


def colorfulness(images: torch.Tensor) -> torch.Tensor:
    """Spread and mean of the opponent colours rg = R - G and yb = (R + G) / 2 - B:
    sqrt(std_rg^2 + std_yb^2) + 0.3 sqrt(mean_rg^2 + mean_yb^2).

    Raises: ValueError for other than 3 channels.
    """
    red, green, blue = _channels(unit_range(images), "colorfulness")
    opponents = torch.stack([red - green, (red + green) / 2 - blue]).flatten(2)
    spread = opponents.var(2, correction=0).sum(0)
    middle = opponents.mean(2).square().sum(0)
    return (spread + TINY).sqrt() + 0.3 * (middle + TINY).sqrt()


IMAGE_REWARDS = {
    "brightness": brightness,
    "contrast": contrast,
    "local_contrast": local_contrast,
    "saturation": saturation,
    "colorfulness": colorfulness,
}
COLOR_REWARDS = ("saturation", "colorfulness")
NOT_DIFFERENTIABLE = ("class_probability",)


def check_reward(name: str, spec: Mapping[str, Any], *, dimension: int | None) -> None:
    """Refuse a reward that can't be computed.

    Args:
        spec: its entry under `formulation.rewards`.
        dimension: of the samples where they are vectors; None: they are images.
    Raises: ValueError naming field, value and remedy.
    """
    where, kind = f"formulation.rewards.{name}", spec["kind"]
    for option, owner in (("direction", "linear"), ("class_name", "class_probability")):
        given = spec.get(option) is not None
        if given and kind != owner:
            raise ValueError(f"{where}.{option}={spec[option]!r} belongs to kind {owner}; remove it from kind {kind}")
        if not given and kind == owner:
            raise ValueError(f"{where}.{option} is missing: kind {kind} needs it")
    if kind == "linear" and dimension is None:
        raise ValueError(f"{where}.kind=linear is for vectors; for images give one of {sorted(IMAGE_REWARDS)}")
    if kind in IMAGE_REWARDS and dimension is not None:
        raise ValueError(f"{where}.kind={kind} is for images; for vectors give linear or class_probability")
    if kind == "linear" and (len(spec["direction"]) != dimension or not any(spec["direction"])):
        raise ValueError(
            f"{where}.direction={list(spec['direction'])}: give {dimension} numbers, one a coordinate, not all 0"
        )


def make_reward(
    name: str,
    spec: Mapping[str, Any],
    *,
    sample_shape: Sequence[int],
    class_names: Sequence[str],
    labeller: Callable[[], Labeller],
) -> Reward:
    """The reward an entry of `formulation.rewards` describes.

    Args:
        labeller: the training's own; made where a reward needs it.
    Raises: ValueError naming the field for samples or classes that it does not fit.
    """
    images = len(sample_shape) > 1
    check_reward(name, spec, dimension=None if images else sample_shape[0])
    kind = spec["kind"]
    if kind == "linear":
        return partial(_linear, torch.tensor(spec["direction"], dtype=torch.float64))
    if kind == "class_probability":
        if spec["class_name"] not in class_names:
            raise ValueError(
                f"formulation.rewards.{name}.class_name={spec['class_name']!r}: the classes are {list(class_names)}"
            )
        return partial(_class_probability, labeller, list(class_names).index(spec["class_name"]))
    if kind in COLOR_REWARDS and sample_shape[0] != 3:
        raise ValueError(
            f"formulation.rewards.{name}.kind={kind} needs 3 colour channels, the data have {sample_shape[0]}; "
            f"give brightness, contrast or local_contrast"
        )
    return IMAGE_REWARDS[kind]


def _linear(direction: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    return (points * direction.to(points)).sum(1)


def _class_probability(labeller: Callable[[], Labeller], index: int, samples: torch.Tensor) -> torch.Tensor:
    weights = labeller().label(samples.detach().cpu().numpy())[:, index]
    return torch.from_numpy(weights).to(samples)


def _channels(unit: torch.Tensor, reward: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if unit.shape[1] != 3:
        raise ValueError(f"images of shape {tuple(unit.shape)}: {reward} needs 3 colour channels")
    return unit.unbind(1)


def _std(planes: torch.Tensor) -> torch.Tensor:
    return (planes.flatten(1).var(1, correction=0) + TINY).sqrt()
