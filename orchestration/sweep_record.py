"""A sweep's folder in memory, whole or partial: trials with their results and traces, the Pareto front, what is missing.

A file that cannot be read becomes a note, not an error. Nothing of Ray, MLflow, torch or matplotlib is needed for it.
"""

import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import yaml

from dualsweep.constraints.pareto import pareto_front
from dualsweep.constraints.problem import UNITS
from dualsweep.orchestration.trace import read_trace, read_trace_names
from dualsweep.orchestration.units import (
    NORMAL_95,
    Unit,
    as_float,
    calibration_text,
    calibration_values,
    finite,
    measured,
    unit_of,
)

KINDS = ("base", "unconstrained", "fixed_weights", "constrained")  # the order in tables and figures


class Sign(NamedTuple):
    """A symptom of a parametrisation gap as a certificate names it; ``constraint`` is empty where it is the objective's."""

    name: str
    constraint: str
    evidence: str

    @property
    def short(self) -> str:
        return f"{self.name} ({self.constraint})" if self.constraint else self.name


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One grid point as found on disk; without a readable ``result.json`` the ``result`` is an empty dict."""

    trial_id: str
    label: str
    kind: str
    status: str  # completed, stopped, failed, diverged; or unfinished, not started where there is no result
    unit: Unit
    directory: Path
    thresholds: dict = field(default_factory=dict)  # constraint name -> user value, as asked
    fixed_weight: float = math.nan
    result: dict = field(default_factory=dict)
    trace: tuple[dict, ...] = ()
    trace_names: tuple[str, ...] = ()

    @property
    def constraints(self) -> list[dict]:
        return self.result.get("constraints") or []

    @property
    def objective(self) -> float:
        return as_float((self.result.get("objective") or {}).get("value"))

    @property
    def objective_stderr(self) -> float:
        return as_float((self.result.get("objective") or {}).get("stderr"))

    @property
    def objective_meaning(self) -> str:
        """What the cost is, in words, without the remarks in brackets that are about this trial alone."""
        return re.sub(r" \([^()]*\)", "", (self.result.get("objective") or {}).get("meaning") or "")

    @property
    def exact_objective(self) -> float:
        return as_float(self.result.get("exact_objective"))

    @property
    def certificate(self) -> dict:
        return self.result.get("certificate") or {}

    @property
    def verdict(self) -> str:
        """The certificate's word; only a trial that was asked for something and has a model can hold it."""
        judged = self.kind == "constrained" and self.status in ("completed", "stopped")
        return self.certificate.get("verdict", "") if judged else ""

    @property
    def level(self) -> float:
        """Of a min-max problem, in canonical units: what the multipliers say the largest violation is."""
        return as_float(self.certificate.get("level"))

    @property
    def gap(self) -> tuple[float, float]:
        """(duality gap, standard error), nan where no dual value is known."""
        return as_float(self.certificate.get("duality_gap")), as_float(self.certificate.get("duality_gap_stderr"))

    @property
    def signs(self) -> list[Sign]:
        """Symptoms seen in the trace; a certificate keeps each as ``name of constraint: evidence``."""
        found = []
        for text in self.certificate.get("symptoms") or ():
            head, _, evidence = str(text).partition(": ")
            name, _, constraint = head.partition(" of ")
            found.append(Sign(name, constraint, evidence))
        return found

    @property
    def warnings(self) -> list[str]:
        """Multipliers at a bound of their domain and symptoms, a few words each."""
        bound = [f"multiplier at its bound ({name})" for name in self.certificate.get("saturated") or ()]
        return [*bound, *dict.fromkeys(sign.short for sign in self.signs)]

    @property
    def requests(self) -> dict[str, float]:
        """Requested user value by constraint name; a threshold given as a factor counts once the trial resolved it."""
        return {} if self.unit.min_max else self.asked

    @property
    def asked(self) -> dict[str, float]:
        """As ``requests``; in a min-max problem the offsets, which by themselves request nothing."""
        if self.kind != "constrained":
            return {}
        resolved = {row["name"]: self.user(row, "threshold") for row in self.constraints}
        values = {**self.thresholds, **{name: value for name, value in resolved.items() if finite(value)}}
        return {name: float(value) for name, value in values.items() if finite(value)}

    def user(self, row: dict, what: str) -> float:
        """Threshold, value or stderr of a result's constraint in the user's unit."""
        return as_float(row.get(f"user_{what}"))

    @property
    def requested(self) -> float:
        """The mildest request, comparable with ``achieved``: smallest share, largest loss; nan without one."""
        values = [value * self.unit.stricter for value in self.requests.values()]
        return min(values) * self.unit.stricter if values else math.nan

    @property
    def evenly_asked(self) -> bool:
        """Whether every constraint was asked for the same, so that ``requested`` says all of the request."""
        return len(set(self.requests.values())) == 1

    @property
    def achieved(self) -> tuple[float, float]:
        """(user value, standard error) of the constraint that got least: smallest share, largest loss."""
        reached = [(self.user(row, "value"), self.user(row, "stderr")) for row in self.constraints]
        reached = [pair for pair in reached if finite(pair[0])]
        return min(reached, key=lambda pair: pair[0] * self.unit.stricter, default=(math.nan, math.nan))

    @property
    def drawable(self) -> bool:
        return finite(self.objective) and finite(self.achieved[0])

    @property
    def short_label(self) -> str:
        if self.kind == "constrained" and self.unit.min_max:
            return "min-max" if len(set(self.asked.values())) == 1 else self.label
        return f"{self.unit.sign} {self.unit.text(self.requested)}" if self.evenly_asked else self.label

    @property
    def reach_text(self) -> str:
        return self.unit.text(*self.achieved)

    @property
    def cost_text(self) -> str:
        unit = (self.result.get("objective") or {}).get("unit", "nats")
        return f"{measured(self.objective, self.objective_stderr)} {unit}"

    @property
    def started_from(self) -> str:
        """Label of the trial whose model and multipliers this one started from; empty for a cold start."""
        return str((self.result.get("start") or {}).get("label") or "")

    @property
    def ended_by(self) -> str:
        """certificate, infeasible or scheduler where the trial ended before its last step, else empty."""
        return str(self.result.get("stopped_by") or "")

    @property
    def error_line(self) -> str:
        """The last line of its error, or why it was stopped."""
        text = self.result.get("error") or (self.status == "stopped" and self.result.get("reason")) or ""
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        return lines[-1] if lines else ""


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """A sweep directory in memory; ``notes`` says what could not be read."""

    directory: Path
    config: dict
    unit: Unit
    trials: tuple[Trial, ...]
    notes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return str(self.config.get("name") or self.directory.name)

    @property
    def method(self) -> str:
        return str(
            self.config.get("method")
            or next((t.result["method"] for t in self.trials if t.result.get("method")), "unknown")
        )

    @property
    def objective_meanings(self) -> list[str]:
        """What the costs are, in words; more than one where trials cannot be compared by them."""
        return list(dict.fromkeys(t.objective_meaning for t in self.trials if t.drawable and t.objective_meaning))

    @property
    def objective_meaning(self) -> str:
        return next(iter(self.objective_meanings), "the objective")

    @property
    def calibration(self) -> dict:
        """What the pretrained model measures, as the first result that carries it says; empty if none does."""
        return next((trial.result["calibration"] for trial in self.trials if trial.result.get("calibration")), {})

    @property
    def pretrained(self) -> list[tuple[str, float, float, int]]:
        """(constraint, user value, standard error, draws) of the pretrained model."""
        return calibration_values(self.calibration, self.unit)

    @property
    def pretrained_text(self) -> str:
        return calibration_text(self.calibration, self.unit)

    @property
    def constraint_names(self) -> list[str]:
        names = [name for trial in self.trials for name in (*trial.thresholds, *(c["name"] for c in trial.constraints))]
        return list(dict.fromkeys(names))

    def of_kind(self, *kinds: str) -> list[Trial]:
        return [trial for trial in self.trials if trial.kind in kinds]

    def front(self, *also: str) -> list[Trial]:
        """Constrained trials whose certificate is feasible (or ``also``) that no other such beats, mildest first.

        In a min-max problem a trial is beaten by one that is no further from any set; smallest level first.
        """
        trials = [trial for trial in self.of_kind("constrained") if trial.drawable]
        if self.unit.min_max:
            return _undominated([trial for trial in trials if trial.verdict in ("feasible", *also)])
        if not trials:
            return []
        order = pareto_front(
            np.array([trial.objective for trial in trials]),
            np.array([trial.achieved[0] * self.unit.stricter for trial in trials]),
            np.array([trial.verdict in ("feasible", *also) for trial in trials]),
        )
        return [trials[index] for index in order]

    def better_than(self, baseline: Trial) -> list[Trial]:
        """Points on the front that are at least as good as the baseline in requirement and objective alike."""
        reach = baseline.achieved[0] * self.unit.stricter
        front = [trial for trial in self.front() if trial.objective <= baseline.objective]
        return [trial for trial in front if trial.achieved[0] * self.unit.stricter >= reach]

    @property
    def has_offsets(self) -> bool:
        """Whether a min-max problem lets some set be further away than others."""
        return self.unit.min_max and any(any(trial.asked.values()) for trial in self.trials)

    @property
    def weighed(self) -> list[Trial]:
        """Runs with fixed weights that can be drawn, by weight: the curve that constrained points are compared with."""
        trials = [trial for trial in self.of_kind("fixed_weights") if trial.drawable]
        return sorted(trials, key=lambda trial: (not finite(trial.fixed_weight), trial.fixed_weight))


