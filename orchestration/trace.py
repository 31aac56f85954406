"""The trace of a trial: one row a dual step, its Arrow schema, Parquet at rest, and its rows as named scalars.

In memory a row is a plain dict with the keys of ``COLUMNS``; the vectors hold one entry a constraint, in the order of
the constraint names that the Parquet file keeps in its schema metadata. An unconstrained run has empty vectors.
"""

import hashlib
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from dualsweep.trainers.store import in_place_of

INTEGER_COLUMNS = {
    "dual_step": pa.int64(),
    "primal_step": pa.int64(),
    "attempt": pa.int32(),
    "workers": pa.int32(),
    "lag": pa.int32(),  # dual steps that the multipliers of the primal steps after this row trail it: 1 if pipelined
}
SCALAR_COLUMNS = (
    "wall_time",
    "lr",
    "grad_norm",
    "objective",
    "objective_stderr",
    "lagrangian",
    "infeasibility",
    "complementarity",
    "stationarity",
    "kkt_residual",
)
VECTOR_COLUMNS = (
    "multipliers",
    "relaxations",
    "metrics",
    "metric_stderrs",
    "thresholds",
    "violations",
    "violation_stderrs",
    "smoothed_violations",
)
COLUMNS = (*INTEGER_COLUMNS, *SCALAR_COLUMNS, *VECTOR_COLUMNS)

# What a tracker draws as curves: everything except bookkeeping and what the thresholds in the parameters already say.
_CURVES = tuple(name for name in SCALAR_COLUMNS if name not in ("wall_time", "grad_norm"))
_CURVES_PER_CONSTRAINT = {
    "multipliers": "multiplier",
    "violations": "violation",
    "violation_stderrs": "violation_stderr",
    "relaxations": "relaxation",
    "metrics": "metric",
}


def trace_schema(constraints: Sequence[str], trial_id: str) -> pa.Schema:
    """Arrow schema of a trace; its metadata carries the constraint names (JSON list) and the trial id."""
    vector = pa.list_(pa.field("item", pa.float64(), nullable=False))
    fields = [
        *(pa.field(name, kind, nullable=False) for name, kind in INTEGER_COLUMNS.items()),
        *(pa.field(name, pa.float64(), nullable=False) for name in SCALAR_COLUMNS),
        *(pa.field(name, vector, nullable=False) for name in VECTOR_COLUMNS),
    ]
    return pa.schema(fields, metadata={"constraints": json.dumps(list(constraints)), "trial_id": trial_id})


def trace_table(rows: Sequence[Mapping[str, Any]], *, constraints: Sequence[str], trial_id: str) -> pa.Table:
    """Rows in order of their dual step as an Arrow table; a scalar that was not measured (None) becomes NaN.

    Raises: ValueError if a row lacks a column or has an unknown one, if a vector has another length than
        `constraints`, or if the dual steps are not 1, 2, ..., n: a trace with a step twice or missing is wrong.
    """
    _check_dual_steps([row.get("dual_step") for row in rows], trial_id)
    records = [_record(row, constraints, trial_id) for row in rows]
    return pa.Table.from_pylist(records, schema=trace_schema(constraints, trial_id))


def write_trace(
    rows: Sequence[Mapping[str, Any]],
    target: str | os.PathLike[str] | BinaryIO,
    *,
    constraints: Sequence[str],
    trial_id: str,
) -> None:
    """Write the trace as Parquet to a local path (complete or absent, never half) or to an open binary stream.

    A pyarrow filesystem gives such a stream with ``filesystem.open_output_stream(path)``.
    Raises: ValueError as in `trace_table`.
    """
    table = trace_table(rows, constraints=constraints, trial_id=trial_id)
    if not isinstance(target, (str, os.PathLike)):
        pq.write_table(table, target)
        return
    with in_place_of(Path(target)) as part:
        pq.write_table(table, part)


def read_trace(source: str | os.PathLike[str] | BinaryIO) -> list[dict[str, Any]]:
    """The rows of a written trace, equal to those given to `write_trace` (None came back as NaN).

    Raises: ValueError if the file is no trace or its dual steps are not 1, 2, ..., n. FileNotFoundError if absent.
    """
    table = _read_table(source)
    rows = table.select(list(COLUMNS)).to_pylist()
    _check_dual_steps([row["dual_step"] for row in rows], _metadata(table.schema)[1])
    return rows


