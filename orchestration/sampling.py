"""Samples of a model folder as files: a picture, and for vectors the numbers too."""

from pathlib import Path

import matplotlib.image
import numpy as np
import torch

from dualsweep.orchestration.config import ConfigError
from dualsweep.orchestration.sample_figures import scatter
from dualsweep.trainers.chains import load_chain
from dualsweep.trainers.codec import codec_of
from dualsweep.trainers.methods.composed import COMPOSITION_FILE, load_composition
from dualsweep.trainers.models import Denoiser, load_model, load_schedule
from dualsweep.trainers.samplers import ddim_sample, starting_noise

PICTURES = (".png", ".jpg", ".jpeg")


def draw_samples(model: Path, out: Path, *, count: int, steps: int, seed: int) -> list[Path]:
    """Draw from a trained model: images in a square grid; vectors as a scatter picture and an array beside it.

    A model that tells several laws apart is drawn from under condition 0, its main law; a composed one by its own sampler,
    one that was trained as a stochastic chain by that.

    Args:
        out: the picture.
        steps: DDIM steps; the sampler of a product of laws has its own levels, a chain its own steps.
    Returns: the files written.
    Raises: ConfigError for a folder that is no such model, or an `out` that cannot be a picture.
    """
    if out.suffix.lower() not in PICTURES:
        raise ConfigError(f"--out {str(out)!r}: give a file that ends in {', '.join(PICTURES)}")
    if not out.absolute().parent.is_dir():
        raise ConfigError(f"--out {str(out)!r}: there is no folder {str(out.absolute().parent)!r}; make it first")
    try:
        samples = _draw(model, count, steps, seed)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if samples.ndim == 4:
        matplotlib.image.imsave(out, _grid(samples))
        return [out.absolute()]
    array = out.with_suffix(".npy")
    np.save(array, samples)
    scatter(samples).savefig(out)
    return [out.absolute(), array.absolute()]


def _draw(model: Path, count: int, steps: int, seed: int) -> np.ndarray:
    """float32 (count, *image_shape). Raises: ValueError naming what is wrong with the folder."""
    codec = codec_of(model)
    composed, chain = (model / COMPOSITION_FILE).is_file(), load_chain(model)
    if composed:
        denoiser, schedule, composition = load_composition(model)
    else:
        denoiser = load_model(model)
        schedule = load_schedule(model)
    shape = _sample_shape(denoiser)
    start = starting_noise(seed=seed, counter=0, shards=[0], counts={0: count}, shape=shape)
    with torch.inference_mode():
        if composed:
            samples = composition.sample(denoiser, start, schedule, num_sampling_steps=steps)
        elif chain is not None:
            samples = chain.sample(denoiser.eval(), start, seed=seed)
        else:
            samples = ddim_sample(denoiser, start, schedule, num_sampling_steps=steps)
        return codec.decode(samples).numpy()


def _sample_shape(denoiser: Denoiser) -> tuple[int, ...]:
    config = denoiser.network.config
    if "sample_size" not in config:
        return (config.dim,)
    size = config.sample_size
    return (config.in_channels, *((size, size) if isinstance(size, int) else size))


def _grid(samples: np.ndarray) -> np.ndarray:
    """(n, c, h, w) in [-1, 1] to one picture in [0, 1], (height, width, 3), each pixel four wide."""
    count, channels, height, width = samples.shape
    side = int(np.ceil(np.sqrt(count)))
    grid = np.full((side * side, *samples.shape[1:]), -1.0, dtype=np.float32)
    grid[:count] = samples
    picture = grid.reshape(side, side, channels, height, width).transpose(0, 3, 1, 4, 2)
    picture = np.clip((picture.reshape(side * height, side * width, channels) + 1) / 2, 0, 1)
    return picture.repeat(4, 0).repeat(4, 1).repeat(3 if channels == 1 else 1, 2)
