r"""T2', T4, T5: three readings of "the sufficiency is at most the contrastive loss", S <= L1.

    excess                   S <= Excess_K is false at every finite K: the ratio of the two is measured
    excess with a factor     S <= C Excess_K with C from bounds on r and w; two constants, and how loose they are
    raw risk                 S <= R_K once K >= B' e^I; for a constant score if and only if K >= e^I

over random joints with empty cells and finite scores, in float64. B bounds r and w from above, 1/B' bounds w from
below. C has no form without B: for X = Y on N symbols and a constant score, S = ln N while Excess_K <= ln K (T5).

What the proof of `bounds.ceiling_factor` rests on is checked too: Excess_K / (K - 1) does not rise with K. How far its
order is from best: scores near the best one, with r and w near B on a set of mass 1/B and 0 elsewhere, have

    Excess_K / S = E[N / (1 + N)] = 1 - (B/K) (1 - (1 - 1/B)^K),   N ~ Bin(K - 1, 1/B)

in the limit, and no joint was found below that, which is reported as a measurement and not proved.

Controls: constants that know no bound on r and w (B = B' = 1); an excess over a score that is not the minimiser; too
few candidates; a criterion for constant scores used for others; scores that are not near the best one; clusters in
place of symbols.

Sources: by statement, in `SOURCES`.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from scipy.optimize import brentq
from scipy.special import xlogy
from scipy.stats import binom

from experiments import _joints
from theorykit import results, surrogate, verify
from theorykit.surrogate import bounds

SOURCES = {
    "T2'": "derivation",
    "T4": "derivation; S <= L1 after Oko et al. (arXiv 2501.04641)",
    "T5": "derivation",
}
SYMBOLS = 24  # of the joints near X = Y
EXACT = 19.8  # e^I of one of them: S <= R_K fails at 19 candidates and holds at 20
MASSES = (1 / 2, 1 / 8, 1 / 64)  # of the set that carries the extremal scores
NEAR, FAR = 0.01, 0.9  # relative distance of w from r there
GROWING = tuple(10.0 ** np.arange(4, 13, 2))  # alphabets of T5: the term of order K/N is below 1/100
FLAT = (2, 4, 16, 64)  # candidates at X = Y
LISTED = (2, 4, 16)  # candidates at which E ln sum w is enumerated


@dataclasses.dataclass(frozen=True)
class Config:
    """Numbers of joints and candidates."""

    joints: int = 1500
    flat: int = 200
    candidates: tuple[int, ...] = (2, 4, 8, 16, 64, 256, 1024, 16384)
    exact: float = results.threshold(1e-10, "required of identities; risks of order 10 have errors of 2e-15")
    rounding: float = results.threshold(1e-10, "shares of S: risks to 1e-15 over S, which is at least 1e-5")
    near: float = results.threshold(1e-3, "terms of order NEAR^2 = 1e-4 with a coefficient of a few")
    slope: float = results.threshold(0.01, "ln K / N at the smallest N is below 1e-3; the rest is exact")


PRESETS = {
    "smoke": Config(joints=250, flat=40, candidates=(2, 4, 16, 64, 1024, 16384)),
    "quick": Config(),
    "full": Config(joints=20000, flat=2000),
}


def run(config: Config) -> dict[str, np.ndarray]:
    """random/<field> (joints, K), local/<field>, at threshold/<field>; flat/...; identical/...; growing/..."""
    with jax.enable_x64(True):
        arrays = results.part("random", lambda: _random(config))
        arrays |= results.part("flat", lambda: _flat(config))
    growth = {"symbols": [exact_excess(GROWING, k) for k in FLAT], "clusters": [exact_excess(2, k) for k in FLAT]}
    arrays["growing/symbols"] = np.log(GROWING) / np.array(growth["symbols"])
    arrays["growing/clusters"] = np.log(2) / np.broadcast_to(
        np.array(growth["clusters"]), arrays["growing/symbols"].shape
    )
    return arrays | {"candidates": np.array(config.candidates)}


def exact_excess(symbols, candidates: int) -> np.ndarray:
    """Excess_K of a constant score for X = Y uniform on N symbols: ln K - E ln(1 + Bin(K - 1, 1/N))."""
    others = np.arange(candidates)
    chance = binom.pmf(others, candidates - 1, 1 / np.atleast_1d(symbols)[:, None])
    return np.log(candidates) - chance @ np.log1p(others)


def _random(config):
    rng = np.random.default_rng(1)
    joint, score, _ = _joints.draw(rng, config.joints)
    p, q = joint.sum(axis=2, keepdims=True), joint.sum(axis=1, keepdims=True)
    ratio = np.divide(joint, p * q, out=np.ones_like(joint), where=p * q > 0)
    # Half of the scores are near the best one, with a tenth in place of empty cells.
    near = (np.arange(config.joints) // 2 % 2 == 0)[:, None, None]
    score = np.where(near, np.log(ratio + 0.1) + 0.3 * score, score)
    conditional = np.log(joint / np.where(p > 0, p, 1), out=np.full_like(joint, -np.inf), where=joint > 0)
    enough, listed = np.empty(config.joints), np.empty((config.joints, len(LISTED)))
    information = np.empty(config.joints)
    for i in range(config.joints):
        nx, ny = _joints.SIZES[i % len(_joints.SIZES)]
        cell = joint[i, :nx, :ny], score[i, :nx, :ny]
        _, _, r, w = _joints.ratios(*cell)
        information[i] = np.sum(xlogy(cell[0], r))
        enough[i] = np.ceil(np.exp(information[i]) / np.min(w))
        for column, k in enumerate(LISTED):
            rows, chance, m_r, m_w = _joints.candidate_means(*cell, k)
            listed[i, column] = rows @ (m_r * np.log(k * m_w)) @ chance
    counts = np.broadcast_to(np.array(config.candidates, float), (config.joints, len(config.candidates)))
    random = joint, score, np.concatenate([counts, enough[:, None]], axis=1)
    other = joint, conditional, random[2]
    local = _local(np.concatenate([config.candidates, config.candidates[-1:]]))
    sizes = np.cumsum([config.joints, config.joints])
    batch = [jnp.asarray(np.concatenate(parts)) for parts in zip(random, other, local, strict=True)]
    arrays = {"enough": enough, "listed": listed, "information": information}
    for name, values in _chains(*batch).items():
        first, second, third = np.split(np.asarray(values), sizes)
        if values.ndim == 1:
            arrays |= {f"random/{name}": first, f"local/{name}": third}
            continue
        arrays |= {f"random/{name}": first[:, :-1], f"local/{name}": third[:, :-1], f"threshold/{name}": first[:, -1]}
        if name == "risk":
            arrays["conditional/risk"] = second[:, :-1]
    return arrays


def _local(counts):
    """Joints and scores (2 x masses) of the extremal family: first near the best score, then far from it."""
    joints, scores = np.zeros((2, len(MASSES), *_joints.SHAPE)), np.zeros((2, len(MASSES), *_joints.SHAPE))
    for i, size in enumerate((NEAR, FAR)):
        for j, mass in enumerate(MASSES):
            q, r = np.array([mass / 2, mass / 2, 1 - mass]), np.array([1 + size, 1 - size, 0]) / mass
            first = mass / 2 / (1 + size)  # p of the row that matters; the other one makes up for q and loses nothing
            joints[i, j, :2, :3] = first * q * r, q * (1 - first * r)
            scores[i, j, 0, :3] = [np.log(1 - size), np.log(1 + size), -np.inf]
            scores[i, j, 1, :3] = np.log(1 - first * r)
    flat = [table.reshape(-1, *_joints.SHAPE) for table in (joints, scores)]
    return *flat, np.broadcast_to(counts.astype(float), (len(flat[0]), len(counts)))


@jax.jit
def _chains(joint, score, counts):
    """The chain for every joint and number of candidates, B and B', both factors, and those that know no bounds."""

    def one(case):
        joint, score, counts = case
        ceiling, inverse_floor = bounds.extremes(joint, score)
        unit = jnp.ones_like(ceiling)

        def at(k):
            return surrogate.chain(joint, score, k)._asdict() | {
                "floor": bounds.floor_factor(ceiling, inverse_floor, k),
                "ceiling": bounds.ceiling_factor(ceiling, k),
                "floor at 1": bounds.floor_factor(unit, unit, k),
                "ceiling at 1": bounds.ceiling_factor(unit, k),
                "reverse": surrogate.sufficiency(joint.T, score.T),
            }

        return jax.lax.map(at, counts) | {"B": ceiling, "B'": inverse_floor}

    return jax.lax.map(one, (joint, score, counts), batch_size=256)


