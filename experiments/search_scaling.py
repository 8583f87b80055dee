r"""K1: what exact and graph search cost, and what the graph finds.

Exact search of Q queries among N rows of dimension d is one product of matrices, 2 N d Q operations; over P devices
each does a P-th. (Minima and the comparison of the winners, a tenth or two of that here, are counted apart.) A graph
search compares a query with E entry points and with the edges of the rows that it visits, R edges a row, so

    rows compared = E(N) + beam R,        E(N) = max(1024, 16 sqrt N) up to rounding,

which does not grow in proportion to N. What it gives up is recall: 1 - recall falls with the beam, and is 0 once the
beam holds all rows. Distances are those of the rows returned, whichever way they were found.

Operations are counted as they are executed (`experiments._search`), since XLA's own count takes the body of a loop
once; on a program without loops both agree (K1.count). Memory is what XLA allocates for the compiled program beyond
arguments and results. Wall time decides nothing here.

Rows are Gaussian of a lower dimension inside R^d, plus noise. Controls: the other kind of search, checked by the same
law; XLA's count of loops; all products at once; a graph whose edges lead to random rows; rows rounded to 8 bits.

Source: Ootomo et al. 2023 (arXiv 2308.15136) for search graphs; the laws: derivation.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from tqdm import tqdm

from experiments import _search
from experiments._side_by_side import BRIEFLY, side_by_side
from theorykit import results, search, verify

SOURCE = "derivation (operations of a product of matrices, of a best-first search)"
GRAPH = "Ootomo et al. 2023 (arXiv 2308.15136); derivation"
COUNT_ROWS, COUNT_QUERIES, COUNT_TILES = 1024, 64, 8  # of the program that checks the counting


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes; `rows` are searched at `d` and `queries`, the first of them also at other (d, Q)."""

    rows: tuple[int, ...] = (2048, 4096, 8192, 16384)
    d: int = 32
    queries: int = 512
    others: tuple[tuple[int, int], ...] = ((64, 512), (128, 512), (32, 1024), (32, 2048))
    dimension: int = 16
    noise: float = 0.05
    seeds: int = 8
    k: int = 10
    degree: int = 16
    beam: int = 32
    beams: tuple[int, ...] = (10, 16, 24, 32, 48, 64)  # at the largest number of rows
    complete: int = 8  # queries that visit all rows
    memory: int = 2**28
    memory_sizes: tuple[tuple[int, int, int], ...] = ((2**17, 128, 2048), (2**20, 128, 10_000))
    devices: tuple[int, ...] = (1, 2, 4, 8)
    overhead: float = results.threshold(0.05, "twenty times less than the factor two of a second pass over all rows")
    exponent: float = results.threshold(0.05, "a tenth of the distance between the exponents 1/2 and 1")
    recall: float = results.threshold(
        0.9, "a beam of 32 with 16 edges is a short search; beams up to 64 are drawn beside it"
    )
    fall: float = results.threshold(1.0, "over the range, twice the beam leaves at most half of the misses")


PRESETS = {
    "smoke": Config(
        rows=(1024, 2048),
        others=((64, 1024),),
        seeds=5,
        beams=(10, 16, 32),
        memory_sizes=((2**17, 128, 2048),),
        devices=(),
    ),
    "quick": Config(),
    "full": Config(
        rows=(2048, 4096, 8192, 16384, 32768, 65536, 131072),
        others=((64, 512), (128, 512), (256, 512), (32, 1024), (32, 2048), (32, 4096)),
    ),
}


