r"""Canonical correlations of two views, and of any two Gram matrices.

For centred views X (n, dx) and Y (n, dy) let S_xx = X^T X / (n - 1), S_xy and S_yy likewise, and r the ridge. Canonical
directions a_j, b_j and correlations rho_j are the singular triplets of the whitened cross-covariance:

.. math:: (S_{xx} + r I)^{-1/2} S_{xy} (S_{yy} + r I)^{-1/2} = \sum_j \rho_j u_j v_j^T, \qquad
          a_j = (S_{xx} + r I)^{-1/2} u_j, \quad b_j = (S_{yy} + r I)^{-1/2} v_j.

So a^T (S_xx + r I) a = 1, and without ridge every projected view has unit variance and correlation rho_j with its
partner, and no correlation with the rest. With a ridge the variance of a projection is 1 - r |a|^2.

Ridge. It is in squared units of the data, the same for both views: scale them alike, or rescale one. Without it, views
of ranks p and q of the centred data correlate perfectly in at least p + q - (n - 1) directions whatever they hold,
which is an error here and not a result.

Signs. The entry of largest modulus of each a_j is positive, the first where several are equally large; b_j follows.

Low rank. Directions in which a view has no variance get weight 0. Equal correlations determine only the span of their
directions: compare subspaces there.
"""

from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from theorykit.spectral import _canonical, _krylov
from theorykit.spectral._checks import Matrix, check_count, check_data, check_finite, check_gram, check_method
from theorykit.spectral._directions import hold, largest_sign, project, roots_above_rounding
from theorykit.spectral.pca import MOST_PASSES, TOLERANCE, dense_moments, feature_directions

_VARY = "pass views with a feature that varies"


class CCA(NamedTuple):
    """Canonical directions of two views.

    Attributes
    ----------
    mean_x, mean_y : (dx,) and (dy,) means of the views.
    x_weights, y_weights : (dx, k) and (dy, k) directions a_j and b_j; ``(x - mean_x) @ x_weights`` are the variates.
    correlations : (k,) canonical correlations in [0, 1], decreasing; with a ridge, the singular values above, smaller
        than the correlations of the variates.
    residuals : (k,) norms of what is left of each singular triplet's equations in whitened coordinates, where the
        largest singular value is at most 1; estimated for "randomised", 0 for the dense solver.
    angle : () sine of the largest angle between the spans of the variates and the true ones, estimated from the
        residuals and the gap below correlation k; infinite where no gap was resolved. The dense solver estimates
        nothing and says 0, also where correlations k and k + 1 are equal and the span is arbitrary among theirs.
    status : () integer, one of CONVERGED, ROUNDING, MAX_STEPS of `_krylov`, as for `PCA`.
    steps : () passes over both views; 0 for the dense solver.
    """

    mean_x: Float[Array, " dx"]
    mean_y: Float[Array, " dy"]
    x_weights: Float[Array, "dx k"]
    y_weights: Float[Array, "dy k"]
    correlations: Float[Array, " k"]
    residuals: Float[Array, " k"]
    angle: Float[Array, ""]
    status: Int[Array, ""]
    steps: Int[Array, ""]

    def describe(self) -> str:
        """Say in words how the solver ended, and how accurate the directions are."""
        return _krylov.describe(self)


class KernelCCA(NamedTuple):
    """Canonical directions of two views in the feature spaces of two kernels.

    Attributes
    ----------
    means_x, means_y : (n,) means of the columns of the two Gram matrices.
    x_coefficients, y_coefficients : (n, k) direction j is ``sum_i x_coefficients[i, j] phi(x_i)``; they sum
        to 0 over i.
    correlations : (k,) singular values in [0, 1), decreasing.
    """

    means_x: Float[Array, " n"]
    means_y: Float[Array, " n"]
    x_coefficients: Float[Array, "n k"]
    y_coefficients: Float[Array, "n k"]
    correlations: Float[Array, " k"]


