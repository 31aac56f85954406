"""A worker's round: lease, train, report the end, lease the next; a failed trial is recorded and the next one runs."""

import json
from dataclasses import replace

from dualsweep.orchestration.config import SweepConfig
from dualsweep.orchestration.local_dual import LocalDual
from dualsweep.trainers.assignment import Assignment
from dualsweep.trainers.worker import serve

CONFIG = SweepConfig.from_dict(
    {
        "name": "served",
        "data": {
            "dataset": "gaussian_mixture",
            "means": [[-1.0, 0.0], [1.0, 0.5]],
            "stds": [0.3, 0.2],
            "weights": [0.8, 0.2],
            "count": 100,
            "minority": {"classes": [1]},
        },
        "model": {"kind": "mlp", "width": 16, "depth": 1},
        "schedule": {"num_train_timesteps": 50, "beta_end": 0.2},
        "pretrain": {"steps": 4, "batch_size": 16, "warmup_steps": 1},
        "primal": {"steps": 4, "batch_size": 16, "warmup_steps": 1},
        "dual": {"rule": "ascent", "step_size": 0.05, "primal_steps_per_dual_step": 2},
        "measure": {"num_samples": 16, "num_sampling_steps": 2},
        "evaluation": {"num_samples": 16, "num_sampling_steps": 2, "noise_levels": 4},
        "thresholds": {"unit": "share", "grid": {"minority": [0.3]}},
    }
)


class Queue(LocalDual):
    """The DualServer's part in `serve`: hands out a list of assignments and notes how each ended."""

    def __init__(self, assignments: list[Assignment], stop_at: dict[str, str]) -> None:
        super().__init__()
        self.waiting, self.directives, self.leases, self.ends = assignments, stop_at, [], []

    def lease(self, slot, finished, workers=1):
        self.leases.append((slot, finished))
        return self.waiting.pop(0).to_dict() if self.waiting else None

    def end(self, trial_id, attempt, status, *, result=None, error=None):
        self.ends.append((trial_id, attempt, status, result, error))

    def report(self, trial_id, attempt, dual_step, measurement):
        super().report(trial_id, attempt, dual_step, measurement)
        if trial_id in self.directives:
            self.ledger.apply({"kind": "directive", "trial": trial_id, "directive": self.directives[trial_id]})
        return self.ledger.reply(trial_id)


def test_data_that_this_machine_lacks_fail_the_trial_by_name_and_not_its_worker(tmp_path):
    spec = replace(CONFIG.data, dataset="folder", path=str(tmp_path / "nowhere"))
    given = {"label": "", "attempt": 1, "thresholds": {}, "fixed_weight": None}
    folders = {"trial_dir": str(tmp_path / "trial"), "base_dir": str(tmp_path / "base")}
    trials = [Assignment(trial_id=name, kind="base", **given, **folders) for name in ("first", "second")]
    queue = Queue(trials, {})
    serve(queue, "slot-0", CONFIG.to_dict(), spec, num_threads=1)
    assert [(trial_id, status) for trial_id, _, status, _, _ in queue.ends] == [
        ("first", "failed"),
        ("second", "failed"),
    ]
    assert "nowhere" in queue.ends[0][4] and queue.leases[-1] == ("slot-0", "second")


def leaf_types(value):
    if isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from leaf_types(inner)
    else:
        yield type(value)


def test_a_worker_takes_one_assignment_after_the_other_and_records_how_each_ended(tmp_path):
    def assignment(trial_id, kind, **changes):
        given = {
            "trial_id": trial_id,
            "label": trial_id,
            "kind": kind,
            "attempt": 1,
            "thresholds": {"component_1": 0.3} if kind == "constrained" else {},
            "fixed_weight": None,
            "trial_dir": str(tmp_path / trial_id),
            "base_dir": str(tmp_path / "base"),
        }
        return Assignment(**given | changes)

    queue = Queue(
        [
            assignment("base", "base"),
            assignment("unnamed", "constrained", thresholds={}),  # a threshold is missing
            assignment("diverging", "fixed_weights", fixed_weight=float("inf")),
            assignment("stopped", "constrained"),
            assignment("interrupted", "constrained"),
            assignment("good", "constrained", attempt=2),
        ],
        {"stopped": "stop", "interrupted": "interrupt"},
    )
    serve(queue, "slot-0", CONFIG.to_dict(), CONFIG.data, num_threads=1)
    ends = {trial_id: (attempt, status) for trial_id, attempt, status, _, _ in queue.ends}
    assert ends["base"] == (1, "completed")
    assert ends["unnamed"] == (1, "failed")
    assert ends["diverging"] == (1, "diverged")
    assert ends["stopped"] == (1, "stopped")
    assert ends["interrupted"] == (1, "interrupted")
    assert ends["good"] == (2, "completed")
    # A trial that met a number that is not finite is not named as finished: it may be handed out again.
    order = ["base", "unnamed", None, "stopped", "interrupted", "good"]
    assert queue.leases == [("slot-0", name) for name in [None, *order]]
    by_name = {trial_id: (result, error) for trial_id, _, _, result, error in queue.ends}
    assert "Traceback" in by_name["unnamed"][1] and "component_1" in by_name["unnamed"][1]
    assert by_name["interrupted"] == (None, None)
    assert json.loads(json.dumps(by_name["good"][0])) == by_name["good"][0]
    assert set(leaf_types(by_name["good"][0])) <= {str, int, float, bool, type(None)}  # no NumPy number left
