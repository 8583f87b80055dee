"""What the measures of `compare` share: checks of matrices, and scalings that cannot leave the range of the dtype."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool


def matrices(where: str, **named: Array) -> tuple[Array, ...]:
    """The arrays, if they are finite, real, non-empty floating-point matrices of one dtype.

    Raises
    ------
    TypeError, ValueError
        If not. Where values are unknown, inside a transformation, a matrix that is not finite becomes NaN.
    """
    for name, value in named.items():
        if not isinstance(value, jax.Array):
            raise TypeError(f"{where}: {name} is a {type(value).__name__}; pass a JAX array, jnp.asarray({name})")
        if jnp.issubdtype(value.dtype, jnp.complexfloating):
            raise TypeError(
                f"{where}: {name} has dtype {value.dtype} and only real numbers are handled; put real and imaginary "
                "parts side by side as real columns"
            )
        if not jnp.issubdtype(value.dtype, jnp.floating):
            raise TypeError(f"{where}: {name} has dtype {value.dtype}; cast it to floating point")
        if value.ndim != 2 or value.size == 0:
            raise ValueError(f"{where}: {name} has shape {value.shape}; give a matrix that is not empty, or vmap")
    if len({value.dtype for value in named.values()}) > 1:
        dtypes = ", ".join(f"{name} has {value.dtype}" for name, value in named.items())
        raise TypeError(f"{where}: the dtypes differ, {dtypes}; cast one")
    return tuple(
        guard(value, jnp.all(jnp.isfinite(value)), f"{where}: {name} has a NaN or an infinity; find where it arose")
        for name, value in named.items()
    )


def paired(where: str, x: Array, y: Array, least: int) -> tuple[Array, Array]:
    """The two sets of features, if they belong to the same n >= least samples."""
    x, y = matrices(where, x=x, y=y)
    if x.shape[0] != y.shape[0] or x.shape[0] < least:
        raise ValueError(
            f"{where}: x has shape {x.shape} and y {y.shape}; give features (n, p) and (n, q) of the same "
            f"n >= {least} samples"
        )
    return x, y


def guard(value: Array, holds: Bool[Array, ""], message: str) -> Array:
    """`value` if the condition holds. If not: ValueError, or NaN inside a transformation, where values are unknown."""
    if isinstance(holds, jax.core.Tracer):
        return jnp.where(holds, value, jnp.full_like(value, jnp.nan))
    if not holds:
        raise ValueError(message)
    return value


def product(a: Array, b: Array) -> Array:
    """Matrix product at the highest precision of the device."""
    return jnp.matmul(a, b, precision="highest")


def singular_values(a: Array) -> Array:
    """Singular values, descending."""
    return jnp.linalg.svd(a, compute_uv=False)


def negligible(a: Array) -> float:
    """Singular values below this share of the largest are rounding: the customary cut-off of a numerical rank."""
    return max(a.shape) * float(jnp.finfo(a.dtype).eps)


def largest(a: Array) -> Array:
    """The largest entry in absolute value, 1 for a zero matrix."""
    top = jnp.max(jnp.abs(a))
    return jnp.where(top == 0, jnp.ones_like(top), top)


def centre(a: Array) -> Array:
    """The columns, centred; constant ones become exactly 0."""
    # Differences from one of the rows are exactly 0 for constant columns, and keep digits where the mean is large.
    a = a - a[:1]
    return a - jnp.mean(a, axis=0, keepdims=True)


def unit_columns(a: Array) -> tuple[Array, Array]:
    """The columns scaled to unit norm, (n, p), and their norms, (p,). Zero columns stay zero, with norm 1."""
    tops = jnp.max(jnp.abs(a), axis=0, keepdims=True)
    tops = jnp.where(tops == 0, jnp.ones_like(tops), tops)
    norms = jnp.linalg.norm(a / tops, axis=0, keepdims=True)
    norms = jnp.where(norms == 0, jnp.ones_like(norms), norms)
    return a / tops / norms, (tops * norms)[0]
