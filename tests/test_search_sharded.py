"""Exact search over eight devices and over two processes: the answer of one device, bit for bit."""

import json
import os
import socket
import subprocess
import sys

import pytest

DEVICES = """
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
from jax import export
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from theorykit.search import knn, knn_graph, rerank, shard

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


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


# Rows that eight devices do not divide; most of 9 devices' rows are padding.
for (name, mesh), kind, metric in itertools.product(meshes.items(), kinds, ("l2", "ip", "cosine")):
    n = {"l2": 2501, "ip": 700, "cosine": 9}[metric]
    base, queries = kinds[kind](n), kinds[kind](17)
    masks = {"no": None, "rows": generator.random(n) < 0.5, "each": generator.random((17, n)) < 0.5}
    mask = masks[{"normal": "no", "integers": "rows", "copies": "each"}[kind]]
    one = knn(base, queries, 4, metric=metric, mask=mask)
    found[f"{name}, {kind}, {metric}"] = same(one, knn(base, queries, 4, metric=metric, mask=mask, mesh=mesh))
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
try:
    knn(base, queries, 4, mesh=jax.make_mesh((2, 2, 2), ("a", "b", "c")))
except ValueError as error:
    found["message"] = str(error)
seen = {}
call = lambda x, q: knn(x, q, 4, mesh=mesh)
text = jax.jit(call).lower(spread, queries).compile().as_text()
seen["collectives"] = [w for w in ("all-gather", "all-reduce", "collective-permute", "all-to-all") if f" {w}(" in text]
seen["gathered"] = "f32[16,32]" in text
for platform in ("tpu", "cuda"):
    exported = export.export(jax.jit(call), platforms=[platform])(np.asarray(spread), queries)
    seen[platform] = [exported.nr_devices, str(exported.out_avals[0].shape)]
print(json.dumps({"found": found, "seen": seen}))
"""

PROCESSES = """
import sys

import jax
import numpy as np

address, process = sys.argv[1], int(sys.argv[2])
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(address, 2, process)
from theorykit.search import knn, knn_graph

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


@pytest.fixture(scope="module")
def report():
    done = subprocess.run([sys.executable, "-c", DEVICES], capture_output=True, text=True, env=environment(8))
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_eight_devices_give_the_answer_of_one_bit_for_bit(report):
    found = dict(report["found"])
    found.pop("message")
    assert len(found) == 42
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
def test_a_mesh_of_three_axes_is_refused(report):
    assert report["found"]["message"] == (
        "knn: the mesh has axes ('a', 'b', 'c'); give one, over which rows are divided, or a second for queries"
    )


@pytest.mark.slow
def test_two_processes_give_the_answer_of_one():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    running = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESSES, address, str(process)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(2),
        )
        for process in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=300) for process in running]
    finally:
        for process in running:
            process.kill()
    for process, (out, err) in zip(running, outputs, strict=True):
        assert process.returncode == 0, err[-3000:]
        assert out.splitlines()[-1] == "the same answer"
