"""Which samples, timesteps and noise a primal step uses: the same numbers on one worker or many, fresh or resumed.

The batch of every stream ("main" and one a constraint) is split over a fixed number of logical shards. Shard k of step
s draws from a counter-based generator addressed by (seed, stream name, s, k), so nothing has to be stored or skipped
over: workers own shards, and whoever owns shard k draws what anybody else would have drawn.

Cost: 4 streams over 8 shards, 64 + 3 * 16 samples of 1x8x8, take 0.3 to 0.4 ms on one core of
a shared machine (1.2 to 1.4 ms with a new generator for each shard, which gives the same numbers).
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Draw = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]


def shard_draw(
    *,
    seed: int,
    stream: str,
    step: int,
    shard: int,
    count: int,
    num_samples: int,
    num_train_timesteps: int,
    sample_shape: tuple[int, ...],
) -> Draw:
    """What one shard of one stream draws at one step; depends on the arguments alone.

    Returns: (indices int64 in [0, num_samples), timesteps int64 in [0, num_train_timesteps), standard normal noise
        float32), shapes (count,), (count,), (count, *sample_shape). Indices are drawn with replacement.
    Raises: ValueError for a negative seed, step, shard or count.
    """
    if min(seed, step, shard, count) < 0:
        raise ValueError(f"seed={seed}, step={step}, shard={shard} and count={count} must all be >= 0")
    uniforms = np.empty((count, 2))
    noise = np.empty((count, *sample_shape), dtype=np.float32)
    # Word 0 of the counter runs within the shard (2^66 numbers), words 1 and 2 keep shards and steps apart.
    bits = np.random.Philox(key=stream_key(seed, stream), counter=np.array([0, shard, step, 0], dtype=np.uint64))
    generator = np.random.Generator(bits)
    generator.random(out=uniforms)
    generator.standard_normal(dtype=np.float32, out=noise)
    return _scaled(uniforms[:, 0], num_samples), _scaled(uniforms[:, 1], num_train_timesteps), noise


def stream_key(seed: int, stream: str) -> NDArray[np.uint64]:
    """Philox key of a stream: 128 bits of SHA-256, since Python's hash() differs from process to process."""
    digest = hashlib.sha256(f"dualsweep stream {seed} {stream}".encode()).digest()
    return np.frombuffer(digest[:16], dtype="<u8").astype(np.uint64)


