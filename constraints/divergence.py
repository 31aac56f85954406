"""A run that runs away: an objective or a multiplier that is still finite but grows without bound.

Such a run ends in NaN or infinity sooner or later, and all steps until then are lost. A quantity counts as running away
when, over the last `dual_steps` dual steps, its size stayed above `factor` times its scale and was no smaller at their end
than at their beginning. The scale is known before the first step, since a run may be lost by its first dual step: for the
objective the size it has in a sound run (1 for a loss whose noise has variance 1), for a multiplier the one it starts from
(at least 1), so that a fixed weight of any size is left alone.

A multiplier that grows in proportion to the dual steps, as under a threshold nobody can meet, is a finding of the
certificate and stays far below the usual factor of 10,000: with steps of 0.05 and a violation of 5 nats it takes 40,000 dual
steps to get there. A swing or a spike that comes down by itself does not count, and a learning rate that decays does bring
some down: a tiny run in the plane with a learning rate of 10 stood at a loss of 11,500 halfway and ended at 2.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from dualsweep.constraints.checks import checked_count, checked_number, checked_vector

LEAST_SCALE = 1.0


class RunawayDetector:
    """Looks at one dual step after the other; `state` is JSON-able and goes into the checkpoint."""

    def __init__(
        self,
        starts: Mapping[str, float],
        *,
        objective_scale: float = LEAST_SCALE,
        factor: float,
        dual_steps: int,
        state: Sequence[Sequence[float]] = (),
    ) -> None:
        """
        Args:
            starts: constraint -> the multiplier it starts from, in the order of the multipliers.
            objective_scale: > 0, the objective's size in a sound run, in its own unit.
            factor: > 1, of the scale.
            dual_steps: >= 2, how long in a row.
            state: that of a checkpoint; empty for a run that begins.
        Raises: ValueError naming the field and its range.
        """
        self.factor = checked_number(factor, field="factor", above=1)
        self.dual_steps = checked_count(dual_steps, field="dual_steps", at_least=2)
        scale = checked_number(objective_scale, field="objective_scale", above=0)
        self.quantities = ("objective", *(f"multiplier of {name}" for name in starts))
        values = [scale, *(max(abs(start), LEAST_SCALE) for start in starts.values())]
        self.scales = checked_vector(values, self.quantities, what="scale")
        self._recent: list[list[float]] = [list(sizes) for sizes in state]

    @property
    def state(self) -> list[list[float]]:
        """Sizes of the last dual steps, one row each."""
        return self._recent

    def see(self, objective: float, multipliers: Sequence[float]) -> str | None:
        """One dual step.

        Args:
            objective: as measured.
            multipliers: those after the step.
        Returns: what runs away, with its numbers, or None.
        Raises: ValueError for the wrong number of multipliers; NonFiniteError.
        """
        sizes = np.abs(checked_vector([objective, *multipliers], self.quantities, what="value"))
        self._recent = [*self._recent, sizes.tolist()][-self.dual_steps :]
        if len(self._recent) < self.dual_steps:
            return None
        recent = np.array(self._recent)
        away = np.flatnonzero((recent / self.factor > self.scales).all(0) & (recent[-1] >= recent[0]))
        found = [
            f"{self.quantities[i]} grew to {recent[-1, i]:.3g}, from {recent[0, i]:.3g} {self.dual_steps - 1} dual steps "
            f"before, where {self.scales[i]:.3g} is usual"
            for i in away
        ]
        if not found:
            return None
        return "; ".join(found) + "; lower the learning rate or the dual step size, or raise divergence.factor"
