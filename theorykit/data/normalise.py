"""The form that data take here: labelled rows, paired rows, and rows scaled to the sphere |x| = sqrt d."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32


class Labelled(NamedTuple):
    """Examples as rows, with a class for each.

    Parameters
    ----------
    inputs : (n, d) float32 array
        One example a row.
    labels : (n,) int32 array, or None
        The class of each row; None where the source has no labels.
    """

    inputs: Float[Array | np.ndarray, "n d"]
    labels: Int32[Array | np.ndarray, "n"] | None


class Pairs(NamedTuple):
    """Positive pairs: row i of ``a`` and row i of ``b`` belong together.

    Parameters
    ----------
    a : (n, da) array
        First view or modality.
    b : (n, db) array
        Second view or modality; da and db may differ.
    labels : (n,) int32 array, or None
        The class that row i of both views shares; None where the source has no classes.
    """

    a: Float[Array, "n da"]
    b: Float[Array, "n db"]
    labels: Int32[Array, "n"] | None


def to_sphere(x: Float[Array | np.ndarray, "n d"]) -> Float[Array, "n d"]:
    """Scale every row to |x| = sqrt d, the convention of the NTK statements.

    x_i -> sqrt(d) x_i / |x_i|. Then x.x'/d is the cosine of two rows, and the first layer of an encoder sees inputs
    with entries of order 1, as the later layers do.

    Parameters
    ----------
    x : (n, d)
        Rows to scale, finite and none of them zero. Concrete values: call it on data, outside ``jit``.

    Returns
    -------
    (n, d)
        The scaled rows, in the dtype of ``x``.

    Raises
    ------
    ValueError
        If a row is zero (it has no direction) or not finite.

    Source
    ------
    Jacot, Gabriel, Hongler 2018 (arXiv 1806.07572), inputs on a sphere.
    """
    values = np.asarray(x)
    peak = np.max(np.abs(values), axis=1, initial=0)
    if not np.all(np.isfinite(peak)):
        row = np.flatnonzero(~np.isfinite(peak))[0]
        raise ValueError(f"row {row} of x is not finite: remove that row, or repair the values before scaling.")
    if np.any(peak == 0):
        row = np.flatnonzero(peak == 0)[0]
        raise ValueError(
            f"row {row} of x is zero and has no direction to scale to |x| = sqrt d: remove that row, "
            "or lower the masking that emptied it."
        )
    # Dividing by the largest entry first keeps the squares from overflowing or underflowing.
    y = jnp.asarray(values / peak[:, None])
    return y * (jnp.sqrt(jnp.asarray(y.shape[1], y.dtype)) / jnp.linalg.norm(y, axis=1, keepdims=True))
