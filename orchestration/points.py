"""Hands the sweep's trials to Tune in order, then whatever a search algorithm proposes."""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import optuna
from ray import tune
from ray.tune.search import Searcher
from ray.tune.search.optuna import OptunaSearch

from dualsweep.orchestration.config import ConfigError, SweepConfig, point_for_search
from dualsweep.orchestration.frontier import AdaptivePlan, FrontierPlan, Outcome, PathPlan, outcome_of
from dualsweep.orchestration.interrupts import Halt

PROPOSALS = 200  # tries to find thresholds that were not handed out before


class PointSearch(Searcher):
    """A Tune searcher: the listed points first, in their order, then an inner searcher's thresholds.

    Tune's own grid would work for the list alone; through one searcher, baselines, grids and searches take the same way.
    """

    def __init__(
        self,
        points: list[dict[str, Any]],
        shared: dict[str, Any],
        inner: Searcher | None,
        metric: str,
        mode: str,
        searched: int,
        halt: Halt,
        point_id: Callable[[dict[str, Any]], str] | None = None,
        taken: Iterable[str] = (),
    ) -> None:
        super().__init__(metric=metric, mode=mode)
        self._waiting = list(points)
        self._shared, self._inner, self._left = shared, inner, searched
        self._point_id, self._taken = point_id, set(taken)
        self._searched: dict[str, str] = {}  # trial -> what the inner searcher knows it by
        self._halt = halt

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        if self._halt.requested:
            return Searcher.FINISHED
        if self._waiting:
            return {**self._shared, "point": self._waiting.pop(0)}
        if self._inner is None or self._left <= 0:
            return Searcher.FINISHED
        for number in range(PROPOSALS):
            inner_id = f"{trial_id}-{number}"
            thresholds = self._inner.suggest(inner_id)
            if thresholds is None or thresholds == Searcher.FINISHED:
                return thresholds
            point = self._point_id(thresholds)
            if point not in self._taken:
                self._taken.add(point)
                self._left -= 1
                self._searched[trial_id] = inner_id
                return {**self._shared, "thresholds": thresholds}
            # The same thresholds are the same trial, which may be running: two of it would fence each other off.
            self._inner.on_trial_complete(inner_id, None, error=True)
        return Searcher.FINISHED

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        if trial_id in self._searched:
            self._inner.on_trial_result(self._searched[trial_id], result)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        if trial_id in self._searched:
            self._inner.on_trial_complete(self._searched[trial_id], result, error)

    def save(self, checkpoint_path: str) -> None:
        """Nothing: a resumed sweep asks the DualServer's journal what is finished."""

    def restore(self, checkpoint_path: str) -> None:
        """See `save`."""


class FrontierSearch(Searcher):
    """A Tune searcher of a frontier whose points start from one another; baselines fill slots that wait for a neighbour."""

    def __init__(
        self,
        plan: FrontierPlan,
        first: list[dict[str, Any]],
        others: list[dict[str, Any]],
        shared: dict[str, Any],
        halt: Halt,
    ) -> None:
        """
        Args:
            plan: of the constrained points.
            first, others: what does not start from a neighbour: the pretraining, and the baselines.
        """
        super().__init__(metric="kkt_residual", mode="min")
        self._plan, self._first, self._others = plan, list(first), list(others)
        self._shared, self._halt = shared, halt
        self._running: dict[str, str] = {}  # Tune's trial -> ours

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """The next point; None while all that are left wait for a neighbour."""
        if self._halt.requested:
            return Searcher.FINISHED
        point = self._first.pop(0) if self._first else self._plan.next()
        if point is None and self._others:
            point = self._others.pop(0)
        if point is None:
            return Searcher.FINISHED if self._plan.done else None
        self._running[trial_id] = point["trial_id"]
        return {**self._shared, "point": point}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        told = None if error or not result else result.get("outcome")
        self._plan.over(self._running.pop(trial_id, ""), None if told is None else Outcome.from_json(told))

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Nothing: a point counts when it is over."""

    def save(self, checkpoint_path: str) -> None:
        """Nothing: a resumed sweep asks the DualServer's journal what is finished and what the others started from."""

    def restore(self, checkpoint_path: str) -> None:
        """See `save`."""


