"""Exact losses of tables of scores on the enumerated joints of small hierarchies.

    exact_tables(hs, tables, candidates)        NumPy arrays (members, tables, ...), in float64 unless told

with hs a Hierarchy (members, ...), tables (members, tables, nx, ny) in the order of `hierarchy.enumerate_joint`, such
as those of `_hierarchy_clip.score_table`, and candidates a tuple of K. By name, in nats:

    risk, excess       (counts,) R_K and Excess_K, both directions added: the loss of `train_clip`, and what training
                       can take off it
    sufficiency        S of both directions, which is at least the excess
    forward, reverse   S^{y|x} and S^{x|y}
    tokens             (T,) excess of every next token of the text given the image; their sum is S^{y|x}
    zero_shot          excess log-loss of the first text leaf as label of the image, at most S^{y|x}
    zero_shot_root     the same of the root, which is no function of the text
    ceiling, floor     the largest of r and of w, and the least of w, where w is that of either direction
    information        I(X; Y), the S^{y|x} of a constant score
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from theorykit import surrogate
from theorykit.surrogate import bounds, downstream, hierarchy, risk
from theorykit.surrogate.joint import mutual_information


def in_precision(hs, dtype):
    """Hierarchies of this dtype, with rows normalised to its precision."""

    def cast(kernels):
        kernels = jnp.asarray(np.asarray(kernels), dtype)
        return kernels / jnp.sum(kernels, axis=-1, keepdims=True)

    return jax.tree.map(cast, hs)


def _losses(joint, table, alphabet, value, least):
    tokens = round(math.log(joint.shape[1], alphabet)) * (alphabet,)
    # What is claimed of both directions needs the extremes of both: w normalises over x or over y.
    ceilings, inverse_floors = zip(bounds.extremes(joint, table), bounds.extremes(joint.T, table.T), strict=True)
    return {
        "risk": value,
        "excess": value - least,
        "sufficiency": surrogate.sufficiency(joint, table, side="both"),
        "forward": surrogate.sufficiency(joint, table),
        "reverse": surrogate.sufficiency(joint.T, table.T),
        "tokens": downstream.next_token(joint, table, tokens).excess,
        "zero_shot": downstream.zero_shot(first_leaf(joint, alphabet), joint, table).log_loss.excess,
        "ceiling": jnp.maximum(*ceilings),
        "floor": 1 / jnp.maximum(*inverse_floors),
        "information": mutual_information(joint),
    }


def first_leaf(joint, alphabet):
    """P(c, y) of the label c = first leaf of the text, (S, ny)."""
    q = jnp.sum(joint, axis=0)
    label = jnp.arange(q.size) // (q.size // alphabet)
    return jax.nn.one_hot(label, alphabet, axis=0, dtype=joint.dtype) * q[None, :]


def exact_tables(hs, tables, candidates, *, dtype=np.float64):
    """Losses of all tables of all members, see above."""
    with jax.enable_x64(dtype == np.float64):
        found = _exact_tables(in_precision(hs, dtype), jnp.asarray(np.asarray(tables), dtype), tuple(candidates))
        return {name: np.asarray(value) for name, value in found.items()}


@functools.partial(jax.jit, static_argnames="candidates")
def _exact_tables(hs, tables, candidates):
    symbols = hs.text.shape[-1]

    def member(one):
        h, tables = one
        joint = hierarchy.enumerate_joint(h)
        leaves = [hierarchy.all_leaves(symbols, k.shape[1] ** k.shape[0]) for k in (h.image, h.text)]
        given = [hierarchy.root_posterior(h, image=leaves[0]), hierarchy.root_posterior(h, text=leaves[1])]
        of_image, of_text = (jnp.exp(g).T * jnp.sum(joint, axis=1 - i)[None, :] for i, g in enumerate(given))

        # The best score goes through the same program as all tables: its risks come first.
        scores = jnp.concatenate([risk.optimal_score(joint)[None], tables])
        risks = jax.lax.map(lambda score: _risks(joint, score, candidates), scores)

        def measure(one):
            table, value = one
            found = _losses(joint, table, symbols, value, risks[0])
            root = downstream.zero_shot(of_text, joint, table, label_image=of_image)
            return found | {"zero_shot_root": root.log_loss.excess}

        return jax.lax.map(measure, (tables, risks[1:]))

    return jax.lax.map(member, (hs, tables))


def _risks(joint, table, candidates):
    counts = jnp.asarray(candidates, joint.dtype)
    # One after the other, and one program for all K.
    return jax.lax.map(lambda k: risk.contrastive_risk(joint, table, k, side="both"), counts)
