"""What one trial learns from: the main set, one set a constraint, and held-out images of both.

The split is a pure function of (labels, minority classes, keep, sets, classes of main, held-out fraction, seed). Each
class is shuffled by its own generator, so cutting one class harder leaves the other classes as they were, a smaller cut
is a subset of a larger one, and constraint sets that are not cut leave main as it was.
"""

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from dualsweep.datasets.gaussians import GaussianMixture

if TYPE_CHECKING:
    from dualsweep.datasets.spec import SetSpec


@dataclass(frozen=True, eq=False)
class LabelledSet:
    """Samples with their class; row i of one belongs to row i of the other."""

    samples: NDArray[np.float32]  # shape (n, *sample_shape); images: (n, channels, height, width) in [-1, 1]
    labels: NDArray[np.int64]  # shape (n,), class indices

    def __post_init__(self) -> None:
        if self.labels.shape != (len(self.samples),):
            raise ValueError(f"labels have shape {self.labels.shape}, expected {(len(self.samples),)}: one a sample")

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: NDArray[np.int64]) -> "LabelledSet":
        """The rows named by ``indices``, shape (k,), copied."""
        return LabelledSet(self.samples[indices], self.labels[indices])

    def of_class(self, class_index: int) -> NDArray[np.float32]:
        """The samples of one class, shape (k, *sample_shape)."""
        return self.samples[self.labels == class_index]


