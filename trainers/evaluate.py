"""Held-out denoising errors: log-SNR weighted in nats, to compare models, and plain losses of a set."""

import numpy as np
import torch

from dualsweep.trainers.noise_schedule import NoiseSchedule

EVALUATION_COUNTER = 2**40  # keeps evaluation draws apart from every dual step's


@torch.inference_mode()
def weighted_errors(
    denoiser: torch.nn.Module,
    samples: np.ndarray,
    schedule: NoiseSchedule,
    *,
    levels: int,
    seed: int,
    batch_size: int = 256,
) -> np.ndarray:
    """Half the log-SNR integral of the squared noise-prediction error of every sample, nats, float64 shape (n,).

    The difference of two denoisers' values is the log likelihood ratio of the sample: the noise is drawn from `seed` alone,
    so both must be evaluated with the same seed (common random numbers).
    Source: unlearning paper, Lemma 2 (I-MMSE); methods.md 0.3.
    """
    timesteps, weights = schedule.log_snr_grid(levels)
    device = next(denoiser.parameters()).device
    x_0 = torch.from_numpy(np.ascontiguousarray(samples))
    total = np.zeros(len(samples))
    was_training = denoiser.training
    denoiser.eval()
    for level, (timestep, weight) in enumerate(zip(timesteps, weights, strict=True)):
        generator = np.random.Generator(np.random.Philox(key=[seed, 0xE7A1], counter=[0, 0, 0, level]))
        noise = torch.from_numpy(generator.standard_normal(x_0.shape, dtype=np.float32))
        for start in range(0, len(x_0), batch_size):
            part = slice(start, start + batch_size)
            clean, drawn = x_0[part].to(device), noise[part].to(device)
            t = torch.full((len(clean),), int(timestep), device=device)
            error = denoiser(schedule.add_noise(clean, drawn, t), t).float() - drawn
            total[part] += weight * error.square().flatten(1).sum(1).double().cpu().numpy()
    denoiser.train(was_training)
    return total


@torch.inference_mode()
def denoising_losses(
    denoiser: torch.nn.Module,
    samples: np.ndarray,
    schedule: NoiseSchedule,
    *,
    draws: int,
    seed: int,
    whole: bool = False,
) -> np.ndarray:
    """Table row (sum, sum of squares, count) of `draws` plain noise-prediction losses on samples of a set, uniform timesteps.

    The samples stand for the law they come from: what counts is their number, and each is the mean over its draws.

    Args:
        whole: the samples are all there is of the set (listed images). Chance is then in timestep and noise alone: a row a
            draw, each image's mean replaced by that of all, so that the spread is the one around the images' own means.
    """
    generator = np.random.Generator(np.random.Philox(key=[seed, 0x10555]))
    images = generator.permutation(len(samples))[:draws]
    index = np.repeat(images, max(1, draws // len(images)))
    device = next(denoiser.parameters()).device
    losses = []
    for part in np.array_split(index, max(1, draws // 256)):
        x_0 = torch.from_numpy(samples[part]).to(device)
        noise = torch.from_numpy(generator.standard_normal(x_0.shape, dtype=np.float32)).to(device)
        t = torch.from_numpy(generator.integers(schedule.num_train_timesteps, size=len(part))).to(device)
        losses.append(
            (denoiser(schedule.add_noise(x_0, noise, t), t).float() - noise)
            .square()
            .flatten(1)
            .mean(1)
            .double()
            .cpu()
            .numpy()
        )
    table = np.concatenate(losses).reshape(len(images), -1)
    means, each = table.mean(1), table.shape[1]
    values = means
    if whole and each > 1 and len(images) == len(samples):
        values = (means.mean() + (table - means[:, None]) * np.sqrt(each / (each - 1))).flatten()
    return np.array([values.sum(), np.square(values).sum(), float(len(values))])
