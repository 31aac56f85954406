"""Sweeps of the two-dimensional laboratory without Ray: every point of an example file, several seeds, a few processes."""

import fcntl
import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dualsweep.constraints.lagrangian import above_level
from dualsweep.orchestration.config import SweepConfig, load_config, sweep_points
from dualsweep.orchestration.frontier import AdaptivePlan, FrontierPlan, PathPlan, outcome_of
from dualsweep.orchestration.local_dual import LocalDual
from dualsweep.trainers.assignment import Assignment
from dualsweep.trainers.loop import run_trial
from dualsweep.trainers.workspace import Workspace

EXAMPLES = Path(__file__).parents[1] / "examples"


@dataclass(frozen=True)
class Job:
    """One example file with overrides and a seed (of data, model, draws alike); all its points run in one process."""

    name: str
    example: str
    seed: int
    overrides: tuple[str, ...] = ()

    def config(self, folder: Path) -> SweepConfig:
        seeds = (f"seed={self.seed}", f"data.seed={self.seed}", f"storage={folder}")
        never = ("checkpoint_every_dual_steps=1000000",)  # saved: nothing is resumed here
        return load_config(EXAMPLES / self.example, [*seeds, *never, *self.overrides], environment=False)


@dataclass
class Finished:
    """What a job left."""

    job: Job
    results: list[dict[str, Any]] = field(default_factory=list)  # result.json of every point, in order
    traces: dict[str, list[dict[str, Any]]] = field(default_factory=dict)  # by trial id
    folder: Path | None = None  # holds trials/<trial id>/
    base_dir: Path | None = None
    pretrain_seconds: float = 0.0
    seconds: float = 0.0


def run(job: Job, folder: Path) -> Finished:
    """All points of a job, after the pretrained model they start from (shared with other jobs in `folder`)."""
    torch.set_num_threads(1)
    config = job.config(folder)
    workspace = Workspace(config.to_dict(), config.data)
    base_dir = folder / "bases" / config.base_key(workspace.pretraining_sets)
    done = Finished(job, folder=folder / f"{job.name}-{job.seed}", base_dir=base_dir)
    base = {"trial_id": "base", "label": "base", "kind": "base", "thresholds": {}, "fixed_weight": None}

    def train(point: dict[str, Any], dual: LocalDual) -> dict[str, Any]:
        trial_dir = str(done.folder / "trials" / point["trial_id"])
        folders = {"trial_dir": trial_dir, "base_dir": str(base_dir)}
        # `dual` is new: checkpoints of a run that was cut short have no rows in it.
        return run_trial(workspace, Assignment(**point, **folders, attempt=1, known_steps=0), dual)

    base_dir.parent.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    with open(base_dir.with_suffix(".lock"), "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (base_dir / "base.json").exists():
            train(base, LocalDual())
    done.pretrain_seconds, start = time.perf_counter() - start, time.perf_counter()
    points = sweep_points(config, workspace.constraint_names)
    frontier: FrontierPlan | None = None
    if config.sweep.order == "path":
        frontier = PathPlan(config, [point for point in points if point["kind"] == "constrained"])
    elif config.sweep.order == "adaptive":
        frontier = AdaptivePlan(config, workspace.constraint_names)
    todo = iter(points if frontier is None else [p for p in points if p["kind"] != "constrained"])
    while (point := next(todo, None) or (frontier and frontier.next())) is not None:
        dual = LocalDual()
        done.results.append(train(point, dual))
        done.traces[point["trial_id"]] = dual.trace(point["trial_id"])
        if frontier is not None:
            frontier.over(point["trial_id"], outcome_of(done.results[-1]))
    done.seconds = time.perf_counter() - start
    return done


def run_all(
    jobs: Sequence[Job], folder: Path, *, processes: int, how: Callable[[Job, Path], Finished] = run
) -> Iterator[Finished]:
    """Jobs as they finish, `processes` at a time, one thread each."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        for future in as_completed([pool.submit(how, job, folder) for job in jobs]):
            yield future.result()


def multiplier_errors(result: dict[str, Any]) -> dict[str, float]:
    """By constraint |settled - exact| / max(exact, 0.4): 0.05 is 5 %, or 0.02 in absolute terms below 0.4."""
    exact, settled = result["exact_multipliers"], result["averaged_multipliers"]
    return {name: abs(settled[name] - value) / max(value, 0.4) for name, value in exact.items()}


def violations_in_se(result: dict[str, Any]) -> dict[str, tuple[float, float]]:
    """By constraint (violation, its standard error) on fresh draws: above the level of a min-max problem or the relaxation.

    Above a level both are those of the contrast, violation less the weighted mean of all, as the certificate has them.
    """
    rows, level = result["constraints"], result["certificate"].get("level")
    names = [row["name"] for row in rows]
    violations, stderrs = (np.array([row[key] for row in rows]) for key in ("violation", "stderr"))
    if level is not None:
        # A dual-only run is judged at its averaged multipliers, a trained one at its last.
        used = min(
            ([result[kind][name] for name in names] for kind in ("multipliers", "averaged_multipliers")),
            key=lambda multipliers: abs(np.dot(multipliers, violations) - level),
        )
        violations, stderrs = above_level(used, violations, stderrs)
    violations = violations - [result["relaxations"][name] for name in names]
    return dict(zip(names, zip(violations.tolist(), stderrs.tolist(), strict=True), strict=True))


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean over seeds and its standard error."""
    values = np.asarray(values, dtype=float)
    return float(values.mean()), float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else float("nan")
