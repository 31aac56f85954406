"""One YAML file a sweep: typed, complete and checked before anything starts.

`load_config` turns a file and ``key.path=value`` overrides into a frozen `SweepConfig`; every mistake is a `ConfigError`
that names the field by its full path, the value given and what to write instead.
"""

import difflib
import hashlib
import json
import os
import re
import types
import typing
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from dualsweep.constraints import GridPoint, grid_point, grid_points, rule_from_config
from dualsweep.constraints.senses import threshold_sense
from dualsweep.datasets import DatasetSpec
from dualsweep.trainers.dual_client import NOT_THE_RULES

STORAGE_VARIABLE = "DUALSWEEP_STORAGE"
TRACKING_VARIABLE = "DUALSWEEP_TRACKING_URI"
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(gt=0, lt=1)]


class ConfigError(ValueError):
    """What a user gave is wrong; the message names field, value and remedy. The command line exits with code 2."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)


class ModelConfig(_Section):
    """The denoiser: a small U-Net for images, an MLP for vectors, or a diffusers folder to start from."""

    kind: Literal["unet", "mlp"] = "unet"
    channels: tuple[Count, ...] = (16, 32)
    """Widths of the U-Net's levels, outermost first; multiples of norm_groups."""
    layers_per_block: Count = 1
    attention: tuple[bool, ...] | None = None
    """One entry a level: self-attention there; default nowhere."""
    norm_groups: Count = 8
    width: Count = 128
    """Hidden width of the MLP."""
    depth: Count = 4
    """Residual blocks of the MLP."""
    pretrained: str | None = None
    """A diffusers folder (or hub name) to continue from; skips `pretrain`."""
    prompts: dict[str, str] | None = None
    """For a pretrained text-to-image network: the prompt of `main`, and of every set whose law it has to know."""
    autoencoder: str | None = None
    """A folder with a diffusers AutoencoderKL (or a pipeline's, in `vae`): the network learns latents of the images."""
    channels_last: bool = False
    compile: bool = False

    @model_validator(mode="after")
    def _levels_fit(self) -> "ModelConfig":
        if not self.channels:
            raise ValueError("channels is empty: give at least one width, such as [16, 32]")
        if self.attention is not None and len(self.attention) != len(self.channels):
            raise ValueError(
                f"attention has {len(self.attention)} entries for {len(self.channels)} levels: give one a level"
            )
        bad = [c for c in self.channels if c % self.norm_groups]
        if self.kind == "unet" and bad:
            raise ValueError(f"channels {bad} are not multiples of norm_groups={self.norm_groups}")
        return self

    @model_validator(mode="after")
    def _prompts_say_something(self) -> "ModelConfig":
        if self.prompts is not None and not self.pretrained:
            raise ValueError("prompts need a text-to-image network: give its folder as model.pretrained")
        empty = [name for name, text in (self.prompts or {}).items() if not text.strip()]
        if empty:
            raise ValueError(f"prompts.{empty[0]} is empty: write what the images shall show")
        return self


class ScheduleConfig(_Section):
    """Forward noising process, as diffusers' DDPMScheduler names it."""

    kind: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "linear"
    num_train_timesteps: Annotated[int, Field(ge=2, le=100_000)] = 1000
    beta_start: Positive = 1e-4
    beta_end: Annotated[float, Field(gt=0, lt=1)] = 0.02

    @model_validator(mode="after")
    def _increases(self) -> "ScheduleConfig":
        if self.beta_end <= self.beta_start:
            raise ValueError(f"beta_end={self.beta_end} must be larger than beta_start={self.beta_start}")
        return self


