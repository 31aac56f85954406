"""Hugging Face's ``datasets`` stays importable on the driver and on a Ray worker, also from the repository root.

Our folder ``datasets`` has the name of their library. Ray puts the driver's working directory first on the path of
every worker, so a sweep started from the repository root would find ours there; the command line leaves it first.
Every test runs a new interpreter: the path and the modules of the one that runs pytest would prove nothing.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

PROBE = """
import json, os, sys

def found_datasets():
    import datasets
    return {"file": datasets.__file__, "is_hugging_face": hasattr(datasets, "load_dataset")}

def print_what_driver_and_worker_find():
    import ray
    on_worker = ray.get(ray.remote(num_cpus=1)(found_datasets).remote(), timeout=120)
    print("PROBE " + json.dumps({"driver": found_datasets(), "worker": on_worker}), flush=True)
"""
LEFT = (
    PROBE
    + """
from dualsweep.orchestration.cluster import leave_repository_root, start_ray

leave_repository_root()
start_ray(num_cpus=1)
print_what_driver_and_worker_find()
"""
)
STAYED = (
    PROBE
    + """
import ray

ray.init(num_cpus=1, log_to_driver=False)
sys.path.remove("")  # the driver looks elsewhere, its working directory reaches the worker all the same
print_what_driver_and_worker_find()
"""
)
# The real command, up to the moment at which Ray runs.
COMMAND = (
    PROBE
    + """
import dualsweep.orchestration.cluster as cluster

start_ray = cluster.start_ray

def start_ray_and_stop(*args, **kwargs):
    start_ray(*args, **kwargs)
    print_what_driver_and_worker_find()
    import ray
    ray.shutdown()
    os._exit(0)

cluster.start_ray = start_ray_and_stop  # before the command line imports it
from dualsweep.cli import main

sys.argv = ["dualsweep", "sweep", "examples/digits_fairness.yaml"]
main()
"""
)


def run_from_the_root(*command: str, **environment: str) -> str:
    """Standard output of a command of the test's own environment, run in the repository root."""
    quiet = {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "MLFLOW_DISABLE_TELEMETRY": "true"}
    finished = subprocess.run(
        command, cwd=ROOT, env=os.environ | quiet | environment, capture_output=True, text=True, timeout=240
    )
    assert finished.returncode == 0, f"{finished.stdout}\n{finished.stderr}"
    return finished.stdout


def probe(script: str, **environment: str) -> dict:
    output = run_from_the_root(sys.executable, "-c", script, **environment)
    (line,) = [line for line in output.splitlines() if line.startswith("PROBE ")]
    return json.loads(line.removeprefix("PROBE "))


def test_the_trap_is_there():
    """If ``import datasets`` found Hugging Face's from here by itself, the tests below would prove nothing."""
    script = "import importlib.util; print(importlib.util.find_spec('datasets').origin)"
    assert Path(run_from_the_root(sys.executable, "-c", script).strip()) == ROOT / "datasets/__init__.py"


@pytest.mark.ray
@pytest.mark.slow
def test_a_worker_of_a_driver_that_stays_finds_our_folder():
    found = probe(STAYED)
    assert found["driver"]["is_hugging_face"]
    assert Path(found["worker"]["file"]) == ROOT / "datasets/__init__.py"


@pytest.mark.ray
@pytest.mark.slow
def test_driver_and_worker_find_hugging_face_once_the_driver_has_left():
    """PYTHONPATH too: workers inherit it, so the driver's own path is not all there is to clean."""
    found = probe(LEFT, PYTHONPATH=str(ROOT))
    assert found["driver"]["is_hugging_face"], found
    assert found["worker"]["is_hugging_face"], found


@pytest.mark.ray
@pytest.mark.slow
def test_the_sweep_command_leaves_before_it_starts_ray(tmp_path):
    found = probe(COMMAND, DUALSWEEP_STORAGE=str(tmp_path))
    assert found["driver"]["is_hugging_face"], found
    assert found["worker"]["is_hugging_face"], found


CONSOLE_SCRIPT = str(Path(sys.executable).parent / "dualsweep")


@pytest.mark.parametrize("command", [[CONSOLE_SCRIPT], [sys.executable, "-m", "dualsweep"]], ids=["script", "module"])
def test_the_command_runs_from_the_repository_root(command):
    assert "sweep" in run_from_the_root(*command, "--help")