def cca(
    x: Matrix,
    y: Matrix,
    k: int,
    *,
    ridge: float | Float[Array, ""] = 0.0,
    method: Literal["exact", "randomised"] = "exact",
    key: Key[Array, ""] | None = None,
    tolerance: float = TOLERANCE,
    max_steps: int = MOST_PASSES,
) -> CCA:
    r"""Find the first k pairs of canonical directions.

    "exact" takes the singular value decompositions of both views and of the product of their shrunken left singular
    vectors, so that no covariance is formed or inverted. Singular values below max(n, d) eps of the largest count as 0
    unless a ridge outweighs them. It can be traced (jit, vmap); values are not checked then, and what is beyond the
    rank gets correlation and weights 0.

    "randomised" reads the data in blocks, as `pca` does, and forms no covariance either: a block Davidson method on the
    two-sided problem, preconditioned by the Ritz pairs of a block Krylov space of each view. See `_canonical` for its
    cost: it pays where dx and dy are too large for a dense decomposition. It works with products of the covariances, so
    the eigenvalues of each, ridge included, may spread by 1/(10 eps) at most, 8e5 in float32; beyond, the status is
    ROUNDING and the angle infinite. The spread, times eps, also limits the angle that it can certify: in float32 the
    true angle is often ten times better. It does not count ranks: pairs beyond the rank of a view get correlation 0 to
    rounding and weights 0, with status ROUNDING and an infinite angle, where "exact" raises an error.

    Parameters
    ----------
    x, y : (n, dx) and (n, dy) the two views, one pair per row.
    k : number of pairs, at most min(n - 1, dx, dy).
    ridge : r >= 0, added to the variances of all features of both views, in their squared units.
    method : "exact" or "randomised".
    key : PRNG key of the random start; needed by "randomised" only.
    tolerance : "randomised" stops once `angle` is at most this.
    max_steps : most passes over the views, after those for the preconditioner.

    Returns
    -------
    CCA, with the status of the solver.

    Raises
    ------
    ValueError : shapes that do not fit, more pairs than the ranks allow ("exact"), a view that does not vary, values
        that are not finite, a negative ridge, n - 1 less than the sum of the ranks (of dx + dy for "randomised")
        without ridge, no key.
    TypeError : data that are not float32 or float64, or of two dtypes; tracing the randomised method.

    Source: Hotelling 1936 (Biometrika 28); Vinod 1976 (J. Econometrics 4) for the ridge; Bjoerck and Golub 1973 (Math.
    Comp. 27) for the decomposition; the randomised method is derived in `_canonical`.
    """
    x, y = check_data("x", x, True), check_data("y", y, True)
    (n, dx), dy = x.shape, y.shape[1]
    _check_pair(x, y, ridge)
    most = min(n - 1, dx, dy)
    check_count(k, most, f"min(n - 1, dx, dy) = {most} pairs of canonical directions")
    check_method(method, key, x, tolerance, max_steps)
    check_method(method, key, y, tolerance, max_steps)
    if method == "randomised":
        return _randomised(x, y, k, ridge, key, tolerance, max_steps)
    x, y = jnp.asarray(x), jnp.asarray(y)
    (mean_x, total_x), (mean_y, total_y) = dense_moments(x, True), dense_moments(y, True)
    _check_total("x", total_x)
    _check_total("y", total_y)
    scaled = jnp.asarray((n - 1) * ridge, x.dtype)
    with _krylov.few_threads(x), _krylov.few_threads(y):
        (qx, ux, sx, vx), (qy, uy, sy, vy) = hold([_decompose(z, m, scaled) for z, m in ((x, mean_x), (y, mean_y))])
    overlap = jnp.matmul(qx.T, qy, precision="highest")
    overlap = jnp.matmul(ux.T, jnp.matmul(overlap, uy, precision="highest"), precision="highest")
    a, b, rho = _canonical_pairs(sx, sy, overlap, n, ridge, k)
    a, b = jnp.matmul(vx, a, precision="highest"), jnp.matmul(vy, b, precision="highest")
    zero, none = jnp.zeros((), x.dtype), jnp.zeros((), jnp.int32)
    return CCA(mean_x, mean_y, *_with_signs(a, b), rho, jnp.zeros(k, x.dtype), zero, none, none)


