"""The report in every unit and sense, on made-up sweeps of a laboratory in the plane whose every number is known.

Each constrained trial asks more than the one before: two hold, one is undecided, one does not hold. The numbers come from
``value`` and ``cost`` below, so that what a table, an axis or a sentence says can be compared with what went in.
"""

import csv
import html
import json
import math
import re
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
from dualsweep.orchestration.units import calibration_text, measured, unit_of

NAMES = ("near", "far")
MEANS = np.array([[-1.5, -0.8], [1.5, -0.8], [0.0, 1.7]])
DRAWS = 4000
NO_DUAL_VALUE = "its law is not known"
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
         "make the largest divergence from near and far as small as possible", law=law)
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
    points += [(f"p{i}", f"sets {case.sense} {r:g}", "constrained", r, None) for i, r in enumerate(case.requests)]
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
            no_dual_value=NO_DUAL_VALUE if composed else None,
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
        counters = {"dual_step": step, "primal_step": 20 * step, "attempt": 1, "workers": 1, "lag": 0}
        rows.append(counters | dict.fromkeys(scalars.split(), 0.1) | vectors)
    write_trace(rows, folder / "trace.parquet", constraints=NAMES, trial_id=point["trial_id"])


def page_text(paths) -> str:
    """The page as a reader sees it: without images, styles and tags."""
    page = re.sub(r"data:image[^\"]*", "", paths.index.read_text(encoding="utf-8"))
    page = re.sub(r"<style>.*?</style>|<[^>]+>", " ", page, flags=re.DOTALL)
    return re.sub(r"\s+", " ", html.unescape(page))


def read_csv(paths, name: str) -> list[dict[str, str]]:
    with paths.tables[f"{name}.csv"].open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def edit_result(sweep_dir: Path, trial_id: str, **changes) -> None:
    path = sweep_dir / "trials" / trial_id / "result.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.fixture(params=REQUESTED, ids=lambda case: case.id, scope="module")
def reported(request, tmp_path_factory):
    """(case, sweep, what was written) for every formulation that requests something."""
    sweep_dir = write_case(tmp_path_factory.mktemp("runs") / "sweep", request.param)
    return request.param, load_sweep(sweep_dir), write_report(sweep_dir)


@pytest.fixture(params=[case for case in CASES if case.fixed_only], ids=lambda case: case.id, scope="module")
def weighed(request, tmp_path_factory):
    sweep_dir = write_case(tmp_path_factory.mktemp("runs") / "sweep", request.param)
    return request.param, load_sweep(sweep_dir), write_report(sweep_dir)


def test_every_figure_of_the_laboratory_is_written(reported):
    _, _, paths = reported
    assert set(paths.figures) == {"frontier", "achieved", "multipliers", "violations", "samples"}
    for path in paths.figures.values():
        with Image.open(path) as image:
            assert image.format == "PNG" and image.width >= 900


def test_the_table_says_what_was_requested_what_the_worst_constraint_got_and_what_it_cost(reported):
    case, sweep, _ = reported
    rows = {row["trial_id"]: row for row in frontier_table(sweep.directory)}
    for index, request in enumerate(case.requests):
        row = rows[f"p{index}"]
        assert (row["unit"], row["sense"], row["requested"]) == (case.unit, case.sense, request)
        worst = min(value(case, index) * case.stricter) * case.stricter
        assert row["achieved"] == pytest.approx(worst, rel=1e-12)
        assert row["achieved_stderr"] == pytest.approx(STDERR * max(abs(worst), 0.05), rel=1e-12)
        assert (row["objective"], row["objective_unit"]) == (pytest.approx(cost(index)), "nats")
        assert row["exact_objective"] == pytest.approx(cost(index) - 0.02)
        assert row["duality_gap"] == pytest.approx(0.02) and row["duality_gap_stderr"] == pytest.approx(0.005)
    assert [row["trial_id"] for row in rows.values()] == [
        "unconstrained", "fixed-0.25", "fixed-0.5", "fixed-1", "fixed-2", "p0", "p1", "p2", "p3",
    ]  # fmt: skip
    assert [rows[f"p{i}"]["verdict"] for i in range(4)] == ["feasible", "feasible", "undecided", "infeasible"]
    assert [trial_id for trial_id, row in rows.items() if row["on_front"]] == ["p0", "p1"]
    assert [rows[f"p{i}"]["warnings"] for i in (0, 3)] == ["", "plateau (near); retention loss"]


