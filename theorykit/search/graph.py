r"""Approximate nearest neighbours by a search graph.

A row's edges lead to near rows, chosen so that few of them repeat a way of two steps. A search begins at the nearest of
many entry points and visits the nearest row seen, again and again; what it saw nearest is compared exactly at the end.

    graph = build_graph(base, key=jax.random.key(0))
    distances, ids = query_graph(graph, queries, 10)

The distances returned are those of `theorykit.search.knn`: rows can be missed, never misjudged.
"""

import math
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from theorykit.search import _beam, _inputs, _optimise
from theorykit.search._distances import unit_rows
from theorykit.search._inputs import Base, Mask, Metric, Neighbours, Queries
from theorykit.search._nn_descent import FEW, nearest_lists
from theorykit.search._resources import Stages, check_memory
from theorykit.search._transform import Storage, encode, euclidean
from theorykit.search.exact import knn

# Nearest neighbours from which the edges are chosen: as many as edges, which are then only put in order, but not fewer
# than this. Measured on 50,000 clustered rows at degree 32: 40 or 48 find no more, and build a quarter slower.
LEAST_CANDIDATES = 32
# Entry points, all of which every query is compared with: 16 sqrt(n) are at n = 10^5 as many rows as a search sees, and
# compared by a matrix product, which is quicker. Below 1024 there is nothing to save.
ENTRIES, LEAST_ENTRIES = 16, 1024
# Queries that take their steps together: as many as fill the caches of a processor, or an accelerator. Fewer queries
# are filled up to the next size.
CHUNKS, CHUNKS_OF_ACCELERATOR = (1, 8, 64), (8, 256, 4096)
# Rows visited by default: at 100,000 clustered rows recall@10 is above 0.99.
BEAM = 32
# Where fewer rows pass a mask, comparing all that do finds more than a search that sees mostly others.
LEAST_PASSING = 1 / 8
# Arrays; shapes and specifications of sharding where JAX maps a tree of such.
Leaf = Any


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Graph:
    """Rows with a search graph, made by `build_graph` and `extend`; a pytree, of which the metric is no leaf."""

    base: Leaf  # float32 (n, d): what distances are computed from; unit rows for cosine
    neighbours: Leaf  # int32 (n, degree): edges; n where a row has fewer
    entries: Leaf  # int32 (e,): where searches begin
    codes: Leaf  # (n, d): what searches compare; see theorykit.search._transform for this and the next four
    half_norms: Leaf  # float32 (n,)
    centre: Leaf  # float32 (d,)
    steps: Leaf  # float32 (d,)
    finest: Leaf  # float32
    unreachable: Leaf  # int32: rows that no path led to before the build repaired it
    metric: Metric = field(metadata={"static": True})


