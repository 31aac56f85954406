"""Preference unlearning: its losses against plain loops, its estimates against exact laws, its optimum with and without the prior.

`Reweighted` is a model with the exact noise prediction of three Gaussians, whose only parameters are their log shares: what
a perfect denoiser could do with the pairs, and fast enough to train to the optimum in a test.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.optimize import brentq

from dualsweep.constraints import Constraint
from dualsweep.constraints.preference import preference_optimum
from dualsweep.datasets import DatasetSpec, SetSpec, build
from dualsweep.orchestration.config import load_config, sweep_points
from dualsweep.orchestration.local_dual import LocalDual
from dualsweep.orchestration.preflight import preflight
from dualsweep.trainers.assignment import Assignment
from dualsweep.trainers.loop import run_trial
from dualsweep.trainers.methods.base import Batch, host_batch
from dualsweep.trainers.methods.duo import DUO
from dualsweep.trainers.noise_schedule import NoiseSchedule
from dualsweep.trainers.workspace import Workspace

EXAMPLE = Path(__file__).parents[2] / "examples" / "gmm_duo.yaml"
SCHEDULE = NoiseSchedule(num_train_timesteps=200, beta_end=0.08, clip_sample=False)
ONE = torch.ones(1)


class Reweighted(torch.nn.Module):
    """The exact noise prediction of a mixture at trainable shares."""

    def __init__(self, mixture, weights=None) -> None:
        super().__init__()
        self.means, self.variances = torch.tensor(mixture.means).float(), torch.tensor(mixture.stds**2).float()
        self.log_weights = torch.nn.Parameter(
            torch.tensor(mixture.weights if weights is None else weights).log().float()
        )

    def forward(self, x_t, timestep, condition=None):
        power = torch.tensor(SCHEDULE.alpha_bar).float()[timestep][:, None, None]
        variances = power * self.variances + 1 - power
        away = x_t[:, None, :] - power.sqrt() * self.means
        joint = self.log_weights.log_softmax(0) - 0.5 * (away**2 / variances + variances.log()).sum(2)
        return (1 - power[:, :, 0]).sqrt() * (joint.softmax(1)[:, :, None] * away / variances).sum(1)


@pytest.fixture(scope="module")
def data():
    return build(
        DatasetSpec(
            dataset="gaussian_mixture",
            means=((-1.5, -0.8), (1.5, -0.8), (0.0, 1.7)),
            stds=(0.4, 0.4, 0.4),
            weights=(0.4, 0.3, 0.3),
            count=2000,
            sets={"preferred": SetSpec(classes=(1,)), "rejected": SetSpec(classes=(0,))},
        )
    )


@pytest.fixture(scope="module")
def duo(data, make_setting):
    def make(**given):
        unit = given.pop("unit", "nats")
        options = {**DUO.defaults, **given.pop("options", {})}
        values = {"data": data, "schedule": SCHEDULE, "names": ("prior",), "unit": unit, "options": options}
        return DUO(make_setting(**{**values, "base": Reweighted(data.mixture).requires_grad_(False), **given}))

    return make


def batch_of(method, *, pairs=32, main=16, step=0):
    """Draws as a training step has them; every step has its own."""
    generator = np.random.default_rng([7, step])
    tensors = {name: samples for name, (samples, _) in method.streams().items()}
    counts = {"pairs": pairs, "main": main}
    draws = {
        name: (
            generator.integers(len(tensors[name]), size=counts[name]),
            generator.integers(SCHEDULE.num_train_timesteps, size=counts[name]),
            generator.standard_normal((counts[name], *method.noise_shape), dtype=np.float32),
        )
        for name in tensors
    }
    sizes = {name: counts[name] for name in tensors}
    return host_batch(draws, sizes, pinned=False).to_device(tensors, sizes, torch.device("cpu"))


def kl_of(weights, data):
    """KL(q||p) of a reweighting of components far apart."""
    q = data.mixture.weights
    return float(q @ np.log(q / weights))


def published(method, denoiser, batch, multiplier):
    """methods.md 10 as a loop: -log sigmoid(-beta [D+ - D-]) + multiplier * MSE at the last timestep."""
    base, beta = method.setting.base, method.setting.options["beta"]
    pairs, losses, prior = batch.counts[0], [], []
    for row in range(len(batch.x_0)):
        t, noise = batch.timestep[row : row + 1], batch.noise[row]
        if row >= pairs:
            last = torch.tensor([SCHEDULE.num_train_timesteps - 1])
            prior += [
                (denoiser(noise, last) - base(noise, last)).square().mean()
            ] * 2  # the two rows of a draw share it
            continue
        gaps = []
        for x_0 in batch.x_0[row]:
            x_t = SCHEDULE.add_noise(x_0[None], noise, t)
            gaps.append((noise - denoiser(x_t, t)).square().mean() - (noise - base(x_t, t)).square().mean())
        losses.append(-torch.nn.functional.logsigmoid(-beta * (gaps[0] - gaps[1])))
    return (torch.stack(losses).mean() + multiplier * torch.stack(prior).mean()) / (1 + multiplier)


def test_the_published_loss_is_that_of_the_plain_loop(duo, data):
    method = duo(unit="loss", options={"beta": 40.0})
    batch, denoiser = batch_of(method), Reweighted(data.mixture, [0.2, 0.5, 0.3])
    terms = method.primal_loss(denoiser, batch, 3 * ONE)
    torch.testing.assert_close(terms.loss, published(method, denoiser, batch, 3.0), rtol=1e-4, atol=0)  # float32 models
    assert terms.counts == (32, 16) and terms.values.shape == (48,)


def test_log_ratios_and_divergence_are_estimated_without_bias(duo, data):
    """8 levels, averaged over 4000 draws: the standard error of a margin is 1 to 2 percent."""
    weights = np.array([0.25, 0.42, 0.33])
    method = duo(options={"levels": 8})
    batch = batch_of(method, pairs=4000, main=4000)
    with torch.no_grad():
        log_ratios, distances = method._estimates(Reweighted(data.mixture, weights), batch)
    q = data.mixture.weights
    for column, component in enumerate((1, 0)):
        values = log_ratios[:4000, :, column].mean(1)
        exact, stderr = np.log(weights[component] / q[component]), float(values.std()) / 4000**0.5
        assert abs(float(values.mean()) - exact) < 4 * stderr + 0.01 * abs(exact) and stderr < 0.02
    prior = distances[4000:].mean(1).mean(1)
    stderr = float(prior.std()) / 4000**0.5
    # One percent: the ends of the schedule and the discrete levels.
    assert abs(float(prior.mean()) - kl_of(weights, data)) < 4 * stderr + 0.01 * kl_of(weights, data)
    assert stderr < 0.03 * kl_of(weights, data)


def test_both_halves_of_the_levels_are_unbiased_and_their_difference_takes_out_bias(duo, data):
    """At 16 levels the loss of noisy margins is 8 percent too high, less the halves' excess 2 percent."""
    weights = np.array([0.22, 0.48, 0.3])
    method = duo()
    batch = batch_of(method, pairs=6000, main=1)
    with torch.no_grad():
        log_ratios, _ = method._estimates(Reweighted(data.mixture, weights), batch)
    margins = log_ratios[:6000, :, 0] - log_ratios[:6000, :, 1]
    exact = np.log(weights[1] / 0.3) - np.log(weights[0] / 0.4)
    for half in margins.split(8, dim=1):
        values = half.mean(1)
        assert abs(float(values.mean()) - exact) < 4 * float(values.std()) / 6000**0.5 + 0.01 * exact
    loss = np.log1p(np.exp(-exact))
    plain = float(torch.nn.functional.softplus(-margins.mean(1)).mean())
    corrected = float(method._preference_losses(margins).mean())
    assert plain > 1.04 * loss
    assert abs(corrected - loss) < 0.35 * (plain - loss)


