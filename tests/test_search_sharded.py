"""Search over eight devices and over two processes: the exact answer is that of one device, bit for bit.

Graphs are another set for another number of devices; with a beam that holds all rows they find the exact answer.
"""

import json
import os
import socket
import subprocess
import sys

import pytest

COMMON = """
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
from jax import export
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from theorykit.search import build_graph, extend, knn, knn_graph, query_graph, save

generator = np.random.default_rng(0)
meshes = {
    "rows": jax.make_mesh((8,), ("rows",), axis_types=(AxisType.Explicit,)),
    "both": jax.make_mesh((4, 2), ("rows", "queries"), axis_types=(AxisType.Auto,) * 2),
    "some": Mesh(jax.devices()[2:5], "rows"),
}
kinds = {
    "normal": lambda n: generator.normal(size=(n, 5)).astype(np.float32),
    "integers": lambda n: generator.integers(-1, 2, size=(n, 5)).astype(np.float32),
    "copies": lambda n: (generator.integers(0, 2, size=(n, 5)) / 3).astype(np.float32),
}
found = {}


def optimised(yes):
    # Programs compile in half the time without optimisations, and only their values matter.
    jax.config.update("jax_disable_most_optimizations", not yes)


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


"""

EXACT = (
    COMMON
    + """
# Rows that eight devices do not divide; most of 9 devices' rows are padding.
for (name, mesh), kind, metric in itertools.product(meshes.items(), kinds, ("l2", "ip", "cosine")):
    n = {"l2": 2501, "ip": 700, "cosine": 9}[metric]
    # What is shipped is compiled with optimisations: once for every metric.
    optimised(name == "rows" and kind == "normal")
    base, queries = kinds[kind](n), kinds[kind](17)
    masks = {"no": None, "rows": generator.random(n) < 0.5, "each": generator.random((17, n)) < 0.5}
    mask = masks[{"normal": "no", "integers": "rows", "copies": "each"}[kind]]
    one = knn(base, queries, 4, metric=metric, mask=mask)
    found[f"{name}, {kind}, {metric}"] = same(one, knn(base, queries, 4, metric=metric, mask=mask, mesh=mesh))
print(json.dumps({"found": found}))
"""
)

OTHERS = (
    COMMON
    + """
optimised(False)
base, queries = kinds["integers"](700), kinds["integers"](16)
for name, mesh in meshes.items():
    found[f"{name}, graph"] = same(knn_graph(base, 4), knn_graph(base, 4, mesh=mesh))
    found[f"{name}, k beyond n"] = same(knn(base[:3], queries, 9), knn(base[:3], queries, 9, mesh=mesh))
    found[f"{name}, jit"] = same(knn(base, queries, 4), jax.jit(lambda x, q: knn(x, q, 4, mesh=mesh))(base, queries))
    found[f"{name}, nothing"] = knn(base[:0], queries, 4, mesh=mesh).ids.shape == (16, 4)
mesh = meshes["rows"]
spread = jax.device_put(kinds["normal"](4096), NamedSharding(mesh, PartitionSpec("rows")))
expected = knn(np.asarray(spread), queries, 4)
found["rows already on all devices"] = same(expected, knn(spread, queries, 4, mesh=mesh))
uneven = base[:699]
found["rows that do not divide, from JAX"] = same(
    knn(uneven, queries, 4), knn(jnp.asarray(uneven), queries, 4, mesh=mesh)
)
found["rows on another device"] = same(
    expected, knn(jax.device_put(np.asarray(spread), jax.devices()[3]), queries, 4, mesh=mesh)
)
key = jax.random.key(0)
graphs = {
    # Rows that the devices do not divide, and fewer rows than devices.
    ("rows", "l2"): kinds["normal"](301),
    ("both", "cosine"): kinds["copies"](301),
    ("rows", "ip"): kinds["normal"](3),
}
for (name, metric), base in graphs.items():
    n, title = len(base), f"graph of {len(base)}, {name}, {metric}"
    graph = build_graph(base, metric=metric, degree=8, key=key, mesh=meshes[name])
    masks = {"no": None, "few": generator.random(n) < 0.1, "each": generator.random((16, n)) < 0.5}
    masks["each"][:4] &= generator.random((4, n)) < 0.1
    for kind, mask in masks.items() if name == "both" else [("no", None)]:
        one = knn(base, queries, 4, metric=metric, mask=mask)
        found[f"{title}, {kind} mask"] = same(one, query_graph(graph, queries, 4, beam=n, mask=mask))
    some = query_graph(graph, queries, 4)
    found[f"{title}, batches"] = same([a[3:5] for a in some], query_graph(graph, queries[3:5], 4))
    found[f"{title}, jit"] = same(some, jax.jit(lambda g, q: query_graph(g, q, 4))(graph, queries))
graph = build_graph(base[:0], key=key, mesh=mesh)
found["graph of nothing"] = bool((query_graph(graph, queries, 4).ids == -1).all())
errors = [
    lambda: knn(base, queries, 4, mesh=jax.make_mesh((2, 2, 2), ("a", "b", "c"))),
    lambda: extend(graph, base, key=key),
    lambda: save("none", graph),
]
messages = []
for call in errors:
    try:
        call()
    except (ValueError, TypeError) as error:
        messages.append(str(error))
optimised(True)
base = kinds["integers"](700)
seen = {}
call = lambda x, q: knn(x, q, 4, mesh=mesh)
text = jax.jit(call).lower(spread, queries).compile().as_text()
seen["collectives"] = [w for w in ("all-gather", "all-reduce", "collective-permute", "all-to-all") if f" {w}(" in text]
seen["gathered"] = "f32[16,32]" in text
for platform in ("tpu", "cuda"):
    exported = export.export(jax.jit(call), platforms=[platform])(np.asarray(spread), queries)
    seen[platform] = [exported.nr_devices, str(exported.out_avals[0].shape)]
print(json.dumps({"found": found, "messages": messages, "seen": seen}))
"""
)

