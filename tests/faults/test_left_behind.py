"""What a driver that died left reserved on a cluster is freed for the sweeps that go on there."""

import subprocess
import sys

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
    cluster = make_cluster(dashboard=False)
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
