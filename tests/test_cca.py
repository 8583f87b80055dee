"""Canonical correlations: the definition, numpy in float64 and scikit-learn as references, the limits of the input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
import sklearn.cross_decomposition

from theorykit.spectral import _krylov, cca, pca

KEY = jax.random.key(0)
EPS32 = float(np.finfo(np.float32).eps)


def centred(x):
    return x - x.mean(0)


def with_correlations(rho, dx, dy, n, seed=0, mixing=None):
    """Views whose sample canonical correlations are exactly rho, then 0; with the directions' variates in x."""
    rng = np.random.default_rng(seed)
    u = np.linalg.qr(centred(rng.standard_normal((n, dx + dy))))[0] * np.sqrt(n - 1)
    x, y = u[:, :dx], u[:, dx:].copy()
    rho = np.asarray(rho, float)
    k = len(rho)
    y[:, :k] = rho * x[:, :k] + np.sqrt(1 - rho**2) * y[:, :k]
    spread = [np.arange(1, d + 1) ** -0.5 for d in (dx, dy)]
    turns = [np.linalg.qr(rng.standard_normal((d, d)))[0] for d in (dx, dy, dx, dy)]
    # Any invertible map of a view keeps the correlations; these have singular values from 1 down to d^(-1/2).
    return (x @ turns[0] * spread[0]) @ turns[2] + 3.0, (y @ turns[1] * spread[1]) @ turns[3] - 1.0


def reference(x, y, k, ridge=0.0):
    """The generalised symmetric eigenproblem of the covariances, in float64."""
    dx = x.shape[1]
    joint = np.cov(np.concatenate([x, y], axis=1).T)
    sxx, syy = joint[:dx, :dx] + ridge * np.eye(dx), joint[dx:, dx:] + ridge * np.eye(y.shape[1])
    values, vectors = scipy.linalg.eigh(
        np.block([[0 * sxx, joint[:dx, dx:]], [joint[dx:, :dx], 0 * syy]]), scipy.linalg.block_diag(sxx, syy)
    )
    vectors = vectors[:, ::-1][:, :k] * np.sqrt(2)  # a^T Sxx a = 1/2 each
    signs = np.sign(vectors[np.abs(vectors[:dx]).argmax(0), np.arange(k)])
    return values[::-1][:k], vectors[:dx] * signs, vectors[dx:] * signs


def sine(u, v):
    """Sine of the largest angle between the spans of two sets of columns."""
    u, v = (np.linalg.qr(np.asarray(w, float))[0] for w in (u, v))
    return np.linalg.norm(u - v @ (v.T @ u), 2)


RHO = np.linspace(0.95, 0.1, 18)


def views(dtype=np.float64):
    return tuple(view.astype(dtype) for view in with_correlations(RHO, 60, 80, 300))


def methods(x, y, k, **options):
    yield cca.cca(x, y, k, **options)
    yield cca.cca(x, y, k, method="randomised", key=KEY, **options)


@pytest.mark.slow
def test_both_methods_find_prescribed_correlations_in_float64(x64):
    x, y = views()
    for found in methods(x, y, 6):
        assert found.status == _krylov.CONVERGED
        np.testing.assert_allclose(found.correlations, RHO[:6], rtol=1e-8)
        a, b = cca.transform(found, x, y)
        np.testing.assert_allclose(
            np.cov(a.T, b.T), np.block([[np.eye(6), np.diag(RHO[:6])], [np.diag(RHO[:6]), np.eye(6)]]), atol=1e-7
        )


@pytest.mark.slow
@pytest.mark.parametrize("ridge", [0.0, 0.1])
def test_directions_solve_the_generalised_eigenproblem(ridge, x64):
    x, y = views()
    rho, a, b = reference(x, y, 6, ridge)
    for found in methods(x, y, 6, ridge=ridge):
        tolerance = max(10 * float(found.angle), 1e-9)  # weights are up to ten times larger than variates here
        np.testing.assert_allclose(found.correlations, rho, rtol=1e-8)
        np.testing.assert_allclose(found.x_weights, a, atol=tolerance)
        np.testing.assert_allclose(found.y_weights, b, atol=tolerance)
        np.testing.assert_allclose(found.mean_x, x.mean(0), rtol=1e-12)


