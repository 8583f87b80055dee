r"""F: which block of a CLIP-trained transformer holds which level of the messages of message passing.

The state of a leaf after each block is compared with the beliefs of its ancestors: the law of its parent given the
leaves below it, and so on up to the law of the root given all leaves of the tree. Leaves are enumerated, and every
number is an average over their exact law; only networks and kernels are drawn. Two measures of a state h and a belief
b:

    decoded  R^2 of a linear read-out of ln b from h, fitted by ridge on half of the leaves and tested on the other
             half, both ways: is the message there?
    share    of the variance of h at a leaf's place, that linear functions of b and ln b explain: is there little else?

The belief of a node depends on the leaves below it only. Its read-outs are therefore fitted and tested on different
configurations of these, and random labels are beliefs of other configurations of these; for the root it is the
configurations of all leaves.

Found at this size (four leaves, two levels, two blocks): read-outs do not tell CLIP training from no training. Random
blocks of width 32 mix four leaves well enough that the root is decoded after the first (a claim). "Block 1 holds the
parents, block 2 the root" does not hold of CLIP alone (a control), nor does CLIP training add to what the last block
tells of the root (a finding). It holds for networks that are supervised by the messages (guided): more of the parents
is decoded after block 1 than in an untrained network, and more of the root after the second block than after the first.
With more levels (preset full, two symbols) the same is asked of each, at the block that is to hold it.

What CLIP training does is visible in the shares: of the states after block 1 the parents' beliefs leave a smaller share
unexplained than in an untrained network. A part of that is no matter of beliefs, since the share that random functions
of the parent's leaves leave becomes smaller too; the claim is that it does so less. With two symbols beliefs and their
logarithms explain all functions of two leaves, and this claim is not made. Of the embedding the root's belief leaves a
smaller share.

Controls: networks that are not supervised by messages, untrained networks, and random labels, drawn for each seed.

Source: Mei (arXiv 2404.18444) for networks that pass messages block by block; Oko, Lin, Cai, Mei (arXiv 2501.04641) for
the guidance; Alain, Bengio (arXiv 1610.01644) for linear probes; the share: derivation.
"""

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from experiments import _hierarchy_clip as clip
from experiments._claims import pair
from experiments._training import checkpoints
from theorykit import results, verify
from theorykit.surrogate import hierarchy

MEI, PROBES = "Mei (arXiv 2404.18444)", "Alain, Bengio (arXiv 1610.01644)"
DERIVED = "derivation"
NETWORKS = ("CLIP", "guided", "untrained")
HEAD = "softmax"


@dataclasses.dataclass(frozen=True)
class Config:
    """Edge noise, seeds (kernels, starts and batches are drawn afresh), steps, and the sizes of networks."""

    noise: float = 0.2
    seeds: int = 10
    steps: int = 320
    size: clip.Size = dataclasses.field(default_factory=clip.Size)
    permutations: int = 4  # of random labels; an even number
    ridge: float = 1e-4  # of the mean square of a state's entries: enough to make the read-out unique
    decoded: float = results.threshold(0.5, "of R^2, halfway from a constant to the messages")
    parents: float = results.threshold(math.log(5 / 3), "less than three fifths is left; set after a first run")
    kept: float = results.threshold(
        math.log(2.5), "less than two fifths of what is not decoded is left; set after a first run"
    )
    share: float = results.threshold(0.2, "the unexplained share is less by a fifth; set after a first run")


PRESETS = {
    # With fewer seeds, random labels are compared with each other more often.
    "smoke": Config(seeds=6, steps=250, permutations=16),
    "quick": Config(),
    # Two symbols: with three levels more of them have too many configurations to be listed.
    "full": Config(seeds=16, steps=4000, size=clip.Size(alphabet=2, depth=3, blocks=3, width=64)),
}


