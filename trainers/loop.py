"""The one training loop: a trial from its assignment to its result, for every method, on one worker or many."""

import math
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list, gather_object

from dualsweep.constraints import (
    Constraint,
    Finding,
    NonFiniteError,
    Problem,
    RunawayDetector,
    StoppingRule,
    resolved_threshold,
)
from dualsweep.constraints.senses import threshold_sense
from dualsweep.datasets import Streams
from dualsweep.trainers.assignment import Assignment
from dualsweep.trainers.bad_numbers import (
    BatchNonFiniteError,
    DeferredChecks,
    drawn_part,
    report_path,
    told,
    write_report,
)
from dualsweep.trainers.batches import BatchLoader
from dualsweep.trainers.checkpoints import find_checkpoint, save_checkpoint, tidy
from dualsweep.trainers.dual_client import NOT_THE_RULES, DualClient, Reply
from dualsweep.trainers.methods import METHODS, Method, Pretraining, StreamSums
from dualsweep.trainers.metrics import Draws, Measurement, loss_measurement, mean_and_stderr, shard_counts
from dualsweep.trainers.models import Denoiser, load_model, save_model
from dualsweep.trainers.primal import primal_step
from dualsweep.trainers.results import (
    evaluate_trial,
    publish_base,
    push_trial,
    trial_summary,
)
from dualsweep.trainers.state import TrainState
from dualsweep.trainers.store import DamagedError, Store
from dualsweep.trainers.workspace import Workspace

CONFIRMATION_COUNTER = 2**41  # keeps the draws that confirm a certificate apart from those of dual steps and evaluations
WARM_END = 0.1  # of the learning rate that a warm start begins with, once `sweep.warm_steps` are over


def run_trial(workspace: Workspace, assignment: Assignment, dual: DualClient) -> dict[str, Any] | None:
    """Train one configuration, evaluate it and write its folder.

    Every worker calls this with the same assignment; rank 0 alone talks to `dual` and writes files.

    Returns: the result (the content of result.json), or None when the trial was interrupted to be resumed later.
    Raises: NonFiniteError naming the step and the draws at fault, CheckpointError and whatever training raises; nothing is
        written then but checkpoints and the draws at fault (`bad_numbers-<attempt>.json`).
    """
    trial = _Trial(workspace, assignment, dual)
    with trial.ends:
        return trial.run()


