"""The figures of a sweep's report, drawn from what ``sweep_record.load_sweep`` read; here those of requests and costs."""

import math
import textwrap
from itertools import pairwise
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from scipy.interpolate import PchipInterpolator

from dualsweep.orchestration.plotting import (
    BLUE,
    CYCLE,
    GREEN,
    GREY,
    INK,
    ORANGE,
    PURPLE,
    SKY,
    STYLE,
    VERMILLION,
    add_legend,
    fill_of,
    half_width,
    new_figure,
    thinned,
)
from dualsweep.orchestration.sample_figures import histograms, samples
from dualsweep.orchestration.sweep_record import Sweep, Trial
from dualsweep.orchestration.trace_figures import multipliers, relaxations, violations
from dualsweep.orchestration.units import NORMAL_95, finite

FIXED_NAMES = {"esd": "ESD, fixed weights", "siss": "SISS, fixed weights"}


def draw_figures(sweep: Sweep, folder: Path) -> dict[str, Path]:
    """Write every figure that has something to show to ``<folder>/<name>.png``; remove those that no longer have."""
    drawn = {}
    with matplotlib.rc_context(STYLE):
        for draw in FIGURES:
            path = folder / f"{draw.__name__}.png"
            figure = draw(sweep)
            if figure is None:
                path.unlink(missing_ok=True)
            else:
                figure.savefig(path)
                drawn[draw.__name__] = path
    return drawn


def frontier(sweep: Sweep) -> Figure | None:
    """Objective against the requirement reached, with the Pareto front, the fixed weights and the exact optimum."""
    trials = [trial for trial in sweep.trials if trial.drawable]
    if not trials or sweep.unit.min_max:
        return None
    unit, scale = sweep.unit, sweep.unit.scale
    figure = new_figure(9.5, 6.2)
    axes = figure.subplots()
    handles = [*_draw_pretrained(axes, sweep), *_draw_exact(axes, sweep), *_draw_curves(axes, sweep)]
    seen = {}
    for trial in trials:
        look, says = _look(trial, sweep.method)
        value, stderr = trial.achieved
        x, dx = value * scale, half_width(stderr * scale)
        axes.errorbar(
            x,
            trial.objective,
            half_width(trial.objective_stderr),
            dx,
            ecolor=look["color"],
            elinewidth=1.2,
            capsize=3,
            fmt="none",
            zorder=2,
            alpha=0.75,
        )
        axes.plot(x, trial.objective, linestyle="none", zorder=3, **look)
        if trial.verdict == "infeasible":
            axes.plot(x, trial.objective, marker="x", color=look["color"], ms=8, mew=1.8, zorder=4)
            if finite(trial.requested):  # how far the point is from what was asked of it
                axes.plot(
                    [x, trial.requested * scale], [trial.objective] * 2, ":", color=look["color"], lw=1.4, zorder=1
                )
                axes.plot(trial.requested * scale, trial.objective, "|", color=look["color"], ms=11, mew=1.8, zorder=2)
        seen[says] = Line2D([], [], linestyle="none", label=says, **look)
        if trial.verdict == "infeasible":
            seen[says] = (seen[says], Line2D([], [], linestyle="none", marker="x", color=look["color"], ms=8, mew=1.8))
    handles += seen.values()
    axes.set_xlabel(
        f"{unit.worst} {unit.noun} reached{_among(sweep)} {unit.axis}".strip()
        + ("\nstricter →" if unit.stricter > 0 else "\naxis reversed: stricter →")
    )
    axes.set_ylabel(f"{_objective_name(sweep)}\n← better")
    if unit.stricter < 0:
        axes.invert_xaxis()
    axes.margins(0.09)
    add_legend(figure, handles, columns=2)
    front = sweep.front()
    shown = trials if len(trials) <= 16 else [t for t in trials if t in front or t.kind != "constrained"]
    _place_labels(axes, shown, trials)
    return figure


