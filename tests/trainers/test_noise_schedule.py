"""The noise schedule, and the weights that turn noise-prediction errors into nats (methods.md 0.2, 0.3 and H7)."""

import math

import numpy as np
import pytest
import torch

from dualsweep.trainers.noise_schedule import NoiseSchedule

KINDS = ["linear", "scaled_linear", "squaredcos_cap_v2"]


@pytest.mark.parametrize("kind", KINDS)
def test_alpha_bar_is_the_running_product_of_one_minus_beta(kind):
    schedule = NoiseSchedule(kind=kind, num_train_timesteps=200)
    product, expected = 1.0, []
    for beta in schedule.scheduler.betas.tolist():
        product *= 1.0 - beta
        expected.append(product)
    assert schedule.alpha_bar.dtype == np.float64
    np.testing.assert_allclose(schedule.alpha_bar, expected, rtol=1e-13)  # 200 float64 products
    # What samplers use, diffusers' float32 product of float32 alphas: 200 roundings of 6e-8, and up to 6e-8 / (1 - beta)
    # in each alpha, which for the cosine's last beta of 0.999 is 6e-5.
    np.testing.assert_allclose(schedule.scheduler.alphas_cumprod.numpy(), expected, rtol=1e-4)


def test_the_linear_schedule_has_the_published_end_points():
    schedule = NoiseSchedule()
    assert schedule.num_train_timesteps == 1000
    assert schedule.alpha_bar[0] == pytest.approx(1 - 1e-4, rel=1e-9)  # beta_start is stored in float32
    assert schedule.alpha_bar[-1] == pytest.approx(4.04e-5, rel=1e-2)  # methods.md 0.7: 4e-5


@pytest.mark.parametrize("kind", KINDS)
def test_log_snr_falls_with_the_timestep_and_gives_alpha_bar_back(kind):
    schedule = NoiseSchedule(kind=kind, num_train_timesteps=300)
    assert (np.diff(schedule.log_snr) < 0).all()
    np.testing.assert_allclose(1 / (1 + np.exp(-schedule.log_snr)), schedule.alpha_bar, rtol=1e-10)


@pytest.mark.parametrize("shape", [(6, 2), (6, 1, 4, 4)])
def test_add_noise_mixes_each_sample_at_its_own_timestep(shape):
    schedule = NoiseSchedule()
    generator = torch.Generator().manual_seed(0)
    x_0, noise = torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)
    timestep = torch.tensor([0, 1, 10, 500, 998, 999])
    x_t = schedule.add_noise(x_0, noise, timestep)
    for row, t in enumerate(timestep.tolist()):
        alpha_bar = schedule.alpha_bar[t]
        expected = math.sqrt(alpha_bar) * x_0[row].double() + math.sqrt(1 - alpha_bar) * noise[row].double()
        torch.testing.assert_close(
            x_t[row].double(), expected, rtol=0, atol=1e-6
        )  # float32 round-off of numbers below 4
    # 1 - alpha_bar in float32, as diffusers has it, is off by 6e-8 / 1e-4 at t = 0: its root by 3e-6.
    torch.testing.assert_close(x_t, schedule.scheduler.add_noise(x_0, noise, timestep), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("levels", [1, 2, 7, 32, 5000])
def test_quadrature_weights_are_positive_and_sum_to_half_the_log_snr_range(kind, levels):
    schedule = NoiseSchedule(kind=kind, num_train_timesteps=100)
    timesteps, weights = schedule.log_snr_grid(levels)
    assert timesteps.dtype == np.int64 and len(timesteps) == len(weights) <= min(levels, 100)
    assert (np.diff(timesteps) > 0).all() and timesteps[0] >= 0 and timesteps[-1] < 100
    assert (weights > 0).all()
    assert weights.sum() == pytest.approx((schedule.log_snr[0] - schedule.log_snr[-1]) / 2, rel=1e-12)


def mean_squared_error(mean, std, x, alpha_bar):
    """E over the noise of (noise - best noise prediction of N(mean, std^2))^2 at x_0 = x: no sampling needed."""
    v = alpha_bar * std**2 + 1 - alpha_bar
    return (alpha_bar * std**2 / v) ** 2 + alpha_bar * (1 - alpha_bar) * ((x - mean) / v) ** 2


def log_density(mean, std, x):
    return -0.5 * ((x - mean) / std) ** 2 - math.log(std * math.sqrt(2 * math.pi))


A, B = (0.3, 0.8), (-0.5, 1.1)


def estimate(schedule, x, timesteps, weights):
    alpha_bar = schedule.alpha_bar[timesteps]
    return float(weights @ (mean_squared_error(*B, x, alpha_bar) - mean_squared_error(*A, x, alpha_bar)))


@pytest.mark.parametrize("x", [-1.5, 0.0, 0.4, 2.0])
def test_weighted_errors_of_two_gaussians_integrate_to_their_log_likelihood_ratio(x):
    schedule = NoiseSchedule()
    exact = log_density(*A, x) - log_density(*B, x)
    # What lies beyond the schedule's ends is of order (1 - alpha_bar_0) + alpha_bar_T = 1.4e-4 times squared distances in
    # standard deviations (at most 5 here); the midpoint rule on 1000 levels adds less.
    assert estimate(schedule, x, *schedule.log_snr_grid(1000)) == pytest.approx(exact, abs=2e-3)
    # 32 levels, the default of a sweep: spacing 0.6 in log SNR against bumps some 4 wide.
    assert estimate(schedule, x, *schedule.log_snr_grid(32)) == pytest.approx(exact, abs=2e-2)


def test_without_the_weights_the_integral_is_far_off():
    """Control: the released code's plain sum over timesteps, and the plain mean, are not nats."""
    schedule = NoiseSchedule()
    timesteps = np.arange(1000)
    exact = log_density(*A, 2.0) - log_density(*B, 2.0)
    assert abs(exact) > 0.3
    for weights in (np.ones(1000), np.full(1000, 1e-3)):
        assert abs(estimate(schedule, 2.0, timesteps, weights) - exact) > 0.2
