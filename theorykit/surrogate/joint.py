r"""Finite joint distributions: checks, marginals, density ratio, information; families to draw and to build.

A joint is an array P of shape (nx, ny), nonnegative with sum 1, whose entry (x, y) is the probability of the pair.
Its marginals are p and q, its density ratio r = P / (p q). Cells, whole rows and whole columns may be zero. Logarithms
are natural, so information is in nats.
"""

import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key
from scipy.special import ndtr, ndtri

# The roundings of a sum of n probabilities make a random walk of length sqrt(n) eps; 16 such lengths leave room for
# probabilities that came through a few products.
_ROUNDINGS = 16


class LabelledJoint(NamedTuple):
    """A Markov chain c - y - x of label, text and image, given by two joints that agree on the text.

    Parameters
    ----------
    label_text, text_image : (nc, ny) and (ny, nx)
        P(c, y) and P(y, x); the transpose of the latter is the joint that the other functions take.
    """

    label_text: Float[Array, "nc ny"]
    text_image: Float[Array, "ny nx"]


def check_joint(joint: object, where: str = "check_joint") -> None:
    """Raise unless `joint` is a matrix of probabilities that sums to one.

    Parameters
    ----------
    joint : (nx, ny)
        Probabilities of pairs. Values cannot be looked at inside `jax.jit`; type and shape are.
    where : str
        The function that the message names.

    Raises
    ------
    TypeError, ValueError
        If it is not a matrix of floating-point numbers, has negative or non-finite entries, or does not sum to one.
    """
    if not isinstance(joint, jax.Array):
        raise TypeError(f"{where}: joint is a {type(joint).__name__}; pass a JAX array, jnp.asarray(joint)")
    if not jnp.issubdtype(joint.dtype, jnp.floating):
        raise TypeError(f"{where}: joint has dtype {joint.dtype}; probabilities are floating point, cast it first")
    if joint.ndim != 2 or not joint.size:
        raise ValueError(f"{where}: joint has shape {joint.shape}; give the probabilities of pairs, (nx, ny)")
    if isinstance(joint, jax.core.Tracer):
        return
    values = np.asarray(joint)
    if not np.all(np.isfinite(values)) or np.any(values < 0):
        raise ValueError(f"{where}: joint holds entries that are negative or not finite; give probabilities")
    total = float(np.sum(values, dtype=np.float64))
    if abs(total - 1) > _ROUNDINGS * math.sqrt(values.size) * jnp.finfo(joint.dtype).eps:
        raise ValueError(f"{where}: joint sums to {total:.9g}, not to 1; divide it by its sum")


def check_score(joint: Array, score: object, where: str) -> None:
    """Raise unless `score` has the shape and dtype of `joint` and neither NaN nor +inf where p q > 0."""
    if not isinstance(score, jax.Array):
        raise TypeError(f"{where}: score is a {type(score).__name__}; pass a JAX array, jnp.asarray(score)")
    if score.dtype != joint.dtype:
        raise TypeError(f"{where}: score has dtype {score.dtype} and joint {joint.dtype}; cast one of them")
    if score.shape != joint.shape:
        raise ValueError(f"{where}: score has shape {score.shape} and joint {joint.shape}; give one score to each cell")
    if isinstance(joint, jax.core.Tracer) or isinstance(score, jax.core.Tracer):
        return
    probabilities, values = np.asarray(joint), np.asarray(score)
    seen = (probabilities.sum(axis=1) > 0)[:, None] & (probabilities.sum(axis=0) > 0)[None, :]
    if np.any(seen & ~(values < np.inf)):
        raise ValueError(
            f"{where}: score holds NaN or +inf where both marginals are positive; only -inf, which rules a pair out, "
            "may be infinite"
        )


def marginals(joint: Float[Array, "nx ny"]) -> tuple[Float[Array, " nx"], Float[Array, " ny"]]:
    r"""Marginal distributions p(x) = sum_y P(x, y) and q(y) = sum_x P(x, y).

    Parameters
    ----------
    joint : (nx, ny)
        Probabilities of pairs.

    Returns
    -------
    p, (nx,), and q, (ny,).

    Raises
    ------
    TypeError, ValueError
        If the joint is not one, see `check_joint`.
    """
    check_joint(joint, "marginals")
    return jnp.sum(joint, axis=1), jnp.sum(joint, axis=0)


def density_ratio(joint: Float[Array, "nx ny"]) -> Float[Array, "nx ny"]:
    r"""Density of the joint against the product of its marginals.

    .. math:: r(x, y) = \frac{P(x, y)}{p(x) \, q(y)}, \qquad E_{pq} \, r = 1

    Where p q = 0 the ratio is 0/0 and no expectation sees it; it is 1 there, so that its logarithm is a neutral score.

    Parameters
    ----------
    joint : (nx, ny)
        Probabilities of pairs.

    Returns
    -------
    r, (nx, ny), 0 where P = 0 < p q.

    Raises
    ------
    TypeError, ValueError
        If the joint is not one, see `check_joint`.
    """
    check_joint(joint, "density_ratio")
    p, q = jnp.sum(joint, axis=1), jnp.sum(joint, axis=0)
    # Divided one after the other: the product of two small marginals may underflow where the ratio is moderate.
    conditional = joint / jnp.where(p > 0, p, 1.0)[:, None]
    ratio = conditional / jnp.where(q > 0, q, 1.0)[None, :]
    return jnp.where((p > 0)[:, None] & (q > 0)[None, :], ratio, 1.0)


