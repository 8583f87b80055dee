"""Search on an accelerator: a million rows prepared, exact and graph queries a second, and what the programs contain.

    python -m benchmarks.search_gpu --preset quick

Rows are clustered (`_search_data`) and lie on the device before anything is timed. Recall is recall@10 against exact
search, ties forgiven: a distance up to d_10 (1 + 1e-5) counts. Compilation is told apart: the first call of everything
is timed by itself. The compiled programs are searched for sorts, since a full sort where a selection should stand is
what makes exact search slow on a GPU. There is no peer: the figures to reach are absolute.
"""

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
import tyro
from tqdm import tqdm

from benchmarks import _timing
from benchmarks._search_data import clustered, recall
from theorykit.search import build_graph, knn, query_graph

K = 10
LEAST_RECALL = 0.95
MOST_BUILD = 3.5  # seconds
LEAST_EXACT, LEAST_GRAPH = 3e5, 1e6  # queries a second
SORT = re.compile(r"= \(?\w+\[([\d,]*)\][^=\n]* sort\(.*?dimensions=\{(\d+)\}")
# What XLA makes of a sort of numbers on a GPU; along the last axis.
RADIX_SORT = re.compile(r"= \(?\w+\[(?:\d+,)*(\d+)\][^\n]*custom_call_target=\"__cub\$DeviceRadixSort")


class Plan(NamedTuple):
    """What a preset measures."""

    rows: int
    dimension: int
    queries: int
    beams: tuple[int, ...]
    builds: int  # after the first
    budget: _timing.Budget


PLANS = {
    "smoke": Plan(3000, 16, 100, (16, 32), 1, _timing.Budget(2, 0.0, 5.0)),
    # With compilation within 8 minutes on one H200.
    "quick": Plan(10**6, 128, 100_000, (8, 12, 16, 24, 32, 48, 64), 2, _timing.Budget(5, 0.0, 20.0)),
    "full": Plan(10**6, 128, 1_000_000, (8, 12, 16, 24, 32, 48, 64, 96, 128), 5, _timing.Budget(9, 0.0, 60.0)),
}


def first(function: Callable[[], Any]) -> tuple[Any, float]:
    """Value and seconds of a first call, compilation included."""
    start = time.perf_counter()
    value = jax.block_until_ready(function())
    return value, time.perf_counter() - start


def longest_sort(function: Callable[..., Any], *arguments: jax.Array) -> int:
    """The most numbers that one sort of the compiled program puts in order; 0 without a sort."""
    return longest_sort_of(jax.jit(function).lower(*arguments).compile().as_text())


def longest_sort_of(text: str) -> int:
    """The same of the text of a compiled program."""
    lengths = [int(shape.split(",")[int(axis)]) for shape, axis in SORT.findall(text) if shape]
    return max([*lengths, *map(int, RADIX_SORT.findall(text))], default=0)


def measure(plan: Plan) -> dict[str, Any]:
    """Builds, exact search, and graph search at several beams."""
    data = clustered(plan.rows, plan.dimension, plan.queries)
    base, queries = jax.block_until_ready(jax.device_put(tuple(data)))

    def build():
        return build_graph(base, key=jax.random.key(0), progress=False)

    with tqdm(total=3 + len(plan.beams), desc="search_gpu", unit="step") as bar:
        graph, first_build = first(build)
        builds = []
        for _ in range(plan.builds):
            graph, seconds = first(build)
            builds.append(seconds)
        bar.update()
        exact, first_exact = first(lambda: knn(base, queries, K))
        last = np.asarray(exact.distances)[:, -1]
        timed = _timing.interleave({"exact": lambda: knn(base, queries, K)}, plan.budget, "exact")["exact"].wall
        bar.update()
        # A part of the queries: the program is the same, chunk by chunk.
        part = queries[: min(plan.queries, 4096)]
        sorts = {
            "exact": longest_sort(lambda b, q: knn(b, q, K), base, part),
            "graph": longest_sort(lambda g, q: query_graph(g, q, K, beam=plan.beams[-1]), graph, part),
        }
        bar.update()
        beams = []
        for beam in plan.beams:

            def search(beam=beam):
                return query_graph(graph, queries, K, beam=beam)

            found, cold = first(search)
            walls = _timing.interleave({"graph": search}, plan.budget, f"beam {beam}")["graph"].wall
            speed = _timing.summary([plan.queries / wall for wall in walls])
            right = recall(np.asarray(found.distances), last)
            beams.append({"beam": beam, "recall": right, "first_seconds": cold, "per_second": speed})
            bar.update()
    return {
        "build": {"first_seconds": first_build, "seconds": _timing.summary(builds)},
        "exact": {
            "first_seconds": first_exact,
            "per_second": _timing.summary([plan.queries / wall for wall in timed]),
        },
        "graph": beams,
        "unreachable": int(graph.unreachable),
        "longest_sort": sorts,
    }


