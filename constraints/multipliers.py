"""The dual variables of one trial: small, checked, and the same after a trip through JSON.

Project-wide: ``violation = metric - threshold`` (<= 0 is satisfied), ``multipliers >= 0`` and
``lagrangian = objective + multipliers @ violation``. NumPy only: the dual actor needs no torch.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from dualsweep.constraints.checks import check_keys, checked_count, checked_vector


@dataclass(frozen=True, kw_only=True, eq=False)
class DualState:
    """Everything a dual rule needs to go on; arrays are finite and read-only, ``step`` counts dual steps applied.

    ``rule_state`` is the rule's own memory by name; ``smoothed_violation`` is always in it after a step.
    """

    names: tuple[str, ...]
    multipliers: NDArray[np.float64]  # shape (num_constraints,), >= 0, objective units per metric unit
    relaxations: NDArray[np.float64] | None = None  # shape (num_constraints,), >= 0, metric units; None: all zero
    rule_state: Mapping[str, NDArray[np.float64]] = field(default_factory=dict)  # each shape (num_constraints,)
    step: int = 0

    def __post_init__(self) -> None:
        names = tuple(self.names)
        relaxations = np.zeros(len(names)) if self.relaxations is None else self.relaxations
        memory = {key: checked_vector(self.rule_state[key], names, what=key) for key in sorted(self.rule_state)}
        object.__setattr__(self, "names", names)
        object.__setattr__(self, "multipliers", _non_negative(self.multipliers, names, what="multiplier"))
        object.__setattr__(self, "relaxations", _non_negative(relaxations, names, what="relaxation"))
        object.__setattr__(self, "rule_state", memory)
        object.__setattr__(self, "step", checked_count(self.step, field="step"))

    def to_dict(self) -> dict:
        """JSON-able; ``json`` writes a float by its repr, so the round trip is exact to the last bit."""
        return {
            "names": list(self.names),
            "multipliers": self.multipliers.tolist(),
            "relaxations": self.relaxations.tolist(),
            "rule_state": {key: values.tolist() for key, values in self.rule_state.items()},
            "step": self.step,
        }

    @classmethod
    def from_dict(cls, data: Mapping) -> "DualState":
        """The inverse of ``to_dict``.

        Raises: ValueError on a missing or unknown key, or values no state can have.
        """
        required = {"names", "multipliers", "relaxations", "rule_state", "step"}
        check_keys(data, what="dual state", required=required)
        return cls(**{**data, "names": tuple(data["names"])})


def _non_negative(values, names: tuple[str, ...], *, what: str) -> NDArray[np.float64]:
    vector = checked_vector(values, names, what=what)
    if (vector < 0).any():
        raise ValueError(f"negative {what} in {dict(zip(names, vector.tolist(), strict=True))}; start at 0 or above")
    return vector