def mutual_information(joint: Float[Array, "nx ny"]) -> Float[Array, ""]:
    r"""Mutual information.

    .. math:: I(X; Y) = \sum_{x, y} P(x, y) \ln r(x, y) \ge 0, \qquad 0 \ln 0 = 0

    Parameters
    ----------
    joint : (nx, ny)
        Probabilities of pairs.

    Returns
    -------
    I, in nats.

    Raises
    ------
    TypeError, ValueError
        If the joint is not one, see `check_joint`.
    """
    ratio = density_ratio(joint)
    return jnp.sum(joint * jnp.log(jnp.where(joint > 0, ratio, 1.0)))


def chi_square(joint: Float[Array, "nx ny"]) -> Float[Array, ""]:
    r"""Chi-square divergence of the joint from the product of its marginals.

    .. math:: \chi^2 = E_{pq} (r - 1)^2 = E_{pq} r^2 - 1 \ge e^I - 1

    Parameters
    ----------
    joint : (nx, ny)
        Probabilities of pairs.

    Returns
    -------
    chi^2, without unit.

    Raises
    ------
    TypeError, ValueError
        If the joint is not one, see `check_joint`.
    """
    return f_information(joint, lambda r: (r - 1) ** 2)


def f_information(joint: Float[Array, "nx ny"], f: Callable[[Array], Array]) -> Float[Array, ""]:
    r"""Information of a convex function f with f(1) = 0.

    .. math:: I_f(X; Y) = E_{pq} f(r)

    Parameters
    ----------
    joint : (nx, ny)
        Probabilities of pairs.
    f
        Elementwise function of the ratio. It is called at 0 too, where it must return its limit: t ln t is
        `jax.scipy.special.xlogy(t, t)`.

    Returns
    -------
    I_f, in the unit of f: nats for t ln t.

    Raises
    ------
    TypeError, ValueError
        If the joint is not one, see `check_joint`.

    Source
    ------
    Csiszar (Studia Sci. Math. Hungar. 2, 1967).
    """
    product = jnp.sum(joint, axis=1)[:, None] * jnp.sum(joint, axis=0)[None, :]
    return jnp.sum(product * f(density_ratio(joint)))


# Families -----------------------------------------------------------------------------------------------------------


def random_joint(
    key: Key[Array, ""], nx: int, ny: int, *, concentration: float = 1.0, zeros: float = 0.0
) -> Float[Array, "nx ny"]:
    """Draw a joint from the Dirichlet law over its cells, with some cells empty.

    Parameters
    ----------
    key : PRNG key
        Fixes the draw.
    nx, ny : int
        Sizes of the alphabets.
    concentration : float
        alpha > 0 of every cell: 1 is uniform over all joints, small values put the mass on few cells.
    zeros : float
        Probability of a cell to be empty, in [0, 1]. Cells of a random generalised diagonal never are, so that every
        row and column keeps some mass, up to underflow at tiny concentrations.

    Returns
    -------
    (nx, ny), in the default float dtype.

    Raises
    ------
    ValueError
        If a size is below 1, alpha is not positive, or the probability is outside [0, 1].
    """
    _check_sizes("random_joint", nx=nx, ny=ny)
    if not 0 < concentration < math.inf:
        raise ValueError(f"random_joint: concentration is {concentration}; give a positive number")
    if not 0 <= zeros <= 1:
        raise ValueError(f"random_joint: zeros is {zeros}; give a probability, 0 to 1")
    return _random_joint(key, nx, ny, concentration, zeros)


def identical(n: int) -> Float[Array, "n n"]:
    """X = Y uniform on n symbols: information ln n, chi-square n - 1.

    Parameters
    ----------
    n : int
        Size of the alphabet.

    Returns
    -------
    The unit matrix divided by n, in the default float dtype.

    Raises
    ------
    ValueError
        If n is below 1.
    """
    _check_sizes("identical", n=n)
    return jnp.eye(n) / n


