"""Every estimator against numerical integrals on Gaussian mixtures with exact denoisers (methods.md 0.2, 0.3 and H7).

Seeds are fixed. A random test allows 4 standard errors (false alarm: once in 16 000 seeds where the error is normal)
plus 0.1 percent of the value for what the schedule's ends leave out; its control is a wrong formula that misses by far
more.
"""

import math

import numpy as np
import pytest
import torch

from dualsweep.datasets.gaussians import GaussianMixture
from dualsweep.trainers.estimators import (
    Trajectory,
    ddpm_trajectory,
    log_likelihood_ratio,
    log_normalizer,
    ode_log_likelihood,
    path_kl,
    point_kl,
    sample_timesteps,
)
from dualsweep.trainers.noise_schedule import NoiseSchedule

SCHEDULE = NoiseSchedule()
LINE = (
    GaussianMixture(np.array([[-0.8], [0.7]]), np.array([0.3, 0.35]), np.array([0.6, 0.4])),
    GaussianMixture(np.array([[-0.5], [0.9]]), np.array([0.4, 0.3]), np.array([0.3, 0.7])),
)
PLANE = (
    GaussianMixture(np.array([[-1.0, 0.0], [1.0, 1.0], [0.5, -1.0]]), np.array([0.35, 0.5, 0.4]), np.array([5, 3, 2])),
    GaussianMixture(np.array([[-0.8, 0.3], [1.0, 0.5], [0.5, -1.0]]), np.array([0.4, 0.4, 0.4]), np.array([2, 4, 4])),
)
PAIRS = pytest.mark.parametrize("pair", [LINE, PLANE], ids=["line", "plane"])


class Exact(torch.nn.Module):
    """The exact noise prediction of a mixture in torch, so that gradients reach x_t."""

    def __init__(self, mixture):
        super().__init__()
        self.means, self.variances, self.weights = (
            torch.tensor(array) for array in (mixture.means, mixture.stds**2, mixture.weights)
        )

    def forward(self, x_t, timestep):
        power = torch.tensor(SCHEDULE.alpha_bar)[timestep][:, None, None]
        variances = power * self.variances + 1 - power
        away = x_t[:, None, :] - power.sqrt() * self.means
        share = torch.softmax(self.weights.log() - 0.5 * (away**2 / variances + variances.log()).sum(2), dim=1)
        return (1 - power[:, :, 0]).sqrt() * (share[:, :, None] * away / variances).sum(1)


def flow(*given, **options):
    """Values of `ode_log_likelihood`."""
    return ode_log_likelihood(*given, **options).values


def grid(dim):
    """Points of a box that holds all the mass of the mixtures, and the volume of a cell."""
    axis = np.linspace(-5, 5, 4001 if dim == 1 else 301)
    return np.stack(np.meshgrid(*[axis] * dim, indexing="ij"), -1).reshape(-1, dim), (axis[1] - axis[0]) ** dim


def exact_kl(p, q):
    points, volume = grid(p.dim)
    log_p = p.log_density(points)
    return float((np.exp(log_p) * (log_p - q.log_density(points))).sum() * volume)


def draw(mixture, count, seed=0):
    return torch.from_numpy(mixture.sample(count, np.random.default_rng(seed))[0])


@PAIRS
def test_the_torch_denoiser_of_these_tests_is_the_mixtures(pair, exact_denoiser):
    x_t, timestep = draw(pair[0], 50), torch.arange(0, 1000, 20)
    expected = exact_denoiser(pair[0], SCHEDULE)(x_t, timestep)
    torch.testing.assert_close(Exact(pair[0])(x_t, timestep), expected, rtol=1e-12, atol=1e-12)


# ---- point KL


@PAIRS
def test_point_kl_is_the_integral_of_the_density_ratio(pair):
    for p, q in (pair, pair[::-1]):
        estimate, exact = point_kl(Exact(p), Exact(q), draw(p, 4000), SCHEDULE), exact_kl(p, q)
        assert abs(estimate.value - exact) < 4 * estimate.stderr + 1e-3 * exact
        assert estimate.stderr < 0.015 * exact  # the check has teeth
        assert estimate.count == len(estimate.per_sample) == 4000 and estimate.loss is None


@PAIRS
def test_samples_of_the_other_law_give_the_other_direction(pair):
    """Control: the integrand is symmetric, so only the samples decide the direction."""
    p, q = pair
    swapped = point_kl(Exact(p), Exact(q), draw(q, 4000), SCHEDULE)
    assert abs(swapped.value - exact_kl(q, p)) < 4 * swapped.stderr + 1e-3 * exact_kl(q, p)
    assert abs(swapped.value - exact_kl(p, q)) > 10 * swapped.stderr


def test_the_standard_error_of_a_point_kl_is_the_spread_of_estimates():
    p, q = LINE
    found = [
        point_kl(Exact(p), Exact(q), draw(p, 200, seed=seed), SCHEDULE, levels=16, seed=seed) for seed in range(200)
    ]
    spread = np.std([estimate.value for estimate in found], ddof=1)
    # A standard deviation of 200 values is known to 5 percent: 4 of those.
    assert np.mean([estimate.stderr for estimate in found]) == pytest.approx(spread, rel=0.2)


