"""Rows of a trace as noisy quantities over the dual steps: trends and their standard errors, violations that stand.

What symptoms (a look back at a whole run) and stopping (a look at every dual step) judge by. Noise: a row's standard error
counts as the spread of its violation, however successive rows are correlated, and a change over a window gets the standard
error of a fitted line, widened for the correlation of what it leaves over.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from dualsweep.constraints.domains import DualDomain
from dualsweep.constraints.lagrangian import above_level, min_max_level

BEYOND = 3.0  # standard errors; 0.13 % of normal noise lies that far to one side
THROUGHOUT = 0.9  # fraction of the rows that are violated where a violation persists
FALL = 0.05  # of its mean over a third: a violation that falls less would need six more runs to vanish
ROUND_OFF = 1e-9  # relative to the threshold or 1: a violation as small is none


@dataclass(frozen=True)
class Course:
    """A noisy quantity over the dual steps, shape (num_rows,) each; ``stderr`` is what the rows report."""

    steps: NDArray[np.float64]
    values: NDArray[np.float64]
    stderr: NDArray[np.float64]

    def late(self, parts: int, of: int) -> Self:
        """The last ``parts / of`` of the rows."""
        rows = slice(-(len(self.steps) * parts // of), None)
        return type(self)(**{key: value[rows] for key, value in vars(self).items()})

    @property
    def noise(self) -> float:
        """Spread of one row's noise: the mean reported standard error."""
        return float(self.stderr.mean())

    @property
    def scatter(self) -> float:
        """Standard deviation about the fitted line."""
        return math.sqrt(float(np.sum(line(self.values)[1] ** 2)) / (len(self.values) - 2))

    @property
    def change(self) -> tuple[float, float]:
        """Change over all rows along a fitted line, and its standard error.

        From the scatter about the line or the reported noise, whichever gives more. The correlation of lag 1 of what
        is left over widens it as for an autoregressive process; a fitted line takes about (2 + 4 * correlation) /
        count off that correlation. Noise of a known spread moves no line by more than the difference of two rows.
        """
        count, (change, left) = len(self.values), line(self.values)
        squares = float(left @ left)
        correlation = float(left[1:] @ left[:-1]) / squares if squares > 0 else 0.0
        correlation = min(max(correlation + (2 + 4 * correlation) / count, 0.0), 0.95)
        wide = math.sqrt((1 + correlation) / (1 - correlation) * 12 * (count - 1) / (count * (count + 1)))
        return change, max(wide * self.scatter, min(wide, math.sqrt(2)) * self.noise)

    @property
    def span(self) -> str:
        return f"dual steps {self.steps[0]:.0f} to {self.steps[-1]:.0f}"


@dataclass(frozen=True)
class ConstraintCourse(Course):
    """``values`` are violations above the relaxation (and level)."""

    multipliers: NDArray[np.float64]
    at_guard: NDArray[np.bool_]
    metrics: NDArray[np.float64]

    @property
    def rise(self) -> float:
        """Change of the multiplier along a fitted line relative to its mean; 0 where it is zero throughout."""
        mean = float(self.multipliers.mean())
        return line(self.multipliers)[0] / mean if mean > 0 else 0.0

    def stands(self, tolerance: float) -> bool:
        """Violated beyond noise and ``tolerance`` throughout, and not on its way down."""
        mean = float(self.values.mean())
        fall, stderr = -self.change[0], self.change[1]
        falling = fall > 2 * stderr and fall >= FALL * mean
        violated = float((self.values > tolerance + self.stderr).mean())
        limit = self.limit(max(self.noise, self.scatter))  # rows may wander further than they report
        return mean > tolerance + limit and violated >= THROUGHOUT and not falling

    def limit(self, noise: float) -> float:
        """What noise (of any correlation) and round-off make of a violation of 0 at most."""
        return BEYOND * noise + ROUND_OFF * max(1.0, float(np.abs(self.metrics).mean()))


def courses_of(
    rows: Sequence[Mapping], steps: NDArray[np.float64], num_constraints: int, domain: DualDomain
) -> list[ConstraintCourse]:
    """One course a constraint; a row has multipliers, violations, violation_stderrs, thresholds and maybe relaxations."""
    keys = ("multipliers", "violations", "violation_stderrs", "thresholds")
    multipliers, violations, stderrs, thresholds = (column(rows, key, num_constraints) for key in keys)
    metrics = violations + thresholds
    violations = violations - column(rows, "relaxations", num_constraints, missing=0.0)
    if min_max_level(multipliers, violations, domain) is not None:
        violations, stderrs = above_level(multipliers, violations, stderrs)
    at_guard = np.array([domain.saturated(row) for row in multipliers])
    return [
        ConstraintCourse(steps, violations[:, i], stderrs[:, i], multipliers[:, i], at_guard[:, i], metrics[:, i])
        for i in range(num_constraints)
    ]


def line(values: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
    """Change over all rows along a fitted line, and what the line leaves over."""
    place = np.arange(len(values)) - (len(values) - 1) / 2
    slope = float(place @ values / (place @ place))
    return slope * (len(values) - 1), values - values.mean() - slope * place


def column(rows: Sequence[Mapping], key: str, width: int, missing: float | None = None) -> NDArray[np.float64]:
    """One entry of every row, float64 (num_rows, width); ``missing`` stands in where no row has the key.

    Raises: ValueError naming the row and the entry.
    """
    values = [row.get(key) for row in rows]
    if missing is not None:
        values = [[missing] * width if value is None else value for value in values]
    try:
        found = np.array(values, dtype=np.float64).reshape(len(rows), -1)
        if found.shape == (len(rows), width) and np.isfinite(found).all():
            return found
    except (TypeError, ValueError):  # rows of different lengths, or no numbers: named below
        pass
    for i, value in enumerate(values):
        if not _are_numbers(value, width):
            raise ValueError(f"trace row {i}: {key}={value!r}: give {width} finite numbers")
    raise ValueError(f"trace: {key} mixes numbers and lists; write every row alike")


def _are_numbers(value: object, width: int) -> bool:
    try:
        entry = np.atleast_1d(np.asarray(value, dtype=np.float64))
    except (TypeError, ValueError):
        return False
    return entry.shape == (width,) and bool(np.isfinite(entry).all())
