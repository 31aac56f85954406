"""Likelihood ratios of the conditional model against exact ones, their unit, and the sign of the gradient."""

from pathlib import Path

import numpy as np
import pytest
import torch

from dualsweep.constraints import Constraint
from dualsweep.datasets import DatasetSpec, SetSpec, build
from dualsweep.orchestration.config import load_config, sweep_points
from dualsweep.orchestration.local_dual import LocalDual
from dualsweep.trainers.assignment import Assignment
from dualsweep.trainers.loop import run_trial
from dualsweep.trainers.methods import Setting
from dualsweep.trainers.methods.base import Batch
from dualsweep.trainers.methods.unlearn_likelihood import UnlearnLikelihood
from dualsweep.trainers.noise_schedule import NoiseSchedule
from dualsweep.trainers.workspace import Workspace

EXAMPLE = Path(__file__).parents[2] / "examples" / "gmm_unlearn_likelihood.yaml"
SCHEDULE = NoiseSchedule(clip_sample=False)
DATA = build(
    DatasetSpec(
        dataset="gaussian_mixture",
        means=((-1.5, -0.8), (1.5, -0.8), (0.0, 1.7)),
        stds=(0.4, 0.4, 0.4),
        weights=(0.4, 0.3, 0.3),
        count=2000,
        sets={"left": SetSpec(classes=(0,)), "up": SetSpec(classes=(2,))},
    )
)
LAWS = [DATA.mixture, *DATA.constraint_mixtures.values()]


class Exact(torch.nn.Module):
    """Noise predictions of the laws themselves, condition by condition, which torch can differentiate.

    `push` is added to a prediction, in the direction that moves samples to the right.
    """

    num_conditions = 3

    def __init__(self, push: float = 0.0) -> None:
        super().__init__()
        self.push = torch.nn.Parameter(torch.tensor(push, dtype=torch.float64))

    def forward(self, x_t, timestep, condition=None):
        condition = torch.zeros_like(timestep) if condition is None else condition
        found = torch.zeros_like(x_t, dtype=torch.float64)
        power = torch.from_numpy(SCHEDULE.alpha_bar)[timestep][:, None, None]
        for index, law in enumerate(LAWS):
            means, stds, weights = (torch.from_numpy(v.copy()) for v in (law.means, law.stds, law.weights))
            variances = power * stds**2 + 1 - power
            gaps = x_t.double()[:, None] - power.sqrt() * means
            joint = weights.log() - 0.5 * (gaps**2 / variances + variances.log()).sum(2)
            score = -(torch.softmax(joint, 1)[..., None] * gaps / variances).sum(1)
            found = torch.where((condition == index)[:, None], -(1 - power[:, 0]).sqrt() * score, found)
        return found - self.push * torch.tensor([1.0, 0.0], dtype=torch.float64)


class Alone(UnlearnLikelihood):
    """Without a process group."""

    sum_over_workers = staticmethod(lambda values: values)


class Closed(Alone):
    """With the exact ratio, as a function torch can differentiate."""

    through = False

    @property
    def backpropagates(self):
        return self.through

    def raw_values(self, samples, noises):
        logs = []
        for law in LAWS:
            means, stds, weights = (torch.from_numpy(v.copy()) for v in (law.means, law.stds, law.weights))
            joint = weights.log() - (((samples[:, None].double() - means) / stds) ** 2 / 2 + stds.log()).sum(2)
            logs.append(torch.logsumexp(joint, 1))
        return torch.stack([(log - logs[0]).exp() for log in logs[1:]])


def make_setting(**changes):
    options = {"num_sampling_steps": 8, "pool": 1024, "levels": 12, "ratio_clip": None}
    given = {
        "data": DATA,
        "schedule": SCHEDULE,
        "base": Exact().requires_grad_(False),
        "names": ("left", "up"),
        "unit": "likelihood_ratio",
        "options": options | changes.pop("options", {}),
        "optimizer": {"batch_size": 64, "normalize": False, "num_shards": 4},
        "measure": {},
        "seed": 0,
        "device": torch.device("cpu"),
        "tensors": {"main": torch.from_numpy(DATA.main.samples)},
        "labeller": lambda: None,
    }
    return Setting(**given | changes)


def points(count=300):
    return torch.from_numpy(DATA.mixture.sample(count, np.random.default_rng(0))[0])


def exact_ratios(x):
    return np.stack([np.exp(law.log_density(x) - LAWS[0].log_density(x)) for law in LAWS[1:]])


@pytest.mark.parametrize(("levels", "error"), [(12, 0.25), (48, 0.03)])
def test_ratios_are_those_of_the_laws(levels, error):
    found = Alone(make_setting(options={"levels": levels})).raw_values(points(), points()).numpy()
    exact = exact_ratios(points().numpy())
    # Measured root mean squares on ratios up to 3.3: 0.18 with 12 steps of the ODE, 0.015 with 48.
    assert found.shape == (2, 300) and np.sqrt(np.mean((found - exact) ** 2)) < error


def test_without_a_clip_of_its_own_a_class_stops_at_one_over_its_share():
    found = Alone(make_setting()).raw_values(points(), points())
    assert found.amax(1).tolist() == pytest.approx([1 / 0.4, 1 / 0.3], rel=0.01)
    assert Alone(make_setting(options={"ratio_clip": 1.5})).raw_values(points(), points()).max() == 1.5
    loose = Alone(make_setting(options={"ratio_clip": 50.0})).raw_values(points(), points())
    assert float(loose.max()) > float(found.max())  # what the clip takes away


