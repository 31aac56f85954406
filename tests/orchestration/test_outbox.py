"""The queue before MLflow: what is lost of a trial leaves no gap behind which later rows lie."""

from dualsweep.orchestration.outbox import GiveUp, Item, Outbox


def test_after_lost_rows_no_later_ones_of_the_trial_are_sent(monkeypatch):
    """`dualsweep sync` goes on behind the newest step that a curve has."""
    monkeypatch.setattr("dualsweep.orchestration.outbox.LINGER_SECONDS", 0.0)
    outbox, sent = Outbox(lambda: True), []

    def put(trial, number, *, refused=False):
        def deliver():
            if refused:
                put(trial, number + 1)  # comes in while this one is on its way
                raise GiveUp("one value is refused")
            sent.append((trial, number))

        outbox.put(Item(what="rows", trial_id=trial, rows=[{"dual_step": number}], deliver=deliver))

    put("a", 1, refused=True)
    put("b", 1)
    outbox.flush(5)
    put("a", 3)
    put("b", 2)
    outbox.put(Item(what="result", trial_id="a", deliver=lambda: sent.append(("a", "result"))))
    assert outbox.close(5) == 3
    assert sent == [("b", 1), ("b", 2), ("a", "result")]
    assert [str(lost) for lost in outbox.undelivered()] == ["3 x rows of trial a (GiveUp: one value is refused)"]
