"""Exponential growth in function space: the rate at which a quadratic loss drives the embeddings apart.

For L = f^T A f / 2 the gradient flow at a fixed kernel is linear, df/dt = -K A f, and grows like exp(rho t) with rho
the largest eigenvalue of -K A. Under the linear dot-product loss rho > 0 does not depend on the width, which is what
makes the time at which the kernel starts to move logarithmic in the width.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg

from theorykit.ntk.gradient_flow import Values, check_problem, kernel_matrix, relative_rounding


class Growth(NamedTuple):
    """Exponential growth of the flow of a quadratic loss, L = f^T A f / 2.

    Attributes
    ----------
    rate : rho, the largest eigenvalue of -K A, per unit of time. Positive: the flow grows like exp(rho t).
    projection : |P_u f0|, the norm of the part of f0 that grows at that rate. NaN where rho is 0 to rounding, since
        the eigenvalue 0 of K A may lack a full set of eigenvectors.
    gap : rho minus the next eigenvalue; the growth is visible after a time of several 1/gap. Infinite if there is none.
    dimension : number of eigenvalues counted as equal to rho.
    spectrum : (n z,) all eigenvalues of -K A, increasing.
    """

    rate: float
    projection: float
    gap: float
    dimension: int
    spectrum: np.ndarray

    def discrete_rate(self, learning_rate: float) -> float:
        """Rate of gradient descent per unit of time, ln(1 + eta rho)/eta: its step multiplies by 1 + eta rho."""
        return float(np.log1p(learning_rate * self.rate) / learning_rate)


def growth(kernel: Values, loss: Callable, f0: Values, *, rtol: float | None = None) -> Growth:
    """Find the rate at which the flow of a quadratic loss grows, and how much of f0 takes part.

    For L = f^T A f / 2 the flow is df/dt = -K A f. With K = F F^T the matrix -K A has the eigenvalues of the symmetric
    -F^T A F, hence real ones; if v is an eigenvector of that to lambda != 0, F v is a right eigenvector of -K A and
    w = -A F v / lambda a left one with w^T F v = 1. So P_u f0 = sum F v (w^T f0) over the eigenvectors to rho.
    Dense, on the host, in float64: for n z up to a few thousand.

    Parameters
    ----------
    kernel : (n, n, z, z), or (n, n) meaning that kernel times the identity of the outputs.
    loss : a quadratic form of f (n, z), returning a scalar; this is verified.
    f0 : (n, z) embeddings at time 0.
    rtol : eigenvalues within rtol * max |eigenvalue| of rho count as rho; default sqrt(eps), which is rounding. An
        empirical kernel splits what is degenerate at infinite width by O(width^(-1/2)): raise it to take such a group.

    Returns
    -------
    Growth.

    Raises
    ------
    ValueError : shapes that do not match, values that are not finite, a kernel that is not symmetric and positive
        semidefinite, a loss that is not a quadratic form.

    Source: derivation, as above.
    """
    kernel, f0 = jnp.asarray(kernel), jnp.asarray(f0)
    check_problem((kernel,), loss, (f0,), jnp.zeros(1), None, None, 1)
    size, rounding = f0.size, relative_rounding(f0.dtype)
    form, *residuals = _quadratic_form(loss, f0)
    for residual, scale in residuals:
        if not residual <= rounding * scale:
            raise ValueError(
                "the loss is not a quadratic form f^T A f / 2 (its gradient is not A f), so no rate is defined: use a "
                "linear dot-product loss, or measure the growth along flow_stacked"
            )
    form = np.asarray(form, np.float64).reshape(size, size)
    matrix = np.asarray(kernel_matrix(kernel), np.float64)
    if kernel.ndim == 2:
        matrix = np.kron(matrix, np.eye(f0.shape[1]))
    squares, vectors = scipy.linalg.eigh((matrix + matrix.T) / 2)
    if squares[0] < -rounding * squares[-1]:
        raise ValueError(
            f"the kernel is not positive semidefinite (eigenvalues from {squares[0]:.2g} to {squares[-1]:.2g}): pass "
            "the kernel J J^T of one network on one set of points"
        )
    factor = vectors * np.sqrt(np.maximum(squares, 0))
    spectrum, modes = scipy.linalg.eigh(-factor.T @ form @ factor)
    rate, tolerance = float(spectrum[-1]), (rounding if rtol is None else rtol) * np.abs(spectrum).max()
    leading = spectrum >= rate - tolerance
    rest = spectrum[~leading]
    projection = float("nan")
    if abs(rate) > rounding * np.abs(spectrum).max():
        right = factor @ modes[:, leading]
        left = -form @ right / spectrum[leading]
        projection = float(np.linalg.norm(right @ (left.T @ np.asarray(f0, np.float64).reshape(-1))))
    gap = float(rate - rest[-1]) if rest.size else float("inf")
    return Growth(rate, projection, gap, int(leading.sum()), spectrum)


@partial(jax.jit, static_argnums=0)
def _quadratic_form(loss, f0):
    """The Hessian A at f0; and |grad L(f) - A f| beside |A| |f|, its scale, at f0 and at a generic point."""
    form = jax.hessian(loss)(f0)
    # Any fixed point off the ray through f0 will do: only a quadratic form has this gradient at a generic point.
    generic = jax.random.normal(jax.random.key(0), f0.shape, f0.dtype)
    residuals = []
    for point in (f0, generic):
        residual = jax.grad(loss)(point) - jnp.tensordot(form, point, 2, precision="highest")
        scale = jnp.linalg.norm(form.reshape(-1)) * jnp.linalg.norm(point)
        residuals.append((jnp.linalg.norm(residual), scale))
    return form, *residuals
