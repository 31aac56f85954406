"""Delivers to MLflow what a sweep's folder holds and MLflow has not got.

The journal has every row and result, and a driver writes it whether MLflow answers or not; a second queue on disk would
only be another thing that can be lost or disagree. What MLflow has already, MLflow is asked (see `tracking.py`).
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dualsweep.orchestration.config import ConfigError
from dualsweep.orchestration.dual_ledger import FINAL, DualLedger
from dualsweep.orchestration.dual_server import watched
from dualsweep.orchestration.journal import read_journal
from dualsweep.orchestration.outbox import Undelivered
from dualsweep.orchestration.storage import sweep_id
from dualsweep.orchestration.sweep import driver_lock, stored_config
from dualsweep.orchestration.trace import read_trace, read_trace_names
from dualsweep.orchestration.tracking import Tracker, resolve_tracking_uri
from dualsweep.orchestration.watch import keep_outcome, show_trial, sweep_metrics, trial_folder, unlisted_point

DELIVERY_S = 600.0  # while something arrives; without that a flush ends soon


@dataclass(frozen=True)
class Delivery:
    """What a `sync` brought to MLflow, by kind, and what it could not."""

    delivered: dict[str, int]
    undelivered: list[Undelivered]


@dataclass(frozen=True)
class Kept:
    """One trial as the folder has it: its final rows, and its result once it is over."""

    point: dict[str, Any]
    names: tuple[str, ...]
    rows: list[dict[str, Any]]
    result: dict[str, Any] | None


def deliver_again(root: Path, name: str) -> Delivery:
    """Hand what a sweep's folder holds to MLflow; safe to repeat.

    Raises: ConfigError for an unknown sweep, one that is running (its driver delivers), or a damaged file.
    """
    config = stored_config(name, root)
    folder = root / name
    with driver_lock(folder, "its driver delivers by itself; run `dualsweep sync` when it has ended"):
        tracker = Tracker(
            resolve_tracking_uri(config.tracking.uri, root),
            config.experiment,
            name,
            sweep_id=sweep_id(config.storage, folder),
        )
        try:
            sync_sweep(folder, tracker)
        except ValueError as error:
            raise ConfigError(f"sweep {name!r}: {error}") from error
        tracker.close(DELIVERY_S)
    return Delivery(tracker.delivered(), tracker.undelivered())


def sync_sweep(sweep_dir: Path, tracker: Tracker) -> list[str]:
    """Queue everything a sweep left in its (local) directory; the ids of the trials handed over.

    Only queues: `tracker.flush(timeout)` tells what arrived. A trial that is not over gets the rows up to its newest
    checkpoint, which no resume makes again, and keeps its status. The sweep itself is ended only when every point in
    points.json has its result. Results that a killed driver left in the journal alone are written to their folders.
    Raises: ValueError naming a file that cannot be read; nothing is delivered then.
    """
    config = _load(sweep_dir / "sweep.yaml", yaml.safe_load) or {}
    points = {point["trial_id"]: point for point in _load(sweep_dir / "points.json", json.loads) or []}
    found = {**_from_folders(sweep_dir, points), **_from_journal(sweep_dir, points)}
    tags = {"dualsweep.method": config["method"]} if "method" in config else {}
    files = [path for path in [sweep_dir / "sweep.yaml"] if path.exists()]
    tracker.start_sweep(config, tags, files=files, reopen=False)
    results = {trial_id: kept.result for trial_id, kept in found.items() if kept.result}
    calibration = next((result["calibration"] for result in results.values() if result.get("calibration")), None)
    if calibration is not None:
        tracker.log_calibration(calibration)
    for trial_id, kept in found.items():
        show_trial(tracker, kept.point, kept.names, reopen=False)
        tracker.log_rows(trial_id, kept.rows)
        if kept.result:
            tracker.finish_trial(trial_id, kept.result, trial_folder(sweep_dir, kept.point))
    if results and set(points) <= set(results):
        failed = sum(result.get("status") in ("failed", "diverged") for result in results.values())
        report = sweep_dir / "report"
        metrics = sweep_metrics([kept.point for kept in found.values()], failed)
        tracker.finish_sweep(report if report.is_dir() else None, "failed" if failed else "completed", metrics)
    return list(found)


def read_ledger(sweep_dir: Path) -> DualLedger:
    """Every trial's books, rebuilt from the journal. Raises: JournalError for a damaged one."""
    ledger = DualLedger()
    for record in read_journal(sweep_dir / "journal.jsonl"):
        ledger.apply(record)
    return ledger


def point_of(trial_id: str, points: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """A trial's point; the pretrained model and searched trials are not in points.json."""
    return {**unlisted_point(trial_id), **points.get(trial_id, {})}


def _from_folders(sweep_dir: Path, points: dict[str, dict[str, Any]]) -> dict[str, Kept]:
    """Trials with a trace or a result in their folder, whether or not there is a journal."""
    found = {}
    for folder in sorted(path for path in (sweep_dir / "trials").glob("*") if path.is_dir()):
        result = _load(folder / "result.json", json.loads) or {}
        rows, names = [], tuple(entry["name"] for entry in result.get("constraints", ()))
        if (folder / "trace.parquet").exists():
            rows, names = read_trace(folder / "trace.parquet"), read_trace_names(folder / "trace.parquet")[0]
        if result or rows:
            point = point_of(folder.name, points)
            known = {"label": result.get("label", point["label"]), "start": result.get("start")}
            found[folder.name] = Kept({**point, **known}, names, rows, result)
    return found


def _from_journal(sweep_dir: Path, points: dict[str, dict[str, Any]]) -> dict[str, Kept]:
    """Every trial that began."""
    found = {}
    for trial_id, book in read_ledger(sweep_dir).trials.items():
        seen = watched(book, 0)
        point = {**point_of(trial_id, points), "start": seen["start"]}
        if seen["status"] == "waiting":
            continue
        rows, result = seen["new_rows"], None
        if seen["status"] in FINAL:
            result = keep_outcome(sweep_dir, point, seen, rows)
            point["label"] = result["label"]
        found[trial_id] = Kept(point, tuple(seen["names"]), rows, result)
    return found


def _load(path: Path, parse: Callable[[str], Any]) -> Any:
    """The parsed file, or None if there is none."""
    if not path.exists():
        return None
    try:
        return parse(path.read_text(encoding="utf-8"))
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: cannot be read ({error}); restore it, or move it away to leave it out") from error
