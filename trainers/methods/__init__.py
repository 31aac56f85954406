"""One file a formulation; `METHODS` maps the config's name to it."""

from dualsweep.trainers.methods.base import Method, StreamSums
from dualsweep.trainers.methods.fairness import Fairness

METHODS: dict[str, type[Method]] = {"fairness": Fairness}

__all__ = ["METHODS", "Fairness", "Method", "StreamSums"]
