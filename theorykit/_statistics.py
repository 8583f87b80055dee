"""Intervals over seeds, fitted laws and null distributions, with the validation of what goes into them."""

import math
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

# Scalars and tuples are named because run-time type checks do not see them inside NumPy's alias.
ArrayLike = npt.ArrayLike | tuple | complex | float | int
Real = float | int | np.floating | np.integer

# Errors of independent roundings grow like sqrt(n): 2**10 units in the last place cover about 2**20 rounded terms.
ROUNDING_ULP = 2**10
SIDES = ("equal", "at_most", "at_least")
LAWS = {"power": (True, True), "exponential": (False, True), "logarithmic": (True, False)}  # (ln of x?, ln of y?)


class Fit(NamedTuple):
    """A fitted law: the mean slope over seeds with its interval, and what the line leaves over.

    `slopes` is (seeds,); `residuals` is (points,), the mean over seeds of data minus line in the fitted coordinates (a
    systematic sign pattern is curvature); `r2` is the share of the variance within seeds that the lines explain.
    """

    slope: float
    low: float
    high: float
    intercept: float
    slopes: np.ndarray
    r2: float
    residuals: np.ndarray


def interval(samples: ArrayLike, level: Real, axis: int = 0) -> tuple[Any, Any, Any]:
    """Student's t interval of the mean over seeds: (mean, low, high), each with the shape of `samples` without `axis`.

    Raises
    ------
    ValueError
        Fewer than two seeds on `axis`, samples that are not finite, or a level outside (0, 1).
    """
    check_options(0.0, level)
    samples = as_array("samples", samples)
    if samples.ndim == 0 or samples.shape[axis] < 2:
        raise ValueError(f"samples have shape {samples.shape}: an interval needs two seeds or more on axis {axis}")
    if not np.all(np.isfinite(samples)):
        raise ValueError(f"{count_not_finite('samples', samples)}: leave these seeds out, and say so")
    samples = np.moveaxis(samples.astype(np.float64), axis, 0)
    mean, error = _mean_and_error(samples)
    return _ends(mean, error, samples.shape[0] - 1, level)


def slope_fit(x: ArrayLike, y: ArrayLike, *, law: str, level: Real, deterministic: bool = False) -> Fit:
    """Fit a law by least squares in each seed; the interval of the mean slope is Student's t over seeds.

    power: ln y on ln x;   exponential: ln y on x;   logarithmic: y on ln x.

    Parameters
    ----------
    x : (points,) or (seeds, points), at least three distinct values.
    y : (seeds, points), at least two seeds; with `deterministic` (points,) or (1, points), and the interval is a point.
    level : 0.95 in figures.

    Raises
    ------
    ValueError
        Too few seeds or points, an x or y that is not positive where its logarithm is taken, data that are not finite.
    """
    check_options(0.0, level)
    x, y = law_data(x, y, law, deterministic)
    if not np.all(np.isfinite(y)):
        raise ValueError(f"{count_not_finite('y', y)}: leave these seeds or points out, and say so")
    return fit_lines(*law_axes(x, y, law), level)


def null_quantile(draws: ArrayLike, level: Real, *, direction: str = "greater") -> float:
    """Value that one more draw from the null distribution passes with probability at most 1 - level.

    The order statistic of rank ceil((n + 1) level): passing it is the same event as `null_p_value` <= 1 - level.

    Parameters
    ----------
    draws : (draws,), at least 1 / (1 - level).
    """
    check_options(0.0, level)
    sign, draws = direction_sign(direction), as_array("null", draws)
    check_draws(draws, level, 1)
    rank = math.ceil((draws.size + 1) * level * (1 - 1e-12))  # 1e-12: (n + 1) level may be rounded above an integer
    return float(sign * np.sort(sign * draws.astype(np.float64))[rank - 1])


def null_interval(draws: ArrayLike, level: Real) -> tuple[float, float]:
    """Central interval that one more draw leaves with probability at most 1 - level, half of it on either side."""
    check_options(0.0, level)
    check_draws(as_array("null", draws), level, 2)
    one_sided = (1 + level) / 2
    return null_quantile(draws, one_sided, direction="less"), null_quantile(draws, one_sided, direction="greater")


