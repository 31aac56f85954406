"""The exact optimum of preference unlearning against a numerical one over laws with several atoms a class.

A law is described by its mass on ten atoms: four preferred, three rejected, three in no pair, of unequal mass under q.
"""

import numpy as np
import pytest
from scipy.optimize import minimize

from dualsweep.constraints.preference import preference_optimum

CLASSES = np.array([0] * 4 + [1] * 3 + [2] * 3)  # preferred, rejected, the rest
Q = np.array([0.02, 0.08, 0.15, 0.05, 0.2, 0.05, 0.15, 0.1, 0.05, 0.15])
PREFERRED, REJECTED = Q[CLASSES == 0].sum(), Q[CLASSES == 1].sum()
PAIRS = np.outer(Q[CLASSES == 0] / PREFERRED, Q[CLASSES == 1] / REJECTED)


def loss(log_ratio, beta):
    """E[-log sigmoid(beta (u(x+) - u(x-)))] for u = log p/q on the atoms."""
    margins = log_ratio[CLASSES == 0][:, None] - log_ratio[CLASSES == 1][None, :]
    return float((PAIRS * np.logaddexp(0, -beta * margins)).sum())


def numerical_optimum(beta, threshold):
    """(loss, p) by sequential quadratic programming over log p up to a constant, from q."""

    def log_ratio(free):
        p = np.exp(free - free.max())
        return np.log(p / p.sum()) - np.log(Q)

    keeps = {"type": "ineq", "fun": lambda free: threshold + Q @ log_ratio(free)}
    found = minimize(
        lambda free: loss(log_ratio(free), beta),
        np.log(Q),
        constraints=[keeps],
        method="SLSQP",
        options={"ftol": 1e-13, "maxiter": 500},
    )
    assert found.success, found.message
    return found.fun, Q * np.exp(log_ratio(found.x))


@pytest.mark.parametrize("beta", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("threshold", [0.03, 0.2])
def test_no_other_law_does_better(beta, threshold):
    exact = preference_optimum(preferred=PREFERRED, rejected=REJECTED, beta=beta, threshold=threshold)
    value, p = numerical_optimum(beta, threshold)
    assert exact.loss == pytest.approx(value, abs=1e-8)
    shares = [p[k == CLASSES].sum() for k in range(3)]
    rest = Q[CLASSES == 2].sum()
    # Around an optimum the loss is flat, so that its law is known to the root of what the loss is.
    assert shares == pytest.approx([PREFERRED + exact.moved, REJECTED - exact.moved, rest], abs=2e-4)
    assert p / Q == pytest.approx(
        [[1 + exact.moved / PREFERRED, 1 - exact.moved / REJECTED, 1.0][k] for k in CLASSES], abs=2e-3
    )


@pytest.mark.parametrize("beta", [0.3, 1.0, 4.0])
@pytest.mark.parametrize("threshold", [1e-3, 0.1, 2.0])
def test_the_multiplier_is_the_price_of_the_threshold(beta, threshold):
    def at(epsilon):
        return preference_optimum(preferred=0.3, rejected=0.4, beta=beta, threshold=epsilon)

    step = 1e-4 * threshold
    slope = (at(threshold + step).loss - at(threshold - step).loss) / (2 * step)
    assert at(threshold).multiplier == pytest.approx(-slope, rel=1e-5)  # second order in a relative step of 1e-4


@pytest.mark.parametrize("threshold", [1e-6, 0.05, 1.0, 50.0])
def test_the_constraint_is_tight_and_the_numbers_belong_together(threshold):
    found = preference_optimum(preferred=0.01, rejected=0.9, beta=2.0, threshold=threshold)
    assert found.divergence == pytest.approx(threshold, rel=1e-9)
    assert found.moved > 0 and found.moved <= 0.9  # at 50 nats all of it, to round-off
    assert found.loss == pytest.approx(np.log1p(np.exp(-2.0 * found.margin)))


def test_a_looser_prior_buys_a_larger_margin_without_end():
    margins = [
        preference_optimum(preferred=0.3, rejected=0.4, beta=1.0, threshold=epsilon).margin
        for epsilon in (0.1, 1, 10, 100)
    ]
    assert np.all(np.diff(margins) > 0) and margins[-1] > 200  # 100 nats over a share of 0.4


@pytest.mark.parametrize(
    "change, message",
    [
        ({"preferred": 0.0}, "preferred=0.0"),
        ({"preferred": 0.7}, "sum <= 1"),
        ({"rejected": float("nan")}, "rejected=nan"),
        ({"beta": 0.0}, "beta=0.0"),
        ({"threshold": 0.0}, "threshold=0.0"),
    ],
)
def test_values_out_of_range_are_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        preference_optimum(**{"preferred": 0.3, "rejected": 0.4, "beta": 1.0, "threshold": 0.1, **change})
