"""What composition and reverse-KL unlearning share: laws ``p = prod_k (q^k)^{c_k} / Z`` of a conditional pretrained model.

The exponents follow from the multipliers, so the minimiser of the Lagrangian is known and training the weights is a
choice. Dual-only (`primal: none`) the law is sampled as it is (annealed.py) and the divergences are those of its samples,

    KL(p || q^i) = E_p[log p - log q^i],   log p = sum_k c_k log q^k - log Z,

with log-likelihood ratios of the pretrained model. With `primal: distill` a student, condition 0 of the network, learns from
samples of the current law, and the divergences are the student's own.
Source: methods.md 0.4, 4, 5, H2 and H6.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from dualsweep.constraints import Constraint
from dualsweep.trainers.annealed import (
    MAX_ROWS,
    AnnealedSampler,
    ConditionalPredictor,
    Population,
    ShardNoise,
    condition_predictions,
)
from dualsweep.trainers.codec import AS_THEY_ARE, Codec
from dualsweep.trainers.estimators import EXACT_DIVERGENCE_DIM, Predictor, point_kl
from dualsweep.trainers.evaluate import EVALUATION_COUNTER
from dualsweep.trainers.labellers import Labeller
from dualsweep.trainers.methods.base import CALIBRATION_COUNTER, Batch, Method, PrimalTerms
from dualsweep.trainers.methods.denoising import denoising_terms
from dualsweep.trainers.metrics import Draws, Measurement, clustered_measurement, clustered_stderrs
from dualsweep.trainers.models import Denoiser, load_model, save_model
from dualsweep.trainers.noise_schedule import NoiseSchedule
from dualsweep.trainers.oracles import Oracle
from dualsweep.trainers.samplers import ddim_sample, starting_noise

COMPOSITION_FILE = "composition.json"
DUAL_VALUE_COUNTER = EVALUATION_COUNTER + 2
CALIBRATION_DRAWS = 2048
DUAL_VALUE_DRAWS = 4096
SAMPLER_NOISE, RATIO_NOISE = 0xA11EA1, 0x1D7  # purposes that address random numbers
ANCESTOR, LOG_Z, LOG_Z_VARIANCE = range(3)  # the first columns of a row; log ratios follow


@dataclass(frozen=True, kw_only=True)
class ComposedLaw:
    """A composed law over the conditions of a model, with all that sampling it needs; stored beside the model."""

    law: str  # "product": prod (q^k)^{c_k} / Z; "mixture": sum c_k q^k
    coefficients: tuple[float, ...]  # one a condition, from 0 on, with sum 1
    names: tuple[str, ...]  # constraint sets: condition 1 + i is names[i], condition 0 the main data
    sampler: AnnealedSampler
    schedule: dict[str, Any]  # arguments of NoiseSchedule

    def sample(
        self,
        denoiser: ConditionalPredictor,
        start: torch.Tensor,
        schedule: NoiseSchedule,
        *,
        num_sampling_steps: int,
        max_rows: int = MAX_ROWS,
    ) -> torch.Tensor:
        """Samples on the CPU, deterministic in `start`; `num_sampling_steps` are those of a mixture's DDIM."""
        if self.law == "product":
            return self.sampler(denoiser, self.coefficients, start, schedule, max_rows=max_rows).x_0
        generator = ShardNoise.from_start(start).generators[0]
        weights = np.array(self.coefficients) / np.sum(self.coefficients)
        condition = torch.from_numpy(generator.choice(len(weights), size=len(start), p=weights)).to(start.device)
        return _conditional_ddim(
            denoiser, condition, start, schedule, num_sampling_steps=num_sampling_steps, batch_size=max_rows
        )


def save_composition(
    denoiser: Denoiser, composition: ComposedLaw, schedule: NoiseSchedule, folder: Path, codec: Codec = AS_THEY_ARE
) -> None:
    """The pretrained model in its usual layout, and ``composition.json`` beside it."""
    save_model(denoiser, schedule, folder, codec)
    Path(folder, COMPOSITION_FILE).write_text(json.dumps(asdict(composition), indent=1), encoding="utf-8")


