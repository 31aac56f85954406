"""The report of a sweep: one self-contained HTML page with its figures and tables, read from the sweep directory alone.

Whatever state the sweep is in, the report says so: trials that failed, are unfinished or never started are named, and a
file that cannot be read becomes a note on the page, not an error. Nothing of Ray, MLflow or torch is needed for it.
"""

import base64
import json
import math
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path

import jinja2
import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import yaml

from dualsweep.constraints.pareto import pareto_front
from dualsweep.orchestration.trace import VECTOR_COLUMNS, read_trace, read_trace_names

KINDS = ("base", "unconstrained", "fixed_weights", "constrained")  # the order in tables and figures
NORMAL_95 = 1.96  # two-sided 95 % quantile of the standard normal: every error bar is value +- 1.96 s.e.


@dataclass(frozen=True, kw_only=True)
class Unit:
    """How values in a constraint unit are worded and drawn; ``stricter`` is +1 where larger thresholds ask for more."""

    name: str
    noun: str
    stricter: int
    canonical: str  # unit of metrics and violations, which are compared as metric <= threshold
    ask: str
    suffix: str = ""
    scale: float = 1.0

    @property
    def sign(self) -> str:
        return "≥" if self.stricter > 0 else "≤"

    @property
    def worst(self) -> str:
        return "smallest" if self.stricter > 0 else "largest"

    @property
    def axis(self) -> str:
        return f"({self.suffix.strip()})" if self.suffix else ""

    def text(self, value: float, stderr: float = math.nan) -> str:
        """The value as a reader writes it, with its 95 % bound where a standard error is known."""
        return f"{measured(value * self.scale, stderr * self.scale)}{self.suffix}" if finite(value) else "–"


UNITS = {
    unit.name: unit
    for unit in (
        Unit(name="share", noun="share", stricter=1, canonical="nats", suffix=" %", scale=100.0,
             ask="give {names} at least a requested share of the samples"),
        Unit(name="loss", noun="loss", stricter=-1, canonical="mean squared error",
             ask="keep the denoising loss on {names} at or below a requested value"),
        Unit(name="nats", noun="divergence", stricter=-1, canonical="nats", suffix=" nats",
             ask="keep the divergence of {names} at or below a requested number of nats"),
        Unit(name="likelihood_ratio", noun="likelihood ratio", stricter=-1, canonical="likelihood ratio",
             ask="keep the likelihood ratio of {names} at or below a requested value"),
        Unit(name="reward", noun="reward", stricter=1, canonical="standard deviations", suffix=" s.d.",
             ask="raise the reward of {names} by at least a requested number of standard deviations"),
    )
}  # fmt: skip


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
    def certificate(self) -> dict:
        return self.result.get("certificate") or {}

    @property
    def verdict(self) -> str:
        """The certificate's word; only a trial that was asked for something and has a model can hold it."""
        judged = self.kind == "constrained" and self.status in ("completed", "stopped")
        return self.certificate.get("verdict", "") if judged else ""

    @property
    def requests(self) -> dict[str, float]:
        """Requested user value by constraint name; a threshold given as a factor counts once the trial resolved it."""
        if self.kind != "constrained":
            return {}
        resolved = {row["name"]: self.user(row, "threshold") for row in self.constraints}
        values = {**self.thresholds, **{name: value for name, value in resolved.items() if finite(value)}}
        return {name: float(value) for name, value in values.items() if finite(value)}

    def user(self, row: dict, what: str) -> float:
        """Threshold, value or stderr of a result's constraint in the user's unit: canonical where less is more."""
        canonical = {"threshold": "threshold", "value": "metric", "stderr": "metric_stderr"}[what]
        return as_float(row.get(canonical if self.unit.stricter < 0 else f"user_{what}"))

    @property
    def requested(self) -> float:
        """The mildest request, comparable with ``achieved``: smallest share, largest loss; nan without one."""
        values = [value * self.unit.stricter for value in self.requests.values()]
        return min(values) * self.unit.stricter if values else math.nan

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
        values = set(self.requests.values())
        return f"{self.unit.sign} {self.unit.text(values.pop())}" if len(values) == 1 else self.label

    @property
    def reach_text(self) -> str:
        return self.unit.text(*self.achieved)

    @property
    def cost_text(self) -> str:
        unit = (self.result.get("objective") or {}).get("unit", "nats")
        return f"{measured(self.objective, self.objective_stderr)} {unit}"

    @property
    def error_line(self) -> str:
        lines = [line.strip() for line in (self.result.get("error") or "").splitlines() if line.strip()]
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
    def objective_meaning(self) -> str:
        objectives = [trial.result.get("objective") or {} for trial in self.trials]
        return next((objective["meaning"] for objective in objectives if objective.get("meaning")), "the objective")

    @property
    def constraint_names(self) -> list[str]:
        names = [name for trial in self.trials for name in (*trial.thresholds, *(c["name"] for c in trial.constraints))]
        return list(dict.fromkeys(names))

    def of_kind(self, *kinds: str) -> list[Trial]:
        return [trial for trial in self.trials if trial.kind in kinds]

    def front(self, *also: str) -> list[Trial]:
        """Constrained trials whose certificate is feasible (or ``also``) that no other such beats, mildest first."""
        trials = [trial for trial in self.of_kind("constrained") if trial.drawable]
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


