"""Reverse-KL unlearning with exact predictions against integrals on a grid (methods.md H2), and one trained run of the example."""

from pathlib import Path

import numpy as np
import pytest
import torch

from dualsweep.constraints import Constraint, rule_from_config
from dualsweep.constraints.closed_forms import reverse_kl_gaussian_multiplier
from dualsweep.datasets import DatasetSpec, build
from dualsweep.orchestration.config import load_config, sweep_points
from dualsweep.orchestration.local_dual import LocalDual
from dualsweep.trainers.annealed import AnnealedSampler
from dualsweep.trainers.assignment import Assignment
from dualsweep.trainers.formulations import ReverseKL
from dualsweep.trainers.loop import run_trial
from dualsweep.trainers.methods.composed import load_composition
from dualsweep.trainers.methods.unlearn_reverse_kl import UnlearnReverseKL
from dualsweep.trainers.noise_schedule import NoiseSchedule
from dualsweep.trainers.oracles import oracle_at, reverse_kl
from dualsweep.trainers.samplers import starting_noise
from dualsweep.trainers.workspace import Workspace

SCHEDULE = NoiseSchedule(clip_sample=False)
EXAMPLE = Path(__file__).parents[2] / "examples" / "gmm_unlearn_reverse_kl.yaml"
NAMES = ("left", "right")
LAB = {
    "means": [[-1.5, -0.8], [1.5, -0.8], [0.0, 1.7]],
    "stds": [0.4, 0.4, 0.4],
    "weights": [0.4, 0.3, 0.3],
    "sets": {
        "left": {"means": [[-1.5, -0.8], [0.0, 0.0]], "stds": [0.5, 1.8], "weights": [0.9, 0.1]},
        "right": {"means": [[1.5, -0.8], [0.0, 0.0]], "stds": [0.5, 1.8], "weights": [0.85, 0.15]},
    },
}
# One Gaussian to forget, of q's own variance: closed form (methods.md H2).
GAUSSIAN = {
    "means": [[-0.5]],
    "stds": [0.8],
    "weights": [1.0],
    "sets": {"left": {"means": [[1.0]], "stds": [0.8], "weights": [1.0]}},
}
EVALUATION = {"num_samples": 2048, "num_sampling_steps": 50}


@pytest.fixture(scope="module")
def unlearn(make_setting, conditional_denoiser):
    """`unlearn(lab, ...)`: the method with exact predictions."""

    def make(lab=LAB, *, names=None, **options):
        data = build(DatasetSpec.from_dict({"dataset": "gaussian_mixture", "count": 200, **lab}))
        base = conditional_denoiser([data.mixture, *data.constraint_mixtures.values()], SCHEDULE)
        options = UnlearnReverseKL.options({"levels": 48, **options})
        names = tuple(data.constraints) if names is None else names
        return UnlearnReverseKL(
            make_setting(data=data, schedule=SCHEDULE, base=base, names=names, unit="nats", options=options)
        )

    return make


def measurement(method, multipliers, count, *, counter=5):
    given = np.asarray(multipliers, dtype=np.float32)
    draws = method.measure(
        None, torch.from_numpy(given), counter=counter, shards=[0], counts={0: count}, num_sampling_steps=50
    )
    return method.measurement(draws.rows, given)


def constraints(*thresholds, names=NAMES):
    return [Constraint(name=n, unit="nats", threshold=b, sense=">=") for n, b in zip(names, thresholds, strict=False)]


# -- the law ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("multipliers", [None, (0.05, 0.25)], ids=["optimal", "other"])
def test_divergences_objective_and_dual_value_are_those_of_the_integrals(unlearn, multipliers):
    method = unlearn()
    main, sets = method.mixtures
    oracle = (
        reverse_kl(main, sets, [3.0, 3.0]) if multipliers is None else oracle_at(ReverseKL(main, sets), multipliers)
    )
    found = measurement(method, oracle.multipliers, 3000)
    # 3.5 standard errors (once in 500 seeds for four of them), and 0.03 nats for levels
    pairs = [*zip(found.metrics, found.stderrs, oracle.metrics, strict=True), (*found.objective, None)]
    for value, stderr, exact in pairs:
        exact = oracle_at(ReverseKL(main, sets), oracle.multipliers).objective if exact is None else exact
        assert value == pytest.approx(exact, abs=3.5 * stderr + 0.03)
    assert max(found.stderrs) < 0.08 and found.objective[1] < 0.04
    dual, stderr = method.dual_value(oracle.multipliers)
    exact = oracle_at(ReverseKL(main, sets), oracle.multipliers).dual_value
    assert dual == pytest.approx(exact, abs=3.5 * stderr + 0.02) and stderr < 0.02


