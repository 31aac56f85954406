"""From what a user writes under ``thresholds`` to grid points with stable ids and readable labels.

Forms: ``grid`` (product of axes), ``list`` (points one by one), ``random`` (points drawn from ranges with a seed) and
``search`` (axes for Ray Tune, only checked here). An axis is a constraint or a group; a group's value goes to each of
its constraints. An axis of a grid is a list, ``{linspace: [lo, hi, n]}`` or ``{logspace: [lo, hi, n]}`` (lo and hi are
values, not exponents); of a random form ``{uniform: [lo, hi]}`` or ``{loguniform: [lo, hi]}``. In the units loss, nats
and likelihood_ratio any of these may stand below ``factor``, and then multiplies the pretrained model's value.
"""

import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from dualsweep.constraints.checks import check_keys, checked_count, checked_number, is_number
from dualsweep.constraints.problem import (
    FACTOR_UNITS,
    UNITS,
    factor_error,
    resolved_sense,
    share_sum_error,
    threshold_error,
)

FORMS = ("grid", "list", "random", "search")
RANGES = ("uniform", "loguniform")
SEARCH_RANGES = (*RANGES, "quniform", "qloguniform")

Value = float | dict[str, float]  # a number, or {"factor": f} of the pretrained model's value
Groups = Mapping[str, Sequence[str]]


class Scale(NamedTuple):
    """What the numbers of a spec mean."""

    unit: str
    sense: str  # "<=" or ">="

    @property
    def sums_to_one(self) -> bool:
        """Shares to reach must leave something for the rest."""
        return self.unit == "share" and self.sense == ">="


FACTORS = Scale("loss", "<=")  # factors lie in the range of a loss


@dataclass(frozen=True)
class GridPoint:
    """Thresholds of one trial in the user's unit, by constraint; ``id`` depends on nothing but them and the unit."""

    id: str
    label: str
    thresholds: dict[str, Value]


def grid_points(
    spec: Mapping,
    constraint_groups: Groups,
    unit: str,
    names: Sequence[str] | None = None,
    *,
    sense: str | None = None,
) -> list[GridPoint] | None:
    """The grid points a spec asks for, in the order written (axes sorted by name, the last one fastest).

    Args:
        spec: one of the forms above, e.g. ``{"grid": {"minority": [0.05, 0.1]}}``; a ``unit`` beside it must agree.
        constraint_groups: group name -> its constraints.
        unit: unit of every threshold.
        names: all constraints; default the members of the groups. Each must get exactly one value a point.
        sense: "<=" or ">=" for every threshold; None: the unit's own.
    Returns: the points, or None for a ``search``, whose points Ray Tune chooses.
    Raises: ValueError naming the path, the value and the remedy.
    """
    if unit not in UNITS:
        raise ValueError(f"thresholds.unit={unit!r}: give one of {list(UNITS)}")
    check_keys(spec, what="thresholds", required=(), optional=(*FORMS, "unit"))
    if spec.get("unit", unit) != unit:
        raise ValueError(f"thresholds.unit={spec['unit']!r}: expected {unit!r}; give one unit")
    forms = [form for form in FORMS if form in spec]
    if len(forms) != 1:
        raise ValueError(f"thresholds: found {forms}; give exactly one of {list(FORMS)}")
    names, scale = _all_names(constraint_groups, names), Scale(unit, resolved_sense(unit, sense))
    form, path = forms[0], f"thresholds.{forms[0]}"
    if form == "search":
        _check_search(spec[form], constraint_groups, scale, names)
        return None
    expand = {"grid": _product, "list": _one_by_one, "random": _drawn}[form]
    points, seen = [], {}
    for where, values in expand(spec[form], constraint_groups, scale, names):
        point = grid_point(values, constraint_groups, unit, names, path=where, sense=sense)
        if point.id in seen:
            raise ValueError(f"{where} ({point.label}): repeats {seen[point.id]}; give each point once")
        seen[point.id] = where
        points.append(point)
    if not points:
        raise ValueError(f"{path}={spec[form]!r}: no points; give at least one")
    return points