def null_p_value(statistic: ArrayLike, draws: ArrayLike, *, direction: str = "greater") -> np.ndarray:
    """Probability under chance of a value at least as extreme: (1 + #{draws >= statistic}) / (1 + n).

    Parameters
    ----------
    statistic : any shape, and the result has it.   draws : (draws,).

    Source: Phipson and Smyth 2010, arXiv 1603.05766 (the 1 keeps the test valid: p is never 0).
    """
    sign, draws = direction_sign(direction), as_array("null", draws)
    if draws.ndim != 1:
        raise ValueError(f"null has shape {draws.shape}: give (draws,)")
    ordered = np.sort(sign * draws.astype(np.float64))
    extreme = draws.size - np.searchsorted(
        ordered, sign * as_array("statistic", statistic).astype(np.float64), side="left"
    )
    return np.asarray((1 + extreme) / (1 + draws.size))


def _mean_and_error(samples: np.ndarray) -> tuple[Any, Any]:
    """Mean and standard error over the leading axis.

    Scaled by a power of two, so that squares do not overflow (a diverging loss reaches 1e200), and taken about the
    first seed, so that identical seeds give exactly that value and no spread.
    """
    exponent = np.frexp(np.max(np.abs(samples), axis=0))[1]
    scaled = np.ldexp(samples, -exponent)
    offset = scaled - scaled[:1]
    mean, error = scaled[0] + np.mean(offset, axis=0), np.sqrt(np.var(offset, axis=0, ddof=1) / len(samples))
    return np.ldexp(mean, exponent), np.ldexp(error, exponent)


def _ends(mean: Any, error: Any, freedom: Any, level: Real) -> tuple[Any, Any, Any]:
    from scipy.special import stdtrit  # imported here: it costs as much time as NumPy

    with np.errstate(over="ignore"):  # an infinite end is a true statement of ignorance
        half = stdtrit(freedom, (1 + level) / 2) * error
        return mean, mean - half, mean + half


def interval_over_seeds(values: np.ndarray, level: Real, about: dict[str, Any]) -> tuple[Any, Any, Any]:
    if values.size == 1:
        return values[0], values[0], values[0]
    mean, low, high = interval(values, level)
    about["zero_spread"] = bool(low == high)
    return mean, low, high


def welch_interval(a: np.ndarray, b: np.ndarray, level: Real) -> tuple[Any, Any, Any]:
    (mean_a, error_a), (mean_b, error_b) = (_mean_and_error(values) for values in (a, b))
    error = np.hypot(error_a, error_b)
    share = (error_a / error) ** 2 if error else 0.0
    freedom = 1 / (share**2 / (a.size - 1) + (1 - share) ** 2 / (b.size - 1))
    return _ends(mean_a - mean_b, error, freedom, level)


def law_data(x: ArrayLike, y: ArrayLike, law: str, deterministic: bool) -> tuple[np.ndarray, np.ndarray]:
    """x and y as float64 (seeds, points), validated except for y that is not finite."""
    if law not in LAWS:
        raise ValueError(f"law is {law!r}: use one of {sorted(LAWS)}")
    x, y = as_array("x", x).astype(np.float64), as_array("y", y).astype(np.float64)
    if deterministic and y.ndim == 1:
        y = y[None, :]
    if y.ndim != 2 or (y.shape[0] != 1 if deterministic else y.shape[0] < 2):
        raise ValueError(
            f"y has shape {y.shape}: give (seeds, points) with two seeds or more, or (points,) declared deterministic"
        )
    if x.shape not in (y.shape, y.shape[1:]):
        raise ValueError(f"x has shape {x.shape}, y {y.shape}: give x as (points,) or with the shape of y")
    x = np.broadcast_to(x, y.shape)
    if not np.all(np.isfinite(x)):
        raise ValueError(f"{count_not_finite('x', x)}: give finite abscissae")
    if np.min(count_distinct(x)) < 3:
        raise ValueError("a seed has fewer than 3 distinct x, which fit any line: add points")
    for name, values, logarithm in zip("xy", (x, y), LAWS[law], strict=True):
        if logarithm and np.any(values[np.isfinite(values)] <= 0):
            raise ValueError(
                f"{name} holds values <= 0, and the {law} law takes its logarithm: leave them out, or use another law"
            )
    return x, y


