"""Integrals over the line and the plane by the trapezoidal rule, on a box that fits the density.

For a smooth density that vanishes at the box the rule converges faster than any power of the spacing: at one point a
standard deviation a Gaussian's integrals are known to 1e-8, at two to round-off.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from dualsweep.datasets.gaussians import GaussianMixture

REACH = 7.0  # standard deviations from the outermost means to the box: a mass of 3e-12 lies beyond
LEAST_COUNTS = {1: 4001, 2: 301}  # points an axis, by dimension
MOST_POINTS = 2_000_000
BOUNDARY_DROP = 24.0  # nats from the peak to the box; 7 standard deviations are 24.5
MOST_WIDENINGS = 8


@dataclass(frozen=True, eq=False)
class Grid:
    """Equally spaced points of a box in one or two dimensions, an odd number an axis, each with volume ``cell``."""

    low: NDArray[np.float64]  # shape (dim,)
    high: NDArray[np.float64]  # shape (dim,)
    counts: tuple[int, ...]  # points an axis
    widenings: int = 0  # how often the box was widened

    @classmethod
    def covering(cls, laws: Sequence[GaussianMixture]) -> "Grid":
        """A box that holds all laws, with at least two points for the smallest standard deviation.

        Raises: ValueError if the laws differ in dimension, have more than two, or need too many points.
        """
        dims = sorted({law.dim for law in laws})
        if len(dims) != 1 or dims[0] > 2:
            raise ValueError(f"laws have dimensions {dims}: give laws of one dimension, 1 or 2")
        means, stds = np.concatenate([law.means for law in laws]), np.concatenate([law.stds for law in laws])
        low, high = (means - REACH * stds).min(axis=0), (means + REACH * stds).max(axis=0)
        needed = np.ceil((high - low) / stds.min(axis=0)).astype(int)
        counts = tuple(max(2 * int(count) + 1, LEAST_COUNTS[dims[0]]) for count in needed)
        if np.prod(counts, dtype=float) > MOST_POINTS:
            raise ValueError(
                f"stds go down to {stds.min():.3g} in a box of {(high - low).tolist()}: a grid of {counts} points is too "
                f"large; give wider or closer laws"
            )
        return cls(low, high, counts)

    @property
    def cell(self) -> float:
        """Volume of a cell. The outermost ones are halved in the rule, but nothing lies there."""
        return float(np.prod((self.high - self.low) / (np.array(self.counts) - 1)))

    @cached_property
    def points(self) -> NDArray[np.float64]:
        """Shape (n, dim); the last axis runs fastest."""
        axes = [np.linspace(*ends) for ends in zip(self.low, self.high, self.counts, strict=True)]
        return np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, len(axes))

    def coarse(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Of values on the points, shape (..., n), those at every second point of each axis: the rule at twice the spacing."""
        every_second = (..., *(slice(None, None, 2) for _ in self.counts))
        return values.reshape(*values.shape[:-1], *self.counts)[every_second].reshape(*values.shape[:-1], -1)

    def widened(self, log_density: NDArray[np.float64]) -> "Grid | None":
        """The box moved out by its own width wherever the density has not died down, at the same number of points; else None.

        At a side the log density must lie ``BOUNDARY_DROP`` below its peak, and fall outwards at every point: where it
        rises, more of the mass may lie beyond than inside.

        Raises: ValueError after ``MOST_WIDENINGS``: the density does not vanish at infinity, or lies very far out.
        """
        table = log_density.reshape(self.counts)
        outwards = np.zeros((2, len(self.counts)))
        for axis in range(len(self.counts)):
            for end, (side, inner) in enumerate(((0, 1), (-1, -2))):
                face = table.take(side, axis)
                alive = face.max() > table.max() - BOUNDARY_DROP or (face > table.take(inner, axis)).any()
                outwards[end, axis] = alive
        if not outwards.any():
            return None
        if self.widenings == MOST_WIDENINGS:
            raise ValueError(
                f"the density does not vanish at the sides of the box {self.low.tolist()}, {self.high.tolist()}"
            )
        low, high = (self.low, self.high) + np.array([[-1], [1]]) * outwards * (self.high - self.low)
        return replace(self, low=low, high=high, widenings=self.widenings + 1)

    def refined(self) -> "Grid":
        """The same box at half the spacing.

        Raises: ValueError if that takes more than ``MOST_POINTS``.
        """
        counts = tuple(2 * count - 1 for count in self.counts)
        if np.prod(counts, dtype=float) > MOST_POINTS:
            raise ValueError(f"the density is too rough or too narrow for a grid of {self.counts} points")
        return replace(self, counts=counts)
