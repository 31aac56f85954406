"""The fused primal step against the reference form (one forward and one loss a stream, methods.md 1b).

Same model, same batches, same threads, same optimizer; only the Lagrangian is estimated differently. Ratios are taken pair
by pair. `speedup_m3_8x8_t1` is three constraints at 8x8 on one thread with widths (32, 64); `_w16_32` are the main job's
widths. `matrix_share_*` is the part of the fused step's time inside convolutions and matrix products, forward and backward
(torch.profiler); the profile that follows says what the rest is. Under `--clock processor` only the time that this process
computed counts, which other users of the machine disturb less; two threads are then the sum of both.

    python benchmarks/primal_step.py [--repeats 15] [--quick] [--clock processor] [--device cuda]

A timing is that of the loop's own path: with sums for the dual step, and on a CUDA device with DeferredChecks, which look at
loss and gradient once a dual step. One timing is of `STEPS` steps there, with the device waited for before and after. The
sizes are larger on CUDA, and bf16, channels-last and torch.compile are a case of their own (`_fast`): `fast_vs_plain_*` is the
fused plain fp32 step over the fused fast one, in turn too.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from _harness import closing_line, paired_medians, spread
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch.profiler import ProfilerActivity, profile

from dualsweep.datasets import Streams
from dualsweep.trainers.bad_numbers import DeferredChecks
from dualsweep.trainers.batches import BatchLoader
from dualsweep.trainers.methods import PrimalTerms, StreamSums
from dualsweep.trainers.methods.fairness import Fairness
from dualsweep.trainers.models import build_denoiser
from dualsweep.trainers.noise_schedule import NoiseSchedule
from dualsweep.trainers.primal import primal_step
from dualsweep.trainers.state import TrainState

STEPS = 10  # primal steps a dual step on CUDA, timed together
OPTIMIZER = {
    "steps": 10_000,
    "lr": 1e-3,
    "warmup_steps": 10,
    "final_lr_fraction": 0.1,
    "weight_decay": 0.01,
    "ema_decay": 0.98,
}


class ReferenceForm(Fairness):
    """As the paper's notebook: forward each stream by itself, then sum the weighted losses."""

    def primal_loss(self, denoiser, batch, multipliers):
        schedule, losses = self.setting.schedule, []
        start = 0
        for count in batch.counts:
            part = slice(start, start + count)
            x_t = schedule.add_noise(batch.x_0[part], batch.noise[part], batch.timestep[part])
            losses.append((denoiser(x_t, batch.timestep[part]) - batch.noise[part]).square().flatten(1).mean(1))
            start += count
        means = torch.stack([loss.mean() for loss in losses])
        weights = torch.cat([multipliers.new_ones(1), multipliers]) / (1 + multipliers.sum())
        return PrimalTerms(torch.dot(weights, means), torch.cat(losses), batch.counts)


@dataclass(frozen=True)
class Case:
    """One comparison; `fast` is bf16, channels-last and torch.compile, for both forms."""

    size: int
    widths: tuple[int, ...]
    constraints: int = 3
    threads: int = 1
    fast: bool = False

    @property
    def name(self) -> str:
        widths = "" if self.widths == (32, 64) else "_w" + "_".join(map(str, self.widths))
        return f"m{self.constraints}_{self.size}x{self.size}_t{self.threads}{widths}" + ("_fast" if self.fast else "")


CPU_CASES = [Case(8, (32, 64)), Case(8, (16, 32))]
MORE_CPU_CASES = [
    case
    for size, widths in [(8, (32, 64)), (8, (16, 32)), (16, (32, 64)), (16, (16, 32)), (32, (16, 32))]
    for constraints in (1, 3, 8)
    for threads in (1, 2)
    if (case := Case(size, widths, constraints, threads)) not in CPU_CASES
]
MATRIX_KERNELS = ("convolution", "conv", "addmm", "mm", "bmm", "gemm", "linear")
CUDA_CASES = [
    Case(size, widths, fast=fast)
    for size, widths in [(8, (32, 64)), (32, (64, 128)), (32, (128, 256))]
    for fast in (False, True)
]


