"""A run killed at any primal step and resumed by a new process is the undisturbed run, to the last bit, for every method.

Compared are the last checkpoint (weights, EMA, optimizer, loss scale, dual state, pooled draws), the trace, and the model
and result. A resumed run shares nothing with the killed one but its folder and the journal. At another number of workers
sums are added in another order; tests/orchestration/test_on_a_cluster.py has that comparison and its tolerance.
"""

import json
import shutil
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from dualsweep.orchestration.config import SweepConfig, load_config
from dualsweep.orchestration.journal import Journal, read_journal
from dualsweep.orchestration.local_dual import LocalDual
from dualsweep.trainers import loop
from dualsweep.trainers.assignment import Assignment
from dualsweep.trainers.loop import run_trial
from dualsweep.trainers.methods import METHODS
from dualsweep.trainers.workspace import Workspace

EXAMPLES = Path(__file__).parents[2] / "examples"
PRIMAL_STEPS, INTERVAL, CHECKPOINT_EVERY = 12, 2, 2
TINY = {
    "data": {"count": 400},
    "model": {"width": 16, "depth": 1},
    "pretrain": {"steps": 20, "batch_size": 32, "warmup_steps": 2, "num_shards": 2},
    "primal": {
        "steps": PRIMAL_STEPS,
        "batch_size": 16,
        "constraint_batch_size": 16,
        "warmup_steps": 3,
        "num_shards": 2,
        "ema_decay": 0.5,
        "weight_decay": 0.01,
    },
    "dual": {"primal_steps_per_dual_step": INTERVAL},
    "measure": {"num_samples": 24, "num_sampling_steps": 4},
    "evaluation": {"num_samples": 48, "num_sampling_steps": 4, "noise_levels": 6, "batch_size": 64},
    "checkpoint_every_dual_steps": CHECKPOINT_EVERY,
}
CHAIN = {"num_sampling_steps": 6, "pool": 128}
LAW = {"levels": 6, "sampling_levels": 6, "langevin_steps": 1, "pool": 64}
DISTILLED = LAW | {"primal": "distill"}


def at(value, unit, axis="sets"):
    return {"thresholds": {"unit": unit, "list": [{axis: value}], "grid": None}}


# method or variant -> (example, what differs from it)
CASES = {
    "fairness share": ("gmm_fairness", {"measure": {"window": 3}}),
    "fairness nats": ("gmm_fairness", at(0.5, "nats", "minority")),
    "fairness loss": ("gmm_fairness", at(0.5, "loss", "minority")),
    "adaptation": ("gmm_adaptation", {"formulation": {"pool": 64, "levels": 6}}),
    "adaptation loss": ("gmm_adaptation", {"formulation": {"pool": 64, "inputs": "noise"}} | at(0.1, "loss")),
    "alignment policy": ("gmm_alignment", {"formulation": CHAIN}),
    "alignment backpropagation": ("gmm_alignment", {"formulation": CHAIN | {"gradient": "backpropagation"}}),
    "composition and": ("gmm_composition_and", {"formulation": LAW}),
    "composition and distilled": ("gmm_composition_and", {"formulation": DISTILLED}),
    "composition or": ("gmm_composition_or", {"formulation": LAW}),
    "unlearn_reverse_kl": ("gmm_unlearn_reverse_kl", {"formulation": LAW}),
    "unlearn_reverse_kl distilled": ("gmm_unlearn_reverse_kl", {"formulation": DISTILLED}),
    "unlearn_forward_kl": ("gmm_unlearn_forward_kl", {"measure": {"window": 2}}),
    "unlearn_forward_kl gradient_norm": (
        "gmm_unlearn_forward_kl",
        {"formulation": {"gradient_norm": 0.1}} | at(0.5, "loss"),
    ),
    "unlearn_likelihood": ("gmm_unlearn_likelihood", {"formulation": CHAIN | {"levels": 6}}),
    "duo": ("gmm_duo", {"formulation": {"levels": 4}}),
    "duo loss": ("gmm_duo", {"formulation": {"levels": None}, "baselines": {"fixed_weights": []}} | at(0.1, "loss")),
    "esd samples": ("gmm_esd", {"formulation": {"pool": 64, "levels": 6}}),
    "esd trajectory": ("gmm_esd", {"formulation": {"inputs": "trajectory", "num_sampling_steps": 5, "levels": 6}}),
    "siss": (
        "gmm_unlearn_forward_kl",
        {"method": "siss", "formulation": {"gradient_norm": 0.1}, "dual": {"rule": "fixed", "start": 1.0}}
        | at(0.5, "loss"),
    ),
    "bf16 autocast": ("gmm_fairness", {"primal": {"precision": "bf16"}}),
    "nupi": (
        "gmm_fairness",
        {"dual": {"rule": "nupi", "step_size": 0.05, "proportional_gain": 0.1, "nu": 0.5, "smoothing": 0.5}},
    ),
    # Samples far from 0 have gradients that overflow at the scale given below.
    "fp16 scaler": ("gmm_fairness", {"data": {"means": [[-90.0, 0.0], [90.0, 0.0], [0.0, 90.0], [0.0, -90.0]]}}),
}


