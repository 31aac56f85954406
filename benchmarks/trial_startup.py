"""Start-up of a trial: warm worker groups against a new Ray Train run for each trial, side by side in one run.

Both sweeps have the same trials, one slot and one worker. `reused_s` is the median, over the trials after the first, of the
time from Tune handing over the grid point to the first primal step, as the workers record it in result.json.
`fresh_s` is the same span for the plain pattern of Ray's documentation: a Tune function trial that starts a TorchTrainer,
whose workers build the same workspace and take the same first primal step.

    python benchmarks/trial_startup.py [--trials 5]
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import ray
from _harness import closing_line, spread
from ray import tune
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from rich.console import Console

from dualsweep.orchestration.cluster import start_ray, stop_ray
from dualsweep.orchestration.config import SweepConfig, load_config
from dualsweep.orchestration.local_dual import LocalDual
from dualsweep.orchestration.sweep import run_sweep
from dualsweep.trainers.assignment import Assignment
from dualsweep.trainers.loop import run_trial
from dualsweep.trainers.workspace import Workspace


def small_job(storage: str, trials: int) -> SweepConfig:
    """The main job's model and batches, few steps: start-up is what is measured."""
    overrides = [
        f"storage={storage}", "name=startup", "primal.steps=20", "primal.warmup_steps=2", "pretrain.steps=20", "pretrain.warmup_steps=2",
        "evaluation.num_samples=16", "evaluation.noise_levels=4", "baselines.fixed_weights=[]", "baselines.unconstrained=false",
        "compute.concurrent_trials=1", f"thresholds.grid.minority=[{','.join(str(round(0.05 + 0.02 * i, 2)) for i in range(trials))}]",
    ]  # fmt: skip
    return load_config(Path(__file__).parents[1] / "examples" / "digits_fairness.yaml", overrides, environment=False)


def reused(config: SweepConfig) -> list[float]:
    outcome = run_sweep(config, console=Console(quiet=True))
    results = [json.loads(path.read_text()) for path in (outcome.folder / "trials").glob("*/result.json")]
    by_start = sorted(result["startup_seconds"] for result in results)
    return by_start[:-1]  # the slot's first trial waits for its worker group and for the pretrained model


def fresh_loop(job: dict) -> None:
    """One trial as a Train run of its own; stops after the first dual interval like the warm one's."""
    config = SweepConfig.from_dict(job["config"])
    workspace = Workspace(config.to_dict(), config.data)
    assignment = Assignment(**job["assignment"])
    result = run_trial(workspace, assignment, LocalDual())
    Path(job["out"]).write_text(str(result["startup_seconds"]), encoding="utf-8")


def fresh(config: SweepConfig, base_dir: Path, folder: Path, trials: int) -> list[float]:
    start_ray(num_cpus=1)

    def trial(point: dict) -> None:
        handed_over = time.time()
        name = f"fresh-{point['index']}"
        assignment = Assignment(
            trial_id=name, label=name, kind="unconstrained", attempt=1, thresholds={}, fixed_weight=None,
            trial_dir=str(folder / name), base_dir=str(base_dir), handed_over=handed_over,
        )  # fmt: skip
        TorchTrainer(
            fresh_loop,
            train_loop_config={
                "config": config.to_dict(),
                "assignment": assignment.to_dict(),
                "out": str(folder / f"{name}.txt"),
            },
            scaling_config=ScalingConfig(num_workers=1),
            run_config=RunConfig(name=name, storage_path=str(folder / "train")),
        ).fit()

    tuner = tune.Tuner(
        tune.with_resources(trial, {"memory": 1e6}),
        param_space={"index": tune.grid_search(list(range(trials)))},
        tune_config=tune.TuneConfig(max_concurrent_trials=1),
        run_config=tune.RunConfig(name="fresh", storage_path=str(folder), verbose=0),
    )
    tuner.fit()
    stop_ray()
    return [float(path.read_text()) for path in sorted(folder.glob("fresh-*.txt"))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        config = small_job(folder, options.trials + 1)
        warm = reused(config)
        base_dir = Path(folder) / "bases" / config.base_key()
        cold = fresh(config, base_dir, Path(folder), min(options.trials, 4))
    ray.shutdown()
    print(f"reused  {spread(warm)}")
    print(f"fresh   {spread(cold)}")
    closing_line(
        "trial_startup",
        {
            "reused_s": statistics.median(warm),
            "fresh_s": statistics.median(cold),
            "ratio": statistics.median(cold) / statistics.median(warm),
        },
    )


if __name__ == "__main__":
    main()