def test_the_page_words_the_request_the_costs_and_the_pretrained_model(reported):
    case, sweep, paths = reported
    text, unit = page_text(paths), unit_of(case.unit, method=case.method)
    assert f"Models were asked to {case.asks}, at 4 grid points from {unit.text(case.requests[0])} to" in text
    sign = {">=": "≥", "<=": "≤"}[case.sense]
    assert f"2 of 4 judged points hold at 95 % confidence ({sign} {unit.text(case.requests[0])} and {sign}" in text
    assert f"Cost is {case.meaning}; lower is better" in text
    assert "Start. The pretrained model: " + sweep.pretrained_text in text
    worst = {">=": "smallest", "<=": "largest"}[case.sense]
    assert f"Without constraints the {worst} {unit.noun} is" in text
    assert (
        "plateau (near); retention loss" in text and "multiplier rose from 0.4 to 0.9 over dual steps 38 to 75" in text
    )
    assert "The duality gap is the cost less the dual value" in text and "0.0200 ± 0.0098" in text
    assert "+0.00583 (+3.0 %)" in text  # the first trial's averaged multiplier 0.2 against 0.2 / 1.03 (or more)


def test_the_frontier_names_its_axes_from_the_data_and_puts_the_stricter_request_to_the_right(reported):
    case, sweep, _ = reported
    axes = figures.frontier(sweep).axes[0]
    unit = unit_of(case.unit, method=case.method)
    assert axes.xaxis_inverted() == (case.sense == "<=")
    assert axes.get_xlabel().startswith({">=": "smallest", "<=": "largest"}[case.sense] + f" {unit.noun} reached")
    cost_label = " ".join(axes.get_ylabel().split())
    assert cost_label.startswith("cost: " + case.meaning.split(",")[0].replace("||", "‖"))
    lines = {line.get_label(): line.get_xydata() for line in axes.lines}
    front = [(min(value(case, i) * case.stricter) * case.stricter * unit.scale, cost(i)) for i in (0, 1)]
    assert lines["Pareto front of the points that hold"] == pytest.approx(np.array(front))
    assert len(lines["fixed weights, in order"]) == 4
    assert (np.diff(lines["fixed weights, in order"][:, 0]) * case.stricter > 0).all()
    (exact,) = [line.get_xydata() for line in axes.lines if len(line.get_xydata()) == 200]
    for index, request in enumerate(case.requests):
        nearest = exact[np.abs(exact[:, 0] - request * unit.scale).argmin()]
        assert nearest[1] == pytest.approx(cost(index) - 0.02, abs=0.02)  # 200 points between the ends
    pretrained = next(line for line in axes.lines if line.get_label().startswith("pretrained"))
    assert pretrained.get_xdata()[0] == pytest.approx(case.pretrained * unit.scale)


def test_margins_are_positive_where_the_request_is_met_in_either_sense(reported):
    case, sweep, _ = reported
    axes = figures.achieved(sweep).axes[0]
    assert axes.xaxis_inverted() == (case.sense == "<=")
    scale = unit_of(case.unit).scale
    drawn = sorted(
        line.get_ydata()[0] for line in axes.lines if line.get_marker() in "os" and len(line.get_ydata()) == 1
    )
    margins = [(value(case, i) - r) * case.stricter * scale for i, r in enumerate(case.requests)]
    assert drawn == pytest.approx(sorted(np.concatenate(margins)), abs=1e-9)
    assert (margins[0] > 0).all() and (margins[3] < 0).all()
    (eased,) = [line.get_xydata() for line in axes.lines if line.get_linestyle() == ":"]
    tolerance = sweep.of_kind("constrained")[0].certificate["tolerance"]
    if case.unit == "share":  # a tolerance in nats is a factor of the share
        limit = eased[:, 0] + case.stricter * eased[:, 1]
        assert np.log(eased[:, 0] / limit) * case.stricter == pytest.approx(np.full(100, tolerance))
    else:
        assert eased[:, 1] == pytest.approx(np.full(100, -tolerance))


