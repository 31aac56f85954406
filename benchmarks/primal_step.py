"""The fused primal step against the reference form (one forward and one loss a stream, methods.md 1b).

Same model, same batches, same threads, same optimizer; only the Lagrangian is estimated differently. Ratios are taken pair
by pair. `speedup_m3_8x8_t1` is three constraints at 8x8 on one thread with the main job's widths; `_w32_64` the larger ones.

    python benchmarks/primal_step.py [--repeats 15] [--quick]
"""

import argparse
import statistics

import torch
from _harness import closing_line, paired_medians, spread
from accelerate import Accelerator

from dualsweep.datasets import Streams
from dualsweep.trainers.methods import Fairness
from dualsweep.trainers.methods.base import make_batch
from dualsweep.trainers.models import build_denoiser
from dualsweep.trainers.noise_schedule import NoiseSchedule
from dualsweep.trainers.primal import primal_step
from dualsweep.trainers.state import TrainState

OPTIMIZER = {
    "steps": 10_000,
    "lr": 1e-3,
    "warmup_steps": 10,
    "final_lr_fraction": 0.1,
    "weight_decay": 0.01,
    "ema_decay": 0.98,
}


class ReferenceForm:
    """As the paper's notebook: forward each stream by itself, then sum the weighted losses."""

    def primal_loss(self, denoiser, schedule, batch, multipliers):
        losses = []
        start = 0
        for count in batch.counts:
            part = slice(start, start + count)
            x_t = schedule.add_noise(batch.x_0[part], batch.noise[part], batch.timestep[part])
            losses.append((denoiser(x_t, batch.timestep[part]) - batch.noise[part]).square().flatten(1).mean(1))
            start += count
        means = torch.stack([loss.mean() for loss in losses])
        weights = torch.cat([multipliers.new_ones(1), multipliers]) / (1 + multipliers.sum())
        return torch.dot(weights, means), torch.cat(losses)


def measure(
    size: int, widths: tuple[int, ...], constraints: int, threads: int, repeats: int
) -> tuple[list[float], list[float], list[float]]:
    torch.set_num_threads(threads)
    schedule = NoiseSchedule()
    shape = (1, size, size)
    model = {"kind": "unet", "channels": widths, "layers_per_block": 1, "attention": None, "norm_groups": 8}
    names = [f"c{i}" for i in range(constraints)]
    streams = Streams(
        sizes={"main": 1000} | dict.fromkeys(names, 50),
        batch_sizes={"main": 64} | dict.fromkeys(names, 16),
        seed=0,
        num_shards=4,
        num_train_timesteps=1000,
        sample_shape=shape,
    )
    data = {name: torch.rand(count, *shape) * 2 - 1 for name, count in streams.sizes.items()}
    multipliers = torch.full((constraints,), 0.12)
    accelerator = Accelerator(cpu=True)

    def stepper(method):
        torch.manual_seed(0)
        train = TrainState(build_denoiser(model, shape, schedule), build_denoiser(model, shape, schedule), OPTIMIZER)

        def step():
            draws = streams.draw(train.primal_step, range(4))
            batch = make_batch(data, draws, streams.batch_sizes, torch.device("cpu"))
            primal_step(train, method, schedule, batch, multipliers, accelerator=accelerator, grad_clip=1.0)

        return step

    fused, reference = stepper(Fairness()), stepper(ReferenceForm())
    for _ in range(3):
        fused(), reference()
    return paired_medians(reference, fused, repeats=repeats)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--quick", action="store_true", help="only the main job's size")
    options = parser.parse_args()
    cases = [(8, (16, 32), 3, 1), (8, (32, 64), 3, 1)]
    if not options.quick:
        cases += [
            (8, (16, 32), 1, 1),
            (8, (16, 32), 8, 1),
            (8, (16, 32), 3, 2),
            (8, (32, 64), 3, 2),
            (16, (16, 32), 3, 1),
            (16, (32, 64), 3, 1),
            (32, (16, 32), 3, 1),
        ]
    figures = {}
    for size, widths, constraints, threads in cases:
        reference, fused, ratios = measure(size, widths, constraints, threads, options.repeats)
        name = f"m{constraints}_{size}x{size}_t{threads}" + (
            "" if widths == (16, 32) else "_w" + "_".join(map(str, widths))
        )
        figures[f"speedup_{name}"] = statistics.median(ratios)
        print(
            f"{name:24} reference {spread(reference)}   fused {spread(fused)}   reference/fused {spread(ratios, 'x', 3)}",
            flush=True,
        )
    closing_line("primal_step", figures)


if __name__ == "__main__":
    main()
