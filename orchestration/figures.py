"""The figures of a sweep's report, drawn from what ``report.load_sweep`` read.

Colours are Okabe and Ito's, which stay apart for colour-blind readers; a marker's shape or a dash says the same again.
Every error bar and band is value +- 1.96 standard errors. The stricter request is always to the right.
"""

import math
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from scipy.interpolate import PchipInterpolator

from dualsweep.orchestration.report import NORMAL_95, Sweep, Trial, as_float, class_counts, finite, wilson_interval

BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"
INK, GREY, PALE = "#222222", "#777777", "#C9CDD3"
CYCLE = ((BLUE, "o"), (VERMILLION, "s"), (GREEN, "^"), (PURPLE, "D"), (ORANGE, "v"), (SKY, "P"))
MOST_PANELS = 24  # small multiples beyond this are too many to look at; evenly spaced trials stand for the rest
MOST_POINTS = 600  # of a trace in a curve: about what the width of a panel resolves
STYLE = {
    "font.size": 12, "axes.titlesize": 12.5, "axes.titleweight": "bold", "axes.labelsize": 12, "legend.fontsize": 11,
    "xtick.labelsize": 11, "ytick.labelsize": 11, "axes.edgecolor": GREY, "axes.spines.top": False,
    "axes.spines.right": False, "axes.grid": True, "grid.color": "#E8EAED", "axes.axisbelow": True, "savefig.dpi": 140,
    "lines.linewidth": 1.8, "legend.frameon": False, "axes.formatter.useoffset": False, "axes.titlelocation": "left",
}  # fmt: skip


def draw_figures(sweep: Sweep, folder: Path) -> dict[str, Path]:
    """Write every figure that has something to show to ``<folder>/<name>.png``; remove those that no longer have."""
    drawn = {}
    with matplotlib.rc_context(STYLE):
        for draw in (frontier, achieved, multipliers, violations, relaxations, histograms, samples):
            path = folder / f"{draw.__name__}.png"
            figure = draw(sweep)
            if figure is None:
                path.unlink(missing_ok=True)
            else:
                figure.savefig(path)
                drawn[draw.__name__] = path
    return drawn


