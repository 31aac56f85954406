"""The report on synthetic sweep directories: what it says, what it draws, and that no partial sweep can break it."""

import base64
import csv
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from dualsweep.constraints.closed_forms import class_restriction_multipliers, class_restriction_objective
from dualsweep.constraints.feasibility import certify
from dualsweep.constraints.multipliers import DualState
from dualsweep.constraints.problem import Constraint, Problem
from dualsweep.orchestration.report import frontier_table, load_sweep, wilson_interval, write_report
from dualsweep.orchestration.trace import write_trace

MINORITY = {"digit_4": 4, "digit_5": 5, "digit_7": 7}
PRIOR = np.where(np.isin(np.arange(10), list(MINORITY.values())), 0.016, 0.136)
DRAWS = 12000  # with fewer, no share of 5 % can be certified to 0.12 nats
FIGURES = {"frontier", "achieved", "multipliers", "violations", "histograms", "samples"}


def write_sweep(folder: Path, unit: str = "share", *, relaxed: bool = False) -> Path:
    """4 thresholds (two hold, one undecided, one not), unconstrained, 2 fixed weights, 1 failed, 1 without a result."""
    requests = {"share": (0.05, 0.1, 0.2, 0.3), "loss": (0.05, 0.045, 0.04, 0.03), "nats": (3.0, 2.3, 1.6, 1.2),
                "reward": (0.2, 0.5, 0.8, 1.2), "likelihood_ratio": (0.8, 0.5, 0.3, 0.1)}[unit]  # fmt: skip
    sign = ">=" if unit in ("share", "reward") else "<="
    points = [{"trial_id": "unconstrained", "label": "unconstrained", "kind": "unconstrained", "thresholds": {}}]
    for index, request in enumerate((*requests, requests[1] * 1.07, requests[2] * 1.07)):
        label = f"minority {sign} {request:g}"
        thresholds = dict.fromkeys(MINORITY, request)
        points.append({"trial_id": f"{unit}-{index}", "label": label, "kind": "constrained", "thresholds": thresholds})
    for weight in (0.05, 0.5):
        kind = {"label": f"fixed weights {weight:g}", "kind": "fixed_weights", "thresholds": {}, "fixed_weight": weight}
        points.append({"trial_id": f"fixed-{weight:g}", **kind})
    (folder / "base").mkdir(parents=True)
    (folder / "base" / "calibration.json").write_text(json.dumps({"prior": {str(c): p for c, p in enumerate(PRIOR)}}))
    (folder / "points.json").write_text(json.dumps(points))
    config = {"name": "digits-fairness", "method": "fairness", "thresholds": {"unit": unit, "grid": {"minority": list(requests)}}}
    (folder / "sweep.yaml").write_text(yaml.safe_dump(config))
    # How much of the request each point reaches, as a share of the way from the data to the request.
    reach = {0: 1.03, 1: 1.0, 2: 0.9, 3: 0.8, "fixed-0.05": 0.06, "fixed-0.5": 0.185, "unconstrained": 0.014}
    for number, point in enumerate(points):
        directory = folder / "trials" / point["trial_id"]
        directory.mkdir(parents=True)
        index = number - 1 if point["kind"] == "constrained" else point["trial_id"]
        seed = np.random.default_rng([7, number])
        if index == 4:
            error = "Traceback (most recent call last):\n  File x\nRuntimeError: loss is not finite at step 40 <nan>"
            result = {k: point[k] for k in ("trial_id", "label", "kind", "thresholds")}
            result |= {"status": "failed", "error": error, "unit": unit, "objective": None, "constraints": [], "certificate": None}
            (directory / "result.json").write_text(json.dumps(result))
        elif index == 5:
            _write_trace(directory, point, unit, np.full(3, requests[2]), 30, seed, relaxed)
        else:
            final = _final_values(unit, requests, reach[index], index if isinstance(index, int) else None, seed)
            _write_trial(directory, point, unit, final, seed, relaxed)
    return folder


def _final_values(unit, requests, reach, index, rng) -> np.ndarray:
    if unit == "share":
        return (requests[index] if index is not None else 1.0) * reach * (1 + 0.015 * rng.standard_normal(3))
    base = requests[index] if index is not None else {0.014: requests[0], 0.06: requests[0], 0.185: requests[1]}[reach]
    slip = (1 if unit == "reward" else -1) * 0.6 * (reach - (0.89 if index == 2 else 0.9)) if index is not None else 0.0
    return base * (1 + slip + 0.003 * rng.standard_normal(3))


