r"""Exact search as one program: lower bounds by matrix products, the best blocks of rows, their distances, a proof.

For centred rows x and queries q the number

    s = h(x) - <q, x>,    l2: h = (1/2 - G) |x|^2;    ip, cosine: h = 0,

is, up to a constant of the query, a lower bound of the distance as `pair_distances` rounds it. G and the constant
cover all rounding of the product (Higham 2002, section 3.1: an inner product of d terms, in any order, is within
d u sum |q_i x_i|, u = 2^-24). Then

1. tiles of products stay in the cache; only the minima of s over blocks of rows and over groups of blocks are kept;
2. the m > k blocks with the smallest minima, which lie in the m groups with the smallest, are gathered and their
   distances computed directly;
3. every other row is at least as far as the next minimum says. If that is beyond the k-th distance found, the answer
   is proved. Where the processor multiplies bfloat16, such products come first, and queries without proof go through
   the same steps with float32. Those still without are compared with all rows directly.

So the answer depends neither on tiles nor on devices nor on the precision of the products. Where rows and queries are
multiples of one power of two, and few enough bits, all products are exact: then no margin is needed, and ties, which
such data are full of, need no second pass either. Derivation: the margins stand at `_frames`.
"""

import math
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
# Queries that are redone together: with products of float32, where fewer columns take longer for each and more would
# often be computed for nothing, and directly.
REFINED, REDONE = 128, 8
# Queries whose candidates are gathered together: one alone takes a quarter longer or more, eight take as long each.
GATHERED = 4


class Plan(NamedTuple):
    """Sizes of a program.

    The number of queries is a multiple of chunk, the number of rows of block, and unless `whole` of tile. Otherwise the
    last tile reaches back to rows of the one before, which do not count in it.
    """

    chunk: int  # queries that are answered together
    tile: int  # rows of one product
    block: int  # rows of which the least bound is kept; 0: compare all pairs directly
    blocks: int  # blocks whose rows are compared directly
    group: int = 1  # blocks of which the least bound is kept as well; 1: there are no groups
    reduced: bool = False  # whether products of bfloat16 come first
    whole: bool = False  # whether a query is compared with all rows at once, instead of tile by tile


