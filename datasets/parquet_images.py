"""Parquet files in the Hugging Face image layout: a column of {bytes, path} structs (or plain bytes) and one of labels.

The path is a file, a folder or a glob pattern, local or on any filesystem pyarrow knows by URI (s3://, gs://, file://).
"""

import fnmatch
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pyarrow import fs

from dualsweep.datasets.constrained_data import LabelledSet
from dualsweep.datasets.images import ImageCollector

MAX_CLASSES = 100_000  # a larger label is an identifier, not a class
BATCH_ROWS = 1024


@dataclass(frozen=True, kw_only=True)
class ParquetSource:
    """Labelled images in one or many Parquet files, read in the order of the sorted file names."""

    path: str
    field: str = "data.path"  # what messages call it
    image_column: str = "image"
    label_column: str = "label"
    size: int | None = None
    channels: int | None = None
    skip: bool = False

    def labels(self) -> tuple[NDArray[np.int64], tuple[str, ...]]:
        """See images.ImageSource. Reads footers and the label column only."""
        parts = []
        for name, file in self._files():
            self._check_columns(name, file)
            with self._reading(name):
                column = file.read(columns=[self.label_column]).column(0)
            if column.null_count:
                row = column.is_null().to_pylist().index(True)
                raise ValueError(
                    f"{name}, row {row}: data.label_column={self.label_column!r} holds no label there. Fill it in, or "
                    "remove the row"
                )
            parts.append(column.to_numpy().astype(np.int64))
        labels = np.concatenate(parts)
        if not len(labels):
            raise ValueError(f"{self.field}={self.path!r} has no rows: give a file with images")
        if labels.min() < 0 or labels.max() >= MAX_CLASSES:
            raise ValueError(
                f"data.label_column={self.label_column!r} holds labels from {labels.min()} to {labels.max()} in "
                f"{self.field}={self.path!r}: a label is a class index in [0, {MAX_CLASSES}). Choose another column"
            )
        return labels, tuple(f"class_{index}" for index in range(int(labels.max()) + 1))

    def sample_shape(self) -> tuple[int, ...] | None:
        """See images.ImageSource."""
        collector = ImageCollector(1, self.channels, self.size, self.skip)
        for encoded, label, where in self._rows(batch_rows=1):
            collector.add(encoded, label, where)
            break
        return None if collector.pixels is None else collector.pixels.shape[1:]

    def read(self) -> tuple[LabelledSet, int]:
        """See images.ImageSource."""
        labels, _ = self.labels()
        collector = ImageCollector(len(labels), self.channels, self.size, self.skip)
        for encoded, label, where in self._rows():
            collector.add(encoded, label, where)
        return collector.collected(f"{self.field}={self.path!r}")

    def _rows(self, batch_rows: int = BATCH_ROWS) -> Iterator[tuple[bytes | None, int, str]]:
        for name, file in self._files():
            self._check_columns(name, file)
            row = 0
            batches = file.iter_batches(batch_rows, columns=[self.image_column, self.label_column])
            while True:
                with self._reading(name):
                    batch = next(batches, None)
                if batch is None:
                    break
                images = batch.column(self.image_column)
                if pa.types.is_struct(images.type):
                    images = pc.struct_field(images, "bytes")  # unlike .field(), null where the struct is
                labels = batch.column(self.label_column).to_pylist()
                for encoded, label in zip(images, labels, strict=True):
                    yield encoded.as_py(), label, f"{name}, row {row}"
                    row += 1

    def _files(self) -> Iterator[tuple[str, pq.ParquetFile]]:
        filesystem, names = self._names()
        for name in names:
            with self._reading(name):
                handle = filesystem.open_input_file(name)
                file = pq.ParquetFile(handle)
            with handle, file:
                yield name, file

    @contextmanager
    def _reading(self, name: str) -> Iterator[None]:
        try:
            yield
        except (pa.ArrowInvalid, OSError) as error:
            raise ValueError(
                f"{self.field}={self.path!r}: {name} cannot be read as Parquet ({error}). Fetch or write it again"
            ) from error

    def _names(self) -> tuple[fs.FileSystem, list[str]]:
        filesystem, root = _resolved(self.path, self.field)
        info = filesystem.get_file_info(root)
        names = [root] if info.is_file else []
        if info.type == fs.FileType.Directory:
            listed = filesystem.get_file_info(fs.FileSelector(root, recursive=True))
            names = [info.path for info in listed if info.is_file and info.path.endswith(".parquet")]
        elif info.type == fs.FileType.NotFound and _first_mark(root) < len(root):
            above = fs.FileSelector(root[: _first_mark(root)].rpartition("/")[0], allow_not_found=True, recursive=True)
            # fnmatch lets * cross folders; a pattern with as many of them keeps it to its own level.
            level = [info for info in filesystem.get_file_info(above) if info.path.count("/") == root.count("/")]
            names = [info.path for info in level if info.is_file and fnmatch.fnmatchcase(info.path, root)]
        if not names:
            raise ValueError(
                f"{self.field}={self.path!r}: no Parquet file there. Give a .parquet file, a folder or a pattern"
            )
        return filesystem, sorted(names)

    def _check_columns(self, name: str, file: pq.ParquetFile) -> None:
        schema = file.schema_arrow
        for option, column in (("image_column", self.image_column), ("label_column", self.label_column)):
            if column not in schema.names:
                raise ValueError(
                    f"data.{option}={column!r} is not in {name}: its columns are {schema.names}. Name one of them"
                )
        image_type = schema.field(self.image_column).type
        if pa.types.is_struct(image_type):
            index = image_type.get_field_index("bytes")
            image_type = image_type.field(index).type if index >= 0 else image_type
        if not (pa.types.is_binary(image_type) or pa.types.is_large_binary(image_type)):
            raise ValueError(
                f"data.image_column={self.image_column!r} in {name} has type {image_type}: it must be binary or a "
                "struct with a binary field 'bytes'. Name the column with the encoded images"
            )
        label_type = schema.field(self.label_column).type
        if not pa.types.is_integer(label_type):
            raise ValueError(
                f"data.label_column={self.label_column!r} in {name} has type {label_type}: it must be an integer class "
                "index. Name another column, or encode the classes as integers"
            )


def _resolved(path: str, field: str) -> tuple[fs.FileSystem, str]:
    if "://" not in path:
        return fs.LocalFileSystem(), str(Path(path).absolute())
    try:
        # The marks of a pattern are not allowed in a URI; the part before them decides the filesystem.
        scheme, _, rest = path.partition("://")
        filesystem, _ = fs.FileSystem.from_uri(f"{scheme}://{rest[: _first_mark(rest)]}")
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(
            f"{field}={path!r} cannot be opened ({error}). Give a local path or a URI like s3://..."
        ) from error
    return filesystem, rest


def _first_mark(path: str) -> int:
    return min((path.index(mark) for mark in "*?[" if mark in path), default=len(path))
