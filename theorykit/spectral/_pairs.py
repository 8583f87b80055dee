r"""Finite joints of positive pairs: their normalised adjacency, kernel, eigenfunctions, and spectral optima.

The public names are those of `theorykit.spectral.contrastive`, where the conventions are.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from theorykit.similarity import check_array

# Units in the last place granted to given numbers: about 2**20 rounded terms, as `verify.identity` grants.
ROUNDING = 2**10


class PairSpectrum(NamedTuple):
    """Eigenfunctions of the positive-pair kernel.

    Attributes
    ----------
    eigenvalues
        (n,) gamma in [-1, 1], descending; then as many zeros as there are points without mass.
    eigenfunctions
        (n, n) column i is f_i with sum_a p(a) f_i(a) f_j(a) = delta_ij; 0 on points without mass, and for their zeros.
    marginal
        (n,) p.
    """

    eigenvalues: Float[Array, " n"]
    eigenfunctions: Float[Array, "n n"]
    marginal: Float[Array, " n"]


class SpectralOptimum(NamedTuple):
    """Minimiser of the spectral loss: embeddings of both views (equal for one encoder), (n, k) and (m, k); its loss."""

    fa: Float[Array, "n k"]
    fb: Float[Array, "m k"]
    eigenvalues: Float[Array, " k"]
    loss: Float[Array, ""]


def normalised_adjacency(joint: Float[Array, "n m"]) -> Float[Array, "n m"]:
    r"""Joint of the positive pairs, normalised by its marginals.

    .. math:: A_{ab} = p_+(a, b) / \sqrt{p(a)\, p(b)}

    Parameters
    ----------
    joint
        Probabilities of positive pairs, (n, m).

    Returns
    -------
    (n, m), with singular values in [0, 1] of which the largest is 1; rows and columns without mass are 0.

    Raises
    ------
    TypeError, ValueError
        If the joint is not a floating-point matrix of probabilities that sum to 1.

    Source
    ------
    HaoChen, Wei, Gaidon, Ma (arXiv 2106.04156), section 3.1.
    """
    check_joint("normalised_adjacency", joint)
    return joint * inverse_root(jnp.sum(joint, axis=1))[:, None] * inverse_root(jnp.sum(joint, axis=0))[None, :]


def pair_kernel(joint: Float[Array, "n m"]) -> Float[Array, "n m"]:
    r"""Positive-pair kernel, the exponential of the pointwise mutual information.

    .. math:: K_+(a, b) = \frac{p_+(a, b)}{p(a)\, p(b)} = \sum_i \gamma_i f_i(a) f_i(b)

    Unrestricted scores s minimise the spectral loss -2 E_+ s + E s^2 at s = K_+, the logistic loss at s = ln K_+ and
    InfoNCE of any number of candidates at s = ln K_+ + c(a) with any c. A symmetric s leaves one constant for each
    connected component of the joint. The sum, over the `pair_spectrum`, is for symmetric joints.

    Parameters
    ----------
    joint
        Probabilities of positive pairs, (n, m).

    Returns
    -------
    (n, m), without unit; 0 on points without mass.

    Raises
    ------
    TypeError, ValueError
        As `normalised_adjacency`.

    Source
    ------
    Johnson, El Hanchi, Maddison (arXiv 2210.01883); Levy, Goldberg (NeurIPS 2014) for the logistic loss.
    """
    check_joint("pair_kernel", joint)
    roots = inverse_root(jnp.sum(joint, axis=1)), inverse_root(jnp.sum(joint, axis=0))
    return normalised_adjacency(joint) * roots[0][:, None] * roots[1][None, :]


def pair_spectrum(joint: Float[Array, "n n"]) -> PairSpectrum:
    r"""Eigenfunctions of the positive-pair kernel, orthonormal under the marginal.

    .. math:: \sum_b K_+(a, b) p(b) f_i(b) = \gamma_i f_i(a), \quad f_i = g_i / \sqrt p, \quad A g_i = \gamma_i g_i

    gamma_1 = 1 with f_1 constant, once for each connected component. For g = sum_i c_i f_i,
    E_+ (g(a) - g(b))^2 = sum_i (2 - 2 gamma_i) c_i^2: the more an eigenvalue, the less its function varies over pairs.
    With repeated eigenvalues only the eigenspaces are determined.

    Parameters
    ----------
    joint
        Probabilities of positive pairs, (n, n), symmetric.

    Returns
    -------
    PairSpectrum

    Raises
    ------
    TypeError, ValueError
        As `normalised_adjacency`, and if the joint is not symmetric.

    Source
    ------
    Johnson, El Hanchi, Maddison (arXiv 2210.01883).
    """
    check_joint("pair_spectrum", joint, symmetric=True)
    marginal = jnp.sum(joint, axis=1)
    # Eigenvalues lie in [-1, 1]: -2 puts the points without mass last, and mixes them with no true null vector.
    empty = -2 * (marginal == 0).astype(joint.dtype)
    values, vectors = jnp.linalg.eigh(normalised_adjacency(joint) + jnp.diag(empty))
    values, vectors = values[::-1], vectors[:, ::-1]
    massless = values < -1.5  # halfway between the eigenvalues and the -2
    functions = jnp.where(massless[None, :], 0.0, vectors * inverse_root(marginal)[:, None])
    return PairSpectrum(jnp.where(massless, 0.0, values), functions, marginal)


def spectral_loss(joint: Float[Array, "n m"], fa: Float[Array, "n k"], fb: Float[Array, "m k"]) -> Float[Array, ""]:
    r"""Spectral contrastive loss over the population; `losses.spectral` is the same over a batch.

    .. math:: L = -2 \sum_{ab} p_+(a, b) f(a) \cdot g(b) + \sum_{ab} p(a) p(b) (f(a) \cdot g(b))^2
                = \|A - F G^T\|_F^2 - \|A\|_F^2

    with rows sqrt(p(a)) f(a) of F and sqrt(p(b)) g(b) of G: minimising it is the low-rank factorisation of A.

    Parameters
    ----------
    joint
        Probabilities of positive pairs, (n, m).
    fa, fb
        Embeddings f and g of the points of the two views, (n, k) and (m, k). One encoder: pass it twice.

    Returns
    -------
    The loss, at least -min(k, n, m).

    Raises
    ------
    TypeError, ValueError
        As `normalised_adjacency`, and if the embeddings do not fit the joint.

    Source
    ------
    HaoChen, Wei, Gaidon, Ma (arXiv 2106.04156), lemma 3.2.
    """
    check_joint("spectral_loss", joint)
    check_array("spectral_loss", "fa", fa, like=joint)
    check_array("spectral_loss", "fb", fb, like=joint)
    if fa.ndim != 2 or fb.ndim != 2 or (len(fa), len(fb)) != joint.shape or fa.shape[1] != fb.shape[1]:
        raise ValueError(f"spectral_loss: joint {joint.shape}, fa {fa.shape}, fb {fb.shape}; one row for each point")
    scores = jnp.matmul(fa, fb.T, precision="highest")
    weights = jnp.sum(joint, axis=1)[:, None] * jnp.sum(joint, axis=0)[None, :]
    return jnp.sum(weights * scores * scores) - 2 * jnp.sum(joint * scores)


def spectral_optimum(joint: Float[Array, "n n"], k: int) -> SpectralOptimum:
    r"""Minimiser of the spectral loss for one encoder: the leading eigenfunctions, scaled.

    .. math:: f_i = \sqrt{(\gamma_i)_+}\, g_i / \sqrt p, \qquad \min L = -\sum_{i \le k} (\gamma_i)_+^2

    Unique up to a rotation of the embeddings if gamma_k > gamma_{k+1} or gamma_k <= 0.

    Parameters
    ----------
    joint
        Probabilities of positive pairs, (n, n), symmetric.
    k
        Dimension of the embeddings, 1 to n. Dimensions beyond the positive eigenvalues are 0.

    Returns
    -------
    SpectralOptimum, with fb the same as fa.

    Raises
    ------
    TypeError, ValueError
        As `pair_spectrum`, and if k is outside 1 to n.

    Source
    ------
    HaoChen, Wei, Gaidon, Ma (arXiv 2106.04156), section 3.2; the positive part for indefinite joints: derivation.
    """
    spectrum = pair_spectrum(joint)
    check_rank("spectral_optimum", "k", k, len(joint))
    values = spectrum.eigenvalues[:k]
    kept = jnp.maximum(values, 0)
    f = spectrum.eigenfunctions[:, :k] * jnp.sqrt(kept)[None, :]
    return SpectralOptimum(f, f, values, -jnp.sum(kept**2))


def cross_spectral_optimum(joint: Float[Array, "n m"], k: int) -> SpectralOptimum:
    r"""Minimiser of the spectral loss for two encoders: the leading singular functions, scaled.

    .. math:: A = U \Sigma V^T, \quad f_i = \sqrt{\sigma_i}\, u_i / \sqrt{p_a}, \quad
              g_i = \sqrt{\sigma_i}\, v_i / \sqrt{p_b}, \qquad \min L = -\sum_{i \le k} \sigma_i^2

    (P f, P^-T g) is as good for every invertible P: only the scores and the spanned functions are determined.

    Parameters
    ----------
    joint
        Probabilities of positive pairs, (n, m).
    k
        Dimension of the embeddings, 1 to min(n, m).

    Returns
    -------
    SpectralOptimum, with the singular values as eigenvalues.

    Raises
    ------
    TypeError, ValueError
        As `normalised_adjacency`, and if k is outside 1 to min(n, m).

    Source
    ------
    Derivation: the factorisation of `spectral_loss` and Eckart, Young (1936).
    """
    adjacency = normalised_adjacency(joint)
    check_rank("cross_spectral_optimum", "k", k, min(joint.shape))
    left, values, right = jnp.linalg.svd(adjacency, full_matrices=False)
    values = values[:k]
    fa = left[:, :k] * jnp.sqrt(values)[None, :] * inverse_root(jnp.sum(joint, axis=1))[:, None]
    fb = right.T[:, :k] * jnp.sqrt(values)[None, :] * inverse_root(jnp.sum(joint, axis=0))[:, None]
    return SpectralOptimum(fa, fb, values, -jnp.sum(values**2))


def inverse_root(mass: Float[Array, " n"]) -> Float[Array, " n"]:
    """1 / sqrt(p), and 0 for points without mass."""
    return jnp.where(mass > 0, 1 / jnp.sqrt(jnp.where(mass > 0, mass, 1.0)), 0.0)


def gram_range(gram: Float[Array, "n n"]) -> tuple[Float[Array, "n n"], Float[Array, " n"], Bool[Array, " n"]]:
    """Eigenvectors (columns), eigenvalues with 1 in place of those of the null space, and which are not of it."""
    values, vectors = jnp.linalg.eigh(gram)
    # The error of an eigenvalue is at most about n eps times the largest one.
    kept = values > len(gram) * jnp.finfo(gram.dtype).eps * values[-1]
    return vectors, jnp.where(kept, values, 1.0), kept


def check_joint(where: str, joint: object, *, symmetric: bool = False) -> None:
    """Raise unless `joint` is a matrix of probabilities with sum 1, and symmetric if asked for."""
    check_array(where, "joint", joint)
    if joint.ndim != 2 or not joint.size or (symmetric and joint.shape[0] != joint.shape[1]):
        wanted = "(n, n), for one encoder of both views" if symmetric else "(n, m)"
        raise ValueError(f"{where}: joint has shape {joint.shape}; give probabilities of pairs, {wanted}")
    check_probabilities(where, "joint", joint.reshape(1, -1))
    if symmetric and not isinstance(joint, jax.core.Tracer):
        _check_symmetric(where, "joint", joint, "take (P + P^T) / 2 if both orders of a pair count alike")


def check_probabilities(where: str, name: str, rows: Float[Array, "c n"]) -> None:
    """Raise unless every row is a probability distribution."""
    if isinstance(rows, jax.core.Tracer):
        return
    values = np.asarray(rows)
    if not np.all(np.isfinite(values)) or np.any(values < 0):
        raise ValueError(f"{where}: {name} holds entries that are negative or not finite; give probabilities")
    totals = np.sum(values, axis=1)
    if np.any(np.abs(totals - 1) > ROUNDING * np.finfo(values.dtype).eps):
        raise ValueError(f"{where}: {name} sums to {totals.min():.6g}..{totals.max():.6g}, not to 1; divide by its sum")


def check_gram(where: str, name: str, gram: object) -> None:
    """Raise unless `gram` is a finite symmetric matrix."""
    check_array(where, name, gram)
    if gram.ndim != 2 or gram.shape[0] != gram.shape[1] or not gram.size:
        raise ValueError(f"{where}: {name} has shape {gram.shape}; give a square matrix, (n, n)")
    if not isinstance(gram, jax.core.Tracer):
        if not np.all(np.isfinite(np.asarray(gram))):
            raise ValueError(f"{where}: {name} holds NaN or infinity; find out where it arises")
        _check_symmetric(where, name, gram, "symmetrise it, if only rounding is the cause")


def check_rank(where: str, name: str, k: int, most: int) -> None:
    """Raise unless 1 <= k <= most."""
    if not 1 <= k <= most:
        raise ValueError(f"{where}: {name} is {k}; give a dimension from 1 to {most}")


def _check_symmetric(where, name, matrix, remedy):
    values = np.asarray(matrix)
    gap, size = np.max(np.abs(values - values.T)), np.max(np.abs(values))
    if gap > ROUNDING * np.finfo(values.dtype).eps * size:
        raise ValueError(f"{where}: {name} is not symmetric (by {gap:.2g}, largest entry {size:.2g}); {remedy}")
