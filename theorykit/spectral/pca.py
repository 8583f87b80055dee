r"""Principal components of data, and of any Gram matrix.

For data X (n, d) with mean m, let X_c = X - 1 m^T and S = X_c^T X_c / (n - 1). The first k principal components are the
orthonormal eigenvectors V of S to its largest eigenvalues, the variances:

.. math:: S v_j = \lambda_j v_j, \qquad \lambda_1 \ge \dots \ge \lambda_k, \qquad \sum_j \lambda_j \le \mathrm{Tr}\, S.

Without centring m = 0 and S = X^T X / n, the second moment.

Signs. An eigenvector has no sign. Here its entry of largest modulus is positive, the first such entry where several
are equally large: in each component of `pca`, as in scikit-learn, and in each column of coefficients of `kernel_pca`.

Equal variances. Where variances repeat, only the span of their components is determined and any orthonormal basis of it
may be returned: compare subspaces, by `principal_angles` or `projector_distance` of `compare`, never single vectors.

Low rank. With n < d, repeated or constant features the rank is below min(n, d). Components beyond it have variance 0 to
rounding; they complete the orthonormal basis and mean nothing else. A kernel has no such components: there the
coefficients are 0.
"""

from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from theorykit.spectral import _krylov
from theorykit.spectral._checks import (
    Matrix,
    check_count,
    check_data,
    check_finite,
    check_gram,
    check_method,
    check_values,
    relative_rounding,
)
from theorykit.spectral._directions import hold, positive_largest, project, roots_above_rounding

# The sine of the angle to which the randomised solver determines the span of the components: small beside the angles
# between trained encoders and predictions, and within reach of float32 where variances are some thousandths apart.
TOLERANCE = 1e-4
# Only a bound on the work: spectra without any gap took about ten passes.
MOST_PASSES = 100


class PCA(NamedTuple):
    """Principal components of data.

    Attributes
    ----------
    mean : (d,) mean of the data; 0 if it was not to be centred.
    components : (d, k) orthonormal columns, that of the largest variance first; signs as the module says.
    variances : (k,) variances along them, decreasing, in squared units of the data.
    total_variance : () sum of all d variances: variances / total_variance is the explained fraction.
    residuals : (k,) ``|S v - lambda v| / lambda_1`` of each component as it was measured: some eigenvalue of S lies so
        close to each variance. 0 for the dense solver, whose error is rounding.
    angle : () bound on the sine of the largest angle between the span of the components and the true one, by the
        residuals and the gap below variance k. Infinite where no gap was resolved. The dense solver estimates nothing
        and says 0, also where variances k and k + 1 are equal: then that span is arbitrary within their eigenspace.
    status : () integer, one of CONVERGED, ROUNDING, MAX_STEPS of `_krylov`: only CONVERGED (0) means that `angle` is
        within the tolerance. ROUNDING (1): the residuals are at the rounding of the dtype and variances k and k + 1
        are too close for it. MAX_STEPS (2): the passes were used up.
    steps : () number of products with the data; 0 for the dense solver.
    """

    mean: Float[Array, " d"]
    components: Float[Array, "d k"]
    variances: Float[Array, " k"]
    total_variance: Float[Array, ""]
    residuals: Float[Array, " k"]
    angle: Float[Array, ""]
    status: Int[Array, ""]
    steps: Int[Array, ""]

    def describe(self) -> str:
        """Say in words how the solver ended, and how accurate the components are."""
        return _krylov.describe(self)


class KernelPCA(NamedTuple):
    """Principal components in the feature space of a kernel.

    Attributes
    ----------
    means : (n,) means of the columns of the Gram matrix; 0 if it was not to be centred.
    coefficients : (n, k) component j is ``sum_i coefficients[i, j] phi(x_i)``, of unit norm in the feature space. They
        sum to 0 over i if centred. 0 where the variance is 0 to rounding.
    variances : (k,) variances along them, decreasing, in units of the kernel.
    total_variance : () sum of all variances.
    residuals, angle, status, steps : as those of `PCA`, for the centred Gram matrix in place of S.
    """

    means: Float[Array, " n"]
    coefficients: Float[Array, "n k"]
    variances: Float[Array, " k"]
    total_variance: Float[Array, ""]
    residuals: Float[Array, " k"]
    angle: Float[Array, ""]
    status: Int[Array, ""]
    steps: Int[Array, ""]

    def describe(self) -> str:
        """Say in words how the solver ended, and how accurate the components are."""
        return _krylov.describe(self)


