"""A trial that starts from a solved neighbour, and one that ends before its last step: the same again after any restart."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file

from dualsweep.orchestration.config import SweepConfig
from dualsweep.orchestration.local_dual import LocalDual
from dualsweep.trainers import loop
from dualsweep.trainers.assignment import Assignment
from dualsweep.trainers.loop import run_trial
from dualsweep.trainers.state import CheckpointError
from dualsweep.trainers.workspace import Workspace

VALUES = {
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
    "schedule": {"num_train_timesteps": 50, "beta_end": 0.2},
    "pretrain": {"steps": 8, "batch_size": 16, "warmup_steps": 1, "num_shards": 2},
    "primal": {"steps": 40, "batch_size": 16, "constraint_batch_size": 8, "warmup_steps": 2, "num_shards": 2},
    "dual": {"rule": "ascent", "step_size": 0.05, "primal_steps_per_dual_step": 2},
    "measure": {"num_samples": 24, "num_sampling_steps": 4, "window": 2},
    "thresholds": {"unit": "share", "grid": {"minority": [0.1, 0.2]}},
    "evaluation": {"num_samples": 48, "num_sampling_steps": 4, "noise_levels": 6, "grid_samples": 9, "batch_size": 64},
    "checkpoint_every_dual_steps": 4,
}
LOOSE = {"certificate": True, "tolerance": 50.0, "drift": 50.0, "window": 16, "patience": 20}


class Directing(LocalDual):
    """Answers the report of one dual step with a directive, and keeps what an attempt began with."""

    def __init__(self, at: int = 0, directive: str = "interrupt") -> None:
        super().__init__()
        self.at, self.directive, self.starts = at, directive, []

    def begin(self, trial_id, attempt, *, start, **rest):
        self.starts.append(start)
        return super().begin(trial_id, attempt, start=start, **rest)

    def report(self, trial_id, attempt, dual_step, measurement):
        reply = super().report(trial_id, attempt, dual_step, measurement)
        return replace(reply, directive=self.directive) if dual_step == self.at else reply


class Runs:
    """A folder with a pretrained model; trials run in it with sections of the config changed."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.workspaces = folder, {}
        self.run("base", kind="base")

    def workspace(self, **sections) -> Workspace:
        key = repr(sections)
        if key not in self.workspaces:
            values = {**VALUES, **{k: {**VALUES.get(k, {}), **v} for k, v in sections.items()}}
            config = SweepConfig.from_dict(values)
            self.workspaces[key] = Workspace(config.to_dict(), config.data)
        return self.workspaces[key]

    def assignment(self, trial_id: str, kind="constrained", **changes) -> Assignment:
        names = ("component_1", "component_2")
        threshold = changes.pop("threshold", 0.2)
        given = {
            "trial_id": trial_id,
            "label": trial_id,
            "kind": kind,
            "attempt": 1,
            "thresholds": dict.fromkeys(names, threshold) if kind == "constrained" else {},
            "fixed_weight": 0.3 if kind == "fixed_weights" else None,
            "trial_dir": str(self.folder / "trials" / trial_id),
            "base_dir": str(self.folder / "base"),
        }
        return Assignment(**given | changes)

    def run(self, trial_id: str, dual=None, sections=None, **changes):
        assignment = self.assignment(trial_id, **changes)
        return run_trial(self.workspace(**(sections or {})), assignment, dual or LocalDual())

    def weights(self, trial_id: str) -> dict[str, bytes]:
        (path,) = (self.folder / "trials" / trial_id / "model").rglob("*.safetensors")
        return {name: tensor.numpy().tobytes() for name, tensor in load_file(path).items()}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    made = Runs(tmp_path_factory.mktemp("warm"))
    made.run("source")
    return made


def start_from(trial="source", values=(0.31, 0.17), steps_before=25):
    return {
        "trial": trial,
        "label": trial,
        "multipliers": dict(zip(("component_1", "component_2"), values, strict=True)),
        "steps_before": steps_before,
    }


