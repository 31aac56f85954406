"""Constraint sets that are not cut, and a main set of some of the classes: who is where, and by which law."""

import dataclasses

import numpy as np
import pytest
import yaml
from PIL import Image

from dualsweep.datasets import DatasetSpec, LabelledSet, MinoritySpec, SetSpec, build, validate_spec
from dualsweep.datasets.constrained_data import split_by_class
from dualsweep.orchestration.config import ConfigError, SweepConfig, load_config

SETS = {"even": SetSpec(classes=(0, 2)), "one": SetSpec(classes=(1,)), "picked": SetSpec(samples=(7, 0))}
MIXTURE = DatasetSpec(
    dataset="gaussian_mixture",
    means=((-2.0, 0.0), (2.0, 0.0), (0.0, 3.0)),
    stds=(0.3, 0.2, 0.4),
    weights=(5.0, 3.0, 2.0),
    count=840,  # every share here is a whole number of samples
    sets={
        "pair": SetSpec(classes=(2, "component_0")),
        "wide": SetSpec(means=((2.0, 0.0), (2.0, 1.0)), stds=(1.5, 0.5), weights=(1.0, 3.0)),
        "one": SetSpec(classes=(1,)),
    },
)


def numbered(per_class: list[int], start: int = 0) -> LabelledSet:
    """Samples that are their own row numbers, so that each can be recognised after the split."""
    labels = np.repeat(np.arange(len(per_class)), per_class)
    return LabelledSet(start + np.arange(len(labels), dtype=np.float32)[:, None], labels)


def split(sets=None, **changes):
    names = tuple(f"class_{index}" for index in range(4))
    arguments = {"class_names": names, "minority": {}, "held_out": 0.25, "seed": 0, "sets": sets, **changes}
    return split_by_class(numbered([40, 32, 20, 24]), **arguments)


def rows(*parts) -> set[int]:
    return {int(value) for part in parts for value in np.asarray(part).ravel()}


def test_a_set_holds_every_training_image_of_its_classes_and_is_measured_on_the_held_out_ones():
    plain, data = split(), split(SETS)
    for name, classes in (("even", (0, 2)), ("one", (1,))):
        assert rows(data.constraints[name]) == rows(*(plain.main.of_class(index) for index in classes))
        assert rows(data.held_out_constraints[name]) == rows(*(plain.held_out_main.of_class(i) for i in classes))
        assert len(data.constraints[name]) == len(rows(data.constraints[name]))  # no image twice
    assert data.constraint_names == tuple(SETS) and list(data.held_out_constraints) == list(SETS)
    assert data.constraint_classes == {"one": 1}  # the others are no single class
    assert data.prior == plain.prior == {0: 30 / 87, 1: 24 / 87, 2: 15 / 87, 3: 18 / 87}


def test_sets_leave_the_main_data_as_they_were():
    plain, data = split(), split(SETS)
    for name in ("main", "held_out_main", "reference"):
        np.testing.assert_array_equal(getattr(data, name).samples, getattr(plain, name).samples)
        np.testing.assert_array_equal(getattr(data, name).labels, getattr(plain, name).labels)


def test_a_set_of_one_class_is_what_a_minority_that_keeps_everything_gets():
    data, minority = split({"class_2": SetSpec(classes=(2,))}), split(minority={2: 1.0})
    assert data.fingerprint == minority.fingerprint
    assert data.constraint_classes == minority.constraint_classes


def test_a_pool_of_classes_is_in_random_order():
    # Sorted by class, the first 30 of the 45 would all be of class 0: by chance 1 in 3 * 10^11.
    first = split(SETS).constraints["even"][:30]
    assert 0 < (first >= 72).sum() < 15
    # Component 2 lies at height 3, seven standard deviations above component 0.
    for part in (build(MIXTURE).constraints, build(MIXTURE).held_out_constraints):
        assert 0 < (part["pair"][:100, 1] > 1.5).sum() < 100


