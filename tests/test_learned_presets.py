"""What the learned experiments do before long trainings, and after one that ended too early."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments import _hierarchy_clip as clip
from experiments import _task_members as members
from experiments import _training, learned_tasks
from theorykit import _checkpoint, _training_memory, results, training

ROOT = Path(__file__).parent.parent
SIZE = clip.Size(alphabet=3, depth=1, arity=2, width=4, blocks=1, heads=1, batch=8, warm_up=2)
MIB = 2**20
# A process of its own, since jax fixes the number of devices at its start. The accelerator's form of the sum over
# members is the one that meets several devices outside of tests.
ON_TWO_DEVICES = """
import json

import jax
import numpy as np

from experiments import _hierarchy_clip as clip
from experiments import _task_members as members
from experiments import learned_tasks

jax.default_backend = lambda: "gpu"
size = clip.Size(alphabet=3, depth=1, arity=2, width=4, blocks=1, heads=1, batch=8, warm_up=2)
config = learned_tasks.Config(size=size, variants=("standard",), levels=(0.1, 0.2), pair_steps=5, checkpoints=(0,))
meshes, kept = [], members._mesh
members._mesh = lambda count: meshes.append(kept(count)) or meshes[-1]
together = members.train_pairs(config, 0)
members._mesh = lambda count: None
alone = members.train_pairs(config, 0)
far = lambda a, b: float(np.max(np.abs(a - b)))
print(json.dumps({
    "devices": [mesh.size for mesh in meshes],
    "moved": far(alone["rows"], alone["along"][0]),
    "difference": far(alone["rows"], together["rows"]),
}))
"""


@pytest.fixture(autouse=True)
def as_users_run():
    """Experiments run under JAX's ordinary promotion rules, as `make figures` runs them."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture
def little_memory(monkeypatch):
    for module in (_training_memory, _training):
        monkeypatch.setattr(module, "free_bytes", lambda: 4 * MIB)
    monkeypatch.setattr(training, "train", lambda *_, **__: pytest.fail("training began"))


def train_pairs(steps=6, **options):
    keys = jax.random.split(jax.random.key(2), 2)
    hs = clip.hierarchies(SIZE, keys, [0.1, 0.3])
    return clip.train_clip(SIZE, hs, keys, head="softmax", steps=steps, progress=False, **options)


@pytest.mark.slow
def test_a_preset_that_does_not_fit_is_refused_before_any_training(little_memory):
    with pytest.raises(MemoryError, match=r"needs about .* GiB .*smaller\s+preset"):
        learned_tasks.run(learned_tasks.PRESETS["paper"])


@pytest.mark.slow
def test_pairs_that_do_not_fit_are_refused_before_any_training(little_memory, monkeypatch):
    monkeypatch.setattr(_training, "free_bytes", lambda: 1000)
    monkeypatch.setattr(clip, "LONG", 1)
    with pytest.raises(MemoryError, match="needs about"):
        train_pairs()


def test_trainings_side_by_side_share_the_memory_of_a_device(monkeypatch):
    monkeypatch.setattr(_training, "free_bytes", lambda: 10 * MIB)
    assert _training.room() == 5 * MIB
    monkeypatch.setattr(jax, "devices", lambda: [None, None])  # there one training takes them all
    assert _training.room() == 10 * MIB
    monkeypatch.setattr(_training, "free_bytes", lambda: None)
    assert _training.room() is None


def test_members_are_divided_over_as_many_devices_as_go(monkeypatch):
    for devices, count, expected in ((1, 12, None), (8, 12, 6), (4, 16, 4), (4, 15, 3), (2, 15, None)):
        monkeypatch.setattr(jax, "devices", lambda count=devices: list(range(count)))
        monkeypatch.setattr(jax, "make_mesh", lambda shape, names, devices: shape[0])
        assert members._mesh(count) == expected


@pytest.mark.slow
def test_members_trained_on_two_devices_are_those_trained_on_one():
    flags = "--xla_force_host_platform_device_count=2 --xla_backend_optimization_level=0"  # compiles in half the time
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", ON_TWO_DEVICES]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["devices"] == [2]
    # A member is computed by one device, by the same sums; only the compiler may order them otherwise. Rounding by some
    # eps of a gradient moves Adam's step by as much of the rate, and parameters of order 1 are rounded at each step.
    rounding = 64 * float(np.finfo(np.float32).eps)
    assert found["difference"] <= rounding and found["moved"] > 100 * rounding, found


@pytest.mark.slow
def test_a_long_training_goes_on_where_it_was_killed(tmp_path, monkeypatch):
    for module in (_training, clip):
        monkeypatch.setattr(module, "LONG", 1)
    monkeypatch.setattr(_training, "EVERY", 2)
    monkeypatch.setattr(results, "folder", lambda label: tmp_path / label)
    train = functools.partial(train_pairs, **_training.checkpoints("pairs-training", 12))
    save = _checkpoint.Checkpoints.save

    def save_and_die(store, step, *rest):
        save(store, step, *rest)
        if step == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(_checkpoint.Checkpoints, "save", save_and_die)
    with pytest.raises(KeyboardInterrupt):
        train()
    assert [folder.name for folder in Path(tmp_path / "pairs-training").iterdir()] == ["4"]
    monkeypatch.setattr(_checkpoint.Checkpoints, "save", save)
    jax.tree.map(np.testing.assert_array_equal, train().params, train_pairs().params)
    with pytest.raises(ValueError, match="head was softmax, now is cosine"):
        clip.train_clip(
            SIZE,
            clip.hierarchies(SIZE, jax.random.split(jax.random.key(2), 2), [0.1, 0.3]),
            jax.random.split(jax.random.key(2), 2),
            head="cosine",
            steps=6,
            **_training.checkpoints("pairs-training", 12),
        )


def test_short_trainings_keep_no_checkpoints():
    assert _training.checkpoints("short", _training.LONG - 1) == {}


def test_a_training_that_diverged_says_where_its_last_good_state_is():
    run = training.Run(None, np.zeros(7), None, None, 7, "diverged", None)
    with pytest.raises(RuntimeError, match=r"it diverged: update 8 .*the state after 7 is in here.*Lower the learning"):
        _training.finished(run, "it", "here")
    for at_once, folder in ((run._replace(steps=0), "here"), (run, None)):
        with pytest.raises(RuntimeError, match="nothing of it is kept"):
            _training.finished(at_once, "it", folder)
    assert _training.finished(run._replace(status="finished"), "it").steps == 7
