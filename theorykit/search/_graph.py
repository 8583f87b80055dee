"""Search graphs as pytrees: of one device, and of a mesh."""

from dataclasses import dataclass, field
from typing import Any

import jax
from jax.sharding import Mesh

from theorykit.search._inputs import Metric

# Arrays; shapes and specifications of sharding where JAX maps a tree of such.
Leaf = Any


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Graph:
    """Rows with a search graph, made by `build_graph` and `extend`; a pytree, of which the metric is no leaf."""

    base: Leaf  # float32 (n, d): as given: what distances are computed from
    neighbours: Leaf  # int32 (n, degree): edges; n where a row has fewer
    entries: Leaf  # int32 (e,): where searches begin
    table: Leaf  # float32 (d, e): codes of the entry points, side by side where every query is compared with all
    codes: Leaf  # (n, d): what searches compare; see theorykit.search._transform for this and the next four
    half_norms: Leaf  # float32 (n,)
    centre: Leaf  # float32 (d,)
    steps: Leaf  # float32 (d,)
    finest: Leaf  # float32
    unreachable: Leaf  # int32: rows that no path led to before the build repaired it
    metric: Metric = field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ShardedGraph:
    """A graph of its own for each of several runs of rows, made by `build_graph` with a mesh; for `query_graph`.

    Runs are equally long. The last ones are filled up by rows that no edge leads to, and may hold nothing else.
    """

    parts: Graph  # leaves with the runs as another first axis, which is divided over that of the mesh
    n: int = field(metadata={"static": True})
    mesh: Mesh = field(metadata={"static": True})
