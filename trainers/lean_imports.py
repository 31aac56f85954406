"""diffusers, imported without the optional packages that it would bring along.

At its import diffusers looks which optional packages are installed and imports some of them for features that a denoising
network does not have: adapters of its pipelines (peft, which brings transformers) and schedulers of another kind (scipy's
statistics). That is 2.5 of the 7 seconds of a processor that a worker takes to start, and to start again.
"""

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager

OPTIONAL = ("peft", "scipy", "transformers")
UNIMPORTABLE = ("peft", "transformers")  # some of diffusers tries without asking


def import_diffusers() -> None:
    """Import what training takes from diffusers, once a process; without effect where it has been imported already.

    For the rest of the process diffusers then takes `OPTIONAL` for not installed: its LoRA loaders and text-to-image pipelines
    say so if they are asked for. Everybody else may import these packages as before.
    """
    if "diffusers" in sys.modules:
        return
    with _hidden():
        diffusers = importlib.import_module("diffusers")
        importlib.import_module("diffusers.training_utils")
        for name in ("UNet2DModel", "DDPMPipeline"):
            getattr(diffusers, name)  # lazy: this is what imports it


@contextmanager
def _hidden() -> Iterator[None]:
    """Meanwhile whoever asks whether the optional packages are installed is told that they are not."""
    real = importlib.util.find_spec

    def find_spec(name: str, package: str | None = None):
        return None if name in OPTIONAL else real(name, package)

    blocked = [name for name in UNIMPORTABLE if name not in sys.modules]
    importlib.util.find_spec = find_spec
    sys.modules.update(dict.fromkeys(blocked))  # None: importing it is an ImportError
    try:
        yield
    finally:
        importlib.util.find_spec = real
        for name in blocked:
            del sys.modules[name]
