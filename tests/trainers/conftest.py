"""Shared by the trainers' tests: one torch thread (two cores for everybody), an accelerator, and exact denoisers."""

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from dualsweep.datasets.gaussians import GaussianMixture
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
