"""DUO: unlearning from pairs (x+ preferred, x- rejected) by Diffusion-DPO, with the prior preserved as a constraint.

    min_p  E[-log sigmoid(beta (log p/q(x+) - log p/q(x-)))]   subject to   KL(q||p) <= eps

q is the pretrained model's law, that of main. The pairs are row k of the set `preferred` with row k of `rejected`. Such
preferences are deterministic: by itself the loss has no finite optimum, the margin log p/q(x+) - log p/q(x-) grows until
training stops (published: after a tuned number of steps, with a fixed weight on the prior). The constraint is what makes the
problem well posed; constraints/preference.py has its optimum where the pairs are components of q.

The unit of the threshold says which form is trained:

* nats: log p/q(x) = 1/2 int E[|eps - eps_q|^2 - |eps - eps_p|^2] d log SNR. A pair takes `levels` timesteps, one from each
  part of the log-SNR range of equal length, with the same noise for x+ and x-, averaged inside the sigmoid. Its optimum is
  the one above but for the noise left inside: -log sigmoid is convex, so the loss of a noisy margin is too high, and a
  large margin is noisier than a small one. Most of that is taken out by halves (`_preference_losses`). With the exact
  predictions of three Gaussians and margins of 0.75 to 1.5 nats, the gradient along the optimal path was too small by 11 to
  13 percent at 16 levels and 6 to 7 at 32; with the halves by 4 to 6 and by 1.4 to 2.5. The constraint is the point KL of the
  pretrained model from this one, on noised samples of main.
* loss: as published. One uniform timestep a pair, means over elements instead of sums, no log-SNR weight: a beta of hundreds.
  By Jensen's inequality its mean over timesteps lies above the loss of the mean margin; it has another optimum, unknown.
  Timestep and noise are shared by x+ and x- (published: the noise alone). The constraint is the mean squared distance of
  the two predictions on pure noise at the last timestep.

Source: Park et al., Direct Unlearning Optimization, NeurIPS 2024, with the signs of their code (methods.md 10); Wallace et
al., Diffusion Model Alignment Using Direct Preference Optimization, CVPR 2024.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch
from torch.nn import functional

from dualsweep.constraints import Constraint
from dualsweep.constraints.preference import preference_optimum
from dualsweep.trainers.estimators import log_likelihood_ratio, point_kl, sample_timesteps
from dualsweep.trainers.methods.base import Batch, Method, Objective, PrimalTerms, Setting
from dualsweep.trainers.methods.denoising import mean_squares
from dualsweep.trainers.metrics import Measurement, mean_measurement
from dualsweep.trainers.oracles import Oracle

PAIR = ("preferred", "rejected")
HELD_OUT_SAMPLES = 8192
HELD_OUT_LEVELS = 64


class DUO(Method):
    name = "duo"
    units = ("nats", "loss")
    defaults: ClassVar[Mapping[str, Any]] = {"beta": 1.0, "levels": 16}
    objective_name = "preference loss"

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        preferred, rejected = (setting.tensors[name] for name in PAIR)
        if len(preferred) != len(rejected):
            raise ValueError(
                f"data.sets: preferred has {len(preferred)} samples, rejected {len(rejected)}: pairs need as many of each; "
                "give data.sets.*.samples lists of one length"
            )
        self.pairs = torch.stack([preferred, rejected], dim=1)  # (pairs, 2, *sample_shape)

    @classmethod
    def constraint_names(cls, set_names: Sequence[str], options: Mapping[str, Any]) -> tuple[str, ...]:
        return ("prior",)

    @classmethod
    def check(cls, config: Mapping[str, Any], names: Sequence[str]) -> None:
        given = list(config["data"].get("sets") or {})
        if sorted(given) != sorted(PAIR):
            raise ValueError(f"data.sets={given}: duo needs the two sets preferred and rejected, no others")
        unit = config["thresholds"]["unit"]
        if unit == "loss" and config["baselines"]["fixed_weights"]:
            raise ValueError(
                f"baselines.fixed_weights={list(config['baselines']['fixed_weights'])}: they are measured against the "
                "pretrained model, whose distance from itself is 0, no possible threshold of a loss; use the unit nats"
            )
        if unit == "loss" and config["formulation"].get("levels") is not None:
            raise ValueError(
                f"formulation.levels={config['formulation']['levels']}: the published loss has one timestep a pair; "
                "remove it, or use the unit nats"
            )
        levels = cls.options(config["formulation"])["levels"]
        if levels % 2:
            raise ValueError(f"formulation.levels={levels}: duo splits them into two halves; give an even number")

    # -- primal ---------------------------------------------------------------------------------------------------

    @property
    def _published(self) -> bool:
        return self.setting.unit == "loss"

    @property
    def objective_scale(self) -> float:
        """The loss of a pair grows with beta times its margin, in nats or, as published, a mean over elements."""
        elements = 1 if self._published else np.prod(self.setting.data.sample_shape)
        return float(max(1.0, self.setting.options["beta"]) * elements)

    @property
    def noise_shape(self) -> tuple[int, ...]:
        return (1 if self._published else self.setting.options["levels"], *self.setting.data.sample_shape)

    def streams(self) -> dict[str, tuple[torch.Tensor, int]]:
        """Pairs of samples in both streams: a draw of main holds two of its samples, half a `constraint_batch_size`."""
        optimizer = self.setting.optimizer
        found = {"pairs": (self.pairs, optimizer["batch_size"])}
        if self.setting.names:
            found["main"] = (self._main, max(1, optimizer["constraint_batch_size"] // 2))
        return found

    @cached_property
    def _main(self) -> torch.Tensor:
        main = self.setting.tensors["main"]
        return main[: len(main) // 2 * 2].unflatten(0, (-1, 2))

    def primal_loss(self, denoiser: torch.nn.Module, batch: Batch, multipliers: torch.Tensor) -> PrimalTerms:
        """Preference loss + multiplier * prior, over 1 + multiplier if normalised, in one forward."""
        log_ratios, distances = self._estimates(denoiser, batch)
        pairs = batch.counts[0]
        losses = self._preference_losses(log_ratios[:pairs, :, 0] - log_ratios[:pairs, :, 1])
        loss = losses.sum() / batch.global_counts[0]
        if not self.setting.names:
            return PrimalTerms(loss, losses, (pairs,))
        prior = distances[pairs:].mean(1)
        if self._published:
            prior = prior[:, :1]  # the two samples of a draw share its noise, and nothing else is looked at
        loss = loss + multipliers[0] * prior.sum() / (prior.shape[1] * batch.global_counts[1])
        if self.setting.optimizer.get("normalize", True):
            loss = loss / (1 + multipliers[0])
        prior = prior.mean(1)  # two samples of a draw share its timesteps and noise: one value of their own
        return PrimalTerms(loss, torch.cat([losses, prior]), (pairs, len(prior)))

    def _preference_losses(self, margins: torch.Tensor) -> torch.Tensor:
        """-log sigmoid(beta margin) of every pair from estimates of its margin, (pairs, 1) or (pairs, levels).

        The two halves of the levels are estimates of their own with twice the variance, so that twice the loss of the mean
        less the mean loss of the halves is free of the part of the bias in proportion to the variance.
        """
        beta = self.setting.options["beta"]
        losses = functional.softplus(-beta * margins.mean(1))
        if margins.shape[1] == 1:
            return losses
        halves = margins.unflatten(1, (2, -1)).mean(2)
        return 2 * losses - functional.softplus(-beta * halves).mean(1)

    def _estimates(self, denoiser: torch.nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """log p/q and the prior term of every sample at every level, (draws, levels, 2) each; see the module docstring."""
        schedule, elements = self.setting.schedule, batch.x_0[0, 0].numel()
        noise, timestep = batch.noise, batch.timestep[:, None]
        weight = torch.full_like(timestep, 1 / elements, dtype=torch.float32)
        if not self._published:
            half = noise.shape[1] // 2
            parts = torch.arange(half, device=timestep.device)
            shift = (timestep + 0.5) / schedule.num_train_timesteps
            # Two halves, each one timestep from every part of its range, whose union is evenly spaced as well.
            uniforms = torch.cat([(parts + shift) / half, (parts + (shift + 0.5) % 1) / half], dim=1)
            timestep, weight = sample_timesteps(schedule, uniforms)
        shape = (*noise.shape[:2], 2, *noise.shape[2:])  # draws, levels, the two samples of a draw, elements
        noise, timestep = noise.unsqueeze(2).expand(shape), timestep.unsqueeze(2).expand(shape[:3])
        x_t = schedule.add_noise(
            batch.x_0.unsqueeze(1).expand(shape).flatten(0, 2), noise.flatten(0, 2), timestep.flatten()
        ).view(shape)
        if self._published and self.setting.names:
            pairs = batch.counts[0]
            x_t = torch.cat([x_t[:pairs], noise[pairs:]])
            last = torch.full_like(timestep[pairs:], schedule.num_train_timesteps - 1)
            timestep = torch.cat([timestep[:pairs], last])
        of_model = denoiser(x_t.flatten(0, 2), timestep.flatten()).float().view(shape)
        with torch.no_grad():
            of_base = self.setting.base(x_t.flatten(0, 2), timestep.flatten()).float().view(shape)
        gap = of_model - of_base

        def weighted(values: torch.Tensor) -> torch.Tensor:
            return weight.unsqueeze(2) * values.flatten(3).sum(3)

        # |noise - base|^2 - |noise - model|^2 as a product: near the clean end the squares agree in most of their digits.
        return weighted(gap * (2 * noise - of_model - of_base)), weighted(gap.square())

    # -- measurement ------------------------------------------------------------------------------------------------

    def held_out_measurement(self, denoiser: torch.nn.Module, multipliers: torch.Tensor) -> Measurement:
        """The prior term on held-out main data with more levels, or on fresh noise at the last timestep."""
        setting = self.setting
        if self._published:
            generator = np.random.Generator(np.random.Philox(key=[setting.seed, 0xD00]))
            shape = (HELD_OUT_SAMPLES, *setting.data.sample_shape)
            noise = torch.from_numpy(generator.standard_normal(shape, dtype=np.float32)).to(setting.device)
            last = torch.full((len(noise),), setting.schedule.num_train_timesteps - 1, device=setting.device)
            with torch.no_grad():
                parts = zip(noise.split(256), last.split(256), strict=True)
                values = torch.cat([mean_squares(denoiser(*part), setting.base(*part)) for part in parts])
        else:
            samples = self._held_out(setting.data.held_out_main.samples)
            values = point_kl(
                setting.base, denoiser, samples, setting.schedule, levels=HELD_OUT_LEVELS, seed=setting.seed
            ).per_sample
        return mean_measurement(values.double().cpu().numpy()[:, None])

    def calibrate(self) -> Measurement:
        """The pretrained model does not differ from itself."""
        return Measurement([0.0], [0.0], [HELD_OUT_SAMPLES])

    def objective(
        self, denoiser: torch.nn.Module, multipliers: torch.Tensor, *, evaluation: Mapping[str, Any], base_errors
    ) -> Objective:
        """The preference loss of held-out pairs, log p/q with all the evaluation's levels in both units."""
        setting, held_out = self.setting, self.setting.data.held_out_constraints
        preferred, rejected = (
            log_likelihood_ratio(
                denoiser,
                setting.base,
                self._held_out(held_out[name]),
                setting.schedule,
                levels=evaluation["noise_levels"],
                seed=setting.seed,
            ).values
            for name in PAIR
        )
        pairs = min(len(preferred), len(rejected))
        margins = preferred[:pairs] - rejected[:pairs]
        losses = functional.softplus(-setting.options["beta"] * margins)
        return Objective(
            float(losses.mean()),
            float(losses.std() / np.sqrt(pairs)) if pairs > 1 else float("inf"),
            f"preference loss of held-out pairs (mean margin {float(margins.mean()):.3g} nats)",
            unit="loss",
        )

    def _held_out(self, samples: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(samples[:HELD_OUT_SAMPLES]).to(self.setting.device)

    def exact(self, constraints: Sequence[Constraint], rule: Mapping[str, Any]) -> Oracle | None:
        """In nats, where each set is one component of q; None for relaxed thresholds."""
        data, relaxed = self.setting.data, rule["rule"] in ("resilient", "resilient_explicit")
        if self._published or relaxed or not constraints or not set(PAIR) <= set(data.constraint_classes):
            return None
        preferred, rejected = (data.constraint_classes[name] for name in PAIR)
        if preferred == rejected or not data.prior[preferred] or not data.prior[rejected]:
            return None
        found = preference_optimum(
            preferred=data.prior[preferred],
            rejected=data.prior[rejected],
            beta=self.setting.options["beta"],
            threshold=constraints[0].threshold,
        )
        log_density = None
        if data.mixture is not None:
            shares = {index: share for index, share in sorted(data.prior.items()) if share > 0}
            shares[preferred] += found.moved
            shares[rejected] -= found.moved
            log_density = data.mixture.with_weights(list(shares.values())).log_density
        return Oracle(
            multipliers=np.array([found.multiplier]),
            objective=found.loss,
            metrics=np.array([found.divergence]),
            log_density=log_density,
            level=None,
            dual_value=found.loss,
        )
