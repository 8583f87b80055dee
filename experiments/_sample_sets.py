"""CLIP from a fixed number of stored samples: laws of image and text, samples of them, training, exact excesses.

Laws are joints P(x, y) of configurations of leaves, enumerated, with image and text independent given a root:

    hierarchy  two trees of depth 2 and arity 2
    permuted   its leaves in a random order, another one for every image and every text: the symbols are the same, where
               they stood is lost
    star       trees of depth 1 with as many leaves, and the p at which a leaf says as much of the root on average:
               all leaves are independent given the root

    unmatched  the hierarchy, with texts of an independent sample
    fixed      the hierarchy with all leaves in one other order: a symmetry

A member of an ensemble is an encoder pair with stored samples of its own, of which it uses the first `count`.
"""

import functools
import itertools
import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize
import scipy.special

from experiments import _hierarchy_exact
from experiments._hierarchy_clip import MODALITIES, adam, clip_in_groups, shuffled_rows, sum_over_members
from experiments._side_by_side import one_object
from experiments._training import LONG, checkpoints, finished, one_thread, parameters, room
from theorykit import encoders, similarity, training
from theorykit.surrogate import denoisers, downstream, hierarchy, information_loss, risk
from theorykit.surrogate.hierarchy import Hierarchy

LAWS = ("hierarchy", "permuted", "star", "unmatched", "fixed")
CANDIDATES = 4


class World(NamedTuple):
    """What one seed fixes.

    Parameters
    ----------
    key : PRNG key of its networks.
    joints, samples : by law
        (nx, ny) the law that is tested, and (image, text), (n, T) each.
    """

    key: jax.Array
    joints: dict[str, np.ndarray]
    samples: dict[str, tuple[np.ndarray, np.ndarray]]


def check(config) -> None:
    """Whether groups of K pairs hold K different ones, and nothing is left over."""
    wrong = [n for counts in config.samples.values() for n in counts if n < CANDIDATES or n & (n - 1)]
    if wrong:
        raise ValueError(f"numbers of samples are {wrong}: give powers of two, at least {CANDIDATES}")
    for name in ("batch", "validation"):
        if (size := getattr(config, name)) < 1 or size % CANDIDATES:
            raise ValueError(f"{name} is {size}: give a multiple of the {CANDIDATES} pairs of a group")


# Laws -----------------------------------------------------------------------------------------------------------------


def world(config, seed: int) -> World:
    """Kernels, joints and samples of a seed: for training first, as many as the largest n, then for validation."""
    for_kernels, for_tree, for_star, for_others, for_networks = jax.random.split(jax.random.key(70 + seed), 5)
    tree, star = hierarchies(config, for_kernels)
    n = config.validation + max(max(counts) for counts in config.samples.values())
    # Whatever takes no key is done by NumPy, which has nothing to compile.
    (image, text), of_star, (_, others) = (
        [np.asarray(leaves) for leaves in hierarchy.sample(h, key, n)[1:]]
        for h, key in ((tree, for_tree), (star, for_star), (tree, for_others))
    )
    rng = np.random.default_rng(seed)
    fixed = rng.permutation(image.shape[1])
    fresh = [rng.permuted(leaves, axis=1) for leaves in (image, text)]
    unmatched, reordered_too = (image, others), (image[:, fixed], text[:, fixed])
    samples = ((image, text), fresh, of_star, unmatched, reordered_too)
    joint, joint_of_star = (_joint(h) for h in (tree, star))
    fresh_law, fixed_law = permuted(joint, config.alphabet), reordered(joint, config.alphabet, fixed)
    joints = (joint, fresh_law, joint_of_star, joint, fixed_law)
    by_law = (dict(zip(LAWS, part, strict=True)) for part in (joints, samples))
    return World(for_networks, *by_law)


def _joint(h):
    table = np.asarray(_enumerate(h), np.float64)
    return table / table.sum()


_enumerate = jax.jit(hierarchy.enumerate_joint)


def information(joint) -> float:
    """I(X; Y) in nats."""
    return float(np.sum(scipy.special.rel_entr(joint, joint.sum(axis=1)[:, None] * joint.sum(axis=0)[None, :])))


