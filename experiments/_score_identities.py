r"""Both sides of exact identities between losses of a learned score, on the enumerated joint, in two precisions.

    risk, excess, gap            of K = 2 candidates, the gap summed over all of them: Excess_2 + gap_2 = S
    tokens                       excess of the next tokens of a text given its image: S^{y|x}
    integral                     of denoising over all levels of noise, of the first image leaf given the first leaf of
                                 the text: S^{x|y} of the two

`reverse` is of texts in place of images.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from experiments import _hierarchy_exact
from theorykit import surrogate
from theorykit.surrogate import denoisers, hierarchy, information_loss, joint, risk

CANDIDATES = 2


def both_sides(hs, tables):
    """Both sides of the identities, in both precisions, NumPy arrays (p, checkpoints).

    Parameters
    ----------
    hs : Hierarchy (p, ...)
    tables : (p, checkpoints, nx, ny)
        Scores, in the order of `hierarchy.enumerate_joint`.
    """
    found = {}
    for prefix, dtype in (("double", np.float64), ("single", np.float32)):
        with jax.enable_x64(dtype == np.float64):
            given = _hierarchy_exact.in_precision(hs, dtype)
            same = jnp.asarray(tables, dtype)
            sides = {prefix: _both_sides(given, same), f"denoising/{prefix}": _denoising(given, same)}
            for part, values in sides.items():
                found |= {f"{part}/{name}": np.asarray(value) for name, value in values.items()}
    return found


@jax.jit
def _both_sides(hs, tables):
    def of_level(one):
        h, tables = one
        return jax.lax.map(partial(_of_table, h.text.shape[-1], hierarchy.enumerate_joint(h)), tables)

    return jax.lax.map(of_level, (hs, tables))


def _of_table(symbols, law, table):
    scores = jnp.stack([table, risk.optimal_score(law)])
    value, least = jax.lax.map(lambda score: risk.contrastive_risk(law, score, CANDIDATES), scores)
    leaves = round(math.log(law.shape[1], symbols))
    return {
        "risk": value,
        "excess": value - least,
        "S": surrogate.sufficiency(law, table),
        "S reverse": surrogate.sufficiency(law.T, table.T),
        "gap": _gap(law, table),
        "gap reverse": _gap(law.T, table.T),
        "tokens": jnp.sum(surrogate.downstream.next_token(law, table, leaves * (symbols,)).excess),
    }


def _gap(law, table):
    """KL of the laws of x and two candidates under truth and model, summed over all of them."""
    p, q = jnp.sum(law, axis=1), jnp.sum(law, axis=0)
    r, w = joint.density_ratio(law), information_loss.model_ratio(law, table)

    def of_image(row):
        true, model = ((a[:, None] + a[None, :]) / 2 for a in row)
        u = model / true
        # Terms that are nonnegative each, so that a small sum keeps its digits.
        return q @ (true * (u - 1 - jnp.log(u))) @ q

    return p @ jax.lax.map(of_image, (r, w))


def _denoising(hs, tables):
    """Of the first image leaf given the first leaf of the text, by what the model says of the two."""
    symbols = hs.text.shape[-1]
    points = jnp.arange(symbols, dtype=tables.dtype)  # symbols are their own positions, as in `hierarchy.denoise`

    def pooled(law):
        return jnp.sum(law.reshape(symbols, -1, symbols, law.shape[1] // symbols), axis=(1, 3))

    def of_level(one):
        h, tables = one
        law = hierarchy.enumerate_joint(h)
        small, q = pooled(law), jnp.sum(law, axis=0)
        ends = jnp.sum(small, axis=1)[:, None] * jnp.sum(small, axis=0)[None, :]

        def measure(table):
            model = information_loss.model_conditional(law.T, table.T).T * q[None, :]  # P_s(x|y) q(y)
            score = jnp.log(pooled(model) / ends)
            return {
                "integral": denoisers.integrated_denoising(small, score, points),
                "S": surrogate.sufficiency(small, score),
                "S reverse": surrogate.sufficiency(small.T, score.T),
                "whole": surrogate.sufficiency(law.T, table.T),
            }

        return jax.lax.map(measure, tables)

    return jax.jit(lambda arguments: jax.lax.map(of_level, arguments))((hs, tables))
