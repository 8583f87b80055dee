r"""Exact nearest neighbours for l2, inner product and cosine.

Exact means: the k smallest of the float32 distances that `rerank` gives, ties by the lower id. Those distances are
sums of direct differences in a fixed order, each within (d / 16 + 10) 2^-24 of the true one, relatively (ip: of
|q| |x|); the answer therefore does not depend on how queries are batched, on the tiles, or on the number of devices.
How matrix products are used without giving that up is told in `theorykit.search._scan`.

All functions work inside `jax.jit` as well. There the values are not known, and these checks do not happen: NaN,
infinities and overflow of rows and queries, and ids out of range (`rerank` then treats them as missing).
"""

import math
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array, Int, Int32

from theorykit.search import _inputs
from theorykit.search._distances import LANES, UNROLLED, pair_distances, unit_rows
from theorykit.search._inputs import Base, Mask, Metric, Neighbours, Queries
from theorykit.search._scan import GATHERED, SPARE, SPARE_REDUCED, Plan, nearest
from theorykit.search.select import smallest

# Temporary arrays: more makes nothing faster, since a chunk of 512 queries then fits for a million rows.
MEMORY = 2**28
# Measured on two cores at 200,000 x 128: a product of 2048 x 128 by 128 x 512 stays in the cache of its core, and the
# minima cost nothing beside it; 256 to 1024 queries and 2048 to 4096 rows differ by less than a tenth.
CHUNK, TILE = 512, 2048
LEAST_ROWS, LEAST_QUERIES = 64, 8
# Products with fewer columns take longer: 8 queries 0.21 s, 64 queries 0.08 s. Memory alone makes chunks narrower.
NARROWEST = 64
# Nanoseconds, measured likewise: minima cost 2.4 each to turn over and select from, and with groups, which leave few of
# them to select from, 0.4 to keep; comparing a row directly costs 0.35 for each of its coordinates.
SELECT, KEEP, COMPARE = 2.4, 0.4, 0.35
WIDEST_BLOCK = 64
# Smaller groups take as much time as they save.
LEAST_GROUP = 8
# Products of bfloat16 take half the time of float32, and a program with both a second longer to compile: from so many
# multiplications on.
REDUCED_FROM = 2**33
# So few queries are compared with all rows, one after the other: the passes over the rows that bounds need take longer.
# Without memory for the partial sums of all rows it is fewer.
FEW, FEW_TILED = 8, 2
# Smaller arrays are padded by NumPy, which needs no program for each shape; that takes 10 milliseconds to compile, as
# long as NumPy takes for this many bytes.
COPIED = 2**24


def knn(
    base: Base,
    queries: Queries,
    k: int,
    *,
    metric: Metric = "l2",
    mask: Mask | None = None,
    mesh: Mesh | None = None,
    memory: int = MEMORY,
) -> Neighbours:
    r"""The k nearest rows of every query, exactly.

    .. math:: |q - x|^2 \;(l2), \qquad -\langle q, x \rangle \;(ip), \qquad
              1 - \frac{\langle q, x \rangle}{|q| |x|} \;(cosine;\ 1 \text{ if } q \text{ or } x \text{ is zero})

    Rows and queries are padded to one of 16 sizes an octave, so that few programs are compiled; on processors, rows of
    16 MiB and more are rather compiled for than copied. Beyond the arguments, their padded copies (for cosine two), the
    result and a mask, the program holds at most `memory`.

    Parameters
    ----------
    base
        Rows (n, d) from NumPy or JAX, of any real dtype; n may be 0. They are searched as float32.
    queries
        Queries (q, d); q may be 0.
    k
        Number of neighbours, at least 1; it may exceed n.
    metric
        "l2" (squared distances), "ip" or "cosine".
    mask
        Rows that may be found: boolean, (n,) for all queries or (q, n).
    mesh
        Devices to divide the work among: rows over the first axis, queries over the second if there is one. The answer
        is the same.
    memory
        Bytes for temporary arrays of one device; less means smaller chunks of queries.

    Returns
    -------
    Neighbours
        Distances (float32) and ids (int32), both (q, k), ascending, ties by the lower id; infinity and -1 where fewer
        than k rows exist or pass the mask.

    Raises
    ------
    TypeError, ValueError
        If rows or queries are not (n, d) real numbers of one dimension, hold a NaN, an infinity or a number so large
        that distances overflow; if k, metric or mask are not as above; if `memory` does not suffice for 8 queries.

    Source: derivation; bounds of rounding: Higham 2002.
    """
    return _knn("knn", base, queries, k, metric, mask, mesh, memory, own=False)