@dataclass(frozen=True, kw_only=True, eq=False)
class Streams:
    """The draws of all streams of a trial. Immutable, so it may be shared by threads and sent to workers."""

    sizes: dict[str, int]  # stream name -> number of training samples
    batch_sizes: dict[str, int]  # stream name -> global samples a primal step, over all shards; same names
    seed: int
    num_shards: int
    num_train_timesteps: int
    sample_shape: tuple[int, ...]
    first_step: int = 0  # steps whose draws are another's: a trial that goes on from a neighbour goes on with its draws

    def __post_init__(self) -> None:
        object.__setattr__(self, "sample_shape", tuple(self.sample_shape))
        if list(self.sizes) != list(self.batch_sizes):
            raise ValueError(
                f"sizes name the streams {list(self.sizes)}, batch_sizes {list(self.batch_sizes)}: give both the same"
            )
        counts = {"seed": self.seed + 1, "first_step": self.first_step + 1}
        counts |= {"num_shards": self.num_shards, "num_train_timesteps": self.num_train_timesteps}
        counts |= {f"sizes[{name!r}]": size for name, size in self.sizes.items()}
        counts |= {f"batch_sizes[{name!r}]": size for name, size in self.batch_sizes.items()}
        for name, value in counts.items():
            if value < 1:
                shown, least = (value - 1, 0) if name in ("seed", "first_step") else (value, 1)
                raise ValueError(f"{name}={shown}: must be at least {least}")

    @property
    def names(self) -> tuple[str, ...]:
        """Stream names in order."""
        return tuple(self.sizes)

    def shards_of(self, rank: int, world_size: int) -> range:
        """The shards worker ``rank`` of ``world_size`` owns: contiguous, sizes differing by at most one.

        Raises: ValueError if there are more workers than shards, for a worker without work would stall the others.
        """
        if not 0 <= rank < world_size:
            raise ValueError(f"rank={rank} is not in [0, world_size={world_size})")
        if world_size > self.num_shards:
            raise ValueError(
                f"world_size={world_size} exceeds num_shards={self.num_shards}: use fewer workers or more shards"
            )
        return range(rank * self.num_shards // world_size, (rank + 1) * self.num_shards // world_size)

    def shard_counts(self, stream: str) -> NDArray[np.int64]:
        """Samples each shard draws from a stream, shape (num_shards,); they sum to the stream's batch size.

        Spread evenly also where the batch is smaller than the number of shards, so that any contiguous run of shards
        holds its part of the batch to within one sample.
        """
        return self._counts[stream]

    def counts(self, shards: Iterable[int]) -> dict[str, int]:
        """Stream name -> samples these shards draw a step: what a worker weighs its means with. May be 0."""
        chosen = self._checked(shards)
        return {name: int(self._counts[name][chosen].sum()) for name in self.sizes}

    def draw(self, step: int, shards: Iterable[int]) -> dict[str, Draw]:
        """The draws of all streams at one step, concatenated over ``shards`` in the order given.

        Returns: stream name -> (indices, timesteps, noise) as in shard_draw at ``first_step + step``, first axis counts(shards)[name].
        Raises: ValueError for a shard outside [0, num_shards) or a negative step.
        """
        if step < 0:
            raise ValueError(f"step={step}: must be >= 0")
        chosen = self._checked(shards)
        # Moving one generator costs a quarter of making one a shard; it is made here so that threads share none.
        bits = np.random.Philox(key=0)
        generator = np.random.Generator(bits)
        state = bits.state
        counter = np.zeros(4, dtype=np.uint64)
        counter[2] = self.first_step + step
        state["state"] = {"counter": counter, "key": None}
        draws = {}
        for name, num_samples in self.sizes.items():
            state["state"]["key"] = self._keys[name]
            counts = self._counts[name]
            total = int(counts[chosen].sum())
            uniforms = np.empty((total, 2))
            noise = np.empty((total, *self.sample_shape), dtype=np.float32)
            start = 0
            for shard in chosen:
                end = start + int(counts[shard])
                if end > start:
                    counter[1] = shard
                    bits.state = state
                    generator.random(out=uniforms[start:end])
                    generator.standard_normal(dtype=np.float32, out=noise[start:end])
                    start = end
            indices, timesteps = _scaled(uniforms[:, 0], num_samples), _scaled(uniforms[:, 1], self.num_train_timesteps)
            draws[name] = (indices, timesteps, noise)
        return draws

    @cached_property
    def _keys(self) -> dict[str, NDArray[np.uint64]]:
        return {name: stream_key(self.seed, name) for name in self.sizes}

    @cached_property
    def _counts(self) -> dict[str, NDArray[np.int64]]:
        edges = np.arange(self.num_shards + 1, dtype=np.int64)
        return {name: np.diff(edges * size // self.num_shards) for name, size in self.batch_sizes.items()}

    def _checked(self, shards: Iterable[int]) -> list[int]:
        chosen = [int(shard) for shard in shards]
        if any(not 0 <= shard < self.num_shards for shard in chosen):
            raise ValueError(f"shards {chosen} are not all in [0, num_shards={self.num_shards})")
        return chosen


def _scaled(uniforms: NDArray[np.float64], limit: int) -> NDArray[np.int64]:
    # floor(u * limit) < limit for every 53-bit u < 1, and the bias, limit / 2^53, is far below what a run could see.
    return (uniforms * limit).astype(np.int64)
