"""Which point of a frontier comes next and what it starts from: plans without Ray, and the searcher Tune asks."""

import asyncio
import copy
import math

import numpy as np
import pytest
from ray.tune.search import Searcher

from dualsweep.constraints import Constraint, Problem
from dualsweep.constraints.closed_forms import (
    class_restriction_multipliers,
    class_restriction_objective,
    class_restriction_shares,
)
from dualsweep.orchestration.config import ConfigError, SweepConfig, sweep_points
from dualsweep.orchestration.dual_server import DualServer
from dualsweep.orchestration.frontier import (
    AdaptivePlan,
    Outcome,
    PathPlan,
    Starts,
    check_adaptive,
    check_order,
    check_path,
    outcome_of,
)
from dualsweep.orchestration.interrupts import Halt
from dualsweep.orchestration.points import build_frontier
from dualsweep.orchestration.schedulers import trial_scheduler
from dualsweep.orchestration.sweep import kept, placed_again, with_chains

NAMES = ("digit_4", "digit_5")
SHARED = {"folder": "somewhere"}


def config(chains=1, thresholds=None, **changes):
    return SweepConfig.from_dict(
        {
            "name": "small",
            "data": {"dataset": "digits", "minority": {"classes": [4, 5], "keep": 0.1}},
            "thresholds": thresholds or {"unit": "share", "grid": {"minority": [0.2, 0.05, 0.1, 0.15]}},
            "sweep": {"order": "path", "chains": chains},
            **changes,
        }
    )


def points_of(spec):
    return sweep_points(spec, NAMES)


def label(share):
    return f"minority >= {share:g}"


def outcome(point, multipliers=(0.1, 0.2), metrics=(2.0, 2.0)):
    thresholds = {name: float(i) for i, name in enumerate(NAMES)}
    return Outcome(
        point["label"], dict(zip(NAMES, multipliers, strict=True)), dict(zip(NAMES, metrics, strict=True)), thresholds
    )


def result_of(point, **changes):
    return {
        "trial_id": point["trial_id"],
        "label": point["label"],
        "status": "completed",
        "primal_steps": 30,
        "averaged_multipliers": dict.fromkeys(NAMES, 0.1),
        "constraints": [{"name": name, "metric": 2.0, "threshold": 2.1} for name in NAMES],
        "certificate": {"verdict": "feasible"},
        **changes,
    }


def plan_of(spec):
    return PathPlan(spec, [point for point in points_of(spec) if point["kind"] == "constrained"])


def test_a_point_waits_for_the_one_it_starts_from():
    plan = plan_of(config())
    first = plan.next()
    assert (first["label"], first["start"]) == (label(0.05), None)
    assert plan.next() is None and not plan.done
    plan.over(first["trial_id"], outcome(first))
    second = plan.next()
    assert second["label"] == label(0.1)
    assert (second["start"]["trial"], second["start"]["label"]) == (first["trial_id"], label(0.05))


def test_a_point_goes_on_with_the_draws_behind_those_of_all_points_before_it():
    plan, seen = plan_of(config()), []
    while (point := plan.next()) is not None:
        seen.append((point["start"] or {}).get("steps_before", 0))
        plan.over(point["trial_id"], outcome_of(result_of(point, start=point["start"], primal_steps=100 + len(seen))))
    assert seen == [0, 101, 203, 306]


def test_two_chains_are_ready_side_by_side_once_their_common_start_is_over():
    plan = plan_of(config(chains=2))
    first = plan.next()
    assert first["label"] == label(0.1) and plan.next() is None
    plan.over(first["trial_id"], outcome(first))
    ready = [plan.next(), plan.next()]
    assert [point["label"] for point in ready] == [label(0.05), label(0.15)] and plan.next() is None
    assert all(point["start"]["trial"] == first["trial_id"] for point in ready)
    plan.over(ready[1]["trial_id"], outcome(ready[1]))
    assert plan.next()["start"]["trial"] == ready[1]["trial_id"] and plan.done


