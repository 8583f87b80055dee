r"""H: message passing on the joint generative hierarchical model is exact, and what it says of four tasks as p grows.

Image and text are the leaves of two trees with a common root. Each edge is a permutation with probability 1 - p and a
random law otherwise, so p says how much is forgotten on the way from the root to a leaf. Root posterior, score s*,
denoiser, next token and zero-shot classifier are computed by message passing; their risks are the least that any model
can reach on these tasks.

Checked: (1) on trees that can be enumerated, the four Bayes losses of every sample equal those of the enumerated joint.
(2) Their means over samples agree with the exact Bayes risks: the contrastive one by integration, those of labels and
tokens as conditional entropies. (3) As p -> 0 the leaves tell the root and nothing else, so a negative is mistaken for
the partner just when their roots collide, and the two-sided contrastive risk with K candidates is

    2 sum_k Bin(K - 1, 1/S)(k) ln(1 + k),

at any depth and arity. (4) The root posterior is sufficient on each side: the sufficiency S of the score made of root
posteriors is zero. (5) A clean text never makes the best denoiser of an image worse, on average. How much it helps
depends on the size of the tree: that is measured.

Controls: messages along a wrong tree, that is, the leaves of every sample permuted in the same way, which is no
symmetry of the recursion; samples of another p; a prior that is not uniform under the formula with 1/S; a root
posterior that does not see the second half of the image's leaves; the text of another sample.

That Bayes risks grow with p is no theorem: how far two random laws differ at p = 1 decides where each curve ends. The
curves show it for the kernels drawn here.

Source: Oko, Lin, Cai, Mei (arXiv 2501.04641) for the model and the tasks.
"""

import dataclasses
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats

from experiments._claims import pair
from experiments._side_by_side import BRIEFLY, side_by_side
from theorykit import results, verify
from theorykit.surrogate import hierarchy, information_loss, pair_hierarchy, risk
from theorykit.surrogate.hierarchy import Losses, Sample

SOURCE = "Oko, Lin, Cai, Mei (arXiv 2501.04641): message passing for the joint generative hierarchical model"
STRESS = "Garnier-Brun, Mezard, Moscato, Saglietti (arXiv 2408.15138)"
DERIVED = "derivation"
ALONE = "denoising/alone"  # the image without its text
COMPARED = (*Losses._fields, ALONE)
SMALL = (3, 2, 2)  # alphabet, depth and arity of the trees that are enumerated: 81 images and 81 texts
LEAVES = 4
SIGMA, CANDIDATES = 1.0, 4  # one step between symbols; K of the paper


@dataclasses.dataclass(frozen=True)
class Config:
    """Trees of the curves, their levels of p, seeds (kernels and samples are drawn afresh) and sample sizes."""

    alphabet: int = 10
    depth: int = 4
    arity: int = 3
    levels: tuple[float, ...] = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4)
    seeds: int = 8
    samples: int = 1024
    limit_seeds: int = 48  # at p = 0
    small_levels: tuple[float, ...] = (0.05, 0.1, 0.2, 0.4)
    small_samples: int = 4096
    compared: int = 64  # samples of each enumerated hierarchy whose losses are compared one by one
    pairs: int = 64  # hierarchies whose siblings are drawn together, with as many samples each
    identity: float = results.threshold(1e-12, "the accuracy asked for: float64, sums of a few hundred products")
    risk: float = results.threshold(0.05, "a fifth or less of what the next larger p adds to any of the risks")
    limit: float = results.threshold(0.04, "a tenth of the limit; another prior moves the risk by more than its half")
    sufficiency: float = results.threshold(1e-12, "rounding: S is a sum over 6561 cells of terms of order 1")
    denoising: float = results.threshold(0.002, "a tenth of what the text of another sample adds")


PRESETS = {
    "smoke": Config(
        depth=2, arity=2, levels=(0.05, 0.2, 0.4), samples=512, limit_seeds=64, small_levels=(0.1, 0.4), pairs=16
    ),
    "quick": Config(),
    "full": Config(
        levels=(0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4), seeds=16, samples=4096, small_samples=16384
    ),
}


