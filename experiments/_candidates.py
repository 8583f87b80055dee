r"""InfoNCE and CLIP on Gaussian views with K candidates, exactly: by integration instead of sampling, and their optima.

The loss is E ln X - E s(x, y), where X is e^{s(x, y)} plus K - 1 terms e^{s(x, y')}, which are independent given x.
With ln X = int (e^-t - e^{-tX}) dt / t and t = e^tau / K,

    loss - ln K = int [e^{-e^tau} - E_x psi phi^{K-1}] d tau - E s,
    phi = E_{y'} exp(-e^{tau + s(x, y')} / K),   psi = E_{y|x} exp(-e^{tau + s(x, y)} / K).

All integrals use the trapezoidal rule. Halving all steps changes no optimum used here by more than 5e-6, and those at
large K, whose distance from the limit is measured, by less than 1e-4 of that distance.

Also the limits of infinitely many candidates, -E s + E ln E e^s, by the same rule and in closed form.
"""

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize

from theorykit.spectral import gaussian

TAU = np.arange(-36.0, 14.0, 0.35)  # e^-36 is rounding
STEP = 0.5
NORMAL = np.arange(-17, 18) * STEP
WEIGHT = np.exp(-(NORMAL**2) / 2) / np.sqrt(2 * np.pi) * STEP
# Integrands are even in every coordinate of x.
HALF, HALF_WEIGHT = NORMAL[17:], np.concatenate([WEIGHT[17:18], 2 * WEIGHT[18:]])


def _mean_log(negative, positive, weight, log_candidates):
    """E ln(X / K) for scores (x, normal) of negatives and partners, x with `weight` (x,)."""

    def laplace(scores):
        shifted = TAU[:, None, None] - log_candidates + scores[None]
        return jnp.sum(jnp.exp(-jnp.exp(shifted)) * WEIGHT, axis=2)

    # phi^(K - 1), through the logarithm of a phi that may be zero to rounding.
    power = jnp.exp(jnp.expm1(log_candidates) * jnp.log(jnp.maximum(laplace(negative), 1e-300)))
    inside = jnp.exp(-jnp.exp(TAU)) - jnp.sum(laplace(positive) * power * weight, axis=1)
    return jnp.sum(inside) * (TAU[1] - TAU[0])


@jax.jit
def clip_loss(weights, correlations, log_candidates):
    """CLIP minus ln K for scores sum_i m_i u_i v_i of canonical pairs, one or two (k,); given u they are Gaussian."""
    modes = len(weights)
    u = np.stack(np.meshgrid(*[HALF] * modes, indexing="ij"), axis=-1).reshape(-1, modes)
    weight = np.prod(np.meshgrid(*[HALF_WEIGHT] * modes, indexing="ij"), axis=0).reshape(-1)
    # The square root of a sum that is zero at u = 0 has no derivative there.
    spread = lambda squares: jnp.sqrt(squares @ u.T**2 + 1e-30)  # noqa: E731
    negative = spread(weights**2)[:, None] * NORMAL
    mean = (u**2 @ (weights * correlations))[:, None]
    positive = mean + spread(weights**2 * (1 - correlations**2))[:, None] * NORMAL
    return _mean_log(negative, positive, weight, log_candidates) - weights @ correlations


@jax.jit
def info_nce_loss(strengths, correlations, log_candidates):
    """InfoNCE minus ln K with s = -|z - z'|^2 / 2 for one mode, z of variance u; both arguments (1,)."""
    x = HALF[:, None]
    partner = correlations * x + jnp.sqrt(1 - correlations**2) * NORMAL
    score = lambda y: -strengths * (x - y) ** 2 / 2  # noqa: E731
    mean = _mean_log(score(NORMAL), score(partner), HALF_WEIGHT, log_candidates)
    return mean + jnp.sum(strengths * (1 - correlations))