class OptimizerConfig(_Section):
    """AdamW with linear warm-up and cosine decay; shared by the pretraining and the primal steps."""

    steps: Count = 1000
    batch_size: Count = 64
    lr: Positive = 1e-3
    warmup_steps: Annotated[int, Field(ge=0)] = 20
    final_lr_fraction: Annotated[float, Field(ge=0, le=1)] = 0.1
    """The cosine ends at this fraction of lr."""
    weight_decay: Annotated[float, Field(ge=0)] = 1e-2
    grad_clip: Positive = 1.0
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.99
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    num_shards: Annotated[int, Field(ge=1, le=1024)] = 4
    """Logical shards of every stream's batch: the numbers drawn do not depend on how many workers share them."""
    gradient_accumulation_steps: Count = 1
    """At most num_shards / this many shards go through the model at once, so that less memory is needed; same batch, same steps."""

    @model_validator(mode="after")
    def _warmup_ends(self) -> "OptimizerConfig":
        if self.warmup_steps >= self.steps:
            raise ValueError(f"warmup_steps={self.warmup_steps} must be smaller than steps={self.steps}")
        return self

    @model_validator(mode="after")
    def _shards_divide(self) -> "OptimizerConfig":
        if self.num_shards % self.gradient_accumulation_steps:
            raise ValueError(
                f"gradient_accumulation_steps={self.gradient_accumulation_steps} does not divide "
                f"num_shards={self.num_shards}: give a divisor of it, or raise num_shards to a multiple"
            )
        return self


class PrimalConfig(OptimizerConfig):
    """Primal steps of one trial."""

    constraint_batch_size: Count = 16
    normalize: bool = True
    """Divide the Lagrangian by 1 + sum of multipliers, so that the step size does not grow with them."""


class DualConfig(_Section):
    """The dual rule and how often it acts. Rule-specific fields are checked by the rule itself."""

    rule: Literal["ascent", "resilient", "resilient_explicit", "nupi", "fixed"] = "ascent"
    step_size: Positive | None = None
    relaxation_cost: Positive | None = None
    relaxation_step_size: Positive | None = None
    proportional_gain: Annotated[float, Field(ge=0)] | None = None
    nu: Annotated[float, Field(ge=0, lt=1)] | None = None
    warmup_steps: Annotated[int, Field(ge=0)] | None = None
    decay_after: Annotated[int, Field(ge=0)] | None = None
    smoothing: Annotated[float, Field(ge=0, lt=1)] | None = None
    start: Annotated[float, Field(ge=0)] = 0.0
    """Multipliers a trial starts from."""
    primal_steps_per_dual_step: Count = 20
    mode: Literal["alternating", "pipelined"] = "alternating"
    """pipelined: a report is under way during the next primal steps, whose multipliers are those of the answer before."""

    def rule_config(self) -> dict[str, Any]:
        """What the dual rule itself is made from."""
        return self.model_dump(exclude=set(NOT_THE_RULES), exclude_none=True)

    @model_validator(mode="after")
    def _rule_accepts(self) -> "DualConfig":
        rule_from_config(self.rule_config())
        return self


class MeasureConfig(_Section):
    """The fresh draws behind a constraint metric at a dual step: samples of the current model, or noised data of a set."""

    num_samples: Count = 128
    num_sampling_steps: Count = 10
    window: Count = 2
    """Dual steps whose draws are pooled into one estimate."""


class RewardConfig(_Section):
    """One reward of `alignment`, standardised by the pretrained model's mean and standard deviation."""

    kind: Literal[
        "linear", "brightness", "contrast", "local_contrast", "saturation", "colorfulness", "class_probability"
    ]
    direction: tuple[float, ...] | None = None
    """linear: the reward is the inner product with it, one entry a coordinate."""
    class_name: str | None = None
    """class_probability: the class whose probability (training classifier) is rewarded."""


