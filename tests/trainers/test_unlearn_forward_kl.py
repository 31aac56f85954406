"""Forward-KL unlearning: the difference of denoising losses, its stabilisers, its caps, and divergences that only grow."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing

from dualsweep.constraints import Capped, Constraint, NonNegative, certify
from dualsweep.constraints.multipliers import DualState
from dualsweep.constraints.problem import Problem
from dualsweep.datasets import DatasetSpec, SetSpec, build, validate_spec
from dualsweep.orchestration.config import load_config
from dualsweep.orchestration.local_dual import LocalDual
from dualsweep.orchestration.preflight import _check_formulation
from dualsweep.trainers.assignment import Assignment
from dualsweep.trainers.estimators import point_kl
from dualsweep.trainers.evaluate import EVALUATION_COUNTER
from dualsweep.trainers.loop import run_trial
from dualsweep.trainers.methods import METHODS
from dualsweep.trainers.methods.base import host_batch
from dualsweep.trainers.methods.unlearn_forward_kl import UnlearnForwardKL, gradient_norm
from dualsweep.trainers.noise_schedule import NoiseSchedule
from dualsweep.trainers.workspace import Workspace

EXAMPLE = Path(__file__).parents[2] / "examples" / "gmm_unlearn_forward_kl.yaml"
SCHEDULE = NoiseSchedule(clip_sample=False)
PRIOR = np.array([0.3, 0.3])
MULTIPLIERS = torch.tensor([0.2, 0.1], dtype=torch.float64)
COUNTS = (8, 6, 4)
OPTIONS = {"levels": 32, "gradient_norm": None, "loss_ceiling": None}


def laboratory(sets, **given):
    return build(
        DatasetSpec(
            dataset="gaussian_mixture",
            means=((-1.5, -0.8), (1.5, -0.8), (0.0, 1.7)),
            stds=(0.4, 0.4, 0.4),
            weights=(0.4, 0.3, 0.3),
            count=1000,
            sets=sets,
            **given,
        )
    )


@pytest.fixture(scope="module")
def data():
    return laboratory({"right": SetSpec(classes=(1,)), "top": SetSpec(classes=(2,))})


@pytest.fixture(scope="module")
def unlearning(data, make_setting):
    """`unlearning(gradient_norm=..., normalize=..., ...)`: the method with these options on the laboratory's mixture."""

    def make(*, normalize=True, **given):
        options = {key: given.pop(key, default) for key, default in OPTIONS.items()}
        given = {"data": data, "options": options, "optimizer": {"normalize": normalize}} | given
        return UnlearnForwardKL(make_setting(**given))

    return make


def stream_losses(denoiser, batch):
    """Mean squared error of each stream, a forward each."""
    x_t = NoiseSchedule(num_train_timesteps=50).add_noise(batch.x_0, batch.noise, batch.timestep)
    parts = zip(*(rows.split(batch.counts) for rows in (x_t, batch.timestep, batch.noise)), strict=True)
    return [torch.nn.functional.mse_loss(denoiser(x, t), noise) for x, t, noise in parts]


def asked(unit, *thresholds):
    sense = "<=" if unit == "share" else ">="
    return [
        Constraint(name=name, unit=unit, threshold=threshold, sense=sense)
        for name, threshold in zip(("right", "top"), thresholds, strict=False)
    ]


# -- the Lagrangian ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalize", [True, False])
def test_the_forget_losses_are_subtracted_in_value_and_gradient(unlearning, tiny_denoiser, tiny_batch, normalize):
    denoiser, batch = tiny_denoiser(), tiny_batch(COUNTS)
    found = unlearning(normalize=normalize).primal_loss(denoiser, batch, MULTIPLIERS)
    main, right, top = stream_losses(denoiser, batch)
    expected = (main - 0.2 * right - 0.1 * top) / (0.7 if normalize else 1.0)
    torch.testing.assert_close(found.loss, expected, rtol=1e-5, atol=0)  # predictions are read in float32
    torch.testing.assert_close(denoiser.gradient(found.loss), denoiser.gradient(expected), rtol=1e-5, atol=1e-6)
    for wrong in (main + 0.2 * right + 0.1 * top, main - 0.1 * right - 0.2 * top, main - right - top):
        assert abs((found.loss - wrong).item()) > 1e-2  # controls: sign, order and weights are noticed


