"""Shares asked for and shares got, on the Gaussian mixture and on digits, over seeds of data, model and draws alike.

Each point is an example file run through the real training loop (pretraining included) and judged on fresh samples: by the
exact posterior of the mixture, on digits by a classifier that no training saw.

    python benchmarks/shares.py [--cases mixture,digits] [--seeds 3] [--processes 2]
"""

import argparse
import tempfile
from collections import defaultdict
from pathlib import Path

from _harness import closing_line
from _laboratory import Job, run_all
from rich.console import Console
from rich.table import Table

EXAMPLES = {"mixture": "gmm_fairness.yaml", "digits": "digits_fairness.yaml"}
REQUESTS = (0.05, 0.1, 0.2)
ALWAYS = ("baselines.unconstrained=false", "baselines.fixed_weights=[]")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default=",".join(EXAMPLES), help="comma-separated")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    # One job a request: the requests of a seed share their pretrained model through the folder.
    jobs = [
        Job(f"{case} {request:g}", EXAMPLES[case], seed, (*ALWAYS, f"thresholds.grid.minority=[{request}]"))
        for case in options.cases.split(",")
        for seed in range(options.seeds)
        for request in REQUESTS
    ]
    console, found = Console(width=120), defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        for finished in run_all(jobs, Path(folder), processes=options.processes):
            (result,) = finished.results
            rows = [(row["user_value"], row["user_stderr"], row["user_threshold"]) for row in result["constraints"]]
            found[finished.job.name] += rows
            got = ", ".join(f"{value:.4f} +- {stderr:.4f}" for value, stderr, _ in rows)
            console.print(f"{finished.job.name} seed {finished.job.seed}: {got}", highlight=False)
    table, figures = Table(title="Shares of each rare class, all seeds"), {}
    for column in ("asked", "lowest", "highest", "standard error", "worst miss"):
        table.add_column(column, justify="left" if column == "asked" else "right")
    for job in dict.fromkeys(job.name for job in jobs):
        values, stderrs, asked = zip(*found[job], strict=True)
        worst = max(abs(value - wanted) for value, wanted in zip(values, asked, strict=True))
        cells = (min(values), max(values), max(stderrs), worst)
        table.add_row(job, *(f"{cell:.4f}" for cell in cells))
        figures[job.replace(" ", "_")] = worst
    console.print(table)
    closing_line("shares", figures)


if __name__ == "__main__":
    main()