def run(config: Config) -> dict[str, np.ndarray]:
    """Risks along p, at p = 0, and against enumeration.

    <task>, <task>/permuted (seeds, levels): mean Bayes losses and those of messages along a wrong tree. limit/<prior>
    (limit seeds,). On small trees small/<task> and exact/<task> (seeds, levels), small/denoising/<text> without a text
    and with that of another sample, compared/<what>/<task> (values,), sufficiency/<what> (seeds, levels). With siblings
    drawn together pairs/<what> (hierarchies, samples, nodes, S): the laws of the root and of every leaf.
    """

    cells = {"large": _large_trees, "small": jax.enable_x64(True)(_small_trees), "pairs": jax.enable_x64(True)(_pairs)}
    parts = side_by_side(results.part, [(name, partial(measure, config)) for name, measure in cells.items()])
    return {name: values for part in parts for name, values in part.items()}


def _permuted(drawn, noisy):
    """Leaves of image and text in another order, the first one in its place, since it is the label."""
    image, text = (_order(leaves.shape[1]) for leaves in drawn[1:])
    return Sample(drawn.root, drawn.image[:, image], drawn.text[:, text]), noisy[:, image]


def _order(leaves):
    """An order that keeps the first leaf and puts every other one among strangers."""
    rest = np.random.default_rng(51).permutation(np.arange(1, leaves)) if leaves > LEAVES else [2, 1, 3]
    return np.concatenate([[0], rest])


class _Entry(NamedTuple):
    """What fixes a hierarchy and its samples: keys, p and the prior of the root."""

    kernels: jax.Array
    samples: jax.Array
    noise: jax.Array
    prior: jax.Array


def _entries(key, seeds, levels, prior):
    """Every seed at every level of p, seeds first: kernels of one seed differ in p only, samples are drawn afresh."""
    for_kernels, for_samples = jax.random.split(key)
    n = seeds * len(levels)
    kernels = jnp.repeat(jax.random.split(for_kernels, seeds), len(levels))
    noise = jnp.tile(jnp.asarray(levels, prior.dtype), seeds)
    return _Entry(kernels, jax.random.split(for_samples, n), noise, jnp.tile(prior, (n, 1)))


def _losses(tree, entry, n):
    """A hierarchy, n samples, and losses (3, n): Bayes, along a wrong tree, and with the text of the sample before."""
    h = hierarchy.random_hierarchy(entry.kernels, *tree, entry.noise, prior=entry.prior)
    for_sample, for_noise = jax.random.split(entry.samples)
    drawn = hierarchy.sample(h, for_sample, n)
    noisy = drawn.image.astype(h.image.dtype) + SIGMA * jax.random.normal(for_noise, drawn.image.shape, h.image.dtype)
    shifted = drawn._replace(text=jnp.roll(drawn.text, 1, axis=0))
    variants = [(drawn, noisy), _permuted(drawn, noisy), (shifted, noisy)]
    stacked = jax.tree.map(lambda *parts: jnp.stack(parts), *variants)
    sigma = jnp.asarray(SIGMA, noisy.dtype)
    losses = jax.lax.map(lambda one: hierarchy.bayes_losses(h, *one, sigma, candidates=CANDIDATES), stacked)
    return h, drawn, noisy, losses


@partial(jax.jit, static_argnames=("tree", "n"))
def _means(tree, entries, n):
    """Mean losses (entries, 3) of each task."""

    def of_one(entry):
        return jax.tree.map(lambda loss: jnp.mean(loss, axis=1), _losses(tree, entry, n)[-1])

    return jax.lax.map(of_one, entries)


def _large_trees(config):
    """Mean losses along p, (seeds, levels), and the contrastive risk at p = 0 for two priors, (limit seeds,)."""
    symbols = config.alphabet
    uniform = jnp.full(symbols, 1 / symbols)
    uneven = jnp.full(symbols, 0.5 / (symbols - 1)).at[0].set(0.5)
    for_curves, for_uniform, for_uneven = jax.random.split(jax.random.key(50), 3)
    # All in one program: compiling it takes longer than the samples of a small tree do.
    parts = [
        _entries(for_curves, config.seeds, config.levels, uniform),
        _entries(for_uniform, config.limit_seeds, (0.0,), uniform),
        _entries(for_uneven, config.limit_seeds, (0.0,), uneven),
    ]
    together = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)
    means = _means((symbols, config.depth, config.arity), together, config.samples)
    means = jax.tree.map(partial(np.asarray, dtype=np.float64), means)
    shape = (config.seeds, len(config.levels))
    n, found = shape[0] * shape[1], {}
    for task, values in means._asdict().items():
        found |= {task: values[:n, 0].reshape(shape), f"{task}/permuted": values[:n, 1].reshape(shape)}
    uniform, uneven = np.split(means.contrastive[n:, 0], 2)
    return found | {"limit/uniform": uniform, "limit/uneven": uneven}


