"""Concept erasing on Gaussians of one width, where the distilled model is exact at every noise level.

For q = N(0, s^2 I) and q^i = N(m_i, s^2 I) the weighted predictions are those of N(-sum_i eta_i m_i, s^2 I), the law
q prod (q/q^i)^eta_i / Z itself. Of a mixture they are not (module docstring of esd.py); that is what the slow test is about.
"""

from pathlib import Path

import numpy as np
import pytest
import torch

from dualsweep.constraints import Constraint
from dualsweep.datasets import DatasetSpec, SetSpec, build
from dualsweep.orchestration.config import load_config, sweep_points
from dualsweep.orchestration.local_dual import LocalDual
from dualsweep.orchestration.preflight import preflight
from dualsweep.trainers.assignment import Assignment
from dualsweep.trainers.loop import run_trial
from dualsweep.trainers.methods.base import host_batch
from dualsweep.trainers.methods.esd import ESD
from dualsweep.trainers.noise_schedule import NoiseSchedule
from dualsweep.trainers.samplers import ddim_sample
from dualsweep.trainers.workspace import Workspace

EXAMPLE = Path(__file__).parents[2] / "examples" / "gmm_esd.yaml"
SCHEDULE = NoiseSchedule(clip_sample=False)
STD = 0.7
MEANS = np.array([[0.0, 0.0], [0.5, -0.3], [-0.2, 0.6]])  # q and two sets
ETA = torch.tensor([0.8, 0.3])
ERASED = -(ETA.numpy() @ MEANS[1:])


class Gaussians(torch.nn.Module):
    """The exact noise prediction of N(means[condition], STD^2 I) with trainable means."""

    def __init__(self, means) -> None:
        super().__init__()
        self.means = torch.nn.Parameter(torch.as_tensor(np.asarray(means)).float())
        self.num_conditions = len(means)

    def forward(self, x_t, timestep, condition=None):
        condition = torch.zeros_like(timestep) if condition is None else condition
        power = torch.tensor(SCHEDULE.alpha_bar).to(x_t)[timestep][:, None]
        return (1 - power).sqrt() * (x_t - power.sqrt() * self.means[condition]) / (power * STD**2 + 1 - power)


@pytest.fixture(scope="module")
def data():
    law = {"stds": (STD,)}
    sets = {
        name: SetSpec(means=(tuple(mean),), **law) for name, mean in zip(("a", "b"), MEANS[1:].tolist(), strict=True)
    }
    return build(DatasetSpec(dataset="gaussian_mixture", means=(tuple(MEANS[0]),), count=500, sets=sets, **law))


@pytest.fixture(scope="module")
def esd(data, make_setting):
    def make(**given):
        options = {**ESD.defaults, "pool": 300, **given.pop("options", {})}
        values = {
            "data": data,
            "schedule": SCHEDULE,
            "names": ("a", "b"),
            "unit": "likelihood_ratio",
            "options": options,
        }
        return ESD(make_setting(**{**values, "base": Gaussians(MEANS).requires_grad_(False), **given}))

    return make


def batch_of(method, count=24):
    generator = np.random.default_rng(3)
    (name, (samples, _)), = method.streams().items()  # fmt: skip
    draws = (
        generator.integers(len(samples), size=count),
        generator.integers(SCHEDULE.num_train_timesteps, size=count),
        generator.standard_normal((count, *method.noise_shape), dtype=np.float32),
    )
    sizes = {name: count}
    return host_batch({name: draws}, sizes, pinned=False).to_device({name: samples}, sizes, torch.device("cpu"))


@pytest.mark.parametrize("inputs", ["samples", "trajectory"])
def test_the_erased_law_has_no_loss_and_its_mirror_image_has(esd, inputs):
    method = esd(options={"inputs": inputs})
    batch = batch_of(method)
    exact = method.primal_loss(Gaussians([ERASED]), batch, ETA)
    assert float(exact.loss.detach()) < 1e-10  # float32 predictions
    for wrong in (-ERASED, np.zeros(2), -(ETA.flip(0).numpy() @ MEANS[1:])):
        assert float(method.primal_loss(Gaussians([wrong]), batch, ETA).loss.detach()) > 1e-3


def test_the_loss_is_the_plain_distillation(esd):
    """methods.md 9 written out: a forward a condition, target eps_q - sum_i eta_i (eps_i - eps_q)."""
    method, denoiser = esd(), Gaussians([[0.4, 0.1]])
    base, batch = method.setting.base, batch_of(method)
    x_t = SCHEDULE.add_noise(batch.x_0, batch.noise, batch.timestep)
    q, a, b = (base(x_t, batch.timestep, torch.full_like(batch.timestep, k)) for k in range(3))
    target = q - ETA[0] * (a - q) - ETA[1] * (b - q)
    plain = torch.nn.functional.mse_loss(denoiser(x_t, batch.timestep), target)
    torch.testing.assert_close(method.primal_loss(denoiser, batch, ETA).loss, plain / (1 + ETA.sum()))
    bare = esd(optimizer={"normalize": False}).primal_loss(denoiser, batch, ETA)
    torch.testing.assert_close(bare.loss, plain)


