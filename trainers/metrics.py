"""Constraint metrics as the dual step sees them, in their canonical units: what is measured, with standard errors."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from dualsweep.trainers.labellers import Labeller
from dualsweep.trainers.noise_schedule import NoiseSchedule
from dualsweep.trainers.samplers import ddim_sample, starting_noise


@dataclass(frozen=True)
class Measurement:
    """Canonical metric of each constraint, its standard error and the number of draws behind it; shape (num_constraints,)."""

    metrics: list[float]
    stderrs: list[float]
    counts: list[int]


def mean_and_stderr(total: float, squares: float, count: float) -> tuple[float, float]:
    """Mean of `count` independent draws and its standard error, from their sum and sum of squares."""
    mean = float(total / count)
    variance = max(float(squares / count) - mean * mean, 0.0) * count / max(count - 1, 1)
    return mean, math.sqrt(variance / count)


def loss_measurement(table: np.ndarray) -> Measurement:
    """From the (num_streams, 3) table of stream sums; the first row is the objective's."""
    pairs = [mean_and_stderr(*row) for row in table[1:]]
    return Measurement([m for m, _ in pairs], [s for _, s in pairs], [int(row[2]) for row in table[1:]])


def share_measurement(table: np.ndarray) -> Measurement:
    """-log(share) in nats from (num_constraints, 3) sums of membership weights.

    Half a sample is added to either side, so that a class nobody drew has a finite metric: with n draws it reads
    log(2n + 2), which is also the largest violation one estimate can report. The standard error is the delta method's.
    """
    metrics, stderrs, counts = [], [], []
    for total, squares, count in table:
        share = (total + 0.5) / (count + 1.0)
        _, spread = mean_and_stderr(total, squares, count)
        none = 0.5 / (count + 1.0)  # no share is known better than one of which nothing was seen
        spread = max(spread, math.sqrt(none * (1 - none) / (count + 1.0)))
        metrics.append(-math.log(share))
        stderrs.append(spread / share)
        counts.append(int(count))
    return Measurement(metrics, stderrs, counts)


class ShareEstimator:
    """Shares of the classes in samples of the current model, drawn by logical shard.

    Measured on the model's own samples, a share needs no reference model: for a class restriction KL(q^i||p) is
    -log share_i plus the misfit inside the class, and only the share answers to the multiplier (methods.md H1).
    """

    def __init__(
        self,
        labeller: Labeller,
        classes: Sequence[int],
        schedule: NoiseSchedule,
        *,
        num_samples: int,
        num_sampling_steps: int,
        seed: int,
        num_shards: int,
    ) -> None:
        self.labeller, self.classes, self.schedule = labeller, list(classes), schedule
        self.num_sampling_steps, self.seed = num_sampling_steps, seed
        self.counts = {k: num_samples // num_shards + (k < num_samples % num_shards) for k in range(num_shards)}

    def table(
        self, denoiser: torch.nn.Module, *, dual_step: int, shards: Sequence[int], shape: tuple[int, ...]
    ) -> np.ndarray:
        """Sums, sums of squares and counts of membership weights over this worker's shards, float64 (num_constraints, 3)."""
        start = starting_noise(seed=self.seed, counter=dual_step, shards=shards, counts=self.counts, shape=shape)
        if not len(start):
            return np.zeros((len(self.classes), 3))
        samples = ddim_sample(denoiser, start, self.schedule, num_sampling_steps=self.num_sampling_steps)
        return membership_table(self.labeller.label(samples.numpy()), self.classes)


def membership_table(weights: np.ndarray, classes: Sequence[int]) -> np.ndarray:
    """(sum, sum of squares, count) of the columns `classes` of (n, num_classes) weights."""
    chosen = weights[:, list(classes)]
    return np.stack(
        [chosen.sum(0), np.square(chosen).sum(0), np.full(len(classes), len(weights), dtype=np.float64)], axis=1
    )
