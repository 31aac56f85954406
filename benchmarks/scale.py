"""What a trial costs beside its training, as trials and nodes become many.

Sweeps of the real thing (Tune, DualServer with its journal, watcher, MLflow, report) on a cluster of several raylets on this
machine; only the worker groups are stand-ins, a thread in Tune's actor that takes assignments, reports dual steps without
training and ends the trial as completed, with constraints, certificate and samples to look at. T(N) is the time from handing
over the first trial to the end of the sweep of N trials, its report and deliveries included.

`marginal_N_M_L` is the cost of one more trial among many over that among few, (T(N) - T(M)) / (N - M) over
(T(M) - T(L)) / (M - L), which costs of the whole sweep leave alone; `growth_N_M` is T(N) / N over T(M) / M, which they flatter;
`growth_nodes_A_B` is T(M) at A nodes over that at B. Sizes but the largest are repeated, in turn, on one cluster, after a
sweep that does not count; medians are taken and the spread is printed. Unique memory is that of the driver and of the
DualServer at the end of the largest sweep, MiB; the driver's holds what the sweeps before it left.

    python benchmarks/scale.py [--trials 10 50 1000] [--repeats 3] [--nodes 4] [--many-nodes 8] [--dual-steps 20]

On two free cores a trial costs 0.2 to 0.4 s and a sweep some 5 s besides: 6 to 9 minutes as it stands, `--many-nodes 8` 2 to 3
more. On a machine that others use too, shorten it: `--trials 10 50 300 --dual-steps 10`.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import ray
from _harness import closing_line, own_folder, spread
from ray.cluster_utils import Cluster
from rich.console import Console

from dualsweep.constraints import Constraint, DualState, Problem, certify
from dualsweep.orchestration import trial as trial_module
from dualsweep.orchestration.cluster import quiet_environment
from dualsweep.orchestration.config import SweepConfig, load_config
from dualsweep.orchestration.dual_server import find_dual_server
from dualsweep.orchestration.journal import read_journal
from dualsweep.orchestration.sweep import run_sweep
from dualsweep.trainers.dual_client import Reply
from dualsweep.trainers.workspace import write_json

EXAMPLE = Path(__file__).parents[1] / "examples" / "digits_fairness.yaml"
NAMES = ("digit_4", "digit_5", "digit_7")
SLOTS = 4
SLOTS_UP_S = 60.0
SAMPLES = np.random.default_rng(0).uniform(-1, 1, size=(40, 1, 8, 8)).astype(np.float32)


class StandInGroup:
    """A worker group that trains nothing: the reports of `dual_steps` dual steps, one after the other, and an end."""

    def __init__(self, slot: str, config: SweepConfig, folder: Path) -> None:
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._serve, args=(slot, config, folder), daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def join(self) -> None:
        self._thread.join(60)

    def _serve(self, slot: str, config: SweepConfig, folder: Path) -> None:
        server, finished = find_dual_server(folder), None
        _wait_for_all(folder / "slots", slot)
        while (given := server.lease(slot, finished)) is not None:
            constraints = tuple(Constraint(name=n, unit="share", threshold=given["thresholds"][n]) for n in NAMES)
            problem = Problem(method="fairness", objective="loss", constraints=constraints)
            finished, attempt = given["trial_id"], given["attempt"]
            server.begin(
                finished, attempt, problem=problem.to_dict(), rule=config.dual.rule_config(), start=[0.25] * 3, dual_state=None
            )  # fmt: skip
            dual_steps = config.primal.steps // config.dual.primal_steps_per_dual_step
            for step in range(1, dual_steps + 1):
                numbers = {"lr": 1e-3, "grad_norm": 0.1, "objective": 0.5, "objective_stderr": 0.01, "lagrangian": 0.5}
                counters = {"primal_step": 10 * step, "workers": 1, "wall_time": time.time()}
                metrics = {"metrics": [2.3] * 3, "metric_stderrs": [0.1] * 3, "counts": [96] * 3}
                reply = server.report(finished, attempt, step, {**numbers, **counters, **metrics})
            Path(given["trial_dir"]).mkdir(parents=True, exist_ok=True)
            np.save(Path(given["trial_dir"]) / "samples.npy", SAMPLES)
            counters = {"primal_steps": 10 * dual_steps, "dual_steps": dual_steps}
            server.end(finished, attempt, "completed", result=result_of(given, problem, reply) | counters)


def _wait_for_all(folder: Path, slot: str) -> None:
    """No trial ends before all slots are up, as where trials take longer than an actor's start.

    Tune gives the actor of a trial that ended to one whose own actor still starts, and kills that: trials of a moment would
    keep one actor busy, and both cores with starting others in vain.
    """
    folder.mkdir(exist_ok=True)
    (folder / slot).touch()
    deadline = time.monotonic() + SLOTS_UP_S
    while len(list(folder.iterdir())) < SLOTS and time.monotonic() < deadline:
        time.sleep(0.05)


def result_of(given: dict[str, Any], problem: Problem, reply: Reply) -> dict[str, Any]:
    """The result of a trial that was evaluated: each share a little above what was asked, a cost that rises with it."""
    asked = np.array([given["thresholds"][name] for name in NAMES])
    violation, stderr, count = np.full(3, -0.05), np.full(3, 0.02), 3000
    state = DualState.from_dict(reply.dual_state)
    objective = {"value": float(asked.sum()), "stderr": 0.01, "unit": "nats", "meaning": "stand-in"}
    rows = [
        {
            "name": constraint.name, "unit": "share", "sense": constraint.sense, "metric": constraint.canonical_threshold - 0.05,
            "metric_stderr": 0.02, "threshold": constraint.canonical_threshold, "user_threshold": constraint.threshold,
            "user_value": constraint.to_user(constraint.canonical_threshold - 0.05), "user_stderr": 0.01, "violation": -0.05,
            "stderr": 0.02, "count": count,
        }
        for constraint in problem.constraints
    ]  # fmt: skip
    histogram = {
        "classes": [f"digit_{i}" for i in range(10)], "prior": [0.1] * 10, "counts": [count // 10] * 10, "total": count,
        "classifier": "stand-in", "classifier_accuracy": 1.0, "classifier_accuracy_count": 1000,
    }  # fmt: skip
    kept = {key: given[key] for key in ("trial_id", "label", "kind", "thresholds", "fixed_weight", "start")}
    nothing = dict.fromkeys(("error", "reason", "stopped_by", "exact_multipliers", "exact_objective", "calibration"))
    multipliers = dict(zip(NAMES, reply.multipliers, strict=True))
    return {
        **kept, **nothing, "status": "completed", "method": problem.method, "unit": "share", "multipliers": multipliers,
        "averaged_multipliers": multipliers, "relaxations": dict.fromkeys(NAMES, 0.0), "wall_seconds": 0.1,
        "startup_seconds": 0.01, "objective": objective, "constraints": rows, "histogram": histogram,
        "certificate": certify(problem, state, violation, stderr, count, 0.1).to_dict(),
    }  # fmt: skip


class StandInTrial(trial_module.SweepTrial):
    """Tune's trial with a stand-in for its worker group."""

    def setup(self, config: dict) -> None:
        # In this actor's process, whether it imported the class above this one or unpickled it.
        super().setup.__func__.__globals__["WorkerGroup"] = StandInGroup
        super().setup(config)


