"""What the benchmarks read from a result, beside the certificate of the same numbers."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from dualsweep.constraints import Constraint, NonNegative, Simplex, certify
from dualsweep.constraints.multipliers import DualState
from dualsweep.constraints.problem import Problem

NAMES = ("a", "b", "c")
MULTIPLIERS = [0.5, 0.3, 0.2]


@pytest.fixture(scope="module")
def laboratory():
    path = Path(__file__).parents[2] / "benchmarks" / "_laboratory.py"
    spec = importlib.util.spec_from_file_location("laboratory_under_test", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def result(domain, *, dual_only=False):
    constraints = tuple(Constraint(name=name, unit="nats", threshold=1.0) for name in NAMES)
    problem = Problem(method="composition", objective="level", constraints=constraints, domain=domain)
    violation, stderr = [0.8, 0.9, 0.3], [0.01, 0.02, 0.05]
    state = DualState(names=NAMES, multipliers=np.array(MULTIPLIERS))
    certificate = certify(problem, state, violation, stderr, 10**9, 0.0)
    rows = [{"name": n, "violation": v, "stderr": s} for n, v, s in zip(NAMES, violation, stderr, strict=True)]
    judged, other = dict(zip(NAMES, MULTIPLIERS, strict=True)), dict.fromkeys(NAMES, 1 / 3)
    return {
        "certificate": certificate.to_dict(),
        "relaxations": dict.fromkeys(NAMES, 0.0),
        "constraints": rows,
        "multipliers": other if dual_only else judged,
        "averaged_multipliers": judged if dual_only else other,
    }


@pytest.mark.parametrize("dual_only", [False, True])
def test_above_a_level_the_standard_error_is_that_of_the_contrast(laboratory, dual_only):
    given = result(Simplex(), dual_only=dual_only)
    found = laboratory.violations_in_se(given)
    quantile = 2.3940  # of the normal law at 1 - 0.05 / 6, as the certificate's joint intervals of three constraints
    for name, (low, high) in given["certificate"]["intervals"].items():
        violation, stderr = found[name]
        assert violation == pytest.approx((low + high) / 2, abs=1e-12)
        assert stderr == pytest.approx((high - low) / 2 / quantile, rel=1e-4)


def test_elsewhere_it_is_the_metrics_own(laboratory):
    found = laboratory.violations_in_se(result(NonNegative()))
    assert found == {"a": (0.8, 0.01), "b": (0.9, 0.02), "c": (0.3, 0.05)}
