"""What lies between the images that people look at and the samples that a network learns: nothing, or an autoencoder.

The data set goes through the encoder once; the training loop, the streams and the methods then have latents for samples.
Images are made of latents only where images are meant: for classifiers, rewards, and the samples that a trial leaves.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.checkpoint import checkpoint

from dualsweep.datasets import ConstrainedData, LabelledSet
from dualsweep.trainers.store import Store, in_place_of
from dualsweep.trainers.tensor_cache import cached_tensors, digest_of

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

CODEC_FILE = "autoencoder.json"  # in a model's folder: which autoencoder its samples are the latents of
PIXELS_AT_ONCE = 2**19  # through an autoencoder, all images of a part together: two of 512x512


class Codec:
    """Images, or vectors, as they are: the network learns what people look at."""

    def fingerprint(self, data: ConstrainedData) -> str:
        """Of what the network learns from: equal exactly if data and codec are."""
        return data.fingerprint

    def encoded(self, data: ConstrainedData, store: Store) -> ConstrainedData:
        """The same data as the network sees them; the images of the evaluation's classifier (`reference`) stay as they are."""
        return data

    def sample_shape(self, image_shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of what the network sees of an image of this shape."""
        return image_shape

    def decode(self, samples: torch.Tensor) -> torch.Tensor:
        """The images that samples of the network stand for, on their device; differentiable."""
        return samples

    def image_shape(self, sample_shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the image that a sample of this shape stands for."""
        return sample_shape

    def name_in(self, folder: Path) -> None:
        """Say in a model's folder what its samples have to be decoded with."""


AS_THEY_ARE = Codec()


class Autoencoder(Codec):
    """A diffusers AutoencoderKL: the network learns ``(mean of the posterior - shift_factor) * scaling_factor``.

    Weights are read when they are first needed, in float32, onto `device`; the decoder stays, the encoder goes after use.
    """

    def __init__(self, folder: str | Path, device: torch.device | str = "cpu") -> None:
        """Args: folder: of the autoencoder itself, or of a pipeline with a `vae` in it.

        Raises: ValueError naming model.autoencoder when it is no such folder.
        """
        given, self.device = Path(folder), torch.device(device)
        self.folder = given / "vae" if (given / "vae" / "config.json").is_file() else given
        self._decoder: AutoencoderKL | None = None
        try:
            self.config: dict[str, Any] = json.loads((self.folder / "config.json").read_text(encoding="utf-8"))
            kind = self.config["_class_name"]
            if kind != "AutoencoderKL":
                raise ValueError(f"it holds a {kind}")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"model.autoencoder={str(folder)!r}: no diffusers AutoencoderKL in it, nor in a folder vae below ({error}); "
                "give a local folder that has one"
            ) from error

    @cached_property
    def digest(self) -> str:
        """Of its configuration and weights."""
        return digest_of([self.folder / "config.json", *sorted(self.folder.glob("*.safetensors"))])

    @property
    def factor(self) -> int:
        """How many pixels a side of an image has for one of its latents."""
        return 2 ** (len(self.config["block_out_channels"]) - 1)

    def sample_shape(self, image_shape: tuple[int, ...]) -> tuple[int, ...]:
        """Raises: ValueError naming model.autoencoder for images that it does not take."""
        channels, height, width = image_shape
        where = f"model.autoencoder={str(self.folder)!r}"
        if channels != self.config["in_channels"]:
            raise ValueError(
                f"{where}: made for images of {self.config['in_channels']} channels, the data have {channels}; set "
                f"data.channels={self.config['in_channels']} or give another"
            )
        if height % self.factor or width % self.factor:
            raise ValueError(
                f"{where}: makes one latent of {self.factor}x{self.factor} pixels, which the data's {height}x{width} are no "
                f"multiple of; set data.size to one"
            )
        return (self.config["latent_channels"], height // self.factor, width // self.factor)

    def image_shape(self, sample_shape: tuple[int, ...]) -> tuple[int, ...]:
        _, height, width = sample_shape
        return (self.config["out_channels"], height * self.factor, width * self.factor)

    # -- images to latents ----------------------------------------------------------------------------------------------

    def fingerprint(self, data: ConstrainedData) -> str:
        return hashlib.sha256(f"{data.fingerprint} {self.digest}".encode()).hexdigest()

    def encoded(self, data: ConstrainedData, store: Store) -> ConstrainedData:
        """Each image of the data goes through the encoder once a storage: see `cached_tensors`."""
        sets = {"main": data.main.samples, "held_out_main": data.held_out_main.samples}
        sets |= {f"train {name}": images for name, images in data.constraints.items()}
        sets |= {f"held out {name}": images for name, images in data.held_out_constraints.items()}
        shape, bases = self.sample_shape(data.sample_shape), store.root / "bases"
        made = cached_tensors(
            bases / "latents" / self.fingerprint(data)[:32], store, lambda: self._encode_sets(sets, bases, store)
        )
        latents = {name: made["latents"][made[name]].numpy() for name in sets}
        return replace(
            data,
            main=LabelledSet(latents["main"], data.main.labels),
            held_out_main=LabelledSet(latents["held_out_main"], data.held_out_main.labels),
            constraints={name: latents[f"train {name}"] for name in data.constraints},
            held_out_constraints={name: latents[f"held out {name}"] for name in data.held_out_constraints},
            sample_shape=shape,
        )

    def _encode_sets(self, sets: Mapping[str, np.ndarray], bases: Path, store: Store) -> dict[str, torch.Tensor]:
        """`latents` of the distinct images of all sets, and for each set which of them are its own, int64 (n,)."""
        places, rows = distinct(sets)
        made = {"latents": self.encode([sets[name][row] for name, row in places])}
        self._keep_copy(bases / "autoencoders" / self.digest[:32], store)
        return made | rows

    @torch.no_grad()
    def encode(self, images: list[np.ndarray]) -> torch.Tensor:
        """Latents of images, float32 on the CPU. Raises: ValueError where they are not finite."""
        network, latents = self._read(), []
        for start in range(0, len(images), self._at_once(images[0].shape)):
            part = torch.from_numpy(np.stack(images[start : start + self._at_once(images[0].shape)])).to(self.device)
            latents.append(((network.encode(part).latent_dist.mean - self._shift) * self._scale).cpu())
        self._decoder = _without_encoder(network)
        found = torch.cat(latents).contiguous()
        if not bool(torch.isfinite(found).all()):
            raise ValueError(f"model.autoencoder={str(self.folder)!r}: gives latents that are not finite; give another")
        return found

    def _keep_copy(self, folder: Path, store: Store) -> None:
        """One copy a storage, so that the models trained on its latents stay of use when the original is gone."""
        if not folder.is_dir():
            with in_place_of(folder) as part:
                part.mkdir()
                for path in [self.folder / "config.json", *self.folder.glob("*.safetensors*")]:
                    shutil.copyfile(path, part / path.name)
            store.push(folder)

    # -- latents to images ----------------------------------------------------------------------------------------------

    def decode(self, samples: torch.Tensor) -> torch.Tensor:
        """Images in [-1, 1], cut off there as diffusers' pipelines do.

        Parts that need gradients are decoded again in the backward pass: the memory is that of one part.
        """
        images = []
        for part in samples.split(self._at_once(self.image_shape(tuple(samples.shape[1:])))):
            if part.requires_grad:
                images.append(checkpoint(self._decode, part, use_reentrant=False, preserve_rng_state=False))
            else:
                images.append(self._decode(part))
        return torch.cat(images)

    def _decode(self, latents: torch.Tensor) -> torch.Tensor:
        self._decoder = self._decoder or _without_encoder(self._read())
        with torch.autocast(self.device.type, enabled=False):  # the same images at every precision of training
            given = latents.to(self.device, torch.float32) / self._scale + self._shift
            return self._decoder.decode(given).sample.clamp(-1, 1).to(latents.device)

    def name_in(self, folder: Path) -> None:
        said = {"sha256": self.digest, "folder": str(self.folder)}
        (folder / CODEC_FILE).write_text(json.dumps(said, indent=1), encoding="utf-8")

    # -- the network ----------------------------------------------------------------------------------------------------

    @property
    def _scale(self) -> float:
        return self.config.get("scaling_factor", 0.18215)  # diffusers' own default

    @property
    def _shift(self) -> float:
        return self.config.get("shift_factor") or 0.0

    def _at_once(self, image_shape: tuple[int, ...]) -> int:
        return max(1, PIXELS_AT_ONCE // (image_shape[-2] * image_shape[-1]))

    def _read(self) -> "AutoencoderKL":
        """The whole network. Raises: ValueError naming model.autoencoder when its weights cannot be read."""
        from diffusers import AutoencoderKL  # here: see NoiseSchedule

        try:
            with torch.inference_mode(False):  # kept beyond the call that happens to be the first
                network = AutoencoderKL.from_pretrained(self.folder, use_safetensors=True, torch_dtype=torch.float32)
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(f"model.autoencoder={str(self.folder)!r} cannot be loaded: {error}") from error
        return network.to(self.device).requires_grad_(False).eval()

    def check(self) -> None:
        """Raises: ValueError when it cannot be loaded whole."""
        self._read()


def open_codec(model: Mapping[str, Any], device: torch.device | str = "cpu") -> Codec:
    """What the `model` section of a config puts between images and network. Raises: ValueError."""
    return Autoencoder(model["autoencoder"], device) if model.get("autoencoder") else AS_THEY_ARE


def codec_of(folder: Path) -> Codec:
    """What the samples of a saved model have to be decoded with.

    Looked for is the copy in the storage that the model lies in, then the folder that the sweep was given.
    Raises: ValueError when neither is there as it was.
    """
    if not (folder / CODEC_FILE).is_file():
        return AS_THEY_ARE
    digest, given = _named_in(folder)
    copies = [above / "bases" / "autoencoders" / digest[:32] for above in folder.absolute().parents]
    for candidate in [*copies, given]:
        if (candidate / "config.json").is_file() and Autoencoder(candidate).digest == digest:
            return Autoencoder(candidate)
    raise ValueError(
        f"model {str(folder)!r}: made of latents of an autoencoder that is neither in bases/autoencoders/{digest[:32]} of its "
        f"storage nor, unchanged, in {given}; restore one of them"
    )


def check_latents(folder: Path, codec: Codec) -> None:
    """Raises: ValueError when a saved model learned latents of an autoencoder, and this is another or none."""
    if (folder / CODEC_FILE).is_file():
        digest, given = _named_in(folder)
        if not isinstance(codec, Autoencoder) or codec.digest != digest:
            raise ValueError(
                f"model.pretrained={str(folder)!r}: learned latents of the autoencoder in {given}; give it as "
                "model.autoencoder"
            )


def _named_in(folder: Path) -> tuple[str, Path]:
    """Digest of a model's autoencoder, and where it was. Raises: ValueError."""
    try:
        named = json.loads((folder / CODEC_FILE).read_text(encoding="utf-8"))
        return named["sha256"], Path(named["folder"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / CODEC_FILE}: damaged ({error}); restore it") from error


def distinct(sets: Mapping[str, np.ndarray]) -> tuple[list[tuple[str, int]], dict[str, torch.Tensor]]:
    """The different images among all sets: the set and row where each occurs first, and for every row of a set its number."""
    numbers: dict[bytes, int] = {}
    places: list[tuple[str, int]] = []
    rows = {}
    for name, images in sets.items():
        found = []
        for row, image in enumerate(images):
            found.append(numbers.setdefault(hashlib.blake2b(image.tobytes(), digest_size=16).digest(), len(numbers)))
            if len(numbers) > len(places):
                places.append((name, row))
        rows[name] = torch.tensor(found, dtype=torch.int64)
    return places, rows


def _without_encoder(network: "AutoencoderKL") -> "AutoencoderKL":
    network.encoder = network.quant_conv = None
    return network
