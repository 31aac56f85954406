"""Wall time of a sweep against a bare loop of the same steps, against a Train run a trial, and against a process a point.

All train the same points of the main job (examples/digits_fairness.yaml) from the same pretrained model, on the same cores:

* sweep: `dualsweep` as it is: Ray, warm worker groups, DualServer with its journal, checkpoints, MLflow, report.
* in_process: the same sweep with `compute.workers=0`: no Ray Train, the loop runs in Tune's own actors.
* bare: one process a core with its share of the points; primal steps, share measurement and dual rule, nothing else. Its
  time leaves out imports and loading. `bare_evaluated` is the same with the evaluation and saving of every trained model.
* plain: Ray's documented pattern with Ray's own settings: a Tune function trial that starts a new Train run. Its workers
  evaluate and save as ours; nothing is journalled, tracked or reported.
* shell: one process a point, as many at a time as cores, the way the papers' code sweeps.

Beside wall time, the processor time of all processes is printed, sampled: on a machine that others use too it is the steadier
number, and `processor_*_N` are the same ratios in it (of the bare loops their imports are left out, of the rest nothing).

`efficiency_N` is bare over sweep for N trials, everything that a sweep does from its first line to its report counted
against it; `efficiency_evaluated_N` counts the evaluation as work, `efficiency_in_process_N` is bare over in_process.
`speedup_vs_plain_N` and `speedup_vs_shell_N` are wall time over the sweep's. The medians of the ratios are taken, every repeat
running all of them in turn, in the opposite order every second time; the spread is printed.

    python benchmarks/sweep_efficiency.py [--trials 8] [--steps 200] [--samples 3000] [--repeats 3] [--only sweep bare]
    python benchmarks/sweep_efficiency.py --trials 32 --only bare sweep

On two free cores a primal step takes 50 ms. A repeat of 8 trials takes about 6 minutes (bare 1, sweep 1.5, bare_evaluated 1.5,
plain 2, shell 2), so that `speedup_vs_plain_8` needs `--only sweep plain` and 10 minutes for three repeats; one of 32
trials of bare and sweep, which gives `efficiency_32`, takes about 8 minutes, three of them 24 (estimated from the time of a step).
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import torch
from _harness import closing_line, own_folder, spread

from dualsweep.constraints import Constraint, Problem
from dualsweep.orchestration.config import SweepConfig, load_config
from dualsweep.orchestration.journal import read_journal
from dualsweep.orchestration.local_dual import LocalDual
from dualsweep.trainers.assignment import Assignment
from dualsweep.trainers.batches import BatchLoader
from dualsweep.trainers.loop import run_trial
from dualsweep.trainers.methods import METHODS, StreamSums
from dualsweep.trainers.metrics import mean_and_stderr, shard_counts
from dualsweep.trainers.primal import primal_step
from dualsweep.trainers.results import evaluate_trial, trial_summary
from dualsweep.trainers.state import TrainState
from dualsweep.trainers.workspace import Workspace

EXAMPLE = Path(__file__).parents[1] / "examples" / "digits_fairness.yaml"
CORES = len(os.sched_getaffinity(0))


def main_job(storage: Path, name: str, trials: int, steps: int, samples: int) -> list[str]:
    """Overrides of the example: the grid's number of points, the steps of each, a short pretraining that all share."""
    grid = ",".join(f"{0.05 + 0.15 * i / max(1, trials - 1):.4f}" for i in range(trials))
    return [
        f"storage={storage}", f"name={name}", f"primal.steps={steps}", "pretrain.steps=60", "baselines.fixed_weights=[]",
        "baselines.unconstrained=false", f"evaluation.num_samples={samples}", f"compute.concurrent_trials={CORES}", f"thresholds.grid.minority=[{grid}]",
    ]  # fmt: skip


def points_of(config: SweepConfig, base_dir: Path, folder: Path) -> list[Assignment]:
    return [
        Assignment(
            trial_id=f"point-{i}", label=f"point-{i}", kind="constrained", attempt=1, fixed_weight=None,
            thresholds=dict.fromkeys(("digit_4", "digit_5", "digit_7"), value), trial_dir=str(folder / f"point-{i}"),
            base_dir=str(base_dir), handed_over=time.time(),
        )
        for i, value in enumerate(config.thresholds.form["grid"]["minority"])
    ]  # fmt: skip