def _randomised(x, y, k, ridge, key, tolerance, max_steps):
    n, d = x.shape[0], x.shape[1] + y.shape[1]
    if not ridge and d > n - 1:
        raise ValueError(
            f"n - 1 = {n - 1} is less than dx + dy = {d}: without ridge, views of full rank have at least "
            f"{d - n + 1} correlations of exactly 1, whatever they hold. Pass ridge > 0 or more points, or, if "
            'the ranks are much lower, method="exact", which counts them'
        )
    (mean_x, total_x), (mean_y, total_y) = _krylov.moments(x, True), _krylov.moments(y, True)
    _check_total("x", total_x)
    _check_total("y", total_y)
    found = _canonical.leading_pairs(
        (x, y),
        (mean_x, mean_y),
        (float(total_x), float(total_y)),
        k,
        key,
        ridge=(n - 1) * float(ridge),
        tolerance=tolerance,
        max_steps=max_steps,
    )
    scale, dtype = (n - 1) ** 0.5, mean_x.dtype
    return CCA(
        mean_x,
        mean_y,
        *_with_signs(found.x * scale, found.y * scale),
        jnp.asarray(found.values, dtype),
        jnp.asarray(found.residuals, dtype),
        jnp.asarray(found.angle, dtype),
        jnp.asarray(found.status, jnp.int32),
        jnp.asarray(found.steps, jnp.int32),
    )


def transform(model: CCA, x: Matrix, y: Matrix) -> tuple[Float[Array, "m k"], Float[Array, "p k"]]:
    """Project both views onto their canonical directions, ``(x - mean_x) a`` and ``(y - mean_y) b``.

    Parameters
    ----------
    model : result of `cca`.
    x, y : (m, dx) and (p, dy) points of the views, not necessarily in pairs.

    Returns
    -------
    (m, k) and (p, k) canonical variates, without unit.

    Raises
    ------
    ValueError : points of another dimension.

    Source: Hotelling 1936.
    """
    return project("x", x, model.mean_x, model.x_weights), project("y", y, model.mean_y, model.y_weights)


def kernel_cca(kx: Matrix, ky: Matrix, k: int, *, ridge: float | Float[Array, ""]) -> KernelCCA:
    r"""Find the first k pairs of canonical directions in the feature spaces of two kernels.

    With centred Gram matrices K and L, directions sum_i alpha_i phi(x_i) and sum_i beta_i psi(y_i) maximise
    alpha^T K L beta / (n - 1) under alpha^T (K^2 / (n - 1) + r K) alpha = 1 and its like. For K = X X^T and L = Y Y^T
    these are the directions of `cca` with the same ridge. Dense, for n up to some thousands; traceable.

    Parameters
    ----------
    kx, ky : (n, n) symmetric, positive semidefinite kernels of the two views of the same n pairs.
    k : number of pairs, at most n - 1.
    ridge : r >= 0 in units of the kernels, the same for both. Kernels of full rank need r > 0: without it all their
        correlations are 1.

    Returns
    -------
    KernelCCA.

    Raises
    ------
    ValueError : matrices that are not square, of different size, not symmetric, not positive semidefinite, not finite;
        more pairs than the ranks allow; a negative ridge; ranks of sum above n - 1 without ridge.
    TypeError : matrices that are not float32 or float64, or of two dtypes.

    Source: Bach and Jordan 2002 (JMLR 3); Hardoon, Szedmak and Shawe-Taylor 2004 (Neural Computation 16), with the
    ridge on the norm of the direction.
    """
    kx, ky = check_gram("kx", kx, True), check_gram("ky", ky, True)
    _check_pair(kx, ky, ridge)
    n = kx.shape[0]
    check_count(k, n - 1, f"n - 1 = {n - 1} pairs of canonical directions")
    means_x, values_x, ux = feature_directions("kx", kx, True)
    means_y, values_y, uy = feature_directions("ky", ky, True)
    sx, sy = (
        roots_above_rounding(values, n, jnp.max(jnp.abs(gram))) for values, gram in ((values_x, kx), (values_y, ky))
    )
    a, b, rho = _canonical_pairs(sx, sy, jnp.matmul(ux.T, uy, precision="highest"), n, ridge, k)
    a = jnp.matmul(ux, _inverse(sx)[:, None] * a, precision="highest")
    b = jnp.matmul(uy, _inverse(sy)[:, None] * b, precision="highest")
    return KernelCCA(means_x, means_y, *_with_signs(a, b), rho)


