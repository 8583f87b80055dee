"""Checkpoints: a resumed run is the uninterrupted one, bit for bit, and a foreign folder is refused."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_training import (
    ADAM,
    MOMENTUM,
    NOISY,
    SGD,
    assert_identical,
    contrast,
    norm,
    plain,
    regression,
    squared_error,
    stochastic,
)

from theorykit.training import train

# Checkpoints


@pytest.mark.parametrize("interrupted", [1, 6, 13])
def test_an_interrupted_run_resumes_bit_for_bit(tmp_path, interrupted):
    whole = stochastic(20)
    part = stochastic(interrupted, checkpoint=tmp_path, checkpoint_every=4)
    rest = stochastic(20, checkpoint=tmp_path, checkpoint_every=4)
    assert part.steps == interrupted
    assert_identical(whole, rest)


def test_a_resumed_run_does_not_compute_what_is_stored(tmp_path):
    calls = []

    def reporting(params, batch):
        jax.debug.callback(lambda: calls.append(1))
        return squared_error(params, batch)

    def run(steps):
        result = train(
            reporting,
            *regression(),
            optimizer=SGD,
            steps=steps,
            checkpoint=tmp_path,
            checkpoint_every=3,
            progress=False,
        )
        jax.effects_barrier()
        return result, len(calls)

    _, first = run(6)
    _, second = run(8)
    finished, third = run(8)
    assert first == 7 and second == 9 and third == 9  # one evaluation more than updates
    assert finished.losses.shape == (8,) and finished.status == "finished"


@pytest.mark.slow
def test_random_keys_in_the_optimizer_state_survive_a_checkpoint(tmp_path):
    def noisy(steps, **more):
        return train(squared_error, *regression(), optimizer=NOISY, steps=steps, **more)

    noisy(4, checkpoint=tmp_path, checkpoint_every=2)
    assert_identical(noisy(7), noisy(7, checkpoint=tmp_path, checkpoint_every=2))


def test_float64_survives_a_checkpoint(x64, tmp_path):
    def run(steps, **more):
        return train(squared_error, *regression(dtype=np.float64), optimizer=ADAM, steps=steps, **more)

    run(3, checkpoint=tmp_path, checkpoint_every=2)
    resumed = run(5, checkpoint=tmp_path, checkpoint_every=2)
    assert resumed.params["w"].dtype == jnp.float64
    assert_identical(run(5), resumed)


@pytest.mark.slow
def test_a_killed_process_leaves_a_folder_to_resume_from(tmp_path):
    code = "import sys, test_checkpoints; test_checkpoints.train_until_killed(sys.argv[1])"
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, env=same_path(), stderr=subprocess.PIPE) as child:
        limit = time.monotonic() + 300  # far more than the two seconds that imports and compilation take when alone
        while not any(p.name.isdigit() and int(p.name) >= 3 for p in tmp_path.iterdir()):
            if child.poll() is not None or time.monotonic() > limit:
                child.kill()  # otherwise its output would not end
                pytest.fail(child.stderr.read().decode())
            time.sleep(0.01)
        child.send_signal(signal.SIGKILL)
    assert child.returncode == -signal.SIGKILL
    reached = max(int(p.name) for p in tmp_path.iterdir() if p.name.isdigit())
    whole, resumed = stochastic(reached + 6), stochastic(reached + 6, checkpoint=tmp_path, checkpoint_every=3)
    assert_identical(whole, resumed)
    assert [p.name for p in tmp_path.iterdir()] == [str(reached + 6)]


def test_what_a_killed_process_leaves_is_cleared_away_quietly(tmp_path, capfd):
    plain(4, metric_steps=[0], checkpoint=tmp_path, checkpoint_every=2)
    (tmp_path / "2").mkdir()  # an older checkpoint, half deleted
    (tmp_path / "6.orbax-checkpoint-tmp").mkdir()  # a newer one, half written
    resumed = plain(7, metric_steps=[0], checkpoint=tmp_path, checkpoint_every=2)
    assert_identical(plain(7, metric_steps=[0]), resumed)
    assert [p.name for p in tmp_path.iterdir()] == ["7"]
    assert capfd.readouterr() == ("", "")


def same_path():
    """The environment of a child that imports what this process imports, and this file."""
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])}


def train_until_killed(folder):
    assert not any(name.startswith("orbax") for name in sys.modules), "orbax is for runs that ask for checkpoints"
    stochastic(100_000, checkpoint=folder, checkpoint_every=1)


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    params, data = regression()
    base = {
        "loss": squared_error,
        "params": params,
        "data": data,
        "optimizer": ADAM,
        "steps": 4,
        "batch_size": 2,
        "key": jax.random.key(0),
        "metrics": norm,
        "metric_steps": [0, 2],
        "checkpoint": tmp_path,
        "checkpoint_every": 2,
        "settings": {"learning_rate": 0.01, "head": "cosine"},
    }
    train(**base)
    wider, longer = regression(z=4), regression(n=8)
    others = {
        "the shapes of params": {"params": wider[0], "data": wider[1]},
        "the shapes of data": {"data": longer[1]},
        "the values of params": {"params": params | {"b": params["b"] + 1}},
        "the values of data": {"data": data | {"y": data["y"] + 1}},
        "batch_size was 2, now is 3": {"batch_size": 3},
        "momentum_encoder was None": {"loss": contrast, "momentum_encoder": MOMENTUM},
        "they follow from the optimizer": {"optimizer": SGD},
        "key": {"key": jax.random.key(1)},
        "batch_size was 2, now is 3; key": {"batch_size": 3, "key": jax.random.key(1)},  # all that differs
        "learning_rate was 0.01, now is 0.02; head was cosine, now is None": {"settings": {"learning_rate": 0.02}},
        "clipped was None, now is True": {"settings": base["settings"] | {"clipped": True}},
        r"holds metrics at steps \[0, 2\]": {"metric_steps": [0, 3]},
        "holds 4 updates, more than steps=3": {"steps": 3},
    }
    for cause, change in others.items():
        with pytest.raises(ValueError, match=f"(?s){cause}.*or another folder, or delete this one"):
            train(**base | change)
    assert train(**base).steps == 4


def test_a_damaged_checkpoint_is_named(tmp_path):
    plain(2, metric_steps=[0], checkpoint=tmp_path, checkpoint_every=2)
    for file in (tmp_path / "2" / "arrays").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    with pytest.raises(ValueError, match=r"(?s)2 cannot be read.*Delete that folder"):
        plain(4, metric_steps=[0], checkpoint=tmp_path, checkpoint_every=2)


def test_a_folder_that_cannot_be_written_is_an_error_before_training(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"cannot be written.*Pass a folder that can"):
        plain(2, metric_steps=[0], checkpoint=tmp_path / "file" / "folder", checkpoint_every=1)
