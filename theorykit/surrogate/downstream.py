r"""Downstream losses of a contrastive score on finite joints, exactly, each beside its Bayes value.

A score s models P_s(y|x) = q(y) w(x, y) and, in the other direction, P_s(x|y) proportional to p(x) e^s(x, y). Four
tasks use these models without further training; with S the sufficiency of the direction they use,

    next tokens       y = (y_1, ..., y_J):  sum_j excess_j = S^(y|x)                                  exactly
    denoising         z = sqrt(g) x + N(0, 1), y given:  (1/2) int excess(g) dg = S^(x|y)             exactly, see
                      `denoisers`
    zero-shot labels  c - y - x Markov:  excess <= S^(y|x)
    retrieval         of the partner among N:  excess log-loss = Excess_N <= S^(y|x)

Excesses are computed as divergences, not as differences of risks, so that small ones keep their digits.

Source: Oko, Lin, Cai, Mei (arXiv 2501.04641) for the tasks; chain rule and data processing of the KL divergence.
"""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import logsumexp
from jaxtyping import Array, Float, Key

from theorykit.surrogate import risk
from theorykit.surrogate.information_loss import divergence_terms, log_model_ratio, model_conditional
from theorykit.surrogate.joint import check_joint, check_score, density_ratio


class Loss(NamedTuple):
    """A downstream loss.

    Parameters
    ----------
    risk, bayes, excess
        Of the score, of the true law, and their difference; one number, or one for every position.
    """

    risk: Array
    bayes: Array
    excess: Array


class Labels(NamedTuple):
    """Zero-shot classification.

    Parameters
    ----------
    log_loss : Loss
        In nats.
    error : Loss
        Probability that the likeliest class is not the label.
    """

    log_loss: Loss
    error: Loss


class Retrieval(NamedTuple):
    """Retrieval of the partner among N candidates.

    Parameters
    ----------
    log_loss : Loss
        In nats; its risk is the contrastive risk with N candidates.
    error : Loss
        Probability that the partner does not come first, ties broken at random.
    """

    log_loss: Loss
    error: Loss


def next_token(joint: Float[Array, "nx ny"], score: Float[Array, "nx ny"], sizes: Sequence[int]) -> Loss:
    r"""Prediction of a text token by token, given the image.

    .. math:: excess_j = E \, KL(P(y_j | y_{<j}, x) \,\|\, P_s(y_j | y_{<j}, x)), \qquad \sum_j excess_j = S^{y|x}(s)

    Parameters
    ----------
    joint, score : (nx, ny)
        P and s; y numbers the texts, the last token fastest: y = ravel_multi_index(tokens, sizes).
    sizes
        Sizes of the alphabets of the J tokens, product ny.

    Returns
    -------
    Loss, each entry (J,) in nats.

    Raises
    ------
    TypeError, ValueError
        As `contrastive_risk`, and if the sizes do not multiply to ny.

    Source: chain rule of the KL divergence.
    """
    sizes = tuple(sizes)
    conditional = model_conditional(joint, score)
    if math.prod(sizes) != joint.shape[1]:
        raise ValueError(f"next_token: sizes {sizes} multiply to {math.prod(sizes)}, not to ny = {joint.shape[1]}")
    truth, model = (table.reshape(-1, *sizes) for table in (joint, conditional))
    bayes, excess = [], []
    for j in range(1, len(sizes) + 1):
        rest, last = tuple(range(j + 1, len(sizes) + 1)), j
        together, modelled = jnp.sum(truth, axis=rest), jnp.sum(model, axis=rest)
        known, of_model = (_normalised(table, last) for table in (together, modelled))
        bayes.append(-_mean_log(together, known))
        excess.append(_divergence(jnp.sum(together, axis=last, keepdims=True), known, of_model))
    bayes, excess = jnp.stack(bayes), jnp.stack(excess)
    return Loss(bayes + excess, bayes, excess)


def zero_shot(
    label_text: Float[Array, "nc ny"],
    joint: Float[Array, "nx ny"],
    score: Float[Array, "nx ny"],
    *,
    label_image: Float[Array, "nc nx"] | None = None,
) -> Labels:
    r"""Classification of images by their scores with all texts of each class.

    .. math:: P_s(c|x) \propto P(c) \, E[e^{s(x, Y)} | c] = \sum_y P(c|y) P_s(y|x) \, Z_s(x), \qquad
              E \, KL(P(c|x) \,\|\, P_s(c|x)) \le S^{y|x}(s)

    if the label depends on the image through the text only.

    Parameters
    ----------
    label_text : (nc, ny)
        P(c, y), with the same law of y as the joint.
    joint, score : (nx, ny)
        P and s.
    label_image : (nc, nx), optional
        P(c, x) of labels that are no function of the text; by default sum_y P(c|y) P(x, y), the Markov chain c - y - x.

    Returns
    -------
    Labels

    Raises
    ------
    TypeError, ValueError
        As `contrastive_risk`, and if the laws of y or of x differ between the joints.

    Source: data processing.
    """
    conditional = model_conditional(joint, score)
    given_text = _labels_given_text(label_text, joint, "zero_shot")
    truth = joint @ given_text.T if label_image is None else label_image.T  # (nx, nc)
    if label_image is not None:
        check_joint(label_image, "zero_shot")
        _check_equal("zero_shot", "x", jnp.sum(label_image, axis=0), jnp.sum(joint, axis=1))
    return _classification(truth, conditional @ given_text.T)


