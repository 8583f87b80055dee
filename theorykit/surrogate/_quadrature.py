r"""The contrastive risk of one direction as a sum of one-dimensional integrals, and its gradient in the score.

With w = e^s / c for any c(x) > 0 and S the sum of w over the K candidates, E ln S is an integral of Laplace transforms,

    R = E_P[ln c - s] + sum_x int [ p e^-t - A phi^(K-1) ] du,        t = e^u,
    A(x) = sum_y P(x, y) e^(-t w),     phi(x) = sum_y q(y) e^(-t w),

because ln S = int_0^inf (e^-t - e^-tS) dt/t and the K - 1 negatives are independent. The gradient is that of the
softmax over candidates,

    dR/ds(x, y) = -P + int t w e^(-t w) [ P phi^(K-1) + (K-1) q phi^(K-2) A ] du.

Both by the trapezoid rule in u. As the integral is linear in the law of S, the terms of Poisson's summation formula are
those of one value of S, Gamma(i omega) (1 - S^(-i omega)) at omega = 2 pi k / h. Since |Gamma(i omega)|^2 is
pi / (omega sinh(pi omega)), the error is at most 4 sqrt(h) e^(-pi^2/h), whatever the scores. The step
h = pi^2 / ln(1/eps) makes it 2 eps; for the gradient, where Gamma(1 + i omega) stands instead, 25 eps.

Ends. c = E[sum of e^s | x], so that E S = 1. What lies to the left of u = ln(eps/2) is at most 2 p e^u = eps p. To the
right all is over once t S >= ln(1/eps) for the smallest S, which is at least the w of the positive: far out where
scores are spread. Mostly it is over much earlier, so the loop stops when the rest cannot exceed eps any more. A sum of
many negatives hardly varies: large K takes no more nodes than small K.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.scipy.special import logsumexp

# Nodes in one block: so many that a block is 4 MiB of float64, but no more than 32, about a fifth of all nodes, since
# the loop stops after whole blocks only.
_BLOCK_ENTRIES, _MOST_NODES = 2**19, 32

# Nats that a score may lie below another: 365,000 nodes in float64. A limit there must be, since without one a score
# like -1e30 in place of -inf would keep the loop running for ever.
WIDEST = 1e5


@jax.custom_jvp
def one_sided(joint, score, candidates):
    """R_K(s) where x is given and y is to be found; differentiable in the score."""
    return _integrate(joint, score, candidates, with_gradient=False)[0]


@functools.partial(one_sided.defjvp, symbolic_zeros=True)
def _one_sided_jvp(primals, tangents):
    joint_dot, score_dot, candidates_dot = tangents
    for name, dot in (("joint", joint_dot), ("candidates", candidates_dot)):
        if not isinstance(dot, SymbolicZero):
            raise NotImplementedError(
                f"contrastive risk: no derivative with respect to {name}, only to the score; "
                f"differentiate in the score alone or pass jax.lax.stop_gradient({name})"
            )
    if isinstance(score_dot, SymbolicZero):
        value = one_sided(*primals)
        return value, jnp.zeros_like(value)
    value, gradient = _integrate(*primals, with_gradient=True)
    return value, jnp.sum(gradient * score_dot)


def _integrate(joint, score, candidates, *, with_gradient):
    """The value and, if asked for, the gradient (None otherwise)."""
    p, q, log_w, end = _scaled(joint, score, candidates)
    # Twice what is allowed: ln w is measured from the mean of S, which lies within ln K and ln(1/q) of the best score.
    reachable = end < 2 * WIDEST
    info = jnp.finfo(joint.dtype)
    step = math.pi**2 / math.log(1 / info.eps)
    nodes = max(1, min(_MOST_NODES, _BLOCK_ENTRIES // joint.size))
    offsets = step * jnp.arange(nodes, dtype=joint.dtype)
    # At t w = e^cap the exponential underflows; beyond, an infinite t w would make 0 inf = NaN of the gradient.
    cap = math.log(-math.log(info.tiny))
    negatives = candidates - 1

    def over(state):
        u, level, *_ = state
        # `level` falls along u and bounds the integrand of the value, and its integral that of the gradient.
        return reachable & (u < end) & (level * (end - u + 1) > info.eps)

    def block(state):
        u, _, value, gradient = state
        # One exponential here, products inside: no factor overflows however far out the block lies.
        t_w = jnp.exp(jnp.minimum(log_w + u, cap))[None, :, :] * jnp.exp(offsets)[:, None, None]
        # All as differences from t = 0, where they cancel: there the integrand is small and K - 1 a large factor.
        decay = jnp.expm1(-t_w)
        missing = jnp.einsum("nxy,y->nx", decay, q, precision="highest")  # phi - 1
        log_phi = jnp.log1p(jnp.maximum(missing, info.eps / 2 - 1))
        lost = jnp.einsum("nxy,xy->nx", decay, joint, precision="highest")  # A - p
        log_power = negatives * log_phi
        power = jnp.exp(log_power)
        reference = jnp.expm1(-jnp.exp(u + offsets))[:, None] * p[None, :]  # p e^-t - p
        value = value + jnp.sum(reference - lost * power - p[None, :] * jnp.expm1(log_power))
        remaining = jnp.maximum(p[None, :] + lost, 0.0)  # A
        level = jnp.sum(remaining[-1] * power[-1] + p + reference[-1])
        if with_gradient:
            weight = t_w * jnp.exp(-t_w)
            others = negatives * jnp.exp((candidates - 2) * log_phi) * remaining
            gradient = gradient + joint * jnp.einsum("nxy,nx->xy", weight, power, precision="highest")
            gradient = gradient + q[None, :] * jnp.einsum("nxy,nx->xy", weight, others, precision="highest")
        return u + nodes * step, level, value, gradient

    start = jnp.asarray(math.log(info.eps / 2), joint.dtype)
    state = (start, jnp.ones_like(start), jnp.zeros_like(start), jnp.zeros_like(joint) if with_gradient else None)
    *_, value, gradient = jax.lax.while_loop(over, block, state)
    value = step * value - jnp.sum(jnp.where(joint > 0, joint * log_w, 0.0))
    # One candidate: nothing to find. The integral would return rounding, or infinity minus infinity.
    value = jnp.where(candidates > 1, jnp.where(reachable, value, jnp.nan), 0.0)
    if with_gradient:
        gradient = jnp.where(candidates > 1, jnp.where(reachable, step * gradient - joint, jnp.nan), 0.0)
    return value, gradient


def _scaled(joint, score, candidates):
    """p, q, ln w, and the u beyond which every row is over."""
    p, q = jnp.sum(joint, axis=1), jnp.sum(joint, axis=0)
    score = jnp.where((p > 0)[:, None] & (q > 0)[None, :], score, -jnp.inf)
    conditional = joint / jnp.where(p > 0, p, 1.0)[:, None]
    scale = logsumexp(score, axis=1, b=(candidates - 1) * q[None, :] + conditional)
    # The result does not depend on c, so neither does any derivative. A row without finite scores has none.
    scale = jax.lax.stop_gradient(jnp.where(scale > -jnp.inf, scale, 0.0))
    log_w = score - scale[:, None]
    smallest = jnp.min(jnp.where((joint > 0) & (log_w > -jnp.inf), log_w, jnp.inf))
    return p, q, log_w, jax.lax.stop_gradient(math.log(math.log(1 / jnp.finfo(joint.dtype).eps)) - smallest)
