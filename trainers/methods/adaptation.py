"""Adaptation: min KL(q||p) subject to KL(p_pre||p) <= eps; fit new data q and stay close to the pretrained law p_pre.

The main set is the new data; the one constraint set is what the pretrained model learned from. Closeness is measured where
the pretrained model lives, on noised samples of its own, drawn once and kept: E|eps_theta - eps_pre|^2, which over the log
SNR integrates to twice KL(p_pre||p).

The primal step weighs all timesteps alike. That changes no optimum: at each level the Lagrangian
``E_q |eps - noise|^2 + lambda E_pre |eps - eps_pre|^2`` has one minimiser, the noise prediction of the noised mixture
``(q + lambda p_pre) / (1 + lambda)``, whatever positive weight the level gets.
Source: Khalafi, Ding and Ribeiro, NeurIPS 2024, eq. 28; their code constrains a quantity without gradient (methods.md 2).
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch

from dualsweep.constraints import Constraint
from dualsweep.trainers.estimators import Predictor
from dualsweep.trainers.evaluate import EVALUATION_COUNTER
from dualsweep.trainers.methods.base import Batch, PrimalTerms
from dualsweep.trainers.methods.denoising import mean_squares, stream_weights, weighted_sum
from dualsweep.trainers.methods.divergences import DivergenceConstraints
from dualsweep.trainers.oracles import Oracle
from dualsweep.trainers.samplers import starting_noise

POOL_COUNTER = EVALUATION_COUNTER + 2  # the starts of the pool; dual steps, evaluation and calibration have others


class Adaptation(DivergenceConstraints):
    name = "adaptation"
    units = ("nats", "loss")
    conditional_units = ()
    defaults: ClassVar = {**DivergenceConstraints.defaults, "pool": 8192, "inputs": "samples"}

    @classmethod
    def pretraining_sets(cls, set_names: Sequence[str], unit: str) -> tuple[str, ...]:
        """The constraint set alone: the new data are new to the pretrained model."""
        return tuple(set_names)

    @classmethod
    def check(cls, config: Mapping[str, Any], names: Sequence[str]) -> None:
        if len(names) != 1:
            raise ValueError(
                f"data.sets={list(names)}: adaptation stays close to one pretrained model; give one set, what it learned from"
            )
        unit = config["thresholds"]["unit"]
        if cls.options(config["formulation"])["inputs"] == "noise" and unit != "loss":
            raise ValueError(
                f"formulation.inputs='noise': pure noise measures no divergence, thresholds.unit={unit!r} needs "
                "inputs: samples; or use the unit loss"
            )
        if unit == "loss" and config["baselines"]["fixed_weights"]:
            raise ValueError(
                f"baselines.fixed_weights={list(config['baselines']['fixed_weights'])}: they are measured against the "
                "pretrained model, whose loss here is 0, no possible threshold; use the unit nats"
            )

    def law(self, name: str) -> Predictor:
        return self._frozen()

    def law_samples(self, name: str, count: int, *, counter: int, shard: int, num_sampling_steps: int) -> torch.Tensor:
        """From the pool during training; an evaluation draws its own samples of the pretrained model."""
        if self.pure_noise:  # nobody looks at more than their shape
            return self.setting.tensors[name][:1].expand(count, *self.setting.data.sample_shape)
        if counter >= EVALUATION_COUNTER:
            return self._drawn(counter, {shard: count}, num_sampling_steps)
        pool = self.pool
        index = self.generator(name, counter, shard).integers(len(pool), size=count)
        return pool[torch.from_numpy(index).to(pool.device)]

    def held_out_index(self, name: str, count: int, *, counter: int, shard: int) -> None:
        """None: an evaluation draws its own samples of the pretrained model."""
        return

    @property
    def pool(self) -> torch.Tensor:
        """Samples of the pretrained model, drawn once a worker process; the same on every worker."""
        # As many steps as those that evaluation draws by: fewer would make another law of them.
        steps, cache = self.setting.evaluation_steps or self.setting.measure["num_sampling_steps"], self.setting.cache
        if "pool" not in cache:
            cache["pool"] = self._drawn(POOL_COUNTER, {0: self.setting.options["pool"]}, steps)
        return cache["pool"]

    def _drawn(self, counter: int, counts: Mapping[int, int], num_sampling_steps: int) -> torch.Tensor:
        shape = self.setting.data.sample_shape
        start = starting_noise(seed=self.setting.seed, counter=counter, shards=counts, counts=counts, shape=shape)
        samples = self.sample(
            self.setting.base,
            torch.zeros(0),
            start,
            num_sampling_steps=num_sampling_steps,
            batch_size=self.most_rows,
        )
        return samples.clone().to(self.setting.device)  # a plain tensor: the sampler's belong to inference mode

    # -- primal ---------------------------------------------------------------------------------------------------

    @property
    def pure_noise(self) -> bool:
        """Closeness on x_t ~ N(0, I) at every timestep, as published; else on noised samples of the pretrained model."""
        return self.setting.options["inputs"] == "noise"

    def streams(self) -> dict[str, tuple[torch.Tensor, int]]:
        found = super().streams()
        if self.pure_noise:
            return found  # the set's rows only set the number of draws
        return {name: (self.pool if name in self.setting.names else x, size) for name, (x, size) in found.items()}

    def primal_loss(self, denoiser: torch.nn.Module, batch: Batch, multipliers: torch.Tensor) -> PrimalTerms:
        """Denoising loss on the new data + multiplier * mean squared discrepancy, in one forward."""
        x_t = self.setting.schedule.add_noise(batch.x_0, batch.noise, batch.timestep)
        target, new = batch.noise, batch.counts[0]
        if len(x_t) > new:
            if self.pure_noise:
                x_t = torch.cat([x_t[:new], batch.noise[new:]])
            target = torch.cat([target[:new], self._frozen()(x_t[new:], batch.timestep[new:])])
        losses = mean_squares(denoiser(x_t, batch.timestep), target)
        weights = stream_weights(multipliers, normalize=self.setting.optimizer.get("normalize", True))
        return PrimalTerms(weighted_sum(losses, batch, weights), losses, batch.counts)

    # -- measurement ------------------------------------------------------------------------------------------------

    @property
    def measures_rows(self) -> bool:
        return True

    @torch.no_grad()
    def row_values(
        self, name: str, denoiser: torch.nn.Module, x_0: torch.Tensor, generator: np.random.Generator
    ) -> torch.Tensor:
        """In nats the point KL; as a loss the mean squared discrepancy at one timestep a sample, uniform as in training."""
        if self.setting.unit == "nats":
            return super().row_values(name, denoiser, x_0, generator)
        schedule = self.setting.schedule
        noise = torch.from_numpy(generator.standard_normal(x_0.shape, dtype=np.float32)).to(x_0)
        timestep = torch.from_numpy(generator.integers(schedule.num_train_timesteps, size=len(x_0))).to(x_0.device)
        x_t = noise if self.pure_noise else schedule.add_noise(x_0, noise, timestep)
        return mean_squares(denoiser(x_t, timestep), self.law(name)(x_t, timestep))

    def exact(self, constraints: Sequence[Constraint], rule: Mapping[str, Any]) -> Oracle | None:
        return self.exact_divergences(constraints, rule) if self.setting.unit == "nats" else None