def frontier(sweep: Sweep) -> Figure | None:
    """Objective against the requirement reached, with the Pareto front, the baselines and the exact curve."""
    trials = [trial for trial in sweep.trials if trial.drawable]
    if not trials:
        return None
    unit, scale = sweep.unit, sweep.unit.scale
    figure = _figure(9.5, 6.2)
    axes = figure.subplots()
    front = sweep.front()
    exact = [(t.requested * scale, as_float(t.result.get("exact_objective"))) for t in sweep.of_kind("constrained")]
    exact = sorted(pair for pair in exact if all(map(finite, pair)))
    handles = []
    if exact:
        x, y = np.array(exact).T
        curve = PchipInterpolator(x, y) if np.all(np.diff(x) > 0) and len(x) > 1 else None
        if curve is not None:  # straight lines between the requests would lie above the convex optimum
            axes.plot(dense := np.linspace(x[0], x[-1], 200), curve(dense), "--", color=GREY, lw=1.4, zorder=1)
        axes.plot(x, y, "|", color=GREY, ms=11, mew=1.6, zorder=1)
        handles.append(
            Line2D([], [], color=GREY, ls="--", lw=1.4, marker="|", ms=11, label="exact optimum (ticks: at requests)")
        )
    wider = sweep.front("undecided")
    if len(wider) > 1 and wider != front:
        xy = [(trial.achieved[0] * scale, trial.objective) for trial in wider]
        handles += axes.plot(
            *zip(*xy, strict=True), ":", color=SKY, lw=2.2, label="front if the undecided hold", zorder=1
        )
    if front:
        xy = [(trial.achieved[0] * scale, trial.objective) for trial in front]
        handles += axes.plot(
            *zip(*xy, strict=True), "-", color=SKY, lw=3, label="Pareto front of the points that hold", zorder=1
        )
    seen = {}
    for trial in trials:
        look, says = _look(trial)
        value, stderr = trial.achieved
        x, dx = value * scale, _bar(stderr * scale)
        axes.errorbar(
            x,
            trial.objective,
            _bar(trial.objective_stderr),
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
    names = sweep.constraint_names
    among = (
        f" among {', '.join(names)}"
        if 1 < len(names) <= 4
        else f" among {len(names)} constraints"
        if len(names) > 4
        else ""
    )
    axes.set_xlabel(
        f"{unit.worst} {unit.noun} reached{among} {unit.axis}".strip()
        + ("\nstricter →" if unit.stricter > 0 else "\naxis reversed: stricter →")
    )
    axes.set_ylabel(f"{_objective_name(sweep)}\n← better")
    if unit.stricter < 0:
        axes.invert_xaxis()
    axes.margins(0.09)
    _legend(figure, handles, columns=2)
    shown = trials if len(trials) <= 16 else [t for t in trials if t in front or t.kind != "constrained"]
    _place_labels(axes, shown, trials)
    return figure


def achieved(sweep: Sweep) -> Figure | None:
    """What each constraint reached against what was asked of it; the shaded side is where the request is met."""
    rows = [
        (row["name"], trial, trial.requests[row["name"]], trial.user(row, "value"), trial.user(row, "stderr"))
        for trial in sweep.of_kind("constrained")
        for row in trial.constraints
        if row["name"] in trial.requests and finite(trial.user(row, "value"))
    ]
    if not rows:
        return None
    unit, scale = sweep.unit, sweep.unit.scale
    figure = _figure(8.5, 6.2)
    axes = figure.subplots()
    names = list(dict.fromkeys(name for name, *_ in rows))
    asked = np.array([row[2] for row in rows]) * scale
    reached = np.array([row[3] for row in rows]) * scale
    gaps = np.diff(np.unique(asked))
    dodge = 0.14 * (gaps.min() if gaps.size else max(abs(asked.max()), 1e-9)) / max(len(names) - 1, 1)
    low, high = min(asked.min(), reached.min()), max(asked.max(), reached.max())
    pad = 0.08 * (high - low or abs(high) or 1.0)
    line = np.linspace(low - pad, high + pad, 100)
    far = np.full_like(line, 1e9 * unit.stricter)
    axes.fill_between(line, line, far, color=GREEN, alpha=0.09, lw=0)
    axes.plot(line, line, color=INK, lw=1.3)
    handles = [
        Line2D([], [], color=INK, lw=1.3, label="reached = requested"),
        Patch(color=GREEN, alpha=0.15, label="request met"),
    ]
    tolerance = next((t.certificate["tolerance"] for _, t, *_ in rows if finite(t.certificate.get("tolerance"))), 0.0)
    if tolerance:
        eased = line * math.exp(-tolerance) if unit.name == "share" else line - unit.stricter * tolerance
        axes.plot(line, eased, ":", color=GREY)
        handles.append(Line2D([], [], linestyle=":", color=GREY, label=f"tolerance ({tolerance:.3g} {unit.canonical})"))
    for name, trial, x, y, stderr in rows:
        index = names.index(name)
        color, marker = CYCLE[index % len(CYCLE)]
        x = x * scale + dodge * (index - (len(names) - 1) / 2)
        axes.errorbar(
            x,
            y * scale,
            _bar(stderr * scale),
            fmt=marker,
            color=color,
            ms=8,
            mfc=_fill(trial, color),
            mew=1.6,
            capsize=3,
            elinewidth=1.3,
        )
    for index, name in enumerate(names):
        color, marker = CYCLE[index % len(CYCLE)]
        handles.append(Line2D([], [], linestyle="none", marker=marker, color=color, ms=8, label=name))
    hollow = {"marker": "o", "color": GREY, "mfc": "white", "mew": 1.6, "ms": 8}
    if any(trial.verdict != "feasible" for _, trial, *_ in rows):
        handles.append(Line2D([], [], linestyle="none", **hollow, label="hollow: its point is not certified"))
    axes.set(xlim=(low - pad, high + pad), ylim=(low - pad, high + pad))
    axes.set_xlabel(
        f"requested {unit.noun} {unit.axis}".strip()
        + (" – stricter →" if unit.stricter > 0 else ", axis reversed – stricter →")
    )
    axes.set_ylabel(f"{unit.noun} reached {unit.axis}".strip())
    if unit.stricter < 0:
        axes.invert_xaxis()
    _legend(figure, handles, columns=3)
    return figure


def multipliers(sweep: Sweep) -> Figure | None:
    """Multiplier traces, one panel a constraint and one line a trial; the exact multiplier dashed."""
    return _traces_by_constraint(
        sweep, "multipliers", "multiplier (objective per unit of violation)", exact="exact_multipliers"
    )


def relaxations(sweep: Sweep) -> Figure | None:
    """Relaxation traces as the multipliers' are drawn; None where every relaxation is zero."""
    if not any(any(row["relaxations"]) for trial in sweep.trials for row in trial.trace):
        return None
    return _traces_by_constraint(sweep, "relaxations", f"relaxation ({sweep.unit.canonical})")


def violations(sweep: Sweep) -> Figure | None:
    """Violation estimates with their band and running mean, one panel a trial; at or below zero is satisfied."""
    trials = _thin([t for t in sweep.of_kind("constrained") if t.trace and t.trace_names])
    if not trials:
        return None
    figure, panels = _grid(len(trials), 4.6, 3.3, most_columns=2, sharex=True, sharey=True)
    names = list(dict.fromkeys(name for trial in trials for name in trial.trace_names))
    edges = []
    for axes, trial in zip(panels, trials, strict=True):
        step = _column(trial, "primal_step")
        axes.axhline(0.0, color=INK, lw=1.2)
        for index, name in enumerate(trial.trace_names):
            color = CYCLE[names.index(name) % len(CYCLE)][0]
            value, stderr = _column(trial, "violations", index), _column(trial, "violation_stderrs", index)
            spread = NORMAL_95 * np.nan_to_num(stderr)
            axes.fill_between(step, value - spread, value + spread, color=color, alpha=0.13, lw=0)
            axes.plot(step, value, color=color, lw=0.8, alpha=0.55)
            axes.plot(step, _running_mean(value), color=color, lw=2.2)
            edges += [value - spread, value + spread]
        axes.set_title(trial.short_label + ("" if trial.result else " (no result yet)"))
    low, high = np.nanpercentile(np.concatenate(edges), [0.5, 99.5])  # the first wild steps must not flatten the rest
    panels[0].set_ylim(min(low, 0) - 0.06 * (high - low), max(high, 0) + 0.06 * (high - low))
    _name_axes(panels, "primal step", f"violation ({sweep.unit.canonical})")
    handles = [Line2D([], [], color=CYCLE[i % len(CYCLE)][0], lw=2.2, label=name) for i, name in enumerate(names)]
    _legend(figure, [*handles, Line2D([], [], color=INK, lw=1.2, label="satisfied at or below")], columns=4)
    return figure


def histograms(sweep: Sweep) -> Figure | None:
    """Shares of the classes among a trial's samples, with the request and, where known, the share in the data."""
    trials = _thin([trial for trial in sweep.trials if class_counts(trial)])
    if not trials:
        return None
    figure, panels = _grid(len(trials), 4.6, 2.35, most_columns=3, sharey=True)
    some_prior, some_request = False, False
    for axes, trial in zip(panels, trials, strict=True):
        counts = class_counts(trial)
        asked = {name: _class_of(name, [c for c, *_ in counts]) for name in sweep.constraint_names}
        prior = dict(zip((name for name, *_ in counts), trial.result["histogram"].get("prior") or (), strict=False))
        shares = np.array([count / total for _, count, total in counts])
        bounds = np.array([wilson_interval(count, total) for _, count, total in counts])
        colors = [BLUE if name in asked.values() else PALE for name, *_ in counts]
        axes.bar(range(len(counts)), 100 * shares, color=colors, width=0.78)
        gap = 100 * np.abs(bounds.T - shares)
        axes.errorbar(range(len(counts)), 100 * shares, gap, fmt="none", ecolor=INK, elinewidth=1.1, capsize=2)
        for position, (name, *_) in enumerate(counts):
            request = next((trial.requests.get(c) for c, cls in asked.items() if cls == name), None)
            if finite(request) and sweep.unit.name == "share":
                axes.plot([position - 0.46, position + 0.46], [100 * request] * 2, color=VERMILLION, lw=2.4)
                some_request = True
            if finite(prior.get(name)):
                axes.plot([position - 0.46, position + 0.46], [100 * prior[name]] * 2, ":", color=INK, lw=1.8)
                some_prior = True
        few = len(counts) <= 12
        axes.set_xticks(range(len(counts)) if few else [i for i, c in enumerate(counts) if c[0] in asked.values()])
        prefix = _common_prefix([name for name, *_ in counts])
        shown = [counts[i][0].removeprefix(prefix) for i in axes.get_xticks().astype(int)]
        axes.set_xticklabels(shown, **({"rotation": 40, "ha": "right"} if max(map(len, shown), default=0) > 3 else {}))
        axes.grid(axis="x", visible=False)
        axes.set_title(trial.short_label)
    prefix = _common_prefix([name for name, *_ in class_counts(trials[0])])
    _name_axes(panels, f"class ({prefix}…)" if prefix else "class", "samples (%)")
    handles = [Patch(color=BLUE, label="constrained class"), Patch(color=PALE, label="other class")]
    handles += [Line2D([], [], color=VERMILLION, lw=2.4, label="requested")] if some_request else []
    handles += [Line2D([], [], linestyle=":", color=INK, label="share in the training data")] if some_prior else []
    _legend(figure, handles, columns=4)
    return figure


def samples(sweep: Sweep) -> Figure | None:
    """A grid of samples a trial; samples that are vectors become a scatter of their first two entries."""
    loaded = [(trial, array) for trial in sweep.trials if (array := _load_samples(trial)) is not None]
    if not loaded:
        return None
    loaded = _thin(loaded)
    images = loaded[0][1].ndim == 4
    figure, panels = _grid(len(loaded), 4.6, 2.05 if images else 3.6, most_columns=2)
    for axes, (trial, array) in zip(panels, loaded, strict=True):
        axes.set_title(trial.short_label)
        axes.grid(visible=False)
        if array.ndim == 4:
            tiles = _montage(array[:40])
            axes.imshow(tiles, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            axes.set_axis_off()
        else:
            flat = array.reshape(len(array), -1)
            second = flat[:, 1] if flat.shape[1] > 1 else np.zeros(len(flat))
            axes.plot(flat[:, 0], second, ".", ms=3, color=BLUE, alpha=0.5)
    return figure


def _traces_by_constraint(sweep: Sweep, column: str, label: str, exact: str = "") -> Figure | None:
    trials = [trial for trial in sweep.trials if trial.trace and trial.trace_names]
    if not trials:
        return None
    asked = [trial for trial in trials if trial.kind == "constrained"]
    ramp = matplotlib.colormaps["viridis"](np.linspace(0.0, 0.86, max(len(asked), 2)))
    colors = {trial.trial_id: ramp[i] for i, trial in enumerate(asked)}
    names = list(dict.fromkeys(name for trial in trials for name in trial.trace_names))[:MOST_PANELS]
    figure, panels = _grid(
        len(names), 4.6, 3.6, most_columns=2 if len(names) in (2, 4) else 3, sharex=True, sharey=True
    )
    handles, some_exact = {}, False
    for axes, name in zip(panels, names, strict=True):
        for trial in trials:
            if name not in trial.trace_names:
                continue
            color = colors.get(trial.trial_id, GREY)
            style = "-" if trial.trial_id in colors else "-."
            step, value = _column(trial, "primal_step"), _column(trial, column, trial.trace_names.index(name))
            axes.plot(step, value, style, color=color)
            says = trial.short_label if trial.trial_id in colors else trial.kind.replace("_", " ")
            handles[says] = Line2D([], [], color=color, linestyle=style, label=says)
            truth = (trial.result.get(exact) or {}).get(name) if exact else None
            if finite(truth):
                axes.axhline(truth, color=color, ls="--", lw=1.2)
                some_exact = True
        axes.set_title(name)
    tops = [max(max(row[column]) for row in trial.trace) for trial in trials]
    tops = [top for top in tops if finite(top) and top > 0]
    if tops and max(tops) > 8 * min(tops):  # a linear axis would press the mild requests flat
        panels[0].set_yscale("symlog", linthresh=min(tops))
        panels[0].set_ylim(bottom=0)
        panels[0].yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    _name_axes(panels, "primal step", label)
    shown = list(handles.values())
    shown = shown if len(shown) <= 12 else _thin(shown, 12)
    shown += [Line2D([], [], color=GREY, linestyle="--", lw=1.2, label="exact, same colour")] if some_exact else []
    _legend(figure, shown, columns=4)
    return figure


def _look(trial: Trial) -> tuple[dict, str]:
    """Marker of a trial on the frontier picture and its line in the legend; hollow means: not certified to hold."""
    baselines = {
        "base": ("*", 17, "#000000", "pretrained model"),
        "unconstrained": ("D", 10, INK, "unconstrained"),
        "fixed_weights": ("s", 10, ORANGE, "fixed weights"),
    }
    if trial.kind in baselines:
        marker, size, color, says = baselines[trial.kind]
        return {"marker": marker, "ms": size, "color": color, "mec": INK if color == ORANGE else color}, says
    color = {"feasible": BLUE, "infeasible": VERMILLION}.get(trial.verdict, PURPLE)
    says = {"feasible": "holds", "infeasible": "does not hold (dotted: what was asked)", "undecided": "undecided"}
    look = {"marker": "o", "ms": 11, "color": color, "mfc": _fill(trial, color), "mew": 2}
    return look, says.get(trial.verdict, f"not judged ({trial.status})")


def _fill(trial: Trial, color: str) -> str:
    return color if trial.verdict == "feasible" else "white"


def _bar(stderr: float) -> float | None:
    return NORMAL_95 * stderr if finite(stderr) else None


def _point_label(trial: Trial) -> str:
    return trial.short_label + (" (infeasible)" if trial.verdict == "infeasible" else "")


def _objective_name(sweep: Sweep) -> str:
    units = {(trial.result.get("objective") or {}).get("unit") for trial in sweep.trials if trial.drawable} - {None}
    # "KL(q||p) above the unconstrained run's, on held-out main data": the axis has room for the first half.
    name = sweep.objective_meaning.split(",")[0].replace("||", "‖")
    return f"cost: {name} ({', '.join(sorted(units)) or 'nats'})"


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _grid(count: int, width: float, height: float, *, most_columns: int, **shared: bool) -> tuple[Figure, list[Axes]]:
    """A figure of ``count`` panels; columns share a fixed width, so that text keeps its size on the page."""
    columns = min(count, most_columns)
    rows = math.ceil(count / columns)
    figure = _figure(9.5, height * rows + 0.8) if columns > 1 else _figure(max(width, 7.5), height + 0.8)
    panels = list(np.atleast_1d(figure.subplots(rows, columns, **shared)).flat)
    for axes in panels[count:]:
        axes.set_visible(False)
    if shared.get("sharex"):  # where the last row is not full, the panels above the gap carry the numbers
        for axes in panels[max(count - columns, 0) : count]:
            axes.tick_params(labelbottom=True)
    return figure, panels[:count]


def _name_axes(panels: list[Axes], x: str, y: str) -> None:
    """Label the outer panels only: the first of each row and those of the last row."""
    columns = panels[0].get_gridspec().ncols
    for index, axes in enumerate(panels):
        axes.set_xlabel(x if index // columns == (len(panels) - 1) // columns else "")
        axes.set_ylabel(y if index % columns == 0 else "")


def _legend(figure: Figure, handles: list, *, columns: int) -> None:
    """Below the panels, where it never covers data; handles in a tuple are drawn on top of each other."""
    labels = [(handle[0] if isinstance(handle, tuple) else handle).get_label() for handle in handles]
    figure.legend(handles, labels, loc="outside lower center", ncols=min(columns, len(handles)))


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
            _bar(trial.achieved[1] * scale) or 0.0,
            _bar(trial.objective_stderr) or 0.0,
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


def _thin(items: Iterable, most: int = MOST_PANELS) -> list:
    items = list(items)
    return items if len(items) <= most else [items[i] for i in np.linspace(0, len(items) - 1, most).round().astype(int)]


def _column(trial: Trial, column: str, index: int | None = None) -> np.ndarray:
    rows = trial.trace[:: max(len(trial.trace) // MOST_POINTS, 1)]
    return np.array([row[column] if index is None else row[column][index] for row in rows], dtype=float)


def _common_prefix(names: list[str]) -> str:
    """What all class names begin with, up to an underscore: ``digit_`` of digit_0, digit_1; it would crowd the axis."""
    prefix = f"{names[0].rpartition('_')[0]}_"
    return prefix if len(names) > 1 and all(name.startswith(prefix) for name in names) else ""


def _running_mean(values: np.ndarray) -> np.ndarray:
    """Centred mean over about a fifteenth of the trace, over fewer rows at its ends; nan entries are left out."""
    half = len(values) // 30
    return np.array([_mean(values[max(i - half, 0) : i + half + 1]) for i in range(len(values))])


def _mean(values: np.ndarray) -> float:
    known = values[np.isfinite(values)]
    return float(known.mean()) if known.size else math.nan


def _class_of(constraint: str, classes: list[str]) -> str | None:
    """The class that a constraint named ``digit_4``, ``class_4`` or by the class itself is about."""
    return next((name for name in classes if constraint == name or constraint.endswith(f"_{name}")), None)


def _load_samples(trial: Trial) -> np.ndarray | None:
    path = trial.directory / "samples.npy"
    try:
        array = np.load(path, allow_pickle=False) if path.exists() else None
    except (OSError, ValueError, EOFError):  # half-written; the figure shows the trials it can
        return None
    return array if array is not None and array.ndim >= 2 and array.size and array.dtype.kind == "f" else None


def _montage(images: np.ndarray, columns: int = 10) -> np.ndarray:
    """(n, c, h, w) in [-1, 1] to one picture in [0, 1], grey (h, w) or colour (h, w, 3), white between the tiles."""
    count, channels, height, width = images.shape
    stride = max(max(height, width) // 128, 1)
    images = np.clip(np.nan_to_num(images[:, : 3 if channels >= 3 else 1, ::stride, ::stride]) / 2 + 0.5, 0, 1)
    height, width = images.shape[2:]
    gap = max(height // 10, 1)
    rows = math.ceil(count / columns)
    sheet = np.ones((rows * (height + gap) - gap, columns * (width + gap) - gap, images.shape[1]), dtype=np.float32)
    for index, image in enumerate(images):
        top, left = index // columns * (height + gap), index % columns * (width + gap)
        sheet[top : top + height, left : left + width] = image.transpose(1, 2, 0)
    return sheet[..., 0] if sheet.shape[2] == 1 else sheet
