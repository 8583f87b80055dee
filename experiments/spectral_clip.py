r"""S9: contrastive training across two modalities against canonical correlations, and retrieval between them.

The modalities are the left and right halves x, y of digits, the scores s(x, y) = f(x).g(y), the batch all training
pairs. For linear encoders s = x^T M y, and the spectral loss is

    L(M) = (1/n^2) sum_ij s(x_i, y_j)^2 - (2/n) sum_i s(x_i, y_i) = Tr(M^T Sxx M Syy) - 2 Tr(M^T Sxy)

so that with whitened views L = |M - Sxy|_F^2 - |Sxy|_F^2. Its optimum of rank z is the truncated singular value
decomposition of Sxy, the canonical directions with weights rho_i: M* = sum_{i <= z} rho_i u_i v_i^T, L* = -sum rho_i^2.
Whitening is not needed for that, since M can undo it: with Sxx^(-1/2) u_i and Syy^(-1/2) v_i the value is the same on
raw centred views (S9.minimum); it makes descent fast.

Two-sided CLIP with bilinear scores has the same loss on jointly Gaussian views with infinitely many candidates; with K
of them it is off by the fluctuations of a mean of K exponentials. On digits the derivation breaks down: linear CLIP
learns subspaces near the canonical ones, but other scores, and farther ones than on Gaussian views with the covariance
of the digits.

Wide ReLU encoders are compared with kernel CCA under the kernel of the infinitely wide encoder (NTK). They start at a
tenth of their random function, h = f(theta) - 0.9 f(theta_0). Training has no ridge. It learns the leading directions
first, so its time stands for the inverse of one, and both, stopping time and ridge, are chosen by retrieval on
validation rows. No identity is claimed there; the measurement says how near they are. Chance is the overlap of random
encoders, 0.45; those trained on unmatched pairs come to 0.6, since both learn what varies most in each view.

Encoders are determined up to (P f, P^-T g). So subspaces are compared (of weights, or of centred embeddings of held-out
rows), and retrieval uses cosines in the canonical coordinates of the training embeddings, for every method alike.

Source: HaoChen et al. 2021 (arXiv 2106.04156) for the factorisation; Hotelling 1936, Bach and Jordan 2002 for CCA; the
Gaussian limit of CLIP: derivation (E exp of a Gaussian score).
"""

import dataclasses
import itertools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from experiments import _modalities
from experiments._modalities import KS, LOSSES
from theorykit import losses, results, verify
from theorykit.spectral import cca, compare

FACTOR = "HaoChen et al. 2021 (arXiv 2106.04156); canonical directions: Hotelling 1936"
GAUSS = "derivation (two-sided CLIP with bilinear scores, Gaussian views, K -> infinity)"
RETRIEVAL = "Radford et al. 2021 (arXiv 2103.00020), zero-shot retrieval; CCA: Hotelling 1936"
KERNEL = "Bach, Jordan 2002 (JMLR 3); infinite width: Jacot et al. 2018 (arXiv 1806.07572)"

METHODS = ("CCA", "linear CLIP", "wide CLIP", "wide spectral", "kernel CCA")


@dataclasses.dataclass(frozen=True)
class Config:
    """Training, validation and held-out pairs of digits; `candidates` are numbers of training pairs for linear CLIP."""

    pairs: int = 256
    validation: int = 256
    heldout: int = 512
    seeds: int = 10
    components: int = 16  # principal components of each half that are whitened: later ones are pixels hardly ever inked
    features: int = 8
    candidates: tuple[int, ...] = (128, 256, 512)
    width: int = 256
    ridges: tuple[float, ...] = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
    linear_steps: Mapping[str, int] = dataclasses.field(default_factory=lambda: {"spectral": 300, "CLIP": 120})
    wide_steps: tuple[int, ...] = (25, 50, 100, 200, 400)
    null_draws: int = 4000
    null_encoders: int = 1000  # the least at the level of the gate
    score_error: float = results.threshold(
        0.02, "descent is that near its limit; the nearest other optimum, that of CLIP, is off by 0.4"
    )
    correlation: float = results.threshold(0.2, "of 1 for equal scores and 0 for unrelated ones: near the former")
    farther: float = results.threshold(0.05, "a quarter of the error that 512 candidates leave on Gaussian views")
    chance: float = results.threshold(0.05, "several times chance, which is 5 in 512 rows (in 256 at smoke)")
    first: float = results.threshold(0.01, "a fifth of that for the five best, as chance is")
    gain: float = results.threshold(0.03, "a tenth of what the better method retrieves")
    nearer: float = results.threshold(0.05, "a tenth of the overlap, 0.4 to 0.5, that untrained encoders have already")
    equal: float = results.threshold(0.02, "two hundredths of full overlap count as none")


