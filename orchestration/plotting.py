"""What the figures of a report share: colours, styles, panels, legends.

Colours are Okabe and Ito's, which stay apart for colour-blind readers; a marker's shape or a dash says the same again.
Every error bar and band is value +- 1.96 standard errors. The stricter request is always to the right.
"""

import math
from collections.abc import Iterable

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from dualsweep.orchestration.sweep_record import Trial
from dualsweep.orchestration.units import NORMAL_95, finite

BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"
INK, GREY, PALE = "#222222", "#777777", "#C9CDD3"
CYCLE = ((BLUE, "o"), (VERMILLION, "s"), (GREEN, "^"), (PURPLE, "D"), (ORANGE, "v"), (SKY, "P"))
MOST_PANELS = 24  # small multiples beyond this are too many to look at; evenly spaced trials stand for the rest
STYLE = {
    "font.size": 12, "axes.titlesize": 12.5, "axes.titleweight": "bold", "axes.labelsize": 12, "legend.fontsize": 11,
    "xtick.labelsize": 11, "ytick.labelsize": 11, "axes.edgecolor": GREY, "axes.spines.top": False,
    "axes.spines.right": False, "axes.grid": True, "grid.color": "#E8EAED", "axes.axisbelow": True, "savefig.dpi": 140,
    "lines.linewidth": 1.8, "legend.frameon": False, "axes.formatter.useoffset": False, "axes.titlelocation": "left",
}  # fmt: skip


def new_figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def panel_grid(
    count: int, width: float, height: float, *, most_columns: int, **shared: bool
) -> tuple[Figure, list[Axes]]:
    """A figure of ``count`` panels; columns share a fixed width, so that text keeps its size on the page."""
    columns = min(count, most_columns)
    rows = math.ceil(count / columns)
    figure = new_figure(9.5, height * rows + 0.8) if columns > 1 else new_figure(max(width, 7.5), height + 0.8)
    panels = list(np.atleast_1d(figure.subplots(rows, columns, **shared)).flat)
    for axes in panels[count:]:
        axes.set_visible(False)
    if shared.get("sharex"):  # where the last row is not full, the panels above the gap carry the numbers
        for axes in panels[max(count - columns, 0) : count]:
            axes.tick_params(labelbottom=True)
    return figure, panels[:count]


def name_axes(panels: list[Axes], x: str, y: str) -> None:
    """Label the outer panels only: the first of each row and those of the last row."""
    columns = panels[0].get_gridspec().ncols
    for index, axes in enumerate(panels):
        axes.set_xlabel(x if index // columns == (len(panels) - 1) // columns else "")
        axes.set_ylabel(y if index % columns == 0 else "")


def add_legend(figure: Figure, handles: list, *, columns: int) -> None:
    """Below the panels, where it never covers data; handles in a tuple are drawn on top of each other."""
    labels = [(handle[0] if isinstance(handle, tuple) else handle).get_label() for handle in handles]
    figure.legend(handles, labels, loc="outside lower center", ncols=min(columns, len(handles)))


def thinned(items: Iterable, most: int = MOST_PANELS) -> list:
    items = list(items)
    return items if len(items) <= most else [items[i] for i in np.linspace(0, len(items) - 1, most).round().astype(int)]


def half_width(stderr: float) -> float | None:
    return NORMAL_95 * stderr if finite(stderr) else None


def fill_of(trial: Trial, color: str) -> str:
    return color if trial.verdict == "feasible" else "white"
