"""What Tune is handed: the listed points in order, then a search's thresholds, and nothing after an interrupt."""

import copy

import pytest
from ray.tune.search import Searcher

from dualsweep.orchestration.config import ConfigError, SweepConfig, expand_grid, point_for_search, sweep_points
from dualsweep.orchestration.interrupts import Halt
from dualsweep.orchestration.points import build_search, search_settings
from dualsweep.orchestration.trial import trial_dir

NAMES = ("digit_4", "digit_5")
SHARED = {"folder": "somewhere", "constraint_names": list(NAMES)}


def config(search=None, unit="share", **changes):
    thresholds = {"unit": unit, **({"search": search} if search else {"grid": {"minority": [0.05, 0.1, 0.2]}})}
    return SweepConfig.from_dict(
        {
            "name": "small",
            "data": {"dataset": "digits", "minority": {"classes": [4, 5], "keep": 0.1}},
            "thresholds": thresholds,
            "baselines": {"fixed_weights": [0.3]},
            **changes,
        }
    )


def uniform(low=0.05, high=0.3, **more):
    return {"points": 5, "axes": {"minority": {"uniform": [low, high]}}, **more}


def searched(search, *, finished=(), unit="share", count=100):
    """Every threshold a search hands out after the listed points, each reported as finished."""
    spec = config(search, unit)
    points = sweep_points(spec, NAMES)
    searcher, _ = build_search(spec, points, SHARED, list(finished), Halt())
    found = []
    for number in range(count):
        given = searcher.suggest(f"trial-{number}")
        if given == Searcher.FINISHED:
            return found
        if "thresholds" in given:
            found.append(given["thresholds"])
        searcher.on_trial_complete(f"trial-{number}", {"kkt_residual": float(number), "training_iteration": 1})
    raise AssertionError("the search has no end")


def test_listed_points_come_in_their_order_and_then_no_more():
    spec = config()
    points = sweep_points(spec, NAMES)
    searcher, total = build_search(spec, points, SHARED, [], Halt())
    assert total == len(points) == 5
    given = [searcher.suggest(f"trial-{k}") for k in range(total)]
    assert [entry["point"] for entry in given] == points
    assert all(entry["folder"] == "somewhere" for entry in given)
    assert searcher.suggest("one-more") == Searcher.FINISHED


def test_results_of_listed_points_do_not_reach_the_search():
    """Optuna would stumble over trials it never proposed."""
    spec = config(uniform())
    searcher, _ = build_search(spec, sweep_points(spec, NAMES), SHARED, [], Halt())
    searcher.suggest("listed")
    searcher.on_trial_result("listed", {"kkt_residual": 1.0, "training_iteration": 1})
    searcher.on_trial_complete("listed", {"kkt_residual": 1.0, "training_iteration": 1})
    searcher.on_trial_complete("never heard of", None, error=True)


@pytest.mark.parametrize("algorithm", ["optuna", "random"])
def test_after_the_list_come_as_many_thresholds_as_asked_all_within_their_range(algorithm):
    spec = config(uniform(points=12, algorithm=algorithm))
    listed = sweep_points(spec, NAMES)
    assert [point["kind"] for point in listed] == ["unconstrained", "fixed_weights"]
    assert build_search(spec, listed, SHARED, [], Halt())[1] == 14
    found = searched(uniform(points=12, algorithm=algorithm))
    assert len(found) == 12
    assert all(0.05 <= entry["minority"] <= 0.3 for entry in found)
    assert len({entry["minority"] for entry in found}) == 12


@pytest.mark.parametrize(
    "axis, low, high",
    [
        ({"loguniform": [0.01, 0.3]}, 0.01, 0.3),
        ({"quniform": [0.05, 0.4, 0.01]}, 0.05, 0.4),
        ({"qloguniform": [0.05, 0.4, 0.01]}, 0.05, 0.4),
    ],
)
def test_every_kind_of_range_stays_in_its_range(axis, low, high):
    found = searched({"points": 10, "axes": {"minority": axis}})
    assert len(found) == 10 and all(low <= entry["minority"] <= high + 1e-12 for entry in found)
    assert len({entry["minority"] for entry in found}) > 3


def test_axes_may_be_single_constraints_and_factors():
    axes = {"digit_4": {"uniform": [0.1, 0.2]}, "digit_5": {"uniform": [0.3, 0.4]}}
    assert all(0.1 <= e["digit_4"] <= 0.2 and 0.3 <= e["digit_5"] <= 0.4 for e in searched({"points": 3, "axes": axes}))
    found = searched({"points": 3, "axes": {"minority": {"factor": {"uniform": [0.5, 0.9]}}}}, unit="loss")
    spec = config({"points": 3, "axes": {"minority": {"factor": {"uniform": [0.5, 0.9]}}}}, unit="loss")
    for entry in found:
        point = point_for_search(spec, NAMES, entry)
        assert set(point["thresholds"]) == set(NAMES) and 0.5 <= point["thresholds"]["digit_4"]["factor"] <= 0.9


def test_a_search_is_the_same_again_from_its_seed_and_another_from_another():
    assert searched(uniform(seed=3)) == searched(uniform(seed=3)) != searched(uniform(seed=4))