def test_shares_start_from_the_law_of_shares_and_others_from_the_line_through_two_points():
    spec = config()
    plan = plan_of(spec)
    first = plan.next()
    # At these multipliers each of two classes of mass 0.02 has a share of (0.02 + 0.04) / 1.08.
    metric = -math.log(0.06 / 1.08)
    plan.over(first["trial_id"], outcome(first, (0.04, 0.04), (metric, metric)))
    found = plan.next()["start"]["multipliers"]
    law = class_restriction_multipliers([2.302585092994046] * 2, [0.02] * 2)
    assert list(found.values()) == pytest.approx(law.tolist(), rel=1e-6)

    plan = plan_of(config(thresholds={"unit": "loss", "grid": {"minority": [0.3, 0.2, 0.1]}}))
    for multipliers in ((0.2, 0.4), (0.3, 0.5)):
        point = plan.next()
        plan.over(point["trial_id"], outcome(point, multipliers))
    assert list(plan.next()["start"]["multipliers"].values()) == pytest.approx([0.4, 0.6])


def test_factors_of_the_pretrained_value_have_an_order_too():
    grid = {"minority": [{"factor": 0.7}, {"factor": 0.9}, {"factor": 0.8}]}
    plan = plan_of(config(thresholds={"unit": "loss", "grid": grid}))
    factors = []
    for multipliers in ((0.1, 0.1), (0.2, 0.2), (0.3, 0.3)):
        point = plan.next()
        factors.append(point["thresholds"]["digit_4"]["factor"])
        plan.over(point["trial_id"], outcome(point, multipliers))
    assert factors == [0.9, 0.8, 0.7]


def test_a_failed_neighbour_is_passed_over_for_the_one_before_it():
    plan = plan_of(config())
    first = plan.next()
    plan.over(first["trial_id"], outcome(first))
    second = plan.next()
    plan.over(second["trial_id"], None)
    assert plan.next()["start"]["trial"] == first["trial_id"]


def test_without_any_neighbour_a_point_starts_cold():
    plan = plan_of(config())
    plan.over(plan.next()["trial_id"], None)
    assert plan.next()["start"] is None


@pytest.mark.parametrize(
    "changes",
    [
        {"status": "failed"},
        {"status": "diverged"},
        {"status": "stopped"},
        {"certificate": {"verdict": "infeasible"}},
        {"constraints": []},
    ],
)
def test_only_a_completed_point_that_may_hold_is_started_from(changes):
    point = points_of(config())[1]
    assert outcome_of(result_of(point)).multipliers == {"digit_4": 0.1, "digit_5": 0.1}
    assert outcome_of(result_of(point, **changes)) is None and outcome_of(None) is None


def test_a_start_goes_by_what_training_measured_not_by_the_evaluation_and_its_labeller():
    point = points_of(config())[1]
    measured = dict(zip(NAMES, (1.8, 1.9), strict=True))
    assert outcome_of(result_of(point, averaged_metrics=measured)).metrics == measured
    assert outcome_of(result_of(point)).metrics == dict.fromkeys(NAMES, 2.0)  # of a sweep begun before it was kept


def test_thresholds_out_of_reach_are_told_apart_from_a_failure():
    found = outcome_of({"label": "a", "status": "stopped", "stopped_by": "infeasible", "constraints": []})
    assert found == Outcome.beyond("a") == Outcome.from_json(found.to_json()) and found.out_of_reach


def test_an_outcome_survives_its_way_through_tune():
    given = outcome(points_of(config())[1], (0.1, 1 / 3))
    assert Outcome.from_json(given.to_json()) == given


def searcher(spec, *, results=None, assignments=None, halt=None, base=False):
    listed = points_of(spec)
    todo = [point for point in listed if point["trial_id"] not in (results or {})]
    pretraining = [{"trial_id": "pretrained", "label": "pretrained model", "kind": "base", "thresholds": {}}]
    todo = pretraining + todo if base else todo
    return build_frontier(spec, listed, todo, SHARED, results or {}, assignments or {}, halt or Halt())


