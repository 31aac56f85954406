"""Composition with exact predictions against integrals on a grid (methods.md H6), and a trained run of each example.

Three Gaussians of different variances in the plane, so that the product of noised densities is no noised product.
"""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dualsweep.constraints import Constraint, Simplex, rule_from_config
from dualsweep.datasets import DatasetSpec, build
from dualsweep.orchestration.config import load_config, sweep_points
from dualsweep.orchestration.local_dual import LocalDual
from dualsweep.trainers.annealed import AnnealedSampler
from dualsweep.trainers.assignment import Assignment
from dualsweep.trainers.evaluate import EVALUATION_COUNTER
from dualsweep.trainers.formulations import ForwardKL, ReverseKL
from dualsweep.trainers.loop import run_trial
from dualsweep.trainers.methods.base import Batch
from dualsweep.trainers.methods.composed import load_composition, log_ratios
from dualsweep.trainers.methods.composition import Composition
from dualsweep.trainers.metrics import clustered_stderrs, rounds
from dualsweep.trainers.models import build_denoiser
from dualsweep.trainers.noise_schedule import NoiseSchedule
from dualsweep.trainers.oracles import composition_and, oracle_at
from dualsweep.trainers.samplers import starting_noise
from dualsweep.trainers.workspace import Workspace

SCHEDULE = NoiseSchedule(clip_sample=False)
NAMES = ("wide", "narrow", "middle")
EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def data():
    return build(
        DatasetSpec.from_dict(
            {
                "dataset": "gaussian_mixture",
                "means": [[-1.0, -0.6], [1.3, -0.9], [1.5, 1.0]],
                "stds": [0.9, 0.6, 0.8],
                "weights": [0.4, 0.3, 0.3],
                "count": 3000,
                "sets": {name: {"classes": [i]} for i, name in enumerate(NAMES)},
            }
        )
    )


@pytest.fixture(scope="module")
def sets(data):
    return [data.constraint_mixtures[name] for name in NAMES]


class GaussianConditions(torch.nn.Module):
    """Exact predictions of Gaussians by condition, in torch: the probability-flow ODE differentiates them."""

    def __init__(self, laws) -> None:
        super().__init__()
        self.means = torch.tensor(np.concatenate([law.means for law in laws]))
        self.variances = torch.tensor(np.concatenate([law.stds for law in laws])) ** 2
        self.alpha_bar = torch.tensor(SCHEDULE.alpha_bar)
        self.anchor = torch.nn.Parameter(torch.zeros(1))  # tells callers the device
        self.num_conditions = len(laws)

    def forward(self, x_t, timestep, condition=None):
        condition = torch.zeros_like(timestep) if condition is None else condition
        power = self.alpha_bar[timestep][:, None]
        centred = x_t - power.sqrt() * self.means[condition]
        return (1 - power).sqrt() * centred / (power * self.variances[condition] + 1 - power)


@pytest.fixture(scope="module")
def compose(data, sets, make_setting):
    """`compose(law=..., names=..., ...)`: the method with exact predictions; condition 0, which it never needs, is noise."""

    def make(*, names=NAMES, base=None, seed=0, optimizer=None, **options):
        options = Composition.options({"levels": 48, **options})
        base = base or GaussianConditions([sets[0], *sets])
        given = {"base": base, "names": names, "unit": "nats", "options": options, "optimizer": optimizer or {}}
        return Composition(make_setting(data=data, schedule=SCHEDULE, seed=seed, **given))

    return make