PROCESSES = """
import sys

import jax
import numpy as np

address, process = sys.argv[1], int(sys.argv[2])
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.config.update("jax_disable_most_optimizations", True)
jax.distributed.initialize(address, 2, process)
from theorykit.search import build_graph, knn, knn_graph, query_graph

assert jax.process_count() == 2 and len(jax.devices()) == 4
generator = np.random.default_rng(0)
base = generator.integers(-1, 2, size=(701, 5)).astype(np.float32)
queries = generator.normal(size=(17, 5)).astype(np.float32)
for mesh in (jax.make_mesh((4,), ("rows",)), jax.make_mesh((2, 2), ("rows", "queries"))):
    for one, all_ in (
        (knn(base, queries, 4), knn(base, queries, 4, mesh=mesh)),
        (knn_graph(base, 4), knn_graph(base, 4, mesh=mesh)),
    ):
        for a, b in zip(one, all_, strict=True):
            np.testing.assert_array_equal(a, b)
mesh = jax.make_mesh((2, 2), ("rows", "queries"))
graph = build_graph(base[:95], degree=8, key=jax.random.key(0), mesh=mesh)
for mask in (None, np.arange(95) % 20 == 0):
    answer = query_graph(graph, queries, 4, beam=95, mask=mask)
    for a, b in zip(knn(base[:95], queries, 4, mask=mask), answer, strict=True):
        np.testing.assert_array_equal(a, b)
rows = jax.sharding.NamedSharding(jax.make_mesh((4,), ("rows",)), jax.sharding.PartitionSpec("rows"))
spread = jax.make_array_from_callback((700, 5), rows, lambda index: base[:700][index])
for a, b in zip(knn(base[:700], queries, 4), knn(spread, queries, 4, mesh=rows.mesh), strict=True):
    np.testing.assert_array_equal(a, b)
print("the same answer")
"""


def environment(devices):
    return os.environ | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "JAX_PLATFORMS": "cpu",
    }


def begin(devices, program, *arguments):
    return subprocess.Popen(
        [sys.executable, "-c", program, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(devices),
    )


@pytest.fixture(scope="module")
def running():
    """Two programs of eight devices, and two processes of one, side by side: each compiles on one core at a time."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    begun = [begin(8, program) for program in (EXACT, OTHERS)]
    begun += [begin(2, PROCESSES, address, str(process)) for process in range(2)]
    yield begun
    for process in begun:
        process.kill()


@pytest.fixture(scope="module")
def report(running):
    merged = {"found": {}}
    for process in running[:2]:
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err[-3000:]
        part = json.loads(out.splitlines()[-1])
        merged = {**merged, **part, "found": {**merged["found"], **part["found"]}}
    return merged


@pytest.mark.slow
def test_eight_devices_give_the_answer_of_one_bit_for_bit(report):
    found = report["found"]
    assert len(found) == 54
    assert all(found.values()), [name for name, fine in found.items() if not fine]


@pytest.mark.slow
def test_devices_exchange_only_their_lists(report):
    assert report["seen"]["collectives"] == ["all-gather"]
    assert report["seen"]["gathered"]


@pytest.mark.slow
@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_the_sharded_search_is_lowered_for_eight_devices(report, platform):
    assert report["seen"][platform] == [8, "(16, 4)"]


@pytest.mark.slow
def test_what_cannot_be_divided_extended_or_saved_is_refused(report):
    axes, extending, saving = report["messages"]
    assert axes == (
        "knn: the mesh has axes ('a', 'b', 'c'); give one, over which rows are divided, or a second for queries"
    )
    assert extending == "extend: graph is a ShardedGraph; build one of all rows, build_graph(rows, mesh=mesh)"
    assert saving == "save: got a ShardedGraph; save takes the Graph that build_graph returns without a mesh"


@pytest.mark.slow
def test_two_processes_give_the_answer_of_one(running):
    outputs = [process.communicate(timeout=300) for process in running[2:]]
    for process, (out, err) in zip(running[2:], outputs, strict=True):
        assert process.returncode == 0, err[-3000:]
        assert out.splitlines()[-1] == "the same answer"
