"""The trace keeps every dual step once, survives Parquet exactly and names its curves for a tracker."""

import io
import math

import numpy as np
import pyarrow.fs
import pyarrow.parquet as pq
import pytest

from dualsweep.orchestration.trace import (
    COLUMNS,
    VECTOR_COLUMNS,
    metric_key,
    read_trace,
    read_trace_names,
    row_metrics,
    trace_schema,
    write_trace,
)

NAMES = ("digit_4", "digit_7")


def make_rows(count, constraints=NAMES, seed=0):
    """Rows with random finite numbers, as the dual server keeps them."""
    rng = np.random.default_rng(seed)
    rows = []
    for step in range(1, count + 1):
        row = {name: float(rng.normal()) for name in COLUMNS}
        row |= {
            "dual_step": step,
            "primal_step": 2 * step,
            "attempt": 1,
            "workers": 1,
            "lag": 0,
            "wall_time": 1.7e9 + step / 7,
        }
        row |= {name: rng.normal(size=len(constraints)).tolist() for name in VECTOR_COLUMNS}
        rows.append(row)
    return rows


def test_a_trace_read_back_equals_the_rows_written_bit_for_bit(tmp_path):
    rows = make_rows(50)
    write_trace(rows, tmp_path / "trace.parquet", constraints=NAMES, trial_id="share-1")
    assert read_trace(tmp_path / "trace.parquet") == rows
    assert read_trace_names(tmp_path / "trace.parquet") == (NAMES, "share-1")
    assert [path.name for path in tmp_path.iterdir()] == ["trace.parquet"]


def test_a_trace_goes_through_streams_of_any_filesystem(tmp_path):
    rows = make_rows(3)
    filesystem = pyarrow.fs.LocalFileSystem()
    with filesystem.open_output_stream(str(tmp_path / "t.parquet")) as stream:
        write_trace(rows, stream, constraints=NAMES, trial_id="t")
    with filesystem.open_input_file(str(tmp_path / "t.parquet")) as stream:
        assert read_trace(stream) == rows
    buffer = io.BytesIO()
    write_trace(rows, buffer, constraints=NAMES, trial_id="t")
    assert read_trace(io.BytesIO(buffer.getvalue())) == rows


def test_an_unconstrained_and_an_empty_trace_are_traces(tmp_path):
    write_trace(make_rows(4, ()), tmp_path / "free.parquet", constraints=(), trial_id="free")
    assert read_trace(tmp_path / "free.parquet")[2]["multipliers"] == []
    write_trace([], tmp_path / "none.parquet", constraints=NAMES, trial_id="none")
    assert read_trace(tmp_path / "none.parquet") == []
    assert read_trace_names(tmp_path / "none.parquet") == (NAMES, "none")


def test_arrays_are_taken_and_a_scalar_not_measured_becomes_nan(tmp_path):
    row = make_rows(1)[0] | {"multipliers": np.array([0.5, 0.25]), "dual_step": np.int64(1), "objective_stderr": None}
    write_trace([row], tmp_path / "t.parquet", constraints=NAMES, trial_id="t")
    (back,) = read_trace(tmp_path / "t.parquet")
    assert back["multipliers"] == [0.5, 0.25]
    assert math.isnan(back["objective_stderr"])


@pytest.mark.parametrize(
    ("steps", "fault"),
    [
        ([1, 2, 2, 3], "dual step 2 is repeated"),
        ([1, 3], "dual step 2 is missing"),
        ([2, 3], "dual step 1 is missing"),
        ([2, 1], "dual step 1 is out of order"),
        ([0, 1], "dual step 1 is out of order"),
    ],
)
def test_a_repeated_or_missing_dual_step_is_refused_by_name(tmp_path, steps, fault):
    rows = [make_rows(1)[0] | {"dual_step": step} for step in steps]
    with pytest.raises(ValueError, match=f"'share-1': {fault}"):
        write_trace(rows, tmp_path / "t.parquet", constraints=NAMES, trial_id="share-1")
    assert list(tmp_path.iterdir()) == []


def test_a_repeated_dual_step_in_a_file_is_refused_too(tmp_path):
    write_trace(make_rows(2), tmp_path / "t.parquet", constraints=NAMES, trial_id="t")
    table = pq.ParquetFile(tmp_path / "t.parquet").read()
    pq.write_table(table.take([0, 1, 1]), tmp_path / "twice.parquet")
    with pytest.raises(ValueError, match="dual step 2 is repeated"):
        read_trace(tmp_path / "twice.parquet")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"multipliers": [0.1]}, "multipliers has 1 entries for constraints"),
        ({"lambda": 3.0}, r"unknown columns \['lambda'\]"),
    ],
)
def test_a_row_of_another_shape_is_refused_by_name(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        write_trace([make_rows(1)[0] | change], tmp_path / "t", constraints=NAMES, trial_id="t")


def test_a_row_without_a_column_is_refused_by_name(tmp_path):
    row = make_rows(1)[0]
    del row["kkt_residual"]
    with pytest.raises(ValueError, match=r"columns \['kkt_residual'\] are missing"):
        write_trace([row], tmp_path / "t", constraints=NAMES, trial_id="t")


def test_a_failed_write_leaves_the_earlier_trace_whole(tmp_path):
    write_trace(make_rows(2), tmp_path / "t.parquet", constraints=NAMES, trial_id="t")
    with pytest.raises(ValueError, match="missing"):
        write_trace(make_rows(3)[1:], tmp_path / "t.parquet", constraints=NAMES, trial_id="t")
    assert len(read_trace(tmp_path / "t.parquet")) == 2


def test_a_file_that_is_no_trace_is_refused_with_its_name(tmp_path):
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 half a file")
    with pytest.raises(ValueError, match=r"broken\.parquet: not a readable Parquet file"):
        read_trace(tmp_path / "broken.parquet")
    pq.write_table(trace_schema(NAMES, "t").empty_table().select(["dual_step"]), tmp_path / "other.parquet")
    with pytest.raises(ValueError, match=r"other\.parquet: not a trace"):
        read_trace(tmp_path / "other.parquet")


def test_the_curves_of_a_row_are_named_after_the_constraints_and_finite():
    row = make_rows(1)[0] | {"objective_stderr": math.nan, "violations": [-0.25, math.inf]}
    curves = row_metrics(row, NAMES)
    assert curves["violation/digit_4"] == -0.25
    assert curves["multiplier/digit_7"] == row["multipliers"][1]
    assert curves["stationarity"] == row["stationarity"]
    assert "violation/digit_7" not in curves
    assert "objective_stderr" not in curves
    assert "wall_time" not in curves


def test_names_that_mlflow_refuses_are_mapped_and_stay_apart():
    assert metric_key("violation", "digit_4") == "violation/digit_4"
    odd = ["a+b", "a*b", "a/b", "..", ".", "", "ä", "x" * 400, "x" * 401]
    keys = [metric_key("violation", name) for name in odd]
    assert len(set(keys)) == len(odd)
    assert all(len(key) <= 250 for key in keys)
