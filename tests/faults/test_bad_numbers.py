"""NaN and infinity in a real run, at a random moment: nothing moves by them, the trial retries, then fails by name.

`serve` trains against the DualServer itself; the last tests put two workers of Ray Train between them, of which one
alone meets the bad number.
"""

import asyncio
import json
import math
import sys
import threading
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from dualsweep.constraints import NonFiniteError
from dualsweep.orchestration.config import SweepConfig
from dualsweep.orchestration.dual_ledger import FINAL, DualLedger
from dualsweep.orchestration.dual_server import DualServer, RayDual
from dualsweep.orchestration.journal import read_journal
from dualsweep.trainers import loop
from dualsweep.trainers.assignment import Assignment
from dualsweep.trainers.methods import METHODS, alignment
from dualsweep.trainers.worker import serve
from dualsweep.trainers.workspace import Workspace

PRIMAL_STEPS, INTERVAL, BATCH, CHECKPOINT_EVERY = 12, 2, 16, 2
MAX_FAILURES = 2  # compute.max_failures unless a test says else
VALUES = {
    "name": "faults",
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
    "primal": {
        "steps": PRIMAL_STEPS,
        "batch_size": BATCH,
        "constraint_batch_size": 8,
        "warmup_steps": 2,
        "num_shards": 2,
        "ema_decay": 0.5,
    },
    "dual": {"rule": "ascent", "step_size": 0.05, "primal_steps_per_dual_step": INTERVAL},
    "measure": {"num_samples": 24, "num_sampling_steps": 4},
    "evaluation": {"num_samples": 48, "num_sampling_steps": 4, "noise_levels": 6, "grid_samples": 9},
    "thresholds": {"unit": "share", "grid": {"minority": [0.3]}},
    "checkpoint_every_dual_steps": CHECKPOINT_EVERY,
}
REWARDS = {
    "method": "alignment",
    "formulation": {
        "rewards": {"right": {"kind": "linear", "direction": [1.0, 0.0]}},
        "num_sampling_steps": 6,
        "pool": 128,
    },
    "thresholds": {"unit": "reward", "grid": {"rewards": [0.3]}},
}
THRESHOLDS = {"fairness": {"component_1": 0.3, "component_2": 0.3}, "alignment": {"right": 0.3}}


def config_of(**changes) -> SweepConfig:
    values = {key: dict(value) if isinstance(value, dict) else value for key, value in VALUES.items()}
    for section, fields in changes.items():
        merge = isinstance(fields, dict) and section != "thresholds"
        values[section] = {**values.get(section, {}), **fields} if merge else fields
    return SweepConfig.from_dict(values)


class InThread(RayDual):
    """The DualServer in a thread of this process instead of an actor: the same calls, the same journal."""

    def __init__(self, folder: Path) -> None:
        self.server, self._loop = DualServer(str(folder), ""), asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()

    def call(self, method, *args, timeout_s=60.0):
        return asyncio.run_coroutine_threadsafe(getattr(self.server, method)(*args), self._loop).result(timeout_s)

    def submit(self, trial_id, attempt, dual_step, measurement):
        answer = self.server.report(trial_id, attempt, dual_step, measurement)
        return partial(asyncio.run_coroutine_threadsafe(answer, self._loop).result, 60.0)

    def lease(self, slot, finished, workers=1):
        return self.call("lease", slot, finished, workers, timeout_s=600)


def assignment_of(folder: Path, config: SweepConfig, trial_id: str, kind: str = "constrained") -> dict:
    return Assignment(
        trial_id=trial_id,
        label=trial_id,
        kind=kind,
        attempt=0,
        thresholds=THRESHOLDS[config.method] if kind == "constrained" else {},
        fixed_weight=None,
        trial_dir=str(folder / "trials" / trial_id),
        base_dir=str(folder / "base"),
    ).to_dict()


def hand_out(server: RayDual, folder: Path, config: SweepConfig, trials: list[str], *, limit_s: float) -> None:
    """One trial after the other, as Tune hands them out; the first is the pretraining. Then the slot is closed."""
    deadline = time.monotonic() + limit_s
    for trial_id in ["pretrained", *trials]:
        kind = "base" if trial_id == "pretrained" else "constrained"
        server.call("assign", "slot", assignment_of(folder, config, trial_id, kind), config.compute.max_failures)
        while server.call("progress", trial_id, 0, 10**6, 5.0)["status"] not in FINAL:
            assert time.monotonic() < deadline, f"{trial_id} did not end in {limit_s} s"
    server.call("assign", "slot", None)


