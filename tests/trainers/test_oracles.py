"""Exact solutions against closed forms (methods.md H1 to H6), duality, and Lagrangians that wrong models fail to minimise."""

import math
import pickle

import numpy as np
import pytest

from dualsweep.constraints import SumBelow
from dualsweep.constraints.closed_forms import (
    alignment_gaussian_multiplier,
    class_restriction_multipliers,
    class_restriction_objective,
    disjoint_multipliers,
    forward_kl_unlearning_multipliers,
    likelihood_ratio_multiplier,
    reverse_kl_gaussian_multiplier,
)
from dualsweep.constraints.composition_weights import capacity_weights, enclosing_ball_weights
from dualsweep.datasets.gaussians import GaussianMixture
from dualsweep.trainers.formulations import ForwardKL, LogLikelihood, ReverseKL, Tilted
from dualsweep.trainers.oracles import (
    composition_and,
    composition_or,
    forward_kl,
    log_likelihood_constrained,
    oracle_at,
    reverse_kl,
    solve,
    standardised,
    tilted,
)
from dualsweep.trainers.quadrature import LEAST_COUNTS, Grid

EXACT = 1e-6  # the tolerance asked for; what is left is the KKT residual, mostly below 1e-10
both_dimensions = pytest.mark.parametrize("dim", [1, 2])


def gaussian(*mean, std):
    return GaussianMixture([mean], [std], [1.0])


def along(position, dim):
    """A point of the first axis."""
    return (position, *[0.0] * (dim - 1))


def line(points):
    return points[:, 0]


def wave(points):
    return np.tanh(points[:, -1])


def mixture(dim):
    """The three modes of verify_derivations.py, in the plane spread over both axes."""
    means = [[-2.5], [0.5], [3.0]] if dim == 1 else [[-2.5, 0.5], [0.5, -1.0], [3.0, 1.0]]
    return GaussianMixture(means, [0.8, 0.7, 0.6], [0.5, 0.3, 0.2])


def concepts(dim):
    """Two sets near modes of the mixture with tails wide enough for reverse-KL unlearning."""
    return [
        GaussianMixture([along(3.0, dim), along(0.0, dim)], [0.9, 3.0], [0.9, 0.1]),
        GaussianMixture([along(0.5, dim), along(0.0, dim)], [1.0, 3.0], [0.9, 0.1]),
    ]


def separated(dim):
    """Modes 12 standard deviations apart: each is a class of its own, to e^-18 and better."""
    return GaussianMixture([along(m, dim) for m in (-12, 0, 12, 24)], [1.0] * 4, [0.4, 0.3, 0.2, 0.1])


# --- quadrature


@both_dimensions
def test_the_grid_knows_the_divergence_of_two_gaussians(dim):
    p, q = gaussian(*along(0.4, dim), std=0.5), gaussian(*along(-1.0, dim), std=1.2)
    grid = Grid.covering([p, q])
    assert all(count >= LEAST_COUNTS[dim] for count in grid.counts)
    log_p = p.log_density(grid.points)
    found = np.exp(log_p) @ (log_p - q.log_density(grid.points)) * grid.cell
    exact = dim * (math.log(1.2 / 0.5) + 0.5**2 / (2 * 1.2**2) - 0.5) + 1.4**2 / (2 * 1.2**2)
    assert found == pytest.approx(exact, abs=1e-9)


def test_a_narrow_law_gets_a_finer_grid_and_one_too_narrow_is_refused():
    fine = Grid.covering([gaussian(-5.0, 0.0, std=1.0), gaussian(5.0, 0.0, std=0.05)])
    assert (fine.high - fine.low)[0] / (fine.counts[0] - 1) <= 0.05 / 2
    with pytest.raises(ValueError, match=r"stds go down to 0\.001"):
        Grid.covering([gaussian(-5.0, 0.0, std=1.0), gaussian(5.0, 0.0, std=0.001)])


@pytest.mark.parametrize("laws", [[gaussian(0.0, std=1.0), gaussian(0.0, 0.0, std=1.0)], [gaussian(0, 0, 0, std=1.0)]])
def test_only_laws_of_one_dimension_up_to_two_have_a_grid(laws):
    with pytest.raises(ValueError, match="give laws of one dimension, 1 or 2"):
        Grid.covering(laws)


