r"""Independent sources of equal variance, which PCA cannot tell apart.

They differ from Gaussian noise by their distribution, by a variance that changes from segment to segment, or by memory.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32, Key

from theorykit.data.latents import check_counts

# Unit-variance draws by the name of their distribution. A Laplace variable of scale 1 has variance 2.
_SHAPES = {
    "laplace": lambda key, shape, dtype: jax.random.laplace(key, shape, dtype) / math.sqrt(2),
    "uniform": lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -math.sqrt(3), math.sqrt(3)),
    "gaussian": lambda key, shape, dtype: jax.random.normal(key, shape, dtype),
}
SHAPES = tuple(_SHAPES)


class Segmented(NamedTuple):
    """A time series whose law changes from segment to segment.

    Parameters
    ----------
    values : (n, d) array
        One time a row.
    segments : (n,) int32 array
        The number of the segment that each row lies in.
    """

    values: Float[Array, "n d"]
    segments: Int32[Array, "n"]


def independent_sources(
    key: Key[Array, ""], count: int, dim: int, *, shape: str = "laplace"
) -> Float[Array, "count dim"]:
    """Draw independent sources of mean 0 and variance 1, independent in time too.

    Equal variances hide them from PCA. Only the Gaussian shape hides them from linear ICA.

    Parameters
    ----------
    key : PRNG key
        Fixes the draw.
    count, dim : int
        Number of times, and of sources.
    shape : str
        "laplace", "uniform" or "gaussian".

    Returns
    -------
    (count, dim)
        In the default float dtype.

    Raises
    ------
    ValueError
        If a size is below 1 or the shape is unknown.

    Source
    ------
    Comon 1994, Independent component analysis, a new concept? (Signal Processing 36).
    """
    check_counts(count=count, dim=dim)
    return _draw(key, (count, dim), shape)


def modulated_sources(
    key: Key[Array, ""], segments: int, length: int, dim: int, *, spread: float | int, shape: str = "laplace"
) -> Segmented:
    r"""Draw sources of equal overall variance whose scales change from segment to segment.

    .. math:: s_{ti} = \sigma_{i, \pi_i(\tau)} e_{ti} \text{ in segment } \tau, \qquad
              \ln \sigma_{i,k} = c + \text{spread} \cdot \big(\tfrac{2 k}{T - 1} - 1\big), \quad k = 0, \dots, T - 1

    with e of variance 1. Every source takes the same T levels, in a random order of its own, and c makes the mean of
    sigma^2 over the segments 1. So the sources have equal variance, exactly, and their scales are unrelated.

    Parameters
    ----------
    key : PRNG key
        Fixes the draw.
    segments, length, dim : int
        Number of segments T, times in each, and sources.
    spread : float
        Half the range of the logarithmic scales, >= 0; 0 gives stationary sources.
    shape : str
        Distribution of e: "laplace", "uniform" or "gaussian".

    Returns
    -------
    Segmented
        ``values`` (segments * length, dim) in the default float dtype, segment by segment, and ``segments``.

    Raises
    ------
    ValueError
        If a size is below 1, the spread is negative or not finite, or the shape is unknown.

    Source
    ------
    Hyvarinen, Morioka 2016 (arXiv 1605.06336), section 4, for the model; the levels are chosen here.
    """
    check_counts(segments=segments, length=length, dim=dim)
    if not (math.isfinite(spread) and spread >= 0):
        raise ValueError(f"spread must be a finite number >= 0, got {spread}: 0 gives stationary sources.")
    for_order, for_values = jax.random.split(key)
    dtype = jnp.result_type(float)
    levels = np.exp(spread * np.linspace(-1, 1, segments)) if segments > 1 else np.ones(1)
    levels = jnp.asarray(levels / np.sqrt(np.mean(levels**2)), dtype)
    # One sort of uniform numbers draws the orders of all sources.
    scales = levels[jnp.argsort(jax.random.uniform(for_order, (segments, dim), dtype), axis=0)]
    values = jnp.repeat(scales, length, axis=0) * _draw(for_values, (segments * length, dim), shape)
    return Segmented(values, jnp.repeat(jnp.arange(segments, dtype=jnp.int32), length))


def autocorrelated_sources(
    key: Key[Array, ""], count: int, dim: int, *, memory: float | int, shape: str = "laplace"
) -> Float[Array, "count dim"]:
    r"""Draw stationary autoregressive sources of variance 1.

    .. math:: s_t = \rho s_{t-1} + \sqrt{1 - \rho^2} \, e_t, \qquad E[s_t s_{t+k}] = \rho^{|k|}

    independent of each other, with e of mean 0 and variance 1.

    Parameters
    ----------
    key : PRNG key
        Fixes the draw.
    count, dim : int
        Number of times, and of sources.
    memory : float
        rho, in (-1, 1); 0 gives sources independent in time.
    shape : str
        Distribution of the innovations e: "laplace", "uniform" or "gaussian".

    Returns
    -------
    (count, dim)
        In the default float dtype, times in order.

    Raises
    ------
    ValueError
        If a size is below 1, rho is not inside (-1, 1), or the shape is unknown.

    Source
    ------
    Hyvarinen, Morioka 2017 (AISTATS; PMLR 54), section 5.1, for the non-Gaussian autoregressive model.
    """
    check_counts(count=count, dim=dim)
    if not -1 < memory < 1:
        raise ValueError(f"memory must lie inside (-1, 1), got {memory}: from 1 on the variance grows without end.")
    # The start is forgotten to rounding after this many steps; the variance is 1 from the first one.
    dtype = jnp.result_type(float)
    burn_in = math.ceil(math.log(jnp.finfo(dtype).eps) / math.log(abs(memory))) if memory else 0
    innovations = _draw(key, (burn_in + count, dim), shape)

    def step(before, innovation):
        now = memory * before + math.sqrt(1 - memory**2) * innovation
        return now, now

    _, values = jax.lax.scan(step, innovations[0], innovations[1:])
    return jnp.concatenate([innovations[:1], values])[burn_in:]


def _draw(key, size, shape):
    if shape not in _SHAPES:
        raise ValueError(f"no distribution is called {shape!r}: use one of {', '.join(SHAPES)}.")
    return _SHAPES[shape](key, size, jnp.result_type(float))
