r"""Time and peak memory of the full empirical kernel beside neural-tangents' implementations and a plain Jacobian.

    python -m benchmarks.ntk --preset quick

Contestants take turns, so that ratios are fair on a busy machine; `_contestants` says who they are. Every kernel must
agree with theorykit's, or the benchmark fails. Peak memory is measured in fresh processes, one contestant each.
"""

import math
import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from tqdm import tqdm

from benchmarks import _timing
from benchmarks._contestants import (
    IMPLEMENTATIONS,
    LIMIT,
    PIXELS,
    TOLERANCE,
    Case,
    build,
    check,
    compile_kernel,
    difference,
    inputs,
    jacrev_kernel,
    neural_tangents_kernel,
)
from theorykit import ntk, verify

MOST_MEMORY = 4  # GiB of resident memory for the large kernel


class Plan(NamedTuple):
    """What a preset measures."""

    cases: tuple[Case, ...]
    scaling: tuple[Case, ...]  # theorykit alone, for the exponent of the cost against the width
    large: Case  # theorykit alone, in a fresh process
    sharded: Case
    budget: _timing.Budget


def _sweep(**base: Any) -> tuple[Case, ...]:
    """Around one kernel, its depth, number of points and number of outputs changed one at a time."""
    changes = ({}, {"depth": 3}, {"depth": 4}, {"n": 16}, {"n": 256}, {"z": 1}, {"z": 16})
    return tuple(Case(**(base | change)) for change in changes)


TARGETS = (
    Case(2, 512, 128, 4),
    Case(2, 2048, 128, 4),
    Case(2, 8192, 128, 4, least=100, memory=True),
    Case(4, 2048, 32, 4, least=20, memory=True),
)
DEEP = Case(4, 2048, 128, 4, least=20)
PLANS = {
    "smoke": Plan(
        cases=(Case(2, 64, 6, 2, memory=True), Case(3, 16, 5, 1)),
        scaling=tuple(Case(2, width, 4, 2) for width in (16, 32, 64)),
        large=Case(2, 128, 10, 2),
        sharded=Case(2, 32, 8, 2),
        budget=_timing.Budget(visits=2, visit_seconds=0.0, patience=10.0),
    ),
    "quick": Plan(
        # The deepest takes each peer up to a minute: the one that must go in blocks and the fastest. All are in "full".
        cases=(
            *TARGETS,
            DEEP._replace(peers=("nt jacobian", "nt products")),
            *_sweep(depth=2, width=1024, n=64, z=4),
        ),
        scaling=tuple(Case(2, 2**k, 128, 4) for k in range(9, 17)),
        large=Case(2, 65_536, 1000, 8),
        sharded=Case(2, 8192, 256, 4),
        budget=_timing.Budget(visits=7, visit_seconds=0.2, patience=6.0),
    ),
    "full": Plan(
        cases=(*TARGETS, DEEP._replace(memory=True), *_sweep(depth=2, width=4096, n=64, z=4)),
        scaling=tuple(Case(2, 2**k, 128, 4) for k in range(9, 18)),
        large=Case(2, 65_536, 1000, 8),
        sharded=Case(2, 8192, 512, 4),
        budget=_timing.Budget(visits=15, visit_seconds=0.5, patience=60.0),
    ),
}


def measure(case: Case, budget: _timing.Budget, limit: int = LIMIT) -> dict[str, Any]:
    """Time all contestants of one case in turn and compare their kernels."""
    load = _timing.load()
    # In fresh processes first, while this one is small.
    alone = (
        {name: run_alone(measure_alone, case, name, limit) for name in ("theorykit", *case.peers)}
        if case.memory
        else {}
    )
    built = {name: build(case, name, limit) for name in ("theorykit", *case.peers)}
    samples = _timing.interleave({name: contestant.run for name, contestant in built.items()}, budget, _title(case))
    contestants = {}
    for name, contestant in built.items():
        error = difference(samples[name].value, samples["theorykit"].value)
        check(error, name, case)
        contestants[name] = {
            "seconds": _timing.summary(samples[name].wall),
            "cpu_seconds": _timing.summary(samples[name].cpu),
            "compile_seconds": contestant.compile_seconds,
            "block": contestant.block,
            "compiled_bytes": contestant.compiled_bytes,
            "difference": error,
            "alone": alone.get(name),
        }
    ours = samples["theorykit"]
    best = min(
        (name for name in case.peers if name in IMPLEMENTATIONS),
        key=lambda name: contestants[name]["seconds"]["median"],
    )
    return {
        **_size(case),
        "load": [load, _timing.load()],
        "contestants": contestants,
        "times_faster": {name: _timing.ratio(samples[name].wall, ours.wall) for name in case.peers},
        # Depends less on the load: where all cores are busy, threads that wait for each other stretch short calls most.
        "times_less_cpu": {name: _timing.ratio(samples[name].cpu, ours.cpu) for name in case.peers},
        "best_neural_tangents": best,
    }