def test_point_kl_without_the_weights_is_far_off():
    """Control: the released code's plain sum over levels."""
    p, q = LINE

    class Unweighted(NoiseSchedule):
        def log_snr_grid(self, levels):
            timesteps, _ = super().log_snr_grid(levels)
            return timesteps, np.ones(len(timesteps))

    estimate = point_kl(Exact(p), Exact(q), draw(p, 4000), Unweighted())
    assert abs(estimate.value - exact_kl(p, q)) > 50 * estimate.stderr


def test_more_repeats_take_out_the_noise_draws():
    p, q = LINE
    once, often = (point_kl(Exact(p), Exact(q), draw(p, 2000), SCHEDULE, levels=8, repeats=r) for r in (1, 8))
    assert often.stderr < 0.7 * once.stderr
    assert abs(often.value - once.value) < 4 * once.stderr


# ---- path KL


def kernel_means(mixture, x, timestep, beta):
    prediction = mixture.noise_prediction(x[:, None], SCHEDULE.alpha_bar[timestep])[:, 0]
    return (x - beta / math.sqrt(1 - SCHEDULE.alpha_bar[timestep]) * prediction) / math.sqrt(1 - beta)


def chain_path_kl(p, q, timesteps):
    """Path KL of a chain on the line: its densities carried along on a grid, each step's KL of two Gaussian kernels."""
    x = np.linspace(-7, 7, 1401)
    cell, density, total = x[1] - x[0], np.exp(-(x**2) / 2) / math.sqrt(2 * math.pi), 0.0
    after = [*(SCHEDULE.alpha_bar[t] for t in timesteps[1:]), 1.0]
    for timestep, following in zip(timesteps, after, strict=True):
        beta = 1 - SCHEDULE.alpha_bar[timestep] / following
        means = [kernel_means(mixture, x, timestep, beta) for mixture in (p, q)]
        total += float((density * (means[0] - means[1]) ** 2).sum() * cell / (2 * beta))
        if following < 1:
            kernel = np.exp(-((x[:, None] - means[0]) ** 2) / (2 * beta)) / math.sqrt(2 * math.pi * beta)
            density = kernel @ density * cell
    return total


def noise_for(count, steps, dim, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((count, steps + 1, dim)))


@pytest.mark.parametrize("steps", [6, 20])
def test_path_kl_of_a_coarse_chain_is_that_of_its_kernels(steps):
    p, q = LINE
    trajectory = ddpm_trajectory(Exact(p), noise_for(4000, steps, 1), SCHEDULE)
    estimate, exact = path_kl(Exact(p), Exact(q), trajectory, SCHEDULE), chain_path_kl(p, q, trajectory.timesteps)
    assert len(trajectory.timesteps) == steps and trajectory.timesteps[-1] == 0
    assert abs(estimate.value - exact) < 4 * estimate.stderr
    assert estimate.stderr < 0.01 * exact
    # Control: the fine schedule's own betas on the coarse chain, and q's trajectories.
    fine = SCHEDULE.scheduler.betas.double().numpy()[trajectory.timesteps]
    assert abs(weighted_gaps(p, q, trajectory, nats_weights(fine, trajectory)) - exact) > 50 * estimate.stderr
    other = path_kl(Exact(p), Exact(q), ddpm_trajectory(Exact(q), noise_for(4000, steps, 1), SCHEDULE), SCHEDULE)
    assert abs(other.value - exact) > 10 * other.stderr


def nats_weights(betas, trajectory):
    return betas / (2 * (1 - betas) * (1 - SCHEDULE.alpha_bar[trajectory.timesteps]))


def weighted_gaps(p, q, trajectory, weights):
    """The mean weighted sum of squared gaps along a trajectory."""
    total = 0.0
    for states, timestep, weight in zip(trajectory.states, trajectory.timesteps.tolist(), weights, strict=True):
        at = torch.full((len(states),), timestep)
        total += weight * float((Exact(p)(states, at) - Exact(q)(states, at)).square().sum(1).mean())
    return total


def test_path_kl_of_the_whole_chain_is_the_point_kl_and_wrong_coefficients_are_not():
    p, q = LINE
    trajectory = ddpm_trajectory(Exact(p), noise_for(1500, 1000, 1), SCHEDULE)
    estimate, exact = path_kl(Exact(p), Exact(q), trajectory, SCHEDULE), exact_kl(p, q)
    # 0.4 percent from the chain's step size (methods.md H7)
    assert abs(estimate.value - exact) < 4 * estimate.stderr + 4e-3 * exact
    betas, alpha_bar = SCHEDULE.scheduler.betas.double().numpy()[::-1], SCHEDULE.alpha_bar[::-1]
    assert weighted_gaps(p, q, trajectory, nats_weights(betas, trajectory)) == pytest.approx(estimate.value, rel=1e-9)
    for wrong in (np.ones(1000), betas**2 / (2 * (1 - betas) * alpha_bar)):  # released: no weight; the notebook's
        assert abs(weighted_gaps(p, q, trajectory, wrong) - exact) > 50 * estimate.stderr


