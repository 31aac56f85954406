"""What a formulation owes the training loop."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from dualsweep.constraints import Constraint, DualDomain


@dataclass
class Batch:
    """The samples of all streams of one primal step, concatenated in stream order (main first)."""

    x_0: torch.Tensor  # (batch, *sample_shape)
    noise: torch.Tensor  # like x_0
    timestep: torch.Tensor  # int64 (batch,)
    counts: tuple[int, ...]  # samples of each stream held by this worker
    global_counts: tuple[int, ...]  # the same over all workers


def make_batch(
    tensors: Mapping[str, torch.Tensor],
    draws: Mapping[str, tuple[np.ndarray, np.ndarray, np.ndarray]],
    batch_sizes: Mapping[str, int],
    device: torch.device,
) -> Batch:
    """This worker's batch from the streams' draws.

    Args:
        tensors: stream name -> all its samples, on `device`.
        draws: stream name -> (indices, timesteps, noise), as `Streams.draw` gives them.
        batch_sizes: stream name -> samples over all workers.
    """
    indices, timesteps, noises = zip(*(draws[name] for name in batch_sizes), strict=True)
    return Batch(
        x_0=torch.cat(
            [
                tensors[name][torch.from_numpy(index).to(device)]
                for name, index in zip(batch_sizes, indices, strict=True)
            ]
        ),
        noise=torch.from_numpy(np.concatenate(noises)).to(device),
        timestep=torch.from_numpy(np.concatenate(timesteps)).to(device),
        counts=tuple(len(index) for index in indices),
        global_counts=tuple(batch_sizes.values()),
    )


class StreamSums:
    """Running (sum, sum of squares, count) of the per-sample losses of every stream between two dual steps.

    Kept as one float64 tensor of shape (num_streams, 3) on the device, so that reading it is the only synchronisation a
    dual step needs, and adding it over ranks is one small all-reduce.
    """

    def __init__(self, num_streams: int, device: torch.device) -> None:
        self.table = torch.zeros((num_streams, 3), dtype=torch.float64, device=device)

    def add(self, losses: torch.Tensor, counts: Sequence[int]) -> None:
        losses = losses.detach().double()
        for row, part in zip(self.table, losses.split(list(counts)), strict=True):
            row += torch.stack([part.sum(), part.square().sum(), part.new_tensor(float(len(part)))])

    def reset(self) -> None:
        self.table.zero_()


class Method(Protocol):
    """How the Lagrangian of one formulation is estimated."""

    name: str
    units: tuple[str, ...]  # units its constraints may use

    def domain(self, constraints: Sequence[Constraint]) -> DualDomain:
        """Where the multipliers may live."""
        ...

    def primal_loss(
        self, denoiser: torch.nn.Module, schedule, batch: Batch, multipliers: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """This worker's part of the Lagrangian (parts add up over workers) and the per-sample losses, shape (batch,)."""
        ...