PRESETS = {
    "smoke": Config(
        pairs=128,
        validation=128,
        heldout=256,
        candidates=(128,),
        width=64,
        ridges=(1e-4, 1e-3, 1e-1),
        wide_steps=(25, 50, 100, 200),
    ),
    "quick": Config(),
    "full": Config(pairs=512, candidates=(128, 256, 512, 1024), width=1024, wide_steps=(25, 50, 100, 200, 400, 800)),
}


def run(config: Config) -> dict[str, np.ndarray]:
    """Arrays of linear encoders and of wide ones and kernels; the leading axis is seeds throughout."""
    arrays = results.part("linear", lambda: _linear(config))
    embedded = {loss: [arrays.pop(f"embedded/{side}/{loss}") for side in "ab"] for loss in LOSSES}
    return arrays | results.part("wide", lambda: _wide(config, embedded))


def _linear(config):
    """Angles to the canonical subspaces, score errors and retrieval of linear encoders; their null."""
    arrays, errors = {}, {}
    for count in tqdm(config.candidates, desc="spectral_clip: linear", disable=None):
        found = _linear_at(config, count)
        arrays |= found if count == config.pairs else {}
        for view in ("digits", "Gaussian"):
            if f"score_error/CLIP/{view}" in found:
                errors.setdefault(f"sweep/{view}", []).append(found[f"score_error/CLIP/{view}"])
    arrays |= {name: np.stack(values, axis=1) for name, values in errors.items()}
    return arrays | _minimum(config) | {"candidates": np.array(config.candidates), "null/angles": _null(config)}


def _linear_at(config, count):
    """With `count` candidates: angles/<loss>/<views> (seeds, 2, z), score_error/... and score_correlation/... (seeds,).

    With `pairs` candidates also unmatched views, both losses, recall/... (seeds, ks) and embedded/... (seeds, rows, z).
    """
    main, seeds = count == config.pairs, range(config.seeds)
    encoder = _modalities.encoder(0, config.features)
    views = [
        [_modalities.whitened(v, count, config.components) for v in _modalities.halves(config, s, count)] for s in seeds
    ]
    groups = {"digits": views}
    if main:
        groups["unmatched"] = [(a, _modalities.unmatched(b, count, s)) for s, (a, b) in enumerate(views)]
    if len(config.candidates) > 1:
        groups["Gaussian"] = [_modalities.gaussian(a, b, count, s) for s, (a, b) in enumerate(views)]
    # Encoders that saw unmatched pairs are held against the canonical pairs of the matched ones.
    targets = {view: groups["digits" if view == "unmatched" else view] for view in groups}
    predicted = {view: [_canonical(a[:count], b[:count], config.features) for a, b in targets[view]] for view in groups}
    x, y = (np.stack([pair[side][:count] for group in groups.values() for pair in group]) for side in (0, 1))
    units = np.broadcast_to(np.eye(config.components, dtype=np.float32), (len(x), config.components, config.components))
    arrays = {}
    for loss in LOSSES if main else ("CLIP",):
        # In units of the weights themselves, of which the NTK parametrisation takes 1 / sqrt(components). At twice
        # these rates descent still converges, at three times it diverges.
        rate = config.components * {"spectral": 0.1, "CLIP": 0.4}[loss]
        (learnt,) = _modalities.train(encoder, loss, x, y, rate, [config.linear_steps[loss]])
        maps = [np.asarray(w) for w in _modalities.embed(encoder, learnt, units, units)]
        for row, view in enumerate(groups):
            own = slice(row * config.seeds, (row + 1) * config.seeds)
            compared = [
                _compared(u, v, *form) for u, v, form in zip(*(w[own] for w in maps), predicted[view], strict=True)
            ]
            names = ("angles", "score_error", "score_correlation")
            arrays |= {
                f"{n}/{loss}/{view}": np.stack(c) for n, c in zip(names, zip(*compared, strict=True), strict=True)
            }
            if main and view != "Gaussian":
                embedded = [np.stack([pair[side] for pair in groups[view]]) @ maps[side][own] for side in (0, 1)]
                recalls = [_modalities.recall(config, *pair)[1] for pair in zip(*embedded, strict=True)]
                arrays[f"recall/linear {loss}/{view}"] = np.stack(recalls)
                if view == "digits":
                    arrays |= {f"embedded/{side}/{loss}": f for side, f in zip("ab", embedded, strict=True)}
    return arrays


