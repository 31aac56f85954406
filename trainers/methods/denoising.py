"""Weighted denoising losses of several streams in one forward: shared by every formulation whose data are given."""

from collections.abc import Sequence

import torch

from dualsweep.trainers.methods.base import Batch, PrimalTerms
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
        repeats = torch.tensor(batch.counts, device=x_t.device)
        given = torch.tensor(list(conditions), device=x_t.device).repeat_interleave(repeats, output_size=len(x_t))
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
    repeats = torch.tensor(batch.counts, device=losses.device)
    each = torch.repeat_interleave(weights / weights.new_tensor(batch.global_counts), repeats, output_size=len(losses))
    return torch.dot(losses, each)


def stream_weights(multipliers: torch.Tensor, *, normalize: bool) -> torch.Tensor:
    """1 for the objective's stream and the signed multipliers for the others; `normalize` divides by their sum.

    That sum is 1 + Lambda, or 1 - Lambda where the multipliers come with a minus sign: the step size then does not
    depend on them.
    """
    weights = torch.cat([multipliers.new_ones(1), multipliers])
    return weights / weights.sum() if normalize else weights