def test_pretraining_comes_first_and_baselines_fill_slots_that_wait():
    search, count = searcher(config(baselines={"fixed_weights": [0.3]}), base=True)
    assert count == 7
    given = [search.suggest(f"trial-{k}")["point"]["kind"] for k in range(4)]
    assert given == ["base", "constrained", "unconstrained", "fixed_weights"]
    assert search.suggest("trial-4") is None  # the next one of the chain waits, and so does the slot
    search.on_trial_complete("trial-2", {"outcome": None})
    assert search.suggest("trial-4") is None
    search.on_trial_complete("trial-1", {"outcome": outcome(points_of(config())[2]).to_json()})
    entry = search.suggest("trial-4")
    assert entry["point"]["start"]["label"] == label(0.05) and entry["folder"] == "somewhere"


def test_the_search_ends_when_every_point_was_handed_out():
    search, count = searcher(config(baselines={"unconstrained": False}))
    for k in range(count):
        assert isinstance(search.suggest(f"trial-{k}"), dict)
        search.on_trial_complete(f"trial-{k}", None, error=True)
    assert search.suggest("one-more") == Searcher.FINISHED


def test_an_interrupt_ends_it_also_through_tunes_copies():
    halt = Halt()
    search, _ = searcher(config(), halt=halt)
    copied = copy.deepcopy(search)
    assert isinstance(search.suggest("first"), dict)
    halt.requested = True
    assert search.suggest("second") == copied.suggest("second") == Searcher.FINISHED


def test_a_resumed_sweep_goes_on_with_the_starts_it_had():
    """The middle of a chain: one point is finished, the next had begun, and the others wait for it."""
    spec = config(baselines={"unconstrained": False})
    listed = {point["label"]: point for point in points_of(spec)}
    finished, begun = listed[label(0.05)], listed[label(0.1)]
    start = {"trial": finished["trial_id"], "label": label(0.05), "multipliers": {"digit_4": 0.125, "digit_5": 0.25}}
    search, count = searcher(
        spec,
        results={finished["trial_id"]: result_of(finished)},
        assignments={finished["trial_id"]: {"start": None}, begun["trial_id"]: {"start": start}},
    )
    assert count == 3
    point = search.suggest("first")["point"]
    assert (point["trial_id"], point["start"]) == (begun["trial_id"], start)
    assert search.suggest("second") is None
    search.on_trial_complete("first", {"outcome": outcome(begun).to_json()})
    assert search.suggest("second")["point"]["start"]["trial"] == begun["trial_id"]


def test_a_cold_start_that_was_recorded_stays_one():
    spec = config(baselines={"unconstrained": False})
    head = next(point for point in points_of(spec) if point["label"] == label(0.1))
    search, _ = searcher(spec, assignments={head["trial_id"]: {"trial_id": head["trial_id"]}})
    labels = {search.suggest("a")["point"]["label"], search.suggest("b")["point"]["label"]}
    assert labels == {label(0.05), label(0.1)}


def test_the_number_of_chains_stays_open_without_a_path():
    assert with_chains(adaptive(), 3).sweep.chains == "auto"


def test_the_number_of_chains_is_fixed_when_the_sweep_starts():
    assert with_chains(config(chains="auto"), 3).sweep.chains == 3
    assert with_chains(config(chains=2), 3).sweep.chains == 2


@pytest.mark.parametrize(
    "thresholds, said",
    [
        ({"unit": "share", "grid": {"minority": [0.1]}}, "1 grid point has no neighbour"),
        (
            {"unit": "share", "search": {"points": 2, "axes": {"minority": {"uniform": [0.1, 0.2]}}}},
            "take order adaptive",
        ),
        ({"unit": "loss", "grid": {"minority": [0.1, {"factor": 0.9}]}}, "mix numbers with factors"),
    ],
)
def test_points_without_a_path_are_refused(thresholds, said):
    spec = config(thresholds=thresholds)
    with pytest.raises(ConfigError, match=said) as refused:
        check_path(spec, points_of(spec))
    assert "sweep.order='path'" in str(refused.value)


