"""What tells the share of a rare class: divergences from reference models, or the model's own samples.

For a class restriction KL(q^i||p) is -log share_i plus the misfit inside the class (methods.md H1), so each estimate of
that divergence is one of -log share_i, in nats. One model p is trained with every rare class raised to a share of 0.1 (its
network under condition 0); what each estimator needs is trained beside it, on the few images that a trial has of a class:

    reference       a model of its own; point KL on the images it learned, and on fresh ones (which a trial does not have)
    branch          p's network under condition i, which learned the class; likewise
    held-out split  a model of one half of the images; point KL on the other half
    on-policy       256 samples of p, judged by the training labeller: what the training loop does
    plain           the same samples, judged by a classifier without moved copies of rare images
    adjusted        the plain classifier's counts, divided by its confusion matrix from 5 folds of the training images

The truth is the share among many samples of p, judged by the exact posterior (mixture) or by a classifier that no training
saw (digits). `bias` is the mean over classes of estimate minus truth, `worst` the largest; on-policy estimates are
averaged over independent repeats. `s.e.` is that of one estimate as it reports itself, `s` its time, `once` what must be
trained before the first one. `s.e. sqrt(s)` compares them at equal time.

    python benchmarks/share_estimators.py [--seed 0] [--only mixture,digits] [--quick]
"""

import argparse
import math
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from _harness import closing_line
from _laboratory import EXAMPLES
from rich.console import Console
from rich.table import Table
from sklearn.model_selection import cross_val_predict
from sklearn.svm import SVC

from dualsweep.constraints.closed_forms import class_restriction_multipliers
from dualsweep.datasets import ConstrainedData, build
from dualsweep.orchestration.config import load_config
from dualsweep.trainers.estimators import Predictor, point_kl
from dualsweep.trainers.labellers import evaluation_labeller, training_labeller
from dualsweep.trainers.metrics import share_measurement
from dualsweep.trainers.models import Denoiser, build_denoiser
from dualsweep.trainers.noise_schedule import NoiseSchedule
from dualsweep.trainers.samplers import ddim_sample, starting_noise

Judge = Callable[[np.ndarray], np.ndarray]  # samples -> membership weights (n, num_classes)

SHARE = 0.1
FEW = 16  # images of a class that estimators may learn from; digits have 14 or 15
FRESH = 64
DRAWS = 256
LEVELS, MAX_ROWS = 32, 512


@dataclass(frozen=True)
class Case:
    """One data set and how much is spent on it."""

    example: str
    batch_size: int
    few_batch_size: int
    steps: int
    truth_draws: int
    repeats: int  # of the on-policy estimates
    sampling_steps: tuple[int, int]  # of an estimate and of the truth


CASES = {
    "mixture": Case("gmm_fairness.yaml", 256, 32, 2000, 20_000, 32, (20, 50)),
    "digits": Case("digits_fairness.yaml", 64, 16, 1200, 3000, 8, (10, 20)),
}
QUICK = {
    "mixture": Case("gmm_fairness.yaml", 64, 16, 20, 500, 2, (5, 10)),
    "digits": Case("digits_fairness.yaml", 16, 8, 5, 100, 1, (3, 4)),
}


