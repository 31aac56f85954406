"""One grid point is one Tune trial; one Tune actor keeps one warm worker group and passes trial after trial to it."""

import time
import uuid
from pathlib import Path
from typing import Any

from ray import tune

from dualsweep.orchestration.config import SweepConfig, point_for_search
from dualsweep.orchestration.dual_server import find_dual_server
from dualsweep.orchestration.frontier import outcome_of
from dualsweep.orchestration.worker_group import WorkerGroup
from dualsweep.trainers.assignment import Assignment

AT_THE_END = 2**53  # more dual steps than a trial has: one result, its last
POLL_S = 5.0  # how long one wait inside the DualServer lasts before Tune's actor looks at its worker group


class SweepTrial(tune.Trainable):
    """See the module. `config`: sweep (the resolved config), folder, report_every (dual steps from one result to the next,
    None: only the last), base_dir, constraint_names, own_ray (Ray runs for this sweep alone), and the point or searched
    thresholds."""

    def setup(self, config: dict[str, Any]) -> None:
        self.slot = uuid.uuid4().hex[:8]
        self.sweep = SweepConfig.from_dict(config["sweep"])
        self.folder = Path(config["folder"])
        self.server = find_dual_server(self.folder)
        self._hand_over(config)
        self.group = WorkerGroup(self.slot, self.sweep, self.folder, own_ray=config["own_ray"])

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self._hand_over(new_config)
        return True

    def _hand_over(self, config: dict[str, Any]) -> None:
        point = config.get("point") or point_for_search(
            self.sweep, tuple(config["constraint_names"]), config["thresholds"]
        )
        self.trial = point["trial_id"]
        every = config["report_every"] if point["kind"] != "base" else None
        self.report_every = every or AT_THE_END
        self.reached = 0
        assignment = Assignment(
            trial_id=point["trial_id"],
            label=point["label"],
            kind=point["kind"],
            attempt=0,
            thresholds=point["thresholds"],
            fixed_weight=point["fixed_weight"],
            trial_dir=str(trial_dir(self.folder, point)),
            base_dir=config["base_dir"],
            handed_over=time.time(),
            start=point.get("start"),
        )
        self.server.call("assign", self.slot, assignment.to_dict(), self.sweep.compute.max_failures)

    def step(self) -> dict[str, Any]:
        """The next milestone of the trial, `report_every` dual steps on, or its end."""
        while True:
            milestone, last = self.reached + self.report_every, self.sweep.dual_steps
            progress = self.server.call("progress", self.trial, self.reached, self.report_every, POLL_S, last)
            ended = progress["status"] != "running"
            if ended or milestone <= progress["reached"] != last:
                break
            if not self.group.alive:
                raise RuntimeError(
                    f"the worker group of slot {self.slot} ended: {self.group.error!r}"
                ) from self.group.error
        self.reached = progress["reached"]
        outcome = outcome_of(progress["result"])
        return {
            **_scores(progress["row"]),
            "outcome": None if outcome is None else outcome.to_json(),
            "trial": self.trial,
            "status": progress["status"],
            "dual_step": self.reached,
            "done": ended,
        }

    def cleanup(self) -> None:
        """Close the slot and wait for the group to leave, so that its resources are free when Tune says so."""
        self.server.call("assign", self.slot, None)
        self.group.join()

    def save_checkpoint(self, checkpoint_dir: str) -> dict[str, Any]:
        """A pointer: the model's checkpoints belong to the trial's own folder."""
        return {"trial": self.trial, "reached": self.reached}

    def load_checkpoint(self, checkpoint: dict[str, Any] | None) -> None:
        return None


def trial_dir(folder: Path, point: dict[str, Any]) -> Path:
    """Where a trial's workers write. The pretraining's checkpoints are this sweep's own, though its model is shared; they
    lie apart from the trials, which a report reads."""
    return folder / point["trial_id"] if point["kind"] == "base" else folder / "trials" / point["trial_id"]


def _scores(row: dict[str, Any] | None) -> dict[str, float]:
    """What schedulers and search algorithms may compare; the worst violation of a run without constraints is 0."""
    keys = ("lagrangian", "objective", "kkt_residual")
    if row is None:
        return {**{key: float("inf") for key in keys}, "worst_violation": float("inf")}
    return {**{key: float(row[key]) for key in keys}, "worst_violation": max(row["smoothed_violations"], default=0.0)}
