"""The books of the dual side: fenced, repeatable, refusing what is not a number, and the same again from the journal."""

import json
import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dualsweep.constraints import Constraint, Problem
from dualsweep.orchestration.dual_ledger import DualLedger, ProtocolError, StaleAttemptError
from dualsweep.orchestration.journal import Journal, read_journal
from dualsweep.orchestration.local_dual import LocalDual
from dualsweep.orchestration.trace import read_trace, write_trace

NAMES = ("digit_4", "digit_7")
PROBLEM = Problem(
    method="fairness",
    objective="loss",
    constraints=tuple(Constraint(name=name, unit="loss", threshold=0.1 * (k + 1)) for k, name in enumerate(NAMES)),
).to_dict()
RULES = {
    "ascent": {"rule": "ascent", "step_size": 0.3, "smoothing": 0.5, "warmup_steps": 2},
    "resilient": {"rule": "resilient", "step_size": 0.3, "relaxation_cost": 0.5},
    "nupi": {"rule": "nupi", "step_size": 0.2, "proportional_gain": 0.1, "nu": 0.3},
}


def measured(dual_step, multipliers=(0.0, 0.0), *, trial=0, **changes):
    """A measurement that answers to the multipliers, different at every step and trial."""
    noise = np.random.default_rng([trial, dual_step]).normal(size=2)
    metrics = 0.4 - 0.2 * np.asarray(multipliers) + 0.05 * noise
    return {
        "primal_step": 20 * dual_step,
        "workers": 1,
        "wall_time": 1.7e9 + dual_step,
        "lr": 1e-3 / dual_step,
        "grad_norm": abs(float(noise[0])),
        "objective": 0.5 + 0.01 * float(noise[1]),
        "objective_stderr": 0.01,
        "lagrangian": 0.6,
        "metrics": metrics.tolist(),
        "metric_stderrs": [0.02, 0.03],
        "counts": [32, 32],
        **changes,
    }


def begun(rule="ascent", trial="a", attempt=1, dual_state=None, ledger=None):
    ledger = ledger or DualLedger()
    return ledger, perform(
        ledger, ledger.begin(trial, attempt, problem=PROBLEM, rule=RULES[rule], start=[0.0, 0.1], dual_state=dual_state)
    )


def perform(ledger, records):
    for record in records:
        ledger.apply(record)
    return records


def advance(ledger, steps, trial="a", attempt=1):
    records = []
    for _ in range(steps):
        book = ledger.book(trial)
        step = book.state.step + 1
        records += perform(ledger, ledger.report(trial, attempt, step, measured(step, book.state.multipliers)))
    return records


def books(ledger):
    """Everything a ledger holds, as text that tells any two numbers apart."""
    return repr(
        {
            trial_id: {
                **{key: value for key, value in vars(book).items() if key not in ("problem", "state")},
                "problem": book.problem and book.problem.to_dict(),
                "state": book.state and book.state.to_dict(),
            }
            for trial_id, book in ledger.trials.items()
        }
    )


@pytest.mark.parametrize("rule", RULES)
def test_replaying_the_journal_gives_the_same_ledger_to_the_bit(rule, tmp_path):
    ledger, records = begun(rule)
    records += advance(ledger, 5)
    checkpoint = ledger.book("a").state.to_dict()
    records += perform(ledger, [{"kind": "checkpoint", "trial": "a", "dual_step": 5}]) + advance(ledger, 3)
    records += begun(rule, attempt=2, dual_state=checkpoint, ledger=ledger)[1] + advance(ledger, 2, attempt=2)
    records += perform(ledger, [{"kind": "leased", "trial": "b"}, {"kind": "leased", "trial": "d"}])
    records += begun(rule, trial="b", ledger=ledger)[1] + advance(ledger, 1, trial="b")
    records += begun(rule, trial="c", ledger=ledger)[1]
    records += perform(ledger, [{"kind": "directive", "trial": "b", "directive": "stop"}])
    records += perform(
        ledger, [{"kind": "end", "trial": "a", "status": "completed", "result": {"x": 0.1 + 0.2}, "error": None}]
    )
    records += perform(
        ledger,
        [
            {"kind": "end", "trial": "b", "status": "failed", "result": None, "error": "no"},
            {"kind": "reopen", "trial": "b"},
        ],
    )
    journal = Journal(tmp_path / "journal.jsonl")
    journal.append(records)
    journal.close()
    again = DualLedger()
    perform(again, read_journal(tmp_path / "journal.jsonl"))
    assert books(again) == books(ledger)
    assert (ledger.book("a").state.multipliers > 0).all()
    # and goes on alike
    assert [again.book(trial).leases for trial in "bd"] == [0, 1]
    assert advance(again, 2, trial="c") == advance(ledger, 2, trial="c")


