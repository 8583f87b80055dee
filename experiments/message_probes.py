r"""F: which block of a CLIP-trained transformer holds which level of the messages of message passing.

The state of a leaf after each block is compared with the beliefs of its ancestors: the law of its parent given the
leaves below it, and the law of the root given all leaves of the tree. Leaves are enumerated, and every number is an
average over their exact law; only networks and kernels are drawn. Two measures of a state h and a belief b:

    decoded  R^2 of a linear read-out of ln b from h, fitted by ridge on half of the leaves and tested on the other
             half, both ways: is the message there?
    share    of the variance of h at a leaf's place, that linear functions of b and ln b explain: is there little else?

The belief of a parent depends on its own leaves only. For the parents, read-outs are therefore fitted and tested on
different configurations of these, and random labels are beliefs of other configurations of these; for the root it is
the configurations of all leaves.

Found at this size (four leaves, two levels, two blocks): read-outs do not tell CLIP training from no training. Random
blocks of width 32 mix four leaves well enough that the root is decoded after the first. "Block 1 holds the parents,
block 2 the root" does not hold of CLIP alone (a control), nor does CLIP training add to what the last block tells of
the root (a finding). It holds for networks that are supervised by the messages (guided): more of the parents is decoded
after block 1 than in an untrained network, and more of the root after the second block than after the first. What CLIP
training does is visible in the shares: of the states after block 1 the parents' beliefs leave a smaller share
unexplained than in an untrained network. A part of that is no matter of beliefs, since the share that random functions
of the parent's leaves leave becomes smaller too; the claim is that it does so less. Of the embedding the root's belief
leaves a smaller share.

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
LEVELS = ("root", "parent")
MEASURES = ("decoded", "share", "embedding")
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
    "smoke": Config(seeds=6, steps=250, permutations=8),
    "quick": Config(),
    # Two symbols: with three levels more of them have too many configurations to be listed.
    "full": Config(seeds=16, steps=4000, size=clip.Size(alphabet=2, depth=3, blocks=3, width=64)),
}


def run(config: Config) -> dict[str, np.ndarray]:
    """decoded/<network>/beliefs, share/<network>/beliefs (seeds, modalities, blocks + 1, levels from the root).

    embedding/<network>/beliefs (seeds, modalities): share of the output that the root explains. With random labels
    <measure>/<network>/permuted (seeds, modalities): of the root after the last block, of the parents after block 1,
    (seeds, modalities, permutations), and of the output.
    """
    return results.part("probes", lambda: _probes(config))


def _probes(config):
    size, seeds = config.size, jax.random.split(jax.random.key(80), config.seeds)
    # Networks with guidance and without are paired: the same kernels, starts and batches.
    for_kernels, keys = (jnp.tile(jax.vmap(partial(jax.random.fold_in, data=i))(seeds), 2) for i in range(2))
    hs = clip.hierarchies(size, for_kernels, jnp.full(2 * config.seeds, config.noise))
    guidance = jnp.repeat(jnp.array([0.0, 1.0]), config.seeds)
    kept = checkpoints("training", len(keys) * config.steps)
    run = clip.train_clip(size, hs, keys, head=HEAD, steps=config.steps, guidance=guidance, progress=False, **kept)
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
    """ln of the beliefs of the ancestors of every leaf, root and parent, (n, T, S) each."""
    levels = hierarchy.beliefs(kernels, leaves)
    picked = (levels[0], levels[-1])
    return [np.repeat(np.asarray(b, np.float64), size.leaves // b.shape[1], axis=1) for b in picked]


def _measured(size, params, modality, leaves):
    """States (members, blocks + 1, n, T, width) and embeddings (members, n, 1, features)."""
    # One name for both modalities: what is compiled for one serves the other.
    one = {"image": params[modality]}
    states = np.asarray(clip.states(size, HEAD, one, "image", leaves), np.float64)
    return states, np.asarray(clip.embed(size, HEAD, one, "image", leaves), np.float64)[:, :, None]


def _one(config, stream, output, law, levels, seed):
    """All measures of one network and modality, see `run`."""
    rng, size, n = np.random.default_rng(seed), config.size, len(law)
    siblings = _siblings(size)
    # What is held out for the parents are leaves of a parent, since nothing else decides about its belief.
    halves = [rng.permutation(count)[which] < count // 2 for count, which in ((n, np.arange(n)[:, None]), siblings)]
    halves = [np.broadcast_to(half, siblings[1].shape) for half in halves]
    random = []
    for _ in range(config.permutations):
        root, parent = levels[0][rng.permutation(n)], _permuted(rng, levels[1], *siblings)
        decoded = _decoded(stream[-1], root, law, halves[0], config.ridge)
        random.append((decoded, _share(stream[1], parent, law), _share(output, root[:, :1], law)))
    random = dict(zip(MEASURES, np.transpose(random), strict=True))
    # Random labels of parents are also compared with each other.
    found = {f"{name}/permuted": v if name == "share" else np.mean(v) for name, v in random.items()}
    found["decoded/beliefs"] = np.array(
        [[_decoded(h, b, law, half, config.ridge) for b, half in zip(levels, halves, strict=True)] for h in stream]
    )
    found["share/beliefs"] = np.array([[_share(h, b, law) for b in levels] for h in stream])
    return found | {"embedding/beliefs": _share(output, levels[0][:, :1], law)}


def _siblings(size):
    """Number of configurations of the leaves of a parent, and which of them each leaf belongs to, (n, T)."""
    leaves = np.asarray(hierarchy.all_leaves(size.alphabet, size.leaves))
    digits = leaves.reshape(len(leaves), -1, size.arity) @ size.alphabet ** np.arange(size.arity)
    return size.alphabet**size.arity, np.repeat(digits, size.arity, axis=1)


def _permuted(rng, logs, count, siblings):
    """Beliefs (n, T, S) of parents, of other leaves of theirs."""
    to, found = rng.permutation(count), np.empty_like(logs)
    for place in range(logs.shape[1]):
        _, first = np.unique(siblings[:, place], return_index=True)  # a row for each configuration
        found[:, place] = logs[first[to[siblings[:, place]]], place]
    return found


def _decoded(states, logs, law, half, ridge):
    """R^2 of ridge read-outs, one for all places, of ln b less its mean, on the half that did not fit them.

    half : (n, T), whether a leaf in a configuration fits.
    """
    targets, missed, spread = logs - logs.mean(axis=-1, keepdims=True), 0.0, 0.0
    weights = np.broadcast_to(law[:, None], half.shape)
    for fitted in (half, ~half):
        x, y, w = states[fitted], targets[fitted], weights[fitted]
        centre, mean = w @ x / w.sum(), w @ y / w.sum()
        x, y = x - centre, y - mean
        gram = (x * w[:, None]).T @ x / w.sum()
        penalty = ridge * np.trace(gram) / len(gram) * np.eye(len(gram))
        read_out = np.linalg.solve(gram + penalty, (x * w[:, None]).T @ y / w.sum())
        x, y, w = states[~fitted], targets[~fitted], weights[~fitted]
        missed += np.sum(w[:, None] * (y - mean - (x - centre) @ read_out) ** 2)
        spread += np.sum(w[:, None] * (y - mean) ** 2)
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
    root, parent = range(len(LEVELS))
    last = config.size.blocks
    at = lambda what, network, block, level: arrays[f"{what}/{network}/beliefs"][:, :, block, level].mean(axis=1)  # noqa: E731
    decoded = partial(at, "decoded")

    check = partial(verify.separation, margin=config.decoded)
    zero = np.zeros(config.seeds)
    random = arrays["decoded/CLIP/permuted"].mean(axis=1)
    statement = (
        "CLIP: the belief of the root is decoded from the states after the last block, on leaves the read-out has not "
        "seen"
    )
    sides = [(value, zero) for value in (decoded("CLIP", last, root), random)]
    found = _pair(check, "decoded", statement, PROBES, sides[0], ("random labels", sides[1]))

    left = lambda network, block, level: np.log1p(-decoded(network, block, level))  # noqa: E731
    check = partial(verify.separation, margin=config.parents, direction="less")
    statement = (
        "guided: of the parents' beliefs less than three fifths as much is not decoded after block 1 as in an "
        "untrained network, on leaves the read-out has not seen"
    )
    sides = [(left(name, 1, parent), left("untrained", 1, parent)) for name in ("guided", "CLIP")]
    found += _pair(check, "parents", statement, MEI, sides[0], ("CLIP alone", sides[1]))

    check = partial(verify.separation, margin=config.kept, direction="less")
    less = "less than two fifths as much is not decoded"
    statement = f"guided: of the root's belief {less} after the last block as after block 1"
    sides = [(left(name, last, root), left(name, 1, root)) for name in NETWORKS]
    controls = ("CLIP alone", sides[0]), ("untrained", sides[2])
    found += _pair(check, "root", statement, MEI, sides[1], *controls)

    statement = f"CLIP alone: of the root's belief {less} after the last block as in an untrained network"
    trained = left("CLIP", last, root), left("untrained", last, root)
    found.append(check(verify.Claim("probes.learned", statement, MEI, "finding"), *trained))

    def lowered(shares):
        """By how much training lowers ln of what is not explained, given the shares by network."""
        clip_trained, untrained = (np.log1p(-shares(name)) for name in ("CLIP", "untrained"))
        return untrained - clip_trained

    by_beliefs = lowered(lambda name: at("share", name, 1, parent))
    first, second = (
        lowered(lambda name, h=h: arrays[f"share/{name}/permuted"][..., h::2].mean(axis=(1, 2))) for h in range(2)
    )
    check = partial(verify.separation, margin=config.share)
    smaller = "a smaller share of the variance is unexplained after CLIP training than in an untrained network"
    statement = f"by the parents' beliefs {smaller}, of the states after block 1, beyond what random labels show"
    sides = (by_beliefs, (first + second) / 2), (first, second)
    found += _pair(check, "share", statement, DERIVED, sides[0], ("other random labels in place of beliefs", sides[1]))

    sides = [
        (lowered(lambda name, labels=labels: arrays[f"embedding/{name}/{labels}"].mean(axis=1)), zero)
        for labels in ("beliefs", "permuted")
    ]
    statement = f"by the root's belief {smaller}, of the embedding"
    return found + _pair(check, "embedding", statement, DERIVED, sides[0], ("random labels", sides[1]))


def _pair(check, name, *rest):
    return pair(check, f"probes.{name}", *rest)
