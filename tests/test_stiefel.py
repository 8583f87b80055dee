"""Descent on the Stiefel manifold: the geometry of its steps, where it ends, and how it says so."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from hypothesis import given, settings
from hypothesis import strategies as st

from theorykit.spectral import compare, stiefel

M, K = 12, 3  # one shape for most tests, so that each program is compiled once
retractions = pytest.mark.parametrize("retraction", stiefel.RETRACTIONS)
# Bottom three well apart from the rest; both signs, so that a loss bounded by 0 would not do.
INDEFINITE = np.r_[-2.0, -1.5, -1.0, np.linspace(-0.2, 2.0, M - 3)]


def point(seed=0, m=M, k=K, dtype=None):
    return jnp.asarray(np.linalg.qr(np.random.default_rng(seed).standard_normal((m, k)))[0], dtype)


def matrix(seed=1, m=M, k=K, dtype=None):
    return jnp.asarray(np.random.default_rng(seed).standard_normal((m, k)), dtype)


def with_spectrum(spectrum, seed=2, dtype=None):
    """Symmetric matrix with these eigenvalues, ascending, and its eigenvectors."""
    vectors = np.linalg.qr(np.random.default_rng(seed).standard_normal((len(spectrum), len(spectrum))))[0]
    return jnp.asarray((vectors * spectrum) @ vectors.T, dtype), jnp.asarray(vectors, dtype)


def quadratic(w, c):
    return jnp.trace(jnp.matmul(w.T, jnp.matmul(c, w, precision="highest"), precision="highest"))


def along(w, c):
    return {"w": w}


def descend(c, w0, **options):
    options = {"steps": 300, "learning_rate": 0.1} | options
    return stiefel.stiefel_descent(quadratic, w0, None, c, **options)


def distance(w, u):
    return float(compare.projector_distance(w, u))


# ---------------------------------------------------------------- geometry


def test_projection_is_tangent_and_what_it_removes_is_normal_to_every_tangent(x64):
    w, g, other = point(), matrix(1), stiefel.project_tangent(point(), matrix(3))
    x = stiefel.project_tangent(w, g)
    np.testing.assert_allclose(w.T @ x + x.T @ w, 0, atol=1e-14)
    np.testing.assert_allclose(stiefel.project_tangent(w, x), x, atol=1e-14)
    np.testing.assert_allclose(jnp.sum((g - x) * other), 0, atol=1e-13)


@retractions
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_retractions_keep_orthonormality_to_rounding_over_a_thousand_steps(x64, retraction, dtype):
    retract = stiefel.RETRACTIONS[retraction]
    keys = jax.random.split(jax.random.key(0), 1000)

    def step(w, key):
        x = stiefel.project_tangent(w, jax.random.normal(key, w.shape, w.dtype))
        w = retract(w, x)
        return w, jnp.max(jnp.abs(w.T @ w - jnp.eye(K, dtype=w.dtype)))

    w, error = jax.jit(lambda w: jax.lax.scan(step, w, keys))(point(dtype=dtype))
    assert w.dtype == dtype
    # An inner product of M rounded entries is off by a few eps; nothing may grow with the number of steps.
    assert float(jnp.max(error)) < 8 * jnp.finfo(w.dtype).eps
    assert float(jnp.mean(error[-100:])) < 2 * float(jnp.mean(error[:100])) + jnp.finfo(w.dtype).eps


@retractions
def test_a_step_of_zero_stays_and_the_velocity_is_the_tangent(x64, retraction):
    retract, w = stiefel.RETRACTIONS[retraction], point()
    x = stiefel.project_tangent(w, matrix())
    np.testing.assert_allclose(retract(w, 0 * x), w, atol=1e-15)
    t = 1e-6
    # Central difference: rounding eps / t = 2e-10, truncation t^2.
    np.testing.assert_allclose((retract(w, t * x) - retract(w, -t * x)) / (2 * t), x, atol=1e-8)


def exponential(w, x):
    """exp(A) W with the skew-symmetric A of the module's docstring: the geodesic of the canonical metric."""
    w, x = np.asarray(w), np.asarray(x)
    p = np.eye(M) - w @ w.T / 2
    return scipy.linalg.expm(p @ x @ w.T - w @ x.T @ p) @ w