def run_trials(folder: Path, config: SweepConfig, trials: list[str]) -> DualLedger:
    """The books after these trials were trained in this process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    server = InThread(folder)
    worker = threading.Thread(
        target=serve, args=(server, "slot", config.to_dict(), config.data), kwargs={"num_threads": 1}, daemon=True
    )
    worker.start()
    hand_out(server, folder, config, trials, limit_s=60)
    worker.join(30)
    assert not worker.is_alive()
    return server.server.ledger


def begins(folder: Path, trial_id: str) -> list[int]:
    """The dual step that each attempt of a trial began from."""
    records = read_journal(folder / "journal.jsonl")
    return [r["state"]["step"] for r in records if r["kind"] == "begin" and r["trial"] == trial_id]


def last_checkpoint(step: int) -> int:
    """The dual step of the newest checkpoint when a primal step meets a bad number; 0 if there is none."""
    done = (step - 1) // INTERVAL
    return done - done % CHECKPOINT_EVERY


def outcome(ledger: DualLedger, folder: Path, trial_id: str) -> tuple[list[dict], dict[str, bytes]]:
    """Rows and weights of a trial, without what tells the time."""
    rows = [{k: v for k, v in row.items() if k not in ("attempt", "wall_time")} for row in ledger.book(trial_id).rows]
    (path,) = (folder / "trials" / trial_id / "model").rglob("*.safetensors")
    return rows, {name: tensor.numpy().tobytes() for name, tensor in load_file(path).items()}


class Fault:
    """Strikes `times` times at one step of the trials (never of the pretraining)."""

    def __init__(self, kind: str, step: int, times: int, value: float) -> None:
        self.kind, self.step, self.left, self.value = kind, step, times, value
        self.armed = False

    def strikes(self, step: int) -> bool:
        due = self.left > 0 and step == self.step
        self.left -= due
        return due

    @contextmanager
    def installed(self):
        """Real code, with one number of it spoilt."""
        taken, measure, make_reward = loop.primal_step, METHODS["fairness"].measure, alignment.make_reward

        def primal_step(train, method, batch, *arguments, **given):
            if (
                method.name not in METHODS
                or self.kind in ("violation", "pool")
                or not self.strikes(train.primal_step + 1)
            ):
                return taken(train, method, batch, *arguments, **given)
            hook = None
            if self.kind == "sample":
                batch.x_0[3, 1] = self.value
            elif self.kind == "gradient":
                hook = next(train.denoiser.parameters()).register_hook(lambda gradient: gradient * self.value)
            self.armed = True
            try:
                return taken(train, method, batch, *arguments, **given)
            finally:
                self.armed = False
                if hook is not None:
                    hook.remove()

        def spoilt_measure(method, *arguments, counter, **given):
            draws = measure(method, *arguments, counter=counter, **given)
            if self.kind == "violation" and draws is not None and self.strikes((counter + 1) * INTERVAL):
                draws.rows[0, 0] = self.value
            return draws

        def spoilt_reward(*arguments, **given):
            reward = make_reward(*arguments, **given)

            def judged(samples):
                found = reward(samples)
                due = self.armed and len(found) == BATCH  # not the pool of the pretrained model's
                if self.kind == "pool" and len(found) > BATCH:
                    due, self.left = self.left > 0, self.left - 1
                return found.index_fill(0, torch.tensor([5]), self.value) if due else found

            return judged

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loop, "primal_step", primal_step)
            patch.setattr(METHODS["fairness"], "measure", spoilt_measure)
            patch.setattr(alignment, "make_reward", spoilt_reward)
            yield self


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Rows and weights of a calm run of each method."""
    made = {}

    def get(method: str):
        if method not in made:
            folder = tmp_path_factory.mktemp(method)
            config = config_of(**(REWARDS if method == "alignment" else {}))
            made[method] = outcome(run_trials(folder, config, ["calm"]), folder, "calm")
        return made[method]

    return get


KINDS = {"sample": "fairness", "gradient": "fairness", "violation": "fairness", "reward": "alignment"}


def struck(kind: str, moment, times: int) -> Fault:
    value = moment.choice([math.nan, math.inf]) if kind != "gradient" else math.nan
    step = moment.randint(1, PRIMAL_STEPS)
    step += step % INTERVAL if kind == "violation" else 0
    print(f"{kind} is {value} at primal step {step}, {times} times")
    return Fault(kind, step, times, value)


