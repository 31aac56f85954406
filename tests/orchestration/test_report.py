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
from dualsweep.orchestration.report import frontier_table, write_report
from dualsweep.orchestration.sweep_record import load_sweep, wilson_interval
from dualsweep.orchestration.trace import write_trace

MINORITY = {"digit_4": 4, "digit_5": 5, "digit_7": 7}
PRIOR = np.where(np.isin(np.arange(10), list(MINORITY.values())), 0.016, 0.136)
DRAWS = 12000  # with fewer, no share of 5 % can be certified to 0.12 nats
FIGURES = {"frontier", "achieved", "multipliers", "violations", "histograms", "samples"}


def write_sweep(folder: Path, unit: str = "share", *, relaxed: bool = False) -> Path:
    """4 thresholds (two hold, one undecided, one not), unconstrained, 2 fixed weights, 1 failed, 1 without a result."""
    requests = {
        "share": (0.05, 0.1, 0.2, 0.3),
        "loss": (0.05, 0.045, 0.04, 0.03),
        "nats": (3.0, 2.3, 1.6, 1.2),
        "reward": (0.2, 0.5, 0.8, 1.2),
        "likelihood_ratio": (0.8, 0.5, 0.3, 0.1),
    }[unit]
    sign = ">=" if unit in ("share", "reward") else "<="
    points = [{"trial_id": "unconstrained", "label": "unconstrained", "kind": "unconstrained", "thresholds": {}}]
    for index, request in enumerate((*requests, requests[1] * 1.07, requests[2] * 1.07)):
        label = f"minority {sign} {request:g}"
        thresholds = dict.fromkeys(MINORITY, request)
        points.append({"trial_id": f"{unit}-{index}", "label": label, "kind": "constrained", "thresholds": thresholds})
    for weight in (0.05, 0.5):
        kind = {"label": f"fixed weights {weight:g}", "kind": "fixed_weights", "thresholds": {}, "fixed_weight": weight}
        points.append({"trial_id": f"fixed-{weight:g}", **kind})
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "points.json").write_text(json.dumps(points))
    config = {
        "name": "digits-fairness",
        "method": "fairness",
        "thresholds": {"unit": unit, "grid": {"minority": list(requests)}},
    }
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
            result |= {
                "status": "failed",
                "error": error,
                "unit": unit,
                "objective": None,
                "constraints": [],
                "certificate": None,
            }
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
        multipliers = np.full(3, 0.1 * 2 ** int(point["trial_id"][-1]))
        if unit == "share":
            exact = class_restriction_multipliers(-np.log(list(point["thresholds"].values())), PRIOR[[4, 5, 7]])
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
    cost = class_restriction_objective(
        np.full(3, max(share, 0.02) / (1.001 - 3 * min(share, 0.3)) - 0.016), PRIOR[[4, 5, 7]]
    )
    counts = rng.multinomial(DRAWS, _shares(values if unit == "share" else np.full(3, 0.1)))
    canonical = dict(zip(names, problem.thresholds, strict=True)) if asked else {}
    rows = [
        {
            "name": name,
            "unit": unit,
            "metric": metric[i],
            "metric_stderr": metric_stderr[i],
            "threshold": canonical.get(name),
            "user_threshold": point["thresholds"].get(name),
            "user_value": values[i],
            "user_stderr": stderr[i],
            "violation": metric[i] - canonical[name] if asked else None,
            "stderr": metric_stderr[i],
            "count": DRAWS,
        }
        for i, name in enumerate(names)
    ]
    result = {
        **{key: point[key] for key in ("trial_id", "label", "kind", "thresholds")},
        "status": "completed",
        "error": None,
        "method": "fairness",
        "unit": unit,
        "multipliers": dict(zip(names, multipliers, strict=True)),
        "averaged_multipliers": {},
        "exact_multipliers": None if exact is None else dict(zip(names, exact, strict=True)),
        "relaxations": {},
        "primal_steps": 1500,
        "dual_steps": 75,
        "wall_seconds": 31.0,
        "objective": {
            "value": cost + 0.006 * rng.standard_normal(),
            "stderr": 0.006,
            "unit": "nats",
            "meaning": "KL(q||p) above the pretrained model's, on held-out main data",
        },
        "exact_objective": exact_objective,
        "constraints": rows,
        "certificate": certificate.to_dict(),
        "histogram": {
            "classes": [f"digit_{c}" for c in range(10)],
            "counts": counts.tolist(),
            "total": DRAWS,
            "prior": PRIOR.tolist(),
            "classifier": "SVM",
            "classifier_accuracy": 0.981,
            "classifier_accuracy_count": 360,
        },
    }
    (directory / "result.json").write_text(json.dumps(result, default=float))
    np.save(directory / "samples.npy", _pictures(rng))
    if point["kind"] != "unconstrained":
        target = np.array(list(point["thresholds"].values())) if asked else values
        _write_trace(directory, point, unit, target, 75, rng, relaxed, multipliers, fixed=point.get("fixed_weight"))