def _write_trial(directory: Path, point: dict, unit: str, values: np.ndarray, rng, relaxed: bool) -> None:
    names = list(MINORITY)
    stderr = np.sqrt(values * (1 - values) / DRAWS) if unit == "share" else 0.006 * np.abs(values)
    metric = {"share": -np.log(np.maximum(values, 1e-9)), "reward": -values}.get(unit, values)
    metric_stderr = stderr / values if unit == "share" else stderr
    asked = point["kind"] == "constrained"
    certificate, exact, exact_objective, multipliers = None, None, None, np.zeros(3)
    problem = Problem(method="fairness", objective="KL(q||p)", constraints=())
    state = DualState(names=(), multipliers=np.zeros(0))
    if asked:
        constraints = tuple(Constraint(name=n, unit=unit, threshold=point["thresholds"][n]) for n in names)
        problem = Problem(method="fairness", objective="KL(q||p)", constraints=constraints)
        epsilon = -np.log(list(point["thresholds"].values())) if unit == "share" else np.full(3, 2.0)
        exact = class_restriction_multipliers(epsilon, PRIOR[[4, 5, 7]])
        exact_objective = class_restriction_objective(exact, PRIOR[[4, 5, 7]])
        multipliers = exact * 1.04
        state = DualState(names=tuple(names), multipliers=multipliers)
        violation = metric - problem.thresholds
        tolerance = 0.12 if unit == "share" else 0.01 * abs(values).max()
        certificate = certify(problem, state, violation, metric_stderr, DRAWS, tolerance)
    else:
        certificate = certify(problem, state, [], [], DRAWS, tolerance=0.1)
    like = {"0": 0.05, "1": 0.1, "2": 0.18, "3": 0.24, "fixed-0.05": 0.06, "fixed-0.5": 0.185, "unconstrained": 0.016}
    share = values.mean() if unit == "share" else like[point["trial_id"].removeprefix(f"{unit}-")]
    cost = class_restriction_objective(np.full(3, max(share, 0.02) / (1.001 - 3 * min(share, 0.3)) - 0.016), PRIOR[[4, 5, 7]])
    counts = rng.multinomial(DRAWS, _shares(values if unit == "share" else np.full(3, 0.1)))
    canonical = dict(zip(names, problem.thresholds, strict=True)) if asked else {}
    rows = [
        {
            "name": name, "unit": unit, "metric": metric[i], "metric_stderr": metric_stderr[i], "threshold": canonical.get(name),
            "user_threshold": point["thresholds"].get(name), "user_value": values[i], "user_stderr": stderr[i],
            "violation": metric[i] - canonical[name] if asked else None, "stderr": metric_stderr[i], "count": DRAWS,
        }
        for i, name in enumerate(names)
    ]  # fmt: skip
    result = {
        **{key: point[key] for key in ("trial_id", "label", "kind", "thresholds")}, "status": "completed", "error": None,
        "method": "fairness", "unit": unit, "multipliers": dict(zip(names, multipliers, strict=True)), "averaged_multipliers": {},
        "exact_multipliers": dict(zip(names, exact, strict=True)) if asked else None, "relaxations": {},
        "primal_steps": 1500, "dual_steps": 75, "wall_seconds": 31.0,
        "objective": {"value": cost + 0.006 * rng.standard_normal(), "stderr": 0.006, "unit": "nats",
                      "meaning": "KL(q||p) above the pretrained model's, on held-out main data"},
        "exact_objective": exact_objective, "constraints": rows, "certificate": certificate.to_dict(),
        "histogram": {"classes": [str(c) for c in range(10)], "counts": counts.tolist(), "total": DRAWS, "classifier": "SVM",
                      "classifier_accuracy": 0.981, "classifier_accuracy_count": 360},
    }  # fmt: skip
    (directory / "result.json").write_text(json.dumps(result, default=float))
    np.save(directory / "samples.npy", _pictures(rng))
    if point["kind"] != "unconstrained":
        target = np.array(list(point["thresholds"].values())) if asked else values
        _write_trace(directory, point, unit, target, 75, rng, relaxed, exact, fixed=point.get("fixed_weight"))


def _shares(minority: np.ndarray) -> np.ndarray:
    shares = np.empty(10)
    shares[[4, 5, 7]] = minority
    shares[[0, 1, 2, 3, 6, 8, 9]] = (1 - minority.sum()) / 7
    return shares


def _pictures(rng) -> np.ndarray:
    from sklearn.datasets import load_digits

    images = load_digits().images[rng.integers(0, 1797, 40)] / 8 - 1
    return (images + 0.12 * rng.standard_normal(images.shape)).clip(-1, 1)[:, None].astype(np.float32)


def _write_trace(directory, point, unit, target, steps, rng, relaxed, exact=None, fixed=None) -> None:
    exact = np.full(3, 0.2) if exact is None else exact
    start = np.full(3, 0.02) if unit == "share" else target * 1.3
    rows = []
    for step in range(1, steps + 1):
        progress = 1 - math.exp(-step / 12)
        value = start + (target - start) * progress * (1 + 0.12 * math.exp(-step / 25) * math.sin(step / 6))
        violation = (np.log(target / value) if unit == "share" else value - target) + 0.05 * np.abs(target) * rng.standard_normal(3)
        stderr = 0.12 * np.ones(3) if unit == "share" else 0.04 * np.abs(target)
        multipliers = np.full(3, fixed) if fixed else exact * (progress + 0.25 * math.exp(-step / 20) * math.sin(step / 8))
        vectors = {"multipliers": multipliers, "relaxations": 0.3 * progress * exact if relaxed else np.zeros(3), "metrics": violation,
                   "metric_stderrs": stderr, "thresholds": target, "violations": violation, "violation_stderrs": stderr,
                   "smoothed_violations": violation}  # fmt: skip
        scalars = dict.fromkeys(("wall_time", "lr", "grad_norm", "objective", "objective_stderr", "lagrangian", "infeasibility",
                                 "complementarity", "stationarity", "kkt_residual"), 0.1)  # fmt: skip
        rows.append({"dual_step": step, "primal_step": 20 * step, "attempt": 1, **scalars, **vectors})
    write_trace(rows, directory / "trace.parquet", constraints=list(MINORITY), trial_id=point["trial_id"])