@dataclass(frozen=True, kw_only=True)
class ReportPaths:
    """What ``write_report`` wrote; figures by name (without those that had nothing to show), tables by file name."""

    index: Path
    figures: dict[str, Path]
    tables: dict[str, Path]

    @property
    def directory(self) -> Path:
        return self.index.parent


def finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def as_float(value: object) -> float:
    return float(value) if finite(value) else math.nan


def number(value: object, digits: int = 3) -> str:
    return f"{value:.{digits}g}" if finite(value) else "–"


def measured(value: float, stderr: float) -> str:
    """``value ± 1.96 s.e.``, both to the second digit of the bound; three digits where no standard error is known."""
    half = NORMAL_95 * stderr
    if not (finite(half) and half > 0):
        return number(value)
    decimals = max(1 - math.floor(math.log10(half)), 0)
    return f"{value:.{decimals}f} ± {half:.{decimals}f}"


def listed(words: list[str], most: int = 8) -> str:
    words = words if len(words) <= most else [*words[: most - 1], f"{len(words) - most + 1} more"]
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


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
    asked = config.get("thresholds") or {}
    relative = bool(asked.get("relative"))
    unit = UNITS.get(asked.get("unit")) or next(
        (UNITS[r["unit"]] for r in results.values() if r.get("unit") in UNITS), UNITS["nats"]
    )
    trials = []
    for trial_id, result in results.items():
        known = {**points.get(trial_id, {}), **{key: value for key, value in result.items() if value is not None}}
        directory = sweep_dir / "trials" / trial_id
        thresholds = known.get("thresholds") or {}
        if relative and not result:
            thresholds = {}  # factors of a loss that only the trial knows
        rows, names = _read_trace(directory / "trace.parquet", notes) if traces else ((), ())
        trials.append(
            Trial(
                trial_id=trial_id,
                label=str(known.get("label") or trial_id),
                kind=known.get("kind") or "constrained",
                status=result.get("status") or ("unfinished" if directory.is_dir() else "not started"),
                unit=unit,
                directory=directory,
                thresholds=thresholds,
                result=result,
                trace=rows,
                trace_names=names,
            )
        )
    trials.sort(key=_position)
    return Sweep(directory=sweep_dir, config=config, unit=unit, trials=tuple(trials), notes=tuple(notes))


