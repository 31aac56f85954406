"""A sweep is asked to end: by SIGTERM, and by a second Ctrl-C while the first is being handled. It goes on in a resume that
finds MLflow away, in the same MLflow runs. Real local Ray, a real MLflow server, real signals at moments drawn at random."""

import contextlib
import os
import signal
import time

import pytest

from dualsweep.orchestration.delivery import read_ledger
from dualsweep.orchestration.sweep import FREE_S

PATIENCE_S = 240.0


def sigterm(driver, moment):
    """To the driver alone, as `kill` sends it, and service managers and batch systems that know the driver."""
    os.kill(driver.pid, signal.SIGTERM)


def two_ctrl_c(driver, moment):
    """To all in the terminal's foreground. The second one comes before the workers have heard of the first, or later."""
    os.killpg(driver.pid, signal.SIGINT)
    time.sleep(moment.choice([0.1, moment.uniform(0.1, 1.5)]))  # the second one's moment
    with contextlib.suppress(ProcessLookupError):
        os.killpg(driver.pid, signal.SIGINT)


@pytest.mark.ray
@pytest.mark.heavy
@pytest.mark.parametrize(
    ("ask", "back"), [(sigterm, "never"), (two_ctrl_c, "during the resume")], ids=["SIGTERM", "two Ctrl-C"]
)
def test_a_sweep_that_was_asked_to_end_goes_on_where_mlflow_is_away(
    ask, back, moment, tmp_path, write_small, mlflow_server, free_port, command, wait_for, new_checkpoints, left_running,
    assert_books_whole, assert_as_calm, runs_in_mlflow, assert_delivered_once,
):  # fmt: skip
    port, folder = free_port(), tmp_path / "runs" / "small"
    address = f"http://127.0.0.1:{port}"
    path = write_small(tracking={"uri": address})

    def driver(*arguments):
        with left_running.marking():
            return command(*arguments, cwd=tmp_path, wait=False)

    with mlflow_server(port, tmp_path):
        first = driver("sweep", str(path))
        wait_for(new_checkpoints(folder), seconds=PATIENCE_S, process=first)
        time.sleep(moment.uniform(0.0, 1.5))  # the fault's moment
        ask(first, moment)
        began = time.monotonic()
        output, _ = first.communicate(timeout=PATIENCE_S)
        if ask is two_ctrl_c:
            assert time.monotonic() - began < FREE_S, "stopping at once waited for what still trains"
        assert first.returncode == 130, output
        assert not left_running()
        assert_books_whole(folder)
        before = runs_in_mlflow(address)
    books = read_ledger(folder).trials
    unfinished = {
        trial_id: len(book.rows) for trial_id, book in books.items() if book.status in ("interrupted", "running")
    }
    assert unfinished
    if ask is sigterm:  # a checkpoint at the step it had got to: nothing is trained again
        assert {books[trial_id].status for trial_id in unfinished} == {"interrupted"}
        assert all(books[trial_id].checkpoint_step == count for trial_id, count in unfinished.items())

    resume, sync = ((verb, "small", "--storage", str(folder.parent)) for verb in ("resume", "sync"))
    again, checkpointed = driver(*resume), new_checkpoints(folder)
    with contextlib.ExitStack() as stack:
        if back == "during the resume":
            wait_for(checkpointed, seconds=PATIENCE_S, process=again)
            stack.enter_context(mlflow_server(port, tmp_path))
        output, _ = again.communicate(timeout=PATIENCE_S)
        assert again.returncode == 0, output
        assert "going on without MLflow until it is back: tracking.uri" in output
        assert not left_running()
        assert ("MLflow has not got" in output) == (back == "never"), output
        if back == "never":
            stack.enter_context(mlflow_server(port, tmp_path))
            code, output = command(*sync, cwd=tmp_path)
            assert code == 0 and "delivered" in output and "rows" in output, output
        code, output = command(*sync, cwd=tmp_path)
        assert (code, output.strip()) == (0, "nothing to deliver: MLflow has everything")
        assert_delivered_once(address, folder)
        after = runs_in_mlflow(address)
        assert all(after[trial_id].info.run_id == run.info.run_id for trial_id, run in before.items())
    assert_books_whole(folder)
    assert_as_calm(folder)


@pytest.mark.ray
@pytest.mark.heavy
def test_a_sweep_that_is_ended_while_it_writes_its_report_says_so_and_a_resume_writes_it(
    moment, tmp_path, write_small, command, wait_for, left_running, assert_as_calm, assert_delivered_once
):
    """No trial runs any more, and Ray has put a handler of SIGTERM of its own in the place of ours."""
    tracking, folder = f"sqlite:///{tmp_path / 'mlflow.db'}", tmp_path / "runs" / "small"
    path = write_small(tracking={"uri": tracking}, primal={"steps": 160})
    with left_running.marking():
        sweep = command("sweep", str(path), cwd=tmp_path, wait=False)
    wait_for((folder / "report").exists, seconds=PATIENCE_S, process=sweep)
    time.sleep(moment.uniform(0.0, 0.2))  # the fault's moment
    os.kill(sweep.pid, signal.SIGTERM)
    output, _ = sweep.communicate(timeout=PATIENCE_S)
    assert sweep.returncode == 130, output
    assert not left_running()
    code, output = command("resume", "small", "--storage", str(folder.parent), cwd=tmp_path)
    assert code == 0 and (folder / "report" / "index.html").is_file(), output
    assert_delivered_once(tracking, folder)
    assert_as_calm(folder)