def build_graph(
    base: Base,
    *,
    metric: Metric = "l2",
    degree: int = 32,
    key: Key[Array, ""],
    storage: Storage = "int8",
    exact: bool | None = None,
    memory: int | None = None,
    progress: bool | None = None,
) -> Graph:
    r"""Build a search graph.

    Lists of the nearest neighbours of every row, exact or by NN-descent, then the rank-based optimisation.
    Inner products are turned into Euclidean distances for this, by one more coordinate:

    .. math:: x' = (x, \sqrt{M^2 - |x|^2}), \qquad |(q, 0) - x'|^2 = |q|^2 + M^2 - 2 \langle q, x \rangle

    The same key gives the same graph.

    Parameters
    ----------
    base
        Rows (n, d) from NumPy or JAX, of any real dtype; n may be 0. They are kept as float32.
    metric
        "l2" (squared distances), "ip" or "cosine".
    degree
        Edges of a row, at least 2. More find more and cost more.
    key
        For the trees that NN-descent begins with, and the entry points.
    storage
        What searches compare before the exact comparison: "int8", or "bfloat16" where a coordinate has a few values far
        from all others, which stretch the int8 range.
    exact
        Whether all pairs are compared, or NN-descent is used; by default all pairs up to 16,384 rows.
    memory
        Bytes that rows, graph and the build may take; by default what is free, where that can be known.
    progress
        Whether to show progress; by default from 50,000 rows.

    Returns
    -------
    Graph
        A pytree for `query_graph` and `extend`, inside `jax.jit` or outside.

    Raises
    ------
    TypeError, ValueError
        If base is not real (n, d) or holds a NaN, an infinity or a number so large that distances overflow; if metric,
        degree, key or storage are not as above; inside `jax.jit`.
    MemoryError
        If the build would need more than `memory`.

    Source: Ootomo et al. 2023, arXiv 2308.15136; NN-descent: Dong et al. 2011.
    """
    _check_build("build_graph", metric, degree, key, storage, base)
    rows = _inputs.as_rows("build_graph: base", base, metric)
    n, d = rows.shape
    check_memory("build_graph", n, d, degree, max(LEAST_CANDIDATES, degree), memory)
    if metric == "cosine":
        rows = unit_rows(rows)
    if n == 0:
        return _assemble(rows, jnp.zeros((0, degree), jnp.int32), jnp.zeros((0,), jnp.int32), 0, metric, storage)
    one, two = jax.random.split(key)
    with Stages("building a search graph", n, progress) as tell:
        edges = _edges(euclidean(rows, metric), degree, one, exact, tell)
        tell("reverse edges")
        back = _optimise.reversed_edges(edges, jnp.arange(n, dtype=jnp.int32), n)
        edges = _optimise.merge_reverse(edges, back)
        tell("connections")
        found = _optimise.connect(edges, jax.random.permutation(two, n)[: _entries(n)].astype(jnp.int32))
    return _assemble(rows, found.edges, found.entries, found.unreachable, metric, storage)


def query_graph(
    graph: Graph, queries: Queries, k: int, *, beam: int | None = None, mask: Mask | None = None
) -> Neighbours:
    r"""Approximately the k nearest rows of every query.

    A search visits `beam` rows and sees where their edges lead; the nearest of the rows seen, more than k, are compared
    exactly. A beam of at least n rows finds everything.

    The answer for a query does not depend on the others. Where fewer than one row in eight passes the mask, those rows
    are compared exactly instead (not inside `jax.jit`, where the mask is not known).

    Parameters
    ----------
    graph
        From `build_graph`, `extend` or `load`.
    queries
        Queries (q, d) from NumPy or JAX; q may be 0.
    k
        Number of neighbours, at least 1; it may exceed n.
    beam
        Rows visited, rounded up to a multiple of 4; by default the larger of 32 and k. Recall and time grow with it,
        time about in proportion.
    mask
        Rows that may be found: boolean, (n,) for all queries or (q, n). Others are visited, but not returned.

    Returns
    -------
    Neighbours
        Distances (float32) and ids (int32), both (q, k), ascending, ties by the lower id; infinity and -1 where fewer
        than k rows were found.

    Raises
    ------
    TypeError, ValueError
        If queries, k, beam or mask are not as above, or rows and queries differ in dimension.

    Source: Ootomo et al. 2023, arXiv 2308.15136; the pool of `theorykit.search._beam`: derivation.
    """
    k = _inputs.check_k("query_graph", k)
    if beam is None:
        beam = max(BEAM, k)
    if isinstance(beam, bool) or not isinstance(beam, int | np.integer) or beam < 1:
        raise ValueError(f"query_graph: beam is {beam!r}; give the number of rows to visit, an integer of at least 1")
    points = _inputs.as_rows("query_graph: queries", queries, graph.metric)
    _inputs.check_same_dimension("query_graph", graph.base, points)
    n, q = graph.base.shape[0], points.shape[0]
    _inputs.check_mask("query_graph", mask, q, n)
    if n == 0 or q == 0:
        return Neighbours(jnp.full((q, k), jnp.inf, jnp.float32), jnp.full((q, k), -1, jnp.int32))
    beam = min(int(beam), n)
    if mask is None or not _inputs.is_concrete(mask):
        return _search(graph, points, k, beam, mask)
    return _masked(graph, points, k, beam, np.asarray(mask))


