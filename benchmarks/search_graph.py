r"""Graph search against hnswlib, pynndescent and faiss: queries a second at equal recall, build time and memory.

    python -m benchmarks.search_graph --preset quick
    python -m benchmarks.search_graph --preset full --rows 1000000
    python -m benchmarks.search_graph --data embeddings.npy

All contestants get the same rows, the same queries and the same cores, and take turns. Recall is recall@10 against
exact search, ties forgiven: a distance up to d_10 (1 + 1e-5) counts. Each contestant is first swept over its beam; for
every bucket of recall the narrowest beam that reaches it is then timed, in batches and query by query. Programs are
compiled before anything is timed. Memory is that of a build in a fresh process. Peers that are not installed are left
out, and so are their targets.
"""

import importlib.util
import math
import multiprocessing
import os
import pickle
import tempfile
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
from benchmarks._search_data import Data, clustered, digits, from_file, recall
from theorykit.search import build_graph, knn, load, query_graph, save

K = 10
BUCKETS = (0.90, 0.95, 0.99)
TARGET_BUCKET = 0.95
LEAST_SPEED, MOST_BUILD = 0.5, 3.0  # against hnswlib
MILLION, MOST_SECONDS, MOST_MEMORY = 10**6, 1200.0, 6 * 2**30  # of a build of so many rows; rows included
BEAMS = (4, 8, 12, 16, 20, 24, 32, 48, 64, 96, 128, 192, 256, 384)
EFS = (10, 16, 24, 32, 40, 48, 56, 64, 80, 96, 128, 160, 200, 300, 400, 600)
EPSILONS = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.6)
PROBES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
SINGLES = 50  # queries asked one by one
FILE_QUERIES = 1000  # rows of a user's file that become queries


class Case(NamedTuple):
    """One set of rows."""

    n: int
    d: int
    queries: int
    peers: tuple[str, ...] = ("hnswlib", "pynndescent", "faiss")
    builds: int = 3  # samples of the build time; 1 takes the build whose memory is measured, compilation included
    data: str = "clustered"  # or "digits", or the path of a file


class Plan(NamedTuple):
    """What a preset measures; the first case is the one with targets."""

    cases: tuple[Case, ...]
    budget: _timing.Budget


PLANS = {
    "smoke": Plan(
        (Case(2000, 16, 200, ("hnswlib",), builds=1),), _timing.Budget(visits=1, visit_seconds=0.0, patience=5.0)
    ),
    "quick": Plan(
        (Case(100_000, 96, 4000), Case(40_000, 32, 4000, data="digits")),
        _timing.Budget(visits=5, visit_seconds=0.2, patience=10.0),
    ),
    "full": Plan(
        (
            Case(100_000, 96, 4000),
            Case(40_000, 32, 4000, data="digits"),
            Case(MILLION, 128, 4000, ("hnswlib",), builds=1),
        ),
        _timing.Budget(visits=9, visit_seconds=0.5, patience=60.0),
    ),
}


class Contestant(NamedTuple):
    """How an index is built, and asked: build(rows) -> index; search(index, queries, setting) -> distances (q, K)."""

    build: Callable[[np.ndarray], Any]
    search: Callable[[Any, np.ndarray, float], np.ndarray]
    settings: tuple[float, ...]
    save: Callable[[Path, Any], None]
    load: Callable[[Path], Any]


def rows_of(case: Case) -> Data:
    """What a case searches."""
    if case.data in MADE:
        return MADE[case.data](case.n, case.d, case.queries)
    return from_file(Path(case.data), case.queries)


MADE = {"clustered": clustered, "digits": digits}


def contestants(case: Case) -> dict[str, Contestant]:
    """Ours, and the peers that are wanted and installed."""
    threads = os.cpu_count()

    def ours(graph, queries, beam):
        return np.asarray(query_graph(graph, queries, K, beam=beam).distances)

    found = {
        "theorykit": Contestant(
            lambda rows: jax.block_until_ready(build_graph(rows, key=jax.random.key(0), progress=False)),
            ours,
            BEAMS,
            save,
            load,
        )
    }
    if "hnswlib" in case.peers and importlib.util.find_spec("hnswlib"):
        import hnswlib

        def build(rows):
            index = hnswlib.Index("l2", case.d)
            index.init_index(case.n, M=16, ef_construction=100, random_seed=0)
            index.set_num_threads(threads)
            index.add_items(rows)
            return index

        def search(index, queries, ef):
            index.set_ef(ef)
            return index.knn_query(queries, K)[1]

        def reload(path):
            index = hnswlib.Index("l2", case.d)
            index.load_index(str(path))
            index.set_num_threads(threads)
            return index

        found["hnswlib"] = Contestant(build, search, EFS, lambda path, index: index.save_index(str(path)), reload)
    if "pynndescent" in case.peers and importlib.util.find_spec("pynndescent"):
        import pynndescent

        def descend(rows):
            index = pynndescent.NNDescent(rows, "sqeuclidean", n_neighbors=30, random_state=0, n_jobs=threads)
            index.prepare()
            return index

        found["pynndescent"] = Contestant(
            descend,
            lambda index, queries, epsilon: index.query(queries, K, epsilon)[1],
            EPSILONS,
            lambda path, index: path.write_bytes(pickle.dumps(index)),
            lambda path: pickle.loads(path.read_bytes()),
        )
    if "faiss" in case.peers and importlib.util.find_spec("faiss"):
        lists = 4 * math.isqrt(case.n)  # of the inverted file: what faiss recommends at least
        found["faiss HNSW"] = _faiss(case.d, "HNSW16,Flat", {"efConstruction": 100}, "efSearch", EFS, threads)
        found["faiss IVF"] = _faiss(case.d, f"IVF{lists},Flat", {}, "nprobe", PROBES, threads)
    return found


