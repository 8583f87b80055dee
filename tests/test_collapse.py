"""Dimensional collapse: the drift against autodiff, frozen flows against integration, conserved quantities."""

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from theorykit import losses
from theorykit.spectral import collapse

N, M, D, H = 9, 5, 4, 6


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape, jnp.float64)


def views(noise=1.0):
    xa = normal(1, N, M)
    return xa, xa + noise * normal(2, N, M)


def drift_at(w, xa, xb):
    return collapse.drift_matrix(xa, xb, collapse.softmax_weights(xa @ w.T, xb @ w.T))


def integrate(velocity, start, times):
    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(lambda t, y, args: velocity(y)),
        diffrax.Tsit5(),
        0.0,
        times[-1],
        None,
        start,
        saveat=diffrax.SaveAt(ts=times),
        stepsize_controller=diffrax.PIDController(rtol=1e-12, atol=1e-14),
        max_steps=20_000,
    )
    return solution.ys


def symmetric(seed, eigenvalues):
    q = jnp.linalg.qr(normal(seed, len(eigenvalues), len(eigenvalues)))[0]
    return (q * eigenvalues[None, :]) @ q.T, q


@pytest.mark.slow
@pytest.mark.parametrize("scale", [0.01, 1.0, 3.0])
def test_the_drift_is_minus_the_gradient_of_the_loss(x64, scale):
    (xa, xb), w = views(), scale * normal(3, D, M)
    gradient = jax.grad(lambda w: collapse.squared_distance_loss(xa @ w.T, xb @ w.T))(w)
    flow = w @ drift_at(w, xa, xb)
    np.testing.assert_allclose(-gradient, flow, rtol=0, atol=1e-12 * float(jnp.max(jnp.abs(flow))))


def test_the_loss_is_info_nce_of_each_anchor_with_the_other_anchors(x64):
    za, zb = views()
    near = lambda a, b: -jnp.sum((a - b) ** 2) / 2  # noqa: E731
    each = [
        losses.info_nce(za[i : i + 1], zb[i : i + 1], similarity=near, negatives=jnp.delete(za, i, axis=0))
        for i in range(N)
    ]
    assert float(collapse.squared_distance_loss(za, zb)) == pytest.approx(float(jnp.mean(jnp.array(each))), rel=1e-13)


def test_weights_are_probabilities_and_uniform_for_equal_embeddings(x64):
    np.testing.assert_allclose(jnp.sum(collapse.softmax_weights(*views()), axis=1), np.ones(N), rtol=1e-14)
    np.testing.assert_allclose(collapse.softmax_weights(jnp.zeros((N, D)), jnp.zeros((N, D))), 1 / N, rtol=1e-15)


def test_the_drift_at_zero_is_twice_the_covariance_minus_the_augmentation(x64):
    xa, xb = views()
    drift = collapse.drift_matrix(xa, xb, jnp.full((N, N), 1 / N))
    moved = xb - xa
    expected = 2 * np.cov(np.asarray(xa).T, bias=True) - (1 - 1 / N) * np.asarray(moved.T @ moved) / N
    np.testing.assert_allclose(drift, expected, atol=1e-13)


def test_the_drift_is_the_double_sum(x64):
    xa, xb = (np.asarray(x) for x in views())
    alpha = np.asarray(collapse.softmax_weights(*views()))
    total = np.zeros((M, M))
    for i in range(N):
        total -= (1 - alpha[i, i]) * np.outer(xb[i] - xa[i], xb[i] - xa[i])
        for j in set(range(N)) - {i}:
            total += alpha[i, j] * np.outer(xa[i] - xa[j], xa[i] - xa[j])
    np.testing.assert_allclose(collapse.drift_matrix(*views(), jnp.asarray(alpha)), total / N, atol=1e-13)


@pytest.mark.slow
def test_a_frozen_drift_gives_the_matrix_exponential(x64):
    drift, _ = symmetric(1, jnp.array([1.0, 0.2, 0.0, -0.5, -2.0]))
    w0, times = normal(2, D, M), jnp.array([0.3, 1.0, 2.0])
    np.testing.assert_allclose(
        collapse.frozen_flow(w0, drift, times), integrate(lambda w: w @ drift, w0, times), atol=1e-10
    )


