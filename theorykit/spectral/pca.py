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

from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from theorykit.spectral import _krylov

Matrix = Float[Array, "..."] | Float[np.ndarray, "..."]  # shapes are checked by hand, with messages that help

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
        residuals and the gap below variance k. Infinite where no gap was resolved; 0 for the dense solver.
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
    """

    means: Float[Array, " n"]
    coefficients: Float[Array, "n k"]
    variances: Float[Array, " k"]
    total_variance: Float[Array, ""]


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
    centring H = I, and mu is divided by n. Dense, for n up to some thousands; traceable, values unchecked then.

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
    divisor = n - 1 if centre else n
    values, roots = values[:k], roots_above_rounding(values, n)[:k]
    inverse = jnp.where(roots > 0, 1 / jnp.where(roots > 0, roots, 1), 0)
    centred_trace = jnp.trace(gram) - (jnp.sum(means) if centre else 0)
    return KernelPCA(
        means, positive_largest(vectors[:, :k] * inverse[None, :]), roots**2 / divisor, centred_trace / divisor
    )


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


def project(name: str, x: Matrix, mean: Array, directions: Array) -> Float[Array, "m k"]:
    """Centre points and take their products with directions (d, k)."""
    x = jnp.asarray(check_type(name, x))
    if x.shape[1] != mean.shape[0]:
        raise ValueError(
            f"{name} has {x.shape[1]} columns, but the model was fitted with {mean.shape[0]}: pass data in the same "
            "coordinates, or the kernel with the same training points"
        )
    return jnp.matmul(x - mean[None, :], directions, precision="highest")


@jax.jit
def positive_largest(vectors: Array) -> Array:
    """Flip columns so that the entry of largest modulus is positive."""
    return vectors * largest_sign(vectors)[None, :]


def largest_sign(vectors: Array) -> Array:
    """Sign of each column's entry of largest modulus, 1 for a column of zeros."""
    top = jnp.take_along_axis(vectors, jnp.argmax(jnp.abs(vectors), axis=0)[None, :], axis=0)[0]
    return jnp.where(top < 0, -jnp.ones_like(top), jnp.ones_like(top))


@jax.jit
def singular(x: Array, mean: Array) -> tuple[Array, Array]:
    """Singular values of the centred data, decreasing, and right singular vectors (d, min(n, d))."""
    centred = x - mean[None, :]
    square = jnp.linalg.qr(centred, mode="r") if x.shape[0] > x.shape[1] else centred
    _, s, vt = jnp.linalg.svd(square, full_matrices=False)
    return s, vt.T


def hold(arrays: Any) -> Any:
    """Wait for arrays, so that they are computed under the present number of threads; nothing while tracing."""
    return (
        arrays
        if any(isinstance(a, jax.core.Tracer) for a in jax.tree.leaves(arrays))
        else jax.block_until_ready(arrays)
    )


def feature_directions(name: str, gram: Array, centre: bool) -> tuple[Array, Array, Array]:
    """Means of the columns, eigenvalues (decreasing) and eigenvectors of the centred Gram matrix."""
    with _krylov.few_threads(gram):
        means, values, vectors = hold(_eigen(gram, centre))
    if not isinstance(values, jax.core.Tracer):
        least, largest = float(values[-1]), float(jnp.max(jnp.abs(values)))
        if least < -_relative_rounding(gram.dtype) * largest:
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


def roots_above_rounding(values: Array, n: int) -> Array:
    """Square roots of eigenvalues; 0 for those that cannot be told from 0 by a solver of size n."""
    real = values > n * jnp.finfo(values.dtype).eps * values[0]
    return jnp.where(real, jnp.sqrt(jnp.where(real, values, 1)), 0)


