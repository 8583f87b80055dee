r"""Time and memory of the exact contrastive risk, up to a million candidates on an alphabet of 512 x 512.

    python -m benchmarks.surrogate_risk --preset quick

Value, gradient and both directions take turns. Two checks on every case, or the benchmark fails: equal scores must give
ln K, and where few enough candidates allow it, sampling must agree within five of its standard errors. Memory is what
the compiled program takes beyond its arguments, and the peak of a fresh process.
"""

import math
import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import tyro
from tqdm import tqdm

from benchmarks import _timing
from theorykit.surrogate.joint import random_joint
from theorykit.surrogate.risk import contrastive_risk, contrastive_risk_by_sampling

MOST_SECONDS = 2.0  # for the target case, on two cores
SAMPLES, MOST_SAMPLED = 20_000, 1000  # samples of the check, and candidates up to which it is run
# Equal scores: sums over the table and about 150 nodes, in float64.
TOLERANCE = 1e-12


class Case(NamedTuple):
    """One size: symbols on each side, K, and the deviation of the Gaussian scores."""

    symbols: int
    candidates: int
    deviation: float = 1.0


class Plan(NamedTuple):
    """What a preset measures."""

    target: Case  # its value has to stay below MOST_SECONDS
    cases: tuple[Case, ...]
    budget: _timing.Budget


TARGET = Case(512, 10**6)
SWEEP = (Case(512, 2), Case(512, 1000), Case(512, 10**6, 10.0), Case(512, 2, 10.0), Case(64, 10**6), Case(64, 2, 100.0))
PLANS = {
    "smoke": Plan(
        Case(16, 10**6),
        (Case(8, 4, 20.0),),
        _timing.Budget(visits=2, visit_seconds=0.0, patience=5.0),
    ),
    "quick": Plan(TARGET, SWEEP, _timing.Budget(visits=5, visit_seconds=0.2, patience=10.0)),
    "full": Plan(
        TARGET,
        (*SWEEP, Case(1024, 10**6), Case(512, 2, 100.0)),
        _timing.Budget(visits=15, visit_seconds=0.5, patience=60.0),
    ),
}


def build(case: Case) -> tuple[tuple[jax.Array, jax.Array], dict[str, Callable[[], jax.Array]]]:
    """Joint and scores, and the contestants."""
    one, two = jax.random.split(jax.random.key(case.symbols))
    joint = random_joint(one, case.symbols, case.symbols)
    score = case.deviation * jax.random.normal(two, joint.shape)
    gradient = jax.jit(jax.grad(contrastive_risk, argnums=1))
    # An array, so that one program serves every K.
    count = jnp.asarray(case.candidates, joint.dtype)
    return (joint, score), {
        "value": lambda: contrastive_risk(joint, score, count),
        "both directions": lambda: contrastive_risk(joint, score, count, side="both"),
        "gradient": lambda: gradient(joint, score, count),
    }


def measure(case: Case, budget: _timing.Budget) -> dict[str, Any]:
    """Time and memory of one case, after its checks."""
    load = _timing.load()
    (joint, score), contestants = build(case)
    samples = _timing.interleave(contestants, budget, _title(case))
    return {
        **case._asdict(),
        "load": [load, _timing.load()],
        "contestants": {
            name: {"seconds": _timing.summary(found.wall), "cpu_seconds": _timing.summary(found.cpu)}
            for name, found in samples.items()
        },
        "table_bytes": joint.nbytes,
        "compiled_bytes": compiled_bytes(joint, score, case),
        "risk": float(samples["value"].value),
        **check(joint, score, case, float(samples["value"].value)),
    }