def targets(plan: Plan, found: dict[str, Any]) -> list[dict[str, Any]]:
    """The figures to reach."""
    name = f"{plan.rows:,} x {plan.dimension}"
    build, exact = found["build"]["seconds"], found["exact"]["per_second"]
    reached = [one["per_second"] for one in found["graph"] if one["recall"] >= LEAST_RECALL]
    fastest = max(reached, key=lambda speed: speed["median"], default={"median": 0.0, "low": 0.0, "high": 0.0})
    sorts = {key: float(max(found["longest_sort"].values())) for key in ("median", "low", "high")}
    statement = f"{name}, graph: queries a second at recall {LEAST_RECALL:g}, at least {LEAST_GRAPH:g}"
    return [
        _timing.target(
            f"{name}: seconds of a build, at most {MOST_BUILD:g}", MOST_BUILD, _plain(build), at_least=False
        ),
        _timing.target(
            f"{name}, exact: queries a second, at least {LEAST_EXACT:g}", LEAST_EXACT, _plain(exact), at_least=True
        ),
        _timing.target(statement, LEAST_GRAPH, _plain(fastest), at_least=True),
        _timing.target(f"{name}: numbers in the longest sort, below the rows", plan.rows - 1, sorts, at_least=False),
    ]


def _plain(found):
    return {key: found[key] for key in ("median", "low", "high")}


def main(preset: Literal["smoke", "quick", "full"] = "quick", output: Path = _timing.RESULTS) -> None:
    """Measure, print what matters and write the JSON file.

    Parameters
    ----------
    preset
        smoke: seconds on any machine, only to see that it works; quick: minutes on an accelerator; full: more queries.
    output
        Folder of the JSON file.
    """
    if preset != "smoke" and jax.default_backend() == "cpu":
        raise SystemExit(
            "search_gpu: JAX sees no accelerator, and its figures are for one; install JAX for yours, "
            "or run benchmarks.search_exact and benchmarks.search_graph"
        )
    plan, start = PLANS[preset], time.perf_counter()
    found = measure(plan)
    content = {"settings": {**plan._asdict(), "budget": plan.budget._asdict(), "k": K, "metric": "l2"}, **found}
    content |= {"seconds": time.perf_counter() - start, "targets": targets(plan, found)}
    path = _timing.write("search_gpu", preset, output, content)
    build = found["build"]
    print(f"build {build['seconds']['median']:.2f} s (first, compiled: {build['first_seconds']:.1f} s)")
    print(f"exact {found['exact']['per_second']['median']:,.0f} queries a second")
    for one in found["graph"]:
        print(f"beam {one['beam']}: {one['per_second']['median']:,.0f} queries a second, recall {one['recall']:.3f}")
    print(f"longest sort: {found['longest_sort']}")
    _timing.print_targets(content["targets"])
    print(f"{content['seconds']:.0f} s in all, written to {path}")


if __name__ == "__main__":
    tyro.cli(main)
