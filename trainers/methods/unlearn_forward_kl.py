"""Forward-KL unlearning: min KL(q||p) subject to KL(q^i||p) >= b_i; q includes what is to be forgotten.

The Lagrangian of the denoising losses is ``loss_main - sum_i lambda_i loss_i``; its minimiser at every noise level is the
noise prediction of ``(q - sum_i lambda_i q^i) / (1 - sum_i lambda_i)``. It exists while that density is not negative: the
multiplier of a forget set stays below the set's mass in q, and one held at that cap says that the threshold is out of
reach. Caps a set are enough for sets that do not overlap; others are refused. Forgetting sample by sample is one set a
sample.

The cap of a single image is tiny. Two options bound the pull away from the forget sets by other means and lift the caps;
multipliers are then weights of any size:

* ``gradient_norm``: the gradient of the forget loss is rescaled to this norm c, as in SISS ``g = g_x - (c / |g_a|) g_a``.
  With several sets g_a is the gradient of the average of their losses weighted by the multipliers, and c is multiplied
  by the multipliers' sum. An optimum keeps its model, not its multipliers.
* ``loss_ceiling``: forget losses above it have no gradient.

Source: methods.md 6, 8 and H3; gradient norm: Alberti et al., Data Unlearning in Diffusion Models, ICLR 2025.
"""

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any, ClassVar

import numpy as np
import torch
from torch import distributed

from dualsweep.constraints import Capped, Constraint, DualDomain, NonNegative
from dualsweep.constraints.closed_forms import forward_kl_unlearning_multipliers
from dualsweep.datasets import ConstrainedData, DatasetSpec, DatasetSummary, SetSpec, build
from dualsweep.trainers.formulations import ForwardKL
from dualsweep.trainers.methods.base import Batch, PrimalTerms
from dualsweep.trainers.methods.denoising import denoising_terms, stream_weights, weighted_sum
from dualsweep.trainers.methods.divergences import DivergenceConstraints
from dualsweep.trainers.oracles import Oracle


class UnlearnForwardKL(DivergenceConstraints):
    name = "unlearn_forward_kl"
    units = ("share", "nats", "loss")
    at_least = True
    defaults: ClassVar = {**DivergenceConstraints.defaults, "gradient_norm": None, "loss_ceiling": None}

    @classmethod
    def check(cls, config: Mapping[str, Any], names: Sequence[str]) -> None:
        options, unit = cls.options(config["formulation"]), config["thresholds"]["unit"]
        sets = config["data"]["sets"] or {}
        listed = [name for name in names if sets.get(name) and sets[name]["samples"]]
        if unit == "nats" and listed:
            raise ValueError(
                f"thresholds.unit='nats': data.sets.{listed[0]} lists single samples, and nothing has a finite divergence "
                "from such a law; use the unit loss"
            )
        if options["gradient_norm"] is not None and config["primal"]["precision"] == "fp16":
            raise ValueError(
                "primal.precision='fp16': formulation.gradient_norm needs the gradient before its scaling; use bf16 or fp32"
            )

    @classmethod
    def check_data(cls, config: Mapping[str, Any], spec: DatasetSpec, summary: DatasetSummary) -> None:
        """Unbounded Lagrangians: sets that overlap, and fixed weights that no cap holds back."""
        if _bounded(cls.options(config["formulation"])):
            return
        remedy = "give formulation.gradient_norm or formulation.loss_ceiling"
        for one, other in combinations(summary.sets, 2):
            if not _disjoint(summary.sets[one], summary.sets[other]):
                raise ValueError(
                    f"data.sets: {one} and {other} overlap, or nobody knows that they do not (sets named by classes on "
                    "one side and by samples or means on the other): a cap a set does not keep the Lagrangian bounded; "
                    f"name disjoint classes, or disjoint samples, or {remedy}"
                )
        fixed = {f"baselines.fixed_weights={weight:g}": weight for weight in config["baselines"]["fixed_weights"]}
        if config["dual"]["rule"] == "fixed":  # other rules start inside their domain whatever they are given
            fixed[f"dual.start={config['dual']['start']:g}"] = config["dual"]["start"]
        masses = _masses(spec, summary) if any(fixed.values()) else {}
        for field, weight in fixed.items():
            for name, mass in masses.items():
                if weight >= max(mass, 1e-12):
                    raise ValueError(
                        f"{field}: at or above {mass:.4g}, the mass of set {name} in main, where the Lagrangian has no "
                        f"minimum; lower it, or {remedy}"
                    )

    def domain(self, constraints: Sequence[Constraint]) -> DualDomain:
        if _bounded(self.setting.options):
            return NonNegative()
        return Capped(tuple(self._mass(constraint.name) for constraint in constraints))

    def _mass(self, name: str) -> float:
        """The largest m with m q^i <= q: the set's share of main.

        Raises: ValueError for a set that main does not contain.
        """
        mass = _mass(self.setting.data, name)
        if not mass > 0:
            raise ValueError(
                f"data.sets.{name}: main holds nothing of it to forget; add its classes to data.main_classes"
            )
        return mass

    @classmethod
    def needs_whole_batch(cls, options: Mapping[str, Any]) -> str | None:
        return None if options["gradient_norm"] is None else "formulation.gradient_norm is that of the whole batch"

    # -- primal ---------------------------------------------------------------------------------------------------

    def primal_loss(self, denoiser: torch.nn.Module, batch: Batch, multipliers: torch.Tensor) -> PrimalTerms:
        options, normalize = self.setting.options, self.setting.optimizer.get("normalize", True)
        # Preflight and the domain see to it; looked at again where that costs no synchronisation.
        if multipliers.device.type == "cpu" and not _bounded(options) and not bool(multipliers.sum() < 1):
            raise ValueError(
                f"multipliers={multipliers.tolist()}: their sum reaches 1, beyond the mass of all sets in main, and that "
                "Lagrangian has no minimum; lower dual.start or baselines.fixed_weights"
            )
        weights = stream_weights(-multipliers, normalize=normalize and not _bounded(options))
        terms = denoising_terms(denoiser, self.setting.schedule, batch, weights)
        if not len(multipliers) or not _bounded(options):
            return terms
        kept = terms.values
        if options["loss_ceiling"] is not None:
            kept = torch.cat([kept[: batch.counts[0]], kept[batch.counts[0] :].clamp(max=options["loss_ceiling"])])
        total = multipliers.sum()
        shares = multipliers / total.clamp_min(torch.finfo(total.dtype).tiny)
        main = torch.cat([shares.new_ones(1), torch.zeros_like(shares)])
        forget = torch.cat([shares.new_zeros(1), shares])
        retained, forgotten = weighted_sum(kept, batch, main), weighted_sum(kept, batch, forget)
        if options["gradient_norm"] is not None:
            norm = gradient_norm(forgotten, denoiser)
            forgotten = forgotten * torch.where(norm > 0, options["gradient_norm"] / norm, 0.0)
        loss = retained - total * forgotten
        return PrimalTerms(loss / (1 + total) if normalize else loss, terms.values, terms.counts)

    # -- ground truth -----------------------------------------------------------------------------------------------

    def exact(self, constraints: Sequence[Constraint], rule: Mapping[str, Any]) -> Oracle | None:
        """Shares of classes (methods.md H3), also of images; divergences in nats of known laws."""
        if self.setting.options["gradient_norm"] is not None or not constraints:
            return None
        if self.setting.unit == "nats":
            caps = [self._mass(constraint.name) for constraint in constraints]
            return self.exact_divergences(constraints, rule, at_least=True, caps=caps)
        if self.setting.unit != "share" or rule["rule"] in ("resilient", "resilient_explicit"):
            return None
        data = self.setting.data
        prior = np.array([data.prior[data.constraint_classes[constraint.name]] for constraint in constraints])
        try:
            multipliers = forward_kl_unlearning_multipliers([-np.log(c.threshold) for c in constraints], prior)
        except ValueError:  # nothing would be left to take the mass: the certificate says so
            return None
        left = 1 - multipliers.sum()
        metrics = -np.log((prior - multipliers) / left)
        objective = float(prior @ (np.log(prior) + metrics) + (1 - prior.sum()) * np.log(left))
        return Oracle(
            multipliers=multipliers,
            objective=objective,
            metrics=metrics,
            log_density=self.class_density(constraints, -multipliers),
            level=None,
            dual_value=objective - float(multipliers @ (metrics + np.log([c.threshold for c in constraints]))),
        )


