r"""InfoNCE of any number of candidates over a finite joint, exactly.

The public names are those of `theorykit.spectral.contrastive`, where the conventions are.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from theorykit.similarity import check_array
from theorykit.spectral._pairs import check_joint

# The trapezoidal rule of `info_nce_risk`: its error is exp(-pi^2 / step) = 7e-18 for an integrand analytic in a strip
# of half-width pi / 2; it starts at e^-40 = 4e-18, below rounding, and ends at e^216.
_STEP, _START, _POINTS = 0.25, -40.0, 1024
_WIDEST = 200.0  # spread of the scores: the integrand vanishes from e^(spread + ln 40) on, before the rule ends


def info_nce_risk(
    joint: Float[Array, "n m"], scores: Float[Array, "n m"], candidates: int | Int[Array, ""]
) -> Float[Array, ""]:
    r"""Exact expected InfoNCE of K candidates, less ln K.

    .. math:: R_K - \ln K = E\Big[-s(a, b) + \ln \frac1K \Big(e^{s(a, b)} + \sum_{j=2}^{K} e^{s(a, b_j)}\Big)\Big]

    (a, b) is a positive pair and the b_j are independent draws of the marginal. This is the mean of `losses.info_nce`
    over batches of K pairs. By ln X = int_0^inf (e^-t - e^{-t X}) dt / t it is one integral for any K.

    Parameters
    ----------
    joint
        Probabilities of positive pairs, (n, m).
    scores
        s, (n, m), in units of the temperature. Those of one anchor may spread over 200 at most.
    candidates
        K >= 1, the positive among them.

    Returns
    -------
    R_K - ln K in nats; as K grows, `info_nce_limit` + O(1/K).

    Raises
    ------
    TypeError, ValueError
        As `normalised_adjacency`; if the scores do not fit, are not finite or spread too far; if K < 1.

    Source
    ------
    van den Oord, Li, Vinyals (arXiv 1807.03748), eq. 4; the integral: derivation.
    """
    where = "info_nce_risk"
    relative, own = _relative_weights(where, joint, scores)
    if not isinstance(candidates, jax.core.Tracer) and candidates < 1:
        raise ValueError(f"{where}: candidates is {candidates}; the positive is one, so give at least 1")
    count, info = jnp.asarray(candidates, joint.dtype), jnp.finfo(joint.dtype)
    grid = _START + _STEP * jnp.arange(_POINTS, dtype=joint.dtype)
    t = jnp.exp(jnp.minimum(grid, np.log(info.max) - 1))  # the integrand vanishes where the dtype ends
    # E e^{-t v / K} = 1 + E (e^{-t v / K} - 1): for large K only the second form keeps its digits.
    exponents = -t[:, None, None] * (relative / count)[None, :, :]
    # As a matrix product: the fused sum has come out wrong in float32 where XLA compiled it for the CPU.
    shortfall = jnp.matmul(jnp.expm1(exponents), own, precision="highest")
    negatives = (count - 1) * jnp.log1p(jnp.maximum(shortfall, info.eps - 1))
    transform = jnp.exp(negatives[:, :, None] + exponents)
    mean_log = _STEP * jnp.sum(jnp.exp(-t)[:, None, None] - transform, axis=0)
    return jnp.sum(joint * (mean_log - jnp.log(relative)))


def info_nce_limit(joint: Float[Array, "n m"], scores: Float[Array, "n m"]) -> Float[Array, ""]:
    r"""InfoNCE less ln K for infinitely many candidates: alignment of positives and uniformity.

    .. math:: \lim_{K \to \infty} (R_K - \ln K) = -E_+ s(a, b) + E_a \ln E_{b'} e^{s(a, b')}

    The logarithm is inside the mean over anchors. Taken outside, as in the uniformity metric of the same source, it
    gives an upper bound.

    Parameters, Raises
    ------------------
    As `info_nce_risk`.

    Returns
    -------
    In nats; at least minus the mutual information of the joint.

    Source
    ------
    Wang, Isola (arXiv 2005.10242), theorem 1.
    """
    relative, _ = _relative_weights("info_nce_limit", joint, scores)
    return -jnp.sum(joint * jnp.log(relative))


def _relative_weights(where, joint, scores):
    """e^s over its mean under the marginal, anchor by anchor, (n, m), and that marginal, (m,)."""
    check_joint(where, joint)
    check_array(where, "scores", scores, like=joint)
    if scores.shape != joint.shape:
        raise ValueError(f"{where}: scores have shape {scores.shape}, joint {joint.shape}; give one for each pair")
    if not isinstance(scores, jax.core.Tracer):
        # In float32 the numbers end first; e^20 is left for the masses and the end of the integrand.
        widest = min(_WIDEST, np.log(float(jnp.finfo(scores.dtype).max)) - 20)
        spread = np.max(np.ptp(np.asarray(scores), axis=1))
        if not spread <= widest:  # also for NaN
            raise ValueError(
                f"{where}: scores of one anchor spread over {spread}; give finite ones, at most {widest:.0f}"
            )
    own = jnp.sum(joint, axis=0)
    log_mean = jax.scipy.special.logsumexp(scores, axis=1, b=own[None, :], keepdims=True)
    return jnp.exp(scores - log_mean), own
