"""Pairs with a known law: jointly Gaussian with a chosen cross-covariance, and clusters seen twice through noise."""

from collections.abc import Sequence
from math import isfinite

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from theorykit.data.normalise import Pairs

Matrix = Array | np.ndarray


def _orthonormal(key: Key[Array, ""], size: int, columns: int) -> np.ndarray:
    """Orthonormal columns drawn uniformly, in float64: QR of a Gaussian matrix, with the diagonal of R positive."""
    q, r = np.linalg.qr(np.asarray(jax.random.normal(key, (size, columns)), np.float64))
    return q * np.where(np.diag(r) < 0, -1.0, 1.0)[None, :]


def cross_from_correlations(
    key: Key[Array, ""],
    correlations: Sequence[float | int] | Float[Matrix, " k"],
    da: int,
    db: int,
) -> Float[Array, "da db"]:
    """Draw a cross-covariance with prescribed canonical correlations, for views with identity covariance.

    C = U diag(rho) V^T, with U (da, k) and V (db, k) orthonormal columns drawn uniformly. With cov_a = cov_b = I its
    singular values, rho, are the canonical correlations. For other covariances use cov_a^(1/2) C cov_b^(1/2), which has
    the same ones.

    Parameters
    ----------
    key : PRNG key
        Fixes the directions U and V.
    correlations : (k,)
        Canonical correlations in [0, 1], at most min(da, db) of them; the rest are 0.
    da, db : int
        Dimensions of the two views.

    Returns
    -------
    (da, db)
        The cross-covariance, in the default float dtype.

    Raises
    ------
    ValueError
        If a correlation lies outside [0, 1] or there are more of them than the smaller view has dimensions.

    Source
    ------
    Hotelling 1936, Relations between two sets of variates (Biometrika 28); Mezzadri 2007 (arXiv math-ph/0609050) for
    uniform orthonormal columns.
    """
    rho = np.asarray(correlations, np.float64)
    if da < 1 or db < 1:
        raise ValueError(f"da and db must be at least 1, got {da} and {db}: give each view a dimension.")
    if len(rho) > min(da, db):
        raise ValueError(
            f"{len(rho)} correlations for views of dimension {da} and {db}, which have at most {min(da, db)}: "
            "give fewer correlations or raise da and db."
        )
    if not np.all((rho >= 0) & (rho <= 1)):
        raise ValueError(
            f"canonical correlations must lie in [0, 1], got {rho.tolist()}: a sign belongs to the directions, and no "
            "correlation exceeds 1."
        )
    for_u, for_v = jax.random.split(key)
    u, v = _orthonormal(for_u, da, len(rho)), _orthonormal(for_v, db, len(rho))
    return jnp.asarray((u * rho[None, :]) @ v.T, jnp.result_type(float))


def _covariance(name: str, value: Float[Matrix, "_ _"] | None, size: int) -> np.ndarray:
    if value is None:
        return np.eye(size)
    cov = np.asarray(value, np.float64)
    if cov.shape != (size, size):
        raise ValueError(f"{name} has shape {cov.shape}, cross needs ({size}, {size}): match it to the shape of cross.")
    if not np.all(np.isfinite(cov)):
        raise ValueError(f"{name} is not finite: a covariance has finite entries.")
    return cov


def _inverse_root(cov: np.ndarray, eps: float) -> np.ndarray:
    """The pseudo-inverse of the symmetric square root."""
    values, vectors = np.linalg.eigh(cov)
    alive = values > len(cov) * eps * values[-1]
    return (vectors[:, alive] / np.sqrt(values[alive])) @ vectors[:, alive].T


