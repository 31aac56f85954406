"""Image sources: where pictures come from and how each becomes float32 in [-1, 1], channels first.

Here: what all sources share (decoding, shapes, broken images), the bundled digits and folders of files. Parquet and IDX
have their own files. A source answers cheap questions (labels, shape) without decoding its images.
"""

import importlib.util
import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from dualsweep.datasets.constrained_data import LabelledSet

IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".webp")


class ImageSource(Protocol):
    """Labelled images that can be looked at before they are read."""

    def labels(self) -> tuple[NDArray[np.int64], tuple[str, ...]]:
        """Every label, shape (n,), and the class names, without decoding an image.

        Raises: ValueError naming field, value and remedy if the source is missing or not of its format.
        """
        ...

    def sample_shape(self) -> tuple[int, ...] | None:
        """(channels, height, width) as read() gives it; None if the first image is unreadable and may be skipped."""
        ...

    def read(self) -> tuple[LabelledSet, int]:
        """All images, and how many were skipped because they could not be read."""
        ...


class BadImageError(ValueError):
    """One image cannot be read; the message says which and why."""


def decode_image(encoded: bytes | None, *, channels: int | None, size: int | None) -> NDArray[np.uint8]:
    """An encoded picture as uint8, shape (channels, height, width).

    Args:
        encoded: file contents (PNG, JPEG, ...); EXIF rotation is applied, transparency is dropped.
        channels: 1 (grey) or 3 (RGB); None keeps what the picture has.
        size: side in pixels after a centre crop to a square; None keeps the picture's own size.
    Raises: BadImageError if it cannot be decoded.
    """
    if not encoded:
        raise BadImageError("it holds no image bytes")
    try:
        with Image.open(io.BytesIO(encoded)) as opened:
            image = ImageOps.exif_transpose(opened)
            if image.mode == "F":
                raise ValueError("floating-point pixels have no known range")
            if image.mode.startswith("I"):  # 16-bit grey, which convert("L") would clip instead of scale
                image = Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
            grey = image.mode in ("L", "1", "LA") if channels is None else channels == 1
            image = image.convert("L" if grey else "RGB")
            if size is not None and image.size != (size, size):
                image = ImageOps.fit(image, (size, size), method=Image.Resampling.BICUBIC)
            pixels = np.asarray(image)
    except Exception as error:
        raise BadImageError(f"it cannot be decoded ({type(error).__name__}: {error})") from error
    return pixels[None] if grey else pixels.transpose(2, 0, 1)


