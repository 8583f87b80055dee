r"""L: S <= L1 while a pair of transformers learns, exactly: the chain L1, S, L2 of the learned score at checkpoints.

CLIP pairs with the score of optimal form, the log of an inner product of softmaxes, are trained on fresh samples of a
hierarchy with 256 images and 256 texts, for several numbers of candidates K of the loss, levels of noise p and seeds.
At checkpoints the table of all scores is measured on the enumerated joint. "S <= L1" has three readings:

    excess      S <= Excess_K is false for learned scores, at each K measured: S = Excess_K + gap_K, and gap_K > 0
    factor      S <= (1 + (2B - 1)/(K - 1)) Excess_K, with B the largest of the density ratios r, w of truth and model
    raw risk    S <= R_K for K >= e^I / min w; not for fewer, as the constant score shows

gap_K itself is checked twice: that of 2 candidates summed over all of them, those of 8 and 64 from draws of candidates
(`_sampled_gap`), against S - Excess_K.

The downstream losses L2 follow S. Next tokens lose S^{y|x} exactly. So does denoising in the other direction,
integrated over all levels of noise: shown for the first leaf of the image given the first leaf of the text, where both
sides are smaller than those of whole images, for which the integral has as many dimensions as leaves. Labels lose less,
unless they are no function of the text. Retrieval among N loses Excess_N; after training with K candidates that is at
most (N - 1)/(K - 1) Excess_K of the same score for N >= K.

Bounds and findings are checked on trained scores, after the warm-up of the learning rate, where S is at most
a quarter of what it was at the start; identities hold for any score and are checked along all of the training.

Measured at quick, after 300 steps of 64 pairs: S of both directions falls from 2.2 to 0.033..0.047 nats (p = 0.1) and
from 0.82 to 0.037..0.059 (p = 0.3); after 90 and 300 steps S / Excess_2 is 2.2 to 3.2 where its bound 2B is 8.0 to
11.2. e^I / min w is 370 to 1840 at p = 0.1, so that only K = 8192 is enough for all scores, and 14 to 42 at p = 0.3;
the raw risk is then 33 times S and more. Trained with K = 2, S is 1.2 to 1.6 times that with K = 64, and with K = 8 it
is nearly the same: this is no theorem, and no verdict. Nor is how the heads compare, at p = 0.2 with K = 8, where
Excess_8 after training is 0.030 to 0.033 for the score of optimal form, 0.098 to 0.102 for cosines and 0.106 to 0.115
for inner products.

Source: Oko, Lin, Cai, Mei (arXiv 2501.04641) for model and tasks; theorems as in `surrogate_downstream`.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from experiments import _claims, _hierarchy_exact, _sampled_gap, _score_identities
from experiments import _hierarchy_clip as networks
from experiments._side_by_side import kept, side_by_side_after
from experiments._training import checkpoints, parameters
from theorykit import results, verify
from theorykit.surrogate import bounds, hierarchy

TASKS, DERIVED = "Oko, Lin, Cai, Mei (arXiv 2501.04641)", "derivation"
VERDU = "Verdu (IEEE Trans. Inf. Theory 56, 2010)"
HEAD = "softmax"
TRAINED = (2, 8, 64)  # K of training; the last is the batch
# K of the excess that is measured, and N of retrieval. The last is beyond e^I / min w of most learned scores.
COUNTS = (2, 8, 64, 512, 8192)
SHOWN = 1  # place in TRAINED of the one whose identities are measured, in both precisions
SAMPLED = (8, 64)  # K of the gaps that are estimated from draws


@dataclasses.dataclass(frozen=True)
class Config:
    """Levels of p, seeds, steps; sizes are those of `_hierarchy_clip.Size`."""

    levels: tuple[float, ...] = (0.1, 0.3)
    seeds: int = 3
    steps: int = 300
    checkpoints: tuple[int, ...] = (0, 10, 30, 90, 300)
    compared: float | None = 0.2  # p at which the heads are compared
    drawn: int = 2**16  # candidates, in each of
    batches: int = 32
    exact: float = results.threshold(1e-10, "required of identities in float64; roundings of small S reach 1e-12")
    single: float = results.threshold(1e-6, "required of identities in float32; one rounding is 1e-7")
    quadrature: float = results.threshold(1e-10, "required of identities in float64; measured 2e-14")
    sampled: float = results.threshold(
        0.05, "relative, of gaps from draws, whose intervals reach 3% where scores are few"
    )
    rounding: float = results.threshold(1e-13, "nats; roundings of differences of risks of ten nats, and equal bounds")
    learned: float = results.threshold(
        0.2, "of the start's; set after a first run, midway in logarithms between what either pair keeps, 0.07 and 0.56"
    )


PRESETS = {
    "smoke": Config(levels=(0.1,), seeds=1, steps=150, checkpoints=(0, 150), compared=None),
    "quick": Config(),
    "full": Config(levels=(0.05, 0.1, 0.2, 0.3), seeds=8, steps=3000, checkpoints=(0, 10, 30, 90, 300, 1000, 3000)),
}


def run(config: Config) -> dict[str, np.ndarray]:
    """Losses by name (p, K of training, seeds, checkpoints + 1, ...), the last with the text encoder of the start.

    double/..., single/..., denoising/double/..., denoising/single/... (p, checkpoints) are of the first seed and one K
    of training, and so are sampled/gap, sampled/half (p, checkpoints, `SAMPLED`, batches of draws). heads/... (heads,
    seeds, ...) are of the last checkpoint, with the same K of training.
    """
    trained(config)  # an error before any work
    size, names = networks.Size(), {f"trained-{p:g}": p for p in config.levels}
    # All members of one level of noise are trained by one program.
    levels, candidates = len(config.levels), np.repeat(TRAINED, config.seeds)
    of_levels = {name: (partial(_train, config, size, p, HEAD, candidates), ()) for name, p in names.items()}
    exact = {f"exact-{p:g}": (partial(_losses, size, p), (name,)) for name, p in names.items()}
    hs, heads = networks.hierarchies(size, jax.random.key(0), config.levels), {}
    others = {
        "identities": (partial(_identities, config, hs), names),
        "sampled": (partial(_sampled, config, hs), names),
    }
    if config.compared is not None:
        for head in networks.HEADS:
            heads[f"head-{head}"] = (partial(_train, config, size, config.compared, head, TRAINED[SHOWN]), ())
        others["heads"] = (partial(_heads, config, size), heads)
    # Two cells of one program that begin together would both compile it: one level first, the others last.
    cells = dict([*of_levels.items()][:1]) | heads | of_levels | dict([*exact.items()][:1]) | others | exact
    found = side_by_side_after({label: (kept(label, function), needs) for label, (function, needs) in cells.items()})
    arrays = {name: array for label in others for name, array in found[label].items()}
    for name in found[next(iter(exact))]:
        values = np.stack([found[label][name] for label in exact])
        arrays[name] = values.reshape(levels, len(TRAINED), config.seeds, *values.shape[2:])
    return arrays


def trained(config: Config) -> list[int]:
    """Places of the checkpoints of trained scores: those after the warm-up of the learning rate."""
    warm_up = networks.Size().warm_up
    found = [i for i, step in enumerate(config.checkpoints) if step > warm_up]
    if not found:
        raise ValueError(
            f"of the checkpoints {config.checkpoints} none is after the warm-up of {warm_up} steps, so that no score "
            "counts as trained: add a later one"
        )
    return found


def _hierarchies(size, p, members):
    return networks.hierarchies(size, jax.random.key(0), np.full(members, p))


def _train(config, size, p, head, candidates):
    """Tables (members, checkpoints + 1, nx, ny), members by K of training, `candidates`, and then by seed."""
    keys = jnp.tile(jax.random.split(jax.random.key(1), config.seeds), np.size(candidates) // config.seeds or 1)
    done = networks.train_clip(
        size,
        _hierarchies(size, p, len(keys)),
        keys,
        head=head,
        steps=config.steps,
        candidates=candidates,
        metrics=parameters,
        metric_steps=config.checkpoints,
        **checkpoints(f"training-{p:g}-{head}", len(keys) * config.steps),
    )
    # After the checkpoints the control: the text encoder of the first with the image encoder of the last.
    after = jax.tree.map(lambda a: a[-1:], done.metrics) | {"text": jax.tree.map(lambda a: a[:1], done.metrics["text"])}
    every = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), done.metrics, after)  # (checkpoints + 1, members, ...)
    tables = networks.score_table(size, head, jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), every))
    return {"tables": np.swapaxes(np.asarray(tables).reshape(-1, len(keys), *tables.shape[1:]), 0, 1)}


def _losses(size, p, learnt):
    tables = learnt["tables"]
    return _hierarchy_exact.exact_tables(_hierarchies(size, p, len(tables)), tables, COUNTS)


def _heads(config, size, *learnt):
    """Of the last checkpoint, (heads, seeds, ...)."""
    tables = np.concatenate([one["tables"][:, -2:-1] for one in learnt])
    found = _losses(size, config.compared, {"tables": tables})
    return {
        f"heads/{name}": found[name][:, 0].reshape(len(learnt), config.seeds, *found[name].shape[2:])
        for name in ("excess", "sufficiency")
    }


def _shown(config, learnt):
    """Tables (p, checkpoints, nx, ny) of the first seed and one K of training."""
    return np.stack([one["tables"][SHOWN * config.seeds, :-1] for one in learnt])


def _identities(config, hs, *learnt):
    return _score_identities.both_sides(hs, _shown(config, learnt))


def _sampled(config, hs, *learnt):
    tables = _shown(config, learnt)
    laws = np.asarray(jax.lax.map(hierarchy.enumerate_joint, hs))
    found = _sampled_gap.both_directions(laws, tables, SAMPLED, config.drawn, config.batches)
    return {f"sampled/{name}": values for name, values in found.items()}


# Verdicts -------------------------------------------------------------------------------------------------------------


def verdicts(config: Config, arrays: dict[str, np.ndarray]) -> list[verify.Verdict]:
    """Identities, bounds and what training reaches, each with its control; all of them for every realisation."""
    found = []

    def pair(check, name, statement, source, sides, why, broken):
        flat = [tuple(np.ravel(a) for a in both) for both in (sides, broken)]
        found.extend(_claims.pair(check, name, statement, source, flat[0], (why, flat[1])))

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
            tokens = np.sum(arrays["tokens"][..., :-1, :], axis=-1)
            sides = [(tokens, arrays[name][..., :-1]) for name in ("forward", "reverse")]
        pair(same, f"L.tokens.{precision}", statement, TASKS, sides[0], "S^(x|y)", sides[1])

    for part, rtol, precision in (("double", config.quadrature, "float64"), ("single", config.single, "float32")):
        a = {name: arrays[f"denoising/{part}/{name}"] for name in ("integral", "S reverse", "S")}
        same = partial(verify.identity, rtol=rtol)
        lost = f"denoising of an image leaf given one of the text, over all noise, loses their S^(x|y), {precision}"
        sides = [(a["integral"], a[name]) for name in ("S reverse", "S")]
        pair(same, f"L.denoising.{precision}", lost, VERDU, sides[0], "S^(y|x)", sides[1])

    found += _of_draws(config, arrays)
    at, counts = trained(config), np.array(COUNTS)
    late = {name: a[:, :, :, at] for name, a in arrays.items() if "/" not in name}
    steps = f"after {' and '.join(str(config.checkpoints[i]) for i in at)} steps"
    excess, lost = late["excess"], np.broadcast_to(late["sufficiency"][..., None], late["excess"].shape)
    bound = partial(verify.bound, margin=config.rounding)

    statement = f"zero-shot labels by the learned score lose at most S^(y|x), {steps}"
    sides = [(late[name], late["forward"]) for name in ("zero_shot", "zero_shot_root")]
    pair(bound, "L.labels", statement, TASKS, sides[0], "the root as label, no function of the text", sides[1])

    statement = f"S <= (1 + (2B - 1)/(K - 1)) Excess_K of the learned score, {steps}"
    free = (1 + 1 / counts) * excess
    pair(bound, "L.factor", statement, DERIVED, (lost, upper(late)), "a factor 1 + 1/K, free of r, w", (lost, free))
    for i, k in enumerate(COUNTS):
        statement = f"S <= Excess_{k} of the learned score, without a factor, {steps}"
        finding = verify.Claim(f"L.excess.{k}", statement, DERIVED, "finding")
        found.append(bound(finding, np.ravel(lost[..., i]), np.ravel(excess[..., i])))

    enough, constant = _enough(late), _constant(config, arrays["information"][:, 0, 0, 0])
    statement = f"S <= R_K of the learned score for K >= e^I / min w, {steps}: {_points(enough)}"
    sides = lost[enough], late["risk"][enough]
    pair(bound, "L.raw", statement, DERIVED, sides, "the constant score and K < e^I", constant)

    size = np.maximum(1, (counts[:, None] - 1) / (counts[None, :] - 1))  # N by K
    among, given = (np.broadcast_to(e, (*excess.shape, len(counts))) for e in (excess[..., None], excess[..., None, :]))
    statement = f"retrieval among N by the learned score loses at most max(1, (N - 1)/(K - 1)) Excess_K, {steps}"
    sides = (among, size * given), (among, given)
    pair(bound, "L.retrieval", statement, DERIVED, sides[0], "Excess_K itself, also for N > K", sides[1])
    for i, k in enumerate(TRAINED):
        j = COUNTS.index(k)
        more = among[:, i, ..., j:, j], given[:, i, ..., j:, j]  # N from K on
        sides = [(more[0], factor * more[1]) for factor in (size[j:, j], 1.0)]
        statement = f"trained with K = {k}, retrieval among N >= K loses at most (N - 1)/(K - 1) Excess_{k}, {steps}"
        pair(bound, f"L.retrieval.{k}", statement, DERIVED, sides[0], f"Excess_{k} itself, for all N", sides[1])

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


def quotients(arrays: dict[str, np.ndarray], which: str) -> np.ndarray:
    """Estimates of gap_K over S - Excess_K, (p, checkpoints, `SAMPLED`, batches); which: gap, or half."""
    at, counts = np.s_[:, SHOWN, 0, :-1], [COUNTS.index(k) for k in SAMPLED]
    gap = arrays["sufficiency"][at][..., None] - arrays["excess"][at][..., counts]
    return arrays[f"sampled/{which}"] / gap[..., None]


def _of_draws(config, arrays):
    found, check = [], partial(verify.agreement, predicted=1.0, margin=config.sampled)
    for i, k in enumerate(SAMPLED):
        sides = [(np.mean(quotients(arrays, which)[:, :, i], axis=(0, 1)),) for which in ("gap", "half")]
        statement = f"gap_{k} of the learned score, from draws of {k} candidates, is S - Excess_{k}: mean quotient"
        why = "half as many candidates"
        found += _claims.pair(check, f"L.gap.{k}", statement, DERIVED, sides[0], (why, sides[1]))
    return found


def _enough(losses):
    """Where the last axis, K, is at least e^I / min w of the score."""
    needed = np.exp(losses["information"]) / losses["floor"]
    enough = np.array(COUNTS) >= needed[..., None]
    if not np.any(enough):
        raise ValueError(
            f"L.raw has no point: e^I / min w of the trained scores is {np.min(needed):.0f} or more and the largest K "
            f"is {COUNTS[-1]}: add a larger K to COUNTS"
        )
    return enough


def _points(enough):
    """How much of a sweep over tables and K is in the selection."""
    tables = np.any(enough, axis=-1)
    return f"{np.sum(enough)} of {enough.size} points, of {np.sum(tables)} of {tables.size} scores"


def _constant(config, information):
    """S and R_K of the constant score at all K < e^I, with the information (p,) of each level."""
    counts = np.array(COUNTS)
    few = counts < np.exp(information)[:, None]
    if not np.any(few):
        raise ValueError(
            f"the control of L.raw has no point: e^I is {np.exp(np.max(information)):.2f} or less at p = "
            f"{config.levels}, and no K is smaller: add a smaller p"
        )
    both = 2 * information[:, None], 2 * np.log(counts)[None, :]
    return tuple(np.broadcast_to(a, few.shape)[few] for a in both)


def upper(arrays: dict[str, np.ndarray]) -> np.ndarray:
    """`bounds.ceiling_factor` times Excess_K."""
    with jax.enable_x64(True):
        factor = jnp.vectorize(bounds.ceiling_factor)(jnp.asarray(arrays["ceiling"])[..., None], jnp.asarray(COUNTS))
    return np.asarray(factor) * arrays["excess"]


def fractions(arrays: dict[str, np.ndarray], which: int) -> np.ndarray:
    """Losses (losses, p, K of training, seeds) of a checkpoint, as fractions of those at the start."""
    losses = [*np.moveaxis(arrays["excess"], -1, 0), arrays["sufficiency"], arrays["zero_shot"], arrays["forward"]]
    return np.stack([loss[..., which] / loss[..., 0] for loss in losses])