def test_a_box_widens_where_the_density_reaches_or_rises_towards_a_side_and_gives_up_in_the_end():
    grid = Grid.covering([gaussian(0.0, 0.0, std=1.0)])
    x, y = grid.points.T
    assert grid.widened(-(x**2 + y**2) / 2) is None
    reaching = grid.widened(-((x - 5) ** 2 + y**2) / 2)
    assert (reaching.low == grid.low).all()
    assert reaching.high.tolist() == [21.0, 7.0]
    growing = np.where(x**2 + y**2 < 9, 0.0, -50 + y - x**2 / 10)  # far below the peak, but not to be trusted
    assert grid.widened(growing).high.tolist() == [7.0, 21.0]
    with pytest.raises(ValueError, match="does not vanish"):
        for _ in range(20):
            grid = grid.widened(grid.points[:, 0])


# --- closed forms


@both_dimensions
@pytest.mark.parametrize("factor", [0.7, 1.9, 30.0])  # inactive, the example of methods.md, far outside the data
def test_reverse_unlearning_of_gaussians(dim, factor):
    start, forget, std = -0.5, 1.0, 0.8
    threshold = factor * 1.5**2 / (2 * std**2)
    model = reverse_kl(gaussian(*along(start, dim), std=std), [gaussian(*along(forget, dim), std=std)], [threshold])
    exact = reverse_kl_gaussian_multiplier(1.5, std, threshold)
    assert model.multipliers == pytest.approx([exact], abs=EXACT)
    assert model.metrics == pytest.approx([max(threshold, 1.5**2 / (2 * std**2))], rel=EXACT)
    assert model.objective == pytest.approx((exact / (1 - exact)) ** 2 * 1.5**2 / (2 * std**2), rel=EXACT, abs=1e-9)
    expected = gaussian(*along((start - exact * forget) / (1 - exact), dim), std=std)
    points = np.random.default_rng(0).normal(scale=10, size=(50, dim))  # also outside the first box
    assert model.log_density(points) == pytest.approx(expected.log_density(points), rel=1e-5)
    assert model.level is None


@both_dimensions
@pytest.mark.parametrize("threshold", [-1.0, 1.4, 12.0])
def test_alignment_of_a_gaussian_with_a_linear_reward(dim, threshold):
    model = tilted(gaussian(*along(0.3, dim), std=0.9), [line], [threshold], at_least=True)
    assert model.multipliers == pytest.approx([alignment_gaussian_multiplier(threshold, 0.3, 0.9)], abs=EXACT)
    reached = max(threshold, 0.3)
    assert model.metrics == pytest.approx([reached], abs=EXACT)
    assert model.objective == pytest.approx((reached - 0.3) ** 2 / (2 * 0.81), rel=EXACT, abs=1e-9)


def test_standardised_rewards_are_in_standard_deviations_of_the_pretrained_model():
    q = mixture(2)
    rewards, means, stds = standardised(q, [line, wave])
    mean = q.weights @ q.means[:, 0]
    variance = q.weights @ (q.stds[:, 0] ** 2 + q.means[:, 0] ** 2) - mean**2
    assert (means[0], stds[0]) == pytest.approx((mean, math.sqrt(variance)), abs=1e-8)
    scaled = tilted(q, rewards, [0.5, 0.2], at_least=True)
    raw = tilted(q, [line, wave], means + stds * [0.5, 0.2], at_least=True)
    assert scaled.metrics == pytest.approx([0.5, 0.2], abs=EXACT)
    assert scaled.objective == pytest.approx(raw.objective, abs=EXACT)
    assert scaled.multipliers == pytest.approx(raw.multipliers * stds, rel=1e-5)


@both_dimensions
@pytest.mark.parametrize("shares", [[0.25, 0.25], [0.25, 0.08], [0.05, 0.02]])  # both, one and none active
def test_fairness_of_separated_modes(dim, shares):
    q = separated(dim)
    epsilon, prior = -np.log(shares), [0.2, 0.1]
    model = forward_kl(q, [q.component(2), q.component(3)], epsilon, at_least=False)
    exact = class_restriction_multipliers(epsilon, prior)
    assert model.multipliers == pytest.approx(exact, abs=EXACT)
    assert model.objective == pytest.approx(class_restriction_objective(exact, prior), abs=EXACT)
    weights = [0.4, 0.3, 0.2 + exact[0], 0.1 + exact[1]]
    points = np.random.default_rng(0).normal(scale=15, size=(50, dim))
    assert model.log_density(points) == pytest.approx(q.with_weights(weights).log_density(points), abs=1e-5)


