"""Likelihood ratios r_i = q^i / q of samples by the conditional pretrained model: what unlearning keeps small on average."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

from dualsweep.trainers.estimators import EXACT_DIVERGENCE_DIM, MAX_ROWS, log_likelihood_ratio, ode_log_likelihood
from dualsweep.trainers.metrics import Draws
from dualsweep.trainers.models import Denoiser
from dualsweep.trainers.noise_schedule import NoiseSchedule
from dualsweep.trainers.samplers import starting_noise


def likelihood_ratios(
    base: Denoiser,
    x_0: torch.Tensor,
    schedule: NoiseSchedule,
    *,
    conditions: Sequence[int],
    levels: int = 32,
    seed: int = 0,
) -> torch.Tensor:
    """q^i(x) / q(x) of every sample, with condition 0 of the model as q.

    Vectors of up to 8 dimensions: the quotient of the densities that the model's probability-flow ODEs give, all
    conditions in one forward, without noise. The integral over denoising errors (unlearning paper, Lemma 2) is 0.42 nats
    off there at 64 levels where the ODE is 0.08 off at 32 steps (root mean square, conditional MLP on three Gaussians), and
    the exponential of a noisy logarithm is too large on average. More dimensions have to make do with it: the estimate
    is divided by exp(stderr^2 / 2), its mean factor for normal noise.

    Args:
        base: called as ``base(x_t, timestep, condition)``.
        x_0: shape (n, *sample_shape), on the model's device; any number of samples.
        conditions: of the sets asked for, from 1.
        levels: steps of the ODE, or noise levels of the integral.
        seed: of the integral's noise.
    Returns: float64 (n, m), no gradient.
    """
    if not len(x_0):
        return torch.zeros((0, len(conditions)), dtype=torch.float64, device=x_0.device)
    if x_0[0].numel() <= EXACT_DIVERGENCE_DIM:
        laws = torch.tensor([0, *conditions], device=x_0.device)
        parts = x_0.split(max(1, MAX_ROWS // len(laws)))
        return torch.cat([_ode_ratios(base, part, schedule, laws, levels) for part in parts])

    def under(condition: int) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
        return lambda x_t, timestep: base(x_t, timestep, torch.full_like(timestep, condition))

    found = [
        log_likelihood_ratio(under(condition), under(0), x_0, schedule, levels=levels, seed=seed)
        for condition in conditions
    ]
    return torch.stack([(ratio.values - ratio.stderrs.square() / 2).exp() for ratio in found], dim=1)


def _ode_ratios(
    base: Denoiser, x_0: torch.Tensor, schedule: NoiseSchedule, laws: torch.Tensor, levels: int
) -> torch.Tensor:
    given = laws.repeat_interleave(len(x_0))
    copies = x_0.repeat(len(laws), *[1] * (x_0.ndim - 1))
    flat = ode_log_likelihood(
        lambda x_t, timestep: base(x_t, timestep, given), copies, schedule, steps=levels, max_rows=len(copies)
    )
    of_q, of_sets = flat.view(len(laws), len(x_0)).tensor_split([1])
    return (of_sets - of_q).exp().T


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
        clip: ratios above it count as it.
    """
    start = starting_noise(seed=seed, counter=counter, shards=shards, counts=dict(counts), shape=shape)
    if not len(start):
        return Draws(np.zeros((0, len(conditions))))
    samples = sample(denoiser, multipliers, start, num_sampling_steps=num_sampling_steps)
    # One call a shard: the noise of the integral then does not depend on who owns the other shards.
    ratios = [
        likelihood_ratios(
            base,
            part.to(multipliers.device),
            schedule,
            conditions=conditions,
            levels=levels,
            seed=int(np.random.SeedSequence([seed, counter, shard]).generate_state(1)[0]),
        )
        for shard, part in zip(shards, samples.split([counts[shard] for shard in shards]), strict=True)
    ]
    rows = torch.cat(ratios)
    return Draws((rows if clip is None else rows.clamp(max=clip)).cpu().numpy(), samples)