def test_path_kl_and_the_chains_end_in_two_dimensions():
    """Gaussians: every state of the chain is Gaussian, so means and variances follow a recursion."""
    mean_p, std_p, mean_q, std_q = (
        np.array([0.5, -0.4]),
        np.array([0.3, 0.6]),
        np.array([0.2, 0.1]),
        np.array([0.5, 0.5]),
    )
    p, q = (GaussianMixture(m[None], s[None], np.ones(1)) for m, s in ((mean_p, std_p), (mean_q, std_q)))
    timesteps = np.array([999, 700, 420, 200, 60, 5])
    trajectory = ddpm_trajectory(Exact(p), noise_for(4000, 6, 2), SCHEDULE, timesteps=timesteps)
    estimate = path_kl(Exact(p), Exact(q), trajectory, SCHEDULE)
    mean, variance, exact = np.zeros(2), np.ones(2), 0.0
    for timestep, following in zip(timesteps, [*SCHEDULE.alpha_bar[timesteps[1:]], 1.0], strict=True):
        now = SCHEDULE.alpha_bar[timestep]
        beta = 1 - now / following
        slopes = [
            math.sqrt(1 - now) / (now * s**2 + 1 - now) for s in (std_p, std_q)
        ]  # noise prediction: slope (x - m')
        gap = slopes[0] - slopes[1]
        offset = -math.sqrt(now) * (slopes[0] * mean_p - slopes[1] * mean_q)
        weight = beta / (2 * (1 - beta) * (1 - now))
        exact += weight * float((gap**2 * variance + (gap * mean + offset) ** 2).sum())
        pull = beta / math.sqrt(1 - now) * slopes[0]
        mean = (mean - pull * (mean - math.sqrt(now) * mean_p)) / math.sqrt(1 - beta)
        variance = ((1 - pull) / math.sqrt(1 - beta)) ** 2 * variance + beta
    assert abs(estimate.value - exact) < 4 * estimate.stderr
    assert estimate.stderr < 0.02 * exact
    ends = trajectory.x_0.numpy()
    assert (np.abs(ends.mean(0) - mean) < 4 * np.sqrt(variance / 4000)).all()
    assert (np.abs(ends.var(0) - variance) < 4 * variance * math.sqrt(2 / 4000)).all()


def test_each_step_of_a_chain_adds_its_own_noise():
    noise = noise_for(3, 2, 2)
    trajectory = ddpm_trajectory(lambda x_t, _: torch.ones_like(x_t), noise, SCHEDULE, timesteps=[500, 100])
    now, later = SCHEDULE.alpha_bar[[500, 100]]
    x_t = noise[:, 0]
    for step, (power, alpha) in enumerate([(now, now / later), (later, later)]):
        torch.testing.assert_close(trajectory.states[step], x_t, rtol=1e-12, atol=1e-12)
        mean = (x_t - (1 - alpha) / math.sqrt(1 - power)) / math.sqrt(alpha)
        x_t = mean + math.sqrt(1 - alpha) * noise[:, step + 1]
    torch.testing.assert_close(trajectory.x_0, x_t, rtol=1e-12, atol=1e-12)


# ---- log likelihood ratios


def exact_ratio(a, b, x):
    return torch.from_numpy(a.log_density(x) - b.log_density(x))


@PAIRS
@pytest.mark.parametrize("options", [{}, {"levels": 48, "repeats": 3}, {"antithetic": False}], ids=str)
def test_ratios_have_the_right_mean_and_honest_standard_errors(pair, options):
    a, b = pair
    x_0 = torch.cat([draw(a, 300), draw(b, 300, seed=1)])
    ratio = log_likelihood_ratio(Exact(a), Exact(b), x_0, SCHEDULE, **options)
    errors, exact = ratio.values - exact_ratio(a, b, x_0), exact_ratio(a, b, x_0)
    of_mean = float(ratio.stderrs.square().mean().sqrt()) / math.sqrt(len(x_0))
    assert abs(errors.mean()) < 4 * of_mean + 1e-3
    # Single samples are skewed, so their errors are judged together: measured 0.85 to 1.15 over 20 seeds.
    assert 0.7 < float(errors.square().mean() / ratio.stderrs.square().mean()) < 1.4
    # Control: the opposite sign, and no weights (the levels are about evenly spaced: a constant factor of 13).
    weights = SCHEDULE.log_snr_grid(options.get("levels", 128))[1]
    for wrong in (-ratio.values, ratio.values / weights.mean()):
        missed = (wrong - exact).abs() / ratio.stderrs
        assert float(missed.median()) > 5


@PAIRS
def test_the_mean_ratio_over_samples_is_the_kl(pair):
    a, b = pair
    values = log_likelihood_ratio(Exact(a), Exact(b), draw(a, 3000), SCHEDULE, levels=64).values
    exact = exact_kl(a, b)
    assert abs(float(values.mean()) - exact) < 4 * float(values.std()) / math.sqrt(3000) + 1e-3 * exact


def test_ratios_add_up_because_the_noise_is_common():
    a, b, c = (Exact(law) for law in (*LINE, LINE[0].with_weights([0.2, 0.8])))
    x_0 = draw(LINE[0], 40)
    ab, bc, ac, ba = (
        log_likelihood_ratio(*models, x_0, SCHEDULE, seed=3).values for models in ((a, b), (b, c), (a, c), (b, a))
    )
    torch.testing.assert_close(ab + bc, ac, rtol=0, atol=1e-10)  # float64 round-off
    torch.testing.assert_close(ab, -ba, rtol=0, atol=1e-12)


