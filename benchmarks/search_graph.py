r"""Graph search against hnswlib and pynndescent: queries a second at equal recall, build time and memory.

    python -m benchmarks.search_graph --preset quick

All contestants get the same clustered rows, the same queries and the same cores, and take turns. Recall is recall@10
against exact search, ties forgiven: a distance up to d_10 (1 + 1e-5) counts. Each contestant is first swept over its
beam; for every bucket of recall the narrowest beam that reaches it is then timed, in batches and query by query.
Programs are compiled before anything is timed. Peers that are not installed are left out, and so are their targets.
"""

import importlib.util
import math
import multiprocessing
import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
import tyro
from tqdm import tqdm

from benchmarks import _timing
from benchmarks._search_data import Data, clustered, recall
from theorykit.search.exact import knn
from theorykit.search.graph import build_graph, query_graph

K = 10
BUCKETS = (0.90, 0.95, 0.99)
TARGET_BUCKET = 0.95
LEAST_SPEED, MOST_BUILD = 0.5, 3.0  # against hnswlib
BEAMS = (4, 8, 12, 16, 20, 24, 32, 48, 64, 96, 128)
EFS = (10, 16, 24, 32, 40, 48, 56, 64, 80, 96, 128, 160, 200, 300, 400, 600)
EPSILONS = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.6)
SINGLES = 50  # queries asked one by one


class Case(NamedTuple):
    """One set of rows."""

    n: int
    d: int
    queries: int
    peers: tuple[str, ...] = ("hnswlib", "pynndescent")
    builds: int = 3  # samples of the build time; 1 takes the first build, compilation included


class Plan(NamedTuple):
    """What a preset measures; the first case is the one with targets."""

    cases: tuple[Case, ...]
    budget: _timing.Budget


PLANS = {
    "smoke": Plan(
        (Case(2000, 16, 200, ("hnswlib",), builds=1),), _timing.Budget(visits=1, visit_seconds=0.0, patience=5.0)
    ),
    "quick": Plan((Case(100_000, 96, 4000, ("hnswlib",)),), _timing.Budget(visits=5, visit_seconds=0.2, patience=10.0)),
    "full": Plan(
        (Case(100_000, 96, 4000), Case(1_000_000, 128, 4000, ("hnswlib",), builds=1)),
        _timing.Budget(visits=9, visit_seconds=0.5, patience=60.0),
    ),
}


class Contestant(NamedTuple):
    """How an index is built, and asked: build() -> index; search(index, queries, setting) -> distances (q, K)."""

    build: Callable[[], Any]
    search: Callable[[Any, np.ndarray, float], np.ndarray]
    settings: tuple[float, ...]


def contestants(data: Data, case: Case) -> dict[str, Contestant]:
    """Ours, and the peers that are wanted and installed."""
    threads = os.cpu_count()

    def ours(graph, queries, beam):
        return np.asarray(query_graph(graph, queries, K, beam=beam).distances)

    found = {
        "theorykit": Contestant(
            lambda: jax.block_until_ready(build_graph(data.base, key=jax.random.key(0), progress=False)), ours, BEAMS
        )
    }
    if "hnswlib" in case.peers and importlib.util.find_spec("hnswlib"):
        import hnswlib

        def build():
            index = hnswlib.Index("l2", case.d)
            index.init_index(case.n, M=16, ef_construction=100, random_seed=0)
            index.set_num_threads(threads)
            index.add_items(data.base)
            return index

        def search(index, queries, ef):
            index.set_ef(ef)
            return index.knn_query(queries, K)[1]

        found["hnswlib"] = Contestant(build, search, EFS)
    if "pynndescent" in case.peers and importlib.util.find_spec("pynndescent"):
        import pynndescent

        def descend():
            index = pynndescent.NNDescent(data.base, "sqeuclidean", n_neighbors=30, random_state=0, n_jobs=threads)
            index.prepare()
            return index

        found["pynndescent"] = Contestant(
            descend, lambda index, queries, epsilon: index.query(queries, K, epsilon)[1], EPSILONS
        )
    return found


def measure(case: Case, budget: _timing.Budget) -> dict[str, Any]:
    """Build, sweep, and time every contestant."""
    load = _timing.load()
    data = clustered(case.n, case.d, case.queries)
    last = np.asarray(knn(data.base, data.queries, K).distances)[:, -1]
    field = contestants(data, case)
    if case.builds == 1:
        indexes, seconds = {}, {}
        for name, contestant in field.items():
            start = time.perf_counter()
            indexes[name] = contestant.build()
            seconds[name] = [time.perf_counter() - start]
    else:
        built = _timing.interleave(
            {name: contestant.build for name, contestant in field.items()},
            # As many rounds as asked for, whatever they take.
            _timing.Budget(visits=case.builds, visit_seconds=0.0, patience=math.inf),
            f"{_title(case)}: build",
        )
        indexes = {name: samples.value for name, samples in built.items()}
        seconds = {name: samples.wall for name, samples in built.items()}
    sweeps = {name: sweep(contestant, indexes[name], data.queries, last) for name, contestant in field.items()}
    return {
        **case._asdict(),
        "load": [load, _timing.load()],
        "build": {name: _timing.summary(walls) for name, walls in seconds.items()},
        "build_ratio": {name: _timing.ratio(seconds["theorykit"], walls) for name, walls in seconds.items()},
        "sweep": sweeps,
        "buckets": [bucket(least, field, indexes, sweeps, data.queries, budget) for least in BUCKETS],
    }


