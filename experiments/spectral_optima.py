r"""S1, S3, S4, S6, S7, S8, S11, S14, S15: closed-form optima of contrastive losses, exactly and as descent finds them.

Three kinds of evidence. Identities in float64 over random finite joints of positive pairs, among them joints with
points without mass, disconnected ones, repeated eigenvalues, and fewer positive eigenvalues than dimensions. Free
embeddings, linear encoders and kernel features, trained by the ordinary loop on the loss itself, against the closed
forms. And two statements that are no identities: the class-collision bound (S11) by enumeration, and the approach of
InfoNCE to its limit of infinitely many candidates (S14), where R_K is an exact integral.

What is compared is what the losses determine: values, scores, Gram matrices under one encoder for both views, spans.
With two encoders the Gram matrix of either is not determined, which is a finding about S15.

Sources: by statement, in `SOURCES`.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import _spectral_identities as identities
from experiments import _spectral_problems as problems
from experiments._side_by_side import BRIEFLY, side_by_side
from theorykit import results, surrogate, training, verify
from theorykit.spectral import compare

SOURCES = {
    "S1": "Tian (arXiv 2201.12680)",
    "S3": "HaoChen et al. (arXiv 2106.04156)",
    "S4": "Johnson et al. (arXiv 2210.01883)",
    "S6": "Esser et al. (arXiv 2309.02028)",
    "S7": "Cabannes et al. (arXiv 2302.02774)",
    "S8": "Balestriero, LeCun (arXiv 2205.11508)",
    "S11": "Arora et al. (arXiv 1902.09229)",
    "S14": "Wang, Isola (arXiv 2005.10242)",
    "S15": "derivation",
}
# name: (statement, what the control breaks). Values of both sides are computed in `_spectral_identities`.
EXACT = {
    "S1.gradient": ("grad_W L = -W C_alpha[x] for f = W x, with alpha held fixed", "weights alpha all equal"),
    "S3.identity": ("|A - F F^T|^2 - L(f) = |A|^2 for rows sqrt(w_x) f(x) of F", "rows f(x) / sqrt(n): wrong weights"),
    "S3.optimum": ("L at the leading eigenfunctions is -sum (gamma_i)_+^2", "eigenvectors of n P: wrong weights"),
    "S4.kernel": ("K_+ = sum_i gamma_i f_i f_i^T with f_i = g_i / sqrt p", "f_i = sqrt(n) g_i"),
    "S4.constant": ("constants are eigenfunctions of K_+ with eigenvalue 1", "mean over points in place of p"),
    "S4.invariance": ("E_+ (g(a) - g(b))^2 = sum (2 - 2 gamma_i) c_i^2", "views of different marginals"),
    "S6.optimum": (
        "the triplet loss of the kernel optimum is the sum of h eigenvalues",
        "eigenvectors of S, without B",
    ),
    "S7.optimum": (
        "the loss at the optimum is k - sum (mu_i)_+^2",
        "penalty lambda |psi|^2 in place of 2 lambda |psi|^2",
    ),
    "S8.optimum": ("the energy of the eigenmaps is 2 N sum of lambda_2 to lambda_K+1", "embeddings not centred"),
}
TRAINED = {
    "S1.rank1": ("S1", "gram", "W^T W of a trained deep linear net of unit norm is v v^T", "weights alpha move"),
    "S3.loss": ("S3", "loss", "the trained spectral loss is -sum (gamma_i)_+^2", "views of different marginals"),
    "S3.gram": ("S3", "gram", "the trained Gram matrix is A cut to rank k", "views of different marginals"),
    "S4.spectral": (
        "S4",
        "spectral",
        "scores trained on the spectral loss are K_+",
        "batches of two pairs, i = j kept",
    ),
    "S4.logistic": ("S4", "logistic", "scores trained on the logistic loss are ln K_+", "negatives of another joint"),
    "S4.info_nce": ("S4", "info_nce", "InfoNCE trains scores to ln K_+ + c(a)", "negatives of another joint"),
    "S6.loss": ("S6", "loss", "trained orthonormal kernel features reach the eigenvalue sum", "not orthogonal"),
    "S6.gram": ("S6", "gram", "their Gram matrix is that of the closed form", "not orthogonal"),
    "S7.loss": ("S7", "loss", "a trained linear encoder reaches k - sum (mu_i)_+^2", "covariance, not second moment"),
    "S7.gram": ("S7", "gram", "its Gram matrix is that of the closed form", "covariance, not second moment"),
    "S8.loss": ("S8", "loss", "trained white embeddings reach the eigenmaps' energy", "embeddings not centred"),
    "S8.gram": ("S8", "gram", "their Gram matrix is that of the eigenmaps", "embeddings not centred"),
}
# What the spans of `problems.SPANS`, and the scores of S4, are compared with.
LEADING = {
    "S1": "the trained direction is closer to the leading eigenvector of C_alpha",
    "S3": "the trained span is closer to the leading eigenspace of A",
    "S4": "trained scores of all three losses are closer to their closed forms",
    "S6": "the trained features are closer to the bottom eigenspace of the triplets' form",
    "S7": "the trained span is closer to the leading eigenspace of (1 - beta) I + beta A - lambda K^-1",
    "S8": "the trained span is closer to the lowest non-constant eigenspace of D - G",
}
OPTIMIZER = optax.sgd(1.0, momentum=0.9, nesterov=True)  # the step sizes are in `problems.RATES`
SNAPSHOTS = 24
NULL_DRAWS = 2000  # random subspaces; 1000 are the least at the level of the gate
UNTRAINED = 16  # draws of untrained embeddings for each instance
TAIL = 1.5  # of the control of S14: P(e^s > x) ~ x^-TAIL has a mean and no variance


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes; those of a single instance are in `_spectral_problems`."""

    joints: int = 250
    instances: int = 16
    steps: int = 5000
    embeddings: int = 1000
    candidates: tuple[int, ...] = (64, 256, 1024, 4096, 16384)
    risks: int = 24
    exact: float = results.threshold(1e-9, "required of identities in float64; roundings amount to about 1e-13")
    rate: float = results.threshold(0.05, "terms of order 1/K^2 tilt the slope by a few 1/K, at most 1/64 each")
    limit: float = results.threshold(
        1e-6, "extrapolation leaves terms of order 1/K^2, 4e-9 at the largest K, times a few"
    )


