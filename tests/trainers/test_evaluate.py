"""Held-out evaluation against mixtures whose divergence and denoising loss are known."""

import dataclasses
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dualsweep.datasets.gaussians import GaussianMixture
from dualsweep.trainers.evaluate import denoising_losses, weighted_errors
from dualsweep.trainers.methods.fairness import Fairness
from dualsweep.trainers.metrics import mean_and_stderr
from dualsweep.trainers.noise_schedule import NoiseSchedule

SCHEDULE = NoiseSchedule(clip_sample=False)
DATA = GaussianMixture([[-1.0], [0.2], [1.2]], [0.2, 0.3, 0.25], [0.6, 0.3, 0.1])
MODEL = DATA.with_weights([0.34, 0.33, 0.33])


def divergence(p: GaussianMixture, q: GaussianMixture) -> float:
    """KL(p||q) on the line; the trapezoid rule is exact to round-off for smooth decaying integrands."""
    x = np.linspace(-5, 5, 20_001)[:, None]
    log_p, log_q = p.log_density(x), q.log_density(x)
    return float(np.sum(np.exp(log_p) * (log_p - log_q)) * (x[1, 0] - x[0, 0]))


@pytest.fixture(scope="module")
def held_out():
    return DATA.sample(800, np.random.default_rng(0))[0].astype(np.float32)


@pytest.fixture(scope="module")
def errors(held_out, exact_denoiser):
    """Weighted errors of data and model on held-out data, 64 levels."""
    return [weighted_errors(exact_denoiser(m, SCHEDULE), held_out, SCHEDULE, levels=64, seed=1) for m in (DATA, MODEL)]


def test_the_difference_of_weighted_errors_estimates_the_kl_divergence(errors):
    gap = errors[1] - errors[0]
    stderr = gap.std(ddof=1) / math.sqrt(len(gap))
    exact = divergence(DATA, MODEL)
    assert stderr < exact / 3  # the check below can tell the answer from zero
    assert abs(gap.mean() - exact) < 3 * stderr  # false-alarm rate 0.3 % over seeds; this one is fixed


def test_each_samples_difference_is_its_log_likelihood_ratio_up_to_the_noise(held_out, errors):
    """Sharper than the mean over samples: what sampling the held-out set adds drops out of the comparison."""
    ratio = DATA.log_density(held_out) - MODEL.log_density(held_out)
    rest = errors[1] - errors[0] - ratio
    assert abs(rest.mean()) < 4 * rest.std(ddof=1) / math.sqrt(len(rest))  # false-alarm rate 6e-5
    assert np.corrcoef(errors[1] - errors[0], ratio)[0, 1] > 0.5


def test_both_denoisers_see_the_same_noise(held_out, exact_denoiser):
    """Common random numbers: what goes into a denoiser depends on the seed, not on the denoiser."""
    seen = {}

    class Recording(exact_denoiser):
        def forward(self, x_t, timestep):
            seen.setdefault(self.label, []).append((x_t.numpy().tobytes(), timestep.tolist()))
            return super().forward(x_t, timestep)

    for label, mixture, seed in (("data", DATA, 1), ("model", MODEL, 1), ("other seed", MODEL, 2)):
        denoiser = Recording(mixture, SCHEDULE)
        denoiser.label = label
        weighted_errors(denoiser, held_out, SCHEDULE, levels=8, seed=seed, batch_size=len(held_out))
    assert seen["data"] == seen["model"] != seen["other seed"]
    noises = []
    for x_t, timesteps in seen["data"]:  # a call a level
        assert len(set(timesteps)) == 1
        alpha_bar = SCHEDULE.alpha_bar[timesteps[0]]
        x_t = np.frombuffer(x_t, np.float32)
        noises.append((x_t - math.sqrt(alpha_bar) * held_out[: len(x_t), 0]) / math.sqrt(1 - alpha_bar))
    # Every level has noise of its own: correlations of 800 pairs spread by 0.035; beyond 0.25 by chance once in 10^11.
    assert len(noises) > 4 and np.abs(np.corrcoef(noises) - np.eye(len(noises))).max() < 0.25


def test_noise_of_its_own_makes_the_difference_noisier(held_out, errors, exact_denoiser):
    """Control: a model against itself under another seed spreads more than two models under one."""
    other = weighted_errors(exact_denoiser(DATA, SCHEDULE), held_out, SCHEDULE, levels=64, seed=2)
    assert (other - errors[0]).std() > 2 * (errors[1] - errors[0]).std()


def test_weighted_errors_do_not_depend_on_the_batch_size(held_out, errors, exact_denoiser):
    again = weighted_errors(exact_denoiser(DATA, SCHEDULE), held_out, SCHEDULE, levels=64, seed=1, batch_size=97)
    np.testing.assert_allclose(again, errors[0], rtol=1e-12)


def noise_loss(mean: float, std: float, x: np.ndarray | None = None) -> float | np.ndarray:
    """Mean over timesteps of the exact denoiser's loss: over N(mean, std^2), or at given points."""
    alpha_bar = SCHEDULE.alpha_bar
    v = alpha_bar * std**2 + 1 - alpha_bar
    if x is None:
        return float(np.mean(alpha_bar * std**2 / v))
    return np.mean((alpha_bar * std**2 / v) ** 2 + alpha_bar * (1 - alpha_bar) * ((x - mean) / v) ** 2, axis=-1)


