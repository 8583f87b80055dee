r"""Approximate nearest neighbours by a search graph.

A row's edges lead to near rows, chosen so that few of them repeat a way of two steps. A search begins at the nearest of
many entry points and visits the nearest row seen, again and again; what it saw nearest is compared exactly at the end.

    graph = build_graph(base, key=jax.random.key(0))
    distances, ids = query_graph(graph, queries, 10)

The distances returned are those of `theorykit.search.knn`: rows can be missed, never misjudged.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array, Key

from theorykit.search import _beam, _inputs, _optimise
from theorykit.search._graph import Graph, ShardedGraph
from theorykit.search._inputs import Base, Mask, Metric, Neighbours, Queries
from theorykit.search._nn_descent import FEW, nearest_lists
from theorykit.search._resources import Stages, check_memory
from theorykit.search._transform import Storage, encode, entry_table, euclidean
from theorykit.search.exact import knn, padded

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


def build_graph(
    base: Base,
    *,
    metric: Metric = "l2",
    degree: int = 32,
    key: Key[Array, ""],
    storage: Storage = "int8",
    exact: bool | None = None,
    mesh: Mesh | None = None,
    memory: int | None = None,
    progress: bool | None = None,
) -> Graph | ShardedGraph:
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
    mesh
        Devices to divide the rows among, over the first axis; queries are divided over the second if there is one.
        Every run of rows gets a graph of its own, and every query is searched in all of them. A process builds those of
        its devices, one after the other.
    memory
        Bytes that rows, graph and the build (with a mesh, of one run) may take; by default what is free, where that can
        be known.
    progress
        Whether to show progress; by default from 50,000 rows.

    Returns
    -------
    Graph or, with a mesh, ShardedGraph
        A pytree for `query_graph`, inside `jax.jit` or outside. A `Graph` can be extended and saved.

    Raises
    ------
    TypeError, ValueError
        If base is not real (n, d) or holds a NaN, an infinity or a number so large that distances overflow; if metric,
        degree, key, storage or mesh are not as above; inside `jax.jit`.
    MemoryError
        If the build would need more than `memory`.

    Source: Ootomo et al. 2023, arXiv 2308.15136; NN-descent: Dong et al. 2011.
    """
    _check_build("build_graph", metric, degree, key, storage, base)
    if mesh is not None:
        from theorykit.search import shard

        part = partial(
            build_graph, metric=metric, degree=degree, storage=storage, exact=exact, memory=memory, progress=progress
        )
        return shard.build(_inputs.checked_rows("build_graph: base", base, metric), mesh, key, part)
    rows = _inputs.as_rows("build_graph: base", base, metric)
    n, d = rows.shape
    check_memory("build_graph", n, d, degree, max(LEAST_CANDIDATES, degree), memory)
    if n == 0:
        return _assemble(rows, jnp.zeros((0, degree), jnp.int32), jnp.zeros((0,), jnp.int32), 0, metric, storage)
    one, two = jax.random.split(key)
    with Stages("building a search graph", n, progress) as tell:
        edges = _edges(euclidean(rows, metric), degree, one, exact, tell)
        tell("reverse edges")
        back = _optimise.reversed_edges(edges, jnp.arange(n, dtype=jnp.int32), n)
        edges = _optimise.merge_reverse(edges, back)
        tell("connections")
        found = _optimise.connect(edges, _drawn(two, n=n, count=_entries(n)))
    return _assemble(rows, found.edges, found.entries, found.unreachable, metric, storage)


