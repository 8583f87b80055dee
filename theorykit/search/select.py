r"""The k smallest numbers of every row, exactly, and the merge of two such lists.

Equal values come in ascending order of position, so that a search breaks ties by the lower id. `lax.top_k` is stable
in the same sense; what is added here are ascending order, every dtype at the speed of float32, and the two-stage
selection where it is faster.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int32, Num

# On accelerators, rows of at least so many numbers, and at least so many for each that is asked for, are selected in
# two stages: `lax.top_k` sorts the whole row there unless k is at most 16. On processors it is one pass with a heap,
# which the stages do not beat: measured with jaxlib 0.10.2 on two cores, seconds for 4 million random float32,
#     rows of        8,192            30,000           131,072
#     k              1   10   100     1   10   100     1   10   100
#     top_k       .008 .006  .018  .005 .005  .010  .005 .005  .006
#     two stages  .012 .027  .205  .016 .027  .069  .017 .018  .030
# (Only rows in descending order, where every number enters the heap, are up to seven times quicker in two stages.)
LONG, SPARSE = 8192, 256
# Numbers of a block, of which the first stage keeps the minimum.
BLOCK = 32


def smallest(distances: Num[Array, "*rows n"], k: int) -> tuple[Num[Array, "*rows {k}"], Int32[Array, "*rows {k}"]]:
    r"""The k smallest numbers of every row and where they stand, in ascending order.

    .. math:: \{(v_1, i_1) < (v_2, i_2) < \dots < (v_k, i_k)\} \text{ are the first of all pairs } (v_i, i)

    On accelerators long rows are selected in two stages: the minima of blocks, the k blocks with the smallest minima,
    and the k smallest numbers of those blocks. A number that is not in these blocks has k numbers before it, one in
    each. Equal numbers at the border can make the choice of blocks ambiguous; then `lax.top_k` is used, at run time.

    Parameters
    ----------
    distances
        Rows along the last axis, of any real dtype, without NaN; infinities may occur.
    k
        How many, from 0 to n.

    Returns
    -------
    tuple
        Values, of the dtype of `distances`, and int32 positions, both (..., k).

    Raises
    ------
    ValueError
        If k is not between 0 and n.

    Source: derivation.
    """
    n = distances.shape[-1]
    if not 0 <= k <= n:
        raise ValueError(f"smallest: k is {k} for rows of {n} numbers; it lies between 0 and {n}, pad the rows")
    lead = distances.shape[:-1]
    if k == 0:
        return distances[..., :0], jnp.zeros((*lead, 0), jnp.int32)
    # Kernels of accelerators take two axes.
    rows = _sortable(distances).reshape(-1, n)
    if rows.dtype == jnp.float32 and n >= LONG and n >= SPARSE * k:
        ids = lax.platform_dependent(
            rows, cpu=lambda rows: _largest(-rows, k)[1], default=lambda rows: _stages(rows, k)
        )
    else:
        ids = _largest(_reverse(rows), k)[1]
    ids = ids.reshape(*lead, k)
    return jnp.take_along_axis(distances, ids, axis=-1), ids


def merge(
    values_a: Num[Array, "*rows a"],
    ids_a: Int32[Array, "*rows a"],
    values_b: Num[Array, "*rows b"],
    ids_b: Int32[Array, "*rows b"],
    k: int,
) -> tuple[Num[Array, "*rows {k}"], Int32[Array, "*rows {k}"]]:
    """The k smallest of two lists, with their ids.

    Equal values keep their order, those of `a` first: where the ids of `a` are below those of `b`, as they are when the
    tiles of a base are merged in their order, ties go to the lower id.

    Parameters
    ----------
    values_a, values_b
        Values of the two lists, (..., a) and (..., b).
    ids_a, ids_b
        What goes with them.
    k
        How many to keep, at most a + b.

    Returns
    -------
    tuple
        Values and ids, (..., k), ascending.

    Source: derivation.
    """
    values = jnp.concatenate([values_a, values_b], axis=-1)
    ids = jnp.concatenate([ids_a, ids_b], axis=-1)
    kept, where = smallest(values, k)
    return kept, jnp.take_along_axis(ids, where, axis=-1)


def _sortable(values):
    """The same order in a dtype that is quick to select from: float32 wherever it holds every value."""
    kind = jnp.dtype(values.dtype)
    narrow = kind.itemsize <= 2 and (jnp.issubdtype(kind, jnp.floating) or jnp.issubdtype(kind, jnp.integer))
    if narrow:
        return values.astype(jnp.float32)
    if jnp.issubdtype(kind, jnp.floating):
        # Selection orders -0 before 0; they are equal, and the position decides.
        return jnp.where(values == 0, jnp.zeros_like(values), values)
    return values


def _reverse(values):
    """The opposite order: the complement also where the negative of an integer would wrap."""
    return ~values if jnp.issubdtype(values.dtype, jnp.integer) else -values


def _largest(values, k):
    # Without the barrier, slices of the result are merged with the selection, which is then compiled as a full sort.
    # One for each array: around both, the compiler of several devices fails (jaxlib 0.10.2).
    kept, ids = (lax.optimization_barrier(array) for array in lax.top_k(values, k))
    return kept, ids.astype(jnp.int32)


def _stages(rows, k):
    """Positions of the k smallest by blocks.

    Block b holds the positions b, b + w, b + 2w, ..., so that the minima are taken along an axis that is not the last:
    processors vectorise that, and do not vectorise a minimum along the last axis.
    """
    m, n = rows.shape
    width = -(-n // BLOCK)
    padded = jnp.pad(rows, ((0, 0), (0, width * BLOCK - n)), constant_values=jnp.inf)
    blocks = padded.reshape(m, BLOCK, width)
    lows, chosen = _largest(-jnp.min(blocks, axis=1), k + 1)
    # With the blocks in order, so are the positions b + w j below: by j, then by b < w. Ties need that.
    chosen = jnp.sort(chosen[:, :k], axis=1)
    inside = jnp.take_along_axis(blocks, chosen[:, None, :], axis=2).reshape(m, BLOCK * k)
    where = (chosen[:, None, :] + width * jnp.arange(BLOCK, dtype=jnp.int32)[None, :, None]).reshape(m, BLOCK * k)
    kept, ids = _largest(-inside, k)
    # A block left out begins with a number equal to the last one kept: it may hold a lower position.
    ambiguous = jnp.any(-lows[:, k] <= -kept[:, k - 1])
    return lax.cond(
        ambiguous,
        lambda: _largest(-rows, k)[1],
        lambda: jnp.take_along_axis(where, ids, axis=1),
    )
