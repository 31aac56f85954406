"""Certificate: what a finished trial may claim about its constraints, from held-out estimates with standard errors.

Duality gap: with ``g = min over p of objective(p) + multipliers @ canonical_metric(p)``, thresholds left out, the dual
value of the problem is ``g - multipliers @ canonical_thresholds`` for either sense of a constraint (a "at least b" has
canonical metric -value and canonical threshold -b, so its term reads ``+ multiplier * b``). The gap is the objective
minus that: >= 0 for every model that meets its constraints, and 0 at the optimum. On the simplex the objective is the
largest violation, and the same formula holds.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike

from dualsweep.constraints.checks import check_keys, checked_number, checked_vector
from dualsweep.constraints.lagrangian import above_level, complementarity_residual, min_max_level
from dualsweep.constraints.multipliers import DualState
from dualsweep.constraints.problem import Problem

VERDICTS = ("feasible", "infeasible", "undecided")
TEXTS = ("saturated", "reasons", "symptoms")  # fields of a certificate that are tuples of text
FEWEST_DRAWS = 10  # below it the small-sample correction leaves the joint intervals more than 1 % too narrow


@dataclass(frozen=True, kw_only=True)
class Certificate:
    """Verdict over all constraints together; violations in canonical units (<= 0 satisfied).

    ``worst_constraint`` has the largest estimated violation; ``interval`` is its confidence interval and ``intervals``
    has them all, jointly at ``confidence``. Without constraints these are None or empty and the verdict is feasible.
    In a min-max problem all of these are violations above ``level``, which is ``multipliers @ violation``.
    ``duality_gap`` is in objective units, None where no dual value is known; ``symptoms`` are signs of a
    parametrisation gap in the trace, as text (symptoms.py).
    """

    verdict: str
    worst_constraint: str | None
    worst_violation: float | None
    stderr: float | None
    interval: tuple[float, float] | None
    confidence: float
    tolerance: float
    complementarity: float
    saturated: tuple[str, ...]
    reasons: tuple[str, ...]
    count: int  # held-out draws behind the worst constraint's estimate
    intervals: dict[str, tuple[float, float]]
    level: float | None = None  # canonical units; None: not a min-max problem
    duality_gap: float | None = None
    duality_gap_stderr: float | None = None
    symptoms: tuple[str, ...] = ()
    no_duality_gap: str | None = None  # why there is none

    def __post_init__(self) -> None:
        if self.verdict not in VERDICTS:
            raise ValueError(f"verdict={self.verdict!r}: give one of {list(VERDICTS)}")

    @property
    def feasible(self) -> bool:
        """True only where it is shown; undecided is not feasible."""
        return self.verdict == "feasible"

    def to_dict(self) -> dict:
        """JSON-able, tuples as lists."""
        data = asdict(self)
        data["interval"] = None if self.interval is None else list(self.interval)
        data["intervals"] = {name: list(bounds) for name, bounds in self.intervals.items()}
        return {**data, **{key: list(data[key]) for key in TEXTS}}

    @classmethod
    def from_dict(cls, data: Mapping) -> "Certificate":
        """The inverse of ``to_dict``; what certificates did not have yet when ``data`` was stored takes its default."""
        later = {f.name for f in fields(cls) if f.default is not MISSING}
        required = {f.name for f in fields(cls)} - later
        check_keys(data, what="certificate", required=required, optional=later)
        interval = None if data["interval"] is None else tuple(data["interval"])
        intervals = {name: tuple(bounds) for name, bounds in data["intervals"].items()}
        lists = {key: tuple(data[key]) for key in TEXTS if key in data}
        return cls(**{**data, **lists, "interval": interval, "intervals": intervals})


def certify(
    problem: Problem,
    state: DualState,
    violation: ArrayLike,
    stderr: ArrayLike,
    count: int | ArrayLike,
    tolerance: float,
    confidence: float = 0.95,
    *,
    objective: tuple[float, float] | None = None,
    dual_value: tuple[float, float] | None = None,
    no_dual_value: str | None = None,
    symptoms: Iterable[object] = (),
) -> Certificate:
    """Feasible if every violation is shown to be <= tolerance, infeasible if one is shown to be above, else undecided.

    Two-sided intervals hold jointly at ``confidence`` (Bonferroni over the constraints), so a feasible verdict is wrong
    with probability at most 1 - confidence. Relaxations do not count: a threshold met only relaxed is reported so.
    In the simplex domain a constraint is held if its violation is at most the tolerance above the level.

    Args:
        violation, stderr: held-out estimates in canonical units, shape (num_constraints,); stderr >= 0.
        count: independent draws behind each estimate, one number or one each; widens the interval for small samples, and
            decides nothing below ten. 0 with a standard error of 0: exact.
        tolerance: >= 0, canonical units.
        confidence: in (0, 1).
        objective: value of the objective at the model and its standard error; on the simplex, the largest violation.
        dual_value: g at ``state.multipliers`` without the thresholds (module docstring) and its standard error. With
            both a duality gap is reported; its standard error takes the two estimates to be independent.
        no_dual_value: why there is no dual value, kept as text.
        symptoms: what ``find_symptoms`` saw, kept as text.
    Raises: ValueError naming the constraints with a non-finite number, or a bad shape or range.
    """
    tolerance = checked_number(tolerance, field="feasibility_tolerance", at_least=0)
    confidence = checked_number(confidence, field="confidence", above=0, below=1)
    names = problem.names
    if state.names != names:
        raise ValueError(f"dual state is for {list(state.names)}, the problem has {list(names)}; give its own state")
    violation = checked_vector(violation, names, what="violation")
    stderr = checked_vector(stderr, names, what="standard error")
    if (stderr < 0).any():
        raise ValueError(f"stderr={stderr.tolist()}: give standard errors >= 0")
    counts = np.full(len(names), count) if np.ndim(count) == 0 else np.array(count)
    counts = checked_vector(counts, names, what="count").astype(int)

    gap, gap_stderr = _duality_gap(problem, state, objective, dual_value)
    complementarity = complementarity_residual(state, violation, problem.domain)
    mask = problem.domain.saturated(state.multipliers)
    saturated = tuple(name for name, held in zip(names, mask, strict=True) if held)
    shared = {
        "confidence": confidence,
        "tolerance": tolerance,
        "complementarity": complementarity,
        "saturated": saturated,
        "duality_gap": gap,
        "duality_gap_stderr": gap_stderr,
        "no_duality_gap": no_dual_value if gap is None else None,
        "symptoms": tuple(str(symptom) for symptom in symptoms),
    }
    if not names:
        return Certificate(
            verdict="feasible",
            worst_constraint=None,
            worst_violation=None,
            stderr=None,
            interval=None,
            reasons=("no constraints",),
            count=0,
            intervals={},
            **shared,
        )

    level = min_max_level(state.multipliers, violation, problem.domain)
    above = ""
    if level is not None:
        violation, stderr = above_level(state.multipliers, violation, stderr)
        weighing = counts[state.multipliers > 0].min(initial=counts.max())
        counts = np.minimum(counts, weighing)  # the level is part of every estimate
        above = f" above the level {level:.4g}"
    half_width = student_quantile(1 - (1 - confidence) / (2 * len(names)), counts) * stderr
    low, high = violation - half_width, violation + half_width
    exact = (stderr == 0) & (counts == 0)  # one draw has no spread either
    too_few = (counts < FEWEST_DRAWS) & ~exact
    shown_met = (high <= tolerance) & ~too_few
    shown_violated = (low > tolerance) & ~too_few
    verdict = "infeasible" if shown_violated.any() else "feasible" if shown_met.all() else "undecided"

    reasons = []
    for i, constraint in enumerate(problem.constraints):
        interval = f"{violation[i]:.4g} [{low[i]:.4g}, {high[i]:.4g}]{above}"
        if too_few[i]:
            reasons.append(f"{names[i]}: only {counts[i]} draws; at least {FEWEST_DRAWS} are needed")
        elif shown_violated[i]:
            reasons.append(f"{names[i]}: violation {interval} lies above the tolerance {tolerance:.4g}")
        elif not shown_met[i]:
            reasons.append(
                f"{names[i]}: violation {interval} straddles the tolerance {tolerance:.4g}; draw more samples"
            )
        relaxation = state.relaxations[i]
        if relaxation > 0 and not shown_met[i] and violation[i] <= relaxation + tolerance:
            reached = constraint.to_user(constraint.canonical_threshold + relaxation)
            reasons.append(
                f"{names[i]}: its threshold was relaxed by {relaxation:.4g} to {reached:.4g} ({constraint.unit})"
            )
    reasons += [f"{name}: its multiplier sits at the limit of its domain; ask for less" for name in saturated]
    if verdict == "feasible":
        reasons.insert(0, f"every violation is shown to be at most {tolerance:.4g}{above}")

    worst = int(np.argmax(violation))
    return Certificate(
        verdict=verdict,
        worst_constraint=names[worst],
        worst_violation=float(violation[worst]),
        stderr=float(stderr[worst]),
        interval=(float(low[worst]), float(high[worst])),
        reasons=tuple(reasons),
        count=int(counts[worst]),
        intervals={name: (float(a), float(b)) for name, a, b in zip(names, low, high, strict=True)},
        level=None if level is None else float(level),
        **shared,
    )


def _duality_gap(
    problem: Problem,
    state: DualState,
    objective: tuple[float, float] | None,
    dual_value: tuple[float, float] | None,
) -> tuple[float | None, float | None]:
    """``objective - (dual_value - multipliers @ thresholds)`` and its standard error; None without either."""
    checked = []
    for field, estimate in (("objective", objective), ("dual_value", dual_value)):
        if estimate is not None:
            value, stderr = estimate
            value = checked_number(value, field=field)
            checked.append((value, checked_number(stderr, field=f"{field} stderr", at_least=0)))
    if len(checked) < 2:
        return None, None
    (primal, primal_stderr), (dual, dual_stderr) = checked
    gap = primal - (dual - float(state.multipliers @ problem.thresholds))
    return gap, math.hypot(primal_stderr, dual_stderr)


def student_quantile(probability: float, counts: np.ndarray) -> np.ndarray:
    """Student's t quantile for counts - 1 degrees of freedom, expanded about the normal one.

    At most 1 % too small from ten draws on, for up to ten constraints at 95 % together (measured).
    Source: Abramowitz and Stegun 26.7.5, first two terms.
    """
    z = NormalDist().inv_cdf(probability)
    freedom = np.maximum(counts - 1, 1)
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
