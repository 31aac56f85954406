"""Dual rules: how multipliers answer a measured violation.

A rule is a frozen dataclass of settings with two pure functions: ``initial(names, start)`` makes a state and
``step(state, violation, domain)`` returns the next one. Common to all: ``warmup_steps`` ramps the step size linearly
over the first dual steps, ``decay_after`` lets it fall as 1/k later on, and ``smoothing`` averages the violations
exponentially before they are used.
"""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dualsweep.constraints.checks import checked_count, checked_number, checked_vector
from dualsweep.constraints.domains import DualDomain, NonNegative
from dualsweep.constraints.multipliers import DualState


@dataclass(frozen=True, kw_only=True)
class DualRule:
    """What all rules share; a rule defines ``_moved``.

    ``smoothing`` in [0, 1) is the weight of the past in an exponential average of the violations, corrected for its
    start (the first average is the first violation); 0 uses each violation as it comes.
    ``warmup_steps``: dual step k (from 1) is scaled by min(1, k / warmup_steps).
    ``decay_after``: dual step k is scaled by min(1, decay_after / k), so that the noise of the metrics averages out of the
    multipliers (Robbins and Monro, 1951); 0 never decays.
    """

    smoothing: float = 0.0
    warmup_steps: int = 0
    decay_after: int = 0

    def __post_init__(self) -> None:
        _set(self, "smoothing", checked_number(self.smoothing, field="dual.smoothing", at_least=0, below=1))
        for field in ("warmup_steps", "decay_after"):
            _set(self, field, checked_count(getattr(self, field), field=f"dual.{field}"))

    def initial(
        self,
        names: Sequence[str],
        start: float | Mapping[str, float] | ArrayLike = 0.0,
        domain: DualDomain | None = None,
    ) -> DualState:
        """The state before the first dual step, moved into ``domain`` (default: >= 0 as given).

        Args:
            start: initial multipliers >= 0: one for all, by name, or in the order of ``names``.
        Raises: ValueError on a negative or missing start.
        """
        state = DualState(names=tuple(names), multipliers=_start_vector(names, start))
        return state if domain is None else replace(state, multipliers=domain.project(state.multipliers))

    def step(self, state: DualState, violation: ArrayLike, domain: DualDomain | None = None) -> DualState:
        """One dual step; the result lies in ``domain`` (default: multipliers >= 0).

        Args:
            violation: shape (num_constraints,), ``metric - threshold`` in metric units; <= 0 is satisfied.
        Raises: ValueError naming the constraints with a non-finite violation or multiplier, or a wrong shape.
        """
        violation = checked_vector(violation, state.names, what="violation")
        smoothed = self._smoothed(state, violation)
        number = state.step + 1
        ramp = min(1.0, number / self.warmup_steps) if self.warmup_steps else 1.0
        if self.decay_after:
            ramp *= min(1.0, self.decay_after / number)
        memory = {**state.rule_state, "smoothed_violation": smoothed}
        remembering = replace(state, rule_state=memory)
        return replace(self._moved(remembering, smoothed, domain or NonNegative(), ramp), step=state.step + 1)

    def _smoothed(self, state: DualState, violation: NDArray[np.float64]) -> NDArray[np.float64]:
        past = state.rule_state.get("smoothed_violation")
        if past is None:
            return violation
        # s_n = (sum_k smoothing^(n-k) v_k) / (sum_k smoothing^(n-k)), written as a recursion on s itself.
        weight = (1 - self.smoothing) / (1 - self.smoothing ** (state.step + 1))
        return (1 - weight) * past + weight * violation

    def _moved(self, state: DualState, violation: NDArray[np.float64], domain: DualDomain, ramp: float) -> DualState:
        raise TypeError(f"{type(self).__name__} is no rule by itself; take one of {sorted(RULES)}")


@dataclass(frozen=True)
class Ascent(DualRule):
    """Projected gradient ascent, ``project(multipliers + step_size * violation)``.

    ``step_size`` > 0 in objective units per squared metric unit.
    Source: Arrow, Hurwicz and Uzawa (1958); for diffusion models Khalafi, Ding and Ribeiro, NeurIPS 2024.
    """

    step_size: float

    def __post_init__(self) -> None:
        super().__post_init__()
        _set(self, "step_size", checked_number(self.step_size, field="dual.step_size", above=0))

    def _moved(self, state, violation, domain, ramp):
        return replace(state, multipliers=_ascended(state, ramp * self.step_size * violation, domain))


