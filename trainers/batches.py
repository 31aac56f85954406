"""The batches of a trial's primal steps: drawn in parts, and on an accelerator ahead of time and without waiting for it."""

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Self

import torch

from dualsweep.datasets import Streams
from dualsweep.trainers.methods.base import Batch, HostBatch, host_batch


class BatchLoader:
    """This worker's batches, step by step; leaving its context ends its thread.

    Draws are addressed by the step, so there is no position to save: what was drawn ahead and never taken is drawn again by
    whoever resumes.

    On an accelerator a thread draws the next step's batch into page-locked memory while the device computes, and the copy is
    queued behind that computation: the host waits for neither. On the CPU the thread would take its time from the step itself,
    which needs every core it has (0.4 of 50 to 150 ms a step): batches are then drawn when they are taken.
    """

    def __init__(
        self,
        streams: Streams,
        shards: Sequence[int],
        tensors: Mapping[str, torch.Tensor],
        device: torch.device,
        *,
        steps: int,
        accumulate: int = 1,
        ahead: bool | None = None,
    ) -> None:
        """
        Args:
            shards: the logical shards of this worker.
            tensors: stream name -> all its samples, on `device`.
            steps: the trial's primal steps; nothing is drawn beyond them.
            accumulate: a part holds at most `num_shards / accumulate` shards.
            ahead: draw in a thread; None: where `device` is not the CPU.
        """
        self.streams, self.tensors, self.device, self.steps = streams, tensors, device, steps
        self.groups = shard_groups(streams, shards, accumulate)
        self._pinned = device.type == "cuda"
        self._pool: ThreadPoolExecutor | None = None
        self._next: tuple[int, Future[list[HostBatch]]] | None = None
        if device.type != "cpu" if ahead is None else ahead:
            enter = None
            if self._pinned:  # a new thread is on device 0, where page-locking would leave a context of this process
                enter = partial(torch.cuda.set_device, device if device.index is not None else torch.cuda.current_device())
            self._pool = ThreadPoolExecutor(1, "batches", enter)

    def take(self, step: int) -> list[Batch]:
        """The parts of the batch of this step, counted from 0, on the device. Raises: what drawing it raised."""
        if self._pool is None:
            drawn = self._draw(step)
        else:
            number, future = self._next or (None, None)
            if future is None or number != step:
                future = self._pool.submit(self._draw, step)
            self._next = None
            drawn = future.result()
            if step + 1 < self.steps:
                self._next = (step + 1, self._pool.submit(self._draw, step + 1))
        return [part.to_device(self.tensors, self.streams.batch_sizes, self.device) for part in drawn]

    def _draw(self, step: int) -> list[HostBatch]:
        sizes = self.streams.batch_sizes
        return [host_batch(self.streams.draw(step, group), sizes, pinned=self._pinned) for group in self.groups]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)


def shard_groups(streams: Streams, shards: Sequence[int], accumulate: int) -> list[list[int]]:
    """A worker's shards in groups of at most `num_shards / accumulate`, in their order; groups without a sample are left out.

    Raises: ValueError where that is not a whole number.
    """
    size, rest = divmod(streams.num_shards, accumulate)
    if rest:
        raise ValueError(f"gradient_accumulation_steps={accumulate} does not divide num_shards={streams.num_shards}")
    shards = list(shards)
    groups = [shards[start : start + size] for start in range(0, len(shards), size)]
    return [group for group in groups if any(streams.counts(group).values())] or groups[:1]
