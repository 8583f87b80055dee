"""Kernel PCA and kernel CCA: the linear kernel, scikit-learn, the kernels of `ntk`, products in place of the matrix."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sklearn.decomposition
from test_pca import with_spectrum

from theorykit import data, encoders, ntk
from theorykit.spectral import _krylov, cca, pca

KEY = jax.random.key(0)
needs_infinite = pytest.mark.skipif(
    importlib.util.find_spec("neural_tangents") is None, reason="neural-tangents, an optional extra, is not installed"
)


@pytest.mark.slow
def test_kernel_pca_of_the_linear_kernel_is_pca(x64):
    x, _ = with_spectrum([3.0, 2.0, 1.0, 0.5], 25, mean=2.0)
    new = np.random.default_rng(9).standard_normal((6, 4))
    for centre in (True, False):
        linear, kernel = pca.pca(x, 3, centre=centre), pca.kernel_pca(x @ x.T, 3, centre=centre)
        np.testing.assert_allclose(kernel.variances, linear.variances, rtol=1e-10)
        np.testing.assert_allclose(kernel.total_variance, linear.total_variance, rtol=1e-12)
        ours, theirs = pca.kernel_transform(kernel, new @ x.T), pca.transform(linear, new)
        np.testing.assert_allclose(np.abs(ours), np.abs(theirs), atol=1e-10)  # signs follow another convention


def test_kernel_pca_agrees_with_scikit_learn(x64):
    rng = np.random.default_rng(0)
    x, new = rng.standard_normal((30, 3)), rng.standard_normal((5, 3))
    kernel = lambda a, b: np.exp(-0.5 * ((a[:, None] - b[None]) ** 2).sum(-1))  # noqa: E731
    theirs = sklearn.decomposition.KernelPCA(4, kernel="precomputed").fit(kernel(x, x))
    ours = pca.kernel_pca(kernel(x, x), 4)
    np.testing.assert_allclose(ours.variances * 29, theirs.eigenvalues_, rtol=1e-10)
    np.testing.assert_allclose(pca.kernel_transform(ours, kernel(new, x)), theirs.transform(kernel(new, x)), atol=1e-10)


def test_kernel_projections_have_the_variances_and_are_uncorrelated(x64):
    x = np.random.default_rng(0).standard_normal((40, 3))
    gram = (1 + x @ x.T) ** 2
    model = pca.kernel_pca(gram, 5)
    scores = pca.kernel_transform(model, gram)
    np.testing.assert_allclose(np.cov(scores.T), np.diag(model.variances), atol=1e-10 * model.variances[0])
    # Unit norm in the feature space.
    np.testing.assert_allclose(np.diag(model.coefficients.T @ gram @ model.coefficients), 1, rtol=1e-9)


def test_kernel_components_beyond_the_rank_are_zero(x64):
    x, _ = with_spectrum([2.0, 1.0], 20)
    model = pca.kernel_pca(x @ x.T, 4)
    np.testing.assert_allclose(model.variances, [2, 1, 0, 0], atol=1e-12)
    assert not np.any(model.coefficients[:, 2:])
    constant = pca.kernel_pca(np.ones((5, 5)), 2)
    assert not np.any(constant.variances) and not np.any(constant.coefficients)


# Repeated eigenvalues


def repeated():
    """Data (30, 5) with variances 2, 1, 1, 1 and 0.1, and their scores along the exact components."""
    x, components = with_spectrum([2.0, 1.0, 1.0, 1.0, 0.1], 30)
    return x, x @ components


def projector(scores):
    """Onto the span of functions of the points: what is left when the basis of an eigenspace is left open."""
    q = np.linalg.qr(np.asarray(scores))[0]
    return q @ q.T


def test_kernel_components_of_a_whole_eigenspace_are_determined_and_a_cut_is_not_reported(x64):
    x, scores = repeated()
    gram = x @ x.T
    whole, cut = pca.kernel_pca(gram, 4), pca.kernel_pca(gram, 2)
    found = projector(pca.kernel_transform(whole, gram)[:, 1:])
    np.testing.assert_allclose(found, projector(scores[:, 1:4]), atol=1e-10)
    second = np.asarray(pca.kernel_transform(cut, gram))[:, 1:]
    np.testing.assert_allclose(cut.variances, [2, 1], rtol=1e-10)
    np.testing.assert_allclose(projector(scores[:, 1:4]) @ second, second, atol=1e-10)  # inside the eigenspace
    assert np.linalg.norm(projector(second) - projector(scores[:, 1:2])) > 0.1  # somewhere
    assert cut.angle == 0 and cut.describe() == "solved densely"


def test_kernel_directions_of_a_whole_eigenspace_are_determined_and_a_cut_is_not_reported(x64):
    """Views with correlations 0.9, 0.5, 0.5, 0.5 exactly: u_j against rho_j u_j + sqrt(1 - rho_j^2) v_j."""
    rng = np.random.default_rng(0)
    columns = rng.standard_normal((30, 8))
    u, v = np.split(np.linalg.qr(columns - columns.mean(0))[0] * np.sqrt(29), 2, axis=1)
    rho = np.array([0.9, 0.5, 0.5, 0.5])
    turns = [np.linalg.qr(rng.standard_normal((4, 4)))[0] for _ in range(2)]
    x, y = u @ turns[0], (rho * u + np.sqrt(1 - rho**2) * v) @ turns[1]
    kx, ky = x @ x.T, y @ y.T
    whole, cut = cca.kernel_cca(kx, ky, 4, ridge=0.0), cca.kernel_cca(kx, ky, 2, ridge=0.0)
    np.testing.assert_allclose(whole.correlations, rho, rtol=1e-10)
    found = cca.kernel_transform(whole, kx, ky)[0]
    np.testing.assert_allclose(projector(found[:, 1:]), projector(u[:, 1:]), atol=1e-10)
    second = np.asarray(cca.kernel_transform(cut, kx, ky)[0])[:, 1:]
    np.testing.assert_allclose(cut.correlations, rho[:2], rtol=1e-10)
    np.testing.assert_allclose(projector(u[:, 1:]) @ second, second, atol=1e-9)
    assert np.linalg.norm(projector(second) - projector(u[:, 1:2])) > 0.1


# Kernels of encoders


def empirical(encoder, x):
    return ntk.empirical_ntk(encoder.apply, encoder.init(KEY, x[:1]), x)[:, :, 0, 0]


KERNELS = [
    pytest.param(empirical, id="empirical_ntk"),
    pytest.param(ntk.infinite_ntk, id="infinite_ntk", marks=needs_infinite),
    pytest.param(ntk.infinite_nngp, id="infinite_nngp", marks=needs_infinite),
]
ENCODER = encoders.MLP(width=8, features=1, depth=2)


def two_views():
    shared, own = np.split(np.random.default_rng(0).standard_normal((20, 6)), 2, axis=1)
    return tuple(data.to_sphere(jnp.asarray(view)) for view in (shared, shared + 0.3 * own))


@pytest.mark.slow
@pytest.mark.parametrize("kernel", KERNELS)
def test_kernels_of_encoders_have_principal_components(x64, kernel):
    gram = kernel(ENCODER, two_views()[0])
    model = pca.kernel_pca(gram, 3)
    scores = pca.kernel_transform(model, gram)
    np.testing.assert_allclose(np.cov(scores.T), np.diag(model.variances), atol=1e-10 * model.variances[0])
    np.testing.assert_allclose(np.diag(model.coefficients.T @ gram @ model.coefficients), 1, rtol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("kernel", KERNELS)
def test_two_views_have_canonical_pairs_in_the_feature_spaces_of_encoders(x64, kernel):
    kx, ky = (kernel(ENCODER, view) for view in two_views())
    found = cca.kernel_cca(kx, ky, 2, ridge=0.1)
    u, v = cca.kernel_transform(found, kx, ky)
    variance = np.var(u, axis=0, ddof=1)
    assert np.all((variance > 0) & (variance < 1))
    # The regularised correlation is the covariance of the variates.
    np.testing.assert_allclose(np.sum(u * v, axis=0) / 19, found.correlations, rtol=1e-9)


def test_a_kernel_with_output_axes_is_an_error_that_says_which_to_take():
    with pytest.raises(ValueError, match=r"kernel\[:, :, 0, 0\]"):
        pca.kernel_pca(np.ones((3, 3, 1, 1), np.float32), 1)


# Products in place of the matrix


def smooth_kernel(n=120):
    x = np.random.default_rng(0).standard_normal((n, 3))
    return jnp.asarray(np.exp(-((x[:, None] - x[None]) ** 2).sum(-1) / 8))


@pytest.mark.slow
@pytest.mark.parametrize("centre", [True, False])
def test_products_give_the_dense_components_from_a_few_blocks(x64, centre):
    gram, shapes = smooth_kernel(), []

    def product(block):
        shapes.append(block.shape)
        return jnp.matmul(gram, block, precision="highest")

    found = pca.kernel_pca_by_products(product, jnp.diagonal(gram), 4, key=KEY, centre=centre, tolerance=1e-9)
    dense = pca.kernel_pca(gram, 4, centre=centre)
    assert found.status == _krylov.CONVERGED and found.angle <= 1e-9 and "converged" in found.describe()
    assert set(shapes) == {(120, 1), (120, 16)} and len(shapes) == int(found.steps) + 1
    np.testing.assert_allclose(found.variances, dense.variances, rtol=1e-9)
    np.testing.assert_allclose(found.coefficients, dense.coefficients, atol=1e-8 * np.abs(dense.coefficients).max())
    np.testing.assert_allclose(found.means, dense.means, atol=1e-14)
    np.testing.assert_allclose(found.total_variance, dense.total_variance, rtol=1e-12)


def test_products_report_a_cut_through_repeated_variances_and_zeros_beyond_the_rank(x64):
    x, _ = with_spectrum([2.0, 1.0, 1.0, 1.0, 0.1], 120)

    def product(block):
        return jnp.matmul(x, jnp.matmul(x.T, block, precision="highest"), precision="highest")

    diagonal = jnp.asarray(np.sum(x**2, axis=1))
    cut = pca.kernel_pca_by_products(product, diagonal, 2, key=KEY)
    assert cut.status == _krylov.ROUNDING and cut.angle > pca.TOLERANCE
    np.testing.assert_allclose(cut.variances, [2, 1], rtol=1e-9)
    beyond = pca.kernel_pca_by_products(product, diagonal, 7, key=KEY)
    np.testing.assert_allclose(beyond.variances, [2, 1, 1, 1, 0.1, 0, 0], atol=1e-10)
    assert not np.any(beyond.coefficients[:, 5:])


@pytest.mark.slow
def test_the_tangent_kernel_has_components_without_being_formed(x64):
    x = data.to_sphere(jax.random.normal(KEY, (80, 3)))
    params = ENCODER.init(KEY, x[:1])

    @jax.jit
    def product(block):
        one = lambda v: ntk.ntk_vector_product(ENCODER.apply, params, x, x, v[:, None])[:, 0]  # noqa: E731
        return jax.vmap(one, 1, 1)(block)

    gram = empirical(ENCODER, x)
    found = pca.kernel_pca_by_products(product, jnp.diagonal(gram), 3, key=KEY, tolerance=1e-8)
    dense = pca.kernel_pca(gram, 3)
    np.testing.assert_allclose(found.variances, dense.variances, rtol=1e-9)
    scores = [pca.kernel_transform(model, gram) for model in (found, dense)]
    np.testing.assert_allclose(*scores, atol=1e-7 * float(jnp.max(jnp.abs(scores[1]))))


# Input that cannot be used


@pytest.mark.parametrize(
    ("gram", "error", "message"),
    [
        (np.eye(3, 4), ValueError, "must be square"),
        (np.array([[1.0, 1.0], [0.0, 1.0]]), ValueError, "not symmetric"),
        (np.diag([1.0, 1.0, -1.0]), ValueError, "not positive semidefinite"),
        (np.diag([1.0, np.nan]), ValueError, "NaN"),
        (np.eye(2, dtype=complex), TypeError, "complex"),
    ],
)
def test_gram_matrices_that_cannot_be_used_say_why(gram, error, message, as_users_run):
    with pytest.raises(error, match=message):
        pca.kernel_pca(gram, 1)


def test_more_kernel_components_than_points_are_an_error():
    gram = np.eye(4, dtype=np.float32)
    with pytest.raises(ValueError, match="k is 5, but there are 1 to n = 4 components"):
        pca.kernel_pca(gram, 5)
    with pytest.raises(ValueError, match="k is 5, but there are 1 to n = 4 components"):
        pca.kernel_pca_by_products(lambda b: b, jnp.ones(4), 5, key=KEY)
    with pytest.raises(ValueError, match="k is 4, but there are 1 to n - 1 = 3 pairs"):
        cca.kernel_cca(gram, gram, 4, ridge=0.1)


def test_kernels_of_points_that_do_not_differ_have_no_directions():
    """Centred, such a kernel is the rounding of its entries and no direction."""
    x = np.random.default_rng(0).standard_normal((12, 2)).astype(np.float32)
    constant = np.full((12, 12), 0.02, np.float32)
    for kx, ky in ((constant, x @ x.T), (x @ x.T, constant)):
        with pytest.raises(ValueError, match=r"and so only 0 pairs.*pass views with a feature that varies"):
            cca.kernel_cca(kx, ky, 1, ridge=0.1)
    for found in (
        pca.kernel_pca(constant, 2),
        pca.kernel_pca_by_products(
            lambda b: jnp.matmul(constant, b, precision="highest"), jnp.diagonal(constant), 2, key=KEY
        ),
    ):
        assert not np.any(found.variances) and not np.any(found.coefficients)


def test_a_kernel_of_other_points_is_an_error():
    with pytest.raises(ValueError, match="the same training points"):
        pca.kernel_transform(pca.kernel_pca(np.eye(4, dtype=np.float32), 1), np.eye(4, 3, dtype=np.float32))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"diagonal": jnp.ones((4, 4))}, ValueError, r"pass k\(x_i, x_i\)"),
        ({"diagonal": jnp.ones(1)}, ValueError, "two or more points"),
        ({"diagonal": -jnp.ones(4)}, ValueError, "negative entries"),
        ({"diagonal": jnp.full(4, jnp.nan)}, ValueError, "diagonal holds NaN"),
        ({"diagonal": jnp.ones(4, complex)}, TypeError, "real floating point"),
        ({"product": lambda b: b[:2]}, ValueError, r"maps \(4, 1\) of float32 to \(2, 1\)"),
        ({"product": lambda b: b.astype(jnp.float16)}, TypeError, "to .* of float16: return K times the block"),
        ({"product": lambda b: jnp.nan * b}, ValueError, "product holds NaN"),
        ({"tolerance": 0.0}, ValueError, "sine of an angle"),
    ],
)
def test_products_that_cannot_be_used_say_why(changes, error, message, as_users_run):
    given = {"product": lambda b: b, "diagonal": jnp.ones(4), "k": 1, "key": KEY} | changes
    with pytest.raises(error, match=message):
        pca.kernel_pca_by_products(**given)


def test_products_cannot_be_traced():
    with pytest.raises(TypeError, match="outside jit"):
        jax.jit(lambda d: pca.kernel_pca_by_products(lambda b: b, d, 1, key=KEY))(jnp.ones(4))
