"""What a formulation owes the training loop."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

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

    def primal_loss(self, denoiser: torch.nn.Module, schedule, batch: Batch, multipliers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """This worker's part of the Lagrangian (parts add up over workers) and the per-sample losses, shape (batch,)."""
        ...
