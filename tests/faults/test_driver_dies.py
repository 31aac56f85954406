"""The driver is killed, or its terminal closes, at a moment drawn at random: a resume goes on, in the same MLflow runs, and
what the dead driver left behind neither trains nor writes beside it. Real local Ray, real signals, a real terminal."""

import json
import os
import pty
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest
import yaml
from mlflow import MlflowClient
from rich.console import Console

from dualsweep.orchestration import sweep
from dualsweep.orchestration.config import ConfigError, load_config
from dualsweep.orchestration.delivery import deliver_again, read_ledger
from dualsweep.orchestration.dual_ledger import FINAL
from dualsweep.orchestration.journal import read_journal

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture
def make_sweep(tmp_path, tiny_values):
    """`make(steps, thresholds)`: the file of a sweep of one trial at a time, and its folder."""

    def make(steps, thresholds):
        config = {**tiny_values, "storage": str(tmp_path / "runs"), "baselines": {"unconstrained": False}}
        config["primal"] = {**config["primal"], "steps": steps}
        config["thresholds"] = {"unit": "share", "grid": {"minority": thresholds}}
        config["compute"] = {"concurrent_trials": 1}
        path = tmp_path / "tiny.yaml"
        path.write_text(yaml.safe_dump(config), encoding="utf-8")
        return path, tmp_path / "runs" / "tiny"

    return make


def statuses(folder):
    """Trial id -> status, the pretraining left out; empty before there is a journal."""
    if not (folder / "points.json").exists():
        return {}
    books = read_ledger(folder).trials
    points = json.loads((folder / "points.json").read_text(encoding="utf-8"))
    return {point["trial_id"]: books[point["trial_id"]].status for point in points if point["trial_id"] in books}


def attempts(folder):
    """Trial id -> attempt of the listed trials."""
    books = read_ledger(folder).trials
    return {trial_id: books[trial_id].attempt for trial_id in statuses(folder)}


def has_checkpoint(folder, status):
    """Whether a trial with this status has a checkpoint."""
    ids = [trial_id for trial_id, has in statuses(folder).items() if has == status]
    return any(list(folder.glob(f"trials/{trial_id}/checkpoints/step-??????")) for trial_id in ids)


def trainers_of(process):
    """The processes of a driver that train or move multipliers."""
    names = ("ray::RayTrainWorker", "ray::DualServer", "ray::ResourceTrainable", "ray::SweepTrial")
    return [child for child in psutil.Process(process.pid).children(recursive=True) if child.name().startswith(names)]


@pytest.mark.parametrize("kills", [1, pytest.param(2, marks=pytest.mark.heavy)])
def test_a_sweep_whose_driver_is_killed_goes_on(
    kills, moment, make_sweep, tmp_path, command, wait_for, assert_books_whole, assert_as_calm
):
    path, folder = make_sweep(150, [0.1, 0.2, 0.3])  # a trial lasts longer than the waits below
    resume = ("resume", "tiny", "--storage", str(tmp_path / "runs"))

    first = command("sweep", str(path), cwd=tmp_path, wait=False)
    wait_for(lambda: has_checkpoint(folder, "running"), seconds=200, process=first)
    time.sleep(moment.uniform(0, 2))
    wait_for(lambda: has_checkpoint(folder, "running"), seconds=200, process=first)  # the trial may be the next one by now
    orphans = trainers_of(first)
    assert orphans
    os.kill(first.pid, signal.SIGKILL)
    at_death = statuses(folder)
    kept = [trial_id for trial_id, status in at_death.items() if status in FINAL]

    # At once: what the dead driver started may still live, but not when the new one begins.
    second = command(*resume, cwd=tmp_path, wait=False)
    wait_for(lambda: 2 in attempts(folder).values(), seconds=200, process=second)
    assert not [orphan for orphan in orphans if orphan.is_running() and orphan.status() != psutil.STATUS_ZOMBIE]
    os.kill(second.pid, signal.SIGSTOP)  # still running as far as anyone can tell, and not done before we have looked
    root = tmp_path / "runs"
    code, output = command(*resume, cwd=tmp_path)
    assert code == 2 and "is being run by another process" in output
    with pytest.raises(ConfigError, match="is being run by another process; its driver delivers by itself"):
        deliver_again(root, "tiny")
    os.kill(second.pid, signal.SIGCONT)
    if kills == 2:
        time.sleep(moment.uniform(0, 2))
        assert second.poll() is None
        os.kill(second.pid, signal.SIGKILL)
        second.communicate()
        assert deliver_again(root, "tiny").undelivered == []
        code, output = command(*resume, cwd=tmp_path)
    else:
        output, _ = second.communicate(timeout=300)
        code = second.returncode
    assert code == 0, output
    assert set(statuses(folder).values()) == {"completed"} and len(statuses(folder)) == 3

    begins = [r for r in read_journal(folder / "journal.jsonl") if r["kind"] == "begin"]
    for trial_id in kept:
        assert [r["attempt"] for r in begins if r["trial"] == trial_id] == [1], "a finished trial ran again"
    again = [r for r in begins if r["trial"] in statuses(folder) and r["attempt"] > 1]
    assert again and all(r["state"]["step"] > 0 for r in again), "started over instead of from its checkpoint"
    assert max(Counter((r["trial"], r["attempt"]) for r in begins).values()) == 1
    assert_books_whole(folder)
    assert_as_calm(folder, only={r["trial"] for r in again})

    ledger = read_ledger(folder)
    client = MlflowClient(f"sqlite:///{tmp_path / 'runs' / 'mlflow.db'}")
    found = client.search_runs([client.get_experiment_by_name("tiny").experiment_id])
    runs = {run.data.tags.get("dualsweep.trial"): run for run in found}
    assert len(found) == len(runs) == 5, "the sweep, the pretraining and three trials"
    for trial_id, book in ledger.trials.items():
        history = client.get_metric_history(runs[trial_id].info.run_id, "objective")
        assert [point.step for point in history] == list(range(1, len(book.rows) + 1))
        assert runs[trial_id].info.status == "FINISHED"
    assert runs[None].info.status == "FINISHED"


