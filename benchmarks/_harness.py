"""What the benchmarks share: medians with spread, and the closing JSON line."""

import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


def paired_medians(
    first: Callable[[], object],
    second: Callable[[], object],
    *,
    repeats: int,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[list[float], list[float], list[float]]:
    """Time two things in turn, A B A B ..., after one uncounted call of each. Returns: seconds of both, and A/B pair by pair."""
    first(), second()
    a, b = [], []
    for _ in range(repeats):
        a.append(seconds(first, clock))
        b.append(seconds(second, clock))
    return a, b, [x / y for x, y in zip(a, b, strict=True)]


def seconds(call: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    start = clock()
    call()
    return clock() - start


def spread(values: list[float], unit: str = "s", digits: int = 4) -> str:
    return f"{statistics.median(values):.{digits}f} {unit} (min {min(values):.{digits}f}, max {max(values):.{digits}f}, n={len(values)})"


def closing_line(benchmark: str, figures: dict[str, float]) -> None:
    print(
        json.dumps(
            {"benchmark": benchmark, "figures": {name: round(float(value), 6) for name, value in figures.items()}}
        )
    )


@contextmanager
def own_folder(*, keep: bool = False) -> Iterator[Path]:
    """A temporary folder for a benchmark's results and for its Ray, so that it joins nobody's cluster and nobody joins its own.

    Its name is short because Ray's sockets lie below it, and a socket's path may have 107 characters.
    Args:
        keep: leave it there and say where.
    """
    folder = Path(tempfile.mkdtemp(prefix="b"))
    os.environ["RAY_TMPDIR"] = str(folder)
    os.environ.pop("RAY_ADDRESS", None)
    try:
        yield folder
    finally:
        if keep:
            print(f"kept: {folder}")
        else:
            shutil.rmtree(folder, ignore_errors=True)  # Ray's processes may still be writing their logs