def run(config: Config) -> dict[str, np.ndarray]:
    """exact/... and graph/... of searches by seed and size, beam/... by seed and beam; count/, memory/ and devices/."""
    cells = [
        # The longest first, so that no thread waits for one at the end.
        *(("size", n) for n in reversed(config.rows)),
        *(("point", point) for point in _points(config)[len(config.rows) :]),
        *(("memory", sizes) for sizes in config.memory_sizes),
        ("count", None),
    ]
    built: dict[int, list] = {}

    def work(kind, size):
        found = {"size": _size, "point": _point, "memory": _memory, "count": _count}[kind]
        return found(config, size, built) if kind == "size" else found(config, size)

    with tqdm(desc="search_scaling", total=3, disable=None) as bar:
        found = dict(zip(cells, side_by_side(work, cells), strict=True))
        bar.update()
        beams = {n: config.beams if n == max(config.rows) else (config.beam,) for n in config.rows}
        searches = [(n, beam) for n in reversed(config.rows) for beam in sorted({config.beam, *beams[n]})]
        searches.append((config.rows[0], None))
        searched = dict(zip(searches, side_by_side(partial(_searched, config, built), searches), strict=True))
        bar.update()
        arrays = {"points": np.array(_points(config)), **found["count", None]}
        sizes = [found["size", n]["work"] for n in config.rows]
        others = [found["point", point] for point in _points(config)[len(config.rows) :]]
        arrays["exact/work"] = np.stack([*sizes, *others], axis=1)
        arrays["entries"] = np.stack([found["size", n]["entries"] for n in config.rows], axis=1)
        first, *_ = config.rows
        for name in ("work", "recall", "random"):
            arrays[f"graph/{name}"] = np.stack([searched[n, config.beam][name] for n in config.rows], axis=1)
            arrays[f"beam/{name}"] = np.stack([searched[max(config.rows), b][name] for b in config.beams], axis=1)
        arrays |= {f"first/{name}": value for name, value in searched[first, config.beam].items()}
        arrays |= searched[first, None]
        memory = [found["memory", sizes] for sizes in config.memory_sizes]
        arrays |= {f"memory/{name}": np.array([one[name] for one in memory]) for name in memory[0]}
        if config.devices:
            sizes = (max(config.rows), config.d, config.queries, config.k, config.devices)
            arrays["devices/products"] = results.part("devices", lambda: _search.over_devices(*sizes))
        bar.update()
    return arrays


def _points(config):
    """(N, d, Q) of the exact searches that are counted."""
    sizes = [(n, config.d, config.queries) for n in config.rows]
    return sizes + [(config.rows[0], *other) for other in config.others]


def _data(config, seed, n, d, queries):
    rows = _search.gaussian(seed, n, queries, config.dimension, d, config.noise)
    return tuple(map(jnp.asarray, rows))


def _exact(config, point):
    """Answers and operations of exact search by seed."""
    data = [_data(config, seed, *point) for seed in range(config.seeds)]
    program = _search.instrumented(partial(search.knn, k=config.k), *data[0])
    return data, [program(*one) for one in data]


def _point(config, point):
    return _operations(_exact(config, point)[1])


def _operations(found):
    """(seeds, 2): those of products, and the rest. In float64, which holds them exactly."""
    return np.array([[work.products, work.arithmetic] for _, work in found], np.float64)


def _size(config, n, built):
    data, found = _exact(config, (n, config.d, config.queries))
    graphs = [
        search.build_graph(base, degree=config.degree, key=jax.random.key(seed), progress=False)
        for seed, (base, _) in enumerate(data)
    ]
    built[n] = list(zip(data, (answer for answer, _ in found), graphs, strict=True))
    return {"work": _operations(found), "entries": np.array([graph.entries.shape[0] for graph in graphs])}


def _searched(config, built, n, beam):
    """Operations, recall, and recall with random edges, by seed; for the fewest rows ids and distances as well.

    Without a beam: searches that visit all rows.
    """
    if beam is None:
        return _complete(config, built[n])

    def query(graph, queries):
        return search.query_graph(graph, queries, config.k, beam=beam)

    program, found = None, []
    for seed, ((base, queries), exact, graph) in enumerate(built[n]):
        program = program or _search.instrumented(query, graph, queries)
        answer, work = program(graph, queries)
        stray = program(_search.random_edges(graph, seed), queries)[0]
        one = {"work": np.array([work.products, work.arithmetic], np.float64)}
        one |= {
            name: _search.recall(found.distances, exact.distances)
            for name, found in (("recall", answer), ("random", stray))
        }
        if n == config.rows[0]:
            one |= {"ids": answer.ids, "distances": answer.distances, "exact ids": exact.ids}
            rows = {"direct": np.asarray(base), "rounded": _rounded(np.asarray(base))}
            one |= {name: _search.direct_distances(x, np.asarray(queries), one["ids"]) for name, x in rows.items()}
        found.append(one)
    return _search.stacked(found)


