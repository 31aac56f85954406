"""What alignment and likelihood-constrained unlearning share: min KL(p||q) under limits on means over the model's samples.

p and q are the laws of the stochastic chain (chains.py) under the trained and under the pretrained model, whole paths
included; its divergence is a sum over steps, known exactly at every state. A value f_i(x_0) a constraint is asked to have
a mean of at most (sign +1) or at least (sign -1) its threshold, so a path costs

    sum_k log p(x_{k+1}|x_k) / q(x_{k+1}|x_k) + sign sum_i lambda_i f_i(x_0)

and the mean cost under p is the Lagrangian. Two gradients of it:

* back-propagation: through the states of the chain, with the parameters inside log p held still: the term left out is a
  score, whose mean is zero (sticking the landing).
* policy: score function. Step k is weighed with the cost of itself and what follows it, less a baseline of its state.

In both the log ratios are those of the path drawn, not their means, because at the optimum the cost of every path is then
the same, -log Z: the noise vanishes as training arrives. On three Gaussians of the plane the variance of the policy gradient
near the optimum was 11 times (alignment) and 4 times (unlearning) below that with means, and at the start no larger.

Source: DPOK (Fan et al., NeurIPS 2023) for the policy gradient with a divergence; Richter et al., VarGrad, NeurIPS 2020,
for the sampled log ratios; Roeder, Wu and Duvenaud, Sticking the Landing, NeurIPS 2017; methods.md 3, 7 and 11.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from dualsweep.constraints import NonFiniteError
from dualsweep.trainers.chains import Chain, build_chain, chain_timesteps, prediction_errors, save_chain
from dualsweep.trainers.estimators import Predictor, log_normalizer
from dualsweep.trainers.evaluate import EVALUATION_COUNTER
from dualsweep.trainers.labellers import Labeller
from dualsweep.trainers.methods.base import CALIBRATION_COUNTER, Batch, Method, Objective, PrimalTerms
from dualsweep.trainers.metrics import Draws, Measurement, mean_and_stderr, mean_measurement
from dualsweep.trainers.models import Denoiser
from dualsweep.trainers.noise_schedule import NoiseSchedule
from dualsweep.trainers.samplers import starting_noise

POOL_COUNTER = CALIBRATION_COUNTER + 1
OBJECTIVE_COUNTER = CALIBRATION_COUNTER + 2
ERROR_SAMPLES = 4096  # of the main data, for the variance of the chain: known to 1 percent a step
PART = 1024  # paths drawn at once where nothing is differentiated
BASELINE_DIM = 8  # up to here the baseline is a regression, above a mean
ROWS_A_FEATURE = 8  # fewer paths a step than this many times the features: the mean, too
RIDGE = 1e-3
LEAST_EFFECTIVE_SHARE = 0.5  # of a batch, by its weights, for controls to be worth their noise
LARGEST_EXPONENT = 20.0  # of a weight between two path laws: never reached but by a model gone astray


class OnPolicy(Method):
    """A formulation whose primal step runs the chain of the current model.

    A subclass says what is constrained (`raw_values`) and in which unit (`scales`).
    """

    needs_sets = False
    starts_optimal = True
    objective_name = "KL(p||q) of the model's chain from the pretrained one's"
    defaults: ClassVar[Mapping[str, Any]] = {"num_sampling_steps": 24, "pool": 8192}
    sign: float  # of the constrained values in the Lagrangian: +1.0 where they are to fall, -1.0 where they are to rise

    @classmethod
    def check(cls, config: Mapping[str, Any], names: Sequence[str]) -> None:
        chain_timesteps(NoiseSchedule(**config["schedule"]), cls.options(config["formulation"])["num_sampling_steps"])

    # -- what a subclass gives ---------------------------------------------------------------------------------------

    def raw_values(self, samples: torch.Tensor, noises: torch.Tensor) -> torch.Tensor:
        """f_i of every sample before scaling, (num_constraints, n).

        Args:
            samples: (n, *sample_shape), with a graph in back-propagation.
            noises: those of the samples' paths, for a subclass that needs random numbers to be told apart by.
        """
        raise NotImplementedError(f"{type(self).__name__} gives no values to constrain")

    def scales(self, raw: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What is subtracted from raw values and what they are then divided by, (num_constraints, 1) each.

        Args:
            raw: values of the pretrained chain's pool, float64 (num_constraints, pool).
        """
        raise NotImplementedError(f"{type(self).__name__} gives no unit")

    def unit_influence(self, pool: np.ndarray, metrics: np.ndarray) -> np.ndarray:
        """How far each sample of the pool moves the metrics by way of the unit, times their number; (num_constraints, pool).

        Args:
            pool: scaled values of the pretrained chain, (num_constraints, pool).
            metrics: means of scaled values, (num_constraints, 1).
        """
        raise NotImplementedError(f"{type(self).__name__} gives no unit")

    @property
    def backpropagates(self) -> bool:
        return False

    @property
    def objective_scale(self) -> float:
        """Nats, which add up over the elements of a sample."""
        return float(math.prod(self.setting.data.sample_shape))

    # -- the pretrained chain -----------------------------------------------------------------------------------------

    @cached_property
    def chain(self) -> Chain:
        """Its variances are measured once a process, from the pretrained model on main data."""
        setting, steps = self.setting, self.setting.options["num_sampling_steps"]
        key = ("chain", steps)
        if key not in setting.cache:
            errors = prediction_errors(
                setting.base,
                setting.tensors["main"][:ERROR_SAMPLES],
                setting.schedule,
                chain_timesteps(setting.schedule, steps)[:-1],
                seed=setting.seed,
            )
            setting.cache[key] = build_chain(setting.schedule, steps, errors)
        return setting.cache[key]

    @cached_property
    def _pool(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Shift, scale (num_constraints, 1) and scaled values (num_constraints, pool) of the pretrained chain, float64."""
        key = ("pool", self.name, self.setting.names)
        if key not in self.setting.cache:
            paths = self._paths(self.setting.base, self.setting.options["pool"], POOL_COUNTER)
            raw = torch.cat([self.raw_values(states[-1], noises).double() for states, noises in paths], dim=1)
            bad = (~torch.isfinite(raw)).sum(1).tolist()
            if any(bad):  # kept, they would spoil the unit of every trial to come
                named = dict(zip(self.setting.names, bad, strict=True))
                raise NonFiniteError(f"non-finite values on {named} of {raw.shape[1]} samples of the pretrained model")
            shift, scale = self.scales(raw)
            self.setting.cache[key] = (shift, scale, (raw - shift) / scale)
        return self.setting.cache[key]

    def values(self, samples: torch.Tensor, noises: torch.Tensor) -> torch.Tensor:
        """The constrained values in the constraints' unit, (num_constraints, n)."""
        shift, scale, _ = self._pool
        raw = self.raw_values(samples, noises)
        return (raw - shift.to(raw)) / scale.to(raw)

    @torch.no_grad()
    def _paths(
        self, denoiser: torch.nn.Module, count: int, counter: int
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Fresh paths of a model in parts: states as the chain gives them, and the noises (n, *noise_shape) behind them."""
        was_training = denoiser.training
        denoiser.eval()
        for part, start in enumerate(range(0, count, PART)):
            sizes = {part: min(PART, count - start)}
            noises = starting_noise(
                seed=self.setting.seed, counter=counter, shards=[part], counts=sizes, shape=self.noise_shape
            ).to(self.setting.device)
            yield self.chain.rollout(denoiser, noises), noises
        denoiser.train(was_training)

    @classmethod
    def needs_whole_batch(cls, options: Mapping[str, Any]) -> str | None:
        return "the baseline of a path is the mean over all others"

    # -- primal ---------------------------------------------------------------------------------------------------------

    @property
    def noise_shape(self) -> tuple[int, ...]:
        return (self.setting.options["num_sampling_steps"] + 1, *self.setting.data.sample_shape)

    def streams(self) -> dict[str, tuple[torch.Tensor, int]]:
        """One stream of noise; the single sample that comes with it is not looked at."""
        return {"trajectory": (torch.zeros(1, 1, device=self.setting.device), self.setting.optimizer["batch_size"])}

    def primal_loss(self, denoiser: torch.nn.Module, batch: Batch, multipliers: torch.Tensor) -> PrimalTerms:
        """Either gradient; the mean loss is the Lagrangian in back-propagation alone."""
        make = self._through_the_chain if self.backpropagates else self._policy
        losses, divergences, log_ratios, values = make(denoiser, batch, multipliers)
        weight = 1.0 / batch.global_counts[0]
        if self.setting.optimizer.get("normalize", True):
            weight = weight / (1.0 + multipliers.sum())
        values = self.controlled(values.detach(), log_ratios.detach(), multipliers, batch)
        rows = torch.cat([divergences.detach()[None], values.to(divergences)])
        return PrimalTerms(losses.sum() * weight, rows.flatten(), (rows.shape[1],) * len(rows))

    def _through_the_chain(self, denoiser, batch, multipliers):
        # The wrapped module runs every step: its gradients are summed over workers in one backward.
        chain, states = self.chain, self.chain.rollout(denoiser, batch.noise)
        means = chain.means(states, chain.predictions(_standing_still(denoiser), states))
        others = chain.means(states, chain.predictions(self.setting.base, states))
        log_ratios = chain.log_ratios(states, means, others).sum(0)
        divergences = chain.divergences(means, others).sum(0)
        values = self.values(states[-1], batch.noise)
        return log_ratios + self._priced(values, multipliers), divergences, log_ratios, values

    def _policy(self, denoiser, batch, multipliers):
        chain = self.chain
        with torch.no_grad():
            # The bare module: a wrapper expects a backward after every forward.
            states = chain.rollout(getattr(denoiser, "module", denoiser), batch.noise)
            of_base = chain.predictions(self.setting.base, states)
            others, clean = chain.means(states, of_base), chain.clean(states, of_base)
            values = self.values(states[-1], batch.noise)
        means = chain.means(states, chain.predictions(denoiser, states))
        with torch.no_grad():
            divergences = chain.divergences(means, others)
            log_ratios = chain.log_ratios(states, means, others)
            costs = log_ratios.flip(0).cumsum(0).flip(0) + self._priced(values, multipliers)
            advantages = costs - self.baseline(costs, states, clean, batch)
        losses = (advantages * chain.log_probs(states, means)).sum(0)
        return losses, divergences.sum(0), log_ratios.sum(0), values

    def _priced(self, values: torch.Tensor, multipliers: torch.Tensor) -> torch.Tensor:
        return self.sign * (multipliers.to(values)[:, None] * values).sum(0)

    def baseline(self, costs: torch.Tensor, states: torch.Tensor, clean: torch.Tensor, batch: Batch) -> torch.Tensor:
        """What the remaining cost of every step is expected to be, (steps, n), from other paths than its own.

        Vectors: a regression a step on polynomials of the state and of the x_0 that the pretrained model predicts from it,
        fitted on one half of the batch and used on the other. Images, and small batches: the mean of the other paths.
        The halves are drawn by the stream, and sums run over all workers, so their number makes no difference.
        """
        dim, count = states[0, 0].numel(), batch.global_counts[0]
        if dim <= BASELINE_DIM:
            features = polynomials(states[:-1].flatten(2), clean.flatten(2))
            if count >= ROWS_A_FEATURE * features.shape[2]:
                return cross_fitted(costs, features, batch.timestep % 2 == 0, self.sum_over_workers)
        total = self.sum_over_workers(costs.sum(1, keepdim=True))
        return (total - costs) / max(count - 1, 1)

    def controlled(
        self, values: torch.Tensor, log_ratios: torch.Tensor, multipliers: torch.Tensor, batch: Batch
    ) -> torch.Tensor:
        """The same values with the noise taken out that the pool knows the mean of, (num_constraints, n).

        With w = exp(-log p/q of a path) and u = -sign lambda . f, the weight w exp(u) turns a mean under p into one under
        the pretrained chain: E_p[w exp(u) (1, f)] = E_q[exp(u) (1, f)], which the pool holds. Their difference is a control
        variate; its coefficients are fitted on the other half of the batch. At the optimum the weight is constant and f
        itself is known: near it, on three Gaussians of the plane, the variance of the mean fell by a factor of 60. Far from
        it, where few paths hold most of the weight, the values stay as they are.

        Means are then relative to the pretrained chain's own, not to those of the finite pool.
        """
        if batch.global_counts[0] < 4 * ROWS_A_FEATURE * (2 + len(values)):
            return values
        tilt, known = self._tilted_pool(multipliers)
        exponents = -log_ratios - self._priced(values, multipliers) - tilt.to(values)
        weights = exponents.clamp(-LARGEST_EXPONENT, LARGEST_EXPONENT).exp()
        total, squares = self.sum_over_workers(torch.stack([weights.sum(), weights.square().sum()]))
        if total.square() < LEAST_EFFECTIVE_SHARE * batch.global_counts[0] * squares:
            return values
        controls = torch.cat([weights[None], weights * values]) - known.to(values)[:, None]
        features = torch.cat([torch.ones_like(weights)[None], controls]).T.expand(len(values), -1, -1)
        return values - cross_fitted(values, features, batch.timestep % 2 == 0, self.sum_over_workers, skip=1)

    def _tilted_pool(self, multipliers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """log E_q[exp(u)], and E_q[exp(u) (1, f)] over E_q[exp(u)], (1 + num_constraints,)."""
        values = self._pool[2]
        exponents = -self._priced(values, multipliers)
        weights = torch.softmax(exponents, dim=0)
        tilt = torch.logsumexp(exponents, dim=0) - math.log(len(exponents))
        return tilt, torch.cat([torch.ones_like(weights[:1]), (values * weights).sum(1)])

    @staticmethod
    def sum_over_workers(values: torch.Tensor) -> torch.Tensor:
        from accelerate.utils import reduce  # here: see NoiseSchedule

        return reduce(values, "sum")

    # -- measurement ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def measure(
        self,
        denoiser: torch.nn.Module,
        multipliers: torch.Tensor,
        *,
        counter: int,
        shards: Sequence[int],
        counts: Mapping[int, int],
        num_sampling_steps: int,
        labeller: Labeller | None = None,
    ) -> Draws | None:
        """Scaled values of fresh paths; None while training, where those of the primal steps are the metrics."""
        if counter < EVALUATION_COUNTER or not self.setting.names:
            return None
        paths = self._paths(denoiser, sum(counts[shard] for shard in shards), counter)
        drawn = [(self.values(states[-1], noises), states[-1]) for states, noises in paths]
        values, samples = zip(*drawn, strict=True)
        return Draws(torch.cat(values, dim=1).T.double().cpu().numpy(), torch.cat(samples).cpu())

    def measurement(self, rows: np.ndarray, multipliers: np.ndarray) -> Measurement:
        """Of an evaluation: means, with what the pool leaves open about the unit in their standard errors."""
        found, pool = mean_measurement(rows), self._pool[2].cpu().numpy()
        influence = self.unit_influence(pool, np.array(found.metrics)[:, None])
        of_unit = influence.std(axis=1, ddof=1) / math.sqrt(pool.shape[1])
        return replace(found, stderrs=np.hypot(found.stderrs, of_unit).tolist())

    def calibrate(self) -> Measurement:
        """Of the pool that defines the unit."""
        return mean_measurement(self._pool[2].T.cpu().numpy())

    @torch.no_grad()
    def objective(self, denoiser: torch.nn.Module, multipliers: torch.Tensor, *, evaluation, base_errors) -> Objective:
        chain, found = self.chain, []
        for states, noises in self._paths(denoiser, evaluation["num_samples"], OBJECTIVE_COUNTER):
            others = chain.means(states, chain.predictions(self.setting.base, states))
            found.append(chain.divergences(chain.drawn_means(states, noises), others).sum(0).double())
        values = torch.cat(found).cpu().numpy()
        value, stderr = mean_and_stderr(values.sum(), np.square(values).sum(), len(values))
        return Objective(value, stderr, "KL(p||q) of the chain's paths, on fresh draws")

    def sample(
        self,
        denoiser: torch.nn.Module,
        multipliers: torch.Tensor,
        start: torch.Tensor,
        *,
        num_sampling_steps: int,
        batch_size: int | None = None,
    ) -> torch.Tensor:
        """Samples of the chain that was trained; its number of steps is the formulation's."""
        drawn = self.chain.sample(
            denoiser, start.to(self.setting.device), seed=self.setting.seed, batch_size=batch_size
        )
        return drawn.cpu()

    def save(self, denoiser: Denoiser, multipliers: torch.Tensor, folder: Path) -> None:
        """The model and its chain: other samplers of it draw from other laws."""
        super().save(denoiser, multipliers, folder)
        save_chain(self.chain, folder)

    def dual_value(self, multipliers: np.ndarray) -> tuple[float, float]:
        """-log E_q[exp(-sign lambda . f)] over the pretrained chain's pool (methods.md H4, H5)."""
        values = self._pool[2].cpu().numpy()
        log_z, stderr = log_normalizer(-self.sign * (multipliers @ values))
        return -log_z, stderr


def _standing_still(denoiser: torch.nn.Module) -> Predictor:
    """The same function of states and timesteps, with a graph to the states and none to the parameters."""
    module = getattr(denoiser, "module", denoiser)
    parameters = {name: parameter.detach() for name, parameter in module.named_parameters()}
    return lambda x_t, timestep: torch.func.functional_call(module, parameters, (x_t, timestep))


def polynomials(states: torch.Tensor, clean: torch.Tensor) -> torch.Tensor:
    """Features of a step's state and of the x_0 predicted from it: 1, both, their squares, products and cubes of the latter.

    Args:
        states, clean: (steps, n, dim).
    Returns: (steps, n, num_features), 12 in the plane.
    """
    first, second = torch.triu_indices(clean.shape[2], clean.shape[2], offset=1, device=clean.device)
    products = clean[..., first] * clean[..., second]
    one = torch.ones_like(states[..., :1])
    return torch.cat([one, states, states.square(), clean, clean.square(), products, clean**3], dim=2)


def cross_fitted(
    targets: torch.Tensor,
    features: torch.Tensor,
    first: torch.Tensor,
    total: Callable[[torch.Tensor], torch.Tensor],
    *,
    skip: int = 0,
) -> torch.Tensor:
    """Ridge regressions, one a step, fitted on one half of the samples and read off at the other half, (steps, n).

    Args:
        targets: (steps, n).
        features: (steps, n, num_features).
        first: bool (n,), the samples of the first half.
        total: sums a tensor over workers.
        skip: so many of the first features are fitted but not read off.
    """
    halves = [first, ~first]
    wide, columns = features.double(), targets.double()[..., None]
    moments = [wide[:, half].mT @ torch.cat([wide[:, half], columns[:, half]], dim=2) for half in halves]
    moments = total(torch.stack(moments))
    gram, products = moments[..., :-1], moments[..., -1:]
    scale = torch.diagonal(gram, dim1=-2, dim2=-1)
    # In units of each feature's own size; the last term is for a half that holds no sample.
    ridge = torch.diag_embed(RIDGE * scale + torch.finfo(scale.dtype).tiny)
    coefficients = torch.linalg.solve(gram + ridge, products).to(features.dtype)
    fitted = torch.empty_like(targets)
    for half, others in zip(halves, coefficients.flip(0), strict=True):
        fitted[:, half] = (features[:, half, skip:] @ others[:, skip:]).squeeze(2).to(targets.dtype)
    return fitted
