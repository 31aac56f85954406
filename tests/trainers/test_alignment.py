"""Both gradients of the on-policy Lagrangian on a chain of three steps, its baseline and controls, and alignment's unit.

Both are compared with the gradient of the Lagrangian whose divergences are in closed form: means over independent batches,
told apart in units of their standard errors. Back-propagation is checked by finite differences too.
"""

import copy
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.distributions import Normal

from dualsweep.constraints import Constraint
from dualsweep.datasets import DatasetSpec, build
from dualsweep.orchestration.config import load_config, sweep_points
from dualsweep.orchestration.local_dual import LocalDual
from dualsweep.trainers.assignment import Assignment
from dualsweep.trainers.evaluate import EVALUATION_COUNTER
from dualsweep.trainers.loop import run_trial
from dualsweep.trainers.methods import METHODS, Setting
from dualsweep.trainers.methods.alignment import Alignment
from dualsweep.trainers.methods.base import Batch
from dualsweep.trainers.methods.on_policy import cross_fitted
from dualsweep.trainers.methods.unlearn_likelihood import UnlearnLikelihood
from dualsweep.trainers.noise_schedule import NoiseSchedule
from dualsweep.trainers.workspace import Workspace

EXAMPLE = Path(__file__).parents[2] / "examples" / "gmm_alignment.yaml"
SCHEDULE = NoiseSchedule(num_train_timesteps=50, beta_end=0.2, clip_sample=False)
DATA = build(
    DatasetSpec(
        dataset="gaussian_mixture", means=((-1.0, 0.0), (1.0, 0.5)), stds=(0.4, 0.4), weights=(0.5, 0.5), count=400
    )
)
REWARDS = {"right": {"kind": "linear", "direction": (1.0, 0.0)}, "up": {"kind": "linear", "direction": (0.3, 1.0)}}
MULTIPLIERS = torch.tensor([0.8, 0.3], dtype=torch.float64)


class Bent(torch.nn.Module):
    """A small smooth denoiser; `shift` moves it away from the pretrained one."""

    def __init__(self, shift: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight = torch.nn.Parameter(0.6 * torch.eye(2, dtype=torch.float64) + shift * torch.randn(2, 2).double())
        self.bias = torch.nn.Parameter(0.4 * shift * torch.ones(2, dtype=torch.float64))

    def forward(self, x_t, timestep, condition=None):
        return torch.tanh(x_t.double() @ self.weight) + self.bias * (1 + timestep[:, None] / 50)


class Alone(Alignment):
    """Without a process group."""

    sum_over_workers = staticmethod(lambda values: values)


def make_setting(gradient="policy", rewards=REWARDS, steps=3, batch_size=16, normalize=True, **changes):
    given = {
        "data": DATA,
        "schedule": SCHEDULE,
        "base": Bent(),
        "names": tuple(rewards),
        "unit": "reward",
        "options": {"num_sampling_steps": steps, "pool": 4096, "rewards": rewards, "gradient": gradient},
        "optimizer": {"batch_size": batch_size, "normalize": normalize, "num_shards": 4},
        "measure": {},
        "seed": 0,
        "device": torch.device("cpu"),
        "tensors": {"main": torch.from_numpy(DATA.main.samples)},
        "labeller": lambda: SimpleNamespace(label=DATA.reference_mixture.posterior),
    }
    return Setting(**given | changes)


def make_batch(size, seed=0, steps=3):
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(size, steps + 1, 2, dtype=torch.float64, generator=generator)
    return Batch(torch.zeros(size, 1), noise, torch.randint(50, (size,), generator=generator), (size,), (size,))


def part_of(batch, piece):
    return replace(batch, noise=batch.noise[piece], timestep=batch.timestep[piece], counts=(len(batch.noise[piece]),))


def gradient_of(loss, model):
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])


def gradients(method, model, *, batches, size, change=lambda m, b: m.primal_loss):
    found = []
    for seed in range(batches):
        batch = make_batch(size, seed)
        found.append(gradient_of(change(method, batch)(model, batch, MULTIPLIERS).loss, model))
    return torch.stack(found)