def _draw_pretrained(axes: Axes, sweep: Sweep) -> list[Line2D]:
    """A line where the pretrained model stands, whose cost is not on this axis."""
    unit = sweep.unit
    worst = min((value * unit.stricter for _, value, *_ in sweep.pretrained), default=math.nan) * unit.stricter
    if not finite(worst):
        return []
    line = axes.axvline(worst * unit.scale, color=INK, ls=(0, (1, 3)), lw=1.3, zorder=0)
    line.set_label(f"pretrained model: {unit.text(worst)}")
    return [line]


def _draw_exact(axes: Axes, sweep: Sweep) -> list[Line2D]:
    """Exact optima at the requests, joined where one number is the whole request: only then is there one curve."""
    scale = sweep.unit.scale
    known = [t for t in sweep.of_kind("constrained") if finite(t.exact_objective) and finite(t.requested)]
    if not known:
        return []
    axes.plot([t.requested * scale for t in known], [t.exact_objective for t in known], "|", color=GREY, ms=11, mew=1.6)
    even = dict(sorted((t.requested * scale, t.exact_objective) for t in known if t.evenly_asked))
    if len(even) > 1:  # straight lines between the requests would lie above the convex optimum
        x, y = np.array(list(even.items())).T
        dense = np.linspace(x[0], x[-1], 200)
        axes.plot(dense, PchipInterpolator(x, y)(dense), "--", color=GREY, lw=1.4, zorder=1)
    style = "--" if len(even) > 1 else "none"
    says = "exact optimum (ticks: at requests)"
    return [Line2D([], [], color=GREY, linestyle=style, lw=1.4, marker="|", ms=11, label=says)]


def _draw_curves(axes: Axes, sweep: Sweep) -> list[Line2D]:
    """The Pareto front, what it would be if the undecided hold, and the runs with fixed weights in order of weight."""
    front, wider, weighed = sweep.front(), sweep.front("undecided"), sweep.weighed
    curves = [
        (wider if wider != front else [], ":", SKY, 2.2, "front if the undecided hold"),
        (front, "-", SKY, 3, "Pareto front of the points that hold"),
        (weighed, (0, (5, 2, 1, 2)), ORANGE, 1.5, f"{_fixed_name(sweep.method)}, in order"),
    ]
    handles = []
    for trials, style, color, width, says in curves:
        if len(trials) > 1:
            xy = [(trial.achieved[0] * sweep.unit.scale, trial.objective) for trial in trials]
            handles += axes.plot(*zip(*xy, strict=True), linestyle=style, color=color, lw=width, label=says, zorder=1)
    return handles


def levels(sweep: Sweep) -> Figure | None:
    """Min-max problems: the value of every constraint, a row a trial, with the level that the largest should not exceed."""
    trials = thinned([trial for trial in sweep.trials if trial.constraints and finite(trial.achieved[0])])
    if not trials or not sweep.unit.min_max:
        return None
    unit, names = sweep.unit, sweep.constraint_names
    figure = new_figure(9.5, 1.9 + 0.62 * len(trials))
    axes = figure.subplots()
    seen = set()
    for place, trial in enumerate(trials):
        rows = {row["name"]: row for row in trial.constraints}
        for index, name in enumerate(names):
            if name not in rows or not finite(trial.user(rows[name], "value")):
                continue
            color, marker = CYCLE[index % len(CYCLE)]
            above = trial.user(rows[name], "value") - trial.asked.get(name, 0.0)
            y = place + 0.3 * ((index + 0.5) / len(names) - 0.5)
            axes.errorbar(
                above * unit.scale,
                y,
                xerr=half_width(trial.user(rows[name], "stderr") * unit.scale),
                fmt=marker,
                color=color,
                mfc=color if trial.kind != "constrained" else fill_of(trial, color),
                ms=8,
                mew=1.6,
                capsize=3,
                elinewidth=1.3,
            )
        marks = (("level", trial.level, "-", INK), ("exact", trial.exact_objective, "--", GREY))
        for what, value, style, color in marks:
            if finite(value):
                axes.plot([value * unit.scale] * 2, [place - 0.36, place + 0.36], style, color=color, lw=1.8, zorder=1)
                seen.add(what)
    axes.set_yticks(range(len(trials)), [trial.short_label for trial in trials])
    axes.set_ylim(len(trials) - 0.5, -0.5)
    axes.grid(axis="y", visible=False)
    axes.margins(x=0.06)
    axes.set_xlabel(f"{unit.noun}{' less its offset' if sweep.has_offsets else ''} {unit.axis}".strip() + "\n← better")
    handles = [
        Line2D(
            [], [], linestyle="none", marker=CYCLE[i % len(CYCLE)][1], color=CYCLE[i % len(CYCLE)][0], ms=8, label=label
        )
        for i, label in enumerate(unit.of(name).replace("||", "‖") for name in names)
    ]
    if "level" in seen:
        handles.append(Line2D([], [], color=INK, lw=1.8, label="level: mean, weighted by the multipliers"))
    if "exact" in seen:
        handles.append(Line2D([], [], color=GREY, ls="--", lw=1.8, label="exact level"))
    if any(trial.verdict not in ("feasible", "") for trial in trials):
        handles.append(_hollow())
    add_legend(figure, handles, columns=3)
    return figure


