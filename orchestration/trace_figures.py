"""Figures of how trials went: multipliers, violations and relaxations over the primal steps."""

import math

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from dualsweep.constraints.lagrangian import above_level
from dualsweep.orchestration.plotting import CYCLE, GREY, INK, MOST_PANELS, add_legend, name_axes, panel_grid, thinned
from dualsweep.orchestration.sweep_record import Sweep, Trial
from dualsweep.orchestration.units import NORMAL_95, finite

MOST_POINTS = 600  # of a trace in a curve: about what the width of a panel resolves


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
    trials = thinned(_moving(sweep))
    if not trials:
        return None
    figure, panels = panel_grid(len(trials), 4.6, 3.3, most_columns=2, sharex=True, sharey=True)
    names = list(dict.fromkeys(name for trial in trials for name in trial.trace_names))
    edges = []
    for axes, trial in zip(panels, trials, strict=True):
        step = _column(trial, "primal_step")
        axes.axhline(0.0, color=INK, lw=1.2)
        for index, name in enumerate(trial.trace_names):
            color = CYCLE[names.index(name) % len(CYCLE)][0]
            value, stderr = _violations(trial, index)
            spread = NORMAL_95 * np.nan_to_num(stderr)
            axes.fill_between(step, value - spread, value + spread, color=color, alpha=0.13, lw=0)
            axes.plot(step, value, color=color, lw=0.8, alpha=0.55)
            axes.plot(step, _running_mean(value), color=color, lw=2.2)
            edges += [value - spread, value + spread]
        axes.set_title(trial.short_label + ("" if trial.result else " (no result yet)"))
    low, high = np.nanpercentile(np.concatenate(edges), [0.5, 99.5])  # the first wild steps must not flatten the rest
    panels[0].set_ylim(min(low, 0) - 0.06 * (high - low), max(high, 0) + 0.06 * (high - low))
    what = f"{sweep.unit.noun} above the level" if sweep.unit.min_max else "violation"
    name_axes(panels, "primal step", f"{what} ({sweep.unit.canonical})")
    handles = [Line2D([], [], color=CYCLE[i % len(CYCLE)][0], lw=2.2, label=name) for i, name in enumerate(names)]
    add_legend(figure, [*handles, Line2D([], [], color=INK, lw=1.2, label="satisfied at or below")], columns=4)
    return figure


def _traces_by_constraint(sweep: Sweep, column: str, label: str, exact: str = "") -> Figure | None:
    asked = _moving(sweep)
    trials = [trial for trial in sweep.trials if trial.trace and trial.trace_names and trial.kind != "base"]
    if not asked:
        return None
    ramp = matplotlib.colormaps["viridis"](np.linspace(0.0, 0.86, max(len(asked), 2)))
    colors = {trial.trial_id: ramp[i] for i, trial in enumerate(asked)}
    names = list(dict.fromkeys(name for trial in trials for name in trial.trace_names))[:MOST_PANELS]
    figure, panels = panel_grid(
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
        panels[0].yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    panels[0].set_ylim(bottom=0)
    name_axes(panels, "primal step", label)
    shown = list(handles.values())
    shown = shown if len(shown) <= 12 else thinned(shown, 12)
    shown += [Line2D([], [], color=GREY, linestyle="--", lw=1.2, label="exact, same colour")] if some_exact else []
    add_legend(figure, shown, columns=4)
    return figure


def _column(trial: Trial, column: str, index: int | None = None) -> np.ndarray:
    rows = trial.trace[:: max(len(trial.trace) // MOST_POINTS, 1)]
    return np.array([row[column] if index is None else row[column][index] for row in rows], dtype=float)


def _moving(sweep: Sweep) -> list[Trial]:
    """Trials whose multipliers answer to what they measure; fixed weights alone have nothing to show over time."""
    return [trial for trial in sweep.of_kind("constrained") if trial.trace and trial.trace_names]


def _violations(trial: Trial, index: int) -> tuple[np.ndarray, np.ndarray]:
    """Violation of one constraint and its standard error, over the rows; in a min-max problem above the level."""
    if not trial.unit.min_max:
        return _column(trial, "violations", index), _column(trial, "violation_stderrs", index)
    columns = ("multipliers", "violations", "violation_stderrs")
    excess, stderr = above_level(*(_column(trial, column) for column in columns))
    return excess[:, index], stderr[:, index]


def _running_mean(values: np.ndarray) -> np.ndarray:
    """Centred mean over about a fifteenth of the trace, over fewer rows at its ends; nan entries are left out."""
    half = len(values) // 30
    return np.array([_mean(values[max(i - half, 0) : i + half + 1]) for i in range(len(values))])


def _mean(values: np.ndarray) -> float:
    known = values[np.isfinite(values)]
    return float(known.mean()) if known.size else math.nan