def order_of_the_error(error):
    """Exponent in t of error(t), from one halving at a small t."""
    return np.log2(error(2e-3) / error(1e-3))


@pytest.mark.parametrize(("retraction", "order"), [("qr", 2), ("cayley", 3)])
def test_retractions_agree_with_the_exponential_map_to_their_order(x64, retraction, order):
    retract, w = stiefel.RETRACTIONS[retraction], point()
    x = stiefel.project_tangent(w, matrix())
    found = order_of_the_error(lambda t: np.linalg.norm(retract(w, t * x) - exponential(w, t * x)))
    assert found == pytest.approx(order, abs=0.05)  # the next order enters by a share of t |X| = 1%


@retractions
def test_as_subspaces_both_retractions_agree_with_the_geodesic_to_second_order(x64, retraction):
    """For X = (I - W W^T) G the span of both moves by arctan-like functions of t, which differ from t at t^3."""
    retract, w = stiefel.RETRACTIONS[retraction], point()
    x = matrix() - w @ (w.T @ matrix())
    found = order_of_the_error(lambda t: distance(retract(w, t * x), jnp.asarray(exponential(w, t * x))))
    assert found == pytest.approx(3, abs=0.05)


def test_grassmann_distance_is_the_length_of_the_geodesic_and_blind_to_the_basis(x64):
    w = point()
    x = matrix() - w @ (w.T @ matrix())
    x = 0.7 * x / jnp.linalg.norm(x)  # no angle beyond pi/2, where the geodesic stops being the shortest
    end = jnp.asarray(exponential(w, x))
    assert float(stiefel.grassmann_distance(w, end)) == pytest.approx(0.7, rel=1e-12)
    turned = end @ jnp.asarray(scipy.stats.ortho_group.rvs(K, random_state=0))
    assert float(stiefel.grassmann_distance(turned, w)) == pytest.approx(0.7, rel=1e-12)


# ---------------------------------------------------------------- where it ends


@pytest.mark.slow
@retractions
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("shift", [0.0, 3.0])
def test_the_trace_is_minimised_by_the_bottom_eigenspace(x64, retraction, dtype, shift):
    """Indefinite and positive C; |sin Theta|_F <= |C W - W (W^T C W)|_F / gap, and the gradient is twice that."""
    c, vectors = with_spectrum(INDEFINITE + shift, dtype=dtype)
    run = descend(c, point(dtype=dtype), retraction=retraction)
    gap, eps = INDEFINITE[3] - INDEFINITE[2], float(jnp.finfo(dtype).eps)
    assert run.w.dtype == dtype and int(run.status) in (stiefel.FINISHED, stiefel.CONVERGED)
    # Rounding of C W, about sqrt(M) eps |C|, is a residual too.
    room = 16 * eps * float(jnp.max(jnp.abs(INDEFINITE + shift)))
    assert distance(run.w, vectors[:, :K]) <= (float(run.gradient_norm) / 2 + room) / gap
    assert float(run.gradient_norm) < 100 * eps  # 300 steps shrink the slowest mode by (1 - 0.2 x 0.8)^300 = 2e-23
    assert float(run.loss) == pytest.approx(np.sum(INDEFINITE[:3] + shift), rel=16 * eps)


def test_a_closed_gap_leaves_the_value_but_not_the_subspace(x64):
    """Control of the test above: with eigenvalues 3 and 4 equal the minimum is reached on a whole family."""
    spectrum = INDEFINITE.copy()
    spectrum[3] = spectrum[2]
    c, vectors = with_spectrum(spectrum)
    run = descend(c, point())
    assert float(run.loss) == pytest.approx(np.sum(spectrum[:3]), rel=1e-12)
    assert distance(run.w, vectors[:, :K]) > 0.1


