"""What can be said of sweeps from their folders, running or not: status and report."""

import json
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from dualsweep.orchestration.config import ConfigError
from dualsweep.orchestration.delivery import point_of, read_ledger
from dualsweep.orchestration.dual_ledger import FINAL
from dualsweep.orchestration.dual_server import watched
from dualsweep.orchestration.journal import JournalError
from dualsweep.orchestration.live import trial_table
from dualsweep.orchestration.report import write_report
from dualsweep.orchestration.storage import is_running, sweep_id
from dualsweep.orchestration.sweep import stored_config
from dualsweep.orchestration.tracking import Tracker, resolve_tracking_uri
from dualsweep.orchestration.units import calibration_text, unit_of_config
from dualsweep.orchestration.watch import TrialView

DELIVERY_S = 120.0


def trial_views(root: Path, name: str) -> list[TrialView]:
    """Every trial of a sweep, rebuilt from its journal. Raises: ConfigError for an unknown sweep or a damaged journal."""
    config = stored_config(name, root)
    folder = root / name
    try:
        ledger = read_ledger(folder)
        points = json.loads((folder / "points.json").read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError, JournalError) as error:
        raise ConfigError(f"sweep {name!r}: {error}") from None
    known = {point["trial_id"]: point for point in points}
    for trial_id in ledger.trials:
        known.setdefault(trial_id, point_of(trial_id, known))
    running, unit = is_running(folder), unit_of_config(config.to_dict())
    views = []
    for trial_id, point in known.items():
        seen = watched(ledger.book(trial_id), 0)
        steps = config.pretrain.steps if point["kind"] == "base" else config.primal.steps
        status = seen["status"] if running or seen["status"] != "running" else "interrupted"
        views.append(
            TrialView(
                {**point, "label": (seen["result"] or point)["label"]},
                status=status,
                dual_step=seen["dual_step"],
                dual_steps=steps // config.dual.primal_steps_per_dual_step,
                row=seen["row"],
                names=seen["names"],
                started=seen["started"],
                result=seen["result"],
                error=seen["error"],
                min_max=unit.min_max,
                notes=seen["notes"],
            )
        )
    return views


def status_table(root: Path, name: str) -> Table:
    views = trial_views(root, name)
    state = "running" if is_running(root / name) else "not running"
    config = stored_config(name, root)
    concurrent = config.compute.concurrent_trials
    calibration = next((view.result["calibration"] for view in views if (view.result or {}).get("calibration")), {})
    pretrained = calibration_text(calibration, unit_of_config(config.to_dict()))
    return trial_table(
        views,
        title=f"{name} ({state})",
        slots=1 if concurrent == "auto" else concurrent,
        note=f"pretrained model: {pretrained} (95 %)" if pretrained else "",
    )


def follow_status(root: Path, name: str, console: Console, renew: Callable[[], object] = lambda: None) -> None:
    """Show the table until Ctrl-C or the end of the sweep; `renew` fetches what a remote store has since."""
    with Live(status_table(root, name), console=console, refresh_per_second=2) as live:
        while is_running(root / name):
            time.sleep(1.0)
            renew()
            live.update(status_table(root, name))


def list_sweeps(root: Path) -> Table:
    table = Table("sweep", "state", "trials done", "report", title=escape(str(root)), title_justify="left")
    for path in sorted(root.glob("*/sweep.yaml")):
        folder = path.parent
        try:
            views = trial_views(root, folder.name)
            done = f"{sum(view.status in FINAL for view in views)} of {len(views)}"
        except ConfigError as error:
            done = f"unreadable: {escape(str(error))}"
        page = folder / "report" / "index.html"
        table.add_row(
            folder.name, "running" if is_running(folder) else "-", done, escape(str(page)) if page.is_file() else ""
        )
    return table


def sweep_state(views: list[TrialView]) -> str:
    """completed, failed (some trial failed) or interrupted (some trial has no end).

    The pretraining may have none: another sweep can have finished the base in the meantime.
    """
    if any(view.status not in FINAL for view in views if view.point["kind"] != "base"):
        return "interrupted"
    return "failed" if any(view.status in ("failed", "diverged") for view in views) else "completed"


def rewrite_report(root: Path, name: str, *, track: bool) -> Path:
    """Write the report again from the sweep's folder, and log it to the parent run."""
    config = stored_config(name, root)
    if not any((root / name / "trials").glob("*/result.json")):
        raise ConfigError(
            f"name: sweep {name!r} has no finished trial yet; `dualsweep status {name}` shows where it stands"
        )
    page = write_report(root / name).index
    if track:
        tracker = Tracker(
            resolve_tracking_uri(config.tracking.uri, root),
            config.experiment,
            name,
            sweep_id=sweep_id(config.storage, root / name),
        )
        tracker.finish_sweep(page.parent, sweep_state(trial_views(root, name)))
        tracker.close(DELIVERY_S)
    return page
