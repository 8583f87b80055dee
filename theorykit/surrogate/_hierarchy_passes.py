"""Message passing over both trees of a hierarchy, by products where that is exact and else in log space, in blocks."""

import jax
import jax.numpy as jnp

from theorykit.surrogate import _message_passing as passing
from theorykit.surrogate import _message_products as products
from theorykit.surrogate._hierarchy_model import prior_of, to_nodes


def evidence(kernels, leaves):
    """Log-likelihood of the root, (S, n), and messages in log space of clean leaves (n, m^L)."""
    return passing.to_root(kernels, *passing.clean(kernels, to_nodes(leaves, kernels)))


def likelihood(tree, leaves):
    """Log-likelihood of the root, (S, n), up to a constant for each sample, from clean leaves (n, m^L)."""
    return _if_bounded(
        tree,
        lambda leaves: products.clean_to_root(tree, to_nodes(leaves, tree.kernels))[0],
        lambda leaves: evidence(tree.kernels, leaves)[0],
        leaves,
    )


def log_prior(h):
    """(S, 1)"""
    return jnp.log(prior_of(h))[:, None]


def scores(h, image, text):
    """s* from ln P(s | x) (..., n, S) and ln P(s | y) (..., k, S) as (..., n, k)."""
    return passing.log_products(image, text - log_prior(h).reshape((1,) * (text.ndim - 1) + (-1,)))


def denoised(tree, noisy, sigma, root, of):
    """of(weights), the law of every leaf up to a constant, (m, S, m^(L-1), n), given noisy leaves and the root's."""
    kernels = tree.kernels

    def by_products(noisy, sigma, root):
        seen = passing.noisy_weights(kernels, to_nodes(noisy, kernels), sigma)
        *messages, q = products.noisy_to_root(kernels, seen)
        t = products.to_parents(kernels, messages, root, causal=False)
        return of(products.weights_from_all(kernels[-1], q, seen, t))

    def in_log_space(noisy, sigma, root):
        seen = passing.noisy_evidence(kernels, to_nodes(noisy, kernels), sigma)
        _, messages = passing.to_root(kernels, passing.through(kernels[-1], seen))
        return of(jax.nn.softmax(seen + passing.to_leaves(kernels, messages, root, causal=False), axis=1))

    return _if_bounded(tree, by_products, in_log_space, noisy, sigma, root)


def law(weights):
    """Weights (m, S, nodes, n) -> probabilities"""
    return weights / jnp.sum(weights, axis=1, keepdims=True)


def mean_symbol(weights):
    """(m, S, nodes, n) -> (m, nodes, n)"""
    # Sums of sums: S additions to the total and S to the mean, in one pass over the weights.
    total = mean = jnp.zeros_like(weights[:, 0])
    for s in range(weights.shape[1] - 1, 0, -1):
        total = total + weights[:, s]
        mean = mean + total
    return mean / (total + weights[:, 0])


def predicted(tree, leaves, root):
    """Log-law of every token given those on its left, (m, S, m^(L-1), n), from clean leaves (n, m^L) and the root's.

    Also the log-likelihood of the root, as `likelihood`.
    """
    kernels = tree.kernels

    def by_products(leaves, root):
        nodes = to_nodes(leaves, kernels)
        found, messages = products.clean_to_root(tree, nodes)
        t = products.to_parents(kernels, messages, root, causal=True)
        return products.log_law_from_left(tree, nodes, t), found

    def in_log_space(leaves, root):
        found, messages = evidence(kernels, leaves)
        return jax.nn.log_softmax(passing.to_leaves(kernels, messages, root, causal=True), axis=1), found

    return _if_bounded(tree, by_products, in_log_space, leaves, root)


def _if_bounded(tree, by_products, in_log_space, *arrays):
    return jax.lax.cond(tree.bounded, by_products, in_log_space, *arrays)


def trees(h, samples):
    """The trees of both modalities, prepared for this number of samples."""
    return products.tree(h.image, samples), products.tree(h.text, samples)


def in_blocks(function, h, *arrays):
    """function(*arrays) of arrays (n, ...) or None, a block of rows at a time; its result has n rows too."""
    leaves = max(kernels.shape[1] ** kernels.shape[0] for kernels in (h.image, h.text))
    most = max(_ROWS, _block_bytes() // (leaves * h.image.shape[-1] * h.image.dtype.itemsize) // _ROWS * _ROWS)
    (n,) = {array.shape[0] for array in arrays if array is not None}
    blocks = -(-n // most)
    if blocks <= 1:
        return function(*arrays)

    def split(array):
        padding = ((0, most * blocks - n), *((0, 0),) * (array.ndim - 1))
        return jnp.pad(array, padding, mode="edge").reshape(blocks, most, *array.shape[1:])

    found = jax.lax.map(lambda part: function(*part), jax.tree.map(split, arrays))
    return found.reshape(-1, *found.shape[2:])[:n]


# Rows below which loops over them are too short to be vectorised well.
_ROWS = 64


def _block_bytes():
    """Size of one array of messages: what a core's cache holds several of, or else a bound on memory."""
    return 2**19 if jax.default_backend() == "cpu" else 2**28


def posterior(h, kernels, leaves):
    """ln P(root | leaves), (n, S)."""
    tree = products.tree(kernels, len(leaves))
    return in_blocks(lambda part: jax.nn.log_softmax(log_prior(h) + likelihood(tree, part), axis=0).T, h, leaves)