class Frame(NamedTuple):
    """What turns products into lower bounds."""

    centre: jax.Array  # (d,)
    half: jax.Array  # (tiles tile,) h(x); infinite for rows that do not count
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
    compare = partial(_directly, rows, counted, k=k, metric=metric, tile=n if plan.whole else plan.tile)
    frames = _frames(rows, queries, counts[0], counted, metric, plan) if plan.block else []
    q = queries.shape[0]

    def answer(points, cut, frame):
        masks = [None if array is None else cut(array) for array in (each, own)]
        if frame is None:
            return *compare(points, *masks), jnp.ones(points.shape[:1], bool)
        reduced = plan.reduced and frame is frames[0]
        margins = cut(frame.shift), cut(frame.exact)
        return _by_blocks(rows, frame, points, *masks, *margins, reduced=reduced, k=k, metric=metric, plan=plan)

    # Queries are carried from step to step, since a direct comparison that slices them in the same loop reads number by
    # number, and takes four times as long.
    def chunk(i, state):
        points, found = state
        cut = partial(lax.dynamic_slice_in_dim, start_index=i * plan.chunk, slice_size=plan.chunk)
        new = answer(points, cut, (*frames, None)[0])
        found = [lax.dynamic_update_slice_in_dim(a, b, i * plan.chunk, 0) for a, b in zip(found, new, strict=True)]
        return lax.dynamic_slice_in_dim(queries, (i + 1) * plan.chunk, plan.chunk), tuple(found)

    beyond = jnp.arange(q, dtype=jnp.int32) >= counts[1]
    found = jnp.full((q, k), jnp.inf, jnp.float32), jnp.full((q, k), -1, jnp.int32), beyond
    chunks = -(-counts[1] // plan.chunk)
    if plan.reduced:
        # Where products of float32 are exact, ties need them.
        chunks = jnp.where(jnp.all(frames[-1].exact), 0, chunks)
    _, found = lax.fori_loop(0, chunks, chunk, (queries[: plan.chunk], found))
    for frame in (*frames[1:], None)[: len(frames)]:
        distances, ids, proved = found
        proved |= beyond
        # The queries without proof come first.
        order = jnp.argsort(proved, stable=True).astype(jnp.int32)
        missing = jnp.sum(~proved, dtype=jnp.int32)
        width = min(REFINED if frame else 1 if plan.whole else REDONE, q)

        def redo(i, state, order=order, frame=frame, width=width):
            these, points, found = state
            new = answer(points, lambda array: array[these], frame)
            found = tuple(a.at[these].set(b) for a, b in zip(found, new, strict=True))
            # At the end a slice reaches back to queries that are done; they get the same answer again.
            these = lax.dynamic_slice_in_dim(order, (i + 1) * width, width)
            return these, queries[these], found

        start = order[:width], queries[order[:width]], (distances, ids, proved)
        *_, found = lax.fori_loop(0, -(-missing // width), redo, start)
    return found[:2]


def _frames(rows, queries, count, counted, metric, plan):
    r"""Centre, halves of squared norms and margins: for products of bfloat16, if the plan has them, and for others.

    Margins, in units of u = 2^-24 and to first order; w is the relative error of a product of two rounded factors,
    and p = d / LANES + 10 that of `pair_distances`. With |q| |x| <= (|q|^2 + |x|^2) / 2 the terms of l2 split between
    row and query, each times its squared norm: w/2 + d/2 of the product, d/2 of the squared norm, 2 of centring, p of
    the distance, and under 8 of the sums. For ip: (w + d + p + 4) |q| max |x|. For cosine, where unit vectors have
    squared norms within p + 8 of 1: w + d + 3 p + 16, and 4 for the sums.
    """
    n, d = rows.shape
    tiles = -(-n // plan.tile)
    ones = jnp.ones((d,), jnp.float32)
    # Rows that the last tile has in common with the one before do not count in it.
    gap = jnp.zeros((tiles * plan.tile - n,), bool)
    before = (tiles - 1) * plan.tile
    counted = jnp.concatenate([counted[:before], gap, counted[before:]])
    infinite = jnp.where(counted, jnp.float32(0), jnp.float32(jnp.inf))

    def tile_of(i):
        return lax.dynamic_slice_in_dim(rows, i * plan.tile, plan.tile)

    def over_tiles(function):
        return lax.map(lambda i: function(tile_of(i)), jnp.arange(tiles, dtype=jnp.int32))

    product, accumulation, full = _precision()
    pair = -(-d // LANES) + 10

    def norms(x):
        # Products with ones, since processors do not vectorise sums along the last axis.
        return jnp.matmul(x * x, ones, precision="highest")

    def loss(x, squares):
        # The largest relative error of a vector that is rounded to bfloat16, squared.
        return jnp.max(norms(x - _rounded(x)) / jnp.maximum(squares, jnp.finfo(jnp.float32).tiny))

    def precisions(of_rows, of_queries):
        """Relative error of a product of rounded factors, and roundings of each addition, of every frame."""
        if not plan.reduced:
            return [(product, accumulation)]
        # The factor covers roundings of norms.
        a, b = (jnp.sqrt(squared) * (1 + (d + 4) * ROUNDOFF) for squared in (of_rows, of_queries))
        # |<q, x> - <q', x'>| <= |q - q'| |x| + |q'| |x - x'|. Products of bfloat16 are exact, and sums that are cut
        # off instead of rounded are covered.
        return [(a + b + a * b, 2), (product, accumulation)]

    def measure(x):
        """Squared norms, and with products of bfloat16 the loss."""
        squares = norms(x)
        return squares, loss(x, squares) if plan.reduced else jnp.float32(0)

    centre = jnp.zeros((d,), jnp.float32)
    if metric == "cosine":
        zero = jnp.all(queries == 0, axis=1)
        found = precisions(jnp.max(over_tiles(measure)[1]), measure(queries)[1])
        margins = [w + (steps * d + 3 * pair + 20) * ROUNDOFF for w, steps in found]
        return [Frame(centre, infinite, jnp.where(zero, 1.0, 1.0 - margin), zero) for margin in margins]
    if metric == "l2":
        # Any centre will do: it matters little that some rows are in two tiles.
        total = lax.fori_loop(0, tiles, lambda i, c: c + jnp.sum(tile_of(i), axis=0), centre)
        centre = total / jnp.maximum(count, 1).astype(jnp.float32)
    # Every number that the products meet is a multiple of unit^2 / 2 and below 4 radius^2 <= 2^24 unit^2: no rounding.
    # The hundredth covers the rounding of radius and that of the centre to multiples of the unit.
    radius = jnp.maximum(
        jnp.max(over_tiles(lambda tile: jnp.max(norms(tile - centre[None])))),
        jnp.max(norms(queries - centre[None])),
    ) ** 0.5 * (1.01 + d**0.5 / 2048)
    # One over the unit: radius < 2^11 units. The least radius keeps it finite.
    scale = 1024 * inverse_power(jnp.maximum(radius, 2.0**-80))
    rounded = jnp.round(centre * scale) / scale
    # Far from the origin, and with a tiny unit, that overflows.
    centre = jnp.where(jnp.abs(rounded) < jnp.inf, rounded, centre)

    def residual(tile):
        return jnp.max(jnp.matmul(jnp.abs(tile * scale - jnp.round(tile * scale)), ones, precision="highest"))

    # One pass over the rows for all of it.
    squares, losses, residuals = over_tiles(lambda tile: (*measure(tile - centre[None]), residual(tile)))
    exact = (jnp.max(residuals) == 0) & jnp.all(queries == jnp.round(queries * scale) / scale) & full
    lengths, lost = measure(queries - centre[None])
    frames = []
    for w, steps in precisions(jnp.max(losses), lost):
        # The last frame is that of float32: others have no exact products.
        fine = exact & (len(frames) == plan.reduced)
        if metric == "ip":
            margin = w + (steps * d + pair + 8) * ROUNDOFF
            # The last factor covers the rounding of both norms.
            shift = -margin * jnp.sqrt(lengths) * jnp.sqrt(jnp.max(squares)) * (1 + d * ROUNDOFF)
            zero = jnp.all(queries == 0, axis=1)
            frames.append(Frame(centre, infinite, jnp.where(fine, 0.0, shift), fine | zero))
            continue
        margin = 0.5 * w + (0.5 * (steps + 1) * d + pair + 10) * ROUNDOFF
        margin = 0.5 - jnp.where(fine, 0.0, margin)
        half = margin * squares.reshape(-1) + infinite
        frames.append(Frame(centre, half, margin * lengths, jnp.broadcast_to(fine, lengths.shape)))
    return frames


def _precision():
    """Relative error of products, roundings of each addition, and whether products are those of float32.

    Elsewhere than on processors factors may be rounded to TF32, up to 2^-10 each, and sums be cut off.
    """
    return lax.platform_dependent(
        cpu=lambda: (jnp.float32(0), jnp.float32(1), jnp.bool_(True)),
        default=lambda: (jnp.float32(2.0**-9), jnp.float32(2), jnp.bool_(False)),
    )


def _rounded(x):
    """Numbers rounded to bfloat16, in float32; a conversion there and back may be left out by the compiler."""
    return lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)


def _columns(q, reduced):
    """Queries as `_product` takes them: with bfloat16 they are turned over, once and not for every tile.

    In that layout alone the compiler uses the units for bfloat16 (jaxlib 0.10.2); others it converts to float32.
    """
    return _rounded(q).astype(jnp.bfloat16).T if reduced else q


def _product(x, q, reduced):
    """Products of all rows and queries; reduced precision where that is much faster, and the margin wider."""
    if reduced:
        return jnp.matmul(_rounded(x).astype(jnp.bfloat16), q, preferred_element_type=jnp.float32)
    return lax.platform_dependent(
        x,
        q,
        cpu=lambda x, q: jnp.matmul(x, q.T, precision="highest"),
        default=lambda x, q: jnp.matmul(x, q.T, precision="high"),
    )


def _by_blocks(rows, frame, queries, each, own, shift, exact, *, reduced, k, metric, plan):
    """Distances, ids, and whether they are proved, of a chunk of queries."""
    n, q = rows.shape[0], queries.shape[0]
    tiles = -(-n // plan.tile)
    columns = _columns(queries - frame.centre[None], reduced)

    def tile(i, found):
        here = partial(lax.dynamic_slice_in_dim, start_index=i * plan.tile, slice_size=plan.tile)
        bounds = here(frame.half)[:, None] - _product(here(rows) - frame.centre[None], columns, reduced)
        if each is not None:
            bounds = jnp.where(here(each, axis=1).T, bounds, jnp.inf)
        if own is not None:
            ids = jnp.minimum(i * plan.tile, n - plan.tile) + jnp.arange(plan.tile, dtype=jnp.int32)
            bounds = jnp.where(ids[:, None] == own[None, :], jnp.inf, bounds)
        new = [jnp.min(bounds.reshape(-1, plan.block, q), axis=1)]
        if plan.group > 1:
            new.append(jnp.min(new[0].reshape(-1, plan.group, q), axis=1))
        return [lax.dynamic_update_slice_in_dim(a, b, i * b.shape[0], 0) for a, b in zip(found, new, strict=True)]

    sizes = [plan.block, plan.block * plan.group][: 1 + (plan.group > 1)]
    lows = [jnp.full((tiles * plan.tile // size, q), jnp.inf, jnp.float32) for size in sizes]
    lows, blocks = _least(*lax.fori_loop(0, tiles, tile, lows), m=plan.blocks + 1)
    # Blocks in order, so that candidates stand in the order of their ids.
    blocks = jnp.sort(blocks[:, : plan.blocks], axis=1)
    fine = jnp.take((frame.half < jnp.inf).reshape(-1, plan.block), blocks, axis=0, mode="clip")
    # Where the last tile reaches back, its blocks do.
    back = (blocks >= (tiles - 1) * plan.tile // plan.block).astype(jnp.int32)
    blocks = blocks - back * ((tiles * plan.tile - n) // plan.block)
    candidates = _compare(rows, queries, blocks, metric, plan.block)
    if each is not None:
        fine &= jnp.take_along_axis(each.reshape(q, -1, plan.block), blocks[:, :, None], axis=1)
    if own is not None:
        inside = jnp.arange(plan.block, dtype=jnp.int32)
        fine &= blocks[:, :, None] * plan.block + inside[None, None] != own[:, None, None]
    distances, where = smallest(jnp.where(fine.reshape(q, -1), candidates, jnp.inf), k)
    ids = jnp.take_along_axis(blocks, where // plan.block, axis=1) * plan.block + where % plan.block
    ids = jnp.where(distances < jnp.inf, ids, -1)
    factor = 2.0 if metric == "l2" else 1.0
    bound, last = factor * (lows[:, plan.blocks] + shift), distances[:, -1]
    return distances, ids, (bound > last) | (exact & (bound == last)) | (bound == jnp.inf)


def _least(lows, groups=None, *, m):
    """The m least of the minima (blocks, q) of every query and their blocks, (q, m)."""
    if groups is None:
        return smallest(lows.T, m)
    # Each of the m least groups holds a minimum no greater than any beyond them.
    _, first = smallest(groups.T, m)
    size = lows.shape[0] // groups.shape[0]
    blocks = (first[:, :, None] * size + jnp.arange(size, dtype=jnp.int32)[None, None]).reshape(first.shape[0], -1)
    queries = jnp.arange(first.shape[0], dtype=jnp.int32)[:, None]
    least, where = smallest(lows.at[blocks, queries].get(mode="clip"), m)
    return least, jnp.take_along_axis(blocks, where, axis=1)


def _compare(rows, queries, blocks, metric, block):
    """Distances of every query to the rows of its blocks, (q, m block)."""
    (q, d), m = queries.shape, blocks.shape[1]
    split = rows.reshape(-1, block, d)
    together = math.gcd(q, GATHERED)
    queries, blocks = queries.reshape(-1, together, d), blocks.reshape(-1, together, m)
    count = q // together

    def gather(i):
        return queries[i], jnp.take(split, blocks[i], axis=0, mode="clip").reshape(together, -1, d)

    def step(i, state):
        (points, found), distances = state
        new = pair_distances(metric, points[:, None], found)
        return gather(jnp.minimum(i + 1, count - 1)), lax.dynamic_update_index_in_dim(distances, new, i, 0)

    # What is compared is carried from step to step: gathered in the same loop as the sums, it would be read number by
    # number, in twice the time.
    start = gather(jnp.int32(0)), jnp.zeros((count, together, m * block), jnp.float32)
    return lax.fori_loop(0, count, step, start)[1].reshape(q, -1)


def _directly(rows, counted, queries, each, own, *, k, metric, tile):
    """Distances and ids by comparing all pairs."""
    n = rows.shape[0]
    q = queries.shape[0]

    def distances_to(i):
        # Not sliced if it is the whole: sums over a slice are not vectorised, and take eight times as long.
        here = partial(lax.dynamic_slice_in_dim, start_index=i * tile, slice_size=tile) if tile < n else _all
        ids = i * tile + jnp.arange(tile, dtype=jnp.int32)
        fine = jnp.broadcast_to(here(counted)[None], (q, tile))
        if each is not None:
            fine &= here(each, axis=1)
        if own is not None:
            fine &= ids[None] != own[:, None]
        return jnp.where(fine, pair_distances(metric, queries[:, None], here(rows)[None]), jnp.inf), ids

    def step(i, best):
        distances, ids = distances_to(i)
        return merge(*best, distances, jnp.broadcast_to(ids[None], (q, tile)), k)

    if tile == n:
        distances, ids = smallest(distances_to(0)[0], k)
    else:
        none = jnp.full((q, k), jnp.inf, jnp.float32), jnp.full((q, k), -1, jnp.int32)
        distances, ids = lax.fori_loop(0, n // tile, step, none)
    return distances, jnp.where(distances < jnp.inf, ids, -1)


def _all(array, axis=0):
    return array
