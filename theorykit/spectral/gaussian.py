r"""Linear InfoNCE and linear CLIP on jointly Gaussian views, in closed form, with infinitely many negatives.

InfoNCE. Views x, x+ with the same marginal N(0, Sigma), C = Cov(x - x+) / 2, z = W x, s = -|z - z'|^2 / 2. With
S = W Sigma W^T the loss minus ln K tends to

    L = Tr W C W^T - ln det(I + S) / 2 - Tr[(I + S)^-1 S] / 2        as the number K of candidates grows.

Whitening, N = Sigma^{1/2} W^T W Sigma^{1/2}, leaves Tr(R N) and a function of the spectrum of N, so the optimum shares
the eigenvectors of R = Sigma^{-1/2} C Sigma^{-1/2}, whether or not Sigma and C commute. With its eigenvalues r_i, which
are c_i/sigma_i if they do, the modes separate,

    L = sum_i [r_i u_i - ln(1 + u_i) / 2 - u_i / (2 (1 + u_i))],    optimum 1 / (1 + u_i) = (-1 + sqrt(1 + 8 r_i)) / 2,

which gives u_i > 0 for r_i < 1; modes with r_i >= 1 collapse, u_i = 0. Near 0 a mode's loss is -(1 - r) u + (3/4) u^2.
Since r_i = 1 - rho_i with rho_i the correlation of the two views along the mode, collapse needs rho_i <= 0. Two
augmentations of one sample that are drawn alike and independently never have rho_i < 0.

CLIP. Views x, y with covariances Sxx, Syy, Sxy and scores x^T M y, as from linear encoders with M = W_x^T W_y. The loss
of `losses.clip`, half the sum of its two directions, minus ln K tends to

    L = -Tr(M^T Sxy) + Tr(M^T Sxx M Syy) / 2,

either direction alone to the same. Its minimum over M of rank k is sum_{i<=k} rho_i u_i v_i^T with the canonical
correlations rho_i and weights u_i, v_i (projected views have unit variance): CCA, with weights rho_i and not 1. Scores
that are not bilinear can do better: ln[p(x, y) / (p(x) p(y))] also has terms quadratic in x and in y.

Finite K. Both losses are L + A / K + o(1 / K), with A in closed form too (`info_nce_correction`, `clip_correction`).
The logarithm of a mean of K - 1 random terms lies below that of its expectation by half their relative variance over
K, and the partner among the candidates adds to it. For CLIP A is finite only while sum_i m_i^2 u_i^2 has an exponential
moment, every canonical weight m_i below 1/sqrt 2: beyond, the limit is approached more slowly than 1/K.

Optima, strengths and shifts refuse numbers that are not finite where these are known; limits and corrections, which
are formulas to be differentiated or integrated, hand a NaN on.

Source: relative of Ziyin, Lubana, Ueda, Tanaka (arXiv 2210.00638) for InfoNCE; Hotelling 1936 for canonical
correlations; the limits, the whitened form and the corrections: derivation (Gaussian integrals).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from theorykit.spectral._checks import check_symmetric, check_values


class InfoNCEOptimum(NamedTuple):
    """Optimal linear encoder under InfoNCE in the Gaussian limit, the k best modes.

    Attributes
    ----------
    gram : (d, d) W^T W; the rotation of the embeddings is free.
    ratios : (k,) r, ascending.
    strengths : (k,) u, the variance of the embedding along each mode; 0 where collapsed.
    directions : (d, k) Sigma^{-1/2} times the eigenvectors of R: W^T W = sum_i u_i d_i d_i^T.
    loss : () the optimal loss minus ln K, in nats.
    """

    gram: Float[Array, "d d"]
    ratios: Float[Array, " k"]
    strengths: Float[Array, " k"]
    directions: Float[Array, "d k"]
    loss: Float[Array, ""]


class CLIPOptimum(NamedTuple):
    """Optimal bilinear scores of rank k under CLIP in the Gaussian limit.

    Attributes
    ----------
    score : (da, db) M.
    correlations : (k,) canonical correlations, descending; the weights of M.
    a_weights, b_weights : (da, k) and (db, k), so that projected views have unit variance: M = sum_i rho_i u_i v_i^T.
    loss : () the optimal loss minus ln K, in nats: -sum_i rho_i^2 / 2.
    """

    score: Float[Array, "da db"]
    correlations: Float[Array, " k"]
    a_weights: Float[Array, "da k"]
    b_weights: Float[Array, "db k"]
    loss: Float[Array, ""]


def info_nce_limit(
    w: Float[Array, "z d"], covariance: Float[Array, "d d"], half_difference: Float[Array, "d d"]
) -> Float[Array, ""]:
    r"""InfoNCE of a linear encoder on Gaussian views, minus ln K, for K to infinity.

    .. math:: L = \mathrm{Tr}\, W C W^T - \tfrac{1}{2} \ln\det(I + S) - \tfrac{1}{2} \mathrm{Tr}[(I + S)^{-1} S],
              \qquad S = W \Sigma W^T

    Parameters
    ----------
    w : encoder, (z, d).
    covariance : Sigma of either view, (d, d).
    half_difference : C = Cov(x - x+) / 2, (d, d).

    Returns
    -------
    The loss, in nats: of `losses.info_nce` with s(a, b) = -|a - b|^2 / 2.

    Source: derivation. E_{z'} e^{-|z - z'|^2 / 2} = det(I + S)^{-1/2} exp(-z^T (I + S)^{-1} z / 2), and E_z of its
    logarithm.
    """
    s = _product(_product(w, covariance), w.T)
    grown = jnp.eye(w.shape[0], dtype=w.dtype) + s
    pull = jnp.sum(w * _product(w, half_difference))
    return pull - jnp.linalg.slogdet(grown)[1] / 2 - jnp.trace(jnp.linalg.solve(grown, s)) / 2


def info_nce_strengths(ratios: Float[Array, " k"]) -> Float[Array, " k"]:
    r"""Optimal variance of the embedding along each mode.

    .. math:: \frac{1}{1 + u} = \min\Big(1, \frac{-1 + \sqrt{1 + 8 r}}{2}\Big)

    Parameters
    ----------
    ratios : (k,) r > 0: half the variance of x - x+ over that of x, 1 - correlation.

    Returns
    -------
    (k,) u; 0 for r >= 1. It grows without end as r falls to 0.

    Raises
    ------
    TypeError, ValueError
        If a ratio is not positive: along a mode that the two views share without noise the loss has no minimum. If
        ratios are not real and finite.

    Source: derivation: with y = 1 / (1 + u), the loss is stationary at y^2 + y = 2 r. A relative of Ziyin et al. (arXiv
    2210.00638).
    """
    check_values("info_nce_strengths", ratios=ratios)
    if not isinstance(ratios, jax.core.Tracer) and not np.all(np.asarray(ratios) > 0):
        raise ValueError(
            f"the smallest ratio is {float(jnp.min(ratios)):.3g}, and the loss has a minimum only where all are "
            "positive: leave out directions along which both views are equal, or add noise to them"
        )
    # (-1 + sqrt(1 + 8 r)) / 2 without the difference of equals at small r.
    y = jnp.minimum(4 * ratios / (1 + jnp.sqrt(1 + 8 * ratios)), 1)
    return 1 / y - 1


def info_nce_optimum(covariance: Float[Array, "d d"], half_difference: Float[Array, "d d"], k: int) -> InfoNCEOptimum:
    r"""Optimal linear encoder with k outputs under InfoNCE in the Gaussian limit.

    .. math:: W^T W = \Sigma^{-1/2} \Big( \sum_{i \le k} u_i e_i e_i^T \Big) \Sigma^{-1/2}, \qquad
              \Sigma^{-1/2} C \Sigma^{-1/2} e_i = r_i e_i, \quad r_1 \le r_2 \le \dots

    Parameters
    ----------
    covariance : Sigma, (d, d), positive definite.
    half_difference : C, (d, d), positive definite. It need not commute with Sigma.
    k : number of outputs, 1 to d.

    Returns
    -------
    InfoNCEOptimum

    Raises
    ------
    ValueError
        If a matrix is not finite and symmetric, Sigma not positive definite, a ratio not positive, or k out of range.

    Source: derivation; the case of commuting matrices is a relative of Ziyin et al. (arXiv 2210.00638).
    """
    check_symmetric("the half-difference covariance", half_difference)
    if half_difference.shape != covariance.shape:
        raise ValueError(f"covariances of shapes {covariance.shape} and {half_difference.shape}: give both for one x")
    _check_rank(k, covariance.shape[0])
    white = _inverse_root("the covariance", covariance)
    ratios, vectors = jnp.linalg.eigh(_product(_product(white, half_difference), white))
    ratios, vectors = ratios[:k], vectors[:, :k]
    strengths = info_nce_strengths(ratios)
    directions = _product(white, vectors)
    gram = _product(directions * strengths[None, :], directions.T)
    return InfoNCEOptimum(gram, ratios, strengths, directions, _info_nce_modes(strengths, ratios))


def info_nce_correction(strengths: Float[Array, " k"], ratios: Float[Array, " k"]) -> Float[Array, ""]:
    r"""Coefficient of 1/K in InfoNCE with K candidates, the partner among them.

    .. math:: A = \prod_i \frac{1 + u_i}{1 + r_i u_i} - \frac{1}{2} \prod_i \sqrt{\frac{(1 + u_i)^3}{1 + 3 u_i}}
                  - \frac{1}{2}

    Parameters
    ----------
    strengths, ratios : (k,) u >= 0 and r of an encoder that is diagonal in the modes.

    Returns
    -------
    A, in nats: the loss is ln K + L + A / K + o(1 / K).

    Source: derivation. With mu = E_{z'} e^s, A = E[e^{s(z, z+)} / mu] - 1 - (E[e^{2 s(z, z')} / mu^2] - 1) / 2.
    """
    partner = jnp.prod((1 + strengths) / (1 + ratios * strengths))
    return partner - jnp.prod(jnp.sqrt((1 + strengths) ** 3 / (1 + 3 * strengths))) / 2 - 0.5


def info_nce_shift(ratios: Float[Array, " k"]) -> Float[Array, " k"]:
    r"""First-order shift of the optimal strengths with K candidates: u_i + shift_i / K + o(1 / K).

    .. math:: \delta_i = -\frac{\partial_i A(u)}{L''(u_i)}, \qquad
              L''(u) = \frac{1}{2 (1 + u)^2} + \frac{1}{(1 + u)^3}

    Parameters
    ----------
    ratios : (k,) r > 0.

    Returns
    -------
    (k,) in units of u; 0 for collapsed modes, which stay collapsed: at u_i = 0 the slope of the loss with the
    correction is (r_i - 1) (1 - prod_j (1 + u_j) / (1 + r_j u_j) / K), so the threshold r = 1 does not move.

    Raises
    ------
    ValueError
        As `info_nce_strengths`.

    Source: derivation.
    """
    u = info_nce_strengths(ratios)
    slope = jax.grad(info_nce_correction)(u, ratios)
    return jnp.where(u > 0, -slope / (1 / (2 * (1 + u) ** 2) + 1 / (1 + u) ** 3), 0)


def clip_limit(
    score: Float[Array, "da db"],
    cov_a: Float[Array, "da da"],
    cov_b: Float[Array, "db db"],
    cross: Float[Array, "da db"],
) -> Float[Array, ""]:
    r"""CLIP with bilinear scores on jointly Gaussian views, minus ln K, for K to infinity.

    .. math:: L = -\mathrm{Tr}(M^T S_{xy}) + \tfrac{1}{2} \mathrm{Tr}(M^T S_{xx} M S_{yy})

    Parameters
    ----------
    score : M of x^T M y, (da, db); for linear encoders W_x^T W_y over the temperature.
    cov_a, cov_b, cross : Sxx (da, da), Syy (db, db) and Sxy (da, db).

    Returns
    -------
    The loss, in nats: of `losses.clip`, and of `losses.info_nce` in either direction, with the dot product.

    Source: derivation. E_y e^{x^T M y} = exp(x^T M Syy M^T x / 2), and E_x of its logarithm; so for the other
    direction.
    """
    return jnp.sum(score * _product(_product(cov_a, score), cov_b)) / 2 - jnp.sum(score * cross)


def clip_optimum(
    cov_a: Float[Array, "da da"], cov_b: Float[Array, "db db"], cross: Float[Array, "da db"], k: int
) -> CLIPOptimum:
    r"""Optimal bilinear scores of rank k under CLIP in the Gaussian limit: canonical directions, weighted by rho.

    .. math:: M = \sum_{i \le k} \rho_i u_i v_i^T, \qquad
              S_{xx}^{-1/2} S_{xy} S_{yy}^{-1/2} = \sum_i \rho_i p_i q_i^T, \quad
              u_i = S_{xx}^{-1/2} p_i, \ v_i = S_{yy}^{-1/2} q_i

    Parameters
    ----------
    cov_a, cov_b, cross : Sxx (da, da) and Syy (db, db), positive definite, and Sxy (da, db).
    k : rank, 1 to min(da, db): the output dimension of the encoders.

    Returns
    -------
    CLIPOptimum

    Raises
    ------
    ValueError
        If a covariance is not finite, symmetric and positive definite, the cross-covariance not finite, shapes do not
        match, or k is out of range.

    Source: derivation. With B = Sxx^{1/2} M Syy^{1/2} the loss is |B - Sxx^{-1/2} Sxy Syy^{-1/2}|_F^2 / 2 up to a
    constant; then Eckart and Young 1936. Hotelling 1936 for canonical correlations.
    """
    check_values("clip_optimum", cross=cross)
    if cross.shape != (cov_a.shape[0], cov_b.shape[0]):
        raise ValueError(
            f"the cross-covariance has shape {cross.shape} for views of dimension {cov_a.shape[0]} and "
            f"{cov_b.shape[0]}: give E x y^T"
        )
    _check_rank(k, min(cross.shape))
    white_a, white_b = _inverse_root("cov_a", cov_a), _inverse_root("cov_b", cov_b)
    p, rho, qt = jnp.linalg.svd(_product(_product(white_a, cross), white_b), full_matrices=False)
    u, v, rho = _product(white_a, p[:, :k]), _product(white_b, qt[:k].T), rho[:k]
    return CLIPOptimum(_product(u * rho[None, :], v.T), rho, u, v, -jnp.sum(rho**2) / 2)


def clip_correction(weights: Float[Array, " k"], correlations: Float[Array, " k"]) -> Float[Array, ""]:
    r"""Coefficient of 1/K in CLIP with K candidates, the partner among them.

    .. math:: A = \prod_i \frac{1}{1 - m_i \rho_i} - \frac{1}{2} \prod_i \frac{1}{\sqrt{1 - 2 m_i^2}} - \frac{1}{2}

    for scores sum_i m_i (u_i.x)(v_i.y), diagonal in the canonical directions.

    Parameters
    ----------
    weights, correlations : (k,) m and rho; all canonical directions with m_i != 0.

    Returns
    -------
    A, in nats: the loss is ln K + L + A / K + o(1 / K). Minus infinity where a weight reaches 1/sqrt 2: e^score then
    has an infinite relative variance on average, and the loss approaches its limit more slowly than 1/K.

    Source: derivation. With mu = E_y' e^{s(x, y')}, A = E[e^{s(x, y)} / mu] - 1 - (E[e^{2 s(x, y')} / mu^2] - 1) / 2.
    """
    room = 1 - 2 * weights * weights
    finite = jnp.all(room > 0)
    spread = jnp.prod(1 / jnp.sqrt(jnp.where(room > 0, room, jnp.ones_like(room))))
    return jnp.where(finite, jnp.prod(1 / (1 - weights * correlations)) - spread / 2 - 0.5, -jnp.inf)


def clip_shift(correlations: Float[Array, " k"]) -> Float[Array, " k"]:
    r"""First-order shift of the optimal canonical weights with K candidates: rho_i + shift_i / K + o(1 / K).

    .. math:: \delta_i = \frac{\rho_i}{1 - 2 \rho_i^2} \prod_j \frac{1}{\sqrt{1 - 2 \rho_j^2}}
                         - \frac{\rho_i}{1 - \rho_i^2} \prod_j \frac{1}{1 - \rho_j^2}

    Parameters
    ----------
    correlations : (k,) canonical correlations that the encoders have room for, each below 1/sqrt 2.

    Returns
    -------
    (k,) shifts; positive for small correlations: few candidates overstate the weights.

    Raises
    ------
    TypeError, ValueError
        If a correlation is 1/sqrt 2 or more: the shift is then of larger order than 1/K. If correlations are not real
        and finite.

    Source: derivation: minus the gradient of `clip_correction` at m = rho; the curvature of the limit is 1.
    """
    check_values("clip_shift", correlations=correlations)
    if not isinstance(correlations, jax.core.Tracer) and np.any(2 * np.asarray(correlations) ** 2 >= 1):
        raise ValueError(
            f"the largest correlation is {float(jnp.max(jnp.abs(correlations))):.4g}, and the shift is of order 1/K "
            "only below 1/sqrt 2 = 0.7071: measure it instead"
        )
    return -jax.grad(clip_correction)(correlations, correlations)


def _info_nce_modes(u, r):
    return jnp.sum(r * u - jnp.log1p(u) / 2 - u / (2 * (1 + u)))


def _inverse_root(name, covariance):
    """Inverse symmetric square root; an error if the covariance is singular to rounding."""
    check_symmetric(name, covariance)
    values, vectors = jnp.linalg.eigh(covariance)
    if not isinstance(values, jax.core.Tracer):
        smallest, largest = float(values[0]), float(values[-1])
        if smallest <= values.shape[0] * float(jnp.finfo(values.dtype).eps) * largest:
            raise ValueError(
                f"{name} is singular or not positive (eigenvalues from {smallest:.3g} to {largest:.3g}): project the "
                "views onto the directions in which they vary"
            )
    return _product(vectors / jnp.sqrt(values)[None, :], vectors.T)


def _check_rank(k, largest):
    if not 1 <= k <= largest:
        raise ValueError(f"k is {k}: ask for 1 to {largest} modes, the dimension of the smaller view")


def _product(a, b):
    return jnp.matmul(a, b, precision="highest")
