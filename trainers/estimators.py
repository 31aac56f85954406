"""Divergences, likelihoods and normalisers in nats from noise predictions, with standard errors.

A `Predictor` maps (x_t, int64 timesteps of shape (batch,)) to the noise prediction, same shape as x_t; a conditional
model is wrapped, ``lambda x_t, t: denoiser(x_t, t, condition)``. Tensors decide device and precision. Noise comes from
NumPy's Philox and depends on (seed, repeat, timestep, sample index) alone, so two calls with one seed share it (common
random numbers). Several noise levels travel in one forward of at most `max_rows` rows: call overhead dominates a small
network.

A divergence and its samples belong together: KL(p || q) needs x_0, or a trajectory, drawn from p. Nothing here can
check that.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike
from scipy.special import expit, logsumexp

from dualsweep.constraints import NonFiniteError
from dualsweep.trainers.noise_schedule import NoiseSchedule

Predictor = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
# (x_0, timestep, noise) -> one value a row
Integrand = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

MAX_ROWS = 8192
EXACT_DIVERGENCE_DIM = 8  # up to here the exact divergence costs at most eight backward passes a level


@dataclass(frozen=True, eq=False)
class Estimate:
    """A mean over independent samples, nats."""

    value: float
    stderr: float  # of the mean over samples, their noise draws included; inf for one sample
    count: int  # samples
    per_sample: torch.Tensor  # float64 (count,), detached
    loss: torch.Tensor | None  # `value` with its graph, where a differentiable estimate was asked for


@dataclass(frozen=True, eq=False)
class RatioEstimate:
    """log p_a(x) - log p_b(x) of every sample, nats."""

    values: torch.Tensor  # float64 (n,)
    stderrs: torch.Tensor  # float64 (n,), of the noise draws alone: independent between samples
    loss: torch.Tensor | None = None  # mean of `values` with its graph, where a differentiable estimate was asked for


@dataclass(frozen=True, eq=False)
class LikelihoodEstimate:
    """log p(x) of every sample, nats."""

    values: torch.Tensor  # float64 (n,)
    stderrs: torch.Tensor  # float64 (n,), of the divergence's probes: 0 where it is exact, inf with a single probe


@dataclass(frozen=True, eq=False)
class Trajectory:
    """One run of a DDPM chain: what it saw at each step, and where it ended."""

    states: torch.Tensor  # (steps, n, *sample_shape), x_t at each of `timesteps`
    timesteps: np.ndarray  # int64 (steps,), decreasing
    x_0: torch.Tensor  # (n, *sample_shape)


def point_kl(
    p: Predictor,
    q: Predictor,
    x_0: torch.Tensor,
    schedule: NoiseSchedule,
    *,
    levels: int = 64,
    seed: int = 0,
    repeats: int = 1,
    differentiable: bool = False,
    max_rows: int = MAX_ROWS,
) -> Estimate:
    """KL(p || q) of the models' sample laws from noised samples of p: 1/2 int E|noise_p - noise_q|^2 d log SNR.

    What lies beyond the schedule's two ends is left out, so the value is low. Measured on mixtures with stds of 0.3 to
    0.5 under the linear schedule with T = 1000: the clean end costs 0.001 to 0.12 percent of the KL (half the mean
    squared difference at timestep 0), the noisy end 1e-5 nats. The quadrature adds less than those two from 32 levels
    on, up to 0.1 percent of the KL at 16 levels, 3 to 6 percent at 8. A schedule that ends with signal left also leaves
    out KL(p_T || q_T).

    With `differentiable` the gradient of `loss` is that at fixed samples: it flows into p's predictions, never into q's
    parameters. The law of x_0 depends on the model too; that part is there only if x_0 carries the graph of the sampler
    that made it, and then q's predictions pass it on (freeze q's parameters).

    Args:
        x_0: samples of p, floating point, shape (n, *sample_shape).
        repeats: independent noise draws a level and sample.
    Raises: ValueError for fewer than two levels, samples or predictions of a wrong shape, numbers that are not finite.
    Source: methods.md 0.2 and H7 (I-MMSE for the score difference); dimensions are summed, not averaged.
    """
    _check_samples(x_0, levels, repeats, max_rows)
    timesteps, weights = schedule.log_snr_grid(levels)

    def squared_gap(clean: torch.Tensor, timestep: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        return _squared_gap(p, q, schedule.add_noise(clean, noise, timestep), timestep)

    with torch.set_grad_enabled(differentiable):
        table = _level_table(squared_gap, x_0, timesteps, seed=seed, repeats=repeats, max_rows=max_rows)
        per_sample = torch.as_tensor(weights).to(table) @ table.mean(0)
        return _estimate(per_sample, differentiable)


def ddpm_trajectory(
    p: Predictor,
    noise: torch.Tensor,
    schedule: NoiseSchedule,
    *,
    timesteps: ArrayLike | None = None,
    differentiable: bool = False,
) -> Trajectory:
    """Run p's DDPM chain with sigma_t^2 = beta_t, the betas being those of the chain's own, possibly coarse, steps.

    Args:
        noise: standard normal, shape (n, steps + 1, *sample_shape): the start, then what each step adds. The last step
            adds noise too (std 0.01 from timestep 0 of the linear schedule), as the law that `path_kl` measures has it.
        timesteps: int (steps,), decreasing; default: evenly spaced from the noisiest one to 0.
        differentiable: keep the graph through all steps.
    Source: Ho, Jain and Abbeel, NeurIPS 2020, algorithm 2; predictions of x_0 are not clipped.
    """
    if noise.ndim < 3 or noise.shape[1] < 2:
        raise ValueError(
            f"noise has shape {tuple(noise.shape)}, expected (n, steps + 1, *sample_shape) with steps >= 1"
        )
    steps = noise.shape[1] - 1
    if timesteps is None:
        timesteps = np.linspace(schedule.num_train_timesteps - 1, 0, steps).round()
    timesteps = _checked_chain(timesteps, schedule, steps)
    betas, alpha_bar = _chain_betas(schedule, timesteps), schedule.alpha_bar[timesteps]
    states, x_t = [], noise[:, 0]
    with torch.set_grad_enabled(differentiable):
        for step, (timestep, beta) in enumerate(zip(timesteps.tolist(), betas.tolist(), strict=True)):
            states.append(x_t)
            prediction = _predict(p, x_t, torch.full((len(x_t),), timestep, device=x_t.device)).to(x_t.dtype)
            mean = (x_t - beta / math.sqrt(1 - alpha_bar[step]) * prediction) / math.sqrt(1 - beta)
            x_t = mean + math.sqrt(beta) * noise[:, step + 1]
        return Trajectory(states=torch.stack(states), timesteps=timesteps, x_0=x_t)


def path_kl(
    p: Predictor,
    q: Predictor,
    trajectory: Trajectory,
    schedule: NoiseSchedule,
    *,
    differentiable: bool = False,
    max_rows: int = MAX_ROWS,
) -> Estimate:
    """KL between the DDPM chains of p and of q, all their states included, on trajectories of p.

    Both chains start from the same noise and take the trajectory's timesteps with sigma_t^2 = beta_t, so each step adds
    ``beta / (2 alpha (1 - alpha_bar)) |noise_p - noise_q|^2`` with the chain's own beta. It bounds the KL of the
    chains' samples from above, and tends to the point KL as the steps get finer.

    The gradient of `loss` is that at fixed states, as in `point_kl`: the dependence of the states on p is there only if
    the trajectory was made with `differentiable`.

    Raises: ValueError for a trajectory whose parts do not match, a wrong shape, or numbers that are not finite.
    Source: methods.md 0.2 and H7; Ho, Jain and Abbeel, NeurIPS 2020, eq. 12.
    """
    states = trajectory.states
    if states.ndim < 3 or states.shape[1] < 1:
        raise ValueError(f"trajectory.states has shape {tuple(states.shape)}, expected (steps, n, *sample_shape)")
    _check_samples(states.flatten(0, 1), max_rows=max_rows)
    timesteps = _checked_chain(trajectory.timesteps, schedule, len(states))
    betas = _chain_betas(schedule, timesteps)
    weights = betas / (2 * (1 - betas) * (1 - schedule.alpha_bar[timesteps]))
    each = torch.as_tensor(timesteps, device=states.device).repeat_interleave(states.shape[1])
    with torch.set_grad_enabled(differentiable):
        parts = zip(states.flatten(0, 1).split(max_rows), each.split(max_rows), strict=True)
        table = torch.cat([_squared_gap(p, q, x_t, timestep) for x_t, timestep in parts]).view(states.shape[:2])
        return _estimate(torch.as_tensor(weights).to(table) @ table, differentiable)


def log_likelihood_ratio(
    a: Predictor,
    b: Predictor,
    x_0: torch.Tensor,
    schedule: NoiseSchedule,
    *,
    levels: int = 128,
    seed: int = 0,
    repeats: int = 1,
    antithetic: bool = True,
    differentiable: bool = False,
    max_rows: int = MAX_ROWS,
) -> RatioEstimate:
    """log p_a(x) - log p_b(x) of every sample: 1/2 int E[|noise - noise_b|^2 - |noise - noise_a|^2] d log SNR.

    Both models see the same noise. `antithetic` evaluates each draw and its negative, which cancels what is odd in the
    noise; a repeat then costs two forwards a model and level. At equal cost the variance came out 1.9 to 3.7 times
    smaller than with two independent draws (mixtures in 2 and 1 dimensions).

    The standard errors know the noise only. With `repeats` of 2 or more a level's variance is that among its repeats
    (draws, or antithetic pairs), divided by `repeats`; variances add up over levels because levels share no noise. With
    one repeat a level's variance is estimated from its neighbours: the squared second difference
    (X[k-1] - 2 X[k] + X[k+1])^2 / 6 of the integrand over levels, which cancels a trend linear in the level; curvature
    makes it a little too large. Both are right on average (variance over squared standard error 0.92 to 1.08 on
    mixtures), but the integrand is skewed: at 128 levels 2.5 percent of single samples lie beyond 3 standard errors and
    0.3 percent beyond 5. Means over samples are better behaved.

    Not in them: the truncation at the schedule's ends, and the quadrature. For mixtures with stds of 0.3 to 0.5 under
    the linear schedule with T = 1000 their root mean square over samples is 4e-5 to 3e-3 nats from 32 levels on (up to
    7e-3, in the tails), 0.05 to 0.09 nats at 8 levels. From 32 levels on it is nearly all the clean end, where half the
    integrand of timestep 0 is missing.

    With `differentiable` the gradient of `loss` is that at fixed noise, in the parameters of both predictors; freeze those
    of one that is to be held still.

    Raises: ValueError for fewer than two levels (three with one repeat), wrong shapes, numbers that are not finite.
    Source: unlearning paper, Lemma 2; methods.md 0.3 and H7. Second differences: von Neumann (1941), one order higher.
    """
    _check_samples(x_0, levels, repeats, max_rows)
    timesteps, weights = schedule.log_snr_grid(levels)
    if repeats == 1 and len(timesteps) < 3:
        raise ValueError(f"levels={levels} with repeats=1 leaves no standard error: give 3 levels or 2 repeats")

    def error_gap(clean: torch.Tensor, timestep: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        x_t = schedule.add_noise(clean, noise, timestep)
        of_a, of_b = _predict(a, x_t, timestep), _predict(b, x_t, timestep)
        # |noise - b|^2 - |noise - a|^2 as a product: near the clean end the two squares agree in most of their digits.
        return ((of_a - of_b) * (2 * noise - of_a - of_b)).flatten(1).sum(1).double()

    def pair_mean(clean: torch.Tensor, timestep: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        return (error_gap(clean, timestep, noise) + error_gap(clean, timestep, -noise)) / 2

    integrand = pair_mean if antithetic else error_gap
    with torch.set_grad_enabled(differentiable):
        table = _level_table(integrand, x_0, timesteps, seed=seed, repeats=repeats, max_rows=max_rows)
        weights = torch.as_tensor(weights).to(table)
        values = weights @ table.mean(0)
    table = table.detach()
    if repeats > 1:
        variances = table.var(0) / repeats
    else:
        inner = (table[0, :-2] - 2 * table[0, 1:-1] + table[0, 2:]).square() / 6
        variances = torch.cat([inner[:1], inner, inner[-1:]])
    return RatioEstimate(
        values=values.detach(),
        stderrs=(weights.square() @ variances).sqrt(),
        loss=values.mean() if differentiable else None,
    )


def ode_log_likelihood(
    predictor: Predictor,
    x_0: torch.Tensor,
    schedule: NoiseSchedule,
    *,
    steps: int = 128,
    seed: int = 0,
    probes: int | None = None,
    max_rows: int = MAX_ROWS,
) -> LikelihoodEstimate:
    """log p(x) of every sample under the probability-flow ODE that ends in N(0, I) at the noisiest level.

    With the angle phi, cos phi = sqrt(alpha_bar), the flow of the variance-preserving process is dx/dphi = v with
    v = (noise prediction - sin phi x) / cos phi, and log p along it falls at the rate of v's divergence. Heun's method
    runs over the timesteps of ``schedule.log_snr_grid(steps)``, so the denoiser only sees timesteps that it was trained
    on. The first step starts at phi = 0, where v = 0 for any smooth density: the result is the density of clean data,
    not of data with the first level's noise.

    Measured on mixtures with stds of 0.3 to 0.5 in 1 and 2 dimensions under the linear schedule with T = 1000: root
    mean square error over samples 3e-4 to 3e-3 nats at 128 steps, 4e-3 to 3e-2 at 32. What more steps do not remove,
    up to 2e-3, is N(0, I) in place of the noisiest law: samplers start from it too.

    Args:
        probes: Rademacher probes of Hutchinson's divergence estimate, fixed along the path and drawn from `seed`; None:
            exact divergence up to 8 dimensions, one probe above.
    Returns: no gradient: its values are differentiated in x along the way. With probes unbiased but noisy, and the standard
        errors are those of the probes' mean; what the steps leave out is in neither.
    Raises: ValueError for fewer than two steps, wrong shapes, or numbers that are not finite.
    Source: Song et al., ICLR 2021, section 4.3; the angle is that of Salimans and Ho, ICLR 2022, appendix D.
    """
    _check_samples(x_0, steps, max_rows=max_rows, name="steps")
    if probes is not None and probes < 1:
        raise ValueError(f"probes={probes}: give at least 1, or None for the default")
    dim = x_0[0].numel()
    exact = probes is None and dim <= EXACT_DIVERGENCE_DIM
    if exact:
        directions = torch.eye(dim, dtype=x_0.dtype).view(dim, 1, *x_0.shape[1:]).expand(dim, *x_0.shape).to(x_0.device)
    else:
        generator = np.random.Generator(np.random.Philox(key=[seed, 0x0DE]))
        signs = generator.integers(2, size=(len(x_0), probes or 1, *x_0.shape[1:])) * 2.0 - 1.0
        directions = torch.from_numpy(signs).to(x_0).transpose(0, 1)
    timesteps = schedule.log_snr_grid(steps)[0].tolist()
    parts = zip(x_0.split(max_rows), directions.split(max_rows, dim=1), strict=True)
    # A caller's inference mode would refuse the gradients that the divergence needs.
    with torch.inference_mode(False), torch.enable_grad():
        found = [_flow(predictor, clean, along, exact, timesteps, schedule) for clean, along in parts]
    return LikelihoodEstimate(*(torch.cat(each) for each in zip(*found, strict=True)))


def _flow(
    predictor: Predictor,
    x_0: torch.Tensor,
    directions: torch.Tensor,
    exact: bool,
    timesteps: list[int],
    schedule: NoiseSchedule,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`ode_log_likelihood` of one batch and its standard errors: divergence along `directions` (k, n, *sample_shape), summed
    where they are `exact`, the axes themselves, and averaged where they are probes.
    """
    scale = 1.0 if exact else 1 / len(directions)
    x = x_0.detach().clone().double()
    slope, divergence, change = torch.zeros_like(x), x.new_zeros(len(x)), x.new_zeros(len(x))
    each = change_each = x.new_zeros(len(directions), len(x))  # the part of every direction in the two
    angle = 0.0

    def velocity(
        x: torch.Tensor, timestep: int, *, differentiate: bool
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """v and, if asked for, its divergence, and the part of every direction in it."""
        signal, spread = math.sqrt(schedule.alpha_bar[timestep]), math.sqrt(1 - schedule.alpha_bar[timestep])
        at = x.detach().to(x_0.dtype).requires_grad_(differentiate)
        prediction = _predict(predictor, at, torch.full((len(at),), timestep, device=at.device))
        trace, along_each = x.new_zeros(len(x)), x.new_zeros(len(directions), len(x))
        if differentiate and not prediction.requires_grad:
            raise ValueError(
                "the noise prediction has no gradient in x_t: give a predictor that torch can differentiate"
            )
        for i, along in enumerate(directions if differentiate else ()):
            (pulled,) = torch.autograd.grad(prediction, at, along.to(prediction), retain_graph=i + 1 < len(directions))
            along_each[i] = (pulled * along).flatten(1).sum(1).double()
            trace += scale * along_each[i]
        slope = (prediction.detach().double() - spread * x) / signal
        return slope, (trace - spread * x[0].numel()) / signal, along_each / signal

    for timestep in timesteps:
        following = math.acos(math.sqrt(schedule.alpha_bar[timestep]))
        half = (following - angle) / 2
        guess, *_ = velocity(x + 2 * half * slope, timestep, differentiate=False)
        x = x + half * (slope + guess)
        slope, ahead, ahead_each = velocity(x, timestep, differentiate=True)
        change += half * (divergence + ahead)
        change_each = change_each + half * (each + ahead_each)
        divergence, each, angle = ahead, ahead_each, following
    values = change - 0.5 * (x.square() + math.log(2 * math.pi)).flatten(1).sum(1)
    if exact:
        return values, torch.zeros_like(values)
    if len(directions) == 1:
        return values, torch.full_like(values, math.inf)
    return values, change_each.std(0) / math.sqrt(len(directions))


def log_normalizer(u_q: ArrayLike, u_p: ArrayLike | None = None) -> tuple[float, float]:
    """log Z of p = q exp(u) / Z, with its standard error, from u at independent samples of q and of p.

    With both sets, Bennett's acceptance ratio: the root z of
    ``sum over both of sigmoid(log(n_p / n_q) + u - z) = n_p``, the maximum-likelihood estimate from both sets. Its
    standard error is the delta method's, root of (n_q var_q(s) + n_p var_p(s)) over the sum of s (1 - s), with s the
    sigmoids at the root. With `u_q` alone it is log-mean-exp, standard error std(exp u) / (mean(exp u) sqrt(n)).
    Neither error can be trusted where the two laws hardly overlap: it only knows the samples it saw.

    Raises: ValueError unless each set is a vector of at least two finite numbers.
    Source: Bennett (1976); Shirts, Bair, Hooker and Pande (2003) for the likelihood form.
    """
    u_q = _checked_exponents(u_q, "u_q")
    if u_p is None:
        weights = np.exp(u_q - u_q.max())
        stderr = weights.std(ddof=1) / (weights.mean() * math.sqrt(len(u_q)))
        return float(logsumexp(u_q) - math.log(len(u_q))), float(stderr)
    from scipy.optimize import brentq  # here: a third of a second to import, at every start of a worker

    u_p = _checked_exponents(u_p, "u_p")
    shift = math.log(len(u_p) / len(u_q))
    both = np.concatenate([u_q, u_p])

    def excess(z: float) -> float:
        return float(expit(shift + both - z).sum() - len(u_p))

    low, high = float(both.min()), float(both.max())
    # The sum falls in z and crosses n_p between the extremes of u; equal ones leave nothing to search.
    value = low if low == high else brentq(excess, low - 1e-9, high + 1e-9, xtol=1e-12)
    of_q, of_p = expit(shift + u_q - value), expit(shift + u_p - value)
    spread = len(u_q) * of_q.var(ddof=1) + len(u_p) * of_p.var(ddof=1)
    slope = float((of_q * (1 - of_q)).sum() + (of_p * (1 - of_p)).sum())
    return value, math.sqrt(spread) / slope if slope > 0 else math.inf


def sample_timesteps(
    schedule: NoiseSchedule, uniforms: torch.Tensor, *, proposal: ArrayLike | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Timesteps for one-draw estimates of a KL, with the weights that make them unbiased.

    ``mean(weight * |noise_p - noise_q|^2)`` over draws estimates the sum over all timesteps in which each has half the
    log SNR that it stands for as its weight, nats. By default timesteps are drawn in proportion to that, uniformly in
    log SNR, and the weight is a constant. Which proposal varies least depends on the pair: uniform in log SNR beats
    uniform t where the laws differ in fine detail, and loses where they differ in the proportions of far modes; what a
    pilot run finds is better than both (benchmarks/timestep_sampling.py).

    Args:
        uniforms: the caller's numbers in [0, 1), any shape.
        proposal: shape (num_train_timesteps,), positive, in proportion to each timestep's probability; ones: uniform t.
    Returns: int64 timesteps and weights, both of that shape and on that device; weights in the precision of `uniforms`.
    Raises: ValueError if a number lies outside [0, 1), or a proposal is not positive and finite.
    """
    if not bool(((uniforms >= 0) & (uniforms < 1)).all()):
        raise ValueError(f"uniforms must lie in [0, 1), got {float(uniforms.min()):g} to {float(uniforms.max()):g}")
    log_snr = schedule.log_snr
    shares = 0.5 * -np.diff(np.concatenate([log_snr[:1], (log_snr[1:] + log_snr[:-1]) / 2, log_snr[-1:]]))
    chances = shares if proposal is None else np.asarray(proposal, dtype=np.float64)
    if chances.shape != shares.shape or not np.isfinite(chances).all() or (chances <= 0).any():
        raise ValueError(
            f"proposal of shape {chances.shape}: give {len(shares)} positive finite numbers, one a timestep"
        )
    chances = chances / chances.sum()
    rights = torch.as_tensor(np.cumsum(chances), device=uniforms.device)
    timestep = torch.searchsorted(rights, uniforms.double(), right=True).clamp(max=len(shares) - 1)
    return timestep, torch.as_tensor(shares / chances, device=uniforms.device)[timestep].to(uniforms.dtype)


def _level_table(
    integrand: Integrand, x_0: torch.Tensor, timesteps: np.ndarray, *, seed: int, repeats: int, max_rows: int
) -> torch.Tensor:
    """The integrand of every repeat, level and sample, shape (repeats, levels, n)."""
    draws = [(repeat, timestep) for repeat in range(repeats) for timestep in timesteps.tolist()]
    held = max(1, max_rows // len(x_0))
    done = []
    for first in range(0, len(draws), held):
        block = draws[first : first + held]
        drawn = [_level_noise(x_0.shape, timestep, seed=seed, repeat=repeat) for repeat, timestep in block]
        noise = torch.from_numpy(np.concatenate(drawn)).to(x_0)
        each = torch.tensor([timestep for _, timestep in block], device=x_0.device).repeat_interleave(len(x_0))
        clean = x_0.repeat(len(block), *[1] * (x_0.ndim - 1))
        parts = zip(*(rows.split(max_rows) for rows in (clean, each, noise)), strict=True)
        done += [integrand(*part) for part in parts]
    return torch.cat(done).view(repeats, len(timesteps), len(x_0))


def _level_noise(shape: tuple[int, ...], timestep: int, *, seed: int, repeat: int) -> np.ndarray:
    """Standard normal noise of one level: row i does not depend on how many rows follow it."""
    generator = np.random.Generator(np.random.Philox(key=[seed, 0xE571], counter=[0, 0, repeat, timestep]))
    return generator.standard_normal(shape, dtype=np.float32)  # at any precision of x_0, so that all share their noise


def _squared_gap(p: Predictor, q: Predictor, x_t: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
    """|noise_p - noise_q|^2 of every row, summed over dimensions, float64 (rows,)."""
    of_p = _predict(p, x_t, timestep)
    # q has no gradient of its own; it only passes on that of samples that were made with a graph.
    with torch.set_grad_enabled(torch.is_grad_enabled() and x_t.requires_grad):
        of_q = _predict(q, x_t, timestep)
    return (of_p - of_q).square().flatten(1).sum(1).double()


def _predict(predictor: Predictor, x_t: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
    prediction = predictor(x_t, timestep)
    if prediction.shape != x_t.shape:
        raise ValueError(
            f"noise prediction of shape {tuple(prediction.shape)} for x_t of shape {tuple(x_t.shape)}: they must agree"
        )
    if not bool(torch.isfinite(prediction).all()):
        bad = timestep[~torch.isfinite(prediction).flatten(1).all(1)].unique().tolist()
        raise NonFiniteError(
            f"noise predictions are not finite at timesteps {bad[:8]}: look at the model's weights and samples"
        )
    # half-precision predictions: their difference is taken in the samples' precision
    return prediction.to(torch.promote_types(prediction.dtype, x_t.dtype))


def _estimate(per_sample: torch.Tensor, differentiable: bool) -> Estimate:
    values = per_sample.detach()
    count = len(values)
    stderr = float(values.std()) / math.sqrt(count) if count > 1 else math.inf
    return Estimate(
        value=float(values.mean()),
        stderr=stderr,
        count=count,
        per_sample=values,
        loss=per_sample.mean() if differentiable else None,
    )


def _chain_betas(schedule: NoiseSchedule, timesteps: np.ndarray) -> np.ndarray:
    """Beta of each step of a chain over decreasing timesteps, whose last step leads to clean data, float64 (steps,)."""
    alpha_bar = schedule.alpha_bar[timesteps]
    return 1 - alpha_bar / np.append(alpha_bar[1:], 1.0)


def _checked_chain(timesteps: ArrayLike, schedule: NoiseSchedule, steps: int) -> np.ndarray:
    chain = np.asarray(timesteps).astype(np.int64)
    inside = chain.ndim == 1 and bool((chain >= 0).all() and (chain < schedule.num_train_timesteps).all())
    if not inside or len(chain) != steps or (np.diff(chain) >= 0).any():
        raise ValueError(
            f"timesteps={chain.tolist()}: give {steps} decreasing ones below {schedule.num_train_timesteps}, one a step"
        )
    return chain


def _check_samples(
    x_0: torch.Tensor, levels: int = 2, repeats: int = 1, max_rows: int = 1, *, name: str = "levels"
) -> None:
    if levels < 2:
        raise ValueError(f"{name}={levels}: give at least 2, the two ends of the log-SNR range")
    if repeats < 1 or max_rows < 1:
        raise ValueError(f"repeats={repeats}, max_rows={max_rows}: give at least 1 of each")
    if x_0.ndim < 2 or not len(x_0) or not x_0.is_floating_point():
        raise ValueError(
            f"samples have shape {tuple(x_0.shape)}, {x_0.dtype}: give floating point (n, *sample_shape), n >= 1"
        )
    if not bool(torch.isfinite(x_0).all()):
        raise NonFiniteError("samples hold numbers that are not finite: look at the sampler that made them")


def _checked_exponents(values: ArrayLike, name: str) -> np.ndarray:
    exponents = np.asarray(values, dtype=np.float64)
    if exponents.ndim != 1 or len(exponents) < 2 or not np.isfinite(exponents).all():
        raise ValueError(f"{name} has shape {exponents.shape}: give a vector of at least two finite numbers")
    return exponents