def comparable(rows):
    return [{k: v for k, v in row.items() if k not in ("attempt", "wall_time")} for row in rows]


def test_a_warm_start_has_the_neighbours_model_and_the_given_multipliers(runs):
    still = {"primal": {"lr": 1e-30, "weight_decay": 0.0}}
    dual = Directing()
    result = runs.run("still", dual, still, start=start_from())
    assert dual.starts == [[0.31, 0.17]] and result["start"] == start_from()
    assert runs.weights("still") == runs.weights("source")
    cold = runs.run("still-cold", Directing(), still)
    assert cold["start"] is None and runs.weights("still-cold") != runs.weights("source")


def test_a_warm_start_goes_on_with_the_draws_behind_its_neighbours(runs):
    """The model stands still, so that the numbers are those of the draws alone; two primal steps are a dual step."""
    still, traces = {"primal": {"lr": 1e-30, "weight_decay": 0.0}, "measure": {"window": 1}}, {}
    for before in (0, 20, 19):
        dual, trial = LocalDual(), f"behind-{before}"
        runs.run(trial, dual, still, start=start_from(steps_before=before))
        traces[before] = [(row["objective"], row["metrics"]) for row in dual.trace(trial)]
    assert traces[20][:10] == traces[0][10:]
    metrics = {before: [metric for _, metric in trace] for before, trace in traces.items()}
    assert metrics[19] == metrics[20] and traces[19] != traces[20]  # dual steps are counted up


@pytest.mark.parametrize(
    "sweep, first, last",
    [({"warm_lr": 0.5}, 0.5, 0.5), ({"warm_lr": 0.5, "warm_steps": 10}, 0.5, 0.05), ({}, 1.0, 0.1)],
)
def test_a_warm_start_has_a_course_of_its_own_for_the_learning_rate(runs, sweep, first, last):
    """Of the 40 primal steps two warm up; the trace has the rate of the step after each dual step."""
    dual, settings = LocalDual(), {"sweep": {"order": "path", **sweep}, "stopping": {"certificate": False}}
    runs.run("course", dual, settings, start=start_from(), trial_dir=str(runs.folder / "trials" / repr(sweep)))
    rates = [row["lr"] / 1e-3 for row in dual.trace("course")]
    assert (rates[0], rates[-1]) == pytest.approx((first, last), rel=0.05)
    cold = LocalDual()
    runs.run("cold-course", cold, settings, trial_dir=str(runs.folder / "trials" / f"cold {sweep}"))
    assert cold.trace("cold-course")[0]["lr"] / 1e-3 == pytest.approx(1.0, rel=0.05)


def test_multipliers_are_matched_by_name(runs):
    dual, start = Directing(), start_from()
    start["multipliers"] = dict(reversed(start["multipliers"].items()))
    runs.run("by-name", dual, start=start)
    assert dual.starts == [[0.31, 0.17]]


def test_an_interrupted_warm_start_resumes_to_the_same_bits(runs):
    calm, dual = LocalDual(), Directing(at=7)
    result = runs.run("calm", calm, start=start_from())
    assert runs.run("resumed", dual, start=start_from()) is None
    resumed = runs.run("resumed", dual, start=start_from(), attempt=2)
    assert comparable(dual.trace("resumed")) == comparable(calm.trace("calm"))
    assert runs.weights("resumed") == runs.weights("calm")
    assert resumed["multipliers"] == result["multipliers"]


def test_a_retry_without_a_checkpoint_starts_from_the_same_again(runs):
    dual = Directing(at=7)
    assert runs.run("retried", dual, start=start_from()) is None
    before = comparable(dual.trace("retried"))
    shutil.rmtree(runs.folder / "trials" / "retried" / "checkpoints")
    dual.at = 0
    runs.run("retried", dual, start=start_from(), attempt=2)
    assert dual.starts == [[0.31, 0.17]] * 2
    assert comparable(dual.trace("retried"))[:7] == before and len(dual.trace("retried")) == 20


