"""The kernel over a mesh of eight devices: a process of its own, since jax fixes the number of devices at its start."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

PROGRAM = """
import json

import jax
import jax.numpy as jnp
import numpy as np
from jax import export
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from theorykit.encoders import MLP
from theorykit.ntk import empirical, empirical_ntk, two_view

encoder = MLP(32, 2, depth=3, use_bias=True)
generator = np.random.default_rng(0)
x, other = (jnp.asarray(generator.normal(size=(n, 6)), jnp.float32) for n in (19, 5))
params = encoder.init(jax.random.key(1), x)
meshes = {kind: jax.make_mesh((8,), ("rows",), axis_types=(getattr(AxisType, kind),)) for kind in ("Auto", "Explicit")}
meshes["some devices"] = Mesh(jax.devices()[2:5], "rows")
found = {}


def error(kernel, expected):
    kernel, expected = np.asarray(kernel), np.asarray(expected)
    assert kernel.shape == expected.shape
    return float(np.linalg.norm(kernel - expected) / np.linalg.norm(expected))


def note(name, kernel, expected):
    rows = sorted(shard.data.shape[0] for shard in kernel.addressable_shards)
    found[name] = [error(kernel, expected), len(kernel.sharding.device_set), rows[0], rows[-1]]


for n in (1, 3, 16, 19):
    for memory in (2**30, 3000):
        expected = empirical_ntk(encoder.apply, params, x[:n], memory=memory)
        for kind, mesh in meshes.items():
            kernel = empirical_ntk(encoder.apply, params, x[:n], memory=memory, mesh=mesh)
            note(f"{kind}, {n} rows, memory {memory}", kernel, expected)

mesh = meshes["Explicit"]
expected = empirical_ntk(encoder.apply, params, x[:16], other)
for method in empirical.METHODS:
    kernel = empirical_ntk(encoder.apply, params, x[:16], other, method=method, mesh=mesh)
    note(f"{method}, other columns", kernel, expected)
there = jax.device_put(params, jax.devices()[3])
note("parameters on one device", empirical_ntk(encoder.apply, there, x[:16], other, mesh=mesh), expected)
spread = jax.device_put(x[:16], NamedSharding(mesh, PartitionSpec("rows")))
note("points on all devices", empirical_ntk(encoder.apply, params, spread, other, mesh=mesh), expected)
note("jit", jax.jit(lambda p, x: empirical_ntk(encoder.apply, p, x, other, mesh=mesh))(params, x[:16]), expected)
views = two_view(encoder.apply, params, x[:8], x[8:16], mesh=mesh)
for name, view, alone in zip(("aa", "ab", "bb"), views, two_view(encoder.apply, params, x[:8], x[8:16]), strict=True):
    found[name] = [error(view, alone), 0, 0, 0]

# The program of one device: what it holds, from the compiler's own account.
whole = jax.eval_shape(lambda p: empirical_ntk(encoder.apply, p, x[:16]), params)
rows = jax.device_put(x[:16], NamedSharding(Mesh(jax.devices(), "rows"), PartitionSpec("rows")))
parts = empirical._parts(encoder.apply, params, x[:16], x[:16], "structured", 2**30, 2)
lowered = empirical._sharded_kernel.lower(encoder.apply, params, rows, x[:16], parts, Mesh(jax.devices(), "rows"), 16)
compiled = lowered.compile()
text = compiled.as_text()
found["program"] = {
    "whole": whole.size * 4,
    "output": compiled.memory_analysis().output_size_in_bytes,
    "collectives": [word for word in ("all-gather", "all-reduce", "collective-permute", "all-to-all") if word in text],
}


def sharded(params, x):
    return empirical_ntk(encoder.apply, params, x, mesh=mesh)


for platform in ("tpu", "cuda"):
    exported = export.export(jax.jit(sharded), platforms=[platform])(params, x[:16])
    found[platform] = [exported.nr_devices, str(exported.out_avals[0].shape)]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found():
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


# A row alone goes through other routines than several together: a chain of 6 products of up to 32 terms, in float32.
ROUNDING = 6 * 32**0.5 * float(np.finfo(np.float32).eps)


@pytest.mark.slow
def test_the_kernel_of_a_mesh_is_that_of_one_device(found):
    errors = {name: value[0] for name, value in found.items() if name not in ("program", "tpu", "cuda")}
    assert len(errors) == 33
    assert max(errors.values()) < ROUNDING, errors


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
@pytest.mark.parametrize("memory", [2**30, 3000])
def test_every_device_holds_only_its_rows(found, kind, memory):
    _, devices, fewest, most = found[f"{kind}, 16 rows, memory {memory}"]
    assert (devices, fewest, most) == (8, 2, 2)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "devices"), [("Auto", 8), ("Explicit", 8), ("some devices", 3)])
def test_rows_that_the_devices_do_not_divide_are_held_by_all(found, kind, devices):
    assert found[f"{kind}, 19 rows, memory 3000"][1:] == [devices, 19, 19]


@pytest.mark.slow
def test_the_compiled_program_computes_an_eighth_and_exchanges_nothing(found):
    program = found["program"]
    assert program["output"] == program["whole"] / 8
    assert program["collectives"] == []


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_the_sharded_kernel_is_lowered_for_eight_devices(found, platform):
    assert found[platform] == [8, "(16, 16, 2, 2)"]