def _flat(config):
    """Constant scores: joints between X = Y and independence at their thresholds; X = Y on 2 to SYMBOLS symbols."""
    rng, n = np.random.default_rng(2), SYMBOLS

    def between(weights, share):
        return share * np.diag(weights) + (1 - share) * np.outer(weights, weights)

    def information(joint):
        return np.sum(xlogy(joint, joint / np.outer(joint.sum(axis=1), joint.sum(axis=0))))

    even = np.full(n, 1 / n)
    share = brentq(lambda share: information(between(even, share)) - np.log(EXACT), 0.5, 1, xtol=1e-15)
    # Shares from 0.75 on: e^I is above 2, so that there is a number of candidates from 2 on below it.
    joints = [between(even, share)]
    joints += [between(rng.dirichlet(np.full(n, 5.0)), rng.uniform(0.75, 1)) for _ in range(config.flat - 1)]
    least = np.ceil(np.exp([information(joint) for joint in joints]))
    identical = [np.pad(np.eye(size) / size, (0, n - size)) for size in range(2, n + 1)]
    sweep = np.arange(2, 2 + 4 * 12).reshape(12, 4)
    cases = np.stack(joints + [joints[0]] * len(sweep) + identical)
    counts = np.stack([least - 1, least, least + 1, 2 * least], axis=1)
    counts = np.concatenate([counts, sweep, np.broadcast_to(FLAT, (len(identical), 4))]).astype(float)

    @jax.jit
    def measure(joint, counts):
        def one(case):
            joint, counts = case
            score = jnp.zeros_like(joint)
            risks = jax.lax.map(lambda k: surrogate.contrastive_risk(joint, score, k), counts)
            least = jax.lax.map(lambda k: surrogate.minimal_risk(joint, k), counts)
            return {"risk": risks, "excess": risks - least, "sufficiency": surrogate.sufficiency(joint, score)}

        return jax.lax.map(one, (joint, counts), batch_size=16)

    found = measure(jnp.asarray(cases), jnp.asarray(counts)) | {"candidates": counts}
    parts = (len(joints), len(joints) + len(sweep))
    return {
        f"{kind}/{name}": values
        for name, array in found.items()
        for kind, values in zip(("flat", "sweep", "identical"), np.split(np.asarray(array), parts), strict=True)
    }


