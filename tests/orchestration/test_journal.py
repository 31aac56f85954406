"""The journal gives back what was appended, drops a torn end, and refuses damage anywhere else by file and place."""

import math
import os
import resource

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dualsweep.orchestration import journal as journal_module
from dualsweep.orchestration.journal import Journal, JournalError, RemoteJournal, read_journal
from dualsweep.trainers.store import StorageError

RECORDS = [
    {"kind": "begin", "trial": "a", "attempt": 1},
    {"kind": "step", "trial": "a", "value": 0.1 + 0.2, "name": "Grüße\n\r\u2028"},
    {"kind": "step", "trial": "b", "value": [-0.0, 5e-324, 1.7976931348623157e308], "empty": {}},
    {"kind": "end", "trial": "a", "result": None},
]


def written(path, records=RECORDS):
    journal = Journal(path)
    journal.append(records)
    journal.close()
    return path.read_bytes()


def starts(content):
    """Byte offset of every record."""
    return [0, *(k + 1 for k, byte in enumerate(content) if byte == ord("\n"))][:-1]


def test_records_come_back_in_order_and_to_the_bit(tmp_path):
    path = tmp_path / "deep" / "journal.jsonl"
    written(path)
    again = Journal(path)
    assert again.records == read_journal(path) == RECORDS
    assert math.copysign(1, again.records[2]["value"][0]) == -1
    again.append([{"more": 1}])
    again.append([])
    again.close()
    assert read_journal(path) == [*RECORDS, {"more": 1}]


def test_records_are_synced_to_disk_before_append_returns(tmp_path, monkeypatch):
    path, synced = tmp_path / "journal.jsonl", []
    journal = Journal(path)
    sync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: (sync(handle), synced.append(read_journal(path))))
    journal.append(RECORDS[:2])
    journal.append(RECORDS[2:])
    journal.close()
    assert synced == [RECORDS[:2], RECORDS]  # one sync an append, with all of it in the file


def test_an_absent_and_an_empty_journal_have_no_records(tmp_path):
    assert read_journal(tmp_path / "none.jsonl") == []
    assert not (tmp_path / "none.jsonl").exists()
    (tmp_path / "empty.jsonl").touch()
    assert read_journal(tmp_path / "empty.jsonl") == []


@settings(derandomize=True, deadline=None, max_examples=50)
@given(
    st.lists(
        st.dictionaries(
            st.text(max_size=5),
            st.recursive(
                st.none()
                | st.booleans()
                | st.integers()
                | st.floats(allow_nan=False, allow_infinity=False)
                | st.text(max_size=8),
                st.lists,
                max_leaves=5,
            ),
            max_size=3,
        ),
        max_size=5,
    )
)
def test_any_json_records_come_back(tmp_path_factory, records):
    path = tmp_path_factory.mktemp("journal") / "journal.jsonl"
    written(path, records)
    assert repr(read_journal(path)) == repr(records)  # repr tells 0.0 from -0.0


def test_a_torn_last_record_is_dropped_and_cut_off_wherever_it_tore(tmp_path):
    path = tmp_path / "journal.jsonl"
    content = written(path)
    last = starts(content)[-1]
    for end in range(last, len(content)):
        path.write_bytes(content[:end])
        assert read_journal(path) == RECORDS[:-1]
        assert path.stat().st_size == end  # a reader changes nothing
        journal = Journal(path)
        assert journal.records == RECORDS[:-1] and path.stat().st_size == last
        journal.append([{"after": end}])
        journal.close()
        assert read_journal(path) == [*RECORDS[:-1], {"after": end}]


def test_a_flipped_byte_is_never_a_silent_wrong_record(tmp_path):
    """A damaged record with others behind it is named; at most the last record may count as torn."""
    path = tmp_path / "journal.jsonl"
    content = written(path)
    begins = starts(content)
    for position in range(len(content)):
        damaged = max(k for k, begin in enumerate(begins) if begin <= position)
        for mask in (
            0x01,
            0x07,
            0x20,
            0x80,
            0xFF,
            content[position] ^ ord("\n"),
            content[position] ^ ord("\r"),
            content[position] ^ ord("0"),
        ):
            if not mask:
                continue
            flipped = bytearray(content)
            flipped[position] ^= mask
            path.write_bytes(flipped)
            try:
                records = read_journal(path)
            except JournalError as error:
                assert f"{path}: record at byte {begins[damaged]} is corrupted" in str(error) and "restore" in str(
                    error
                )
            else:
                assert damaged == len(RECORDS) - 1, f"byte {position} of record {damaged} changed unseen"
                assert records == RECORDS[:-1]


