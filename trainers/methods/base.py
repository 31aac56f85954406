"""What a formulation owes the training loop: streams, a Lagrangian, a measurement of its constraints, and its exact answer."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from dualsweep.constraints import Constraint, DualDomain, NonNegative
from dualsweep.datasets import ConstrainedData, DatasetSpec, DatasetSummary
from dualsweep.trainers.codec import AS_THEY_ARE, Codec
from dualsweep.trainers.evaluate import EVALUATION_COUNTER, denoising_losses, weighted_errors
from dualsweep.trainers.labellers import Labeller
from dualsweep.trainers.metrics import Draws, Measurement, loss_measurement, share_draws, share_measurement
from dualsweep.trainers.models import Denoiser, save_model
from dualsweep.trainers.noise_schedule import NoiseSchedule
from dualsweep.trainers.oracles import Oracle
from dualsweep.trainers.samplers import ddim_sample

CALIBRATION_DRAWS = 8192
HELD_OUT_DRAWS = 4096  # of a denoising loss
CALIBRATION_COUNTER = EVALUATION_COUNTER + 1


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a formulation is built from, once a trial."""

    data: ConstrainedData
    schedule: NoiseSchedule
    base: Denoiser | None  # frozen pretrained model on `device`; None while it is itself being trained
    names: tuple[str, ...]  # constraints in the multipliers' order; empty for an unconstrained run
    unit: str
    options: Mapping[str, Any]  # the formulation's options, complete
    optimizer: Mapping[str, Any]  # the `primal` section (`pretrain` for the pretrained model)
    measure: Mapping[str, Any]  # num_samples, num_sampling_steps, window
    seed: int
    device: torch.device
    tensors: Mapping[str, torch.Tensor]  # "main" and every set's samples, on `device`
    labeller: Callable[[], Labeller]  # of the training; made on first use
    codec: Codec = AS_THEY_ARE  # from samples to images; labellers and rewards look at images
    cache: dict[str, Any] = field(default_factory=dict)  # kept by the worker process from trial to trial
    evaluation_steps: int | None = None  # sampling steps of the evaluation; None: not known


@dataclass
class Batch:
    """The samples of all streams of one primal step, concatenated in stream order."""

    x_0: torch.Tensor  # (batch, *sample_shape)
    noise: torch.Tensor  # (batch, *noise_shape)
    timestep: torch.Tensor  # int64 (batch,)
    counts: tuple[int, ...]  # samples of each stream held by this worker
    global_counts: tuple[int, ...]  # the same over all workers


@dataclass
class PrimalTerms:
    """What one primal step differentiates, and what it saw.

    `values` holds rows one after the other: per-sample values of the objective, then of every constraint; `counts` says how
    many samples of each row this worker holds. What they mean (losses, rewards, nats) is the method's business.
    """

    loss: torch.Tensor  # scalar: this worker's part of the Lagrangian; parts add up over workers
    values: torch.Tensor  # (sum of counts,)
    counts: tuple[int, ...]


@dataclass(frozen=True)
class Objective:
    """What the requirements cost, on draws that training never used."""

    value: float
    stderr: float
    meaning: str
    errors: np.ndarray | None = None  # per held-out sample, to compare runs pair by pair
    unit: str = "nats"
    absolute: tuple[float, float] | None = None  # the objective and its error where `value` is above the pretrained model's


@dataclass(frozen=True)
class HostBatch:
    """A batch as it is drawn: on the host, and page-locked where the copy to the device shall not wait."""

    indices: torch.Tensor  # int64 (batch,), into each stream's samples
    timestep: torch.Tensor  # int64 (batch,)
    noise: torch.Tensor  # (batch, *noise_shape)
    counts: tuple[int, ...]

    def to_device(
        self, tensors: Mapping[str, torch.Tensor], batch_sizes: Mapping[str, int], device: torch.device
    ) -> Batch:
        """This worker's batch; from page-locked memory nothing here waits for the device.

        Args:
            tensors: stream name -> all its samples, on `device`.
            batch_sizes: stream name -> samples over all workers.
        """
        indices, timestep, noise = (
            one.to(device, non_blocking=True) for one in (self.indices, self.timestep, self.noise)
        )
        rows = zip(batch_sizes, indices.split(list(self.counts)), strict=True)
        return Batch(
            x_0=torch.cat([tensors[name][index] for name, index in rows]),
            noise=noise,
            timestep=timestep,
            counts=self.counts,
            global_counts=tuple(batch_sizes.values()),
        )