def bare_trial(workspace: Workspace, point: Assignment, *, evaluate: bool) -> None:
    """The steps of one trial and nothing else: no reports, checkpoints, journal or tracking."""
    config = workspace.config
    base = workspace.load_base(Path(point.base_dir))
    names, optimizer, interval = (
        workspace.constraint_names,
        config["primal"],
        config["dual"]["primal_steps_per_dual_step"],
    )
    method = METHODS[config["method"]](workspace.setting(names, optimizer))
    workspace.fill(base)
    trained, ema = workspace.modules()
    train = TrainState(trained, ema, optimizer, workspace.accelerator.scaler)
    unit = config["thresholds"]["unit"]
    constraints = tuple(Constraint(name=n, unit=unit, threshold=point.thresholds[n], metric=unit) for n in names)
    problem = Problem(
        method="fairness", objective=method.objective_name, constraints=constraints, domain=method.domain(constraints)
    )
    dual = LocalDual()
    rule = SweepConfig.from_dict(config).dual.rule_config()
    start = [config["dual"]["start"]] * len(names)
    reply = dual.begin("t", 1, problem=problem.to_dict(), rule=rule, start=start, dual_state=None)
    multipliers = torch.tensor(reply.multipliers)
    streams = workspace.streams(method, optimizer, config["seed"])
    shards, sums, window = list(streams.shards_of(0, 1)), StreamSums(1 + len(names), workspace.device), []
    batches = BatchLoader(streams, shards, workspace.tensors, workspace.device, steps=optimizer["steps"])
    trained.train()
    while train.primal_step < optimizer["steps"]:
        (batch,) = batches.take(train.primal_step)
        norm = primal_step(
            train,
            method,
            batch,
            multipliers,
            accelerator=workspace.accelerator,
            grad_clip=optimizer["grad_clip"],
            sums=sums,
        )
        if train.primal_step % interval:
            continue
        drawn = method.measure(
            ema, multipliers, counter=train.dual_step, shards=shards,
            counts=shard_counts(config["measure"]["num_samples"], optimizer["num_shards"]),
            num_sampling_steps=config["measure"]["num_sampling_steps"],
        )  # fmt: skip
        window = [*window, drawn.rows][-config["measure"]["window"] :]
        measured = method.measurement(np.concatenate(window), multipliers.numpy()).canonical(constraints)
        objective, stderr = mean_and_stderr(*sums.table.numpy()[0])
        train.dual_step += 1
        numbers = {"lr": train.lr, "grad_norm": float(norm), "objective": objective, "objective_stderr": stderr}
        counters = {"primal_step": train.primal_step, "workers": 1, "wall_time": time.time(), "lagrangian": objective}
        metrics = {"metrics": measured.metrics, "metric_stderrs": measured.stderrs, "counts": measured.counts}
        reply = dual.report("t", 1, train.dual_step, {**numbers, **counters, **metrics})
        multipliers.copy_(torch.tensor(reply.multipliers))
        sums.reset()
    if evaluate:
        summary = trial_summary(
            workspace, method, point, problem, reply, status="completed", reason=None, rows=[], primal_steps=0, dual_steps=0
        )  # fmt: skip
        evaluate_trial(workspace, method, summary, problem, reply, dual.trace("t"), Path(point.trial_dir))


# -- the processes that are timed; each is this file again, with a part to play ------------------------------------------


def play_sweep(config: SweepConfig, points: list[Assignment]) -> None:
    from rich.console import Console

    from dualsweep.orchestration.sweep import run_sweep

    called = time.time()
    outcome = run_sweep(config, console=Console(quiet=True))
    if outcome.status != "completed":
        raise RuntimeError(f"the sweep ended as {outcome.status}: {outcome.failed}")
    results = [json.loads(path.read_text()) for path in (outcome.folder / "trials").glob("*/result.json")]
    in_trials = sum(result["wall_seconds"] for result in results)
    starting = sorted(result["startup_seconds"] for result in results)
    records = read_journal(outcome.folder / "journal.jsonl")
    handed = min(record["assignment"]["handed_over"] for record in records if record["kind"] == "assign")
    steps = [record["row"]["wall_time"] for record in records if record["kind"] == "step"]
    now = time.time()
    print(
        f"imports {called - psutil.Process().create_time():.1f} s, to the first hand-over {handed - called:.1f} s, to the first dual "
        f"step {min(steps) - handed:.1f} s, to the last {max(steps) - min(steps):.1f} s, to the end {now - max(steps):.1f} s; in "
        f"trials {in_trials:.1f} s, their start-up {starting[0]:.2f} s to {starting[-1]:.2f} s each",
        flush=True,
    )


