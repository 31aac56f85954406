"""Figures of what trained models draw: classes among the samples, image grids, points over the exact density."""

import math
import zipfile

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from dualsweep.orchestration.plotting import BLUE, INK, PALE, VERMILLION, add_legend, name_axes, panel_grid, thinned
from dualsweep.orchestration.sweep_record import Sweep, Trial, class_counts, wilson_interval
from dualsweep.orchestration.units import finite


def histograms(sweep: Sweep) -> Figure | None:
    """Shares of the classes among a trial's samples, with the request and, where known, the share in the data."""
    trials = thinned([trial for trial in sweep.trials if class_counts(trial)])
    if not trials:
        return None
    figure, panels = panel_grid(len(trials), 4.6, 2.35, most_columns=3, sharey=True)
    some_prior, some_request = False, False
    for axes, trial in zip(panels, trials, strict=True):
        counts = class_counts(trial)
        asked = {name: _classes_of(sweep, name, [c for c, *_ in counts]) for name in sweep.constraint_names}
        marked = {name for found in asked.values() for name in found}
        prior = dict(zip((name for name, *_ in counts), trial.result["histogram"].get("prior") or (), strict=False))
        shares = np.array([count / total for _, count, total in counts])
        bounds = np.array([wilson_interval(count, total) for _, count, total in counts])
        colors = [BLUE if name in marked else PALE for name, *_ in counts]
        axes.bar(range(len(counts)), 100 * shares, color=colors, width=0.78)
        gap = 100 * np.abs(bounds.T - shares)
        axes.errorbar(range(len(counts)), 100 * shares, gap, fmt="none", ecolor=INK, elinewidth=1.1, capsize=2)
        for position, (name, *_) in enumerate(counts):
            request = next((trial.requests.get(c) for c, found in asked.items() if found == [name]), None)
            if finite(request) and sweep.unit.name == "share":
                axes.plot([position - 0.46, position + 0.46], [100 * request] * 2, color=VERMILLION, lw=2.4)
                some_request = True
            if finite(prior.get(name)):
                axes.plot([position - 0.46, position + 0.46], [100 * prior[name]] * 2, ":", color=INK, lw=1.8)
                some_prior = True
        few = len(counts) <= 12
        axes.set_xticks(range(len(counts)) if few else [i for i, c in enumerate(counts) if c[0] in marked])
        prefix = _common_prefix([name for name, *_ in counts])
        shown = [counts[i][0].removeprefix(prefix) for i in axes.get_xticks().astype(int)]
        axes.set_xticklabels(shown, **({"rotation": 40, "ha": "right"} if max(map(len, shown), default=0) > 3 else {}))
        axes.grid(axis="x", visible=False)
        axes.set_title(trial.short_label)
    prefix = _common_prefix([name for name, *_ in class_counts(trials[0])])
    name_axes(panels, f"class ({prefix}…)" if prefix else "class", "samples (%)")
    handles = [Patch(color=BLUE, label="constrained class"), Patch(color=PALE, label="other class")]
    request = f"requested (at {'least' if sweep.unit.stricter > 0 else 'most'})"
    handles += [Line2D([], [], color=VERMILLION, lw=2.4, label=request)] if some_request else []
    handles += [Line2D([], [], linestyle=":", color=INK, label="share in the training data")] if some_prior else []
    add_legend(figure, handles, columns=4)
    return figure


def samples(sweep: Sweep) -> Figure | None:
    """Samples of each trial: a grid of images, or points, in the plane over the exact density where it is known."""
    loaded = [(trial, array) for trial in sweep.trials if (array := _load_samples(trial)) is not None]
    if not loaded:
        return None
    loaded = thinned(loaded)
    if all(array.ndim == 2 and array.shape[1] == 2 for _, array in loaded):
        return _plane(loaded)
    images = loaded[0][1].ndim == 4
    figure, panels = panel_grid(len(loaded), 4.6, 2.05 if images else 3.6, most_columns=2)
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