def kernel_transform(
    model: KernelCCA, cross_x: Matrix, cross_y: Matrix
) -> tuple[Float[Array, "m k"], Float[Array, "p k"]]:
    """Project points onto the canonical directions in the feature spaces, ``(k(x, X) - means_x) alpha`` and its like.

    Parameters
    ----------
    model : result of `kernel_cca`.
    cross_x, cross_y : (m, n) and (p, n) kernels of new points of each view with the training points.

    Returns
    -------
    (m, k) and (p, k) canonical variates, without unit.

    Raises
    ------
    ValueError : a kernel with another number of training points.

    Source: Hardoon, Szedmak and Shawe-Taylor 2004.
    """
    return (
        project("cross_x", cross_x, model.means_x, model.x_coefficients),
        project("cross_y", cross_y, model.means_y, model.y_coefficients),
    )


@jax.jit
def _decompose(x, mean, ridge):
    """X_c = Q U diag(s) V^T: orthonormal Q, and U, s and V of the small factor R; s is 0 at the level of rounding.

    A ridge above that level keeps small singular values harmless: then they stay.
    """
    q, r = jnp.linalg.qr(x - mean[None, :])
    u, s, vt = jnp.linalg.svd(r, full_matrices=False)
    real = jnp.sqrt(s**2 + ridge) > max(x.shape) * jnp.finfo(s.dtype).eps * s[0]
    return q, u, jnp.where(real, s, 0), vt.T


def _inverse(s):
    return jnp.where(s > 0, 1 / jnp.where(s > 0, s, 1), 0)


def _canonical_pairs(sx, sy, overlap, n, ridge, k):
    """Weights in the right singular bases, and the correlations.

    With X = U s V^T the whitening is V (s^2 + (n - 1) r)^(-1/2) V^T, so the whitened cross-covariance is
    diag(f_x) U_x^T U_y diag(f_y), U_x^T U_y being `overlap`, with f = s / sqrt(s^2 + (n - 1) r) <= 1.
    """
    if not any(isinstance(s, jax.core.Tracer) for s in (sx, sy)):
        _check_ranks(int(jnp.sum(sx > 0)), int(jnp.sum(sy > 0)), n, ridge, k)
    with _krylov.few_threads(overlap):
        return hold(_whitened(sx, sy, overlap, jnp.asarray((n - 1) * ridge, sx.dtype), n, k))


@partial(jax.jit, static_argnums=(4, 5))
def _whitened(sx, sy, overlap, ridge, n, k):
    shrunk_x, shrunk_y = (_inverse(jnp.where(s > 0, jnp.sqrt(s**2 + ridge), 0)) for s in (sx, sy))
    cross = (sx * shrunk_x)[:, None] * overlap * (sy * shrunk_y)[None, :]
    left, rho, right = jnp.linalg.svd(cross, full_matrices=False)
    a, b = shrunk_x[:, None] * left[:, :k], shrunk_y[:, None] * right[:k].T
    root = (n - 1) ** 0.5
    return root * a, root * b, jnp.minimum(rho[:k], 1)  # rounding can carry a correlation beyond 1


def _with_signs(a, b):
    signs = largest_sign(a)[None, :]
    return a * signs, b * signs


def _check_pair(x, y, ridge):
    if x.shape[0] != y.shape[0]:
        raise ValueError(f"the views hold {x.shape[0]} and {y.shape[0]} points: pass pairs, row by row")
    if x.dtype != y.dtype:
        raise TypeError(f"the views have dtypes {x.dtype} and {y.dtype}: cast one to the other's")
    if not isinstance(ridge, jax.core.Tracer) and not 0 <= ridge < np.inf:
        raise ValueError(f"ridge is {ridge}: pass a finite number >= 0")


def _check_total(name, total):
    """A view of finite values that vary, by the sum of their squares about the mean."""
    check_finite(name, total)
    if not isinstance(total, jax.core.Tracer) and float(total) == 0:
        raise ValueError(f"{name} is the same at all points and has no canonical directions: {_VARY}")


def _check_ranks(rank_x, rank_y, n, ridge, k):
    if k > min(rank_x, rank_y):
        raise ValueError(
            f"k is {k}, but the centred views have ranks {rank_x} and {rank_y}, and so only {min(rank_x, rank_y)} "
            f"pairs of canonical directions: {'lower k' if min(rank_x, rank_y) else _VARY}"
        )
    if not ridge and rank_x + rank_y > n - 1:
        raise ValueError(
            f"the centred views have ranks {rank_x} and {rank_y} in a space of n - 1 = {n - 1} dimensions, so at least "
            f"{rank_x + rank_y - n + 1} correlations are exactly 1, whatever the data hold: pass ridge > 0, or more "
            "points, or reduce the views by pca first"
        )
