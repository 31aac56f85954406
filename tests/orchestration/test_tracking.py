"""MLflow gets every number once, whatever happens to it, and the sweep never notices.

All on real stores: SQLite files, and one real `mlflow server` on the loopback that is down, up, killed and up again.
"""

import json
import math
import os
import shutil
import socket
import subprocess
import sys
import textwrap
import time
import traceback
from collections import Counter
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

from dualsweep.orchestration import tracking
from dualsweep.orchestration.delivery import sync_sweep
from dualsweep.orchestration.trace import COLUMNS, VECTOR_COLUMNS, row_metrics, write_trace
from dualsweep.orchestration.tracking import Tracker, check_tracking, resolve_tracking_uri

NAMES = ("digit_4", "digit_7")
PATIENCE = 120  # seconds; a server start takes 5, and took 20 on a busy two-core machine


def make_rows(count, constraints=NAMES, start=1, seed=0):
    rng = np.random.default_rng(seed)
    rows = []
    for step in range(start, start + count):
        row = {name: float(rng.normal()) for name in COLUMNS}
        row |= {
            "dual_step": step,
            "primal_step": 2 * step,
            "attempt": 1,
            "workers": 1,
            "lag": 0,
            "wall_time": 1.7e9 + step / 8,
        }
        row |= {name: rng.normal(size=len(constraints)).tolist() for name in VECTOR_COLUMNS}
        rows.append(row)
    return rows


def make_result(trial_id, verdict="feasible", status="completed", error=None):
    return {
        "trial_id": trial_id,
        "label": f"minority >= 0.1 ({trial_id})",
        "kind": "constrained",
        "status": status,
        "error": error,
        "method": "fairness",
        "unit": "share",
        "thresholds": dict.fromkeys(NAMES, 0.1),
        "multipliers": dict.fromkeys(NAMES, 0.12),
        "averaged_multipliers": dict.fromkeys(NAMES, 0.11),
        "exact_multipliers": None,
        "relaxations": dict.fromkeys(NAMES, 0.0),
        "primal_steps": 20,
        "dual_steps": 10,
        "wall_seconds": 3.5,
        "objective": {"value": 0.25, "stderr": 0.01, "unit": "nats", "meaning": "KL"},
        "exact_objective": None,
        "constraints": [{"name": name, "metric": 2.4, "user_value": 0.09, "violation": -0.1} for name in NAMES],
        "certificate": {"verdict": verdict},
        "histogram": {"classes": ["4", "7"], "counts": [3, 9], "total": 12, "classifier_accuracy": 0.98},
    }


def small_unet(**options):
    return UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        **options,
    )


@pytest.fixture(scope="session")
def pipeline_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline") / "model"
    torch.manual_seed(0)
    DDPMPipeline(small_unet(), DDPMScheduler(num_train_timesteps=20)).save_pretrained(folder)
    return folder


@pytest.fixture
def uri(tmp_path, empty_database):
    (tmp_path / "mlflow.db").write_bytes(empty_database.read_bytes())
    return f"sqlite:///{tmp_path / 'mlflow.db'}"


@pytest.fixture
def make_sweep(tmp_path, pipeline_folder):
    """A sweep directory: a feasible trial with a pipeline, one that is none, one that failed, one still running."""

    def make():
        sweep = tmp_path / "storage" / "digits"
        failure = "Traceback (most recent call last):\n  ...\nRuntimeError: loss is not finite at primal step 7"
        results = {
            "share-a": make_result("share-a"),
            "share-b": make_result("share-b", "infeasible"),
            "share-c": make_result("share-c", "undecided", "failed", failure),
            "share-d": None,
        }
        for index, (trial_id, result) in enumerate(results.items()):
            folder = sweep / "trials" / trial_id
            folder.mkdir(parents=True)
            write_trace(make_rows(10, seed=index), folder / "trace.parquet", constraints=NAMES, trial_id=trial_id)
            if result is not None:
                (folder / "result.json").write_text(json.dumps(result), encoding="utf-8")
        (sweep / "trials" / "share-a" / "model").symlink_to(pipeline_folder)
        samples = np.linspace(-1, 1, 10 * 64, dtype=np.float32).reshape(10, 1, 8, 8)
        np.save(sweep / "trials" / "share-a" / "samples.npy", samples)
        (sweep / "trials" / "share-b" / "model").mkdir()
        (sweep / "trials" / "share-b" / "model" / "config.json").write_text("{}", encoding="utf-8")
        points = [{"trial_id": trial_id, "label": trial_id, "kind": "constrained"} for trial_id in results]
        (sweep / "points.json").write_text(json.dumps(points), encoding="utf-8")
        (sweep / "sweep.yaml").write_text("name: digits\ndual: {rule: ascent, step_size: 0.002}\n", encoding="utf-8")
        return sweep

    return make


