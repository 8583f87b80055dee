r"""K2: search over embeddings that a contrastive encoder learned, and what makes a set hard to search.

An encoder is trained on pairs of augmented views of digits (cosine InfoNCE; no labels). Rows are embeddings of views of
the training digits, queries those of views of held-out digits. The vote of the k nearest rows, by exact search among
two views of each digit, classifies a query; learned embeddings are compared with raw pixels, as many principal
components, and an encoder that was not trained. (Among many views of each digit pixels catch up: then some row is
turned and shifted as the query is.) Graphs are searched over all views.

How hard a set is for a graph is a matter of its intrinsic dimension D, not of the dimension d of the space. With T_j(x)
the distance of the j-th nearest row of a point x that is none of them, the maximum likelihood estimate is

    1 / D = mean over x and j < k of log(T_k(x) / T_j(x)),    times (k - 1) / (k - 2) without the bias of finite k

(averaged over points as inverses, which is the maximum likelihood estimate of one common dimension). It is checked on
Gaussian rows of known dimension, turned into R^d. There 1 - recall of a graph search with a short beam grows with D,
and does not change with d.

Source: Levina and Bickel 2004 (NeurIPS 17) for the estimate; MacKay and Ghahramani 2005 for averaging inverses; graphs:
Ootomo et al. 2023 (arXiv 2308.15136).
"""

import dataclasses
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from experiments import _search
from experiments._side_by_side import BRIEFLY, side_by_side
from experiments._training import finished
from theorykit import data, encoders, evaluate, losses, results, search, training, verify
from theorykit.similarity import cosine

ESTIMATE = "Levina, Bickel 2004 (NeurIPS 17); MacKay, Ghahramani 2005 (inverses averaged)"
GRAPH = "Ootomo et al. 2023 (arXiv 2308.15136)"
PROBE = "Wu, Xiong, Yu, Lin 2018 (arXiv 1805.01978), classification by neighbours"
KINDS = ("learned", "untrained", "PCA", "pixels")
DIGITS = 1797
VOTING = 2  # views of each digit among which the neighbours are that vote
CLASSES = 10
# The defaults of `data.digit_views`, under which pixels tell the class of three views in four.
STRENGTHS = {"shift": 1, "rotation": 15, "noise": 0.1, "mask": 0.1}


@dataclasses.dataclass(frozen=True)
class Config:
    """The encoder sees `pool` views of every training digit, the graph `views` of them; Gaussian sets are as large."""

    pool: int = 16
    views: int = 8
    heldout: int = 512
    seeds: int = 8
    graph_seeds: int = 8  # of them with graphs, and seeds of the Gaussian sets
    width: int = 256
    features: int = 32
    temperature: float = 0.2
    rate: float = 3e-3
    batch: int = 256
    steps: int = 1000
    k: int = 10
    degree: int = 16
    beams: tuple[int, ...] = (10, 16, 24, 32)
    neighbours: int = 20  # of the estimate
    dimensions: tuple[int, ...] = (2, 4, 8, 12, 16, 24)
    ambient: tuple[int, int] = (32, 64)
    pictured: int = 8
    shown: int = 5
    gain: float = results.threshold(
        0.0, "the statement is that they are better, by more than the noise; how much is drawn"
    )
    recall: float = results.threshold(0.95, "the usual demand on an approximate search")
    bias: float = results.threshold(0.15, "of the estimate at dimension 8 and thousands of rows: the density is curved")
    harder: float = results.threshold(0.02, "one answer in fifty; between seeds the share differs by a hundredth")


PRESETS = {
    "smoke": Config(
        views=2,
        heldout=1029,  # which leaves six batches of digits, 1536 views: more rows than entry points of a graph
        graph_seeds=5,
        width=128,
        batch=128,
        rate=5e-3,
        steps=400,
        beams=(10,),
        dimensions=(4, 16),
    ),
    "quick": Config(),
    "full": Config(views=12, seeds=10, graph_seeds=10, width=1024, steps=6000, dimensions=(2, 4, 8, 12, 16, 24, 32)),
}


def run(config: Config) -> dict[str, np.ndarray]:
    """digits/... by seed, gaussian/... by (seeds, sets) for the sets (dimension, ambient dimension); picture/..."""
    near, wide = config.ambient
    sets = [(dimension, near) for dimension in config.dimensions] + [(max(config.dimensions), wide)]
    # One set and one seed of digits first, which compile different programs; then seeds without graphs, while those of
    # the first seed are compiled.
    cells = [
        ("set", sets[-1]),
        *(("digits", seed) for seed in (0, *reversed(range(1, config.seeds)))),
        *(("set", one) for one in sets[:-1]),
    ]
    with tqdm(desc="search_embeddings", total=len(cells), disable=None) as bar:

        def work(kind, which):
            found = _gaussian(config, *which) if kind == "set" else _digits(config, which)
            bar.update()
            return found

        found = dict(zip(cells, side_by_side(work, cells), strict=True))
    gaussian = [found["set", one] for one in sets]
    arrays = {f"gaussian/{name}": np.stack([one[name] for one in gaussian], axis=1) for name in gaussian[0]}
    digits = [found["digits", seed] for seed in range(config.seeds)]
    arrays |= digits[0].pop("pictures")
    for name in digits[0]:
        arrays[f"digits/{name}"] = np.stack([one[name] for one in digits if name in one])
    return arrays | {"sets": np.array(sets)}


