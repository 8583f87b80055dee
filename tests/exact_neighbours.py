"""Brute force in float64, data to search, and what an answer of exact search must be."""

import jax.numpy as jnp
import numpy as np

METRICS = ["l2", "ip", "cosine"]
# Distances come from sums of d exact products in float32, and from unit vectors in float32 for cosine.
ROUNDING = 40 * float(np.finfo(np.float32).eps)


def all_distances(base, queries, metric):
    """The definition, in float64."""
    base, queries = (np.asarray(x).astype(np.float64) for x in (base, queries))
    if metric == "ip":
        return -queries @ base.T
    if metric == "l2":
        return np.sum((queries[:, None] - base[None]) ** 2, axis=2)
    a, b = (x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-300) for x in (queries, base))
    return 1 - a @ b.T


def scale(base, queries, metric):
    """Sizes of the numbers whose rounding the distances carry."""
    if metric == "cosine" or not len(base) or not len(queries):
        return 1.0
    return max(np.linalg.norm(np.asarray(x).astype(np.float64), axis=1).max() for x in (base, queries)) ** 2


def check(found, base, queries, k, metric, mask=None, own=False):
    """Shapes, dtypes, order, ties and values of an answer; ids are optimal up to rounding, and exact for integers."""
    n, q = len(base), len(queries)
    assert found.distances.shape == found.ids.shape == (q, k)
    assert found.distances.dtype == jnp.float32 and found.ids.dtype == jnp.int32
    distances, ids = np.asarray(found.distances), np.asarray(found.ids)
    truth = all_distances(base, queries, metric).reshape(q, n)
    if mask is not None:
        truth = np.where(np.broadcast_to(mask, (q, n)), truth, np.inf)
    if own:
        truth = np.where(np.eye(n, dtype=bool), np.inf, truth)
    tolerance = ROUNDING * scale(base, queries, metric)
    best = np.sort(truth, axis=1)[:, :k]
    best = np.pad(best, ((0, 0), (0, k - best.shape[1])), constant_values=np.inf)
    np.testing.assert_array_equal(np.isinf(best), ids == -1)
    np.testing.assert_array_equal(np.isinf(distances), ids == -1)
    np.testing.assert_allclose(distances, best, rtol=ROUNDING, atol=tolerance)
    there = ids >= 0
    if n:
        # The distance belongs to the row that is named, and no row is named twice.
        named = np.take_along_axis(truth, np.where(there, ids, 0), axis=1)
        np.testing.assert_allclose(named[there], distances[there], rtol=ROUNDING, atol=tolerance)
    for row, fine in zip(ids, there, strict=True):
        assert len(set(row[fine])) == fine.sum()
    # Ascending, and equal distances in the order of ids.
    a, b = distances[:, :-1], distances[:, 1:]
    assert np.all((a < b) | ((a == b) & ((ids[:, :-1] < ids[:, 1:]) | (ids[:, 1:] == -1))))
    integral = all(np.issubdtype(np.asarray(x).dtype, np.integer) for x in (base, queries))
    if integral and metric != "cosine" and k <= n:
        expected = np.argsort(truth, axis=1, kind="stable")[:, :k]
        np.testing.assert_array_equal(ids, np.where(np.isinf(best), -1, expected))


def data(seed, n, q, d, kind):
    generator = np.random.default_rng(seed)
    if kind == "integers":
        return (generator.integers(-3, 4, size=(m, d)).astype(np.int8) for m in (n, q))
    both = generator.normal(size=(n + q, d))
    if kind == "duplicates":
        both = both[generator.integers(0, 1 + (n + q) // 4, size=n + q)]
    if kind == "far away":
        both = both + 1000.0
    if kind == "one outlier" and n:
        both[0] *= 1e4
    if kind == "equal":
        both[:] = both[:1]
    if kind == "zeros":
        both[generator.random(n + q) < 0.5] = 0
    return both[:n].astype(np.float32), both[n:].astype(np.float32)


KINDS = ["normal", "integers", "duplicates", "far away", "one outlier", "equal", "zeros"]
