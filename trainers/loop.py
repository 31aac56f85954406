"""The one training loop: a trial from its assignment to its result, for every method, on one worker or many."""

import json
import math
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list

from dualsweep.constraints import Constraint, DualState, Problem, certify, resolved_threshold
from dualsweep.constraints.closed_forms import (
    class_restriction_multipliers,
    class_restriction_objective,
    resilient_class_restriction_multipliers,
)
from dualsweep.trainers.assignment import Assignment
from dualsweep.trainers.dual_client import DualClient, Reply
from dualsweep.trainers.evaluate import Evaluation, denoising_losses, evaluate
from dualsweep.trainers.methods import METHODS, Method, StreamSums
from dualsweep.trainers.methods.base import make_batch
from dualsweep.trainers.metrics import Measurement, ShareEstimator, loss_measurement, mean_and_stderr, share_measurement
from dualsweep.trainers.models import save_model
from dualsweep.trainers.primal import primal_step
from dualsweep.trainers.state import CheckpointError, TrainState, read_checkpoint_meta
from dualsweep.trainers.workspace import Workspace, read_json

KEPT_CHECKPOINTS = 2
CALIBRATION_DRAWS = 8192


def run_trial(workspace: Workspace, assignment: Assignment, dual: DualClient) -> dict[str, Any] | None:
    """Train one configuration, evaluate it and write its folder.

    Every worker calls this with the same assignment; rank 0 alone talks to `dual` and writes files.

    Returns: the result (the content of result.json), or None when the trial was interrupted to be resumed later.
    Raises: NonFiniteError, CheckpointError and whatever training raises; nothing is written then but checkpoints.
    """
    return _Trial(workspace, assignment, dual).run()


