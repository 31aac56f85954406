"""Exact multipliers of composition, min over p of the largest KL: weights on the simplex, one a set.

AND (KL(p||q^i)) of Gaussians is a smallest enclosing ball; OR (KL(q^i||p)) is the capacity of a channel.
Source: methods.md H6.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray


def enclosing_ball_weights(means: ArrayLike) -> NDArray[np.float64]:
    """Optimal multipliers of min_p max_i KL(p||q^i) for round Gaussians q^i = N(means[i], std^2 I) of one variance.

    The model is a Gaussian at the centre ``weights @ means`` of the smallest ball around the means, of radius R, and
    the value of the min-max is R^2 / (2 std^2). Active sets: the farthest mean joins the support, and the centre moves
    to that of the sphere through the support until a weight reaches 0 and its mean leaves. Each turn enlarges the
    sphere, so no support returns.

    Args:
        means: shape (num_sets, dim), at least one set.
    Returns: weights >= 0 with sum 1, shape (num_sets,). The ball is unique; the weights are where the means on its
        surface are affinely independent.
    Source: methods.md H6.
    """
    points = np.array(means, dtype=np.float64)
    if points.ndim != 2 or 0 in points.shape or not np.isfinite(points).all():
        raise ValueError(f"means={points.tolist()}: give finite points, shape (num_sets, dim)")
    points = points - points.mean(axis=0)
    scale = np.square(points).sum(axis=1).max()
    weights = np.zeros(len(points))
    weights[np.square(points).sum(axis=1).argmax()] = 1.0
    while True:
        squares = np.square(points - weights @ points).sum(axis=1)
        farthest = int(squares.argmax())
        if squares[farthest] <= weights @ squares + 1e-12 * scale:  # round-off of squares of this size
            return weights
        support = np.union1d(np.flatnonzero(weights), farthest)
        while True:
            direction = _towards_circumcentre(points[support], weights[support], support == farthest)
            falling = direction < 0
            reach = -weights[support][falling] / direction[falling]
            length = min(1.0, reach.min(initial=1.0))
            weights[support] += length * direction
            if length == 1.0:
                break
            leaving = support[falling][reach.argmin()]
            weights[leaving] = 0.0
            support = support[support != leaving]


def capacity_weights(
    densities: ArrayLike, masses: ArrayLike, *, tolerance: float = 1e-10, max_iterations: int = 100_000
) -> NDArray[np.float64]:
    """Optimal multipliers of min_p max_i KL(q^i||p): the input that achieves the capacity of the channel i -> x.

    The model is ``weights @ densities`` and the value of the min-max is the capacity. Blahut and Arimoto's iteration,
    weights_i <- weights_i e^{KL(q^i||p)}, normalised; it stops when the value is known to ``tolerance`` nats.

    Args:
        densities: shape (num_sets, num_cells), >= 0: each set's density on a grid, or probabilities of states.
        masses: volume of each cell, shape (num_cells,), or one for all (1 for states); normalises every row.
    Returns: weights >= 0 with sum 1, shape (num_sets,); unique where the densities are affinely independent.
    Raises: ValueError on bad shapes or values, or where the sets are so alike that more iterations are needed.
    Source: methods.md H6; Blahut (1972), Arimoto (1972).
    """
    laws = np.array(densities, dtype=np.float64)
    if laws.ndim != 2 or 0 in laws.shape or not (np.isfinite(laws).all() and (laws >= 0).all()):
        raise ValueError(f"densities have shape {laws.shape}; give finite values >= 0, shape (num_sets, num_cells)")
    volumes = np.array(masses, dtype=np.float64)
    if volumes.shape not in ((), laws.shape[1:]) or not (np.isfinite(volumes).all() and (volumes > 0).all()):
        raise ValueError(f"masses have shape {volumes.shape}; give finite volumes > 0, one a cell or one for all")
    laws = laws * volumes
    if not (laws.sum(axis=1) > 0).all():
        raise ValueError(f"densities of the sets {np.flatnonzero(laws.sum(axis=1) == 0).tolist()} are 0 everywhere")
    laws = laws / laws.sum(axis=1, keepdims=True)
    laws = laws[:, laws.any(axis=0)]
    negative_entropies = np.sum(laws * np.log(np.where(laws > 0, laws, 1.0)), axis=1)
    weights = np.full(len(laws), 1 / len(laws))
    for _ in range(max_iterations):
        divergences = negative_entropies - laws @ np.log(np.maximum(weights @ laws, np.finfo(float).tiny))
        raised = weights * np.exp(divergences)
        if divergences.max() - np.log(raised.sum()) <= tolerance:  # upper minus lower bound of the capacity
            return weights
        weights = raised / raised.sum()
    raise ValueError(
        f"densities: the capacity is not known to tolerance={tolerance} nats after {max_iterations} iterations; "
        f"raise either"
    )


def _towards_circumcentre(
    points: NDArray[np.float64], weights: NDArray[np.float64], joining: NDArray[np.bool_]
) -> NDArray[np.float64]:
    """The change of barycentric weights, of sum 0, that takes the centre to equal distances from all points.

    Where the points depend on each other affinely it is the dependency along which the joining point gains: there the
    enclosing sphere grows without bound, so a weight is sure to reach 0.
    """
    edges = (points - points[0])[1:]
    if np.linalg.matrix_rank(edges, tol=1e-9 * np.abs(edges).max()) < len(edges):
        dependency = np.linalg.svd(np.vstack([points.T, np.ones(len(points))]))[2][-1]
        dependency = dependency * np.sign(dependency[joining].sum())
        return dependency / -dependency.min() * 2  # longer than any weight, so that it is cut short
    # 2 <c - p_0, edge> = |edge|^2 for c = p_0 + sum_k w_k edge_k
    inner = np.linalg.solve(2 * edges @ edges.T, np.square(edges).sum(axis=1))
    return np.concatenate([[1 - inner.sum()], inner]) - weights
