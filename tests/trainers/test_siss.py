"""SISS without importance sampling: shared noise, a forget gradient of fixed norm, no dual step (methods.md 8)."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dualsweep.orchestration.config import SweepConfig, load_config
from dualsweep.trainers.methods import METHODS
from dualsweep.trainers.methods.siss import SISS
from dualsweep.trainers.noise_schedule import NoiseSchedule

EXAMPLE = Path(__file__).parents[2] / "examples" / "gmm_unlearn_forward_kl.yaml"
BASELINE = {
    "method": "siss",
    "formulation": {"gradient_norm": 0.1},
    "dual": {"rule": "fixed", "start": 1.0},
    "thresholds": {"unit": "loss", "list": [{"sets": 0.5}]},
}


@pytest.fixture(scope="module")
def siss(make_setting):
    options = {"levels": 32, "gradient_norm": 0.05, "loss_ceiling": None}
    return SISS(make_setting(options=options, unit="loss", optimizer={"normalize": False}))


def config(**changes):
    values = load_config(EXAMPLE, environment=False).to_dict() | BASELINE
    values["primal"]["constraint_batch_size"] = values["primal"]["batch_size"]
    for section, fields in changes.items():
        values[section] = values[section] | fields
    return SweepConfig.from_dict(values)


def test_the_gradient_is_that_of_the_paper_on_shared_timesteps_and_noise(siss, tiny_denoiser, tiny_batch):
    denoiser, batch = tiny_denoiser(), tiny_batch((6, 6))
    found = denoiser.gradient(siss.primal_loss(denoiser, batch, torch.ones(1, dtype=torch.float64)).loss)
    noise, timestep = batch.noise[:6], batch.timestep[:6]

    def gradient(x_0):
        x_t = NoiseSchedule(num_train_timesteps=50).add_noise(x_0, noise, timestep)
        return denoiser.gradient(torch.nn.functional.mse_loss(denoiser(x_t, timestep), noise))

    retain, forget = gradient(batch.x_0[:6]), gradient(batch.x_0[6:])
    torch.testing.assert_close(found, retain - 0.05 * forget / forget.norm(), rtol=1e-5, atol=1e-6)


def test_what_the_forget_streams_drew_themselves_does_not_matter(siss, tiny_denoiser, tiny_batch):
    denoiser, batch = tiny_denoiser(), tiny_batch((6, 6, 6))
    other = replace(batch, noise=batch.noise.clone(), timestep=batch.timestep.clone())
    other.noise[6:] *= -1
    other.timestep[6:] = 49 - other.timestep[6:]
    weights = torch.ones(2, dtype=torch.float64)
    first, second = (siss.primal_loss(denoiser, part, weights).values for part in (batch, other))
    assert torch.equal(first, second)


def test_it_is_found_by_its_name_and_its_losses_are_wanted_large():
    assert METHODS["siss"] is SISS
    found = config()
    SISS.check(found.to_dict(), ("right", "top"))
    assert found.sense == ">="
    assert SISS.pretraining_sets(("right", "top"), "loss") == ("main",)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"formulation": {"gradient_norm": None}}, "formulation.gradient_norm is missing"),
        ({"dual": {"rule": "ascent", "step_size": 0.1}}, "dual.rule='ascent'.*give rule: fixed"),
        ({"dual": {"start": 0.0}}, "dual.start=0: siss has no dual step"),
        ({"primal": {"constraint_batch_size": 3}}, "primal.constraint_batch_size=3: .*give primal.batch_size=1024"),
    ],
)
def test_what_it_cannot_do_is_refused_by_field(changes, message):
    with pytest.raises(ValueError, match=message):
        SISS.check(config(**changes).to_dict(), ("right", "top"))