def hierarchies(config, key):
    """The hierarchy and the star of one seed."""
    tree = hierarchy.random_hierarchy(key, config.alphabet, config.depth, config.arity, config.noise)
    leaves = config.arity**config.depth
    draw = partial(hierarchy.random_hierarchy, key, config.alphabet, 1, leaves)
    ends = [[np.asarray(kernels) for kernels in draw(p)[:2]] for p in (0.0, 1.0)]
    # Kernels are linear in p.
    star = lambda p: Hierarchy(*((1 - p) * a + p * b for a, b in zip(*ends, strict=True)))  # noqa: E731
    wanted, least = root_leaf_information(tree), root_leaf_information(star(1.0))
    if wanted < least:
        raise ValueError(
            f"a leaf of the hierarchy says {wanted:.3g} nats of the root, of a star at least {least:.3g}: no star "
            f"matches at noise {config.noise}. Lower the noise"
        )
    p = scipy.optimize.brentq(lambda p: root_leaf_information(star(p)) - wanted, 0.0, 1.0)
    return tree, draw(p)


def root_leaf_information(h: Hierarchy) -> float:
    """I(root; leaf) in nats, mean over the leaves of both trees; the root is uniform."""
    found = []
    for kernels in h[:2]:
        layers = np.asarray(kernels, np.float64)
        for ranks in itertools.product(range(layers.shape[1]), repeat=len(layers)):
            law = functools.reduce(np.matmul, (layer[i] for layer, i in zip(layers, ranks, strict=True)))
            found.append(np.mean(np.sum(scipy.special.rel_entr(law, law.mean(axis=0)), axis=1)))
    return float(np.mean(found))


def permuted(joint, alphabet: int):
    """P(x, y) with the leaves of every image and of every text in a random order."""
    for _ in range(2):  # images, then texts, which a transposition makes the rows
        grid = joint.reshape(*(alphabet,) * _leaves(joint, alphabet), -1)
        orders = list(itertools.permutations(range(grid.ndim - 1)))
        joint = (sum(grid.transpose(*order, -1) for order in orders) / len(orders)).reshape(joint.shape).T
    return joint


def reordered(joint, alphabet: int, order):
    """P(x, y) of images and texts whose leaf i is what leaf order[i] was."""
    for _ in range(2):
        grid = joint.reshape(*(alphabet,) * len(order), -1)
        joint = grid.transpose(*order, -1).reshape(joint.shape).T
    return joint


def _leaves(joint, alphabet):
    return round(np.log(len(joint)) / np.log(alphabet))


# Training -------------------------------------------------------------------------------------------------------------


@one_object
def encoder(kind: str, config):
    """`transformer` (its one-layer form by gates) or `mlp`, of unit vectors; embeddings have `width` entries."""
    shape = (config.arity**config.depth, config.alphabet)
    if kind == "mlp":
        return encoders.MLP(4 * config.width, config.width, depth=3, activation="gelu", parametrisation="standard")
    return encoders.Transformer(config.width, config.width, tokens=shape, depth=2, parametrisation="standard")


