r"""MI: variational lower bounds of mutual information against its exact value: ln K cap, slacks, variance, training.

Exactly, on random finite joints: InfoNCE is at most min(I, ln K); its best value I_K is within ln(1 + chi^2/K) of I
(T1); what DV and NWJ lose is a divergence in closed form; NWJ <= DV <= I - S. The bound between NWJ and InfoNCE is at
most 1 + ln(K/alpha), and not ln(K/alpha).

By Monte Carlo with the exact critic, on Gaussian pairs in four dimensions: the cap; NWJ is unbiased; DV is too on large
batches, but on small ones its mean is above I, so that it is no lower bound. Noise that the exact log ratio of the
pairs shares with the estimate is subtracted, which changes no mean.

Variance of NWJ with the exact critic: Var_P(ln r)/n + (chi^2 + xi) / (n (n - 1)), exponential in I. The rate is 2 for
Gaussian pairs, where chi^2 + 1 = e^2I, and 1, the least of all families, for X = Y, where it is e^I. That of InfoNCE
is at most ln^2 K. The pairs of this part are weakly dependent in many dimensions: a sample variance needs a fourth
moment of r, which exists for rho < 1/3 only. Beyond, rare pairs carry the law, and measured variances lie below it.

Trained by the ordinary loop: on fresh Gaussian pairs critics with two encoders by InfoNCE, and networks of both inputs
by MINE, NWJ and the interpolated bound; on a finite family, X = Y with noise, a table by each of the four, whose value
is then exact. At I = 3.3 the trained networks fall short of I, by 0.1 nats (MINE) to 0.4 (NWJ) at quick, for a reason
that is not isolated here; what holds is that MINE passes the cap ln K of InfoNCE. Between its ends the interpolated
bound is largest not quite at ln r, so that a trained table may lie above that (by 0.003 and 0.016 nats for the two
noises).

Sources: by statement.
"""

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from experiments._claims import pair
from experiments._joints import table
from experiments._mi_critics import DIMENSION, GROUP, draw, trained
from experiments._side_by_side import BRIEFLY, side_by_side
from theorykit import results, verify
from theorykit.surrogate import mutual_information as mi
from theorykit.surrogate.information_loss import sufficiency
from theorykit.surrogate.joint import chi_square, identical, mutual_information
from theorykit.surrogate.risk import optimal_score

DERIVED = "derivation"
OORD, POOLE = "van den Oord et al. (arXiv 1807.03748)", "Poole et al. (arXiv 1905.06922)"
NGUYEN, DONSKER = "Nguyen et al. (arXiv 0809.0853)", "Donsker, Varadhan 1983; Belghazi et al. (arXiv 1801.04062)"
SONG = "Song, Ermon (arXiv 1910.06222); law and rates: derivation"
ALPHABET = 6
CONCENTRATIONS = (0.02, 0.2, 1.0)  # from I near ln 6 to I near 0
SMALL = 1e-4  # nats, of what a bound loses
WEIGHT, FEW = 0.5, 2  # alpha and K of the interpolated bound
CANDIDATES = (2, 8, 64, 512)
CORRELATIONS = (0.2, 0.4, 0.6, 0.7, 0.8, 0.9, 0.95)
MODERATE = 3  # index of rho = 0.7: I = 1.35 exceeds ln 2, and the fourth moment is not yet out of hand
# The variance: batches of n pairs; Gaussian correlations in many dimensions, see above, and sizes of X = Y.
ROWS, MANY = 4, 16
WEAK = (0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5)
# The first of them have a light enough fourth moment of r for a sample variance (relative error about e^4I over the
# root of the number of batches), or third moment for a mean of r over positive pairs; the rest is for the figure.
FOURTH, THIRD = 3, 5
SYMBOLS = (4, 8, 16, 32, 64)


@dataclasses.dataclass(frozen=True)
class Config:
    """Numbers of joints, seeds, pairs and steps."""

    joints: int = 1000
    seeds: int = 8
    pairs: int = 4096
    batches: int = 16384
    steps: int = 800
    learning_rate: float = 0.05
    evaluations: int = 128
    exact: float = results.threshold(1e-10, "the accuracy asked for of identities in float64; roundings are 1e-13")
    noise: float = results.threshold(0.02, "nats; at small I the bound is reached up to chi^2/2K, less than the noise")
    mean: float = results.threshold(0.03, "nats; a tenth of 1/e, what a critic without its constant is off by")
    law: float = results.threshold(0.1, "relative; the variance itself grows by a hundred over the families")
    slope: float = results.threshold(0.15, "a sixth of the difference between the two families' rates, 2 and 1")
    trained: float = results.threshold(0.1, "nats; a sixth of what a critic without |y|^2 misses at rho = 0.9")


