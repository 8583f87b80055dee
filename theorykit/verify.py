"""Verdicts: a theorem is a measurement with a control.

A check turns arrays into a `Verdict`: *supported*, *refuted* or *inconclusive*. With an interval [low, high] for the
measured quantity, a prediction p and a margin m declared beforehand,

    side        supported if                     refuted if
    equal       p - m <= low and high <= p + m   high < p - m or low > p + m
    at_most     high <= p + m                    low > p + m
    at_least    low >= p - m                     high < p - m
    more_than   low > m  (separation only)       high <= m

and inconclusive otherwise, so noise never confirms: a wide interval decides nothing, and more seeds are the cure. Data
that are not finite decide nothing either. What is expected follows from the role: a claim is supported; a control (the
same check with an assumption broken) and a finding (a statement shown false as stated) are refuted. Inconclusive is
never as expected.

Replicates are independent seeds on the leading axis. Every interval is Student's t over seeds,

    mean +- t_{(1 + level) / 2, n - 1} s / sqrt(n),

valid whatever the correlation inside a seed. One-sided checks use the same two ends, so each of their errors has at
most half of 1 - level. At the level of the gate the half-width is 18 s for 3 seeds, 3.9 s for 5 and 1.9 s for 8: plan
seeds with that. One replicate has no interval and is an error, unless the measurement is declared `deterministic`:
then the interval is the point. Identical replicates collapse the interval too and are marked `zero_spread` in the
details.
"""

import math
from typing import Any

import numpy as np

from theorykit._statistics import (
    ArrayLike,
    Fit,
    Real,
    as_array,
    as_replicates,
    check_draws,
    check_options,
    count_distinct,
    count_not_finite,
    direction_sign,
    dtype_eps,
    fit_lines,
    interval,
    interval_over_seeds,
    law_axes,
    law_data,
    null_interval,
    null_p_value,
    null_quantile,
    rounding_tolerance,
    slope_fit,
    welch_interval,
)
from theorykit._verdict import EXPECTED, OUTCOMES, Claim, Verdict, from_json, plain, table, to_json

__all__ = [
    "EXPECTED",
    "LEVEL",
    "OUTCOMES",
    "Claim",
    "Fit",
    "Verdict",
    "agreement",
    "bound",
    "from_json",
    "identity",
    "interval",
    "null_interval",
    "null_p_value",
    "null_quantile",
    "rate",
    "separation",
    "slope_fit",
    "table",
    "to_json",
]

# A verdict from an interval over seeds or a null distribution decides wrongly (it refutes what is true, or supports
# what is false) with probability at most 1 - LEVEL; for unpaired samples see `separation`. For m such verdicts in a
# run, the expected number of wrong decisions, and so the chance of any, is at most m (1 - LEVEL), however they depend
# on each other: for m = 500 one half at 99.9%, and 25 wrong ones at 95%. Identities, exact bounds and deterministic
# measurements do not err by chance and do not count.
LEVEL = 0.999


def identity(claim: Claim, left: ArrayLike, right: ArrayLike, *, rtol: Real | None = None) -> Verdict:
    """Check that two sides are equal to rounding: max|left - right| / max(max|left|, max|right|) <= rtol.

    Parameters
    ----------
    left, right : arrays of one shape. Integers and booleans must be exactly equal.
    rtol : default min(2**10 eps, sqrt(eps)) with eps of the coarser dtype: room for the roundings of about 2**20
        terms, but never less than half of the digits (in bfloat16 2**10 eps is 8, and nothing could fail).

    Raises
    ------
    ValueError
        Shapes that differ, no entries, rtol outside [0, 1), or an rtol for integers.
    """
    left, right = as_array("left", left, complex_ok=True), as_array("right", right, complex_ok=True)
    if left.shape != right.shape:
        raise ValueError(f"left has shape {left.shape}, right {right.shape}: compare arrays of one shape")
    exact = left.dtype.kind in "biu" and right.dtype.kind in "biu"
    if rtol is None:
        rtol = rounding_tolerance(left, right)
    elif exact:
        raise ValueError("integers and booleans are compared exactly: leave rtol out, or use agreement")
    if not 0 <= rtol < 1:
        raise ValueError(f"rtol is {rtol}: give 0 <= rtol < 1 (from 1 on hardly anything could fail)")
    names = sorted({left.dtype.name, right.dtype.name})
    about = {"side": "at_most", "dtype": " and ".join(names), "entries": left.size}
    if not (np.all(np.isfinite(left)) and np.all(np.isfinite(right))):
        return _undecided(claim, "identity", 0.0, rtol, about, {"left": left, "right": right})
    if exact:  # Python's integers cannot overflow, and their quotient is rounded once
        a, b = left.astype(object), right.astype(object)
    else:
        wide = np.result_type(left.dtype, right.dtype, np.float64)
        a, b = left.astype(wide), right.astype(wide)
    size = max(np.max(np.abs(a)), np.max(np.abs(b)))
    if exact:
        error = int(np.max(np.abs(a - b))) / int(size) if size else 0.0
    else:  # divided first: the difference of two entries near the largest number overflows
        error = float(np.max(np.abs(a / size - b / size))) if size else 0.0
        about["ulp"] = error / dtype_eps(left, right)
    outcome = _decide(error, error, 0.0, rtol, "at_most")
    return _verdict(claim, "identity", outcome, error, error, error, 0.0, rtol, about)


