"""Frontiers whose points are solved one from the other: which point comes next, and what it starts from. No Ray here.

What a point starts from depends on the plan and on which points failed, never on which one happened to be ready first, so
that a sweep with several slots, without Ray, or resumed comes out the same. Once handed out it is part of the assignment,
which the journal keeps.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dualsweep.constraints import Constraint, NonNegative
from dualsweep.constraints.continuation import Solved, chains, start_multipliers
from dualsweep.orchestration.config import ConfigError, SweepConfig

Point = dict[str, Any]


@dataclass(frozen=True)
class Outcome:
    """What a neighbour may start from: by constraint name the settled multipliers and the metrics reached (canonical)."""

    label: str
    multipliers: Mapping[str, float]
    metrics: Mapping[str, float]

    def to_json(self) -> str:
        """Text, for Tune flattens what is nested on its way to a search algorithm."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Outcome":
        return cls(**json.loads(text))


def outcome_of(result: Mapping[str, Any] | None) -> Outcome | None:
    """From a trial's result; None where there is nothing to start from.

    That is a trial that failed, diverged or was stopped (no model), and one that was shown not to hold its thresholds.
    """
    if not result or result.get("status") != "completed" or not result.get("constraints"):
        return None
    if (result.get("certificate") or {}).get("verdict") == "infeasible":
        return None
    metrics = {row["name"]: row["metric"] for row in result["constraints"]}
    return Outcome(result["label"], result["averaged_multipliers"], metrics)


class Starts:
    """Works out what a point starts from, given the solved points before it, nearest first."""

    def __init__(self, config: SweepConfig) -> None:
        self._unit, self._sense = config.thresholds.unit, config.sense
        self._shares = config.method == "fairness" and self._unit == "share"

    def place(self, point: Point) -> NDArray[np.float64]:
        """Thresholds on the scale they are spaced on: canonical, or factors of the pretrained value."""
        return np.array([self._coordinate(name, value) for name, value in sorted(point["thresholds"].items())])

    def start(self, point: Point, solved: Sequence[tuple[Point, Outcome]]) -> dict[str, Any] | None:
        """The assignment's `start`; None without a solved point."""
        if not solved:
            return None
        names = sorted(point["thresholds"])
        known = [
            Solved(
                self.place(other),
                np.array([outcome.multipliers[name] for name in names]),
                np.array([outcome.metrics[name] for name in names]),
            )
            for other, outcome in solved
        ]
        # The trial itself moves them into its own domain, whose limits may depend on its thresholds.
        values = start_multipliers(self.place(point), known, NonNegative(), shares=self._shares)
        source, outcome = solved[0]
        multipliers = dict(zip(names, values.tolist(), strict=True))
        return {"trial": source["trial_id"], "label": outcome.label, "multipliers": multipliers}

    def _coordinate(self, name: str, value: float | Mapping[str, float]) -> float:
        constraint = Constraint(name=name, unit=self._unit, threshold=0.5, sense=self._sense)
        if isinstance(value, Mapping):
            return constraint.canonical(value["factor"])
        return constraint.canonical(value)


class PathPlan:
    """Order `path`: listed points in chains of neighbours."""

    def __init__(self, config: SweepConfig, points: Sequence[Point]) -> None:
        """
        Args:
            points: the constrained ones of the sweep, all of them.
        """
        self._starts = Starts(config)
        places = np.array([self._starts.place(point) for point in points])
        count = config.sweep.chains if isinstance(config.sweep.chains, int) else 1
        plan = chains(places, count)
        self._points = {point["trial_id"]: point for point in points}
        ids = list(self._points)
        self._source = {ids[i]: None if source is None else ids[source] for i, source in plan}
        self._waiting = list(self._source)
        self._outcomes: dict[str, Outcome | None] = {}  # of the points that are over

    def over(self, trial_id: str, outcome: Outcome | None) -> None:
        """A point has ended; None: nothing can start from it."""
        if trial_id in self._points:
            self._outcomes[trial_id] = outcome
            if trial_id in self._waiting:  # in an earlier run of this sweep
                self._waiting.remove(trial_id)

    @property
    def done(self) -> bool:
        """Whether every point was handed out."""
        return not self._waiting

    def next(self, recorded: Mapping[str, Any] | None = None) -> Point | None:
        """The next point whose source is over, with its `start`; None: none is ready.

        Args:
            recorded: trial -> the `start` it was given in an earlier run of this sweep; it keeps that one.
        """
        recorded = recorded or {}
        for trial_id in self._waiting:
            source = self._source[trial_id]
            if trial_id not in recorded and source is not None and source not in self._outcomes:
                continue
            self._waiting.remove(trial_id)
            point = self._points[trial_id]
            start = recorded[trial_id] if trial_id in recorded else self._starts.start(point, self._solved(trial_id))
            return {**point, "start": start}
        return None

    def _solved(self, trial_id: str) -> list[tuple[Point, Outcome]]:
        """Those before it in its chain that can be started from, nearest first."""
        found, source = [], self._source[trial_id]
        while source is not None:
            outcome = self._outcomes.get(source)
            if outcome is not None:
                found.append((self._points[source], outcome))
            source = self._source[source]
        return found


def check_path(config: SweepConfig, points: Sequence[Point]) -> None:
    """Raises: ConfigError when these points make no path."""
    if config.thresholds.search is not None:
        raise ConfigError(
            "sweep.order='path': thresholds.search proposes its points one by one; list them (grid, list, random), or "
            "take order adaptive"
        )
    constrained = [point for point in points if point["kind"] == "constrained"]
    if len(constrained) < 2:
        raise ConfigError(
            f"sweep.order='path': {len(constrained)} grid point has no neighbour; give at least two, or take order listed"
        )
    forms = {isinstance(value, Mapping) for point in constrained for value in point["thresholds"].values()}
    if len(forms) > 1:
        raise ConfigError(
            "sweep.order='path': thresholds mix numbers with factors of the pretrained value, so that nobody can say which "
            "are neighbours; give one kind"
        )
