"""Zero-shot classification of an image by the first leaf of its text, exactly and by prompts."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from theorykit import _random
from theorykit.surrogate import _hierarchy_passes as passes
from theorykit.surrogate import _message_passing as passing
from theorykit.surrogate._hierarchy_model import (
    Hierarchy,
    check_hierarchy,
    check_leaves,
    children,
    cumulative,
    first_above,
    leaves_in_order,
    prior_of,
)


def zero_shot(
    h: Hierarchy,
    image: Int[Array, "n image_leaves"],
    *,
    prompts: Int[Array, "S M text_leaves"] | None = None,
) -> Float[Array, "n S"]:
    r"""Classification of images by the first leaf c of their text: exactly, or by the score s* with M prompts.

    .. math:: P(c | x) = \sum_s P(s | x) \, P(y_1 = c | s), \qquad
              \hat P(c | x) \propto P(c) \, \frac1M \sum_m e^{s^*(x, y_{cm})}

    The second tends to the first as M grows, for prompts drawn from P(y | y_1 = c): see `sample_prompts`.

    Parameters
    ----------
    h : Hierarchy
    image : (n, leaves)
        Clean leaves.
    prompts : (S, M, leaves), optional
        Texts of each class.

    Returns
    -------
    Log-probabilities of the S classes in nats; NaN for an image that no prompt allows.

    Raises
    ------
    TypeError, ValueError
        As `root_posterior`; for prompts that are not (S, M, leaves).
    """
    where = "zero_shot"
    check_hierarchy(h, where)
    check_leaves(image, h.image, where, "image")
    if prompts is None:
        return _zero_shot(h, image)
    symbols = h.text.shape[-1]
    if prompts.ndim != 3 or prompts.shape[0] != symbols or not prompts.shape[1]:
        raise ValueError(
            f"{where}: prompts have shape {prompts.shape}; give M >= 1 texts of each class, ({symbols}, M, leaves)"
        )
    check_leaves(prompts.reshape(-1, prompts.shape[2]), h.text, where, "prompts")
    return _zero_shot_with_prompts(h, image, prompts)


def sample_prompts(h: Hierarchy, key: Key[Array, ""], prompts: int) -> Int[Array, "S prompts text_leaves"]:
    """Draw texts of every class exactly: from the law of a text given its first leaf.

    Parameters
    ----------
    h : Hierarchy
    key : PRNG key
        Fixes the draw.
    prompts : int
        M >= 1 texts of each class.

    Returns
    -------
    (S, M, leaves): texts whose first leaf is the class.

    Raises
    ------
    TypeError, ValueError
        As `check_hierarchy`; for M < 1, and a class of probability zero, which has no texts.
    """
    where = "sample_prompts"
    check_hierarchy(h, where)
    if prompts < 1:
        raise ValueError(f"{where}: prompts is {prompts}; draw at least one text of each class")
    classes = _classes(h)
    if not isinstance(classes, jax.core.Tracer) and not np.all(np.asarray(classes) > 0):
        raise ValueError(
            f"{where}: class {int(np.argmin(classes))} has probability zero, so there is no text of it; give kernels "
            "by which every symbol can be a first leaf"
        )
    return _sample_prompts(h, key, prompts)


# ---------------------------------------------------------------------------------------------------------------------


@jax.jit
def _zero_shot(h, image):
    root = passes.posterior(h, h.image, image).T
    return jax.nn.log_softmax(passing.first_leaf(h.text, root), axis=0).T


@jax.jit
def _zero_shot_with_prompts(h, image, prompts):
    of_images = passes.posterior(h, h.image, image)
    of_prompts = passes.posterior(h, h.text, prompts.reshape(-1, prompts.shape[2]))
    ratios = passes.scores(h, of_images, of_prompts).reshape(-1, *prompts.shape[:2])
    pooled = jax.scipy.special.logsumexp(ratios, axis=2)
    return jax.nn.log_softmax(jnp.log(_classes(h))[None] + pooled, axis=1)


def _reach(h):
    """P(first leaf | node on the way to it) for the nodes of all layers from the root on, (S, S) each."""
    reach = [jnp.eye(h.text.shape[-1], dtype=h.text.dtype)]
    for layer in h.text[::-1]:
        reach.append(jnp.matmul(layer[0], reach[-1], precision="highest"))
    return reach[::-1]


def _classes(h):
    return jnp.matmul(prior_of(h), _reach(h)[0], precision="highest")


@jax.jit(static_argnames="prompts")
def _sample_prompts(h, key, prompts):
    reach, symbols = _reach(h), h.text.shape[-1]
    for_root, *for_layers = jax.random.split(key, len(h.text) + 1)
    edges = cumulative((prior_of(h)[:, None] * reach[0]).T)  # (class, root)
    path = first_above(edges[:, None], jax.random.uniform(for_root, (symbols, prompts), h.text.dtype))
    states = path.reshape(1, -1)
    for layer, after, k in zip(h.text, reach[1:], for_layers, strict=True):
        for_all, for_path = jax.random.split(k)
        uniform = _random.uniform(for_all, (len(layer), *states.shape), h.text.dtype)
        drawn = children(layer, states, uniform)
        # The node on the way to the first leaf is drawn given that leaf.
        edges = cumulative(layer[0][:, None] * after.T[None])  # (parent, class, child)
        edges = edges[path, jnp.arange(symbols)[:, None]]
        path = first_above(edges, jax.random.uniform(for_path, path.shape, h.text.dtype))
        states = drawn.at[0, 0].set(path.reshape(-1)).reshape(-1, states.shape[1])
    return leaves_in_order(states, h.text).reshape(symbols, prompts, -1)
