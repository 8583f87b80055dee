"""Data of the search benchmarks: clusters of low intrinsic dimension in a high-dimensional space, from a seed."""

from typing import NamedTuple

import numpy as np

# Rows of a cluster, and the dimension in which they spread: what learned embeddings look like. Every cluster lies on
# its own linear subspace, so that no projection of the whole set makes it easy.
ROWS_PER_CLUSTER, INTRINSIC = 1000, 12
# Deviation of a centre's coordinates: centres are then about as far apart as a cluster is wide, so that clusters touch
# but fill no common blob.
SEPARATION = 0.4
NOISE = 0.05  # in all directions; it keeps rows off their subspaces
BLOCK = 65_536  # rows drawn at once
TIES = 1e-5  # of a squared distance: float32 sums of some hundred squares in another order differ by less


class Data(NamedTuple):
    """Rows to search, and queries that are none of them; float32."""

    base: np.ndarray
    queries: np.ndarray


def clustered(n: int, d: int, queries: int, seed: int = 0) -> Data:
    """Draw rows and queries from one mixture: centre + spread * basis @ normal + noise."""
    generator = np.random.default_rng(seed)
    clusters = max(1, n // ROWS_PER_CLUSTER)
    intrinsic = min(INTRINSIC, d)
    centres = (SEPARATION * generator.standard_normal((clusters, d))).astype(np.float32)
    # Columns of length about 1, so that a cluster has deviation 1 along each of its directions.
    bases = (generator.standard_normal((clusters, intrinsic, d)) * np.sqrt(intrinsic / d)).astype(np.float32)
    spread = np.exp(0.3 * generator.standard_normal(clusters)).astype(np.float32)
    weights = generator.dirichlet(np.full(clusters, 5.0))  # unequal sizes

    def draw(count):
        rows = np.empty((count, d), np.float32)
        for start in range(0, count, BLOCK):
            part = rows[start : start + BLOCK]
            which = generator.choice(clusters, len(part), p=weights)
            latent = generator.standard_normal((len(part), intrinsic), np.float32) * spread[which, None]
            part[:] = generator.standard_normal((len(part), d), np.float32) * NOISE + centres[which]
            for cluster in np.unique(which):  # a product per cluster instead of a basis per row
                mine = which == cluster
                part[mine] += latent[mine] @ bases[cluster]
        return rows

    return Data(draw(n), draw(queries))


def recall(distances: np.ndarray, last: np.ndarray) -> float:
    """Part of the answers no farther than the last true neighbour, ties forgiven."""
    return float(np.mean(distances <= last[:, None] * (1 + TIES)))