def zero_shot_with_prompts(
    label_text: Float[Array, "nc ny"],
    joint: Float[Array, "nx ny"],
    score: Float[Array, "nx ny"],
    prompts: int,
    *,
    key: Key[Array, ""],
    samples: int,
    average: Literal["exponentials", "similarities"] = "exponentials",
) -> risk.Estimate:
    r"""Mean excess log-loss of classification by M random texts of each class.

    .. math:: \hat P(c|x) \propto P(c) \frac1M \sum_m e^{s(x, Y_{cm})}, \qquad
              E \, KL(P(c|x) \,\|\, \hat P(c|x)) = a + \frac{b}{M} + O(M^{-2})

    with a the excess of all texts and b as in `prompt_coefficient`. Averaging similarities instead, e^mean s, does not
    tend to the excess of all texts.

    Parameters
    ----------
    label_text, joint, score
        As in `zero_shot`; the score must be finite where p q > 0.
    prompts : int
        M >= 1 texts of each class, drawn from P(y|c) with replacement.
    key : PRNG key
        Fixes the draws.
    samples : int
        Independent sets of prompts, at least 2; the average over images is exact.
    average
        What is averaged over the prompts.

    Returns
    -------
    Estimate of the excess in nats, over the sets of prompts.

    Raises
    ------
    TypeError, ValueError
        As `zero_shot`, and for fewer than 1 prompt, 2 samples, or an unknown average.
    """
    where = "zero_shot_with_prompts"
    check_joint(joint, where)
    check_score(joint, score, where)
    given_text = _labels_given_text(label_text, joint, where)
    if prompts < 1 or samples < 2:
        raise ValueError(f"{where}: prompts is {prompts} and samples {samples}; give at least 1 and 2")
    if average not in ("exponentials", "similarities"):
        raise ValueError(f"{where}: average is {average!r}; give 'exponentials' or 'similarities'")
    found = _prompted(label_text, joint, log_model_ratio(joint, score), given_text, key, prompts, samples, average)
    return risk.Estimate(jnp.mean(found), jnp.std(found, ddof=1) / math.sqrt(samples))


def prompt_coefficient(
    label_text: Float[Array, "nc ny"], joint: Float[Array, "nx ny"], score: Float[Array, "nx ny"]
) -> Float[Array, ""]:
    r"""Leading coefficient b of the excess a + b/M of classification with M prompts.

    .. math:: b = \frac12 E_x \Big[ \sum_c P(c|x) \frac{v_c}{g_c^2}
              - \frac{\sum_c P(c)^2 v_c}{(\sum_c P(c) g_c)^2} \Big]

    with g_c(x), v_c(x) the mean and variance over the texts of class c of w(x, .).

    Parameters
    ----------
    label_text, joint, score
        As in `zero_shot`.

    Returns
    -------
    b in nats.

    Raises
    ------
    TypeError, ValueError
        As `zero_shot`.

    Source: derivation (second-order expansion of the logarithm; prompts of different classes are independent).
    """
    given_text = _labels_given_text(label_text, joint, "prompt_coefficient")
    check_score(joint, score, "prompt_coefficient")
    w = jnp.exp(log_model_ratio(joint, score))
    classes = jnp.sum(label_text, axis=1)
    prompts = label_text / jnp.where(classes > 0, classes, 1.0)[:, None]  # P(y|c)
    mean = w @ prompts.T  # (nx, nc)
    variance = jnp.einsum("cy,xyc->xc", prompts, (w[:, :, None] - mean[:, None, :]) ** 2)
    truth = joint @ given_text.T
    first = jnp.sum(jnp.where(truth > 0, truth * variance / jnp.where(mean > 0, mean, 1.0) ** 2, 0.0))
    total = jnp.sum(classes[None, :] * mean, axis=1)
    second = jnp.sum(classes[None, :] ** 2 * variance, axis=1) / total**2
    return (first - jnp.sum(joint, axis=1) @ second) / 2


def retrieval(joint: Float[Array, "nx ny"], score: Float[Array, "nx ny"], candidates: risk.Candidates) -> Retrieval:
    r"""Retrieval of the partner of x among N candidates, N - 1 of them drawn from q.

    .. math:: error = 1 - \sum_{x, y} P(x, y) \frac{(L + e)^N - L^N}{N e}

    with L(x, y) and e(x, y) the masses under q of candidates that score less than y and the same as y.

    Parameters
    ----------
    joint, score : (nx, ny)
        P and s.
    candidates : whole number
        N >= 1.

    Returns
    -------
    Retrieval

    Raises
    ------
    TypeError, ValueError
        As `contrastive_risk`.

    Source: derivation; the excess error is at most sqrt(2 Excess_N), by Pinsker's inequality.
    """
    value = risk.contrastive_risk(joint, score, candidates)
    minimum = risk.minimal_risk(joint, candidates)
    error, bayes = (_missed(joint, s, candidates) for s in (score, density_ratio(joint)))
    return Retrieval(Loss(value, minimum, value - minimum), Loss(error, bayes, error - bayes))


