"""The fused fairness loss against its plain form: one forward and one mean squared error a stream (methods.md 1b)."""

from types import SimpleNamespace

import pytest
import torch

from dualsweep.trainers.methods import METHODS, StreamSums
from dualsweep.trainers.methods.base import Batch
from dualsweep.trainers.methods.fairness import Fairness
from dualsweep.trainers.noise_schedule import NoiseSchedule

COUNTS = (8, 5, 3)
MULTIPLIERS = torch.tensor([0.3, 1.7], dtype=torch.float64)
SCHEDULE = NoiseSchedule(num_train_timesteps=50)
# Models, samples and sums are float64 here, but the fused loss reads predictions in float32 (that is what bf16 models
# need): 6e-8 relative a prediction, and the same again a gradient entry.
RTOL = 1e-6


class Nonlinear(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.enter, self.leave = torch.nn.Linear(4, 6).double(), torch.nn.Linear(6, 3).double()

    def forward(self, x_t, timestep):
        return self.leave(torch.tanh(self.enter(torch.cat([x_t, timestep[:, None] / 50], dim=1))))


class Linear(Nonlinear):
    """Its loss is quadratic in the weights of `leave`, so central differences carry no truncation error."""

    def forward(self, x_t, timestep):
        return self.leave(self.enter(torch.cat([x_t, timestep[:, None] / 50], dim=1)))


def make_batch(counts=COUNTS, seed=1):
    generator = torch.Generator().manual_seed(seed)
    size = sum(counts)
    return Batch(
        x_0=torch.randn(size, 3, dtype=torch.float64, generator=generator),
        noise=torch.randn(size, 3, dtype=torch.float64, generator=generator),
        timestep=torch.randint(50, (size,), generator=generator),
        counts=tuple(counts),
        global_counts=tuple(counts),
    )


def part_of(batch, pieces):
    """The batch of a worker that holds `pieces`, one slice a stream."""
    starts = [sum(batch.counts[:i]) for i in range(len(batch.counts))]
    rows = [list(range(start + piece.start, start + piece.stop)) for start, piece in zip(starts, pieces, strict=True)]
    chosen = torch.tensor([row for stream in rows for row in stream])
    return Batch(
        x_0=batch.x_0[chosen],
        noise=batch.noise[chosen],
        timestep=batch.timestep[chosen],
        counts=tuple(len(stream) for stream in rows),
        global_counts=batch.global_counts,
    )


def reference_loss(denoiser, batch, multipliers, *, normalize):
    """sum_l mu_l MSE_l with mu_0 = 1, a forward a stream, over 1 + Lambda if asked."""
    total = 0.0
    weights = [1.0, *multipliers]
    streams = zip(
        batch.x_0.split(batch.counts), batch.noise.split(batch.counts), batch.timestep.split(batch.counts), strict=True
    )
    for weight, (x_0, noise, timestep) in zip(weights, streams, strict=True):
        alpha_bar = torch.from_numpy(SCHEDULE.alpha_bar)[timestep][:, None]
        x_t = alpha_bar.sqrt().float() * x_0 + (1 - alpha_bar).sqrt().float() * noise
        total = total + weight * torch.nn.functional.mse_loss(denoiser(x_t, timestep), noise)
    return total / (1 + multipliers.sum()) if normalize else total


def gradients(loss, denoiser):
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(denoiser.parameters()))])


def terms(denoiser, batch, multipliers, *, normalize=True):
    method = Fairness.__new__(Fairness)  # the loss reads nothing of a setting but these two
    method.setting = SimpleNamespace(optimizer={"normalize": normalize}, schedule=SCHEDULE)
    return method.primal_loss(denoiser, batch, multipliers)


def fused(denoiser, batch, multipliers, *, normalize=True):
    return terms(denoiser, batch, multipliers, normalize=normalize).loss


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("multipliers", [MULTIPLIERS, torch.zeros(2, dtype=torch.float64)])
def test_the_fused_loss_is_the_sum_over_streams_in_value_and_gradient(normalize, multipliers):
    denoiser, batch = Nonlinear(), make_batch()
    loss = fused(denoiser, batch, multipliers, normalize=normalize)
    expected = reference_loss(denoiser, batch, multipliers, normalize=normalize)
    torch.testing.assert_close(loss, expected, rtol=RTOL, atol=0)
    torch.testing.assert_close(gradients(loss, denoiser), gradients(expected, denoiser), rtol=RTOL, atol=RTOL)


