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
    repeats = torch.tensor(batch.counts, device=x_t.device)
    if conditions is None:
        prediction = denoiser(x_t, batch.timestep)
    else:
        given = torch.tensor(list(conditions), device=x_t.device).repeat_interleave(repeats, output_size=len(x_t))
        prediction = denoiser(x_t, batch.timestep, given)
    losses = (prediction.float() - batch.noise).square().flatten(1).mean(1)
    per_sample = torch.repeat_interleave(
        weights / weights.new_tensor(batch.global_counts), repeats, output_size=len(losses)
    )
    return PrimalTerms(torch.dot(losses, per_sample), losses, batch.counts)