def run(config: Config) -> dict[str, np.ndarray]:
    """decoded/<network>/beliefs, share/<network>/beliefs (seeds, modalities, blocks + 1, levels from the root).

    embedding/<network>/beliefs (seeds, modalities): share of the output that the root explains. With random labels
    decoded/<network>/permuted and embedding/<network>/permuted as with beliefs, share/<network>/permuted (seeds,
    modalities, permutations) of the parents after block 1.
    """
    return results.part("probes", lambda: _probes(config))


def _probes(config):
    size, seeds = config.size, jax.random.split(jax.random.key(80), config.seeds)
    # Networks with guidance and without are paired: the same kernels, starts and batches.
    for_kernels, keys = (jnp.tile(jax.vmap(partial(jax.random.fold_in, data=i))(seeds), 2) for i in range(2))
    hs = clip.hierarchies(size, for_kernels, jnp.full(2 * config.seeds, config.noise))
    guidance = jnp.repeat(jnp.array([0.0, 1.0]), config.seeds)
    kept = checkpoints("training", len(keys) * config.steps)
    run = clip.train_clip(size, hs, keys, head=HEAD, steps=config.steps, guidance=guidance, **kept)
    untrained = clip.start(size, HEAD, keys)
    leaves = hierarchy.all_leaves(size.alphabet, size.leaves)
    joints = np.asarray(jax.jit(jax.vmap(hierarchy.enumerate_joint))(hs), np.float64)
    found = {}
    for side, modality in enumerate(clip.MODALITIES):
        laws = joints.sum(axis=2 - side)
        beliefs = [_beliefs(size, getattr(hs, modality)[seed], leaves) for seed in range(config.seeds)]
        trained = _measured(size, run.params, modality, leaves)
        for name, states, members in (
            ("CLIP", trained, slice(config.seeds)),
            ("guided", trained, slice(config.seeds, None)),
            ("untrained", _measured(size, untrained, modality, leaves), slice(config.seeds)),
        ):
            cells = zip(*(part[members] for part in states), laws[members], beliefs, strict=True)
            for seed, (stream, output, law, levels) in enumerate(cells):
                for what, value in _one(config, stream, output, law, levels, seed).items():
                    found.setdefault(what.replace("/", f"/{name}/"), []).append(value)
    by_seed = lambda v: np.swapaxes(np.reshape(v, (len(clip.MODALITIES), config.seeds, *np.shape(v[0]))), 0, 1)  # noqa: E731
    return {name: by_seed(values) for name, values in found.items()}


