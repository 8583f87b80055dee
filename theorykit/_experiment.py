"""An experiment as the results store sees it: its module, one config, its place in the store, its verdicts."""

import importlib
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from theorykit import _fingerprint, verify


class UnknownName(ValueError):
    """No experiment, or no preset of it, has this name."""


class Task(NamedTuple):
    """One experiment at one preset."""

    name: str
    preset: str
    module: ModuleType
    config: Any
    fingerprint: _fingerprint.Fingerprint
    edited: list[str]
    root: Path

    @property
    def folder(self) -> Path:
        # 64 bits tell any number of results apart; config.json holds the whole digest.
        return self.root / f"{self.name}-{self.preset}-{self.fingerprint.digest[:16]}"

    @property
    def partial(self) -> Path:
        return self.root / f".partial-{self.folder.name}"

    @property
    def command(self) -> str:
        return f"make figure NAME={self.name} PRESET={self.preset} (or make figures PRESET={self.preset} for all)"

    def record(self) -> dict[str, Any]:
        """What config.json holds."""
        return {
            "experiment": self.name,
            "preset": self.preset,
            "hash": self.fingerprint.digest,
            "config": _fingerprint.values(self.config),
            "thresholds": _fingerprint.thresholds(self.config),
            "ingredients": self.fingerprint.ingredients,
        }

    def why_stale(self) -> str:
        """What differs from the newest stored result of the same experiment and preset."""
        older = sorted(self.root.glob(f"{self.name}-{self.preset}-*"), key=lambda path: path.stat().st_mtime)
        if not older:
            return f" in {self.root}"
        try:
            was = json.loads((older[-1] / "config.json").read_text(encoding="utf-8"))["ingredients"]
        except (OSError, ValueError, KeyError, TypeError):
            return f": {older[-1]} is another one and cannot be read"
        now, readable = self.fingerprint.ingredients, _fingerprint.environment()
        changed = [
            f"{key} {was.get(key, 'absent')} -> {now.get(key, 'absent')}" if key in readable else key
            for key in sorted(was.keys() | now.keys())
            if was.get(key) != now.get(key)
        ]
        return f": {older[-1]} is stale, these have changed: {', '.join(changed)}"


def find(name: str, preset: str, root: Path, package: str) -> Task:
    """Find an experiment's module and config, and the digest of what its result depends on."""
    before = frozenset(sys.modules)
    module = _module(name, package)
    if preset not in module.PRESETS:
        raise UnknownName(f"{name} has no preset {preset!r}: choose one of {', '.join(module.PRESETS)}")
    config = module.PRESETS[preset]
    if hasattr(module, "data_files"):
        data = module.data_files(config)
    elif isinstance(getattr(config, "data", None), str):
        data = importlib.import_module("theorykit.data").source_files(config.data)
    else:
        data = []
    packages = ("theorykit", package.split(".")[0])
    fingerprint = _fingerprint.fingerprint(f"{package}.{name}", config, packages=packages, data=data)
    edited = _fingerprint.edited_since_loaded(fingerprint.sources, before)
    return Task(name, preset, module, config, fingerprint, edited, root)


def _module(name: str, package: str) -> ModuleType:
    if importlib.util.find_spec(package) is None:
        raise ModuleNotFoundError(f"no package {package!r}: run from the repository's root, or add that to PYTHONPATH")
    if not name.isidentifier() or importlib.util.find_spec(f"{package}.{name}") is None:
        known = getattr(importlib.import_module(package), "ORDER", ())
        raise UnknownName(f"no experiment {name!r} in {package}: choose one of {', '.join(known)}")
    module = importlib.import_module(f"{package}.{name}")
    missing = [needed for needed in ("Config", "PRESETS", "run", "verdicts") if not hasattr(module, needed)]
    if missing:
        raise ValueError(f"{module.__file__} is not an experiment: define {', '.join(missing)}")
    return module


def judge(task: Task, arrays: dict[str, np.ndarray]) -> list[verify.Verdict]:
    """Verdicts of the present code, each claim with its control."""
    verdicts = [
        verdict._replace(experiment=task.name, preset=task.preset)
        for verdict in task.module.verdicts(task.config, dict(arrays))
    ]
    names = [verdict.claim for verdict in verdicts]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise ValueError(f"{task.name}: {', '.join(sorted(twice))} occurs twice: give each verdict its own claim name")
    claims = {verdict.claim for verdict in verdicts if verdict.role == "claim"}
    controlled = {verdict.control_of for verdict in verdicts if verdict.role == "control"}
    if not verdicts:
        raise ValueError(f"{task.name} returns no verdicts: every experiment states at least one claim and its control")
    if claims - controlled:
        raise ValueError(
            f"{task.name}: no control for {', '.join(sorted(claims - controlled))}; add the same check on a "
            "measurement with an assumption broken (role='control', control_of=the claim)"
        )
    if controlled - claims:
        raise ValueError(
            f"{task.name}: a control names {', '.join(map(repr, controlled - claims))}, which is none of its claims "
            f"{', '.join(sorted(claims))}: set control_of to one of them"
        )
    return verdicts
