r"""Dimensional collapse of linear encoders under InfoNCE: the matrix that drives the weights, and what it conserves.

With z = W x, W (d, m), and the loss of `squared_distance_loss`, gradient flow is exactly

    dW/dt = W X,   X = S0 - S1,   S0 = (1/n) sum_{i != j} alpha_ij (x_i - x_j)(x_i - x_j)^T,
                                  S1 = (1/n) sum_i (1 - alpha_ii) (x_i' - x_i)(x_i' - x_i)^T

with the softmax weights alpha, which depend on W. S0 is the spread of the data, S1 that of the augmentation. With X
frozen, W(t) = W_0 e^{X t}: a direction along which augmentation outweighs the data, a negative eigenvalue of X, loses
its weight exponentially, and W as many singular values.

With two layers, z = W_2 W_1 x,

    dW_1/dt = W_2^T W_2 W_1 X,    dW_2/dt = W_2 W_1 X W_1^T,

and W_1 W_1^T - W_2^T W_2 stays what it is, for any loss of W_2 W_1 and whether or not X moves. If it is diagonal in the
singular vectors that the two layers share, each mode keeps s_1^2 - s_2^2. If the layers do not share them, the matrix
is conserved and these differences are not.

Losses, velocities and `two_layer_modes` hand a NaN on; the drift and the frozen flow refuse one where it is known.
Losses are means over the samples here, so time is n times that of the source, which takes sums.

Source: Jing, Vincent, LeCun, Tian (arXiv 2110.09348). The closed form of two frozen layers: derivation.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from theorykit.similarity import check_views
from theorykit.spectral._checks import check_symmetric, check_values


def squared_distance_loss(za: Float[Array, "n z"], zb: Float[Array, "n z"]) -> Float[Array, ""]:
    r"""InfoNCE with s = -|.|^2 / 2 whose negatives are the other anchors.

    .. math:: L = -\frac{1}{n} \sum_i \ln \alpha_{ii}

    with the weights of `softmax_weights`. `losses.info_nce` instead takes its negatives from the other view.

    Parameters
    ----------
    za, zb : anchors and their augmentations, (n, z) each.

    Returns
    -------
    The loss, in nats.

    Raises
    ------
    TypeError, ValueError
        If the embeddings are not floating-point arrays of equal shape, or n < 2.

    Source: Jing et al. (arXiv 2110.09348); a mean over samples here.
    """
    check_views("squared_distance_loss", least=2, za=za, zb=zb)
    return -jnp.mean(jnp.diagonal(jax.nn.log_softmax(_scores(za, zb), axis=1)))


def softmax_weights(za: Float[Array, "n z"], zb: Float[Array, "n z"]) -> Float[Array, "n n"]:
    r"""Softmax weights of the loss: of the partner on the diagonal, of the other anchors beside it.

    .. math:: \alpha_{ij} \propto e^{-|a_i - a_j|^2 / 2} \ (j \ne i), \qquad
              \alpha_{ii} \propto e^{-|a_i - b_i|^2 / 2}, \qquad \sum_j \alpha_{ij} = 1

    Parameters
    ----------
    za, zb : anchors and their augmentations, (n, z) each.

    Returns
    -------
    (n, n); rows sum to 1.

    Raises
    ------
    TypeError, ValueError
        As `squared_distance_loss`.

    Source: Jing et al. (arXiv 2110.09348).
    """
    check_views("softmax_weights", least=2, za=za, zb=zb)
    return jax.nn.softmax(_scores(za, zb), axis=1)


def drift_matrix(xa: Float[Array, "n m"], xb: Float[Array, "n m"], weights: Float[Array, "n n"]) -> Float[Array, "m m"]:
    r"""Matrix that drives the weights of a linear encoder, dW/dt = W X.

    .. math:: X = \frac{1}{n} \sum_{i \ne j} \alpha_{ij} (x_i - x_j)(x_i - x_j)^T
                - \frac{1}{n} \sum_i (1 - \alpha_{ii}) (x_i' - x_i)(x_i' - x_i)^T

    At W = 0 all weights are 1/n, and for many samples X is twice the covariance of the anchors minus the second moment
    of x' - x.

    Parameters
    ----------
    xa, xb : inputs: anchors x and their augmentations x', (n, m) each.
    weights : alpha of `softmax_weights` at the present weights, (n, n).

    Returns
    -------
    X, (m, m), symmetric.

    Raises
    ------
    TypeError, ValueError
        If the views are not floating-point arrays of equal shape, n < 2, alpha is not (n, n), or a value not finite.

    Source: Jing et al. (arXiv 2110.09348).
    """
    check_views("drift_matrix", least=2, xa=xa, xb=xb)
    check_values("drift_matrix", xa=xa, xb=xb, weights=weights)
    n = xa.shape[0]
    if weights.shape != (n, n):
        raise ValueError(f"weights have shape {weights.shape} for {n} samples: pass softmax_weights, ({n}, {n})")
    own = jnp.diagonal(weights)
    others = jnp.where(jnp.eye(n, dtype=bool), jnp.zeros_like(weights), weights)
    both = others + others.T
    spread = _product(xa.T, jnp.sum(both, axis=1)[:, None] * xa - _product(both, xa))
    moved = xb - xa
    return (spread - _product(moved.T, (1 - own)[:, None] * moved)) / n


def frozen_flow(
    w0: Float[Array, "d m"], drift: Float[Array, "m m"], times: Float[Array, " t"]
) -> Float[Array, "t d m"]:
    r"""Weights under a drift that does not change.

    .. math:: W(t) = W_0 \, e^{X t}

    Parameters
    ----------
    w0 : initial weights, (d, m).
    drift : X, (m, m), symmetric.
    times : (t,) times; learning rate times steps, for the loss as a mean over samples.

    Returns
    -------
    (t, d, m)

    Raises
    ------
    TypeError, ValueError
        If X is not a finite symmetric matrix, or weights or times are not real and finite.

    Source: Jing et al. (arXiv 2110.09348).
    """
    check_values("frozen_flow", w0=w0, times=times)
    check_symmetric("the drift", drift)
    values, vectors = jnp.linalg.eigh(drift)
    grown = _product(w0, vectors)[None, :, :] * jnp.exp(times[:, None] * values[None, :])[:, None, :]
    return _product(grown, vectors.T)


def two_layer_velocity(
    w1: Float[Array, "h m"], w2: Float[Array, "d h"], drift: Float[Array, "m m"]
) -> tuple[Float[Array, "h m"], Float[Array, "d h"]]:
    r"""Gradient flow of the two layers of z = W_2 W_1 x.

    .. math:: \dot W_1 = W_2^T W_2 W_1 X, \qquad \dot W_2 = W_2 W_1 X W_1^T

    Parameters
    ----------
    w1, w2 : weights of the layers, (h, m) and (d, h).
    drift
        X at W_2 W_1, (m, m).

    Returns
    -------
    dW_1/dt (h, m) and dW_2/dt (d, h).

    Source: Jing et al. (arXiv 2110.09348).
    """
    pushed = _product(_product(w2, w1), drift)
    return _product(w2.T, pushed), _product(pushed, w1.T)


def conserved(w1: Float[Array, "h m"], w2: Float[Array, "d h"]) -> Float[Array, "h h"]:
    r"""What gradient flow conserves, for any loss of the product of the layers.

    .. math:: W_1 W_1^T - W_2^T W_2

    Parameters
    ----------
    w1, w2 : weights of the layers, (h, m) and (d, h).

    Returns
    -------
    (h, h), symmetric.

    Source: Arora, Cohen, Hazan (arXiv 1802.06509); Jing et al. (arXiv 2110.09348).
    """
    return _product(w1, w1.T) - _product(w2.T, w2)


def two_layer_modes(
    times: Float[Array, " t"],
    eigenvalues: Float[Array, " k"],
    first: Float[Array, " k"],
    second: Float[Array, " k"],
) -> tuple[Float[Array, "t k"], Float[Array, "t k"]]:
    r"""Singular values of two aligned layers under a drift that does not change.

    .. math:: \dot s_1 = \lambda s_1 s_2^2, \quad \dot s_2 = \lambda s_2 s_1^2, \qquad c = s_1^2 - s_2^2, \qquad
              \frac{s_2^2}{s_1^2}(t) = \frac{s_2^2}{s_1^2}(0) \, e^{2 \lambda c t}, \qquad
              s_1^2 = \frac{c}{1 - s_2^2 / s_1^2}

    and s_1^2 = s_2^2 = s^2 / (1 - 2 lambda s^2 t) where c = 0. Aligned: the right singular vectors of W_1 are
    eigenvectors of X, and its left ones the right ones of W_2, mode by mode.

    A negative eigenvalue makes the product s_1 s_2 vanish, but of the two factors only the smaller one: the other tends
    to |c|^{1/2}. With c = 0 both do, and only as t^{-1/2}. A positive eigenvalue leads to infinity in a finite time,
    after which the values are NaN: there the drift cannot be taken as frozen.

    Parameters
    ----------
    times : (t,) times >= 0.
    eigenvalues : (k,) lambda, eigenvalues of X.
    first, second : (k,) s_1 and s_2 at time 0, positive.

    Returns
    -------
    s_1 and s_2, (t, k) each.

    Source: Jing et al. (arXiv 2110.09348), for the equations; their solution: derivation.
    """
    s1, s2 = (first * first)[None, :], (second * second)[None, :]
    rate = 2 * eigenvalues[None, :] * times[:, None]
    exponent = rate * (s1 - s2)
    # The solution with s_1^2 = c + s_2^2 put in, so that no difference of equal numbers is left at c = 0.
    squared = s1 / (1 - s2 * rate * _growth(exponent)), s2 / (1 - s1 * rate * _growth(-exponent))
    first, second = (jnp.where(value >= 0, jnp.sqrt(jnp.abs(value)), jnp.nan) for value in squared)
    return first, second


def _growth(x):
    """(e^x - 1) / x, which is 1 at 0."""
    safe = jnp.where(x == 0, jnp.ones_like(x), x)
    return jnp.where(x == 0, jnp.ones_like(x), jnp.expm1(safe) / safe)


def _scores(za, zb):
    """-|a_i - a_j|^2 / 2, with the partner b_i in place of the anchor itself."""
    squares = jnp.sum(za * za, axis=1)
    anchors = squares[:, None] + squares[None, :] - 2 * _product(za, za.T)
    partners = jnp.sum((za - zb) ** 2, axis=1)
    return -jnp.where(jnp.eye(za.shape[0], dtype=bool), partners[:, None], anchors) / 2


def _product(a, b):
    return jnp.matmul(a, b, precision="highest")
