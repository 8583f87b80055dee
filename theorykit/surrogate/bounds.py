"""The chain from the contrastive risk L1 of a score to its sufficiency S, with the bounds between them."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from theorykit.surrogate import risk
from theorykit.surrogate.information_loss import log_model_ratio, sufficiency
from theorykit.surrogate.joint import density_ratio


class Chain(NamedTuple):
    """From the contrastive risk to the sufficiency of one score, in nats.

    Parameters
    ----------
    risk, minimum, excess
        L1 = R_K(s), R_K(ln r) and their difference.
    sufficiency, gap
        S and S - excess, the KL divergence between the laws of x and all candidates under P and under the model.
    factor, upper
        C with S <= C excess, infinite where no bound on r and w gives one, and C excess.
    ratio
        S / excess, what C bounds; not-a-number where both are 0.
    """

    risk: Float[Array, ""]
    minimum: Float[Array, ""]
    excess: Float[Array, ""]
    sufficiency: Float[Array, ""]
    gap: Float[Array, ""]
    factor: Float[Array, ""]
    upper: Float[Array, ""]
    ratio: Float[Array, ""]


def chain(
    joint: Float[Array, "nx ny"], score: Float[Array, "nx ny"], candidates: risk.Candidates, *, side: risk.Side = "x"
) -> Chain:
    r"""Contrastive risk, its excess, sufficiency, and the bounds between them.

    .. math:: Excess_K \le S \le C \, Excess_K, \qquad
              C = \min \Big( 1 + \frac{4 B^3 B'}{K}, \; \frac{1}{1 - 2 B B' / K} \text{ if } K > 2 B B' \Big)

    with B the largest of r and w and B' the largest of 1/w where p q > 0. C is loose by orders of magnitude; `ratio` is
    what it bounds.

    Parameters
    ----------
    joint, score, candidates, side
        As in `contrastive_risk`, K >= 2 for a ratio. For both sides the larger factor of the two directions counts.

    Returns
    -------
    Chain

    Raises
    ------
    TypeError, ValueError
        As `contrastive_risk`.

    Source: derivation (data processing for the lower bound; second-order expansion of the KL divergence of mixtures
    for the upper one).
    """
    value = risk.contrastive_risk(joint, score, candidates, side=side)
    minimum = risk.minimal_risk(joint, candidates, side=side)
    lost, excess = sufficiency(joint, score, side=side), value - minimum
    directions = [(joint, score), (joint.T, score.T)][: 1 if side == "x" else 2]
    factor = jnp.max(jnp.stack([_factor(p, s, candidates) for p, s in directions]))
    return Chain(value, minimum, excess, lost, lost - excess, factor, factor * excess, lost / excess)


def _factor(joint, score, candidates):
    seen = (jnp.sum(joint, axis=1) > 0)[:, None] & (jnp.sum(joint, axis=0) > 0)[None, :]
    w = jnp.exp(log_model_ratio(joint, score))
    largest = jnp.max(jnp.where(seen, jnp.maximum(density_ratio(joint), w), 0.0))
    inverse = 1 / jnp.min(jnp.where(seen, w, jnp.inf))
    k = jnp.asarray(candidates, joint.dtype)
    small = 1 + 4 * largest**3 * inverse / k
    enough = k > 2 * largest * inverse
    large = 1 / (1 - 2 * largest * inverse / jnp.where(enough, k, jnp.inf))
    return jnp.where(enough, jnp.minimum(small, large), small)
