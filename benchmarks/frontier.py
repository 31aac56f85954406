"""A frontier whose points start from one another against the same points each started cold, at the same certificate.

All arms are the same sweep file: the same thresholds, model, optimizer, dual rule and stopping rule; a point ends when its
certificate is tight in training (`stopping`), or after `primal.steps`, its cap. What was reached is judged by fresh draws
that training never used. Steps are primal steps over all points of the frontier, the cold first point of the path among them.

* warm: `sweep.order: path`; a warm point has a short course of the learning rate (`warm_lr`, `warm_steps`). Two chains, as a
  sweep on two slots has them: they grow from one cold point in the middle, and run one after the other here.
* cold: `listed`, each point from the pretrained model and the tuned `dual.start`, with the course of `primal` over its cap.
* cold RATE:STEPS: the same with a short course of its own, so that the ratio holds no gain of the learning rate: RATE of
  `primal.lr`, falling to a tenth over STEPS, held from there to the cap. The cold arm of a data set is the quickest of all.

`step_fraction_D` is warm over the better cold on data set D, pair by pair of the same seed, and the median of them;
`step_fraction_own_D` is over cold with `primal`'s own course. `step_fraction_held_D` counts only the points of the
frontier whose certificates, on fresh draws, hold in both arms. `step_fraction` is the largest `step_fraction_D`.

    python benchmarks/frontier.py [--data mixture digits mnist] [--seeds 3] [--first-seed 0] [--mnist ../shared/data]

Evaluation included, one seed of the warm arm and one cold takes about 2 minutes of one core for the mixture and 30 for digits (with
`--samples 3000`), and hours for MNIST. Images are quicker with `--seeds 1 --points 8`. A course is tuned by
naming several, `--courses 1:200 1:400 0.5:200`: the best of them counts.
"""

import argparse
import statistics
import tempfile
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from _harness import closing_line, spread
from _laboratory import Finished, Job, run, run_all
from rich.console import Console
from rich.table import Table

from dualsweep.trainers import loop

QUIET = ("baselines.unconstrained=false", "baselines.fixed_weights=[]", "stopping.certificate=true")
WARM = "sweep={order: path, chains: 2, warm_lr: 0.5, warm_steps: 80}"
COLD = "sweep={order: listed}"


@dataclass(frozen=True)
class ArmJob(Job):
    """A job with the learning rate's course of its cold points: (fraction of primal.lr, steps); None: primal's own."""

    course: tuple[float, int] | None = None


def run_arm(job: ArmJob, folder: Path) -> Finished:
    """`run`, with the job's course. No sweep needs it, so that no setting has it."""
    own = loop._Trial._lr_course

    def lr_course(trial: loop._Trial, train: loop.TrainState) -> dict:
        if job.course is None or trial.is_base or trial.assignment.start is not None:
            return own(trial, train)
        rate, steps = job.course
        short = {"lr": rate * trial.optimizer["lr"], "steps": steps, "final_lr_fraction": loop.WARM_END}
        return {**trial.optimizer, **short}

    with mock.patch.object(loop._Trial, "_lr_course", lr_course):
        return run(job, folder)


def course(text: str) -> tuple[float, int]:
    """RATE:STEPS. Raises: ValueError."""
    rate, steps = text.split(":")
    if not (0 < float(rate) <= 1 and int(steps) > 0):
        raise ValueError(text)
    return float(rate), int(steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sets = ["mixture", "digits", "mnist"]
    parser.add_argument("--data", nargs="+", choices=sets, default=sets)
    parser.add_argument("--seeds", type=int, default=3, help="how many, of data, model and draws alike")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--points", type=int, default=12)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--samples", type=int, default=6000, help="of every point's evaluation")
    parser.add_argument(
        "--courses", type=course, nargs="*", default=[(1.0, 400)], help="RATE:STEPS of the short cold arms; the best counts"
    )
    parser.add_argument("--mnist", type=Path, default=Path("../shared/data"), help="folder of mnist-*.parquet")
    parser.add_argument("--set", dest="overrides", nargs="+", default=[], help="key.path=value, for all arms")
    options = parser.parse_args()
    console = Console(width=130)
    cold = {"cold": None} | {f"cold {rate:g}:{steps}": (rate, steps) for rate, steps in options.courses}
    jobs = []
    for data in options.data:
        if data == "mnist" and not (options.mnist / "mnist-train.parquet").is_file():
            console.print(
                f"{options.mnist}/mnist-train.parquet is missing: mnist is left out; name its folder with --mnist"
            )
            continue
        example, settings = problem(data, options.mnist, options.points, options.samples)
        for seed in range(options.first_seed, options.first_seed + options.seeds):
            for arm, lr_course in {"warm": None, **cold}.items():
                overrides = (*settings, *QUIET, WARM if arm == "warm" else COLD, *options.overrides)
                jobs.append(ArmJob(f"{data}-{arm}", example, seed, overrides, lr_course))
    found: dict[tuple[str, int], dict[str, Finished]] = defaultdict(dict)
    with tempfile.TemporaryDirectory() as folder:
        for finished in run_all(jobs, Path(folder), processes=options.processes, how=run_arm):
            data, arm = finished.job.name.split("-")
            found[data, finished.job.seed][arm] = finished
            show(console, finished)
    figures = {}
    for data in dict.fromkeys(data for data, _ in found):
        figures |= compared(console, data, [arms for (name, _), arms in found.items() if name == data], list(cold))
    if figures:
        figures["step_fraction"] = max(figures[f"step_fraction_{data}"] for data, _ in found)
    closing_line("frontier", figures)