def standard_errors_apart(ours, theirs):
    """Largest distance of two means over batches, entry by entry, in standard errors of the difference."""
    spread = (ours.var(0) / len(ours) + theirs.var(0) / len(theirs)).sqrt()
    return float(((ours.mean(0) - theirs.mean(0)) / spread).abs().max())


# -- the two gradients ------------------------------------------------------------------------------------------------


def test_back_propagation_differentiates_the_sampled_lagrangian_through_the_states():
    method, model, batch = Alone(make_setting("backpropagation", normalize=False)), Bent(0.2), make_batch(12)
    still = copy.deepcopy(model)

    def lagrangian():
        chain = method.chain
        states = chain.rollout(model, batch.noise)
        means, others = (chain.means(states, chain.predictions(m, states)) for m in (still, method.setting.base))
        stds = torch.from_numpy(chain.stds)[:, None, None]
        logs = [Normal(m, stds).log_prob(states[1:]).sum((0, 2)) for m in (means, others)]
        cost = logs[0] - logs[1] - (MULTIPLIERS[:, None] * method.values(states[-1], None)).sum(0)
        return float(cost.detach().mean())

    terms = method.primal_loss(model, batch, MULTIPLIERS)
    assert float(terms.loss.detach()) == pytest.approx(lagrangian(), rel=1e-9)
    found, slopes = gradient_of(terms.loss, model), []
    with torch.no_grad():
        for parameter in model.parameters():
            for entry in parameter.view(-1).split(1):
                ends = []
                for step in (1e-5, -2e-5):
                    entry += step
                    ends.append(lagrangian())
                entry += 1e-5
                slopes.append((ends[0] - ends[1]) / 2e-5)
    # Central differences in float64: truncation 1e-10, round-off 1e-10.
    np.testing.assert_allclose(found, slopes, rtol=1e-6, atol=1e-8)


def exact_divergence(method, batch):
    """The Lagrangian with the divergence of every step in closed form, differentiated in every place."""

    def loss(model, _, multipliers):
        chain = method.chain
        states = chain.rollout(model, batch.noise)
        others = chain.means(states, chain.predictions(method.setting.base, states))
        cost = chain.divergences(chain.drawn_means(states, batch.noise), others).sum(0)
        cost = cost - (multipliers[:, None] * method.values(states[-1], None)).sum(0)
        return SimpleNamespace(loss=cost.mean() / (1 + multipliers.sum()))

    return loss


@pytest.mark.parametrize("gradient", ["policy", "backpropagation"])
def test_both_gradients_are_the_lagrangians_own_on_average(gradient):
    model = Bent(0.2)
    exact = gradients(Alone(make_setting(gradient)), model, batches=40, size=2000, change=exact_divergence)
    # Six entries: a false alarm in about 1 of 1000 seeds; the wrong sign of any part is dozens of standard errors off.
    assert standard_errors_apart(gradients(Alone(make_setting(gradient)), model, batches=40, size=2000), exact) < 4
    flipped = Alone(make_setting(gradient))
    flipped.sign = 1.0
    assert standard_errors_apart(gradients(flipped, model, batches=40, size=2000), exact) > 20


def test_the_released_surrogate_has_another_gradient():
    """Control: mean fixed, sample differentiated, no 1/std^2 (methods.md 7g)."""

    def released(method, batch):
        def loss(model, _, multipliers):
            chain, noises = method.chain, batch.noise
            with torch.no_grad():
                values = method.values(chain.rollout(model, noises)[-1], noises)
            states = chain.rollout(model, noises)
            log_probs = -(states[1:] - chain.drawn_means(states, noises).detach()).square().sum((0, 2)) / 2
            means, others = (chain.means(states, chain.predictions(m, states)) for m in (model, method.setting.base))
            kl = chain.divergences(means, others).sum(0)
            total = kl - (multipliers[:, None] * values).sum(0) * log_probs
            return SimpleNamespace(loss=total.mean() / (1 + multipliers.sum()))

        return loss

    model = Bent(0.2)
    exact = gradients(Alone(make_setting("backpropagation")), model, batches=20, size=1000)
    wrong = gradients(Alone(make_setting("policy")), model, batches=20, size=1000, change=released)
    assert standard_errors_apart(wrong, exact) > 20


