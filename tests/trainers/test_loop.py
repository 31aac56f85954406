"""run_trial from assignment to result, in this process: every kind of run, interruption and resumption, damage."""

import json
import math
import shutil
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from dualsweep.orchestration.config import SweepConfig
from dualsweep.orchestration.dual_ledger import StaleAttemptError
from dualsweep.orchestration.local_dual import LocalDual
from dualsweep.trainers import loop
from dualsweep.trainers.assignment import Assignment
from dualsweep.trainers.batches import BatchLoader
from dualsweep.trainers.loop import run_trial
from dualsweep.trainers.models import load_model
from dualsweep.trainers.primal import NonFiniteError
from dualsweep.trainers.results import publish_base
from dualsweep.trainers.state import CheckpointError
from dualsweep.trainers.store import Store
from dualsweep.trainers.workspace import Workspace

DUAL_STEPS = 6  # of every trial below: 12 primal steps, a dual step every second one
SHARED = {
    "schedule": {"num_train_timesteps": 50, "beta_end": 0.2},
    "pretrain": {"steps": 8, "batch_size": 16, "warmup_steps": 1, "num_shards": 2},
    "primal": {
        "steps": 12,
        "batch_size": 16,
        "constraint_batch_size": 8,
        "warmup_steps": 2,
        "num_shards": 2,
        "ema_decay": 0.5,
    },
    "dual": {"rule": "ascent", "step_size": 0.05, "primal_steps_per_dual_step": 2, "smoothing": 0.5},
    "measure": {"num_samples": 24, "num_sampling_steps": 4, "window": 2},
    "evaluation": {"num_samples": 48, "num_sampling_steps": 4, "noise_levels": 6, "grid_samples": 9},
    "checkpoint_every_dual_steps": 2,
}
MIXTURE = SHARED | {
    "name": "mixture",
    "data": {
        "dataset": "gaussian_mixture",
        "means": [[-1.0, 0.0], [1.0, 0.5], [0.0, -1.0]],
        "stds": [0.3, 0.2, 0.2],
        "weights": [0.8, 0.1, 0.1],
        "count": 200,
        "minority": {"classes": [1, 2]},
    },
    "model": {"kind": "mlp", "width": 16, "depth": 1},
    "thresholds": {"unit": "share", "grid": {"minority": [0.4]}},
}
DIGITS = SHARED | {
    "name": "digits",
    "data": {"dataset": "digits", "minority": {"classes": [4, 7], "keep": 0.2}},
    "model": {"kind": "unet", "channels": [8], "norm_groups": 8},
    "thresholds": {"unit": "share", "grid": {"minority": [0.1]}},
}
LOSSES = MIXTURE | {"name": "losses", "thresholds": {"unit": "loss", "grid": {"minority": [{"factor": 0.9}]}}}
CONFIGS = {"mixture": MIXTURE, "digits": DIGITS, "losses": LOSSES}


def make_workspace(name: str) -> Workspace:
    config = SweepConfig.from_dict(CONFIGS[name])
    return Workspace(config.to_dict(), config.data)


class Sweep:
    """A folder with a pretrained model, and the assignments to run there."""

    def __init__(self, name: str, folder) -> None:
        self.name, self.folder, self.workspace = name, folder, make_workspace(name)
        self.base_result = self.run(self.assignment("base"), LocalDual())

    def assignment(self, kind: str, trial_id: str | None = None, **changes) -> Assignment:
        names = self.workspace.constraint_names
        grid = CONFIGS[self.name]["thresholds"]["grid"]["minority"][0]
        trial_id = trial_id or kind
        given = {
            "trial_id": trial_id,
            "label": kind,
            "kind": kind,
            "attempt": 1,
            "thresholds": dict.fromkeys(names, grid) if kind == "constrained" else {},
            "fixed_weight": 0.3 if kind == "fixed_weights" else None,
            "trial_dir": str(self.folder / "trials" / trial_id),
            "base_dir": str(self.folder / "base"),
        }
        return Assignment(**given | changes)

    def run(self, assignment: Assignment, dual: LocalDual, workspace: Workspace | None = None):
        return run_trial(workspace or self.workspace, assignment, dual)

    def fresh(self, trial_id: str, kind: str = "constrained", **changes) -> Assignment:
        """An assignment whose folder does not exist yet."""
        assignment = self.assignment(kind, trial_id, **changes)
        shutil.rmtree(assignment.trial_dir, ignore_errors=True)
        return assignment


