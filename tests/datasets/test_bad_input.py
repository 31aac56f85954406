"""Every mistake in a data section is refused before an image is read, with field, value and remedy."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dualsweep.datasets import DatasetSpec, MinoritySpec, SetSpec, validate_spec

MIXTURE = {"dataset": "gaussian_mixture", "means": ((0.0,), (3.0,)), "stds": (1.0, 1.0)}


def minority(*classes, **changes):
    return MinoritySpec(classes=classes, **changes)


def one_set(**fields):
    return {"sets": {"near": SetSpec(**fields)}}


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"dataset": "mnist"}, "data.dataset='mnist' is not known: choose from digits, parquet"),
        ({"on_bad_image": "ignore"}, "data.on_bad_image='ignore' .* choose 'error' or 'skip'"),
        ({"held_out": 0.0}, "data.held_out=0.0 must lie between 0 and 1"),
        ({"held_out": 1.0}, "data.held_out=1.0"),
        ({"seed": -1}, "data.seed=-1 must be at least 0"),
        ({"size": 0}, "data.size=0 must be at least 1 pixel"),
        ({"channels": 4}, r"data.channels=4 must be 1 \(grey\) or 3"),
        ({"path": "/tmp"}, "data.path='/tmp' means nothing to data.dataset='digits': remove it"),
        ({"dataset": "parquet"}, "data.path=None: data.dataset='parquet' needs"),
        ({"dataset": "parquet", "path": "/no/such.parquet"}, "data.path='/no/such.parquet' does not exist: correct"),
        ({"dataset": "parquet", "path": "/no/such*.parquet"}, r"data.path='/no/such\*.parquet': no Parquet file there"),
        ({"dataset": "parquet", "path": "nowhere://x/y"}, "data.path='nowhere://x/y' cannot be opened"),
        ({"minority": minority()}, r"data.minority.classes=\(\) is empty"),
        ({"minority": minority(12)}, r"data.minority.classes\[0\]=12 is not a class .* choose from 0 \(digit_0\)"),
        ({"minority": minority("four")}, r"data.minority.classes\[0\]='four' is not a class"),
        ({"minority": minority(4, 4)}, r"data.minority.classes\[1\]=4 is given twice"),
        ({"minority": minority(4, "digit_4")}, r"data.minority.classes\[1\]='digit_4' is given twice"),
        ({"minority": minority(4, keep=0.0)}, "data.minority.keep=0.0 must be a fraction"),
        ({"minority": minority(4, keep=1.2)}, "data.minority.keep=1.2 must be a fraction"),
        ({"minority": minority(4, keep=-3)}, "data.minority.keep=-3"),
        ({"minority": minority(4, keep=True)}, "data.minority.keep=True"),
        ({"minority": minority(4, keep=float("nan"))}, "data.minority.keep=nan"),
        (
            {"minority": minority(4, keep=500)},
            "class 'digit_4' has 145 images to train on, fewer than .*keep=500. Lower",
        ),
        ({"minority": minority(4, keep=0.001)}, "class 'digit_4' would keep none of its 145 images .* Raise keep"),
        ({"dataset": "gaussian_mixture", "stds": (1.0,)}, "data.means=None: a gaussian_mixture needs it"),
        ({**MIXTURE, "stds": None}, "data.stds=None: a gaussian_mixture needs it"),
        ({**MIXTURE, "weights": (1.0,)}, r"data.weights=\(1.0,\): weights have shape"),
        (
            {**MIXTURE, "weights": (0.999, 0.001), "count": 100},
            "data.count=100 leaves a component of weight 0.001 empty",
        ),
        ({**MIXTURE, "minority": minority(2)}, r"data.minority.classes\[0\]=2 is not a class"),
        ({**MIXTURE, "count": 0}, "data.count=0 must be at least 1"),
    ],
)
def test_a_bad_field_is_refused_by_name(fields, message):
    with pytest.raises(ValueError, match=message):
        validate_spec(DatasetSpec(**fields))


@pytest.mark.parametrize(
    "fields, message",
    [
        ({**one_set(classes=(1,)), "minority": minority(4)}, "data.minority and data.sets are both given: .* Remove"),
        ({"main_classes": (1,), "minority": minority(4)}, "data.minority and data.main_classes are both given"),
        ({"main_classes": ()}, r"data.main_classes=\(\) is empty: name a class, or remove"),
        ({"main_classes": (1, 10)}, r"data.main_classes\[1\]=10 is not a class .* choose from 0 \(digit_0\)"),
        ({"main_classes": (True,)}, r"data.main_classes\[0\]=True is not a class"),
        ({"main_classes": (1, "digit_1")}, r"data.main_classes\[1\]='digit_1' is given twice: name each class once"),
        ({"sets": {}}, "data.sets={} names no set: give a set a name, or remove data.sets"),
        ({"sets": ("near",)}, r"data.sets=\('near',\) names no set"),
        ({"sets": {"near": (1,)}}, r"data.sets.near=\(1,\) is not a set: give its fields"),
        (
            {"sets": {" ": SetSpec(classes=(1,))}},
            r"data.sets\[' '\]: .* must be text that is not empty. Rename the set",
        ),
        ({"sets": {4: SetSpec(classes=(1,))}}, r"data.sets\[4\]: a constraint's name must be text"),
        *[
            ({"sets": {name: SetSpec(classes=(1,))}}, rf"data.sets\['{name}'\]: a constraint can't be called '{name}'")
            for name in ("main", "trajectory", "minority", "sets", "rewards")
        ],
        (one_set(), r"data.sets.near gives no samples: give exactly one of \('classes', 'samples'\)"),
        (one_set(stds=(1.0,)), "data.sets.near gives no samples"),
        (one_set(classes=(1,), samples=(0,)), "data.sets.near gives classes and samples: give exactly one of"),
        (one_set(classes=()), r"data.sets.near.classes=\(\) is empty: name what is in the set, or remove the set"),
        (one_set(samples=()), r"data.sets.near.samples=\(\) is empty"),
        (one_set(classes=(1, "ten")), r"data.sets.near.classes\[1\]='ten' is not a class .* choose from"),
        (one_set(classes=(1, 1)), r"data.sets.near.classes\[1\]=1 is given twice: name each class once"),
        (one_set(classes=(1,), weights=(1.0,)), r"data.sets.near.weights=\(1.0,\) belongs to means, .* remove it"),
        (one_set(samples=(0, 1438)), r"data.sets.near.samples\[1\]=1438 is not a row .* whole numbers from 0 to 1437"),
        (one_set(samples=(-1,)), r"data.sets.near.samples\[0\]=-1 is not a row"),
        (one_set(samples=(1.5,)), r"data.sets.near.samples\[0\]=1.5 is not a row"),
        (one_set(samples=(True,)), r"data.sets.near.samples\[0\]=True is not a row"),
        (one_set(samples=(3, 3)), r"data.sets.near.samples\[1\]=3 is given twice: name each row once"),
        ({**one_set(samples=(300,)), "main_classes": (1, 2)}, r"samples\[0\]=300 is not a row .* from 0 to 287"),
        (one_set(means=((0.0,),), stds=(1.0,)), r"near.means=.* means nothing to data.dataset='digits': give one of"),
        ({**MIXTURE, **one_set(samples=(1,))}, "near.samples=.* means nothing to data.dataset='gaussian_mixture'"),
        ({**MIXTURE, **one_set(classes=(1,), means=((0.0,),))}, "data.sets.near gives classes and means"),
        ({**MIXTURE, **one_set(classes=(2,))}, r"data.sets.near.classes\[0\]=2 is not a class"),
        ({**MIXTURE, "main_classes": ("far",)}, r"data.main_classes\[0\]='far' is not a class"),
        ({**MIXTURE, **one_set(means=())}, r"data.sets.near.means=\(\) is empty"),
        ({**MIXTURE, **one_set(means=((0.0,),))}, "data.sets.near.stds=None: a gaussian_mixture needs it"),
        ({**MIXTURE, **one_set(means=((0.0,),), stds=(-1.0,))}, "data.sets.near.stds=.*: stds must be > 0"),
        (
            {**MIXTURE, **one_set(means=((0.0, 1.0),), stds=(1.0,))},
            r"data.sets.near.means=\(\(0.0, 1.0\),\) are points of 2 coordinates, data.means of 1: give both as many",
        ),
        (
            {**MIXTURE, "count": 100, **one_set(means=((0.0,), (1.0,)), stds=(1.0, 1.0), weights=(0.999, 0.001))},
            "data.count=100 leaves a component of weight 0.001 empty. Raise data.count",
        ),
    ],
)
def test_a_bad_set_is_refused_by_name(fields, message):
    with pytest.raises(ValueError, match=message):
        validate_spec(DatasetSpec(**fields))


def test_a_component_too_rare_for_main_may_be_left_out_of_it():
    fields = {**MIXTURE, "weights": (0.999, 0.001), "count": 100}
    assert validate_spec(DatasetSpec(**fields, main_classes=(0,))).prior == {0: 1.0, 1: 0.0}


def parquet_with(tmp_path, **columns):
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    return {"dataset": "parquet", "path": str(tmp_path / "a.parquet")}


GREY = pa.array([b"x", b"y"], pa.binary())


@pytest.mark.parametrize(
    "columns, message",
    [
        (
            {"picture": GREY, "label": [0, 1]},
            r"data.image_column='image' is not in .* columns are \['picture', 'label'\]",
        ),
        ({"image": GREY}, "data.label_column='label' is not in"),
        ({"image": ["a", "b"], "label": [0, 1]}, "data.image_column='image' .* has type string"),
        ({"image": [{"path": "a"}, {"path": "b"}], "label": [0, 1]}, "data.image_column='image' .* has type struct"),
        ({"image": GREY, "label": [0.0, 1.0]}, "data.label_column='label' .* has type double"),
        ({"image": GREY, "label": pa.array([0, None])}, "row 1: data.label_column='label' holds no label there"),
        ({"image": GREY, "label": [-1, 0]}, "data.label_column='label' holds labels from -1 to 0"),
        ({"image": GREY, "label": [0, 10**9]}, "Choose another column"),
        ({"image": GREY[:0], "label": pa.array([], pa.int64())}, "has no rows"),
        ({"image": GREY, "label": [0, 1]}, r"class 'class_0' has 1 image\(s\), needs 2"),
    ],
)
def test_a_parquet_file_of_another_layout_is_refused(tmp_path, columns, message):
    with pytest.raises(ValueError, match=message):
        validate_spec(DatasetSpec(**parquet_with(tmp_path, **columns)))


def test_a_file_that_is_not_parquet_is_refused(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1 but not really")
    with pytest.raises(
        ValueError, match=r"data.path=.*a\.parquet cannot be read as Parquet .* Fetch or write it again"
    ):
        validate_spec(DatasetSpec(dataset="parquet", path=str(tmp_path / "a.parquet")))


def test_test_images_may_not_be_the_training_images(tmp_path):
    fields = parquet_with(tmp_path, image=GREY, label=[0, 1])
    with pytest.raises(ValueError, match=r"data.test_path=.* is data.path too"):
        validate_spec(DatasetSpec(**fields, test_path=fields["path"]))


def test_folders_without_classes_or_images_are_refused(tmp_path):
    spec = DatasetSpec(dataset="folder", path=str(tmp_path))
    with pytest.raises(ValueError, match=r"data.path=.* has no sub-folder"):
        validate_spec(spec)
    (tmp_path / "cat").mkdir()
    with pytest.raises(ValueError, match=r"data.path=.*class 'cat' is empty. Put images"):
        validate_spec(spec)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ValueError, match="is not a folder"):
        validate_spec(DatasetSpec(dataset="folder", path=str(tmp_path / "file")))


def test_a_class_may_not_take_the_name_of_the_main_stream(tmp_path):
    from PIL import Image

    for name in ("main", "other"):
        (tmp_path / name).mkdir()
        for number in range(3):
            Image.new("L", (4, 4)).save(tmp_path / name / f"{number}.png")
    validate_spec(DatasetSpec(dataset="folder", path=str(tmp_path), minority=minority("other", keep=1)))
    with pytest.raises(ValueError, match=r"classes\[0\]='main': a constraint can't be called 'main'"):
        validate_spec(DatasetSpec(dataset="folder", path=str(tmp_path), minority=minority("main", keep=1)))


def test_idx_files_that_do_not_belong_together_are_refused(tmp_path):
    def header(*shape):
        return bytes([0, 0, 8, len(shape)]) + np.array(shape, ">u4").tobytes()

    images, labels = tmp_path / "images.bin", tmp_path / "labels.bin"
    images.write_bytes(header(4, 2, 2) + bytes(16))
    labels.write_bytes(header(3) + bytes(3))
    with pytest.raises(ValueError, match=r"data.labels_path is not given"):
        validate_spec(DatasetSpec(dataset="idx", path=str(images)))
    with pytest.raises(ValueError, match=r"data.labels_path=.* holds 3 labels, data.path=.* 4 images"):
        validate_spec(DatasetSpec(dataset="idx", path=str(images), labels_path=str(labels)))
    with pytest.raises(
        ValueError, match=r"data.path=.* is not an IDX file .* begins with 00000801.* give the image file"
    ):
        validate_spec(DatasetSpec(dataset="idx", path=str(labels), labels_path=str(images)))
    images.write_bytes(header(0, 2, 2))
    with pytest.raises(ValueError, match=r"data.path=.* is empty"):
        validate_spec(DatasetSpec(dataset="idx", path=str(images), labels_path=str(labels)))


def test_unknown_keys_are_refused_and_a_spec_survives_json():
    spec = DatasetSpec(**MIXTURE, weights=(0.9, 0.1), minority=MinoritySpec(classes=(1,), keep=1.0))
    restored = DatasetSpec.from_dict(json.loads(json.dumps(spec.to_dict())))
    assert restored == spec and isinstance(restored.minority.keep, float)
    with pytest.raises(ValueError, match=r"data.sise is not a known field"):
        DatasetSpec.from_dict({"sise": 8})
    with pytest.raises(ValueError, match=r"data.minority.kept is not a known field"):
        DatasetSpec.from_dict({"minority": {"classes": [1], "kept": 3}})
    with pytest.raises(ValueError, match=r"data.sets.near.class is not a known field: known are \['classes', 'means'"):
        DatasetSpec.from_dict({"sets": {"near": {"class": [1]}}})


def test_sets_survive_json():
    own = SetSpec(means=((0.0,), (1.0,)), stds=((1.0,), (2.0,)), weights=(0.5, 1.0))
    spec = DatasetSpec(**MIXTURE, main_classes=(1, "component_0"), sets={"b": own, "a": SetSpec(classes=(0,))})
    restored = DatasetSpec.from_dict(json.loads(json.dumps(spec.to_dict())))
    assert restored == spec and list(restored.sets) == ["b", "a"]
    spec = DatasetSpec(sets={"picked": SetSpec(samples=(1, 2))})
    assert DatasetSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
