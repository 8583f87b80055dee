r"""The chain from the contrastive risk L1 of a score to its sufficiency S, with the bounds between them.

S <= C Excess_K is false with C = 1 at any finite K, and with any C that depends on K alone. `ceiling_factor` is a
constant that knows an upper bound of the model only and is of the right order in it. `floor_factor`, which needs a
lower bound too, is the one of earlier derivations and never smaller.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from theorykit.surrogate import risk
from theorykit.surrogate.information_loss import log_model_ratio, sufficiency
from theorykit.surrogate.joint import check_joint, check_score, density_ratio

# An excess was seen to err by up to four roundings of L1; below so many of them its ratio to S has no digit left.
ROUNDINGS = 16


class Chain(NamedTuple):
    """From the contrastive risk to the sufficiency of one score, in nats.

    Parameters
    ----------
    risk, minimum, excess
        L1 = R_K(s), R_K(ln r) and their difference.
    sufficiency, gap
        S and S - excess, the KL divergence between the laws of x and all candidates under P and under the model.
    factor, upper
        C with S <= C excess, infinite for one candidate, and C excess.
    ratio
        S / excess, what C bounds; not-a-number where the excess is lost in the rounding of the two risks, or infinite.
    floor_factor
        T4's constant in place of C, which knows a lower bound of w too and is never smaller.
    """

    risk: Float[Array, ""]
    minimum: Float[Array, ""]
    excess: Float[Array, ""]
    sufficiency: Float[Array, ""]
    gap: Float[Array, ""]
    factor: Float[Array, ""]
    upper: Float[Array, ""]
    ratio: Float[Array, ""]
    floor_factor: Float[Array, ""]


def chain(
    joint: Float[Array, "nx ny"], score: Float[Array, "nx ny"], candidates: risk.Candidates, *, side: risk.Side = "x"
) -> Chain:
    r"""Contrastive risk, its excess, sufficiency, and the bounds between them.

    .. math:: Excess_K \le S \le C \, Excess_K

    with C the `ceiling_factor` at B the largest of r and w where p q > 0. `ratio` is what C bounds. The excess is a
    difference of two risks, so that excess and gap err by some roundings of L1, and the inequalities hold up to them.

    At the edges: one candidate has no risk, so that excess and minimum are 0, gap is S, and factors and upper are
    infinite. A score of -inf where P > 0 makes S and gap infinite, and risk, excess and upper too if K >= 2; gap is so
    because lists of K times that pair have a probability under P and none under the model.

    Parameters
    ----------
    joint, score, candidates, side
        As in `contrastive_risk`, K >= 2 for a ratio. For both sides the larger factors of the two directions count.

    Returns
    -------
    Chain

    Raises
    ------
    TypeError, ValueError
        As `contrastive_risk`.

    Source: derivation (data processing for the lower bound, `ceiling_factor` and `floor_factor` for the upper ones).
    """
    value = risk.contrastive_risk(joint, score, candidates, side=side)
    minimum = risk.minimal_risk(joint, candidates, side=side)
    lost, excess = sufficiency(joint, score, side=side), value - minimum
    directions = [(joint, score), (joint.T, score.T)][: 1 if side == "x" else 2]
    k = jnp.asarray(candidates, joint.dtype)
    both = [_factors(p, s, k) for p, s in directions]
    factor, across = (jnp.max(jnp.stack(each)) for each in zip(*both, strict=True))
    # inf - inf where the score rules out what happens.
    gap = jnp.where(jnp.isinf(lost), jnp.inf, lost - excess)
    upper = jnp.where(jnp.isinf(factor), jnp.inf, factor * jnp.where(jnp.isinf(factor), 0.0, excess))
    seen = jnp.abs(excess) > ROUNDINGS * jnp.finfo(excess.dtype).eps * jnp.abs(value)
    ratio = jnp.where(seen, lost / jnp.where(seen, excess, 1.0), jnp.nan)
    return Chain(value, minimum, excess, lost, gap, factor, upper, ratio, across)


def ceiling_factor(ceiling: Float[Array, ""], candidates: risk.Candidates) -> Float[Array, ""]:
    r"""C(B, K) with S <= C Excess_K for every joint and score with r, w <= B, and every K >= 2.

    .. math:: C = 1 + \frac{2 B - 1}{K - 1}

    No lower bound on w enters. At K = 2 no multiple of B below 2B will do, and the order B/K is right for all K: where
    each x has two y of ratio B and no others, and the score errs a little between them, S / Excess_2 tends to 2B, and
    S / Excess_K to 2B/(K - 1) as B grows. For K much larger than B the excess of C over 1 is twice what the worst known
    scores need.

    Parameters
    ----------
    ceiling : scalar
        B, an upper bound of r and w where p q > 0. At least 1, since both have mean 1.
    candidates : whole number
        K >= 1, may be traced; the factor is infinite at K = 1.

    Returns
    -------
    C >= 1.

    Raises
    ------
    TypeError, ValueError
        If the bound is no JAX scalar or below 1, or K is not a whole number of at least 1.

    Source
    ------
    Derivation. Fix x and draw y_1..y_K from q. Move the model from r to w by w_t = (1 - t) r + t w, and let W be the
    sum of w_t over the candidates. Excess_K = E[sum_i r_i ln(r_i / w_i) - R ln(R / W_1)] / K with R the sum of r. With
    w_t for w, its derivative in t is a sum over pairs i < j, by Lagrange's identity,

        t (w_i r_j - w_j r_i)^2 / (w_ti w_tj W),

    and the derivative of E[r ln(r / w_t)] is likewise half the mean of t c / (w_t1 w_t2) with
    c = (w_1 r_2 - w_2 r_1)^2, as both densities have mean 1. So

        Excess_K = (K - 1)/2 int_0^1 t E[c / (w_t1 w_t2 W)] dt,    S = 1/2 int_0^1 t E[c / (w_t1 w_t2)] dt.

    Given y_1 and y_2, E 1/W >= 1/(w_t1 + w_t2 + K - 2) >= 1/(2B + K - 2) by Jensen's inequality: C. Averaging over x
    changes nothing. Since W grows with K, Excess_K / (K - 1) does not increase with K, whatever r and w.
    """
    _check_bound("ceiling_factor", "ceiling", ceiling)
    return _by_ceiling(ceiling, _count("ceiling_factor", candidates, ceiling.dtype))


def floor_factor(
    ceiling: Float[Array, ""], inverse_floor: Float[Array, ""], candidates: risk.Candidates
) -> Float[Array, ""]:
    r"""C with S <= C Excess_K for every joint and score with r, w <= B and w >= 1/B', and every K >= 2.

    .. math:: C = \min \Big( 1 + \frac{4 B^3 B'}{K}, \; \frac{1}{1 - 2 B B' / K} \text{ if } K > 2 B B' \Big)

    Never smaller than `ceiling_factor`, and loose by orders of magnitude unless r and w are near 1.

    Parameters
    ----------
    ceiling, inverse_floor : scalars
        B and B' where p q > 0; infinite B' gives an infinite factor.
    candidates : whole number
        K >= 1, may be traced; the factor is infinite at K = 1.

    Returns
    -------
    C >= 1.

    Raises
    ------
    TypeError, ValueError
        As `ceiling_factor`.

    Source: derivation (second-order expansion of the KL divergence of mixtures).
    """
    _check_bound("floor_factor", "ceiling", ceiling)
    _check_bound("floor_factor", "inverse_floor", inverse_floor)
    return _by_floor(ceiling, inverse_floor, _count("floor_factor", candidates, ceiling.dtype))


def extremes(joint: Float[Array, "nx ny"], score: Float[Array, "nx ny"]) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """B and B' of a score: the largest of r and w, and the largest of 1/w, where p q > 0.

    Parameters
    ----------
    joint, score : (nx, ny)
        As in `contrastive_risk`.

    Returns
    -------
    B >= 1 and B' >= 1, which is infinite where the score rules a pair out.

    Raises
    ------
    TypeError, ValueError
        As `contrastive_risk`.
    """
    check_joint(joint, "extremes")
    check_score(joint, score, "extremes")
    ratio, w = density_ratio(joint), jnp.exp(log_model_ratio(joint, score))
    seen = (jnp.sum(joint, axis=1) > 0)[:, None] & (jnp.sum(joint, axis=0) > 0)[None, :]
    largest = jnp.max(jnp.where(seen, jnp.maximum(ratio, w), 1.0))
    return largest, 1 / jnp.min(jnp.where(seen, w, 1.0))


def _factors(joint, score, k):
    ceiling, inverse_floor = extremes(joint, score)
    return _by_ceiling(ceiling, k), _by_floor(ceiling, inverse_floor, k)


def _by_ceiling(ceiling, k):
    return 1 + (2 * ceiling - 1) / (k - 1)  # infinite at K = 1, where the excess is 0


def _by_floor(ceiling, inverse_floor, k):
    small = jnp.where(k > 1, 1 + 4 * ceiling**3 * inverse_floor / k, jnp.inf)  # Excess_1 = 0
    enough = (k > 1) & (k > 2 * ceiling * inverse_floor)
    large = 1 / (1 - jnp.where(enough, 2 * ceiling * inverse_floor, 0.0) / k)
    return jnp.where(enough, jnp.minimum(small, large), small)


def _check_bound(where, name, bound):
    if not isinstance(bound, jax.Array):
        raise TypeError(f"{where}: {name} is a {type(bound).__name__}; pass a JAX array, jnp.asarray({name})")
    # B is the largest of variables of mean 1, computed, and may be a few roundings below it.
    if not isinstance(bound, jax.core.Tracer) and not float(bound) >= 1 - math.sqrt(jnp.finfo(bound.dtype).eps):
        raise ValueError(f"{where}: {name} is {bound}; r and w have mean 1, so that B and B' are at least 1")


def _count(where, candidates, dtype):
    if not isinstance(candidates, jax.core.Tracer):
        number = float(candidates)
        if not (number >= 1 and number.is_integer()):
            raise ValueError(f"{where}: candidates is {candidates}; give a whole number of at least 1")
    return jnp.asarray(candidates, dtype)