@pytest.mark.parametrize("unit", ["nats", "loss"])
def test_swapped_pairs_are_noticed(duo, data, unit):
    """Control for the sign: a model that moved towards the preferred has the smaller loss, and the gradient goes there."""
    method = duo(unit=unit, options={"beta": 1.0 if unit == "nats" else 40.0})
    batch = batch_of(method)
    swapped = Batch(batch.x_0.flip(1), batch.noise, batch.timestep, batch.counts, batch.global_counts)
    right = Reweighted(data.mixture, [0.3, 0.4, 0.3])
    zero = torch.zeros(1)
    assert method.primal_loss(right, batch, zero).loss < method.primal_loss(right, swapped, zero).loss - 0.01
    start = Reweighted(data.mixture)
    (slope,) = torch.autograd.grad(method.primal_loss(start, batch, zero).loss, [start.log_weights])
    assert slope[1] < 0 < slope[0]  # a descent raises the preferred share and lowers the rejected one


@pytest.mark.parametrize("unit", ["nats", "loss"])
def test_the_gradient_is_the_slope_of_the_loss(duo, data, unit):
    method = duo(unit=unit, options={"beta": 1.0 if unit == "nats" else 40.0})
    batch, denoiser = batch_of(method), Reweighted(data.mixture, [0.3, 0.4, 0.3])
    loss = method.primal_loss(denoiser, batch, 2 * ONE).loss
    (gradient,) = torch.autograd.grad(loss, [denoiser.log_weights])
    step = 0.02  # third derivatives and float32 leave an error of about a thousandth
    for entry in range(3):
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                denoiser.log_weights[entry] += sign * step
                ends.append(float(method.primal_loss(denoiser, batch, 2 * ONE).loss))
                denoiser.log_weights[entry] -= sign * step
        assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(
            float(gradient[entry]), abs=3e-3 * float(gradient.abs().max())
        )


