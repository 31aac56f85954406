"""An elastic group on a cluster of raylets: it grows when a node joins, shrinks when one is killed, and loses no dual step."""

import os
import signal
import subprocess
import sys
import time

import pytest
import ray

from dualsweep.constraints import DualState
from dualsweep.orchestration.cluster import ClusterInfo, cluster_tended, slots_for
from dualsweep.orchestration.config import ComputeConfig, ConfigError, SweepConfig, sweep_points
from dualsweep.orchestration.dual_ledger import check_dual_steps
from dualsweep.orchestration.journal import read_journal
from dualsweep.orchestration.local_dual import LocalDual
from dualsweep.orchestration.preflight import preflight
from dualsweep.trainers.assignment import Assignment
from dualsweep.trainers.loop import run_trial
from dualsweep.trainers.workspace import Workspace

PATIENCE_S = 300.0


@pytest.mark.ray
@pytest.mark.heavy
def test_a_group_grows_shrinks_and_leaves_a_drained_node_and_no_dual_step_is_missing_or_doubled(
    make_cluster, tiny_config, write_config, command, wait_for, tmp_path, moment
):
    cluster = make_cluster()
    first = cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    config = tiny_config(
        name="elastic",
        primal={"steps": 1_000_000},  # it is interrupted once it has been seen to grow and to shrink
        dual={"primal_steps_per_dual_step": 8},
        thresholds={"grid": {"minority": [0.1]}},
        baselines={"unconstrained": False},
        compute={"workers": {"min": 1, "max": 2}, "resize_interval_s": 2, "max_failures": 0},
    )
    journal = tmp_path / "runs" / "elastic" / "journal.jsonl"
    driver = command("sweep", str(write_config(config)), "--address", cluster.address, cwd=tmp_path, wait=False)

    def rows(workers, beyond=0):
        """Dual steps that groups of this size made after the first `beyond` rows of the journal."""
        made = [r["row"] for r in read_journal(journal) if r["kind"] == "step" and r["trial"] != "pretrained"]
        return [row for row in made[beyond:] if row["workers"] == workers]

    try:
        wait_for(lambda: len(rows(1)) > moment.randint(5, 20), seconds=PATIENCE_S, process=driver)
        second = cluster.add_node(num_cpus=1)
        wait_for(lambda: len(rows(2)) > moment.randint(5, 20), seconds=PATIENCE_S, process=driver)
        before = len(rows(1)) + len(rows(2))
        killed, left = moment.sample([first, second], 2)
        cluster.remove_node(killed, allow_graceful=False)  # SIGKILL to all its processes
        wait_for(lambda: len(rows(1, before)) > 5, seconds=PATIENCE_S, process=driver)
        before = len(rows(1)) + len(rows(2))
        third = cluster.add_node(num_cpus=1)
        wait_for(lambda: len(rows(2, before)) > moment.randint(5, 20), seconds=PATIENCE_S, process=driver)
        before = len(rows(1)) + len(rows(2))
        drained = moment.choice([left, third])
        drain(cluster, drained, deadline_s=5)
        time.sleep(5)  # the machine goes when its time is over
        cluster.remove_node(drained, allow_graceful=False)
        wait_for(lambda: len(rows(1, before)) > 5, seconds=PATIENCE_S, process=driver)
        os.killpg(driver.pid, signal.SIGINT)
        output, _ = driver.communicate(timeout=PATIENCE_S)
    finally:
        if driver.poll() is None:
            os.killpg(driver.pid, signal.SIGKILL)
    assert driver.returncode == 130, output
    records = read_journal(journal)
    trial_id = next(r["trial"] for r in records if r["kind"] == "step" and r["trial"] != "pretrained")
    book = check_dual_steps(records, trial_id)
    assert book.attempt == 5 and [row["dual_step"] for row in book.rows] == list(range(1, len(book.rows) + 1))
    assert {row["workers"] for row in book.rows} == {1, 2}
    # A resize is no failure: with max_failures of 0 the trial was given up otherwise.
    assert book.status == "interrupted"
    begins = [r for r in records if r["kind"] == "begin" and r["trial"] == trial_id]
    assert all(DualState.from_dict(r["state"]).step % 3 == 0 for r in begins)  # from checkpoints, one every three steps
    grown = next(index for index, row in enumerate(book.rows) if row["workers"] == 2)
    calm = calm_rows(config, tmp_path, grown + 10)
    assert [row["multipliers"] for row in calm[:grown]] == [row["multipliers"] for row in book.rows[:grown]]
    # The same numbers are drawn on two workers; sums are made in another order, a relative 1e-6 that steps amplify.
    for one, two in zip(calm[grown:], book.rows[grown : grown + 10], strict=True):
        assert two["objective"] == pytest.approx(one["objective"], rel=1e-3)


