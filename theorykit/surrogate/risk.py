r"""The contrastive risk of a score on a finite joint distribution, for any number of candidates.

Of K candidates y_1..y_K one is the partner of x and K - 1 are drawn from the marginal. The risk is the log-loss of
finding the partner by the softmax of the scores,

    R_K(s) = E[ -s(X, Y_1) + ln sum_{j=1..K} e^s(X, Y_j) ],        (X, Y_1) ~ P,  Y_2..Y_K ~ q independent.

Three ways to it: exactly for any K (`contrastive_risk`), by enumerating all sets of negatives, the oracle for few
candidates, and by sampling. `side="x"` gives x and seeks y; `side="both"` adds the reverse direction, where y is given
and x sought: the risk of CLIP, as a sum and not an average.

Scores are (nx, ny), in the dtype of the joint. A score of -inf rules a pair out: no harm where P = 0, and an infinite
risk where P > 0. With one candidate there is nothing to find and the risk is 0, whatever the score. Where p q = 0 no
score is ever looked at. Adding c(x) to a score changes no risk that gives x, adding a constant changes none at all.

The minimum over scores is at ln r, the logarithm of the density ratio, for every K >= 2.
"""

import itertools
import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import logsumexp
from jaxtyping import Array, Float, Int, Key

from theorykit.surrogate._quadrature import WIDEST, one_sided
from theorykit.surrogate.joint import check_joint, check_score, density_ratio

Side = Literal["x", "both"]
Candidates = int | float | Float[Array, ""] | Int[Array, ""]

# Numbers that the oracle holds at once, 512 MiB of float64, and scores that a block of samples holds, 8 MiB.
_MOST_TERMS, _SAMPLED_SCORES = 2**26, 2**20


class Estimate(NamedTuple):
    """A Monte Carlo mean.

    Parameters
    ----------
    value, standard_error : scalars
        The mean and its standard error, from the variance over the samples.
    """

    value: Float[Array, ""]
    standard_error: Float[Array, ""]


def contrastive_risk(
    joint: Float[Array, "nx ny"], score: Float[Array, "nx ny"], candidates: Candidates, *, side: Side = "x"
) -> Float[Array, ""]:
    r"""Contrastive risk of a score, exact for any number of candidates.

    .. math:: R_K(s) = E \Big[ \ln \sum_{j=1}^{K} e^{s(X, Y_j)} - s(X, Y_1) \Big]
              = \sum_x \int_0^\infty \Big[ p(x) e^{-t}
              - \sum_y P(x, y) e^{-t e^{s(x, y)}} \phi_x(t)^{K-1} \Big] \frac{dt}{t} - E_P s,
              \qquad \phi_x(t) = \sum_y q(y) e^{-t e^{s(x, y)}}

    The trapezoid rule in ln t is exact up to a few roundings of the working precision. A call evaluates about 160
    exponentials of the table in float64 (64 in float32) for any K, and up to 4 (2) more for each nat that scores where
    P > 0 lie below the best of their row: only where they are spread widely and K is small. The number of nodes is
    found while it runs, inside `jax.jit` as well. Blocks of nodes take a few MiB beyond the tables, times the size of
    the batch under `jax.vmap` (over scores, joints or K). The gradient with respect to the score is an integral of the
    same kind, with the same bounds on memory. Second derivatives take forward mode last, as in `jax.hessian`.

    Parameters
    ----------
    joint : (nx, ny)
        P, nonnegative with sum 1; rows, columns and cells may be empty.
    score : (nx, ny)
        s in nats, of any size; -inf is allowed.
    candidates : whole number
        K >= 1, may be traced, and in any numeric type that holds it. Inside `jax.jit` its value cannot be checked.
    side : "x" or "both"
        Seek y given x, or add the reverse direction.

    Returns
    -------
    R_K in nats, +inf if the score is -inf where P > 0 and K >= 2.
    Inside `jax.jit` NaN stands for what raises outside: NaN scores, or scores spread over too wide a range.

    Raises
    ------
    TypeError
        If joint or score is not a floating-point JAX array, or their dtypes differ.
    ValueError
        If the joint is not one, the score has another shape, or NaN or +inf where p q > 0, a finite score where P > 0
        lies more than 10^5 nats below another of its row (or column, for both sides), K is not a whole number of at
        least 1, or the side is unknown.
    NotImplementedError
        If differentiated with respect to the joint or K.

    Source
    ------
    Oord, Li, Vinyals (arXiv 1807.03748) and Radford et al. (arXiv 2103.00020), the loss. Derivation: Frullani's
    integral ln S = int (e^-t - e^(-t S)) dt/t under the expectation.
    """
    count = _checked("contrastive_risk", joint, score, candidates, side)
    _check_range("contrastive_risk", joint, score, side)
    return _exact(joint, score, count, side)