@pytest.mark.parametrize("deferred", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_number_that_is_bad_once_costs_an_attempt_and_changes_nothing(
    kind, deferred, moment, tmp_path, undisturbed, monkeypatch
):
    """Also where the loop looks once a dual step, as it does on an accelerator: the step is skipped, and named all the same."""
    monkeypatch.setattr(Workspace, "defers_checks", property(lambda self: deferred))
    method = KINDS[kind]
    config = config_of(**(REWARDS if method == "alignment" else {}))
    with struck(kind, moment, 1).installed() as fault:
        ledger = run_trials(tmp_path, config, ["struck"])
    book = ledger.book("struck")
    assert (book.status, book.attempt, book.error) == ("completed", 2, None)
    assert begins(tmp_path, "struck") == [0, last_checkpoint(fault.step)]
    assert outcome(ledger, tmp_path, "struck") == undisturbed(method)
    assert [path.name for path in (tmp_path / "trials" / "struck").glob("bad_numbers*")] == ["bad_numbers-1.json"]
    assert any("non-finite" in note for note in book.notes)
    report = json.loads((tmp_path / "trials" / "struck" / "bad_numbers-1.json").read_text(encoding="utf-8"))
    if kind != "violation":
        assert report["primal_step"] == fault.step


def test_a_bad_calibration_is_not_kept_and_the_pretraining_goes_on_from_its_checkpoint(tmp_path, undisturbed):
    with Fault("pool", 0, 1, math.nan).installed():
        ledger = run_trials(tmp_path, config_of(**REWARDS), ["calm"])
    base = ledger.book("pretrained")
    assert (base.status, base.attempt, ledger.book("calm").attempt) == ("completed", 2, 1)
    assert begins(tmp_path, "pretrained") == [0, 4]
    assert base.superseded_rows == 0 and any("non-finite values on {'right': 1} of 128" in note for note in base.notes)
    assert outcome(ledger, tmp_path, "calm") == undisturbed("alignment")


@pytest.mark.parametrize("kind", KINDS)
def test_a_number_that_stays_bad_fails_by_name_within_the_budget_and_the_next_trial_runs(
    kind, moment, tmp_path, undisturbed
):
    method = KINDS[kind]
    config = config_of(**(REWARDS if method == "alignment" else {}))
    with struck(kind, moment, MAX_FAILURES + 1).installed() as fault:
        ledger = run_trials(tmp_path, config, ["struck", "next"])
    book = ledger.book("struck")
    assert (book.status, book.attempt, book.result) == ("diverged", MAX_FAILURES + 1, None), book.error
    line = book.error.strip().splitlines()[-1]
    assert "non-finite" in line and "compute.max_failures" in line and "Traceback" in book.error
    folder = tmp_path / "trials" / "struck"
    reports = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("bad_numbers-*.json"))]
    assert [report["attempt"] for report in reports] == [1, 2, 3]
    assert str(folder / "bad_numbers-3.json") in line
    # Rows before the fault stand, none has come after it, and no checkpoint holds the number.
    assert len(book.rows) == (fault.step - 1) // INTERVAL
    for path in folder.glob("checkpoints/*/tensors.safetensors"):
        assert all(bool(torch.isfinite(tensor).all()) for tensor in load_file(path).values())
    if kind == "violation":
        assert f"dual step {fault.step // INTERVAL}" in line and "component_1" in line
        assert reports[0]["primal_steps"] == [fault.step - 1, fault.step]
    else:
        assert f"at primal step {fault.step} " in line
        (part,) = reports[0]["workers"]
        stream = part["streams"]["trajectory" if kind == "reward" else "main"]
        assert len(stream["timesteps"]) == BATCH
        if kind == "sample":
            assert stream["not_finite"] == [3] and f"main samples [{stream['indices'][3]}]" in line
        elif kind == "reward":
            assert stream["not_finite"] and stream["indices"] is None and "trajectory noise draws [" in line
        else:
            assert "the batch: rank 0 shards [0, 1] main samples" in line
    assert outcome(ledger, tmp_path, "next") == undisturbed(method)
    replayed = DualLedger()
    for record in read_journal(tmp_path / "journal.jsonl"):
        replayed.apply(record)
    again = replayed.book("struck")
    assert (again.status, again.attempt, again.error, again.rows) == (book.status, book.attempt, book.error, book.rows)