def test_picked_samples_are_rows_of_main_and_their_own_held_out_set():
    data = split(SETS)
    for part in (data.constraints["picked"], data.held_out_constraints["picked"]):
        np.testing.assert_array_equal(part, data.main.samples[[7, 0]])
    restricted = split({"picked": SetSpec(samples=(3,))}, main_classes=(1, 3))
    np.testing.assert_array_equal(restricted.constraints["picked"], restricted.main.samples[[3]])


def test_main_may_leave_classes_out_which_sets_can_still_hold():
    plain, data = split(), split({"old": SetSpec(classes=(0, 1)), "two": SetSpec(classes=(2,))}, main_classes=(3, 1))
    for name in ("main", "held_out_main"):
        whole, part = getattr(plain, name), getattr(data, name)
        assert rows(part.samples) == rows(whole.of_class(1), whole.of_class(3))
        assert set(part.labels.tolist()) == {1, 3}
    assert rows(data.constraints["old"]) == rows(plain.main.of_class(0), plain.main.of_class(1))
    assert rows(data.held_out_constraints["two"]) == rows(plain.held_out_main.of_class(2))
    assert data.prior == {0: 0.0, 1: 24 / 42, 2: 0.0, 3: 18 / 42}
    assert data.prior[data.constraint_classes["two"]] == 0
    assert rows(data.reference.samples) == set(range(116))
    trained = rows(data.main.samples, *data.constraints.values())
    assert not trained & rows(data.held_out_main.samples, *data.held_out_constraints.values())


def test_a_class_that_nobody_uses_may_be_too_small_to_split():
    names = ("class_0", "class_1", "class_2")
    arguments = {"class_names": names, "minority": {}, "held_out": 0.25, "seed": 0}
    data = split_by_class(numbered([8, 8, 1]), main_classes=(0,), sets={"a": SetSpec(classes=(1,))}, **arguments)
    assert data.prior == {0: 1.0, 1: 0.0, 2: 0.0}
    with pytest.raises(ValueError, match=r"'class_2' has 1 image\(s\), needs 2"):
        split_by_class(numbered([8, 8, 1]), sets={"a": SetSpec(classes=(1,))}, **arguments)


def test_separate_test_images_measure_the_sets():
    test = numbered([6, 5, 0, 4], start=1000)
    data = split({"pair": SetSpec(classes=(0, 1))}, test_source=test)
    assert len(data.constraints["pair"]) == 72
    assert rows(data.held_out_constraints["pair"]) == set(range(1000, 1011))
    with pytest.raises(ValueError, match=r"data.sets.two.classes: data.test_path holds no image .* Add test images"):
        split({"two": SetSpec(classes=(2,))}, test_source=test)
    with pytest.raises(ValueError, match=r"data.main_classes: data.test_path holds no image"):
        split({}, main_classes=(2,), test_source=test)


@pytest.mark.parametrize(
    "spec",
    [
        DatasetSpec(sets={"odd": SetSpec(classes=(7, "digit_3")), "three": SetSpec(classes=("digit_3",))}),
        DatasetSpec(sets={"one": SetSpec(samples=(5, 1437)), "four": SetSpec(classes=(4,))}),
        DatasetSpec(sets={"old": SetSpec(classes=(0, 1)), "zero": SetSpec(classes=(0,))}, main_classes=(9, "digit_8")),
        DatasetSpec(main_classes=(1, 2)),
        MIXTURE,
        dataclasses.replace(MIXTURE, main_classes=(2, 0)),
    ],
)
def test_the_summary_foretells_what_build_gives(spec):
    summary, data = validate_spec(spec), build(spec)
    assert summary.prior == pytest.approx(data.prior, abs=1e-12) and sum(data.prior.values()) == pytest.approx(1)
    assert summary.constraint_names == data.constraint_names == tuple(spec.sets or ())
    assert summary.constraint_classes == data.constraint_classes
    assert set(summary.main_classes) == set(data.main.labels.tolist())
    if summary.counts:
        assert sum(part.kept for part in summary.counts.values()) == len(data.main)
        assert sum(part.held_out_kept for part in summary.counts.values()) == len(data.held_out_main)
    assert data.fingerprint == build(spec).fingerprint


