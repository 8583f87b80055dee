"""Comparisons of representations: dense references, known values, what changes nothing and what does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
import scipy.optimize
import scipy.stats
from comparing import close, haar, invertible, normal

from theorykit.spectral.compare import (
    distance_from_orthogonality,
    effective_rank,
    linear_cka,
    linear_fit,
    mean_correlation,
    orthonormal_basis,
    principal_angles,
    procrustes,
    projector_distance,
    random_subspaces,
    spectrum_overlap,
)

SUBSPACE_MEASURES = [principal_angles, projector_distance, spectrum_overlap]


def with_angles(angles, d, seed=0):
    """Two subspaces of R^d, 2k <= d, with the given principal angles, in a random position and in random bases."""
    k = len(angles)
    angles = np.asarray(angles, np.float64)
    u, v = np.zeros((d, k)), np.zeros((d, k))
    u[:k] = np.eye(k)
    v[:k], v[k : 2 * k] = np.diag(np.cos(angles)), np.diag(np.sin(angles))
    return jnp.asarray(haar(seed, d) @ u @ haar(seed + 1, k)), jnp.asarray(haar(seed, d) @ v @ haar(seed + 2, k))


# ---------------------------------------------------------------- subspaces


@pytest.mark.slow
@pytest.mark.parametrize(("d", "k1", "k2"), [(1, 1, 1), (5, 5, 2), (20, 4, 4), (20, 15, 12)])
def test_angles_are_those_of_scipy(x64, d, k1, k2):
    u, v = haar(1, d, k1), haar(2, d, k2)
    expected = scipy.linalg.subspace_angles(np.asarray(u), np.asarray(v))[::-1]
    close(principal_angles(u, v), expected)
    close(principal_angles(v, u), expected)


def test_prescribed_angles_are_found(x64):
    angles = np.array([0.0, 1e-12, 1e-7, 0.3, np.pi / 4, 1.5, np.pi / 2 - 1e-9, np.pi / 2])
    close(principal_angles(*with_angles(angles, 20)), angles, ulps=10)


@pytest.mark.parametrize("double", [False, True])
def test_small_angles_are_accurate_where_the_arccos_loses_them(double):
    with jax.enable_x64(double):
        # Far below the square root of the rounding error, where the cosine is 1 to the last digit.
        angle = float(jnp.finfo(jnp.result_type(float)).eps) ** 0.75
        u = jnp.eye(6, 2)
        v = jnp.zeros((6, 2)).at[0, 0].set(1).at[1, 1].set(np.cos(angle)).at[2, 1].set(np.sin(angle))
        found = principal_angles(u, v)
        np.testing.assert_allclose(found[1], angle, rtol=1e-5)
        np.testing.assert_allclose(projector_distance(u, v), angle, rtol=1e-5)
        assert jnp.arccos(jnp.linalg.svd(u.T @ v, compute_uv=False))[1] == 0


@pytest.mark.parametrize("double", [False, True])
def test_subspace_measures_agree_with_projectors_and_with_the_angles(double):
    with jax.enable_x64(double):
        u, v = haar(1, 12, 3), haar(2, 12, 3)
        p, q = (np.asarray(a, np.float64) @ np.asarray(a, np.float64).T for a in (u, v))
        angles = principal_angles(u, v)
        close(projector_distance(u, v), np.linalg.norm(p - q) / np.sqrt(2))
        close(projector_distance(u, v) ** 2, jnp.sum(jnp.sin(angles) ** 2))
        close(spectrum_overlap(u, v), np.trace(p @ q) / 3)
        close(spectrum_overlap(u, v), jnp.mean(jnp.cos(angles) ** 2))


@pytest.mark.parametrize("measure", SUBSPACE_MEASURES)
def test_subspace_measures_ignore_the_bases_and_rotations_of_the_space(x64, measure):
    u, v, space = haar(1, 10, 3), haar(2, 10, 3), haar(3, 10)
    close(measure(u @ haar(4, 3), v @ haar(5, 3)), measure(u, v))
    close(measure(space @ u, space @ v), measure(u, v))
    close(measure(v, u), measure(u, v))


@pytest.mark.parametrize("measure", SUBSPACE_MEASURES)
def test_subspace_measures_see_other_linear_maps_of_the_space(x64, measure):
    u, v, space = haar(1, 10, 3), haar(2, 10, 3), invertible(3, 10)
    moved = measure(orthonormal_basis(space @ u), orthonormal_basis(space @ v))
    assert jnp.max(jnp.abs(moved - measure(u, v))) > 0.01


@pytest.mark.slow
def test_column_spaces_of_encoders_with_equal_scores_are_equal(x64):
    # (P f, P^-T g): other features, the same scores, the same span of the features over the samples.
    f, g, p = normal(1, 30, 4), normal(2, 30, 4), invertible(3, 4)
    other_f, other_g = f @ p.T, g @ jnp.linalg.inv(p)
    close(other_f @ other_g.T, f @ g.T, ulps=1000)
    for a, b in [(f, other_f), (g, other_g)]:
        close(projector_distance(orthonormal_basis(a), orthonormal_basis(b)), 0.0)
        close(linear_fit(a, b).r2, 1.0)
        assert linear_cka(a, b) < 0.99 and procrustes(a, b).residual > 0.1 and mean_correlation(a, b).value < 0.9


def test_eigenvectors_of_a_repeated_eigenvalue_differ_while_their_eigenspace_does_not(x64):
    rotation = haar(1, 6)
    matrix = rotation @ jnp.diag(jnp.asarray([3.0, 3.0, 1.0, 1.0, 1.0, 0.5])) @ rotation.T
    one = rotation[:, :2]
    other = one @ jnp.asarray([[1.0, 1.0], [-1.0, 1.0]]) / jnp.sqrt(2.0)
    for basis in (one, other):  # both are eigenvectors
        close(matrix @ basis, 3 * basis)
    close(principal_angles(one[:, :1], other[:, :1])[0], np.pi / 4)
    close(principal_angles(one, other), np.zeros(2))


def test_basis_is_orthonormal_and_keeps_the_span(x64):
    x = normal(1, 9, 4)
    q = orthonormal_basis(x)
    close(q.T @ q, np.eye(4))
    close(q @ (q.T @ x), x)
    for j in range(1, 4):  # and that of the leading columns
        close(projector_distance(q[:, :j], orthonormal_basis(x[:, :j])), 0.0)


def test_basis_does_not_depend_on_the_lengths_of_columns():
    x = normal(1, 9, 3)
    lengths = jnp.asarray([1e-30, 1.0, 1e30])
    close(principal_angles(orthonormal_basis(x), orthonormal_basis(x * lengths[None, :])), np.zeros(3))


@pytest.mark.parametrize(
    "columns",
    [[0, 1, 1], [0, 1, 2, 3], [0, 3, 3]],
    ids=["twice the same", "a sum of the others", "zero"],
)
def test_dependent_columns_are_refused_as_a_basis(columns):
    x = normal(1, 9, 4)
    x = x.at[:, 3].set(x[:, :3] @ jnp.asarray([1.0, 2.0, 3.0])) if len(columns) == 4 else x.at[:, 3].set(0)
    with pytest.raises(ValueError, match=r"linearly dependent.*drop columns"):
        orthonormal_basis(x[:, jnp.asarray(columns)])


# ---------------------------------------------------------------- linear maps


@pytest.mark.parametrize("double", [False, True])
def test_procrustes_recovers_rotation_and_scale(double):
    with jax.enable_x64(double):
        x, rotation = normal(1, 12, 4), haar(2, 4).at[:, 0].multiply(-1)
        fit = procrustes(x, 2.5 * x @ rotation)
        close(fit.rotation, rotation)
        close(fit.scale, 2.5)
        close(fit.residual, 0.0)
        close(procrustes(x, 2.5 * x @ rotation, scaled=False).residual, 1.5 / 2.5)
        assert procrustes(x, x @ rotation, scaled=False).scale == 1


def test_procrustes_is_the_best_rotation_and_scale(x64):
    x, y = normal(1, 12, 3), normal(2, 12, 3)
    fit, plain = procrustes(x, y), procrustes(x, y, scaled=False)
    expected, total = scipy.linalg.orthogonal_procrustes(np.asarray(x), np.asarray(y))
    close(fit.rotation, expected)
    close(plain.rotation, expected)
    close(fit.scale, total / np.sum(np.asarray(x) ** 2))
    close(fit.residual, np.sqrt(1 - total**2 / np.sum(np.asarray(x) ** 2) / np.sum(np.asarray(y) ** 2)))
    norm = jnp.linalg.norm(y)
    close(plain.residual, jnp.linalg.norm(x @ plain.rotation - y) / norm)
    others = random_subspaces(jax.random.key(3), 3, 3, 50)
    assert jnp.all(jnp.linalg.norm(x @ others - y[None, :, :], axis=(1, 2)) > plain.residual * norm)
    assert jnp.all(jnp.linalg.norm(fit.scale * (x @ others) - y[None, :, :], axis=(1, 2)) > fit.residual * norm)
    for scale in (0.9, 1.1):
        assert jnp.linalg.norm(scale * fit.scale * x @ fit.rotation - y) > fit.residual * norm


def test_procrustes_residual_ignores_rotation_and_scale_but_sees_shifts_and_other_maps(x64):
    x, y = normal(1, 12, 3), normal(2, 12, 3)
    value = procrustes(x, y).residual
    close(procrustes(-3 * x @ haar(3, 3), 0.1 * y @ haar(4, 3)).residual, value)
    close(procrustes(y, x).residual, value)
    close(procrustes(3 * x, 3 * y, scaled=False).residual, procrustes(x, y, scaled=False).residual)
    assert abs(procrustes(3 * x, y, scaled=False).residual - procrustes(x, y, scaled=False).residual) > 0.01
    assert procrustes(x, x + 1).residual > 0.01
    assert procrustes(x, x @ invertible(5, 3)).residual > 0.1


@pytest.mark.parametrize("double", [False, True])
def test_linear_fit_is_least_squares(double):
    with jax.enable_x64(double):
        x, y = normal(1, 12, 3) + 2, normal(2, 12, 3) - 1
        fit = linear_fit(x, y)
        design = np.concatenate([np.asarray(x, np.float64), np.ones((12, 1))], axis=1)
        solution = np.linalg.lstsq(design, np.asarray(y, np.float64), rcond=None)[0]
        close(fit.matrix, solution[:3])
        close(fit.offset, solution[3])
        rest = np.asarray(y, np.float64) - design @ solution
        close(fit.r2, 1 - np.sum(rest**2) / np.sum((y - np.mean(y, axis=0, keepdims=True)) ** 2))


def test_r2_ignores_affine_maps_of_x_and_rotations_of_y_but_sees_other_maps_of_y(x64):
    x, y = normal(1, 12, 3), normal(2, 12, 3)
    value = linear_fit(x, y).r2
    close(linear_fit(x @ invertible(3, 3) + 4, y).r2, value)
    close(linear_fit(x, -3 * y @ haar(5, 3) + 4).r2, value)
    assert abs(linear_fit(x, y @ invertible(6, 3)).r2 - value) > 1e-3
    assert abs(linear_fit(y, x).r2 - value) > 1e-3
    close(linear_fit(x, x @ invertible(6, 3) + 1).r2, 1.0)


def test_rank_deficient_features_are_fitted_by_the_independent_ones(x64):
    x, y = normal(1, 12, 3), normal(2, 12, 3)
    wider = jnp.concatenate([x, jnp.full((12, 1), 0.1), 2 * x[:, :1] + 1, x[:, 1:2] * 1e-12], axis=1)
    fit = linear_fit(wider, y)
    close(fit.r2, linear_fit(x, y).r2)
    close(wider @ fit.matrix + fit.offset[None, :], x @ linear_fit(x, y).matrix + linear_fit(x, y).offset[None, :])
    assert jnp.all(fit.matrix[3] == 0)
    none = linear_fit(jnp.full((12, 3), 0.1), y)
    assert none.r2 == 0 and jnp.all(none.matrix == 0)
    close(none.offset, jnp.mean(y, axis=0))


@pytest.mark.slow
def test_as_many_features_as_samples_fit_anything(x64):
    x, y = normal(1, 6, 5), normal(2, 6, 5)
    fit = linear_fit(x, y)
    close(fit.r2, 1.0)
    close(x @ fit.matrix + fit.offset[None, :], y, ulps=1000)
    assert linear_fit(x[:, :4], y).r2 < 0.999


@pytest.mark.slow
@pytest.mark.parametrize("double", [False, True])
def test_distance_from_orthogonality_is_the_best_over_scales_and_rotations(double):
    with jax.enable_x64(double):
        a = normal(1, 4, 4)
        left, _, right = np.linalg.svd(np.asarray(a, np.float64))
        polar = left @ right
        best = scipy.optimize.minimize_scalar(lambda s: np.sum((s * np.asarray(a, np.float64) - polar) ** 2) / 4)
        value = distance_from_orthogonality(a)
        close(value, np.sqrt(best.fun))
        close(distance_from_orthogonality(-3 * haar(2, 4) @ a @ haar(3, 4)), value)
        close(distance_from_orthogonality(3 * haar(2, 4)), 0.0)
        close(distance_from_orthogonality(jnp.ones((4, 4))), np.sqrt(3 / 4))
        assert abs(distance_from_orthogonality(a @ invertible(4, 4)) - value) > 0.01
        assert distance_from_orthogonality(jnp.asarray([[2.0]])) == 0


def test_small_distances_from_orthogonality_keep_their_digits(x64):
    rotation, step = haar(1, 2), 1e-9
    a = rotation @ jnp.diag(jnp.asarray([1 + step, 1 - step]))
    np.testing.assert_allclose(distance_from_orthogonality(a), step, rtol=1e-5)


def test_random_matrices_have_the_distance_of_the_quarter_circle_law():
    # The squares of singular values have relative fluctuations of order 1/p and edge corrections of order p^(-2/3).
    found = distance_from_orthogonality(normal(1, 200, 200))
    np.testing.assert_allclose(found, np.sqrt(1 - (8 / (3 * np.pi)) ** 2), atol=200 ** (-2 / 3))
    np.testing.assert_allclose(found, 0.53, atol=0.01)


# ---------------------------------------------------------------- spectra


@pytest.mark.parametrize("double", [False, True])
def test_effective_rank_is_the_exponential_of_the_entropy_of_the_singular_values(double):
    with jax.enable_x64(double):
        x = normal(1, 9, 4)
        s = np.linalg.svd(np.asarray(x, np.float64), compute_uv=False)
        close(effective_rank(x), np.exp(scipy.stats.entropy(s)))
        close(effective_rank(-3 * haar(2, 9) @ x @ haar(3, 4)), effective_rank(x))
        assert abs(effective_rank(x @ invertible(4, 4)) - effective_rank(x)) > 0.01
        assert abs(effective_rank(x + 5) - effective_rank(x)) > 0.1


def test_effective_rank_counts_equal_singular_values():
    for rank in (1, 3):
        close(effective_rank(3 * haar(1, 9, rank) @ haar(2, 4, rank).T), float(rank))
    assert effective_rank(jnp.zeros((3, 4)).at[0, 0].set(2)) == 1


# ---------------------------------------------------------------- mean correlation


@pytest.mark.slow
@pytest.mark.parametrize(("method", "p"), [("pearson", 1), ("pearson", 4), ("pearson", 40), ("spearman", 4)])
def test_the_assignment_is_optimal(x64, method, p):
    x, y = normal(1, 30, p), normal(2, 30, p)
    y = y.at[:, 0].add(x[:, 0])
    seen = [np.asarray(a).T if method == "pearson" else scipy.stats.rankdata(a, axis=0).T for a in (x, y)]
    table = np.corrcoef(*seen)[:p, p:]
    rows, columns = scipy.optimize.linear_sum_assignment(-np.abs(table))
    found = mean_correlation(x, y, method=method)
    close(found.value, np.mean(np.abs(table[rows, columns])))
    np.testing.assert_array_equal(found.assignment, columns)
    np.testing.assert_array_equal(found.signs, np.sign(table[rows, columns]))


def test_the_assignment_beats_the_greedy_one():
    # Correlations (0.7, 0.6; 0.6, 0): greedy takes 0.7 first and is left with 0.
    columns = jnp.linalg.qr(jnp.concatenate([jnp.ones((31, 1)), normal(1, 31, 4)], axis=1))[0][
        :, 1:
    ]  # orthogonal to the mean
    x = columns @ jnp.asarray([[0.7, 0.51**0.5, 0, 0], [0.6, 0, 0.8, 0]]).T
    b, c = (0.6 - 0.7 * 0.3) / 0.51**0.5, -0.6 * 0.3 / 0.8
    y = columns @ jnp.asarray([[1.0, 0, 0, 0], [0.3, b, c, (1 - 0.3**2 - b**2 - c**2) ** 0.5]]).T
    found = mean_correlation(x, y)
    close(found.value, 0.6)
    np.testing.assert_array_equal(found.assignment, [1, 0])


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("method", ["pearson", "spearman"])
def test_mean_correlation_recovers_order_sign_scale_and_shift(double, method):
    with jax.enable_x64(double):
        x, order = normal(1, 30, 4), np.array([3, 0, 1, 2])
        factors = jnp.asarray([1.0, -2.0, 30.0, -0.1])
        y = (x * factors[None, :] + 7)[:, order]
        found = mean_correlation(x, y, method=method)
        close(found.value, 1.0)
        np.testing.assert_array_equal(order[np.asarray(found.assignment)], np.arange(4))
        np.testing.assert_array_equal(found.signs, np.sign(factors))
        assert found.signs.dtype == x.dtype


def test_rank_correlation_ignores_monotone_maps_and_plain_correlation_does_not(x64):
    x = normal(1, 30, 4)
    y = jnp.concatenate([jnp.exp(3 * x[:, :2]), -(x[:, 2:] ** 3)], axis=1)
    close(mean_correlation(x, y, method="spearman").value, 1.0)
    assert mean_correlation(x, y).value < 0.95
    assert mean_correlation(x, x**2, method="spearman").value < 0.9


def test_mean_correlation_sees_rotations(x64):
    x = normal(1, 30, 4)
    assert mean_correlation(x, x @ haar(2, 4)).value < 0.9
    assert mean_correlation(x, x @ haar(2, 4), method="spearman").value < 0.9


@pytest.mark.slow
@pytest.mark.parametrize("method", ["pearson", "spearman"])
def test_a_constant_feature_has_no_correlation(method):
    x, y = normal(1, 30, 4), normal(2, 30, 4)
    constant = x.at[:, 1].set(0.1)
    for pair in [(constant, y), (y, constant)]:
        with pytest.raises(ValueError, match=r"same for all samples.*drop that column"):
            mean_correlation(*pair, method=method)
        assert jnp.isnan(jax.jit(mean_correlation, static_argnames="method")(*pair, method=method).value)
