"""From lists of nearest neighbours to the edges of a search graph (the rank-based optimisation of Ootomo et al. 2023).

1. Prune: an edge A -> B is dispensable where many rows that A holds as nearer than B hold B as well.
2. Reverse: rows hold those that hold them, by the rank they have there.
3. Merge: the better half of a row's own edges, then reverse edges, then the rest of its own.
4. Connect: every row is reached from an entry point, by edges where they suffice, else as an entry point of its own.

No step looks at a distance. Edges are (n, degree), of n where a row has fewer.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float32, Int32

from theorykit.search._beam import rows_of
from theorykit.search._nn_descent import by_blocks, in_chunks, reverse_edges

# Unreached rows become entry points where they add at most one to this many, and get edges where they are more.
MORE_ENTRIES = 8


class Connected(NamedTuple):
    """Edges and entry points by which every row is reached, and how many rows were not before the repair."""

    edges: Int32[Array, "n degree"]
    entries: Int32[Array, "e"]
    unreachable: int


def prune(lists: Int32[Array, "m k"], table: Int32[Array, "n w"], degree: int) -> Int32[Array, "m {degree}"]:
    r"""The edges with the fewest detours, by (detours, rank).

    .. math:: \mathrm{detours}(A \to B) = \#\{D : \mathrm{rank}_A(D) < \mathrm{rank}_A(B), \; B \in \mathrm{table}(D)\}

    Parameters
    ----------
    lists
        Nearest neighbours of the rows to prune, ascending, n for none.
    table
        Lists of all rows.
    degree
        How many edges to keep; padded with n where k is less.

    Returns
    -------
    Array
        Edges, the best first.

    Source: Ootomo et al. 2023, arXiv 2308.15136, section on rank-based reordering.
    """
    kept = by_blocks(partial(_prune, degree=min(degree, lists.shape[1])), lists.shape[0], lists, table)
    return jnp.pad(kept, ((0, 0), (0, degree - kept.shape[1])), constant_values=table.shape[0])


@partial(jax.jit, static_argnames=("degree",))
def _prune(here, lists, table, degree):
    n, k = table.shape[0], lists.shape[1]

    def count(here):
        ids = rows_of(lists, here)
        holds = rows_of(table, ids)  # (b, k of D, w)
        holds = (holds[:, :, None, :] == ids[:, None, :, None]).any(-1)  # (b, D, B)
        nearer = jnp.tri(k, k, -1, dtype=bool).T  # D < B
        detours = jnp.sum(holds & nearer[None], axis=1, dtype=jnp.int32)
        # Exact in float32, which is quicker to select from.
        order = jnp.where(ids < n, detours * k + jnp.arange(k, dtype=jnp.int32)[None], k * k + k).astype(jnp.float32)
        return jnp.take_along_axis(ids, lax.top_k(-order, degree)[1], axis=1, mode="clip")

    return in_chunks(count, here)


def merge_reverse(edges: Int32[Array, "n r"], reverse: Int32[Array, "n s"]) -> Int32[Array, "n r"]:
    """First half of the own edges, then reverse edges that are not among them, then the rest of the own.

    Parameters
    ----------
    edges
        Pruned edges, the best first, n for none.
    reverse
        Reverse edges, the best first, n for none.

    Returns
    -------
    Array
        Edges, as many as before.

    Source: Ootomo et al. 2023, arXiv 2308.15136.
    """
    return by_blocks(_merge_reverse, edges.shape[0], edges, reverse)


@jax.jit
def _merge_reverse(here, edges, reverse):
    n, r = edges.shape
    s = reverse.shape[1]
    ranks = jnp.arange(r, dtype=jnp.int32)
    own_order = jnp.where(ranks < (r + 1) // 2, ranks, ranks + s)
    reverse_order = (r + 1) // 2 + jnp.arange(s, dtype=jnp.int32)

    def merge(here):
        own, back = rows_of(edges, here), rows_of(reverse, here)
        same = back[:, :, None] == own[:, None, :]
        # An edge of the rest that is a reverse edge as well moves up to where its copy stands.
        protected = (same & (ranks < (r + 1) // 2)[None, None]).any(-1)
        double = same.any(1) & (ranks >= (r + 1) // 2)[None]
        order = jnp.concatenate(
            [
                jnp.where(double | (own >= n), r + s, own_order[None]),
                jnp.where(protected | (back >= n), r + s, reverse_order[None]),
            ],
            axis=1,
        )
        ids = jnp.where(order < r + s, jnp.concatenate([own, back], axis=1), n)
        return jnp.take_along_axis(ids, lax.top_k(-order.astype(jnp.float32), r)[1], axis=1, mode="clip")

    return in_chunks(merge, here)


def reversed_edges(edges: Int32[Array, "m r"], sources: Int32[Array, "m"], n: int) -> Int32[Array, "n r"]:
    """The sources of the edges that end at each of n rows, by the rank of the edge: as many as a row has edges."""
    return _reversed(edges, sources, n=n)


@partial(jax.jit, static_argnames=("n",))
def _reversed(edges, sources, n):
    return reverse_edges(edges, sources, n, edges.shape[1])


def connect(edges: Int32[Array, "n r"], entries: Int32[Array, "e"]) -> Connected:
    """Make every row reachable from an entry point.

    A row that is not gets an edge from the first of its own neighbours that is reached and has room: it takes the
    place of that row's last edge, then of the last but one, as long as the better half is not touched. Rows that are
    still not reached become entry points.

    Parameters
    ----------
    edges
        Edges, n for none.
    entries
        Entry points.

    Returns
    -------
    Connected
        The new edges and entry points, and the number of rows that were not reachable.

    Source: derivation.
    """
    n, r = edges.shape
    reached = reachable(edges, entries)
    unreachable = lonely = int(n - jnp.sum(reached))
    column = r - 1
    while lonely * MORE_ENTRIES > entries.shape[0] and column >= (r + 1) // 2:
        edges = _adopt(edges, reached, r - 1 - column)
        # An edge that made room may have been the only way to another row: ask again.
        reached = reachable(edges, entries)
        lonely, column = int(n - jnp.sum(reached)), column - 1
    missing = np.flatnonzero(~np.asarray(reached)).astype(np.int32)
    return Connected(edges, jnp.concatenate([entries, jnp.asarray(missing)]), unreachable)


def sorted_lists(rows: Float32[Array, "n d"], first: int, lists: Int32[Array, "m c"], k: int) -> Int32[Array, "m {k}"]:
    """The k nearest of the candidates of the rows `first`, `first` + 1, ...; -1 stands for none, n in the result."""
    return by_blocks(partial(_sorted, k=k, first=first), lists.shape[0], rows, lists)


@partial(jax.jit, static_argnames=("k", "first"))
def _sorted(here, rows, lists, k, first):
    def compare(here):
        ids = rows_of(lists, here)
        away = rows_of(rows, ids) - rows_of(rows, first + here)[:, None, :]
        distances = jnp.where(ids < 0, jnp.inf, jnp.sum(away * away, axis=-1))
        values, places = lax.top_k(-distances, k)
        return jnp.where(jnp.isinf(values), len(rows), jnp.take_along_axis(ids, places, axis=1, mode="clip"))

    return in_chunks(compare, here)


@jax.jit
def reachable(edges: Int32[Array, "n r"], entries: Int32[Array, "e"]) -> Bool[Array, "n"]:
    """Which rows a path leads to from an entry point."""
    n = edges.shape[0]

    def spread(state):
        reached, _ = state
        targets = jnp.where(reached[:, None], edges, n).reshape(-1)
        more = reached.at[targets].set(True, mode="drop")
        return more, jnp.any(more != reached)

    begin = jnp.zeros((n,), bool).at[entries].set(True, mode="drop")
    return lax.while_loop(lambda state: state[1], spread, (begin, jnp.bool_(True)))[0]


@jax.jit
def _adopt(edges, reached, turn):
    """One edge, in the last column but `turn`, to each of as many unreached rows as find a place."""
    n, r = edges.shape
    reaches = (edges < n) & rows_of(reached, edges)
    choices = jnp.sum(reaches, axis=1, dtype=jnp.int32)
    # A row asks its reached neighbours in turn, another one each time.
    number = jnp.cumsum(reaches, axis=1, dtype=jnp.int32) - 1
    asked = reaches & (number == (turn % jnp.maximum(choices, 1))[:, None])
    parents = jnp.min(jnp.where(asked & ~reached[:, None], edges, n), axis=1)
    # Of those that ask one row the lowest number is taken.
    rows = jnp.arange(n, dtype=jnp.int32)
    child = jnp.full((n,), n, jnp.int32).at[parents].min(rows, mode="drop")
    column = r - 1 - turn
    return edges.at[:, column].set(jnp.where(child < n, child, edges[:, column]))