@pytest.fixture(scope="module")
def sweeps(tmp_path_factory):
    made = {}

    def get(name: str) -> Sweep:
        if name not in made:
            made[name] = Sweep(name, tmp_path_factory.mktemp(name))
        return made[name]

    return get


@pytest.fixture(scope="module")
def calm(sweeps):
    """(sweep, assignment, dual side, result) of an undisturbed constrained trial, each computed once."""
    made = {}

    def get(name: str):
        if name not in made:
            sweep, dual = sweeps(name), LocalDual()
            assignment = sweep.fresh("calm")
            made[name] = sweep, assignment, dual, sweep.run(assignment, dual)
        return made[name]

    return get


class Directing(LocalDual):
    """Answers the report of one dual step with a directive."""

    def __init__(self, directive: str, at: int) -> None:
        super().__init__()
        self.directive, self.at = directive, at

    def report(self, trial_id, attempt, dual_step, measurement):
        reply = super().report(trial_id, attempt, dual_step, measurement)
        return replace(reply, directive=self.directive) if dual_step == self.at else reply


def model_folder(assignment: Assignment) -> Path:
    return Path(assignment.trial_dir) / "model"


def weights_of(assignment: Assignment) -> dict[str, bytes]:
    (path,) = model_folder(assignment).rglob("*.safetensors")
    return {name: tensor.numpy().tobytes() for name, tensor in load_file(path).items()}


def comparable(rows: list[dict]) -> list[dict]:
    """Rows without what a calm and a disturbed run may differ in."""
    return [{k: v for k, v in row.items() if k not in ("attempt", "wall_time")} for row in rows]


TIMING = ("wall_seconds", "startup_seconds", "trial_id", "label")


def timeless(result: dict) -> dict:
    return {k: v for k, v in result.items() if k not in TIMING}


# -- results -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mixture", "digits", "losses"])
def test_the_base_run_leaves_a_model_and_its_calibration(sweeps, name):
    sweep = sweeps(name)
    result = sweep.base_result
    assert (result["kind"], result["status"], result["error"]) == ("base", "completed", None)
    assert (result["primal_steps"], result["dual_steps"]) == (8, 4)
    base = sweep.folder / "base"
    assert json.loads((base / "base.json").read_text(encoding="utf-8")) == {"data": sweep.workspace.data.fingerprint}
    (calibration,) = base.glob("calibration-*.json")
    stored = json.loads(calibration.read_text(encoding="utf-8"))
    assert stored == result["calibration"]
    assert stored["unit"] == CONFIGS[name]["thresholds"]["unit"]
    assert set(stored["metrics"]) == set(sweep.workspace.constraint_names)
    assert all(0 < stored["stderrs"][n] < stored["metrics"][n] for n in stored["metrics"])
    names = sorted(entry.name for entry in base.iterdir() if not entry.name.startswith("errors-"))  # a trial's evaluation
    assert names == ["base.json", calibration.name, "model"]
    assert load_model(base / "model")