@PAIRS
def test_antithetic_pairs_beat_as_many_independent_draws(pair):
    a, b = pair
    x_0 = draw(a, 400)
    pairs = log_likelihood_ratio(Exact(a), Exact(b), x_0, SCHEDULE)
    independent = log_likelihood_ratio(Exact(a), Exact(b), x_0, SCHEDULE, antithetic=False, repeats=2)
    variances = [float(ratio.stderrs.square().mean()) for ratio in (pairs, independent)]
    assert variances[0] < variances[1] / 1.4  # measured: 3.7 (line) and 2.0 (plane) times smaller


def test_one_model_against_itself_is_exactly_zero():
    ratio = log_likelihood_ratio(Exact(LINE[0]), Exact(LINE[0]), draw(LINE[0], 10), SCHEDULE)
    assert not ratio.values.any() and not ratio.stderrs.any()


# ---- noise and batches


def test_noise_depends_on_the_sample_and_the_level_only():
    p, q = Exact(PLANE[0]), Exact(PLANE[1])
    x_0 = draw(PLANE[0], 30)
    whole = point_kl(p, q, x_0, SCHEDULE, repeats=2).per_sample
    torch.testing.assert_close(point_kl(p, q, x_0[:7], SCHEDULE, repeats=2).per_sample, whole[:7], rtol=1e-12, atol=0)
    for max_rows in (1, 7, 100):
        parts = point_kl(p, q, x_0, SCHEDULE, repeats=2, max_rows=max_rows).per_sample
        torch.testing.assert_close(parts, whole, rtol=1e-12, atol=0)
    assert not torch.equal(point_kl(p, q, x_0, SCHEDULE, repeats=2, seed=1).per_sample, whole)


def test_a_forward_holds_several_levels_and_at_most_max_rows():
    sizes = []

    def recorded(x_t, timestep):
        sizes.append((len(x_t), len(timestep.unique())))
        return x_t

    point_kl(recorded, lambda x_t, _: x_t, torch.zeros(30, 2), SCHEDULE, levels=10, max_rows=100)
    assert sizes == [(90, 3), (90, 3), (90, 3), (30, 1)]


def test_single_precision_shares_the_noise_of_double_precision():
    x_0 = draw(LINE[0], 50)
    p, q = Exact(LINE[0]), Exact(LINE[1])
    double, single = (log_likelihood_ratio(p, q, x, SCHEDULE).values for x in (x_0, x_0.float()))
    torch.testing.assert_close(
        single, double, rtol=0, atol=1e-3
    )  # noise residuals of 3e-6 next to weights that sum to 10


def test_image_samples_are_summed_over_all_their_dimensions():
    x_0 = torch.zeros(3, 1, 4, 4)
    estimate = point_kl(lambda x_t, _: torch.ones_like(x_t), lambda x_t, _: torch.zeros_like(x_t), x_0, SCHEDULE)
    log_snr = SCHEDULE.log_snr
    assert estimate.value == pytest.approx(16 * (log_snr[0] - log_snr[-1]) / 2, rel=1e-9)
    assert estimate.stderr == pytest.approx(0, abs=1e-9)


# ---- gradients


class Tilted(torch.nn.Module):
    """An exact prediction plus theta times a fixed field."""

    def __init__(self, mixture, theta):
        super().__init__()
        self.exact, self.theta = Exact(mixture), torch.nn.Parameter(torch.tensor(theta, dtype=torch.float64))

    def forward(self, x_t, timestep):
        return self.exact(x_t, timestep) + self.theta * torch.sin(2 * x_t + timestep[:, None] / 300)


THETA, STEP = 0.3, 1e-5


def compare_gradient(loss):
    """Autograd of `loss(theta) -> (Estimate, Tilted p)` against central differences under common noise; returns it."""
    estimate, p = loss(THETA)
    assert estimate.loss.item() == pytest.approx(estimate.value, rel=1e-12)
    estimate.loss.backward()
    high, low = (loss(THETA + sign * STEP)[0].value for sign in (1, -1))
    # differences of numbers below 10 at 1e-16, over 2e-5, and the third derivative times 1e-10
    assert p.theta.grad.item() == pytest.approx((high - low) / (2 * STEP), rel=1e-6, abs=1e-8)
    return p.theta.grad.item()


@PAIRS
def test_gradient_of_point_kl_at_fixed_samples(pair):
    x_0, q = draw(pair[0], 200), Tilted(pair[1], 0.1)

    def loss(theta):
        p = Tilted(pair[0], theta)
        return point_kl(p, q, x_0, SCHEDULE, levels=16, differentiable=True), p

    assert compare_gradient(loss) > 0
    assert q.theta.grad is None


