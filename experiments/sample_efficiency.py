r"""E: excess of CLIP and of zero-shot labels against the number of samples n, and what the hierarchy has to do with it.

Encoder pairs are trained on n stored pairs of a hierarchical law for a number of steps that is chosen in advance. The
excess of their scores is then exact, on the enumerated joint P(x, y) with K = 4 candidates, both directions. Nothing
that decides about training sees that joint. Excesses are reported at the end of training, where few samples have been
overfitted, and at the checkpoint with the least loss on validation pairs.

Claimed and checked, per encoder: (1) the excess falls with n at least as n^-a. (2) The exponent is that of two laws
without the hierarchy, within a margin: leaves in a fresh random order for every image and text, tested on that law, and
trees of depth 1 whose leaves are independent given the root, with the same root-leaf information. So what makes the
excess fall is not the hierarchy at this size: that it falls faster with the hierarchy is refuted (a finding), and the
two are no controls of (1). (3) What order of the leaves is worth is seen where n is large enough: after training on
leaves in fresh orders the excess on the hierarchy itself is larger. A fixed order is a symmetry and changes nothing.

Between encoders, at the end of training with n = 256: the transformer has a smaller excess than the MLP; that two
blocks have a smaller one than the first block alone is refuted (a finding).

With four leaves, symbols alone say nearly all that leaves at their places say of the root, since all ranks of a layer
share a permutation and differ in noise only: the exact excess on the hierarchy of the best score of fresh orders is the
`floor`. Whether this holds for larger trees is not decided here: beyond the sizes of preset full the joint cannot be
enumerated, and excesses would be estimates.

Matched at depth 1 is I(root; leaf), averaged over leaves, by p of the star; leaves of a star are independent given the
root, so that I(image; text) is larger than on the hierarchy: stored as `information`.

Controls: image and text of different samples; the fixed order; the one-layer form for the MLP. At smoke only MLPs are
trained.

Source: Oko, Lin, Cai, Mei (arXiv 2501.04641) for the model; the matched star: derivation.
"""

import dataclasses
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from experiments import _sample_sets as sets
from theorykit import results, verify

OKO, DERIVED = "Oko, Lin, Cai, Mei (arXiv 2501.04641)", "derivation"
LOSSES = ("excess", "sufficiency", "zero_shot")
BOTH, FIRST = (1.0, 1.0), (1.0, 0.0)
TREE, FRESH, STAR, UNMATCHED, FIXED = sets.LAWS
CHECKPOINTS = 4  # the last one is the end of training


