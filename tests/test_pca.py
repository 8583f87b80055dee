"""Principal components: the definition, scikit-learn and float64 numpy as references, the limits of the input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sklearn.decomposition
from hypothesis import given, settings
from hypothesis import strategies as st

from theorykit.spectral import _krylov, pca

KEY = jax.random.key(0)
EPS32 = float(np.finfo(np.float32).eps)


def rotation(seed, d, k=None):
    return np.linalg.qr(np.random.default_rng(seed).standard_normal((d, d)))[0][:, :k]


def with_spectrum(variances, n, mean=0.0, seed=0):
    """Data (n, d) whose sample covariance has exactly these variances, and their components, in float64."""
    d = len(variances)
    scores = np.random.default_rng(seed).standard_normal((n, d))
    scores = np.linalg.qr(scores - scores.mean(0))[0] * np.sqrt((n - 1) * np.asarray(variances, float))
    components = rotation(seed + 1, d)
    return scores @ components.T + mean, components


def sine(u, v):
    """Sine of the largest angle between the spans of orthonormal columns."""
    u, v = np.asarray(u, float), np.asarray(v, float)
    return np.linalg.norm(u - v @ (v.T @ u), 2)


def methods(x, k, **options):
    yield pca.pca(x, k, **options)
    yield pca.pca(x, k, method="randomised", key=KEY, **options)


SLOW_DECAY = 1 / np.arange(1, 201)


@pytest.mark.slow
def test_both_methods_find_a_prescribed_spectrum_in_float64(x64):
    x, components = with_spectrum(SLOW_DECAY, 300, mean=3.0)
    for found in methods(x, 8):
        assert found.status == _krylov.CONVERGED
        np.testing.assert_allclose(found.variances, SLOW_DECAY[:8], rtol=1e-8)
        np.testing.assert_allclose(found.total_variance, SLOW_DECAY.sum(), rtol=1e-12)
        # What was asked for: the angle that the solver reports bounds the true one and is within the tolerance.
        assert sine(found.components, components[:, :8]) <= max(float(found.angle), 1e-12)
        assert found.angle <= pca.TOLERANCE


@pytest.mark.slow
def test_randomised_keeps_its_tolerance_in_float32_without_a_gap():
    x, components = with_spectrum(SLOW_DECAY, 300, mean=3.0)
    found = pca.pca(x.astype(np.float32), 32, method="randomised", key=KEY)
    assert found.status == _krylov.CONVERGED
    assert sine(found.components, components[:, :32]) <= found.angle <= pca.TOLERANCE
    np.testing.assert_allclose(found.variances, SLOW_DECAY[:32], rtol=20 * EPS32)


@pytest.mark.slow
def test_a_smaller_tolerance_takes_more_passes_and_is_kept(x64):
    x, components = with_spectrum(SLOW_DECAY, 300)
    loose, tight = (pca.pca(x, 8, method="randomised", key=KEY, tolerance=t) for t in (1e-2, 1e-10))
    assert loose.steps < tight.steps
    assert loose.angle <= 1e-2 and tight.angle <= 1e-10
    assert sine(tight.components, components[:, :8]) <= 1e-10


@pytest.mark.slow
def test_restarts_of_the_basis_still_converge(x64):
    # Two clusters: the first 20 variances hardly differ from the rest, which takes more than the blocks of one basis.
    variances = np.concatenate([np.full(20, 1.02), np.linspace(1.0, 0.5, 380)])
    x, components = with_spectrum(variances, 450)
    found = pca.pca(x, 20, method="randomised", key=KEY)
    assert found.steps > _krylov.BLOCKS and found.status == _krylov.CONVERGED
    assert sine(found.components, components[:, :20]) <= found.angle


def test_components_agree_with_scikit_learn_with_their_signs(x64):
    x, _ = with_spectrum(SLOW_DECAY[:40], 90, mean=1.0)
    theirs = sklearn.decomposition.PCA(6, svd_solver="full").fit(x)
    for found in methods(x, 6, **{}):
        tolerance = max(float(found.angle), 1e-10)  # single vectors err as their span does, over gaps of its size
        np.testing.assert_allclose(found.mean, theirs.mean_, atol=1e-13)
        np.testing.assert_allclose(found.variances, theirs.explained_variance_, rtol=1e-8)
        np.testing.assert_allclose(found.components, theirs.components_.T, atol=tolerance)
        np.testing.assert_allclose(pca.transform(found, x), theirs.transform(x), atol=10 * tolerance)


def test_second_moments_are_taken_about_zero(x64):
    x, _ = with_spectrum([2.0, 1.0, 0.5], 20, mean=4.0)
    values = np.linalg.eigvalsh(x.T @ x / 20)[::-1]
    for found in methods(x, 2, centre=False):
        np.testing.assert_allclose(found.variances, values[:2], rtol=1e-12)
        np.testing.assert_allclose(found.total_variance, values.sum(), rtol=1e-12)
        assert not np.any(found.mean)


@pytest.mark.slow
def test_a_mean_far_beyond_the_spread_costs_no_digits_but_its_own():
    x, components = with_spectrum(SLOW_DECAY[:150], 300)
    shifted = (x + 1000.0).astype(np.float32)  # each entry is now rounded by 3e-5: the reference is what is left
    reference = np.linalg.eigvalsh(np.cov(shifted.astype(float).T))[::-1]
    for found in methods(shifted, 4):
        np.testing.assert_allclose(found.variances, reference[:4], rtol=20 * EPS32)
        assert sine(found.components, components[:, :4]) < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize(("n", "d"), [(1, 3), (7, 30), (30, 7), (40, 300)])
def test_every_shape_gives_orthonormal_components_and_the_numpy_variances(n, d, x64):
    x = np.random.default_rng(n).standard_normal((n, d))
    most = min(n, d)
    reference = np.linalg.svd(x, compute_uv=False) ** 2 / n
    for found in methods(x, most, centre=False):
        np.testing.assert_allclose(found.variances, reference[:most], rtol=1e-9, atol=1e-14)
        np.testing.assert_allclose(found.components.T @ found.components, np.eye(most), atol=1e-12)


@pytest.mark.slow
def test_low_rank_data_have_variance_zero_beyond_their_rank(x64):
    x, _ = with_spectrum([3.0, 2.0, 1.0], 50)
    wide = x @ rotation(5, 200, 3).T + 7.0
    for found in methods(wide, 6):
        np.testing.assert_allclose(found.variances, [3, 2, 1, 0, 0, 0], atol=1e-12)
        np.testing.assert_allclose(found.components.T @ found.components, np.eye(6), atol=1e-12)
        assert sine(rotation(5, 200, 3), found.components[:, :3]) < 1e-7
        np.testing.assert_allclose(found.total_variance, 6.0, rtol=1e-12)
    assert found.status == _krylov.ROUNDING and found.angle == np.inf  # variances 6 and 7 are both 0


@pytest.mark.slow
def test_constant_features_have_no_weight_and_constant_data_no_variance():
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.standard_normal((60, 3)), np.full((60, 2), 0.1)], axis=1).astype(np.float32)
    for found in methods(x, 3):
        np.testing.assert_allclose(found.components[3:], 0, atol=4 * EPS32)
        np.testing.assert_array_equal(found.mean[3:], x[0, 3:])
    for found in methods(np.full((300, 200), 0.1, np.float32), 2):
        assert not np.any(found.variances) and found.total_variance == 0
        np.testing.assert_allclose(found.components.T @ found.components, np.eye(2), atol=10 * EPS32)


@pytest.mark.slow
def test_repeated_variances_determine_the_span_and_a_cut_through_them_is_reported(x64):
    variances = np.concatenate([[2.0], np.full(4, 1.0), np.full(145, 0.1)])
    x, components = with_spectrum(variances, 400)
    for found in methods(x, 5):
        assert found.status == _krylov.CONVERGED
        np.testing.assert_allclose(found.variances, variances[:5], rtol=1e-8)
        assert sine(found.components, components[:, :5]) < pca.TOLERANCE
    cut = pca.pca(x, 3, method="randomised", key=KEY)
    assert cut.status == _krylov.ROUNDING and cut.angle > pca.TOLERANCE
    np.testing.assert_allclose(cut.variances, variances[:3], rtol=1e-8)
    assert sine(cut.components, components[:, :5]) < 1e-6  # inside the span that is determined
    assert "larger gap" in cut.describe()


def test_the_dense_solver_does_not_report_a_cut_through_repeated_variances(x64):
    x, components = with_spectrum([2.0, 1.0, 1.0, 1.0, 1.0, 0.1], 40)
    cut = pca.pca(x, 3)
    np.testing.assert_allclose(cut.variances, [2, 1, 1], rtol=1e-10)
    assert sine(cut.components, components[:, :5]) < 1e-10  # inside the eigenspaces, which are determined
    assert sine(cut.components, components[:, :3]) > 0.1  # which part of the second one is not
    assert cut.angle == 0 and cut.status == _krylov.CONVERGED and cut.describe() == "solved densely"


@pytest.mark.slow
def test_passes_that_run_out_are_reported_with_the_error_so_far():
    x, components = with_spectrum(SLOW_DECAY, 300)
    found = pca.pca(x.astype(np.float32), 8, method="randomised", key=KEY, max_steps=2)
    assert found.status == _krylov.MAX_STEPS and found.steps == 2
    assert "not converged" in found.describe() and "max_steps" in found.describe()
    assert found.angle > pca.TOLERANCE
    assert sine(found.components, components[:, :8]) > pca.TOLERANCE


@pytest.mark.slow
def test_residuals_are_those_of_the_covariance(x64):
    x, _ = with_spectrum(SLOW_DECAY, 300)
    found = pca.pca(x, 8, method="randomised", key=KEY, tolerance=1e-2)
    residual = np.cov(x.T) @ found.components - found.components * found.variances[None, :]
    np.testing.assert_allclose(found.residuals, np.linalg.norm(residual, axis=0) / found.variances[0], atol=1e-12)
    assert found.residuals.max() > 1e-6


@pytest.mark.slow
def test_data_on_the_host_give_the_same_in_blocks_from_memory_or_file(tmp_path, monkeypatch):
    x, _ = with_spectrum(SLOW_DECAY, 301, mean=2.0)
    x = x.astype(np.float32)
    monkeypatch.setattr(_krylov, "_BLOCK_BYTES", 64 * x.shape[1] * 4)  # 4 blocks and a rest of 45 rows
    np.save(tmp_path / "x.npy", x)
    stored = np.load(tmp_path / "x.npy", mmap_mode="r")
    assert isinstance(stored, np.memmap)
    found = [pca.pca(data, 8, method="randomised", key=KEY) for data in (jnp.asarray(x), x, stored)]
    for other in found[1:]:
        np.testing.assert_allclose(other.variances, found[0].variances, rtol=10 * EPS32)
        assert sine(other.components, found[0].components) <= 2 * pca.TOLERANCE


def test_the_host_hands_over_blocks_only(monkeypatch):
    rows = []

    class Watched(np.ndarray):
        def __getitem__(self, index):
            part = super().__getitem__(index)
            rows.append(part.shape[0] if part.ndim == 2 else 1)
            return np.asarray(part)

    x = with_spectrum(SLOW_DECAY, 300)[0].astype(np.float32)
    monkeypatch.setattr(_krylov, "_BLOCK_BYTES", 50 * x.shape[1] * 4)
    found = pca.pca(x.view(Watched), 8, method="randomised", key=KEY)
    assert found.status == _krylov.CONVERGED and max(rows) == 50


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10**6))
def test_rotations_rotate_the_components_and_shifts_move_the_mean_only(seed):
    with jax.enable_x64(True):
        x, _ = with_spectrum(0.7 ** np.arange(5), 30, seed=seed % 100)
        turn, shift = rotation(seed, 5), np.random.default_rng(seed).standard_normal(5)
        found, moved = pca.pca(x, 3), pca.pca(x @ turn + shift[None, :], 3)
        np.testing.assert_allclose(moved.variances, found.variances, rtol=1e-10)
        assert sine(turn.T @ np.asarray(found.components), moved.components) < 1e-10
        np.testing.assert_allclose(moved.mean, found.mean @ turn + shift, atol=1e-12)


def test_the_largest_entry_of_each_component_is_positive():
    x, _ = with_spectrum(SLOW_DECAY, 300)
    for found in methods(x.astype(np.float32), 8):
        components = np.asarray(found.components)
        assert np.all(components[np.abs(components).argmax(0), np.arange(8)] > 0)


def test_exact_components_can_be_traced_and_mapped():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((3, 20, 4)), jnp.float32)
    mapped = jax.jit(jax.vmap(lambda data: pca.pca(data, 2)))(x)
    for i in range(3):
        single = pca.pca(x[i], 2)
        np.testing.assert_allclose(mapped.components[i], single.components, atol=1e-5)
        np.testing.assert_allclose(mapped.variances[i], single.variances, rtol=1e-5)
    with pytest.raises(TypeError, match="outside jit"):
        jax.jit(lambda data: pca.pca(data, 2, method="randomised", key=KEY))(x[0])


# Input that cannot be used

GOOD = np.eye(4, 3, dtype=np.float32)


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (GOOD.astype(complex), TypeError, "stack its real and imaginary parts"),
        (np.eye(4, dtype=int), TypeError, "cast it to float32"),
        (np.eye(4, dtype=np.float16), TypeError, "cast it to float32"),
        (GOOD[0], ValueError, "flatten each point"),
        (GOOD[:0], ValueError, "not empty"),
        (GOOD[:1], ValueError, "one point, which has no variance"),
        (np.where(GOOD == 1, np.nan, GOOD).astype(np.float32), ValueError, "NaN, infinity"),
        (np.where(GOOD == 1, np.inf, GOOD).astype(np.float32), ValueError, "NaN, infinity"),
        (np.float32(1e30) * GOOD, ValueError, "squares overflow"),
    ],
)
def test_data_that_cannot_be_used_say_why(x, error, message, as_users_run):
    for method in ("exact", "randomised"):
        with pytest.raises(error, match=message):
            pca.pca(x, 1, method=method, key=KEY)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 4}, r"k is 4, but there are 1 to min\(n, d\) = 3 components.*lower k"),
        ({"k": 0}, "k is 0"),
        ({"k": 1, "method": "lanczos"}, 'choose "exact" or "randomised"'),
        ({"k": 1, "method": "randomised"}, r"key=jax.random.key\(0\)"),
        ({"k": 1, "method": "randomised", "key": KEY, "tolerance": 0.0}, "sine of an angle"),
        ({"k": 1, "method": "randomised", "key": KEY, "max_steps": 0}, "at least one step"),
    ],
)
def test_options_that_cannot_be_used_say_why(options, message, as_users_run):
    with pytest.raises(ValueError, match=message):
        pca.pca(GOOD, **options)


@pytest.mark.parametrize("method", ["exact", "randomised"])
def test_fewer_samples_than_components_is_an_error(method):
    with pytest.raises(ValueError, match="data of 3 points in 10 dimensions have no more; lower k or pass more data"):
        pca.pca(np.ones((3, 10), np.float32), 4, method=method, key=KEY)


def test_points_of_another_dimension_are_an_error():
    with pytest.raises(ValueError, match="x has 2 columns, but the model was fitted with 3"):
        pca.transform(pca.pca(GOOD, 1), GOOD[:, :2])