def test_the_values_make_up_the_lagrangian(esd):
    """distance + eta . slopes differs from the loss by a number that does not depend on the model."""
    method = esd(optimizer={"normalize": False})
    batch, rests = batch_of(method), []
    for mean in ([0.4, 0.1], [-1.0, 2.0]):
        terms = method.primal_loss(Gaussians([mean]), batch, ETA)
        assert terms.counts == (24, 24, 24)
        distance, *slopes = (part.mean() for part in terms.values.split(terms.counts))
        rests.append(float((terms.loss - distance - ETA @ torch.stack(slopes)).detach()))
    assert rests[0] == pytest.approx(rests[1], abs=1e-5) and rests[0] > 1e-3


def test_the_gradient_is_the_slope_of_the_loss(esd):
    method, denoiser = esd(), Gaussians([[0.4, 0.1]])
    batch = batch_of(method)
    (gradient,) = torch.autograd.grad(method.primal_loss(denoiser, batch, ETA).loss, [denoiser.means])
    for entry in range(2):
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                denoiser.means[0, entry] += 0.1 * sign  # the loss is quadratic in the mean: no truncation error
            ends.append(float(method.primal_loss(denoiser, batch, ETA).loss.detach()))
            with torch.no_grad():
                denoiser.means[0, entry] -= 0.1 * sign
        assert (ends[0] - ends[1]) / 0.2 == pytest.approx(float(gradient[0, entry]), rel=1e-3)


@pytest.mark.parametrize("inputs", ["samples", "trajectory"])
def test_parts_of_several_workers_add_up(esd, part_of, inputs):
    method, denoiser = esd(options={"inputs": inputs}), Gaussians([[0.4, 0.1]])
    batch = batch_of(method)
    whole = method.primal_loss(denoiser, batch, ETA)
    parts = [
        method.primal_loss(denoiser, part_of(batch, [piece]), ETA) for piece in (slice(0, 5), slice(5, 6), slice(6, 24))
    ]
    torch.testing.assert_close(sum(part.loss for part in parts), whole.loss, rtol=1e-5, atol=0)
    values = [part.values.split(part.counts) for part in parts]
    for row, expected in enumerate(whole.values.split(whole.counts)):
        torch.testing.assert_close(torch.cat([value[row] for value in values]), expected, rtol=1e-4, atol=1e-6)


def test_inputs_are_noised_samples_of_the_base_or_states_of_the_model_itself(esd):
    far = Gaussians([[30.0, 0.0]])
    fine = {"num_samples": 64, "num_sampling_steps": 100, "window": 1}
    pooled, rolled = esd(measure=fine), esd(options={"inputs": "trajectory"})
    assert pooled.pool is pooled.pool and pooled.pool.shape == (300, 2)
    # 300 samples: four standard errors of a mean are 0.16, of the spread 12 percent
    assert float(pooled.pool.mean(0).abs().max()) < 0.17 and float(pooled.pool.std()) == pytest.approx(STD, rel=0.2)
    x_t, _ = pooled._inputs(far, batch_of(pooled))
    assert float(x_t.abs().max()) < 5
    x_t, timestep = rolled._inputs(far, batch_of(rolled, count=200))
    late = timestep < 100
    assert len(timestep.unique()) == 20 and late.any() and float(x_t[late, 0].min()) > 15


def test_metrics_are_mean_ratios_of_the_models_samples(esd):
    """p = N(m, s^2 I): E_p[q^i/q] = exp(m_i . m / s^2)."""
    mean = np.array([-0.4, 0.2])
    expected = np.exp(MEANS[1:] @ mean / STD**2)
    draws = {"counter": 1, "shards": [0], "counts": {0: 4000}, "num_sampling_steps": 100}
    method = esd(options={"pool": 2000})
    found = method.measurement(method.measure(Gaussians([mean]), ETA, **draws).rows, ETA.numpy())
    for metric, stderr, value in zip(found.metrics, found.stderrs, expected, strict=True):
        # 0.02: DDIM of 100 steps and a flow of 32
        assert abs(metric - value) < 4 * stderr + 0.02 * max(1.0, abs(value)) and stderr < 0.1


def test_an_untouched_model_has_a_ratio_of_1_and_a_changed_one_its_multiple(esd):
    """The conditional model misses the density of set a by a fifth: ratios are relative to the pretrained model's own mean."""

    class Off(Gaussians):
        def forward(self, x_t, timestep, condition=None):
            found = super().forward(x_t, timestep, condition)
            return found if condition is None else found * torch.where(condition == 1, 0.9, 1.0)[:, None]

    base = Off(MEANS)
    method = esd(base=base, options={"pool": 2000})
    draws = {"counter": 1, "shards": [0], "counts": {0: 2000}, "num_sampling_steps": 50}
    rows = method.measure(base, ETA, **draws).rows
    found = method.measurement(rows, ETA.numpy())
    raw = rows[:, :2].mean(0) * method._scale(50)[0]
    assert abs(raw[0] - 1) > 0.15  # control: the model's own ratios do not have mean 1
    for column, (metric, stderr) in enumerate(zip(found.metrics, found.stderrs, strict=True)):
        assert abs(metric - 1) < 4 * stderr < 0.4
        # two samples of one size: the error of the scale counts as much as that of the draws
        assert stderr == pytest.approx(2**0.5 * rows[:, column].std(ddof=1) / 2000**0.5, rel=0.15)


