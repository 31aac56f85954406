"""TrainState: everything of a trial that a restart needs, and its checkpoint, complete or absent."""

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from dualsweep.trainers.store import in_place_of

CHECKPOINT_VERSION = 1


class CheckpointError(ValueError):
    """A checkpoint is damaged or belongs to something else; the message names the file and the remedy."""


class TrainState:
    """Model, EMA, optimizer, learning rate and counters of one trial.

    Samples, timesteps and noise come from counters (seed, stream, step, shard), so `primal_step` is also the position of
    every stream. `extra` holds small JSON-able state of the estimators (pooled counts of the share estimate, say).
    """

    def __init__(
        self,
        denoiser: torch.nn.Module,
        ema_denoiser: torch.nn.Module,
        optimizer_config: dict[str, Any],
        scaler: Any = None,
    ) -> None:
        from diffusers.training_utils import EMAModel  # here: see NoiseSchedule

        self.denoiser = denoiser
        self.ema_denoiser = ema_denoiser
        self.config = optimizer_config
        self.optimizer = torch.optim.AdamW(
            denoiser.parameters(), lr=optimizer_config["lr"], weight_decay=optimizer_config["weight_decay"], fused=True
        )
        # The EMA's shadow parameters *are* the second module's, so sampling from the EMA copies nothing.
        self.ema = EMAModel(ema_denoiser.parameters(), decay=optimizer_config["ema_decay"], foreach=True)
        self.ema.shadow_params = [p.requires_grad_(False) for p in ema_denoiser.parameters()]
        self.scaler = scaler
        self.primal_step = 0
        self.dual_step = 0
        self.extra: dict[str, Any] = {}
        self._set_lr()

    @property
    def lr(self) -> float:
        """Learning rate of the next update: linear warm-up, then cosine to final_lr_fraction."""
        steps, warmup, end = self.config["steps"], self.config["warmup_steps"], self.config["final_lr_fraction"]
        if self.primal_step < warmup:
            return self.config["lr"] * (self.primal_step + 1) / (warmup + 1)
        progress = min(1.0, (self.primal_step - warmup) / max(1, steps - warmup))
        return self.config["lr"] * (end + (1 - end) * 0.5 * (1 + math.cos(math.pi * progress)))

    def follow(self, optimizer_config: dict[str, Any]) -> None:
        """Take the course of the learning rate that these settings give, at the step where the run is."""
        self.config = optimizer_config
        self._set_lr()

    def advance(self) -> None:
        """After an update: EMA, counter, learning rate."""
        self.ema.step(self.denoiser.parameters())
        self.primal_step += 1
        self._set_lr()

    def _set_lr(self) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr

    def tensors(self) -> dict[str, torch.Tensor]:
        """Flat, contiguous CPU tensors under stable names."""
        names = [name.removeprefix("module.") for name, _ in self.denoiser.named_parameters()]
        found = {f"model.{n.removeprefix('module.')}": t for n, t in self.denoiser.state_dict().items()}
        found |= {f"ema.{n}": t for n, t in self.ema_denoiser.state_dict().items()}
        for name, parameter in zip(names, self.denoiser.parameters(), strict=True):
            for key, value in self.optimizer.state.get(parameter, {}).items():
                found[f"optimizer.{key}.{name}"] = value
        return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in found.items()}

    def save(self, folder: Path, *, dual_state: dict[str, Any] | None, fingerprint: str) -> None:
        """Write the checkpoint beside `folder` and move it into place, so that it is complete or absent.

        Args:
            dual_state: the DualServer's state at this dual step, stored for the rewind on restore.
            fingerprint: identity of the trial (config and thresholds); a checkpoint of another trial is refused.
        Raises: StorageError when it cannot be written; nothing is left of it then.
        """
        with in_place_of(folder) as part:
            part.mkdir()
            self._write(part, dual_state, fingerprint)

    def _write(self, part: Path, dual_state: dict[str, Any] | None, fingerprint: str) -> None:
        save_file(self.tensors(), part / "tensors.safetensors")
        meta = {
            "version": CHECKPOINT_VERSION,
            "fingerprint": fingerprint,
            "primal_step": self.primal_step,
            "dual_step": self.dual_step,
            "dual_state": dual_state,
            "ema_step": self.ema.optimization_step,
            "scaler": self.scaler.state_dict() if self.scaler is not None else None,
            "extra": self.extra,
            "sha256": _file_digest(part / "tensors.safetensors"),
        }
        meta["digest"] = _meta_digest(meta)
        (part / "state.json").write_text(json.dumps(meta), encoding="utf-8")

    def restore(self, folder: Path, *, fingerprint: str) -> dict[str, Any] | None:
        """Load a checkpoint in place.

        Returns: the dual state stored with it.
        Raises: CheckpointError naming the file for anything missing, cut short, changed or foreign.
        """
        meta = read_checkpoint_meta(folder, fingerprint=fingerprint)
        tensors = load_file(folder / "tensors.safetensors")
        try:
            prefix = "module." if any(n.startswith("module.") for n, _ in self.denoiser.named_parameters()) else ""
            self.denoiser.load_state_dict({prefix + n[6:]: t for n, t in tensors.items() if n.startswith("model.")})
            self.ema_denoiser.load_state_dict({n[4:]: t for n, t in tensors.items() if n.startswith("ema.")})
            self.optimizer.state.clear()
            for name, parameter in self.denoiser.named_parameters():
                name = name.removeprefix("module.")
                slots = {
                    k: tensors[f"optimizer.{k}.{name}"]
                    for k in ("step", "exp_avg", "exp_avg_sq")
                    if f"optimizer.{k}.{name}" in tensors
                }
                if slots:
                    self.optimizer.state[parameter] = {k: v.to(parameter.device, copy=True) for k, v in slots.items()}
        except (RuntimeError, KeyError) as error:
            raise CheckpointError(
                f"checkpoint {folder}: its tensors do not fit the model: {error}; remove it to start again"
            ) from error
        self.ema.optimization_step = meta["ema_step"]
        if self.scaler is not None and meta["scaler"] is not None:
            self.scaler.load_state_dict(meta["scaler"])
        self.primal_step, self.dual_step, self.extra = meta["primal_step"], meta["dual_step"], meta["extra"]
        self._set_lr()
        return meta["dual_state"]


