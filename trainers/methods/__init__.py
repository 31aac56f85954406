"""One file a formulation; `METHODS` maps the config's name to it."""

from dualsweep.trainers.methods.adaptation import Adaptation
from dualsweep.trainers.methods.alignment import Alignment
from dualsweep.trainers.methods.base import Method, PrimalTerms, Setting, StreamSums
from dualsweep.trainers.methods.composition import Composition
from dualsweep.trainers.methods.duo import DUO
from dualsweep.trainers.methods.esd import ESD
from dualsweep.trainers.methods.fairness import Fairness, Pretraining
from dualsweep.trainers.methods.siss import SISS
from dualsweep.trainers.methods.unlearn_forward_kl import UnlearnForwardKL
from dualsweep.trainers.methods.unlearn_likelihood import UnlearnLikelihood
from dualsweep.trainers.methods.unlearn_reverse_kl import UnlearnReverseKL

METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (
        Fairness,
        Adaptation,
        UnlearnForwardKL,
        SISS,
        ESD,
        DUO,
        Alignment,
        UnlearnLikelihood,
        Composition,
        UnlearnReverseKL,
    )
}

__all__ = ["METHODS", "Method", "Pretraining", "PrimalTerms", "Setting", "StreamSums"]
