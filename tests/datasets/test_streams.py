"""The logical-shard order: the same numbers whoever draws them, and different numbers everywhere else."""

import pickle
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dualsweep.datasets.streams import Streams, shard_draw, stream_key

SHAPE = (1, 4, 4)
GOLDEN_KEY = [11745160666943418229, 12458495832531305669]
GOLDEN_INDICES = [868, 388, 654]
GOLDEN_TIMESTEPS = [219, 59, 619]
GOLDEN_NOISE = [0.55502969, 1.7079707, 0.81408066, -1.8722155, -1.6299732, 1.0895934]


def make_streams(*, batch=64, constraint_batch=16, num_shards=8, seed=3, constraints=3) -> Streams:
    names = [f"c{i}" for i in range(constraints)]
    return Streams(
        sizes={"main": 1000, **{name: 40 + i for i, name in enumerate(names)}},
        batch_sizes={"main": batch, **dict.fromkeys(names, constraint_batch)},
        seed=seed,
        num_shards=num_shards,
        num_train_timesteps=100,
        sample_shape=SHAPE,
    )


def joined(draws):
    return {name: tuple(np.concatenate([draw[name][part] for draw in draws]) for part in range(3)) for name in draws[0]}


def assert_same(left, right):
    assert list(left) == list(right)
    for name in left:
        for a, b in zip(left[name], right[name], strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("constraint_batch", [16, 5])  # 5: fewer samples than shards
def test_any_number_of_workers_draws_the_same_union_in_the_same_order(world_size, constraint_batch):
    streams = make_streams(constraint_batch=constraint_batch)
    for step in (0, 7):
        whole = streams.draw(step, range(8))
        parts = [streams.draw(step, streams.shards_of(rank, world_size)) for rank in range(world_size)]
        assert_same(whole, joined(parts))


def test_a_draw_equals_shard_draw_number_for_number():
    streams = make_streams(batch=61, constraint_batch=5)
    drawn = streams.draw(11, range(8))
    for name, size in streams.sizes.items():
        counts = streams.shard_counts(name)
        single = [
            shard_draw(
                seed=3, stream=name, step=11, shard=shard, count=int(counts[shard]), num_samples=size,
                num_train_timesteps=100, sample_shape=SHAPE,
            )
            for shard in range(8)
        ]  # fmt: skip
        assert_same({name: drawn[name]}, {name: tuple(np.concatenate(part) for part in zip(*single, strict=True))})


def test_a_resumed_run_draws_what_the_uninterrupted_one_drew():
    calm = [make_streams().draw(step, range(8)) for step in range(4)]
    streams = pickle.loads(pickle.dumps(make_streams()))
    streams.draw(9, [5])  # what was drawn before must not matter
    for step in (3, 1, 2, 0):
        assert_same(streams.draw(step, range(8)), calm[step])


def test_a_trial_that_goes_on_from_another_draws_what_comes_after_it():
    later, all_of_them = replace(make_streams(), first_step=5), make_streams()
    for step in (0, 3):
        assert_same(later.draw(step, range(8)), all_of_them.draw(5 + step, range(8)))


def test_seed_stream_step_and_shard_each_change_every_draw():
    address = {"seed": 0, "stream": "main", "step": 0, "shard": 0}
    fixed = {"count": 16, "num_samples": 10**6, "num_train_timesteps": 1000, "sample_shape": SHAPE}
    base = shard_draw(**address, **fixed)
    for change in ({"seed": 1}, {"stream": "c0"}, {"step": 1}, {"shard": 1}):
        other = shard_draw(**{**address, **change}, **fixed)
        assert not np.isin(other[0], base[0]).all()
        assert not np.isin(other[2].ravel(), base[2].ravel()).any()  # no overlap of the underlying sequences


def test_the_numbers_are_those_of_every_process_and_every_release():
    # A golden value: a change here breaks resuming runs started before it. ziggurat values to float32 round-off.
    indices, timesteps, noise = shard_draw(
        seed=5,
        stream="digit_4",
        step=12,
        shard=3,
        count=3,
        num_samples=1000,
        num_train_timesteps=1000,
        sample_shape=(2,),
    )
    code = (
        "from dualsweep.datasets.streams import shard_draw;"
        "print([part.tolist() for part in shard_draw(seed=5, stream='digit_4', step=12, shard=3, count=3,"
        " num_samples=1000, num_train_timesteps=1000, sample_shape=(2,))])"
    )
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert other == str([indices.tolist(), timesteps.tolist(), noise.tolist()])
    assert stream_key(5, "digit_4").tolist() == GOLDEN_KEY
    assert indices.tolist() == GOLDEN_INDICES
    assert timesteps.tolist() == GOLDEN_TIMESTEPS
    np.testing.assert_allclose(noise.ravel(), GOLDEN_NOISE, rtol=1e-6)


def test_indices_timesteps_and_noise_have_the_right_law():
    indices, timesteps, noise = shard_draw(
        seed=1, stream="main", step=0, shard=0, count=40_000, num_samples=10, num_train_timesteps=20, sample_shape=(2,)
    )
    # Counts are binomial; 5 standard deviations, so a false alarm about once in 50 000 seeds for all 30 together.
    for values, limit in ((indices, 10), (timesteps, 20)):
        counts = np.bincount(values, minlength=limit)
        assert len(counts) == limit
        assert abs(counts - 40_000 / limit).max() < 5 * np.sqrt(40_000 / limit)
    assert abs(np.corrcoef(indices, timesteps)[0, 1]) < 5 / 200
    assert abs(noise.mean()) < 5 / np.sqrt(80_000)
    assert abs(noise.var() - 1) < 5 * np.sqrt(2 / 80_000)
    assert (indices.dtype, timesteps.dtype, noise.dtype) == (np.int64, np.int64, np.float32)


@settings(max_examples=60, deadline=None)
@given(batch=st.integers(1, 200), num_shards=st.integers(1, 40), data=st.data())
def test_every_worker_gets_its_part_of_the_batch_to_within_one_sample(batch, num_shards, data):
    streams = make_streams(batch=batch, num_shards=num_shards, constraints=0)
    counts = streams.shard_counts("main")
    assert counts.sum() == batch
    assert counts.max() - counts.min() <= 1
    world_size = data.draw(st.integers(1, num_shards))
    owned = [streams.shards_of(rank, world_size) for rank in range(world_size)]
    assert [shard for shards in owned for shard in shards] == list(range(num_shards))
    lengths = [len(shards) for shards in owned]
    assert max(lengths) - min(lengths) <= 1
    for shards in owned:
        drawn = streams.counts(shards)["main"]
        assert abs(drawn - batch * len(shards) / num_shards) < 1 + 1e-9
        assert len(streams.draw(0, shards)["main"][0]) == drawn


@pytest.mark.parametrize(
    "change, message",
    [
        ({"num_shards": 0}, "num_shards=0: must be at least 1"),
        ({"seed": -1}, "seed=-1: must be at least 0"),
        ({"first_step": -1}, "first_step=-1: must be at least 0"),
        ({"num_train_timesteps": 0}, "num_train_timesteps=0"),
        ({"batch_sizes": {"main": 0}}, r"batch_sizes\['main'\]=0"),
        ({"sizes": {"main": 0}}, r"sizes\['main'\]=0"),
        ({"batch_sizes": {"other": 4}}, "give both the same"),
    ],
)
def test_bad_arguments_are_refused_by_name(change, message):
    arguments = {
        "sizes": {"main": 5}, "batch_sizes": {"main": 2}, "seed": 0, "num_shards": 2, "num_train_timesteps": 10,
        "sample_shape": SHAPE,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        Streams(**{**arguments, **change})


def test_a_rank_or_shard_that_does_not_exist_is_refused():
    streams = make_streams()
    with pytest.raises(ValueError, match="world_size=9 exceeds num_shards=8"):
        streams.shards_of(0, 9)
    with pytest.raises(ValueError, match="rank=2"):
        streams.shards_of(2, 2)
    with pytest.raises(ValueError, match=r"shards \[8\]"):
        streams.draw(0, [8])
    with pytest.raises(ValueError, match="step=-1"):
        streams.draw(-1, [0])
    with pytest.raises(ValueError, match="count=-2"):
        shard_draw(
            seed=0, stream="main", step=0, shard=0, count=-2, num_samples=5, num_train_timesteps=5, sample_shape=()
        )