class FormulationConfig(_Section):
    """Options of the formulations; each takes its own and refuses the others. Defaults are the formulation's."""

    law: Literal["and", "or"] | None = None
    """composition: product of the sets' laws (reverse KL) or their mixture (forward KL)."""
    primal: Literal["none", "distill"] | None = None
    """composition, unlearn_reverse_kl: move the multipliers alone, or train the weights on the composed law too."""
    gradient: Literal["policy", "backpropagation"] | None = None
    """alignment: score-function gradient, or through the sampler (differentiable rewards)."""
    rewards: dict[str, RewardConfig] | None = None
    """alignment: one constraint a reward."""
    num_sampling_steps: Annotated[int, Field(ge=2)] | None = None
    """alignment, unlearn_likelihood: steps of the stochastic chain that is trained."""
    levels: Annotated[int, Field(ge=4)] | None = None
    """Log-SNR levels of divergences and likelihood ratios; ratios of images take at least 64."""
    ratio_clip: Positive | None = None
    """unlearn_likelihood: likelihood ratios above it count as it."""
    langevin_steps: Annotated[int, Field(ge=0)] | None = None
    """composition, unlearn_reverse_kl: Langevin corrections at each noise level."""
    langevin_step_size: Positive | None = None
    """In units of the variance of the noise at that level."""
    sampling_levels: Annotated[int, Field(ge=4)] | None = None
    """Noise levels of the annealed sampler."""
    pool: Count | None = None
    """Cached samples of the pretrained model."""
    gradient_norm: Positive | None = None
    """unlearn_forward_kl, siss: norm that the gradient of the forget loss is scaled to."""
    loss_ceiling: Positive | None = None
    """unlearn_forward_kl, siss: forget losses above it have no gradient."""
    inputs: Literal["samples", "noise", "trajectory"] | None = None
    """adaptation: where closeness is measured, noised samples of the pretrained model or pure noise (as published).
    esd: where it is distilled, noised samples of the pretrained model or the trained model's own chain."""
    beta: Positive | None = None
    """duo: inverse temperature of the preference loss."""


