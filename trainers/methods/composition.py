"""Composition: one law close to all sets, min over p of the largest divergence, in either direction.

AND (`law: and`): min_p max_i KL(p||q^i) - b_i. For multipliers on the simplex the Lagrangian's minimiser is the product
``prod (q^i)^{lambda_i} / Z``, its minimum ``-log Z - lambda . b``.
OR (`law: or`): min_p max_i KL(q^i||p) - b_i, minimiser ``sum lambda_i q^i``. Dual-only, the divergences at it are means over
samples of the sets of ``-log sum_j lambda_j q^j / q^i``, so a table of log ratios, made once, tells them for all multipliers.
Thresholds are offsets b_i; 0 is usual. Equal weights stand in where there are no multipliers (the unconstrained run).
Source: methods.md 4 and H6.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from scipy.special import logsumexp

from dualsweep.constraints import Constraint, DualDomain, Simplex
from dualsweep.trainers.evaluate import EVALUATION_COUNTER
from dualsweep.trainers.labellers import Labeller
from dualsweep.trainers.methods.base import Batch, Objective, PrimalTerms, device_constant
from dualsweep.trainers.methods.composed import Composed, ComposedLaw
from dualsweep.trainers.methods.denoising import denoising_terms
from dualsweep.trainers.metrics import Draws, Measurement, mean_measurement, rounds
from dualsweep.trainers.oracles import Oracle, composition_and, composition_or
from dualsweep.trainers.ratios import log_likelihood_ratios

SET_NOISE = 0x5E75  # purpose that addresses random numbers: which samples of a set are taken
OFFSETS = "composition offsets"


class Composition(Composed):
    name = "composition"
    defaults = Composed.defaults | {"law": "and"}
    objective_name = "none: the level is that of the largest divergence"

    @classmethod
    def check(cls, config: Mapping[str, Any], names: Sequence[str]) -> None:
        super().check(config, names)
        if len(names) < 2:
            raise ValueError(f"data.sets holds {len(names)} set: a composition needs at least two to be close to")
        if config["baselines"]["fixed_weights"]:
            raise ValueError(
                f"baselines.fixed_weights={list(config['baselines']['fixed_weights'])}: weights of a composition sum to 1, so "
                "one weight for all is the unconstrained run, which has equal weights; remove it"
            )

    def domain(self, constraints: Sequence[Constraint]) -> DualDomain:
        # A finished trial is judged by another instance: the offsets reach it through what the process keeps.
        self.setting.cache[OFFSETS] = {constraint.name: constraint.threshold for constraint in constraints}
        return Simplex()

    @property
    def _mixes(self) -> bool:
        return self.setting.options["law"] == "or"

    def exponents(self, multipliers: np.ndarray) -> np.ndarray:
        """Weights of the conditions in the product or the mixture."""
        weights = np.zeros(self.num_conditions)
        total = float(np.sum(multipliers)) if len(multipliers) else 0.0
        weights[self.set_conditions] = np.asarray(multipliers, dtype=np.float64) if total > 0 else 1.0
        return weights / weights.sum()

    def dual_of_log_z(self, log_z: float, multipliers: np.ndarray) -> float:
        return -log_z

    # -- primal, OR -------------------------------------------------------------------------------------------------

    def streams(self) -> dict[str, tuple[torch.Tensor, int]]:
        if not self._mixes:
            return super().streams()
        tensors, size = self.setting.tensors, self.setting.optimizer["constraint_batch_size"]
        return {name: (tensors[name], size) for name in self.setting.names or self.setting.data.constraints}

    def primal_loss(self, denoiser: torch.nn.Module, batch: Batch, multipliers: torch.Tensor) -> PrimalTerms:
        """OR: denoising losses of the sets, weighted by the multipliers."""
        if not self._mixes:
            return super().primal_loss(denoiser, batch, multipliers)
        weights = self.exponents(self.on_host(multipliers))[self.set_conditions]
        given = device_constant(tuple(weights.tolist()), batch.noise.device, batch.noise.dtype)
        terms = denoising_terms(denoiser, self.setting.schedule, batch, given)
        counts = terms.counts if self.setting.names else ()
        return PrimalTerms(terms.loss, terms.values, (sum(terms.counts) - sum(counts), *counts))

    # -- measurement --------------------------------------------------------------------------------------------------

    def measure(
        self,
        denoiser: torch.nn.Module,
        multipliers: torch.Tensor,
        *,
        counter: int,
        shards: Sequence[int],
        counts: Mapping[int, int],
        num_sampling_steps: int,
        labeller: Labeller | None = None,
    ) -> Draws:
        """OR, dual-only: rows of the table of log ratios, the sets' one after the other; the whole table at every dual step."""
        if not self._mixes or self.trains:
            return super().measure(
                denoiser,
                multipliers,
                counter=counter,
                shards=shards,
                counts=counts,
                num_sampling_steps=num_sampling_steps,
                labeller=labeller,
            )
        if not self.setting.names:
            return Draws(np.zeros((0, 1)))
        table = self._ratio_table(held_out=counter >= EVALUATION_COUNTER)
        held = [k for k in range(len(table)) if k % len(counts) in shards]
        return Draws(table[held].reshape(len(held), -1))

    def _ratio_table(self, *, held_out: bool) -> np.ndarray:
        """log q^j - log q^i of the pretrained model, nats, at samples of every set: entry [n, i, j], of the n-th of set i.

        For vectors the densities are those of the probability-flow ODE, without noise: noise of variance s^2 in a log
        ratio would bias a divergence by up to s^2 / 8 (Jensen), and the integral over denoising errors has s of about 1.
        """
        setting, key = self.setting, f"composition ratios, held out: {held_out}"
        if key not in setting.cache:
            columns = [
                log_likelihood_ratios(
                    self.base,
                    samples,
                    setting.schedule,
                    conditions=self.set_conditions,
                    levels=setting.options["levels"],
                    seed=setting.seed,
                )[0]
                for samples in self._set_samples(held_out=held_out)
            ]
            values = torch.stack(columns, dim=1).cpu().numpy()  # above condition 0
            setting.cache[key] = values - np.diagonal(values, axis1=1, axis2=2)[:, :, None]
        return setting.cache[key]

    def _set_samples(self, *, held_out: bool) -> list[torch.Tensor]:
        """`pool` samples of each set, or as many as the smallest has, without repetition."""
        setting, data = self.setting, self.setting.data
        sets = [data.held_out_constraints[n] if held_out else data.constraints[n] for n in setting.names]
        count = min(setting.options["pool"], *map(len, sets))
        chosen = []
        for position, samples in enumerate(sets):
            index = self._generator(position, int(held_out), 0, table=True).permutation(len(samples))[:count]
            chosen.append(torch.from_numpy(samples[index]).to(setting.device))
        return chosen

    def _generator(self, position: int, counter: int, shard: int, *, table: bool = False) -> np.random.Generator:
        key, address = [self.setting.seed, SET_NOISE], [0, 2 * position + table, counter, shard]
        return np.random.Generator(np.random.Philox(key=key, counter=address))

    def student_draws(
        self,
        denoiser: torch.nn.Module,
        counter: int,
        shards: Sequence[int],
        counts: Mapping[int, int],
        num_sampling_steps: int,
    ) -> Draws:
        """OR: KL(q^i || p) of the student p on samples of every set.

        In an evaluation on held-out ones, whose numbers follow the values: what is drawn twice is not independent.
        """
        if not self._mixes:
            return super().student_draws(denoiser, counter, shards, counts, num_sampling_steps)
        setting, held_out = self.setting, counter >= EVALUATION_COUNTER
        rows = [np.zeros((0, (1 + held_out) * len(setting.names)))]
        for shard in shards if setting.names else []:
            columns, drawn = [], []
            for position, name in enumerate(setting.names):
                samples = setting.tensors[name]
                if held_out:
                    samples = torch.from_numpy(setting.data.held_out_constraints[name]).to(setting.device)
                generator = self._generator(position, counter, shard)
                if held_out:
                    drawn.append(index := rounds(generator, len(samples), counts[shard]))
                else:
                    index = generator.integers(len(samples), size=counts[shard])
                x_0 = samples[torch.from_numpy(index).to(setting.device)]
                law = self.base_predictor(self.set_conditions[position])
                columns.append(self.kl_values(law, denoiser, x_0, counter=counter, shard=shard))
            rows.append(np.column_stack([*columns, *drawn]))
        return Draws(np.concatenate(rows))

    def measurement(self, rows: np.ndarray, multipliers: np.ndarray) -> Measurement:
        if not self._mixes or self.trains or not self.setting.names:
            return super().measurement(rows, multipliers)
        sets = len(self.setting.names)
        weights = self.exponents(np.asarray(multipliers))[self.set_conditions]
        divergences = -logsumexp(rows.reshape(-1, sets, sets), axis=2, b=weights)
        found = mean_measurement(divergences)
        return self.keep(replace(found, objective=(0.0, 0.0)), multipliers)

    # -- the certificate ------------------------------------------------------------------------------------------------

    def objective(
        self, denoiser: torch.nn.Module, multipliers: torch.Tensor, *, evaluation: Mapping[str, Any], base_errors
    ) -> Objective:
        """The level: the largest divergence above its offset."""
        found, offsets = self.measured(denoiser, multipliers, evaluation), self.setting.cache.get(OFFSETS, {})
        above = np.array(found.metrics) - [offsets.get(name, 0.0) for name in self.setting.names]
        worst, meant = int(np.argmax(above)), "KL(q^i||p)" if self._mixes else "KL(p||q^i)"
        return Objective(
            float(above[worst]), found.stderrs[worst], f"level: the largest {meant} over the sets, above its offset"
        )

    def dual_value(self, multipliers: np.ndarray) -> tuple[float, float] | None:
        """OR: ``sum lambda_i KL(q^i||p)`` at the mixture, from the held-out table; what a student does is no matter."""
        if not self._mixes:
            return super().dual_value(multipliers)
        weights = self.exponents(np.asarray(multipliers))[self.set_conditions]
        table = self._ratio_table(held_out=True)
        found = mean_measurement(-logsumexp(table, axis=2, b=weights))
        return float(weights @ found.metrics), float(np.sqrt(np.square(weights * found.stderrs).sum()))

    def composed_law(self, multipliers: torch.Tensor) -> ComposedLaw:
        return replace(super().composed_law(multipliers), law="mixture" if self._mixes else "product")

    def exact(self, constraints: Sequence[Constraint], rule: Mapping[str, Any]) -> Oracle | None:
        solve = composition_or if self._mixes else composition_and
        return self.solved(lambda main, sets, offsets: solve(sets, offsets), constraints, rule)
