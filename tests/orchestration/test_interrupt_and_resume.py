"""Ctrl-C leaves everything resumable; what cannot be resumed fails by name while the other trials finish."""

import fcntl
import json
import re
import signal
import time
from pathlib import Path

import pytest
import yaml
from mlflow import MlflowClient

from dualsweep.orchestration.journal import read_journal
from dualsweep.orchestration.trace import read_trace

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def wait_for(condition, *, seconds: float, process) -> None:
    """Poll until the condition holds; the process must not end before."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "the condition did not come true in time"
        time.sleep(0.1)  # between polls


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory, tiny_values, command):
    """A sweep interrupted after the first checkpoint of two constrained trials, one of which then loses its checkpoints."""
    folder = tmp_path_factory.mktemp("interrupt")
    config = {**tiny_values, "storage": str(folder / "runs"), "baselines": {"unconstrained": False}}
    config["primal"] = {**tiny_values["primal"], "steps": 4000}  # far longer than the test waits
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(config))
    process = command("sweep", str(path), cwd=folder, wait=False)
    trials = folder / "runs" / "tiny" / "trials"
    wait_for(lambda: len(list(trials.glob("*/checkpoints/step-*"))) >= 3, seconds=200, process=process)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    return folder, process.returncode, output


def test_the_first_interrupt_saves_checkpoints_and_exits_with_130(interrupted):
    folder, code, output = interrupted
    assert code == 130, output
    assert "dualsweep resume tiny" in output
    sweep = folder / "runs" / "tiny"
    ends = [record for record in read_journal(sweep / "journal.jsonl") if record["kind"] == "end"]
    assert [record["status"] for record in ends] == [
        "completed",
        "interrupted",
        "interrupted",
    ]  # the pretrained model first
    assert not list(sweep.glob("trials/*/result.json"))


def test_a_resume_continues_at_the_checkpoint_and_a_lost_one_fails_alone(interrupted, command):
    folder, _, _ = interrupted
    sweep = folder / "runs" / "tiny"
    first, second = sorted(path.parent for path in sweep.glob("trials/*/checkpoints"))
    for tensors in (first / "checkpoints").glob("step-*/tensors.safetensors"):
        tensors.write_bytes(tensors.read_bytes()[:-7])
    at_interrupt = max(int(path.name[5:]) for path in (second / "checkpoints").glob("step-*"))

    process = command("resume", "tiny", "--storage", str(folder / "runs"), cwd=folder, wait=False)
    newest = lambda: max((int(path.name[5:]) for path in (second / "checkpoints").glob("step-*")), default=0)  # noqa: E731
    wait_for(lambda: newest() >= at_interrupt + 6 and (first / "result.json").is_file(), seconds=200, process=process)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 130, output

    failed = json.loads((first / "result.json").read_text())
    assert failed["status"] == "failed" and "CheckpointError" in failed["error"] and "corrupted" in failed["error"]
    records = read_journal(sweep / "journal.jsonl")
    begins = [record for record in records if record["kind"] == "begin" and record["trial"] == second.name]
    assert [record["attempt"] for record in begins] == [1, 2]
    assert begins[1]["state"]["step"] == at_interrupt > 0
    steps = [
        record["row"]["dual_step"] for record in records if record["kind"] == "step" and record["trial"] == second.name
    ]
    assert steps == list(
        range(1, len(steps) + 1)
    )  # none twice, none missing: the checkpoint was taken at the interrupt

    client = MlflowClient(f"sqlite:///{folder / 'runs' / 'mlflow.db'}")
    runs = client.search_runs([client.get_experiment_by_name("tiny").experiment_id])
    assert len(runs) == 4  # parent, pretrained model and two trials: the resume used the runs that were there
    by_trial = {run.data.tags.get("dualsweep.trial"): run for run in runs}
    assert by_trial[first.name].info.status == "FAILED"
    history = client.get_metric_history(by_trial[second.name].info.run_id, "objective")
    assert sorted(point.step for point in history) == list(range(1, len(history) + 1))
    error = client.download_artifacts(by_trial[first.name].info.run_id, "error.txt", str(folder))
    assert "CheckpointError" in Path(error).read_text(encoding="utf-8")
    assert re.search(r"minority >= 0\.[12]: failed", output)


def test_a_second_driver_on_a_running_sweep_is_refused(interrupted, command):
    folder, _, _ = interrupted
    with open(folder / "runs" / "tiny" / "driver.lock", "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # what a running driver holds
        code, output = command("resume", "tiny", "--storage", str(folder / "runs"), cwd=folder)
    assert code == 2 and "is being run by another process" in output


def test_the_traces_written_at_the_end_are_whole(interrupted):
    folder, _, _ = interrupted
    for path in (folder / "runs" / "tiny" / "trials").glob("*/trace.parquet"):
        rows = read_trace(path)
        assert [row["dual_step"] for row in rows] == list(range(1, len(rows) + 1))