def _root(cov: np.ndarray, eps: float) -> np.ndarray | None:
    """R with R R^T = cov, without the columns of the null space; None if cov has a negative eigenvalue.

    Rounding of the entries moves an eigenvalue by about size * eps * largest (numpy.linalg.matrix_rank's rule). Within
    that, an eigenvalue is zero: its root, near sqrt(eps), would break a correlation of exactly 1. Unit variances
    first, so that the rule does not depend on the units of the coordinates.
    """
    deviation = np.sqrt(np.maximum(np.diag(cov), 0))
    alive = deviation > 0
    # A coordinate without variance has no covariance either, and a negative variance is none.
    if np.any(np.diag(cov) < 0) or np.any(cov[~alive]):
        return None
    scale = np.where(alive, deviation, 1)
    values, vectors = np.linalg.eigh(cov / scale[:, None] / scale[None, :])
    tolerance = len(cov) * eps * values[-1]
    if values[0] < -tolerance:
        return None
    kept = values > tolerance
    return scale[:, None] * vectors[:, kept] * np.sqrt(values[kept])[None, :]


def gaussian_pairs(
    key: Key[Array, ""],
    count: int,
    *,
    cross: Float[Matrix, "da db"],
    cov_a: Float[Matrix, "_ _"] | None = None,
    cov_b: Float[Matrix, "_ _"] | None = None,
) -> Pairs:
    """Draw jointly Gaussian pairs with a chosen cross-covariance.

    (a_i, b_i) ~ N(0, [[cov_a, cross], [cross^T, cov_b]]), independent from pair to pair. Canonical correlations of
    exactly 1, and singular covariances, are allowed.

    Parameters
    ----------
    key : PRNG key
        Fixes the draw.
    count : int
        Number of pairs.
    cross : (da, db)
        E a b^T.
    cov_a : (da, da), optional
        E a a^T, symmetric positive semidefinite; the identity by default.
    cov_b : (db, db), optional
        E b b^T, likewise.

    Returns
    -------
    Pairs
        ``a`` (count, da) and ``b`` (count, db) in the dtype of ``cross``; ``labels`` None.

    Raises
    ------
    ValueError
        If shapes do not match, a value is not finite, a covariance is not symmetric positive semidefinite, or no
        Gaussian has this cross-covariance: its largest canonical correlation exceeds 1.

    Source
    ------
    Anderson 2003, An Introduction to Multivariate Statistical Analysis, chapters 2 and 12.
    """
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}: ask for one pair or more.")
    dtype = jnp.asarray(cross).dtype
    # Rounding as coarse as the coarsest matrix that came in; the work itself is done in float64.
    eps = max(float(jnp.finfo(jnp.asarray(m).dtype).eps) for m in (cross, cov_a, cov_b) if m is not None)
    c = np.asarray(cross, np.float64)
    if not np.all(np.isfinite(c)):
        raise ValueError("cross is not finite: a covariance has finite entries.")
    da, db = c.shape
    blocks = {"cov_a": _covariance("cov_a", cov_a, da), "cov_b": _covariance("cov_b", cov_b, db)}
    for name, cov in blocks.items():
        if np.max(np.abs(cov - cov.T)) > len(cov) * eps * np.max(np.abs(cov)):
            raise ValueError(f"{name} is not symmetric: use ({name} + {name}.T) / 2.")
        if _root(cov, eps) is None:
            raise ValueError(
                f"{name} is not positive semidefinite, smallest eigenvalue {np.linalg.eigvalsh(cov)[0]:.6g}: "
                "no data have such a covariance; estimate it from data or build it as M M^T."
            )
    a, b = blocks["cov_a"], blocks["cov_b"]
    root = _root(np.block([[a, c], [c.T, b]]), eps)
    if root is None:
        white_a, white_b = _inverse_root(a, eps), _inverse_root(b, eps)
        largest = np.linalg.norm(white_a @ c @ white_b, ord=2)
        if largest <= 1:
            raise ValueError(
                "cross has a component along a direction in which cov_a or cov_b has no variance (largest canonical "
                f"correlation on the others: {largest:.6g}): project cross onto the ranges of cov_a and cov_b."
            )
        raise ValueError(
            f"no pair of Gaussians has this cross-covariance: its largest canonical correlation is {largest:.6g}, more "
            f"than 1. Multiply cross by {1 / largest:.6g} or less, or build it with cross_from_correlations."
        )
    latent = jax.random.normal(key, (count, root.shape[1]), dtype)
    joint = jnp.matmul(latent, jnp.asarray(root.T, dtype), precision="highest")
    return Pairs(joint[:, :da], joint[:, da:], None)