def test_normalising_divides_by_one_plus_the_multipliers():
    model, batch = Bent(0.2), make_batch(12)
    for gradient in ("policy", "backpropagation"):
        scaled, plain = (
            Alone(make_setting(gradient, normalize=on)).primal_loss(model, batch, MULTIPLIERS).loss
            for on in (True, False)
        )
        assert float(plain / scaled) == pytest.approx(1 + float(MULTIPLIERS.sum()))


# -- baseline and controls --------------------------------------------------------------------------------------------


class WithoutBaseline(Alone):
    def baseline(self, costs, states, clean, batch):
        return torch.zeros_like(costs)


class MeanBaseline(Alone):
    def baseline(self, costs, states, clean, batch):
        return (costs.sum(1, keepdim=True) - costs) / (costs.shape[1] - 1)


def test_the_baseline_leaves_the_mean_gradient_and_lowers_its_variance():
    model, kinds = Bent(0.02), (WithoutBaseline, MeanBaseline, Alone)
    found = {kind: gradients(kind(make_setting()), model, batches=80, size=400) for kind in kinds}
    for kind in (MeanBaseline, Alone):
        assert standard_errors_apart(found[kind], found[WithoutBaseline]) < 4
    variances = {kind: float(values.var(0).sum()) for kind, values in found.items()}
    # Measured: 0.12, 0.12 and 0.053; 80 batches know a variance to 16 percent.
    assert variances[Alone] < 0.65 * min(variances[MeanBaseline], variances[WithoutBaseline])


def test_a_small_batch_takes_the_mean_of_the_other_paths():
    method, batch = Alone(make_setting()), make_batch(3)
    costs = torch.tensor([[1.0, 2.0, 6.0]])
    states = torch.zeros(2, 3, 2)
    assert method.baseline(costs, states, states[:1], batch).tolist() == [[4.0, 3.5, 1.5]]


def test_cross_fitting_reads_each_half_off_the_other_halfs_fit():
    x = torch.arange(12.0, dtype=torch.float64)
    first = torch.arange(12) % 2 == 0
    targets = torch.where(first, 2 * x, -3 * x)[None]
    features = torch.stack([torch.ones(12), x], dim=1)[None].double()
    fitted = cross_fitted(targets, features, first, lambda values: values)
    # The ridge takes about a thousandth.
    torch.testing.assert_close(fitted[0], torch.where(first, -3 * x, 2 * x), rtol=0.01, atol=0.1)


def batch_means(model, multipliers, *, batches, size):
    """Means of the metrics over batches, plain and with controls, (batches, 2) each."""
    method = Alone(make_setting())
    plain, controlled = [], []
    with torch.no_grad():
        for seed in range(batches):
            batch = make_batch(size, seed)
            plain.append(method.values(method.chain.rollout(model, batch.noise)[-1], batch.noise).mean(1))
            controlled.append(method.primal_loss(model, batch, multipliers).values.view(3, -1)[1:].mean(1))
    return torch.stack(plain), torch.stack(controlled)


def test_controls_leave_the_mean_of_a_metric_and_lower_its_variance():
    plain, controlled = batch_means(Bent(0.01), 0.3 * MULTIPLIERS, batches=60, size=400)
    # Controlled means are relative to the chain's own mean, plain ones to that of the pool of 4096.
    spread = (plain.var(0) / 60 + 1 / 4096).sqrt()
    assert float(((plain.mean(0) - controlled.mean(0)) / spread).abs().max()) < 4
    assert float((controlled.var(0) / plain.var(0)).max()) < 0.3


def test_controls_are_left_out_where_few_paths_hold_the_weight():
    plain, controlled = batch_means(Bent(0.3), MULTIPLIERS, batches=3, size=400)
    torch.testing.assert_close(controlled, plain)


# -- several workers --------------------------------------------------------------------------------------------------


class Meeting:
    """Two threads in place of two workers: a sum that both wait for."""

    def __init__(self) -> None:
        self.barrier, self.given = threading.Barrier(2, timeout=60), {}

    def total(self, rank, values):
        self.given[rank] = values
        self.barrier.wait()
        found = self.given[0] + self.given[1]
        self.barrier.wait()
        return found


