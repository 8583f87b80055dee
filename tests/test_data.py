"""The data: their shapes and laws, and every way in which a file can be wrong."""

import itertools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from theorykit import data

KEY = jax.random.key(0)
# Monte Carlo values lie within five standard errors of their law: by chance they leave them once in 1.7 million.
ERRORS = 5
NOTHING = {"shift": 0, "rotation": 0, "noise": 0, "mask": 0}


# Imports ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_digits_are_read_without_importing_scikit_learn():
    use = "data.load('digits'), data.gaussian_pairs, data.digits(), data.source_files('digits')"
    code = f"import sys; from theorykit import data; {use}; print('sklearn' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_importing_the_package_imports_no_submodule():
    code = "import sys, theorykit.data; print([m for m in sys.modules if m.startswith('theorykit.data.')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_public_name_resolves_and_the_function_digits_wins_over_its_module():
    assert all(callable(getattr(data, name)) for name in data.__all__)
    assert sorted(dir(data)) == sorted(data.__all__)
    assert isinstance(data.digits(), data.Labelled)


# Digits -------------------------------------------------------------------------------------------------------------


def test_digits_are_those_of_scikit_learn():
    from sklearn.datasets import load_digits

    images, labels = data.digits()
    assert images.shape == (1797, 64) and images.dtype == np.float32
    assert labels.shape == (1797,) and labels.dtype == np.int32
    assert images.min() == 0 and images.max() == 1
    np.testing.assert_array_equal(images.reshape(-1, 8, 8) * 16, load_digits().images)
    np.testing.assert_array_equal(labels, load_digits().target)


def test_digits_are_read_once_and_cannot_be_changed_for_others():
    assert data.digits() is data.digits()
    with pytest.raises(ValueError, match="read-only"):
        data.digits().inputs[0, 0] = 1


def test_augmentation_of_no_strength_is_the_identity():
    images = data.digits().inputs[:300]  # more than are warped at once
    np.testing.assert_array_equal(data.augment(KEY, images, **NOTHING), images)


def test_augmentation_of_no_strength_is_the_identity_in_float64(x64):
    images = data.digits().inputs[:3].astype(np.float64)
    augmented = data.augment(KEY, images, **NOTHING)
    assert augmented.dtype == jnp.float64
    np.testing.assert_array_equal(augmented, images)


@pytest.mark.parametrize(("shift", "angle", "expected"), [
    ((1.0, 0.0), 0.0, lambda x: np.pad(x, ((1, 0), (0, 0)))[:-1]),
    ((0.0, -2.0), 0.0, lambda x: np.pad(x, ((0, 0), (0, 2)))[:, 2:]),
    ((0.5, 0.0), 0.0, lambda x: (x + np.pad(x, ((1, 0), (0, 0)))[:-1]) / 2),
    ((0.0, 0.0), np.pi / 2, lambda x: np.rot90(x)),
    ((0.0, 0.0), np.pi, lambda x: np.rot90(x, 2)),
    ((1.0, 0.0), np.pi / 2, lambda x: np.pad(np.rot90(x), ((1, 0), (0, 0)))[:-1]),
])  # fmt: skip
def test_warping_moves_pixels_as_shifts_and_quarter_turns_do(shift, angle, expected):
    data.augment  # noqa: B018  (loads the submodule)
    warp = sys.modules["theorykit.data.digits"]._warp
    image = np.asarray(jax.random.uniform(KEY, (5, 5)))
    warped = warp(jnp.asarray(image), jnp.asarray(shift), jnp.asarray(angle, jnp.float32)).reshape(5, 5)
    # A position in 0..5 is rounded by a few eps, and the slope of the interpolation is at most 1 along each axis.
    np.testing.assert_allclose(warped, expected(image), rtol=0, atol=40 * np.finfo(np.float32).eps)


def test_rotation_stays_within_its_bound_and_turns_both_ways():
    # One bright pixel right of the centre; the sign of the mean row tells which way it went.
    image = np.zeros((9, 9), np.float32)
    image[4, 7] = 1
    turned = data.augment(KEY, np.tile(image.reshape(1, -1), (200, 1)), **NOTHING | {"rotation": 10}).reshape(-1, 9, 9)
    rows = np.asarray(jnp.einsum("nij,i->n", turned, jnp.arange(9.0)) / turned.sum((1, 2)) - 4)
    # The hat functions spread a point over its neighbours without moving its mean by more than their width.
    assert rows.min() < 0 < rows.max()
    assert np.abs(rows).max() <= 3 * np.sin(np.deg2rad(10)) + 0.5


