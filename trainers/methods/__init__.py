"""One file a formulation; `METHODS` maps the config's name to it."""

from dualsweep.trainers.methods.base import Method, PrimalTerms, Setting, StreamSums
from dualsweep.trainers.methods.fairness import Fairness, Pretraining

METHODS: dict[str, type[Method]] = {method.name: method for method in (Fairness,)}

__all__ = ["METHODS", "Method", "Pretraining", "PrimalTerms", "Setting", "StreamSums"]
