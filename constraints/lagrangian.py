"""The Lagrangian and the parts of the Karush-Kuhn-Tucker residual.

With relaxations u the constraint is ``violation <= u``; every part below uses the relaxations of the state it is given.

Composition is a min-max problem, min over p of max_i violation_i(p), written with a level that is minimised too: min
over p and level of level subject to violation_i(p) <= level. The Lagrangian is level * (1 - sum of multipliers) +
multipliers @ violation, so the multipliers lie on the simplex, its value is ``multipliers @ violation``, and a
constraint is held where its violation does not exceed the level.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dualsweep.constraints.checks import checked_number, checked_vector
from dualsweep.constraints.domains import DualDomain, NonNegative, Simplex
from dualsweep.constraints.multipliers import DualState


def lagrangian(objective, multipliers, violation):
    """``objective + sum_i multipliers[i] * violation[i]``, for floats, arrays and tensors alike.

    Args:
        objective: scalar of any arithmetic type (float, array, differentiable tensor).
        multipliers: iterable of num_constraints numbers; constants, no gradient flows into them.
        violation: iterable of num_constraints scalars of the objective's type.
    Returns: the type of ``objective + violation[0]``; differentiable where objective and violation are.
    Raises: ValueError if the numbers of multipliers and violations differ.
    """
    total = objective
    for multiplier, value in zip(multipliers, violation, strict=True):
        total = total + float(multiplier) * value
    return total


def min_max_level(
    multipliers: ArrayLike, violation: ArrayLike, domain: DualDomain | None = None
) -> NDArray[np.float64] | None:
    """The level of a min-max problem, ``multipliers @ violation`` over the last axis; None if the domain is no simplex.

    At the minimiser of the Lagrangian it is the dual value, and at the optimum the largest violation.
    """
    if not isinstance(domain, Simplex):
        return None
    return np.sum(np.asarray(multipliers, dtype=np.float64) * np.asarray(violation, dtype=np.float64), axis=-1)


def above_level(
    multipliers: ArrayLike, violation: ArrayLike, stderr: ArrayLike
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """``violation - min_max_level`` and its standard error, for multipliers on the simplex.

    Entry i is ``sum_j (delta_ij - multiplier_j) violation_j``. All may be estimated on the same draws, so the standard
    error is the bound that holds however they are correlated: ``sum_j |delta_ij - multiplier_j| stderr_j``.

    Args:
        multipliers, violation, stderr: shape (..., num_constraints).
    """
    multipliers, stderr = np.asarray(multipliers, dtype=np.float64), np.asarray(stderr, dtype=np.float64)
    excess = violation - min_max_level(multipliers, violation, Simplex())[..., None]
    return excess, (multipliers * stderr).sum(axis=-1, keepdims=True) + (1 - 2 * multipliers) * stderr


def infeasibility(violation: ArrayLike, relaxations: ArrayLike = 0.0) -> float:
    """Largest ``max(violation - relaxation, 0)``; 0 for a problem without constraints."""
    excess = np.asarray(violation, dtype=np.float64) - np.asarray(relaxations, dtype=np.float64)
    if not np.isfinite(excess).all():
        raise ValueError(f"non-finite violation in {np.asarray(violation).tolist()}; stop the run and look at its data")
    return float(np.maximum(excess, 0.0).max(initial=0.0))


def complementarity_residual(state: DualState, violation: ArrayLike, domain: DualDomain | None = None) -> float:
    """Largest ``|multiplier - project(multiplier + violation)|``: zero exactly where the dual step stands still.

    In the default domain (>= 0) this is ``max |min(multiplier, -violation)|``. Metric and objective units are compared
    as they are, so only its zero is free of units.

    Raises: ValueError naming the constraints with a non-finite violation, or a wrong shape.
    """
    relaxed = checked_vector(violation, state.names, what="violation") - state.relaxations
    ascended = (domain or NonNegative()).project(state.multipliers + relaxed)
    return float(np.abs(state.multipliers - ascended).max(initial=0.0))


def kkt_residual(
    state: DualState, violation: ArrayLike, stationarity: float, domain: DualDomain | None = None
) -> float:
    """The largest of infeasibility, complementarity residual and stationarity (max norm over the three).

    On the simplex infeasibility counts from the level that the multipliers name.

    Args:
        stationarity: gradient norm of the Lagrangian, >= 0.
    Raises: ValueError on a non-finite part.
    """
    stationarity = checked_number(stationarity, field="stationarity", at_least=0)
    complementarity = complementarity_residual(state, violation, domain)
    relaxed = np.asarray(violation, dtype=np.float64) - state.relaxations
    level = min_max_level(state.multipliers, relaxed, domain)
    return max(infeasibility(relaxed, 0.0 if level is None else level), complementarity, stationarity)
