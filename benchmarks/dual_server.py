"""Dual steps a second and their latency under concurrent callers, against a plain Ray actor that only echoes.

The DualServer journals every dual step and syncs it to disk before the answer leaves; the echo is a plain Ray actor (one
thread) that returns what it was given, with the same arguments. They are reached differently, as each is in use: reports go to
the DualServer over its own TCP line, calls of the echo are Ray's. `server_ray` is the DualServer called as the echo is, by
Ray, so that `vs_echo_ray_N` leaves the line's gain out. All are called by the same processes, as many as callers up to
`PROCESSES`, then threads in them, in turn in one run, in the opposite order every second time. `vs_echo_N` is the
DualServer's rate over the echo's at N callers with 10 multipliers, the median of the turns; `p99_vs_echo_N` that of their 99th
percentiles. Callers wait for each answer, as alternating trials do, so that one caller's rate is the inverse of its latency.
The server's own parts, without Ray, come first.

    python benchmarks/dual_server.py [--repeats 5] [--seconds 1.0] [--quick]
"""

import argparse
import asyncio
import pickle
import statistics
import threading
import time
from functools import partial
from pathlib import Path

import numpy as np
import ray
from _harness import closing_line, own_folder, spread

from dualsweep.constraints import Constraint, Problem
from dualsweep.orchestration.cluster import start_ray, stop_ray
from dualsweep.orchestration.dual_server import DualServer, RayDual, start_dual_server
from dualsweep.orchestration.journal import Journal, encode_record

PROCESSES = 8
MULTIPLIERS = (1, 10, 1000)
CALLERS = (1, 2, 4, 8, 16, 32, 64)
TARGETS = ("echo", "server", "server_ray")
RULE = {"rule": "ascent", "step_size": 0.01, "smoothing": 0.5}


def problem_of(size: int) -> dict:
    constraints = tuple(Constraint(name=f"constraint_{i}", unit="loss", threshold=0.5) for i in range(size))
    return Problem(method="fairness", objective="loss", constraints=constraints).to_dict()


def measurement_of(size: int, step: int) -> dict:
    """What a worker reports, with all the digits that measured numbers have."""
    noise = np.random.default_rng([size, step % 16]).normal(size=2 * size + 5)
    return {
        "primal_step": 10 * step,
        "workers": 1,
        "wall_time": time.time(),
        "lr": abs(float(noise[-1])),
        "grad_norm": abs(float(noise[-2])),
        "objective": float(noise[-3]),
        "objective_stderr": abs(float(noise[-4])),
        "lagrangian": float(noise[-5]),
        "metrics": noise[:size].tolist(),
        "metric_stderrs": np.abs(noise[size : 2 * size]).tolist(),
        "counts": [64] * size,
    }


class Echo:
    def report(self, trial_id, attempt, dual_step, measurement):
        return measurement


