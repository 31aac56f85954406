"""What data a sweep asks for, checked before anything starts, and the step from there to arrays.

Messages name fields as they stand in a sweep's file, below ``data``.
"""

import dataclasses
import os
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dualsweep.datasets.constrained_data import (
    ClassCounts,
    ConstrainedData,
    LabelledSet,
    check_held_out,
    check_rows,
    class_shares,
    count_class,
    split_by_class,
)
from dualsweep.datasets.gaussians import GaussianMixture
from dualsweep.datasets.idx_images import IdxSource, labels_path_beside
from dualsweep.datasets.images import DigitsSource, FolderSource, ImageSource
from dualsweep.datasets.parquet_images import ParquetSource

DATASETS = ("digits", "parquet", "folder", "idx", "gaussian_mixture")
# The streams of the main data and of generated trajectories, and the threshold axes that mean every constraint.
RESERVED_NAMES = ("main", "trajectory", "minority", "sets", "rewards")


@dataclass(frozen=True, kw_only=True)
class MinoritySpec:
    """The classes that are cut, each of which gets a constraint."""

    classes: tuple[int | str, ...]  # class indices or class names
    keep: float | int = 0.1  # float: fraction in (0, 1] of a class's training images; int: that many images


@dataclass(frozen=True, kw_only=True)
class SetSpec:
    """The samples of one constraint that leave main as it is: exactly one of classes, samples and means."""

    classes: tuple[int | str, ...] | None = None  # their training images; components in the proportions they have
    samples: tuple[int, ...] | None = None  # images only: rows of ConstrainedData.main; they are held out as well
    means: tuple[tuple[float, ...], ...] | None = None  # gaussian_mixture only, with stds: a mixture of the set's own
    stds: tuple[float, ...] | tuple[tuple[float, ...], ...] | None = None  # one a component, or one a coordinate too
    weights: tuple[float, ...] | None = None  # one a component, in any positive unit; None: equal


