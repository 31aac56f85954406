"""A sweep under a random schedule of faults against the same sweep left in peace: the traces must be equal to the last bit.

The sweep runs on a cluster of raylets on this machine and writes to an MLflow server of its own. A fault is SIGKILL to a
training worker, to the DualServer, to a node with all its processes, to the driver (then `dualsweep resume`), or to
the MLflow server. Which comes after how many dual steps follows from the seed.

`lost_seconds_median`: over faults and the trials that were running, the time without a new dual step around the fault
(steps redone from a checkpoint are not new). Afterwards MLflow must hold one run a trial and each dual step once.

    python benchmarks/chaos.py [--seed 0] [--faults 40] [--trials 12]
"""

import argparse
import os
import signal
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from pathlib import Path

import numpy as np
import psutil
import ray
import yaml
from _harness import closing_line, own_folder
from mlflow import MlflowClient
from ray.cluster_utils import Cluster

from dualsweep.orchestration.cluster import quiet_environment
from dualsweep.orchestration.config import SweepConfig, load_config
from dualsweep.orchestration.journal import read_journal
from dualsweep.orchestration.trace import read_trace

EXAMPLE = Path(__file__).parents[1] / "examples" / "digits_fairness.yaml"
KINDS = ("worker", "dual_server", "node", "driver", "mlflow")
PATIENCE_S = 300.0
SAME = ("wall_time", "attempt")  # what a row of another run may differ in


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--faults", type=int, default=40)
    parser.add_argument("--trials", type=int, default=12)
    parser.add_argument("--dual-steps", type=int, default=300, help="of every trial")
    parser.add_argument("--keep", action="store_true", help="leave folders and logs")
    options = parser.parse_args()
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    quiet_environment()
    with own_folder(keep=options.keep) as folder:
        calm = Sweep(folder / "calm", options.trials, options.dual_steps)
        try:
            calm.start()
            calm.join()
        finally:
            calm.close()
        print(f"calm run: {calm.seconds:.0f} s", flush=True)
        stormy = Sweep(folder / "stormy", options.trials, options.dual_steps)
        try:
            stormy.start()
            faults = storm(stormy, np.random.default_rng(options.seed), options.faults)
            stormy.join()
            wrong = stormy.wrong_in_mlflow()
        finally:
            stormy.close()
        differing = differing_rows(calm.folder, stormy.folder, options.trials)
        lost = lost_seconds(stormy.folder, faults)
    print(f"stormy run: {stormy.seconds:.0f} s; faults {dict(Counter(kind for _, kind in faults))}")
    for kind, seconds in lost.items():
        if seconds:
            print(f"{kind:12} {statistics.median(seconds):6.1f} s lost (max {max(seconds):.1f}, n={len(seconds)})")
    every = [value for seconds in lost.values() for value in seconds]
    closing_line(
        "chaos",
        {
            "faults": len(faults),
            "trials": options.trials,
            "differing_rows": differing,
            "wrong_in_mlflow": wrong,
            "lost_seconds_median": statistics.median(every) if every else 0.0,
        },
    )