def read_checkpoint_meta(folder: Path, *, fingerprint: str | None = None) -> dict[str, Any]:
    """Check a checkpoint whole and return its metadata.

    Raises: CheckpointError naming the file, what is wrong and the remedy.
    """
    remedy = "remove the folder to start this trial again, or restore the file"
    try:
        meta = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        digest = _file_digest(folder / "tensors.safetensors")
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"checkpoint {folder}: not readable ({error}); {remedy}") from error
    if not isinstance(meta, dict) or meta.get("version") != CHECKPOINT_VERSION:
        raise CheckpointError(f"checkpoint {folder}: written by another version; {remedy}")
    if meta.get("digest") != _meta_digest(meta):
        raise CheckpointError(f"checkpoint {folder / 'state.json'}: corrupted; {remedy}")
    if digest != meta.get("sha256"):
        raise CheckpointError(
            f"checkpoint {folder / 'tensors.safetensors'}: corrupted (its checksum does not match state.json); {remedy}"
        )
    if fingerprint is not None and meta.get("fingerprint") != fingerprint:
        raise CheckpointError(f"checkpoint {folder}: belongs to another configuration of this trial; {remedy}")
    try:
        load_file(folder / "tensors.safetensors")
    except SafetensorError as error:
        raise CheckpointError(f"checkpoint {folder / 'tensors.safetensors'}: {error}; {remedy}") from error
    return meta


def _meta_digest(meta: dict[str, Any]) -> str:
    rest = {key: value for key, value in meta.items() if key != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _file_digest(path: Path) -> str:
    with open(path, "rb") as source:
        return hashlib.file_digest(source, "sha256").hexdigest()
