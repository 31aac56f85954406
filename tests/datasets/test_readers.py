"""Readers on files made here: one picture in, the same picture out, and every broken one named."""

import gzip
import io
import struct

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from dualsweep.datasets import BadImageError, DatasetSpec, MinoritySpec, build, validate_spec
from dualsweep.datasets.images import decode_image, digits


def picture(value: int, *, size=6, channels=1) -> np.ndarray:
    """A picture that knows its number: a gradient on top of ``value``, uint8."""
    gradient = np.arange(size * size, dtype=np.uint8).reshape(size, size)
    pixels = gradient + np.uint8(value)
    return pixels if channels == 1 else np.stack([pixels, pixels + 1, pixels + 2], axis=-1)


def encoded(pixels: np.ndarray, kind="PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def expected(pixels: np.ndarray) -> np.ndarray:
    return (pixels if pixels.ndim == 3 else pixels[..., None]).transpose(2, 0, 1) / 127.5 - 1


def write_parquet(path, images: list, labels, *, struct_column=True):
    if struct_column:
        images = pa.array(
            [None if image is None else {"bytes": image, "path": None} for image in images],
            pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
        )
    else:
        images = pa.array(images, pa.binary())
    pq.write_table(pa.table({"image": images, "label": pa.array(labels, pa.int64())}), path)


def write_idx(path, values: np.ndarray, *, cut=0, packed=False):
    data = bytes([0, 0, 8, values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape) + values.tobytes()
    data = data[: len(data) - cut]
    path.write_bytes(gzip.compress(data) if packed else data)


def write_folder(root, classes=("cat", "dog"), count=4):
    for index, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for number in range(count):
            (root / name / f"{number}.png").write_bytes(encoded(picture(100 * index + number)))


TWELVE = [encoded(picture(value)) for value in range(12)]
LABELS = [value % 3 for value in range(12)]


def sorted_samples(part):
    return part.samples[np.argsort(part.samples[:, 0, 0, 0])]


def assert_the_twelve(data):
    assert data.sample_shape == (1, 6, 6) and data.main.samples.dtype == np.float32
    everything = sorted_samples(data.reference)
    np.testing.assert_allclose(everything, [expected(picture(value)) for value in range(12)], atol=1e-6)
    order = np.argsort(data.reference.samples[:, 0, 0, 0])
    assert data.reference.labels[order].tolist() == LABELS


@pytest.mark.parametrize("struct_column", [True, False])
def test_parquet_gives_back_its_pictures_and_labels(tmp_path, struct_column):
    write_parquet(tmp_path / "a.parquet", TWELVE, LABELS, struct_column=struct_column)
    data = build(DatasetSpec(dataset="parquet", path=str(tmp_path / "a.parquet")))
    assert_the_twelve(data)
    assert data.class_names == ("class_0", "class_1", "class_2")


@pytest.mark.parametrize("form", ["{}", "{}/part-*.parquet", "file://{}", "file://{}/part-*"])
def test_parquet_may_be_many_files(tmp_path, form):
    (tmp_path / "data").mkdir()
    for part in range(3):
        rows = slice(4 * part, 4 * part + 4)
        write_parquet(tmp_path / "data" / f"part-{part}.parquet", TWELVE[rows], LABELS[rows])
    assert_the_twelve(build(DatasetSpec(dataset="parquet", path=form.format(tmp_path / "data"))))


def test_a_parquet_name_with_brackets_is_a_name_first(tmp_path):
    write_parquet(tmp_path / "set[1].parquet", TWELVE, LABELS)
    assert_the_twelve(build(DatasetSpec(dataset="parquet", path=str(tmp_path / "set[1].parquet"))))


@pytest.mark.parametrize("packed", [True, False])
def test_idx_gives_back_its_pictures_and_finds_its_labels(tmp_path, packed):
    write_idx(tmp_path / "train-images-idx3-ubyte", np.stack([picture(v) for v in range(12)]), packed=packed)
    write_idx(tmp_path / "train-labels-idx1-ubyte", np.array(LABELS, np.uint8), packed=packed)
    spec = DatasetSpec(dataset="idx", path=str(tmp_path / "train-images-idx3-ubyte"))
    assert_the_twelve(build(spec))
    assert validate_spec(spec).sample_shape == (1, 6, 6)


def test_folders_are_classes_and_constraints_carry_their_names(tmp_path):
    write_folder(tmp_path)
    (tmp_path / ".cache").mkdir()
    (tmp_path / "cat" / "notes.txt").write_text("not a picture", encoding="utf-8")
    spec = DatasetSpec(dataset="folder", path=str(tmp_path), minority=MinoritySpec(classes=("dog",), keep=1))
    data = build(spec)
    assert data.class_names == ("cat", "dog") and data.constraint_classes == {"dog": 1}
    assert len(data.constraints["dog"]) == 1 and len(data.held_out_constraints["dog"]) == 3
    dogs = sorted_samples(data.reference)[data.reference.labels.sum() :]
    np.testing.assert_allclose(dogs, [expected(picture(100 + number)) for number in range(4)], atol=1e-6)


def test_a_test_folder_is_numbered_as_the_training_folder(tmp_path):
    write_folder(tmp_path / "train", classes=("ant", "cat", "dog"))
    write_folder(tmp_path / "test", classes=("cat", "dog"))
    data = build(DatasetSpec(dataset="folder", path=str(tmp_path / "train"), test_path=str(tmp_path / "test")))
    assert np.bincount(data.held_out_main.labels).tolist() == [0, 4, 4]
    write_folder(tmp_path / "other", classes=("eel",))
    with pytest.raises(ValueError, match=r"data.test_path=.* has the classes \['eel'\]"):
        validate_spec(DatasetSpec(dataset="folder", path=str(tmp_path / "train"), test_path=str(tmp_path / "other")))


def test_colours_stay_in_place_and_channels_convert():
    pixels = picture(10, channels=3)
    np.testing.assert_array_equal(decode_image(encoded(pixels), channels=None, size=None), pixels.transpose(2, 0, 1))
    assert decode_image(encoded(pixels), channels=1, size=None).shape == (1, 6, 6)
    assert decode_image(encoded(picture(10)), channels=3, size=None).shape == (3, 6, 6)
    assert decode_image(encoded(pixels, "JPEG"), channels=None, size=None).shape == (3, 6, 6)


def test_sixteen_bit_grey_is_scaled_and_not_clipped():
    pixels = (picture(100).astype(np.uint16)) * 257
    np.testing.assert_array_equal(decode_image(encoded(pixels), channels=None, size=None)[0], picture(100))


def test_resizing_crops_to_the_centre_square_and_keeps_the_mean():
    wide = np.full((8, 16), 200, np.uint8)
    wide[:, :4] = wide[:, 12:] = 0  # all that lies outside the centre square
    assert (decode_image(encoded(wide), channels=None, size=8) == 200).all()
    large, small = (build(DatasetSpec(size=size)).reference.samples for size in (16, None))
    assert large.shape[1:] == (1, 16, 16) and abs(large).max() <= 1
    assert large.mean() == pytest.approx(small.mean(), abs=0.01)  # overshoots of bicubic interpolation are clipped
    assert build(DatasetSpec(channels=3)).sample_shape == (3, 8, 8)


BROKEN = {"truncated": TWELVE[0][:60], "not an image": b"hello", "empty": b"", "null": None}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_picture_in_a_parquet_file_is_named_by_row_or_counted(tmp_path, kind):
    images = [*TWELVE[:7], BROKEN[kind], *TWELVE[8:]]
    write_parquet(tmp_path / "a.parquet", images, LABELS)
    spec = DatasetSpec(dataset="parquet", path=str(tmp_path / "a.parquet"))
    with pytest.raises(BadImageError, match=r"a\.parquet, row 7: it .*data\.on_bad_image to 'skip'"):
        build(spec)
    data = build(DatasetSpec(dataset="parquet", path=spec.path, on_bad_image="skip"))
    assert data.skipped == 1 and len(data.reference) == 11
    order = np.argsort(data.reference.samples[:, 0, 0, 0])
    assert data.reference.labels[order].tolist() == LABELS[:7] + LABELS[8:]  # labels did not shift


def test_a_broken_file_in_a_folder_is_named_or_counted(tmp_path):
    write_folder(tmp_path)
    (tmp_path / "dog" / "2.png").write_bytes(BROKEN["truncated"])
    with pytest.raises(BadImageError, match=r"dog.2\.png: it cannot be decoded"):
        build(DatasetSpec(dataset="folder", path=str(tmp_path)))
    assert build(DatasetSpec(dataset="folder", path=str(tmp_path), on_bad_image="skip")).skipped == 1


def test_pictures_skipped_in_the_test_source_count_too(tmp_path):
    write_folder(tmp_path / "train")
    write_folder(tmp_path / "test")
    for part in ("train", "test"):
        (tmp_path / part / "dog" / "2.png").write_bytes(BROKEN["not an image"])
    train, test = str(tmp_path / "train"), str(tmp_path / "test")
    assert build(DatasetSpec(dataset="folder", path=train, test_path=test, on_bad_image="skip")).skipped == 2


def test_a_class_that_lost_all_its_pictures_is_named(tmp_path):
    write_folder(tmp_path)
    for file in (tmp_path / "dog").iterdir():
        file.write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"no image of class 'dog' can be read \(4 skipped\)"):
        build(DatasetSpec(dataset="folder", path=str(tmp_path), on_bad_image="skip"))


def test_a_cut_off_idx_file_names_the_first_missing_picture_or_counts(tmp_path):
    images, labels = tmp_path / "x-images-idx3-ubyte", tmp_path / "x-labels-idx1-ubyte"
    write_idx(labels, np.array(LABELS, np.uint8))
    for packed in (False, True):
        write_idx(images, np.stack([picture(value) for value in range(12)]), cut=50, packed=packed)
        with pytest.raises(ValueError, match="image 10 of 12: the file ends before it"):
            build(DatasetSpec(dataset="idx", path=str(images)))
        data = build(DatasetSpec(dataset="idx", path=str(images), on_bad_image="skip"))
        assert data.skipped == 2 and len(data.reference) == 10
        order = np.argsort(data.reference.samples[:, 0, 0, 0])
        assert data.reference.labels[order].tolist() == LABELS[:10]


def test_a_damaged_gzip_stream_is_a_cut_off_file(tmp_path):
    images, labels = tmp_path / "x-images-idx3-ubyte", tmp_path / "x-labels-idx1-ubyte"
    noise = np.random.default_rng(0).integers(0, 256, (12, 64, 64), dtype=np.uint8)
    write_idx(images, noise, packed=True)
    write_idx(labels, np.array(LABELS, np.uint8))
    images.write_bytes(images.read_bytes()[:-9000])
    with pytest.raises(ValueError, match=r"image \d+ of 12: the file ends before it"):
        build(DatasetSpec(dataset="idx", path=str(images)))


def test_pictures_of_two_shapes_are_refused_by_row_and_size_repairs_it(tmp_path):
    write_parquet(tmp_path / "a.parquet", [*TWELVE[:11], encoded(picture(0, size=7))], LABELS)
    spec = DatasetSpec(dataset="parquet", path=str(tmp_path / "a.parquet"))
    with pytest.raises(ValueError, match=r"row 11: .* \(1, 7, 7\), those before it \(1, 6, 6\)\. Set data\.size"):
        build(spec)
    assert build(DatasetSpec(dataset="parquet", path=spec.path, size=6)).sample_shape == (1, 6, 6)


def test_damaged_data_pages_are_refused_by_file(tmp_path):
    path = tmp_path / "a.parquet"
    write_parquet(path, TWELVE, LABELS)
    content = bytearray(path.read_bytes())
    content[4:200] = b"\xff" * 196  # the footer stays whole, the first page does not
    path.write_bytes(bytes(content))
    with pytest.raises(ValueError, match=r"a\.parquet cannot be read as Parquet"):
        build(DatasetSpec(dataset="parquet", path=str(path)))


def test_the_bundled_digits_are_those_of_scikit_learn_also_where_its_file_lies_elsewhere(monkeypatch):
    from sklearn.datasets import load_digits

    bundle = load_digits()
    for _ in range(2):
        images, labels = digits()
        assert np.array_equal(images, bundle.images) and np.array_equal(labels, bundle.target)
        assert images.dtype == np.float64 and labels.dtype == np.int64
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