def _complete(config, built):
    """Ids of searches that visit all rows, and of exact ones, for the first queries; (seeds, queries, k)."""
    found = []
    for (base, queries), exact, graph in built:
        answer = search.query_graph(graph, queries[: config.complete], config.k, beam=len(base))
        found.append({"complete/ids": answer.ids, "complete/exact ids": exact.ids[: config.complete]})
    return _search.stacked(found)


def _rounded(rows):
    """Rows in 8 bits: 255 steps of the range of each coordinate."""
    low, high = rows.min(0), rows.max(0)
    step = (high - low) / 255
    return low + step * np.round((rows - low) / step)


def _memory(config, sizes):
    """Bytes of the compiled programs beyond arguments and results; nothing is executed."""
    n, d, queries = sizes
    forms = [jax.ShapeDtypeStruct((count, d), jnp.float32) for count in (n, queries)]
    programs = {
        "exact": partial(search.knn, k=config.k, memory=config.memory),
        "at once": lambda base, queries: lax.top_k(-_lower_bounds(base, queries).T, config.k),
    }
    return {
        name: float(jax.jit(program).lower(*forms).compile(BRIEFLY).memory_analysis().temp_size_in_bytes)
        for name, program in programs.items()
    }


def _lower_bounds(base, queries):
    return 0.5 * jnp.sum(base * base, axis=1)[:, None] - jnp.matmul(base, queries.T, precision="highest")


def _count(config, _):
    """Operations of the nearest row of every query: as counted here and by XLA with a loop, by XLA without one."""
    base, queries = _data(config, 0, COUNT_ROWS, config.d, COUNT_QUERIES)

    def tiles(base):
        return base.reshape(COUNT_TILES, -1, config.d)

    def loop(base, queries):
        return lax.map(lambda tile: jnp.min(_lower_bounds(tile, queries), axis=0), tiles(base))

    def unrolled(base, queries):
        return [jnp.min(_lower_bounds(tile, queries), axis=0) for tile in tiles(base)]

    _, work = _search.instrumented(loop, base, queries)(base, queries)
    by_xla = [jax.jit(f).lower(base, queries).compile(BRIEFLY).cost_analysis()["flops"] for f in (loop, unrolled)]
    names = ("counted", "XLA, loop", "XLA, unrolled")
    counts = (work.products + work.arithmetic, *by_xla)
    return {f"count/{name}": np.array([int(count)]) for name, count in zip(names, counts, strict=True)}


