"""Alignment: min KL(p||q) subject to E_p[z_j] >= b_j, rewards in standard deviations of the pretrained model.

z_j = (r_j - mean_j) / std_j over samples of the pretrained chain, so a threshold of 0.5 asks for half a standard deviation
more. The optimum is q exp(lambda . z) / Z.
Source: constrained alignment of diffusion models as in methods.md 3; H5 for the closed form.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch

from dualsweep.constraints import Constraint
from dualsweep.trainers.methods.on_policy import OnPolicy
from dualsweep.trainers.oracles import Oracle, standardised, tilted
from dualsweep.trainers.rewards import NOT_DIFFERENTIABLE, Reward, check_reward, make_reward


class Alignment(OnPolicy):
    """Constraints are the entries of `formulation.rewards`."""

    name = "alignment"
    units = ("reward",)
    group = "rewards"
    defaults = OnPolicy.defaults | {"rewards": None, "gradient": "policy"}
    sign = -1.0

    @classmethod
    def constraint_names(cls, set_names: Sequence[str], options: Mapping[str, Any]) -> tuple[str, ...]:
        return tuple(options["rewards"] or ())

    @classmethod
    def check(cls, config: Mapping[str, Any], names: Sequence[str]) -> None:
        super().check(config, names)
        options = cls.options(config["formulation"])
        if not names:
            raise ValueError(
                "formulation.rewards is missing: name at least one reward, such as {up: {kind: brightness}}"
            )
        if cls.group in names:
            raise ValueError(f"formulation.rewards: {cls.group!r} stands for all of them in thresholds; rename it")
        means = config["data"]["means"] if config["data"]["dataset"] == "gaussian_mixture" else None
        for name, spec in options["rewards"].items():
            check_reward(name, spec, dimension=len(means[0]) if means else None)
            if options["gradient"] == "backpropagation" and spec["kind"] in NOT_DIFFERENTIABLE:
                raise ValueError(
                    f"formulation.gradient='backpropagation': {name} is of kind {spec['kind']}, which has no gradient; "
                    "give gradient: policy"
                )

    @property
    def backpropagates(self) -> bool:
        return self.setting.options["gradient"] == "backpropagation"

    @cached_property
    def rewards(self) -> list[Reward]:
        """In the order of the constraints."""
        data, codec = self.setting.data, self.setting.codec
        return [
            make_reward(
                name,
                self.setting.options["rewards"][name],
                sample_shape=codec.image_shape(data.sample_shape),
                class_names=data.class_names,
                labeller=self.setting.labeller,
            )
            for name in self.setting.names
        ]

    def raw_values(self, samples: torch.Tensor, noises: torch.Tensor) -> torch.Tensor:
        images = self.setting.codec.decode(samples)
        return torch.stack([reward(images) for reward in self.rewards])

    def scales(self, raw: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation. Raises: ValueError for a reward that does not vary."""
        stds = raw.std(dim=1, keepdim=True)
        for name, std in zip(self.setting.names, stds.flatten().tolist(), strict=True):
            if not std > 0:
                raise ValueError(
                    f"formulation.rewards.{name}: the same for all {raw.shape[1]} samples of the pretrained model, so it has "
                    "no standard deviation to count in; remove it"
                )
        return raw.mean(dim=1, keepdim=True), stds

    def unit_influence(self, pool: np.ndarray, metrics: np.ndarray) -> np.ndarray:
        return -pool - metrics * (pool**2 - 1) / 2

    def exact(self, constraints: Sequence[Constraint], rule: Mapping[str, Any]) -> Oracle | None:
        """For mixtures on the line or in the plane, with rewards standardised on the law itself instead of the chain's."""
        mixture = self.setting.data.mixture
        if not constraints or mixture is None or mixture.dim > 2 or rule["rule"].startswith("resilient"):
            return None
        features, _, _ = standardised(mixture, [partial(_on_points, reward) for reward in self.rewards])
        return tilted(mixture, features, [c.threshold for c in constraints], at_least=True)


def _on_points(reward: Reward, points: np.ndarray) -> np.ndarray:
    return reward(torch.from_numpy(points)).numpy()