@pytest.mark.parametrize("name", ["mixture", "digits", "losses"])
@pytest.mark.parametrize("kind", ["unconstrained", "constrained", "fixed_weights"])
def test_every_kind_of_trial_reports_a_whole_result(sweeps, calm, name, kind):
    if kind == "constrained":
        sweep, assignment, dual, result = calm(name)
    else:
        sweep, dual = sweeps(name), LocalDual()
        assignment = sweep.fresh(kind, kind)
        result = sweep.run(assignment, dual)
    names = list(sweep.workspace.constraint_names)
    mine = names if kind != "unconstrained" else []
    unit = CONFIGS[name]["thresholds"]["unit"]
    assert (result["trial_id"], result["label"], result["kind"]) == (assignment.trial_id, assignment.label, kind)
    assert (result["status"], result["error"], result["method"], result["unit"]) == (
        "completed",
        None,
        "fairness",
        unit,
    )
    assert result["thresholds"] == assignment.thresholds
    assert (result["primal_steps"], result["dual_steps"]) == (12, DUAL_STEPS)
    for field in ("multipliers", "averaged_multipliers", "relaxations"):
        assert list(result[field]) == mine
    assert result["objective"]["unit"] == "nats" and result["objective"]["stderr"] > 0
    # Constraint metrics come with every kind, so that baselines can be drawn beside the points.
    assert [row["name"] for row in result["constraints"]] == names
    for row in result["constraints"]:
        assert row["unit"] == unit and math.isfinite(row["metric"]) and row["metric_stderr"] >= 0 and row["count"] > 0
        assert (row["threshold"] is None) == (row["violation"] is None) == (kind != "constrained")
        if kind == "constrained":
            assert row["violation"] == row["metric"] - row["threshold"]
        if unit == "share":
            assert row["user_value"] == pytest.approx(math.exp(-row["metric"]))
    assert (result["certificate"] is None) == (kind != "constrained")
    histogram = result["histogram"]
    assert histogram["total"] == sum(histogram["counts"]) == 48
    assert len(histogram["counts"]) == len(histogram["classes"]) == len(histogram["prior"])
    assert sum(histogram["prior"]) == pytest.approx(1)
    exact = kind == "constrained" and unit == "share"
    assert (result["exact_multipliers"] is not None) == (result["exact_objective"] is not None) == exact
    if kind == "fixed_weights":
        assert set(result["multipliers"].values()) == set(result["averaged_multipliers"].values()) == {0.3}

    folder = sweep.folder / "trials" / assignment.trial_id
    samples = np.load(folder / "samples.npy", allow_pickle=False)
    kept = 9 if name == "digits" else 48  # images for a grid, all points for a scatter plot
    assert samples.shape == (kept, *sweep.workspace.data.sample_shape) and samples.dtype == np.float32
    errors = np.load(folder / "held_out_errors.npy", allow_pickle=False)
    assert errors.shape == (len(sweep.workspace.data.held_out_main),)
    assert not list(folder.rglob("*.part*"))
    model = load_model(folder / "model").state_dict()
    ema = sweep.workspace.modules()[1].state_dict() if kind != "constrained" else None  # a later trial refilled it
    if ema is not None:
        assert all((model[key] == ema[key]).all() for key in ema)


@pytest.mark.parametrize("name", ["mixture", "digits", "losses"])
def test_the_trace_has_one_row_a_dual_step(calm, name):
    sweep, assignment, dual, result = calm(name)
    rows = dual.trace(assignment.trial_id)
    assert [row["dual_step"] for row in rows] == list(range(1, DUAL_STEPS + 1))
    assert [row["primal_step"] for row in rows] == list(range(2, 13, 2))
    names = sweep.workspace.constraint_names
    for row in rows:
        for field in ("multipliers", "relaxations", "metrics", "metric_stderrs", "thresholds", "violations"):
            assert len(row[field]) == len(names)
        assert all(math.isfinite(v) for v in row["metrics"]) and row["grad_norm"] > 0 and row["objective_stderr"] > 0
        assert row["violations"] == [m - t for m, t in zip(row["metrics"], row["thresholds"], strict=True)]
    assert result["multipliers"] == dict(zip(names, rows[-1]["multipliers"], strict=True))
    for key in ("multipliers", "metrics"):
        late = np.mean([row[key] for row in rows[-2:]], axis=0)  # the last third
        assert list(result[f"averaged_{key}"].values()) == pytest.approx(late.tolist())
    assert any(any(row["multipliers"]) for row in rows)  # the multipliers did move


class Noting(LocalDual):
    """Keeps every measurement as it was reported."""

    def __init__(self) -> None:
        super().__init__()
        self.measurements = []

    def report(self, trial_id, attempt, dual_step, measurement):
        self.measurements.append(measurement)
        return super().report(trial_id, attempt, dual_step, measurement)


