"""Continuation along a frontier: which grid point is solved from which, and with what multipliers it starts.

The dual function's own sensitivity, dP*/d threshold = -multiplier, says what a threshold costs; how the multiplier itself
answers to a threshold is its second derivative, and is taken from points that are solved: from the law of class shares,
where the constraints are shares, else along the line through the two nearest ones (a secant).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dualsweep.constraints.closed_forms import class_restriction_multipliers
from dualsweep.constraints.domains import DualDomain

EXACT = 0.05  # standard deviation of how far the law of shares is off in a trained model, relative to its slope
NOISE = 0.07  # relative: a solved point has ended within a tolerance of such a size, and its share is an estimate
REACH = 2.0  # a secant changes no multiplier by more than this factor: beyond, the line says nothing


@dataclass(frozen=True)
class Solved:
    """A solved grid point; arrays of shape (num_constraints,).

    ``place`` are the thresholds on the scale they are spaced on (canonical units, or factors of the pretrained value);
    ``metrics`` are what the model reached, canonical.
    """

    place: NDArray[np.float64]
    multipliers: NDArray[np.float64]
    metrics: NDArray[np.float64]


def start_multipliers(
    place: ArrayLike, solved: Sequence[Solved], domain: DualDomain, *, shares: bool, cold: float = 0.0
) -> NDArray[np.float64]:
    """Multipliers to start a grid point with, in the domain.

    Args:
        place: of the point, as in ``Solved``.
        solved: at least one, the one whose model it starts from first.
        shares: thresholds are shares to reach (nats), one class each: their law is known (closed_forms.py, H1).
        cold: what multipliers start from without a neighbour. One that is exactly 0 there tells nothing of where a stricter
            threshold wants it: it starts at least at this.
    """
    place, nearest = np.asarray(place, dtype=np.float64), solved[0]
    values = nearest.multipliers
    if shares:
        values = _by_shares(place, solved)
    elif len(solved) > 1:
        values = _by_secant(place, nearest, solved[1])
    if not shares:
        values = np.where((nearest.multipliers == 0) & (place < nearest.place), np.maximum(values, cold), values)
    return domain.project(values)


def _by_shares(place: NDArray[np.float64], solved: Sequence[Solved]) -> NDArray[np.float64]:
    """Where ``share * (1 + sum of multipliers) = mass + slope * multiplier`` meets the shares asked for.

    The law says slope 1 for the class itself; a trained model and a labeller that errs have others. Both are fitted to the
    solved points, weighted by the noise of a share, with the slope held near 1 (ridge regression): one point fixes the
    mass, many correct the slope. A mass comes from where multipliers are small, whatever the scale of the target.
    """
    multipliers = np.stack([point.multipliers for point in solved])
    reached = np.exp(-np.stack([point.metrics for point in solved])) * (1 + multipliers.sum(axis=1, keepdims=True))
    weights = 1 / np.square(NOISE * np.maximum(reached, 1e-6))
    total = weights.sum(axis=0)
    centre, level = (weights * multipliers).sum(axis=0) / total, (weights * reached).sum(axis=0) / total
    spread = (weights * np.square(multipliers - centre)).sum(axis=0)
    together = (weights * (multipliers - centre) * (reached - level)).sum(axis=0)
    slope = (together + 1 / EXACT**2) / (spread + 1 / EXACT**2)
    slope = np.clip(slope, 1 / REACH, REACH)
    mass = np.maximum(level - slope * centre, 0.0) / slope
    shares = np.exp(-place) / slope
    if shares.sum() >= 1 or mass.sum() > 1:  # a fit that promises nothing sensible
        return solved[0].multipliers
    return class_restriction_multipliers(-np.log(shares), mass)


def _by_secant(place: NDArray[np.float64], nearest: Solved, other: Solved) -> NDArray[np.float64]:
    """Along the line through two solved points, where the target's projection on it lies."""
    line = nearest.place - other.place
    length = float(line @ line)
    if length == 0:
        return nearest.multipliers
    ahead = float((place - nearest.place) @ line) / length
    moved = nearest.multipliers + ahead * (nearest.multipliers - other.multipliers)
    return np.clip(moved, nearest.multipliers / REACH, nearest.multipliers * REACH)


def chains(places: ArrayLike, count: int) -> list[tuple[int, int | None]]:
    """A plan in which every point but one starts from a neighbour, in ``count`` chains that can run side by side.

    The points are ordered from the mildest to their nearest neighbours and cut into ``count`` stretches. Two stretches
    grow from their common end in both directions; the first point of all starts cold, the first of another pair from the
    nearest first point before it. The plan depends on nothing but the points, so that a resumed sweep has the same.

    Args:
        places: shape (num_points, num_constraints), as in ``Solved``; larger is milder.
    Returns: (point, point it starts from or None), sources before those that start from them.
    """
    places = np.asarray(places, dtype=np.float64)
    order = _by_neighbours(places)
    stretches = [list(part) for part in np.array_split(order, min(count, len(order)))]
    plan: list[tuple[int, int | None]] = []
    heads: list[int] = []
    for first in range(0, len(stretches), 2):
        pair = stretches[first : first + 2]
        if len(pair) == 2:
            pair[0].reverse()
        scaled = _scaled(places)
        head = pair[0][0]
        source = min(heads, key=lambda other: _distance(scaled, other, head)) if heads else None
        plan.append((int(head), None if source is None else int(source)))
        heads.append(head)
        follow = [list(pairwise(pair[0]))]
        if len(pair) == 2:
            follow.append([(head, pair[1][0]), *pairwise(pair[1])])
        # side by side: one of each in turn
        for step in range(max(map(len, follow))):
            plan += [(int(part[step][1]), int(part[step][0])) for part in follow if step < len(part)]
    return plan


def _by_neighbours(places: NDArray[np.float64]) -> list[int]:
    """From the mildest point always on to the nearest one that is left."""
    scaled = _scaled(places)
    left = list(range(len(places)))
    order = [max(left, key=lambda i: (scaled[i].sum(), -i))]
    left.remove(order[0])
    while left:
        order.append(min(left, key=lambda i: (_distance(scaled, order[-1], i), i)))
        left.remove(order[-1])
    return order


def _scaled(places: NDArray[np.float64]) -> NDArray[np.float64]:
    """Every constraint's places over [0, 1]."""
    spread = np.ptp(places, axis=0)
    return (places - places.min(axis=0)) / np.where(spread > 0, spread, 1.0)


def _distance(scaled: NDArray[np.float64], one: int, other: int) -> float:
    return float(np.square(scaled[one] - scaled[other]).sum())