PRESETS = {
    "smoke": Config(joints=50, instances=4, steps=3000, embeddings=200, risks=16),
    "quick": Config(),
    "full": Config(joints=2000, instances=64, steps=20000, embeddings=10000, risks=32),
}


def run(config: Config) -> dict[str, np.ndarray]:
    """<claim>/left, right (instances, entries), the same for <claim>.control, and the arrays of S11 and S14."""
    # The longest first, so that no thread waits for it at the end.
    measures = {"trained": _trained, "exact": _exact, "S14": _risks, "S11": _collisions}
    with jax.enable_x64(True):
        parts = side_by_side(results.part, [(label, partial(measure, config)) for label, measure in measures.items()])
    return {name: value for part in parts for name, value in part.items()}


def _exact(config):
    n = problems.POINTS
    drawn = [identities.joints(np.random.default_rng((1, i)), i) for i in range(config.joints)]
    joints, skew = (jnp.asarray(np.stack(kind)) for kind in zip(*drawn, strict=True))
    normal = np.random.default_rng(0).standard_normal((config.joints, 5, n, n))
    drawn = (joints, skew, jnp.asarray(normal))
    sides = jax.jit(lambda drawn: problems.one_by_one(lambda one: identities.identities(*one), drawn))(drawn)
    return {f"{name}/{side}": np.asarray(values) for name, pair in sides.items() for side, values in pair.items()}