def test_noise_and_mask_have_the_stated_strength():
    blank = np.ones((300, 64), np.float32)
    noisy = np.asarray(data.augment(KEY, blank, **NOTHING | {"noise": 0.3})) - 1
    size = noisy.size
    assert abs(noisy.mean()) <= ERRORS * 0.3 / np.sqrt(size)
    assert abs(noisy.std() - 0.3) <= ERRORS * 0.3 / np.sqrt(2 * size)
    lost = np.asarray(data.augment(KEY, blank, **NOTHING | {"mask": 0.2})) == 0
    assert abs(lost.mean() - 0.2) <= ERRORS * np.sqrt(0.2 * 0.8 / size)


def test_views_are_a_pure_function_of_the_key():
    first, again = data.digit_views(KEY, 300), data.digit_views(KEY, 300)
    other = data.digit_views(jax.random.key(1), 300)
    for x, y, z in zip(first, again, other, strict=True):
        np.testing.assert_array_equal(x, y)
        assert not np.array_equal(x, z)


def test_the_two_views_of_a_digit_differ_but_share_the_image_and_the_label():
    views = data.digit_views(KEY, 300)
    assert views.a.shape == views.b.shape == (300, 64)
    assert views.a.dtype == views.b.dtype == jnp.float32 and views.labels.dtype == jnp.int32
    assert np.all(np.any(np.asarray(views.a != views.b), axis=1))
    same = jnp.sum((views.a - views.b) ** 2, axis=1)
    different = jnp.sum((views.a - jnp.roll(views.b, 1, axis=0)) ** 2, axis=1)
    gain = np.asarray(different - same)
    assert gain.mean() > ERRORS * gain.std() / np.sqrt(len(gain))


def test_without_augmentation_both_views_are_digits_drawn_once_each_with_their_labels():
    a, b, labels = data.digit_views(KEY, 300, **NOTHING)
    np.testing.assert_array_equal(a, b)
    rows = {(image.tobytes(), int(label)) for image, label in zip(*data.digits(), strict=True)}
    drawn = {(image.tobytes(), int(label)) for image, label in zip(np.asarray(a), np.asarray(labels), strict=True)}
    assert len(drawn) == 300 and drawn <= rows
    assert not np.array_equal(a, data.digits().inputs[:300])


def test_halves_concatenate_to_the_image():
    left, right, labels = data.digit_halves(KEY, 50)
    assert left.shape == right.shape == (50, 32)
    whole = np.concatenate([np.asarray(half).reshape(50, 8, 4) for half in (left, right)], axis=2).reshape(50, 64)
    images, all_labels = data.digits()
    index = [int(np.flatnonzero((images == row[None, :]).all(axis=1))[0]) for row in whole]
    np.testing.assert_array_equal(labels, all_labels[np.asarray(index)])
    assert len(set(index)) == 50


@pytest.mark.parametrize("make", [data.digit_views, data.digit_halves])
@pytest.mark.parametrize("count", [0, 1798])
def test_more_digits_than_there_are_is_an_error(make, count):
    with pytest.raises(ValueError, match=rf"between 1 and 1797.*got {count}: ask for fewer"):
        make(KEY, count)


@pytest.mark.parametrize(("strength", "message"), [
    ({"shift": -1}, "shift must be a finite number >= 0, got -1: use 0"),
    ({"noise": float("nan")}, "noise must be a finite number >= 0, got nan: use 0"),
    ({"rotation": 200}, "rotation is the largest angle.*at most 180, got 200"),
    ({"mask": 1}, "mask is the probability.*got 1: use a value below 1"),
])  # fmt: skip
def test_an_impossible_strength_is_an_error(strength, message):
    with pytest.raises(ValueError, match=message):
        data.digit_views(KEY, 2, **strength)


@pytest.mark.parametrize("shape", [(3, 63), (0, 64)])
def test_rows_that_are_no_square_images_are_an_error(shape):
    with pytest.raises(ValueError, match=r"side\^2 grey pixels.*flatten square images"):
        data.augment(KEY, np.zeros(shape, np.float32), **NOTHING)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("convert", [np.asarray, jnp.asarray])
def test_images_that_are_not_finite_are_an_error_that_names_the_row(value, convert):
    images = np.zeros((3, 4), np.float32)
    images[1, 2] = value
    with pytest.raises(ValueError, match="row 1 of images is not finite: remove that row, or repair its pixels"):
        data.augment(KEY, convert(images), **NOTHING)