@contextmanager
def open_tracker(uri, sweep_name="digits", experiment="fairness", **options):
    tracker = Tracker(uri, experiment, sweep_name, **options)
    yield tracker
    assert tracker.close(PATIENCE) == 0, [str(item) for item in tracker.undelivered()]


def runs_by_name(uri, experiment="fairness"):
    client = mlflow.MlflowClient(tracking_uri=uri)
    experiment_id = client.get_experiment_by_name(experiment).experiment_id
    return client, {run.info.run_name: run for run in client.search_runs([experiment_id])}


def assert_history_equals(client, run_id, rows, constraints=NAMES, keys=None):
    """Every curve (or those under `keys`) has every dual step once, with its value and its time."""
    for key in keys or row_metrics(rows[0], constraints):
        history = sorted((point.step, point.value, point.timestamp) for point in client.get_metric_history(run_id, key))
        expected = [
            (row["dual_step"], row_metrics(row, constraints)[key], int(row["wall_time"] * 1000)) for row in rows
        ]
        assert history == expected, key


def test_a_sweep_is_a_parent_run_with_a_child_a_trial_and_their_curves(uri):
    rows = make_rows(30)
    with open_tracker(uri) as tracker:
        tracker.start_sweep({"dual": {"rule": "ascent", "step_size": 0.002}, "classes": [4, 7]}, {"team": "x"})
        tracker.start_trial("t1", "minority >= 0.1", {"thresholds": {"digit_4": 0.1}}, constraints=NAMES)
        for row in rows:
            tracker.log_rows("t1", [row])
        tracker.finish_trial("t1", make_result("t1"), None)
        tracker.finish_sweep(None, "completed", {"feasible_points": 1}, {"front": "t1"})
    client, runs = runs_by_name(uri)
    parent, child = runs["digits"], runs["minority >= 0.1"]
    assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert parent.data.params == {"dual.rule": "ascent", "dual.step_size": "0.002", "classes": "[4, 7]"}
    assert parent.data.tags["team"] == "x"
    assert parent.data.metrics["feasible_points"] == 1
    assert child.data.params == {"thresholds.digit_4": "0.1"}
    assert (parent.info.status, child.info.status) == ("FINISHED", "FINISHED")
    assert_history_equals(client, child.info.run_id, rows)
    assert child.data.metrics["final/objective"] == 0.25
    assert child.data.metrics["final/violation/digit_7"] == -0.1
    assert child.data.metrics["final/share/7"] == 0.75
    assert "final/exact_objective" not in child.data.metrics


def test_verdicts_become_tags_and_a_failed_trial_shows_its_traceback(uri, make_sweep):
    with open_tracker(uri) as tracker:
        assert sync_sweep(make_sweep(), tracker) == ["share-a", "share-b", "share-c", "share-d"]
    client, runs = runs_by_name(uri)
    trials = {run.data.tags["dualsweep.trial"]: run for run in runs.values() if "dualsweep.trial" in run.data.tags}
    verdicts = {name: run.data.tags.get("feasible") for name, run in trials.items()}
    assert verdicts == {"share-a": "true", "share-b": "false", "share-c": "undecided", "share-d": None}
    failed = trials["share-c"]
    assert failed.info.status == "FAILED"
    assert "loss is not finite at primal step 7" in failed.data.tags["dualsweep.error"]
    path = client.download_artifacts(failed.info.run_id, "error.txt")
    assert Path(path).read_text(encoding="utf-8").startswith("Traceback (most recent call last)")
    # One point is still open, so neither it nor the sweep has ended.
    assert trials["share-d"].info.status == runs["digits"].info.status == "RUNNING"
    assert_history_equals(client, trials["share-d"].info.run_id, make_rows(10, seed=3))