def agreement(
    claim: Claim,
    measured: ArrayLike,
    predicted: ArrayLike,
    *,
    margin: Real,
    side: str = "equal",
    relative: bool = False,
    deterministic: bool = False,
    level: Real = LEVEL,
) -> Verdict:
    """Check |measured - predicted| <= margin (or one side of it) with an interval over seeds.

    Parameters
    ----------
    measured : (seeds,), at least two; with `deterministic` one value, () or (1,).
    predicted : scalar, or (seeds,): one prediction for each seed, and the check is on the paired differences against 0.
    margin : in the unit of `measured`; with `relative` a fraction of the prediction.
    relative : check the quotients measured / predicted against 1.

    Raises
    ------
    ValueError
        One seed without `deterministic`, shapes that differ, a negative or infinite margin, a prediction that is not a
        finite number, or one that cannot be divided by.
    """
    check_options(margin, level, side)
    values = as_replicates("measured", measured, deterministic)
    target = as_array("predicted", predicted).astype(np.float64)
    if target.ndim and target.shape != values.shape:
        raise ValueError(
            f"predicted has shape {target.shape}: give a scalar or one value for each of {values.size} seeds"
        )
    if not target.ndim and not np.isfinite(target):
        raise ValueError(f"predicted is {target}: a prediction must be a finite number")
    about = {"side": side, "level": level, "seeds": values.size, "relative": relative, "paired": bool(target.ndim)}
    centre = 1.0 if relative else 0.0 if target.ndim else float(target)
    if not (np.all(np.isfinite(values)) and np.all(np.isfinite(target))):
        return _undecided(claim, "agreement", centre, margin, about, {"measured": values, "predicted": target})
    if relative or target.ndim:
        about |= {"mean_measured": np.mean(values), "mean_predicted": np.mean(target)}
    if relative:
        if np.any(target == 0) or (side != "equal" and np.any(target < 0)):
            raise ValueError(
                "relative=True divides by predicted, which is zero or turns the side round: use relative=False"
            )
        values = values / target
    elif target.ndim:
        values = values - target
    mean, low, high = interval_over_seeds(values, level, about)
    outcome = _decide(low, high, centre, margin, side)
    return _verdict(claim, "agreement", outcome, mean, low, high, centre, margin, about)


