"""Frontiers whose points are solved one from the other: which point comes next, and what it starts from. No Ray here.

What a point of a path starts from depends on the plan and on which points failed, never on which one happened to be ready
first, so that a sweep with several slots, without Ray, or resumed comes out the same. Adaptive points are placed by what is
solved when a slot is free: with several slots, which ones there are depends on timing too. Once handed out, a point and its
start are part of the assignment, which the journal keeps, so that a resume has them again.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from dualsweep.constraints import Constraint, NonNegative
from dualsweep.constraints.continuation import Solved, chains, start_multipliers
from dualsweep.orchestration.config import ConfigError, SweepConfig, point_for_search

Point = dict[str, Any]
POINT = ("trial_id", "label", "kind", "thresholds", "fixed_weight")


@dataclass(frozen=True)
class Outcome:
    """What a neighbour may start from: by constraint name the settled multipliers and the metrics reached (canonical).

    Reached in training: an evaluation has another labeller, and what the two differ by is no error of the multipliers.
    """

    label: str
    multipliers: Mapping[str, float]
    metrics: Mapping[str, float]
    thresholds: Mapping[str, float]  # canonical, factors resolved
    relaxations: Mapping[str, float] = field(default_factory=dict)  # canonical; of a resilient rule
    out_of_reach: bool = False  # shown so in training: nothing to start from, and no use in asking for more
    steps: int = 0  # primal steps from the pretrained model on, those of the neighbours it went on from included

    @classmethod
    def beyond(cls, label: str) -> "Outcome":
        """Of a point whose thresholds are out of reach."""
        return cls(label, {}, {}, {}, out_of_reach=True)

    def to_json(self) -> str:
        """Text, for Tune flattens what is nested on its way to a search algorithm."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Outcome":
        return cls(**json.loads(text))


def outcome_of(result: Mapping[str, Any] | None) -> Outcome | None:
    """From a trial's result; None where there is nothing to start from.

    That is a trial that failed, diverged or was stopped by a scheduler (no model), and one that was shown not to hold its
    thresholds, relaxed as its rule has relaxed them.
    """
    if result and result.get("stopped_by") == "infeasible":
        return Outcome.beyond(result["label"])
    if not result or result.get("status") != "completed" or not result.get("constraints") or _broken(result):
        return None
    metrics, thresholds = ({row["name"]: row[key] for row in result["constraints"]} for key in ("metric", "threshold"))
    return Outcome(
        result["label"],
        result["averaged_multipliers"],
        {**metrics, **result.get("averaged_metrics", {})},
        thresholds,
        dict(result.get("relaxations") or {}),
        steps=result["primal_steps"] + (result.get("start") or {}).get("steps_before", 0),
    )


def _broken(result: Mapping[str, Any]) -> bool:
    """Whether a constraint was shown not to hold; a certificate itself does not count relaxations."""
    certificate, relaxations = result.get("certificate") or {}, result.get("relaxations") or {}
    if certificate.get("verdict") != "infeasible" or not any(relaxations.values()):
        return certificate.get("verdict") == "infeasible"
    lows = {name: low for name, (low, _) in certificate["intervals"].items()}
    return any(low > certificate["tolerance"] + relaxations[name] for name, low in lows.items())


class Starts:
    """Works out what a point starts from, given the solved points before it, nearest first."""

    def __init__(self, config: SweepConfig) -> None:
        self._unit, self._sense = config.thresholds.unit, config.sense
        self._shares = config.method == "fairness" and self._unit == "share"
        self._cold = config.dual.start

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
                self.place(other) + self._relaxed(other, outcome),
                np.array([outcome.multipliers[name] for name in names]),
                np.array([outcome.metrics[name] for name in names]),
            )
            for other, outcome in solved
        ]
        # The trial itself moves them into its own domain, whose limits may depend on its thresholds.
        source, outcome = solved[0]
        # A resilient rule relaxes this point too, about as far as its neighbour: that is where its multipliers settle.
        place = self.place(point) + self._relaxed(source, outcome)
        values = start_multipliers(place, known, NonNegative(), shares=self._shares, cold=self._cold)
        multipliers = dict(zip(names, values.tolist(), strict=True))
        return {
            "trial": source["trial_id"],
            "label": outcome.label,
            "multipliers": multipliers,
            "steps_before": outcome.steps,
        }

    def _relaxed(self, point: Point, outcome: Outcome) -> NDArray[np.float64]:
        """How far a solved point's thresholds were relaxed, on the scale of `place`."""
        names = sorted(point["thresholds"])
        moved = np.array([outcome.relaxations.get(name, 0.0) for name in names])
        factors = np.array([isinstance(point["thresholds"][name], Mapping) for name in names])
        thresholds = np.array([outcome.thresholds[name] for name in names])
        return moved * np.divide(self.place(point), thresholds, out=np.ones(len(names)), where=factors & (moved != 0))

    def _coordinate(self, name: str, value: float | Mapping[str, float]) -> float:
        constraint = Constraint(name=name, unit=self._unit, threshold=0.5, sense=self._sense)
        if isinstance(value, Mapping):
            return constraint.canonical(value["factor"])
        return constraint.canonical(value)