def extend(
    graph: Graph,
    rows: Base,
    *,
    key: Key[Array, ""],
    beam: int = 64,
    memory: int | None = None,
    progress: bool | None = None,
) -> Graph:
    """Add rows to a graph; their ids follow those of the old rows.

    New rows are searched in the old graph and compared among themselves; their edges are pruned as in a build, and
    reverse edges take the place of the old rows' later edges. Codes are made anew from all rows. The degree is kept.

    Parameters
    ----------
    graph
        From `build_graph`, `extend` or `load`.
    rows
        New rows (m, d); m may be 0. With more new rows than old ones the graph is built anew.
    key
        For the new rows' lists and entry points.
    beam
        Rows visited by the search for neighbours.
    memory, progress
        As for `build_graph`.

    Returns
    -------
    Graph
        A new graph; the old one is left as it is.

    Raises
    ------
    TypeError, ValueError, MemoryError
        As `build_graph`; if old and new rows differ in dimension.

    Source: derivation.
    """
    metric, degree = graph.metric, graph.neighbours.shape[1]
    storage = "int8" if graph.codes.dtype == jnp.int8 else "bfloat16"
    _check_build("extend", metric, degree, key, storage, rows, graph)
    new = _inputs.as_rows("extend: rows", rows, metric)
    _inputs.check_same_dimension("extend", graph.base, new)
    n, m = graph.base.shape[0], new.shape[0]
    total, d = n + m, graph.base.shape[1]
    if m == 0:
        return graph
    check_memory("extend", total, d, degree, max(LEAST_CANDIDATES, degree), memory)
    if metric == "cosine":
        new = unit_rows(new)
    base = jnp.concatenate([graph.base, new])
    if m > n:
        return build_graph(
            base, metric=metric, degree=degree, key=key, storage=storage, memory=memory, progress=progress
        )
    one, two = jax.random.split(key)
    with Stages("extending a search graph", m, progress) as tell:
        tell("search")
        k = min(max(LEAST_CANDIDATES, degree), n)
        old_ids = query_graph(graph, new, k, beam=max(beam, k)).ids
        aligned = euclidean(base, metric)
        lists = old_ids
        if m > 1:
            inside = nearest_lists(aligned[n:], min(k, m - 1), one, exact=m <= FEW, tell=tell)
            lists = jnp.concatenate([lists, jnp.where(inside < m, inside + n, -1)], axis=1)
        lists = _optimise.sorted_lists(aligned, n, lists, k)
        tell("edges")
        old = jnp.where(graph.neighbours < n, graph.neighbours, total)
        table = jnp.concatenate([old, _widened(lists, degree, total)])
        pruned = _optimise.prune(lists, table, degree)
        sources = jnp.arange(n, total, dtype=jnp.int32)
        edges = _optimise.merge_reverse(
            jnp.concatenate([old, pruned]), _optimise.reversed_edges(pruned, sources, total)
        )
        tell("connections")
        more = max(0, _entries(total) - graph.entries.shape[0])
        chosen = n + jax.random.permutation(two, m)[:more].astype(jnp.int32)
        found = _optimise.connect(edges, jnp.concatenate([graph.entries, chosen]))
    return _assemble(base, found.edges, found.entries, found.unreachable, metric, storage)


def _edges(rows, degree, key, exact, tell):
    n = rows.shape[0]
    if n == 1:
        return jnp.full((1, degree), 1, jnp.int32)
    k = min(max(LEAST_CANDIDATES, degree), n - 1)
    lists = nearest_lists(rows, k, key, exact=n <= FEW if exact is None else exact, tell=tell)
    tell("pruning")
    return _optimise.prune(lists, lists, degree)


def _widened(lists, width, n):
    lists = lists[:, :width]
    return jnp.pad(lists, ((0, 0), (0, width - lists.shape[1])), constant_values=n)


