r"""Variational lower bounds of mutual information: their exact values on a finite joint, and estimators from scores.

A critic s scores pairs. With P the joint, p q the product of its marginals, K candidates and v = e^(s-1),

    InfoNCE         ln K - R_K(s)                                       optimum s = ln r + c(x)
    DV              E_P s - ln E_pq e^s                                 optimum s = ln r + c
    NWJ             E_P s - E_pq e^(s-1)                                optimum s = ln r + 1
    interpolated    NWJ on x and K candidates, with the critic          optimum s = ln r at its ends
                    1 + s - ln[(alpha/K) sum_j e^s(x, Y_j) + 1 - alpha]

At the optimum DV and NWJ are I. What they lose is a divergence, in closed form:

    I - NWJ(s) = E_pq [ r ln(r/v) - r + v ]
    I - DV(s)  = KL(P || p q e^s / E_pq e^s) = S(s) + KL(p || p Z_s / E_p Z_s)
    I - InfoNCE(s) = (I - I_K) + (R_K(s) - R_K(ln r)),   I - I_K in [0, ln(1 + chi^2/K)]

so that NWJ <= DV <= I - S <= I, where S is the sufficiency: the mean over x is outside the logarithm in I - S, which
is the limit of InfoNCE for many candidates, and inside in DV.

Two of them are capped: InfoNCE never exceeds ln K, and the interpolated bound with alpha > 0 never 1 + ln(K/alpha).
With the exact critic ln r the variances of their estimators are bounded too, whatever I is, see `estimate_info_nce` and
`estimate_interpolated`. DV and NWJ have no cap, and the variance of NWJ grows exponentially in I, see `nwj_variance`.

Estimators take the scores of a batch of n independent pairs, s_ij = s(x_i, y_j), pairs on the diagonal, negatives off
it. Leading axes are batches: `over_batches` turns their values into a mean with its standard error. For InfoNCE with K
candidates cut the pairs into batches of K. Critics with two encoders are `similarity.pairwise`; `concatenated_scores`
is for one network of both inputs. All of it is jit-compatible and, for training by `training.train`, differentiable.

Source: Poole, Ozair, van den Oord, Alemi, Tucker (arXiv 1905.06922) unless said otherwise; slacks: derivation.
"""

import jax
import jax.numpy as jnp
from jax.scipy.special import logsumexp
from jaxtyping import Array, Float

from theorykit.surrogate import _interpolated, risk
from theorykit.surrogate._exact_critics import (
    gaussian_chi_square,
    gaussian_information,
    gaussian_log_ratio,
    gaussian_nwj_variance,
    nwj_variance,
)
from theorykit.surrogate._score_estimators import (
    check_weight,
    concatenated_scores,
    estimate_donsker_varadhan,
    estimate_info_nce,
    estimate_interpolated,
    estimate_mine,
    estimate_nwj,
    moving_average,
    over_batches,
)
from theorykit.surrogate.information_loss import divergence_terms
from theorykit.surrogate.joint import check_joint, check_score, density_ratio

__all__ = [
    "concatenated_scores",
    "donsker_varadhan",
    "donsker_varadhan_slack",
    "estimate_donsker_varadhan",
    "estimate_info_nce",
    "estimate_interpolated",
    "estimate_mine",
    "estimate_nwj",
    "gaussian_chi_square",
    "gaussian_information",
    "gaussian_log_ratio",
    "gaussian_nwj_variance",
    "info_nce",
    "interpolated",
    "moving_average",
    "nwj",
    "nwj_slack",
    "nwj_variance",
    "over_batches",
]

# Exact values on a finite joint --------------------------------------------------------------------------------------


