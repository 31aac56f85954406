"""Shared by the tests of faults: one torch thread, a seed that a failure prints and a rerun can give again, and how to tell
that a sweep which was disturbed has lost nothing."""

import json
import os
import random
import secrets
import time
from contextlib import contextmanager

import psutil
import pytest
import torch
import yaml
from mlflow import MlflowClient

from dualsweep.orchestration.config import SweepConfig
from dualsweep.orchestration.delivery import read_ledger
from dualsweep.orchestration.dual_ledger import check_dual_steps
from dualsweep.orchestration.journal import read_journal
from dualsweep.orchestration.local_dual import LocalDual
from dualsweep.orchestration.trace import row_metrics
from dualsweep.trainers.assignment import Assignment
from dualsweep.trainers.loop import run_trial
from dualsweep.trainers.state import read_checkpoint_meta
from dualsweep.trainers.workspace import Workspace

torch.set_num_threads(1)

MARK = "DUALSWEEP_TEST_MARK"
OF_THIS_RUN = ("attempt", "wall_time")  # what rows of an undisturbed run may differ in
# Trials of some seconds on two cores, one after the other, on one worker each: time for a fault to strike one.
SMALL = {
    "name": "small",
    "data": {
        "dataset": "gaussian_mixture",
        "means": [[-1.0, 0.0], [1.0, 0.5]],
        "stds": [0.3, 0.2],
        "weights": [0.8, 0.2],
        "count": 200,
        "minority": {"classes": [1]},
    },
    "model": {"kind": "mlp", "width": 16, "depth": 1},
    "schedule": {"num_train_timesteps": 50, "beta_end": 0.2},
    "pretrain": {"steps": 8, "batch_size": 16, "warmup_steps": 1, "num_shards": 2},
    "primal": {"steps": 3200, "batch_size": 16, "constraint_batch_size": 8, "warmup_steps": 2, "num_shards": 2},
    "dual": {"rule": "ascent", "step_size": 0.05, "primal_steps_per_dual_step": 8},
    "measure": {"num_samples": 24, "num_sampling_steps": 4},
    "thresholds": {"unit": "share", "grid": {"minority": [0.3, 0.5]}},
    "baselines": {"unconstrained": False},
    "evaluation": {"num_samples": 48, "num_sampling_steps": 4, "noise_levels": 6, "grid_samples": 9},
    "compute": {"workers": 1, "concurrent_trials": 1},
    "checkpoint_every_dual_steps": 10,
}


@pytest.fixture
def moment():
    """A random.Random for when a fault strikes; DUALSWEEP_FAULT_SEED repeats a run that failed."""
    seed = int(os.environ.get("DUALSWEEP_FAULT_SEED") or secrets.randbelow(2**31))
    print(f"DUALSWEEP_FAULT_SEED={seed}")
    return random.Random(seed)


@pytest.fixture
def write_small(tmp_path):
    """`write(**sections)`: the file of the small sweep, stored below tmp_path unless a section says else."""

    def write(**sections):
        values = {**SMALL, "storage": str(tmp_path / "runs")}
        for key, value in sections.items():
            values[key] = {**values.get(key, {}), **value} if isinstance(value, dict) else value
        path = tmp_path / "small.yaml"
        path.write_text(yaml.safe_dump(values), encoding="utf-8")
        return path

    return write


def trial_ids(folder):
    """The sweep's listed trials: all but the pretraining."""
    return [point["trial_id"] for point in json.loads((folder / "points.json").read_text(encoding="utf-8"))]


@pytest.fixture
def new_checkpoints():
    """`new_checkpoints(folder)`: a function that says whether a trial has a checkpoint that it had not at the first call."""

    def watch(folder):
        def there():
            return {path for path in folder.glob("trials/*/checkpoints/step-??????")}

        before = there()
        return lambda: bool(there() - before)

    return watch


