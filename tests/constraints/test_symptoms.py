"""Signs of a parametrisation gap: each in a simulated run that has it, none in healthy ones or near misses.

Runs are closed loops: projected ascent on the violation of a model whose metric answers to its multiplier (or not),
with autoregressive noise of the reported standard error, so that a row's error is right however correlated rows are.
"""

import collections

import numpy as np
import pytest

from dualsweep.constraints import courses, symptoms
from dualsweep.constraints.domains import Capped, NonNegative, Simplex, SumBelow
from dualsweep.constraints.symptoms import FEWEST_ROWS, SYMPTOMS, find_symptoms

ERROR = 0.02  # standard error of a violation, and of the objective below
TOLERANCE = 0.02


def noise(rng, count, width, correlation):
    """Autoregressive noise of variance 1, shape (count, width)."""
    values = np.empty((count, width))
    values[0] = rng.normal(size=width)
    for row in range(1, count):
        values[row] = correlation * values[row - 1] + np.sqrt(1 - correlation**2) * rng.normal(size=width)
    return values


def as_rows(multipliers, violations, objective, error=ERROR, objective_error=ERROR, **more):
    multipliers, violations = np.atleast_2d(multipliers.T).T, np.atleast_2d(violations.T).T
    width = violations.shape[1]
    return [
        {
            "dual_step": i + 1,
            "multipliers": multipliers[i].tolist(),
            "violations": violations[i].tolist(),
            "violation_stderrs": [error] * width,
            "smoothed_violations": violations[i].tolist(),
            "thresholds": [1.0] * width,
            "objective": float(objective[i]),
            "objective_stderr": objective_error,
            **{key: value[i].tolist() for key, value in more.items()},
        }
        for i in range(len(violations))
    ]


def run(
    answer,
    gain,
    count=100,
    *,
    seed=0,
    cost=None,
    delay=0,
    domain=None,
    correlation=0.5,
    error=ERROR,
    start=0.0,
    steps=1,
):
    """Projected ascent of one multiplier, total ``gain`` over the run: violation ``answer(multiplier)`` plus noise.

    The objective is 1 + ``cost(progress, multiplier)``; ``delay`` rows pass before the model answers.
    """
    drawn = error * noise(np.random.default_rng([seed, count]), count, 2, correlation)
    history, violations, objective = [start] * (delay + 1), [], []
    for i in range(count):
        violation = answer(history[-1 - delay]) + drawn[i, 0]
        objective.append(1 + (cost(i / count, history[-1]) if cost else 0.0) + drawn[i, 1])
        moved = np.array([history[-1] + gain / count * violation])
        history.append(float((domain or NonNegative()).project(moved)[0]))
        violations.append(violation)
    rows = as_rows(np.array(history[delay + 1 :]), np.array(violations), objective, error, error)
    return [{**row, "dual_step": steps * row["dual_step"]} for row in rows]


def found(rows, names=("c",), domain=None, tolerance=TOLERANCE):
    """Names of the symptoms by constraint."""
    seen = find_symptoms(rows, names=names, domain=domain or NonNegative(), tolerance=tolerance)
    return {(symptom.name, symptom.constraint) for symptom in seen}


def limited(multiplier):
    """A model that closes part of the gap and no more."""
    return 0.3 + 0.7 * np.exp(-3 * multiplier)


def able(multiplier):
    """A model that meets the threshold at multiplier 1."""
    return 1 - multiplier


LIMIT = SumBelow(1.0)
STANDING = {"persistent violation", "saturated multiplier", "plateau"}
SICK = {
    "limited model": (lambda n, s: run(limited, 10, n, seed=s), None, STANDING),
    "no answer at all": (lambda n, s: run(lambda _: 0.3, 10, n, seed=s), None, STANDING),
    "limit of the domain": (
        lambda n, s: run(limited, 20, n, seed=s, domain=LIMIT),
        LIMIT,
        {"persistent violation", "saturated multiplier"},
    ),
    "dual step too large": (lambda n, s: run(able, 2.1 * n, n, seed=s), None, {"oscillating multiplier"}),
    "given away for nothing": (
        lambda n, s: run(able, 10, n, seed=s, cost=lambda progress, _: 2 * max(0.0, progress - 0.5)),
        None,
        {"retention loss"},
    ),
    "limited and costly": (
        lambda n, s: run(limited, 10, n, seed=s, cost=lambda _, multiplier: 0.5 * multiplier**2),
        None,
        STANDING | {"retention loss"},
    ),
}


