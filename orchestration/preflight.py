"""Everything that can be refused before anything starts: data, thresholds, model, storage, tracking server, machine."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dualsweep.datasets import DatasetSummary, validate_spec
from dualsweep.orchestration.cluster import check_fits_locally
from dualsweep.orchestration.config import ConfigError, SweepConfig, sweep_points
from dualsweep.orchestration.frontier import check_adaptive, check_order, check_path
from dualsweep.orchestration.journal import read_journal
from dualsweep.orchestration.storage import bring, check_storage, impatient, open_store
from dualsweep.orchestration.tracking import check_tracking, resolve_tracking_uri
from dualsweep.trainers.codec import Autoencoder, check_latents, open_codec
from dualsweep.trainers.methods import METHODS, Method
from dualsweep.trainers.models import Denoiser, check_image_size, load_model
from dualsweep.trainers.prompts import open_prompts
from dualsweep.trainers.store import Store
from dualsweep.trainers.workspace import read_json

SCHEDULER = "scheduler/scheduler_config.json"


@dataclass(frozen=True)
class Plan:
    """A sweep that passed every check."""

    config: SweepConfig
    folder: Path
    base_dir: Path
    tracking_uri: str
    constraint_names: tuple[str, ...]
    points: list[dict[str, Any]]  # listed trials, in order; searched ones come on top
    store: Store


def preflight(config: SweepConfig, *, resume: bool = False, on_cluster: bool = False) -> Plan:
    """Check a sweep whole.

    Args:
        resume: the sweep's folder must exist instead of being free.
        on_cluster: resources are checked against the cluster after joining it, not against this machine.
    Raises: ConfigError naming field, value and remedy; nothing has been written or started then.
    """
    store = open_store(config.storage)
    root = store.root
    folder = root / config.name
    try:
        summary = validate_spec(config.data)
        check_storage(store)
        tracking_uri = resolve_tracking_uri(config.tracking.uri, store.address(root))
        method = METHODS[config.method]
        names = _check_formulation(config, method, summary)
        _check_accumulation(config, method)
        if config.thresholds.search is not None:
            from dualsweep.orchestration.points import search_settings  # here: it brings Tune, which takes a second

            search_settings(config)
        points = sweep_points(config, names)
        if not resume:  # sweeps begun before these were refused go on
            check_order(config)
        if config.sweep.order == "path":
            check_path(config, points)
        if config.sweep.order == "adaptive":
            check_adaptive(config, names)
        shape = _check_autoencoder(config, summary.sample_shape)
        if config.model.kind == "unet" and not config.model.pretrained and shape is not None:
            check_image_size(config.model.model_dump(), shape)
        _check_shards(config)
        _check_precision(config)
        _check_prompts(config, method.pretraining_sets(summary.constraint_names, config.thresholds.unit))
        _check_pretrained(config, shape)
        if not on_cluster:
            check_fits_locally(config.compute)
        if resume:
            bring(impatient(store), config.name, models=True)
            read_journal(folder / "journal.jsonl")
        if not resume:  # a resume goes on without it
            check_tracking(tracking_uri, timeout=8.0)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if resume and not (folder / "sweep.yaml").is_file():
        raise ConfigError(
            f"name: no sweep {config.name!r} in {store.address(root)}; `dualsweep status` lists what is there"
        )
    if not resume and _taken(store, config.name):
        raise ConfigError(
            f"name: sweep {config.name!r} already exists in {store.address(root)}; go on with it (`dualsweep resume {config.name}`), give another "
            "name (name=...), or let one be found (--fresh-name)"
        )
    base_dir = (
        root / "bases" / config.base_key(method.pretraining_sets(summary.constraint_names, config.thresholds.unit))
    )
    return Plan(config, folder, base_dir, tracking_uri, names, points, store)


def _check_formulation(config: SweepConfig, method: type[Method], summary: DatasetSummary) -> tuple[str, ...]:
    """The formulation's own demands on the configuration. Returns: its constraint names. Raises: ValueError."""
    if config.thresholds.unit not in method.units:
        raise ValueError(
            f"thresholds.unit={config.thresholds.unit!r}: method {config.method} takes {', '.join(method.units)}"
        )
    values = config.to_dict()
    given = {key for key, value in values["formulation"].items() if value is not None}
    foreign = sorted(given - set(method.defaults))
    if foreign:
        takes = ", ".join(sorted(method.defaults)) or "no options"
        raise ValueError(f"formulation.{foreign[0]}: method {config.method} takes {takes}; remove it")
    if method.needs_sets and not summary.constraint_names:
        field = "data.minority" if method.group == "minority" else "data.sets"
        raise ValueError(f"{field} is missing: method {config.method} needs the sets that its constraints are about")
    shapeless = sorted(set(summary.constraint_names) - set(summary.constraint_classes))
    if config.thresholds.unit == "share" and shapeless:
        raise ValueError(
            f"thresholds.unit='share': set {shapeless[0]!r} is not one class, whose share could be counted; name one "
            "class in data.sets, or use another unit"
        )
    names = method.constraint_names(summary.constraint_names, method.options(values["formulation"]))
    method.check(values, names)
    method.check_data(values, config.data, summary)
    return names


