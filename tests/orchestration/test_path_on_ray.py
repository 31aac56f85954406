"""A warm-started frontier through Ray: the same as without it, and the same when it was interrupted in the middle."""

import importlib.util
import json
import os
import signal
from pathlib import Path

import pytest
import yaml
from mlflow import MlflowClient
from rich.console import Console

from dualsweep.orchestration.config import load_config
from dualsweep.orchestration.journal import read_journal
from dualsweep.orchestration.sweep import run_sweep
from dualsweep.orchestration.trace import read_trace

pytestmark = [pytest.mark.ray, pytest.mark.slow]

LABORATORY = Path(__file__).parents[2] / "benchmarks" / "_laboratory.py"
SHARES = [0.1, 0.15, 0.2, 0.3]
VALUES = {
    "name": "frontier",
    "data": {
        "dataset": "gaussian_mixture",
        "means": [[-1.0, 0.0], [1.0, 0.5], [0.0, -1.0]],
        "stds": [0.3, 0.2, 0.2],
        "weights": [0.8, 0.1, 0.1],
        "count": 400,
        "minority": {"classes": [1, 2]},
    },
    "model": {"kind": "mlp", "width": 16, "depth": 1},
    "pretrain": {"steps": 40, "batch_size": 32, "warmup_steps": 1, "num_shards": 2},
    "primal": {"steps": 60, "batch_size": 16, "constraint_batch_size": 8, "warmup_steps": 2, "num_shards": 2},
    "dual": {"rule": "ascent", "step_size": 0.05, "start": 0.1, "primal_steps_per_dual_step": 2},
    "measure": {"num_samples": 64, "num_sampling_steps": 4},
    "thresholds": {"unit": "share", "grid": {"minority": SHARES}},
    "sweep": {"order": "path", "chains": 2},
    # Loose enough that most points end early, and not all at the same dual step.
    "stopping": {"tolerance": 1.0, "drift": 0.5, "window": 8, "patience": 30},
    "evaluation": {"num_samples": 256, "num_sampling_steps": 4, "noise_levels": 6, "tolerance": 3.0},
    "compute": {"workers": 0, "concurrent_trials": 2},
    "checkpoint_every_dual_steps": 3,
}


def comparable(rows):
    return [{key: value for key, value in row.items() if key not in ("attempt", "wall_time")} for row in rows]


def traces(folder: Path) -> dict[str, list[dict]]:
    return {path.parent.name: comparable(read_trace(path)) for path in folder.glob("trials/*/trace.parquet")}


def results(folder: Path) -> dict[str, dict]:
    found = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("trials/*/result.json")]
    return {result["trial_id"]: result for result in found}


@pytest.fixture(scope="module")
def calm(tmp_path_factory):
    """(sweep file, folder, outcome) of an undisturbed sweep."""
    folder = tmp_path_factory.mktemp("calm")
    path = folder / "frontier.yaml"
    path.write_text(yaml.safe_dump(VALUES), encoding="utf-8")
    config = load_config(path, [f"storage={folder / 'runs'}"], environment=False)
    outcome = run_sweep(config, console=Console(quiet=True))
    assert outcome.status == "completed", outcome.failed
    return path, outcome.folder, outcome


def test_every_point_but_one_starts_from_its_neighbour(calm):
    _, folder, outcome = calm
    found = results(folder)
    by_share = {result["thresholds"]["component_1"]: result for result in found.values() if result["thresholds"]}
    starts = {share: (by_share[share]["start"] or {}).get("trial") for share in SHARES}
    ids = {share: by_share[share]["trial_id"] for share in SHARES}
    assert starts == {0.15: None, 0.1: ids[0.15], 0.2: ids[0.15], 0.3: ids[0.2]}
    assert found["unconstrained"]["start"] is None and found["unconstrained"]["dual_steps"] == 30
    assert {result["stopped_by"] for result in by_share.values()} >= {"certificate"}
    assert all(result["certificate"] for result in by_share.values())

    client = MlflowClient(outcome.tracking_uri)
    runs = client.search_runs([client.get_experiment_by_name("frontier").experiment_id])
    tags = {run.data.tags.get("dualsweep.trial"): run.data.tags for run in runs}
    assert tags[ids[0.3]]["dualsweep.started_from"] == ids[0.2]
    assert "dualsweep.started_from" not in tags[ids[0.15]]
    ended = {trial: result["stopped_by"] for trial, result in found.items()}
    assert {trial: tags[trial].get("dualsweep.stopped_by") for trial in ended} == ended

    page = outcome.report.read_text(encoding="utf-8")
    assert "<th>started from</th>" in page and "minority &gt;= 0.15" in page


def test_the_sweep_is_the_same_without_ray(calm, tmp_path):
    path, folder, _ = calm
    spec = importlib.util.spec_from_file_location("laboratory", LABORATORY)
    laboratory = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(laboratory)
    done = laboratory.run(laboratory.Job("frontier", str(path), seed=0), tmp_path)
    assert {trial: comparable(rows) for trial, rows in done.traces.items()} == traces(folder)
    starts = {result["trial_id"]: result["start"] for result in done.results}
    assert starts == {trial: result["start"] for trial, result in results(folder).items()}


@pytest.mark.heavy
def test_an_adaptive_front_through_ray_has_its_points_and_says_where_they_started(calm, tmp_path):
    path, _, _ = calm
    changes = [
        "sweep={order: adaptive, points: 4}",
        "thresholds={unit: share, search: {axes: {minority: {uniform: [0.1, 0.3]}}}}",
        "scheduler={kind: median, metric: kkt_residual, grace_dual_steps: 25}",
        f"storage={tmp_path / 'runs'}",
    ]
    outcome = run_sweep(load_config(path, changes, environment=False), console=Console(quiet=True))
    assert outcome.status == "completed", outcome.failed
    constrained = [result for result in results(outcome.folder).values() if result["kind"] == "constrained"]
    shares = sorted(result["thresholds"]["component_1"] for result in constrained)
    assert len(shares) == 4 and (shares[0], shares[-1]) == (0.1, 0.3) and len(set(shares)) == 4
    ids = {result["trial_id"] for result in constrained}
    starts = [result["start"]["trial"] if result["start"] else None for result in constrained]
    assert starts.count(None) == 1 and {start for start in starts if start} <= ids
    assert "started from" in outcome.report.read_text(encoding="utf-8")


@pytest.mark.heavy
@pytest.mark.parametrize("at", [1, 3])
def test_a_sweep_interrupted_in_the_middle_of_a_chain_comes_out_the_same(calm, tmp_path, command, wait_for, at):
    path, folder, _ = calm
    process = command("sweep", str(path), f"storage={tmp_path / 'runs'}", cwd=tmp_path, wait=False)
    mine = tmp_path / "runs" / "frontier"

    def begun() -> int:
        records = read_journal(mine / "journal.jsonl") if (mine / "journal.jsonl").exists() else []
        steps = {record["trial"] for record in records if record["kind"] == "step"}
        return len(steps & set(results(folder)) - {"unconstrained"})

    wait_for(lambda: begun() > at, seconds=200, process=process)
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=200)
    assert process.returncode in (0, 130), output  # 0: it was faster
    code, output = command("resume", "frontier", "--storage", str(tmp_path / "runs"), cwd=tmp_path)
    assert code == 0, output
    assert traces(mine) == traces(folder)
    given = [r["assignment"] for r in read_journal(mine / "journal.jsonl") if r["kind"] == "assign"]
    for trial, result in results(folder).items():
        starts = [assignment.get("start") for assignment in given if assignment["trial_id"] == trial]
        assert starts and all(start == result["start"] for start in starts)