def to_unit_range(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Pixels 0..255 as float32 in [-1, 1]."""
    samples = pixels.astype(np.float32)
    samples *= np.float32(1 / 127.5)
    samples -= np.float32(1)
    return samples


def resized(samples: NDArray[np.float32], *, size: int | None, channels: int | None) -> NDArray[np.float32]:
    """Grey samples (n, 1, height, width) in [-1, 1], centre-cropped and resized to ``size``, in ``channels``."""
    if size is not None and samples.shape[2:] != (size, size):
        fitted = [
            np.asarray(ImageOps.fit(Image.fromarray(sample[0]), (size, size), method=Image.Resampling.BICUBIC))
            for sample in samples
        ]
        # Bicubic weights are partly negative: a sharp edge overshoots the range.
        samples = np.stack(fitted)[:, None].clip(-1, 1)
    return np.repeat(samples, 3, axis=1) if channels == 3 else samples


@dataclass
class ImageCollector:
    """Gathers decoded images of one shape; a bad one is an error by name, or is counted where ``skip`` is set."""

    capacity: int  # images at most
    channels: int | None
    size: int | None
    skip: bool
    skipped: int = 0
    labels: list[int] = field(default_factory=list)
    pixels: NDArray[np.uint8] | None = None

    def add(self, encoded: bytes | None, label: int, where: str) -> None:
        """Decode one image; ``where`` names it in messages (file, row)."""
        try:
            image = decode_image(encoded, channels=self.channels, size=self.size)
        except BadImageError as error:
            self._leave_out(where, error)
            return
        if self.pixels is None:
            self.pixels = np.empty((self.capacity, *image.shape), dtype=np.uint8)
        if image.shape != self.pixels.shape[1:]:
            raise ValueError(
                f"{where}: the image has (channels, height, width) = {image.shape}, those before it "
                f"{self.pixels.shape[1:]}. Set data.size and data.channels to bring all to one shape"
            )
        self.pixels[len(self.labels)] = image
        self.labels.append(label)

    def add_file(self, file: Path, label: int) -> None:
        """Read and decode one image file."""
        try:
            encoded = file.read_bytes()
        except OSError as error:
            self._leave_out(str(file), error)
            return
        self.add(encoded, label, str(file))

    def _leave_out(self, where: str, error: Exception) -> None:
        if not self.skip:
            raise BadImageError(f"{where}: {error}. Repair it, or set data.on_bad_image to 'skip'") from error
        self.skipped += 1

    def collected(self, source: str) -> tuple[LabelledSet, int]:
        """Everything added, in order, and the number skipped."""
        if self.pixels is None:
            raise ValueError(f"{source}: none of its {self.skipped} images can be read. Check the files")
        samples = to_unit_range(self.pixels[: len(self.labels)])
        return LabelledSet(samples, np.array(self.labels, dtype=np.int64)), self.skipped


@dataclass(frozen=True, kw_only=True)
class DigitsSource:
    """The 1797 handwritten digits of 8x8 that come with scikit-learn; needs no file."""

    size: int | None = None
    channels: int | None = None

    def labels(self) -> tuple[NDArray[np.int64], tuple[str, ...]]:
        """See ImageSource."""
        return digits()[1], tuple(f"digit_{digit}" for digit in range(10))

    def sample_shape(self) -> tuple[int, ...]:
        """See ImageSource."""
        return (self.channels or 1, self.size or 8, self.size or 8)

    def read(self) -> tuple[LabelledSet, int]:
        """See ImageSource."""
        levels, labels = digits()
        samples = (levels / 8 - 1).astype(np.float32)[:, None]  # grey levels 0..16
        return LabelledSet(resized(samples, size=self.size, channels=self.channels), labels), 0


def digits() -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Grey levels (1797, 8, 8) from 0 to 16, and labels: scikit-learn's file, without scikit-learn, which takes a second to import."""
    package = importlib.util.find_spec("sklearn")
    file = Path(package.origin).parent / "datasets" / "data" / "digits.csv.gz" if package and package.origin else None
    if file is None or not file.is_file():  # a scikit-learn that keeps it elsewhere
        from sklearn.datasets import load_digits

        bundle = load_digits()
        return bundle.images, bundle.target.astype(np.int64)
    table = np.loadtxt(file, delimiter=",")
    return table[:, :-1].reshape(-1, 8, 8), table[:, -1].astype(np.int64)


@dataclass(frozen=True, kw_only=True)
class FolderSource:
    """A folder with one sub-folder of pictures a class; classes are numbered in the order of their sorted names."""

    path: str
    field: str = "data.path"  # what messages call it
    size: int | None = None
    channels: int | None = None
    skip: bool = False
    class_names: tuple[str, ...] | None = None  # those of the training folder, when this is the test folder

    def labels(self) -> tuple[NDArray[np.int64], tuple[str, ...]]:
        """See ImageSource."""
        names, files = self._files()
        return np.array([label for _, label in files], dtype=np.int64), names

    def sample_shape(self) -> tuple[int, ...] | None:
        """See ImageSource."""
        collector = ImageCollector(1, self.channels, self.size, self.skip)
        file, label = self._files()[1][0]
        collector.add_file(file, label)
        return None if collector.pixels is None else collector.pixels.shape[1:]

    def read(self) -> tuple[LabelledSet, int]:
        """See ImageSource."""
        _, files = self._files()
        collector = ImageCollector(len(files), self.channels, self.size, self.skip)
        for file, label in files:
            collector.add_file(file, label)
        return collector.collected(f"{self.field}={self.path!r}")

    def _files(self) -> tuple[tuple[str, ...], list[tuple[Path, int]]]:
        root = Path(self.path)
        if not root.is_dir():
            raise ValueError(
                f"{self.field}={self.path!r} is not a folder: give one with a sub-folder of images a class"
            )
        found = sorted(child.name for child in root.iterdir() if child.is_dir() and not child.name.startswith("."))
        names = self.class_names or tuple(found)
        if not found:
            raise ValueError(f"{self.field}={self.path!r} has no sub-folder: put the images of each class into one")
        if unknown := sorted(set(found) - set(names)):
            raise ValueError(
                f"{self.field}={self.path!r} has the classes {unknown}, which data.path has not: rename them to one of "
                f"{list(names)}"
            )
        files = []
        for name in found:
            inside = sorted((root / name).rglob("*"))
            images = [file for file in inside if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file()]
            if not images:
                raise ValueError(
                    f"{self.field}={self.path!r}: class {name!r} is empty. Put images into {str(root / name)!r} "
                    f"({', '.join(IMAGE_SUFFIXES)}), or remove that folder"
                )
            files += [(image, names.index(name)) for image in images]
        return names, files
