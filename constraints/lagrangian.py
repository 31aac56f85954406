"""The Lagrangian and the parts of the Karush-Kuhn-Tucker residual.

With relaxations u the constraint is ``violation <= u``; every part below uses the relaxations of the state it is given.
"""

import numpy as np
from numpy.typing import ArrayLike

from dualsweep.constraints.checks import checked_number, checked_vector
from dualsweep.constraints.domains import DualDomain, NonNegative
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

    Args:
        stationarity: gradient norm of the Lagrangian, >= 0.
    Raises: ValueError on a non-finite part.
    """
    stationarity = checked_number(stationarity, field="stationarity", at_least=0)
    complementarity = complementarity_residual(state, violation, domain)
    return max(infeasibility(violation, state.relaxations), complementarity, stationarity)