def test_a_checkpoint_of_another_start_is_refused(runs):
    for trial, start in (("other", start_from()), ("other-cold", None)):
        assert runs.run(trial, Directing(at=4), start=start) is None
        with pytest.raises(CheckpointError, match="belongs to another configuration"):
            runs.run(trial, start=start_from(values=(0.3, 0.3)), attempt=2)


def test_a_neighbour_without_a_model_is_replaced_by_the_pretrained_one_and_said(runs):
    still = {"primal": {"lr": 1e-30, "weight_decay": 0.0}}
    dual = Directing()
    assert runs.run("orphan", dual, still, start=start_from("nobody"))["status"] == "completed"
    assert dual.starts == [[0.31, 0.17]]  # the multipliers are in the assignment
    (note,) = dual.ledger.book("orphan").notes
    assert "begun from the pretrained model" in note and "trials/nobody/model" in note
    runs.run("no-orphan", Directing(), still)
    assert runs.weights("orphan") == runs.weights("no-orphan")


@pytest.mark.parametrize("lost", ["before", "after"])
def test_a_resume_keeps_the_course_that_a_lost_neighbour_gave_it(runs, lost):
    """Of its own where the model was gone from the start, the warm one where it went after a checkpoint."""
    settings = {"sweep": {"order": "path", "warm_lr": 0.5}, "stopping": {"certificate": False}}
    model = runs.folder / "trials" / f"source-{lost}" / "model"
    shutil.copytree(runs.folder / "trials" / "source" / "model", model)
    if lost == "before":
        shutil.rmtree(model)
    dual = Directing(at=7)
    assert runs.run(f"lost-{lost}", dual, settings, start=start_from(f"source-{lost}")) is None
    shutil.rmtree(model, ignore_errors=True)
    if lost == "before":
        shutil.copytree(runs.folder / "trials" / "source" / "model", model)
    runs.run(f"lost-{lost}", dual, settings, start=start_from(f"source-{lost}"), attempt=2)
    rates = [row["lr"] / 1e-3 for row in dual.trace(f"lost-{lost}")]
    assert (rates[0], rates[-1]) == pytest.approx((1.0, 0.1) if lost == "before" else (0.5, 0.5), rel=0.05)
    assert len(dual.ledger.book(f"lost-{lost}").notes) == (lost == "before")


def test_a_tight_certificate_ends_a_trial_and_it_is_evaluated(runs):
    dual = LocalDual()
    result = runs.run("tight", dual, {"stopping": LOOSE})
    assert (result["status"], result["stopped_by"], result["dual_steps"], result["error"]) == (
        "completed",
        "certificate",
        16,
        None,
    )
    assert result["primal_steps"] == 32 and len(dual.trace("tight")) == 16
    assert result["certificate"] and result["objective"] and "draws of their own at dual step 16" in result["reason"]
    # Averaged over the dual steps that proposed it, not over a third of so short a run.
    column = [row["multipliers"][0] for row in dual.trace("tight")]
    assert result["averaged_multipliers"]["component_1"] == pytest.approx(sum(column) / 16)
    column = [row["metrics"][0] for row in dual.trace("tight")]
    assert result["averaged_metrics"]["component_1"] == pytest.approx(sum(column) / 16)
    assert (runs.folder / "trials" / "tight" / "model").is_dir()


def test_draws_that_confirm_a_certificate_are_no_dual_steps_and_as_many_as_half_a_window_has(runs, monkeypatch):
    """9 rows' draws (half of 16 and one for the rows that share draws), apart from those of dual steps and the evaluation."""
    made = []
    own = loop._Trial._draw

    def draw(trial, counter, multipliers, shards):
        rows = own(trial, counter, multipliers, shards)
        made.append((counter, rows))
        return rows

    monkeypatch.setattr(loop._Trial, "_draw", draw)
    result = runs.run("counted", None, {"stopping": LOOSE})
    steps = [counter for counter, _ in made if counter < loop.CONFIRMATION_COUNTER]
    own_draws = [rows for counter, rows in made if counter >= loop.CONFIRMATION_COUNTER]
    assert result["dual_steps"] == 16 and steps == list(range(16))
    assert len(own_draws) == 9 and all(rows.shape == (24, 2) for rows in own_draws)
    assert len({counter for counter, _ in made}) == len(made)