def test_its_gradient_is_the_slope(unlearning, tiny_denoiser, tiny_batch):
    denoiser, batch = tiny_denoiser(linear=True), tiny_batch(COUNTS)

    def loss():
        return unlearning().primal_loss(denoiser, batch, MULTIPLIERS).loss

    (gradient,) = torch.autograd.grad(loss(), [denoiser.leave.weight])
    entries = [(0, 0), (1, 3), (2, 5)]
    assert [float(gradient[e]) for e in entries] == pytest.approx(denoiser.slopes(loss, entries), abs=1e-5)


def test_an_unconstrained_run_is_plain_denoising(unlearning, tiny_denoiser, tiny_batch):
    denoiser, batch = tiny_denoiser(), tiny_batch((7,))
    for ceiling in (None, 0.1):
        method = unlearning(names=(), loss_ceiling=ceiling)
        found = method.primal_loss(denoiser, batch, torch.zeros(0, dtype=torch.float64))
        torch.testing.assert_close(found.loss, stream_losses(denoiser, batch)[0], rtol=1e-6, atol=0)


def test_the_exact_difference_minimises_the_lagrangian(data, unlearning, exact_denoiser):
    # Paired on one batch, seed 0: other weights lose by at least 5 standard errors, the sum instead by dozens.
    count, rng = 20000, np.random.default_rng(0)
    method = unlearning(schedule=SCHEDULE)
    streams = {name: samples for name, (samples, _) in method.streams().items()}
    draws = {
        name: (
            rng.integers(len(samples), size=count),
            rng.integers(1000, size=count),
            rng.standard_normal((count, 2), dtype=np.float32),
        )
        for name, samples in streams.items()
    }
    sizes = dict.fromkeys(streams, count)
    batch = host_batch(draws, sizes, pinned=False).to_device(streams, sizes, torch.device("cpu"))
    multipliers = np.array([0.25, 0.15])

    def per_triple(right, top):
        model = exact_denoiser(data.mixture.with_weights([0.4, 0.3 - right, 0.3 - top]), SCHEDULE)
        main, forget, other = method.primal_loss(model, batch, torch.zeros(2)).values.split(count)
        return (main - multipliers[0] * forget - multipliers[1] * other).double().numpy()

    best = per_triple(*multipliers)
    for other in ([0.1, 0.15], [0.25, 0.28], [0.0, 0.0], [-0.25, -0.15]):
        gap = per_triple(*other) - best
        assert gap.mean() > 4 * gap.std() / np.sqrt(count)


PIECES = [(slice(0, 5), slice(0, 6), slice(0, 1)), (slice(5, 8), slice(6, 6), slice(1, 4))]


@pytest.mark.parametrize("ceiling", [None, 0.8])
def test_uneven_parts_of_several_workers_add_up_to_the_whole(unlearning, tiny_denoiser, tiny_batch, part_of, ceiling):
    method, denoiser, batch = unlearning(loss_ceiling=ceiling), tiny_denoiser(), tiny_batch(COUNTS)
    whole = method.primal_loss(denoiser, batch, MULTIPLIERS).loss
    parts = [method.primal_loss(denoiser, part_of(batch, piece), MULTIPLIERS).loss for piece in PIECES]
    torch.testing.assert_close(sum(parts), whole, rtol=1e-5, atol=0)
    torch.testing.assert_close(sum(map(denoiser.gradient, parts)), denoiser.gradient(whole), rtol=1e-5, atol=1e-6)


# -- the stabilisers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalize", [True, False])
def test_gradient_norm_scales_the_forget_gradient_to_it(unlearning, tiny_denoiser, tiny_batch, normalize):
    """g_x - c g_a / |g_a| at multiplier 1, over 1 + 1 where it is normalised (methods.md 8b)."""
    denoiser, batch = tiny_denoiser(), tiny_batch((8, 6))
    method = unlearning(gradient_norm=0.05, normalize=normalize, names=("right",))
    found = denoiser.gradient(method.primal_loss(denoiser, batch, torch.ones(1, dtype=torch.float64)).loss)
    retain, forget = (denoiser.gradient(loss) for loss in stream_losses(denoiser, batch))
    expected = (retain - 0.05 * forget / forget.norm()) / (2.0 if normalize else 1.0)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert (found - (retain - 0.05 * forget)).norm() > 1e-3  # control: an unscaled gradient is noticed


