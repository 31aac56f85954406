"""Shared by the trainers' tests: one torch thread (two cores for everybody), an accelerator, and exact denoisers."""

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from dualsweep.datasets import DatasetSpec, MinoritySpec, build
from dualsweep.datasets.gaussians import GaussianMixture
from dualsweep.trainers.labellers import training_labeller
from dualsweep.trainers.methods import Setting
from dualsweep.trainers.methods.base import Batch
from dualsweep.trainers.noise_schedule import NoiseSchedule

torch.set_num_threads(1)


class ExactDenoiser(torch.nn.Module):
    """E[noise | x_t] of a Gaussian mixture in float64: what a perfectly trained network would answer."""

    def __init__(self, mixture: GaussianMixture, schedule: NoiseSchedule) -> None:
        super().__init__()
        self.mixture, self.schedule = mixture, schedule
        self.anchor = torch.nn.Parameter(torch.zeros(1))  # tells callers the device

    def forward(self, x_t: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        alpha_bar = self.schedule.alpha_bar[timestep.numpy()]
        return torch.from_numpy(self.mixture.noise_prediction(x_t.numpy(), alpha_bar))


@pytest.fixture(scope="session")
def exact_denoiser():
    """`exact_denoiser(mixture, schedule)`."""
    return ExactDenoiser


@pytest.fixture(scope="session")
def gaussian():
    """`gaussian(mean, std)`: one Gaussian on the line."""
    return lambda mean, std: GaussianMixture(np.array([[mean]]), np.array([std]), np.ones(1))


@pytest.fixture(scope="session")
def accelerator():
    return Accelerator(cpu=True)


@pytest.fixture(scope="session")
def make_setting():
    """`make_setting(schedule=..., names=..., ...)`: a Setting for one formulation, with two components of a mixture as sets."""

    def make(**given) -> Setting:
        schedule = given.pop("schedule", None) or NoiseSchedule(num_train_timesteps=50, clip_sample=False)
        data = given.pop("data", None) or build(
            DatasetSpec(
                dataset="gaussian_mixture",
                means=((-2.0, 0.0), (2.0, 0.0), (0.0, 2.0)),
                stds=(0.4, 0.4, 0.4),
                weights=(0.5, 0.3, 0.2),
                count=200,
                minority=MinoritySpec(classes=(1, 2)),
            )
        )
        tensors = {"main": torch.from_numpy(data.main.samples)}
        tensors |= {name: torch.from_numpy(samples) for name, samples in data.constraints.items()}
        optimizer = {"batch_size": 16, "constraint_batch_size": 8, "normalize": True, "num_shards": 4}
        values = {
            "data": data,
            "schedule": schedule,
            "base": None,
            "names": tuple(data.constraints),
            "unit": "share",
            "options": {},
            "measure": {"num_samples": 64, "num_sampling_steps": 5, "window": 1},
            "seed": 0,
            "device": torch.device("cpu"),
            "tensors": tensors,
            "labeller": lambda: training_labeller(data),
        }
        given["optimizer"] = optimizer | given.get("optimizer", {})
        return Setting(**values | given)

    return make


class TinyDenoiser(torch.nn.Module):
    """Two layers in float64 for samples of shape (batch, 3) and 50 timesteps.

    Without the tanh a squared error is quadratic in the weights of `leave`: central differences have no truncation error.
    """

    def __init__(self, *, linear: bool = False, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.enter, self.leave = torch.nn.Linear(4, 6).double(), torch.nn.Linear(6, 3).double()
        self.linear = linear

    def forward(self, x_t: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        hidden = self.enter(torch.cat([x_t, timestep[:, None] / 50], dim=1))
        return self.leave(hidden if self.linear else torch.tanh(hidden))

    def gradient(self, loss: torch.Tensor) -> torch.Tensor:
        """Of a loss in all weights, one vector."""
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(self.parameters()), retain_graph=True)])

    def slopes(self, loss, entries=((0, 0), (1, 3), (2, 5)), step=0.1) -> list[float]:
        """Central differences of `loss()` in these weights of `leave`."""
        weight, found = self.leave.weight, []
        with torch.no_grad():
            for entry in entries:
                ends = []
                for sign in (1, -1):
                    weight[entry] += sign * step
                    with torch.enable_grad():
                        ends.append(float(loss().detach()))
                    weight[entry] -= sign * step
                found.append((ends[0] - ends[1]) / (2 * step))
        return found


@pytest.fixture(scope="session")
def tiny_denoiser():
    """`tiny_denoiser(linear=..., seed=...)`."""
    return TinyDenoiser


@pytest.fixture(scope="session")
def tiny_batch():
    """`tiny_batch(counts, seed=...)`: one worker's batch of all streams for a tiny denoiser."""

    def make(counts, seed=1) -> Batch:
        generator = torch.Generator().manual_seed(seed)
        size = sum(counts)
        return Batch(
            x_0=torch.randn(size, 3, dtype=torch.float64, generator=generator),
            noise=torch.randn(size, 3, dtype=torch.float64, generator=generator),
            timestep=torch.randint(50, (size,), generator=generator),
            counts=tuple(counts),
            global_counts=tuple(counts),
        )

    return make


@pytest.fixture(scope="session")
def part_of():
    """`part_of(batch, pieces)`: the batch of a worker that holds `pieces`, one slice a stream."""

    def part(batch: Batch, pieces) -> Batch:
        rows = [
            torch.arange(len(batch.x_0)).split(batch.counts)[stream][piece].tolist()
            for stream, piece in enumerate(pieces)
        ]
        chosen = torch.tensor([row for stream in rows for row in stream], dtype=torch.int64)
        return Batch(
            x_0=batch.x_0[chosen],
            noise=batch.noise[chosen],
            timestep=batch.timestep[chosen],
            counts=tuple(len(stream) for stream in rows),
            global_counts=batch.global_counts,
        )

    return part


class ConditionalDenoiser(torch.nn.Module):
    """Exact noise predictions of several mixtures, told apart by the condition."""

    def __init__(self, mixtures, schedule: NoiseSchedule) -> None:
        super().__init__()
        self.laws = torch.nn.ModuleList(ExactDenoiser(mixture, schedule) for mixture in mixtures)
        self.num_conditions = len(mixtures)

    def forward(self, x_t, timestep, condition=None):
        condition = torch.zeros_like(timestep) if condition is None else condition
        found = torch.empty(x_t.shape, dtype=torch.float64)
        for index in condition.unique().tolist():
            rows = condition == index
            found[rows] = self.laws[index](x_t[rows], timestep[rows])
        return found


@pytest.fixture(scope="session")
def conditional_denoiser():
    """`conditional_denoiser(mixtures, schedule)`: condition i of the model is the i-th mixture."""
    return ConditionalDenoiser