def test_csv_tables_hold_values_multipliers_symptoms_and_the_pretrained_model(reported):
    case, _, paths = reported
    points = {row["trial_id"]: row for row in read_csv(paths, "points")}
    for index, request in enumerate(case.requests):
        row = points[f"p{index}"]
        for name, expected in zip(NAMES, value(case, index), strict=True):
            assert float(row[f"value/{name}"]) == pytest.approx(expected)
            assert float(row[f"threshold/{name}"]) == pytest.approx(request)
        assert float(row["averaged_multiplier/near"]) == pytest.approx(1.03 * float(row["exact_multiplier/near"]))
    symptoms = [(row["trial_id"], row["name"], row["constraint"]) for row in read_csv(paths, "symptoms")]
    assert symptoms == [("p3", "plateau", "near"), ("p3", "retention loss", "")]
    pretrained = {row["constraint"]: row for row in read_csv(paths, "pretrained")}
    assert float(pretrained["far"]["value"]) == pytest.approx(case.pretrained)
    assert float(pretrained["far"]["stderr"]) == pytest.approx(0.01 * (case.pretrained if case.unit == "share" else 1))


def test_fixed_weights_alone_are_reported_as_a_curve_and_by_weight(weighed):
    case, sweep, paths = weighed
    assert set(paths.figures) == {"frontier", "weights", "samples"}
    text = page_text(paths)
    assert case.asks in text and sweep.pretrained_text in text
    for absent in ("Certificates", "Multipliers", "Reached against requested", "Holds.", "does at least as well"):
        assert absent not in text
    axes = figures.frontier(sweep).axes[0]
    name = {"esd": "ESD", "siss": "SISS"}[case.method]
    curve = next(line for line in axes.lines if line.get_label() == f"{name}, fixed weights, in order").get_xydata()
    assert curve == pytest.approx(np.array([[t.achieved[0], t.objective] for t in sweep.of_kind("fixed_weights")]))
    axes = figures.weights(sweep).axes[0]
    drawn = [line for line in axes.lines if line.get_marker() in ("o", "s")]
    for line, name in zip(drawn, NAMES, strict=True):
        rows = [row for trial in sweep.weighed for row in trial.constraints if row["name"] == name]
        assert line.get_ydata() == pytest.approx([row["user_value"] for row in rows])
    rows = frontier_table(sweep.directory)
    assert [row["fixed_weight"] for row in rows] == [0.25, 0.5, 1.0, 2.0] and not any(row["verdict"] for row in rows)


@pytest.mark.parametrize("case", COMPOSITIONS, ids=lambda case: case.law)
def test_a_composition_is_reported_by_its_level(tmp_path, case):
    sweep_dir = write_case(tmp_path / "sweep", case)
    paths, sweep = write_report(sweep_dir), load_sweep(sweep_dir)
    assert set(paths.figures) == {"levels", "multipliers", "violations", "samples"}
    text = page_text(paths)
    assert f"Models were asked to {case.asks}, at 1 grid point." in text
    symbol = {"and": "KL(p||near)", "or": "KL(near||p)"}[case.law]
    assert f"There is no duality gap: {NO_DUAL_VALUE}." in text
    assert f"The pretrained model: {symbol} 2.400 ± 0.020 nats" in text
    assert "min-max has the smallest largest divergence, 1.500 ± 0.012 nats" in text
    assert "With fixed weights 0.5 the largest divergence is 2.100 ± 0.016 nats; min-max does at least as well." in text
    assert "requested" not in text.split("All points")[1].split("Classes")[0]
    row = next(row for row in frontier_table(sweep_dir) if row["kind"] == "constrained")
    assert row["level"] == pytest.approx(0.6 * 1.5 + 0.4 * 1.49) and row["on_front"] and math.isnan(row["requested"])
    axes = figures.levels(sweep).axes[0]
    ends = {line.get_linestyle(): line.get_xdata()[0] for line in axes.lines if len(line.get_xdata()) == 2}
    assert ends == {"-": pytest.approx(1.496), "--": pytest.approx(1.47)}
    markers = [line.get_xdata()[0] for line in axes.lines if line.get_marker() in ("o", "s")]
    assert sorted(markers)[-1] == 3.6 and sorted(markers)[0] == 0.4