def test_every_row_is_a_whole_row_of_the_trace(tmp_path):
    ledger, _ = begun()
    advance(ledger, 4)
    rows = ledger.book("a").rows
    write_trace(rows, tmp_path / "trace.parquet", constraints=NAMES, trial_id="a")
    assert read_trace(tmp_path / "trace.parquet") == rows
    last = rows[-1]
    assert last["dual_step"] == 4 and last["multipliers"] == ledger.book("a").state.multipliers.tolist()
    np.testing.assert_allclose(last["violations"], np.subtract(last["metrics"], [0.1, 0.2]), rtol=1e-15)
    assert last["stationarity"] == last["grad_norm"] and last["kkt_residual"] >= last["infeasibility"]


def test_a_trial_that_is_put_away_keeps_every_row_and_may_go_on():
    (ledger, _), (calm, _) = begun(), begun()
    advance(ledger, 4)
    advance(calm, 4)
    book = ledger.book("a")
    for _ in range(2):
        book.put_away()
    assert book._rows == [] and book.rows == calm.book("a").rows
    book.put_away()
    assert advance(ledger, 2) == advance(calm, 2)
    assert book.rows == calm.book("a").rows and len(book.rows) == 6


def test_multipliers_rise_where_violated_and_fall_to_zero_where_satisfied():
    ledger, _ = begun()
    for step in range(1, 8):
        perform(ledger, ledger.report("a", 1, step, measured(step, metrics=[0.4, 0.1])))
    rows = ledger.book("a").rows
    assert all(after["multipliers"][0] > before["multipliers"][0] for before, after in pairwise(rows))
    assert rows[-1]["multipliers"][1] == 0.0 and rows[0]["multipliers"][1] < 0.1


def test_a_repeated_report_changes_nothing_and_gets_the_same_answer():
    ledger, _ = begun()
    advance(ledger, 3)
    before, answer = books(ledger), ledger.reply("a")
    for step in (1, 2, 3):
        assert ledger.report("a", 1, step, measured(step, metrics=[9.0, 9.0])) == []
        assert (books(ledger), ledger.reply("a")) == (before, answer)


def test_a_repeated_begin_of_the_same_attempt_changes_nothing():
    """A call may be delivered twice; the second must not take back what has been reported since."""
    ledger, _ = begun()
    advance(ledger, 3)
    before, answer = books(ledger), ledger.reply("a")
    begun(ledger=ledger)
    assert (books(ledger), ledger.reply("a")) == (before, answer)


def test_an_older_attempt_can_neither_report_nor_begin():
    ledger, _ = begun()
    advance(ledger, 2)
    begun(attempt=2, ledger=ledger)
    advance(ledger, 1, attempt=2)
    before = books(ledger)
    for step in (1, 2, 3):
        with pytest.raises(StaleAttemptError, match="trial a: report of attempt 1, current is 2"):
            ledger.report("a", 1, step, measured(step))
    with pytest.raises(StaleAttemptError, match="trial a: attempt 1 began after attempt 2"):
        begun(attempt=1, ledger=ledger)
    assert books(ledger) == before


@pytest.mark.parametrize("status", ["completed", "stopped", "failed", "diverged", "interrupted"])
def test_a_trial_that_is_over_takes_no_more_steps_and_repeats_the_last_answer(status):
    ledger, _ = begun()
    advance(ledger, 2)
    perform(ledger, [{"kind": "end", "trial": "a", "status": status, "result": None, "error": None}])
    before = books(ledger)
    with pytest.raises(StaleAttemptError, match=f"the trial is {status}"):
        ledger.report("a", 1, 3, measured(3))
    assert ledger.report("a", 1, 2, measured(2)) == []
    assert books(ledger) == before


