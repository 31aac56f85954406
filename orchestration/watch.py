"""Watches a running sweep from the driver: writes results and traces to the trials' folders, feeds the tracker, and keeps
what the live table shows. Runs in a thread of its own; the DualServer's journal is the source of all it writes."""

import json
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dualsweep.constraints import Simplex
from dualsweep.constraints.lagrangian import min_max_level
from dualsweep.orchestration.dual_ledger import FINAL
from dualsweep.orchestration.dual_server import BASE_TRIAL, RayDual
from dualsweep.orchestration.preflight import Plan
from dualsweep.orchestration.storage import bring_trial, impatient
from dualsweep.orchestration.trace import write_trace
from dualsweep.orchestration.tracking import Tracker, started_from
from dualsweep.orchestration.units import unit_of_config
from dualsweep.trainers.store import StorageError, writing_to
from dualsweep.trainers.workspace import write_json

INTERVAL_S = 0.5


@dataclass
class TrialView:
    """What is known of one trial on the driver."""

    point: dict[str, Any]
    status: str = "waiting"
    dual_step: int = 0
    dual_steps: int = 0  # in all
    row: dict[str, Any] | None = None
    names: list[str] = field(default_factory=list)
    started: float | None = None
    result: dict[str, Any] | None = None
    error: str | None = None
    min_max: bool = False
    notes: list[str] = field(default_factory=list)  # what a user should know of its attempts

    @property
    def worst(self) -> float | None:
        """The largest smoothed violation of the newest row, in a min-max problem above the level; None without any."""
        violations = (self.row or {}).get("smoothed_violations")
        if not violations:
            return None
        domain = Simplex() if self.min_max else None
        return max(violations) - float(min_max_level(self.row["multipliers"], violations, domain) or 0.0)

    @property
    def over(self) -> bool:
        return self.status in FINAL

    def seconds_left(self) -> float | None:
        """From the trial's own pace; None before its second dual step."""
        if self.over or self.row is None or self.started is None or self.dual_step < 2:
            return None
        pace = (self.row["wall_time"] - self.started) / (self.dual_step - 1)
        return pace * (self.dual_steps - self.dual_step)