def _shares(minority: np.ndarray) -> np.ndarray:
    shares = np.empty(10)
    shares[[4, 5, 7]] = minority
    shares[[0, 1, 2, 3, 6, 8, 9]] = (1 - minority.sum()) / 7
    return shares


def _pictures(rng) -> np.ndarray:
    from sklearn.datasets import load_digits

    images = load_digits().images[rng.integers(0, 1797, 40)] / 8 - 1
    return (images + 0.12 * rng.standard_normal(images.shape)).clip(-1, 1)[:, None].astype(np.float32)


def _write_trace(directory, point, unit, target, steps, rng, relaxed, limit=0.2, fixed=None) -> None:
    start = np.full(3, 0.02) if unit == "share" else target * 1.3
    rows = []
    for step in range(1, steps + 1):
        progress = 1 - math.exp(-step / 12)
        value = start + (target - start) * progress * (1 + 0.12 * math.exp(-step / 25) * math.sin(step / 6))
        violation = np.log(target / value) if unit == "share" else value - target
        stderr = 0.12 * np.ones(3) if unit == "share" else 0.04 * np.abs(target)
        violation = violation + stderr * rng.standard_normal(3)
        multipliers = (
            np.full(3, fixed)
            if fixed
            else np.array([0.95, 1.0, 1.06]) * limit * (progress + 0.25 * math.exp(-step / 20) * math.sin(step / 8))
        )
        vectors = {
            "multipliers": multipliers,
            "relaxations": 0.3 * progress * multipliers if relaxed and not fixed else np.zeros(3),
            "metrics": violation,
            "metric_stderrs": stderr,
            "thresholds": target,
            "violations": violation,
            "violation_stderrs": stderr,
            "smoothed_violations": violation,
        }
        scalars = dict.fromkeys(
            (
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
            ),
            0.1,
        )
        rows.append({"dual_step": step, "primal_step": 20 * step, "attempt": 1, "workers": 1, "lag": 0, **scalars, **vectors})
    write_trace(rows, directory / "trace.parquet", constraints=list(MINORITY), trial_id=point["trial_id"])


@pytest.fixture(scope="module")
def share_report(tmp_path_factory):
    sweep_dir = write_sweep(tmp_path_factory.mktemp("runs") / "digits-fairness")
    return sweep_dir, write_report(sweep_dir)


def page_text(paths) -> str:
    """The page as a reader sees it: without images, styles and tags."""
    page = re.sub(r"data:image[^\"]*", "", paths.index.read_text(encoding="utf-8"))
    page = re.sub(r"<style>.*?</style>|<[^>]+>", " ", page, flags=re.DOTALL)
    return re.sub(r"\s+", " ", page.replace("&lt;", "<").replace("&gt;", ">").replace("&#34;", '"'))


