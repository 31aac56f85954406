"""Checks shared by this package: every refusal names the field, the value and a remedy."""

import math
from collections.abc import Collection, Mapping, Sequence
from numbers import Real

import numpy as np
from numpy.typing import ArrayLike, NDArray


class NonFiniteError(ValueError):
    """A number of a run was NaN or infinite: nothing moved by it. The attempt is void, not the configuration."""


def checked_vector(values: ArrayLike, names: Sequence[str], *, what: str) -> NDArray[np.float64]:
    """A read-only float64 copy of ``values``, shape (len(names),), every entry finite.

    Raises: ValueError naming ``what`` for a wrong shape; NonFiniteError naming the entries at fault.
    """
    vector = np.array(values, dtype=np.float64)
    if vector.shape != (len(names),):
        raise ValueError(f"{what} has shape {vector.shape}, expected {(len(names),)} for {list(names)}")
    if not np.isfinite(vector).all():
        bad = [name for name, value in zip(names, vector, strict=True) if not np.isfinite(value)]
        raise NonFiniteError(f"non-finite {what} for {bad}; stop the run and look at its last batch")
    vector.flags.writeable = False
    return vector


def is_number(value: object) -> bool:
    """True for a finite int or float; a bool is not a number here (YAML's ``yes`` would be 1)."""
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def checked_number(
    value: object,
    *,
    field: str,
    above: float | None = None,
    at_least: float | None = None,
    below: float | None = None,
    at_most: float | None = None,
) -> float:
    """``value`` as a float if it is a finite number in the given range.

    Raises: ValueError naming ``field``, the value and the range.
    """
    parts = ((above, ">"), (at_least, ">="), (below, "<"), (at_most, "<="))
    wanted = " and ".join(f"{sign} {limit:g}" for limit, sign in parts if limit is not None)
    remedy = f"give a finite number{' ' + wanted if wanted else ''}"
    if not is_number(value):
        raise ValueError(f"{field}={value!r}: {remedy}")
    number = float(value)
    inside = (
        (above is None or number > above)
        and (at_least is None or number >= at_least)
        and (below is None or number < below)
        and (at_most is None or number <= at_most)
    )
    if not inside:
        raise ValueError(f"{field}={value!r}: {remedy}")
    return number


def checked_count(value: object, *, field: str, at_least: int = 0) -> int:
    """``value`` as an int if it is a whole number of at least ``at_least``.

    Raises: ValueError naming ``field``, the value and the range.
    """
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < at_least:
        raise ValueError(f"{field}={value!r}: give a whole number >= {at_least}")
    return int(value)


def check_keys(data: Mapping, *, what: str, required: Collection[str], optional: Collection[str] = ()) -> None:
    """Refuses a mapping with missing or unknown keys by their names.

    Raises: ValueError naming ``what``, the keys at fault and the known ones.
    """
    if not isinstance(data, Mapping):
        raise ValueError(f"{what}={data!r}: expected a mapping with the keys {sorted(required)}")
    missing = sorted(set(required) - set(data))
    unknown = sorted(set(map(str, data)) - set(required) - set(optional))
    if missing or unknown:
        known = sorted({*required, *optional})
        raise ValueError(f"{what}: missing keys {missing}, unknown keys {unknown}; the known keys are {known}")