@dataclass(frozen=True, kw_only=True)
class DatasetSpec:
    """One data set: where it is, how it is read, what main and the constraint sets are and what is held out."""

    dataset: str = "digits"  # one of DATASETS
    path: str | None = None  # file, folder or (parquet) pattern or URI; not for digits and gaussian_mixture
    test_path: str | None = None  # held-out images of their own; then nothing is held out of ``path``
    image_column: str = "image"  # parquet
    label_column: str = "label"  # parquet
    labels_path: str | None = None  # idx; None: the usual name beside ``path``
    test_labels_path: str | None = None  # idx; None: the usual name beside ``test_path``
    size: int | None = None  # pixels; images are centre-cropped and resized to size x size; None: as they are
    channels: int | None = None  # 1 or 3; None: as they are
    on_bad_image: str = "error"  # "error": stop at an unreadable image and name it; "skip": leave it out and count it
    minority: MinoritySpec | None = None  # None: no class is cut; excludes ``sets`` and ``main_classes``
    sets: dict[str, SetSpec] | None = None  # constraint name -> its samples, in the constraints' order
    main_classes: tuple[int | str, ...] | None = None  # classes (components) of the main set; None: all of them
    held_out: float = 0.2  # fraction of each class never trained on, in (0, 1)
    seed: int = 0  # of the split, and of the draws of a gaussian_mixture
    means: tuple[tuple[float, ...], ...] | None = None  # gaussian_mixture: (components, dim)
    stds: tuple[float, ...] | tuple[tuple[float, ...], ...] | None = None  # one a component, or one a coordinate too
    weights: tuple[float, ...] | None = None  # one a component, in any positive unit; None: equal
    count: int = 2000  # gaussian_mixture: samples in the main set and in each constraint and held-out set

    def to_dict(self) -> dict:
        """JSON-able form; from_dict is its inverse."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict) -> "DatasetSpec":
        """From plain values, lists for tuples. Raises: ValueError for an unknown key."""
        values = dict(values)
        if isinstance(values.get("minority"), dict):
            values["minority"] = _parsed(MinoritySpec, values["minority"], "data.minority")
        if isinstance(values.get("sets"), dict):
            values["sets"] = {
                name: _parsed(SetSpec, chosen, f"data.sets.{name}") if isinstance(chosen, dict) else chosen
                for name, chosen in values["sets"].items()
            }
        return _parsed(cls, values, "data")


@dataclass(frozen=True, kw_only=True)
class DatasetSummary:
    """What is known of a data set before its images are decoded."""

    class_names: tuple[str, ...]
    constraint_names: tuple[str, ...]  # in the order of minority.classes or of sets
    constraint_classes: dict[str, int]  # constraint name -> class index, for the constraints that are exactly one class
    prior: dict[int, float]  # class index -> share of the main set, before unreadable images are skipped
    sample_shape: tuple[int, ...] | None  # None: only known after reading
    counts: dict[int, ClassCounts]  # of the classes in main or a set; empty for a gaussian_mixture
    main_classes: tuple[int, ...]  # ascending
    sets: dict[str, SetSpec]  # constraint name -> its samples, classes as ascending indices; minority classes too


def validate_spec(spec: DatasetSpec) -> DatasetSummary:
    """Check a spec without decoding its images: a label column, file headers and one image are all it reads.

    Raises: ValueError naming field, value and remedy.
    """
    _check_fields(spec)
    if spec.dataset == "gaussian_mixture":
        mixture = _mixture(spec)
        names = tuple(f"component_{index}" for index in range(mixture.num_components))
        main_classes, sets = _main_classes(spec, names, range(len(names))), _sets(spec, names, range(len(names)))
        main = mixture.restricted(main_classes)
        prior = dict.fromkeys(range(len(names)), 0.0) | dict(zip(main_classes, main.weights.tolist(), strict=True))
        _check_count(spec, [main, mixture.with_weights(np.ones(len(names))), *_set_mixtures(mixture, sets).values()])
        return _summary(names, main_classes, sets, prior, (mixture.dim,), {})
    source = _source(spec)
    labels, names = source.labels()
    present = np.unique(labels).tolist()
    main_classes, sets = _main_classes(spec, names, present), _sets(spec, names, present)
    used = {*main_classes, *(class_index for chosen in sets.values() for class_index in chosen.classes or ())}
    test_counts = None
    if spec.test_path is not None:
        test_counts = np.bincount(_test_labels(spec, labels, names), minlength=len(names))
    counts = {}
    for class_index in sorted(used):
        try:
            part = count_class(
                int((labels == class_index).sum()),
                keep=spec.minority.keep if spec.minority and names[class_index] in sets else None,
                held_out=spec.held_out,
                test_available=None if test_counts is None else int(test_counts[class_index]),
            )
        except ValueError as error:
            raise ValueError(f"data.dataset={spec.dataset!r}: class {names[class_index]!r} {error}") from error
        left_out = class_index not in main_classes
        counts[class_index] = dataclasses.replace(part, kept=0, held_out_kept=0) if left_out else part
    total = sum(part.kept for part in counts.values())
    check_held_out("data.main_classes", sum(part.held_out_kept for part in counts.values()))
    for name, chosen in sets.items():
        if chosen.classes is None:
            check_rows(name, chosen.samples, total)
        elif spec.minority is None:
            check_held_out(f"data.sets.{name}.classes", sum(counts[index].held_out for index in chosen.classes))
    prior = {index: counts[index].kept / total if index in counts else 0.0 for index in present}
    return _summary(names, main_classes, sets, prior, source.sample_shape(), counts)


def build(spec: DatasetSpec) -> ConstrainedData:
    """Read and split a data set; a pure function of the spec and the files it names.

    Raises: ValueError as validate_spec, and BadImageError (a ValueError) naming file and row of an unreadable image.
    """
    summary = validate_spec(spec)
    if spec.dataset == "gaussian_mixture":
        return _build_mixture(spec, summary)
    source, skipped = _source(spec).read()
    test_source = None
    if spec.test_path is not None:
        test_source, test_skipped = _source(spec, test=True, class_names=summary.class_names).read()
        skipped += test_skipped
        if test_source.samples.shape[1:] != source.samples.shape[1:]:
            raise ValueError(
                f"data.test_path={spec.test_path!r} has images of shape {test_source.samples.shape[1:]}, data.path of "
                f"{source.samples.shape[1:]}. Set data.size and data.channels to bring both to one shape"
            )
    # A class may have lost all its images to on_bad_image="skip".
    lost = sorted(set(summary.counts) - set(source.labels.tolist()))
    if lost:
        raise ValueError(
            f"data.path={spec.path!r}: no image of class {summary.class_names[lost[0]]!r} can be read "
            f"({skipped} skipped). Repair the images"
        )
    return split_by_class(
        source,
        class_names=summary.class_names,
        minority={index: spec.minority.keep for index in summary.constraint_classes.values()} if spec.minority else {},
        held_out=spec.held_out,
        seed=spec.seed,
        test_source=test_source,
        skipped=skipped,
        main_classes=summary.main_classes,
        sets=None if spec.minority else summary.sets,
    )


def _build_mixture(spec: DatasetSpec, summary: DatasetSummary) -> ConstrainedData:
    everything = _mixture(spec)
    mixture, laws = everything.restricted(summary.main_classes), _set_mixtures(everything, summary.sets)
    rng = np.random.default_rng([spec.seed])

    def draw(law: GaussianMixture, *, in_order: bool = False) -> LabelledSet:
        # Component counts are the weights to the nearest integer, so the prior carries no sampling error.
        edges = np.rint(np.concatenate([[0.0], np.cumsum(law.weights)]) * spec.count).astype(np.int64)
        components = np.repeat(np.arange(law.num_components, dtype=np.int64), np.diff(edges))
        components = components if in_order else rng.permutation(components)
        return LabelledSet(law.sample_components(components, rng).astype(np.float32), components)

    def draw_main() -> LabelledSet:
        part = draw(mixture)
        return LabelledSet(part.samples, np.array(summary.main_classes, dtype=np.int64)[part.labels])

    def draw_sets() -> dict[str, NDArray[np.float32]]:
        # One component has no order to permute, and so a minority is drawn as it was before there were sets.
        return {name: draw(law, in_order=law.num_components == 1).samples for name, law in laws.items()}

    main, held_out_main = draw_main(), draw_main()
    return ConstrainedData(
        main=main,
        constraints=draw_sets(),
        held_out_main=held_out_main,
        held_out_constraints=draw_sets(),
        reference=draw(everything.with_weights(np.ones(everything.num_components))),
        prior=class_shares(main.labels, range(everything.num_components)),
        constraint_classes=summary.constraint_classes,
        class_names=summary.class_names,
        sample_shape=(everything.dim,),
        mixture=mixture,
        constraint_mixtures=laws,
        reference_mixture=everything,
    )


def _source(spec: DatasetSpec, *, test: bool = False, class_names: tuple[str, ...] | None = None) -> ImageSource:
    shape = {"size": spec.size, "channels": spec.channels}
    if spec.dataset == "digits":
        return DigitsSource(**shape)
    prefix = "test_" if test else ""
    path = spec.test_path if test else spec.path
    shared = {"path": path, "field": f"data.{prefix}path", "skip": spec.on_bad_image == "skip", **shape}
    if spec.dataset == "folder":
        return FolderSource(class_names=class_names, **shared)
    if spec.dataset == "parquet":
        return ParquetSource(image_column=spec.image_column, label_column=spec.label_column, **shared)
    labels_path = (spec.test_labels_path if test else spec.labels_path) or labels_path_beside(path)
    if labels_path is None:
        raise ValueError(
            f"data.{prefix}labels_path is not given, and data.{prefix}path={path!r} has no usual IDX name to find it "
            "by. Give the label file"
        )
    return IdxSource(labels_path=labels_path, labels_field=f"data.{prefix}labels_path", **shared)


def _test_labels(spec: DatasetSpec, labels: NDArray[np.int64], names: tuple[str, ...]) -> NDArray[np.int64]:
    test_labels, _ = _source(spec, test=True, class_names=names).labels()
    if unknown := sorted(set(test_labels.tolist()) - set(labels.tolist())):
        raise ValueError(
            f"data.test_path={spec.test_path!r} has images of class {unknown[0]}, data.path={spec.path!r} has none. "
            "Give test images of the classes trained on"
        )
    return test_labels


def _class_indices(field: str, values, spec: DatasetSpec, names: tuple[str, ...], present) -> tuple[int, ...]:
    chosen = []
    for position, value in enumerate(values):
        index = names.index(value) if isinstance(value, str) and value in names else value
        where = f"{field}[{position}]={value!r}"
        if isinstance(index, bool) or index not in present:
            known = ", ".join(f"{known} ({names[known]})" for known in present)
            raise ValueError(f"{where} is not a class of data.dataset={spec.dataset!r}: choose from {known}")
        if index in chosen:
            raise ValueError(f"{where} is given twice: name each class once")
        chosen.append(index)
    return tuple(chosen)


def _main_classes(spec: DatasetSpec, names: tuple[str, ...], present) -> tuple[int, ...]:
    if spec.main_classes is None:
        return tuple(present)
    return tuple(sorted(_class_indices("data.main_classes", spec.main_classes, spec, names, present)))


def _sets(spec: DatasetSpec, names: tuple[str, ...], present) -> dict[str, SetSpec]:
    """The constraint sets in order, classes as ascending indices; a minority class is a set with the class's name."""
    if spec.minority is not None:
        indices = _class_indices("data.minority.classes", spec.minority.classes, spec, names, present)
        for position, index in enumerate(indices):
            where = f"data.minority.classes[{position}]={spec.minority.classes[position]!r}"
            _check_name(where, names[index], remedy="Rename the class")
        return {names[index]: SetSpec(classes=(index,)) for index in indices}
    sets = dict(spec.sets or {})
    for name, chosen in sets.items():
        if chosen.classes is not None:
            indices = _class_indices(f"data.sets.{name}.classes", chosen.classes, spec, names, present)
            sets[name] = SetSpec(classes=tuple(sorted(indices)))
    return sets