# The sphere ---------------------------------------------------------------------------------------------------------


def test_rows_on_the_sphere_keep_their_direction_and_have_length_root_d():
    x = data.digits().inputs
    y = data.to_sphere(x)
    assert y.dtype == jnp.float32
    # A sum of 64 squares, a root and a quotient, each rounded.
    np.testing.assert_allclose(np.linalg.norm(y, axis=1), 8, rtol=64 * np.finfo(np.float32).eps)
    cosine = np.sum(np.asarray(y) * x, axis=1) / (8 * np.linalg.norm(x, axis=1))
    np.testing.assert_allclose(cosine, 1, rtol=64 * np.finfo(np.float32).eps)


def test_scaling_to_the_sphere_ignores_the_units_even_where_squares_overflow():
    x = data.digits().inputs[:5]
    for scale in (2.0**100, 2.0**-100):
        np.testing.assert_array_equal(data.to_sphere(x * np.float32(scale)), data.to_sphere(x))


@pytest.mark.parametrize(
    ("value", "message"), [(0, "row 2 of x is zero.*remove that row"), (np.inf, "row 2 of x is not finite: remove")]
)
def test_a_row_that_has_no_direction_is_named(value, message):
    x = np.ones((4, 3), np.float32)
    x[2] = value
    with pytest.raises(ValueError, match=message):
        data.to_sphere(x)


# Gaussian pairs -----------------------------------------------------------------------------------------------------


def covariance(key, size):
    root = jax.random.normal(key, (size, size))
    return np.asarray(jnp.matmul(root, root.T, precision="highest"))


def joint_covariance(pairs):
    joint = np.concatenate([np.asarray(pairs.a, np.float64), np.asarray(pairs.b, np.float64)], axis=1)
    return joint.T @ joint / len(joint)


def test_empirical_covariances_match_to_monte_carlo_error():
    cov_a, cov_b = covariance(jax.random.key(1), 3), covariance(jax.random.key(2), 4)
    unit = np.asarray(data.cross_from_correlations(KEY, [0.9, 0.5], 3, 4))
    cross = (np.linalg.cholesky(cov_a) @ unit @ np.linalg.cholesky(cov_b).T).astype(np.float32)
    n = 50_000
    measured = joint_covariance(data.gaussian_pairs(KEY, n, cross=cross, cov_a=cov_a, cov_b=cov_b))
    expected = np.block([[cov_a, cross], [cross.T, cov_b]])
    variances = np.diag(expected)
    # Var(x_i x_j) = S_ii S_jj + S_ij^2 for a centred Gaussian (Isserlis).
    error = np.sqrt((variances[:, None] * variances[None, :] + expected**2) / n)
    assert np.all(np.abs(measured - expected) <= ERRORS * error)


def test_cross_covariance_has_the_prescribed_singular_values():
    cross = data.cross_from_correlations(KEY, jnp.asarray([1.0, 0.7, 0.2]), 5, 4)
    assert cross.shape == (5, 4)
    # Singular values move by at most the norm of the rounding: a few eps for each of the orthonormal factors.
    np.testing.assert_allclose(np.linalg.svd(cross)[1], [1, 0.7, 0.2, 0], atol=20 * np.finfo(np.float32).eps)


def test_canonical_correlations_are_recovered_from_samples():
    rho, n = np.asarray([0.9, 0.6, 0.3]), 40_000
    s = joint_covariance(data.gaussian_pairs(KEY, n, cross=data.cross_from_correlations(KEY, rho.tolist(), 4, 3)))
    whiten_a, whiten_b = np.linalg.cholesky(s[:4, :4]), np.linalg.cholesky(s[4:, 4:])
    measured = np.linalg.svd(np.linalg.solve(whiten_a, np.linalg.solve(whiten_b, s[:4, 4:].T).T))[1]
    # Asymptotic standard error of a simple sample canonical correlation: (1 - rho^2)/sqrt n (Hotelling 1936).
    assert np.all(np.abs(measured - rho) <= ERRORS * (1 - rho**2) / np.sqrt(n))