class Sweep:
    """One sweep on a cluster, with a driver and an MLflow server that can be killed."""

    def __init__(self, folder: Path, trials: int, dual_steps: int) -> None:
        self.root = folder
        self.dual_steps = trials * dual_steps  # of all trials together
        folder.mkdir()
        self.folder = folder / "runs" / "chaos"
        head = {"num_cpus": 0, "include_dashboard": True, "dashboard_port": None}  # None: any free port
        self.cluster = Cluster(initialize_head=True, head_node_args=head)
        self.nodes = [self.cluster.add_node(num_cpus=1) for _ in range(2)]
        self.cluster.wait_for_nodes()
        self.port = free_port()
        self.server: subprocess.Popen | None = None
        self.driver: subprocess.Popen | None = None
        config = sweep_config(folder, trials, dual_steps, f"http://127.0.0.1:{self.port}")
        self.config = folder / "chaos.yaml"
        self.config.write_text(yaml.safe_dump(config.to_dict()), encoding="utf-8")
        self.begun = time.monotonic()
        self.seconds = 0.0

    def start(self) -> None:
        self.start_server()
        self.wait_for_server()
        self.begun = time.monotonic()
        self.start_driver("sweep", str(self.config))

    def start_driver(self, *arguments: str) -> None:
        with open(self.root / "driver.txt", "a", encoding="utf-8") as log:
            self.driver = subprocess.Popen(
                [sys.executable, "-m", "dualsweep", *arguments, "--address", self.cluster.address],
                cwd=self.root, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    def start_server(self) -> None:
        command = [
            sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port), "--workers", "1",
            "--backend-store-uri", f"sqlite:///{self.root / 'mlflow.db'}", "--artifacts-destination", str(self.root / "artifacts"),
        ]  # fmt: skip
        with open(self.root / "mlflow.txt", "a", encoding="utf-8") as log:
            self.server = subprocess.Popen(
                command, cwd=self.root, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
                env=os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
            )  # fmt: skip

    def wait_for_server(self) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=2).close()
                return
            except OSError as error:
                if time.monotonic() > deadline:
                    raise RuntimeError(f"the MLflow server does not start: {error}") from error
            time.sleep(0.5)

    def done(self) -> bool:
        return self.driver.poll() is not None

    def join(self) -> None:
        """Wait for the driver. Raises: RuntimeError with the end of its output unless it ended well."""
        code = self.driver.wait()
        self.seconds = time.monotonic() - self.begun
        if code != 0:
            raise RuntimeError(f"the driver ended with {code}:\n{(self.root / 'driver.txt').read_text()[-3000:]}")

    def close(self) -> None:
        for process in (self.driver, self.server):
            if process is not None and process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        ray.shutdown()
        self.cluster.shutdown()

    # -- faults --------------------------------------------------------------------------------------------------

    def inflict(self, kind: str, rng: np.random.Generator) -> bool:
        """Returns: whether there was something to kill."""
        if kind == "driver":
            os.kill(self.driver.pid, signal.SIGKILL)
            self.driver.wait()
            self.start_driver("resume", "chaos", "--storage", str(self.folder.parent))
            return True
        if kind == "mlflow":
            os.killpg(self.server.pid, signal.SIGKILL)
            self.server.wait()
            time.sleep(float(rng.uniform(0, 5)))
            self.start_server()
            return True
        if kind == "node":
            node = self.nodes.pop(int(rng.integers(len(self.nodes))))
            self.cluster.remove_node(node, allow_graceful=False)
            self.nodes.append(self.cluster.add_node(num_cpus=1))
            return True
        name = {"worker": "RayTrainWorker", "dual_server": "DualServer"}[kind]
        found = [process for process in self.ray_processes() if name in " ".join(process.info["cmdline"] or [])[:80]]
        if not found:
            return False
        found[int(rng.integers(len(found)))].kill()
        return True

    def ray_processes(self) -> list[psutil.Process]:
        """Workers and actors of this cluster; another one may run on the machine."""
        raylets = {info.process.pid for node in self.cluster.list_all_nodes() for info in node.all_processes["raylet"]}
        return [p for p in psutil.process_iter(["cmdline", "ppid"]) if p.info["ppid"] in raylets]

    # -- what is left ----------------------------------------------------------------------------------------------

    def wrong_in_mlflow(self) -> int:
        """Trials without exactly one run, and dual steps that a run has not exactly once."""
        client, wrong = MlflowClient(f"http://127.0.0.1:{self.port}"), 0
        self.wait_for_server()
        sync = [sys.executable, "-m", "dualsweep", "sync", "chaos", "--storage", str(self.folder.parent)]
        subprocess.run(sync, cwd=self.root, check=True, capture_output=True)  # what a fault near the end kept back
        experiments = [e.experiment_id for e in client.search_experiments() if e.name != "Default"]
        runs = client.search_runs(experiments, max_results=1000)
        for path in sorted((self.folder / "trials").glob("*/trace.parquet")):
            mine = [run for run in runs if run.data.tags.get("dualsweep.trial") == path.parent.name]
            if len(mine) != 1:
                wrong += 1
                continue
            steps = Counter(m.step for m in client.get_metric_history(mine[0].info.run_id, "lagrangian"))
            wrong += sum(steps.get(row["dual_step"], 0) != 1 for row in read_trace(path))
        return wrong