PRESETS = {
    "smoke": Config(joints=48, pairs=1024, batches=2048, steps=400, evaluations=48),
    "quick": Config(),
    "full": Config(joints=10000, seeds=16, pairs=16384, batches=65536, steps=4000, evaluations=512),
}


def run(config: Config) -> dict[str, np.ndarray]:
    """exact/..., gaussian/... (seeds, correlations, ...), variance/... (seeds, points) and trained/... (seeds, rho)."""
    measures = {"trained": trained, "gaussian": _gaussian, "variance": _variance, "exact": _exact}
    found = side_by_side(results.part, [(label, partial(measure, config)) for label, measure in measures.items()])
    return {name: values for part in found for name, values in part.items()}


# Finite joints, exactly


@jax.enable_x64(True)
def _exact(config):
    rng, joints, scores = np.random.default_rng(0), [], []
    for i in range(config.joints):
        concentration, deviation = CONCENTRATIONS[i % 3], (0.0, 0.3, 1.0, 3.0)[i % 4]
        joints.append(table(rng, ALPHABET, ALPHABET, concentration, zeros=0.3 * (i % 2)))
        scores.append(deviation * rng.standard_normal((ALPHABET, ALPHABET)))
    counts = jnp.asarray(CANDIDATES)

    def measure(instance):
        joint, noise = instance
        best = optimal_score(joint)
        # Where P = 0 the best score is -inf; a finite one in its place makes the noisy score an ordinary one.
        score = jnp.maximum(best, -5.0) + noise
        p, q = jnp.sum(joint, axis=1), jnp.sum(joint, axis=0)
        normaliser = jnp.exp(score) @ q
        risks = lambda s: jax.lax.map(lambda k: mi.info_nce(joint, s, k), counts)  # noqa: E731
        of_best, of_score = jax.lax.map(risks, jnp.stack([best, score]))
        return {
            "information": mutual_information(joint),
            "chi_square": chi_square(joint),
            "best": of_best,
            "info_nce": of_score,
            "donsker_varadhan": mi.donsker_varadhan(joint, score),
            "donsker_varadhan_best": mi.donsker_varadhan(joint, best),
            "donsker_varadhan_slack": mi.donsker_varadhan_slack(joint, score),
            "nwj": mi.nwj(joint, score + 1),
            "nwj_slack": mi.nwj_slack(joint, score + 1),
            "nwj_slack_without_1": mi.nwj_slack(joint, score),
            "sufficiency": sufficiency(joint, score),
            "rows": jnp.sum(p * (jnp.log(p @ normaliser) - jnp.log(normaliser))),
            "interpolated": mi.interpolated(joint, score, FEW, WEIGHT),
        }

    program = jax.jit(partial(jax.lax.map, measure), compiler_options=BRIEFLY)
    found = program((jnp.asarray(np.stack(joints)), jnp.asarray(np.stack(scores))))
    top = jax.jit(_nearly_capped, compiler_options=BRIEFLY)()
    return {f"exact/{name}": np.asarray(value) for name, value in found.items()} | {"exact/top": np.asarray(top)}


def _nearly_capped():
    """The interpolated bound of X = Y on 256 symbols, with matches scored far up."""
    rare = identical(256)
    return mi.interpolated(rare, jnp.where(rare > 0, 30.0, -jnp.inf), FEW, WEIGHT)


# Gaussian pairs, exact critic


def _cells(config, values):
    """Key and value of every cell, seeds first, for `lax.map`."""
    keys = jax.random.split(jax.random.key(2), config.seeds * len(values))
    return keys, jnp.asarray(np.tile(values, config.seeds), jnp.float32)


def _measured(config, prefix, measure, values):
    found = jax.jit(partial(jax.lax.map, measure))(_cells(config, values))
    return {
        f"{prefix}/{name}": np.asarray(value).reshape(config.seeds, len(values), *value.shape[1:])
        for name, value in found.items()
    }


def _informations(correlations, dimension):
    of_one = jax.vmap(lambda rho: mi.gaussian_information(rho, dimension))
    return np.asarray(jax.jit(of_one)(jnp.asarray(correlations)))


