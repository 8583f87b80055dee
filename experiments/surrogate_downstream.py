r"""D1 to D5: downstream losses L2 of a contrastive score against its sufficiency S, exactly.

Each instance is a joint of 9 images and 9 texts with a score, from near ln r to far from it. What is measured of it:
next-token prediction (D1, equal to S^{y|x}), denoising given the text (D2, the integral over noise equal to S^{x|y}),
zero-shot classification (D3, at most S^{y|x} for labels of the text) and retrieval (D4, Excess_N itself). D5 takes the
chain as a whole: an encoder that drops one of two factors, and a re-parametrised pair of encoders.

Three bounds here are sharper than those of the sources; with w the model's density ratio and B >= r, w:

D2.tail    A posterior mean given z errs by at most D times a total variation, so Pinsker's inequality gives
           excess(g) <= (D^2/2) E KL(P(x|z, y) || P_s(x|z, y)). By the chain rule that divergence is S^{x|y} less what z
           alone has revealed, (1/2) int_0^g excess: what is left is (1/2) int_g^inf excess.
D4.growth  Excess_N <= (N - 1)/(K - 1) Excess_K for N >= K >= 2, whatever r and w.
D4.sharp   S <= (1 + (2B - 1)/(K - 1)) Excess_K.

Both are proved at `surrogate.bounds.ceiling_factor`, which also says where the multiple of B is attained.

Source: Oko, Lin, Cai, Mei (arXiv 2501.04641) for the tasks, Verdu (2010) for D2; the rest is derived here.
"""

import dataclasses
import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from experiments import _downstream as problems
from experiments._side_by_side import side_by_side
from theorykit import results, surrogate, verify
from theorykit.surrogate import bounds, denoisers, downstream, information_loss
from theorykit.surrogate import joint as joints

TASKS = "Oko, Lin, Cai, Mei (arXiv 2501.04641)"
SOURCES = {"D1": TASKS, "D2": "Verdu (IEEE Trans. Inf. Theory 56, 2010)", "D3": TASKS, "D4": TASKS, "D5": TASKS}
COUNTS = (2, 3, 8, 64, 1000)  # candidates, of L1 and of retrieval
LISTED = 3  # candidates of the lists that are enumerated, 9^3 of them for each image
POINTS = (-1.0, 0.2, 1.0)
DIMENSION = 4
BLOCK = 50  # instances measured at once: 50 x 9 x 9^3 lists of candidates are 8 MiB


@dataclasses.dataclass(frozen=True)
class Config:
    """Numbers of instances; their sizes are in `_downstream`."""

    instances: int = 1500
    denoised: int = 150
    factored: int = 1000
    exact: float = results.threshold(1e-10, "required of identities in float64; roundings of small S reach 1e-12")
    quadrature: float = results.threshold(1e-10, "required of identities; the quadrature is exact to 5e-13")
    rounding: float = results.threshold(1e-14, "nats; roundings of differences of risks, and of bounds that are equal")
    lost: float = results.threshold(0.01, "nats; far above rounding, far below the mean information of a factor")


PRESETS = {
    "smoke": Config(instances=200, denoised=4, factored=20),
    "quick": Config(),
    "full": Config(instances=20000, denoised=240, factored=10000),
}


def run(config: Config) -> dict[str, np.ndarray]:
    """Losses and sufficiencies by name, instances first; D2, D5 with prefix."""
    with jax.enable_x64(True):
        measures = {"D2": _denoising, "all": _all, "D5": _factors}
        parts = side_by_side(results.part, [(name, partial(measure, config)) for name, measure in measures.items()])
    return {"kind": problems.kinds(config.instances)} | {
        name: values for part in parts for name, values in part.items()
    }


def _map(function, arguments):
    arguments = jax.tree.map(jnp.asarray, arguments)
    count = len(jax.tree.leaves(arguments)[0])
    found = jax.jit(lambda a: jax.lax.map(lambda one: function(*one), a, batch_size=min(BLOCK, count)))(arguments)
    return {name: np.asarray(values) for name, values in found.items()}


