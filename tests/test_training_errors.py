"""Progress of the training loop, and what it refuses."""

import io
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_training import SGD, embed, jitter, norm, plain, regression, squared_error

from theorykit.training import MomentumEncoder, train

# Progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_is_drawn_on_a_terminal_only(monkeypatch, capsys):
    plain(3, metric_steps=[0])
    assert capsys.readouterr().err == ""
    for progress in (True, False):
        terminal = Terminal()
        monkeypatch.setattr(sys, "stderr", terminal)
        run = plain(3, metric_steps=[0], progress=progress)
        assert ("3/3" in terminal.getvalue()) == ("loss" in terminal.getvalue()) == progress
        assert not progress or f"{float(run.state.loss):.4g}" in terminal.getvalue()


# Bad input


def bad_arguments():
    params, data = regression()
    nan = {"x": data["x"], "y": np.where(np.arange(7) == 2, np.nan, data["y"])}
    key = jax.random.key(0)
    return {
        "steps is -1": {"steps": -1},
        "batch_size is 0, but data has 7 rows": {"batch_size": 0, "key": key},
        "batch_size is 8, but data has 7 rows": {"batch_size": 8, "key": key},
        "Mini-batches and augmentation draw random numbers. Pass key": {"batch_size": 2},
        "Mini-batches and augmentation draw random numbers.": {"augment": jitter},
        "leading axes of data differ": {"data": data | {"y": data["y"][:5]}},
        "is a scalar. Every array of data needs a leading axis": {"data": data | {"y": np.float32(1.0)}},
        "data has no rows": {"data": {"x": data["x"][:0], "y": data["y"][:0]}},
        "data holds no array": {"data": {}},
        "params holds no array": {"params": {}},
        r"data\['y'\] has 1 entries that are not finite": {"data": nan},
        r"params\['b'\] has 1 entries that are not finite": {"params": params | {"b": np.float32(np.inf)}},
        "metrics and metric_steps go together": {"metrics": norm},
        "metrics and metric_steps go together. Pass both": {"metric_steps": [0]},
        r"metric_steps \[2, 1\] do not increase": {"metrics": norm, "metric_steps": [2, 1]},
        r"metric_steps \[1, 1\] do not increase": {"metrics": norm, "metric_steps": [1, 1]},
        r"metric_steps \[4\] leave the range 0 to steps=3": {"metrics": norm, "metric_steps": [4]},
        r"metric_steps \[-1, 2\] leave the range": {"metrics": norm, "metric_steps": [-1, 2]},
        r"checkpoint \(a folder\) and checkpoint_every \(steps\) go together": {"checkpoint": "unused"},
        r"checkpoint \(a folder\) and checkpoint_every": {"checkpoint_every": 2},
        "checkpoint_every is 0": {"checkpoint": "unused", "checkpoint_every": 0},
        "decay of the momentum encoder is 1.5": {"momentum_encoder": MomentumEncoder(1.5, 4, embed)},
        "queue_size is 0": {"momentum_encoder": MomentumEncoder(0.9, 0, embed)},
        "returned keys of shape": {"momentum_encoder": MomentumEncoder(0.9, 4, lambda p, b: b["y"])},
        r"loss returned float32\[7\], not one floating-point number": {"loss": lambda p, b: b["y"] * p["b"]},
        r"loss returned int32\[\], not one": {"loss": lambda p, b: jnp.int32(1)},
    }


@pytest.mark.parametrize("cause", bad_arguments())
def test_bad_input_is_named(cause, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    params, data = regression()
    good = {"loss": squared_error, "params": params, "data": data, "optimizer": SGD, "steps": 3}
    with pytest.raises(ValueError, match=cause):
        train(**good | bad_arguments()[cause])
    assert not list(tmp_path.iterdir())


def test_wrong_types_are_named():
    params, data = regression()
    good = {"loss": squared_error, "params": params, "data": data, "optimizer": SGD, "steps": 3}

    class Unhashable:
        __hash__ = None

        def __call__(self, params, batch):
            return squared_error(params, batch)

    # The annotations, checked in tests only, catch 1.5 before the library's own check does.
    bad = {
        r"params\['b'\] has dtype int64. Parameters are floating-point": {"params": params | {"b": np.int64(1)}},
        "metric.step": {"metrics": norm, "metric_steps": [1.5]},
        "queue_size must be a whole number": {"momentum_encoder": MomentumEncoder(0.9, 2.5, embed)},
        "cannot be hashed": {"loss": Unhashable()},
    }
    for cause, change in bad.items():
        with pytest.raises(TypeError, match=cause):
            train(**good | change)