def test_trace_and_sample_figure_are_artifacts(uri, make_sweep):
    with open_tracker(uri) as tracker:
        sync_sweep(make_sweep(), tracker)
    client, runs = runs_by_name(uri)
    run_id = runs["minority >= 0.1 (share-a)"].info.run_id
    listed = {entry.path for folder in ("", "trace", "figures") for entry in client.list_artifacts(run_id, folder)}
    assert {"trace/trace.parquet", "figures/samples.png", "result.json"} <= listed
    assert "sweep.yaml" in {entry.path for entry in client.list_artifacts(runs["digits"].info.run_id)}


def test_the_model_samples_through_pyfunc_and_loads_in_diffusers(uri, make_sweep, pipeline_folder, monkeypatch):
    with open_tracker(uri) as tracker:
        sync_sweep(make_sweep(), tracker)
    client, runs = runs_by_name(uri)
    run = runs["minority >= 0.1 (share-a)"]
    (output,) = run.outputs.model_outputs
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    params = {"num_samples": 3, "num_inference_steps": 4, "seed": 5}
    samples = {}
    for model_uri in (f"runs:/{run.info.run_id}/model", f"models:/{output.model_id}"):
        model = mlflow.pyfunc.load_model(model_uri)
        samples[model_uri] = model.predict(None, params=params)
    np.testing.assert_array_equal(model.predict(pd.DataFrame({"row": [0]}), params=params), samples[model_uri])
    first, second = samples.values()
    assert first.shape == (3, 1, 8, 8)
    assert first.dtype == np.float32
    assert -1 <= first.min() < first.max() <= 1
    np.testing.assert_array_equal(first, second)
    assert not np.allclose(first, model.predict(None, params=params | {"seed": 6}))
    with pytest.raises(ValueError, match="num_inference_steps is 99"):
        model.predict(None, params={"num_inference_steps": 99})
    folder = mlflow.artifacts.download_artifacts(f"runs:/{run.info.run_id}/model/artifacts/model")
    loaded, original = DDPMPipeline.from_pretrained(folder), DDPMPipeline.from_pretrained(pipeline_folder)
    for name, weight in original.unet.state_dict().items():
        torch.testing.assert_close(loaded.unet.state_dict()[name], weight, rtol=0, atol=0)
    expected = original(
        batch_size=3, generator=torch.Generator().manual_seed(5), num_inference_steps=4, output_type="np"
    ).images
    # Same weights, seed and steps; the tolerance only covers the change of range to [-1, 1] in float32.
    np.testing.assert_allclose(first, expected.transpose(0, 3, 1, 2) * 2 - 1, atol=1e-6)
    metrics = {metric.key: metric.value for metric in client.get_logged_model(output.model_id).metrics}
    assert metrics["final/objective"] == 0.25


def test_a_model_that_is_no_pipeline_becomes_plain_artifacts(uri, make_sweep):
    with open_tracker(uri) as tracker:
        sync_sweep(make_sweep(), tracker)
    client, runs = runs_by_name(uri)
    run = runs["minority >= 0.1 (share-b)"]
    assert [entry.path for entry in client.list_artifacts(run.info.run_id, "model")] == ["model/config.json"]
    assert not run.outputs or not run.outputs.model_outputs


def test_a_model_of_several_laws_samples_its_main_law_through_pyfunc(uri, tmp_path, monkeypatch):
    torch.manual_seed(1)
    unet = small_unet(num_class_embeds=3)
    DDPMPipeline(unet, DDPMScheduler(num_train_timesteps=20)).save_pretrained(tmp_path / "trial" / "model")
    with open_tracker(uri) as tracker:
        tracker.start_trial("t1", "point", {}, constraints=NAMES)
        tracker.finish_trial("t1", make_result("t1"), tmp_path / "trial")
    _, runs = runs_by_name(uri)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    model = mlflow.pyfunc.load_model(f"runs:/{runs['point'].info.run_id}/model")
    found = model.predict(None, params={"num_samples": 3, "num_inference_steps": 4, "seed": 5})
    wanted = {}
    for label in (0, 1):  # a model without labels whose every prediction is made under this one
        plain = DDPMPipeline(unet, DDPMScheduler(num_train_timesteps=20))
        plain.set_progress_bar_config(disable=True)
        with monkeypatch.context() as patch:
            patch.setattr(unet, "forward", partial(unet.forward, class_labels=torch.full((3,), label)))
            images = plain(
                batch_size=3, generator=torch.Generator().manual_seed(5), num_inference_steps=4, output_type="np"
            ).images
        wanted[label] = images.transpose(0, 3, 1, 2) * 2 - 1
    np.testing.assert_allclose(found, wanted[0], atol=1e-6)
    assert np.abs(found - wanted[1]).max() > 1e-3


