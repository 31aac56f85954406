"""Reverse process: DDIM through diffusers, with starting noise drawn by logical shard."""

from collections.abc import Iterable

import numpy as np
import torch

from dualsweep.trainers.noise_schedule import NoiseSchedule


def starting_noise(
    *, seed: int, counter: int, shards: Iterable[int], counts: dict[int, int], shape: tuple[int, ...]
) -> torch.Tensor:
    """Standard normal starts, float32 (sum of counts of `shards`, *shape); shard k's numbers depend on (seed, counter, k) alone."""
    parts = []
    for shard in shards:
        generator = np.random.Generator(np.random.Philox(key=[seed, 0x5A3B1E], counter=[0, 0, counter, shard]))
        parts.append(generator.standard_normal((counts[shard], *shape), dtype=np.float32))
    return torch.from_numpy(np.concatenate(parts)) if parts else torch.empty((0, *shape))


def at_once(samples: torch.Tensor) -> int:
    """How many samples go through a model at once: of vectors many, for starting its operations costs more than they do."""
    return 4096 if samples.dim() == 2 else 256


@torch.inference_mode()
def ddim_sample(
    denoiser: torch.nn.Module,
    start: torch.Tensor,
    schedule: NoiseSchedule,
    *,
    num_sampling_steps: int,
    batch_size: int | None = None,
) -> torch.Tensor:
    """Deterministic DDIM samples (eta = 0).

    Args:
        start: x_T, standard normal, shape (n, *sample_shape).
        num_sampling_steps: at most schedule.num_train_timesteps; timesteps end at the noisiest one ("trailing").
        batch_size: how many go through the model at once; None: `at_once` says.
    Returns: x_0, same shape as start, on the CPU.
    Source: Song, Meng and Ermon, ICLR 2021, eq. 12.
    """
    from diffusers import DDIMScheduler  # here: see NoiseSchedule

    device = next(denoiser.parameters()).device
    scheduler = DDIMScheduler.from_config(schedule.scheduler.config, set_alpha_to_one=True)
    scheduler.set_timesteps(min(num_sampling_steps, schedule.num_train_timesteps))
    was_training = denoiser.training
    denoiser.eval()
    done = []
    for x_t in start.split(batch_size or at_once(start)):
        x_t = x_t.to(device)
        # Not scheduler.step: diffusers steps to t - T // n, which is the next timestep only where n divides T.
        for timestep, following in zip(scheduler.timesteps, [*scheduler.timesteps[1:].tolist(), None], strict=True):
            prediction = denoiser(x_t, timestep.to(device).expand(len(x_t))).float()
            now = float(schedule.alpha_bar[int(timestep)])
            after = 1.0 if following is None else float(schedule.alpha_bar[following])
            x_0 = (x_t - (1 - now) ** 0.5 * prediction) / now**0.5
            if scheduler.config.clip_sample:
                x_0 = x_0.clamp(-1, 1)
            x_t = after**0.5 * x_0 + (1 - after) ** 0.5 * prediction
        done.append(x_t.cpu())
    denoiser.train(was_training)
    return torch.cat(done) if done else start
