"""Stepwise learning: the closed forms against autodiff, against the integrated flow, and in kernel form."""

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from theorykit import losses
from theorykit.spectral import stepwise

N, M, D = 12, 6, 3


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape, jnp.float64)


def orthonormal(seed, rows, columns):
    return jnp.linalg.qr(normal(seed, rows, columns))[0]


def moment_with(eigenvalues, seed=0):
    v = orthonormal(seed, len(eigenvalues), len(eigenvalues))
    return jnp.matmul(v * jnp.asarray(eigenvalues)[None, :], v.T, precision="highest")


def integrate(w0, moment, times):
    """The flow of the weights, (t, d, m), solved to 12 digits."""
    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(lambda t, w, g: stepwise.velocity(w, g)),
        diffrax.Tsit5(),
        0.0,
        times[-1],
        None,
        w0,
        moment,
        saveat=diffrax.SaveAt(ts=times),
        stepsize_controller=diffrax.PIDController(rtol=1e-11, atol=1e-16),
        max_steps=20_000,
    )
    return solution.ys


def test_the_velocity_is_minus_the_gradient_of_the_loss(x64):
    xa, xb, w = normal(1, N, M), normal(2, N, M), normal(3, D, M)
    loss = lambda w: stepwise.moment_loss(xa @ w.T, xb @ w.T)  # noqa: E731
    flow = stepwise.velocity(w, stepwise.cross_moment(xa, xb))
    np.testing.assert_allclose(-jax.grad(loss)(w), flow, rtol=1e-11)


def test_after_normalisation_the_loss_is_barlow_twins_on_swapped_pairs(x64):
    za, zb = normal(1, N, D), normal(2, N, D)
    a, b = jnp.concatenate([za, zb]), jnp.concatenate([zb, za])
    normalise = lambda z: (z - z.mean(0, keepdims=True)) / z.std(0, keepdims=True)  # noqa: E731
    ours = stepwise.moment_loss(normalise(a), normalise(b))
    assert float(ours) == pytest.approx(float(losses.barlow_twins(a, b, redundancy=1.0)), rel=1e-12)


def test_without_swapped_pairs_the_two_losses_differ(x64):
    za, zb = normal(1, N, D), normal(2, N, D)
    normalise = lambda z: (z - z.mean(0, keepdims=True)) / z.std(0, keepdims=True)  # noqa: E731
    ours = stepwise.moment_loss(normalise(za), normalise(zb))
    assert abs(float(ours - losses.barlow_twins(za, zb, redundancy=1.0))) > 1e-3


@pytest.mark.parametrize("g", [1.0, 0.3, 0.0, -0.5])
def test_sizes_solve_the_equation_of_one_mode(x64, g):
    g, s0 = jnp.array([g]), jnp.array([0.2])
    at = lambda t: stepwise.sizes(t[None], g, s0)[0, 0]  # noqa: E731
    for t in (0.0, 0.7, 3.0, 40.0):
        s, slope = jax.jvp(at, (jnp.asarray(t),), (jnp.ones(()),))
        np.testing.assert_allclose(slope, 4 * g[0] * s * (1 - g[0] * s * s), rtol=1e-12, atol=1e-15)
    assert at(jnp.zeros(())) == s0[0]


def test_sizes_stay_finite_at_late_times(x64):
    late = stepwise.sizes(jnp.array([1e6]), jnp.array([2.0, -2.0]), jnp.array([1e-8, 1e-8]))
    np.testing.assert_allclose(late, [[2**-0.5, 0.0]], rtol=1e-15)


@pytest.mark.slow
def test_an_aligned_start_follows_the_closed_form(x64):
    g = jnp.array([1.0, 0.6, 0.55, 0.1, -0.2, -0.3])
    moment = moment_with(g)
    found = stepwise.modes(moment, D)
    np.testing.assert_allclose(found.eigenvalues, g[:D], rtol=1e-13)
    s0 = jnp.array([0.03, 0.2, 0.01])
    w0 = jnp.matmul(orthonormal(5, D, D) * s0[None, :], found.directions.T, precision="highest")
    np.testing.assert_allclose(stepwise.initial_sizes(w0, found.directions), s0, rtol=1e-13)
    times = jnp.array([0.5, 1.0, 2.0, 4.0])
    s = stepwise.sizes(times, found.eigenvalues, s0)
    for w, row in zip(integrate(w0, moment, times), s, strict=True):
        gram = stepwise.weight_gram(found.directions, row)
        np.testing.assert_allclose(w.T @ w, gram, rtol=0, atol=1e-9 * float(jnp.max(jnp.abs(gram))))


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_small_start_learns_separated_modes_at_the_predicted_times(x64, seed):
    """What is left out is of relative order s^(1 - ratio) = 1e-3 in a size, so below 1e-3 / 13 in a time."""
    moment = moment_with([1.0, 0.5, 0.25, -0.1, -0.2, -0.3], seed)
    w0 = 1e-6 * normal(seed + 10, D, M)
    found = stepwise.modes(moment, D)
    s0 = stepwise.initial_sizes(w0, found.directions)
    times = stepwise.learning_times(found.eigenvalues, s0)
    c = jnp.einsum("tdm,mn,ten->tde", *(lambda w: (w, moment, w))(integrate(w0, moment, times)), precision="highest")
    learned = jnp.diagonal(jnp.linalg.eigvalsh(c)[:, ::-1])
    # At its learning time a mode stands at 1/2 with slope 2 g per unit of time.
    early = (learned - 0.5) / (2 * found.eigenvalues * times)
    np.testing.assert_allclose(early, 0, atol=1e-3)


