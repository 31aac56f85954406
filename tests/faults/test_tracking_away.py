"""MLflow is away, answers errors, or accepts and never answers, at moments drawn at random: training does not wait, and
in the end MLflow has every row once and one run a trial. Real servers on the loopback, real signals."""

import contextlib
import os
import signal
import sqlite3
import threading
import time
from collections import Counter

import numpy as np
import pytest
import yaml
from mlflow import MlflowClient
from mlflow.entities import ViewType

from dualsweep.orchestration.delivery import read_ledger
from dualsweep.orchestration.trace import COLUMNS, VECTOR_COLUMNS, read_trace, row_metrics
from dualsweep.orchestration.tracking import Tracker

PATIENCE = 120
NAMES = ("digit_4", "digit_7")


def rows_of(count):
    """Rows of a made-up trial."""
    rng = np.random.default_rng(0)
    rows = []
    for step in range(1, count + 1):
        row = {name: float(rng.normal()) for name in COLUMNS}
        row |= {"dual_step": step, "primal_step": 2 * step, "attempt": 1, "lag": 0, "wall_time": 1.7e9 + step / 8}
        rows.append(row | {name: rng.normal(size=len(NAMES)).tolist() for name in VECTOR_COLUMNS})
    return rows


def runs_of(address, experiment):
    """(client, trial id or None -> run); an id twice is a second run."""
    client = MlflowClient(tracking_uri=address)
    found = client.search_runs([client.get_experiment_by_name(experiment).experiment_id])
    runs = {run.data.tags.get("dualsweep.trial"): run for run in found}
    assert len(found) == len(runs), Counter(run.info.run_name for run in found)
    return client, runs


def assert_each_row_once(client, run, rows, names):
    for key in ("objective", f"violation/{names[0]}", f"multiplier/{names[-1]}"):
        history = sorted((point.step, point.value, point.timestamp) for point in client.get_metric_history(run, key))
        wanted = [(row["dual_step"], row_metrics(row, names)[key], int(row["wall_time"] * 1000)) for row in rows]
        assert history == wanted, key


@contextlib.contextmanager
def hanging(server):
    """The server accepts connections and never answers, until the block ends; then it does what it was asked."""
    os.killpg(server.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.killpg(server.pid, signal.SIGCONT)


@contextlib.contextmanager
def failing(folder):
    """The server answers 500 to metrics and nothing else: their table is away."""
    with sqlite3.connect(folder / "server.db", timeout=60) as database:
        database.execute("ALTER TABLE metrics RENAME TO away")
        database.commit()
        try:
            yield
        finally:
            database.execute("ALTER TABLE away RENAME TO metrics")
            database.commit()


@contextlib.contextmanager
def slow_writes(folder):
    """The server reads, but what it is asked to write waits until the block ends."""
    with contextlib.closing(sqlite3.connect(folder / "server.db", timeout=60)) as database:
        database.execute("BEGIN IMMEDIATE")
        yield
        database.rollback()


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["hangs", "fails", "dies"])
def test_a_server_that_is_disturbed_at_random_moments_gets_each_row_once(
    fault, moment, tmp_path, mlflow_server, free_port, monkeypatch
):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")  # 30 s in a sweep: a shorter one is exceeded more often
    port, rows = free_port(), rows_of(120)
    address = f"http://127.0.0.1:{port}"
    begin_of_faults = threading.Event()

    def train(tracker, pace=0.05, reopen=True):
        tracker.start_sweep({"name": "digits"}, reopen=reopen)
        for trial in ("t1", "t2"):
            tracker.start_trial(trial, trial, {}, constraints=NAMES, reopen=reopen)
        for index in range(0, len(rows), 4):
            for trial in ("t1", "t2"):
                tracker.log_rows(trial, rows[index : index + 4])
            if index > 8:
                begin_of_faults.set()
            time.sleep(pace)  # of a training
        result = {
            "status": "completed",
            "kind": "constrained",
            "label": "t",
            "dual_steps": len(rows),
            "constraints": [],
        }
        for trial in ("t1", "t2"):
            tracker.finish_trial(trial, {**result, "primal_steps": 240}, None)
        tracker.finish_sweep(None, "completed")

    tracker = Tracker(address, "digits", "digits", sweep_id="one")
    trainer = threading.Thread(target=train, args=(tracker,))
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(mlflow_server(port, tmp_path))
        if fault == "hangs" and moment.random() < 0.5:  # from the first request on, which creates the runs
            with hanging(server):
                trainer.start()
                time.sleep(moment.uniform(1.5, 3))
        else:
            trainer.start()
            begin_of_faults.wait(PATIENCE)
        for _ in range(2):
            time.sleep(moment.uniform(0, 1))
            if fault == "hangs":
                with hanging(server):
                    time.sleep(moment.uniform(0.5, 3))
            elif fault == "fails":
                with failing(tmp_path):
                    time.sleep(moment.uniform(0.5, 3))
            else:
                stack.close()
                time.sleep(moment.uniform(0, 1))
                stack.enter_context(mlflow_server(port, tmp_path))
        trainer.join()
        left = tracker.close(PATIENCE)
        assert left == 0, [str(item) for item in tracker.undelivered()]
        client, runs = runs_of(address, "digits")
        assert set(runs) == {None, "t1", "t2"}
        for trial in ("t1", "t2"):
            run = runs[trial].info
            assert run.status == "FINISHED"
            assert_each_row_once(client, run.run_id, rows, NAMES)
            assert len(client.get_metric_history(run.run_id, "final/dual_steps")) == 1
        # As much as the others had, and nothing more, for somebody who asks again.
        again = Tracker(address, "digits", "digits", sweep_id="one")
        train(again, pace=0, reopen=False)
        assert again.close(PATIENCE) == 0
        assert again.delivered() == {}