def pca(
    x: Matrix,
    k: int,
    *,
    method: Literal["exact", "randomised"] = "exact",
    key: Key[Array, ""] | None = None,
    centre: bool = True,
    tolerance: float = TOLERANCE,
    max_steps: int = MOST_PASSES,
) -> PCA:
    r"""Find the first k principal components, ``S v = lambda v`` with S the covariance.

    "exact" takes the singular values of X_c = U diag(s) V^T, lambda = s^2 / (n - 1), by a QR decomposition first where
    n > d: small variances keep their digits, as they do not in the Gram matrix. Time n d min(n, d) and memory of a few
    times the data. It can be traced (jit, vmap), where values are not checked.

    "randomised" forms no Gram matrix, unless d is at most three blocks of k + 8 columns (rounded up to a multiple of
    8). It reads the data in pieces of a few MB, five to ten times in all, and holds about 32 blocks of d vectors. A
    numpy array, also a `numpy.memmap`, stays on the host and passes piece by piece to the device. Not traceable. Floats
    are used in JAX's current precision: float64 data are rounded to float32 unless x64 is on.

    Parameters
    ----------
    x : (n, d) data, one point per row.
    k : number of components, at most min(n, d).
    method : "exact" or "randomised".
    key : PRNG key of the random start; needed by "randomised" only.
    centre : subtract the mean and divide by n - 1; else take the second moment, divided by n.
    tolerance : "randomised" stops once `angle`, a bound on the sine of the angle to the true span, is at most this.
    max_steps : most products with the data that "randomised" takes.

    Returns
    -------
    PCA, with the status of the solver.

    Raises
    ------
    ValueError : shapes that do not fit, more components than min(n, d), values that are not finite, no key.
    TypeError : data that are not float32 or float64; tracing the randomised method.

    Source: Pearson 1901; Halko, Martinsson and Tropp 2011 (arXiv 0909.4061) and Musco and Musco 2015 (arXiv 1504.05477)
    for the randomised method, see `_krylov`.
    """
    x = check_data("x", x, centre)
    n, d = x.shape
    check_count(k, min(n, d), f"min(n, d) = {min(n, d)} components: data of {n} points in {d} dimensions have no more")
    check_method(method, key, x, tolerance, max_steps)
    divisor = n - 1 if centre else n
    if method == "exact":
        x = jnp.asarray(x)
        mean, total = dense_moments(x, centre)
        check_finite("x", total)
        with _krylov.few_threads(x):
            s, v = hold(singular(x, mean))
        found = _krylov.Leading(s[:k] ** 2, v[:, :k], jnp.zeros(k, x.dtype), 0.0, _krylov.CONVERGED, 0)
    else:
        mean, total = _krylov.moments(x, centre)
        check_finite("x", total)

        def product(block):
            return _krylov.products((x,), (mean,), (block,))[0]

        found = _krylov.leading(product, d, k, key, mean.dtype, tolerance=tolerance, max_steps=max_steps)
    return PCA(
        mean,
        positive_largest(found.vectors),
        jnp.asarray(found.values, mean.dtype) / divisor,
        total / divisor,
        jnp.asarray(found.residuals, mean.dtype),
        jnp.asarray(found.angle, mean.dtype),
        jnp.asarray(found.status, jnp.int32),
        jnp.asarray(found.steps, jnp.int32),
    )


def transform(model: PCA, x: Matrix) -> Float[Array, "m k"]:
    """Project points onto the components, ``(x - mean) V``.

    Parameters
    ----------
    model : result of `pca`.
    x : (m, d) points in the units of the data.

    Returns
    -------
    (m, k) coordinates along the components, in units of the data.

    Raises
    ------
    ValueError : points of another dimension.

    Source: Pearson 1901.
    """
    return project("x", x, model.mean, model.components)


