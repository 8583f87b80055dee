"""How the function-space gradient flow fails: blow-up, singular gradients, the step limit, bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_flow import TIMES, contrast, error_bound, half_square, problem

from theorykit.ntk import gradient_flow
from theorykit.ntk.gradient_flow import DIVERGED, MAX_STEPS, SINGULAR, flow, flow_stacked


@pytest.mark.slow
@pytest.mark.parametrize(("power", "dtype"), [(6, jnp.float64), (4, jnp.float32)])
def test_a_blow_up_in_finite_time_is_reported(x64, power, dtype):
    # f' = f^(p - 1) from 1: f = (1 - t/t*)^(-1/(p - 2)), t* = 1/(p - 2).
    end = 1 / (power - 2)
    times = np.array([0.0, 0.5 * end, 0.9 * end, 2 * end, 3 * end])
    loss = lambda f: -jnp.sum(f**power) / power  # noqa: E731
    path = flow_stacked(jnp.eye(2, dtype=dtype), loss, jnp.ones((2, 1), dtype), times)
    assert int(path.status) == DIVERGED and "diverged" in path.describe()
    assert np.all(np.isnan(path.f[3:])), "times behind the blow-up hold NaN"
    expected = (1 - times[:3] / end) ** (-1 / (power - 2))
    # Errors grow with df/df0 = (f/f0)^(p - 1).
    bound = error_bound(path, path.f, float(expected[-1] ** (power - 1)))
    np.testing.assert_allclose(path.f[:3, 0, 0], expected, rtol=0, atol=bound)
    assert 0.9 * end < float(path.last_time) == pytest.approx(end, rel=bound)


def test_an_overflow_is_reported_as_divergence(x64):
    path = flow_stacked(
        jnp.eye(1, dtype=jnp.float32), lambda f: -half_square(f), jnp.ones((1, 1), jnp.float32), np.array([80.0, 200.0])
    )
    assert int(path.status) == DIVERGED and bool(jnp.isfinite(path.f[0, 0, 0])) and bool(jnp.isnan(path.f[1, 0, 0]))
    # f = exp(t) to a relative error of rtol in each step; a stage may overflow before the end of its step.
    end = np.log(float(np.finfo(np.float32).max))
    assert 0.99 * end < float(path.last_time) < end + int(path.accepted) * float(path.rtol)


def log_sum(f):
    return jnp.sum(jnp.log(f))


def test_a_singular_gradient_is_reported_with_the_time_it_is_met(x64):
    # L = log f: f' = -1/f, f = sqrt(1 - 2 t), which ends at 1/2 with f = 0. Errors grow with df/df0 = 1/f.
    path = flow_stacked(jnp.eye(1), log_sum, jnp.ones((1, 1)), np.array([0.0, 0.4, 1.0]))
    assert int(path.status) == SINGULAR and "singular" in path.describe()
    assert float(path.last_time) == pytest.approx(0.5, abs=error_bound(path, path.f))
    np.testing.assert_allclose(path.f[:2, 0, 0], np.sqrt([1, 0.2]), rtol=0, atol=error_bound(path, path.f, 0.2**-0.5))
    assert np.isnan(path.f[2, 0, 0])


def test_a_gradient_that_is_not_finite_at_the_start_ends_the_flow_there(x64):
    path = flow_stacked(jnp.eye(1), log_sum, jnp.zeros((1, 1)), np.array([0.0, 0.4, 1.0]))
    assert int(path.status) == SINGULAR and float(path.last_time) == 0
    np.testing.assert_array_equal(path.f[:, 0, 0], [0, np.nan, np.nan])


@pytest.mark.slow
def test_max_steps_stops_the_solve_and_leaves_no_stale_values(x64):
    kernel, views, cross, fh = problem()
    times = np.array([0.0, 1e-3, 1e3, 2e3])
    path = flow(kernel, contrast, views, times, cross=cross, heldout0=fh, max_steps=20)
    assert int(path.status) == MAX_STEPS and "max_steps" in path.describe()
    assert 1e-3 < float(path.last_time) < 1e3
    assert 20 < int(path.accepted) + int(path.rejected) <= 2 * 20, "20 in the interval that fails, fewer before"
    reference = flow(kernel, contrast, views, np.array([0.0, 1e-3, 2e-3, 3e-3]), cross=cross, heldout0=fh)
    for name in ("fa", "fb", "heldout"):
        np.testing.assert_array_equal(getattr(path, name)[:2], getattr(reference, name)[:2])
        assert np.all(np.isnan(getattr(path, name)[2:]))


@pytest.mark.slow
def test_the_description_names_the_tolerance(x64):
    kernel, views, _, _ = problem()
    path = flow(kernel, contrast, views, TIMES, rtol=1e-6, atol=1e-7)
    assert path.describe().startswith("finished at t = 2.5")
    assert "rtol 1e-06" in path.describe() and "atol 1e-07" in path.describe()
    assert float(path.last_time) == TIMES[-1]


def swap(index, value):
    return lambda items: (*items[:index], value, *items[index + 1 :])


SHAPES = {
    "a block of other points": (lambda p: p | {"kernel": swap(1, p["kernel"][1][:, :3])(p["kernel"])}, "kernel ab"),
    "a block of other outputs": (lambda p: p | {"kernel": swap(0, p["kernel"][0][..., :1])(p["kernel"])}, "kernel aa"),
    "views of different length": (lambda p: p | {"embeddings": (p["embeddings"][0], p["embeddings"][1][:3])}, "same"),
    "embeddings with one axis": (lambda p: p | {"embeddings": tuple(f[:, 0] for f in p["embeddings"])}, "same"),
    "cross of other points": (lambda p: p | {"cross": swap(0, p["cross"][0][:1])(p["cross"])}, "cross ha"),
    "heldout of other outputs": (lambda p: p | {"heldout0": p["heldout0"][:, :1]}, "heldout0 has shape"),
    "cross alone": (lambda p: p | {"heldout0": None}, "heldout0 is missing"),
    "heldout0 alone": (lambda p: p | {"cross": None}, "cross is missing"),
    "no times": (lambda p: p | {"times": np.zeros(0)}, "at least one"),
    "times that fall": (lambda p: p | {"times": np.array([1.0, 0.5])}, "increase"),
    "repeated times": (lambda p: p | {"times": np.array([1.0, 1.0])}, "increase"),
    "negative times": (lambda p: p | {"times": np.array([-1.0, 1.0])}, "increase"),
    "infinite times": (lambda p: p | {"times": np.array([1.0, np.inf])}, "times holds NaN or infinity"),
    "NaN in the kernel": (lambda p: p | {"kernel": swap(1, p["kernel"][1] * jnp.nan)(p["kernel"])}, "ab holds NaN"),
    "NaN in a view": (lambda p: p | {"embeddings": swap(1, p["embeddings"][1] / 0)(p["embeddings"])}, "fb0 holds NaN"),
    "NaN in heldout0": (lambda p: p | {"heldout0": p["heldout0"] * jnp.nan}, "heldout0 holds NaN"),
    "swapped output axes": (lambda p: p | {"kernel": swap(2, p["kernel"][1])(p["kernel"])}, "bb is not symmetric"),
    "a vector loss": (lambda p: p | {"loss": lambda fa, fb: jnp.sum(fa * fb, 1)}, "scalar"),
    "no steps": (lambda p: p | {"max_steps": 0}, "at least one step"),
    "a negative tolerance": (lambda p: p | {"rtol": -1e-3}, "rtol is"),
    "a zero tolerance": (lambda p: p | {"atol": 0.0}, "atol is"),
}


@pytest.fixture
def arguments(x64):
    kernel, views, cross, fh = problem()
    return {"kernel": kernel, "loss": contrast, "embeddings": views, "times": TIMES, "cross": cross, "heldout0": fh}


@pytest.mark.parametrize("case", SHAPES)
def test_bad_input_is_refused_with_the_cause(arguments, case):
    spoil, message = SHAPES[case]
    with pytest.raises(ValueError, match=message):
        flow(**spoil(arguments))


def test_mixed_dtypes_are_refused(arguments):
    fa, fb = arguments["embeddings"]
    with pytest.raises(TypeError, match="fb0 float32"):
        flow(**arguments | {"embeddings": (fa, fb.astype(jnp.float32))})
    half = jax.tree.map(lambda x: x.astype(jnp.float16), {k: arguments[k] for k in ("kernel", "embeddings")})
    with pytest.raises(TypeError, match="float32 or float64"):
        flow(half["kernel"], contrast, half["embeddings"], TIMES)


def test_a_loss_that_cannot_be_hashed_is_refused(arguments):
    class Unhashable:
        __hash__ = None

        def __call__(self, fa, fb):
            return contrast(fa, fb)

    with pytest.raises(TypeError, match="hashable"):
        flow(**arguments | {"loss": Unhashable()})


def test_shapes_are_checked_under_jit(x64):
    kernel, views, _, _ = problem()
    with pytest.raises(ValueError, match="same"):
        jax.jit(lambda v: flow(kernel, contrast, v, TIMES))((views[0], views[1][:2]))


def test_a_step_that_time_cannot_resolve_is_never_accepted_blindly(x64):
    # A controller with a smallest step accepts that step whatever its error; here the stages jump at every step.
    controller = gradient_flow._ResolvedSteps(rtol=1e-6, atol=1e-6)
    state = (jnp.ones(()), jnp.ones(()), False)
    now, step = jnp.asarray(0.5), 10 * np.finfo(np.float64).eps
    keep, start, end, _, _, result = controller.adapt_step_size(
        now, now + step, jnp.ones(1), jnp.ones(1), None, jnp.ones(1), 5, state
    )
    assert not bool(keep) and float(start) == 0.5 and float(end) < float(now + step)
    assert bool(result == gradient_flow.diffrax.RESULTS.dt_min_reached)
