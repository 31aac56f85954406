"""The primal step: one optimizer update at fixed multipliers."""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace

import torch
from accelerate import Accelerator

from dualsweep.constraints import NonFiniteError
from dualsweep.trainers.bad_numbers import DeferredChecks, refusal
from dualsweep.trainers.methods import Method
from dualsweep.trainers.methods.base import Batch, PrimalTerms, StreamSums
from dualsweep.trainers.state import TrainState

__all__ = ["NonFiniteError", "primal_step"]


def primal_step(
    train: TrainState,
    method: Method,
    batch: Batch,
    multipliers: torch.Tensor,
    *,
    accelerator: Accelerator,
    grad_clip: float,
    sums: StreamSums | None = None,
    checks: DeferredChecks | None = None,
    further: Sequence[Batch] = (),
) -> float | None:
    """Lagrangian, gradient, clipping, AdamW, learning rate and EMA, in this order.

    Args:
        multipliers: float32 on the model's device, shape (num_constraints,).
        sums: collects the per-sample values for the next dual step.
        checks: looks at loss and gradient without waiting for the device, and has the optimizer skip the step if they are
            not finite; whoever reads it gets the error. Not with a loss scaler, which waits for the device itself.
        further: the rest of the batch, one part after the other: each goes forward and backward by itself, so that only
            one part's activations are held, and gradients add up. The method's losses have to add up, too.
    Returns: global gradient norm before clipping (stationarity of the Lagrangian); infinite where fp16 gradients
        overflowed and the scaler skips the update; None with `checks`, which have it.
    Raises: BatchNonFiniteError before the optimizer moves, naming the primal step; on every worker if on one.
    """
    train.optimizer.zero_grad(set_to_none=True)
    parts, seen = [batch, *further], []
    for part in parts:
        last = len(seen) + 1 == len(parts)
        # Ranks sum their gradients once, in the last part's backward.
        with nullcontext() if last else accelerator.no_sync(train.denoiser):
            with accelerator.autocast():
                terms = method.primal_loss(train.denoiser, part, multipliers)
            seen.append(replace(terms, loss=terms.loss.detach(), values=terms.values.detach()))
            loss = terms.loss
            if last and accelerator.num_processes > 1:
                loss = loss + _alarm(sum(one.loss for one in seen), train.denoiser)
            # Gradients are averaged over ranks, while the parts of the Lagrangian add up: scale by the number of ranks.
            accelerator.backward(loss * accelerator.num_processes)
            del terms, loss
    terms, counts = joined(seen), tuple(map(sum, zip(*(part.counts for part in parts), strict=True)))
    if accelerator.scaler is not None:
        accelerator.scaler.unscale_(train.optimizer)
    norm = accelerator.clip_grad_norm_(train.denoiser.parameters(), grad_clip)
    grad_norm = None
    if checks is not None:
        train.optimizer.found_inf = checks.add(train.primal_step + 1, terms, counts, norm)
    else:
        grad_norm, value = float(norm), float(terms.loss)
        if not _may_step(value, grad_norm, accelerator, terms.loss):
            train.optimizer.zero_grad(set_to_none=True)
            if accelerator.scaler is not None:
                accelerator.scaler.update()
            raise refusal(train.primal_step + 1, value, grad_norm, terms, counts)
    if accelerator.scaler is not None:
        accelerator.scaler.step(train.optimizer)  # skips the update itself when fp16 gradients overflowed
        accelerator.scaler.update()
    else:
        train.optimizer.step()
    train.advance()
    if sums is not None:
        sums.add(terms.values, terms.counts)
    return grad_norm


def joined(parts: Sequence[PrimalTerms]) -> PrimalTerms:
    """The terms of a whole batch from those of its parts: every row's values as the parts have them, one after the other."""
    if len(parts) == 1:
        return parts[0]
    rows = zip(*(part.values.split(list(part.counts)) for part in parts), strict=True)
    return PrimalTerms(
        loss=sum(part.loss for part in parts),
        values=torch.cat([value for row in rows for value in row]),
        counts=tuple(map(sum, zip(*(part.counts for part in parts), strict=True))),
    )


def _alarm(loss: torch.Tensor, denoiser: torch.nn.Module) -> torch.Tensor:
    """Zero, with a gradient of zero; NaN and NaN where the loss is not finite.

    The gradients are summed over ranks anyway, and carry the news to all of them without another synchronisation: also of a
    loss whose own gradient says nothing (a constant infinity).
    """
    return loss * 0.0 * next(p for p in denoiser.parameters() if p.requires_grad).sum()


def _may_step(value: float, grad_norm: float, accelerator: Accelerator, loss: torch.Tensor) -> bool:
    """Whether this step is sound, or at least an fp16 overflow that the scaler skips; every rank gets the same answer."""
    if math.isfinite(grad_norm):
        # One rank alone: with several, the alarm would have spoilt the norm.
        return math.isfinite(value)
    if accelerator.scaler is None or accelerator.scaler.get_scale() < 1:
        return False  # below 1 it is not the scaling that overflows
    if accelerator.num_processes == 1:
        return math.isfinite(value)
    # Overflow or alarm? The norm is the same on all ranks, so that all of them come here and ask.
    bad = loss.new_tensor(float(not math.isfinite(value)), dtype=torch.float32)
    return not bool(accelerator.reduce(bad, "sum"))