def _views(config, seed):
    """Views (pool, digits, 64) of training digits and one (queries, 64) of each held-out digit, each with classes."""
    images, labels = data.digits()
    order = np.random.default_rng(seed).permutation(DIGITS)
    train, rest = order[config.heldout :], order[: config.heldout]
    every = np.concatenate([np.tile(train, config.pool), rest])
    # On the host, where slices need no program for each shape.
    rows = np.asarray(data.to_sphere(_augmented(jax.random.key(seed), images[every])))
    base = rows[: -config.heldout].reshape(config.pool, len(train), -1)
    return base, labels[train], rows[-config.heldout :], labels[rest]


@jax.jit
def _augmented(key, images):
    return data.augment(key, images, **STRENGTHS)


def _digits(config, seed):
    """Accuracy by kind among two views of each digit; dimension and recall of all views; pictures."""
    base, classes, queries, own = _views(config, seed)
    encoder = _encoder(config.width, config.features)
    start = _initial(encoder, jax.random.fold_in(jax.random.key(seed), 1), queries)
    learnt = training.train(
        _objective(encoder, config.temperature),
        start,
        base.swapaxes(0, 1),
        optimizer=_adam(config.rate),
        steps=config.steps,
        batch_size=config.batch,
        key=jax.random.key(seed),
        augment=_two_views,
        progress=False,
    )
    finished(learnt, "the training of the encoder")
    mean = np.mean(base[0], axis=0)
    axes = _principal_axes(base[0] - mean, config.features)
    embed = {
        "learned": partial(_embed, encoder, learnt.params),
        "untrained": partial(_embed, encoder, start),
        "PCA": lambda x: jnp.asarray((x - mean) @ axes),
        "pixels": jnp.asarray,
    }
    found, near = {}, {}
    few = base[:VOTING].reshape(-1, base.shape[-1])
    for kind in KINDS:
        near[kind] = np.asarray(search.knn(embed[kind](few), embed[kind](queries), config.neighbours).ids)
        # Views of all digits one after the other, again and again.
        votes = _votes(classes[near[kind][:, : config.k] % len(classes)])
        found[f"accuracy/{kind}"] = evaluate.accuracy(jnp.asarray(votes), jnp.asarray(own))
    if seed == 0:
        found["pictures"] = _pictures(config, few, classes, queries, own, near)
    if seed >= config.graph_seeds:
        return found
    every = base[: config.views].reshape(-1, base.shape[-1])
    for kind in ("learned", "pixels"):
        rows, points = embed[kind](every), embed[kind](queries)
        exact = search.knn(rows, points, config.neighbours).distances
        found[f"dimension/{kind}"] = _dimension(exact)
        if kind == "learned":
            recalls = _recalls(config, rows, points, exact, seed, config.beams)
            found |= {f"recall/{name}": value for name, value in recalls.items()}
    return found


def _pictures(config, base, classes, queries, own, near):
    """The first query of each of the first classes with its nearest rows by kind: images and classes."""
    chosen = np.array([np.flatnonzero(own == c)[0] for c in range(config.pictured)])
    arrays = {"picture/queries": queries[chosen], "picture/labels": own[chosen]}
    for kind, ids in near.items():
        shown = ids[chosen, : config.shown]
        arrays |= {
            f"picture/{kind}/images": base[shown],
            f"picture/{kind}/labels": classes[shown % len(classes)],
        }
    return arrays


def _principal_axes(centred, count):
    """The first principal axes (d, count). By NumPy, since `spectral.pca` would compile a program for one small set."""
    centred = centred.astype(np.float64)
    return np.linalg.eigh(centred.T @ centred)[1][:, : -count - 1 : -1].astype(np.float32)


def _two_views(key, batch):
    """Two different views of every digit of a batch (rows, views, 64)."""
    one, other = jax.random.randint(key, (2, len(batch)), 0, batch.shape[1])
    other = (one + 1 + other % (batch.shape[1] - 1)) % batch.shape[1]
    return tuple(jnp.take_along_axis(batch, which[:, None, None], axis=1)[:, 0] for which in (one, other))


@cache
def _encoder(width, features):
    return encoders.MLP(width, features, depth=3, use_bias=True, parametrisation="standard")


@partial(jax.jit, static_argnums=0, compiler_options=BRIEFLY)
def _initial(encoder, key, x):
    return encoder.init(key, x)


@partial(jax.jit, static_argnums=0)
def _embed(encoder, params, x):
    z = encoder.apply(params, x)
    return z / jnp.linalg.norm(z, axis=1, keepdims=True)