def kernel_pca(gram: Matrix, k: int, *, centre: bool = True) -> KernelPCA:
    r"""Find the first k principal components in the feature space of a kernel.

    With H = I - 1 1^T / n, the centred Gram matrix H K H = U diag(mu) U^T gives variances mu / (n - 1) and components
    sum_i a_i phi(x_i) with a = u / sqrt(mu). For K = X X^T these are the variances and projections of `pca`. Without
    centring H = I, and mu is divided by n. Dense, for n up to some thousands (beyond: `kernel_pca_by_products`);
    traceable, values unchecked then.

    Parameters
    ----------
    gram : (n, n) symmetric, positive semidefinite kernel of the training points with themselves.
    k : number of components, at most n.
    centre : centre the points in the feature space.

    Returns
    -------
    KernelPCA.

    Raises
    ------
    ValueError : not a square matrix, not symmetric, not positive semidefinite, not finite, more than n components.
    TypeError : a matrix that is not float32 or float64.

    Source: Schoelkopf, Smola and Mueller 1998 (Neural Computation 10).
    """
    gram = check_gram("gram", gram, centre)
    n = gram.shape[0]
    check_count(k, n, f"n = {n} components: the feature space holds no more than the points span")
    means, values, vectors = feature_directions("gram", gram, centre)
    trace = jnp.trace(gram) - (jnp.sum(means) if centre else 0)
    found = _krylov.Leading(values[:k], vectors[:, :k], np.zeros(k), 0.0, _krylov.CONVERGED, 0)
    return _kernel_components(means, found, trace, centre, jnp.max(jnp.abs(gram)))


def kernel_pca_by_products(
    product: Callable[[Array], Array],
    diagonal: Float[Array, " n"],
    k: int,
    *,
    key: Key[Array, ""],
    centre: bool = True,
    tolerance: float = TOLERANCE,
    max_steps: int = MOST_PASSES,
) -> KernelPCA:
    r"""As `kernel_pca`, from products K B with blocks of vectors, for n too large to hold K.

    The block Krylov method of `pca` applied to H K H. It takes five to ten products with blocks of k + 8 columns
    (rounded up to a multiple of 8), and one with a single column. Where n is at most three such blocks it takes one
    product with the identity. Not traceable.

    Parameters
    ----------
    product : function of (n, b) that returns K times it, (n, b); K symmetric and positive semidefinite, which is not
        checked. Compile it, since it is called some ten times with one shape; `ntk.ntk_vector_product` maps over
        columns.
    diagonal : (n,) diagonal of K, for the total variance.
    k : number of components, at most n.
    key : PRNG key of the random start.
    centre : centre the points in the feature space.
    tolerance, max_steps : as for `pca`.

    Returns
    -------
    KernelPCA, with the status of the solver.

    Raises
    ------
    ValueError : a diagonal that is no vector, negative or not finite; products of another shape or not finite; more
        than n components; tolerance or max_steps out of range.
    TypeError : numbers that are not real floating point, products of another dtype; tracing.

    Source: Schoelkopf, Smola and Mueller 1998 (Neural Computation 10); Musco and Musco 2015 (arXiv 1504.05477).
    """
    check_values("kernel_pca_by_products", diagonal=diagonal)
    if diagonal.ndim != 1 or diagonal.shape[0] < 1 + centre:
        raise ValueError(f"diagonal has shape {diagonal.shape}: pass k(x_i, x_i) of two or more points, (n,)")
    n, dtype = diagonal.shape[0], diagonal.dtype
    check_count(k, n, f"n = {n} components: the feature space holds no more than the points span")
    check_method("randomised", key, diagonal, tolerance, max_steps)
    if np.any(np.asarray(diagonal) < 0):
        raise ValueError("diagonal has negative entries: pass k(x_i, x_i) of a positive semidefinite kernel")
    sums = product(jnp.ones((n, 1), dtype))
    if sums.shape != (n, 1) or sums.dtype != dtype:
        raise (ValueError if sums.dtype == dtype else TypeError)(
            f"product maps ({n}, 1) of {dtype} to {sums.shape} of {sums.dtype}: return K times the block, in its dtype"
        )
    check_values("kernel_pca_by_products", product=sums)
    means = sums[:, 0] / n if centre else jnp.zeros(n, dtype)

    def centred(block):
        return _less_mean(product(_less_mean(block))) if centre else product(block)

    found = _krylov.leading(centred, n, k, key, dtype, tolerance=tolerance, max_steps=max_steps)
    # As in `_eigen`: columns sum to 0, which transforms rely on.
    found = found._replace(vectors=_less_mean(found.vectors)) if centre else found
    # No entry of a positive semidefinite matrix exceeds the largest of its diagonal.
    return _kernel_components(means, found, jnp.sum(diagonal) - jnp.sum(means), centre, jnp.max(diagonal))