def grid_point(
    values: Mapping[str, Value],
    constraint_groups: Groups,
    unit: str,
    names: Sequence[str] | None = None,
    *,
    path: str = "thresholds",
    sense: str | None = None,
) -> GridPoint:
    """One point from a value an axis (also what Ray Tune hands over for one trial of a ``search``).

    Raises: ValueError on a value out of range, an unknown axis, or a constraint with no or two values.
    """
    names, scale = _all_names(constraint_groups, names), Scale(unit, resolved_sense(unit, sense))
    members = _members(values, constraint_groups, names, path)
    checked = {axis: _checked_value(values[axis], scale, f"{path}.{axis}") for axis in sorted(values)}
    thresholds = {name: checked[axis] for axis in checked for name in members[axis]}
    error = share_sum_error(thresholds) if scale.sums_to_one else None
    if error:
        raise ValueError(f"{path}: {error}")
    ordered = {name: thresholds[name] for name in names}
    digest = hashlib.sha256(json.dumps([unit, ordered], sort_keys=True).encode()).hexdigest()[:8]
    label = ", ".join(_label(axis, value, scale) for axis, value in checked.items())
    return GridPoint(id=f"{unit}-{digest}", label=label, thresholds=ordered)


def _all_names(groups: Groups, names: Sequence[str] | None) -> tuple[str, ...]:
    """Sorted, so that neither ids nor the order of thresholds depend on how the caller lists them."""
    return tuple(sorted(set(names if names is not None else itertools.chain.from_iterable(groups.values()))))


def _members(axes: Mapping, groups: Groups, names: Sequence[str], path: str) -> dict[str, tuple[str, ...]]:
    """The constraints each axis sets; every constraint exactly once."""
    if not isinstance(axes, Mapping):
        raise ValueError(f"{path}={axes!r}: give a mapping from axis to values; axes are {sorted({*groups, *names})}")
    members, owner = {}, {}
    for axis in sorted(map(str, axes)):
        if axis not in groups and axis not in names:
            raise ValueError(f"{path}.{axis}: unknown axis; the known axes are {sorted({*groups, *names})}")
        members[axis] = tuple(groups[axis]) if axis in groups else (axis,)
        for name in members[axis]:
            if name in owner:
                raise ValueError(f"{path}.{axis}: {name!r} already gets a value from {owner[name]!r}; drop one of them")
            owner[name] = axis
    missing = [name for name in names if name not in owner]
    if missing:
        raise ValueError(f"{path}: no threshold for {missing}; add an axis for each, or for a group that holds them")
    return members


def _checked_value(value: object, scale: Scale, path: str) -> Value:
    if isinstance(value, Mapping):
        if set(value) != {"factor"} or not is_number(value["factor"]) or value["factor"] <= 0:
            units = ", ".join(FACTOR_UNITS)
            raise ValueError(f"{path}={value!r}: only {{factor: number > 0}} in the units {units}; give a number")
        error = factor_error(scale.unit)
        if error:
            raise ValueError(f"{path}={value!r}: {error}")
        return {"factor": float(value["factor"])}
    # whether 0 may be relaxed is for the Constraint to say
    error = threshold_error(value, scale.unit, relaxed=True, sense=scale.sense)
    if error:
        raise ValueError(f"{path}={value!r}: {error}")
    return float(value)


def _label(axis: str, value: Value, scale: Scale) -> str:
    if isinstance(value, dict):
        return f"{axis} {scale.sense} {value['factor']:.4g} x pretrained {FACTOR_UNITS[scale.unit]}"
    suffix = {"nats": " nats", "loss": " loss", "reward": " sd"}.get(scale.unit, "")
    return f"{axis} {scale.sense} {value:.4g}{suffix}"