def edit_result(sweep_dir: Path, trial_id: str, **changes) -> None:
    path = sweep_dir / "trials" / trial_id / "result.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_thresholds(sweep_dir: Path, trial_id: str, **thresholds: float) -> None:
    points = json.loads((sweep_dir / "points.json").read_text())
    next(point for point in points if point["trial_id"] == trial_id)["thresholds"].update(thresholds)
    (sweep_dir / "points.json").write_text(json.dumps(points))


def test_every_figure_is_a_readable_png_and_relaxations_are_left_out_where_all_are_zero(share_report):
    _, paths = share_report
    assert set(paths.figures) == FIGURES
    for path in paths.figures.values():
        with Image.open(path) as image:
            assert image.format == "PNG" and image.width >= 900
            assert np.asarray(image.convert("L")).std() > 5  # not blank
    assert not (paths.directory / "relaxations.png").exists()
    assert "Every relaxation stayed zero" in page_text(paths)


def test_the_page_is_one_file_that_needs_nothing_else(share_report):
    _, paths = share_report
    page = paths.index.read_text(encoding="utf-8")
    assert not re.search(r"(src|href)=\"(https?:)?//", page) and "<script" not in page and "@import" not in page
    inlined = re.findall(r"src=\"data:image/png;base64,([^\"]+)\"", page)
    assert {base64.b64decode(data) for data in inlined} == {path.read_bytes() for path in paths.figures.values()}


def test_the_summary_says_what_was_asked_what_holds_and_what_it_costs(share_report):
    text = page_text(share_report[1])
    assert "give each of digit_4, digit_5 and digit_7 at least a requested share of the samples" in text
    assert "2 of 4 judged points hold at 95 % confidence (≥ 5 % and ≥ 10 %)" in text
    assert "Not held: ≥ 30 %." in text and "too few to tell: ≥ 20 %." in text
    assert "The strictest point on the front, ≥ 10 %, reaches 9.8" in text
    assert "1 failed, 1 unfinished" in text
    assert text.index("Asked.") < text.index("What a requirement costs") < text.index("Reached against requested")


def test_the_classifier_accuracy_stands_under_the_histograms(share_report):
    assert "this classifier: SVM, right on 98.1 % of 360 held-out real samples" in page_text(share_report[1])


def test_a_failed_trial_is_named_with_the_last_line_of_its_error_and_escaped(share_report):
    text = share_report[1].index.read_text(encoding="utf-8")
    assert "RuntimeError: loss is not finite at step 40 &lt;nan&gt;" in text and "Traceback" not in text


def test_the_frontier_table_lists_every_trial_and_marks_the_front(share_report):
    rows = {row["trial_id"]: row for row in frontier_table(share_report[0])}
    assert [row["requested"] for row in rows.values() if row["kind"] == "constrained"] == pytest.approx(
        [0.05, 0.1, 0.107, 0.2, 0.214, 0.3]
    )
    assert {trial_id for trial_id, row in rows.items() if row["on_front"]} == {"share-0", "share-1"}
    assert rows["share-2"]["verdict"] == "undecided" and rows["share-3"]["verdict"] == "infeasible"
    assert rows["unconstrained"]["verdict"] == "" and math.isnan(rows["unconstrained"]["requested"])
    assert rows["share-4"]["status"] == "failed" and rows["share-4"]["error"].startswith("RuntimeError")
    assert rows["share-5"]["status"] == "unfinished" and math.isnan(rows["share-5"]["objective"])
    result = json.loads((share_report[0] / "trials/share-1/result.json").read_text())
    assert rows["share-1"]["achieved"] == min(c["user_value"] for c in result["constraints"])


