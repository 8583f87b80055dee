"""Time and memory of exact search against faiss (flat) and against the bare matrix product that it cannot do without.

    python -m benchmarks.search_exact --preset quick

Search, product and faiss take turns on the same clustered data and cores. Every case is checked, or the benchmark
fails: distances must agree with those of faiss, and no row that faiss names may be nearer. Memory is that of a fresh
process, beyond the data. Peers are no dependency: install faiss-cpu beside the project.
"""

import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from tqdm import tqdm

from benchmarks import _timing
from benchmarks._search_data import clustered
from theorykit.search import exact, knn, rerank

LEAST_OVER_FAISS = {10: 2.5, 100: 2.0}  # k: times the speed of faiss
MOST_OVER_PRODUCT = 1.5  # times the bare product, for k = 10
MOST_BEYOND_DATA = 2 * 2**30
# faiss adds squared norms and a product in float32: d + 4 roundings, of numbers of the size of the squared norms.
ROUNDOFF = 2.0**-24


class Case(NamedTuple):
    """One size."""

    rows: int
    dimension: int
    queries: int
    k: int
    metric: str = "l2"


class Plan(NamedTuple):
    """What a preset measures."""

    cases: tuple[Case, ...]
    alone: Case  # memory
    budget: _timing.Budget


TARGETS = (Case(200_000, 128, 2000, 10), Case(200_000, 128, 2000, 100))
SWEEP = (
    Case(200_000, 128, 2000, 10, "ip"),
    Case(200_000, 128, 2000, 10, "cosine"),
    Case(200_000, 128, 1, 10),
    Case(20_000, 128, 2000, 10),
)
PLANS = {
    "smoke": Plan((Case(3000, 16, 50, 10),), Case(5000, 16, 8, 10), _timing.Budget(2, 0.0, 5.0)),
    "quick": Plan((*TARGETS, *SWEEP), Case(10**6, 128, 256, 10), _timing.Budget(5, 0.0, 15.0)),
    "full": Plan(
        (*TARGETS, *SWEEP, Case(10**6, 128, 2000, 10), Case(200_000, 768, 2000, 10)),
        Case(10**6, 128, 2000, 10),
        _timing.Budget(9, 0.0, 60.0),
    ),
}


@jax.jit
def product(queries: jax.Array, base: jax.Array) -> jax.Array:
    """The bare matrix product."""
    return jnp.matmul(queries, base.T, precision="highest")


def build(case: Case) -> tuple[tuple[np.ndarray, np.ndarray], dict[str, Callable[[], Any]]]:
    """Data and contestants."""
    try:
        import faiss
    except ImportError as error:
        raise ImportError("benchmarks.search_exact compares with faiss: pip install faiss-cpu") from error
    base, queries = clustered(case.rows, case.dimension, case.queries)
    if case.metric == "cosine":
        # faiss has no cosine: unit vectors give its order by inner products.
        base, queries = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (base, queries))
    index = (faiss.IndexFlatL2 if case.metric == "l2" else faiss.IndexFlatIP)(case.dimension)
    index.add(base)
    rows, points = jnp.asarray(base), jnp.asarray(queries)
    return (base, queries), {
        "search": lambda: knn(rows, points, case.k, metric=case.metric),
        "product": lambda: product(points, rows),
        "faiss": lambda: index.search(queries, case.k),
    }


def measure(case: Case, budget: _timing.Budget) -> dict[str, Any]:
    """Times of one case, after its checks."""
    load = _timing.load()
    (base, queries), contestants = build(case)
    samples = _timing.interleave(contestants, budget, _title(case))
    return {
        **case._asdict(),
        "load": [load, _timing.load()],
        "contestants": {
            name: {"seconds": _timing.summary(found.wall), "cpu_seconds": _timing.summary(found.cpu)}
            for name, found in samples.items()
        },
        "faiss_over_search": _timing.ratio(samples["faiss"].wall, samples["search"].wall),
        "search_over_product": _timing.ratio(samples["search"].wall, samples["product"].wall),
        "cpu_faiss_over_search": _timing.ratio(samples["faiss"].cpu, samples["search"].cpu),
        "cpu_search_over_product": _timing.ratio(samples["search"].cpu, samples["product"].cpu),
        **check(case, base, queries, samples["search"].value, samples["faiss"].value),
    }