def verdicts(config: Config, arrays: dict[str, np.ndarray]) -> list[verify.Verdict]:
    """Operations against their laws, memory, recall and identities, each with its control."""
    points, rows = arrays["points"], np.array(config.rows)
    exact, graph, beams = arrays["exact/work"][..., 0], arrays["graph/work"][..., 0], arrays["beam/work"][..., 0]
    law = 2 * np.prod(points.astype(float), axis=1)
    per_row = 2.0 * config.d * config.queries
    entries = arrays["entries"]
    seen = np.concatenate([graph, beams], axis=1) / per_row
    expected = np.concatenate(
        [entries + config.beam * config.degree, entries[:, -1:] + config.degree * np.array(config.beams)], axis=1
    )
    scanned = np.broadcast_to(rows[[*range(len(rows)), *([-1] * len(config.beams))]], expected.shape)

    def off(claim, measured, law):
        """Largest relative difference from the law over a sweep; every realisation counts."""
        return verify.bound(claim, np.abs(measured / law - 1).ravel(), config.overhead)

    # Exponents of the seed with most operations: they hardly ever differ.
    most = [np.max(work, axis=0) for work in (exact[:, : len(rows)], graph)]

    def linear(claim, work):
        return verify.rate(claim, rows, work, 1.0, margin=config.exponent, deterministic=True)

    def below(claim, work):
        return verify.rate(claim, rows, work, 0.5, margin=config.exponent, side="at_most", deterministic=True)

    def finds(claim, name):
        return verify.bound(claim, 1 - arrays[f"graph/{name}"], 1 - config.recall)

    def falls(claim, name):
        missed = 1 - arrays[f"beam/{name}"]
        return verify.rate(claim, config.beams, missed, -config.fall, margin=0.0, side="at_most")

    def same(claim, left, right):
        return verify.identity(claim, arrays[left], arrays[right])

    def fits(claim, name):
        return verify.bound(claim, arrays[f"memory/{name}"], float(config.memory))

    def pair(name, statement, source, check, measured, why, broken):
        """A claim and its control: the same check on a measurement with an assumption broken."""
        claim = verify.Claim(f"K1.{name}", statement, source)
        control = verify.Claim(f"{claim.name}.control", f"{statement}: {why}", source, "control", claim.name)
        return [check(claim, *measured), check(control, *broken)]

    other = "graph search"
    found = [
        *pair(
            "count",
            "operations counted as they are executed, loops included, are XLA's own count of the unrolled program",
            "derivation",
            same,
            ("count/counted", "count/XLA, unrolled"),
            "XLA's count of the program with loops",
            ("count/XLA, loop", "count/XLA, unrolled"),
        ),
        *pair(
            "exact",
            "the products of exact search take 2 N d Q operations, whatever N, d and Q",
            SOURCE,
            off,
            (exact, law),
            other,
            (graph, law[: len(rows)]),
        ),
        *pair(
            "graph",
            "graph search compares a query with entry points + beam x degree rows",
            GRAPH,
            off,
            (seen, expected),
            "with all rows, as exact search does",
            (scanned, expected),
        ),
        *pair(
            "memory",
            f"the compiled exact search holds at most the {config.memory / 2**20:g} MiB that it is allowed",
            "derivation (tiles)",
            fits,
            ("exact",),
            "all products at once",
            ("at once",),
        ),
        *pair(
            "recall",
            f"a graph search with beam {config.beam} finds {config.recall:g} of the {config.k} nearest, at every N",
            GRAPH,
            finds,
            ("recall",),
            "edges to random rows",
            ("random",),
        ),
        *pair(
            "fall",
            "1 - recall falls at least in inverse proportion to the beam",
            "measurement",
            falls,
            ("recall",),
            "edges to random rows",
            ("random",),
        ),
        *pair(
            "distances",
            "the distances of a graph search are those of the rows that it returns",
            "derivation",
            same,
            ("first/distances", "first/direct"),
            "rows in 8 bits",
            ("first/distances", "first/rounded"),
        ),
        *pair(
            "complete",
            "a beam of all rows finds what exact search finds",
            "derivation (every row can be reached)",
            same,
            ("complete/ids", "complete/exact ids"),
            f"a beam of {config.beam}",
            ("first/ids", "first/exact ids"),
        ),
    ]
    if len(rows) > 2:  # fewer points have no exponent
        found += [
            *pair(
                "exact.linear",
                "operations of exact search grow in proportion to N",
                SOURCE,
                linear,
                most[:1],
                other,
                most[1:],
            ),
            *pair(
                "graph.sublinear",
                "operations of graph search at a fixed beam grow at most as the square root of N",
                GRAPH,
                below,
                most[1:],
                "exact search",
                most[:1],
            ),
        ]
    if config.devices:
        products, parts = arrays["devices/products"], np.array(config.devices)
        share = 2.0 * max(rows) * config.d * config.queries / parts
        found += pair(
            "devices",
            "over P devices each device's products take 2 N d Q / P operations",
            SOURCE,
            off,
            (products, share),
            "each searches all rows",
            (np.full_like(products, products[0]), share),
        )
    return found
