"""All configurations of the leaves of a hierarchy, and their joint: the oracle of message passing."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from theorykit.surrogate._hierarchy_model import Hierarchy, check_hierarchy, prior_of

# Numbers that the oracle holds at once: 512 MiB of float64.
_MOST_CELLS = 2**26


def all_leaves(alphabet: int, count: int) -> Int[Array, "configurations count"]:
    """All configurations of `count` leaves in the order of `enumerate_joint`: the last leaf runs fastest.

    Parameters
    ----------
    alphabet, count : int
        S and the number of leaves.

    Returns
    -------
    (S^count, count)

    Raises
    ------
    ValueError
        For more than 2^26 symbols in all.
    """
    if count * alphabet**count > _MOST_CELLS:
        raise ValueError(f"all_leaves: {alphabet}^{count} configurations are too many to list; use a smaller tree")
    return jnp.asarray(np.indices((alphabet,) * count).reshape(count, -1).T, jnp.int32)


def enumerate_joint(h: Hierarchy) -> Float[Array, "nx ny"]:
    r"""The whole joint of image and text, by products along both trees: the oracle for small hierarchies.

    .. math:: P(x, y) = \sum_s P(s) \, P(x | s) \, P(y | s), \qquad
              P(x | a) = \prod_{i=1}^{m} \sum_b M_i[a, b] \, P(x_i | b)

    Parameters
    ----------
    h : Hierarchy
        With S^(leaves of both trees) <= 2^26.

    Returns
    -------
    (S^image leaves, S^text leaves); row and column x number the leaves as `all_leaves` lists them, which is also the
    order that `downstream.next_token` takes.

    Raises
    ------
    TypeError, ValueError
        As `check_hierarchy`, and for hierarchies that are too large.
    """
    where = "enumerate_joint"
    check_hierarchy(h, where)
    symbols = h.image.shape[-1]
    counts = [kernels.shape[1] ** kernels.shape[0] for kernels in (h.image, h.text)]
    if symbols ** sum(counts) > _MOST_CELLS:
        raise ValueError(
            f"{where}: {counts[0]} and {counts[1]} leaves over {symbols} symbols make a table of "
            f"{float(symbols) ** sum(counts):.3g} cells, and {_MOST_CELLS:.3g} is the most; take a smaller tree, or "
            "message passing"
        )
    images, texts = _given_root(h.image), _given_root(h.text)
    return jnp.matmul((images * prior_of(h)[:, None]).T, texts, precision="highest")


def _given_root(kernels):
    """P(leaves | root) of all configurations, (S, S^(m^L))."""
    table = jnp.eye(kernels.shape[-1], dtype=kernels.dtype)
    for layer in kernels[::-1]:
        parts = [jnp.matmul(kernel, table, precision="highest") for kernel in layer]
        table = parts[0]
        for part in parts[1:]:
            table = (table[:, :, None] * part[:, None, :]).reshape(len(table), -1)
    return table
