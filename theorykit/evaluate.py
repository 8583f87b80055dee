r"""What embeddings are good for: linear and nearest-neighbour probes, retrieval, alignment and uniformity.

Row i of `za` and row i of `zb` embed two views of sample i; n is the number of rows, z the embedding dimension. Probes
return class scores (m, c), and `accuracy` reads them: linear logits and votes of neighbours alike.

Ties are never decided by the order of rows. Where candidates tie, every result is the expectation over a random order
of the tied: embeddings that have collapsed to a point get recall k/n and accuracy 1/c, not 0 or 1. Under `dot` and
`cosine`, two scores tie if they differ by no more than the rounding of a dot product can make them differ,

    |s_ij - s_il| <= z eps |a_i| max(|b_j|, |b_l|),

since below that their order is an accident of the hardware. (Each score is off by at most z (eps / 2) |a| |b|, Higham
2002, Accuracy and Stability of Numerical Algorithms, section 3.1.) Under any other similarity equal scores tie.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from theorykit._linear_probe import METHODS, fit
from theorykit.similarity import Similarity, check_array, check_views, cosine, dot, normalise, pairwise

# Scores held at once: 64 MB in float32, small beside any memory and enough for matrix products to run at full speed.
_BLOCK = 2**24


class LinearProbe(NamedTuple):
    """An affine map from embeddings to class scores, W^T x + b.

    Attributes
    ----------
    weights, offset
        (d, c) W and (c,) b; the offset is not penalised.
    status
        "converged", or "not converged" if the gradient was not yet zero to rounding after the most steps allowed: raise
        the penalty.
    """

    weights: Float[Array, "d c"]
    offset: Float[Array, " c"]
    status: str


def linear_probe(
    x: Float[Array, "n d"], labels: Int[Array, " n"], *, penalty: float | int, method: str = "logistic"
) -> LinearProbe:
    r"""Fit a linear classifier on frozen embeddings.

    .. math:: \min_{W, b} \; \frac{1}{n} \sum_i \ell(W^T x_i + b, y_i) + \frac{\lambda}{2} \|W\|_F^2, \qquad
        \ell_{\text{logistic}}(s, y) = \ln \sum_c e^{s_c} - s_y, \quad
        \ell_{\text{ridge}}(s, y) = \tfrac{1}{2} |s - e_y|^2

    In scikit-learn's terms C = 1 / (n lambda) and alpha = n lambda. Ridge is solved by a singular value decomposition,
    logistic regression by L-BFGS in coordinates in which the Hessian at W = 0 is close to the identity, so that badly
    scaled embeddings cost no more steps. Both run in float64, whatever the dtype of the embeddings.

    Parameters
    ----------
    x
        (n, d) embeddings of the training set. Values, not tracers.
    labels
        (n,) classes 0 to c - 1, each with at least one row, c >= 2.
    penalty
        lambda: > 0, or for "ridge" >= 0, where 0 gives the weights of least norm.
    method
        "logistic" or "ridge".

    Returns
    -------
    LinearProbe
        Weights, offset and status; `scores` applies it.

    Raises
    ------
    TypeError, ValueError
        If the embeddings are not finite floating-point rows, a class is empty or alone, the penalty is out of range, or
        the method is unknown.

    Source
    ------
    Alain, Bengio 2016 (arXiv 1610.01644) for linear probes; Liu, Nocedal 1989 for L-BFGS; the coordinates: derivation.
    """
    x = _rows("linear_probe", "x", x)
    classes = _count_classes("linear_probe", x, labels)
    if method not in METHODS:
        raise ValueError(f"linear_probe: method is {method!r}; choose from {', '.join(METHODS)}")
    if not (0 < penalty < np.inf or (penalty == 0 and method == "ridge")):
        raise ValueError(
            f"linear_probe: penalty is {penalty}; give a finite number > 0 (or 0 with ridge): without one, the weights "
            "of a logistic probe grow for ever on classes that a plane separates"
        )
    rows = np.bincount(np.asarray(labels))
    if classes < 2 or not np.all(rows):
        raise ValueError(f"linear_probe: classes have {rows} rows; give two classes or more, 0, 1, ..., none empty")
    *affine, converged = fit(np.asarray(x), np.asarray(labels), float(penalty), classes, method)
    return LinearProbe(*(jnp.asarray(a, x.dtype) for a in affine), "converged" if converged else "not converged")


def scores(probe: LinearProbe, x: Float[Array, "m d"]) -> Float[Array, "m c"]:
    """Class scores of a linear probe, W^T x + b.

    Parameters
    ----------
    probe, x
        What `linear_probe` returned, and (m, d) embeddings.

    Returns
    -------
    Array
        (m, c): logits under "logistic", least-squares estimates of the indicators under "ridge".
    """
    return jnp.matmul(x, probe.weights, precision="highest") + probe.offset[None, :]


def knn_probe(
    x: Float[Array, "n z"],
    labels: Int[Array, " n"],
    queries: Float[Array, "m z"],
    k: int,
    *,
    similarity: Similarity = cosine,
) -> Float[Array, "m c"]:
    r"""Votes of the k most similar training rows, by class.

    .. math:: v_{qc} = \mathbb{E} \, \#\{ i \in N_k(q) : y_i = c \}

    The expectation is over a random order of rows that tie for the last places: they share those places equally.

    Parameters
    ----------
    x, labels, queries
        (n, z) training embeddings and their classes (n,), 0 to c - 1; (m, z) embeddings to classify.
    k
        Number of neighbours, 1 to n.
    similarity
        Function of two vectors that returns a scalar; larger is nearer.

    Returns
    -------
    Array
        (m, c) votes; every row sums to k. A query whose scores are not finite has NaN votes.

    Raises
    ------
    TypeError, ValueError
        If the arrays do not fit together, are empty or not finite, or k is out of range.

    Source
    ------
    Wu, Xiong, Yu, Lin 2018 (arXiv 1805.01978), the unweighted vote; ties: derivation.
    """
    x, queries = _rows("knn_probe", "x", x), _rows("knn_probe", "queries", queries)
    check_array("knn_probe", "queries", queries, like=x)
    if x.shape[1] != queries.shape[1]:
        raise ValueError(f"knn_probe: x has shape {x.shape} and queries {queries.shape}; embed both alike")
    classes = _count_classes("knn_probe", x, labels)
    _check_k("knn_probe", k, len(x))
    return _votes(x, labels, queries, k, classes, similarity)


def accuracy(scores: Float[Array, "m c"], labels: Int[Array, " m"]) -> Float[Array, ""]:
    """Share of rows whose own class has the highest score; a class that ties with t others counts 1 / (t + 1).

    Parameters
    ----------
    scores
        (m, c) logits or votes. A row with a NaN makes the result NaN.
    labels
        (m,) classes 0 to c - 1.

    Returns
    -------
    Array
        In [0, 1]: the expected accuracy when ties are broken at random.

    Raises
    ------
    TypeError, ValueError
        If the scores are not floating-point rows, or there is not one label within 0 to c - 1 for each.
    """
    check_array("accuracy", "scores", scores)
    if scores.ndim != 2 or 0 in scores.shape:
        raise ValueError(f"accuracy: scores have shape {scores.shape}; give (m, c), one row a sample, neither empty")
    if _count_classes("accuracy", scores, labels) > scores.shape[1]:
        raise ValueError(f"accuracy: a label is beyond the {scores.shape[1]} classes of scores; renumber the labels")
    best = jnp.max(scores, axis=1, keepdims=True)
    tied = (scores == best).astype(scores.dtype)
    own = jnp.take_along_axis(tied, labels[:, None], axis=1)[:, 0]
    return jnp.mean(jnp.where(jnp.isnan(best[:, 0]), jnp.nan, own / jnp.sum(tied, axis=1)))


def recall_at(
    za: Float[Array, "n z"], zb: Float[Array, "n z"], k: int | Sequence[int], *, similarity: Similarity = cosine
) -> Float[Array, "*ks"]:
    r"""Recall@k of retrieval from `za` to `zb`: how often the partner of an anchor is among its k best candidates.

    .. math:: R@k = \frac{1}{n} \sum_i \min\Big(1, \frac{\max(0, k - g_i)}{t_i + 1}\Big), \qquad
        g_i = \#\{j : s(a_i, b_j) > s(a_i, b_i)\}, \quad t_i = \#\{j \ne i : s(a_i, b_j) \approx s(a_i, b_i)\}

    That is the expectation over a random order of ties: partners at the places g + 1 to g + t + 1 are equally likely.
    Only counts are needed, no sorting. Chance is k / n. For the other direction exchange the arguments.

    Parameters
    ----------
    za, zb
        Anchors and candidates, (n, z) each; row i of both belongs together.
    k
        Number of candidates that are looked at, 1 to n, or several such numbers.
    similarity
        Function of two vectors that returns a scalar; larger is nearer.

    Returns
    -------
    Array
        In [0, 1]: a scalar for one k, (number of ks,) for several. NaN if a score is not finite.

    Raises
    ------
    TypeError, ValueError
        If the embeddings are not finite floating-point arrays of equal shape, or k is out of range.

    Source
    ------
    Radford et al. 2021 (arXiv 2103.00020) for retrieval between modalities; ties: derivation.
    """
    check_views("recall_at", za=za, zb=zb)
    za, zb = _rows("recall_at", "za", za), _rows("recall_at", "zb", zb)
    ks = k if isinstance(k, Sequence) else (k,)
    for one in ks:
        _check_k("recall_at", one, len(za))
    above, tied = _ranks(za, zb, similarity)
    places = (jnp.asarray(ks, above.dtype)[:, None] - above[None, :]) / (tied[None, :] + 1)
    recalls = jnp.mean(jnp.clip(places, 0, 1), axis=1)
    return recalls if isinstance(k, Sequence) else recalls[0]


def alignment(za: Float[Array, "n z"], zb: Float[Array, "n z"]) -> Float[Array, ""]:
    r"""Mean squared distance of positive pairs on the unit sphere; 0 is perfect, 2 independent uniform views.

    .. math:: \frac{1}{n} \sum_i |u(a_i) - u(b_i)|^2, \qquad u(a) = a / |a|

    Parameters
    ----------
    za, zb
        Two views, (n, z) each, no row zero.

    Returns
    -------
    Array
        A scalar in [0, 4].

    Raises
    ------
    TypeError, ValueError
        If the views are not finite floating-point arrays of equal shape, or a row is zero.

    Source
    ------
    Wang, Isola 2020 (arXiv 2005.10242), section 4.1, with exponent 2.
    """
    check_views("alignment", za=za, zb=zb)
    a, b = (_on_sphere("alignment", name, z) for name, z in (("za", za), ("zb", zb)))
    return jnp.mean(jnp.sum((a - b) ** 2, axis=1))


def uniformity(z: Float[Array, "n z"], *, t: float | int = 2) -> Float[Array, ""]:
    r"""Logarithm of the mean Gaussian potential between different rows on the unit sphere; lower is more uniform.

    .. math:: \ln \frac{1}{n (n - 1)} \sum_{i \ne j} e^{-t |u(z_i) - u(z_j)|^2}, \qquad u(z) = z / |z|

    Parameters
    ----------
    z, t
        (n, z) embeddings, n >= 2, no row zero; and the sharpness of the potential, > 0.

    Returns
    -------
    Array
        A scalar in [-4 t, 0], in nats; 0 if all rows point the same way.

    Raises
    ------
    TypeError, ValueError
        If z is not a finite floating-point array of at least two rows, a row is zero, or t is not positive.

    Source
    ------
    Wang, Isola 2020 (arXiv 2005.10242), section 4.1.
    """
    u = _on_sphere("uniformity", "z", z)
    if not 0 < t < np.inf or len(u) < 2:
        raise ValueError(f"uniformity: t is {t} and z has {len(u)} row(s); give a finite t > 0 and two rows or more")
    return _log_potential(u, jnp.asarray(t, u.dtype))


@partial(jax.jit, static_argnames=("k", "classes", "similarity"))
def _votes(x, labels, queries, k, classes, similarity):
    x, queries, similarity, resolution = _comparable(x, queries, similarity)
    kinds, lengths = jax.nn.one_hot(labels, classes, dtype=x.dtype), jnp.linalg.norm(x, axis=1)

    def row(query):
        s = pairwise(similarity, query[None], x)[0]
        last, where = (found[-1] for found in jax.lax.top_k(s, k))
        ties = jnp.abs(s - last) <= resolution * jnp.linalg.norm(query) * jnp.maximum(lengths, lengths[where])
        nearer = ((s > last) & ~ties).astype(x.dtype)
        ties = ties.astype(x.dtype)
        weights = nearer + ties * (k - jnp.sum(nearer)) / jnp.sum(ties)
        votes = jnp.matmul(weights, kinds, precision="highest")
        return jnp.where(jnp.all(jnp.isfinite(s)), votes, jnp.nan)

    return _by_rows(row, queries, len(x))


@partial(jax.jit, static_argnums=2)
def _ranks(za, zb, similarity):
    """How many candidates score above the partner, and how many others tie with it, (n,) each; NaN if undefined."""
    za, zb, similarity, resolution = _comparable(za, zb, similarity)
    lengths = jnp.linalg.norm(zb, axis=1)

    def row(anchor):
        a, i = anchor
        s = pairwise(similarity, a[None], zb)[0]
        ties = jnp.abs(s - s[i]) <= resolution * jnp.linalg.norm(a) * jnp.maximum(lengths, lengths[i])
        above = jnp.sum(((s > s[i]) & ~ties).astype(za.dtype))
        others = jnp.sum(ties.astype(za.dtype)) - 1
        return jnp.where(jnp.all(jnp.isfinite(s)), jnp.stack([above, others]), jnp.nan)

    counts = _by_rows(row, (za, jnp.arange(len(za))), len(zb))
    return counts[:, 0], counts[:, 1]


@jax.jit
def _log_potential(u, t):
    def row(anchor):
        a, i = anchor
        # |a - b|^2 of unit vectors; the rounding of the product is that of the exponent, harmless.
        exponents = -2 * t * (1 - jnp.matmul(u, a, precision="highest"))
        return jax.nn.logsumexp(jnp.where(jnp.arange(len(u)) == i, -jnp.inf, exponents))

    rows = _by_rows(row, (u, jnp.arange(len(u))), len(u))
    n = jnp.asarray(len(u), u.dtype)
    return jax.nn.logsumexp(rows) - jnp.log(n) - jnp.log(n - 1)


def _comparable(a, b, similarity):
    """Rows ready for scoring, in float32 or wider; the similarity still to apply; the relative resolution of scores."""
    wide = a.dtype if jnp.finfo(a.dtype).bits > 16 else jnp.dtype(jnp.float32)
    a, b = a.astype(wide), b.astype(wide)
    if similarity is cosine:
        a, b, similarity = normalise(a), normalise(b), dot
    return a, b, similarity, a.shape[1] * jnp.finfo(wide).eps if similarity is dot else 0.0


def _by_rows(function, rows, columns):
    """Apply a function of one row to all rows, as many at once as fit into a block of scores."""
    return jax.lax.map(function, rows, batch_size=max(1, _BLOCK // columns))


def _rows(where, name, value):
    """The embeddings, after a check that they are rows and, where that can be seen, finite."""
    check_array(where, name, value)
    if value.ndim != 2 or 0 in value.shape:
        raise ValueError(f"{where}: {name} has shape {value.shape}; embeddings are (n, z), one sample a row, not empty")
    if not isinstance(value, jax.core.Tracer) and not bool(jnp.all(jnp.isfinite(value))):
        row = int(jnp.argmin(jnp.all(jnp.isfinite(value), axis=1)))
        raise ValueError(f"{where}: row {row} of {name} is not finite; remove it, or find where training diverged")
    return value


def _on_sphere(where, name, value):
    value = _rows(where, name, value)
    u = normalise(value)
    if not isinstance(u, jax.core.Tracer) and not bool(jnp.all(jnp.any(u != 0, axis=1))):
        row = int(jnp.argmin(jnp.any(u != 0, axis=1)))
        raise ValueError(f"{where}: row {row} of {name} is zero and has no direction; remove that row")
    return u


def _count_classes(where, x, labels) -> int:
    """1 + the largest label, after a check that there is one label >= 0 for each row."""
    if isinstance(labels, jax.core.Tracer):
        raise TypeError(f"{where}: labels are traced, so the number of classes is not known; call it outside jax.jit")
    labels = np.asarray(labels)
    if labels.dtype.kind not in "iu":
        raise TypeError(f"{where}: labels have dtype {labels.dtype}; give whole numbers, one class a row")
    if labels.shape != (len(x),) or labels.min() < 0:
        raise ValueError(
            f"{where}: labels have shape {labels.shape}; give one class 0, 1, ... for each of {len(x)} rows"
        )
    return int(labels.max()) + 1


def _check_k(where, k, n):
    if isinstance(k, bool) or not isinstance(k, int | np.integer) or not 1 <= k <= n:
        raise ValueError(f"{where}: k is {k!r}; give a whole number from 1 to {n}, the number of candidates")
