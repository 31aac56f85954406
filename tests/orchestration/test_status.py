"""What is said of a sweep from its folder alone: trials rebuilt from the journal, every sweep listed, damage named."""

import fcntl
import io
import json
import math
from types import SimpleNamespace

import pytest
import yaml
from rich.console import Console

from dualsweep.constraints import Constraint, Problem
from dualsweep.orchestration.config import ConfigError, SweepConfig, sweep_points
from dualsweep.orchestration.dual_ledger import DualLedger
from dualsweep.orchestration.dual_server import BASE_TRIAL
from dualsweep.orchestration.journal import Journal
from dualsweep.orchestration.live import Progress, trial_table
from dualsweep.orchestration.status import list_sweeps, rewrite_report, status_table, sweep_state, trial_views
from dualsweep.orchestration.units import unit_of
from dualsweep.orchestration.watch import TrialView

NAMES = ("digit_4", "digit_5")
PROBLEM = Problem(
    method="fairness",
    objective="loss",
    constraints=tuple(Constraint(name=n, unit="share", threshold=0.1) for n in NAMES),
).to_dict()


CALIBRATION = {
    "unit": "share",
    "metrics": dict.fromkeys(NAMES, -math.log(0.02)),
    "stderrs": dict.fromkeys(NAMES, 0.1),
    "counts": dict.fromkeys(NAMES, 512),
}


def result(trial_id, status="completed", label=None):
    return {
        "trial_id": trial_id,
        "label": label or trial_id,
        "kind": "constrained",
        "status": status,
        "certificate": None,
        "constraints": [],
        "objective": None,
        "calibration": CALIBRATION,
    }


class Folder:
    """A sweep's folder and the journal in it, written record by record as the DualServer does."""

    def __init__(self, root, name="small"):
        self.config = SweepConfig.from_dict(
            {
                "name": name,
                "storage": str(root),
                "data": {"dataset": "digits", "minority": {"classes": [4, 5], "keep": 0.1}},
                "primal": {"steps": 200},
                "pretrain": {"steps": 400},
                "dual": {"rule": "ascent", "step_size": 0.1, "primal_steps_per_dual_step": 20},
                "thresholds": {"grid": {"minority": [0.05, 0.1]}},
            }
        )
        self.path = root / name
        self.path.mkdir(parents=True)
        (self.path / "sweep.yaml").write_text(yaml.safe_dump(self.config.to_dict()), encoding="utf-8")
        self.points = sweep_points(self.config, NAMES)
        (self.path / "points.json").write_text(json.dumps(self.points), encoding="utf-8")
        self.journal, self.ledger = Journal(self.path / "journal.jsonl"), DualLedger()

    def write(self, *records):
        for record in records:
            self.ledger.apply(record)
        self.journal.append(records)

    def begin(self, trial_id, attempt=1):
        self.write(
            *self.ledger.begin(
                trial_id,
                attempt,
                problem=PROBLEM,
                rule={"rule": "ascent", "step_size": 0.1},
                start=[0.0, 0.0],
                dual_state=None,
            )
        )

    def step(self, trial_id, count=1, attempt=1):
        for _ in range(count):
            step = self.ledger.book(trial_id).state.step + 1
            measured = {
                "primal_step": 20 * step,
                "workers": 1,
                "wall_time": 1000.0 + 2 * step,
                "lr": 1e-3,
                "grad_norm": 0.5,
                "objective": 0.4,
                "objective_stderr": 0.01,
                "lagrangian": 0.5,
                "metrics": [3.0, 2.0],
                "metric_stderrs": [0.1, 0.1],
                "counts": [10, 10],
            }
            self.write(*self.ledger.report(trial_id, attempt, step, measured))

    def end(self, trial_id, status, *, error=None, label=None):
        self.write(
            {
                "kind": "end",
                "trial": trial_id,
                "status": status,
                "result": None if error else result(trial_id, status, label),
                "error": error,
            }
        )


@pytest.fixture
def folder(tmp_path):
    return Folder(tmp_path)


def views(folder):
    return {view.point["trial_id"]: view for view in trial_views(folder.path.parent, folder.path.name)}


def shown(table):
    console = Console(file=io.StringIO(), width=700)
    console.print(table)
    return console.file.getvalue()


def test_a_sweep_that_has_not_begun_shows_every_point_waiting(folder):
    (folder.path / "journal.jsonl").unlink()
    found = trial_views(folder.path.parent, "small")
    assert [view.point["label"] for view in found] == ["unconstrained", "minority >= 0.05", "minority >= 0.1"]
    assert all((view.status, view.dual_step, view.dual_steps, view.row) == ("waiting", 0, 10, None) for view in found)