class Killed(BaseException):
    """No handler of the program's sees it, as none sees SIGKILL."""


class JournalledDual(LocalDual):
    """A DualServer that dies with the run: what the journal had is all that the next one knows."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.journal = Journal(path)
        for record in self.journal.records:
            self.ledger.apply(record)

    def _perform(self, records):
        super()._perform(records)
        self.journal.append(records)


def config_of(case: str, mode: str = "alternating") -> SweepConfig:
    example, changes = CASES[case]
    values = load_config(EXAMPLES / f"{example}.yaml", environment=False).to_dict()
    for section, fields in [*TINY.items(), *changes.items()]:
        values[section] = {**values[section], **fields} if isinstance(fields, dict) else fields
    if values["dual"]["rule"] == "fixed":
        values["dual"] = {key: values["dual"][key] for key in ("rule", "start", "primal_steps_per_dual_step")}
    values["dual"]["mode"] = mode
    return SweepConfig.from_dict(values)


def new_workspace(case: str, mode: str) -> Workspace:
    """As a new process would have it: Accelerate keeps one state a process, with the precision of the first."""
    AcceleratorState._reset_state(reset_partial_state=True)
    config = config_of(case, mode)
    workspace = Workspace(config.to_dict(), config.data)
    if case == "fp16 scaler":
        # The CPU's arithmetic stays float32, so the scale has to be huge to overflow. It grows every second step, steps are
        # skipped now and then, and a scale lost in a resume would skip others.
        workspace.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, growth_interval=2)
    return workspace


@contextmanager
def killed_at(step: int, before: bool):
    """Die at this primal step, just before it or when it has moved the weights."""
    taken = loop.primal_step

    def primal_step(train, *arguments, **given):
        if before and train.primal_step + 1 == step:
            raise Killed
        norm = taken(train, *arguments, **given)
        if train.primal_step == step:
            raise Killed
        return norm

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "primal_step", primal_step)
        yield


class DyingDual(JournalledDual):
    """Dies in a report, when it is booked but not answered: the moment a run without primal steps can be killed at."""

    dies_at: int

    def report(self, trial_id, attempt, dual_step, measurement):
        reply = super().report(trial_id, attempt, dual_step, measurement)
        if dual_step == self.dies_at:
            raise Killed
        return reply


def left_behind(assignment: Assignment, dual: LocalDual, result: dict) -> dict:
    """Everything a run leaves that does not tell the time."""
    folder = Path(assignment.trial_dir)
    newest = max((folder / "checkpoints").glob("step-??????"))
    rows = [{k: v for k, v in row.items() if k not in ("attempt", "wall_time")} for row in dual.trace("trial")]
    files = {str(p.relative_to(folder)): p for p in folder.glob("model/**/*") if p.is_file()}
    weights = {name: p for name, p in files.items() if p.suffix == ".safetensors"}
    assert weights and len(rows) == PRIMAL_STEPS // INTERVAL
    return {
        "rows": rows,
        "checkpoint": {k: t.numpy().tobytes() for k, t in load_file(newest / "tensors.safetensors").items()},
        "state": json.loads((newest / "state.json").read_text(encoding="utf-8")),
        "model": {f"{n} {k}": t.numpy().tobytes() for n, p in weights.items() for k, t in load_file(p).items()},
        "result": {k: v for k, v in result.items() if k not in ("wall_seconds", "startup_seconds")},
    }


# Pipelined in every run of the tests where the metric is measured in another way, or nothing but multipliers moves.
PIPELINED = ("fairness share", "fairness loss", "unlearn_reverse_kl", "nupi")


@pytest.mark.parametrize(
    ("case", "mode"),
    [(case, "alternating") for case in CASES]
    + [pytest.param(case, "pipelined", marks=() if case in PIPELINED else pytest.mark.heavy) for case in CASES],
)
def test_a_run_killed_at_any_step_resumes_to_the_same_bits(case, mode, moment, tmp_path):
    config = config_of(case, mode)
    workspace = new_workspace(case, mode)
    point = config.thresholds.form["list"][0] if "list" in config.thresholds.form else {}
    names = workspace.constraint_names
    asked = {name: point.get(name, next(iter(point.values()), 0.2)) for name in names}
    calm = Assignment(
        trial_id="trial",
        label="trial",
        kind="constrained",
        attempt=1,
        thresholds=asked,
        fixed_weight=None,
        trial_dir=str(tmp_path / "calm"),
        base_dir=str(tmp_path / "base"),
    )
    run_trial(workspace, replace(calm, trial_id="base", kind="base", thresholds={}), LocalDual())
    dual = LocalDual()
    undisturbed = left_behind(calm, dual, run_trial(new_workspace(case, mode), calm, dual))

    killed = replace(calm, trial_dir=str(tmp_path / "killed"))
    step, before = moment.randint(1, PRIMAL_STEPS), moment.random() < 0.5
    print(f"{case}: killed at primal step {step}, {'before' if before else 'after'} it moved the weights")
    dying = DyingDual(tmp_path / "journal.jsonl")
    trains = METHODS[config.method](workspace.setting(names, config.to_dict()["primal"])).trains
    dying.dies_at = 0 if trains else -(-step // INTERVAL)
    with killed_at(step, before), pytest.raises(Killed):
        run_trial(new_workspace(case, mode), killed, dying)
    dying.journal.close()
    checkpoints = [int(path.name[5:]) for path in (tmp_path / "killed" / "checkpoints").glob("step-??????")]

    survivor = JournalledDual(tmp_path / "journal.jsonl")
    result = run_trial(new_workspace(case, mode), replace(killed, attempt=2), survivor)
    resumed = left_behind(killed, survivor, result)
    begins = [record for record in read_journal(tmp_path / "journal.jsonl") if record["kind"] == "begin"]
    # From its checkpoint, not from the start: that would give the same bits and say nothing.
    assert [record["state"]["step"] for record in begins] == [0, max(checkpoints, default=0)]
    assert checkpoints or step <= INTERVAL * CHECKPOINT_EVERY
    assert {row["lag"] for row in undisturbed["rows"]} == {int(mode == "pipelined")}
    for part, value in undisturbed.items():
        assert resumed[part] == value, part
    if case == "fp16 scaler":
        assert undisturbed["state"]["scaler"]["scale"] < 2.0**127  # steps were skipped
    shutil.rmtree(tmp_path)


def test_every_method_is_among_the_cases():
    assert {config_of(case).method for case in CASES} == set(METHODS) - {"pretraining"}