def sweep(contestant: Contestant, index: Any, queries: np.ndarray, last: np.ndarray) -> list[dict[str, float]]:
    """Recall and a first time of every setting, until all buckets are reached."""
    found = []
    for setting in contestant.settings:
        contestant.search(index, queries, setting)  # compilation
        start = time.perf_counter()
        distances = contestant.search(index, queries, setting)
        seconds = time.perf_counter() - start
        found.append({"setting": setting, "recall": recall(distances, last), "per_second": len(queries) / seconds})
        if found[-1]["recall"] >= max(BUCKETS):
            break
    return found


def bucket(least, field, indexes, sweeps, queries, budget) -> dict[str, Any]:
    """Queries a second of the narrowest settings that reach a recall; batch and query by query, taking turns."""
    chosen = {}
    for name, points in sweeps.items():
        reaching = [point for point in points if point["recall"] >= least]
        if reaching:
            chosen[name] = reaching[0]

    def batch(name):
        return lambda: field[name].search(indexes[name], queries, chosen[name]["setting"])

    def singles(name):
        def ask():
            for one in queries[:SINGLES]:
                answer = field[name].search(indexes[name], one[None], chosen[name]["setting"])
            return answer

        return ask

    result = {"recall": least, "chosen": chosen}
    for kind, ask, count in (("batch", batch, len(queries)), ("single", singles, min(SINGLES, len(queries)))):
        samples = _timing.interleave({name: ask(name) for name in chosen}, budget, f"recall {least:g}, {kind}")
        walls = {name: found.wall for name, found in samples.items()}
        result[kind] = {
            "per_second": {name: _timing.summary([count / wall for wall in found]) for name, found in walls.items()},
            # The speed of ours in units of the peer's.
            "ratio": {name: _timing.ratio(found, walls["theorykit"]) for name, found in walls.items()}
            if "theorykit" in walls
            else {},
        }
    return result


def measure_alone(case: Case) -> dict[str, Any]:
    """Peak memory of a build, rows and compilation included; to be called in a fresh interpreter."""
    base = clustered(case.n, case.d, 1).base
    jax.block_until_ready(jax.numpy.zeros(()))  # the backend
    before = _timing.peak_resident()
    jax.block_until_ready(build_graph(base, key=jax.random.key(0), progress=False))
    peak = _timing.peak_resident()
    return {"n": case.n, "d": case.d, "peak_bytes": peak, "increase_bytes": peak - before, "rows_bytes": base.nbytes}


def targets(case: dict[str, Any]) -> list[dict[str, Any]]:
    """The figures to reach against hnswlib, where it took part."""
    name = _title(Case(case["n"], case["d"], case["queries"]))
    found = []
    (reached,) = (part for part in case["buckets"] if part["recall"] == TARGET_BUCKET)
    ratio = reached["batch"]["ratio"].get("hnswlib")
    if ratio:
        statement = f"{name}, recall {TARGET_BUCKET:g}: queries a second of hnswlib's, at least {LEAST_SPEED:g}"
        found.append(_timing.target(statement, LEAST_SPEED, ratio, at_least=True))
    if "hnswlib" in case["build_ratio"]:
        statement = f"{name}: build time of hnswlib's, at most {MOST_BUILD:g}"
        found.append(_timing.target(statement, MOST_BUILD, case["build_ratio"]["hnswlib"], at_least=False))
    return found


def run(plan: Plan) -> dict[str, Any]:
    """Everything that a preset measures."""
    start = time.perf_counter()
    with ProcessPoolExecutor(max_workers=1, mp_context=multiprocessing.get_context("spawn")) as pool:
        alone = [pool.submit(measure_alone, case).result() for case in plan.cases]
    cases = [measure(case, plan.budget) for case in tqdm(plan.cases, desc="search_graph", unit="case")]
    return {
        "settings": {**plan.budget._asdict(), "k": K, "metric": "l2", "threads": os.cpu_count()},
        "cases": cases,
        "alone": alone,
        "seconds": time.perf_counter() - start,
        "targets": targets(cases[0]),
    }


def _title(case):
    return f"{case.n:,} x {case.d}"


def main(preset: Literal["smoke", "quick", "full"] = "quick", output: Path = _timing.RESULTS) -> None:
    """Measure, print what matters and write the JSON file.

    Parameters
    ----------
    preset
        smoke: seconds, only to see that it works; quick: 10^5 rows, some minutes; full: 10^6 rows as well, an hour.
    output
        Folder of the JSON file.
    """
    content = run(PLANS[preset])
    path = _timing.write("search_graph", preset, output, content)
    for case, alone in zip(content["cases"], content["alone"], strict=True):
        builds = ", ".join(f"{name} {found['median']:.1f} s" for name, found in case["build"].items())
        memory = f"{alone['increase_bytes'] / 2**30:.2f} GiB beyond {alone['rows_bytes'] / 2**30:.2f} GiB of rows"
        print(f"{case['n']:,} x {case['d']}: build {builds}; {memory}")
        for part in case["buckets"]:
            for kind in ("batch", "single"):
                speeds = ", ".join(
                    f"{name} {found['median']:,.0f} ({part['chosen'][name]['recall']:.3f})"
                    for name, found in part[kind]["per_second"].items()
                )
                print(f"  recall {part['recall']:g}, {kind}: queries a second (recall) {speeds}")
    _timing.print_targets(content["targets"])
    print(f"{content['seconds']:.0f} s in all, written to {path}")


if __name__ == "__main__":
    tyro.cli(main)