def achieved(sweep: Sweep) -> Figure | None:
    """By how much each constraint meets what was asked of it: above zero the request is met, in either sense."""
    rows = [
        (row["name"], trial, trial.requests[row["name"]], trial.user(row, "value"), trial.user(row, "stderr"))
        for trial in sweep.of_kind("constrained")
        for row in trial.constraints
        if row["name"] in trial.requests and finite(trial.user(row, "value"))
    ]
    if not rows:
        return None
    unit, scale = sweep.unit, sweep.unit.scale
    figure = new_figure(8.5, 5.6)
    axes = figure.subplots()
    names = list(dict.fromkeys(name for name, *_ in rows))
    asked = np.unique([row[2] for row in rows]) * scale
    gaps = np.diff(asked)
    # Side by side so that bars can be told apart; the margin, unlike the value, reads the same wherever a marker stands.
    dodge = 0.14 * (gaps.min() if gaps.size else max(abs(asked.max()), 1e-9)) / max(len(names) - 1, 1)
    pad = max(0.06 * float(np.ptp(asked)), dodge * len(names), 1e-9)
    line = np.linspace(asked.min() - pad, asked.max() + pad, 100)
    for name, trial, request, value, stderr in rows:
        index = names.index(name)
        color, marker = CYCLE[index % len(CYCLE)]
        axes.errorbar(
            request * scale + dodge * (index - (len(names) - 1) / 2),
            (value - request) * unit.stricter * scale,
            half_width(stderr * scale),
            fmt=marker,
            color=color,
            ms=8,
            mfc=fill_of(trial, color),
            mew=1.6,
            capsize=3,
            elinewidth=1.3,
        )
    axes.axhline(0.0, color=INK, lw=1.3, zorder=1)
    handles = [
        Line2D([], [], color=INK, lw=1.3, label="reached = requested"),
        Patch(color=GREEN, alpha=0.15, label="request met"),
    ]
    tolerance = next((t.certificate["tolerance"] for _, t, *_ in rows if finite(t.certificate.get("tolerance"))), 0.0)
    if tolerance:
        share = unit.stricter * line * np.expm1(-unit.stricter * tolerance)
        axes.plot(line, share if unit.name == "share" else np.full_like(line, -tolerance * scale), ":", color=GREY)
        handles.append(Line2D([], [], linestyle=":", color=GREY, label=f"tolerance ({tolerance:.3g} {unit.canonical})"))
    for index, name in enumerate(names):
        color, marker = CYCLE[index % len(CYCLE)]
        handles.append(Line2D([], [], linestyle="none", marker=marker, color=color, ms=8, label=name))
    if any(trial.verdict != "feasible" for _, trial, *_ in rows):
        handles.append(_hollow())
    axes.margins(y=0.1)
    low, high = axes.get_ylim()
    axes.axhspan(0.0, high, color=GREEN, alpha=0.09, lw=0)
    axes.set(xlim=(line[0], line[-1]), ylim=(low, high))
    axes.set_xlabel(
        f"requested {unit.noun} {unit.axis}".strip()
        + (" – stricter →" if unit.stricter > 0 else ", axis reversed – stricter →")
    )
    side = "above" if unit.stricter > 0 else "below"
    axes.set_ylabel(f"margin: {unit.noun} {side} the request {unit.axis}".strip())
    if unit.stricter < 0:
        axes.invert_xaxis()
    add_legend(figure, handles, columns=3)
    return figure