def _entries(n):
    return min(n, max(LEAST_ENTRIES, ENTRIES * math.isqrt(n)))


def _assemble(rows, neighbours, entries, unreachable, metric, storage):
    if rows.shape[0]:
        codes = encode(rows, metric, storage)
    else:
        zero = jnp.zeros((rows.shape[1],), jnp.float32)
        empty = jnp.zeros(rows.shape, storage)
        codes = (empty, jnp.zeros((0,), jnp.float32), zero, zero, jnp.zeros((), jnp.float32))
    return Graph(rows, neighbours, entries, *codes, jnp.asarray(unreachable, jnp.int32), metric)


@partial(jax.jit, static_argnames=("k", "beam", "chunk"))
def _found(graph, queries, count, mask, *, k, beam, chunk):
    return _beam.search(graph, queries, count, k, beam, mask, chunk)


def _search(graph, queries, k, beam, mask):
    q = queries.shape[0]
    chunks = CHUNKS if jax.default_backend() == "cpu" else CHUNKS_OF_ACCELERATOR
    # Sums of codes that are no integers are rounded, and one program rounds alike.
    chunk = next((size for size in chunks if q <= size and graph.codes.dtype == jnp.int8), chunks[-1])
    # A power of two chunks, of which only those that hold queries are computed: few programs are compiled.
    size = chunk * 2 ** math.ceil(math.log2(-(-q // chunk)))
    if size > q:
        more = ((0, size - q), (0, 0))
        queries = jnp.pad(queries, more)
        mask = jnp.pad(mask, more) if mask is not None and mask.ndim == 2 else mask
    found = _found(graph, queries, np.int32(q), mask, k=k, beam=beam, chunk=chunk)
    return found if size == q else Neighbours(*(array[:q] for array in found))


def _masked(graph, queries, k, beam, mask):
    """Search, or where few rows pass the mask compare those."""
    n = graph.base.shape[0]
    passing = np.count_nonzero(mask, axis=-1)
    if mask.ndim == 1:
        if passing >= LEAST_PASSING * n:
            return _search(graph, queries, k, beam, jnp.asarray(mask))
        rows = np.flatnonzero(mask).astype(np.int32)
        found = knn(graph.base[rows], queries, k, metric=graph.metric)
        ids = jnp.asarray(np.append(rows, np.int32(-1)))[found.ids]  # -1 takes the last
        return found._replace(ids=ids)
    few = passing < LEAST_PASSING * n
    if not few.any():
        return _search(graph, queries, k, beam, jnp.asarray(mask))
    compared = knn(graph.base, queries[few], k, metric=graph.metric, mask=mask[few])
    if few.all():
        return compared
    found = _search(graph, queries[~few], k, beam, jnp.asarray(mask[~few]))
    order = np.argsort(np.concatenate([np.flatnonzero(few), np.flatnonzero(~few)]))
    return Neighbours(*(jnp.concatenate(parts)[order] for parts in zip(compared, found, strict=True)))


def _check_build(where, metric, degree, key, storage, *arrays):
    _inputs.check_metric(where, metric)
    if isinstance(degree, bool) or not isinstance(degree, int | np.integer):
        raise TypeError(f"{where}: degree is a {type(degree).__name__}; the number of edges is a Python integer")
    if degree < 2:
        raise ValueError(f"{where}: degree is {degree}; a search graph needs at least 2 edges a row, 32 is usual")
    if storage not in ("int8", "bfloat16"):
        raise ValueError(f'{where}: storage is {storage!r}; searches compare rows kept as "int8" or "bfloat16"')
    if not (isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key) and key.ndim == 0):
        raise TypeError(f"{where}: key is {key!r}; pass one key, jax.random.key(0)")
    if not _inputs.is_concrete(key, *jax.tree.leaves(arrays)):
        raise ValueError(
            f"{where}: a graph is built outside jax.jit; build it first, and pass it to the jitted function"
        )
