"""Checks of the input that the spectral predictions share.

Types and shapes are checked always; values where they are known, not inside jit, vmap or grad.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from theorykit.similarity import check_array

Matrix = Float[Array, "..."] | Float[np.ndarray, "..."]  # shapes are checked by hand, with messages that help


def check_values(where: str, **named: Array) -> None:
    """Raise unless each is a JAX array of real and finite floating-point numbers; by numpy, which compiles nothing."""
    for name, value in named.items():
        check_array(where, name, value)
        if not isinstance(value, jax.core.Tracer) and not np.all(np.isfinite(np.asarray(value))):
            raise ValueError(f"{where}: {name} holds NaN or infinity: find out where it arises")


def check_symmetric(name: str, matrix: Array) -> None:
    """Raise unless `matrix` is a floating-point, square, finite and symmetric array; values only where known."""
    check_array("spectral", name, matrix)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or matrix.shape[0] < 1:
        raise ValueError(f"{name} has shape {matrix.shape}: give a square matrix")
    if isinstance(matrix, jax.core.Tracer):
        return
    values = np.asarray(matrix)
    if not np.all(np.isfinite(values)):
        raise ValueError(f"{name} holds NaN or infinity: find out where it arises")
    gap = float(np.max(np.abs(values - values.T)))
    # Half of the digits: what tells a wrong matrix from the rounding of long sums.
    if gap > float(np.finfo(values.dtype).eps) ** 0.5 * float(np.max(np.abs(values))):
        raise ValueError(f"{name} is not symmetric, by {gap:.3g}: use ({name} + {name}^T) / 2 if only rounding is why")


def relative_rounding(dtype: jnp.dtype) -> float:
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
    if gap > relative_rounding(gram.dtype) * size:
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
    if not isinstance(total, jax.core.Tracer) and not np.isfinite(float(total)):
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
