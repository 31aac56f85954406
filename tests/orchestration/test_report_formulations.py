"""The report in every unit and sense, on made-up sweeps of a laboratory in the plane whose every number is known.

Each constrained trial asks more than the one before: two hold, one is undecided, one does not hold. The numbers come from
``value`` and ``cost`` below, so that what a table, an axis or a sentence says can be compared with what went in.
"""

import csv
import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from dualsweep.constraints import DualState, NonNegative, Problem, Simplex, certify
from dualsweep.constraints.problem import Constraint
from dualsweep.constraints.senses import threshold_sense
from dualsweep.constraints.symptoms import PLATEAU, RETENTION_LOSS, Symptom
from dualsweep.datasets.gaussians import GaussianMixture
from dualsweep.orchestration import figures
from dualsweep.orchestration.report import frontier_table, write_report
from dualsweep.orchestration.sweep_record import load_sweep
from dualsweep.orchestration.trace import write_trace
from dualsweep.orchestration.units import calibration_text, unit_of

NAMES = ("near", "far")
MEANS = np.array([[-1.5, -0.8], [1.5, -0.8], [0.0, 1.7]])
DRAWS = 4000
STDERR = 0.004  # of every value, relative to it
SLACK = {0: 0.03, 1: 0.03, 2: 0.0, 3: -0.08}  # how far beyond its request a trial gets, relative to the request
FORWARD = "KL(q||p) above the pretrained model's, on held-out main data"
REVERSE = "KL(p||q) of the samples' law from the pretrained model's"


@dataclass(frozen=True)
class Case:
    """One formulation; ``requests`` from the mildest to the strictest, ``sense`` as a user reads them."""

    method: str
    unit: str
    sense: str
    requests: tuple[float, ...]
    pretrained: float  # user value
    meaning: str
    asks: str  # of the summary
    law: str | None = None

    @property
    def fixed_only(self) -> bool:
        return self.method in ("esd", "siss")

    @property
    def stricter(self) -> int:
        return 1 if self.sense == ">=" else -1

    @property
    def id(self) -> str:
        return f"{self.method}-{self.unit}"


CASES = [
    Case("fairness", "share", ">=", (0.2, 0.25, 0.3, 0.4), 0.15, FORWARD,
         "give each of near and far at least a requested share of the samples"),
    Case("unlearn_forward_kl", "share", "<=", (0.2, 0.1, 0.05, 0.02), 0.3, FORWARD,
         "give each of near and far at most a requested share of the samples"),
    Case("adaptation", "nats", "<=", (1.2, 0.8, 0.5, 0.2), 0.001, FORWARD,
         "keep the divergence from each of near and far at or below a requested number of nats"),
    Case("unlearn_reverse_kl", "nats", ">=", (2.5, 3.5, 5.0, 7.0), 1.93, REVERSE,
         "keep the divergence from each of near and far at or above a requested number of nats"),
    Case("fairness", "loss", "<=", (0.12, 0.1, 0.08, 0.05), 0.14, FORWARD,
         "keep the denoising loss on each of near and far at or below a requested value"),
    Case("unlearn_forward_kl", "loss", ">=", (0.2, 0.3, 0.4, 0.6), 0.12, FORWARD,
         "keep the denoising loss on each of near and far at or above a requested value"),
    Case("unlearn_likelihood", "likelihood_ratio", "<=", (0.8, 0.5, 0.3, 0.1), 1.0, REVERSE,
         "keep the likelihood ratio of each of near and far at or below a requested value"),
    Case("alignment", "reward", ">=", (0.25, 0.5, 0.75, 1.2), 0.0, REVERSE,
         "raise the reward of each of near and far by at least a requested number of standard deviations"),
    Case("siss", "loss", ">=", (), 0.12, FORWARD, "Nothing: the 4 runs with fixed weights show what each weight makes"),
    Case("esd", "likelihood_ratio", "<=", (), 1.0, REVERSE, "Nothing: the 4 runs with fixed weights show"),
]  # fmt: skip
REQUESTED = [case for case in CASES if not case.fixed_only]
COMPOSITIONS = [
    Case("composition", "nats", "<=", (0.0,), 2.4, "largest KL(p||q^i), the min-max level",
         "make the largest divergence from each of near and far as small as possible", law=law)
    for law in ("and", "or")
]  # fmt: skip


def value(case: Case, index: int) -> np.ndarray:
    """User values of both constraints in constrained trial ``index``: the second is a little beyond the first."""
    worst = case.requests[index] * (1 + case.stricter * SLACK[index])
    return worst * np.array([1.0, 1 + case.stricter * 0.02])


