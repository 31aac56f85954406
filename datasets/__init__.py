"""What a trial learns from: data sets, minority cuts, held-out sets and the step-indexed order of their samples."""

from dualsweep.datasets.constrained_data import ConstrainedData, LabelledSet
from dualsweep.datasets.gaussians import GaussianMixture
from dualsweep.datasets.images import BadImageError
from dualsweep.datasets.spec import DatasetSpec, DatasetSummary, MinoritySpec, SetSpec, build, validate_spec
from dualsweep.datasets.streams import Streams, shard_draw

__all__ = [
    "BadImageError",
    "ConstrainedData",
    "DatasetSpec",
    "DatasetSummary",
    "GaussianMixture",
    "LabelledSet",
    "MinoritySpec",
    "SetSpec",
    "Streams",
    "build",
    "shard_draw",
    "validate_spec",
]
