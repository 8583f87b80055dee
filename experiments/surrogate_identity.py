r"""T1, T2, T3, T6: contrastive risk and sufficiency on finite joints, as identities.

    T1  ln r minimises R_K for every K, in one direction and for both together;
        I_K = ln K - R_K(ln r) rises with K and 0 <= I - I_K <= ln(1 + chi2 / K)
    T2  Suff(s) = Excess_K(s) + gap_K(s),   gap_K = KL(M_K^P || M_K^s) of the laws of x and all K candidates
    T3  0 = Excess_1 <= Excess_2 <= ... -> Suff,   K gap_K -> (1/2) E_pq (r - w)^2
    T6  what an encoder loses is the same number in three forms, for every f, and under every K

in float64 over random joints, half of them with empty cells, and scores of several sizes, some of which rule out pairs
that never meet. R_K is convex in the score, and in the head on top of an encoder, so that a vanishing gradient proves a
minimum. gap_K is enumerated over all multisets of candidates in NumPy, without any code of the risk.

Controls: ln P(y|x), the best score if negatives were uniform; ln r + c(x), which one direction cannot tell from ln r; a
score that is not the minimiser in its place; K miscounted by one; a model that is not normalised; an alphabet that
grows with K; the mean under P in place of p q; the codes of another encoder.

Sources: by statement, in `SOURCES`.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from scipy.stats import binom

from experiments import _joints
from theorykit import results, surrogate, verify
from theorykit.spectral import contrastive
from theorykit.surrogate import information_loss
from theorykit.surrogate import joint as joints

SOURCES = {
    "T1": "Oord et al. (arXiv 1807.03748); the bound by chi-square: derivation",
    "T2": "derivation",
    "T3": "derivation (data processing; second-order expansion)",
    "T6": "derivation; Oko et al. (arXiv 2501.04641)",
}
DIVERGENCES = {
    "KL": information_loss.KL,
    "chi-square": information_loss.CHI_SQUARE,
    "Jensen-Shannon": information_loss.JENSEN_SHANNON,
}
FORMS = ("information", "variational", "bregman")
# Scores of which the risk is taken, each with its joint or that of the codes.
SCORES = ("best", "random", "conditional", "head", "other head", "merged")
LARGE = 1024  # candidates from which the law 1/K is fitted; w is at most some hundred
MULTIPLES = (0.5, 1.0, 2.0, 4.0)  # symbols in the control of T3.rate, in units of K
SMALL = 1e-4  # nats, of a sufficiency or an encoder's loss
BROKEN_UP_TO = 4  # candidates up to which the controls of T2 are enumerated
MOST_SETS = 5000  # multisets of candidates that are enumerated


@dataclasses.dataclass(frozen=True)
class Config:
    """Numbers of joints and candidates."""

    joints: int = 1200
    candidates: tuple[int, ...] = (1, 2, 4, 16, 64, 256, 1024, 4096, 16384, 65536)
    gradients: tuple[int, ...] = (2, 16, 1024)
    exact: float = results.threshold(1e-10, "required; risks of order 10 to 2e-15, in units of 1e-4 at the smallest")
    rounding: float = results.threshold(1e-13, "risks are at most ln K + 10, about 20, with some ten roundings")
    rate: float = results.threshold(0.02, "terms of order 1/K^2 tilt the slope by w/K, at most about 1/10 at K = 1024")
    limit: float = results.threshold(
        1e-4, "extrapolation leaves (w/K)^2 / 16, 1e-5 at K = 16384 for the widest; rounding 1e-14 times 65536 in 1e-4"
    )


PRESETS = {
    "smoke": Config(joints=200, candidates=(1, 2, 4, 16, 1024, 4096, 16384, 65536)),
    "quick": Config(),
    "full": Config(joints=10000),
}


def run(config: Config) -> dict[str, np.ndarray]:
    """risk/<score> (joints, K), gradient/<score>/..., gap/..., and one array for each number of `_numbers`."""
    drawn = _joints.draw(np.random.default_rng(0), config.joints)
    joint, score, codes = drawn
    # A quarter of the scores rule out what never happens; not where nothing else is left to be lost.
    quarter = (np.arange(config.joints) % 4 == 1) & (np.max(np.sum(joint > 0, axis=2), axis=1) > 1)
    excluded = (joint == 0) & quarter[:, None, None]
    score = np.where(excluded, -np.inf, score)
    with jax.enable_x64(True):
        arrays = results.part("risks", lambda: _risks(config, joint, score, codes))
        arrays |= results.part("numbers", lambda: _of_joints(joint, score, codes))
    arrays |= results.part("gaps", lambda: _gaps(config, joint, score))
    return arrays | {"candidates": np.array(config.candidates)} | _growing_alphabet(config)


def _risks(config, joint, score, codes):
    chosen = np.arange(len(joint)) % 8 == 0  # the gradient on some of them

    @jax.jit
    def values(batch, counts):
        one = lambda pair: jax.lax.map(lambda k: surrogate.contrastive_risk(*pair, k), counts)  # noqa: E731
        return jax.lax.map(one, batch, batch_size=256)

    tables = _scores(*map(jnp.asarray, (joint, score, codes[0], codes[1])))
    every = jax.tree.map(lambda *parts: jnp.concatenate(parts), *(tables[name] for name in SCORES))
    risks = np.asarray(values(every, jnp.asarray(config.candidates, float)))
    arrays = {f"risk/{name}": part for name, part in zip(SCORES, np.split(risks, len(SCORES)), strict=True)}
    tables = {name: tuple(np.asarray(part)[chosen] for part in table) for name, table in tables.items()}
    return arrays | _gradients(config, tables, codes[0][chosen])


def _gradients(config, tables, codes):
    """gradient/<score> (2, joints, K, x or code, y): the law of the pairs, and the same plus the gradient of the risk.

    The gradient is the difference of two laws, of the pairs and of the pairs that the softmax finds.
    """
    joint, best = tables["best"]
    # c(x), which no softmax over texts sees, and that over images does.
    shifted = best + (np.arange(joint.shape[1]) % 2)[None, :, None]
    forward = {name: tables[name][1] for name in ("best", "conditional", "head", "other head")} | {"shifted": shifted}
    backward = {"best": best, "shifted": shifted}
    turn = lambda table: table.swapaxes(-1, -2)  # noqa: E731
    pairs = [(joint, s) for s in forward.values()] + [(turn(joint), turn(s)) for s in backward.values()]
    # Squares, so that one program serves both directions.
    (nx, ny), room = _joints.SHAPE, max(_joints.SHAPE)
    square = lambda table: np.pad(table, [(0, 0), *((0, room - size) for size in table.shape[1:])])  # noqa: E731
    batch = tuple(jnp.asarray(np.concatenate([square(part) for part in parts])) for parts in zip(*pairs, strict=True))
    slopes = np.split(np.asarray(_slopes(batch, jnp.asarray(config.gradients, float))), len(pairs))
    of = {name: slope[..., :nx, :ny] for name, slope in zip(forward, slopes[: len(forward)], strict=True)}
    back = {name: turn(slope[..., :ny, :nx]) for name, slope in zip(backward, slopes[len(forward) :], strict=True)}
    merge = lambda table: np.einsum("bxt,b...xy->b...ty", np.eye(nx)[codes], table)  # noqa: E731
    sides = {name: (joint, of[name]) for name in ("best", "conditional")}
    sides |= {name: (merge(joint), merge(of[name])) for name in ("head", "other head")}
    sides |= {f"both {name}": (2 * joint, of[name] + back[name]) for name in backward}
    return {
        f"gradient/{name}": np.stack(np.broadcast_arrays(law[:, None], law[:, None] + slope))
        for name, (law, slope) in sides.items()
    }


@jax.jit
def _slopes(batch, counts):
    slope = jax.grad(surrogate.contrastive_risk, argnums=1)
    one = lambda pair: jax.lax.map(lambda k: slope(*pair, k), counts)  # noqa: E731
    return jax.lax.map(one, batch, batch_size=256)


@jax.jit
@jax.vmap
def _scores(joint, score, codes, other):
    """(joint, score) for each of SCORES."""
    best = surrogate.optimal_score(joint)
    q = jnp.sum(joint, axis=0)
    merged = jnp.zeros_like(joint).at[codes].add(joint)
    heads = [jnp.log(information_loss.encoder_ratio(joint, c)) for c in (codes, other)]
    # The head of another encoder, as a function of these codes: averaged over the inputs that they do not tell apart.
    same = (codes[:, None] == codes[None, :]).astype(joint.dtype)
    averaged = jnp.log(same @ jnp.exp(heads[1]) / jnp.sum(same, axis=1)[:, None])
    return {
        "best": (joint, best),
        "random": (joint, score),
        "conditional": (joint, best + jnp.where(q > 0, jnp.log(jnp.where(q > 0, q, 1.0)), 0.0)[None, :]),
        "head": (joint, heads[0]),
        "other head": (joint, averaged),
        "merged": (merged, surrogate.optimal_score(merged)),
    }


def _of_joints(joint, score, codes):
    found = _numbers(*map(jnp.asarray, (joint, score, codes[0], codes[1])))
    return {name: np.asarray(values) for name, values in found.items()}


@jax.jit
@jax.vmap
def _numbers(joint, score, codes, other):
    r, w = joints.density_ratio(joint), information_loss.model_ratio(joint, score)
    p, q = jnp.sum(joint, axis=1), jnp.sum(joint, axis=0)
    product = p[:, None] * q[None, :]
    found = {
        "sufficiency": surrogate.sufficiency(joint, score),
        "information": joints.mutual_information(joint),
        "chi2": joints.chi_square(joint),
        "coefficient": jnp.sum(product * (r - w) ** 2) / 2,
        "under P": jnp.sum(joint * (r - w) ** 2) / 2,
    }
    for name, f in DIVERGENCES.items():
        for form in FORMS:
            found[f"{form}/{name}"] = surrogate.encoder_sufficiency(joint, codes, f=f, form=form)
        found[f"other/{name}"] = surrogate.encoder_sufficiency(joint, other, f=f, form="bregman")
    best = jnp.log(information_loss.encoder_ratio(joint, codes))
    found["head sufficiency"] = surrogate.sufficiency(joint, best)
    # A score of codes of x and of y; y keeps half of its symbols.
    finite = jnp.where(jnp.isfinite(score), score, 0.0)
    halves = jnp.arange(len(q)) % 2
    table = finite[codes[:, None], halves[None, :]]
    found["pair"] = surrogate.sufficiency(joint, table)
    for name, x in (("split", codes), ("other split", other)):
        found[name] = sum(information_loss.pair_sufficiency(joint, x, halves, table))
    # The risk of the chi-square divergence at 2 k against the spectral loss of k = f(x) . e_y, and of k + c(x).
    shift = 1 - finite @ q
    found["spectral risk"] = information_loss.variational_risk(joint, 2 * finite, information_loss.CHI_SQUARE)
    for name, table in (("spectral", finite + shift[:, None]), ("not shifted", finite)):
        found[name] = 1 + contrastive.spectral_loss(joint, table, jnp.eye(len(q), dtype=joint.dtype))
    return found


def _gaps(config, joint, score):
    """gap_K by enumeration, (joints, K), and where there are not too many multisets of candidates for it."""
    listed = np.zeros((len(joint), len(config.candidates)), bool)
    found = {
        name: np.full((len(joint), len(config.candidates)), np.nan) for name in ("gap", "miscounted", "not normal")
    }
    for i, (table, s) in enumerate(zip(joint, score, strict=True)):
        nx, ny = _joints.SIZES[i % len(_joints.SIZES)]
        table, s = table[:nx, :ny], s[:nx, :ny]
        for column, k in enumerate(config.candidates):
            if k == 1 or _joints.sets(k, ny) > MOST_SETS:
                continue
            listed[i, column] = True
            found["gap"][i, column] = _joints.gap(table, s, k)
            if k <= BROKEN_UP_TO:
                found["miscounted"][i, column] = _joints.gap(table, s, k + 1)
                found["not normal"][i, column] = _joints.gap(table, s, k, normalised=False)
    return {f"enumerated/{name}": values for name, values in (found | {"listed": listed}).items()}


def _growing_alphabet(config):
    """gap_K for X = Y on a multiple of K symbols and a constant score: Suff - Excess_K = ln(N/K) + E ln(1 + Bin)."""
    large = [k for k in config.candidates if k >= LARGE]
    gaps = np.empty((len(MULTIPLES), len(large)))
    for row, multiple in enumerate(MULTIPLES):
        for column, k in enumerate(large):
            hits = np.arange(min(k, 200))  # the number of further copies of y has mean 1 / multiple
            chance = binom.pmf(hits, k - 1, 1 / (multiple * k))
            gaps[row, column] = np.log(multiple) + chance @ np.log1p(hits)
    return {"growing/gap": gaps}


def excess(arrays: dict[str, np.ndarray], score: str = "random", over: str = "best") -> np.ndarray:
    """Excess_K of a score over another one, (joints, K)."""
    return arrays[f"risk/{score}"] - arrays[f"risk/{over}"]


def remainder(arrays: dict[str, np.ndarray]) -> np.ndarray:
    """Suff - Excess_K for all K from LARGE on, (joints, K)."""
    return (arrays["sufficiency"][:, None] - excess(arrays))[:, arrays["candidates"] >= LARGE]


def verdicts(config: Config, arrays: dict[str, np.ndarray]) -> list[verify.Verdict]:
    """Minimiser, information bound, decomposition, monotonicity, rate, coefficient, and the forms for encoders."""
    return [
        *_minimiser(config, arrays),
        *_information(config, arrays),
        *_gap(config, arrays),
        *_encoders(config, arrays),
    ]


def _claims(name, statement, why):
    source = SOURCES[name.split(".")[0]]
    claim = verify.Claim(name, statement, source)
    return claim, verify.Claim(f"{name}.control", f"{statement}: {why}", source, "control", name)


def _in_units(left, right):
    """Both sides in units of the larger, so that every instance counts alike.

    The unit is at least SMALL: risks are exact to 1e-14, so that smaller differences of two have no ten digits.
    """
    left, right = np.broadcast_arrays(left, right)
    size = np.maximum(np.maximum(np.abs(left), np.abs(right)), SMALL)
    return left / size, right / size


def _same(config, name, statement, why, sides, control):
    claim, controlled = _claims(name, statement, why)
    return [
        verify.identity(claim, *_in_units(*sides), rtol=config.exact),
        verify.identity(controlled, *_in_units(*control), rtol=config.exact),
    ]


def _minimiser(config, arrays):
    found = []
    for name, statement, why, sides in (
        ("T1.minimiser", "the gradient of R_K at ln r vanishes for every K", "at ln P(y|x)", ("best", "conditional")),
        (
            "T1.both",
            "the gradient of the two-sided R_K at ln r vanishes for every K",
            "at ln r + c(x), which minimises one direction only",
            ("both best", "both shifted"),
        ),
        (
            "T6.minimiser",
            "the gradient of R_K in the head on an encoder vanishes at ln r_T for every K",
            "at the head of another encoder",
            ("head", "other head"),
        ),
    ):
        for claim, side in zip(_claims(name, statement, why), sides, strict=True):
            laws = arrays[f"gradient/{side}"]
            size = np.max(laws[0], axis=(1, 2, 3), keepdims=True)  # of each joint, so that all count alike
            found.append(verify.identity(claim, *(laws / size), rtol=config.exact))
    return found


def _information(config, arrays):
    k, risk = arrays["candidates"], arrays["risk/best"]
    missing = arrays["information"][:, None] - (np.log(k) - risk)
    limit = np.log1p(arrays["chi2"][:, None] / k)
    one, many = k[None, 1:], np.s_[:, 1:]  # one candidate cannot be miscounted downwards
    found = []
    for name, statement, why, value, most, shift in (
        (
            "T1.upper",
            "I - I_K <= ln(1 + chi2/K)",
            "ln(K - 1) in place of ln K",
            missing,
            limit,
            np.log(one / (one - 1)),
        ),
        ("T1.lower", "I_K <= I", "ln(K + 1) in place of ln K", -missing, 0 * limit, np.log((one + 1) / one)),
    ):
        claim, control = _claims(name, statement, why)
        found.append(verify.bound(claim, value.ravel(), most.ravel(), margin=config.rounding))
        found.append(verify.bound(control, (value[many] + shift).ravel(), most[many].ravel(), margin=config.rounding))
    rising = _claims("T1.rises", "I_K does not fall with K", "ln K - R_K of a score that is not the minimiser")
    for claim, name in zip(rising, ("best", "random"), strict=True):
        falls = -np.diff(np.log(k) - arrays[f"risk/{name}"], axis=1).ravel()
        found.append(verify.bound(claim, falls, 0.0, margin=config.rounding))
    return found


def _gap(config, arrays):
    k, lost = arrays["candidates"], arrays["sufficiency"][:, None]
    found = []
    statement = "Suff = Excess_K + gap_K, with gap_K enumerated as a KL divergence of mixtures"
    for name, which, why in (
        ("T2.identity", "miscounted", "gap of K + 1 candidates"),
        ("T2.normalised", "not normal", "a model that is not normalised"),
    ):
        sides = []
        for w, most in (("gap", np.inf), (which, BROKEN_UP_TO)):
            listed = arrays["enumerated/listed"] & (k <= most)[None, :]
            sides.append(((lost + 0 * k)[listed], (excess(arrays) + arrays[f"enumerated/{w}"])[listed]))
        found += _same(config, name, statement, why, *sides)
    claims = _claims("T3.rises", "0 = Excess_1 <= Excess_2 <= ... <= Suff", "over a score that is not the minimiser")
    for claim, over in zip(claims, ("best", "conditional"), strict=True):
        steps = np.diff(np.concatenate([excess(arrays, over=over), lost], axis=1), axis=1)
        found.append(verify.bound(claim, -steps.ravel(), 0.0, margin=config.rounding))
    large = k[k >= LARGE]
    claims = _claims("T3.rate", "gap_K falls as 1/K", "an alphabet that grows with K")
    for claim, gaps in zip(claims, (remainder(arrays), arrays["growing/gap"]), strict=True):
        found.append(verify.rate(claim, large, gaps, -1.0, margin=config.rate))
    claims = _claims("T3.coefficient", "K gap_K tends to (1/2) E_pq (r - w)^2", "the mean under P")
    scaled = large * remainder(arrays)
    ratio = large[-1] / large[-2]
    limit = (ratio * scaled[:, -1] - scaled[:, -2]) / (ratio - 1)  # without the term of order 1/K
    for claim, predicted in zip(claims, ("coefficient", "under P"), strict=True):
        found.append(verify.identity(claim, *_in_units(limit, arrays[predicted]), rtol=config.limit))
    return found


def _encoders(config, arrays):
    found = []
    for f in DIVERGENCES:
        information = arrays[f"information/{f}"]
        for form, text in (("variational", "the excess of the variational risk"), ("bregman", "a Bregman divergence")):
            sides = _in_units(information, arrays[f"{form}/{f}"])
            control = _in_units(information, arrays[f"other/{f}"])
            claim, controlled = _claims(
                f"T6.{form}.{f}", f"an encoder's loss of information is {text}, {f}", "of another encoder"
            )
            found.append(verify.identity(claim, *sides, rtol=config.exact))
            found.append(verify.identity(controlled, *control, rtol=config.exact))
    statement = "the least Excess_K over heads is I_K(X;Y) - I_K(T;Y), for every K"
    lost = arrays["risk/merged"] - arrays["risk/best"]
    sides = [(excess(arrays, name), lost) for name in ("head", "other head")]
    found += _same(config, "T6.heads", statement, "the head of another encoder", *sides)
    for name, statement, why, sides in (
        (
            "T6.limit",
            "the least Suff over heads is I(X;Y) - I(T;Y)",
            "of another encoder",
            ("information/KL", "other/KL"),
        ),
        (
            "T6.pair",
            "Suff = I(X;Y) - I(f;g) + Suff of the head, for scores of two encoders",
            "codes of another encoder",
            ("split", "other split"),
        ),
        (
            "T6.spectral",
            "the chi-square risk at 2 k is 1 + the least spectral loss of k + c(x)",
            "of k itself",
            ("spectral", "not shifted"),
        ),
    ):
        left = arrays[{"T6.limit": "head sufficiency", "T6.pair": "pair", "T6.spectral": "spectral risk"}[name]]
        found += _same(config, name, statement, why, *((left, arrays[side]) for side in sides))
    return found
