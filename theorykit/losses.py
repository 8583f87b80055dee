r"""Contrastive and redundancy-reduction losses: embeddings in, a scalar out.

Row i of `za` and row i of `zb` embed two views of sample i (a positive pair); n is the number of samples, z the
embedding dimension, s a similarity, tau the temperature. All functions are pure and return a scalar of the dtype of
the embeddings.

==============  ============================  ===================================================  ====================
loss            compares                      is at least                                          is invariant under
==============  ============================  ===================================================  ====================
`linear`        triplets                      nothing under dot, -2 under cosine                   rotation
`logistic`      pairs one by one              0                                                    rotation
`info_nce`      each row of scores            0                                                    rotation
`nt_xent`       each row among all 2n views   0                                                    rotation
`clip`          rows and columns of scores    0                                                    rotation
`spectral`      all pairs, i = j included     -r under dot, 1/r - 2 under cosine; r = min(n, z)    rotation
`barlow_twins`  embedding dimensions          0                                                    scale and shift
`vicreg`        embedding dimensions          0                                                    common shift
==============  ============================  ===================================================  ====================

"Rotation" is one orthogonal map of all embeddings, under dot or cosine. Under cosine these losses do not depend on the
length of any embedding either, so their gradient is orthogonal to each of them; `cosine` defines zero vectors.

Scores are divided by the temperature, whose default 1 leaves them as they are. Published values, all with cosine, are
0.1 (SimCLR on ImageNet) and 0.07 (MoCo; CLIP's initial value).

Negatives beside the batch, as from a queue of earlier embeddings, belong to the losses that rank candidates: `info_nce`
and `nt_xent` take them as `negatives`, `linear` takes all its negatives from the caller. `clip` ranks two different
sets; with queues qa and qb it is (info_nce(za, zb, negatives=qb) + info_nce(zb, za, negatives=qa)) / 2. In `logistic`
and `spectral` a sum over all pairs fixes what the loss estimates, and the last two compare no samples.

Wrong types, ranks, shapes and settings raise before any computation, also inside `jax.jit`. The *values* of embeddings
and of traced settings cannot be checked there: embeddings with a NaN or an infinity give a non-finite loss or gradient,
on which the caller has to stop.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from theorykit._loss_terms import centre, cross_entropy, setting, sum_off_diagonal_squares, with_negatives
from theorykit.similarity import Similarity, check_array, check_views, cosine, dot, pairwise

Scalar = float | int | Float[Array, ""]  # traced where a setting is learned or swept

# gamma and epsilon of Bardes, Ponce, LeCun (2022), section 4.1: the deviation that the hinge asks for, and what keeps
# the derivative of the square root finite at zero variance.
_GAMMA, _EPSILON = 1.0, 1e-4


def linear(
    za: Float[Array, "n z"], zp: Float[Array, "n z"], zn: Float[Array, "n *k z"], *, similarity: Similarity = dot
) -> Float[Array, ""]:
    r"""Linear triplet loss: pull positives and push negatives, without saturation.

    .. math:: L = \frac{1}{n} \sum_i \Big[ \frac{1}{k} \sum_{l=1}^{k} s(a_i, n_{il}) - s(a_i, p_i) \Big]

    Under dot products it has no minimum: multiplying all embeddings by c multiplies it by c^2.

    Parameters
    ----------
    za, zp
        Anchors and their positives, (n, z) each.
    zn
        Negatives of each anchor: one, (n, z), or k of them, (n, k, z).
    similarity
        Function of two vectors that returns a scalar.

    Returns
    -------
    Mean over the triplets, in units of the similarity.

    Raises
    ------
    TypeError, ValueError
        If the embeddings are not floating-point arrays of matching shapes, or empty.

    Source
    ------
    Anil, Esser, Ghoshdastidar (arXiv 2403.08673); written as a mean over samples here.
    """
    check_views("linear", za=za, zp=zp)
    check_array("linear", "zn", zn, like=za)
    if zn.ndim not in (2, 3) or (zn.shape[0], zn.shape[-1]) != za.shape or zn.size == 0:
        raise ValueError(f"linear: zn has shape {zn.shape}, za {za.shape}; give (n, z), or (n, k, z) with k >= 1")
    negatives = zn.reshape(zn.shape[0], -1, zn.shape[-1])
    candidates = jnp.concatenate([zp[:, None, :], negatives], axis=1)
    scores = jax.vmap(lambda anchor, row: pairwise(similarity, anchor[None, :], row)[0])(za, candidates)
    return jnp.mean(jnp.mean(scores[:, 1:], axis=1) - scores[:, 0])


def logistic(
    za: Float[Array, "n z"], zb: Float[Array, "n z"], *, similarity: Similarity = dot, temperature: Scalar = 1.0
) -> Float[Array, ""]:
    r"""Logistic (NCE) loss: tell positive pairs from negative ones, one by one.

    .. math:: L = \frac{1}{n} \sum_i \zeta(-s_{ii}/\tau) + \frac{1}{n(n-1)} \sum_{i \ne j} \zeta(s_{ij}/\tau),
              \qquad \zeta(t) = \ln(1 + e^t), \quad s_{ij} = s(a_i, b_j)

    Positive and negative pairs weigh the same in all, whatever n. The population minimiser is then
    s/tau = ln[p(x, y) / (p(x) p(y))], the pointwise mutual information; scores 0 give 2 ln 2. Zhai et al. instead give
    the second sum the weight 1/n, which adds -ln(n - 1) to the minimiser.

    Parameters
    ----------
    za, zb
        Two views, (n, z) each, n >= 2; every pair off the diagonal is a negative.
    similarity, temperature
        Function of two vectors that returns a scalar, and tau > 0 in its units.

    Returns
    -------
    The loss, in nats.

    Raises
    ------
    TypeError, ValueError
        If the embeddings are not floating-point arrays of equal shape, n < 2, or the temperature is not positive.

    Source
    ------
    Gutmann, Hyvarinen (AISTATS 2010); Levy, Goldberg (NeurIPS 2014), the minimiser; Zhai et al. (arXiv 2303.15343).
    """
    check_views("logistic", least=2, za=za, zb=zb)
    n = za.shape[0]
    scores = pairwise(similarity, za, zb) / setting("logistic", za, temperature=temperature)
    negatives = jnp.where(jnp.eye(n, dtype=bool), 0.0, jax.nn.softplus(scores))
    return jnp.mean(jax.nn.softplus(-jnp.diagonal(scores))) + jnp.sum(negatives) / (n * (n - 1))


def info_nce(
    za: Float[Array, "n z"],
    zb: Float[Array, "n z"],
    *,
    similarity: Similarity = cosine,
    temperature: Scalar = 1.0,
    negatives: Float[Array, "q z"] | None = None,
) -> Float[Array, ""]:
    r"""InfoNCE, one direction: find the partner of each anchor among all candidates.

    .. math:: L = -\frac{1}{n} \sum_i \ln \frac{e^{s(a_i, c_i)/\tau}}{\sum_{j=1}^{K} e^{s(a_i, c_j)/\tau}}, \qquad
              c = (b_1, \dots, b_n, \text{negatives}), \quad K = n + q

    It depends on score differences only. Equal scores give ln K; a single candidate gives 0.

    Parameters
    ----------
    za, zb
        Anchors and their partners, (n, z) each; the partners of the other anchors are negatives.
    similarity, temperature
        Function of an anchor and a candidate that returns a scalar, and tau > 0 in its units.
    negatives
        More negatives for every anchor, (q, z), as from the filled part of a queue; q may be 0. Gradients flow here.

    Returns
    -------
    The loss, in nats.

    Raises
    ------
    TypeError, ValueError
        If the arrays are not floating point of matching shapes, n = 0, or the temperature is not positive.

    Source
    ------
    van den Oord, Li, Vinyals (arXiv 1807.03748), eq. 4; He et al. (arXiv 1911.05722), eq. 1, for the queue.
    """
    check_views("info_nce", za=za, zb=zb)
    candidates = with_negatives("info_nce", zb, negatives)
    return cross_entropy(pairwise(similarity, za, candidates) / setting("info_nce", za, temperature=temperature))


def nt_xent(
    za: Float[Array, "n z"],
    zb: Float[Array, "n z"],
    *,
    similarity: Similarity = cosine,
    temperature: Scalar = 1.0,
    negatives: Float[Array, "q z"] | None = None,
) -> Float[Array, ""]:
    r"""NT-Xent of SimCLR: each of the 2n views finds its partner among the 2n - 1 others and any further negatives.

    .. math:: L = -\frac{1}{2n} \sum_{i=1}^{2n} \ln \frac{e^{s(v_i,v_{p(i)})/\tau}}
              {\sum_{j \ne i,\, j \le 2n + q} e^{s(v_i,v_j)/\tau}}, \qquad p(i) = i \pm n, \quad
              v = (a_1, \dots, a_n, b_1, \dots, b_n, \text{negatives})

    Unlike `clip` it also has negatives from the same view. Equal scores give ln(2n - 1 + q); one candidate gives 0.

    Parameters
    ----------
    za, zb
        Two views, (n, z) each.
    similarity, temperature
        Function of two vectors that returns a scalar, and tau > 0 in its units.
    negatives
        More negatives for every view, (q, z), as in `info_nce`.

    Returns
    -------
    The loss, in nats.

    Raises
    ------
    TypeError, ValueError
        If the arrays are not floating point of matching shapes, n = 0, or the temperature is not positive.

    Source
    ------
    Chen, Kornblith, Norouzi, Hinton (arXiv 2002.05709), eq. 1, averaged over both orders of every pair; further
    negatives, which the source does not have, enter as those of `info_nce` do.
    """
    check_views("nt_xent", za=za, zb=zb)
    n = za.shape[0]
    views = jnp.concatenate([za, zb])
    candidates = with_negatives("nt_xent", views, negatives)
    scores = pairwise(similarity, views, candidates) / setting("nt_xent", za, temperature=temperature)
    log_p = jax.nn.log_softmax(jnp.where(jnp.eye(*scores.shape, dtype=bool), -jnp.inf, scores), axis=-1)[:, : 2 * n]
    return -jnp.mean(jnp.concatenate([jnp.diagonal(log_p, offset=n), jnp.diagonal(log_p, offset=-n)]))


def clip(
    za: Float[Array, "n z"], zb: Float[Array, "n z"], *, similarity: Similarity = cosine, temperature: Scalar = 1.0
) -> Float[Array, ""]:
    r"""Two-sided InfoNCE of CLIP: the mean of both directions.

    .. math:: L = \tfrac{1}{2} \big[ \text{InfoNCE}(a \to b) + \text{InfoNCE}(b \to a) \big]

    One score matrix s(a_i, b_j) is read by rows and by columns. For a symmetric similarity that is
    (info_nce(za, zb) + info_nce(zb, za)) / 2: half the sum, as in the source.

    Parameters
    ----------
    za, zb
        Two views or modalities, (n, z) each.
    similarity, temperature
        Function of a vector of `za` and one of `zb` that returns a scalar, and tau > 0 in its units; CLIP learns it.

    Returns
    -------
    The loss, in nats.

    Raises
    ------
    TypeError, ValueError
        If the embeddings are not floating-point arrays of equal shape, n = 0, or the temperature is not positive.

    Source
    ------
    Radford et al. (arXiv 2103.00020), figure 3.
    """
    check_views("clip", za=za, zb=zb)
    scores = pairwise(similarity, za, zb) / setting("clip", za, temperature=temperature)
    return (cross_entropy(scores) + cross_entropy(scores.T)) / 2


def spectral(za: Float[Array, "n z"], zb: Float[Array, "n z"], *, similarity: Similarity = dot) -> Float[Array, ""]:
    r"""Spectral contrastive loss over all pairs of the batch, i = j included.

    .. math:: L = -\frac{2}{n} \sum_i s(a_i, b_i) + \frac{1}{n^2} \sum_{i,j} s(a_i, b_j)^2

    Under dot products L >= -r, r = min(n, z): S has rank at most r, so t = tr S / n <= sqrt(r) |S|_F / n and
    L >= t^2 / r - 2 t. Equality: a = b = sqrt(n) times orthonormal columns (z <= n) or rows (z >= n).

    Do not replace the second term by sampled negatives: an average over i != j does not control the norms. Along
    a_1 = b_1 = c e_1, all other embeddings 0, the loss is then -2 c^2 / n and falls without end.

    Parameters
    ----------
    za, zb
        Two views, (n, z) each.
    similarity
        Function of two vectors that returns a scalar; the source uses dot products.

    Returns
    -------
    The loss; -2 s + s^2 asks for scores without unit.

    Raises
    ------
    TypeError, ValueError
        If the embeddings are not floating-point arrays of equal shape, or n = 0.

    Source
    ------
    HaoChen, Wei, Gaidon, Ma (arXiv 2106.04156), section 3.2, over a batch; the bounds and the divergence: derivation.
    """
    check_views("spectral", za=za, zb=zb)
    scores = pairwise(similarity, za, zb)
    return jnp.mean(scores * scores) - 2 * jnp.mean(jnp.diagonal(scores))


def barlow_twins(za: Float[Array, "n z"], zb: Float[Array, "n z"], *, redundancy: Scalar = 5e-3) -> Float[Array, ""]:
    r"""Barlow Twins: make the cross-correlation of the two views the identity.

    .. math:: L = \sum_i (1 - C_{ii})^2 + \lambda \sum_{i \ne j} C_{ij}^2, \qquad
              C_{ij} = \frac{\sum_b a_{bi} b_{bj}}{\sqrt{\sum_b a_{bi}^2} \sqrt{\sum_b b_{bj}^2}}

    with each dimension centred over the batch. A dimension that is constant over the batch has no correlation: its
    row or column of C is defined as 0, with zero gradient.

    Parameters
    ----------
    za, zb
        Two views, (n, z) each, n >= 2.
    redundancy
        Weight lambda >= 0 of the off-diagonal terms; 5e-3 is the source's value.

    Returns
    -------
    The loss, without unit.

    Raises
    ------
    TypeError, ValueError
        If the embeddings are not floating-point arrays of equal shape, n < 2, or the weight is negative.

    Source
    ------
    Zbontar, Jing, Misra, LeCun, Deny (arXiv 2103.03230), eqs. 1 and 2.
    """
    check_views("barlow_twins", least=2, za=za, zb=zb)
    weight = setting("barlow_twins", za, redundancy=redundancy)
    correlation = pairwise(cosine, centre(za).T, centre(zb).T)
    gap = 1 - jnp.diagonal(correlation)
    return jnp.sum(gap * gap) + weight * sum_off_diagonal_squares(correlation)


def vicreg(
    za: Float[Array, "n z"],
    zb: Float[Array, "n z"],
    *,
    invariance: Scalar = 25.0,
    variance: Scalar = 25.0,
    covariance: Scalar = 1.0,
) -> Float[Array, ""]:
    r"""VICReg: views agree, every dimension varies, dimensions are uncorrelated.

    .. math:: L = \frac{\lambda}{n} \sum_i |a_i - b_i|^2 + \mu [v(a) + v(b)] + \nu [c(a) + c(b)], \quad
        v = \frac{1}{z} \sum_j \max(0, \gamma - \sqrt{\Sigma_{jj} + \epsilon}), \quad
        c = \frac{1}{z} \sum_{i \ne j} \Sigma_{ij}^2

    Sigma is the covariance over the batch with 1/(n - 1); gamma = 1 and epsilon = 1e-4 as in the source.

    Parameters
    ----------
    za, zb
        Two views, (n, z) each, n >= 2.
    invariance, variance, covariance
        Weights lambda, mu, nu >= 0; the defaults are the source's.

    Returns
    -------
    The loss; the hinge fixes the unit of the embeddings.

    Raises
    ------
    TypeError, ValueError
        If the embeddings are not floating-point arrays of equal shape, n < 2, or a weight is negative.

    Source
    ------
    Bardes, Ponce, LeCun (arXiv 2105.04906), eqs. 1 to 6.
    """
    check_views("vicreg", least=2, za=za, zb=zb)
    n, z = za.shape
    invariance = setting("vicreg", za, invariance=invariance)
    variance = setting("vicreg", za, variance=variance)
    covariance = setting("vicreg", za, covariance=covariance)

    def regulariser(centred):
        sigma = jnp.matmul(centred.T, centred, precision="highest") / (n - 1)
        shortfall = jax.nn.relu(_GAMMA - jnp.sqrt(jnp.diagonal(sigma) + _EPSILON))
        return variance * jnp.mean(shortfall) + covariance * sum_off_diagonal_squares(sigma) / z

    return invariance * jnp.sum((za - zb) ** 2) / n + regulariser(centre(za)) + regulariser(centre(zb))


# The losses of two views, for experiments that compare them. `linear` is absent: it takes triplets.
_TWO_VIEWS = (logistic, info_nce, nt_xent, clip, spectral, barlow_twins, vicreg)
LOSSES: dict[str, Callable[..., Array]] = {loss.__name__: loss for loss in _TWO_VIEWS}