def _summary(names, main_classes, sets, prior, sample_shape, counts) -> DatasetSummary:
    classes = {name: chosen.classes for name, chosen in sets.items() if chosen.classes is not None}
    return DatasetSummary(
        class_names=names,
        constraint_names=tuple(sets),
        constraint_classes={name: indices[0] for name, indices in classes.items() if len(indices) == 1},
        prior=prior,
        sample_shape=sample_shape,
        counts=counts,
        main_classes=main_classes,
        sets=sets,
    )


def _mixture(part: DatasetSpec | SetSpec, field: str = "data") -> GaussianMixture:
    for name in ("means", "stds"):
        if getattr(part, name) is None:
            raise ValueError(f"{field}.{name}=None: a gaussian_mixture needs it, one entry a component")
    weights = part.weights if part.weights is not None else np.ones(len(part.means))
    try:
        return GaussianMixture(part.means, part.stds, weights)
    except ValueError as error:
        raise ValueError(
            f"{field}.means={part.means}, {field}.stds={part.stds}, {field}.weights={part.weights}: {error}"
        ) from error


def _set_mixtures(mixture: GaussianMixture, sets: dict[str, SetSpec]) -> dict[str, GaussianMixture]:
    """The law of each constraint set, given the mixture its components are those of."""
    laws = {}
    for name, chosen in sets.items():
        field = f"data.sets.{name}"
        laws[name] = mixture.restricted(chosen.classes) if chosen.classes is not None else _mixture(chosen, field)
        if laws[name].dim != mixture.dim:
            raise ValueError(
                f"{field}.means={chosen.means} are points of {laws[name].dim} coordinates, data.means of "
                f"{mixture.dim}: give both as many"
            )
    return laws