def test_the_fingerprint_tells_sets_apart_and_leaves_plain_data_alone():
    spec = DatasetSpec(sets={"a": SetSpec(classes=(4,)), "b": SetSpec(samples=(3,))})
    plain = build(DatasetSpec()).fingerprint
    others = [
        dataclasses.replace(spec, sets=None),
        dataclasses.replace(spec, sets={**spec.sets, "b": SetSpec(samples=(4,))}),
        dataclasses.replace(spec, sets={**spec.sets, "a": SetSpec(classes=(5,))}),
        dataclasses.replace(spec, sets={"a": spec.sets["a"], "c": spec.sets["b"]}),
        dataclasses.replace(spec, main_classes=(4, 5)),
    ]
    assert len({build(other).fingerprint for other in [spec, *others]}) == 6
    assert build(DatasetSpec(main_classes=tuple(range(10)))).fingerprint == plain


def image_folder(folder, *names):
    for name in names:
        (folder / name).mkdir(parents=True)
        for number in range(4):
            Image.new("L", (4, 4)).save(folder / name / f"{number}.png")
    return str(folder)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"sets": {"new": SetSpec(classes=("b",))}}, "data.sets.new.classes: data.test_path holds no image"),
        ({"main_classes": ("b",)}, "data.main_classes: data.test_path holds no image of these classes"),
    ],
)
def test_test_images_without_a_class_are_refused_before_anything_is_read(fields, message, tmp_path):
    paths = {"path": image_folder(tmp_path / "train", "a", "b"), "test_path": image_folder(tmp_path / "test", "a")}
    with pytest.raises(ValueError, match=message):
        validate_spec(DatasetSpec(dataset="folder", **paths, **fields))
    both = DatasetSpec(dataset="folder", **paths, sets={"all": SetSpec(classes=("a", "b"))})
    assert len(build(both).held_out_constraints["all"]) == 4


def test_rows_are_checked_again_once_unreadable_images_are_left_out(tmp_path):
    image_folder(tmp_path, "a", "b")
    spec = DatasetSpec(
        dataset="folder", path=str(tmp_path), on_bad_image="skip", sets={"last": SetSpec(samples=(0, 5))}
    )
    assert len(build(spec).main) == 6
    (tmp_path / "a" / "2.png").write_bytes(b"not a picture")
    validate_spec(spec)  # reads no image
    with pytest.raises(ValueError, match=r"data.sets.last.samples\[1\]=5 is not a row of the main set: .* 0 to 4"):
        build(spec)


def within_five_standard_errors(samples, law):
    mean = law.weights @ law.means
    variance = law.weights @ (law.stds**2 + law.means**2) - mean**2
    return np.abs(samples.mean(axis=0) - mean) <= 5 * np.sqrt(variance / len(samples))


def test_a_mixtures_sets_are_drawn_from_laws_that_are_known():
    data = build(MIXTURE)
    laws = data.constraint_mixtures
    assert list(laws) == ["pair", "wide", "one"] and data.constraint_classes == {"one": 1}
    x = np.random.default_rng(1).normal(size=(50, 2)) * 2
    joint = np.log(data.mixture.weights) + np.stack(
        [data.mixture.component(index).log_density(x) for index in range(3)], axis=1
    )
    # Components 0 and 2 in the proportions 5 : 2, as the law of a sample given that it is from one of them.
    np.testing.assert_allclose(laws["pair"].log_density(x), np.logaddexp(joint[:, 0], joint[:, 2]) - np.log(0.7))
    np.testing.assert_allclose(laws["one"].log_density(x), data.mixture.component(1).log_density(x))
    assert laws["wide"].weights == pytest.approx([0.25, 0.75]) and laws["wide"].stds[0] == pytest.approx([1.5, 1.5])
    drawn = [data.main.samples, data.held_out_main.samples, data.reference.samples]
    for part in (data.constraints, data.held_out_constraints):
        for name, samples in part.items():
            assert samples.shape == (840, 2) and samples.dtype == np.float32
            # 12 means at five standard errors: one false alarm in 100 000 seeds.
            assert within_five_standard_errors(samples, laws[name]).all()
            drawn.append(samples)
    assert len(np.unique(np.concatenate(drawn), axis=0)) == sum(map(len, drawn))  # no draw is used twice