def test_in_a_min_max_problem_a_point_is_beaten_only_by_one_nearer_to_every_set(tmp_path):
    sweep_dir = write_case(tmp_path / "sweep", COMPOSITIONS[0])
    template = json.loads((sweep_dir / "trials" / "p0" / "result.json").read_text())
    for trial_id, near, far in (("tilted", 1.0, 2.2), ("beaten", 1.1, 2.3)):
        (sweep_dir / "trials" / trial_id).mkdir()
        rows = [{**row, "user_value": v} for row, v in zip(template["constraints"], (near, far), strict=True)]
        objective = {**template["objective"], "value": far}
        changed = {"trial_id": trial_id, "constraints": rows, "objective": objective}
        (sweep_dir / "trials" / trial_id / "result.json").write_text(json.dumps({**template, **changed}))
    assert [trial.trial_id for trial in load_sweep(sweep_dir).front()] == ["p0", "tilted"]


def test_offsets_of_a_composition_are_taken_off_and_said(tmp_path):
    sweep_dir = write_case(tmp_path / "sweep", COMPOSITIONS[0])
    template = json.loads((sweep_dir / "trials" / "p0" / "result.json").read_text())
    rows = [{**row, "user_threshold": b} for row, b in zip(template["constraints"], (0.0, 0.5), strict=True)]
    edit_result(sweep_dir, "p0", constraints=rows, thresholds={"near": 0.0, "far": 0.5}, label="far <= 0.5, near <= 0")
    sweep = load_sweep(sweep_dir)
    axes = figures.levels(sweep).axes[0]
    assert "less its offset" in axes.get_xlabel()
    row = [line.get_xdata()[0] for line in axes.lines if line.get_marker() in ("o", "s")][-2:]
    assert row == pytest.approx([1.5, 1.49 - 0.5])
    assert [trial.short_label for trial in sweep.of_kind("constrained")] == ["far <= 0.5, near <= 0"]


def test_points_in_the_plane_share_extent_aspect_and_contours(tmp_path):
    sweep_dir = write_case(tmp_path / "sweep", CASES[3])
    wild = np.load(sweep_dir / "trials/p1/samples.npy")
    wild[:3] = 50.0
    np.save(sweep_dir / "trials/p1/samples.npy", wild)
    (sweep_dir / "trials/p2/exact_density.npz").write_bytes(b"PK\x03\x04 half")
    sweep = load_sweep(sweep_dir)
    panels = figures.samples(sweep).axes
    assert {axes.get_aspect() for axes in panels} == {1.0}
    assert len({(*axes.get_xlim(), *axes.get_ylim()) for axes in panels}) == 1
    low, high = panels[0].get_xlim()
    assert -5 < low < -2.5 and 2.5 < high < 5 and high - low == pytest.approx(np.ptp(panels[0].get_ylim()))
    with_density = [trial.trial_id for trial, axes in zip(sweep.trials, panels, strict=True) if axes.collections]
    assert with_density == ["p0", "p1", "p3"]
    shown = {trial.trial_id: len(axes.texts) for trial, axes in zip(sweep.trials, panels, strict=True)}
    assert shown["p1"] == 1
    outside = panels[[t.trial_id for t in sweep.trials].index("p1")].texts[0].get_text()
    assert re.fullmatch(r"\d+ of 2000 outside", outside) and int(outside.split()[0]) >= 3


def test_exact_optima_of_uneven_requests_are_ticks_without_a_curve(tmp_path):
    sweep_dir = write_case(tmp_path / "sweep", CASES[3])
    for index in range(4):
        path = sweep_dir / "trials" / f"p{index}" / "result.json"
        rows = json.loads(path.read_text())["constraints"]
        rows[1]["user_threshold"] *= 1.2
        edit_result(sweep_dir, f"p{index}", constraints=rows)
    axes = figures.frontier(load_sweep(sweep_dir)).axes[0]
    assert max(len(line.get_xydata()) for line in axes.lines) == 4  # a curve has 200 points
    (ticks,) = [line for line in axes.lines if line.get_marker() == "|" and line.get_color() == "#777777"]
    assert sorted(ticks.get_xdata()) == pytest.approx(CASES[3].requests)  # the mildest part of each request


