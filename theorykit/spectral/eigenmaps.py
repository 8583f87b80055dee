r"""Optima of VICReg-like losses and Laplacian eigenmaps, which non-contrastive losses reach.

Both are eigenproblems on a graph of positive pairs. VICReg-like losses shape the second moment of the embeddings and
keep the eigenvectors above a level; eigenmaps prescribe it and keep the smoothest eigenvectors. Joints of positive
pairs are as in `theorykit.spectral.contrastive`. Types and shapes are checked always, values where they are known (not
inside jit, vmap or grad).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from theorykit.similarity import check_array
from theorykit.spectral._pairs import check_gram, check_joint, check_rank, gram_range, normalised_adjacency

__all__ = ["Eigenmaps", "VICRegOptimum", "graph_energy", "laplacian_eigenmaps", "vicreg_like_loss", "vicreg_optimum"]

Weight = float | int | Float[Array, ""]


class VICRegOptimum(NamedTuple):
    """Minimiser of the VICReg-like loss.

    Attributes
    ----------
    embeddings
        (n, k) psi at the points; columns with mu_i <= 0 are 0.
    coefficients
        (n, k) psi(x) = k(x, points) `coefficients` at any x.
    eigenvalues
        (k,) mu, descending.
    loss
        k - sum_i (mu_i)_+^2, penalty included.
    """

    embeddings: Float[Array, "n k"]
    coefficients: Float[Array, "n k"]
    eigenvalues: Float[Array, " k"]
    loss: Float[Array, ""]


class Eigenmaps(NamedTuple):
    """Laplacian eigenmaps: embeddings (n, k), eigenvalues (k,) ascending, and the energy 2 n times their sum."""

    embeddings: Float[Array, "n k"]
    eigenvalues: Float[Array, " k"]
    energy: Float[Array, ""]


def vicreg_like_loss(joint: Float[Array, "n n"], psi: Float[Array, "n k"], *, invariance: Weight) -> Float[Array, ""]:
    r"""Invariance plus distance of the second moment from the identity, over the population, without penalty.

    .. math:: L_0 = \beta\, E_+ |\psi(a) - \psi(b)|^2 + \| E\, \psi \psi^T - I \|_F^2

    The second moment is not centred, so a constant embedding counts. `losses.vicreg` is centred, and has a hinge.

    Parameters
    ----------
    joint
        Probabilities of positive pairs, (n, n), symmetric.
    psi
        Embeddings of the points, (n, k).
    invariance
        beta >= 0; below 1 in the source.

    Returns
    -------
    The loss, at least 0.

    Raises
    ------
    TypeError, ValueError
        If the joint is not a symmetric matrix of probabilities, the embeddings do not fit it, or beta is negative.

    Source
    ------
    Cabannes, Kiani, Balestriero, LeCun, Bietti (arXiv 2302.02774).
    """
    where = "vicreg_like_loss"
    check_joint(where, joint, symmetric=True)
    check_array(where, "psi", psi, like=joint)
    if psi.ndim != 2 or len(psi) != len(joint):
        raise ValueError(f"{where}: psi has shape {psi.shape}, joint {joint.shape}; give one row for each point")
    beta = _weight(where, joint, invariance=invariance)
    marginal = jnp.sum(joint, axis=1)
    moment = jnp.matmul((marginal[:, None] * psi).T, psi, precision="highest")
    gap = moment - jnp.eye(psi.shape[1], dtype=psi.dtype)
    return beta * graph_energy(joint, psi) + jnp.sum(gap * gap)


def vicreg_optimum(
    joint: Float[Array, "n n"], gram: Float[Array, "n n"], k: int, *, invariance: Weight, ridge: Weight
) -> VICRegOptimum:
    r"""Minimiser of the VICReg-like loss over k functions of a reproducing kernel Hilbert space.

    .. math:: L = L_0(\psi) + 2 \lambda \|\psi\|_H^2 \ge k - \sum_{i \le k} (\mu_i)_+^2, \qquad
              M = (1 - \beta) I + \beta A - \lambda K^{-1}, \quad K = D^{1/2} k(\cdot, \cdot) D^{1/2}

    mu_i are the k largest eigenvalues of M on the range of K, A is the normalised joint and D its marginal. With
    rows sqrt(p(a)) psi(a) of Phi it is L = k - |M|^2 + |M - Phi Phi^T|^2. A penalty lambda |psi|^2 has lambda / 2 here.

    Parameters
    ----------
    joint
        Probabilities of positive pairs, (n, n), symmetric.
    gram
        Kernel k of the points, (n, n), positive semidefinite. For psi = W^T x with the penalty on |W|^2 it is X X^T;
        for free embeddings and no penalty it is the identity.
    k
        Dimension of the embeddings, 1 to n. Beyond the rank of K the eigenvalues are -inf: columns of 0.
    invariance, ridge
        beta, lambda >= 0.

    Returns
    -------
    VICRegOptimum

    Raises
    ------
    TypeError, ValueError
        As `vicreg_like_loss`; if the Gram matrix is not a symmetric matrix of n points, or k is outside 1 to n.

    Source
    ------
    Cabannes, Kiani, Balestriero, LeCun, Bietti (arXiv 2302.02774); singular K: derivation.
    """
    where = "vicreg_optimum"
    check_joint(where, joint, symmetric=True)
    check_gram(where, "gram", gram)
    check_array(where, "gram", gram, like=joint)
    if gram.shape != joint.shape:
        raise ValueError(f"{where}: gram has shape {gram.shape}, joint {joint.shape}; both are over the same n points")
    check_rank(where, "k", k, len(joint))
    beta, ridge = (_weight(where, joint, **w) for w in ({"invariance": invariance}, {"ridge": ridge}))
    root = jnp.sqrt(jnp.sum(joint, axis=1))
    basis, scale, kept = gram_range(root[:, None] * gram * root[None, :])
    basis = jnp.where(kept[None, :], basis, 0.0)
    within = jnp.matmul(
        basis.T, jnp.matmul(normalised_adjacency(joint), basis, precision="highest"), precision="highest"
    )
    # Eigenvalues on the range of K, of which each is at least the first number: the second puts the rest last.
    least = (1 - beta) - beta - ridge * jnp.max(jnp.where(kept, 1 / scale, 0.0))
    form = beta * within + jnp.diag(jnp.where(kept, (1 - beta) - ridge / scale, 2 * jnp.minimum(least, 0) - 1))
    values, vectors = jnp.linalg.eigh(form)
    values, vectors = values[::-1][:k], vectors[:, ::-1][:, :k]
    values = jnp.where(jnp.arange(k) < jnp.sum(kept), values, -jnp.inf)
    positive = jnp.maximum(values, 0)
    chosen = jnp.matmul(basis / scale[None, :], vectors * jnp.sqrt(positive)[None, :], precision="highest")
    coefficients = root[:, None] * chosen
    embeddings = jnp.matmul(gram, coefficients, precision="highest")
    return VICRegOptimum(embeddings, coefficients, values, k - jnp.sum(positive**2))


def graph_energy(graph: Float[Array, "n n"], z: Float[Array, "n k"]) -> Float[Array, ""]:
    r"""How much embeddings vary along the edges of a graph, every edge in both orders.

    .. math:: \sum_{ij} G_{ij} |z_i - z_j|^2 = 2\, \mathrm{Tr}\, Z^T (D - G) Z \quad (G = G^T)

    Parameters
    ----------
    graph
        Weights of the edges, (n, n).
    z
        Embeddings, (n, k).

    Returns
    -------
    The energy, in units of the weights times squared units of the embeddings.

    Raises
    ------
    TypeError, ValueError
        If the arrays are not floating-point matrices of the same n.

    Source
    ------
    Belkin, Niyogi (Neural Computation 15, 2003).
    """
    check_array("graph_energy", "graph", graph)
    check_array("graph_energy", "z", z, like=graph)
    if graph.ndim != 2 or z.ndim != 2 or graph.shape != (len(z), len(z)):
        raise ValueError(f"graph_energy: graph has shape {graph.shape}, z {z.shape}; give (n, n) and (n, k)")
    # By differences, not by the Laplacian: close embeddings keep their digits.
    return jax.lax.map(lambda row: jnp.sum(row[0][:, None] * (row[1][None, :] - z) ** 2), (graph, z)).sum()


def laplacian_eigenmaps(graph: Float[Array, "n n"], k: int) -> Eigenmaps:
    r"""Smoothest centred and white embeddings of a graph.

    .. math:: \min \sum_{ij} G_{ij} |z_i - z_j|^2 = 2 n \sum_{i=2}^{k+1} \lambda_i(D - G)
              \quad \text{under} \quad Z^T Z = n I, \; Z^T 1 = 0

    The eigenvalues are those on the complement of the constant, ascending: lambda_2, lambda_3, ... for weights >= 0,
    with a 0 for each further connected component. Negative weights are allowed; D - G may then have negative
    eigenvalues, and the formula by the rank of the eigenvalue fails while this function holds.

    Parameters
    ----------
    graph
        Weights G of the edges, (n, n), symmetric; its diagonal does not matter.
    k
        Dimension of the embeddings, 1 to n - 1.

    Returns
    -------
    Eigenmaps; unique up to a rotation if the eigenvalues k and k + 1 differ.

    Raises
    ------
    TypeError, ValueError
        If the graph is not a finite symmetric matrix, or k is outside 1 to n - 1.

    Source
    ------
    Belkin, Niyogi (Neural Computation 15, 2003); as optima of VICReg: Balestriero, LeCun (arXiv 2205.11508).
    """
    check_gram("laplacian_eigenmaps", "graph", graph)
    n = len(graph)
    check_rank("laplacian_eigenmaps", "k", k, n - 1)
    degrees = jnp.sum(graph, axis=1)
    # No eigenvalue of D - G exceeds twice the largest row sum of |G| (Gershgorin): the constant comes last.
    widest = jnp.max(jnp.sum(jnp.abs(graph), axis=1))
    beyond = jnp.where(widest > 0, 4 * widest, 1.0)
    values, vectors = jnp.linalg.eigh(jnp.diag(degrees) - graph + beyond / n)
    embeddings = np.sqrt(n) * vectors[:, :k]
    return Eigenmaps(embeddings, values[:k], 2 * n * jnp.sum(values[:k]))


def _weight(where, joint, **setting):
    """A weight >= 0 in the dtype of the joint; checked unless it is traced."""
    ((name, value),) = setting.items()
    if not isinstance(value, jax.core.Tracer) and not 0 <= float(value) < np.inf:
        raise ValueError(f"{where}: {name} is {value}; give a finite number >= 0")
    return jnp.asarray(value, joint.dtype)