def sweep_config(folder: Path, trials: int, dual_steps: int, tracking: str) -> SweepConfig:
    thresholds = [round(0.04 + 0.01 * i, 2) for i in range(trials)]
    overrides = [
        "name=chaos", f"storage={folder / 'runs'}", f"tracking.uri={tracking}", f"primal.steps={4 * dual_steps}",
        "primal.batch_size=16", "primal.constraint_batch_size=4", "pretrain.steps=60", "pretrain.warmup_steps=2",
        "measure.num_samples=16", "measure.window=2", "measure.num_sampling_steps=4", "dual.primal_steps_per_dual_step=4",
        "checkpoint_every_dual_steps=5", f"thresholds.grid.minority={thresholds}", "baselines.unconstrained=false",
        "baselines.fixed_weights=[]", "evaluation.num_samples=64", "evaluation.noise_levels=4", "model.channels=[8, 16]",
        "model.norm_groups=4", "compute.max_failures=1000", "compute.concurrent_trials=2",
    ]  # fmt: skip
    return load_config(EXAMPLE, overrides, environment=False)


def storm(sweep: Sweep, rng: np.random.Generator, count: int) -> list[tuple[float, str]]:
    """`count` faults one after the other, or fewer if the sweep is over before: (time, kind).

    Each has its place among the sweep's dual steps, drawn evenly over the first 95 %, so that all trials meet some however
    fast the machine is. Where two are close the second comes up to three seconds after the first, into its recovery.
    """
    faults: list[tuple[float, str]] = []
    places = np.sort(rng.uniform(0.0, 0.95, count)) * sweep.dual_steps
    for place in places:
        time.sleep(float(rng.uniform(0.0, 3.0)))
        kind = KINDS[int(rng.integers(len(KINDS)))]
        while True:
            if not _reached(sweep, place):
                return faults
            now = time.time()
            if sweep.inflict(kind, rng):
                break
            time.sleep(0.2)  # nothing of the kind is alive: on its way back from another fault
        faults.append((now, kind))
        print(f"{time.monotonic() - sweep.begun:6.0f} s  fault {len(faults)}: {kind}", flush=True)
    return faults


def _reached(sweep: Sweep, place: float) -> bool:
    """Wait until that many dual steps were made; False when the sweep is over.

    Raises: RuntimeError if no step is made for long.
    """
    deadline, last = time.monotonic() + PATIENCE_S, 0
    while not sweep.done():
        made = sum(map(len, new_steps(sweep.folder).values()))
        if made >= place:
            return True
        if made > last:
            deadline, last = time.monotonic() + PATIENCE_S, made
        if time.monotonic() > deadline:
            raise RuntimeError(f"no new dual step for {PATIENCE_S:g} s:\n{(sweep.root / 'driver.txt').read_text()[-3000:]}")
        time.sleep(0.25)
    return False


def new_steps(folder: Path) -> dict[str, list[float]]:
    """By trial the wall times of the dual steps that went beyond all before them."""
    times: dict[str, list[float]] = {}
    reached: dict[str, int] = {}
    for record in read_journal(folder / "journal.jsonl"):
        if record["kind"] == "step" and record["row"]["dual_step"] > reached.get(record["trial"], 0):
            reached[record["trial"]] = record["row"]["dual_step"]
            times.setdefault(record["trial"], []).append(record["row"]["wall_time"])
    return times


def lost_seconds(folder: Path, faults: list[tuple[float, str]]) -> dict[str, list[float]]:
    """By kind of fault, the longest pause around it of a trial that was running: before its last step, after its first."""
    found: dict[str, list[float]] = {kind: [] for kind in KINDS}
    steps = [np.array(times) for times in new_steps(folder).values()]
    for when, kind in faults:
        pauses = [t[t > when][0] - t[t <= when][-1] for t in steps if (t > when).any() and (t <= when).any()]
        if pauses:
            found[kind].append(float(max(pauses)))
    return found


def differing_rows(calm: Path, stormy: Path, trials: int) -> int:
    """Rows of all final traces that differ in anything but time and attempt; a missing row or trace counts as well.

    Raises: RuntimeError when the calm run does not have every trial, or has one whose multipliers never moved: equal
        traces would prove nothing then.
    """
    count, paths = 0, sorted((calm / "trials").glob("*/trace.parquet"))
    if len(paths) != trials:
        raise RuntimeError(f"the calm run has {len(paths)} traces of {trials} trials")
    for path in paths:
        mine = read_trace(path)
        if not any(any(row["multipliers"]) for row in mine):
            raise RuntimeError(f"{path}: no multiplier ever moved")
        other = stormy / "trials" / path.parent.name / "trace.parquet"
        theirs = read_trace(other) if other.exists() else []
        count += abs(len(mine) - len(theirs))
        for a, b in zip(mine, theirs, strict=False):
            count += any(a[key] != b[key] for key in a if key not in SAME)
    return count


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


if __name__ == "__main__":
    main()