def check(case: Case, base: np.ndarray, queries: np.ndarray, found: Any, peer: Any) -> dict[str, Any]:
    """Agreement with faiss; raises where it is not that of two exact searches."""
    distances = peer[0] if case.metric == "l2" else -peer[0] if case.metric == "ip" else 1 - peer[0]
    size = max(float(np.max(np.sum(x * x, axis=1))) for x in (base, queries))
    tolerance = 2 * (case.dimension + 4) * ROUNDOFF * size
    difference = float(np.max(np.abs(np.asarray(found.distances) - distances)))
    # The rows that faiss names, by our distances: none may be nearer than ours, place by place.
    ranked = rerank(base, queries, peer[1], metric=case.metric)
    nearer = float(np.max(np.asarray(found.distances) - np.asarray(ranked.distances)))
    if not (difference <= tolerance and nearer <= 0):
        raise AssertionError(
            f"{_title(case)}: distances differ by {difference:.2g} with {tolerance:.2g} allowed, and faiss found rows "
            f"nearer by {nearer:.2g}"
        )
    same = float(np.mean(np.asarray(found.ids) == peer[1]))
    return {"difference": difference, "tolerance": tolerance, "same_ids": same}


def measure_alone(case: Case) -> dict[str, Any]:
    """Peak memory beyond the data, compilation included; to be called in a fresh interpreter."""
    jax.block_until_ready(jnp.zeros(()))  # the backend
    before = _timing.peak_resident()
    base, queries = clustered(case.rows, case.dimension, case.queries)
    start = time.perf_counter()
    jax.block_until_ready(knn(base, queries, case.k, metric=case.metric))
    seconds = time.perf_counter() - start
    beyond = _timing.peak_resident() - before - base.nbytes - queries.nbytes
    return {**case._asdict(), "memory": exact.MEMORY, "beyond_data_bytes": beyond, "first_call_seconds": seconds}


def run(plan: Plan) -> dict[str, Any]:
    """Everything that a preset measures."""
    start = time.perf_counter()
    with ProcessPoolExecutor(max_workers=1, mp_context=multiprocessing.get_context("spawn")) as pool:
        alone = pool.submit(measure_alone, plan.alone).result()
    cases = [measure(case, plan.budget) for case in tqdm(plan.cases, desc="search_exact", unit="case")]
    targets = []
    for case, found in zip(plan.cases, cases, strict=True):
        if case in TARGETS:
            limit = LEAST_OVER_FAISS[case.k]
            statement = f"{_title(case)}: at least {limit:g} times as fast as faiss flat"
            targets.append(_timing.target(statement, limit, found["faiss_over_search"], at_least=True))
        if case == TARGETS[0]:
            statement = f"{_title(case)}: at most {MOST_OVER_PRODUCT:g} times the bare product"
            targets.append(_timing.target(statement, MOST_OVER_PRODUCT, found["search_over_product"], at_least=False))
    beyond = alone["beyond_data_bytes"]
    statement = f"{_title(plan.alone)}: bytes beyond the data, at most {MOST_BEYOND_DATA:.4g}"
    measured = {"median": beyond, "low": beyond, "high": beyond}
    targets.append(_timing.target(statement, MOST_BEYOND_DATA, measured, at_least=False))
    return {
        "settings": {**plan.budget._asdict(), "dtype": "float32", "memory": exact.MEMORY},
        "cases": cases,
        "alone": alone,
        "seconds": time.perf_counter() - start,
        "targets": targets,
    }


def _title(case):
    return f"{case.rows:,} x {case.dimension}, {case.queries} queries, k = {case.k}, {case.metric}"


def main(preset: Literal["smoke", "quick", "full"] = "quick", output: Path = _timing.RESULTS) -> None:
    """Measure, print what matters and write the JSON file.

    Parameters
    ----------
    preset
        smoke: seconds, only to see that it works; quick: two minutes on two cores; full: many minutes.
    output
        Folder of the JSON file.
    """
    content = run(PLANS[preset])
    path = _timing.write("search_exact", preset, output, content)
    for case in content["cases"]:
        times = ", ".join(
            f"{name} {found['seconds']['median']:.4f} s ({found['cpu_seconds']['median']:.3f} s of processor)"
            for name, found in case["contestants"].items()
        )
        faiss, bare = case["faiss_over_search"]["median"], case["search_over_product"]["median"]
        print(f"{_title(Case(*(case[name] for name in Case._fields)))}: {times}; faiss {faiss:.2f}, product {bare:.2f}")
    alone = content["alone"]
    print(f"alone: {alone['beyond_data_bytes'] / 2**20:.0f} MiB beyond the data")
    _timing.print_targets(content["targets"])
    print(f"{content['seconds']:.0f} s in all, written to {path}")


if __name__ == "__main__":
    tyro.cli(main)
