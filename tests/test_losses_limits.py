"""Losses at their limits: stability in float32, and bad input."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_losses import (
    BESIDE,
    SCORES,
    TWO_VIEWS,
    N,
    Z,
    centred_columns,
    evaluate,
    every_loss,
    rows,
    s_cosine,
    third,
    views,
)

from theorykit.losses import LOSSES, barlow_twins, clip, info_nce, linear, logistic, nt_xent, vicreg

# ---------------------------------------------------------------- stability


@pytest.mark.slow
@pytest.mark.parametrize("name", [*TWO_VIEWS, *BESIDE])
@pytest.mark.parametrize("aligned", [True, False])
def test_float32_at_temperature_1e_3_and_norm_1e4_agrees_with_float64(name, aligned):
    tau, norm = 1e-3, 1e4
    za = rows(1, N, Z)
    zb = za if aligned else rows(2, N, Z)
    points = [za, zb, rows(3, N, Z)] if name in BESIDE else [za, zb]
    points = [(norm * x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32) for x in points]

    def at(dtype):
        za, zb, *beside = (jnp.asarray(x, dtype) for x in points)
        return evaluate(name, za, zb, tau, beside)

    value, gradient = at(jnp.float32)
    with jax.enable_x64(True):
        exact, exact_gradient = at(jnp.float64)
    # A score, a correlation or a covariance has a relative error of about (N + Z) eps, and the loss sums terms of size
    # `size`. Softmax and sigmoid turn the absolute error of their logits, 1/tau under cosine, into a relative error of
    # the gradient, and round it at eps times the slope of the logits. Under dot products the logits, of size 1e11, are
    # further apart than their errors: the softmax is one candidate, the same in both precisions. The linear loss has no
    # logits, and the gradient of a cosine is a difference of unit vectors over the norm, exactly 0 for aligned views.
    eps = (N + Z) * float(np.finfo(np.float32).eps)
    cosines = name.endswith("cosine")
    score, slope = (1.0, 1 / norm) if cosines else (norm**2, norm)
    if name.startswith("linear"):
        size, amplified, floor = score, 1.0, slope if cosines else 0.0
    elif name in (*SCORES, *BESIDE) and not name.startswith("spectral"):
        size, amplified, floor = score / tau, 1 / tau if cosines else 1.0, slope / tau
    else:
        size, amplified, floor = (score**2 if name in SCORES else max(1.0, float(exact))), 1.0, 0.0
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, exact, rtol=0, atol=2 * eps * size)
    for got, expected in zip(gradient, exact_gradient, strict=True):
        atol = 4 * eps * (amplified * np.abs(expected).max() + floor)
        np.testing.assert_allclose(got, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("name", [name for name in (*SCORES, *BESIDE) if name.endswith("cosine")])
def test_zero_vectors_give_finite_losses_and_a_zero_gradient_row(name):
    za, zb = views(dtype=jnp.float32)
    beside = [third().astype(jnp.float32).at[0].set(0.0)] if name in BESIDE else []
    value, (da, db, *dc) = evaluate(name, za.at[2].set(0.0), zb.at[1].set(0.0), beside=beside)
    assert np.isfinite(value) and all(np.all(np.isfinite(gradient)) for gradient in (da, db, *dc))
    for gradient in dc:
        np.testing.assert_array_equal(gradient[0], 0.0)
        assert np.all(np.any(np.asarray(gradient)[[1, 3, 4]] != 0, axis=1))
    np.testing.assert_array_equal(da[2], 0.0)
    np.testing.assert_array_equal(db[1], 0.0)
    assert np.all(np.any(np.asarray(da)[[0, 1, 3, 4]] != 0, axis=1))


def test_every_constant_is_recognised_although_its_mean_is_rounded():
    """With n = 7 the mean of n equal numbers differs from them for many numbers; no tolerance is used."""
    constants = jnp.asarray(1e3 * rows(3, 1, 64), jnp.float32)
    fixed, other = jnp.tile(constants, (7, 1)), jnp.asarray(rows(4, 7, 64), jnp.float32)
    assert np.any(np.asarray(jnp.mean(fixed, axis=0)) != np.asarray(constants)[0])
    value, (gradient, _) = evaluate("barlow_twins", fixed, other)
    assert float(value) == 64.0  # every correlation is 0
    np.testing.assert_array_equal(gradient, 0.0)


def test_a_constant_dimension_has_zero_correlation_and_zero_gradient():
    za, zb = views(dtype=jnp.float32)
    fixed = za.at[:, 1].set(0.1)
    value, gradient = evaluate("barlow_twins", fixed, zb)
    np.testing.assert_array_equal(gradient[0][:, 1], 0.0)
    cross = [[s_cosine(u, v) for v in centred_columns(zb.tolist())] for u in centred_columns(za.tolist())]
    expected = 1.0 + sum((1 - cross[i][i]) ** 2 for i in (0, 2))
    expected += 5e-3 * sum(cross[i][j] ** 2 for i in (0, 2) for j in range(Z) if j != i)
    assert float(value) == pytest.approx(expected, rel=1e-5)  # about 5 N Z eps
    assert np.all(np.isfinite(evaluate("vicreg", fixed, zb)[1]))


# One of each kind of formula, since second derivatives are slow to compile.
@pytest.mark.parametrize("name", ["info_nce-cosine", "nt_xent-cosine", "logistic-cosine", "barlow_twins", "vicreg"])
def test_second_derivatives_are_finite_also_at_zero_vectors(name):
    za, zb = views(dtype=jnp.float32)
    gradient = jax.grad(functools.partial(TWO_VIEWS[name][0], tau=jnp.float32(0.7)), (0, 1))
    point, direction = (za.at[1].set(0.0), zb), (jnp.ones_like(za), jnp.ones_like(zb).at[0].set(-2.0))
    _, second = jax.jit(lambda x, v: jax.jvp(gradient, x, v))(point, direction)
    assert np.all(np.isfinite(second)) and np.any(np.asarray(second) != 0)


@every_loss
def test_a_nan_in_the_embeddings_reaches_the_loss(name):
    za, zb = views(dtype=jnp.float32)
    assert np.isnan(float(evaluate(name, za.at[0, 0].set(jnp.nan), zb)[0]))


# ---------------------------------------------------------------- bad input

F32 = jnp.ones((3, 2), jnp.float32)


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_checks_its_views_at_trace_time(as_users_run, name):
    for bad, error in ((F32[:2], ValueError), (F32[:, :1], ValueError), (F32.astype(jnp.float16), TypeError)):
        with pytest.raises(error, match=f"^{name}: "):
            jax.eval_shape(LOSSES[name], F32, bad)


@pytest.mark.parametrize("loss", [logistic, barlow_twins, vicreg])
def test_losses_that_compare_samples_need_two(loss):
    with pytest.raises(ValueError, match="at least 2"):
        loss(jnp.ones((1, 2)), jnp.ones((1, 2)))


@pytest.mark.parametrize("loss", [logistic, info_nce, nt_xent, clip])
@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan, math.inf, 1e-50])
def test_temperature_must_be_positive_and_finite_in_the_dtype(loss, temperature):
    with pytest.raises(ValueError, match="temperature is"):
        jax.jit(functools.partial(loss, temperature=temperature))(F32, F32)


@pytest.mark.parametrize(
    ("loss", "weight"),
    [(barlow_twins, "redundancy"), (vicreg, "invariance"), (vicreg, "variance"), (vicreg, "covariance")],
)
def test_weights_must_not_be_negative(loss, weight):
    with pytest.raises(ValueError, match=f"{weight} is -1"):
        loss(F32, F32, **{weight: -1.0})


@pytest.mark.parametrize("negatives", [np.ones((3, 1)), np.ones((2, 2)), np.ones((3, 0, 2)), np.ones((3, 1, 1, 2))])
def test_negatives_of_the_linear_loss_must_fit_the_anchors(as_users_run, negatives):
    with pytest.raises(ValueError, match="zn has shape"):
        linear(F32, F32, jnp.asarray(negatives, jnp.float32))


@pytest.mark.parametrize("loss", [info_nce, nt_xent])
def test_a_queue_must_hold_embeddings_of_the_same_kind(as_users_run, loss):
    with pytest.raises(ValueError, match=f"^{loss.__name__}: negatives have shape"):
        loss(F32, F32, negatives=jnp.ones((4, 3)))
    with pytest.raises(TypeError, match=f"^{loss.__name__}: negatives has dtype"):
        loss(F32, F32, negatives=jnp.ones((4, 2), jnp.float16))
