"""Exact multipliers of training, unlearning and alignment where a formula gives them, drawn beside the trace.

Class restriction (fairness, forward-KL unlearning, likelihood ratios): q has mass ``prior[i]`` on class i and q^i is q
restricted to it. Arrays have one entry a constrained class; the rest of q is lumped. For fairness the model at
multipliers lambda is (q + sum_i lambda_i q^i) / (1 + sum lambda), so class i has share
(prior_i + lambda_i) / (1 + sum lambda) and KL(q^i||p) = -log share; unlearning subtracts instead.
Gaussians of one variance: reverse-KL unlearning, and alignment with a linear reward.
Source: methods.md H1 to H5, named with each function; composition (H6) is in composition_weights.py.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dualsweep.constraints.checks import checked_number


def class_restriction_multipliers(epsilon: ArrayLike, prior: ArrayLike) -> NDArray[np.float64]:
    """The optimal multipliers; 0 where a constraint holds by itself.

    With E and P the sums of e^-epsilon and prior over the active classes, ``e^-epsilon (1 - P) / (1 - E) - prior``.
    A class is active if its prior, shrunk by what the others gain, falls below e^-epsilon: that can also happen to one
    whose prior alone would be enough.

    Args:
        epsilon: thresholds in nats, each > 0 with sum of e^-epsilon < 1; ``-log(share)`` for a requested share.
        prior: mass of each class in q, >= 0, sum <= 1.
    Raises: ValueError on values out of range or thresholds that cannot hold together.
    """
    epsilon, prior = _checked(epsilon, prior)
    shares = np.exp(-epsilon)
    _check_attainable(shares, epsilon)
    # lambda_i = max(0, share_i * total - prior_i) with total = 1 + sum lambda: class i is active where
    # total > prior_i / share_i. Admit classes in that order until the next one holds by itself.
    total = 1.0
    active_share = active_prior = 0.0
    for i in np.argsort(prior / shares, kind="stable"):
        if total * shares[i] <= prior[i]:
            break
        active_share, active_prior = active_share + shares[i], active_prior + prior[i]
        total = (1 - active_prior) / (1 - active_share)
    return np.maximum(shares * total - prior, 0.0)


def resilient_class_restriction_multipliers(
    epsilon: ArrayLike, prior: ArrayLike, relaxation_cost: float | ArrayLike
) -> NDArray[np.float64]:
    """The multipliers where the resilient rules rest: ``-log share_i - epsilon_i = 2 alpha_i lambda_i``, or 0.

    The relaxations there are ``2 * alpha * lambda``. Finite for every epsilon, also those nobody can meet.

    Args:
        epsilon: thresholds in nats, >= 0.
        relaxation_cost: alpha > 0 of the cost u^2 / (4 alpha), one or one a class.
    Returns: multipliers, solved to float64 round-off by bisection on 1 + sum lambda.
    """
    epsilon, prior = _checked(epsilon, prior)
    values = np.atleast_1d(relaxation_cost)
    cost = np.array([checked_number(v, field=f"relaxation_cost[{i}]", above=0) for i, v in enumerate(values.tolist())])
    cost = np.broadcast_to(cost, prior.shape)

    def at_total(total: float) -> NDArray[np.float64]:
        """The lambda_i >= 0 with log(total / (prior_i + lambda_i)) - epsilon_i = 2 alpha_i lambda_i, or 0."""
        # With v = log(2 alpha (prior + lambda)) this is v + e^v = level (Lambert's W): convex and rising, so Newton's
        # method from the right of the root falls to it without overshooting.
        level = np.log(total) - epsilon + 2 * cost * prior + np.log(2 * cost)
        v = np.where(level > 1, np.log(np.maximum(level, 1.0)), level)
        for _ in range(100):
            step = (v + np.exp(v) - level) / (1 + np.exp(v))
            v = v - step
            if np.abs(step).max(initial=0.0) < 1e-15:
                break
        return np.maximum(np.exp(v) / (2 * cost) - prior, 0.0)

    low = high = 1.0
    while 1 + at_total(high).sum() > high:  # grows like log(total) / alpha, so the bracket closes
        low, high = high, 2 * high
    middle = (low + high) / 2
    while low < middle < high:
        low, high = (middle, high) if 1 + at_total(middle).sum() > middle else (low, middle)
        middle = (low + high) / 2
    return at_total(middle)


def class_restriction_shares(multipliers: ArrayLike, prior: ArrayLike) -> NDArray[np.float64]:
    """Share of each constrained class in the mixture at these multipliers (any, not only optimal ones)."""
    multipliers, prior = _checked_multipliers(multipliers, prior)
    return (prior + multipliers) / (1 + multipliers.sum())


def class_restriction_objective(multipliers: ArrayLike, prior: ArrayLike) -> float:
    """KL(q||p) in nats of the mixture at these multipliers: what the requirement costs; 0 without constraints."""
    multipliers, prior = _checked_multipliers(multipliers, prior)
    shares = class_restriction_shares(multipliers, prior)
    present = prior > 0
    rest = max(1 - float(prior.sum()), 0.0)  # the untouched classes keep their proportions
    inside = float(np.sum(prior[present] * np.log(prior[present] / shares[present])))
    return inside + rest * float(np.log1p(multipliers.sum()))


def disjoint_multipliers(epsilon: ArrayLike) -> NDArray[np.float64]:
    """Optimal multipliers for constraint sets that overlap neither q nor each other: e^-eps_i / (1 - sum e^-eps_j).

    Args:
        epsilon: thresholds in nats; in loss units ``b_i - h(q^i)`` (threshold minus entropy).
    Raises: ValueError if the sum of e^-epsilon reaches 1: no model meets them all.
    """
    epsilon, _ = _checked(epsilon, np.zeros(np.shape(epsilon)))
    shares = np.exp(-epsilon)
    _check_attainable(shares, epsilon)
    return shares / (1 - shares.sum())


def forward_kl_unlearning_multipliers(threshold: ArrayLike, prior: ArrayLike) -> NDArray[np.float64]:
    """Optimal multipliers of min KL(q||p) s.t. KL(q^i||p) >= threshold_i for classes i of q; 0 where it holds by itself.

    The model (q - sum lambda_i q^i) / (1 - sum lambda) leaves an active class the share e^-threshold, with
    ``lambda_i = prior_i - e^-threshold_i (1 - P) / (1 - E) < prior_i``; P and E are the sums over the active classes.

    Args:
        threshold: nats, each >= 0; ``-log(share)`` for the largest share a class may keep.
        prior: mass of each class in q, >= 0, sum <= 1.
    Raises: ValueError on values out of range or if nothing of q would be left to take the mass.
    Source: methods.md H3 (discrete).
    """
    threshold, prior = _checked(threshold, prior, field="threshold")
    shares = np.exp(-threshold)
    # lambda_i = max(0, prior_i - share_i * total) with total = 1 - sum lambda: class i is active where
    # total < prior_i / share_i. What is taken from one class raises the others, so the largest excess comes first.
    total = 1.0
    active_share = active_prior = 0.0
    for i in np.argsort(-prior / shares, kind="stable"):
        if total * shares[i] >= prior[i]:
            break
        active_share, active_prior = active_share + shares[i], active_prior + prior[i]
        if active_prior >= 1 - 1e-12:
            raise ValueError(
                f"threshold={threshold.tolist()}, prior={prior.tolist()}: every class is to shrink and none is left to "
                f"take its mass; lower a threshold to keep shares e^-threshold that sum to 1"
            )
        total = (1 - active_prior) / (1 - active_share)
    return np.maximum(prior - shares * total, 0.0)


def likelihood_ratio_multiplier(threshold: float, prior: float) -> float:
    """Optimal multiplier of min KL(p||q) s.t. E_p[r] <= threshold, where r = 1{x in class} / prior, so E_q[r] = 1.

    The class keeps the share ``threshold * prior``.

    Args:
        threshold: > 0, a ratio to the pretrained model; 1 or more holds by itself.
        prior: mass of the class in q, in (0, 1).
    Source: methods.md H4 (discrete ratio form).
    """
    threshold = checked_number(threshold, field="threshold", above=0)
    prior = checked_number(prior, field="prior", above=0, below=1)
    if threshold >= 1:
        return 0.0
    return float(prior * (np.log1p(-threshold * prior) - np.log(threshold) - np.log1p(-prior)))


def reverse_kl_gaussian_multiplier(mean_gap: float, std: float, threshold: float) -> float:
    """Optimal multiplier of min KL(p||q) s.t. KL(p||q^1) >= threshold, for q = N(m_0, std^2) and q^1 = N(m_1, std^2).

    The model is N((m_0 - lambda m_1) / (1 - lambda), std^2): q moves away from q^1.

    Args:
        mean_gap: m_0 - m_1 in either sign, or the distance of the means in any dimension; not 0.
        threshold: nats, >= 0; up to KL(q||q^1) = mean_gap^2 / (2 std^2) it holds by itself.
    Returns: in [0, 1), ``1 - |mean_gap| / (std sqrt(2 threshold))``.
    Source: methods.md H2.
    """
    mean_gap = checked_number(mean_gap, field="mean_gap")
    distance = checked_number(abs(mean_gap), field="|mean_gap|", above=0)
    std = checked_number(std, field="std", above=0)
    radius = std * np.sqrt(2 * checked_number(threshold, field="threshold", at_least=0))
    return 0.0 if radius <= distance else float(1 - distance / radius)


def alignment_gaussian_multiplier(threshold: float, mean: float, std: float) -> float:
    """Optimal multiplier of min KL(p||q) s.t. E_p[x] >= threshold, for q = N(mean, std^2): the model is N(threshold, std^2).

    Returns: ``(threshold - mean) / std^2``, or 0 where q reaches the threshold by itself.
    Source: methods.md H5.
    """
    threshold = checked_number(threshold, field="threshold")
    mean, std = checked_number(mean, field="mean"), checked_number(std, field="std", above=0)
    return max(0.0, (threshold - mean) / std**2)


def _check_attainable(shares: NDArray[np.float64], epsilon: NDArray[np.float64]) -> None:
    if shares.sum() >= 1 - 1e-12:
        raise ValueError(
            f"epsilon={epsilon.tolist()}: shares e^-epsilon sum to {shares.sum():.6g}; raise it to get below 1"
        )


def _checked(
    epsilon: ArrayLike, prior: ArrayLike, *, field: str = "epsilon"
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    epsilon, prior = np.array(epsilon, dtype=np.float64), np.array(prior, dtype=np.float64)
    if epsilon.ndim != 1 or epsilon.shape != prior.shape:
        raise ValueError(f"shapes of {field} and prior are {epsilon.shape}, {prior.shape}; give one entry a class")
    if not (np.isfinite(epsilon).all() and (epsilon >= 0).all()):
        raise ValueError(f"{field}={epsilon.tolist()}: give finite thresholds >= 0 in nats")
    if not ((prior >= 0).all() and prior.sum() <= 1 + 1e-9):  # NaN fails here too
        raise ValueError(f"prior={prior.tolist()}: give masses >= 0 with sum <= 1")
    return epsilon, prior


def _checked_multipliers(multipliers: ArrayLike, prior: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Multipliers share the range of epsilon: finite and >= 0, one a class."""
    multipliers = np.array(multipliers, dtype=np.float64)
    if not (np.isfinite(multipliers).all() and (multipliers >= 0).all()):
        raise ValueError(f"multipliers={multipliers.tolist()}: give finite multipliers >= 0")
    return _checked(multipliers, prior)