def test_the_result_depends_on_the_span_alone(x64):
    c, _ = with_spectrum(INDEFINITE)
    turn = jnp.asarray(scipy.stats.ortho_group.rvs(K, random_state=0))
    runs = [descend(c, w0, steps=10) for w0 in (point(), point() @ turn)]
    assert distance(runs[0].w, runs[1].w) < 1e-13
    np.testing.assert_allclose(runs[0].losses, runs[1].losses, rtol=1e-12)


def test_matrix_and_parameters_are_trained_together(x64):
    """min over W and theta of Tr(W^T (C + theta B) W) + theta^2: theta = -Tr(W^T B W) / 2, W at the bottom there."""
    c, _ = with_spectrum(INDEFINITE)
    b, _ = with_spectrum(np.linspace(-0.3, 0.3, M), seed=5)

    def loss(w, params, data):
        return quadratic(w, data[0] + params["theta"] * data[1]) + params["theta"] ** 2

    run = stiefel.stiefel_descent(loss, point(), {"theta": jnp.zeros(())}, (c, b), steps=400, learning_rate=0.1)
    theta = run.params["theta"]
    assert float(theta) == pytest.approx(-0.5 * float(quadratic(run.w, b)), rel=1e-10) and abs(float(theta)) > 1e-3
    bottom = jnp.linalg.eigh(c + theta * b)[1][:, :K]
    assert distance(run.w, bottom) < 1e-10
    assert distance(run.w, jnp.linalg.eigh(c)[1][:, :K]) > 1e-3


# ---------------------------------------------------------------- step control


@cache
def problem():
    return with_spectrum(INDEFINITE)


@settings(max_examples=15, deadline=None, database=None, derandomize=True)
@given(exponent=st.floats(-3, 4), seed=st.integers(0, 99))
@retractions
def test_the_loss_never_rises_above_rounding_at_any_learning_rate(retraction, exponent, seed):
    with jax.enable_x64(True):
        c, _ = problem()
        run = descend(c, point(seed), retraction=retraction, steps=30, learning_rate=10.0**exponent)
        losses = np.r_[run.losses, run.loss]
        losses = losses[np.isfinite(losses)]
        lowest = np.minimum.accumulate(losses)
        assert np.all(losses[1:] <= lowest[:-1] + 64 * np.finfo(float).eps * np.max(np.abs(losses)))
        assert np.max(run.rates) <= 10.0**exponent


def test_a_learning_rate_that_plain_descent_cannot_use_still_converges(x64):
    c, vectors = with_spectrum(INDEFINITE)
    rate, w = 20.0, point()
    for _ in range(300):
        w = stiefel.retract_qr(w, -rate * stiefel.project_tangent(w, 2 * c @ w))
    assert distance(w, vectors[:, :K]) > 0.1
    # How fast depends on where backtracking leads, which rounding decides; where it ends does not.
    run = descend(c, point(), learning_rate=rate, steps=3000, tolerance=1e-11)
    assert int(run.status) == stiefel.CONVERGED
    # Davis and Kahan: ||sin Theta|| <= ||C W - W (W^T C W)|| / gap, and the gradient is twice that residual.
    assert distance(run.w, vectors[:, :K]) < float(run.gradient_norm) / (INDEFINITE[K] - INDEFINITE[K - 1])
    assert float(jnp.min(run.rates)) < rate


@retractions
def test_below_the_stated_rate_it_is_plain_descent_and_time_is_rate_times_steps(x64, retraction):
    c, _ = with_spectrum(INDEFINITE)
    rate, w = 0.9 / (INDEFINITE[-1] - INDEFINITE[0]), point()
    losses = []
    for _ in range(20):
        losses.append(quadratic(w, c))
        w = stiefel.RETRACTIONS[retraction](w, -rate * stiefel.project_tangent(w, 2 * c @ w))
    run = descend(c, point(), retraction=retraction, steps=20, learning_rate=rate)
    np.testing.assert_allclose(run.w, w, atol=1e-12)
    np.testing.assert_allclose(run.losses, losses, rtol=1e-12)
    np.testing.assert_allclose(run.rates, rate, rtol=1e-15)