@pytest.mark.parametrize("unit", ["nats", "loss"])
def test_parts_of_several_workers_add_up(duo, data, part_of, unit):
    method = duo(unit=unit)
    batch, denoiser = batch_of(method, pairs=8, main=5), Reweighted(data.mixture, [0.2, 0.5, 0.3])
    whole = method.primal_loss(denoiser, batch, 2 * ONE)
    pieces = [(slice(0, 5), slice(0, 1)), (slice(5, 7), slice(1, 5)), (slice(7, 8), slice(5, 5))]
    parts = [method.primal_loss(denoiser, part_of(batch, piece), 2 * ONE) for piece in pieces]
    torch.testing.assert_close(sum(part.loss for part in parts), whole.loss, rtol=1e-5, atol=0)
    values = [part.values.split(part.counts) for part in parts]
    for row, expected in enumerate(whole.values.split(whole.counts)):
        torch.testing.assert_close(torch.cat([value[row] for value in values]), expected, rtol=1e-4, atol=1e-6)


def test_two_samples_of_a_draw_count_as_one_value_of_the_prior(duo, data):
    """They share timesteps and noise; taken as independent they would claim a standard error that the values do not have."""
    method, denoiser = duo(), Reweighted(data.mixture, [0.2, 0.5, 0.3])
    batch = batch_of(method, pairs=4, main=64)
    terms = method.primal_loss(denoiser, batch, ONE)
    _, distances = method._estimates(denoiser, batch)
    assert terms.counts == (4, 64)
    torch.testing.assert_close(terms.values[4:], distances[4:].mean((1, 2)))


def test_the_multiplier_weighs_the_prior_and_normalising_divides_by_the_sum(duo, data):
    method, denoiser = duo(), Reweighted(data.mixture, [0.2, 0.5, 0.3])
    batch = batch_of(method)
    terms = method.primal_loss(denoiser, batch, 3 * ONE)
    losses, prior = terms.values.split(terms.counts)
    torch.testing.assert_close(terms.loss, (losses.mean() + 3 * prior.mean()) / 4)
    plain = duo(optimizer={"normalize": False}).primal_loss(denoiser, batch, 3 * ONE)
    torch.testing.assert_close(plain.loss, 4 * terms.loss)