class ThresholdsConfig(_Section):
    """What is swept: exactly one of grid, list, random, search. A threshold in loss, nats or
    likelihood ratio may be {factor: f} of the pretrained model's value."""

    unit: Literal["share", "loss", "nats", "likelihood_ratio", "reward"] = "share"
    grid: dict[str, Any] | None = None
    list: typing.List[dict[str, Any]] | None = None  # noqa: UP006  (`list` is the field's own name here)
    random: dict[str, Any] | None = None
    search: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _one_form(self) -> "ThresholdsConfig":
        given = [k for k in ("grid", "list", "random", "search") if getattr(self, k) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of grid, list, random, search; got {given or 'none'}")
        return self

    @property
    def form(self) -> dict[str, Any]:
        return self.model_dump(include={"grid", "list", "random", "search"}, exclude_none=True)


class BaselinesConfig(_Section):
    """Runs through the same code that the constrained points are compared with."""

    unconstrained: bool = True
    fixed_weights: tuple[Annotated[float, Field(ge=0, allow_inf_nan=False)], ...] = ()
    """One run a value: every multiplier fixed at it."""

    @model_validator(mode="after")
    def _weights_differ(self) -> "BaselinesConfig":
        shown = [f"{weight:g}" for weight in self.fixed_weights]  # as in the trial's id
        repeated = sorted({text for text in shown if shown.count(text) > 1})
        if repeated:
            raise ValueError(f"fixed_weights holds {', '.join(repeated)} more than once: give each weight once")
        return self


class ElasticWorkers(_Section):
    """A worker group between two sizes: as many as the cluster has room for, resized when nodes come and go."""

    min: Count = 1
    max: Count

    @model_validator(mode="after")
    def _ordered(self) -> "ElasticWorkers":
        if self.min > self.max:
            raise ValueError(f"min={self.min} is above max={self.max}: exchange them")
        return self


class ComputeConfig(_Section):
    workers: Annotated[int, Field(ge=0)] | ElasticWorkers = 1
    """Ray Train workers a trial; 0 runs the loop inside the Tune actor, {min, max} resizes with the cluster."""
    resize_interval_s: Positive = 10.0
    """An elastic group looks this often whether the cluster has grown."""
    restart_timeout_s: Positive = 5.0
    """An elastic group that a dead node still counted in waits this long for it before it takes what is there."""
    concurrent_trials: Count | Literal["auto"] = "auto"
    cpus_per_worker: Count = 1
    gpus_per_worker: Annotated[float, Field(ge=0)] = 0
    placement_timeout_s: Positive = 120.0
    """After this long without room for a worker group the sweep ends with an error."""
    max_failures: Annotated[int, Field(ge=0)] = 2
    """Restarts of one trial, after a death or numbers that are not finite, before it counts as failed or diverged; a
    restart with another number of workers does not count."""

    @property
    def elastic(self) -> bool:
        return isinstance(self.workers, ElasticWorkers)

    @property
    def fewest_workers(self) -> int:
        return self.workers.min if isinstance(self.workers, ElasticWorkers) else self.workers

    @property
    def most_workers(self) -> int:
        return self.workers.max if isinstance(self.workers, ElasticWorkers) else self.workers


class SchedulerConfig(_Section):
    """Tune's trial scheduler; `asha` and `median` stop poor trials early."""

    kind: Literal["fifo", "asha", "median"] = "fifo"
    metric: Literal["lagrangian", "objective", "worst_violation", "kkt_residual"] = "lagrangian"
    grace_dual_steps: Count = 5
    reduction_factor: Annotated[int, Field(ge=2)] = 3


class OrderConfig(_Section):
    """In which order the thresholds are solved, and from what each one starts."""

    order: Literal["listed", "path", "adaptive"] = "listed"
    """listed: as written, each from the pretrained model. path: each from its neighbour's model and multipliers. adaptive:
    so too, with thresholds placed evenly along the front as its slopes become known (thresholds.search names the range)."""
    points: Annotated[int, Field(ge=2)] | None = None
    """adaptive: how many points."""
    chains: Count | Literal["auto"] = "auto"
    """path: chains of neighbours that are solved side by side; auto: as many as trials run at a time when the sweep starts."""

    warm_lr: Annotated[float, Field(gt=0, le=1)] | None = None
    """Learning rate of a point that starts from a neighbour, a fraction of primal.lr; null: primal's own course."""
    warm_steps: Count | None = None
    """Primal steps over which the learning rate of such a point falls to a tenth, and stays; null: it is held."""

    @model_validator(mode="after")
    def _a_course_needs_a_rate(self) -> "OrderConfig":
        if self.warm_steps is not None and self.warm_lr is None:
            raise ValueError(f"warm_steps={self.warm_steps} without warm_lr: give the learning rate that falls")
        return self

    @model_validator(mode="after")
    def _points_belong_to_adaptive(self) -> "OrderConfig":
        if (self.points is None) == (self.order == "adaptive"):
            remedy = "give how many points" if self.points is None else "remove it, or take order adaptive"
            raise ValueError(f"points={self.points} with order={self.order}: {remedy}")
        return self


class StoppingConfig(_Section):
    """Early ends that duality knows of: a certificate that is tight, thresholds that are out of reach."""

    certificate: bool | None = None
    """End a constrained trial once its certificate is tight (it is evaluated then); null: yes in the orders path and adaptive."""
    infeasible: bool | None = None
    """End a trial whose multipliers grow while its violation does not fall; null: as certificate."""
    tolerance: Positive | None = None
    """Violation that training may still see, canonical units; null: half of evaluation.tolerance."""
    window: Annotated[int, Field(ge=8)] = 10
    """Dual steps over which a certificate has to be tight; draws made for it confirm it, or, of a metric of the primal steps, the
    later half."""
    drift: Positive = 0.2
    """A multiplier stands still when it changes by less than this part of itself over the window."""
    patience: Annotated[int, Field(ge=9)] = 40
    """Dual steps without progress after which thresholds count as out of reach."""

    @model_validator(mode="after")
    def _patience_is_longer(self) -> "StoppingConfig":
        if self.patience <= self.window:
            raise ValueError(f"patience={self.patience} must be larger than window={self.window}")
        return self


class DivergenceConfig(_Section):
    """When a run that is still finite counts as running away, and stops as `diverged`."""

    factor: Annotated[float, Field(gt=1, allow_inf_nan=False)] | None = 1e4
    """The objective is this many times its usual size, or a multiplier its start (at least 1); null: never stop."""
    dual_steps: Annotated[int, Field(ge=2)] = 5
    """For so many dual steps in a row, without falling."""


class EvaluationConfig(_Section):
    num_samples: Annotated[int, Field(ge=8)] = 1500
    num_sampling_steps: Count = 20
    noise_levels: Annotated[int, Field(ge=4)] = 32
    """Points of the log-SNR grid of the likelihood-ratio estimate."""
    batch_size: Count = 256
    tolerance: Annotated[float, Field(ge=0)] = 0.1
    """A constraint counts as held when its whole confidence interval lies below this (canonical unit; share: nats)."""
    confidence: Fraction = 0.95
    grid_samples: Annotated[int, Field(ge=1, le=400)] = 40


class TrackingConfig(_Section):
    uri: str | None = None
    """MLflow tracking URI; default a SQLite file in the storage folder."""
    experiment: str | None = None
    """Default: the sweep's name."""


class SweepConfig(_Section):
    """A whole sweep."""

    name: str
    method: Literal[
        "fairness",
        "adaptation",
        "alignment",
        "composition",
        "unlearn_reverse_kl",
        "unlearn_forward_kl",
        "unlearn_likelihood",
        "duo",
        "esd",
        "siss",
    ] = "fairness"
    formulation: FormulationConfig = FormulationConfig()
    storage: str = "runs"
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    data: DatasetSpec
    model: ModelConfig = ModelConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    pretrain: OptimizerConfig = OptimizerConfig()
    primal: PrimalConfig = PrimalConfig()
    dual: DualConfig = DualConfig(rule="ascent", step_size=0.01)
    measure: MeasureConfig = MeasureConfig()
    thresholds: ThresholdsConfig
    baselines: BaselinesConfig = BaselinesConfig()
    compute: ComputeConfig = ComputeConfig()
    scheduler: SchedulerConfig = SchedulerConfig()
    sweep: OrderConfig = OrderConfig()
    stopping: StoppingConfig = StoppingConfig()
    divergence: DivergenceConfig = DivergenceConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    tracking: TrackingConfig = TrackingConfig()
    checkpoint_every_dual_steps: Count = 10

    @model_validator(mode="after")
    def _fits_together(self) -> "SweepConfig":
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", self.name):
            raise ValueError(
                f"name={self.name!r} is used as a folder name: use letters, digits, '.', '_' and '-' (at most 100)"
            )
        if self.primal.steps < self.dual.primal_steps_per_dual_step:
            raise ValueError(
                f"dual.primal_steps_per_dual_step={self.dual.primal_steps_per_dual_step} is larger than "
                f"primal.steps={self.primal.steps}: no dual step would ever happen"
            )
        if any(self.early_ends) and not (self.stopping.tolerance or self.evaluation.tolerance):
            raise ValueError(
                f"evaluation.tolerance={self.evaluation.tolerance:g} leaves no room to end trials early (sweep.order="
                f"{self.sweep.order}, stopping): give stopping.tolerance > 0"
            )
        if self.model.kind == "unet" and self.data.dataset == "gaussian_mixture":
            raise ValueError("model.kind=unet needs images: use model.kind=mlp with data.dataset=gaussian_mixture")
        if self.model.autoencoder and self.data.dataset == "gaussian_mixture":
            raise ValueError("model.autoencoder is for images: remove it with data.dataset=gaussian_mixture")
        if self.model.kind == "mlp" and self.data.dataset != "gaussian_mixture":
            raise ValueError("model.kind=mlp is for vectors: use model.kind=unet for images")
        return self

    @property
    def early_ends(self) -> tuple[bool, bool]:
        """Whether constrained trials end at a certificate, and at thresholds out of reach (nulls resolved)."""
        certificate = self.stopping.certificate
        certificate = self.sweep.order != "listed" if certificate is None else certificate
        return certificate, certificate if self.stopping.infeasible is None else self.stopping.infeasible

    @property
    def dual_steps(self) -> int:
        """Of a trial that is not ended early."""
        return self.primal.steps // self.dual.primal_steps_per_dual_step

    @property
    def experiment(self) -> str:
        return self.tracking.experiment or self.name

    @property
    def axis(self) -> str:
        """The threshold axis that stands for every constraint."""
        if self.method == "alignment":
            return "rewards"
        return "minority" if self.data.minority is not None else "sets"

    @property
    def sense(self) -> str | None:
        """ "<=" or ">=" for every threshold; None: the unit's own."""
        return threshold_sense(self.method, self.thresholds.unit)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-able values, complete: what `sweep.yaml` stores and `from_dict` reads back."""
        return json.loads(self.model_dump_json())

    @classmethod
    def from_dict(cls, values: dict[str, Any], *, source: str = "config") -> "SweepConfig":
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise ConfigError(_describe(error, source)) from None

    def base_key(self, streams: typing.Sequence[str] = ("main",)) -> str:
        """Identity of the pretrained model: sweeps that agree on these fields share it.

        Args:
            streams: what it learns from (`Method.pretraining_sets`).
        """
        parts = {k: v for k, v in self.to_dict().items() if k in ("data", "model", "schedule", "pretrain", "seed")}
        parts["streams"] = list(streams)
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def load_config(path: str | Path, overrides: typing.Sequence[str] = (), *, environment: bool = True) -> SweepConfig:
    """Read, override and check one sweep file.

    Args:
        path: a YAML file.
        overrides: ``key.path=value`` strings; the value is read as YAML.
        environment: let DUALSWEEP_STORAGE and DUALSWEEP_TRACKING_URI replace the file's values.
    Raises: ConfigError naming field, value and remedy.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"{path}: no such file; give the path of a sweep's YAML file")
    values = read_fields(path)
    if environment:
        if os.environ.get(STORAGE_VARIABLE):
            values["storage"] = os.environ[STORAGE_VARIABLE]
        if os.environ.get(TRACKING_VARIABLE):
            _assign(values, ["tracking", "uri"], os.environ[TRACKING_VARIABLE], TRACKING_VARIABLE)
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or not key.strip():
            raise ConfigError(f"override {override!r}: write it as key.path=value, such as primal.steps=200")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            raise ConfigError(f"override {override!r}: the value {text!r} is not readable as YAML; quote it") from None
        _assign(values, key.strip().split("."), _as_number(value), override)
    return _with_absolute_paths(SweepConfig.from_dict(_as_number(values), source=str(path)))


