r"""Optima of contrastive losses in closed form, for views that take finitely many values.

A *joint* is the matrix P_ab = p+(a, b) of probabilities of positive pairs; p_a and p_b are its marginals. It describes
one encoder of both views if P is symmetric, and two encoders otherwise. Points without mass are allowed: they take part
in no pair, and their embeddings are set to 0.

============================  ==========================================================================  ============
function                      what it gives                                                               minimises
============================  ==========================================================================  ============
`pair_weights`,               C_alpha, whose trace has the gradient of every loss of squared distances    `pair_loss`
`contrastive_covariance`
`spectral_optimum`            top eigenfunctions of the normalised joint                                  spectral loss
`cross_spectral_optimum`      the same for two encoders: singular functions                               spectral loss
`pair_kernel`                 p+(a, b) / (p(a) p(b)), the best unrestricted scores                        see there
`kernel_contrastive`          orthonormal kernel features                                                 `linear` loss
`class_collision`             bound on the loss of the mean classifier by the contrastive loss            a bound
============================  ==========================================================================  ============

Types and shapes are checked always, values where they are known (not inside jit, vmap or grad).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from theorykit.similarity import check_array, check_views
from theorykit.spectral._pairs import (
    ROUNDING,
    PairSpectrum,
    SpectralOptimum,
    check_gram,
    check_probabilities,
    check_rank,
    cross_spectral_optimum,
    gram_range,
    normalised_adjacency,
    pair_kernel,
    pair_spectrum,
    spectral_loss,
    spectral_optimum,
)

__all__ = [
    "ClassCollision",
    "KernelContrastive",
    "PairSpectrum",
    "SpectralOptimum",
    "class_collision",
    "contrastive_covariance",
    "cross_spectral_optimum",
    "kernel_contrastive",
    "normalised_adjacency",
    "others",
    "pair_kernel",
    "pair_loss",
    "pair_spectrum",
    "pair_weights",
    "spectral_loss",
    "spectral_optimum",
]


class KernelContrastive(NamedTuple):
    """Minimiser of the linear triplet loss under orthonormal features; f(x) = k(x, Z) `coefficients`.

    Attributes
    ----------
    coefficients
        (3 n, h) A, with A^T k(Z, Z) A = I.
    eigenvalues
        (h,) ascending.
    loss
        Their sum: sum_i f(x_i) . (f(x_i^-) - f(x_i^+)).
    negative
        Number of negative eigenvalues. Up to this h the loss is the least in any feature space.
    """

    coefficients: Float[Array, "m h"]
    eigenvalues: Float[Array, " h"]
    loss: Float[Array, ""]
    negative: Int[Array, ""]


class ClassCollision(NamedTuple):
    """Both sides of the class-collision bound: supervised <= bound = (unsupervised - l(0) collision)/(1 - collision).

    `supervised` is the loss of the mean classifier on two different classes, `unsupervised` the contrastive loss and
    `collision` the probability that a negative has the anchor's class.
    """

    supervised: Float[Array, ""]
    unsupervised: Float[Array, ""]
    collision: Float[Array, ""]
    bound: Float[Array, ""]


def others(x: Float[Array, "n z"]) -> Float[Array, "n n-1 z"]:
    """Negatives from the batch: row i holds all rows of x but row i.

    Parameters
    ----------
    x
        (n, z), n >= 2.

    Returns
    -------
    (n, n - 1, z)
    """
    check_array("others", "x", x)
    if x.ndim != 2 or len(x) < 2:
        raise ValueError(f"others: x has shape {x.shape}; give at least two rows, (n, z)")
    rows = np.arange(len(x))
    return x[np.stack([np.delete(rows, i) for i in rows])]


def pair_loss(
    za: Float[Array, "n z"], zp: Float[Array, "n z"], zn: Float[Array, "n m z"], *, phi: Callable, psi: Callable
) -> Float[Array, ""]:
    r"""Contrastive loss of squared distances.

    .. math:: L = \sum_i \phi\Big(\sum_j \psi(d_i^2 - d_{ij}^2)\Big), \quad
              d_i^2 = \tfrac12 |a_i - p_i|^2, \quad d_{ij}^2 = \tfrac12 |a_i - n_{ij}|^2

    phi(x) = ln(1 + x), psi = exp is InfoNCE, as a sum over anchors, with the similarity -|a - b|^2 / 2.

    Parameters
    ----------
    za, zp
        Anchors a_i and positives p_i, (n, z) each.
    zn
        Negatives n_ij of each anchor, (n, m, z); `others(za)` in the source.
    phi, psi
        Increasing differentiable functions of a number, written with jax.numpy.

    Returns
    -------
    The loss.

    Raises
    ------
    TypeError, ValueError
        If the embeddings are not floating-point arrays of matching shapes.

    Source
    ------
    Tian (arXiv 2201.12680).
    """
    return jnp.sum(phi(jnp.sum(psi(_gaps("pair_loss", za, zp, zn)), axis=1)))


def pair_weights(
    za: Float[Array, "n z"], zp: Float[Array, "n z"], zn: Float[Array, "n m z"], *, phi: Callable, psi: Callable
) -> Float[Array, "n m"]:
    r"""Weights alpha of the contrastive covariance: how much each negative matters now.

    .. math:: \alpha_{ij} = \phi'\Big(\sum_l \psi(d_i^2 - d_{il}^2)\Big)\, \psi'(d_i^2 - d_{ij}^2)

    Parameters, Raises, Source
    --------------------------
    As `pair_loss`.

    Returns
    -------
    (n, m), not negative for increasing phi and psi.
    """
    gaps = _gaps("pair_weights", za, zp, zn)
    outer = jax.vmap(jax.grad(phi))(jnp.sum(psi(gaps), axis=1))
    return outer[:, None] * jax.vmap(jax.vmap(jax.grad(psi)))(gaps)


def contrastive_covariance(
    weights: Float[Array, "n m"], xa: Float[Array, "n d"], xp: Float[Array, "n d"], xn: Float[Array, "n m d"]
) -> Float[Array, "d d"]:
    r"""Contrastive covariance: between anchors and negatives, less that between anchors and positives.

    .. math:: C_\alpha[x] = \sum_{ij} \alpha_{ij} \big[(a_i - n_{ij})(a_i - n_{ij})^T - (a_i - p_i)(a_i - p_i)^T\big]

    With the `pair_weights` held fixed, grad L = -grad Tr C_alpha[f] / 2; for f = W x, grad_W L = -W C_alpha[x]. A
    (deep) linear net of layers of unit Frobenius norm then goes to W^T W = v v^T, v the leading eigenvector.

    Parameters
    ----------
    weights
        alpha, (n, m).
    xa, xp, xn
        Anchors, positives and negatives, (n, d), (n, d) and (n, m, d): inputs or embeddings.

    Returns
    -------
    (d, d), symmetric and in general indefinite.

    Raises
    ------
    TypeError, ValueError
        If the arrays are not floating-point of matching shapes.

    Source
    ------
    Tian (arXiv 2201.12680).
    """
    _check_triplets("contrastive_covariance", xa, xp, xn)
    check_array("contrastive_covariance", "weights", weights, like=xa)
    if weights.shape != xn.shape[:2]:
        raise ValueError(f"contrastive_covariance: weights {weights.shape}, negatives {xn.shape}; give one for each")
    far, near = xa[:, None, :] - xn, xa - xp
    repelled = jnp.einsum("ij,ijd,ije->de", weights, far, far, precision="highest")
    return repelled - jnp.einsum("i,id,ie->de", jnp.sum(weights, axis=1), near, near, precision="highest")


def kernel_contrastive(gram: Float[Array, "m m"], h: int) -> KernelContrastive:
    r"""Minimiser of the linear triplet loss over features W^T phi(x) with W^T W = I.

    .. math:: \min_W \sum_i f(x_i) \cdot (f(x_i^-) - f(x_i^+)), \qquad B = k(Z, Z), \quad Z = (X, X^+, X^-)

    is solved by A = B^{-1/2} U_h, with U_h the last h eigenvectors of B^{-1/2} S B^{-1/2} and S the symmetric part of
    k(Z, X) (k(X^-, Z) - k(X^+, Z)). Only the span of the points matters, so B may be singular: its inverse root is that
    on its range. W is sought in that span. If the feature space is larger and h exceeds the number of negative
    eigenvalues, features outside the span, which are 0 on all points, do better: the least loss is then the sum of the
    negative eigenvalues.

    Parameters
    ----------
    gram
        B, (3 n, 3 n): anchors, then positives, then negatives. Symmetric, positive semidefinite.
    h
        Number of features, 1 to the rank of B.

    Returns
    -------
    KernelContrastive

    Raises
    ------
    TypeError, ValueError
        If the Gram matrix is not a symmetric floating-point matrix of 3 n points, or h exceeds its rank.

    Source
    ------
    Esser, Fleissner, Ghoshdastidar (arXiv 2309.02028); the limit on h: derivation.
    """
    where = "kernel_contrastive"
    check_gram(where, "gram", gram)
    size = len(gram)
    if size % 3:
        raise ValueError(f"{where}: gram has {size} rows; stack anchors, positives and negatives, 3 n rows")
    check_rank(where, "h", h, size)
    basis, scale, kept = gram_range(gram)
    if not isinstance(gram, jax.core.Tracer) and int(jnp.sum(kept)) < h:
        raise ValueError(f"{where}: h is {h}, but gram has rank {int(jnp.sum(kept))}; ask for fewer features")
    # Coordinates in an orthonormal basis of the span: point i is row i, and the rows have the Gram matrix B.
    points = jnp.where(kept[None, :], basis * jnp.sqrt(scale)[None, :], 0.0)
    anchors, positives, negatives = jnp.split(points, 3)
    cross = jnp.matmul(anchors.T, negatives - positives, precision="highest")
    form = (cross + cross.T) / 2
    norm = jnp.linalg.norm(form)
    # Directions outside the range come last: twice the norm lies beyond every eigenvalue.
    outside = jnp.where(kept, 0.0, jnp.where(norm > 0, 2 * norm, 1.0))
    values, vectors = jnp.linalg.eigh(form + jnp.diag(outside))
    inverse = jnp.where(kept[None, :], basis / jnp.sqrt(scale)[None, :], 0.0)
    coefficients = jnp.matmul(inverse, vectors[:, :h], precision="highest")
    # The rounding of B, not of the form, which may be a small difference.
    rounding = ROUNDING * jnp.finfo(gram.dtype).eps * jnp.max(jnp.where(kept, scale, 0.0))
    negative = jnp.sum(values < -rounding)
    return KernelContrastive(coefficients, values[:h], jnp.sum(values[:h]), negative)


def class_collision(
    prior: Float[Array, " c"], conditionals: Float[Array, "c n"], f: Float[Array, "n z"], *, loss: Callable
) -> ClassCollision:
    r"""Both sides of the class-collision bound, by enumeration.

    .. math:: L_{sup} \le \frac{L_{un} - \ell(0) \tau}{1 - \tau}, \quad \tau = \sum_c \rho_c^2, \quad
        L_{un} = E\, \ell\big(f(x) \cdot (f(x^+) - f(x^-))\big), \quad
        L_{sup} = E\, \ell\big(f(x) \cdot (\mu_c - \mu_{c'})\big)

    x and x+ are independent draws of class c, x- one of an independent class c'; mu_c is the mean embedding of class c,
    and L_sup is over c' != c. Holds for convex l (Jensen), with equality if f is constant on each class. The source has
    l(0) = 1.

    Parameters
    ----------
    prior
        rho, (c,), probabilities of the classes.
    conditionals
        (c, n), row c the distribution of the points of class c.
    f
        Embeddings of the points, (n, z).
    loss
        l, convex, of an array of margins, written with jax.numpy.

    Returns
    -------
    ClassCollision

    Raises
    ------
    TypeError, ValueError
        If shapes do not match, rows are not probabilities, or there is one class only.

    Source
    ------
    Arora, Khandeparkar, Khodak, Plevrakis, Saunshi (arXiv 1902.09229), lemma 4.3.
    """
    where = "class_collision"
    for name, array in (("prior", prior), ("conditionals", conditionals), ("f", f)):
        check_array(where, name, array, like=prior)
    if conditionals.ndim != 2 or f.ndim != 2 or prior.shape + f.shape[:1] != conditionals.shape:
        raise ValueError(f"{where}: prior {prior.shape}, conditionals {conditionals.shape}, f {f.shape}; do not match")
    check_probabilities(where, "prior", prior[None, :])
    check_probabilities(where, "conditionals", conditionals)
    collision = jnp.sum(prior**2)
    if not isinstance(collision, jax.core.Tracer) and collision >= 1:
        raise ValueError(f"{where}: all mass is in one class, so there is nothing to tell apart; give two classes")
    weighted, scores = prior[:, None] * conditionals, jnp.matmul(f, f.T, precision="highest")
    pairs = jnp.matmul(weighted.T, conditionals, precision="highest")
    triplets = pairs[:, :, None] * jnp.sum(weighted, axis=0)[None, None, :]
    unsupervised = jnp.sum(triplets * loss(scores[:, :, None] - scores[:, None, :]))
    means = jnp.matmul(scores, conditionals.T, precision="highest")
    different = prior[:, None] * (1 - jnp.eye(len(prior), dtype=prior.dtype))
    tasks = conditionals.T[:, :, None] * (different * prior[None, :])[None, :, :]
    supervised = jnp.sum(tasks * loss(means[:, :, None] - means[:, None, :])) / (1 - collision)
    bound = (unsupervised - loss(jnp.zeros_like(collision)) * collision) / (1 - collision)
    return ClassCollision(supervised, unsupervised, collision, bound)


def _check_triplets(where, xa, xp, xn):
    check_views(where, xa=xa, xp=xp)
    check_array(where, "negatives", xn, like=xa)
    if xn.ndim != 3 or (xn.shape[0], xn.shape[2]) != xa.shape:
        raise ValueError(f"{where}: negatives have shape {xn.shape}, anchors {xa.shape}; give (n, m, z), as `others`")


def _gaps(where, za, zp, zn):
    """d_i^2 - d_ij^2, (n, m)."""
    _check_triplets(where, za, zp, zn)
    near, far = za - zp, za[:, None, :] - zn
    return (jnp.sum(near * near, axis=1)[:, None] - jnp.sum(far * far, axis=2)) / 2
