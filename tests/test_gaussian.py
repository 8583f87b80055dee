"""Gaussian limits of InfoNCE and CLIP: against integration, against Monte Carlo, and optima against descent."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from theorykit import data, losses
from theorykit.spectral import gaussian


def near(a, b):
    return -jnp.sum((a - b) ** 2) / 2


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape, jnp.float64)


def covariance(seed, size):
    q = jnp.linalg.qr(normal(seed, size, size))[0]
    return (q * jnp.linspace(0.5, 2, size)[None, :]) @ q.T


def root(cov):
    values, vectors = jnp.linalg.eigh(cov)
    return (vectors * jnp.sqrt(values)[None, :]) @ vectors.T


def problem(correlations, seed=0):
    """Covariance and half-difference covariance of two alike views with these correlations; they do not commute."""
    sigma = covariance(seed, len(correlations))
    q = jnp.linalg.qr(normal(seed + 1, *sigma.shape))[0]
    return sigma, root(sigma) @ (q * (1 - jnp.asarray(correlations))[None, :]) @ q.T @ root(sigma)


# Standard normals by the trapezoidal rule, exact to rounding for smooth integrands that vanish at the ends.
GRID = np.linspace(-14, 14, 1401)
WEIGHTS = np.exp(-(GRID**2) / 2) / np.sqrt(2 * np.pi) * (GRID[1] - GRID[0])


def partition(score):
    """E_x ln E_y e^score(x, y) for independent standard normals, by integration."""
    return WEIGHTS @ np.log(np.exp(score(GRID[:, None], GRID[None, :])) @ WEIGHTS)


@pytest.mark.parametrize("u", [0.1, 1.0, 2.0])
def test_the_limit_of_info_nce_is_the_integral(x64, u):
    scale, correlation = np.sqrt(u), 0.3
    integral = partition(lambda x, y: -(scale**2) * (x - y) ** 2 / 2) + u * (1 - correlation)
    w, one = jnp.full((1, 1), scale), jnp.ones((1, 1))
    assert float(gaussian.info_nce_limit(w, one, (1 - correlation) * one)) == pytest.approx(integral, rel=1e-11)


@pytest.mark.parametrize("m", [0.1, 0.5, 0.9])
def test_the_limit_of_clip_is_the_integral_in_both_directions(x64, m):
    integral = partition(lambda x, y: m * x * y) - m * 0.3
    one = jnp.ones((1, 1))
    assert float(gaussian.clip_limit(m * one, one, one, 0.3 * one)) == pytest.approx(integral, rel=1e-11)


@pytest.mark.slow
def test_at_the_info_nce_optimum_the_gradient_vanishes_without_commuting(x64):
    sigma, half = problem([0.8, 0.5, 0.2, -0.3])
    assert float(jnp.max(jnp.abs(sigma @ half - half @ sigma))) > 0.05
    best = gaussian.info_nce_optimum(sigma, half, 4)
    assert np.all(best.strengths[:3] > 0) and best.strengths[3] == 0
    w = jnp.sqrt(best.strengths)[:, None] * best.directions.T
    value, slope = jax.value_and_grad(gaussian.info_nce_limit)(w, sigma, half)
    np.testing.assert_allclose(slope, 0, atol=1e-12)
    assert float(value) == pytest.approx(float(best.loss), rel=1e-12)
    np.testing.assert_allclose(w.T @ w, best.gram, atol=1e-13)


@pytest.mark.slow
def test_no_other_encoder_is_better_than_the_info_nce_optimum(x64):
    sigma, half = problem([0.8, 0.5, 0.2, -0.3])
    best = gaussian.info_nce_optimum(sigma, half, 2)
    others = jax.vmap(lambda w: gaussian.info_nce_limit(w, sigma, half))(normal(5, 2000, 2, 4))
    assert float(jnp.min(others)) > float(best.loss)
    np.testing.assert_allclose(best.ratios, [0.2, 0.5], rtol=1e-12)


def test_strengths_collapse_from_ratio_one_on(x64):
    u = gaussian.info_nce_strengths(jnp.array([0.01, 0.5, 0.999, 1.0, 1.5]))
    assert np.all(np.diff(u[:4]) < 0) and np.all(u[3:] == 0)
    y = 1 / (1 + u[:3])
    np.testing.assert_allclose(y * y + y, 2 * jnp.array([0.01, 0.5, 0.999]), rtol=1e-13)
    assert float(gaussian.info_nce_strengths(jnp.array([1e-9]))[0]) == pytest.approx(1 / 2e-9, rel=1e-8)


def test_the_loss_of_a_small_mode_has_the_quartic_coefficient_three_quarters(x64):
    one, r, u = jnp.ones((1, 1)), 0.7, 1e-3
    loss = gaussian.info_nce_limit(jnp.full((1, 1), np.sqrt(u)), one, r * one)
    # The next term of the series is -(2/3) u^3.
    assert float((loss + (1 - r) * u) / u**2) == pytest.approx(0.75 - 2 / 3 * u, abs=2 * u**2)


@pytest.mark.slow
def test_the_clip_optimum_is_the_truncated_whitened_cross_covariance(x64):
    cov_a, cov_b = covariance(1, 4), covariance(2, 3)
    rho = jnp.array([0.8, 0.5, 0.2])
    cross = data.cross_from_correlations(jax.random.key(3), rho, 4, 3)
    cross = root(cov_a) @ cross @ root(cov_b)
    full = gaussian.clip_optimum(cov_a, cov_b, cross, 3)
    np.testing.assert_allclose(full.correlations, rho, rtol=1e-12)
    np.testing.assert_allclose(full.score, jnp.linalg.solve(cov_a, cross) @ jnp.linalg.inv(cov_b), atol=1e-12)
    best = gaussian.clip_optimum(cov_a, cov_b, cross, 2)
    np.testing.assert_allclose(best.a_weights.T @ cov_a @ best.a_weights, np.eye(2), atol=1e-12)
    np.testing.assert_allclose(best.b_weights.T @ cov_b @ best.b_weights, np.eye(2), atol=1e-12)
    assert float(gaussian.clip_limit(best.score, cov_a, cov_b, cross)) == pytest.approx(float(best.loss), rel=1e-12)
    low_rank = normal(5, 2000, 4, 2) @ normal(6, 2000, 2, 3) / 3
    others = jax.vmap(lambda m: gaussian.clip_limit(m, cov_a, cov_b, cross))(low_rank)
    assert float(jnp.min(others)) > float(best.loss) == pytest.approx(-(0.64 + 0.25) / 2, rel=1e-12)


def expectation_of_ratios(score, correlation):
    """E[e^{s(x, y)} / mu(x)] - 1 - (E[e^{2 s} / mu^2] - 1) / 2 in one dimension, by integration."""
    x, y = GRID[:, None], GRID[None, :]
    mu = np.exp(score(x, y)) @ WEIGHTS
    joint = np.exp(-(x**2 - 2 * correlation * x * y + y**2) / (2 * (1 - correlation**2)))
    joint *= (GRID[1] - GRID[0]) ** 2 / (2 * np.pi * np.sqrt(1 - correlation**2))
    partner = np.sum(joint * np.exp(score(x, y)) / mu[:, None])
    return partner - 1 - (WEIGHTS @ (np.exp(2 * score(x, y)) @ WEIGHTS / mu**2) - 1) / 2


def test_the_corrections_are_the_integrals(x64):
    for u, rho in itertools.product((0.3, 2.0), (0.5, -0.4)):
        integral = expectation_of_ratios(lambda x, y, u=u: -u * (x - y) ** 2 / 2, rho)
        closed = gaussian.info_nce_correction(jnp.array([u]), jnp.array([1 - rho]))
        assert float(closed) == pytest.approx(integral, rel=1e-9)
    for m, rho in itertools.product((0.2, 0.4), (0.5, -0.4)):
        integral = expectation_of_ratios(lambda x, y, m=m: m * x * y, rho)
        closed = gaussian.clip_correction(jnp.array([m]), jnp.array([rho]))
        assert float(closed) == pytest.approx(integral, rel=1e-9)


@pytest.mark.parametrize("kind", ["info_nce", "clip"])
def test_with_many_candidates_the_loss_is_the_limit_plus_its_correction(kind):
    """64 batches of 256 candidates: the standard error is about 2e-3, the correction about 5e-3, its rest 1e-4."""
    candidates, rho = 256, jnp.array([0.6, 0.3])
    pairs = data.gaussian_pairs(jax.random.key(1), 64 * candidates, cross=jnp.diag(rho))
    a, b = (z.reshape(64, candidates, 2) for z in (pairs.a, pairs.b))
    if kind == "clip":
        m = jnp.array([0.5, 0.4])
        measured = jax.vmap(lambda a, b: losses.clip(a * m[None, :], b, similarity=losses.dot))(a, b)
        limit = gaussian.clip_limit(jnp.diag(m), jnp.eye(2), jnp.eye(2), jnp.diag(rho))
        correction = gaussian.clip_correction(m, rho)
    else:
        u = jnp.array([1.5, 0.7])
        w = jnp.sqrt(u)[None, :]
        measured = jax.vmap(lambda a, b: losses.info_nce(a * w, b * w, similarity=near))(a, b)
        limit = gaussian.info_nce_limit(jnp.diag(w[0]), jnp.eye(2), jnp.diag(1 - rho))
        correction = gaussian.info_nce_correction(u, 1 - rho)
    error = float(jnp.std(measured)) / 8
    predicted = float(np.log(candidates) + limit + correction / candidates)
    assert float(jnp.mean(measured)) == pytest.approx(predicted, abs=4 * error)
    assert error < 0.01


def test_at_the_shifted_optimum_the_slope_is_of_second_order(x64):
    """The slope of L + A / K there falls by four as K doubles; without the shift it would fall by two."""
    rho = jnp.array([0.5, 0.3])
    best = gaussian.info_nce_strengths(1 - rho)
    modes = lambda u: gaussian.info_nce_limit(jnp.diag(jnp.sqrt(u)), jnp.eye(2), jnp.diag(1 - rho))  # noqa: E731
    cases = (
        (lambda m, k: jnp.sum(m * m) / 2 - m @ rho + gaussian.clip_correction(m, rho) / k, rho, gaussian.clip_shift),
        (lambda u, k: modes(u) + gaussian.info_nce_correction(u, 1 - rho) / k, best, gaussian.info_nce_shift),
    )
    for value, start, shift in cases:
        slope = jax.jit(jax.grad(value))
        step = shift(rho if start is rho else 1 - rho)
        ratio = slope(start + step / 1e3, 1e3) / slope(start + step / 2e3, 2e3)
        np.testing.assert_allclose(ratio, 4, rtol=0.02)
        np.testing.assert_allclose(slope(start, 1e3) / slope(start, 2e3), 2, rtol=1e-9)


def test_strong_correlations_have_no_correction_of_order_one_over_k(x64):
    assert float(gaussian.clip_correction(jnp.array([0.71]), jnp.array([0.5]))) == -np.inf
    with pytest.raises(ValueError, match="measure it instead"):
        gaussian.clip_shift(jnp.array([0.8, 0.1]))


def test_wrong_input_says_what_is_wrong(x64, as_users_run):
    eye = jnp.eye(3)
    with pytest.raises(ValueError, match="singular or not positive"):
        gaussian.clip_optimum(eye.at[0, 0].set(0.0), eye, eye / 2, 1)
    with pytest.raises(ValueError, match="singular or not positive"):
        gaussian.info_nce_optimum(-eye, eye, 1)
    with pytest.raises(ValueError, match="k is 4"):
        gaussian.clip_optimum(eye, eye, eye / 2, 4)
    with pytest.raises(ValueError, match="cross-covariance has shape"):
        gaussian.clip_optimum(eye, jnp.eye(2), eye, 1)
    with pytest.raises(ValueError, match="both for one x"):
        gaussian.info_nce_optimum(eye, jnp.eye(2), 1)
    with pytest.raises(ValueError, match="not symmetric"):
        gaussian.info_nce_optimum(eye, eye.at[0, 1].set(0.5), 1)
    with pytest.raises(ValueError, match="add noise"):
        gaussian.info_nce_optimum(eye, jnp.diag(jnp.array([0.0, 1.0, 1.0])), 1)
    with pytest.raises(ValueError, match="add noise"):
        gaussian.info_nce_strengths(jnp.array([0.5, -0.1]))