class _Trial:
    """The state of `run_trial`, split into its phases."""

    def __init__(self, workspace: Workspace, assignment: Assignment, dual: DualClient) -> None:
        self.workspace, self.assignment, self.dual = workspace, assignment, dual
        config = workspace.config
        self.is_base = assignment.kind == "base"
        self.optimizer: dict[str, Any] = config["pretrain"] if self.is_base else config["primal"]
        self.folder = Path(assignment.base_dir if self.is_base else assignment.trial_dir)
        self.unit: str = config["thresholds"]["unit"]
        self.names = workspace.constraint_names if assignment.kind in ("constrained", "fixed_weights") else ()
        self.method: Method = METHODS[config["method"]](normalize=self.optimizer.get("normalize", True))
        self.fingerprint = assignment.fingerprint(config)
        self.started = time.time()
        self.first_step: float | None = None

    def run(self) -> dict[str, Any] | None:
        workspace, config = self.workspace, self.workspace.config
        base = None if self.is_base else workspace.load_base(Path(self.assignment.base_dir) / "model")
        calibration = None if self.is_base else read_json(Path(self.assignment.base_dir) / "calibration.json")
        if calibration is not None and calibration["data"] != workspace.data.fingerprint:
            raise ValueError(f"{self.assignment.base_dir}: trained on other data than there is now; remove the folder")
        workspace.fill(base)
        workspace.reset_scaler()
        trained, ema = workspace.modules()
        train = TrainState(trained, ema, self.optimizer, workspace.accelerator.scaler)
        problem = self._problem(calibration)
        reply = self._begin(train, problem)
        multipliers = torch.tensor(reply.multipliers, dtype=torch.float32, device=workspace.device)
        streams = workspace.streams(self.optimizer, self.names, config["seed"])
        shards = list(streams.shards_of(workspace.rank, workspace.world_size))
        shares = self._share_estimator(shards)
        sums = StreamSums(1 + len(self.names), workspace.device)
        interval = config["dual"]["primal_steps_per_dual_step"]
        status, grad_norm = "completed", 0.0
        trained.train()
        while train.primal_step < self.optimizer["steps"]:
            batch = make_batch(
                workspace.tensors, streams.draw(train.primal_step, shards), streams.batch_sizes, workspace.device
            )
            self.first_step = self.first_step or time.time()
            norm = primal_step(
                train,
                self.method,
                workspace.schedule,
                batch,
                multipliers,
                accelerator=workspace.accelerator,
                grad_clip=self.optimizer["grad_clip"],
                sums=sums,
            )
            if math.isfinite(norm):  # an fp16 update that the scaler skipped has none
                grad_norm = norm
            if train.primal_step % interval:
                continue
            measurement = self._measure(train, sums, shares, problem, reply, grad_norm)
            sums.reset()
            train.dual_step += 1
            reply = self._agree(
                lambda m=measurement: self.dual.report(
                    self.assignment.trial_id, self.assignment.attempt, train.dual_step, m
                )
            )
            multipliers.copy_(torch.tensor(reply.multipliers, dtype=torch.float32))
            if reply.directive == "interrupt" or train.dual_step % config["checkpoint_every_dual_steps"] == 0:
                self._checkpoint(train, reply)
            if reply.directive == "interrupt":
                return None
            if reply.directive == "stop":
                status = "stopped"
                break
        if self.is_base:
            return self._finish_base(train)
        if status == "stopped":  # the slot is wanted for the next point: no evaluation, no claim
            return self._summary(train, reply, status)
        return self._finish(train, problem, reply)

    # -- the problem ---------------------------------------------------------------------------------------------

    def _problem(self, calibration: dict[str, Any] | None) -> Problem:
        """Thresholds as numbers; fixed-weight runs are measured against the data's own share or the pretrained loss."""
        config, data = self.workspace.config, self.workspace.data
        constraints = []
        for name in self.names:
            if self.assignment.kind == "constrained":
                threshold = resolved_threshold(
                    self.assignment.thresholds[name], self.unit, pretrained=calibration["loss"][name]
                )
            else:
                # A hair below the prior: if every class is constrained the priors sum to 1, which a problem refuses.
                threshold = (
                    (1 - 1e-9) * data.prior[data.constraint_classes[name]]
                    if self.unit == "share"
                    else calibration["loss"][name]
                )
            constraints.append(Constraint(name=name, unit=self.unit, threshold=threshold, metric=self.unit))
        return Problem(
            method=config["method"],
            objective="denoising loss on the main set",
            constraints=tuple(constraints),
            domain=self.method.domain(constraints),
        )

    def _rule(self) -> tuple[dict[str, Any], list[float]]:
        dual = self.workspace.config["dual"]
        if self.assignment.kind == "fixed_weights":
            return {"rule": "fixed"}, [self.assignment.fixed_weight] * len(self.names)
        rule = {k: v for k, v in dual.items() if k not in ("start", "primal_steps_per_dual_step") and v is not None}
        return rule, [dual["start"]] * len(self.names)

    def _begin(self, train: TrainState, problem: Problem) -> Reply:
        """Restore the newest whole checkpoint if there is one, and tell the dual side where this attempt starts."""
        dual_state = None
        checkpoint = newest_checkpoint(self.folder, self.fingerprint)
        if checkpoint is not None:
            dual_state = train.restore(checkpoint, fingerprint=self.fingerprint)
        rule, start = self._rule()
        return self._agree(
            lambda: self.dual.begin(
                self.assignment.trial_id,
                self.assignment.attempt,
                problem=problem.to_dict(),
                rule=rule,
                start=start,
                dual_state=dual_state,
            )
        )

    def _agree(self, call: Callable[[], Reply]) -> Reply:
        """Rank 0 asks, every rank gets the answer."""
        if self.workspace.world_size == 1:
            return call()
        answer = [call() if self.workspace.rank == 0 else None]
        broadcast_object_list(answer, from_process=0)
        return answer[0]

    # -- primal and dual steps -----------------------------------------------------------------------------------

    def _share_estimator(self, shards: list[int]) -> tuple[ShareEstimator, list[int]] | None:
        if not self.names or self.unit != "share":
            return None
        workspace, share = self.workspace, self.workspace.config["share"]
        classes = [workspace.data.constraint_classes[name] for name in self.names]
        estimator = ShareEstimator(
            workspace.training_labeller,
            classes,
            workspace.schedule,
            num_samples=share["num_samples"],
            num_sampling_steps=share["num_sampling_steps"],
            seed=workspace.config["seed"],
            num_shards=self.optimizer["num_shards"],
        )
        return estimator, shards

    def _measure(
        self,
        train: TrainState,
        sums: StreamSums,
        shares: tuple[ShareEstimator, list[int]] | None,
        problem: Problem,
        reply: Reply,
        grad_norm: float,
    ) -> dict[str, Any]:
        """What the dual step sees: stream losses of the primal steps since the last one, and the constraint metrics."""
        accelerator = self.workspace.accelerator
        table = (accelerator.reduce(sums.table, "sum") if self.workspace.world_size > 1 else sums.table).cpu().numpy()
        objective, objective_stderr = mean_and_stderr(*table[0])
        measured = self._pooled_shares(train, *shares) if shares is not None else loss_measurement(table)
        thresholds = problem.thresholds if self.unit == "loss" else np.zeros(len(self.names))
        stream_losses = [row[0] / row[2] for row in table[1:]]
        return {
            "primal_step": train.primal_step,
            "wall_time": time.time(),
            "lr": train.lr,
            "grad_norm": grad_norm,
            "objective": objective,
            "objective_stderr": objective_stderr,
            # In loss units: thresholds of another unit are constants of the model and left out.
            "lagrangian": objective + float(np.dot(reply.multipliers, np.asarray(stream_losses) - thresholds)),
            "metrics": measured.metrics,
            "metric_stderrs": measured.stderrs,
            "counts": measured.counts,
        }

    def _pooled_shares(self, train: TrainState, estimator: ShareEstimator, shards: list[int]) -> Measurement:
        workspace = self.workspace
        _, ema = workspace.modules()
        table = estimator.table(ema, dual_step=train.dual_step, shards=shards, shape=workspace.data.sample_shape)
        if workspace.world_size > 1:
            table = workspace.accelerator.reduce(torch.from_numpy(table).to(workspace.device), "sum").cpu().numpy()
        window = [*train.extra.get("share_window", []), table.tolist()][-workspace.config["share"]["window"] :]
        train.extra["share_window"] = window
        return share_measurement(np.sum(window, axis=0))

    def _checkpoint(self, train: TrainState, reply: Reply) -> None:
        if self.workspace.rank == 0:
            folder = self.folder / "checkpoints" / f"step-{train.dual_step:06d}"
            folder.parent.mkdir(parents=True, exist_ok=True)
            train.save(folder, dual_state=reply.dual_state, fingerprint=self.fingerprint)
            for old in sorted(folder.parent.glob("step-??????"))[:-KEPT_CHECKPOINTS]:
                shutil.rmtree(old, ignore_errors=True)
            self.dual.checkpointed(self.assignment.trial_id, self.assignment.attempt, train.dual_step, str(folder))
        self.workspace.accelerator.wait_for_everyone()

    # -- the end -------------------------------------------------------------------------------------------------

    def _finish_base(self, train: TrainState) -> dict[str, Any] | None:
        workspace = self.workspace
        result = None
        if workspace.rank == 0:
            ema = workspace.modules()[1]
            calibration = calibrate(workspace, ema)
            write_base(self.folder, lambda folder: save_model(ema, workspace.schedule, folder), calibration)
            result = {
                "trial_id": self.assignment.trial_id,
                "label": self.assignment.label,
                "kind": "base",
                "status": "completed",
                "error": None,
                "primal_steps": train.primal_step,
                "dual_steps": train.dual_step,
                "wall_seconds": time.time() - self.started,
                "calibration": calibration,
            }
            shutil.rmtree(self.folder / "checkpoints", ignore_errors=True)
        workspace.accelerator.wait_for_everyone()
        return result

    def _finish(self, train: TrainState, problem: Problem, reply: Reply) -> dict[str, Any] | None:
        workspace, config, data = self.workspace, self.workspace.config, self.workspace.data
        result = None
        if workspace.rank == 0:
            ema = workspace.modules()[1]
            evaluation = evaluate(
                ema,
                unit=self.unit,
                classes=[data.constraint_classes[name] for name in workspace.constraint_names],
                held_out_main=data.held_out_main.samples,
                held_out_constraints=list(data.held_out_constraints.values()),
                base_errors=workspace.base_errors(config["seed"]),
                schedule=workspace.schedule,
                labeller=workspace.evaluation_labeller,
                sample_shape=data.sample_shape,
                config=config["evaluation"],
                seed=config["seed"],
            )
            result = self._result(train, problem, reply, evaluation)
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomically(self.folder / "model", lambda folder: save_model(ema, workspace.schedule, folder))
            np.save(self.folder / "samples.npy", evaluation.samples.astype(np.float32))
            np.save(self.folder / "held_out_errors.npy", evaluation.held_out_errors)
        workspace.accelerator.wait_for_everyone()
        return result

    def _summary(self, train: TrainState, reply: Reply, status: str) -> dict[str, Any]:
        """The part of a result that needs no evaluation."""
        state = DualState.from_dict(reply.dual_state) if self.names else None
        exact = self._exact()
        return {
            "trial_id": self.assignment.trial_id,
            "label": self.assignment.label,
            "kind": self.assignment.kind,
            "status": status,
            "error": None,
            "method": self.workspace.config["method"],
            "unit": self.unit,
            "thresholds": self.assignment.thresholds,
            "fixed_weight": self.assignment.fixed_weight,
            "multipliers": dict(zip(self.names, reply.multipliers, strict=True)),
            "averaged_multipliers": self._averaged_multipliers(),
            "exact_multipliers": dict(zip(self.names, exact.tolist(), strict=True)) if exact is not None else None,
            "relaxations": dict(zip(self.names, state.relaxations.tolist(), strict=True)) if state else {},
            "primal_steps": train.primal_step,
            "dual_steps": train.dual_step,
            "wall_seconds": time.time() - self.started,
            "startup_seconds": self.first_step - self.assignment.handed_over
            if self.first_step and self.assignment.handed_over
            else None,
            "objective": None,
            "exact_objective": class_restriction_objective(exact, self._prior()) if exact is not None else None,
            "constraints": [],
            "certificate": None,
            "histogram": None,
        }

    def _averaged_multipliers(self) -> dict[str, float]:
        """Mean over the last third of the dual steps: what noisy multipliers settle around."""
        if not self.names or self.workspace.rank != 0:
            return {}
        rows = self.dual.trace(self.assignment.trial_id)
        late = [row["multipliers"] for row in rows[-max(1, len(rows) // 3) :]]
        return dict(zip(self.names, np.mean(late, axis=0).tolist(), strict=True)) if late else {}

    def _result(self, train: TrainState, problem: Problem, reply: Reply, evaluation: Evaluation) -> dict[str, Any]:
        workspace, config, measurement = self.workspace, self.workspace.config, evaluation.measurement
        certificate = None
        if self.assignment.kind == "constrained":
            certificate = certify(
                problem,
                DualState.from_dict(reply.dual_state),
                problem.violation(measurement.metrics),
                measurement.stderrs,
                measurement.counts,
                tolerance=config["evaluation"]["tolerance"],
                confidence=config["evaluation"]["confidence"],
            ).to_dict()
        classes = range(len(workspace.data.class_names))
        labeller = workspace.evaluation_labeller
        return {
            **self._summary(train, reply, "completed"),
            "objective": {
                "value": evaluation.objective,
                "stderr": evaluation.objective_stderr,
                "unit": "nats",
                "meaning": "KL(q||p) above the pretrained model's, on held-out main data",
            },
            "constraints": self._constraint_rows(problem, measurement),
            "certificate": certificate,
            "histogram": {
                "classes": [str(name) for name in workspace.data.class_names],
                "prior": [workspace.data.prior.get(index, 0.0) for index in classes],
                "counts": evaluation.class_counts,
                "total": sum(evaluation.class_counts),
                "classifier": labeller.description,
                "classifier_accuracy": labeller.accuracy,
                "classifier_accuracy_count": labeller.accuracy_count,
            },
        }

    def _exact(self) -> np.ndarray | None:
        """The optimal multipliers where a closed form exists: class restrictions asked for in shares (methods.md H1)."""
        rule = self.workspace.config["dual"]
        if self.assignment.kind != "constrained" or self.unit != "share":
            return None
        epsilon = [-np.log(self.assignment.thresholds[name]) for name in self.names]
        if rule["rule"] in ("resilient", "resilient_explicit"):
            return resilient_class_restriction_multipliers(epsilon, self._prior(), rule["relaxation_cost"])
        return class_restriction_multipliers(epsilon, self._prior())

    def _prior(self) -> list[float]:
        data = self.workspace.data
        return [data.prior[data.constraint_classes[name]] for name in self.names]

    def _constraint_rows(self, problem: Problem, measurement: Measurement) -> list[dict[str, Any]]:
        asked = {c.name: c for c in problem.constraints} if self.assignment.kind == "constrained" else {}
        rows = []
        for name, metric, stderr, count in zip(
            self.workspace.constraint_names, measurement.metrics, measurement.stderrs, measurement.counts, strict=True
        ):
            scale = asked.get(name) or Constraint(name=name, unit=self.unit, threshold=0.5)
            threshold = scale.canonical_threshold if name in asked else None
            rows.append(
                {
                    "name": name,
                    "unit": self.unit,
                    "metric": metric,
                    "metric_stderr": stderr,
                    "threshold": threshold,
                    "user_threshold": scale.threshold if name in asked else None,
                    "user_value": scale.to_user(metric),
                    "user_stderr": scale.to_user_stderr(metric, stderr),
                    "violation": metric - threshold if threshold is not None else None,
                    "stderr": stderr,
                    "count": count,
                }
            )
        return rows


def calibrate(workspace: Workspace, denoiser: torch.nn.Module) -> dict[str, Any]:
    """The pretrained model's own loss on every constraint set, with standard errors: the scale of relative thresholds."""
    losses, stderrs = {}, {}
    for name, samples in workspace.data.constraints.items():
        row = denoising_losses(
            denoiser, samples, workspace.schedule, draws=CALIBRATION_DRAWS, seed=workspace.config["seed"]
        )
        losses[name], stderrs[name] = mean_and_stderr(*row)
    return {"loss": losses, "loss_stderr": stderrs, "draws": CALIBRATION_DRAWS, "data": workspace.data.fingerprint}


def newest_checkpoint(folder: Path, fingerprint: str | None) -> Path | None:
    """The newest checkpoint that is whole; a damaged one is passed over for the one before, and refused if it is the last.

    Raises: CheckpointError when checkpoints exist but none can be used.
    """
    problem: CheckpointError | None = None
    for candidate in sorted((folder / "checkpoints").glob("step-??????"), reverse=True):
        try:
            read_checkpoint_meta(candidate, fingerprint=fingerprint)
        except CheckpointError as error:
            problem = problem or error
        else:
            return candidate
    if problem is not None:
        raise problem
    return None


def write_atomically(folder: Path, write: Callable[[Path], None]) -> None:
    """Fill a folder beside its place and move it there, so that it is whole or absent."""
    part = folder.with_name(folder.name + f".part{os.getpid()}")
    shutil.rmtree(part, ignore_errors=True)
    write(part)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(part, folder)


def write_base(folder: Path, save: Callable[[Path], None], calibration: dict[str, Any]) -> None:
    """Model first, calibration last: a base folder counts as complete once calibration.json is there."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "model", save)
    write_json(folder / "calibration.json", calibration)


def write_json(path: Path, value: Any) -> None:
    part = path.with_name(path.name + f".part{os.getpid()}")
    part.write_text(json.dumps(value, indent=1), encoding="utf-8")
    os.replace(part, path)
