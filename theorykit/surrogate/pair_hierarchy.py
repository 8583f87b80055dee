r"""A hierarchy whose siblings are drawn together: the non-factorised stress model of message passing.

Every node a of a binary tree draws the pair of its children from its own list of pairs,

    P(b, c | a) = M[a, b, c],        each pair (b, c) on the list of one parent only.

Given the parent the siblings depend on each other, unlike in `hierarchy`, and two clean leaves fix their parent.
Message passing is exact here too, with h_a = ln sum_bc M[a, b, c] e^{h_b + h_c}. Evidence is given for each leaf and
symbol as a log-likelihood, so leaves may be known, hidden or noisy.

Source: Garnier-Brun, Mezard, Moscato, Saglietti (arXiv 2408.15138).
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from theorykit import _random
from theorykit.surrogate import _message_passing as passing
from theorykit.surrogate._hierarchy_model import (
    check_symbols,
    cumulative,
    first_above,
    from_nodes,
    leaves_in_order,
    to_nodes,
)

# Numbers that the oracle holds at once: 512 MiB of float64.
_MOST_CELLS = 2**26
# As for joints: 16 random walks of the roundings of a sum of n probabilities.
_ROUNDINGS = 16


class PairHierarchy(NamedTuple):
    """A binary tree of depth L over S symbols.

    Parameters
    ----------
    kernels : (L, S, S, S)
        Entry [l, a, b, c] is the probability that a node a of layer l has the children b, on the left, and c.
    prior : (S,)
        Law of the root, every entry positive.
    """

    kernels: Float[Array, "L S S S"]
    prior: Float[Array, " S"]


class PairSample(NamedTuple):
    """Root (n,) and leaves (n, 2^L), from left to right."""

    root: Int[Array, " n"]
    leaves: Int[Array, "n leaves"]


def random_pair_hierarchy(key: Key[Array, ""], alphabet: int, depth: int, *, spread: float = 1.0) -> PairHierarchy:
    r"""Draw a hierarchy: all S^2 pairs are dealt out at random, S to each parent, with softmax weights.

    .. math:: M[a, b, c] = softmax_{(b, c) \in O_a} (c_0 \, G), \qquad G \sim N(0, 1), \qquad
              O_a \cap O_{a'} = \emptyset

    Parameters
    ----------
    key : PRNG key
        Fixes the draw; every layer has its own.
    alphabet, depth : int
        S >= 2 and L >= 1.
    spread : float
        c_0, the deviation of the logits.

    Returns
    -------
    PairHierarchy with a uniform prior, in the default float dtype.

    Raises
    ------
    ValueError
        If a size is too small.
    """
    if alphabet < 2 or depth < 1:
        raise ValueError(f"random_pair_hierarchy: alphabet {alphabet}, depth {depth}; give at least 2 and 1")
    dtype = jnp.result_type(float)

    def layer(key):
        for_owner, for_logits = jax.random.split(key)
        owner = jax.random.permutation(for_owner, jnp.arange(alphabet**2) // alphabet)
        logits = spread * jax.random.normal(for_logits, (alphabet, alphabet**2), dtype)
        owned = owner[None, :] == jnp.arange(alphabet)[:, None]
        return jax.nn.softmax(jnp.where(owned, logits, -jnp.inf), axis=1).reshape((alphabet,) * 3)

    return PairHierarchy(jax.vmap(layer)(jax.random.split(key, depth)), jnp.full(alphabet, 1 / alphabet, dtype))


def sample(h: PairHierarchy, key: Key[Array, ""], n: int) -> PairSample:
    """Draw roots and leaves exactly.

    Parameters
    ----------
    h : PairHierarchy
    key : PRNG key
    n : int
        Number of samples, at least 1.

    Returns
    -------
    PairSample

    Raises
    ------
    ValueError
        For parameters that are no hierarchy, and n < 1.
    """
    _check(h, "sample")
    if n < 1:
        raise ValueError(f"sample: n is {n}; draw at least one sample")
    return _sample(h, key, n)


def evidence(
    leaves: Int[Array, "n leaves"], alphabet: int, *, seen: Bool[Array, "n leaves"] | None = None
) -> Float[Array, "n leaves S"]:
    """Log-likelihood of every symbol at every leaf: 0 at the known one and -inf elsewhere, 0 throughout where hidden.

    Parameters
    ----------
    leaves : (n, leaves)
        Symbols.
    alphabet : int
        S.
    seen : (n, leaves), optional
        Which leaves are known; by default all.

    Returns
    -------
    (n, leaves, S) in the default float dtype.

    Raises
    ------
    TypeError, ValueError
        For symbols that are no whole numbers or outside the alphabet.
    """
    check_symbols(leaves, alphabet, "evidence", "leaves")
    known = leaves[:, :, None] == jnp.arange(alphabet, dtype=leaves.dtype)[None, None, :]
    if seen is not None:
        known = known | ~seen[:, :, None]
    return jnp.where(known, jnp.zeros((), jnp.result_type(float)), -jnp.inf)


def root_posterior(h: PairHierarchy, evidence: Float[Array, "n leaves S"]) -> Float[Array, "n S"]:
    """Law of the root given evidence at the leaves.

    Parameters
    ----------
    h : PairHierarchy
    evidence : (n, 2^L, S)
        Log-likelihoods, up to a constant for each leaf.

    Returns
    -------
    Log-probabilities in nats; NaN for evidence that the hierarchy excludes.

    Raises
    ------
    ValueError
        For parameters that are no hierarchy, and evidence of another shape.
    """
    _check(h, "root_posterior", evidence)
    return _root_posterior(h, evidence)


def leaf_posterior(h: PairHierarchy, evidence: Float[Array, "n leaves S"]) -> Float[Array, "n leaves S"]:
    """Law of every leaf given evidence at all leaves, its own included: of hidden leaves, what the others say.

    Parameters
    ----------
    h, evidence
        As in `root_posterior`.

    Returns
    -------
    Log-probabilities in nats; NaN for evidence that the hierarchy excludes.

    Raises
    ------
    ValueError
        As `root_posterior`.
    """
    _check(h, "leaf_posterior", evidence)
    return _leaf_posterior(h, evidence)


def enumerate_joint(h: PairHierarchy) -> Float[Array, "S configurations"]:
    """P(root, leaves) of all configurations, the last leaf fastest: the oracle for small trees.

    Parameters
    ----------
    h : PairHierarchy
        With S^(2^L + 1) <= 2^26.

    Returns
    -------
    (S, S^(2^L))

    Raises
    ------
    ValueError
        For parameters that are no hierarchy, or one that is too large.
    """
    _check(h, "enumerate_joint")
    depth, symbols = h.kernels.shape[:2]
    if symbols ** (2**depth + 1) > _MOST_CELLS:
        raise ValueError(
            f"enumerate_joint: {2**depth} leaves over {symbols} symbols make {float(symbols) ** (2**depth + 1):.3g} "
            f"cells, and {_MOST_CELLS:.3g} is the most; take a smaller tree, or message passing"
        )
    table = jnp.eye(symbols, dtype=h.kernels.dtype)
    for kernel in h.kernels[::-1]:
        table = jnp.einsum("abc,bx,cy->axy", kernel, table, table, precision="highest").reshape(symbols, -1)
    return h.prior[:, None] * table


# ---------------------------------------------------------------------------------------------------------------------


def _check(h, where, evidence=None):
    if h.kernels.ndim != 4 or len(set(h.kernels.shape[1:])) != 1 or not h.kernels.size:
        raise ValueError(f"{where}: kernels have shape {h.kernels.shape}; give (depth, S, S, S)")
    depth, symbols = h.kernels.shape[:2]
    if h.prior.shape != (symbols,) or h.prior.dtype != h.kernels.dtype:
        raise ValueError(
            f"{where}: prior is {h.prior.dtype}{h.prior.shape}; give one {h.kernels.dtype} to each of {symbols} symbols"
        )
    for name, law in (("kernels", h.kernels.reshape(depth, symbols, -1)), ("prior", h.prior)):
        if isinstance(law, jax.core.Tracer):
            continue
        values = np.asarray(law)
        room = _ROUNDINGS * math.sqrt(values.shape[-1]) * np.finfo(values.dtype).eps
        if not np.all(values >= 0) or np.any(np.abs(values.sum(axis=-1, dtype=np.float64) - 1) > room):
            raise ValueError(
                f"{where}: {name} are no laws: entries must not be negative and sum to 1, for each parent over the "
                "pairs of its children; divide by the sum"
            )
        if name == "prior" and np.any(values == 0):
            raise ValueError(f"{where}: prior is zero at symbol {int(np.argmin(values))}; give it a small probability")
    if evidence is not None and (evidence.shape[1:] != (2**depth, symbols) or evidence.dtype != h.kernels.dtype):
        raise ValueError(
            f"{where}: evidence is {evidence.dtype}{evidence.shape}; a tree of depth {depth} over {symbols} symbols "
            f"takes {h.kernels.dtype} of (n, {2**depth}, {symbols})"
        )


@jax.jit(static_argnames="n")
def _sample(h, key, n):
    depth, symbols = h.kernels.shape[:2]
    for_root, *for_layers = jax.random.split(key, depth + 1)
    root = first_above(cumulative(h.prior)[None], jax.random.uniform(for_root, (n,), h.prior.dtype))
    states = root[None]  # (nodes, n), the last rank first
    for kernel, k in zip(h.kernels, for_layers, strict=True):
        edges = cumulative(kernel.reshape(symbols, -1))[states]
        pairs = first_above(edges, _random.uniform(k, states.shape, h.prior.dtype))
        states = jnp.concatenate([pairs // symbols, pairs % symbols])
    return PairSample(root, leaves_in_order(states, _shape_of(h)))


def _shape_of(h):
    """Something with the depth and arity of the tree, for the layout of its nodes."""
    return jnp.zeros((len(h.kernels), 2, 1, 1))


def _layers(h, evidence):
    """h of the nodes below every layer, (2, S, nodes, n), the first layer on top, and that of the root, (S, n)."""
    symbols = h.kernels.shape[-1]
    found = [jnp.stack([to_nodes(evidence[:, :, a], _shape_of(h)) for a in range(symbols)], axis=1)]
    for kernel in h.kernels[:0:-1]:
        up = _parents(kernel, found[-1])
        found.append(jnp.swapaxes(up.reshape(symbols, 2, -1, up.shape[-1]), 0, 1))
    return found[::-1], _parents(h.kernels[0], found[-1])[:, 0]


def _parents(kernel, below):
    """h of parents, (S, nodes, n), from that of their children, (2, S, nodes, n)."""
    return _through_pairs(kernel, below[0][:, None] + below[1][None])


def _through_pairs(kernel, pairs):
    """ln sum_bc M[a, b, c] e^pairs[b, c] for M (S, S, S) and pairs (S, S, nodes, n), as (S, nodes, n)."""
    return passing.through(kernel.reshape(1, len(kernel), -1), pairs.reshape(1, -1, *pairs.shape[2:]))[0]


@jax.jit
def _root_posterior(h, evidence):
    return jax.nn.log_softmax(jnp.log(h.prior)[:, None] + _layers(h, evidence)[1], axis=0).T


@jax.jit
def _leaf_posterior(h, evidence):
    symbols = h.kernels.shape[-1]
    layers, root = _layers(h, evidence)
    t = jnp.broadcast_to(jnp.log(h.prior)[:, None, None], (symbols, 1, root.shape[-1]))
    for kernel, below in zip(h.kernels, layers, strict=True):
        sides = []
        for sibling, order in ((1, (1, 0, 2)), (0, (2, 0, 1))):  # (b, a, c) for the left child, (c, a, b)
            sides.append(_through_pairs(kernel.transpose(order), t[:, None] + below[sibling][None]))
        messages = jnp.stack(sides)  # (2, S, nodes, n)
        t = jnp.swapaxes(messages, 0, 1).reshape(symbols, -1, t.shape[-1])
    return from_nodes(jax.nn.log_softmax(messages + layers[-1], axis=1), _shape_of(h))
