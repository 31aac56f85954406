"""Storage under faults: a real S3 server on loopback that goes away and comes back, real full and read-only disks, real kills.

The server keeps its objects while it is away, as a service does behind a broken network.
"""

import asyncio
import contextlib
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
import yaml
from moto.server import ThreadedMotoServer
from pyarrow import fs as pafs

from dualsweep.orchestration import journal as journal_module
from dualsweep.orchestration.config import ConfigError, SweepConfig
from dualsweep.orchestration.dual_server import DualServer
from dualsweep.orchestration.journal import Journal, JournalError, RemoteJournal, read_journal, read_remote_journal
from dualsweep.orchestration.local_dual import LocalDual
from dualsweep.orchestration.status import status_table
from dualsweep.orchestration.storage import bring, check_storage, open_store
from dualsweep.trainers.assignment import Assignment
from dualsweep.trainers.loop import run_trial
from dualsweep.trainers.store import MANIFEST, PATIENCE_VARIABLE, DamagedError, StorageError
from dualsweep.trainers.tensor_cache import cached_tensors
from dualsweep.trainers.workspace import Workspace

BUCKET = "bucket"
logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line a request


class Bucket:
    """An S3 server in this process on a port of its own; `away()` refuses connections and keeps the objects."""

    def __init__(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.start()
        self.files = pafs.S3FileSystem(
            endpoint_override=f"http://127.0.0.1:{self.port}", region="us-east-1", allow_bucket_creation=True
        )
        self.files.create_dir(BUCKET)

    def start(self) -> None:
        self._server = ThreadedMotoServer(ip_address="127.0.0.1", port=self.port, verbose=False)
        self._server.start()

    @contextlib.contextmanager
    def away(self):
        self._server.stop()
        try:
            yield
        finally:
            self.start()

    def stop(self) -> None:
        self._server.stop()


@pytest.fixture(scope="module")
def bucket(tmp_path_factory):
    settings = {
        "AWS_ACCESS_KEY_ID": "someone",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        PATIENCE_VARIABLE: "40",
    }
    with pytest.MonkeyPatch.context() as patch:
        for key, value in settings.items():
            patch.setenv(key, value)
        server = Bucket()
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.port}")
        yield server
        server.stop()


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """`machine(name)`: from here on this process is another machine, with a working folder of its own."""

    def become(name: str) -> Path:
        monkeypatch.setenv("DUALSWEEP_CACHE", str(tmp_path / name))
        return tmp_path / name

    become("first")
    return become


@pytest.fixture
def address(bucket, tmp_path):
    """Another prefix for every test."""
    return f"s3://{BUCKET}/{tmp_path.name}"


def key(address: str, *below: str) -> str:
    return "/".join([address.removeprefix("s3://"), *below])


def some_files(folder: Path, seed: int) -> dict[str, bytes]:
    generator = np.random.default_rng(seed)
    content = {"a.json": b"{}", "deep/b.bin": generator.bytes(300_000), "empty": b""}
    for name, data in content.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return content