def load_composition(folder: str | Path) -> tuple[Denoiser, NoiseSchedule, ComposedLaw]:
    """Read what `save_composition` wrote: ``composition.sample(denoiser, start, schedule, ...)`` draws from it.

    Raises: ValueError naming the file when it is not there or not whole, or does not fit the model.
    """
    path = Path(folder) / COMPOSITION_FILE
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        composition = ComposedLaw(
            law=stored["law"],
            coefficients=tuple(map(float, stored["coefficients"])),
            names=tuple(stored["names"]),
            sampler=AnnealedSampler(**stored["sampler"]),
            schedule=stored["schedule"],
        )
        schedule = NoiseSchedule(**composition.schedule)
    except (OSError, json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: no composition can be read ({error}); give a folder that a sweep saved") from error
    denoiser = load_model(folder).eval()
    if denoiser.num_conditions != len(composition.coefficients):
        raise ValueError(
            f"{path}: {len(composition.coefficients)} coefficients for a model of {denoiser.num_conditions} conditions; "
            "restore both from one sweep"
        )
    return denoiser, schedule, composition


class Composed(Method):
    """A formulation whose optimum at given multipliers is a product of the conditional pretrained model's laws.

    Subclasses give the exponents, and what is measured against which condition.
    """

    units = ("nats",)
    conditional = True
    defaults: ClassVar[Mapping[str, Any]] = {
        "primal": "none",
        "levels": 32,
        "sampling_levels": 24,
        "langevin_steps": 2,
        "langevin_step_size": 1.0,
        "pool": 1024,
    }

    def __init__(self, setting) -> None:
        super().__init__(setting)
        self._buffered: tuple[bytes, torch.Tensor] | None = None
        self._measured: tuple[bytes, Measurement, tuple[float, float]] | None = None

    @classmethod
    def check(cls, config: Mapping[str, Any], names: Sequence[str]) -> None:
        options, window = cls.options(config["formulation"]), config["measure"]["window"]
        if options["primal"] == "none" and window != 1:
            raise ValueError(
                f"measure.window={window}: without primal steps the draws of earlier dual steps belong to other laws; set "
                "measure.window=1, and raise measure.num_samples or dual.smoothing for less noise"
            )
        if not 0 < options["langevin_step_size"] < 4:
            raise ValueError(
                f"formulation.langevin_step_size={options['langevin_step_size']}: corrections diverge from 4 on; 1 is usual"
            )

    @property
    def trains(self) -> bool:
        return self.setting.options["primal"] == "distill"

    @property
    def objective_scale(self) -> float:
        """Nats, which add up over the elements of a sample."""
        return float(np.prod(self.setting.data.sample_shape))

    @property
    def set_conditions(self) -> list[int]:
        """Conditions of the constraints' sets in the multipliers' order; of all sets in a run without constraints."""
        known = list(self.setting.data.constraints)
        return [1 + known.index(name) for name in self.setting.names or known]

    @property
    def num_conditions(self) -> int:
        return 1 + len(self.setting.data.constraints)

    @property
    def base(self) -> Denoiser:
        """The pretrained model. Raises: ValueError if it was not trained on the sets."""
        known = self.setting.base.num_conditions
        if known < self.num_conditions:
            raise ValueError(
                f"model.pretrained: the model knows {known} conditions, {self.name} needs {self.num_conditions}, one for main "
                "and one a set; remove model.pretrained to train one"
            )
        return self.setting.base

    def exponents(self, multipliers: np.ndarray) -> np.ndarray:
        """c_k of every condition from 0 on, with sum 1, for multipliers of shape (num_constraints,) or none."""
        raise NotImplementedError

    def dual_of_log_z(self, log_z: float, multipliers: np.ndarray) -> float:
        """The dual function, thresholds left out, from log Z of the law at these multipliers."""
        raise NotImplementedError

    @property
    def measured_conditions(self) -> list[int]:
        """Conditions whose divergence is measured: those of the constraints, led by the objective's if there is one.

        No other condition has an exponent, so their log ratios tell the law's.
        """
        return self.set_conditions

    @property
    def sampler(self) -> AnnealedSampler:
        """Weights are of use while a few samples carry them: in images a system would fall to one ancestor."""
        options, elements = self.setting.options, int(np.prod(self.setting.data.sample_shape))
        return AnnealedSampler(
            levels=options["sampling_levels"],
            langevin_steps=options["langevin_steps"],
            langevin_step_size=options["langevin_step_size"],
            resample_below=0.5 if elements <= EXACT_DIVERGENCE_DIM else 0.0,
        )

    @property
    def max_rows(self) -> int:
        return MAX_ROWS if len(self.setting.data.sample_shape) == 1 else 256

    def population(
        self, multipliers: torch.Tensor, *, counter: int, shards: Sequence[int], counts: Mapping[int, int]
    ) -> Population:
        """Samples of the law at these multipliers, addressed by (seed, counter, shard)."""
        seed, shape = self.setting.seed, self.setting.data.sample_shape
        start = starting_noise(seed=seed, counter=counter, shards=shards, counts=dict(counts), shape=shape)
        noise = ShardNoise.addressed(seed=seed, purpose=SAMPLER_NOISE, counter=counter, shards=shards, counts=counts)
        return self.sampler(
            self.base,
            self.exponents(_as_array(multipliers)),
            start.to(self.setting.device),
            self.setting.schedule,
            noise,
            max_rows=self.max_rows,
        )

    # -- primal ---------------------------------------------------------------------------------------------------

    def streams(self) -> dict[str, tuple[torch.Tensor, int]]:
        """Positions in the buffer of samples: those change with the multipliers, their number does not."""
        positions = torch.arange(self.setting.options["pool"], device=self.setting.device)
        return {"main": (positions, self.setting.optimizer["batch_size"])}

    def primal_loss(self, denoiser: torch.nn.Module, batch: Batch, multipliers: torch.Tensor) -> PrimalTerms:
        """Denoising loss of the student on samples of the law at these multipliers."""
        batch = replace(batch, x_0=self._buffer(multipliers)[batch.x_0])
        terms = denoising_terms(denoiser, self.setting.schedule, batch, batch.noise.new_ones(1))
        return PrimalTerms(terms.loss, terms.values, (*terms.counts, *[0] * len(self.setting.names)))

    def _buffer(self, multipliers: torch.Tensor) -> torch.Tensor:
        """`pool` samples of the law, drawn anew whenever the multipliers have moved.

        Their random numbers are addressed by the multipliers themselves, so that a resumed run and every worker has the
        same buffer without keeping it anywhere.
        """
        key = _as_array(self.on_host(multipliers)).tobytes()
        if self._buffered is None or self._buffered[0] != key:
            counter = int.from_bytes(sha256(key).digest()[:7], "big")
            with torch.autocast(self.setting.device.type, enabled=False):
                drawn = self.population(
                    multipliers, counter=counter, shards=[0], counts={0: self.setting.options["pool"]}
                )
            self._buffered = (key, drawn.x_0.to(self.setting.device))
        return self._buffered[1]

    # -- measurement ----------------------------------------------------------------------------------------------

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
        """Dual-only: a row of `ANCESTOR`, `LOG_Z`, `LOG_Z_VARIANCE` and the measured conditions' log ratios for every sample.

        A student: the point KL of each measured condition on its own samples, a column each.
        """
        drawn = [shard for shard in shards if counts[shard]]
        if self.trains:
            was_training = denoiser.training
            found = self.student_draws(denoiser.eval(), counter, drawn, counts, num_sampling_steps)
            denoiser.train(was_training)
            return found
        if not drawn or not self.setting.names:
            return Draws(np.zeros((0, 3 + len(self.measured_conditions))))
        setting = self.setting
        population = self.population(multipliers, counter=counter, shards=drawn, counts=counts)
        noise = ShardNoise.addressed(
            seed=setting.seed, purpose=RATIO_NOISE, counter=counter, shards=drawn, counts=counts
        )
        ratios = log_ratios(
            self.base,
            population.x_0.to(setting.device),
            self.measured_conditions,
            setting.schedule,
            noise,
            levels=setting.options["levels"],
            max_rows=self.max_rows,
        )
        # Ancestors are numbered over all shards: rows of all workers come together.
        first = {shard: sum(counts[k] for k in counts if k < shard) for shard in drawn}
        local = np.cumsum([0, *(counts[shard] for shard in drawn)])
        offsets = np.repeat([first[s] - at for s, at in zip(drawn, local, strict=False)], [counts[s] for s in drawn])
        lead = [population.ancestors + offsets, population.log_normalizers, population.log_normalizer_variances]
        return Draws(np.column_stack([*lead, ratios]), population.x_0)

    def student_draws(
        self,
        denoiser: torch.nn.Module,
        counter: int,
        shards: Sequence[int],
        counts: Mapping[int, int],
        num_sampling_steps: int,
    ) -> Draws:
        """KL(p || q^k) of the student p on its own samples, a column a measured condition."""
        setting = self.setting
        start = starting_noise(
            seed=setting.seed, counter=counter, shards=shards, counts=dict(counts), shape=setting.data.sample_shape
        )
        if not len(start) or not setting.names:
            return Draws(np.zeros((0, len(self.measured_conditions))))
        samples = ddim_sample(
            denoiser, start, setting.schedule, num_sampling_steps=num_sampling_steps, batch_size=self.max_rows
        )
        parts = samples.clone().to(setting.device).split([counts[shard] for shard in shards])
        rows = [
            np.column_stack(
                [
                    self.kl_values(denoiser, self.base_predictor(k), x_0, counter=counter, shard=shard)
                    for k in self.measured_conditions
                ]
            )
            for shard, x_0 in zip(shards, parts, strict=True)
        ]
        return Draws(np.concatenate(rows), samples)

    def kl_values(self, p: Predictor, q: Predictor, x_0: torch.Tensor, *, counter: int, shard: int) -> np.ndarray:
        """Point KL(p || q) of every sample of p, noise addressed by (seed, counter, shard)."""
        seed = int(np.random.SeedSequence([self.setting.seed, counter, shard]).generate_state(1, np.uint64)[0])
        levels = self.setting.options["levels"]
        found = point_kl(p, q, x_0, self.setting.schedule, levels=levels, seed=seed, max_rows=self.max_rows)
        return found.per_sample.cpu().numpy()

    def base_predictor(self, condition: int) -> Predictor:
        """The pretrained model under one condition."""
        base = self.base
        return lambda x_t, timestep: base(x_t, timestep, torch.full_like(timestep, condition))

    def measurement(self, rows: np.ndarray, multipliers: np.ndarray) -> Measurement:
        if not self.setting.names:
            return Measurement([], [], [], objective=(0.0, 0.0))
        if self.trains:
            found, log_z = clustered_measurement(rows, len(self.measured_conditions)), None
        else:
            found, log_z = self._composed_measurement(rows, self.exponents(_as_array(multipliers)))
        extra = len(self.measured_conditions) - len(self.setting.names)
        objective = (found.metrics[0], found.stderrs[0]) if extra else (0.0, 0.0)
        found = Measurement(found.metrics[extra:], found.stderrs[extra:], found.counts[extra:], objective)
        return self.keep(found, multipliers, log_z)

    def keep(
        self, found: Measurement, multipliers: np.ndarray, log_z: tuple[float, float] | None = None
    ) -> Measurement:
        """Remember a measurement for the objective and the dual value at the same multipliers."""
        self._measured = (_as_array(multipliers).tobytes(), found, log_z)
        return found

    def _composed_measurement(self, rows: np.ndarray, exponents: np.ndarray) -> tuple[Measurement, tuple[float, float]]:
        """KL(p || q^k) of the measured conditions, and log Z with its standard error."""
        ratios = rows[:, LOG_Z_VARIANCE + 1 :]
        log_p = ratios @ exponents[self.measured_conditions]  # above the first of them, and up to log Z
        values = log_p[:, None] - ratios
        log_z = float(rows[:, LOG_Z].mean())
        # A system of n samples has n rows: each variance counts (n / rows)^2 once, so n / rows^2 a row.
        _, system = np.unique(rows[:, LOG_Z], return_inverse=True)
        sizes = np.bincount(system)[system]
        log_z_stderr = float(np.sqrt((rows[:, LOG_Z_VARIANCE] * sizes).sum()) / len(rows))
        stderrs, count = clustered_stderrs(values, rows[:, ANCESTOR])
        metrics = values.mean(axis=0) - log_z
        stderrs = np.hypot(stderrs, log_z_stderr)
        return Measurement(metrics.tolist(), stderrs.tolist(), [count] * len(metrics)), (log_z, log_z_stderr)

    def measured(
        self, denoiser: torch.nn.Module, multipliers: torch.Tensor, evaluation: Mapping[str, Any]
    ) -> Measurement:
        """The last measurement if it was made at these multipliers, else a fresh one."""
        if self._measured is None or self._measured[0] != _as_array(multipliers).tobytes():
            draws = self.measure(
                denoiser,
                multipliers,
                counter=EVALUATION_COUNTER,
                shards=[0],
                counts={0: evaluation["num_samples"]},
                num_sampling_steps=evaluation["num_sampling_steps"],
            )
            self.measurement(draws.rows, _as_array(multipliers))
        return self._measured[1]

    def calibrate(self) -> Measurement:
        """At multipliers of zero; of the law itself, not of a student, which does not know it yet."""
        judge = type(self)(replace(self.setting, options={**self.setting.options, "primal": "none"}))
        zeros = torch.zeros(len(self.setting.names), device=self.setting.device)
        draws = judge.measure(
            self.base,
            zeros,
            counter=CALIBRATION_COUNTER,
            shards=[0],
            counts={0: CALIBRATION_DRAWS},
            num_sampling_steps=self.setting.measure["num_sampling_steps"],
        )
        return judge.measurement(draws.rows, _as_array(zeros))

    def dual_value(self, multipliers: np.ndarray) -> tuple[float, float] | None:
        """From log Z; for a student too: the minimum over all models does not depend on how far it got."""
        key = _as_array(multipliers).tobytes()
        if self._measured is not None and self._measured[0] == key and self._measured[2] is not None:
            log_z, stderr = self._measured[2]
        else:
            population = self.population(
                torch.as_tensor(_as_array(multipliers)),
                counter=DUAL_VALUE_COUNTER,
                shards=[0],
                counts={0: DUAL_VALUE_DRAWS},
            )
            log_z, stderr = population.log_normalizers[0], np.sqrt(population.log_normalizer_variances[0])
        slope = abs(self.dual_of_log_z(1.0, multipliers))
        return self.dual_of_log_z(float(log_z), multipliers), float(slope * stderr)

    # -- the law itself -------------------------------------------------------------------------------------------

    def composed_law(self, multipliers: torch.Tensor) -> ComposedLaw:
        """The law at these multipliers."""
        config = self.setting.schedule.scheduler.config
        return ComposedLaw(
            law="product",
            coefficients=tuple(self.exponents(_as_array(multipliers)).tolist()),
            names=tuple(self.setting.data.constraints),
            sampler=self.sampler,
            schedule={
                "kind": config.beta_schedule,
                "num_train_timesteps": config.num_train_timesteps,
                "beta_start": config.beta_start,
                "beta_end": config.beta_end,
                "clip_sample": config.clip_sample,
            },
        )

    def sample(
        self,
        denoiser: torch.nn.Module,
        multipliers: torch.Tensor,
        start: torch.Tensor,
        *,
        num_sampling_steps: int,
        batch_size: int = 256,
    ) -> torch.Tensor:
        if self.trains:
            return super().sample(
                denoiser, multipliers, start, num_sampling_steps=num_sampling_steps, batch_size=batch_size
            )
        return self.composed_law(multipliers).sample(
            self.base,
            start.to(self.setting.device),
            self.setting.schedule,
            num_sampling_steps=num_sampling_steps,
            max_rows=max(batch_size, self.max_rows),
        )

    def save(self, denoiser: Denoiser, multipliers: torch.Tensor, folder: Path) -> None:
        if self.trains:
            return super().save(denoiser, multipliers, folder)
        setting = self.setting
        return save_composition(self.base, self.composed_law(multipliers), setting.schedule, folder, setting.codec)

    def solved(
        self, solve: Callable[..., Oracle], constraints: Sequence[Constraint], rule: Mapping[str, Any]
    ) -> Oracle | None:
        """``solve(main, sets, thresholds in nats)``; None where a law is not known or not of the line or the plane, where
        thresholds are relaxed, and where no model meets them.
        """
        relaxed = rule["rule"] in ("resilient", "resilient_explicit")
        if self.mixtures is None or self.mixtures[0].dim > 2 or not constraints or relaxed:
            return None
        thresholds, cache = [constraint.threshold for constraint in constraints], self.setting.cache
        key = f"exact answer at {thresholds}"
        if key not in cache:  # that there is none takes seconds to find out
            try:
                cache[key] = solve(*self.mixtures, thresholds)
            except ValueError:
                cache[key] = None
        return cache[key]


@torch.no_grad()
def log_ratios(
    denoiser: ConditionalPredictor,
    x_0: torch.Tensor,
    conditions: Sequence[int],
    schedule: NoiseSchedule,
    noise: ShardNoise,
    *,
    levels: int,
    repeats: int = 1,
    max_rows: int = MAX_ROWS,
) -> np.ndarray:
    """log q^k(x) - log q^first(x) of every sample under several conditions, nats, from one pass with common noise.

    1/2 int E[|noise - noise_first|^2 - |noise - noise_k|^2] d log SNR with one draw a level and repeat: unbiased for exact
    predictions but for quadrature, and noisy. On means over samples of trained models it came out closer to the
    densities than the probability-flow ODE at four times its cost (off by 0.05 against 0.2 nats in the tails of a set).

    Args:
        noise: its counts are those of x_0.
    Returns: float64 (n, conditions), the first column 0.
    Source: unlearning paper, Lemma 2; methods.md 0.3.
    """
    timesteps, weights = schedule.log_snr_grid(levels)
    total = np.zeros((len(conditions), len(x_0)))
    for _ in range(repeats):
        for timestep, weight in zip(timesteps.tolist(), weights.tolist(), strict=True):
            drawn = noise.normal(x_0.shape[1:]).to(x_0)
            given = torch.full((len(x_0),), timestep, device=x_0.device)
            x_t = schedule.add_noise(x_0, drawn, given)
            predictions = condition_predictions(denoiser, x_t, given, list(conditions), max_rows=max_rows)
            # |noise - first|^2 - |noise - k|^2 as a product: near the clean end the squares agree in most digits.
            gaps = (predictions - predictions[:1]) * (2 * drawn - predictions - predictions[:1])
            total += weight / repeats * gaps.flatten(2).sum(2).double().cpu().numpy()
    return total.T


def _conditional_ddim(
    denoiser: ConditionalPredictor,
    condition: torch.Tensor,
    start: torch.Tensor,
    schedule: NoiseSchedule,
    *,
    num_sampling_steps: int,
    batch_size: int,
) -> torch.Tensor:
    """DDIM of samples that have a condition each."""
    parts = [
        ddim_sample(_Under(denoiser, given), x_t, schedule, num_sampling_steps=num_sampling_steps, batch_size=len(x_t))
        for x_t, given in zip(start.split(batch_size), condition.split(batch_size), strict=True)
    ]
    return torch.cat(parts) if parts else start


class _Under(torch.nn.Module):
    """A denoiser under fixed conditions, one a row."""

    def __init__(self, denoiser: torch.nn.Module, condition: torch.Tensor) -> None:
        super().__init__()
        self.denoiser, self.condition = denoiser, condition

    def forward(self, x_t: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return self.denoiser(x_t, timestep, self.condition)


def _as_array(multipliers: torch.Tensor | np.ndarray) -> np.ndarray:
    """float32 on the CPU, so that a tensor and the array made of it count as the same multipliers."""
    if isinstance(multipliers, torch.Tensor):
        multipliers = multipliers.detach().cpu().numpy()
    return np.asarray(multipliers, dtype=np.float32)