def test_a_composed_law_is_no_pipeline(uri, pipeline_folder, tmp_path):
    shutil.copytree(pipeline_folder, tmp_path / "trial" / "model")
    (tmp_path / "trial" / "model" / "composition.json").write_text("{}", encoding="utf-8")
    with open_tracker(uri) as tracker:
        tracker.start_trial("t1", "point", {}, constraints=NAMES)
        tracker.finish_trial("t1", make_result("t1"), tmp_path / "trial")
    client, runs = runs_by_name(uri)
    run = runs["point"]
    assert not run.outputs or not run.outputs.model_outputs
    assert "model/composition.json" in [entry.path for entry in client.list_artifacts(run.info.run_id, "model")]


def test_points_of_the_plane_are_logged_as_numbers_and_as_a_picture(uri, tmp_path):
    np.save(tmp_path / "samples.npy", np.random.default_rng(0).standard_normal((50, 2)).astype(np.float32))
    with open_tracker(uri) as tracker:
        tracker.start_trial("t1", "point", {}, constraints=NAMES)
        tracker.finish_trial("t1", make_result("t1"), tmp_path)
    client, runs = runs_by_name(uri)
    run_id = runs["point"].info.run_id
    listed = {entry.path for folder in ("", "figures") for entry in client.list_artifacts(run_id, folder)}
    assert {"samples.npy", "figures/samples.png"} <= listed


@pytest.mark.parametrize("through", ["watcher", "sync"])
def test_what_the_pretrained_model_measures_belongs_to_the_parent_run_once(uri, make_sweep, through):
    shares = {"digit_4": 0.02, "digit_7": 0.05}
    calibration = {
        "unit": "share",
        "metrics": {name: -math.log(share) for name, share in shares.items()},
        "stderrs": dict.fromkeys(shares, 0.1),
        "counts": dict.fromkeys(shares, 512),
    }
    if through == "sync":
        sweep = make_sweep()
        path = sweep / "trials" / "share-b" / "result.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "calibration": calibration}), encoding="utf-8")
        for _ in range(2):
            with open_tracker(uri) as tracker:
                sync_sweep(sweep, tracker)
    else:
        with open_tracker(uri) as tracker:
            tracker.start_sweep({})
            tracker.log_calibration(calibration)
            tracker.log_calibration(calibration)
    client, runs = runs_by_name(uri)
    run = runs["digits"]
    assert run.data.params["pretrained.unit"] == "share"
    for name, share in shares.items():
        history = client.get_metric_history(run.info.run_id, f"pretrained/{name}")
        assert [point.value for point in history] == [pytest.approx(share)]
        assert run.data.metrics[f"pretrained_stderr/{name}"] == pytest.approx(0.1 * share)


def test_gap_level_and_signs_of_trouble_are_in_the_childs_run(uri):
    certificate = {
        "verdict": "feasible",
        "level": 1.5,
        "duality_gap": 0.02,
        "duality_gap_stderr": 0.01,
        "worst_violation": -0.1,
        "saturated": ["digit_4"],
        "symptoms": ["plateau of digit_7: multiplier rose from 0.1 to 0.9"],
    }
    with open_tracker(uri) as tracker:
        tracker.start_trial("t1", "point", {}, constraints=NAMES)
        tracker.finish_trial("t1", {**make_result("t1"), "certificate": certificate}, None)
    run = runs_by_name(uri)[1]["point"]
    found = {key: run.data.metrics[f"final/{key}"] for key in ("level", "duality_gap", "duality_gap_stderr")}
    assert found == {"level": 1.5, "duality_gap": 0.02, "duality_gap_stderr": 0.01}
    signs = "plateau of digit_7: multiplier rose from 0.1 to 0.9; multiplier of digit_4 at its bound"
    assert run.data.tags["dualsweep.signs"] == signs


def test_delivering_everything_twice_changes_nothing(uri, make_sweep):
    def state():
        client, runs = runs_by_name(uri)
        experiment_id = client.get_experiment_by_name("fairness").experiment_id
        counts = {
            (name, key): len(client.get_metric_history(run.info.run_id, key))
            for name, run in runs.items()
            for key in run.data.metrics
        }
        ends = {name: (run.info.run_id, run.info.status, run.info.end_time) for name, run in runs.items()}
        return counts, ends, [model.model_id for model in client.search_logged_models([experiment_id])]

    sweep = make_sweep()
    with open_tracker(uri) as tracker:
        sync_sweep(sweep, tracker)
    before = state()
    with open_tracker(uri) as tracker:
        sync_sweep(sweep, tracker)
        tracker.log_rows("share-a", make_rows(10))
    assert state() == before
    assert len(before[1]) == 5
    assert len(before[2]) == 1