@pytest.mark.slow
def test_runs_whose_creation_was_not_answered_in_time_leave_no_second_ones(
    moment, tmp_path, mlflow_server, free_port, monkeypatch
):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    port, rows = free_port(), rows_of(12)
    address = f"http://127.0.0.1:{port}"
    with mlflow_server(port, tmp_path):
        tracker = Tracker(address, "digits", "digits", sweep_id="one")
        tracker.start_sweep({"name": "digits"})
        assert tracker.flush(PATIENCE) == 0
        with slow_writes(tmp_path):  # the server reads at once, so it says that there is no run yet
            tracker.start_trial("t1", "t1", {"kind": "constrained"}, constraints=NAMES)
            tracker.log_rows("t1", rows)
            time.sleep(moment.uniform(2.5, 4))  # the server itself gives up after 5 s
            assert tracker.undelivered()
        tracker.finish_trial("t1", {"status": "completed", "constraints": []}, None)
        tracker.finish_sweep(None, "completed")
        assert tracker.close(PATIENCE) == 0, [str(item) for item in tracker.undelivered()]
        client, runs = runs_of(address, "digits")
        assert set(runs) == {None, "t1"}
        assert_each_row_once(client, runs["t1"].info.run_id, rows, NAMES)
        gone = client.search_runs([runs[None].info.experiment_id], run_view_type=ViewType.DELETED_ONLY)
        print(f"{len(gone)} runs were made twice")


@pytest.mark.heavy
@pytest.mark.ray
def test_a_sweep_does_not_wait_for_mlflow_and_sync_delivers_it(
    moment, tmp_path, mlflow_server, free_port, tiny_values, command, wait_for
):
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    config = {**tiny_values, "storage": str(tmp_path / "runs"), "baselines": {"unconstrained": False}}
    config |= {"tracking": {"uri": address}, "compute": {"workers": 0}}
    config["primal"] = {**config["primal"], "steps": 40}
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    folder = tmp_path / "runs" / "tiny"
    with mlflow_server(port, tmp_path) as server:
        process = command("sweep", str(path), cwd=tmp_path, wait=False)

        def begun():
            return (folder / "journal.jsonl").exists() and len(read_ledger(folder).trials) > 1

        wait_for(begun, seconds=200, process=process)
        time.sleep(moment.uniform(0, 2))
        with hanging(server):
            time.sleep(moment.uniform(0, 2))
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 0, output
    assert "MLflow has not got" in output and "`dualsweep sync tiny` delivers it" in output
    ledger = read_ledger(folder)
    for book in ledger.trials.values():
        gaps = np.diff([row["wall_time"] for row in book.rows])
        assert gaps.max() < 20, "training waited for MLflow, whose requests end after 30 s"

    sync = ("sync", "tiny", "--storage", str(tmp_path / "runs"))
    code, output = command(*sync, cwd=tmp_path)
    assert code == 1 and "MLflow has not got" in output, output
    with mlflow_server(port, tmp_path):
        code, output = command(*sync, cwd=tmp_path)
        assert code == 0 and "delivered" in output and "rows" in output, output
        code, output = command(*sync, cwd=tmp_path)
        assert (code, output.strip()) == (0, "nothing to deliver: MLflow has everything")
        client, runs = runs_of(address, "tiny")
        assert set(runs) == {None, *ledger.trials}
        for trial_id, book in ledger.trials.items():
            if book.problem.names:  # the pretraining has no constraints
                assert_each_row_once(client, runs[trial_id].info.run_id, book.rows, tuple(book.problem.names))
            assert runs[trial_id].info.status == "FINISHED"
            trace = folder / "trials" / trial_id / "trace.parquet"
            if trace.exists():
                assert len(read_trace(trace)) == len(book.rows)
        assert runs[None].info.status == "FINISHED"
        report = [entry.path for entry in client.list_artifacts(runs[None].info.run_id, "report")]
        assert "report/index.html" in report
