"""A trial ends early only for a certificate that is tight, or thresholds out of reach; noise alone ends none."""

import json

import numpy as np
import pytest

from dualsweep.constraints import NonNegative, Simplex, StoppingRule, SumBelow

LIMITS = {"tolerance": 0.1, "window": 8, "drift": 0.2, "patience": 24}


def rows(multipliers, violations, stderr=0.01):
    """Rows of a trace, one constraint a column."""
    multipliers, violations = (np.atleast_2d(np.asarray(a, dtype=float).T).T for a in (multipliers, violations))
    width = multipliers.shape[1]
    return [
        {
            "dual_step": k + 1,
            "multipliers": m.tolist(),
            "violations": v.tolist(),
            "violation_stderrs": [stderr] * width,
            "thresholds": [1.0] * width,
            "relaxations": [0.0] * width,
            "objective": 1.0,
        }
        for k, (m, v) in enumerate(zip(multipliers, violations, strict=True))
    ]


def rule(width=1, domain=None, **changes):
    return StoppingRule([f"c{i}" for i in range(width)], domain or NonNegative(), **LIMITS | changes)


def first(stopping, given, afresh=None):
    """(dual step, finding) of the first finding, or None."""
    for row in given:
        found = stopping.see(row, afresh)
        if found is not None:
            return row["dual_step"], found
    return None


def noise(count, scale, seed=0):
    return scale * np.random.default_rng(seed).standard_normal(count)


def test_a_run_at_rest_ends_after_one_window():
    step, found = first(rule(), rows(np.full(30, 0.5), noise(30, 0.01)))
    assert (step, found.kind) == (8, "certificate") and "dual steps 5 to 8" in found.evidence


def test_a_kind_draw_is_not_enough_until_other_draws_confirm_it():
    """True violation 0.12 over a tolerance of 0.1: of 200 looks one is within it by luck alone, with eight rows each too."""
    ended = {"once": 0, "confirmed": 0}
    for seed in range(60):
        violations = 0.12 + noise(200, 0.05, seed)
        found = first(rule(infeasible=False), rows(np.full(200, 0.5), violations, stderr=0.05))
        ended["confirmed"] += found is not None
        means = np.convolve(violations, np.full(8, 1 / 8), "valid")
        ended["once"] += bool((means + 0.05 / 8**0.5 <= 0.1).any())
    assert ended["once"] > 40 and ended["confirmed"] < 12  # 47 and 6 with these seeds


class Fresh:
    """Draws of their own, of a violation of one constraint; counts how often it was asked."""

    def __init__(self, violation, stderr=0.01, seed=None):
        self.violation, self.stderr, self.asked = violation, stderr, 0
        self.rng = None if seed is None else np.random.default_rng(seed)

    def __call__(self):
        self.asked += 1
        drawn = self.violation + (self.stderr * self.rng.standard_normal() if self.rng else 0.0)
        return {"violations": [drawn], "violation_stderrs": [self.stderr]}


def test_a_run_at_rest_ends_at_once_where_draws_of_their_own_can_confirm_it():
    fresh = Fresh(0.0)
    step, found = first(rule(), rows(np.full(30, 0.5), noise(30, 0.01)), fresh)
    assert (step, found.kind, found.confirmed, fresh.asked) == (8, "certificate", 8, 1)
    assert "draws of their own at dual step 8" in found.evidence and "dual steps 1 to 8, which proposed" in found.evidence


def test_draws_of_their_own_are_made_for_a_proposal_alone_and_a_refuted_one_is_not_made_again_of_the_same_rows():
    fresh = Fresh(0.5)
    assert first(rule(), rows(np.full(12, 0.5), np.full(12, 0.5)), fresh) is None
    assert fresh.asked == 0
    assert first(rule(), rows(np.full(19, 0.5), np.zeros(19)), fresh) is None
    assert fresh.asked == 3  # at 8, 12 and 16
    assert first(rule(), rows(np.full(15, 0.5), np.zeros(15)), Fresh(-0.5)) is None  # pays for room it does not need
    assert first(rule(), rows(np.zeros(15), np.zeros(15)), Fresh(-0.5))[0] == 8  # and where nothing is paid
    assert first(rule(), rows(np.full(15, 0.5), np.zeros(15)), Fresh(0.0, stderr=0.2)) is None  # too noisy to say