def play_bare(config: SweepConfig, points: list[Assignment], *, evaluate: bool) -> None:
    """Prints the seconds from when all these processes were ready."""
    torch.set_num_threads(1)
    workspace = Workspace(config.to_dict(), config.data)
    workspace.load_base(Path(points[0].base_dir))
    workspace.modules(), workspace.training_labeller  # kept from trial to trial
    print("ready", flush=True)
    sys.stdin.readline()
    start = time.perf_counter()
    for point in points:
        bare_trial(workspace, point, evaluate=evaluate)
    print(time.perf_counter() - start, flush=True)


def play_shell(config: SweepConfig, points: list[Assignment]) -> None:
    torch.set_num_threads(1)
    run_trial(Workspace(config.to_dict(), config.data), points[0], LocalDual())


def play_plain(config: SweepConfig, points: list[Assignment]) -> None:
    import ray
    from ray import tune
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    from dualsweep.orchestration.cluster import leave_repository_root

    folder = Path(points[0].trial_dir).parent
    leave_repository_root()
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # else a token is left in the home folder
    ray.init(address="local", num_cpus=CORES, log_to_driver=False)

    def trial(given: dict) -> None:
        point = points[given["index"]]
        TorchTrainer(
            lambda job: play_shell(SweepConfig.from_dict(job["config"]), [Assignment(**job["point"])]),
            train_loop_config={"config": config.to_dict(), "point": point.to_dict()},
            scaling_config=ScalingConfig(num_workers=1),
            run_config=RunConfig(name=point.trial_id, storage_path=str(folder / "train")),
        ).fit()

    results = tune.Tuner(
        tune.with_resources(trial, {"memory": 1e6}),
        param_space={"index": tune.grid_search(list(range(len(points))))},
        tune_config=tune.TuneConfig(max_concurrent_trials=CORES),
        run_config=tune.RunConfig(name="plain", storage_path=str(folder), verbose=0),
    ).fit()
    if results.errors:
        raise RuntimeError(str(results.errors[0]))
    ray.shutdown()


# -- timing them -----------------------------------------------------------------------------------------------------


def start(part: str, config_path: Path, numbers: list[int], folder: Path) -> subprocess.Popen:
    command = [sys.executable, __file__, "--play", part, str(config_path), str(folder), *map(str, numbers)]
    with open(folder.with_suffix(".log"), "a", encoding="utf-8") as log:
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True)


def ended(process: subprocess.Popen, folder: Path) -> str:
    said = process.communicate()[0]
    if process.returncode:
        raise RuntimeError(f"{folder.name} failed:\n{folder.with_suffix('.log').read_text(encoding='utf-8')[-3000:]}")
    return said.strip().splitlines()[-1] if said.strip() else ""