def measured(method, multipliers, count, *, counter=5, shards=(0, 1, 2, 3), denoiser=None, steps=50):
    counts = dict.fromkeys(range(4), count // 4)
    return method.measure(
        denoiser,
        torch.tensor(multipliers, dtype=torch.float32),
        counter=counter,
        shards=list(shards),
        counts=counts,
        num_sampling_steps=steps,
    )


# -- AND ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("multipliers", [None, (0.2, 0.5, 0.3)], ids=["optimal", "other"])
def test_divergences_of_the_product_are_those_of_the_integrals(compose, sets, multipliers):
    oracle = (
        composition_and(sets) if multipliers is None else oracle_at(ReverseKL(None, sets, at_least=False), multipliers)
    )
    method, given = compose(), oracle.multipliers.astype(np.float32)
    draws = measured(method, given, 4096)
    found = method.measurement(draws.rows, given)
    assert max(found.stderrs) < 0.06
    # 3.5 standard errors (once in 700 seeds for three of them), and 0.02 nats for levels
    for value, stderr, exact in zip(found.metrics, found.stderrs, oracle.metrics, strict=True):
        assert value == pytest.approx(exact, abs=3.5 * stderr + 0.02)
    assert found.objective == (0.0, 0.0)
    dual, stderr = method.dual_value(given)
    assert dual == pytest.approx(float(oracle.multipliers @ oracle.metrics), abs=3.5 * stderr + 0.02)
    assert stderr < 0.02


def test_an_uncorrected_sampler_gets_the_divergences_wrong(compose, sets, monkeypatch):
    oracle = composition_and(sets)
    method, given = compose(), oracle.multipliers.astype(np.float32)
    monkeypatch.setattr(Composition, "sampler", AnnealedSampler(langevin_steps=0, resample_below=0))
    found = method.measurement(measured(method, given, 2048).rows, given)
    # log Z comes from the same samples, so all three are off, by different amounts: 0.35 nats and more measured
    assert max(abs(np.array(found.metrics) - oracle.metrics)) > 0.2


def test_standard_errors_know_of_common_ancestors(compose, sets):
    oracle = composition_and(sets)
    method, given = compose(), oracle.multipliers.astype(np.float32)
    runs = [method.measurement(measured(method, given, 256, counter=k).rows, given) for k in range(16)]
    spread = np.std([run.metrics for run in runs], axis=0, ddof=1)
    reported = np.mean([run.stderrs for run in runs], axis=0)
    # A standard deviation of 16 is known to 18 percent; three of them, correlated.
    assert (spread / reported > 0.5).all() and (spread / reported < 1.7).all()


@pytest.mark.slow
def test_dual_ascent_on_the_measured_divergences_reaches_the_exact_multipliers(compose, sets):
    exact = composition_and(sets, [0.4, 0.0, 0.2]).multipliers
    method = compose()
    rule = rule_from_config({"rule": "ascent", "step_size": 0.05})
    state, seen = rule.initial(NAMES, 0.0, Simplex()), []
    for step in range(45):
        given = state.multipliers.astype(np.float32)
        found = method.measurement(measured(method, given, 256, counter=step).rows, given)
        state = rule.step(state, np.array(found.metrics) - [0.4, 0.0, 0.2], Simplex())
        seen.append(state.multipliers)
    assert np.mean(seen[15:], axis=0) == pytest.approx(exact, abs=0.015)  # scatter of one iterate 0.008


def test_rows_do_not_depend_on_which_worker_draws_them(compose):
    method, given = compose(), [0.4, 0.3, 0.3]
    whole = measured(method, given, 64)
    parts = [measured(method, given, 64, shards=s) for s in ([0, 1], [2, 3])]
    assert np.array_equal(whole.rows, np.concatenate([part.rows for part in parts]))
    assert torch.equal(whole.samples, torch.cat([part.samples for part in parts]))
    assert measured(method, given, 64, shards=[]).rows.shape == (0, 6)
    other = measured(method, given, 64, counter=6)
    assert not np.isin(other.samples, whole.samples).any()


def test_equal_weights_stand_in_where_there_are_no_multipliers(compose):
    third = np.float32(1 / 3)
    for method in (compose(), compose(names=())):
        weights = method.exponents(np.zeros(len(method.setting.names), dtype=np.float32))
        assert weights == pytest.approx([0, third, third, third])
    free = compose(names=())
    draws = measured(free, [], 16)
    assert len(draws.rows) == 0
    assert free.measurement(draws.rows, np.zeros(0)).objective == (0.0, 0.0)
    assert compose().exponents(np.array([0.2, 0.2, 0.4])) == pytest.approx([0, 0.25, 0.25, 0.5])


def test_the_level_counts_offsets_as_the_certificate_does(compose):
    method = compose()
    evaluation = {"num_samples": 512, "num_sampling_steps": 20}
    constraints = [Constraint(name=n, unit="nats", threshold=b) for n, b in zip(NAMES, (0.4, 0.0, 0.2), strict=True)]
    assert method.domain(constraints) == Simplex()
    given = torch.tensor([0.42, 0.22, 0.36])
    level = method.objective(None, given, evaluation=evaluation, base_errors=None)
    metrics = method.measured(None, given, evaluation).metrics
    assert level.value == pytest.approx(max(np.array(metrics) - [0.4, 0.0, 0.2]))
    # gap = level - (dual value - multipliers . offsets) >= 0, up to the noise of 512 samples (0.1)
    dual, _ = method.dual_value(given.numpy())
    assert -0.3 < level.value - (dual - float(given @ torch.tensor([0.4, 0.0, 0.2]))) < 0.5
    method.domain([])
    assert method.objective(None, given, evaluation=evaluation, base_errors=None).value == pytest.approx(max(metrics))


# -- OR -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("multipliers", [(0.35, 0.33, 0.32), (0.1, 0.6, 0.3)])
def test_divergences_from_the_mixture_are_those_of_the_integrals(compose, sets, multipliers):
    method = compose(law="or", pool=1024, levels=64)
    for counter in (0, EVALUATION_COUNTER):
        found = method.measurement(measured(method, multipliers, 64, counter=counter).rows, np.array(multipliers))
        exact = oracle_at(ForwardKL(None, sets), multipliers)
        assert found.counts == [1024] * 3
        # four standard errors, and 0.01 nats for the ODE's steps
        for value, stderr, true in zip(found.metrics, found.stderrs, exact.metrics, strict=True):
            assert value == pytest.approx(true, abs=4 * stderr + 0.01)
    dual, stderr = method.dual_value(np.array(multipliers))
    assert dual == pytest.approx(float(exact.multipliers @ exact.metrics), abs=4 * stderr + 0.01)


def test_the_table_is_made_once_and_held_out_samples_are_others(compose):
    method = compose(law="or", pool=64)
    first = method._ratio_table(held_out=False)
    assert method._ratio_table(held_out=False) is first
    assert not np.isin(method._ratio_table(held_out=True)[:, 0, 1], first[:, 0, 1]).any()
    assert np.diagonal(first, axis1=1, axis2=2).max() == 0.0
    assert np.array_equal(compose(law="or", pool=64)._ratio_table(held_out=False), first)
    rows = [measured(method, [0.3, 0.3, 0.4], 64, shards=s).rows for s in ([0, 2], [1, 3])]
    assert sorted(map(tuple, np.concatenate(rows))) == sorted(map(tuple, first.reshape(64, -1)))


def test_a_composed_mixture_is_sampled_in_its_proportions(compose, sets):
    method = compose(law="or")
    start = starting_noise(seed=0, counter=0, shards=[0], counts={0: 4000}, shape=(2,))
    x = method.sample(None, torch.tensor([0.2, 0.3, 0.5]), start, num_sampling_steps=60).double().numpy()
    mean = 0.2 * sets[0].means[0] + 0.3 * sets[1].means[0] + 0.5 * sets[2].means[0]
    assert x.mean(axis=0) == pytest.approx(mean, abs=4 * 0.021)  # std of both coordinates up to 1.35


# -- distilling -----------------------------------------------------------------------------------------------------


def student_batch(count, size):
    generator = torch.Generator().manual_seed(0)
    return Batch(
        x_0=torch.randint(size, (count,), generator=generator),
        noise=torch.randn(count, 2, generator=generator),
        timestep=torch.randint(1000, (count,), generator=generator),
        counts=(count,),
        global_counts=(count,),
    )


def test_the_buffer_follows_the_multipliers_and_a_resumed_run_has_the_same(compose):
    method, multipliers = compose(primal="distill", pool=32), torch.tensor([0.3, 0.3, 0.4])
    assert method.trains
    positions, batch_size = method.streams()["main"]
    assert positions.tolist() == list(range(32)) and batch_size == 16
    first = method._buffer(multipliers)
    assert method._buffer(multipliers) is first
    multipliers[0] = 0.31  # the loop moves them in place
    second = method._buffer(multipliers)
    assert not torch.isin(second, first).any()
    assert torch.equal(compose(primal="distill", pool=32)._buffer(multipliers), second)


def test_the_student_learns_the_denoising_of_the_buffer_under_no_condition(compose):
    method, multipliers = compose(primal="distill", pool=32), torch.tensor([0.3, 0.3, 0.4])
    seen = []

    class Student(torch.nn.Module):
        def forward(self, x_t, timestep, condition=None):
            seen.append((x_t, condition))
            return 0.5 * x_t

    batch = student_batch(16, 32)
    terms = method.primal_loss(Student(), batch, multipliers)
    x_t = SCHEDULE.add_noise(method._buffer(multipliers)[batch.x_0], batch.noise, batch.timestep)
    assert torch.equal(seen[0][0], x_t) and seen[0][1] is None
    assert float(terms.loss) == pytest.approx(float((0.5 * x_t - batch.noise).square().mean()), rel=1e-5)
    assert terms.counts == (16, 0, 0, 0)


def test_a_student_is_measured_on_its_own_samples(compose, sets):
    """Closed form: KL(N(m, s^2) || N(n, r^2)) in the plane, for a student that is the wide set itself."""
    method = compose(primal="distill")
    student = GaussianConditions([sets[0]])
    draws = measured(method, [0.3, 0.3, 0.4], 1024, denoiser=student, steps=200)
    found = method.measurement(draws.rows, np.array([0.3, 0.3, 0.4]))
    m, s = sets[0].means[0], sets[0].stds[0, 0]
    for value, stderr, law in zip(found.metrics, found.stderrs, sets, strict=True):
        n, r = law.means[0], law.stds[0, 0]
        exact = 2 * np.log(r / s) + (2 * s**2 + ((m - n) ** 2).sum()) / (2 * r**2) - 1
        assert value == pytest.approx(exact, abs=4 * stderr + 0.03 * exact + 0.002)
    assert len(draws.samples) == 1024 and student.training


def test_the_mixtures_student_learns_from_the_sets_by_their_weights(compose, data):
    method = compose(law="or", primal="distill", optimizer={"constraint_batch_size": 4})
    assert {name: size for name, (_, size) in method.streams().items()} == dict.fromkeys(NAMES, 4)
    generator = torch.Generator().manual_seed(0)
    batch = Batch(
        x_0=torch.randn(12, 2, generator=generator),
        noise=torch.randn(12, 2, generator=generator),
        timestep=torch.randint(1000, (12,), generator=generator),
        counts=(4, 4, 4),
        global_counts=(4, 4, 4),
    )
    terms = method.primal_loss(lambda x_t, timestep: 0.3 * x_t, batch, torch.tensor([0.5, 0.1, 0.4]))
    x_t = SCHEDULE.add_noise(batch.x_0, batch.noise, batch.timestep)
    losses = (0.3 * x_t - batch.noise).square().mean(1).view(3, 4).mean(1)
    assert float(terms.loss) == pytest.approx(float(losses @ torch.tensor([0.5, 0.1, 0.4])), rel=1e-5)
    assert terms.counts == (0, 4, 4, 4)


def test_the_mixtures_student_is_measured_on_samples_of_the_sets(compose, sets):
    """A student that is the wide set: KL(q^i || p) in closed form, 0 for the wide one."""
    method, student = compose(law="or", primal="distill"), GaussianConditions([sets[0]])
    for counter in (0, EVALUATION_COUNTER):
        draws = measured(method, [0.3, 0.3, 0.4], 1024, denoiser=student, counter=counter)
        found = method.measurement(draws.rows, np.array([0.3, 0.3, 0.4]))
        m, s = sets[0].means[0], sets[0].stds[0, 0]
        for value, stderr, law in zip(found.metrics, found.stderrs, sets, strict=True):
            n, r = law.means[0], law.stds[0, 0]
            exact = 2 * np.log(s / r) + (2 * r**2 + ((m - n) ** 2).sum()) / (2 * s**2) - 1
            assert value == pytest.approx(exact, abs=4 * stderr + 0.01)
    whole = measured(method, [0.3, 0.3, 0.4], 64, denoiser=student).rows
    parts = [measured(method, [0.3, 0.3, 0.4], 64, denoiser=student, shards=[k]).rows for k in range(4)]
    assert np.array_equal(whole, np.concatenate(parts))


def test_held_out_samples_drawn_twice_count_once(compose, data, monkeypatch):
    """Five times as many draws as held-out samples: the standard error is that of the samples."""
    method = compose(law="or", primal="distill")
    monkeypatch.setattr(method, "kl_values", lambda law, student, x_0, **_: x_0[:, 0].double().numpy())
    fewest = min(map(len, data.held_out_constraints.values()))
    draws = measured(method, [0.3, 0.3, 0.4], 4 * 5 * fewest, denoiser=torch.nn.Identity(), counter=EVALUATION_COUNTER)
    found = method.measurement(draws.rows, np.array([0.3, 0.3, 0.4]))
    for name, metric, stderr, count in zip(NAMES, found.metrics, found.stderrs, found.counts, strict=True):
        points = data.held_out_constraints[name][:, 0]
        expected = points.std(ddof=1) / np.sqrt(len(points))
        assert count == len(points)
        assert stderr == pytest.approx(expected, rel=0.05)  # some are drawn once more than others
        assert metric == pytest.approx(points.mean(), abs=0.3 * expected)


def test_rounds_take_every_index_before_any_twice():
    index = rounds(np.random.default_rng(0), 7, 17)
    assert sorted(index[:7]) == sorted(index[7:14]) == list(range(7)) and len(index) == 17
    assert len(set(rounds(np.random.default_rng(0), 7, 3))) == 3


# -- pieces -------------------------------------------------------------------------------------------------------


def test_log_ratios_are_those_of_the_densities_on_average(compose, sets):
    denoiser = GaussianConditions([sets[0], *sets])
    x_0 = torch.tensor([[0.0, 0.0], [1.0, -0.5], [-0.6, 0.3]], dtype=torch.float64)
    noise = SimpleNamespace(normal=lambda shape: torch.randn(len(x_0) * 400, *shape, generator=generator))
    generator = torch.Generator().manual_seed(0)
    found = log_ratios(denoiser, x_0.repeat(400, 1), [2, 1, 3], SCHEDULE, noise, levels=48).reshape(400, 3, 3)
    exact = np.stack([sets[k].log_density(x_0.numpy()) for k in (1, 0, 2)], axis=1)
    stderrs = found.std(axis=0, ddof=1) / 20
    assert (np.abs(found.mean(axis=0) - (exact - exact[:, :1])) <= 4 * stderrs + 0.01).all()
    assert (found[:, :, 0] == 0).all() and stderrs[:, 1:].max() < 0.12


def test_clustered_standard_errors():
    values = np.random.default_rng(0).normal(size=(500, 2))
    each, count = clustered_stderrs(values, np.arange(500))
    assert each == pytest.approx(values.std(axis=0, ddof=1) / np.sqrt(500)) and count == 500
    doubled, count = clustered_stderrs(np.repeat(values, 2, axis=0), np.repeat(np.arange(500), 2))
    assert doubled == pytest.approx(each) and count == 500  # copies tell nothing new


def test_the_exact_answer_is_there_where_it_is_known(compose, data, sets):
    constraints = [Constraint(name=n, unit="nats", threshold=b) for n, b in zip(NAMES, (0.4, 0.0, 0.2), strict=True)]
    exact = compose().exact(constraints, {"rule": "ascent"})
    assert exact.multipliers == pytest.approx([0.423, 0.219, 0.358], abs=1e-3)
    assert exact.level == pytest.approx(1.446, abs=1e-3)
    assert compose(law="or").exact(constraints, {"rule": "nupi"}).multipliers == pytest.approx(
        [0.267, 0.418, 0.314], abs=1e-3
    )
    assert compose().exact(constraints, {"rule": "resilient"}) is None
    assert compose().exact([], {"rule": "ascent"}) is None


@pytest.mark.parametrize("law", ["and", "or"])
def test_what_is_saved_samples_the_same(compose, tmp_path, law):
    torch.manual_seed(0)
    model = build_denoiser({"kind": "mlp", "width": 16, "depth": 1}, (2,), SCHEDULE, num_conditions=4).eval()
    method, multipliers = compose(law=law, base=model, sampling_levels=6), torch.tensor([0.2, 0.3, 0.5])
    method.save(model, multipliers, tmp_path)
    start = starting_noise(seed=0, counter=0, shards=[0], counts={0: 32}, shape=(2,))
    expected = method.sample(model, multipliers, start, num_sampling_steps=5)
    denoiser, schedule, composed = load_composition(tmp_path)
    assert composed.coefficients == pytest.approx((0, 0.2, 0.3, 0.5)) and composed.names == NAMES
    found = composed.sample(denoiser, start, schedule, num_sampling_steps=5)
    assert torch.allclose(found, expected, atol=1e-5)


def test_a_damaged_or_foreign_composition_is_refused_by_name(compose, tmp_path):
    with pytest.raises(ValueError, match=r"composition\.json: no composition can be read"):
        load_composition(tmp_path)
    model = build_denoiser({"kind": "mlp", "width": 16, "depth": 1}, (2,), SCHEDULE, num_conditions=4)
    compose(base=model).save(model, torch.tensor([0.2, 0.3, 0.5]), tmp_path)
    path = tmp_path / "composition.json"
    text = path.read_text(encoding="utf-8")
    path.write_text(text[:40], encoding="utf-8")
    with pytest.raises(ValueError, match=r"composition\.json: no composition can be read"):
        load_composition(tmp_path)
    build_denoiser({"kind": "mlp", "width": 16, "depth": 1}, (2,), SCHEDULE, num_conditions=3).network.save_pretrained(
        tmp_path
    )
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match="4 coefficients for a model of 3 conditions"):
        load_composition(tmp_path)


