"""Two forget sets of unequal difficulty: a constraint each against one weight for both (reverse-KL unlearning).

Both move the same two multipliers of the same pretrained model; the constrained runs find them from the thresholds, the
baseline sets them equal and raises them together. At the same worst-case unlearning, the smaller of the two divergences
from what is forgotten, the divergence from the pretrained model is compared, with standard errors over seeds.

    python benchmarks/equal_weights.py [--seeds 5] [--figure equal_weights.png]
"""

import argparse
import tempfile
from collections import defaultdict
from pathlib import Path

import numpy as np
from _harness import closing_line
from _laboratory import Finished, Job, mean_and_error, run_all
from rich.console import Console
from rich.table import Table

EXAMPLE = "gmm_equal_weights.yaml"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--figure", type=Path, default=Path("equal_weights.png"))
    options = parser.parse_args()
    console = Console(width=120)
    jobs = [Job("unlearn", EXAMPLE, seed, ("baselines.unconstrained=true",)) for seed in range(options.seeds)]
    curves: dict[str, list[list[tuple[float, float]]]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        for finished in run_all(jobs, Path(folder), processes=options.processes):
            for kind, points in split(finished).items():
                curves[kind].append(points)
                shown = ", ".join(f"({x:.3f}, {y:.4f})" for x, y in points)
                console.print(f"{kind} seed {finished.job.seed} [{finished.seconds:.0f} s]: {shown}", highlight=False)
    rows = compared(curves["constrained"], curves["fixed_weights"])
    table = Table(title="Divergence from the pretrained model at equal worst-case unlearning (nats)")
    for column in ("worst case", "constraints", "equal weights", "difference", "standard errors"):
        table.add_column(column, justify="right")
    for worst, ours, theirs in rows:
        gap, error = mean_and_error(np.array(theirs) - np.array(ours))
        table.add_row(
            f"{worst:.3f}", f"{np.mean(ours):.4f}", f"{np.mean(theirs):.4f}", f"{gap:+.4f} +- {error:.4f}", f"{gap / error:+.1f}"
        )  # fmt: skip
    console.print(table)
    draw(curves, options.figure)
    console.print(f"figure: {options.figure}")
    gaps = [mean_and_error(np.array(theirs) - np.array(ours)) for _, ours, theirs in rows]
    closing_line(
        "equal_weights",
        {
            "points": len(rows),
            "constraints_better": sum(gap > 2 * error for gap, error in gaps),
            "equal_weights_better": sum(gap < -2 * error for gap, error in gaps),
            "largest_saving_nats": max(gap for gap, _ in gaps),
        },
    )


def split(finished: Finished) -> dict[str, list[tuple[float, float]]]:
    """Kind of run -> its points (worst-case unlearning, divergence from the pretrained model), nats, the untouched model first."""
    points = defaultdict(list)
    for result in finished.results:
        worst = min(row["user_value"] for row in result["constraints"])
        points[result["kind"]].append((worst, result["objective"]["value"]))
    start = points.pop("unconstrained")
    return {kind: sorted(start + found) for kind, found in points.items()}


def compared(ours: list[list[tuple[float, float]]], theirs: list[list[tuple[float, float]]]):
    """(worst case, our divergences, theirs at it by seed): the baseline's curve is interpolated where our points lie."""
    rows = []
    for index in range(1, len(ours[0])):
        pairs = []
        for mine, other in zip(ours, theirs, strict=True):
            x, y = np.array(other).T
            worst, cost = mine[index]
            if x[0] <= worst <= x[-1]:
                # Between two points of a convex curve a straight line overstates the cost: interpolate its square root.
                pairs.append((worst, cost, float(np.interp(worst, x, np.sqrt(np.maximum(y, 0))) ** 2)))
        if len(pairs) == len(ours):
            worst, mine, other = np.array(pairs).T
            rows.append((float(worst.mean()), mine.tolist(), other.tolist()))
    return rows


def draw(curves: dict[str, list[list[tuple[float, float]]]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    names = {"constrained": "a constraint each", "fixed_weights": "one weight for both"}
    for (kind, seeds), marker in zip(sorted(curves.items()), "os", strict=True):
        values = np.array(seeds)
        error = values.std(0, ddof=1) / np.sqrt(len(seeds)) if len(seeds) > 1 else np.zeros(values.shape[1:])
        mean = values.mean(0)
        axes.errorbar(
            mean[:, 0], mean[:, 1], yerr=error[:, 1], xerr=error[:, 0], marker=marker, capsize=2, label=names[kind]
        )
    axes.set_xlabel("worst-case unlearning, smallest KL(p||q^i) (nats)")
    axes.set_ylabel("divergence from the pretrained model, KL(p||q) (nats)")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=160)


if __name__ == "__main__":
    main()
