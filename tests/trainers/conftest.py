"""Shared by the trainers' tests: one torch thread (two cores for everybody), an accelerator, and exact denoisers."""

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from dualsweep.datasets import DatasetSpec, MinoritySpec, build
from dualsweep.datasets.gaussians import GaussianMixture
from dualsweep.trainers.labellers import training_labeller
from dualsweep.trainers.methods import Setting
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