@both_dimensions
def test_adaptation_to_new_data_disjoint_from_the_old(dim):
    new, old = gaussian(*along(0.0, dim), std=1.0), [gaussian(*along(m, dim), std=1.0) for m in (-15, 15)]
    model = forward_kl(new, old, [1.5, 2.0], at_least=False)
    assert model.multipliers == pytest.approx(disjoint_multipliers([1.5, 2.0]), abs=EXACT)


@both_dimensions
@pytest.mark.parametrize("caps", [[0.2, 0.1], None])
@pytest.mark.parametrize("thresholds", [[4.0, 5.0], [4.0, 1.0]])  # both active; one
def test_forward_unlearning_of_separated_modes(dim, caps, thresholds):
    q = separated(dim)
    model = forward_kl(q, [q.component(2), q.component(3)], thresholds, at_least=True, caps=caps)
    exact = forward_kl_unlearning_multipliers(thresholds, [0.2, 0.1])
    assert model.multipliers == pytest.approx(exact, abs=EXACT)
    shares = (np.array([0.2, 0.1]) - exact) / (1 - exact.sum())
    assert model.metrics == pytest.approx(-np.log(shares), abs=1e-5)


@both_dimensions
@pytest.mark.parametrize("threshold", [0.001, 0.3, 1.5])
def test_likelihood_unlearning_of_a_separated_mode(dim, threshold):
    q = separated(dim)
    model = tilted(q, [q.component(2)], [threshold], at_least=False)
    exact = likelihood_ratio_multiplier(threshold, 0.2)
    assert model.multipliers == pytest.approx([exact], abs=EXACT)
    share = min(threshold, 1.0) * 0.2
    kl = share * math.log(share / 0.2) + (1 - share) * math.log((1 - share) / 0.8)
    assert model.objective == pytest.approx(kl, abs=EXACT)


@pytest.mark.parametrize(
    "means", [[[-1.0], [0.3], [2.0]], [[2.0, 0.0], [-1.0, 1.7], [-1.2, -1.5], [0.0, 0.1]], [[0.0, 0.0], [3.0, 1.0]]]
)
def test_composition_and_of_gaussians_is_the_smallest_ball(means):
    std, weights = 0.7, enclosing_ball_weights(means)
    model = composition_and([gaussian(*mean, std=std) for mean in means])
    radius = np.linalg.norm(np.array(means) - weights @ means, axis=1).max()
    assert model.multipliers == pytest.approx(weights, abs=EXACT)
    assert model.level == pytest.approx(radius**2 / (2 * std**2), abs=EXACT)
    assert model.level == model.objective
    points = np.random.default_rng(0).normal(size=(20, len(means[0])))
    assert model.log_density(points) == pytest.approx(gaussian(*weights @ means, std=std).log_density(points), abs=1e-5)


@both_dimensions
def test_composition_or_achieves_the_capacity(dim):
    laws = [mixture(dim), *concepts(dim), mixture(dim).component(1)]
    grid = Grid.covering(laws)
    densities = np.exp([law.log_density(grid.points) for law in laws])
    weights = capacity_weights(densities[:, densities.max(axis=0) > 1e-12], grid.cell)
    model = composition_or(laws)
    assert model.multipliers == pytest.approx(weights, abs=1e-4)  # capacity to 1e-10, weights to its root
    assert model.metrics[model.multipliers > 0] == pytest.approx(model.level, abs=EXACT)
    assert model.metrics.max() == model.level


@pytest.mark.parametrize("compose", [composition_and, composition_or])
def test_offsets_say_by_how_much_a_set_may_be_missed(compose):
    laws = [gaussian(-1.0, std=0.7), gaussian(2.0, std=0.7)]
    plain, offset = compose(laws), compose(laws, [0.4, 0.0])
    assert plain.multipliers == pytest.approx([0.5, 0.5], abs=EXACT)
    assert offset.multipliers[0] < 0.5
    assert offset.metrics - [0.4, 0.0] == pytest.approx([offset.level] * 2, abs=EXACT)
    assert plain.level - 0.4 < offset.level < plain.level


