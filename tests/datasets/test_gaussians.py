"""The mixture's closed forms against finite differences, quadrature and samples."""

import numpy as np
import pytest

from dualsweep.datasets.gaussians import GaussianMixture

MIXTURE = GaussianMixture([[0.0, 0.0], [2.0, 1.0], [-1.0, 2.0]], [[0.3, 0.5], [0.4, 0.2], [0.6, 0.6]], [6, 3, 1])
POINTS = np.random.default_rng(0).normal(size=(20, 2)) * 1.5


def test_the_density_integrates_to_one():
    axis = np.linspace(-6, 6, 601)
    grid = np.stack(np.meshgrid(axis, axis), axis=-1).reshape(-1, 2)
    total = np.exp(MIXTURE.log_density(grid)).sum() * (axis[1] - axis[0]) ** 2
    assert total == pytest.approx(
        1, abs=1e-9
    )  # the trapezoid rule converges geometrically on smooth decaying functions


@pytest.mark.parametrize("alpha_bar", [1.0, 0.7, 0.05])
def test_the_score_is_the_gradient_of_the_log_density(alpha_bar):
    level, step = MIXTURE.noised(alpha_bar), 1e-5
    for axis in np.eye(2):
        slope = (level.log_density(POINTS + step * axis) - level.log_density(POINTS - step * axis)) / (2 * step)
        # Central differences: round-off eps / step times log densities up to about 100.
        np.testing.assert_allclose(MIXTURE.score(POINTS, alpha_bar) @ axis, slope, atol=1e-7, rtol=1e-6)


def test_the_noise_prediction_is_the_conditional_mean_of_the_noise():
    # The mean over x_0 by quadrature in one dimension: E[noise | x_t] with noise = (x_t - sqrt(a) x_0) / sqrt(1 - a).
    mixture, alpha_bar = GaussianMixture([[-1.0], [1.5]], [0.4, 0.2], [0.3, 0.7]), 0.6
    x_t = np.linspace(-2, 2, 9)[:, None]
    x_0 = np.linspace(-6, 6, 20_001)
    prior = np.exp(mixture.log_density(x_0[:, None]))
    noise = (x_t - np.sqrt(alpha_bar) * x_0) / np.sqrt(1 - alpha_bar)
    weights = prior * np.exp(-(noise**2) / 2)
    expected = (weights * noise).sum(axis=1) / weights.sum(axis=1)
    np.testing.assert_allclose(mixture.noise_prediction(x_t, alpha_bar)[:, 0], expected, atol=1e-9)


def test_a_level_a_point_gives_what_each_level_gives_alone():
    levels = np.linspace(0.1, 0.9, len(POINTS))
    together = MIXTURE.noise_prediction(POINTS, levels)
    alone = [MIXTURE.noise_prediction(POINTS[i : i + 1], level)[0] for i, level in enumerate(levels)]
    np.testing.assert_allclose(together, alone, rtol=1e-12)


def test_samples_have_the_mixtures_moments_and_shares():
    samples, components = MIXTURE.sample(100_000, np.random.default_rng(1))
    mean = MIXTURE.weights @ MIXTURE.means
    second = MIXTURE.weights @ (MIXTURE.stds**2 + MIXTURE.means**2)
    # Five standard errors of about 1 / sqrt(100000) each: seven comparisons, a false alarm once in 200 000 seeds.
    np.testing.assert_allclose(samples.mean(axis=0), mean, atol=0.016)
    np.testing.assert_allclose((samples**2).mean(axis=0), second, atol=0.03)
    np.testing.assert_allclose(np.bincount(components) / 100_000, MIXTURE.weights, atol=0.008)


def test_the_posterior_averages_to_the_weights_and_finds_the_component():
    samples, components = MIXTURE.sample(20_000, np.random.default_rng(2))
    posterior = MIXTURE.posterior(samples)
    np.testing.assert_allclose(posterior.sum(axis=1), 1, rtol=1e-12)
    np.testing.assert_allclose(posterior.mean(axis=0), MIXTURE.weights, atol=0.018)  # five standard errors
    assert (posterior.argmax(axis=1) == components).mean() > 0.97  # the components hardly overlap


def test_reweighting_and_single_components_keep_the_shapes():
    assert MIXTURE.with_weights([1, 1, 2]).weights.tolist() == [0.25, 0.25, 0.5]
    single = MIXTURE.component(1)
    assert single.means.tolist() == [[2.0, 1.0]] and single.stds.tolist() == [[0.4, 0.2]]


@pytest.mark.parametrize(
    "means, stds, weights, message",
    [
        ([0.0, 1.0], [1, 1], [1, 1], r"means have shape \(2,\)"),
        ([[0.0], [1.0]], [1.0], [1, 1], r"stds have shape \(1,\)"),
        ([[0.0], [1.0]], [1, 1], [1], r"weights have shape \(1,\)"),
        ([[0.0], [1.0]], [1, 0], [1, 1], "stds must be > 0"),
        ([[0.0], [1.0]], [1, 1], [1, -1], "weights must be > 0"),
        ([[0.0], [np.nan]], [1, 1], [1, 1], "means hold a value that is not finite"),
    ],
)
def test_an_impossible_mixture_is_refused_by_name(means, stds, weights, message):
    with pytest.raises(ValueError, match=message):
        GaussianMixture(means, stds, weights)
