"""Lists of nearest neighbours of all rows: exactly for few rows, else leaves of random trees refined by NN-descent.

Rows are compared by Euclidean distances. Lists are (n, k), ascending, of n where a row has fewer neighbours. Shapes are
static and every choice follows from the key, so a build is reproducible bit for bit on one machine. No random numbers
are shared between rows: every tree sorts them anew by its own directions.
"""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float32, Int32, Key

from theorykit.search._beam import rows_of
from theorykit.search.exact import knn_graph

# Up to so many rows all pairs are compared: as quick as the trees on two cores, and exact.
FEW = 16_384
# Trees, the most rows of a leaf, and the neighbours taken from a leaf: the next ones would mostly be displaced.
# Measured on 50,000 clustered rows with two cores: larger leaves save a round of NN-descent, which costs as much as
# three trees.
TREES, LEAF, FROM_LEAF = 4, 1024, 16
# A round looks at the beginning of the lists of so many nearest rows, and of as many that hold the row as nearest.
AROUND, BEGINNING = 6, 16
# Rounds end when fewer than this part of the entries changed, or after the most: with 0.1 in place of 0.2 there is one
# more round, and recall gains a thousandth.
SETTLED, MOST_ROUNDS = 0.2, 10
# Rows computed by one call, between which progress is shown, and rows that are compared together inside (cache).
BLOCK, TOGETHER = 4096, 32


def nearest_lists(
    rows: Float32[Array, "n d"], k: int, key: Key[Array, ""], *, exact: bool, tell: Callable[[str], None]
) -> Int32[Array, "n k"]:
    """Approximate or exact nearest neighbours of all rows, itself excluded; tell() hears what begins."""
    if exact:
        tell("neighbours")
        return knn_graph(rows, k).ids
    squared = jnp.sum(rows * rows, axis=1)
    leaves = 2 ** max(0, math.ceil(math.log2(rows.shape[0] / LEAF)))
    distances, ids = (
        jnp.full((rows.shape[0], k), jnp.inf, jnp.float32),
        jnp.full((rows.shape[0], k), len(rows), jnp.int32),
    )
    for number in range(TREES):
        tell(f"tree {number + 1} of {TREES}")
        order = _tree(rows, jax.random.fold_in(key, number), leaves=leaves)
        distances, ids = _merged(
            distances, ids, *_inside_leaves(rows, squared, order, leaves=leaves, k=min(k, FROM_LEAF))
        )
    for number in range(MOST_ROUNDS):
        tell(f"NN-descent, round {number + 1}")
        around = jnp.concatenate([ids[:, :AROUND], reverse_lists(ids[:, : 2 * AROUND], AROUND)], axis=1)
        before = ids
        distances, ids = by_blocks(_look_around, rows.shape[0], rows, squared, distances, ids, around)
        if float(_changed(before, ids)) < SETTLED:
            break
    return ids


def by_blocks(function, n, *arrays):
    """function(rows, *arrays) of blocks of row numbers, put together; programs see one shape."""
    block = min(n, BLOCK)
    parts = []
    for start in range(0, n, block):
        here = jnp.minimum(jnp.arange(start, start + block, dtype=jnp.int32), n - 1)
        part = function(here, *arrays)  # not waited for: the cores of a processor work on several blocks at once
        parts.append(jax.tree.map(lambda array: array[: n - start], part))  # noqa: B023
    return parts[0] if len(parts) == 1 else jax.tree.map(lambda *parts: jnp.concatenate(parts), *parts)


def in_chunks(function, here):
    """function of chunks of TOGETHER row numbers, one after the other, put together."""
    count = here.shape[0]
    padded = jnp.pad(here, (0, -count % TOGETHER), mode="edge").reshape(-1, TOGETHER)
    return jax.tree.map(lambda array: array.reshape(-1, array.shape[-1])[:count], lax.map(function, padded))


@partial(jax.jit, static_argnames=("width",))
def reverse_lists(ids: Int32[Array, "n k"], width: int) -> Int32[Array, "n {width}"]:
    """For every row the first rows that hold it, by their rank in those lists and then by number."""
    return reverse_edges(ids, jnp.arange(ids.shape[0], dtype=jnp.int32), ids.shape[0], width)


def reverse_edges(ids, sources, n, width):
    """The first `width` sources of edges to each of n rows; ids (m, k) are the edges of the sources (m,)."""
    targets, sources = ids.T.reshape(-1), jnp.tile(sources, ids.shape[1])
    # Stable, so that edges to one row stay in the order of rank. No atomic updates: the result is always the same.
    targets, sources = lax.sort((targets, sources), num_keys=1, is_stable=True)
    first = jnp.searchsorted(targets, jnp.arange(n + 1, dtype=jnp.int32)).astype(jnp.int32)
    places = first[:-1, None] + jnp.arange(width, dtype=jnp.int32)[None]
    return jnp.where(places < first[1:, None], rows_of(sources, places), n)