def test_composition_and_with_a_reference():
    """Means -1, 0 (reference) and 2 of one variance: the geometric mean is a Gaussian at the weighted mean."""
    q, sets = gaussian(0.0, std=0.5), [gaussian(-1.0, std=0.5), gaussian(2.0, std=0.5)]
    model = reverse_kl(q, sets, [9.0, 2.0], at_least=False)
    exact = 2 / 1.0 - 1  # radius std sqrt(2 * 2) = 1 around 2, so the mean is 2 lambda / (1 + lambda) = 1
    assert model.multipliers == pytest.approx([0.0, exact], abs=EXACT)
    assert model.objective == pytest.approx(1 / (2 * 0.25), abs=EXACT)


@both_dimensions
def test_the_target_of_esd_for_gaussians(dim):
    """q (q/q^1)^lambda moves away from q^1 by lambda times the distance, without tempering and with no limit at 1."""
    q, concept = gaussian(*along(0.0, dim), std=0.6), gaussian(*along(1.0, dim), std=0.6)
    model = log_likelihood_constrained(q, [concept], [2.5])
    points = np.random.default_rng(0).normal(size=(20, dim))
    assert model.log_density(points) == pytest.approx(
        gaussian(*along(-2.5, dim), std=0.6).log_density(points), abs=1e-5
    )
    assert model.metrics == pytest.approx([(2.5**2 - 3.5**2) / (2 * 0.36)], abs=EXACT)
    again = solve(LogLikelihood(q, [concept]), model.metrics)
    assert again.multipliers == pytest.approx([2.5], abs=EXACT)


# --- every formulation: multipliers inside the domain, and thresholds of which some are active

FORMULATIONS = {
    "fairness": (lambda dim: ForwardKL(mixture(dim), concepts(dim)), [0.35, 0.6]),
    "forward_unlearning": (
        lambda dim: ForwardKL(mixture(dim), [mixture(dim).component(1), mixture(dim).component(2)], at_least=True),
        [0.2, 0.15],
    ),
    "reverse_unlearning": (lambda dim: ReverseKL(mixture(dim), concepts(dim)), [0.25, 0.15]),
    "reference": (lambda dim: ReverseKL(mixture(dim), concepts(dim), at_least=False), [0.6, 0.9]),
    "likelihood": (lambda dim: Tilted(mixture(dim), [mixture(dim).component(k) for k in (1, 2)]), [0.4, 0.3]),
    "alignment": (lambda dim: Tilted(mixture(dim), [line, wave], at_least=True), [0.2, 1.1]),
    "log_likelihood": (lambda dim: LogLikelihood(mixture(dim), concepts(dim)), [0.4, 0.3]),
    "and": (lambda dim: ReverseKL(None, [mixture(dim), *concepts(dim)], at_least=False), [0.3, 0.3, 0.4]),
    "or": (lambda dim: ForwardKL(None, [mixture(dim), *concepts(dim)]), [0.3, 0.3, 0.4]),
}
every_formulation = pytest.mark.parametrize("name", FORMULATIONS)


def make(name, dim):
    build, multipliers = FORMULATIONS[name]
    return build(dim), np.array(multipliers)


@both_dimensions
@every_formulation
def test_thresholds_read_off_a_model_lead_back_to_it(name, dim):
    formulation, multipliers = make(name, dim)
    there = oracle_at(formulation, multipliers)
    offset = 0.2 if there.level is not None else 0.0  # compositions: any common part of the offsets is the level's
    back = solve(formulation, there.metrics - offset)
    assert back.multipliers == pytest.approx(multipliers, abs=1e-9)  # without the polishing of `solve`, 1e-7
    assert back.metrics == pytest.approx(there.metrics, abs=EXACT)
    assert back.dual_value == pytest.approx(back.objective, abs=EXACT)
    if there.level is None:
        assert back.objective == pytest.approx(there.objective, abs=EXACT)
    else:
        assert back.level == pytest.approx(offset, abs=EXACT)