def extremal_law(ceiling: np.ndarray, candidates: np.ndarray) -> np.ndarray:
    """gap_K / S of the extremal scores with r and w near B, E[1/(1 + N)] = (B/K) (1 - (1 - 1/B)^K)."""
    return ceiling / candidates * -np.expm1(candidates * np.log1p(-1 / ceiling))


def verdicts(config: Config, arrays: dict[str, np.ndarray]) -> list[verify.Verdict]:
    """The three readings, the two factors with what one rests on, the extremal family, and X = Y."""
    return [*_excess(config, arrays), *_extremal(config, arrays), *_raw(config, arrays), *_identical(config, arrays)]


def _claims(name, statement, why):
    source = SOURCES[name.split(".")[0]]
    claim = verify.Claim(name, statement, source)
    return claim, verify.Claim(f"{name}.control", f"{statement}: {why}", source, "control", name)


def _excess(config, arrays):
    excess, lost = arrays["random/excess"], arrays["random/sufficiency"]
    statement = "S <= Excess_K, with no factor, at finite K"
    finding = verify.Claim("T4.none", statement, SOURCES["T4"], "finding")
    found = [verify.bound(finding, np.ones(lost.size), (excess / lost).ravel(), margin=config.rounding)]
    claims = _claims("T4.ordered", "Excess_K <= S", "S of the other direction, of x given y")
    other = arrays["random/risk"] - arrays["conditional/risk"]
    for claim, value in zip(claims, (lost, arrays["random/reverse"]), strict=True):
        found.append(verify.bound(claim, (excess / lost).ravel(), (value / lost).ravel(), margin=config.rounding))
    for name, text in (
        ("floor", "S <= C Excess_K with C from r, w <= B and w >= 1/B'"),
        ("ceiling", "S <= C Excess_K with C from r, w <= B alone"),
    ):
        claims = _claims(f"T4.{name}", text, "constants that know no bounds, B = B' = 1")
        for claim, factor in zip(claims, (name, f"{name} at 1"), strict=True):
            limit = arrays[f"random/{factor}"] * excess / lost
            found.append(verify.bound(claim, np.ones(limit.size), limit.ravel(), margin=config.rounding))
    k = arrays["candidates"]
    claims = _claims("T4.growth", "Excess_K / (K - 1) does not rise with K", "over a score that is not the minimiser")
    for claim, value in zip(claims, (excess, other), strict=True):
        rise = np.diff(value / lost / (k - 1), axis=1).ravel()
        found.append(verify.bound(claim, rise, 0.0, margin=config.rounding))
    return found


