"""Search over a mesh of devices: each searches its rows, and the shortest of the lists are kept.

Device i of the first axis holds the i-th run of rows, so that lists stand in the order of ids when they are gathered,
and ties keep going to the lower one. Distances are those of `pair_distances`, which are the same in every program; the
answer of exact search is therefore that of one device, bit for bit. With a second axis the queries are divided as well.
A search graph is one for each run of rows, and every query is searched in all of them.

Several processes (`jax.distributed`) call the same function with the same NumPy arrays; every process places its part.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Key

from theorykit.search import _beam, _inputs, exact
from theorykit.search._graph import Graph, ShardedGraph
from theorykit.search._inputs import Metric, Neighbours
from theorykit.search._scan import search as search_here
from theorykit.search.graph import sizes
from theorykit.search.select import smallest


def search(
    where: str, rows: Any, queries: Any, k: int, metric: Metric, mask: Any, mesh: Mesh, memory: int, *, own: bool
) -> Neighbours:
    """`exact.knn` (or with `own` `exact.knn_graph`) of checked rows and queries, neither of them empty.

    Parameters
    ----------
    where
        Name of the calling function, for messages.
    rows, queries
        float32 (n, d) and (q, d). Arrays that already lie on several devices have a number of rows that the axis
        divides, or belong to this process as a whole.
    k, metric, mask, memory
        As for `exact.knn`.
    mesh
        One axis, over which the rows are divided, or two, the second for the queries.
    own
        Whether query i is row i, and no neighbour of its own.

    Returns
    -------
    Neighbours
        (q, k), whole on every device of the mesh.

    Raises
    ------
    ValueError
        If the mesh has another number of axes, or rows on devices of several processes cannot be divided.
    """
    mesh, row, column, parts, columns = _axes(where, mesh)
    (n, _), q = rows.shape, queries.shape[0]
    each = mask is not None and mask.ndim == 2
    here, there, sizes = exact.plan(-(-n // parts), -(-q // columns), rows.shape[1], k, memory, masked=each)
    # What a device holds; a run that is not padded yet is padded where it lies.
    here = _held(where, "base", rows, parts, here)
    there = _held(where, "queries", queries, columns, there)
    place = partial(_place, mesh)
    distances, ids = _program(
        place(rows, (row, None), parts * here),
        place(queries, (column, None), columns * there),
        place(np.array([n, q], np.int32), (None,)),
        place(mask, (row,), parts * here) if mask is not None and not each else None,
        place(mask, (column, row), columns * there, parts * here) if each else None,
        place(np.arange(columns * there, dtype=np.int32), (column,)) if own else None,
        mesh=mesh,
        k=k,
        metric=metric,
        plan=sizes,
    )
    return exact.finish(distances, ids, q, k)


def _axes(where, mesh):
    """The mesh, the names of its axes and their lengths, for rows and queries; None and 1 without a second one."""
    if len(mesh.axis_names) not in (1, 2):
        raise ValueError(
            f"{where}: the mesh has axes {mesh.axis_names}; "
            "give one, over which rows are divided, or a second for queries"
        )
    # With explicit axes, which jax.make_mesh gives, shardings would be a part of the types here and of the result's.
    mesh = Mesh(mesh.devices, mesh.axis_names)
    row, column = (*mesh.axis_names, None)[:2]
    return mesh, row, column, mesh.shape[row], mesh.shape[column] if column else 1


@partial(jax.jit, static_argnames=("mesh", "k", "metric", "plan"))
def _program(rows, queries, counts, allowed, each, own, *, mesh, k, metric, plan):
    row, column = (*mesh.axis_names, None)[:2]
    size, width = rows.shape[0] // mesh.shape[row], queries.shape[0] // (mesh.shape[column] if column else 1)

    def on_device(rows, queries, counts, allowed, each, own):
        first = lax.axis_index(row) * size
        before = lax.axis_index(column) * width if column else 0
        here = jnp.stack([jnp.clip(counts[0] - first, 0, size), jnp.clip(counts[1] - before, 0, width)])
        # Rows up to a whole number of tiles, queries up to one of chunks.
        n, q = -(-size // plan.tile) * plan.tile, -(-width // plan.chunk) * plan.chunk
        rows, queries, own = exact.padded(rows, n), exact.padded(queries, q), _if(own, lambda own: own - first)
        allowed, each = (
            _if(allowed, lambda mask: exact.padded(mask, n)),
            _if(each, lambda mask: exact.padded(mask, q, n)),
        )
        own = _if(own, lambda own: exact.padded(own, q))
        distances, ids = search_here(rows, queries, here, allowed, each, own, k=min(k, n), metric=metric, plan=plan)
        return _merged(row, distances[:width], ids[:width], first, k)

    return _everywhere(on_device, mesh, rows, queries, counts, allowed, each, own)


def _everywhere(on_device, mesh, base, queries, count, allowed, each, *of_queries):
    """What all devices find together, given to all; base and `allowed` are divided by rows, the others by queries."""
    row, column = (*mesh.axis_names, None)[:2]
    rows, some, both = PartitionSpec(row), PartitionSpec(column), PartitionSpec(column, row)
    specs = (rows, some, PartitionSpec(), rows, both, *(some for _ in of_queries))
    divided = jax.shard_map(on_device, mesh=mesh, in_specs=specs, out_specs=some, check_vma=False)
    answer = divided(base, queries, count, allowed, each, *of_queries)
    return lax.with_sharding_constraint(answer, NamedSharding(mesh, PartitionSpec()))


def _merged(row, distances, ids, first, k):
    """The k nearest of what the devices found, whose rows begin at `first`."""
    ids = jnp.where(ids >= 0, ids + first, -1)
    distances, ids = (lax.all_gather(a, row, axis=1, tiled=True) for a in (distances, ids))
    distances, which = smallest(distances, min(k, distances.shape[1]))
    return distances, jnp.take_along_axis(ids, which, axis=1)


def build(rows: Any, mesh: Mesh, key: Key[Array, ""], part: Callable[..., Graph]) -> ShardedGraph:
    """`graph.build_graph` over a mesh; part(rows, key=key) builds the graph of a run of rows.

    Parameters
    ----------
    rows
        Checked rows (n, d) in float32, the same in every process.
    mesh
        As for `search`.
    key
        For all runs.
    part
        What builds one.

    Returns
    -------
    ShardedGraph
        Of the graphs of all runs; a process builds those of its devices.

    Raises
    ------
    ValueError
        If the mesh has another number of axes.
    """
    mesh, row, _, count, _ = _axes("build_graph", mesh)
    n = rows.shape[0]
    size = max(1, -(-n // count))
    devices = mesh.devices.reshape(count, -1)
    here = [i for i in range(count) if any(one.process_index == jax.process_index() for one in devices[i])]
    built = {
        i: jax.tree.map(np.asarray, part(rows[i * size : (i + 1) * size], key=jax.random.fold_in(key, i))) for i in here
    }
    most = max(1, *(graph.entries.shape[0] for graph in built.values()))
    if jax.process_count() > 1:
        most = int(np.max(multihost_utils.process_allgather(np.int32(most))))
    built = {i: _filled(graph, size, most) for i, graph in built.items()}

    def divided(*leaves):
        shape = (count, *leaves[0].shape)
        sharding = NamedSharding(mesh, PartitionSpec(row))
        of = dict(zip(built, leaves, strict=True))
        return jax.make_array_from_callback(shape, sharding, lambda index: of[index[0].start or 0][None])

    return ShardedGraph(jax.tree.map(divided, *built.values()), n, mesh)


def _filled(graph, size, most):
    """A graph of `size` rows, of which no edge leads to the further ones, and `most` entry points."""
    n, e = graph.base.shape[0], graph.entries.shape[0]

    def more(array, count, value=0, axis=0):
        return np.pad(
            array, [(0, count if i == axis else 0) for i in range(array.ndim)], constant_values=array.dtype.type(value)
        )

    return Graph(
        base=more(graph.base, size - n),
        neighbours=more(np.where(graph.neighbours < n, graph.neighbours, np.int32(size)), size - n, size),
        entries=more(graph.entries, most - e, size),
        table=more(graph.table, most - e, axis=1),
        codes=more(graph.codes, size - n),
        half_norms=more(graph.half_norms, size - n),
        centre=graph.centre,
        steps=graph.steps,
        finest=graph.finest,
        unreachable=graph.unreachable,
        metric=graph.metric,
    )


def search_graph(graph: ShardedGraph, queries: Any, mask: Any, *, k: int, beam: int) -> Neighbours:
    """`graph.query_graph` of checked arguments, which are not empty: in all parts, and the nearest of all."""
    mesh, row, column, parts, columns = _axes("query_graph", graph.mesh)
    size, q = graph.parts.base.shape[1], queries.shape[0]
    chunk, width = sizes(-(-q // columns), graph.parts.codes.dtype)
    each = mask is not None and mask.ndim == 2
    place = partial(_place, mesh)
    distances, ids = _graph_program(
        graph.parts,
        place(queries, (column, None), columns * width),
        place(np.array([q], np.int32), (None,)),
        place(mask, (row,), parts * size) if mask is not None and not each else None,
        place(mask, (column, row), columns * width, parts * size) if each else None,
        mesh=mesh,
        k=k,
        beam=min(beam, size),
        chunk=chunk,
    )
    return exact.finish(distances, ids, q, k)


@partial(jax.jit, static_argnames=("mesh", "k", "beam", "chunk"))
def _graph_program(graph, queries, count, allowed, each, *, mesh, k, beam, chunk):
    row, column = (*mesh.axis_names, None)[:2]
    size, width = graph.base.shape[1], queries.shape[0] // (mesh.shape[column] if column else 1)

    def on_device(graph, queries, count, allowed, each):
        first = lax.axis_index(row) * size
        here = jnp.clip(count[0] - (lax.axis_index(column) * width if column else 0), 0, width)
        own = jax.tree.map(lambda leaf: leaf[0], graph)
        found = _beam.search(own, queries, here, k, beam, each if allowed is None else allowed, chunk)
        return _merged(row, *found, first, k)

    return _everywhere(on_device, mesh, graph, queries, count, allowed, each)


def compared(graph: ShardedGraph, queries: Any, mask: Any, *, k: int) -> Neighbours:
    """All rows that pass the mask compared exactly, by every device its own."""
    parts, size, d = graph.parts.base.shape
    # Rows that fill up the last runs pass no mask.
    mask = np.pad(mask, [(0, 0)] * (mask.ndim - 1) + [(0, parts * size - graph.n)])
    rows = graph.parts.base.reshape(parts * size, d)
    return exact.knn(rows, queries, k, metric=graph.parts.metric, mask=mask, mesh=graph.mesh)


def _if(array, function):
    return None if array is None else function(array)


def _held(where, name, array, parts, planned):
    """Rows of one device: as planned, or what the array, which lies on devices, divides into."""
    if _inputs.on_host(array):
        return planned
    if array.shape[0] % parts == 0:
        return array.shape[0] // parts
    if _inputs.is_concrete(array) and not array.is_fully_addressable:
        raise ValueError(
            f"{where}: {name} has {array.shape[0]} rows on devices of several processes, which {parts} do not divide; "
            "pad the rows and leave the padding out by a mask"
        )
    return planned


def _place(mesh, array, axes, *shape):
    """The array, padded, with its axes divided over those of the mesh."""
    sharding = NamedSharding(mesh, PartitionSpec(*axes))
    array = exact.padded(array, *shape)
    if _inputs.on_host(array):
        # Every process makes its own part; device_put would compare the arrays of all processes.
        host = np.asarray(array)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])
    return jax.device_put(array, sharding)