def build_frontier(
    config: SweepConfig,
    listed: list[dict[str, Any]],
    todo: list[dict[str, Any]],
    shared: dict[str, Any],
    results: Mapping[str, dict[str, Any]],
    assignments: Mapping[str, dict[str, Any]],
    halt: Halt,
) -> tuple[FrontierSearch, int]:
    """The searcher of a frontier and the number of trials it will hand out.

    Args:
        listed: every point of the sweep; `todo`: those to run now, the pretraining among them.
        results, assignments: by trial, what earlier runs of the sweep finished, and handed out.
    """
    plan: FrontierPlan
    if config.sweep.order == "adaptive":
        plan = AdaptivePlan(config, tuple(shared["constraint_names"]), assignments)
    else:
        recorded = {trial_id: assignment.get("start") for trial_id, assignment in assignments.items()}
        plan = PathPlan(config, [point for point in listed if point["kind"] == "constrained"], recorded)
    for trial_id, result in results.items():
        plan.over(trial_id, outcome_of(result))
    first = [point for point in todo if point["kind"] == "base"]
    others = [point for point in todo if point["kind"] in ("unconstrained", "fixed_weights")]
    count = len(todo) + (plan.left if isinstance(plan, AdaptivePlan) else 0)
    return FrontierSearch(plan, first, others, shared, halt), count


def search_settings(config: SweepConfig) -> dict[str, Any]:
    """The `thresholds.search` section, checked: axes, points, metric, mode, seed.

    Raises: ConfigError naming the field.
    """
    spec = dict(config.thresholds.search or {})
    known = {"axes", "points", "metric", "mode", "algorithm", "seed"}
    for key in spec:
        if key not in known:
            raise ConfigError(f"thresholds.search.{key}: unknown key; known here: {', '.join(sorted(known))}")
    settings = {
        "points": 8,
        "metric": "kkt_residual",
        "mode": "min",
        "algorithm": "optuna",
        "seed": config.seed,
        **spec,
    }
    for key, least in (("points", 1), ("seed", 0)):
        if type(settings[key]) is not int or settings[key] < least:  # True is an int to isinstance
            raise ConfigError(f"thresholds.search.{key}={settings[key]!r}: give a whole number of at least {least}")
    if settings["mode"] not in ("min", "max"):
        raise ConfigError(f"thresholds.search.mode={settings['mode']!r}: give min or max")
    if settings["metric"] not in ("lagrangian", "objective", "worst_violation", "kkt_residual"):
        raise ConfigError(
            f"thresholds.search.metric={settings['metric']!r}: give lagrangian, objective, worst_violation or kkt_residual"
        )
    if settings["algorithm"] not in ("optuna", "random"):
        raise ConfigError(f"thresholds.search.algorithm={settings['algorithm']!r}: give optuna or random")
    return settings


def build_search(
    config: SweepConfig,
    points: list[dict[str, Any]],
    shared: dict[str, Any],
    finished: list[dict[str, Any]],
    halt: Halt,
) -> tuple[PointSearch, int]:
    """The searcher of a sweep and the number of trials it will hand out.

    Args:
        shared: config keys every trial gets.
        finished: results of searched points of an earlier run; they count towards the number of points.
    """
    if config.thresholds.search is None:
        return PointSearch(points, shared, None, "kkt_residual", "min", 0, halt), len(points)
    settings = search_settings(config)
    metric, mode = settings["metric"], settings["mode"]
    space = {axis: _tune_domain(spec) for axis, spec in settings["axes"].items()}
    sampler = (
        optuna.samplers.RandomSampler(seed=settings["seed"])
        if settings["algorithm"] == "random"
        else optuna.samplers.TPESampler(seed=settings["seed"])
    )
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    inner = OptunaSearch(OptunaSearch.convert_search_space(space), metric=metric, mode=mode, sampler=sampler)
    left = max(0, settings["points"] - len(finished))
    point_id = partial(_point_id, config, tuple(shared["constraint_names"]))
    taken = [result["trial_id"] for result in finished]
    return PointSearch(points, shared, inner, metric, mode, left, halt, point_id, taken), len(points) + left


def _point_id(config: SweepConfig, constraint_names: tuple[str, ...], thresholds: dict[str, Any]) -> str:
    return point_for_search(config, constraint_names, thresholds)["trial_id"]


def _tune_domain(spec: dict[str, Any]) -> Any:
    (kind, values) = next(iter(spec.items()))
    if kind == "factor":
        return {"factor": _tune_domain(values)}
    return tune.choice(values) if kind == "choice" else getattr(tune, kind)(*values)
