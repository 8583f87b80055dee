r"""The messages of `_message_passing` as products of probabilities, for kernels none of whose entries is small.

Let k be the smallest entry of the kernels of a tree, m its arity. Every message is a mean of kernel entries by weights
that sum to one, hence between k and 1 (or S, back to the leaves), whatever the leaves are,

    towards the root     q_v = M_v w_v,     w_v ~ prod over children c of q_c      (at a leaf: its symbol or evidence)
    back to the leaves   t_v = M_v^T v,     v = t_parent prod over siblings w of q_w

so that products of siblings are at least k^m, and with weights that sum to one at every node nothing underflows that
counts: `Tree.bounded`. Neither logarithms nor exponentials are needed between the leaves and the root.

Arrays are laid out as in `_message_passing`, (m, S, nodes, n).
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Tree(NamedTuple):
    """What passes over many samples share.

    Parameters
    ----------
    kernels : (L, m, S, S)
    bounded : bool
        Whether every message is a normal number to full precision.
    together : tuple of (S, S^i), i = 1 .. m, or None
        Probability of the first i leaves below one parent, for every parent and all they can be.
    above : (m, S, S^m), or None
        Messages of the parents, for all their leaves can be.
    """

    kernels: jax.Array
    bounded: jax.Array
    together: tuple[jax.Array, ...] | None
    above: jax.Array | None


def tree(kernels: jax.Array, samples: int) -> Tree:
    """Prepare passes over this number of samples; tables are for passes that look up more columns than they have."""
    depth, arity, symbols = kernels.shape[:3]
    if symbols**arity > samples * arity ** (depth - 1):
        return Tree(kernels, _bounded(kernels), None, None)
    together = [kernels[-1, 0]]
    for kernel in kernels[-1, 1:]:
        together.append((together[-1][:, :, None] * kernel[:, None, :]).reshape(symbols, -1))
    above = None
    if depth > 1:
        parents = _normalised(together[-1])
        above = jnp.einsum("iab,bc->iac", kernels[-2], parents, precision="highest")
    return Tree(kernels, _bounded(kernels), tuple(together), above)


def _bounded(kernels):
    # Weights of a node are above k^m / S, and what they add to a message above k^(m + 1) / S^2. Whatever is lost below
    # the smallest normal number must be less than a rounding of that.
    arity, symbols = kernels.shape[1:3]
    info = jnp.finfo(kernels.dtype)
    least = math.log(float(info.tiny)) - math.log(float(info.eps)) + 2 * math.log(symbols)
    return (arity + 1) * jnp.log(jnp.min(kernels)) > least


def clean_to_root(of: Tree, leaves: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
    """Log-likelihood of the root, (S, n), up to a constant for each sample, and messages of all edges but the leaves'.

    Takes leaves (m, nodes, n). A symbol outside the alphabet makes all of its sample NaN.
    """
    kernels, (arity, symbols) = of.kernels[:-1], of.kernels.shape[1:3]
    if of.together is None:
        h, found = _product([_columns(k, one) for k, one in zip(of.kernels[-1], leaves, strict=True)]), []
    elif of.above is None:
        h, found = _columns(of.together[-1], _numbers(leaves, symbols)[-1]), []
    else:
        siblings = _numbers(leaves, symbols)[-1].reshape(arity, -1, leaves.shape[-1])
        q = jnp.stack([_columns(table, one) for table, one in zip(of.above, siblings, strict=True)])
        h, found, kernels = _product(q), [q], kernels[:-1]
    root, above = _to_root(kernels, h)
    known = jnp.all((leaves >= 0) & (leaves < symbols), axis=(0, 1))
    return jnp.where(known[None], root, jnp.nan), above + found


def noisy_to_root(kernels: jax.Array, seen: jax.Array) -> list[jax.Array]:
    """Messages of all edges, the first layer's first, from weights `seen` (m, S, nodes, n) of the symbols of leaves."""
    q = _through(kernels[-1], seen)
    return [*_to_root(kernels[:-1], _product(q))[1], q]


def to_parents(kernels: jax.Array, messages: list[jax.Array], root: jax.Array, *, causal: bool) -> jax.Array:
    """What is known of the leaves' parents from elsewhere, (S, nodes, n), from messages of the edges above them.

    Elsewhere is everything outside of a node, or what is on the left of it. Takes ln P of the root, (S, n).
    """
    t = jnp.exp(root - jnp.max(root, axis=0, keepdims=True))[:, None]
    for layer, q in zip(kernels[:-1], messages, strict=True):
        t = _through(jnp.swapaxes(layer, 1, 2), t[None] * _others(q, causal))
        t = _normalised(jnp.swapaxes(t, 0, 1).reshape(t.shape[1], -1, t.shape[-1]))
    return t


def log_law_from_left(of: Tree, leaves: jax.Array, t: jax.Array) -> jax.Array:
    """Log-law of every leaf given those on its left, (m, S, nodes, n)."""
    kernel, given = of.kernels[-1], [t]
    if of.together is None:
        for one, symbol in zip(kernel[:-1], leaves[:-1], strict=True):
            given.append(given[-1] * _columns(one, symbol))
    else:
        for table, number in zip(of.together[:-1], _numbers(leaves, kernel.shape[1])[:-1], strict=True):
            given.append(t * _columns(table, number))
    # Rows of kernels sum to one, but for rounding: the last output is the sum of the others.
    kernel = jnp.concatenate([kernel, jnp.sum(kernel, axis=2, keepdims=True)], axis=2)
    law = _through(jnp.swapaxes(kernel, 1, 2), jnp.stack(given))
    return jnp.log(law[:, :-1] * (1 / law[:, -1:]))


def weights_from_all(kernel: jax.Array, q: jax.Array, seen: jax.Array, t: jax.Array) -> jax.Array:
    """Law of every leaf given all leaves, (m, S, nodes, n), up to a constant for each leaf."""
    return seen * _through(jnp.swapaxes(kernel, 1, 2), t[None] * _others(q, causal=False))


def _numbers(leaves, symbols):
    """Numbers, in base S, of what the first 1, 2, ... siblings are."""
    found = [leaves[0]]
    for leaf in leaves[1:]:
        found.append(found[-1] * symbols + leaf)
    return found


def _columns(table, numbers):
    """(S, k) at (nodes, n) -> (S, nodes, n)"""
    return jnp.take(table, numbers, axis=1, mode="clip")


def _to_root(kernels, h):
    found = []
    for layer in kernels[::-1]:
        w = _normalised(h).reshape(len(h), len(layer), -1, h.shape[-1])
        found.append(_through(layer, jnp.swapaxes(w, 0, 1)))
        h = _product(found[-1])
    return jnp.log(h[:, 0]), found[::-1]


def _through(kernel, w):
    return jnp.einsum("iab,ibrn->iarn", kernel, w, precision="highest")


def _normalised(h):
    # A product with ones: XLA's sums over this axis are many times slower on a CPU.
    total = jnp.einsum("s,s...->...", jnp.ones(len(h), h.dtype), h, precision="highest")
    return h * (1 / total)[None]


def _product(parts):
    total = parts[0]
    for part in parts[1:]:
        total = total * part
    return total


def _others(q, causal):
    """Products of what the siblings on the left say, and those on the right unless causal, for each rank."""
    one = jnp.ones_like(q[0])
    left, right = [one], [one]
    for i in range(len(q) - 1):
        left.append(left[-1] * q[i])
        right.append(right[-1] * q[len(q) - 1 - i])
    if causal:
        return jnp.stack(left)
    return jnp.stack([a * b for a, b in zip(left, right[::-1], strict=True)])
