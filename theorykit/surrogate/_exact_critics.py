"""Pairs with a log density ratio in closed form, and the variance of NWJ; `mutual_information` exports the names."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from theorykit.similarity import check_array
from theorykit.surrogate.joint import check_joint, chi_square, density_ratio

Correlation = float | Float[Array, ""]


def gaussian_information(correlation: Correlation, dimension: int) -> Float[Array, ""]:
    r"""Mutual information of Gaussian pairs.

    .. math:: I = -\tfrac{d}{2} \ln (1 - \rho^2)

    Parameters
    ----------
    correlation : scalar
        rho of every coordinate of x with the same coordinate of y, strictly between -1 and 1; may be traced.
    dimension : int
        d >= 1 independent coordinates.

    Returns
    -------
    I in nats.

    Raises
    ------
    ValueError
        If the correlation is outside (-1, 1) or the dimension below 1.
    """
    rho = _checked("gaussian_information", correlation, dimension)
    return -dimension / 2 * jnp.log1p(-rho * rho)


def gaussian_chi_square(correlation: Correlation, dimension: int) -> Float[Array, ""]:
    r"""Chi-square divergence of Gaussian pairs from independence.

    .. math:: \chi^2 = (1 - \rho^2)^{-d} - 1 = e^{2 I} - 1

    Parameters
    ----------
    correlation, dimension
        As in `gaussian_information`.

    Returns
    -------
    chi^2, without unit.

    Raises
    ------
    ValueError
        As `gaussian_information`.

    Source
    ------
    Derivation: r = sum_k rho^k h_k(x) h_k(y) in Hermite polynomials (Mehler), so E_pq r^2 = sum_k rho^(2k) for d = 1.
    """
    return jnp.expm1(2 * gaussian_information(correlation, dimension))


def gaussian_log_ratio(x: Float[Array, "n d"], y: Float[Array, "m d"], correlation: Correlation) -> Float[Array, "n m"]:
    r"""The exact critic of Gaussian pairs: log density ratio of every x with every y.

    .. math:: \ln r(x, y) = \frac{\rho \langle x, y \rangle - \rho^2 (|x|^2 + |y|^2) / 2}{1 - \rho^2}
              - \frac{d}{2} \ln (1 - \rho^2)

    Parameters
    ----------
    x, y : (n, d), (m, d)
        Standard normal coordinates, each of x correlated with the same of y only.
    correlation : scalar
        rho, as in `gaussian_information`.

    Returns
    -------
    (n, m) in nats.

    Raises
    ------
    TypeError, ValueError
        If x and y are not floating-point arrays (n, d) and (m, d) of one dtype, or the correlation is outside (-1, 1).
    """
    check_array("gaussian_log_ratio", "x", x)
    check_array("gaussian_log_ratio", "y", y, like=x)
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1]:
        raise ValueError(f"gaussian_log_ratio: shapes {x.shape} and {y.shape}; give rows of one length, (n, d), (m, d)")
    rho = jnp.asarray(_checked("gaussian_log_ratio", correlation, x.shape[1]), x.dtype)
    products = jnp.matmul(x, y.T, precision="highest")
    squares = jnp.sum(x * x, axis=1)[:, None] + jnp.sum(y * y, axis=1)[None, :]
    return (rho * products - rho * rho * squares / 2) / (1 - rho * rho) + gaussian_information(rho, x.shape[1])


def gaussian_nwj_variance(correlation: Correlation, dimension: int, rows: int) -> Float[Array, ""]:
    r"""Variance of `estimate_nwj` with the exact critic 1 + ln r on n Gaussian pairs.

    .. math:: Var = \frac{d \rho^2}{n} + \frac{(1 - \rho^2)^{-d} + (1 - \rho^4)^{-d} - 2}{n (n - 1)}

    It grows as e^{2I}.

    Parameters
    ----------
    correlation, dimension
        As in `gaussian_information`.
    rows : int
        n >= 2 pairs in a batch.

    Returns
    -------
    The variance in nats squared.

    Raises
    ------
    ValueError
        As `gaussian_information`, or for fewer than two pairs.

    Source
    ------
    Derivation: `nwj_variance` with singular values rho^k; ln r is a quadratic form of variance rho^2 for d = 1.
    """
    rho = _checked("gaussian_nwj_variance", correlation, dimension)
    _check_rows("gaussian_nwj_variance", rows)
    exchange = jnp.expm1(-dimension * jnp.log1p(-(rho**4)))
    return dimension * rho * rho / rows + (gaussian_chi_square(rho, dimension) + exchange) / (rows * (rows - 1))


def nwj_variance(joint: Float[Array, "nx ny"], rows: int) -> Float[Array, ""]:
    r"""Variance of `estimate_nwj` with the exact critic 1 + ln r on n pairs of a finite joint.

    .. math:: Var = \frac{Var_P \ln r}{n} + \frac{\chi^2 + \xi}{n (n - 1)}, \qquad
              \xi = E \, r(X, Y') \, r(X', Y) - 1 = \sum_{k \ge 1} \sigma_k^4, \quad \chi^2 = \sum_{k \ge 1} \sigma_k^2

    for two independent pairs (X, Y), (X', Y') and the singular values 1 = sigma_0, sigma_1, ... of r. With m negatives
    drawn independently of each other in place of the n (n - 1) of the batch the second term is chi^2 / m. As
    chi^2 >= e^I - 1, it grows exponentially in I in every family; the rate, at least 1, depends on the family.

    Parameters
    ----------
    joint : (nx, ny)
        Probabilities of pairs.
    rows : int
        n >= 2 pairs in a batch.

    Returns
    -------
    The variance in nats squared.

    Raises
    ------
    TypeError, ValueError
        If the joint is not one, see `check_joint`, or for fewer than two pairs.

    Source
    ------
    Derivation: given one pair, r of a negative has mean 1, so that off-diagonal entries correlate with no diagonal one
    and with no other off-diagonal one but their mirror image. The growth: Song, Ermon (arXiv 1910.06222); McAllester,
    Stratos (arXiv 1811.04251).
    """
    check_joint(joint, "nwj_variance")
    _check_rows("nwj_variance", rows)
    ratio = density_ratio(joint)
    logs = jnp.log(jnp.where(joint > 0, ratio, 1.0))
    centred = logs - jnp.sum(joint * logs)
    swapped = jnp.matmul(joint, ratio.T, precision="highest")
    exchange = jnp.sum(swapped * swapped.T) - 1
    return jnp.sum(joint * centred**2) / rows + (chi_square(joint) + exchange) / (rows * (rows - 1))


def _checked(where, correlation, dimension):
    if dimension < 1:
        raise ValueError(f"{where}: dimension is {dimension}; give at least 1")
    if not isinstance(correlation, jax.core.Tracer) and not -1 < float(np.asarray(correlation)) < 1:
        raise ValueError(f"{where}: correlation is {correlation}; give a number strictly between -1 and 1")
    return jnp.asarray(correlation)


def _check_rows(where, rows):
    if rows < 2:
        raise ValueError(f"{where}: rows is {rows}; negatives come from other pairs of the batch, so give at least 2")