def train(kind, config, keys, samples, counts, gates, *, label, steps):
    """Parameters (members, ...) after each number of `steps`, on the host.

    keys : (members,), of the initial parameters and the batches.
    samples : (image, text), (members, n, T); counts : (members,), powers of two, of those that are used.
    gates : (members, 2) of the blocks, for transformers.
    label : of the folder of checkpoints.
    """
    for_weights, for_batches = (jax.vmap(partial(jax.random.fold_in, data=i))(keys) for i in range(2))
    loss, params = _objective(kind, config), _start(kind, config, for_weights)
    data = (samples, counts, gates, jax.random.key_data(for_batches))
    optimizer, augment, updates = (
        adam(config.learning_rate, steps[-1] // 10, steps[-1]),
        _batches(config),
        len(keys) * steps[-1],
    )
    if updates >= LONG:
        training.check_memory(loss.seen, params, data, optimizer=optimizer, augment=augment, memory=room())
    kept = checkpoints(f"{label}-training", updates)
    run = training.train(
        loss,
        params,
        data,
        optimizer=optimizer,
        steps=steps[-1],
        key=jax.random.key(0),  # of the steps; members have their own as well
        augment=augment,
        metrics=parameters,
        metric_steps=steps,
        compiler_options=one_thread(),
        **kept,
    )
    return jax.device_get(finished(run, "the training", kept.get("checkpoint")).metrics)


@partial(jax.jit, static_argnums=(0, 1))
def embed(kind, config, params, leaves, gates):
    """Embeddings (members, n, width) of both modalities, leaves (members, n, T) of each or (n, T) for all."""
    axes = tuple(None if x.ndim == 2 else 0 for x in leaves)
    one = lambda p, x, g: tuple(_apply(kind, config, p, m, side, g) for m, side in zip(MODALITIES, x, strict=True))  # noqa: E731
    return jax.vmap(one, in_axes=(0, axes, 0))(params, leaves, gates)


def _apply(kind, config, params, modality, leaves, gates):
    x = jax.nn.one_hot(leaves, config.alphabet)
    if kind == "mlp":
        return encoder(kind, config).apply(params[modality], x.reshape(len(x), -1))
    return encoder(kind, config).apply(params[modality], x, gates=gates)


@partial(jax.jit, static_argnums=(0, 1))
def _start(kind, config, keys):
    shape = (1, config.arity**config.depth, config.alphabet)
    x = jnp.zeros(shape if kind == "transformer" else (1, shape[1] * shape[2]))

    def one(key):
        both = jax.lax.map(lambda k: encoder(kind, config).init(k, x), jax.random.split(key))
        return {modality: jax.tree.map(lambda a, i=i: a[i], both) for i, modality in enumerate(MODALITIES)}

    return jax.lax.map(one, keys)


@one_object
def _objective(kind, config):
    """Summed CLIP losses of independent members, in groups of K pairs."""

    def one(params, batch):
        image, text, gates = batch
        za, zb = (_apply(kind, config, params, m, x, gates) for m, x in zip(MODALITIES, (image, text), strict=True))
        return jnp.mean(clip_in_groups("dot", CANDIDATES, 0.0, za, zb))

    return sum_over_members(one)


@one_object
def _batches(config):
    def one(step, sample, count, key):
        rows = shuffled_rows(jax.random.fold_in(jax.random.wrap_key_data(key), step), count, config.batch)
        return tuple(leaves[rows] for leaves in sample)

    def draw(key, data):
        samples, counts, gates, keys = data
        return *jax.vmap(partial(one, jax.random.bits(key)))(samples, counts, keys), gates

    return draw


# Losses ---------------------------------------------------------------------------------------------------------------


@jax.jit
def validation(za, zb):
    """CLIP loss (members,) of embeddings (members, n, z) in groups of K."""
    return jnp.mean(jax.vmap(partial(clip_in_groups, "dot", CANDIDATES, 0.0))(za, zb), axis=1)


@partial(jax.jit, static_argnums=(2, 4))
def exactly(joints, tables, alphabet, least, tasks):
    """Excess among K (both directions), and of the tasks, of tables (members, nx, ny), as (members, 1 + tasks).

    least : (members,), the risks among K of the best scores.
    """
    of_task = {"zero_shot": _zero_shot, "next_token": _next_token, "denoising": _denoising}

    def one(instance):
        joint, score, least = instance
        excess = risk.contrastive_risk(joint, score, CANDIDATES, side="both") - least
        return jnp.stack([excess, *(of_task[task](joint, score, alphabet) for task in tasks)])

    return jax.lax.map(one, (joints, tables, least))


def _zero_shot(joint, score, alphabet):
    """Of the text's first leaf as label of the image, nats."""
    return downstream.zero_shot(_hierarchy_exact.first_leaf(joint, alphabet), joint, score).log_loss.excess


def _next_token(joint, score, alphabet):
    """Of the text given the image, mean over leaves, nats."""
    leaves = round(math.log(joint.shape[1], alphabet))
    return jnp.mean(downstream.next_token(joint, score, leaves * (alphabet,)).excess)


def _denoising(joint, score, alphabet):
    """Of the image's first leaf with noise of deviation 1, one step between symbols, given the text; mean square."""

    def first(law):
        return jnp.sum(law.reshape(alphabet, -1, law.shape[1]), axis=1)

    law = first(joint)
    model = first(information_loss.model_conditional(joint.T, score.T).T)  # P_s(first leaf | y)
    ratio = jnp.log(model) - jnp.log(jnp.sum(law, axis=1))[:, None]
    return denoisers.denoising(law, ratio, jnp.arange(alphabet, dtype=law.dtype), 1.0).excess


def score_table(kind, config, params, gates):
    """Scores (members, nx, ny) of all configurations of leaves, in the order of `hierarchy.enumerate_joint`."""
    leaves = hierarchy.all_leaves(config.alphabet, config.arity**config.depth)
    return _tables(*embed(kind, config, params, (leaves, leaves), gates))


@jax.jit
def _tables(za, zb):
    return jax.vmap(partial(similarity.pairwise, similarity.dot))(za, zb)


def constant_risk() -> float:
    """Risk among K, both directions, of a constant score."""
    return 2 * np.log(CANDIDATES)


@jax.jit
def least_risks(joints):
    """Risk among K, both directions, of the best score of each law (members, nx, ny)."""
    return jax.lax.map(lambda joint: risk.minimal_risk(joint, CANDIDATES, side="both"), joints)


@jax.jit
def floors(joints, others, least):
    """Excess among K, both directions, on laws (members, nx, ny) of the best scores of other laws."""
    lost = lambda p, other: risk.contrastive_risk(p, risk.optimal_score(other), CANDIDATES, side="both")  # noqa: E731
    return jax.lax.map(lambda pair: lost(*pair), (joints, others)) - least