def test_a_pretrained_model_without_the_sets_is_refused(compose, sets):
    method = compose(base=GaussianConditions(sets[:1]))
    with pytest.raises(ValueError, match=r"model\.pretrained: the model knows 1 conditions, composition needs 4"):
        measured(method, [0.3, 0.3, 0.4], 16)


def config(**given):
    values = {
        "formulation": {},
        "measure": {"window": 1},
        "baselines": {"fixed_weights": []},
        "dual": {"rule": "ascent"},
    }
    return values | given


@pytest.mark.parametrize(
    ("given", "names", "message"),
    [
        ({"measure": {"window": 2}}, NAMES, r"measure\.window=2"),
        ({"formulation": {"langevin_step_size": 4.0}}, NAMES, r"formulation\.langevin_step_size=4\.0"),
        ({"baselines": {"fixed_weights": [0.2]}}, NAMES, r"baselines\.fixed_weights=\[0\.2\]"),
        ({}, NAMES[:1], r"data\.sets holds 1 set"),
    ],
)
def test_configurations_it_cannot_use_are_refused(given, names, message):
    with pytest.raises(ValueError, match=message):
        Composition.check(config(**given), names)


def test_configurations_it_can_use_pass():
    Composition.check(config(), NAMES)
    Composition.check(config(formulation={"primal": "distill"}, measure={"window": 2}), NAMES)