def steppers(case: Case, device: torch.device) -> tuple[Callable[[], None], Callable[[], None]]:
    """The fused step and the reference step of a case, both warm; on CUDA a call is `STEPS` steps and one look at them."""
    torch.set_num_threads(case.threads)
    schedule = NoiseSchedule()
    shape = (1, case.size, case.size)
    model = {"kind": "unet", "channels": case.widths, "layers_per_block": 1, "attention": None, "norm_groups": 8}
    names = [f"c{i}" for i in range(case.constraints)]
    streams = Streams(
        sizes={"main": 1000} | dict.fromkeys(names, 50),
        batch_sizes={"main": 64} | dict.fromkeys(names, 16),
        seed=0,
        num_shards=4,
        num_train_timesteps=1000,
        sample_shape=shape,
    )
    data = {name: (torch.rand(count, *shape) * 2 - 1).to(device) for name, count in streams.sizes.items()}
    multipliers = torch.full((case.constraints,), 0.12, device=device)
    AcceleratorState._reset_state()  # one process measures several precisions
    accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision="bf16" if case.fast else "no")

    def network():
        torch.manual_seed(0)
        memory_format = torch.channels_last if case.fast else torch.preserve_format
        denoiser = build_denoiser(model, shape, schedule).to(device, memory_format=memory_format)
        if case.fast:
            denoiser.compile()
        return denoiser

    def stepper(method):
        train, sums = TrainState(network(), network(), OPTIMIZER), StreamSums(1 + case.constraints, device)
        batches = BatchLoader(streams, range(4), data, device, steps=2**31)
        checks = DeferredChecks() if device.type == "cuda" else None  # as `Workspace.defers_checks`

        def step():
            (batch,) = batches.take(train.primal_step)
            primal_step(
                train, method, batch, multipliers, accelerator=accelerator, grad_clip=1.0, sums=sums, checks=checks
            )

        def steps():
            torch.cuda.synchronize(device)
            for _ in range(STEPS):
                step()
            checks.read()
            torch.cuda.synchronize(device)

        return step if checks is None else steps

    setting = SimpleNamespace(schedule=schedule, optimizer={"normalize": True})  # all that the loss reads
    fused, reference = stepper(Fairness(setting)), stepper(ReferenceForm(setting))
    for _ in range(3):
        fused(), reference()
    return fused, reference


def matrix_share(step: Callable[[], None], *, rows: int = 0) -> float:
    """The part of a step's own time in convolutions and matrix products; prints the `rows` largest kernels."""
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        for _ in range(3):
            step()
    events = profiled.key_averages()
    total = sum(event.self_cpu_time_total for event in events)
    matrices = sum(event.self_cpu_time_total for event in events if any(k in event.key for k in MATRIX_KERNELS))
    if rows:
        for event in sorted(events, key=lambda event: -event.self_cpu_time_total)[:rows]:
            print(f"    {event.self_cpu_time_total / total:6.1%} {event.count // 3:5} calls  {event.key}")
    return matrices / total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--quick", action="store_true", help="only the main job's size")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--clock", choices=["wall", "processor"], default="wall")
    options = parser.parse_args()
    clock = time.process_time if options.clock == "processor" else time.perf_counter
    cases = CUDA_CASES if options.device == "cuda" else CPU_CASES if options.quick else CPU_CASES + MORE_CPU_CASES
    figures = {}
    plain_step = None
    for case in cases:
        fused_step, reference_step = steppers(case, torch.device(options.device))
        reference, fused, ratios = paired_medians(reference_step, fused_step, repeats=options.repeats, clock=clock)
        figures[f"speedup_{case.name}"] = statistics.median(ratios)
        print(
            f"{case.name:28} reference {spread(reference)}   fused {spread(fused)}   ratio {spread(ratios, 'x', 3)}",
            flush=True,
        )
        if case.fast:  # comes after the plain case of the same sizes
            _, _, ratios = paired_medians(plain_step, fused_step, repeats=options.repeats, clock=clock)
            figures[f"fast_vs_plain_{case.name.removesuffix('_fast')}"] = statistics.median(ratios)
            print(f"    plain over fast {spread(ratios, 'x', 3)}", flush=True)
        plain_step = fused_step
        if options.device == "cpu" and case.threads == 1:  # on a GPU the processor only launches the kernels
            share = matrix_share(fused_step, rows=10 if case in CPU_CASES else 0)
            figures[f"matrix_share_{case.name}"] = share
            print(f"    {share:.2f} of the fused step is convolution and matrix product", flush=True)
    closing_line("primal_step", figures)


if __name__ == "__main__":
    main()
