"""The stochastic reverse chain x_T -> x_0 whose steps are Gaussians: what on-policy formulations roll out and train.

Its timesteps are equally spaced in the angle arccos(sqrt(alpha_bar)), from the noisiest one to 0. The state at timestep 0
counts as the sample (it carries noise of standard deviation 0.01 under the linear schedule), so that every transition has
a density. A step from signal power a to s with noise prediction e has

    mean = sqrt(s) x_0 + sqrt(1 - s - b) e,   x_0 = (x - sqrt(1 - a) e) / sqrt(a),   b = (1 - s)/(1 - a) (1 - a/s),

where b, the posterior variance, is DDIM's at eta = 1. The variance of the step is b, which leaves the samples of a
coarse chain too narrow, or b plus what the uncertainty about x_0 adds. Measured with the exact noise prediction of three
Gaussians of standard deviation 0.4 in the plane, 24 steps: 0.36 with b alone, 0.416 with the other.

Source: Song, Meng and Ermon, ICLR 2021, eq. 12; Bao et al., ICLR 2022 (Analytic-DPM), theorem 1, in the form for
imperfect predictions of Bao et al., ICML 2022, theorem 2.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from dualsweep.trainers.estimators import Predictor
from dualsweep.trainers.noise_schedule import NoiseSchedule


@dataclass(frozen=True, eq=False)
class Rollout:
    """One run of the chain from given noise."""

    states: torch.Tensor  # (steps + 1, n, *sample_shape), x_T first, the samples last
    means: torch.Tensor  # (steps, n, *sample_shape), of each state but the first given the one before

    @property
    def samples(self) -> torch.Tensor:
        return self.states[-1]


@dataclass(frozen=True, eq=False)
class Chain:
    """Gaussian transitions between decreasing timesteps; arrays are float64."""

    timesteps: np.ndarray  # int64 (steps + 1,), from the noisiest to 0; no prediction is made at the last
    alpha_bar: np.ndarray  # (steps + 1,), at `timesteps`
    stds: np.ndarray  # (steps,), positive
    clip_sample: bool  # clip the predicted x_0 to [-1, 1], as images are

    @property
    def steps(self) -> int:
        return len(self.stds)

    @cached_property
    def posterior_variances(self) -> np.ndarray:
        """b of the module docstring, (steps,)."""
        return posterior_variances(self.alpha_bar)

    @cached_property
    def path_kl_weights(self) -> np.ndarray:
        """KL of two transitions per unit of squared difference of their noise predictions, (steps,).

        Exact where nothing is clipped; `divergences` is exact always.
        """
        power, following = self.alpha_bar[:-1], self.alpha_bar[1:]
        along = np.sqrt(1 - following - self.posterior_variances)
        return np.square(along - np.sqrt(following * (1 - power) / power)) / (2 * np.square(self.stds))

    def rollout(self, predictor: Predictor, noises: torch.Tensor) -> Rollout:
        """Run the chain; gradients flow through all of it where torch records them.

        Args:
            noises: standard normal, shape (n, steps + 1, *sample_shape): x_T, then what each step adds.
        Raises: ValueError for another number of steps.
        """
        if noises.ndim < 3 or noises.shape[1] != self.steps + 1:
            raise ValueError(
                f"noises have shape {tuple(noises.shape)}, expected (n, {self.steps + 1}, *sample_shape): x_T and one a step"
            )
        states, means = [noises[:, 0]], []
        for step in range(self.steps):
            mean = self._step_mean(predictor, states[-1], step)
            means.append(mean)
            states.append(mean + float(self.stds[step]) * noises[:, step + 1])
        return Rollout(torch.stack(states), torch.stack(means))

    @torch.no_grad()
    def sample(
        self, predictor: Predictor, start: torch.Tensor, *, seed: int, counter: int, batch_size: int
    ) -> torch.Tensor:
        """Samples alone, on the CPU: row i depends on row i of `start`, (seed, counter) and i, not on the batches.

        Args:
            start: x_T, standard normal, shape (n, *sample_shape), on the predictor's device or the CPU.
        """
        x_t = start
        for step in range(self.steps):
            generator = np.random.Generator(np.random.Philox(key=[seed, 0xC4A1], counter=[0, 0, counter, step]))
            noise = torch.from_numpy(generator.standard_normal(start.shape, dtype=np.float32)).to(start)
            parts = [self._step_mean(predictor, part, step) for part in x_t.split(batch_size)]
            x_t = torch.cat(parts) + float(self.stds[step]) * noise if parts else x_t
        return x_t.cpu()

    def _step_mean(self, predictor: Predictor, x_t: torch.Tensor, step: int) -> torch.Tensor:
        timestep = torch.full((len(x_t),), int(self.timesteps[step]), device=x_t.device)
        return self._mean(x_t, predictor(x_t, timestep), slice(step, step + 1))

    def means(self, states: torch.Tensor, predictor: Predictor) -> torch.Tensor:
        """Means of all transitions from the given states, in one forward.

        Args:
            states: (steps + 1, n, *sample_shape), as `rollout` gives them; the last, where no step begins, is not used.
        Returns: (steps, n, *sample_shape).
        """
        x_t = states[:-1]
        timestep = torch.from_numpy(self.timesteps[:-1]).to(x_t.device).repeat_interleave(x_t.shape[1])
        return self._mean(x_t, predictor(x_t.flatten(0, 1), timestep).view(x_t.shape), slice(None))

    def _mean(self, x_t: torch.Tensor, prediction: torch.Tensor, steps: slice) -> torch.Tensor:
        """Means of transitions; the leading axis of x_t is that of `steps`, unless that is a single one."""
        power, following = self.alpha_bar[:-1][steps], self.alpha_bar[1:][steps]

        def column(values: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(values).to(x_t).view(-1, *[1] * (x_t.ndim - 1))

        prediction = prediction.to(x_t.dtype)  # half-precision predictions: states stay in the samples' precision
        x_0 = (x_t - column(np.sqrt(1 - power)) * prediction) / column(np.sqrt(power))
        if self.clip_sample:
            x_0 = x_0.clamp(-1, 1)
        along = column(np.sqrt(1 - following - self.posterior_variances[steps]))
        return column(np.sqrt(following)) * x_0 + along * prediction

    def divergences(self, means: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
        """KL in nats between the transitions of two models from the same states, (steps, n)."""
        return self._per_step((means - others).square().flatten(2).sum(2), 0.5 / np.square(self.stds))

    def log_probs(self, states: torch.Tensor, means: torch.Tensor) -> torch.Tensor:
        """Log density of every state given the one before, less its constant, (steps, n).

        The states are taken as given numbers, the means are differentiated: the gradient is the score function's, 1/std^2
        included. With the means fixed and the states differentiated it would have the wrong sign (methods.md 7g).
        """
        return self._per_step((states[1:].detach() - means).square().flatten(2).sum(2), -0.5 / np.square(self.stds))

    def _per_step(self, values: torch.Tensor, weights: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(weights).to(values)[:, None] * values


def chain_timesteps(schedule: NoiseSchedule, steps: int) -> np.ndarray:
    """int64 (steps + 1,): equally spaced in angle, the nearest there are, decreasing to 0.

    Raises: ValueError where two of them fall on one timestep.
    """
    angles = np.arccos(np.sqrt(schedule.alpha_bar))
    targets = np.linspace(angles[-1], angles[0], steps + 1)
    timesteps = np.abs(angles[None, :] - targets[:, None]).argmin(axis=1)
    if (np.diff(timesteps) >= 0).any():
        raise ValueError(
            f"formulation.num_sampling_steps={steps}: more than the {schedule.num_train_timesteps} timesteps of the "
            f"schedule can tell apart; give fewer"
        )
    return timesteps.astype(np.int64)


def posterior_variances(alpha_bar: np.ndarray) -> np.ndarray:
    """Variance of x_s given x_t and x_0 for each step, (steps,): sigma^2 of DDIM at eta = 1."""
    power, following = alpha_bar[:-1], alpha_bar[1:]
    return (1 - following) / (1 - power) * (1 - power / following)


def build_chain(schedule: NoiseSchedule, steps: int, errors: np.ndarray | None = None) -> Chain:
    """The chain of so many steps.

    Args:
        errors: mean squared error of the noise prediction at each step's timestep, an entry (`prediction_errors`), (steps,);
            None: the posterior variance alone.
    Raises: ValueError for too many steps.
    """
    timesteps = chain_timesteps(schedule, steps)
    alpha_bar = schedule.alpha_bar[timesteps]
    clip = bool(schedule.scheduler.config.clip_sample)
    variances = posterior_variances(alpha_bar)
    if errors is not None:
        power, following = alpha_bar[:-1], alpha_bar[1:]
        of_x_0 = (1 - power) / power * errors  # expected variance of x_0 given x_t, an entry
        if clip:
            of_x_0 = np.minimum(of_x_0, 1.0)  # nothing in [-1, 1] varies more
        # How far the mean of the step moves with x_0, where x_t = sqrt(a) x_0 + sqrt(1 - a) e is given.
        slopes = np.sqrt(following) - np.sqrt((1 - following - variances) * power / (1 - power))
        variances = variances + np.square(slopes) * of_x_0
    return Chain(timesteps, alpha_bar, np.sqrt(variances), clip)


@torch.no_grad()
def prediction_errors(
    predictor: Predictor, samples: torch.Tensor, schedule: NoiseSchedule, timesteps: np.ndarray, *, seed: int
) -> np.ndarray:
    """Mean squared error of the noise prediction at each timestep, an entry, on noised samples; float64 (timesteps,).

    For the exact prediction this is 1 - E[e^2], what Analytic-DPM uses; the error itself is known far better where it is
    small, which the noisy end of the chain needs: there it is multiplied by up to s/a, more than a hundred.
    """
    found = []
    for timestep in timesteps.tolist():
        generator = np.random.Generator(np.random.Philox(key=[seed, 0xADB], counter=[0, 0, 0, timestep]))
        noise = torch.from_numpy(generator.standard_normal(samples.shape, dtype=np.float32)).to(samples)
        each = torch.full((len(samples),), timestep, device=samples.device)
        parts = zip(*(rows.split(1024) for rows in (samples, noise, each)), strict=True)
        total = sum(
            float((predictor(schedule.add_noise(x_0, drawn, t), t).float() - drawn).square().double().sum())
            for x_0, drawn, t in parts
        )
        found.append(total / noise.numel())
    return np.array(found)
