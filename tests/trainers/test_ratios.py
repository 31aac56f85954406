"""Likelihood ratios by a conditional model of Gaussians: exact values at every sample.

Condition 0 is N(0, 0.7^2 I), condition i is N(m_i, s_i^2 I) with s_i = 0.7 unless a test says otherwise.
"""

import numpy as np
import pytest
import torch

from dualsweep.trainers.metrics import mean_measurement
from dualsweep.trainers.noise_schedule import NoiseSchedule
from dualsweep.trainers.ratios import likelihood_ratios, log_density_ratio, log_likelihood_ratios, ratio_draws

SCHEDULE = NoiseSchedule(clip_sample=False)
STD = 0.7


class Gaussians(torch.nn.Module):
    """The exact noise prediction of N(means[condition], stds[condition]^2 I), differentiable in x_t."""

    def __init__(self, means, stds=None) -> None:
        super().__init__()
        self.means = torch.as_tensor(means)
        self.stds = torch.as_tensor([STD] * len(means) if stds is None else stds)
        self.anchor = torch.nn.Parameter(torch.zeros(1))  # tells callers the device

    def forward(self, x_t, timestep, condition=None):
        condition = torch.zeros_like(timestep) if condition is None else condition
        power = torch.tensor(SCHEDULE.alpha_bar).to(x_t)[timestep].view(-1, *[1] * (x_t.ndim - 1))
        centre = self.means.to(x_t)[condition].view(-1, *x_t.shape[1:])
        spread = self.stds.to(x_t)[condition].view(power.shape)
        return (1 - power).sqrt() * (x_t - power.sqrt() * centre) / (power * spread**2 + 1 - power)

    def exact(self, x):
        """log q^i/q of every sample, (n, number of sets)."""
        flat = x.flatten(1).double()[:, None]
        squares = (flat - self.means.double()).square().sum(2) / (2 * self.stds.double() ** 2)
        log_densities = -squares - flat.shape[2] * self.stds.double().log()
        return log_densities[:, 1:] - log_densities[:, :1]


@pytest.fixture
def plane():
    means = np.array([[0.0, 0.0], [0.5, -0.3], [-0.8, 0.4]])
    x = STD * torch.randn(400, 2, generator=torch.Generator().manual_seed(0))
    return means, Gaussians(means), x


def test_ratios_of_vectors_are_exact_and_come_in_the_order_of_the_conditions(plane):
    _, model, x = plane
    values, stderrs = log_likelihood_ratios(model, x, SCHEDULE, conditions=[1, 2], levels=64)
    # 64 steps of the flow are 0.01 off on average; a swapped column or a wrong sign by 0.5 and more
    assert float((values - model.exact(x)).abs().mean()) < 0.02
    assert not stderrs.any()
    swapped, _ = log_likelihood_ratios(model, x, SCHEDULE, conditions=[2, 1], levels=64)
    torch.testing.assert_close(swapped, values.flip(1), rtol=0, atol=1e-5)  # float32 rows in another order
    ratios = likelihood_ratios(model, x, SCHEDULE, conditions=[1, 2], levels=64)
    torch.testing.assert_close(ratios, values.exp())


def test_the_fused_ratio_is_that_of_two_predictors(plane):
    _, model, x = plane
    pair = log_density_ratio(lambda x_t, t: model(x_t, t, torch.full_like(t, 2)), model, x, SCHEDULE, levels=16)
    fused, _ = log_likelihood_ratios(model, x, SCHEDULE, conditions=[2], levels=16)
    torch.testing.assert_close(fused[:, 0], pair.values, rtol=0, atol=1e-5)


def test_ratios_of_images_are_unbiased_logarithms_with_the_noise_divided_out():
    """Nine elements: by the integral, whose noise does not cancel where the widths differ; uncorrected its exponential is too large.

    Twelve levels, as likelihood-constrained unlearning asks for. Four standard errors: false-alarm rate 6e-5 each.
    """
    model = Gaussians(np.stack([np.zeros(9), np.full(9, 0.2)]), [STD, 0.5])
    x = STD * torch.randn(3000, 1, 3, 3, generator=torch.Generator().manual_seed(1))
    values, stderrs = log_likelihood_ratios(model, x, SCHEDULE, conditions=[1], levels=12, seed=3)
    away, allowed = values - model.exact(x), 4 / len(x) ** 0.5
    assert abs(float(away.mean())) < allowed * float(away.std()) + 0.005  # the ends of the schedule
    assert float(away.std()) == pytest.approx(float(stderrs.square().mean().sqrt()), rel=0.08)  # what they claim
    ratios = likelihood_ratios(model, x, SCHEDULE, conditions=[1], levels=12, seed=3)
    truth = model.exact(x).exp()
    assert float((values.exp() - truth).mean()) > 0.02  # there is noise to speak of
    assert abs(float((ratios - truth).mean())) < allowed * float((ratios - truth).std())


def test_draws_do_not_depend_on_the_owner_of_the_shards(plane):
    """Also with noise, so for images: two workers with two shards each against one with all four."""
    model = Gaussians(np.array([[0.0] * 9, [0.3] * 9]), [STD, 0.5])

    def sample(denoiser, multipliers, start, *, num_sampling_steps):
        return STD * start

    def draws(shards):
        counts = {k: 3 + k for k in range(4)}
        common = {"levels": 8, "seed": 0, "counter": 5, "counts": counts, "shape": (1, 3, 3), "num_sampling_steps": 1}
        return ratio_draws(sample, model, torch.zeros(1), model, SCHEDULE, [1], shards=shards, **common)

    whole, parts = draws(range(4)), [draws([0, 1]), draws([2, 3])]
    assert whole.rows.shape == (18, 1)
    np.testing.assert_allclose(np.concatenate([part.rows for part in parts]), whole.rows, rtol=1e-4)
    assert draws([]).rows.shape == (0, 1)


def test_the_mean_ratio_of_a_models_samples_is_the_integral(plane):
    """p = N(m_1, STD^2 I): E_p[q^1/q] = exp(|m_1|^2 / STD^2)."""
    means, model, _ = plane

    def sample(denoiser, multipliers, start, *, num_sampling_steps):
        return STD * start + torch.tensor(means[1]).float()

    common = {"levels": 32, "seed": 0, "counter": 1, "shards": [0], "counts": {0: 4000}, "shape": (2,)}
    options = {**common, "num_sampling_steps": 1}
    expected = float(means[1] @ means[1]) / STD**2
    found = mean_measurement(ratio_draws(sample, model, torch.zeros(1), model, SCHEDULE, [1], **options).rows)
    assert abs(found.metrics[0] - np.exp(expected)) < 4 * found.stderrs[0] + 5e-3
    clipped = ratio_draws(sample, model, torch.zeros(1), model, SCHEDULE, [1], clip=1.5, **options).rows
    assert clipped.max() == 1.5
