"""Variance of one draw of the KL estimate: timesteps uniform in t against uniform in log SNR.

A draw is (x_0 from p, timestep, noise), its value ``weight * |noise_p - noise_q|^2`` in nats; both ways are unbiased for the
same sum over timesteps (`sample_timesteps`), so the ratio of their variances is the ratio of the draws they need. Pairs of
exact mixture denoisers, then pairs of small MLPs trained here; one seed a draw set, and a training for the MLPs.

    python benchmarks/timestep_sampling.py [--seeds 5] [--draws 40000]
"""

import argparse
import math
import statistics

import numpy as np
import torch
from _harness import closing_line, spread

from dualsweep.datasets.gaussians import GaussianMixture
from dualsweep.trainers.estimators import Predictor, sample_timesteps
from dualsweep.trainers.models import MLPDenoiser
from dualsweep.trainers.noise_schedule import NoiseSchedule

TRAIN_STEPS = 800

CORNERS = [[-1.0, -1.0], [1.0, -1.0], [-1.0, 1.0], [1.0, 1.0]]


def mixture(means, std: float, weights) -> GaussianMixture:
    return GaussianMixture(np.array(means, dtype=float), np.full(len(means), std), np.array(weights))


# p and q: the same components in other proportions, then a shift of all of them
PAIRS = {
    "proportions": (mixture(CORNERS, 0.3, [0.25] * 4), mixture(CORNERS, 0.3, [0.47, 0.47, 0.03, 0.03])),
    "shift": (mixture(CORNERS, 0.3, [0.25] * 4), mixture(np.add(CORNERS, [0.3, 0.0]), 0.3, [0.25] * 4)),
}


def exact(law: GaussianMixture, schedule: NoiseSchedule) -> Predictor:
    return lambda x_t, t: torch.from_numpy(law.noise_prediction(x_t.numpy(), schedule.alpha_bar[t.numpy()]))


def trained(law: GaussianMixture, schedule: NoiseSchedule, seed: int) -> Predictor:
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    denoiser = MLPDenoiser(dim=2, width=64, depth=3)
    optimizer = torch.optim.Adam(denoiser.parameters(), lr=2e-3)
    rates = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, TRAIN_STEPS)
    for _ in range(TRAIN_STEPS):
        x_0 = torch.from_numpy(law.sample(256, rng)[0]).float()
        timestep, noise = torch.randint(schedule.num_train_timesteps, (256,)), torch.randn(256, 2)
        loss = (denoiser(schedule.add_noise(x_0, noise, timestep), timestep) - noise).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rates.step()
    return denoiser.eval()


@torch.no_grad()
def draws(p: Predictor, q: Predictor, law: GaussianMixture, schedule, timestep, weight, rng) -> torch.Tensor:
    """The value of every draw, nats, shape of `timestep`."""
    x_0 = torch.from_numpy(law.sample(len(timestep), rng)[0]).float()
    noise = torch.from_numpy(rng.standard_normal(x_0.shape, dtype=np.float32))
    x_t = schedule.add_noise(x_0, noise, timestep)
    return weight * (p(x_t, timestep) - q(x_t, timestep)).square().sum(1).double()


def compare(p, q, law: GaussianMixture, schedule: NoiseSchedule, count: int, seed: int) -> dict[str, float]:
    rng = np.random.default_rng(seed)
    log_snr = schedule.log_snr
    edges = np.concatenate([log_snr[:1], (log_snr[1:] + log_snr[:-1]) / 2, log_snr[-1:]])
    in_full = torch.from_numpy(0.5 * -np.diff(edges) * len(log_snr))  # a uniform timestep has probability 1 / T
    uniform = torch.from_numpy(rng.integers(schedule.num_train_timesteps, size=count))
    plain = draws(p, q, law, schedule, uniform, in_full[uniform], rng)
    timestep, weight = sample_timesteps(schedule, torch.from_numpy(rng.random(count)))
    important = draws(p, q, law, schedule, timestep, weight, rng)
    error = math.sqrt((float(plain.var()) + float(important.var())) / count)
    return {
        "plain": float(plain.var()),
        "important": float(important.var()),
        "kl": float(important.mean()),
        "gap": float(plain.mean() - important.mean()) / error,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--draws", type=int, default=40_000)
    options = parser.parse_args()
    torch.set_num_threads(1)
    schedule = NoiseSchedule()
    figures = {}
    for name, (law_p, law_q) in PAIRS.items():
        for kind, build in (
            ("exact", lambda law, seed: exact(law, schedule)),
            ("mlp", lambda law, seed: trained(law, schedule, seed)),
        ):
            rows = []
            for seed in range(options.seeds):
                p, q = build(law_p, 2 * seed), build(law_q, 2 * seed + 1)
                rows.append(compare(p, q, law_p, schedule, options.draws, seed))
            ratios = [row["plain"] / row["important"] for row in rows]
            print(f"{name}, {kind}")
            print(f"  uniform t       variance {spread([row['plain'] for row in rows], 'nats^2', 2)}")
            print(f"  uniform log SNR variance {spread([row['important'] for row in rows], 'nats^2', 2)}")
            print(f"  ratio                    {spread(ratios, '', 2)}")
            print(f"  KL                       {spread([row['kl'] for row in rows], 'nats', 3)}")
            print(
                f"  difference of the means  {spread([row['gap'] for row in rows], 'standard errors', 1)}", flush=True
            )
            figures[f"variance_ratio_{name}_{kind}"] = statistics.median(ratios)
    closing_line("timestep_sampling", figures)


if __name__ == "__main__":
    main()
