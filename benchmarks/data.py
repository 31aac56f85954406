"""Samples a second of the streams, from Parquet, image folders and memory, against a plain tensor loop and Ray Data.

All give the batches of one primal step (64 samples of the main set, 16 of each of three constraint sets) with timesteps and
noise, on one thread. The plain loop indexes a tensor with torch's generator and can be resumed from nowhere; the streams draw
the same numbers on any number of workers. Parquet and folders are decoded once, when a worker starts, and are tensors from
then on: `parquet_vs_*` and `folder_vs_*` time the same loop in memory, twice, and hold no reading of files. That is
`*_decode_per_s`, images a second from the file to the tensor, in each repeat; `*_decode_steps` says how many steps of the
loop decoding all images takes as long as. Ray Data iterates over the same images, decoded, written anew and materialised
beforehand, one shuffled iterator a stream, its samples alone: timesteps and noise are added as in the plain loop, and its
reading is left out too. `*_vs_plain` is samples a second over the plain loop's in the same turn; `*_vs_ray_data` over Ray Data's.

    python benchmarks/data.py [--images 2000] [--size 28] [--steps 200] [--repeats 7] [--no-ray-data]
"""

import argparse
import io
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from _harness import closing_line, own_folder, seconds, spread
from PIL import Image

from dualsweep.datasets import ConstrainedData, DatasetSpec, MinoritySpec, Streams, build
from dualsweep.trainers.batches import BatchLoader
from dualsweep.trainers.methods.base import Batch

CLASSES = 10
MINORITY = (4, 5, 7)
TIMESTEPS = 1000
MAIN, EACH = 64, 16  # samples a primal step