def test_one_gaussian_moves_away_as_in_the_closed_form(unlearn):
    method, threshold = unlearn(GAUSSIAN), 1.9 * 1.5**2 / (2 * 0.8**2)
    multiplier = reverse_kl_gaussian_multiplier(1.5, 0.8, threshold)
    assert multiplier == pytest.approx(0.2745, abs=1e-4)
    found = measurement(method, [multiplier], 4096)
    assert found.metrics[0] == pytest.approx(threshold, abs=4 * found.stderrs[0] + 0.01)
    exact = (multiplier / (1 - multiplier)) ** 2 * 1.5**2 / (2 * 0.8**2)
    assert found.objective[0] == pytest.approx(exact, abs=4 * found.objective[1] + 0.01)
    start = torch.from_numpy(np.random.default_rng(0).standard_normal((4096, 1)).astype(np.float32))
    samples = method.sample(None, torch.tensor([multiplier]), start, num_sampling_steps=50)
    assert samples.mean().item() == pytest.approx((-0.5 - multiplier) / (1 - multiplier), abs=4 * 0.0125)


def test_the_other_sign_and_an_uncorrected_sampler_are_found_out(unlearn, monkeypatch):
    method, threshold = unlearn(GAUSSIAN), 1.9 * 1.5**2 / (2 * 0.8**2)
    multiplier = reverse_kl_gaussian_multiplier(1.5, 0.8, threshold)
    with monkeypatch.context() as patch:  # the product with the forget set instead of the ratio
        patch.setattr(method, "exponents", lambda given: np.array([1.0, given[0]]) / (1 + given[0]))
        assert measurement(method, [multiplier], 1024).metrics[0] < 0.5 * threshold
    method = unlearn()
    oracle = reverse_kl(*method.mixtures, [3.0, 3.0])
    monkeypatch.setattr(UnlearnReverseKL, "sampler", AnnealedSampler(langevin_steps=0, resample_below=0))
    found = measurement(method, oracle.multipliers, 2048)
    assert max(abs(np.array(found.metrics) - 3.0)) > 0.3  # 0.8 measured, s.e. 0.06


def test_at_multipliers_of_zero_the_law_is_the_pretrained_models(unlearn):
    method = unlearn()
    found = measurement(method, [0.0, 0.0], 2048)
    assert found.objective == pytest.approx((0.0, 0.0), abs=1e-12)
    exact = ReverseKL(*method.mixtures).metrics([0.0, 0.0])
    for value, stderr, true in zip(found.metrics, found.stderrs, exact, strict=True):
        assert value == pytest.approx(true, abs=4 * stderr)
    calibrated = unlearn(primal="distill").calibrate()  # of the law, whatever is trained
    assert calibrated.metrics == pytest.approx(exact, abs=4 * max(calibrated.stderrs))
    assert UnlearnReverseKL.starts_optimal


def test_the_objective_is_measured_on_the_same_draws(unlearn):
    method, given = unlearn(), torch.tensor([0.17, 0.17])
    found = measurement(method, given.numpy(), 1024)
    objective = method.objective(None, given, evaluation=EVALUATION, base_errors=None)
    assert (objective.value, objective.stderr) == found.objective
    elsewhere = method.objective(None, torch.tensor([0.0, 0.0]), evaluation=EVALUATION, base_errors=None)
    assert elsewhere.value == 0.0


@pytest.mark.slow
def test_dual_ascent_on_the_measured_divergences_reaches_the_exact_multipliers(unlearn):
    method = unlearn()
    exact = reverse_kl(*method.mixtures, [3.0, 4.0]).multipliers  # (0.132, 0.333)
    domain = method.domain(constraints(3.0, 4.0))
    rule = rule_from_config({"rule": "ascent", "step_size": 0.04})
    state, seen = rule.initial(NAMES, 0.0, domain), []
    for step in range(45):
        found = measurement(method, state.multipliers, 256, counter=step)
        state = rule.step(state, np.array([3.0, 4.0]) - found.metrics, domain)
        seen.append(state.multipliers)
    assert np.mean(seen[20:], axis=0) == pytest.approx(exact, abs=0.02)  # scatter of the mean 0.006