def test_a_resumed_sweep_goes_on_in_the_same_runs_even_with_another_parameter(uri):
    for part, workers in enumerate((1, 2)):
        with open_tracker(uri) as tracker:
            tracker.start_sweep({"compute": {"workers": workers}})
            tracker.start_trial("t1", "point", {}, constraints=NAMES)
            tracker.log_rows("t1", make_rows(20)[10 * part : 10 * part + 10])
            assert tracker.flush(PATIENCE) == 0
            assert {run.info.status for run in runs_by_name(uri)[1].values()} == {"RUNNING"}
            tracker.finish_sweep(None, "interrupted" if part == 0 else "completed")
            if part == 0:
                assert tracker.flush(PATIENCE) == 0
                assert {run.info.status for run in runs_by_name(uri)[1].values()} == {"KILLED"}
    client, runs = runs_by_name(uri)
    assert set(runs) == {"digits", "point"}
    assert_history_equals(client, runs["point"].info.run_id, make_rows(20))
    assert runs["digits"].data.params["compute.workers"] == "1"
    assert runs["digits"].data.tags["dualsweep.changed.compute.workers"] == "2"


def test_sweeps_of_one_name_stay_apart_by_their_id(uri):
    for sweep_id in ("one", "two", "one"):
        with open_tracker(uri, sweep_id=sweep_id) as tracker:
            tracker.start_sweep({})
    client = mlflow.MlflowClient(tracking_uri=uri)
    assert len(client.search_runs([client.get_experiment_by_name("fairness").experiment_id])) == 2


def test_names_mlflow_refuses_and_rows_beyond_one_batch_arrive(uri):
    names = ("a+b", "a*b", "..", "x/../y", "schönes 'Zitat'", *(f"class_{index}" for index in range(300)))
    rows = make_rows(2, names)
    with open_tracker(uri, sweep_name='it\'s "odd"/100 %') as tracker:
        tracker.start_trial("t/1'", "point", {"a/../b": {"ü": None}}, {"tag:x": "y"}, constraints=names)
        tracker.log_rows("t/1'", rows)
        tracker.finish_trial("t/1'", make_result("t/1'"), None)
    client, runs = runs_by_name(uri)
    keys = list(row_metrics(rows[0], names))
    assert len(keys) > tracking.METRICS_PER_BATCH
    assert set(keys) <= set(runs["point"].data.metrics)
    # All histories would take 15 s: the scalars, the odd names and the end of the last batch.
    assert_history_equals(client, runs["point"].info.run_id, rows, names, keys[:14] + keys[-3:])


def test_one_item_that_cannot_be_delivered_hides_no_other(uri, tmp_path):
    folder = tmp_path / "trial"
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "model_index.json").write_text('{"_class_name": "DDPMPipeline"}', encoding="utf-8")
    tracker = Tracker(uri, "fairness", "digits")
    tracker.log_rows("stranger", make_rows(3))
    tracker.start_trial("t1", "point", {}, constraints=NAMES)
    tracker.finish_trial("t1", make_result("t1"), folder)
    assert tracker.close(PATIENCE) == 4
    rows, model = tracker.undelivered()
    assert (rows.what, rows.trial_id, rows.count) == ("rows", "stranger", 3)
    assert "start_trial was not called" in rows.error
    assert str(model).startswith("1 x model of trial t1 (FileNotFoundError")
    _, runs = runs_by_name(uri)
    assert runs["point"].info.status == "FINISHED"
    assert runs["point"].data.tags["feasible"] == "true"


def test_a_deleted_experiment_is_named_with_the_remedy(uri):
    client = mlflow.MlflowClient(tracking_uri=uri)
    client.delete_experiment(client.create_experiment("fairness"))
    tracker = Tracker(uri, "fairness", "digits")
    tracker.start_sweep({})
    assert tracker.close(PATIENCE) == 1
    assert "mlflow experiments restore" in tracker.undelivered()[0].error


