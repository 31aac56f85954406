"""Numbers that are not finite: which draws they came from, told in the error and kept in a file.

A retry draws the same batch again, so the file of one attempt against that of the next tells a defect of the data or the
method (the same draws) from one of the machine (none, or others).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from dualsweep.constraints import NonFiniteError
from dualsweep.datasets.streams import Draw
from dualsweep.trainers.methods.base import PrimalTerms
from dualsweep.trainers.workspace import write_json

SHOWN = 8  # draws of a stream in the message; the file has all


class BatchNonFiniteError(NonFiniteError):
    """A primal step on which every worker agreed that it must not be taken."""

    def __init__(self, message: str, *, step: int, here: bool, rows: Mapping[int, Sequence[int]]) -> None:
        """
        Args:
            step: the primal step, counted from 1.
            here: whether it is this worker's own loss that is not finite.
            rows: stream number -> positions in this worker's part of the batch, as `bad_positions` gives them.
        """
        super().__init__(message)
        self.step, self.here, self.rows = step, here, rows


def refusal(step: int, loss: float, grad_norm: float, terms: PrimalTerms, held: Sequence[int]) -> BatchNonFiniteError:
    """The error of a primal step whose loss or gradient is not finite; `held` as in `bad_positions`."""
    return BatchNonFiniteError(
        f"non-finite {'gradient' if math.isfinite(loss) else 'loss'} at primal step {step} "
        f"(loss {loss:g}, gradient norm {grad_norm:g}); the optimizer did not move",
        step=step,
        here=not math.isfinite(loss),
        rows=bad_positions(terms, held),
    )


@dataclass(frozen=True)
class _Seen:
    step: int
    terms: PrimalTerms  # without their graph
    held: tuple[int, ...]
    numbers: torch.Tensor  # loss and gradient norm, shape (2,)


class DeferredChecks:
    """Whether primal steps were sound, known to the device at once and to the host when it asks.

    Reading a loss waits until the device has done everything before it, so on an accelerator the host asks once a dual step.
    A step that is not sound moves nothing in the meantime: the optimizer's own kernel skips it.
    """

    def __init__(self) -> None:
        self._seen: list[_Seen] = []

    def add(self, step: int, terms: PrimalTerms, held: tuple[int, ...], grad_norm: torch.Tensor) -> torch.Tensor:
        """Returns: 1 if the optimizer must skip this step, else 0; a float32 scalar on the device."""
        kept = replace(terms, loss=terms.loss.detach(), values=terms.values.detach())
        numbers = torch.stack([kept.loss.float(), grad_norm.float()])
        self._seen.append(_Seen(step, kept, held, numbers))
        return (~torch.isfinite(numbers).all()).float()

    def read(self) -> float | None:
        """The last step's gradient norm; None if there was no step since the last reading.

        Raises: BatchNonFiniteError of the first step that was not sound.
        """
        seen, self._seen = self._seen, []
        if not seen:
            return None
        numbers = torch.stack([one.numbers for one in seen]).tolist()
        for one, (loss, grad_norm) in zip(seen, numbers, strict=True):
            if not (math.isfinite(loss) and math.isfinite(grad_norm)):
                raise refusal(one.step, loss, grad_norm, one.terms, one.held)
        return numbers[-1][1]


def bad_positions(terms: PrimalTerms, held: Sequence[int]) -> dict[int, list[int]]:
    """Stream number -> positions in this worker's part of the batch whose values are not finite.

    Row i of the values belongs to stream i where there is one, else to the first: on-policy rows are all of its draws. A
    draw may have several values (the two samples of a pair), one after the other.

    Args:
        held: samples of each stream in this worker's part.
    """
    found: dict[int, set[int]] = {}
    for row, part in enumerate(torch.isfinite(terms.values.detach()).split(list(terms.counts))):
        stream = row if row < len(held) else 0
        count = held[stream]
        if count and len(part) and len(part) % count == 0:
            positions = (~part).nonzero().flatten() // (len(part) // count)
            found.setdefault(stream, set()).update(positions.tolist())
    return {stream: sorted(positions) for stream, positions in found.items() if positions}


def drawn_part(
    draws: Mapping[str, Draw],
    sizes: Mapping[str, int],
    rows: Mapping[int, Sequence[int]],
    *,
    rank: int,
    shards: Sequence[int],
) -> dict[str, Any]:
    """One worker's part of a batch, JSON-able.

    Args:
        draws: as `Streams.draw` gives them.
        sizes: stream name -> its samples; a stream of one sample is one of noise alone.
        rows: as `bad_positions` gives them.
    """
    streams = {
        name: {
            "indices": indices.tolist() if sizes[name] > 1 else None,
            "timesteps": timesteps.tolist(),
            "not_finite": list(rows.get(number, ())),
        }
        for number, (name, (indices, timesteps, _)) in enumerate(draws.items())
    }
    return {"rank": rank, "shards": list(shards), "streams": streams}


def report_path(folder: Path, attempt: int, rank: int) -> Path:
    """Where an attempt's draws at fault are kept; ranks other than 0 that speak for themselves have their own file."""
    return folder / f"bad_numbers-{attempt}{f'-rank{rank}' if rank else ''}.json"


def write_report(path: Path, report: Mapping[str, Any]) -> None:
    """Whole or absent."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, report)


def told(parts: Sequence[Mapping[str, Any]]) -> str:
    """The draws at fault in a line, of all workers; where no draw is, the batch of each stream."""
    suspects = [
        (part, name, stream) for part in parts for name, stream in part["streams"].items() if stream["not_finite"]
    ]
    known = bool(suspects)
    suspects = suspects or [(part, name, stream) for part in parts for name, stream in part["streams"].items()]
    said = []
    for part, name, stream in suspects:
        positions = stream["not_finite"] if known else range(len(stream["timesteps"]))
        drawn = [stream["indices"][p] if stream["indices"] else p for p in positions]
        more = f" and {len(drawn) - SHOWN} more" if len(drawn) > SHOWN else ""
        kind = "samples" if stream["indices"] else "noise draws"
        said.append(f"rank {part['rank']} shards {part['shards']} {name} {kind} {drawn[:SHOWN]}{more}")
    return f"{'not finite at' if known else 'the batch:'} {'; '.join(said)}"
