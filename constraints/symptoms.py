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

import numpy as np
from numpy.typing import NDArray

from dualsweep.constraints.checks import checked_number
from dualsweep.constraints.courses import BEYOND, ConstraintCourse, Course, column, courses_of
from dualsweep.constraints.domains import DualDomain
from dualsweep.constraints.feasibility import student_quantile

PERSISTENT, SATURATED, OSCILLATING = "persistent violation", "saturated multiplier", "oscillating multiplier"
PLATEAU, RETENTION_LOSS = "plateau", "retention loss"
SYMPTOMS = (PERSISTENT, SATURATED, OSCILLATING, PLATEAU, RETENTION_LOSS)

FEWEST_ROWS = 18  # six rows in the last third: below, a line through noise says nothing
AT_GUARD = 0.5  # fraction of the rows a saturated multiplier spends at its limit
GROWTH = 0.2  # rise over a window relative to the mean there; linear growth from 0 shows 0.4 over the last third
SWING = 0.2  # standard deviation of a swinging multiplier relative to its mean
TURNS = 2  # changes of side a swinging violation shows at least: one whole period
DYING = 0.5  # a swing whose later half is smaller than this part of its earlier half dies away
ANSWER = 0.5  # a plateau improves the violation by surely less than this part of it
STEEP = 0.1  # rise of the objective relative to its size
STILL = 0.84  # chance that a violation which no longer improves is seen so; the rest is spent on runs still improving


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
    steps = column(rows, "dual_step", 1)[:, 0]
    objective = Course(
        steps, column(rows, "objective", 1)[:, 0], column(rows, "objective_stderr", 1, missing=0.0)[:, 0]
    )
    courses = courses_of(rows, steps, len(names), domain)
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


def _persistent_violation(course: ConstraintCourse, tolerance: float) -> str | None:
    late = course.late(1, 3)
    if not late.stands(tolerance):
        return None
    change, stderr = late.change
    return (
        f"violation {late.values.mean():.4g} on average over {late.span} (standard error of a row {late.noise:.2g}, "
        f"tolerance {tolerance:.4g}); it changed by {change:+.2g} with standard error {stderr:.2g}"
    )


def _saturated_multiplier(course: ConstraintCourse, tolerance: float) -> str | None:
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


def _oscillating_multiplier(course: ConstraintCourse, tolerance: float) -> str | None:
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


def _plateau(course: ConstraintCourse, tolerance: float) -> str | None:
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


def _retention_loss(objective: Course, constraints: Sequence[ConstraintCourse]) -> str | None:
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


def _root_mean_square(values: NDArray[np.float64]) -> float:
    return math.sqrt(float(np.mean(values**2)))