def _check_shards(config: SweepConfig) -> None:
    fewest = min(config.primal.num_shards, config.pretrain.num_shards)
    if config.compute.most_workers > fewest:
        field = "compute.workers.max" if config.compute.elastic else "compute.workers"
        raise ConfigError(
            f"{field}={config.compute.most_workers}: more than the {fewest} logical shards of a batch; raise primal.num_shards and pretrain.num_shards"
        )


def _check_accumulation(config: SweepConfig, method: type[Method]) -> None:
    parts = config.primal.gradient_accumulation_steps
    reason = method.needs_whole_batch(method.options(config.to_dict()["formulation"]))
    if parts > 1 and reason is not None:
        raise ConfigError(
            f"primal.gradient_accumulation_steps={parts}: method {config.method} needs its whole batch at once ({reason}); "
            "remove it, or give more workers"
        )


def _check_precision(config: SweepConfig) -> None:
    for section in ("primal", "pretrain"):
        if getattr(config, section).precision == "fp16" and config.compute.gpus_per_worker == 0:
            raise ConfigError(f"{section}.precision=fp16 needs a GPU (compute.gpus_per_worker is 0); use bf16 or fp32")
    if config.primal.precision != config.pretrain.precision:
        raise ConfigError(
            f"pretrain.precision={config.pretrain.precision} differs from primal.precision={config.primal.precision}; one worker process keeps one precision"
        )


def _check_autoencoder(config: SweepConfig, sample_shape: tuple[int, ...] | None) -> tuple[int, ...] | None:
    """Read it whole, for the same reason. Returns: the shape of what the network learns, where that of the data is known."""
    codec = open_codec(config.model.model_dump())
    if isinstance(codec, Autoencoder):
        codec.check()
    return sample_shape and codec.sample_shape(sample_shape)


def _check_prompts(config: SweepConfig, laws: tuple[str, ...]) -> None:
    """One for each law that the network has to know, and no other: conditions are counted. Raises: ValueError."""
    given = config.model.prompts
    if given is None:
        return
    for name in laws:
        if name not in given:
            raise ConfigError(
                f"model.prompts.{name} is missing: method {config.method} asks the network for {', '.join(laws)}; write one for each"
            )
    for name in given:
        if name not in laws:
            raise ConfigError(
                f"model.prompts.{name}: method {config.method} asks the network for {', '.join(laws)} alone; remove it"
            )
    open_prompts(config.model.model_dump(), laws)


def _check_text_network(config: SweepConfig, denoiser: Denoiser) -> None:
    """Prompts belong to networks that take them, and the other way round. Raises: ValueError."""
    folder, text = config.model.pretrained, denoiser.takes_text
    prompts = open_prompts(config.model.model_dump(), tuple(config.model.prompts or ()))
    if text and prompts is None and denoiser.prompts is None:
        raise ConfigError(
            f"model.prompts is missing: model.pretrained={folder!r} is a text-to-image network; write main's prompt"
        )
    if prompts is not None and not text:
        raise ConfigError(f"model.prompts: model.pretrained={folder!r} takes no text; remove them")
    if prompts is not None:
        prompts.check(denoiser.network.config)