@partial(jax.jit, static_argnums=1)
def dense_moments(x: Array, centre: bool) -> tuple[Array, Array]:
    """Mean of the rows (0 if not centred) and sum of the squares beyond it, as `_krylov.moments` takes them."""
    mean = x[0] + jnp.mean(x - x[0][None, :], axis=0) if centre else jnp.zeros(x.shape[1], x.dtype)
    return mean, jnp.sum((x - mean[None, :]) ** 2)


def _relative_rounding(dtype):
    """What an asymmetry or a negative eigenvalue may be: rounding of sums over 1/eps random terms, sqrt(eps)."""
    return float(jnp.finfo(dtype).eps) ** 0.5


def check_type(name: str, x: Matrix) -> Matrix:
    """A matrix of real floats, or an error that says what to do."""
    x = x if isinstance(x, jax.Array | np.ndarray) else np.asarray(x)
    if np.issubdtype(x.dtype, np.complexfloating):
        raise TypeError(f"{name} is complex ({x.dtype}): stack its real and imaginary parts as features")
    if x.dtype not in (np.float32, np.float64):
        raise TypeError(f"{name} has dtype {x.dtype}: cast it to float32 or float64")
    if x.ndim != 2 or not x.size:
        hint = "flatten each point to one row of features"
        if x.ndim == 4:
            hint += ", or take one output (kernel[:, :, 0, 0]) or the mean over outputs of a full kernel"
        raise ValueError(f"{name} has shape {x.shape}, but must be a matrix that is not empty: {hint}")
    return x


def check_data(name: str, x: Matrix, centre: bool) -> Matrix:
    """Data that have a covariance."""
    x = check_type(name, x)
    if centre and x.shape[0] < 2:
        raise ValueError(f"{name} holds one point, which has no variance: pass two or more, or centre=False")
    return x


def check_gram(name: str, gram: Matrix, centre: bool) -> Array:
    """A symmetric Gram matrix."""
    gram = jnp.asarray(check_data(name, gram, centre))
    if gram.shape[0] != gram.shape[1]:
        raise ValueError(f"{name} has shape {gram.shape}, but must be square: the kernel of the points with themselves")
    if isinstance(gram, jax.core.Tracer):
        return gram
    check_finite(name, jnp.sum(jnp.abs(gram)))
    gap, size = float(jnp.max(jnp.abs(gram - gram.T))), float(jnp.max(jnp.abs(gram)))
    if gap > _relative_rounding(gram.dtype) * size:
        raise ValueError(
            f"{name} is not symmetric (entries differ from the transposed by {gap:.2g}, the largest is {size:.2g}): "
            "pass the kernel of one set of points with itself, symmetrised if only rounding is the cause"
        )
    return gram


def check_count(k: int, most: int, there_are: str) -> None:
    """A number of components that exist."""
    if not 1 <= k <= most:
        raise ValueError(f"k is {k}, but there are 1 to {there_are}; lower k or pass more data")


def check_finite(name: str, total: Array) -> None:
    """Finite values, known by a sum over all of them; not checked under tracing."""
    if not isinstance(total, jax.core.Tracer) and not bool(jnp.isfinite(total)):
        raise ValueError(
            f"{name} holds NaN, infinity or numbers whose squares overflow: drop such points, or rescale the data"
        )


def check_method(method: str, key: Array | None, x: Matrix, tolerance: float, max_steps: int) -> None:
    """A method that exists, with what it needs."""
    if method not in ("exact", "randomised"):
        raise ValueError(f'method is {method!r}: choose "exact" or "randomised"')
    if method == "exact":
        return
    if key is None:
        raise ValueError('method "randomised" starts at random: pass key=jax.random.key(0), say')
    if isinstance(x, jax.core.Tracer):
        raise TypeError('method "randomised" decides on the host when to stop: call it outside jit, or use "exact"')
    if not 0 < tolerance < 1 or max_steps < 1:
        raise ValueError(
            f"tolerance is {tolerance} and max_steps {max_steps}: pass the sine of an angle, between 0 and 1, and at "
            "least one step"
        )