# Against enumeration, in float64


def _small_trees(config):
    """Losses one by one and on average, on hierarchies small enough to be enumerated; their prior is not uniform."""
    shape = (config.seeds, len(config.small_levels))
    prior = jnp.asarray([0.5, 0.2, 0.3])
    entries = _entries(jax.random.key(52), config.seeds, config.small_levels, prior)
    compared = {f"{side}/{task}": [] for side in ("enumerated", "messages", "permuted") for task in COMPARED}
    found = {}
    for i in range(shape[0] * shape[1]):
        entry = _Entry(*(leaf[i] for leaf in entries))
        drawn, noisy, losses, table, score = _small_tree(entry, config.small_samples)
        enumerated = _enumerated_losses(np.asarray(table), drawn, noisy, config.compared)
        for task, values in losses.items():
            one_by_one = np.asarray(values)[:, : enumerated[task].size]
            compared[f"enumerated/{task}"].append(enumerated[task])
            compared[f"messages/{task}"].append(one_by_one[0])
            compared[f"permuted/{task}"].append(one_by_one[1])
            found.setdefault(f"small/{task}", []).append(np.mean(values[0]))
        found.setdefault("small/denoising/other", []).append(np.mean(losses["denoising"][2]))
        for name, value in _exactly(table, score).items():
            found.setdefault(name, []).append(value)
    together = {f"compared/{name}": np.concatenate(values) for name, values in compared.items()}
    return {name: np.array(values).reshape(shape) for name, values in found.items()} | together


@partial(jax.jit, static_argnums=1, compiler_options=BRIEFLY)
def _small_tree(entry, n):
    """Of an enumerable tree: samples, their losses, also of images denoised alone, P(x, y), and all pairs' scores."""
    h, drawn, noisy, losses = _losses(SMALL, entry, n)
    leaves = hierarchy.all_leaves(SMALL[0], LEAVES)
    images = jnp.stack([drawn.image, _permuted(drawn, noisy)[0].image])
    both = jnp.stack([noisy, _permuted(drawn, noisy)[1]])
    means = jax.lax.map(lambda z: hierarchy.denoise(h, z, jnp.asarray(SIGMA, z.dtype)), both)
    losses = losses._asdict() | {ALONE: jnp.mean((means - images) ** 2, axis=2)}
    return drawn, noisy, losses, hierarchy.enumerate_joint(h), hierarchy.similarities(h, leaves, leaves)


def _enumerated_losses(table, drawn, noisy, n):
    """The losses of the first n samples from P(x, y), (81, 81)."""
    s, k = SMALL[0], CANDIDATES
    leaves = np.asarray(hierarchy.all_leaves(s, LEAVES))
    x, y = (np.ravel_multi_index(np.asarray(part[:n]).T, (s,) * LEAVES) for part in drawn[1:])
    ratio = table / table.sum(axis=1)[:, None] / table.sum(axis=0)[None, :]
    groups = np.arange(n).reshape(-1, k)
    of_group = ratio[x[groups][:, :, None], y[groups][:, None, :]]
    own = np.log(np.diagonal(of_group, axis1=1, axis2=2))
    both = np.log(of_group.sum(axis=1)) + np.log(of_group.sum(axis=2)) - 2 * own
    images = table.sum(axis=1)
    first = table.reshape(-1, s, s ** (LEAVES - 1)).sum(axis=2)
    squares = ((np.asarray(noisy[:n])[:, None] - leaves[None]) ** 2).sum(axis=2) / (2 * SIGMA**2)
    noise, means = np.exp(-squares), {}
    for name, weights in (("denoising", table[:, y].T * noise), (ALONE, images[None, :] * noise)):
        means[name] = weights @ leaves / weights.sum(axis=1, keepdims=True)
    return {
        "contrastive": both.mean(axis=1),
        "zero_shot": -np.log(first[x, np.asarray(drawn.text[:n, 0])] / images[x]),
        "next_token": -np.log(table[x, y] / images[x]) / LEAVES,
        **{name: np.mean((mean - np.asarray(drawn.image[:n])) ** 2, axis=1) for name, mean in means.items()},
    }


