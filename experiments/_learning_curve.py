r"""The learning curve of regression with an infinite kernel on the sphere, from the kernel's spectrum alone.

On inputs uniform on the sphere |x| = sqrt d the kernel of an MLP depends on x.x'/d only, and its eigenfunctions are the
spherical harmonics: those of degree k share the eigenvalue l_k and are N_k in number. With n samples and ridge r,

    n = sum_k N_k L_k + r / kappa,      L_k = l_k / (l_k + kappa)

gives kappa and the share L_k that is learnt of degree k. On a target of degree j and variance 1, with label noise of
standard deviation s, the expected test error against the target itself is

    ((1 - L_j)^2 + s^2) n / (n - sum_k N_k L_k^2) - s^2.

Source: Simon, Dickens, Karkada, DeWeese 2023 (arXiv 2110.03922); Canatar, Bordelon, Pehlevan 2021 (arXiv 2006.13198).
It is an approximation for finite n (it takes eigenfunctions for independent Gaussian features), with nothing to fit.
"""

from collections.abc import Iterable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize
import scipy.special

from theorykit.ntk import infinite

# Harmonics of degree 10 in d >= 12 dimensions number 3e5 and more, far beyond any n here: they only act as a ridge.
DEGREES = np.arange(10)
# Of the quadrature over the cosine. ReLU's kernel has a square root at 1, where the sphere has next to no mass.
POINTS = 400


def predicted_error(
    encoder: nn.Module, d: int, degree: int, samples: Iterable[float], noise: float, ridges: np.ndarray
) -> np.ndarray:
    """Test error at each number of samples, with the best of the ridges (in units of the trace of the kernel)."""
    values, counts, diagonal = _spectrum(encoder, d)
    rest = diagonal - np.sum(counts * values)

    def error(n, ridge):
        def excess(log_kappa):
            kappa = np.exp(log_kappa)
            return np.sum(counts * values / (values + kappa)) + (rest + ridge) / kappa - n

        # From below the smallest eigenvalues to where next to nothing is learnt, whatever the ridge.
        learnt = values / (values + np.exp(scipy.optimize.brentq(excess, -30.0, 30.0)))
        return ((1 - learnt[degree]) ** 2 + noise**2) * n / (n - np.sum(counts * learnt**2)) - noise**2

    return np.array([min(error(n, ridge) for ridge in ridges * n * diagonal) for n in samples])


def _spectrum(encoder, d):
    """Eigenvalues l_k and multiplicities N_k of the degrees, and K(x, x), in float64."""
    order = d / 2 - 1  # of the Gegenbauer polynomials, orthogonal under the law of the cosine of two random inputs
    cosines, weights = scipy.special.roots_gegenbauer(POINTS, order)
    points = np.zeros((POINTS + 1, d))
    points[:-1, 0], points[:-1, 1], points[-1, 0] = cosines, np.sqrt(1 - cosines**2), 1.0
    with jax.enable_x64(True):
        points = jnp.asarray(np.sqrt(d) * points)
        kernel = np.asarray(infinite.infinite_ntk(encoder, points, points[-1:]))[:, 0]
    polynomials = [scipy.special.eval_gegenbauer(k, order, cosines) for k in DEGREES]
    at_one = scipy.special.eval_gegenbauer(DEGREES, order, 1.0)
    # Odd degrees from 3 on are absent from ReLU's kernel without biases: rounding may leave them below zero.
    values = np.maximum(polynomials @ (weights * kernel[:-1]) / (at_one * weights.sum()), 0)
    counts = scipy.special.comb(d + DEGREES - 1, DEGREES) - scipy.special.comb(d + DEGREES - 3, DEGREES - 2)
    return values, counts, kernel[-1]