# -- finite, but running away ------------------------------------------------------------------------------------------

RUNAWAYS = {
    # Steps of a hundred in every weight: a loss that was 1 is 1e6 at once.
    "objective": {"primal": {"lr": 100.0}},
    # A threshold far off and a step size of another unit: the multiplier only grows.
    "multiplier of component_2": {"dual": {"step_size": 1e6}},
}


@pytest.mark.parametrize("what", RUNAWAYS)
def test_a_run_that_runs_away_is_stopped_early_with_its_reason_and_evaluated_nowhere(what, tmp_path):
    config = config_of(**{"divergence": {"dual_steps": 2}} | RUNAWAYS[what])
    ledger = run_trials(tmp_path, config, ["away", "next"])
    book = ledger.book("away")
    assert (book.status, book.attempt) == ("diverged", 1)  # a retry would take the same steps
    assert book.result["reason"] == book.result["error"] == book.error
    assert book.error.startswith("runs away at dual step ") and f"{what} grew to" in book.error
    assert len(book.rows) < PRIMAL_STEPS // INTERVAL and book.result["dual_steps"] == len(book.rows)
    assert book.result["objective"] is None and book.result["certificate"] is None and not book.result["constraints"]
    assert not (tmp_path / "trials" / "away" / "model").exists()
    assert ledger.book("next").status == "diverged"  # the slot went on
    calm = config_of(**{"divergence": {"factor": None}} | RUNAWAYS[what])
    assert run_trials(tmp_path / "unwatched", calm, ["away"]).book("away").status == "completed"


def test_a_pretraining_that_runs_away_leaves_no_model_and_its_trials_say_why(tmp_path):
    config = config_of(pretrain={"lr": 100.0}, divergence={"dual_steps": 2})
    ledger = run_trials(tmp_path, config, ["orphan"])
    assert ledger.book("pretrained").status == "diverged"
    assert not (tmp_path / "base" / "base.json").exists()
    assert ledger.book("orphan").status == "failed" and "objective grew to" in ledger.book("orphan").error


# -- one worker of two -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def local_ray(tmp_path_factory):
    """Two CPUs for two workers, started once."""
    import ray

    from dualsweep.orchestration.cluster import quiet_environment, start_ray, stop_ray

    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        patch.chdir(tmp_path_factory.mktemp("ray"))
        quiet_environment()
        start_ray(num_cpus=2)
        ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # the workers can't import a test
        yield
        stop_ray()


# trial -> (rank, primal step, attempts it strikes in, kind); travels to the workers inside the train function
Plan = dict[str, tuple[int, int, int, str]]


def spoilt_train_loop(plan: Plan, scaled: bool):
    """The workers' train function, with numbers spoilt on one rank as `plan` says; a scaler makes it fp16's path."""

    def train_loop(job):
        from dualsweep.orchestration.worker_group import train_loop as sound
        from dualsweep.trainers import worker

        run, taken, method_of = worker.run_trial, loop.primal_step, METHODS["fairness"]
        measure, make_reward = method_of.measure, alignment.make_reward
        now = {"armed": False}

        def strikes(workspace_rank, step, kind):
            rank, due, attempts, wanted = plan.get(now["trial"], (None, 0, 0, ""))
            return (workspace_rank, step, kind) == (rank, due, wanted) and now["attempt"] <= attempts

        def run_trial(workspace, assignment, server):
            now.update(trial=assignment.trial_id, attempt=assignment.attempt, rank=workspace.rank)
            if scaled:
                workspace.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
            return run(workspace, assignment, server)

        def primal_step(train, method, batch, *arguments, **given):
            if strikes(now["rank"], train.primal_step + 1, "sample"):
                batch.x_0[1, 0] = math.nan
            hook = None
            if strikes(now["rank"], train.primal_step + 1, "gradient"):
                hook = next(train.denoiser.parameters()).register_hook(lambda gradient: gradient * math.nan)
            now["armed"] = strikes(now["rank"], train.primal_step + 1, "reward")
            try:
                return taken(train, method, batch, *arguments, **given)
            finally:
                now["armed"] = False
                if hook is not None:
                    hook.remove()

        def spoilt_measure(method, *arguments, counter, **given):
            if strikes(now["rank"], (counter + 1) * INTERVAL, "samples of the model"):
                raise NonFiniteError("samples of the model are not finite")
            draws = measure(method, *arguments, counter=counter, **given)
            if strikes(now["rank"], (counter + 1) * INTERVAL, "violation"):
                draws.rows[0, 0] = math.nan
            return draws

        def spoilt_reward(*arguments, **given):
            reward = make_reward(*arguments, **given)

            def judged(samples):
                found = reward(samples)
                return found.index_fill(0, torch.tensor([2]), math.nan) if now["armed"] else found

            return judged

        worker.run_trial, loop.primal_step, method_of.measure = run_trial, primal_step, spoilt_measure
        alignment.make_reward = spoilt_reward
        sound(job)

    return train_loop


