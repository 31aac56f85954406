"""Standard errors that mean what they say, and shares that do not depend on who drew the samples."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.stats import binom

from dualsweep.constraints import Constraint
from dualsweep.trainers.labellers import Labeller
from dualsweep.trainers.metrics import (
    Measurement,
    loss_measurement,
    mean_and_stderr,
    mean_measurement,
    shard_counts,
    share_draws,
    share_measurement,
)
from dualsweep.trainers.noise_schedule import NoiseSchedule
from dualsweep.trainers.samplers import ddim_sample


def test_mean_and_stderr_are_numpys():
    draws = np.random.default_rng(0).gamma(2.0, size=50)
    mean, stderr = mean_and_stderr(draws.sum(), np.square(draws).sum(), len(draws))
    assert mean == pytest.approx(draws.mean(), rel=1e-12)
    assert stderr == pytest.approx(draws.std(ddof=1) / math.sqrt(50), rel=1e-9)  # float64, with one cancellation


@pytest.mark.parametrize(
    "row, expected",
    [((3.0, 9.0, 1.0), (3.0, 0.0)), ((0.3, 0.01 * 9, 9.0), (0.3 / 9, None)), ((0.7, 0.07, 7.0), (0.1, 0.0))],
)
def test_one_draw_or_equal_draws_have_no_negative_variance(row, expected):
    mean, stderr = mean_and_stderr(*row)
    assert mean == pytest.approx(expected[0])
    assert stderr >= 0 and math.isfinite(stderr)
    if expected[1] is not None:
        assert stderr == pytest.approx(expected[1], abs=1e-8)


def test_a_loss_measurement_reads_every_row_but_the_objectives():
    table = np.array([[9.0, 99.0, 3.0], [2.0, 2.0, 4.0], [5.0, 7.0, 5.0]])
    measurement = loss_measurement(table)
    assert measurement.metrics == [0.5, 1.0]
    assert measurement.stderrs == pytest.approx([math.sqrt(1 / 3 / 4), math.sqrt(0.5 / 5)])
    assert measurement.counts == [4, 5]


def counted(hits, count):
    """Hard labels: a sample is in the class or not."""
    return share_measurement((np.arange(count) < hits)[:, None].astype(np.float64))


def test_a_share_is_measured_as_its_negative_logarithm():
    measurement = counted(30, 120)
    share = 30.5 / 121
    assert measurement.metrics == [pytest.approx(-math.log(share))]
    # Delta method: the standard error of the share over the share.
    assert measurement.stderrs == [pytest.approx(math.sqrt(0.25 * 0.75 / 119) / share)]
    assert measurement.counts == [120]


@pytest.mark.parametrize("count, share", [(256, 0.1), (256, 0.3), (1500, 0.02), (1500, 0.1), (1500, 0.5)])
def test_the_95_percent_interval_covers_the_share_as_often_as_it_says(count, share):
    """Exact: every possible number of hits, weighted with its binomial probability."""
    hits = np.arange(count + 1)
    pairs = [counted(k, count) for k in hits]
    metrics, stderrs = (np.array([getattr(p, name)[0] for p in pairs]) for name in ("metrics", "stderrs"))
    covered = np.abs(metrics + math.log(share)) <= 1.96 * stderrs
    coverage = binom.pmf(hits, count, share) @ covered
    # Normal intervals of a discrete count wobble around 95 % by a few per cent; these counts have 25 hits or more.
    assert 0.92 < coverage < 0.98


def test_seeded_repeats_of_hard_labels_give_the_same_coverage():
    rng = np.random.default_rng(0)
    share, count, repeats = 0.1, 400, 1000
    covered = 0
    for _ in range(repeats):
        weights = np.eye(2)[(rng.random(count) < share).astype(int)]
        measurement = share_measurement(weights[:, [1]])
        covered += abs(measurement.metrics[0] + math.log(share)) <= 1.96 * measurement.stderrs[0]
    # Between 92 % and 98 %: four standard errors (0.7 %) beyond 95 %, so the false-alarm rate is below 1e-3
    # even where discreteness moves the true coverage by half a per cent.
    assert 0.92 < covered / repeats < 0.98


@pytest.mark.parametrize("count", [8, 128, 1500])
def test_nobody_or_everybody_in_a_class_is_finite_with_an_honest_error(count):
    nobody, everybody = counted(0, count), counted(count, count)
    assert nobody.metrics[0] == pytest.approx(math.log(2 * count + 2))
    assert everybody.metrics[0] > 0  # a share below 1, so that no interval closes on a claim of certainty
    for measurement in (nobody, everybody):
        assert math.isfinite(measurement.stderrs[0]) and measurement.stderrs[0] > 0
    # Nobody out of n says "fewer than about 3 in n": the interval has to reach there (rule of three).
    assert nobody.metrics[0] - 3 * nobody.stderrs[0] < -math.log(3 / count)


def test_a_trace_of_membership_is_no_more_certain_than_none():
    """Posterior weights of 1e-12 a sample, as a mixture's exact posterior gives, say no more than zeros do."""
    none = share_measurement(np.zeros((128, 1)))
    trace = share_measurement(np.full((128, 1), 1e-12))
    assert trace.metrics == pytest.approx(none.metrics)
    assert trace.stderrs == pytest.approx(none.stderrs)