def test_a_correlation_of_one_makes_the_views_agree_exactly_up_to_rounding():
    pairs = data.gaussian_pairs(KEY, 1000, cross=np.eye(3, dtype=np.float32))
    np.testing.assert_allclose(pairs.a, pairs.b, rtol=0, atol=50 * np.finfo(np.float32).eps)
    # The same along one direction only, of a cross-covariance that is itself rounded, in unlike units.
    cross = np.asarray(data.cross_from_correlations(KEY, [1.0, 0.4], 4, 3))
    pairs = data.gaussian_pairs(KEY, 1000, cross=1000 * cross, cov_a=1e6 * np.eye(4, dtype=np.float32))
    u, _, vt = np.linalg.svd(cross)
    gap = np.asarray(pairs.a) @ u[:, 0] / 1000 - np.asarray(pairs.b) @ vt[0]
    # The null direction of the joint is known to within size * eps, and samples are below 6 along each axis.
    assert np.abs(gap).max() <= 6 * 7**1.5 * np.finfo(np.float32).eps


def test_singular_covariances_are_allowed():
    cov_a = np.asarray([[1, 1, 0], [1, 1, 0], [0, 0, 0]], np.float32)
    pairs = data.gaussian_pairs(KEY, 200, cross=np.asarray([[0.5], [0.5], [0]], np.float32), cov_a=cov_a)
    np.testing.assert_allclose(pairs.a[:, 0], pairs.a[:, 1], rtol=0, atol=50 * np.finfo(np.float32).eps)
    np.testing.assert_array_equal(pairs.a[:, 2], 0)


def test_gaussian_pairs_are_pure_in_the_key_and_keep_the_dtype(x64):
    cross = data.cross_from_correlations(KEY, [0.5], 2, 2)
    assert cross.dtype == jnp.float64
    pairs = data.gaussian_pairs(KEY, 5, cross=cross)
    assert pairs.a.dtype == pairs.b.dtype == jnp.float64 and pairs.labels is None
    np.testing.assert_array_equal(pairs.a, data.gaussian_pairs(KEY, 5, cross=cross).a)
    assert not np.array_equal(pairs.a, data.gaussian_pairs(jax.random.key(1), 5, cross=cross).a)
    assert data.gaussian_pairs(KEY, 5, cross=cross.astype(jnp.float32)).a.dtype == jnp.float32


EYE = np.eye(2, dtype=np.float32)


@pytest.mark.parametrize(("arguments", "message"), [
    ({"cross": 1.25 * EYE}, r"largest canonical correlation is 1\.25, more than 1\. Multiply cross by 0\.8 or less"),
    # Units do not hide it: covariance 2e-4 of deviations 1e-4 and 1 is a correlation of 2.
    ({"cross": 2e-4 * EYE, "cov_a": 1e-8 * EYE}, r"canonical correlation is 2, more than 1\. Multiply cross by 0\.5"),
    ({"cross": 0.1 * EYE, "cov_a": np.diag(np.float32([1, 0]))}, "no variance.*project cross onto the ranges"),
    ({"cross": 0.1 * EYE, "cov_a": np.ones((2, 2), np.float32)}, "no variance.*project cross onto the ranges"),
    ({"cross": EYE, "cov_b": np.float32([[1, 2], [2, 1]])}, "cov_b is not positive semidefinite.*-1.*M M"),
    ({"cross": EYE, "cov_b": np.float32([[1, 0.5], [0, 1]])}, r"cov_b is not symmetric: use \(cov_b"),
    ({"cross": EYE, "cov_b": np.eye(3, dtype=np.float32)}, r"cov_b has shape \(3, 3\), cross needs \(2, 2\)"),
    ({"cross": EYE, "cov_a": np.full((2, 2), np.float32(np.nan))}, "cov_a is not finite"),
    ({"cross": np.full((2, 2), np.float32(np.inf))}, "cross is not finite"),
    ({"cross": EYE, "count": 0}, "count must be at least 1, got 0"),
])  # fmt: skip
def test_an_impossible_gaussian_is_an_error_with_a_remedy(arguments, message):
    with pytest.raises(ValueError, match=message):
        data.gaussian_pairs(KEY, **{"count": 3} | arguments)


def test_the_remedy_for_an_impossible_cross_covariance_works():
    assert data.gaussian_pairs(KEY, 3, cross=0.8 * 1.25 * EYE).a.shape == (3, 2)


