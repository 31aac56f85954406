"""IDX files, the format of MNIST and Fashion-MNIST: bytes of shape (n, height, width), labels in a second file.

Layout: two zero bytes, a type code (8 is unsigned byte), the number of axes, one big-endian uint32 an axis, the data.
"""

import gzip
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from dualsweep.datasets.constrained_data import LabelledSet
from dualsweep.datasets.images import resized, to_unit_range

UNSIGNED_BYTE = 8
CHUNK_BYTES = 1 << 20


def labels_path_beside(images_path: str) -> str | None:
    """The usual name of the label file next to an image file, or None where the name does not follow the custom."""
    path = Path(images_path)
    for images_part, labels_part in (("images-idx3", "labels-idx1"), ("images.idx3", "labels.idx1")):
        if images_part in path.name:
            return str(path.with_name(path.name.replace(images_part, labels_part)))
    return None


@dataclass(frozen=True, kw_only=True)
class IdxSource:
    """An IDX image file and its label file, each plain or gzip-compressed."""

    path: str
    labels_path: str
    field: str = "data.path"  # what messages call them
    labels_field: str = "data.labels_path"
    size: int | None = None
    channels: int | None = None
    skip: bool = False  # a truncated image file: use the complete images and count the rest

    def labels(self) -> tuple[NDArray[np.int64], tuple[str, ...]]:
        """See images.ImageSource."""
        (expected, *_), _ = self._read(self.path, self.field, axes=3, header_only=True)
        (count,), data = self._read(self.labels_path, self.labels_field, axes=1)
        if count != expected or len(data) < count:
            raise ValueError(
                f"{self.labels_field}={self.labels_path!r} holds {min(count, len(data))} labels, "
                f"{self.field}={self.path!r} {expected} images: give the label file that belongs to it"
            )
        labels = np.frombuffer(data, dtype=np.uint8, count=count).astype(np.int64)
        return labels, tuple(f"class_{index}" for index in range(int(labels.max(initial=-1)) + 1))

    def sample_shape(self) -> tuple[int, ...]:
        """See images.ImageSource."""
        (_, height, width), _ = self._read(self.path, self.field, axes=3, header_only=True)
        return (self.channels or 1, self.size or height, self.size or width)

    def read(self) -> tuple[LabelledSet, int]:
        """See images.ImageSource."""
        labels, _ = self.labels()
        (count, height, width), data = self._read(self.path, self.field, axes=3)
        complete = min(count, len(data) // (height * width))
        if complete == 0 or (complete < count and not self.skip):
            raise ValueError(
                f"{self.path}, image {complete} of {count}: the file ends before it. Fetch the file again, or set "
                "data.on_bad_image to 'skip' to use the images before it"
            )
        pixels = np.frombuffer(data, dtype=np.uint8, count=complete * height * width).reshape(-1, 1, height, width)
        samples = resized(to_unit_range(pixels), size=self.size, channels=self.channels)
        return LabelledSet(samples, labels[:complete]), count - complete

    def _read(self, path: str, field: str, *, axes: int, header_only: bool = False) -> tuple[tuple[int, ...], bytes]:
        if not Path(path).is_file():
            raise ValueError(f"{field}={path!r} is not a file: give an IDX file, plain or .gz")
        with open(path, "rb") as raw:
            packed = raw.read(2) == b"\x1f\x8b"
            raw.seek(0)
            file = gzip.GzipFile(fileobj=raw) if packed else raw
            header = _read_available(file, 4 + 4 * axes)
            magic = bytes([0, 0, UNSIGNED_BYTE, axes])
            if len(header) < 4 + 4 * axes or header[:4] != magic:
                raise ValueError(
                    f"{field}={path!r} is not an IDX file of unsigned bytes with {axes} axes (it begins with "
                    f"{header[:4].hex() or 'nothing'}, expected {magic.hex()}): give "
                    + ("the image file" if axes == 3 else "the label file")
                )
            shape = struct.unpack(f">{axes}I", header[4:])
            if 0 in shape:
                raise ValueError(f"{field}={path!r} is empty, its shape is {shape}: give a file with data")
            return shape, b"" if header_only else _read_available(file, int(np.prod(shape, dtype=object)))


def _read_available(file: BinaryIO, count: int) -> bytes:
    """Up to ``count`` bytes; fewer where the file or its compressed stream ends early or breaks."""
    parts, wanted = [], count
    while wanted > 0:
        try:
            part = file.read(min(wanted, CHUNK_BYTES))
        except (EOFError, zlib.error, gzip.BadGzipFile):
            break  # a broken stream reads as a short one; the caller names what is missing
        if not part:
            break
        parts.append(part)
        wanted -= len(part)
    return b"".join(parts)