def test_a_run_that_passes_by_proposes_nothing_although_half_a_window_would_look_tight():
    """A multiplier that grows by 4 % a dual step stands still over four of them (a fifth is allowed), not over eight."""
    fresh, given = Fresh(0.0), rows(0.5 * 1.04 ** np.arange(24), np.zeros(24))
    assert first(rule(infeasible=False), given, fresh) is None and fresh.asked == 0
    assert first(rule(infeasible=False, drift=0.5), given, fresh)[1].kind == "certificate"


def test_a_kind_draw_is_not_enough_until_draws_of_their_own_confirm_it():
    """As above: a violation of 0.12 over a tolerance of 0.1, here judged by draws of four rows at once."""
    ended = 0
    for seed in range(60):
        given = rows(np.full(200, 0.5), 0.12 + noise(200, 0.05, seed), stderr=0.05)
        ended += first(rule(infeasible=False), given, Fresh(0.12, 0.025, seed + 1000)) is not None
    assert ended < 12  # 5 with these seeds; one look ends 47, see above


def test_a_confirmation_shares_no_draws_with_what_proposed_it():
    held = np.r_[np.zeros(4), np.full(4, 0.5), np.zeros(40)]
    assert first(rule(), rows(np.full(48, 0.5), held))[0] == 16  # 5 to 8 refute 1 to 4; 9 to 12 propose anew
    assert first(rule(pooled=3), rows(np.full(30, 0.5), np.zeros(30)))[0] == 10
    assert first(rule(pooled=3), rows(np.full(30, 0.5), np.r_[np.zeros(4), 0.5, 0.5, np.zeros(24)]))[0] == 10


def test_an_approach_ends_when_it_has_arrived_and_not_before():
    away = 0.8 * 0.8 ** np.arange(40)
    step, found = first(rule(), rows(1 - away, away))
    assert found.kind == "certificate"
    assert away[step - 8 : step - 4].mean() <= 0.1  # the mean of each half is within the tolerance, by its noise
    assert away[step - 9 : step - 5].mean() + 0.01 > 0.1


@pytest.mark.parametrize(
    "multipliers, violations",
    [
        (np.full(23, 0.5), np.full(23, 0.2)),  # not held
        (np.full(23, 0.5), np.full(23, -0.2)),  # pays for room it does not need
        (np.linspace(0.2, 0.9, 23), np.full(23, 0.05)),  # within tolerance, but the multiplier is still on its way
        (np.full(23, 0.5), np.linspace(-1.1, 1.1, 23)),  # right on average while it runs through
    ],
)
def test_no_certificate_while_something_is_missing(multipliers, violations):
    assert first(rule(), rows(multipliers, violations)) is None


def test_room_to_spare_is_fine_where_nothing_is_paid_for_it():
    assert first(rule(), rows(np.zeros(10), np.full(10, -2.0)))[1].kind == "certificate"


def test_every_constraint_has_to_be_tight():
    one, other = np.zeros(20), np.full(20, 0.3)
    assert first(rule(2), rows(np.full((20, 2), 0.5), np.stack([one, other], axis=1))) is None
    assert first(rule(2), rows(np.full((20, 2), 0.5), np.stack([one, one], axis=1)))[0] == 8


def test_noise_beyond_the_tolerance_is_no_certificate_but_more_draws_are():
    held = np.full(23, 0.05)
    assert first(rule(), rows(np.full(23, 0.5), held, stderr=0.5)) is None
    assert first(rule(), rows(np.full(23, 0.5), held, stderr=0.1))[1].kind == "certificate"
    # Rows that share all their draws tell no more than one of them.
    assert first(rule(pooled=1000), rows(np.full(23, 0.5), held, stderr=0.1)) is None


def test_a_multiplier_that_grows_for_nothing_is_out_of_reach():
    given = rows(np.linspace(0.1, 3, 60), 0.7 + noise(60, 0.02), stderr=0.02)
    step, found = first(rule(), given)
    assert (step, found.kind) == (24, "infeasible") and found.evidence.startswith("c0: multiplier went from 0.1 to")