@pytest.mark.slow
@pytest.mark.parametrize("law", ["and", "or"])
def test_the_example_reaches_the_exact_multipliers(tmp_path, law):
    """Seed 0, the offset point; five seeds stay within 0.02 (trained predictions)."""
    overrides = [f"storage={tmp_path}", "baselines.unconstrained=false"]
    config = load_config(EXAMPLES / f"gmm_composition_{law}.yaml", overrides, environment=False)
    workspace, dual = Workspace(config.to_dict(), config.data), LocalDual()
    base = {"trial_id": "base", "label": "base", "kind": "base", "thresholds": {}, "fixed_weight": None}
    for point in [base, sweep_points(config, workspace.constraint_names)[1]]:
        folders = {"trial_dir": str(tmp_path / point["trial_id"]), "base_dir": str(tmp_path / "base")}
        result = run_trial(workspace, Assignment(**point, **folders, attempt=1), dual)
    exact, found = result["exact_multipliers"], result["averaged_multipliers"]
    assert found == pytest.approx(exact, abs=0.03)
    assert result["objective"]["value"] == pytest.approx(result["exact_objective"], abs=0.15)
    assert result["certificate"]["verdict"] != "infeasible"
    denoiser, schedule, composed = load_composition(tmp_path / point["trial_id"] / "model")
    start = starting_noise(seed=1, counter=0, shards=[0], counts={0: 64}, shape=(2,))
    assert composed.sample(denoiser, start, schedule, num_sampling_steps=10).isfinite().all()
