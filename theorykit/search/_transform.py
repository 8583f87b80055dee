r"""What a graph search computes with: rows as small integers, and queries whose distances to them are exact integers.

A row x is kept as c = round((x - centre) / step), one step for every coordinate. Up to terms that are the same for all
rows and to a positive factor,

    l2: |q - x|^2  ~  |x'|^2 / 2 - <q - centre, x'>,     ip and cosine: -<q, x>  ~  -<q, x'>,     x' = step * c.

Queries are rounded to integers as well, so few that the products sum to less than 2^24. Float32 then holds every
partial sum exactly, and the path of a search depends neither on how queries are batched nor on the backend.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32, Shaped

from theorykit.search._distances import unit_rows
from theorykit.search._inputs import Metric

Storage = Literal["int8", "bfloat16"]
LARGEST_CODE = 127
EXACT = 2**24  # integers up to here are exact in float32
# Queries need no finer steps than the rows they are compared with; 11 bits also survive a product in TF32.
QUERY_STEPS = 1024
HALF_NORM = 2**25  # the largest integer of a half squared norm; with a product it stays below BIAS


class Codes(NamedTuple):
    """Rows in small integers, and what turns queries into integers."""

    codes: Shaped[Array, "n d"]
    half_norms: Float32[Array, "n"]  # |x'|^2 / (2 * the largest step); zero but for l2
    centre: Float32[Array, "d"]
    steps: Float32[Array, "d"]  # divided by the largest one, so that no size of rows underflows
    finest: Float32[Array, ""]  # least unit of the integer distances, so that none overflows


@jax.jit(static_argnames=("metric", "storage"))
def encode(rows: Float32[Array, "n d"], metric: Metric, storage: Storage) -> Codes:
    """Round rows (n >= 1), for cosine scaled to unit norm, to codes of their range in each coordinate."""
    if metric == "cosine":
        rows = unit_rows(rows)
    low, high = jnp.min(rows, axis=0), jnp.max(rows, axis=0)
    centre = 0.5 * low + 0.5 * high
    steps = (0.5 * high - 0.5 * low) / LARGEST_CODE
    # Adding a power of two times the coordinate's range cannot help: a column without range has code 0.
    codes = (rows - centre[None]) / jnp.where(steps > 0, steps, jnp.ones_like(steps))[None]
    codes = jnp.clip(codes, -LARGEST_CODE, LARGEST_CODE)
    codes = jnp.round(codes).astype(jnp.int8) if storage == "int8" else codes.astype(jnp.bfloat16)
    largest = jnp.max(steps)
    relative = steps / jnp.where(largest > 0, largest, jnp.ones_like(largest))
    half_norms = jnp.zeros(rows.shape[:1], jnp.float32)
    if metric == "l2":
        half_norms = 0.5 * largest * jnp.sum(jnp.square(codes.astype(jnp.float32) * relative[None]), axis=1)
    return Codes(codes, half_norms, centre, relative, jnp.max(half_norms) / HALF_NORM)


@jax.jit
def entry_table(codes: Shaped[Array, "n d"], entries: Int32[Array, "e"]) -> Float32[Array, "d e"]:
    """Codes of the entry points as a product takes them: gathering and turning them took a query half its time."""
    return jnp.take(codes, entries, axis=0, mode="clip").astype(jnp.float32).T


def integer_queries(
    queries: Float32[Array, "q d"],
    centre: Float32[Array, "d"],
    steps: Float32[Array, "d"],
    finest: Float32[Array, ""],
    metric: Metric,
) -> tuple[Float32[Array, "q d"], Float32[Array, "q 1"]]:
    """Queries as integers (in float32), and the factor that turns half norms into the same unit."""
    values = (queries - centre[None] if metric == "l2" else queries) * steps[None]
    most = max(1, min(QUERY_STEPS, EXACT // (LARGEST_CODE * queries.shape[1])))
    unit = jnp.maximum(jnp.max(jnp.abs(values), axis=1, keepdims=True) / most, finest)
    unit = jnp.where(unit > 0, unit, jnp.ones_like(unit))
    return jnp.round(values / unit), 1 / unit


def integer_distances(
    queries: Float32[Array, "q d"],
    factor: Float32[Array, "q 1"],
    codes: Shaped[Array, "q m d"] | Shaped[Array, "d m"],
    half_norms: Float32[Array, "q m"] | Float32[Array, "1 m"],
) -> Int32[Array, "q m"]:
    """Distances up to constants, between -2^24 and 2^25 + 2^24: to rows of each query, or to a table for all."""
    pattern = "qd,dm->qm" if codes.ndim == 2 else "qd,qmd->qm"
    products = jnp.einsum(pattern, queries, codes.astype(jnp.float32), precision="highest")
    return jnp.round(half_norms * factor).astype(jnp.int32) - jnp.round(products).astype(jnp.int32)


@jax.jit(static_argnames=("metric",))
def euclidean(rows: Float32[Array, "n d"], metric: Metric) -> Float[Array, "n e"]:
    r"""Rows whose Euclidean order is that of the metric: what the edges of the graph are chosen by.

    .. math:: x' = (x, \sqrt{M^2 - |x|^2}), \quad M = \max |x| \text{ (ip)}; \qquad x' = (x, 1_{x = 0}) \text{ (cosine)}

    Against a query (q, 0) the squared distance is then constant - 2 <q, x>. Rows of cosine are scaled to unit norm.

    Source: Neyshabur and Srebro 2015 for the inner product; derivation.
    """
    if metric == "l2":
        return rows - jnp.mean(rows, axis=0, keepdims=True)
    if metric == "cosine":
        rows = unit_rows(rows)
    squared = jnp.sum(rows * rows, axis=1, keepdims=True)
    if metric == "ip":
        extra = jnp.sqrt(jnp.maximum(jnp.max(squared) - squared, 0))
    else:
        # Not by the formula of ip: the root would make much of a unit row's rounding.
        extra = (squared == 0).astype(rows.dtype)
    return jnp.concatenate([rows, extra], axis=1)