def content_of(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# -- folders ------------------------------------------------------------------------------------------------------


def test_what_one_machine_pushed_another_fetches_to_the_byte(address, machine):
    here = open_store(address)
    written = some_files(here.root / "sweep" / "model", 0)
    here.push(here.root / "sweep" / "model")
    machine("second")
    there = open_store(address)
    assert there.root != here.root and there.address(there.root / "x") == f"{address}/x"
    assert there.fetch(there.root / "sweep" / "model")
    assert content_of(there.root / "sweep" / "model") == written
    assert not there.fetch(there.root / "sweep" / "other")
    # The second machine changes it; the first one's copy is renewed, and keeps no file that is gone.
    (there.root / "sweep" / "model" / "empty").unlink()
    (there.root / "sweep" / "model" / "a.json").write_bytes(b"[]")
    there.push(there.root / "sweep" / "model")
    assert here.fetch(here.root / "sweep" / "model")
    assert content_of(here.root / "sweep" / "model") == {"a.json": b"[]", "deep/b.bin": written["deep/b.bin"]}


def test_an_endpoint_may_stand_in_the_address(bucket, tmp_path, machine, monkeypatch):
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    uri = f"s3://{BUCKET}/{tmp_path.name}?endpoint_override=http%3A%2F%2F127.0.0.1%3A{bucket.port}&region=us-east-1"
    store = open_store(uri)
    check_storage(store)
    store.write(store.root / "x", b"1")
    assert store.read(store.root / "x") == b"1"
    assert "override" not in store.address(store.root)


def test_credentials_in_an_address_are_refused_without_being_repeated():
    with pytest.raises(ConfigError, match=r"s3://…@bucket holds credentials.*AWS_ACCESS_KEY_ID") as caught:
        open_store("s3://key:hunter2@bucket/runs")
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("damage", ["cut short", "changed", "lost"])
def test_a_folder_damaged_on_the_store_is_refused_by_file(damage, bucket, address, machine, moment):
    store = open_store(address)
    written = some_files(store.root / "model", 1)
    store.push(store.root / "model")
    place, data = key(address, "model", "deep", "b.bin"), bytearray(written["deep/b.bin"])
    if damage == "lost":
        bucket.files.delete_file(place)
    else:
        at = moment.randrange(len(data))
        if damage == "changed":
            data[at] ^= 1
        with bucket.files.open_output_stream(place) as stream:
            stream.write(bytes(data[:at] if damage == "cut short" else data))
    machine("second")
    there = open_store(address)
    with pytest.raises(DamagedError, match=rf"{address}/model is damaged \(deep/b\.bin"):
        there.fetch(there.root / "model")
    assert not list(there.root.glob("model*"))


def test_tensors_that_one_machine_made_are_read_by_others_and_made_again_where_they_are_damaged(
    bucket, address, machine
):
    made = []

    def tensors():
        made.append(1)
        return {"latents": torch.arange(6.0).view(2, 3)}

    def read(name: str) -> torch.Tensor:
        machine(name)
        store = open_store(address)
        return cached_tensors(store.root / "bases" / "latents" / "one", store, tensors)["latents"]

    first = read("first")
    assert torch.equal(read("second"), first) and len(made) == 1
    store = open_store(address)
    local = store.root / "bases" / "latents" / "one" / "tensors.safetensors"
    local.write_bytes(b"x")
    assert torch.equal(read("second"), first) and len(made) == 1  # fetched again
    with bucket.files.open_output_stream(key(address, "bases", "latents", "one", "tensors.safetensors")) as stream:
        stream.write(b"x")
    assert torch.equal(read("third"), first) and len(made) == 2
    assert torch.equal(read("fourth"), first) and len(made) == 2


def test_a_push_that_is_killed_leaves_nothing_that_counts(bucket, address, machine, moment):
    """At a random moment; the next push makes it whole."""
    store = open_store(address)
    written = some_files(store.root / "model", 2)
    script = "import sys; from pathlib import Path; from dualsweep.orchestration.storage import open_store\n"
    script += "store = open_store(sys.argv[1]); print('go', flush=True); store.push(store.root / 'model')"
    process = subprocess.Popen([sys.executable, "-c", script, address], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"go\n"
    time.sleep(moment.uniform(0.0, 0.15))  # the fault's moment
    process.kill()
    process.communicate()
    machine("second")
    there = open_store(address)
    if there.fetch(there.root / "model"):  # it had come to its end
        assert content_of(there.root / "model") == written
    store.push(store.root / "model")
    assert there.fetch(there.root / "model") and content_of(there.root / "model") == written


def test_a_short_outage_is_waited_for_and_a_long_one_is_named(bucket, address, machine, moment, monkeypatch):
    store = open_store(address)
    written = some_files(store.root / "model", 3)
    failed: list[BaseException] = []

    def push() -> None:
        try:
            for _ in range(5):
                store.push(store.root / "model")
                store.remove(store.root / "model")
            store.push(store.root / "model")
        except BaseException as error:  # noqa: BLE001  (a thread's exception is lost otherwise)
            failed.append(error)

    pusher = threading.Thread(target=push)
    pusher.start()
    time.sleep(moment.uniform(0.0, 0.4))  # the fault's moment
    with bucket.away():
        time.sleep(1.0)  # how long it is away
    pusher.join(60)
    assert not failed and not pusher.is_alive()
    machine("second")
    there = open_store(address)
    assert there.fetch(there.root / "model") and content_of(there.root / "model") == written
    monkeypatch.setenv(PATIENCE_VARIABLE, "1")
    with bucket.away(), pytest.raises(StorageError, match=rf"{address}/model{MANIFEST} could not be reached for"):
        store.push(store.root / "model")


# -- the journal --------------------------------------------------------------------------------------------------

RECORDS = [{"kind": "note", "trial": "a", "attempt": 1, "text": f"Grüße\n{number}"} for number in range(7)]


def test_a_remote_journal_gives_back_what_was_appended_on_any_machine(address, machine, monkeypatch):
    monkeypatch.setattr(journal_module, "EPOCH_OBJECTS", 3)  # so that epochs turn over on the way
    store = open_store(address)
    journal = RemoteJournal(store, store.root / "sweep")
    for record in RECORDS[:5]:
        journal.append([record])
    machine("second")
    there = open_store(address)
    again = RemoteJournal(there, there.root / "sweep")
    assert again.records == RECORDS[:5]
    # The first machine was only thought dead: what it writes now counts for nothing, and spoils nothing.
    journal.append([{"kind": "note", "trial": "ghost", "attempt": 1, "text": "boo"}])
    again.append(RECORDS[5:])
    with pytest.raises(JournalError, match="another DualServer goes on writing it"):
        journal.append([{"kind": "note", "trial": "ghost", "attempt": 1, "text": "boo again"}])
    assert RemoteJournal(there, there.root / "sweep").records == RECORDS


def test_a_lost_object_of_a_remote_journal_is_an_error_that_names_it(bucket, address, machine):
    store = open_store(address)
    journal = RemoteJournal(store, store.root / "sweep")
    for record in RECORDS:
        journal.append([record])
    (epoch,) = store.folders(store.root / "sweep" / "journal")
    bucket.files.delete_file(key(address, "sweep", "journal", epoch, "000000003"))
    with pytest.raises(JournalError, match=rf"{address}/sweep/journal: object 000000003 of {epoch} is missing"):
        read_remote_journal(store, store.root / "sweep")


def test_a_killed_writer_of_a_remote_journal_loses_nothing_it_answered(bucket, address, machine, moment):
    script = textwrap.dedent(
        """
        import itertools, sys
        from dualsweep.orchestration.journal import RemoteJournal
        from dualsweep.orchestration.storage import open_store
        store = open_store(sys.argv[1])
        journal = RemoteJournal(store, store.root / "sweep")
        for number in itertools.count(len(journal.records)):
            journal.append([{"number": number}])
            print(number, flush=True)
        """
    )
    answered = -1
    for _ in range(2):
        process = subprocess.Popen([sys.executable, "-c", script, address], stdout=subprocess.PIPE, text=True)
        first = process.stdout.readline()
        time.sleep(moment.uniform(0.0, 0.3))  # the fault's moment
        process.kill()
        lines = [first, *process.communicate()[0].splitlines()]
        answered = int([line for line in lines if line.strip()][-1])
    store = open_store(address)
    numbers = [record["number"] for record in RemoteJournal(store, store.root / "sweep").records]
    assert numbers == list(range(len(numbers))) and len(numbers) > answered


def test_the_dual_server_answers_nothing_that_the_store_has_not_got(bucket, address, machine, monkeypatch):
    """Away for longer than the patience: the caller gets the error by name; back again, the books are as if it was only late."""
    monkeypatch.setenv(PATIENCE_VARIABLE, "1")
    store = open_store(address)
    folder = store.root / "sweep"

    async def story() -> None:
        server = DualServer(str(folder), address)
        await server.note("a", 0, "before")
        with bucket.away():
            began = time.monotonic()
            refused = await asyncio.gather(
                *(server.note("a", 0, f"away {n}") for n in range(3)), return_exceptions=True
            )
            assert all(isinstance(error, StorageError) and address in str(error) for error in refused)
            assert time.monotonic() - began < 30  # together, not one after the other
        await server.note("a", 0, "after")
        await server.close()

    asyncio.run(story())
    machine("second")
    texts = [
        record["text"] for record in RemoteJournal(open_store(address), open_store(address).root / "sweep").records
    ]
    assert texts == ["before", "away 0", "away 1", "away 2", "after"]


def test_a_trial_that_a_resume_runs_again_is_not_taken_for_the_failed_one(tmp_path):
    """The watcher looks before Tune hands the trial over; its old end must not count for the new attempt."""

    async def statuses() -> list[str]:
        server = DualServer(str(tmp_path / "sweep"), str(tmp_path))
        await server.end("a", 1, "failed", None, "StorageError: no room")
        await server.reopen(["a", "unknown"])
        await server.close()
        again = DualServer(str(tmp_path / "sweep"), str(tmp_path))
        return [seen["status"] for seen in (await again.snapshot({}, [])).values()]

    assert set(asyncio.run(statuses())) == {"waiting"}


# -- checkpoints --------------------------------------------------------------------------------------------------

SMALL = {
    "name": "small",
    "data": {
        "dataset": "gaussian_mixture",
        "means": [[-1.0, 0.0], [1.0, 0.5]],
        "stds": [0.3, 0.2],
        "weights": [0.8, 0.2],
        "count": 200,
        "minority": {"classes": [1]},
    },
    "model": {"kind": "mlp", "width": 16, "depth": 1},
    "schedule": {"num_train_timesteps": 50, "beta_end": 0.2},
    "pretrain": {"steps": 8, "batch_size": 16, "warmup_steps": 1, "num_shards": 2},
    "primal": {"steps": 24, "batch_size": 16, "constraint_batch_size": 8, "warmup_steps": 2, "num_shards": 2},
    "dual": {"rule": "ascent", "step_size": 0.05, "primal_steps_per_dual_step": 2},
    "measure": {"num_samples": 24, "num_sampling_steps": 4},
    "thresholds": {"unit": "share", "grid": {"minority": [0.4]}},
    "evaluation": {"num_samples": 48, "num_sampling_steps": 4, "noise_levels": 6, "grid_samples": 9},
    "checkpoint_every_dual_steps": 2,
}


class Ending(LocalDual):
    """Ends the process's part at a dual step, as a lost connection does."""

    ends_at: int | None = None

    def report(self, trial_id, attempt, dual_step, measurement):
        reply = super().report(trial_id, attempt, dual_step, measurement)
        if dual_step == self.ends_at:
            raise ConnectionError("gone")
        return reply


class Lab:
    """A pretrained model in a storage, and trials that continue from it."""

    def __init__(self, storage: str) -> None:
        self.store, self.config = open_store(storage), SweepConfig.from_dict({**SMALL, "storage": storage})
        self.dual = Ending()
        self.folder = self.store.root / "small" / "trials" / "constrained"
        self.run("base")

    def run(self, kind: str = "constrained", *, attempt: int = 1, ends_at: int | None = None):
        self.store = open_store(self.config.storage)  # of the machine this is now
        self.folder = self.store.root / "small" / "trials" / "constrained"
        self.dual.ends_at = ends_at
        workspace = Workspace(self.config.to_dict(), self.config.data, self.store)
        assignment = Assignment(
            trial_id=kind,
            label=kind,
            kind=kind,
            attempt=attempt,
            thresholds={"class_1": 0.4} if kind == "constrained" else {},
            fixed_weight=None,
            trial_dir=str(self.store.root / "small" / "trials" / kind),
            base_dir=str(self.store.root / "bases" / "one"),
        )
        if kind == "constrained":
            assignment = Assignment(
                **{**assignment.to_dict(), "thresholds": dict.fromkeys(workspace.constraint_names, 0.4)}
            )
        return run_trial(workspace, assignment, self.dual)

    def checkpoints(self) -> list[str]:
        return sorted(path.name for path in (self.folder / "checkpoints").glob("*") if path.is_dir())

    def attempts(self) -> list[int]:
        return [row["attempt"] for row in self.dual.trace("constrained")]

    def notes(self) -> list[str]:
        return self.dual.ledger.book("constrained").notes


@pytest.mark.parametrize("where", ["a folder", "an address"])
def test_a_checkpoint_cut_short_costs_its_steps_is_told_and_keeps_no_slot(
    where, bucket, address, tmp_path, machine, moment
):
    """At a random byte of a random file of the newest one; the one before is used, on another machine if there is an address."""
    remote = where == "an address"
    lab = Lab(address if remote else str(tmp_path / "runs"))
    with pytest.raises(ConnectionError):
        lab.run(ends_at=7)
    assert lab.checkpoints() == ["step-000004", "step-000006"]
    torn = lab.folder / "checkpoints" / "step-000006" / moment.choice(["tensors.safetensors", "state.json"])
    whole = torn.read_bytes()
    cut = whole[: moment.randrange(len(whole))]
    if remote:
        with bucket.files.open_output_stream(key(address, *torn.relative_to(lab.store.root).parts)) as stream:
            stream.write(cut)
        machine("second")
    else:
        torn.write_bytes(cut)
    with pytest.raises(ConnectionError):
        lab.run(attempt=2, ends_at=5)
    assert lab.attempts() == [1, 1, 1, 1, 2]
    (note,) = lab.notes()
    assert note.startswith("attempt 2: ") and "step-000006" in note and "gone on from step-000004" in note
    # The damaged one holds none of the two places.
    assert lab.checkpoints() == ["step-000004"]
    if remote:
        assert lab.store.files(lab.folder / "checkpoints") == ["step-000004" + MANIFEST]
        assert lab.store.folders(lab.folder / "checkpoints") == ["step-000004"]
    assert lab.run(attempt=3)["status"] == "completed"
    assert lab.attempts() == [1, 1, 1, 1] + [3] * 8 and lab.checkpoints() == ["step-000010", "step-000012"]
    if remote:
        machine("third")
        there = open_store(address)
        folder = there.root / "small" / "trials" / "constrained"
        assert there.fetch(folder / "model") and any((folder / "model").iterdir())
        assert "samples.npy" in there.files(folder)


def test_leftovers_of_killed_processes_go_at_the_next_start_and_those_of_living_ones_stay(tmp_path):
    lab = Lab(str(tmp_path / "runs"))
    dead = subprocess.Popen(["true"])
    dead.wait()
    for place in (lab.folder, lab.folder / "checkpoints"):
        for pid in (dead.pid, os.getppid()):
            (place / f"model.part{pid}").mkdir(parents=True)
            (place / f"x.json.part{pid}").write_text("half", encoding="utf-8")
    lab.run()
    left = sorted(path.relative_to(lab.folder).as_posix() for path in lab.folder.rglob("*.part*"))
    mine = os.getppid()
    assert left == sorted(f"{place}{name}.part{mine}" for place in ("", "checkpoints/") for name in ("model", "x.json"))


# -- disks --------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path, request):
    """A file system of its own of 2 MB, or of the size that a test gives."""
    folder = tmp_path / "disk"
    folder.mkdir()
    size = f"size={getattr(request, 'param', '2m')}"
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small file system needs root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@contextlib.contextmanager
def filled(disk: Path, *, leave: int):
    """All room but `leave` bytes is taken."""
    ballast = disk / "ballast"
    stat = os.statvfs(disk)
    with open(ballast, "wb") as stream:
        os.posix_fallocate(stream.fileno(), 0, max(1, (stat.f_bavail * stat.f_bsize - leave) // 4096 * 4096))
    try:
        yield
    finally:
        ballast.unlink()


def test_a_full_disk_fails_the_trial_by_name_and_leaves_the_checkpoints_whole(small_disk, moment):
    """With a random rest of room, so that the write is cut at a random place; with room again the trial goes on."""
    lab = Lab(str(small_disk / "runs"))
    with pytest.raises(ConnectionError):
        lab.run(ends_at=5)
    assert lab.checkpoints() == ["step-000002", "step-000004"]
    size = sum(path.stat().st_size for path in (lab.folder / "checkpoints" / "step-000004").iterdir())
    with filled(small_disk, leave=moment.randrange(size)), pytest.raises(StorageError) as caught:
        lab.run(attempt=2)
    assert "step-000006 could not be written (" in str(caught.value) and "No space left" in str(caught.value)
    assert lab.checkpoints() == ["step-000002", "step-000004"]
    assert lab.run(attempt=3)["status"] == "completed"
    assert lab.attempts() == [1] * 4 + [3] * 8


def test_a_journal_on_a_full_disk_refuses_by_name_and_keeps_every_record_it_took(small_disk, moment):
    path = small_disk / "journal.jsonl"
    journal, taken = Journal(path), []
    with (
        filled(small_disk, leave=moment.randrange(4096, 60_000)),
        pytest.raises(StorageError, match="No space left") as e,
    ):
        while True:
            record = {"number": len(taken), "text": "x" * moment.randrange(2000)}
            journal.append([record])
            taken.append(record)
    assert str(path) in str(e.value) and taken and read_journal(path) == taken
    journal.append([{"after": 1}])
    assert read_journal(path) == [*taken, {"after": 1}]


def test_a_full_and_a_read_only_disk_are_refused_before_anything_starts(small_disk):
    with filled(small_disk, leave=0), pytest.raises(ConfigError, match=r"is not writable \(No space left on device\)"):
        check_storage(open_store(str(small_disk / "runs")))
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(ConfigError, match=r"is not writable \(Read-only file system\)"):
        check_storage(open_store(str(small_disk / "runs")))
    assert not (small_disk / "runs").exists()


def test_a_disk_that_turns_read_only_fails_the_trial_by_name(small_disk):
    lab = Lab(str(small_disk / "runs"))
    with pytest.raises(ConnectionError):
        lab.run(ends_at=3)
    # A lazy writer still holds nothing open here, so the kernel lets the remount through.
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(StorageError, match=r"step-000004 could not be written \(Read-only file system\)"):
        lab.run(attempt=2)
    subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
    assert lab.run(attempt=3)["status"] == "completed"


# -- whole sweeps -------------------------------------------------------------------------------------------------


def dualsweep(*args: str, cwd: Path, cache: Path) -> subprocess.Popen:
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    return subprocess.Popen(
        [sys.executable, "-m", "dualsweep", *args],
        cwd=cwd,
        env={**environment, "DUALSWEEP_CACHE": str(cache)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def written(folder: Path, address: str, **sections) -> str:
    values = {**SMALL, "storage": address, "tracking": {"uri": f"sqlite:///{folder / 'mlflow.db'}"}, **sections}
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return str(path)


def test_an_address_that_does_not_answer_is_refused_with_code_2_and_nothing_written(tmp_path, bucket):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    address = f"s3://{BUCKET}/runs?endpoint_override=http%3A%2F%2F127.0.0.1%3A{port}&region=us-east-1"
    work = tmp_path / "work"
    work.mkdir()
    process = dualsweep("sweep", written(work, address), cwd=work, cache=tmp_path / "cache")
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 2, output
    assert f"error storage: s3://{BUCKET}/runs cannot be written" in output and f"127.0.0.1 port {port}" in output
    assert not (tmp_path / "cache").exists() and sorted(path.name for path in work.iterdir()) == ["small.yaml"]


@pytest.mark.ray
@pytest.mark.heavy
def test_a_sweep_on_s3_lives_through_an_outage_and_is_resumed_on_another_machine(
    bucket, address, tmp_path, machine, moment
):
    def complete_checkpoints() -> list[str]:
        found = bucket.files.get_file_info(
            pafs.FileSelector(key(address, "small", "trials"), recursive=True, allow_not_found=True)
        )
        return sorted(info.path for info in found if "/checkpoints/" in info.path and info.path.endswith(MANIFEST))

    def wait_for(condition, process) -> None:
        deadline = time.monotonic() + 300
        while not condition():
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline, "the condition did not come true in time"
            time.sleep(0.1)  # between polls

    path = written(
        tmp_path,
        address,
        primal={**SMALL["primal"], "steps": 240},
        baselines={"unconstrained": False},
        compute={"workers": 1, "concurrent_trials": 1},
        checkpoint_every_dual_steps=5,
    )
    first = dualsweep("sweep", path, cwd=tmp_path, cache=tmp_path / "first")
    wait_for(lambda: len(complete_checkpoints()) >= 2, first)
    time.sleep(moment.uniform(0.0, 0.3))  # the fault's moment
    before = complete_checkpoints()
    with bucket.away():
        time.sleep(moment.uniform(0.5, 2.0))  # how long it is away
    wait_for(lambda: complete_checkpoints() != before, first)
    os.killpg(first.pid, signal.SIGINT)
    output, _ = first.communicate(timeout=300)
    assert first.returncode == 130, output
    newest = int(complete_checkpoints()[-1].removesuffix(MANIFEST)[-6:])

    machine("second")
    store = open_store(address)
    folder = bring(store, "small")
    ends = [record["status"] for record in read_journal(folder / "journal.jsonl") if record["kind"] == "end"]
    assert ends == ["completed", "interrupted"]
    resumed = dualsweep("resume", "small", "--storage", address, cwd=tmp_path, cache=tmp_path / "second")
    output, _ = resumed.communicate(timeout=300)
    assert resumed.returncode == 0, output
    assert address in output

    machine("third")
    store = open_store(address)
    folder = bring(store, "small", models=True)
    records = read_journal(folder / "journal.jsonl")
    begins = [record for record in records if record["kind"] == "begin" and record["trial"] != "pretrained"]
    assert [begin["state"]["step"] for begin in begins] == [0, newest]
    (trial,) = (folder / "trials").iterdir()
    result = json.loads((trial / "result.json").read_text(encoding="utf-8"))
    assert result["status"] == "completed" and result["dual_steps"] == 120
    assert (trial / "trace.parquet").is_file() and any((trial / "model").iterdir())
    assert (folder / "report" / "index.html").is_file()
    assert "not running" in status_table(store.root, "small").title
    sampled = dualsweep(
        "sample",
        f"{address}/small/trials/{trial.name}/model",
        "--count",
        "4",
        "--steps",
        "4",
        cwd=tmp_path,
        cache=tmp_path / "fourth",
    )
    output, _ = sampled.communicate(timeout=300)
    assert sampled.returncode == 0 and (tmp_path / "samples.npy").is_file(), output


@pytest.mark.ray
@pytest.mark.heavy
@pytest.mark.parametrize("small_disk", ["30m"], indirect=True)
def test_a_disk_that_fills_up_under_a_sweep_ends_it_by_name_and_with_room_a_resume_completes_it(
    small_disk, moment, tmp_path, write_small, command, wait_for, new_checkpoints, left_running, assert_books_whole,
    assert_as_calm, assert_delivered_once,
):  # fmt: skip
    tracking = f"sqlite:///{tmp_path / 'mlflow.db'}"
    folder = small_disk / "runs" / "small"
    path = write_small(
        storage=str(folder.parent),
        tracking={"uri": tracking},
        thresholds={"unit": "share", "grid": {"minority": [0.3, 0.4, 0.5]}},
        compute={"workers": 1, "concurrent_trials": 2},
    )
    with left_running.marking():
        sweep = command("sweep", str(path), cwd=tmp_path, wait=False)
    wait_for(new_checkpoints(folder), seconds=240, process=sweep)
    time.sleep(moment.uniform(0.0, 1.5))  # the fault's moment
    with filled(small_disk, leave=moment.randrange(100_000)):
        output, _ = sweep.communicate(timeout=300)
        assert sweep.returncode == 1, output
        assert "could not be written (No space left on device)" in output and str(folder) in output, output
        assert "dualsweep resume" in output, output
        assert not left_running()
        assert_books_whole(folder)
    code, output = command("resume", "small", "--storage", str(folder.parent), cwd=tmp_path)
    assert code == 0, output
    assert_delivered_once(tracking, folder)
    assert_as_calm(folder)


@pytest.mark.ray
@pytest.mark.heavy
def test_a_worker_and_a_node_that_die_on_a_cluster_with_remote_storage_change_nothing(
    bucket, address, machine, make_cluster, moment, tmp_path, write_small, command, wait_for, assert_books_whole,
    assert_as_calm, assert_delivered_once,
):  # fmt: skip
    """SIGKILL to the worker that trains, then to all processes of the node that the next one is on."""
    tracking = f"sqlite:///{tmp_path / 'mlflow.db'}"
    cluster = make_cluster()
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    cluster.wait_for_nodes()
    path = write_small(
        storage=address, tracking={"uri": tracking}, compute={"workers": 1, "concurrent_trials": 1, "max_failures": 5}
    )
    store = open_store(address)

    def checkpoints() -> set[str]:
        trials = store.root / "small" / "trials"
        return {
            f"{trial} {name}" for trial in store.folders(trials) for name in store.files(trials / trial / "checkpoints")
        }

    def training() -> tuple[psutil.Process, object] | None:
        """The worker and its node."""
        for node in nodes:
            raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
            for child in raylet.children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    if child.name().startswith("ray::RayTrainWorker"):
                        return child, node
        return None

    def wait_for_progress(*, beyond: int) -> None:
        known = checkpoints()
        wait_for(lambda: len(checkpoints() - known) >= beyond and training(), seconds=300, process=driver)
        time.sleep(moment.uniform(0.0, 1.0))  # the fault's moment

    driver = command("sweep", str(path), "--address", cluster.address, cwd=tmp_path, wait=False)
    try:
        wait_for_progress(beyond=1)
        worker, _ = training()
        worker.kill()
        wait_for_progress(beyond=1)
        _, node = training()
        nodes.remove(node)
        cluster.remove_node(node, allow_graceful=False)
        output, _ = driver.communicate(timeout=400)
    finally:
        if driver.poll() is None:
            os.killpg(driver.pid, signal.SIGKILL)
    assert driver.returncode == 0, output
    assert "Ray still holds" not in output
    machine("second")
    store = open_store(address)
    folder = bring(store, "small", models=True)
    begins = [record for record in read_journal(folder / "journal.jsonl") if record["kind"] == "begin"]
    again = [record for record in begins if record["attempt"] > 1 and record["trial"] != "pretrained"]
    assert len(again) >= 2 and all(record["state"]["step"] > 0 for record in again)
    assert_books_whole(folder)
    assert_delivered_once(tracking, folder)
    assert_as_calm(folder, store)
