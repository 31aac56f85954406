"""What a worker process keeps from trial to trial: data, labellers, modules and the pretrained weights.

Paid for once a process, so that a trial after the first starts in milliseconds.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from dualsweep.constraints import NonFiniteError
from dualsweep.datasets import ConstrainedData, DatasetSpec, Streams, build
from dualsweep.trainers.codec import Codec, open_codec
from dualsweep.trainers.evaluate import weighted_errors
from dualsweep.trainers.labellers import Labeller, evaluation_labeller, training_labeller
from dualsweep.trainers.methods import METHODS, Method, Setting
from dualsweep.trainers.models import Denoiser, build_denoiser, load_model
from dualsweep.trainers.noise_schedule import NoiseSchedule
from dualsweep.trainers.prompts import Prompts, open_prompts
from dualsweep.trainers.store import Store, in_place_of

PRECISIONS = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}


class Workspace:
    """Caches of one worker process for one sweep; `config` is the sweep's resolved config as a dictionary."""

    def __init__(self, config: dict[str, Any], data_spec: DatasetSpec, store: Store | None = None) -> None:
        from accelerate import Accelerator  # here: see NoiseSchedule

        precision = config["primal"]["precision"]
        if precision == "fp16" and not torch.cuda.is_available():
            precision = "fp32"  # preflight refused a mixed setting already; the CPU has no fp16 scaler
        self.config = config
        self.store = store  # None: all paths are the storage itself
        self.accelerator = Accelerator(mixed_precision=PRECISIONS[precision], cpu=not torch.cuda.is_available())
        self.device = self.accelerator.device
        self.schedule = schedule_of(config)
        self.codec = open_codec(config["model"], self.device)
        self.images: ConstrainedData = build(data_spec)
        kept = store or Store(Path(config["storage"]))
        self.data = self.codec.encoded(self.images, kept)  # as the network sees them
        self.formulation: type[Method] = METHODS[config["method"]]
        self.options = self.formulation.options(config["formulation"])
        self.set_names: tuple[str, ...] = tuple(self.data.constraints)
        self.constraint_names = self.formulation.constraint_names(self.set_names, self.options)
        prompts = open_prompts(config["model"], self.pretraining_sets)
        self.prompts = prompts and prompts.embeddings(kept, self.device)
        self.fingerprint = fingerprint_of(self.images, self.codec, prompts)
        self.tensors = {"main": torch.from_numpy(self.data.main.samples).to(self.device)}
        self.tensors |= {name: torch.from_numpy(x).to(self.device) for name, x in self.data.constraints.items()}
        self._modules: tuple[nn.Module, Denoiser] | None = None
        self._base: Denoiser | None = None
        self._base_dir: Path | None = None
        self._calibration: dict[str, Any] | None = None
        self._cache: dict[str, Any] = {}
        self._first_scale: dict[str, Any] | None = None
        self._base_errors: dict[int, np.ndarray] = {}
        self._training_labeller: Labeller | None = None
        self._evaluation_labeller: Labeller | None = None

    @property
    def pretraining_sets(self) -> tuple[str, ...]:
        """What the pretrained model learns from."""
        return self.formulation.pretraining_sets(self.set_names, self.config["thresholds"]["unit"])

    @property
    def rank(self) -> int:
        return self.accelerator.process_index

    @property
    def world_size(self) -> int:
        return self.accelerator.num_processes

    @property
    def defers_checks(self) -> bool:
        """Whether the loop looks once a dual step if its primal steps were sound; elsewhere looking at once costs nothing."""
        return self.device.type != "cpu" and self.accelerator.scaler is None

    @property
    def training_labeller(self) -> Labeller:
        self._training_labeller = self._training_labeller or training_labeller(self.images)
        return self._training_labeller

    @property
    def evaluation_labeller(self) -> Labeller:
        self._evaluation_labeller = self._evaluation_labeller or evaluation_labeller(
            self.images, seed=self.config["seed"]
        )
        return self._evaluation_labeller

    def modules(self) -> tuple[nn.Module, Denoiser]:
        """The trained module (wrapped for several workers) and the EMA module, built once and refilled a trial."""
        if self._modules is None:
            self._modules = (self._to_device(self._fresh()), self._to_device(self._fresh()))
            if self.world_size > 1:
                self._modules = (self.accelerator.prepare_model(self._modules[0]), self._modules[1])
            if self.config["model"]["compile"]:
                for module in self._modules:
                    module.compile()
        return self._modules

    def _fresh(self) -> Denoiser:
        pretrained = self.config["model"]["pretrained"]
        if pretrained:
            return load_model(pretrained, self.prompts)
        torch.manual_seed(self.config["seed"])
        streams = self.pretraining_sets
        conditions = len(streams) if len(streams) > 1 else 0
        return build_denoiser(self.config["model"], self.data.sample_shape, self.schedule, num_conditions=conditions)

    def _to_device(self, module: Denoiser) -> Denoiser:
        memory_format = torch.channels_last if self.config["model"]["channels_last"] else torch.preserve_format
        return module.to(self.device, memory_format=memory_format)

    def load_base(self, folder: Path) -> Denoiser:
        """The pretrained model every trial continues from, loaded once.

        Raises: ValueError when it was trained on other data than there is now.
        """
        if self._base is None:
            if self.store is not None:
                self.store.fetch(folder / "model")
                self.store.fetch_files(folder)
            try:
                trained_on = read_json(folder / "base.json")["data"]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{folder / 'base.json'}: damaged ({error}); remove the folder to train it again"
                ) from error
            if trained_on != self.fingerprint:
                raise ValueError(
                    f"{folder}: trained on other data than there is now, or on latents of another autoencoder; remove the folder"
                )
            self._base = self._to_device(load_model(folder / "model")).requires_grad_(False).eval()
            self._base_dir = folder
        return self._base

    @property
    def calibration(self) -> dict[str, Any]:
        """The pretrained model's own metrics in the sweep's unit, measured once and kept beside the model.

        Keys: unit, and by constraint name metrics (natural direction, see `metrics`), stderrs and counts.
        """
        if self._calibration is None:
            parts = {k: self.config[k] for k in ("method", "formulation", "measure", "seed")}
            parts["unit"] = self.config["thresholds"]["unit"]
            self._calibration = self._beside_base("calibration", parts, self._calibrated)
        return self._calibration

    def _calibrated(self) -> dict[str, Any]:
        found = self.formulation(self.setting(self.constraint_names, self.config["primal"])).calibrate()
        values = {
            key: dict(zip(self.constraint_names, getattr(found, key), strict=True))
            for key in ("metrics", "stderrs", "counts")
        }
        if not np.isfinite([*found.metrics, *found.stderrs]).all():  # kept, it would spoil every trial to come
            raise NonFiniteError(f"calibration of the pretrained model is not finite: {values}; look at the data")
        return {"unit": self.config["thresholds"]["unit"], **values}

    def _beside_base(self, what: str, parts: dict[str, Any], measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What `measure` finds of the pretrained model with the settings `parts`, measured once and kept beside it as JSON."""
        digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
        path = self._base_dir / f"{what}-{digest}.json"
        if _readable(path) is None:
            write_json(path, measure())
            if self.store is not None:
                self.store.push(path)
        return read_json(path)

    def setting(self, names: tuple[str, ...], optimizer: dict[str, Any], *, pretraining: bool = False) -> Setting:
        """What a formulation with these constraints is built from; `pretraining` narrows the streams to the base model's."""
        tensors = self.tensors
        if pretraining:
            tensors = {name: tensors[name] for name in self.pretraining_sets}
        return Setting(
            data=self.data,
            schedule=self.schedule,
            base=None if pretraining else self._base,
            names=names,
            unit=self.config["thresholds"]["unit"],
            options=self.options,
            optimizer=optimizer,
            measure=self.config["measure"],
            seed=self.config["seed"],
            device=self.device,
            tensors=tensors,
            labeller=lambda: self.training_labeller,
            codec=self.codec,
            cache=self._cache,
            evaluation_steps=self.config["evaluation"]["num_sampling_steps"],
        )

    def base_errors(self, seed: int) -> np.ndarray:
        """Held-out errors of the pretrained model, measured once a seed and kept beside the model."""
        if seed not in self._base_errors:
            levels = self.config["evaluation"]["noise_levels"]
            kept = self._beside_base("errors", {"levels": levels, "seed": seed}, lambda: self._base_errors_of(levels, seed))
            self._base_errors[seed] = np.array(kept["errors"])
        return self._base_errors[seed]

    def _base_errors_of(self, levels: int, seed: int) -> dict[str, Any]:
        errors = weighted_errors(
            self._base,
            self.data.held_out_main.samples,
            self.schedule,
            levels=levels,
            seed=seed,
            batch_size=self.config["evaluation"]["batch_size"],
        )
        if not np.isfinite(errors).all():
            raise NonFiniteError("held-out errors of the pretrained model are not finite; look at the data")
        return {"errors": errors.tolist()}

    def fill(self, source: nn.Module | None) -> None:
        """Give both modules the weights of `source`, or fresh ones from the config's seed."""
        trained, ema = self.modules()
        weights = (source or self._fresh()).state_dict()
        self.accelerator.unwrap_model(trained).load_state_dict(weights)
        ema.load_state_dict(weights)

    def reset_scaler(self) -> None:
        """The fp16 loss scale of a fresh trial does not depend on the trials before it."""
        scaler = self.accelerator.scaler
        if scaler is not None:
            self._first_scale = self._first_scale or scaler.state_dict()
            scaler.load_state_dict(self._first_scale)

    def streams(self, method: Method, optimizer: dict[str, Any], seed: int, *, first_step: int = 0) -> Streams:
        """The addressed draws of a method's streams, from a step on."""
        given = method.streams()
        return Streams(
            sizes={name: len(samples) for name, (samples, _) in given.items()},
            batch_sizes={name: batch_size for name, (_, batch_size) in given.items()},
            seed=seed,
            num_shards=optimizer["num_shards"],
            num_train_timesteps=self.schedule.num_train_timesteps,
            sample_shape=method.noise_shape,
            first_step=first_step,
        )


def fingerprint_of(images: ConstrainedData, codec: Codec, prompts: Prompts | None) -> str:
    """Of all that a network learns from: a pretrained model is shared by the sweeps for which it is the same."""
    learned = codec.fingerprint(images)
    return prompts.fingerprint(learned) if prompts else learned


def schedule_of(config: dict[str, Any]) -> NoiseSchedule:
    """The noise schedule of a sweep; what is sampled is kept within [-1, 1] where it is an image."""
    images = config["data"]["dataset"] != "gaussian_mixture" and not config["model"].get("autoencoder")
    return NoiseSchedule(**config["schedule"], clip_sample=images)


def _readable(path: Path) -> Any:
    """What a JSON file holds; None when it is absent or damaged."""
    try:
        return read_json(path)
    except (FileNotFoundError, ValueError):
        return None


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Raises: StorageError when it cannot be written; the file it would have replaced is whole then."""
    with in_place_of(path) as part:
        part.write_text(json.dumps(value, indent=1), encoding="utf-8")


def write_atomically(folder: Path, write: Callable[[Path], None]) -> None:
    """Fill a folder beside its place and move it there, so that it is whole or absent. Raises: StorageError."""
    with in_place_of(folder) as part:
        write(part)
