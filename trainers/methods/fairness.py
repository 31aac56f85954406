"""Fairness (U-KL): min KL(q||p) subject to KL(q^i||p) <= eps_i, by dual training.

The Lagrangian of the denoising losses is ``loss_0 + sum_i lambda_i loss_i``; its minimiser at every noise level is the
noise prediction of the mixture ``(q + sum_i lambda_i q^i) / (1 + sum_i lambda_i)``.
Source: Khalafi, Ding and Ribeiro, Constrained Diffusion Models via Dual Training, NeurIPS 2024, Algorithm 1.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from dualsweep.constraints import Constraint
from dualsweep.constraints.closed_forms import (
    class_restriction_multipliers,
    class_restriction_objective,
    class_restriction_shares,
    resilient_class_restriction_multipliers,
)
from dualsweep.trainers.methods.base import Batch, Method, PrimalTerms
from dualsweep.trainers.methods.denoising import denoising_terms, stream_weights
from dualsweep.trainers.methods.divergences import DivergenceConstraints
from dualsweep.trainers.oracles import Oracle


class Fairness(DivergenceConstraints):
    name = "fairness"
    units = ("share", "loss", "nats")
    group = "minority"

    def primal_loss(self, denoiser: torch.nn.Module, batch: Batch, multipliers: torch.Tensor) -> PrimalTerms:
        weights = stream_weights(multipliers, normalize=self.setting.optimizer.get("normalize", True))
        return denoising_terms(denoiser, self.setting.schedule, batch, weights)

    def exact(self, constraints: Sequence[Constraint], rule: Mapping[str, Any]) -> Oracle | None:
        """Class restrictions asked for in shares (methods.md H1), also of images; divergences in nats of known laws."""
        if self.setting.unit == "nats":
            return self.exact_divergences(constraints, rule)
        data = self.setting.data
        if self.setting.unit != "share" or not constraints:
            return None
        prior = [data.prior[data.constraint_classes[c.name]] for c in constraints]
        epsilon = [c.canonical_threshold for c in constraints]
        if rule["rule"] in ("resilient", "resilient_explicit"):
            multipliers = resilient_class_restriction_multipliers(epsilon, prior, rule["relaxation_cost"])
        else:
            multipliers = class_restriction_multipliers(epsilon, prior)
        objective = class_restriction_objective(multipliers, prior)
        metrics = -np.log(class_restriction_shares(multipliers, prior))
        return Oracle(
            multipliers=multipliers,
            objective=objective,
            metrics=metrics,
            log_density=self.class_density(constraints, multipliers),
            level=None,
            dual_value=objective + float(multipliers @ (metrics - np.asarray(epsilon))),
        )


class Pretraining(Method):
    """The model every trial starts from: plain denoising of main, and of every set under its own condition."""

    name = "pretraining"
    units = Fairness.units

    def primal_loss(self, denoiser: torch.nn.Module, batch: Batch, multipliers: torch.Tensor) -> PrimalTerms:
        streams = len(batch.counts)
        weights = torch.full((streams,), 1.0 / streams, device=batch.x_0.device)
        conditions = range(streams) if streams > 1 else None
        terms = denoising_terms(denoiser, self.setting.schedule, batch, weights, conditions=conditions)
        return PrimalTerms(terms.loss, terms.values, (sum(terms.counts),))

    def streams(self) -> dict[str, tuple[torch.Tensor, int]]:
        tensors = self.setting.tensors
        return {name: (tensors[name], self.setting.optimizer["batch_size"]) for name in tensors}