def scatter(points: np.ndarray) -> Figure:
    """One panel of vectors, shape (n, dim): their first two entries, all of them in view."""
    figure, (axes,) = panel_grid(1, 6.0, 5.2, most_columns=1)
    second = points[:, 1] if points.shape[1] > 1 else np.zeros(len(points))
    axes.plot(points[:, 0], second, ".", ms=3, color=BLUE, alpha=0.5)
    axes.set(aspect="equal", xlabel="coordinate 1", ylabel="coordinate 2" if points.shape[1] > 1 else "")
    return figure


def _plane(loaded: list[tuple[Trial, np.ndarray]]) -> Figure:
    """Points over filled contours, one panel a trial; extents and contour levels are the same in all."""
    densities = {trial.trial_id: density for trial, _ in loaded if (density := _load_density(trial)) is not None}
    # Square and around all but the wildest points: one model that has run away must not shrink the others to a dot.
    bounds = np.array([np.nanquantile(array, [0.005, 0.995], axis=0) for _, array in loaded])
    low, high = bounds[:, 0].min(axis=0), bounds[:, 1].max(axis=0)
    if len(loaded) > 2:
        typical = np.median(bounds[:, 1] - bounds[:, 0], axis=0).max()
        centre = np.median(bounds.mean(axis=1), axis=0)
        low, high = np.maximum(low, centre - 1.5 * typical), np.minimum(high, centre + 1.5 * typical)
    centre, half = (low + high) / 2, 0.58 * max(float((high - low).max()), 1e-6)
    top = max((float(density["density"].max()) for density in densities.values()), default=0.0)
    levels = top * np.array([0.02, 0.1, 0.25, 0.45, 0.7, 1.001])
    figure, panels = panel_grid(len(loaded), 4.6, 3.2, most_columns=3, sharex=True, sharey=True)
    for axes, (trial, array) in zip(panels, loaded, strict=True):
        if trial.trial_id in densities:
            axes.contourf(*(densities[trial.trial_id][key] for key in ("x", "y", "density")), levels, cmap="Blues")
        axes.plot(array[:, 0], array[:, 1], ".", ms=2.2, mew=0, color=VERMILLION, alpha=0.55)
        axes.set_title(trial.short_label)
        axes.grid(visible=False)
        hidden = int((np.abs(array - centre) > half).any(axis=1).sum())
        if hidden:
            says = f"{hidden} of {len(array)} outside"
            axes.text(0.98, 0.02, says, transform=axes.transAxes, ha="right", va="bottom", fontsize=10, color=INK)
    panels[0].set(xlim=(centre[0] - half, centre[0] + half), ylim=(centre[1] - half, centre[1] + half), aspect="equal")
    for axes in panels:
        axes.set_aspect("equal")
    name_axes(panels, "coordinate 1", "coordinate 2")
    handles = [Line2D([], [], linestyle="none", marker="o", ms=5, color=VERMILLION, label="samples")]
    if densities:
        handles.append(Patch(color="#6BAED6", label="exact density at the optimum (the darker, the denser)"))
    add_legend(figure, handles, columns=2)
    return figure


def _common_prefix(names: list[str]) -> str:
    """What all class names begin with, up to an underscore: ``digit_`` of digit_0, digit_1; it would crowd the axis."""
    prefix = f"{names[0].rpartition('_')[0]}_"
    return prefix if len(names) > 1 and all(name.startswith(prefix) for name in names) else ""


def _classes_of(sweep: Sweep, constraint: str, classes: list[str]) -> list[str]:
    """Classes a constraint is about: those its set lists, else the one it is named after (``digit_4``, ``class_4``, ``4``)."""
    listed = ((sweep.config.get("data") or {}).get("sets") or {}).get(constraint) or {}
    if listed.get("classes"):
        return [name for index, name in enumerate(classes) if {index, name} & set(listed["classes"])]
    return [name for name in classes if constraint == name or constraint.endswith(f"_{name}")][:1]


def _load_density(trial: Trial) -> dict[str, np.ndarray] | None:
    """x, y and density (rows along y) of the exact optimum, where it is known."""
    path = trial.directory / "exact_density.npz"
    try:
        with np.load(path, allow_pickle=False) as stored:
            found = {key: stored[key] for key in ("x", "y", "density")}
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile):  # absent, half-written or something else
        return None
    whole = found["density"].shape == (len(found["y"]), len(found["x"])) and np.isfinite(found["density"]).all()
    return found if whole else None


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