class Processor(threading.Thread):
    """Processor seconds of all processes that descend from this one, those that end meanwhile included."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.over = threading.Event()
        self._here = psutil.Process()
        self._seen: dict[tuple[int, float], float] = {}
        self.reset()

    def reset(self) -> None:
        """What was computed until now does not count."""
        self._look()
        self._before = dict(self._seen)

    def seconds(self) -> float:
        self._look()
        return sum(spent - self._before.get(key, 0.0) for key, spent in self._seen.items())

    def run(self) -> None:
        while not self.over.wait(0.5):
            self._look()

    def _look(self) -> None:
        for process in self._here.children(recursive=True):
            with contextlib.suppress(psutil.Error):
                times = process.cpu_times()
                self._seen[process.pid, process.create_time()] = times.user + times.system


def timed(part: str, config_path: Path, trials: int, folder: Path) -> tuple[float, float]:
    """Wall and processor seconds of all points by one way of training them."""
    processor = Processor()
    processor.start()
    try:
        return wall_seconds(part, config_path, trials, folder, processor), processor.seconds()
    finally:
        processor.over.set()
        processor.join()


def wall_seconds(part: str, config_path: Path, trials: int, folder: Path, processor: Processor) -> float:
    began = time.perf_counter()
    if part in ("sweep", "in_process", "plain"):
        said = ended(start(part, config_path, list(range(trials)), folder), folder)
        print(f"  {part}: {said}" if said else "", end="\n" if said else "")
    elif part == "shell":
        waiting, running = list(range(trials)), []
        while waiting or running:
            while waiting and len(running) < CORES:
                running.append(start(part, config_path, [waiting.pop(0)], folder))
            over = [process for process in running if process.poll() is not None]
            for process in over:
                ended(process, folder)
            running = [process for process in running if process not in over]
            time.sleep(0.02)
    else:
        processes = [start(part, config_path, list(range(core, trials, CORES)), folder) for core in range(CORES)]
        for process in processes:
            if process.stdout.readline().strip() != "ready":
                ended(process, folder)
        processor.reset()  # imports and loading are not the loop's
        for process in processes:
            process.stdin.write("go\n")
            process.stdin.flush()
        return max(float(ended(process, folder)) for process in processes)
    return time.perf_counter() - began


def play(part: str, config_path: str, folder: str, *numbers: str) -> None:
    """What a timed process does."""
    config = SweepConfig.from_dict(json.loads(Path(config_path).read_text(encoding="utf-8")))
    base_dir = Path(config.storage) / "bases" / config.base_key()
    points = points_of(config, base_dir, Path(folder))
    points = [points[int(number)] for number in numbers]
    if part in ("sweep", "in_process"):
        play_sweep(config, points)
    elif part == "plain":
        play_plain(config, points)
    elif part == "shell":
        play_shell(config, points)
    else:
        play_bare(config, points, evaluate=part == "bare_evaluated")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=8)
    parser.add_argument("--steps", type=int, default=200, help="primal steps a trial; the example's own are 700")
    parser.add_argument(
        "--samples", type=int, default=3000, help="of each trial's evaluation; the example's own are 3000"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parts = ["bare", "sweep", "in_process", "bare_evaluated", "plain", "shell"]
    parser.add_argument("--only", nargs="+", choices=parts, default=parts)
    options = parser.parse_args()
    taken: dict[str, list[tuple[float, float]]] = {part: [] for part in options.only}
    with own_folder() as root:
        base = load_config(EXAMPLE, main_job(root, "first", 1, 30, 64), environment=False)
        (root / "first.json").write_text(json.dumps(base.to_dict()), encoding="utf-8")
        timed("sweep", root / "first.json", 1, root / "first-run")  # trains the pretrained model that all share
        for repeat in range(options.repeats):
            for part in options.only[:: -1 if repeat % 2 else 1]:
                name = f"{part}-{repeat}"
                overrides = main_job(root, name, options.trials, options.steps, options.samples)
                overrides += ["compute.workers=0"] if part == "in_process" else []
                config = load_config(EXAMPLE, overrides, environment=False)
                path = root / f"{name}.json"
                path.write_text(json.dumps(config.to_dict()), encoding="utf-8")
                taken[part].append(timed(part, path, options.trials, root / f"{name}-run"))
                said = "{:7.1f} s, processor {:7.1f} s".format(*taken[part][-1])
                print(f"{part:15} {options.trials} trials of {options.steps} steps: {said}", flush=True)
    figures = {}
    over = {
        "efficiency": ("bare", "sweep"), "efficiency_evaluated": ("bare_evaluated", "sweep"), "efficiency_in_process": ("bare", "in_process"),
        "speedup_vs_plain": ("plain", "sweep"), "speedup_vs_shell": ("shell", "sweep"),
    }  # fmt: skip
    for name, parts in over.items():
        for clock, prefix in enumerate(("", "processor_")):
            ratios = [a[clock] / b[clock] for a, b in zip(*(taken.get(part, []) for part in parts), strict=False)]
            if ratios:
                figures[f"{prefix}{name}_{options.trials}"] = statistics.median(ratios)
                print(f"{prefix}{name}_{options.trials}: {spread(ratios, '', 3)}", flush=True)
    for part, values in taken.items():
        if values:
            figures[f"{part}_s_{options.trials}"] = statistics.median(wall for wall, _ in values)
    closing_line("sweep_efficiency", figures)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--play"]:
        play(*sys.argv[2:])
    else:
        main()
