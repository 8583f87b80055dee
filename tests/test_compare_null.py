"""Null distributions of comparisons against their exact laws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
import scipy.optimize
import scipy.stats
from comparing import close

from theorykit.spectral.compare import (
    effective_rank,
    linear_cka,
    linear_fit,
    mean_correlation,
    null,
    null_distances,
    principal_angles,
    procrustes,
    random_features,
    random_subspaces,
    spectrum_overlap,
)


def within_noise(samples, expected):
    """The mean is the expected one to 4.5 standard errors: 7 in a million by chance, and the key is fixed."""
    samples = np.asarray(samples, np.float64)
    assert abs(samples.mean() - expected) < 4.5 * samples.std(ddof=1) / np.sqrt(len(samples))


def fits_law(samples, law):
    """Kolmogorov-Smirnov does not reject; one in a thousand by chance, and the key is fixed."""
    assert scipy.stats.kstest(np.asarray(samples, np.float64), law.cdf).pvalue > 1e-3


@pytest.mark.slow
def test_random_subspaces_are_orthonormal_and_their_mean_projector_is_that_of_haar():
    bases = random_subspaces(jax.random.key(0), 4, 2, 2000)
    close(jnp.swapaxes(bases, 1, 2) @ bases, np.broadcast_to(np.eye(2), (2000, 2, 2)))
    fits_law(bases[:, 0, 0] ** 2, scipy.stats.beta(1 / 2, 3 / 2))
    # Without the signs of R the first entry would have one sign only.
    within_noise(bases[:, 0, 0], 0.0)
    within_noise(jnp.linalg.det(random_subspaces(jax.random.key(1), 3, 3, 2000)), 0.0)


@pytest.mark.slow
@pytest.mark.parametrize(("d", "k"), [(5, 1), (10, 3)])
def test_mean_overlap_and_mean_squared_distance_of_random_subspaces_are_exact(d, k):
    within_noise(null(jax.random.key(0), spectrum_overlap, (d, k, k), 1000), k / d)
    within_noise(null_distances(jax.random.key(1), d, k, 1000) ** 2, k * (1 - k / d))


def cosine_squared(u, v):
    return jnp.cos(principal_angles(u, v)[0]) ** 2


def extremes(u, v):
    return principal_angles(u, v)[jnp.asarray([0, -1])]


def test_a_random_line_makes_an_angle_of_known_law_with_a_random_subspace():
    fits_law(null(jax.random.key(0), cosine_squared, (7, 3, 1), 1000), scipy.stats.beta(3 / 2, 4 / 2))


def test_subspaces_that_must_meet_have_smallest_angle_zero_and_largest_angles_vary():
    smallest, largest = null(jax.random.key(0), extremes, (5, 3, 3), 100).T
    close(smallest, np.zeros(100))
    assert jnp.std(largest) > 0.05


@pytest.mark.slow
def test_null_of_r2_of_one_target_is_a_beta_law():
    n, p = 12, 3
    values = null(jax.random.key(0), r_squared, (n, p, 1), 1000, draw=random_features)
    fits_law(values, scipy.stats.beta(p / 2, (n - 1 - p) / 2))
    within_noise(null(jax.random.key(1), r_squared, (n, p, 4), 1000, draw=random_features), p / (n - 1))


def r_squared(x, y):
    return linear_fit(x, y).r2


def debiased_cka(x, y):
    return linear_cka(x, y, debiased=True)


def correlation(x, y):
    return mean_correlation(x, y).value


@pytest.mark.slow
@pytest.mark.parametrize(("n", "p", "q"), [(12, 3, 2), (8, 20, 5)])
def test_null_of_debiased_cka_has_mean_zero_and_that_of_plain_cka_its_ratio_of_means(n, p, q):
    within_noise(null(jax.random.key(0), debiased_cka, (n, p, q), 1000, draw=random_features), 0.0)
    plain = null(jax.random.key(1), linear_cka, (100, p, q), 100, draw=random_features)
    expected = np.sqrt(p * q / ((100 + p) * (100 + q)))
    # A ratio of means differs from the mean of ratios by the relative variances of the norms, of order 1/(n p).
    np.testing.assert_allclose(plain.mean(), expected, rtol=5 * np.std(plain) / expected / 10 + 1 / (100 * min(p, q)))


@pytest.mark.slow
def test_null_of_the_correlation_of_single_sources_is_a_beta_law_and_more_sources_raise_it():
    n = 12
    one = null(jax.random.key(0), correlation, (n, 1, 1), 1000, draw=random_features)
    fits_law(one**2, scipy.stats.beta(1 / 2, (n - 2) / 2))
    many = null(jax.random.key(0), correlation, (n, 6, 6), 200, draw=random_features)
    assert jnp.mean(many) > jnp.mean(one) + 0.1


def residual_squared(x, y):
    return procrustes(x, y).residual ** 2


@pytest.mark.slow
def test_null_of_the_procrustes_residual_is_a_beta_law_for_one_feature_and_has_its_exact_mean_for_two():
    n = 8
    one = null(jax.random.key(0), residual_squared, (n, 1, 1), 1000, draw=random_features)
    fits_law(one, scipy.stats.beta((n - 1) / 2, 1 / 2))
    # 1 - (s1 + s2)^2 / (|X|^2 |Y|^2) with (s1 + s2)^2 = |X^T Y|^2 + 2 |det X^T Y|, of means 4 n and 2 (n - 1) over
    # that of the denominator, (2 n)^2: the ratio is independent of the lengths.
    two = null(jax.random.key(1), residual_squared, (n, 2, 2), 1000, draw=random_features)
    within_noise(two, 1 - (6 * n - 2) / (2 * n) ** 2)


def rank_of_the_first(x, _):
    return effective_rank(x)


@pytest.mark.parametrize("n", [2, 6])
def test_null_of_the_effective_rank_of_two_features_has_its_exact_law(n):
    """With s1 = r cos(phi), s2 = r sin(phi) the Wishart density gives sin(2 phi)^(n - 1) uniform on [0, 1]."""
    found = null(jax.random.key(0), rank_of_the_first, (n, 2, 1), 1000, draw=random_features)
    phi = np.linspace(1e-9, np.pi / 4, 100_001)
    q = np.cos(phi) / (np.cos(phi) + np.sin(phi))
    ranks = np.exp(-q * np.log(q) - (1 - q) * np.log1p(-q))  # rises with phi, from 1 to 2
    fits_law(np.interp(found, ranks, np.sin(2 * phi) ** (n - 1)), scipy.stats.uniform())


def test_null_draws_are_reproducible_and_independent():
    first, again = (null_distances(jax.random.key(0), 6, 2, 50) for _ in range(2))
    np.testing.assert_array_equal(first, again)
    assert len(np.unique(first)) == 50
    assert not np.allclose(first, null_distances(jax.random.key(1), 6, 2, 50))
