r"""Zero-shot classification by M prompts of trained CLIP pairs: measured excess, and its law a + b/M.

The prompts are drawn from a pool of Q texts of each class, without replacement, so that the pool takes the place of the
population. With g_c and v_c the mean and the variance (of Q - 1 degrees of freedom) of e^s(x, .) over the pool,

    E KL(P(c|x) || P_M(c|x)) = a_Q + b_Q (1/M - 1/Q) + O(1/M^2),
    b_Q = (1/2) E_x[sum_c P(c|x) v_c / g_c^2 - sum_c P(c)^2 v_c / (sum_c P(c) g_c)^2]

with a_Q the excess of the whole pool: `downstream.prompt_coefficient` for samples in place of a table. Excesses are
divergences from the exact P(c|x) of message passing, so that labels add no noise.
"""

import jax
import jax.numpy as jnp


def curves(truth, prior, f, g):
    """Excesses of members against M = 1, 2, 4, ... `FEWEST`-th of the pool; truth (n, S) is ln P(c|x), prior P(c).

    f (variants, n, F) and g (variants, S, Q, F) are embeddings of images and prompts. excess, similar (variants,
    counts): with the average of exponentials and of similarities; limit, similar_limit: of the whole pool; b
    (variants,): b_Q.
    """
    return jax.lax.map(lambda member: _curves(truth, prior, *member), (f, g))


# Sets of prompts of the largest count, so that their mean has little noise.
FEWEST = 8


def counts(pool):
    """Numbers M of prompts, divisors of the size of the pool, a power of two."""
    return tuple(2**i for i in range((pool // FEWEST).bit_length()))


def _curves(truth, prior, f, g):
    """Of one member, f (n, F) and g (S, Q, F)."""
    f, g = (jax.nn.softmax(z, axis=-1) for z in (f, g))
    w = jnp.einsum("nf,sqf->nsq", f, g, precision="highest")  # e^s
    known = jnp.exp(truth)
    mean, variance = jnp.mean(w, axis=2), jnp.var(w, axis=2, ddof=1)
    first = jnp.mean(jnp.sum(known * variance / mean**2, axis=1)) / 2
    total = jnp.sum(prior[None] * mean, axis=1)
    second = jnp.mean(jnp.sum(prior[None] ** 2 * variance, axis=1) / total**2) / 2
    sizes, score = (*counts(g.shape[1]), g.shape[1]), jnp.log(w)
    excess = jnp.stack([_excess(truth, prior, jnp.log(_sets(w, m))) for m in sizes])
    similar = jnp.stack([_excess(truth, prior, _sets(score, m)) for m in sizes])
    found = {"excess": excess[:-1], "limit": excess[-1], "similar": similar[:-1], "similar_limit": similar[-1]}
    return found | {"b": first - second}


def _sets(values, m):
    """Means over disjoint sets of m prompts, (n, S, Q) -> (n, S, Q // m)."""
    return jnp.mean(values.reshape(*values.shape[:2], -1, m), axis=-1)


def _excess(truth, prior, log_evidence):
    """Mean over images and sets of KL(P(c|x) || P(c) e^evidence / sum)."""
    law = jax.nn.log_softmax(jnp.log(prior)[None, :, None] + log_evidence, axis=1)
    return jnp.mean(jnp.sum(jnp.exp(truth)[..., None] * (truth[..., None] - law), axis=1))