def _all(config):
    """The instances, and after them the pairs of encoders of D5, so that one program measures both."""
    drawn = problems.draw(config.instances)
    f, g, change, inverse = problems.embeddings(config.factored, DIMENSION)
    changed, back = f @ change, g @ inverse.swapaxes(1, 2)
    pairs = {"given": (f, g), "changed": (changed, back), "one side": (changed, g)}
    scores = [left @ right.swapaxes(1, 2) for left, right in pairs.values()]
    cycled = np.arange(config.factored) % config.instances
    repeated = problems.Instance(*(field[np.tile(cycled, len(pairs))] for field in drawn))
    repeated = repeated._replace(score=np.concatenate(scores))
    together = problems.Instance(*(np.concatenate(fields) for fields in zip(drawn, repeated, strict=True)))
    found = _map(_measure, tuple(together))
    arrays = {name: values[: config.instances] for name, values in found.items()}
    for index, pair in enumerate(pairs):
        start = config.instances + index * config.factored
        part = slice(start, start + config.factored)
        losses = [found[name][part].reshape(config.factored, -1) for name in CHAIN]
        arrays[f"D5/pair/{pair}"] = np.concatenate(losses, axis=1)
    return arrays


CHAIN = ("risk", "S", "S reverse", "tokens", "labels", "misses", "denoising")


def _measure(joint, score, label_text, label_image):
    forward, reverse = (joint, score), (joint.T, score.T)
    ratio, model = joints.density_ratio(joint), information_loss.model_ratio(joint, score)
    # A decoder that does not see the image: the mixture of its predictions over all images.
    blind = jnp.broadcast_to(jnp.log(jnp.sum(joint, axis=1) @ model)[None, :], joint.shape)
    labels = jax.vmap(lambda text, image: downstream.zero_shot(text, joint, score, label_image=image))(
        label_text, label_image
    )
    counts = jnp.asarray(COUNTS, joint.dtype)
    both = (jnp.stack(direction) for direction in zip(forward, reverse, strict=True))
    retrieved = jax.vmap(lambda p, s: jax.vmap(lambda n: downstream.retrieval(p, s, n))(counts))(*both)
    positions = jnp.linspace(-1, 1, joint.shape[0])
    q, uniform = jnp.sum(joint, axis=0), jnp.full(joint.shape[1], 1 / joint.shape[1])
    return {
        "S": surrogate.sufficiency(*forward),
        "S reverse": surrogate.sufficiency(*reverse),
        "tokens": downstream.next_token(joint, score, problems.TOKENS).excess,
        "tokens blind": downstream.next_token(joint, blind, problems.TOKENS).excess,
        "labels": labels.log_loss.excess,
        "risk": retrieved.log_loss.risk[0],
        "excess": retrieved.log_loss.excess[0],
        "misses": retrieved.error.excess,
        "lists": problems.excess_over_lists(joint, score, q, LISTED),
        "lists uniform": problems.excess_over_lists(joint, score, uniform, LISTED),
        "largest ratio": jnp.max(ratio),
        "largest model": jnp.max(model),
        "least model": jnp.min(model),
        "denoising": denoisers.denoising(joint, score, positions, 4.0).excess,
    }


def _denoising(config):
    joint, score = problems.denoised(config.denoised)
    points = jnp.asarray(POINTS)
    # Ratios of signal to noise, from where nothing is seen to where the closest points are told apart.
    ratios = np.exp(np.arange(np.log(1e-4), np.log(8 * 36 / np.min(np.diff(POINTS)) ** 2), STEP))

    def measure(joint, score):
        profile = jax.lax.map(lambda g: denoisers.denoising(joint, score, points, g).excess, jnp.asarray(ratios))
        return {
            "integral": denoisers.integrated_denoising(joint, score, points),
            "profile": profile,
            "S": surrogate.sufficiency(joint, score),
            "S reverse": surrogate.sufficiency(joint.T, score.T),
        }

    drawn = tuple(jnp.asarray(array) for array in (joint, score))
    found = jax.jit(lambda drawn: jax.lax.map(lambda one: measure(*one), drawn))(drawn)
    found |= {"ratios": ratios}
    return {f"D2/{name}": np.asarray(values) for name, values in found.items()}