def _check_count(spec: DatasetSpec, laws: list[GaussianMixture]) -> None:
    smallest = min(float(law.weights.min()) for law in laws)
    if spec.count * smallest < 1:
        raise ValueError(f"data.count={spec.count} leaves a component of weight {smallest:.3g} empty. Raise data.count")


def _check_fields(spec: DatasetSpec) -> None:
    if spec.dataset not in DATASETS:
        raise ValueError(f"data.dataset={spec.dataset!r} is not known: choose from {', '.join(DATASETS)}")
    if spec.on_bad_image not in ("error", "skip"):
        raise ValueError(f"data.on_bad_image={spec.on_bad_image!r} is not known: choose 'error' or 'skip'")
    if not 0 < spec.held_out < 1:
        raise ValueError(f"data.held_out={spec.held_out} must lie between 0 and 1: certificates need held-out images")
    for name, least in (("seed", 0), ("count", 1)):
        if getattr(spec, name) < least:
            raise ValueError(f"data.{name}={getattr(spec, name)} must be at least {least}: choose another")
    if spec.size is not None and spec.size < 1:
        raise ValueError(f"data.size={spec.size} must be at least 1 pixel, or left out to keep the images' own size")
    if spec.channels not in (None, 1, 3):
        raise ValueError(
            f"data.channels={spec.channels} must be 1 (grey) or 3 (RGB), or left out to keep the images' own"
        )
    has_files = spec.dataset in ("parquet", "folder", "idx")
    for name in ("path", "test_path", "labels_path", "test_labels_path"):
        value = getattr(spec, name)
        if value is not None and (not has_files or ("labels" in name and spec.dataset != "idx")):
            raise ValueError(f"data.{name}={value!r} means nothing to data.dataset={spec.dataset!r}: remove it")
        if (
            value is not None
            and "://" not in value
            and not any(mark in value for mark in "*?[")
            and not os.path.exists(value)  # unlike Path.exists, also False for a name too long
        ):
            raise ValueError(f"data.{name}={value!r} does not exist: correct the path")
    if spec.path is not None and spec.path == spec.test_path:
        raise ValueError(
            f"data.test_path={spec.test_path!r} is data.path too: held-out images must be others, remove it"
        )
    if has_files and spec.path is None:
        raise ValueError(f"data.path=None: data.dataset={spec.dataset!r} needs the path of its files")
    if spec.minority is not None:
        if not spec.minority.classes:
            raise ValueError("data.minority.classes=() is empty: name a class, or remove data.minority")
        keep = spec.minority.keep
        if isinstance(keep, bool) or not (keep >= 1 if isinstance(keep, int) else 0 < keep <= 1):
            raise ValueError(
                f"data.minority.keep={keep} must be a fraction in (0, 1] (with a decimal point) or a whole number >= 1"
            )
    _check_sets(spec)


