"""Latents on the sphere, sources and generators: their laws against closed forms."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import ive

from theorykit.data import latents, sources

KEY = jax.random.key(0)
# Monte Carlo values lie within five standard errors of their law: by chance they leave them once in 1.7 million.
ERRORS = 5
N = 20_000
LAWS = list(itertools.product((2, 3, 20), (0.0, 0.5, 5.0, 100.0)))
# Fourth moments of the distributions of variance 1.
FOURTH = {"laplace": 6.0, "uniform": 1.8, "gaussian": 3.0}


def resultant(d, kappa):
    """Mean cosine with the mean direction, I_{d/2}(kappa) / I_{d/2-1}(kappa)."""
    return ive(d / 2, kappa) / ive(d / 2 - 1, kappa) if kappa else 0.0


def mean_is(values, expected):
    values = np.asarray(values, np.float64)
    assert abs(values.mean() - expected) <= ERRORS * values.std() / math.sqrt(len(values))


def directions(seed, count, d):
    """Unit vectors from NumPy: nothing to compile."""
    x = np.random.default_rng(seed).standard_normal((count, d))
    return jnp.asarray(x / np.linalg.norm(x, axis=1, keepdims=True), jnp.result_type(float))


def cosines(points, means):
    return np.sum(np.asarray(points, np.float64) * np.asarray(means, np.float64), axis=1)


# Latents on the sphere ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("d", [1, 2, 10])
def test_points_are_uniform_on_the_sphere_in_their_first_four_moments(d):
    z = np.asarray(latents.uniform_on_sphere(KEY, N, d))
    assert z.shape == (N, d)
    np.testing.assert_allclose(np.linalg.norm(z, axis=1), 1, rtol=8 * math.sqrt(d) * np.finfo(np.float32).eps)
    mean_is(z[:, 0], 0)
    # E z_i^2 z_j^2 = 1 / (d (d + 2)) for i != j, three times as much for i = j.
    mean_is(z[:, 0] ** 4, 3 / (d * (d + 2)))
    if d > 1:
        mean_is(z[:, 0] * z[:, 1], 0)
        mean_is(z[:, 0] ** 2 * z[:, 1] ** 2, 1 / (d * (d + 2)))


@pytest.mark.slow
@pytest.mark.parametrize(("d", "kappa"), LAWS)
def test_von_mises_fisher_has_the_mean_and_second_moment_of_its_law(d, kappa):
    means = directions(1, N, d)
    x = latents.von_mises_fisher(KEY, means, kappa)
    np.testing.assert_allclose(np.linalg.norm(x, axis=1), 1, rtol=20 * math.sqrt(d) * np.finfo(np.float32).eps)
    w, length = cosines(x, means), resultant(d, kappa)
    mean_is(w, length)
    # From the recurrence of Bessel functions, E w^2 = 1 - (d - 1) A / kappa; 1/d in the uniform limit.
    mean_is(w**2, 1 - (d - 1) * length / kappa if kappa else 1 / d)


@pytest.mark.slow
@pytest.mark.parametrize(("d", "kappa"), LAWS)
def test_von_mises_fisher_is_isotropic_around_its_mean(d, kappa):
    means = jnp.tile(directions(2, 1, d), (N, 1))
    x = np.asarray(latents.von_mises_fisher(KEY, means, kappa), np.float64)
    m = np.asarray(means[0], np.float64)
    # Two directions orthogonal to the mean.
    basis = np.linalg.svd(np.eye(d) - np.outer(m, m))[0][:, : min(d - 1, 2)]
    aside, w = x @ basis, x @ m
    for column in aside.T:
        mean_is(column, 0)
        mean_is(column * w, 0)
        if d > 2:  # on the circle this is 0 for every point
            mean_is(column**2 - (1 - w**2) / (d - 1), 0)


def test_on_the_circle_it_is_the_von_mises_law():
    angle = 2.0
    means = jnp.tile(jnp.asarray([[math.cos(angle), math.sin(angle)]]), (N, 1))
    x = np.asarray(latents.von_mises_fisher(KEY, means, 3.0), np.float64)
    turned = np.angle(np.exp(1j * (np.arctan2(x[:, 1], x[:, 0]) - angle)))
    # A Kolmogorov-Smirnov test of this level fails by chance as seldom as five standard errors do.
    assert scipy.stats.kstest(turned, scipy.stats.vonmises(3.0).cdf).pvalue > 1e-6


@pytest.mark.parametrize("kappa", [0.1, 4.0, 60.0])
def test_in_three_dimensions_the_cosine_has_its_closed_distribution_function(kappa):
    means = directions(3, N, 3)
    w = cosines(latents.von_mises_fisher(KEY, means, kappa), means)
    # p(w) is proportional to exp(kappa w) on [-1, 1].
    assert scipy.stats.kstest(w, lambda w: np.expm1(kappa * (w + 1)) / np.expm1(2 * kappa)).pvalue > 1e-6


def test_a_large_concentration_keeps_its_digits():
    # kappa |x - m|^2 tends to a chi-square with two degrees of freedom; w itself is 1 to five digits.
    means = directions(4, N, 3)
    gap = np.asarray(latents.von_mises_fisher(KEY, means, 1e5) - means, np.float64)
    mean_is(1e5 * np.sum(gap**2, axis=1), 2e5 * (1 - resultant(3, 1e5)))


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_means_along_the_axes_are_no_special_case(axis, sign):
    means = jnp.tile(sign * jnp.eye(3)[axis][None], (N, 1))
    mean_is(cosines(latents.von_mises_fisher(KEY, means, 2.0), means), resultant(3, 2.0))


@pytest.mark.slow
def test_von_mises_fisher_is_pure_in_the_key_and_keeps_the_dtype_also_with_a_traced_concentration(x64):
    means = directions(5, 50, 3)
    x = latents.von_mises_fisher(KEY, means, 3.0)
    assert means.dtype == x.dtype == jnp.float64
    traced = jax.jit(latents.von_mises_fisher)(KEY, means, jnp.asarray(3.0))
    # The same draws; the order of operations may differ when everything is compiled together.
    np.testing.assert_allclose(traced, x, atol=1e-12)
    assert not np.array_equal(x, latents.von_mises_fisher(jax.random.key(1), means, 3.0))
    single = latents.von_mises_fisher(KEY, means.astype(jnp.float32), 3.0)
    assert single.dtype == jnp.float32


@pytest.mark.slow
@pytest.mark.parametrize("marginal", [0.0, 4.0])
def test_pairs_have_the_stated_marginal_and_conditional(marginal):
    a, b, labels = latents.sphere_pairs(KEY, N, 3, concentration=6.0, marginal=marginal)
    assert labels is None and a.dtype == b.dtype == jnp.float32
    mean_is(a[:, 0], resultant(3, marginal))
    mean_is(a[:, 1], 0)
    w = cosines(a, b)
    mean_is(w, resultant(3, 6.0))
    # How close the partner is does not depend on where the latent is.
    mean_is((w - w.mean()) * (np.asarray(a[:, 0], np.float64) - resultant(3, marginal)), 0)
    # E b = A(kappa) E a, and for a uniform marginal b is uniform too.
    mean_is(b[:, 0], resultant(3, 6.0) * resultant(3, marginal))
    if marginal == 0:
        mean_is(np.asarray(b[:, 0], np.float64) ** 2, 1 / 3)


@pytest.mark.slow
def test_pairs_can_be_drawn_under_vmap_with_a_concentration_each():
    kappas = jnp.asarray([0.0, 5.0, 50.0])
    keys = jax.random.split(KEY, 3)
    a, b, _ = jax.vmap(lambda key, kappa: latents.sphere_pairs(key, N, 3, concentration=kappa))(keys, kappas)
    for i, kappa in enumerate([0.0, 5.0, 50.0]):
        mean_is(cosines(a[i], b[i]), resultant(3, kappa))


# Sources ------------------------------------------------------------------------------------------------------------


def moments(values, fourth):
    for column in np.asarray(values, np.float64).T:
        mean_is(column, 0)
        mean_is(column**2, 1)
        mean_is(column**4, fourth)


@pytest.mark.parametrize("shape", sources.SHAPES)
def test_independent_sources_have_variance_one_and_the_fourth_moment_of_their_shape(shape):
    s = sources.independent_sources(KEY, N, 2, shape=shape)
    moments(s, FOURTH[shape])
    mean_is(s[:, 0] * s[:, 1], 0)
    mean_is(s[1:, 0] * s[:-1, 0], 0)


def scales(spread):
    """Scale of every source in every segment, from two series that share their innovations."""
    changing, steady = (
        sources.modulated_sources(KEY, 16, 50, 3, spread=width, shape="uniform") for width in (spread, 0.0)
    )
    ratio = np.asarray(changing.values / steady.values).reshape(16, 50, 3)
    np.testing.assert_allclose(ratio, np.broadcast_to(ratio[:, :1], ratio.shape), rtol=1e-5)
    return ratio[:, 0], changing.segments


def test_modulated_sources_keep_their_scale_within_a_segment_and_their_variance_over_all():
    ratio, segments = scales(1.5)
    np.testing.assert_array_equal(segments, np.repeat(np.arange(16), 50))
    # Exactly equal up to the rounding of a quotient of float32 numbers.
    np.testing.assert_allclose(np.mean(ratio**2, axis=0), 1, rtol=1e-5)


def test_every_modulated_source_takes_the_same_levels_in_an_order_of_its_own():
    ratio, _ = scales(1.5)
    levels = np.sort(ratio, axis=0)
    np.testing.assert_allclose(levels, np.broadcast_to(levels[:, :1], levels.shape), rtol=1e-5)
    np.testing.assert_allclose(np.diff(np.log(levels), axis=0), 3 / 15, rtol=1e-4)
    orders = np.argsort(ratio, axis=0).T
    assert not any(np.array_equal(a, b) for a, b in itertools.combinations(orders, 2))


def test_without_spread_sources_are_stationary():
    series = sources.modulated_sources(KEY, 8, N // 8, 2, spread=0)
    moments(series.values, FOURTH["laplace"])


def test_one_segment_has_variance_one():
    moments(sources.modulated_sources(KEY, 1, N, 2, spread=2.0, shape="gaussian").values, 3.0)


@pytest.mark.parametrize("memory", [-0.6, 0.0, 0.7])
def test_autocorrelated_sources_forget_geometrically(memory):
    # Sources as replicates, so that the products are independent of each other.
    s = np.asarray(sources.autocorrelated_sources(KEY, 6, N, memory=memory), np.float64)
    for lag in range(4):
        mean_is(s[0] * s[lag], memory**lag)


@pytest.mark.parametrize("shape", sources.SHAPES)
def test_autocorrelated_sources_are_stationary_from_the_first_time_on(shape):
    rho = 0.7
    s = sources.autocorrelated_sources(KEY, 5, N, memory=rho, shape=shape)
    # Cumulants of independent terms add: the excess of the sum is (1 - rho^2)^2 / (1 - rho^4) of the innovations'.
    expected = 3 + (FOURTH[shape] - 3) * (1 - rho**2) / (1 + rho**2)
    for time in (0, 4):
        moments(np.asarray(s)[time][:, None], expected)


def test_innovations_have_their_shape_and_are_independent_of_the_past():
    rho = 0.7
    s = np.asarray(sources.autocorrelated_sources(KEY, 2, N, memory=rho), np.float64)
    innovations = (s[1] - rho * s[0]) / math.sqrt(1 - rho**2)
    moments(innovations[:, None], FOURTH["laplace"])
    mean_is((innovations**2 - 1) * (s[0] ** 2 - 1), 0)


def test_sources_are_pure_in_the_key_and_follow_the_default_dtype(x64):
    for draw in (
        lambda key: sources.independent_sources(key, 9, 2),
        lambda key: sources.modulated_sources(key, 3, 3, 2, spread=1.0).values,
        lambda key: sources.autocorrelated_sources(key, 9, 2, memory=0.5),
    ):
        first = draw(KEY)
        assert first.shape == (9, 2) and first.dtype == jnp.float64
        np.testing.assert_array_equal(first, draw(KEY))
        assert not np.array_equal(first, draw(jax.random.key(1)))


# Generators ---------------------------------------------------------------------------------------------------------


@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 2**31 - 1),
    depth=st.integers(1, 3),
    leak=st.floats(0.05, 1.0),
    sharpness=st.floats(0.1, 100.0),
    condition=st.floats(1.0, 10.0),
    scale=st.floats(1e-2, 10.0),
)
def test_a_generator_stretches_every_distance_within_its_bounds(seed, depth, leak, sharpness, condition, scale):
    with jax.enable_x64(True):
        for_map, for_points = jax.random.split(jax.random.key(seed))
        options = {"outputs": 5, "depth": depth, "leak": leak, "sharpness": sharpness, "condition": condition}
        generator = latents.smooth_generator(for_map, 3, **options)
        z = scale * jax.random.normal(for_points, (40, 3))
        x = np.asarray(latents.generate(generator, z))
    assert x.shape == (40, 5)
    pairs = np.triu_indices(40, 1)
    before, after = (np.linalg.norm(a[pairs[0]] - a[pairs[1]], axis=1) for a in (np.asarray(z), x))
    # Rounding of float64, relative to the size of the points, which is at most some hundred times their distance.
    assert np.all(after <= before * (1 + 1e-12) + 1e-12)
    assert np.all(after >= before * leak ** (depth - 1) / condition**depth * (1 - 1e-9))


def test_every_weight_has_the_stated_singular_values():
    generator = latents.smooth_generator(KEY, 3, outputs=6, depth=3, condition=4.0)
    assert [w.shape for w in generator.weights] == [(3, 3), (3, 3), (6, 3)]
    for weight in generator.weights:
        np.testing.assert_allclose(np.linalg.svd(weight)[1], [1, 0.5, 0.25], rtol=1e-5)


def test_bent_slopes_run_from_the_leak_to_one():
    # Of one latent all weights are +1 or -1, so that slopes of g are those of the nonlinearity, up to sign.
    generator = latents.smooth_generator(KEY, 1, depth=2, leak=0.3, sharpness=5.0)
    slope = jax.vmap(jax.grad(lambda t: latents.generate(generator, t[None, None])[0, 0]))
    far = np.sort(np.abs(slope(jnp.asarray([-20.0, 0.0, 20.0]))))
    np.testing.assert_allclose(far, [0.3, 0.65, 1.0], rtol=1e-5)


@pytest.mark.parametrize("options", [{"depth": 1}, {"depth": 3, "leak": 1}])
def test_without_a_bend_a_generator_is_linear(options, x64):
    generator = latents.smooth_generator(KEY, 4, **options)
    z = jax.random.normal(jax.random.key(1), (10, 4))
    images = np.asarray(latents.generate(generator, jnp.eye(4)))
    np.testing.assert_allclose(latents.generate(generator, z), np.asarray(z) @ images, atol=1e-14)


def test_a_bent_generator_is_not_linear():
    generator = latents.smooth_generator(KEY, 4, depth=2, sharpness=5.0)
    z = jax.random.normal(jax.random.key(1), (500, 4))
    x = np.asarray(latents.generate(generator, z), np.float64)
    design = np.column_stack([z, np.ones(500)]).astype(np.float64)
    residual = x - design @ np.linalg.lstsq(design, x, rcond=None)[0]
    assert np.sum(residual**2) > 0.01 * np.sum((x - x.mean(axis=0)) ** 2)


def test_generators_can_be_drawn_and_applied_under_vmap():
    keys = jax.random.split(KEY, 3)
    z = directions(6, 7, 3)
    many = jax.vmap(lambda key: latents.smooth_generator(key, 3))(keys)
    x = jax.vmap(latents.generate, (0, None))(many, z)
    for i, key in enumerate(keys):
        # The same weights up to the rounding of a batched factorisation.
        np.testing.assert_allclose(x[i], latents.generate(latents.smooth_generator(key, 3), z), atol=1e-5)


# Bad input ----------------------------------------------------------------------------------------------------------

UNIT = jnp.eye(2, 3)


@pytest.mark.parametrize(("call", "message"), [
    (lambda: latents.uniform_on_sphere(KEY, 0, 3), "count must be at least 1, got 0"),
    (lambda: latents.von_mises_fisher(KEY, jnp.ones((2, 1)), 1.0), "a sphere is two points: give at least 2"),
    (lambda: latents.von_mises_fisher(KEY, 2 * UNIT, 1.0), "rows of norm 1: divide each by its norm"),
    (lambda: latents.von_mises_fisher(KEY, UNIT * jnp.nan, 1.0), "rows of norm 1"),
    (lambda: latents.von_mises_fisher(KEY, UNIT, -1.0), "concentration must be a finite number >= 0, got -1.0: 0 is"),
    (lambda: latents.von_mises_fisher(KEY, UNIT, math.inf), "concentration must be a finite number >= 0, got inf"),
    (lambda: latents.sphere_pairs(KEY, 2, 1, concentration=1.0), "dim must be at least 2, got 1"),
    (lambda: latents.sphere_pairs(KEY, 0, 3, concentration=1.0), "count must be at least 1, got 0"),
    (lambda: latents.sphere_pairs(KEY, 2, 3, concentration=math.nan), "concentration must be a finite number"),
    (lambda: latents.sphere_pairs(KEY, 2, 3, concentration=1.0, marginal=-2), "marginal must be a finite number >= 0"),
    (lambda: sources.independent_sources(KEY, 2, 0), "dim must be at least 1, got 0"),
    (lambda: sources.independent_sources(KEY, 2, 2, shape="cauchy"), "'cauchy': use one of laplace, uniform, gauss"),
    (lambda: sources.modulated_sources(KEY, 0, 2, 2, spread=1.0), "segments must be at least 1, got 0"),
    (lambda: sources.modulated_sources(KEY, 2, 2, 2, spread=-1.0), "spread must be a finite number >= 0, got -1.0"),
    (lambda: sources.autocorrelated_sources(KEY, 2, 2, memory=1), r"memory must lie inside \(-1, 1\), got 1: from 1"),
    (lambda: sources.autocorrelated_sources(KEY, 2, 2, memory=math.nan), r"memory must lie inside \(-1, 1\), got nan"),
    (lambda: latents.smooth_generator(KEY, 3, outputs=2), "2 outputs cannot hold 3 latents.*use outputs >= dim"),
    (lambda: latents.smooth_generator(KEY, 3, depth=0), "depth must be at least 1, got 0"),
    (lambda: latents.smooth_generator(KEY, 3, leak=0), r"leak must lie in \(0, 1\], got 0"),
    (lambda: latents.smooth_generator(KEY, 3, sharpness=0), "sharpness must be finite and positive, got 0"),
    (lambda: latents.smooth_generator(KEY, 3, condition=0.5), "condition must be finite and at least 1, got 0.5"),
])  # fmt: skip
def test_impossible_settings_are_errors_with_a_remedy(call, message):
    with pytest.raises(ValueError, match=message):
        call()