def test_costs_measured_against_different_things_are_called_so(tmp_path):
    sweep_dir = write_case(tmp_path / "sweep", CASES[0])
    assert "Not alike." not in page_text(write_report(sweep_dir))
    above = {"value": 0.3, "stderr": 0.01, "unit": "nats", "meaning": "KL(q||p) above the unconstrained run's"}
    edit_result(sweep_dir, "p1", objective=above)
    assert "Not alike. Costs of this sweep are not all measured against the same" in page_text(write_report(sweep_dir))


def test_a_multiplier_at_its_bound_is_named_in_the_table(tmp_path):
    sweep_dir = write_case(tmp_path / "sweep", CASES[1])
    result = json.loads((sweep_dir / "trials/p2/result.json").read_text())
    edit_result(sweep_dir, "p2", certificate={**result["certificate"], "saturated": ["far"]})
    rows = {row["trial_id"]: row for row in frontier_table(sweep_dir)}
    assert rows["p2"]["warnings"] == "multiplier at its bound (far)"
    assert "multiplier at its bound (far)" in page_text(write_report(sweep_dir))


def test_classes_of_a_set_are_those_its_configuration_lists(tmp_path):
    sweep_dir = write_case(tmp_path / "sweep", CASES[1])
    histogram = {"classes": ["a", "b", "c"], "counts": [10, 50, 40], "total": 100, "prior": [0.2, 0.5, 0.3]}
    edit_result(sweep_dir, "p0", histogram=histogram)
    axes = figures.histograms(load_sweep(sweep_dir)).axes[0]
    blue = [bar.get_facecolor()[2] > 2 * bar.get_facecolor()[0] for bar in axes.patches]
    assert blue == [False, True, True]
    requests = [line.get_ydata()[0] for line in axes.lines if line.get_color() == "#D55E00"]
    assert requests == pytest.approx([20.0, 20.0])
    labels = [text.get_text() for text in axes.figure.legends[0].get_texts()]
    assert "requested (at most)" in labels


@pytest.mark.parametrize(
    ("method", "unit", "law", "metric", "text"),
    [
        ("unlearn_reverse_kl", "nats", None, 1.93, "KL(p||near) 1.930 ± 0.020 nats"),
        ("adaptation", "nats", None, 1.93, "KL(near||p) 1.930 ± 0.020 nats"),
        ("composition", "nats", "or", 1.93, "KL(near||p) 1.930 ± 0.020 nats"),
        ("composition", "nats", None, 1.93, "KL(p||near) 1.930 ± 0.020 nats"),
        ("fairness", "share", None, -math.log(0.2), "share of near 20.00 ± 0.39 %"),  # 1.96 * 0.01 * 0.2
        ("unlearn_forward_kl", "share", None, -math.log(0.2), "share of near 20.00 ± 0.39 %"),
        ("unlearn_likelihood", "likelihood_ratio", None, 1.93, "ratio of near 1.930 ± 0.020"),
        ("alignment", "reward", None, 0.0, "reward near 0.000 ± 0.020 s.d."),
        ("siss", "loss", None, 0.1, "loss on near 0.100 ± 0.020"),
        ("adaptation", "loss", None, 0.1, "distance on near 0.100 ± 0.020"),
    ],
)
def test_the_pretrained_model_in_one_line(method, unit, law, metric, text):
    calibration = {"unit": unit, "metrics": {"near": metric}, "stderrs": {"near": 0.01}, "counts": {"near": 100}}
    assert calibration_text(calibration, unit_of(unit, method=method, law=law)) == text
    assert calibration_text({**calibration, "unit": "other"}, unit_of(unit, method=method)) == ""


def test_an_unknown_unit_is_refused_by_name():
    with pytest.raises(ValueError, match="unknown unit 'bits'; the known units are"):
        unit_of("bits")


@pytest.mark.parametrize(
    ("value", "stderr", "text"),
    [
        (1.234, 0.0102, "1.234 ± 0.020"),
        (12.34, 3.0, "12.3 ± 5.9"),
        (123.4, 30.0, "123 ± 59"),
        (0.000012, 0.000031, "0.000012 ± 0.000061"),
        (3.1e-9, 1.2e-8, "3.1e-09 ± 2.4e-08"),
        (0.1234567, math.nan, "0.123"),
        (0.1234567, 0.0, "0.123"),
        (math.nan, 1.0, "–"),
    ],
)
def test_a_value_has_the_digits_its_error_allows(value, stderr, text):
    assert measured(value, stderr) == text