def test_a_share_pools_the_samples_of_the_last_dual_steps(sweeps):
    sweep, dual = sweeps("mixture"), Noting()
    sweep.run(sweep.fresh("pooled"), dual)
    # 24 samples a dual step, a window of two.
    assert [m["counts"] for m in dual.measurements] == [[24, 24]] + [[48, 48]] * (DUAL_STEPS - 1)


def test_a_loss_is_measured_on_the_primal_steps_since_the_last_dual_step(sweeps):
    sweep, dual = sweeps("losses"), Noting()
    sweep.run(sweep.fresh("since"), dual)
    assert [m["counts"] for m in dual.measurements] == [[16, 16]] * DUAL_STEPS  # two steps of 8 samples


def test_a_factor_is_of_the_pretrained_models_own_loss(calm):
    sweep, assignment, dual, _ = calm("losses")
    losses = sweep.base_result["calibration"]["metrics"]
    expected = [0.9 * losses[name] for name in sweep.workspace.constraint_names]
    assert dual.trace(assignment.trial_id)[0]["thresholds"] == pytest.approx(expected)


class Late(LocalDual):
    """Gives an answer out only when it is waited for, and notes when that was."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[tuple[str, int]] = []

    def submit(self, trial_id, attempt, dual_step, measurement):
        self.events.append(("sent", dual_step))
        answer = super().submit(trial_id, attempt, dual_step, measurement)

        def waited():
            self.events.append(("waited for", dual_step))
            return answer()

        return waited


def test_batches_drawn_ahead_resume_to_the_bit_and_their_thread_ends_with_the_trial(sweeps, calm, monkeypatch):
    """Drawn in time is what the calm run does; the interrupted one has drawn a batch that it never took."""
    sweep, assignment, undisturbed, result = calm("mixture")
    started = []

    def ahead(*arguments, **given):
        started.append(BatchLoader(*arguments, **given, ahead=True))
        return started[-1]

    monkeypatch.setattr(loop, "BatchLoader", ahead)
    broken, dual = sweep.fresh("ahead"), Directing("interrupt", at=3)
    assert sweep.run(broken, dual) is None
    resumed = sweep.run(replace(broken, attempt=2), dual)
    assert len(started) == 2 and not [t for t in threading.enumerate() if t.name.startswith("batches")]
    assert timeless(resumed) == timeless(result)
    assert weights_of(broken) == weights_of(assignment)
    assert comparable(dual.trace("ahead")) == comparable(undisturbed.trace(assignment.trial_id))


def test_a_batch_in_parts_is_the_same_trial_up_to_the_order_of_sums(sweeps, calm, monkeypatch):
    sweep, _, undisturbed, _ = calm("losses")
    monkeypatch.setitem(sweep.workspace.config["primal"], "gradient_accumulation_steps", 2)
    counts, taken = [], loop.primal_step

    def primal_step(train, method, batch, multipliers, *, further, **given):
        counts.append([part.counts for part in (batch, *further)])
        return taken(train, method, batch, multipliers, further=further, **given)

    monkeypatch.setattr(loop, "primal_step", primal_step)
    dual = LocalDual()
    sweep.run(sweep.fresh("parts"), dual)
    assert counts == [[(8, 4, 4)] * 2] * 2 * DUAL_STEPS  # two shards of 16 + 8 + 8 samples
    for mine, whole in zip(dual.trace("parts"), undisturbed.trace("calm"), strict=True):
        assert mine["multipliers"] == pytest.approx(whole["multipliers"], rel=1e-4, abs=1e-6)
        assert mine["grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-3)


@pytest.mark.parametrize("mode", ["alternating", "pipelined"])
def test_primal_steps_use_the_answer_that_the_mode_says(mode, sweeps, monkeypatch):
    """alternating: this dual step's own. pipelined: the one's before it, while this one is under way."""
    sweep, used, dual = sweeps("losses"), [], Late()
    monkeypatch.setitem(sweep.workspace.config["dual"], "mode", mode)
    taken = loop.primal_step

    def primal_step(train, method, batch, multipliers, **given):
        used.append(tuple(multipliers.tolist()))
        dual.events.append(("primal", train.primal_step + 1))
        return taken(train, method, batch, multipliers, **given)

    monkeypatch.setattr(loop, "primal_step", primal_step)
    sweep.run(sweep.fresh(f"mode-{mode}"), dual)
    rows, trail = dual.trace(f"mode-{mode}"), int(mode == "pipelined")
    start = (0.0,) * len(sweep.workspace.constraint_names)
    answers = [start] * (1 + trail) + [tuple(np.float32(row["multipliers"]).tolist()) for row in rows]
    assert len(set(answers)) >= DUAL_STEPS
    assert used == [answers[step // 2] for step in range(2 * DUAL_STEPS)]
    for number, row in enumerate(rows):
        terms = [m * v for m, v in zip(answers[number], row["violations"], strict=True)]
        assert row["lag"] == trail
        assert row["lagrangian"] == pytest.approx(row["objective"] + sum(terms), rel=1e-6)
    # A checkpoint, here every second dual step, needs that step's answer; the others wait for the next report.
    first = [("sent", 1), ("primal", 3), ("primal", 4), ("waited for", 1), ("sent", 2), ("waited for", 2)]
    then = [("primal", 5), ("primal", 6), ("sent", 3), ("primal", 7), ("primal", 8), ("waited for", 3), ("sent", 4)]
    assert dual.events[2:15] == first + then if trail else {kind for kind, _ in dual.events} == {"primal"}


def test_a_refusal_that_comes_late_names_its_own_dual_step(sweeps, monkeypatch):
    sweep = sweeps("losses")
    monkeypatch.setitem(sweep.workspace.config["dual"], "mode", "pipelined")

    class Refusing(LocalDual):
        def report(self, trial_id, attempt, dual_step, measurement):
            if dual_step == 3:
                measurement = measurement | {"metrics": [math.nan] * len(measurement["metrics"])}
            return super().report(trial_id, attempt, dual_step, measurement)

    with pytest.raises(NonFiniteError, match="measured at dual step 3 after the primal steps 5 to 6 "):
        sweep.run(sweep.fresh("refused"), Refusing())


def test_multipliers_reach_the_model(sweeps):
    """Fixed weights of 0 are the unconstrained run; a weight moves the model elsewhere, and it is the weight that does."""
    sweep = sweeps("mixture")
    found = {}
    for trial_id, kind, weight in (
        ("none", "unconstrained", None),
        ("zero", "fixed_weights", 0.0),
        ("three", "fixed_weights", 3.0),
    ):
        assignment = sweep.fresh(trial_id, kind, fixed_weight=weight)
        found[trial_id] = sweep.run(assignment, LocalDual()), weights_of(assignment)
    none, zero, three = (found[key][1] for key in ("none", "zero", "three"))
    assert none.keys() == zero.keys()
    worst = max(
        float(np.abs(np.frombuffer(none[k], np.float32) - np.frombuffer(zero[k], np.float32)).max()) for k in none
    )
    moved = max(
        float(np.abs(np.frombuffer(none[k], np.float32) - np.frombuffer(three[k], np.float32)).max()) for k in none
    )
    # Another batch shape rounds differently: 1e-7 a step, which AdamW may amplify where gradients are tiny.
    assert worst < 1e-4 < 1e-3 < moved


def test_a_trial_does_not_depend_on_what_its_worker_ran_before(calm):
    sweep, _, dual, result = calm("mixture")
    again, second = sweep.fresh("again"), LocalDual()
    other = sweep.run(again, second, make_workspace("mixture"))
    assert comparable(second.trace("again")) == comparable(dual.trace("calm"))
    assert timeless(other) == timeless(result)


# -- interruption, resumption, attempts --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, at, remembers",
    [
        (name, at, True)
        for name, at in (("mixture", 1), ("mixture", 3), ("mixture", DUAL_STEPS), ("digits", 3), ("losses", 3))
    ]
    + [("mixture", 3, False), ("losses", 2, False)],
)
def test_an_interrupted_trial_resumes_to_the_same_bits(calm, name, at, remembers):
    """`remembers`: the dual side lived through it; else its rows are lost, and a checkpoint beyond them counts for nothing."""
    sweep, calm_assignment, calm_dual, calm_result = calm(name)
    assignment, dual = sweep.fresh(f"interrupted-{at}"), Directing("interrupt", at)
    assert sweep.run(assignment, dual) is None
    assert not model_folder(assignment).exists()
    rows_before = dual.trace(assignment.trial_id)
    assert len(rows_before) == at
    second = dual if remembers else LocalDual()
    dual.at = None
    again = replace(assignment, attempt=2, known_steps=len(second.trace(assignment.trial_id)))
    result = sweep.run(again, second, make_workspace(name) if name == "mixture" else None)
    rows, kept = second.trace(assignment.trial_id), at if remembers else 0
    assert [row["attempt"] for row in rows] == [1] * kept + [2] * (DUAL_STEPS - kept)
    assert second.ledger.book(assignment.trial_id).superseded_rows == 0
    notes = second.ledger.book(assignment.trial_id).notes
    assert not notes if remembers else "knows 0 dual steps and none beyond; removed, and begun again" in notes[0]
    assert comparable(rows) == comparable(calm_dual.trace("calm"))
    assert weights_of(assignment) == weights_of(calm_assignment)
    assert {k: v for k, v in timeless(result).items() if k != "averaged_multipliers"} == {
        k: v for k, v in timeless(calm_result).items() if k != "averaged_multipliers"
    }
    assert result["averaged_multipliers"] == calm_result["averaged_multipliers"]


def test_every_rank_goes_on_from_the_checkpoint_that_rank_0_chose(calm, monkeypatch):
    """Rank 1 sees a newer one, which rank 0 did not."""
    sweep, assignment, _, _ = calm("mixture")
    restored, told = [], [(Path(assignment.trial_dir) / "checkpoints" / "step-000004", []), "a reply"]

    class SecondOfTwo(Workspace):
        rank, world_size = 1, 2

    class Restoring:
        def restore(self, folder, *, fingerprint):
            restored.append(folder)

    monkeypatch.setattr(loop, "broadcast_object_list", lambda answer, from_process: answer.__setitem__(0, told.pop(0)))
    workspace = SecondOfTwo(sweep.workspace.config, SweepConfig.from_dict(MIXTURE).data)
    trial = loop._Trial(workspace, replace(assignment, kind="unconstrained", attempt=2), LocalDual())
    assert trial._begin(Restoring(), None) == "a reply"
    assert [folder.name for folder in restored] == ["step-000004"]


class Crashing(LocalDual):
    """The process dies while it waits for the answer to a report that was already booked."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at = at

    def report(self, trial_id, attempt, dual_step, measurement):
        reply = super().report(trial_id, attempt, dual_step, measurement)
        if dual_step == self.at:
            self.at = None
            raise ConnectionError("gone")
        return reply


