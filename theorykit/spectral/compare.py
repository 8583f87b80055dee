r"""How far apart two representations are, by measures that know which differences mean nothing.

Encoders are not unique: (P f, P^-T g) gives the same scores for every invertible P. So compare subspaces, Gram matrices
and best linear maps. Rows are samples and columns are features, except that subspaces are given by bases (d, k).

=============================  ==========================================================  ==================
measure                        does not change under                                       compares
=============================  ==========================================================  ==================
`principal_angles`             rotation of the space, choice of either basis               subspaces
`projector_distance`           the same                                                    subspaces
`spectrum_overlap`             the same                                                    subspaces
`linear_cka`                   shift, rotation, scale of either; not other linear maps     Gram matrices
`kernel_cka`                   positive scale of either; terms a_i + a_j                   Gram matrices
`procrustes`                   rotation of either, scale of both (of either if scaled)     coordinates
`linear_fit` (its R^2)         shift and invertible map of x; shift, rotation, scale of y  features
`mean_correlation`             shift, scale, sign, order; by ranks, any monotone map       single features
`distance_from_orthogonality`  rotation on either side, scale                              a matrix with O(p)
`effective_rank`               rotation on either side, scale                              (one spectrum)
=============================  ==========================================================  ==================

"Rotation" is any orthogonal map, so that reflections count. `null` gives the distribution of each measure where nothing
is shared. Types and shapes are checked always. Values (finite, orthonormal, not constant) raise where they are known;
inside jit, vmap or grad, where they are not, bad values give NaN instead.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from theorykit.spectral._alignment import kernel_cka, linear_cka
from theorykit.spectral._matrices import (
    centre,
    guard,
    largest,
    matrices,
    negligible,
    paired,
    product,
    singular_values,
    unit_columns,
)
from theorykit.spectral._null import null, null_distances, random_features, random_subspaces
from theorykit.spectral._subspaces import orthonormal_basis, principal_angles, projector_distance, spectrum_overlap

__all__ = [
    "LinearFit",
    "MeanCorrelation",
    "Procrustes",
    "distance_from_orthogonality",
    "effective_rank",
    "kernel_cka",
    "linear_cka",
    "linear_fit",
    "mean_correlation",
    "null",
    "null_distances",
    "orthonormal_basis",
    "principal_angles",
    "procrustes",
    "projector_distance",
    "random_features",
    "random_subspaces",
    "spectrum_overlap",
]


class Procrustes(NamedTuple):
    """What `procrustes` found: ``scale * x @ rotation`` is closest to y.

    Attributes
    ----------
    rotation
        Orthogonal, (p, p); its determinant may be -1. Not unique where x^T y is singular; the rest is.
    scale
        At least 0; 1 if none was asked for.
    residual
        ||scale x rotation - y||_F / ||y||_F; with a scale in [0, 1] and symmetric in x and y.
    """

    rotation: Float[Array, "p p"]
    scale: Float[Array, ""]
    residual: Float[Array, ""]


class LinearFit(NamedTuple):
    """What `linear_fit` found: ``x @ matrix + offset`` is closest to y.

    Attributes
    ----------
    matrix
        (p, q).
    offset
        (q,).
    r2
        Explained share of the total variance of y, in [0, 1], on the data of the fit.
    """

    matrix: Float[Array, "p q"]
    offset: Float[Array, " q"]
    r2: Float[Array, ""]


class MeanCorrelation(NamedTuple):
    """What `mean_correlation` found: feature j of x belongs to feature ``assignment[j]`` of y.

    Attributes
    ----------
    value
        Mean absolute correlation of the assigned pairs, in [0, 1].
    assignment
        (p,) a permutation.
    signs
        (p,) signs of the assigned correlations, +1 or -1, so that ``x * signs`` correlates with ``y[:, assignment]``.
    """

    value: Float[Array, ""]
    assignment: Int[Array, " p"]
    signs: Float[Array, " p"]


def procrustes(x: Float[Array, "n p"], y: Float[Array, "n p"], *, scaled: bool = True) -> Procrustes:
    r"""Orthogonal map, and scale, that brings x closest to y.

    .. math:: \min_{R^T R = I, \, s} \|s X R - Y\|_F, \qquad X^T Y = A \Sigma B^T, \quad R = A B^T, \quad
              s = \mathrm{tr} \Sigma / \|X\|_F^2

    Nothing is centred: subtract the means first if shifts mean nothing.

    Parameters
    ----------
    x, y
        Features of the same samples, (n, p) each.
    scaled
        Fit s too; otherwise s = 1.

    Returns
    -------
    Procrustes
        Rotation, scale and relative residual.

    Raises
    ------
    TypeError, ValueError
        If the features are not real and finite, the shapes differ, or one is all zero.

    Source
    ------
    Schonemann (1966), A generalized solution of the orthogonal Procrustes problem; Schonemann, Carroll (1970), scale.
    """
    where = "procrustes"
    x, y = paired(where, x, y, least=1)
    if x.shape != y.shape:
        raise ValueError(f"{where}: shapes {x.shape} and {y.shape}; give equal ones, or use linear_fit")
    x = guard(x, jnp.any(x != 0) & jnp.any(y != 0), f"{where}: x or y is all zero, every rotation fits; give features")
    # In units of the largest entries, squares cannot leave the range of the dtype.
    units = largest(y) / largest(x)
    x, y = x / largest(x), y / largest(y)
    left, spectrum, right = jnp.linalg.svd(product(x.T, y))
    rotation = product(left, right)
    scale = jnp.sum(spectrum) / jnp.sum(x * x) if scaled else 1 / units
    residual = jnp.linalg.norm(scale * product(x, rotation) - y) / jnp.linalg.norm(y)
    return Procrustes(rotation, scale * units if scaled else jnp.ones_like(scale), residual)


def linear_fit(x: Float[Array, "n p"], y: Float[Array, "n q"]) -> LinearFit:
    r"""Affine map that brings x closest to y (least squares), and the share of variance that it explains.

    .. math:: \min_{M, b} \|X M + 1 b^T - Y\|_F, \qquad R^2 = 1 - \frac{\|X M + 1 b^T - Y\|_F^2}{\|Y - \bar Y\|_F^2}

    Variances are pooled over the columns of y, so that rotating y does not change R^2. If x is rank deficient, the map
    is the one of least norm for features of unit variance. With p >= n - 1 independent features every y is fitted
    and R^2 is 1: compare with `null`, whose mean is p/(n-1), or apply the map to new samples.

    Parameters
    ----------
    x, y
        Features of the same samples, (n, p) and (n, q). Constant columns of x get zero weight.

    Returns
    -------
    LinearFit
        Matrix, offset and R^2.

    Raises
    ------
    TypeError, ValueError
        If the features are not real and finite, the numbers of samples differ, or y is the same for all samples.

    Source: definition.
    """
    x, y = paired("linear_fit", x, y, least=2)
    xc, yc = centre(x), centre(y)
    yc = guard(yc, jnp.any(yc != 0), "linear_fit: y is the same for all samples, R^2 is 0/0; give a y that varies")
    # In these units, squares and products cannot leave the range of the dtype.
    units = largest(yc)
    yc = yc / units
    unit, norms = unit_columns(xc)
    left, spectrum, right = jnp.linalg.svd(unit, full_matrices=False)
    kept = spectrum > negligible(unit) * spectrum[0]
    fitted = jnp.where(kept[:, None], product(left.T, yc), 0)
    r2 = 1 - jnp.sum((product(left, fitted) - yc) ** 2) / jnp.sum(yc**2)
    weights = product(right.T, fitted / jnp.where(kept, spectrum, 1)[:, None])
    matrix = weights * (units / norms)[:, None]
    offset = jnp.mean(y, axis=0) - product(jnp.mean(x, axis=0)[None, :], matrix)[0]
    return LinearFit(matrix, offset, r2)


def mean_correlation(
    x: Float[Array, "n p"], y: Float[Array, "n p"], *, method: Literal["pearson", "spearman"] = "pearson"
) -> MeanCorrelation:
    r"""Mean correlation coefficient: match single features one to one, as well as possible.

    .. math:: \max_{\pi} \frac{1}{p} \sum_{j} |\mathrm{corr}(x_j, y_{\pi(j)})|

    Rotated features are not recovered: this is the measure for identifiability up to order, sign and scale.

    Parameters
    ----------
    x, y
        Features of the same n >= 2 samples, (n, p) each.
    method
        "pearson", or "spearman": correlation of ranks, for features that are known up to a monotone map only.

    Returns
    -------
    MeanCorrelation
        Value, assignment and signs.

    Raises
    ------
    TypeError, ValueError
        If the features are not real and finite, the shapes differ, a feature is constant, or the method is unknown.

    Source
    ------
    Hyvarinen, Morioka (arXiv 1605.06336), the coefficient; the assignment is found by the Hungarian method.
    """
    where = "mean_correlation"
    if method not in ("pearson", "spearman"):
        raise ValueError(f"{where}: method = {method!r}; choose 'pearson' or 'spearman'")
    x, y = paired(where, x, y, least=2)
    if x.shape != y.shape:
        raise ValueError(f"{where}: shapes {x.shape} and {y.shape}; give as many features as sources, one a column")
    if method == "spearman":
        x, y = (jax.scipy.stats.rankdata(a, axis=0).astype(x.dtype) for a in (x, y))
    x, y = centre(x), centre(y)
    varies = jnp.all(jnp.any(x != 0, axis=0)) & jnp.all(jnp.any(y != 0, axis=0))
    x = guard(x, varies, f"{where}: a feature is the same for all samples and has no correlation; drop that column")
    correlations = product(unit_columns(x)[0].T, unit_columns(y)[0])
    # The solver works in the default float dtype. Rows are features of y, so that it returns one for each column, x.
    gains = jnp.abs(correlations).T.astype(jnp.result_type(float))
    assignment, order = _assign(-gains)
    matched = correlations[order, assignment]
    # Rounding can lift a perfect correlation above 1.
    return MeanCorrelation(
        jnp.minimum(jnp.mean(jnp.abs(matched)), 1), assignment, jnp.where(matched < 0, -1, 1).astype(x.dtype)
    )


# Compiled here, because it would otherwise be compiled anew at each call.
_assign = jax.jit(optax.assignment.hungarian_algorithm)


def distance_from_orthogonality(a: Float[Array, "p p"]) -> Float[Array, ""]:
    r"""Relative distance of a square matrix from the orthogonal ones, after the best scaling.

    .. math:: \min_{s, \, Q^T Q = I} \frac{\|s A - Q\|_F}{\|Q\|_F} = \sqrt{1 - \frac{\bar\sigma^2}{\overline{\sigma^2}}}
              = \frac{\mathrm{std}(\sigma)}{\sqrt{\overline{\sigma^2}}}

    with the mean and standard deviation of the p singular values. Computed by the last form, which is accurate near 0.

    Parameters
    ----------
    a
        Matrix, (p, p), not zero.

    Returns
    -------
    Array
        A number in [0, sqrt(1 - 1/p)], the largest for rank one. For Gaussian random matrices about 0.53, the limit
        for large p being sqrt(1 - (8 / (3 pi))^2).

    Raises
    ------
    TypeError, ValueError
        If the matrix is not real, finite, square and different from zero.

    Source: derivation (the best Q is the polar factor); quarter-circle law for the random value.
    """
    where = "distance_from_orthogonality"
    (a,) = matrices(where, a=a)
    if a.shape[0] != a.shape[1]:
        raise ValueError(f"{where}: shape {a.shape}; give a square matrix")
    spectrum = _spectrum(where, a)
    return jnp.std(spectrum) / jnp.sqrt(jnp.mean(spectrum**2))


def effective_rank(x: Float[Array, "n p"]) -> Float[Array, ""]:
    r"""Effective rank: exponential of the entropy of the normalised singular values.

    .. math:: \exp\Big(-\sum_i q_i \ln q_i\Big), \qquad q_i = \sigma_i / \sum_j \sigma_j

    Parameters
    ----------
    x
        Matrix, (n, p), not zero. Nothing is centred.

    Returns
    -------
    Array
        A number between 1 and the rank; equal to it where the non-zero singular values are equal.

    Raises
    ------
    TypeError, ValueError
        If the matrix is not real, finite and different from zero.

    Source
    ------
    Roy, Vetterli (2007), The effective rank: a measure of effective dimensionality.
    """
    spectrum = _spectrum("effective_rank", *matrices("effective_rank", x=x))
    return jnp.exp(jnp.sum(jax.scipy.special.entr(spectrum / jnp.sum(spectrum))))


def _spectrum(where: str, a: Array) -> Array:
    """Singular values in units of the largest entry."""
    a = guard(a, jnp.any(a != 0), f"{where}: the matrix is all zero and has no spectrum to compare; check its source")
    return singular_values(a / largest(a))