def test_sets_leave_a_mixtures_main_data_as_they_were():
    plain, data = build(dataclasses.replace(MIXTURE, sets=None)), build(MIXTURE)
    for name in ("main", "held_out_main"):
        np.testing.assert_array_equal(getattr(data, name).samples, getattr(plain, name).samples)
    assert plain.constraint_mixtures == {} and plain.mixture is plain.reference_mixture


def test_a_mixtures_main_may_leave_components_out():
    data = build(dataclasses.replace(MIXTURE, main_classes=(2, "component_1")))
    assert data.mixture.weights == pytest.approx([0.6, 0.4])
    np.testing.assert_array_equal(data.mixture.means, [MIXTURE.means[1], MIXTURE.means[2]])
    assert data.prior == {0: 0.0, 1: 0.6, 2: 0.4}
    assert data.class_names == ("component_0", "component_1", "component_2")
    for part in (data.main, data.held_out_main):
        assert set(part.labels.tolist()) == {1, 2} and len(part) == 840
        # Components lie six standard deviations or more apart: a wrong label would be certain.
        assert (data.reference_mixture.posterior(part.samples).argmax(axis=1) == part.labels).all()
        assert within_five_standard_errors(part.samples, data.mixture).all()
    # The sets still know the component that main leaves out, in its proportion to the others.
    assert data.constraint_mixtures["pair"].weights == pytest.approx([5 / 7, 2 / 7])
    assert np.bincount(data.reference.labels).tolist() == [280, 280, 280]


def test_a_minority_of_components_brings_its_laws_too():
    data = build(dataclasses.replace(MIXTURE, sets=None, minority=MinoritySpec(classes=(2, 1))))
    assert {name: law.means.tolist() for name, law in data.constraint_mixtures.items()} == {
        "component_2": [[0.0, 3.0]],
        "component_1": [[2.0, 0.0]],
    }


def sweep_file(path, **data):
    mixture = {"dataset": "gaussian_mixture", "means": [[0], [3]], "stds": [1, 1], **data}
    path.write_text(
        # A minority as well: the only method that there was when this was written asks for one.
        yaml.safe_dump(
            {
                "name": "sets",
                "data": {**mixture, "minority": {"classes": [1]}},
                "model": {"kind": "mlp"},
                "thresholds": {"grid": {"minority": [0.1]}},
            },
            sort_keys=False,
        ),
        encoding="utf-8",
    )
    return path


def test_a_sweeps_file_gives_sets_and_survives_the_round_trip(tmp_path):
    given = {"b": {"classes": [1, "component_0"]}, "a": {"means": [[1]], "stds": [2], "weights": [1]}}
    config = load_config(sweep_file(tmp_path / "a.yaml", sets=given, main_classes=["component_0"]))
    assert list(config.data.sets) == ["b", "a"] and config.data.main_classes == ("component_0",)
    assert config.data.sets["b"] == SetSpec(classes=(1, "component_0"))
    assert config.data.sets["a"] == SetSpec(means=((1.0,),), stds=(2.0,), weights=(1.0,))
    assert (
        SweepConfig.from_dict(config.to_dict()).data == DatasetSpec.from_dict(config.to_dict()["data"]) == config.data
    )


@pytest.mark.parametrize(
    "given, message",
    [
        ({"near": {"clases": [1]}}, "data.sets.near.clases: unknown key"),
        ({"near": 3}, "data.sets.near: .* dictionary"),
        ({"near": {"classes": 1}}, "data.sets.near.classes: .* tuple"),
        ({"near": {"samples": ["x"]}}, "data.sets.near.samples.0: .* integer"),
        ([1], "data.sets: .* dictionary"),
    ],
)
def test_a_mistake_inside_a_set_is_named_by_its_path(given, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        load_config(sweep_file(tmp_path / "a.yaml", sets=given))
