"""Signs in a trace that the model cannot do what the multipliers ask: symptoms of a parametrisation gap.

Duality needs a family of models rich enough to hold the optimum. Where it is not, the trace shows it: a violation that
stays, multipliers that run into a limit, grow or swing, a metric that no longer answers to its multiplier, an objective
that is given away for nothing. Each is looked for in the last third of the dual steps (the plateau in the last half)
and reported with its numbers. None of them proves a gap: a dual step too large swings as well, and a run cut short may
look like one that stands still.

Noise: a row's standard error counts as the spread of its violation, however successive rows are correlated, and a
change over a window gets the standard error of a fitted line, widened for the correlation of what it leaves over. On
healthy runs of 20 to 200 rows with three constraints and autoregressive noise of correlation 0 to 0.9, fewer than 2 %
have any symptom (measured: 0.1 % at rest; up to 1.8 % still approaching their optimum at the end, or where rows scatter
twice as far as they report with correlation up to 0.8). Rows that report no error at all are safe to correlation 0.5;
short runs are not beyond it (17 % of runs of 20 rows at 0.9).

Source: methods.md, end of section G.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import Self

import numpy as np
from numpy.typing import NDArray

from dualsweep.constraints.checks import checked_number
from dualsweep.constraints.domains import DualDomain
from dualsweep.constraints.feasibility import student_quantile
from dualsweep.constraints.lagrangian import above_level, min_max_level

PERSISTENT, SATURATED, OSCILLATING = "persistent violation", "saturated multiplier", "oscillating multiplier"
PLATEAU, RETENTION_LOSS = "plateau", "retention loss"
SYMPTOMS = (PERSISTENT, SATURATED, OSCILLATING, PLATEAU, RETENTION_LOSS)

FEWEST_ROWS = 18  # six rows in the last third: below, a line through noise says nothing
BEYOND = 3.0  # standard errors; 0.13 % of normal noise lies that far to one side
THROUGHOUT = 0.9  # fraction of the rows that are violated where a violation persists
FALL = 0.05  # of its mean over a third: a violation that falls less would need six more runs to vanish
AT_GUARD = 0.5  # fraction of the rows a saturated multiplier spends at its limit
GROWTH = 0.2  # rise over a window relative to the mean there; linear growth from 0 shows 0.4 over the last third
SWING = 0.2  # standard deviation of a swinging multiplier relative to its mean
TURNS = 2  # changes of side a swinging violation shows at least: one whole period
DYING = 0.5  # a swing whose later half is smaller than this part of its earlier half dies away
ANSWER = 0.5  # a plateau improves the violation by surely less than this part of it
STEEP = 0.1  # rise of the objective relative to its size
STILL = 0.84  # chance that a violation which no longer improves is seen so; the rest is spent on runs still improving
ROUND_OFF = 1e-9  # relative to the threshold or 1: a violation as small is none


@dataclass(frozen=True)
class Symptom:
    """One sign; ``constraint`` is None where it concerns the objective, ``evidence`` has the numbers."""

    name: str
    constraint: str | None
    evidence: str

    def __str__(self) -> str:
        return f"{self.name}{'' if self.constraint is None else f' of {self.constraint}'}: {self.evidence}"


def find_symptoms(
    rows: Sequence[Mapping], *, names: Sequence[str], domain: DualDomain, tolerance: float
) -> tuple[Symptom, ...]:
    """The signs in a trace, by constraint in the order of ``SYMPTOMS``; empty below ``FEWEST_ROWS`` rows.

    Relaxations are granted, and on the simplex violations count from the level of each row, as in a certificate.

    Args:
        rows: one mapping a dual step, in order: ``dual_step``, ``objective`` and, by constraint in canonical units,
            ``multipliers``, ``violations``, ``violation_stderrs`` (>= 0), ``thresholds``; ``relaxations`` and
            ``objective_stderr`` where known. Other keys are not read.
        names: constraint names in the order of the rows' lists.
        tolerance: canonical units, >= 0: a violation up to it does not persist, and does not swing.
    Raises: ValueError on a row without one of these, with a wrong length or a number that is not finite.
    """
    tolerance = checked_number(tolerance, field="tolerance", at_least=0)
    if not names or len(rows) < FEWEST_ROWS:
        return ()
    steps = _column(rows, "dual_step", 1)[:, 0]
    objective = _Course(
        steps, _column(rows, "objective", 1)[:, 0], _column(rows, "objective_stderr", 1, missing=0.0)[:, 0]
    )
    courses = _courses(rows, steps, len(names), domain)
    found = []
    for name, course in zip(names, courses, strict=True):
        for symptom, sign in _SIGNS.items():
            evidence = sign(course, tolerance)
            if evidence:
                found.append(Symptom(symptom, name, evidence))
    evidence = _retention_loss(objective, courses)
    if evidence:
        found.append(Symptom(RETENTION_LOSS, None, evidence))
    return tuple(found)


@dataclass(frozen=True)
class _Course:
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
        return math.sqrt(float(np.sum(_line(self.values)[1] ** 2)) / (len(self.values) - 2))

    @property
    def change(self) -> tuple[float, float]:
        """Change over all rows along a fitted line, and its standard error.

        From the scatter about the line or the reported noise, whichever gives more. The correlation of lag 1 of what
        is left over widens it as for an autoregressive process; a fitted line takes about (2 + 4 * correlation) /
        count off that correlation. Noise of a known spread moves no line by more than the difference of two rows.
        """
        count, (change, left) = len(self.values), _line(self.values)
        squares = float(left @ left)
        correlation = float(left[1:] @ left[:-1]) / squares if squares > 0 else 0.0
        correlation = min(max(correlation + (2 + 4 * correlation) / count, 0.0), 0.95)
        wide = math.sqrt((1 + correlation) / (1 - correlation) * 12 * (count - 1) / (count * (count + 1)))
        return change, max(wide * self.scatter, min(wide, math.sqrt(2)) * self.noise)

    @property
    def span(self) -> str:
        return f"dual steps {self.steps[0]:.0f} to {self.steps[-1]:.0f}"


@dataclass(frozen=True)
class _ConstraintCourse(_Course):
    """``values`` are violations above the relaxation (and level)."""

    multipliers: NDArray[np.float64]
    at_guard: NDArray[np.bool_]
    metrics: NDArray[np.float64]

    @property
    def rise(self) -> float:
        """Change of the multiplier along a fitted line relative to its mean; 0 where it is zero throughout."""
        mean = float(self.multipliers.mean())
        return _line(self.multipliers)[0] / mean if mean > 0 else 0.0

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


def _persistent_violation(course: _ConstraintCourse, tolerance: float) -> str | None:
    late = course.late(1, 3)
    if not late.stands(tolerance):
        return None
    change, stderr = late.change
    return (
        f"violation {late.values.mean():.4g} on average over {late.span} (standard error of a row {late.noise:.2g}, "
        f"tolerance {tolerance:.4g}); it changed by {change:+.2g} with standard error {stderr:.2g}"
    )


def _saturated_multiplier(course: _ConstraintCourse, tolerance: float) -> str | None:
    late = course.late(1, 3)
    if late.at_guard.mean() >= AT_GUARD:
        return (
            f"multiplier {late.multipliers[-1]:.4g} lies at the limit of its domain in {late.at_guard.sum()} of "
            f"{len(late.steps)} rows over {late.span}"
        )
    if late.rise < GROWTH or not late.stands(0.0):
        return None
    change, stderr = late.change
    return (
        f"multiplier grew from {late.multipliers[0]:.4g} to {late.multipliers[-1]:.4g} over {late.span} while the "
        f"violation, {late.values.mean():.4g} on average, changed by {change:+.2g} with standard error {stderr:.2g}"
    )


def _oscillating_multiplier(course: _ConstraintCourse, tolerance: float) -> str | None:
    late = course.late(1, 3)
    mean, spread = float(late.multipliers.mean()), float(late.multipliers.std())
    size = _root_mean_square(late.values)
    halves = [_root_mean_square(half) for half in np.array_split(late.values, 2)]
    far = np.flatnonzero(np.abs(late.values) > tolerance + 2 * late.stderr)
    turns = far[1:][np.diff(np.sign(late.values[far])) != 0]  # rows where the violation has changed sides
    swinging = spread > SWING * mean and size > tolerance + late.limit(late.noise) and halves[1] > DYING * halves[0]
    if not swinging or len(turns) < TURNS:
        return None
    period = 2 * float(np.diff(late.steps[turns]).mean())
    return (
        f"multiplier {mean:.4g} swings by {spread:.2g} (standard deviation) over {late.span}, the violation changes "
        f"sides {len(turns)} times with root mean square {size:.4g} (standard error of a row {late.noise:.2g}), "
        f"period about {period:.3g} dual steps"
    )


def _plateau(course: _ConstraintCourse, tolerance: float) -> str | None:
    late = course.late(1, 2)
    violation = float(late.values.mean())
    improvement, stderr = -late.change[0], late.change[1]
    flat = improvement <= 2 * stderr and improvement + 2 * stderr < ANSWER * violation
    if late.rise < GROWTH or violation <= late.limit(late.noise / math.sqrt(len(late.steps))) or not flat:
        return None
    return (
        f"multiplier rose from {late.multipliers[0]:.4g} to {late.multipliers[-1]:.4g} over {late.span} while the metric "
        f"stayed at {late.metrics.mean():.4g}, improved by {improvement:.2g} with standard error {stderr:.2g}; "
        f"{violation:.4g} are missing"
    )


def _retention_loss(objective: _Course, constraints: Sequence[_ConstraintCourse]) -> str | None:
    if not objective.noise:  # a third alone shows too little of noise that is correlated over many rows
        objective = replace(objective, stderr=np.full(len(objective.steps), objective.late(2, 3).scatter))
    late = objective.late(1, 3)
    rise, stderr = late.change
    size = float(np.abs(late.values).mean())
    sure = float(student_quantile(NormalDist().cdf(BEYOND), np.array(len(late.steps) - 1)))
    if rise <= sure * stderr or rise < STEEP * size:
        return None
    changes = [course.late(1, 3).change for course in constraints]
    # so that a run at rest is called improving with the same small chance whatever the number of constraints
    sure = NormalDist().inv_cdf(STILL ** (1 / len(changes)))
    if any(-change > sure * error for change, error in changes):
        return None
    moved = ", ".join(f"{change:+.2g} with standard error {error:.2g}" for change, error in changes)
    return (
        f"objective rose by {rise:.4g} to {late.values[-1]:.4g} over {late.span} (standard error {stderr:.2g}) while "
        f"the violations changed by {moved}"
    )


_SIGNS = {
    PERSISTENT: _persistent_violation,
    SATURATED: _saturated_multiplier,
    OSCILLATING: _oscillating_multiplier,
    PLATEAU: _plateau,
}


def _courses(
    rows: Sequence[Mapping], steps: NDArray[np.float64], num_constraints: int, domain: DualDomain
) -> list[_ConstraintCourse]:
    keys = ("multipliers", "violations", "violation_stderrs", "thresholds")
    multipliers, violations, stderrs, thresholds = (_column(rows, key, num_constraints) for key in keys)
    metrics = violations + thresholds
    violations = violations - _column(rows, "relaxations", num_constraints, missing=0.0)
    if min_max_level(multipliers, violations, domain) is not None:
        violations, stderrs = above_level(multipliers, violations, stderrs)
    at_guard = np.array([domain.saturated(row) for row in multipliers])
    return [
        _ConstraintCourse(steps, violations[:, i], stderrs[:, i], multipliers[:, i], at_guard[:, i], metrics[:, i])
        for i in range(num_constraints)
    ]


def _line(values: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
    """Change over all rows along a fitted line, and what the line leaves over."""
    place = np.arange(len(values)) - (len(values) - 1) / 2
    slope = float(place @ values / (place @ place))
    return slope * (len(values) - 1), values - values.mean() - slope * place


def _root_mean_square(values: NDArray[np.float64]) -> float:
    return math.sqrt(float(np.mean(values**2)))


def _column(rows: Sequence[Mapping], key: str, width: int, missing: float | None = None) -> NDArray[np.float64]:
    """One entry of every row, float64 (num_rows, width); ``missing`` stands in where no row has the key.

    Raises: ValueError naming the row and the entry.
    """
    values = [row.get(key) for row in rows]
    if missing is not None:
        values = [[missing] * width if value is None else value for value in values]
    try:
        column = np.array(values, dtype=np.float64).reshape(len(rows), -1)
        if column.shape == (len(rows), width) and np.isfinite(column).all():
            return column
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
