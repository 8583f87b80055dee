"""Sufficiency of scores and encoders: forms against each other and the definition, limits, invariances, bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
from hypothesis import given, settings
from hypothesis import strategies as st

from theorykit.surrogate import information_loss as suff
from theorykit.surrogate import joint as joints
from theorykit.surrogate import risk
from theorykit.surrogate.bounds import chain

NX, NY = 5, 4
DIVERGENCES = {"KL": suff.KL, "chi-square": suff.CHI_SQUARE, "Jensen-Shannon": suff.JENSEN_SHANNON}
FORMS = ("information", "variational", "bregman")


def draw(seed, deviation=1.0, zeros=0.3):
    one, two = jax.random.split(jax.random.key(seed))
    return joints.random_joint(one, NX, NY, zeros=zeros), deviation * jax.random.normal(two, (NX, NY))


def by_definition(joint, score):
    """I - E_P s + E_p ln Z_s in numpy."""
    joint, score = np.asarray(joint), np.asarray(score)
    p, q = joint.sum(1), joint.sum(0)
    met = joint > 0
    information = np.sum(joint[met] * np.log((joint / (p[:, None] * q[None, :]))[met]))
    return information - np.sum(joint * score) + p @ np.log(np.exp(score) @ q)


@pytest.mark.slow
@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([0.1, 1.0, 10.0]), st.sampled_from([0.0, 0.5]))
def test_sufficiency_is_its_definition_and_ignores_a_function_of_x(seed, deviation, zeros):
    with jax.enable_x64(True):
        joint, score = draw(seed, deviation, zeros)
        found = suff.sufficiency(joint, score)
        np.testing.assert_allclose(found, by_definition(joint, score), rtol=1e-12, atol=1e-14 * deviation)
        shifted = score + jnp.arange(NX, dtype=score.dtype)[:, None]
        np.testing.assert_allclose(suff.sufficiency(joint, shifted), found, rtol=1e-12, atol=1e-14 * deviation)
        reverse = suff.sufficiency(joint.T, score.T)
        np.testing.assert_allclose(suff.sufficiency(joint, score, side="both"), found + reverse, rtol=1e-14)


@pytest.mark.slow
def test_the_log_ratio_is_sufficient_and_a_constant_score_loses_all_information(x64):
    joint, _ = draw(0)
    assert suff.sufficiency(joint, jnp.log(joints.density_ratio(joint))) < 1e-15
    np.testing.assert_allclose(
        suff.sufficiency(joint, jnp.zeros_like(joint)), joints.mutual_information(joint), rtol=1e-13
    )


@pytest.mark.slow
def test_a_small_sufficiency_keeps_its_digits(x64):
    joint, direction = draw(1, zeros=0.0)
    s = risk.optimal_score(joint)
    # Second order: half the variance of the perturbation under the true conditional law.
    p = joint.sum(axis=1)
    conditional = joint / p[:, None]
    mean = jnp.sum(conditional * direction, axis=1)
    variance = p @ jnp.sum(conditional * (direction - mean[:, None]) ** 2, axis=1)
    for size in (1e-5, 1e-7):
        np.testing.assert_allclose(
            suff.sufficiency(joint, s + size * direction), size**2 * variance / 2, rtol=100 * size
        )


def test_excluded_pairs_cost_nothing_where_they_never_meet_and_everything_where_they_do(x64):
    joint = jnp.array([[0.5, 0.0], [0.2, 0.3]])
    never = jnp.array([[0.0, -jnp.inf], [0.0, 0.0]])
    assert jnp.isfinite(suff.sufficiency(joint, never))
    assert suff.sufficiency(joint, never.at[0, 0].set(-jnp.inf)) == jnp.inf
    assert suff.sufficiency(joint, never.at[1, 0].set(-jnp.inf)) == jnp.inf
    np.testing.assert_allclose(suff.model_conditional(joint, never).sum(axis=1), 1, rtol=1e-14)


def test_widely_spread_scores_stay_finite(x64):
    joint, score = draw(2, deviation=1e4)
    np.testing.assert_allclose(
        suff.sufficiency(joint, score),
        joints.mutual_information(joint) - jnp.sum(joint * score) + joint.sum(1) @ jnp.max(score, axis=1),
        rtol=1e-3,
    )


@pytest.mark.slow
@pytest.mark.parametrize("f", DIVERGENCES.values(), ids=DIVERGENCES)
@pytest.mark.parametrize("zeros", [0.0, 0.5])
def test_the_three_forms_of_an_encoders_loss_are_equal(x64, f, zeros):
    for seed, codes in enumerate(([0, 0, 1, 1, 2], [0, 0, 0, 0, 0], [4, 2, 0, 1, 3])):
        joint, _ = draw(seed, zeros=zeros)
        one, *others = (suff.encoder_sufficiency(joint, jnp.array(codes), f=f, form=form) for form in FORMS)
        for other in others:
            np.testing.assert_allclose(one, other, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("f", DIVERGENCES.values(), ids=DIVERGENCES)
def test_derivative_conjugate_and_inverse_belong_to_f(x64, f):
    t = jnp.array([0.1, 0.7, 1.0, 1.5, 4.0])
    assert f.value(jnp.ones(())) == 0
    np.testing.assert_allclose(jax.vmap(jax.grad(f.value))(t), f.derivative(t), rtol=1e-12)
    np.testing.assert_allclose(f.inverse(f.derivative(t)), t, rtol=1e-12)
    # Young's equality.
    np.testing.assert_allclose(f.conjugate(f.derivative(t)), t * f.derivative(t) - f.value(t), rtol=1e-12, atol=1e-14)


@pytest.mark.slow
@pytest.mark.parametrize("f", DIVERGENCES.values(), ids=DIVERGENCES)
def test_no_score_has_a_variational_risk_below_minus_the_information(x64, f):
    for seed in range(10):
        joint, score = draw(seed, deviation=0.3)
        least = -joints.f_information(joint, f.value)
        np.testing.assert_allclose(suff.variational_risk(joint, f.derivative(joints.density_ratio(joint)), f), least)
        shift = jnp.linspace(-3, 3, NX)[:, None]
        found = suff.variational_risk(joint, score, f)
        assert found > least
        np.testing.assert_allclose(suff.variational_risk(joint, score + shift, f), found, rtol=1e-10)


def bregman_loss(joint, score, f):
    """E_pq [f(r) - f(w) - f'(w) (r - w)] with w = (f*)'(s - c), c by bisection of E_q w = 1 in each row."""
    p, q, total = np.asarray(joint.sum(1)), np.asarray(joint.sum(0)), 0.0
    for x in range(NX):
        model = lambda c, x=x: np.asarray(f.inverse(score[x] - c))  # noqa: E731
        # At these ends w >= 1, and w <= 1, for all y.
        ends = np.array([score[x].min(), score[x].max()]) - float(f.derivative(jnp.ones(())))
        c = scipy.optimize.bisect(lambda c, model=model: q @ model(c) - 1, *ends, xtol=1e-15)
        r, w = np.asarray(joint[x]) / p[x] / q, model(c)
        lost = np.asarray(f.value(jnp.asarray(r)) - f.value(jnp.asarray(w)) - (score[x] - c) * jnp.asarray(r - w))
        assert np.all(lost >= -1e-14)
        total += p[x] * q @ lost
    return total


@pytest.mark.parametrize("f", DIVERGENCES.values(), ids=DIVERGENCES)
def test_what_a_score_loses_in_variational_risk_is_a_bregman_divergence_from_its_model(x64, f):
    lose = jax.jit(lambda p, s: suff.variational_risk(p, s, f) + joints.f_information(p, f.value))
    for seed in range(2):
        joint, score = draw(seed, deviation=0.5)
        lost = lose(joint, score)
        # A few dozen roundings of terms of order one.
        np.testing.assert_allclose(lost, bregman_loss(joint, score, f), rtol=1e-12, atol=1e-13)
        if f is suff.KL:
            np.testing.assert_allclose(lost, suff.sufficiency(joint, score), rtol=1e-12, atol=1e-13)


def test_sufficiency_is_the_limiting_risk_and_the_information(x64):
    functions = (suff.sufficiency, suff.limiting_risk, suff.variational_risk)
    forms = jax.jit(lambda p, s: [function(p, s) for function in functions] + [joints.mutual_information(p)])
    for seed, deviation in enumerate((0.1, 1.0, 10.0)):
        lost, limit, variational, information = forms(*draw(seed, deviation))
        close = {"rtol": 1e-12, "atol": 1e-14 * deviation}  # a few roundings of the scores
        np.testing.assert_allclose(limit + information, lost, **close)
        np.testing.assert_allclose(variational, limit, **close)


def test_the_best_score_on_an_encoder_is_its_log_ratio(x64):
    joint, _ = draw(3)
    codes = jnp.array([0, 1, 0, 2, 1])
    best = jnp.log(suff.encoder_ratio(joint, codes))
    lost = suff.encoder_sufficiency(joint, codes)
    np.testing.assert_allclose(suff.sufficiency(joint, best), lost, rtol=1e-12)
    for seed in range(20):
        other = jax.random.normal(jax.random.key(seed), (NX, NY))[codes]
        assert suff.sufficiency(joint, best + 0.1 * other) > lost


def test_sufficiency_of_a_pair_of_encoders_splits_into_information_and_head(x64):
    joint, score = draw(4)
    codes_x, codes_y = jnp.array([0, 1, 0, 2, 1]), jnp.array([0, 0, 1, 1])
    table = score[codes_x[:, None], codes_y[None, :]]
    parts = suff.pair_sufficiency(joint, codes_x, codes_y, table)
    assert min(parts) > 0
    np.testing.assert_allclose(sum(parts), suff.sufficiency(joint, table), rtol=1e-12)
    with pytest.raises(ValueError, match="compute it from the codes"):
        suff.pair_sufficiency(joint, codes_x, codes_y, score)


@pytest.mark.slow
@pytest.mark.parametrize("side", ["x", "both"])
def test_the_chain_is_ordered(x64, side):
    for seed in range(10):
        joint, score = draw(seed, zeros=0.0)
        for candidates in (2, 8, 10**5):
            found = chain(joint, score, candidates, side=side)
            assert found.excess <= found.sufficiency * (1 + 1e-12) <= found.upper * (1 + 1e-12)
            assert found.gap >= -1e-12 and found.factor >= 1
            np.testing.assert_allclose(found.risk - found.minimum, found.excess)
    # At a hundred thousand candidates the gap has closed to its order 1/K.
    assert found.ratio < 1.001


@pytest.mark.slow
def test_identical_variables_have_no_bound_free_of_the_distribution(x64):
    found = chain(joints.identical(64), jnp.zeros((64, 64)), 4)
    np.testing.assert_allclose(found.sufficiency, np.log(64), rtol=1e-12)
    assert found.excess <= np.log(4) < found.sufficiency


def test_the_gradient_is_that_of_the_definition(x64):
    joint, score = draw(5)
    p, q = joint.sum(axis=1), joint.sum(axis=0)
    gradient = jax.jit(jax.grad(suff.sufficiency, argnums=1))(joint, score)
    np.testing.assert_allclose(
        gradient, p[:, None] * suff.model_conditional(joint, score) - joint, rtol=1e-10, atol=1e-14
    )
    assert q.sum() == pytest.approx(1)


def test_bad_input_is_named(x64, as_users_run):
    joint, score = draw(6)
    with pytest.raises(ValueError, match="sums to"):
        suff.sufficiency(2 * joint, score)
    with pytest.raises(ValueError, match="give 'x'"):
        suff.sufficiency(joint, score, side="y")
    with pytest.raises(ValueError, match="one whole number to each of 5"):
        suff.encoder_sufficiency(joint, jnp.zeros(4, int))
    with pytest.raises(ValueError, match="number them from 0 to 4"):
        suff.encoder_sufficiency(joint, jnp.full(5, 7))
