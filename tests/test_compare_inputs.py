"""Comparisons under transformations, dtypes and scales, and what they refuse."""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparing import close, gram, haar, normal
from jax import export

from theorykit.spectral import compare
from theorykit.spectral.compare import (
    distance_from_orthogonality,
    effective_rank,
    kernel_cka,
    linear_cka,
    linear_fit,
    mean_correlation,
    null,
    null_distances,
    orthonormal_basis,
    principal_angles,
    procrustes,
    projector_distance,
    random_subspaces,
    spectrum_overlap,
)

SUBSPACE_MEASURES = [principal_angles, projector_distance, spectrum_overlap]
FEATURE_MEASURES = [linear_cka, procrustes, linear_fit, mean_correlation]


def debiased_cka(x, y):
    return linear_cka(x, y, debiased=True)


# ---------------------------------------------------------------- transformations, dtypes, scales


def every_measure():
    """Name, function of arrays, arguments."""
    u, v, x, y = haar(1, 9, 3), haar(2, 9, 3), normal(3, 9, 3), normal(4, 9, 3)
    table = {measure.__name__: (measure, (u, v)) for measure in SUBSPACE_MEASURES}
    table |= {measure.__name__: (measure, (x, y)) for measure in FEATURE_MEASURES}
    table["debiased_cka"] = debiased_cka, (x, y)
    table["kernel_cka"] = kernel_cka, (gram(x), gram(y))
    table["orthonormal_basis"] = orthonormal_basis, (x,)
    table["distance_from_orthogonality"] = distance_from_orthogonality, (gram(x),)
    table["effective_rank"] = effective_rank, (x,)
    return table


NAMES = list(every_measure())
SCALE_FREE = [
    name for name in NAMES if name not in ("principal_angles", "projector_distance", "spectrum_overlap", "linear_fit")
]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_measures_are_the_same_under_jit_and_vmap(x64, name):
    function, arguments = every_measure()[name]
    plain = function(*arguments)
    jax.tree.map(close, jax.jit(function)(*arguments), plain)
    stacked = [jnp.stack([a, a]) for a in arguments]
    jax.tree.map(lambda a, b: close(a[1], b), jax.vmap(function)(*stacked), plain)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_results_have_the_dtype_of_the_input_also_where_float64_is_allowed(x64, name):
    function, arguments = every_measure()[name]
    for dtype in (jnp.float32, jnp.float64):
        result = jax.tree.leaves(function(*(a.astype(dtype) for a in arguments)))
        assert all(leaf.dtype == dtype for leaf in result if jnp.issubdtype(leaf.dtype, jnp.floating))


@pytest.mark.slow
@pytest.mark.parametrize("name", SCALE_FREE)
@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_measures_that_ignore_scale_ignore_one_whose_square_float32_lacks(name, scale):
    function, arguments = every_measure()[name]
    jax.tree.map(close, function(*(scale * a for a in arguments)), function(*arguments))


@pytest.mark.slow
def test_linear_fit_scales_with_its_data():
    x, y = normal(1, 9, 3), normal(2, 9, 2)
    plain, scaled = linear_fit(x, y), linear_fit(1e-15 * x, 1e15 * y)
    close(scaled.r2, plain.r2)
    close(scaled.matrix / 1e30, plain.matrix)
    close(scaled.offset / 1e15, plain.offset)
    close(procrustes(1e-15 * x, 1e15 * x).scale / 1e30, 1.0)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "mean_correlation"])
def test_products_are_lowered_at_full_precision(name):
    function, arguments = every_measure()[name]
    text = export.export(jax.jit(function), platforms=["tpu"])(*arguments).mlir_module()
    products = re.findall(r"stablehlo\.(?:dot_general|dot)\b.*", text)
    assert all(re.findall(r"\b(DEFAULT|HIGH|HIGHEST)\b", line) == ["HIGHEST"] * 2 for line in products)


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize("name", NAMES)
def test_values_that_are_not_finite_are_refused_and_give_nan_under_jit(name):
    function, arguments = every_measure()[name]
    for i, bad in itertools.product(range(len(arguments)), [np.nan, np.inf]):
        broken = [a.at[1, 1].set(bad) if i == j else a for j, a in enumerate(arguments)]
        with pytest.raises(ValueError, match="NaN or an infinity"):
            function(*broken)
        result = jax.tree.leaves(jax.jit(function)(*broken))
        if name == "linear_fit":  # the last is R^2
            result = result[-1:]
        if name in ("procrustes", "mean_correlation"):  # what is fitted is meaningless then, and the quality says so
            result = result[-1:] if name == "procrustes" else result[:1]
        assert all(jnp.all(jnp.isnan(leaf)) for leaf in result)


