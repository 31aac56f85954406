"""Sweeps on a real local Ray: what they leave behind, and what they give back."""

import html
import io
import json
from pathlib import Path

import diffusers
import mlflow
import numpy as np
import pytest
import ray
from mlflow import MlflowClient
from rich.console import Console

from dualsweep.constraints import Constraint, Problem
from dualsweep.orchestration.cluster import start_ray, stop_ray
from dualsweep.orchestration.config import ConfigError
from dualsweep.orchestration.dual_server import start_dual_server
from dualsweep.orchestration.status import status_table
from dualsweep.orchestration.sweep import run_sweep
from dualsweep.orchestration.trace import read_trace

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    """run_sweep leaves the repository's root for an empty folder; give the test its own to come back from."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    yield
    ray.shutdown()


def results_of(outcome) -> dict[str, dict]:
    found = [json.loads(path.read_text()) for path in (outcome.folder / "trials").glob("*/result.json")]
    return {result["trial_id"]: result for result in found}


def child_runs(outcome, experiment: str):
    client = MlflowClient(outcome.tracking_uri)
    runs = client.search_runs([client.get_experiment_by_name(experiment).experiment_id])
    children = [run for run in runs if "mlflow.parentRunId" in run.data.tags]
    parents = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    return client, parents, children


def test_a_sweep_leaves_results_traces_models_and_a_report(tiny_config, tmp_path, monkeypatch):
    config = tiny_config(baselines={"unconstrained": True, "fixed_weights": [0.2]})
    outcome = run_sweep(config, console=Console(quiet=True))
    # Two groups of one CPU ran side by side on this machine's CPUs: trial drivers and DualServer held none of them.
    assert (outcome.status, outcome.exit_code, outcome.failed) == ("completed", 0, {})
    assert (outcome.held.cpus, outcome.held.placement_groups, outcome.undelivered) == (0, 0, [])
    results = results_of(outcome)
    assert {result["kind"] for result in results.values()} == {"unconstrained", "constrained", "fixed_weights"}
    assert len(results) == 4
    for trial_id, result in results.items():
        rows = read_trace(outcome.folder / "trials" / trial_id / "trace.parquet")
        assert [row["dual_step"] for row in rows] == list(range(1, 13))
        assert result["dual_steps"] == 12 and result["primal_steps"] == 24
        if result["kind"] == "constrained":
            assert all(value > 0 for value in result["multipliers"].values())  # a trace of zeros would prove nothing
            assert rows[-1]["multipliers"] == list(result["multipliers"].values())
            assert result["certificate"]["verdict"] in ("feasible", "infeasible", "undecided")
    page = outcome.report.read_text()
    assert "data:image/png;base64" in page and "http" not in page.split("<body")[0]

    client, parents, children = child_runs(outcome, "tiny")
    assert len(parents) == 1 and len(children) == 5  # four trials and the pretrained model
    constrained = next(run for run in children if run.data.tags.get("dualsweep.trial_kind") == "constrained")
    assert constrained.data.tags["feasible"] in ("true", "false", "undecided")
    history = client.get_metric_history(constrained.info.run_id, "multiplier/digit_4")
    trial_id = constrained.data.tags["dualsweep.trial"]
    rows = read_trace(outcome.folder / "trials" / trial_id / "trace.parquet")
    assert sorted((point.step, point.value) for point in history) == [
        (row["dual_step"], row["multipliers"][0]) for row in rows
    ]

    monkeypatch.setenv("MLFLOW_TRACKING_URI", outcome.tracking_uri)
    models = mlflow.search_logged_models([constrained.info.experiment_id], output_format="list")
    (model,) = [found for found in models if found.source_run_id == constrained.info.run_id]
    loaded = mlflow.pyfunc.load_model(model.model_uri)
    samples = loaded.predict(None, params={"num_samples": 3, "num_inference_steps": 2, "seed": 0})
    assert np.asarray(samples).shape == (3, 1, 8, 8)
    folder = mlflow.artifacts.download_artifacts(model.model_uri, dst_path=str(tmp_path / "downloaded"))
    (index,) = [path for path in (tmp_path / "downloaded").rglob("model_index.json")]
    pipeline = diffusers.DDPMPipeline.from_pretrained(index.parent)
    assert tuple(pipeline.unet.config.block_out_channels) == (8, 16), folder


def test_asha_gives_every_cpu_back_and_leaves_no_placement_group(tiny_config):
    config = tiny_config(
        thresholds={"unit": "share", "grid": {"minority": [0.05, 0.1, 0.15, 0.2, 0.25, 0.3]}},
        scheduler={"kind": "asha", "grace_dual_steps": 3},
    )
    outcome = run_sweep(config, console=Console(quiet=True))
    results = results_of(outcome)
    stopped = [result for result in results.values() if result["status"] == "stopped"]
    assert stopped and all(0 < result["dual_steps"] < 12 for result in stopped)
    assert results["unconstrained"]["status"] == "completed"  # baselines are not the scheduler's to stop
    assert outcome.status == "completed" and len(results) == 7
    assert (outcome.held.cpus, outcome.held.placement_groups) == (0, 0)


def test_the_dual_server_holds_no_cpu_and_is_found_again_after_it_was_killed(tmp_path):
    start_ray(num_cpus=1)
    try:
        server = start_dual_server(tmp_path)
        constraint = Constraint(name="a", unit="share", threshold=0.1)
        problem = Problem(method="fairness", objective="loss", constraints=(constraint,)).to_dict()
        rule = {"rule": "ascent", "step_size": 0.1}
        server.begin("t", 1, problem=problem, rule=rule, start=[0.0], dual_state=None)
        assert ray.available_resources()["CPU"] == 1.0
        measurement = {
            "primal_step": 1, "workers": 1, "wall_time": 0.0, "lr": 1e-3, "grad_norm": 1.0, "objective": 1.0, "objective_stderr": 0.1,
            "lagrangian": 1.0, "metrics": [4.0], "metric_stderrs": [0.1], "counts": [10],
        }  # fmt: skip
        first = server.report("t", 1, 1, measurement)
        ray.kill(server.handle, no_restart=False)
        again = server.report("t", 1, 1, measurement)  # answered from the journal: nothing moves twice
        assert again == first and first.multipliers[0] > 0
        assert server.report("t", 1, 2, measurement).multipliers[0] == pytest.approx(
            2 * first.multipliers[0], rel=1e-12
        )
    finally:
        stop_ray()


def test_a_sweep_in_the_trials_own_processes_with_relaxations_and_relative_losses(tiny_config):
    config = tiny_config(
        compute={"workers": 0},
        thresholds={"unit": "loss", "grid": {"minority": [{"factor": 0.5}, {"factor": 0.9}]}},
        dual={
            "rule": "resilient_explicit",
            "step_size": 0.5,
            "relaxation_cost": 0.5,
            "relaxation_step_size": 0.5,
            "primal_steps_per_dual_step": 2,
        },
    )
    outcome = run_sweep(config, console=Console(quiet=True))
    constrained = [result for result in results_of(outcome).values() if result["kind"] == "constrained"]
    assert outcome.status == "completed" and len(constrained) == 2
    for result in constrained:
        assert all(value > 0 for value in result["relaxations"].values())
    assert (outcome.report.parent / "relaxations.png").is_file()


def test_searched_thresholds_come_from_optuna_and_count_up_to_points(tiny_config):
    config = tiny_config(
        compute={"workers": 0},
        thresholds={
            "unit": "share",
            "grid": None,
            "search": {"axes": {"minority": {"loguniform": [0.05, 0.3]}}, "points": 3},
        },
    )
    outcome = run_sweep(config, console=Console(quiet=True))
    constrained = [result for result in results_of(outcome).values() if result["kind"] == "constrained"]
    assert outcome.status == "completed"
    asked = sorted({result["thresholds"]["digit_4"] for result in constrained})
    assert len(asked) == 3 and asked[0] >= 0.05 and asked[-1] <= 0.3


def test_trials_that_fail_or_run_away_are_named_tagged_and_shown_and_the_others_finish(tiny_config):
    # A weight of 1e38 without normalisation overflows the gradient's norm; a dual step size of 1e6 lets the multipliers
    # run away. Each must stop its own trial, and nothing else.
    config = tiny_config(
        compute={"workers": 0},
        primal={"normalize": False},
        dual={"step_size": 1e6},
        divergence={"dual_steps": 2},
        baselines={"unconstrained": True, "fixed_weights": [1e38]},
        thresholds={"grid": {"minority": [0.1]}},
    )
    outcome = run_sweep(config, console=Console(quiet=True))
    results = {result["kind"]: result for result in results_of(outcome).values()}
    assert (outcome.status, outcome.exit_code) == ("failed", 1)
    broken, away = results["fixed_weights"], results["constrained"]
    assert set(outcome.failed) == {broken["label"], away["label"]}
    assert "non-finite" in outcome.failed["fixed weights 1e+38"] and "runs away" in outcome.failed[away["label"]]
    assert {kind: result["status"] for kind, result in results.items()} == {
        "unconstrained": "completed",
        "constrained": "diverged",
        "fixed_weights": "diverged",
    }
    assert away["dual_steps"] < 12 and "grew to" in away["reason"] and away["certificate"] is None

    client, _, children = child_runs(outcome, "tiny")
    runs = {run.data.tags["dualsweep.trial_kind"]: run for run in children}
    assert {kind: run.info.status for kind, run in runs.items()} == {
        "base": "FINISHED",
        "unconstrained": "FINISHED",
        "constrained": "FAILED",
        "fixed_weights": "FAILED",
    }
    for result in (broken, away):
        tags = runs[result["kind"]].data.tags
        assert (tags["dualsweep.status"], tags["dualsweep.reason"]) == ("diverged", result["reason"])
    path = client.download_artifacts(runs["fixed_weights"].info.run_id, "error.txt", str(outcome.folder))
    text = Path(path).read_text(encoding="utf-8")
    assert "NonFiniteError" in text and "Traceback" in text

    shown = Console(record=True, width=400, file=io.StringIO())
    shown.print(status_table(outcome.folder.parent, "tiny"))
    page = html.unescape(outcome.report.read_text(encoding="utf-8"))
    for text in (shown.export_text(), page):
        words = " ".join(text.split())
        assert "diverged" in words and away["reason"] in words and "non-finite" in words


def test_more_workers_than_the_cluster_can_hold_is_refused_before_anything_is_written(tiny_config, tmp_path):
    config = tiny_config(compute={"workers": 2, "cpus_per_worker": 64})
    with pytest.raises(ConfigError, match=r"compute.workers=2: one trial needs 128 CPUs"):
        run_sweep(config, console=Console(quiet=True))
    assert not (tmp_path / "runs").exists() and not ray.is_initialized()