class FrontierPlan(Protocol):
    """Which point is next, and what it starts from."""

    def over(self, trial_id: str, outcome: Outcome | None) -> None:
        """A point has ended; None: nothing can start from it, nor from one out of reach. Other kinds are ignored."""

    @property
    def done(self) -> bool:
        """Whether every point was handed out."""

    def next(self) -> Point | None:
        """The next point, with its `start`; None: all that are left wait for one that is running."""


class PathPlan:
    """Order `path`: listed points in chains of neighbours."""

    def __init__(self, config: SweepConfig, points: Sequence[Point], recorded: Mapping[str, Any] | None = None) -> None:
        """
        Args:
            points: the constrained ones of the sweep, all of them.
            recorded: trial -> the `start` it was given in an earlier run of this sweep; it keeps that one.
        """
        self._recorded = dict(recorded or {})
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
        """See `FrontierPlan`."""
        if trial_id in self._points:
            self._outcomes[trial_id] = None if outcome is None or outcome.out_of_reach else outcome
            if trial_id in self._waiting:  # in an earlier run of this sweep
                self._waiting.remove(trial_id)

    @property
    def done(self) -> bool:
        """See `FrontierPlan`."""
        return not self._waiting

    def next(self) -> Point | None:
        """The next point whose source is over."""
        recorded = self._recorded
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


class AdaptivePlan:
    """Order `adaptive`: points on one threshold axis, spread evenly along the front as far as it is known.

    The slope of the front, dP*/d threshold = -multiplier, is known at every solved point and taken to be linear between
    them; its integral is the front. Lengths along it, with both axes scaled to 1, say where the front is least known (the
    longest stretch between neighbours) and where the points that are left would divide it evenly. The two ends come first.
    Where a point is out of reach the front ends before it: no stricter one is asked for, and the stretch up to it is divided
    like any other, so that the end is bisected as long as it is worth a point.
    """

    def __init__(
        self, config: SweepConfig, names: tuple[str, ...], earlier: Mapping[str, Mapping[str, Any]] | None = None
    ) -> None:
        """
        Args:
            names: the constraints.
            earlier: assignments of earlier runs of this sweep; points that are not over are handed out again as they were.
        """
        self._config, self._names, self._starts = config, names, Starts(config)
        self._axis = adaptive_axis(config)
        self._points: dict[str, Point] = {}
        self._outcomes: dict[str, Outcome | None] = {}
        self._beyond: list[float] = []  # positions out of reach
        self._again: list[Point] = []
        for assignment in (earlier or {}).values():
            if assignment["kind"] == "constrained":
                point = {key: assignment.get(key) for key in (*POINT, "start")}
                self._points[point["trial_id"]] = point
                self._again.append(point)

    def over(self, trial_id: str, outcome: Outcome | None) -> None:
        """See `FrontierPlan`."""
        if trial_id in self._points:
            if outcome is not None and outcome.out_of_reach:
                self._beyond.append(self._position(trial_id))
                outcome = None
            self._outcomes[trial_id] = outcome
            self._again = [point for point in self._again if point["trial_id"] != trial_id]

    @property
    def left(self) -> int:
        """How many points are still to be handed out: none where the mildest is out of reach."""
        new = max(0, self._config.sweep.points - len(self._points))
        return len(self._again) + (new if self._end > 0 else 0)

    @property
    def _end(self) -> float:
        """Where the front ends, in [0, 1]: at the mildest point out of reach, unless a stricter one was solved after all."""
        solved = max((self._position(trial) for trial, outcome in self._outcomes.items() if outcome), default=-1.0)
        return min((position for position in self._beyond if position > solved), default=1.0)

    @property
    def done(self) -> bool:
        """See `FrontierPlan`."""
        return self.left == 0

    def next(self) -> Point | None:
        """The point that is known least of; None while what it would be placed by is running."""
        if self._again:
            return self._again.pop(0)
        if self.done:
            return None
        position = self._next_position()
        if position is None:
            return None
        values = {self._axis.name: self._axis.value(position)}
        point = point_for_search(self._config, self._names, values)
        solved = [(other, self._outcomes[trial]) for trial, other in self._points.items() if self._outcomes.get(trial)]
        place = self._starts.place(point)
        solved.sort(key=lambda pair: float(np.square(self._starts.place(pair[0]) - place).sum()))
        given = {**point, "start": self._starts.start(point, solved)}
        self._points[point["trial_id"]] = given
        return given

    def _next_position(self) -> float | None:
        """In [0, 1] along the axis, 0 the mildest."""
        if not self._points:
            return 0.0
        slopes = {self._position(trial): self._slope(trial) for trial, outcome in self._outcomes.items() if outcome}
        end = self._end
        taken = sorted(position for trial in self._points if (position := self._position(trial)) <= end)
        count = len(taken) + self._config.sweep.points - len(self._points)
        if not slopes:
            waiting = set(self._points) - set(self._outcomes)
            # What the mildest point shows comes first; if nothing can be learned from it, the ends and the middle do.
            return None if waiting else place_next(taken, {0.0: 0.0}, count, end=end)
        return place_next(taken, slopes, count, end=end)

    def _position(self, trial_id: str) -> float:
        return self._axis.position(self._points[trial_id]["thresholds"][self._names[0]])

    def _slope(self, trial_id: str) -> float:
        """dP*/d position: -sum of multiplier * d threshold (canonical) / d position."""
        outcome, position = self._outcomes[trial_id], self._position(trial_id)
        names = sorted(outcome.multipliers)
        multipliers = np.array([outcome.multipliers[name] for name in names])
        thresholds = np.array([outcome.thresholds[name] for name in names])
        place = self._place(position)
        # Thresholds that are factors change by the pretrained value for each factor: threshold / factor.
        unit = thresholds / place if self._axis.factors else np.ones(len(names))
        step = 1e-4
        low, high = max(0.0, position - step), min(1.0, position + step)
        change = (self._place(high) - self._place(low)) / (high - low)
        return -float((multipliers * unit * change).sum())

    def _place(self, position: float) -> NDArray[np.float64]:
        value = self._axis.value(position)
        return self._starts.place({"thresholds": dict.fromkeys(self._names, value)})


