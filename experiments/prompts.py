r"""D3 with M prompts: zero-shot classification by M random texts of each class, against all texts of the class.

For a label c of text y (c - y - x Markov) and the model's density ratio w, M prompts estimate

    P_M(c|x) ~ P(c) A_c(x),  A_c(x) = (1/M) sum_m w(x, Y_cm),   E KL(P(c|x) || P_M(c|x)) = a + b/M + O(1/M^2).

The expected excess is exact here for any M. With ln A = int_0^inf (e^-t - e^-tA) dt/t and independent prompts,

    E ln A_c = int [e^-t - phi_c(t/M)^M] dt/t,     E ln sum_c P(c) A_c = int [e^-t - prod_c phi_c(P(c) t/M)^M] dt/t,
    phi_c(t) = E[exp(-t w(x, Y)) | c],

by the trapezoid rule in ln t. Three kinds of score: ln r itself, ln r with noise, and one that is sure of a single
text, drawn at random for each image, among labels that are functions of the text. For the last two half of the joints
have empty cells.

The coefficient has a form that shows its sign. Since P(c) g_c / sum_c P(c) g_c is the model's P_s(c|x),

    b = (1/2) E_x sum_c (P(c|x) - P_s(c|x)^2) v_c / g_c^2.

It is positive for a calibrated score. Where a score is sure of a class because of one of its texts, it is negative:
few prompts, which may miss that text, are then better than many. An average of similarities in place of w tends to
another classifier, P(c) exp E[s|c], with terms of order 1/M of its own.

Source: Oko, Lin, Cai, Mei (arXiv 2501.04641) for the task; the rest is derived here.
"""

import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import xlogy

from theorykit import results, verify
from theorykit.surrogate import downstream, information_loss

SOURCE = "Oko, Lin, Cai, Mei (arXiv 2501.04641); coefficient: derivation"
NX, NC, NY = 5, 3, 6
SCORES = ("optimal", "noisy", "sure")
EMPTY, IN_PLACE = 0.3, 0.05  # share of empty cells in half of the joints, and the ratio that a finite score has there
NOISE, SURE = 0.7, 4.0  # nats: deviation from ln r, and what the favourite text of an image gains
PROMPTS = 4 ** np.arange(9)
ASYMPTOTIC = PROMPTS >= 1024  # where terms of order 1/M^2 are below 1% or so of those of order 1/M
SAMPLED = {"exponentials": (4,), "similarities": (4, 256)}
LISTED = 2


@dataclasses.dataclass(frozen=True)
class Config:
    """Joints of each kind of score, and sampled sets of prompts for each of them."""

    joints: int = 334  # 1002 in all
    samples: int = 2000
    exact: float = results.threshold(1e-10, "required of identities in float64; roundings amount to about 1e-14")
    sampled: float = results.threshold(
        0.005, "nats; the two averages are 0.02 apart, standard errors of means are below 0.001"
    )
    rate: float = results.threshold(0.05, "terms of order 1/M^2 tilt the slope by a few 1/M, at most 1/1024 each")
    coefficient: float = results.threshold(1e-3, "extrapolation leaves terms of order 1/M^2, 1e-8 times their size")


PRESETS = {
    "smoke": Config(joints=24, samples=300),
    "quick": Config(),
    "full": Config(joints=1000, samples=20000),
}


def run(config: Config) -> dict[str, np.ndarray]:
    """Exact and sampled excesses by name, (instances, ...); every third instance has the same kind of score."""
    drawn = [_instance(np.random.default_rng((1, i)), kind) for i, kind in enumerate(kinds(config))]
    label_text, joint, score = (np.stack(field) for field in zip(*drawn, strict=True))
    with jax.enable_x64(True):
        instances = tuple(jnp.asarray(array) for array in (label_text, joint, score))
        arrays = results.part("exact", lambda: _exact(instances))
        for average in ("exponentials", "similarities"):
            arrays |= results.part(average, lambda average=average: _sampled(config, instances, average))
    return arrays | {"prompts": PROMPTS}


def kinds(config: Config) -> list[str]:
    """Kind of the score of every instance."""
    return list(SCORES) * config.joints


def _instance(rng, kind):
    joint = rng.dirichlet(np.ones(NX * NY)).reshape(NX, NY)
    # Not for ln r itself, which is -inf there: prompts may then all have w = 0, and the expected excess is infinite.
    if kind != "optimal" and rng.uniform() < 0.5:
        kept = np.arange(NX)[:, None] == np.arange(NY)[None, :] % NX
        joint = joint * (kept | (rng.uniform(size=joint.shape) > EMPTY))
        joint = joint / joint.sum()
    ratio = joint / joint.sum(axis=1)[:, None] / joint.sum(axis=0)[None, :]
    if kind == "sure":
        given_text = np.eye(NC)[:, rng.permutation(NY) % NC]
        score = SURE * np.eye(NY)[rng.integers(NY, size=NX)]
    else:
        given_text = rng.dirichlet(np.full(NC, 0.3), size=NY).T
        score = np.log(np.where(ratio > 0, ratio, IN_PLACE)) + (kind == "noisy") * NOISE * rng.standard_normal(
            joint.shape
        )
    return given_text * joint.sum(axis=0)[None, :], joint, score