def test_a_second_attempt_rewinds_to_the_last_checkpoint_and_repeats_the_same_rows(calm):
    sweep, calm_assignment, calm_dual, _ = calm("mixture")
    assignment, dual = sweep.fresh("crashed"), Crashing(5)
    with pytest.raises(ConnectionError):
        sweep.run(assignment, dual)
    assert len(dual.trace("crashed")) == 5
    # Checkpoints were taken at dual steps 2 and 4; the row of step 5 is superseded.
    result = sweep.run(replace(assignment, attempt=2), dual, make_workspace("mixture"))
    rows = dual.trace("crashed")
    assert [row["attempt"] for row in rows] == [1, 1, 1, 1, 2, 2]
    assert comparable(rows) == comparable(calm_dual.trace("calm"))
    assert weights_of(assignment) == weights_of(calm_assignment)
    assert result["status"] == "completed" and dual.ledger.book("crashed").superseded_rows == 1
    with pytest.raises(StaleAttemptError):
        sweep.run(assignment, dual)  # the first attempt's worker comes back to life


def test_a_damaged_newest_checkpoint_costs_its_steps_and_no_more(calm):
    sweep, calm_assignment, calm_dual, _ = calm("mixture")
    assignment, dual = sweep.fresh("damaged"), Crashing(5)
    with pytest.raises(ConnectionError):
        sweep.run(assignment, dual)
    folder = model_folder(assignment).parent
    assert sorted(entry.name for entry in (folder / "checkpoints").iterdir()) == ["step-000002", "step-000004"]
    (folder / "checkpoints" / "step-000004" / "tensors.safetensors").write_bytes(b"")
    assert sweep.run(replace(assignment, attempt=2), dual)["status"] == "completed"
    assert [row["attempt"] for row in dual.trace("damaged")] == [1, 1, 2, 2, 2, 2]
    assert comparable(dual.trace("damaged")) == comparable(calm_dual.trace("calm"))
    assert weights_of(assignment) == weights_of(calm_assignment)


