"""Hands the sweep's trials to Tune in order, then whatever a search algorithm proposes."""

from dataclasses import dataclass
from typing import Any

import optuna
from ray import tune
from ray.tune.search import Searcher
from ray.tune.search.optuna import OptunaSearch

from dualsweep.orchestration.config import ConfigError, SweepConfig


@dataclass
class Halt:
    """Set by an interrupt: no trial is handed out after it. Tune pickles and copies searchers; copies share the original."""

    requested: bool = False

    def __deepcopy__(self, memo: dict) -> "Halt":
        return self


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
    ) -> None:
        super().__init__(metric=metric, mode=mode)
        self._waiting = list(points)
        self._shared, self._inner, self._left = shared, inner, searched
        self._searched: set[str] = set()
        self._halt = halt

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        if self._halt.requested:
            return Searcher.FINISHED
        if self._waiting:
            return {**self._shared, "point": self._waiting.pop(0)}
        if self._inner is None or self._left <= 0:
            return Searcher.FINISHED
        thresholds = self._inner.suggest(trial_id)
        if thresholds is None or thresholds == Searcher.FINISHED:
            return thresholds
        self._left -= 1
        self._searched.add(trial_id)
        return {**self._shared, "thresholds": thresholds}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        if trial_id in self._searched:
            self._inner.on_trial_result(trial_id, result)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        if trial_id in self._searched:
            self._inner.on_trial_complete(trial_id, result, error)

    def save(self, checkpoint_path: str) -> None:
        """Nothing: a resumed sweep asks the DualServer's journal what is finished."""

    def restore(self, checkpoint_path: str) -> None:
        """See `save`."""


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
    if not isinstance(settings["points"], int) or settings["points"] < 1:
        raise ConfigError(f"thresholds.search.points={settings['points']!r}: give a whole number of at least 1")
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
    inner = OptunaSearch(space, metric=metric, mode=mode, sampler=sampler)
    left = max(0, settings["points"] - len(finished))
    return PointSearch(points, shared, inner, metric, mode, left, halt), len(points) + left


def _tune_domain(spec: dict[str, Any]) -> Any:
    (kind, values) = next(iter(spec.items()))
    if kind == "factor":
        return {"factor": _tune_domain(values)}
    return tune.choice(values) if kind == "choice" else getattr(tune, kind)(*values)
