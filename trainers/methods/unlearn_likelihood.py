"""Likelihood-constrained unlearning (LU): min KL(p||q) subject to E_p[r_i] <= b_i with r_i = q^i / q.

The ratio has mean 1 under q by construction, so b_i below 1 is how much of a set is to be left, and for a set of disjoint
support it is the share of it that stays. The optimum is q exp(-lambda . r) / Z.
Source: constrained unlearning paper, section 3.3 and equation 36; methods.md 7, H4 for the closed form.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from dualsweep.constraints import Constraint
from dualsweep.trainers.methods.on_policy import OnPolicy
from dualsweep.trainers.oracles import Oracle, tilted
from dualsweep.trainers.ratios import likelihood_ratios, noiseless

LARGEST_RATIO = 20.0  # that of a set with 5 percent of q; where a set is no class of the main data


class UnlearnLikelihood(OnPolicy):
    """Ratios are those of the conditional pretrained model, clipped, over their mean on samples of its chain."""

    name = "unlearn_likelihood"
    units = ("likelihood_ratio",)
    conditional = True
    needs_sets = True
    defaults = OnPolicy.defaults | {"levels": 12, "ratio_clip": None}
    sign = 1.0

    @classmethod
    def check(cls, config: Mapping[str, Any], names: Sequence[str]) -> None:
        super().check(config, names)
        clip = config["formulation"]["ratio_clip"]
        if clip is not None and clip <= 1:
            raise ValueError(
                f"formulation.ratio_clip={clip}: ratios have mean 1, so a clip has to lie above; 1 over the set's share of "
                "the main data is the largest ratio there is"
            )

    def raw_values(self, samples: torch.Tensor, noises: torch.Tensor) -> torch.Tensor:
        """Clipped ratios, no graph, all sets together.

        Images have no ratio without noise; theirs is told apart by the path's, in runs of one logical shard, so that it
        does not depend on the number of workers.
        """
        setting = self.setting
        known = list(setting.data.constraints)
        conditions = [1 + known.index(name) for name in setting.names]
        if setting.base.num_conditions <= max(conditions):
            raise ValueError(
                f"model.pretrained: the model knows {setting.base.num_conditions} conditions, method {self.name} needs "
                f"{1 + len(known)}, one for main and one a set; remove model.pretrained to train one"
            )
        run = (
            len(samples)
            if noiseless(samples.shape[1:])
            else setting.optimizer["batch_size"] // setting.optimizer["num_shards"]
        )
        # Half precision would not do: a ratio is a small difference of two predictions, integrated and exponentiated.
        with torch.autocast(samples.device.type, enabled=False):
            ratios = [
                likelihood_ratios(
                    setting.base,
                    part,
                    setting.schedule,
                    conditions=conditions,
                    levels=setting.options["levels"],
                    seed=_seed(noise),
                )
                for part, noise in zip(samples.detach().split(max(1, run)), noises.split(max(1, run)), strict=True)
            ]
        return torch.minimum(torch.cat(ratios), self._clips.to(ratios[0])).T

    @property
    def _clips(self) -> torch.Tensor:
        """The largest ratio of each set: `ratio_clip`, else 1 / share, which no part of main exceeds."""
        given, data = self.setting.options["ratio_clip"], self.setting.data
        shares = [data.prior.get(data.constraint_classes.get(name)) for name in self.setting.names]
        return torch.tensor([given or (1 / share if share else LARGEST_RATIO) for share in shares], dtype=torch.float64)

    def scales(self, raw: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Nothing, and the mean: the pretrained chain's own mean ratio becomes 1.

        Raises: ValueError where no sample of the chain is anywhere near the set.
        """
        means = raw.mean(dim=1, keepdim=True)
        for name, mean in zip(self.setting.names, means.flatten().tolist(), strict=True):
            if not mean > 0:
                raise ValueError(
                    f"data.sets.{name}: its likelihood ratio is 0 on all {raw.shape[1]} samples of the pretrained model, "
                    "which leaves nothing to unlearn; remove the set, or raise formulation.pool"
                )
        return torch.zeros_like(means), means

    def unit_influence(self, pool: np.ndarray, metrics: np.ndarray) -> np.ndarray:
        return -metrics * (pool - 1)

    def exact(self, constraints: Sequence[Constraint], rule: Mapping[str, Any]) -> Oracle | None:
        """For mixtures on the line or in the plane."""
        known = self.mixtures
        if not constraints or known is None or known[0].dim > 2 or rule["rule"].startswith("resilient"):
            return None
        main, sets = known
        return tilted(main, sets, [c.threshold for c in constraints], at_least=False)


def _seed(noise: torch.Tensor) -> int:
    """A non-negative number that the first entry's bits make."""
    return int(noise.flatten()[:1].float().view(torch.int32)) & 0x7FFFFFFF