def test_gradient_norm_of_several_sets_is_that_of_their_weighted_mean(unlearning, tiny_denoiser, tiny_batch):
    denoiser, batch = tiny_denoiser(), tiny_batch(COUNTS)
    method = unlearning(gradient_norm=0.05, normalize=False)
    retain, right, top = (denoiser.gradient(loss) for loss in stream_losses(denoiser, batch))
    together = 0.2 * right + 0.1 * top
    found = denoiser.gradient(method.primal_loss(denoiser, batch, MULTIPLIERS).loss)
    torch.testing.assert_close(found, retain - 0.3 * 0.05 * together / together.norm(), rtol=1e-5, atol=1e-6)
    none = denoiser.gradient(method.primal_loss(denoiser, batch, 0 * MULTIPLIERS).loss)
    torch.testing.assert_close(none, retain, rtol=1e-6, atol=1e-7)  # multipliers of 0: no forgetting, no division by 0


def test_forget_losses_above_the_ceiling_have_no_gradient(unlearning, tiny_denoiser, tiny_batch):
    denoiser, batch = tiny_denoiser(), tiny_batch(COUNTS)
    plain = unlearning(normalize=False)
    losses = plain.primal_loss(denoiser, batch, MULTIPLIERS).values
    retain = denoiser.gradient(stream_losses(denoiser, batch)[0])

    def gradient(ceiling):
        method = unlearning(loss_ceiling=ceiling, normalize=False)
        terms = method.primal_loss(denoiser, batch, MULTIPLIERS)
        torch.testing.assert_close(terms.values, losses)  # the metric is the loss itself
        return denoiser.gradient(terms.loss)

    low, high = losses.min().item() * 0.9, losses.max().item() * 1.1
    torch.testing.assert_close(gradient(low), retain, rtol=1e-6, atol=1e-7)
    whole = denoiser.gradient(plain.primal_loss(denoiser, batch, MULTIPLIERS).loss)
    torch.testing.assert_close(gradient(high), whole, rtol=1e-5, atol=1e-7)
    # In between: exactly the forget samples below it.
    ceiling = losses[8:].median().item() + 1e-6
    below = [losses[8:14][losses[8:14] < ceiling].sum() / 6, losses[14:][losses[14:] < ceiling].sum() / 4]
    kept = denoiser.gradient(plain.primal_loss(denoiser, batch, 0 * MULTIPLIERS).loss)
    for multiplier, part in zip(MULTIPLIERS, below, strict=True):
        kept = kept - multiplier * denoiser.gradient(part)
    torch.testing.assert_close(gradient(ceiling), kept, rtol=1e-5, atol=1e-6)


def test_both_stabilisers_together_survive_a_ceiling_that_stops_everything(unlearning, tiny_denoiser, tiny_batch):
    denoiser, batch = tiny_denoiser(), tiny_batch(COUNTS)
    method = unlearning(loss_ceiling=1e-6, gradient_norm=0.1, normalize=False)
    found = denoiser.gradient(method.primal_loss(denoiser, batch, MULTIPLIERS).loss)
    torch.testing.assert_close(found, denoiser.gradient(stream_losses(denoiser, batch)[0]), rtol=1e-6, atol=1e-7)


def norm_of_a_part(rank, path, denoiser, parts, norms):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=len(parts))
    norms[rank] = gradient_norm(denoiser(*parts[rank]).square().sum(), denoiser)
    torch.distributed.destroy_process_group()


