"""The primal step: one optimizer update at fixed multipliers."""

import math

import torch
from accelerate import Accelerator

from dualsweep.trainers.methods import Method
from dualsweep.trainers.methods.base import Batch, StreamSums
from dualsweep.trainers.state import TrainState


class NonFiniteError(RuntimeError):
    """A loss or gradient was NaN or infinite; neither the optimizer nor the multipliers moved."""


def primal_step(
    train: TrainState,
    method: Method,
    batch: Batch,
    multipliers: torch.Tensor,
    *,
    accelerator: Accelerator,
    grad_clip: float,
    sums: StreamSums | None = None,
) -> float:
    """Lagrangian, gradient, clipping, AdamW, learning rate and EMA, in this order.

    Args:
        multipliers: float32 on the model's device, shape (num_constraints,).
        sums: collects the per-sample values for the next dual step.
    Returns: global gradient norm before clipping (stationarity of the Lagrangian); infinite where fp16 gradients
        overflowed and the scaler skips the update.
    Raises: NonFiniteError before the optimizer moves, naming the primal step.
    """
    train.optimizer.zero_grad(set_to_none=True)
    with accelerator.autocast():
        terms = method.primal_loss(train.denoiser, batch, multipliers)
    # Gradients are averaged over ranks, while the parts of the Lagrangian add up: scale by the number of ranks.
    accelerator.backward(terms.loss * accelerator.num_processes)
    if accelerator.scaler is not None:
        accelerator.scaler.unscale_(train.optimizer)
    grad_norm = float(accelerator.clip_grad_norm_(train.denoiser.parameters(), grad_clip))
    value = float(terms.loss.detach())
    if not math.isfinite(value) or (not math.isfinite(grad_norm) and accelerator.scaler is None):
        train.optimizer.zero_grad(set_to_none=True)
        if accelerator.scaler is not None:
            accelerator.scaler.update()
        raise NonFiniteError(
            f"non-finite {'gradient' if math.isfinite(value) else 'loss'} at primal step {train.primal_step + 1} "
            f"(loss {value:g}, gradient norm {grad_norm:g}); the optimizer did not move"
        )
    if accelerator.scaler is not None:
        accelerator.scaler.step(train.optimizer)  # skips the update itself when fp16 gradients overflowed
        accelerator.scaler.update()
    else:
        train.optimizer.step()
    train.advance()
    if sums is not None:
        sums.add(terms.values, terms.counts)
    return grad_norm