def class_counts(trial: Trial) -> list[tuple[str, int, int]]:
    """(class name, count, total) of a trial's classified samples; empty where none were classified."""
    histogram = trial.result.get("histogram") or {}
    total = histogram.get("total") or 0
    pairs = zip(histogram.get("classes") or (), histogram.get("counts") or (), strict=False)
    return [(str(name), int(count), int(total)) for name, count in pairs] if total else []


def wilson_interval(count: int, total: int) -> tuple[float, float]:
    """95 % interval of a binomial share; unlike share +- 1.96 s.e. it stays inside [0, 1] and has a width at count 0.

    Source: Wilson, JASA 22 (1927), 209-212.
    """
    share, weight = count / total, NORMAL_95**2 / total
    half = NORMAL_95 * math.sqrt(share * (1 - share) / total + weight / (4 * total))
    low, high = ((share + weight / 2 + sign * half) / (1 + weight) for sign in (-1, 1))
    return max(low, 0.0), min(high, 1.0)


def load_sweep(sweep_dir: Path, *, traces: bool = True) -> Sweep:
    """Read a sweep directory, whole or partial.

    Raises: ValueError if there is no sweep at ``sweep_dir``.
    """
    sweep_dir = Path(sweep_dir)
    if not any((sweep_dir / name).exists() for name in ("points.json", "sweep.yaml", "trials")):
        raise ValueError(
            f"sweep_dir={str(sweep_dir)!r} holds no sweep (no points.json, sweep.yaml or trials in it); "
            "give the folder <storage>/<sweep name> of a sweep that was started"
        )
    notes: list[str] = []
    config = _read(sweep_dir / "sweep.yaml", yaml.safe_load, dict, notes) or {}
    points = {p["trial_id"]: p for p in _read(sweep_dir / "points.json", json.loads, list, notes) or []}
    # A search makes its points while it runs, so a trial's folder may exist without an entry in points.json.
    found = sorted(path.name for path in (sweep_dir / "trials").glob("*") if path.is_dir())
    results = {}
    for trial_id in dict.fromkeys((*points, *found)):
        path = sweep_dir / "trials" / trial_id / "result.json"
        results[trial_id] = _read(path, json.loads, dict, notes) or {}
    unit = _unit(config, list(results.values()))
    trials = []
    for trial_id, result in results.items():
        known = {**points.get(trial_id, {}), **{key: value for key, value in result.items() if value is not None}}
        directory = sweep_dir / "trials" / trial_id
        rows, names = _read_trace(directory / "trace.parquet", notes) if traces else ((), ())
        trials.append(
            Trial(
                trial_id=trial_id,
                label=str(known.get("label") or trial_id),
                kind=known.get("kind") or "constrained",
                status=result.get("status") or ("unfinished" if directory.is_dir() else "not started"),
                unit=unit,
                directory=directory,
                thresholds=known.get("thresholds") or {},
                fixed_weight=as_float(known.get("fixed_weight")),
                result=result,
                trace=rows,
                trace_names=names,
            )
        )
    trials.sort(key=_position)
    return Sweep(directory=sweep_dir, config=config, unit=unit, trials=tuple(trials), notes=tuple(notes))


