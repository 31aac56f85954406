"""What forgetting costs the rest: likelihood-constrained unlearning against concept erasing at fixed strengths.

Both forget one mode of the three-Gaussian mixture, from the same pretrained model, over several seeds. Across: how likely
the forgotten mode still is, E_p[q^1/q], by the exact densities on the model's own samples (1 before). Up: how far the
retained modes moved, KL of the pretrained model given the retained modes from the model given them, in nats: the mean over
the pretrained model's samples of those modes of the log-likelihood ratio of the two models (I-MMSE, common noise),
corrected for the mass that each gives to them. It is an estimate: where nothing moved it may come out below 0. Where one
curve is compared with the other, the erasing curve is interpolated in the likelihood.

    python benchmarks/retention.py [--seeds 5] [--figure retention.png]
"""

import argparse
import tempfile
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from _harness import closing_line
from _laboratory import Finished, Job, mean_and_error, run_all
from rich.console import Console
from rich.table import Table

from dualsweep.datasets import GaussianMixture, build
from dualsweep.trainers.evaluate import weighted_errors
from dualsweep.trainers.models import Denoiser, load_model
from dualsweep.trainers.noise_schedule import NoiseSchedule
from dualsweep.trainers.samplers import ddim_sample, starting_noise

LIKELIHOODS = (0.75, 0.6, 0.45, 0.3, 0.15)
STRENGTHS = (0.1, 0.2, 0.4, 0.7, 1.5, 2.5)  # and 1, the example's own
BASE_DRAWS = 12_000
RETAINED_DRAWS = 4000
LEVELS = 96


@dataclass(frozen=True)
class Point:
    """One trained model."""

    likelihood: float  # E_p of the ratio of the forgotten mode's density to the mixture's
    distance: float  # nats, retained modes of the pretrained model from those of this one


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--figure", type=Path, default=Path("retention.png"))
    options = parser.parse_args()
    console = Console(width=120)
    jobs = []
    for seed in range(options.seeds):
        asked = f"thresholds={{unit: likelihood_ratio, list: [{', '.join(f'{{sets: {b}}}' for b in LIKELIHOODS)}]}}"
        # A coarser chain than the example's: likelihoods are those of the samples, whatever was asked for.
        quiet = ("baselines.unconstrained=false", "baselines.fixed_weights=[]", "formulation.num_sampling_steps=64")
        jobs.append(Job("constrained", "gmm_unlearn_likelihood.yaml", seed, (*quiet, asked)))
        strengths = f"baselines.fixed_weights={list(STRENGTHS)}"
        jobs.append(Job("erasing", "gmm_esd.yaml", seed, ("baselines.unconstrained=false", strengths)))
    curves: dict[str, list[list[Point]]] = defaultdict(list)  # by method, a seed, a point of the sweep
    with tempfile.TemporaryDirectory() as folder:
        for finished in run_all(jobs, Path(folder), processes=options.processes):
            points = judged(finished, Path(folder))
            curves[finished.job.name].append(points)
            shown = ", ".join(f"({p.likelihood:.3f}, {p.distance:.4f})" for p in points)
            console.print(
                f"{finished.job.name} seed {finished.job.seed} [{finished.seconds:.0f} s]: {shown}", highlight=False
            )
    rows = compared(curves["constrained"], curves["erasing"])
    table = Table(title="Distance of the retained modes at equal likelihood of the forgotten one (nats)")
    for column in ("likelihood", "constrained", "erasing", "ratio"):
        table.add_column(column, justify="right")
    for likelihood, ours, theirs in rows:
        table.add_row(
            f"{likelihood:.3f}",
            f"{ours[0]:.4f} +- {ours[1]:.4f}",
            f"{theirs[0]:.4f} +- {theirs[1]:.4f}",
            f"{ours[0] / theirs[0]:.2f}",
        )
    console.print(table)
    draw(curves, options.figure)
    console.print(f"figure: {options.figure}")
    ratios = [ours[0] / theirs[0] for _, ours, theirs in rows]
    closing_line(
        "retention",
        {
            "points": len(rows),
            "worst_ratio": max(ratios),
            "median_ratio": float(np.median(ratios)),
            "points_at_most_half": sum(ratio <= 0.5 for ratio in ratios),
        },
    )


