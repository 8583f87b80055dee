r"""The distance of single pairs: float32 numbers that every program computes alike, bit for bit.

An exact search is one that returns the k smallest of *these* numbers, ties by the lower id. They must therefore not
depend on how many pairs a program handles, on how a compiler fuses it, or on the machine's fused multiply-add:

- every product is exact. Factors are cut into a leading and a trailing half of 12 bits, so that a product of halves
  has at most 24, and adding it with or without a fused multiply-add gives the same rounding;
- the sum has a fixed order: LANES partial sums, each from the first coordinate to the last, then a tree.

Numbers so small that products of halves leave the normal range (entries under 1e-12 throughout) are not covered.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float32

from theorykit.search._inputs import Metric

# Partial sums: one vector register of 16 float32.
LANES = 16
# Beyond so many terms of a partial sum a loop replaces the unrolled program, which would take long to compile.
UNROLLED = 64


def pair_distances(
    metric: Metric, a: Float32[Array, "*#pairs d"], b: Float32[Array, "*#pairs d"]
) -> Float32[Array, "*pairs"]:
    r"""Distances of pairs of vectors by direct differences or products.

    .. math:: |a - b|^2, \qquad -\langle a, b \rangle, \qquad \tfrac12 |a - b|^2 \text{ for unit vectors (cosine)}

    For cosine both must come from `unit_rows`; a zero vector has distance 1 to everything. Relative errors of l2 and
    cosine are at most (d / LANES + 10) 2^-24; a difference does not cancel as 1 - <a, b> does.

    Parameters
    ----------
    metric
        The distance.
    a, b
        Vectors along the last axis; the leading axes broadcast, and have equal rank.

    Returns
    -------
    Array
        Distances, over the leading axes.

    Source: derivation; splitting of factors: Dekker 1971.
    """
    if metric == "ip":
        # A zero must not carry a sign: selection would order -0 before 0.
        product = _sum(_products(a, b))
        return jnp.where(product == 0, jnp.zeros_like(product), -product)
    difference = a - b
    squared = _sum(_products(difference, difference))
    if metric == "l2":
        return squared
    zero = jnp.all(a == 0, axis=-1) | jnp.all(b == 0, axis=-1)
    return jnp.where(zero, jnp.ones_like(squared), 0.5 * squared)


def unit_rows(x: Float32[Array, "n d"]) -> Float32[Array, "n d"]:
    """Rows scaled to unit norm, zero rows left as they are; the same bits for a row wherever it stands.

    Squared norms are within (d / LANES + 18) 2^-24 of 1.
    """
    largest = jnp.max(jnp.abs(x), axis=-1, keepdims=True)
    # Below the smallest normal number hardware may flush to zero: such a row counts as zero.
    zero = largest < jnp.finfo(jnp.float32).tiny
    # Scaling by a power of two is exact, and keeps squares in range.
    scaled = jnp.where(zero, jnp.zeros_like(x), x * inverse_power(largest))
    norm = jnp.sqrt(_sum(_products(scaled, scaled)))[:, None]
    # A quotient by a root would be compiled as a product with an approximate power. The largest of two integers, which
    # is always the first, hides where the number comes from. A norm is at least 1 here, and a zero row becomes 0 / 1.
    bits = lax.bitcast_convert_type(jnp.where(zero, jnp.ones_like(norm), norm), jnp.int32)
    product = scaled * (1.0 / lax.bitcast_convert_type(jnp.maximum(bits, 1), jnp.float32))
    # Without its last bit it is not a product any more, which a difference could take up in a fused multiply-add.
    bits = lax.bitcast_convert_type(product, jnp.uint32) & jnp.uint32(0xFFFFFFFE)
    return lax.bitcast_convert_type(bits, jnp.float32)


def inverse_power(a: Float32[Array, "*shape"]) -> Float32[Array, "*shape"]:
    """2^-e for numbers between 2^e and 2^(e + 1), exactly, which `ldexp` does not promise; e at most 126."""
    exponent = lax.bitcast_convert_type(a, jnp.int32) & 0x7F800000
    return lax.bitcast_convert_type((254 << 23) - jnp.minimum(exponent, 253 << 23), jnp.float32)


def _products(a, b):
    """a b, each within two roundings, from exact products of halves."""
    a1, a2 = _halves(a)
    b1, b2 = _halves(b)
    return (a2 * b2 + (a1 * b2 + a2 * b1)) + a1 * b1


def _halves(a):
    """Leading 12 bits and the rest, which has 12 bits as well."""
    bits = lax.bitcast_convert_type(a, jnp.uint32) & jnp.uint32(0xFFFFF000)
    leading = lax.bitcast_convert_type(bits, jnp.float32)
    return leading, a - leading


def _sum(terms):
    """Sum along the last axis in the fixed order."""
    d = terms.shape[-1]
    steps = -(-d // LANES)
    terms = jnp.pad(terms, [(0, 0)] * (terms.ndim - 1) + [(0, steps * LANES - d)])
    total = terms[..., :LANES]
    if steps > UNROLLED:
        following = lambda i, total: total + lax.dynamic_slice_in_dim(terms, i * LANES, LANES, axis=-1)  # noqa: E731
        total = lax.fori_loop(1, steps, following, total)
    else:
        for i in range(1, steps):
            total = total + terms[..., i * LANES : (i + 1) * LANES]
    while total.shape[-1] > 1:
        half = total.shape[-1] // 2
        total = total[..., :half] + total[..., half:]
    return total[..., 0]
