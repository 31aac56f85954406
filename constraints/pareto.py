"""Pareto front of finished trials: objective minimised, requirement maximised, over feasible points only.

One entry a point throughout: ``objective`` (retention loss, nats) and ``requirement`` (e.g. the smallest share).
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray


def dominated(objective: ArrayLike, requirement: ArrayLike) -> NDArray[np.bool_]:
    """Which points another one beats: no worse in both, better in one. Equal points do not beat each other.

    Returns: bool, shape (num_points,).
    Raises: ValueError on shapes that differ or a non-finite entry.
    """
    objective, requirement = _checked(objective, requirement)
    no_worse = (objective[:, None] <= objective) & (requirement[:, None] >= requirement)
    better = (objective[:, None] < objective) | (requirement[:, None] > requirement)
    return (no_worse & better).any(axis=0)


def pareto_front(objective: ArrayLike, requirement: ArrayLike, feasible: ArrayLike | None = None) -> NDArray[np.int64]:
    """Indices of the feasible points nothing feasible dominates, sorted by requirement (equal points: by index).

    Args:
        feasible: bool, shape (num_points,), default all; the numbers of infeasible points are not looked at.
    Raises: ValueError on shapes that differ or a non-finite number of a feasible point.
    """
    objective, requirement, kept = _feasible_part(objective, requirement, feasible)
    front = kept[~dominated(objective[kept], requirement[kept])]
    return front[np.argsort(requirement[front], kind="stable")]


def hypervolume(
    objective: ArrayLike,
    requirement: ArrayLike,
    *,
    reference: tuple[float, float],
    feasible: ArrayLike | None = None,
) -> float:
    """Area between the front and a reference point ``(objective, requirement)`` that any useful point beats.

    Points that do not beat the reference add nothing. Unit: objective unit times requirement unit.
    """
    worst_objective, floor = map(float, reference)
    if not (np.isfinite(worst_objective) and np.isfinite(floor)):
        raise ValueError(f"reference={reference!r}: give two finite numbers")
    objective, requirement, _ = _feasible_part(objective, requirement, feasible)
    area = 0.0
    for i in pareto_front(objective, requirement, feasible):  # requirement ascending, hence objective ascending
        if objective[i] < worst_objective and requirement[i] > floor:
            area += (worst_objective - objective[i]) * (requirement[i] - floor)
            floor = requirement[i]
    return float(area)


def slopes_and_multipliers(
    objective: ArrayLike, thresholds: ArrayLike, multipliers: ArrayLike
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Slope of the objective between neighbouring points beside minus the multiplier: equal at the optimum.

    ``d objective = -sum_i multiplier_i d threshold_i`` (the shadow price), with the mean multiplier of both neighbours.
    Points are sorted by their mean threshold and both sides divided by its change, so that for thresholds moved
    together the second array is minus the sum of the multipliers.

    Args:
        objective: optimal objectives, shape (num_points,), num_points >= 2.
        thresholds, multipliers: canonical, shape (num_points,) or (num_points, num_constraints).
    Returns: (slope, minus_multiplier), each shape (num_points - 1,).
    Raises: ValueError on shapes that differ, a non-finite entry, or neighbours with the same mean threshold.
    Source: shadow price of a convex problem, e.g. Boyd and Vandenberghe, Convex Optimization, §5.6.
    """
    objective = np.asarray(objective, dtype=np.float64)
    thresholds, multipliers = (np.asarray(a, dtype=np.float64) for a in (thresholds, multipliers))
    if thresholds.shape != multipliers.shape or objective.shape != thresholds.shape[:1] or objective.size < 2:
        shapes = [objective.shape, thresholds.shape, multipliers.shape]
        raise ValueError(f"shapes of objective, thresholds, multipliers are {shapes}; give at least two points alike")
    if not all(np.isfinite(a).all() for a in (objective, thresholds, multipliers)):
        raise ValueError("non-finite objective, threshold or multiplier; leave failed points out")
    thresholds = thresholds.reshape(objective.size, -1)
    order = np.argsort(thresholds.mean(axis=1), kind="stable")
    multipliers = multipliers.reshape(objective.size, -1)[order]
    changes = np.diff(thresholds[order], axis=0)
    along = changes.mean(axis=1)
    if not (along > 0).all():
        raise ValueError(f"thresholds={thresholds.tolist()}: neighbours share a mean threshold; leave one of them out")
    between = (multipliers[1:] + multipliers[:-1]) / 2
    return np.diff(objective[order]) / along, -(between * changes).sum(axis=1) / along


def _feasible_part(objective, requirement, feasible):
    """Arrays with the infeasible numbers hidden behind zeros, and the indices of the feasible points."""
    objective, requirement = (np.asarray(a, dtype=np.float64) for a in (objective, requirement))
    mask = np.ones(objective.shape, dtype=bool) if feasible is None else np.asarray(feasible, dtype=bool)
    if objective.ndim != 1 or not objective.shape == requirement.shape == mask.shape:
        shapes = [objective.shape, requirement.shape, mask.shape]
        raise ValueError(f"shapes of objective, requirement, feasible are {shapes}; give one entry a point")
    return *_checked(np.where(mask, objective, 0.0), np.where(mask, requirement, 0.0)), np.flatnonzero(mask)


def _checked(objective: ArrayLike, requirement: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    objective, requirement = (np.asarray(a, dtype=np.float64) for a in (objective, requirement))
    if objective.ndim != 1 or objective.shape != requirement.shape:
        raise ValueError(f"shapes {objective.shape} and {requirement.shape} differ; give one entry a point")
    bad = np.flatnonzero(~(np.isfinite(objective) & np.isfinite(requirement)))
    if bad.size:
        raise ValueError(f"non-finite objective or requirement at points {bad.tolist()}; mark them infeasible")
    return objective, requirement
