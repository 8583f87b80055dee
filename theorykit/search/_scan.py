r"""Exact search as one program: lower bounds by matrix products, the best blocks of rows, their distances, a proof.

For centred rows x and queries q the number

    s = h(x) - <q, x>,    l2: h = (1/2 - G) |x|^2;    ip, cosine: h = 0,

is, up to a constant of the query, a lower bound of the distance as `pair_distances` rounds it. G and the constant
cover all rounding of the product (Higham 2002, section 3.1: an inner product of d terms, in any order, is within
d u sum |q_i x_i|, u = 2^-24). Then

1. tiles of products stay in the cache, and only the minimum of s over every block of rows is kept;
2. the m > k blocks with the smallest minima are gathered and their distances computed directly;
3. every other row is at least as far as the next minimum says. If that is beyond the k-th distance found, the answer
   is proved; queries without proof are compared with all rows directly.

So the answer depends neither on tiles nor on devices nor on the precision of the products. Where rows and queries are
multiples of one power of two, and few enough bits, all products are exact: then no margin is needed, and ties, which
such data are full of, need no second pass either. Derivation: the margins stand at `_frame`.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from theorykit.search._distances import LANES, inverse_power, pair_distances, unit_rows
from theorykit.search.select import merge, smallest

ROUNDOFF = 2.0**-24
# Blocks kept beyond k. A query stays without proof if more rows than these lie within the margin of the k-th distance.
# In float32 the margin is about 1e-5 of |q|^2 + |x|^2, and rows that close are rare, save for duplicates. With TF32
# products it is 2e-3: for data of dimension D in which distances are a tenth of the squared norms, k D / 2 rows in a
# hundred lie there, a few for k = 10.
SPARE, SPARE_REDUCED = 6, 22
# Queries that are redone together.
REDONE = 8


class Plan(NamedTuple):
    """Sizes of a program; all numbers of rows and queries are multiples of them."""

    chunk: int  # queries that are answered together
    tile: int  # rows of one product
    block: int  # rows of which the least bound is kept; 0: compare all pairs directly
    blocks: int  # blocks whose rows are compared directly


class Frame(NamedTuple):
    """What turns products into lower bounds."""

    centre: jax.Array  # (d,)
    half: jax.Array  # (n,) h(x); infinite for rows that do not count
    shift: jax.Array  # (q,) bound = factor (s + shift)
    exact: jax.Array  # (q,) whether equal bounds mean equal distances


@partial(jax.jit, static_argnames=("k", "metric", "plan"))
def nearest(rows, queries, counts, allowed, each, own, *, k, metric, plan):
    """The k nearest of the first counts[0] rows for the first counts[1] queries; see `search`."""
    return search(rows, queries, counts, allowed, each, own, k=k, metric=metric, plan=plan)


def search(rows, queries, counts, allowed, each, own, *, k, metric, plan):
    """Distances and ids, (q, k), of padded rows (n, d) and queries (q, d).

    allowed (n,) and each (q, n), or None, say which rows count; own (q,), or None, is a row that does not.
    """
    n = rows.shape[0]
    counted = jnp.arange(n, dtype=jnp.int32) < counts[0]
    if allowed is not None:
        counted &= allowed
    if metric == "cosine":
        rows, queries = unit_rows(rows), unit_rows(queries)
    if plan.block:
        frame = _frame(rows, queries, counts[0], counted, metric, plan)
        answer = partial(_by_blocks, rows, frame, k=k, metric=metric, plan=plan)
    else:
        answer = partial(_directly, rows, counted, k=k, metric=metric, tile=plan.tile)

    def chunk(i, found):
        here = partial(lax.dynamic_slice_in_dim, start_index=i * plan.chunk, slice_size=plan.chunk)
        parts = [None if array is None else here(array) for array in (queries, each, own)]
        shift = (here(frame.shift), here(frame.exact)) if plan.block else ()
        new = answer(*parts, *shift)
        return [lax.dynamic_update_slice_in_dim(a, b, i * plan.chunk, 0) for a, b in zip(found, new, strict=True)]

    q = queries.shape[0]
    start = [jnp.full((q, k), jnp.inf, jnp.float32), jnp.full((q, k), -1, jnp.int32), jnp.ones((q,), bool)]
    found = lax.fori_loop(0, -(-counts[1] // plan.chunk), chunk, start[: 3 if plan.block else 2])
    if not plan.block:
        return tuple(found)
    distances, ids, proved = found
    proved |= jnp.arange(q, dtype=jnp.int32) >= counts[1]
    # The queries without proof come first.
    order = jnp.argsort(proved, stable=True).astype(jnp.int32)
    missing = jnp.sum(~proved, dtype=jnp.int32)

    def redo(state):
        i, distances, ids = state
        # At the end a slice reaches back to queries that are done; they get the same answer again.
        these = lax.dynamic_slice_in_dim(order, i, min(REDONE, q))
        parts = [None if array is None else array[these] for array in (queries, each, own)]
        new = _directly(rows, counted, *parts, k=k, metric=metric, tile=plan.tile)
        return i + REDONE, distances.at[these].set(new[0]), ids.at[these].set(new[1])

    _, distances, ids = lax.while_loop(lambda state: state[0] < missing, redo, (jnp.int32(0), distances, ids))
    return distances, ids


def _frame(rows, queries, count, counted, metric, plan):
    r"""Centre, halves of squared norms and margins.

    Margins, in units of u = 2^-24 and to first order; w is the relative error of a product of two rounded factors,
    and p = d / LANES + 10 that of `pair_distances`. With |q| |x| <= (|q|^2 + |x|^2) / 2 the terms of l2 split between
    row and query, each times its squared norm: w/2 + d/2 of the product, d/2 of the squared norm, 2 of centring, p of
    the distance, and under 8 of the sums. For ip: (w + d + p + 4) |q| max |x|. For cosine, where unit vectors have
    squared norms within p + 8 of 1: w + d + 3 p + 16, and 4 for the sums.
    """
    n, d = rows.shape
    tiles = rows.reshape(-1, plan.tile, d)
    ones = jnp.ones((d,), jnp.float32)
    infinite = jnp.where(counted, jnp.float32(0), jnp.float32(jnp.inf))
    product, accumulation, full = _precision()
    pair = -(-d // LANES) + 10

    def norms(x):
        # Products with ones, since processors do not vectorise sums along the last axis.
        return jnp.matmul(x * x, ones, precision="highest")

    if metric == "cosine":
        zero = jnp.all(queries == 0, axis=1)
        margin = product + (accumulation * d + 3 * pair + 20) * ROUNDOFF
        return Frame(jnp.zeros((d,), jnp.float32), infinite, jnp.where(zero, 1.0, 1.0 - margin), zero)
    centre = jnp.zeros((d,), jnp.float32)
    if metric == "l2":
        total = lax.fori_loop(0, n // plan.tile, lambda i, c: c + jnp.sum(tiles[i], axis=0), centre)
        centre = total / jnp.maximum(count, 1).astype(jnp.float32)
    # Every number that the products meet is a multiple of unit^2 / 2 and below 4 radius^2 <= 2^24 unit^2: no rounding.
    # The hundredth covers the rounding of radius and that of the centre to multiples of the unit.
    radius = jnp.maximum(
        jnp.max(lax.map(lambda tile: jnp.max(norms(tile - centre[None])), tiles)),
        jnp.max(norms(queries - centre[None])),
    ) ** 0.5 * (1.01 + d**0.5 / 2048)
    # One over the unit: radius < 2^11 units. The least radius keeps it finite.
    scale = 1024 * inverse_power(jnp.maximum(radius, 2.0**-80))
    rounded = jnp.round(centre * scale) / scale
    # Far from the origin, and with a tiny unit, that overflows.
    centre = jnp.where(jnp.abs(rounded) < jnp.inf, rounded, centre)

    def measure(tile):
        residual = jnp.abs(tile * scale - jnp.round(tile * scale))
        return norms(tile - centre[None]), jnp.max(jnp.matmul(residual, ones, precision="highest"))

    squares, residuals = lax.map(measure, tiles)
    exact = (jnp.max(residuals) == 0) & jnp.all(queries == jnp.round(queries * scale) / scale) & full
    lengths = norms(queries - centre[None])
    if metric == "ip":
        margin = product + (accumulation * d + pair + 8) * ROUNDOFF
        # The last factor covers the rounding of both norms.
        shift = -margin * jnp.sqrt(lengths) * jnp.sqrt(jnp.max(squares)) * (1 + d * ROUNDOFF)
        zero = jnp.all(queries == 0, axis=1)
        return Frame(centre, infinite, jnp.where(exact, 0.0, shift), exact | zero)
    margin = 0.5 * product + (0.5 * (accumulation + 1) * d + pair + 10) * ROUNDOFF
    margin = jnp.where(exact, 0.0, margin)
    half = (0.5 - margin) * squares.reshape(n) + infinite
    return Frame(centre, half, (0.5 - margin) * lengths, jnp.broadcast_to(exact, lengths.shape))


def _precision():
    """Relative error of products, roundings of each addition, and whether products are those of float32.

    Elsewhere than on processors factors may be rounded to TF32, up to 2^-10 each, and sums be cut off.
    """
    return lax.platform_dependent(
        cpu=lambda: (jnp.float32(0), jnp.float32(1), jnp.bool_(True)),
        default=lambda: (jnp.float32(2.0**-9), jnp.float32(2), jnp.bool_(False)),
    )


def _product(x, q):
    """Products of all rows and queries; reduced precision where that is much faster, and the margin wider."""
    return lax.platform_dependent(
        x,
        q,
        cpu=lambda x, q: jnp.matmul(x, q.T, precision="highest"),
        default=lambda x, q: jnp.matmul(x, q.T, precision="high"),
    )


def _by_blocks(rows, frame, queries, each, own, shift, exact, *, k, metric, plan):
    """Distances, ids, and whether they are proved, of a chunk of queries."""
    n, d = rows.shape
    q = queries.shape[0]
    centred = queries - frame.centre[None]

    def tile(i, lows):
        here = partial(lax.dynamic_slice_in_dim, start_index=i * plan.tile, slice_size=plan.tile)
        bounds = here(frame.half)[:, None] - _product(here(rows) - frame.centre[None], centred)
        if each is not None:
            bounds = jnp.where(here(each, axis=1).T, bounds, jnp.inf)
        if own is not None:
            ids = i * plan.tile + jnp.arange(plan.tile, dtype=jnp.int32)
            bounds = jnp.where(ids[:, None] == own[None, :], jnp.inf, bounds)
        low = jnp.min(bounds.reshape(-1, plan.block, q), axis=1)
        return lax.dynamic_update_slice_in_dim(lows, low, i * low.shape[0], 0)

    lows = lax.fori_loop(0, n // plan.tile, tile, jnp.full((n // plan.block, q), jnp.inf, jnp.float32))
    lows, blocks = smallest(lows.T, plan.blocks + 1)
    # Blocks in order, so that candidates stand in the order of their ids.
    blocks = jnp.sort(blocks[:, : plan.blocks], axis=1)
    split = rows.reshape(-1, plan.block, d)
    counted = (frame.half < jnp.inf).reshape(-1, plan.block)
    inside = jnp.arange(plan.block, dtype=jnp.int32)

    def compare(query, blocks, each, own):
        found = pair_distances(metric, query[None], jnp.take(split, blocks, axis=0, mode="clip").reshape(-1, d))
        fine = jnp.take(counted, blocks, axis=0, mode="clip")
        ids = blocks[:, None] * plan.block + inside[None]
        if each is not None:
            fine &= jnp.take(each.reshape(-1, plan.block), blocks, axis=0, mode="clip")
        if own is not None:
            fine &= ids != own
        return jnp.where(fine.reshape(-1), found, jnp.inf), ids.reshape(-1)

    candidates, ids = lax.map(lambda parts: compare(*parts), (queries, blocks, each, own))
    distances, where = smallest(candidates, k)
    ids = jnp.take_along_axis(ids, where, axis=1)
    ids = jnp.where(distances < jnp.inf, ids, -1)
    factor = 2.0 if metric == "l2" else 1.0
    bound, last = factor * (lows[:, plan.blocks] + shift), distances[:, -1]
    return distances, ids, (bound > last) | (exact & (bound == last)) | (bound == jnp.inf)


def _directly(rows, counted, queries, each, own, *, k, metric, tile):
    """Distances and ids by comparing all pairs."""
    n = rows.shape[0]
    q = queries.shape[0]

    def step(i, best):
        here = partial(lax.dynamic_slice_in_dim, start_index=i * tile, slice_size=tile)
        ids = i * tile + jnp.arange(tile, dtype=jnp.int32)
        fine = jnp.broadcast_to(here(counted)[None], (q, tile))
        if each is not None:
            fine &= here(each, axis=1)
        if own is not None:
            fine &= ids[None] != own[:, None]
        distances = jnp.where(fine, pair_distances(metric, queries[:, None], here(rows)[None]), jnp.inf)
        return merge(*best, distances, jnp.broadcast_to(ids[None], (q, tile)), k)

    none = jnp.full((q, k), jnp.inf, jnp.float32), jnp.full((q, k), -1, jnp.int32)
    distances, ids = lax.fori_loop(0, n // tile, step, none)
    return distances, jnp.where(distances < jnp.inf, ids, -1)