def weights(sweep: Sweep) -> Figure | None:
    """What each fixed weight makes of every constraint, in sweeps that request nothing (ESD, SISS)."""
    trials = [trial for trial in sweep.weighed if finite(trial.fixed_weight)]
    if len(trials) < 2 or sweep.of_kind("constrained"):
        return None
    unit = sweep.unit
    figure = new_figure(8.5, 5.2)
    axes = figure.subplots()
    pretrained = {name: value for name, value, *_ in sweep.pretrained}
    places = np.array([trial.fixed_weight for trial in trials])
    dodge = 0.1 * np.diff(np.unique(places)).min() / max(len(sweep.constraint_names) - 1, 1)
    handles = []
    for index, name in enumerate(sweep.constraint_names):
        color, marker = CYCLE[index % len(CYCLE)]
        rows = [next((row for row in trial.constraints if row["name"] == name), {}) for trial in trials]
        values, stderrs = (
            np.array([trial.user(row, what) for trial, row in zip(trials, rows, strict=True)]) * unit.scale
            for what in ("value", "stderr")
        )
        shifted = places + dodge * (index - (len(sweep.constraint_names) - 1) / 2)
        bars = NORMAL_95 * np.nan_to_num(stderrs)
        axes.errorbar(
            shifted, values, bars, fmt="-", marker=marker, color=color, ms=8, capsize=3, elinewidth=1.3, lw=1.4
        )
        says = unit.of(name).replace("||", "‖")
        handles.append(Line2D([], [], color=color, marker=marker, ms=8, lw=1.4, label=says))
        if name in pretrained:
            axes.axhline(pretrained[name] * unit.scale, color=color, ls=(0, (1, 3)), lw=1.3)
    if pretrained:
        handles.append(Line2D([], [], color=INK, ls=(0, (1, 3)), lw=1.3, label="pretrained model, same colour"))
    axes.set_xlabel("fixed weight")
    axes.set_ylabel(f"{unit.noun} reached {unit.axis}".strip())
    add_legend(figure, handles, columns=3)
    return figure


FIGURES = (
    frontier, levels, achieved, weights, multipliers, violations, relaxations, histograms, samples,
)  # fmt: skip


def _look(trial: Trial, method: str) -> tuple[dict, str]:
    """Marker of a trial on the frontier picture and its line in the legend; hollow means: not certified to hold."""
    baselines = {
        "base": ("*", 17, "#000000", "pretrained model"),
        "unconstrained": ("D", 10, INK, "unconstrained"),
        "fixed_weights": ("s", 10, ORANGE, _fixed_name(method)),
    }
    if trial.kind in baselines:
        marker, size, color, says = baselines[trial.kind]
        return {"marker": marker, "ms": size, "color": color, "mec": INK if color == ORANGE else color}, says
    color = {"feasible": BLUE, "infeasible": VERMILLION}.get(trial.verdict, PURPLE)
    says = {"feasible": "holds", "infeasible": "does not hold (dotted: what was asked)", "undecided": "undecided"}
    look = {"marker": "o", "ms": 11, "color": color, "mfc": fill_of(trial, color), "mew": 2}
    return look, says.get(trial.verdict, f"not judged ({trial.status})")


def _point_label(trial: Trial) -> str:
    return trial.short_label + (" (infeasible)" if trial.verdict == "infeasible" else "")


def _fixed_name(method: str) -> str:
    return FIXED_NAMES.get(method, "fixed weights")


def _hollow() -> Line2D:
    look = {"marker": "o", "color": GREY, "mfc": "white", "mew": 1.6, "ms": 8}
    return Line2D([], [], linestyle="none", **look, label="hollow: its point is not certified")


def _among(sweep: Sweep) -> str:
    names = sweep.constraint_names
    if len(names) < 2:
        return ""
    return f" among {', '.join(names)}" if len(names) <= 4 else f" among {len(names)} constraints"