def _canonical(x, y, features):
    """Canonical weights and the score matrix sum rho_i u_i v_i that they make."""
    model = _cca(x, y, features)
    a, b = np.asarray(model.x_weights), np.asarray(model.y_weights)
    # The loss has means over n where covariances have n - 1, and the scores are products of two variates.
    n = len(x)
    return a, b, (a * np.asarray(model.correlations)) @ b.T * (n / (n - 1))


_cca = jax.jit(cca.cca, static_argnums=2)


def _compared(learnt_a, learnt_b, a, b, scores):
    """Principal angles (2, z) to the canonical subspaces; relative error and correlation of the score matrix."""
    angles = np.stack([_angles(u, v) for u, v in ((learnt_a, a), (learnt_b, b))])
    found = learnt_a @ learnt_b.T
    size = np.linalg.norm(scores)
    return angles, np.linalg.norm(found - scores) / size, np.sum(found * scores) / size / np.linalg.norm(found)


@jax.jit
def _angles(u, v):
    return compare.principal_angles(compare.orthonormal_basis(u), compare.orthonormal_basis(v))


def _null(config):
    """Principal angles of random subspaces (draws, z) with a fixed one: they make no difference between subspaces."""
    draws = np.random.default_rng(0).standard_normal((config.null_draws, config.components, config.features))
    cosines = np.linalg.svd(np.linalg.qr(draws)[0][:, : config.features], compute_uv=False)
    return np.arccos(np.minimum(cosines, 1))


def _minimum(config):
    """The spectral loss at directions in closed form, in float64, and minus sum rho_i^2; (seeds,) each."""
    n, found = config.pairs, {name: [] for name in ("predicted", "canonical", "principal")}
    for seed in range(config.seeds):
        # Centred and not whitened; without the last components, which are pixels hardly ever inked.
        a, b = (_leading(v[:n], config.components) for v in _modalities.halves(config, seed, n))
        with jax.enable_x64(True):
            model = _cca(a, b, config.features)
            root = np.sqrt(model.correlations * n / (n - 1))
            variates = [np.asarray(f) * root for f in cca.transform(model, a, b)]
            found["predicted"].append(-np.sum(np.square(model.correlations)))
            found["canonical"].append(float(losses.spectral(*map(jnp.asarray, variates))))
            principal = [f[:, : config.features] / f[:, : config.features].std(0) for f in (a, b)]
            found["principal"].append(float(losses.spectral(*map(jnp.asarray, principal))))
    return {f"minimum/{name}": np.stack(values) for name, values in found.items()}


def _leading(v, components):
    return v @ np.linalg.svd(v, full_matrices=False)[2][:components].T