def pictures(count: int, size: int) -> list[tuple[bytes, int]]:
    """PNGs with a structure that compresses as a photograph does, and their classes."""
    rng, found = np.random.default_rng(0), []
    for number in range(count):
        coarse = rng.integers(0, 256, size=(max(2, size // 4), max(2, size // 4)), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC).save(buffer, "PNG")
        found.append((buffer.getvalue(), number % CLASSES))
    return found


def write_files(images: list[tuple[bytes, int]], folder: Path) -> tuple[Path, Path]:
    """The same images as one Parquet file in the Hugging Face layout, and as a folder a class."""
    parquet, tree = folder / "images.parquet", folder / "tree"
    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    column = pa.array([{"bytes": encoded, "path": None} for encoded, _ in images], struct)
    pq.write_table(pa.table({"image": column, "label": pa.array([label for _, label in images], pa.int64())}), parquet)
    for number, (encoded, label) in enumerate(images):
        (tree / str(label)).mkdir(parents=True, exist_ok=True)
        (tree / str(label) / f"{number:06d}.png").write_bytes(encoded)
    return parquet, tree


def streamed(data: ConstrainedData) -> Callable[[int], Batch]:
    """A step's batch as the training loop makes it."""
    tensors = {"main": torch.from_numpy(data.main.samples)}
    tensors |= {name: torch.from_numpy(samples) for name, samples in data.constraints.items()}
    streams = Streams(
        sizes={name: len(samples) for name, samples in tensors.items()},
        batch_sizes={name: MAIN if name == "main" else EACH for name in tensors},
        seed=0,
        num_shards=8,
        num_train_timesteps=TIMESTEPS,
        sample_shape=data.sample_shape,
    )
    loader = BatchLoader(streams, range(8), tensors, torch.device("cpu"), steps=2**31)
    return lambda step: loader.take(step)[0]


def with_noise(samples: list[torch.Tensor]) -> Batch:
    x_0, counts = torch.cat(samples), tuple(len(part) for part in samples)
    return Batch(x_0, torch.randn_like(x_0), torch.randint(TIMESTEPS, (len(x_0),)), counts, counts)


def plain(data: ConstrainedData) -> Callable[[int], Batch]:
    tensors = [torch.from_numpy(samples) for samples in (data.main.samples, *data.constraints.values())]
    sizes = [MAIN] + [EACH] * (len(tensors) - 1)
    return lambda step: with_noise(
        [part[torch.randint(len(part), (size,))] for part, size in zip(tensors, sizes, strict=True)]
    )


def ray_data(data: ConstrainedData, folder: Path) -> Callable[[int], Batch]:
    """One endless iterator a stream over materialised blocks of decoded samples."""
    import ray

    ray.data.DataContext.get_current().enable_progress_bars = False
    parts = []
    for number, (samples, size) in enumerate(
        [(data.main.samples, MAIN), *((samples, EACH) for samples in data.constraints.values())]
    ):
        path = folder / f"stream-{number}.parquet"
        flat = pa.FixedSizeListArray.from_arrays(samples.reshape(-1), samples[0].size)
        pq.write_table(pa.table({"x": flat}), path)
        parts.append((ray.data.read_parquet(str(path)).materialize(), size))

    def endless(blocks, size: int) -> Iterator[torch.Tensor]:
        while True:
            for batch in blocks.iter_torch_batches(
                batch_size=size, local_shuffle_buffer_size=4 * size, local_shuffle_seed=0, drop_last=True
            ):
                yield batch["x"].reshape(-1, *data.sample_shape)

    iterators = [endless(blocks, size) for blocks, size in parts]
    return lambda step: with_noise([next(iterator) for iterator in iterators])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--size", type=int, default=28, help="pixels")
    parser.add_argument("--steps", type=int, default=200, help="batches of each measurement")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--no-ray-data", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    figures: dict[str, float] = {}
    with own_folder() as folder:
        parquet, tree = write_files(pictures(options.images, options.size), folder)
        # Half the images of a class are its own constraint set's as well; the rest of the spec is the main job's.
        minority = MinoritySpec(classes=MINORITY, keep=0.5)
        sources: dict[str, Callable[[int], Batch]] = {}
        specs = {
            name: DatasetSpec(dataset=name, path=str(path), minority=minority)
            for name, path in (("parquet", parquet), ("folder", tree))
        }
        decoding: dict[str, list[float]] = {name: [] for name in specs}
        for repeat in range(options.repeats + 1):
            for name, spec in specs.items():
                took = seconds(lambda spec=spec: build(spec))
                if repeat:  # the first is a warm-up
                    decoding[name].append(options.images / took)
        for name, values in decoding.items():
            figures[f"{name}_decode_per_s"] = statistics.median(values)
            print(f"decode {name:8} {spread(values, 'images/s', 0)}")
            data = build(specs[name])
            sources[name] = streamed(data)
        sources["plain"] = plain(data)
        if not options.no_ray_data:
            from dualsweep.orchestration.cluster import start_ray, stop_ray

            start_ray(num_cpus=2)
            sources["ray_data"] = ray_data(data, folder)
        rates: dict[str, list[float]] = {name: [] for name in sources}
        samples = options.steps * (MAIN + EACH * len(MINORITY))
        for repeat in range(options.repeats + 1):
            for name, batch_of in sources.items():

                def run(batch_of=batch_of, first=repeat * options.steps) -> None:
                    for step in range(first, first + options.steps):
                        batch_of(step)

                rate = samples / seconds(run)
                if repeat:  # the first is a warm-up
                    rates[name].append(rate)
        if not options.no_ray_data:
            stop_ray()
    for name, values in rates.items():
        print(f"{name:10} {spread(values, 'samples/s', 0)}")
    for name in ("parquet", "folder"):
        decoded_s = options.images / figures[f"{name}_decode_per_s"]
        step_s = (MAIN + EACH * len(MINORITY)) / statistics.median(rates[name])
        figures[f"{name}_decode_steps"] = decoded_s / step_s
        for other in ("plain", "ray_data"):
            if other in rates:
                ratios = [a / b for a, b in zip(rates[name], rates[other], strict=True)]
                figures[f"{name}_vs_{other}"] = statistics.median(ratios)
    figures |= {f"{name}_samples_per_s": statistics.median(values) for name, values in rates.items()}
    closing_line("data", figures)


if __name__ == "__main__":
    main()
