"""Training over a mesh of eight devices: a process of its own, since jax fixes the number of devices at its start."""

import json
import os
import subprocess
import sys
import tempfile

import jax
import numpy as np
import pytest
from jax.sharding import Mesh
from test_training import SGD, regression, squared_error

from theorykit.training import train

PROGRAM = """
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, PartitionSpec

from theorykit import training
from theorykit._training_step import advance

compiled = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, *_, **__: compiled.append(event) if "backend_compile" in event else None
)
generator = np.random.default_rng(0)
data = {name: jnp.asarray(generator.normal(size=(48, 3)), jnp.float32) for name in ("x", "y")}
params = {"w": jnp.asarray(generator.normal(size=(3, 3)), jnp.float32), "scale": jnp.ones((), jnp.float32)}


def embed(params, batch):
    return jnp.tanh(jnp.dot(batch["x"], params["w"])) * params["scale"]


def loss(params, batch):
    scores = jnp.dot(embed(params, batch), batch["y"].T)  # every row of the batch meets every other
    return -jnp.mean(jnp.diagonal(jax.nn.log_softmax(scores, axis=-1)))


def with_queue(params, batch, keys, queue):
    scores = jnp.concatenate([jnp.sum(batch["y"] * keys, axis=-1)[:, None], jnp.dot(batch["y"], queue.T)], axis=1)
    return loss(params, batch) - jnp.mean(jax.nn.log_softmax(scores, axis=-1)[:, 0])


def jitter(key, batch):
    return batch | {"x": batch["x"] + 0.1 * jax.random.normal(key, batch["x"].shape)}


adam = optax.adam(0.01)
drawn = {"batch_size": 16, "key": jax.random.key(1), "augment": jitter}
moment = training.MomentumEncoder(0.9, 24, embed)
settings = {
    "full batch": (loss, {}),
    "batches": (loss, drawn),
    "everything": (with_queue, drawn | {"momentum_encoder": moment}),
}
meshes = {
    "Auto": Mesh(jax.devices(), "rows"),
    "Explicit": jax.make_mesh((8,), ("rows",), axis_types=(AxisType.Explicit,)),
    "some devices": Mesh(jax.devices()[1:5], "rows"),
}
found = {"errors": {}, "devices": {}}


def train(setting, mesh=None, steps=20, **more):
    function, options = settings[setting]
    metrics = {"metrics": norm, "metric_steps": [0, 7]}
    return training.train(
        function, params, data, optimizer=adam, steps=steps, mesh=mesh, progress=False, **options, **metrics, **more
    )


def norm(params):
    return optax.tree.norm(params)


def difference(a, b):
    values = jax.tree.map(lambda p, q: float(np.max(np.abs(np.asarray(p) - np.asarray(q)))), a, b)
    return max(jax.tree.leaves(values))


for setting in settings:
    alone = train(setting)
    for kind, mesh in meshes.items():
        run = train(setting, mesh)
        found["errors"][f"{setting}, {kind}"] = difference(run[:3], alone[:3])
        devices = {len(leaf.sharding.device_set) for leaf in jax.tree.leaves(run.params)}
        found["devices"][f"{setting}, {kind}"] = sorted(devices)

before = len(compiled)
train("batches", meshes["Auto"], steps=31)
found["compiled again"] = len(compiled) - before

whole = train("everything", meshes["Auto"])
train("everything", meshes["Auto"], steps=9, checkpoint=sys.argv[1], checkpoint_every=4)
rest = train("everything", meshes["Auto"], checkpoint=sys.argv[1], checkpoint_every=4)
found["resumed"] = difference(rest[:3], whole[:3])

program = training.Program(loss, adam, 16, None, None, meshes["Auto"])
placed = training._placed(program, params, data, jax.random.key(1))
state = training.start(program, *placed)
text = advance.lower(program, state, *placed[1:], 9).compile().as_text()
found["rows of a device"] = "f32[2,3]" in text
found["sums over devices"] = "all-reduce" in text

for rows, setting in ((12, {"batch_size": 12, "key": jax.random.key(1)}), (44, {})):
    some = jax.tree.map(lambda a: a[:44], data)
    try:
        training.train(loss, params, some, optimizer=adam, steps=1, mesh=meshes["Auto"], **setting)
    except ValueError as error:
        found[f"{rows} rows"] = str(error)
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found():
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", PROGRAM, folder]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_training_on_a_mesh_is_training_on_one_device(found):
    assert len(found["errors"]) == 9
    # Losses of order 1 by sums of at most 48 terms; Adam moves by 0.01 a step, in 20 steps, and what rounding changes
    # in a gradient of order 0.1 is a part of 48 eps / 0.1 of that.
    rounding = 48 * float(np.finfo(np.float32).eps)
    assert max(found["errors"].values()) < rounding + 20 * 0.01 * rounding / 0.1, found["errors"]


@pytest.mark.slow
def test_the_result_is_on_every_device_of_the_mesh(found):
    for name, devices in found["devices"].items():
        assert devices == [4 if "some devices" in name else 8]


@pytest.mark.slow
def test_a_device_computes_with_its_own_rows_and_sums_gradients(found):
    assert found["rows of a device"] and found["sums over devices"]


@pytest.mark.slow
def test_a_mesh_neither_compiles_anew_for_other_lengths_nor_loses_a_checkpoint(found):
    assert found["compiled again"] == 0
    assert found["resumed"] == 0.0


@pytest.mark.slow
@pytest.mark.parametrize("rows", [12, 44])
def test_rows_that_the_devices_do_not_divide_are_named(found, rows):
    message = (
        f"batch['x'] has {rows} rows, which the 8 devices of the mesh do not divide. Make the rows a multiple of 8"
    )
    assert message in found[f"{rows} rows"]


def test_a_mesh_of_two_axes_is_refused():
    mesh = Mesh(np.asarray(jax.devices()[:1]).reshape(1, 1), ("rows", "columns"))
    with pytest.raises(ValueError, match=r"mesh of one axis and this one has \('rows', 'columns'\). Reshape it"):
        train(squared_error, *regression(), optimizer=SGD, steps=1, mesh=mesh)


def test_a_mesh_of_one_device_changes_nothing():
    alone, meshed = (
        train(squared_error, *regression(), optimizer=SGD, steps=5, mesh=mesh)
        for mesh in (None, Mesh(jax.devices()[:1], "rows"))
    )
    np.testing.assert_array_equal(alone.losses, meshed.losses)
