"""The stochastic chain against closed forms: Gaussian transitions, their divergence, and the law of Gaussian data."""

import numpy as np
import pytest
import torch
from torch.distributions import Normal, kl_divergence

from dualsweep.trainers.chains import (
    Chain,
    build_chain,
    chain_timesteps,
    conditional_variances,
    prediction_errors,
)
from dualsweep.trainers.noise_schedule import NoiseSchedule

PLAIN = NoiseSchedule(clip_sample=False)
CLIPPED = NoiseSchedule(clip_sample=True)
STEPS = 6


def draws(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def linear(scale):
    return lambda x_t, timestep: scale * x_t + 0.1


def gaussian_errors(schedule, timesteps, std):
    """Mean squared error of the best noise prediction for N(m, std^2) data, an entry."""
    alpha_bar = schedule.alpha_bar[timesteps]
    return alpha_bar * std**2 / (alpha_bar * std**2 + 1 - alpha_bar)


def law_of_samples(chain: Chain, std: float) -> float:
    """Standard deviation of the chain's samples for N(0, std^2) data with the exact prediction, which is linear in x."""
    variance = 1.0
    for power, following, step_std in zip(chain.alpha_bar[:-1], chain.alpha_bar[1:], chain.stds, strict=True):
        slope = np.sqrt(1 - power) / (power * std**2 + 1 - power)  # of the prediction
        signal, spread = np.sqrt(power), np.sqrt(1 - power)
        along = np.sqrt(1 - following - conditional_variances(np.array([power, following]))[0])
        factor = np.sqrt(following) * (1 - spread * slope) / signal + along * slope
        variance = factor**2 * variance + step_std**2
    return float(np.sqrt(variance))


def test_timesteps_are_the_nearest_to_equal_angles_from_the_noisiest_to_zero():
    timesteps = chain_timesteps(PLAIN, 24)
    angles = np.arccos(np.sqrt(PLAIN.alpha_bar))
    assert timesteps[0] == 999 and timesteps[-1] == 0 and len(timesteps) == 25
    spacing = -np.diff(angles[timesteps])
    # A timestep is at most 0.005 wide, so a step is off by no more than that.
    assert np.abs(spacing - spacing.mean()).max() < 0.005


def test_more_steps_than_the_schedule_can_tell_apart_are_refused():
    with pytest.raises(ValueError, match=r"formulation\.num_sampling_steps=900: .* give fewer"):
        chain_timesteps(PLAIN, 900)


@pytest.mark.parametrize("schedule", [PLAIN, CLIPPED])
def test_divergences_are_those_of_the_gaussian_transitions(schedule):
    chain = build_chain(schedule, STEPS)
    states = chain.rollout(linear(0.7), draws(5, STEPS + 1, 3))
    means, others = (chain.means(states, chain.predictions(linear(s), states)) for s in (0.7, 0.4))
    stds = torch.from_numpy(chain.stds)[:, None, None]
    expected = kl_divergence(Normal(means, stds), Normal(others, stds)).sum(2)
    torch.testing.assert_close(chain.divergences(means, others), expected)
    assert float(expected.min()) > 0


def test_path_weights_turn_squared_prediction_gaps_into_divergences():
    chain = build_chain(PLAIN, STEPS, np.full(STEPS, 0.2))
    states = chain.rollout(linear(0.7), draws(5, STEPS + 1, 3))
    ours, others = (chain.predictions(linear(s), states) for s in (0.7, 0.4))
    expected = chain.divergences(chain.means(states, ours), chain.means(states, others))
    weights = torch.from_numpy(chain.path_kl_weights)[:, None]
    torch.testing.assert_close(weights * (ours - others).square().sum(2), expected)


def test_the_mean_is_that_of_the_state_given_x_0_and_this_one():
    chain = build_chain(PLAIN, STEPS)
    power, following = chain.alpha_bar[:-1], chain.alpha_bar[1:]
    x_0, noise = draws(4, 2), draws(STEPS, 4, 2, seed=1)
    a = torch.from_numpy(power)[:, None, None]
    x_t = a.sqrt() * x_0 + (1 - a).sqrt() * noise
    states = torch.cat([x_t, x_t[:1]])
    of_clean = np.sqrt(following) * (1 - power / following) / (1 - power)
    of_state = np.sqrt(power / following) * (1 - following) / (1 - power)
    expected = torch.from_numpy(of_clean)[:, None, None] * x_0 + torch.from_numpy(of_state)[:, None, None] * x_t
    torch.testing.assert_close(chain.means(states, noise), expected)
    torch.testing.assert_close(chain.clean(states, noise), x_0.expand(STEPS, 4, 2))


@pytest.mark.parametrize("steps", [8, 24])
def test_gaussian_data_keep_their_spread_with_the_analytic_variance_and_lose_it_without(steps):
    std = 0.4
    timesteps = chain_timesteps(PLAIN, steps)[:-1]
    exact = law_of_samples(build_chain(PLAIN, steps, gaussian_errors(PLAIN, timesteps, std)), std)
    # The samples are the data at timestep 0, and start from N(0, 1) instead of the noisiest law: 4e-5 of the variance.
    power = PLAIN.alpha_bar[0]
    assert exact == pytest.approx(np.sqrt(power * std**2 + 1 - power), rel=1e-4)
    assert law_of_samples(build_chain(PLAIN, steps), std) < 0.95 * exact


def test_prediction_errors_of_a_gaussian_are_the_closed_form(exact_denoiser, gaussian):
    mixture, samples = gaussian(0.3, 0.5), torch.empty(20000, 1)
    samples[:, 0] = torch.from_numpy(0.3 + 0.5 * np.random.default_rng(0).standard_normal(20000))
    timesteps = np.array([999, 500, 50])
    found = prediction_errors(exact_denoiser(mixture, PLAIN), samples, PLAIN, timesteps, seed=0)
    # A mean of squares of 20000 normals: 1 percent a standard error, four of them.
    np.testing.assert_allclose(found, gaussian_errors(PLAIN, timesteps, 0.5), rtol=0.04)


def test_an_image_chain_adds_no_more_than_the_range_of_a_pixel_allows():
    useless = build_chain(CLIPPED, STEPS, np.ones(STEPS))
    given = build_chain(CLIPPED, STEPS)
    # x_0 moves the mean by at most sqrt(s), and varies by at most 1.
    assert (np.square(useless.stds) - np.square(given.stds) <= useless.alpha_bar[1:] + 1e-12).all()
    assert (build_chain(PLAIN, STEPS, np.ones(STEPS)).stds >= useless.stds).all()


def test_clipping_bounds_the_predicted_x_0_and_stops_its_gradient():
    chain = build_chain(CLIPPED, STEPS)
    states = (10 * draws(STEPS + 1, 3, 2)).requires_grad_(False)
    prediction = torch.zeros(STEPS, 3, 2, dtype=torch.float64, requires_grad=True)
    clean = chain.clean(states, prediction)
    assert float(clean.detach().abs().max()) <= 1
    (gradient,) = torch.autograd.grad(clean.sum(), [prediction])
    cut = clean.detach().abs() == 1
    assert cut.any() and not gradient[cut].any()


def test_a_rollout_is_its_transitions_one_by_one():
    chain, noises = build_chain(PLAIN, STEPS), draws(5, STEPS + 1, 3)
    states = chain.rollout(linear(0.7), noises)
    means = chain.means(states, chain.predictions(linear(0.7), states))
    torch.testing.assert_close(states[0], noises[:, 0])
    torch.testing.assert_close(
        states[1:], means + torch.from_numpy(chain.stds)[:, None, None] * noises[:, 1:].transpose(0, 1)
    )
    torch.testing.assert_close(chain.drawn_means(states, noises), means)


def test_noise_of_another_number_of_steps_is_refused():
    with pytest.raises(ValueError, match=r"shape \(5, 6, 3\), expected \(n, 7, "):
        build_chain(PLAIN, STEPS).rollout(linear(0.7), draws(5, STEPS, 3))


def test_log_densities_are_the_transitions_own_and_their_gradient_is_the_score():
    chain, noises = build_chain(PLAIN, STEPS), draws(5, STEPS + 1, 3)
    states = chain.rollout(linear(0.7), noises)
    means = chain.means(states, chain.predictions(linear(0.7), states)).requires_grad_()
    stds = torch.from_numpy(chain.stds)[:, None, None]
    found = chain.log_probs(states, means)
    exact = Normal(means, stds).log_prob(states[1:])
    constant = -(stds.log() + 0.5 * np.log(2 * np.pi))
    torch.testing.assert_close(found, (exact - constant).sum(2))
    (gradient,) = torch.autograd.grad(found.sum(), [means])
    torch.testing.assert_close(gradient, noises[:, 1:].transpose(0, 1) / stds)


def test_samples_depend_on_their_start_and_place_but_not_on_batches():
    chain, start = build_chain(PLAIN, STEPS), draws(7, 2).float()
    whole = chain.sample(linear(0.5), start, seed=3, batch_size=7)
    torch.testing.assert_close(chain.sample(linear(0.5), start, seed=3, batch_size=2), whole)
    torch.testing.assert_close(chain.sample(linear(0.5), start[:4], seed=3, batch_size=4), whole[:4])
    assert not torch.allclose(chain.sample(linear(0.5), start, seed=4, batch_size=7), whole)