def _exact(instances):
    measured = jax.jit(lambda drawn: jax.lax.map(lambda one: _measure(*one), drawn))(instances)
    return {name: np.asarray(values) for name, values in measured.items()}


def _measure(label_text, joint, score):
    classes, log_w = jnp.sum(label_text, axis=1), information_loss.log_model_ratio(joint, score)
    prompts = label_text / classes[:, None]  # P(y|c)
    truth = joint @ (label_text / jnp.sum(label_text, axis=0)[None, :]).T  # P(x, c)
    known = truth / jnp.sum(truth, axis=1)[:, None]
    log_mean = jnp.log(jnp.exp(log_w) @ prompts.T)  # (x, c)
    scale = jnp.exp(log_w[:, None, :] - log_mean[:, :, None])  # (x, c, y), mean 1 over the prompts of c
    model = jax.nn.softmax(jnp.log(classes)[None, :] + log_mean, axis=1)  # P_s(c|x)
    spread = jnp.einsum("cy,xcy->xc", prompts, (scale - 1) ** 2)  # v / g^2
    images = jnp.sum(truth, axis=1, keepdims=True)

    def excess(log_average, log_total):
        return jnp.sum(xlogy(truth, known / classes[None, :]) + truth * (log_total[:, None] - log_average))

    def exactly(m):
        each, total = _mean_logs(scale, prompts, model, m)
        # A_c = g_c A_c / g_c, and sum_c P(c) A_c = Z sum_c P_s(c|x) A_c / g_c.
        log_z = jnp.log(jnp.exp(log_mean) @ classes)
        return excess(log_mean + each, log_z + total)

    # All sets of prompts of one class, (sets, M), and their chances.
    sets = jnp.asarray(list(itertools.product(range(NY), repeat=LISTED)))
    different = (jnp.diff(jnp.sort(sets, axis=1), axis=1) != 0).all(axis=1)
    log_average = jnp.log(jnp.mean(jnp.exp(log_w)[:, sets], axis=2))  # (x, sets)

    def listed(kept):
        chance = jnp.where(kept[None, :], jnp.prod(prompts[:, sets], axis=2), 0.0)
        chance = chance / jnp.sum(chance, axis=1)[:, None]  # (c, sets)
        parts = jnp.exp(log_average)
        total = sum(
            classes[c] * jnp.expand_dims(parts, [1 + other for other in range(NC) if other != c]) for c in range(NC)
        )  # (x, sets of class 0, of class 1, of class 2)
        return excess(log_average @ chance.T, jnp.einsum("xabc,a,b,c->x", jnp.log(total), *chance))

    limit = downstream.zero_shot(label_text, joint, score).log_loss.excess
    similar = jax.nn.softmax(jnp.log(classes)[None, :] + score @ prompts.T, axis=1)
    variance = jnp.einsum("cy,xcy->xc", prompts, (score[:, None, :] - (score @ prompts.T)[:, :, None]) ** 2)
    return {
        "excess": jax.lax.map(exactly, jnp.asarray(PROMPTS, joint.dtype)),
        "exact/2": exactly(jnp.asarray(LISTED, joint.dtype)),
        "listed": listed(jnp.ones_like(different)),
        "listed different": listed(different),
        "limit": limit,
        "limit similar": jnp.sum(xlogy(truth, known / similar)),
        "b similar": jnp.sum(images * similar * (1 - similar) * variance) / 2,
        "b": downstream.prompt_coefficient(label_text, joint, score),
        "b form": jnp.sum(images * (known - model**2) * spread) / 2,
        "b truth": jnp.sum(images * (known - known**2) * spread) / 2,
        "b first": jnp.sum(truth * spread) / 2,
    }


def _mean_logs(scale, prompts, model, m):
    """E ln(A_c / g_c), (x, c), and E ln sum_c P_s(c|x) A_c / g_c, (x,), for M = m prompts of each class."""
    info = jnp.finfo(scale.dtype)
    # As in the library's contrastive risk: error 2 eps of each integral, whose variables have mean 1.
    step, start = math.pi**2 / math.log(1 / info.eps), math.log(info.eps / 2)
    u = start + step * jnp.arange(NODES, dtype=scale.dtype)
    # e^-tA as differences from 1, where they cancel.
    reference = jnp.expm1(-jnp.exp(u))

    def log_power(weight):
        """ln phi(weight t / M)^M, (nodes, x, c)."""
        t = jnp.exp(u)[:, None, None, None] * (weight / m)[None, :, :, None]
        decay = jnp.einsum("nxcy,cy->nxc", jnp.expm1(-t * scale[None]), prompts, precision="highest")
        return m * jnp.log1p(jnp.maximum(decay, info.eps / 2 - 1))

    each = jnp.sum(reference[:, None, None] - jnp.expm1(log_power(jnp.ones_like(model))), axis=0)
    total = jnp.sum(reference[:, None] - jnp.expm1(jnp.sum(log_power(model), axis=2)), axis=0)
    return step * each, step * total


