"""Pairs of transformers on leaves of trees, with the scores of three heads; see `_hierarchy_clip`."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from experiments._side_by_side import BRIEFLY, one_object
from theorykit import encoders, similarity
from theorykit.surrogate import hierarchy

HEADS = {"dot": similarity.dot, "cosine": similarity.cosine, "softmax": similarity.log_softmax_product}
MODALITIES = ("image", "text")
# Inverse temperature of cosines to begin with (Radford et al., arXiv 2103.00020).
FIRST_SCALE = 1 / 0.07


@dataclasses.dataclass(frozen=True)
class Size:
    """Sizes of the trees (both modalities), of the transformers and of a step.

    The learning rate rises linearly from 0 over `warm_up` steps (Adam's second moments are poor until then, and
    attention is easily saturated by them) and falls to 0 along a cosine, so that the noise of batches averages out.
    """

    alphabet: int = 4
    depth: int = 2
    arity: int = 2
    width: int = 32
    blocks: int = 2
    heads: int = 4
    mlp_ratio: int = 2
    batch: int = 64
    learning_rate: float = 5e-3
    warm_up: int = 50

    @property
    def leaves(self) -> int:
        """T, of one tree."""
        return self.arity**self.depth


@one_object
def encoder(size: Size, head: str) -> encoders.Transformer:
    """The transformer of each modality. Each has `width` features, also where the optimal score needs S only."""
    return encoders.Transformer(
        size.width,
        size.width,
        tokens=(size.leaves, size.alphabet),
        depth=size.blocks,
        heads=size.heads,
        mlp_ratio=size.mlp_ratio,
        parametrisation="standard",
    )


def one_hot(leaves, alphabet):
    """(..., T) -> (..., T, S): what encoders see. They learn the positions."""
    return jax.nn.one_hot(leaves, alphabet)


def initial(size, head, keys):
    """Parameters of both encoders, log scale of the cosine, read-outs of the guidance; unused ones keep still."""
    x = jnp.zeros((1, size.leaves, size.alphabet))

    def one(key):
        # One after the other, as the members: a program for all at once takes three times as long to compile.
        both = jax.lax.map(lambda k: encoder(size, head).init(k, x), jax.random.split(key))
        params = {modality: jax.tree.map(lambda a, i=i: a[i], both) for i, modality in enumerate(MODALITIES)}
        nothing = jnp.zeros((2, size.blocks, size.width + 1, size.alphabet))
        return params | {"log_scale": jnp.log(jnp.asarray(FIRST_SCALE, jnp.float32)), "read_out": nothing}

    return jax.lax.map(one, keys)


# `initial` as a program of its own, which cannot be a part of another one.
start = jax.jit(initial, static_argnames=("size", "head"), compiler_options=BRIEFLY)


# Scores ---------------------------------------------------------------------------------------------------------------


def pairwise(head, log_scale, image, text):
    table = similarity.pairwise(HEADS[head], image, text)
    return table * jnp.exp(log_scale) if head == "cosine" else table


def clip(table):
    """Mean over pairs of both directions' log-losses, added: 2 `losses.clip`, of a table that may hold -inf."""
    sums = sum(jax.scipy.special.logsumexp(table, axis=axis) for axis in (0, 1))
    return jnp.mean(sums - 2 * jnp.diagonal(table))


def clip_in_groups(head, candidates, log_scale, image, text):
    """`clip` of each group of K consecutive pairs, (n // K,)."""
    used = image.shape[0] - image.shape[0] % candidates
    groups = (z[:used].reshape(-1, candidates, z.shape[1]) for z in (image, text))
    return jax.vmap(lambda a, b: clip(pairwise(head, log_scale, a, b)))(*groups)


# What trained encoders do ---------------------------------------------------------------------------------------------

# Rows of leaves that all members embed at once: with the 81 tokens of the preset paper their attention takes 1 GiB.
ROWS = 1024


def embed(size, head, params, modality, leaves, gates=None):
    """Embeddings (members, n, features)."""
    return _applied(size, head, params[modality], leaves, gates, kept=False)


def states(size, head, params, modality, leaves, gates=None):
    """Hidden states after the embedding and after each block, (members, blocks + 1, n, T, width)."""
    return _applied(size, head, params[modality], leaves, gates, kept=True)


@functools.partial(jax.jit, static_argnames=("size", "head", "kept"))
def _applied(size, head, params, leaves, gates, *, kept):
    """One program for both modalities; leaves (n, T) are those of all members."""
    net = encoder(size, head)

    def one(params, gates, leaves):
        x = one_hot(leaves, size.alphabet)
        if not kept:
            return net.apply(params, x, gates=gates)
        return net.apply(params, x, gates=gates, mutable="intermediates")[1]["intermediates"]["states"][0]

    def all_members(leaves):
        axes = (0, None if gates is None else 0, 0 if leaves.ndim == 3 else None)
        return jax.vmap(one, axes)(params, gates, leaves)

    n = leaves.shape[0]
    if kept or leaves.ndim == 3 or n <= ROWS:
        return all_members(leaves)
    parts = jnp.pad(leaves, ((0, -n % ROWS), (0, 0))).reshape(-1, ROWS, leaves.shape[1])
    found = jnp.moveaxis(jax.lax.map(all_members, parts), 0, 1)
    return found.reshape(found.shape[0], -1, found.shape[-1])[:, :n]


def scores(size, head, params, image, text, gates=None):
    """Scores of all images with all texts, (members, n, k)."""
    embedded = (embed(size, head, params, m, x, gates) for m, x in zip(MODALITIES, (image, text), strict=True))
    return _scores(head, params["log_scale"], *embedded)


@functools.partial(jax.jit, static_argnames="head")
def _scores(head, log_scale, image, text):
    return jax.vmap(functools.partial(pairwise, head))(log_scale, image, text)


def score_table(size, head, params, gates=None):
    """Scores of all configurations of leaves, (members, S^T, S^T), in the order of `hierarchy.enumerate_joint`."""
    leaves = hierarchy.all_leaves(size.alphabet, size.leaves)
    return scores(size, head, params, leaves, leaves, gates)