def contrastive_risk_by_enumeration(
    joint: Float[Array, "nx ny"], score: Float[Array, "nx ny"], candidates: int, *, side: Side = "x"
) -> Float[Array, ""]:
    r"""Contrastive risk as a sum over all ways to draw the negatives: the oracle for few candidates.

    .. math:: R_K = \sum_{x, y} P(x, y) \sum_{n : |n| = K - 1} \frac{(K-1)!}{\prod_z n_z!} \prod_z q(z)^{n_z} \Big[
              \ln \Big( e^{s(x, y)} + \sum_z n_z e^{s(x, z)} \Big) - s(x, y) \Big]

    where n_z counts how often z is among the negatives. There are (K + ny - 2 choose K - 1) such n.

    Parameters
    ----------
    joint, score, side
        As in `contrastive_risk`.
    candidates : int
        K >= 1, a Python number, small.

    Returns
    -------
    R_K in nats. Differentiable in the score as long as all scores are finite.

    Raises
    ------
    TypeError, ValueError
        As `contrastive_risk`, and if the sum has too many terms.
    """
    where = "contrastive_risk_by_enumeration"
    _checked(where, joint, score, candidates, side)
    if isinstance(candidates, jax.Array):
        raise TypeError(f"{where}: candidates is an array; it decides the number of terms, pass a Python int")
    return sum(_enumerate(p, s, int(candidates)) for p, s in _directions(joint, score, side))


def contrastive_risk_by_sampling(
    joint: Float[Array, "nx ny"],
    score: Float[Array, "nx ny"],
    candidates: int,
    *,
    key: Key[Array, ""],
    samples: int,
    side: Side = "x",
) -> Estimate:
    r"""Contrastive risk by Monte Carlo: the mean loss of independent draws of a pair and K - 1 negatives.

    Parameters
    ----------
    joint, score, side
        As in `contrastive_risk`.
    candidates : int
        K >= 1, a Python number; the cost is proportional to it.
    key : PRNG key
        Fixes the draws.
    samples : int
        n >= 2 pairs, each with negatives of its own. They are drawn in blocks of bounded memory.

    Returns
    -------
    Estimate: the mean in nats and its standard error, with the two directions drawn independently.

    Raises
    ------
    TypeError, ValueError
        As `contrastive_risk`, and if there are fewer than two samples.
    """
    where = "contrastive_risk_by_sampling"
    _checked(where, joint, score, candidates, side)
    if isinstance(candidates, jax.Array):
        raise TypeError(f"{where}: candidates is an array; it decides how much is drawn, pass a Python int")
    if samples < 2:
        raise ValueError(f"{where}: samples is {samples}; a standard error takes at least two")
    directions = _directions(joint, score, side)
    keys = jax.random.split(key, len(directions))
    losses = [_sample(p, s, int(candidates), k, samples) for (p, s), k in zip(directions, keys, strict=True)]
    variance = sum(jnp.var(loss, ddof=1) for loss in losses) / samples
    return Estimate(sum(jnp.mean(loss) for loss in losses), jnp.sqrt(variance))