# Up to u = 35: e^-tA is over once t A > 36, and no w here lies more than e^-31 below the mean of its class.
NODES = 264


def _sampled(config, instances, average):
    """Mean over sampled sets of prompts, (instances of the optimal score, counts)."""
    some = jax.tree.map(lambda array: array[:: len(SCORES)], instances)
    found = []
    for m in SAMPLED[average]:

        def estimate(drawn, m=m):
            (label_text, joint, score), key = drawn
            return downstream.zero_shot_with_prompts(
                label_text, joint, score, m, key=key, samples=config.samples, average=average
            ).value

        keys = jax.random.split(jax.random.fold_in(jax.random.key(2), m), config.joints)
        found.append(jax.jit(lambda drawn, estimate=estimate: jax.lax.map(estimate, drawn))((some, keys)))
    return {average: np.stack([np.asarray(values) for values in found], axis=1)}


def verdicts(config: Config, arrays: dict[str, np.ndarray]) -> list[verify.Verdict]:
    """The law a + b/M, its coefficient, and what averages of similarities tend to."""
    which = np.array(kinds(config))
    optimal, imperfect, sure = which == "optimal", which != "optimal", which == "sure"
    excess, limit = arrays["excess"], arrays["limit"]
    found = []

    def check(name, statement, key, why, measure, sides):
        """The claim and its control: `measure` on the two sides."""
        claim = verify.Claim(f"D3.{name}", statement, SOURCE)
        control = verify.Claim(f"D3.{name}.{key}", f"{statement}: {why}", SOURCE, "control", claim.name)
        found.extend(measure(checked, side) for checked, side in zip((claim, control), sides, strict=True))

    def equal(left):
        return lambda claim, right: verify.identity(claim, *alike(left, right), rtol=config.exact)

    def agrees(claim, pair):
        return verify.agreement(claim, *pair, margin=config.sampled)

    statement = f"the exact expected excess with {LISTED} prompts is the mean over all sets of prompts"
    sides = (arrays["listed"], arrays["listed different"])
    check("exact", statement, "different", "no text is drawn twice", equal(arrays["exact/2"]), sides)

    few = SAMPLED["exponentials"][0]
    statement = f"the sampled mean excess with {few} prompts, of the optimal score, is the exact one"
    sides = [(arrays["exponentials"][:, 0], right) for right in (_exactly(arrays, few)[optimal], limit[optimal])]
    check("sampled", statement, "all", "the excess of all texts", agrees, sides)

    statement = "the excess with M prompts approaches that of all texts as 1/M"
    check(
        "rate",
        statement,
        "itself",
        "the excess itself, of imperfect scores",
        lambda claim, y: verify.rate(claim, PROMPTS[ASYMPTOTIC], y[:, ASYMPTOTIC], -1.0, margin=config.rate),
        (np.abs(excess - limit[:, None]), excess[imperfect]),
    )
    check(
        "coefficient",
        "M times the distance from that limit tends to b",
        "first",
        "without the variance of the normaliser",
        lambda claim, b: verify.agreement(claim, extrapolated(arrays), b, margin=config.coefficient, relative=True),
        (arrays["b"], arrays["b first"]),
    )
    statement = "b = (1/2) E sum_c (P(c|x) - P_s(c|x)^2) v_c / g_c^2"
    sides = (arrays["b form"], arrays["b truth"])
    check("form", statement, "truth", "P(c|x)^2 in place of P_s(c|x)^2", equal(arrays["b"]), sides)
    check(
        "sign",
        "where the score is sure of single texts, b < 0 on average: of many prompts, fewer are better",
        "optimal",
        "the optimal score",
        lambda claim, b: verify.separation(claim, b, np.zeros(b.size), direction="less"),
        (arrays["b"][sure], arrays["b"][optimal]),
    )
    many, similar = SAMPLED["similarities"][-1], arrays["limit similar"][optimal]
    check(
        "similarities",
        f"the average of {many} similarities, of the optimal score, has the excess of P(c) exp E[s|c]",
        "exponentials",
        "the average of exponentials",
        agrees,
        [(left, similar) for left in (arrays["similarities"][:, -1], _exactly(arrays, many)[optimal])],
    )
    statement = f"the average of {many} similarities, of the optimal score, has the excess of all texts"
    finding = verify.Claim("D3.average", statement, SOURCE, "finding")
    return [*found, agrees(finding, (arrays["similarities"][:, -1], limit[optimal]))]


def _exactly(arrays, m):
    return arrays["excess"][:, list(PROMPTS).index(m)]


def alike(left: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both sides in units of the larger one."""
    size = np.maximum(np.abs(left), np.abs(right))
    return left / size, right / size


def extrapolated(arrays: dict[str, np.ndarray]) -> np.ndarray:
    """M (excess - a) at the two largest M, less the term of order 1/M that they show, (instances,)."""
    scaled = PROMPTS * (arrays["excess"] - arrays["limit"][:, None])
    ratio = PROMPTS[-1] / PROMPTS[-2]
    return (ratio * scaled[:, -1] - scaled[:, -2]) / (ratio - 1)