@both_dimensions
@every_formulation
def test_strong_duality_and_complementarity_with_one_constraint_loose(name, dim):
    formulation, multipliers = make(name, dim)
    thresholds = formulation.metrics(multipliers)
    thresholds[0] += formulation.sign * 0.5 * abs(thresholds[0]) + formulation.sign * 0.5
    model = solve(formulation, thresholds)
    violation = formulation.sign * (model.metrics - thresholds) - (model.level or 0.0)
    assert violation.max() <= EXACT
    assert np.abs(model.multipliers * violation).max() <= EXACT
    assert model.multipliers[1] > 0
    assert model.dual_value == pytest.approx(model.objective, abs=EXACT)


@both_dimensions
@every_formulation
def test_the_slope_of_the_dual_function_is_the_violation_and_it_is_concave(name, dim):
    formulation, multipliers = make(name, dim)
    slopes = formulation.sign * formulation.metrics(multipliers)
    directions = np.eye(len(slopes)) - (1 / len(slopes) if formulation.q is None else 0.0)  # along the simplex
    step, stride = 1e-5, 0.03
    for direction in directions:
        ahead, behind = (formulation.dual(multipliers + sign * step * direction) for sign in (1, -1))
        assert (ahead - behind) / (2 * step) == pytest.approx(slopes @ direction, abs=1e-6)
        ahead, behind = (formulation.dual(multipliers + sign * stride * direction) for sign in (1, -1))
        assert (ahead + behind) / 2 < formulation.dual(multipliers)