@partial(jax.jit, static_argnames=("leaves",))
def _tree(rows, key, leaves):
    """Row numbers in the order of the leaves of a balanced tree; n and above where a leaf is not full.

    A node is cut at the median along the difference of two of its rows, drawn at random. All nodes of a level are cut
    by one sort, by node and then projection.
    """
    n = rows.shape[0]
    levels = leaves.bit_length() - 1
    size = leaves * -(-n // leaves)
    places = jnp.arange(size, dtype=jnp.int32)
    # Places without a row follow random rows, so that they spread over the leaves.
    key, other = jax.random.split(key)
    stand_in = jnp.concatenate(
        [jnp.arange(n, dtype=jnp.int32), jax.random.randint(other, (size - n,), 0, n, jnp.int32)]
    )

    def cut(level, order):
        level = level.astype(jnp.int32)
        width = size >> level
        ends = jax.random.randint(jax.random.fold_in(key, level), (2, leaves), 0, width, jnp.int32)
        ends = rows_of(stand_in, rows_of(order, ends + (jnp.arange(leaves, dtype=jnp.int32) * width)[None]))
        directions = rows_of(rows, ends[0]) - rows_of(rows, ends[1])
        node = places // width

        def project(here):
            return jnp.sum(rows_of(rows, here[0]) * rows_of(directions, here[1]), axis=-1)

        values = lax.map(project, (rows_of(stand_in, order), node), batch_size=1024)
        # Bits of floats in the order of their values; the leading ones make room for the node.
        bits = lax.bitcast_convert_type(values, jnp.int32)
        bits = lax.bitcast_convert_type(jnp.where(bits < 0, ~bits, bits ^ jnp.int32(-(2**31))), jnp.uint32)
        return lax.sort((node.astype(jnp.uint32) << (32 - levels) | bits >> levels, order), num_keys=1)[1]

    return lax.fori_loop(0, levels, cut, places) if levels else places


@partial(jax.jit, static_argnames=("leaves", "k"))
def _inside_leaves(rows, squared, order, leaves, k):
    """The k nearest rows in the own leaf."""
    n = rows.shape[0]

    def compare(ids):
        members, norms = rows_of(rows, ids), rows_of(squared, ids)
        distances = norms[:, None] + norms[None] - 2 * jnp.matmul(members, members.T, precision="highest")
        distances = jnp.where((ids[:, None] == ids[None]) | (ids >= n)[None], jnp.inf, jnp.maximum(distances, 0))
        values, places = lax.top_k(-distances, min(k, ids.shape[0]))
        missing = ((0, 0), (0, max(0, k - ids.shape[0])))
        found = jnp.where(jnp.isinf(values), n, rows_of(ids, places))
        return jnp.pad(-values, missing, constant_values=jnp.inf), jnp.pad(found, missing, constant_values=n)

    distances, ids = lax.map(compare, order.reshape(leaves, -1))
    place = jnp.zeros((n,), jnp.int32).at[order].set(jnp.arange(order.shape[0], dtype=jnp.int32), mode="drop")
    return tuple(rows_of(array.reshape(-1, k), place) for array in (distances, ids))


@jax.jit
def _merged(distances, ids, new_distances, new_ids):
    def merge(here):
        arrays = (rows_of(array, here) for array in (distances, ids, new_distances, new_ids))
        return _union(*arrays, len(ids))

    return in_chunks(merge, jnp.arange(ids.shape[0], dtype=jnp.int32))


def _union(distances, ids, new_distances, new_ids, n):
    """Nearest entries of two lists, each without repetitions."""
    known = (new_ids[:, :, None] == ids[:, None, :]).any(-1)
    values = jnp.concatenate([distances, jnp.where(known, jnp.inf, new_distances)], axis=1)
    values, places = lax.top_k(-values, ids.shape[1])
    ids = jnp.take_along_axis(jnp.concatenate([ids, new_ids], axis=1), places, axis=1, mode="clip")
    return -values, jnp.where(jnp.isinf(values), n, ids)


@jax.jit
def _look_around(here, rows, squared, distances, ids, around):
    """Lists after a look at the lists of the rows around."""
    n, k = ids.shape
    beginnings = ids[:, :BEGINNING]

    def look(here):
        own, near = rows_of(ids, here), rows_of(around, here)
        seen = jnp.where(near[:, :, None] < n, rows_of(beginnings, near), n)
        seen = seen.reshape(here.shape[0], -1)
        seen = jnp.concatenate([seen, near], axis=1)
        known = (seen[:, :, None] == own[:, None, :]).any(-1) | (seen == here[:, None]) | (seen >= n)
        row = rows_of(rows, here)
        products = jnp.einsum("bd,bmd->bm", row, rows_of(rows, seen), precision="highest")
        values = rows_of(squared, here)[:, None] + rows_of(squared, seen) - 2 * products
        values, places = lax.top_k(-jnp.where(known, jnp.inf, jnp.maximum(values, 0)), k)
        new = jnp.where(jnp.isinf(values), n, jnp.take_along_axis(seen, places, axis=1, mode="clip"))
        # A row met twice has equal distances, and its later copies are dropped.
        again = (new[:, :, None] == new[:, None, :]) & jnp.tri(k, k, -1, dtype=bool)[None]
        return _union(rows_of(distances, here), own, jnp.where(again.any(-1), jnp.inf, -values), new, n)

    return in_chunks(look, here)


@jax.jit
def _changed(before, after):
    """Part of the entries that were not in the list before."""

    def count(here):
        old, new = rows_of(before, here), rows_of(after, here)
        return jnp.mean(~(new[:, :, None] == old[:, None, :]).any(-1), axis=1, keepdims=True)

    return jnp.mean(in_chunks(count, jnp.arange(before.shape[0], dtype=jnp.int32)))