def _gaussian(config):
    """Estimates less the noise of the pairs' own log ratios, whose mean is I."""

    def measure(cell):
        key, rho = cell
        x, y = draw(key, rho, config.pairs, DIMENSION)
        info_nce, others = [], {}
        for k in CANDIDATES:
            batches = (z.reshape(-1, k, DIMENSION) for z in (x, y))
            scores = jax.vmap(partial(mi.gaussian_log_ratio, correlation=rho))(*batches)
            own = jnp.mean(jnp.diagonal(scores, axis1=1, axis2=2)) - mi.gaussian_information(rho, DIMENSION)
            # Where ln K caps the estimate, it does not share the noise.
            capped = math.log(k) < mi.gaussian_information(rho, DIMENSION)
            info_nce.append(jnp.mean(mi.estimate_info_nce(scores)) - jnp.where(capped, 0.0, own))
            others[k] = jnp.mean(mi.estimate_donsker_varadhan(scores)) - own
        return {
            "info_nce": jnp.stack(info_nce),
            "donsker_varadhan": others[CANDIDATES[-1]],
            "donsker_varadhan_small": others[CANDIDATES[0]],
            "nwj": jnp.mean(mi.estimate_nwj(scores + 1)) - own,
            "nwj_without_1": jnp.mean(mi.estimate_nwj(scores)) - own,
        }

    return _measured(config, "gaussian", measure, CORRELATIONS) | {
        "gaussian/information": _informations(CORRELATIONS, DIMENSION)
    }


# Variance


def _moments(scores):
    return {
        "nwj": jnp.var(mi.estimate_nwj(scores + 1), ddof=1),
        "info_nce": jnp.var(mi.estimate_info_nce(scores), ddof=1),
        "second": jnp.mean(jnp.exp(jnp.diagonal(scores, axis1=1, axis2=2))),  # E_P r = E_pq r^2
    }


def _variance(config):
    def gaussian(cell):
        key, rho = cell
        x, y = draw(key, rho, config.batches, ROWS, MANY)
        return _moments(jax.vmap(partial(mi.gaussian_log_ratio, correlation=rho))(x, y))

    def symbols(cell):
        key, log_size = cell
        size = jnp.round(jnp.exp(log_size)).astype(jnp.int32)
        x = jax.random.randint(key, (config.batches, ROWS), 0, size)
        return _moments(jnp.where(x[:, :, None] == x[:, None, :], log_size, -jnp.inf))

    arrays = _measured(config, "variance/gaussian", gaussian, WEAK)
    arrays |= _measured(config, "variance/symbols", symbols, np.log(np.array(SYMBOLS, np.float32)))
    rho, sizes = jnp.asarray(WEAK), jnp.asarray(SYMBOLS)
    # X = Y in a table that is large enough for all sizes: one shape, one program.
    places = jnp.arange(SYMBOLS[-1])
    joint = lambda n: jnp.diag(jnp.where(places < n, 1 / n, 0.0))  # noqa: E731
    laws = {
        "gaussian": jax.jit(jax.vmap(lambda rho: mi.gaussian_nwj_variance(rho, MANY, ROWS)), compiler_options=BRIEFLY),
        "symbols": jax.jit(partial(jax.lax.map, lambda n: mi.nwj_variance(joint(n), ROWS)), compiler_options=BRIEFLY),
    }
    arrays |= {f"variance/{f}/law": np.asarray(laws[f](x)) for f, x in (("gaussian", rho), ("symbols", sizes))}
    arrays["variance/gaussian/information"] = _informations(WEAK, MANY)
    return arrays | {"variance/symbols/information": np.log(SYMBOLS)}


# Verdicts


def verdicts(config: Config, arrays: dict[str, np.ndarray]) -> list[verify.Verdict]:
    """Exact slacks and caps, estimates with the exact critic, variance, trained critics; each with its control."""
    return (
        _exact_verdicts(config, arrays)
        + _gaussian_verdicts(config, arrays)
        + _variance_verdicts(config, arrays)
        + _trained_verdicts(config, arrays)
    )


def _pair(check, name, statement, source, sides, why, broken):
    return pair(check, name, statement, source, sides, (why, broken))