def config_of(folder: Path, name: str, trials: int, dual_steps: int) -> SweepConfig:
    grid = ",".join(f"{0.01 + 0.29 * i / trials:.6f}" for i in range(trials))
    overrides = [
        f"storage={folder}", f"name={name}", f"primal.steps={10 * dual_steps}", "primal.warmup_steps=1",
        "baselines.unconstrained=false", "baselines.fixed_weights=[]", f"compute.concurrent_trials={SLOTS}",
        f"thresholds.grid.minority=[{grid}]",
    ]  # fmt: skip
    return load_config(EXAMPLE, overrides, environment=False)


def unique_mib(process: psutil.Process) -> float:
    return process.memory_full_info().uss / 2**20


class Memory(threading.Thread):
    """The largest unique memory of the DualServer, looked at every second."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.largest, self.over = 0.0, threading.Event()

    def run(self) -> None:
        while not self.over.wait(1.0):
            for process in psutil.process_iter(["name"]):
                try:
                    # Other users of the machine may have one as well: ours has our folder for Ray in its environment.
                    ours = (process.info["name"] or "").startswith("ray::DualServer")
                    if ours and process.environ().get("RAY_TMPDIR") == os.environ["RAY_TMPDIR"]:
                        self.largest = max(self.largest, unique_mib(process))
                except psutil.Error:
                    continue


def sweep(address: str, folder: Path, name: str, trials: int, dual_steps: int) -> dict[str, float]:
    """Seconds of overhead a trial, and memory."""
    config = config_of(folder, name, trials, dual_steps)
    base = folder / "bases" / config.base_key()
    base.mkdir(parents=True, exist_ok=True)
    write_json(base / "base.json", {"data": "stand-in"})  # nobody loads it
    memory = Memory()
    memory.start()
    outcome = run_sweep(config, address=address, console=Console(quiet=True))
    end = time.time()
    memory.over.set()
    memory.join()
    if outcome.status != "completed" or outcome.undelivered:
        raise RuntimeError(f"{name}: {outcome.status}, {outcome.failed}, undelivered {outcome.undelivered}")
    records = read_journal(outcome.folder / "journal.jsonl")
    assigned = [record["assignment"]["handed_over"] for record in records if record["kind"] == "assign"]
    ended = [path for path in (outcome.folder / "trials").glob("*/result.json")]
    if len(ended) != trials:
        raise RuntimeError(f"{name}: {len(ended)} of {trials} trials left a result")
    handing = max(assigned) - min(assigned)
    return {
        "total_s": end - min(assigned),
        "handed_over_s": handing / max(1, trials - 1),
        "driver_mib": unique_mib(psutil.Process()),
        "server_mib": memory.largest,
    }


def play(nodes: str, dual_steps: str, folder: str, *trials: str) -> None:
    """Sweeps of so many trials each, one after the other, on a cluster and in a process of their own; a line of JSON each."""
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    quiet_environment()
    head = {"num_cpus": 0, "include_dashboard": True, "dashboard_port": None}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        for _ in range(int(nodes)):
            cluster.add_node(num_cpus=max(1, SLOTS // int(nodes)))
        cluster.wait_for_nodes()
        trial_module.SweepTrial = StandInTrial
        for number, count in enumerate(trials):
            name = f"n{nodes}-t{count}-{number}"
            print(json.dumps(sweep(cluster.address, Path(folder), name, int(count), int(dual_steps))), flush=True)
    finally:
        ray.shutdown()
        cluster.shutdown()


def timed(nodes: int, trials: list[int], dual_steps: int, folder: Path) -> dict[int, list[dict[str, float]]]:
    """By number of trials what its sweeps found, without the first sweep of all, which warms the cluster."""
    command = [sys.executable, __file__, "--play", *map(str, (nodes, dual_steps, folder, trials[0], *trials))]
    found: dict[int, list[dict[str, float]]] = defaultdict(list)
    with open(folder / f"nodes-{nodes}.log", "w+", encoding="utf-8") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
        lines = (line for line in process.stdout if line.startswith('{"total_s"'))
        next(lines, None)
        for count, line in zip(trials, lines, strict=False):
            one = json.loads(line)
            found[count].append(one)
            print(
                f"{nodes} nodes, {count:5} trials: {one['total_s']:7.1f} s, {1e3 * one['total_s'] / count:7.1f} ms a trial; "
                f"{1e3 * one['handed_over_s']:7.1f} ms between handing over; driver {one['driver_mib']:.0f} MiB, "
                f"DualServer {one['server_mib']:.0f} MiB",
                flush=True,
            )
        if process.wait():
            log.seek(0)
            raise RuntimeError(f"{' '.join(command)} failed:\n{log.read()[-3000:]}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, nargs="+", default=[10, 50, 1000], help="rising, at least two")
    parser.add_argument("--repeats", type=int, default=3, help="of every size but the largest")
    parser.add_argument("--nodes", type=int, default=4)
    parser.add_argument("--many-nodes", type=int, default=0, help="the last size but one again on so many; 0: not")
    parser.add_argument("--dual-steps", type=int, default=20, help="of each trial")
    options = parser.parse_args()
    figures: dict[str, float] = {}
    *small, largest = options.trials
    with own_folder() as folder:
        found = timed(options.nodes, [*small * options.repeats, largest], options.dual_steps, folder)
        totals = {count: statistics.median(one["total_s"] for one in found[count]) for count in options.trials}
        for count in small:
            print(f"{count} trials: {spread([one['total_s'] for one in found[count]], 's', 2)}", flush=True)
        for few, count in pairwise(options.trials):
            figures[f"growth_{count}_{few}"] = (totals[count] / count) / (totals[few] / few)
        for few, some, many in zip(options.trials, options.trials[1:], options.trials[2:], strict=False):
            early = (totals[some] - totals[few]) / (some - few)
            late = (totals[many] - totals[some]) / (many - some)
            print(
                f"one more trial: {1e3 * early:.1f} ms from {few} to {some}, {1e3 * late:.1f} ms from {some} to {many}"
            )
            figures[f"marginal_{many}_{some}_{few}"] = late / early
            figures[f"marginal_s_{many}"] = late
        if options.many_nodes:
            many = timed(options.many_nodes, [small[-1]] * options.repeats, options.dual_steps, folder)[small[-1]]
            ratio = statistics.median(one["total_s"] for one in many) / totals[small[-1]]
            figures[f"growth_nodes_{options.many_nodes}_{options.nodes}"] = ratio
    figures[f"a_trial_s_{largest}"] = totals[largest] / largest
    figures |= {f"{key}_{largest}": found[largest][0][key] for key in ("driver_mib", "server_mib")}
    closing_line("scale", figures)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--play"]:
        play(*sys.argv[2:])
    else:
        main()
