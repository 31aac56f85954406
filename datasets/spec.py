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
    class_shares,
    count_class,
    split_by_class,
)
from dualsweep.datasets.gaussians import GaussianMixture
from dualsweep.datasets.idx_images import IdxSource, labels_path_beside
from dualsweep.datasets.images import DigitsSource, FolderSource, ImageSource
from dualsweep.datasets.parquet_images import ParquetSource

DATASETS = ("digits", "parquet", "folder", "idx", "gaussian_mixture")
MAIN_STREAM = "main"  # the stream of the imbalanced data; a constraint may not have its name


@dataclass(frozen=True, kw_only=True)
class MinoritySpec:
    """The classes that are cut, each of which gets a constraint."""

    classes: tuple[int | str, ...]  # class indices or class names
    keep: float | int = 0.1  # float: fraction in (0, 1] of a class's training images; int: that many images


@dataclass(frozen=True, kw_only=True)
class DatasetSpec:
    """One data set: where it is, how it is read, which classes are cut and what is held out."""

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
    minority: MinoritySpec | None = None  # None: no class is cut and there is no constraint
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
        known = {entry.name for entry in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ValueError(f"data.{unknown[0]} is not a known field: known are {sorted(known)}")
        values = {name: _as_tuple(value) for name, value in values.items()}
        if isinstance(values.get("minority"), dict):
            minority = {name: _as_tuple(value) for name, value in values["minority"].items()}
            if unknown := sorted(set(minority) - {"classes", "keep"}):
                raise ValueError(f"data.minority.{unknown[0]} is not a known field: known are ['classes', 'keep']")
            values["minority"] = MinoritySpec(**minority)
        return cls(**values)


@dataclass(frozen=True, kw_only=True)
class DatasetSummary:
    """What is known of a data set before its images are decoded."""

    class_names: tuple[str, ...]
    constraint_names: tuple[str, ...]  # one a minority class, in the order of minority.classes
    constraint_classes: dict[str, int]  # constraint name -> class index
    prior: dict[int, float]  # class index -> share of the main set, before unreadable images are skipped
    sample_shape: tuple[int, ...] | None  # None: only known after reading
    counts: dict[int, ClassCounts]  # empty for a gaussian_mixture


def validate_spec(spec: DatasetSpec) -> DatasetSummary:
    """Check a spec without decoding its images: a label column, file headers and one image are all it reads.

    Raises: ValueError naming field, value and remedy.
    """
    _check_fields(spec)
    if spec.dataset == "gaussian_mixture":
        mixture = _mixture(spec)
        names = tuple(f"component_{index}" for index in range(mixture.num_components))
        chosen = _minority_classes(spec, names, range(len(names)))
        return _summary(names, chosen, dict(enumerate(mixture.weights.tolist())), (mixture.dim,), {})
    source = _source(spec)
    labels, names = source.labels()
    present = np.unique(labels).tolist()
    chosen = _minority_classes(spec, names, present)
    test_counts = None
    if spec.test_path is not None:
        test_counts = np.bincount(_test_labels(spec, labels, names), minlength=len(names))
    counts = {}
    for class_index in present:
        try:
            counts[class_index] = count_class(
                int((labels == class_index).sum()),
                keep=spec.minority.keep if class_index in chosen else None,
                held_out=spec.held_out,
                test_available=None if test_counts is None else int(test_counts[class_index]),
            )
        except ValueError as error:
            raise ValueError(f"data.dataset={spec.dataset!r}: class {names[class_index]!r} {error}") from error
    total = sum(part.kept for part in counts.values())
    prior = {class_index: part.kept / total for class_index, part in counts.items()}
    return _summary(names, chosen, prior, source.sample_shape(), counts)


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
        minority={index: spec.minority.keep for index in summary.constraint_classes.values()},
        held_out=spec.held_out,
        seed=spec.seed,
        test_source=test_source,
        skipped=skipped,
    )


def _build_mixture(spec: DatasetSpec, summary: DatasetSummary) -> ConstrainedData:
    mixture = _mixture(spec)
    rng = np.random.default_rng([spec.seed])

    def draw(shares: NDArray[np.float64]) -> LabelledSet:
        # Component counts are the shares to the nearest integer, so the prior carries no sampling error.
        edges = np.rint(np.concatenate([[0.0], np.cumsum(shares)]) * spec.count).astype(np.int64)
        components = rng.permutation(np.repeat(np.arange(len(shares), dtype=np.int64), np.diff(edges)))
        return LabelledSet(mixture.sample_components(components, rng).astype(np.float32), components)

    def draw_component(index: int) -> NDArray[np.float32]:
        return mixture.sample_components(np.full(spec.count, index), rng).astype(np.float32)

    main, held_out_main = draw(mixture.weights), draw(mixture.weights)
    equal = np.full(mixture.num_components, 1 / mixture.num_components)
    return ConstrainedData(
        main=main,
        constraints={name: draw_component(index) for name, index in summary.constraint_classes.items()},
        held_out_main=held_out_main,
        held_out_constraints={name: draw_component(index) for name, index in summary.constraint_classes.items()},
        reference=draw(equal),
        prior=class_shares(main.labels),
        constraint_classes=summary.constraint_classes,
        class_names=summary.class_names,
        sample_shape=(mixture.dim,),
        mixture=mixture,
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


def _minority_classes(spec: DatasetSpec, names: tuple[str, ...], present) -> tuple[int, ...]:
    if spec.minority is None:
        return ()
    chosen = []
    for position, value in enumerate(spec.minority.classes):
        index = names.index(value) if isinstance(value, str) and value in names else value
        where = f"data.minority.classes[{position}]={value!r}"
        if index not in present:
            known = ", ".join(f"{known} ({names[known]})" for known in present)
            raise ValueError(f"{where} is not a class of data.dataset={spec.dataset!r}: choose from {known}")
        if index in chosen:
            raise ValueError(f"{where} is given twice: name each class once")
        if names[index] == MAIN_STREAM:
            raise ValueError(
                f"{where}: a constraint can't be called {MAIN_STREAM!r}, the main data are. Rename the class"
            )
        chosen.append(index)
    return tuple(chosen)


def _summary(names, chosen, prior, sample_shape, counts) -> DatasetSummary:
    return DatasetSummary(
        class_names=names,
        constraint_names=tuple(names[index] for index in chosen),
        constraint_classes={names[index]: index for index in chosen},
        prior=prior,
        sample_shape=sample_shape,
        counts=counts,
    )


def _mixture(spec: DatasetSpec) -> GaussianMixture:
    for name in ("means", "stds"):
        if getattr(spec, name) is None:
            raise ValueError(f"data.{name}=None: a gaussian_mixture needs it, one entry a component")
    weights = spec.weights if spec.weights is not None else np.ones(len(spec.means))
    try:
        mixture = GaussianMixture(spec.means, spec.stds, weights)
    except ValueError as error:
        raise ValueError(
            f"data.means={spec.means}, data.stds={spec.stds}, data.weights={spec.weights}: {error}"
        ) from error
    smallest = float(mixture.weights.min())
    if spec.count * smallest < 1:
        raise ValueError(f"data.count={spec.count} leaves a component of weight {smallest:.3g} empty. Raise data.count")
    return mixture


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


def _as_tuple(value):
    return tuple(_as_tuple(entry) for entry in value) if isinstance(value, list | tuple) else value