def _exact_verdicts(config, arrays):
    a = {name.split("/")[1]: value for name, value in arrays.items() if name.startswith("exact/")}
    information, log_k = a["information"][:, None], np.log(CANDIDATES)
    # Exact values of a few nats, and sums of their differences; a bound relative to a tiny limit would ask too much.
    bound = partial(verify.bound, margin=config.exact)
    limit = np.minimum(information, log_k)
    every = np.concatenate([np.ravel(a["best"]), np.ravel(a["info_nce"])]), np.tile(np.ravel(limit), 2)
    uncapped = np.broadcast_to(a["donsker_varadhan_best"][:, None], limit.shape).ravel(), limit.ravel()
    found = _pair(
        bound, "MI.cap", "InfoNCE of any score is at most min(I, ln K)", OORD, every, "DV, which has no cap", uncapped
    )
    room = np.log1p(a["chi_square"][:, None] / np.array(CANDIDATES))
    gaps = [(information - value).ravel() for value in (a["best"], 0 * a["best"])]
    statement = "the best InfoNCE is within ln(1 + chi^2/K) of I"
    found += _pair(
        bound, "MI.gap", statement, DERIVED, (gaps[0], room.ravel()), "a constant score", (gaps[1], room.ravel())
    )

    def same(claim, left, right):
        # Every joint counts alike, from losses on that differences of informations show to ten digits.
        size = np.maximum(np.maximum(np.abs(left), np.abs(right)), SMALL)
        return verify.identity(claim, left / size, right / size, rtol=config.exact)

    lost = a["information"] - a["donsker_varadhan"]
    sides = lost, a["sufficiency"] + a["rows"]
    statement = "DV loses the sufficiency and KL(p || p Z / E Z)"
    found += _pair(same, "MI.dv", statement, DERIVED, sides, "the sufficiency alone", (lost, a["sufficiency"]))
    lost = a["information"] - a["nwj"]
    statement = "NWJ loses E_pq[r ln(r/v) - r + v], v = e^(s-1)"
    sides, broken = ((lost, a[name]) for name in ("nwj_slack", "nwj_slack_without_1"))
    found += _pair(same, "MI.nwj", statement, DERIVED, sides, "v = e^(s-2)", broken)
    limiting = a["information"] - a["sufficiency"]
    chain = np.concatenate([a["nwj"], a["donsker_varadhan"]]), np.concatenate([a["donsker_varadhan"], limiting])
    few = (
        np.concatenate([a["nwj"], a["donsker_varadhan"]]),
        np.concatenate([a["donsker_varadhan"], a["info_nce"][:, 0]]),
    )
    statement = "NWJ <= DV <= the limit I - S of InfoNCE"
    found += _pair(bound, "MI.order", statement, DERIVED, chain, "InfoNCE with two candidates, not many", few)
    value = np.append(a["interpolated"], a["top"])
    cap, information = math.log(FEW / WEIGHT), np.append(a["information"], math.log(256))
    sides, broken = ((value, np.minimum(information, limit)) for limit in (1 + cap, cap))
    statement = "the interpolated bound is at most min(I, 1 + ln(K/alpha))"
    source = f"{POOLE}; the cap: {DERIVED}"
    return found + _pair(bound, "MI.interpolated", statement, source, sides, "ln(K/alpha)", broken)


def _gaussian_verdicts(config, arrays):
    a = {name.split("/")[1]: value for name, value in arrays.items() if name.startswith("gaussian/")}
    information = a["information"].astype(np.float64)
    limit = np.minimum(information[:, None], np.log(CANDIDATES)).ravel()
    uncapped = np.broadcast_to(a["nwj"][..., None], a["info_nce"].shape)
    statement = "InfoNCE of Gaussian pairs is on average at most min(I, ln K), exact critic"
    sides, broken = ((value.reshape(config.seeds, -1), limit) for value in (a["info_nce"], uncapped))
    bound = partial(verify.bound, margin=config.noise)
    found = _pair(bound, "MI.gaussian_cap", statement, OORD, sides, "NWJ, which has no cap", broken)

    moderate = {name: value[:, MODERATE] for name, value in a.items() if name != "information"}
    exact = float(information[MODERATE])
    agree = partial(verify.agreement, predicted=exact, margin=config.mean)
    statement = f"NWJ with the critic 1 + ln r is I on average, rho = {CORRELATIONS[MODERATE]}"
    sides = (moderate["nwj"],), (moderate["nwj_without_1"],)
    found += _pair(agree, "MI.nwj_mean", statement, NGUYEN, sides[0], "the critic ln r", sides[1])
    statement = f"DV with the exact critic is I on average, batches of {CANDIDATES[-1]}"
    sides = (moderate["donsker_varadhan"],), (moderate["donsker_varadhan_small"],)
    found += _pair(agree, "MI.dv_mean", statement, DONSKER, sides[0], f"batches of {CANDIDATES[0]}", sides[1])
    small = moderate["donsker_varadhan_small"][:, None]
    finding = verify.Claim(
        "MI.dv_batch", f"DV of a batch of {CANDIDATES[0]} is on average a lower bound of I", DONSKER, "finding"
    )
    found.append(verify.bound(finding, small, exact))
    statement = f"DV of a batch of {CANDIDATES[0]} with the exact critic is on average at least I"
    above = lambda claim, value: verify.bound(claim, 0 * value + exact, value)  # noqa: E731
    capped = moderate["info_nce"][:, 0][:, None]
    why = "InfoNCE with as many candidates"
    return found + _pair(above, "MI.dv_above", statement, f"{DERIVED} (Jensen)", (small,), why, (capped,))