def _trained(config):
    """Trained parameters against the closed forms; curves of the excess loss for the figure."""
    count = config.instances
    params, data = problems.draw(2, count)
    steps = [0, *np.unique(np.geomspace(1, config.steps, SNAPSHOTS).astype(int)).tolist()]
    done = training.train(
        problems.total,
        params,
        data,
        optimizer=OPTIMIZER,
        steps=config.steps,
        metrics=_snapshot,
        metric_steps=steps,
        progress=False,
    )
    if done.status != "finished":
        raise RuntimeError(f"training diverged after {done.steps} steps: lower the step sizes in problems.RATES")
    rng = np.random.default_rng(4)
    draw = lambda leaf: rng.standard_normal((count, UNTRAINED, *leaf.shape[1:]))  # noqa: E731
    untrained = jax.tree.map(draw, {problem: params[problem] for problem in problems.SPANS})
    found = _compared(done.metrics, untrained, data, count)
    pairs, reached, spans, excess = jax.tree.map(np.asarray, found)
    arrays = {"steps": np.array(steps)} | {f"excess/{problem}": curve.T for problem, curve in excess.items()}
    for problem, distances in spans.items():
        arrays |= {
            f"{problem}.distance/trained": distances[:, 0],
            f"{problem}.distance/untrained": distances[:, 1:].ravel(),
        }
        arrays[f"{problem}.distance/null"] = _null(*problems.SPANS[problem])
    arrays |= _scores({name: [pairs[name][side][:count] for side in ("left", "right")] for name in TRAINED})
    arrays |= {f"S11/trained/{name}": side[:count] for name, side in reached.items()}
    for name, pair in pairs.items():
        halves = ("", slice(count)), (".control", slice(count, None))
        arrays |= {f"{name}{suffix}/{side}": pair[side][half] for suffix, half in halves for side in pair}
    return arrays


@partial(jax.jit, static_argnums=3, compiler_options=BRIEFLY)
def _compared(path, untrained, data, count):
    """Pairs of sides (instances first), both sides of the S11 bound, distances of spans, and the excess on the way."""
    curves = jax.lax.map(lambda params: problems.values(params, data), path)
    params = jax.tree.map(lambda leaf: leaf[-1], path)
    predicted, reached = problems.predictions(data), problems.reached(params, data)
    pairs = {}
    for name, (problem, quantity, *_) in TRAINED.items():
        left = curves[problem][-1] if quantity == "loss" else reached[problem][quantity]
        pairs[name] = jax.vmap(identities.pair)(left, predicted[problem][quantity])
    for name, runs in reached["S15"].items():
        # Half of the instances do for the controls, which compare with the second run on the data of another instance.
        other = jnp.concatenate([runs[:count, 1], jnp.roll(runs[count:, 1], 1, axis=0)])
        pairs[f"S15.{name}"] = jax.vmap(identities.pair)(runs[:, 0], other)
    goals = {problem: predicted[problem]["loss"] for problem in ("S3", "S6", "S7", "S8")}
    excess = {problem: (curves[problem] - goal) / jnp.abs(goal) for problem, goal in goals.items()}
    both = {p: jax.tree.map(_first_and_others, params[p], untrained[p]) for p in problems.SPANS}
    targets = {p: predicted[p]["span"][:count] for p in problems.SPANS}
    batch = jax.tree.map(lambda leaf: leaf[:count], data)
    return pairs, reached["S11"], jax.vmap(jax.vmap(_distances, (0, None, None)))(both, batch, targets), excess


def _first_and_others(trained, untrained):
    return jnp.concatenate([trained[: len(untrained), None], untrained], axis=1)


def _distances(params, data, targets):
    """From each span of `problems.spans` to the one that the closed form says."""
    bases = problems.spans(params, data)
    return {problem: compare.projector_distance(basis, targets[problem]) for problem, basis in bases.items()}


def _null(d, k):
    """Distances of random subspaces of k of d dimensions to a fixed one, which are distributed as those of two."""
    # By NumPy: `compare.null_distances` compiles a program for each of five spaces, a second each.
    bases = np.linalg.qr(np.random.default_rng((3, d, k)).standard_normal((NULL_DRAWS, d, k)))[0]
    return np.sqrt(k - np.sum(bases[:, :k] ** 2, axis=(1, 2)))


def _scores(pairs):
    """S4: the largest relative distance of scores to their closed forms; null: of closed forms of two joints."""

    def distance(found):
        return np.max([np.linalg.norm(a - b, axis=-1) / np.linalg.norm(b, axis=-1) for a, b in found], axis=0)

    joint = np.random.default_rng(6).dirichlet(5 * np.ones(problems.ALPHABET**2), 2 * NULL_DRAWS)
    joint = joint.reshape(2, NULL_DRAWS, problems.ALPHABET, problems.ALPHABET)
    kernel = joint / joint.sum(-1, keepdims=True) / joint.sum(-2, keepdims=True)
    forms = kernel, np.log(kernel), np.log(kernel) - np.log(kernel).mean(-1, keepdims=True)
    return {
        "S4.distance/trained": distance(pair for name, pair in pairs.items() if name.startswith("S4")),
        "S4.distance/untrained": np.ones(1),  # scores of 0, for every joint
        "S4.distance/null": distance(form.reshape(2, NULL_DRAWS, -1) for form in forms),
    }