@pytest.mark.parametrize(("gradient", "size"), [("policy", 240), ("policy", 20), ("backpropagation", 240)])
def test_parts_of_two_workers_add_up_to_the_whole(gradient, size):
    batch, setting = make_batch(size), make_setting(gradient, batch_size=size)
    model = Bent(0.2)
    whole = Alone(setting).primal_loss(model, batch, MULTIPLIERS)
    meeting, found = Meeting(), {}
    models = [Bent(0.2), Bent(0.2)]  # not in the threads: weights are drawn from the one global generator

    def work(rank, piece):
        method, own = Alone(setting), models[rank]
        method.sum_over_workers = lambda values: meeting.total(rank, values)
        terms = method.primal_loss(own, part_of(batch, piece), MULTIPLIERS)
        found[rank] = (terms.loss.detach(), gradient_of(terms.loss, own), terms.values.view(3, -1))

    cut = size // 3
    threads = [threading.Thread(target=work, args=(i, p)) for i, p in enumerate([slice(0, cut), slice(cut, size)])]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    torch.testing.assert_close(found[0][0] + found[1][0], whole.loss.detach(), rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(found[0][1] + found[1][1], gradient_of(whole.loss, model), rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(torch.cat([found[0][2], found[1][2]], dim=1), whole.values.view(3, -1))


# -- unit, measurement, exact answer ----------------------------------------------------------------------------------


def test_the_unit_is_the_pretrained_chains_standard_deviation():
    method = Alone(make_setting())
    calibration = method.calibrate()
    assert calibration.metrics == pytest.approx([0, 0], abs=1e-9)
    assert calibration.stderrs == pytest.approx([1 / 64] * 2, rel=1e-6)


def test_the_standard_error_of_an_evaluation_holds_over_pools():
    """Few samples define the unit: metrics of one model vary from pool to pool, seed by seed, as much as is claimed."""
    found = []
    for seed in range(60):
        options = {"num_sampling_steps": 3, "pool": 200, "rewards": REWARDS, "gradient": "policy"}
        method = Alone(make_setting(options=options, seed=seed, cache={}))
        arguments = {"shards": [0], "counts": {0: 2000}, "num_sampling_steps": 5}
        draws = method.measure(Bent(0.4), MULTIPLIERS, counter=EVALUATION_COUNTER, **arguments)
        measurement = method.measurement(draws.rows, MULTIPLIERS.numpy())
        found.append((measurement.metrics, measurement.stderrs))
    metrics, stderrs = np.array(found).transpose(1, 0, 2)
    assert abs(metrics.mean(0)).max() > 0.5  # far enough from 0 for the standard deviation's error to count
    # A spread is known to 9 percent from 60 values: three of them.
    assert stderrs.mean(0) == pytest.approx(metrics.std(0, ddof=1), rel=0.28)


@pytest.mark.parametrize(
    "kind, scaled",
    [
        (Alignment, lambda pool, raw: (raw - pool.mean()) / pool.std(ddof=1)),
        (UnlearnLikelihood, lambda pool, raw: raw / pool.mean()),
    ],
)
def test_the_units_influence_is_what_leaving_a_sample_out_changes(kind, scaled):
    pool, raw = np.random.default_rng(0).normal(2.0, 0.5, size=400), 2.7
    left_out = np.array([scaled(np.delete(pool, k), raw) for k in range(400)])
    jackknife = -399 * (left_out - scaled(pool, raw))
    units = (pool - pool.mean()) / pool.std(ddof=1) if kind is Alignment else pool / pool.mean()
    found = kind.unit_influence(None, units[None], np.array([[scaled(pool, raw)]]))[0]
    assert found == pytest.approx(jackknife, abs=0.05 * np.abs(jackknife).max())  # second order in 1 / 400


def test_training_measures_its_own_paths_and_an_evaluation_fresh_ones():
    method = Alone(make_setting())
    arguments = {"shards": [0], "counts": {0: 3000}, "num_sampling_steps": 5}
    assert method.measure(Bent(), MULTIPLIERS, counter=7, **arguments) is None
    draws = method.measure(Bent(), MULTIPLIERS, counter=EVALUATION_COUNTER, **arguments)
    assert draws.rows.shape == (3000, 2) and draws.samples.shape == (3000, 2)
    found = method.measurement(draws.rows, MULTIPLIERS.numpy())
    # Pool and draws: 0.016 and 0.018, four standard errors of the difference.
    assert found.metrics == pytest.approx([0, 0], abs=4 * 0.025)
    objective = method.objective(Bent(), MULTIPLIERS, evaluation={"num_samples": 50}, base_errors=None)
    assert objective.value == pytest.approx(0, abs=1e-9)


def test_the_dual_value_is_minus_the_log_mean_exponential_of_the_pool():
    method = Alone(make_setting())
    value, stderr = method.dual_value(MULTIPLIERS.numpy())
    pool = method._pool[2].numpy()
    assert value == pytest.approx(-np.log(np.exp(MULTIPLIERS.numpy() @ pool).mean()))
    assert value < 0 < stderr < 0.05


def test_one_gaussian_has_the_closed_form():
    data = build(DatasetSpec(dataset="gaussian_mixture", means=((0.3, 0.0),), stds=(0.7,), weights=(1.0,), count=100))
    method = Alone(make_setting(rewards={"right": REWARDS["right"]}, data=data))
    constraint = Constraint(name="right", unit="reward", threshold=0.5)
    exact = method.exact([constraint], {"rule": "ascent"})
    # z is standard normal: lambda = b, KL = b^2 / 2 (methods.md H5).
    assert exact.multipliers == pytest.approx([0.5], abs=1e-5) and exact.objective == pytest.approx(0.125, abs=1e-5)
    assert method.exact([constraint], {"rule": "resilient"}) is None


def test_a_constant_reward_is_refused():
    labeller = lambda: SimpleNamespace(label=lambda x: np.full((len(x), 2), 0.5))  # noqa: E731
    rewards = {"flat": {"kind": "class_probability", "class_name": DATA.class_names[0]}}
    with pytest.raises(ValueError, match=r"formulation\.rewards\.flat: the same for all 4096 samples"):
        Alone(make_setting(rewards=rewards, labeller=labeller)).calibrate()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("formulation.rewards=null", "formulation.rewards is missing"),
        ("formulation.rewards={rewards: {kind: linear, direction: [1, 0]}}", "rename it"),
        ("formulation.rewards={up: {kind: brightness}}", "is for images"),
        ("formulation.num_sampling_steps=999", "give fewer"),
        (
            "formulation={gradient: backpropagation, rewards: {a: {kind: class_probability, class_name: '0'}}}",
            "has no gradient",
        ),
    ],
)
def test_configurations_it_cannot_use_are_refused(override, message):
    config = load_config(EXAMPLE, [override], environment=False).to_dict()
    names = Alignment.constraint_names((), Alignment.options(config["formulation"]))
    with pytest.raises(ValueError, match=message):
        Alignment.check(config, names)


