"""What the terminal shows of a sweep: a live table where there is a terminal, one line an event where there is none."""

import math
import time
from collections.abc import Iterable

from rich import box
from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from dualsweep.orchestration.units import calibration_text
from dualsweep.orchestration.watch import TrialView, Watcher

_STYLES = {
    "running": "cyan",
    "completed": "green",
    "stopped": "yellow",
    "failed": "red",
    "diverged": "red",
    "interrupted": "yellow",
}
MOST_MULTIPLIERS = 4


def trial_table(views: Iterable[TrialView], *, title: str, slots: int = 1, note: str = "") -> Table:
    """One row a trial: step, objective, worst violation, multipliers, verdict, time left; the note stands below."""
    views = list(views)
    # Fits a terminal of 100 columns; the columns are those of the trace: smoothed worst violation, newest multipliers.
    table = Table(
        title=title,
        title_justify="left",
        caption="\n".join([_caption(views, slots), *(escape(line) for line in [note, *_notes(views)] if line)]),
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1),
    )
    for name in ("trial", "status", "step", "objective", "worst", "multipliers", "holds", "left"):
        table.add_column(
            name, justify="right" if name in ("step", "objective", "worst", "left") else "left", no_wrap=name != "trial"
        )
    for view in views:
        row = view.row or {}
        table.add_row(
            view.point["label"],
            Text(view.status, style=_STYLES.get(view.status, "dim")),
            _steps(view),
            f"{row['objective']:.4f}" if row else "",
            f"{view.worst:+.3f}" if view.worst is not None else "",
            _multipliers(row),
            verdict(view),
            duration(view.seconds_left()),
        )
    return table


def _notes(views: list[TrialView]) -> list[str]:
    """What happened on the way, and why trials ended as failed or diverged."""
    noted = [f"{view.point['label']}, {note}" for view in views for note in view.notes]
    ended = [view for view in views if view.status in ("failed", "diverged") and (view.error or "").strip()]
    return noted + [f"{view.point['label']}, {view.status}: {view.error.strip().splitlines()[-1]}" for view in ended]


def verdict(view: TrialView) -> Text:
    """From the certificate once there is one; before, how the smoothed violations stand."""
    certificate = (view.result or {}).get("certificate")
    if certificate:
        style = {"feasible": "bold green", "infeasible": "bold red"}.get(certificate["verdict"], "yellow")
        return Text(certificate["verdict"], style=style)
    if view.worst is None or view.over or view.min_max:  # some constraint is always above a mean of them all
        return Text("-", style="dim")
    return Text("so far" if view.worst <= 0 else "not yet", style="dim")


def duration(seconds: float | None) -> str:
    if seconds is None or not math.isfinite(seconds):
        return ""
    seconds = int(max(0, seconds))
    hours, rest = divmod(seconds, 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"


def _steps(view: TrialView) -> str:
    """Dual steps made of those to make; a trial that had nothing to train is done without any."""
    return "none" if view.status == "completed" and not view.dual_step else f"{view.dual_step}/{view.dual_steps}"


def _multipliers(row: dict) -> str:
    values = row.get("multipliers") or []
    shown = " ".join(f"{value:.3f}" for value in values[:MOST_MULTIPLIERS])
    return shown + (f" … {max(values):.3f} max" if len(values) > MOST_MULTIPLIERS else "")


def _caption(views: list[TrialView], slots: int) -> str:
    over = sum(view.over for view in views)
    running = [view for view in views if view.status == "running"]
    failed = sum(view.status in ("failed", "diverged") for view in views)
    left = sweep_seconds_left(views, slots)
    parts = [f"{over} of {len(views)} trials done", f"{len(running)} running"]
    if failed:
        parts.append(f"{failed} failed")
    if left:
        parts.append(f"about {duration(left)} left")
    return ", ".join(parts)


def sweep_seconds_left(views: list[TrialView], slots: int) -> float | None:
    """Running trials at their own pace, waiting ones at the mean pace of the others, spread over the slots."""
    known = [view for view in views if view.row is not None and view.started is not None and view.dual_step >= 2]
    if not known:
        return None
    paces = [(view.row["wall_time"] - view.started) / (view.dual_step - 1) for view in known]
    pace = sum(paces) / len(paces)
    steps = sum(
        view.dual_steps - (view.dual_step if view.status == "running" else 0) for view in views if not view.over
    )
    return pace * steps / max(1, slots)


class Progress:
    """Shows a watcher's trials until closed."""

    def __init__(self, watcher: Watcher, console: Console, *, title: str) -> None:
        self.watcher, self.console, self.title = watcher, console, title
        self._said: dict[str, str] = {}
        self._live: Live | None = None
        self._announced = False

    def __enter__(self) -> "Progress":
        if self.console.is_terminal:
            self._live = Live(console=self.console, get_renderable=self._render, refresh_per_second=2, transient=False)
            self._live.start()
            self.watcher.after_look = self._announce
        else:
            self.watcher.after_look = self._say
        return self

    def __exit__(self, *exc: object) -> None:
        if self._live is not None:
            self._live.refresh()
            self._live.stop()

    def _render(self) -> Table:
        return trial_table(
            self.watcher.views.values(),
            title=f"{self.title}  ({duration(time.time() - self.watcher.began)})",
            slots=self.watcher.slots,
        )

    def _announce(self) -> None:
        """What the pretrained model measures, once it is known."""
        if self._announced or self.watcher.calibration is None:
            return
        self._announced = True
        text = calibration_text(self.watcher.calibration, self.watcher.unit)
        if text:
            self.console.print(f"pretrained model: {text} (95 %)", highlight=False, markup=False, soft_wrap=True)

    def _say(self) -> None:
        """Without a terminal: a line for every trial whose status changed."""
        self._announce()
        for view in list(self.watcher.views.values()):
            if view.status != self._said.get(view.point["trial_id"], "waiting"):
                self._said[view.point["trial_id"]] = view.status
                worst = f", worst violation {view.worst:+.3f}" if view.worst is not None else ""
                state = f", {verdict(view)}" if (view.result or {}).get("certificate") else ""
                self.console.print(
                    f"[{duration(time.time() - self.watcher.began)}] {view.point['label']}: {view.status} at step {view.dual_step}/{view.dual_steps}{worst}{state}",
                    highlight=False,
                    soft_wrap=True,
                )