def test_a_metric_of_the_primal_steps_is_confirmed_by_later_ones(runs):
    settings = {"stopping": LOOSE, "thresholds": {"unit": "loss", "grid": {"minority": [0.5]}}}
    result = runs.run("later", None, settings, threshold=0.5)
    assert (result["stopped_by"], result["dual_steps"]) == ("certificate", 17)
    assert "over dual steps 10 to 17" in result["reason"]


@pytest.mark.parametrize("mode", ["alternating", "pipelined"])
@pytest.mark.parametrize("at", [1, 6, 14])
def test_a_resumed_trial_ends_at_the_same_dual_step(runs, at, mode):
    settings = {"stopping": LOOSE, "dual": {"mode": mode}}
    at_mode, calm, dual = f"{at}-{mode}", LocalDual(), Directing(at=at)
    runs.run(f"calm-end-{at_mode}", calm, settings)
    assert runs.run(f"end-{at_mode}", dual, settings) is None
    result = runs.run(f"end-{at_mode}", dual, settings, attempt=2)
    assert (result["dual_steps"], result["stopped_by"]) == (16, "certificate")
    assert comparable(dual.trace(f"end-{at_mode}")) == comparable(calm.trace(f"calm-end-{at_mode}"))
    assert runs.weights(f"end-{at_mode}") == runs.weights(f"calm-end-{at_mode}")


def test_a_scheduler_that_wants_the_slot_gets_it_without_an_evaluation(runs):
    result = runs.run("unwanted", Directing(at=5, directive="stop"), {"stopping": LOOSE})
    assert (result["status"], result["stopped_by"], result["certificate"]) == ("stopped", "scheduler", None)


def test_thresholds_out_of_reach_end_a_trial_as_a_tagged_result(runs):
    settings = {
        "stopping": {**LOOSE, "certificate": False, "infeasible": True, "tolerance": 0.01},
        "thresholds": {"unit": "loss", "grid": {"minority": [1e-6]}},
        "primal": {"lr": 1e-6, "steps": 80, "batch_size": 128, "constraint_batch_size": 128},
    }
    result = runs.run("hopeless", None, settings, threshold=1e-6)
    assert (result["status"], result["stopped_by"], result["error"]) == ("stopped", "infeasible", None)
    assert result["dual_steps"] < 40 and "multiplier went from" in result["reason"]
    assert result["certificate"] is None and not (runs.folder / "trials" / "hopeless" / "model").exists()


@pytest.mark.parametrize("kind", ["unconstrained", "fixed_weights"])
def test_baselines_run_to_their_end(runs, kind):
    result = runs.run(f"whole-{kind}", None, {"stopping": LOOSE}, kind=kind)
    assert (result["status"], result["stopped_by"], result["dual_steps"]) == ("completed", None, 20)


@pytest.mark.parametrize(
    "sections, ends",
    [
        ({}, False),
        ({"sweep": {"order": "path"}}, True),
        ({"sweep": {"order": "path"}, "stopping": {"certificate": False}}, False),
    ],
)
def test_certificates_end_trials_in_the_orders_that_need_it_unless_told_otherwise(runs, sections, ends):
    loose = {key: value for key, value in LOOSE.items() if key != "certificate"}
    sections = {**sections, "stopping": {**loose, **sections.get("stopping", {})}}
    result = runs.run(f"default-{ends}-{len(sections['stopping'])}", None, sections)
    assert (result["stopped_by"] == "certificate") is ends