@contextmanager
def black_hole():
    """A port that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=50) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def test_the_sweep_neither_waits_nor_fails_when_mlflow_never_answers():
    with black_hole() as address:
        tracker = Tracker(address, "fairness", "digits")
        begin = time.monotonic()
        tracker.start_sweep({})
        tracker.start_trial("t1", "point", {}, constraints=NAMES)
        for row in make_rows(2000):
            tracker.log_rows("t1", [row])
        tracker.finish_trial("t1", make_result("t1"), None)
        # 2000 hand-overs take some 20 ms alone and compete with the import of MLflow (2 s) in the other thread.
        assert time.monotonic() - begin < 4
        begin = time.monotonic()
        assert tracker.close(2) == 2005
        assert time.monotonic() - begin < 4
        assert sum(item.count for item in tracker.undelivered() if item.what == "rows") == 2000
        tracker.log_rows("t1", make_rows(1))
        assert sum(item.count for item in tracker.undelivered()) == 2006


@pytest.mark.slow
def test_a_server_down_then_up_then_killed_then_up_gets_each_row_once(
    tmp_path, mlflow_server, free_port, pipeline_folder
):
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    rows = make_rows(90)
    with pytest.raises(ValueError, match=r"tracking\.uri"):
        check_tracking(address)
    tracker = Tracker(address, "fairness", "digits")
    tracker.start_sweep({"name": "digits"})
    tracker.start_trial("t1", "point", {}, constraints=NAMES)
    tracker.log_rows("t1", rows[:30])
    assert tracker.flush(3) == 32
    with mlflow_server(port, tmp_path):
        check_tracking(address)
        assert tracker.flush(PATIENCE) == 0
        tracker.log_rows("t1", rows[30:35])
    for start in range(35, 80):
        tracker.log_rows("t1", [rows[start]])
    tracker.flush(2)
    trial_dir = tmp_path / "trial"
    trial_dir.mkdir()
    write_trace(rows, trial_dir / "trace.parquet", constraints=NAMES, trial_id="t1")
    (trial_dir / "model").symlink_to(pipeline_folder)
    tracker.log_rows("t1", rows[80:])
    tracker.finish_trial("t1", make_result("t1"), trial_dir)
    with mlflow_server(port, tmp_path):
        assert tracker.close(PATIENCE) == 0, [str(item) for item in tracker.undelivered()]
        client, runs = runs_by_name(address)
        assert Counter(run.data.tags["dualsweep.kind"] for run in runs.values()) == {"sweep": 1, "trial": 1}
        run = runs["point"]
        assert_history_equals(client, run.info.run_id, rows)
        assert "trace/trace.parquet" in [entry.path for entry in client.list_artifacts(run.info.run_id, "trace")]
        model_id = run.outputs.model_outputs[0].model_id
        mlflow.set_tracking_uri(address)
        try:
            model = mlflow.pyfunc.load_model(f"models:/{model_id}")
        finally:
            mlflow.set_tracking_uri(None)
        assert model.predict(None, params={"num_samples": 2, "num_inference_steps": 2}).shape == (2, 1, 8, 8)


@pytest.mark.slow
def test_tracking_prints_nothing_leaves_nothing_behind_and_lets_the_process_end(tmp_path, make_sweep):
    sweep = make_sweep()
    (tmp_path / "cwd").mkdir()
    script = f"""
        from pathlib import Path
        from dualsweep.orchestration.delivery import sync_sweep
        from dualsweep.orchestration.tracking import Tracker, check_tracking
        check_tracking("sqlite:///{tmp_path}/new folder/mlflow.db")
        assert not Path("{tmp_path}/new folder").exists()
        tracker = Tracker("sqlite:///{tmp_path}/new folder/mlflow.db", "fairness", "digits")
        sync_sweep(Path("{sweep}"), tracker)
        assert tracker.close(60) == 0, tracker.undelivered()
        unclosed = Tracker("http://127.0.0.1:9", "fairness", "digits")
        unclosed.start_sweep({{}})
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        cwd=tmp_path / "cwd",
        env=environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list((tmp_path / "cwd").iterdir()) == []
    assert {path.name for path in (tmp_path / "new folder").iterdir()} == {"mlflow.db", "mlflow-artifacts"}


def test_a_corrupt_result_is_named_before_anything_is_delivered(uri, make_sweep):
    sweep = make_sweep()
    (sweep / "trials" / "share-b" / "result.json").write_text("{", encoding="utf-8")
    with open_tracker(uri) as tracker, pytest.raises(ValueError, match=r"share-b/result\.json: cannot be read"):
        sync_sweep(sweep, tracker)
    assert mlflow.MlflowClient(tracking_uri=uri).get_experiment_by_name("fairness") is None