def info_nce(
    joint: Float[Array, "nx ny"], score: Float[Array, "nx ny"], candidates: risk.Candidates
) -> Float[Array, ""]:
    r"""InfoNCE bound, one direction.

    .. math:: \ln K - R_K(s) \le \min(I, \ln K)

    Parameters
    ----------
    joint, score, candidates
        As in `contrastive_risk`.

    Returns
    -------
    The bound in nats, -inf if a pair with P > 0 is ruled out.

    Raises
    ------
    TypeError, ValueError
        As `contrastive_risk`.

    Source
    ------
    van den Oord, Li, Vinyals (arXiv 1807.03748).
    """
    return jnp.log(jnp.asarray(candidates, joint.dtype)) - risk.contrastive_risk(joint, score, candidates)


def donsker_varadhan(joint: Float[Array, "nx ny"], score: Float[Array, "nx ny"]) -> Float[Array, ""]:
    r"""Donsker-Varadhan bound, the one of MINE.

    .. math:: E_P s - \ln E_{pq} e^s \le I

    Parameters
    ----------
    joint, score : (nx, ny)
        P, and s in nats; -inf rules a pair out.

    Returns
    -------
    The bound in nats, -inf if a pair with P > 0 is ruled out. Adding a constant to s does not change it.

    Raises
    ------
    TypeError, ValueError
        As `contrastive_risk`.

    Source
    ------
    Donsker, Varadhan (Comm. Pure Appl. Math. 36, 1983); Belghazi et al. (arXiv 1801.04062).
    """
    _check("donsker_varadhan", joint, score)
    normaliser = _log_mean(joint, score)
    # Where every pair is ruled out, so are those with P > 0, and the bound is -inf, not -inf + inf.
    return _mean(joint, score) - jnp.where(normaliser > -jnp.inf, normaliser, 0.0)


def donsker_varadhan_slack(joint: Float[Array, "nx ny"], score: Float[Array, "nx ny"]) -> Float[Array, ""]:
    r"""What Donsker-Varadhan loses, as a divergence of joint laws: no cancellation where it is small.

    .. math:: I - DV(s) = KL \Big( P \,\Big\|\, \frac{p \, q \, e^s}{E_{pq} e^s} \Big)
              = S(s) + KL \Big( p \,\Big\|\, \frac{p \, Z_s}{E_p Z_s} \Big)

    Parameters
    ----------
    joint, score
        As in `donsker_varadhan`.

    Returns
    -------
    The slack >= 0 in nats, at least the sufficiency.

    Raises
    ------
    TypeError, ValueError
        As `contrastive_risk`.

    Source
    ------
    Derivation: the chain rule of the KL divergence for (x, then y given x).
    """
    _check("donsker_varadhan_slack", joint, score)
    normaliser = _log_mean(joint, score)
    return _bregman(joint, score - jnp.where(normaliser > -jnp.inf, normaliser, 0.0))


def nwj(joint: Float[Array, "nx ny"], score: Float[Array, "nx ny"]) -> Float[Array, ""]:
    r"""NWJ bound, of the convex conjugate of t ln t; also called MINE-f.

    .. math:: E_P s - E_{pq} e^{s - 1} \le I

    Parameters
    ----------
    joint, score
        As in `donsker_varadhan`.

    Returns
    -------
    The bound in nats, -inf if a pair with P > 0 is ruled out.

    Raises
    ------
    TypeError, ValueError
        As `contrastive_risk`.

    Source
    ------
    Nguyen, Wainwright, Jordan (arXiv 0809.0853).
    """
    _check("nwj", joint, score)
    return _mean(joint, score) - jnp.exp(_log_mean(joint, score) - 1)


def nwj_slack(joint: Float[Array, "nx ny"], score: Float[Array, "nx ny"]) -> Float[Array, ""]:
    r"""What NWJ loses: a Bregman divergence of densities that need not be normalised.

    .. math:: I - NWJ(s) = E_{pq} \big[ r \ln (r / v) - r + v \big], \qquad v = e^{s - 1}

    Parameters
    ----------
    joint, score
        As in `donsker_varadhan`.

    Returns
    -------
    The slack >= 0 in nats.

    Raises
    ------
    TypeError, ValueError
        As `contrastive_risk`.

    Source
    ------
    Derivation: E_pq r = 1 and E_pq r s = E_P s.
    """
    _check("nwj_slack", joint, score)
    return _bregman(joint, score - 1)


