"""What is asked for: problems, thresholds and units, multipliers, dual rules, domains, certificates, Pareto. NumPy only."""

from dualsweep.constraints.checks import NonFiniteError
from dualsweep.constraints.divergence import RunawayDetector
from dualsweep.constraints.domains import Capped, DualDomain, NonNegative, Simplex, SumBelow, domain_from_dict
from dualsweep.constraints.dual_rules import (
    Ascent,
    DualRule,
    Fixed,
    NuPI,
    Resilient,
    ResilientExplicit,
    rule_from_config,
)
from dualsweep.constraints.feasibility import Certificate, certify
from dualsweep.constraints.lagrangian import (
    complementarity_residual,
    infeasibility,
    kkt_residual,
    lagrangian,
    min_max_level,
)
from dualsweep.constraints.multipliers import DualState
from dualsweep.constraints.pareto import dominated, hypervolume, pareto_front
from dualsweep.constraints.problem import UNITS, Constraint, Problem, resolved_sense, resolved_threshold
from dualsweep.constraints.stopping import Finding, StoppingRule
from dualsweep.constraints.symptoms import SYMPTOMS, Symptom, find_symptoms
from dualsweep.constraints.threshold_grid import GridPoint, grid_point, grid_points

__all__ = [
    "SYMPTOMS",
    "UNITS",
    "Ascent",
    "Capped",
    "Certificate",
    "Constraint",
    "DualDomain",
    "DualRule",
    "DualState",
    "Finding",
    "Fixed",
    "GridPoint",
    "NonFiniteError",
    "NonNegative",
    "NuPI",
    "Problem",
    "Resilient",
    "ResilientExplicit",
    "RunawayDetector",
    "Simplex",
    "StoppingRule",
    "SumBelow",
    "Symptom",
    "certify",
    "complementarity_residual",
    "domain_from_dict",
    "dominated",
    "find_symptoms",
    "grid_point",
    "grid_points",
    "hypervolume",
    "infeasibility",
    "kkt_residual",
    "lagrangian",
    "min_max_level",
    "pareto_front",
    "resolved_sense",
    "resolved_threshold",
    "rule_from_config",
]