def read_trace_names(source: str | os.PathLike[str] | BinaryIO) -> tuple[tuple[str, ...], str]:
    """The constraint names, in the order of the vectors, and the trial id of a written trace."""
    return _metadata(_read_table(source).schema)


def row_metrics(row: Mapping[str, Any], constraints: Sequence[str]) -> dict[str, float]:
    """The scalars of one row under the keys a tracker shows: ``objective``, ``violation/<constraint>`` and so on.

    Numbers that are not finite are left out: a gap in a curve is honest, a NaN or a clipped infinity is not.
    """
    curves = {name: row.get(name) for name in _CURVES}
    for column, prefix in _CURVES_PER_CONSTRAINT.items():
        for name, value in zip(constraints, row.get(column, ()), strict=True):
            curves[metric_key(prefix, name)] = value
    return {key: float(value) for key, value in curves.items() if value is not None and math.isfinite(value)}


def metric_key(prefix: str, name: str) -> str:
    """``prefix/name`` within what MLflow accepts as the name of a metric."""
    return f"{prefix}/{clean_name(name, 249 - len(prefix))}"


def clean_name(name: str, limit: int = 250) -> str:
    """`name` in letters, digits, ``_-.`` and spaces, at most `limit` characters, unchanged where it already is.

    A name that had to be changed gets a short hash of the original, so two names never fall together.
    """
    clean = re.sub(r"[^\w\-. ]", "_", name, flags=re.ASCII)
    if clean == name and len(name) <= limit and name.strip("."):
        return name
    return f"{clean[: limit - 7].strip('.')}-{hashlib.sha256(name.encode()).hexdigest()[:6]}"


def _record(row: Mapping[str, Any], constraints: Sequence[str], trial_id: str) -> dict[str, Any]:
    """One row with plain Python numbers, checked for its columns and the lengths of its vectors."""
    where = f"trace of trial {trial_id!r}, dual step {row['dual_step']}"
    if missing := [name for name in COLUMNS if name not in row]:
        raise ValueError(f"{where}: columns {missing} are missing")
    if unknown := [name for name in row if name not in COLUMNS]:
        raise ValueError(f"{where}: unknown columns {unknown}; known: {list(COLUMNS)}")
    record: dict[str, Any] = {name: int(row[name]) for name in INTEGER_COLUMNS}
    record |= {name: math.nan if row[name] is None else float(row[name]) for name in SCALAR_COLUMNS}
    for name in VECTOR_COLUMNS:
        record[name] = [float(value) for value in row[name]]
        if len(record[name]) != len(constraints):
            raise ValueError(f"{where}: {name} has {len(record[name])} entries for constraints {list(constraints)}")
    return record


def _check_dual_steps(steps: Sequence[Any], trial_id: str) -> None:
    """Refuse anything but 1, 2, ..., n and say whether a step is repeated, missing or out of order."""
    for expected, step in enumerate(steps, start=1):
        if step != expected:
            fault = "repeated" if step in steps[: expected - 1] else "out of order" if expected in steps else "missing"
            culprit = step if fault == "repeated" else expected
            raise ValueError(
                f"trace of trial {trial_id!r}: dual step {culprit} is {fault} (row {expected} has dual step {step}); "
                "give every dual step once, from 1 on, in order"
            )


def _read_table(source: str | os.PathLike[str] | BinaryIO) -> pa.Table:
    try:
        # A single file and nothing else: the dataset reader would take columns out of folder names such as `a=b`.
        table = pq.ParquetFile(source).read()
    except pa.ArrowInvalid as error:
        raise ValueError(f"{source}: not a readable Parquet file ({error}); write the trace again") from error
    if lacking := [name for name in COLUMNS if name not in table.column_names]:
        raise ValueError(f"{source}: not a trace, columns {lacking} are missing")
    return table


def _metadata(schema: pa.Schema) -> tuple[tuple[str, ...], str]:
    metadata = schema.metadata or {}
    if b"constraints" not in metadata or b"trial_id" not in metadata:
        raise ValueError("not a trace: its schema metadata lack the constraint names or the trial id")
    return tuple(json.loads(metadata[b"constraints"])), metadata[b"trial_id"].decode()