def test_csv_and_parquet_tables_hold_the_same_numbers_as_the_results(share_report):
    sweep_dir, paths = share_report
    assert {path.name.split(".")[0] for path in paths.tables.values()} == {
        "points",
        "trace",
        "histograms",
        "certificates",
    }
    for name in ("points", "trace", "histograms", "certificates"):
        table = pq.read_table(paths.tables[f"{name}.parquet"])
        with paths.tables[f"{name}.csv"].open(newline="", encoding="utf-8") as stream:
            assert len(list(csv.DictReader(stream))) == table.num_rows > 0
    points = {row["trial_id"]: row for row in pq.read_table(paths.tables["points.parquet"]).to_pylist()}
    result = json.loads((sweep_dir / "trials/share-2/result.json").read_text())
    assert points["share-2"]["value/digit_5"] == result["constraints"][1]["user_value"]
    assert points["share-2"]["objective"] == result["objective"]["value"]
    trace = [row for row in pq.read_table(paths.tables["trace.parquet"]).to_pylist() if row["trial_id"] == "share-5"]
    assert len(trace) == 30 * 3 and {row["constraint"] for row in trace} == set(MINORITY)
    counts = [
        row for row in pq.read_table(paths.tables["histograms.parquet"]).to_pylist() if row["trial_id"] == "share-0"
    ]
    assert sum(row["count"] for row in counts) == DRAWS and all(
        r["share_low"] <= r["share"] <= r["share_high"] for r in counts
    )


@pytest.mark.parametrize("unit", ["loss", "nats", "reward", "likelihood_ratio"])
def test_in_every_unit_the_stricter_request_is_the_stricter_end_of_the_front(tmp_path, unit):
    sweep_dir = write_sweep(tmp_path / "sweep", unit)
    sweep = load_sweep(sweep_dir)
    assert [trial.trial_id for trial in sweep.front()] == [f"{unit}-0", f"{unit}-1"]
    achieved = [trial.achieved[0] for trial in sweep.front()]
    assert (achieved[0] < achieved[1]) == (unit == "reward")
    rows = next(trial for trial in sweep.trials if trial.trial_id == f"{unit}-1").constraints
    worst = min if unit == "reward" else max
    assert achieved[1] == worst(row["user_value"] for row in rows)
    edit_thresholds(sweep_dir, f"{unit}-5", digit_4=0.9, digit_7=0.07)  # a grid may ask each class for something else
    requested = {row["trial_id"]: row["requested"] for row in frontier_table(sweep_dir)}
    assert requested[f"{unit}-5"] == (0.07 if unit == "reward" else max(0.9, requested[f"{unit}-2"] * 1.07))
    asked = [value for value in requested.values() if not math.isnan(value)]
    assert asked == sorted(asked, reverse=unit != "reward")


def test_a_loss_sweep_reverses_its_axes_and_draws_the_relaxations(tmp_path):
    from dualsweep.orchestration import figures

    sweep_dir = write_sweep(tmp_path / "sweep", "loss", relaxed=True)
    sweep = load_sweep(sweep_dir)
    for draw in (figures.frontier, figures.achieved):
        axes = draw(sweep).axes[0]
        assert axes.xaxis_inverted() and "stricter" in axes.get_xlabel()
    paths = write_report(sweep_dir)
    assert set(paths.figures) == FIGURES | {"relaxations"}
    assert "keep the denoising loss on each of digit_4, digit_5 and digit_7 at or below" in page_text(paths)


def test_thresholds_given_as_factors_are_shown_as_the_losses_they_became(tmp_path):
    sweep_dir = write_sweep(tmp_path / "sweep", "loss")
    factors = {name: {"factor": 0.9} for name in MINORITY}
    edit_result(sweep_dir, "loss-1", thresholds=factors)
    edit_thresholds(sweep_dir, "loss-5", **factors)
    rows = {row["trial_id"]: row for row in frontier_table(sweep_dir)}
    assert rows["loss-1"]["requested"] == 0.045  # what the trial made of the factor
    assert math.isnan(rows["loss-5"]["requested"])  # without a result nobody knows the loss behind it


