"""Rewards against values worked out by hand, their gradients against finite differences."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dualsweep.trainers.rewards import (
    IMAGE_REWARDS,
    brightness,
    check_reward,
    colorfulness,
    contrast,
    local_contrast,
    make_reward,
    saturation,
)


def image(pixels):
    """(1, channels, height, width) in [-1, 1] from values in [0, 1]."""
    return 2 * torch.tensor(pixels, dtype=torch.float64)[None] - 1


# Two pixels side by side: pure red and white.
RED_WHITE = image([[[1.0, 1.0]], [[0.0, 1.0]], [[0.0, 1.0]]])


def made(name="up", *, sample_shape=(2,), class_names=("0", "1"), labeller=None, **spec):
    return make_reward(name, spec, sample_shape=sample_shape, class_names=class_names, labeller=labeller)


def test_brightness_is_the_mean_luminance():
    assert float(brightness(RED_WHITE)) == pytest.approx((0.2126 + 1) / 2)
    assert float(brightness(image([[[0.0, 0.5], [0.25, 0.25]]]))) == pytest.approx(0.25)


def test_contrast_is_the_deviation_of_the_luminance_over_pixels():
    assert float(contrast(RED_WHITE)) == pytest.approx((1 - 0.2126) / 2)


def test_saturation_is_the_mean_relative_range_of_the_channels():
    assert float(saturation(RED_WHITE)) == pytest.approx(0.5, abs=1e-7)
    assert float(saturation(image([[[0.8]], [[0.4]], [[0.2]]]))) == pytest.approx(0.75, abs=1e-7)


def test_colorfulness_is_spread_plus_three_tenths_of_the_mean_of_the_opponents():
    # rg = 1, 0 and yb = 0.5, 0: deviations 0.5 and 0.25, means the same.
    spread = math.hypot(0.5, 0.25)
    assert float(colorfulness(RED_WHITE)) == pytest.approx(1.3 * spread, abs=1e-9)


def test_local_contrast_of_one_bright_pixel_is_what_the_blur_takes_from_it():
    plane = np.zeros((11, 11))
    plane[5, 5] = 1
    weights = np.exp(-0.5 * np.arange(-2, 3) ** 2)
    centre = float((weights[2] / weights.sum()) ** 2)
    # The blurred pixel keeps `centre`, its neighbours gain the rest: both differences are 1 - centre.
    assert float(local_contrast(image([plane.tolist()]))) == pytest.approx(2 * (1 - centre) / 121)
    assert float(local_contrast(image([np.full((5, 5), 0.3).tolist()]))) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("name", sorted(IMAGE_REWARDS))
def test_gradients_are_the_slopes(name):
    # Away from the kinks at pixels 0 and 1 and at equal channels; random images have none nearby.
    images = 1.6 * torch.rand(2, 3, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) - 0.8
    assert torch.autograd.gradcheck(IMAGE_REWARDS[name], [images.requires_grad_()], eps=1e-6, atol=1e-7)


def test_a_constant_image_has_finite_gradients():
    images = torch.zeros(1, 3, 4, 4, requires_grad=True)
    total = contrast(images).sum() + colorfulness(images).sum()
    assert torch.isfinite(torch.autograd.grad(total, [images])[0]).all()


def test_a_sampler_may_overshoot_a_little():
    assert float(brightness(torch.full((1, 1, 2, 2), 1.2))) == 1


@pytest.mark.parametrize(
    "images",
    [
        torch.full((1, 1, 4, 4), 200.0),
        torch.full((1, 1, 4, 4), 1, dtype=torch.uint8),
        torch.full((1, 1, 4, 4), math.nan),
    ],
)
def test_other_ranges_are_refused(images):
    with pytest.raises(ValueError, match=r"rewards take floating-point images in \[-1, 1\]"):
        brightness(images)


def test_images_that_are_too_small_or_have_two_channels_are_refused():
    with pytest.raises(ValueError, match="local_contrast needs at least 3x3"):
        local_contrast(torch.zeros(1, 1, 2, 8))
    with pytest.raises(ValueError, match="needs 3 colour channels"):
        brightness(torch.zeros(1, 2, 4, 4))


def test_a_linear_reward_is_an_inner_product():
    points = torch.tensor([[1.0, 2.0], [0.5, -1.0]])
    assert made(kind="linear", direction=(2.0, -1.0))(points).tolist() == [0.0, 2.0]


def test_a_class_probability_is_the_labellers():
    labeller = lambda: SimpleNamespace(label=lambda x: np.stack([x[:, 0], 1 - x[:, 0]], axis=1))  # noqa: E731
    reward = made(kind="class_probability", class_name="1", labeller=labeller)
    assert reward(torch.tensor([[0.25, 0.0]])).tolist() == [0.75]


@pytest.mark.parametrize(
    ("spec", "dimension", "message"),
    [
        ({"kind": "linear"}, 2, "direction is missing"),
        ({"kind": "linear", "direction": (1.0,)}, 2, "give 2 numbers"),
        ({"kind": "linear", "direction": (0.0, 0.0)}, 2, "not all 0"),
        ({"kind": "linear", "direction": (1.0,)}, None, "is for vectors"),
        ({"kind": "brightness"}, 2, "is for images"),
        ({"kind": "brightness", "direction": (1.0,)}, None, "belongs to kind linear"),
        ({"kind": "class_probability"}, None, "class_name is missing"),
        ({"kind": "linear", "direction": (1.0, 0.0), "class_name": "a"}, 2, "belongs to kind class_probability"),
    ],
)
def test_bad_rewards_are_refused_by_field(spec, dimension, message):
    with pytest.raises(ValueError, match=rf"formulation\.rewards\.up.*{message}"):
        check_reward("up", spec, dimension=dimension)


def test_what_only_the_data_can_tell_is_refused_too():
    with pytest.raises(ValueError, match="class_name='9': the classes are"):
        made(kind="class_probability", class_name="9")
    with pytest.raises(ValueError, match="needs 3 colour channels, the data have 1"):
        made(kind="saturation", sample_shape=(1, 8, 8))