def _kernel_components(means, found, trace, centre, size):
    """Coefficients and variances from eigenpairs of the Gram matrix and its trace."""
    n, dtype = means.shape[0], means.dtype
    divisor = n - 1 if centre else n
    roots = roots_above_rounding(jnp.asarray(found.values, dtype), n, size)
    inverse = jnp.where(roots > 0, 1 / jnp.where(roots > 0, roots, 1), 0)
    return KernelPCA(
        means,
        positive_largest(found.vectors * inverse[None, :]),
        roots**2 / divisor,
        trace / divisor,
        jnp.asarray(found.residuals, dtype),
        jnp.asarray(found.angle, dtype),
        jnp.asarray(found.status, jnp.int32),
        jnp.asarray(found.steps, jnp.int32),
    )


@jax.jit
def _less_mean(block):
    return block - jnp.mean(block, axis=0)[None, :]


def kernel_transform(model: KernelPCA, cross: Matrix) -> Float[Array, "m k"]:
    """Project points onto the components in the feature space, ``(k(x, X) - means) a``.

    The terms of centring that are the same for all training points drop out, since coefficients sum to 0 then.

    Parameters
    ----------
    model : result of `kernel_pca`.
    cross : (m, n) kernel of the new points with the training points.

    Returns
    -------
    (m, k) coordinates along the components, in the square root of units of the kernel.

    Raises
    ------
    ValueError : a kernel with another number of training points.

    Source: Schoelkopf, Smola and Mueller 1998.
    """
    return project("cross", cross, model.means, model.coefficients)


@jax.jit
def singular(x: Array, mean: Array) -> tuple[Array, Array]:
    """Singular values of the centred data, decreasing, and right singular vectors (d, min(n, d))."""
    centred = x - mean[None, :]
    square = jnp.linalg.qr(centred, mode="r") if x.shape[0] > x.shape[1] else centred
    _, s, vt = jnp.linalg.svd(square, full_matrices=False)
    return s, vt.T


def feature_directions(name: str, gram: Array, centre: bool) -> tuple[Array, Array, Array]:
    """Means of the columns, eigenvalues (decreasing) and eigenvectors of the centred Gram matrix."""
    with _krylov.few_threads(gram):
        means, values, vectors = hold(_eigen(gram, centre))
    if not isinstance(values, jax.core.Tracer):
        least, largest = float(values[-1]), float(jnp.max(jnp.abs(values)))
        if least < -relative_rounding(gram.dtype) * max(largest, float(jnp.max(jnp.abs(gram)))):
            raise ValueError(
                f"{name} is not positive semidefinite (smallest eigenvalue {least:.2g}, largest {float(values[0]):.2g}"
                "): pass the kernel of one set of points with itself"
            )
    return means, values, vectors


@partial(jax.jit, static_argnums=1)
def _eigen(gram, centre):
    means = jnp.mean(gram, axis=0) if centre else jnp.zeros(gram.shape[0], gram.dtype)
    centred = gram - means[None, :] - means[:, None] + jnp.mean(means)
    values, vectors = jnp.linalg.eigh((centred + centred.T) / 2)
    vectors = vectors[:, ::-1]
    # Columns sum to 0 in theory, where eigenvalues are not 0; what the transforms leave out relies on it.
    return means, values[::-1], vectors - jnp.mean(vectors, axis=0)[None, :] if centre else vectors


@partial(jax.jit, static_argnums=1)
def dense_moments(x: Array, centre: bool) -> tuple[Array, Array]:
    """Mean of the rows (0 if not centred) and sum of the squares beyond it, as `_krylov.moments` takes them."""
    mean = x[0] + jnp.mean(x - x[0][None, :], axis=0) if centre else jnp.zeros(x.shape[1], x.dtype)
    return mean, jnp.sum((x - mean[None, :]) ** 2)
