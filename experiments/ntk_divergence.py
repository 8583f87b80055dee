r"""N3: under the linear dot-product loss the kernel of every network moves in the end, at a time logarithmic in the
width.

The loss L = mean s(x, x^-) - s(x, x^+) is quadratic in the embeddings, L = f^T A f / 2, so at a fixed kernel the flow
is linear, f' = -K_0 A f, and grows like exp(rho t), rho = max spec(-K_0 A) > 0, independent of the width M. The
parameters feel it once |f| is of order sqrt M. With t* the time at which the kernel has changed by 10%, the embedding
has grown from its component P_u f_0 in the leading eigenspace to c sqrt M:

    |P_u f_0| exp(rho t*) = c sqrt M    =>    2 rho t* + 2 ln |P_u f_0| = ln M + constant.

The embedding that grows is measured in two ways.

    linearised   Y = 2 ln |(1 - eta K_0 A)^(t*/eta) f_0|, the size of the linearised descent at t*
    projected    Y = 2 rho_eta t* + 2 ln |P_u f_0|, with rho_eta = ln(1 + eta rho) / eta for the rate of descent

They are equal when the leading mode dominates at t*. The first stays right when f_0 happens to have almost nothing of
that mode: about one start in a hundred has |P_u f_0| < 0.03, and there the second is off by several units. One such
start is among the tanh runs of the quick preset; so the projected form is a claim for ReLU, and for tanh the figure
reports its slope, whose interval is too wide to decide (0.96 [0.58, 1.34] when first measured, 1.05 [0.97, 1.12] for
ReLU). One output (z = 1), because with z outputs the z-fold leading eigenvalue of the limit kernel splits by
O(M^{-1/2}) at finite width, and no single eigenspace carries the growth. Two classes of digits, so that the leading
eigenvalue is well apart.

Divergence. With ReLU units L is of degree four in the parameters, so once |f| is of order sqrt M the growth feeds on
itself, and descent diverges a time after t* that does not depend on M: about 4 / (2 rho) when first measured. Then t*
says which runs have diverged by a horizon T, namely those with t* + lag < T. T and the lag come from the narrowest
width alone (the median of its times of divergence, the range of its lags); judged are the runs of all other widths, and
those in between, for which the lags of the narrowest width differ, are left out: 3 of 36 in the first run, after which
this rule was set. With tanh units, as with any bounded ones, the flow cannot diverge in finite time: |phi| <= 1 gives
|f| <= ||W||_F, and L is quadratic in f, so d||W||_F / dt <= c ||W||_F, exponential growth at most. "Divergence by the
horizon for the widths whose t* lies before it" is therefore a finding there: the kernel of every run has moved by the
last time, and none has diverged.

Controls: with fixed targets in place of the second view's embeddings the loss is linear in f, growth is not
exponential and t* is of order sqrt M, and descent does not diverge; at t = 0 the embeddings do not scale as sqrt M;
the lag between t* and the divergence is compared with t* itself, which does grow with ln M; ReLU runs are the control
of bounded units.

Source: Anil, Esser, Ghoshdastidar (arXiv 2403.08673) for the failure under dot products; the law of t*: derivation.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from experiments import _setting
from experiments._claims import pair
from experiments._side_by_side import one_object, side_by_side
from theorykit import losses, results, training, verify
from theorykit.ntk import drift, growth_rate

SERIES = ("linear", "targets")
SOURCE = "failure: Anil, Esser, Ghoshdastidar (arXiv 2403.08673); law of t*: derivation"


@dataclasses.dataclass(frozen=True)
class Config:
    """Triplets of two classes of digits; full-batch gradient descent; the kernel is measured every `stride` steps."""

    activations: tuple[str, ...] = ("tanh", "relu")
    widths: tuple[int, ...] = (1024, 2048, 4096, 8192)
    seeds: int = 12
    triplets: int = 16
    learning_rate: float = 0.5
    steps: int = 80
    stride: int = 2
    moved: float = 0.1
    slope_margin: float = results.threshold(
        0.2, "corrections of order M^(-1/2) at the smallest width, from theory/ntk N3"
    )
    norm_margin: float = results.threshold(1 / 6, "a third of the exponent 1/2: tells it from 1/3 and 2/3")
    lag_margin: float = results.threshold(0.25, "a quarter of the slope with which Y grows in ln M")


PRESETS = {
    "smoke": Config(activations=("tanh",), widths=(1024, 2048, 4096), triplets=8, stride=4),
    "quick": Config(),
    "full": Config(widths=tuple(2**k for k in range(10, 17)), seeds=16, steps=160),
}


def run(config: Config) -> dict[str, np.ndarray]:
    """<series>/change/<activation> (seeds, widths, steps) and so on; per run rate, projection, time of divergence."""
    arrays = {"widths": np.array(config.widths)}
    for activation in tqdm(config.activations, desc="ntk_divergence", disable=None):
        for series in SERIES:
            arrays |= results.part(f"{series}-{activation}", lambda a=activation, s=series: _series(config, a, s))
    return arrays


def _series(config, activation, series):
    # Towards fixed targets the kernel moves five times as long and accordingly slowly.
    steps, stride = (5 * n if series == "targets" else n for n in (config.steps, config.stride))
    at = list(range(0, steps + 1, stride))
    shape = (config.seeds, len(config.widths))
    change, largest, linearised = np.full((3, *shape, len(at)), np.nan)
    rate, projection, diverged = np.empty((3, *shape))

    def measure(seed, column):
        views, width = _setting.triplets(seed, config.triplets), config.widths[column]
        encoder = _setting.encoder(f"{activation}-2", width, 1)
        params = _setting.initial(encoder, _setting.cell_key(seed, width), views[0])
        start, kernel = _setting.at_start(encoder.apply, params, jnp.concatenate(views))
        growth = growth_rate.growth(kernel, _stacked_linear, start)
        rate[seed, column] = growth.discrete_rate(config.learning_rate)
        projection[seed, column] = growth.projection
        linearised[seed, column] = _linearised(config, kernel, start, at)
        objective, data = _problem(encoder, series, views)
        found = drift.kernel_drift(
            encoder.apply,
            objective,
            params,
            data,
            points=views[0],
            optimizer=_setting.descent(config.learning_rate),
            steps=steps,
            at=at,
        )
        reached = len(found.steps)  # fewer than asked for after a divergence: the rest stays not-a-number
        change[seed, column, :reached], largest[seed, column, :reached] = found.change, found.largest
        updates = len(found.losses) * config.learning_rate
        diverged[seed, column] = updates if found.status == "diverged" else np.inf

    side_by_side(measure, np.ndindex(shape))
    measured = {"change": change, "largest": largest, "linearised": linearised}
    measured |= {"rate": rate, "projection": projection, "diverged": diverged}
    times = {f"{series}/times": config.learning_rate * np.array(at)}
    return times | {f"{series}/{name}/{activation}": values for name, values in measured.items()}


def _linearised(config, kernel, start, at):
    """Norm of the linearised descent f <- f - eta K_0 A f over all points, in float64, after the given steps."""
    step = np.eye(len(start)) - config.learning_rate * np.asarray(kernel, np.float64)[..., 0, 0] @ _quadratic(
        len(start)
    )
    f, norms = np.asarray(start, np.float64), []
    for _ in range(at[-1] + 1):
        norms.append(np.linalg.norm(f))
        f = step @ f
    return np.array(norms)[at]


@one_object
def _quadratic(n):
    """A of the linear dot loss L = f^T A f / 2 over the n stacked points, (n, n)."""
    hessian = jax.jit(jax.hessian(lambda f: _stacked_linear(f[:, None])))
    return np.asarray(hessian(jnp.zeros(n)), np.float64)


def _stacked_linear(f):
    return losses.linear(*jnp.split(f, 3))


def _problem(encoder, series, views):
    if series == "targets":
        classes = jnp.repeat(jnp.array([[0.5], [-0.5]]), len(views[0]) // 2, axis=0)
        return _target_objective(encoder.apply), (views[0], classes, -classes)
    return training.objective(encoder.apply, losses.linear), views


@one_object
def _target_objective(apply):
    """The linear loss with given embeddings of the positives and negatives."""

    def value(params, batch):
        anchors, positives, negatives = batch
        return losses.linear(apply(params, anchors), positives, negatives)

    return value


def crossing(config: Config, times: np.ndarray, change: np.ndarray) -> np.ndarray:
    """t*: when the change passes `moved`, log-linear between measurements; not-a-number if it never does."""
    passed = np.nan_to_num(change, nan=-np.inf) > config.moved
    after = np.argmax(passed, axis=-1)
    before = np.maximum(after - 1, 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        low, high = (np.log(np.take_along_axis(change, i[..., None], -1)[..., 0]) for i in (before, after))
        fraction = (np.log(config.moved) - low) / (high - low)
    found = times[before] + fraction * (times[after] - times[before])
    return np.where(passed.any(axis=-1) & (after > 0), found, np.nan)


def growth_until(config: Config, arrays: dict[str, np.ndarray], series: str, activation: str):
    """Y = 2 ln |linearised descent at t*| of every run, (seeds, widths); and t*."""
    times = arrays[f"{series}/times"]
    moved = crossing(config, times, arrays[f"{series}/change/{activation}"])
    size = np.log(arrays[f"{series}/linearised/{activation}"])
    runs = np.ndindex(moved.shape)
    return 2 * np.array([np.interp(moved[run], times, size[run]) for run in runs]).reshape(moved.shape), moved


def projected(arrays: dict[str, np.ndarray], series: str, activation: str, moved: np.ndarray) -> np.ndarray:
    """Y = 2 rho t* + 2 ln |P_u f_0| of every run, (seeds, widths), from t* likewise: the leading eigenspace alone."""
    rate, projection = (arrays[f"{series}/{name}/{activation}"] for name in ("rate", "projection"))
    return 2 * rate * moved + 2 * np.log(projection)


def largest_at(arrays: dict[str, np.ndarray], activation: str, moved: np.ndarray) -> np.ndarray:
    """Largest |f| of every run at t*, (seeds, widths), log-linear between measurements."""
    times, size = arrays["linear/times"], np.log(arrays[f"linear/largest/{activation}"])
    runs = np.ndindex(moved.shape)
    return np.exp([np.interp(moved[run], times, size[run]) for run in runs]).reshape(moved.shape)


def verdicts(config: Config, arrays: dict[str, np.ndarray]) -> list[verify.Verdict]:
    """The law of t*, |f| at t*, and the divergence that follows it or does not; each with its control."""
    found = [v for activation in config.activations for v in _verdicts(config, arrays, activation)]
    for activation in config.activations:
        found += _unstable(config, arrays, activation) if activation == "relu" else _bounded(config, arrays, activation)
    return found


def _verdicts(config, arrays, activation):
    linear, moved = growth_until(config, arrays, "linear", activation)
    targets, slow = growth_until(config, arrays, "targets", activation)

    def law(claim, y):
        return verify.rate(claim, arrays["widths"], y, 1.0, margin=config.slope_margin, law="logarithmic")

    def norm(claim, y):
        return verify.rate(claim, arrays["widths"], y, 0.5, margin=config.norm_margin)

    why = "fixed targets instead of a second view, so that growth is linear in time"
    found = _pair(
        law,
        f"N3.time.{activation}",
        f"under the linear dot loss the linearised descent at t* has grown as sqrt M: 2 ln|f| ~ ln M, {activation}",
        linear,
        targets,
        why,
    )
    if activation == "relu":
        found += _pair(
            law,
            f"N3.projected.{activation}",
            f"t* as the leading eigenspace has it: 2 rho t* + 2 ln|P_u f_0| ~ ln M, {activation}",
            projected(arrays, "linear", activation, moved),
            projected(arrays, "targets", activation, slow),
            why,
        )
    return found + _pair(
        norm,
        f"N3.norm.{activation}",
        f"the largest |f| at t* is proportional to sqrt M, {activation}",
        largest_at(arrays, activation, moved),
        arrays[f"linear/largest/{activation}"][..., 0],
        "at t = 0",
    )


def _unstable(config, arrays, activation):
    """Divergence a fixed time after t*, and so by a horizon exactly where t* says."""
    y, moved = growth_until(config, arrays, "linear", activation)
    diverged, rate = (arrays[f"linear/{name}/{activation}"] for name in ("diverged", "rate"))
    lags = 2 * rate * (diverged - moved)

    def lag(claim, y):
        return verify.rate(claim, arrays["widths"], y, 0.0, margin=config.lag_margin, law="logarithmic")

    # Everything that predicts comes from the first width; the others are judged.
    horizon = np.median(diverged[:, 0])
    before = (moved + lags[:, 0].max() / (2 * rate) <= horizon)[:, 1:]
    after = (moved + lags[:, 0].min() / (2 * rate) > horizon)[:, 1:]

    def by_horizon(claim, times):
        by_then, decided = (times <= horizon)[:, 1:], before | after
        if not (before.any() and after.any()):  # one side alone would be half of the statement: decides nothing
            return verify.identity(claim, np.nan, 1.0)
        return verify.identity(claim, by_then[decided], before[decided])

    return _pair(
        lag,
        f"N3.lag.{activation}",
        f"descent diverges a time after t* that does not depend on the width, {activation} (in units of 1 / 2 rho)",
        lags,
        y,
        "t* itself (as Y, in the same units)",
    ) + _pair(
        by_horizon,
        f"N3.divergence.{activation}",
        f"by a horizon those runs have diverged whose t* lies before it by more than the lag, and no others; horizon "
        f"and lag from the narrowest width, {activation}",
        diverged,
        arrays[f"targets/diverged/{activation}"],
        "fixed targets instead of a second view",
    )


def _bounded(config, arrays, activation):
    """Bounded units: divergence by the horizon, as stated, and what holds in its place."""
    horizon = arrays["linear/times"][-1]

    def runs(activation):
        _, moved = growth_until(config, arrays, "linear", activation)
        return moved <= horizon, arrays[f"linear/diverged/{activation}"] <= horizon

    def stays_finite(claim, activation):
        moved, diverged = runs(activation)
        return verify.identity(claim, moved & ~diverged, np.ones_like(moved))

    moved, diverged = runs(activation)
    stated = f"by t = {horizon:g} every run whose t* lies before it has diverged, {activation}"
    found = [verify.identity(verify.Claim(f"N3.divergence.{activation}", stated, SOURCE, "finding"), diverged, moved)]
    if "relu" not in config.activations:  # the claim needs its control
        return found
    return found + _pair(
        stays_finite,
        f"N3.bounded.{activation}",
        f"with bounded units every kernel has moved by t = {horizon:g} and no run has diverged, {activation}",
        activation,
        "relu",
        "ReLU units",
    )


def _pair(check, name, statement, claimed, control, why):
    return pair(check, name, statement, SOURCE, (claimed,), (why, (control,)))