STEP = 0.1  # of ln g, that of `integrated_denoising`
# Up to g d^2 / 8 = 0.64, with d the least distance of points, the excess changes little from one g to the next, so that
# integrals from a g of the grid on are exact to a fraction of the step's square.
SHOWN = 8.0


def _factors(config):
    """What an encoder of x = (a, b) that keeps only a loses, and one that renames x, with their best heads."""
    dropped = jnp.arange(problems.SIZE) // problems.SYMBOLS
    renamed = jnp.asarray(np.random.default_rng(5).permutation(problems.SIZE))
    token = jnp.asarray(np.kron(np.ones((1, problems.SYMBOLS)), np.eye(problems.SYMBOLS)))  # P(c|y): c = b'

    def measure(joint):
        score = jnp.log(information_loss.encoder_ratio(joint, dropped))
        inner = jnp.sum(joint.reshape(3, 3, 3, 3), axis=(0, 2))
        return {
            "S": surrogate.sufficiency(joint, score),
            "encoder": surrogate.encoder_sufficiency(joint, dropped),
            "renamed": surrogate.encoder_sufficiency(joint, renamed),
            "tokens": downstream.next_token(joint, score, problems.TOKENS).excess,
            "labels": downstream.zero_shot(token * jnp.sum(joint, axis=0)[None, :], joint, score).log_loss.excess,
            "information": joints.mutual_information(inner),
        }

    both = [problems.factors(config.factored, independent=independent) for independent in (True, False)]
    found = _map(measure, (np.concatenate(both),))
    halves = (("independent", slice(config.factored)), ("dependent", slice(config.factored, None)))
    return {f"D5/{which}/{name}": values[half] for which, half in halves for name, values in found.items()}