def test_the_norm_is_that_of_all_workers_together(tmp_path, tiny_denoiser, tiny_batch):
    denoiser, batch = tiny_denoiser().share_memory(), tiny_batch((10,))
    parts = [(batch.x_0[rows], batch.timestep[rows]) for rows in (slice(0, 7), slice(7, 10))]
    norms = torch.zeros(2, dtype=torch.float64).share_memory_()
    context = torch.multiprocessing.get_context("fork")  # a spawned worker would import torch for seconds
    workers = [
        context.Process(target=norm_of_a_part, args=(rank, tmp_path / "group", denoiser, parts, norms))
        for rank in (0, 1)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    whole = gradient_norm(denoiser(batch.x_0, batch.timestep).square().sum(), denoiser)
    assert norms.tolist() == pytest.approx([float(whole)] * 2, rel=1e-12)
    alone = [float(gradient_norm(denoiser(*part).square().sum(), denoiser)) for part in parts]
    assert min(abs(one - float(whole)) for one in alone) > 1e-2  # control: neither part has the norm of the whole


# -- the domain --------------------------------------------------------------------------------------------------------


def test_a_multiplier_stays_below_the_mass_of_its_set(unlearning):
    domain = unlearning().domain(asked("share", 0.05, 0.1))
    assert isinstance(domain, Capped) and domain.caps == pytest.approx([0.3, 0.3])
    for stabiliser in ({"gradient_norm": 0.1}, {"loss_ceiling": 2.0}):
        assert isinstance(unlearning(**stabiliser).domain(asked("share", 0.05, 0.1)), NonNegative)


def test_the_mass_of_several_components_and_of_a_law_of_its_own(make_setting):
    sets = {
        "both": SetSpec(classes=(1, 2)),
        "right": SetSpec(means=((1.5, -0.8),), stds=(0.4,)),
    }
    method = UnlearnForwardKL(make_setting(data=laboratory(sets), options=OPTIONS, unit="nats"))
    assert [method._mass(name) for name in ("both", "right")] == pytest.approx([0.6, 0.3], rel=1e-3)


def test_the_mass_of_images_is_their_fraction_of_main(make_setting):
    images = build(DatasetSpec(dataset="digits", sets={"one": SetSpec(samples=(3,)), "nines": SetSpec(classes=(8, 9))}))
    method = UnlearnForwardKL(make_setting(data=images, options=OPTIONS, unit="loss"))
    assert method._mass("one") == 1 / len(images.main)
    assert method._mass("nines") == pytest.approx(images.prior[8] + images.prior[9])


def test_a_set_that_main_lacks_is_refused_by_name(make_setting):
    data = laboratory({"right": SetSpec(classes=(1,))}, main_classes=(0, 2))
    method = UnlearnForwardKL(make_setting(data=data, options=OPTIONS))
    with pytest.raises(ValueError, match=r"data.sets.right: main holds nothing of it.*data.main_classes"):
        method.domain(asked("share", 0.1))


def test_a_multiplier_at_its_cap_is_named_by_the_certificate(unlearning):
    constraints = asked("share", 0.05, 0.1)
    domain = unlearning().domain(constraints)
    problem = Problem(method="unlearn_forward_kl", objective="loss", constraints=tuple(constraints), domain=domain)
    state = DualState(names=problem.names, multipliers=domain.project([1.0, 0.2]))
    certificate = certify(problem, state, [1.0, 0.0], [0.1, 0.1], 100, 0.1)
    assert certificate.saturated == ("right",)


# -- the metric --------------------------------------------------------------------------------------------------------


def test_the_metric_of_exact_denoisers_is_the_divergence_from_the_model(
    data, unlearning, exact_denoiser, conditional_denoiser
):
    # Components 7 stds apart: KL(q^i||p) = -log share_i, to 2e-3. Three standard errors, false alarm 0.5 %.
    laws = [data.mixture, *data.constraint_mixtures.values()]
    method = unlearning(unit="nats", schedule=SCHEDULE, base=conditional_denoiser(laws, SCHEDULE))
    model = exact_denoiser(data.mixture.with_weights([0.85, 0.05, 0.1]), SCHEDULE)
    for counter in (1, EVALUATION_COUNTER):
        draws = method.measure(model, MULTIPLIERS, counter=counter, shards=[0], counts={0: 3000}, num_sampling_steps=1)
        found = method.measurement(draws.rows, MULTIPLIERS.numpy())
        assert draws.rows[:, :2].shape == (3000, 2)
        for metric, stderr, share in zip(found.metrics, found.stderrs, (0.05, 0.1), strict=True):
            assert metric == pytest.approx(-np.log(share), abs=3 * stderr + 0.01)
            assert stderr < 0.06


def test_the_divergence_in_the_other_direction_is_noticed(data, exact_denoiser):
    """Control: KL(p||q^i) is tens of nats, since a component has no mass at the others."""
    shares = data.mixture.with_weights([0.85, 0.05, 0.1])
    model, right = exact_denoiser(shares, SCHEDULE), exact_denoiser(data.constraint_mixtures["right"], SCHEDULE)
    x_0 = torch.from_numpy(shares.sample(300, np.random.default_rng(0))[0])
    assert point_kl(model, right, x_0, SCHEDULE, levels=32).value > 10


def test_a_pretrained_model_without_the_sets_conditions_is_refused(data, unlearning, conditional_denoiser):
    method = unlearning(unit="nats", schedule=SCHEDULE, base=conditional_denoiser([data.mixture], SCHEDULE))
    with pytest.raises(ValueError, match=r"model\.pretrained: the model knows 1 conditions.*needs 3"):
        method.law("right")


def test_only_divergences_need_a_pretrained_model_with_conditions():
    names = ("right", "top")
    assert UnlearnForwardKL.pretraining_sets(names, "nats") == ("main", *names)
    assert UnlearnForwardKL.pretraining_sets(names, "share") == ("main",)


# -- ground truth and refusals -----------------------------------------------------------------------------------------


def test_the_exact_shares_are_those_of_the_closed_form(unlearning):
    exact = unlearning().exact(asked("share", 0.05, 0.1), {"rule": "ascent"})
    assert exact.multipliers == pytest.approx([0.3 - 0.05 * 0.4 / 0.85, 0.3 - 0.1 * 0.4 / 0.85])
    assert np.exp(-exact.metrics) == pytest.approx([0.05, 0.1])
    before, after = np.array([0.4, 0.3, 0.3]), np.array([0.85, 0.05, 0.1])
    assert exact.objective == pytest.approx(before @ np.log(before / after))
    assert exact.dual_value == pytest.approx(exact.objective)
    left = np.array([[-1.5, -0.8], [1.5, -0.8]])  # equal widths: densities there are as the shares
    assert np.diff(exact.log_density(left)) == pytest.approx(np.log(0.05 / 0.85), abs=1e-6)


def test_the_exact_divergences_agree_with_the_shares_where_components_hardly_overlap(unlearning):
    shares = unlearning().exact(asked("share", 0.05, 0.1), {"rule": "ascent"})
    nats = unlearning(unit="nats").exact(asked("nats", -np.log(0.05), -np.log(0.1)), {"rule": "ascent"})
    assert nats.multipliers == pytest.approx(shares.multipliers, abs=1e-3)
    assert nats.metrics == pytest.approx(-np.log([0.05, 0.1]), abs=1e-5)


def test_there_is_no_exact_answer_where_none_is_known_or_possible(unlearning):
    ascent = {"rule": "ascent"}
    assert unlearning(unit="loss").exact(asked("loss", 0.5, 0.5), ascent) is None
    assert unlearning(gradient_norm=0.1).exact(asked("share", 0.05, 0.1), ascent) is None
    assert unlearning().exact(asked("share", 0.05, 0.1), {"rule": "resilient", "relaxation_cost": 1.0}) is None
    everything = laboratory({name: SetSpec(classes=(index,)) for index, name in enumerate("abc")})
    constraints = [Constraint(name=name, unit="share", threshold=0.1, sense="<=") for name in "abc"]
    assert unlearning(data=everything, names=tuple("abc")).exact(constraints, ascent) is None


def refused(*overrides, example=EXAMPLE):
    """What preflight says to this configuration; None: nothing."""
    config = load_config(example, [*overrides], environment=False)
    try:
        _check_formulation(config, METHODS[config.method], validate_spec(config.data))
    except ValueError as error:
        return str(error)
    return None


FIXED = ("dual={rule: fixed, start: 0.3, primal_steps_per_dual_step: 20}",)
BOTH = "data.sets={right: {classes: [1]}, both: {classes: [1, 2]}}"
RIGHT_AND_LAW = "data.sets={right: {classes: [1]}, law: {means: [[0.0, 1.7]], stds: [0.4]}}"
NATS = "thresholds={unit: nats, grid: {sets: [1.0]}}"


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["formulation.gradient_norm=0.1", "primal.precision=fp16"], "primal.precision='fp16'.*use bf16 or fp32"),
        (["baselines.fixed_weights=[0.1, 0.3]"], r"baselines.fixed_weights=0.3: at or above 0.3, the mass of set right"),
        (FIXED, r"dual.start=0.3: at or above 0.3, the mass of set right in main.*lower it"),
        ([BOTH, NATS], "data.sets: right and both overlap.*disjoint classes"),
        ([RIGHT_AND_LAW, NATS], "data.sets: right and law overlap, or nobody knows"),
    ],
)
def test_what_it_cannot_do_is_refused_by_field(overrides, message):
    found = refused(*overrides)
    assert found and re.search(message, found)