@pytest.mark.parametrize("count", [20, 60, 200])
@pytest.mark.parametrize("case", SICK)
def test_each_sign_is_seen_in_a_run_that_has_it_and_no_other_is(case, count):
    """At least 14 of 20 seeded runs show each expected sign and at most one any other. Measured over 100 runs each: 82
    to 86 % for the retention loss, which spends 16 % on runs that still improve, 93 % or more for the others, and none
    that does not belong."""
    make, domain, expected = SICK[case]
    tally = collections.Counter()
    for seed in range(20):
        tally.update(name for name, _ in found(make(count, seed), domain=domain))
    assert all(tally[name] >= 14 for name in expected), tally
    assert all(tally[name] <= 1 for name in set(SYMPTOMS) - expected), tally


def test_a_slow_swing_is_seen_with_its_period():
    rows = run(able, 0.3 * 200, 200, delay=5, steps=10)
    (symptom,) = find_symptoms(rows, names=("c",), domain=NonNegative(), tolerance=TOLERANCE)
    assert (symptom.name, symptom.constraint) == ("oscillating multiplier", "c")
    # multiplier += 0.3 * (1 - multiplier five steps ago): the growing swing has period 21 steps of 10 each
    period = float(symptom.evidence.split("period about ")[1].split()[0])
    assert period == pytest.approx(210, rel=0.1)


def open_loop(rng, count, correlation):
    """Everything rests: two constraints active, one slack, multipliers swinging by a tenth, objective too."""
    drawn = noise(rng, count, 7, correlation)
    violations = ERROR * drawn[:, :3] - np.array([10 * ERROR, 0, 0])
    multipliers = np.maximum(1 + 0.1 * drawn[:, 3:6], 0) * np.array([0, 1, 1])
    return as_rows(multipliers, violations, 1 + 0.1 * drawn[:, 6], objective_error=0.1)


def closed_loop(rng, count, correlation):
    """Three constraints approached from multipliers 0 within a tenth of the run; the objective pays for them."""
    drawn = noise(rng, count, 4, correlation)
    optimum = np.array([0.5, 1.0, 2.0])
    slope = 20 * ERROR / optimum  # violated by 20 standard errors at the start
    multipliers, rows, violations, objective = np.zeros(3), [], [], []
    for i in range(count):
        violations.append(slope * (optimum - multipliers) + ERROR * drawn[i, :3])
        objective.append(1 + 0.1 * float(slope @ multipliers**2) + ERROR * drawn[i, 3])
        multipliers = np.maximum(multipliers + 10 / (count * slope) * violations[-1], 0)
        rows.append(multipliers)
    return as_rows(np.array(rows), np.array(violations), np.array(objective))


def false_alarms(seeds):
    """Runs with any symptom, and all runs: lengths 20 to 200, correlations 0 to 0.9, both kinds of healthy run."""
    alarms = total = 0
    for count in range(20, 201, 20):
        for correlation in (0.0, 0.5, 0.9):
            for seed in range(seeds):
                for make in (open_loop, closed_loop):
                    rng = np.random.default_rng([seed, count, round(10 * correlation)])
                    alarms += bool(found(make(rng, count, correlation), names=("a", "b", "c")))
                    total += 1
    return alarms, total


def test_healthy_runs_are_called_sick_in_fewer_than_two_percent():
    """Five seeds at each of ten lengths, three correlations and two kinds of run, three constraints each. Measured over
    6000 runs: 7 alarms, 0.1 %; 2 % of these 300 runs are 6, which a rate of 0.1 % reaches once in 10^6."""
    alarms, total = false_alarms(5)
    assert total == 300
    assert alarms / total < 0.02


@pytest.mark.parametrize(
    "weakened", [{"BEYOND": 0.0, "THROUGHOUT": 0.0}, {"BEYOND": 1.0, "STEEP": 0.0, "STILL": 0.9999}]
)
def test_control_the_false_alarm_rate_rises_when_the_limits_are_weakened(weakened, monkeypatch):
    for name, value in weakened.items():
        for module in (symptoms, courses):
            monkeypatch.setattr(module, name, value, raising=False)
    alarms, total = false_alarms(2)  # measured over 300 runs: 8 and 15 %
    assert alarms / total > 0.02