def _check_pretrained(config: SweepConfig, sample_shape: tuple[int, ...] | None) -> None:
    """Read a local model whole: a damaged one would otherwise be found after Ray has started."""
    folder = config.model.pretrained
    if not folder or not Path(folder).is_absolute():
        return
    files = ("model_index.json", "config.json", "unet/config.json")
    if not any((Path(folder) / name).is_file() for name in files):
        raise ConfigError(
            f"model.pretrained={folder!r}: holds neither {', '.join(files[:-1])} nor {files[-1]}; give a diffusers model folder"
        )
    try:
        denoiser = load_model(folder)
    except ValueError as error:
        raise ConfigError(f"model.pretrained={folder!r}: {error}; give a diffusers model folder") from error
    said = read_json(Path(folder, SCHEDULER)) if Path(folder, SCHEDULER).is_file() else {}
    if said.get("prediction_type", "epsilon") != "epsilon":
        raise ConfigError(
            f"model.pretrained={folder!r}: predicts {said['prediction_type']!r} ({SCHEDULER}); give one that predicts the noise "
            "(epsilon)"
        )
    _check_schedule(config, said)
    _check_text_network(config, denoiser)
    check_latents(Path(folder), open_codec(config.model.model_dump()))
    channels = getattr(denoiser.network.config, "in_channels", None)
    if channels is not None and sample_shape is not None and channels != sample_shape[0]:
        raise ConfigError(
            f"model.pretrained={folder!r}: made for images of {channels} channels, the data have {sample_shape[0]}; "
            f"set data.channels={channels} or give another model"
            if not config.model.autoencoder
            else f"model.pretrained={folder!r}: made for latents of {channels} channels, those of model.autoencoder have "
            f"{sample_shape[0]}; give two that belong together"
        )


def _check_schedule(config: SweepConfig, said: dict[str, Any]) -> None:
    """Refuse a noising process that is not the one which the pretrained model learned to undo: nothing else would tell."""
    given = config.schedule.model_dump()
    ends = () if said.get("beta_schedule") == "squaredcos_cap_v2" else ("beta_start", "beta_end")  # the cosine has none of its own
    own = {"kind": said.get("beta_schedule"), **{field: said.get(field) for field in ("num_train_timesteps", *ends)}}
    own = {field: value for field, value in own.items() if value is not None}
    for field, value in own.items():
        if value != given[field]:
            told = ", ".join(f"{field}: {value}" for field, value in own.items())
            raise ConfigError(
                f"schedule.{field}={given[field]!r}: model.pretrained={config.model.pretrained!r} was trained with {value!r} "
                f"({SCHEDULER}); set schedule: {{{told}}}"
            )


def _taken(store: Store, name: str) -> bool:
    """Whether a new sweep would meet another's files."""
    if store.uri is None:
        return (store.root / name).exists()
    return impatient(store).exists(store.root / name / "sweep.yaml")


def fresh_name(config: SweepConfig) -> SweepConfig:
    """The config under a name that is free: `name`, else `name-2`, `name-3`, ..."""
    store = open_store(config.storage)
    candidate, number = config.name, 2
    while _taken(store, candidate):
        candidate, number = f"{config.name}-{number}", number + 1
    return config.model_copy(update={"name": candidate})


def first_point(config: SweepConfig, at: list[str]) -> SweepConfig:
    """The config of one trial: the first point of the thresholds, or the values of ``axis=value`` strings; no baselines."""
    if at:
        values: dict[str, Any] = {}
        for text in at:
            axis, separator, value = text.partition("=")
            try:
                values[axis] = float(value)
            except ValueError:
                raise ConfigError(f"--at {text!r}: write it as axis=number, such as minority=0.1") from None
            if not separator:
                raise ConfigError(f"--at {text!r}: write it as axis=number, such as minority=0.1")
    else:
        try:
            points = sweep_points(
                config, _check_formulation(config, METHODS[config.method], validate_spec(config.data))
            )
        except ValueError as error:
            raise ConfigError(str(error)) from error
        values = next((point["thresholds"] for point in points if point["kind"] == "constrained"), None)
        if values is None:
            raise ConfigError("thresholds.search has no first point: give one with --at axis=value")
    dumped = config.to_dict()
    dumped["thresholds"] = {"unit": config.thresholds.unit, "list": [values]}
    dumped["baselines"] = {"unconstrained": False, "fixed_weights": []}
    if config.sweep.order != "listed":  # alone it has no neighbour, and ends as it would have among others
        dumped["sweep"] = {"order": "listed"}
        if config.stopping.certificate is None:
            dumped["stopping"]["certificate"] = True
    return SweepConfig.from_dict(dumped)