def _extremal(config, arrays):
    k, count = arrays["candidates"], len(MASSES)
    share = arrays["local/excess"] / arrays["local/sufficiency"]
    predicted = 1 - extremal_law(1 / np.array(MASSES)[:, None], k)
    statement = (
        "scores near the best one, r and w near B on mass 1/B: Excess_K / S = E[N/(1 + N)], N from Bin(K - 1, 1/B)"
    )
    claims = _claims("T4.attained", statement, "scores far from the best one")
    found = [
        verify.identity(claim, side, predicted, rtol=config.near)
        for claim, side in zip(claims, (share[:count], share[count:]), strict=True)
    ]
    statement = "Excess_K / S >= E[N/(1 + N)] with N from Bin(K - 1, 1/B): measured, not proved"
    gap = np.concatenate([arrays[f"{kind}/gap"] / arrays[f"{kind}/sufficiency"] for kind in ("random", "local")])
    ceiling = np.concatenate([arrays["random/B"], arrays["local/B"]])[:, None]
    claim, control = _claims("T4.least", statement, "without the bound on r and w, B = 1")
    for c, limit in ((claim, extremal_law(ceiling, k)), (control, np.broadcast_to(1 / k, gap.shape))):
        found.append(verify.bound(c, gap.ravel(), limit.ravel(), margin=config.rounding))
    return found


def _raw(config, arrays):
    claims = _claims("T2'.raw", "S <= R_K once K >= B' e^I", "constant scores with one candidate fewer than e^I")
    found = []
    for claim, risk, lost in (
        (claims[0], arrays["threshold/risk"], arrays["threshold/sufficiency"]),
        (claims[1], arrays["flat/risk"][:, 0], arrays["flat/sufficiency"]),
    ):
        found.append(verify.bound(claim, lost, risk, margin=config.rounding))
    finding = verify.Claim("T2'.any", "S <= R_K for every number of candidates", SOURCES["T2'"], "finding")
    lost, risk = arrays["random/sufficiency"], arrays["random/risk"]
    found.append(verify.bound(finding, lost.ravel(), risk.ravel(), margin=config.rounding))
    statement = "for a constant score S <= R_K if and only if K >= e^I"
    claims = _claims("T2'.flat", statement, "K - 1 negatives counted in place of K candidates")
    risk, lost, k = (
        np.concatenate([arrays[f"{kind}/{name}"] for kind in ("flat", "sweep")])
        for name in ("risk", "sufficiency", "candidates")
    )
    for claim, more in zip(claims, (0, 1), strict=True):
        found.append(verify.identity(claim, lost[:, None] <= risk, k - more >= np.exp(lost)[:, None]))
    statement = "S <= R_K if and only if E ln sum_j w(X, Y_j) >= I"
    claims = _claims("T2'.criterion", statement, "K >= e^I, which is for constant scores")
    columns = [list(arrays["candidates"]).index(k) for k in LISTED]
    holds = arrays["random/sufficiency"][:, columns] <= arrays["random/risk"][:, columns]
    information = arrays["information"][:, None]
    for claim, criterion in zip(claims, (arrays["listed"] >= information, np.exp(information) <= LISTED), strict=True):
        found.append(verify.identity(claim, holds, criterion))
    return found


def _identical(config, arrays):
    excess, lost = arrays["identical/excess"], arrays["identical/sufficiency"]
    sizes = np.arange(2, SYMBOLS + 1)
    right, wrong = (np.stack([exact_excess(sizes, k + more) for k in FLAT], axis=1) for more in (0, 1))
    claims = _claims("T5.exact", "X = Y, constant score: Excess_K = ln K - E ln(1 + Bin(K - 1, 1/N))", "K miscounted")
    found = [
        verify.identity(claim, excess, side, rtol=config.exact)
        for claim, side in zip(claims, (right, wrong), strict=True)
    ]
    claims = _claims("T5.sufficiency", "X = Y on N symbols, constant score: S = ln N", "ln(N - 1)")
    found += [
        verify.identity(claim, lost, np.log(sizes - less), rtol=config.exact)
        for claim, less in zip(claims, (0, 1), strict=True)
    ]
    claims = _claims("T5.cap", "X = Y, constant score: Excess_K <= ln K", "S in its place")
    cap = np.broadcast_to(np.log(FLAT), excess.shape)
    for claim, value in zip(claims, (excess, np.broadcast_to(lost[:, None], excess.shape)), strict=True):
        found.append(verify.bound(claim, value.ravel(), cap.ravel(), margin=config.rounding))
    statement = "X = Y, constant score: S / Excess_K grows as ln N / ln K, without bound"
    claims = _claims("T5.growth", statement, "two clusters of N/2 symbols, X in that of Y")
    for claim, name in zip(claims, ("symbols", "clusters"), strict=True):
        scaled = arrays[f"growing/{name}"] * np.log(FLAT)[:, None]
        found.append(verify.rate(claim, GROWING, scaled, 1.0, margin=config.slope, law="logarithmic"))
    return found
