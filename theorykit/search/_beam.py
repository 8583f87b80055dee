"""Best-first search in a graph: a pool of rows seen, of which the nearest ones not yet visited are visited next.

All queries of a chunk take the same number of steps, so none waits for another and nothing has to be compacted: a
search visits `beam` rows, as a search with a beam of that size does before it stops. Rows enter the pool without a
comparison with what is there; a visit marks every copy of a row, which costs a pass of the pool and spares comparing
all newcomers with it. The pool is not sorted either: the next visits are the minima of its stripes.
"""

from functools import partial

import jax.numpy as jnp
from jax import lax

from theorykit.search._distances import pair_distances, unit_rows
from theorykit.search._inputs import Neighbours
from theorykit.search._transform import EXACT, HALF_NORM, integer_distances, integer_queries

# Rows visited at once. More make a step cheaper a row, and choose rows that a later look would not.
WIDTH = 4
# Stripes of the pool whose minima are the candidates of a visit: two vectors of 16 numbers.
STRIPES = 32
# A key is a distance + BIAS, which is positive, then a bit for visited rows; NONE marks a place without a row.
BIAS, VISITED, NONE = EXACT, 2**28, 2**30
assert BIAS + HALF_NORM + EXACT < VISITED
# Room for newcomers, and in beams: the pool is cut to the beam when it is full. A cut costs about as much as passing a
# pool of this size in all the steps until it is full.
ROOM, ROOM_IN_BEAMS = 2048, 4
# Added to keys, so that as bits of a float32, which is quick to select from, they are normal numbers.
NORMAL = 2**23
# Rows beyond k that are compared exactly, to make up for the rounding of codes.
SPARE = 16


def rows_of(array, ids):
    """array[ids] with ids out of range clipped: on processors six times as fast as indexing."""
    return jnp.take(array, ids, axis=0, mode="clip")