def read_fields(path: Path) -> dict[str, Any]:
    """The mapping a YAML file holds. Raises: ConfigError naming the file when it holds anything else."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not readable as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        found = type(values).__name__
        raise ConfigError(f"{path}: expected a mapping of fields at the top, found {found}; restore the file")
    return values


def _with_absolute_paths(config: SweepConfig) -> SweepConfig:
    """Relative paths are the caller's: fixed now, before the working directory changes on the way to the workers."""
    names = ("path", "test_path", "labels_path", "test_labels_path")
    given = {name: getattr(config.data, name) for name in names}
    moved = {name: os.path.abspath(text) for name, text in given.items() if text and "://" not in text}
    models = {name: getattr(config.model, name) for name in ("pretrained", "autoencoder")}
    models = {name: os.path.abspath(text) for name, text in models.items() if text and os.path.exists(text)}
    storage = config.storage if "://" in config.storage else os.path.abspath(os.path.expanduser(config.storage))
    return config.model_copy(
        update={
            "data": replace(config.data, **moved),
            "model": config.model.model_copy(update=models),
            "storage": storage,
        }
    )


def _assign(values: dict, path: list[str], value: Any, source: str) -> None:
    for key in path[:-1]:
        inner = values.setdefault(key, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"override {source!r}: {key} is {inner!r}, which has no fields inside")
        values = inner
    values[path[-1]] = value


