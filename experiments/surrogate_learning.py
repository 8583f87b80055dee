r"""L: S <= L1 while a pair of transformers learns, exactly: the chain L1, S, L2 of the learned score at checkpoints.

CLIP pairs with the score of optimal form, the log of an inner product of softmaxes, are trained on fresh samples of a
hierarchy with 256 images and 256 texts, for several numbers of candidates K of the loss, levels of noise p and seeds.
At checkpoints the table of all scores is measured on the enumerated joint. "S <= L1" has three readings:

    excess      S <= Excess_K is false for a learned score, at every K: S = Excess_K + gap_K, and gap_K > 0
    factor      S <= (1 + (2B - 1)/(K - 1)) Excess_K, with B the largest of the density ratios r, w of truth and model
    raw risk    S <= R_K for K >= e^I / min w; not for fewer, as the constant score shows

The downstream losses L2 follow S. Next tokens lose S^{y|x} exactly. So does denoising in the other direction,
integrated over all levels of noise: shown for the first leaf of the image given the first half of the text, where both
sides are smaller than those of whole images, for which the integral has as many dimensions as leaves. Labels lose less,
unless they are no function of the text. Retrieval among N loses Excess_N, for every K of training.

Measured at quick, after 300 steps of 64 pairs: S of both directions falls from 2.2 to 0.033..0.048 nats (p = 0.1) and
from 0.82 to 0.034..0.060 (p = 0.3); S / Excess_2 is 2.2 to 3.2 where its bound 2B is 7.6 to 11. Trained with K = 2, S
is 1.2 to 1.6 times that with K = 64, and with K = 8 it is nearly the same: this is no theorem, and no verdict.

Source: Oko, Lin, Cai, Mei (arXiv 2501.04641) for model and tasks; theorems as in `surrogate_downstream`.
"""

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from experiments import _hierarchy_clip as networks
from experiments import _hierarchy_exact
from experiments._side_by_side import side_by_side
from theorykit import results, surrogate, verify
from theorykit.surrogate import denoisers, hierarchy, information_loss, joint, risk

TASKS, DERIVED = "Oko, Lin, Cai, Mei (arXiv 2501.04641)", "derivation"
HEAD = "softmax"
TRAINED = (2, 8, 64)  # K of training; the last is the batch
COUNTS = (2, 8, 64, 512)  # K of the excess that is measured, and N of retrieval
SHOWN = 1  # place in TRAINED of the one whose identities are measured, in both precisions
LISTED = 2  # candidates of the gap that is summed over all of them


@dataclasses.dataclass(frozen=True)
class Config:
    """Levels of p, seeds, steps; sizes are those of `_hierarchy_clip.Size`."""

    levels: tuple[float, ...] = (0.1, 0.3)
    seeds: int = 3
    steps: int = 300
    checkpoints: tuple[int, ...] = (0, 10, 30, 90, 300)
    exact: float = results.threshold(1e-10, "required of identities in float64; roundings of small S reach 1e-12")
    single: float = results.threshold(1e-6, "required of identities in float32; one rounding is 1e-7")
    quadrature: float = results.threshold(1e-9, "halving the steps of both trapezoid rules changes less than 1e-10")
    rounding: float = results.threshold(1e-13, "nats; roundings of differences of risks of ten nats, and equal bounds")
    learned: float = results.threshold(
        0.2, "of the start's; midway, in logarithms, between what either pair keeps: 0.07 and 0.56"
    )


PRESETS = {
    "smoke": Config(levels=(0.1,), seeds=1, steps=150, checkpoints=(0, 150)),
    "quick": Config(),
    "full": Config(levels=(0.05, 0.1, 0.2, 0.3), seeds=8, steps=3000, checkpoints=(0, 10, 30, 90, 300, 1000, 3000)),
}


def run(config: Config) -> dict[str, np.ndarray]:
    """Losses by name (p, K of training, seeds, checkpoints + 1, ...), the last with the text encoder of the start.

    double/..., single/... and denoising/... (p, checkpoints) are of the first seed and one K of training.
    """
    size = networks.Size()
    # All members of one level of noise are trained by one program.
    cells = [(f"trained-{p:g}", partial(_train, config, size, p)) for p in config.levels]
    tables = [found["tables"] for found in side_by_side(results.part, cells)]
    cells = [(f"exact-{p:g}", partial(_losses, size, p, t)) for p, t in zip(config.levels, tables, strict=True)]
    first = np.stack([t[SHOWN * config.seeds, :-1] for t in tables])
    # First, since it takes longest.
    cells.insert(0, ("identities", partial(_identities, config, size, first)))
    arrays, *found = side_by_side(results.part, cells)
    for name in found[0]:
        values = np.stack([losses[name] for losses in found])
        arrays[name] = values.reshape(len(config.levels), len(TRAINED), config.seeds, *values.shape[2:])
    return arrays