def _wide(config, linear):
    """recall/<method>/<views> (seeds, ks); overlap/<kernel or linear>/<encoders>/<views> (seeds, steps, ridges)."""
    encoder, n = _modalities.encoder(config.width, config.features), config.pairs
    halves = [_modalities.halves(config, seed, n) for seed in range(config.seeds)]
    closed = [_modalities.closed_forms(config, encoder, seed) for seed in range(config.seeds)]
    arrays = {"steps": np.array([0, *config.wide_steps])}
    known = [c["kernel CCA", "digits"]["bases"] for c in closed]
    nulls = [_modalities.random_overlaps(config, halves[seed], seed, bases) for seed, bases in enumerate(known)]
    arrays["null/overlap"] = np.concatenate(nulls)
    for method in ("CCA", "kernel CCA"):
        for view in ("digits", "unmatched"):
            arrays[f"recall/{method}/{view}"] = np.stack([c[method, view]["recall"] for c in closed])
        arrays[f"chosen/{method}/digits"] = np.array([c[method, "digits"]["chosen"] for c in closed])

    def overlaps(pairs, seed):
        """With kernel CCA and with CCA, (steps, ridges) each."""
        learnt = [_modalities.bases(config, pair) for pair in pairs]
        known = {"kernel": closed[seed]["kernel CCA", "digits"], "linear": closed[seed]["CCA", "digits"]}
        return {kind: np.stack([_modalities.overlaps(u, c["bases"]) for u in learnt]) for kind, c in known.items()}

    def collect(found):
        return {name: np.stack([one[name] for one in found]) for name in found[0]}

    for loss, (fa, fb) in linear.items():
        found = collect([overlaps([pair], seed) for seed, pair in enumerate(zip(fa, fb, strict=True))])
        arrays |= {f"overlap/{kind}/linear {loss}/digits": value for kind, value in found.items()}
    groups = {"digits": halves, "unmatched": [(a, _modalities.unmatched(b, n, s)) for s, (a, b) in enumerate(halves)]}
    a, b = (np.float32([pair[side] for group in groups.values() for pair in group]) for side in (0, 1))
    for loss in tqdm(LOSSES, desc="spectral_clip: wide", disable=None):
        # Still stable at four times these rates, so that descent is near the gradient flow.
        rate = {"spectral": 0.16, "CLIP": 0.6}[loss]
        stages = _modalities.train(encoder, loss, a[:, :n], b[:, :n], rate, arrays["steps"].tolist())
        embedded = [[np.asarray(f) for f in _modalities.embed(encoder, learnt, a, b)] for learnt in stages]
        for row, view in enumerate(groups):
            found = []
            for seed in range(config.seeds):
                pairs = [[f[row * config.seeds + seed] for f in pair] for pair in embedded]
                recalls = [_modalities.recall(config, *pair) for pair in pairs]
                stop = _modalities.best(recalls)
                near = {f"overlap/{kind}": value for kind, value in overlaps(pairs, seed).items()}
                found.append(near | {"recall": recalls[stop][1], "chosen": stop})
            arrays |= {f"{name}/wide {loss}/{view}": value for name, value in collect(found).items()}
    return arrays


