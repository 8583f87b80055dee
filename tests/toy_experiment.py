"""A toy package with one experiment, for the tests of the results store and of the command lines."""

import importlib
import sys

import pytest

from theorykit import results

EXPERIMENT = """
import dataclasses
import os
from pathlib import Path
import numpy as np
from theorykit import results, verify

@dataclasses.dataclass(frozen=True)
class Config:
    parts: int = 3
    margin: float = results.threshold(0.5, "half of the distance to the control")

PRESETS = {"smoke": Config(), "quick": Config(parts=4)}

def one(i):
    with open(Path(__file__).parent / "computed.txt", "a") as log:
        log.write(f"{i}\\n")
    return {"value": np.float32(i), "square": np.arange(3) ** i}

def run(config):
    parts = [results.part(f"part={i}", lambda i=i: one(i)) for i in range(config.parts)]
    return {"values": np.stack([p["value"] for p in parts]), "squares": np.stack([p["square"] for p in parts])}

def verdicts(config, arrays):
    def check(name, role, of, value):
        claim = verify.Claim(name, "the mean is one", "derivation", role, of)
        return verify.agreement(claim, value, 1.0, margin=config.margin, deterministic=True)
    mean = float(np.mean(arrays["values"][:3]))
    return [check("T1", "claim", None, mean), check("T1.shifted", "control", "T1", mean + 1.0)]
"""


class Toy:
    """A toy package with one experiment, its store, and a count of the parts it computed."""

    experiment = EXPERIMENT

    def __init__(self, folder):
        self.folder = folder
        self.root = folder / "store"
        self.write("toyexperiments/__init__.py", "ORDER = ('toy',)\n")
        self.write("toyexperiments/toy.py", EXPERIMENT)

    def write(self, path, text):
        (self.folder / path).parent.mkdir(exist_ok=True)
        (self.folder / path).write_text(text)
        self.forget()

    def edit(self, old, new):
        path = self.folder / "toyexperiments/toy.py"
        text = path.read_text()
        assert old in text
        self.write("toyexperiments/toy.py", text.replace(old, new))

    def forget(self):
        """As a new process would: the toy modules are loaded again."""
        for name in [name for name in sys.modules if name.split(".")[0] in ("toyexperiments", "toyfigures")]:
            del sys.modules[name]
        importlib.invalidate_caches()

    def run(self, preset="smoke", **options):
        return results.run("toy", preset, **({"root": self.root, "package": "toyexperiments"} | options))

    def load(self, preset="smoke", **options):
        return results.load("toy", preset, **({"root": self.root, "package": "toyexperiments"} | options))

    def computed(self):
        log = self.folder / "toyexperiments/computed.txt"
        return len(log.read_text().splitlines()) if log.exists() else 0


@pytest.fixture
def toy(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    # A pyc is taken for current if the source has the same size and the same second; tests edit faster than that.
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.setenv("THEORYKIT_RESULTS", str(tmp_path / "store"))
    toy = Toy(tmp_path)
    yield toy
    toy.forget()