@pytest.fixture
def assert_books_whole():
    """`check(folder)`: no dual step in the journal is missing or doubled, and every checkpoint can be read."""

    def check(folder):
        records = read_journal(folder / "journal.jsonl")
        for trial_id in trial_ids(folder):
            if any(record["kind"] == "begin" and record["trial"] == trial_id for record in records):
                check_dual_steps(records, trial_id)
        for path in folder.glob("trials/*/checkpoints/step-??????"):
            read_checkpoint_meta(path)

    return check


@pytest.fixture
def assert_as_calm(tmp_path):
    """`check(folder)`: all trials of a sweep (`only` these) are completed, with the rows of an undisturbed run, to the last bit.

    That run is made here, on one worker, from the model that the sweep pretrained.
    """

    def check(folder, store=None, only=()):
        config = SweepConfig.from_dict(yaml.safe_load((folder / "sweep.yaml").read_text(encoding="utf-8")))
        workspace, calm = Workspace(config.to_dict(), config.data), LocalDual()
        base_dir = folder.parent / "bases" / config.base_key(workspace.pretraining_sets)
        if store is not None:
            store.fetch(base_dir / "model")
            store.fetch_files(base_dir)
        ledger = read_ledger(folder)
        for point in json.loads((folder / "points.json").read_text(encoding="utf-8")):
            trial_id = point["trial_id"]
            if only and trial_id not in only:
                continue
            assert ledger.book(trial_id).status == "completed", ledger.book(trial_id).error
            calm_dir = tmp_path / "calm" / trial_id
            run_trial(workspace, Assignment(**point, attempt=1, trial_dir=str(calm_dir), base_dir=str(base_dir)), calm)
            found, wanted = (
                [{key: value for key, value in row.items() if key not in OF_THIS_RUN} for row in rows]
                for rows in (ledger.book(trial_id).rows, calm.trace(trial_id))
            )
            assert len(wanted) == config.dual_steps and any(wanted[-1]["multipliers"])
            assert found == wanted

    return check


@pytest.fixture
def runs_in_mlflow():
    """`runs(address)`: trial id (None: the sweep) -> MLflow run of the small sweep; there is one each."""

    def runs(address):
        client = MlflowClient(address)
        found = client.search_runs([client.get_experiment_by_name(SMALL["name"]).experiment_id])
        by_trial = {run.data.tags.get("dualsweep.trial"): run for run in found}
        assert len(found) == len(by_trial), [run.info.run_name for run in found]
        return by_trial

    return runs


@pytest.fixture
def assert_delivered_once(runs_in_mlflow):
    """`check(address, folder)`: MLflow has every row of every trial once, and all runs are finished."""

    def check(address, folder):
        client, runs = MlflowClient(address), runs_in_mlflow(address)
        ledger = read_ledger(folder)
        assert set(runs) == {None, *ledger.trials}
        for trial_id in trial_ids(folder):
            book = ledger.book(trial_id)
            for key in ("objective", f"multiplier/{book.problem.names[0]}"):
                history = client.get_metric_history(runs[trial_id].info.run_id, key)
                wanted = [(row["dual_step"], row_metrics(row, book.problem.names)[key]) for row in book.rows]
                assert sorted((point.step, point.value) for point in history) == wanted, key
        assert {run.info.status for run in runs.values()} == {"FINISHED"}

    return check


@pytest.fixture
def left_running(tmp_path):
    """`with left_running.marking():` marks what is started inside, with all that it starts; `left_running()` is what of it
    still lives after `seconds`."""

    class Marked:
        @contextmanager
        def marking(self):
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv(MARK, str(tmp_path))
                yield

        def __call__(self, *, seconds=20.0):
            deadline = time.monotonic() + seconds
            while (living := [process for process in psutil.process_iter() if _marked(process, str(tmp_path))]) and (
                time.monotonic() < deadline
            ):
                time.sleep(0.2)  # between polls
            return living

    return Marked()


def _marked(process, mark):
    try:
        return process.status() != psutil.STATUS_ZOMBIE and process.environ().get(MARK) == mark
    except psutil.Error:
        return False