def _hierarchies(size, p, members):
    return networks.hierarchies(size, jax.random.key(0), np.full(members, p))


def _train(config, size, p):
    """Tables (members, checkpoints + 1, nx, ny), members by K of training and then by seed."""
    keys = jnp.tile(jax.random.split(jax.random.key(1), config.seeds), len(TRAINED))
    done = networks.train_clip(
        size,
        _hierarchies(size, p, len(keys)),
        keys,
        head=HEAD,
        steps=config.steps,
        candidates=np.repeat(TRAINED, config.seeds),
        metrics=_parameters,
        metric_steps=config.checkpoints,
    )
    # After the checkpoints the control: the text encoder of the first with the image encoder of the last.
    after = jax.tree.map(lambda a: a[-1:], done.metrics) | {"text": jax.tree.map(lambda a: a[:1], done.metrics["text"])}
    every = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), done.metrics, after)  # (checkpoints + 1, members, ...)
    tables = networks.score_table(size, HEAD, jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), every))
    return {"tables": np.swapaxes(np.asarray(tables).reshape(-1, len(keys), *tables.shape[1:]), 0, 1)}


def _parameters(params):
    return params


def _losses(size, p, tables):
    return _hierarchy_exact.exact_tables(_hierarchies(size, p, len(tables)), tables, COUNTS)


# Identities -----------------------------------------------------------------------------------------------------------


def _identities(config, size, tables):
    """Both sides of the identities, in both precisions, for tables (p, checkpoints, nx, ny)."""
    hs = networks.hierarchies(size, jax.random.key(0), config.levels)
    found = {}
    for prefix, dtype in (("double", np.float64), ("single", np.float32)):
        with jax.enable_x64(dtype == np.float64):
            given = _hierarchy_exact.in_precision(hs, dtype)
            sides = {prefix: _both_sides(given, jnp.asarray(tables, dtype))}
            if dtype == np.float64:
                sides["denoising"] = _denoising(given, jnp.asarray(tables, dtype))
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
    value, least = jax.lax.map(lambda score: risk.contrastive_risk(law, score, LISTED), scores)
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
    """Of the first image leaf given the first half of the text, by what the model says of the two."""
    symbols = hs.text.shape[-1]
    points = jnp.arange(symbols, dtype=tables.dtype)  # symbols are their own positions, as in `hierarchy.denoise`

    def pooled(law):
        half = math.isqrt(law.shape[1])
        return jnp.sum(law.reshape(symbols, -1, half, half), axis=(1, 3))

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


# Verdicts -------------------------------------------------------------------------------------------------------------