@pytest.mark.parametrize(
    "section, said",
    [
        ({"sweep": {"order": "path", "points": 5}}, "sweep.points=5 with order=path"),
        ({"sweep": {"order": "adaptive"}}, "give how many points"),
        ({"sweep": {"order": "path", "chains": 0}}, "sweep.chains"),
        ({"sweep": {"order": "walk"}}, "sweep.order"),
        ({"sweep": {"order": "path", "warm_lr": 1.5}}, "sweep.warm_lr"),
        ({"sweep": {"order": "path", "warm_steps": 5}}, "sweep.warm_steps=5 without warm_lr"),
        ({"stopping": {"window": 2}}, "stopping.window"),
        ({"stopping": {"window": 20, "patience": 20}}, "stopping.patience=20 must be larger than window=20"),
        ({"stopping": {"tolerance": 0}}, "stopping.tolerance"),
        ({"evaluation": {"tolerance": 0}}, "give stopping.tolerance > 0"),
        (
            {"evaluation": {"tolerance": 0}, "sweep": {"order": "listed"}, "stopping": {"infeasible": True}},
            "give stopping.tolerance > 0",
        ),
    ],
)
def test_bad_settings_are_refused_by_their_path(section, said):
    with pytest.raises(ConfigError) as refused:
        config(**section)
    assert said in str(refused.value)


@pytest.mark.parametrize(
    "section", [{"sweep": {"order": "listed"}}, {"stopping": {"certificate": False}}, {"stopping": {"tolerance": 0.1}}]
)
def test_a_tolerance_of_zero_is_fine_where_no_trial_ends_by_it(section):
    config(evaluation={"tolerance": 0}, **section)


SHORT = {"primal": {"steps": 300}, "dual": {"rule": "ascent", "step_size": 0.1, "primal_steps_per_dual_step": 10}}


@pytest.mark.parametrize(
    "section, said",
    [
        ({"sweep": {"order": "listed", "chains": 2}}, "sweep.chains=2 with order=listed"),
        ({"sweep": {"order": "listed", "warm_lr": 0.5}}, "sweep.warm_lr=0.5 with order=listed"),
        ({**SHORT, "stopping": {"window": 30, "patience": 32}}, "stopping.window=30: a trial has 30 dual steps"),
        ({**SHORT, "stopping": {"patience": 31}}, "stopping.patience=31: a trial has 30 dual steps"),
        ({**SHORT, "sweep": {"order": "listed"}, "stopping": {"infeasible": True}}, "stopping.patience=40"),
    ],
)
def test_settings_without_an_effect_are_refused(section, said):
    with pytest.raises(ConfigError, match=said):
        check_order(config(**section))


@pytest.mark.parametrize(
    "section",
    [
        {**SHORT, "stopping": {"window": 29, "infeasible": False}},
        {**SHORT, "stopping": {"patience": 30}},
        {**SHORT, "sweep": {"order": "listed"}},
        {"primal": {"steps": 800}, "sweep": {"order": "path", "chains": 2, "warm_lr": 0.5}},
    ],
)
def test_settings_with_an_effect_are_not(section):
    check_order(config(**section))


@pytest.mark.parametrize("order", ["path", "adaptive"])
@pytest.mark.parametrize(
    "section, said",
    [
        ({"dual": {"rule": "fixed", "start": 0.3}}, "dual.rule='fixed' with sweep.order"),
        ({"scheduler": {"kind": "asha"}}, "scheduler.metric='lagrangian' with sweep.order"),
        ({"scheduler": {"kind": "median", "metric": "kkt_residual"}}, "give at least stopping.window=10"),
    ],
)
def test_what_does_not_go_with_neighbours_is_refused(order, section, said):
    spec = config(**section) if order == "path" else adaptive(**section)
    with pytest.raises(ConfigError, match=said):
        check_path(spec, points_of(spec)) if order == "path" else check_adaptive(spec, NAMES)


def test_a_scheduler_beside_a_search_has_a_metric_of_its_own():
    scheduler = {"kind": "asha", "metric": "worst_violation", "grace_dual_steps": 12}
    made = trial_scheduler(adaptive(scheduler=scheduler), 50)
    assert (made._inner.metric, made._inner._mode) == ("worst_violation", "min")
    assert made.set_search_properties(None, None)  # what Tune gives it