def host_batch(
    draws: Mapping[str, tuple[np.ndarray, np.ndarray, np.ndarray]], batch_sizes: Mapping[str, int], *, pinned: bool
) -> HostBatch:
    """The streams' draws one after the other.

    Args:
        draws: stream name -> (indices, timesteps, noise), as `Streams.draw` gives them.
        batch_sizes: as for `HostBatch.to_device`.
    """
    indices, timesteps, noises = zip(*(draws[name] for name in batch_sizes), strict=True)
    parts = (_joined(arrays, pinned) for arrays in (indices, timesteps, noises))
    return HostBatch(*parts, counts=tuple(len(index) for index in indices))


def _joined(arrays: Sequence[np.ndarray], pinned: bool) -> torch.Tensor:
    if not pinned:
        return torch.from_numpy(np.concatenate(arrays))
    first = torch.from_numpy(arrays[0])
    # PyTorch hands a page-locked block out again only when the copies from it are over.
    joined = torch.empty((sum(map(len, arrays)), *first.shape[1:]), dtype=first.dtype, pin_memory=True)
    np.concatenate(arrays, out=joined.numpy())
    return joined


@lru_cache(maxsize=256)
def device_constant(values: tuple[float, ...], device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """These numbers as a tensor, made once: making one in every step would wait for the device. Not to be written to."""
    with torch.inference_mode(False):  # kept beyond the call that happens to be the first
        return torch.tensor(values, device=device, dtype=dtype)


@lru_cache(maxsize=256)
def stream_of_each(counts: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """The stream's number of every sample of a batch, int64 (batch,); made once. Not to be written to."""
    with torch.inference_mode(False):
        return torch.arange(len(counts)).repeat_interleave(torch.tensor(counts)).to(device)


class StreamSums:
    """Running (sum, sum of squares, count) of the per-sample values of every row between two dual steps.

    Kept as one float64 tensor of shape (1 + num_constraints, 3) on the device, so that reading it is the only
    synchronisation a dual step needs, and adding it over ranks is one small all-reduce.
    """

    def __init__(self, num_rows: int, device: torch.device) -> None:
        self.table = torch.zeros((num_rows, 3), dtype=torch.float64, device=device)

    def add(self, values: torch.Tensor, counts: Sequence[int]) -> None:
        values = values.detach().double()
        for row, part in zip(self.table, values.split(list(counts)), strict=True):
            row[0] += part.sum()
            row[1] += part.square().sum()
            row[2] += len(part)

    def reset(self) -> None:
        self.table.zero_()


class Method:
    """One formulation. Subclasses say what differs from denoising on the main set with losses or shares as metrics."""

    name: ClassVar[str]
    units: ClassVar[tuple[str, ...]]  # units its constraints may use; the first is the usual one
    defaults: ClassVar[Mapping[str, Any]] = {}  # options of the `formulation` section it takes, with their defaults
    group: ClassVar[str] = "sets"  # the threshold axis that stands for every constraint
    conditional: ClassVar[bool] = False  # the pretrained model must know every constraint set's law as a condition
    conditional_units: ClassVar[tuple[str, ...]] = ()  # units whose metric alone needs that
    needs_sets: ClassVar[bool] = True  # its constraints are about sets of data
    objective_name: ClassVar[str] = "denoising loss on the main set"
    no_dual_value: ClassVar[str] = "the minimum of its Lagrangian is not known"  # why `dual_value` is None, where it is
    starts_optimal: ClassVar[bool] = False  # without constraints the pretrained model is the answer: nothing to train

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self._read: tuple[torch.Tensor, int, np.ndarray] | None = None

    @classmethod
    def constraint_names(cls, set_names: Sequence[str], options: Mapping[str, Any]) -> tuple[str, ...]:
        """Names of the constraints, given those of the data's sets and the `formulation` section."""
        return tuple(set_names)

    @classmethod
    def pretraining_sets(cls, set_names: Sequence[str], unit: str) -> tuple[str, ...]:
        """The streams the pretrained model learns from, by the constraints' unit; several each under its own condition."""
        return ("main", *set_names) if cls.conditional or unit in cls.conditional_units else ("main",)

    @classmethod
    def options(cls, formulation: Mapping[str, Any]) -> dict[str, Any]:
        """Its options: what the `formulation` section gives, else the defaults."""
        return {
            key: default if formulation.get(key) is None else formulation[key] for key, default in cls.defaults.items()
        }

    @classmethod
    def check(cls, config: Mapping[str, Any], names: Sequence[str]) -> None:
        """Refuse a configuration (resolved, as a dictionary) this formulation can't use.

        Raises: ValueError naming field, value and remedy.
        """

    @classmethod
    def check_data(cls, config: Mapping[str, Any], spec: DatasetSpec, summary: DatasetSummary) -> None:
        """Refuse what `check` cannot see: it needs to know the data, before any image is read.

        Raises: ValueError naming field, value and remedy.
        """

    @classmethod
    def needs_whole_batch(cls, options: Mapping[str, Any]) -> str | None:
        """Why its primal loss has to see a worker's whole batch at once; None where the losses of its parts add up."""
        return None

    @property
    def trains(self) -> bool:
        """False where only the multipliers move (dual-only): the loop then makes no optimizer step."""
        return True

    @property
    def objective_scale(self) -> float:
        """Size of the objective in a sound run: a mean squared error of noise of variance 1 unless a formulation says else."""
        return 1.0

    def domain(self, constraints: Sequence[Constraint]) -> DualDomain:
        """Where the multipliers may live."""
        return NonNegative()

    def on_host(self, multipliers: torch.Tensor) -> np.ndarray:
        """Their values, read again only when they were written to: reading waits for the device, and steps read many times."""
        version = multipliers._version
        if self._read is None or self._read[0] is not multipliers or self._read[1] != version:
            self._read = (multipliers, version, multipliers.detach().cpu().numpy().copy())
        return self._read[2]

    # -- primal ---------------------------------------------------------------------------------------------------

    @property
    def noise_shape(self) -> tuple[int, ...]:
        """Shape of the noise that comes with every drawn sample."""
        return self.setting.data.sample_shape

    def streams(self) -> dict[str, tuple[torch.Tensor, int]]:
        """Stream name -> (its samples on the device, samples a primal step over all workers), objective first."""
        optimizer, tensors = self.setting.optimizer, self.setting.tensors
        found = {"main": (tensors["main"], optimizer["batch_size"])}
        return found | {name: (tensors[name], optimizer["constraint_batch_size"]) for name in self.setting.names}

    def primal_loss(self, denoiser: torch.nn.Module, batch: Batch, multipliers: torch.Tensor) -> PrimalTerms:
        """The Lagrangian of one batch at fixed multipliers (float32, shape (num_constraints,))."""
        raise TypeError(f"{self.name} is dual-only here: it has no primal step")

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
    ) -> Draws | None:
        """Fresh draws for the constraint metrics; None where the values of the primal steps are the metrics.

        Args:
            counter: addresses the random numbers: every dual step has its own.
            shards, counts: this worker's logical shards and the draws of each.
            labeller: judges samples (shares); None: the training's own.
        """
        if self.setting.unit != "share" or not self.setting.names:
            return None
        return share_draws(
            self.sample,
            denoiser,
            multipliers,
            labeller or self.setting.labeller(),
            [self.setting.data.constraint_classes[name] for name in self.setting.names],
            seed=self.setting.seed,
            counter=counter,
            shards=shards,
            counts=counts,
            shape=self.setting.data.sample_shape,
            num_sampling_steps=num_sampling_steps,
            codec=self.setting.codec,
        )

    def measurement(self, rows: np.ndarray, multipliers: np.ndarray) -> Measurement:
        """Metrics in their natural direction (-log share, nats, loss, ratio, reward) from the rows `measure` drew."""
        return share_measurement(rows)

    def held_out_measurement(self, denoiser: torch.nn.Module, multipliers: torch.Tensor) -> Measurement:
        """The metrics on held-out draws where `measure` has none: denoising losses of the sets."""
        setting = self.setting
        rows = [np.array([0.0, 0.0, 1.0])]
        for name in setting.names:
            samples, trained = setting.data.held_out_constraints[name], setting.data.constraints[name]
            whole = np.array_equal(samples, trained)  # listed images: the set is the law
            rows.append(
                denoising_losses(
                    denoiser, samples, setting.schedule, draws=HELD_OUT_DRAWS, seed=setting.seed, whole=whole
                )
            )
        return loss_measurement(np.stack(rows))

    def calibrate(self) -> Measurement:
        """The metrics of the pretrained model: what `{factor: f}` thresholds multiply."""
        base, setting = self.setting.base, self.setting
        zeros = torch.zeros(len(setting.names), device=setting.device)
        count = {0: CALIBRATION_DRAWS if setting.unit != "share" else setting.measure["num_samples"]}
        draws = self.measure(
            base,
            zeros,
            counter=CALIBRATION_COUNTER,
            shards=[0],
            counts=count,
            num_sampling_steps=setting.measure["num_sampling_steps"],
        )
        if draws is not None:
            return self.measurement(draws.rows, zeros.cpu().numpy())
        return self.held_out_measurement(base, zeros)  # a factor multiplies what it will be judged by

    def objective(
        self, denoiser: torch.nn.Module, multipliers: torch.Tensor, *, evaluation: Mapping[str, Any], base_errors
    ) -> Objective:
        """KL(q||p) above the pretrained model's, on held-out main data.

        Args:
            base_errors: () -> `weighted_errors` of the pretrained model on the same samples, levels and seed.
        """
        errors = weighted_errors(
            denoiser,
            self.setting.data.held_out_main.samples,
            self.setting.schedule,
            levels=evaluation["noise_levels"],
            seed=self.setting.seed,
            batch_size=evaluation["batch_size"],
        )
        gap = errors - base_errors()
        return Objective(
            float(gap.mean()),
            float(gap.std(ddof=1) / np.sqrt(len(gap))),
            "KL(q||p) above the pretrained model's, on held-out main data",
            errors,
        )

    def sample(
        self,
        denoiser: torch.nn.Module,
        multipliers: torch.Tensor,
        start: torch.Tensor,
        *,
        num_sampling_steps: int,
        batch_size: int | None = None,
    ) -> torch.Tensor:
        """Samples of the model, on the CPU; deterministic in `start`, standard normal of shape (n, *sample_shape)."""
        return ddim_sample(
            denoiser, start, self.setting.schedule, num_sampling_steps=num_sampling_steps, batch_size=batch_size
        )

    def save(self, denoiser: Denoiser, multipliers: torch.Tensor, folder: Path) -> None:
        """Write the model a trial leaves, in the diffusers layout."""
        save_model(denoiser, self.setting.schedule, folder, self.setting.codec)

    def dual_value(self, multipliers: np.ndarray) -> tuple[float, float] | None:
        """Minimum over all models of objective + multipliers . canonical metrics, nats, and its standard error.

        The objective is `Objective.absolute` where there is one, else its value. None: not known.
        """
        return None

    # -- ground truth -----------------------------------------------------------------------------------------------

    def exact(self, constraints: Sequence[Constraint], rule: Mapping[str, Any]) -> Oracle | None:
        """The exact answer where the laws are known (Gaussian mixtures, class restrictions)."""
        return None

    @property
    def mixtures(self) -> tuple | None:
        """(law of main, [law of every set]) where they are known, else None."""
        data = self.setting.data
        if data.mixture is None or any(name not in data.constraint_mixtures for name in self.setting.names):
            return None
        return data.mixture, [data.constraint_mixtures[name] for name in self.setting.names]
