"""Batches drawn ahead are those drawn in time; parts of a batch make the whole; the thread ends with its context."""

import threading

import pytest
import torch

from dualsweep.datasets import Streams
from dualsweep.trainers.batches import BatchLoader, shard_groups

SIZES = {"main": 40, "rare": 7}
TENSORS = {name: torch.arange(2.0 * size).view(size, 2) + len(name) for name, size in SIZES.items()}


def make_streams(num_shards: int = 4, rare: int = 6) -> Streams:
    batch_sizes = {"main": 10, "rare": rare}
    return Streams(
        sizes=SIZES,
        batch_sizes=batch_sizes,
        seed=3,
        num_shards=num_shards,
        num_train_timesteps=50,
        sample_shape=(2,),
    )


def loader(streams=None, *, shards=range(4), steps=6, **given) -> BatchLoader:
    return BatchLoader(streams or make_streams(), shards, TENSORS, torch.device("cpu"), steps=steps, **given)


def content(batches) -> list[tuple]:
    return [
        (batch.x_0.tolist(), batch.noise.tolist(), batch.timestep.tolist(), batch.counts, batch.global_counts)
        for batch in batches
    ]


class Noting(Streams):
    """Notes which steps were drawn, and by which thread; fails at step 4."""

    def draw(self, step, shards):
        self.__dict__.setdefault("drawn", []).append((step, threading.current_thread().name))
        if step == 4:
            raise OSError("no more entropy")
        return super().draw(step, shards)


def noting() -> Noting:
    plain = make_streams()
    names = ("sizes", "batch_sizes", "seed", "num_shards", "num_train_timesteps", "sample_shape")
    return Noting(**{name: getattr(plain, name) for name in names})


def batch_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("batches")]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_batches_drawn_ahead_are_those_drawn_when_they_are_taken(accumulate):
    """From the start, resumed at a step, and where the same step is taken twice."""
    plain = loader(accumulate=accumulate)
    with loader(accumulate=accumulate, ahead=True) as early:
        for step in (0, 1, 2, 4, 5, 2, 3, 3):
            assert content(early.take(step)) == content(plain.take(step)), step


def test_a_thread_draws_one_step_ahead_and_none_beyond_the_last():
    streams = noting()
    with loader(streams, steps=3, ahead=True) as early:
        for step in range(3):
            early.take(step)
    assert [step for step, _ in streams.drawn] == [0, 1, 2]
    assert all(name.startswith("batches") for _, name in streams.drawn)


def test_on_the_cpu_no_thread_is_started():
    streams = noting()
    with loader(streams) as late:
        late.take(0)
        assert batch_threads() == []
    assert streams.drawn == [(0, threading.current_thread().name)]


def test_an_error_of_the_thread_is_raised_by_the_step_that_needs_the_batch_and_the_thread_ends():
    with loader(noting(), ahead=True) as early:
        for step in range(4):  # step 4 has failed by now, or is about to: nobody has asked for it
            early.take(step)
        assert len(batch_threads()) == 1
        with pytest.raises(OSError, match="no more entropy"):
            early.take(4)
    assert batch_threads() == []


def test_the_thread_ends_with_a_context_that_an_error_leaves():
    with pytest.raises(KeyError), loader(ahead=True) as early:
        early.take(0)
        raise KeyError
    assert batch_threads() == []


@pytest.mark.parametrize("shards", [range(4), range(1, 4), [2]])
@pytest.mark.parametrize("accumulate", [2, 4])
def test_the_parts_of_a_batch_hold_its_shards_in_order(shards, accumulate):
    (whole,), parts = loader(shards=shards).take(2), loader(shards=shards, accumulate=accumulate).take(2)
    assert len(parts) == -(-len(shards) * accumulate // 4)  # a part has at most 4 / accumulate shards
    for stream in range(2):
        for name in ("x_0", "noise", "timestep"):
            pieces = [getattr(part, name).split(list(part.counts))[stream] for part in parts]
            assert torch.equal(torch.cat(pieces), getattr(whole, name).split(list(whole.counts))[stream])
    assert {part.global_counts for part in parts} == {whole.global_counts} == {(10, 6)}


def test_parts_without_samples_are_left_out_and_shards_have_to_divide():
    streams = make_streams(num_shards=32, rare=1)
    groups = shard_groups(streams, range(32), 32)
    assert 10 <= len(groups) <= 11  # of 10 + 1 samples, two of which may share a shard
    assert sum(sum(streams.counts(group).values()) for group in groups) == 11
    with pytest.raises(ValueError, match="gradient_accumulation_steps=3 does not divide num_shards=4"):
        shard_groups(make_streams(), range(4), 3)
