"""What a trial costs beside its training, as trials and nodes become many.

Sweeps of the real thing (Tune, DualServer with its journal, watcher, MLflow, report) on a cluster of several raylets on this
machine; only the worker groups are stand-ins, a thread in Tune's actor that takes assignments, reports dual steps without
training and ends the trial. The overhead of a trial is the time from handing over the first one to the end of the sweep, its
report and deliveries included, over the number of trials. `growth_N_M` is the overhead a trial at N trials over that at M,
on the same nodes; `growth_nodes_A_B` at A nodes over that at B, the same trials. Unique memory is that of the driver and of
the DualServer at the end, MiB.

    python benchmarks/scale.py [--trials 50 1000] [--nodes 4] [--many-nodes 8] [--dual-steps 20]
"""

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import ray
from _harness import closing_line, own_folder
from ray.cluster_utils import Cluster
from rich.console import Console

from dualsweep.constraints import Constraint, Problem
from dualsweep.orchestration import trial as trial_module
from dualsweep.orchestration.cluster import quiet_environment
from dualsweep.orchestration.config import SweepConfig, load_config
from dualsweep.orchestration.dual_server import find_dual_server
from dualsweep.orchestration.journal import read_journal
from dualsweep.orchestration.sweep import run_sweep
from dualsweep.trainers.workspace import write_json

EXAMPLE = Path(__file__).parents[1] / "examples" / "digits_fairness.yaml"
NAMES = ("digit_4", "digit_5", "digit_7")
SLOTS = 4


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
            # As a trial that a scheduler stopped: everything but an evaluation, which is the trial's own work.
            kept = {key: given[key] for key in ("trial_id", "label", "kind", "thresholds", "fixed_weight")}
            multipliers = dict(zip(NAMES, reply.multipliers, strict=True))
            nothing = dict.fromkeys(
                ("error", "reason", "exact_multipliers", "exact_objective", "objective", "certificate", "histogram", "calibration")
            )  # fmt: skip
            result = {
                **kept, **nothing, "status": "stopped", "method": config.method, "unit": "share", "multipliers": multipliers,
                "averaged_multipliers": multipliers, "relaxations": {}, "primal_steps": 10 * dual_steps, "dual_steps": dual_steps,
                "wall_seconds": 0.1, "startup_seconds": 0.01, "constraints": [],
            }  # fmt: skip
            server.end(finished, attempt, "stopped", result=result)


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
        "a_trial_s": (end - min(assigned)) / trials,
        "handed_over_s": handing / max(1, trials - 1),
        "driver_mib": unique_mib(psutil.Process()),
        "server_mib": memory.largest,
    }


def play(nodes: str, trials: str, dual_steps: str, folder: str) -> None:
    """One sweep on a cluster of its own, in a process of its own; prints what it found."""
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    quiet_environment()
    head = {"num_cpus": 0, "include_dashboard": True, "dashboard_port": None}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        for _ in range(int(nodes)):
            cluster.add_node(num_cpus=max(1, SLOTS // int(nodes)))
        cluster.wait_for_nodes()
        trial_module.SweepTrial = StandInTrial
        found = sweep(cluster.address, Path(folder), f"n{nodes}-t{trials}", int(trials), int(dual_steps))
    finally:
        ray.shutdown()
        cluster.shutdown()
    print(json.dumps(found))


def timed(nodes: int, trials: int, dual_steps: int, folder: Path) -> dict[str, float]:
    command = [sys.executable, __file__, "--play", str(nodes), str(trials), str(dual_steps), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    found = json.loads(done.stdout.strip().splitlines()[-1])
    print(
        f"{nodes} nodes, {trials:5} trials: {1e3 * found['a_trial_s']:7.1f} ms a trial to the end, {1e3 * found['handed_over_s']:7.1f} ms "
        f"between handing over; driver {found['driver_mib']:.0f} MiB, DualServer {found['server_mib']:.0f} MiB",
        flush=True,
    )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--trials", type=int, nargs="+", default=[50, 200, 1000], help="rising; growth is over the first"
    )
    parser.add_argument("--nodes", type=int, default=4)
    parser.add_argument("--many-nodes", type=int, default=8, help="the smallest sweep again on so many; 0: not")
    parser.add_argument("--dual-steps", type=int, default=20, help="of each trial")
    options = parser.parse_args()
    figures: dict[str, float] = {}
    with own_folder() as folder:
        first = options.trials[0]
        found = {trials: timed(options.nodes, trials, options.dual_steps, folder) for trials in options.trials}
        for trials in options.trials[1:]:
            figures[f"growth_{trials}_{first}"] = found[trials]["a_trial_s"] / found[first]["a_trial_s"]
        if options.many_nodes:
            many = timed(options.many_nodes, first, options.dual_steps, folder)
            figures[f"growth_nodes_{options.many_nodes}_{options.nodes}"] = (
                many["a_trial_s"] / found[first]["a_trial_s"]
            )
    last = found[options.trials[-1]]
    figures |= {f"{key}_{options.trials[-1]}": last[key] for key in ("a_trial_s", "driver_mib", "server_mib")}
    closing_line("scale", figures)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--play"]:
        play(*sys.argv[2:])
    else:
        main()