def test_a_multiplier_that_is_only_slow_is_not_given_up():
    """The violation falls by a tenth, within noise, while a small multiplier grows: at ten times of it, it would be gone."""
    multipliers = np.linspace(0.10, 0.17, 24)
    for seed in range(10):
        violations = 0.9 - multipliers + noise(24, 0.04, seed)
        assert first(rule(), rows(multipliers, violations, stderr=0.04)) is None
    assert first(rule(), rows(multipliers, 0.7 + noise(24, 0.001), stderr=0.001))[1].kind == "infeasible"


def test_one_constraint_out_of_reach_is_enough_and_is_named():
    given = rows(np.stack([np.full(30, 0.5), np.linspace(0, 3, 30)], 1), np.stack([np.zeros(30), np.ones(30)], 1))
    assert first(rule(2), given)[1].evidence.startswith("c1: ")


@pytest.mark.parametrize(
    "violations, stderr",
    [
        (np.linspace(1.0, 0.3, 24), 0.02),  # falls
        (np.full(24, 0.7), 0.5),  # too noisy to tell
        (np.full(24, 0.08), 0.001),  # within the tolerance
        (np.where(np.arange(24) % 4 < 2, 0.6, -0.4), 0.02),  # swings
    ],
)
def test_what_may_still_arrive_is_not_given_up(violations, stderr):
    assert first(rule(drift=1e-9), rows(np.linspace(0.1, 3, 24), violations, stderr)) is None


def test_a_multiplier_at_the_limit_of_its_domain_is_out_of_reach():
    domain = SumBelow(1.0)
    given = rows(np.full(24, domain.ceiling), np.full(24, 0.7), stderr=0.02)
    found = first(rule(domain=domain), given)[1]
    assert found.kind == "infeasible" and "limit of its domain" in found.evidence
    assert first(rule(), given) is None  # without that limit it would only have to grow


def test_on_the_simplex_violations_count_from_the_level():
    weights, violations = np.tile([0.4, 0.6, 0.0], (12, 1)), np.tile([2.0, 2.0, 1.5], (12, 1))
    assert first(rule(3, Simplex()), rows(weights, violations))[1].kind == "certificate"
    violations[:, 0] = 2.5
    assert first(rule(3, Simplex()), rows(weights, violations)) is None


def test_each_kind_of_end_can_be_switched_off():
    at_rest, out_of_reach = rows(np.full(30, 0.5), np.zeros(30)), rows(np.linspace(0.1, 3, 30), np.full(30, 0.7))
    assert first(rule(certificate=False), at_rest) is None
    assert first(rule(infeasible=False), out_of_reach) is None


@pytest.mark.parametrize("cut", [0, 1, 5, 17, 23])
def test_a_rule_restored_from_a_checkpoint_ends_at_the_same_dual_step_for_the_same_reason(cut):
    for given in (
        rows(np.linspace(0.1, 3, 40), np.full(40, 0.7)),
        rows(1 - 0.8 ** np.arange(40), 0.8 ** np.arange(40)),
    ):
        calm = first(rule(), given)
        before, cut = rule(), min(cut, calm[0] - 1)
        assert first(before, given[:cut]) is None
        restored = rule(state=json.loads(json.dumps(before.state)))
        assert first(restored, given[cut:]) == calm is not None


@pytest.mark.parametrize("cut", [1, 8, 10, 13])
def test_a_restored_rule_knows_what_was_refuted(cut):
    at_rest, answers = rows(np.full(30, 0.5), np.zeros(30)), [0.5, 0.5, 0.0]

    def asked_by(steps):
        """Draws that refute twice; `steps` of the confirmations that were made already."""
        left = iter(answers[steps:])
        return lambda: {"violations": [next(left)], "violation_stderrs": [0.01]}

    calm = first(rule(), at_rest, asked_by(0))
    before = rule()
    assert calm[0] == 16 and first(before, at_rest[:cut], asked_by(0)) is None
    restored = rule(state=json.loads(json.dumps(before.state)))
    assert first(restored, at_rest[cut:], asked_by(max(0, cut // 4 - 1))) == calm


@pytest.mark.parametrize(
    "changes, field",
    [
        ({"tolerance": 0.0}, "stopping.tolerance"),
        ({"window": 7}, "stopping.window"),
        ({"patience": 8}, "stopping.patience"),
        ({"drift": -1.0}, "stopping.drift"),
        ({"pooled": 0}, "measure.window"),
    ],
)
def test_a_setting_out_of_range_is_refused_by_name(changes, field):
    with pytest.raises(ValueError, match=field):
        rule(**changes)