def test_a_trial_without_any_whole_checkpoint_left_is_refused_by_name(calm):
    sweep, *_ = calm("mixture")
    assignment, dual = sweep.fresh("hopeless"), Crashing(5)
    with pytest.raises(ConnectionError):
        sweep.run(assignment, dual)
    for path in (model_folder(assignment).parent / "checkpoints").rglob("state.json"):
        path.write_text("{", encoding="utf-8")
    with pytest.raises(CheckpointError, match="step-000004"):
        sweep.run(replace(assignment, attempt=2), dual)


def test_a_checkpoint_of_other_thresholds_is_refused(calm):
    sweep, *_ = calm("mixture")
    assignment, dual = sweep.fresh("moved"), Directing("interrupt", 2)
    sweep.run(assignment, dual)
    other = replace(assignment, thresholds={name: 0.2 for name in assignment.thresholds}, attempt=2)
    with pytest.raises(CheckpointError, match="another configuration"):
        sweep.run(other, dual)


def test_at_most_two_checkpoints_are_kept(calm):
    _, assignment, dual, _ = calm("mixture")
    folder = model_folder(assignment).parent / "checkpoints"
    assert sorted(entry.name for entry in folder.iterdir()) == ["step-000004", "step-000006"]
    assert dual.ledger.book("calm").checkpoint_step == 6