def _unit(config: dict, results: list[dict]) -> Unit:
    """The unit of the thresholds: from the configuration, its sense from the results where they say it."""
    method = config.get("method") or next((r["method"] for r in results if r.get("method")), "")
    rows = [row for result in results for row in result.get("constraints") or ()]
    named = [(config.get("thresholds") or {}).get("unit"), *(result.get("unit") for result in results)]
    return unit_of(
        next((name for name in named if name in UNITS), "nats"),
        method=str(method),
        law=(config.get("formulation") or {}).get("law"),
        sense=next((row["sense"] for row in rows if row.get("sense")), None),
    )


def _undominated(trials: list[Trial]) -> list[Trial]:
    values = [{row["name"]: t.user(row, "value") * t.unit.stricter for row in t.constraints} for t in trials]

    def beats(one: dict[str, float], other: dict[str, float]) -> bool:
        shared = one.keys() & other.keys()
        return all(one[k] >= other[k] for k in shared) and any(one[k] > other[k] for k in shared)

    kept = [t for t, own in zip(trials, values, strict=True) if not any(beats(other, own) for other in values)]
    return sorted(kept, key=lambda trial: trial.objective)


def _position(trial: Trial) -> tuple:
    kind = KINDS.index(trial.kind) if trial.kind in KINDS else len(KINDS)
    order = trial.fixed_weight if trial.kind == "fixed_weights" else trial.requested * trial.unit.stricter
    return kind, not finite(order), order if finite(order) else 0.0, trial.label, trial.trial_id


def _read(path: Path, parse, kind: type, notes: list[str]):
    if not path.exists():
        return None
    try:
        content = parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:  # half-written or damaged: the rest counts
        notes.append(f"{path.parent.name}/{path.name} could not be read: {str(error).splitlines()[0]}")
        return None
    if not isinstance(content, kind):
        notes.append(f"{path.parent.name}/{path.name} holds a {type(content).__name__} instead of a {kind.__name__}")
        return None
    return content


def _read_trace(path: Path, notes: list[str]) -> tuple[tuple[dict, ...], tuple[str, ...]]:
    if not path.exists():
        return (), ()
    try:
        return tuple(read_trace(path)), read_trace_names(path)[0]
    except (OSError, ValueError) as error:
        notes.append(f"{path.parent.name}/{path.name} could not be read: {str(error).splitlines()[0]}")
        return (), ()
