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
    device, count, pairs = next(denoiser.parameters()).device, len(samples), len(timesteps) * len(samples)
    x_0 = torch.from_numpy(np.ascontiguousarray(samples))
    total = np.zeros(count)
    was_training = denoiser.training
    denoiser.eval()
    drawn: dict[int, torch.Tensor] = {}  # noise of the levels that the batch is about
    # Levels follow one another without a gap: a set a little larger than a batch would else leave every second one almost empty.
    for start in range(0, pairs, batch_size):
        level, row = np.divmod(np.arange(start, min(start + batch_size, pairs)), count)
        drawn = {one: drawn[one] if one in drawn else _noise_of_level(one, seed, x_0.shape) for one in np.unique(level).tolist()}
        noise = torch.cat([drawn[one][row[level == one]] for one in drawn]).to(device)
        t = torch.from_numpy(timesteps[level].astype(np.int64)).to(device)
        error = denoiser(schedule.add_noise(x_0[row].to(device), noise, t), t).float() - noise
        np.add.at(total, row, weights[level] * error.square().flatten(1).sum(1).double().cpu().numpy())
    denoiser.train(was_training)
    return total


def _noise_of_level(level: int, seed: int, shape: torch.Size) -> torch.Tensor:
    generator = np.random.Generator(np.random.Philox(key=[seed, 0xE7A1], counter=[0, 0, 0, level]))
    return torch.from_numpy(generator.standard_normal(shape, dtype=np.float32))


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
