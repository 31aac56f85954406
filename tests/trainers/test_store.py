"""What is written is whole or absent, and on the disk when its writer goes on."""

import os
from pathlib import Path

import pytest

from dualsweep.orchestration.trace import write_trace
from dualsweep.trainers.results import publish_base
from dualsweep.trainers.store import StorageError, Store, in_place_of
from dualsweep.trainers.workspace import write_atomically, write_json


def some_model(folder: Path) -> None:
    (folder / "unet").mkdir(parents=True)
    (folder / "unet" / "weights").write_bytes(b"1234")


WRITERS = {
    "a JSON file": lambda path: write_json(path, {"a": 1}),
    "a folder": lambda path: write_atomically(path, some_model),
    "a trace": lambda path: write_trace([], path, constraints=(), trial_id="a"),
    "a pretrained model": lambda path: publish_base(path, some_model, "abc", Store(path.parent)),
}


@pytest.mark.parametrize("what", WRITERS)
def test_all_of_it_is_on_the_disk_before_it_is_in_place_and_its_name_after(what, tmp_path, monkeypatch):
    events, fsync = [], os.fsync
    moves = {name: getattr(os, name) for name in ("replace", "rename")}
    monkeypatch.setattr(os, "fsync", lambda handle: (events.append(os.fstat(handle).st_ino), fsync(handle)))
    for name, move in moves.items():
        monkeypatch.setattr(os, name, lambda a, b, move=move: (events.append((a.stat().st_ino, b)), move(a, b)))
    target = tmp_path / "made" / "it"
    WRITERS[what](target)
    moved = events.index((target.stat().st_ino, target))
    assert {path.stat().st_ino for path in (target, *target.rglob("*"))} <= set(events[:moved])
    assert target.parent.stat().st_ino in events[moved:]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), ValueError("not a number")])
@pytest.mark.parametrize("folder", [False, True])
def test_what_is_not_finished_leaves_the_old_one_and_nothing_beside_it(folder, error, tmp_path):
    def write(text: str, failing: Exception | None = None) -> None:
        with in_place_of(tmp_path / "it") as part:
            if folder:
                part.mkdir()
            (part / "inner" if folder else part).write_text(text, encoding="utf-8")
            if failing is not None:
                raise failing

    write("old")
    with pytest.raises(StorageError if isinstance(error, OSError) else ValueError):
        write("new", error)
    assert [path.name for path in tmp_path.iterdir()] == ["it"]
    kept = tmp_path / "it" / "inner" if folder else tmp_path / "it"
    assert kept.read_text(encoding="utf-8") == "old"
    write("newer")
    assert kept.read_text(encoding="utf-8") == "newer"
