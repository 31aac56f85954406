"""Reverse-KL unlearning (RU): min KL(p||q) subject to KL(p||q^i) >= b_i.

With Lambda = sum lambda_i < 1 the Lagrangian has the minimiser ``(q / prod (q^i)^{lambda_i})^{1 / (1 - Lambda)} / Z`` and the
minimum ``-(1 - Lambda) log Z + lambda . b``; at Lambda = 1 it is unbounded below. The forget sets need tails as wide as q's, or
the law cannot be normalised (for Gaussians ``1 / var_q > sum lambda_i / var_i``).
Source: constrained unlearning paper, section 3.1; methods.md 5 and H2.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from dualsweep.constraints import Constraint, DualDomain, SumBelow
from dualsweep.trainers.methods.base import Objective
from dualsweep.trainers.methods.composed import Composed
from dualsweep.trainers.oracles import Oracle, reverse_kl

MARGIN = 0.05  # kept from Lambda = 1, where exponents grow without bound: at most 20 here


class UnlearnReverseKL(Composed):
    name = "unlearn_reverse_kl"
    objective_name = "KL(p||q)"
    starts_optimal = True

    @classmethod
    def check(cls, config: Mapping[str, Any], names: Sequence[str]) -> None:
        super().check(config, names)
        fixed = list(config["baselines"]["fixed_weights"])
        largest = max([*fixed, config["dual"]["start"] if config["dual"]["rule"] == "fixed" else 0.0])
        if largest * len(names) > 1 - MARGIN:
            field = "baselines.fixed_weights" if largest in fixed else "dual.start"
            raise ValueError(
                f"{field}={largest:g} for each of {len(names)} sets: without a sum below 1 there is no best model; keep "
                f"them below {(1 - MARGIN) / len(names):.3g}"
            )

    def domain(self, constraints: Sequence[Constraint]) -> DualDomain:
        return SumBelow(1.0, margin=MARGIN)

    def exponents(self, multipliers: np.ndarray) -> np.ndarray:
        weights = np.zeros(self.num_conditions)
        weights[0] = 1.0
        if len(multipliers):
            weights[self.set_conditions] = -multipliers.astype(np.float64)
        return weights / weights.sum()

    def dual_of_log_z(self, log_z: float, multipliers: np.ndarray) -> float:
        return -(1 - float(np.sum(multipliers))) * log_z

    @property
    def measured_conditions(self) -> list[int]:
        return [0, *self.set_conditions]

    def objective(
        self, denoiser: torch.nn.Module, multipliers: torch.Tensor, *, evaluation: Mapping[str, Any], base_errors
    ) -> Objective:
        value, stderr = self.measured(denoiser, multipliers, evaluation).objective
        return Objective(value, stderr, "KL(p||q) from the pretrained model's law q, on the model's own samples")

    def exact(self, constraints: Sequence[Constraint], rule: Mapping[str, Any]) -> Oracle | None:
        return self.solved(reverse_kl, constraints, rule)