def gradient_norm(loss: torch.Tensor, denoiser: torch.nn.Module) -> torch.Tensor:
    """Norm of a loss's gradient in the denoiser's weights, the parts of all workers added; a constant for autograd."""
    weights = [parameter for parameter in denoiser.parameters() if parameter.requires_grad]
    gradients = torch.autograd.grad(loss, weights, retain_graph=True, allow_unused=True, materialize_grads=True)
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    if distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(flat)
    return flat.norm()


def _mass(data: ConstrainedData, name: str) -> float:
    """The largest m with m q^i <= q; 0 for a class that main lacks."""
    if name in data.constraint_classes:
        return data.prior[data.constraint_classes[name]]
    if name in data.constraint_mixtures:
        return ForwardKL(data.mixture, [data.constraint_mixtures[name]], at_least=True).domain.caps[0]
    return len(data.constraints[name]) / len(data.main)


def _masses(spec: DatasetSpec, summary: DatasetSummary) -> dict[str, float]:
    """`_mass` of every set, of images before any is read."""
    if not summary.counts:
        data = build(spec)
        return {name: _mass(data, name) for name in summary.sets}
    total = sum(part.kept for part in summary.counts.values())
    masses = {}
    for name, chosen in summary.sets.items():
        shares = [summary.prior.get(index, 0.0) for index in chosen.classes or ()]
        whole = sum(shares) if min(shares, default=0.0) > 0 else 0.0  # main has to hold all its classes
        masses[name] = whole if chosen.samples is None else len(chosen.samples) / total
    return masses


def _disjoint(one: SetSpec, other: SetSpec) -> bool:
    """Whether two sets are known to have no sample in common."""
    pairs = ((one.classes, other.classes), (one.samples, other.samples))
    return any(a is not None and b is not None and not set(a) & set(b) for a, b in pairs)


def _bounded(options: Mapping[str, Any]) -> bool:
    """Whether something other than the caps keeps the Lagrangian bounded."""
    return options["gradient_norm"] is not None or options["loss_ceiling"] is not None