def test_trials_are_rebuilt_from_the_journal(folder):
    first, second = (point["trial_id"] for point in folder.points[1:])
    folder.begin(BASE_TRIAL)
    folder.end(BASE_TRIAL, "completed", label="pretrained model")
    folder.begin(first)
    folder.step(first, 10)
    folder.end(first, "completed", label="minority >= 0.05")
    folder.begin(second)
    folder.step(second, 3)
    folder.end(second, "failed", error="Traceback\nRuntimeError: out of memory")
    folder.begin("unconstrained")
    found = views(folder)
    assert list(found) == ["unconstrained", first, second, BASE_TRIAL]
    done = found[first]
    assert (done.status, done.dual_step, done.dual_steps, done.names) == ("completed", 10, 10, list(NAMES))
    assert done.row == folder.ledger.book(first).rows[-1] and done.started == 1002.0
    assert done.result == result(first, label="minority >= 0.05") and done.over
    assert (found[second].status, found[second].dual_step) == ("failed", 3)
    assert found[second].error.endswith("RuntimeError: out of memory") and found[second].result is None
    assert (found[BASE_TRIAL].point["kind"], found[BASE_TRIAL].dual_steps) == ("base", 20)
    assert found[BASE_TRIAL].point["label"] == "pretrained model"


def test_a_trial_that_was_running_counts_as_interrupted_unless_a_driver_holds_the_sweep(folder):
    trial_id = folder.points[1]["trial_id"]
    folder.begin(trial_id)
    folder.step(trial_id, 4)
    assert views(folder)[trial_id].status == "interrupted"
    with open(folder.path / "driver.lock", "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        running = views(folder)[trial_id]
        assert running.status == "running"
        assert running.seconds_left() == pytest.approx(2.0 * 6)  # 2 s a dual step, 6 of 10 to go
        assert "small (running)" in shown(status_table(folder.path.parent, "small"))
    assert views(folder)[trial_id].status == "interrupted"


def test_a_rewound_trial_shows_the_steps_that_count(folder):
    trial_id = folder.points[1]["trial_id"]
    folder.begin(trial_id)
    folder.step(trial_id, 4)
    folder.begin(trial_id, attempt=2)
    folder.step(trial_id, 2, attempt=2)
    assert views(folder)[trial_id].dual_step == 2


def test_a_searched_trial_that_is_not_in_the_list_is_shown_with_its_results_label(folder):
    folder.begin("share-searched")
    folder.end("share-searched", "completed", label="minority >= 0.123")
    view = views(folder)["share-searched"]
    assert (view.point["label"], view.point["kind"], view.dual_steps) == ("minority >= 0.123", "constrained", 10)


def test_a_torn_last_record_is_only_a_report_less(folder):
    trial_id = folder.points[1]["trial_id"]
    folder.begin(trial_id)
    folder.step(trial_id, 4)
    path = folder.path / "journal.jsonl"
    path.write_bytes(path.read_bytes()[:-10])
    before = path.read_bytes()
    assert views(folder)[trial_id].dual_step == 3
    assert path.read_bytes() == before  # looking does not repair: a driver may be writing


@pytest.mark.parametrize(
    "damage, word",
    [
        (lambda path: (path / "points.json").unlink(), "points.json"),
        (lambda path: (path / "points.json").write_text("[", encoding="utf-8"), "Expecting value"),
        (
            lambda path: (path / "journal.jsonl").write_bytes(b"00000000 {}\n" + (path / "journal.jsonl").read_bytes()),
            "byte 0 is corrupted",
        ),
        (lambda path: (path / "sweep.yaml").write_text("name: [", encoding="utf-8"), "not readable as YAML"),
    ],
    ids=["no points", "broken points", "broken journal", "broken config"],
)
def test_damage_is_an_error_that_says_which_file(damage, word, folder):
    folder.begin("unconstrained")
    damage(folder.path)
    with pytest.raises(ConfigError, match=word) as refused:
        trial_views(folder.path.parent, "small")
    assert "small" in str(refused.value)


def test_an_unknown_sweep_is_named(tmp_path):
    with pytest.raises(ConfigError, match="no sweep 'nothing'"):
        trial_views(tmp_path, "nothing")


def test_the_list_shows_every_sweep_and_a_damaged_one_beside_them(tmp_path):
    fine, damaged, other = Folder(tmp_path, "fine"), Folder(tmp_path, "damaged"), Folder(tmp_path, "unreadable")
    fine.begin("unconstrained")
    fine.end("unconstrained", "completed")
    (fine.path / "report").mkdir()
    (fine.path / "report" / "index.html").touch()
    damaged.begin("unconstrained")
    damaged.begin("unconstrained", attempt=2)
    content = bytearray((damaged.path / "journal.jsonl").read_bytes())
    content[30] ^= 1
    (damaged.path / "journal.jsonl").write_bytes(content)
    (other.path / "sweep.yaml").write_text("primal: {steps: '[/bold]'}", encoding="utf-8")
    (tmp_path / "no sweep").mkdir()
    with open(fine.path / "driver.lock", "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        text = shown(list_sweeps(tmp_path))
    lines = {line.split()[1]: line for line in text.splitlines() if line.startswith("│")}
    assert set(lines) >= {"fine", "damaged", "unreadable"} and "no sweep" not in text
    assert "1 of 3" in lines["fine"] and "running" in lines["fine"] and "index.html" in text
    assert "unreadable: sweep 'damaged'" in text and "byte 0 is corrupted" in text
    assert "name: missing" in lines["unreadable"] and "(given: '[/bold]')" in lines["unreadable"]


def test_brackets_of_a_folder_are_shown_as_they_are(tmp_path):
    Folder(tmp_path / "runs [v2]", "small")
    assert "runs[v2]" in "".join(shown(list_sweeps(tmp_path / "runs [v2]")).split())  # the title may be wrapped


def test_a_list_of_a_folder_that_is_not_there_is_empty(tmp_path):
    assert "sweep" in shown(list_sweeps(tmp_path / "nowhere"))
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize(
    "statuses, state",
    [
        (["completed", "stopped"], "completed"),
        (["completed", "failed"], "failed"),
        (["diverged"], "failed"),
        (["completed", "waiting"], "interrupted"),
        (["failed", "interrupted"], "interrupted"),
        (["running"], "interrupted"),
    ],
)
def test_a_sweeps_state_follows_from_its_trials(statuses, state):
    views = [TrialView({"trial_id": str(k), "kind": "constrained"}, status=status) for k, status in enumerate(statuses)]
    assert sweep_state(views) == state
    base = {"trial_id": "pretrained", "kind": "base"}  # left behind half trained; another sweep has made it since
    assert sweep_state([TrialView(base, status="running"), *views]) == state


def test_the_table_names_every_trial_and_where_it_stands(folder):
    trial_id = folder.points[2]["trial_id"]
    folder.begin(trial_id)
    folder.step(trial_id, 10)
    folder.end(trial_id, "completed", label="minority >= 0.1")
    text = shown(status_table(folder.path.parent, "small"))
    assert "small (not running)" in text
    for label in ("unconstrained", "minority >= 0.05", "minority >= 0.1", "10/10"):
        assert label in text, text


def test_a_report_needs_a_result(folder):
    with pytest.raises(ConfigError, match="no finished trial yet"):
        rewrite_report(folder.path.parent, "small", track=False)
    assert not (folder.path / "report").exists()


def test_what_the_pretrained_model_measures_stands_below_the_table(folder):
    assert "pretrained model:" not in shown(status_table(folder.path.parent, "small"))
    folder.begin("unconstrained")
    folder.end("unconstrained", "completed")
    text = " ".join(shown(status_table(folder.path.parent, "small")).split())
    assert "pretrained model: share of digit_4 2.00 ± 0.39 %, share of digit_5 2.00 ± 0.39 % (95 %)" in text


@pytest.mark.parametrize("terminal", [False, True])
def test_the_driver_says_once_what_the_pretrained_model_measures(terminal):
    view = TrialView({"trial_id": "a", "label": "a"}, status="running")
    watcher = SimpleNamespace(views={"a": view}, began=0.0, slots=1, calibration=None, unit=unit_of("share"))
    console = Console(file=io.StringIO(), width=200, force_terminal=terminal)
    with Progress(watcher, console, title="small"):
        watcher.after_look()
        assert "pretrained" not in console.file.getvalue()
        watcher.calibration = CALIBRATION
        watcher.after_look()
        watcher.after_look()
    assert console.file.getvalue().count("pretrained model: share of digit_4 2.00 ± 0.39 %") == 1


def view_with(violations, multipliers, *, min_max):
    row = {"smoothed_violations": violations, "multipliers": multipliers, "objective": 0.1, "wall_time": 1.0}
    point = {"trial_id": "a", "label": "a"}
    return TrialView(point, status="running", dual_step=3, dual_steps=10, row=row, min_max=min_max)


def test_in_a_min_max_problem_the_worst_violation_counts_from_the_level():
    assert view_with([1.5, 1.0], [0.6, 0.4], min_max=False).worst == 1.5
    assert view_with([1.5, 1.0], [0.6, 0.4], min_max=True).worst == pytest.approx(1.5 - (0.9 + 0.4))
    assert view_with([], [], min_max=True).worst is None
    assert "+0.200" in shown(trial_table([view_with([1.5, 1.0], [0.6, 0.4], min_max=True)], title=""))
    assert "not yet" in shown(trial_table([view_with([1.5, 1.0], [0.6, 0.4], min_max=False)], title=""))


def test_a_composition_is_shown_as_a_min_max_problem(tmp_path):
    folder = Folder(tmp_path)
    assert not any(view.min_max for view in views(folder).values())
    stored = {**folder.config.to_dict(), "method": "composition"}
    (folder.path / "sweep.yaml").write_text(yaml.safe_dump(stored), encoding="utf-8")
    assert all(view.min_max for view in views(folder).values())


def test_a_trial_that_had_nothing_to_train_shows_no_steps():
    view = TrialView({"trial_id": "a", "label": "a"}, status="completed", dual_step=0, dual_steps=10)
    assert " none " in shown(trial_table([view], title="")) and "0/10" not in shown(trial_table([view], title=""))
