"""What a resize costs: an elastic worker group on a cluster of raylets that gains, loses and drains nodes.

One trial of the digits runs with `compute.workers: {min: 1, max: 2}` on a head without CPUs and nodes of one CPU each, all
on this machine. After each event: seconds from the last dual step before it that the old group made to the first one that is
new, steps redone from the checkpoint included. At the end the journal is replayed: the dual steps are 1 to n, each once,
and the multipliers are those that the dual rule makes of the recorded violations, bit for bit.

    python benchmarks/elastic.py [--rounds 1]
"""

import argparse
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
import yaml
from _harness import closing_line, own_folder
from ray.cluster_utils import Cluster

from dualsweep.orchestration.cluster import quiet_environment
from dualsweep.orchestration.config import load_config
from dualsweep.orchestration.dual_ledger import check_dual_steps
from dualsweep.orchestration.journal import read_journal

EXAMPLE = Path(__file__).parents[1] / "examples" / "digits_fairness.yaml"
TRIAL_STEPS = 400_000  # far more than it gets to: the sweep is interrupted when the events are over
PATIENCE_S = 240.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=1, help="how often grow, kill, grow and drain are gone through")
    parser.add_argument(
        "--health-check-ms", type=int, help="how often Ray looks whether a node lives; default: Ray's 3000"
    )
    options = parser.parse_args()
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    quiet_environment()
    with own_folder() as folder:
        lost = watch(folder, options.rounds, options.health_check_ms)
    figures = {f"{event}_s": statistics.median(values) for event, values in lost.items() if values}
    closing_line("elastic", figures)


def watch(folder: Path, rounds: int, health_check_ms: int | None) -> dict[str, list[float]]:
    """Seconds lost by kind of event."""
    head: dict[str, Any] = {"num_cpus": 0, "include_dashboard": True, "dashboard_port": None}  # None: any free port
    if health_check_ms is not None:
        head["_system_config"] = {"health_check_period_ms": health_check_ms}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    nodes = [cluster.add_node(num_cpus=1)]
    cluster.wait_for_nodes()
    config = elastic_config(folder)
    log = folder / "driver.txt"
    command = [sys.executable, "-m", "dualsweep", "sweep", str(config), "--address", cluster.address]
    with open(log, "w", encoding="utf-8") as output:
        driver = subprocess.Popen(command, cwd=folder, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
    run = Run(folder / "runs" / "elastic" / "journal.jsonl", driver, log)
    lost: dict[str, list[float]] = {"grow": [], "kill": [], "drain": []}
    try:
        run.wait_for(workers=1, what="the first group")
        for _ in range(rounds):
            for event in ("grow", "kill", "grow", "drain"):
                before = run.last()
                if event == "grow":
                    nodes.append(cluster.add_node(num_cpus=1))
                elif event == "kill":
                    cluster.remove_node(nodes.pop(0), allow_graceful=False)
                else:
                    drain(cluster, nodes[0], deadline_s=10)
                    time.sleep(10)  # the machine goes when its time is over
                    cluster.remove_node(nodes.pop(0), allow_graceful=False)
                after = run.wait_for(workers=2 if event == "grow" else 1, after=before["attempt"], what=event)
                seconds = run.seconds_lost(after["attempt"])
                lost[event].append(seconds)
                print(f"{event:6} {seconds:6.1f} s, {run.redone(after['attempt'])} dual steps redone", flush=True)
        os.killpg(driver.pid, signal.SIGINT)
        driver.wait(timeout=PATIENCE_S)
        print(run.proof())
    finally:
        if driver.poll() is None:
            os.killpg(driver.pid, signal.SIGKILL)
        ray.shutdown()
        cluster.shutdown()
    return lost


def elastic_config(folder: Path) -> Path:
    overrides = [
        "name=elastic", f"storage={folder / 'runs'}", "compute.workers={min: 1, max: 2}", "compute.concurrent_trials=1",
        "compute.resize_interval_s=2", f"primal.steps={TRIAL_STEPS}", "primal.batch_size=16", "primal.constraint_batch_size=8",
        "pretrain.steps=20", "pretrain.warmup_steps=2", "measure.num_samples=32", "measure.window=1",
        "measure.num_sampling_steps=4", "dual.primal_steps_per_dual_step=10", "checkpoint_every_dual_steps=5",
        "thresholds.grid.minority=[0.1]", "baselines.unconstrained=false", "baselines.fixed_weights=[]",
    ]  # fmt: skip
    path = folder / "elastic.yaml"
    config = load_config(EXAMPLE, overrides, environment=False)
    path.write_text(yaml.safe_dump(config.to_dict()), encoding="utf-8")
    return path


class Run:
    """The journal of a running sweep, read as it grows."""

    def __init__(self, path: Path, driver: subprocess.Popen, log: Path) -> None:
        self.path, self.driver, self.log = path, driver, log

    def steps(self) -> list[dict[str, Any]]:
        """Every row ever written of the one trial, those that a rewind superseded too."""
        if not self.path.exists():
            return []
        records = read_journal(self.path)
        return [r["row"] for r in records if r["kind"] == "step" and r["trial"] != "pretrained"]

    def last(self) -> dict[str, Any]:
        return self.steps()[-1]

    def wait_for(self, *, workers: int, what: str, after: int = 0) -> dict[str, Any]:
        """The first row of a group of that size whose attempt is later than `after` and that is 10 steps further on."""

        def found() -> dict[str, Any] | None:
            rows = [row for row in self.steps() if row["workers"] == workers and row["attempt"] > after]
            return rows[0] if len(rows) > 10 else None

        return self._poll(found, what)

    def proof(self) -> str:
        """Raises: ValueError if a dual step is missing, doubled, or not what the rule makes of the violations."""
        records = read_journal(self.path)
        trial_id = next(r["trial"] for r in records if r["kind"] == "step" and r["trial"] != "pretrained")
        book = check_dual_steps(records, trial_id)
        return f"{len(book.rows)} dual steps, each once, multipliers exact; {book.superseded_rows} rows superseded"

    def _poll(self, found: Callable[[], dict[str, Any] | None], what: str) -> dict[str, Any]:
        deadline = time.monotonic() + PATIENCE_S
        while (row := found()) is None:
            if self.driver.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"no dual step after {what} in {PATIENCE_S:g} s:\n{self.log.read_text()[-3000:]}")
            time.sleep(0.5)
        return row

    def seconds_lost(self, attempt: int) -> float:
        """Wall time between the last step before an attempt and the first step beyond it."""
        rows = self.steps()
        before = max((r for r in rows if r["attempt"] < attempt), key=lambda r: r["wall_time"])
        reached = max(r["dual_step"] for r in rows if r["attempt"] < attempt)
        new = next(r for r in rows if r["attempt"] >= attempt and r["dual_step"] > reached)
        return new["wall_time"] - before["wall_time"]

    def redone(self, attempt: int) -> int:
        rows = self.steps()
        reached = max(r["dual_step"] for r in rows if r["attempt"] < attempt)
        return reached - min(r["dual_step"] for r in rows if r["attempt"] >= attempt) + 1


def drain(cluster: Cluster, node, *, deadline_s: int) -> None:
    """Announce the end of a node, as a cloud does for a spot machine."""
    command = [
        sys.executable, "-m", "ray.scripts.scripts", "drain-node", "--address", cluster.address, "--node-id", node.node_id,
        "--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "benchmark",
        "--deadline-remaining-seconds", str(deadline_s),
    ]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True)


if __name__ == "__main__":
    main()