@PAIRS
def test_gradient_of_the_mean_log_ratio_at_fixed_noise(pair):
    """In the parameters of the first law, by central differences, and of the second with the sign turned."""
    x_0, step = draw(pair[0], 100), 1e-5

    def ratio(of_a, of_b):
        a, b = Tilted(pair[0], of_a), Tilted(pair[1], of_b)
        return log_likelihood_ratio(a, b, x_0, SCHEDULE, levels=16, differentiable=True), a, b

    estimate, a, b = ratio(THETA, 0.1)
    assert estimate.loss.item() == pytest.approx(float(estimate.values.mean()), rel=1e-12)
    assert not estimate.values.requires_grad and not estimate.stderrs.requires_grad
    plain = log_likelihood_ratio(Tilted(pair[0], THETA), Tilted(pair[1], 0.1), x_0, SCHEDULE, levels=16)
    assert torch.equal(plain.values, estimate.values) and torch.equal(plain.stderrs, estimate.stderrs)
    estimate.loss.backward()
    for found, ends in (
        (a.theta.grad, [ratio(THETA + sign * step, 0.1)[0] for sign in (1, -1)]),
        (b.theta.grad, [ratio(THETA, 0.1 + sign * step)[0] for sign in (1, -1)]),
    ):
        slope = float((ends[0].values - ends[1].values).mean()) / (2 * step)
        assert float(found) == pytest.approx(slope, rel=1e-5, abs=1e-7) and abs(slope) > 1e-3
    assert a.theta.grad.sign() != b.theta.grad.sign()


@PAIRS
def test_gradient_of_path_kl_at_fixed_states(pair):
    q = Tilted(pair[1], 0.1)
    trajectory = ddpm_trajectory(Exact(pair[0]), noise_for(200, 8, pair[0].dim), SCHEDULE)

    def loss(theta):
        p = Tilted(pair[0], theta)
        return path_kl(p, q, trajectory, SCHEDULE, differentiable=True, max_rows=300), p

    assert compare_gradient(loss) > 0
    assert q.theta.grad is None


def test_samples_with_a_graph_add_their_part_of_the_point_kl_gradient():
    x_0, q = draw(PLANE[0], 200), Exact(PLANE[1])

    def loss(theta, moving=True):
        p = Tilted(PLANE[0], theta)
        shift = p.theta * torch.tensor([3.0, 0.0], dtype=torch.float64)
        samples = x_0 + (shift if moving else shift.detach())
        return point_kl(p, q, samples, SCHEDULE, levels=16, differentiable=True), p

    estimate, p = loss(THETA, moving=False)
    estimate.loss.backward()
    fixed = p.theta.grad.item()
    assert abs(compare_gradient(loss) / fixed - 1) > 5e-3  # at fixed samples it is another number


def test_a_trajectory_with_a_graph_adds_its_part_of_the_path_kl_gradient():
    noise, q = noise_for(200, 5, 2), Exact(PLANE[1])

    def loss(theta, moving=True):
        p = Tilted(PLANE[0], theta)
        trajectory = ddpm_trajectory(p, noise, SCHEDULE, differentiable=moving)
        return path_kl(p, q, trajectory, SCHEDULE, differentiable=True), p

    estimate, p = loss(THETA, moving=False)
    estimate.loss.backward()
    assert abs(compare_gradient(loss) / p.theta.grad.item() - 1) > 5e-3


def test_nothing_keeps_a_graph_unless_asked_to():
    p, q = Tilted(LINE[0], THETA), Tilted(LINE[1], THETA)
    x_0 = draw(LINE[0], 5).requires_grad_()
    trajectory = ddpm_trajectory(p, noise_for(5, 3, 1), SCHEDULE)
    ratio = log_likelihood_ratio(p, q, x_0, SCHEDULE, levels=4)
    held = [
        trajectory.states,
        trajectory.x_0,
        ratio.values,
        ratio.stderrs,
        flow(p, x_0, SCHEDULE, steps=4),
    ]
    for estimate in (point_kl(p, q, x_0, SCHEDULE, levels=4), path_kl(p, q, trajectory, SCHEDULE)):
        assert estimate.loss is None
        held.append(estimate.per_sample)
    assert not any(tensor.requires_grad for tensor in held)
    assert p.theta.grad is None and x_0.grad is None


# ---- the probability-flow ODE


@PAIRS
def test_the_flow_gives_the_log_density(pair):
    law = pair[0]
    x_0 = torch.cat([draw(law, 200), draw(pair[1], 50)])
    values = flow(Exact(law), x_0, SCHEDULE)
    errors = (values - torch.from_numpy(law.log_density(x_0))).abs()
    # measured 0.0015 and 0.0012: the step size, and N(0, I) in place of a law with 0.006 of the clean mean
    assert float(errors.square().mean().sqrt()) < 4e-3 and float(errors.max()) < 0.02


def test_the_flows_density_integrates_to_one():
    axis = torch.linspace(-4, 4, 401, dtype=torch.float64)[:, None]
    values = flow(Exact(LINE[0]), axis, SCHEDULE, max_rows=100)
    assert float(values.exp().sum() * 0.02) == pytest.approx(1, abs=2e-3)  # Heun's error at 128 steps


def test_the_flow_starts_at_clean_data():
    std = 0.05  # only 5 times the noise of the first level
    law = GaussianMixture(np.zeros((1, 1)), np.array([std]), np.ones(1))
    x_0 = torch.tensor([[-0.1], [0.0], [0.05], [0.1]], dtype=torch.float64)
    values, exact = flow(Exact(law), x_0, SCHEDULE, steps=1000), torch.from_numpy(law.log_density(x_0))
    torch.testing.assert_close(values, exact, rtol=0, atol=5e-3)
    noisy = torch.from_numpy(law.noised(SCHEDULE.alpha_bar[0]).log_density(x_0))
    assert float((noisy - exact).abs().max()) > 0.05  # control: the density of data with the first level's noise