def judged(finished: Finished, folder: Path) -> list[Point]:
    """Every model of a job against the exact mixture and its own pretrained model, on draws of one seed."""
    torch.set_num_threads(1)
    config = finished.job.config(folder)
    data = build(config.data)
    mixture = data.mixture
    (forgotten,) = data.constraint_mixtures.values()
    schedule = NoiseSchedule(**config.schedule.model_dump(), clip_sample=False)
    base = load_model(finished.base_dir / "model")
    retained, kept_before = retained_draws(base, schedule, mixture, forgotten, seed=finished.job.seed)
    before = weighted_errors(base, retained, schedule, levels=LEVELS, seed=1)
    points = []
    for result in finished.results:
        trial = finished.folder / "trials" / result["trial_id"]
        samples = np.load(trial / "samples.npy", allow_pickle=False)
        ratio = np.exp(forgotten.log_density(samples) - mixture.log_density(samples))
        model = load_model(trial / "model")
        after = weighted_errors(model, retained, schedule, levels=LEVELS, seed=1)
        # log q(x) - log p(x) = after - before; given the retained modes each density is divided by their mass, which is
        # that of the law whose density it is: the probability flow's, not the trained chain's.
        kept = retained_draws(model, schedule, mixture, forgotten, seed=finished.job.seed)[1]
        distance = float((after - before).mean() + np.log(kept) - np.log(kept_before))
        points.append(Point(float(ratio.mean()), distance))
    return points


def retained_draws(
    model: Denoiser, schedule: NoiseSchedule, mixture: GaussianMixture, forgotten: GaussianMixture, *, seed: int
) -> tuple[np.ndarray, float]:
    """A model's samples of the modes that are kept, and the mass it gives them."""
    start = starting_noise(seed=seed, counter=1, shards=[0], counts={0: BASE_DRAWS}, shape=(mixture.dim,))
    samples = ddim_sample(model, start, schedule, num_sampling_steps=100, batch_size=BASE_DRAWS).numpy()
    lost = membership(mixture, forgotten, samples)
    return samples[lost < 0.5][:RETAINED_DRAWS], float(1 - lost.mean())


def membership(mixture: GaussianMixture, forgotten: GaussianMixture, samples: np.ndarray) -> np.ndarray:
    """Probability that each sample is of the forgotten mode."""
    lost = int(np.argmin(np.square(mixture.means - forgotten.means[0]).sum(1)))
    return mixture.posterior(samples)[:, lost]


def compared(
    ours: list[list[Point]], theirs: list[list[Point]]
) -> list[tuple[float, tuple[float, float], tuple[float, float]]]:
    """(likelihood, our distance, theirs at it), means over seeds with standard errors, where both curves reach."""
    rows = []
    for index in range(len(ours[0])):
        likelihood = float(np.mean([points[index].likelihood for points in ours]))
        at = []
        for points in theirs:
            ordered = sorted(points, key=lambda p: p.likelihood)
            x = [p.likelihood for p in ordered]
            if x[0] <= likelihood <= x[-1]:
                at.append(float(np.interp(likelihood, x, [p.distance for p in ordered])))
        if len(at) == len(theirs):
            rows.append((likelihood, mean_and_error([points[index].distance for points in ours]), mean_and_error(at)))
    return rows


def draw(curves: dict[str, list[list[Point]]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    for (name, seeds), marker in zip(sorted(curves.items()), "os", strict=True):
        likelihood = np.array([[p.likelihood for p in points] for points in seeds])
        distance = np.array([[p.distance for p in points] for points in seeds])
        order = likelihood.mean(0).argsort()
        likelihood, distance = likelihood[:, order], distance[:, order]
        spread = np.sqrt(len(seeds))
        axes.errorbar(
            likelihood.mean(0),
            distance.mean(0),
            yerr=distance.std(0, ddof=1) / spread if len(seeds) > 1 else None,
            xerr=likelihood.std(0, ddof=1) / spread if len(seeds) > 1 else None,
            marker=marker,
            capsize=2,
            label={"constrained": "likelihood-constrained", "erasing": "concept erasing, fixed strength"}[name],
        )
    axes.invert_xaxis()
    axes.set_yscale("symlog", linthresh=0.1)  # the curves lie a factor of a hundred apart, one of them at zero
    axes.set_ylim(bottom=min(-0.1, axes.dataLim.y0), top=2 * axes.dataLim.y1)
    axes.axhline(0, color="0.7", linewidth=0.8)
    axes.set_xlabel("likelihood of the forgotten mode, E_p[q¹/q]  (1: untouched)")
    axes.set_ylabel("distance of the retained modes (nats)")
    axes.set_title(
        f"Retention against unlearning, {len(next(iter(curves.values())))} seeds, standard errors", fontsize=10
    )
    axes.legend(frameon=False)
    figure.savefig(path, dpi=160)


if __name__ == "__main__":
    main()