@pytest.mark.slow
def test_the_example_finds_the_exact_answer(tmp_path):
    # Seed 0. The chain's coarseness leaves the multiplier 2 to 4 percent high; a fresh metric has a s.e. of 0.0096 and the
    # pool's mean one of 0.0055: 0.04 is four of both.
    torch.set_num_threads(1)
    config = load_config(
        EXAMPLE, [f"storage={tmp_path}", "thresholds.grid.rewards=[0.5]", "baselines.unconstrained=false", "baselines.fixed_weights=[]"],
        environment=False,
    )  # fmt: skip
    workspace, dual = Workspace(config.to_dict(), config.data), LocalDual()
    base = {"trial_id": "base", "label": "base", "kind": "base", "thresholds": {}, "fixed_weight": None}
    for point in [base, *sweep_points(config, workspace.constraint_names)]:
        folders = {"trial_dir": str(tmp_path / point["trial_id"]), "base_dir": str(tmp_path / "base")}
        result = run_trial(workspace, Assignment(**point, **folders, attempt=1), dual)
    assert METHODS["alignment"] is Alignment
    assert result["averaged_multipliers"]["right"] == pytest.approx(result["exact_multipliers"]["right"], rel=0.05)
    assert result["constraints"][0]["user_value"] == pytest.approx(0.5, abs=0.04)
    assert result["objective"]["value"] == pytest.approx(result["exact_objective"], abs=0.015)
