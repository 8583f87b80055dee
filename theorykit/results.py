"""The results store: a config becomes arrays once; figures and verdicts read them.

A result is a folder ``results/<experiment>-<preset>-<hash>/`` with

- ``config.json``: the config, its thresholds with their reasons, and everything that the hash covers;
- ``arrays.npz``: what ``run(config)`` returned;
- ``verdicts.json``: what ``verdicts(config, arrays)`` says now;
- ``environment.json``: versions, device, seconds, and the checksum of ``arrays.npz``.

It is written under a temporary name and then renamed, so it is either complete or absent. Work inside a run that goes
through :func:`part` survives the death of the process. The arrays depend on what `theorykit._fingerprint` lists and on
nothing else; verdicts are recomputed from the arrays on every call, so a changed threshold retrains nothing.

An experiment is a module with ``Config`` (a frozen dataclass), ``PRESETS`` (name -> Config), ``run(config) -> dict of
arrays`` and ``verdicts(config, arrays) -> list of Verdict``; also ``data_files(config) -> list of paths`` if it reads
external files other than those of ``theorykit.data.source_files(config.data)``.
"""

import contextlib
import contextvars
import copy
import dataclasses
import datetime
import importlib.metadata
import json
import os
import platform
import re
import secrets
import shutil
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from theorykit import _files, _fingerprint, verify
from theorykit._experiment import Task, UnknownName, find, judge

_PACKAGES = ("jax", "jaxlib", "numpy", "scipy", "flax", "optax", "diffrax", "neural-tangents", "theorykit")


class MissingResult(FileNotFoundError):
    """No stored result fits the present config, code, versions and data."""


class CorruptResult(ValueError):
    """A file of a stored result is damaged."""


class UnwritableStore(OSError):
    """The folder of the store cannot be written."""


# Errors whose message says all: the command lines print it without a traceback.
EXPLAINED = (UnknownName, MissingResult, CorruptResult, UnwritableStore)


class Result(NamedTuple):
    """A stored result: arrays are read-only, verdicts and thresholds are those of the present code."""

    name: str
    preset: str
    config: Any
    arrays: dict[str, np.ndarray]
    verdicts: list[verify.Verdict]
    environment: dict[str, Any]
    path: Path


class _Store(NamedTuple):
    """Where the parts of the run in progress go."""

    task: Task
    labels: set[str]
    found: list[str]


_STORE: contextvars.ContextVar[_Store | None] = contextvars.ContextVar("theorykit_store", default=None)


def run(name: str, preset: str, *, root: str | os.PathLike | None = None, package: str = "experiments") -> Result:
    """Result of an experiment: read from the store if it is there, else computed and stored.

    Parameters
    ----------
    name
        Experiment, a module of ``package``.
    preset
        Key of the experiment's ``PRESETS``.
    root
        Folder of the store; by default the environment variable THEORYKIT_RESULTS, else ``results`` in the working
        directory.
    package
        Package that holds the experiments.

    Returns
    -------
    Result

    Raises
    ------
    UnknownName
        For an unknown experiment or preset.
    ValueError
        If a claim has no control.
    CorruptResult
        If the stored result is damaged; nothing is recomputed silently, since that would hide a failing disk.
    UnwritableStore
        If the store cannot be written; raised before anything is computed.
    RuntimeError
        If the code was edited after this process loaded it.
    """
    task = find(name, preset, results_root(root), package)
    if not task.folder.exists():
        _compute(task)
    result = _read(task)
    _discard_leftovers(task)
    return result


def load(name: str, preset: str, *, root: str | os.PathLike | None = None, package: str = "experiments") -> Result:
    """Stored result of an experiment; never computes.

    Parameters, Returns
    -------------------
    As for :func:`run`.

    Raises
    ------
    MissingResult
        If nothing is stored for the present config, code, versions and data. Says what changed and what to type.
    UnknownName, ValueError, CorruptResult
        As for :func:`run`.
    """
    task = find(name, preset, results_root(root), package)
    if not task.folder.exists():
        raise MissingResult(f"no result of {name} at preset {preset}{task.why_stale()}. Compute it: {task.command}")
    return _read(task)