@pytest.mark.slow
def test_randomised_keeps_its_tolerance_and_estimates_its_error(x64):
    x, y = views()
    _, a, b = reference(x, y, 6)
    for tolerance in (1e-2, 1e-4, 1e-8):
        found = cca.cca(x, y, 6, method="randomised", key=KEY, tolerance=tolerance)
        assert found.status == _krylov.CONVERGED and found.angle <= tolerance
        assert sine(centred(x) @ found.x_weights, centred(x) @ a) <= found.angle
        assert sine(centred(y) @ found.y_weights, centred(y) @ b) <= found.angle


@pytest.mark.slow
def test_float32_reaches_its_rounding(x64):
    x, y = views()
    _, a, _ = reference(x, y, 6)
    with jax.enable_x64(False):
        for found in methods(x.astype(np.float32), y.astype(np.float32), 6, ridge=0.0):
            # Rounding of the data by eps moves the variates by eps times the condition (9) over the gap (0.05).
            np.testing.assert_allclose(found.correlations, RHO[:6], atol=100 * EPS32)
            assert sine(centred(x) @ np.asarray(found.x_weights, float), centred(x) @ a) < 9 * EPS32 / 0.05 * 10


@pytest.mark.slow
def test_correlations_agree_with_scikit_learn(x64):
    x, y = (view[:, :5] for view in views())
    theirs = sklearn.cross_decomposition.CCA(3, scale=False, tol=1e-14, max_iter=5000).fit(x, y)
    u, v = theirs.transform(x, y)
    for found in methods(x, y, 3):
        np.testing.assert_allclose(
            found.correlations, [np.corrcoef(u[:, j], v[:, j])[0, 1] for j in range(3)], atol=1e-6
        )
        ours = cca.transform(found, x, y)[0]
        correlation = [np.corrcoef(ours[:, j], u[:, j])[0, 1] for j in range(3)]
        np.testing.assert_allclose(np.abs(correlation), 1, atol=1e-6)


@pytest.mark.slow
def test_correlations_do_not_change_under_invertible_maps_without_ridge(x64):
    x, y = (view[:, :6] for view in views())
    maps = np.random.default_rng(0).standard_normal((2, 6, 6))
    before, after = cca.cca(x, y, 4), cca.cca(x @ maps[0] + 1.0, y @ maps[1], 4)
    np.testing.assert_allclose(after.correlations, before.correlations, rtol=1e-9)
    ours, theirs = cca.transform(after, x @ maps[0] + 1.0, y @ maps[1])[0], cca.transform(before, x, y)[0]
    np.testing.assert_allclose(np.abs(ours), np.abs(theirs), atol=1e-8)
    # The control: with a ridge they do change.
    ridged = [cca.cca(x, y, 4, ridge=0.1), cca.cca(x @ maps[0], y @ maps[1], 4, ridge=0.1)]
    assert np.abs(ridged[0].correlations - ridged[1].correlations).max() > 1e-3


def test_swapping_the_views_swaps_the_weights(x64):
    x, y = (view[:, :6] for view in views())
    one, other = cca.cca(x, y, 4, ridge=0.01), cca.cca(y, x, 4, ridge=0.01)
    np.testing.assert_allclose(one.correlations, other.correlations, rtol=1e-10)
    np.testing.assert_allclose(np.abs(one.x_weights), np.abs(other.y_weights), atol=1e-9)


@pytest.mark.slow
def test_the_ridge_adds_to_the_variance_of_the_variates(x64):
    x, y = views()
    for found in methods(x, y, 4, ridge=0.3):
        for variates, weights in zip(cca.transform(found, x, y), (found.x_weights, found.y_weights), strict=True):
            np.testing.assert_allclose(
                np.var(variates, axis=0, ddof=1) + 0.3 * np.sum(weights**2, axis=0), 1, rtol=1e-8
            )


@pytest.mark.slow
def test_the_largest_weight_of_x_is_positive_and_pairs_correlate_positively():
    x, y = views(np.float32)
    for found in methods(x, y, 6):
        a = np.asarray(found.x_weights)
        assert np.all(a[np.abs(a).argmax(0), np.arange(6)] > 0)
        u, v = cca.transform(found, x, y)
        assert np.all(np.sum(np.asarray(u) * np.asarray(v), axis=0) > 0)


