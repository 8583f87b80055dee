"""Interleaved timing, peak memory, and the JSON file that says on what machine they were measured."""

import contextlib
import datetime
import json
import os
import platform
import re
import resource
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import jax
from tqdm import tqdm

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("jax", "jaxlib", "numpy", "flax", "neural-tangents")
# Calls of one visit beyond which its median no longer gets better; bounds the visits of functions of microseconds.
MOST_CALLS = 50


class Budget(NamedTuple):
    """How long to measure."""

    visits: int  # samples of each contestant
    visit_seconds: float  # a visit repeats its function for so long, and its sample is the median call
    patience: float  # seconds after which a contestant gets no further visit; it has at least one sample


class Samples(NamedTuple):
    """One contestant's visits, in seconds of wall clock and of processor time (all threads) per call."""

    wall: list[float]
    cpu: list[float]
    value: Any


def interleave(contestants: dict[str, Callable[[], Any]], budget: Budget, title: str) -> dict[str, Samples]:
    """Time functions in turn, A B A B ..., so that all of them meet the same load of the machine.

    The first call of each is a warm-up and no sample, unless it alone used up the patience: then it is the only one.
    """
    samples: dict[str, Samples] = {}
    used = dict.fromkeys(contestants, 0.0)
    for _ in tqdm(range(budget.visits), desc=title, unit="round", leave=False):
        for name, function in contestants.items():
            if name not in samples:
                value, wall, cpu = _call(function)
                slow = wall > budget.patience
                samples[name] = Samples([wall] if slow else [], [cpu] if slow else [], value)
                used[name] += wall
            visited = samples[name]
            if visited.wall and used[name] > budget.patience:
                continue
            walls, cpus = [], []
            while not walls or (sum(walls) < budget.visit_seconds and len(walls) < MOST_CALLS):
                _, wall, cpu = _call(function)
                walls.append(wall)
                cpus.append(cpu)
            visited.wall.append(statistics.median(walls))
            visited.cpu.append(statistics.median(cpus))
            used[name] += sum(walls)
    return samples


def _call(function):
    wall, cpu = time.perf_counter(), time.process_time()
    value = jax.block_until_ready(function())
    return value, time.perf_counter() - wall, time.process_time() - cpu


def summary(samples: list[float]) -> dict[str, Any]:
    """Median and range of the visits."""
    return {
        "median": statistics.median(samples),
        "low": min(samples),
        "high": max(samples),
        "visits": len(samples),
    }


def ratio(slow: list[float], fast: list[float]) -> dict[str, float]:
    """Ratio of the medians; low and high are the extremes of the ratios within one round."""
    # The visits of an impatient contestant are compared with the others' further rounds as well.
    rounds = range(max(len(slow), len(fast)))
    paired = [slow[i % len(slow)] / fast[i % len(fast)] for i in rounds]
    return {"median": statistics.median(slow) / statistics.median(fast), "low": min(paired), "high": max(paired)}


def peak_resident() -> int:
    """Most memory that this process has held, in bytes."""
    # Not getrusage on Linux: its maximum survives exec, so that a fresh interpreter begins with its parent's peak.
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024
    except (OSError, TypeError):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def machine() -> dict[str, Any]:
    """The machine in words: what changes a time, and nothing that names the host."""
    devices = jax.devices()
    versions = {}
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "backend": jax.default_backend(),
        "device": devices[0].device_kind,
        "devices": len(devices),
        "versions": versions,
    }


def load() -> float:
    """Number of processes that wanted to run in the last minute; above the number of cores, times are too long."""
    return os.getloadavg()[0]


def target(statement: str, limit: float, measured: dict[str, float], *, at_least: bool) -> dict[str, Any]:
    """A figure to reach, and whether the median reaches it."""
    met = measured["median"] >= limit if at_least else measured["median"] <= limit
    return {"statement": statement, "limit": limit, **measured, "met": met}


def print_targets(targets: list[dict[str, Any]]) -> None:
    """One line per figure to reach."""
    for one in targets:
        range_ = f"{one['low']:.4g} to {one['high']:.4g}"
        print(f"{'met   ' if one['met'] else 'MISSED'} {one['statement']}: {one['median']:.4g} ({range_})")


def write(benchmark: str, preset: str, folder: Path, content: dict[str, Any]) -> Path:
    """Write one benchmark's JSON, with machine and date; the file is named after the kind of machine."""
    about = machine()
    kind = about["processor"] if about["backend"] == "cpu" else about["device"]
    words = f"{about['backend']} {kind} {about['cores']} cores".lower()
    # quick is what is kept in the repository; the others stand beside it.
    name = f"{benchmark}-{re.sub('[^a-z0-9]+', '-', words)}{'' if preset == 'quick' else '-' + preset}.json"
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    record = {"benchmark": benchmark, "preset": preset, "date": date, "machine": about, **content}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(json.dumps(_rounded(record), indent=2, allow_nan=False) + "\n", encoding="utf-8")
    return path


def _rounded(value):
    """Five significant digits: no time is known to more, and the files stay readable."""
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine()
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1].strip() if found else platform.machine()
