"""What a finished trial leaves: evaluation on fresh draws, certificate, exact answer beside it, and its files."""

import os
import shutil
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dualsweep.constraints import Constraint, DualState, Finding, Problem, certify
from dualsweep.constraints.senses import threshold_sense
from dualsweep.constraints.symptoms import find_symptoms
from dualsweep.datasets import ConstrainedData
from dualsweep.trainers.assignment import Assignment
from dualsweep.trainers.dual_client import Reply
from dualsweep.trainers.evaluate import EVALUATION_COUNTER
from dualsweep.trainers.methods import METHODS, Method
from dualsweep.trainers.metrics import Measurement
from dualsweep.trainers.samplers import starting_noise
from dualsweep.trainers.store import Store, in_place_of, sync, sync_folder, writing_to
from dualsweep.trainers.workspace import Workspace, write_atomically, write_json

DENSITY_CELLS = 161


def late_average(
    names: Sequence[str], rows: Sequence[dict[str, Any]], key: str, *, last: int | None = None
) -> dict[str, float]:
    """Mean of multipliers or metrics (`key`) over the last third of the dual steps, or the `last` ones: what noise leaves of them."""
    late = [row[key] for row in rows[-(last or max(1, len(rows) // 3)) :]]
    return dict(zip(names, np.mean(late, axis=0).tolist(), strict=True)) if names and late else {}


def trial_summary(
    workspace: Workspace,
    method: Method,
    assignment: Assignment,
    problem: Problem,
    reply: Reply,
    *,
    status: str,
    reason: str | None,
    rows: Sequence[dict[str, Any]],
    finding: Finding | None = None,
    **counts: Any,
) -> dict[str, Any]:
    """The part of a result that needs no evaluation; `rows` are the trace."""
    names = problem.names
    last = finding and finding.confirmed
    state = DualState.from_dict(reply.dual_state) if names else None
    exact = None
    if assignment.kind == "constrained":
        exact = method.exact(problem.constraints, workspace.config["dual"])
    return {
        "trial_id": assignment.trial_id,
        "label": assignment.label,
        "kind": assignment.kind,
        "status": status,
        "error": reason,
        "reason": reason if finding is None else finding.evidence,
        "stopped_by": finding.kind if finding is not None else "scheduler" if status == "stopped" else None,
        "start": assignment.start,
        "method": workspace.config["method"],
        "unit": workspace.config["thresholds"]["unit"],
        "thresholds": assignment.thresholds,
        "fixed_weight": assignment.fixed_weight,
        "multipliers": dict(zip(names, reply.multipliers, strict=True)),
        "averaged_multipliers": late_average(names, rows, "multipliers", last=last),
        "averaged_metrics": late_average(names, rows, "metrics", last=last),  # canonical, as training measured them
        "exact_multipliers": dict(zip(names, exact.multipliers.tolist(), strict=True)) if exact else None,
        "exact_objective": float(exact.objective) if exact else None,
        "relaxations": dict(zip(names, state.relaxations.tolist(), strict=True)) if state else {},
        **counts,
        "objective": None,
        "constraints": [],
        "certificate": None,
        "histogram": None,
        "calibration": workspace.calibration,
    }


def evaluate_trial(
    workspace: Workspace,
    method: Method,
    summary: dict[str, Any],
    problem: Problem,
    reply: Reply,
    rows: list[dict[str, Any]],
    folder: Path,
) -> dict[str, Any]:
    """Judge the trained model on draws that training never used, certify it, and write its folder.

    A dual-only run is judged at its averaged multipliers, a trained one as it is.
    """
    config, data = workspace.config, workspace.data
    evaluation, ema = config["evaluation"], workspace.modules()[1]
    labeller = workspace.evaluation_labeller
    judge = METHODS[config["method"]](workspace.setting(workspace.constraint_names, config["primal"]))
    values = [summary["multipliers"].get(name, 0.0) for name in workspace.constraint_names]
    if not method.trains and summary["averaged_multipliers"]:
        values = list(summary["averaged_multipliers"].values())
    multipliers = torch.tensor(values, dtype=torch.float32, device=workspace.device)
    draws = judge.measure(
        ema,
        multipliers,
        counter=EVALUATION_COUNTER,
        shards=[0],
        counts={0: evaluation["num_samples"]},
        num_sampling_steps=evaluation["num_sampling_steps"],
        labeller=labeller,
    )
    measurement = (
        judge.held_out_measurement(ema, multipliers)
        if draws is None
        else judge.measurement(draws.rows, multipliers.cpu().numpy())
    )
    samples = draws.samples if draws is not None else None
    if samples is None:
        start = starting_noise(
            seed=config["seed"],
            counter=EVALUATION_COUNTER,
            shards=[0],
            counts={0: evaluation["num_samples"]},
            shape=data.sample_shape,
        )
        samples = judge.sample(
            ema,
            multipliers,
            start,
            num_sampling_steps=evaluation["num_sampling_steps"],
            batch_size=evaluation["batch_size"],
        )
    images = workspace.codec.decode(samples).numpy()
    objective = judge.objective(
        ema, multipliers, evaluation=evaluation, base_errors=lambda: workspace.base_errors(config["seed"])
    )
    result = {
        **summary,
        "objective": {
            "value": objective.value,
            "stderr": objective.stderr,
            "unit": objective.unit,
            "meaning": objective.meaning,
        },
        "constraints": _constraint_rows(workspace, problem, measurement, method, summary["kind"]),
        "histogram": _histogram(workspace, images),
    }
    if summary["kind"] == "constrained":
        canonical = measurement.canonical(problem.constraints)
        dual_value = judge.dual_value(multipliers.cpu().numpy().astype(np.float64))
        symptoms = find_symptoms(rows, names=problem.names, domain=problem.domain, tolerance=evaluation["tolerance"])
        result["certificate"] = certify(
            problem,
            _at(DualState.from_dict(reply.dual_state), values),
            problem.violation(canonical.metrics),
            canonical.stderrs,
            canonical.counts,
            tolerance=evaluation["tolerance"],
            confidence=evaluation["confidence"],
            objective=(objective.absolute or (objective.value, objective.stderr)) if dual_value else None,
            dual_value=dual_value,
            no_dual_value=None if dual_value else judge.no_dual_value,
            symptoms=symptoms,
        ).to_dict()
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "model", lambda part: judge.save(ema, multipliers, part))
    with in_place_of(folder / "samples.npy") as part, open(part, "wb") as file:
        np.save(file, images[: _kept_samples(data, evaluation)].astype(np.float32))
    if objective.errors is not None:
        with in_place_of(folder / "held_out_errors.npy") as part, open(part, "wb") as file:
            np.save(file, objective.errors)
    exact = method.exact(problem.constraints, config["dual"]) if summary["kind"] == "constrained" else None
    if exact is not None and exact.log_density is not None and data.sample_shape == (2,):
        with in_place_of(folder / "exact_density.npz") as part, open(part, "wb") as file:
            np.savez(file, **density_on_grid(exact.log_density, images))
    return result


def density_on_grid(log_density: Callable[[np.ndarray], np.ndarray], samples: np.ndarray) -> dict[str, np.ndarray]:
    """A density in the plane on a square grid around the samples: x, y (cells,) and density (cells, cells), rows along y."""
    low, high = np.quantile(samples, [0.001, 0.999], axis=0)
    centre, half = (low + high) / 2, 0.65 * float((high - low).max())
    x, y = (np.linspace(c - half, c + half, DENSITY_CELLS) for c in centre)
    points = np.stack(np.meshgrid(x, y), axis=-1).reshape(-1, 2)
    return {"x": x, "y": y, "density": np.exp(log_density(points)).reshape(len(y), len(x))}


def _at(state: DualState, multipliers: Sequence[float]) -> DualState:
    return DualState.from_dict({**state.to_dict(), "multipliers": list(multipliers)})


def _kept_samples(data: ConstrainedData, evaluation: dict[str, Any]) -> int:
    """Images for a grid, points for a scatter plot."""
    return evaluation["grid_samples"] if len(data.sample_shape) > 1 else 2000


def _histogram(workspace: Workspace, images: np.ndarray) -> dict[str, Any]:
    data, labeller = workspace.data, workspace.evaluation_labeller
    weights = labeller.label(images)
    counts = np.bincount(weights.argmax(1), minlength=weights.shape[1])
    return {
        "classes": [str(name) for name in data.class_names],
        "prior": [data.prior.get(index, 0.0) for index in range(len(data.class_names))],
        "counts": [int(c) for c in counts],
        "total": int(counts.sum()),
        "classifier": labeller.description,
        "classifier_accuracy": labeller.accuracy,
        "classifier_accuracy_count": labeller.accuracy_count,
    }


def _constraint_rows(
    workspace: Workspace, problem: Problem, measurement: Measurement, method: Method, kind: str
) -> list[dict[str, Any]]:
    asked = {c.name: c for c in problem.constraints} if kind == "constrained" else {}
    unit = workspace.config["thresholds"]["unit"]
    scales = [
        asked.get(name) or Constraint(name=name, unit=unit, threshold=0.5, sense=threshold_sense(method.name, unit))
        for name in workspace.constraint_names
    ]
    measurement = measurement.canonical(scales)
    rows = []
    for scale, metric, stderr, count in zip(
        scales, measurement.metrics, measurement.stderrs, measurement.counts, strict=True
    ):
        threshold = scale.canonical_threshold if scale.name in asked else None
        rows.append(
            {
                "name": scale.name,
                "unit": unit,
                "sense": scale.sense,
                "metric": metric,
                "metric_stderr": stderr,
                "threshold": threshold,
                "user_threshold": scale.threshold if scale.name in asked else None,
                "user_value": scale.to_user(metric),
                "user_stderr": scale.to_user_stderr(metric, stderr),
                "violation": metric - threshold if threshold is not None else None,
                "stderr": stderr,
                "count": count,
            }
        )
    return rows


def publish_base(folder: Path, save: Callable[[Path], None], fingerprint: str, store: Store) -> None:
    """Put a pretrained model where every sweep that shares it looks: the model and base.json in one move, once.

    One that another sweep published in the meantime stays: its trials may be reading it. A remote store has no such move;
    there base.json is written last, and of two sweeps that publish within the same seconds the second one's model counts.
    Args: fingerprint: of the data that it was trained on (`Workspace.fingerprint`).
    Raises: StorageError when it cannot be written.
    """
    if store.exists(folder / "base.json"):
        return
    part = folder.with_name(f"{folder.name}.{uuid.uuid4().hex[:8]}.part{os.getpid()}")  # of machines, too, that share it
    with writing_to(folder, part):
        part.mkdir(parents=True)
        save(part / "model")
        write_json(part / "base.json", {"data": fingerprint})
        if store.uri is not None or not (folder / "base.json").is_file():
            shutil.rmtree(folder, ignore_errors=True)  # incomplete, or never pushed
        sync(part)
        try:
            os.rename(part, folder)
            sync_folder(folder.parent)
        except OSError:
            if not (folder / "base.json").is_file():
                raise
            shutil.rmtree(part, ignore_errors=True)  # another one was first
    store.push(folder / "model")
    store.push(folder / "base.json")


def push_trial(folder: Path, store: Store) -> None:
    """What a trial leaves, to a remote store; result.json and the trace are the driver's."""
    if store.uri is not None:
        for name in ("model", "samples.npy", "held_out_errors.npy", "exact_density.npz"):
            if (folder / name).exists():
                store.push(folder / name)