def cost(reach: float) -> float:
    """Of the i-th of the four places between mildest and strictest, also between them."""
    return 0.05 + 0.1 * reach**2


def write_case(folder: Path, case: Case) -> Path:
    """The sweep's folder as the driver leaves it."""
    points = [("unconstrained", "unconstrained", "unconstrained", None, None)] if not case.fixed_only else []
    points += [
        (f"p{i}", f"sets {case.sense} {r:g}", "constrained", r, None) for i, r in enumerate(case.requests)
    ]
    points += [(f"fixed-{w:g}", f"fixed weights {w:g}", "fixed_weights", None, w) for w in (0.25, 0.5, 1.0, 2.0)]
    (folder / "trials").mkdir(parents=True)
    config = {
        "name": case.id,
        "method": case.method,
        "formulation": {"law": case.law},
        "data": {"dataset": "gaussian_mixture", "sets": {"near": {"classes": [1]}, "far": {"classes": [2]}}},
        "thresholds": {"unit": case.unit, "grid": {"sets": list(case.requests)}},
    }
    (folder / "sweep.yaml").write_text(yaml.safe_dump(config))
    listed = [
        {"trial_id": trial_id, "label": label, "kind": kind, "fixed_weight": weight}
        | {"thresholds": dict.fromkeys(NAMES, request) if request is not None else {}}
        for trial_id, label, kind, request, weight in points
    ]
    (folder / "points.json").write_text(json.dumps(listed))
    for number, point in enumerate(listed):
        _write_trial(folder / "trials" / point["trial_id"], case, point, np.random.default_rng([11, number]))
    return folder


def _reach(case: Case, point: dict) -> tuple[np.ndarray, float]:
    """User values of a trial's constraints, and its place among the requests as ``cost`` counts it."""
    if case.method == "composition":
        values = {"constrained": [1.5, 1.49], "unconstrained": [0.4, 3.6]}.get(point["kind"], [1.0, 2.1])
        return np.array(values), 0.0
    if point["kind"] == "constrained":
        index = int(point["trial_id"][1:])
        return value(case, index), float(index)
    place = {None: -0.5, 0.25: 0.1, 0.5: 0.8, 1.0: 1.6, 2.0: 2.6}[point["fixed_weight"]]
    away = case.pretrained or 0.01
    if case.fixed_only:
        return away * np.array([1.0, 0.97]) * (1 + case.stricter * 0.25 * (place + 0.5)), place
    anchors = np.interp(place, range(-1, 4), [case.pretrained, *case.requests])
    return np.array([1.0, 1 + case.stricter * 0.1]) * anchors, place + 0.3


