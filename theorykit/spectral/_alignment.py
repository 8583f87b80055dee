"""Alignment of Gram matrices (CKA); re-exported by `compare`."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from theorykit.spectral._matrices import centre, guard, largest, matrices, paired, product


def linear_cka(x: Float[Array, "n p"], y: Float[Array, "n q"], *, debiased: bool = False) -> Float[Array, ""]:
    r"""Centred kernel alignment of two representations of the same samples, with linear kernels.

    .. math:: \frac{\|X^T Y\|_F^2}{\|X^T X\|_F \, \|Y^T Y\|_F} \quad \text{(centred columns)}

    The n x n kernels are formed only where they are the smaller matrices.

    Parameters
    ----------
    x, y
        Features of n samples, (n, p) and (n, q).
    debiased
        As in `kernel_cka`. The plain value approaches 1 for unrelated features as p and q pass n.

    Returns
    -------
    Array
        A number in [0, 1]; in [-1, 1] if debiased.

    Raises
    ------
    TypeError, ValueError
        If the features are not real and finite, the numbers of samples differ, or one set is the same for all samples.

    Source
    ------
    Kornblith et al. (arXiv 1905.00414); debiased: derivation, `kernel_cka` written in X^T Y for centred columns.
    """
    x, y = (centre(a) for a in paired("linear_cka", x, y, least=4 if debiased else 2))
    x, y = (a / largest(a) for a in (x, y))
    n = x.shape[0]
    if max(x.shape[1], y.shape[1]) > n:
        return _alignment("linear_cka", product(x, x.T), product(y, y.T), debiased)

    def hsic(a, b):
        total = jnp.sum(product(a.T, b) ** 2)
        if not debiased:
            return total
        da, db = jnp.sum(a * a, axis=1), jnp.sum(b * b, axis=1)
        return total - n / (n - 2) * jnp.sum(da * db) + jnp.sum(da) * jnp.sum(db) / ((n - 1) * (n - 2))

    # The three terms cancel where no two samples are related; what is left then is their rounding.
    floors = [_rounding(n, x.dtype) * jnp.sum(product(a.T, a) ** 2) if debiased else 0.0 for a in (x, y)]
    return _ratio("linear_cka", hsic(x, y), (hsic(x, x), hsic(y, y)), floors)


def kernel_cka(k: Float[Array, "n n"], l: Float[Array, "n n"], *, debiased: bool = False) -> Float[Array, ""]:
    r"""Centred kernel alignment of two kernel matrices on the same samples.

    .. math:: \frac{\mathrm{HSIC}(K, L)}{\sqrt{\mathrm{HSIC}(K, K) \, \mathrm{HSIC}(L, L)}}, \qquad
              \mathrm{HSIC}(K, L) \propto \sum_{ij} \tilde K_{ij} \tilde L_{ij}

    with doubly centred matrices, or, if debiased, with U-centred ones (zero diagonal and zero row sums), whose sum is
    the unbiased estimate of HSIC of Song et al.: independent samples then give 0 in the mean, for every n.

    Parameters
    ----------
    k, l
        Symmetric kernel matrices, (n, n) each; n >= 4 if debiased.
    debiased
        Use the unbiased estimate of HSIC in all three places.

    Returns
    -------
    Array
        A number in [-1, 1], not negative for positive semi-definite kernels unless debiased.

    Raises
    ------
    TypeError, ValueError
        If the kernels are not real, finite, symmetric and of one size, or one vanishes when centred.

    Source
    ------
    Cortes, Mohri, Rostamizadeh (2012); Song et al. (2012), theorem 2, for the unbiased estimate of HSIC; Szekely, Rizzo
    (2014), proposition 1, for its form as an inner product.
    """
    k, l = matrices("kernel_cka", k=k, l=l)
    least = 4 if debiased else 2
    if not k.shape[0] == k.shape[1] == l.shape[0] == l.shape[1] >= least:
        raise ValueError(
            f"kernel_cka: shapes {k.shape} and {l.shape}; give two kernels (n, n) on the same n >= {least} samples"
        )
    return _alignment("kernel_cka", _symmetric("k", k), _symmetric("l", l), debiased)


def _symmetric(name: str, k: Array) -> Array:
    """The symmetric part of a kernel; what is not symmetric must be rounding of a product of inexact factors."""
    k = k / largest(k)
    slack = jnp.sqrt(jnp.finfo(k.dtype).eps)
    message = f"kernel_cka: {name} is not symmetric; give the kernel of the samples with themselves"
    return guard((k + k.T) / 2, jnp.max(jnp.abs(k - k.T)) <= slack, message)


def _alignment(where: str, k: Array, l: Array, debiased: bool) -> Array:
    """Cosine of two symmetric kernels after centring."""
    n = k.shape[0]

    def centred(kernel):
        """The centred kernel, and the sum of squares that rounding alone would leave."""
        # A constant changes nothing; taking one away first keeps digits, and makes constant kernels exactly 0.
        shifted = kernel - kernel[0, 1]
        unit = largest(shifted)
        floor = (n * _rounding(n, kernel.dtype) * largest(kernel) / unit) ** 2  # n^2 entries
        kernel = shifted / unit
        if not debiased:
            rows = jnp.mean(kernel, axis=1)
            return kernel - rows[:, None] - rows[None, :] + jnp.mean(rows), floor
        off = ~jnp.eye(n, dtype=bool)
        kernel = jnp.where(off, kernel, 0)
        rows = jnp.sum(kernel, axis=1) / (n - 2)
        return jnp.where(off, kernel - rows[:, None] - rows[None, :] + jnp.sum(rows) / (n - 1), 0), floor

    (k, floor_k), (l, floor_l) = centred(k), centred(l)
    return _ratio(where, jnp.sum(k * l), (jnp.sum(k * k), jnp.sum(l * l)), (floor_k, floor_l))


def _rounding(n: int, dtype) -> float:
    """Rounding of four terms, each a mean of n numbers of size 1: errors of a sum grow like a random walk."""
    return 4 * n**0.5 * float(jnp.finfo(dtype).eps)


def _ratio(where: str, cross: Array, squares: tuple[Array, Array], floors) -> Array:
    for name, square, floor in zip(("first", "second"), squares, floors, strict=True):
        cross = guard(
            cross,
            square > floor,
            f"{where}: the {name} representation relates all pairs of samples alike, so that CKA is 0/0; "
            "constant features carry nothing: check the encoder",
        )
    return cross / jnp.sqrt(squares[0]) / jnp.sqrt(squares[1])