def knn_graph(
    base: Base, k: int, *, metric: Metric = "l2", mesh: Mesh | None = None, memory: int = MEMORY
) -> Neighbours:
    r"""The k nearest other rows of every row, exactly.

    .. math:: N(i) = \text{the } k \text{ first of } \{(d(x_i, x_j), j) : j \neq i\}

    A copy of a row counts as another row, at distance 0.

    Parameters
    ----------
    base
        Rows (n, d), as for `knn`.
    k, metric, mesh, memory
        As for `knn`.

    Returns
    -------
    Neighbours
        Distances and ids, both (n, k); infinity and -1 where there are fewer than k other rows.

    Raises
    ------
    TypeError, ValueError
        As `knn`.

    Source: derivation.
    """
    return _knn("knn_graph", base, base, k, metric, None, mesh, memory, own=True)


def rerank(
    base: Base, queries: Queries, ids: Int[Array, "q c"] | Int[np.ndarray, "q c"], *, metric: Metric = "l2"
) -> Neighbours:
    """Exact distances of given candidates, in ascending order.

    Parameters
    ----------
    base
        Rows (n, d), as for `knn`.
    queries
        Queries (q, d).
    ids
        Candidates of each query, (q, c); -1 stands for none. One that is named twice counts once.
    metric
        As for `knn`.

    Returns
    -------
    Neighbours
        Distances and ids, both (q, c), ascending, ties by the lower id; infinity and -1 at the end for what is missing.

    Raises
    ------
    TypeError, ValueError
        If rows and queries are not as `knn` asks, or ids are not integers (q, c) from -1 to n - 1.

    Source: derivation.
    """
    _inputs.check_metric("rerank", metric)
    rows, points = (_inputs.as_rows(f"rerank: {name}", x, metric) for name, x in (("base", base), ("queries", queries)))
    _inputs.check_same_dimension("rerank", rows, points)
    n, q = rows.shape[0], points.shape[0]
    if not isinstance(ids, np.ndarray | jax.Array) or not jnp.issubdtype(ids.dtype, jnp.integer):
        raise TypeError(f"rerank: ids are {getattr(ids, 'dtype', type(ids).__name__)}; pass an integer array (q, c)")
    if ids.ndim != 2 or ids.shape[0] != q:
        raise ValueError(f"rerank: ids have shape {ids.shape}; give ({q}, c), the candidates of each query in a row")
    if _inputs.is_concrete(ids) and ids.size and not -1 <= int(ids.min()) <= int(ids.max()) < n:
        raise ValueError(
            f"rerank: ids lie between {int(ids.min())} and {int(ids.max())}; "
            f"rows are 0 to {n - 1}, and -1 stands for none"
        )
    if 0 in (n, q, ids.shape[1]):
        return _nothing(q, ids.shape[1])
    # Wide integers are clipped before they are narrowed, so that none wraps into the range of rows.
    return _rerank(rows, points, jnp.clip(jnp.asarray(ids), -1, n).astype(jnp.int32), metric=metric)


