"""Constraint metrics as the dual step sees them: fresh draws, their means and standard errors.

A metric is stated in the natural direction of its unit (-log share in nats, a divergence, a loss, a ratio, a reward);
`canonical` turns it into the one whose threshold is an upper limit.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from dualsweep.constraints import Constraint, NonFiniteError
from dualsweep.trainers.codec import AS_THEY_ARE, Codec
from dualsweep.trainers.labellers import Labeller
from dualsweep.trainers.samplers import starting_noise


@dataclass(frozen=True)
class Measurement:
    """Metric of each constraint, its standard error and the number of draws behind it; shape (num_constraints,).

    `objective` is (value, standard error) where the same draws tell it; otherwise the primal steps do.
    """

    metrics: list[float]
    stderrs: list[float]
    counts: list[int]
    objective: tuple[float, float] | None = None

    def canonical(self, constraints: Sequence[Constraint]) -> "Measurement":
        """The same with the sign of every constraint whose metric is wanted large turned."""
        signs = [canonical_sign(constraint) for constraint in constraints]
        return replace(self, metrics=[s * m for s, m in zip(signs, self.metrics, strict=True)])


@dataclass(frozen=True)
class Draws:
    """What one measurement drew: rows (n, k) float64 for the method's own `measurement`, and the samples if there are any."""

    rows: np.ndarray
    samples: torch.Tensor | None = None


def canonical_sign(constraint: Constraint) -> float:
    """+1 where the natural metric is to stay below its threshold, -1 where above; a share's natural metric is -log share."""
    return 1.0 if (constraint.sense == ">=") == (constraint.unit == "share") else -1.0


def mean_and_stderr(total: float, squares: float, count: float) -> tuple[float, float]:
    """Mean of `count` independent draws and its standard error, from their sum and sum of squares."""
    mean = float(total / count)
    variance = max(float(squares / count) - mean * mean, 0.0) * count / max(count - 1, 1)
    return mean, math.sqrt(variance / count)


def loss_measurement(table: np.ndarray) -> Measurement:
    """From the (1 + num_constraints, 3) table of sums over the primal steps; the first row is the objective's."""
    pairs = [mean_and_stderr(*row) for row in table[1:]]
    return Measurement([m for m, _ in pairs], [s for _, s in pairs], [int(row[2]) for row in table[1:]])


def mean_measurement(rows: np.ndarray) -> Measurement:
    """Column means of (n, num_constraints) rows with their standard errors."""
    stderrs = rows.std(axis=0, ddof=1) / math.sqrt(len(rows))
    return Measurement(rows.mean(axis=0).tolist(), stderrs.tolist(), [len(rows)] * rows.shape[1])


def clustered_measurement(rows: np.ndarray, columns: int) -> Measurement:
    """`mean_measurement` of the first columns, where each may have another beside it that says which sample a row is of.

    Args:
        rows: (n, columns), all independent, or (n, 2 columns): values, then the sample behind each value.
    """
    if rows.shape[1] == columns:
        return mean_measurement(rows)
    values, samples = rows[:, :columns], rows[:, columns:]
    found = [clustered_stderrs(values[:, [k]], samples[:, k]) for k in range(columns)]
    return Measurement(values.mean(axis=0).tolist(), [float(s[0]) for s, _ in found], [count for _, count in found])


def clustered_stderrs(values: np.ndarray, clusters: np.ndarray) -> tuple[np.ndarray, int]:
    """Standard errors of the column means where samples of one cluster (ancestor) are not independent, and its number.

    Source: Chan and Lai, 2013, estimator of the variance of a particle system by ancestors.
    """
    _, cluster = np.unique(clusters, return_inverse=True)
    count = int(cluster.max()) + 1
    sums = np.stack([np.bincount(cluster, weights=column) for column in (values - values.mean(axis=0)).T], axis=1)
    return np.sqrt(np.square(sums).sum(axis=0) * count / max(count - 1, 1)) / len(values), count


def rounds(generator: np.random.Generator, size: int, count: int) -> np.ndarray:
    """`count` indices below `size`: one random order of them all, over and over. Each counts once before any counts twice."""
    return np.resize(generator.permutation(size), count)


def share_measurement(rows: np.ndarray) -> Measurement:
    """-log(share) in nats from (n, num_constraints) membership weights.

    Half a sample is added to either side, so that a class nobody drew has a finite metric: with n draws it reads
    log(2n + 2), which is also the largest violation one estimate can report. The standard error is the delta method's.
    """
    metrics, stderrs, counts = [], [], []
    for weights in rows.T:
        count = len(weights)
        share = (weights.sum() + 0.5) / (count + 1.0)
        _, spread = mean_and_stderr(weights.sum(), np.square(weights).sum(), count)
        none = 0.5 / (count + 1.0)  # no share is known better than one of which nothing was seen
        spread = max(spread, math.sqrt(none * (1 - none) / (count + 1.0)))
        metrics.append(float(-math.log(share)))
        stderrs.append(float(spread / share))
        counts.append(count)
    return Measurement(metrics, stderrs, counts)


def shard_counts(total: int, num_shards: int) -> dict[int, int]:
    """`total` draws over the logical shards, as evenly as they go."""
    return {k: total // num_shards + (k < total % num_shards) for k in range(num_shards)}


def share_draws(
    sample: Callable[..., torch.Tensor],
    denoiser: torch.nn.Module,
    multipliers: torch.Tensor,
    labeller: Labeller,
    classes: Sequence[int],
    *,
    seed: int,
    counter: int,
    shards: Sequence[int],
    counts: Mapping[int, int],
    shape: tuple[int, ...],
    num_sampling_steps: int,
    codec: Codec = AS_THEY_ARE,
) -> Draws:
    """Membership weights of the model's own samples, drawn by logical shard, float64 (n, num_constraints).

    Measured on the model's own samples, a share needs no reference model: for a class restriction KL(q^i||p) is
    -log share_i plus the misfit inside the class, and only the share answers to the multiplier (methods.md H1).
    """
    start = starting_noise(seed=seed, counter=counter, shards=shards, counts=counts, shape=shape)
    if not len(start):
        return Draws(np.zeros((0, len(classes))))
    samples = sample(denoiser, multipliers, start, num_sampling_steps=num_sampling_steps)
    if not bool(torch.isfinite(samples).all()):  # a classifier's own refusal would look like a fault of the program
        bad = (~torch.isfinite(samples).flatten(1).all(1)).nonzero().flatten().tolist()
        raise NonFiniteError(
            f"{len(bad)} of {len(samples)} samples of the model are not finite, the first is draw {bad[0]}"
        )
    return Draws(labeller.label(codec.decode(samples).numpy())[:, list(classes)].astype(np.float64), samples)