def verdicts(config: Config, arrays: dict[str, np.ndarray]) -> list[verify.Verdict]:
    """Identities and bounds of D1 to D5, each with its controls."""
    found = []

    def check(name, rtol, statement, sides, controls):
        """An identity, or for rtol None a bound, of two sides; and of those of its controls, name: (why, sides)."""
        claim = verify.Claim(name, statement, SOURCES[name[:2]])
        checks = {claim: sides} | {
            verify.Claim(f"{name}.{key}", f"{statement}: {why}", claim.source, "control", name): broken
            for key, (why, broken) in controls.items()
        }
        for checked, (left, right) in checks.items():
            if rtol is None:
                found.append(verify.bound(checked, np.ravel(left), np.ravel(right), margin=config.rounding))
            else:
                found.append(verify.identity(checked, *_alike(left, right), rtol=rtol))

    s, reverse, excess = arrays["S"], arrays["S reverse"], arrays["excess"]
    tokens = np.sum(arrays["tokens"], axis=1)
    check(
        "D1.tokens",
        config.exact,
        "the excess losses of all next tokens sum to S^{y|x}",
        (tokens, s),
        {
            "reverse": ("S^{x|y} instead", (tokens, reverse)),
            "blind": ("the decoder does not see the image", (np.sum(arrays["tokens blind"], axis=1), s)),
        },
    )
    integral = arrays["D2/integral"]
    check(
        "D2.integral",
        config.quadrature,
        "the excess of denoising, integrated over the signal-to-noise ratio and halved, is S^{x|y}",
        (integral, arrays["D2/S reverse"]),
        {"forward": ("S^{y|x} instead", (integral, arrays["D2/S"]))},
    )
    profile, half_square = arrays["D2/profile"], (POINTS[-1] - POINTS[0]) ** 2 / 2
    limits = [half_square * np.broadcast_to(arrays[f"D2/{key}"][:, None], profile.shape) for key in ("S reverse", "S")]
    check(
        "D2.level",
        None,
        "at one noise level the excess of denoising is at most (D^2/2) S^{x|y}",
        (profile, limits[0]),
        {"forward": ("S^{y|x} instead", (profile, limits[1]))},
    )
    above, below, shown = revealed(arrays)
    check(
        "D2.tail",
        None,
        "at one noise level the excess of denoising is at most D^2/4 times its integral over all lower levels",
        (profile[:, shown], (half_square * above)[:, shown]),
        {"below": ("all higher levels", (profile[:, shown], (half_square * below)[:, shown]))},
    )
    rooted = arrays["kind"] == problems.KINDS.index("hierarchy")
    check(
        "D3.labels",
        None,
        "the excess log-loss of zero-shot labels is at most S^{y|x}",
        (arrays["labels"][:, 0], s),
        {"root": ("the label is the root that image and text share", (arrays["labels"][rooted, 1], s[rooted]))},
    )
    listed = COUNTS.index(LISTED)
    size = arrays["risk"][:, listed]  # the excess is a difference of such risks, exact to their rounding
    check(
        "D4.retrieval",
        config.exact,
        "the excess log-loss of retrieval among N, over all lists of candidates, is Excess_N",
        (1 + arrays["lists"] / size, 1 + excess[:, listed] / size),
        {
            "uniform": (
                "candidates are not drawn from q",
                (1 + arrays["lists uniform"] / size, 1 + excess[:, listed] / size),
            )
        },
    )
    check(
        "D4.surrogate",
        None,
        "retrieval among N has an excess log-loss of at most S^{y|x}, for every N",
        (excess, np.broadcast_to(s[:, None], excess.shape)),
        {"reverse": ("S^{x|y} instead", (excess, np.broadcast_to(reverse[:, None], excess.shape)))},
    )
    fewer, more = pairs_of_counts()
    check(
        "D4.fewer",
        None,
        "retrieval among N <= K has an excess of at most Excess_K",
        (excess[:, fewer[0]], excess[:, fewer[1]]),
        {"more": ("N > K", (excess[:, more[0]], excess[:, more[1]]))},
    )
    counts = np.array(COUNTS, float)
    k = counts[more[1]]
    factor = loose_factor(arrays)[:, more[1]]
    check(
        "D4.more",
        None,
        "retrieval among N > K has an excess of at most the factor of T4 times Excess_K",
        (excess[:, more[0]], factor * excess[:, more[1]]),
        {"unbounded": ("a factor 1 + 1/K, free of r and w", (excess[:, more[0]], (1 + 1 / k) * excess[:, more[1]]))},
    )
    grown = excess / (counts - 1)
    check(
        "D4.growth",
        None,
        "retrieval among N > K has an excess of at most (N - 1)/(K - 1) Excess_K",
        (grown[:, more[0]], grown[:, more[1]]),
        {"fewer": ("N < K", (grown[:, more[1]], grown[:, more[0]]))},
    )
    sharp = {which: sharp_factor(arrays, which) * excess for which in ("both", "ratio", "half")}
    lost = np.broadcast_to(s[:, None], excess.shape)
    check(
        "D4.sharp",
        None,
        "S <= (1 + (2B - 1)/(K - 1)) Excess_K with B the largest of r and w",
        (lost, sharp["both"]),
        {
            "model": ("B the largest of r, and w unbounded", (lost, sharp["ratio"])),
            "half": ("B in place of 2B", (lost, sharp["half"])),
        },
    )
    root = np.sqrt(2 * np.maximum(excess, 0))
    check(
        "D4.first",
        None,
        "the excess error of the first of N candidates is at most sqrt(2 Excess_N)",
        (arrays["misses"][:, 0], root),
        {"images": ("texts retrieve images", (arrays["misses"][:, 1], root))},
    )
    found.extend(_whole_chain(config, arrays, check))
    return found


