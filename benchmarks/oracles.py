"""Every formulation on its Gaussian mixture against its closed form: trained models, not algebra, over several seeds.

Each line of the table is one example file run through the real training loop (pretraining included), judged on fresh
draws. A multiplier's error is relative to the exact one, or to 0.4 where that is smaller: 0.05 means 5 %, or 0.02. A
violation is counted in standard errors of its own estimate; below 0 the constraint holds with room. `pooled` is the mean
violation of a constraint over the seeds in standard errors of that mean, its spread over seeds included.

`--students` are networks that learn the law which a composition or an unlearning without training samples from, so that a
plain sampler can: their table is one of its own, in nats, and takes 6 minutes; the formulations take 12 to 14.

    python benchmarks/oracles.py [--students] [--seeds 5] [--only fairness,adaptation] [--processes 2]
"""

import argparse
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
from _harness import closing_line
from _laboratory import Finished, Job, mean_and_error, multiplier_errors, run_all, violations_in_se
from rich.console import Console
from rich.table import Table

# Weights trained on the composed law need primal steps between the dual ones; the examples are dual-only.
STUDENT = (
    "thresholds.list=[{sets: 0.0}]",
    "formulation.primal=distill",
    "formulation.pool=1024",
    "primal.lr=2.0e-3",
    "primal.final_lr_fraction=0.02",
    "primal.weight_decay=0",
    "dual.decay_after=20",
)
DISTILLED = (*STUDENT, "primal.steps=1000", "primal.batch_size=512", "dual.primal_steps_per_dual_step=20")
# One row a formulation: the example and what turns it into the variant. Two that share a pretrained model are kept apart:
# the second would wait for the first.
FORMULATIONS: dict[str, tuple[str, ...]] = {
    # Twice the steps: after 1500 the multipliers are still coming down to the exact ones, up to 0.022 above.
    "fairness": ("gmm_fairness.yaml", "thresholds.grid.minority=[0.2]", "primal.steps=3000"),
    "adaptation": ("gmm_adaptation.yaml", "thresholds.grid.sets=[1.0]"),
    "alignment": ("gmm_alignment.yaml", "thresholds.grid.rewards=[0.5]"),
    "fairness_resilient": (
        "gmm_fairness.yaml",
        "thresholds.grid.minority=[0.3]",
        "dual.rule=resilient",
        "dual.relaxation_cost=0.5",
    ),
    "composition_and": ("gmm_composition_and.yaml", "thresholds.list=[{wide: 0.4, narrow: 0.0, middle: 0.2}]"),
    # Modes that overlap: between separate ones nearly all of its signal is in the few paths that could still go either way.
    "alignment_backpropagation": (
        "gmm_alignment.yaml",
        "thresholds.grid.rewards=[0.5]",
        "formulation.gradient=backpropagation",
        "formulation.num_sampling_steps=32",
        "data.means=[[-0.6, -0.3], [0.6, -0.3], [0.0, 0.7]]",
        "data.stds=[0.6, 0.6, 0.6]",
        "primal.lr=2.0e-3",
        "dual.step_size=0.1",
    ),
    "unlearn_reverse_kl": ("gmm_unlearn_reverse_kl.yaml", "thresholds.grid.sets=[3.0]"),
    "composition_or": ("gmm_composition_or.yaml",),
    "unlearn_forward_kl": ("gmm_unlearn_forward_kl.yaml",),
    "unlearn_likelihood": ("gmm_unlearn_likelihood.yaml",),
    "duo": ("gmm_duo.yaml", "thresholds.grid.sets=[0.2]"),
}
# Weights trained on the composed law: what they miss of it is counted in nats, for the divergences of one model hardly vary
# from sample to sample and standard errors of 0.001 nats would judge the network, not the method.
STUDENTS: dict[str, tuple[str, ...]] = {
    "composition_and_distilled": ("gmm_composition_and.yaml", *DISTILLED),
    "composition_or_trained": (
        "gmm_composition_or.yaml",
        *STUDENT,
        "primal.steps=2000",
        "primal.constraint_batch_size=256",
        "dual.primal_steps_per_dual_step=40",
        "measure.num_samples=512",
    ),
    "unlearn_reverse_kl_distilled": (
        "gmm_unlearn_reverse_kl.yaml",
        *DISTILLED[1:],
        "thresholds.grid.sets=[3.0]",
        "dual.step_size=0.05",
    ),
}
ALWAYS = ("baselines.unconstrained=false", "baselines.fixed_weights=[]")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--only", help="comma-separated formulations; default: all, without students")
    parser.add_argument("--students", action="store_true", help="networks that learn a composed law instead")
    options = parser.parse_args()
    known = FORMULATIONS | STUDENTS
    chosen = options.only.split(",") if options.only else list(STUDENTS if options.students else FORMULATIONS)
    jobs = [
        Job(name, known[name][0], seed, (*ALWAYS, *known[name][1:])) for seed in range(options.seeds) for name in chosen
    ]
    console, start = Console(width=150), time.perf_counter()
    found: dict[str, list[Finished]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        for finished in run_all(jobs, Path(folder), processes=options.processes):
            found[finished.job.name].append(finished)
            console.print(_line(finished), highlight=False)
    judged, students = ({n: runs for n, runs in found.items() if n in of} for of in (FORMULATIONS, STUDENTS))
    for title, part in (("Trained models against closed forms", judged), ("Students of composed laws", students)):
        if part:
            console.print(_table(part, title))
    console.print(
        f"{len(jobs)} runs in {(time.perf_counter() - start) / 60:.1f} minutes, {options.processes} processes"
    )
    closing_line("oracles", _figures(judged, students))


def _line(finished: Finished) -> str:
    parts = []
    for result in finished.results:
        exact, settled = result["exact_multipliers"], result["averaged_multipliers"]
        errors, violations = multiplier_errors(result), violations_in_se(result)
        for name, value in exact.items():
            violation, stderr = violations[name]
            parts.append(
                f"{name} {settled[name]:.4f} (exact {value:.4f}, {100 * errors[name]:.1f} %) "
                f"violation {violation:+.4f} = {violation / stderr:+.1f} s.e."
            )
    times = f"{finished.pretrain_seconds:.0f} + {finished.seconds:.0f} s"
    return f"{finished.job.name} seed {finished.job.seed} [{times}]: " + "; ".join(parts)


def _pooled(runs: list[Finished]) -> list[float]:
    """Mean violation over seeds in its own standard errors, one a point and constraint."""
    values = defaultdict(list)
    for run in runs:
        for result in run.results:
            for name, pair in violations_in_se(result).items():
                values[result["trial_id"], name].append(pair)
    pooled = []
    for pairs in values.values():
        violations, stderrs = np.array(pairs).T
        mean, between = mean_and_error(violations)
        own = np.sqrt((stderrs**2).mean() / len(stderrs))  # between seeds, few of them, may come out too small by luck
        pooled.append(mean / max(own, 0.0 if np.isnan(between) else between))
    return pooled


def _worst(runs: list[Finished]) -> tuple[float, float]:
    """Largest multiplier error and largest violation in standard errors over points, constraints and seeds."""
    results = [result for run in runs for result in run.results]
    errors = [error for result in results for error in multiplier_errors(result).values()]
    held = [violation / stderr for result in results for violation, stderr in violations_in_se(result).values()]
    return max(errors), max(held)


def _table(found: dict[str, list[Finished]], title: str) -> Table:
    table = Table(title=title)
    for column in (
        "formulation", "constraint", "exact", "multiplier over seeds", "worst error", "objective", "exact objective",
        "worst violation / s.e.", "pooled / s.e.", "s a run",
    ):  # fmt: skip
        table.add_column(column, justify="left" if column in ("formulation", "constraint") else "right")
    for name, runs in found.items():
        error, held = _worst(runs)
        for index, first in enumerate(runs[0].results):
            same = [run.results[index] for run in runs]
            objective = mean_and_error([result["objective"]["value"] for result in same])
            for number, (constraint, exact) in enumerate(first["exact_multipliers"].items()):
                settled = mean_and_error([result["averaged_multipliers"][constraint] for result in same])
                head = index == number == 0
                table.add_row(
                    name if head else "",
                    constraint,
                    f"{exact:.4f}",
                    f"{settled[0]:.4f} +- {settled[1]:.4f}",
                    f"{100 * error:.1f} %" if head else "",
                    f"{objective[0]:.4f} +- {objective[1]:.4f}" if number == 0 else "",
                    f"{first['exact_objective']:.4f}" if number == 0 else "",
                    f"{held:+.2f}" if head else "",
                    f"{max(_pooled(runs)):+.2f}" if head else "",
                    f"{np.mean([run.pretrain_seconds + run.seconds for run in runs]):.0f}" if head else "",
                )
    return table


def _figures(found: dict[str, list[Finished]], students: dict[str, list[Finished]]) -> dict[str, float]:
    figures: dict[str, float] = {}
    if found:
        worst = {name: _worst(runs) for name, runs in found.items()}
        violations = [pair for runs in found.values() for pair in _violations(runs)]
        figures = {
            "formulations": len(found),
            "worst_multiplier_error": max(error for error, _ in worst.values()),
            "worst_violation_in_se": max(held for _, held in worst.values()),
            "worst_pooled_violation_in_se": max(max(_pooled(runs)) for runs in found.values()),
            "violations_above_2_se": sum(violation > 2 * stderr for violation, stderr in violations),
            "constraints_judged": len(violations),
            **{name: error for name, (error, _) in worst.items()},
        }
    if students:
        figures |= {
            "students_worst_multiplier_error": max(_worst(runs)[0] for runs in students.values()),
            "students_worst_violation_nats": max(v for runs in students.values() for v, _ in _violations(runs)),
            **{name: _worst(runs)[0] for name, runs in students.items()},
        }
    return figures


def _violations(runs: list[Finished]) -> list[tuple[float, float]]:
    return [pair for run in runs for result in run.results for pair in violations_in_se(result).values()]


if __name__ == "__main__":
    main()
