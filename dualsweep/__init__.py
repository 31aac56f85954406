"""Sweeps of primal-dual constrained diffusion training on Ray, tracked in MLflow."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("dualsweep")
except PackageNotFoundError:  # imported from an unpacked tree that was never installed
    __version__ = "0+unknown"

__all__ = ["__version__"]