@pytest.mark.parametrize(("arguments", "message"), [
    (([0.5, 1.5], 2, 2), r"must lie in \[0, 1\], got \[0.5, 1.5\]"),
    (([-0.5], 2, 2), r"must lie in \[0, 1\].*a sign belongs to the directions"),
    (([float("nan")], 2, 2), r"must lie in \[0, 1\]"),
    (([0.5] * 3, 2, 4), "3 correlations.*at most 2: give fewer"),
    (([], 0, 4), "at least 1, got 0 and 4"),
])  # fmt: skip
def test_impossible_canonical_correlations_are_an_error(arguments, message):
    with pytest.raises(ValueError, match=message):
        data.cross_from_correlations(KEY, *arguments)


# Latent clusters ----------------------------------------------------------------------------------------------------

CLUSTERS = {"clusters": 4, "dim": 6, "separation": 3.0, "noise": 0.5, "offset": 0.7}


def test_without_noise_both_views_are_the_centres_of_their_cluster_a_regular_simplex():
    a, b, labels = data.latent_clusters(KEY, 20_000, **CLUSTERS | {"noise": 0, "offset": 0})
    np.testing.assert_array_equal(a, b)
    centres = np.stack([np.asarray(a)[np.asarray(labels) == c][0] for c in range(4)])
    np.testing.assert_array_equal(a, centres[np.asarray(labels)])
    for m, n in itertools.combinations(centres, 2):
        np.testing.assert_allclose(np.linalg.norm(m - n), 3, rtol=20 * np.finfo(np.float32).eps)
    np.testing.assert_allclose(centres.sum(axis=0), 0, atol=20 * 3 * np.finfo(np.float32).eps)


def test_both_views_share_the_cluster_and_the_offset():
    # With the offset as the only spread, the views agree within a cluster that is itself spread out.
    a, b, labels = data.latent_clusters(KEY, 20_000, **CLUSTERS | {"noise": 0})
    np.testing.assert_array_equal(a, b)
    assert len(np.unique(np.asarray(a), axis=0)) == 20_000 and labels.dtype == jnp.int32


def test_distances_within_and_between_clusters_match_their_closed_form():
    a, b, labels = (np.asarray(x) for x in data.latent_clusters(KEY, 20_000, **CLUSTERS))
    within_pair, spread = 2 * 0.5**2 * 6, 2 * (0.5**2 + 0.7**2) * 6

    def check(squares, expected):
        assert abs(squares.mean() - expected) <= ERRORS * squares.std() / np.sqrt(len(squares))

    check(np.sum((a - b) ** 2, axis=1), within_pair)
    # Consecutive rows two by two, so that the distances are independent.
    squares, same = np.sum((a[::2] - a[1::2]) ** 2, axis=1), labels[::2] == labels[1::2]
    check(squares[same], spread)
    check(squares[~same], spread + 3.0**2)


@pytest.mark.parametrize("weights", [None, [1, 2, 3, 0]])
def test_clusters_come_with_their_frequencies(weights):
    n = 20_000
    labels = np.asarray(data.latent_clusters(KEY, n, **CLUSTERS, weights=weights).labels)
    p = np.ones(4) / 4 if weights is None else np.asarray(weights) / 6
    frequency = np.bincount(labels, minlength=4) / n
    assert np.all(np.abs(frequency - p) <= ERRORS * np.sqrt(p * (1 - p) / n))


def test_clusters_are_pure_in_the_key_and_follow_the_default_dtype(x64):
    first, again = data.latent_clusters(KEY, 9, **CLUSTERS), data.latent_clusters(KEY, 9, **CLUSTERS)
    for x, y in zip(first, again, strict=True):
        np.testing.assert_array_equal(x, y)
    assert first.a.dtype == jnp.float64 and first.labels.dtype == jnp.int32
    assert not np.array_equal(first.a, data.latent_clusters(jax.random.key(1), 9, **CLUSTERS).a)


@pytest.mark.parametrize(("arguments", "message"), [
    ({"clusters": 7}, "7 equidistant clusters do not fit in dimension 6: use dim >= 7"),
    ({"clusters": 0}, "at least 1"),
    ({"count": 0}, "at least 1"),
    ({"separation": -1.0}, "separation must be a finite number >= 0"),
    ({"noise": float("inf")}, "noise must be a finite number >= 0"),
    ({"weights": [1, 1]}, "one weight for each of the 4 clusters"),
    ({"weights": [0, 0, 0, 0]}, "not all 0"),
    ({"weights": [1, 1, 1, -1]}, "weights must be finite, >= 0"),
])  # fmt: skip
def test_impossible_clusters_are_an_error(arguments, message):
    with pytest.raises(ValueError, match=message):
        data.latent_clusters(KEY, **{"count": 3} | CLUSTERS | arguments)
