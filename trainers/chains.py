"""The stochastic reverse chain x_T -> x_0 with Gaussian steps: what on-policy formulations roll out and train.

Its timesteps are equally spaced in the angle arccos(sqrt(alpha_bar)), from the noisiest one to 0. The state at timestep 0
counts as the sample (under the linear schedule it carries noise of standard deviation 0.01), so that every transition has
a density. From signal power a to s, with the noise prediction e at x, a step has

    mean = sqrt(s) x_0 + sqrt(1 - s - b) e,   x_0 = (x - sqrt(1 - a) e) / sqrt(a),   b = (1 - s)/(1 - a) (1 - a/s).

b, the variance of the step given x_0 too, is DDIM's at eta = 1. By itself it leaves the samples of a coarse chain too
narrow; the chain's variance is b and what not knowing x_0 adds. Measured with the exact noise prediction of three
Gaussians of standard deviation 0.4 in the plane, 24 steps: 0.36 with b alone, 0.416 with both.

Source: Song, Meng and Ermon, ICLR 2021, eq. 12; Bao et al., Analytic-DPM, ICLR 2022, and its form for imperfect
predictions, Bao et al., ICML 2022.
"""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from dualsweep.trainers.estimators import Predictor
from dualsweep.trainers.noise_schedule import NoiseSchedule
from dualsweep.trainers.samplers import at_once

CHAIN_FILE = "chain.json"