def falling(count=60):
    """A violation far out that falls by a factor of two over the last third while its multiplier doubles."""
    place = np.arange(count) / count
    rows = as_rows(np.exp(2 * place), np.exp(-2 * place), np.ones(count))
    return rows


def touching():
    """A multiplier that reaches its limit now and then: in a fifth of the rows."""
    multipliers = np.where(np.arange(60) % 5 == 0, LIMIT.ceiling, 0.8)
    return as_rows(multipliers, ERROR * np.resize([1.0, -1.0], 60), np.ones(60))


def dying():
    """A swing that loses a factor of five over the last third."""
    place = np.arange(60)
    return as_rows(1 + np.exp(-place / 12) * 20 * np.sin(place), np.exp(-place / 12) * 20 * np.cos(place), np.ones(60))


def faint():
    """Sides change far beyond the standard errors, but the multiplier hardly moves."""
    place = np.arange(60)
    return as_rows(1 + 0.1 * np.sin(place), 10 * ERROR * np.cos(place), np.ones(60))


def quiet():
    """A swinging multiplier whose violation changes sides beyond two standard errors but not three."""
    place = np.arange(60)
    return as_rows(1 + np.sin(np.pi * place / 3), (TOLERANCE + 2.5 * ERROR) * np.sign(np.cos(place)), np.ones(60))


def unclear():
    """The multiplier rises while a violation of two standard errors a row may fall to half or not at all."""
    drawn = ERROR * noise(np.random.default_rng(4), 24, 1, 0.0)[:, 0]
    return as_rows(np.linspace(0.5, 1, 24), 2 * ERROR + drawn, np.ones(24))


def mild():
    """An objective that rises by 5 % over the last third, surely, at a violation that rests."""
    return as_rows(np.ones(60), np.zeros(60), 10 * np.linspace(1, 1.15, 60))


def paid_for():
    """An objective that rises steeply while the violation falls."""
    return as_rows(np.linspace(1, 2, 60), np.linspace(0, -0.15, 60), np.linspace(1, 2, 60))


@pytest.mark.parametrize(
    "make, domain, weakened, symptom",
    [
        (falling, None, {"FALL": np.inf}, "persistent violation"),
        (falling, None, {"FALL": np.inf}, "saturated multiplier"),
        (touching, LIMIT, {"AT_GUARD": 0.1}, "saturated multiplier"),
        (dying, None, {"DYING": 0.0}, "oscillating multiplier"),
        (faint, None, {"SWING": 0.01}, "oscillating multiplier"),
        (quiet, None, {"BEYOND": 2.0}, "oscillating multiplier"),
        (unclear, None, {"ANSWER": np.inf}, "plateau"),
        (mild, None, {"STEEP": 0.01}, "retention loss"),
        (paid_for, None, {"STILL": 0.999999}, "retention loss"),
    ],
)
def test_a_near_miss_is_no_symptom_until_the_detector_is_weakened(make, domain, weakened, symptom, monkeypatch):
    assert found(make(), domain=domain) == set()
    for name, value in weakened.items():
        for module in (symptoms, courses):
            monkeypatch.setattr(module, name, value, raising=False)
    assert symptom in {name for name, _ in found(make(), domain=domain)}


def test_half_a_swing_is_none():
    phase = np.arange(60) / 8 - 1.54  # the violation changes sides at row 50, and only there in the last third
    assert found(as_rows(1 + np.sin(phase), np.cos(phase), np.ones(60))) == set()
    assert found(as_rows(1 + np.sin(3 * phase), np.cos(3 * phase), np.ones(60))) == {("oscillating multiplier", "c")}


def test_a_metric_that_still_answers_is_no_plateau_however_little():
    violations = np.concatenate([np.ones(30), np.linspace(1, 0.8, 30)])  # sure to fall, and by less than half
    assert found(as_rows(np.linspace(0, 1, 60), violations, np.ones(60))) == set()
    still = found(as_rows(np.linspace(0, 1, 60), np.ones(60), np.ones(60)))
    assert {name for name, _ in still} == STANDING


@pytest.mark.parametrize("error", [0.0, ERROR])
def test_a_run_without_noise_that_arrives_is_healthy(error):
    rows = run(able, 20, 200, error=0.0)
    assert found([{**row, "violation_stderrs": [error]} for row in rows], tolerance=0.0) == set()


def test_a_violation_within_the_tolerance_does_not_persist():
    rows = run(lambda _: 0.3, 10)
    assert ("persistent violation", "c") in found(rows)
    assert "persistent violation" not in {name for name, _ in found(rows, tolerance=0.3)}


