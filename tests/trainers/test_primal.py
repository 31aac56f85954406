"""The primal step: what it moves, in which order, and that nothing moves when a number is not finite."""

import copy
import itertools
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel

from dualsweep.trainers.bad_numbers import DeferredChecks
from dualsweep.trainers.methods.base import Batch, StreamSums
from dualsweep.trainers.methods.fairness import Fairness
from dualsweep.trainers.models import Denoiser, MLPDenoiser
from dualsweep.trainers.noise_schedule import NoiseSchedule
from dualsweep.trainers.primal import NonFiniteError, primal_step
from dualsweep.trainers.state import TrainState

CONFIG = {"lr": 1e-2, "weight_decay": 1e-2, "ema_decay": 0.3, "steps": 24, "warmup_steps": 4, "final_lr_fraction": 0.1}
SCHEDULE = NoiseSchedule(num_train_timesteps=50)
MULTIPLIERS = torch.tensor([0.5])


def make_train(scaler=None) -> TrainState:
    torch.manual_seed(0)
    denoiser = Denoiser(MLPDenoiser(dim=2, width=16, depth=1, num_train_timesteps=50))
    return TrainState(denoiser, copy.deepcopy(denoiser), CONFIG, scaler)


def make_batch(step: int, *, scale: float = 1.0) -> Batch:
    generator = torch.Generator().manual_seed(step)
    return Batch(
        x_0=scale * torch.randn(12, 2, generator=generator),
        noise=torch.randn(12, 2, generator=generator),
        timestep=torch.randint(50, (12,), generator=generator),
        counts=(8, 4),
        global_counts=(8, 4),
    )


def fairness(kind=Fairness, *arguments) -> Fairness:
    """The loss of a formulation reads its schedule and optimizer section, nothing else of a setting."""
    return kind(SimpleNamespace(schedule=SCHEDULE, optimizer={"normalize": True}), *arguments)


def take_step(train, accelerator, batch, *, method=None, grad_clip=1e9, sums=None) -> float:
    return primal_step(
        train,
        method or fairness(),
        batch,
        MULTIPLIERS,
        accelerator=accelerator,
        grad_clip=grad_clip,
        sums=sums,
    )


def everything(train: TrainState) -> tuple:
    tensors = {name: tensor.numpy().tobytes() for name, tensor in train.tensors().items()}
    groups = [{k: v for k, v in group.items() if k != "params"} for group in train.optimizer.param_groups]
    return tensors, groups, train.ema.optimization_step, train.primal_step, train.dual_step, train.lr, train.extra


def gradient_norm(train) -> float:
    return math.sqrt(sum(float(p.grad.double().square().sum()) for p in train.denoiser.parameters()))


class WithTerm(Fairness):
    """Fairness plus `term(parameters)`: a faulty formulation."""

    def __init__(self, setting, term) -> None:
        super().__init__(setting)
        self.term = term

    def primal_loss(self, denoiser, batch, multipliers):
        terms = super().primal_loss(denoiser, batch, multipliers)
        return replace(terms, loss=terms.loss + self.term(list(denoiser.parameters())))


def spoiled_batch(value: float) -> Batch:
    batch = make_batch(99)
    batch.x_0[3, 1] = value
    return batch