def test_an_interrupted_base_run_resumes_to_the_same_bits(sweeps, tmp_path):
    sweep = sweeps("mixture")
    assignment = sweep.assignment("base", base_dir=str(tmp_path / "base"))
    dual = Directing("interrupt", 2)
    assert sweep.run(assignment, dual) is None
    assert not (tmp_path / "base" / "base.json").exists()
    result = sweep.run(replace(assignment, attempt=2), dual, make_workspace("mixture"))
    assert result["calibration"] == sweep.base_result["calibration"]
    assert not (Path(assignment.trial_dir) / "checkpoints").exists()


def test_a_sweep_that_shares_a_pretrained_model_does_not_meet_the_checkpoints_of_another(tmp_path):
    """One is interrupted while it pretrains; the other differs in what the pretrained model does not depend on."""
    changed = MIXTURE | {"dual": MIXTURE["dual"] | {"step_size": 0.02}}
    results = []
    for name, values, dual in (("first", MIXTURE, Directing("interrupt", 2)), ("second", changed, LocalDual())):
        config = SweepConfig.from_dict(values)
        base = Assignment(
            trial_id="pretrained",
            label="",
            kind="base",
            attempt=1,
            thresholds={},
            fixed_weight=None,
            trial_dir=str(tmp_path / name / "pretrained"),
            base_dir=str(tmp_path / "bases" / config.base_key()),
        )
        results.append(run_trial(Workspace(config.to_dict(), config.data), base, dual))
    assert results[0] is None and results[1]["status"] == "completed"
    assert len(list((tmp_path / "bases").glob("*/base.json"))) == 1
    assert (tmp_path / "first" / "pretrained" / "checkpoints" / "step-000002").is_dir()