@dataclass(frozen=True)
class Axis:
    """The range of one threshold axis, mildest end first; `factors`: of the pretrained value."""

    name: str
    mild: float
    strict: float
    logarithmic: bool
    factors: bool

    def value(self, position: float) -> float | dict[str, float]:
        """The threshold at a position in [0, 1], to 12 digits, so that ids do not hang on the last bit."""
        if self.logarithmic:
            number = self.mild * (self.strict / self.mild) ** position
        else:
            number = self.mild + (self.strict - self.mild) * position
        number = float(f"{number:.12g}")
        return {"factor": number} if self.factors else number

    def position(self, value: float | Mapping[str, float]) -> float:
        """The inverse of `value`."""
        number = value["factor"] if isinstance(value, Mapping) else value
        if self.logarithmic:
            return float(np.log(number / self.mild) / np.log(self.strict / self.mild))
        return (number - self.mild) / (self.strict - self.mild)


def adaptive_axis(config: SweepConfig) -> Axis:
    """The one axis that `thresholds.search` gives. Raises: ConfigError naming the field."""
    search = config.thresholds.search
    if search is None:
        raise ConfigError(
            "sweep.order='adaptive' places the thresholds itself: give their range as thresholds.search, such as "
            f"{{axes: {{{config.axis}: {{uniform: [lo, hi]}}}}}}, in place of {next(iter(config.thresholds.form))}"
        )
    for key in search:
        if key != "axes":
            raise ConfigError(
                f"thresholds.search.{key}: order adaptive has no use for it (sweep.points counts); remove it"
            )
    axes = search.get("axes") or {}
    if len(axes) != 1:
        raise ConfigError(
            f"thresholds.search.axes={sorted(axes)}: order adaptive goes along one axis: one set, or {config.axis!r} for all "
            "of them; give one, or take thresholds.search without it"
        )
    ((name, spec),) = axes.items()
    factors = set(spec) == {"factor"}
    kinds = spec["factor"] if factors else spec
    kind = next(iter(kinds))
    if kind not in ("uniform", "loguniform"):
        raise ConfigError(f"thresholds.search.axes.{name}.{kind}: order adaptive takes uniform or loguniform")
    low, high = kinds[kind]
    constraint = Constraint(name=name, unit=config.thresholds.unit, threshold=0.5, sense=config.sense)
    mild, strict = sorted((low, high), key=constraint.canonical, reverse=True)  # canonical: larger is milder
    return Axis(name, mild, strict, kind == "loguniform", factors)