def test_a_checkpoint_ahead_of_the_journal_is_refused_with_the_remedy():
    ledger, _ = begun()
    advance(ledger, 3)
    ahead, (behind, _) = ledger.book("a").state.to_dict(), begun()
    advance(behind, 2)
    before = books(behind)
    with pytest.raises(
        ProtocolError, match=r"checkpoint is of dual step 3, the journal knows 2 .*remove the checkpoint"
    ):
        begun(attempt=2, dual_state=ahead, ledger=behind)
    assert books(behind) == before


def test_a_skipped_step_and_a_report_before_the_beginning_are_refused():
    ledger, _ = begun()
    advance(ledger, 1)
    before = books(ledger)
    with pytest.raises(ProtocolError, match="trial a: dual step 3 follows 1"):
        ledger.report("a", 1, 3, measured(3))
    assert books(ledger) == before
    with pytest.raises(ProtocolError, match="trial new reported dual step 1 before it began"):
        ledger.report("new", 1, 1, measured(1))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_metric_that_is_no_number_is_refused_by_name_and_nothing_changes(bad):
    ledger, _ = begun()
    advance(ledger, 2)
    before = books(ledger)
    with pytest.raises(ValueError, match="digit_7"):
        ledger.report("a", 1, 3, measured(3, metrics=[0.3, bad]))
    assert books(ledger) == before
    advance(ledger, 1)


@pytest.mark.parametrize(
    "name", ["lr", "grad_norm", "objective", "objective_stderr", "lagrangian", "metric_stderrs", "wall_time"]
)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nothing_else_of_a_report_may_be_no_number_either(name, bad):
    """The journal refuses such a record only after it was applied, and then every trial's reports with it."""
    ledger, _ = begun()
    value = [0.02, bad] if name == "metric_stderrs" else bad
    before = books(ledger)
    with pytest.raises(ValueError, match="stationarity" if name == "grad_norm" else name):
        perform(ledger, ledger.report("a", 1, 1, measured(1, **{name: value})))
    assert books(ledger) == before


def test_a_report_with_too_few_metrics_is_refused():
    ledger, _ = begun()
    with pytest.raises(ValueError, match="metric"):
        ledger.report("a", 1, 1, measured(1, metrics=[0.3]))


def test_beginning_from_a_checkpoint_rewinds_the_rows_and_counts_those_it_replaces():
    ledger, _ = begun()
    advance(ledger, 4)
    kept, checkpoint, answer = list(ledger.book("a").rows), ledger.book("a").state.to_dict(), ledger.reply("a")
    advance(ledger, 3)
    begun(attempt=2, dual_state=json.loads(json.dumps(checkpoint)), ledger=ledger)
    book = ledger.book("a")
    assert (book.rows, book.superseded_rows, book.attempt, book.checkpoint_step) == (kept, 3, 2, 4)
    assert ledger.reply("a") == answer
    advance(ledger, 2, attempt=2)
    begun(attempt=3, ledger=ledger)  # no checkpoint: from the start
    assert (book.rows, book.superseded_rows, book.state.step) == ([], 9, 0)
    assert book.state.multipliers.tolist() == [0.0, 0.1]


def test_an_answer_carries_the_directive_until_the_next_attempt():
    ledger, _ = begun()
    perform(ledger, [{"kind": "directive", "trial": "a", "directive": "interrupt"}])
    advance(ledger, 1)
    assert ledger.reply("a").directive == "interrupt"
    begun(attempt=2, ledger=ledger)
    assert ledger.reply("a").directive == "continue"


def test_an_unknown_record_is_refused():
    with pytest.raises(ValueError, match="unknown kind 'dance'"):
        DualLedger().apply({"kind": "dance", "trial": "a"})


def test_without_constraints_a_trial_still_has_its_trace():
    problem = {**PROBLEM, "constraints": []}
    ledger = DualLedger()
    perform(
        ledger,
        ledger.begin("free", 1, problem=problem, rule={"rule": "ascent", "step_size": 0.1}, start=[], dual_state=None),
    )
    perform(ledger, ledger.report("free", 1, 1, measured(1, metrics=[], metric_stderrs=[])))
    row = ledger.book("free").rows[0]
    assert (row["multipliers"], row["infeasibility"], ledger.reply("free").multipliers) == ([], 0.0, ())


