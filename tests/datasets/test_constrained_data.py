"""The split: who is cut, who is held out, and that nothing trained on is ever measured."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dualsweep.datasets import DatasetSpec, LabelledSet, MinoritySpec, build, validate_spec
from dualsweep.datasets.constrained_data import split_by_class

DIGITS = DatasetSpec(minority=MinoritySpec(classes=(4, 5, 7), keep=0.1))


def numbered(per_class: list[int]) -> LabelledSet:
    """Samples that are their own row numbers, so that each can be recognised after the split."""
    labels = np.repeat(np.arange(len(per_class)), per_class)
    return LabelledSet(np.arange(len(labels), dtype=np.float32)[:, None], labels)


def split(per_class, minority, **changes):
    names = tuple(f"class_{index}" for index in range(len(per_class)))
    arguments = {"class_names": names, "minority": minority, "held_out": 0.25, "seed": 0, **changes}
    return split_by_class(numbered(per_class), **arguments)


def rows(*parts) -> set[int]:
    return {int(value) for part in parts for value in np.asarray(part).ravel()}


@settings(max_examples=50, deadline=None)
@given(
    per_class=st.lists(st.integers(5, 60), min_size=2, max_size=5),
    keep=st.one_of(st.floats(0.5, 1), st.just(1)),
    held_out=st.floats(0.05, 0.6),
    seed=st.integers(0, 50),
)
def test_no_image_is_both_trained_on_and_held_out(per_class, keep, held_out, seed):
    data = split(per_class, {0: keep, 1: keep}, held_out=held_out, seed=seed)
    trained = rows(data.main.samples)
    held = rows(data.held_out_main.samples, *data.held_out_constraints.values())
    assert not trained & held
    assert rows(*data.constraints.values()) <= trained
    assert len(trained) == len(data.main)  # no image twice
    assert rows(data.reference.samples) == set(range(sum(per_class)))
    # Every image of a minority class is used: trained on or held out.
    for index in (0, 1):
        name = f"class_{index}"
        assert len(data.constraints[name]) + len(data.held_out_constraints[name]) == per_class[index]
    assert sum(data.prior.values()) == pytest.approx(1)


def test_labels_stay_with_their_samples():
    source = numbered([40, 40, 40])
    data = split([40, 40, 40], {1: 5})
    for part in (data.main, data.held_out_main, data.reference):
        assert (source.labels[part.samples[:, 0].astype(int)] == part.labels).all()
    for part in (data.constraints["class_1"], data.held_out_constraints["class_1"]):
        assert (source.labels[part[:, 0].astype(int)] == 1).all()
    np.testing.assert_array_equal(np.sort(data.main.of_class(1), axis=0), np.sort(data.constraints["class_1"], axis=0))


def test_both_main_sets_follow_the_same_imbalanced_law():
    data = split([400, 400, 400], {2: 0.1})
    assert np.bincount(data.main.labels).tolist() == [300, 300, 30]
    assert np.bincount(data.held_out_main.labels).tolist() == [100, 100, 10]
    assert data.prior == {0: 300 / 630, 1: 300 / 630, 2: 30 / 630}
    assert np.bincount(data.reference.labels).tolist() == [400, 400, 400]
    assert len(data.held_out_constraints["class_2"]) == 100 + 270  # its own held-out images and those not kept


def test_a_whole_number_keeps_that_many_images():
    assert len(split([400, 400], {1: 18}).constraints["class_1"]) == 18


def test_a_smaller_cut_is_a_subset_and_leaves_the_other_classes_alone():
    large, small = split([100, 100], {1: 0.5}), split([100, 100], {1: 0.1})
    assert rows(small.constraints["class_1"]) < rows(large.constraints["class_1"])
    assert rows(small.main.of_class(0)) == rows(large.main.of_class(0))


def test_constraints_keep_the_order_of_the_request():
    data = split([20, 20, 20], {2: 0.5, 0: 0.5})
    assert data.constraint_names == ("class_2", "class_0")
    assert list(data.sizes) == ["main", "class_2", "class_0"]
    assert data.constraint_classes == {"class_2": 2, "class_0": 0}


def test_separate_test_images_leave_the_whole_training_source_for_training():
    test = LabelledSet(1000 + np.arange(30, dtype=np.float32)[:, None], np.repeat([0, 1], 15))
    data = split([40, 40], {1: 0.25}, test_source=test)
    assert np.bincount(data.main.labels).tolist() == [40, 10]
    assert np.bincount(data.held_out_main.labels).tolist() == [15, 4]
    assert min(rows(data.held_out_main.samples)) >= 1000
    assert len(data.held_out_constraints["class_1"]) == 15 + 30
    assert len(data.reference) == 110


@pytest.mark.parametrize(
    "per_class, keep, message",
    [
        ([40, 40], 31, "'class_1' has 30 images to train on, fewer than data.minority.keep=31"),
        ([40, 40], 0.01, "would keep none of its 30 images .* Raise keep to 0.0333 or more"),
        ([40, 1], 1, r"'class_1' has 1 image\(s\), needs 2"),
    ],
)
def test_a_part_that_would_be_empty_is_refused_by_class(per_class, keep, message):
    with pytest.raises(ValueError, match=message):
        split(per_class, {1: keep})


def test_labels_of_another_length_are_refused():
    with pytest.raises(ValueError, match=r"labels have shape \(2,\), expected \(3,\)"):
        LabelledSet(np.zeros((3, 1), np.float32), np.zeros(2, np.int64))


def test_the_digits_are_the_main_jobs_data():
    data = build(DIGITS)
    assert data.sample_shape == (1, 8, 8) and data.main.samples.dtype == np.float32
    assert data.main.samples.min() == -1 and data.main.samples.max() == 1
    assert data.constraint_names == ("digit_4", "digit_5", "digit_7")
    assert len(data.reference) == 1797
    assert sum(data.prior[index] for index in (4, 5, 7)) < 0.05
    assert all(len(samples) > 150 for samples in data.held_out_constraints.values())


def test_the_summary_foretells_what_build_gives():
    summary, data = validate_spec(DIGITS), build(DIGITS)
    assert summary.prior == pytest.approx(data.prior)
    assert summary.constraint_names == data.constraint_names
    assert summary.constraint_classes == data.constraint_classes
    assert summary.sample_shape == data.sample_shape
    assert summary.class_names == data.class_names


def test_the_fingerprint_is_that_of_the_arrays():
    data = build(DIGITS)
    assert data.fingerprint == build(DIGITS).fingerprint
    assert data.fingerprint != build(dataclasses.replace(DIGITS, seed=1)).fingerprint
    touched = data.constraints["digit_4"].copy()
    touched[0, 0, 0, 0] += 0.5
    changed = dataclasses.replace(data, constraints={**data.constraints, "digit_4": touched})
    assert changed.fingerprint != data.fingerprint


def test_without_a_minority_there_is_no_constraint():
    data = build(DatasetSpec())
    assert data.constraints == {} and data.sizes == {"main": len(data.main)}


def test_a_mixture_brings_its_exact_law_and_fresh_draws():
    spec = DatasetSpec(
        dataset="gaussian_mixture", means=((-1.0, 0.0), (1.0, 0.0), (0.0, 2.0)), stds=(0.2, 0.2, 0.1),
        weights=(0.9, 0.06, 0.04), count=500, minority=MinoritySpec(classes=(1, "component_2")),
    )  # fmt: skip
    data = build(spec)
    assert data.sample_shape == (2,)
    assert data.prior == {0: 0.9, 1: 0.06, 2: 0.04}  # exact: counts are the weights to the nearest sample
    assert {name: part.shape for name, part in data.constraints.items()} == {
        "component_1": (500, 2),
        "component_2": (500, 2),
    }
    assert data.mixture.weights == pytest.approx([0.9, 0.06, 0.04])
    for name, index in data.constraint_classes.items():
        for part in (data.constraints[name], data.held_out_constraints[name]):
            # Components 3 standard deviations or more apart: five standard errors of 500 draws.
            assert part.mean(axis=0) == pytest.approx(spec.means[index], abs=5 * spec.stds[index] / 500**0.5)
    sets = [data.main.samples, data.held_out_main.samples, *data.constraints.values()]
    sets += [*data.held_out_constraints.values(), data.reference.samples]
    assert len(np.unique(np.concatenate(sets), axis=0)) == sum(map(len, sets))  # no draw is used twice
    assert data.fingerprint == build(spec).fingerprint