def _snapshot(params):
    return params


def _collisions(config):
    """Both sides of the S11 bound over random classes and embeddings, of sizes from 0.1 to 10."""
    rng = np.random.default_rng(4)
    n, count = problems.POINTS, config.embeddings
    prior = rng.dirichlet(5 * np.ones(problems.CLASSES), size=count)
    conditionals = rng.dirichlet(0.5 * np.ones(n), size=(count, problems.CLASSES))
    f = rng.standard_normal((count, n, 2)) * 10 ** rng.uniform(-1, 0.5, (count, 1, 1))

    @jax.jit
    @jax.vmap
    def measure(*instance):
        forms = {"base 2": problems.logistic, "base e": _natural, "hinge": _hinge}
        sides = {name: problems.collision(*instance, loss=loss)._asdict() for name, loss in forms.items()}
        return sides | {"same point": {"unsupervised": _same_point(*instance)}}

    found = measure(*map(jnp.asarray, (prior, conditionals, f)))
    return {f"S11/{name}/{side}": np.asarray(values) for name, both in found.items() for side, values in both.items()}


def _natural(margins):
    """The logistic loss with l(0) = ln 2, not 1."""
    return jax.nn.softplus(-margins)


def _hinge(margins):
    return jax.nn.relu(1 - margins)


def _same_point(prior, conditionals, f):
    """The contrastive loss where the positive is the anchor itself, not another draw of its class."""
    mass, scores = prior @ conditionals, f @ f.T
    return jnp.sum(mass[:, None] * mass[None, :] * _natural(jnp.diagonal(scores)[:, None] - scores))


def _risks(config):
    """R_K - ln K and its limit for scores near the best ones; for the control, for a heavy tail."""
    rng, shape = np.random.default_rng(5), (config.risks, 4, 16)
    joints = rng.dirichlet(np.ones(64), size=config.risks).reshape(shape)
    independent = joints.sum(axis=2, keepdims=True) * joints.sum(axis=1, keepdims=True)
    # InfoNCE does not see a constant for each anchor; where the logarithm is in the limit, it matters.
    scores = np.log(joints / independent) + 0.3 * rng.standard_normal(shape) + rng.standard_normal((config.risks, 4, 1))
    # e^s = 4^j with probability in proportion to 4^(-TAIL j): the highest level is rarer than one in the largest K.
    levels = np.arange(shape[2])
    tail = np.broadcast_to(4.0 ** (-TAIL * levels), shape)
    heavy = levels * np.log(4) + 0.1 * rng.standard_normal(shape)
    counts = jnp.asarray([*config.candidates, 2 * config.candidates[-1]])

    @jax.jit
    @jax.vmap
    def measure(joint, s):
        outside = -jnp.sum(joint * s) + jax.nn.logsumexp(s, b=joint.sum(1)[:, None] * joint.sum(0)[None, :])
        risks = jax.lax.map(lambda k: surrogate.contrastive_risk(joint, s, k) - jnp.log(k), counts)
        return {"risk": risks, "limit": surrogate.limiting_risk(joint, s), "outside": outside}

    both = np.concatenate([joints, tail / tail.sum(axis=(1, 2), keepdims=True)]), np.concatenate([scores, heavy])
    arrays = {"candidates": np.array(config.candidates)}
    for name, values in measure(*map(jnp.asarray, both)).items():
        arrays |= dict(zip((f"S14/bounded/{name}", f"S14/heavy/{name}"), np.split(np.asarray(values), 2), strict=True))
    return arrays


def verdicts(config: Config, arrays: dict[str, np.ndarray]) -> list[verify.Verdict]:
    """Identities exactly and after training, the trained span, the class-collision bound, and the limit of InfoNCE."""
    found = []
    for name, (statement, why) in EXACT.items():
        found += _identity(config, arrays, name, statement, why)
    for name, (_, _, statement, why) in TRAINED.items():
        found += _identity(config, arrays, name, statement, why)
    found += _spans(arrays)
    found += _two_runs(config, arrays)
    found += _bounds(arrays)
    return found + _infinitely_many(config, arrays)