def test_the_frontier_crosses_infeasible_points_and_joins_only_those_that_hold(share_report):
    from dualsweep.orchestration import figures

    sweep = load_sweep(share_report[0])
    axes = figures.frontier(sweep).axes[0]
    front = next(line for line in axes.lines if line.get_label() == "Pareto front of the points that hold")
    expected = [(100 * trial.achieved[0], trial.objective) for trial in sweep.front()]
    assert front.get_xydata() == pytest.approx(np.array(expected))
    crossed = [line.get_xydata()[0] for line in axes.lines if line.get_marker() == "x"]
    broken = next(trial for trial in sweep.trials if trial.trial_id == "share-3")
    assert crossed == [pytest.approx([100 * broken.achieved[0], broken.objective])]
    assert any(text.get_text() == "≥ 30 % (infeasible)" for text in axes.texts)


def test_histograms_mark_the_constrained_classes_whether_or_not_classes_carry_a_prefix(tmp_path):
    from dualsweep.orchestration import figures

    sweep_dir = write_sweep(tmp_path / "sweep")
    for classes in (
        [f"digit_{c}" for c in range(10)],
        [str(c) for c in range(10)],
        ["cat", "dog_4", "a_5", *"1237689"],
    ):
        for path in (sweep_dir / "trials").glob("*/result.json"):
            result = json.loads(path.read_text())
            if result["status"] == "completed":
                edit_result(sweep_dir, path.parent.name, histogram={**result["histogram"], "classes": classes})
        axes = figures.histograms(load_sweep(sweep_dir)).axes[3]
        marked = [i for i, bar in enumerate(axes.patches) if bar.get_facecolor()[2] > 2 * bar.get_facecolor()[0]]
        assert marked == ([6] if "cat" in classes else [4, 5, 7])
        labels = [label.get_text() for label in axes.get_xticklabels()]
        assert labels == (classes if "cat" in classes else [str(c) for c in range(10)])


def test_a_verdict_on_a_failed_trial_counts_for_nothing(tmp_path):
    sweep_dir = write_sweep(tmp_path / "sweep")
    edit_result(sweep_dir, "share-1", status="diverged")
    rows = {row["trial_id"]: row for row in frontier_table(sweep_dir)}
    assert rows["share-1"]["verdict"] == "" and not rows["share-1"]["on_front"]


def test_without_certified_points_the_page_says_so_and_still_names_the_costs(tmp_path):
    sweep_dir = write_sweep(tmp_path / "sweep")
    for trial_id in ("share-0", "share-1"):
        result = json.loads((sweep_dir / "trials" / trial_id / "result.json").read_text())
        edit_result(sweep_dir, trial_id, certificate={**result["certificate"], "verdict": "undecided"})
    text = page_text(write_report(sweep_dir))
    assert "0 of 4 judged points hold" in text and "No point is certified to hold" in text
    assert "The strictest undecided point, ≥ 20 %" in text


def test_a_sweep_that_has_only_started_gives_a_page_that_says_so(tmp_path):
    points = [{"trial_id": "a", "label": "minority >= 0.1", "kind": "constrained", "thresholds": {"digit_4": 0.1}}]
    (tmp_path / "points.json").write_text(json.dumps(points))
    paths = write_report(tmp_path, tmp_path / "elsewhere")
    text = page_text(paths)
    assert paths.figures == {} and paths.index == tmp_path / "elsewhere" / "index.html"
    assert "No constrained point has a result to judge yet." in text and "1 not started" in text
    assert "No trial has a result yet, so there is no frontier to draw." in text


