"""The numbers of a sweep as tables, one row a trial, a constraint or a dual step, written as CSV and as Parquet."""

import json
from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from dualsweep.orchestration.sweep_record import Sweep, Trial, class_counts, load_sweep, wilson_interval
from dualsweep.orchestration.trace import VECTOR_COLUMNS
from dualsweep.orchestration.units import as_float


def frontier_table(sweep_dir: Path) -> list[dict]:
    """One dict a trial, baselines first and then from the mildest to the strictest request; numbers are nan if unknown.

    ``requested`` and ``achieved`` are user values of the constraint that got least, ``unit`` their unit and ``sense``
    how they compare; ``objective`` is in ``objective_unit``; ``verdict`` is feasible, infeasible, undecided or empty
    where nothing was asked or nothing came out.
    """
    return list(_point_rows(load_sweep(sweep_dir, traces=False)))


def _point_rows(sweep: Sweep) -> Iterable[dict]:
    front = {trial.trial_id for trial in sweep.front()}
    for trial in sweep.trials:
        yield _point_row(trial, trial.trial_id in front)


def _point_row(trial: Trial, on_front: bool) -> dict:
    return {
        "trial_id": trial.trial_id,
        "label": trial.label,
        "kind": trial.kind,
        "status": trial.status,
        "verdict": trial.verdict,
        "on_front": on_front,
        "unit": trial.unit.name,
        "sense": trial.unit.sense,
        "requested": trial.requested,
        "achieved": trial.achieved[0],
        "achieved_stderr": trial.achieved[1],
        "objective": trial.objective,
        "objective_stderr": trial.objective_stderr,
        "objective_unit": (trial.result.get("objective") or {}).get("unit") or "nats",
        "objective_meaning": trial.objective_meaning,
        "exact_objective": trial.exact_objective,
        "fixed_weight": trial.fixed_weight,
        "worst_violation": as_float(trial.certificate.get("worst_violation")),
        "level": trial.level,
        "duality_gap": trial.gap[0],
        "duality_gap_stderr": trial.gap[1],
        "warnings": "; ".join(trial.warnings),
        "started_from": trial.started_from,
        "ended_by": trial.ended_by,
        "primal_steps": trial.result.get("primal_steps"),
        "wall_seconds": as_float(trial.result.get("wall_seconds")),
        "error": trial.error_line,
    }


def write_tables(sweep: Sweep, folder: Path) -> dict[str, Path]:
    """Each table that has rows, as CSV and as Parquet; user values in the user's unit, the rest canonical."""
    tables: dict[str, list[dict]] = {
        name: [] for name in ("points", "trace", "histograms", "certificates", "symptoms", "pretrained")
    }
    for trial, point in zip(sweep.trials, _point_rows(sweep), strict=True):
        who = {"trial_id": trial.trial_id, "label": trial.label}
        tables["points"].append(point | _by_constraint(trial))
        for row in trial.trace:
            scalars = {key: value for key, value in row.items() if key not in VECTOR_COLUMNS}
            # An unconstrained run has one line a dual step, its constraint left empty.
            for index, name in enumerate(trial.trace_names or (None,)):
                entries = {key.removesuffix("s"): row[key][index] for key in VECTOR_COLUMNS} if name else {}
                tables["trace"].append(who | {"constraint": name} | scalars | entries)
        for name, count, total in class_counts(trial):
            low, high = wilson_interval(count, total)
            share = {"share": count / total, "share_low": low, "share_high": high}
            tables["histograms"].append(who | {"class": name, "count": count, "total": total} | share)
        if trial.certificate:
            tables["certificates"].append(who | {key: _cell(value) for key, value in trial.certificate.items()})
        tables["symptoms"] += [who | sign._asdict() for sign in trial.signs]
    for name, value, stderr, count in sweep.pretrained:
        tables["pretrained"].append(
            {"constraint": name, "unit": sweep.unit.name, "value": value, "stderr": stderr, "count": count}
        )
    paths = {}
    for name, rows in tables.items():
        for path in (folder / f"{name}.parquet", folder / f"{name}.csv"):
            path.unlink(missing_ok=True)  # of an earlier report on the same sweep
        if rows:
            columns = dict.fromkeys(key for row in rows for key in row)
            table = pa.table({key: [row.get(key) for row in rows] for key in columns})
            pq.write_table(table, folder / f"{name}.parquet")
            pa.csv.write_csv(table, folder / f"{name}.csv")
            paths |= {path.name: path for path in (folder / f"{name}.parquet", folder / f"{name}.csv")}
    return paths


def _by_constraint(trial: Trial) -> dict[str, float]:
    found = {}
    for row in trial.constraints:
        name = row["name"]
        found |= {f"{what}/{name}": trial.user(row, what) for what in ("threshold", "value", "stderr")}
        for key in ("multipliers", "averaged_multipliers", "exact_multipliers"):
            found[f"{key.removesuffix('s')}/{name}"] = as_float((trial.result.get(key) or {}).get(name))
    return found


def _cell(value: object) -> object:
    """A certificate's entry as one table cell: what CSV cannot nest becomes text."""
    if isinstance(value, dict):
        return json.dumps(value)
    return "; ".join(map(str, value)) if isinstance(value, list) else value