_SLOPES = {loss: jax.jit(jax.grad(loss)) for loss in (clip_loss, info_nce_loss)}


def optimum(loss, start, correlations, candidates):
    """Parameters (k,) at which the exact loss with K candidates is stationary, found from those of the limit."""
    slope = lambda p: _SLOPES[loss](p, np.asarray(correlations), np.log(float(candidates)))  # noqa: E731
    found = scipy.optimize.root(slope, np.asarray(start), tol=1e-9)
    return found.x if found.success else np.full_like(found.x, np.nan)


def limits():
    """Limits of one mode by integration, for Gaussian and for two-valued latents, and in closed form."""
    rho, sizes = 0.3, np.array([0.2, 0.5, 0.8, 1.1])
    grid = np.linspace(-14, 14, 1401)  # the trapezoidal rule is exact to rounding for these integrands
    density = np.exp(-(grid**2) / 2) / np.sqrt(2 * np.pi) * (grid[1] - grid[0])
    latents = {"gaussian": (grid, density), "other": (np.array([-1.0, 1.0]), np.array([0.5, 0.5]))}
    scores = {"clip": lambda m, x, y: m * x * y, "info_nce": lambda u, x, y: -u * (x - y) ** 2 / 2}
    partner = {"clip": lambda m: m * rho, "info_nce": lambda u: -u * (1 - rho)}  # E s(x, x+)
    one = jnp.ones((1, 1))
    closed = {
        "clip": lambda m: gaussian.clip_limit(m * one, one, one, rho * one),
        "info_nce": lambda u: gaussian.info_nce_limit(np.sqrt(u) * one, one, (1 - rho) * one),
    }
    found = {}
    for kind, score in scores.items():
        for name, (points, weights) in latents.items():
            logs = [np.log(np.exp(score(m, points[:, None], points)) @ weights) @ weights for m in sizes]
            found[f"integral/{kind}/{name}"] = np.array(logs) - [partner[kind](m) for m in sizes]
        found[f"integral/{kind}/closed"] = np.array([closed[kind](m) for m in sizes])
    return found


def two_modes():
    """InfoNCE's loss minus ln K for two modes whose Sigma and C do not commute, by integration; (problems,).

    At the closed-form optimum, at the one for c_i / sigma_i along the axes of Sigma, and what the closed form says.
    """
    rng, best_of = np.random.default_rng(46), jax.jit(gaussian.info_nce_optimum, static_argnums=2)
    normal = np.stack(np.meshgrid(NORMAL, NORMAL, indexing="ij"), axis=-1).reshape(-1, 2)
    density = np.outer(WEIGHT, WEIGHT).ravel()
    found = {"optimum": [], "commuting": [], "closed": []}
    for _ in range(4):
        axes, inner = np.linalg.qr(rng.standard_normal((2, 2, 2)))[0]
        root = axes * np.sqrt(rng.uniform(0.5, 2, 2))
        # Ratios r from 0.3: strengths to 1.4. For larger ones e^s is too narrow for the step of the rule.
        half = root @ inner * rng.uniform(0.3, 0.8, 2) @ (root @ inner).T
        best = best_of(jnp.asarray(root @ root.T), jnp.asarray(half), 2)
        sigma, c = np.sum(root**2, axis=0), np.diagonal(axes.T @ half @ axes)
        u = np.asarray(gaussian.info_nce_strengths(jnp.asarray(c / sigma)))
        for name, gram in (("optimum", np.asarray(best.gram)), ("commuting", axes * (u / sigma) @ axes.T)):
            z = normal @ root.T @ np.linalg.cholesky(gram)
            squares = np.sum(z**2, axis=1)
            scores = z @ z.T - (squares[:, None] + squares) / 2
            found[name].append(np.log(np.exp(scores) @ density) @ density + np.sum(gram * half))
        found["closed"].append(best.loss)
    return {f"two modes/{name}": np.array(values) for name, values in found.items()}
