r"""Similarities of embeddings: dot product, cosine, and the log of an inner product of softmaxes.

A similarity maps two single vectors to a number, ``s(a, b)``; `pairwise` turns it into the score matrix of two
batches. The three here also take equal leading axes. A similarity of one's own only has to handle single vectors.
The checks of embeddings that the losses share are here too. All of them look at types and shapes only, so they also
run inside `jax.jit`, at trace time.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Similarity = Callable[[Array, Array], Array]


def dot(a: Float[Array, "*batch z"], b: Float[Array, "*batch z"]) -> Float[Array, "*batch"]:
    r"""Dot product of vectors, row by row.

    .. math:: s(a, b) = \langle a, b \rangle

    Parameters
    ----------
    a, b
        Vectors along the last axis; the leading axes are equal.

    Returns
    -------
    Array
        One number for each pair of vectors, in squared units of the embeddings.
    """
    return jnp.sum(a * b, axis=-1)


def cosine(a: Float[Array, "*batch z"], b: Float[Array, "*batch z"]) -> Float[Array, "*batch"]:
    r"""Cosine of the angle between vectors, row by row.

    .. math:: s(a, b) = \frac{\langle a, b \rangle}{|a| \, |b|},
              \qquad \partial_a s = \frac{1}{|a|} \Big(\frac{b}{|b|} - s \, \frac{a}{|a|}\Big)

    The cosine with a zero vector is defined as 0 and its gradient there as 0 (see `normalise`). The result is not
    clipped to [-1, 1], because a clip would erase the curvature at equal directions; it can pass 1 by rounding.

    Parameters
    ----------
    a, b
        Vectors along the last axis; the leading axes are equal.

    Returns
    -------
    Array
        One number for each pair of vectors, without unit.
    """
    return dot(normalise(a), normalise(b))


def log_softmax_product(a: Float[Array, "*batch z"], b: Float[Array, "*batch z"]) -> Float[Array, "*batch"]:
    r"""Logarithm of the inner product of two softmaxes, row by row.

    .. math:: s(a, b) = \ln \sum_s \mathrm{softmax}(a)_s \, \mathrm{softmax}(b)_s \le 0

    Where a root of z symbols is drawn uniformly and the two views are independent given it, the optimal score of a
    contrastive loss has this form plus ln z, with the two posteriors of the root as softmaxes. It does not change when
    a constant is added to all entries of a vector. All sums are taken in log space, so softmaxes of disjoint support
    give a large negative number with its gradient, not the logarithm of zero.

    Parameters
    ----------
    a, b
        Logits along the last axis, which is not empty; the leading axes are equal.

    Returns
    -------
    Array
        One number for each pair of vectors, in nats.

    Source
    ------
    Derivation: Bayes' rule for two views that are independent given the root.
    """
    return jax.nn.logsumexp(jax.nn.log_softmax(a, axis=-1) + jax.nn.log_softmax(b, axis=-1), axis=-1)


def normalise(a: Float[Array, "*batch z"]) -> Float[Array, "*batch z"]:
    r"""Scale every vector to unit norm.

    .. math:: u(a) = a / |a|, \qquad u(0) = 0, \quad \partial u(0) = 0

    The direction is not defined at zero: value and all derivatives are set to 0 there. "Zero" means that no entry
    reaches the smallest normal number of the dtype (1.2e-38 in float32): below it, hardware may flush numbers to zero
    and the gradient, of size 1/|a|, would overflow. Every other finite vector gives a unit vector, also where |a|^2
    would overflow or underflow, and the result does not depend on its length (bit for bit under powers of two). A
    vector with a NaN or an infinity gives NaN.

    Parameters
    ----------
    a
        Vectors along the last axis, which is not empty.

    Returns
    -------
    Array
        Vectors of norm 1 or 0, of the shape of `a`.

    Raises
    ------
    TypeError
        If `a` is not a floating-point array.
    """
    check_array("normalise", "a", a)
    # u(a) = u(a / c) for every c > 0. With c a constant for autodiff, derivatives of every order are those of u itself.
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(a), axis=-1, keepdims=True))
    zero = largest < jnp.finfo(a.dtype).tiny  # false for NaN, which therefore stays visible
    # The inner `where` keeps 0/0 out of the branch that is not taken: its derivative would be NaN times zero.
    scaled = jnp.where(zero, jnp.ones_like(a), a) / jnp.where(zero, jnp.ones_like(largest), largest)
    unit = scaled / jnp.sqrt(jnp.sum(scaled * scaled, axis=-1, keepdims=True))
    return jnp.where(zero, jnp.zeros_like(a), unit)


def pairwise(similarity: Similarity, a: Float[Array, "n z"], b: Float[Array, "m z"]) -> Float[Array, "n m"]:
    r"""Score matrix of two batches.

    .. math:: S_{ij} = s(a_i, b_j)

    `dot` and `cosine` are one matrix product at the highest precision of the device. `log_softmax_product` normalises
    every row once and then sums over (n, m, z) in log space. Any other similarity is vmapped.

    Parameters
    ----------
    similarity
        Function of two single vectors, (z,) and (z,), that returns a scalar.
    a
        First batch, (n, z).
    b
        Second batch, (m, z); m may be 0.

    Returns
    -------
    Array
        Scores, (n, m).

    Raises
    ------
    TypeError, ValueError
        If the batches are not floating-point arrays (n, z) and (m, z), or the similarity returns no scalar.
    """
    check_array("pairwise", "a", a)
    check_array("pairwise", "b", b, like=a)
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(f"pairwise: shapes {a.shape} and {b.shape}; give rows of one length, (n, z) and (m, z)")
    if similarity is cosine:
        a, b = normalise(a), normalise(b)
    if similarity is cosine or similarity is dot:
        return jnp.matmul(a, b.T, precision="highest")
    if similarity is log_softmax_product:
        a, b = jax.nn.log_softmax(a, axis=-1), jax.nn.log_softmax(b, axis=-1)
        return jax.nn.logsumexp(a[:, None, :] + b[None, :, :], axis=-1)
    scores = jax.vmap(jax.vmap(similarity, (None, 0)), (0, None))(a, b)
    if scores.ndim != 2:
        raise ValueError(
            f"the similarity returned an array of shape {scores.shape[2:]} for two single vectors; "
            "it must return a scalar, e.g. by a sum over the last axis"
        )
    return scores


def check_array(where: str, name: str, value: object, like: Array | None = None) -> None:
    """Raise TypeError unless `value` is a JAX array of real floating-point numbers, of the dtype of `like` if given."""
    if not isinstance(value, jax.Array):
        raise TypeError(f"{where}: {name} is a {type(value).__name__}; pass a JAX array, jnp.asarray({name})")
    if not jnp.issubdtype(value.dtype, jnp.floating):
        raise TypeError(f"{where}: {name} has dtype {value.dtype}; embeddings are real floating point, cast them first")
    if like is not None and value.dtype != like.dtype:
        raise TypeError(f"{where}: {name} has dtype {value.dtype}, the other embeddings {like.dtype}; cast one of them")


def check_views(where: str, least: int = 1, **views: object) -> None:
    """Raise TypeError or ValueError unless the two views are embeddings (n, z) of one dtype, n >= least, z >= 1."""
    (name_a, a), (name_b, b) = views.items()
    check_array(where, name_a, a)
    check_array(where, name_b, b, like=a)
    shapes = f"{where}: {name_a} has shape {a.shape} and {name_b} {b.shape}; "
    if a.ndim != 2 or b.ndim != 2:
        raise ValueError(shapes + "embeddings are (n, z), one sample a row: reshape, or vmap over further axes")
    if a.shape != b.shape:
        raise ValueError(shapes + "row i of both must embed sample i, in the same dimension")
    if a.shape[0] < least or a.shape[1] < 1:
        raise ValueError(shapes + f"at least {least} sample(s) and 1 dimension are needed")