def part(label: str, function: Callable[[], Any]) -> Any:
    """Value of ``function()``, kept on disk while the experiment's run is unfinished.

    A run that was killed reads the parts it had finished and goes on with the next. Outside a run started by the store
    the function is simply called.

    Parameters
    ----------
    label
        Name of the part, unique within the run: letters, digits and ``. _ = + -``.
    function
        Computes one array or a dict of arrays, and depends on the config only.

    Returns
    -------
    numpy.ndarray or dict of numpy.ndarray
        The same bits, dtypes and shapes whether computed or read back.

    Raises
    ------
    ValueError
        For a label that is used twice or has other characters.
    TypeError
        If the value is neither an array nor a dict of arrays.
    """
    store = _claim(label)
    if store is None:
        return _part_value(label, function())
    path = store.task.partial / f"{label}.npz"
    if path.exists():
        try:
            arrays = _files.read_arrays(path)
        except _files.DAMAGE as error:
            raise CorruptResult(
                f"{path} is damaged ({error}): delete this file; its part is then recomputed"
            ) from error
        store.found.append(label)
        return arrays.get("", arrays)
    value = _part_value(label, function())
    try:
        path.parent.mkdir(exist_ok=True)
        with _files.replacing(path) as temporary:
            _files.write_arrays(temporary, value if isinstance(value, dict) else {"": value})
    except FileNotFoundError:
        # Another process has finished the same result meanwhile and cleared the parts: nothing is left to save.
        if not store.task.folder.exists():
            raise
    return value


def folder(label: str) -> Path | None:
    """Folder for the checkpoints of long work inside a run, kept while the experiment's run is unfinished.

    A run that was killed finds there what it wrote, for instance by ``training.train(checkpoint=folder(label), ...)``.

    Parameters
    ----------
    label
        As in :func:`part`, and of no part of the run.

    Returns
    -------
    Path or None
        An existing folder; None outside a run started by the store, where nothing is kept.

    Raises
    ------
    ValueError
        As :func:`part`.
    """
    store = _claim(label)
    if store is None:
        return None
    path = store.task.partial / label
    path.mkdir(parents=True, exist_ok=True)
    return path


def _claim(label: str) -> _Store | None:
    """The store of the run in progress, in which the label is now taken."""
    if not re.fullmatch(r"[\w.=+-]+", label):
        raise ValueError(f"the part label {label!r} becomes a file name: use letters, digits and . _ = + - only")
    store = _STORE.get()
    if store is None:
        return None
    if label in store.labels:
        raise ValueError(f"two parts of one run are called {label!r}: the second would read the first one's value")
    store.labels.add(label)
    return store


def threshold(default: Any, reason: str) -> Any:
    """Field of a Config that only ``verdicts`` uses: it is recorded with its reason, and a change retrains nothing.

    Examples
    --------
    >>> import dataclasses
    >>> @dataclasses.dataclass(frozen=True)
    ... class Config:
    ...     width: int = 64
    ...     margin: float = threshold(0.1, "the width of one grid step of the slope")
    >>> Config().margin
    0.1
    """
    return dataclasses.field(default=default, metadata={"threshold": reason})


def results_root(root: str | os.PathLike | None = None) -> Path:
    """Folder of the store: the argument, else THEORYKIT_RESULTS, else ``results`` in the working directory."""
    return Path(root or os.environ.get("THEORYKIT_RESULTS") or "results").absolute()


def write_verdicts(verdicts: Sequence[verify.Verdict], *, root: str | os.PathLike | None = None) -> Path:
    """Write the verdicts of a whole run as one list to ``verdicts.json`` in the store, and return its path."""
    path = results_root(root) / "verdicts.json"
    _files.write_text(path, verify.to_json(verdicts))
    return path


class _Sealed:
    """Stands for a threshold while ``run`` works, so that a use of it fails instead of escaping the hash."""

    def __repr__(self) -> str:
        return "<threshold, which run may not use>"


