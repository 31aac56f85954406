"""What is asked for: constraints with thresholds in a unit that means something, and the problem they make.

A user says "at least 10 % of the samples"; inside, everything is ``violation = metric - threshold``, satisfied at <= 0.
The metric's own scale is called canonical. Each unit has a sense of its own, and a formulation may ask for the other
one (unlearning keeps a divergence from a forget set above its threshold, and a share below):

=================  =========================  =========  ====================  ====================  ==============
unit               value the user gives       own sense  canonical, ``<=``     canonical, ``>=``     factor of the
                                                                                                     pretrained's
=================  =========================  =========  ====================  ====================  ==============
loss               mean noise MSE of a set    ``<=``     loss                  -loss                 yes
nats               divergence from a set      ``<=``     divergence            -divergence           yes
share              share of the samples       ``>=``     log share (nats)      -log share (nats)     no
likelihood_ratio   mean likelihood ratio      ``<=``     ratio                 -ratio                yes
reward             reward (standard dev.)     ``>=``     reward                -reward               no
=================  =========================  =========  ====================  ====================  ==============

The canonical threshold is the same function of the threshold. Source of the share unit: KL(q^i || p) = -log(share of
class i) for a model of class restrictions (methods.md H1); at most s is the forward-KL unlearning of such a class (H3).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dualsweep.constraints.checks import check_keys, checked_number, checked_vector, is_number
from dualsweep.constraints.domains import DualDomain, NonNegative, domain_from_dict

UNITS = ("loss", "nats", "share", "likelihood_ratio", "reward")
SENSES = ("<=", ">=")
AT_LEAST_UNITS = ("share", "reward")  # own sense ">=", the others "<="
# What a factor multiplies, by unit, and why the other units have none.
FACTOR_UNITS = {"loss": "loss", "nats": "divergence", "likelihood_ratio": "likelihood ratio"}
NO_FACTOR = {
    "share": "a share is already a fraction of all samples",
    "reward": "a reward already counts standard deviations from the pretrained model, whose own value is 0",
}


def resolved_sense(unit: str, sense: str | None = None) -> str:
    """``"<="`` or ``">="`` as the user reads a threshold: ``sense``, or the unit's own where it is None.

    Raises: ValueError on any other text.
    """
    if sense is None:
        return ">=" if unit in AT_LEAST_UNITS else "<="
    if sense not in SENSES:
        raise ValueError(f"sense={sense!r}: give one of {list(SENSES)}, or None for the unit's own")
    return sense


def threshold_error(value: object, unit: str, *, relaxed: bool = False, sense: str | None = None) -> str | None:
    """Why ``value`` (user unit) can never be a threshold of ``unit``, or None if it can.

    Args:
        relaxed: the constraint may be relaxed at a cost; then a loss of 0 is a meaningful request.
        sense: as in ``Constraint``; "at least 0" asks for nothing where no value is below 0, so it is refused.
    """
    if unit not in UNITS:
        return f"unknown unit {unit!r}; the known units are {list(UNITS)}"
    at_least = resolved_sense(unit, sense) == ">="
    if not is_number(value):
        return f"a {unit} threshold must be a finite number"
    if unit == "share" and not 0 < value < 1:
        return "a share must be in (0, 1)"
    if unit == "loss" and (value < 0 or (value == 0 and (at_least or not relaxed))):
        return "a loss must be > 0" + ("" if value or at_least else " (0 needs a relaxation cost)")
    if unit == "nats" and at_least and value <= 0:
        return "a divergence of at least so many nats must be > 0"
    if unit == "nats" and value < 0:
        return "a divergence in nats must be >= 0"
    if unit == "likelihood_ratio" and value <= 0:
        return "a likelihood ratio must be > 0"
    return None


def share_sum_error(shares: Mapping[str, float]) -> str | None:
    """Why these shares cannot hold together (they leave nothing for the rest), or None if they can."""
    total = math.fsum(shares.values())
    if total < 1 - 1e-12:  # decimal fractions such as ten times 0.1 sum to 1 only to round-off
        return None
    return f"shares {dict(shares)} sum to {total:.6g}; lower them until they sum to less than 1"


def factor_error(unit: str) -> str | None:
    """Why a threshold of ``unit`` cannot be ``{"factor": f}`` of the pretrained model's value, or None if it can."""
    if unit in FACTOR_UNITS:
        return None
    reason = NO_FACTOR.get(unit, f"unknown unit {unit!r}")
    return f"a factor needs the unit {', '.join(FACTOR_UNITS)}, got {unit!r} ({reason}); give a number"


