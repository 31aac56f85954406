"""Gaussian mixtures with known density, score and noise prediction at every noise level: ground truth of the tests.

A variance-preserving diffusion maps a mixture to a mixture, x_t = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) noise, with
means sqrt(alpha_bar) m_k and variances alpha_bar s_k^2 + 1 - alpha_bar, so every formula is the clean one on those.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray


@dataclass(frozen=True, eq=False)
class GaussianMixture:
    """Mixture of Gaussians with diagonal covariances; float64 throughout."""

    means: NDArray[np.float64]  # shape (components, dim)
    stds: NDArray[np.float64]  # shape (components, dim); given as (components,) where a component is round
    weights: NDArray[np.float64]  # shape (components,), positive; stored normalised to sum 1

    def __post_init__(self) -> None:
        means = np.array(self.means, dtype=np.float64)
        if means.ndim != 2 or 0 in means.shape:
            raise ValueError(f"means have shape {means.shape}, expected (components, dim): a list of points")
        stds, weights = np.array(self.stds, dtype=np.float64), np.array(self.weights, dtype=np.float64)
        if stds.shape == means.shape[:1]:
            stds = np.repeat(stds[:, None], means.shape[1], axis=1)
        if stds.shape != means.shape:
            raise ValueError(f"stds have shape {stds.shape}, expected {means.shape[:1]} or {means.shape}")
        if weights.shape != means.shape[:1]:
            raise ValueError(f"weights have shape {weights.shape}, expected {means.shape[:1]}: one a component")
        for name, values in (("means", means), ("stds", stds), ("weights", weights)):
            if not np.isfinite(values).all():
                raise ValueError(f"{name} hold a value that is not finite: {values.tolist()}")
            if name != "means" and not (values > 0).all():
                raise ValueError(f"{name} must be > 0, got {values.tolist()}")
        for name, values in (("means", means), ("stds", stds), ("weights", weights / weights.sum())):
            values.flags.writeable = False
            object.__setattr__(self, name, values)

    @property
    def num_components(self) -> int:
        """Number of components."""
        return self.means.shape[0]

    @property
    def dim(self) -> int:
        """Dimension of a sample."""
        return self.means.shape[1]

    def with_weights(self, weights: ArrayLike) -> "GaussianMixture":
        """The same components in other proportions, e.g. those of a constrained optimum."""
        return GaussianMixture(self.means, self.stds, weights)

    def component(self, index: int) -> "GaussianMixture":
        """One component as a mixture of its own."""
        return self.restricted([index])

    def restricted(self, components: Sequence[int]) -> "GaussianMixture":
        """The law of a sample given that it comes from one of ``components``, in the order given."""
        chosen = list(components)
        if chosen == list(range(self.num_components)):
            return self  # normalising the weights again would move them by a rounding error
        return GaussianMixture(self.means[chosen], self.stds[chosen], self.weights[chosen])

    def noised(self, alpha_bar: float) -> "GaussianMixture":
        """The law of x_t at signal power ``alpha_bar`` in [0, 1]."""
        variances = alpha_bar * self.stds**2 + (1 - alpha_bar)
        return GaussianMixture(np.sqrt(alpha_bar) * self.means, np.sqrt(variances), self.weights)

    def sample(self, count: int, rng: np.random.Generator) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Independent draws: samples of shape (count, dim) and their components, shape (count,)."""
        components = rng.choice(self.num_components, size=count, p=self.weights).astype(np.int64)
        return self.sample_components(components, rng), components

    def sample_components(self, components: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.float64]:
        """One draw from each named component, shape (len(components), dim)."""
        noise = rng.standard_normal((len(components), self.dim))
        return self.means[components] + self.stds[components] * noise

    def log_density(self, x: ArrayLike) -> NDArray[np.float64]:
        """Log density in nats of points ``x``, shape (n, dim); returns shape (n,)."""
        from scipy.special import logsumexp  # here: a quarter of a second to import, and images need none of it

        return logsumexp(self._log_joint(x, 1.0), axis=1)

    def posterior(self, x: ArrayLike, alpha_bar: ArrayLike = 1.0) -> NDArray[np.float64]:
        """Probability of each component given ``x`` (noised to ``alpha_bar``), shape (n, components), rows sum to 1."""
        from scipy.special import softmax

        return softmax(self._log_joint(x, alpha_bar), axis=1)

    def score(self, x: ArrayLike, alpha_bar: ArrayLike = 1.0) -> NDArray[np.float64]:
        """Gradient of the log density at ``alpha_bar`` (scalar or shape (n,)) in ``x``, shape (n, dim)."""
        points, means, variances = self._levels(x, alpha_bar)
        pulls = (means - points[:, None, :]) / variances
        return np.einsum("nk,nkd->nd", self.posterior(x, alpha_bar), pulls)

    def noise_prediction(self, x_t: ArrayLike, alpha_bar: ArrayLike) -> NDArray[np.float64]:
        """The best noise prediction E[noise | x_t] = -sqrt(1 - alpha_bar) score, shape (n, dim).

        Args:
            x_t: noised points, shape (n, dim).
            alpha_bar: signal power in [0, 1), scalar or shape (n,).
        """
        scale = np.sqrt(1 - np.asarray(alpha_bar, dtype=np.float64))
        return -np.broadcast_to(scale, (len(np.asarray(x_t)),))[:, None] * self.score(x_t, alpha_bar)

    def _levels(self, x: ArrayLike, alpha_bar: ArrayLike):
        points = np.asarray(x, dtype=np.float64)
        if points.ndim != 2 or points.shape[1] != self.dim:
            raise ValueError(f"points have shape {points.shape}, expected (n, {self.dim})")
        power = np.broadcast_to(np.asarray(alpha_bar, dtype=np.float64), (len(points),))[:, None, None]
        return points, np.sqrt(power) * self.means, power * self.stds**2 + (1 - power)

    def _log_joint(self, x: ArrayLike, alpha_bar: ArrayLike) -> NDArray[np.float64]:
        points, means, variances = self._levels(x, alpha_bar)
        squares = (points[:, None, :] - means) ** 2 / variances
        return np.log(self.weights) - 0.5 * (squares + np.log(2 * np.pi * variances)).sum(axis=2)