def test_swapped_weights_are_noticed():
    """Control: the comparison above tells the two constraint streams, and the objective, apart."""
    denoiser, batch = Nonlinear(), make_batch()
    loss = fused(denoiser, batch, MULTIPLIERS)
    swapped = reference_loss(denoiser, batch, MULTIPLIERS.flip(0), normalize=True)
    assert abs((loss - swapped).item()) > 1e-2
    plain = reference_loss(denoiser, batch, MULTIPLIERS, normalize=False)
    assert abs((loss - plain).item()) > 1e-2


def test_an_unconstrained_run_is_plain_denoising():
    denoiser, batch = Nonlinear(), make_batch(counts=(9,))
    none = torch.zeros(0, dtype=torch.float64)
    torch.testing.assert_close(
        fused(denoiser, batch, none), reference_loss(denoiser, batch, none, normalize=False), rtol=RTOL, atol=0
    )


@pytest.mark.parametrize(
    "pieces",
    [
        [(slice(0, 5), slice(0, 4), slice(0, 1)), (slice(5, 8), slice(4, 5), slice(1, 3))],
        # The last of three workers holds nothing of the second constraint.
        [
            (slice(0, 1), slice(0, 3), slice(0, 2)),
            (slice(1, 6), slice(3, 4), slice(2, 3)),
            (slice(6, 8), slice(4, 5), slice(3, 3)),
        ],
    ],
    ids=["two workers", "three workers"],
)
def test_uneven_parts_of_several_workers_add_up_to_the_whole(pieces):
    denoiser, batch = Nonlinear(), make_batch()
    whole = fused(denoiser, batch, MULTIPLIERS)
    parts = [fused(denoiser, part_of(batch, piece), MULTIPLIERS) for piece in pieces]
    torch.testing.assert_close(sum(parts), whole, rtol=RTOL, atol=0)
    torch.testing.assert_close(
        sum(gradients(p, denoiser) for p in parts), gradients(whole, denoiser), rtol=RTOL, atol=RTOL
    )


def test_the_gradient_is_the_slope_of_the_loss():
    denoiser, batch = Linear(), make_batch()
    weight = denoiser.leave.weight
    (gradient,) = torch.autograd.grad(fused(denoiser, batch, MULTIPLIERS), [weight])
    step = 0.1  # exact at any step for a quadratic; large against float32 predictions (1e-7 / 0.1)
    with torch.no_grad():
        for row, column in [(0, 0), (1, 3), (2, 5)]:
            ends = []
            for sign in (1, -1):
                weight[row, column] += sign * step
                ends.append(fused(denoiser, batch, MULTIPLIERS).item())
                weight[row, column] -= sign * step
            assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(float(gradient[row, column]), abs=1e-5)


def test_per_sample_losses_are_means_over_a_samples_entries_and_sum_by_stream():
    denoiser, batch = Nonlinear(), make_batch()
    found = terms(denoiser, batch, MULTIPLIERS)
    losses = found.values
    assert found.counts == COUNTS
    assert losses.shape == (sum(COUNTS),)
    sums = StreamSums(3, torch.device("cpu"))
    for _ in range(2):
        sums.add(losses, batch.counts)
    for row, part in zip(sums.table, losses.detach().split(COUNTS), strict=True):
        torch.testing.assert_close(
            row, 2 * torch.stack([part.sum(), part.square().sum(), torch.tensor(float(len(part)))])
        )
    zero = torch.zeros(2, dtype=torch.float64)
    objective = fused(denoiser, batch, zero)
    torch.testing.assert_close(sums.table[0, 0] / sums.table[0, 2], objective.detach(), rtol=1e-12, atol=0)
    sums.reset()
    assert not sums.table.any()


def test_image_shaped_samples_give_the_same_losses_as_flat_ones():
    class Zero(torch.nn.Module):
        def forward(self, x_t, timestep):
            return torch.zeros_like(x_t)

    batch = make_batch()
    images = Batch(
        batch.x_0.view(-1, 3, 1, 1), batch.noise.view(-1, 3, 1, 1), batch.timestep, batch.counts, batch.global_counts
    )
    flat, shaped = terms(Zero(), batch, MULTIPLIERS), terms(Zero(), images, MULTIPLIERS)
    assert torch.equal(flat.loss, shaped.loss) and torch.equal(flat.values, shaped.values)


def test_fairness_keeps_multipliers_non_negative_and_is_found_by_its_name(make_setting):
    assert METHODS["fairness"] is Fairness
    assert Fairness(make_setting()).domain([]).project([-1.0, 2.0]).tolist() == [0.0, 2.0]