def interpolated(
    joint: Float[Array, "nx ny"], score: Float[Array, "nx ny"], candidates: risk.Candidates, weight: float
) -> Float[Array, ""]:
    r"""Bound between NWJ (weight 0) and InfoNCE (weight 1).

    .. math:: 1 + E_+ \ln v - E_- v \le I, \qquad
              v = \frac{e^{s(x, y_1)}}{\alpha m + 1 - \alpha}, \quad m = \frac{1}{K} \sum_{j=1}^{K} e^{s(x, y_j)}

    where (x, y_1) ~ P under E_+ and y_1 ~ q independent of x under E_-, and y_2..y_K ~ q in both. At weight 0 it is
    NWJ of s + 1. As v <= K/alpha and v >= 0, it never exceeds 1 + ln(K/alpha), which is approached where positives
    score high and negatives seldom do; ln(K/alpha) alone is no cap. A learned baseline a(x) in place of the 1 beside
    1 - alpha adds nothing: it is the critic s - ln a(x).

    Parameters
    ----------
    joint, score, candidates
        As in `contrastive_risk`.
    weight : float
        alpha in [0, 1].

    Returns
    -------
    The bound in nats, exact to a few roundings of the size of the scores; -inf if a pair with P > 0 is ruled out.
    Inside jit, where nothing can be raised, NaN if a score is too large for the grid of the integral.

    Raises
    ------
    TypeError, ValueError
        As `contrastive_risk`, if the weight is outside [0, 1], or, below 1, if a score is too large for the grid of
        the integral: about 90 nats in float64, 67 in float32, where e^-s then leaves the range of the numbers.
    """
    count = risk._checked("interpolated", joint, score, candidates, "x")
    check_weight("interpolated", weight)
    if weight == 1:
        return info_nce(joint, score, candidates)
    if not any(isinstance(value, jax.core.Tracer) for value in (joint, score, count)):
        seen = (jnp.sum(joint, axis=1) > 0)[:, None] & (jnp.sum(joint, axis=0) > 0)[None, :]
        largest = jnp.max(jnp.where(seen, score, -jnp.inf))
        grid = _interpolated.step_of(largest, count, weight, joint.dtype)
        if not _interpolated.fits(*grid, joint.dtype):
            raise ValueError(
                f"interpolated: the largest score is {float(largest):.3g} and the weight {weight}, beyond the grid of "
                f"the integral in {joint.dtype}; pass float64, lower the scores, or take weight 1, which has no grid"
            )
    return _interpolated.between(joint, score, count, weight)


# ---------------------------------------------------------------------------------------------------------------------


def _check(where, joint, score):
    check_joint(joint, where)
    check_score(joint, score, where)


def _mean(joint, score):
    """E_P s, -inf if the score is where P > 0."""
    met = joint > 0
    return jnp.sum(jnp.where(met, joint * jnp.where(met, score, 0.0), 0.0))


def _log_mean(joint, score):
    """ln E_pq e^s."""
    product = jnp.sum(joint, axis=1)[:, None] * jnp.sum(joint, axis=0)[None, :]
    return logsumexp(jnp.where(product > 0, score, -jnp.inf), b=product)


def _bregman(joint, log_v):
    """E_pq [r ln(r/v) - r + v], every term nonnegative; +inf where v = 0 < r."""
    product = jnp.sum(joint, axis=1)[:, None] * jnp.sum(joint, axis=0)[None, :]
    met, excluded = joint > 0, (joint > 0) & (log_v == -jnp.inf)
    ratio = density_ratio(joint)
    log_v = jnp.where(product > 0, log_v, 0.0)
    log_quotient = jnp.log(jnp.where(met, ratio, 1.0)) - jnp.where(met & ~excluded, log_v, 0.0)
    terms = jnp.where(met, divergence_terms(ratio, jnp.exp(log_v), log_quotient), jnp.exp(log_v))
    return jnp.where(jnp.any(excluded), jnp.inf, jnp.sum(product * terms))
