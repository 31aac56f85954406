"""A tiny sweep that goes through everything in seconds, the command line as a user runs it, and MLflow's own server."""

import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml

TINY = {
    "name": "tiny",
    "data": {"dataset": "digits", "minority": {"classes": [4, 7], "keep": 0.1}},
    "model": {"kind": "unet", "channels": [8, 16], "norm_groups": 4},
    "pretrain": {"steps": 12, "batch_size": 16, "warmup_steps": 2, "num_shards": 2},
    "primal": {"steps": 24, "batch_size": 16, "constraint_batch_size": 4, "warmup_steps": 2, "num_shards": 2},
    "dual": {"rule": "ascent", "step_size": 0.02, "primal_steps_per_dual_step": 2},
    "measure": {"num_samples": 16, "num_sampling_steps": 2},
    "thresholds": {"unit": "share", "grid": {"minority": [0.1, 0.2]}},
    "evaluation": {"num_samples": 64, "num_sampling_steps": 4, "noise_levels": 8},
    "checkpoint_every_dual_steps": 3,
}


def pytest_collection_modifyitems(items):
    """With several processes: a file's tests share their fixtures in one, and all that start Ray are in one, in turn."""
    for item in items:
        group = "ray" if item.get_closest_marker("ray") else str(item.path)
        item.add_marker(pytest.mark.xdist_group(group))


@pytest.fixture(scope="session", autouse=True)
def _own_ray():
    """Ray notes a cluster that runs here for all users of the machine: ours is noted elsewhere, and we join nobody else's.

    The folder's name is short because Ray's sockets lie below it, and a socket's path may have 107 characters.
    """
    with (
        tempfile.TemporaryDirectory(prefix="r", ignore_cleanup_errors=True) as folder,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setenv("RAY_TMPDIR", folder)
        yield


@pytest.fixture
def make_cluster(tmp_path, monkeypatch):
    """`make()`: a Ray cluster of its own, so far a head that offers no CPU and has no dashboard, which no sweep needs."""
    import ray
    from ray.cluster_utils import Cluster

    from dualsweep.orchestration.cluster import quiet_environment

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    quiet_environment()
    started = []

    def make() -> Cluster:
        started.append(Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False}))
        return started[-1]

    yield make
    ray.shutdown()
    for cluster in started:
        cluster.shutdown()


@pytest.fixture
def tiny_config(tmp_path):
    """`make(**sections)`: the tiny sweep as a SweepConfig stored below tmp_path, with sections updated."""
    from dualsweep.orchestration.config import SweepConfig

    def make(**sections):
        values = {key: dict(value) if isinstance(value, dict) else value for key, value in TINY.items()}
        values["storage"] = str(tmp_path / "runs")
        for key, value in sections.items():
            values[key] = {**values.get(key, {}), **value} if isinstance(value, dict) else value
        return SweepConfig.from_dict(values)

    return make


@pytest.fixture
def write_config(tmp_path):
    """`write(config)`: the YAML file of a config."""

    def write(config) -> Path:
        path = tmp_path / f"{config.name}.yaml"
        path.write_text(yaml.safe_dump(config.to_dict()), encoding="utf-8")
        return path

    return write


@pytest.fixture(scope="session")
def tiny_values():
    """The tiny sweep as plain values, to copy."""
    return TINY


@pytest.fixture(scope="session")
def command():
    """`run(*args, cwd=...)` is the command line in a process of its own: (exit code, output), or the process with wait=False."""

    def run(*args: str, cwd: Path, wait: bool = True):
        environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
        process = subprocess.Popen(
            [sys.executable, "-m", "dualsweep", *args],
            cwd=cwd,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,  # a process group of its own, as a terminal gives it
        )
        if not wait:
            return process
        output, _ = process.communicate(timeout=400)
        return process.returncode, output

    return run


@pytest.fixture(scope="session")
def wait_for():
    """`wait_for(condition, seconds=, process=)` polls until it holds; the process must not end before."""

    def wait(condition, *, seconds: float, process) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline, "the condition did not come true in time"
            time.sleep(0.05)  # between polls

    return wait


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory):
    """An MLflow database with its tables: making them takes 2 s, copying them none."""
    from dualsweep.orchestration.tracking_uri import mlflow_client

    path = tmp_path_factory.mktemp("empty") / "mlflow.db"
    mlflow_client(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture(scope="session")
def free_port():
    """`free_port()`: one that stays free while the server is down: outside the range from which clients draw theirs."""

    def find() -> int:
        for port in random.SystemRandom().sample(range(20_000, 32_000), 50):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) != 0:
                    return port
        raise RuntimeError("no free port between 20000 and 32000")

    return find


@pytest.fixture(scope="session")
def mlflow_server(empty_database):
    """`with mlflow_server(port, folder) as process`: a real one, up when the block begins, killed when it ends.

    What it knows lies in `folder`, so that another one goes on where it ended. It has its own process group.
    """

    @contextmanager
    def serve(port: int, folder: Path):
        if not (folder / "server.db").exists():
            (folder / "server.db").write_bytes(empty_database.read_bytes())
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port)]
        command += ["--workers", "1", "--backend-store-uri", f"sqlite:///{folder / 'server.db'}"]
        command += ["--artifacts-destination", str(folder / "artifacts")]
        environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
        with open(folder / "server.log", "ab") as log:
            process = subprocess.Popen(
                command, env=environment, cwd=folder, stdout=log, stderr=log, start_new_session=True
            )
        try:
            deadline = time.monotonic() + 120  # a start takes 5 s, and took 20 on a busy two-core machine
            while True:
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                    break
                except OSError:
                    assert process.poll() is None, (folder / "server.log").read_text(encoding="utf-8")
                    assert time.monotonic() < deadline, "the server did not start"
                    time.sleep(0.2)
            yield process
        finally:
            os.killpg(process.pid, signal.SIGKILL)  # our own group: the server and its worker
            process.wait()

    return serve