# Siblings drawn together: no product of kernels


def _pairs(config):
    """Laws of root and leaves given noisy leaves, some of them hidden, by messages and by enumeration."""
    symbols, depth, _ = SMALL
    rng = np.random.default_rng(53)
    priors = rng.dirichlet(np.full(symbols, 3.0), size=config.pairs)
    z = rng.uniform(-1, symbols, size=(config.pairs, config.pairs, LEAVES))
    seen = rng.uniform(size=z.shape) < 0.75
    evidence = np.where(seen[..., None], -((z[..., None] - np.arange(symbols)) ** 2) / (2 * SIGMA**2), 0.0)
    keys = jax.random.split(jax.random.key(53), config.pairs)
    kernels, laws = _pair_laws(keys, *map(jnp.asarray, (priors, evidence)), symbols, depth)
    kernels, leaves = np.asarray(kernels), np.asarray(hierarchy.all_leaves(symbols, LEAVES))
    exact = np.empty_like(laws[0])
    for i, (top, low) in enumerate(kernels):
        joint = np.einsum("s,sab,acd,bef->scdef", priors[i], top, low, low).reshape(symbols, -1)
        given = joint * np.exp(evidence[i][:, np.arange(LEAVES), leaves].sum(axis=2))[:, None]  # (n, root, leaves)
        given /= given.sum(axis=(1, 2), keepdims=True)
        exact[i, :, 0] = given.sum(axis=2)
        exact[i, :, 1:] = np.einsum("nl,lva->nva", given.sum(axis=1), np.eye(symbols)[leaves])
    return {"pairs/enumerated": exact, "pairs/messages": np.asarray(laws[0]), "pairs/factorised": np.asarray(laws[1])}


@partial(jax.jit, static_argnums=(3, 4), compiler_options=BRIEFLY)
def _pair_laws(keys, priors, evidence, symbols, depth):
    """Kernels, and laws (2, hierarchies, n, nodes, S) of the root and the leaves: by them, and siblings factorised."""

    def laws(h, evidence):
        root, leaves = pair_hierarchy.root_posterior(h, evidence), pair_hierarchy.leaf_posterior(h, evidence)
        return jnp.exp(jnp.concatenate([root[:, None], leaves], axis=1))

    def of_one(key, prior, evidence):
        h = pair_hierarchy.random_pair_hierarchy(key, symbols, depth)._replace(prior=prior)
        # Messages through the product of both marginal kernels are those of a factorised tree.
        left, right = jnp.sum(h.kernels, axis=3), jnp.sum(h.kernels, axis=2)
        factorised = h._replace(kernels=left[..., :, None] * right[..., None, :])
        both = jax.tree.map(lambda *parts: jnp.stack(parts), h, factorised)
        return h.kernels, jax.lax.map(lambda one: laws(one, evidence), both)

    kernels, found = jax.lax.map(lambda one: of_one(*one), (keys, priors, evidence))
    return kernels, jnp.swapaxes(found, 0, 1)


