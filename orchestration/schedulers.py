"""Tune's trial schedulers, kept to the constrained points: baselines always run to their end and set no bar for others."""

from typing import Any

from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, MedianStoppingRule, TrialScheduler

from dualsweep.orchestration.config import SweepConfig


class ConstrainedOnly(FIFOScheduler):
    """Asks `inner` about constrained trials only; the Lagrangian of an unconstrained run is not comparable with theirs."""

    def __init__(self, inner: TrialScheduler) -> None:
        super().__init__()
        self._inner = inner

    def set_search_properties(self, metric: str | None, mode: str | None, **spec: Any) -> bool:
        return self._inner.set_search_properties(metric, mode, **spec)

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        if _constrained(trial):
            self._inner.on_trial_add(tune_controller, trial)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        if _constrained(trial):
            return self._inner.on_trial_result(tune_controller, trial, result)
        return TrialScheduler.CONTINUE

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        if _constrained(trial):
            self._inner.on_trial_complete(tune_controller, trial, result)

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        if _constrained(trial):
            self._inner.on_trial_error(tune_controller, trial)

    def on_trial_remove(self, tune_controller: Any, trial: Any) -> None:
        if _constrained(trial):
            self._inner.on_trial_remove(tune_controller, trial)

    def debug_string(self) -> str:
        return self._inner.debug_string()


def _constrained(trial: Any) -> bool:
    return trial.config.get("point", {"kind": "constrained"})["kind"] == "constrained"


def trial_scheduler(config: SweepConfig, dual_steps: int) -> TrialScheduler:
    """The scheduler of the config. `dual_step` is the time axis, since a resumed trial's iteration starts again at 1."""
    settings = config.scheduler
    if settings.kind == "fifo":
        return FIFOScheduler()
    metric = {"metric": settings.metric, "mode": "min"}  # its own: a search algorithm may go by another
    if settings.kind == "asha":
        inner: TrialScheduler = ASHAScheduler(
            time_attr="dual_step",
            max_t=dual_steps + 1,  # a trial ends by itself at dual_steps
            grace_period=min(settings.grace_dual_steps, dual_steps),
            reduction_factor=settings.reduction_factor,
            **metric,
        )
    else:
        inner = MedianStoppingRule(time_attr="dual_step", grace_period=settings.grace_dual_steps, **metric)
    return ConstrainedOnly(inner)