def test_a_violation_granted_by_a_relaxation_is_none():
    count = 60
    still = as_rows(np.ones(count), np.full(count, 0.3), np.ones(count), relaxations=np.full((count, 1), 0.3))
    assert found(still) == set()
    assert found([{**row, "relaxations": [0.1]} for row in still]) == {("persistent violation", "c")}


def test_on_the_simplex_violations_count_from_the_level():
    count, names = 60, ("a", "b", "c")
    weights = np.tile([0.5, 0.5, 0.0], (count, 1))
    balanced = as_rows(weights, np.tile([0.4, 0.4, 0.1], (count, 1)), np.ones(count))
    assert found(balanced, names, Simplex()) == set()
    assert {name for _, name in found(balanced, names, NonNegative())} == set(names)
    worse = as_rows(weights, np.tile([0.4, 0.4, 0.9], (count, 1)), np.ones(count))
    assert found(worse, names, Simplex()) == {("persistent violation", "c")}


def test_only_the_constraint_at_fault_is_named_and_the_evidence_has_its_numbers():
    count = 60
    sick, well = run(lambda _: 0.3, 10, count), run(able, 10, count)
    keys = ("multipliers", "violations", "violation_stderrs", "thresholds")
    rows = [{**a, **{key: a[key] + b[key] for key in keys}} for a, b in zip(well, sick, strict=True)]
    seen = find_symptoms(rows, names=("well", "sick"), domain=NonNegative(), tolerance=TOLERANCE)
    assert {symptom.constraint for symptom in seen} == {"sick"}
    assert [symptom.name for symptom in seen] == [name for name in SYMPTOMS if name in STANDING]  # in order
    persistent = next(symptom for symptom in seen if symptom.name == "persistent violation")
    mean = np.mean([row["violations"][0] for row in sick[40:]])
    assert f"violation {mean:.4g} on average over dual steps 41 to 60" in persistent.evidence
    assert str(persistent).startswith("persistent violation of sick: violation 0.3")


def test_too_few_rows_or_no_constraints_say_nothing():
    rows = run(lambda _: 0.3, 10, FEWEST_ROWS)
    assert found(rows)
    assert found(rows[1:]) == set()
    empty = {"multipliers": [], "violations": [], "violation_stderrs": [], "thresholds": []}
    assert found([{**row, **empty} for row in rows], names=()) == set()


def bare(rows):
    return [{key: value for key, value in row.items() if key != "objective_stderr"} for row in rows]


def test_retention_loss_is_seen_without_errors_of_the_objective_too():
    rows = run(able, 10, cost=lambda progress, _: 2 * max(0.0, progress - 0.5))
    assert found(bare(rows)) == {("retention loss", None)}


def test_an_objective_without_errors_raises_no_more_false_alarms():
    """Correlation 0.9, 240 runs at rest. Measured over 400: 0.8 %, and 5.3 % if only the last third told how noisy
    they are, so the limit lies 2 standard errors from either."""
    alarms = 0
    for count in (35, 60):
        for seed in range(120):
            rows = open_loop(np.random.default_rng([seed, count, 9]), count, 0.9)
            alarms += bool(found(bare(rows), names=("a", "b", "c")))
    assert alarms / 240 < 0.02


@pytest.mark.parametrize(
    "change, message",
    [
        ({"violations": [0.1, 0.2]}, r"trace row 3: violations=\[0.1, 0.2\]: give 1 finite numbers"),
        ({"multipliers": [np.nan]}, "trace row 3: multipliers"),
        ({"objective": None}, "trace row 3: objective=None"),
        ({"dual_step": "x"}, "trace row 3: dual_step='x': give 1 finite numbers"),
        ({"dual_step": [4]}, "dual_step mixes numbers and lists"),
    ],
)
def test_a_damaged_row_is_refused(change, message):
    rows = run(able, 10, 30)
    rows[3] = {**rows[3], **change}
    with pytest.raises(ValueError, match=message):
        found(rows)


def test_a_bad_tolerance_or_domain_is_refused():
    rows = run(able, 10, 30)
    with pytest.raises(ValueError, match="tolerance=-1"):
        found(rows, tolerance=-1)
    with pytest.raises(ValueError, match=r"domain\.caps"):
        found(rows, domain=Capped((0.1, 0.2)))