def law_axes(x: np.ndarray, y: np.ndarray, law: str) -> tuple[np.ndarray, np.ndarray]:
    log_x, log_y = LAWS[law]
    return np.log(x) if log_x else x, np.log(y) if log_y else y


def count_distinct(x: np.ndarray) -> np.ndarray:
    return 1 + np.sum(np.diff(np.sort(x, axis=1), axis=1) > 0, axis=1)


def fit_lines(u: np.ndarray, v: np.ndarray, level: Real) -> Fit:
    mean_u, mean_v = np.mean(u, axis=1, keepdims=True), np.mean(v, axis=1, keepdims=True)
    u, v = u - mean_u, v - mean_v
    slopes = np.sum(u * v, axis=1, keepdims=True) / np.sum(u**2, axis=1, keepdims=True)
    left = v - slopes * u
    size = max(float(np.max(np.abs(v))), np.finfo(np.float64).tiny)  # squares of a diverging y overflow
    total = float(np.sum((v / size) ** 2))
    r2 = 1 - float(np.sum((left / size) ** 2)) / total if total else 1.0
    intercept, slopes = float(np.mean(mean_v - slopes * mean_u)), slopes[:, 0]
    slope, low, high = interval_over_seeds(slopes, level, {})
    return Fit(float(slope), float(low), float(high), intercept, slopes, r2, np.mean(left, axis=0))


def check_draws(draws: np.ndarray, level: Real, tails: int) -> None:
    needed = math.ceil(tails / (1 - level) * (1 - 1e-12))  # 1e-12: 1 - level is rounded
    if draws.ndim != 1 or draws.size < needed:
        raise ValueError(f"null has shape {draws.shape}: level {level} needs (draws,) with {needed} draws or more")


def as_array(name: str, values: Any, complex_ok: bool = False) -> np.ndarray:
    array = np.asarray(values)
    # can_cast admits the narrow floats that NumPy does not know itself (bfloat16, float8), and no strings or objects
    if not np.can_cast(array.dtype, np.clongdouble if complex_ok else np.longdouble):
        raise TypeError(f"{name} has dtype {array.dtype}: give {'' if complex_ok else 'real '}numbers")
    if array.size == 0:
        raise ValueError(f"{name} has shape {array.shape} and no entries: nothing was measured")
    return array


def count_not_finite(name: str, array: np.ndarray) -> str:
    count = int(np.sum(~np.isfinite(array)))
    return f"{count} of {array.size} entries of {name} are not finite" if count else ""


def dtype_eps(*arrays: np.ndarray) -> float:
    """Spacing at 1 of the coarsest floating dtype; 0 where all are integers or booleans."""
    ones = [np.ones((), array.real.dtype) for array in arrays if array.dtype.kind not in "biu"]
    return max((float(np.nextafter(one, one + one) - one) for one in ones), default=0.0)


def rounding_tolerance(*arrays: np.ndarray) -> float:
    eps = dtype_eps(*arrays)
    return min(ROUNDING_ULP * eps, math.sqrt(eps))


def check_options(margin: Real, level: Real, side: str = "equal") -> None:
    if not (np.isfinite(margin) and margin >= 0):
        raise ValueError(f"margin is {margin}: give a finite number >= 0, declared with its reason")
    if not 0 < level < 1:
        raise ValueError(f"level is {level}: give a number between 0 and 1, such as 0.999")
    if side not in SIDES:
        raise ValueError(f"side is {side!r}: use one of {SIDES}")


def direction_sign(direction: str) -> int:
    if direction not in ("greater", "less"):
        raise ValueError(f"direction is {direction!r}: use 'greater' or 'less'")
    return 1 if direction == "greater" else -1


def as_replicates(name: str, values: ArrayLike, deterministic: bool) -> np.ndarray:
    values = as_array(name, values)
    if deterministic:
        if values.size != 1 or values.ndim > 1:
            raise ValueError(f"{name} has shape {values.shape}: a deterministic measurement is one number")
    elif values.ndim != 1 or values.size < 2:
        raise ValueError(
            f"{name} has shape {values.shape}: give (seeds,) with two seeds or more, or declare it deterministic"
        )
    return values.reshape(-1).astype(np.float64)  # differences of unsigned integers would wrap round
