"""A frontier whose points start from one another against the same points each started cold, at the same certificate.

Both arms are the same sweep file: the same thresholds, model, optimizer, dual rule and stopping rule; a point ends in either
when its certificate is tight in training (`stopping`), or after `primal.steps`. Only `sweep.order` differs: `path` (warm)
and `listed` (cold, from the pretrained model and the tuned `dual.start`). What was reached is judged by fresh draws that
training never used. Steps are primal steps over all points of the frontier, the cold first point of the path among them.

    python benchmarks/frontier.py [--data mixture digits mnist] [--seeds 3] [--mnist ../shared/data]
"""

import argparse
import statistics
import tempfile
from collections import defaultdict
from pathlib import Path

from _harness import closing_line, spread
from _laboratory import Finished, Job, run_all
from rich.console import Console
from rich.table import Table

QUIET = ("baselines.unconstrained=false", "baselines.fixed_weights=[]", "sweep.chains=1", "stopping.certificate=true")
ORDERS = {"warm": "path", "cold": "listed"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", nargs="+", choices=["mixture", "digits", "mnist"], default=["mixture", "digits", "mnist"]
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--points", type=int, default=12)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--mnist", type=Path, default=Path("../shared/data"), help="folder of mnist-*.parquet")
    parser.add_argument("overrides", nargs="*", help="key.path=value, for both arms")
    options = parser.parse_args()
    console = Console(width=130)
    jobs = []
    for data in options.data:
        if data == "mnist" and not (options.mnist / "mnist-train.parquet").is_file():
            console.print(
                f"{options.mnist}/mnist-train.parquet is missing: mnist is left out; name its folder with --mnist"
            )
            continue
        example, settings = problem(data, options.mnist, options.points)
        for seed in range(options.seeds):
            for arm, order in ORDERS.items():
                overrides = (*settings, *QUIET, *options.overrides, f"sweep.order={order}")
                jobs.append(Job(f"{data}-{arm}", example, seed, overrides))
    found: dict[tuple[str, int], dict[str, Finished]] = defaultdict(dict)
    with tempfile.TemporaryDirectory() as folder:
        for finished in run_all(jobs, Path(folder), processes=options.processes):
            data, arm = finished.job.name.split("-")
            found[data, finished.job.seed][arm] = finished
            show(console, finished)
    figures = {}
    for data in dict.fromkeys(data for data, _ in found):
        pairs = [arms for (name, _), arms in found.items() if name == data]
        fractions = [steps(arms["warm"]) / steps(arms["cold"]) for arms in pairs]
        console.print(f"{data}: step_fraction {spread(fractions, '')}", highlight=False)
        figures[f"step_fraction_{data}"] = statistics.median(fractions)
        for arm in ORDERS:
            results = [result for arms in pairs for result in arms[arm].results]
            figures[f"{arm}_steps_{data}"] = statistics.median(steps(arms[arm]) for arms in pairs)
            figures[f"{arm}_tight_{data}"] = statistics.mean(r["stopped_by"] == "certificate" for r in results)
            figures[f"{arm}_holds_{data}"] = statistics.mean(verdict(r) == "feasible" for r in results)
            figures[f"{arm}_broken_{data}"] = statistics.mean(verdict(r) == "infeasible" for r in results)
            figures[f"{arm}_violation_{data}"] = statistics.mean(worst(result) for result in results)
    if figures:
        figures["step_fraction"] = max(value for name, value in figures.items() if name.startswith("step_fraction_"))
    closing_line("frontier", figures)


def problem(data: str, mnist: Path, points: int) -> tuple[str, tuple[str, ...]]:
    """(example, overrides) of a data set: one share for every rare class, from mild to strict."""
    if data == "mixture":
        evaluation = "evaluation={num_samples: 8000, num_sampling_steps: 50, batch_size: 8000, tolerance: 0.2}"
        return "gmm_frontier.yaml", (_shares(0.05, 0.25, points), evaluation)
    # Three rare classes and fewer draws than in the plane, each of which costs more: a wider tolerance for both arms.
    settings = (
        _shares(0.08, 0.2, points),
        "measure={num_samples: 256, num_sampling_steps: 10, window: 2}",
        "stopping={window: 8, patience: 100}",
        "evaluation={num_samples: 1500, tolerance: 0.3}",
        "sweep={warm_lr: 0.5, warm_steps: 80}",
    )
    if data == "mnist":
        path = (mnist / "mnist-train.parquet").resolve()
        spec = f"data={{dataset: parquet, path: {path}, size: 16, minority: {{classes: [4, 5, 7], keep: 0.1}}}}"
        settings = (spec, *settings)
    return "digits_fairness.yaml", settings


def _shares(low: float, high: float, points: int) -> str:
    return f"thresholds={{unit: share, grid: {{minority: {{logspace: [{low}, {high}, {points}]}}}}}}"


def steps(finished: Finished) -> int:
    return sum(result["primal_steps"] for result in finished.results)


def verdict(result: dict) -> str:
    return (result["certificate"] or {}).get("verdict", "stopped")


def worst(result: dict) -> float:
    """Largest violation on fresh draws, canonical units."""
    return max((row["violation"] for row in result["constraints"]), default=float("inf"))


def show(console: Console, finished: Finished) -> None:
    table = Table(
        title=f"{finished.job.name}, seed {finished.job.seed} [{finished.seconds:.0f} s]", title_justify="left"
    )
    for column in (
        "point",
        "primal steps",
        "ended by",
        "started with",
        "settled at",
        "exact",
        "verdict",
        "worst violation",
    ):
        table.add_column(column, justify="left" if column in ("point", "ended by", "verdict") else "right")
    for result in sorted(finished.results, key=lambda result: min(result["thresholds"].values())):
        rows = (result["start"] or {}).get("multipliers"), result["averaged_multipliers"], result["exact_multipliers"]
        shown = (" ".join(f"{value:.3f}" for value in (values or {}).values()) for values in rows)
        ended = result["stopped_by"] or "its last step"
        table.add_row(
            result["label"], str(result["primal_steps"]), ended, *shown, verdict(result), f"{worst(result):+.3f}"
        )
    console.print(table)


if __name__ == "__main__":
    main()
