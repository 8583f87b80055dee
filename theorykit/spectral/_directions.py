"""What PCA and CCA share in making directions: their signs, their rank, and projections onto them."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from theorykit.spectral._checks import Matrix, check_type


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


def hold(arrays: Any) -> Any:
    """Wait for arrays, so that they are computed under the present number of threads; nothing while tracing."""
    return (
        arrays
        if any(isinstance(a, jax.core.Tracer) for a in jax.tree.leaves(arrays))
        else jax.block_until_ready(arrays)
    )


def roots_above_rounding(values: Array, n: int, size: Array) -> Array:
    """Square roots of eigenvalues; 0 for those that cannot be told from 0 by a solver of size n.

    `size` is the largest entry of the matrix before it was centred, which leaves the rounding of that.
    """
    real = values > n * jnp.finfo(values.dtype).eps * jnp.maximum(values[0], size)
    return jnp.where(real, jnp.sqrt(jnp.where(real, values, 1)), 0)