@cache
def _objective(encoder, temperature):
    return training.objective(encoder.apply, partial(losses.info_nce, similarity=cosine, temperature=temperature))


@cache
def _adam(rate):
    return optax.adam(rate)


def _votes(classes):
    """Neighbours of each class, (queries, classes), from the classes of the neighbours (queries, k)."""
    return np.stack([np.sum(classes == c, axis=1) for c in range(CLASSES)], axis=1).astype(np.float32)


def _dimension(squared):
    """The estimate from squared distances (points, neighbours), with inverses averaged over points."""
    squared = np.asarray(squared, np.float64)
    k = squared.shape[1]
    return 1 / np.mean(0.5 * np.log(squared[:, -1:] / squared[:, :-1])) * (k - 2) / (k - 1)


def _recalls(config, rows, points, exact, seed, beams):
    """Recall by beam, (beams,), of a graph and of the same with edges to random rows."""
    graph = search.build_graph(rows, degree=config.degree, key=jax.random.key(seed), progress=False)
    found = {}
    for name, one in (("graph", graph), ("random", _search.random_edges(graph, seed))):
        answers = [search.query_graph(one, points, config.k, beam=beam).distances for beam in beams]
        found[name] = np.array([_search.recall(answer, exact) for answer in answers])
    return found


def _gaussian(config, dimension, d):
    """Estimates, also of rows with noise in all d directions, and recalls with the shortest beam, (seeds,) each."""
    found, count = [], config.views * (DIGITS - config.heldout)
    for seed in range(config.graph_seeds):
        drawn = {
            name: map(jnp.asarray, _search.gaussian(seed, count, config.heldout, dimension, d, noise))
            for name, noise in (("dimension", 0.0), ("filled", 1.0))
        }
        one = {}
        for name, (rows, points) in drawn.items():
            exact = search.knn(rows, points, config.neighbours).distances
            one[name] = _dimension(exact)
            if name == "dimension":
                recalls = _recalls(config, rows, points, exact, seed, config.beams[:1])
                one |= {kind: values[0] for kind, values in recalls.items()}
        found.append(one)
    return _search.stacked(found)


def verdicts(config: Config, arrays: dict[str, np.ndarray]) -> list[verify.Verdict]:
    """Classification by neighbours, recall, the estimate of dimension, and difficulty; each with its control."""
    sets = [tuple(one) for one in arrays["sets"].tolist()]
    highest, wide = max(config.dimensions), config.ambient[-1]
    first = config.ambient[0]
    low = min(config.dimensions)
    small = [sets.index((dimension, first)) for dimension in config.dimensions if dimension <= 8]
    missed = 1 - arrays["gaussian/graph"]
    hard, easy, embedded_wide = (
        missed[:, sets.index(one)] for one in ((highest, first), (low, first), (highest, wide))
    )

    def pair(name, statement, source, check, measured, why, broken):
        """A claim and its control: the same check on a measurement with an assumption broken."""
        claim = verify.Claim(f"K2.{name}", statement, source)
        control = verify.Claim(f"{claim.name}.control", f"{statement}: {why}", source, "control", claim.name)
        return [check(claim, *measured), check(control, *broken)]

    def gains(claim, kind, other):
        return verify.separation(
            claim, arrays[f"digits/accuracy/{kind}"], arrays[f"digits/accuracy/{other}"], margin=config.gain
        )

    def finds(claim, name):
        return verify.agreement(
            claim, arrays[f"digits/recall/{name}"][:, -1], config.recall, margin=0.0, side="at_least"
        )

    def estimates(claim, name):
        off = np.abs(arrays[f"gaussian/{name}"][:, small] / np.array([sets[i][0] for i in small]) - 1)
        return verify.bound(claim, off, config.bias)

    def harder(claim, a, b):
        return verify.separation(claim, a, b, margin=config.harder)

    found = []
    for other in ("pixels", "PCA"):
        found += pair(
            f"neighbours.{other}",
            f"the classes of the nearest rows tell that of a query better for learned embeddings than for {other}",
            PROBE,
            gains,
            ("learned", other),
            "an encoder that was not trained",
            ("untrained", other),
        )
    found += pair(
        "recall",
        f"a graph search with beam {config.beams[-1]} finds {config.recall:g} of the nearest learned embeddings",
        GRAPH,
        finds,
        ("graph",),
        "edges to random rows",
        ("random",),
    )
    found += pair(
        "dimension",
        f"the estimate is within {config.bias:.0%} of the dimension of Gaussian rows, up to 8",
        ESTIMATE,
        estimates,
        ("dimension",),
        "noise in all directions",
        ("filled",),
    )
    found += pair(
        "difficulty",
        f"a graph with a beam of {config.beams[0]} misses more of rows of dimension {highest} than of dimension {low}",
        "measurement",
        harder,
        (hard, easy),
        f"the same dimension, in {wide} instead of {first} coordinates",
        (embedded_wide, hard),
    )
    return found
