"""Finite joints: ratio and information against plain sums, closed forms and limits; families; bad input."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.scipy.special import xlogy

from theorykit.surrogate import joint as joints

TOLERANCE = 1e-13  # a few hundred roundings of float64, for sums of at most a hundred terms of order one


def draw(seed, nx=5, ny=4, concentration=1.0, zeros=0.0):
    return joints.random_joint(jax.random.key(seed), nx, ny, concentration=concentration, zeros=zeros)


def with_empty_row_and_column():
    """A joint of 3 x 4 with the second row and the last column empty."""
    table = jnp.zeros((3, 4)).at[0, :3].set(jnp.array([0.1, 0.2, 0.3])).at[2, 1].set(0.4)
    return table / jnp.sum(table)


# ---------------------------------------------------------------- quantities


@pytest.mark.slow
@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([0.1, 1.0, 5.0]), st.sampled_from([0.0, 0.5, 1.0]))
def test_information_agrees_with_a_plain_sum(seed, concentration, zeros):
    with jax.enable_x64(True):
        table = draw(seed, concentration=concentration, zeros=zeros)
        p, q = np.asarray(table).sum(axis=1), np.asarray(table).sum(axis=0)
        cells = [(float(table[i, j]), p[i] * q[j]) for i in range(5) for j in range(4)]
        information = math.fsum(a * math.log(a / b) for a, b in cells if a > 0)
        square = math.fsum((a - b) ** 2 / b for a, b in cells)
        assert float(joints.mutual_information(table)) == pytest.approx(information, rel=TOLERANCE, abs=TOLERANCE)
        assert float(joints.chi_square(table)) == pytest.approx(square, rel=TOLERANCE, abs=TOLERANCE)
        kl = joints.f_information(table, lambda t: xlogy(t, t))
        assert float(kl) == pytest.approx(information, rel=TOLERANCE, abs=TOLERANCE)
        assert math.exp(information) - 1 <= square * (1 + TOLERANCE) + TOLERANCE


@pytest.mark.slow
def test_ratio_times_product_of_marginals_is_the_joint_and_its_mean_is_one(x64):
    table = draw(0, zeros=0.4)
    p, q = joints.marginals(table)
    product = p[:, None] * q[None, :]
    ratio = joints.density_ratio(table)
    np.testing.assert_allclose(ratio * product, table, rtol=TOLERANCE)
    assert float(jnp.sum(ratio * product)) == pytest.approx(1, abs=TOLERANCE)


def test_where_a_marginal_is_zero_the_ratio_is_one_and_information_does_not_change(x64):
    table = with_empty_row_and_column()
    smaller = table[jnp.array([0, 2])][:, :3]
    ratio = joints.density_ratio(table)
    assert np.all(np.asarray(ratio[1]) == 1) and np.all(np.asarray(ratio[:, 3]) == 1)
    assert float(ratio[2, 0]) == 0
    for quantity in (joints.mutual_information, joints.chi_square):
        assert float(quantity(table)) == pytest.approx(float(quantity(smaller)), rel=TOLERANCE)


def test_independent_variables_have_no_information(x64):
    p, q = jnp.array([0.2, 0.8]), jnp.array([0.5, 0.1, 0.4])
    table = p[:, None] * q[None, :]
    np.testing.assert_allclose(joints.density_ratio(table), 1, rtol=TOLERANCE)
    assert abs(float(joints.mutual_information(table))) < TOLERANCE
    assert abs(float(joints.chi_square(table))) < TOLERANCE


def test_the_ratio_survives_where_the_product_of_marginals_underflows(x64):
    tiny = 1e-200
    table = jnp.array([[1.0, 0.0], [0.0, tiny]])
    assert float(joints.density_ratio(table)[1, 1]) == pytest.approx(1 / tiny)


def test_quantities_work_inside_jit_and_have_finite_gradients_at_zeros(x64):
    table = draw(2, zeros=0.6)
    compiled = jax.jit(joints.mutual_information)(table)
    assert float(compiled) == pytest.approx(float(joints.mutual_information(table)), rel=TOLERANCE)
    assert np.all(np.isfinite(np.asarray(jax.grad(lambda t: joints.mutual_information(t))(table))))


# ---------------------------------------------------------------- families


@pytest.mark.slow
@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([(3, 5), (6, 2)]), st.sampled_from([0.01, 1.0]), st.booleans())
def test_random_joints_are_joints_and_keep_every_row_and_column(seed, sizes, concentration, sparse):
    with jax.enable_x64(True):
        table = draw(seed, *sizes, concentration=concentration, zeros=float(sparse))
        joints.check_joint(table)
        if concentration == 1:
            p, q = joints.marginals(table)
            assert np.all(np.asarray(p) > 0) and np.all(np.asarray(q) > 0)
            assert int(jnp.sum(table > 0)) == (max(sizes) if sparse else sizes[0] * sizes[1])


def test_identical_variables_have_information_log_n_and_chi_square_n_minus_one(x64):
    table = joints.identical(7)
    assert float(joints.mutual_information(table)) == pytest.approx(math.log(7), rel=TOLERANCE)
    assert float(joints.chi_square(table)) == pytest.approx(6, rel=TOLERANCE)


@pytest.mark.parametrize("correlation", [0.0, 0.5, -0.9])
def test_quantised_gaussians_have_equal_cells_and_probabilities_of_the_orthant_formula(x64, correlation):
    table = np.asarray(joints.gaussian(correlation, 6, 4))
    np.testing.assert_allclose(table.sum(axis=1), 1 / 6, rtol=1e-12)
    np.testing.assert_allclose(table.sum(axis=0), 1 / 4, rtol=1e-12)
    # Sheppard: both signs positive with probability 1/4 + arcsin(rho) / (2 pi).
    quadrant = 0.25 + math.asin(correlation) / (2 * math.pi)
    assert table[3:, 2:].sum() == pytest.approx(quadrant, rel=1e-12)
    np.testing.assert_allclose(joints.gaussian(-correlation, 6, 4), table[::-1], rtol=1e-9, atol=1e-16)


@pytest.mark.slow
def test_information_of_quantised_gaussians_grows_with_the_cells_to_that_of_the_variables(x64):
    exact = -0.5 * math.log(1 - 0.6**2)
    found = [float(joints.mutual_information(joints.gaussian(0.6, n, n))) for n in (2, 4, 16, 64)]
    assert found == sorted(found) and found[-1] < exact
    # Measured: the gap falls faster than 1/n; a tenth of it at 64 cells would be missed by a wrong correlation.
    assert exact - found[-1] < 0.02 * exact


def test_counts_of_samples_become_their_fractions():
    table = joints.from_samples(jnp.array([0, 0, 2, 2]), jnp.array([1, 1, 0, 1]), 3, 2)
    np.testing.assert_array_equal(table, [[0, 0.5], [0, 0], [0.25, 0.25]])


@pytest.mark.slow
def test_labelled_joints_agree_on_the_text(x64):
    label_text, text_image = joints.random_labelled(jax.random.key(0), 3, 5, 4, concentration=0.3)
    assert label_text.shape == (3, 5) and text_image.shape == (5, 4)
    joints.check_joint(label_text)
    joints.check_joint(text_image)
    np.testing.assert_allclose(label_text.sum(axis=0), text_image.sum(axis=1), rtol=TOLERANCE)


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("table", "error", "message"),
    [
        (np.full((2, 2), 0.25), TypeError, r"jnp\.asarray"),
        (jnp.ones((2, 2), jnp.int32), TypeError, "cast it"),
        (jnp.full(4, 0.25), ValueError, r"shape \(4,\)"),
        (jnp.zeros((0, 3)), ValueError, "shape"),
        (jnp.full((2, 2), 0.3), ValueError, "sums to 1.2.*divide"),
        (jnp.array([[1.5, -0.5]]), ValueError, "negative"),
        (jnp.array([[1.0, jnp.nan]]), ValueError, "not finite"),
        (jnp.array([[jnp.inf, 0.0]]), ValueError, "not finite"),
    ],
)
def test_what_is_no_joint_is_refused_with_its_cause(as_users_run, table, error, message):
    for function in (joints.check_joint, joints.marginals, joints.density_ratio, joints.mutual_information):
        with pytest.raises(error, match=message):
            function(table)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: draw(0, nx=0), "nx is 0"),
        (lambda: draw(0, concentration=0.0), "positive"),
        (lambda: draw(0, zeros=1.5), "probability"),
        (lambda: joints.identical(0), "at least one symbol"),
        (lambda: joints.gaussian(1.0, 2, 2), "strictly between"),
        (lambda: joints.gaussian(math.nan, 2, 2), "strictly between"),
        (lambda: joints.from_samples(jnp.array([0, 3]), jnp.array([0, 0]), 3, 1), r"0 to 3; keep to 0\.\.2"),
        (lambda: joints.from_samples(jnp.array([0, -1]), jnp.array([0, 0]), 3, 1), "-1 to 0"),
        (lambda: joints.from_samples(jnp.array([0, 1]), jnp.array([0]), 3, 1), "shape"),
        (lambda: joints.random_labelled(jax.random.key(0), 0, 2, 2), "nc is 0"),
    ],
)
def test_families_refuse_impossible_settings(as_users_run, build, message):
    with pytest.raises(ValueError, match=message):
        build()