def _faiss(d, kind, building, name, settings, threads):
    """One of faiss's indexes by its name, with parameters of building, and the one that a search varies."""
    import faiss

    faiss.omp_set_num_threads(threads)
    space = faiss.ParameterSpace()

    def build(rows):
        index = faiss.index_factory(d, kind)
        for parameter, value in building.items():
            space.set_index_parameter(index, parameter, value)
        index.train(rows)
        index.add(rows)
        return index

    def search(index, queries, setting):
        space.set_index_parameter(index, name, setting)
        return index.search(queries, K)[0]

    return Contestant(
        build,
        search,
        settings,
        lambda path, index: faiss.write_index(index, str(path)),
        lambda path: faiss.read_index(str(path)),
    )


def measure(case: Case, budget: _timing.Budget) -> dict[str, Any]:
    """Build, sweep, and time every contestant."""
    busy = _timing.load()
    field = contestants(case)
    with tempfile.TemporaryDirectory() as folder:
        paths = {name: Path(folder, name) if case.builds == 1 else None for name in field}
        alone = {name: in_fresh_process(measure_alone, case, name, paths[name]) for name in field}
        indexes = {name: field[name].load(path) for name, path in paths.items() if path}
    data = rows_of(case)
    last = np.asarray(knn(data.base, data.queries, K).distances)[:, -1]
    if case.builds == 1:
        seconds = {name: [one["seconds"]] for name, one in alone.items()}
    else:
        built = _timing.interleave(
            {name: lambda build=contestant.build: build(data.base) for name, contestant in field.items()},
            # As many rounds as asked for, whatever they take.
            _timing.Budget(visits=case.builds, visit_seconds=0.0, patience=math.inf),
            f"{_title(case)}: build",
        )
        indexes = {name: samples.value for name, samples in built.items()}
        seconds = {name: samples.wall for name, samples in built.items()}
    sweeps = {name: sweep(contestant, indexes[name], data.queries, last) for name, contestant in field.items()}
    return {
        **case._asdict(),
        "data": case.data if case.data in MADE else Path(case.data).name,
        "load": [busy, _timing.load()],
        "alone": alone,
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


def measure_alone(case: Case, name: str, path: Path | None) -> dict[str, Any]:
    """Peak memory and time of a build, compilation included; in a fresh interpreter. The index is saved to a path."""
    contestant, rows = contestants(case)[name], rows_of(case).base
    jax.block_until_ready(jax.numpy.zeros(()))  # the backend
    before, start = _timing.peak_resident(), time.perf_counter()
    index = contestant.build(rows)
    seconds, peak = time.perf_counter() - start, _timing.peak_resident()
    if path:
        contestant.save(path, index)
    return {"seconds": seconds, "peak_bytes": peak, "increase_bytes": peak - before, "rows_bytes": rows.nbytes}


def in_fresh_process(function: Callable, *arguments: Any) -> Any:
    """What the function returns in an interpreter of its own."""
    with ProcessPoolExecutor(max_workers=1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def targets(case: dict[str, Any]) -> list[dict[str, Any]]:
    """The figures to reach: against hnswlib, where it took part, and of a million rows."""
    name = _title(Case(case["n"], case["d"], case["queries"]))
    found = []
    if case["n"] == MILLION:
        alone = case["alone"]["theorykit"]
        for what, limit in (("seconds", MOST_SECONDS), ("peak_bytes", MOST_MEMORY)):
            statement = f"{name}: {what.replace('_', ' ')} of a build, at most {limit:g}"
            same = dict.fromkeys(("median", "low", "high"), float(alone[what]))
            found.append(_timing.target(statement, limit, same, at_least=False))
        return found
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
    cases = [measure(case, plan.budget) for case in tqdm(plan.cases, desc="search_graph", unit="case")]
    return {
        "settings": {**plan.budget._asdict(), "k": K, "metric": "l2", "threads": os.cpu_count()},
        "cases": cases,
        "seconds": time.perf_counter() - start,
        "targets": [one for case in cases if case["data"] == "clustered" for one in targets(case)],
    }


def _title(case):
    return f"{case.n:,} x {case.d}"


def main(
    preset: Literal["smoke", "quick", "full"] = "quick",
    output: Path = _timing.RESULTS,
    rows: int | None = None,
    data: Path | None = None,
) -> None:
    """Measure, print what matters and write the JSON file.

    Parameters
    ----------
    preset
        smoke: seconds, only to see that it works; quick: 10^5 rows, some minutes; full: 10^6 rows as well, an hour.
    output
        Folder of the JSON file.
    rows
        Only the preset's cases of so many rows; their file carries the number in its name.
    data
        A file of rows, .npy or .fvecs, in place of the preset's cases; a thousand of them are the queries.
    """
    plan, name = PLANS[preset], preset
    if data is not None:
        n, d = from_file(data, FILE_QUERIES).base.shape
        plan, name = plan._replace(cases=(Case(n, d, FILE_QUERIES, data=str(data)),)), f"{preset}-{data.stem}"
    elif rows is not None:
        plan, name = plan._replace(cases=tuple(case for case in plan.cases if case.n == rows)), f"{preset}-{rows}"
        if not plan.cases:
            raise SystemExit(f"search_graph: {preset} has no case of {rows} rows; {[c.n for c in PLANS[preset].cases]}")
    content = run(plan)
    path = _timing.write("search_graph", name, output, content)
    for case in content["cases"]:
        builds = ", ".join(
            f"{name} {found['median']:.1f} s and {case['alone'][name]['increase_bytes'] / 2**30:.2f} GiB"
            for name, found in case["build"].items()
        )
        print(f"{case['data']} {case['n']:,} x {case['d']}: build {builds} beyond the rows")
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