def optimal_score(joint: Float[Array, "nx ny"]) -> Float[Array, "nx ny"]:
    r"""The score of least risk, for every number of candidates and both sides.

    .. math:: s^*(x, y) = \ln r(x, y) = \ln \frac{P(x, y)}{p(x) q(y)}

    It is unique up to c(x) for one side and up to a constant for both.

    Parameters
    ----------
    joint : (nx, ny)
        Probabilities of pairs.

    Returns
    -------
    (nx, ny) in nats: -inf where P = 0 < p q, and 0 where p q = 0.

    Raises
    ------
    TypeError, ValueError
        If the joint is not one, see `check_joint`.

    Source
    ------
    Oord, Li, Vinyals (arXiv 1807.03748): given all candidates, the chance of each to be the partner is r over the sum
    of the ratios, and the log-loss is least for the true chances.
    """
    return jnp.log(density_ratio(joint))


def minimal_risk(joint: Float[Array, "nx ny"], candidates: Candidates, *, side: Side = "x") -> Float[Array, ""]:
    r"""The least contrastive risk of any score, R_K(ln r).

    .. math:: \ln K - R_K(\ln r) = I_K \uparrow I(X; Y), \qquad 0 \le I - I_K \le \ln(1 + \chi^2 / K)

    for one side; twice that for both.

    Parameters
    ----------
    joint, candidates, side
        As in `contrastive_risk`.

    Returns
    -------
    The minimum in nats.

    Raises
    ------
    TypeError, ValueError
        As `contrastive_risk`.
    """
    return contrastive_risk(joint, optimal_score(joint), candidates, side=side)


def excess_risk(
    joint: Float[Array, "nx ny"], score: Float[Array, "nx ny"], candidates: Candidates, *, side: Side = "x"
) -> Float[Array, ""]:
    r"""What a score loses against the best one, R_K(s) - R_K(ln r) >= 0.

    The difference of two risks that are each exact to rounding of their own size, hence not exact *relative* to a small
    excess, and possibly negative by as much.

    Parameters
    ----------
    joint, score, candidates, side
        As in `contrastive_risk`.

    Returns
    -------
    The excess in nats, +inf where the risk is.

    Raises
    ------
    TypeError, ValueError
        As `contrastive_risk`.
    """
    return contrastive_risk(joint, score, candidates, side=side) - minimal_risk(joint, candidates, side=side)


# ---------------------------------------------------------------------------------------------------------------------


def _directions(joint, score, side):
    return [(joint, score), (joint.T, score.T)][: 1 if side == "x" else 2]


@jax.jit(static_argnames="side")
def _exact(joint, score, candidates, side):
    return sum(one_sided(p, s, candidates) for p, s in _directions(joint, score, side))