def test_the_error_of_an_estimate_falls_with_the_hits():
    """More hits, relatively smaller error: no jump where the fallback for zero hits ends."""
    stderrs = [counted(hits, 128).stderrs[0] for hits in range(30)]
    assert all(a > b for a, b in itertools.pairwise(stderrs))


def test_column_means_come_with_their_standard_errors():
    rows = np.array([[1.0, 5.0], [3.0, 5.0]])
    measurement = mean_measurement(rows)
    assert measurement.metrics == [2.0, 5.0] and measurement.stderrs == [pytest.approx(1.0), 0.0]
    assert measurement.counts == [2, 2]


@pytest.mark.parametrize(
    "unit, sense, metric, canonical",
    [
        ("share", ">=", 1.2, 1.2),
        ("share", "<=", 1.2, -1.2),
        ("nats", "<=", 0.3, 0.3),
        ("nats", ">=", 0.3, -0.3),
        ("reward", ">=", 0.5, -0.5),
        ("likelihood_ratio", "<=", 0.4, 0.4),
    ],
)
def test_the_canonical_metric_is_the_one_whose_threshold_is_an_upper_limit(unit, sense, metric, canonical):
    constraint = Constraint(name="a", unit=unit, threshold=0.25, sense=sense)
    turned = Measurement([metric], [0.1], [9]).canonical([constraint])
    assert turned.metrics == [canonical] and turned.stderrs == [0.1]
    # Exactly at the threshold the violation is zero, whatever the unit and the sense.
    natural = -math.log(0.25) if unit == "share" else 0.25
    at = Measurement([natural], [0.1], [9]).canonical([constraint])
    assert at.metrics[0] == pytest.approx(constraint.canonical_threshold)


LINEAR = Labeller(lambda x: np.concatenate([x, 1 - x], axis=1).astype(float), "linear", 1.0, 0)
SIGN = Labeller(lambda x: np.concatenate([x < 0, x >= 0], axis=1).astype(float), "sign", 1.0, 0)


def draw(denoiser, schedule, labeller, *, num_samples, shards, dual_step=2, classes=(1, 0)):
    def sample(denoiser, multipliers, start, *, num_sampling_steps):
        return ddim_sample(denoiser, start, schedule, num_sampling_steps=num_sampling_steps)

    return share_draws(
        sample,
        denoiser,
        torch.zeros(2),
        labeller,
        classes,
        seed=3,
        counter=dual_step,
        shards=shards,
        counts=shard_counts(num_samples, 4),
        shape=(1,),
        num_sampling_steps=5,
    ).rows


@pytest.mark.parametrize("num_samples", [30, 3])  # 3: fewer samples than shards
@pytest.mark.parametrize("groups", [[range(2), range(2, 4)], [[0], [1], [2], [3]], [[0, 1, 2], [3]]])
def test_the_shards_of_several_workers_are_one_workers_rows(exact_denoiser, gaussian, num_samples, groups):
    schedule = NoiseSchedule(num_train_timesteps=50, clip_sample=False)
    denoiser = exact_denoiser(gaussian(0.2, 1.0), schedule)
    whole = draw(denoiser, schedule, SIGN, num_samples=num_samples, shards=range(4))
    parts = [draw(denoiser, schedule, SIGN, num_samples=num_samples, shards=group) for group in groups]
    np.testing.assert_array_equal(np.concatenate(parts), whole)  # hard labels: whole numbers
    assert whole.shape == (num_samples, 2) and whole.sum() == num_samples
    assert draw(denoiser, schedule, SIGN, num_samples=num_samples, shards=[]).shape == (0, 2)


def test_every_dual_step_draws_new_samples_and_a_repeated_one_the_same(exact_denoiser, gaussian):
    schedule = NoiseSchedule(num_train_timesteps=50, clip_sample=False)
    denoiser = exact_denoiser(gaussian(0.0, 1.0), schedule)
    rows = [
        draw(denoiser, schedule, LINEAR, num_samples=20, shards=range(4), dual_step=step, classes=[0])
        for step in (0, 1, 0)
    ]
    assert np.array_equal(rows[0], rows[2])
    assert not np.array_equal(rows[0], rows[1])