@dataclass(frozen=True, eq=False)
class Chain:
    """Gaussian transitions between decreasing timesteps. Arrays are float64; tensors have the states' type and device."""

    timesteps: np.ndarray  # int64 (steps,), where the predictions are made, from the noisiest on; the samples are at 0
    alpha_bar: np.ndarray  # (steps + 1,), at `timesteps` and at 0
    stds: np.ndarray  # (steps,), positive
    clip_sample: bool  # clip the predicted x_0 to [-1, 1], as for images

    @property
    def steps(self) -> int:
        return len(self.stds)

    @cached_property
    def path_kl_weights(self) -> np.ndarray:
        """KL of two transitions per unit of squared difference of their noise predictions, (steps,).

        Exact where nothing is clipped; `divergences` is exact always.
        """
        signal, spread, following, along = self._coefficients
        return np.square(along - following * spread / signal) / (2 * np.square(self.stds))

    @cached_property
    def _coefficients(self) -> np.ndarray:
        """sqrt(a), sqrt(1 - a), sqrt(s) and sqrt(1 - s - b) of the module docstring, (4, steps)."""
        power, following = self.alpha_bar[:-1], self.alpha_bar[1:]
        along = 1 - following - conditional_variances(self.alpha_bar)
        return np.sqrt([power, 1 - power, following, along])

    def rollout(self, predictor: Predictor, noises: torch.Tensor) -> torch.Tensor:
        """Run the chain; where torch records gradients they flow through all of it.

        Args:
            noises: standard normal, shape (n, steps + 1, *sample_shape): x_T, then what each step adds.
        Returns: states (steps + 1, n, *sample_shape), x_T first, the samples last.
        Raises: ValueError for another number of steps.
        """
        if noises.ndim < 3 or noises.shape[1] != self.steps + 1:
            raise ValueError(
                f"noises have shape {tuple(noises.shape)}, expected (n, {self.steps + 1}, *sample_shape): the start, and "
                f"what each of the {self.steps} steps adds"
            )
        states = [noises[:, 0]]
        for step, std in enumerate(self.stds.tolist()):
            states.append(self._next_mean(predictor, states[-1], step) + std * noises[:, step + 1])
        return torch.stack(states)

    @torch.no_grad()
    def sample(
        self, predictor: Predictor, start: torch.Tensor, *, seed: int, batch_size: int | None = None
    ) -> torch.Tensor:
        """Samples alone, same shape and device as `start`; row i depends on its own start, `seed` and i, not on batches.

        Args:
            start: x_T, standard normal, shape (n, *sample_shape), n >= 1.
        """
        x_t, batch_size = start, batch_size or at_once(start)
        for step, std in enumerate(self.stds.tolist()):
            generator = np.random.Generator(np.random.Philox(key=[seed, 0xC4A1], counter=[0, 0, 0, step]))
            noise = torch.from_numpy(generator.standard_normal(start.shape, dtype=np.float32)).to(start)
            x_t = torch.cat([self._next_mean(predictor, part, step) for part in x_t.split(batch_size)]) + std * noise
        return x_t

    def _next_mean(self, predictor: Predictor, x_t: torch.Tensor, step: int) -> torch.Tensor:
        timestep = torch.full((len(x_t),), int(self.timesteps[step]), device=x_t.device)
        return self._means(x_t, predictor(x_t, timestep).to(x_t.dtype), *self._coefficients[:, step].tolist())

    def predictions(self, predictor: Predictor, states: torch.Tensor) -> torch.Tensor:
        """Noise predictions at every state where a step begins, in one forward.

        Args:
            states: (steps + 1, n, *sample_shape), as `rollout` gives them.
        Returns: (steps, n, *sample_shape).
        """
        x_t = states[:-1]
        timestep = torch.from_numpy(self.timesteps).to(x_t.device).repeat_interleave(x_t.shape[1])
        return predictor(x_t.flatten(0, 1), timestep).to(x_t.dtype).view(x_t.shape)

    def clean(self, states: torch.Tensor, predictions: torch.Tensor) -> torch.Tensor:
        """The x_0 that the predictions stand for at every state where a step begins, (steps, n, *sample_shape)."""
        signal, spread, _, _ = self._columns(states)
        return self._clean(states[:-1], predictions, signal, spread)

    def means(self, states: torch.Tensor, predictions: torch.Tensor) -> torch.Tensor:
        """Means of all transitions from the given states, (steps, n, *sample_shape)."""
        return self._means(states[:-1], predictions, *self._columns(states))

    def drawn_means(self, states: torch.Tensor, noises: torch.Tensor) -> torch.Tensor:
        """Means of the transitions that `rollout` made of these noises, without another forward; with their graph."""
        added = noises[:, 1:].transpose(0, 1)
        return states[1:] - _column(self.stds, added) * added

    def _columns(self, states: torch.Tensor) -> list[torch.Tensor]:
        return [_column(values, states) for values in self._coefficients]

    def _clean(self, x_t, prediction, signal, spread):
        x_0 = (x_t - spread * prediction) / signal
        return x_0.clamp(-1, 1) if self.clip_sample else x_0

    def _means(self, x_t, prediction, signal, spread, following, along):
        """Coefficients are numbers, or tensors that spread over the states."""
        if not self.clip_sample:
            return following / signal * x_t + (along - following * spread / signal) * prediction
        return following * self._clean(x_t, prediction, signal, spread) + along * prediction

    def divergences(self, means: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
        """KL in nats of two models' transitions from the same states, (steps, n)."""
        squares = (means - others).square().flatten(2).sum(2)
        return squares * _column(0.5 / np.square(self.stds), squares)

    def log_probs(self, states: torch.Tensor, means: torch.Tensor) -> torch.Tensor:
        """Log density of each state given the one before, less its constant, (steps, n).

        The states count as given numbers and the means are differentiated: the score function's gradient. The other way
        round its sign turns, and without 1/std^2 its scale is lost (methods.md 7g).
        """
        squares = (states[1:].detach() - means).square().flatten(2).sum(2)
        return squares * _column(-0.5 / np.square(self.stds), squares)

    def log_ratios(self, states: torch.Tensor, means: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
        """Log density of each transition under one model less that under the other, (steps, n), with every graph kept."""
        squares, theirs = ((states[1:] - m).square().flatten(2).sum(2) for m in (means, others))
        return (theirs - squares) * _column(0.5 / np.square(self.stds), squares)


def save_chain(chain: Chain, folder: Path) -> None:
    """Write ``chain.json`` beside a model that is to be sampled by this chain."""
    values = {name: getattr(chain, name).tolist() for name in ("timesteps", "alpha_bar", "stds")}
    text = json.dumps({**values, "clip_sample": chain.clip_sample}, indent=1)
    Path(folder, CHAIN_FILE).write_text(text, encoding="utf-8")


def load_chain(folder: str | Path) -> Chain | None:
    """The chain beside a model; None where there is no file.

    Raises: ValueError naming the file when it is not whole.
    """
    path = Path(folder) / CHAIN_FILE
    if not path.is_file():
        return None
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        chain = Chain(
            timesteps=np.array(stored["timesteps"], dtype=np.int64),
            alpha_bar=np.array(stored["alpha_bar"], dtype=np.float64),
            stds=np.array(stored["stds"], dtype=np.float64),
            clip_sample=bool(stored["clip_sample"]),
        )
    except (OSError, json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: no chain can be read ({error}); give a folder that a sweep saved") from error
    if not len(chain.timesteps) == chain.steps == len(chain.alpha_bar) - 1 >= 1 or not (chain.stds > 0).all():
        raise ValueError(f"{path}: no chain (its arrays do not fit each other); restore the file")
    return chain


def _column(values: np.ndarray, like: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(values).to(like).view(-1, *[1] * (like.ndim - 1))


def conditional_variances(alpha_bar: np.ndarray) -> np.ndarray:
    """Variance of the next state given this one and x_0, of every step between the given signal powers, (steps,)."""
    power, following = alpha_bar[:-1], alpha_bar[1:]
    return (1 - following) / (1 - power) * (1 - power / following)


def chain_timesteps(schedule: NoiseSchedule, steps: int) -> np.ndarray:
    """int64 (steps + 1,), decreasing to 0: the nearest to equal spacing in angle.

    Raises: ValueError where two of them would be the same.
    """
    angles = np.arccos(np.sqrt(schedule.alpha_bar))
    targets = np.linspace(angles[-1], angles[0], steps + 1)
    timesteps = np.abs(angles - targets[:, None]).argmin(axis=1).astype(np.int64)
    if (np.diff(timesteps) >= 0).any():
        raise ValueError(
            f"formulation.num_sampling_steps={steps}: the schedule has {schedule.num_train_timesteps} timesteps and can't "
            "tell so many steps of equal angle apart; give fewer"
        )
    return timesteps


def build_chain(schedule: NoiseSchedule, steps: int, errors: np.ndarray | None = None) -> Chain:
    """The chain of so many steps.

    Args:
        errors: mean squared error of an entry of the noise prediction at each of the steps' timesteps
            (`prediction_errors`), (steps,); None: the variance given x_0 alone, DDIM's at eta = 1.
    Raises: ValueError for more steps than the schedule can tell apart.
    """
    timesteps = chain_timesteps(schedule, steps)
    alpha_bar = schedule.alpha_bar[timesteps]
    clip_sample = bool(schedule.scheduler.config.clip_sample)
    variances = conditional_variances(alpha_bar)
    if errors is not None:
        power, following = alpha_bar[:-1], alpha_bar[1:]
        of_clean = (1 - power) / power * errors  # mean square of an entry of x_0 - predicted x_0
        if clip_sample:
            of_clean = np.minimum(of_clean, 1.0)  # the largest variance on [-1, 1]
        slopes = np.sqrt(following) - np.sqrt((1 - following - variances) * power / (1 - power))  # of the mean in x_0
        variances = variances + np.square(slopes) * of_clean
    return Chain(timesteps[:-1], alpha_bar, np.sqrt(variances), clip_sample)


@torch.no_grad()
def prediction_errors(
    predictor: Predictor,
    samples: torch.Tensor,
    schedule: NoiseSchedule,
    timesteps: np.ndarray,
    *,
    seed: int,
    batch_size: int = 1024,
) -> np.ndarray:
    """Mean squared error of an entry of the noise prediction on noised samples at each timestep, float64 (timesteps,).

    For the exact prediction e it is 1 - E[e^2], the quantity of Analytic-DPM, but better known where it is small: at the
    noisy end the chain multiplies it by more than a hundred.
    """
    errors = []
    for timestep in timesteps.tolist():
        generator = np.random.Generator(np.random.Philox(key=[seed, 0xADB], counter=[0, 0, 0, timestep]))
        noise = torch.from_numpy(generator.standard_normal(samples.shape, dtype=np.float32)).to(samples)
        total = 0.0
        for x_0, drawn in zip(samples.split(batch_size), noise.split(batch_size), strict=True):
            t = torch.full((len(x_0),), timestep, device=samples.device)
            error = predictor(schedule.add_noise(x_0, drawn, t), t).float() - drawn
            total += float(error.square().double().sum())
        errors.append(total / noise.numel())
    return np.array(errors)
