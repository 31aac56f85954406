"""The forward noising process: betas, alpha_bar, log SNR, through diffusers' DDPMScheduler."""

import numpy as np
import torch


class NoiseSchedule:
    """x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) noise, t in [0, num_train_timesteps).

    `alpha_bar` is float64, shape (num_train_timesteps,); `scheduler` is what pipelines and samplers are built from.
    """

    def __init__(
        self,
        *,
        kind: str = "linear",
        num_train_timesteps: int = 1000,
        beta_start: float = 1e-4,
        beta_end: float = 0.02,
        clip_sample: bool = True,
    ) -> None:
        from diffusers import DDPMScheduler  # here: it takes seconds, and checking a sweep needs none of it

        self.scheduler = DDPMScheduler(
            num_train_timesteps=num_train_timesteps,
            beta_start=beta_start,
            beta_end=beta_end,
            beta_schedule=kind,
            clip_sample=clip_sample,
            timestep_spacing="trailing",
        )
        self.num_train_timesteps = num_train_timesteps
        self.alpha_bar = np.cumprod(1.0 - self.scheduler.betas.double().numpy())
        self._scales: dict[torch.device, tuple[torch.Tensor, torch.Tensor]] = {}

    @property
    def log_snr(self) -> np.ndarray:
        """log(alpha_bar / (1 - alpha_bar)), shape (num_train_timesteps,), decreasing in t."""
        return np.log(self.alpha_bar) - np.log1p(-self.alpha_bar)

    def coefficients(self, timestep: torch.Tensor, ndim: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Signal and noise scale of each timestep, float32, shape (batch, 1, ..., 1) with `ndim` axes."""
        signal, scale = self._tables(timestep.device)
        shape = (-1,) + (1,) * (ndim - 1)
        return signal[timestep].view(shape), scale[timestep].view(shape)

    def _tables(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Both scales of every timestep, float32, copied to a device once: a copy in each step would wait for it."""
        if device not in self._scales:
            with torch.inference_mode(False):  # kept beyond the call that happens to be the first
                alpha_bar = torch.as_tensor(self.alpha_bar, device=device)
                self._scales[device] = (alpha_bar.sqrt().float(), (1 - alpha_bar).sqrt().float())
        return self._scales[device]

    def add_noise(self, x_0: torch.Tensor, noise: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        """x_t for int64 timesteps of shape (batch,)."""
        signal, scale = self.coefficients(timestep, x_0.ndim)
        return signal * x_0 + scale * noise

    def log_snr_grid(self, levels: int) -> tuple[np.ndarray, np.ndarray]:
        """Timesteps evenly spaced in log SNR and their quadrature weights.

        Returns: timesteps int64 (<= levels,), increasing; weights float64, nats per unit of ``sum over dimensions of
            squared noise-prediction error``: half the log SNR that each level stands for, so they sum to half the range.
        Source: the I-MMSE identity, ``log p_a - log p_b = 1/2 int E[mse_b - mse_a] d log SNR`` (unlearning paper, Lemma 2).
        """
        log_snr = self.log_snr
        targets = np.linspace(log_snr[0], log_snr[-1], levels)
        timesteps = np.unique([int(np.abs(log_snr - target).argmin()) for target in targets])
        at = log_snr[timesteps]
        edges = np.concatenate([[log_snr[0]], (at[1:] + at[:-1]) / 2, [log_snr[-1]]])
        return timesteps.astype(np.int64), 0.5 * -np.diff(edges)
