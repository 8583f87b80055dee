r"""Sufficiency: what a score, or an encoder, loses of the joint distribution.

A score s of a joint P models the conditional law as P_s(y|x) = q(y) w(x, y) with w = e^s / Z_s(x) and
Z_s(x) = E_q e^s(x, .). Its sufficiency is the loss of that model,

    S(s) = E_p KL( P(.|x) || P_s(.|x) ) = I(X; Y) - E_P s + E_p ln Z_s >= 0,

zero exactly for s = ln r + c(x), and unchanged by s -> s + c(x). `side="both"` adds the reverse direction, where x is
modelled given y.

An encoder T of x loses what no head on top of it can recover. For a convex f with f(1) = 0 and r_T = E_p[r | T], the
density ratio of (T, Y), three numbers are equal:

    information     I_f(X; Y) - I_f(T; Y)
    variational     inf_s R_f(s o T) - inf_s R_f(s),   R_f(s) = -E_P s + E_p inf_c [c + E_q f*(s - c)]
    Bregman         E_pq [f(r) - f(r_T) - f'(r_T) (r - r_T)]

For f(t) = t ln t the risk is R_f = -E_P s + E_p ln Z_s, the limit of R_K - ln K; for f(t) = (t - 1)^2 it is the
spectral contrastive loss up to an affine map of the score.

Source: Oko, Lin, Cai, Mei (arXiv 2501.04641) and Lin, Mei (arXiv 2503.17538) for sufficiency; the identities:
derivation.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import logsumexp, xlogy
from jaxtyping import Array, Float, Int

from theorykit.surrogate import risk
from theorykit.surrogate.joint import check_joint, check_score, density_ratio, f_information, mutual_information


class Divergence(NamedTuple):
    """A convex function f with f(1) = 0, what its information and its risk need of it.

    Parameters
    ----------
    value, derivative : f and f'
        Elementwise on [0, inf). f must return its limit at 0; f'(0) may be -inf.
    conjugate, inverse : f* and its derivative, the inverse of f'
        Elementwise; +inf outside the domain of f*.
    """

    value: Callable[[Array], Array]
    derivative: Callable[[Array], Array]
    conjugate: Callable[[Array], Array]
    inverse: Callable[[Array], Array]


KL = Divergence(lambda t: xlogy(t, t), lambda t: jnp.log(t) + 1, lambda u: jnp.exp(u - 1), lambda u: jnp.exp(u - 1))
CHI_SQUARE = Divergence(lambda t: (t - 1) ** 2, lambda t: 2 * (t - 1), lambda u: u + u**2 / 4, lambda u: 1 + u / 2)
# Twice the Jensen-Shannon divergence in this normalisation, the f of logistic losses up to a constant.
JENSEN_SHANNON = Divergence(
    lambda t: xlogy(t, t) - xlogy(t + 1, (t + 1) / 2),
    lambda t: jnp.log(2 * t) - jnp.log1p(t),
    lambda u: jnp.where(u < jnp.log(2.0), -jnp.log(jnp.maximum(2 - jnp.exp(u), 0.0)), jnp.inf),
    lambda u: jnp.where(u < jnp.log(2.0), 1 / jnp.maximum(2 * jnp.exp(-u) - 1, 0.0), jnp.inf),
)


def model_ratio(joint: Float[Array, "nx ny"], score: Float[Array, "nx ny"]) -> Float[Array, "nx ny"]:
    r"""Density ratio that a score models.

    .. math:: w(x, y) = e^{s(x, y)} / Z_s(x), \qquad Z_s(x) = \sum_y q(y) e^{s(x, y)}

    Parameters
    ----------
    joint, score : (nx, ny)
        P, and s in nats; -inf rules a pair out.

    Returns
    -------
    w, (nx, ny), with E_q w(x, .) = 1. A row whose every candidate is ruled out models nothing and is 0.

    Raises
    ------
    TypeError, ValueError
        As `contrastive_risk`.
    """
    check_joint(joint, "model_ratio")
    check_score(joint, score, "model_ratio")
    return jnp.exp(log_model_ratio(joint, score))


def model_conditional(joint: Float[Array, "nx ny"], score: Float[Array, "nx ny"]) -> Float[Array, "nx ny"]:
    """Conditional law that a score models, P_s(y|x) = q(y) w(x, y).

    Parameters
    ----------
    joint, score : (nx, ny)
        As in `model_ratio`.

    Returns
    -------
    (nx, ny), rows sum to 1.

    Raises
    ------
    TypeError, ValueError
        As `contrastive_risk`.
    """
    return jnp.sum(joint, axis=0)[None, :] * model_ratio(joint, score)


def sufficiency(
    joint: Float[Array, "nx ny"], score: Float[Array, "nx ny"], *, side: risk.Side = "x"
) -> Float[Array, ""]:
    r"""Sufficiency of a score.

    .. math:: S(s) = E_p \, KL(P(\cdot|x) \,\|\, P_s(\cdot|x)) = E_{pq} \big[ r \ln (r / w) - r + w \big]

    In the last form every term is nonnegative, so that a small S does not come from cancelling large ones. This is S of
    f = t ln t. For another convex f a score loses `variational_risk(joint, score, f) + f_information(joint, f.value)`.

    Parameters
    ----------
    joint, score : (nx, ny)
        P, and s in nats; -inf rules a pair out.
    side : "x" or "both"
        y modelled given x, or the sum of both directions.

    Returns
    -------
    S in nats, +inf if a pair with P > 0 is ruled out. Differentiable in the score.

    Raises
    ------
    TypeError, ValueError
        As `contrastive_risk`.
    """
    check_joint(joint, "sufficiency")
    check_score(joint, score, "sufficiency")
    if side not in ("x", "both"):
        raise ValueError(f"sufficiency: side is {side!r}; give 'x' (y is modelled given x) or 'both'")
    found = _sufficiency(joint, score)
    return found if side == "x" else found + _sufficiency(joint.T, score.T)


def limiting_risk(joint: Float[Array, "nx ny"], score: Float[Array, "nx ny"]) -> Float[Array, ""]:
    r"""Contrastive risk less ln K for infinitely many candidates: alignment of positives and uniformity.

    .. math:: \lim_{K \to \infty} (R_K - \ln K) = -E_P s + E_p \ln Z_s = S(s) - I(X; Y)

    The logarithm is inside the mean over x. Taken outside, as in the uniformity metric of the same source, it gives an
    upper bound.

    Parameters
    ----------
    joint, score : (nx, ny)
        P, and s in nats; -inf rules a pair out.

    Returns
    -------
    The limit in nats, at least -I(X; Y); +inf if a pair with P > 0 is ruled out.

    Raises
    ------
    TypeError, ValueError
        As `contrastive_risk`.

    Source: Wang, Isola (arXiv 2005.10242), theorem 1.
    """
    check_joint(joint, "limiting_risk")
    check_score(joint, score, "limiting_risk")
    log_w = log_model_ratio(joint, score)
    return -jnp.sum(jnp.where(joint > 0, joint * jnp.where(joint > 0, log_w, 0.0), 0.0))


def encoder_ratio(joint: Float[Array, "nx ny"], codes: Int[Array, " nx"]) -> Float[Array, "nx ny"]:
    """Density ratio of (T, Y) for an encoder T of x, at every x: r_T(T(x), y) = E_p[r(., y) | T = T(x)].

    Its logarithm is the best score that sees x through T only.

    Parameters
    ----------
    joint : (nx, ny)
        P.
    codes : (nx,)
        T(x), whole numbers in 0..nx-1; equal codes mean that the encoder does not tell two inputs apart.

    Returns
    -------
    (nx, ny), 1 where p q = 0.

    Raises
    ------
    TypeError, ValueError
        If the joint is not one, or the codes are outside 0..nx-1.
    """
    check_joint(joint, "encoder_ratio")
    _check_codes("encoder_ratio", codes, joint.shape[0])
    merged = jnp.zeros_like(joint).at[codes].add(joint)
    return density_ratio(merged)[codes]


def encoder_sufficiency(
    joint: Float[Array, "nx ny"],
    codes: Int[Array, " nx"],
    *,
    f: Divergence = KL,
    form: Literal["information", "variational", "bregman"] = "bregman",
) -> Float[Array, ""]:
    r"""What an encoder of x loses, in one of three equal forms.

    .. math:: I_f(X; Y) - I_f(T; Y) = \inf_s R_f(s \circ T) - \inf_s R_f(s)
              = E_{pq} \big[ f(r) - f(r_T) - f'(r_T) (r - r_T) \big]

    Parameters
    ----------
    joint, codes
        As in `encoder_ratio`.
    f : Divergence
        KL, CHI_SQUARE, JENSEN_SHANNON or one's own.
    form
        The form to compute.

    Returns
    -------
    The loss >= 0, in the unit of f.

    Raises
    ------
    TypeError, ValueError
        As `encoder_ratio`, and for an unknown form.

    Source: derivation.
    """
    coarse, fine = encoder_ratio(joint, codes), density_ratio(joint)
    if form == "information":
        merged = jnp.zeros_like(joint).at[codes].add(joint)
        return f_information(joint, f.value) - f_information(merged, f.value)
    if form == "variational":
        return variational_risk(joint, f.derivative(coarse), f) - variational_risk(joint, f.derivative(fine), f)
    if form == "bregman":
        product = jnp.sum(joint, axis=1)[:, None] * jnp.sum(joint, axis=0)[None, :]
        # Where r_T = 0 all of r is 0 too: nothing is lost, though f' may be infinite.
        seen = coarse > 0
        slope = f.derivative(jnp.where(seen, coarse, 1.0))
        lost = f.value(fine) - f.value(coarse) - jnp.where(seen, slope * (fine - coarse), 0.0)
        return jnp.sum(product * lost)
    raise ValueError(f"encoder_sufficiency: form is {form!r}; give 'information', 'variational' or 'bregman'")


def variational_risk(
    joint: Float[Array, "nx ny"], score: Float[Array, "nx ny"], f: Divergence = KL
) -> Float[Array, ""]:
    r"""Risk whose minimum over scores is minus the f-information.

    .. math:: R_f(s) = -E_P s + E_p \inf_c \big[ c + E_q f^*(s - c) \big], \qquad \inf_s R_f(s) = -I_f(X; Y)

    at s = f'(r), where c = 0. The infimum over c is found by bisection of E_q (f*)'(s - c) = 1, which is monotone.

    What a score loses is a Bregman divergence from the model w = (f*)'(s - c) that it stands for, with E_q w = 1,

    .. math:: R_f(s) + I_f(X; Y) = E_{pq} \big[ f(r) - f(w) - f'(w) (r - w) \big]

    where f'(w) = s - c: of f = t ln t the sufficiency, R_f being `limiting_risk`, and of (t - 1)^2 the mean of
    (r - w)^2. As a difference it errs by some roundings of I_f.

    Parameters
    ----------
    joint, score : (nx, ny)
        P and s; -inf rules a pair out.
    f : Divergence
        As in `encoder_sufficiency`.

    Returns
    -------
    R_f, +inf if a pair with P > 0 is ruled out.

    Raises
    ------
    TypeError, ValueError
        As `contrastive_risk`.

    Source: Nguyen, Wainwright, Jordan (arXiv 0809.0853) for the conjugate form; the shift c: derivation.
    """
    check_joint(joint, "variational_risk")
    check_score(joint, score, "variational_risk")
    p, q = jnp.sum(joint, axis=1), jnp.sum(joint, axis=0)
    allowed = (q > 0)[None, :] & (score > -jnp.inf)
    mass = jnp.sum(jnp.where(allowed, q[None, :], 0.0), axis=1)
    # If all allowed candidates scored alike, s - c would be f'(1 / mass): c lies between the extremes of s less that.
    level = f.derivative(1 / jnp.where(mass > 0, mass, 1.0))
    low = jnp.min(jnp.where(allowed, score, jnp.inf), axis=1) - level
    high = jnp.max(jnp.where(allowed, score, -jnp.inf), axis=1) - level
    used = (p > 0) & (mass > 0)
    low, high = jnp.where(used, low, 0.0), jnp.where(used, high, 0.0)
    shifted = lambda c: jnp.where(allowed, score, 0.0) - c[:, None]  # noqa: E731

    def halve(_, bracket):
        low, high = bracket
        middle = low + (high - low) / 2
        above = jnp.sum(jnp.where(allowed, q[None, :] * f.inverse(shifted(middle)), 0.0), axis=1) > 1
        return jnp.where(above, middle, low), jnp.where(above, high, middle)

    # Each step gains a bit; near the minimum the objective is flat, so that half of them would do.
    _, c = jax.lax.fori_loop(0, jnp.finfo(joint.dtype).nmant + 8, halve, (low, high))
    # f* of a candidate that is ruled out is the limit at -inf, -f(0).
    ruled_out = -f.value(jnp.zeros((), joint.dtype))
    inner = c + jnp.sum(q[None, :] * jnp.where(allowed, f.conjugate(shifted(c)), ruled_out), axis=1)
    met = joint > 0
    return jnp.sum(jnp.where(p > 0, p * inner, 0.0)) - jnp.sum(jnp.where(met, joint * jnp.where(met, score, 0.0), 0.0))


def pair_sufficiency(
    joint: Float[Array, "nx ny"],
    codes_x: Int[Array, " nx"],
    codes_y: Int[Array, " ny"],
    score: Float[Array, "nx ny"],
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    r"""Sufficiency of a score of two encoders, split into what the encoders and what the head lose.

    .. math:: S(s) = \big[ I(X; Y) - I(f; g) \big] + E \, KL(P(g|f) \,\|\, P_s(g|f)), \qquad s(x, y) = h(f(x), g(y))

    Parameters
    ----------
    joint, codes_x, codes_y
        P and the codes f(x), g(y), as in `encoder_ratio`.
    score : (nx, ny)
        A score that depends on (f(x), g(y)) only; entry (i, j) of the codes' table is read off at any x, y with them.

    Returns
    -------
    Both terms in nats; their sum is S(s).

    Raises
    ------
    TypeError, ValueError
        As `contrastive_risk`, and if the score differs between inputs of equal codes.

    Source: derivation (chain rule of the KL divergence).
    """
    check_joint(joint, "pair_sufficiency")
    check_score(joint, score, "pair_sufficiency")
    _check_codes("pair_sufficiency", codes_x, joint.shape[0])
    _check_codes("pair_sufficiency", codes_y, joint.shape[1])
    merged = jnp.zeros_like(joint).at[codes_x].add(joint)
    merged = jnp.zeros_like(merged).at[:, codes_y].add(merged)
    table = jnp.zeros_like(score).at[codes_x[:, None], codes_y[None, :]].set(score)
    if not isinstance(score, jax.core.Tracer) and not jnp.array_equal(
        table[codes_x[:, None], codes_y[None, :]], score, equal_nan=True
    ):
        raise ValueError(
            "pair_sufficiency: score differs between inputs of equal codes; compute it from the codes, or use "
            "sufficiency for scores of x and y themselves"
        )
    return mutual_information(joint) - mutual_information(merged), _sufficiency(merged, table)


def log_model_ratio(joint: Float[Array, "nx ny"], score: Float[Array, "nx ny"]) -> Float[Array, "nx ny"]:
    """Logarithm of `model_ratio`, without the checks: ln w, -inf in rows that rule out every candidate."""
    q = jnp.sum(joint, axis=0)
    used = (q > 0)[None, :]
    # No score is looked at where q = 0; a row of -inf has no partition function.
    kept = jnp.where(used, score, -jnp.inf)
    empty = jnp.all(kept == -jnp.inf, axis=1)
    log_z = logsumexp(jnp.where(empty[:, None], 0.0, kept), axis=1, b=jnp.broadcast_to(q[None, :], joint.shape))
    return jnp.where(empty[:, None], -jnp.inf, kept - log_z[:, None])


def divergence_terms(a: Array, b: Array, log_quotient: Array) -> Array:
    """Terms a ln(a/b) - a + b >= 0 of a KL divergence, elementwise, from a, b > 0 and ln(a/b)."""
    # b (u e^u - e^u + 1) with u = ln(a/b) keeps its digits as u -> 0, but e^u may overflow.
    small = jnp.where(log_quotient < 1, log_quotient, 0.0)
    near = b * (small * jnp.exp(small) - jnp.expm1(small))
    return jnp.where(log_quotient < 1, near, a * (log_quotient - 1) + b)


def _sufficiency(joint, score):
    p, q = jnp.sum(joint, axis=1), jnp.sum(joint, axis=0)
    log_w, ratio = log_model_ratio(joint, score), density_ratio(joint)
    met, excluded = joint > 0, (joint > 0) & (log_w == -jnp.inf)
    log_quotient = jnp.log(jnp.where(met, ratio, 1.0)) - jnp.where(met & ~excluded, log_w, 0.0)
    terms = jnp.where(met, divergence_terms(ratio, jnp.exp(log_w), log_quotient), jnp.exp(log_w))
    total = jnp.sum(jnp.where((p > 0)[:, None], p[:, None] * q[None, :] * terms, 0.0))
    return jnp.where(jnp.any(excluded), jnp.inf, total)


def _check_codes(where, codes, size):
    if codes.shape != (size,):
        raise ValueError(f"{where}: codes have shape {codes.shape}; give one whole number to each of {size} symbols")
    if not isinstance(codes, jax.core.Tracer):
        values = np.asarray(codes)
        if values.min() < 0 or values.max() >= size:
            raise ValueError(
                f"{where}: codes run from {values.min()} to {values.max()}; number them from 0 to {size - 1} at most"
            )
