"""What a driver or a slot that died left reserved on a cluster is freed for the sweeps that go on there."""

import subprocess
import sys
import time

import pytest
import ray
from ray.util import placement_group_table

from dualsweep.orchestration.cluster import JOB_MARK, free_left_groups

# Detached, so that the group outlives its job as one does that is asked for in a controller's last moment.
HOLDER = """
import sys
import ray
ray.init(address=sys.argv[1], job_config=ray.job_config.JobConfig(metadata={sys.argv[2]: "sweep"}))
group = ray.util.placement_group([{"CPU": 1}], lifetime="detached")
ray.get(group.ready(), timeout=60)
print("group", group.id.hex())
"""


@pytest.mark.ray
@pytest.mark.slow
def test_groups_of_our_dead_jobs_are_removed_and_nobody_elses(make_cluster):
    cluster = make_cluster()
    cluster.add_node(num_cpus=4)

    def left_by(mark):
        command = [sys.executable, "-c", HOLDER, cluster.address, mark]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        return output.split()[output.split().index("group") + 1]

    ours, theirs = left_by(JOB_MARK), left_by("another")
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    living = ray.util.placement_group([{"CPU": 1}])
    ray.get(living.ready(), timeout=60)
    assert free_left_groups() == 1
    states = {group_id: group["state"] for group_id, group in placement_group_table().items()}
    assert states == {ours: "REMOVED", theirs: "CREATED", living.id.hex(): "CREATED"}
    assert free_left_groups() == 0


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("mark", [JOB_MARK, "another"])
def test_the_group_of_a_slot_that_died_is_freed_while_its_sweep_goes_on(make_cluster, mark):
    class Slot:
        def reserve(self) -> str:
            group = ray.util.placement_group([{"CPU": 1}])
            ray.get(group.ready(), timeout=60)
            return group.id.hex()

    cluster = make_cluster()
    cluster.add_node(num_cpus=4)
    job = ray.job_config.JobConfig(metadata={mark: "sweep"})
    ray.init(address=cluster.address, job_config=job, log_to_driver=False, logging_level="ERROR")
    ours = ray.util.placement_group([{"CPU": 1}])
    ray.get(ours.ready(), timeout=60)
    dying, living = (ray.remote(Slot).options(num_cpus=0).remote() for _ in range(2))
    left, held = ray.get([dying.reserve.remote(), living.reserve.remote()], timeout=60)
    assert free_left_groups() == 0
    ray.kill(dying)
    deadline, freed = time.monotonic() + 20, 0
    while mark == JOB_MARK and freed == 0:  # Ray notices the actor's death a moment later
        assert time.monotonic() < deadline, "the dead slot's group was not freed"
        freed = free_left_groups()
    expected = {ours.id.hex(): "CREATED", left: "REMOVED" if mark == JOB_MARK else "CREATED", held: "CREATED"}
    assert {group_id: group["state"] for group_id, group in placement_group_table().items()} == expected
    assert free_left_groups() == 0
