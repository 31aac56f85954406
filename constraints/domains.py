"""Where multipliers may live: one domain a formulation, each with its Euclidean projection.

An upper limit is open (``SumBelow(1)``: sum < 1; ``Capped``: lambda_i < cap_i), because the Lagrangian has no minimum
at or beyond it. The projection therefore stops a small ``margin`` before the limit, and ``saturated`` tells which
multipliers sit there: a sign that the threshold is out of reach, not that the run has converged.

Source: methods.md §0.5 and H1 to H6; the simplex projection is that of Held, Wolfe and Crowder (1974).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dualsweep.constraints.checks import check_keys, checked_number


class DualDomain(Protocol):
    """A closed convex set of multipliers, shape (num_constraints,)."""

    def project(self, values: ArrayLike) -> NDArray[np.float64]:
        """The nearest point of the domain, same shape; the input is not changed."""

    def saturated(self, values: ArrayLike) -> NDArray[np.bool_]:
        """Which entries are held back by the upper limit of the domain, same shape."""

    def to_dict(self) -> dict:
        """JSON-able; ``domain_from_dict`` turns it back."""


@dataclass(frozen=True)
class NonNegative:
    """Every multiplier >= 0: fairness, adaptation, alignment, likelihood-constrained unlearning."""

    def project(self, values: ArrayLike) -> NDArray[np.float64]:
        return np.maximum(_vector(values), 0.0)

    def saturated(self, values: ArrayLike) -> NDArray[np.bool_]:
        return np.zeros(_vector(values).shape, dtype=bool)

    def to_dict(self) -> dict:
        return {"kind": "non_negative"}


@dataclass(frozen=True)
class SumBelow:
    """Multipliers >= 0 whose sum stays below ``limit``: reverse-KL unlearning, where the limit is 1.

    ``margin`` is the relative distance kept from the limit: projected sums are <= limit * (1 - margin).
    """

    limit: float
    margin: float = 1e-3

    def __post_init__(self) -> None:
        object.__setattr__(self, "limit", checked_number(self.limit, field="domain.limit", above=0))
        object.__setattr__(self, "margin", _checked_margin(self.margin))

    @property
    def ceiling(self) -> float:
        """The largest sum the projection returns."""
        return self.limit * (1 - self.margin)

    def project(self, values: ArrayLike) -> NDArray[np.float64]:
        inside = np.maximum(_vector(values), 0.0)
        return inside if inside.sum() <= self.ceiling else _project_on_simplex(_vector(values), self.ceiling)

    def saturated(self, values: ArrayLike) -> NDArray[np.bool_]:
        values = _vector(values)
        # The projected sum reaches the ceiling only to round-off, so compare within a millionth of it.
        return (values > 0) & (values.sum() >= self.ceiling * (1 - 1e-6))

    def to_dict(self) -> dict:
        return {"kind": "sum_below", "limit": self.limit, "margin": self.margin}


@dataclass(frozen=True)
class Capped:
    """``0 <= lambda_i < caps[i]``: forward-KL unlearning, where cap i is the mass of forget set i in q.

    Exact for forget sets that do not overlap (sum_i lambda_i q^i <= q almost everywhere). ``margin`` is the relative
    distance kept from each cap.
    """

    caps: tuple[float, ...]
    margin: float = 1e-4

    def __post_init__(self) -> None:
        caps = tuple(checked_number(cap, field=f"domain.caps[{i}]", above=0) for i, cap in enumerate(self.caps))
        object.__setattr__(self, "caps", caps)
        object.__setattr__(self, "margin", _checked_margin(self.margin))

    @property
    def ceilings(self) -> NDArray[np.float64]:
        """The largest multipliers the projection returns, shape (num_constraints,)."""
        return np.array(self.caps) * (1 - self.margin)

    def project(self, values: ArrayLike) -> NDArray[np.float64]:
        return np.minimum(np.maximum(self._matching(values), 0.0), self.ceilings)

    def saturated(self, values: ArrayLike) -> NDArray[np.bool_]:
        return self._matching(values) >= self.ceilings

    def to_dict(self) -> dict:
        return {"kind": "capped", "caps": list(self.caps), "margin": self.margin}

    def _matching(self, values: ArrayLike) -> NDArray[np.float64]:
        values = _vector(values)
        if values.shape != (len(self.caps),):
            raise ValueError(f"domain.caps={list(self.caps)}: give one cap a constraint, {values.size} in all")
        return values


@dataclass(frozen=True)
class Simplex:
    """Multipliers >= 0 with sum 1: composition, where they weigh the components of a min-max problem.

    Nothing is ever ``saturated``: a vertex is a legitimate optimum (one component is the worst by itself).
    """

    def project(self, values: ArrayLike) -> NDArray[np.float64]:
        return _project_on_simplex(_vector(values), 1.0)

    def saturated(self, values: ArrayLike) -> NDArray[np.bool_]:
        return np.zeros(_vector(values).shape, dtype=bool)

    def to_dict(self) -> dict:
        return {"kind": "simplex"}


DOMAINS = {"non_negative": NonNegative, "sum_below": SumBelow, "capped": Capped, "simplex": Simplex}


def domain_from_dict(data: Mapping) -> DualDomain:
    """The inverse of ``to_dict``; the limits of a domain are its other keys.

    Raises: ValueError on an unknown kind or key, or a limit out of range.
    """
    kind = data.get("kind") if isinstance(data, Mapping) else None
    if not isinstance(kind, str) or kind not in DOMAINS:
        raise ValueError(f"domain={data!r}: give a mapping whose `kind` is one of {sorted(DOMAINS)}")
    arguments = {key: value for key, value in data.items() if key != "kind"}
    required = {"sum_below": {"limit"}, "capped": {"caps"}}.get(kind, set())
    optional = {"margin"} if required else set()
    check_keys(arguments, what=f"domain {kind}", required=required, optional=optional)
    if "caps" in arguments:
        arguments["caps"] = tuple(arguments["caps"])
    return DOMAINS[kind](**arguments)


def _project_on_simplex(values: NDArray[np.float64], total: float) -> NDArray[np.float64]:
    """The nearest vector with entries >= 0 and the given sum; an empty vector stays empty."""
    if values.size == 0:
        return values
    shifted = values - values.max()  # a common shift changes nothing, and keeps large inputs exact
    descending = np.sort(shifted)[::-1]
    excess = (np.cumsum(descending) - total) / np.arange(1, values.size + 1)
    last = np.flatnonzero(descending > excess)[-1]
    return np.maximum(shifted - excess[last], 0.0)


def _vector(values: ArrayLike) -> NDArray[np.float64]:
    vector = np.array(values, dtype=np.float64)
    if vector.ndim != 1 or not np.isfinite(vector).all():
        raise ValueError(f"multipliers={values!r}: give one finite number a constraint")
    return vector


def _checked_margin(margin: float) -> float:
    return checked_number(margin, field="domain.margin", at_least=0, below=1)