def test_files_that_a_power_cut_emptied_are_named_or_made_again(sweeps, tmp_path):
    sweep = sweeps("mixture")
    base = shutil.copytree(sweep.folder / "base", tmp_path / "base")
    (calibration,) = base.glob("calibration-*.json")
    calibration.write_bytes(b"")
    workspace = make_workspace("mixture")
    workspace.load_base(base)
    assert workspace.calibration == sweep.base_result["calibration"]
    before = set(base.glob("errors-*.json"))
    measured = workspace.base_errors(3)
    (errors,) = set(base.glob("errors-*.json")) - before
    kept = errors.stat().st_mtime_ns
    again = make_workspace("mixture")
    again.load_base(base)
    assert np.array_equal(again.base_errors(3), measured) and errors.stat().st_mtime_ns == kept
    errors.write_bytes(b"")
    again = make_workspace("mixture")
    again.load_base(base)
    assert np.array_equal(again.base_errors(3), measured)
    (base / "base.json").write_bytes(b"")
    with pytest.raises(ValueError, match=r"base\.json: damaged .* remove the folder"):
        make_workspace("mixture").load_base(base)


def test_of_two_sweeps_that_pretrain_at_once_the_first_ones_model_stays(sweeps, tmp_path):
    data, folder, store = sweeps("mixture").workspace.fingerprint, tmp_path / "bases" / "key", Store(tmp_path)

    def saving(text: str, meanwhile=lambda: None):
        def save(part: Path) -> None:
            part.mkdir(parents=True)
            (part / "weights").write_text(text, encoding="utf-8")
            meanwhile()

        return save

    folder.mkdir(parents=True)
    (folder / "half").touch()  # what an older version's killed process left
    first = saving("first")
    publish_base(folder, saving("second", lambda: publish_base(folder, first, data, store)), data, store)
    publish_base(folder, saving("third"), data, store)
    assert (folder / "model" / "weights").read_text(encoding="utf-8") == "first"
    assert sorted(path.name for path in folder.iterdir()) == ["base.json", "model"]
    assert list(folder.parent.iterdir()) == [folder]


@pytest.mark.parametrize("kind", ["constrained", "unconstrained"])
def test_a_stopped_trial_ends_there_without_an_evaluation(sweeps, kind):
    sweep, dual = sweeps("mixture"), Directing("stop", 3)
    assignment = sweep.fresh(f"stopped-{kind}", kind)
    result = sweep.run(assignment, dual)
    assert (result["status"], result["dual_steps"], result["primal_steps"]) == ("stopped", 3, 6)
    assert result["objective"] is None and result["certificate"] is None and result["histogram"] is None
    assert result["constraints"] == []
    assert len(dual.trace(assignment.trial_id)) == 3
    assert not model_folder(assignment).exists()


# -- what may go wrong -------------------------------------------------------------------------------------------------


def test_a_diverging_trial_names_its_step_writes_no_more_than_that_and_spoils_no_later_one(calm):
    sweep, _, calm_dual, calm_result = calm("mixture")
    assignment, dual = sweep.fresh("diverging"), LocalDual()
    clean = sweep.workspace.tensors["main"].clone()
    try:
        sweep.workspace.tensors["main"][:] = math.nan
        with pytest.raises(NonFiniteError, match="at primal step 1 "):
            sweep.run(assignment, dual)
    finally:
        sweep.workspace.tensors["main"][:] = clean
    assert dual.trace("diverging") == []
    assert [path.name for path in model_folder(assignment).parent.iterdir()] == ["bad_numbers-1.json"]
    after, second = sweep.fresh("after"), LocalDual()
    assert timeless(sweep.run(after, second)) == timeless(calm_result)
    assert comparable(second.trace("after")) == comparable(calm_dual.trace("calm"))


def test_fixed_weights_run_also_where_every_class_has_a_constraint(tmp_path):
    """Then the shares of the data, which fixed weights are measured against, sum to one."""
    values = MIXTURE | {"data": MIXTURE["data"] | {"minority": {"classes": [0, 1, 2]}}}
    config = SweepConfig.from_dict(values)
    workspace = Workspace(config.to_dict(), config.data)
    common = {
        "label": "",
        "attempt": 1,
        "thresholds": {},
        "trial_dir": str(tmp_path / "trial"),
        "base_dir": str(tmp_path / "base"),
    }
    run_trial(workspace, Assignment(trial_id="base", kind="base", fixed_weight=None, **common), LocalDual())
    result = run_trial(
        workspace, Assignment(trial_id="fixed", kind="fixed_weights", fixed_weight=0.3, **common), LocalDual()
    )
    assert result["status"] == "completed"