def test_the_milestone_of_the_last_dual_step_waits_for_the_end(tmp_path):
    """A scheduler that stopped a trial while it is evaluated would leave its neighbours nothing to start from."""
    constraint = Constraint(name="a", unit="loss", threshold=0.5)
    problem = Problem(method="fairness", objective="loss", constraints=(constraint,)).to_dict()
    numbers = dict.fromkeys(("lr", "grad_norm", "objective", "objective_stderr", "lagrangian"), 1.0)
    lists = {"metrics": [1.0], "metric_stderrs": [0.1], "counts": [8]}

    async def tell():
        server, told = DualServer(str(tmp_path), ""), []
        await server.begin("t", 1, problem, {"rule": "ascent", "step_size": 0.1}, [0.0], None)
        for step in (1, 2):
            await server.report("t", 1, step, {**numbers, **lists, "primal_step": step, "workers": 1, "wall_time": 0.0})
        told.append(await server.progress("t", 0, 1, 5.0, 2))
        last = asyncio.create_task(server.progress("t", 1, 1, 5.0, 2))
        await asyncio.sleep(0)  # it looks before the end
        await server.end("t", 1, "completed", {"made": True}, None)
        told.append(await last)
        await server.close()
        return [(answer["status"], answer["reached"], answer["result"]) for answer in told]

    assert asyncio.run(tell()) == [("running", 1, None), ("completed", 2, {"made": True})]


def test_a_resume_opens_adaptive_points_again_that_did_not_finish():
    kinds = {"unconstrained": "unconstrained", "done": "constrained", "failed": "constrained"}
    assignments = {trial_id: {"kind": kind} for trial_id, kind in kinds.items()}
    assert placed_again(adaptive(), assignments, {"done": {}}) == ["failed"]
    assert placed_again(config(), assignments, {"done": {}}) == []  # listed: they are among the points to do


def test_a_resume_takes_a_stopped_trial_for_ended_only_where_something_could_have_ended_it():
    told, by_rule = {"status": "stopped", "result": {"stopped_by": "scheduler"}}, {"stopped_by": "infeasible"}
    unheard, found = {"status": "stopped", "result": None}, {"status": "stopped", "result": by_rule}
    asha = {"scheduler": {"kind": "asha"}}
    assert [kept(config(), seen) for seen in (told, unheard, found)] == [False, False, True]
    assert [kept(config(**asha), seen) for seen in (told, unheard, found)] == [True, True, True]
    ends = {"completed": True, "diverged": True, "failed": False, "interrupted": False, "running": False}
    assert {status: kept(config(), {"status": status, "result": None}) for status in ends} == ends


# -- adaptive ------------------------------------------------------------------------------------------------------

PRIOR = np.array([0.02, 0.02])
RANGE = {"unit": "share", "search": {"axes": {"minority": {"uniform": [0.03, 0.4]}}}}


def adaptive(points=9, thresholds=None, **changes):
    thresholds = thresholds or RANGE
    return config(thresholds=thresholds, sweep={"order": "adaptive", "points": points}, **changes)


def solve(point) -> Outcome:
    """The exact answer of a point."""
    place = -np.log([point["thresholds"][name] for name in NAMES])
    multipliers = class_restriction_multipliers(place, PRIOR)
    metrics = -np.log(class_restriction_shares(multipliers, PRIOR))
    triple = (dict(zip(NAMES, values.tolist(), strict=True)) for values in (multipliers, metrics, place))
    return Outcome(point["label"], *triple)


def cost(share: float) -> float:
    return class_restriction_objective(class_restriction_multipliers(-np.log([share] * 2), PRIOR), PRIOR)


def gaps(shares) -> np.ndarray:
    """Lengths along the exact front between neighbours, both axes over their range."""
    shares = np.sort(shares)
    fine = np.linspace(0.03, 0.4, 4001)
    costs = np.array([cost(share) for share in fine])
    length = np.concatenate([[0], np.cumsum(np.hypot(np.diff(fine) / 0.37, np.diff(costs) / np.ptp(costs)))])
    return np.diff(np.interp(shares, fine, length))


def asked(point) -> float:
    return point["thresholds"]["digit_4"]


def test_adaptive_points_divide_the_front_evenly_whatever_its_bends():
    plan, shares = AdaptivePlan(adaptive(), NAMES), []
    while not plan.done:
        point = plan.next()
        shares.append(asked(point))
        plan.over(point["trial_id"], solve(point))
    assert len(shares) == 9 and shares[:2] == [0.03, 0.4]
    assert gaps(shares).max() / gaps(shares).min() < 1.5
    evenly_asked = np.linspace(0.03, 0.4, 9)
    assert gaps(evenly_asked).max() / gaps(evenly_asked).min() > 1.5  # what it is better than
    assert gaps(shares).max() < gaps(evenly_asked).max()