def _beliefs(size, kernels, leaves):
    """ln of the beliefs of the ancestors of every leaf, from the root to the parent, (n, T, S) each."""
    levels = hierarchy.beliefs(kernels, leaves)
    return [np.repeat(np.asarray(b, np.float64), size.leaves // b.shape[1], axis=1) for b in levels]


def _measured(size, params, modality, leaves):
    """States (members, blocks + 1, n, T, width) and embeddings (members, n, 1, features)."""
    # One name for both modalities: what is compiled for one serves the other.
    one = {"image": params[modality]}
    states = np.asarray(clip.states(size, HEAD, one, "image", leaves), np.float64)
    return states, np.asarray(clip.embed(size, HEAD, one, "image", leaves), np.float64)[:, :, None]


def _one(config, stream, output, law, levels, seed):
    """All measures of one network and modality, see `run`."""
    rng, size = np.random.default_rng(seed), config.size
    below = [_below(size, level) for level in range(size.depth)]
    halves = [rng.permutation(count)[which] < count // 2 for count, which in below]
    random = [
        np.stack([_permuted(rng, logs, *one) for _ in range(config.permutations)])
        for logs, one in zip(levels, below, strict=True)
    ]
    decoded = np.array(
        [
            [
                _decoded(h, np.concatenate([b[None], labels]), law, half, config.ridge)
                for b, labels, half in zip(levels, random, halves, strict=True)
            ]
            for h in stream
        ]
    )
    return {
        "decoded/beliefs": decoded[..., 0],
        "decoded/permuted": decoded[..., 1:].mean(axis=-1),
        "share/beliefs": np.array([[_share(h, b, law) for b in levels] for h in stream]),
        # Random labels of parents are also compared with each other.
        "share/permuted": np.array([_share(stream[1], labels, law) for labels in random[-1]]),
        "embedding/beliefs": _share(output, levels[0][:, :1], law),
        "embedding/permuted": np.mean([_share(output, labels[:, :1], law) for labels in random[0]]),
    }


def _below(size, level):
    """Number of configurations of the leaves below a node of this level, and which of them is below the ancestor of
    each leaf, (n, T).

    What is held out is a part of these, since nothing else decides about the belief.
    """
    leaves, each = np.asarray(hierarchy.all_leaves(size.alphabet, size.leaves)), size.leaves // size.arity**level
    digits = leaves.reshape(len(leaves), -1, each) @ size.alphabet ** np.arange(each)
    return size.alphabet**each, np.repeat(digits, each, axis=1)


def _permuted(rng, logs, count, below):
    """Beliefs (n, T, S) of nodes given other leaves below them."""
    to, found = rng.permutation(count), np.empty_like(logs)
    for place in range(logs.shape[1]):
        _, first = np.unique(below[:, place], return_index=True)  # a row for each configuration
        found[:, place] = logs[first[to[below[:, place]]], place]
    return found


def _decoded(states, labels, law, half, ridge):
    """R^2 (labels,) of ridge read-outs, one for all places, of ln b less its mean, on the half that did not fit them.

    labels : (labels, n, T, S) ln b of each; half : (n, T), whether a leaf in a configuration fits.
    """
    targets = np.moveaxis(labels - labels.mean(axis=-1, keepdims=True), 0, 2)  # (n, T, labels, S)
    weights, missed, spread = np.broadcast_to(law[:, None], half.shape), 0.0, 0.0
    for fitted in (half, ~half):
        x, y, w = states[fitted], targets[fitted], weights[fitted]
        y = y.reshape(len(x), -1)
        centre, mean = w @ x / w.sum(), w @ y / w.sum()
        x, y = x - centre, y - mean
        gram = (x * w[:, None]).T @ x / w.sum()
        penalty = ridge * np.trace(gram) / len(gram) * np.eye(len(gram))
        read_out = np.linalg.solve(gram + penalty, (x * w[:, None]).T @ y / w.sum())
        x, w = states[~fitted], weights[~fitted]
        y = targets[~fitted].reshape(len(x), -1) - mean
        sums = lambda values, w=w: (w @ values**2).reshape(len(labels), -1).sum(axis=1)  # noqa: E731
        missed, spread = missed + sums(y - (x - centre) @ read_out), spread + sums(y)
    return 1 - missed / spread


def _share(states, logs, law):
    """Share of the variance of states (n, T, d) at each place that beliefs and their logarithms explain linearly."""
    features, left, total = np.concatenate([np.exp(logs), logs], axis=-1), 0.0, 0.0
    for place in range(states.shape[1]):
        x, b = (part[:, place] - law @ part[:, place] / law.sum() for part in (states, features))
        weight = np.sqrt(law)[:, None]
        fit = np.linalg.lstsq(weight * b, weight * x, rcond=None)[0]
        left, total = left + np.sum((weight * (x - b @ fit)) ** 2), total + np.sum((weight * x) ** 2)
    return 1 - left / total


# ---------------------------------------------------------------------------------------------------------------------


def verdicts(config: Config, arrays: dict[str, np.ndarray]) -> list[verify.Verdict]:
    """What is decoded after which block, with guidance and without, and what beliefs explain of the states."""
    root, parent = 0, config.size.depth - 1
    last = config.size.blocks
    at = lambda what, network, block, level, labels="beliefs": (  # noqa: E731
        arrays[f"{what}/{network}/{labels}"][:, :, block, level].mean(axis=1)
    )
    decoded = partial(at, "decoded")

    check = partial(verify.separation, margin=config.decoded)
    zero, unseen = np.zeros(config.seeds), "on leaves the read-out has not seen"
    found = []
    for name, network, block, where in (
        ("decoded", "CLIP", last, "CLIP: the belief of the root is decoded from the states after the last block"),
        ("random_blocks", "untrained", 1, "untrained: the belief of the root is decoded from the states after block 1"),
    ):
        sides = [(decoded(network, block, root, labels), zero) for labels in ("beliefs", "permuted")]
        found += _pair(check, name, f"{where}, {unseen}", PROBES, sides[0], ("random labels", sides[1]))

    left = lambda *which: np.log1p(-decoded(*which))  # noqa: E731
    check = partial(verify.separation, margin=config.parents, direction="less")
    statement = (
        "guided: of the parents' beliefs less than three fifths as much is not decoded after block 1 as in an "
        f"untrained network, {unseen}"
    )
    sides = [
        (left(name, 1, parent, labels), left("untrained", 1, parent, labels))
        for name, labels in (("guided", "beliefs"), ("CLIP", "beliefs"), ("guided", "permuted"))
    ]
    controls = ("CLIP alone", sides[1]), ("random labels", sides[2])
    found += _pair(check, "parents", statement, MEI, sides[0], *controls)

    check = partial(verify.separation, margin=config.kept, direction="less")
    less = "less than two fifths as much is not decoded"
    for level in range(parent):
        block = holding(config.size, level)
        whose, after = ("root", "the last block") if level == root else (f"level {level}", f"block {block}")
        statement = f"guided: of the beliefs of the {whose} {less} after {after} as after block 1"
        sides = [
            (left(name, block, level, labels), left(name, 1, level, labels))
            for name, labels in (*((name, "beliefs") for name in NETWORKS), ("guided", "permuted"))
        ]
        controls = ("CLIP alone", sides[0]), ("untrained", sides[2]), ("random labels", sides[3])
        found += _pair(check, whose.replace(" ", "_"), statement, MEI, sides[1], *controls)

    statement = f"CLIP alone: of the root's belief {less} after the last block as in an untrained network"
    trained = left("CLIP", last, root), left("untrained", last, root)
    found.append(check(verify.Claim("probes.learned", statement, MEI, "finding"), *trained))

    def lowered(shares):
        """By how much training lowers ln of what is not explained, given the shares by network."""
        clip_trained, untrained = (np.log1p(-shares(name)) for name in ("CLIP", "untrained"))
        return untrained - clip_trained

    check = partial(verify.separation, margin=config.share)
    smaller = "a smaller share of the variance is unexplained after CLIP training than in an untrained network"
    # b and ln b have 2 S - 1 free entries: of fewer configurations they explain every function, as random labels do.
    if config.size.alphabet**config.size.arity > 2 * config.size.alphabet:
        by_beliefs = lowered(lambda name: at("share", name, 1, parent))
        first, second = (
            lowered(lambda name, h=h: arrays[f"share/{name}/permuted"][..., h::2].mean(axis=(1, 2))) for h in range(2)
        )
        statement = f"by the parents' beliefs {smaller}, of the states after block 1, beyond what random labels show"
        sides = (by_beliefs, (first + second) / 2), (first, second)
        why = "other random labels in place of beliefs"
        found += _pair(check, "share", statement, DERIVED, sides[0], (why, sides[1]))

    sides = [
        (lowered(lambda name, labels=labels: arrays[f"embedding/{name}/{labels}"].mean(axis=1)), zero)
        for labels in ("beliefs", "permuted")
    ]
    statement = f"by the root's belief {smaller}, of the embedding"
    return found + _pair(check, "embedding", statement, DERIVED, sides[0], ("random labels", sides[1]))


def holding(size, level) -> int:
    """The block that guidance asks to hold the beliefs of this level, see `_hierarchy_clip`."""
    return next(b for b in range(1, size.blocks + 1) if math.ceil(b * size.depth / size.blocks) == size.depth - level)


def _pair(check, name, *rest):
    return pair(check, f"probes.{name}", *rest)
