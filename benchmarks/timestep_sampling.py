"""Variance of one draw of the KL estimate: timesteps uniform in t, uniform in log SNR, and as a pilot run advises.

A draw is (x_0 from p, timestep, noise), its value ``weight * |noise_p - noise_q|^2`` in nats. All three are unbiased
for the same sum over timesteps (`sample_timesteps`), so a ratio of variances is the ratio of the draws needed: `gain`
is that of uniform t over the other. `kl_spread` is the largest disagreement of two means, in standard errors.

The pilot's 2000 draws give the root mean square of the squared gap in 16 bins of equal log SNR. The proposal is that
times the log SNR each timestep stands for, plus a tenth of uniform in log SNR. Pairs of exact mixture denoisers, then
pairs of small MLPs trained here; a seed stands for a set of draws, and for MLPs a training.

    python benchmarks/timestep_sampling.py [--seeds 4] [--draws 20000]
"""

import argparse
import itertools
import math
import statistics
import sys

import numpy as np
import torch
from _harness import closing_line, spread

from dualsweep.datasets.gaussians import GaussianMixture
from dualsweep.trainers.estimators import Predictor, sample_timesteps
from dualsweep.trainers.mlp import MLPDenoiser
from dualsweep.trainers.noise_schedule import NoiseSchedule

TRAIN_STEPS = 500
PILOT_DRAWS, PILOT_BINS = 2000, 16
CORNERS = [[-1.0, -1.0], [1.0, -1.0], [-1.0, 1.0], [1.0, 1.0]]


def mixture(means, weights) -> GaussianMixture:
    return GaussianMixture(np.array(means, dtype=float), np.full(len(means), 0.3), np.array(weights))


# p and q: the same components in other proportions, then a shift of all of them by one std
PAIRS = {
    "proportions": (mixture(CORNERS, [0.25] * 4), mixture(CORNERS, [0.47, 0.47, 0.03, 0.03])),
    "shift": (mixture(CORNERS, [0.25] * 4), mixture(np.add(CORNERS, [0.3, 0.0]), [0.25] * 4)),
}


def exact(law: GaussianMixture, schedule: NoiseSchedule) -> Predictor:
    return lambda x_t, t: torch.from_numpy(law.noise_prediction(x_t.numpy(), schedule.alpha_bar[t.numpy()]))


def trained(law: GaussianMixture, schedule: NoiseSchedule, seed: int) -> Predictor:
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    denoiser = MLPDenoiser(dim=2, width=64, depth=2)
    optimizer = torch.optim.Adam(denoiser.parameters(), lr=2e-3)
    rates = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, TRAIN_STEPS)
    for _ in range(TRAIN_STEPS):
        x_0 = torch.from_numpy(law.sample(128, rng)[0]).float()
        timestep, noise = torch.randint(schedule.num_train_timesteps, (128,)), torch.randn(128, 2)
        loss = (denoiser(schedule.add_noise(x_0, noise, timestep), timestep) - noise).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rates.step()
    return denoiser.eval()


@torch.no_grad()
def compare(p: Predictor, q: Predictor, law: GaussianMixture, schedule: NoiseSchedule, count: int, seed: int):
    """(mean, variance) of `count` draws of each proposal."""
    rng = np.random.default_rng(seed)

    def draw(count: int, proposal: np.ndarray | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        timestep, weight = sample_timesteps(schedule, torch.from_numpy(rng.random(count)), proposal=proposal)
        x_0 = torch.from_numpy(law.sample(count, rng)[0]).float()
        x_t = schedule.add_noise(x_0, torch.from_numpy(rng.standard_normal(x_0.shape, dtype=np.float32)), timestep)
        return timestep, weight, (p(x_t, timestep) - q(x_t, timestep)).square().sum(1).double()

    log_snr = schedule.log_snr
    timestep, _, gaps = draw(PILOT_DRAWS, None)
    edges = np.linspace(log_snr[-1], log_snr[0], PILOT_BINS + 1)[1:-1]
    bins = np.digitize(log_snr, edges)
    drawn = bins[timestep.numpy()]
    totals = np.bincount(drawn, weights=gaps.square().numpy(), minlength=PILOT_BINS)
    sizes = np.sqrt(totals / np.maximum(np.bincount(drawn, minlength=PILOT_BINS), 1))[bins]
    advised = -np.gradient(log_snr) * (sizes + 0.1 * np.average(sizes, weights=-np.gradient(log_snr)))
    found = {}
    for name, proposal in (("uniform t", np.ones(len(log_snr))), ("uniform log SNR", None), ("pilot", advised)):
        _, weight, gaps = draw(count, proposal)
        found[name] = float((weight * gaps).mean()), float((weight * gaps).var())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--draws", type=int, default=20_000)
    options = parser.parse_args()
    torch.set_num_threads(1)
    schedule = NoiseSchedule()
    kinds = {"exact": lambda law, seed: exact(law, schedule), "mlp": lambda law, seed: trained(law, schedule, seed)}
    figures, apart = {}, 0.0
    for (pair, (law_p, law_q)), (kind, build) in itertools.product(PAIRS.items(), kinds.items()):
        rows = []
        for seed in range(options.seeds):
            p, q = build(law_p, 2 * seed), build(law_q, 2 * seed + 1)
            rows.append(compare(p, q, law_p, schedule, options.draws, seed))
        plain = [row.pop("uniform t") for row in rows]
        print(f"{pair}, {kind}: KL {spread([mean for mean, _ in plain], 'nats', 3)}")
        print(f"  uniform t        variance {spread([variance for _, variance in plain], 'nats^2', 2)}")
        for name in rows[0]:
            found = [row[name] for row in rows]
            pairs = list(zip(plain, found, strict=True))
            ratios = [v / w for (_, v), (_, w) in pairs]
            apart = max(apart, *(abs(a - b) / math.sqrt((v + w) / options.draws) for (a, v), (b, w) in pairs))
            print(f"  {name:15}  variance {spread([w for _, w in found], 'nats^2', 2)}   gain {spread(ratios, '', 2)}")
            figures[f"gain_{name.replace(' ', '_').lower()}_{pair}_{kind}"] = statistics.median(ratios)
        sys.stdout.flush()
    closing_line("timestep_sampling", figures | {"kl_spread": apart})


if __name__ == "__main__":
    main()