@pytest.mark.slow
def test_low_rank_views_get_no_weight_where_they_have_no_variance(x64):
    x, y = views()
    x[:, 3] = 2.0  # constant
    x[:, 4] = x[:, 5] - x[:, 6]  # one of three that depend on each other
    rho, a, b = reference(np.delete(x, [3, 4], axis=1), y, 6)
    for found in methods(x, y, 6):
        tolerance = max(float(found.angle), 1e-10)
        np.testing.assert_allclose(found.correlations, rho, rtol=1e-8)
        assert sine(centred(x) @ found.x_weights, centred(np.delete(x, [3, 4], axis=1)) @ a) <= tolerance
        assert sine(centred(y) @ found.y_weights, centred(y) @ b) <= tolerance
        # Rounding only, which the iteration may amplify to sqrt(eps) of the largest weight.
        np.testing.assert_allclose(found.x_weights[3], 0, atol=2e-8 * np.abs(found.x_weights).max())
    few = np.concatenate([x[:, :3], x[:, :3]], axis=1)
    with pytest.raises(ValueError, match=r"ranks 3 and 4, and so only 3 pairs.*lower k"):
        cca.cca(few, y[:, :4], 4)


@pytest.mark.slow
def test_too_few_points_are_an_error_without_ridge_and_defined_with_one(x64):
    x, y = (view[:100] for view in views())  # 60 and 80 features
    with pytest.raises(ValueError, match=r"at least 41 correlations are exactly 1.*pass ridge > 0"):
        cca.cca(x, y, 6)
    with pytest.raises(ValueError, match=r"at least 41 correlations of exactly 1.*Pass ridge > 0"):
        cca.cca(x, y, 6, method="randomised", key=KEY)
    for found in methods(x, y, 6, ridge=0.5):
        np.testing.assert_allclose(found.correlations, reference(x, y, 6, 0.5)[0], rtol=1e-8)
        assert np.all(found.correlations < 1)
    # The bound on the ranks is sharp: up to n - 1 in sum, nothing forces a perfect pair.
    assert np.all(cca.cca(x[:10, :4], y[:10, :5], 3).correlations < 1 - 1e-6)
    with pytest.raises(ValueError, match="at least 1 correlations"):
        cca.cca(x[:10, :5], y[:10, :5], 3)


@pytest.mark.slow
def test_repeated_correlations_determine_the_span(x64):
    x, y = with_correlations([0.9, 0.9, 0.9, 0.2], 60, 80, 300)
    _, a, _ = reference(x, y, 3)
    for found in methods(x, y, 3):
        assert found.status == _krylov.CONVERGED
        np.testing.assert_allclose(found.correlations, 0.9, rtol=1e-8)
        assert sine(centred(x) @ found.x_weights, centred(x) @ a) < pca.TOLERANCE
    cut = cca.cca(x, y, 2, method="randomised", key=KEY)
    assert cut.status == _krylov.ROUNDING and cut.angle > pca.TOLERANCE


def test_the_dense_solver_does_not_report_a_cut_through_repeated_correlations(x64):
    x, y = with_correlations([0.9, 0.5, 0.5, 0.5, 0.2], 6, 6, 40)
    a = reference(x, y, 4)[1]
    cut = cca.cca(x, y, 2)
    np.testing.assert_allclose(cut.correlations, [0.9, 0.5], rtol=1e-9)
    assert sine(centred(x) @ cut.x_weights, centred(x) @ a) < 1e-8  # inside what is determined, only in part spanned
    assert cut.angle == 0 and cut.describe() == "solved densely"


@pytest.mark.parametrize("method", ["exact", "randomised"])
@pytest.mark.parametrize("constant", ["x", "y"])
def test_a_view_that_does_not_vary_is_an_error(method, constant):
    views = {name: GOOD[:, :2] for name in "xy"} | {constant: np.full((12, 2), 0.1, np.float32)}
    with pytest.raises(ValueError, match=rf"{constant} is the same at all points.*pass views with a feature that"):
        cca.cca(views["x"], views["y"], 1, method=method, key=KEY)


