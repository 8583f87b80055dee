"""What message passing answers: root, similarity, denoising and next token, all exactly."""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from theorykit.surrogate import _hierarchy_passes as passes
from theorykit.surrogate import _message_products as products
from theorykit.surrogate._hierarchy_model import (
    Hierarchy,
    check_hierarchy,
    check_leaves,
    check_noisy,
    from_nodes,
)

Modality = Literal["image", "text"]
Sigma = float | Float[Array, ""]


def root_posterior(
    h: Hierarchy, *, image: Int[Array, "n image_leaves"] | None = None, text: Int[Array, "n text_leaves"] | None = None
) -> Float[Array, "n S"]:
    r"""Law of the root given an image, a text, or both.

    .. math:: \ln P(s | x, y) = \ln P(s) + \ln P(x | s) + \ln P(y | s) + const

    It is sufficient: whatever one modality says of the other passes through it.

    Parameters
    ----------
    h : Hierarchy
    image, text : (n, leaves), optional
        Clean leaves, at least one of the two modalities.

    Returns
    -------
    Log-probabilities in nats; NaN for leaves that the hierarchy cannot produce.

    Raises
    ------
    TypeError, ValueError
        As `check_hierarchy`; for leaves of a wrong number, dtype or symbol, and without any.
    """
    where = "root_posterior"
    check_hierarchy(h, where)
    for name, leaves, kernels in (("image", image, h.image), ("text", text, h.text)):
        if leaves is not None:
            check_leaves(leaves, kernels, where, name)
    if image is None and text is None:
        raise ValueError(f"{where}: neither image nor text is given; give one or both, the prior needs no leaves")
    return _root_posterior(h, image, text)


def similarity(
    h: Hierarchy, image: Int[Array, "n image_leaves"], text: Int[Array, "n text_leaves"]
) -> Float[Array, " n"]:
    r"""The best score of contrastive learning for pairs, the logarithm of the density ratio.

    .. math:: s^*(x, y) = \ln \frac{P(x, y)}{P(x) P(y)} = \ln \sum_s \frac{P(s | x) \, P(s | y)}{P(s)}

    Parameters
    ----------
    h : Hierarchy
    image, text : (n, leaves)
        Clean leaves, one pair in each row.

    Returns
    -------
    s* in nats, (n,); -inf for two that exclude each other.

    Raises
    ------
    TypeError, ValueError
        As `root_posterior`.
    """
    where = "similarity"
    _check_both(h, image, text, where)
    if image.shape[0] != text.shape[0]:
        raise ValueError(
            f"{where}: {image.shape[0]} images and {text.shape[0]} texts; give pairs, or call similarities for all"
        )
    return _similarity(h, image, text)


def similarities(
    h: Hierarchy, image: Int[Array, "n image_leaves"], text: Int[Array, "k text_leaves"]
) -> Float[Array, "n k"]:
    """The score s* of every image with every text: one matrix product of root posteriors.

    Parameters
    ----------
    h : Hierarchy
    image, text : (n, leaves) and (k, leaves)
        Clean leaves.

    Returns
    -------
    s* in nats, (n, k).

    Raises
    ------
    TypeError, ValueError
        As `root_posterior`.
    """
    _check_both(h, image, text, "similarities")
    return _similarities(h, image, text)


def leaf_posterior(
    h: Hierarchy,
    noisy: Float[Array, "n leaves"],
    sigma: Sigma,
    *,
    modality: Modality = "image",
    given: Int[Array, "n other_leaves"] | None = None,
) -> Float[Array, "n leaves S"]:
    r"""Law of every leaf given all leaves with Gaussian noise, z_v = x_v + sigma N(0, 1).

    .. math:: P(x_v = a | z, y) \propto e^{t_v(a) - (z_v - a)^2 / (2 \sigma^2)}

    with t_v what all other leaves, and the other modality if given, say of the leaf.

    Parameters
    ----------
    h : Hierarchy
    noisy : (n, leaves)
        z; the symbols 0..S-1 are numbers here.
    sigma : scalar
        Standard deviation of the noise, positive.
    modality : "image" or "text"
        Which of the two is noisy.
    given : (n, leaves), optional
        Clean leaves of the other modality.

    Returns
    -------
    Probabilities.

    Raises
    ------
    TypeError, ValueError
        As `root_posterior`; for sigma <= 0, and noisy leaves that are not finite.
    """
    check_denoising(h, noisy, sigma, modality, given, "leaf_posterior")
    return _leaf_posterior(h, noisy, jnp.asarray(sigma, noisy.dtype), modality, given)