@dataclass(frozen=True, kw_only=True, eq=False)
class ConstrainedData:
    """The data of a constrained problem.

    No image of ``main`` or ``constraints`` is in a held-out set, with one exception: a set of chosen images
    (``SetSpec.samples``) is its own held-out set, for there are no other images of its law.
    """

    main: LabelledSet  # training images of main's classes, after the minority classes were cut
    constraints: dict[str, NDArray[np.float32]]  # constraint name -> its training samples
    held_out_main: LabelledSet  # other images, classes cut alike, so the law is that of ``main`` up to rounding
    held_out_constraints: dict[str, NDArray[np.float32]]  # constraint name -> held-out and not-kept samples
    reference: LabelledSet  # every image there is, uncut and shuffled: for the classifier of the evaluation
    prior: dict[int, float]  # class index -> its share of ``main``, 0 where main leaves it out; sums to 1
    constraint_classes: dict[str, int]  # constraint name -> class index, for the constraints that are exactly one class
    class_names: tuple[str, ...]
    sample_shape: tuple[int, ...]
    skipped: int = 0  # unreadable images left out; only with on_bad_image="skip"
    mixture: GaussianMixture | None = None  # the exact law of ``main`` where it is known: only main's components
    constraint_mixtures: dict[str, GaussianMixture] = field(default_factory=dict)  # likewise, of each constraint
    reference_mixture: GaussianMixture | None = None  # every component, numbered as classes are: its posterior labels

    @property
    def constraint_names(self) -> tuple[str, ...]:
        """Names in the order of ``constraints``."""
        return tuple(self.constraints)

    @property
    def sizes(self) -> dict[str, int]:
        """Stream name -> number of training samples: "main" first, then one stream a constraint."""
        return {"main": len(self.main), **{name: len(samples) for name, samples in self.constraints.items()}}

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over every array with its name, type and shape: equal exactly if the data are."""
        digest = hashlib.sha256(repr((self.class_names, self.sample_shape)).encode())
        for name in ("main", "held_out_main", "reference"):
            part: LabelledSet = getattr(self, name)
            _update(digest, f"{name}.samples", part.samples)
            _update(digest, f"{name}.labels", part.labels)
        for name in ("constraints", "held_out_constraints"):
            for key, samples in sorted(getattr(self, name).items()):
                _update(digest, f"{name}.{key}", samples)
        return digest.hexdigest()


@dataclass(frozen=True, kw_only=True)
class ClassCounts:
    """How many images of one class go where: ``train`` + ``held_out`` <= what there is, ``kept`` <= ``train``."""

    train: int  # available for training
    kept: int  # of those, in ``main``; the rest of a class that is cut joins its held-out pool
    held_out: int  # set aside before the cut
    held_out_kept: int  # of those, in ``held_out_main``


def count_class(
    available: int, *, keep: float | int | None, held_out: float, test_available: int | None = None
) -> ClassCounts:
    """Sizes of the parts of one class.

    Args:
        available: images of the class in the training source.
        keep: None for an uncut class, a float for a fraction of ``train``, an int for a number of images.
        held_out: fraction set aside, in (0, 1); unused where ``test_available`` is given.
        test_available: images of the class in a separate test source, or None without one.
    Raises: ValueError if a part would be empty or ``keep`` asks for more than there is; the message has no field name
        in front, the caller knows it.
    """
    if test_available is None:
        if available < 2:
            raise ValueError(f"has {available} image(s), needs 2: one to train on and one held out. Add images")
        set_aside = min(max(round(held_out * available), 1), available - 1)
        train = available - set_aside
    else:
        if available < 1:
            raise ValueError("has no image in data.path. Add images")
        train, set_aside = available, test_available
    if keep is None:
        return ClassCounts(train=train, kept=train, held_out=set_aside, held_out_kept=set_aside)
    kept = keep if isinstance(keep, int) else round(keep * train)
    if kept > train:
        raise ValueError(f"has {train} images to train on, fewer than data.minority.keep={keep}. Lower keep")
    if kept < 1:
        raise ValueError(
            f"would keep none of its {train} images with data.minority.keep={keep}. Raise keep to {1 / train:.3g} or "
            "more"
        )
    if set_aside + train - kept < 1:
        raise ValueError("has no image left to hold out. Lower data.minority.keep or add test images")
    held_out_kept = min(max(round(set_aside * kept / train), 1), set_aside)
    return ClassCounts(train=train, kept=kept, held_out=set_aside, held_out_kept=held_out_kept)


def split_by_class(
    source: LabelledSet,
    *,
    class_names: tuple[str, ...],
    minority: Mapping[int, float | int],
    held_out: float,
    seed: int,
    test_source: LabelledSet | None = None,
    skipped: int = 0,
    main_classes: Collection[int] | None = None,
    sets: Mapping[str, "SetSpec"] | None = None,
) -> ConstrainedData:
    """Cut the minority classes of a labelled source, gather the constraint sets and set held-out images aside.

    Args:
        source: every image of the training source.
        minority: class index -> how much of it is kept (see count_class); one constraint each, in this order.
        held_out: fraction of each class set aside, in (0, 1); unused with a ``test_source``.
        test_source: images of a separate test set; then all of ``source`` is for training.
        main_classes: the classes of ``main``; None: all of them.
        sets: constraint name -> class indices or rows of ``main``, in the constraints' order; not with a ``minority``.
            None: one set a minority class.
    Raises: ValueError naming the class or the set if one of its parts would be empty, and a row that main lacks.
    """
    classes = np.unique(source.labels).tolist()
    main_classes = set(classes if main_classes is None else main_classes)
    groups = {class_names[class_index]: (class_index,) for class_index in minority}
    groups |= {name: chosen.classes for name, chosen in (sets or {}).items() if chosen.classes is not None}
    grouped = {class_index for group in groups.values() for class_index in group}
    main, held_out_main = [], []
    pools, held_out_pools = {}, {}  # class index -> what a constraint may train on, what measures it
    test_counts = None if test_source is None else np.bincount(test_source.labels, minlength=len(class_names))
    for class_index in classes:
        if class_index not in main_classes | grouped:
            continue
        rows = np.flatnonzero(source.labels == class_index)
        rows = rows[np.random.default_rng([seed, class_index]).permutation(len(rows))]
        try:
            counts = count_class(
                len(rows),
                keep=minority.get(class_index),
                held_out=held_out,
                test_available=None if test_counts is None else int(test_counts[class_index]),
            )
        except ValueError as error:
            raise ValueError(f"class {class_names[class_index]!r} {error}") from error
        kept, spare, aside = np.split(rows, [counts.kept, counts.train])
        if test_source is None:
            aside_set = source.take(aside)
        else:
            test_rows = np.flatnonzero(test_source.labels == class_index)
            order = np.random.default_rng([seed, class_index, 1]).permutation(len(test_rows))
            aside_set = test_source.take(test_rows[order])
        if class_index in main_classes:
            main.append(kept)
            held_out_main.append(aside_set.take(np.arange(counts.held_out_kept)))
        if class_index in grouped:
            pools[class_index] = source.take(kept)
            held_out_pools[class_index] = _joined([aside_set, source.take(spare)])
    main_set = _shuffled(source.take(np.concatenate(main)), seed)
    held_out_set = _shuffled(_joined(held_out_main), seed)
    check_held_out("data.main_classes", len(held_out_set))
    constraints, held_out_constraints = {}, {}
    for name in groups if sets is None else sets:
        if name in groups:
            constraints[name] = _pooled([pools[class_index] for class_index in groups[name]], seed)
            held_out_constraints[name] = _pooled([held_out_pools[class_index] for class_index in groups[name]], seed)
            check_held_out(f"data.sets.{name}.classes", len(held_out_constraints[name]))
        else:
            check_rows(name, sets[name].samples, len(main_set))
            constraints[name] = held_out_constraints[name] = main_set.samples[list(sets[name].samples)]
    everything = source if test_source is None else _joined([source, test_source])
    return ConstrainedData(
        main=main_set,
        constraints=constraints,
        held_out_main=held_out_set,
        held_out_constraints=held_out_constraints,
        reference=_shuffled(everything, seed),
        prior=class_shares(main_set.labels, classes),
        constraint_classes={name: group[0] for name, group in groups.items() if len(group) == 1},
        class_names=class_names,
        sample_shape=source.samples.shape[1:],
        skipped=skipped,
    )


def check_rows(name: str, rows: Sequence[int], size: int) -> None:
    """Refuse rows that a main set of ``size`` samples lacks, and one named twice. Raises: ValueError by field."""
    seen = set()
    for position, row in enumerate(rows):
        where = f"data.sets.{name}.samples[{position}]={row!r}"
        if isinstance(row, bool) or not isinstance(row, int) or not 0 <= row < size:
            raise ValueError(f"{where} is not a row of the main set: choose whole numbers from 0 to {size - 1}")
        if row in seen:
            raise ValueError(f"{where} is given twice: name each row once")
        seen.add(row)


def check_held_out(field: str, count: int) -> None:
    """Refuse classes of which no image is held out, as a test set without them leaves it. Raises: ValueError."""
    if count < 1:
        raise ValueError(f"{field}: data.test_path holds no image of these classes to measure on. Add test images")


def class_shares(labels: NDArray[np.int64], classes: Collection[int]) -> dict[int, float]:
    """Class index -> share of the labels, 0 for a class that does not occur."""
    counts = np.bincount(labels, minlength=max(classes) + 1)
    return {class_index: float(counts[class_index]) / len(labels) for class_index in classes}


def _joined(parts: list[LabelledSet]) -> LabelledSet:
    return LabelledSet(
        np.concatenate([part.samples for part in parts]), np.concatenate([part.labels for part in parts])
    )


def _pooled(parts: list[LabelledSet], seed: int) -> NDArray[np.float32]:
    # One class is in random order already.
    return parts[0].samples if len(parts) == 1 else _shuffled(_joined(parts), seed).samples


def _shuffled(part: LabelledSet, seed: int) -> LabelledSet:
    # Readers return images class by class or in file order; a reader of a prefix should see every class.
    return part.take(np.random.default_rng([seed, len(part)]).permutation(len(part)))


def _update(digest, name: str, array: NDArray) -> None:
    digest.update(repr((name, array.dtype.str, array.shape)).encode())
    digest.update(np.ascontiguousarray(array).data)
