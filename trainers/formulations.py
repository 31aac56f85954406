"""Every formulation on Gaussian mixtures of one or two dimensions: the exact model at any multipliers, by quadrature.

The minimiser p of the Lagrangian at multipliers lambda is known in closed form up to its normaliser, and so is the
concave dual function g; the integrals are sums over a grid (quadrature.py). Metrics are the user's: KL in nats, ratios
to the pretrained model, standardised rewards; none is negated for ">=".

    family          constraints        model p at lambda, s = +1 for "at most" and -1 for "at least"
    ForwardKL       KL(q^i||p)         (q + s sum lambda_i q^i) / (1 + s sum lambda)
    ReverseKL       KL(p||q^i)         (q prod (q^i)^{s lambda_i})^{1/(1 + s sum lambda)} / Z
    Tilted          E_p[f_i]           q exp(-s sum lambda_i f_i) / Z
    LogLikelihood   E_p[log q^i / q]   q prod (q / q^i)^{lambda_i} / Z: Tilted, at most

The first two without q and with lambda on the simplex are the compositions OR and AND, min over p of the largest KL.
Source: methods.md H1 to H6.
"""

import copy
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dualsweep.constraints import Capped, DualDomain, NonNegative, Simplex, SumBelow
from dualsweep.datasets.gaussians import GaussianMixture
from dualsweep.trainers.quadrature import Grid

Feature = Callable[[NDArray[np.float64]], NDArray[np.float64]]  # points (n, dim) -> values (n,)

QUADRATURE_TOLERANCE = 1e-7  # between one spacing and twice it, relative to max(1, value); the finer one is far closer
LARGEST_LOG_RATIO = 600.0  # a ratio q^i/q is cut at e^600, below overflow: no tilt leaves any mass there


