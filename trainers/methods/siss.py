"""SISS without importance sampling (baseline): forget at one fixed weight with a gradient of fixed norm.

``g = g_x - (c / |g_a|) g_a`` from two denoising losses, retained and forgotten, that share timestep and noise pair by pair;
no multiplier moves. The weight is `dual.start` (or a fixed-weight run's), c is `formulation.gradient_norm`.
Source: Alberti et al., Data Unlearning in Diffusion Models, ICLR 2025; methods.md 8.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from dualsweep.trainers.methods.base import Batch, PrimalTerms
from dualsweep.trainers.methods.unlearn_forward_kl import UnlearnForwardKL


class SISS(UnlearnForwardKL):
    name = "siss"
    units = ("loss", "share", "nats")

    @classmethod
    def check(cls, config: Mapping[str, Any], names: Sequence[str]) -> None:
        super().check(config, names)
        primal, dual = config["primal"], config["dual"]
        if cls.options(config["formulation"])["gradient_norm"] is None:
            raise ValueError(
                "formulation.gradient_norm is missing: siss scales the forget gradient to it; a tenth of the retain "
                "gradient's norm is a good start"
            )
        if dual["rule"] != "fixed" or not dual["start"] > 0:
            raise ValueError(
                f"dual.rule={dual['rule']!r}, dual.start={dual['start']:g}: siss has no dual step; give rule: fixed and "
                "the forget sets' weight as start, 1 as published"
            )
        if primal["constraint_batch_size"] != primal["batch_size"]:
            raise ValueError(
                f"primal.constraint_batch_size={primal['constraint_batch_size']}: siss pairs each retained sample with a "
                f"forgotten one at the same timestep and noise; give primal.batch_size={primal['batch_size']}"
            )

    def primal_loss(self, denoiser: torch.nn.Module, batch: Batch, multipliers: torch.Tensor) -> PrimalTerms:
        streams, first = len(batch.counts), batch.counts[0]
        noise, timestep = (torch.cat([drawn[:first]] * streams) for drawn in (batch.noise, batch.timestep))
        return super().primal_loss(denoiser, replace(batch, noise=noise, timestep=timestep), multipliers)