@pytest.mark.parametrize(
    "overrides",
    [
        ["baselines.fixed_weights=[0.29]"],  # the sum of the two is below 1, and so is each below its own mass
        ["baselines.fixed_weights=[0.5]", "formulation.loss_ceiling=2"],
        [FIXED[0].replace("0.3", "0.29")],
        [*FIXED, "formulation.gradient_norm=0.1"],
        [BOTH, NATS, "formulation.loss_ceiling=2"],
        ["dual.start=5"],  # a multiplier that moves starts inside its domain
        ["data.weights=[0.1, 0.45, 0.45]", "baselines.fixed_weights=[0.44]"],
    ],
)
def test_what_is_bounded_is_allowed(overrides):
    assert refused(*overrides) is None


def test_single_images_have_the_mass_of_one():
    """Of 1437 digits in main, one and a half weigh more than one set of one."""
    images = {"dataset": "digits", "sets": {"one": {"samples": [3]}, "two": {"samples": [4]}}}
    given = [f"data={images}", "thresholds={unit: loss, grid: {sets: [0.5]}}", "measure={}"]
    found = refused(*given, "model={kind: unet}", "baselines.fixed_weights=[0.001]")
    assert found and re.search(r"baselines.fixed_weights=0.001: at or above 0.0006\d+, the mass of set one", found)
    assert refused(*given, "model={kind: unet}", "baselines.fixed_weights=[0.0006]") is None
    twice = [given[0].replace("[4]", "[3, 4]"), *given[1:]]
    assert "one and two overlap" in refused(*twice, "model={kind: unet}")


