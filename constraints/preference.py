"""Preference unlearning (DUO) with the prior kept by a constraint: its exact optimum where the pairs are components of q.

    min_p  E[-log sigmoid(beta (log p/q(x+) - log p/q(x-)))]   subject to   KL(q||p) <= epsilon

with x+ and x- drawn independently from two classes of q that do not overlap, of mass pi+ and pi-.

Derivation. With u = log p/q the loss is convex in u, the constraint E_q[-u] <= epsilon is linear, and p has mass 1:
E_q[e^u] = 1. Averaging u over a class (under q) leaves the constraint as it is and lowers neither term but E_q[e^u] and
the loss, by Jensen, so u is constant on each class: u+, u- and u0 on the rest. Write w = pi e^u for the shares of p,
z = beta (u+ - u-) and s = sigmoid(-z). Stationarity of the Lagrangian with multipliers lambda (constraint) and nu (mass) in
u+, u- and u0 reads

    -beta s - lambda pi+ + nu w+ = 0,      beta s - lambda pi- + nu w- = 0,      -lambda pi0 + nu w0 = 0.

They sum to nu = lambda, so that what is neither preferred nor rejected keeps its mass and

    w+ = pi+ + a,    w- = pi- - a,    a = beta s / lambda.

The constraint KL(q||p) = pi+ log(pi+/w+) + pi- log(pi-/w-) = epsilon grows with a from 0 to infinity on [0, pi-), which
gives a, and lambda = beta s / a. Without the constraint (lambda = 0) the loss falls for ever as a tends to pi-: deterministic
preferences have no finite optimum (methods.md H7b), and the constraint is what makes the problem well posed.
"""

from dataclasses import dataclass

import numpy as np

from dualsweep.constraints.checks import checked_number


@dataclass(frozen=True)
class PreferenceOptimum:
    """The optimum of the problem above."""

    multiplier: float  # of the prior constraint, > 0
    moved: float  # mass a that goes from the rejected class to the preferred one, in (0, pi-)
    margin: float  # log p/q on the preferred class less that on the rejected one, nats
    loss: float  # nats
    divergence: float  # KL(q||p), nats


def preference_optimum(*, preferred: float, rejected: float, beta: float, threshold: float) -> PreferenceOptimum:
    """Multiplier, shares and loss at the optimum; derivation in the module docstring.

    Args:
        preferred, rejected: masses pi+ and pi- of the two classes in q, > 0 with sum <= 1.
        beta: inverse temperature, > 0.
        threshold: epsilon in nats, > 0: nothing may move at 0.
    Raises: ValueError on values out of range.
    """
    preferred = checked_number(preferred, field="preferred", above=0)
    rejected = checked_number(rejected, field="rejected", above=0)
    if preferred + rejected > 1 + 1e-9:
        raise ValueError(f"preferred={preferred:g}, rejected={rejected:g}: give masses with sum <= 1")
    beta = checked_number(beta, field="beta", above=0)
    threshold = checked_number(threshold, field="threshold", above=0)

    def divergence(kept: float) -> float:
        """KL(q||p) where the rejected class keeps this logarithm of a fraction."""
        return -preferred * np.log1p(rejected * -np.expm1(kept) / preferred) - rejected * kept

    # Bisection for log(w-/pi-), since the share that is left may be far below round-off of 1. The preferred class gains at
    # most log(1 / preferred) a sample, so at the lower end the divergence exceeds the threshold.
    low, high = -(threshold + 1 - preferred * np.log(preferred)) / rejected, 0.0
    middle = low / 2
    while low < middle < high:
        low, high = (middle, high) if divergence(middle) > threshold else (low, middle)
        middle = (low + high) / 2
    kept = middle
    moved = -rejected * np.expm1(kept)
    margin = float(np.log1p(moved / preferred) - kept)
    return PreferenceOptimum(
        multiplier=float(beta * np.exp(-np.logaddexp(0.0, beta * margin)) / moved),
        moved=float(moved),
        margin=margin,
        loss=float(np.logaddexp(0.0, -beta * margin)),
        divergence=float(divergence(kept)),
    )