def _size(case):
    return {"depth": case.depth, "width": case.width, "n": case.n, "z": case.z}


def _title(case):
    return f"depth {case.depth}, M {case.width}, n {case.n}, z {case.z}"


def run_alone(function: Callable, *arguments: Any) -> Any:
    """Call a function of this module in a fresh interpreter."""
    with ProcessPoolExecutor(max_workers=1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def measure_alone(case: Case, name: str, limit: int = LIMIT, calls: int = 1) -> dict[str, Any]:
    """Peak memory of one contestant, compilation and parameters included; to be called in a fresh interpreter.

    `increase_bytes` is beyond what the interpreter with all its imports holds. With `calls` > 1 also the seconds of the
    last call; where theorykit runs without peers, its values are compared with "jacrev" on the first and last points.
    """
    ntk.infinite.neural_tangents()
    jax.block_until_ready(jnp.zeros(()))  # the backend
    before = _timing.peak_resident()
    contestant = build(case, name, limit)
    for _ in range(calls):
        start = time.perf_counter()
        kernel = jax.block_until_ready(contestant.run())
        seconds = time.perf_counter() - start
    peak, device = _timing.peak_resident(), jax.devices()[0].memory_stats()
    found = {
        "peak_bytes": peak,
        "increase_bytes": peak - before,
        "device_peak_bytes": device["peak_bytes_in_use"] if device else None,
        "compiled_bytes": contestant.compiled_bytes,
        "compile_seconds": contestant.compile_seconds,
    }
    if calls > 1:
        ends = np.r_[: min(4, case.n // 2), case.n - min(4, case.n // 2) : case.n]
        apply, params, x = inputs(case)
        error = difference(
            kernel[ends][:, ends], compile_kernel(jacrev_kernel(apply), params, x[ends], None)(params, x[ends], None)
        )
        check(error, "jacrev", case)
        found |= {"seconds": seconds, "difference": error}
    return found


def measure_sharded(case: Case, budget: _timing.Budget) -> dict[str, Any]:
    """Rows over two devices of the host beside one device; to be called in a fresh interpreter.

    One device of the host uses all cores already, so this shows what sharding costs, not what a second device gains.
    """
    jax.config.update("jax_num_cpu_devices", 2)
    apply, params, x = inputs(case)
    mesh = jax.make_mesh((2,), ("points",), devices=jax.devices("cpu"))
    contestants = {
        "one": lambda: ntk.empirical_ntk(apply, params, x),
        "two": lambda: ntk.empirical_ntk(apply, params, x, mesh=mesh),
    }
    samples = _timing.interleave(contestants, budget, "sharded")
    error = difference(samples["two"].value, samples["one"].value)
    check(error, "two devices", case)
    return {
        **_size(case),
        "seconds": {name: _timing.summary(sampled.wall) for name, sampled in samples.items()},
        "times_faster_on_two": _timing.ratio(samples["one"].wall, samples["two"].wall),
        "difference": error,
    }


def measure_scaling(cases: tuple[Case, ...], budget: _timing.Budget) -> dict[str, Any]:
    """The exponent of theorykit's cost against the width: over all widths, and over the wider half."""
    load = _timing.load()
    contestants = {}
    for case in cases:
        apply, params, x = inputs(case)
        contestants[str(case.width)] = partial(ntk.empirical_ntk, apply, params, x)
    samples = _timing.interleave(contestants, budget._replace(patience=math.inf), "scaling")
    widths = np.array([case.width for case in cases], float)
    seconds = np.array([sampled.wall for sampled in samples.values()]).T  # (visits, widths)
    fits = {}
    for name, first in (("all", 0), ("wide", (len(cases) - 1) // 2)):
        # At least three widths make a slope with residuals.
        first = min(first, len(cases) - 3)
        fit = verify.slope_fit(widths[first:], seconds[:, first:], law="power", level=0.95)
        about = {"exponent": fit.slope, "low": fit.low, "high": fit.high, "r2": fit.r2}
        fits[name] = about | {"widths": [int(widths[first]), int(widths[-1])]}
    sizes = [{**_size(case), "seconds": _timing.summary(samples[str(case.width)].wall)} for case in cases]
    return {"load": [load, _timing.load()], "cases": sizes, "law": "seconds ~ width^exponent", "level": 0.95, **fits}


def structured_derivatives() -> str | None:
    """Why neural-tangents' implementation 3 is not among the contestants: its error on this JAX, None if it runs."""
    apply, params, x = inputs(Case(2, 16, 4, 2))
    try:
        jax.block_until_ready(compile_kernel(neural_tangents_kernel(apply, 3, 0), params, x, None)(params, x, None))
    except Exception as error:  # whatever another package raises is the answer
        return f"{type(error).__name__}: {error}"
    return None


def run(plan: Plan) -> dict[str, Any]:
    """Everything that a preset measures."""
    start = time.perf_counter()
    content: dict[str, Any] = {
        "settings": {
            **plan.budget._asdict(),
            "limit_bytes": LIMIT,
            "tolerance": TOLERANCE,
            "dtype": "float32",
            "activation": "relu",
            "inputs": f"Gaussian directions, {PIXELS} numbers, |x| = sqrt({PIXELS})",
        },
        "neural_tangents_implementation_3": structured_derivatives(),
        "cases": [],
    }
    steps = tqdm(total=len(plan.cases) + 3, desc="ntk", unit="case")
    for case in plan.cases:
        steps.set_postfix_str(_title(case))
        content["cases"].append(measure(case, plan.budget))
        steps.update()
    for name, work in (
        ("scaling", lambda: measure_scaling(plan.scaling, plan.budget)),
        ("large", lambda: _size(plan.large) | run_alone(measure_alone, plan.large, "theorykit", LIMIT, 2)),
        ("sharded", lambda: run_alone(measure_sharded, plan.sharded, plan.budget)),
    ):
        steps.set_postfix_str(name)
        content[name] = work()
        steps.update()
    steps.close()
    content["seconds"] = time.perf_counter() - start
    content["targets"] = targets(plan, content)
    return content


def targets(plan: Plan, content: dict[str, Any]) -> list[dict[str, Any]]:
    """The figures to reach."""
    found = []
    for case, measured in zip(plan.cases, content["cases"], strict=True):
        if case.least is not None:
            statement = f"{_title(case)}: at least {case.least:g} times faster than the best of neural-tangents"
            quotient = measured["times_faster"][measured["best_neural_tangents"]]
            found.append(_timing.target(statement, case.least, quotient, at_least=True))
    peak = content["large"]["peak_bytes"] / 2**30
    statement = f"{_title(plan.large)}: peak below {MOST_MEMORY} GiB"
    point = {"median": peak, "low": peak, "high": peak}
    found.append(_timing.target(statement, MOST_MEMORY, point, at_least=False))
    return found


def main(preset: Literal["smoke", "quick", "full"] = "quick", output: Path = _timing.RESULTS) -> None:
    """Measure, print what matters and write the JSON file.

    Parameters
    ----------
    preset
        smoke: seconds, only to see that it works; quick: a few minutes on two cores; full: half an hour.
    output
        Folder of the JSON file.
    """
    content = run(PLANS[preset])
    path = _timing.write("ntk", preset, output, content)
    for case in content["cases"]:
        print(_title(Case(case["depth"], case["width"], case["n"], case["z"])))
        for name, found in case["contestants"].items():
            faster = ""
            if name in case["times_faster"]:
                cpu = case["times_less_cpu"][name]["median"]
                faster = f"{case['times_faster'][name]['median']:8.1f} x ({cpu:.1f} x less processor time)"
            blocks = f" in blocks of {found['block']}" if found["block"] < case["n"] else ""
            peak = f"{found['alone']['peak_bytes'] / 2**20:8.0f} MiB" if found["alone"] else ""
            print(f"    {name:18s} {found['seconds']['median']:9.4f} s {faster:42s} {peak}{blocks}")
    scaling, large = content["scaling"], content["large"]
    for name in ("all", "wide"):
        fit = scaling[name]
        print(f"cost ~ M^{fit['exponent']:.3f} ({fit['low']:.3f} to {fit['high']:.3f}) for M in {fit['widths']}")
    gain = content["sharded"]["times_faster_on_two"]["median"]
    print(f"large kernel: {large['seconds']:.1f} s; one device of the host split in two: {gain:.2f} x as fast")
    _timing.print_targets(content["targets"])
    print(f"{content['seconds']:.0f} s in all, written to {path}")


if __name__ == "__main__":
    tyro.cli(main)
