"""What the benchmarks share: medians with spread, and the closing JSON line."""

import json
import statistics
import time
from collections.abc import Callable


def paired_medians(
    first: Callable[[], object], second: Callable[[], object], *, repeats: int
) -> tuple[list[float], list[float], list[float]]:
    """Time two things in turn, A B A B ..., after one uncounted call of each. Returns: seconds of both, and A/B pair by pair."""
    first(), second()
    a, b = [], []
    for _ in range(repeats):
        a.append(seconds(first))
        b.append(seconds(second))
    return a, b, [x / y for x, y in zip(a, b, strict=True)]


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def spread(values: list[float], unit: str = "s", digits: int = 4) -> str:
    return f"{statistics.median(values):.{digits}f} {unit} (min {min(values):.{digits}f}, max {max(values):.{digits}f}, n={len(values)})"


def closing_line(benchmark: str, figures: dict[str, float]) -> None:
    print(
        json.dumps(
            {"benchmark": benchmark, "figures": {name: round(float(value), 6) for name, value in figures.items()}}
        )
    )