def test_adaptive_points_start_from_the_nearest_solved_one():
    plan, solved = AdaptivePlan(adaptive(), NAMES), {}
    while not plan.done:
        point = plan.next()
        if solved:
            nearest = min(solved, key=lambda share: abs(np.log(share / asked(point))))
            assert point["start"]["trial"] == solved[nearest]
            exact = class_restriction_multipliers(-np.log([asked(point)] * 2), PRIOR)
            assert list(point["start"]["multipliers"].values()) == pytest.approx(exact.tolist(), rel=0.02)
        else:
            assert point["start"] is None
        solved[asked(point)] = point["trial_id"]
        plan.over(point["trial_id"], solve(point))


def test_running_points_are_counted_so_that_no_two_slots_get_the_same():
    plan = AdaptivePlan(adaptive(), NAMES)
    first = plan.next()
    assert plan.next() is None  # nothing is known of the front yet
    plan.over(first["trial_id"], solve(first))
    points = [plan.next() for _ in range(8)]
    assert plan.done and plan.next() is None
    shares = sorted(map(asked, [first, *points]))
    assert len(set(shares)) == 9 and max(np.diff(shares)) < 0.15


def test_points_out_of_reach_do_not_end_an_adaptive_front():
    plan, shares = AdaptivePlan(adaptive(), NAMES), []
    while not plan.done:
        point = plan.next()
        shares.append(asked(point))
        plan.over(point["trial_id"], solve(point) if asked(point) < 0.2 else None)
        if point["start"]:
            assert point["start"]["label"] in {label(share) for share in shares if share < 0.2}
    assert len(set(shares)) == 9

    plan = AdaptivePlan(adaptive(points=4), NAMES)
    for _ in range(4):
        plan.over(plan.next()["trial_id"], None)
    assert plan.done


def test_nothing_stricter_is_asked_for_than_what_is_out_of_reach():
    plan, shares, limit = AdaptivePlan(adaptive(), NAMES), [], 0.217
    while not plan.done:
        shares.append(asked(point := plan.next()))
        plan.over(point["trial_id"], solve(point) if asked(point) < limit else Outcome.beyond(point["label"]))
    beyond = [share for share in shares if share >= limit]
    assert len(set(shares)) == 9 and beyond == sorted(beyond, reverse=True) and beyond[0] == 0.4
    assert max(np.diff(sorted(shares)[: -len(beyond) + 1])) < 0.06  # the end is found, and the rest goes before it

    plan = AdaptivePlan(adaptive(), NAMES)
    plan.over((mildest := plan.next())["trial_id"], Outcome.beyond(mildest["label"]))
    assert plan.done and plan.next() is None


def test_a_stricter_point_that_is_solved_after_all_takes_the_end_back():
    plan = AdaptivePlan(adaptive(), NAMES)
    first = plan.next()
    plan.over(first["trial_id"], solve(first))
    strict, middle = plan.next(), plan.next()
    plan.over(middle["trial_id"], Outcome.beyond(middle["label"]))
    assert asked(plan.next()) < asked(middle)
    plan.over(strict["trial_id"], solve(strict))
    plan.next()
    assert plan._end == 1.0