def _write_trial(folder: Path, case: Case, point: dict, rng: np.random.Generator) -> None:
    folder.mkdir()
    asked = point["kind"] == "constrained"
    values, place = _reach(case, point)
    stderrs = STDERR * np.maximum(np.abs(values), 0.05)
    thresholds = point["thresholds"] if asked else dict.fromkeys(NAMES, 0.5)
    constraints = tuple(
        Constraint(name=n, unit=case.unit, threshold=thresholds[n], sense=threshold_sense(case.method, case.unit))
        for n in NAMES
    )
    assert {c.sense for c in constraints} == {case.sense}
    metrics = np.array([c.canonical(v) for c, v in zip(constraints, values, strict=True)])
    metric_stderrs = stderrs / values if case.unit == "share" else stderrs
    composed = case.method == "composition"
    domain = Simplex() if composed else NonNegative()
    multipliers = np.array([0.6, 0.4]) if composed else np.array([0.2, 0.1]) * (1 + place)
    exact = multipliers / 1.03 if not composed else np.array([0.62, 0.38])
    problem = Problem(method=case.method, objective="x", constraints=constraints if asked else (), domain=domain)
    objective = {"value": float(values.max()) if composed else cost(place), "stderr": 0.004, "unit": "nats"}
    certificate = None
    if asked:
        gap = cost(place) - 0.02
        reference = gap + float(multipliers @ problem.thresholds)  # a dual value that leaves a gap of 0.02
        symptoms = [
            Symptom(PLATEAU, "near", "multiplier rose from 0.4 to 0.9 over dual steps 38 to 75"),
            Symptom(RETENTION_LOSS, None, "objective rose by 0.1 to 0.9"),
        ]
        certificate = certify(
            problem,
            DualState(names=NAMES, multipliers=multipliers),
            metrics - problem.thresholds,
            metric_stderrs,
            DRAWS,
            tolerance=_tolerance(case, point),
            objective=(cost(place), 0.004),
            dual_value=None if composed else (reference, 0.003),
            symptoms=symptoms if point["trial_id"] == "p3" else (),
        ).to_dict()
    rows = [
        {
            "name": c.name,
            "unit": case.unit,
            "sense": c.sense,
            "metric": metrics[i],
            "metric_stderr": metric_stderrs[i],
            "threshold": c.canonical_threshold if asked else None,
            "user_threshold": c.threshold if asked else None,
            "user_value": values[i],
            "user_stderr": stderrs[i],
            "violation": metrics[i] - c.canonical_threshold if asked else None,
            "stderr": metric_stderrs[i],
            "count": DRAWS,
        }
        for i, c in enumerate(constraints)
    ]
    natural = -math.log(case.pretrained) if case.unit == "share" else case.pretrained
    result = {
        **point,
        "status": "completed",
        "error": None,
        "method": case.method,
        "unit": case.unit,
        "multipliers": dict(zip(NAMES, multipliers, strict=True)),
        "averaged_multipliers": dict(zip(NAMES, multipliers, strict=True)),
        "exact_multipliers": dict(zip(NAMES, exact, strict=True)) if asked else None,
        "exact_objective": (1.47 if composed else cost(place) - 0.02) if asked else None,
        "relaxations": {},
        "dual_steps": 75,
        "wall_seconds": 21.0,
        "objective": {**objective, "meaning": case.meaning},
        "constraints": rows,
        "certificate": certificate,
        "histogram": None,
        "calibration": {
            "unit": case.unit,
            "metrics": dict.fromkeys(NAMES, natural),
            "stderrs": dict.fromkeys(NAMES, 0.01),
            "counts": dict.fromkeys(NAMES, 8192),
        },
    }
    (folder / "result.json").write_text(json.dumps(result, default=float))
    _write_points(folder, point, place, rng)
    if point["kind"] != "unconstrained":
        _write_trace(folder, point, constraints, metrics, multipliers, rng)


def _tolerance(case: Case, point: dict) -> float:
    """Such that slack 0 is too close to call: about the half-width of an interval at the request."""
    if case.method == "composition":
        return 0.05
    if case.unit == "share":
        return 1.5 * STDERR
    return 1.5 * STDERR * max(abs(point["thresholds"]["near"]), 0.05)


def _write_points(folder: Path, point: dict, place: float, rng: np.random.Generator) -> None:
    weights = np.array([0.4, 0.3, 0.3]) * np.array([1.0, *np.exp([-0.3 * (1 + place)] * 2)])
    law = GaussianMixture(means=MEANS, stds=np.full((3, 2), 0.4), weights=weights / weights.sum())
    components = rng.choice(3, size=2000, p=weights / weights.sum())
    points = MEANS[components] + 0.42 * rng.standard_normal((2000, 2))
    np.save(folder / "samples.npy", points.astype(np.float32))
    if point["kind"] == "constrained":
        x, y = np.linspace(-3.5, 3.5, 81), np.linspace(-3.2, 3.8, 81)
        grid = np.stack(np.meshgrid(x, y), axis=-1).reshape(-1, 2)
        np.savez(folder / "exact_density.npz", x=x, y=y, density=np.exp(law.log_density(grid)).reshape(81, 81))


def _write_trace(folder, point, constraints, metrics, multipliers, rng, steps=75) -> None:
    thresholds = np.array([c.canonical_threshold for c in constraints])
    rows = []
    for step in range(1, steps + 1):
        progress = 1 - math.exp(-step / 12)
        stderr = 0.02 * np.maximum(np.abs(metrics), 0.1)
        violation = metrics - thresholds + np.abs(metrics) * 0.5 * (1 - progress) + stderr * rng.standard_normal(2)
        now = multipliers if point["kind"] == "fixed_weights" else multipliers * (0.2 + 0.8 * progress)
        vectors = {
            "multipliers": now if now.sum() != 1 else now / now.sum(),
            "relaxations": np.zeros(2),
            "metrics": violation + thresholds,
            "metric_stderrs": stderr,
            "thresholds": thresholds,
            "violations": violation,
            "violation_stderrs": stderr,
            "smoothed_violations": violation,
        }
        scalars = (
            "wall_time lr grad_norm objective objective_stderr lagrangian infeasibility complementarity "
            "stationarity kkt_residual"
        )
        rows.append({"dual_step": step, "primal_step": 20 * step, "attempt": 1} | dict.fromkeys(scalars.split(), 0.1) | vectors)
    write_trace(rows, folder / "trace.parquet", constraints=NAMES, trial_id=point["trial_id"])