def frontier_table(sweep_dir: Path) -> list[dict]:
    """One dict a trial, baselines first and then from the mildest to the strictest request; numbers are nan if unknown.

    ``requested`` and ``achieved`` are user values of the constraint that got least, ``unit`` their unit; ``objective``
    is in nats; ``verdict`` is feasible, infeasible, undecided or empty where nothing was asked or nothing came out.
    """
    sweep = load_sweep(sweep_dir, traces=False)
    front = {trial.trial_id for trial in sweep.front()}
    return [_point_row(trial, trial.trial_id in front) for trial in sweep.trials]


def write_report(sweep_dir: Path, out: Path | None = None) -> ReportPaths:
    """Write ``index.html``, the PNGs and ``tables/`` (CSV and Parquet) to ``out``, by default ``<sweep_dir>/report``.

    Raises: ValueError if there is no sweep at ``sweep_dir``.
    """
    # Here and not above: matplotlib is slow to import, and the command line's closing table needs none of it.
    from dualsweep.orchestration.figures import draw_figures

    sweep = load_sweep(sweep_dir)
    out = Path(out) if out is not None else sweep.directory / "report"
    (out / "tables").mkdir(parents=True, exist_ok=True)
    tables = _write_tables(sweep, out / "tables")
    figures = draw_figures(sweep, out)
    template = resources.files("dualsweep.orchestration").joinpath("report.html.j2").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"num": number, "listed": listed}
    environment.tests["finite"] = finite
    page = environment.from_string(template).render(
        sweep=sweep,
        unit=sweep.unit,
        front=sweep.front(),
        has_exact=any(trial.result.get("exact_multipliers") for trial in sweep.trials),
        images={name: base64.b64encode(path.read_bytes()).decode() for name, path in figures.items()},
        tables=sorted(path.name for path in tables.values()),
        config=yaml.safe_dump(sweep.config, sort_keys=False, allow_unicode=True),
    )
    index = out / "index.html"
    index.write_text(page, encoding="utf-8")
    return ReportPaths(index=index, figures=figures, tables=tables)


def _point_row(trial: Trial, on_front: bool) -> dict:
    row = {
        "trial_id": trial.trial_id,
        "label": trial.label,
        "kind": trial.kind,
        "status": trial.status,
        "verdict": trial.verdict,
        "on_front": on_front,
        "unit": trial.unit.name,
        "requested": trial.requested,
        "achieved": trial.achieved[0],
        "achieved_stderr": trial.achieved[1],
        "objective": trial.objective,
        "objective_stderr": trial.objective_stderr,
        "exact_objective": as_float(trial.result.get("exact_objective")),
        "worst_violation": as_float(trial.certificate.get("worst_violation")),
        "wall_seconds": as_float(trial.result.get("wall_seconds")),
    }
    return row | {"error": trial.error_line}


def _position(trial: Trial) -> tuple:
    kind = KINDS.index(trial.kind) if trial.kind in KINDS else len(KINDS)
    requested = trial.requested * trial.unit.stricter
    return kind, not finite(requested), requested if finite(requested) else 0.0, trial.label, trial.trial_id


def _write_tables(sweep: Sweep, folder: Path) -> dict[str, Path]:
    """Each table that has rows, as CSV and as Parquet; user values in the user's unit, the rest canonical."""
    front = {trial.trial_id for trial in sweep.front()}
    tables: dict[str, list[dict]] = {"points": [], "trace": [], "histograms": [], "certificates": []}
    for trial in sweep.trials:
        who = {"trial_id": trial.trial_id, "label": trial.label}
        point = _point_row(trial, trial.trial_id in front)
        for row in trial.constraints:
            name = row["name"]
            point |= {f"{what}/{name}": trial.user(row, what) for what in ("threshold", "value", "stderr")}
            point[f"multiplier/{name}"] = as_float((trial.result.get("multipliers") or {}).get(name))
        tables["points"].append(point)
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


def _cell(value: object) -> object:
    """A certificate's entry as one table cell: what CSV cannot nest becomes text."""
    if isinstance(value, dict):
        return json.dumps(value)
    return "; ".join(map(str, value)) if isinstance(value, list) else value


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