@pytest.mark.slow
def test_pairs_beyond_the_rank_are_an_error_or_empty_and_reported():
    x, y = GOOD[:, :1] * np.array([[1, 2]], np.float32), GOOD[:, :2]
    with pytest.raises(ValueError, match="ranks 1 and 2, and so only 1 pairs of canonical directions: lower k"):
        cca.cca(x, y, 2)
    found = cca.cca(x, y, 2, method="randomised", key=KEY)
    assert found.status == _krylov.ROUNDING and found.angle == np.inf
    np.testing.assert_allclose(found.correlations, [1, 0], atol=10 * EPS32)
    assert not np.any(found.x_weights[:, 1]) and not np.any(found.y_weights[:, 1])


@pytest.mark.slow
def test_identical_views_correlate_perfectly(x64):
    x = views()[0][:, :5]
    for found in methods(x, x, 3):
        np.testing.assert_allclose(found.correlations, 1, rtol=1e-12)
        np.testing.assert_allclose(found.x_weights, found.y_weights, atol=1e-6)


@pytest.mark.slow
def test_passes_that_run_out_are_reported():
    x, y = views(np.float32)
    found = cca.cca(x, y, 6, method="randomised", key=KEY, max_steps=1)
    assert found.status == _krylov.MAX_STEPS and found.steps == 1 and "not converged" in found.describe()


@pytest.mark.slow
def test_views_too_ill_conditioned_for_the_dtype_are_reported_and_a_ridge_or_float64_helps(x64):
    x, y = views()
    x = x @ (np.linalg.svd(x - x.mean(0))[2].T * np.arange(1, 61) ** -1.5)  # variances spread by 60^4 = 1e7
    with jax.enable_x64(False):
        narrow = [view.astype(np.float32) for view in (x, y)]
        lost = cca.cca(*narrow, 6, method="randomised", key=KEY)
        assert lost.status == _krylov.ROUNDING and lost.angle == np.inf and "larger ridge" in lost.describe()
        kept = cca.cca(*narrow, 6, method="randomised", key=KEY, ridge=1e-3)
        np.testing.assert_allclose(kept.correlations, reference(x, y, 6, 1e-3)[0], atol=1e-5)
    np.testing.assert_allclose(cca.cca(x, y, 6, method="randomised", key=KEY).correlations, RHO[:6], rtol=1e-8)


@pytest.mark.slow
def test_memory_mapped_views_are_read_in_blocks(tmp_path, monkeypatch):
    x, y = views(np.float32)
    monkeypatch.setattr(_krylov, "_BLOCK_BYTES", 64 * 140 * 4)  # 4 blocks and a rest of 44 rows
    for name, view in (("x", x), ("y", y)):
        np.save(tmp_path / f"{name}.npy", view)
    stored = [np.load(tmp_path / f"{name}.npy", mmap_mode="r") for name in "xy"]
    found = cca.cca(*stored, 6, method="randomised", key=KEY, tolerance=1e-3)
    np.testing.assert_allclose(found.correlations, RHO[:6], atol=1e-5)


@pytest.mark.slow
def test_exact_directions_can_be_traced_and_mapped(x64):
    x, y = views()
    x, y = jnp.asarray(x[:, :5]).reshape(2, 150, 5), jnp.asarray(y[:, :4]).reshape(2, 150, 4)
    mapped = jax.jit(jax.vmap(lambda a, b: cca.cca(a, b, 2, ridge=0.1)))(x, y)
    np.testing.assert_allclose(mapped.correlations[1], cca.cca(x[1], y[1], 2, ridge=0.1).correlations, rtol=1e-10)
    with pytest.raises(TypeError, match="outside jit"):
        jax.jit(lambda a, b: cca.cca(a, b, 2, method="randomised", key=KEY))(x[0], y[0])


# Kernel CCA


@pytest.mark.slow
def test_kernel_cca_of_linear_kernels_is_cca(x64):
    x, y = (view[:40, :6] for view in views())
    new_x, new_y = (view[40:50, :6] for view in views())
    linear, kernel = cca.cca(x, y, 4, ridge=0.1), cca.kernel_cca(x @ x.T, y @ y.T, 4, ridge=0.1)
    np.testing.assert_allclose(kernel.correlations, linear.correlations, rtol=1e-9)
    ours = cca.kernel_transform(kernel, new_x @ x.T, new_y @ y.T)
    for one, other in zip(ours, cca.transform(linear, new_x, new_y), strict=True):
        np.testing.assert_allclose(np.abs(one), np.abs(other), atol=1e-8)