def test_a_student_is_measured_against_the_pretrained_model_too(unlearn, conditional_denoiser):
    """The student is q itself: KL(p||q) = 0, KL(p||q^1) in closed form."""
    method = unlearn(GAUSSIAN, primal="distill")
    student = conditional_denoiser([method.setting.data.mixture], SCHEDULE)
    draws = method.measure(
        student, torch.tensor([0.2]), counter=0, shards=[0, 1], counts={0: 200, 1: 200}, num_sampling_steps=100
    )
    found = method.measurement(draws.rows, np.array([0.2]))
    assert draws.rows.shape == (400, 2)
    assert found.objective[0] == pytest.approx(0.0, abs=1e-9)
    assert found.metrics[0] == pytest.approx(1.5**2 / (2 * 0.8**2), rel=0.01)
    # The dual value is that of the law, which the student has not reached.
    dual, stderr = method.dual_value(np.array([0.2]))
    exact = oracle_at(ReverseKL(*method.mixtures), [0.2]).dual_value
    assert dual == pytest.approx(exact, abs=4 * stderr + 0.01)


# -- the domain and the configuration --------------------------------------------------------------------------------


def test_multipliers_stay_away_from_a_sum_of_one_and_the_guard_is_reported(unlearn):
    method = unlearn()
    domain = method.domain(constraints(50.0, 60.0))
    rule = rule_from_config({"rule": "ascent", "step_size": 1.0})
    state = rule.step(rule.initial(NAMES, 0.0, domain), [40.0, 50.0], domain)
    assert state.multipliers.sum() == pytest.approx(0.95)
    assert domain.saturated(state.multipliers).any()
    weights = method.exponents(state.multipliers)
    assert weights.sum() == pytest.approx(1.0) and np.abs(weights).max() <= 20 + 1e-9
    assert not domain.saturated(np.array([0.3, 0.3])).any()


def test_the_exact_answer_is_there_where_it_is_known(unlearn):
    exact = unlearn().exact(constraints(3.0, 3.0), {"rule": "ascent"})
    assert exact.multipliers == pytest.approx([0.1729, 0.1726], abs=1e-3)
    assert exact.objective == pytest.approx(0.2178, abs=1e-3)
    assert unlearn().exact(constraints(3.0, 3.0), {"rule": "resilient"}) is None


def test_thresholds_out_of_reach_have_no_exact_answer_and_are_tried_once(unlearn):
    method, tried = unlearn(), []

    def out_of_reach(main, sets, thresholds):
        tried.append(thresholds)
        raise ValueError("out of reach")

    for _ in range(2):
        assert method.solved(out_of_reach, constraints(3.0, 1000.0), {"rule": "ascent"}) is None
    assert tried == [[3.0, 1000.0]]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"baselines": {"fixed_weights": [0.1, 0.6]}}, r"baselines\.fixed_weights=0\.6 for each of 2 sets"),
        ({"dual": {"rule": "fixed", "start": 0.5}}, r"dual\.start=0\.5 for each of 2 sets"),
        ({"measure": {"window": 3}}, r"measure\.window=3"),
    ],
)
def test_configurations_it_cannot_use_are_refused(given, message):
    config = {
        "formulation": {},
        "measure": {"window": 1},
        "baselines": {"fixed_weights": [0.2, 0.4]},
        "dual": {"rule": "ascent", "start": 0.9},
    }
    UnlearnReverseKL.check(config, NAMES)  # a start is projected where multipliers move
    with pytest.raises(ValueError, match=message):
        UnlearnReverseKL.check(config | given, NAMES)


@pytest.mark.slow
def test_the_example_reaches_the_exact_multipliers(tmp_path):
    """Seed 0, the middle point; five seeds stay within 0.02 (trained predictions)."""
    overrides = [f"storage={tmp_path}", "baselines.unconstrained=false"]
    config = load_config(EXAMPLE, overrides, environment=False)
    workspace, dual = Workspace(config.to_dict(), config.data), LocalDual()
    base = {"trial_id": "base", "label": "base", "kind": "base", "thresholds": {}, "fixed_weight": None}
    for point in [base, sweep_points(config, workspace.constraint_names)[1]]:
        folders = {"trial_dir": str(tmp_path / point["trial_id"]), "base_dir": str(tmp_path / "base")}
        result = run_trial(workspace, Assignment(**point, **folders, attempt=1), dual)
    exact, found = result["exact_multipliers"], result["averaged_multipliers"]
    assert found == pytest.approx(exact, abs=0.03)
    assert result["objective"]["value"] == pytest.approx(result["exact_objective"], abs=0.1)
    assert result["certificate"]["verdict"] != "infeasible"
    denoiser, schedule, composed = load_composition(tmp_path / point["trial_id"] / "model")
    start = starting_noise(seed=1, counter=0, shards=[0], counts={0: 64}, shape=(2,))
    assert composed.sample(denoiser, start, schedule, num_sampling_steps=10).isfinite().all()
