"""Weighted denoising losses of several streams in one forward: shared by every formulation whose data are given."""

from collections.abc import Sequence

import torch

from dualsweep.trainers.methods.base import Batch, PrimalTerms, device_constant, stream_of_each
from dualsweep.trainers.noise_schedule import NoiseSchedule


def denoising_terms(
    denoiser: torch.nn.Module,
    schedule: NoiseSchedule,
    batch: Batch,
    weights: torch.Tensor,
    *,
    conditions: Sequence[int] | None = None,
) -> PrimalTerms:
    """All streams in one forward; the weight of a sample is its stream's weight over its stream's global count.

    Args:
        weights: float32, one a stream, of any sign.
        conditions: the condition of each stream; None: the denoiser takes none.
    Returns: the weighted sum of the streams' mean squared errors (mean over elements), and all of them per sample.
    """
    x_t = schedule.add_noise(batch.x_0, batch.noise, batch.timestep)
    if conditions is None:
        prediction = denoiser(x_t, batch.timestep)
    else:
        given = device_constant(tuple(conditions), x_t.device, torch.int64)[stream_of_each(batch.counts, x_t.device)]
        prediction = denoiser(x_t, batch.timestep, given)
    losses = mean_squares(prediction, batch.noise)
    return PrimalTerms(weighted_sum(losses, batch, weights), losses, batch.counts)


def mean_squares(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Squared error of each sample, mean over its elements, in float32: shape (batch,)."""
    return (prediction.float() - target).square().flatten(1).mean(1)


def weighted_sum(losses: torch.Tensor, batch: Batch, weights: torch.Tensor) -> torch.Tensor:
    """This worker's part of the weighted sum of the streams' means; parts add up over workers.

    Args:
        losses: one a sample of the batch, in its order.
        weights: float32, one a stream, of any sign.
    """
    shares = weights / device_constant(batch.global_counts, weights.device, weights.dtype)
    return torch.dot(losses, shares[stream_of_each(batch.counts, losses.device)])


def stream_weights(multipliers: torch.Tensor, *, normalize: bool) -> torch.Tensor:
    """1 for the objective's stream and the signed multipliers for the others; `normalize` divides by their sum.

    That sum is 1 + Lambda, or 1 - Lambda where the multipliers come with a minus sign: the step size then does not
    depend on them.
    """
    weights = torch.cat([multipliers.new_ones(1), multipliers])
    return weights / weights.sum() if normalize else weights
