"""Fairness (U-KL): min KL(q||p) subject to KL(q^i||p) <= eps_i, by dual training.

The Lagrangian of the denoising losses is ``loss_0 + sum_i lambda_i loss_i``; its minimiser at every noise level is the
noise prediction of the mixture ``(q + sum_i lambda_i q^i) / (1 + sum_i lambda_i)``.
Source: Khalafi, Ding and Ribeiro, Constrained Diffusion Models via Dual Training, NeurIPS 2024, Algorithm 1.
"""

from collections.abc import Sequence

import torch

from dualsweep.constraints import Constraint, DualDomain, NonNegative
from dualsweep.trainers.methods.base import Batch


class Fairness:
    name = "fairness"
    units = ("share", "loss")

    def __init__(self, *, normalize: bool = True) -> None:
        self.normalize = normalize

    def domain(self, constraints: Sequence[Constraint]) -> DualDomain:
        return NonNegative()

    def primal_loss(
        self, denoiser: torch.nn.Module, schedule, batch: Batch, multipliers: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """All streams in one forward; the weight of a sample is its stream's multiplier over its stream's global count.

        Args:
            multipliers: float32, shape (num_constraints,).
        Returns: scalar to differentiate (a sum over this worker's samples: parts add up to the global Lagrangian,
            divided by ``1 + sum(multipliers)`` if `normalize`), and per-sample mean squared errors, shape (batch,).
        """
        x_t = schedule.add_noise(batch.x_0, batch.noise, batch.timestep)
        error = denoiser(x_t, batch.timestep).float() - batch.noise
        losses = error.square().flatten(1).mean(1)
        weights = torch.cat([multipliers.new_ones(1), multipliers])
        if self.normalize:
            weights = weights / (1.0 + multipliers.sum())
        repeats = torch.tensor(batch.counts, device=losses.device)
        per_sample = torch.repeat_interleave(
            weights / weights.new_tensor(batch.global_counts), repeats, output_size=len(losses)
        )
        return torch.dot(losses, per_sample), losses
