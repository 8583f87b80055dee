"""What "close" means: the distribution of a measure of `compare` where nothing is shared."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from theorykit import _random
from theorykit.spectral._subspaces import projector_distance


def random_subspaces(key: Key[Array, ""], d: int, k: int, count: int) -> Float[Array, "count d k"]:
    r"""Orthonormal bases of subspaces drawn uniformly (Haar): rotating them does not change their law.

    .. math:: G = U R, \quad G_{ij} \sim N(0, 1), \quad R_{ii} > 0

    Parameters
    ----------
    key
        PRNG key.
    d, k
        Dimension of the space and of its subspaces, 1 <= k <= d.
    count
        Number of subspaces.

    Returns
    -------
    Array
        Bases, one a row, (count, d, k), in the default float dtype.

    Raises
    ------
    ValueError
        If 1 <= k <= d or count >= 1 fails.

    Source
    ------
    Mezzadri (arXiv math-ph/0609050): without the signs of R the bases, though not their spans, are not uniform.
    """
    if not 1 <= k <= d:
        raise ValueError(f"random_subspaces: k = {k} orthonormal columns in d = {d} dimensions; choose 1 <= k <= d")
    q, r = jnp.linalg.qr(random_features(key, d, k, count))
    signs = jnp.where(jnp.diagonal(r, axis1=-2, axis2=-1) < 0, -1.0, 1.0).astype(q.dtype)
    return q * signs[:, None, :]


def random_features(key: Key[Array, ""], n: int, p: int, count: int) -> Float[Array, "count n p"]:
    """Features that carry nothing: independent standard normal numbers, for n samples in p dimensions.

    Parameters
    ----------
    key
        PRNG key.
    n, p
        Numbers of samples and of features, at least 1 each.
    count
        Number of sets of features.

    Returns
    -------
    Array
        Features, (count, n, p), in the default float dtype.

    Raises
    ------
    ValueError
        If a size is below 1.

    Source: definition.
    """
    if min(n, p, count) < 1:
        raise ValueError(f"random draws of {count} matrices ({n}, {p}): give sizes and a count of at least 1")
    return _random.normal(key, (count, n, p))


@partial(jax.jit, static_argnames=("statistic", "dims", "count", "draw"))
def null(
    key: Key[Array, ""],
    statistic: Callable[[Array, Array], Array],
    dims: tuple[int, int, int],
    count: int,
    *,
    draw: Callable[..., Array] = random_subspaces,
) -> Float[Array, "count ..."]:
    r"""Null distribution of a comparison: its values on independent random pairs of the same dimensions.

    .. math:: t_i = T(u_i, v_i), \qquad u_i \text{ and } v_i \text{ independent}

    Some are known exactly, for subspaces: E `spectrum_overlap` = k/d, E `projector_distance`^2 = k (1 - k/d), and the
    squared cosine of a random line with a k-dimensional subspace is Beta(k/2, (d-k)/2); for features: E debiased CKA
    = 0, E R^2 of `linear_fit` = p/(n-1) for n > p, and the squared correlation of two of them is Beta(1/2, (n-2)/2).
    The plain CKA of independent features is not near 0 but near sqrt(p q / ((n+p) (n+q))). The squared residual of
    `procrustes` (scaled) is Beta((n-1)/2, 1/2) for p = 1 and has mean 1 - (3n-1) / (2n^2) for p = 2. `effective_rank`
    of one set, ``lambda x, _: effective_rank(x)``, is 1 for p = 1; for p = 2 it rises with 2 s1 s2 / (s1^2 + s2^2) of
    the singular values, whose power n - 1 is uniform on [0, 1].

    Parameters
    ----------
    key
        PRNG key.
    statistic
        Function of two matrices that jit accepts, such as those of this package or
        ``lambda u, v: principal_angles(u, v)[0]``. Pass the same object again to have it compiled once.
    dims
        (rows, columns of the first, columns of the second): (d, k1, k2) or (n, p, q).
    count
        Number of draws. They are made one after another, so that memory does not grow with it.
    draw
        `random_subspaces` or `random_features`, or any (key, rows, columns, 1) -> (1, rows, columns).

    Returns
    -------
    Array
        One value of the statistic a row, (count, ...).

    Raises
    ------
    ValueError
        If `draw` or the statistic refuses these dimensions, or count < 1.

    Source
    ------
    Definition. Expectations: symmetry of the Haar law under rotations; of CKA, permutations of the samples and the
    second moments of the Wishart law; of Procrustes, (s1 + s2)^2 = |X^T Y|_F^2 + 2 |det X^T Y| and the independence of
    length and direction; of the effective rank, the density of the Wishart eigenvalues in polar coordinates.
    """
    if count < 1:
        raise ValueError(f"null: count = {count} draws; ask for at least 1")
    rows, first, second = dims

    def value(key):
        for_u, for_v = jax.random.split(key)
        return statistic(draw(for_u, rows, first, 1)[0], draw(for_v, rows, second, 1)[0])

    return jax.lax.map(value, jax.random.split(key, count))


def null_distances(key: Key[Array, ""], d: int, k: int, count: int) -> Float[Array, " count"]:
    r"""`projector_distance` of independent random k-dimensional subspaces of R^d.

    .. math:: E \, \mathrm{dist}^2 = k \, (1 - k/d)

    Parameters
    ----------
    key
        PRNG key.
    d, k, count
        Dimension of the space, of the subspaces, and number of draws.

    Returns
    -------
    Array
        Distances, (count,).

    Raises
    ------
    ValueError
        If 1 <= k <= d or count >= 1 fails.

    Source: derivation (the mean of a random projector is (k/d) I).
    """
    return null(key, projector_distance, (d, k, k), count)