def test_a_damaged_middle_is_not_touched_on_opening(tmp_path):
    path = tmp_path / "journal.jsonl"
    content = bytearray(written(path))
    content[starts(content)[1] + 12] ^= 4
    path.write_bytes(content)
    with pytest.raises(JournalError, match="is corrupted"):
        Journal(path)
    assert path.read_bytes() == content


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_json_does_not_have_are_refused_and_nothing_is_written(value, tmp_path):
    path = tmp_path / "journal.jsonl"
    before = written(path)
    journal = Journal(path)
    with pytest.raises(ValueError):
        journal.append([{"fine": 1}, {"value": [value]}])
    assert path.read_bytes() == before
    journal.append([{"fine": 2}])
    journal.close()
    assert read_journal(path) == [*RECORDS, {"fine": 2}]


def test_a_full_disk_is_an_error_and_the_journal_stays_whole(tmp_path):
    """The write is cut short by a real limit, as a full disk does; the same records go through once there is room."""
    path = tmp_path / "journal.jsonl"
    size = len(written(path))
    journal = Journal(path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 30, hard))
    try:
        with pytest.raises(OSError):
            journal.append(RECORDS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert read_journal(path) == RECORDS
    journal.append(RECORDS)
    journal.close()
    assert read_journal(path) == RECORDS + RECORDS


def test_a_write_in_pieces_is_finished(tmp_path):
    """A write may return early with a part done, without any error."""
    journal = Journal(tmp_path / "journal.jsonl")
    real = journal._file

    class Slow:
        def write(self, data):
            return real.write(bytes(data)[:7])

        def __getattr__(self, name):
            return getattr(real, name)

    journal._file = Slow()
    journal.append(RECORDS)
    real.close()
    assert read_journal(tmp_path / "journal.jsonl") == RECORDS
    assert os.listdir(tmp_path) == ["journal.jsonl"]


def test_what_a_failed_append_leaves_is_cut_off_when_that_works_again(tmp_path):
    """A disk that fails a write may fail the truncation, too."""
    path = tmp_path / "journal.jsonl"
    written(path)
    journal = Journal(path)
    real = journal._file

    class Broken:
        def write(self, data):
            real.write(bytes(data)[:7])
            raise OSError(5, "Input/output error")

        def truncate(self, size):
            raise OSError(5, "Input/output error")

        def __getattr__(self, name):
            return getattr(real, name)

    journal._file = Broken()
    for _ in range(2):
        with pytest.raises(StorageError, match="Input/output error"):
            journal.append([{"more": 1}])
    journal._file = real
    journal.append([{"more": 2}])
    journal.close()
    assert read_journal(path) == [*RECORDS, {"more": 2}]


class Memory:
    """A remote store's part in a journal; `away` fails every write, after it arrived if `late`."""

    def __init__(self) -> None:
        self.objects, self.away, self.late = {}, False, False

    def address(self, path):
        return str(path)

    def write(self, path, content):
        if not self.away or self.late:
            self.objects[path] = content
        if self.away:
            raise StorageError("storage: away")

    def read(self, path):
        return self.objects.get(path)

    def folders(self, place):
        return sorted({path.parent.name for path in self.objects if path.parent.parent == place})

    def files(self, place):
        return sorted(path.name for path in self.objects if path.parent == place)

    def remove(self, place):
        self.objects = {path: content for path, content in self.objects.items() if path.parent != place}


@pytest.mark.parametrize("late", [False, True])
def test_an_outage_while_a_remote_journal_begins_an_epoch_is_over_when_it_is_over(late, tmp_path, monkeypatch):
    monkeypatch.setattr(journal_module, "EPOCH_OBJECTS", 3)
    store = Memory()
    journal = RemoteJournal(store, tmp_path)
    journal.append(RECORDS[:1])
    journal.append(RECORDS[1:2])
    store.away, store.late = True, late
    for _ in range(2):
        with pytest.raises(StorageError, match="away"):
            journal.append(RECORDS[2:])
    store.away = False
    journal.append(RECORDS[2:])
    assert RemoteJournal(store, tmp_path).records == RECORDS
    with pytest.raises(JournalError, match="another DualServer goes on writing it"):
        for _ in range(3):
            journal.append(RECORDS)