def test_a_run_ends_as_converged_where_the_gradient_is_small(x64):
    c, vectors = with_spectrum(INDEFINITE)
    run = descend(c, point(), tolerance=1e-6)
    assert int(run.status) == stiefel.CONVERGED and 0 < int(run.steps) < 300
    assert float(run.gradient_norm) <= 1e-6
    assert np.isnan(run.losses[int(run.steps) :]).all() and np.isfinite(run.losses[: int(run.steps)]).all()
    assert not np.any(run.rates[int(run.steps) :])
    assert "converged" in run.describe()
    saddle = descend(c, vectors[:, 3:6], tolerance=1e-9)
    assert int(saddle.status) == stiefel.CONVERGED and int(saddle.steps) == 0


@jax.custom_vjp
def uphill(w):
    return jnp.sum(w[0])


uphill.defvjp(lambda w: (uphill(w), w), lambda w, g: (-g * jnp.zeros_like(w).at[0].set(1),))


def test_a_gradient_of_another_function_ends_as_stalled(x64):
    run = stiefel.stiefel_descent(uphill, point(), steps=5, learning_rate=0.1)
    assert int(run.status) == stiefel.STALLED and int(run.steps) == 0
    np.testing.assert_array_equal(run.w, point())
    assert "may not be the loss's own" in run.describe()


def cliff(w, params):
    """Falls towards theta = 1, beyond which it is not a number."""
    return jnp.sum(w[0] ** 2) - params + jnp.where(params < 1, 0, jnp.nan)


def test_values_that_are_not_finite_are_never_entered(x64):
    run = stiefel.stiefel_descent(cliff, point(), jnp.zeros(()), steps=100, learning_rate=0.4)
    assert int(run.status) == stiefel.NOT_FINITE
    assert float(run.params) < 1 and np.isfinite(run.loss) and np.isfinite(run.w).all()
    start = stiefel.stiefel_descent(cliff, point(), jnp.ones(()), steps=3, learning_rate=0.4)
    assert int(start.status) == stiefel.NOT_FINITE and int(start.steps) == 0
    np.testing.assert_array_equal(start.w, point())


def runaway(w, params):
    return jnp.sum(w[0] ** 2) - jnp.sum(params**2)


def test_an_unbounded_loss_stops_before_it_overflows():
    run = stiefel.stiefel_descent(
        runaway, point(dtype="float32"), jnp.ones(2, jnp.float32), steps=500, learning_rate=1.0
    )
    assert int(run.status) == stiefel.NOT_FINITE and 0 < int(run.steps) < 500
    assert np.isfinite(run.params).all() and float(run.loss) < -1e30


# ---------------------------------------------------------------- metrics and transformations


def angle(w, data):
    return {"distance": stiefel.grassmann_distance(w, data[1]), "loss": quadratic(w, data[0])}


def with_target(w, data):
    return quadratic(w, data[0])


def test_metrics_are_measured_along_the_way_and_say_at_which_update(x64):
    c, vectors = with_spectrum(INDEFINITE)
    at = [0, 3, 10, 200, 300]
    options = {"steps": 300, "learning_rate": 0.1, "metrics": angle, "metric_steps": at}
    run = stiefel.stiefel_descent(with_target, point(), None, (c, vectors[:, :K]), **options)
    np.testing.assert_array_equal(run.metric_steps, at)
    np.testing.assert_allclose(run.metric_times, 0.1 * np.array(at), rtol=1e-12)
    np.testing.assert_allclose(run.metrics["loss"][:4], run.losses[jnp.asarray(at[:4])], rtol=1e-12)
    assert float(run.metrics["distance"][0]) == pytest.approx(
        float(stiefel.grassmann_distance(point(), vectors[:, :K])), rel=1e-12
    )
    assert np.all(np.diff(run.metrics["distance"][1:4]) < 0) and float(run.metrics["distance"][-1]) < 1e-10
    early = stiefel.stiefel_descent(with_target, point(), None, (c, vectors[:, :K]), tolerance=1e-3, **options)
    assert int(early.metric_steps[-1]) == int(early.steps) < 200
    np.testing.assert_allclose(early.metrics["loss"][-1], early.loss, rtol=1e-14)


