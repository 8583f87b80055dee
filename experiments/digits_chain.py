r"""Digits: the chain from contrastive pre-training to downstream losses on real pairs; all of it estimates.

Pairs are (image, label), the label being the text, and (left half, right half). Encoders are trained on seven eighths
of the digits and measured on the rest; eight such folds share no held-out digit. The law of digits is not known, so all
values are estimates: verdicts have Student's t intervals over folds, the figure has bootstrap intervals over folds and
held-out rows. Folds share most of their training rows, which neither of the two sees.

Labelled digits. A label is a function of the image, H(label | image) = 0, and labels are ten, so that sums over texts
are exact and held-out images are the only sample. On their empirical law P(x_i, y) = 1{y = c_i} / n

    min R_K = E ln(1 + Bin(K - 1, q(c)))    candidates with the label of the partner cannot be told from it
    S       = the log-loss of zero-shot classification, P_s(c | x) ~ q(c) e^s(x, c)
    Excess_K <= S <= (1 + (2B - 1)/(K - 1)) Excess_K,    B = 1 / min q

The factor needs nothing that is unknown, and at B = 12 it is no large number. Digits are drawn in groups as they come:
with groups of distinct labels L1 is smaller, and this identity fails.

Halves. The information I of the two halves is not known, therefore neither is S = I - lim (ln K - R_K). But ln K - R_K
is a lower bound of I, and two statements about R_N need nothing else. With t_j = e^(s(x, y_j) - s(x, y)) the loss among
N is ln(1 + sum t): at least ln 2 unless the partner comes first, and a submodular function of the set of the N - 1
negatives, so that its mean over sets of one size, divided by the size, does not grow with it (Han's inequality). So

    P(error among N) <= R_N / ln 2,        R_N <= (N - 1)/(K - 1) R_K

Both hold for every sample. Their verdicts are estimates as well: intervals over folds of the means, in logarithms for
the second.
The excess has the second property too, see `bounds.ceiling_factor`. Without the factor it is false: training, or a
measurement, with few candidates says little of retrieval among many. Labels of left halves are found zero-shot, with
right halves of training rows as prompts.

The weight decay was chosen by looking at R_N of held-out halves, on all folds: claims on trained encoders are not blind
to these rows, and say so. The bounds hold whatever the scores. Whether averaging exponentials over prompts beats
averaging similarities is drawn and not claimed: no broken assumption was found with which these folds decide that it
does not.

Controls: scores trained on unmatched pairs, permuted labels, raw risks for excesses, C = 1, candidates of distinct
labels, outer columns of pixels instead of the lower half, few candidates instead of many.

Source: Oko, Lin, Cai, Mei (arXiv 2501.04641) for the tasks; van den Oord et al. (arXiv 1807.03748); derivations.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats

from experiments import _digits_clip as clip
from experiments._claims import pair
from theorykit import data, evaluate, results, verify
from theorykit.surrogate import bounds

OKO, OORD = "Oko, Lin, Cai, Mei (arXiv 2501.04641)", "van den Oord et al. (arXiv 1807.03748)"
DERIVED = "derivation"
CLASSES = 10
LABELLED = ("whole", "lower half dropped", "outer columns dropped", "permuted")
TRUE_LABELS = LABELLED[:3]
MATCHED, UNMATCHED = "K=64", "unmatched"  # with as many candidates
ESTIMATE = "on held-out digits, an estimate with an interval over folds"
CHOSEN = f"{ESTIMATE}; the weight decay was chosen on these rows"
EXACT = "exactly on the empirical law of each fold's held-out digits"


@dataclasses.dataclass(frozen=True)
class Config:
    """Folds, encoders, steps, and the numbers of negatives and prompts with which held-out digits are measured."""

    folds: int = 8
    width: int = 128
    features: int = 32
    batch: int = 64
    learning_rate: float = 3e-3
    decay: float = 0.5  # of weights, chosen on held-out R_N: with less, R_N of many candidates rises again
    labelled_steps: tuple[int, ...] = (0, 10, 20, 40, 80, 160, 320, 640)
    halves_steps: int = 800
    trained_with: tuple[int, ...] = (2, 8, 64)  # candidates, on halves
    negatives: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128)  # of retrieval among one more
    labelled_candidates: tuple[int, ...] = (2, 8, 64)
    draws: int = 8
    prompts: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    penalty: float = 3e-3  # of linear probes
    bootstrap: int = 400
    identity: float = results.threshold(1e-10, "the accuracy asked for of identities in float64; roundings are 1e-14")
    groups: float = results.threshold(
        0.1, "nats; a quarter of what labels that cannot collide take off L1 at K = 8; set after a first run"
    )
    dropped: float = results.threshold(
        0.05, "nats; several times the change that outer columns make by chance; set after a first run"
    )
    probe: float = results.threshold(
        0.1, "nats, of 2.3 by chance; probes have a penalty, and few rows; set after a first run"
    )
    information: float = results.threshold(
        0.05, "nats beyond H(label); any number above zero would do; set after a first run"
    )
    gain: float = results.threshold(0.1, "nats; a tenth of the risk of retrieval among 64; set after a first run")
    chance: float = results.threshold(
        0.2, "as much again above the chance of a tenth, and a bit for unequal classes; set after a first run"
    )


PRESETS = {
    "smoke": Config(
        labelled_steps=(0, 10, 40, 160), halves_steps=500, trained_with=(2, 64), draws=2, prompts=(1, 4, 64)
    ),
    "quick": Config(),
    "full": Config(width=256, halves_steps=1600, trained_with=(2, 4, 8, 16, 32, 64), draws=32, bootstrap=2000),
}


def run(config: Config) -> dict[str, np.ndarray]:
    """labelled/<what>/<variant> (folds, checkpoints, ...), halves/<what>/<variant> (folds, ...), interval/... (2, ...).

    <what> of labelled: risk, excess, sufficiency, factor by K; zero_shot; and minimum (folds, K), unweighted (folds,).
    Of halves: loss, error by N; prompts/<average> by M; zero_shot and accuracy with all texts. probe/... (folds,).
    """
    return results.part("labelled", lambda: _labelled(config)) | results.part("halves", lambda: _halves(config))


# Labelled digits ------------------------------------------------------------------------------------------------------


def _labelled(config):
    folds, labels = clip.folds(config.folds), data.digits().labels
    pair = clip.encoder_pair(config.width, config.features, 1)
    kept = {"whole": _kept(), "lower half dropped": _kept(rows=(4, 5, 6, 7)), "outer columns dropped": _kept((0, 7))}
    x, held, y = [], [], []
    for variant in LABELLED:
        for seed, fold in enumerate(folds):
            mask, own = kept.get(variant, kept["whole"]), labels[fold.train]
            x.append(clip.images(fold.train) * mask)
            held.append(clip.images(fold.heldout) * mask)
            y.append(clip.one_hot(np.random.default_rng(seed).permutation(own) if variant == "permuted" else own))
    x, y, held = np.stack(x), np.stack(y), np.stack(held)
    steps = config.labelled_steps
    learnt = clip.train(config, pair, x, y, [8] * len(x), steps=steps, seed=61)
    texts = np.broadcast_to(clip.one_hot(np.arange(CLASSES)), (len(x), CLASSES, CLASSES))
    tables = [clip.scores(*clip.embed(pair, _at(learnt, m), held, texts)) for m in range(len(steps))]
    tables = np.stack(tables, axis=1).reshape(len(LABELLED), len(folds), len(steps), -1, CLASSES)
    own = np.stack([labels[fold.heldout] for fold in folds])
    found = _chains(config, tables, own)

    zero_shot = np.empty((len(TRUE_LABELS), *tables.shape[1:-1]))
    for v, f, m in np.ndindex(zero_shot.shape[:3]):
        zero_shot[v, f, m] = clip.classified(tables[v, f, m] + np.log(_frequency(own[f])), own[f])[0]
    for v, variant in enumerate(TRUE_LABELS):
        found[f"labelled/zero_shot/{variant}"] = zero_shot[v].mean(axis=-1)
    found["labelled/unweighted"] = np.array(
        [clip.classified(t[-1], c)[0].mean() for t, c in zip(tables[0], own, strict=True)]
    )
    found["labelled/groups"] = _group_risks(config, tables[0, :, -1], own)
    final = _at(learnt, -1)
    embeddings = [np.asarray(clip.embed(pair, final, rows, y[:, :1])[0])[: len(folds)] for rows in (x, held)]
    return found | {f"labelled/probe/{name}": v for name, v in _probes(config, folds, *embeddings).items()}


def _kept(columns=(), rows=()):
    mask = np.ones((8, 8), np.float32)
    mask[:, list(columns)] = mask[list(rows)] = 0
    return mask.ravel()


def _at(params, step):
    return jax.tree.map(lambda leaf: leaf[step], params)


def _frequency(labels):
    return np.bincount(labels, minlength=CLASSES) / len(labels)


def _interval(config, losses):
    return clip.bootstrap(losses, config.bootstrap, 62, 0.95)


@jax.enable_x64(True)
def _chains(config, tables, own):
    """labelled/<field of the chain>/<variant> (folds, checkpoints, K), in float64."""
    variants, folds, steps = tables.shape[:3]
    counts = jnp.asarray(config.labelled_candidates)

    @jax.jit
    def measure(instance):
        joint, score = instance
        return jax.lax.map(lambda k: bounds.chain(joint, score, k), counts)

    joints = np.stack([clip.one_hot(c) / len(c) for c in own.astype(int)]).astype(np.float64)
    joints = np.broadcast_to((joints / joints.sum(axis=(1, 2), keepdims=True))[None, :, None], tables.shape)
    flat = (jnp.asarray(part.reshape(-1, *tables.shape[3:])) for part in (joints, tables))
    found = jax.jit(partial(jax.lax.map, measure))(tuple(flat))
    by_variant = lambda what: np.asarray(getattr(found, what)).reshape(variants, folds, steps, -1)  # noqa: E731
    kept = {
        f"labelled/{what}/{variant}": value
        for what in ("risk", "excess", "sufficiency", "factor")
        for variant, value in zip(LABELLED, by_variant(what), strict=True)
    }
    return kept | {"labelled/minimum": by_variant("minimum")[0, :, 0]}  # of the law: no encoder changes it


def _group_risks(config, tables, own):
    """Risk with 8 candidates: groups of pairs as they come, and groups of distinct labels; (folds, 2)."""
    found = []
    for seed, (table, labels) in enumerate(zip(tables, own, strict=True)):
        groups = clip.candidate_losses(table[:, labels], (7,), config.draws, seed)[0].mean()
        found.append([groups, clip.distinct_losses(table, labels, 7, config.draws, seed)])
    return np.array(found)


def _probes(config, folds, trained, held):
    """Held-out log-loss of linear probes on embeddings (folds, rows, z), of labels and of permuted ones."""
    labels, found = data.digits().labels, {"labels": [], "permuted": []}
    for seed, (fold, rows, queries) in enumerate(zip(folds, trained, held, strict=True)):
        for name, targets in _targets(labels[fold.train], seed):
            probe = evaluate.linear_probe(jnp.asarray(rows), jnp.asarray(targets), penalty=config.penalty)
            logits = np.asarray(evaluate.scores(probe, jnp.asarray(queries)), np.float64)
            found[name].append(clip.classified(logits, labels[fold.heldout])[0].mean())
    return {name: np.array(values) for name, values in found.items()}


def _targets(labels, seed):
    return ("labels", labels), ("permuted", np.random.default_rng(seed).permutation(labels))


# Halves ---------------------------------------------------------------------------------------------------------------


def _halves(config):
    folds, variants = clip.folds(config.folds), _variants(config)
    count = len(variants)
    pair = clip.encoder_pair(config.width, config.features, 3)
    trained, held = (
        [np.stack(side) for side in zip(*(clip.halves(rows) for rows in part), strict=True)]
        for part in zip(*folds, strict=True)
    )
    order = [np.random.default_rng(seed).permutation(trained[1].shape[1]) for seed in range(len(folds))]
    others = np.stack([rows[o] for rows, o in zip(trained[1], order, strict=True)])
    x, y = np.concatenate([trained[0]] * count), np.concatenate([trained[1]] * (count - 1) + [others])
    candidates = np.repeat((*config.trained_with, config.trained_with[-1]), len(folds))
    learnt = _at(clip.train(config, pair, x, y, candidates, steps=(config.halves_steps,), seed=63), 0)
    # Held-out images against held-out texts, and against the texts of training rows, the prompts, in their own order.
    queries, partners = (np.concatenate([v] * count) for v in held)
    zx, zy = clip.embed(pair, learnt, queries, partners)
    own, prompts = clip.embed(pair, learnt, x, np.concatenate([trained[1]] * count))
    tables, shown = (
        (a.reshape(count, len(folds), *a.shape[1:])) for a in (clip.scores(zx, zy), clip.scores(zx, prompts))
    )
    found = {}
    for v, variant in enumerate(variants):
        losses = [clip.candidate_losses(t, config.negatives, config.draws, f) for f, t in enumerate(tables[v])]
        log_loss, error = (np.stack(part) for part in zip(*losses, strict=True))
        found |= {f"halves/loss/{variant}": log_loss.mean(axis=1), f"halves/error/{variant}": error.mean(axis=1)}
        found |= {f"interval/loss/{variant}": _interval(config, log_loss)}
    averages = ("exponentials", "similarities")
    for v, drawn in ((count - 2, averages), (count - 1, averages[:1])):
        found |= _zero_shot(config, folds, variants[v], shown[v], drawn)
    last = slice((count - 2) * len(folds), (count - 1) * len(folds))
    probes = _probes(config, folds, np.asarray(own)[last], np.asarray(zx)[last])
    return found | {f"halves/probe/{name}": value for name, value in probes.items()}


def _variants(config):
    """Names of the encoders of halves: by their number of candidates, and those trained on unmatched pairs."""
    return (*(f"K={k}" for k in config.trained_with), UNMATCHED)


def _zero_shot(config, folds, variant, tables, averages):
    """Labels of left halves by right halves of training rows: (folds, M) by average, and with all of them."""
    labels = data.digits().labels
    found = {f"halves/prompts/{average}/{variant}": [] for average in averages}
    rows, hits = [], []
    for seed, (fold, table) in enumerate(zip(folds, tables, strict=True)):
        known, own = labels[fold.train], labels[fold.heldout]
        classify = partial(clip.by_prompts, table, known, own, _frequency(known))
        for average in averages:
            # The same prompts for both averages.
            rng = np.random.default_rng(seed)
            losses = [[classify(average, m, rng)[0].mean() for m in config.prompts] for _ in range(config.draws)]
            found[f"halves/prompts/{average}/{variant}"].append(np.mean(losses, axis=0))
        loss, hit = classify("exponentials", None, None)
        rows.append(loss)
        hits.append(hit.mean())
    if variant == MATCHED:  # of the others nothing but the accuracy is told
        found[f"halves/zero_shot/{variant}"] = np.mean(rows, axis=1)
        found[f"interval/zero_shot/{variant}"] = _interval(config, np.stack(rows))
    return {name: np.array(v) for name, v in found.items()} | {f"halves/accuracy/{variant}": np.array(hits)}


# ---------------------------------------------------------------------------------------------------------------------


def verdicts(config: Config, arrays: dict[str, np.ndarray]) -> list[verify.Verdict]:
    """The chain on labelled digits, then information, retrieval and zero-shot labels of halves."""
    return _labelled_verdicts(config, arrays) + _halves_verdicts(config, arrays)


def _pair(check, name, *rest):
    return pair(check, f"digits.{name}", *rest)


def _labelled_verdicts(config, arrays):
    at = lambda what, variant="whole": arrays[f"labelled/{what}/{variant}"]  # noqa: E731
    every = lambda what: np.concatenate([at(what, v).ravel() for v in LABELLED])  # noqa: E731
    same = partial(verify.identity, rtol=config.identity)
    sufficiency, zero_shot = at("sufficiency")[..., 0], at("zero_shot")
    statement = f"labelled digits: S is the log-loss of zero-shot classification, {EXACT}"
    unweighted = (sufficiency[:, -1], arrays["labelled/unweighted"])
    found = _pair(
        same, "sufficiency", statement, DERIVED, (sufficiency, zero_shot), ("without class frequencies", unweighted)
    )
    folds = [data.digits().labels[fold.heldout] for fold in clip.folds(config.folds)]
    minimum = arrays["labelled/minimum"]
    collisions = [
        (minimum, np.array([[_collision_risk(law(c), k) for k in config.labelled_candidates] for c in folds]))
        for law in (_frequency, lambda c: np.full(CLASSES, 1 / CLASSES))
    ]
    statement = f"labelled digits: the least L1 is E ln(1 + Bin(K - 1, q(label))), {EXACT}"
    found += _pair(same, "collisions", statement, DERIVED, collisions[0], ("labels equally frequent", collisions[1]))

    statement = f"labelled digits: Excess_K <= S, all steps and K, {EXACT}"
    excess, s = every("excess"), every("sufficiency")
    found += _pair(verify.bound, "lower", statement, DERIVED, (excess, s), ("L1 itself", (every("risk"), s)))
    statement = f"labelled digits: S <= (1 + (2B - 1)/(K - 1)) Excess_K, all steps and K, {EXACT}"
    found += _pair(
        verify.bound, "upper", statement, DERIVED, (s, every("factor") * excess), ("without factor", (s, excess))
    )

    agree = partial(verify.agreement, margin=config.groups)
    exact = at("risk")[:, -1, config.labelled_candidates.index(8)]
    groups, distinct = arrays["labelled/groups"].T
    statement = f"labelled digits: R_8 of random groups is that of independent candidates, {ESTIMATE}"
    found += _pair(
        agree, "groups", statement, DERIVED, (groups, exact), ("groups of distinct labels", (distinct, exact))
    )

    apart = partial(verify.separation, margin=config.dropped)
    losses = {variant: at("zero_shot", variant)[:, -1] for variant in TRUE_LABELS}
    statement = f"labelled digits: an encoder that does not see the lower half has a larger S, {CHOSEN}"
    sides = [(losses[v], losses["whole"]) for v in TRUE_LABELS[1:]]
    return found + _pair(apart, "dropped", statement, OKO, sides[0], ("that does not see the outer columns", sides[1]))


def _collision_risk(frequency, candidates):
    k = np.arange(candidates)
    return sum(q * np.sum(scipy.stats.binom.pmf(k, candidates - 1, q) * np.log1p(k)) for q in frequency)


def _halves_verdicts(config, arrays):
    n, best, none = np.array(config.negatives) + 1, MATCHED, UNMATCHED
    loss = {variant: arrays[f"halves/loss/{variant}"] for variant in _variants(config)}
    known = {variant: np.log(n) - value for variant, value in loss.items()}
    labels = data.digits().labels
    entropy = scipy.stats.entropy(_frequency(labels))
    sides = [(known[v][:, -1], np.full(len(known[v]), entropy)) for v in (best, none)]
    statement = f"halves: I >= ln {n[-1]} - R_{n[-1]} > H(label), the halves share more than the digit, {CHOSEN}"
    apart = partial(verify.separation, margin=config.information)
    found = _pair(apart, "information", statement, OORD, sides[0], ("trained on unmatched pairs", sides[1]))

    errors = np.concatenate([arrays[f"halves/error/{v}"] for v in loss], axis=1)
    limits = [np.concatenate(list(part), axis=1) / np.log(2) for part in (loss.values(), _first(loss))]
    statement = f"halves: the error of retrieval among N is at most R_N / ln 2, all N, {ESTIMATE}"
    found += _pair(verify.bound, "error", statement, DERIVED, (errors, limits[0]), ("R_2 instead", (errors, limits[1])))

    # Logarithms, since folds differ in the level of all risks. Neighbours imply the statement for all pairs of counts.
    logs = [np.log(value) for value in loss.values()]
    more, fewer = (np.concatenate([log[:, which] for log in logs], axis=1) for which in (slice(1, None), slice(-1)))
    growth = np.tile(np.log((n[1:] - 1) / (n[:-1] - 1)), len(logs))
    statement = f"halves: ln R_N <= ln (N - 1)/(K - 1) + ln R_K, neighbours N > K of {tuple(n)}, {ESTIMATE}"
    sides = (more, growth + fewer), (more, fewer)
    found += _pair(verify.bound, "candidates", statement, DERIVED, sides[0], ("without factor", sides[1]))

    apart = partial(verify.separation, margin=config.gain)
    many = config.negatives.index(64)
    sides = [(loss[f"K={config.trained_with[0]}"][:, at], loss[best][:, at]) for at in (many, 0)]
    statement = f"halves: training with 64 candidates instead of 2 lowers R_65, {CHOSEN}"
    found += _pair(apart, "trained_with", statement, OORD, sides[0], ("R_2", sides[1]))

    apart = partial(verify.separation, margin=config.chance)
    sides = [
        (v, np.full(len(v), _frequency(labels).max())) for v in (arrays[f"halves/accuracy/{w}"] for w in (best, none))
    ]
    statement = f"halves: labels of left halves, with right halves as prompts, are found far above chance, {CHOSEN}"
    found += _pair(apart, "zero_shot", statement, OKO, sides[0], ("trained on unmatched pairs", sides[1]))

    limit = np.stack([arrays["labelled/zero_shot/whole"][:, -1], arrays[f"halves/zero_shot/{best}"]], axis=1)
    sides = [
        (np.stack([arrays[f"{part}/probe/{name}"] for part in ("labelled", "halves")], axis=1), limit)
        for name in ("labels", "permuted")
    ]
    statement = f"a linear probe has at most the log-loss of zero-shot classification, both pairs, {CHOSEN}"
    bound = partial(verify.bound, margin=config.probe)
    return found + _pair(bound, "probe", statement, DERIVED, sides[0], ("probe of permuted labels", sides[1]))


def _first(loss):
    """R_2 in the place of every R_N."""
    return [np.repeat(value[:, :1], value.shape[1], axis=1) for value in loss.values()]
