"""Likelihood ratios r_i = q^i / q of samples by the conditional pretrained model: what unlearning keeps small on average."""

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

from dualsweep.trainers.estimators import (
    EXACT_DIVERGENCE_DIM,
    MAX_ROWS,
    Predictor,
    RatioEstimate,
    log_likelihood_ratio,
    ode_log_likelihood,
)
from dualsweep.trainers.metrics import Draws
from dualsweep.trainers.models import Denoiser
from dualsweep.trainers.noise_schedule import NoiseSchedule
from dualsweep.trainers.samplers import starting_noise

# Of the integral over denoising errors. Its exponential is corrected by the standard error, which one repeat takes from
# neighbouring levels: 12 of them lie too far apart for that (1.15 nats for a spread of 0.85, means of ratios 13 % too low).
FEWEST_LEVELS = 64
REPEATS = 2


def log_density_ratio(
    a: Predictor, b: Predictor, x_0: torch.Tensor, schedule: NoiseSchedule, *, levels: int = 32, seed: int = 0
) -> RatioEstimate:
    """log p_a(x) - log p_b(x) of every sample.

    For vectors of up to 8 dimensions the difference of the log densities that the probability-flow ODEs give, without
    noise; they are those of the models' deterministic samples whether or not a prediction is the score of any noised law.
    The integral over denoising errors (unlearning paper, Lemma 2) is 0.42 nats off there at 64 levels where the ODE is
    0.08 off at 32 steps (root mean square, conditional MLP on three Gaussians of the plane). More dimensions have to make
    do with it.

    Args:
        levels: steps of the ODE, or noise levels of the integral, at least 64 of them.
        seed: of the integral's noise.
    """
    if not noiseless(x_0.shape[1:]):
        levels = max(levels, FEWEST_LEVELS)
        return log_likelihood_ratio(a, b, x_0, schedule, levels=levels, seed=seed, repeats=REPEATS)
    of_a, of_b = (ode_log_likelihood(predictor, x_0, schedule, steps=levels).values for predictor in (a, b))
    return RatioEstimate(of_a - of_b, torch.zeros_like(of_a))


def log_likelihood_ratios(
    base: Denoiser,
    x_0: torch.Tensor,
    schedule: NoiseSchedule,
    *,
    conditions: Sequence[int],
    levels: int = 32,
    seed: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """log q^i(x) - log q(x) of every sample, with condition 0 of the model as q, and the standard errors.

    As `log_density_ratio`; for vectors all conditions travel in one forward.

    Args:
        base: called as ``base(x_t, timestep, condition)``.
        x_0: shape (n, *sample_shape), on the model's device; any number of samples.
        conditions: of the sets asked for, from 1.
        levels, seed: as for `log_density_ratio`.
    Returns: values and standard errors in nats, float64 (n, m) each, no gradient.
    """
    if not len(x_0):
        return (torch.zeros((0, len(conditions)), dtype=torch.float64, device=x_0.device),) * 2
    if noiseless(x_0.shape[1:]):
        laws = torch.tensor([0, *conditions], device=x_0.device)
        parts = x_0.split(max(1, MAX_ROWS // len(laws)))
        values = torch.cat([_ode_log_ratios(base, part, schedule, laws, levels) for part in parts])
        return values, torch.zeros_like(values)

    def under(condition: int) -> Predictor:
        return lambda x_t, timestep: base(x_t, timestep, torch.full_like(timestep, condition))

    found = [
        log_density_ratio(under(condition), under(0), x_0, schedule, levels=levels, seed=seed)
        for condition in conditions
    ]
    return torch.stack([ratio.values for ratio in found], dim=1), torch.stack([ratio.stderrs for ratio in found], dim=1)


def likelihood_ratios(
    base: Denoiser,
    x_0: torch.Tensor,
    schedule: NoiseSchedule,
    *,
    conditions: Sequence[int],
    levels: int = 32,
    seed: int = 0,
) -> torch.Tensor:
    """q^i(x) / q(x) of every sample, float64 (n, m), no gradient; arguments as for `log_likelihood_ratios`."""
    return _exponential(*log_likelihood_ratios(base, x_0, schedule, conditions=conditions, levels=levels, seed=seed))


def _exponential(logarithms: torch.Tensor, stderrs: torch.Tensor) -> torch.Tensor:
    """That of a noisy logarithm is too large on average, for normal noise by exp(stderr^2 / 2): divided out."""
    return (logarithms - stderrs.square() / 2).exp()


def noiseless(sample_shape: Sequence[int]) -> bool:
    """Whether samples of this shape get their ratios without noise."""
    return math.prod(sample_shape) <= EXACT_DIVERGENCE_DIM


def _ode_log_ratios(
    base: Denoiser, x_0: torch.Tensor, schedule: NoiseSchedule, laws: torch.Tensor, levels: int
) -> torch.Tensor:
    given = laws.repeat_interleave(len(x_0))
    copies = x_0.repeat(len(laws), *[1] * (x_0.ndim - 1))
    flat = ode_log_likelihood(
        lambda x_t, timestep: base(x_t, timestep, given), copies, schedule, steps=levels, max_rows=len(copies)
    ).values
    of_q, of_sets = flat.view(len(laws), len(x_0)).tensor_split([1])
    return (of_sets - of_q).T


def ratio_draws(
    sample: Callable[..., torch.Tensor],
    denoiser: torch.nn.Module,
    multipliers: torch.Tensor,
    base: Denoiser,
    schedule: NoiseSchedule,
    conditions: Sequence[int],
    *,
    levels: int,
    seed: int,
    counter: int,
    shards: Sequence[int],
    counts: Mapping[int, int],
    shape: tuple[int, ...],
    num_sampling_steps: int,
    clip: float | None = None,
) -> Draws:
    """Ratios of the model's own samples, drawn by logical shard: rows (n, m), for `mean_measurement`.

    Args:
        sample: `Method.sample`.
        clip: values above it count as it.
    """
    start = starting_noise(seed=seed, counter=counter, shards=shards, counts=dict(counts), shape=shape)
    if not len(start):
        return Draws(np.zeros((0, len(conditions))))
    samples = sample(denoiser, multipliers, start, num_sampling_steps=num_sampling_steps)
    # The integral's noise is drawn shard by shard, so that it does not depend on who owns the other shards.
    parts = {shards[0]: samples}
    if not noiseless(shape):
        parts = dict(zip(shards, samples.split([counts[shard] for shard in shards]), strict=True))
    found = [
        log_likelihood_ratios(
            base,
            part.to(multipliers.device),
            schedule,
            conditions=conditions,
            levels=levels,
            seed=int(np.random.SeedSequence([seed, counter, shard]).generate_state(1)[0]),
        )
        for shard, part in parts.items()
    ]
    values, stderrs = (torch.cat(each) for each in zip(*found, strict=True))
    rows = _exponential(values, stderrs)
    return Draws((rows if clip is None else rows.clamp(max=clip)).cpu().numpy(), samples)
