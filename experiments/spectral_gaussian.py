r"""S9 and S10: linear CLIP and linear InfoNCE on jointly Gaussian views, against their closed-form optima.

S9. With scores x^T M y, CLIP minus ln K tends to -Tr(M^T Sxy) + Tr(M^T Sxx M Syy) / 2 as the number K of candidates
grows, so the optimum of rank k is sum rho_i u_i v_i^T: canonical directions, weighted by the canonical correlations.
S10. With s = -|z - z'|^2 / 2, InfoNCE minus ln K tends to Tr W C W^T - ln det(I + S) / 2 - Tr[(I + S)^-1 S] / 2, so
each mode has 1 / (1 + u) = (-1 + sqrt(1 + 8 r)) / 2, with r = c / sigma where Sigma and C commute; modes with r >= 1,
where sigma - c <= 0, collapse. Both limits (`theorykit.spectral.gaussian`) are checked to rounding against integration,
CLIP's also by Monte Carlo, and both optima against encoders trained by stochastic descent on fresh pairs. Sigma and C
do not commute here, and the views of CLIP are not white.

What a finite K changes. The exact loss with K candidates, and so its optimum, is also known by integration
(`experiments._candidates`). Trained weights at the smallest K must agree with it, where the limit is off by more than
the margin. Its distance from the limit falls as 1/K, but for CLIP only while e^score has a finite relative variance,
rho < 1/sqrt 2; at rho = 0.9 it falls more slowly, and trained weights are still off at the largest K. So the statement
"CLIP at large K is CCA" needs far more candidates for strongly correlated views than for weakly correlated ones.

Controls: views that are not Gaussian. Two-valued latents give weights artanh(rho), not rho, and another limit; a
latent that is almost always zero has its correlation in rare large values, which CLIP finds too costly, so it takes a
direction of smaller canonical correlation instead. Collapse: a mode of the same run with r < 1. Rates: rho = 0.9; the
distance from the optimum for dot products in place of -|z - z'|^2 / 2.

Source: S9 and the corrections: derivation. S10: relative of Ziyin et al. 2022 (arXiv 2210.00638), derivation.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.special

from experiments import _candidates
from experiments._side_by_side import side_by_side
from theorykit import _random, losses, results, training, verify
from theorykit.spectral import compare, gaussian

DERIVED = "derivation (Gaussian integrals)"
ZIYIN = f"relative of Ziyin et al. 2022 (arXiv 2210.00638); {DERIVED}"
DIMENSION, OUTPUTS = 4, 2  # of the views, and of CLIP's encoders; InfoNCE's have as many as the views
# Correlations of the latents, and the share of the time that each is not zero; 0 stands for Gaussian, 1 for two-valued.
GAUSSIAN = (0.0,) * DIMENSION
CLIP_RUNS = {
    "gaussian": ((0.5, 0.4, 0.25, 0.0), GAUSSIAN),
    "strong": ((0.9, 0.4, 0.25, 0.0), GAUSSIAN),
    "other": ((0.5, 0.4, 0.25, 0.0), (1.0, 0.02, 1.0, 0.0)),
}
INFO_NCE_RUNS = {
    "gaussian": ((0.8, 0.5, 0.2, -0.3), GAUSSIAN),
    "single": ((0.7, -0.2, -0.4, -0.6), GAUSSIAN),
    "other": ((0.8, 0.5, 0.2, -0.3), (1.0,) * DIMENSION),
}
VARIANCES = (0.6, 0.9, 1.2, 1.5)  # eigenvalues of the covariances
NULL_DRAWS = 2000  # 1000 are the least at the level of the gate


@dataclasses.dataclass(frozen=True)
class Config:
    """Training takes `steps` batches of `rows` fresh pairs, in groups of K candidates."""

    seeds: int = 8
    candidates: tuple[int, ...] = (4, 16, 128)
    rows: int = 512
    steps: int = 400
    learning_rate: float = 0.3  # quadratic terms have curvature up to 2 x 1.6 x 1.5: stable below 0.41
    large: tuple[int, ...] = (10, 12, 14, 16, 18)  # log2 K of the exact optima
    loss_candidates: int = 1024
    loss_batches: int = 8
    identity: float = results.threshold(1e-9, "the accuracy asked for; the integrals have eleven digits")
    loss: float = results.threshold(0.02, "a fifth of the limit's own size, 0.1; the control differs by more than that")
    weights: float = results.threshold(0.03, "half of what strong correlations or other latents are off by")
    finite: float = results.threshold(0.025, "half of the distance between the optima at K = 4 and in the limit")
    angle: float = results.threshold(0.1, "a tenth of the angle between random planes in four dimensions, about 1")
    collapsed: float = results.threshold(0.02, "a tenth of the strength of the weakest mode that survives")
    slope: float = results.threshold(0.1, "a third of what tells 1/K from the slower fall at rho = 0.9")


PRESETS = {
    "smoke": Config(candidates=(4, 64), rows=384, loss_candidates=512),
    "quick": Config(),
    "full": Config(seeds=16, candidates=(4, 16, 64, 256), rows=2048, steps=1000, loss_candidates=4096),
}


def run(config: Config) -> dict[str, np.ndarray]:
    """clip/<what>/<runs> and info_nce/<what>/<runs> (seeds, candidates, ...), exact optima, integrals, Monte Carlo."""
    arrays = {"candidates": np.array(config.candidates), "large": 2 ** np.array(config.large)}
    kinds = {"clip": _clip, "info_nce": _info_nce}
    cells = [(f"{kind}-{k}", partial(train, config, k)) for kind, train in kinds.items() for k in config.candidates]
    exact = {
        "exact": partial(_exact, config),
        "integrals": _candidates.limits,
        "modes": _candidates.two_modes,
        "loss": partial(_monte_carlo, config),
    }
    cells += [(label, jax.enable_x64(True)(measure)) for label, measure in exact.items()]
    cells.append(("null", _nulls))
    found = dict(zip([label for label, _ in cells], side_by_side(results.part, cells), strict=True))
    for kind in kinds:
        columns = [found[f"{kind}-{k}"] for k in config.candidates]
        arrays |= {f"{kind}/{name}": np.stack([c[name] for c in columns], axis=1) for name in columns[0]}
    for label in exact:
        arrays |= found[label]
    return arrays | found["null"]


# Training


def _problem(config, runs, alike):
    """Runs, all seeds of one after the other: what the latents need, and the views' mixing matrices (runs, d, d)."""
    rho, support = (np.repeat(np.array(column), config.seeds, axis=0) for column in zip(*runs.values(), strict=True))
    rng = np.random.default_rng(41)
    frames = np.linalg.qr(rng.standard_normal((4, config.seeds, DIMENSION, DIMENSION)))[0]
    mixing = [q * np.sqrt(VARIANCES) @ p.swapaxes(1, 2) for q, p in (frames[:2], frames[2:])]
    a, b = (np.tile(m, (len(runs), 1, 1)) for m in (mixing[0], mixing[0] if alike else mixing[1]))
    # Thresholds on |normal|: beyond the first with probability `support`, within the second with probability |rho|.
    active = scipy.special.ndtri(1 - np.where(support > 0, support, 1) / 2)
    same = scipy.special.ndtri((1 + np.abs(rho)) / 2)
    return {"rho": rho, "support": support, "active": active, "same": same, "a": a, "b": b}