class Watcher:
    """Polls the DualServer until `stop`; `views` maps trial ids to what is known of them, in the sweep's order."""

    def __init__(self, plan: Plan, server: RayDual, tracker: Tracker, *, slots: int) -> None:
        self.plan, self.server, self.tracker, self.slots = plan, server, tracker, slots
        self.unit = unit_of_config(plan.config.to_dict())
        self.calibration: dict[str, Any] | None = None  # what the pretrained model measures, from the first result
        self.views: dict[str, TrialView] = {point["trial_id"]: self._view(point) for point in plan.points}
        self._pretraining = self._view(unlisted_point(BASE_TRIAL))  # of an earlier run: tracked, and not shown again
        self.error: BaseException | None = None
        self.unkept: dict[str, str] = {}  # label -> why a trial that is over has no result in its folder yet
        self.after_look: Callable[[], None] = lambda: None
        self.began = time.time()
        self._rows: dict[str, list[dict[str, Any]]] = {}
        self._tracked: set[str] = set()
        self._ended: list[str] = []
        self._stopping = threading.Event()
        self._interrupting = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="watcher")

    def _view(self, point: dict[str, Any]) -> TrialView:
        config = self.plan.config
        steps = config.pretrain.steps if point["kind"] == "base" else config.primal.steps
        dual_steps = steps // config.dual.primal_steps_per_dual_step
        return TrialView(point, dual_steps=dual_steps, min_max=self.unit.min_max)

    def start(self) -> None:
        self._thread.start()

    def interrupt(self) -> None:
        """Ask for checkpoints; safe in a signal handler."""
        self._interrupting.set()

    def stop(self) -> None:
        """One last look, then end."""
        self._stopping.set()
        self._thread.join(60)

    def _run(self) -> None:
        while not self._stopping.wait(INTERVAL_S):
            if self._interrupting.is_set():  # also when looking fails: Ctrl-C comes through here alone
                self._try(lambda: self.server.call("interrupt"))
            self._try(self.look)
        self.error = self._try(self.look)

    def _try(self, call: Callable[[], Any]) -> BaseException | None:
        """A call that may fail this time: the next turn does all of it again, and only the last one's error counts."""
        try:
            call()
        except BaseException as error:  # noqa: BLE001  (shown by the driver, which would otherwise wait in silence)
            return error
        return None

    def look(self) -> None:
        """One poll."""
        cursors = {trial_id: len(rows) for trial_id, rows in self._rows.items()}
        for trial_id, seen in self.server.call("snapshot", cursors, self._ended).items():
            view = self.views.get(trial_id) or self._unlisted(trial_id)
            if view is None:
                continue
            view.status, view.dual_step, view.row, view.error = (
                seen["status"],
                seen["dual_step"],
                seen["row"],
                seen["error"],
            )
            view.names, view.started, view.notes = seen["names"], seen["started"], seen["notes"]
            label = view.point["label"]
            try:
                self._track(trial_id, view, seen)
            except StorageError as error:  # no room, or an address that is away: tried again at the next look
                self.unkept[label] = str(error)
            except Exception as error:  # noqa: BLE001  (of one trial; the others go on, and the sweep's end names it)
                self.unkept[label] = f"{type(error).__name__}: {error}"
            else:
                self.unkept.pop(label, None)
        self.after_look()

    def _unlisted(self, trial_id: str) -> TrialView | None:
        """The pretraining of an earlier run, whose driver may have died before MLflow had it, or a searched trial."""
        if trial_id == BASE_TRIAL:
            return self._pretraining
        if self.plan.config.thresholds.search is None:
            return None
        self.views[trial_id] = self._view(unlisted_point(trial_id))
        return self.views[trial_id]

    def _track(self, trial_id: str, view: TrialView, seen: dict[str, Any]) -> None:
        if view.status == "waiting":
            return
        if trial_id not in self._tracked:
            self._tracked.add(trial_id)
            show_trial(self.tracker, {**view.point, "start": seen["start"]}, view.names, reopen=not view.over)
        rows = self._rows.setdefault(trial_id, [])
        if seen["new_rows"]:
            rows += seen["new_rows"]
            self.tracker.log_rows(trial_id, seen["new_rows"])
        if view.over:
            if len(seen["new_rows"]) < seen["dual_step"]:  # a rewind may have made again what is collected here
                rows = self.server.call("trace", trial_id)
            view.result = self._keep(view, seen, rows)
            if self.calibration is None and view.result.get("calibration"):
                self.calibration = view.result["calibration"]
                self.tracker.log_calibration(self.calibration)
            view.point["label"] = view.result["label"]
            self.tracker.finish_trial(trial_id, view.result, trial_folder(self.plan.folder, view.point))
            self._ended.append(trial_id)
            del self._rows[trial_id]  # they are in the trace file, and the tracker has its own

    def _keep(self, view: TrialView, seen: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Write the outcome beside what the workers left, which may have been on another node. Raises: StorageError."""
        store, folder = impatient(self.plan.store), trial_folder(self.plan.folder, view.point)
        if folder is not None and store.uri is not None:
            bring_trial(store, folder, models=True)
        with writing_to(folder or self.plan.folder):
            result = keep_outcome(self.plan.folder, view.point, seen, rows)
        if folder is not None and store.uri is not None:
            store.push(folder / "trace.parquet")
            store.push(folder / "result.json")
        return result


def unlisted_point(trial_id: str) -> dict[str, Any]:
    """The point of a trial that is not in points.json: the pretrained model, or a searched trial, until it is known better."""
    base = trial_id == BASE_TRIAL
    return {
        "trial_id": trial_id,
        "label": "pretrained model" if base else trial_id,
        "kind": "base" if base else "constrained",
        "thresholds": {},
        "fixed_weight": None,
    }


def sweep_metrics(points: Sequence[dict[str, Any]], failed: int) -> dict[str, float]:
    """What the sweep's own run counts, without the pretraining."""
    return {"trials": sum(point["kind"] != "base" for point in points), "failed_trials": failed}


def show_trial(tracker: Tracker, point: dict[str, Any], names: Sequence[str], *, reopen: bool) -> None:
    """Open a trial's run; the same description from a running sweep and from its folder, so that it is sent once."""
    params = {key: point.get(key) for key in ("kind", "thresholds", "fixed_weight")}
    tags = {"dualsweep.trial_kind": point["kind"], **started_from(point.get("start"))}
    tracker.start_trial(point["trial_id"], point["label"], params, tags, constraints=names, reopen=reopen)


def trial_folder(sweep_dir: Path, point: dict[str, Any]) -> Path | None:
    """Where a trial's results lie; None for the pretrained model, which belongs to all sweeps."""
    return None if point["kind"] == "base" else sweep_dir / "trials" / point["trial_id"]


def keep_outcome(
    sweep_dir: Path, point: dict[str, Any], seen: dict[str, Any], rows: list[dict[str, Any]]
) -> dict[str, Any]:
    """Write trace.parquet and result.json of a trial that is over, as the DualServer saw it. Returns: the result.

    A result that is there already stays when only its objective was restated since (`relate_to_unconstrained`).
    """
    result = seen["result"] or _failed_result(point, seen)
    folder = trial_folder(sweep_dir, point)
    if folder is None:
        return result
    folder.mkdir(parents=True, exist_ok=True)
    write_trace(rows, folder / "trace.parquet", constraints=seen["names"], trial_id=point["trial_id"])
    try:
        there = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        before = {key: value for key, value in there.items() if key != "objective_above_pretrained"}
        before["objective"] = there.get("objective_above_pretrained", there.get("objective"))
    except (OSError, ValueError, AttributeError):  # absent or damaged: the journal knows it
        before = None
    if before == result:
        return there
    write_json(folder / "result.json", result)
    return result


def _failed_result(point: dict[str, Any], seen: dict[str, Any]) -> dict[str, Any]:
    row = seen["row"] or {}
    return {
        "trial_id": point["trial_id"],
        "label": point["label"],
        "kind": point["kind"],
        "status": seen["status"],
        "error": seen["error"],
        "reason": seen["error"].strip().splitlines()[-1] if seen["status"] == "diverged" and seen["error"] else None,
        "thresholds": point["thresholds"],
        "stopped_by": "scheduler" if seen["status"] == "stopped" else None,
        "start": seen.get("start"),
        "multipliers": dict(zip(seen["names"], row.get("multipliers", []), strict=False)),
        "averaged_multipliers": {},
        "exact_multipliers": None,
        "relaxations": {},
        "primal_steps": row.get("primal_step", 0),
        "dual_steps": seen["dual_step"],
        "wall_seconds": row["wall_time"] - seen["started"] if row and seen["started"] else 0.0,
        "objective": None,
        "exact_objective": None,
        "constraints": [],
        "certificate": None,
        "histogram": None,
        "calibration": None,
    }
