r"""F: which block of a CLIP-trained transformer holds which level of the messages of message passing.

The state of a leaf after each block is compared with the beliefs of its ancestors: the law of its parent given the
leaves below it, and the law of the root given all leaves of the tree. Leaves are enumerated, and every number is an
average over their exact law; only networks and kernels are drawn. Two measures of a state h and a belief b:

    decoded  R^2 of a linear read-out of ln b from h, fitted by ridge on half of the configurations of leaves and tested
             on the other half, both ways: is the message there?
    share    of the variance of h at a leaf's place, that linear functions of b and ln b explain: is there little else?

Found at this size (four leaves, two levels, two blocks): read-outs do not tell training from no training. Random blocks
of width 32 mix four leaves well enough that both levels are decoded after the first, so "block 1 holds the parents,
block 2 the root" is refuted as a statement on CLIP, and on what CLIP adds (findings). It holds for networks that are
supervised by the messages (guided), where the root is decoded better after the second block than after the first. What
CLIP training does is visible in the shares: it takes out of the states what is no message, so that the beliefs of the
parents explain more of the states after block 1, and those of the root more of the embedding, than in an untrained
network.

Controls: networks that are not supervised by messages, untrained networks, and random labels: beliefs of other
configurations, permuted once for each seed.

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
    seeds: int = 8
    steps: int = 320
    size: clip.Size = dataclasses.field(default_factory=clip.Size)
    permutations: int = 4  # of random labels
    ridge: float = 1e-4  # of the mean square of a state's entries: enough to make the read-out unique
    decoded: float = results.threshold(0.5, "of R^2, which is 1 for the messages and 0 for a constant")
    kept: float = results.threshold(math.log(2.5), "less than two fifths of what is not decoded is left")
    share: float = results.threshold(0.2, "a fifth or more of what beliefs do not explain is gone")


PRESETS = {
    "smoke": Config(seeds=6, steps=250),
    "quick": Config(),
    # Two symbols: with three levels more of them have too many configurations to be listed.
    "full": Config(seeds=16, steps=4000, size=clip.Size(alphabet=2, depth=3, blocks=3, width=64)),
}


def run(config: Config) -> dict[str, np.ndarray]:
    """decoded/<network>/beliefs, share/<network>/beliefs (seeds, modalities, blocks + 1, levels from the root).

    embedding/<network>/beliefs (seeds, modalities): share of the output that the root explains. With random labels
    <measure>/<network>/permuted (seeds, modalities): of the root after the last block, of the parents after block 1,
    and of the output.
    """
    return results.part("probes", lambda: _probes(config))


def _probes(config):
    size, keys = config.size, jnp.tile(jax.random.split(jax.random.key(80), config.seeds), 2)
    hs = clip.hierarchies(size, keys, jnp.full(2 * config.seeds, config.noise))
    guidance = jnp.repeat(jnp.array([0.0, 1.0]), config.seeds)
    run = clip.train_clip(size, hs, keys, head=HEAD, steps=config.steps, guidance=guidance, progress=False)
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
    rng, n = np.random.default_rng(seed), len(law)
    halves = rng.permutation(n)
    decoded, share = (partial(f, law=law) for f in (partial(_decoded, order=halves, ridge=config.ridge), _share))
    random = []
    for rows in rng.permuted([np.arange(n)] * config.permutations, axis=1):
        root, parent = (level[rows] for level in levels)
        random.append((decoded(stream[-1], root), share(stream[1], parent), share(output, root[:, :1])))
    found = {f"{name}/permuted": v for name, v in zip(MEASURES, np.mean(random, axis=0), strict=True)}
    for name, measure in (("decoded", decoded), ("share", share)):
        found[f"{name}/beliefs"] = np.array([[measure(h, b) for b in levels] for h in stream])
    return found | {"embedding/beliefs": share(output, levels[0][:, :1])}


def _decoded(states, logs, *, law, order, ridge):
    """R^2 of ridge read-outs, one for all leaves, of ln b less its mean, on configurations that did not fit them."""
    targets, half, missed, spread = logs - logs.mean(axis=-1, keepdims=True), len(order) // 2, 0.0, 0.0
    for fitted, tested in ((order[:half], order[half:]), (order[half:], order[:half])):
        x, y, w = _flat(states[fitted], targets[fitted], law[fitted])
        centre, mean = w @ x / w.sum(), w @ y / w.sum()
        x, y = x - centre, y - mean
        gram = (x * w[:, None]).T @ x / w.sum()
        penalty = ridge * np.trace(gram) / len(gram) * np.eye(len(gram))
        read_out = np.linalg.solve(gram + penalty, (x * w[:, None]).T @ y / w.sum())
        x, y, w = _flat(states[tested], targets[tested], law[tested])
        missed += np.sum(w[:, None] * (y - mean - (x - centre) @ read_out) ** 2)
        spread += np.sum(w[:, None] * (y - mean) ** 2)
    return 1 - missed / spread


def _flat(states, targets, law):
    """Leaves as rows: all leaves of a configuration have its weight."""
    rows = lambda a: a.reshape(-1, a.shape[-1])  # noqa: E731
    return rows(states), rows(targets), np.repeat(law, states.shape[1])


def _share(states, logs, *, law):
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
    statement = "CLIP: the belief of the root is decoded from the states after the last block, on unseen leaves"
    sides = [(value, zero) for value in (decoded("CLIP", last, root), random)]
    found = _pair(check, "decoded", statement, PROBES, sides[0], ("random labels", sides[1]))

    left = lambda network, block, level: np.log1p(-decoded(network, block, level))  # noqa: E731
    check = partial(verify.separation, margin=config.kept, direction="less")
    statement = (
        "guided: of the parents' beliefs less than two fifths as much is lost after block 1 as in an untrained network"
    )
    sides = [(left(name, 1, parent), left("untrained", 1, parent)) for name in ("guided", "CLIP")]
    found += _pair(check, "parents", statement, MEI, sides[0], ("CLIP alone", sides[1]))
    statement = (
        "guided: of the root's belief less than two fifths as much is lost after the last block as after block 1"
    )
    sides = [(left(name, last, root), left(name, 1, root)) for name in NETWORKS]
    controls = ("CLIP alone", sides[0]), ("untrained", sides[2])
    found += _pair(check, "root", statement, MEI, sides[1], *controls)

    finding = partial(verify.Claim, source=MEI, role="finding")
    statement = (
        "CLIP alone: of the root's belief less than two fifths as much is lost after the last block as after block 1"
    )
    found.append(check(finding("probes.levels", statement), *sides[0]))
    statement = (
        "CLIP alone: of the root's belief less than two fifths as much is lost after the last block as untrained"
    )
    trained = left("CLIP", last, root), left("untrained", last, root)
    found.append(check(finding("probes.learned", statement), *trained))

    check = partial(verify.separation, margin=config.share, direction="less")

    def unexplained(measure, labels):
        pick = (slice(None), slice(None), 1, parent) if (measure, labels) == ("share", "beliefs") else ...
        both = (arrays[f"{measure}/{network}/{labels}"][pick].mean(axis=1) for network in ("CLIP", "untrained"))
        return tuple(np.log1p(-value) for value in both)

    of_states, of_output = ([unexplained(m, labels) for labels in ("beliefs", "permuted")] for m in MEASURES[1:])
    statement = "CLIP training takes out of the states after block 1 what the parents' beliefs do not explain"
    found += _pair(check, "share", statement, DERIVED, of_states[0], ("random labels", of_states[1]))
    statement = "CLIP training takes out of the embedding what the root's belief does not explain"
    return found + _pair(check, "embedding", statement, DERIVED, of_output[0], ("random labels", of_output[1]))


def _pair(check, name, statement, source, sides, *broken):
    """A claim, and its controls: what is broken, and the sides then."""
    found = [check(verify.Claim(f"probes.{name}", statement, source), *sides)]
    for i, (why, other) in enumerate(broken):
        label = f"probes.{name}.control{i + 1 if len(broken) > 1 else ''}"
        claim = verify.Claim(label, f"{statement}: {why}", source, "control", f"probes.{name}")
        found.append(check(claim, *other))
    return found
