"""What a worker group is told to train. Light to import: the trial's driver needs it and none of torch."""

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any

# What the training of a trial depends on, apart from its point.
TRAINING_SECTIONS = (
    "method",
    "seed",
    "data",
    "model",
    "schedule",
    "pretrain",
    "primal",
    "dual",
    "formulation",
    "measure",
)


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """One trial as the worker group receives it; plain values, so it travels as JSON."""

    trial_id: str
    label: str
    kind: str  # base, unconstrained, constrained, fixed_weights
    attempt: int
    thresholds: dict[str, Any]  # user unit, or {"factor": f} of the pretrained model's value
    fixed_weight: float | None
    trial_dir: str
    base_dir: str
    handed_over: float = 0.0  # unix time at which Tune handed the grid point over
    # What it starts from instead of the pretrained model and `dual.start`: {"trial": whose model, a folder beside
    # trial_dir, "label": its label, "multipliers": {constraint: value}, "steps_before": primal steps of the chain up to it,
    # whose draws are not taken again}. Part of what the trial is: a retry has the same.
    start: dict[str, Any] | None = None

    known_steps: int | None = None  # dual steps whose rows the server has; a checkpoint beyond them is not used

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def fingerprint(self, config: dict[str, Any]) -> str:
        """What a checkpoint must agree with to be resumed from: the point and every setting the training depends on."""
        parts = [
            {key: config[key] for key in TRAINING_SECTIONS},
            self.trial_id,
            self.kind,
            self.thresholds,
            self.fixed_weight,
        ]
        if self.start is not None:  # so that checkpoints of cold starts, older ones too, keep their fingerprint
            parts.append(self.start)
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