def query_graph(
    graph: Graph | ShardedGraph, queries: Queries, k: int, *, beam: int | None = None, mask: Mask | None = None
) -> Neighbours:
    r"""Approximately the k nearest rows of every query.

    A search visits `beam` rows (of a `ShardedGraph` as many in every part) and sees where their edges lead; the nearest
    of the rows seen, more than k, are compared exactly. A beam of at least n rows finds everything.

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
    whole = graph if isinstance(graph, Graph) else graph.parts
    n, d = graph.base.shape if isinstance(graph, Graph) else (graph.n, whole.base.shape[-1])
    points = _inputs.checked_rows("query_graph: queries", queries, whole.metric)
    q = points.shape[0]
    _inputs.check_same_dimension("query_graph", jax.ShapeDtypeStruct((n, d), jnp.float32), points)
    _inputs.check_mask("query_graph", mask, q, n)
    if n == 0 or q == 0:
        return Neighbours(jnp.full((q, k), jnp.inf, jnp.float32), jnp.full((q, k), -1, jnp.int32))
    beam = min(int(beam), n)
    if isinstance(graph, Graph):
        search, compare = partial(_search, graph, k=k, beam=beam), partial(_compared, graph, k=k)
    else:
        from theorykit.search import shard

        search, compare = partial(shard.search_graph, graph, k=k, beam=beam), partial(shard.compared, graph, k=k)
    if mask is None or not _inputs.is_concrete(mask):
        return search(points, mask)
    return _masked(points, np.asarray(mask), n, search, compare)


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
    if not isinstance(graph, Graph):
        raise TypeError(
            f"extend: graph is a {type(graph).__name__}; build one of all rows, build_graph(rows, mesh=mesh)"
        )
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
        chosen = n + _drawn(two, n=m, count=min(more, m))
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


@partial(jax.jit, static_argnames=("n", "count"))
def _drawn(key, *, n, count):
    """Different rows of n, drawn at random: those with the least random numbers, the first of equal ones."""
    # One sort, where a random permutation, which compiles two, would shuffle among equal numbers as well.
    numbers = jax.random.bits(key, (n,), jnp.uint32)
    return lax.sort((numbers, jnp.arange(n, dtype=jnp.int32)), num_keys=1)[1][:count]


def _assemble(rows, neighbours, entries, unreachable, metric, storage):
    if rows.shape[0]:
        codes = encode(rows, metric, storage)
    else:
        zero = jnp.zeros((rows.shape[1],), jnp.float32)
        empty = jnp.zeros(rows.shape, storage)
        codes = (empty, jnp.zeros((0,), jnp.float32), zero, zero, jnp.zeros((), jnp.float32))
    table = entry_table(codes[0], entries)
    return Graph(rows, neighbours, entries, table, *codes, jnp.asarray(unreachable, jnp.int32), metric)


@partial(jax.jit, static_argnames=("k", "beam", "chunk"))
def _found(graph, queries, count, mask, *, k, beam, chunk):
    return _beam.search(graph, queries, count, k, beam, mask, chunk)


def sizes(q: int, dtype: jnp.dtype) -> tuple[int, int]:
    """Queries that take their steps together, and to how many q queries are filled up."""
    chunks = CHUNKS if jax.default_backend() == "cpu" else CHUNKS_OF_ACCELERATOR
    # Sums of codes that are no integers are rounded, and one program rounds alike.
    chunk = next((size for size in chunks if q <= size and dtype == jnp.int8), chunks[-1])
    # A power of two chunks, of which only those that hold queries are computed: few programs are compiled.
    return chunk, chunk * 2 ** math.ceil(math.log2(-(-q // chunk)))


def _search(graph, queries, mask, *, k, beam):
    q = queries.shape[0]
    chunk, size = sizes(q, graph.codes.dtype)
    mask = padded(mask, size) if mask is not None and mask.ndim == 2 else mask
    found = _found(graph, padded(queries, size), np.int32(q), mask, k=k, beam=beam, chunk=chunk)
    return found if size == q else Neighbours(*(array[:q] for array in found))


def _compared(graph, queries, mask, *, k):
    """All rows that pass the mask compared exactly."""
    if mask.ndim == 2:
        return knn(graph.base, queries, k, metric=graph.metric, mask=mask)
    rows = np.flatnonzero(mask).astype(np.int32)
    found = knn(graph.base[rows], queries, k, metric=graph.metric)
    return found._replace(ids=jnp.asarray(np.append(rows, np.int32(-1)))[found.ids])  # -1 takes the last


def _masked(queries, mask, n, search, compare):
    """Search, or where few rows pass the mask compare those."""
    few = np.count_nonzero(mask, axis=-1) < LEAST_PASSING * n
    if not few.any():
        return search(queries, mask)
    if few.all():
        return compare(queries, mask)
    parts = compare(queries[few], mask[few]), search(queries[~few], mask[~few])
    order = np.argsort(np.concatenate([np.flatnonzero(few), np.flatnonzero(~few)]))
    return Neighbours(*(jnp.concatenate(arrays)[order] for arrays in zip(*parts, strict=True)))


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