@pytest.mark.usefixtures("as_users_run")
@pytest.mark.parametrize("name", NAMES)
def test_arrays_of_the_wrong_kind_are_refused(name):
    function, arguments = every_measure()[name]
    last = [*arguments[:-1]]
    bad = arguments[-1]
    for value, error, message in [
        (bad.astype(complex), TypeError, "complex64 and only real numbers"),
        (bad.astype(int), TypeError, "cast it to floating point"),
        (np.asarray(bad), TypeError, "pass a JAX array"),
        (bad[0], ValueError, "not empty, or vmap"),
        (bad[None], ValueError, "not empty, or vmap"),
        (bad[:0], ValueError, "not empty, or vmap"),
    ]:
        with pytest.raises(error, match=message):
            function(*last, value)
    if len(arguments) == 2:
        with pytest.raises(TypeError, match=r"dtypes differ.*cast one"):
            function(*last, bad.astype(jnp.float16))


@pytest.mark.usefixtures("as_users_run")
@pytest.mark.parametrize("measure", [*SUBSPACE_MEASURES, *FEATURE_MEASURES, kernel_cka, debiased_cka])
def test_different_numbers_of_rows_are_refused(measure):
    with pytest.raises(ValueError, match=r"\(d, k\) with one d|of the same n|on the same n"):
        measure(jnp.eye(6), jnp.eye(5))


@pytest.mark.parametrize("measure", SUBSPACE_MEASURES)
def test_bases_that_are_not_orthonormal_are_refused_and_give_nan_under_jit(measure):
    good = haar(1, 9, 3)
    for bad in [1.01 * good, good.at[:, 0].set(good[:, 1]), normal(2, 9, 3)]:
        for pair, name in [((bad, good), "u"), ((good, bad), "v")]:
            with pytest.raises(ValueError, match=rf"columns of {name} are not orthonormal; pass orthonormal_basis"):
                measure(*pair)
            assert jnp.all(jnp.isnan(jax.jit(measure)(*pair)))


@pytest.mark.usefixtures("as_users_run")
def test_more_columns_than_dimensions_are_refused():
    wide = jnp.ones((3, 5))
    for function in (lambda: principal_angles(wide, wide), lambda: orthonormal_basis(wide)):
        with pytest.raises(ValueError, match=r"k = 5 columns in d = 3 dimensions.*transpose"):
            function()
    for k in (0, 5):
        with pytest.raises(ValueError, match="choose 1 <= k <= d"):
            random_subspaces(jax.random.key(0), 3, k, 1)
        with pytest.raises(ValueError, match="choose 1 <= k <= d"):
            null_distances(jax.random.key(0), 3, k, 10)


@pytest.mark.usefixtures("as_users_run")
@pytest.mark.parametrize("measure", [projector_distance, spectrum_overlap])
def test_distances_of_subspaces_of_different_dimensions_are_refused(measure):
    with pytest.raises(ValueError, match="subspaces of one dimension, or use principal_angles"):
        measure(haar(1, 6, 2), haar(2, 6, 3))


@pytest.mark.usefixtures("as_users_run")
def test_sizes_that_a_measure_cannot_have_are_refused():
    x = normal(1, 6, 3)
    with pytest.raises(ValueError, match="equal ones, or use linear_fit"):
        procrustes(x, x[:, :2])
    with pytest.raises(ValueError, match="as many features as sources"):
        mean_correlation(x, x[:, :2])
    with pytest.raises(ValueError, match="square matrix"):
        distance_from_orthogonality(x)
    with pytest.raises(ValueError, match=r"two kernels \(n, n\)"):
        kernel_cka(x, x)
    for function in (linear_cka, linear_fit, mean_correlation):
        with pytest.raises(ValueError, match="n >= 2 samples"):
            function(x[:1], x[:1])
    with pytest.raises(ValueError, match="n >= 4 samples"):
        debiased_cka(x[:3], x[:3])
    with pytest.raises(ValueError, match="n >= 4 samples"):
        kernel_cka(gram(x[:3]), gram(x[:3]), debiased=True)
    with pytest.raises(ValueError, match="count of at least 1"):
        random_subspaces(jax.random.key(0), 3, 2, 0)
    with pytest.raises(ValueError, match="at least 1"):
        null(jax.random.key(0), linear_cka, (3, 2, 2), 0)
    with pytest.raises(ValueError, match="choose 'pearson' or 'spearman'"):
        mean_correlation(x, x, method="kendall")


def test_kernels_must_be_symmetric():
    k = gram(normal(1, 6, 3))
    assert kernel_cka(k.at[0, 1].multiply(1 + 1e-6), k) > 0.999
    with pytest.raises(ValueError, match="l is not symmetric"):
        kernel_cka(k, k.at[0, 1].add(1))


def test_zero_matrices_are_refused_and_give_nan_under_jit():
    x, zero = normal(1, 6, 3), jnp.zeros((6, 3))
    for function, arguments, message in [
        (procrustes, (x, zero), "all zero, every rotation fits"),
        (procrustes, (zero, x), "all zero, every rotation fits"),
        (linear_fit, (x, zero + 0.1), "y is the same for all samples"),
        (effective_rank, (zero,), "matrix is all zero"),
        (distance_from_orthogonality, (jnp.zeros((3, 3)),), "matrix is all zero"),
    ]:
        with pytest.raises(ValueError, match=message):
            function(*arguments)
        assert jnp.isnan(jax.tree.leaves(jax.jit(function)(*arguments))[-1])


def test_everything_public_is_listed_and_described():
    for name in compare.__all__:
        assert getattr(compare, name).__doc__