def test_a_relaxed_point_is_started_from_where_it_was_relaxed_to():
    """A resilient rule holds its thresholds plus relaxations: judged and aimed at so."""
    first = points_of(config())[1]
    intervals = {name: [0.4, 0.6] for name in NAMES}
    certificate = {"verdict": "infeasible", "tolerance": 0.1, "intervals": intervals}
    broken = result_of(first, certificate=certificate, relaxations=dict.fromkeys(NAMES, 0.2))
    assert outcome_of(broken) is None and outcome_of({**broken, "relaxations": dict.fromkeys(NAMES, 0.0)}) is None
    assert outcome_of({**broken, "relaxations": dict.fromkeys(NAMES, 0.5)}).relaxations == dict.fromkeys(NAMES, 0.5)

    starts, relaxed = Starts(config()), dict.fromkeys(NAMES, 0.5)
    strict, mild = ({**first, "thresholds": dict.fromkeys(NAMES, share)} for share in (0.2, 0.1))
    multipliers = class_restriction_multipliers(-np.log([0.1] * 2) + 0.5, PRIOR)
    metrics = -np.log(class_restriction_shares(multipliers, PRIOR))
    told = (dict(zip(NAMES, values.tolist(), strict=True)) for values in (multipliers, metrics, -np.log([0.1] * 2)))
    found = starts.start(strict, [(mild, Outcome("mild", *told, relaxed))])["multipliers"]
    wanted = class_restriction_multipliers(-np.log([0.2] * 2) + 0.5, PRIOR)
    assert list(found.values()) == pytest.approx(wanted.tolist(), rel=1e-6)


def test_a_resumed_adaptive_front_keeps_its_points_and_their_starts():
    calm, given = AdaptivePlan(adaptive(), NAMES), []
    for _ in range(9):
        given.append(calm.next())
        calm.over(given[-1]["trial_id"], solve(given[-1]))
    earlier = {point["trial_id"]: {**point, "attempt": 1} for point in given[:4]}
    base = {
        "pretrained": {"trial_id": "pretrained", "kind": "base", "label": "b", "thresholds": {}, "fixed_weight": None}
    }
    resumed = AdaptivePlan(adaptive(), NAMES, {**base, **earlier})
    for point in given[:3]:
        resumed.over(point["trial_id"], solve(point))
    assert resumed.left == 6
    for point in given[3:]:
        assert resumed.next() == point
        resumed.over(point["trial_id"], solve(point))
    assert resumed.done


def test_factors_have_slopes_in_the_unit_of_the_loss():
    thresholds = {"unit": "loss", "search": {"axes": {"minority": {"factor": {"loguniform": [0.5, 0.9]}}}}}
    plan = AdaptivePlan(adaptive(points=3, thresholds=thresholds), NAMES)
    shares = []
    for _ in range(3):
        point = plan.next()
        factor = asked(point)["factor"]
        shares.append(factor)
        told = dict.fromkeys(NAMES, 1 / factor), dict.fromkeys(NAMES, 0.2 * factor), dict.fromkeys(NAMES, 0.2 * factor)
        plan.over(point["trial_id"], Outcome(point["label"], *told))
    # Slope 1 / factor in the threshold makes the front a line over the logarithm of the factor.
    assert shares == pytest.approx([0.9, 0.5, (0.9 * 0.5) ** 0.5], rel=1e-3)


def test_adaptive_points_come_through_tunes_searcher_after_the_baselines_had_their_turn():
    spec = adaptive(points=3)
    listed, shared = points_of(spec), {**SHARED, "constraint_names": list(NAMES)}
    search, count = build_frontier(spec, listed, listed, shared, {}, {}, Halt())
    assert count == 4
    first = search.suggest("a")["point"]
    assert search.suggest("b")["point"]["kind"] == "unconstrained" and search.suggest("c") is None
    search.on_trial_complete("a", {"outcome": solve(first).to_json()})
    assert asked(search.suggest("c")["point"]) == 0.4
    assert isinstance(search.suggest("d"), dict) and search.suggest("e") == Searcher.FINISHED


@pytest.mark.parametrize(
    "thresholds, said",
    [
        ({"unit": "share", "grid": {"minority": [0.1, 0.2]}}, "in place of grid"),
        ({"unit": "share", "search": {**RANGE["search"], "points": 4}}, "thresholds.search.points: order adaptive"),
        (
            {"unit": "share", "search": {"axes": {name: {"uniform": [0.1, 0.2]} for name in NAMES}}},
            "one set, or 'minority' for all",
        ),
        ({"unit": "share", "search": {"axes": {"minority": {"choice": [0.1, 0.2]}}}}, "uniform or loguniform"),
    ],
)
def test_an_adaptive_front_without_one_axis_is_refused(thresholds, said):
    with pytest.raises(ConfigError, match=said):
        check_adaptive(adaptive(thresholds=thresholds), NAMES)