def verdicts(config: Config, arrays: dict[str, np.ndarray]) -> list[verify.Verdict]:
    """Identities, bounds and what training reaches, each with its control; all of them for every realisation."""
    found = []

    def pair(check, name, statement, source, sides, why, broken):
        claim = verify.Claim(name, statement, source)
        control = verify.Claim(f"{name}.control", f"{statement}: {why}", source, "control", name)
        found.extend(check(which, *(np.ravel(a) for a in both)) for which, both in ((claim, sides), (control, broken)))

    for part, rtol, precision in (("double", config.exact, "float64"), ("single", config.single, "float32")):
        a = {
            name: arrays[f"{part}/{name}"]
            for name in ("risk", "excess", "S", "S reverse", "gap", "gap reverse", "tokens")
        }
        same = partial(verify.identity, rtol=rtol)
        # Excesses are differences of risks, exact to their rounding: in units of the risk.
        lost, parts, reverse = (1 + value / a["risk"] for value in (a["S"], *(a["excess"] + a[g] for g in _GAPS)))
        statement = (
            f"S of the learned score is Excess_2 + gap_2, all candidates listed, at every checkpoint, {precision}"
        )
        pair(same, f"L.sum.{precision}", statement, DERIVED, (lost, parts), "gap_2 of texts", (lost, reverse))
        statement = f"next tokens of a text lose S^(y|x) of the learned score, at every checkpoint, {precision}"
        sides = [(a["tokens"], a[name]) for name in ("S", "S reverse")]
        if part == "double":  # of all members
            tokens = np.sum(arrays["tokens"], axis=-1)
            sides = [(tokens, arrays[name]) for name in ("forward", "reverse")]
        pair(same, f"L.tokens.{precision}", statement, TASKS, sides[0], "S^(x|y)", sides[1])

    a = {name.split("/")[1]: value for name, value in arrays.items() if name.startswith("denoising/")}
    same = partial(verify.identity, rtol=config.quadrature)
    statement = "denoising of an image leaf given half the text, over all levels of noise, loses their S^(x|y)"
    sides = [(a["integral"], a[name]) for name in ("S reverse", "S")]
    pair(same, "L.denoising", statement, "Verdu (IEEE Trans. Inf. Theory 56, 2010)", sides[0], "S^(y|x)", sides[1])

    bound = partial(verify.bound, margin=config.rounding)
    statement = "zero-shot labels by the learned score lose at most S^(y|x)"
    sides = [(arrays[name], arrays["forward"]) for name in ("zero_shot", "zero_shot_root")]
    pair(bound, "L.labels", statement, TASKS, sides[0], "the root as label, no function of the text", sides[1])

    lost = np.broadcast_to(arrays["sufficiency"][..., None], arrays["excess"].shape)
    sharp, counts = upper(arrays), np.array(COUNTS)
    statement = "S <= (1 + (2B - 1)/(K - 1)) Excess_K of the learned score"
    free = (1 + 1 / counts) * arrays["excess"]
    pair(bound, "L.factor", statement, DERIVED, (lost, sharp), "a factor 1 + 1/K, free of r and w", (lost, free))
    finding = verify.Claim("L.excess", "S <= Excess_K of the learned score, without a factor", DERIVED, "finding")
    found.append(bound(finding, np.ravel(lost), np.ravel(arrays["excess"])))

    enough = counts >= np.exp(arrays["information"])[..., None] / arrays["floor"][..., None]
    few = counts < np.exp(arrays["information"])[..., None]
    constant = (
        2 * np.broadcast_to(arrays["information"][..., None], few.shape),
        2 * np.broadcast_to(np.log(counts), few.shape),
    )
    statement = "S <= R_K of the learned score for K >= e^I / min w"
    sides = (lost[enough], arrays["risk"][enough]), tuple(side[few] for side in constant)
    pair(bound, "L.raw", statement, DERIVED, sides[0], "the constant score and K < e^I", sides[1])

    size = np.maximum(1, (counts[:, None] - 1) / (counts[None, :] - 1))  # N by K
    excess = arrays["excess"]
    among, trained = (
        np.broadcast_to(e, (*excess.shape, len(counts))) for e in (excess[..., None], excess[..., None, :])
    )
    statement = "retrieval among N by the learned score loses at most max(1, (N - 1)/(K - 1)) Excess_K"
    sides = (among, size * trained), (among, trained)
    pair(bound, "L.retrieval", statement, DERIVED, sides[0], "Excess_K itself, also for N > K", sides[1])

    kept, frozen = (fractions(arrays, which) for which in (-2, -1))
    statement = f"training leaves at most {config.learned} of Excess_K, of S, and of the losses of labels and tokens"
    pair(
        bound,
        "L.learned",
        statement,
        TASKS,
        (kept, config.learned + 0 * kept),
        "the text encoder of the start",
        (frozen, config.learned + 0 * frozen),
    )
    return found


_GAPS = ("gap", "gap reverse")


def upper(arrays: dict[str, np.ndarray]) -> np.ndarray:
    """(1 + (2B - 1)/(K - 1)) Excess_K."""
    return (1 + (2 * arrays["ceiling"][..., None] - 1) / (np.array(COUNTS) - 1)) * arrays["excess"]


def fractions(arrays: dict[str, np.ndarray], which: int) -> np.ndarray:
    """Losses (losses, p, K of training, seeds) of a checkpoint, as fractions of those at the start."""
    losses = [*np.moveaxis(arrays["excess"], -1, 0), arrays["sufficiency"], arrays["zero_shot"], arrays["forward"]]
    return np.stack([loss[..., which] / loss[..., 0] for loss in losses])
