"""What a dual step adds to the primal steps it follows, at the main job's size.

Three ways, in turn, on a real local Ray with the durable journal on: the primal steps alone; with the report to the
DualServer and its answer in use, waited for or (pipelined) under way meanwhile; and with the measurement of the shares. `overhead_fraction` is the report (made,
answered, new multipliers in the tensor) over the primal steps of one dual interval; `measure_fraction` is the sampling that
the share unit needs, which is the metric's cost and not the dual step's.

    python benchmarks/dual_step.py [--repeats 15]
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from _harness import closing_line, seconds, spread

from dualsweep.constraints import Constraint, Problem
from dualsweep.orchestration.cluster import start_ray, stop_ray
from dualsweep.orchestration.config import load_config
from dualsweep.orchestration.dual_server import start_dual_server
from dualsweep.trainers.batches import BatchLoader
from dualsweep.trainers.methods import StreamSums
from dualsweep.trainers.methods.fairness import Fairness
from dualsweep.trainers.metrics import shard_counts
from dualsweep.trainers.primal import primal_step
from dualsweep.trainers.state import TrainState
from dualsweep.trainers.workspace import Workspace


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(1)
    config = load_config(Path(__file__).parents[1] / "examples" / "digits_fairness.yaml", environment=False)
    values = config.to_dict()
    workspace = Workspace(values, config.data)
    workspace.fill(None)
    trained, ema = workspace.modules()
    names = workspace.constraint_names
    train = TrainState(trained, ema, values["primal"])
    method = Fairness(workspace.setting(names, values["primal"]))
    streams = workspace.streams(method, values["primal"], config.seed)
    shards = list(streams.shards_of(0, 1))
    multipliers = torch.zeros(len(names))
    sums = StreamSums(1 + len(names), workspace.device)
    interval = config.dual.primal_steps_per_dual_step
    counts = shard_counts(values["measure"]["num_samples"], config.primal.num_shards)
    problem = Problem(
        method="fairness",
        objective="loss",
        constraints=tuple(Constraint(name=name, unit="share", threshold=0.1) for name in names),
    )
    start_ray(num_cpus=2)
    with tempfile.TemporaryDirectory() as folder:
        server = start_dual_server(Path(folder))
        server.begin(
            "t", 1, problem=problem.to_dict(), rule=config.dual.rule_config(), start=[0.0] * len(names), dual_state=None
        )
        state = {"dual_step": 0}
        batches = BatchLoader(streams, shards, workspace.tensors, workspace.device, steps=2**31)

        def primal_steps() -> None:
            for _ in range(interval):
                (batch,) = batches.take(train.primal_step)
                primal_step(
                    train,
                    method,
                    batch,
                    multipliers,
                    accelerator=workspace.accelerator,
                    grad_clip=1.0,
                    sums=sums,
                )

        def measure():
            draws = method.measure(
                ema, multipliers, counter=state["dual_step"], shards=shards, counts=counts,
                num_sampling_steps=values["measure"]["num_sampling_steps"],
            )  # fmt: skip
            return method.measurement(draws.rows, multipliers.numpy())

        def dual_step(measured, pipelined: bool = False) -> None:
            table = sums.table.cpu().numpy()
            state["dual_step"] += 1
            reply = state.pop("under_way")() if "under_way" in state else None
            answer = server.submit(
                "t", 1, state["dual_step"],
                {
                    "primal_step": train.primal_step, "workers": 1, "wall_time": time.time(), "lr": train.lr, "grad_norm": 1.0,
                    "objective": float(table[0, 0] / table[0, 2]), "objective_stderr": 0.01, "lagrangian": 1.0,
                    "metrics": measured.metrics, "metric_stderrs": measured.stderrs, "counts": measured.counts,
                },
            )  # fmt: skip
            if pipelined:
                state["under_way"] = answer
            else:
                reply = answer()
            if reply is not None:
                multipliers.copy_(torch.tensor(reply.multipliers))
            sums.reset()

        primal_steps(), dual_step(measure())
        primal, measuring, dual, pipelined = [], [], [], []
        for _ in range(options.repeats):
            primal.append(seconds(primal_steps))
            kept = []
            measuring.append(seconds(lambda kept=kept: kept.append(measure())))
            dual.append(seconds(lambda kept=kept: dual_step(kept[0])))
        (
            primal_steps(),
            dual_step(kept[0], pipelined=True),
        )  # its answer is under way when the first one that counts begins
        for _ in range(options.repeats):
            primal_steps()
            pipelined.append(seconds(lambda kept=kept: dual_step(kept[0], pipelined=True)))
        state.pop("under_way")()
        server.shutdown()
    stop_ray()
    overhead = [d / p for d, p in zip(dual, primal, strict=True)]
    hidden = [d / p for d, p in zip(pipelined, primal, strict=True)]
    sampling = [m / p for m, p in zip(measuring, primal, strict=True)]
    print(f"{interval} primal steps     {spread(primal)}")
    print(f"report to answer    {spread(dual)}")
    print(f"measuring shares    {spread(measuring)}")
    print(f"pipelined           {spread(pipelined)}")
    print(f"report / primal     {spread(overhead, '', 5)}")
    print(f"pipelined / primal  {spread(hidden, '', 5)}")
    print(f"measuring / primal  {spread(sampling, '', 5)}")
    closing_line(
        "dual_step",
        {
            "overhead_fraction": statistics.median(overhead),
            "pipelined_fraction": statistics.median(hidden),
            "measure_fraction": statistics.median(sampling),
        },
    )


if __name__ == "__main__":
    main()
