"""What every search asks of its input: float32 rows, one dimension, a known metric, a boolean mask.

Whatever depends on values (NaN, infinities, overflow, ids out of range) is checked on concrete arrays only. Inside
`jax.jit` values are not known, and the checks of types and shapes remain.
"""

from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float32, Int32, Num

Metric = Literal["l2", "ip", "cosine"]
# Any real number type, from NumPy or JAX. The letters tie the arguments of one call together.
Base = Num[Array, "n d"] | Num[np.ndarray, "n d"]
Queries = Num[Array, "q d"] | Num[np.ndarray, "q d"]
Mask = Bool[Array, "n"] | Bool[np.ndarray, "n"] | Bool[Array, "q n"] | Bool[np.ndarray, "q n"]


class Neighbours(NamedTuple):
    """The nearest rows of every query, in ascending order of (distance, id)."""

    distances: Float32[Array, "q k"]  # infinite where there is no row
    ids: Int32[Array, "q k"]  # -1 where there is no row


def check_metric(where: str, metric: object) -> None:
    """Raise ValueError unless `metric` is one of the three."""
    if metric not in get_args(Metric):
        raise ValueError(f'{where}: metric is {metric!r}; the metrics are "l2" (squared), "ip" and "cosine"')


def check_k(where: str, k: object) -> int:
    """The number of neighbours as an int; raise unless it is an integer of at least 1."""
    if isinstance(k, bool) or not isinstance(k, int | np.integer):
        raise TypeError(f"{where}: k is a {type(k).__name__}; the number of neighbours is a Python integer")
    if k < 1:
        raise ValueError(f"{where}: k is {k}; ask for at least 1 neighbour")
    return int(k)


def is_concrete(*arrays: object) -> bool:
    """Whether the values of all arrays are known, which they are not inside `jax.jit`."""
    return not any(isinstance(array, jax.core.Tracer) for array in arrays)


def as_rows(name: str, x: Any, metric: Metric | None = None) -> Float32[Array, "n d"]:
    """Rows in float32 on the default device.

    Parameters
    ----------
    name
        What the rows are, for messages: "knn: base".
    x
        Rows (n, d) from NumPy or JAX, of any real dtype, strided or read-only as they please; n may be 0, d not.
    metric
        With l2 or ip, rows so large that a distance could overflow are refused as well; without, only what float32
        cannot hold.

    Returns
    -------
    Array
        float32, (n, d).

    Raises
    ------
    TypeError, ValueError
        If the rows are not real numbers, not (n, d), hold a NaN, an infinity or a number too large.
    """
    return jnp.asarray(checked_rows(name, x, metric))


def checked_rows(name: str, x: Any, metric: Metric | None = None) -> Any:
    """Rows in float32 as `as_rows` gives them, but left on the host where they lie there (NumPy)."""
    if isinstance(x, list | tuple):
        x = np.asarray(x)
    if not isinstance(x, np.ndarray | jax.Array):
        raise TypeError(f"{name} is a {type(x).__name__}; pass an array of NumPy or JAX, one row a vector")
    if not (jnp.issubdtype(x.dtype, jnp.floating) or jnp.issubdtype(x.dtype, jnp.integer)):
        raise TypeError(f"{name} has dtype {x.dtype}; rows are real numbers, cast them to float32")
    if x.ndim != 2 or x.shape[1] == 0:
        raise ValueError(f"{name} has shape {x.shape}; rows are (n, d) with d >= 1, reshape a single one by x[None]")
    rows = _to_float32(x)
    if is_concrete(x) and x.shape[0]:
        # A view of what lies in the host's memory: NumPy needs no program for each shape.
        _check_values(name, np.asarray(rows) if on_host(rows) else rows, metric)
    return rows


def on_host(x: Any) -> bool:
    """Whether a concrete array lies on one device that is the host itself."""
    if isinstance(x, np.ndarray):
        return True
    return (
        is_concrete(x)
        and len(x.devices()) == 1
        and next(iter(x.devices())).platform == "cpu"
        and x.is_fully_addressable
    )


def check_same_dimension(where: str, base: Any, queries: Any) -> None:
    """Raise ValueError unless rows and queries have one dimension."""
    if base.shape[1] != queries.shape[1]:
        raise ValueError(
            f"{where}: base has rows of {base.shape[1]} numbers and queries of {queries.shape[1]}; "
            "both must come from the same embedding"
        )


def check_mask(where: str, mask: Any, q: int, n: int) -> None:
    """Raise unless `mask` is None or boolean and of shape (n,) or (q, n)."""
    if mask is None:
        return
    if not isinstance(mask, np.ndarray | jax.Array) or mask.dtype != bool:
        kind = getattr(mask, "dtype", type(mask).__name__)
        raise TypeError(f"{where}: mask is {kind}; pass a boolean array, True for rows that may be found")
    if mask.shape not in ((n,), (q, n)):
        raise ValueError(
            f"{where}: mask has shape {mask.shape}; give ({n},) for all queries, or ({q}, {n}), a row for each query"
        )


def largest_entry(d: int) -> float:
    """Size of entries up to which no distance, and no intermediate of one, overflows float32.

    |q - x|^2 <= 4 d m^2 for entries up to m. Another factor 16 leaves room for centring (at most doubles an entry)
    and for sums of several such terms.
    """
    return float(np.sqrt(float(np.finfo(np.float32).max) / (64.0 * d)))


def _to_float32(x):
    if isinstance(x, np.ndarray):
        # Values beyond float32 become infinite, which the check of values reports; no warning beside it.
        with np.errstate(over="ignore"):
            return np.asarray(x, dtype=np.float32, order="C")
    return x.astype(jnp.float32)


def _check_values(name, rows, metric):
    limit = np.float32(largest_entry(rows.shape[1]) if metric in ("l2", "ip") else np.finfo(np.float32).max)
    if isinstance(rows, np.ndarray):
        # One pass at the speed of memory. Sums of squares never fall, however they are rounded, so that this one is no
        # less than the largest square, rounded; a NaN, or large entries, go on to the passes below.
        with np.errstate(over="ignore", invalid="ignore"):
            total = float(np.vdot(rows, rows))
        if total <= min(float(limit) ** 2 / 2, float(np.finfo(np.float32).max)):
            return
    # Minimum and maximum hand NaN on, and need no temporary array.
    lowest, highest = float(rows.min()), float(rows.max())
    if -limit <= lowest and highest <= limit:
        return
    fine = np.all(np.abs(np.asarray(rows)) <= limit, axis=1)  # False for NaN
    row = int(np.argmin(fine))
    values = np.asarray(rows[row])
    if not np.all(np.isfinite(values)):
        raise ValueError(
            f"{name}: row {row} holds a NaN, an infinity or a number beyond float32; drop such rows or mend them"
        )
    raise ValueError(
        f"{name}: row {row} holds {values[np.argmax(np.abs(values))]:.3g}, and distances of entries beyond {limit:.3g} "
        'overflow float32; divide base and queries by one number, or use metric="cosine"'
    )
