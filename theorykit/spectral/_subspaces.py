"""Distances of subspaces, given by orthonormal bases; re-exported by `compare`."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from theorykit.spectral._matrices import guard, matrices, negligible, product, singular_values, unit_columns


def principal_angles(u: Float[Array, "d k1"], v: Float[Array, "d k2"]) -> Float[Array, " k"]:
    r"""Principal angles between two subspaces.

    .. math:: \cos\theta_i = \sigma_i(U^T V), \qquad \sin\theta_i = \sigma_{k+1-i}(V - U U^T V), \qquad k = k_2 \le k_1

    Each angle is taken from both, so that small ones are as accurate as large ones: arccos alone would lose every angle
    below the square root of the rounding error. Eigenvectors of a repeated eigenvalue are arbitrary within their
    eigenspace: pass bases of whole eigenspaces.

    Parameters
    ----------
    u, v
        Orthonormal columns, (d, k1) and (d, k2).

    Returns
    -------
    Array
        Angles, ascending, in radians within [0, pi/2], (min(k1, k2),).

    Raises
    ------
    TypeError, ValueError
        If a basis is not real, finite and orthonormal (to the square root of the rounding error), or rows differ.

    Source
    ------
    Bjorck, Golub (1973), Numerical methods for computing angles between linear subspaces.
    """
    u, v = _bases("principal_angles", u, v)
    wide, narrow = (u, v) if u.shape[1] >= v.shape[1] else (v, u)
    cosines = singular_values(product(wide.T, narrow))
    sines = singular_values(_outside(wide, narrow))[::-1]
    return jnp.arctan2(sines, cosines)


def projector_distance(u: Float[Array, "d k"], v: Float[Array, "d k"]) -> Float[Array, ""]:
    r"""Distance of two subspaces of one dimension: Frobenius norm of the difference of their projectors.

    .. math:: \frac{\|U U^T - V V^T\|_F}{\sqrt 2} = \|V - U U^T V\|_F = \Big(\sum_i \sin^2\theta_i\Big)^{1/2}

    Computed from the part of V outside of U, hence accurate for close subspaces.

    Parameters
    ----------
    u, v
        Orthonormal columns, (d, k) each.

    Returns
    -------
    Array
        The distance, in [0, sqrt(k)].

    Raises
    ------
    TypeError, ValueError
        As `principal_angles`, and if the dimensions of the subspaces differ.

    Source
    ------
    Edelman, Arias, Smith (arXiv physics/9806030), section 4.3.
    """
    u, v = _equal_bases("projector_distance", u, v)
    return jnp.linalg.norm(_outside(u, v))


def spectrum_overlap(u: Float[Array, "d k"], v: Float[Array, "d k"]) -> Float[Array, ""]:
    r"""Share of one subspace that lies in another of the same dimension: the mean squared cosine.

    .. math:: \frac{1}{k} \|U^T V\|_F^2 = \frac{1}{k} \sum_i \cos^2\theta_i

    Parameters
    ----------
    u, v
        Orthonormal columns, (d, k) each.

    Returns
    -------
    Array
        A number in [0, 1]; k/d in the mean over random subspaces.

    Raises
    ------
    TypeError, ValueError
        As `projector_distance`.

    Source: definition.
    """
    u, v = _equal_bases("spectrum_overlap", u, v)
    return jnp.sum(product(u.T, v) ** 2) / u.shape[1]


def orthonormal_basis(x: Float[Array, "d k"]) -> Float[Array, "d k"]:
    r"""Orthonormal basis of the span of the columns, which must be linearly independent.

    .. math:: X \, \mathrm{diag}(1 / |x_j|) = Q R

    Column j of Q lies in the span of the first j columns. The lengths of the columns do not matter.

    Parameters
    ----------
    x
        Linearly independent columns, (d, k), k <= d.

    Returns
    -------
    Array
        Orthonormal columns Q, (d, k).

    Raises
    ------
    TypeError, ValueError
        If x is not real and finite, k > d, or the columns are linearly dependent up to rounding.

    Source: definition.
    """
    (x,) = matrices("orthonormal_basis", x=x)
    _no_more_columns_than_rows("orthonormal_basis", "x", x)
    q, r = jnp.linalg.qr(unit_columns(x)[0])
    spectrum = singular_values(r)
    return guard(
        q,
        spectrum[-1] > negligible(x) * spectrum[0],
        "orthonormal_basis: the columns of x are linearly dependent up to rounding, their span has fewer dimensions; "
        "drop columns, or keep the leading left singular vectors",
    )


def _bases(where: str, u: Array, v: Array) -> tuple[Array, Array]:
    """The two bases, if they are orthonormal and span subspaces of one space."""
    u, v = matrices(where, u=u, v=v)
    if u.shape[0] != v.shape[0]:
        raise ValueError(f"{where}: u has shape {u.shape} and v {v.shape}; both must be (d, k) with one d")
    return _orthonormal(where, "u", u), _orthonormal(where, "v", v)


def _equal_bases(where: str, u: Array, v: Array) -> tuple[Array, Array]:
    """The two bases, if moreover the subspaces have one dimension."""
    u, v = _bases(where, u, v)
    if u.shape != v.shape:
        raise ValueError(
            f"{where}: u has shape {u.shape} and v {v.shape}; give subspaces of one dimension, or use principal_angles"
        )
    return u, v


def _orthonormal(where: str, name: str, u: Array) -> Array:
    _no_more_columns_than_rows(where, name, u)
    # An error of this size passes into the angles at first order. The square root of the rounding error lies midway
    # between bases that an algorithm made (the rounding error times a power of d) and those that are not orthonormal.
    error = jnp.max(jnp.abs(product(u.T, u) - jnp.eye(u.shape[1], dtype=u.dtype)))
    return guard(
        u,
        error <= jnp.sqrt(jnp.finfo(u.dtype).eps),
        f"{where}: the columns of {name} are not orthonormal; pass orthonormal_basis({name})",
    )


def _no_more_columns_than_rows(where: str, name: str, u: Array) -> None:
    d, k = u.shape
    if k > d:
        raise ValueError(
            f"{where}: {name} has k = {k} columns in d = {d} dimensions, which cannot be independent; "
            "transpose it, or give at most d columns"
        )


def _outside(u: Array, v: Array) -> Array:
    """The part of v that is orthogonal to the span of u."""
    return v - product(u, product(u.T, v))