def _variance_verdicts(config, arrays):
    a = {name.removeprefix("variance/"): value for name, value in arrays.items() if name.startswith("variance/")}
    families = {"gaussian": slice(FOURTH), "symbols": slice(None)}
    both = {n: [a[f"{f}/{n}"][..., cut] for f, cut in families.items()] for n in ("nwj", "info_nce", "law")}
    law = np.concatenate(both["law"])
    nwj, info_nce = (np.concatenate(both[name], axis=1) for name in ("nwj", "info_nce"))
    agree = partial(verify.agreement, predicted=1.0, margin=config.law)
    statement = "Var NWJ with the exact critic is Var(ln r)/n + (chi^2 + xi)/(n(n-1)), as a quotient"
    sides = [(np.mean(value / law, axis=1),) for value in (nwj, info_nce)]
    found = _pair(agree, "MI.variance", statement, DERIVED, sides[0], "the variance of InfoNCE", sides[1])

    fit = partial(verify.rate, predicted=2.0, margin=config.slope, law="exponential")
    cuts = ("gaussian", slice(THIRD)), ("symbols", slice(None))
    sides = [(a[f"{f}/information"][cut], a[f"{f}/second"][:, cut]) for f, cut in cuts]
    statement = "E r^2, on which Var NWJ rests, is e^2I for Gaussian pairs"
    found += _pair(fit, "MI.rate", statement, SONG, sides[0], "X = Y, where it is e^I", sides[1])

    least = partial(verify.rate, predicted=1.0, margin=config.slope, law="exponential", side="at_least")
    sides = [(a["symbols/information"], a[f"symbols/{name}"]) for name in ("nwj", "info_nce")]
    statement = "Var NWJ grows at least as e^I for X = Y"
    found += _pair(least, "MI.growth", statement, SONG, sides[0], "the variance of InfoNCE", sides[1])

    statement = f"Var InfoNCE with the exact critic is at most ln^2 K, K = {ROWS}"
    sides = [(value, math.log(ROWS) ** 2) for value in (info_nce, nwj)]
    return found + _pair(verify.bound, "MI.bounded", statement, DERIVED, sides[0], "the variance of NWJ", sides[1])


def _trained_verdicts(config, arrays):
    a = {name.split("/")[1]: value for name, value in arrays.items() if name.startswith("trained/")}
    agree = partial(verify.agreement, predicted=0.0, margin=config.trained)
    short = [(np.max(a["exact"] - a[name], axis=1),) for name in ("separable", "bilinear")]
    statement = f"InfoNCE trained with K = {GROUP} is that of the exact critic, rho = 0.6 and 0.9"
    found = _pair(agree, "MI.trained", statement, OORD, short[0], "a bilinear critic, without |y|^2", short[1])

    capped = [(a[name][:, 1:], math.log(GROUP)) for name in ("separable", "mine")]
    statement = "a trained InfoNCE estimate stays below ln K where I is larger"
    found += _pair(verify.bound, "MI.trained_cap", statement, OORD, capped[0], "trained MINE", capped[1])

    for name, label, source in (("mine", "MINE", DONSKER), ("nwj", "NWJ", NGUYEN)):
        reached = [(a[kind][:, 0] - a["own"][:, 0],) for kind in (name, f"{name}_untrained")]
        statement = f"trained {label}, less the log ratio of the same pairs, is 0 on average, rho = 0.6"
        found += _pair(agree, f"MI.trained_{name}", statement, source, reached[0], "before training", reached[1])
    ends = ("interpolated", "interpolated_untrained")
    reached = [(a[kind][:, 0] - a["interpolated_exact"][:, 0],) for kind in ends]
    statement = "a trained interpolated bound, less that of the exact critic on the same pairs, is 0, rho = 0.6"
    found += _pair(agree, "MI.trained_interpolated", statement, POOLE, reached[0], "before training", reached[1])

    # Largest shortfall of the four bounds and two noises: of the tables trained by each, of that by InfoNCE in all.
    short = a["tables"][..., 2:] - a["tables"][..., :2]
    own, other = np.max(short, axis=(1, 2)).T
    agree = partial(verify.agreement, predicted=0.0, margin=config.mean)
    statement = "tables trained by InfoNCE, MINE, NWJ and the interpolated bound reach it at ln r, X = Y with noise"
    return found + _pair(
        agree, "MI.tables", statement, POOLE, (own,), "all by InfoNCE, which leaves c(x) free", (other,)
    )
