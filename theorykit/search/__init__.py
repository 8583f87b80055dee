"""Nearest-neighbour search over embeddings: exact, and by a graph; on one device or a mesh.

For queries q and base rows x the k nearest rows minimise one of the distances

    l2: |q - x|^2,    ip: -<q, x>,    cosine: 1 - <q, x> / (|q| |x|)  (1 if q or x is zero),

and every search returns ``Neighbours(distances, ids)``: float32 distances in ascending order, int32 ids, ties by the
lower id, and -1 with an infinite distance where fewer than k rows exist or pass the mask.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submodules=["exact", "graph", "select", "shard", "store"],
    submod_attrs={
        "exact": ["knn", "knn_graph", "rerank"],
        "graph": ["Graph", "ShardedGraph", "build_graph", "extend", "query_graph"],
        "store": ["load", "save"],
    },
)