def _compute(task: Task) -> None:
    """Compute a result and put it in place, complete or not at all."""
    if task.edited:
        raise RuntimeError(
            f"{', '.join(task.edited)} was edited after this process loaded it, so a result computed now would come "
            "from the old code: restart Python (or importlib.reload the module) and call again"
        )
    staging = _staging(task)
    try:
        store = _Store(task, set(), [])
        start = time.perf_counter()
        arrays = _run(task, store)
        seconds = time.perf_counter() - start
        try:
            _files.write_arrays(staging / "arrays.npz", arrays)
            environment = _environment(seconds, store, _files.digest(staging / "arrays.npz"))
            _files.write_file(staging / "environment.json", _json(environment))
            _files.write_file(staging / "config.json", _json(task.record()))
            _files.sync(staging)
            os.rename(staging, task.folder)
            _files.sync(task.root)
        except OSError:
            # Another process may have put the same result in place meanwhile: then that one counts.
            if not task.folder.exists():
                raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _staging(task: Task) -> Path:
    """Make the folder that will become the result; made before the computing, it shows that the store is writable."""
    staging = task.root / f".new-{task.folder.name}-{secrets.token_hex(4)}"
    try:
        staging.mkdir(parents=True)
    except OSError as error:
        raise UnwritableStore(
            f"the results folder {task.root} cannot be written ({error}): set THEORYKIT_RESULTS to one that can be"
        ) from error
    return staging


def _run(task: Task, store: _Store) -> dict[str, np.ndarray]:
    config = copy.copy(task.config)
    for name in _fingerprint.thresholds(config):
        object.__setattr__(config, name, _Sealed())
    token = _STORE.set(store)
    try:
        return _files.dict_of_arrays(task.module.run(config), f"run of {task.name}")
    finally:
        _STORE.reset(token)


def _discard_leftovers(task: Task) -> None:
    """Remove the parts and unfinished writings of a result that is in place."""
    for leftover in (task.partial, *task.root.glob(f".new-{task.folder.name}-*")):
        shutil.rmtree(leftover, ignore_errors=True)


def _read(task: Task) -> Result:
    path = task.folder

    def damaged(file: str, why: Any) -> CorruptResult:
        return CorruptResult(
            f"{path / file} is damaged ({why}): delete the folder {path} and compute it again: {task.command}"
        )

    records = {}
    for file, needed in (("config.json", "hash"), ("environment.json", "sha256")):
        try:
            records[file] = json.loads((path / file).read_text(encoding="utf-8"))
            records[file][needed]
        except (FileNotFoundError, ValueError, KeyError, TypeError) as error:
            raise damaged(file, f"{type(error).__name__}: {error}") from error
    if records["config.json"]["hash"] != task.fingerprint.digest:
        raise damaged("config.json", "it belongs to another result")
    environment = records["environment.json"]
    try:
        if _files.digest(path / "arrays.npz") != environment["sha256"]:
            raise ValueError("its checksum is not the one in environment.json")
        arrays = _files.read_arrays(path / "arrays.npz")
    except _files.DAMAGE as error:
        raise damaged("arrays.npz", error) from error
    for array in arrays.values():
        array.setflags(write=False)
    verdicts = judge(task, arrays)
    try:
        _files.write_text(path / "verdicts.json", verify.to_json(verdicts))
        _files.write_text(path / "config.json", _json(task.record()).decode())
    except OSError as error:
        warnings.warn(f"{path} keeps its earlier verdicts.json: {error}", stacklevel=3)
    return Result(task.name, task.preset, task.config, arrays, verdicts, environment, path)


def _part_value(label: str, value: Any) -> Any:
    where = f"part {label!r}"
    return _files.dict_of_arrays(value, where) if isinstance(value, dict) else _files.array(value, where)


def _environment(seconds: float, store: _Store, sha256: str) -> dict[str, Any]:
    versions = {}
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {
        "python": platform.python_version(),
        "versions": versions,
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "backend": jax.default_backend(),
        "devices": [device.device_kind for device in jax.devices()],
        "x64": bool(jax.config.jax_enable_x64),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "seconds": round(seconds, 3),
        "parts_from_earlier_attempts": store.found,
        "sha256": sha256,
    }


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