def check(joint: jax.Array, score: jax.Array, case: Case, value: float) -> dict[str, Any]:
    """Errors against what is known otherwise; raises where they are too large."""
    equal = float(contrastive_risk(joint, jnp.zeros_like(score), case.candidates))
    error = abs(equal - math.log(case.candidates))
    if not error <= TOLERANCE * max(1.0, math.log(case.candidates)):
        raise AssertionError(f"{_title(case)}: equal scores give {equal}, not ln K; the error is {error:.2g}")
    if case.candidates > MOST_SAMPLED:
        return {"error_of_equal_scores": error, "sampled": None}
    estimate = contrastive_risk_by_sampling(joint, score, case.candidates, key=jax.random.key(0), samples=SAMPLES)
    away = abs(float(estimate.value) - value) / float(estimate.standard_error)
    if not away <= 5:
        raise AssertionError(f"{_title(case)}: sampling is {away:.1f} standard errors away from the exact risk {value}")
    return {"error_of_equal_scores": error, "sampled": {**jax.tree.map(float, estimate._asdict()), "errors_away": away}}


def compiled_bytes(joint: jax.Array, score: jax.Array, case: Case) -> dict[str, int]:
    """What the compiled programs need beyond arguments and results."""
    found = {}
    for name, function in (("value", contrastive_risk), ("gradient", jax.grad(contrastive_risk, argnums=1))):
        compiled = jax.jit(function).lower(joint, score, jnp.asarray(case.candidates, joint.dtype)).compile()
        found[name] = compiled.memory_analysis().temp_size_in_bytes
    return found


def measure_alone(case: Case) -> dict[str, Any]:
    """Peak memory of value and gradient, inputs and compilation included; to be called in a fresh interpreter."""
    with jax.enable_x64(True):
        jax.block_until_ready(jnp.zeros(()))  # the backend
        before = _timing.peak_resident()
        _, contestants = build(case)
        for name in ("value", "gradient"):
            jax.block_until_ready(contestants[name]())
        peak = _timing.peak_resident()
    return {**case._asdict(), "peak_bytes": peak, "increase_bytes": peak - before}


def run(plan: Plan) -> dict[str, Any]:
    """Everything that a preset measures."""
    start = time.perf_counter()
    with ProcessPoolExecutor(max_workers=1, mp_context=multiprocessing.get_context("spawn")) as pool:
        alone = pool.submit(measure_alone, plan.target).result()
    with jax.enable_x64(True):
        cases = [
            measure(case, plan.budget) for case in tqdm((plan.target, *plan.cases), desc="surrogate_risk", unit="case")
        ]
    statement = f"{_title(plan.target)}: at most {MOST_SECONDS:g} s"
    target = _timing.target(statement, MOST_SECONDS, cases[0]["contestants"]["value"]["seconds"], at_least=False)
    return {
        "settings": {**plan.budget._asdict(), "dtype": "float64", "samples_of_check": SAMPLES},
        "cases": cases,
        "alone": alone,
        "seconds": time.perf_counter() - start,
        "targets": [target],
    }


def _title(case):
    return f"{case.symbols} x {case.symbols}, K {case.candidates:,}, deviation {case.deviation:g}"


def main(preset: Literal["smoke", "quick", "full"] = "quick", output: Path = _timing.RESULTS) -> None:
    """Measure, print what matters and write the JSON file.

    Parameters
    ----------
    preset
        smoke: seconds, only to see that it works; quick: a minute on two cores; full: several minutes.
    output
        Folder of the JSON file.
    """
    content = run(PLANS[preset])
    path = _timing.write("surrogate_risk", preset, output, content)
    for case in content["cases"]:
        times = ", ".join(
            f"{name} {found['seconds']['median']:.4f} s ({found['cpu_seconds']['median']:.3f} s of processor)"
            for name, found in case["contestants"].items()
        )
        memory = {name: size / 2**20 for name, size in case["compiled_bytes"].items()}
        blocks = (
            f"{memory['value']:.1f} and {memory['gradient']:.1f} MiB beyond tables of {case['table_bytes'] / 2**20:.2g}"
        )
        print(f"{_title(Case(case['symbols'], case['candidates'], case['deviation']))}: {times}; {blocks} MiB")
    alone = content["alone"]["increase_bytes"] / 2**20
    print(f"alone: {alone:.0f} MiB on top of the interpreter, inputs and compilation included")
    _timing.print_targets(content["targets"])
    print(f"{content['seconds']:.0f} s in all, written to {path}")


if __name__ == "__main__":
    tyro.cli(main)