def _check_sets(spec: DatasetSpec) -> None:
    for name in ("sets", "main_classes"):
        if spec.minority is not None and getattr(spec, name) is not None:
            raise ValueError(
                f"data.minority and data.{name} are both given: a minority is cut out of main and makes the "
                "constraints itself. Remove one of the two"
            )
    if spec.main_classes is not None and not spec.main_classes:
        raise ValueError("data.main_classes=() is empty: name a class, or remove it to take all of them")
    if spec.sets is not None and not (isinstance(spec.sets, dict) and spec.sets):
        raise ValueError(f"data.sets={spec.sets} names no set: give a set a name, or remove data.sets")
    for name, chosen in (spec.sets or {}).items():
        field = f"data.sets.{name}"
        _check_name(f"data.sets[{name!r}]", name, remedy="Rename the set")
        if not isinstance(chosen, SetSpec):
            raise ValueError(f"{field}={chosen!r} is not a set: give its fields, such as {{classes: [0]}}")
        forms = ("classes", "means") if spec.dataset == "gaussian_mixture" else ("classes", "samples")
        given = [form for form in ("classes", "samples", "means") if getattr(chosen, form) is not None]
        if len(given) != 1:
            raise ValueError(f"{field} gives {' and '.join(given) or 'no samples'}: give exactly one of {forms}")
        if given[0] not in forms:
            raise ValueError(
                f"{field}.{given[0]}={getattr(chosen, given[0])} means nothing to data.dataset={spec.dataset!r}: give "
                f"one of {forms} instead"
            )
        if not getattr(chosen, given[0]):
            raise ValueError(f"{field}.{given[0]}=() is empty: name what is in the set, or remove the set")
        for option in ("stds", "weights"):
            if chosen.means is None and getattr(chosen, option) is not None:
                raise ValueError(
                    f"{field}.{option}={getattr(chosen, option)} belongs to means, and the set gives {given[0]}: "
                    "remove it"
                )


def _check_name(where: str, name: str, *, remedy: str) -> None:
    if not isinstance(name, str) or not name.strip():
        raise ValueError(f"{where}: a constraint's name must be text that is not empty. {remedy}")
    if name in RESERVED_NAMES:
        raise ValueError(f"{where}: a constraint can't be called {name!r}, the program uses that name. {remedy}")


def _parsed(kind: type, values: dict, field: str):
    known = sorted(entry.name for entry in dataclasses.fields(kind))
    if unknown := sorted(set(values) - set(known)):
        raise ValueError(f"{field}.{unknown[0]} is not a known field: known are {known}")
    return kind(**{name: _as_tuple(value) for name, value in values.items()})


def _as_tuple(value):
    return tuple(_as_tuple(entry) for entry in value) if isinstance(value, list | tuple) else value