class _Trial:
    """The state of `run_trial`, split into its phases."""

    def __init__(self, workspace: Workspace, assignment: Assignment, dual: DualClient) -> None:
        self.workspace, self.assignment, self.dual = workspace, assignment, dual
        config = workspace.config
        self.is_base = assignment.kind == "base"
        self.optimizer: dict[str, Any] = config["pretrain"] if self.is_base else config["primal"]
        self.folder, self.base_dir = Path(assignment.trial_dir), Path(assignment.base_dir)
        self.unit: str = config["thresholds"]["unit"]
        self.names = workspace.constraint_names if assignment.kind in ("constrained", "fixed_weights") else ()
        self.store = workspace.store or Store(self.folder)
        self.fingerprint = assignment.fingerprint(config)
        self.started = time.time()
        self.first_step: float | None = None
        self.pipelined = config["dual"]["mode"] == "pipelined"
        self.interval: int = config["dual"]["primal_steps_per_dual_step"]
        self.reply: Reply  # the newest answer
        self.in_use: tuple[float, ...]  # multipliers of the primal steps: the newest answer's, or the one's before it
        self.ends = ExitStack()  # what must not outlive the trial
        # Primal steps of the neighbours that this trial goes on from, one after the other. Their draws are not taken again: a
        # chain that sees the same batches from every point to the next adds their noise up instead of averaging it.
        self.before: int = (assignment.start or {}).get("steps_before", 0)
        self.draws = False  # whether the method measures on draws of its own
        self.lost = ""  # why the neighbour's model cannot be started from
        self._under_way: tuple[int, Callable[[], Reply] | None] | None = None  # dual step, and rank 0's wait for it

    def run(self) -> dict[str, Any] | None:
        workspace, config = self.workspace, self.workspace.config
        base = None if self.is_base else workspace.load_base(self.base_dir)
        formulation = METHODS[config["method"]]
        self.method: Method = (Pretraining if self.is_base else formulation)(
            workspace.setting(self.names, self.optimizer, pretraining=self.is_base)
        )
        workspace.fill(self._neighbour() or base)
        workspace.reset_scaler()
        trained, ema = workspace.modules()
        train = TrainState(trained, ema, self.optimizer, workspace.accelerator.scaler)
        if self.lost:
            train.extra["without_neighbour"] = True
        problem = self._problem()
        self.reply = self._begin(train, problem)
        train.follow(self._lr_course(train))
        self.in_use = tuple(train.extra.get("multipliers_in_use", self.reply.multipliers))
        multipliers = torch.tensor(self.in_use, dtype=torch.float32, device=workspace.device)
        detector, stopping = self._detector(train), self._stopping(train, problem)
        streams = workspace.streams(self.method, self.optimizer, config["seed"], first_step=self.before)
        tensors = {name: samples for name, (samples, _) in self.method.streams().items()}
        shards = list(streams.shards_of(workspace.rank, workspace.world_size))
        sums = StreamSums(1 + len(self.names), workspace.device)
        steps = 0 if formulation.starts_optimal and not self.names and not self.is_base else self.optimizer["steps"]
        status, reason, finding, grad_norm = "completed", None, None, train.extra.get("grad_norm", 0.0)
        checks = DeferredChecks() if workspace.defers_checks else None
        accumulate = self.optimizer["gradient_accumulation_steps"]
        loader = BatchLoader(streams, shards, tensors, workspace.device, steps=steps, accumulate=accumulate)
        batches = self.ends.enter_context(loader)
        trained.train()
        while train.primal_step < steps:
            if self.method.trains:
                batch, *further = batches.take(train.primal_step)
                self.first_step = self.first_step or time.time()
                with self._named_batch(train, streams, shards):
                    norm = primal_step(
                        train,
                        self.method,
                        batch,
                        multipliers,
                        accelerator=workspace.accelerator,
                        grad_clip=self.optimizer["grad_clip"],
                        sums=sums,
                        checks=checks,
                        further=further,
                    )
                if norm is not None and math.isfinite(norm):  # an fp16 update that the scaler skipped has none
                    grad_norm = norm
            else:  # dual-only: a primal step is the exact minimiser at these multipliers, nothing to update
                self.first_step = self.first_step or time.time()
                train.primal_step += 1
            if train.primal_step % self.interval:
                continue
            if checks is not None:
                with self._named_batch(train, streams, shards):
                    grad_norm = checks.read() or grad_norm
            with self._named_dual_step(train.dual_step + 1, shards):
                measurement = self._measure(train, sums, shards, problem, multipliers, grad_norm)
            directive = self._report(train.dual_step + 1, measurement, shards)
            sums.reset()
            train.dual_step += 1
            train.extra["grad_norm"] = grad_norm
            multipliers.copy_(torch.tensor(self.in_use, dtype=torch.float32))
            if detector is not None:
                reason = detector.see(measurement["objective"], self.in_use)
                train.extra["runaway"] = detector.state
            if reason is not None:
                status, reason = "diverged", f"runs away at dual step {train.dual_step}: {reason}"
                break
            if stopping is not None:
                afresh = partial(self._afresh, train, problem, multipliers, shards, stopping.repeats) if self.draws else None
                finding = stopping.see(self._seen(train, problem, measurement), afresh)
                train.extra["stopping"] = stopping.state
            if finding is not None and directive != "stop":  # a scheduler wants the slot for another point
                status = "completed" if finding.kind == "certificate" else "stopped"
                break
            if directive == "interrupt" or train.dual_step % config["checkpoint_every_dual_steps"] == 0:
                self._settle(shards)
                self._checkpoint(train)
            if directive == "interrupt":
                return None
            if directive == "stop":
                status, finding = "stopped", None
                break
        if checks is not None:  # steps after the last dual step
            with self._named_batch(train, streams, shards):
                checks.read()
        self._settle(shards)
        if self.is_base:
            return self._finish_base(train, reason)
        if status != "completed":  # the slot is wanted for the next point: no evaluation, no claim
            return self._summary(train, problem, status, reason, finding)
        return self._finish(train, problem, finding)

    # -- the problem ---------------------------------------------------------------------------------------------

    def _problem(self) -> Problem:
        """Thresholds as numbers; fixed-weight runs are measured against the data's own share or the pretrained metric."""
        config, data, unit = self.workspace.config, self.workspace.data, self.unit
        sense = threshold_sense(config["method"], unit)
        constraints = []
        for name in self.names:
            if self.assignment.kind == "constrained":
                asked = self.assignment.thresholds[name]
                pretrained = self.workspace.calibration["metrics"][name] if isinstance(asked, dict) else None
                threshold = resolved_threshold(asked, unit, pretrained=pretrained)
            elif unit == "share":
                # A hair below the prior: if every class is constrained the priors sum to 1, which a problem refuses.
                threshold = (1 - 1e-9) * max(data.prior[data.constraint_classes[name]], 1e-6)
            else:
                threshold = self.workspace.calibration["metrics"][name]
                threshold = max(threshold, 0.0) if unit == "nats" else threshold  # an estimate of 0 may fall below it
            constraints.append(Constraint(name=name, unit=unit, threshold=threshold, metric=unit, sense=sense))
        return Problem(
            method=config["method"],
            objective="denoising loss on the main set" if self.is_base else self.method.objective_name,
            constraints=tuple(constraints),
            domain=self.method.domain(constraints),
        )

    def _rule(self) -> tuple[dict[str, Any], list[float]]:
        dual = self.workspace.config["dual"]
        if self.assignment.kind == "fixed_weights":
            return {"rule": "fixed"}, [self.assignment.fixed_weight] * len(self.names)
        rule = {k: v for k, v in dual.items() if k not in NOT_THE_RULES and v is not None}
        if self.assignment.start is not None:
            return rule, [self.assignment.start["multipliers"][name] for name in self.names]
        return rule, [dual["start"]] * len(self.names)

    def _lr_course(self, train: TrainState) -> dict[str, Any]:
        """Settings of the optimizer; a warm start need not go the way from the pretrained model again."""
        sweep = self.workspace.config["sweep"]
        cold = self.assignment.start is None or train.extra.get("without_neighbour", False)
        if cold or sweep["warm_lr"] is None:
            return self.optimizer
        course = {"lr": sweep["warm_lr"] * self.optimizer["lr"], "final_lr_fraction": 1.0}
        if sweep["warm_steps"] is not None:
            course = {**course, "steps": sweep["warm_steps"], "final_lr_fraction": WARM_END}
        return {**self.optimizer, **course}

    def _neighbour(self) -> Denoiser | None:
        """The model of the solved grid point that this one starts from; None: from the pretrained model.

        A model that is gone or damaged will be so at every retry: `lost` then says why, for all workers alike.
        """
        if self.assignment.start is None or not self.method.trains:
            return None
        folder = self.folder.parent / self.assignment.start["trial"] / "model"
        loaded: list[Denoiser] = []

        def load() -> str:
            try:
                self.store.fetch(folder)
                loaded.append(load_model(folder))
            except (ValueError, DamagedError) as error:
                return str(error)
            return ""

        self.lost = self._agree(load)
        if self.lost:
            return None
        if not loaded:  # rank 0 has it
            self.store.fetch(folder)
            loaded.append(load_model(folder))
        return loaded[0]

    def _begin(self, train: TrainState, problem: Problem) -> Reply:
        """Restore the newest whole checkpoint if there is one, and tell the dual side where this attempt starts."""
        dual_state = None
        at_most = self.assignment.known_steps
        # Rank 0 chooses for all: what a store lists, or a damaged file, may differ from one worker's look to the next.
        checkpoint, passed = self._agree(
            lambda: find_checkpoint(self.folder, self.fingerprint, self.store, at_most=at_most)
        )
        if checkpoint is not None:
            if self.workspace.rank > 0:
                self.store.fetch(checkpoint)
            dual_state = train.restore(checkpoint, fingerprint=self.fingerprint)
        self.workspace.accelerator.wait_for_everyone()  # the others may still read what is removed now
        if self.workspace.rank == 0:
            tidy(self.folder, self.store, passed)
        rule, start = self._rule()
        reply = self._agree(
            lambda: self.dual.begin(
                self.assignment.trial_id,
                self.assignment.attempt,
                problem=problem.to_dict(),
                rule=rule,
                start=start,
                dual_state=dual_state,
            )
        )
        if self.workspace.rank == 0:
            for _, error in passed:
                text = f"{error}; removed, and {f'gone on from {checkpoint.name}' if checkpoint else 'begun again'}"
                self.dual.note(self.assignment.trial_id, self.assignment.attempt, text)
            if self.lost and checkpoint is None:
                text = f"begun from the pretrained model, with its neighbour's multipliers: {self.lost}"
                self.dual.note(self.assignment.trial_id, self.assignment.attempt, text)
        return reply

    def _agree(self, call: Callable[[], Any]) -> Any:
        """Rank 0 asks, every rank gets the answer; a refusal is one too, or the others would wait for it for ever."""
        if self.workspace.world_size == 1:
            return call()
        answer: list[Any] = [None]
        if self.workspace.rank == 0:
            try:
                answer = [call()]
            except Exception as error:
                refusal = error if isinstance(error, NonFiniteError) else RuntimeError(f"rank 0: {error!r}")
                broadcast_object_list([refusal], from_process=0)
                raise
        broadcast_object_list(answer, from_process=0)
        if isinstance(answer[0], Exception):
            raise answer[0]
        return answer[0]

    # -- numbers ---------------------------------------------------------------------------------------------------

    def _detector(self, train: TrainState) -> RunawayDetector | None:
        limits = self.workspace.config["divergence"]
        if limits["factor"] is None:
            return None
        starts = dict(zip(self.names, self._rule()[1], strict=True))
        scale = 1.0 if self.is_base else self.method.objective_scale
        return RunawayDetector(starts, objective_scale=scale, **limits, state=train.extra.get("runaway", ()))

    def _stopping(self, train: TrainState, problem: Problem) -> StoppingRule | None:
        """What ends a constrained trial early; nothing without constraints, or where the weights are fixed."""
        config = self.workspace.config
        limits, warm = dict(config["stopping"]), config["sweep"]["order"] != "listed"
        limits["certificate"] = warm if limits["certificate"] is None else limits["certificate"]
        limits["infeasible"] = limits["certificate"] if limits["infeasible"] is None else limits["infeasible"]
        moves = self.assignment.kind == "constrained" and self._rule()[0]["rule"] != "fixed" and self.names
        if not moves or not (limits["certificate"] or limits["infeasible"]):
            return None
        limits["tolerance"] = limits["tolerance"] or config["evaluation"]["tolerance"] / 2
        state, pooled = train.extra.get("stopping", ()), config["measure"]["window"]
        return StoppingRule(problem.names, problem.domain, pooled=pooled, state=state, **limits)

    def _seen(self, train: TrainState, problem: Problem, measurement: dict[str, Any]) -> dict[str, Any]:
        """What stopping judges this dual step by; every worker has it. Multipliers are those in use from here on."""
        return {
            "dual_step": train.dual_step,
            "multipliers": list(self.in_use),
            "relaxations": self.reply.dual_state["relaxations"],
            "thresholds": problem.thresholds.tolist(),
            "violations": problem.violation(measurement["metrics"]).tolist(),
            "violation_stderrs": list(measurement["metric_stderrs"]),
        }

    @contextmanager
    def _named_batch(self, train: TrainState, streams: Streams, shards: list[int]) -> Iterator[None]:
        """A number that is not finite is told with the draws it came from, and they are written to the trial's folder."""
        try:
            yield
        except NonFiniteError as error:
            agreed, rank = isinstance(error, BatchNonFiniteError), self.workspace.rank
            rows = error.rows if isinstance(error, BatchNonFiniteError) else {}
            here = error.here if isinstance(error, BatchNonFiniteError) else True
            step = error.step if isinstance(error, BatchNonFiniteError) else train.primal_step + 1
            draws = streams.draw(step - 1, shards)
            found = [(not here, str(error), drawn_part(draws, streams.sizes, rows, rank=rank, shards=shards))]
            if agreed and self.workspace.world_size > 1:  # else the others are somewhere inside the step
                found = gather_object(found)
            text = min(found, key=lambda one: one[0])[1]
            parts = [part for _, _, part in found]
            stream_step = streams.first_step + step - 1
            address = {"primal_step": step, "stream_step": stream_step}
            path = self._keep(text, together=agreed, **address, workers=parts)
            named = "" if agreed else f" in primal step {step}"
            raise NonFiniteError(
                f"{text}{named}; {told(parts)} (seed {self.workspace.config['seed']}, stream step {stream_step}); "
                f"the whole batch is in {path}"
            ) from error

    @contextmanager
    def _named_dual_step(self, number: int, shards: list[int]) -> Iterator[None]:
        """The same for what a dual step measured; the address of its draws is the dual step and the shards."""
        try:
            yield
        except NonFiniteError as error:
            steps = [(number - 1) * self.interval + 1, number * self.interval]
            counter = self._counter(number - 1)
            address = {"dual_step": number, "primal_steps": steps, "draws_counter": counter}
            path = self._keep(str(error), together=False, **address, shards=shards)
            raise NonFiniteError(
                f"{error}; measured at dual step {number} after the primal steps {steps[0]} to {steps[1]} "
                f"(seed {self.workspace.config['seed']}, draws {counter} of shards {shards}); kept in {path}"
            ) from error

    def _keep(self, text: str, *, together: bool, **what: Any) -> Path:
        """Write the report, rank 0 for all of them where they are `together`, and return its path."""
        path = report_path(self.folder, self.assignment.attempt, 0 if together else self.workspace.rank)
        if not together or self.workspace.rank == 0:
            address = {"attempt": self.assignment.attempt, "seed": self.workspace.config["seed"]}
            write_report(path, {"error": text, **address, **what})
            self.store.push(path)
        return path

    # -- dual steps ----------------------------------------------------------------------------------------------

    def _report(self, number: int, measurement: dict[str, Any], shards: list[int]) -> str:
        """Send a dual step's report and take the multipliers of the next primal steps into use.

        alternating: those of its own answer, waited for. pipelined: those of the answer before, while it is under way.
        Returns: the directive that came with them.
        """
        report = (self.assignment.trial_id, self.assignment.attempt, number, measurement)
        self._settle(shards)
        if self.pipelined:
            self._under_way = (number, self.dual.submit(*report) if self.workspace.rank == 0 else None)
        else:
            with self._named_dual_step(number, shards):
                self.reply = self._agree(lambda: self.dual.report(*report))
        self.in_use = self.reply.multipliers
        return self.reply.directive

    def _settle(self, shards: list[int]) -> None:
        """Wait for the answer that is under way, if one is. The multipliers in use stay as they are."""
        if self._under_way is not None:
            number, answer = self._under_way
            with self._named_dual_step(number, shards):
                self.reply = self._agree(answer)
            self._under_way = None

    def _measure(
        self,
        train: TrainState,
        sums: StreamSums,
        shards: list[int],
        problem: Problem,
        multipliers: torch.Tensor,
        grad_norm: float,
    ) -> dict[str, Any]:
        """What the dual step sees: values of the primal steps since the last one, and the constraint metrics."""
        accelerator = self.workspace.accelerator
        table = (accelerator.reduce(sums.table, "sum") if self.workspace.world_size > 1 else sums.table).cpu().numpy()
        measured = self._drawn(train, shards, multipliers)
        in_primal_units = measured is None
        if measured is None:
            measured = loss_measurement(table)
        objective, stderr = measured.objective or mean_and_stderr(*table[0])
        measured = measured.canonical(problem.constraints)
        if in_primal_units or measured.objective is not None:
            terms = np.asarray(measured.metrics) - problem.thresholds
        else:  # the weighted sum of losses that is minimised; thresholds of another unit are constants of the model
            terms = table[1:, 0] / table[1:, 2]
        return {
            "primal_step": train.primal_step,
            "workers": self.workspace.world_size,
            "lag": int(self.pipelined),
            "wall_time": time.time(),
            "lr": train.lr,
            "grad_norm": grad_norm,
            "objective": objective,
            "objective_stderr": stderr,
            "lagrangian": objective + float(np.dot(self.in_use, terms)),
            "metrics": measured.metrics,
            "metric_stderrs": measured.stderrs,
            "counts": measured.counts,
        }

    def _drawn(self, train: TrainState, shards: list[int], multipliers: torch.Tensor) -> Measurement | None:
        """The method's own draws, pooled over the last dual steps."""
        rows = self._draw(self._counter(train.dual_step), multipliers, shards)
        self.draws = rows is not None
        if rows is None:
            return None
        window = [*train.extra.get("window", []), rows.tolist()][-self.workspace.config["measure"]["window"] :]
        train.extra["window"] = window
        return self.method.measurement(np.concatenate(window), multipliers.cpu().numpy())

    def _afresh(
        self, train: TrainState, problem: Problem, multipliers: torch.Tensor, shards: list[int], repeats: int
    ) -> dict[str, Any]:
        """The constraints of the model as it is, on draws of their own, so many times those of a dual step."""
        with self._named_dual_step(train.dual_step, shards):
            first = CONFIRMATION_COUNTER + self._counter(train.dual_step) * repeats
            rows = [self._draw(first + number, multipliers, shards) for number in range(repeats)]
            measured = self.method.measurement(np.concatenate(rows), multipliers.cpu().numpy()).canonical(problem.constraints)
            if not np.isfinite([*measured.metrics, *measured.stderrs]).all():
                raise NonFiniteError(f"a certificate's own draws gave {measured.metrics}, which are not all finite")
        return {
            "violations": problem.violation(measured.metrics).tolist(),
            "violation_stderrs": list(measured.stderrs),
        }

    def _counter(self, dual_step: int) -> int:
        """The address of a dual step's draws, behind those of the neighbours' dual steps."""
        return -(-self.before // self.interval) + dual_step

    def _draw(self, counter: int, multipliers: torch.Tensor, shards: list[int]) -> np.ndarray | None:
        """Rows of the method's own draws, of all workers, at this address; None where it measures in the primal steps."""
        workspace, measure = self.workspace, self.workspace.config["measure"]
        draws: Draws | None = self.method.measure(
            workspace.modules()[1],
            multipliers,
            counter=counter,
            shards=shards,
            counts=shard_counts(measure["num_samples"], self.optimizer["num_shards"]),
            num_sampling_steps=measure["num_sampling_steps"],
        )
        if draws is None or workspace.world_size == 1:
            return None if draws is None else draws.rows
        return np.concatenate(gather_object([draws.rows]))

    def _checkpoint(self, train: TrainState) -> None:
        if self.pipelined:
            train.extra["multipliers_in_use"] = list(self.in_use)
        if self.workspace.rank == 0:
            folder = save_checkpoint(
                train, self.folder, self.store, dual_state=self.reply.dual_state, fingerprint=self.fingerprint
            )
            self.dual.checkpointed(self.assignment.trial_id, self.assignment.attempt, train.dual_step, str(folder))
        self.workspace.accelerator.wait_for_everyone()

    # -- the end -------------------------------------------------------------------------------------------------

    def _finish_base(self, train: TrainState, reason: str | None) -> dict[str, Any] | None:
        workspace, sound = self.workspace, reason is None
        result, calibration = None, None
        if workspace.rank == 0:
            ema = workspace.modules()[1]
            if sound:
                save = partial(save_model, ema, workspace.schedule, codec=workspace.codec)
                publish_base(self.base_dir, save, workspace.fingerprint, self.store)
                workspace.load_base(self.base_dir)
                calibration = (
                    workspace.calibration
                )  # may find a number that is not finite: the checkpoints serve a retry
                self.store.remove(self.folder / "checkpoints")
                shutil.rmtree(self.folder / "checkpoints", ignore_errors=True)
            result = {
                "trial_id": self.assignment.trial_id,
                "label": self.assignment.label,
                "kind": "base",
                "status": "completed" if sound else "diverged",
                "error": reason,
                "reason": reason,
                "primal_steps": train.primal_step,
                "dual_steps": train.dual_step,
                "wall_seconds": time.time() - self.started,
                "calibration": calibration,
            }
        workspace.accelerator.wait_for_everyone()
        return result

    def _finish(self, train: TrainState, problem: Problem, finding: Finding | None) -> dict[str, Any] | None:
        result = None
        if self.workspace.rank == 0:
            result = evaluate_trial(
                self.workspace,
                self.method,
                self._summary(train, problem, "completed", None, finding),
                problem,
                self.reply,
                self._rows(),
                self.folder,
            )
            push_trial(self.folder, self.store)
        self.workspace.accelerator.wait_for_everyone()
        return result

    def _summary(
        self, train: TrainState, problem: Problem, status: str, reason: str | None, finding: Finding | None
    ) -> dict[str, Any]:
        begun = self.first_step and self.assignment.handed_over
        return trial_summary(
            self.workspace,
            self.method,
            self.assignment,
            problem,
            self.reply,
            status=status,
            reason=reason,
            finding=finding,
            rows=self._rows(),
            primal_steps=train.primal_step,
            dual_steps=train.dual_step,
            wall_seconds=time.time() - self.started,
            startup_seconds=self.first_step - self.assignment.handed_over if begun else None,
        )

    def _rows(self) -> list[dict[str, Any]]:
        return self.dual.trace(self.assignment.trial_id) if self.workspace.rank == 0 else []
