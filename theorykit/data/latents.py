r"""Latent variables and what generates data from them: for statements that an encoder recovers the latents.

Latents on the unit sphere, with partners drawn from the von Mises-Fisher law around them; and smooth injective
generators, random networks that map latents, or the sources of `theorykit.data.sources`, to observations.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from theorykit.data.normalise import Pairs
from theorykit.similarity import normalise

Scalar = float | int | Float[Array, ""]


class Generator(NamedTuple):
    """A smooth injective map, see `smooth_generator`; a tree of arrays, so it can be vmapped over.

    Parameters
    ----------
    weights : tuple of (m, d) arrays
        One matrix a layer, the first one seen by the latents.
    leak, sharpness : scalars
        Smallest slope of the nonlinearity, and the inverse width of its bend.
    """

    weights: tuple[Float[Array, "_ _"], ...]
    leak: Float[Array, ""]
    sharpness: Float[Array, ""]


# Latents on the sphere ----------------------------------------------------------------------------------------------


def uniform_on_sphere(key: Key[Array, ""], count: int, dim: int) -> Float[Array, "count dim"]:
    """Draw points uniformly on the unit sphere in R^dim.

    z = g / |g| with g ~ N(0, I).

    Parameters
    ----------
    key : PRNG key
        Fixes the draw.
    count, dim : int
        Number of points, and of coordinates.

    Returns
    -------
    (count, dim)
        Rows of norm 1, in the default float dtype.

    Raises
    ------
    ValueError
        If a size is below 1.

    Source
    ------
    Muller 1959, A note on a method for generating points uniformly on n-dimensional spheres (CACM 2).
    """
    check_counts(count=count, dim=dim)
    return normalise(jax.random.normal(key, (count, dim), jnp.result_type(float)))


def von_mises_fisher(key: Key[Array, ""], means: Float[Array, "n d"], concentration: Scalar) -> Float[Array, "n d"]:
    r"""Draw one point around each mean direction from the von Mises-Fisher law, exactly.

    .. math:: p(x \mid m) \propto e^{\kappa m \cdot x} \text{ on } |x| = 1, \qquad
              E[x] = \frac{I_{d/2}(\kappa)}{I_{d/2-1}(\kappa)} \, m

    with modified Bessel functions I. The cosine w = m.x is drawn by rejection from the envelope of Ulrich, which
    accepts more than half of its proposals for every d and kappa; the direction orthogonal to m is uniform.

    Parameters
    ----------
    key : PRNG key
        Fixes the draw.
    means : (n, d)
        Mean directions, rows of norm 1, d >= 2. Inside `jax.jit` their norm cannot be checked.
    concentration : scalar
        kappa >= 0, without unit, may be traced; 0 is the uniform law.

    Returns
    -------
    (n, d)
        Points of norm 1, in the dtype of `means`.

    Raises
    ------
    ValueError
        If d < 2, a mean is not of norm 1, or kappa is negative or not finite.

    Source
    ------
    Ulrich 1984, Computer generation of distributions on the m-sphere (Applied Statistics 33); Wood 1994, Simulation of
    the von Mises Fisher distribution (Communications in Statistics 23), who corrected it.
    """
    d = means.shape[1]
    if d < 2:
        raise ValueError(f"means have {d} coordinate(s), where a sphere is two points: give at least 2.")
    _check_concentration("concentration", concentration)
    if is_concrete(means):
        norms = np.linalg.norm(np.asarray(means, np.float64), axis=1)
        # Rounding each of d coordinates moves the norm by at most sqrt(d) eps; as much again for the caller's work.
        if not np.all(np.abs(norms - 1) <= 10 * math.sqrt(d) * jnp.finfo(means.dtype).eps):
            raise ValueError("means must be rows of norm 1: divide each by its norm (theorykit.similarity.normalise).")
    return _von_mises_fisher(key, means, jnp.asarray(concentration, means.dtype))


@jax.jit
def _von_mises_fisher(key, means, kappa):
    n, d = means.shape
    return _turn(_around_first_axis(key, jnp.full(n, kappa), d), means)


def _around_first_axis(key, kappa, d):
    """One point around e_1 for each concentration, (n, d)."""
    (n,), dtype = kappa.shape, kappa.dtype
    # Wood's b and x_0 = (1 - b) / (1 + b), in forms that keep their digits where b is small (large kappa).
    b = (d - 1) / (2 * kappa + jnp.sqrt(4 * kappa**2 + (d - 1) ** 2))
    centre, gap_0 = (1 - b) / (1 + b), 2 * b / (1 + b)
    most = 4 * b / (1 + b) ** 2  # 1 - x_0^2

    def propose(key):
        # Wood's Beta((d-1)/2, (d-1)/2) variable is g / (g + h) with chi-square g and h. The direction of u, whose
        # square is g, does not depend on them and serves as the direction orthogonal to e_1.
        for_both, for_level = jax.random.split(key)
        u, v = jax.random.normal(for_both, (2, n, d - 1), dtype)
        g, h = jnp.sum(u * u, axis=1), jnp.sum(v * v, axis=1)
        scale = h + b * g
        gap = 2 * b * g / scale  # 1 - w, without cancellation
        bend = jnp.log((gap_0 + centre * gap) / most)  # log of (1 - x_0 w) / (1 - x_0^2)
        accepted = -jax.random.exponential(for_level, (n,), dtype) <= kappa * (gap_0 - gap) + (d - 1) * bend
        aside = (2 * jnp.sqrt(b * h) / scale)[:, None] * u
        return jnp.concatenate([((h - b * g) / scale)[:, None], aside], axis=1), accepted

    def again(state):
        key, points, done = state
        key, now = jax.random.split(key)
        fresh, accepted = propose(now)
        return key, jnp.where((accepted & ~done)[:, None], fresh, points), done | accepted

    start = (key, jnp.zeros((n, d), dtype), jnp.zeros(n, bool))
    return jax.lax.while_loop(lambda state: ~jnp.all(state[2]), again, start)[1]


def _turn(points, means):
    """Points around e_1 as points around the means, by a reflection; its sign is chosen against cancellation."""
    first = means[:, :1]
    sign = jnp.where(first < 0, -jnp.ones_like(first), jnp.ones_like(first))
    mirror = means + sign * jnp.eye(1, means.shape[1], dtype=means.dtype)
    along = jnp.sum(points * mirror, axis=1, keepdims=True) / (1 + jnp.abs(first))
    return sign * (along * mirror - points)


def sphere_pairs(key: Key[Array, ""], count: int, dim: int, *, concentration: Scalar, marginal: Scalar = 0.0) -> Pairs:
    r"""Draw latents on the unit sphere with von Mises-Fisher partners.

    .. math:: a_i \sim \mathrm{vMF}(e_1, \kappa_0), \qquad b_i \mid a_i \sim \mathrm{vMF}(a_i, \kappa)

    With :math:`\kappa_0 = 0`, the default, both marginals are uniform.

    Parameters
    ----------
    key : PRNG key
        Fixes the draw.
    count, dim : int
        Number of pairs, and of coordinates, dim >= 2.
    concentration, marginal : scalars
        kappa and kappa_0, both >= 0; may be traced.

    Returns
    -------
    Pairs
        ``a`` and ``b`` (count, dim), rows of norm 1, in the default float dtype; ``labels`` None.

    Raises
    ------
    ValueError
        If a size or a concentration is out of its range.

    Source
    ------
    Zimmermann et al. 2021 (arXiv 2102.08850), section 3, the generative process.
    """
    check_counts(count=count)
    if dim < 2:
        raise ValueError(f"dim must be at least 2, got {dim}: the sphere in one dimension is two points.")
    _check_concentration("concentration", concentration)
    _check_concentration("marginal", marginal)
    dtype = jnp.result_type(float)
    # Both laws are drawn around e_1 in one loop. The reflection that takes e_1 to a is independent of the second draw.
    kappas = jnp.repeat(jnp.stack([jnp.asarray(kappa, dtype) for kappa in (marginal, concentration)]), count)
    a, around = jnp.split(_around_first_axis(key, kappas, dim), 2)
    return Pairs(a, _turn(around, a), None)


# Generators ---------------------------------------------------------------------------------------------------------
def smooth_generator(
    key: Key[Array, ""],
    dim: int,
    *,
    outputs: int | None = None,
    depth: int = 2,
    leak: float | int = 0.2,
    sharpness: float | int = 1.0,
    condition: float | int = 2.0,
) -> Generator:
    r"""Draw a smooth injective map from R^dim to R^outputs.

    .. math:: g(z) = W_L \, \phi(W_{L-1} \cdots \phi(W_1 z)), \qquad
              \phi(t) = \alpha t + (1 - \alpha) \ln(1 + e^{\beta t}) / \beta

    with leak alpha, sharpness beta and depth L; depth 1 is a linear mixing. Slopes of phi lie in (alpha, 1) and the
    singular values of every W in [1/c, 1], c the condition number (spaced geometrically, with uniform singular
    vectors), so for any two latents

    .. math:: \frac{\alpha^{L-1}}{c^L} |z - z'| \le |g(z) - g(z')| \le |z - z'|

    Parameters
    ----------
    key : PRNG key
        Fixes the weights.
    dim, outputs : int
        Number of latents, and of observed coordinates; outputs >= dim, and equal to it by default.
    depth : int
        Number L of matrices.
    leak, sharpness, condition : float
        alpha in (0, 1], beta > 0 in inverse units of the latents, and c >= 1.

    Returns
    -------
    Generator
        In the default float dtype; apply it with `generate`.

    Raises
    ------
    ValueError
        If a size or setting is out of its range.

    Source
    ------
    Gresele et al. 2020 (arXiv 2006.15090), the smooth leaky nonlinearity; the bounds: derivation.
    """
    outputs = dim if outputs is None else outputs
    check_counts(dim=dim, outputs=outputs, depth=depth)
    if outputs < dim:
        raise ValueError(f"{outputs} outputs cannot hold {dim} latents injectively: use outputs >= dim.")
    if not 0 < leak <= 1:
        raise ValueError(f"leak must lie in (0, 1], got {leak}: at 0 its slope has no lower bound.")
    for name, value, least in (("sharpness", sharpness, 0.0), ("condition", condition, 1.0)):
        if not (math.isfinite(value) and value >= least and value > 0):
            raise ValueError(f"{name} must be finite and {'positive' if not least else 'at least 1'}, got {value}.")
    dtype = jnp.result_type(float)
    # The last layer widens, so that all latents meet the same nonlinearities whatever the number of outputs.
    sizes = [(dim, dim)] * (depth - 1) + [(outputs, dim)]
    values = jnp.asarray(np.geomspace(1, 1 / condition, dim), dtype)

    # One draw for all matrices, because the compiler takes its time over each.
    shapes = [shape for rows, columns in sizes for shape in ((rows, columns), (columns, columns))]
    drawn = jax.random.normal(key, (sum(map(math.prod, shapes)),), dtype)
    pieces = jnp.split(drawn, np.cumsum([math.prod(shape) for shape in shapes])[:-1])
    bases = [_orthonormal(piece.reshape(shape)) for piece, shape in zip(pieces, shapes, strict=True)]
    weights = tuple(
        jnp.matmul(left * values[None, :], right.T, precision="highest")
        for left, right in zip(bases[::2], bases[1::2], strict=True)
    )
    return Generator(weights, jnp.asarray(leak, dtype), jnp.asarray(sharpness, dtype))


def generate(generator: Generator, latents: Float[Array, "n d"]) -> Float[Array, "n x"]:
    """Observations g(z) of a `smooth_generator`.

    Parameters
    ----------
    generator
        The map.
    latents : (n, d)
        One latent vector a row.

    Returns
    -------
    (n, x)
        One observation a row, in units of the latents.
    """
    x = jnp.matmul(latents, generator.weights[0].T, precision="highest")
    for weight in generator.weights[1:]:
        bent = jax.nn.softplus(generator.sharpness * x) / generator.sharpness
        x = generator.leak * x + (1 - generator.leak) * bent
        x = jnp.matmul(x, weight.T, precision="highest")
    return x


def _orthonormal(gaussian):
    """Orthonormal columns, uniform: unlike that of `synthetic` it can be traced, so generators are drawn under vmap."""
    q, r = jnp.linalg.qr(gaussian)
    return q * jnp.where(jnp.diagonal(r) < 0, -1.0, 1.0).astype(q.dtype)[None, :]


def check_counts(**counts):
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}.")


def _check_concentration(name, value):
    if is_concrete(value) and not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{name} must be a finite number >= 0, got {value}: 0 is the uniform law.")


def is_concrete(value):
    return not isinstance(value, jax.core.Tracer)
