"""Exact solutions of every formulation on Gaussian mixtures of one or two dimensions: ground truth of the methods.

``forward_kl``, ``reverse_kl``, ``tilted``, ``composition_and`` and ``composition_or`` give the optimum at thresholds in
the user's units (KL in nats, ratios, standardised rewards); ``oracle_at`` the model of a formulation at any multipliers.
Source: methods.md H1 to H6.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dualsweep.constraints import Capped, DualDomain, NonNegative, Simplex, SumBelow
from dualsweep.datasets.gaussians import GaussianMixture
from dualsweep.trainers.formulations import Feature, Formulation, ForwardKL, LogLikelihood, ReverseKL, Tilted

KKT_TOLERANCE = 1e-6  # in the constraints' units, relative to max(1, threshold)
MOST_GRIDS = 16
MOST_POLISHING = 60  # evaluations
TAIL_MARGIN = 1e-6  # relative distance kept from the limit of integrability
LARGEST_MULTIPLIER = 1e6  # where a domain has no limit: a threshold that takes it there counts as out of reach


@dataclass(frozen=True, eq=False)
class Oracle:
    """The exact model at some multipliers, optimal ones or any."""

    multipliers: NDArray[np.float64]  # shape (num_constraints,)
    objective: float  # nats: KL between p and q, in the formulation's direction; for compositions the level
    metrics: NDArray[np.float64]  # shape (num_constraints,): KL in nats or E_p[f]
    log_density: Callable[[ArrayLike], NDArray[np.float64]]  # points (n, dim) -> (n,) nats, exact at any point
    level: float | None  # compositions: max_i (metric_i - offset_i), the value of the min-max; else None
    dual_value: float  # g at the multipliers, thresholds included: the objective, where the multipliers are optimal


def forward_kl(
    q: GaussianMixture,
    sets: Sequence[GaussianMixture],
    thresholds: ArrayLike,
    *,
    at_least: bool,
    caps: Sequence[float] | None = None,
) -> Oracle:
    """Fairness and adaptation (at most ``thresholds`` nats) or forward-KL unlearning (at least); see ForwardKL."""
    return solve(ForwardKL(q, sets, at_least=at_least, caps=caps), thresholds)


def reverse_kl(
    q: GaussianMixture, sets: Sequence[GaussianMixture], thresholds: ArrayLike, *, at_least: bool = True
) -> Oracle:
    """Reverse-KL unlearning: KL(p||q^i) at least ``thresholds`` nats; see ReverseKL."""
    return solve(ReverseKL(q, sets, at_least=at_least), thresholds)


def tilted(
    q: GaussianMixture, features: Sequence[Feature | GaussianMixture], thresholds: ArrayLike, *, at_least: bool
) -> Oracle:
    """Likelihood-constrained unlearning (sets, E_p[q^i/q] at most) or alignment (rewards, at least); see Tilted."""
    return solve(Tilted(q, features, at_least=at_least), thresholds)


def composition_and(sets: Sequence[GaussianMixture], offsets: ArrayLike | None = None) -> Oracle:
    """min over p of max_i (KL(p||q^i) - offset_i), in nats; no offsets: 0."""
    return solve(ReverseKL(None, sets, at_least=False), np.zeros(len(sets)) if offsets is None else offsets)


def composition_or(sets: Sequence[GaussianMixture], offsets: ArrayLike | None = None) -> Oracle:
    """min over p of max_i (KL(q^i||p) - offset_i), in nats; no offsets: 0."""
    return solve(ForwardKL(None, sets), np.zeros(len(sets)) if offsets is None else offsets)


def log_likelihood_constrained(q: GaussianMixture, sets: Sequence[GaussianMixture], multipliers: ArrayLike) -> Oracle:
    """q prod (q/q^i)^lambda_i / Z at given multipliers: what ESD with these weights aims at."""
    return oracle_at(LogLikelihood(q, sets), multipliers)


def standardised(
    q: GaussianMixture, rewards: Sequence[Feature]
) -> tuple[list[Feature], NDArray[np.float64], NDArray[np.float64]]:
    """Rewards in standard deviations of the pretrained model, for ``tilted``.

    Returns: z_i = (r_i - mean_i) / std_i, and the means and stds under q, each of shape (num_rewards,).
    Raises: ValueError if a reward is constant under q.
    """
    moments = Tilted(q, [f for reward in rewards for f in (reward, partial(_square, reward))])
    means, squares = moments.metrics(np.zeros(2 * len(rewards))).reshape(-1, 2).T
    stds = np.sqrt(np.maximum(squares - means**2, 0.0))
    if (stds <= 1e-7 * np.sqrt(squares)).any():
        raise ValueError(f"rewards have the stds {stds.tolist()} under q; drop those that are constant")
    return [partial(_scaled, *parts) for parts in zip(rewards, means, stds, strict=True)], means, stds


def solve(formulation: Formulation, thresholds: ArrayLike, domain: DualDomain | None = None) -> Oracle:
    """The optimum at these thresholds: maximises the dual function over ``domain`` and checks the KKT conditions.

    Args:
        thresholds: shape (num_constraints,), in the units of the metrics; offsets for compositions.
        domain: where the multipliers may live; None: the formulation's own.
    Raises: ValueError, naming the thresholds, if no multipliers in the domain meet them.
    """
    thresholds = formulation.vector(thresholds, "thresholds")
    domain = formulation.domain if domain is None else domain
    for _ in range(MOST_GRIDS):
        multipliers, residual = _maximise(formulation, thresholds, domain)
        try:
            fitted = formulation.fitted(multipliers)
        except ValueError as error:
            raise _out_of_reach(formulation, thresholds, multipliers, str(error)) from error
        if fitted is formulation:
            break
        formulation = fitted
    if residual > _tolerance(thresholds):
        raise _out_of_reach(formulation, thresholds, multipliers, f"a residual of {residual:.3g} is left")
    if multipliers.max() > LARGEST_MULTIPLIER * (1 - 1e-6):
        raise _out_of_reach(formulation, thresholds, multipliers, "they are met in the limit only")
    return oracle_at(formulation, multipliers, thresholds)


def oracle_at(formulation: Formulation, multipliers: ArrayLike, thresholds: ArrayLike | None = None) -> Oracle:
    """The model at given multipliers (a fixed-weight baseline's, say), on a grid that fits it.

    Args:
        thresholds: as for ``solve``; they enter ``level`` and ``dual_value`` only. None: all 0.
    Raises: ValueError outside the domain, or where the model cannot be integrated.
    """
    multipliers = formulation.checked(multipliers)
    thresholds = formulation.vector(np.zeros_like(multipliers) if thresholds is None else thresholds, "thresholds")
    while (fitted := formulation.fitted(multipliers)) is not formulation:
        formulation = fitted
    dual, metrics = formulation.evaluate(multipliers)
    level = float((metrics - thresholds).max()) if formulation.q is None else None
    _, log_z = formulation.model(multipliers)
    return Oracle(
        multipliers=multipliers,
        objective=formulation.objective(multipliers) if level is None else level,
        metrics=metrics,
        log_density=partial(formulation.without_grid().log_density, multipliers, log_z),
        level=level,
        dual_value=float(dual - formulation.sign * multipliers @ thresholds),
    )


def _tolerance(thresholds: NDArray[np.float64]) -> float:
    return KKT_TOLERANCE * max(1.0, float(np.abs(thresholds).max()))


def _fits(formulation: Formulation, multipliers: NDArray[np.float64]) -> bool:
    try:
        return formulation.fitted(multipliers) is formulation
    except ValueError:
        return False


def _maximise(
    formulation: Formulation, thresholds: NDArray[np.float64], domain: DualDomain
) -> tuple[NDArray[np.float64], float]:
    """(maximiser of the dual function on this grid, its KKT residual).

    The dual function is concave, so one start is enough; the others are for a line search gone astray.
    """
    from scipy import optimize  # here: see estimators

    sign = formulation.sign
    # Without its upper limits: a multiplier held back by one is no optimum.
    free = domain if isinstance(domain, Simplex) else NonNegative()

    def negative_dual(multipliers: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        if formulation.outside(multipliers):
            return 1e10, np.zeros_like(multipliers)  # finite, so that the line search can step back from it
        dual, metrics = formulation.evaluate(multipliers)
        return sign * multipliers @ thresholds - dual, sign * (thresholds - metrics)

    def step(multipliers: NDArray[np.float64]) -> NDArray[np.float64]:
        """How far projected ascent would move, negated: zero where the KKT conditions hold."""
        inside = free.project(multipliers)
        if formulation.outside(inside):
            return np.full_like(inside, 1e10)  # likewise
        violation = sign * (formulation.evaluate(inside)[1] - thresholds)
        return multipliers - free.project(inside + violation)

    best = domain.project(np.zeros(formulation.num_constraints)), np.inf
    for start in (0.0, 0.1, 1.0):
        initial = domain.project(np.full(formulation.num_constraints, start))
        found = optimize.minimize(
            negative_dual,
            initial,
            jac=True,
            method="SLSQP",
            options={"maxiter": 100, "ftol": 1e-13},
            **_limits(formulation, domain),
        ).x
        # SLSQP sees the value, known to round-off, hence the multipliers to its root; Newton's method on the conditions
        # themselves gives the other digits.
        polished = optimize.root(step, found, tol=1e-12, options={"maxfev": MOST_POLISHING}).x
        for candidate in (found, polished):
            if not np.isfinite(candidate).all():
                continue
            multipliers = domain.project(candidate)
            # A projection's rounding is no multiplier: what is not 0 counts as an active constraint.
            multipliers[multipliers < 4 * np.finfo(np.float64).eps * multipliers.max()] = 0.0
            residual = float(np.abs(step(multipliers)).max())
            if residual < best[1] and not formulation.outside(multipliers):
                best = multipliers, residual
        if best[1] <= _tolerance(thresholds) or not _fits(formulation, best[0]):
            break  # found, or the grid is to blame
    return best


def _limits(formulation: Formulation, domain: DualDomain) -> dict:
    """Bounds and linear constraints of SLSQP."""
    ones = np.ones(formulation.num_constraints)
    bounds, rows = LARGEST_MULTIPLIER * ones, []
    if isinstance(domain, Capped):
        bounds = domain.ceilings
    elif isinstance(domain, SumBelow):
        rows.append({"type": "ineq", "fun": lambda x: domain.ceiling - x.sum(), "jac": lambda x: -ones})
    elif isinstance(domain, Simplex):
        rows.append({"type": "eq", "fun": lambda x: x.sum() - 1, "jac": lambda x: ones})
    if formulation.tail_limits.size:
        slopes, limits = formulation.tail_slopes, formulation.tail_limits * (1 - TAIL_MARGIN)
        rows.append({"type": "ineq", "fun": lambda x: limits - slopes @ x, "jac": lambda x: -slopes})
    return {"bounds": [(0.0, bound) for bound in bounds], "constraints": rows}


def _out_of_reach(
    formulation: Formulation, thresholds: NDArray[np.float64], multipliers: NDArray[np.float64], reason: str
) -> ValueError:
    sense = "at most" if formulation.sign > 0 else "at least"
    metrics = formulation.evaluate(multipliers)[1]
    return ValueError(
        f"thresholds={thresholds.tolist()}: out of reach, {reason}; {sense} these is asked of metrics that are "
        f"{metrics.tolist()} at the multipliers {multipliers.tolist()}, where the search ended. Move the thresholds towards "
        f"the metrics"
    )


def _square(reward: Feature, points: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.square(reward(points))


def _scaled(reward: Feature, mean: float, std: float, points: NDArray[np.float64]) -> NDArray[np.float64]:
    return (reward(points) - mean) / std