def test_syncing_a_finished_sweep_ends_it_and_brings_its_report(uri, make_sweep):
    sweep = make_sweep()
    result = make_result("share-d")
    (sweep / "trials" / "share-d" / "result.json").write_text(json.dumps(result), encoding="utf-8")
    (sweep / "report").mkdir()
    (sweep / "report" / "index.html").write_text("<html></html>", encoding="utf-8")
    with open_tracker(uri) as tracker:
        sync_sweep(sweep, tracker)
    client, runs = runs_by_name(uri)
    assert runs["digits"].info.status == "FAILED"  # share-c failed
    assert [entry.path for entry in client.list_artifacts(runs["digits"].info.run_id, "report")] == [
        "report/index.html"
    ]


def test_the_tracking_store_lies_beside_the_sweeps_unless_told_otherwise(tmp_path, monkeypatch):
    assert resolve_tracking_uri(None, tmp_path / "store") == f"sqlite:///{tmp_path}/store/mlflow.db"
    assert resolve_tracking_uri(None, f"file://{tmp_path}") == f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.chdir(tmp_path)
    assert resolve_tracking_uri("sqlite:///x.db", "elsewhere") == f"sqlite:///{tmp_path}/x.db"
    assert resolve_tracking_uri(None, "store") == f"sqlite:///{tmp_path}/store/mlflow.db"
    assert resolve_tracking_uri("http://host:5000", "s3://bucket") == "http://host:5000"
    with pytest.raises(ValueError, match=r"tracking\.uri is not set and the storage 's3://bucket'"):
        resolve_tracking_uri(None, "s3://bucket")


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("./mlruns", "no longer keeps runs in plain folders"),
        ("{folder}/mlruns", "no longer keeps runs in plain folders"),
        ("file://{folder}/mlruns", "no longer keeps runs in plain folders"),
        ("ftp://host/x", "other stores are not supported"),
        ("sqlite:///mlflow.db", "not an absolute file"),
        ("sqlite://", "not an absolute file"),
        ("sqlite:///{folder}/a%20b/mlflow.db", "cannot open a path with %"),
        ("sqlite:///{folder}/file/mlflow.db", "is not a folder that can be written"),
        ("sqlite:///{folder}/file", "is no SQLite database"),
        ("sqlite:///{folder}", "is not a file that can be written"),
        ("http://127.0.0.1:9", "it refused or failed .*start it"),
        ("http://nobody.invalid:5000", "refused or failed|no answer"),
        ("postgresql://me:secret@127.0.0.1:9/x", r"me:\*\*\*@127.*refused or failed"),
    ],
)
def test_a_tracking_address_that_cannot_work_is_refused_by_name(tmp_path, bad, message):
    (tmp_path / "file").write_text("This is no database, only some text.", encoding="utf-8")
    begin = time.monotonic()
    with pytest.raises(ValueError, match=r"(?s)^tracking\.uri = .*" + message) as caught:
        check_tracking(bad.format(folder=tmp_path))
    assert time.monotonic() - begin < 10.5
    assert "secret" not in "".join(traceback.format_exception_only(caught.value))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_server_that_never_answers_is_refused_in_time():
    with black_hole() as address:
        begin = time.monotonic()
        with pytest.raises(ValueError, match=r"no answer within 1\.5 s"):
            check_tracking(address, timeout=1.5)
        assert time.monotonic() - begin < 3


def test_a_good_sqlite_address_passes_and_nothing_is_created(tmp_path, uri):
    check_tracking(uri)
    check_tracking(f"sqlite:///{tmp_path}/not yet/there/mlflow.db")
    assert [path.name for path in tmp_path.iterdir()] == ["mlflow.db"]


def test_the_sample_grid_shows_every_sample_in_its_place():
    samples = np.stack([np.full((1, 8, 8), value, np.float32) for value in (-1.0, 0.0, 1.0, math.nan, -5.0)])
    grid = np.asarray(tracking._sample_grid(samples))
    assert grid.shape == (2 * 66, 3 * 66)
    assert [grid[0, 0], grid[0, 66], grid[0, 132], grid[66, 0], grid[66, 66]] == [0, 127, 255, 127, 0]