def latent_clusters(
    key: Key[Array, ""],
    count: int,
    *,
    clusters: int,
    dim: int,
    separation: float | int,
    noise: float | int = 1,
    offset: float | int = 0,
    weights: Sequence[float | int] | Float[Matrix, " clusters"] | None = None,
) -> Pairs:
    """Draw pairs that share a latent class, and optionally a latent position within it.

    c_i ~ Categorical(weights),  h_i = m_{c_i} + offset u_i,  a_i = h_i + noise e_i,  b_i = h_i + noise e'_i,
    with u, e, e' ~ N(0, I_dim) independent. The centres m_c are the corners of a regular simplex about the origin in a
    random orientation: |m_c - m_c'| = separation for every two of them. Hence

    E |a_i - b_i|^2 = 2 noise^2 dim,
    E |a_i - a_j|^2 = 2 (noise^2 + offset^2) dim, plus separation^2 if c_i != c_j.

    Another key is another set of centres: for held-out pairs of the same clusters draw once and split the rows.

    Parameters
    ----------
    key : PRNG key
        Fixes the centres and the draw.
    count : int
        Number of pairs.
    clusters : int
        Number of classes, at most ``dim``.
    dim : int
        Dimension of both views.
    separation : float
        Distance between any two centres.
    noise : float
        Standard deviation, per coordinate, of what the views do not share.
    offset : float
        Standard deviation, per coordinate, of the position within the class that both views share.
    weights : (clusters,), optional
        Relative class frequencies; uniform by default.

    Returns
    -------
    Pairs
        ``a`` and ``b`` (count, dim) in the default float dtype; ``labels`` (count,) int32, c_i.

    Raises
    ------
    ValueError
        If a size or strength is out of its range, or the weights are no frequencies.

    Source
    ------
    Derivation. The latent-class view of contrastive learning is that of Arora et al. 2019 (arXiv 1902.09229).
    """
    if count < 1 or clusters < 1:
        raise ValueError(f"count and clusters must be at least 1, got {count} and {clusters}.")
    if clusters > dim:
        raise ValueError(f"{clusters} equidistant clusters do not fit in dimension {dim}: use dim >= {clusters}.")
    for name, value in {"separation": separation, "noise": noise, "offset": offset}.items():
        if not (isfinite(value) and value >= 0):
            raise ValueError(f"{name} must be a finite number >= 0, got {value}: use 0 to switch it off.")
    dtype = jnp.result_type(float)
    frequencies = np.ones(clusters) if weights is None else np.asarray(weights, np.float64)
    if frequencies.shape != (clusters,):
        raise ValueError(f"weights has shape {frequencies.shape}: give one weight for each of the {clusters} clusters.")
    if not (np.all(np.isfinite(frequencies)) and np.all(frequencies >= 0) and np.any(frequencies > 0)):
        raise ValueError(f"weights must be finite, >= 0 and not all 0, got {frequencies.tolist()}.")
    for_centres, for_labels, for_offset, for_a, for_b = jax.random.split(key, 5)
    # Orthonormal vectors are sqrt 2 apart.
    corners = _orthonormal(for_centres, dim, clusters).T * (separation / np.sqrt(2))
    centres = jnp.asarray(corners - corners.mean(axis=0, keepdims=True), dtype)
    labels = jax.random.categorical(for_labels, jnp.log(jnp.asarray(frequencies, dtype)), shape=(count,))
    labels = labels.astype(jnp.int32)
    shared, only_a, only_b = (jax.random.normal(k, (count, dim), dtype) for k in (for_offset, for_a, for_b))
    latent = centres[labels] + offset * shared
    return Pairs(latent + noise * only_a, latent + noise * only_b, labels)