def _whole_chain(config, arrays, check):
    def gaps(which):
        lost = arrays[f"D5/{which}/information"]
        losses = [arrays[f"D5/{which}/{name}"] for name in ("S", "encoder", "labels")]
        losses.append(arrays[f"D5/{which}/tokens"][:, 1])
        return np.stack(losses), np.stack([lost] * len(losses))

    check(
        "D5.dropped",
        config.exact,
        "an encoder that drops one of two independent factors loses its information, in S, next tokens and labels",
        gaps("independent"),
        {"dependent": ("the factors depend on each other", gaps("dependent"))},
    )
    # In units of the largest loss of an instance: the excess error of a first hit may be nothing but rounding.
    pairs = {which: arrays[f"D5/pair/{which}"] for which in ("given", "changed", "one side")}
    pairs = {which: losses / np.max(pairs["given"], axis=1)[:, None] for which, losses in pairs.items()}
    check(
        "D5.pair",
        config.exact,
        "a pair of encoders (P f, P^-T g) has the L1, S and L2 of (f, g)",
        (1 + pairs["changed"], 1 + pairs["given"]),
        {"one": ("only one encoder is changed", (1 + pairs["one side"], 1 + pairs["given"]))},
    )
    statement = "an encoder that drops a factor has S > 0"
    claim = verify.Claim("D5.lost", statement, SOURCES["D5"])
    control = verify.Claim("D5.lost.renamed", f"{statement}: it renames x instead", SOURCES["D5"], "control", "D5.lost")
    return [
        verify.separation(which, values, np.zeros(values.size), margin=config.lost)
        for which, values in (
            (claim, arrays["D5/independent/encoder"]),
            (control, arrays["D5/independent/renamed"]),
        )
    ]


def _alike(left, right):
    """Both sides in units of the larger one, so that small losses count like large ones."""
    size = np.maximum(np.abs(left), np.abs(right))
    size = np.where(size > 0, size, 1.0)
    return left / size, right / size


def pairs_of_counts() -> tuple[np.ndarray, np.ndarray]:
    """Places (2, pairs) in COUNTS of N and K: those with N < K, and those with N > K."""
    pairs = np.array(list(itertools.combinations(range(len(COUNTS)), 2))).T
    return pairs, pairs[::-1]


def loose_factor(arrays: dict[str, np.ndarray]) -> np.ndarray:
    """`bounds.floor_factor`, (instances, counts), with w >= 1/B'."""
    largest = np.maximum(arrays["largest ratio"], arrays["largest model"])
    return _by_count(bounds.floor_factor, largest, 1 / arrays["least model"])


def sharp_factor(arrays: dict[str, np.ndarray], which: str = "both") -> np.ndarray:
    """`bounds.ceiling_factor`, (instances, counts); with B of r alone ("ratio"), or B in place of 2B ("half")."""
    largest = arrays["largest ratio"]
    if which != "ratio":
        largest = np.maximum(largest, arrays["largest model"])
    return _by_count(bounds.ceiling_factor, largest / 2 if which == "half" else largest)


def _by_count(factor, *limits):
    """A factor of `bounds` for limits (instances,) at every number of candidates, (instances, counts)."""
    with jax.enable_x64(True):
        limits = (jnp.asarray(limit)[:, None] for limit in limits)
        return np.asarray(jnp.vectorize(factor)(*limits, jnp.asarray(COUNTS)))


def revealed(arrays: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(1/2) int excess dg above each ratio and below it, (instances, ratios), and the ratios where to compare."""
    ratios, profile = arrays["D2/ratios"], arrays["D2/profile"]
    terms = STEP * ratios * profile / 2
    above = np.cumsum(terms[:, ::-1], axis=1)[:, ::-1] - terms / 2  # trapezoids
    below = arrays["D2/S reverse"][:, None] - above
    return above, below, ratios <= SHOWN
