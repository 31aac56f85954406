"""The duality gap of fairness and forward-KL unlearning on known mixtures: 0 at the optimum, positive elsewhere."""

import numpy as np
import pytest
import torch

from dualsweep.constraints import Constraint, certify
from dualsweep.constraints.multipliers import DualState
from dualsweep.constraints.problem import Problem
from dualsweep.datasets import DatasetSpec, SetSpec, build
from dualsweep.trainers.evaluate import weighted_errors
from dualsweep.trainers.methods.fairness import Fairness
from dualsweep.trainers.methods.unlearn_forward_kl import UnlearnForwardKL
from dualsweep.trainers.noise_schedule import NoiseSchedule

SCHEDULE = NoiseSchedule(clip_sample=False)
PRIOR = np.array([0.4, 0.3, 0.3])
NAMES = ("right", "top")
OPTIONS = {"levels": 32, "gradient_norm": None, "loss_ceiling": None}
EVALUATION = {"noise_levels": 32, "batch_size": 4000}
CASES = {
    "fairness in shares": (Fairness, "share", ">=", (0.36, 0.4), (0.1, 0.45, 0.45)),
    "fairness in nats": (Fairness, "nats", "<=", tuple(-np.log([0.36, 0.4])), (0.1, 0.45, 0.45)),
    "unlearning in shares": (UnlearnForwardKL, "share", "<=", (0.1, 0.15), (0.95, 0.02, 0.03)),
    "unlearning in nats": (UnlearnForwardKL, "nats", ">=", tuple(-np.log([0.1, 0.15])), (0.95, 0.02, 0.03)),
}


@pytest.fixture(scope="module")
def data():
    sets = {name: SetSpec(classes=(k,)) for k, name in enumerate(NAMES, start=1)}
    means, stds = ((-1.5, -0.8), (1.5, -0.8), (0.0, 1.7)), (0.4, 0.4, 0.4)
    return build(
        DatasetSpec(dataset="gaussian_mixture", means=means, stds=stds, weights=tuple(PRIOR), count=4000, sets=sets)
    )


@pytest.mark.parametrize("case", CASES)
def test_the_gap_closes_at_the_optimum_and_nowhere_else(data, make_setting, exact_denoiser, case):
    kind, unit, sense, thresholds, other = CASES[case]
    method = kind(make_setting(data=data, schedule=SCHEDULE, names=NAMES, unit=unit, options=OPTIONS))
    constraints = tuple(
        Constraint(name=name, unit=unit, threshold=float(value), sense=sense)
        for name, value in zip(NAMES, thresholds, strict=True)
    )
    problem = Problem(method=kind.name, objective="nats", constraints=constraints, domain=method.domain(constraints))
    exact = method.exact(constraints, {"rule": "ascent"})
    state = DualState(names=NAMES, multipliers=exact.multipliers)
    signed = np.array([0.0, *exact.multipliers]) * (-1 if kind is UnlearnForwardKL else 1)
    base = exact_denoiser(data.mixture.with_weights([0.6, 0.3, 0.1]), SCHEDULE)
    base_errors = weighted_errors(base, data.held_out_main.samples, SCHEDULE, levels=32, seed=0)

    def gap(weights):
        model = exact_denoiser(data.mixture.with_weights(weights), SCHEDULE)
        found = method.objective(model, torch.zeros(2), evaluation=EVALUATION, base_errors=lambda: base_errors)
        assert abs(found.value - found.absolute[0]) > 0.1  # what is reported is above another model's
        certificate = certify(
            problem,
            state,
            [0.0, 0.0],
            [0.1, 0.1],
            100,
            0.0,
            objective=found.absolute,
            dual_value=method.dual_value(exact.multipliers),
            no_dual_value=method.no_dual_value,
        )
        assert certificate.no_duality_gap is None
        return certificate.duality_gap, certificate.duality_gap_stderr

    value, stderr = gap((PRIOR + signed) / (1 + signed.sum()))
    # Four standard errors, false-alarm rate 6e-5; the quadrature and the components' overlap are below 2e-3.
    assert abs(value) < 4 * stderr + 2e-3 and stderr < 0.03
    value, stderr = gap(other)
    assert value > 4 * stderr


def test_where_there_is_none_the_certificate_says_why(data, make_setting):
    digits = build(DatasetSpec(dataset="digits", sets={"one": SetSpec(classes=(1,)), "two": SetSpec(classes=(2,))}))
    images = Fairness(make_setting(data=digits, names=("one", "two"), options=OPTIONS))
    beyond = UnlearnForwardKL(make_setting(data=data, names=NAMES, options=OPTIONS))
    losses = Fairness(make_setting(data=data, names=NAMES, options=OPTIONS, unit="loss"))
    for method, multipliers in ((images, [0.1, 0.1]), (beyond, [0.3, 0.1]), (losses, [0.1, 0.1])):
        assert method.dual_value(np.array(multipliers)) is None
    problem = Problem(method="fairness", objective="nats", constraints=())
    reason = images.no_dual_value
    certificate = certify(problem, DualState(names=(), multipliers=np.zeros(0)), [], [], 1, 0.0, no_dual_value=reason)
    assert certificate.duality_gap is None and "above the pretrained model's only" in certificate.no_duality_gap
    assert type(certificate).from_dict(certificate.to_dict()) == certificate
