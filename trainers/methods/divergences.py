"""KL(q^i||p) in nats as the metric of a constraint: shared by fairness, adaptation and forward-KL unlearning.

The divergence is the point KL of two noise predictions, the pretrained model's for q^i and the current model's, on samples
of q^i. Both see the same noised samples, so what it says does not depend on how hard the set is to denoise.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import torch

from dualsweep.constraints import Constraint
from dualsweep.datasets import GaussianMixture
from dualsweep.trainers.estimators import MAX_ROWS, Predictor, point_kl
from dualsweep.trainers.evaluate import EVALUATION_COUNTER, weighted_errors
from dualsweep.trainers.formulations import ForwardKL
from dualsweep.trainers.labellers import Labeller
from dualsweep.trainers.methods.base import Method, Objective
from dualsweep.trainers.metrics import Draws, Measurement, clustered_measurement, rounds
from dualsweep.trainers.noise_schedule import NoiseSchedule
from dualsweep.trainers.oracles import Oracle, forward_kl, oracle_at

MOST_NUMBERS = 2**20  # of the noised samples in one forward: 8192 points of the plane, 341 images of 3x32x32


class DivergenceConstraints(Method):
    """A formulation whose constraints may be divergences of the sets' laws from the model.

    The pretrained model then learns every set under a condition of its own, which is what the law of a set means here.
    """

    conditional_units = ("nats",)
    at_least: ClassVar[bool] = (
        False  # the divergences are to grow: the multipliers enter the Lagrangian with a minus sign
    )
    no_dual_value = (
        "KL(q||p) itself and the minimum of the Lagrangian are known for Gaussian mixtures alone, in shares or nats and at "
        "multipliers inside their domain; of other data KL(q||p) is known above the pretrained model's only"
    )
    defaults: ClassVar = {"levels": 32}  # log-SNR levels of a divergence

    def law(self, name: str) -> Predictor:
        """Noise prediction of a set's law by the pretrained model; no graph.

        Raises: ValueError if the pretrained model was not trained on the set.
        """
        base, condition = self.setting.base, 1 + list(self.setting.data.constraints).index(name)
        if base.num_conditions <= condition:
            raise ValueError(
                f"model.pretrained: the model knows {base.num_conditions} conditions, thresholds.unit={self.setting.unit!r} "
                f"needs {1 + len(self.setting.data.constraints)}, one for main and one a set; remove model.pretrained "
                "to train one, or use another unit"
            )
        return self._frozen(condition)

    def _frozen(self, condition: int | None = None) -> Predictor:
        @torch.no_grad()
        def predict(x_t: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
            given = [] if condition is None else [torch.full_like(timestep, condition)]
            return self.setting.base(x_t, timestep, *given)

        return predict

    def law_samples(self, name: str, count: int, *, counter: int, shard: int, num_sampling_steps: int) -> torch.Tensor:
        """Samples of a set's law on the device, addressed by (seed, name, counter, shard).

        A dual step draws from the training samples with replacement, an evaluation goes through the held-out ones.
        """
        index, samples = self.held_out_index(name, count, counter=counter, shard=shard), self.setting.tensors[name]
        if index is None:
            index = self.generator(name, counter, shard).integers(len(samples), size=count)
        else:
            samples = torch.from_numpy(self.setting.data.held_out_constraints[name]).to(self.setting.device)
        return samples[torch.from_numpy(index).to(samples.device)]

    def held_out_index(self, name: str, count: int, *, counter: int, shard: int) -> np.ndarray | None:
        """Which held-out samples of a set `law_samples` takes; None where its samples are independent draws."""
        if counter < EVALUATION_COUNTER:
            return None
        return rounds(self.generator(name, counter, shard), len(self.setting.data.held_out_constraints[name]), count)

    def generator(self, name: str, counter: int, shard: int, purpose: int = 0) -> np.random.Generator:
        """Random numbers that no other measurement draws."""
        position = self.setting.names.index(name)
        key, address = [self.setting.seed, 0xD1FE + purpose], [0, position, counter, shard]
        return np.random.Generator(np.random.Philox(key=key, counter=address))

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
    ) -> Draws | None:
        """In nats: the point KL of every drawn sample of every set, one column a set.

        In an evaluation the numbers of the held-out samples follow: what is drawn twice is not independent.
        """
        if not self.setting.names or not self.measures_rows:
            return super().measure(
                denoiser,
                multipliers,
                counter=counter,
                shards=shards,
                counts=counts,
                num_sampling_steps=num_sampling_steps,
                labeller=labeller,
            )
        was_training = denoiser.training
        denoiser.eval()
        parts = [np.zeros((0, len(self.setting.names)))]
        for shard in shards:
            if counts[shard]:
                drawn = {"counter": counter, "shard": shard}
                columns = [
                    self.row_values(
                        name,
                        denoiser,
                        self.law_samples(name, counts[shard], num_sampling_steps=num_sampling_steps, **drawn),
                        self.generator(name, counter, shard, purpose=1),
                    )
                    for name in self.setting.names
                ]
                indices = [self.held_out_index(name, counts[shard], **drawn) for name in self.setting.names]
                held_out = [index for index in indices if index is not None]
                parts.append(np.column_stack([torch.stack(columns, dim=1).double().cpu().numpy(), *held_out]))
        denoiser.train(was_training)
        return Draws(np.concatenate(parts[1:] or parts))

    @property
    def most_rows(self) -> int:
        """Samples in one forward without gradients."""
        return max(1, min(MAX_ROWS, MOST_NUMBERS // math.prod(self.setting.data.sample_shape)))

    @property
    def measures_rows(self) -> bool:
        """Whether the metrics are means of `row_values`."""
        return self.setting.unit == "nats"

    def row_values(
        self, name: str, denoiser: torch.nn.Module, x_0: torch.Tensor, generator: np.random.Generator
    ) -> torch.Tensor:
        """The metric of one set on each of these samples of its law; here the point KL of the law from the model."""
        estimate = point_kl(
            self.law(name),
            denoiser,
            x_0,
            self.setting.schedule,
            levels=self.setting.options["levels"],
            seed=int(generator.integers(2**63)),
            max_rows=self.most_rows,
        )
        return estimate.per_sample

    def measurement(self, rows: np.ndarray, multipliers: np.ndarray) -> Measurement:
        if self.measures_rows:
            return clustered_measurement(rows, len(self.setting.names))
        return super().measurement(rows, multipliers)

    # -- the certificate ----------------------------------------------------------------------------------------------

    def objective(
        self, denoiser: torch.nn.Module, multipliers: torch.Tensor, *, evaluation: Mapping[str, Any], base_errors
    ) -> Objective:
        """Of a known law also KL(q||p) itself: above what the exact noise prediction has on the same draws."""
        found = super().objective(denoiser, multipliers, evaluation=evaluation, base_errors=base_errors)
        setting = self.setting
        if getattr(setting.data, "mixture", None) is None:
            return found
        key = ("errors of the exact prediction", evaluation["noise_levels"], setting.seed)
        if key not in setting.cache:
            setting.cache[key] = weighted_errors(
                _KnownLaw(setting.data.mixture, setting.schedule),
                setting.data.held_out_main.samples,
                setting.schedule,
                levels=evaluation["noise_levels"],
                seed=setting.seed,
                batch_size=evaluation["batch_size"],
            )
        gap = found.errors - setting.cache[key]
        return replace(found, absolute=(float(gap.mean()), float(gap.std(ddof=1) / np.sqrt(len(gap)))))

    def dual_value(self, multipliers: np.ndarray) -> tuple[float, float] | None:
        """Of known mixtures. In shares that of class restrictions (methods.md H1, H3), for components that hardly overlap."""
        setting, signed = self.setting, -multipliers if self.at_least else multipliers
        if self.mixtures is None or not setting.names:
            return None
        if setting.unit == "nats" and self.mixtures[0].dim <= 2:
            try:
                return oracle_at(ForwardKL(*self.mixtures, at_least=self.at_least), multipliers).dual_value, 0.0
            except ValueError:  # outside the domain
                return None
        classes = [setting.data.constraint_classes.get(name) for name in setting.names]
        prior = np.array([setting.data.prior.get(index, 0.0) for index in classes])
        weights, total = prior + signed, 1 + signed.sum()
        if setting.unit != "share" or (prior <= 0).any() or (weights <= 0).any() or total <= 0:
            return None
        metrics = -np.log(weights / total)
        objective = prior @ (np.log(prior) + metrics) + (1 - prior.sum()) * np.log(total)
        return float(objective + signed @ metrics), 0.0

    def class_density(
        self, constraints: Sequence[Constraint], shifts: np.ndarray
    ) -> Callable[[np.ndarray], np.ndarray] | None:
        """Log density of main with `shifts` added to the weights of the constraints' classes; None of unknown laws."""
        data = self.setting.data
        if data.reference_mixture is None:
            return None
        weights = np.array([data.prior[index] for index in range(data.reference_mixture.num_components)])
        weights[[data.constraint_classes[constraint.name] for constraint in constraints]] += shifts
        present = np.flatnonzero(weights > 0).tolist()
        return data.reference_mixture.restricted(present).with_weights(weights[present]).log_density

    def exact_divergences(
        self,
        constraints: Sequence[Constraint],
        rule: Mapping,
        *,
        at_least: bool = False,
        caps: Sequence[float] | None = None,
    ) -> Oracle | None:
        """The exact answer in nats where all laws are known; None for relaxed thresholds and those nobody can meet."""
        if self.mixtures is None or not constraints or rule["rule"] in ("resilient", "resilient_explicit"):
            return None
        thresholds = tuple(constraint.threshold for constraint in constraints)
        solved = self.setting.cache.setdefault("exact divergences", {})  # a second or more each, and asked for twice
        if thresholds not in solved:
            main, sets = self.mixtures
            try:
                solved[thresholds] = forward_kl(main, sets, thresholds, at_least=at_least, caps=caps)
            except ValueError:
                solved[thresholds] = None
        return solved[thresholds]


class _KnownLaw(torch.nn.Module):
    """The exact noise prediction of a Gaussian mixture, as a model without weights."""

    def __init__(self, mixture: GaussianMixture, schedule: NoiseSchedule) -> None:
        super().__init__()
        self.mixture, self.schedule = mixture, schedule
        self.place = torch.nn.Parameter(torch.zeros(1))  # tells callers the device

    def forward(self, x_t: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        alpha_bar = self.schedule.alpha_bar[timestep.numpy()]
        return torch.from_numpy(self.mixture.noise_prediction(x_t.numpy(), alpha_bar))