def _latents(normals, p):
    """Pairs of latents of unit variance and correlation rho, from three independent normals; p is of `_problem`.

    Either jointly Gaussian, or +-1/sqrt(support) while active and else 0, the partner being the same (up to the sign of
    rho) with probability |rho| and else another draw.
    """
    size = jnp.sqrt(jnp.where(p["support"] > 0, p["support"], 1.0))
    u, other = (jnp.where(jnp.abs(g) >= p["active"], jnp.sign(g), 0.0) / size for g in normals[:2])
    w = jnp.where(jnp.abs(normals[2]) < p["same"], jnp.sign(p["rho"]) * u, other)
    joint = p["rho"] * normals[0] + jnp.sqrt(1 - p["rho"] ** 2) * normals[1]
    return jnp.where(p["support"] > 0, u, normals[0]), jnp.where(p["support"] > 0, w, joint)


def _fresh(candidates, rows, key, problem):
    """New pairs for a step, in groups of K candidates: (runs, groups, K, d) each."""
    runs = len(problem["rho"])
    normals = _random.normal(key, (3, runs, rows // candidates, candidates, DIMENSION))
    latents = _latents(normals, {name: value[:, None, None] for name, value in problem.items() if value.ndim == 2})
    return tuple(
        jnp.einsum("rgkd,red->rgke", z, problem[m], precision="highest") for z, m in zip(latents, "ab", strict=True)
    )


def _clip_of_all_runs(params, views):
    za, zb = (jnp.einsum("rgkd,rzd->rgkz", x, w, precision="highest") for x, w in zip(views, params, strict=True))
    loss = partial(losses.clip, similarity=losses.dot)
    return jnp.sum(jnp.mean(jax.vmap(jax.vmap(loss))(za, zb), axis=1))


def _info_nce_of_all_runs(w, views):
    za, zb = (jnp.einsum("rgkd,rzd->rgkz", x, w, precision="highest") for x in views)
    half = [-jnp.sum(z * z, axis=-1, keepdims=True) / 2 for z in (za, zb)]
    one = jnp.ones_like(half[0])
    # -|a - b|^2 / 2 = (a, -|a|^2/2, 1) . (b, 1, -|b|^2/2): as a dot product it is one matrix product.
    za, zb = jnp.concatenate([za, half[0], one], axis=-1), jnp.concatenate([zb, one, half[1]], axis=-1)
    loss = partial(losses.info_nce, similarity=losses.dot)
    return jnp.sum(jnp.mean(jax.vmap(jax.vmap(loss))(za, zb), axis=1))


def _train(config, candidates, loss, problem, outputs):
    """Weights after stochastic descent with a step that falls to zero, which averages the noise out."""
    rng = np.random.default_rng(42)
    shape = (len(problem["rho"]), outputs, DIMENSION)
    params = tuple(jnp.asarray(rng.standard_normal(shape) / 4, jnp.float32) for _ in range(2))
    run = training.train(
        loss,
        params if loss is _clip_of_all_runs else params[0],
        {name: jnp.asarray(value, jnp.float32) for name, value in problem.items()},
        optimizer=optax.sgd(optax.cosine_decay_schedule(config.learning_rate, config.steps)),
        steps=config.steps,
        key=jax.random.key(43),
        augment=partial(_fresh, candidates, config.rows),
        progress=False,
    )
    return jax.tree.map(lambda w: np.asarray(w, np.float64), run.params)


def _clip(config, candidates):
    """Weights m in units of rho (seeds, k), and the largest principal angle of both views (seeds,)."""
    problem = _problem(config, CLIP_RUNS, alike=False)
    wa, wb = _train(config, candidates, _clip_of_all_runs, problem, OUTPUTS)
    found = {}
    for i, name in enumerate(CLIP_RUNS):
        weights, angles = [], []
        for r in range(i * config.seeds, (i + 1) * config.seeds):
            a, b, rho = problem["a"][r], problem["b"][r], problem["rho"][r]
            with jax.enable_x64(True):
                cov_a, cov_b = a @ a.T, b @ b.T
                best = _clip_optimum(*map(jnp.asarray, (cov_a, cov_b, a * rho @ b.T)), OUTPUTS)
                dual_a, dual_b = cov_a @ best.a_weights, cov_b @ best.b_weights
                weights.append(np.diag(dual_a.T @ wa[r].T @ wb[r] @ dual_b) / best.correlations)
                pairs = ((a.T @ wa[r].T, a.T @ best.a_weights), (b.T @ wb[r].T, b.T @ best.b_weights))
                angles.append(max(_largest_angle(*pair) for pair in pairs))
        found |= {f"weights/{name}": np.array(weights), f"angle/{name}": np.array(angles)}
    return found


# Compiled as a whole: dozens of small operations, each compiled by itself, take longer than all seeds together.
_clip_optimum = jax.jit(gaussian.clip_optimum, static_argnums=3)
_info_nce_optimum = jax.jit(gaussian.info_nce_optimum, static_argnums=2)


@jax.jit
def _angle(x, y):
    return compare.principal_angles(*(compare.orthonormal_basis(z) for z in (x, y)))[-1]


def _largest_angle(x, y):
    """Largest principal angle between column spaces, in radians."""
    return float(_angle(jnp.asarray(x), jnp.asarray(y)))


def _nulls():
    """Chance, (draws,): largest angles of random planes to a fixed one, relative errors of W^T W along random modes."""
    rng = np.random.default_rng(45)
    planes, frames = (np.linalg.qr(rng.standard_normal((NULL_DRAWS, DIMENSION, k)))[0] for k in (OUTPUTS, DIMENSION))
    cosines = np.linalg.svd(planes[:, :OUTPUTS], compute_uv=False)[:, -1]
    _, alive = _survivors("gaussian")
    u = np.pad(alive, (0, DIMENSION - len(alive)))
    grams = frames * u @ frames.swapaxes(1, 2)
    errors = np.linalg.norm(grams - np.diag(u), axis=(1, 2)) / np.linalg.norm(u)
    return {"null/angle": np.arccos(cosines), "null/gram": errors}


def _info_nce(config, candidates):
    """Strengths u (seeds, d) of the modes and, with whitened views, the relative error of W^T W (seeds,)."""
    problem = _problem(config, INFO_NCE_RUNS, alike=True)
    w = _train(config, candidates, _info_nce_of_all_runs, problem, DIMENSION)
    found = {}
    for i, name in enumerate(INFO_NCE_RUNS):
        strengths, errors = [], []
        for r in range(i * config.seeds, (i + 1) * config.seeds):
            a = problem["a"][r]
            with jax.enable_x64(True):
                half = jnp.asarray(a * (1 - problem["rho"][r]) @ a.T)
                best = _info_nce_optimum(jnp.asarray(a @ a.T), half, DIMENSION)
                strengths.append(np.sum((w[r] @ a @ a.T @ best.directions) ** 2, axis=0))
                white = a.T @ np.stack([w[r].T @ w[r], best.gram]) @ a
            errors.append(np.linalg.norm(white[0] - white[1]) / np.linalg.norm(white[1]))
        found |= {f"strengths/{name}": np.array(strengths), f"error/{name}": np.array(errors)}
    return found


# Theory, in float64


def _survivors(name):
    """Correlations and limiting strengths of the modes that do not collapse."""
    rho = np.array([r for r in INFO_NCE_RUNS[name][0] if r > 0])
    return rho, np.asarray(gaussian.info_nce_strengths(jnp.asarray(1 - rho)))


def _exact(config):
    """Exact optima in units of the limit's: (candidates, k) at training's K, (large,) of one mode at large K."""
    found = {}
    for name in ("gaussian", "strong"):
        rho = np.array(CLIP_RUNS[name][0][:OUTPUTS])
        at = [_candidates.optimum(_candidates.clip_loss, rho, rho, k) for k in config.candidates]
        found[f"exact/clip/{name}"] = np.array(at) / rho
        at = [_candidates.optimum(_candidates.clip_loss, rho[:1], rho[:1], 2**k) for k in config.large]
        found[f"large/clip/{name}"] = np.array(at)[:, 0] / rho[0]
    rho, limit = _survivors("single")
    for what, ks in (("exact", config.candidates), ("large", [2**k for k in config.large])):
        at = [_candidates.optimum(_candidates.info_nce_loss, limit, rho, k) for k in ks]
        found[f"{what}/info_nce/single"] = np.array(at) / limit if what == "exact" else np.array(at)[:, 0] / limit
    return found


def _monte_carlo(config):
    """CLIP minus ln K of scores that are not the optimum, (seeds,), for Gaussian and for other latents; its limit."""
    rng = np.random.default_rng(44)
    rho, shape = np.array([0.5, 0.3, 0.1, 0.0]), (config.loss_batches, config.loss_candidates, DIMENSION)
    frames = np.linalg.qr(rng.standard_normal((2, DIMENSION, DIMENSION)))[0]
    score = frames[0] * [0.6, 0.5, 0.3, 0.1] @ frames[1].T  # canonical weights below 1/sqrt 2
    loss = jax.jit(jax.vmap(lambda u, w: losses.clip(u @ score, w, similarity=losses.dot)))
    found = {}
    for name, support in (("gaussian", 0.0), ("other", 0.05)):
        active = scipy.special.ndtri(1 - (support or 1) / 2)
        p = {"rho": rho, "support": np.full(DIMENSION, support), "active": active}
        p["same"] = scipy.special.ndtri((1 + rho) / 2)
        values = [np.mean(loss(*_latents(rng.standard_normal((3, *shape)), p))) for _ in range(config.seeds)]
        found[f"loss/{name}"] = np.array(values) - np.log(config.loss_candidates)
    eye = jnp.eye(DIMENSION)
    return found | {"loss/limit": np.asarray(gaussian.clip_limit(jnp.asarray(score), eye, eye, jnp.diag(rho)))}


def verdicts(config: Config, arrays: dict[str, np.ndarray]) -> list[verify.Verdict]:
    """The limits, the trained optima, what finite K changes, and its rate; each with its control."""
    found = []
    for s, kind, source in (("S9", "clip", DERIVED), ("S10", "info_nce", ZIYIN)):
        check = partial(verify.identity, rtol=config.identity)
        closed = arrays[f"integral/{kind}/closed"]
        sides = [(arrays[f"integral/{kind}/{name}"], closed) for name in ("gaussian", "other")]
        statement = "the loss minus ln K at infinite K is the closed form, by integration"
        found += _pair(check, f"{s}.integral", statement, source, sides[0], {"two-valued latents": sides[1]})

        trained = partial(verify.agreement, predicted=1.0, margin=config.finite)
        if s == "S9":
            name, first = "gaussian", arrays["clip/weights/gaussian"][:, 0]
        else:
            name, first = "single", _first_strengths(arrays)
        sides = [(np.mean(first / by, axis=1),) for by in (arrays[f"exact/{kind}/{name}"][0], 1.0)]
        statement = f"trained with K = {config.candidates[0]} candidates, over the exact optimum at that K"
        found += _pair(trained, f"{s}.finite", statement, DERIVED, sides[0], {"over the limit": sides[1]})

        fall = partial(verify.rate, predicted=-1.0, margin=config.slope, deterministic=True)
        distance = np.abs(arrays[f"large/{kind}/{name}"] - 1)
        if s == "S9":
            why, other = "rho = 0.9, beyond 1/sqrt 2", np.abs(arrays["large/clip/strong"] - 1)
        else:
            rho, limit = _survivors("single")
            why, other = "from the optimum for dot products", np.abs(arrays["large/info_nce/single"] - rho / limit)
        statement = "the exact optimum approaches the limit as 1/K"
        sides = [(arrays["large"], y) for y in (distance, other)]
        found += _pair(fall, f"{s}.rate", statement, DERIVED, sides[0], {why: sides[1]})
    return found + _clip_verdicts(config, arrays) + _info_nce_verdicts(config, arrays)


def _clip_verdicts(config, arrays):
    last = config.candidates[-1]
    monte_carlo = partial(verify.agreement, margin=config.loss)
    sides = [(arrays[f"loss/{name}"], float(arrays["loss/limit"])) for name in ("gaussian", "other")]
    statement = (
        f"the loss minus ln K of any bilinear scores is the closed form, Monte Carlo with K = {config.loss_candidates}"
    )
    found = _pair(monte_carlo, "S9.loss", statement, DERIVED, sides[0], {"latents that are mostly zero": sides[1]})

    near = partial(verify.agreement, predicted=0.0, side="at_most")
    off = {name: (np.max(np.abs(arrays[f"clip/weights/{name}"][:, -1] - 1), axis=1),) for name in CLIP_RUNS}
    statement = f"trained with K = {last}, every canonical weight is its rho_i"
    controls = {"views that are not Gaussian": off["other"], "rho_1 = 0.9": off["strong"]}
    found += _pair(partial(near, margin=config.weights), "S9.weights", statement, DERIVED, off["gaussian"], controls)

    angle = {name: (arrays[f"clip/angle/{name}"][:, -1],) for name in CLIP_RUNS}
    statement = f"trained with K = {last}, both encoders span the canonical directions: largest principal angle"
    controls = {"views that are not Gaussian": angle["other"]}
    found += _pair(partial(near, margin=config.angle), "S9.angle", statement, DERIVED, angle["gaussian"], controls)
    statement = f"trained with K = {last}, both encoders are nearer to the canonical directions than 99.9% of planes"
    check = partial(verify.separation, null=arrays["null/angle"], direction="less")
    return found + _pair(check, "S9.null", statement, DERIVED, angle["gaussian"], controls)


def _info_nce_verdicts(config, arrays):
    check = partial(verify.identity, rtol=config.identity)
    sides = [(arrays[f"two modes/{name}"], arrays["two modes/closed"]) for name in ("optimum", "commuting")]
    statement = "two modes, Sigma and C do not commute: the loss of the optimum is the closed form, by integration"
    why = {"modes c_i / sigma_i along the axes of Sigma": sides[1]}
    integral = _pair(check, "S10.optimum", statement, ZIYIN, sides[0], why)

    last = config.candidates[-1]
    near = partial(verify.agreement, predicted=0.0, side="at_most")
    error = {name: (arrays[f"info_nce/error/{name}"][:, -1],) for name in ("gaussian", "other")}
    statement = f"trained with K = {last}, W^T W is that of the limit: relative error in Frobenius norm, views whitened"
    controls = {"views that are not Gaussian": error["other"]}
    check = partial(near, margin=config.weights)
    found = _pair(check, "S10.strengths", statement, ZIYIN, error["gaussian"], controls)

    statement = f"trained with K = {last}, W^T W is nearer to that of the limit than 99.9% of those along random modes"
    check = partial(verify.separation, null=arrays["null/gram"], direction="less")
    found += _pair(check, "S10.null", statement, ZIYIN, error["gaussian"], controls)

    statement = f"trained with K = {last}, the mode with r >= 1 (b <= 0) collapses"
    u, alive = arrays["info_nce/strengths/gaussian"][:, -1], len(_survivors("gaussian")[0])
    controls = {"the mode with r = 0.8": (u[:, alive - 1],)}
    check = partial(near, margin=config.collapsed)
    return integral + found + _pair(check, "S10.collapse", statement, ZIYIN, (u[:, alive],), controls)


def _first_strengths(arrays):
    """Trained strength of the one survivor at the smallest K, in units of the limit, (seeds, 1)."""
    _, limit = _survivors("single")
    return arrays["info_nce/strengths/single"][:, 0, :1] / limit


def _pair(check, name, statement, source, sides, controls):
    """Verdicts of a claim and of its controls, by one check: {why: sides}."""
    claim = verify.Claim(name, statement, source)
    found = [check(claim, *sides)]
    for i, (why, broken) in enumerate(controls.items()):
        label = f"{name}.control" if i == 0 else f"{name}.control{i + 1}"
        found.append(check(verify.Claim(label, f"{statement}: {why}", source, "control", name), *broken))
    return found
