r"""Stepwise learning of redundancy reduction from a small start: one mode at a time, at predicted times.

The loss is Barlow Twins without normalisation. With embeddings a = W x, b = W x' of two views, W (d, m),

    L = ||C - I||_F^2,  C = (1/2n) sum_i (a_i b_i^T + b_i a_i^T) = W G W^T,  G = (1/2n) sum_i (x_i x_i'^T + x_i' x_i^T)

and gradient flow on W reads dW/dt = -4 (C - I) W G. Let G have eigenvalues g_1 > g_2 > ... and eigenvectors V. Started
from W = U diag(s) V_k^T with orthonormal U, V_k the first k eigenvectors, the modes do not mix and

    s_j(t) = e^{4 g_j t} / sqrt(s_j(0)^-2 + (e^{8 g_j t} - 1) g_j).

So g_j s_j^2, which is then an eigenvalue of C, is a logistic function of time, and reaches 1/2 at
tau_j = -ln(s_j(0)^2 g_j) / (8 g_j), up to a factor 1/(1 - g_j s_j(0)^2 / 2).

A start that is small but not aligned aligns itself: while all modes are small, mode j grows as e^{4 g_j t}, and with
W_0 V_k = Q R the part of its column that earlier modes have not taken is s_j(0) = |R_jj|. What this leaves out is of
relative order s(0)^{1 - g_{j+1}/g_j}: eigenvalues are "separated" if that is small, which is a matter of their ratios
and of the size of the start together. Modes with g <= 0 are never learned. G is indefinite in general: views that
disagree along a direction have a negative g there.

In kernel form, for f(x) = W phi(x), nothing but K = k(X, X) of all 2n views is needed: G has the same non-zero
eigenvalues as K_G = (1/2n) K^{1/2} P K^{1/2}, where P swaps the two views of every pair.

Predictions from data (the moment, its modes, initial sizes, times) refuse numbers that are not finite where these are
known. The formulas along the flow (`velocity`, `sizes`, Gram matrices and embeddings at a time) hand a NaN on.

Small starts need float64: next to learned modes of size 1, float32 rounds modes below 1e-7 away and puts noise there.

Source: Simon, Knutins, Ziyin, Geisz, Fetterman, Albrecht (arXiv 2303.15438). The inverse-free kernel form, the size of
the corrections and the factor in tau_j: derivation.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from theorykit.similarity import check_views
from theorykit.spectral import _stepwise
from theorykit.spectral._checks import check_symmetric, check_values


class Modes(NamedTuple):
    """The k leading modes of G.

    Attributes
    ----------
    eigenvalues : (k,) g, descending and positive.
    directions : (m, k) orthonormal eigenvectors as columns.
    """

    eigenvalues: Float[Array, " k"]
    directions: Float[Array, "m k"]


class KernelModes(NamedTuple):
    """The k leading modes of K_G.

    Attributes
    ----------
    eigenvalues : (k,) g, descending and positive; those of G in feature space.
    coefficients : (2n, k) A = K^{-1/2} u for the eigenvectors u of K_G, computed as P K^{1/2} u / (2 n g). Mode j in
        feature space is sum_i A_ij phi(x_i), with norm 1.
    """

    eigenvalues: Float[Array, " k"]
    coefficients: Float[Array, "points k"]


def moment_loss(za: Float[Array, "n z"], zb: Float[Array, "n z"]) -> Float[Array, ""]:
    r"""Redundancy reduction without normalisation: make the symmetrised cross-moment of the two views the identity.

    .. math:: L = \| C - I \|_F^2, \qquad C = \frac{1}{2n} \sum_i (a_i b_i^T + b_i a_i^T)

    `losses.barlow_twins` with redundancy 1 is the same function of the embeddings after every dimension has been
    centred and scaled to unit second moment in each view, if then C is symmetric: on (a; b) against (b; a) it always
    is. Here the moments are neither centred nor normalised, so the scale of the embeddings is learned too.

    Parameters
    ----------
    za, zb : two views, (n, z) each.

    Returns
    -------
    The loss, without unit; z at embeddings 0.

    Raises
    ------
    TypeError, ValueError
        If the embeddings are not floating-point arrays of equal shape, or n = 0.

    Source: Simon et al. (arXiv 2303.15438); the relation to Zbontar et al. (arXiv 2103.03230): derivation.
    """
    check_views("moment_loss", za=za, zb=zb)
    gap = _stepwise.moment(za, zb) - jnp.eye(za.shape[1], dtype=za.dtype)
    return jnp.sum(gap * gap)


def cross_moment(xa: Float[Array, "n m"], xb: Float[Array, "n m"]) -> Float[Array, "m m"]:
    r"""Symmetrised cross-moment of the inputs, what the dynamics depends on.

    .. math:: G = \frac{1}{2n} \sum_i (x_i x_i'^T + x_i' x_i^T)

    Parameters
    ----------
    xa, xb : inputs or features of the two views, (n, m) each. Centre them first if the mean is not to be a mode.

    Returns
    -------
    (m, m), symmetric, in general indefinite.

    Raises
    ------
    TypeError, ValueError
        If the views are not finite floating-point arrays of equal shape, or n = 0.

    Source: Simon et al. (arXiv 2303.15438).
    """
    check_views("cross_moment", xa=xa, xb=xb)
    check_values("cross_moment", xa=xa, xb=xb)
    return _stepwise.moment(xa, xb)


def velocity(w: Float[Array, "d m"], moment: Float[Array, "m m"]) -> Float[Array, "d m"]:
    r"""Gradient flow of `moment_loss` on the weights of a linear encoder.

    .. math:: \dot W = -4 (W G W^T - I) W G

    Parameters
    ----------
    w : weights W, (d, m).
    moment : G of `cross_moment`, (m, m).

    Returns
    -------
    dW/dt, (d, m).

    Source: Simon et al. (arXiv 2303.15438).
    """
    pushed = _stepwise.product(w, moment)
    return -4 * _stepwise.product(_stepwise.product(pushed, w.T) - jnp.eye(w.shape[0], dtype=w.dtype), pushed)


def modes(moment: Float[Array, "m m"], k: int) -> Modes:
    r"""Leading k modes of G, which are the ones learned, in this order.

    .. math:: G = V \, \mathrm{diag}(g) \, V^T, \qquad g_1 \ge g_2 \ge \dots

    Parameters
    ----------
    moment : G of `cross_moment`, (m, m), symmetric.
    k : number of modes: the output dimension d, or fewer if G has fewer positive eigenvalues.

    Raises
    ------
    ValueError
        If G is not a finite symmetric matrix, or has fewer than k positive eigenvalues. Under jit only shapes and k
        can be checked.

    Source: Simon et al. (arXiv 2303.15438).
    """
    check_symmetric("G", moment)
    _check_count(k, moment.shape[0])
    values, directions = _stepwise.modes(moment)
    _check_positive("G", values, k)
    return Modes(values[:k], directions[:, :k])


def initial_sizes(w0: Float[Array, "d m"], directions: Float[Array, "m k"]) -> Float[Array, " k"]:
    r"""Effective initial size of each mode.

    .. math:: W_0 V_k = Q R, \qquad s_j(0) = |R_{jj}|

    Parameters
    ----------
    w0 : initial weights, (d, m).
    directions : eigenvectors of `modes` in their order, (m, k), k <= d.

    Returns
    -------
    (k,) s(0), in units of the weights.

    Raises
    ------
    TypeError, ValueError
        If there are more modes than outputs, or numbers that are not real and finite.

    Source: Simon et al. (arXiv 2303.15438).
    """
    check_values("initial_sizes", w0=w0, directions=directions)
    _check_outputs(directions.shape[1], w0.shape[0])
    return _stepwise.triangle(w0, directions)


def sizes(
    times: Float[Array, " t"], eigenvalues: Float[Array, " k"], initial: Float[Array, " k"]
) -> Float[Array, "t k"]:
    r"""Singular values of the weights along the flow.

    .. math:: s_j(t) = \frac{e^{4 g_j t}}{\sqrt{s_j(0)^{-2} + (e^{8 g_j t} - 1) g_j}}
                     = \frac{s_j(0)}{\sqrt{e^{-8 g_j t} + (1 - e^{-8 g_j t}) g_j s_j(0)^2}}

    Exact from an aligned start, for g of any sign. The second form, which is computed, does not overflow for g > 0.

    Parameters
    ----------
    times : (t,) times >= 0; learning rate times steps.
    eigenvalues, initial : (k,) g and s(0).

    Returns
    -------
    (t, k) s_j(t). They tend to g_j^{-1/2} for g_j > 0 and to 0 for g_j < 0.

    Source: Simon et al. (arXiv 2303.15438).
    """
    return _stepwise.sizes(times, eigenvalues, initial)


def learning_times(eigenvalues: Float[Array, " k"], initial: Float[Array, " k"]) -> Float[Array, " k"]:
    r"""Time at which each mode is learned: its eigenvalue of C passes 1/2.

    .. math:: \tau_j = -\frac{\ln(s_j(0)^2 g_j)}{8 g_j}

    Parameters
    ----------
    eigenvalues, initial : (k,) g > 0 and s(0) > 0.

    Returns
    -------
    (k,) times; learning rate times steps. Negative for a mode that starts above its final size.

    Raises
    ------
    TypeError, ValueError
        If an eigenvalue is not positive: such a mode is never learned; or if numbers are not real and finite.

    Source: Simon et al. (arXiv 2303.15438).
    """
    check_values("learning_times", eigenvalues=eigenvalues, initial=initial)
    if not isinstance(eigenvalues, jax.core.Tracer) and np.any(np.asarray(eigenvalues) <= 0):
        raise ValueError(f"eigenvalues {np.asarray(eigenvalues)} hold one that is not positive: leave such modes out")
    return -jnp.log(initial**2 * eigenvalues) / (8 * eigenvalues)


def weight_gram(directions: Float[Array, "m k"], scales: Float[Array, " k"]) -> Float[Array, "m m"]:
    r"""Gram matrix of the weights, which is what the rotation left open does not touch.

    .. math:: W^T W = V_k \, \mathrm{diag}(s^2) \, V_k^T, \qquad s_j(\infty) = g_j^{-1/2}

    Parameters
    ----------
    directions : (m, k) eigenvectors of `modes`.
    scales : (k,) s at one time: a row of `sizes`, or g^{-1/2} for the end of training.

    Returns
    -------
    (m, m)

    Source: Simon et al. (arXiv 2303.15438).
    """
    return _stepwise.weight_gram(directions, scales)


def kernel_modes(gram: Float[Array, "points points"], k: int) -> KernelModes:
    r"""Leading k modes of a kernel method, without leaving the kernel and without an inverse.

    .. math:: K_G = \frac{1}{2n} K^{1/2} P K^{1/2}, \qquad K_G u_j = g_j u_j, \qquad
              A_j = K^{-1/2} u_j = \frac{1}{2 n g_j} P K^{1/2} u_j

    Parameters
    ----------
    gram : K, (2n, 2n), symmetric positive semidefinite: kernel of all first views, then all second views in the same
        order. It may be singular.
    k : number of modes.

    Raises
    ------
    ValueError
        If K is not a finite symmetric positive semidefinite matrix of even size, or K_G has fewer than k positive
        eigenvalues. Under jit only shapes and k can be checked.

    Source: Simon et al. (arXiv 2303.15438); in this form: derivation. G = Phi^T P Phi / 2n for the features
    Phi = K^{1/2} O^T of all views, O with orthonormal columns, so G = O K_G O^T.
    """
    check_symmetric("K", gram)
    points = gram.shape[0]
    if points % 2:
        raise ValueError(f"K has {points} rows, an odd number: stack the first views above the second ones, (2n, 2n)")
    _check_count(k, points)
    values, g, coefficients = _stepwise.kernel_modes(gram)
    if not isinstance(values, jax.core.Tracer):
        least = float(np.asarray(values)[0])
        if least < -_rounding(values):
            raise ValueError(f"K has the negative eigenvalue {least:.3g}: pass a positive semidefinite kernel")
    _check_positive("K_G", g, k)
    return KernelModes(g[:k], coefficients[:, :k])


def kernel_initial_sizes(
    embeddings: Float[Array, "points d"], coefficients: Float[Array, "points k"]
) -> Float[Array, " k"]:
    r"""Effective initial size of each mode from the initial embeddings of all views.

    .. math:: F_0^T A = W_0 V_k = Q R, \qquad s_j(0) = |R_{jj}|

    Parameters
    ----------
    embeddings : F_0 = f_0(X), (2n, d), in the order of the kernel.
    coefficients : A of `kernel_modes`, (2n, k), k <= d.

    Returns
    -------
    (k,) s(0).

    Raises
    ------
    TypeError, ValueError
        If there are more modes than outputs, or numbers that are not real and finite.

    Source: Derivation: F_0 = Phi W_0^T and V_k = Phi^T A.
    """
    check_values("kernel_initial_sizes", embeddings=embeddings, coefficients=coefficients)
    _check_outputs(coefficients.shape[1], embeddings.shape[1])
    return _stepwise.triangle(embeddings.T, coefficients)


def kernel_embedding(
    cross: Float[Array, "q points"], coefficients: Float[Array, "points k"], scales: Float[Array, " k"]
) -> Float[Array, "q k"]:
    r"""Predicted embeddings of any points, up to one rotation of the outputs.

    .. math:: f(x) = U \, \mathrm{diag}(s) \, A^T k(X, x), \qquad s_j(\infty) = g_j^{-1/2}

    Parameters
    ----------
    cross : k(x, X), (q, 2n), between the points and all training views; K itself for the training views.
    coefficients : A of `kernel_modes`, (2n, k).
    scales : (k,) s at one time: a row of `sizes`, or g^{-1/2} for the end of training.

    Returns
    -------
    (q, k), with U = I.

    Source: Simon et al. (arXiv 2303.15438); in this form: derivation.
    """
    return _stepwise.kernel_embedding(cross, coefficients, scales)


def _rounding(values):
    """What rounding makes of an eigenvalue 0: size times eps times the largest (numpy.linalg.matrix_rank's rule)."""
    values = np.asarray(values)
    return len(values) * float(np.finfo(values.dtype).eps) * float(np.max(np.abs(values)))


def _check_count(k, size):
    if not 1 <= k <= size:
        raise ValueError(f"k is {k}: ask for 1 to {size} modes, the size of the matrix")


def _check_outputs(k, d):
    if k > d:
        raise ValueError(f"{k} modes for {d} outputs, which learn at most {d}: pass the {d} leading modes")


def _check_positive(name, values, k):
    if isinstance(values, jax.core.Tracer):
        return
    positive = int(np.sum(np.asarray(values) > _rounding(values)))
    if positive < k:
        raise ValueError(
            f"{name} has {positive} positive eigenvalues, fewer than k = {k}: the other modes are never learned, "
            f"ask for at most {positive}"
        )
