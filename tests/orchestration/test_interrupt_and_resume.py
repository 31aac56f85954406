"""Ctrl-C and SIGTERM leave everything resumable, and a resume goes on from the newest whole checkpoint of every trial."""

import fcntl
import os
import signal

import pytest
import yaml
from mlflow import MlflowClient

from dualsweep.orchestration.journal import read_journal

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory, tiny_values, command, wait_for):
    """A sweep interrupted after the first checkpoint of two constrained trials."""
    folder = tmp_path_factory.mktemp("interrupt")
    config = {**tiny_values, "storage": str(folder / "runs"), "baselines": {"unconstrained": False}}
    config["primal"] = {**tiny_values["primal"], "steps": 4000}  # far longer than the test waits
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(config))
    process = command("sweep", str(path), cwd=folder, wait=False)
    trials = folder / "runs" / "tiny" / "trials"
    wait_for(lambda: len(list(trials.glob("*/checkpoints/step-*"))) >= 3, seconds=200, process=process)
    os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C: Ray's processes get it too
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


def test_a_resume_continues_at_the_newest_whole_checkpoint(interrupted, command, wait_for):
    folder, _, _ = interrupted
    sweep = folder / "runs" / "tiny"
    torn, whole = sorted(path.parent for path in sweep.glob("trials/*/checkpoints"))

    def newest(trial):
        return max((int(path.name[5:]) for path in (trial / "checkpoints").glob("step-??????")), default=0)

    at_interrupt = {trial: newest(trial) for trial in (torn, whole)}
    tensors = torn / "checkpoints" / f"step-{at_interrupt[torn]:06d}" / "tensors.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-7])

    process = command("resume", "tiny", "--storage", str(folder / "runs"), cwd=folder, wait=False)
    wait_for(lambda: all(newest(t) >= at_interrupt[t] + 6 for t in (torn, whole)), seconds=200, process=process)
    os.kill(process.pid, signal.SIGTERM)  # as `kill` and service managers end it: the driver alone
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 130, output

    records = read_journal(sweep / "journal.jsonl")
    assert [record["status"] for record in records if record["kind"] == "end"][-2:] == ["interrupted", "interrupted"]
    for trial in (torn, whole):
        begins = [record for record in records if record["kind"] == "begin" and record["trial"] == trial.name]
        assert [record["attempt"] for record in begins] == [1, 2]
        restarted_at = begins[1]["state"]["step"]
        # The whole one goes on where it stopped; the torn one at the checkpoint before, at a multiple of 3.
        assert restarted_at == at_interrupt[trial] if trial == whole else 0 < restarted_at < at_interrupt[trial]
        steps = [r["row"] for r in records if r["kind"] == "step" and r["trial"] == trial.name]
        first = [row for row in steps if row["attempt"] == 1]
        second = [row for row in steps if row["attempt"] == 2]
        assert [row["dual_step"] for row in second] == list(range(restarted_at + 1, second[-1]["dual_step"] + 1))
        # What was redone came out the same to the last bit.
        redone = {row["dual_step"]: row for row in first[restarted_at:]}
        for row in second:
            if row["dual_step"] in redone:
                for key in ("objective", "multipliers", "metrics", "grad_norm"):
                    assert row[key] == redone[row["dual_step"]][key]

    client = MlflowClient(f"sqlite:///{folder / 'runs' / 'mlflow.db'}")
    runs = client.search_runs([client.get_experiment_by_name("tiny").experiment_id])
    assert len(runs) == 4  # parent, pretrained model and two trials: the resume used the runs that were there
    for run in runs:
        history = client.get_metric_history(run.info.run_id, "objective")
        assert [point.step for point in history] == list(range(1, len(history) + 1))  # none twice


def test_a_second_driver_on_a_running_sweep_is_refused(interrupted, command):
    folder, _, _ = interrupted
    with open(folder / "runs" / "tiny" / "driver.lock", "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # what a running driver holds
        code, output = command("resume", "tiny", "--storage", str(folder / "runs"), cwd=folder)
    assert code == 2 and "is being run by another process" in output
