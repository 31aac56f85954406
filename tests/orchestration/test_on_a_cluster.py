"""The laptop's sweep on a cluster of several raylets, unchanged, and on two workers a trial."""

import json

import pytest
from rich.console import Console

from dualsweep.orchestration.config import ConfigError
from dualsweep.orchestration.sweep import run_sweep
from dualsweep.orchestration.trace import read_trace

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture
def cluster(make_cluster):
    """A head that runs no trial and two nodes of one CPU each, as in cluster.yaml."""
    started = make_cluster()
    started.add_node(num_cpus=1)
    started.add_node(num_cpus=1)
    started.wait_for_nodes()
    return started


def test_the_same_file_runs_on_a_cluster_with_two_workers_a_trial(cluster, tiny_config):
    one = tiny_config(name="one-worker", baselines={"unconstrained": False}, thresholds={"grid": {"minority": [0.2]}})
    two = one.model_copy(update={"name": "two-workers", "compute": one.compute.model_copy(update={"workers": 2})})
    too_large = one.model_copy(
        update={"name": "too-large", "compute": one.compute.model_copy(update={"workers": 2, "cpus_per_worker": 2})}
    )
    with pytest.raises(ConfigError, match=r"compute\.workers=2: one trial needs 4 CPUs, but the cluster has 2 CPUs"):
        run_sweep(too_large, address=cluster.address, console=Console(quiet=True))
    rows = {}
    for config in (one, two):
        outcome = run_sweep(config, address=cluster.address, console=Console(quiet=True))
        assert (outcome.status, outcome.held.cpus, outcome.held.placement_groups) == ("completed", 0, 0)
        (path,) = (outcome.folder / "trials").glob("*/trace.parquet")
        rows[config.name] = read_trace(path)
        assert json.loads((path.parent / "result.json").read_text())["dual_steps"] == 12
    # The base was trained by one worker and is shared, and logical shards draw the same numbers on one worker and two:
    # only the order of float32 sums differs, a relative 1e-6 a step that 24 steps of training amplify.
    assert rows["one-worker"][-1]["multipliers"][0] > 0
    for calm, split in zip(rows["one-worker"], rows["two-workers"], strict=True):
        assert split["objective"] == pytest.approx(calm["objective"], rel=1e-3)
        assert split["grad_norm"] == pytest.approx(calm["grad_norm"], rel=1e-2)