def bound(claim: Claim, value: ArrayLike, limit: ArrayLike, *, margin: Real = 0.0, level: Real = LEVEL) -> Verdict:
    """Check value <= limit at every point of a sweep; the measured quantity is the worst slack, min(limit - value).

    Exact values may pass the limit by the rounding of their dtype (the tolerance of `identity`, relative to the point).
    Replicated values state a bound on the mean over seeds: an interval at each point, at level 1 - (1 - level) / points
    (Bonferroni), so that [low, high] covers the worst slack at `level`. A bound that holds for each realisation is
    checked on exact values: flatten the seeds into points.

    Parameters
    ----------
    value : (points,) exact, or (seeds, points) replicated with at least two seeds.
    limit : scalar, (points,), or the shape of `value`.

    The details hold `tightness_max` and `tightness_median` of value / limit over the points with limit > 0, `loose`
    (limit / value at the tightest point: 1000 is a bound loose by 1000), `violations`, `points` and `worst_point`.

    Raises
    ------
    ValueError
        Shapes that do not match, one replicate, or a negative or infinite margin.
    """
    check_options(margin, level)
    value, limit = as_array("value", value), as_array("limit", limit)
    if value.ndim not in (1, 2):
        raise ValueError(f"value has shape {value.shape}: give (points,) or (seeds, points)")
    if limit.shape not in ((), value.shape, value.shape[-1:]):
        raise ValueError(
            f"limit has shape {limit.shape}: give a scalar, (points,), or the shape {value.shape} of value"
        )
    if value.ndim == 2 and value.shape[0] < 2:
        raise ValueError("value has one seed, and a spread needs two: add seeds, or give exact values as (points,)")
    about = {"side": "at_least", "level": level, "points": value.shape[-1]}
    about["seeds"] = value.shape[0] if value.ndim == 2 else None
    if not (np.all(np.isfinite(value)) and np.all(np.isfinite(limit))):
        return _undecided(claim, "bound", 0.0, margin, about, {"value": value, "limit": limit})
    rounding = rounding_tolerance(value, limit)
    value, limit = value.astype(np.float64), np.broadcast_to(limit.astype(np.float64), value.shape)
    slack, room = limit - value, rounding * np.maximum(np.abs(value), np.abs(limit))
    mean = low = high = slack
    if value.ndim == 2:
        mean, low, high = interval(slack, 1 - (1 - level) / value.shape[-1])
        value, limit, room = (np.mean(array, axis=0) for array in (value, limit, room))
    if np.all(low + room >= -margin):
        outcome = "supported"
    else:
        outcome = "refuted" if np.any(high + room < -margin) else "inconclusive"
    with np.errstate(over="ignore"):  # a diverged value over a tiny limit: infinitely violated
        tightness = value[limit > 0] / limit[limit > 0]
    tightest = float(np.max(tightness)) if tightness.size else None
    worst = int(np.argmin(mean))
    about |= {
        "tightness_max": tightest,
        "tightness_median": float(np.median(tightness)) if tightness.size else None,
        "loose": 1 / tightest if tightest is not None and tightest > 0 else None,
        "violations": int(np.sum(mean + room < -margin)),
        "worst_point": worst,
        "rounding": float(room[worst]),
    }
    return _verdict(claim, "bound", outcome, mean[worst], np.min(low), np.min(high), 0.0, margin, about)


def rate(
    claim: Claim,
    x: ArrayLike,
    y: ArrayLike,
    predicted: Real,
    *,
    margin: Real,
    law: str = "power",
    side: str = "equal",
    deterministic: bool = False,
    level: Real = LEVEL,
) -> Verdict:
    """Check the exponent of a power law, or the rate of an exponential or logarithmic law.

    Parameters and laws as in `slope_fit`. The details hold the slope of each seed, the mean intercept, r2, the largest
    mean residual, the fitted range of x, and the trend: the slope with its interval as the smallest points are dropped,
    while at least three distinct points remain. A law that holds only in the limit shows itself there. So does a law of
    another form, which is supported too if its fitted slope over this range happens to be right. With `deterministic`
    the interval is a point, y (points,) or (1, points). Raises as `slope_fit` does.
    """
    check_options(margin, level, side)
    if not np.isfinite(predicted):
        raise ValueError(f"predicted is {predicted}: a prediction must be a finite number")
    x, y = law_data(x, y, law, deterministic)
    about = {"side": side, "level": level, "law": law, "seeds": y.shape[0], "points": y.shape[1]}
    about["fit_range"] = [np.min(x), np.max(x)]
    if not np.all(np.isfinite(y)):
        return _undecided(claim, "rate", predicted, margin, about, {"y": y})
    u, v = law_axes(x, y, law)
    fit = fit_lines(u, v, level)
    order = np.argsort(u, axis=1, kind="stable")
    u, v = np.take_along_axis(u, order, axis=1), np.take_along_axis(v, order, axis=1)
    trend = []
    for dropped in range(1, y.shape[1] - 2):
        if np.min(count_distinct(u[:, dropped:])) < 3:
            break
        part = fit_lines(u[:, dropped:], v[:, dropped:], level)
        trend.append({"dropped": dropped, "slope": part.slope, "low": part.low, "high": part.high})
    about |= {"slopes": fit.slopes, "intercept": fit.intercept, "r2": fit.r2, "trend": trend}
    about["largest_residual"] = np.max(np.abs(fit.residuals))
    about["zero_spread"] = bool(y.shape[0] > 1 and fit.low == fit.high)
    outcome = _decide(fit.low, fit.high, predicted, margin, side)
    return _verdict(claim, "rate", outcome, fit.slope, fit.low, fit.high, predicted, margin, about)


