"""ESD (concept erasing), a baseline with fixed weights eta_i: distil the pretrained model minus its way to each set.

    eps_theta(x_t) <- eps_q(x_t) - sum_i eta_i (eps_i(x_t) - eps_q(x_t))

with eps_q and eps_i the pretrained model's predictions under the conditions 0 and i. At the clean end that is the score of
q prod (q/q^i)^eta_i / Z, the optimum of min KL(p||q) subject to E_p[log q^i/q] <= b_i with eta_i for multiplier. At every
other noise level a weighted sum of noisy scores is not the score of that law noised, so the samples follow another one.
Three Gaussians of std 0.4 about 3 apart, one of which (share 0.4) is erased; exact noise predictions, DDIM with 200 steps:

    eta                                0.25    0.5      1        2        4
    share left, law above              1e-4    8e-10    6e-25    1e-73    2e-244
    share left, sampled                0.29    0.20     0.10     0.03     0.002
    KL(p||q) of the law, nats          2.3     7.6      29       114      451
    mode (1.5, -0.8) moves, law        0.75    1.5      3        6        12       along x: eta times the distance
    mode (1.5, -0.8) moves, sampled    0.6     1.3      2.6      5.4      11

Erasing is far slower than the law says, and what is retained is pushed away. Nothing holds a multiplier back: there is no
measured threshold in ESD, so its weights are fixed and swept; metrics are measured all the same.

Inputs x_t. Published is a state of the sampler at a random step, run with the frozen model (the diffusers version) or with
the model in training (the other script). The target is a function of (x_t, t), so that in a family rich enough all inputs
have the same minimiser where they reach. `inputs: samples` noises a pool of the pretrained model's samples: the frozen
sampler's states, up to its discretisation, for one forward a step. `inputs: trajectory` runs the trained model's own chain of
`num_sampling_steps` steps, noise included, and takes one state of each run; it also reaches where the retained modes move
to. Measured on examples/gmm_esd.yaml, seed 0, samples against trajectory, mean ratio left: 0.725 and 0.726 at eta 0.25, 0.283
and 0.288 at 1, 0.016 and 0.011 at 4; three times the time. The exact predictions above leave 0.71, 0.26 and 0.005 and move
the mode to 4.1 at eta 1, the trained model to 3.3 with either: eps_i is asked far outside what it was trained on.
Source: Gandikota et al., Erasing Concepts from Diffusion Models, ICCV 2023; methods.md 9 and H2.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import torch

from dualsweep.constraints import Constraint
from dualsweep.trainers.chains import build_chain
from dualsweep.trainers.evaluate import EVALUATION_COUNTER
from dualsweep.trainers.labellers import Labeller
from dualsweep.trainers.methods.base import Batch, Method, Objective, PrimalTerms, device_constant
from dualsweep.trainers.methods.denoising import mean_squares
from dualsweep.trainers.metrics import Draws, Measurement, mean_measurement
from dualsweep.trainers.oracles import Oracle, log_likelihood_constrained
from dualsweep.trainers.ratios import likelihood_ratios, log_density_ratio, ratio_draws
from dualsweep.trainers.samplers import starting_noise

POOL_COUNTER = EVALUATION_COUNTER + 2  # the starts of the pool
OBJECTIVE_COUNTER = EVALUATION_COUNTER + 3
OBJECTIVE_SAMPLES = 2048
SCALE_COUNTER = EVALUATION_COUNTER + 4
SCALE_SAMPLES = 2048  # of the pretrained model, whose mean ratio is 1 by definition


class ESD(Method):
    name = "esd"
    units = ("likelihood_ratio",)  # E_p[log q^i/q] starts below 0, where no threshold in nats may lie
    defaults: ClassVar[Mapping[str, Any]] = {"inputs": "samples", "pool": 8192, "num_sampling_steps": 20, "levels": 32}
    conditional = True
    objective_name = "squared distance of the noise prediction from the pretrained model's"
    starts_optimal = True

    @classmethod
    def check(cls, config: Mapping[str, Any], names: Sequence[str]) -> None:
        rule = config["dual"]["rule"]
        if rule != "fixed":
            raise ValueError(
                f"dual.rule={rule!r}: esd has fixed weights; use rule: fixed with dual.start for the weight, and sweep it "
                "with baselines.fixed_weights"
            )
        inputs = cls.options(config["formulation"])["inputs"]
        if inputs == "noise":
            raise ValueError(f"formulation.inputs={inputs!r}: esd distils at samples or trajectory; use one of them")

    @property
    def conditions(self) -> list[int]:
        """The pretrained model's condition of each constraint's set.

        Raises: ValueError if the model was not trained on the sets.
        """
        sets = list(self.setting.data.constraints)
        known = self.setting.base.num_conditions
        if known <= len(sets):
            raise ValueError(
                f"model.pretrained: the model knows {known} conditions, esd needs {1 + len(sets)}, one for main and one "
                "a set; remove model.pretrained to train one"
            )
        return [1 + sets.index(name) for name in self.setting.names]

    # -- primal ---------------------------------------------------------------------------------------------------

    @property
    def _rolls_out(self) -> bool:
        return self.setting.options["inputs"] == "trajectory"

    @property
    def noise_shape(self) -> tuple[int, ...]:
        shape = self.setting.data.sample_shape
        return (self.setting.options["num_sampling_steps"] + 1, *shape) if self._rolls_out else shape

    def streams(self) -> dict[str, tuple[torch.Tensor, int]]:
        """One stream: the pool; of a trajectory only the noise is used."""
        return {
            "main": (
                self.setting.tensors["main"] if self._rolls_out else self.pool,
                self.setting.optimizer["batch_size"],
            )
        }

    @property
    def pool(self) -> torch.Tensor:
        """Samples of the pretrained model, drawn once a worker process; the same on every worker."""
        cache = self.setting.cache
        if "pool" not in cache:
            steps = self.setting.measure["num_sampling_steps"]
            cache["pool"] = self._drawn(self.setting.base, POOL_COUNTER, self.setting.options["pool"], steps)
        return cache["pool"]

    def _drawn(self, denoiser: torch.nn.Module, counter: int, count: int, num_sampling_steps: int) -> torch.Tensor:
        setting, shape = self.setting, self.setting.data.sample_shape
        start = starting_noise(seed=setting.seed, counter=counter, shards=[0], counts={0: count}, shape=shape)
        samples = self.sample(denoiser, torch.zeros(0), start, num_sampling_steps=num_sampling_steps)
        return samples.clone().to(setting.device)  # a plain tensor: the sampler's belong to inference mode

    def primal_loss(self, denoiser: torch.nn.Module, batch: Batch, multipliers: torch.Tensor) -> PrimalTerms:
        """Mean squared distance from the target, over 1 + sum of multipliers if normalised.

        It is ``d + sum_i eta_i c_i`` plus a constant, where d is the squared distance from eps_q and c_i is twice the inner
        product of eps_theta - eps_q with eps_i - eps_q: these are the rows of values.
        """
        setting = self.setting
        x_t, timestep = self._inputs(denoiser, batch)
        of_q, directions = self._answers(x_t, timestep)
        prediction = denoiser(x_t, timestep).float()
        with torch.autocast(x_t.device.type, enabled=False):  # it would round the target to half precision
            target = of_q - torch.einsum("i,i...->...", multipliers, directions)
        losses = mean_squares(prediction, target)
        weight = 1.0 / batch.global_counts[0]
        if setting.optimizer.get("normalize", True):
            weight = weight / (1.0 + multipliers.sum())
        away = prediction.detach() - of_q
        slopes = 2 * (away * directions).flatten(2).mean(2)
        values = torch.cat([mean_squares(away, torch.zeros_like(away)), slopes.flatten()])
        return PrimalTerms(losses.sum() * weight, values, (len(losses),) * (1 + len(multipliers)))

    @torch.no_grad()
    def _inputs(self, denoiser: torch.nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        schedule = self.setting.schedule
        if not self._rolls_out:
            return schedule.add_noise(batch.x_0, batch.noise, batch.timestep), batch.timestep
        chain = build_chain(schedule, self.setting.options["num_sampling_steps"])
        states = chain.rollout(denoiser, batch.noise)
        step = batch.timestep * chain.steps // schedule.num_train_timesteps  # uniform, as the timestep is
        taken = states[step, torch.arange(len(step), device=step.device)]
        return taken, torch.from_numpy(chain.timesteps).to(step.device)[step]

    @torch.no_grad()
    def _answers(self, x_t: torch.Tensor, timestep: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The pretrained model's eps_q, and eps_i - eps_q of every set on a leading axis, in one forward."""
        laws = device_constant((0, *self.conditions), x_t.device, torch.int64)
        copies = x_t.repeat(len(laws), *[1] * (x_t.ndim - 1))
        answers = self.setting.base(copies, timestep.repeat(len(laws)), laws.repeat_interleave(len(x_t)))
        of_q, of_sets = answers.float().view(len(laws), *x_t.shape).tensor_split([1])
        return of_q[0], of_sets - of_q

    # -- measurement ------------------------------------------------------------------------------------------------

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
        """q^i/q of the model's own samples by the pretrained model, over the mean on its own; then that mean's relative error.

        A column a set each, first the ratios. An untouched model reads 1, whatever the conditional model misses.
        """
        setting = self.setting
        if not setting.names:
            return None
        draws = ratio_draws(
            self.sample,
            denoiser,
            multipliers,
            setting.base,
            setting.schedule,
            self.conditions,
            levels=setting.options["levels"],
            seed=setting.seed,
            counter=counter,
            shards=shards,
            counts=counts,
            shape=setting.data.sample_shape,
            num_sampling_steps=num_sampling_steps,
        )
        means, errors = self._scale(num_sampling_steps)
        return replace(draws, rows=np.hstack([draws.rows / means, np.broadcast_to(errors, draws.rows.shape)]))

    def _scale(self, num_sampling_steps: int) -> tuple[np.ndarray, np.ndarray]:
        """Mean ratios on the pretrained model's own samples and their relative standard errors, (num_constraints,) each.

        Raises: ValueError where no sample of the pretrained model is anywhere near a set.
        """
        setting, key = self.setting, ("esd scale", self.setting.names, num_sampling_steps)
        if key not in setting.cache:
            count = min(SCALE_SAMPLES, setting.options["pool"])
            ratios = likelihood_ratios(
                setting.base,
                self._drawn(setting.base, SCALE_COUNTER, count, num_sampling_steps),
                setting.schedule,
                conditions=self.conditions,
                levels=setting.options["levels"],
                seed=setting.seed,
            )
            found = mean_measurement(ratios.cpu().numpy())
            for name, mean in zip(setting.names, found.metrics, strict=True):
                if not mean > 0:
                    raise ValueError(
                        f"data.sets.{name}: its likelihood ratio is 0 on all {count} samples of the pretrained model, which "
                        "leaves nothing to erase; remove the set, or raise formulation.pool"
                    )
            setting.cache[key] = (np.array(found.metrics), np.array(found.stderrs) / found.metrics)
        return setting.cache[key]

    def measurement(self, rows: np.ndarray, multipliers: np.ndarray) -> Measurement:
        """Mean ratios; what is not known of the pretrained model's own is part of their standard errors."""
        ratios, errors = np.split(rows, 2, axis=1)
        found = mean_measurement(ratios)
        return replace(found, stderrs=np.hypot(found.stderrs, np.array(found.metrics) * errors.mean(axis=0)).tolist())

    def objective(
        self, denoiser: torch.nn.Module, multipliers: torch.Tensor, *, evaluation: Mapping[str, Any], base_errors
    ) -> Objective:
        """KL(p||q) between the laws of the two models' samples, on those of the trained one."""
        count = min(evaluation["num_samples"], OBJECTIVE_SAMPLES)
        samples = self._drawn(denoiser, OBJECTIVE_COUNTER, count, evaluation["num_sampling_steps"])
        gaps = (
            log_density_ratio(
                denoiser,
                self.setting.base,
                samples,
                self.setting.schedule,
                levels=evaluation["noise_levels"],
                seed=self.setting.seed,
            )
            .values.cpu()
            .numpy()
        )
        meaning = "KL(p||q) from the pretrained model's law q, on the model's own samples"
        return Objective(float(gaps.mean()), float(gaps.std(ddof=1) / np.sqrt(count)), meaning)

    def exact(self, constraints: Sequence[Constraint], rule: Mapping[str, Any]) -> Oracle | None:
        """The law q prod (q/q^i)^eta_i / Z with its E_p[log q^i/q] as metrics: a bearing, not what is sampled (see above)."""
        if self.mixtures is None or not constraints:
            return None
        try:
            return log_likelihood_constrained(*self.mixtures, [rule.get("start", 0.0)] * len(constraints))
        except ValueError:  # no grid holds a law that far out
            return None
