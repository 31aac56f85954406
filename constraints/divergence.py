"""A run that runs away: an objective or a multiplier that is still finite but grows without bound.

Such a run ends in NaN or infinity sooner or later, and all steps until then are lost. A quantity counts as running away
when, over the last `dual_steps` dual steps, its size stayed above `factor` times the smallest size it ever had (at least
1), and was no smaller at their end than at their beginning.

The scale is relative to the run's own smallest size because a fixed weight or a loss in large units may be any number; it is
at least 1 because objectives in nats and multipliers start from 0. A multiplier that grows in proportion to the dual
steps, as under a threshold nobody can meet, is a finding of the certificate and stays far below the usual factor of 10,000:
with steps of 0.05 and a violation of 5 nats it takes 40,000 dual steps to get there. A swing that comes back does not
count, since one row below the limit starts the count again.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dualsweep.constraints.checks import checked_count, checked_number, checked_vector

LEAST_SCALE = 1.0


class RunawayDetector:
    """Looks at one dual step after the other; `state` is JSON-able and goes into the checkpoint."""

    def __init__(
        self, names: Sequence[str], *, factor: float, dual_steps: int, state: Mapping[str, Any] | None = None
    ) -> None:
        """
        Args:
            names: constraints in the order of the multipliers.
            factor: > 1, of the smallest size so far (at least 1).
            dual_steps: >= 2, how long in a row.
            state: that of a checkpoint; None: a run that begins.
        Raises: ValueError naming the field and its range.
        """
        self.factor = checked_number(factor, field="factor", above=1)
        self.dual_steps = checked_count(dual_steps, field="dual_steps", at_least=2)
        self.quantities = ("objective", *(f"multiplier of {name}" for name in names))
        self._smallest: list[float] = list(state["smallest"]) if state else []
        self._recent: list[list[float]] = [list(sizes) for sizes in state["recent"]] if state else []

    @property
    def state(self) -> dict[str, Any]:
        return {"smallest": self._smallest, "recent": self._recent}

    def see(self, objective: float, multipliers: Sequence[float]) -> str | None:
        """One dual step.

        Args:
            objective: as measured.
            multipliers: those after the step.
        Returns: what runs away, with its numbers, or None.
        Raises: ValueError for the wrong number of multipliers or one that is not finite.
        """
        sizes = np.abs(checked_vector([objective, *multipliers], self.quantities, what="value"))
        smallest = np.minimum(self._smallest, sizes) if self._smallest else sizes
        self._smallest = smallest.tolist()
        self._recent = [*self._recent, sizes.tolist()][-self.dual_steps :]
        if len(self._recent) < self.dual_steps:
            return None
        recent, scale = np.array(self._recent), np.maximum(smallest, LEAST_SCALE)
        away = (recent > self.factor * scale).all(0) & (recent[-1] >= recent[0])
        if not away.any():
            return None
        found = [
            f"{self.quantities[i]} grew to {recent[-1, i]:.3g}, from {recent[0, i]:.3g} {self.dual_steps - 1} dual steps "
            f"before and {smallest[i]:.3g} at its smallest"
            for i in np.flatnonzero(away)
        ]
        return "; ".join(found) + "; lower the learning rate or the dual step size, or raise divergence.factor"