def place_next(
    taken: Sequence[float], slopes: Mapping[float, float], count: int, *, end: float = 1.0, cells: int = 2000
) -> float:
    """Where on [0, end] the next of `count` points goes, so that all of them divide the front's length evenly.

    Args:
        taken: positions of the points there are, running ones too, ascending.
        slopes: position -> slope of the front, at least one.
    """
    grid = np.linspace(0, end, cells + 1)
    known = sorted(slopes)
    slope = np.abs(np.interp(grid, known, [slopes[position] for position in known]))
    slope = (slope[1:] + slope[:-1]) / 2
    height = slope.mean()
    length = np.concatenate([[0.0], np.cumsum(np.hypot(1.0, slope / height if height > 0 else 0.0 * slope))])
    if not any(np.isclose(position, end) for position in taken):
        return end
    if not any(np.isclose(position, 0.0) for position in taken):
        return 0.0
    ends = np.interp(taken, grid, length)
    stretches, inner = np.diff(ends), np.zeros(len(taken) - 1, dtype=int)
    for _ in range(count - len(taken)):
        inner[np.argmax(stretches / (inner + 1))] += 1
    longest = int(np.argmax(np.where(inner > 0, stretches, -1.0)))
    parts = int(inner[longest]) + 1
    return float(np.interp(ends[longest] + stretches[longest] * (parts // 2) / parts, length, grid))


def check_order(config: SweepConfig) -> None:
    """Settings that another order or a shorter run would leave without effect. Raises: ConfigError naming the field."""
    sweep, stopping, dual_steps = config.sweep, config.stopping, config.dual_steps
    if sweep.chains != "auto" and sweep.order != "path":
        raise ConfigError(f"sweep.chains={sweep.chains} with order={sweep.order}: remove it, or take order path")
    if sweep.warm_lr is not None and sweep.order == "listed":
        raise ConfigError(
            f"sweep.warm_lr={sweep.warm_lr:g} with order=listed: no point starts from a neighbour; remove it, or take "
            "order path or adaptive"
        )
    most = {"window": dual_steps - config.measure.window + 1, "patience": dual_steps}
    for name, used, end in zip(most, config.early_ends, ("certificate", "infeasible"), strict=True):
        if used and getattr(stopping, name) > most[name]:
            raise ConfigError(
                f"stopping.{name}={getattr(stopping, name)}: a trial has {dual_steps} dual steps (primal.steps="
                f"{config.primal.steps} over dual.primal_steps_per_dual_step={config.dual.primal_steps_per_dual_step}), so "
                f"that it would never act; give at most {most[name]}, more primal.steps, or stopping.{end}: false"
            )


def _check_neighbours(config: SweepConfig) -> None:
    """What every order needs whose points start from one another. Raises: ConfigError naming the field."""
    order, scheduler = config.sweep.order, config.scheduler
    if config.dual.rule == "fixed":
        raise ConfigError(
            f"dual.rule='fixed' with sweep.order={order!r}: a point takes its neighbour's multipliers, so that the fixed "
            "ones would change; take a rule that moves them, or order listed"
        )
    if scheduler.kind == "fifo":
        return
    if scheduler.metric == "lagrangian":
        raise ConfigError(
            f"scheduler.metric='lagrangian' with sweep.order={order!r}: Lagrangians at different thresholds and starts do "
            "not compare; give kkt_residual, or take kind fifo"
        )
    if config.early_ends[0] and scheduler.grace_dual_steps < config.stopping.window:
        raise ConfigError(
            f"scheduler.grace_dual_steps={scheduler.grace_dual_steps} with sweep.order={order!r}: a point may be stopped "
            f"before its certificate can be tight; give at least stopping.window={config.stopping.window}"
        )


def check_adaptive(config: SweepConfig, names: tuple[str, ...]) -> None:
    """Raises: ConfigError when there is no axis to go along."""
    _check_neighbours(config)
    AdaptivePlan(config, names)


def check_path(config: SweepConfig, points: Sequence[Point]) -> None:
    """Raises: ConfigError when these points make no path."""
    _check_neighbours(config)
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
