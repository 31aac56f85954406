"""The primal step: what it moves, in which order, and that nothing moves when a number is not finite."""

import copy
import itertools
import math
import os
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.multiprocessing
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from torch import distributed
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from dualsweep.trainers.bad_numbers import DeferredChecks
from dualsweep.trainers.methods.base import Batch, StreamSums
from dualsweep.trainers.methods.fairness import Fairness, Pretraining
from dualsweep.trainers.methods.unlearn_forward_kl import UnlearnForwardKL
from dualsweep.trainers.mlp import MLPDenoiser
from dualsweep.trainers.models import Denoiser
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


def parts_of(batch: Batch) -> list[Batch]:
    """Three parts of 4, 4 and 4 samples; the second stream's 4 samples are in the last two."""
    rows = [([0, 1, 2, 3], (4, 0)), ([4, 5, 8, 9], (2, 2)), ([6, 7, 10, 11], (2, 2))]
    return [
        replace(batch, x_0=batch.x_0[at], noise=batch.noise[at], timestep=batch.timestep[at], counts=counts)
        for at, counts in rows
    ]


@pytest.mark.parametrize("deferred", [False, True])
def test_the_parts_of_a_batch_make_the_step_of_the_whole(accelerator, deferred):
    """Weights, EMA, optimizer and sums after several steps; gradients are added in another order."""
    whole, split = make_train(), make_train()
    sums = [StreamSums(2, torch.device("cpu")) for _ in range(2)]
    checks = [DeferredChecks() if deferred else None for _ in range(2)]
    given = {"accelerator": accelerator, "grad_clip": 0.5}
    for step in range(5):
        batch = make_batch(step)
        first, *further = parts_of(batch)
        one = primal_step(whole, fairness(), batch, MULTIPLIERS, sums=sums[0], checks=checks[0], **given)
        other = primal_step(
            split, fairness(), first, MULTIPLIERS, sums=sums[1], checks=checks[1], further=further, **given
        )
        if deferred:
            one, other = (each.read() for each in checks)
        assert other == pytest.approx(one, rel=1e-5)  # float32 norms
    for name, tensor in whole.tensors().items():
        # Float32 sums in another order, which Adam's division magnifies where a gradient is tiny.
        torch.testing.assert_close(split.tensors()[name], tensor, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(sums[1].table, sums[0].table, rtol=1e-6, atol=0)


def test_ranks_sum_their_gradients_in_the_last_part_alone(accelerator):
    events = []

    class Recording:
        num_processes, scaler = 1, None
        autocast, clip_grad_norm_ = accelerator.autocast, accelerator.clip_grad_norm_

        @contextmanager
        def no_sync(self, model):
            events.append("alone")
            yield
            events.append("together")

        def backward(self, loss):
            events.append("backward")
            loss.backward()

    first, *further = parts_of(make_batch(0))
    primal_step(
        make_train(), fairness(), first, MULTIPLIERS, accelerator=Recording(), grad_clip=1.0, further=further
    )
    assert events == ["alone", "backward", "together"] * 2 + ["backward"]


class Wrapped:
    """What `Accelerator` does for two workers on CPUs; the real one takes its ranks from the environment once a process."""

    num_processes, scaler = 2, None
    autocast = staticmethod(nullcontext)
    clip_grad_norm_ = staticmethod(torch.nn.utils.clip_grad_norm_)
    backward = staticmethod(torch.Tensor.backward)

    def no_sync(self, model):
        return model.no_sync()


def step_of_one_rank(rank, group, parts, weights, reductions) -> None:
    distributed.init_process_group("gloo", init_method=f"file://{group}", rank=rank, world_size=2)
    train = make_train()
    train.denoiser = DistributedDataParallel(train.denoiser)

    def summed(state, bucket):
        reductions[rank] += 1
        return default_hooks.allreduce_hook(state, bucket)

    train.denoiser.register_comm_hook(None, summed)
    first, *further = parts[rank]
    primal_step(train, fairness(), first, MULTIPLIERS, accelerator=Wrapped(), grad_clip=1e9, further=further)
    weights[rank].copy_(torch.cat([p.grad.flatten() for p in train.denoiser.parameters()]))
    # A hook in Python can hang the end of one process in fifteen: freeing the group waits for gloo's thread with the
    # interpreter locked, and that thread waits for the lock to drop the hook's future. We have what we came for.
    os._exit(0)


def test_two_ranks_with_unequal_numbers_of_parts_have_the_gradient_of_the_whole_batch(accelerator, tmp_path):
    alone, batch = make_train(), make_batch(0)
    take_step(alone, accelerator, batch)
    expected = torch.cat([p.grad.flatten() for p in alone.denoiser.parameters()])
    one, two, three = parts_of(batch)
    found = torch.zeros(2, len(expected)).share_memory_()
    reductions = torch.zeros(2, dtype=torch.int64).share_memory_()
    context = torch.multiprocessing.get_context("fork")  # a spawned worker would import torch for seconds
    arguments = (tmp_path / "group", [[one, two], [three]], found, reductions)
    ranks = [context.Process(target=step_of_one_rank, args=(rank, *arguments)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(60)
        assert rank.exitcode == 0
    assert reductions.tolist() == [1, 1]
    for gradient in found:
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)  # float32 sums in another order


def test_a_bad_sample_of_a_later_part_is_named_at_its_place_in_the_whole_batch(accelerator):
    train = make_train()
    first, *further = parts_of(make_batch(0))
    further[1].x_0[3, 0] = math.nan  # the last sample of the second stream
    with pytest.raises(NonFiniteError, match="non-finite loss at primal step 1 ") as error:
        primal_step(train, fairness(), first, MULTIPLIERS, accelerator=accelerator, grad_clip=1.0, further=further)
    assert error.value.rows == {1: [3]} and train.primal_step == 0


class HostTraffic(TorchDispatchMode):
    """Calls that on an accelerator wait for it: numbers read, tensors made of host numbers, lengths that depend on values."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def __torch_dispatch__(self, function, types, arguments=(), given=None):
        name = function.overloadpacket.__name__
        masks = name == "index" and any(at is not None and at.dtype == torch.bool for at in arguments[1])
        repeats = name == "repeat_interleave" and (given or {}).get("output_size") is None
        if masks or repeats or name in ("_local_scalar_dense", "lift_fresh", "nonzero"):
            self.calls.append(name)
        return function(*arguments, **(given or {}))


METHODS = {
    "fairness": fairness(),
    "pretraining under conditions": fairness(Pretraining),
    "unlearning with a ceiling": UnlearnForwardKL(
        SimpleNamespace(
            schedule=SCHEDULE, optimizer={"normalize": True}, options={"loss_ceiling": 1.0, "gradient_norm": None}
        )
    ),
}


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("name", METHODS)
def test_a_step_reads_nothing_from_the_device_and_sends_it_nothing_but_its_batch(accelerator, name, parts):
    train, sums, checks = make_train(), StreamSums(2, torch.device("cpu")), DeferredChecks()
    if name.endswith("conditions"):
        network = MLPDenoiser(dim=2, width=16, depth=1, num_train_timesteps=50, num_conditions=2)
        train = TrainState(Denoiser(network), Denoiser(copy.deepcopy(network)), CONFIG)
        sums = None  # one row for both streams
    traffic = HostTraffic()
    for step in range(3):
        batch = make_batch(step)
        first, *further = [batch] if parts == 1 else parts_of(batch)
        given = {"accelerator": accelerator, "grad_clip": 1.0, "sums": sums, "checks": checks, "further": further}
        if step == 0:  # makes what is kept
            primal_step(train, METHODS[name], first, MULTIPLIERS, **given)
            continue
        with traffic:
            primal_step(train, METHODS[name], first, MULTIPLIERS, **given)
    assert traffic.calls == []
    with traffic:
        float(MULTIPLIERS.sum())
        torch.tensor([1.0])
    assert traffic.calls == ["_local_scalar_dense", "lift_fresh"]  # it does see them


def test_multipliers_are_read_again_when_they_were_written_to():
    method, multipliers = fairness(), torch.tensor([0.5])
    assert method.on_host(multipliers).tolist() == [0.5] and method.on_host(multipliers) is method.on_host(multipliers)
    multipliers.copy_(torch.tensor([0.75]))
    assert method.on_host(multipliers).tolist() == [0.75]
