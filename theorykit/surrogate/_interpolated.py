r"""The bound between NWJ and InfoNCE on a finite joint, for any number of candidates, by one-dimensional integrals.

With S = (alpha/K) sum_j e^s(x, Y_j) + 1 - alpha over K candidates, of which the first is the partner of x or not,

    bound = 1 + E_P s - E_+ ln S - E_- [ e^s(X, Y_1) / S ],
    ln S = int [ e^-t - e^(-t S) ] du,      1/S = int t e^(-t S) du,      t = e^u,

and the mean of e^(-t S) factorises over the candidates. Both integrals by the trapezoid rule in u, whose error is at
most 25 eps at the step pi^2 / ln(1/eps), see `_quadrature`.

Ends. What lies to the left of t E[S] = eps is of the size of eps. As x e^(-t a x) <= 1/(e t a), the rest of the second
integral from T on is below K e^(-(1 - alpha) T) / alpha^2, so that (1 - alpha) T = ln(K/eps) plus a few is enough.

Range. The grid begins at the inverse of the largest e^s times eps and e^-4. If its first node is a normal number, then
e^s <= eps e^-4 / tiny is far below the largest number, since tiny times that is about 4. Products t e^s that underflow
belong to other candidates and change S t by less than tiny; those that overflow have e^(-t e^s) = 0, as they should.
"""

import math

import jax
import jax.numpy as jnp

# 140 nats in float64, of which 40 are taken by the ends for equal scores; a loop over nodes needs a number of them.
_NODES = 512
# e^-4 covers the constants that the ends leave out.
_BEYOND = 4.0


def widest_step(dtype):
    """Step at which the trapezoid rule is exact to rounding."""
    return math.pi**2 / -math.log(jnp.finfo(dtype).eps)


def step_of(largest_score, candidates, weight, dtype):
    """Nodes begin here, and their distance; numpy or JAX scalars alike."""
    eps = float(jnp.finfo(dtype).eps)
    low = math.log(eps) - _BEYOND - jnp.maximum(largest_score, 0.0)
    high = jnp.log(_BEYOND - math.log(eps) + jnp.log(candidates)) - math.log1p(-weight)
    return low, (high - low) / _NODES


def fits(low, step, dtype):
    """Whether the nodes are close enough, and all of them normal numbers: both roundings of `low` and the half step by
    which the first node lies above it are on the safe side."""
    return (step <= widest_step(dtype)) & (low >= math.log(jnp.finfo(dtype).tiny))


def between(joint, score, candidates, weight):
    """The bound, for K in the dtype of the joint and a Python weight alpha below 1; NaN where the scores do not fit."""
    p, q = jnp.sum(joint, axis=1), jnp.sum(joint, axis=0)
    seen = (p > 0)[:, None] & (q > 0)[None, :]
    score = jnp.where(seen, score, -jnp.inf)
    low, step = step_of(jnp.max(score), candidates, weight, joint.dtype)
    ratio = jnp.exp(score)
    share = ratio * (weight / candidates)
    floor, product = 1 - weight, p[:, None] * q[None, :]

    def add(node, sums):
        t = jnp.exp(low + step * (node.astype(joint.dtype) + 0.5))
        decay = jnp.exp(-t * share)
        # Near 1 for small t: its logarithm keeps its digits, which the power multiplies by K. The sum may round
        # to less than -1.
        log_phi = jnp.log1p(jnp.maximum(jnp.sum(q[None, :] * jnp.expm1(-t * share), axis=1), -1.0))
        rest = jnp.exp(jnp.where(candidates > 1, (candidates - 1) * log_phi, 0.0) - t * floor)
        logarithm = jnp.sum(p * jnp.exp(-t) - rest * jnp.sum(joint * decay, axis=1))
        inverse = t * jnp.sum(rest * jnp.sum(product * ratio * decay, axis=1))
        return sums[0] + logarithm, sums[1] + inverse

    zero = jnp.zeros((), joint.dtype)
    log_total, weights = jax.lax.fori_loop(0, _NODES, add, (zero, zero))
    met = joint > 0
    positive = jnp.sum(jnp.where(met, joint * jnp.where(met, score, 0.0), 0.0))
    value = 1 + positive - step * (log_total + weights)
    return jnp.where(fits(low, step, joint.dtype), value, jnp.nan)