def test_kernel_directions_meet_their_constraint_and_attain_the_correlations(x64):
    x = np.random.default_rng(0).standard_normal((40, 2))
    n, ridge = 40, 0.05
    kx, ky = (1 + x @ x.T) ** 3, np.exp(-((x[:, None] - x[None]) ** 2).sum(-1))
    found = cca.kernel_cca(kx, ky, 4, ridge=ridge)
    centring = np.eye(n) - 1 / n
    k, l = centring @ kx @ centring, centring @ ky @ centring
    a, b = np.asarray(found.x_coefficients), np.asarray(found.y_coefficients)
    for gram, c in ((k, a), (l, b)):
        np.testing.assert_allclose(c.T @ (gram @ gram / (n - 1) + ridge * gram) @ c, np.eye(4), atol=1e-7)
    np.testing.assert_allclose(a.T @ k @ l @ b / (n - 1), np.diag(found.correlations), atol=1e-8)
    # No other pair does better: an equivalent eigenproblem that is not symmetric, solved by another route.
    inverse = [np.linalg.inv(g + (n - 1) * ridge * np.eye(n)) for g in (k, l)]
    squares = np.sort(np.linalg.eigvals(inverse[0] @ l @ inverse[1] @ k).real)[::-1]
    np.testing.assert_allclose(found.correlations**2, squares[:4], rtol=1e-7)


def test_kernels_of_full_rank_need_a_ridge(x64):
    x = np.random.default_rng(0).standard_normal((40, 2))
    gram = np.exp(-50 * ((x[:, None] - x[None]) ** 2).sum(-1))
    with pytest.raises(ValueError, match=r"correlations are exactly 1.*pass ridge > 0"):
        cca.kernel_cca(gram, gram + np.eye(40), 2, ridge=0.0)


# Input that cannot be used

GOOD = np.random.default_rng(0).standard_normal((12, 3)).astype(np.float32)


@pytest.mark.parametrize(
    ("y", "options", "error", "message"),
    [
        (GOOD[:5], {}, ValueError, "12 and 5 points: pass pairs"),
        (GOOD.astype(complex), {}, TypeError, "y is complex"),
        (GOOD.astype(int), {}, TypeError, "y has dtype int64: cast"),
        (GOOD.astype(np.float64), {}, TypeError, "cast one to the other's"),
        (np.where(GOOD > 1, np.nan, GOOD).astype(np.float32), {}, ValueError, "y holds NaN"),
        (GOOD[:, 0], {}, ValueError, "y has shape"),
        (GOOD, {"ridge": -1.0}, ValueError, "ridge is -1.0: pass a finite number >= 0"),
        (GOOD, {"ridge": np.nan}, ValueError, "ridge is nan"),
        (GOOD, {"k": 4}, ValueError, r"k is 4.*min\(n - 1, dx, dy\) = 3 pairs"),
        (GOOD, {"method": "nipals"}, ValueError, 'choose "exact" or "randomised"'),
        (GOOD, {"method": "randomised", "key": None}, ValueError, "starts at random"),
    ],
)
def test_input_that_cannot_be_used_says_why(y, options, error, message, as_users_run):
    for method in ("exact", "randomised"):
        with pytest.raises(error, match=message):
            cca.cca(GOOD, y, **({"k": 1, "method": method, "key": KEY} | options))


@pytest.mark.slow
def test_kernels_that_cannot_be_used_say_why():
    gram = GOOD @ GOOD.T
    with pytest.raises(ValueError, match="kx has shape"):
        cca.kernel_cca(GOOD, gram, 1, ridge=0.1)
    with pytest.raises(ValueError, match="12 and 5 points"):
        cca.kernel_cca(gram, gram[:5, :5], 1, ridge=0.1)
    with pytest.raises(ValueError, match=r"ranks 3 and 3, and so only 3 pairs"):
        cca.kernel_cca(gram, gram, 4, ridge=0.1)
    model = cca.kernel_cca(gram, gram, 1, ridge=0.1)
    with pytest.raises(ValueError, match="cross_y has 3 columns, but the model was fitted with 12"):
        cca.kernel_transform(model, gram, GOOD)
