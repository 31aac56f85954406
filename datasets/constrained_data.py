"""What one trial learns from: the imbalanced main set, one set a constraint, and held-out images of both.

The split is a pure function of (labels, minority classes, keep, held-out fraction, seed). Each class is shuffled by
its own generator, so cutting one class harder leaves the other classes as they were, and a smaller cut is a subset of a
larger one.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from dualsweep.datasets.gaussians import GaussianMixture


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
    """The data of a constrained problem; no image of ``main`` or ``constraints`` is in a held-out set."""

    main: LabelledSet  # training images after the minority classes were cut
    constraints: dict[str, NDArray[np.float32]]  # class name -> its kept training samples
    held_out_main: LabelledSet  # other images, classes cut alike, so the law is that of ``main`` up to rounding
    held_out_constraints: dict[str, NDArray[np.float32]]  # class name -> held-out and not-kept samples
    reference: LabelledSet  # every image there is, uncut and shuffled: for the classifier of the evaluation
    prior: dict[int, float]  # class index -> its share of ``main``; sums to 1
    constraint_classes: dict[str, int]  # constraint name -> class index
    class_names: tuple[str, ...]
    sample_shape: tuple[int, ...]
    skipped: int = 0  # unreadable images left out; only with on_bad_image="skip"
    mixture: GaussianMixture | None = None  # the exact law of ``main`` where it is known

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
    kept: int  # of those, in ``main``; the rest joins the held-out pool of the class
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
) -> ConstrainedData:
    """Cut the minority classes of a labelled source and set held-out images aside.

    Args:
        source: every image of the training source.
        minority: class index -> how much of it is kept (see count_class); one constraint each, in this order.
        held_out: fraction of each class set aside, in (0, 1); unused with a ``test_source``.
        test_source: images of a separate test set; then all of ``source`` is for training.
    Raises: ValueError naming the class if one of its parts would be empty.
    """
    main, held_out_main = [], []
    constraints, held_out_constraints = {}, {}
    test_counts = None if test_source is None else np.bincount(test_source.labels, minlength=len(class_names))
    for class_index in np.unique(source.labels).tolist():
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
        main.append(kept)
        held_out_main.append(aside_set.take(np.arange(counts.held_out_kept)))
        if class_index in minority:
            name = class_names[class_index]
            constraints[name] = source.samples[kept]
            held_out_constraints[name] = np.concatenate([aside_set.samples, source.samples[spare]])
    main_set = _shuffled(source.take(np.concatenate(main)), seed)
    everything = source if test_source is None else _joined([source, test_source])
    ordered = [class_names[class_index] for class_index in minority]
    return ConstrainedData(
        main=main_set,
        constraints={name: constraints[name] for name in ordered},
        held_out_main=_shuffled(_joined(held_out_main), seed),
        held_out_constraints={name: held_out_constraints[name] for name in ordered},
        reference=_shuffled(everything, seed),
        prior=class_shares(main_set.labels),
        constraint_classes={class_names[class_index]: class_index for class_index in minority},
        class_names=class_names,
        sample_shape=source.samples.shape[1:],
        skipped=skipped,
    )


def class_shares(labels: NDArray[np.int64]) -> dict[int, float]:
    """Class index -> share of the labels, for the classes that occur."""
    classes, counts = np.unique(labels, return_counts=True)
    return {int(index): float(count) / len(labels) for index, count in zip(classes, counts, strict=True)}


def _joined(parts: list[LabelledSet]) -> LabelledSet:
    return LabelledSet(
        np.concatenate([part.samples for part in parts]), np.concatenate([part.labels for part in parts])
    )


def _shuffled(part: LabelledSet, seed: int) -> LabelledSet:
    # Readers return images class by class or in file order; a reader of a prefix should see every class.
    return part.take(np.random.default_rng([seed, len(part)]).permutation(len(part)))


def _update(digest, name: str, array: NDArray) -> None:
    digest.update(repr((name, array.dtype.str, array.shape)).encode())
    digest.update(np.ascontiguousarray(array).data)