Expanded = Iterator[tuple[str, dict[str, Value]]]


def _product(axes, groups, scale, names) -> Expanded:
    path = "thresholds.grid"
    _members(axes, groups, names, path)
    columns = [_grid_axis(axes[axis], scale, f"{path}.{axis}") for axis in sorted(axes)]
    for combination in itertools.product(*columns):
        yield path, dict(zip(sorted(axes), combination, strict=True))


def _grid_axis(values: object, scale: Scale, path: str) -> list[Value]:
    if isinstance(values, Mapping) and set(values) == {"factor"}:
        return [
            _checked_value({"factor": f}, scale, path) for f in _grid_axis(values["factor"], FACTORS, f"{path}.factor")
        ]
    if isinstance(values, Mapping):
        if len(values) != 1 or next(iter(values)) not in ("linspace", "logspace"):
            raise ValueError(f"{path}={values!r}: give a list, {{linspace: [lo, hi, n]}} or {{logspace: [lo, hi, n]}}")
        kind, parameters = next(iter(values.items()))
        if not isinstance(parameters, Sequence) or len(parameters) != 3:
            raise ValueError(f"{path}.{kind}={parameters!r}: give [lo, hi, number of values]")
        low, high = _bounds(parameters[:2], scale, f"{path}.{kind}", positive=kind == "logspace")
        count = checked_count(parameters[2], field=f"{path}.{kind}[2]", at_least=2)
        # rounded to 12 significant digits, so that ids do not hang on the last bit of a platform's exp and log
        spaced = (np.geomspace if kind == "logspace" else np.linspace)(low, high, count)
        values = [float(f"{value:.12g}") for value in spaced]
    if not isinstance(values, Sequence) or isinstance(values, str) or not len(values):
        raise ValueError(f"{path}={values!r}: give a list with at least one value")
    return [_checked_value(value, scale, f"{path}[{i}]") for i, value in enumerate(values)]


def _bounds(bounds: object, scale: Scale, path: str, *, positive: bool) -> tuple[float, float]:
    """Both ends of a range, each a possible threshold, low < high."""
    if not isinstance(bounds, Sequence) or isinstance(bounds, str) or len(bounds) != 2:
        raise ValueError(f"{path}={bounds!r}: give [lo, hi]")
    low, high = (_checked_value(bound, scale, f"{path}[{i}]") for i, bound in enumerate(bounds))
    if isinstance(low, dict) or isinstance(high, dict):
        raise ValueError(f"{path}={bounds!r}: write factor outside the range, {{factor: {{...}}}}")
    if not low < high:
        raise ValueError(f"{path}={list(bounds)}: lo must be below hi; swap them or use a list")
    if positive and low <= 0:
        raise ValueError(f"{path}[0]={low!r}: a logarithmic range must start above 0")
    return low, high


def _one_by_one(points, groups, scale, names) -> Expanded:
    path = "thresholds.list"
    if not isinstance(points, Sequence) or isinstance(points, str):
        raise ValueError(f"{path}={points!r}: give a list of mappings from axis to value")
    for i, values in enumerate(points):
        if not isinstance(values, Mapping):
            raise ValueError(f"{path}[{i}]={values!r}: give a mapping from axis to value")
        yield f"{path}[{i}]", dict(values)


def _drawn(spec, groups, scale, names) -> Expanded:
    path = "thresholds.random"
    check_keys(spec, what=path, required={"points", "axes"}, optional={"seed"})
    count = checked_count(spec["points"], field=f"{path}.points", at_least=1)
    seed = checked_count(spec.get("seed", 0), field=f"{path}.seed")
    members = _members(spec["axes"], groups, names, f"{path}.axes")
    columns, upper = {}, {}
    for axis in members:
        columns[axis], upper[axis] = _drawn_axis(spec["axes"][axis], scale, f"{path}.axes.{axis}", axis, seed, count)
    _check_upper_corner(upper, members, scale, f"{path}.axes")
    for i in range(count):
        yield f"{path} (point {i})", {axis: column[i] for axis, column in columns.items()}