def test_more_steps_converge_with_the_second_order():
    x_0 = draw(LINE[0], 100)
    fine, *coarse = (flow(Exact(LINE[0]), x_0, SCHEDULE, steps=steps) for steps in (1000, 16, 32))
    errors = [float((values - fine).square().mean().sqrt()) for values in coarse]
    assert errors[1] < errors[0] / 3  # 4 in the limit


def test_hutchinson_is_unbiased_and_seeded():
    x_0 = draw(PLANE[0], 20)
    exact = flow(Exact(PLANE[0]), x_0, SCHEDULE, steps=32)
    drawn = torch.stack(
        [flow(Exact(PLANE[0]), x_0, SCHEDULE, steps=32, probes=1, seed=s) for s in range(60)]
    )
    errors = (drawn - exact).mean(1)  # one independent mean a seed
    assert abs(errors.mean()) < 4 * errors.std() / math.sqrt(60)
    assert float(errors.std()) > 0
    again = flow(Exact(PLANE[0]), x_0, SCHEDULE, steps=32, probes=1, seed=7, max_rows=6)
    torch.testing.assert_close(again, drawn[7], rtol=1e-10, atol=1e-10)
    many = flow(Exact(PLANE[0]), x_0, SCHEDULE, steps=32, probes=40)
    assert float((many - exact).square().mean()) < float((drawn[0] - exact).square().mean()) / 8  # 40 in the limit


def test_the_standard_error_of_a_flow_is_that_of_its_probes():
    x_0 = draw(PLANE[0], 40)
    assert not ode_log_likelihood(Exact(PLANE[0]), x_0, SCHEDULE, steps=16).stderrs.any()  # exact divergence
    single = ode_log_likelihood(Exact(PLANE[0]), x_0, SCHEDULE, steps=16, probes=1)
    assert torch.isinf(single.stderrs).all()
    exact = flow(Exact(PLANE[0]), x_0, SCHEDULE, steps=16)
    found = [ode_log_likelihood(Exact(PLANE[0]), x_0, SCHEDULE, steps=16, probes=8, seed=s) for s in range(25)]
    errors = torch.stack([estimate.values - exact for estimate in found])
    claimed = torch.stack([estimate.stderrs for estimate in found])
    # 1000 errors of one size in all: a mean square is known to 5 percent or so
    assert float(errors.square().mean()) == pytest.approx(float(claimed.square().mean()), rel=0.2)
    assert float(claimed.mean()) > 1e-3


def test_above_eight_dimensions_one_probe_is_drawn():
    """A Gaussian with unequal stds a dimension: its Jacobian is diagonal, so one Rademacher probe is already exact."""
    law = GaussianMixture(np.linspace(-1, 1, 9)[None], np.linspace(0.3, 1.2, 9)[None], np.ones(1))
    x_0 = draw(law, 30)
    calls = []

    def counted(x_t, timestep):
        calls.append(len(x_t))
        return Exact(law)(x_t, timestep)

    values = flow(counted, x_0, SCHEDULE)
    # 9 dimensions at 0.001 to 0.003 each
    torch.testing.assert_close(values, torch.from_numpy(law.log_density(x_0)), rtol=0, atol=0.05)
    assert len(calls) == 2 * len(SCHEDULE.log_snr_grid(128)[0])


def test_the_flow_works_in_a_callers_inference_mode_and_in_single_precision():
    x_0 = draw(LINE[0], 10)
    expected = flow(Exact(LINE[0]), x_0, SCHEDULE)
    with torch.inference_mode():
        assert torch.equal(flow(Exact(LINE[0]), x_0 + 0, SCHEDULE), expected)
    single = flow(Exact(LINE[0]), x_0.float(), SCHEDULE)
    assert single.dtype == torch.float64
    torch.testing.assert_close(single, expected, rtol=0, atol=1e-3)


# ---- normalisers


def exponents(pair, counts, constant, seed):
    """u = log p - log q + constant at samples of q and of p: log Z is the constant."""
    q, p = pair
    return [
        exact_ratio(p, q, draw(law, count, seed)).numpy() + constant
        for law, count, seed in ((q, counts[0], 2 * seed), (p, counts[1], 2 * seed + 1))
    ]


@PAIRS
@pytest.mark.parametrize("counts", [(2000, 2000), (500, 3000)])
def test_bennett_finds_the_normaliser(pair, counts):
    u_q, u_p = exponents(pair, counts, 1.7, seed=0)
    value, stderr = log_normalizer(u_q, u_p)
    assert abs(value - 1.7) < 4 * stderr
    assert 0 < stderr < 0.05
    # Controls: a sign, samples of p for those of q, and the sets swapped (the root depends on both sets together and on
    # their sizes, so that shows only where the sizes differ).
    wrongs = [log_normalizer(-u_q, -u_p), log_normalizer(u_p)] + ([log_normalizer(u_p, u_q)] * (counts[0] != counts[1]))
    for wrong, error in wrongs:
        assert abs(wrong - 1.7) > 8 * error


def test_importance_sampling_finds_the_normaliser_with_a_larger_error():
    u_q, u_p = exponents(LINE, (4000, 4000), -2.0, seed=3)
    value, stderr = log_normalizer(u_q)
    assert abs(value + 2.0) < 4 * stderr
    assert log_normalizer(u_q, u_p)[1] < stderr