def verdicts(config: Config, arrays: dict[str, np.ndarray]) -> list[verify.Verdict]:
    """Linear encoders against CCA, wide ones against kernel CCA, and what all of them retrieve."""

    def claim(name, statement, source):
        return verify.Claim(f"S9.{name}", statement, source)

    def control(of, name, statement, source):
        return verify.Claim(f"S9.{of}.{name}", statement, source, "control", f"S9.{of}")

    def scores(claim, loss, view):
        error = arrays[f"score_error/{loss}/{view}"]
        return verify.agreement(claim, error, 0.0, margin=config.score_error, side="at_most")

    def minimum(claim, name):
        return verify.identity(claim, arrays[f"minimum/{name}"], arrays["minimum/predicted"])

    def subspace(claim, loss, view):
        worst = np.max(_squared_sines(arrays[f"angles/{loss}/{view}"]), axis=1)
        return verify.separation(claim, worst, null=_squared_sines(arrays["null/angles"]), direction="less")

    def correlated(claim, view):
        value = arrays[f"score_correlation/CLIP/{view}"]
        return verify.agreement(claim, value, 1.0, margin=config.correlation, side="at_least")

    def beyond_chance(claim, value):
        return verify.separation(claim, value, null=arrays["null/overlap"])

    def retrieves(claim, method, view, k):
        found, margin = arrays[f"recall/{method}/{view}"][:, KS.index(k)], {1: config.first, 5: config.chance}[k]
        return verify.separation(claim, found, np.full_like(found, k / config.heldout), margin=margin)

    def gains(claim, better, view):
        found = (arrays[f"recall/{method}/{view}"][:, -1] for method in (better, "CCA"))
        return verify.separation(claim, *found, margin=config.gain)

    def nearer(claim, encoders):
        near = (_nearness(arrays, kind, encoders) for kind in ("kernel", "linear"))
        return verify.separation(claim, *near, margin=config.nearer)

    def equally_near(claim):
        near = (np.max(arrays[f"overlap/kernel/wide {loss}/digits"], axis=-1)[:, -1] for loss in ("CLIP", "spectral"))
        return verify.agreement(claim, *near, margin=config.equal)

    def farther(claim, loss):
        error = (
            arrays[f"sweep/{view}"][:, -1] if loss == "CLIP" else arrays[f"score_error/{loss}/{view}"]
            for view in ("digits", "Gaussian")
        )
        return verify.separation(claim, *error, margin=config.farther)

    untrained = np.max(arrays["overlap/kernel/wide spectral/digits"], axis=-1)[:, 0]
    unmatched = "trained on unmatched pairs"
    exact = "linear encoders trained by the spectral loss have the canonical scores sum rho_i u_i v_i"
    lowest = "at the canonical directions of raw centred views the spectral loss is -sum rho_i^2"
    close = "the subspaces learnt on digits by linear encoders are nearer to the canonical ones than random ones"
    alike = "the scores learnt by linear CLIP on digits correlate with the canonical ones by 0.8 or more"
    gain = "kernel CCA with the NTK retrieves more partners than CCA, ridges chosen on validation rows"
    wide = "wide encoders trained by the spectral loss are nearer to kernel CCA than to CCA, at the best ridge of each"
    chance = "wide encoders trained by the spectral loss are nearer to kernel CCA than 99.9% of random ones"
    learnt = "wide encoders trained by the spectral loss retrieve more partners than CCA, chosen on validation rows"
    same = "at the end of training wide encoders under CLIP are as near to kernel CCA as under the spectral loss"
    gauss = "is farther from the canonical scores on digits than on Gaussian views with their covariance"
    found = [
        scores(claim("spectral", exact, FACTOR), "spectral", "digits"),
        scores(control("spectral", "unmatched", f"{exact}: {unmatched}", FACTOR), "spectral", "unmatched"),
        scores(control("spectral", "CLIP", f"{exact}: CLIP loss instead, on digits", FACTOR), "CLIP", "digits"),
        minimum(claim("minimum", lowest, FACTOR), "canonical"),
        minimum(control("minimum", "principal", f"{lowest}: principal components instead", FACTOR), "principal"),
        subspace(claim("spectral.subspace", f"{close}, spectral loss", FACTOR), "spectral", "digits"),
        subspace(
            control("spectral.subspace", "unmatched", f"{close}, spectral loss: {unmatched}", FACTOR),
            *("spectral", "unmatched"),
        ),
        subspace(claim("CLIP.subspace", f"{close}, CLIP", GAUSS), "CLIP", "digits"),
        subspace(control("CLIP.subspace", "unmatched", f"{close}, CLIP: {unmatched}", GAUSS), "CLIP", "unmatched"),
        correlated(claim("CLIP.scores", alike, GAUSS), "digits"),
        correlated(control("CLIP.scores", "unmatched", f"{alike}: {unmatched}", GAUSS), "unmatched"),
        gains(claim("kernel", gain, KERNEL), "kernel CCA", "digits"),
        gains(control("kernel", "unmatched", f"{gain}: {unmatched}", KERNEL), "kernel CCA", "unmatched"),
        nearer(claim("wide", wide, KERNEL), "wide spectral"),
        nearer(control("wide", "linear", f"{wide}: linear encoders", KERNEL), "linear spectral"),
        beyond_chance(claim("wide.null", chance, KERNEL), _nearness(arrays, "kernel", "wide spectral")),
        beyond_chance(control("wide.null", "untrained", f"{chance}: before training", KERNEL), untrained),
        equally_near(verify.Claim("S9.wide.CLIP", same, GAUSS, "finding")),
    ]
    if len(config.candidates) > 1:
        found += [
            farther(claim("Gaussian", f"linear CLIP {gauss}", GAUSS), "CLIP"),
            farther(control("Gaussian", "spectral", f"the spectral loss {gauss}", GAUSS), "spectral"),
            # With the pairs of the smoke preset the difference is within its interval.
            gains(claim("learnt", learnt, KERNEL), "wide spectral", "digits"),
            gains(control("learnt", "unmatched", f"{learnt}: {unmatched}", KERNEL), "wide spectral", "unmatched"),
        ]
    for k, method in itertools.product(KS, METHODS):
        name = f"retrieval@{k}.{method.replace(' ', '-')}"
        statement = f"{method} has held-out partners among its {k} best far more often than chance"
        found += [
            retrieves(claim(name, statement, RETRIEVAL), method, "digits", k),
            retrieves(control(name, "unmatched", f"{statement}: {unmatched}", RETRIEVAL), method, "unmatched", k),
        ]
    return found


def _squared_sines(angles):
    """Mean squared sine over the principal angles: 1 minus the overlap of the subspaces."""
    return np.mean(np.sin(angles) ** 2, axis=-1)


def _nearness(arrays, kind, encoders):
    """Overlap with kernel CCA or CCA at the best ridge (seeds,); wide encoders at the step chosen on validation."""
    best = np.max(arrays[f"overlap/{kind}/{encoders}/digits"], axis=-1)
    chosen = arrays.get(f"chosen/{encoders}/digits", np.zeros(len(best), int))
    return best[np.arange(len(best)), chosen]