def _as_number(value: Any) -> Any:
    """YAML 1.1 reads ``1e-3`` as text; users mean the number."""
    if isinstance(value, dict):
        return {key: _as_number(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_as_number(inner) for inner in value]
    if isinstance(value, str) and re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", value):
        return float(value)
    return value


def _describe(error: ValidationError, source: str) -> str:
    lines = []
    for item in error.errors():
        where = ".".join(str(part) for part in item["loc"]) or "(whole file)"
        if item["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
            known = _known_keys(item["loc"][:-1])
            near = difflib.get_close_matches(str(item["loc"][-1]), known, n=1, cutoff=0.4)
            hint = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(sorted(known))}"
            lines.append(f"{where}: unknown key; {hint}")
        elif item["type"] in ("missing", "missing_argument"):
            lines.append(f"{where}: missing; add this field")
        else:
            message = item["msg"].removeprefix("Value error, ")
            given = item["input"]
            shown = "" if isinstance(given, dict) or is_dataclass(given) else f" (given: {given!r})"
            lines.append(_placed(message, where, item["loc"]) + shown)
    return f"{source}: " + "; ".join(dict.fromkeys(lines))


def _placed(message: str, where: str, location: tuple) -> str:
    """The message with the field's full path before it, once: checks of a section name only their own field."""
    if not location or message.startswith((f"{where}:", f"{where}.")):
        return message
    field = re.match(r"\w*", message).group()
    return f"{where}.{message}" if field in _known_keys(location) and field != location[-1] else f"{where}: {message}"


def _known_keys(location: tuple) -> list[str]:
    """Field names at a place of the config, walking through models, dataclasses and optionals."""
    at: Any = SweepConfig
    for part in location:
        if not isinstance(part, str):
            continue
        annotations = (
            {n: f.annotation for n, f in at.model_fields.items()} if _is_model(at) else typing.get_type_hints(at)
        )
        if part not in annotations:
            continue  # pydantic adds the union member's name to the path
        at = _section_of(annotations[part]) or at
    return list(at.model_fields) if _is_model(at) else [f.name for f in fields(at)]


def _is_model(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _section_of(annotation: Any) -> Any:
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        for option in typing.get_args(annotation):
            if _section_of(option) is not None:
                return _section_of(option)
        return None
    if typing.get_origin(annotation) is dict:
        return _section_of(typing.get_args(annotation)[1])
    return annotation if _is_model(annotation) or is_dataclass(annotation) else None


def sweep_points(config: SweepConfig, constraint_names: tuple[str, ...]) -> list[dict[str, Any]] | None:
    """The trials of a sweep, in order: baselines first, then the grid; None from the grid part when Tune searches.

    Returns: dictionaries with trial_id, label, kind, thresholds (user unit), fixed_weight (or None).
    """
    points: list[dict[str, Any]] = []
    if config.baselines.unconstrained:
        points.append(_point("unconstrained", "unconstrained", "unconstrained", {}))
    grid = expand_grid(config, constraint_names)
    for point in grid or []:
        points.append(_point(point.id, point.label, "constrained", point.thresholds))
    for weight in config.baselines.fixed_weights:
        points.append(_point(f"fixed-{weight:g}", f"fixed weights {weight:g}", "fixed_weights", {}, weight))
    return points


def expand_grid(config: SweepConfig, constraint_names: tuple[str, ...]) -> list[GridPoint] | None:
    unit = config.thresholds.unit
    try:
        points = grid_points(config.thresholds.form, {config.axis: constraint_names}, unit, sense=config.sense)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    form = next(iter(config.thresholds.form))
    for point in points or []:
        for name, value in point.thresholds.items():
            if unit == "loss" and value == 0:
                raise ConfigError(
                    f"thresholds.{form} ({point.label}): {name}={value}: a loss must be > 0; give another"
                )
    return points


def _point(
    trial_id: str, label: str, kind: str, thresholds: dict[str, float], weight: float | None = None
) -> dict[str, Any]:
    return {"trial_id": trial_id, "label": label, "kind": kind, "thresholds": thresholds, "fixed_weight": weight}


def point_for_search(
    config: SweepConfig, constraint_names: tuple[str, ...], thresholds: dict[str, Any]
) -> dict[str, Any]:
    """The trial of thresholds that Tune's search algorithm chose, a value an axis."""
    groups = {config.axis: constraint_names}
    point = grid_point(thresholds, groups, config.thresholds.unit, path="thresholds.search", sense=config.sense)
    return _point(point.id, point.label, "constrained", point.thresholds)