@ray.remote(num_cpus=0)
class Callers:
    """One process of callers."""

    def __init__(self, server, echo) -> None:
        self.handles = {"server": server, "server_ray": server, "echo": echo}
        self.clients: dict[tuple[str, str], RayDual] = {}
        self.steps: dict[str, int] = {}

    def ready(self) -> bool:
        return True

    def _client(self, target: str, name: str) -> RayDual:
        """Every trial has its own, as every worker group has."""
        return self.clients.setdefault((target, name), RayDual(self.handles[target]))

    def call(self, target: str, names: list[str], size: int, start: float, seconds: float) -> list[list[float]]:
        """Every name is a trial with a thread of its own. Returns: seconds of each call, one list a thread."""
        names = [f"{target}-{name}" for name in names]
        answered: list[list[float]] = [[] for _ in names]
        problem, measurements = problem_of(size), [measurement_of(size, step) for step in range(16)]
        if target != "echo":
            for name in names:
                if name not in self.steps:
                    self.steps[name] = 0
                    self._client(target, name).begin(
                        name, 1, problem=problem, rule=RULE, start=[0.0] * size, dual_state=None
                    )

        def caller(name: str, latencies: list[float]) -> None:
            dual = self._client(target, name)
            report = dual.report if target == "server" else partial(dual.call, "report")  # by Ray
            step = self.steps.get(name, 0)
            time.sleep(max(0.0, start - time.time()))
            while time.time() < start + seconds:
                step += 1
                asked = time.perf_counter()
                report(name, 1, step, measurements[step % 16])
                latencies.append(time.perf_counter() - asked)
            if target != "echo":
                self.steps[name] = step

        threads = [threading.Thread(target=caller, args=pair) for pair in zip(names, answered, strict=True)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return answered


def drive(processes: list, target: str, callers: int, size: int, seconds: float) -> tuple[float, list[float]]:
    """Returns: calls a second of all callers together, and the seconds of every call."""
    used = min(callers, len(processes))
    names = [[f"m{size}-{i}" for i in range(callers) if i % used == k] for k in range(used)]
    start = time.time() + 0.3
    calls = [p.call.remote(target, n, size, start, seconds) for p, n in zip(processes, names, strict=False)]
    latencies = [latency for process in ray.get(calls) for thread in process for latency in thread]
    return len(latencies) / seconds, latencies


def parts(size: int, folder: Path, rounds: int = 200) -> None:
    """Where a dual step's time goes inside the server, without Ray."""
    server = DualServer(str(folder), "")

    async def begin() -> None:
        await server.begin("t", 1, problem_of(size), RULE, [0.0] * size, None)

    asyncio.run(begin())
    spent: dict[str, list[float]] = {"rule and row": [], "encode": [], "apply": [], "reply": [], "pickle reply": []}
    journal = Journal(folder / "sync" / "journal.jsonl")
    spent["write and sync"] = []
    for step in range(1, rounds + 1):
        measurement = measurement_of(size, step)
        made = {}
        for name, part in {
            "rule and row": lambda: made.update(records=server.ledger.report("t", 1, step, measurement)),  # noqa: B023
            "encode": lambda: made.update(lines=[encode_record(record) for record in made["records"]]),  # noqa: B023
            "apply": lambda: [server.ledger.apply(record) for record in made["records"]],  # noqa: B023
            "reply": lambda: made.update(reply=server.ledger.reply("t")),  # noqa: B023
            "pickle reply": lambda: pickle.dumps(made["reply"], protocol=5),  # noqa: B023
            "write and sync": lambda: journal.append(made["lines"]),  # noqa: B023
        }.items():
            start = time.perf_counter()
            part()
            spent[name].append(1e6 * (time.perf_counter() - start))
    journal.close()
    asyncio.run(server.close())
    told = "  ".join(f"{name} {statistics.median(values):.0f}" for name, values in spent.items())
    print(f"{size:5} multipliers, microseconds: {told}; {len(made['lines'][0])} bytes a record", flush=True)


def percentiles(latencies: list[float]) -> tuple[float, float]:
    """p50 and p99 in milliseconds."""
    p50, p99 = np.percentile(latencies, [50, 99])
    return 1e3 * float(p50), 1e3 * float(p99)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0, help="of each measurement")
    parser.add_argument(
        "--quick", action="store_true", help="only what the figures need: 10 multipliers, 1, 8, 32 callers"
    )
    options = parser.parse_args()
    cases = [(callers, size) for size in MULTIPLIERS for callers in CALLERS]
    cases = [(callers, 10) for callers in (1, 8, 32)] if options.quick else cases
    figures = {}
    with own_folder() as folder:
        start_ray(num_cpus=2)
        try:
            for size in MULTIPLIERS:
                parts(size, folder / f"parts-{size}")
            server = start_dual_server(folder / "sweep")
            echo = ray.remote(num_cpus=0)(Echo).remote()
            processes = [Callers.remote(server.handle, echo) for _ in range(PROCESSES)]
            ray.get([process.ready.remote() for process in processes])
            for callers, size in cases:
                rates, by_ray, tails, every = [], [], [], {target: [] for target in TARGETS}
                for repeat in range(options.repeats + 1):
                    order = TARGETS[:: -1 if repeat % 2 else 1]
                    seen = {target: drive(processes, target, callers, size, options.seconds) for target in order}
                    if repeat == 0:  # threads, connections and caches
                        continue
                    rates.append(seen["server"][0] / seen["echo"][0])
                    by_ray.append(seen["server_ray"][0] / seen["echo"][0])
                    tails.append(percentiles(seen["server"][1])[1] / percentiles(seen["echo"][1])[1])
                    for target, (_, latencies) in seen.items():
                        every[target] += latencies
                told = []
                for target, latencies in every.items():
                    p50, p99 = percentiles(latencies)
                    rate = len(latencies) / options.seconds / options.repeats
                    told.append(f"{target} {rate:6.0f}/s p50 {p50:6.2f} ms p99 {p99:7.2f} ms")
                suffix = f"{callers}" if size == 10 else f"{callers}_m{size}"
                ratios = {"vs_echo": rates, "vs_echo_ray": by_ray, "p99_vs_echo": tails}
                said = "   ".join(f"{name} {spread(values, '', 2)}" for name, values in ratios.items())
                print(f"{callers:3} callers {size:5} multipliers: {'   '.join(told)}   {said}", flush=True)
                figures |= {f"{name}_{suffix}": statistics.median(values) for name, values in ratios.items()}
            server.shutdown()
        finally:
            stop_ray()
    closing_line("dual_server", figures)


if __name__ == "__main__":
    main()