def test_mapped_compiled_and_plain_runs_agree(x64):
    cs = jnp.stack([with_spectrum(INDEFINITE, seed=s)[0] for s in (2, 3)])
    starts = jnp.stack([point(s) for s in (0, 1)])
    rates = jnp.asarray([0.1, 7.0])

    def one(c, w0, rate):
        return descend(c, w0, learning_rate=rate, steps=20)

    mapped = jax.jit(jax.vmap(one))(cs, starts, rates)
    for i in range(2):
        alone = one(cs[i], starts[i], rates[i])
        np.testing.assert_allclose(mapped.w[i], alone.w, atol=1e-11)
        np.testing.assert_allclose(mapped.losses[i], alone.losses, rtol=1e-11)


def test_another_rate_start_or_matrix_compiles_nothing_new():
    def run(seed, rate, at):
        c, _ = with_spectrum(INDEFINITE, seed=seed, dtype="float32")
        w0 = point(seed, dtype="float32")
        found = stiefel.stiefel_descent(
            quadratic, w0, None, c, steps=4, learning_rate=rate, metrics=along, metric_steps=at
        )
        return jax.block_until_ready(found)

    run(0, 0.1, [0, 2])
    compiled = stiefel._descend._cache_size()
    run(1, 0.3, [1, 4])
    assert stiefel._descend._cache_size() == compiled


@pytest.mark.slow
def test_no_steps_and_a_square_matrix_are_defined(x64):
    run = descend(problem()[0], point(), steps=0)
    assert int(run.status) == stiefel.FINISHED and run.losses.shape == (0,)
    np.testing.assert_array_equal(run.w, point())
    # On the whole orthogonal group the trace is constant: the gradient is zero to rounding.
    whole = descend(problem()[0], point(k=M), steps=3, tolerance=1e-12)
    assert int(whole.status) == stiefel.CONVERGED


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"w0": np.ones((M, K))}, ValueError, "orthonormal_basis"),
        ({"w0": np.eye(K, M)}, ValueError, "1 <= k <= m"),
        ({"w0": np.ones(M)}, ValueError, "1 <= k <= m"),
        ({"w0": np.full((M, K), np.nan)}, ValueError, "not finite"),
        ({"w0": np.eye(M, K, dtype=int)}, TypeError, "floating-point"),
        ({"params": np.float32(0)}, TypeError, "one floating-point dtype"),
        ({"params": {"theta": np.array(np.inf)}}, ValueError, "theta"),
        ({"retraction": "polar"}, ValueError, "cayley"),
        ({"steps": -1}, ValueError, "0 or more"),
        ({"steps": 1.5}, TypeError, "integer"),
        ({"learning_rate": 0.0}, ValueError, "positive finite"),
        ({"learning_rate": np.inf}, ValueError, "positive finite"),
        ({"tolerance": -1.0}, ValueError, "tolerance"),
        ({"metrics": along}, ValueError, "go together"),
        ({"metric_steps": [1]}, ValueError, "go together"),
        ({"metrics": along, "metric_steps": [2, 1]}, ValueError, "increase"),
        ({"metrics": along, "metric_steps": [9]}, ValueError, "0..3"),
        ({"loss": lambda w: w}, ValueError, "scalar"),
        ({"loss": lambda w: jnp.sum(w).astype("float32")}, TypeError, "one dtype"),
        ({"loss": {"not": "hashable"}}, TypeError, "hashed"),
    ],
)
def test_bad_input_is_refused_with_the_remedy(x64, as_users_run, changes, error, message):
    def trace(w, *_):
        return jnp.sum(w[0])

    given = {"loss": trace, "w0": np.eye(M, K), "params": None, "steps": 3, "learning_rate": 0.1} | changes
    with pytest.raises(error, match=message):
        stiefel.stiefel_descent(given.pop("loss"), given.pop("w0"), given.pop("params"), **given)