def test_damaged_files_become_notes_and_the_rest_is_reported(tmp_path):
    sweep_dir = write_sweep(tmp_path / "sweep")
    (sweep_dir / "trials/share-0/result.json").write_text('{"trial_id": "share-0", "lab')
    trace = sweep_dir / "trials/share-1/trace.parquet"
    trace.write_bytes(trace.read_bytes()[:100])
    (sweep_dir / "trials/share-2/samples.npy").write_bytes(b"\x93NUMPY")
    (sweep_dir / "trials/share-3/result.json").write_text("[]")
    text = page_text(write_report(sweep_dir))
    for note in (
        "share-0/result.json could not be read",
        "share-1/trace.parquet could not be read",
        "share-3/result.json holds a list",
    ):
        assert note in text
    assert {row["trial_id"] for row in frontier_table(sweep_dir) if row["on_front"]} == {"share-1"}


def test_numbers_that_are_not_finite_are_left_out_of_the_figures(tmp_path):
    sweep_dir = write_sweep(tmp_path / "sweep")
    edit_result(sweep_dir, "share-1", objective={"value": math.nan, "stderr": None, "unit": "nats", "meaning": "x"})
    paths = write_report(sweep_dir)
    assert set(paths.figures) == FIGURES
    assert not next(row for row in frontier_table(sweep_dir) if row["trial_id"] == "share-1")["on_front"]


def test_trials_of_a_search_are_found_without_an_entry_among_the_points(tmp_path):
    sweep_dir = write_sweep(tmp_path / "sweep")
    points = json.loads((sweep_dir / "points.json").read_text())
    (sweep_dir / "points.json").write_text(json.dumps([p for p in points if p["kind"] != "constrained"]))
    rows = {row["trial_id"]: row for row in frontier_table(sweep_dir)}
    assert rows["share-1"]["label"] == "minority >= 0.1" and rows["share-1"]["on_front"]


def test_a_second_report_removes_a_figure_that_no_longer_applies(tmp_path):
    sweep_dir = write_sweep(tmp_path / "sweep", relaxed=True)
    assert "relaxations" in write_report(sweep_dir).figures
    for trace in (sweep_dir / "trials").glob("*/trace.parquet"):
        trace.unlink()
    paths = write_report(sweep_dir)
    assert "relaxations" not in paths.figures and not (paths.directory / "relaxations.png").exists()
    assert not (paths.directory / "tables" / "trace.csv").exists()


def test_vectors_colour_images_and_wide_grids_are_drawn_too(tmp_path):
    sweep_dir = write_sweep(tmp_path / "sweep")
    rng = np.random.default_rng(3)
    np.save(sweep_dir / "trials/share-0/samples.npy", rng.standard_normal((64, 2)).astype(np.float32))
    np.save(sweep_dir / "trials/share-1/samples.npy", rng.uniform(-1, 1, (5, 3, 300, 300)).astype(np.float32))
    template = json.loads((sweep_dir / "trials/share-1/result.json").read_text())
    for extra in range(30):
        directory = sweep_dir / "trials" / f"more-{extra:02d}"
        directory.mkdir()
        (directory / "result.json").write_text(
            json.dumps({**template, "trial_id": directory.name, "label": f"more {extra}"})
        )
    assert set(write_report(sweep_dir).figures) == FIGURES


def test_no_sweep_is_refused_with_field_value_and_remedy(tmp_path):
    with pytest.raises(ValueError, match=r"sweep_dir='.*nowhere'.*holds no sweep.*give the folder"):
        write_report(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize(
    ("count", "total", "low", "high"), [(0, 10, 0.0, 0.2775), (5, 10, 0.2366, 0.7634), (10, 10, 0.7225, 1.0)]
)
def test_wilson_intervals_match_the_published_table(count, total, low, high):
    assert wilson_interval(count, total) == pytest.approx((low, high), abs=1e-3)  # 1.96 against 1.959964


def test_reading_a_sweep_needs_no_ray_mlflow_torch_or_matplotlib():
    heavy = "('ray', 'mlflow', 'torch', 'matplotlib')"
    code = f"import sys, dualsweep.orchestration.report; print([m for m in {heavy} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