def test_at_its_learning_time_a_mode_has_learned_half(x64):
    g, s0 = jnp.array([1.0, 0.3]), jnp.array([1e-3, 0.5])
    tau = stepwise.learning_times(g, s0)
    learned = g * jnp.diagonal(stepwise.sizes(tau, g, s0)) ** 2
    np.testing.assert_allclose(learned, 1 / (2 - g * s0**2), rtol=1e-12)


def kernel_problem(features):
    """A kernel of all 2 N views, singular if there are fewer features than views, and its features."""
    xa = normal(1, N, features)
    xb = xa + 0.3 * normal(2, N, features)
    phi = jnp.concatenate([xa, xb])
    return jnp.matmul(phi, phi.T, precision="highest"), phi, stepwise.cross_moment(xa, xb)


@pytest.mark.slow
@pytest.mark.parametrize("features", [M, 40])
def test_the_kernel_form_is_the_feature_form(x64, features):
    gram, phi, moment = kernel_problem(features)
    linear, kernel = stepwise.modes(moment, D), stepwise.kernel_modes(gram, D)
    np.testing.assert_allclose(kernel.eigenvalues, linear.eigenvalues, rtol=1e-11)
    np.testing.assert_allclose(jnp.abs(phi.T @ kernel.coefficients), jnp.abs(linear.directions), atol=1e-9)
    w0 = normal(4, D, features)
    from_kernel = stepwise.kernel_initial_sizes(phi @ w0.T, kernel.coefficients)
    np.testing.assert_allclose(from_kernel, stepwise.initial_sizes(w0, linear.directions), rtol=1e-9)
    points = normal(6, 5, features)
    s = linear.eigenvalues**-0.5
    f = stepwise.kernel_embedding(points @ phi.T, kernel.coefficients, s)
    expected = points @ stepwise.weight_gram(linear.directions, s) @ points.T
    np.testing.assert_allclose(f @ f.T, expected, rtol=0, atol=1e-9 * float(jnp.max(jnp.abs(expected))))


def test_kernel_coefficients_invert_the_root_of_the_kernel(x64):
    gram, _, _ = kernel_problem(40)
    found = stepwise.kernel_modes(gram, D)
    np.testing.assert_allclose(found.coefficients.T @ gram @ found.coefficients, np.eye(D), atol=1e-10)


def test_predictions_run_under_jit_and_in_float32():
    xa, xb = (jax.random.normal(jax.random.key(s), (N, M)) for s in (1, 2))

    @jax.jit
    def predict(w0):
        found = stepwise.modes(stepwise.cross_moment(xa, xb), 2)
        return stepwise.learning_times(found.eigenvalues, stepwise.initial_sizes(w0, found.directions))

    tau = predict(1e-3 * jax.random.normal(jax.random.key(3), (2, M)))
    assert tau.dtype == jnp.float32 and np.all(np.isfinite(tau))


def test_modes_that_are_never_learned_are_refused(x64):
    moment = moment_with([1.0, 0.5, -0.1, -0.2])
    with pytest.raises(ValueError, match="ask for at most 2"):
        stepwise.modes(moment, 3)
    with pytest.raises(ValueError, match="leave such modes out"):
        stepwise.learning_times(jnp.array([1.0, -0.1]), jnp.array([0.1, 0.1]))
    antisymmetric_views = jnp.concatenate([normal(1, N, M), -normal(1, N, M)])
    with pytest.raises(ValueError, match="0 positive eigenvalues"):
        stepwise.kernel_modes(antisymmetric_views @ antisymmetric_views.T, 1)


def test_wrong_input_says_what_is_wrong(x64, as_users_run):
    good = moment_with([1.0, 0.5, 0.1])
    bad = (
        (good.at[0, 1].add(1e-3), "not symmetric"),
        (good.at[0, 0].set(jnp.nan), "NaN"),
        (jnp.ones((3, 2)), "square"),
    )
    for matrix, message in bad:
        with pytest.raises(ValueError, match=message):
            stepwise.modes(matrix, 1)
    with pytest.raises(TypeError, match="floating point"):
        stepwise.modes(jnp.eye(3, dtype=jnp.int32), 1)
    with pytest.raises(ValueError, match="k is 4"):
        stepwise.modes(good, 4)
    with pytest.raises(ValueError, match="odd number"):
        stepwise.kernel_modes(good, 1)
    with pytest.raises(ValueError, match="positive semidefinite kernel"):
        stepwise.kernel_modes(moment_with([1.0, 0.5, 0.1, -0.2]), 1)
    with pytest.raises(ValueError, match="3 modes for 2 outputs"):
        stepwise.initial_sizes(jnp.ones((2, 3)), jnp.eye(3))
    with pytest.raises(ValueError, match="3 modes for 2 outputs"):
        stepwise.kernel_initial_sizes(jnp.ones((4, 2)), jnp.ones((4, 3)))
    with pytest.raises(ValueError, match="shape"):
        stepwise.cross_moment(jnp.ones((3, 2)), jnp.ones((4, 2)))