def trained(method, denoiser, multiplier, *, steps, dual=None):
    """Adam on the log shares; `dual` (multiplier, violation) -> multiplier moves it. Margins and multipliers on the way."""
    optimizer = torch.optim.Adam(denoiser.parameters(), lr=0.05)
    margins, multipliers, value = [], [], multiplier
    q = method.setting.base.log_weights.log_softmax(0)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 0.05 if step < steps // 2 else 0.01
        optimizer.zero_grad()
        terms = method.primal_loss(denoiser, batch_of(method, pairs=48, main=32, step=step), value * ONE)
        terms.loss.backward()
        optimizer.step()
        if dual is not None:
            value = dual(value, float(terms.values[terms.counts[0] :].detach().mean()))
        u = denoiser.log_weights.detach().log_softmax(0) - q
        margins.append(float(u[1] - u[0]))
        multipliers.append(value)
    return margins, multipliers


def test_without_the_prior_the_margin_grows_and_with_it_the_margin_stops(duo, data):
    """Deterministic preferences have no finite optimum (methods.md H7b): the constraint makes one.

    At the multiplier 1 its margin is 1.28, which the noise inside the sigmoid lowers by 4 percent at 8 levels; Adam's own
    noise stays below 0.1.
    """
    free, _ = trained(duo(options={"levels": 8}), Reweighted(data.mixture), 0.0, steps=100)
    assert free[59] > free[19] + 1.0 and free[99] > free[59] + 0.15 and free[99] > 3.5
    held, _ = trained(duo(options={"levels": 8}), Reweighted(data.mixture), 1.0, steps=100)

    def at(threshold):
        return preference_optimum(preferred=0.3, rejected=0.4, beta=1.0, threshold=threshold)

    tight = brentq(lambda threshold: at(threshold).multiplier - 1.0, 0.01, 1.0)
    assert np.mean(held[-40:]) == pytest.approx(at(tight).margin, abs=0.1) and max(held) < 2.0


def test_primal_and_dual_steps_settle_at_the_closed_form(duo, data):
    """The dual noise leaves 1 to 2 percent, the noise inside the sigmoid 3 at 16 levels; without its correction 11."""
    threshold = 0.1
    exact = preference_optimum(preferred=0.3, rejected=0.4, beta=1.0, threshold=threshold)
    method, denoiser = duo(), Reweighted(data.mixture)
    margins, multipliers = trained(
        method, denoiser, 1.2, steps=160, dual=lambda value, metric: max(0.0, value + 0.3 * (metric - threshold))
    )
    assert np.mean(multipliers[-80:]) == pytest.approx(exact.multiplier, rel=0.06)
    assert np.mean(margins[-60:]) == pytest.approx(exact.margin, rel=0.05)
    shares = denoiser.log_weights.detach().softmax(0).tolist()
    assert shares == pytest.approx([0.4 - exact.moved, 0.3 + exact.moved, 0.3], abs=0.02)


def test_held_out_metrics_and_objective_are_the_exact_ones(duo, data):
    weights = np.array([0.25, 0.42, 0.33])
    method, denoiser = duo(), Reweighted(data.mixture, weights)
    found = method.held_out_measurement(denoiser, ONE)
    assert abs(found.metrics[0] - kl_of(weights, data)) < 4 * found.stderrs[0] + 0.01 * kl_of(weights, data)
    objective = method.objective(denoiser, ONE, evaluation={"noise_levels": 64}, base_errors=None)
    margin = np.log(weights[1] / 0.3) - np.log(weights[0] / 0.4)
    # The noise inside the sigmoid: half its curvature, 0.1, times the variance of a margin at 64 levels, 0.04.
    assert objective.value == pytest.approx(np.log1p(np.exp(-margin)), abs=4 * objective.stderr + 0.005)
    assert "margin" in objective.meaning
    base = method.setting.base
    assert method.calibrate().metrics == [0.0] and method.held_out_measurement(base, ONE).metrics == [0.0]
    last = duo(unit="loss").held_out_measurement(denoiser, ONE)
    noise = torch.randn(20000, 2, generator=torch.Generator().manual_seed(0))
    t = torch.full((20000,), SCHEDULE.num_train_timesteps - 1)
    exact = (denoiser(noise, t) - base(noise, t)).square().mean(1).detach()
    spread = (last.stderrs[0] ** 2 + float(exact.var()) / 20000) ** 0.5
    assert abs(last.metrics[0] - float(exact.mean())) < 4 * spread