class Formulation:
    """One problem on a grid: model, metrics, objective and dual function at any multipliers of its domain.

    ``sign`` is s of the table above, ``domain`` where the multipliers may live, ``grid`` holds the points. Subclasses give the logarithms the model is made of (``_terms``), the model (``_log_weight``) and, on the grid, the
    metrics, objective and dual function.
    """

    def __init__(
        self,
        q: GaussianMixture | None,
        laws: Sequence[GaussianMixture],
        num_constraints: int,
        *,
        sign: float,
        domain: DualDomain,
    ) -> None:
        if num_constraints == 0:
            raise ValueError("give at least one set or feature")
        self.q, self.sign, self.domain, self.num_constraints = q, sign, domain, num_constraints
        # The model is integrable where tail_slopes @ multipliers < tail_limits; no rows: everywhere in the domain.
        self.tail_slopes, self.tail_limits = np.zeros((0, num_constraints)), np.zeros(0)
        self._place(Grid.covering(laws))

    def log_model(self, multipliers: ArrayLike) -> NDArray[np.float64]:
        """log p in nats on ``grid.points``, normalised there, shape (n,)."""
        return self.model(self.checked(multipliers))[0]

    def metrics(self, multipliers: ArrayLike) -> NDArray[np.float64]:
        """KL in nats or E_p[f] of each constraint, shape (num_constraints,)."""
        return self.evaluate(self.checked(multipliers))[1]

    def dual(self, multipliers: ArrayLike) -> float:
        """g(lambda) without its ``-s lambda . thresholds``; its gradient is ``s * metrics``."""
        return self.evaluate(self.checked(multipliers))[0]

    def objective(self, multipliers: ArrayLike) -> float:
        """KL between p and q in nats, in the formulation's direction; without q the largest metric."""
        log_p = self.log_model(multipliers)
        return float(self._metrics(log_p).max()) if self.q is None else self._objective(log_p)

    def checked(self, multipliers: ArrayLike) -> NDArray[np.float64]:
        """A copy of the multipliers if the Lagrangian has a minimum there.

        Raises: ValueError, naming them, if it has none.
        """
        multipliers = self.vector(multipliers, "multipliers")
        total, reason = multipliers.sum(), None
        if (multipliers < 0).any():
            reason = "give values >= 0"
        elif isinstance(self.domain, Simplex) and abs(total - 1) > 1e-6:
            reason = f"they sum to {total:.6g}; a composition needs 1"
        elif isinstance(self.domain, SumBelow) and total >= self.domain.limit:
            reason = f"they sum to {total:.6g}; the Lagrangian needs a sum below {self.domain.limit:g}"
        reason = reason or self.outside(multipliers)
        if reason:
            raise ValueError(f"multipliers={multipliers.tolist()}: {reason}")
        return multipliers

    def vector(self, values: ArrayLike, what: str) -> NDArray[np.float64]:
        """A float64 copy of one finite number a constraint.

        Raises: ValueError naming ``what`` otherwise.
        """
        vector = np.array(values, dtype=np.float64)
        if vector.shape != (self.num_constraints,) or not np.isfinite(vector).all():
            raise ValueError(
                f"{what}={vector.tolist()}: give one finite number a constraint, {self.num_constraints} in all"
            )
        return vector

    def outside(self, multipliers: NDArray[np.float64]) -> str | None:
        """Why the Lagrangian has no minimum at these multipliers >= 0; None where it has one."""
        if self.tail_limits.size and (self.tail_slopes @ multipliers >= self.tail_limits).any():
            return (
                "the model is not integrable: in every direction the tails need 1/var_q > sum lambda_i / var_i, with each "
                "law's largest variance there (log-likelihoods: (1 + sum lambda) / var_q)"
            )
        return None

    def model(self, multipliers: NDArray[np.float64]) -> tuple[NDArray[np.float64], float]:
        """(log p on the grid, log of its normaliser), unchecked."""
        log_weight = self._log_weight(multipliers, self.terms)
        log_z = float(_log_sum_exp(log_weight) + np.log(self.cell))
        return log_weight - log_z, log_z

    def evaluate(self, multipliers: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        """(``dual``, ``metrics``) at once, unchecked."""
        log_p, log_z = self.model(multipliers)
        return self._dual(multipliers, log_p, log_z), self._metrics(log_p)

    def fitted(self, multipliers: NDArray[np.float64]) -> "Formulation":
        """This formulation on a wider or finer grid if the model at these multipliers needs one; else itself.

        Raises: ValueError if no grid of a sensible size will do.
        """
        wider = self.grid.widened(self.model(multipliers)[0])
        if wider is not None:
            return self._on(wider)
        coarse = copy.copy(self)
        coarse._fill(self.grid.coarse(self.terms), self.cell * 2 ** len(self.grid.counts))
        (dual, metrics), (coarse_dual, coarse_metrics) = self.evaluate(multipliers), coarse.evaluate(multipliers)
        fine, rough = np.append(metrics, dual), np.append(coarse_metrics, coarse_dual)
        close = np.abs(fine - rough) <= QUADRATURE_TOLERANCE * np.maximum(1.0, np.abs(fine))
        return self if close.all() else self._on(self.grid.refined())

    def log_density(self, multipliers: NDArray[np.float64], log_z: float, points: ArrayLike) -> NDArray[np.float64]:
        """log p in nats at any points (n, dim), shape (n,); ``log_z`` is that of ``model``."""
        return self._log_weight(multipliers, self._terms(np.asarray(points, dtype=np.float64))) - log_z

    def without_grid(self) -> "Formulation":
        """A copy that can answer ``log_density`` and nothing else, so that an oracle holds no large arrays."""
        other = copy.copy(self)
        other.grid = None
        other._fill(np.zeros((len(self.terms), 0)), 0.0)
        return other

    def _terms(self, points: NDArray[np.float64]) -> NDArray[np.float64]:
        """What the log model is made of, shape (num_terms, n): log q first, where there is one."""
        raise NotImplementedError

    def _log_weight(self, multipliers: NDArray[np.float64], terms: NDArray[np.float64]) -> NDArray[np.float64]:
        """log p up to a constant, from the terms at any points."""
        raise NotImplementedError

    def _metrics(self, log_p: NDArray[np.float64]) -> NDArray[np.float64]:
        raise NotImplementedError

    def _dual(self, multipliers: NDArray[np.float64], log_p: NDArray[np.float64], log_z: float) -> float:
        raise NotImplementedError

    def _objective(self, log_p: NDArray[np.float64]) -> float:
        """KL(p||q), where a subclass has no other."""
        return float((np.exp(log_p) * self.cell) @ (log_p - self.terms[0]))

    def _place(self, grid: Grid) -> None:
        self.grid = grid
        self._fill(self._terms(grid.points), grid.cell)

    def _fill(self, terms: NDArray[np.float64], cell: float) -> None:
        self.terms, self.cell = terms, cell

    def _on(self, grid: Grid) -> "Formulation":
        other = copy.copy(self)
        other._place(grid)
        return other


class _Divergences(Formulation):
    """KL constraints: the terms are the log densities of q, where there is one, and of the sets."""

    def __init__(
        self, q: GaussianMixture | None, sets: Sequence[GaussianMixture], *, at_least: bool, domain: DualDomain
    ) -> None:
        if q is None and at_least:
            raise ValueError("at_least=True: a composition bounds its divergences from above; give q")
        self.laws = [*([] if q is None else [q]), *sets]
        super().__init__(q, self.laws, len(sets), sign=-1.0 if at_least else 1.0, domain=domain)

    def _weights(self, multipliers: NDArray[np.float64]) -> NDArray[np.float64]:
        return multipliers if self.q is None else np.concatenate([[1.0], self.sign * multipliers])

    def _terms(self, points: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.stack([law.log_density(points) for law in self.laws])


class ForwardKL(_Divergences):
    """min KL(q||p) s.t. KL(q^i||p) at most (fairness, adaptation) or at least (unlearning) the thresholds; H1, H3.

    Without q (and ``at_least`` False): composition OR, H6.

    Args:
        caps: unlearning: limits of the multipliers, one a set. None: inf q/q^i, exact where the sets do not overlap. The
            mass of q^i in q where q^i is a component of q.
    """

    def __init__(
        self,
        q: GaussianMixture | None,
        sets: Sequence[GaussianMixture],
        *,
        at_least: bool = False,
        caps: Sequence[float] | None = None,
    ) -> None:
        super().__init__(q, sets, at_least=at_least, domain=Simplex() if q is None else NonNegative())
        if at_least:
            self.domain = Capped(tuple(self._infima() if caps is None else caps))
            if len(self.domain.caps) != len(sets):
                raise ValueError(f"caps={list(self.domain.caps)}: give one a set, {len(sets)} in all")

    def outside(self, multipliers: NDArray[np.float64]) -> str | None:
        if self.sign < 0 and not np.isfinite(self._log_weight(multipliers, self.terms)).all():
            return "q - sum lambda_i q^i is not positive everywhere; lower them"
        return super().outside(multipliers)

    def _infima(self) -> list[float]:
        """inf q/q^i on the grid, which must not fall in the tails."""
        log_ratios = self.terms[0] - self.terms[1:]
        infima = log_ratios.min(axis=1)
        width = self.grid.high - self.grid.low
        wider = self._on(Grid(self.grid.low - width, self.grid.high + width, self.grid.counts)).terms
        falling = (wider[0] - wider[1:]).min(axis=1) < infima - 1e-3
        if falling.any():
            raise ValueError(
                f"sets {np.flatnonzero(falling).tolist()} reach beyond q: q/q^i falls to 0 in the tails, so that no multiplier "
                f"> 0 leaves a density; give sets inside q, such as its components"
            )
        return np.exp(infima).tolist()

    def _fill(self, terms: NDArray[np.float64], cell: float) -> None:
        super()._fill(terms, cell)
        self.masses = np.exp(terms) * cell
        self.negative_entropies = np.sum(self.masses * terms, axis=1)

    def _log_weight(self, multipliers: NDArray[np.float64], terms: NDArray[np.float64]) -> NDArray[np.float64]:
        weights = self._weights(multipliers)
        used = weights != 0
        if self.sign > 0:
            return _log_sum_exp(terms[used] + np.log(weights[used])[:, None])
        with np.errstate(over="ignore"):
            left = 1 + weights[used][1:] @ np.exp(terms[used][1:] - terms[0])
        return np.where(left > 0, terms[0] + np.log(np.where(left > 0, left, 1.0)), -np.inf)

    def _metrics(self, log_p: NDArray[np.float64]) -> NDArray[np.float64]:
        return (self.negative_entropies - self.masses @ log_p)[-self.num_constraints :]

    def _objective(self, log_p: NDArray[np.float64]) -> float:
        return float(self.negative_entropies[0] - self.masses[0] @ log_p)

    def _dual(self, multipliers: NDArray[np.float64], log_p: NDArray[np.float64], log_z: float) -> float:
        weights = self._weights(multipliers)
        entropy = -(np.exp(log_p) * self.cell) @ log_p
        return float(weights.sum() * entropy + weights @ self.negative_entropies)


class ReverseKL(_Divergences):
    """min KL(p||q) s.t. KL(p||q^i) at least (unlearning, H2) or at most (composition AND with a reference, H6) the thresholds.

    Without q (and ``at_least`` False): composition AND.
    """

    def __init__(self, q: GaussianMixture | None, sets: Sequence[GaussianMixture], *, at_least: bool = True) -> None:
        domain = Simplex() if q is None else SumBelow(1.0) if at_least else NonNegative()
        super().__init__(q, sets, at_least=at_least, domain=domain)
        if at_least:
            tails = _tail_precisions(self.laws)
            self.tail_slopes, self.tail_limits = tails[1:].T, tails[0]

    def _log_weight(self, multipliers: NDArray[np.float64], terms: NDArray[np.float64]) -> NDArray[np.float64]:
        weights = self._weights(multipliers)
        return (weights / weights.sum()) @ terms

    def _metrics(self, log_p: NDArray[np.float64]) -> NDArray[np.float64]:
        mass = np.exp(log_p) * self.cell
        return (mass @ log_p - self.terms @ mass)[-self.num_constraints :]

    def _dual(self, multipliers: NDArray[np.float64], log_p: NDArray[np.float64], log_z: float) -> float:
        return -float(self._weights(multipliers).sum() * log_z)


class Tilted(Formulation):
    """min KL(p||q) s.t. E_p[f_i] at most (likelihood unlearning, H4) or at least (alignment, H5) the thresholds.

    Args:
        features: functions of points (n, dim) with smooth finite values (n,), or laws q^i, which stand for q^i/q.
    """

    def __init__(
        self, q: GaussianMixture, features: Sequence[Feature | GaussianMixture], *, at_least: bool = False
    ) -> None:
        sets = [feature for feature in features if isinstance(feature, GaussianMixture)]
        ratios = np.array([isinstance(feature, GaussianMixture) for feature in features], dtype=bool)
        self.features = [partial(_ratio, q, f) if isinstance(f, GaussianMixture) else f for f in features]
        super().__init__(q, [q, *sets], len(features), sign=-1.0 if at_least else 1.0, domain=NonNegative())
        means = self.metrics(np.zeros(len(features)))
        if (np.abs(means - 1)[ratios] > 1e-6).any():
            raise ValueError(
                f"features have the means {means.tolist()} under q; a ratio q^i/q needs a set inside q, with mean 1"
            )

    def _terms(self, points: NDArray[np.float64]) -> NDArray[np.float64]:
        values = [np.asarray(feature(points), dtype=np.float64) for feature in self.features]
        for i, value in enumerate(values):
            if value.shape != (len(points),) or not np.isfinite(value).all():
                raise ValueError(
                    f"features[{i}] gave shape {value.shape}; give finite values of shape ({len(points)},)"
                )
        return np.stack([self.q.log_density(points), *values])

    def _log_weight(self, multipliers: NDArray[np.float64], terms: NDArray[np.float64]) -> NDArray[np.float64]:
        return terms[0] - self.sign * (multipliers @ terms[1:])

    def _metrics(self, log_p: NDArray[np.float64]) -> NDArray[np.float64]:
        return self.terms[1:] @ (np.exp(log_p) * self.cell)

    def _dual(self, multipliers: NDArray[np.float64], log_p: NDArray[np.float64], log_z: float) -> float:
        return -log_z


class LogLikelihood(Tilted):
    """min KL(p||q) s.t. E_p[log q^i/q] at most the thresholds: q prod (q/q^i)^lambda_i, the target of ESD; H2."""

    def __init__(self, q: GaussianMixture, sets: Sequence[GaussianMixture]) -> None:
        super().__init__(q, [partial(_log_ratio, q, law) for law in sets], at_least=False)
        tails = _tail_precisions([q, *sets])
        self.tail_slopes, self.tail_limits = (tails[1:] - tails[0]).T, tails[0]


def _tail_precisions(laws: Sequence[GaussianMixture]) -> NDArray[np.float64]:
    """The quadratic decay of each law in the directions that matter, shape (num_laws, num_directions).

    Along a unit vector u a mixture falls like that of its components whose precision sum_k u_k^2 / var_k is smallest. In
    c = u_1^2 each law's decay is the least of straight lines, so weighted sums are extreme at their crossings and ends.
    """
    precisions = [law.stds**-2.0 for law in laws]
    if laws[0].dim == 1:
        return np.array([[values.min()] for values in precisions])
    crossings = [0.0, 1.0]
    for values in precisions:
        slopes, offsets = values[:, 0] - values[:, 1], values[:, 1]
        with np.errstate(divide="ignore", invalid="ignore"):
            meets = (offsets[None, :] - offsets[:, None]) / (slopes[:, None] - slopes[None, :])
        crossings += meets[(meets > 0) & (meets < 1)].tolist()  # NaN of parallel lines fails here
    shares = np.stack([crossings, 1 - np.array(crossings)])
    return np.array([(values @ shares).min(axis=0) for values in precisions])


def _log_sum_exp(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """log sum exp over the first axis."""
    top = values.max(axis=0)
    return top + np.log(np.exp(values - top).sum(axis=0))


def _log_ratio(q: GaussianMixture, law: GaussianMixture, points: NDArray[np.float64]) -> NDArray[np.float64]:
    return law.log_density(points) - q.log_density(points)


def _ratio(q: GaussianMixture, law: GaussianMixture, points: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.exp(np.minimum(_log_ratio(q, law, points), LARGEST_LOG_RATIO))