def gaussian(correlation: float, nx: int, ny: int) -> Float[Array, "nx ny"]:
    r"""Two standard Gaussian variables of a given correlation, each cut into cells of equal probability.

    .. math:: P(i, j) = \int_{a_i}^{a_{i+1}} \varphi(x) \Big[ \Phi\Big(\frac{b_{j+1} - \rho x}{\sigma}\Big)
              - \Phi\Big(\frac{b_j - \rho x}{\sigma}\Big) \Big] dx, \qquad \sigma^2 = 1 - \rho^2

    By data processing the information is at most that of the variables themselves, -(1/2) ln(1 - rho^2), which it
    reaches in the limit of fine cells.

    Parameters
    ----------
    correlation : float
        rho, strictly between -1 and 1.
    nx, ny : int
        Numbers of cells.

    Returns
    -------
    (nx, ny), in the default float dtype.

    Raises
    ------
    ValueError
        If the correlation is outside (-1, 1) or a size is below 1.

    Source
    ------
    Derivation: the conditional law of y is N(rho x, 1 - rho^2); the integral is by Gauss and Legendre.
    """
    _check_sizes("gaussian", nx=nx, ny=ny)
    if not -1 < correlation < 1:
        raise ValueError(f"gaussian: correlation is {correlation}; give a number strictly between -1 and 1")
    sigma = math.sqrt(1 - correlation**2)
    # phi(9) is 1e-18: what lies beyond does not count in float64.
    edges = np.clip(ndtri(np.arange(nx + 1) / nx), -9.0, 9.0)
    bounds = ndtri(np.arange(ny + 1) / ny)
    # On panels no wider than the conditional deviation 16 nodes integrate to rounding.
    nodes, weights = np.polynomial.legendre.leggauss(16)
    table = np.empty((nx, ny))
    for i, (low, high) in enumerate(itertools.pairwise(edges)):
        panels = np.linspace(low, high, 1 + math.ceil((high - low) / sigma))
        half = np.diff(panels)[:, None] / 2
        x = (panels[:-1, None] + half * (1 + nodes[None, :])).ravel()
        mass = (half * weights[None, :]).ravel() * np.exp(-(x**2) / 2)
        z = (bounds[None, :] - correlation * x[:, None]) / sigma
        # Above the mean the difference of the upper tails: that of the distribution functions would cancel.
        low, high = z[:, :-1], z[:, 1:]
        table[i] = mass @ np.where(low > 0, ndtr(-low) - ndtr(-high), ndtr(high) - ndtr(low))
    return jnp.asarray(table / table.sum(), jnp.result_type(float))


def from_samples(x: Int[Array, " n"], y: Int[Array, " n"], nx: int, ny: int) -> Float[Array, "nx ny"]:
    """Empirical joint of paired labels, the fraction of samples in each cell.

    Parameters
    ----------
    x, y : (n,)
        Whole numbers in 0..nx-1 and 0..ny-1. Inside `jax.jit` their range cannot be checked.
    nx, ny : int
        Sizes of the alphabets.

    Returns
    -------
    (nx, ny), in the default float dtype.

    Raises
    ------
    ValueError
        If there is no sample, the lengths differ, or a label is outside its alphabet.
    """
    _check_sizes("from_samples", nx=nx, ny=ny)
    if x.ndim != 1 or x.shape != y.shape or not x.size:
        raise ValueError(f"from_samples: x has shape {x.shape} and y {y.shape}; give n >= 1 labels of each, (n,)")
    for name, labels, size in (("x", x, nx), ("y", y, ny)):
        if not isinstance(labels, jax.core.Tracer) and (labels.min() < 0 or labels.max() >= size):
            found = f"{name} holds labels {labels.min()} to {labels.max()}"
            raise ValueError(f"from_samples: {found}; keep to 0..{size - 1} or raise n{name}")
    # Counted as whole numbers: sums of 1/n would round.
    counts = jnp.zeros((nx, ny), jnp.int32).at[x, y].add(1)
    return counts.astype(jnp.result_type(float)) / x.size


def random_labelled(key: Key[Array, ""], nc: int, ny: int, nx: int, *, concentration: float = 1.0) -> LabelledJoint:
    """Draw a label c, a text y and an image x with c - y - x Markov: P(c, y, x) = P(c, y) P(x | y).

    Parameters
    ----------
    key : PRNG key
        Fixes the draw.
    nc, ny, nx : int
        Numbers of labels, texts and images.
    concentration : float
        Of the two Dirichlet draws, see `random_joint`.

    Returns
    -------
    LabelledJoint, in the default float dtype.

    Raises
    ------
    ValueError
        As `random_joint`.
    """
    _check_sizes("random_labelled", nc=nc, ny=ny, nx=nx)
    labels, images = jax.random.split(key)
    text_image = random_joint(images, nx, ny, concentration=concentration).T
    logits = jax.random.loggamma(labels, concentration, (nc, ny), text_image.dtype)
    label_given_text = jax.nn.softmax(logits, axis=0)
    return LabelledJoint(label_given_text * jnp.sum(text_image, axis=1)[None, :], text_image)


@jax.jit(static_argnames=("nx", "ny"))
def _random_joint(key, nx, ny, concentration, zeros):
    cells, empty, rows, columns = jax.random.split(key, 4)
    # In logarithms: at small concentrations gamma variables underflow, and all cells at once would have no sum.
    logits = jax.random.loggamma(cells, concentration, (nx, ny), jnp.result_type(float))
    longest = jnp.arange(max(nx, ny))
    i, j = jax.random.permutation(rows, nx)[longest % nx], jax.random.permutation(columns, ny)[longest % ny]
    kept = (jax.random.uniform(empty, (nx, ny)) >= zeros).at[i, j].set(True)
    return jax.nn.softmax(jnp.where(kept, logits, -jnp.inf), axis=(0, 1))


def _check_sizes(where: str, **sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{where}: {name} is {size}; an alphabet has at least one symbol")