def compared(console: Console, data: str, seeds: list[dict[str, Finished]], cold: list[str]) -> dict[str, float]:
    """The figures of a data set, printed too; `seeds` holds one Finished an arm, of the same seed."""
    figures = {}
    for arm in ("warm", *cold):
        results = [result for arms in seeds for result in arms[arm].results]
        taken = [steps(arms[arm]) for arms in seeds]
        counts = {
            "tight": sum(result["stopped_by"] == "certificate" for result in results),
            "at the cap": sum(result["stopped_by"] is None for result in results),
            "unevaluated": sum(not evaluated(result) for result in results),  # stopped or diverged
            "hold": sum(verdict(result) == "feasible" for result in results),
            "broken": sum(verdict(result) == "infeasible" for result in results),
        }
        told = ", ".join(f"{count} {name}" for name, count in counts.items())
        console.print(f"{data} {arm}: {spread(taken, 'steps', 0)}; of {len(results)} points {told}", highlight=False)
        key = f"{arm.replace(' ', '_')}_{{}}_{data}"
        figures[key.format("steps")] = statistics.median(taken)
        for name, count in counts.items():
            figures[key.format(name.replace(" ", "_"))] = count / len(results)
        judged = [worst(result) for result in results if evaluated(result)]
        if judged:
            figures[key.format("violation")] = statistics.mean(judged)
    better = min(cold, key=lambda arm: statistics.median(steps(arms[arm]) for arms in seeds))
    for name, arm in {"step_fraction": better, "step_fraction_own": cold[0]}.items():
        fractions = [steps(arms["warm"]) / steps(arms[arm]) for arms in seeds]
        console.print(f"{data}: {name} {spread(fractions, '')}, warm over {arm}", highlight=False)
        figures[f"{name}_{data}"] = statistics.median(fractions)
    pairs = [pair for arms in seeds for pair in pairs_that_hold(arms["warm"], arms[better])]
    if pairs:
        warm_steps, cold_steps = (sum(result["primal_steps"] for result in side) for side in zip(*pairs, strict=True))
        figures[f"step_fraction_held_{data}"] = warm_steps / cold_steps
        every = sum(len(arms["warm"].results) for arms in seeds)
        console.print(
            f"{data}: step_fraction_held {warm_steps / cold_steps:.4f}, over {len(pairs)} of {every} points, whose "
            f"certificates hold in both arms",
            highlight=False,
        )
    return figures


def pairs_that_hold(warm: Finished, cold: Finished) -> list[tuple[dict, dict]]:
    """Results of the same point, whose certificates on fresh draws hold in both arms."""
    others = {result["trial_id"]: result for result in cold.results}
    pairs = [(result, others[result["trial_id"]]) for result in warm.results]
    return [pair for pair in pairs if all(verdict(result) == "feasible" for result in pair)]


def problem(data: str, mnist: Path, points: int, samples: int) -> tuple[str, tuple[str, ...]]:
    """(example, overrides) of a data set: one share for every rare class, from mild to strict."""
    if data == "mixture":
        evaluation = f"evaluation={{num_samples: {samples}, num_sampling_steps: 50, batch_size: 8000, tolerance: 0.2}}"
        return "gmm_frontier.yaml", (_shares(0.05, 0.25, points), evaluation)
    # Three rare classes and fewer draws than in the plane, each of which costs more: a wider tolerance for all arms. With
    # half the draws the noise of a measurement is most of what keeps a certificate from being tight, in every arm.
    settings = (
        _shares(0.1, 0.2, points),
        "measure={num_samples: 1024, num_sampling_steps: 10, window: 3}",
        "stopping={window: 8, infeasible: false}",
        f"evaluation={{num_samples: {samples}, tolerance: 0.3}}",
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


def evaluated(result: dict) -> bool:
    return bool(result["constraints"])


def worst(result: dict) -> float:
    """Largest violation on fresh draws, canonical units, of a point that was evaluated."""
    return max(row["violation"] for row in result["constraints"])


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
            result["label"], str(result["primal_steps"]), ended, *shown, verdict(result), f"{worst(result):+.3f}" if evaluated(result) else ""
        )
    console.print(table)


if __name__ == "__main__":
    main()