def test_the_local_dual_answers_as_the_ledger_does():
    ledger, _ = begun()
    local = LocalDual()
    assert local.begin(
        "a", 1, problem=PROBLEM, rule=RULES["ascent"], start=[0.0, 0.1], dual_state=None
    ) == ledger.reply("a")
    for step in (1, 2, 2, 1, 3):
        perform(ledger, ledger.report("a", 1, step, measured(step)))
        assert local.report("a", 1, step, measured(step)) == ledger.reply("a")
    local.checkpointed("a", 1, 3, "somewhere")
    assert local.trace("a") == ledger.book("a").rows and local.ledger.book("a").checkpoint_step == 3


STEPS = 6


def calm(trial):
    ledger, _ = begun(trial=f"t{trial}")
    for step in range(1, STEPS + 1):
        measurement = measured(step, ledger.book(f"t{trial}").state.multipliers, trial=trial)
        perform(ledger, ledger.report(f"t{trial}", 1, step, measurement))
    return ledger.book(f"t{trial}").rows


CALM = {trial: calm(trial) for trial in (0, 1)}

EVENTS = st.one_of(
    st.tuples(st.just("report"), st.integers(0, 1), st.just(0)),
    st.tuples(st.just("again"), st.integers(0, 1), st.integers(1, STEPS)),
    st.tuples(st.just("late"), st.integers(0, 1), st.integers(1, STEPS)),
    st.tuples(st.just("skip"), st.integers(0, 1), st.integers(2, STEPS)),
    st.tuples(st.just("checkpoint"), st.integers(0, 1), st.just(0)),
    st.tuples(st.just("restart"), st.integers(0, 1), st.just(0)),
)


@settings(derandomize=True, deadline=None, max_examples=150)
@given(st.lists(EVENTS, max_size=40))
def test_any_order_of_repeated_and_late_reports_gives_the_calm_runs_trace(events):
    """Two trials share a ledger; workers die and go on from checkpoints, messages come twice, and old workers still speak."""
    ledger, journal = DualLedger(), []
    attempts, checkpoints = {0: 1, 1: 1}, {0: None, 1: None}

    def begin(trial):
        journal.extend(
            begun(trial=f"t{trial}", attempt=attempts[trial], dual_state=checkpoints[trial], ledger=ledger)[1]
        )

    def report(trial, step, attempt, **changes):
        measurement = measured(step, ledger.book(f"t{trial}").state.multipliers, trial=trial, **changes)
        journal.extend(perform(ledger, ledger.report(f"t{trial}", attempt, step, measurement)))

    for trial in (0, 1):
        begin(trial)
    for kind, trial, step in events:
        done = ledger.book(f"t{trial}").state.step
        if kind == "report" and done < STEPS:
            report(trial, done + 1, attempts[trial])
        elif kind == "again" and step <= done:
            report(trial, step, attempts[trial], metrics=[7.0, 7.0])  # whatever it says now, it was answered
        elif kind == "late" and attempts[trial] > 1:
            with pytest.raises(StaleAttemptError):
                report(trial, step, attempts[trial] - 1, metrics=[7.0, 7.0])
        elif kind == "skip" and done + step <= STEPS:
            with pytest.raises(ProtocolError):
                report(trial, done + step, attempts[trial])
        elif kind == "checkpoint":
            checkpoints[trial] = ledger.reply(f"t{trial}").dual_state
        elif kind == "restart":
            attempts[trial] += 1
            begin(trial)
    for trial in (0, 1):
        while (done := ledger.book(f"t{trial}").state.step) < STEPS:
            report(trial, done + 1, attempts[trial])

    for trial in (0, 1):
        rows = ledger.book(f"t{trial}").rows
        assert [{**row, "attempt": 1} for row in rows] == CALM[trial]
        assert (ledger.book(f"t{trial}").state.multipliers > 0).all()
    again = DualLedger()
    perform(again, json.loads(json.dumps(journal)))
    assert books(again) == books(ledger)


def test_the_calm_run_is_worth_comparing_with():
    """Multipliers that stay at zero, or two trials alike, would make the test above say nothing."""
    assert all(value > 0 for row in CALM[0][1:] for value in row["multipliers"])
    assert CALM[0] != CALM[1]
    assert len({tuple(row["multipliers"]) for row in CALM[0]}) == STEPS
