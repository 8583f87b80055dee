r"""The joint generative hierarchical model: its parameters, their checks, random draws, exact samples."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from theorykit import _random

# As for joints: 16 random walks of the roundings of a sum of n probabilities, sqrt(n) eps each.
_ROUNDINGS = 16


class Hierarchy(NamedTuple):
    """Two trees, of an image and of a text, that share their root.

    Parameters
    ----------
    image, text : (L, m, S, S)
        Edge kernels: entry [l, i, a, b] is the probability that the child of rank i of a node in layer l is b, given
        that the node is a. All nodes of a layer use the same m kernels. A tree of depth L has m^L leaves. Depth and
        arity of the trees may differ, the alphabet 0..S-1 may not.
    prior : (S,), optional
        Law of the root, every entry positive; uniform by default.

    It is a pytree: `jax.vmap` and `jax.lax.map` go over a leading axis of many hierarchies.
    """

    image: Float[Array, "Li mi S S"]
    text: Float[Array, "Lt mt S S"]
    prior: Float[Array, " S"] | None = None


class Sample(NamedTuple):
    """Independent draws of root, image and text.

    Parameters
    ----------
    root : (n,)
    image, text : (n, leaves)
        Leaves from left to right: the leaf below the ranks i_1 .. i_L has the digits i_1 .. i_L in base m.
    """

    root: Int[Array, " n"]
    image: Int[Array, "n image_leaves"]
    text: Int[Array, "n text_leaves"]


def check_hierarchy(h: object, where: str = "check_hierarchy") -> None:
    """Raise unless `h` is a hierarchy: kernels of one alphabet whose rows are laws, a prior without zeros.

    Parameters
    ----------
    h : Hierarchy
        Values cannot be looked at inside `jax.jit`; types and shapes are.
    where : str
        The function that the message names.

    Raises
    ------
    TypeError, ValueError
        For anything else; the message says what to change.
    """
    if not isinstance(h, Hierarchy):
        raise TypeError(f"{where}: h is a {type(h).__name__}; give Hierarchy(image, text) or random_hierarchy(...)")
    for name, array in (("image", h.image), ("text", h.text), ("prior", h.prior)):
        if name == "prior" and array is None:
            continue
        if not isinstance(array, jax.Array) or not jnp.issubdtype(array.dtype, jnp.floating):
            kind = array.dtype if isinstance(array, jax.Array) else type(array).__name__
            raise TypeError(f"{where}: {name} is {kind}; give a JAX array of floating point, jnp.asarray(...)")
        if array.dtype != h.image.dtype:
            raise TypeError(f"{where}: {name} has dtype {array.dtype} and image {h.image.dtype}; cast one of them")
    for name, kernels in (("image", h.image), ("text", h.text)):
        if kernels.ndim != 4 or not kernels.size or kernels.shape[2] != kernels.shape[3]:
            raise ValueError(f"{where}: {name} has shape {kernels.shape}; give kernels (depth, arity, S, S)")
    symbols = h.image.shape[-1]
    if h.text.shape[-1] != symbols:
        raise ValueError(
            f"{where}: image has {symbols} symbols and text {h.text.shape[-1]}; the trees share a root, so give "
            "them one alphabet"
        )
    if h.prior is not None and h.prior.shape != (symbols,):
        raise ValueError(f"{where}: prior has shape {h.prior.shape}; give one probability to each of {symbols} symbols")
    for name, law in (("image", h.image), ("text", h.text), ("prior", h.prior)):
        if law is not None and not isinstance(law, jax.core.Tracer):
            check_laws(where, name, np.asarray(law))


def check_laws(where: str, name: str, values: np.ndarray) -> None:
    """Raise unless the rows of `values` are laws; a prior without zeros."""
    if not (values.min() >= 0 and values.max() < np.inf):  # a NaN is neither
        raise ValueError(f"{where}: {name} holds entries that are negative or not finite; give probabilities")
    off = np.abs(np.sum(values, axis=-1, dtype=np.float64) - 1)
    if np.any(off > _ROUNDINGS * math.sqrt(values.shape[-1]) * np.finfo(values.dtype).eps):
        if name == "prior":
            raise ValueError(f"{where}: prior sums to {values.sum():.9g}, not to 1; divide it by its sum")
        worst = tuple(int(i) for i in np.unravel_index(np.argmax(off), off.shape))
        raise ValueError(
            f"{where}: row {worst} of {name} sums to {values[worst].sum():.9g}, not to 1; the last axis is the child's "
            "symbol, divide by the sum over it"
        )
    if name == "prior" and np.any(values == 0):
        raise ValueError(
            f"{where}: prior is zero at symbol {int(np.argmin(values))}; every root needs a positive probability: "
            "leave the symbol out of the alphabet, or give it a small one"
        )


def check_leaves(leaves: object, kernels: Array, where: str, name: str) -> None:
    """Raise unless `leaves` are whole numbers (n, m^L) inside the alphabet of the kernels."""
    check_symbols(leaves, kernels.shape[-1], where, name)
    check_count(leaves, kernels, where, name)


def check_symbols(leaves: object, symbols: int, where: str, name: str) -> None:
    """Raise unless `leaves` are whole numbers 0 to symbols - 1."""
    if not isinstance(leaves, jax.Array) or not jnp.issubdtype(leaves.dtype, jnp.integer):
        kind = leaves.dtype if isinstance(leaves, jax.Array) else type(leaves).__name__
        raise TypeError(f"{where}: {name} is {kind}; leaves are symbols, give a JAX array of whole numbers")
    if not isinstance(leaves, jax.core.Tracer) and leaves.size:
        values = np.asarray(leaves)  # also inside jit, where jnp would stage it
        low, high = int(values.min()), int(values.max())
        if low < 0 or high >= symbols:
            raise ValueError(
                f"{where}: {name} holds symbols {low} to {high}, outside the alphabet 0..{symbols - 1}; recode the "
                "leaves, or give kernels of a larger alphabet"
            )


def check_noisy(leaves: object, sigma: object, kernels: Array, where: str) -> None:
    """Raise unless `leaves` are finite floating-point numbers (n, m^L), and the noise has a positive deviation."""
    if not isinstance(leaves, jax.Array) or leaves.dtype != kernels.dtype:
        kind = leaves.dtype if isinstance(leaves, jax.Array) else type(leaves).__name__
        raise TypeError(f"{where}: noisy leaves are {kind} and kernels {kernels.dtype}; cast one of them")
    check_count(leaves, kernels, where, "noisy")
    if not isinstance(leaves, jax.core.Tracer) and not np.all(np.isfinite(np.asarray(leaves))):
        raise ValueError(f"{where}: noisy leaves hold NaN or infinite values; remove these rows")
    check_sigma(sigma, where)


def check_sigma(sigma: object, where: str) -> None:
    """Raise unless the deviation of the noise is a positive number."""
    if not isinstance(sigma, jax.core.Tracer) and not 0 < float(sigma) < math.inf:
        raise ValueError(
            f"{where}: sigma is {sigma}; give the positive standard deviation of the noise, or take clean leaves, "
            "which need no denoising"
        )


def check_count(leaves: Array, kernels: Array, where: str, name: str) -> None:
    """Raise unless there are m^L leaves in every row."""
    depth, arity = kernels.shape[:2]
    if leaves.ndim != 2 or leaves.shape[1] != arity**depth:
        raise ValueError(
            f"{where}: {name} has shape {leaves.shape}; a tree of depth {depth} and arity {arity} has {arity**depth} "
            f"leaves: give (n, {arity**depth})"
        )


def prior_of(h: Hierarchy) -> Array:
    """Law of the root, (S,)."""
    symbols = h.image.shape[-1]
    return jnp.full(symbols, 1 / symbols, h.image.dtype) if h.prior is None else h.prior


def random_hierarchy(
    key: Key[Array, ""],
    alphabet: int,
    depth: int | tuple[int, int],
    arity: int | tuple[int, int],
    noise: float | Float[Array, ""],
    *,
    spread: float = 1.0,
    prior: Float[Array, " S"] | None = None,
) -> Hierarchy:
    r"""Draw a hierarchy: a permutation for each layer, blurred by noise of its own for each rank.

    .. math:: M_{l, i} = (1 - p) \, \Pi_l + p \, softmax_{rows}(c \, G_{l, i}), \qquad G \sim N(0, 1)

    Parameters
    ----------
    key : PRNG key
        Fixes permutations and noise; draws with the same key differ in p only.
    alphabet : int
        S, at least 2.
    depth, arity : int, or two of them
        L and m, at least 1, of both trees or of image and text.
    noise : scalar in [0, 1]
        p: at 0 the root fixes all leaves, at 1 only the softmax remains. May be traced.
    spread : float
        c, the deviation of the logits; at 0 and p = 1 the leaves say nothing of the root.
    prior : (S,), optional
        Law of the root; uniform by default.

    Returns
    -------
    Hierarchy, in the default float dtype.

    Raises
    ------
    ValueError
        For an alphabet below 2, depth or arity below 1, p outside [0, 1], or a prior as in `check_hierarchy`.

    Source
    ------
    Oko, Lin, Cai, Mei (arXiv 2501.04641).
    """
    where = "random_hierarchy"
    depths, arities = (size if isinstance(size, tuple) else (size, size) for size in (depth, arity))
    if alphabet < 2 or min(*depths, *arities) < 1:
        raise ValueError(
            f"{where}: alphabet {alphabet}, depth {depth}, arity {arity}; give at least 2 symbols, depth 1 and arity 1"
        )
    if not isinstance(noise, jax.core.Tracer) and not 0 <= float(noise) <= 1:
        raise ValueError(f"{where}: noise is {noise}; give a probability, 0 to 1")
    noise, spread = (jnp.asarray(value, jnp.result_type(float)) for value in (noise, spread))
    kernels = [
        _random_kernels(tree, noise, spread, alphabet, layers, ranks)
        for tree, layers, ranks in zip(jax.random.split(key), depths, arities, strict=True)
    ]
    h = Hierarchy(*kernels, prior)
    check_hierarchy(h, where)
    return h


@jax.jit(static_argnames=("alphabet", "depth", "arity"))
def _random_kernels(key, noise, spread, alphabet, depth, arity):
    for_order, for_logits = jax.random.split(key)
    orders = jax.vmap(lambda k: jax.random.permutation(k, alphabet))(jax.random.split(for_order, depth))
    permutation = jax.nn.one_hot(orders, alphabet, dtype=noise.dtype)[:, None]
    logits = spread * _random.normal(for_logits, (depth, arity, alphabet, alphabet), noise.dtype)
    return (1 - noise) * permutation + noise * jax.nn.softmax(logits, axis=-1)


# Layout ---------------------------------------------------------------------------------------------------------------
# Nodes of a layer stand with their last rank first, (m, m^(l-1), n), and samples last: children of one rank are then
# one contiguous block, to which one kernel belongs, and elementwise work runs over long rows.


def to_nodes(leaves: Array, kernels: Array) -> Array:
    """(n, m^L), leaves from left to right -> (m, m^(L-1), n), ranks in reverse order."""
    depth, arity = kernels.shape[:2]
    digits = leaves.reshape(-1, *(arity,) * depth)
    return jnp.transpose(digits, range(depth, -1, -1)).reshape(arity, -1, leaves.shape[0])


def from_nodes(nodes: Array, kernels: Array) -> Array:
    """(m, S, m^(L-1), n) -> (n, m^L, S); the inverse of `to_nodes`, with an axis of symbols."""
    depth, arity = kernels.shape[:2]
    digits = jnp.moveaxis(nodes, 1, 0).reshape(-1, *(arity,) * depth, nodes.shape[-1])
    return jnp.transpose(digits, range(depth + 1, -1, -1)).reshape(nodes.shape[-1], -1, nodes.shape[1])


# Samples --------------------------------------------------------------------------------------------------------------


def sample(h: Hierarchy, key: Key[Array, ""], n: int) -> Sample:
    """Draw root, image and text exactly: the root by its law, every child by its parent's row.

    Parameters
    ----------
    h : Hierarchy
    key : PRNG key
        Fixes the draw.
    n : int
        Number of samples, at least 1.

    Returns
    -------
    Sample. A symbol of probability zero is never drawn; others are drawn to the resolution of uniform numbers in the
    dtype of the kernels.

    Raises
    ------
    TypeError, ValueError
        As `check_hierarchy`, and for n < 1.
    """
    check_hierarchy(h, "sample")
    if n < 1:
        raise ValueError(f"sample: n is {n}; draw at least one sample")
    return sample_unchecked(h, key, n)


@jax.jit(static_argnames="n")
def sample_unchecked(h, key, n):
    """`sample` without looking at the values."""
    for_root, for_image, for_text = jax.random.split(key, 3)
    edges = cumulative(prior_of(h))
    root = first_above(edges[None], jax.random.uniform(for_root, (n,), edges.dtype))
    image, text = (_descend(k, kernels, root) for k, kernels in ((for_image, h.image), (for_text, h.text)))
    return Sample(root, image, text)


def children(kernels, states, uniform):
    """Draw the children (m, m^l, n) of nodes (m^l, n) by the kernels of a layer, (m, S, S)."""
    # A product with a unit vector copies a row exactly, and much faster than a gather does on a CPU.
    parents = jax.nn.one_hot(states, kernels.shape[-1], axis=0, dtype=kernels.dtype)
    edges = jnp.einsum("iab,arn->irnb", cumulative(kernels), parents, precision="highest")
    return first_above(edges, uniform)


def _descend(key, kernels, root):
    states = root[None]
    for layer, k in zip(kernels, jax.random.split(key, len(kernels)), strict=True):
        uniform = _random.uniform(k, (len(layer), *states.shape), kernels.dtype)
        states = children(layer, states, uniform).reshape(-1, len(root))
    return leaves_in_order(states, kernels)


def leaves_in_order(states, kernels):
    """Symbols of the lowest layer, (m^L, n), as (n, m^L) from left to right."""
    return from_nodes(states.reshape(kernels.shape[1], 1, -1, states.shape[-1]), kernels)[..., 0]


def cumulative(law):
    """Sums along the last axis, one after the other: equal where an entry is zero, which other orders are not."""
    _, sums = jax.lax.scan(lambda s, x: (s + x,) * 2, jnp.zeros_like(law[..., 0]), jnp.moveaxis(law, -1, 0))
    return jnp.moveaxis(sums, 0, -1)


def first_above(edges, uniform):
    """Symbol whose interval of the cumulative law holds a uniform number; its probability is positive."""
    # Scaled by the total, which rounding may have left below 1: u * total < total for every u < 1.
    return jnp.sum(edges <= uniform[..., None] * edges[..., -1:], axis=-1, dtype=jnp.int32)