def drain(cluster, node, *, deadline_s):
    """Announce the end of a node, as a cloud does for a spot machine."""
    command = [sys.executable, "-m", "ray.scripts.scripts", "drain-node", "--address", cluster.address]
    command += ["--node-id", node.node_id, "--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "test"]
    subprocess.run([*command, "--deadline-remaining-seconds", str(deadline_s)], check=True, capture_output=True)


@pytest.mark.ray
@pytest.mark.heavy
def test_ray_sees_at_once_that_a_node_joined(make_cluster):
    cluster = make_cluster()
    ray.init(address=cluster.address, logging_level="ERROR", log_to_driver=False)
    with cluster_tended(elastic=True):
        coordinator = ray.get_actor("AutoscalingCoordinator", namespace="AutoscalingCoordinator")
        ray.get(coordinator.request_resources.remote("test", [{"CPU": 1}] * 2, expire_after_s=300))
        cluster.add_node(num_cpus=1)
        cluster.add_node(num_cpus=1)
        deadline = time.monotonic() + 10  # Ray itself looks every 20 s
        while len(ray.get(coordinator.get_reserved_resources.remote("test"))) < 2:
            assert time.monotonic() < deadline, "the new nodes were not announced"
            time.sleep(0.2)


def calm_rows(config, tmp_path, count):
    """The first dual steps of the sweep's one trial, from its pretrained model, on one worker and undisturbed."""

    class Enough(Exception):
        pass

    class Until(LocalDual):
        def report(self, trial_id, attempt, dual_step, measurement):
            if dual_step > count:
                raise Enough
            return super().report(trial_id, attempt, dual_step, measurement)

    workspace, dual = Workspace(config.to_dict(), config.data), Until()
    (point,) = sweep_points(config, workspace.constraint_names)
    base_dir = tmp_path / "runs" / "bases" / config.base_key(workspace.pretraining_sets)
    with pytest.raises(Enough):
        run_trial(
            workspace, Assignment(**point, trial_dir=str(tmp_path / "calm"), base_dir=str(base_dir), attempt=1), dual
        )
    return dual.trace(point["trial_id"])


def test_as_many_elastic_groups_as_fit_at_their_largest_and_at_least_one():
    compute = ComputeConfig.model_validate({"workers": {"min": 1, "max": 4}})
    assert (compute.elastic, compute.fewest_workers, compute.most_workers) == (True, 1, 4)
    info = ClusterInfo(local=False, cpus=9.0, gpus=0.0, nodes=3)
    assert slots_for(compute, info) == 2
    assert slots_for(compute, ClusterInfo(local=False, cpus=2.0, gpus=0.0, nodes=1)) == 1
    assert slots_for(compute.model_copy(update={"concurrent_trials": 1}), info) == 1
    large = ComputeConfig.model_validate({"workers": {"min": 3, "max": 4}})
    with pytest.raises(
        ConfigError, match=r"compute\.workers\.min=3: one trial needs 3 CPUs, but the cluster has 2 CPUs"
    ):
        slots_for(large, ClusterInfo(local=False, cpus=2.0, gpus=0.0, nodes=1))


@pytest.mark.parametrize(
    "workers, message",
    [
        ({"min": 3, "max": 2}, r"min=3 is above max=2"),
        ({"min": 0, "max": 2}, r"compute\.workers.*min"),
        ({"max": 9}, r"compute\.workers\.max=9: more than the 2 logical shards"),
        ({"min": 1}, r"compute\.workers.*max"),
        ("two", r"compute\.workers"),
    ],
)
def test_bad_sizes_are_refused_by_name(tiny_config, tmp_path, workers, message):
    values = tiny_config(name="bad").to_dict()
    values["compute"]["workers"] = workers
    with pytest.raises(ConfigError, match=message):
        preflight(SweepConfig.from_dict(values), on_cluster=True)  # this machine need not have room for it
    assert not (tmp_path / "runs").exists()
