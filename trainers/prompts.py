"""Prompts of a pretrained text-to-image network: its text encoder reads them once, and its answers are kept, a row each.

Row 0 is for the prompt of main, row i for that of the i-th constraint set: a condition is the number of a row.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from dualsweep.trainers.store import Store
from dualsweep.trainers.tensor_cache import cached_tensors, digest_of

PARTS = ("tokenizer", "text_encoder")


class Prompts:
    """Texts, and the CLIP text encoder of a text-to-image pipeline that reads them."""

    def __init__(self, folder: str | Path, texts: Mapping[str, str]) -> None:
        """Args: folder: with `tokenizer` and `text_encoder` in it; texts: by set, in the order of the conditions.

        Raises: ValueError naming model.pretrained when it has no such folders.
        """
        self.folder, self.texts = Path(folder), dict(texts)
        for part in PARTS:
            if not (self.folder / part).is_dir():
                raise ValueError(
                    f"model.pretrained={str(folder)!r}: has no folder {part!r}, which model.prompts need; give the folder of a "
                    "text-to-image pipeline"
                )

    @cached_property
    def digest(self) -> str:
        """Of the texts and of all that decides how they are read."""
        files = [path for part in PARTS for path in sorted((self.folder / part).iterdir())]
        files = [path for path in files if path.suffix in (".json", ".txt", ".safetensors")]
        return hashlib.sha256(json.dumps([digest_of(files), list(self.texts.values())]).encode()).hexdigest()

    def fingerprint(self, of_data: str) -> str:
        """Of what the network learns from: equal exactly if the data and the prompts' embeddings are."""
        return hashlib.sha256(f"{of_data} {self.digest}".encode()).hexdigest()

    def embeddings(self, store: Store, device: torch.device | str = "cpu") -> torch.Tensor:
        """float32 (prompts, tokens, width) on the CPU; made once a storage, on `device`."""
        folder = store.root / "bases" / "prompts" / self.digest[:32]
        return cached_tensors(folder, store, lambda: {"embeddings": self.encode(device)})["embeddings"]

    @torch.no_grad()
    def encode(self, device: torch.device | str = "cpu") -> torch.Tensor:
        """As Stable Diffusion's pipeline: the last hidden states of all tokens. The encoder is gone afterwards."""
        encoder = self._encoder()
        given = self.tokens(encoder.config.max_position_embeddings)
        mask = given["attention_mask"].to(device) if getattr(encoder.config, "use_attention_mask", False) else None
        answers = encoder.to(device)(given["input_ids"].to(device), attention_mask=mask)
        return answers.last_hidden_state.cpu().contiguous()

    def tokens(self, positions: int) -> Mapping[str, torch.Tensor]:
        """`input_ids` and `attention_mask`, (prompts, tokens), filled up to the most that the tokenizer gives.

        Args: positions: how many the encoder takes.
        Raises: ValueError naming a prompt that is longer.
        """
        tokenizer = self._read("CLIPTokenizer", "tokenizer")
        longest = min(tokenizer.model_max_length, positions)
        for name, text in self.texts.items():
            count = len(tokenizer(text).input_ids)
            if count > longest:
                raise ValueError(
                    f"model.prompts.{name} has {count} tokens, its text encoder takes {longest}: shorten it"
                )
        return tokenizer(list(self.texts.values()), padding="max_length", max_length=longest, return_tensors="pt")

    def check(self, network: Mapping[str, Any]) -> None:
        """Read tokenizer and encoder whole. Raises: ValueError where they do not fit each other, the texts or the network.

        Args: network: the config of a UNet2DConditionModel.
        """
        for name in ("addition_embed_type", "encoder_hid_dim_type", "class_embed_type", "num_class_embeds"):
            if network.get(name) is not None:
                raise ValueError(
                    f"model.pretrained={str(self.folder)!r}: its network wants more than a text ({name}={network[name]!r}); give "
                    "one that takes the embeddings of one text encoder alone, as Stable Diffusion 1 and 2 do"
                )
        encoder = self._encoder().config
        self.tokens(encoder.max_position_embeddings)
        width = encoder.hidden_size
        if width != network["cross_attention_dim"]:
            raise ValueError(
                f"model.pretrained={str(self.folder)!r}: text_encoder gives embeddings of width {width}, unet takes "
                f"{network['cross_attention_dim']}; give two that belong together"
            )

    def _encoder(self) -> Any:
        return self._read("CLIPTextModel", "text_encoder", use_safetensors=True).float().eval()

    def _read(self, kind: str, part: str, **how: Any) -> Any:
        """Raises: ValueError naming model.pretrained."""
        import transformers  # here: it takes seconds, and few sweeps have prompts

        transformers.utils.logging.disable_progress_bar()
        try:
            with torch.inference_mode(False):
                return getattr(transformers, kind).from_pretrained(self.folder / part, local_files_only=True, **how)
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise ValueError(f"model.pretrained={str(self.folder)!r}: {part} cannot be loaded: {error}") from error


def open_prompts(model: Mapping[str, Any], names: Sequence[str]) -> Prompts | None:
    """The prompts in the `model` section of a config, in this order; None where it has none. Raises: ValueError."""
    given = model.get("prompts")
    return Prompts(model["pretrained"], {name: given[name] for name in names}) if given else None