def resolved_threshold(value: float | Mapping, unit: str, *, pretrained: float | None = None) -> float:
    """A threshold as a number: itself, or ``{"factor": f}`` times the pretrained model's value of the metric.

    Args:
        pretrained: that value in the user's unit, > 0: the loss, the divergence in nats, the mean likelihood ratio.
    Raises: ValueError where a factor has no pretrained value to multiply, or the unit is a share or a reward.
    """
    if not isinstance(value, Mapping):
        return checked_number(value, field="threshold")
    check_keys(value, what="threshold", required={"factor"})
    error = factor_error(unit)
    if error:
        raise ValueError(f"threshold={dict(value)}: {error}")
    factor = checked_number(value["factor"], field="threshold.factor", above=0)
    metric = f"pretrained {FACTOR_UNITS[unit]}"
    if pretrained is None:
        raise ValueError(f"threshold={dict(value)}: no {metric} to multiply; calibrate first or give a number")
    return factor * checked_number(pretrained, field=metric, above=0)


@dataclass(frozen=True, kw_only=True)
class Constraint:
    """One requirement; ``threshold`` is in the user's unit and, by itself, attainable.

    ``sense`` is "<=" or ">=", as the user reads the threshold; None becomes the unit's own (module table).
    ``metric`` says in words what is measured. ``relaxation_cost`` is alpha of the cost u^2 / (4 alpha) paid for
    loosening the canonical threshold by u (None: never loosened).
    """

    name: str
    unit: str
    threshold: float
    metric: str = ""
    relaxation_cost: float | None = None
    sense: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise ValueError(f"constraint name={self.name!r}: give a non-empty text")
        where = f"constraint {self.name!r}"
        if self.relaxation_cost is not None:
            cost = checked_number(self.relaxation_cost, field=f"{where}: relaxation_cost", above=0)
            object.__setattr__(self, "relaxation_cost", cost)
        if self.unit not in UNITS:
            raise ValueError(f"{where}: unit={self.unit!r}: give one of {list(UNITS)}")
        if self.sense not in (None, *SENSES):
            raise ValueError(f"{where}: sense={self.sense!r}: give one of {list(SENSES)}, or leave it out")
        object.__setattr__(self, "sense", resolved_sense(self.unit, self.sense))
        relaxed = self.relaxation_cost is not None
        error = threshold_error(self.threshold, self.unit, relaxed=relaxed, sense=self.sense)
        if error:
            raise ValueError(f"{where}: threshold={self.threshold!r}: {error}")
        object.__setattr__(self, "threshold", float(self.threshold))

    @property
    def canonical_threshold(self) -> float:
        """b in ``metric <= b``."""
        return self.canonical(self.threshold)

    def canonical(self, user_value: float) -> float:
        """The canonical metric of a value in the user's unit: less is better.

        A share of 0 lies infinitely far: math.inf where more is asked for, -math.inf where less is.
        """
        value = float(user_value)
        if self.unit == "share":
            share = checked_number(user_value, field=f"constraint {self.name!r}: share", at_least=0, at_most=1)
            value = math.log(share) if share > 0 else -math.inf
        return self._signed(value)

    def to_user(self, canonical_value: float) -> float:
        """The inverse of ``canonical``; an estimated share may exceed 1 by its noise and is left so."""
        value = self._signed(float(canonical_value))
        return math.exp(value) if self.unit == "share" else value

    def to_user_stderr(self, canonical_value: float, canonical_stderr: float) -> float:
        """Standard error in the user's unit; first order (delta method) for shares."""
        if self.unit == "share":
            return self.to_user(canonical_value) * float(canonical_stderr)
        return float(canonical_stderr)

    def _signed(self, value: float) -> float:
        """Turned around where the user wants more; its own inverse."""
        return -value if self.sense == ">=" else value

    def to_dict(self) -> dict:
        return {
            "name": self.name,
            "unit": self.unit,
            "threshold": self.threshold,
            "metric": self.metric,
            "relaxation_cost": self.relaxation_cost,
            "sense": self.sense,
        }

    @classmethod
    def from_dict(cls, data: Mapping) -> "Constraint":
        required, optional = {"name", "unit", "threshold"}, {"metric", "relaxation_cost", "sense"}
        check_keys(data, what="constraint", required=required, optional=optional)
        return cls(**data)


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Minimise ``objective`` subject to ``constraints``; names are unique; shares to reach (>=) sum to less than 1."""

    method: str
    objective: str
    constraints: tuple[Constraint, ...] = ()
    domain: DualDomain = field(default_factory=NonNegative)

    def __post_init__(self) -> None:
        object.__setattr__(self, "constraints", tuple(self.constraints))
        repeated = sorted({name for name in self.names if self.names.count(name) > 1})
        if repeated:
            raise ValueError(f"constraints: repeated names {repeated}; give every constraint its own name")
        shares = {c.name: c.threshold for c in self.constraints if c.unit == "share" and c.sense == ">="}
        error = share_sum_error(shares)
        if error:
            raise ValueError(f"thresholds: {error}")
        self.domain.project(np.zeros(len(self.constraints)))  # refuses caps that do not match the constraints

    @cached_property  # this and the next are read at every dual step
    def names(self) -> tuple[str, ...]:
        return tuple(c.name for c in self.constraints)

    @cached_property
    def thresholds(self) -> NDArray[np.float64]:
        """Canonical thresholds, shape (num_constraints,), read-only."""
        thresholds = np.array([c.canonical_threshold for c in self.constraints], dtype=np.float64)
        thresholds.flags.writeable = False
        return thresholds

    @property
    def relaxation_costs(self) -> tuple[float | None, ...]:
        return tuple(c.relaxation_cost for c in self.constraints)

    def violation(self, metrics: ArrayLike) -> NDArray[np.float64]:
        """``metric - threshold``, shape (num_constraints,), canonical units, <= 0 where satisfied.

        Args:
            metrics: canonical metrics in the order of ``names``.
        Raises: ValueError naming the constraints whose metric is not finite, or a wrong shape.
        """
        return checked_vector(metrics, self.names, what="metric") - self.thresholds

    def with_thresholds(self, thresholds: Mapping[str, float]) -> "Problem":
        """The same problem at other thresholds (user units); every constraint needs one.

        Raises: ValueError on a missing or unknown name, or a threshold out of range.
        """
        check_keys(thresholds, what="thresholds", required=set(self.names))
        constraints = tuple(replace(c, threshold=thresholds[c.name]) for c in self.constraints)
        return replace(self, constraints=constraints)

    def to_dict(self) -> dict:
        return {
            "method": self.method,
            "objective": self.objective,
            "constraints": [c.to_dict() for c in self.constraints],
            "domain": self.domain.to_dict(),
        }

    @classmethod
    def from_dict(cls, data: Mapping) -> "Problem":
        check_keys(data, what="problem", required={"method", "objective"}, optional={"constraints", "domain"})
        return cls(
            method=data["method"],
            objective=data["objective"],
            constraints=tuple(Constraint.from_dict(c) for c in data.get("constraints", ())),
            domain=domain_from_dict(data.get("domain", {"kind": "non_negative"})),
        )