@jax.jit(static_argnames="candidates")
def _enumerate(joint, score, candidates):
    nx, ny = joint.shape
    draws = math.comb(candidates + ny - 2, candidates - 1)
    # A multinomial coefficient is below ny^(K-1), which must not overflow.
    largest = math.log(jnp.finfo(joint.dtype).max)
    if nx * ny * ny * draws > _MOST_TERMS or (candidates - 1) * math.log(ny) > largest:
        raise ValueError(
            f"contrastive_risk_by_enumeration: {candidates} candidates from {ny} symbols make {draws} sets of "
            f"negatives for each of {nx * ny} pairs, too many to list; use contrastive_risk, or smaller sizes"
        )
    # Stars and bars: the positions of ny - 1 bars among K + ny - 2 places.
    places = candidates + ny - 2
    bars = np.array(list(itertools.combinations(range(places), ny - 1)), int).reshape(draws, ny - 1)
    edges = np.concatenate([np.full((draws, 1), -1), bars, np.full((draws, 1), places)], axis=1)
    counts = np.diff(edges, axis=1) - 1  # (draws, z)
    # Products of whole numbers, not of exponentials of log-gamma functions, which would lose two or three digits.
    binomial = np.array([[float(math.comb(n, k)) for k in range(candidates)] for n in range(candidates)])
    ways = np.prod(binomial[np.cumsum(counts, axis=1), counts], axis=1)
    counts = jnp.asarray(counts, joint.dtype)
    q = jnp.sum(joint, axis=0)
    chance = jnp.asarray(ways, joint.dtype) * jnp.prod(q[None, :] ** counts, axis=1)
    with_positive = counts[None, :, :] + jnp.eye(ny, dtype=joint.dtype)[:, None, :]  # (y, draws, z)
    log_sum = logsumexp(score[:, None, None, :], axis=-1, b=with_positive[None])  # (x, y, draws)
    expected = joint[:, :, None] * chance[None, None, :]
    # Also where the sum is empty: -inf - -inf. One candidate alone is always found.
    ruled_out = jnp.inf if candidates > 1 else 0.0
    loss = jnp.where(score[:, :, None] > -jnp.inf, log_sum - score[:, :, None], ruled_out)
    return jnp.sum(jnp.where(expected > 0, expected * loss, 0.0))


@jax.jit(static_argnames=("candidates", "samples"))
def _sample(joint, score, candidates, key, samples):
    """The loss of every sample, (samples,)."""
    nx, ny = joint.shape
    q = jnp.sum(joint, axis=0)

    def loss(key):
        pair, others = jax.random.split(key)
        # `choice` inverts the distribution function; `categorical` would draw a number for each symbol and candidate.
        x, y = jnp.divmod(jax.random.choice(pair, nx * ny, p=joint.reshape(-1)), ny)
        negatives = jax.random.choice(others, ny, (candidates - 1,), p=q)
        chosen = score[x, y]
        total = logsumexp(jnp.concatenate([chosen[None], score[x, negatives]]))
        return jnp.where(chosen > -jnp.inf, total - chosen, jnp.inf if candidates > 1 else 0.0)

    block = max(1, min(samples, _SAMPLED_SCORES // candidates))
    return jax.lax.map(loss, jax.random.split(key, samples), batch_size=block)


def _checked(where, joint, score, candidates, side):
    """K in the dtype of the joint, after all checks."""
    check_joint(joint, where)
    check_score(joint, score, where)
    if side not in ("x", "both"):
        raise ValueError(f"{where}: side is {side!r}; give 'x' (y is sought given x) or 'both'")
    if jnp.ndim(candidates) != 0:
        raise ValueError(f"{where}: candidates has shape {jnp.shape(candidates)}; give one number, or use jax.vmap")
    if not isinstance(candidates, jax.core.Tracer):
        number = float(candidates)
        if not (number >= 1 and number.is_integer()):
            raise ValueError(f"{where}: candidates is {candidates}; give a whole number of at least 1")
    return jnp.asarray(candidates, joint.dtype)


def _check_range(where, joint, score, side):
    if isinstance(joint, jax.core.Tracer) or isinstance(score, jax.core.Tracer):
        return
    for p, s in _directions(np.asarray(joint), np.asarray(score), side):
        met, seen = (p > 0) & (s > -np.inf), (p.sum(axis=1) > 0)[:, None] & (p.sum(axis=0) > 0)[None, :]
        # Rows where no pair is met with a finite score have nothing to integrate: -inf - inf.
        best = np.max(s, axis=1, initial=-np.inf, where=seen)
        gap = float(np.max(best - np.min(s, axis=1, initial=np.inf, where=met)))
        if gap > WIDEST:
            raise ValueError(
                f"{where}: a score where P > 0 lies {gap:.3g} nats below another candidate's, and the grid of the "
                f"integral would have to reach as far; the limit is {WIDEST:g}. Scale the score, or give -inf, which "
                "makes the risk infinite"
            )
