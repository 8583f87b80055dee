"""The exponential growth of quadratic losses: against direct eigenvalues, the matrix exponential and the flow."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from theorykit.losses import linear
from theorykit.ntk.gradient_flow import flow_stacked
from theorykit.ntk.growth_rate import growth

TRIPLETS, Z = 3, 2
N = 3 * TRIPLETS  # anchors, positives, negatives


def triplet_loss(f):
    return linear(*jnp.split(f, 3))


def problem(parameters=40):
    """Return a full kernel at N points (singular if it has fewer parameters than N Z) and embeddings."""
    j = jax.random.normal(jax.random.key(1), (N, Z, parameters), jnp.float64) / parameters**0.5
    kernel = jnp.einsum("iou,jpu->ijop", j, j, precision="highest")
    return kernel, jax.random.normal(jax.random.key(2), (N, Z), jnp.float64)


def generator(kernel, loss=triplet_loss):
    """-K A as a matrix, formed directly."""
    matrix = np.asarray(kernel).transpose(0, 2, 1, 3).reshape(N * Z, N * Z)
    return -matrix @ np.asarray(jax.hessian(loss)(jnp.zeros((N, Z)))).reshape(N * Z, N * Z)


def distortion(kernel):
    """sqrt(cond K): the largest ratio between the Euclidean norm and that of K^-1."""
    return np.linalg.cond(np.asarray(kernel).transpose(0, 2, 1, 3).reshape(N * Z, N * Z)) ** 0.5


@pytest.mark.slow
@pytest.mark.parametrize("parameters", [40, 10])
def test_the_spectrum_is_that_of_the_unsymmetric_product(x64, parameters):
    kernel, f0 = problem(parameters)
    found = growth(kernel, triplet_loss, f0)
    direct = np.linalg.eigvals(generator(kernel))
    # With a singular kernel the eigenvalue 0 can be defective: found directly, it moves by the root of the rounding.
    rounding = N * Z * np.finfo(float).eps
    loose = np.linalg.norm(generator(kernel), 2) * (
        distortion(kernel) * rounding if parameters > N * Z else rounding**0.5
    )
    np.testing.assert_allclose(np.sort(direct.real), found.spectrum, rtol=0, atol=loose)
    np.testing.assert_allclose(direct.imag, 0, atol=loose)
    assert found.rate == found.spectrum[-1] > 0 and found.dimension == 1
    assert found.gap == pytest.approx(found.spectrum[-1] - found.spectrum[-2], rel=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("parameters", [40, 10])
def test_rate_and_projection_are_the_limit_of_the_linear_flow(x64, parameters):
    kernel, f0 = problem(parameters)
    found = growth(kernel, triplet_loss, f0)
    t = 36 / found.gap  # exp(-36) = 2e-16: the other eigenvectors are lost in rounding
    late = scipy.linalg.expm((generator(kernel) - found.rate * np.eye(N * Z)) * t) @ np.asarray(f0).reshape(-1)
    assert np.linalg.norm(late) == pytest.approx(found.projection, rel=1e-8)


@pytest.mark.slow
def test_the_flow_grows_at_the_rate(x64):
    kernel, f0 = problem()
    found = growth(kernel, triplet_loss, f0)
    times = np.array([12.0, 16.0]) / found.gap
    path = flow_stacked(kernel, triplet_loss, f0, times, rtol=1e-9)
    norms = np.linalg.norm(np.asarray(path.f).reshape(2, -1), axis=1)
    measured = np.diff(np.log(norms))[0] / np.diff(times)[0]
    # In the norm of K^-1 the flow is that of a symmetric matrix, so the other eigenvectors have fallen to exp(-12).
    left_over = np.exp(-12) * distortion(kernel) * np.linalg.norm(f0) / found.projection
    assert left_over < 1e-2
    assert measured == pytest.approx(found.rate, abs=2 * left_over / np.diff(times)[0])
    np.testing.assert_allclose(norms, found.projection * np.exp(found.rate * times), rtol=left_over)


@pytest.mark.slow
def test_only_the_leading_part_of_the_start_counts(x64):
    kernel, f0 = problem()
    found = growth(kernel, triplet_loss, f0)
    values, right = np.linalg.eig(generator(kernel))
    other = right[:, np.argsort(values.real)[-3]].real.reshape(N, Z)
    moved = growth(kernel, triplet_loss, f0 + 5 * jnp.asarray(other))
    assert moved.projection == pytest.approx(found.projection, rel=1e-10)
    assert growth(kernel, triplet_loss, 3 * f0).projection == pytest.approx(3 * found.projection, rel=1e-12)


@pytest.mark.slow
def test_gradient_descent_grows_at_the_discrete_rate(x64):
    kernel, f0 = problem()
    found = growth(kernel, triplet_loss, f0)
    learning_rate, steps = 0.2, 10
    power = np.linalg.matrix_power(np.eye(N * Z) + learning_rate * generator(kernel), steps)
    largest = np.max(np.linalg.eigvals(power).real)
    rate = found.discrete_rate(learning_rate)
    assert np.log(largest) == pytest.approx(rate * learning_rate * steps, rel=1e-10)
    assert rate < found.rate == pytest.approx(found.discrete_rate(1e-9), rel=1e-8)


def test_a_kernel_times_the_identity_grows_in_every_output_at_once(x64):
    kernel, f0 = problem()
    numbers = kernel[..., 0, 0]
    found = growth(numbers, triplet_loss, f0)
    full = growth(numbers[:, :, None, None] * jnp.eye(Z)[None, None], triplet_loss, f0)
    assert found.dimension == full.dimension == Z
    assert found.rate == pytest.approx(full.rate, rel=1e-12)
    assert found.projection == pytest.approx(full.projection, rel=1e-10)
    # The outputs do not interact: the squared projections of the single outputs add up.
    single = [growth(numbers, lambda f: triplet_loss(f), f0[:, [o]]).projection for o in range(Z)]
    assert found.projection == pytest.approx(np.hypot(*single), rel=1e-10)


def test_a_wider_tolerance_takes_a_group_of_eigenvalues(x64):
    # A kernel that is nearly the same in all outputs, as at large width.
    kernel, f0 = problem()
    near = kernel[..., :1, :1] * jnp.diag(jnp.array([1.0, 0.99]))[None, None]
    alone, group = (growth(near, triplet_loss, f0, rtol=rtol) for rtol in (None, 0.02))
    assert (alone.dimension, group.dimension) == (1, 2)
    assert group.gap > alone.gap and alone.rate == group.rate
    outputs = [growth(near[..., o, o], triplet_loss, f0[:, [o]]).projection for o in range(Z)]
    assert alone.projection == pytest.approx(outputs[0], rel=1e-8)
    assert group.projection == pytest.approx(np.hypot(*outputs), rel=1e-8)


def test_a_bounded_loss_has_a_negative_rate(x64):
    kernel, f0 = problem()
    found = growth(kernel, lambda f: jnp.sum(f**2), f0)
    assert found.rate < 0 < found.projection


def test_a_rate_of_zero_has_no_projection(x64):
    kernel, f0 = problem(parameters=10)
    found = growth(kernel, lambda f: jnp.sum(f**2), f0)
    assert found.rate == pytest.approx(0, abs=1e-12) and np.isnan(found.projection)


def test_equal_eigenvalues_leave_no_gap(x64):
    found = growth(jnp.eye(2), lambda f: -jnp.sum(f**2) / 2, jnp.ones((2, 1)))
    assert found.gap == np.inf and found.dimension == 2
    assert found.rate == pytest.approx(1) and found.projection == pytest.approx(2**0.5)


def test_float32_input_agrees_to_its_rounding(x64):
    kernel, f0 = problem()
    found = growth(kernel, triplet_loss, f0)
    single = growth(kernel.astype(jnp.float32), triplet_loss, f0.astype(jnp.float32))
    eps = float(np.finfo(np.float32).eps)
    # Rounding the entries of K and of A moves -F^T A F by at most 2 N Z eps |K| |A|, its eigenvalues by no more, its
    # eigenvectors by that over the gap; F and its inverse distort the projection by sqrt(cond K).
    norm = np.linalg.norm(np.asarray(kernel).transpose(0, 2, 1, 3).reshape(N * Z, N * Z), 2)
    shift = 2 * N * Z * eps * norm * np.linalg.norm(jax.hessian(triplet_loss)(f0).reshape(N * Z, N * Z), 2)
    assert single.rate == pytest.approx(found.rate, abs=shift)
    turned = 2 * shift / found.gap * distortion(kernel) * np.linalg.norm(f0)
    assert turned < 0.1 * found.projection
    assert single.projection == pytest.approx(found.projection, abs=turned)


@pytest.mark.parametrize(
    "loss",
    [
        lambda f: jnp.sum(f**4),
        lambda f: jnp.sum(f**2) + jnp.sum(f),
        lambda f: jnp.sum(f**4) / jnp.sum(f**2),  # homogeneous of degree two, and still not quadratic
        lambda f: jnp.sum(f),
    ],
    ids=["quartic", "linear term", "homogeneous", "linear"],
)
def test_a_loss_that_is_no_quadratic_form_is_refused(x64, loss):
    with pytest.raises(ValueError, match="not a quadratic form"):
        growth(*problem()[:1], loss, problem()[1])


def test_kernels_that_are_none_are_refused(x64):
    kernel, f0 = problem()
    with pytest.raises(ValueError, match="positive semidefinite"):
        growth(-kernel, triplet_loss, f0)
    with pytest.raises(ValueError, match="not symmetric"):
        growth(kernel.at[0, 1].add(1.0), triplet_loss, f0)
    with pytest.raises(ValueError, match="kernel has shape"):
        growth(kernel[:-1], triplet_loss, f0)
    with pytest.raises(ValueError, match="kernel holds NaN"):
        growth(kernel * jnp.nan, triplet_loss, f0)