def test_autocast_does_not_round_the_target(esd):
    method, denoiser = esd(), Gaussians([[0.4, 0.1]])
    batch = batch_of(method)
    exact = method.primal_loss(denoiser, batch, ETA).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(method.primal_loss(denoiser, batch, ETA).loss, exact, rtol=1e-6, atol=0)


def test_the_objective_is_the_divergence_from_the_base(esd):
    method = esd()
    evaluation = {"num_samples": 2000, "noise_levels": 64, "num_sampling_steps": 100}
    objective = method.objective(Gaussians([ERASED]), ETA, evaluation=evaluation, base_errors=None)
    expected = float(ERASED @ ERASED) / (2 * STD**2)
    assert abs(objective.value - expected) < 4 * objective.stderr + 0.03 * expected and "KL(p||q)" in objective.meaning


def test_the_exact_law_is_that_of_the_log_likelihood_constraint(esd):
    constraints = [Constraint(name=name, unit="likelihood_ratio", threshold=0.5) for name in ("a", "b")]
    oracle = esd().exact(constraints, {"rule": "fixed", "start": 0.7})
    mean = -0.7 * MEANS[1:].sum(0)
    points = np.array([[0.0, 0.0], [1.0, -1.0], mean])
    exact = -np.square(points - mean).sum(1) / (2 * STD**2) - 2 * np.log(STD) - np.log(2 * np.pi)
    assert oracle.log_density(points) == pytest.approx(exact, abs=1e-6)
    assert oracle.multipliers.tolist() == [0.7, 0.7]
    assert oracle.objective == pytest.approx(float(mean @ mean) / (2 * STD**2), rel=1e-6)


def test_a_base_that_does_not_know_the_sets_is_refused(esd):
    with pytest.raises(ValueError, match="knows 1 conditions, esd needs 3"):
        esd(base=Gaussians([[0.0, 0.0]])).conditions  # noqa: B018


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["dual.rule=ascent", "dual.step_size=0.1"], "dual.rule='ascent'.*baselines.fixed_weights"),
        (["formulation.inputs=noise"], "formulation.inputs='noise'"),
        (["thresholds.unit=share"], "thresholds.unit='share'"),
        (["thresholds.unit=nats"], "thresholds.unit='nats': method esd takes likelihood_ratio"),
    ],
)
def test_a_configuration_it_cannot_use_is_refused_with_a_remedy(tmp_path, overrides, message):
    config = load_config(EXAMPLE, [f"storage={tmp_path}", *overrides], environment=False)
    with pytest.raises(ValueError, match=message):
        preflight(config)


class Averaged(torch.nn.Module):
    """The weighted exact predictions of the example: what a perfect student would have learned."""

    def __init__(self, q, erased, eta) -> None:
        super().__init__()
        self.q, self.erased, self.eta = q, erased, eta
        self.anchor = torch.nn.Parameter(torch.zeros(1))

    def forward(self, x_t, timestep):
        alpha_bar = SCHEDULE.alpha_bar[timestep.numpy()]
        of_q, of_set = (law.noise_prediction(x_t.numpy(), alpha_bar) for law in (self.q, self.erased))
        return torch.from_numpy(of_q - self.eta * (of_set - of_q))


@pytest.mark.slow
def test_the_example_erases_as_the_exact_predictions_do(tmp_path):
    """Seed 0, weight 0.5: the mean ratio falls from 1 to 0.51 as sampled, where the law itself says 2e-9."""
    overrides = [f"storage={tmp_path}", "baselines.fixed_weights=[]", "baselines.unconstrained=false", "dual.start=0.5"]
    config = load_config(EXAMPLE, overrides, environment=False)
    workspace, dual = Workspace(config.to_dict(), config.data), LocalDual()
    base = {"trial_id": "base", "label": "base", "kind": "base", "thresholds": {}, "fixed_weight": None}
    for point in [base, *sweep_points(config, workspace.constraint_names)]:
        folders = {"trial_dir": str(tmp_path / point["trial_id"]), "base_dir": str(tmp_path / "base")}
        result = run_trial(workspace, Assignment(**point, **folders, attempt=1), dual)
    mixture = workspace.data.mixture
    erased = mixture.component(0)
    start = torch.randn(4000, 2, generator=torch.Generator().manual_seed(0))
    x = ddim_sample(Averaged(mixture, erased, 0.5), start, SCHEDULE, num_sampling_steps=100, batch_size=4000).numpy()
    expected = np.exp(erased.log_density(x) - mixture.log_density(x))
    (row,) = result["constraints"]
    spread = (row["stderr"] ** 2 + expected.var() / 4000) ** 0.5
    assert abs(row["metric"] - expected.mean()) < 4 * spread + 0.03  # 0.03: the network's misfit, measured 0.005
    assert row["metric"] > 0.3  # far from the law's own