@dataclass(frozen=True)
class Resilient(DualRule):
    """Ascent on the dual function minus ``alpha * multipliers^2``; relaxations follow as ``2 * alpha * multipliers``.

    That is the quadratic relaxation cost u^2 / (4 alpha) with u already minimised out: the rule rests where
    ``violation = 2 * alpha * multiplier``, so thresholds nobody can meet still give finite multipliers.
    ``relaxation_cost`` is alpha, one for all constraints or one each; 0 never relaxes that constraint.
    Source: Hounie, Ribeiro and Chamon, arXiv 2306.02426; methods.md §1c.
    """

    step_size: float
    relaxation_cost: float | tuple[float, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        _set(self, "step_size", checked_number(self.step_size, field="dual.step_size", above=0))
        _set(self, "relaxation_cost", _checked_costs(self.relaxation_cost))
        largest = float(np.max(self.relaxation_cost))
        if self.step_size * largest >= 1:
            # lambda <- (1 - 2 eta alpha) lambda + ... swings with growing size from 2 eta alpha = 2 on
            raise ValueError(
                f"dual.step_size={self.step_size!r}: with relaxation_cost={largest:g} the multiplier oscillates "
                f"without end; give a step size < {1 / largest:g}"
            )

    def initial(self, names, start=0.0, domain=None):
        state = super().initial(names, start, domain)
        return replace(state, relaxations=2 * _costs(self.relaxation_cost, state) * state.multipliers)

    def _moved(self, state, violation, domain, ramp):
        cost = _costs(self.relaxation_cost, state)
        gradient = violation - 2 * cost * state.multipliers
        multipliers = _ascended(state, ramp * self.step_size * gradient, domain)
        return replace(state, multipliers=multipliers, relaxations=2 * cost * multipliers)


@dataclass(frozen=True)
class ResilientExplicit(DualRule):
    """Relaxations as variables of their own: a descent step on u, then an ascent step on the multipliers.

    With cost h(u) = u^2 / (4 alpha): ``u <- [u + relaxation_step_size * (multiplier - u / (2 alpha))]_+``, then
    ``multiplier <- project(multiplier + step_size * (violation - u))`` with the new u. A relaxation step size of
    2 alpha minimises over u exactly, and the multipliers are then those of ``Resilient``.
    ``relaxation_step_size`` > 0 in squared metric units per objective unit; ``relaxation_cost`` as in ``Resilient``.
    Source: Hounie, Ribeiro and Chamon, arXiv 2306.02426, algorithm 1.
    """

    step_size: float
    relaxation_step_size: float
    relaxation_cost: float | tuple[float, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        _set(self, "step_size", checked_number(self.step_size, field="dual.step_size", above=0))
        name = "dual.relaxation_step_size"
        _set(self, "relaxation_step_size", checked_number(self.relaxation_step_size, field=name, above=0))
        _set(self, "relaxation_cost", _checked_costs(self.relaxation_cost))
        costs = np.atleast_1d(self.relaxation_cost)
        smallest = float(costs[costs > 0].min())
        if self.relaxation_step_size >= 4 * smallest:
            # u <- (1 - eta_u / (2 alpha)) u + ... swings with growing size from eta_u = 4 alpha on
            raise ValueError(
                f"{name}={self.relaxation_step_size!r}: with relaxation_cost={smallest:g} the relaxation oscillates "
                f"without end; give a step size < {4 * smallest:g}"
            )

    def _moved(self, state, violation, domain, ramp):
        cost = _costs(self.relaxation_cost, state)
        relaxable = cost > 0
        slope = np.where(relaxable, state.multipliers - state.relaxations / (2 * np.where(relaxable, cost, 1.0)), 0.0)
        relaxations = np.maximum(state.relaxations + ramp * self.relaxation_step_size * slope, 0.0)
        multipliers = _ascended(state, ramp * self.step_size * (violation - relaxations), domain)
        return replace(state, multipliers=multipliers, relaxations=relaxations)


@dataclass(frozen=True)
class NuPI(DualRule):
    """Ascent with a proportional term on an exponentially filtered violation, which damps oscillation.

    ``filtered <- nu * filtered + (1 - nu) * violation`` (from 0) and ``multiplier <- project(multiplier +
    step_size * violation + proportional_gain * change of filtered)``. A gain of 0 is plain ascent.
    ``step_size`` is kappa_i > 0, ``proportional_gain`` kappa_p >= 0, ``nu`` in (-1, 1).
    Source: Sohrabi et al., On PI controllers for updating Lagrange multipliers, ICML 2024, algorithm 1.
    """

    step_size: float
    proportional_gain: float = 0.0
    nu: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _set(self, "step_size", checked_number(self.step_size, field="dual.step_size", above=0))
        gain = checked_number(self.proportional_gain, field="dual.proportional_gain", at_least=0)
        _set(self, "proportional_gain", gain)
        _set(self, "nu", checked_number(self.nu, field="dual.nu", above=-1, below=1))

    def _moved(self, state, violation, domain, ramp):
        before = state.rule_state.get("filtered_violation", np.zeros(len(state.names)))
        after = self.nu * before + (1 - self.nu) * violation
        move = self.step_size * violation + self.proportional_gain * (after - before)
        memory = {**state.rule_state, "filtered_violation": after}
        return replace(state, multipliers=_ascended(state, ramp * move, domain), rule_state=memory)


@dataclass(frozen=True)
class Fixed(DualRule):
    """Multipliers never move: the fixed-weight baseline. They need not lie in the dual domain, only be >= 0."""

    def initial(self, names, start=0.0, domain=None):
        return super().initial(names, start)

    def _moved(self, state, violation, domain, ramp):
        return state


RULES: dict[str, type[DualRule]] = {
    "ascent": Ascent,
    "resilient": Resilient,
    "resilient_explicit": ResilientExplicit,
    "nupi": NuPI,
    "fixed": Fixed,
}


def rule_from_config(config: Mapping, relaxation_costs: Sequence[float | None] | None = None) -> DualRule:
    """A rule from ``{"rule": name, **settings}``.

    Args:
        relaxation_costs: one a constraint (``Problem.relaxation_costs``); stands in where the config of a resilient
            rule gives no ``relaxation_cost``. None entries are never relaxed.
    Raises: ValueError on an unknown rule or setting (naming the known ones), a missing one, or a value out of range.
    """
    given = config.get("rule") if isinstance(config, Mapping) else config
    if not isinstance(config, Mapping) or not isinstance(given, str) or given not in RULES:
        raise ValueError(f"dual.rule={given!r}: give one of {sorted(RULES)}")
    name = config["rule"]
    settings = {key: value for key, value in config.items() if key != "rule"}
    parameters = inspect.signature(RULES[name]).parameters
    unknown = sorted(set(map(str, settings)) - set(parameters))
    if unknown:
        raise ValueError(
            f"dual: unknown settings {unknown} for the rule {name!r}; the known ones are {sorted(parameters)}"
        )
    if "relaxation_cost" in parameters and "relaxation_cost" not in settings and any(relaxation_costs or ()):
        settings["relaxation_cost"] = tuple(0.0 if cost is None else cost for cost in relaxation_costs)
    needed = [key for key, parameter in parameters.items() if parameter.default is parameter.empty]
    missing = sorted(set(needed) - set(settings))
    if missing:
        raise ValueError(f"dual: the rule {name!r} needs {missing}; add them beside `rule`")
    return RULES[name](**settings)


def _ascended(state: DualState, move: NDArray[np.float64], domain: DualDomain) -> NDArray[np.float64]:
    # checked before the projection: beyond it nobody knows which constraint overflowed
    return domain.project(checked_vector(state.multipliers + move, state.names, what="multiplier"))


def _set(rule: DualRule, name: str, value: object) -> None:
    object.__setattr__(rule, name, value)  # only in __post_init__: a frozen dataclass normalising its own fields


def _checked_costs(cost: object) -> float | tuple[float, ...]:
    field = "dual.relaxation_cost"
    if not isinstance(cost, Sequence | np.ndarray) or isinstance(cost, str):
        return checked_number(cost, field=field, above=0)
    costs = tuple(checked_number(value, field=f"{field}[{i}]", at_least=0) for i, value in enumerate(cost))
    if not any(costs):
        raise ValueError(f"{field}={list(costs)}: at least one must be > 0; for no relaxation take the rule ascent")
    return costs


def _costs(cost: float | tuple[float, ...], state: DualState) -> NDArray[np.float64]:
    costs = np.full(len(state.names), cost) if isinstance(cost, float) else np.array(cost)
    return checked_vector(costs, state.names, what="dual.relaxation_cost")


def _start_vector(names: Sequence[str], start: float | Mapping[str, float] | ArrayLike) -> NDArray[np.float64]:
    if isinstance(start, Mapping):
        if set(start) != set(names):
            raise ValueError(f"initial multipliers={dict(start)}: give one for each of {list(names)}")
        return np.array([start[name] for name in names], dtype=np.float64)
    return np.full(len(names), start, dtype=np.float64) if np.ndim(start) == 0 else np.array(start, dtype=np.float64)