def _objective_name(sweep: Sweep) -> str:
    units = {(trial.result.get("objective") or {}).get("unit") for trial in sweep.trials if trial.drawable} - {None}
    # "KL(q||p) above the unconstrained run's, on held-out main data": the axis has room for the first half.
    name = sweep.objective_meaning.split(",")[0].replace("||", "‖")
    return textwrap.fill(f"cost: {name} ({', '.join(sorted(units)) or 'nats'})", 44)


def _place_labels(axes: Axes, trials: list[Trial], everything: list[Trial]) -> None:
    """Write each trial's label near its point, where it covers fewest points, bars, curves and other labels."""
    figure = axes.figure
    figure.canvas.draw()  # fixes the layout, so that data can be turned into pixels
    renderer, point = figure.canvas.get_renderer(), figure.dpi / 72
    spots = {}
    crowd = []
    for trial in everything:
        scale, objective = trial.unit.scale, trial.objective
        x, dx, dy = (
            trial.achieved[0] * scale,
            half_width(trial.achieved[1] * scale) or 0.0,
            half_width(trial.objective_stderr) or 0.0,
        )
        spots[trial.trial_id] = axes.transData.transform((x, objective))
        offsets = [(t * dx, 0) for t in (-1, -0.5, 0.5, 1)] + [(0, t * dy) for t in (-1, -0.5, 0.5, 1)]
        crowd += [axes.transData.transform((x + a, objective + b)) for a, b in offsets]
        crowd += [
            spots[trial.trial_id] + 8 * point * np.array([math.sin(a), math.cos(a)])
            for a in np.linspace(0, 2 * math.pi, 12)
        ]
    for line in axes.lines:
        ends = axes.transData.transform(line.get_xydata())
        for start, end in pairwise(ends):
            crowd += [start + t * (end - start) for t in np.linspace(0, 1, max(int(np.hypot(*(end - start)) / 12), 2))]
    crowd, frame, taken = np.array(crowd), axes.get_window_extent(renderer), []
    turns = np.radians([20, 160, -20, -160, 90, -90, 50, 130, -50, -130])
    sides = [(r * math.cos(a), r * math.sin(a)) for r in (15, 26, 40, 56) for a in turns]
    for trial in trials:
        x, y = trial.achieved[0] * trial.unit.scale, trial.objective
        choices = []
        for dx, dy in sides:
            align = {
                "ha": "center" if abs(dx) < 3 else "left" if dx > 0 else "right",
                "va": "bottom" if dy > 0 else "top",
            }
            note = axes.annotate(
                _point_label(trial), (x, y), (dx, dy), textcoords="offset points", fontsize=11, color=INK, **align
            )
            box = note.get_window_extent(renderer).padded(2 * point)
            note.remove()
            inside = (crowd[:, 0] > box.x0) & (crowd[:, 0] < box.x1) & (crowd[:, 1] > box.y0) & (crowd[:, 1] < box.y1)
            outside = box.x0 < frame.x0 or box.x1 > frame.x1 or box.y0 < frame.y0 or box.y1 > frame.y1
            gaps = {
                k: math.hypot(max(box.x0 - u, u - box.x1, 0), max(box.y0 - v, v - box.y1, 0))
                for k, (u, v) in spots.items()
            }
            another = min(gaps.values()) < gaps[trial.trial_id] - 0.1  # a reader takes a label for the nearest point's
            cost = (
                inside.sum()
                + 40 * sum(box.overlaps(b) for b in taken)
                + 40 * outside
                + 6 * another
                + 0.1 * math.hypot(dx, dy)
            )
            choices.append((cost, (dx, dy), align, box))
        _, place, align, box = min(choices, key=lambda choice: choice[0])
        thread = (
            {"arrowstyle": "-", "color": GREY, "lw": 0.8, "shrinkA": 0, "shrinkB": 7}
            if math.hypot(*place) > 16
            else None
        )
        note = axes.annotate(
            _point_label(trial),
            (x, y),
            place,
            textcoords="offset points",
            fontsize=11,
            color=INK,
            arrowprops=thread,
            **align,
        )
        note.set_in_layout(False)
        taken.append(box)