@pytest.mark.parametrize("both", [True, False])
def test_the_standard_error_of_a_normaliser_is_the_spread_of_its_values(both):
    found = []
    for seed in range(300):
        u_q, u_p = exponents(LINE, (400, 200), 0.5, seed)
        value, stderr = log_normalizer(u_q, u_p if both else None)
        found.append((value - 0.5) / stderr)
    # 4 standard errors of the mean and of the standard deviation of 300 values; log-mean-exp is biased downwards.
    assert abs(np.mean(found)) < 0.23 + (0 if both else 0.1)
    assert np.std(found, ddof=1) == pytest.approx(1, abs=0.17)


def test_a_constant_exponent_is_its_own_normaliser():
    assert log_normalizer(np.full(5, 0.3), np.full(3, 0.3)) == (0.3, 0.0)
    value, stderr = log_normalizer([800.0, 800.0])  # exp(800) overflows
    assert value == pytest.approx(800, rel=1e-12) and stderr == 0


def test_laws_that_do_not_overlap_have_no_finite_error():
    _, stderr = log_normalizer([-5000.0, -5001.0], [5000.0, 5001.0])
    assert stderr == math.inf


# ---- sampled timesteps

PROPOSALS = {
    "log SNR": None,
    "uniform t": np.ones(1000),
    "uneven": np.random.default_rng(0).uniform(0.1, 3.0, size=1000),
}
EACH_PROPOSAL = pytest.mark.parametrize("proposal", PROPOSALS.values(), ids=PROPOSALS.keys())


@EACH_PROPOSAL
def test_weights_undo_the_proposal(proposal):
    """Evenly spaced uniforms turn the mean over draws into the sum over all timesteps."""
    count = 400_000
    uniforms = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    timestep, weight = sample_timesteps(SCHEDULE, uniforms, proposal=proposal)
    log_snr = SCHEDULE.log_snr
    middles = np.concatenate([log_snr[:1], (log_snr[1:] + log_snr[:-1]) / 2, log_snr[-1:]])
    for integrand in (np.ones(1000), np.sin(log_snr), np.arange(1000.0)):
        exact = float((0.5 * -np.diff(middles) * integrand).sum())
        found = float((weight * torch.from_numpy(integrand)[timestep]).mean())
        assert found == pytest.approx(exact, rel=2e-3, abs=2e-3)  # a timestep's share is off by one draw of 400 at most
    if proposal is None:
        assert weight.unique().numel() == 1 or float(weight.max() - weight.min()) < 1e-9


@PAIRS
@EACH_PROPOSAL
def test_single_draws_average_to_the_kl(pair, proposal):
    p, q = pair
    rng = np.random.default_rng(5)
    timestep, weight = sample_timesteps(SCHEDULE, torch.from_numpy(rng.random(60_000)), proposal=proposal)
    x_0 = draw(p, 60_000)
    x_t = SCHEDULE.add_noise(x_0, torch.from_numpy(rng.standard_normal(x_0.shape)), timestep)
    gaps = (Exact(p)(x_t, timestep) - Exact(q)(x_t, timestep)).square().sum(1)
    stderr = float((weight * gaps).std()) / math.sqrt(60_000)
    exact = exact_kl(p, q)
    assert abs(float((weight * gaps).mean()) - exact) < 4 * stderr + 1e-3 * exact
    assert stderr < 0.05 * exact
    # Control: without the weights.
    assert abs(float(gaps.mean()) - exact) > 10 * float(gaps.std()) / math.sqrt(60_000)


def test_the_ends_of_the_unit_interval_are_the_ends_of_the_schedule():
    uniforms = torch.tensor([[0.0, 0.5], [0.999, math.nextafter(1.0, 0.0)]], dtype=torch.float64)
    timestep, weight = sample_timesteps(SCHEDULE, uniforms)
    assert timestep.dtype == torch.int64 and timestep.shape == weight.shape == (2, 2)
    assert timestep[0, 0] == 0 and timestep[1, 1] == 999
    middle = (SCHEDULE.log_snr[0] + SCHEDULE.log_snr[-1]) / 2
    assert SCHEDULE.log_snr[timestep[0, 1]] == pytest.approx(middle, abs=0.02)  # log SNR steps there
    assert sample_timesteps(SCHEDULE, uniforms.float().clamp(max=0.99))[1].dtype == torch.float32


# ---- bad input


def same(x_t, _):
    return x_t