def search(graph, queries, count, k, beam, mask, chunk):
    """The k rows found for each of the first `count` queries; q is a multiple of the chunk, and the graph has a row."""
    # As many places to begin as visits, so that a beam that holds all rows begins everywhere.
    seeds = _in_stripes(min(beam, graph.entries.shape[0]))
    half_norms = rows_of(graph.half_norms, graph.entries)

    def answer(i, found):
        here = partial(lax.dynamic_slice_in_dim, start_index=i * chunk, slice_size=chunk)
        own = here(mask) if mask is not None and mask.ndim == 2 else mask
        new = _answer(graph, half_norms, here(queries), own, k=k, beam=beam, seeds=seeds)
        return tuple(
            lax.dynamic_update_slice_in_dim(all_, part, i * chunk, 0) for all_, part in zip(found, new, strict=True)
        )

    nothing = (jnp.full((queries.shape[0], k), jnp.inf, jnp.float32), jnp.full((queries.shape[0], k), -1, jnp.int32))
    return Neighbours(*lax.fori_loop(0, -(-count // chunk), answer, nothing))


def _in_stripes(count):
    return STRIPES * -(-count // STRIPES)


def _answer(graph, entry_half_norms, queries, mask, *, k, beam, seeds):
    n, degree = graph.neighbours.shape
    chunk = queries.shape[0]
    if graph.metric == "cosine":
        queries = unit_rows(queries)
    integers, factor = integer_queries(queries, graph.centre, graph.steps, graph.finest, graph.metric)

    def keys_of(ids, codes, half_norms):
        return jnp.where(ids < n, integer_distances(integers, factor, codes, half_norms) + BIAS, NONE)

    compared = k + max(k, SPARE)
    steps = -(-beam // WIDTH)
    phases = -(-steps // -(-max(ROOM, ROOM_IN_BEAMS * beam) // (WIDTH * degree)))
    per_phase = -(-steps // phases)
    room = _in_stripes(per_phase * WIDTH * degree)
    # What a cut keeps: the beam, and what may be found, which a mask can make a different set.
    kept = (_in_stripes(max(beam, compared)), 0 if mask is None else _in_stripes(compared))
    held = seeds if phases == 1 else max(seeds, sum(kept))

    entries = jnp.broadcast_to(graph.entries[None], (chunk, graph.entries.shape[0]))
    keys = keys_of(entries, graph.table, entry_half_norms[None])
    whole = seeds * -(-graph.entries.shape[0] // seeds)
    pool = _widened(*_minima(*_widened(keys, entries, whole, n), seeds, n), held + room, n)
    visited = jnp.full((chunk, phases * per_phase * WIDTH), n, jnp.int32)

    def step(i, state):
        keys, ids, visited = state
        picks = _picks(keys, ids, n)
        keys = jnp.where((ids[:, :, None] == picks[:, None, :]).any(-1), keys | VISITED, keys)
        visited = lax.dynamic_update_slice(visited, picks, (0, i * WIDTH))
        new = jnp.where(picks[:, :, None] < n, rows_of(graph.neighbours, picks), n).reshape(chunk, -1)
        new_keys = keys_of(new, rows_of(graph.codes, new), rows_of(graph.half_norms, new))
        new_keys = jnp.where((new[:, :, None] == visited[:, None, :]).any(-1), NONE, new_keys)
        place = held + (i % per_phase) * (WIDTH * degree)
        return (
            lax.dynamic_update_slice(keys, new_keys, (0, place)),
            lax.dynamic_update_slice(ids, new, (0, place)),
            visited,
        )

    def phase(number, state):
        keys, ids, visited = state
        keys, ids = _cut(keys, ids, mask, kept, held + room, n)
        return lax.fori_loop(number * per_phase, (number + 1) * per_phase, step, (keys, ids, visited))

    state = lax.fori_loop(0, per_phase, step, (*pool, visited))
    if phases > 1:
        state = lax.fori_loop(1, phases, phase, state)
    keys, ids, _ = state
    found = _nearest(_allowed(keys & ~VISITED, ids, mask), ids, min(compared, keys.shape[1]), n)
    return _compare(graph, queries, found, k)


def _minima(keys, ids, stripes, n):
    """The least key of every stripe, places s, s + stripes, s + 2 stripes ..., and its id, the lowest among equals."""
    shape = (keys.shape[0], -1, stripes)
    least = jnp.min(keys.reshape(shape), axis=1)
    return least, jnp.min(jnp.where(keys.reshape(shape) == least[:, None], ids.reshape(shape), n), axis=1)


def _picks(keys, ids, n):
    """WIDTH different rows to visit, n where there is none left."""
    keys, ids = _minima(keys, ids, STRIPES, n)
    picks = []
    for _ in range(WIDTH):
        least = jnp.min(keys, axis=1, keepdims=True)
        pick = jnp.min(jnp.where((keys == least) & (keys < VISITED), ids, n), axis=1, keepdims=True)
        keys = jnp.where(ids == pick, NONE, keys)
        picks.append(pick)
    return jnp.concatenate(picks, axis=1)


def _widened(keys, ids, size, n):
    more = ((0, 0), (0, size - keys.shape[1]))
    return jnp.pad(keys, more, constant_values=NONE), jnp.pad(ids, more, constant_values=n)


def _allowed(keys, ids, mask):
    """Keys of rows that may be found; NONE for the others."""
    if mask is None:
        return keys
    passes = rows_of(mask, ids) if mask.ndim == 1 else jnp.take_along_axis(mask, ids, axis=1, mode="clip")
    return jnp.where(passes, keys, NONE)


def _nearest(keys, ids, count, n):
    """Ids of the nearest `count` different rows, n where there are fewer."""

    def take(i, state):
        keys, found = state
        least = jnp.min(keys, axis=1, keepdims=True)
        nearest = jnp.min(jnp.where((keys == least) & (keys < NONE), ids, n), axis=1, keepdims=True)
        return jnp.where(ids == nearest, NONE, keys), lax.dynamic_update_slice(found, nearest, (0, i))

    return lax.fori_loop(0, count, take, (keys, jnp.full((keys.shape[0], count), n, jnp.int32)))[1]


def _cut(keys, ids, mask, kept, size, n):
    """The nearest rows of the pool, once each, and where there is a mask the nearest that pass it."""
    ids, keys = lax.sort((ids, keys), dimension=1, num_keys=2)
    # Copies have equal keys but where one came later than the visit: it is NONE already, and sorted behind.
    keys = jnp.where((ids == jnp.roll(ids, 1, axis=1)) & (jnp.arange(ids.shape[1]) > 0)[None], NONE, keys)
    parts = [_least(keys & ~VISITED, keys, ids, kept[0])]
    if mask is not None:
        # Copies of what is kept already; the final choice takes a row once.
        parts.append(_least(_allowed(keys & ~VISITED, ids, mask), keys, ids, kept[1]))
    keys, ids = (jnp.concatenate(arrays, axis=1) for arrays in zip(*parts, strict=True))
    return _widened(keys, ids, size, n)


def _least(order, keys, ids, count):
    numbers = lax.bitcast_convert_type(order + NORMAL, jnp.float32)
    places = lax.top_k(-numbers, min(count, keys.shape[1]))[1]
    keys, ids = (jnp.take_along_axis(array, places, axis=1, mode="clip") for array in (keys, ids))
    # Places beyond the rows that there are.
    return jnp.where(jnp.take_along_axis(order, places, axis=1, mode="clip") < NONE, keys, NONE), ids


def _compare(graph, queries, ids, k):
    """The k nearest of the rows `ids` by exact distances, ascending, ties by the lower id."""
    n = graph.neighbours.shape[0]
    rows = rows_of(graph.base, ids.reshape(-1))
    if graph.metric == "cosine":
        rows = unit_rows(rows)
    distances = pair_distances(graph.metric, queries[:, None, :], rows.reshape(*ids.shape, -1))
    distances = jnp.where(ids < n, distances, jnp.inf)
    distances, ids = lax.sort((distances, ids), dimension=1, num_keys=2)
    missing = ((0, 0), (0, max(0, k - ids.shape[1])))
    distances = jnp.pad(distances[:, :k], missing, constant_values=jnp.inf)
    ids = jnp.pad(ids[:, :k], missing, constant_values=n)
    return distances, jnp.where(ids < n, ids, -1)
