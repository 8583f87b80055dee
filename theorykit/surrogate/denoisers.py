r"""Denoising of a number given its partner, by the law that a score models: exact by quadrature.

For z = sqrt(g) x + N(0, 1) and a partner y the score denoises by E_s[x|z, y], the posterior mean under P_s(x|y)
proportional to p(x) e^s(x, y). Integrated over all ratios g of signal to noise, the excess is the sufficiency of the
direction x|y: (1/2) int excess(g) dg = S^(x|y).

Source: Verdu (IEEE Trans. Inf. Theory 56, 2010), mismatched estimation.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from theorykit.surrogate.downstream import Loss
from theorykit.surrogate.joint import check_joint, check_score


def denoising(
    joint: Float[Array, "nx ny"],
    score: Float[Array, "nx ny"],
    points: Float[Array, " nx"],
    snr: float | Float[Array, ""],
) -> Loss:
    r"""Denoising of a number x from z = sqrt(g) x + N(0, 1), given y.

    .. math:: excess(g) = E \big( E[x|z, y] - E_s[x|z, y] \big)^2, \qquad
              \frac12 \int_0^\infty excess(g) \, dg = S^{x|y}(s)

    with E_s under P_s(x|y) proportional to p(x) e^s(x, y). At one g, excess <= (D^2 / 2) S^(x|y), D the diameter.

    Parameters
    ----------
    joint, score : (nx, ny)
        P and s.
    points : (nx,)
        Position of every x on the line, pairwise different.
    snr : scalar
        g > 0, the ratio of signal to noise.

    Returns
    -------
    Loss: mean squared errors, in the square of the unit of the points.

    Raises
    ------
    TypeError, ValueError
        As `contrastive_risk`; for positions that repeat or are not finite, and g <= 0.

    Source: Verdu (IEEE Trans. Inf. Theory 56, 2010). The integral over z is by the trapezoid rule.
    """
    _check_denoising("denoising", joint, score, points)
    if not isinstance(snr, jax.core.Tracer) and not 0 < float(snr) < math.inf:
        raise ValueError(f"denoising: snr is {snr}; give a positive number, or use mutual_information for no noise")
    return _denoised(joint, score, points, jnp.asarray(snr, joint.dtype))


def integrated_denoising(
    joint: Float[Array, "nx ny"], score: Float[Array, "nx ny"], points: Float[Array, " nx"]
) -> Float[Array, ""]:
    r"""Excess of denoising integrated over all ratios of signal to noise, (1/2) int_0^inf excess(g) dg.

    It equals S^(x|y), which is sufficiency(joint.T, score.T).

    Parameters
    ----------
    joint, score, points
        As in `denoising`.

    Returns
    -------
    The integral, in nats: g x^2 has no unit.

    Raises
    ------
    TypeError, ValueError
        As `denoising`.
    """
    _check_denoising("integrated_denoising", joint, score, points)
    places = np.sort(np.asarray(points, np.float64))
    spread, closest = places[-1] - places[0], np.min(np.diff(places))
    # In u = ln g: below, excess(g) is at most spread^2, hence the rest at most spread^2 g; above, two points at
    # distance d are told apart up to e^(-g d^2 / 8).
    tail = -math.log(jnp.finfo(joint.dtype).eps)
    low, high = -2 * math.log(spread) - tail, math.log(8 * tail) - 2 * math.log(closest)
    count = math.ceil((high - low) / _STEP) + 1
    ratios = jnp.exp(jnp.asarray(np.linspace(low, high, count), joint.dtype))
    # One after the other: a grid of z for each of hundreds of ratios need not be held at once.
    excess = jax.lax.map(lambda g: _denoised(joint, score, points, g).excess, ratios)
    return jnp.sum(ratios * excess) * (high - low) / (count - 1) / 2


# The trapezoid rule in ln g: over 300 random joints, some with rare symbols, the integral is off by at most 5e-13 of
# its value (with 0.1 by 1e-10).
_STEP = 0.08
# Nodes of z. At the largest g of an integral the signals lie sqrt(8 ln(1/eps)) spread / closest deviations of the noise
# apart (17 in float64 for two points); the rule is exact to rounding while nodes are closer than about half of one.
_NODES = 4096


def _denoised(joint, score, points, g):
    p, q = jnp.sum(joint, axis=1), jnp.sum(joint, axis=0)
    root = jnp.sqrt(g)
    # Beyond nine deviations of the noise the density is 1e-18 of its height. The posterior mean has its poles at a
    # distance pi / (root x spread) from the real line, so the nodes must be closer together the larger the spread is.
    low, high = root * jnp.min(points) - 9, root * jnp.max(points) + 9
    z = low + (high - low) * jnp.arange(_NODES, dtype=points.dtype) / (_NODES - 1)
    log_noise = -((z[:, None] - root * points[None, :]) ** 2) / 2 - math.log(2 * math.pi) / 2  # (nodes, nx)
    truth = jnp.where(joint > 0, jnp.log(jnp.where(joint > 0, joint, 1.0)), -jnp.inf)
    log_p = jnp.where(p > 0, jnp.log(jnp.where(p > 0, p, 1.0)), -jnp.inf)

    def mean(log_prior):  # (nx, ny) -> (nodes, ny)
        weights = jax.nn.softmax(log_noise[:, :, None] + log_prior[None], axis=1)
        return jnp.einsum("zxy,x->zy", weights, points, precision="highest")

    used = q > 0
    best = mean(jnp.where(used[None, :], truth, 0.0))
    model = mean(jnp.where(used[None, :], log_p[:, None] + score, 0.0))
    density = jnp.einsum("zx,xy->zy", jnp.exp(log_noise), joint, precision="highest") * ((high - low) / (_NODES - 1))
    excess = jnp.sum(jnp.where(density > 0, density * (best - model) ** 2, 0.0))
    second = jnp.sum(p * points**2)
    bayes = second - jnp.sum(density * best**2)
    return Loss(bayes + excess, bayes, excess)


def _check_denoising(where, joint, score, points):
    check_joint(joint, where)
    check_score(joint, score, where)
    if points.shape != (joint.shape[0],):
        raise ValueError(f"{where}: points have shape {points.shape}; give one number to each of {joint.shape[0]} x")
    if not isinstance(points, jax.core.Tracer):
        values = np.asarray(points)
        if not np.all(np.isfinite(values)) or len(np.unique(values)) < values.size or values.size < 2:
            raise ValueError(f"{where}: points must be two or more different finite numbers; merge x at equal places")