@dataclass
class Bench:
    """What the estimators of one case share."""

    case: Case
    data: ConstrainedData
    model: dict
    schedule: NoiseSchedule
    seed: int

    @property
    def few(self) -> dict[str, np.ndarray]:
        return {name: samples[:FEW] for name, samples in self.data.constraints.items()}

    def train(self, draw: Callable[[np.random.Generator], tuple[np.ndarray, np.ndarray | None]], conditions: int = 0):
        """A denoiser trained on batches of (x_0, condition) from `draw`; the learning rate falls to zero."""
        torch.manual_seed(self.seed)
        rng = np.random.default_rng(self.seed)
        denoiser = build_denoiser(self.model, self.data.sample_shape, self.schedule, num_conditions=conditions)
        optimizer = torch.optim.AdamW(denoiser.parameters(), lr=2e-3)
        rates = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.case.steps)
        for _ in range(self.case.steps):
            samples, given = draw(rng)
            x_0, condition = torch.from_numpy(samples), None if given is None else torch.from_numpy(given)
            timestep, noise = torch.randint(self.schedule.num_train_timesteps, (len(x_0),)), torch.randn_like(x_0)
            x_t = self.schedule.add_noise(x_0, noise, timestep)
            loss = (denoiser(x_t, timestep, condition) - noise).square().mean()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(denoiser.parameters(), 1.0)
            optimizer.step()
            rates.step()
        return denoiser.eval()

    def reference(self, samples: np.ndarray) -> Denoiser:
        return self.train(lambda rng: (samples[rng.integers(len(samples), size=self.case.few_batch_size)], None))

    def judged_model(self) -> Denoiser:
        """p under condition 0 and the rare classes under their own: the streams' weights are those of exact multipliers."""
        prior = [self.data.prior[index] for index in self.data.constraint_classes.values()]
        multipliers = class_restriction_multipliers([-math.log(SHARE)] * len(prior), prior)
        streams = [self.data.main.samples, *self.data.constraints.values()]
        weights = np.array([1.0, *multipliers]) / (1.0 + sum(multipliers))

        def draw(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
            counts = rng.multinomial(self.case.batch_size, weights)
            parts = [x[rng.integers(len(x), size=n)] for x, n in zip(streams, counts, strict=True)]
            parts += [x[rng.integers(len(x), size=self.case.few_batch_size)] for x in self.few.values()]
            branches = np.repeat(np.arange(1, len(streams)), self.case.few_batch_size)
            return np.concatenate(parts), np.concatenate([np.zeros(self.case.batch_size, dtype=np.int64), branches])

        return self.train(draw, conditions=len(streams))

    def samples(self, denoiser: Denoiser, count: int, steps: int, counter: int) -> np.ndarray:
        shape = self.data.sample_shape
        start = starting_noise(seed=self.seed, counter=counter, shards=[0], counts={0: count}, shape=shape)
        return ddim_sample(denoiser, start, self.schedule, num_sampling_steps=steps).numpy()

    def divergence(self, law: Predictor, p: Predictor, samples: np.ndarray) -> tuple[float, float]:
        """(point KL, standard error), nats."""
        with torch.inference_mode():
            estimate = point_kl(law, p, torch.from_numpy(samples), self.schedule, levels=LEVELS, max_rows=MAX_ROWS)
        return estimate.value, estimate.stderr


@dataclass
class Found:
    """Estimates of one kind: one entry a class (and repeat)."""

    errors: dict[str, list[float]]  # by class, estimate - truth, nats
    stderrs: list[float]
    seconds: list[float]
    once: float = 0.0

    @property
    def biases(self) -> list[float]:
        return [float(np.mean(values)) for values in self.errors.values()]


def under(denoiser: Denoiser, condition: int) -> Predictor:
    return lambda x_t, timestep: denoiser(x_t, timestep, torch.full_like(timestep, condition))


def plain_classifier(data: ConstrainedData) -> tuple[Judge, np.ndarray]:
    """Membership weights of an SVM on the training images, and its confusion matrix (true class, answer) from 5 folds."""

    def flat(x: np.ndarray) -> np.ndarray:
        return np.clip(x, -1, 1).reshape(len(x), -1)

    machine, labels = SVC(C=10.0, class_weight="balanced"), data.main.labels
    votes = np.eye(len(data.class_names))
    folds = cross_val_predict(machine, flat(data.main.samples), labels, cv=5)
    confusion = np.stack([votes[folds[labels == index]].mean(0) for index in range(len(votes))])
    machine.fit(flat(data.main.samples), labels)
    return lambda samples: votes[machine.predict(flat(samples))], confusion


def measure(case: Case, seed: int) -> tuple[dict[str, tuple[float, float]], dict[str, Found]]:
    """(share, standard error) of every rare class, and every kind of estimate."""
    example = load_config(EXAMPLES / case.example, [f"data.seed={seed}"], environment=False)
    config, data = example.to_dict(), build(example.data)
    known = data.reference_mixture is not None
    bench = Bench(case, data, config["model"], NoiseSchedule(**config["schedule"], clip_sample=not known), seed)
    found: dict[str, Found] = defaultdict(lambda: Found(defaultdict(list), [], []))
    shared, joint_seconds = _timed(bench.judged_model)
    p, columns = under(shared, 0), list(data.constraint_classes.values())
    steps, truth_steps = case.sampling_steps
    drawn = [_timed(partial(bench.samples, shared, DRAWS, steps, counter=1 + repeat)) for repeat in range(case.repeats)]
    rows = evaluation_labeller(data, seed=seed).label(bench.samples(shared, case.truth_draws, truth_steps, counter=0))[
        :, columns
    ]
    truth = share_measurement(rows)
    metrics = dict(zip(data.constraint_classes, truth.metrics, strict=True))

    def note(kind: str, name: str, value: float, stderr: float, seconds: float) -> None:
        found[kind].errors[name].append(value - metrics[name])
        found[kind].stderrs.append(stderr)
        found[kind].seconds.append(seconds)

    for position, (name, few) in enumerate(bench.few.items(), start=1):
        fresh = data.held_out_constraints[name][:FRESH]
        reference, once = _timed(partial(bench.reference, few))
        half, once_half = _timed(partial(bench.reference, few[::2]))
        for kind, law, images, cost in (
            ("reference, its images", reference, few, once),
            ("reference, fresh images", reference, fresh, once),
            ("branch, its images", under(shared, position), few, joint_seconds / len(bench.few)),
            ("branch, fresh images", under(shared, position), fresh, joint_seconds / len(bench.few)),
            ("held-out split", half, few[1::2], once_half),
        ):
            (value, stderr), seconds = _timed(partial(bench.divergence, law, p, images))
            note(kind, name, value, stderr, seconds)
            found[kind].once += cost
    for kind, (judge, once) in _judges(data).items():
        found[kind].once = once
        for samples, drawing in drawn:
            weights, judging = _timed(partial(judge, samples))
            measured = share_measurement(weights[:, columns])
            for name, value, stderr in zip(metrics, measured.metrics, measured.stderrs, strict=True):
                note(kind, name, value, stderr, drawing + judging)
    shares = {
        name: (math.exp(-metric), stderr * math.exp(-metric))
        for name, metric, stderr in zip(metrics, truth.metrics, truth.stderrs, strict=True)
    }
    return shares, found


def _judges(data: ConstrainedData) -> dict[str, tuple[Judge, float]]:
    """By kind of estimate, who labels samples and the seconds of training them."""
    ours, once = _timed(partial(training_labeller, data))
    judges = {"on-policy": (ours.label, once)}
    if data.reference_mixture is None:
        (plain, confusion), once = _timed(partial(plain_classifier, data))

        def adjusted(samples: np.ndarray) -> np.ndarray:
            weights = plain(samples) @ np.linalg.inv(confusion)
            return weights - np.minimum(weights.mean(0), 0.0)  # a negative count has no logarithm

        judges |= {"on-policy, plain": (plain, once), "on-policy, adjusted": (adjusted, once)}
    return judges


def _timed(call: Callable[[], object]):
    start = time.perf_counter()
    return call(), time.perf_counter() - start


def _table(name: str, shares: dict[str, tuple[float, float]], found: dict[str, Found]) -> Table:
    true = ", ".join(f"{key} {share:.4f} +- {stderr:.4f}" for key, (share, stderr) in shares.items())
    table = Table(title=f"{name}: estimates of -log share (nats); true shares {true}")
    for column in ("estimator", "bias", "worst", "s.e.", "s", "s.e. sqrt(s)", "once, s"):
        table.add_column(column, justify="left" if column == "estimator" else "right")
    for kind, one in found.items():
        stderr, seconds = float(np.mean(one.stderrs)), float(np.mean(one.seconds))
        table.add_row(
            kind,
            f"{np.mean(one.biases):+.2f}",
            f"{max(one.biases, key=abs):+.2f}",
            f"{stderr:.2f}",
            f"{seconds:.2f}",
            f"{stderr * math.sqrt(seconds):.2f}",
            f"{one.once:.0f}",
        )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="mixture,digits", help="comma-separated cases")
    parser.add_argument("--quick", action="store_true", help="a few steps of everything: the numbers mean nothing")
    options = parser.parse_args()
    torch.set_num_threads(1)
    console, figures, start = Console(width=130), {}, time.perf_counter()
    for name in options.only.split(","):
        shares, found = measure((QUICK if options.quick else CASES)[name], options.seed)
        console.print(_table(name, shares, found), highlight=False)
        for kind, one in found.items():
            key = f"{name}_{kind.replace(', ', '_').replace(' ', '_').replace('-', '_')}"
            figures |= {f"{key}_bias": np.mean(one.biases), f"{key}_worst": max(one.biases, key=abs)}
            figures |= {f"{key}_stderr": np.mean(one.stderrs), f"{key}_seconds": np.mean(one.seconds)}
    console.print(f"{(time.perf_counter() - start) / 60:.1f} minutes")
    closing_line("share_estimators", figures)


if __name__ == "__main__":
    main()