def test_plain_losses_of_the_exact_denoiser_are_the_closed_forms(exact_denoiser, gaussian):
    denoiser = exact_denoiser(gaussian(0.5, 0.7), SCHEDULE)
    samples = gaussian(0.5, 0.7).sample(20_000, np.random.default_rng(0))[0].astype(np.float32)
    row = denoising_losses(denoiser, samples, SCHEDULE, draws=20_000, seed=0)
    mean, stderr = mean_and_stderr(*row)
    assert row[2] == 20_000
    # Draws and the 20 000 points they come from: at most sqrt(2) standard errors; four of them fail once in 16 000 seeds.
    assert mean == pytest.approx(noise_loss(0.5, 0.7), abs=4 * math.sqrt(2) * stderr)


def test_the_standard_error_of_a_held_out_loss_counts_the_held_out_samples(exact_denoiser, gaussian):
    """4096 draws from 25 images are not 4096 images: the interval has to cover the loss of the law behind the images."""
    law = gaussian(0.0, 1.0)
    denoiser = exact_denoiser(law, SCHEDULE)
    rng = np.random.default_rng(0)
    repeats, covered = 60, 0
    for repeat in range(repeats):
        samples = law.sample(25, rng)[0].astype(np.float32)
        mean, stderr = mean_and_stderr(*denoising_losses(denoiser, samples, SCHEDULE, draws=4096, seed=repeat))
        covered += abs(mean - noise_loss(0.0, 1.0)) <= 1.96 * stderr
    # A true 95 %, or 90 % given 25 samples of a skewed loss, stays above 75 % of 60 in all but 1 of 2000 seeds.
    assert covered / repeats > 0.75


@pytest.mark.parametrize("images", [1, 3])
def test_the_loss_of_listed_images_has_the_standard_error_of_its_draws(exact_denoiser, gaussian, images):
    """The set is the law: only timestep and noise are drawn, and the interval has to cover the loss at these very images."""
    denoiser = exact_denoiser(gaussian(0.0, 1.0), SCHEDULE)
    samples = np.array([[0.3], [-1.5], [2.5]], dtype=np.float32)[:images]
    exact = float(np.mean(noise_loss(0.0, 1.0, samples)))
    repeats, covered, widths = 200, 0, []
    for repeat in range(repeats):
        row = denoising_losses(denoiser, samples, SCHEDULE, draws=300, seed=repeat, whole=True)
        mean, stderr = mean_and_stderr(*row)
        assert row[2] == 300
        covered += abs(mean - exact) <= 1.96 * stderr
        widths.append((mean, stderr))
    means, stderrs = np.array(widths).T
    # A true 93 to 97 % of 200 stays within 88 and 99.5 % in all but 1 of 1000 seeds; a spread is known to 5 % from 200.
    assert 0.88 < covered / repeats < 0.995
    assert stderrs.mean() == pytest.approx(means.std(ddof=1), rel=0.2)


def test_a_set_of_one_image_gets_a_certificate(exact_denoiser, make_setting):
    image = {"set": np.array([[0.3]], dtype=np.float32)}
    method = Fairness(make_setting(schedule=SCHEDULE, seed=4, names=("set",), unit="loss"))
    object.__setattr__(method.setting, "data", SimpleNamespace(held_out_constraints=image, constraints=image))
    method = type(method)(dataclasses.replace(method.setting, base=exact_denoiser(MODEL, SCHEDULE)))
    found = method.held_out_measurement(method.setting.base, torch.zeros(1))
    assert found.counts == [4096] and 0.001 < found.stderrs[0] < 0.1
    assert method.calibrate() == found  # what a factor multiplies is what is judged


def test_the_objective_is_the_divergence_above_the_pretrained_models(exact_denoiser, held_out, make_setting):
    """The default of every formulation whose data are given, on held-out main data."""
    data = SimpleNamespace(held_out_main=SimpleNamespace(samples=held_out))
    method = Fairness(make_setting(data=None, schedule=SCHEDULE, seed=4))
    object.__setattr__(method.setting, "data", data)
    base = weighted_errors(exact_denoiser(DATA, SCHEDULE), held_out, SCHEDULE, levels=16, seed=4)
    objective = method.objective(
        exact_denoiser(MODEL, SCHEDULE),
        torch.zeros(2),
        evaluation={"noise_levels": 16, "batch_size": 128},
        base_errors=lambda: base,
    )
    # 16 levels: the quadrature's own error is below the standard error; 4 of them, false-alarm rate 6e-5.
    assert objective.value == pytest.approx(divergence(DATA, MODEL), abs=4 * objective.stderr)
    assert 0 < objective.stderr < objective.value
    assert objective.errors.shape == (800,)


def test_a_loss_constraint_is_judged_on_its_own_held_out_samples(exact_denoiser, make_setting):
    held = {f"set{k}": DATA.component(k).sample(400, np.random.default_rng(k))[0].astype(np.float32) for k in (1, 2)}
    trained = {name: samples[:300] + 1 for name, samples in held.items()}  # a loss on these would be told apart
    method = Fairness(make_setting(schedule=SCHEDULE, seed=4, names=tuple(held), unit="loss"))
    object.__setattr__(method.setting, "data", SimpleNamespace(held_out_constraints=held, constraints=trained))
    denoiser = exact_denoiser(MODEL, SCHEDULE)
    measurement = method.held_out_measurement(denoiser, torch.zeros(2))
    for k, metric, stderr in zip((1, 2), measurement.metrics, measurement.stderrs, strict=True):
        points = DATA.component(k).sample(20_000, np.random.default_rng(50 + k))[0].astype(np.float32)
        expected, other = mean_and_stderr(*denoising_losses(denoiser, points, SCHEDULE, draws=20_000, seed=9))
        # 4 standard errors of a set of 400, whose images count too: doubled, since `stderr` may be that of the draws.
        assert metric == pytest.approx(expected, abs=4 * (2 * stderr + other))
    judge = Fairness(dataclasses.replace(method.setting, base=denoiser))
    assert judge.calibrate() == measurement  # on the held-out samples as well