def test_multipliers_that_would_turn_the_loss_round_are_refused(unlearning, tiny_denoiser, tiny_batch):
    denoiser, batch, beyond = tiny_denoiser(), tiny_batch(COUNTS), torch.tensor([0.7, 0.4], dtype=torch.float64)
    for normalize in (True, False):
        with pytest.raises(ValueError, match=r"multipliers=\[0.7, 0.4\]: their sum reaches 1"):
            unlearning(normalize=normalize).primal_loss(denoiser, batch, beyond)
    assert torch.isfinite(unlearning(loss_ceiling=2.0).primal_loss(denoiser, batch, beyond).loss)


def test_divergences_from_single_images_are_refused():
    values = load_config(EXAMPLE, environment=False).to_dict()
    values["data"]["sets"]["top"] = {"classes": None, "samples": [4], "means": None, "stds": None, "weights": None}
    UnlearnForwardKL.check(values, ("right", "top"))
    values["thresholds"]["unit"] = "nats"
    with pytest.raises(ValueError, match=r"data\.sets\.top lists single samples.*use the unit loss"):
        UnlearnForwardKL.check(values, ("right", "top"))


@pytest.mark.slow
def test_the_example_settles_at_the_exact_multipliers(tmp_path):
    config = load_config(EXAMPLE, [f"storage={tmp_path}"], environment=False)
    workspace, dual = Workspace(config.to_dict(), config.data), LocalDual()
    for name, kind, thresholds in [("base", "base", {}), ("point", "constrained", {"right": 0.05, "top": 0.1})]:
        folders = {"trial_dir": str(tmp_path / name), "base_dir": str(tmp_path / "base")}
        result = run_trial(
            workspace,
            Assignment(
                trial_id=name, label=name, kind=kind, attempt=1, thresholds=thresholds, fixed_weight=None, **folders
            ),
            dual,
        )
    exact, found = result["exact_multipliers"], result["averaged_multipliers"]
    assert found == pytest.approx(exact, abs=0.02)
    assert result["certificate"]["saturated"] == []
    for row in result["constraints"]:
        assert row["user_value"] < row["user_threshold"] + 0.01