@partial(jax.jit, static_argnames="metric")
def _rerank(rows, queries, ids, *, metric):
    n = rows.shape[0]
    if metric == "cosine":
        queries = unit_rows(queries)
    # In the order of ids copies stand side by side, and ties go to the lower id.
    ids = jnp.sort(ids, axis=1)
    fine = (ids >= 0) & (ids < n)
    fine &= jnp.concatenate([jnp.ones_like(fine[:, :1]), ids[:, 1:] != ids[:, :-1]], axis=1)

    def compare(query, ids):
        found = jnp.take(rows, ids, axis=0, mode="clip")
        return pair_distances(metric, query[None], unit_rows(found) if metric == "cosine" else found)

    distances = jnp.where(fine, lax.map(lambda parts: compare(*parts), (queries, ids)), jnp.inf)
    distances, where = smallest(distances, ids.shape[1])
    ids = jnp.take_along_axis(ids, where, axis=1)
    return Neighbours(distances, jnp.where(distances < jnp.inf, ids, -1))


def plan(n: int, q: int, d: int, k: int, memory: int, *, masked: bool = False) -> tuple[int, int, Plan]:
    """Padded numbers of rows and queries, and the sizes of the program.

    Parameters
    ----------
    n, q, d, k
        Rows, queries, dimension and neighbours.
    memory
        Bytes for temporary arrays.
    masked
        Whether there is a mask of its own for each query.

    Returns
    -------
    tuple
        Rows and queries after padding, and the `Plan`.

    Raises
    ------
    ValueError
        If `memory` does not suffice for the least number of queries.
    """
    rows = _bucket(n, LEAST_ROWS, TILE)
    tile = min(rows, TILE)
    cpu = jax.default_backend() == "cpu"
    reduced = cpu and not masked and n * q * d >= REDUCED_FROM and _multiplies_bfloat16()
    blocks = min(k, rows) + (SPARE if cpu and not reduced else SPARE_REDUCED + min(k, rows) // 4 * reduced)
    # Minima cost rows / block * KEEP a query (SELECT without groups), the blocks compared directly
    # blocks * block * d * COMPARE.
    best = math.sqrt(rows / blocks * (KEEP if cpu else SELECT) / (COMPARE * d))
    block = 2 ** max(0, min(round(math.log2(best)), int(math.log2(WIDEST_BLOCK)), int(math.log2(tile))))
    # As many groups as there are minima in those that are looked at. Accelerators select from long rows in two stages
    # of their own.
    group = 2 ** max(0, min(round(math.log2(rows / (block * blocks)) / 2), int(math.log2(tile // block))))
    group = group if cpu and group >= LEAST_GROUP else 1
    # Partial sums of all rows and what becomes of them; long vectors are not summed in one go.
    whole = cpu and d <= LANES * UNROLLED and 4 * (LANES + 8) * rows <= memory
    direct = q <= (FEW if whole else FEW_TILED) or blocks * block * 2 > rows
    # A large base is not copied, to pad it: that would take as long as several queries, or half as long as thousands.
    if whole and 4 * n * d >= COPIED and n >= tile and (direct or n % block == 0):
        rows = n
    if direct and whole and rows > tile:
        return rows, _bucket(q, 1 if q == 1 else FEW, FEW), Plan(1, tile, 0, blocks, whole=True)
    tile_bytes = 4 * d * (2 * tile + 2 * GATHERED * blocks * block * (not direct))
    # Of each query, in float32: products of a tile and what becomes of them, or differences to a tile; minima, turned
    # over once unless there are groups; candidates, and ids beside them; what groups are looked at.
    minima = rows // block * (3 if group == 1 else 1 + 3 / group) + 3 * blocks * (block + (group if group > 1 else 0))
    each = 4 * ((3 * d + 4) * tile) if direct else 4 * (2 * tile + math.ceil(minima))
    each += tile if masked else 0
    most = (memory - tile_bytes) // each
    if most < LEAST_QUERIES:
        need = tile_bytes + LEAST_QUERIES * each
        raise ValueError(
            f"knn: {LEAST_QUERIES} queries at once on {n} rows of dimension {d} with k = {k} need {need} bytes "
            f"and memory is {memory}; allow more, or search parts of the base and merge"
        )
    most = min(CHUNK, most // LEAST_QUERIES * LEAST_QUERIES)
    if q <= most:
        chunk = wide = min(most, _bucket(q, 1 if direct else NARROWEST, NARROWEST))
    else:
        chunk = min(most, _up(-(-q // -(-q // most)), LEAST_QUERIES))
        wide = chunk * _bucket(-(-q // chunk), 1, 1)
    return rows, wide, Plan(chunk, tile, 0 if direct else block, blocks, group, reduced, whole)


@cache
def _multiplies_bfloat16() -> bool:
    """Whether the processor has units for products of bfloat16; others convert them, which takes longer."""
    try:
        return "avx512_bf16" in Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False


def _bucket(n, least, step):
    """The next larger one of 16 sizes an octave, that are multiples of step; powers of two below step."""
    n = max(n, least)
    octave = 1 << (n - 1).bit_length()
    if octave <= step:
        return octave
    return _up(n, max(step, octave // 32))


def _up(n, step):
    return -(-n // step) * step


def _nothing(q, k):
    return Neighbours(jnp.full((q, k), jnp.inf, jnp.float32), jnp.full((q, k), -1, jnp.int32))


def _knn(where: str, base: Any, queries: Any, k: Any, metric: Any, mask: Any, mesh: Any, memory: int, *, own: bool):
    """Checks, padding, the program, and the columns beyond the padded rows."""
    k = _inputs.check_k(where, k)
    _inputs.check_metric(where, metric)
    rows = _inputs.checked_rows(f"{where}: base", base, metric)
    points = rows if own else _inputs.checked_rows(f"{where}: queries", queries, metric)
    _inputs.check_same_dimension(where, rows, points)
    (n, d), q = rows.shape, points.shape[0]
    _inputs.check_mask(where, mask, q, n)
    if n == 0 or q == 0:
        return _nothing(q, k)
    if mesh is not None:
        from theorykit.search import shard

        return shard.search(where, rows, points, k, metric, mask, mesh, memory, own=own)
    n_padded, q_padded, sizes = plan(n, q, d, k, memory, masked=mask is not None and mask.ndim == 2)
    distances, ids = nearest(
        padded(rows, n_padded),
        padded(points, q_padded),
        np.array([n, q], np.int32),
        padded(mask, n_padded) if mask is not None and mask.ndim == 1 else None,
        padded(mask, q_padded, n_padded) if mask is not None and mask.ndim == 2 else None,
        np.arange(q_padded, dtype=np.int32) if own else None,
        k=min(k, n_padded),
        metric=metric,
        plan=sizes,
    )
    return finish(distances, ids, q, k)


def padded(array: Any, *shape: int) -> Any:
    """The array with zeros after its leading axes, up to the shape."""
    missing = [size - old for size, old in zip(shape, array.shape, strict=False)]
    if not any(missing):
        return array
    if _inputs.on_host(array) and (isinstance(array, np.ndarray) or array.nbytes < COPIED):
        array = np.asarray(array)
        wide = np.zeros((*shape, *array.shape[len(shape) :]), array.dtype)
        wide[tuple(slice(0, size) for size in array.shape)] = array
        return wide
    return jnp.pad(array, [(0, more) for more in missing] + [(0, 0)] * (array.ndim - len(missing)))


def finish(distances: Array, ids: Int32[Array, "q c"], q: int, k: int) -> Neighbours:
    """The first q answers, with k columns."""
    more = k - distances.shape[1]
    distances, ids = (a if a.shape[0] == q else a[:q] for a in (distances, ids))
    if more:
        rest = _nothing(q, more)
        distances = jnp.concatenate([distances, rest.distances], axis=1)
        ids = jnp.concatenate([ids, rest.ids], axis=1)
    return Neighbours(distances, ids)