FAULTS = {
    "NaN sample": (spoiled_batch(math.nan), None, "loss"),
    "infinite sample": (spoiled_batch(math.inf), None, "loss"),
    # (0 * p).sqrt() is 0 with an infinite slope: the loss is fine, its gradient is not.
    "NaN gradient alone": (make_batch(99), fairness(WithTerm, lambda p: (0 * p[0].abs()).sqrt().sum()), "gradient"),
    # A constant has no gradient: nothing but the loss itself tells.
    "infinite loss alone": (make_batch(99), fairness(WithTerm, lambda p: torch.tensor(math.inf)), "loss"),
    "NaN loss alone": (make_batch(99), fairness(WithTerm, lambda p: torch.tensor(math.nan)), "loss"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_non_finite_number_stops_the_step_by_name_before_anything_moves(accelerator, fault):
    batch, method, culprit = FAULTS[fault]
    train, sums = make_train(), StreamSums(2, torch.device("cpu"))
    for step in range(3):
        take_step(train, accelerator, make_batch(step), sums=sums)
    before, table = everything(train), sums.table.clone()
    with pytest.raises(NonFiniteError, match=f"non-finite {culprit} at primal step 4 "):
        take_step(train, accelerator, batch, method=method, sums=sums)
    assert everything(train) == before
    assert torch.equal(sums.table, table)
    # And the next step is the one that would have been taken without the fault.
    calm = make_train()
    for step in range(4):
        take_step(calm, accelerator, make_batch(step))
    take_step(train, accelerator, make_batch(3))
    assert everything(train) == everything(calm)


def test_gradients_are_clipped_to_the_global_norm_and_the_norm_before_is_returned(accelerator):
    free, clipped = make_train(), make_train()
    batch = make_batch(0, scale=30.0)
    norm = take_step(free, accelerator, batch)
    assert norm == pytest.approx(gradient_norm(free), rel=1e-5)  # float32 norms
    assert norm > 0.1
    assert take_step(clipped, accelerator, batch, grad_clip=0.1) == norm
    assert gradient_norm(clipped) == pytest.approx(0.1, rel=1e-4)
    for raw, cut in zip(free.denoiser.parameters(), clipped.denoiser.parameters(), strict=True):
        torch.testing.assert_close(cut.grad, raw.grad * (0.1 / norm), rtol=1e-4, atol=1e-9)


def test_the_update_is_adamws(accelerator):
    """Twin: torch's AdamW by hand on the plain loss."""
    train = make_train()
    twin = copy.deepcopy(train.denoiser)
    optimizer = torch.optim.AdamW(twin.parameters(), lr=1.0, weight_decay=1e-2)
    for step in range(6):
        optimizer.param_groups[0]["lr"] = train.lr
        optimizer.zero_grad()
        fairness().primal_loss(twin, make_batch(step), MULTIPLIERS).loss.backward()
        optimizer.step()
        take_step(train, accelerator, make_batch(step))
    for mine, theirs in zip(train.denoiser.parameters(), twin.parameters(), strict=True):
        # A clipping factor of 1 may still round: float32 round-off, amplified by Adam's division where gradients are tiny.
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


def test_the_ema_follows_diffusers_formula(accelerator):
    train = make_train()
    theirs = EMAModel(train.denoiser.parameters(), decay=0.3)
    by_hand = [p.detach().double().clone() for p in train.denoiser.parameters()]
    for step in range(8):
        take_step(train, accelerator, make_batch(step))
        theirs.step(train.denoiser.parameters())
        # (1 + n) / (10 + n) up to ema_decay, after a first update that copies; n counts the updates before this one.
        decay = min((1 + step) / (10 + step), 0.3) if step else 0.0
        by_hand = [
            decay * e + (1 - decay) * p.detach().double()
            for e, p in zip(by_hand, train.denoiser.parameters(), strict=True)
        ]
    assert min((1 + 7) / (10 + 7), 0.3) == 0.3  # both branches of the formula were walked
    for mine, shadow, exact in zip(train.ema_denoiser.parameters(), theirs.shadow_params, by_hand, strict=True):
        torch.testing.assert_close(mine, shadow, rtol=1e-6, atol=1e-7)  # the fused form may round differently
        torch.testing.assert_close(mine.double(), exact, rtol=1e-5, atol=1e-6)
        assert not mine.requires_grad


def test_the_learning_rate_warms_up_linearly_and_falls_by_a_cosine(accelerator):
    train = make_train()
    rates = []
    for _ in range(24):
        rates.append(train.lr)
        assert [group["lr"] for group in train.optimizer.param_groups] == [train.lr]
        train.advance()
    assert rates[:4] == pytest.approx([2e-3, 4e-3, 6e-3, 8e-3])
    assert rates[4] == pytest.approx(1e-2)
    assert rates[9] == pytest.approx(1e-2 * (0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2))
    assert rates[14] == pytest.approx(1e-2 * 0.55)  # half way down
    assert all(a > b for a, b in itertools.pairwise(rates[4:]))
    for _ in range(3):  # at and beyond the last step
        assert train.lr == pytest.approx(1e-3)
        train.advance()


def test_the_parts_of_several_workers_are_summed_not_averaged(accelerator):
    """Gradients are averaged over ranks, so each rank's part is scaled by their number."""

    class TwoRanks:
        num_processes, scaler = 2, None
        autocast, clip_grad_norm_ = accelerator.autocast, accelerator.clip_grad_norm_

        def backward(self, loss):
            (loss / self.num_processes).backward()  # what averaging over two ranks does to one rank's part

    alone, one_of_two = make_train(), make_train()
    take_step(alone, accelerator, make_batch(0))
    take_step(one_of_two, TwoRanks(), make_batch(0))
    assert everything(alone) == everything(one_of_two)


@pytest.mark.parametrize("fault", ["infinite loss alone", "NaN loss alone"])
def test_a_loss_that_is_bad_on_one_rank_spoils_the_gradients_that_all_ranks_sum(accelerator, fault):
    """Its own gradient says nothing, so without the alarm the other ranks would step and this one would not."""
    reached = []

    class OneOfTwo:
        num_processes, scaler = 2, None
        autocast, backward = accelerator.autocast, staticmethod(torch.Tensor.backward)

        def clip_grad_norm_(self, parameters, most):
            reached.append(accelerator.clip_grad_norm_(parameters, most))
            return reached[-1]

    batch, method, _ = FAULTS[fault]
    train = make_train()
    before = everything(train)
    with pytest.raises(NonFiniteError, match="gradient norm nan"):
        take_step(train, OneOfTwo(), batch, method=method)
    assert everything(train) == before and math.isnan(reached[0])


class ScalingAccelerator(Accelerator):
    """What `Accelerator(mixed_precision="fp16")` does with its loss scaler on a GPU, with float32 arithmetic on the CPU."""

    def __init__(self) -> None:
        super().__init__(cpu=True)
        self.scaler = torch.amp.GradScaler("cpu")

    def unscale_gradients(self, optimizer=None):
        for one in self._optimizers if optimizer is None else [optimizer]:
            self.scaler.unscale_(one)


def test_a_loss_scaler_changes_neither_the_gradient_norm_nor_the_clipping(accelerator):
    scaling = ScalingAccelerator()
    plain, scaled = make_train(), make_train(scaling.scaler)
    batch = make_batch(0, scale=30.0)
    norm = take_step(plain, accelerator, batch, grad_clip=0.1)
    assert take_step(scaled, scaling, batch, grad_clip=0.1) == pytest.approx(norm, rel=1e-4)  # float32 norms
    assert gradient_norm(scaled) == pytest.approx(0.1, rel=1e-3)
    for mine, theirs in zip(scaled.denoiser.parameters(), plain.denoiser.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


def test_an_overflow_under_a_loss_scaler_skips_the_update_and_lowers_the_scale():
    """fp16 gradients overflow now and then: not a divergence while the loss itself is finite."""
    scaling = ScalingAccelerator()
    train = make_train(scaling.scaler)
    weights = [p.detach().clone() for p in train.denoiser.parameters()]
    scale = scaling.scaler.get_scale()
    take_step(train, scaling, make_batch(0), method=fairness(WithTerm, lambda p: (0 * p[0].abs()).sqrt().sum()))
    assert all(torch.equal(a, b) for a, b in zip(weights, train.denoiser.parameters(), strict=True))
    assert scaling.scaler.get_scale() < scale
    with pytest.raises(NonFiniteError, match="loss"):
        take_step(train, scaling, spoiled_batch(math.nan))
    # The step after a refused one works: the scaler was not left half-way.
    take_step(train, scaling, make_batch(1))
    assert not all(torch.equal(a, b) for a, b in zip(weights, train.denoiser.parameters(), strict=True))


@pytest.mark.parametrize("elsewhere", [False, True])
def test_under_a_loss_scaler_the_ranks_ask_whether_it_was_an_overflow_or_a_bad_loss(elsewhere):
    class OneOfTwo(ScalingAccelerator):
        num_processes = 2

        def reduce(self, tensor, reduction):
            assert reduction == "sum"
            return tensor + float(elsewhere)

    scaling = OneOfTwo()
    train = make_train(scaling.scaler)
    weights = [p.detach().clone() for p in train.denoiser.parameters()]
    overflow = fairness(WithTerm, lambda p: (0 * p[0].abs()).sqrt().sum())
    if elsewhere:
        with pytest.raises(NonFiniteError, match="gradient at primal step 1 "):
            take_step(train, scaling, make_batch(0), method=overflow)
    else:
        take_step(train, scaling, make_batch(0), method=overflow)
    assert train.primal_step == (0 if elsewhere else 1)
    assert all(torch.equal(a, b) for a, b in zip(weights, train.denoiser.parameters(), strict=True))


def test_gradients_that_overflow_at_no_scale_at_all_are_no_overflow():
    scaling = ScalingAccelerator()
    train = make_train(scaling.scaler)
    faulty = fairness(WithTerm, lambda p: (0 * p[0].abs()).sqrt().sum())
    with pytest.raises(NonFiniteError, match="non-finite gradient at primal step 18 "):  # 65536 is halved 17 times
        for _ in range(40):
            take_step(train, scaling, make_batch(0), method=faulty)


@pytest.mark.parametrize("fault", FAULTS)
def test_deferred_checks_skip_the_bad_step_and_tell_of_it_when_they_are_read(accelerator, fault):
    """The host does not look in between: the steps around the bad one move the weights, the bad one moves nothing."""
    batch, method, culprit = FAULTS[fault]
    train, calm, checks = make_train(), make_train(), DeferredChecks()

    def step(batch, method=None):
        return primal_step(
            train, method or fairness(), batch, MULTIPLIERS, accelerator=accelerator, grad_clip=1e9, checks=checks
        )

    def weights():
        return {k: t.numpy().tobytes() for k, t in train.tensors().items() if not k.startswith("ema.")}

    norms = [take_step(calm, accelerator, make_batch(number)) for number in range(3)]
    assert [step(make_batch(number)) for number in range(3)] == [None] * 3
    assert everything(train) == everything(calm)
    assert checks.read() == norms[-1] and checks.read() is None
    before = weights()
    step(batch, method)
    assert weights() == before
    step(make_batch(3))
    assert weights() != before and all(torch.isfinite(t).all() for t in train.tensors().values())
    with pytest.raises(NonFiniteError, match=f"non-finite {culprit} at primal step 4 ") as error:
        checks.read()
    assert error.value.step == 4