def test_a_terminal_that_closes_is_a_ctrl_c(moment, make_sweep, tmp_path):
    path, folder = make_sweep(4000, [0.1, 0.2])
    pid, terminal = pty.fork()
    if pid == 0:  # the child: leader of the terminal's session, as a shell that runs exec
        os.chdir(tmp_path)
        os.environ.pop("RAY_ADDRESS", None)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # ignored where the tests run under nohup, and then by a sweep too
        os.execv(sys.executable, [sys.executable, "-m", "dualsweep", "sweep", str(path)])
    os.set_blocking(terminal, False)
    deadline, shown = time.monotonic() + 200, b""
    while not has_checkpoint(folder, "running"):
        assert time.monotonic() < deadline, shown.decode(errors="replace")
        shown += read_all(terminal)
        time.sleep(0.05)  # between polls
    time.sleep(moment.uniform(0, 2))
    read_all(terminal)
    os.close(terminal)  # the kernel hangs up: SIGHUP to all in the terminal's foreground, and every write fails
    deadline = time.monotonic() + 120
    while (ended := os.waitpid(pid, os.WNOHANG))[0] == 0:
        assert time.monotonic() < deadline, "the driver did not end"
        time.sleep(0.1)  # between polls
    assert os.waitstatus_to_exitcode(ended[1]) == 130
    assert "interrupted" in statuses(folder).values() and "running" not in statuses(folder).values()
    records = read_journal(folder / "journal.jsonl")
    ends = [r for r in records if r["kind"] == "end" and r["status"] == "interrupted"]
    assert ends
    for end in ends:  # its newest step is checkpointed: nothing is trained again
        steps = [r["row"]["dual_step"] for r in records if r["kind"] == "step" and r["trial"] == end["trial"]]
        assert (Path(folder) / "trials" / end["trial"] / "checkpoints" / f"step-{steps[-1]:06d}").is_dir()


def read_all(terminal) -> bytes:
    """What the terminal shows by now."""
    found = b""
    while True:
        try:
            found += os.read(terminal, 65536)
        except BlockingIOError:
            return found


@pytest.mark.heavy
def test_what_was_training_when_tune_failed_is_trained_on_by_a_resume(write_small, tmp_path, monkeypatch):
    """Tune then closes every slot, as if a scheduler had wanted the room for others; what trains saves itself and ends."""
    from ray.tune.schedulers import FIFOScheduler

    class Failing(FIFOScheduler):
        completed = 0

        def on_trial_complete(self, tune_controller, trial, result):
            self.completed += trial.config["point"]["kind"] == "constrained"

        def choose_trial_to_run(self, tune_controller, *args):
            if self.completed >= 2:  # asked for the fourth point, while the third one trains
                raise RuntimeError("the disk of its books is gone")
            return super().choose_trial_to_run(tune_controller, *args)

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    grid = {"grid": {"minority": [0.25, 0.3, 0.35, 0.4]}}
    sections = {"thresholds": grid, "compute": {"concurrent_trials": 2}, "primal": {"steps": 6400}}
    config = load_config(write_small(**sections), environment=False)
    with monkeypatch.context() as patch, pytest.raises(Exception, match="the disk of its books"):
        patch.setattr("dualsweep.orchestration.schedulers.trial_scheduler", lambda *_: Failing())
        sweep.run_sweep(config, console=Console(quiet=True))
    folder = tmp_path / "runs" / "small"
    unfinished = [status for status in statuses(folder).values() if status != "completed"]
    assert unfinished in (["running"], ["stopped"]), unfinished  # asked to save itself, or told to stop by Tune first
    told = [record["directive"] for record in read_journal(folder / "journal.jsonl") if record["kind"] == "directive"]
    assert told in (["interrupt"], ["stop"]), told

    outcome = sweep.run_sweep(sweep.stored_config("small", tmp_path / "runs"), resume=True, console=Console(quiet=True))
    assert (outcome.status, outcome.failed) == ("completed", {})
    assert set(statuses(folder).values()) == {"completed"}
    assert sorted(attempts(folder).values()) == [1, 1, 1, 2]