def _exactly(table, score):
    """Bayes risks where enumeration leaves no integral over noise; S, both directions added, of two scores.

    One score is made of root posteriors, the other sees half of the image's leaves.
    """
    s = SMALL[0]
    values, rows = np.asarray(table), s ** (LEAVES // 2)
    images = _entropy(values.sum(axis=1))
    half = values.reshape(rows, rows, -1).sum(axis=1)
    ratio = half / half.sum(axis=1)[:, None] / half.sum(axis=0)[None, :]
    dropped = jnp.asarray(np.repeat(np.log(ratio), rows, axis=0))
    contrastive, (of_root, of_half) = _of_joint(table, jnp.stack([score, dropped]))
    return {
        "exact/contrastive": float(contrastive),
        "exact/zero_shot": _entropy(values.reshape(-1, s, s ** (LEAVES - 1)).sum(axis=2)) - images,
        "exact/next_token": (_entropy(values) - images) / LEAVES,
        "sufficiency/root": float(of_root),
        "sufficiency/dropped": float(of_half),
    }


@partial(jax.jit, compiler_options=BRIEFLY)
def _of_joint(table, scores):
    """The least contrastive risk, both directions, and S of each score, both directions added."""

    def sufficiency(score):
        return information_loss.sufficiency(table, score) + information_loss.sufficiency(table.T, score.T)

    return risk.minimal_risk(table, CANDIDATES, side="both"), jax.lax.map(sufficiency, scores)


def _entropy(p):
    return -np.sum(p * np.log(p))


def collision_risk(symbols: int, candidates: int = CANDIDATES) -> float:
    """Two-sided contrastive risk where samples are told apart by nothing but roots, uniform on `symbols`."""
    k = np.arange(candidates)
    return float(2 * np.sum(scipy.stats.binom.pmf(k, candidates - 1, 1 / symbols) * np.log1p(k)))


# ---------------------------------------------------------------------------------------------------------------------


def verdicts(config: Config, arrays: dict[str, np.ndarray]) -> list[verify.Verdict]:
    """Exactness, the limit, sufficiency and the use of a second modality, each with its control."""
    found = []
    check = partial(verify.identity, rtol=config.identity)
    for task in COMPARED:
        sides = [(arrays[f"compared/{side}/{task}"], arrays[f"compared/enumerated/{task}"]) for side in _SIDES]
        name = {ALONE: "denoising, no text given:"}.get(task, task.replace("_", " "))
        statement = f"the {name} loss of each sample compared, by message passing, is that of the enumerated joint"
        found += _pair(check, f"H.exact.{task.replace('/', '_')}", statement, SOURCE, *sides, "leaves permuted")
    # Each probability counts alike, however small.
    exact = arrays["pairs/enumerated"]
    sides = [(arrays[f"pairs/{which}"] / exact, np.ones_like(exact)) for which in ("messages", "factorised")]
    statement = "siblings drawn together: laws of root and leaves by message passing are those of enumeration"
    found += _pair(
        check, "H.pairs", statement, STRESS, *sides, "siblings factorised, each with its own marginal kernel"
    )
    check = partial(verify.agreement, margin=config.risk, relative=True)
    for task in ("contrastive", "zero_shot", "next_token"):
        measured, exact = arrays[f"small/{task}"], arrays[f"exact/{task}"]
        sides = [
            (np.mean(m, axis=1), np.mean(e, axis=1)) for m, e in ((measured, exact), (measured[:, :-1], exact[:, 1:]))
        ]
        statement = f"the mean {task.replace('_', ' ')} loss over samples is the exact Bayes risk"
        found += _pair(check, f"H.risk.{task}", statement, DERIVED, *sides, "of samples of a smaller p")

    check = partial(verify.agreement, predicted=collision_risk(config.alphabet), margin=config.limit)
    statement = "at p = 0 the two-sided contrastive Bayes risk is 2 E ln(1 + Bin(K - 1, 1/S))"
    sides = [(arrays[f"limit/{prior}"],) for prior in ("uniform", "uneven")]
    found += _pair(check, "H.limit", statement, DERIVED, *sides, "half of the prior on one root")

    check = partial(verify.agreement, predicted=0.0, margin=config.sufficiency, deterministic=True)
    statement = "the score of root posteriors has S = 0 in both directions"
    sides = [(np.max(np.abs(arrays[f"sufficiency/{what}"])),) for what in ("root", "dropped")]
    found += _pair(check, "H.sufficient", statement, SOURCE, *sides, "half of the image dropped")

    check = partial(verify.bound, limit=arrays["small/denoising/alone"], margin=config.denoising)
    statement = "given its clean text, an image is denoised at least as well as alone, on average over samples"
    sides = [(arrays[name],) for name in ("small/denoising", "small/denoising/other")]
    return found + _pair(check, "H.two", statement, DERIVED, *sides, "the text of another sample")


_SIDES = ("messages", "permuted")


def _pair(check, name, statement, source, claimed, controlled, why):
    return pair(check, name, statement, source, claimed, (why, controlled))