X_0 = torch.zeros(4, 2)
STATES = torch.zeros(2, 4, 2)
BAD = {
    "one level": (lambda: point_kl(same, same, X_0, SCHEDULE, levels=1), "levels=1"),
    "one level of a ratio": (lambda: log_likelihood_ratio(same, same, X_0, SCHEDULE, levels=1), "levels=1"),
    "two levels, one repeat": (lambda: log_likelihood_ratio(same, same, X_0, SCHEDULE, levels=2), "3 levels or 2"),
    "one step": (lambda: flow(same, X_0, SCHEDULE, steps=1), "steps=1"),
    "no repeats": (lambda: point_kl(same, same, X_0, SCHEDULE, repeats=0), "repeats=0"),
    "no rows": (lambda: point_kl(same, same, X_0, SCHEDULE, max_rows=0), "max_rows=0"),
    "a vector": (lambda: point_kl(same, same, torch.zeros(4), SCHEDULE), r"shape \(4,\)"),
    "no samples": (lambda: point_kl(same, same, X_0[:0], SCHEDULE), r"shape \(0, 2\)"),
    "whole numbers": (lambda: log_likelihood_ratio(same, same, X_0.long(), SCHEDULE), "int64"),
    "nan samples": (lambda: point_kl(same, same, X_0 * math.nan, SCHEDULE), "samples hold"),
    "nan samples of the flow": (lambda: flow(same, X_0 * math.nan, SCHEDULE), "samples hold"),
    "wrong shape": (lambda: point_kl(same, lambda x, _: x[:, :1], X_0, SCHEDULE), "must agree"),
    "wrong rows": (lambda: log_likelihood_ratio(lambda x, _: x[:1], same, X_0, SCHEDULE), "must agree"),
    "nan prediction": (lambda: point_kl(same, lambda x, _: x / 0, X_0, SCHEDULE), "not finite"),
    "inf at one timestep": (
        lambda: log_likelihood_ratio(same, lambda x, t: torch.where(t[:, None] == 999, math.inf, x), X_0, SCHEDULE),
        r"not finite at timesteps \[999\]",
    ),
    "nan along the flow": (lambda: flow(lambda x, _: x * math.nan, X_0, SCHEDULE), "not finite"),
    "a flow without gradient": (lambda: flow(lambda x, _: x.detach(), X_0, SCHEDULE), "differentiate"),
    "no probes": (lambda: flow(same, X_0, SCHEDULE, probes=0), "probes=0"),
    "noise of a start only": (lambda: ddpm_trajectory(same, torch.zeros(4, 1, 2), SCHEDULE), "steps >= 1"),
    "increasing timesteps": (
        lambda: ddpm_trajectory(same, torch.zeros(4, 3, 2), SCHEDULE, timesteps=[0, 999]),
        "decreasing",
    ),
    "timesteps beyond the schedule": (
        lambda: path_kl(same, same, Trajectory(STATES, np.array([1000, 0]), X_0), SCHEDULE),
        "below 1000",
    ),
    "fewer timesteps than states": (
        lambda: path_kl(same, same, Trajectory(STATES, np.array([9]), X_0), SCHEDULE),
        "give 2 decreasing",
    ),
    "states without steps": (
        lambda: path_kl(same, same, Trajectory(X_0, np.arange(4)[::-1], X_0), SCHEDULE),
        r"expected \(steps, n",
    ),
    "nan prediction on a path": (
        lambda: path_kl(lambda x, _: x / 0, same, Trajectory(STATES, np.array([9, 0]), X_0), SCHEDULE),
        r"not finite at timesteps \[0, 9\]",
    ),
    "one exponent": (lambda: log_normalizer([1.0]), "u_q has shape"),
    "no exponents of p": (lambda: log_normalizer([1.0, 2.0], []), "u_p has shape"),
    "an infinite exponent": (lambda: log_normalizer([1.0, 2.0], [0.0, math.inf]), "u_p has shape"),
    "a matrix of exponents": (lambda: log_normalizer(np.zeros((2, 2))), "u_q has shape"),
    "a uniform of one": (lambda: sample_timesteps(SCHEDULE, torch.tensor([0.2, 1.0])), r"0.2 to 1"),
    "a negative uniform": (lambda: sample_timesteps(SCHEDULE, torch.tensor([-0.1])), r"\[0, 1\)"),
    "a nan uniform": (lambda: sample_timesteps(SCHEDULE, torch.tensor([math.nan])), r"\[0, 1\)"),
    "a short proposal": (lambda: sample_timesteps(SCHEDULE, torch.zeros(1), proposal=[1.0]), "give 1000"),
    "a proposal with a zero": (
        lambda: sample_timesteps(SCHEDULE, torch.zeros(1), proposal=np.arange(1000.0)),
        "positive finite",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD.values(), ids=BAD.keys())
def test_bad_input_is_refused_by_name(case):
    call, message = case
    with pytest.raises(ValueError, match=message):
        call()


def test_one_sample_has_an_estimate_but_no_standard_error():
    estimate = point_kl(Exact(LINE[0]), Exact(LINE[1]), draw(LINE[0], 1), SCHEDULE)
    assert math.isfinite(estimate.value) and estimate.stderr == math.inf


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_cuda_device_agrees_with_the_processor():
    def rotated(x_t, timestep):
        return torch.sin(x_t.flip(1)) + timestep[:, None] / 1000

    def answers(device):
        x_0, noise = draw(PLANE[0], 20).to(device), noise_for(20, 4, 2).to(device)
        ratio = log_likelihood_ratio(rotated, same, x_0, SCHEDULE)
        kl = point_kl(rotated, same, x_0, SCHEDULE).per_sample
        path = path_kl(rotated, same, ddpm_trajectory(rotated, noise, SCHEDULE), SCHEDULE).per_sample
        flows = [flow(rotated, x_0, SCHEDULE, steps=16, probes=probes) for probes in (None, 2)]
        weights = sample_timesteps(SCHEDULE, x_0[:, 0].abs() % 1)[1]
        return [tensor.cpu() for tensor in (ratio.values, ratio.stderrs, kl, path, *flows, weights)]

    torch.testing.assert_close(answers("cuda"), answers("cpu"), rtol=1e-6, atol=1e-6)
