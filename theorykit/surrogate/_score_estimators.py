"""Estimators of mutual information from the scores of batches; `mutual_information` exports the public names."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import logsumexp
from jaxtyping import Array, Float, PyTree

from theorykit.similarity import check_views
from theorykit.surrogate.risk import Estimate


def over_batches(values: Float[Array, " batches"]) -> Estimate:
    """Mean of an estimator over independent batches, with its standard error.

    For DV it is the mean of logarithms, not the logarithm of a mean: the bias of a batch remains.

    Parameters
    ----------
    values : (batches,)
        What an estimator returned for scores (batches, n, n); at least two.

    Returns
    -------
    Estimate, in nats.

    Raises
    ------
    ValueError
        If there are fewer than two batches.
    """
    if values.ndim != 1 or values.size < 2:
        raise ValueError(f"over_batches: values have shape {values.shape}; a standard error takes two batches or more")
    return Estimate(jnp.mean(values), jnp.std(values, ddof=1) / math.sqrt(values.size))


def estimate_info_nce(scores: Float[Array, "*batches n n"]) -> Float[Array, "*batches"]:
    r"""InfoNCE of a batch, K = n candidates.

    .. math:: \ln n + \frac{1}{n} \sum_i \ln \frac{e^{s_{ii}}}{\sum_j e^{s_{ij}}}

    Unbiased for `info_nce`, never above ln n. With the exact critic its variance is at most ln^2 n for n >= 3: the
    chances of the candidates are then the true ones, and sum_j c_j ln^2 c_j <= ln^2 n for chances c_j.

    Parameters
    ----------
    scores : (..., n, n)
        s_ij = s(x_i, y_j); leading axes are batches.

    Returns
    -------
    One value for each batch, in nats.

    Raises
    ------
    TypeError, ValueError
        If the scores are not square matrices of floating-point numbers, or hold NaN or +inf.
    """
    _check_scores("estimate_info_nce", scores, least=1)
    if scores.shape[-1] == 1:  # nothing to find, whatever the score
        return jnp.zeros(scores.shape[:-2], scores.dtype)
    return math.log(scores.shape[-1]) + _gained(scores, logsumexp(scores, axis=-1))


def estimate_donsker_varadhan(scores: Float[Array, "*batches n n"]) -> Float[Array, "*batches"]:
    r"""Donsker-Varadhan with both means over one batch.

    .. math:: \frac{1}{n} \sum_i s_{ii} - \ln \frac{1}{n (n - 1)} \sum_{i \ne j} e^{s_{ij}}

    Its mean is at least `donsker_varadhan`, since -ln is convex: with the exact critic it lies above I, by about half
    the relative variance of the sum, with a poor critic it may lie below. So it is neither a lower nor an upper bound.
    Its gradient is biased too, see `estimate_mine`.

    Parameters, Returns, Raises
    ---------------------------
    As `estimate_info_nce`, with n >= 2.
    """
    _check_scores("estimate_donsker_varadhan", scores)
    pairs, negatives = jnp.mean(_diagonal(scores), axis=-1), _log_negatives(scores)
    return jnp.where(pairs > -jnp.inf, pairs - jnp.where(pairs > -jnp.inf, negatives, 0.0), -jnp.inf)


def estimate_nwj(scores: Float[Array, "*batches n n"]) -> Float[Array, "*batches"]:
    r"""NWJ of a batch.

    .. math:: \frac{1}{n} \sum_i s_{ii} - \frac{1}{n (n - 1)} \sum_{i \ne j} e^{s_{ij} - 1}

    Unbiased for `nwj`. Its variance with the exact critic is `nwj_variance`.

    Parameters, Returns, Raises
    ---------------------------
    As `estimate_info_nce`, with n >= 2.
    """
    _check_scores("estimate_nwj", scores)
    return jnp.mean(_diagonal(scores), axis=-1) - jnp.exp(_log_negatives(scores) - 1)


def estimate_mine(
    scores: Float[Array, "*batches n n"], log_average: float | Float[Array, ""]
) -> Float[Array, "*batches"]:
    r"""Donsker-Varadhan with its denominator replaced by a number a from outside the batch.

    .. math:: \frac{1}{n} \sum_i s_{ii} - \ln a - \frac{1}{a \, n (n - 1)} \sum_{i \ne j} e^{s_{ij}} + 1

    For every a that does not depend on the batch this is unbiased for a lower bound of I, NWJ of s - ln a + 1, which is
    largest, and equal to DV, at a = E_pq e^s. The gradient of `estimate_donsker_varadhan` divides by the batch's own
    mean and so is biased; here it divides by a: a `moving_average` over earlier batches, as in MINE, or the exponential
    of a parameter trained with the critic, whose gradient steps average as well.

    Parameters
    ----------
    scores : (..., n, n)
        As in `estimate_info_nce`, n >= 2.
    log_average : scalar
        ln a.

    Returns
    -------
    One value for each batch, in nats.

    Raises
    ------
    TypeError, ValueError
        As `estimate_info_nce`.

    Source
    ------
    Belghazi et al. (arXiv 1801.04062), section 3.2, the bias and the average; Poole et al., section 2, the bound.
    """
    _check_scores("estimate_mine", scores)
    log_a = jnp.asarray(log_average, scores.dtype)
    return jnp.mean(_diagonal(scores), axis=-1) - log_a - jnp.exp(_log_negatives(scores) - log_a) + 1


def moving_average(
    log_average: float | Float[Array, ""], scores: Float[Array, "n n"], decay: float
) -> Float[Array, ""]:
    r"""Logarithm of MINE's moving average of the denominator, after one more batch.

    .. math:: a \leftarrow \gamma a + (1 - \gamma) \frac{1}{n (n - 1)} \sum_{i \ne j} e^{s_{ij}}

    Parameters
    ----------
    log_average : scalar
        ln a, from the batches before.
    scores : (n, n)
        Scores of the new batch.
    decay : float
        gamma in [0, 1].

    Returns
    -------
    The new ln a. No gradient flows through it.

    Raises
    ------
    TypeError, ValueError
        As `estimate_info_nce`, and if the decay is outside [0, 1].
    """
    _check_scores("moving_average", scores)
    if not 0 <= decay <= 1:
        raise ValueError(f"moving_average: decay is {decay}; give a number from 0 to 1")
    new = _log_negatives(jax.lax.stop_gradient(scores))
    return _mix(decay, jax.lax.stop_gradient(jnp.asarray(log_average, scores.dtype)), new)


def estimate_interpolated(scores: Float[Array, "*batches n n"], weight: float) -> Float[Array, "*batches"]:
    r"""Interpolated bound of a batch, K = n - 1 candidates.

    The negatives of a row are its n - 1 candidates of E_-. Those of E_+ are the positive and all negatives but the one
    after it: with all of them the two means would be of different K, and their difference no bound.

    With the exact critic s = ln r and alpha > 0 the variance is at most, for every I,

    .. math:: \Big( \sqrt{\ln^2 (K / \alpha) + 4 / e^2} + \sqrt{K / \alpha} \Big)^2

    since v^2 <= v K/alpha and E_- v = E [m / (alpha m + 1 - alpha)] <= 1, which is concave in m with E m = 1; and over
    positives with v < 1 the mean of ln^2 v is E_- [(alpha m + 1 - alpha) v ln^2 v] <= 4/e^2.

    Parameters
    ----------
    scores : (..., n, n)
        As in `estimate_info_nce`, n >= 2.
    weight : float
        alpha in [0, 1].

    Returns
    -------
    One value for each batch, in nats; unbiased for `interpolated` with n - 1 candidates.

    Raises
    ------
    TypeError, ValueError
        As `estimate_info_nce`, and if the weight is outside [0, 1].
    """
    _check_scores("estimate_interpolated", scores)
    check_weight("estimate_interpolated", weight)
    n = scores.shape[-1]
    zero = jnp.zeros((), scores.dtype)
    negative, positive = (
        logsumexp(_without(scores, shift), axis=-1) - math.log(n - 1)
        for shift in (0, 1)  # without the positive; without the candidate after it
    )
    gained = _gained(scores, _mix(weight, positive, zero))
    if weight == 1:  # m / m, also where every negative is ruled out
        return gained
    return 1 + gained - jnp.mean(jnp.exp(negative - _mix(weight, negative, zero)), axis=-1)


def concatenated_scores(
    apply: Callable[[PyTree, Array], Array], params: PyTree, x: Float[Array, "n dx"], y: Float[Array, "n dy"]
) -> Float[Array, "n n"]:
    """Scores of a critic that sees both inputs at once, s_ij = f([x_i, y_j]).

    Parameters
    ----------
    apply, params
        A network (params, rows) -> (rows, 1), such as `encoders.MLP(width, 1).apply`.
    x, y : (n, dx), (n, dy)
        Pairs, one a row.

    Returns
    -------
    (n, n); costs n^2 evaluations of the network.

    Raises
    ------
    TypeError, ValueError
        If x and y are not floating-point rows of equal number, or the network returns something else.
    """
    for name, value in (("x", x), ("y", y)):
        check_views("concatenated_scores", **{name: value, f"{name} again": value})
    if x.shape[0] != y.shape[0]:
        raise ValueError(f"concatenated_scores: x has {x.shape[0]} rows and y {y.shape[0]}; row i of both is a pair")
    n = x.shape[0]
    pairs = jnp.concatenate([jnp.repeat(x, n, axis=0), jnp.tile(y, (n, 1))], axis=1)
    scores = apply(params, pairs)
    if scores.shape != (n * n, 1):
        raise ValueError(
            f"concatenated_scores: the network returned shape {scores.shape} for {n * n} rows; give it one output, "
            "features=1"
        )
    return scores.reshape(n, n)


# ---------------------------------------------------------------------------------------------------------------------


def _diagonal(scores):
    return jnp.diagonal(scores, axis1=-2, axis2=-1)


def _gained(scores, log_normaliser):
    """Mean over the pairs of their score less a normaliser; -inf where a pair is ruled out, whatever the latter."""
    pairs = _diagonal(scores)
    met = pairs > -jnp.inf
    return jnp.mean(jnp.where(met, jnp.where(met, pairs, 0.0) - jnp.where(met, log_normaliser, 0.0), -jnp.inf), axis=-1)


def _without(scores, shift):
    """Scores with -inf in place of column i + shift of row i."""
    left_out = jnp.roll(jnp.eye(scores.shape[-1], dtype=bool), shift, axis=1)
    return jnp.where(jnp.broadcast_to(left_out, scores.shape), -jnp.inf, scores)


def _log_negatives(scores):
    """ln of the mean of e^s off the diagonal."""
    n = scores.shape[-1]
    return logsumexp(_without(scores, 0), axis=(-2, -1)) - math.log(n * (n - 1))


def _mix(weight, log_a, log_b):
    """ln(weight a + (1 - weight) b)."""
    if weight in (0, 1):
        return log_a if weight else jnp.broadcast_to(log_b, log_a.shape)
    return jnp.logaddexp(log_a + math.log(weight), jnp.broadcast_to(log_b + math.log1p(-weight), log_a.shape))


def check_weight(where, weight):
    if not 0 <= weight <= 1:
        raise ValueError(f"{where}: weight is {weight}; give a number from 0 (NWJ) to 1 (InfoNCE)")


def _check_scores(where, scores, least=2):
    if not isinstance(scores, jax.Array) or not jnp.issubdtype(scores.dtype, jnp.floating):
        found = scores.dtype if isinstance(scores, jax.Array) else type(scores).__name__
        raise TypeError(f"{where}: scores are {found}; pass a JAX array of floating-point numbers")
    if scores.ndim < 2 or scores.shape[-1] != scores.shape[-2] or scores.shape[-1] < least:
        raise ValueError(
            f"{where}: scores have shape {scores.shape}; give s(x_i, y_j) of n >= {least} pairs, (n, n), with batches "
            "as leading axes"
        )
    if not isinstance(scores, jax.core.Tracer) and not bool(np.all(np.asarray(scores) < np.inf)):
        raise ValueError(f"{where}: scores hold NaN or +inf; only -inf, which rules a pair out, may be infinite")