def _drawn_axis(spec: object, scale: Scale, path: str, axis: str, seed: int, count: int) -> tuple[list[Value], Value]:
    """``count`` values of one axis and its upper end; each axis has its own generator, so their order is free."""
    if isinstance(spec, Mapping) and set(spec) == {"factor"}:
        _checked_value({"factor": 1.0}, scale, path)  # refuses a factor where the unit has none
        values, upper = _drawn_axis(spec["factor"], FACTORS, f"{path}.factor", axis, seed, count)
        return [{"factor": value} for value in values], {"factor": upper}
    if not isinstance(spec, Mapping) or len(spec) != 1 or next(iter(spec)) not in RANGES:
        raise ValueError(f"{path}={spec!r}: give {{uniform: [lo, hi]}} or {{loguniform: [lo, hi]}}")
    kind, bounds = next(iter(spec.items()))
    low, high = _bounds(bounds, scale, f"{path}.{kind}", positive=kind == "loguniform")
    key = int.from_bytes(hashlib.sha256(axis.encode()).digest()[:8], "big")
    uniform = np.random.default_rng([seed, key]).random(count)
    spread = low * (high / low) ** uniform if kind == "loguniform" else low + (high - low) * uniform
    return [float(f"{value:.12g}") for value in spread], high


def _check_search(spec: object, groups: Groups, scale: Scale, names: Sequence[str]) -> None:
    path = "thresholds.search"
    if not isinstance(spec, Mapping) or "axes" not in spec:
        raise ValueError(f"{path}={spec!r}: give {{axes: {{axis: {{uniform: [lo, hi]}}}}, ...}}")
    members = _members(spec["axes"], groups, names, f"{path}.axes")
    upper = {axis: _search_upper(spec["axes"][axis], scale, f"{path}.axes.{axis}") for axis in members}
    _check_upper_corner(upper, members, scale, f"{path}.axes")


def _search_upper(spec: object, scale: Scale, path: str) -> Value:
    """The largest value of one search axis, after checking all of it."""
    if isinstance(spec, Mapping) and set(spec) == {"factor"}:
        _checked_value({"factor": 1.0}, scale, path)
        return {"factor": _search_upper(spec["factor"], FACTORS, f"{path}.factor")}
    if not isinstance(spec, Mapping) or len(spec) != 1 or next(iter(spec)) not in (*SEARCH_RANGES, "choice"):
        raise ValueError(f"{path}={spec!r}: give one of {[*SEARCH_RANGES, 'choice']}, e.g. {{uniform: [lo, hi]}}")
    kind, values = next(iter(spec.items()))
    if kind == "choice":
        if not isinstance(values, Sequence):
            raise ValueError(f"{path}.choice={values!r}: give a list with at least one value")
        choices = _grid_axis(values, scale, f"{path}.choice")
        return max(choices, key=lambda value: value["factor"] if isinstance(value, dict) else value)
    if kind in RANGES:
        return _bounds(values, scale, f"{path}.{kind}", positive="log" in kind)[1]
    if not isinstance(values, Sequence) or len(values) != 3:
        raise ValueError(f"{path}.{kind}={values!r}: give [lo, hi, rounding step]")
    checked_number(values[2], field=f"{path}.{kind}[2]", above=0)
    return _bounds(values[:2], scale, f"{path}.{kind}", positive="log" in kind)[1]


def _check_upper_corner(upper: Mapping[str, Value], members: Mapping, scale: Scale, path: str) -> None:
    """Refuses share ranges whose upper ends cannot hold together: some drawn point would be impossible."""
    if scale.sums_to_one:
        error = share_sum_error({name: upper[axis] for axis in members for name in members[axis]})
        if error:
            raise ValueError(f"{path}: at the upper ends the {error}")