def denoise(
    h: Hierarchy,
    noisy: Float[Array, "n leaves"],
    sigma: Sigma,
    *,
    modality: Modality = "image",
    given: Int[Array, "n other_leaves"] | None = None,
) -> Float[Array, "n leaves"]:
    r"""Posterior mean of every leaf, the best denoiser in mean square: E[x_v | z] or E[x_v | z, y].

    Parameters
    ----------
    h, noisy, sigma, modality, given
        As in `leaf_posterior`.

    Returns
    -------
    Means, in the unit of the symbols.

    Raises
    ------
    TypeError, ValueError
        As `leaf_posterior`.
    """
    check_denoising(h, noisy, sigma, modality, given, "denoise")
    return _denoise(h, noisy, jnp.asarray(sigma, noisy.dtype), modality, given)


def next_token(
    h: Hierarchy, text: Int[Array, "n text_leaves"], *, image: Int[Array, "n image_leaves"] | None = None
) -> Float[Array, "n text_leaves S"]:
    r"""Law of every token given those on its left, and the image if given: P(y_j | y_1 .. y_(j-1), x).

    All positions come out of one pass, in time proportional to the number of leaves.

    Parameters
    ----------
    h : Hierarchy
    text : (n, leaves)
        Clean leaves; entry j of the result does not depend on the leaves from j on.
    image : (n, leaves), optional
        Clean leaves.

    Returns
    -------
    Log-probabilities in nats; NaN after a beginning that the hierarchy cannot produce.

    Raises
    ------
    TypeError, ValueError
        As `root_posterior`.
    """
    where = "next_token"
    check_hierarchy(h, where)
    check_leaves(text, h.text, where, "text")
    if image is not None:
        check_leaves(image, h.image, where, "image")
        _check_rows(image, text, where)
    return _next_token(h, text, image)


# ---------------------------------------------------------------------------------------------------------------------


def _check_both(h, image, text, where):
    check_hierarchy(h, where)
    check_leaves(image, h.image, where, "image")
    check_leaves(text, h.text, where, "text")


def _check_rows(first, second, where):
    if first.shape[0] != second.shape[0]:
        raise ValueError(f"{where}: {first.shape[0]} and {second.shape[0]} rows of the two modalities; give pairs")


def check_denoising(h, noisy, sigma, modality, given, where):
    """Raise unless `leaf_posterior` can be asked for this."""
    check_hierarchy(h, where)
    if modality not in ("image", "text"):
        raise ValueError(f"{where}: modality is {modality!r}; give 'image' or 'text', the one that is noisy")
    own, other = (h.image, h.text) if modality == "image" else (h.text, h.image)
    check_noisy(noisy, sigma, own, where)
    if given is not None:
        check_leaves(given, other, where, "given")
        _check_rows(noisy, given, where)


@jax.jit
def _root_posterior(h, image, text):
    given = [(kernels, leaves) for kernels, leaves in ((h.image, image), (h.text, text)) if leaves is not None]
    trees = [products.tree(kernels, len(leaves)) for kernels, leaves in given]

    def of(*parts):
        found = [passes.likelihood(tree, part) for tree, part in zip(trees, parts, strict=True)]
        return jax.nn.log_softmax(passes.log_prior(h) + sum(found), axis=0).T

    return passes.in_blocks(of, h, *(leaves for _, leaves in given))


@jax.jit
def _similarity(h, image, text):
    a, b = passes.posterior(h, h.image, image), passes.posterior(h, h.text, text)
    return jax.scipy.special.logsumexp(a + b - passes.log_prior(h).T, axis=1)


@jax.jit
def _similarities(h, image, text):
    return passes.scores(h, passes.posterior(h, h.image, image), passes.posterior(h, h.text, text))


def _of_leaves(h, noisy, sigma, modality, given, of):
    """of(weights) of the leaves of `denoised`, in blocks, from left to right: (n, m^L, ...)."""
    own, other = passes.trees(h, len(noisy))
    if modality == "text":
        own, other = other, own

    def block(noisy, given):
        root = jnp.broadcast_to(passes.log_prior(h), (own.kernels.shape[-1], len(noisy)))
        if given is not None:
            root = root + passes.likelihood(other, given)
        return from_nodes(passes.denoised(own, noisy, sigma, root, of), own.kernels)

    return passes.in_blocks(block, h, noisy, given)


@jax.jit(static_argnames="modality")
def _leaf_posterior(h, noisy, sigma, modality, given):
    return _of_leaves(h, noisy, sigma, modality, given, passes.law)


@jax.jit(static_argnames="modality")
def _denoise(h, noisy, sigma, modality, given):
    return _of_leaves(h, noisy, sigma, modality, given, lambda weights: passes.mean_symbol(weights)[:, None])[..., 0]


@jax.jit
def _next_token(h, text, image):
    of_image, of_text = passes.trees(h, len(text))

    def of(text, image):
        root = jnp.broadcast_to(passes.log_prior(h), (h.text.shape[-1], len(text)))
        if image is not None:
            root = root + passes.likelihood(of_image, image)
        return from_nodes(passes.predicted(of_text, text, root)[0], h.text)

    return passes.in_blocks(of, h, text, image)