class Variant(NamedTuple):
    """An encoder pair of every seed: name, the law of its samples, gates of its blocks, at which n."""

    name: str
    law: str
    gates: tuple[float, float]
    samples: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of trees, networks and batches; numbers of samples, powers of two; seeds have kernels of their own."""

    alphabet: int = 4
    depth: int = 2
    arity: int = 2
    noise: float = 0.2
    mlp: tuple[int, ...] = (64, 256, 1024, 4096)
    transformer: tuple[int, ...] = (64, 256, 1024)  # none: not trained
    validation: int = 512
    seeds: int = 10
    width: int = 32
    batch: int = 32
    steps: int = 256
    learning_rate: float = 3e-3
    exponent: float = results.threshold(0.75, "the least exponent claimed, below the 1 of regular models")
    alike: float = results.threshold(0.25, "exponents; a quarter of the 1 of regular models, as is seen")
    order: float = results.threshold(0.03, "nats; less than half of the exact price of a fresh order")
    depth_gain: float = results.threshold(0.05, "nats; a third of the excess at the largest n")

    @property
    def samples(self) -> dict[str, tuple[int, ...]]:
        """Numbers of samples by kind of encoder."""
        return {"mlp": self.mlp} | ({"transformer": self.transformer} if self.transformer else {})


PRESETS = {
    "smoke": Config(transformer=(), width=16),
    "quick": Config(),
    "full": Config(
        alphabet=5,
        mlp=(64, 256, 1024, 4096, 16384),
        transformer=(64, 256, 1024, 4096, 16384),
        seeds=16,
        width=64,
        batch=64,
        steps=2000,
    ),
}


def variants(config, kind) -> tuple[Variant, ...]:
    """All laws at all n; the fixed order at the largest n only; of transformers also the one-layer form."""
    counts = config.samples[kind]
    found = tuple(Variant(law, law, BOTH, counts) for law in sets.LAWS if law != FIXED)
    if kind == "mlp":
        return (*found, Variant(FIXED, FIXED, BOTH, counts[-1:]))
    return (*found, Variant("one layer", TREE, FIRST, counts[1:2]))


def run(config: Config) -> dict[str, np.ndarray]:
    """<loss>/<kind>/<variant>/<when> (seeds, n): excess, sufficiency and zero_shot on the variant's own law.

    when: end, and best, the checkpoint of least validation loss; validation/... that loss. on_tree/<kind>/permuted/...
    the excess on the hierarchy. information/<law>, p (seeds,), root_leaf (seeds, 2), floor (seeds,).
    """
    worlds = [sets.world(config, seed) for seed in range(config.seeds)]
    laws = {law: np.stack([world.joints[law] for world in worlds], dtype=np.float32) for law in sets.LAWS}
    least = {law: np.asarray(sets.least_risks(joints)) for law, joints in laws.items() if law in (TREE, FRESH, STAR)}
    # Neither the order of all leaves nor samples that are not tested change the law's least risk.
    least |= {UNMATCHED: least[TREE], FIXED: least[TREE]}
    found = {
        "p": np.array([world.star_noise for world in worlds]),
        "root_leaf": np.array([world.root_leaf for world in worlds]),
        "floor": np.asarray(sets.floors(laws[TREE], laws[FRESH], least[TREE])),
    }
    for law in (TREE, FRESH, STAR):
        found[f"information/{law}"] = np.array([sets.information(world.joints[law]) for world in worlds])
    for kind in tqdm(config.samples, desc="sample_efficiency", disable=None):
        found |= results.part(kind, partial(_ensemble, config, kind, worlds, laws, least))
    return found


def _ensemble(config, kind, worlds, laws, least):
    of_kind = variants(config, kind)
    members = [(v, n, world) for v in of_kind for n in v.samples for world in worlds]
    parts = [np.stack([world.samples[v.law][side] for v, _, world in members]) for side in (0, 1)]
    gates = np.array([v.gates for v, _, _ in members], np.float32)
    learnt = sets.train(
        kind,
        config,
        jnp.stack([world.key for _, _, world in members]),
        tuple(part[:, config.validation :] for part in parts),
        np.array([n for _, n, _ in members], np.int32),
        gates,
        steps=[config.steps * c // CHECKPOINTS for c in range(1, CHECKPOINTS + 1)],
    )
    held = tuple(part[:, : config.validation] for part in parts)
    validation = np.stack(
        [
            sets.validation(*sets.embed(kind, config, jax.tree.map(lambda a, c=c: a[c], learnt), held, gates))
            for c in range(CHECKPOINTS)
        ]
    )
    rows, found, seeds = np.arange(len(members)), {}, len(worlds)
    tested, best = (np.concatenate([a[v.law] for v in of_kind for _ in v.samples]) for a in (laws, least))
    fresh = [i for i, (v, _, _) in enumerate(members) if v.name == FRESH]
    for when, at in (("end", np.full(len(members), CHECKPOINTS - 1)), ("best", np.argmin(validation, axis=0))):
        params = jax.tree.map(lambda a, at=at: a[at, rows], learnt)
        table = np.asarray(sets.score_table(kind, config, params, gates))
        losses = np.asarray(sets.exactly(tested, table, config.alphabet, best))
        columns = dict(zip(LOSSES, losses.T, strict=True)) | {"validation": validation[at, rows]}
        found |= _by_variant(columns, kind, when, of_kind, seeds)
        repeats = len(fresh) // seeds
        on_tree = sets.exactly(
            np.tile(laws[TREE], (repeats, 1, 1)), table[fresh], config.alphabet, np.tile(least[TREE], repeats)
        )
        found[f"on_tree/{kind}/{FRESH}/{when}"] = np.asarray(on_tree)[:, 0].reshape(-1, seeds).T
    return found


def _by_variant(columns, kind, when, of_kind, seeds):
    found, begin = {}, 0
    for v in of_kind:
        end = begin + len(v.samples) * seeds
        for name, column in columns.items():
            found[f"{name}/{kind}/{v.name}/{when}"] = column[begin:end].reshape(-1, seeds).T
        begin = end
    return found


# ---------------------------------------------------------------------------------------------------------------------


def verdicts(config: Config, arrays: dict[str, np.ndarray]) -> list[verify.Verdict]:
    """Exponents of both losses, what the hierarchy does to them, what order is worth, and what a second block is."""
    found = []
    for kind in config.samples:
        found += _kind_verdicts(config, arrays, kind)
    return found + _order_verdicts(config, arrays) + (_comparisons(config, arrays) if config.transformer else [])


def _pair(check, name, statement, source, sides, why, broken):
    claim = verify.Claim(f"efficiency.{name}", statement, source)
    control = verify.Claim(f"efficiency.{name}.control", f"{statement}: {why}", source, "control", claim.name)
    return [check(claim, *sides), check(control, *broken)]


def _finding(check, name, statement, source, sides):
    return check(verify.Claim(f"efficiency.{name}", statement, source, "finding"), *sides)


def _kind_verdicts(config, arrays, kind):
    n, found = np.array(config.samples[kind]), []
    at = lambda loss, law: arrays[f"{loss}/{kind}/{law}/end"]  # noqa: E731
    slopes = {
        law: verify.slope_fit(n, at("excess", law), law="power", level=verify.LEVEL).slopes
        for law in (TREE, FRESH, STAR, UNMATCHED)
    }
    span = f"{kind}, n = {n[0]} to {n[-1]}, end of training"
    for loss, task in (("excess", "CLIP"), ("zero_shot", "zero-shot labels")):
        check = partial(verify.rate, predicted=-config.exponent, margin=0.0, side="at_most")
        statement = f"the excess of {task} on the hierarchy falls at least as n^-{config.exponent}, {span}"
        sides = [(n, at(loss, law)) for law in (TREE, UNMATCHED)]
        found += _pair(check, f"{kind}.{loss}", statement, DERIVED, sides[0], "image and text unmatched", sides[1])
    for law, what in ((FRESH, "on leaves in fresh orders"), (STAR, "on stars of the same root-leaf information")):
        check = partial(verify.agreement, predicted=0.0, margin=config.alike)
        sides = [(slopes[TREE] - slopes[other],) for other in (law, UNMATCHED)]
        statement = f"the exponent of the excess is that {what}, {span}"
        name = f"{kind}.alike.{law}"
        found += _pair(check, name, statement, DERIVED, sides[0], "image and text unmatched instead", sides[1])
        check = partial(verify.separation, direction="less", margin=config.alike)
        statement = f"with the hierarchy the excess falls with an exponent larger by {config.alike} than {what}, {span}"
        found.append(_finding(check, f"{kind}.faster.{law}", statement, OKO, (slopes[TREE], slopes[law])))
    return found


def _order_verdicts(config, arrays):
    check = partial(verify.separation, margin=config.order)
    last = arrays[f"excess/mlp/{TREE}/end"][:, -1]
    fresh, fixed = (arrays[f"{name}/end"][:, -1] for name in (f"on_tree/mlp/{FRESH}", f"excess/mlp/{FIXED}"))
    statement = f"trained on leaves in fresh orders the excess on the hierarchy is larger, mlp, n = {config.mlp[-1]}"
    return _pair(check, "mlp.order", statement, DERIVED, (fresh, last), "leaves in a fixed order", (fixed, last))


def _comparisons(config, arrays):
    n = config.samples["transformer"][1]
    transformer, mlp = (
        arrays[f"excess/{kind}/{TREE}/end"][:, config.samples[kind].index(n)] for kind in ("transformer", "mlp")
    )
    one = arrays["excess/transformer/one layer/end"][:, 0]
    check = partial(verify.separation, direction="less", margin=config.depth_gain)
    statement = f"the excess of the transformer is below that of the MLP, n = {n}, end of training"
    found = _pair(
        check, "kinds", statement, OKO, (transformer, mlp), "below that of its one-layer form", (transformer, one)
    )
    statement = f"two blocks have a smaller excess than one, n = {n}, end of training"
    return [*found, _finding(check, "blocks", statement, OKO, (transformer, one))]