def test_the_exact_answer_moves_mass_between_the_pairs_components_alone(duo, data):
    constraint = Constraint(name="prior", unit="nats", threshold=0.1)
    oracle = duo().exact([constraint], {"rule": "ascent"})
    found = preference_optimum(preferred=0.3, rejected=0.4, beta=1.0, threshold=0.1)
    assert oracle.multipliers == pytest.approx([found.multiplier]) and oracle.metrics == pytest.approx([0.1])
    shares = [0.4 - found.moved, 0.3 + found.moved, 0.3]
    points = data.mixture.means + 0.3
    assert oracle.log_density(points) == pytest.approx(data.mixture.with_weights(shares).log_density(points))
    assert duo().exact([constraint], {"rule": "resilient", "relaxation_cost": 1.0}) is None
    loss = Constraint(name="prior", unit="loss", threshold=0.1)
    assert duo(unit="loss").exact([loss], {"rule": "ascent"}) is None


def test_an_unconstrained_run_has_pairs_alone(duo, data):
    method = duo(names=())
    assert list(method.streams()) == ["pairs"]
    terms = method.primal_loss(Reweighted(data.mixture), batch_of(method), torch.zeros(0))
    assert terms.counts == (32,) and float(terms.loss.detach()) == pytest.approx(np.log(2), abs=1e-6)


def test_sets_of_unequal_size_are_refused(duo, data):
    tensors = {"main": torch.zeros(4, 2), "preferred": torch.zeros(3, 2), "rejected": torch.zeros(4, 2)}
    with pytest.raises(ValueError, match="preferred has 3 samples, rejected 4"):
        duo(tensors=tensors)


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["data.sets={preferred: {classes: [1]}, other: {classes: [0]}}"], "the two sets preferred and rejected"),
        (["data.sets={preferred: {classes: [1]}}"], "the two sets preferred and rejected"),
        (["formulation.levels=5"], "formulation.levels=5"),
        (["thresholds.unit=loss", "baselines.fixed_weights=[1.0]"], "baselines.fixed_weights"),
        (["thresholds.unit=loss", "baselines.fixed_weights=[]"], "formulation.levels=32"),
        (["thresholds.unit=share"], "thresholds.unit='share'"),
    ],
)
def test_a_configuration_it_cannot_use_is_refused_with_a_remedy(tmp_path, overrides, message):
    config = load_config(EXAMPLE, [f"storage={tmp_path}", *overrides], environment=False)
    with pytest.raises(ValueError, match=message):
        preflight(config)


@pytest.mark.slow
def test_the_example_finds_the_exact_multiplier_and_shares(tmp_path):
    """Seed 0, threshold 0.2 nats: the multiplier within 5 percent, shares within 0.03 (a network's misfit included)."""
    overrides = [
        f"storage={tmp_path}",
        "thresholds.grid.sets=[0.2]",
        "baselines.fixed_weights=[]",
        "baselines.unconstrained=false",
    ]
    config = load_config(EXAMPLE, overrides, environment=False)
    workspace, dual = Workspace(config.to_dict(), config.data), LocalDual()
    base = {"trial_id": "base", "label": "base", "kind": "base", "thresholds": {}, "fixed_weight": None}
    for point in [base, *sweep_points(config, workspace.constraint_names)]:
        folders = {"trial_dir": str(tmp_path / point["trial_id"]), "base_dir": str(tmp_path / "base")}
        result = run_trial(workspace, Assignment(**point, **folders, attempt=1), dual)
    exact = result["exact_multipliers"]["prior"]
    assert result["averaged_multipliers"]["prior"] == pytest.approx(exact, rel=0.05)
    (row,) = result["constraints"]
    assert row["violation"] < 2 * row["stderr"]
    found = preference_optimum(preferred=0.3, rejected=0.4, beta=1.0, threshold=0.2)
    shares = np.array(result["histogram"]["counts"]) / result["histogram"]["total"]
    assert shares == pytest.approx([0.4 - found.moved, 0.3 + found.moved, 0.3], abs=0.03)