def separation(
    claim: Claim,
    a: ArrayLike,
    b: ArrayLike | None = None,
    *,
    margin: Real = 0.0,
    direction: str = "greater",
    paired: bool = True,
    null: ArrayLike | None = None,
    level: Real = LEVEL,
) -> Verdict:
    """Check that a exceeds b by more than the margin (direction "less": that a lies below b by more than it).

    The effect is a - b ("less": b - a), with a t interval of the paired differences, or Welch's interval when unpaired
    (Welch 1947, doi:10.1093/biomet/34.1-2.28). Supported if low > margin, refuted if high <= margin. An effect of zero
    is refuted only when margin > 0: with margin 0 its interval contains the margin, and the verdict is inconclusive.
    Welch's interval is approximate: at 99.9%, with 3 to 8 seeds and spreads up to 20 to 1, it missed at most 0.35% of
    the time for equal numbers of seeds and 1% for 3 against 8 (200,000 simulated draws). Pair the seeds where you can.

    With `null`, draws of the same statistic under chance (say, distances of random subspaces), b is left out and the
    effect is the distance of a beyond the `null_quantile` at `level`. One replicate is then enough: the null supplies
    the noise. The details hold the largest p-value over the replicates.

    Parameters
    ----------
    a : (seeds,); with `null` also a scalar.   b : (seeds,) if paired, else any number of seeds.   null : (draws,).

    Raises
    ------
    ValueError
        Both or neither of b and null, unpaired lengths, one seed without null, fewer than 1 / (1 - level) draws.
    """
    check_options(margin, level)
    sign = direction_sign(direction)
    if (b is None) == (null is None):
        raise ValueError("give either b (a second sample) or null (draws under chance), and only one of them")
    about = {"side": "more_than", "level": level, "direction": direction}
    if null is not None:
        first = as_replicates("a", np.atleast_1d(as_array("a", a)), np.size(a) == 1)
        second = as_array("null", null).astype(np.float64)
        check_draws(second, level, 1)
    else:
        first, second = as_replicates("a", a, False), as_replicates("b", b, False)
        if paired and first.shape != second.shape:
            raise ValueError(f"a has {first.size} seeds, b {second.size}: pair them one to one, or use paired=False")
    about |= {"seeds": first.size, "null_draws" if null is not None else "seeds_b": second.size}
    if not (np.all(np.isfinite(first)) and np.all(np.isfinite(second))):
        return _undecided(
            claim, "separation", 0.0, margin, about, {"a": first, "b" if null is None else "null": second}
        )
    if null is not None:
        threshold = null_quantile(second, level, direction=direction)
        about |= {"null_quantile": threshold, "null_mean": float(np.mean(second))}
        about["p_value"] = float(np.max(null_p_value(first, second, direction=direction)))
        effect, low, high = interval_over_seeds(sign * (first - threshold), level, about)
    elif paired:
        effect, low, high = interval_over_seeds(sign * (first - second), level, about)
    else:
        effect, low, high = welch_interval(sign * first, sign * second, level)
        about["zero_spread"] = bool(low == high)
    outcome = "supported" if low > margin else "refuted" if high <= margin else "inconclusive"
    return _verdict(claim, "separation", outcome, effect, low, high, 0.0, margin, about)


def _decide(low: Any, high: Any, predicted: Any, margin: Any, side: str) -> str:
    floor, ceiling = predicted - margin, predicted + margin
    if (side == "at_most" or low >= floor) and (side == "at_least" or high <= ceiling):
        return "supported"
    if (side != "at_most" and high < floor) or (side != "at_least" and low > ceiling):
        return "refuted"
    return "inconclusive"


def _verdict(
    claim: Claim, kind: str, outcome: str, measured: Any, low: Any, high: Any, predicted: Any, margin: Any, about: dict
) -> Verdict:
    if not isinstance(claim, Claim):
        raise TypeError(f"claim is a {type(claim).__name__}: give Claim(name, statement, source, role)")
    return Verdict(
        claim=claim.name,
        statement=claim.statement,
        source=claim.source,
        kind=kind,
        role=claim.role,
        control_of=claim.control_of,
        outcome=outcome,
        as_expected=EXPECTED[claim.role] == outcome,
        measured=float(measured),
        low=float(low),
        high=float(high),
        predicted=float(predicted),
        margin=float(margin),
        experiment=None,
        preset=None,
        details=plain(about),
    )


def _undecided(claim: Claim, kind: str, predicted: Any, margin: Any, about: dict, arrays: dict) -> Verdict:
    """Data that are not finite decide nothing: the measured value is nan and its interval the whole line."""
    reasons = [count_not_finite(name, array) for name, array in arrays.items()]
    about["reason"] = ", ".join(reason for reason in reasons if reason)
    return _verdict(claim, kind, "inconclusive", math.nan, -math.inf, math.inf, predicted, margin, about)
