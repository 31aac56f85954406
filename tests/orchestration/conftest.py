"""A tiny sweep that goes through everything in seconds, and the command line as a user runs it."""

import os
import subprocess
import sys
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