def run_group(folder: Path, config: SweepConfig, plan: Plan, *, scaled: bool) -> DualLedger:
    """The books after a Ray Train group of two trained the plan's trials."""
    from dualsweep.orchestration import worker_group
    from dualsweep.orchestration.dual_server import start_dual_server

    folder.mkdir(parents=True)
    server = start_dual_server(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worker_group, "train_loop", spoilt_train_loop(plan, scaled))
        group = worker_group.WorkerGroup("slot", config, folder, own_ray=True)
        hand_out(server, folder, config, list(plan), limit_s=400)
        group.join()
    assert not group.alive and group.error is None
    server.shutdown()
    ledger = DualLedger()
    for record in read_journal(folder / "journal.jsonl"):
        ledger.apply(record)
    return ledger


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize(
    "scaled", [pytest.param(False, id="fp32"), pytest.param(True, id="loss scaler", marks=pytest.mark.heavy)]
)
def test_one_rank_of_two_meets_it_and_the_group_retries_then_fails_by_name(scaled, local_ray, moment, tmp_path):
    config = config_of(compute={"workers": 2, "max_failures": 1})  # a start of the group is what takes the time
    rank = moment.randrange(2)
    step = moment.randint(1, PRIMAL_STEPS)
    plan = {"struck": (rank, step, 99, "sample"), "next": (1, 2 * moment.randint(1, 6), 1, "samples of the model")}
    print(plan)
    ledger = run_group(tmp_path / "sweep", config, plan, scaled=scaled)
    book = ledger.book("struck")
    line = book.error.strip().splitlines()[-1]
    assert (book.status, book.attempt) == ("diverged", 2), book.error
    assert f"non-finite loss at primal step {step} " in line and f"rank {rank} shards [{rank}] main samples [" in line
    assert "compute.max_failures" in line and len(book.rows) == (step - 1) // INTERVAL
    folder = tmp_path / "sweep" / "trials" / "struck"
    report = json.loads((folder / "bad_numbers-2.json").read_text(encoding="utf-8"))
    assert [part["rank"] for part in report["workers"]] == [0, 1]
    assert report["workers"][rank]["streams"]["main"]["not_finite"] == [1]
    assert report["workers"][1 - rank]["streams"]["main"]["not_finite"] == []
    # Only one rank knew of the second trial's; it said so, and the trial went on from its checkpoint.
    following = ledger.book("next")
    assert (following.status, following.attempt) == ("completed", 2), following.error
    assert len(following.rows) == PRIMAL_STEPS // INTERVAL
    assert any("samples of the model are not finite" in note for note in following.notes)


@pytest.mark.ray
@pytest.mark.heavy
@pytest.mark.parametrize("kinds", [("gradient", "violation"), ("reward",)], ids=" and ".join)
def test_one_rank_of_two_meets_another_bad_number_once_and_both_go_on_from_the_checkpoint(
    kinds, local_ray, moment, tmp_path
):
    changes = REWARDS if "reward" in kinds else {}
    config = config_of(compute={"workers": 2, "max_failures": 1}, **changes)
    plan = {kind: (moment.randrange(2), 2 * moment.randint(3, 6), 1, kind) for kind in kinds}
    print(plan)
    ledger = run_group(tmp_path / "sweep", config, plan, scaled=False)
    for kind, (_, step, _, _) in plan.items():
        book = ledger.book(kind)
        assert (book.status, book.attempt) == ("completed", 2), book.error
        assert len(book.rows) == PRIMAL_STEPS // INTERVAL and any("non-finite" in note for note in book.notes)
        assert begins(tmp_path / "sweep", kind) == [0, last_checkpoint(step)]
        for path in (tmp_path / "sweep" / "trials" / kind).glob("checkpoints/*/tensors.safetensors"):
            assert all(bool(torch.isfinite(tensor).all()) for tensor in load_file(path).values())