@jax.jit(static_argnames=("prompts", "samples", "average"))
def _prompted(label_text, joint, log_w, given_text, key, prompts, samples, average):
    """Excess of every set of prompts, (samples,)."""
    classes, truth = jnp.sum(label_text, axis=1), joint @ given_text.T
    known = _normalised(truth, 1)
    images = jnp.sum(truth, axis=1, keepdims=True)

    def excess(key):
        draw = lambda k, law: jax.random.choice(k, law.size, (prompts,), p=law)  # noqa: E731
        chosen = jax.vmap(draw)(jax.random.split(key, classes.size), label_text / classes[:, None])  # (nc, M)
        seen = log_w[:, chosen]  # (nx, nc, M)
        pooled = jnp.mean(seen, axis=2) if average == "similarities" else logsumexp(seen, axis=2)
        return _divergence(images, known, jax.nn.softmax(jnp.log(classes)[None, :] + pooled, axis=1))

    return jax.lax.map(excess, jax.random.split(key, samples), batch_size=min(samples, 256))


def _classification(truth, model):
    """Losses of a model (nx, nc) of the label, against P(x, c)."""
    images, known = jnp.sum(truth, axis=1, keepdims=True), _normalised(truth, 1)
    bayes, excess = -_mean_log(truth, known), _divergence(images, known, model)
    right = jnp.sum(jnp.take_along_axis(truth, jnp.argmax(model, axis=1)[:, None], axis=1))
    best = jnp.sum(jnp.max(truth, axis=1))
    return Labels(Loss(bayes + excess, bayes, excess), Loss(1 - right, 1 - best, best - right))


def _missed(joint, score, candidates):
    q, n = jnp.sum(joint, axis=0), jnp.asarray(candidates, joint.dtype)
    less = jnp.sum(jnp.where(score[:, None, :] < score[:, :, None], q[None, None, :], 0.0), axis=2)
    same = jnp.sum(jnp.where(score[:, None, :] == score[:, :, None], q[None, None, :], 0.0), axis=2)
    # (L + e)^n - L^n without cancellation: L^n is a fraction (1 + e/L)^-n of the first term.
    total = less + same
    safe = jnp.where(same > 0, total, 1.0)
    part = -jnp.expm1(n * jnp.log1p(-jnp.where(same > 0, jnp.minimum(same / safe, 1.0), 0.0)))
    first = jnp.exp((n - 1) * jnp.log(safe)) * part * safe / (n * jnp.where(same > 0, same, 1.0))
    return 1 - jnp.sum(jnp.where(joint > 0, joint * first, 0.0))


def _normalised(table, axis):
    """Conditional law along an axis; uniform where there is no mass, so that logarithms stay finite."""
    total = jnp.sum(table, axis=axis, keepdims=True)
    return jnp.where(total > 0, table / jnp.where(total > 0, total, 1.0), 1 / table.shape[axis])


def _mean_log(weights, law):
    return jnp.sum(jnp.where(weights > 0, weights * jnp.log(jnp.where(weights > 0, law, 1.0)), 0.0))


def _divergence(weights, law, model):
    """Sum of weights times KL(law || model) over the last axis of law, terms nonnegative, +inf where excluded."""
    met, ruled_out = law > 0, (law > 0) & (model <= 0)
    model_there = jnp.where(model > 0, model, 1.0)
    u = jnp.where(met & ~ruled_out, jnp.log(jnp.where(met, law, 1.0)) - jnp.log(model_there), 0.0)
    terms = jnp.where(met, divergence_terms(law, model, u), model)
    total = jnp.sum(jnp.where(weights > 0, weights * terms, 0.0))
    return jnp.where(jnp.any((weights > 0) & ruled_out), jnp.inf, total)


def _labels_given_text(label_text, joint, where):
    check_joint(label_text, where)
    check_joint(joint, where)
    texts = jnp.sum(label_text, axis=0)
    _check_equal(where, "y", texts, jnp.sum(joint, axis=0))
    return label_text / jnp.where(texts > 0, texts, 1.0)[None, :]


def _check_equal(where, name, found, wanted):
    if found.shape != wanted.shape:
        raise ValueError(
            f"{where}: one joint has {found.size} symbols {name}, the other {wanted.size}; make them agree"
        )
    if isinstance(found, jax.core.Tracer) or isinstance(wanted, jax.core.Tracer):
        return
    if not np.allclose(found, wanted, rtol=0, atol=float(np.sqrt(jnp.finfo(found.dtype).eps))):
        raise ValueError(f"{where}: the two joints have different laws of {name}; take both from one P(c, y, x)")
