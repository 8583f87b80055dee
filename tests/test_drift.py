"""Drift of the kernel: what must be zero is zero, and the numbers are those of a plain loop."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from theorykit import losses, training
from theorykit.encoders import MLP
from theorykit.ntk import drift, empirical_ntk, kernel_drift, relative_change


def points(*shape, seed=0, dtype=None):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def setting(encoder, loss=losses.info_nce, dtype=jnp.float64, n=6):
    """Keyword arguments of kernel_drift."""
    xa, xb = points(n, 3, dtype=dtype), points(n, 3, seed=1, dtype=dtype)
    params = encoder.init(jax.random.key(0), xa)
    objective = training.objective(encoder.apply, loss)
    return {"apply": encoder.apply, "objective": objective, "params": params, "data": (xa, xb), "points": xa[:4]}


def test_relative_change_is_a_relative_distance(x64):
    k0, kt = points(3, 4, 2, 2), points(3, 4, 2, 2, seed=1)
    naive = np.sqrt(np.sum((np.asarray(kt) - np.asarray(k0)) ** 2)) / np.sqrt(np.sum(np.asarray(k0) ** 2))
    change = float(relative_change(kt, k0))
    np.testing.assert_allclose(change, naive, rtol=1e-14)
    assert float(relative_change(k0, k0)) == 0
    # Of no unit, blind to the layout, and c for a kernel that grew by the factor 1 + c.
    np.testing.assert_allclose(relative_change(7 * kt, 7 * k0), change, rtol=1e-14)
    axes = (0, 2, 1, 3)
    np.testing.assert_allclose(relative_change(kt.transpose(axes), k0.transpose(axes)), change, rtol=1e-14)
    np.testing.assert_allclose(relative_change(1.25 * k0, k0), 0.25, rtol=1e-14)
    # The triangle inequality, from 0 by way of k0 to kt.
    norm = float(jnp.linalg.norm(kt.ravel()) / jnp.linalg.norm(k0.ravel()))
    assert abs(norm - 1) <= change <= norm + 1


def test_relative_change_is_finite_wherever_the_kernels_are():
    k0 = points(3, 3, 2, 2, dtype=jnp.float32)
    np.testing.assert_allclose(relative_change(1e30 * k0, 1e25 * k0), 1e5 - 1, rtol=1e-5)
    np.testing.assert_allclose(relative_change(3e-30 * k0, 1e-30 * k0), 2, rtol=1e-5)


def test_relative_change_refuses_kernels_of_different_points():
    with pytest.raises(ValueError, match="same points"):
        relative_change(jnp.ones((2, 2, 1, 1)), jnp.ones((2, 3, 1, 1)))


@pytest.mark.slow
def test_the_numbers_are_those_of_a_plain_loop(x64):
    arguments, steps, at, rate = setting(MLP(5, 2, activation="tanh")), 4, (0, 1, 4), 0.3
    found = kernel_drift(**arguments, optimizer=optax.sgd(rate), steps=steps, at=at)
    apply, x, params = arguments["apply"], arguments["points"], arguments["params"]
    rows, expected_losses = [], []
    for step in range(steps + 1):
        if step in at:
            kernels = [np.asarray(empirical_ntk(apply, p, x, method="jacobian")) for p in (params, arguments["params"])]
            norms = np.linalg.norm(apply(params, x), axis=-1)
            moved = jax.tree.leaves(jax.tree.map(lambda a, b: a - b, params, arguments["params"]))
            travelled = np.sqrt(sum(float(jnp.sum(leaf**2)) for leaf in moved))
            change = np.linalg.norm(kernels[0] - kernels[1]) / np.linalg.norm(kernels[1])
            rows.append([change, norms.min(), norms.max(), travelled])
        value, gradient = jax.value_and_grad(arguments["objective"])(params, arguments["data"])
        expected_losses += [float(value)]
        params = jax.tree.map(lambda p, g: p - rate * g, params, gradient)
    np.testing.assert_array_equal(found.steps, at)
    measured = np.stack([found.change, found.smallest, found.largest, found.travelled], axis=1)
    # Four steps of rounding; the first change and distance are zeros.
    np.testing.assert_allclose(measured, rows, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(found.losses, expected_losses[:steps], rtol=1e-12)
    assert found.status == "finished"


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_nothing_has_changed_after_no_step(x64, dtype):
    arguments = setting(MLP(5, 2, depth=3), dtype=dtype)
    found = kernel_drift(**arguments, optimizer=optax.sgd(0.1), steps=2, at=[0, 2])
    assert found.change[0] == 0
    assert found.travelled[0] == 0
    assert found.change[1] > 0
    assert found.travelled[1] > 0


@pytest.mark.slow
def test_a_learning_rate_of_zero_moves_nothing():
    arguments = setting(MLP(5, 2), dtype=jnp.float32)
    found = kernel_drift(**arguments, optimizer=optax.sgd(0.0), steps=3, at=[1, 3])
    np.testing.assert_array_equal(found.change, 0)
    np.testing.assert_array_equal(found.travelled, 0)
    assert np.ptp(found.losses) == 0


def test_the_kernel_of_a_linear_map_cannot_move():
    # f = W x: J does not hold W, so the kernel is the same however far W travels.
    arguments = setting(MLP(1, 2, depth=1, use_bias=True), dtype=jnp.float32)
    found = kernel_drift(**arguments, optimizer=optax.sgd(0.5), steps=5, at=[5])
    assert found.change[0] == 0
    assert found.travelled[0] > 0.1


@pytest.mark.slow
def test_a_step_under_cosine_is_orthogonal_to_the_output_weights_and_as_long_as_the_gradient():
    # The loss does not change under W -> c W, so <W, dL/dW> = 0: the step is orthogonal to W.
    arguments = setting(MLP(16, 2), dtype=jnp.float32)
    found = kernel_drift(**arguments, optimizer=optax.sgd(1e-3), steps=1, at=[0, 1])
    gradient = jax.grad(arguments["objective"])(arguments["params"], arguments["data"])
    weights, slope = (tree["params"]["dense_1"]["kernel"] for tree in (arguments["params"], gradient))
    # Two vectors of 32 entries: their product errs by rounding only.
    cosine = jnp.sum(weights * slope) / (jnp.linalg.norm(weights) * jnp.linalg.norm(slope))
    assert abs(float(cosine)) < 32 * np.finfo(np.float32).eps
    assert found.travelled[1] == pytest.approx(1e-3 * float(optax.tree.norm(gradient)), rel=1e-3)


def test_a_diverging_run_is_measured_as_far_as_it_came():
    # The linear loss under dot products is unbounded below; with three linear layers the gradient grows with the norm.
    def loss(za, zb):
        return losses.linear(za, zb, jnp.roll(zb, 1, axis=0))

    arguments = setting(MLP(8, 2, activation="identity", depth=3), loss, dtype=jnp.float32)
    found = kernel_drift(**arguments, optimizer=optax.sgd(1.0), steps=200, at=[0, 2, 4, 200])
    assert found.status == "diverged"
    np.testing.assert_array_equal(found.steps, [0, 2, 4])
    assert len(found.losses) < 200
    for column in (found.change, found.smallest, found.largest, found.travelled):
        assert column.shape == found.steps.shape
        assert np.isfinite(column).all()


@pytest.mark.slow
def test_little_memory_changes_nothing_but_rounding(x64):
    arguments = setting(MLP(5, 2, activation="tanh"))
    whole, split = (
        kernel_drift(**arguments, optimizer=optax.sgd(0.3), steps=2, at=[2], memory=memory) for memory in (2**30, 1)
    )
    np.testing.assert_allclose(split.change, whole.change, rtol=1e-10)
    np.testing.assert_array_equal(split.travelled, whole.travelled)


BAD = {
    "no step": ({"at": []}, "one or more numbers"),
    "a step beyond the end": ({"at": [0, 3]}, "from 0 to steps"),
    "a step before the start": ({"at": [-1]}, "from 0 to steps"),
    "steps out of order": ({"at": [2, 1]}, "increase"),
    "points of another length": ({"points": jnp.ones((4, 5), jnp.float32)}, "needs"),
    "points with NaN": ({"points": jnp.full((4, 3), jnp.nan, jnp.float32)}, "not finite"),
    "no points": ({"points": jnp.ones((0, 3), jnp.float32)}, "at least one point"),
    "data with NaN": ({"data": (jnp.full((6, 3), jnp.nan, jnp.float32),) * 2}, "not finite"),
    "views of different length": ({"data": (jnp.ones((6, 3)), jnp.ones((5, 3)))}, "leading axes"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named_before_any_training(name, monkeypatch):
    changed, message = BAD[name]
    arguments = setting(MLP(5, 2), dtype=jnp.float32) | {"optimizer": optax.sgd(0.1), "steps": 2, "at": [0]} | changed
    monkeypatch.setattr(drift, "empirical_ntk", lambda *_, **__: pytest.fail("a kernel was computed"))
    monkeypatch.setattr(training, "advance_by", lambda _: lambda *_: pytest.fail("a step was made"))
    with pytest.raises(ValueError, match=message):
        kernel_drift(**arguments)