def test_negative_eigenvalues_are_as_many_vanishing_singular_values(x64):
    drift, _ = symmetric(1, jnp.array([1.0, 0.2, 0.1, -1.0, -2.0]))
    late = jnp.linalg.svd(collapse.frozen_flow(normal(2, M, M), drift, jnp.array([20.0]))[0], compute_uv=False)
    assert int(jnp.sum(late < 1e-6)) == 2


def test_two_layers_follow_the_gradient_of_the_product(x64):
    (xa, xb), w1, w2 = views(), normal(3, H, M) / 3, normal(4, D, H) / 3
    value = lambda w1, w2: collapse.squared_distance_loss(xa @ w1.T @ w2.T, xb @ w1.T @ w2.T)  # noqa: E731
    g1, g2 = jax.grad(value, argnums=(0, 1))(w1, w2)
    v1, v2 = collapse.two_layer_velocity(w1, w2, drift_at(w2 @ w1, xa, xb))
    np.testing.assert_allclose(v1, -g1, atol=1e-13)
    np.testing.assert_allclose(v2, -g2, atol=1e-13)


def test_the_flow_conserves_the_difference_of_the_layers_while_the_drift_moves(x64):
    xa, xb = views()
    start = (normal(3, H, M) / 3, normal(4, D, H) / 3)
    flow = lambda y: collapse.two_layer_velocity(*y, drift_at(y[1] @ y[0], xa, xb))  # noqa: E731
    w1, w2 = integrate(flow, start, jnp.array([1.0, 4.0]))
    for t in range(2):
        np.testing.assert_allclose(collapse.conserved(w1[t], w2[t]), collapse.conserved(*start), atol=1e-10)
    assert float(jnp.max(jnp.abs(w1[1] - start[0]))) > 0.1


@pytest.mark.slow
def test_aligned_layers_follow_their_closed_form(x64):
    eigenvalues = jnp.array([0.3, 0.2, -0.5, -1.0])
    drift, v = symmetric(1, eigenvalues)
    s1, s2 = jnp.array([0.5, 0.3, 0.8, 0.4]), jnp.array([0.2, 0.3, 0.5, 0.4])  # the second and last with c = 0
    shared, left = jnp.linalg.qr(normal(2, H, 4))[0], jnp.linalg.qr(normal(3, 4, 4))[0]
    start = ((shared * s1[None, :]) @ v.T, (left * s2[None, :]) @ shared.T)
    times = jnp.array([0.5, 2.0, 6.0])
    w1, w2 = integrate(lambda y: collapse.two_layer_velocity(*y, drift), start, times)
    first, second = collapse.two_layer_modes(times, eigenvalues, s1, s2)
    np.testing.assert_allclose(jnp.einsum("hk,thm,mk->tk", shared, w1, v), first, rtol=1e-9)
    np.testing.assert_allclose(jnp.einsum("dk,tdh,hk->tk", left, w2, shared), second, rtol=1e-9)
    constant = jnp.broadcast_to((s1**2 - s2**2)[None, :], first.shape)
    np.testing.assert_allclose(first**2 - second**2, constant, atol=1e-12)


def test_of_two_layers_only_the_smaller_factor_vanishes(x64):
    first, second = collapse.two_layer_modes(jnp.array([1e4]), jnp.array([-1.0]), jnp.array([0.5]), jnp.array([0.3]))
    assert float(first[0, 0]) == pytest.approx(0.4, rel=1e-12)
    assert float(second[0, 0]) < 1e-12


def test_a_growing_frozen_mode_ends_in_finite_time(x64):
    first, _ = collapse.two_layer_modes(
        jnp.array([0.9, 1.1]) / (2 * 0.25), jnp.array([1.0]), jnp.array([0.5]), jnp.array([0.5])
    )
    assert np.isfinite(first[0, 0]) and np.isnan(first[1, 0])


def test_wrong_input_says_what_is_wrong(x64, as_users_run):
    xa, xb = views()
    with pytest.raises(ValueError, match="weights have shape"):
        collapse.drift_matrix(xa, xb, jnp.ones((N, N + 1)))
    with pytest.raises(ValueError, match="at least 2"):
        collapse.squared_distance_loss(xa[:1], xb[:1])
    with pytest.raises(ValueError, match="not symmetric"):
        collapse.frozen_flow(jnp.ones((2, 2)), jnp.array([[1.0, 2.0], [0.0, 1.0]]), jnp.ones(1))
