"""DDIM against the exact flow of a Gaussian, and starting noise that does not depend on how many workers draw it."""

import numpy as np
import pytest
import torch

from dualsweep.trainers.noise_schedule import NoiseSchedule
from dualsweep.trainers.samplers import ddim_sample, starting_noise

MEAN, STD = 0.7, 0.4


def affine_map(denoiser, schedule, num_sampling_steps):
    """(scale, offset) of DDIM, which is affine for a Gaussian: from standard normal starts, N(offset, scale^2) samples."""
    start = torch.tensor([[-1.0], [0.0], [1.0]])
    low, middle, high = (
        ddim_sample(denoiser, start, schedule, num_sampling_steps=num_sampling_steps).double().flatten().tolist()
    )
    assert high - middle == pytest.approx(middle - low, abs=1e-5)  # float32 states
    return (high - low) / 2, middle


def test_ddim_with_the_exact_denoiser_returns_the_gaussian(exact_denoiser, gaussian):
    schedule = NoiseSchedule(clip_sample=False)
    denoiser = exact_denoiser(gaussian(MEAN, STD), schedule)
    scale, offset = affine_map(denoiser, schedule, 500)
    # Starting from N(0, 1) instead of the noised law shifts the mean by std * sqrt(alpha_bar_T) * mean = 0.0018;
    # the first-order step error at 500 steps adds about as much.
    assert offset == pytest.approx(MEAN, abs=5e-3)
    assert scale**2 == pytest.approx(STD**2, abs=5e-3)


def test_ddim_converges_with_the_first_order_of_its_step(exact_denoiser, gaussian):
    schedule = NoiseSchedule(clip_sample=False)
    denoiser = exact_denoiser(gaussian(MEAN, STD), schedule)
    alpha_bar = schedule.alpha_bar[-1]
    exact_scale = STD / np.sqrt(alpha_bar * STD**2 + 1 - alpha_bar)
    errors = [abs(affine_map(denoiser, schedule, steps)[0] - exact_scale) for steps in (50, 100, 200)]
    assert errors[1] < 0.65 * errors[0] and errors[2] < 0.65 * errors[1]  # halving, with room for second-order terms


@pytest.mark.parametrize("num_sampling_steps", [30, 60, 70, 99])
def test_ddim_is_right_also_where_the_steps_do_not_divide_the_timesteps(exact_denoiser, gaussian, num_sampling_steps):
    """Each step has to lead to the next step's own timestep, not to one T // n below."""
    schedule = NoiseSchedule(num_train_timesteps=100, beta_start=1e-3, beta_end=0.2, clip_sample=False)
    denoiser = exact_denoiser(gaussian(MEAN, STD), schedule)
    few, many = (affine_map(denoiser, schedule, steps) for steps in (25, 100))  # both divide
    scale, offset = affine_map(denoiser, schedule, num_sampling_steps)
    # The step error shrinks with the steps (0.054 in scale at 25, 0.014 at 100), so the answer lies between those two;
    # 0.01 is the room for timesteps rounded to whole ones.
    assert few[0] - 0.01 <= scale <= many[0] + 0.01
    assert offset == pytest.approx(many[1], abs=0.01)


def test_more_steps_than_timesteps_are_cut_to_the_timesteps(exact_denoiser, gaussian):
    schedule = NoiseSchedule(num_train_timesteps=20, beta_end=0.5, clip_sample=False)
    denoiser = exact_denoiser(gaussian(MEAN, STD), schedule)
    assert affine_map(denoiser, schedule, 500) == affine_map(denoiser, schedule, 20)


def test_samples_do_not_depend_on_the_batch_size_and_the_mode_is_put_back(exact_denoiser, gaussian):
    schedule = NoiseSchedule(num_train_timesteps=100, clip_sample=False)
    denoiser = exact_denoiser(gaussian(MEAN, STD), schedule).train()
    start = starting_noise(seed=0, counter=0, shards=[0], counts={0: 10}, shape=(1,))
    whole = ddim_sample(denoiser, start, schedule, num_sampling_steps=10)
    parts = ddim_sample(denoiser, start, schedule, num_sampling_steps=10, batch_size=3)
    assert torch.equal(whole, parts)
    assert denoiser.training
    assert ddim_sample(denoiser, start[:0], schedule, num_sampling_steps=10).shape == (0, 1)


def test_image_samples_stay_in_the_images_range(exact_denoiser, gaussian):
    schedule = NoiseSchedule(num_train_timesteps=100, clip_sample=True)
    denoiser = exact_denoiser(gaussian(3.0, 0.5), schedule)  # asks for pixels far above 1
    start = starting_noise(seed=0, counter=0, shards=[0], counts={0: 10}, shape=(1,))
    assert ddim_sample(denoiser, start, schedule, num_sampling_steps=20).abs().max() <= 1.0


@pytest.mark.parametrize("workers", [[range(4)], [range(2), range(2, 4)], [[0], [1], [2], [3]]])
def test_one_two_and_four_workers_draw_the_same_starts_between_them(workers):
    counts = {0: 3, 1: 3, 2: 2, 3: 2}
    drawn = torch.cat([starting_noise(seed=5, counter=9, shards=s, counts=counts, shape=(1, 4, 4)) for s in workers])
    expected = torch.cat(
        [starting_noise(seed=5, counter=9, shards=[k], counts=counts, shape=(1, 4, 4)) for k in range(4)]
    )
    assert drawn.shape == (10, 1, 4, 4) and drawn.dtype == torch.float32
    assert torch.equal(drawn, expected)


def test_starts_differ_between_seeds_counters_and_shards_and_share_no_number():
    drawn = [
        starting_noise(seed=seed, counter=counter, shards=[shard], counts={shard: 1000}, shape=(1,)).flatten()
        for seed in (0, 1)
        for counter in (0, 1, 2**40)
        for shard in (0, 1)
    ]
    # 12 000 normal float32 draws: a few collide by chance (some 10^7 values in the bulk), an overlap would bring hundreds.
    assert len(torch.cat(drawn).unique()) > 11_900


def test_starts_are_standard_normal():
    start = starting_noise(seed=3, counter=1, shards=[0, 1], counts={0: 20_000, 1: 20_000}, shape=(1,)).double()
    # 4 standard errors of n = 40 000 (0.005 and 0.007): each fails once in 16 000 seeds.
    assert start.mean().item() == pytest.approx(0, abs=4 * 0.005)
    assert start.var().item() == pytest.approx(1, abs=4 * 0.0071)


def test_a_worker_without_shards_draws_nothing():
    assert starting_noise(seed=0, counter=0, shards=[], counts={}, shape=(1, 8, 8)).shape == (0, 1, 8, 8)