def test_choices_are_handed_out_once_each():
    """The same thresholds twice are one trial: the second would take the first one's place while it runs."""
    found = searched({"points": 3, "axes": {"minority": {"choice": [0.05, 0.1, 0.2]}}})
    assert sorted(entry["minority"] for entry in found) == [0.05, 0.1, 0.2]


def test_a_search_with_more_points_than_choices_ends():
    found = searched({"points": 5, "axes": {"minority": {"choice": [0.05, 0.1]}}})
    assert sorted(entry["minority"] for entry in found) == [0.05, 0.1]


def test_choices_are_a_list_and_nothing_else():
    """What the checks before the start accept must be what the search then proposes."""
    search = {"points": 2, "axes": {"minority": {"choice": {"linspace": [0.1, 0.2, 3]}}}}
    with pytest.raises(ConfigError, match=r"thresholds\.search\.axes\.minority\.choice=.*give a list"):
        expand_grid(config(search), NAMES)


def test_a_search_says_nothing_on_the_terminal(capfd, caplog):
    searched(uniform(points=2))
    assert (capfd.readouterr().err, caplog.records) == ("", [])


@pytest.mark.parametrize("algorithm", ["optuna", "random"])
def test_a_resumed_search_adds_the_missing_points_and_none_it_has(algorithm):
    spec = config(uniform(algorithm=algorithm))
    first = searched(uniform(algorithm=algorithm))[:2]
    results = [{**point_for_search(spec, NAMES, entry), "status": "completed"} for entry in first]
    more = searched(uniform(algorithm=algorithm), finished=results)
    assert len(more) == 3
    ids = {point_for_search(spec, NAMES, entry)["trial_id"] for entry in more}
    assert len(ids) == 3 and not ids & {result["trial_id"] for result in results}


def test_a_finished_search_hands_out_nothing():
    spec = config(uniform(points=2))
    searcher, total = build_search(spec, [], SHARED, [{"trial_id": f"share-{k}"} for k in range(3)], Halt())
    assert total == 0 and searcher.suggest("trial") == Searcher.FINISHED


def test_an_interrupt_ends_the_list_and_the_search_also_through_tunes_copies():
    for spec in (config(), config(uniform())):
        halt = Halt()
        searcher, _ = build_search(spec, sweep_points(spec, NAMES), SHARED, [], halt)
        copied = copy.deepcopy(searcher)
        assert searcher.suggest("first") != Searcher.FINISHED
        halt.requested = True
        assert searcher.suggest("second") == Searcher.FINISHED
        assert copied.suggest("second") == Searcher.FINISHED


def test_an_interrupt_holds_back_searched_points_too():
    spec, halt = config(uniform()), Halt()
    searcher, _ = build_search(spec, [], SHARED, [], halt)
    assert "thresholds" in searcher.suggest("first")
    halt.requested = True
    assert searcher.suggest("second") == Searcher.FINISHED


def test_a_searched_points_id_hangs_on_its_thresholds_alone():
    spec, other = config(uniform()), config(uniform(points=9, seed=5), seed=7)
    point = point_for_search(spec, NAMES, {"minority": 0.125})
    assert point_for_search(other, NAMES[::-1], {"minority": 0.125})["trial_id"] == point["trial_id"]
    assert point["trial_id"] == "share-" + point["trial_id"].removeprefix("share-") and len(point["trial_id"]) == 14
    assert (point["kind"], point["label"], point["fixed_weight"]) == ("constrained", "minority >= 0.125", None)


def test_settings_of_a_search_have_defaults_and_take_the_sweeps_seed():
    settings = search_settings(config({"axes": {"minority": {"uniform": [0.1, 0.2]}}}, seed=11))
    assert {key: settings[key] for key in ("points", "metric", "mode", "algorithm", "seed")} == {
        "points": 8,
        "metric": "kkt_residual",
        "mode": "min",
        "algorithm": "optuna",
        "seed": 11,
    }


@pytest.mark.parametrize(
    "key, value, remedy",
    [
        ("point", 3, "known here: algorithm, axes"),
        ("points", 0, "at least 1"),
        ("points", 2.5, "whole number"),
        ("points", True, "whole number"),
        ("points", "many", "whole number"),
        ("mode", "smallest", "min or max"),
        ("metric", "accuracy", "kkt_residual"),
        ("algorithm", "tpe", "optuna or random"),
        ("seed", -1, "at least 0"),
        ("seed", "today", "whole number"),
    ],
)
def test_a_bad_setting_of_a_search_is_refused_by_its_path(key, value, remedy):
    with pytest.raises(ConfigError) as refused:
        search_settings(config(uniform(**{key: value}) if key != "point" else {"axes": {}, "point": value}))
    said = str(refused.value)
    assert f"thresholds.search.{key}" in said and remedy in said
    assert key == "point" or repr(value) in said


def test_the_pretraining_writes_in_its_own_sweep_and_not_among_the_trials_a_report_reads(tmp_path):
    trial = {"trial_id": "a", "kind": "constrained"}
    assert trial_dir(tmp_path, trial) == tmp_path / "trials" / "a"
    assert trial_dir(tmp_path, {"trial_id": "pretrained", "kind": "base"}) == tmp_path / "pretrained"