def test_the_pretrained_chain_has_a_mean_ratio_of_one():
    calibration = Alone(make_setting()).calibrate()
    assert calibration.metrics == pytest.approx([1, 1], abs=1e-9)
    method = Alone(make_setting())
    raw_mean = method._pool[1].flatten().tolist()
    # Ratios of disjoint parts have a variance of 1/share - 1: 0.038 and 0.048 a standard error, four of them.
    assert raw_mean == pytest.approx([1, 1], abs=0.2)


def test_the_gradient_is_that_of_the_lagrangian_with_exact_ratios():
    """Against back-propagation through the closed form; a step against it lowers the mean ratio."""
    multipliers, model = torch.tensor([0.7, 0.2], dtype=torch.float64), Exact(0.05)

    def slopes(through):
        method, found = Closed(make_setting()), []
        method.through = through
        for seed in range(30):
            generator = torch.Generator().manual_seed(seed)
            noise = torch.randn(400, 9, 2, dtype=torch.float64, generator=generator)
            batch = Batch(noise[:, 0], noise, torch.randint(1000, (400,), generator=generator), (400,), (400,))
            found.append(torch.autograd.grad(method.primal_loss(model, batch, multipliers).loss, [model.push])[0])
        found = torch.stack(found)
        return float(found.mean()), float(found.std() / np.sqrt(30))

    (policy, policy_error), (exact, exact_error) = slopes(False), slopes(True)
    assert abs(policy - exact) < 4 * np.hypot(policy_error, exact_error)
    # The other sign of the ratios' part would be this far off: both gradients know it.
    free = Closed(make_setting())
    free.sign = -1.0
    noise = torch.randn(4000, 9, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(99))
    batch = Batch(noise[:, 0], noise, torch.arange(4000) % 1000, (4000,), (4000,))
    (flipped,) = torch.autograd.grad(free.primal_loss(model, batch, multipliers).loss, [model.push])
    assert abs(float(flipped) - exact) > 10 * policy_error


def test_the_dual_value_rises_with_the_multipliers_like_the_mean_ratio():
    method, step = Closed(make_setting()), 1e-4
    assert method.dual_value(np.zeros(2))[0] == 0
    slopes = [method.dual_value(step * axis)[0] / step for axis in np.eye(2)]
    assert slopes == pytest.approx([1, 1], abs=1e-3)  # E_q[r] = 1, curvature below 3


def test_images_get_their_noise_shard_by_shard():
    class Noisy(torch.nn.Module):
        num_conditions = 3

        def forward(self, x_t, timestep, condition):
            return x_t * (0.9 + 0.1 * condition[:, None, None, None])

    shape, generator = (1, 4, 4), torch.Generator().manual_seed(0)
    samples, noises = torch.rand(8, *shape, generator=generator), torch.randn(8, 3, *shape, generator=generator)
    method = Alone(
        make_setting(base=Noisy(), optimizer={"batch_size": 8, "num_shards": 4}, options={"ratio_clip": 1e9})
    )
    whole = method.raw_values(samples, noises)
    # Two workers hold two shards each.
    halves = [method.raw_values(samples[half], noises[half]) for half in (slice(0, 4), slice(4, 8))]
    torch.testing.assert_close(torch.cat(halves, dim=1), whole)
    assert whole.shape == (2, 8)


def test_the_exact_answer_is_the_closed_form_for_modes_apart():
    method = Alone(make_setting(names=("left",)))
    exact = method.exact([Constraint(name="left", unit="likelihood_ratio", threshold=0.4)], {"rule": "ascent"})
    # methods.md H4; the modes are 3 apart with deviations of 0.4, so they overlap a little.
    assert exact.multipliers == pytest.approx([0.4 * np.log(0.84 / 0.24)], abs=2e-3)


def test_a_model_without_the_sets_conditions_is_refused():
    base = Exact()
    base.num_conditions = 0
    with pytest.raises(ValueError, match=r"model\.pretrained: the model knows 0 conditions"):
        Alone(make_setting(base=base)).raw_values(points(), points())


def test_a_clip_that_means_do_not_fit_below_is_refused():
    config = load_config(EXAMPLE, ["formulation.ratio_clip=0.9"], environment=False).to_dict()
    with pytest.raises(ValueError, match=r"formulation\.ratio_clip=0\.9: ratios have mean 1"):
        UnlearnLikelihood.check(config, ("left",))


@pytest.mark.slow
def test_the_example_finds_the_exact_answer(tmp_path):
    # Seed 0. The chain's coarseness leaves the multiplier 2 to 5 percent high; a fresh metric has a s.e. of 0.0093 and the
    # pool's mean ratio one of 1.3 percent: 0.04 is four of both.
    torch.set_num_threads(1)
    overrides = [f"storage={tmp_path}", "baselines.unconstrained=false", "baselines.fixed_weights=[]"]
    config = load_config(EXAMPLE, overrides, environment=False)
    workspace, dual = Workspace(config.to_dict(), config.data), LocalDual()
    base = {"trial_id": "base", "label": "base", "kind": "base", "thresholds": {}, "fixed_weight": None}
    for point in [base, *sweep_points(config, workspace.constraint_names)]:
        folders = {"trial_dir": str(tmp_path / point["trial_id"]), "base_dir": str(tmp_path / "base")}
        result = run_trial(workspace, Assignment(**point, **folders, attempt=1), dual)
    assert result["averaged_multipliers"]["left"] == pytest.approx(result["exact_multipliers"]["left"], rel=0.05)
    assert result["constraints"][0]["user_value"] == pytest.approx(0.4, abs=0.04)
    assert result["objective"]["value"] == pytest.approx(result["exact_objective"], abs=0.015)