def _claims(name, statement, why):
    source = SOURCES[name.split(".")[0]]
    claim = verify.Claim(name, statement, source)
    return claim, verify.Claim(f"{name}.control", f"{statement}: {why}", source, "control", name)


def _identity(config, arrays, name, statement, why, control=None):
    sides = (name, control or f"{name}.control")
    return [
        verify.identity(claim, arrays[f"{key}/left"], arrays[f"{key}/right"], rtol=config.exact)
        for claim, key in zip(_claims(name, statement, why), sides, strict=True)
    ]


def _spans(arrays):
    found = []
    for problem, closer in LEADING.items():
        kind = "distance" if problem == "S4" else "subspace"
        chance = "closed forms of other joints" if problem == "S4" else "random subspaces"
        claims = _claims(f"{problem}.{kind}", f"{closer} than 99.9% of {chance}", "before training")
        found += [
            verify.separation(
                claim, arrays[f"{problem}.distance/{side}"], null=arrays[f"{problem}.distance/null"], direction="less"
            )
            for claim, side in zip(claims, ("trained", "untrained"), strict=True)
        ]
    return found


def _two_runs(config, arrays):
    found = _identity(
        config, arrays, "S15.scores", "two runs have the same scores", "their coordinates", "S15.coordinates"
    )
    found += _identity(
        config, arrays, "S15.projector", "the encoders of two runs span the same functions", "other data"
    )
    statement = "two runs with one encoder for each view have the same Gram matrix F F^T"
    finding = verify.Claim("S15.gram", statement, SOURCES["S15"], "finding")
    sides = (arrays[f"S15.gram/{side}"] for side in ("left", "right"))
    return [*found, verify.identity(finding, *sides, rtol=config.exact)]


def _bounds(arrays):
    def side(which, name):
        return arrays[f"S11/{which}/{name}"]

    def limit(which, at_zero, unsupervised=None):
        tau = side(which, "collision")
        value = side(which, "unsupervised") if unsupervised is None else unsupervised
        return (value - at_zero * tau) / (1 - tau)

    statement = "L_sup <= (L_un - tau) / (1 - tau)"
    claim, control = _claims("S11.bound", f"{statement} for l(0) = 1", "l(0) = ln 2")
    one = ("base 2", "hinge", "trained")
    value, limits = (
        np.concatenate(parts) for parts in ([side(w, "supervised") for w in one], [limit(w, 1) for w in one])
    )
    found = [
        verify.bound(claim, value, limits),
        verify.bound(control, side("base e", "supervised"), limit("base e", 1)),
    ]
    statement = "L_sup <= (L_un - l(0) tau) / (1 - tau) for l(0) = ln 2"
    claim, control = _claims("S11.general", statement, "the positive is the anchor itself")
    return [
        *found,
        verify.bound(claim, side("base e", "supervised"), limit("base e", np.log(2))),
        verify.bound(
            control,
            side("base e", "supervised"),
            limit("base e", np.log(2), arrays["S11/same point/unsupervised"]),
        ),
    ]


def _infinitely_many(config, arrays):
    statement = "R_K - ln K approaches its limit as 1/K"
    claims = _claims("S14.rate", statement, "scores with a heavy tail, E e^2s infinite")
    found = [
        verify.rate(claim, arrays["candidates"], gap_to_limit(arrays, which), -1.0, margin=config.rate)
        for claim, which in zip(claims, ("bounded", "heavy"), strict=True)
    ]
    risk = arrays["S14/bounded/risk"]
    extrapolated = 2 * risk[:, -1] - risk[:, -2]
    statement = "extrapolated to K = inf, R_K - ln K is -E s + E ln E e^s"
    limits = (arrays["S14/bounded/limit"], arrays["S14/bounded/outside"])
    claims = _claims("S14.limit", statement, "-E s + ln E E e^s, the uniformity metric")
    return found + [
        verify.agreement(claim, extrapolated, limit, margin=config.limit)
        for claim, limit in zip(claims, limits, strict=True)
    ]


def gap_to_limit(arrays: dict[str, np.ndarray], which: str) -> np.ndarray:
    """|R_K - ln K - limit|, (joints, K)."""
    return np.abs(arrays[f"S14/{which}/risk"][:, :-1] - arrays[f"S14/{which}/limit"][:, None])