@both_dimensions
@every_formulation
def test_the_oracle_is_a_density_that_is_exact_between_the_points_of_the_grid(name, dim):
    formulation, multipliers = make(name, dim)
    model = oracle_at(formulation, multipliers)
    axes = [np.linspace(-19.03, 21.01, {1: 9001, 2: 401}[dim])] * dim  # other points than the grid's
    points = np.stack(np.meshgrid(*axes), axis=-1).reshape(-1, dim)
    mass = np.exp(model.log_density(points)).sum() * (axes[0][1] - axes[0][0]) ** dim
    assert mass == pytest.approx(1.0, abs=1e-7)
    some = formulation.grid.points[:: len(formulation.grid.points) // 50]
    on_grid = formulation.log_model(multipliers)[:: len(formulation.grid.points) // 50]
    assert model.log_density(some) == pytest.approx(on_grid, abs=1e-6)


@pytest.mark.parametrize("name", [name for name in FORMULATIONS if name not in ("and", "or")])
def test_tighter_thresholds_cost_more_and_the_slope_is_the_multiplier(name):
    formulation, multipliers = make(name, 1)
    easy = oracle_at(formulation, np.zeros(2)).metrics
    hard = oracle_at(formulation, multipliers).metrics
    path = [solve(formulation, easy + share * (hard - easy)) for share in (0.0, 0.3, 0.6, 0.9, 0.901)]
    costs = [model.objective for model in path]
    assert costs[0] == pytest.approx(0.0, abs=EXACT)
    assert path[0].multipliers == pytest.approx([0.0, 0.0], abs=1e-4)  # metrics on the edge: flat to KKT tolerance
    assert (np.diff(costs) > 0).all()
    slope = (costs[4] - costs[3]) / 0.001
    assert slope == pytest.approx(-formulation.sign * path[3].multipliers @ (hard - easy), rel=0.02)  # of step 0.001


@pytest.mark.parametrize("name", ["fairness", "forward_unlearning", "reverse_unlearning", "likelihood", "alignment"])
def test_thresholds_met_by_the_pretrained_model_leave_it_alone(name):
    formulation, _ = make(name, 1)
    slack = formulation.metrics([0.0, 0.0]) + formulation.sign * 0.1
    model = solve(formulation, slack)
    assert model.multipliers.tolist() == [0.0, 0.0]
    assert model.objective == pytest.approx(0.0, abs=1e-9)
    points = np.linspace(-5, 5, 11)[:, None]
    assert model.log_density(points) == pytest.approx(mixture(1).log_density(points), abs=1e-9)


# --- Lagrangians, with sums of our own on a grid of our own

X = np.linspace(-16, 16, 8001)[:, None]
CELL = 32 / 8000


def density(log_weight):
    weight = np.exp(log_weight - log_weight.max())
    return weight / (weight.sum() * CELL)


def divergence(p, q):
    return float(np.sum(np.where(p > 0, p * (np.log(np.maximum(p, 1e-300)) - np.log(q)), 0.0)) * CELL)


def lagrangian_of(name, multipliers):
    """p -> Lagrangian at thresholds 0, written out from the problems of methods.md."""
    q, sets, modes = (
        np.exp(mixture(1).log_density(X)),
        [np.exp(law.log_density(X)) for law in concepts(1)],
        [np.exp(mixture(1).component(k).log_density(X)) for k in (1, 2)],
    )
    one, two = multipliers
    return {
        "fairness": lambda p: divergence(q, p) + one * divergence(sets[0], p) + two * divergence(sets[1], p),
        "forward_unlearning": lambda p: divergence(q, p) - one * divergence(modes[0], p) - two * divergence(modes[1], p),
        "reverse_unlearning": lambda p: divergence(p, q) - one * divergence(p, sets[0]) - two * divergence(p, sets[1]),
        "reference": lambda p: divergence(p, q) + one * divergence(p, sets[0]) + two * divergence(p, sets[1]),
        "likelihood": lambda p: divergence(p, q) + np.sum(p * (one * modes[0] + two * modes[1]) / q) * CELL,
        "alignment": lambda p: divergence(p, q) - np.sum(p * (one * line(X) + two * wave(X))) * CELL,
        "log_likelihood": lambda p: divergence(p, q) + np.sum(p * (one * np.log(sets[0] / q) + two * np.log(sets[1] / q))) * CELL,
    }[name]  # fmt: skip


@pytest.mark.parametrize("name", [name for name in FORMULATIONS if name not in ("and", "or")])
def test_the_model_minimises_the_lagrangian_and_the_dual_function_is_its_value(name):
    formulation, multipliers = make(name, 1)
    lagrangian = lagrangian_of(name, multipliers)
    log_p = oracle_at(formulation, multipliers).log_density(X)
    least = lagrangian(density(log_p))
    assert formulation.dual(multipliers) == pytest.approx(least, abs=1e-7)
    objective = least - formulation.sign * multipliers @ formulation.metrics(multipliers)
    assert formulation.objective(multipliers) == pytest.approx(objective, abs=1e-7)
    rng = np.random.default_rng(0)
    for _ in range(40):
        bump = np.exp(-0.5 * ((line(X) - rng.uniform(-6, 6)) / rng.uniform(0.4, 2.0)) ** 2)
        assert lagrangian(density(log_p + 0.05 * rng.uniform(-1, 1) * bump)) >= least - 1e-9


def wrong_models():
    """Plausible wrong formulas: no tempering, wrong tempering, a plus sign, a geometric mixture, and q itself."""
    log_q = mixture(1).log_density(X)
    log_sets = np.stack([law.log_density(X) for law in concepts(1)])
    modes = np.stack([np.exp(mixture(1).component(k).log_density(X)) for k in (1, 2)])
    tilt = {name: np.array(multipliers) for name, (_, multipliers) in FORMULATIONS.items()}
    reverse, fair = tilt["reverse_unlearning"] @ log_sets, tilt["fairness"]
    likelihood = tilt["likelihood"] @ (modes / np.exp(log_q))
    return [
        ("reverse_unlearning", log_q - reverse),
        ("reverse_unlearning", (log_q - reverse) / (1 + tilt["reverse_unlearning"].sum())),
        ("likelihood", log_q + likelihood),
        ("fairness", (log_q + fair @ log_sets) / (1 + fair.sum())),
        ("forward_unlearning", log_q),
        ("alignment", log_q - tilt["alignment"] @ np.stack([line(X), wave(X)])),
        ("reference", np.logaddexp(log_q, np.log(tilt["reference"] @ np.exp(log_sets)))),
        ("log_likelihood", (log_q * (1 + tilt["log_likelihood"].sum()) - tilt["log_likelihood"] @ log_sets) * 1.3),
    ]


@pytest.mark.parametrize("case", range(8))
def test_a_wrong_model_does_not_minimise_the_lagrangian(case):
    name, log_weight = wrong_models()[case]
    formulation, multipliers = make(name, 1)
    lagrangian = lagrangian_of(name, multipliers)
    assert lagrangian(density(log_weight)) > formulation.dual(multipliers) + 1e-3


# --- the limits of the dual domain


@pytest.mark.parametrize("dim, slim, wide", [(1, [0.6], [1.0]), (2, [1.0, 0.6], [1.0, 1.0])])
def test_reverse_unlearning_needs_sets_wide_enough_in_every_direction(dim, slim, wide):
    """var_q = 1 against 0.36: integrable up to lambda = 0.36 only, although the sum may go up to 1."""
    q, narrow = (GaussianMixture([along(m, dim)], [stds], [1.0]) for m, stds in ((0.0, wide), (1.0, slim)))
    formulation = ReverseKL(q, [narrow])
    assert np.isfinite(formulation.metrics([0.359])).all()
    with pytest.raises(ValueError, match=r"multipliers=\[0\.361\].*not integrable.*1/var_q > sum lambda_i / var_i"):
        formulation.metrics([0.361])
    model = solve(formulation, [40.0])  # any threshold is met before the limit, where the model widens without bound
    assert 0.1 < model.multipliers[0] < 0.36
    assert model.metrics == pytest.approx([40.0], rel=EXACT)


def test_the_narrowest_direction_may_lie_between_the_axes():
    """Across the diagonal the q of two crossed bars falls faster than along either; the set's bars lie within it."""
    q = GaussianMixture([[0.0, 0.0]] * 2, [[2.0, 0.5], [0.5, 2.0]], [0.5, 0.5])
    round_set = gaussian(0.0, 0.0, std=1.0)
    formulation = ReverseKL(round_set, [q])  # decay of q: 1/4 on the axes, (1/4 + 4) / 2 on the diagonals
    limit = 1 / 2.125
    assert np.isfinite(formulation.metrics([limit * 0.99])).all()
    with pytest.raises(ValueError, match="not integrable"):
        formulation.metrics([limit * 1.01])


def test_esd_needs_tails_too_and_its_sum_may_exceed_one():
    q, narrow = gaussian(0.0, std=1.0), gaussian(1.0, std=0.7)
    limit = 1 / (1 / 0.49 - 1)  # (1 + lambda) = lambda / 0.49
    assert np.isfinite(log_likelihood_constrained(q, [narrow], [0.9 * limit]).metrics).all()
    with pytest.raises(ValueError, match="not integrable"):
        log_likelihood_constrained(q, [narrow], [1.01 * limit])


def test_forward_unlearning_inside_a_gaussian_stops_at_the_infimum_of_the_ratio():
    """N(0,1) against N(0,1/4): lambda < 1/2, where the divergence stays finite (methods.md H3)."""
    q, core = gaussian(0.0, std=1.0), gaussian(0.0, std=0.5)
    formulation = ForwardKL(q, [core], at_least=True)
    assert formulation.domain.caps == pytest.approx([0.5], abs=1e-6)
    model = solve(formulation, [1.9])
    assert model.metrics == pytest.approx([1.9], abs=EXACT)
    near_the_limit = [formulation.metrics([multiplier])[0] for multiplier in (0.49, 0.499, 0.4999)]
    assert near_the_limit == pytest.approx([1.5433, 1.8717, 1.9897], abs=5e-5)  # printed by verify_derivations.py
    with pytest.raises(ValueError, match=r"thresholds=\[2\.1\]: out of reach"):
        solve(formulation, [2.1])
    with pytest.raises(ValueError, match="not positive everywhere"):
        formulation.metrics([0.51])


@pytest.mark.parametrize("reaching", [gaussian(0.0, std=1.2), gaussian(1.0, std=1.0)])
def test_forward_unlearning_of_a_set_that_reaches_beyond_the_data_is_refused(reaching):
    with pytest.raises(ValueError, match=r"sets \[1\] reach beyond q"):
        ForwardKL(gaussian(0.0, std=1.0), [gaussian(0.0, std=0.5), reaching], at_least=True)


def test_forward_unlearning_of_overlapping_sets_keeps_the_difference_positive():
    q = separated(1)
    both = GaussianMixture(q.means[2:], q.stds[2:], q.weights[2:])
    model = forward_kl(q, [q.component(2), both], [2.5, 2.0], at_least=True)
    removed = model.multipliers @ [[1, 0], [2 / 3, 1 / 3]]
    assert (removed < [0.2, 0.1]).all()
    shares = (np.array([0.2, 0.1]) - removed) / (1 - model.multipliers.sum())
    divergences = [-math.log(shares[0]), [2 / 3, 1 / 3] @ np.log(np.array([2 / 3, 1 / 3]) / shares)]
    assert model.metrics == pytest.approx(divergences, abs=EXACT)
    assert (model.metrics >= np.array([2.5, 2.0]) - EXACT).all()


UNREACHABLE = {
    "shares above one": lambda: forward_kl(separated(1), [separated(1).component(k) for k in (2, 3)], [0.5, 0.6], at_least=False),
    "nothing kept": lambda: forward_kl(separated(1), [separated(1).component(2)], [0.0], at_least=False),
    "more than the sets hold": lambda: forward_kl(mixture(1), [mixture(1).component(1)], [30.0], at_least=True, caps=[0.3]),
    "a reward above its bound": lambda: tilted(mixture(1), [wave], [1.01], at_least=True),
    "a ratio below zero": lambda: tilted(mixture(1), [mixture(1).component(1)], [-0.1], at_least=False),
    "sets too far apart": lambda: reverse_kl(gaussian(0.0, std=1.0), [gaussian(m, std=1.0) for m in (-2.0, 2.0)], [1.0, 1.0], at_least=False),
    "a sum of multipliers near one": lambda: reverse_kl(gaussian(0.0, std=1.0), [gaussian(1.0, std=1.0)], [1e7]),
}  # fmt: skip


@pytest.mark.parametrize("case", UNREACHABLE)
def test_thresholds_out_of_reach_are_refused_by_name(case):
    with pytest.raises(ValueError, match=r"thresholds=\[.*\]: out of reach, .*at (most|least) these.*metrics that are"):
        UNREACHABLE[case]()


def test_a_domain_smaller_than_the_formulations_own_limits_what_is_met():
    formulation, multipliers = make("fairness", 1)
    thresholds = formulation.metrics(multipliers)
    with pytest.raises(ValueError, match="out of reach"):
        solve(formulation, thresholds, SumBelow(0.5))
    assert solve(formulation, thresholds, SumBelow(2.0)).multipliers == pytest.approx(multipliers, abs=1e-5)


def test_an_oracle_can_be_sent_to_another_process_and_holds_no_grid():
    model = reverse_kl(gaussian(-0.5, 0.0, std=0.8), [gaussian(1.0, 0.0, std=0.8)], [4.0])
    blob = pickle.dumps(model)
    assert len(blob) < 20_000
    points = np.zeros((3, 2))
    assert pickle.loads(blob).log_density(points) == pytest.approx(model.log_density(points), abs=0)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: forward_kl(mixture(1), [], [], at_least=False), "at least one set"),
        (lambda: forward_kl(mixture(1), concepts(1), [0.1], at_least=False), r"thresholds=\[0\.1\].*2 in all"),
        (lambda: forward_kl(mixture(1), concepts(1), [0.1, math.nan], at_least=False), "thresholds=.*finite"),
        (lambda: ForwardKL(mixture(1), concepts(1), at_least=True, caps=[0.1]), r"caps=\[0\.1\].*2 in all"),
        (lambda: ForwardKL(None, concepts(1), at_least=True), "at_least=True"),
        (lambda: ReverseKL(mixture(1), concepts(2)), "dimensions"),
        (lambda: make("reverse_unlearning", 1)[0].metrics([0.6, 0.4]), r"multipliers=\[0\.6, 0\.4\].*sum below 1"),
        (lambda: make("fairness", 1)[0].dual([-0.1, 0.4]), r"multipliers=\[-0\.1, 0\.4\].*>= 0"),
        (lambda: make("and", 1)[0].log_model([0.6, 0.4, 0.1]), "composition needs 1"),
        (lambda: oracle_at(make("fairness", 1)[0], [1.0]), "multipliers=.*2 in all"),
        (lambda: Tilted(mixture(1), [lambda points: points]), r"features\[0\] gave shape \(4001, 1\)"),
        (lambda: Tilted(gaussian(0.0, std=0.01), [gaussian(9.0, std=0.01)]), "needs a set inside q"),
        (lambda: standardised(mixture(1), [lambda points: np.ones(len(points))]), "constant"),
        (lambda: tilted(mixture(1), [lambda points: np.sign(points[:, 0])], [0.2], at_least=True), "too rough"),
    ],
)
def test_bad_input_is_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call()
