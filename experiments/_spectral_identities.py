"""Both sides of the identities of `spectral_optima`, for one random finite joint of positive pairs."""

import jax
import jax.numpy as jnp
import numpy as np

from experiments import _spectral_problems as problems
from theorykit import losses
from theorykit.spectral import contrastive, eigenmaps

FORMS = ((jnp.log1p, jnp.exp), (lambda x: x**2, jax.nn.softplus))  # phi, psi: InfoNCE, and one that is not


def pair(left, right):
    """Both sides of one instance as vectors, in units of the larger one, so that every instance counts alike."""
    left, right = jnp.ravel(left), jnp.ravel(right)
    size = jnp.maximum(jnp.max(jnp.abs(left)), jnp.max(jnp.abs(right)))
    size = jnp.where(size > 0, size, 1.0)
    return {"left": left / size, "right": right / size}


def joints(rng, kind):
    """A symmetric joint, of each kind in turn, and one whose marginals differ."""
    n = problems.POINTS
    weights = rng.gamma(0.5, size=(n, n))
    skew = weights / weights.sum()
    if kind % 5 == 1:  # points without mass
        empty = rng.permutation(n)[:2]
        weights[empty], weights[:, empty] = 0, 0
    elif kind % 5 == 2:  # disconnected
        half = rng.permutation(n) < n // 2
        weights *= half[:, None] == half[None, :]
    elif kind % 5 == 3:  # a lazy walk on a ring with random stops: repeated eigenvalues
        weights = np.roll(np.eye(n), 1, axis=0) + rng.uniform() * np.eye(n)
    elif kind % 5 == 4:  # pairs join two groups, one of two points: two positive eigenvalues, fewer than dimensions
        small = np.arange(n) < 2
        weights *= small[:, None] & ~small[None, :]
    weights = weights + weights.T
    return weights / weights.sum(), skew


def identities(joint, skew, normal):
    """Both sides of every identity of EXACT for one joint, each with its control."""
    n, k = problems.POINTS, problems.DIMENSION
    mass = jnp.sum(joint, axis=1)
    sides = {}

    def sides_of(name, sound, broken):
        sides[name], sides[f"{name}.control"] = pair(*sound), pair(*broken)

    # S1. Inputs (n, 4), positives beside them.
    x, w = normal[0, :, :4], 0.5 * normal[1, :2, :4]
    p = x + 0.3 * normal[2, :, :4]
    gradients, sound, broken = [], [], []
    for phi, psi in FORMS:
        a, b = x @ w.T, p @ w.T
        alpha = contrastive.pair_weights(a, b, contrastive.others(a), phi=phi, psi=psi)
        gradients.append(
            jax.grad(
                lambda w, phi=phi, psi=psi: contrastive.pair_loss(
                    x @ w.T, p @ w.T, contrastive.others(x @ w.T), phi=phi, psi=psi
                )
            )(w)
        )
        for found, weights in ((sound, alpha), (broken, jnp.full_like(alpha, jnp.mean(alpha)))):
            found.append(-w @ contrastive.contrastive_covariance(weights, x, p, contrastive.others(x)))
    sides_of("S1.gradient", *((jnp.stack(gradients), jnp.stack(found)) for found in (sound, broken)))

    # S3. Any embeddings (n, k) for the identity.
    f, adjacency = normal[3, :, :k], contrastive.normalised_adjacency(joint)
    loss = contrastive.spectral_loss(joint, f, f)
    errors = [jnp.sum((adjacency - rows @ rows.T) ** 2) for rows in (jnp.sqrt(mass)[:, None] * f, f / np.sqrt(n))]
    sides_of("S3.identity", *((error - loss, jnp.sum(adjacency**2)) for error in errors))
    best = contrastive.spectral_optimum(joint, k)
    ranked = jnp.linalg.eigvalsh(adjacency)[::-1]
    values, vectors = jnp.linalg.eigh(n * joint)
    uniform = np.sqrt(n) * vectors[:, ::-1][:, :k] * jnp.sqrt(jnp.maximum(values[::-1][:k], 0))[None, :]
    predicted = -jnp.sum(jnp.maximum(ranked[:k], 0) ** 2)
    sides_of(
        "S3.optimum", *((contrastive.spectral_loss(joint, found, found), predicted) for found in (best.fa, uniform))
    )

    # S4.
    kernel, spectrum = contrastive.pair_kernel(joint), contrastive.pair_spectrum(joint)
    held = mass > 0
    unweighted = np.sqrt(n) * jnp.sqrt(mass)[:, None] * spectrum.eigenfunctions
    expansions = [(g * spectrum.eigenvalues[None, :]) @ g.T for g in (spectrum.eigenfunctions, unweighted)]
    sides_of("S4.kernel", *((kernel, expansion) for expansion in expansions))
    sides_of("S4.constant", (kernel @ mass, held.astype(float)), (jnp.mean(kernel, axis=1), held.astype(float)))
    g = normal[4, 0]
    variations = []
    for pairs in (joint, skew):
        eigen = contrastive.pair_spectrum(pairs)
        c = eigen.eigenfunctions.T @ (eigen.marginal * g)
        varies = jnp.sum(pairs * (g[:, None] - g[None, :]) ** 2)
        variations.append((varies, jnp.sum((2 - 2 * eigen.eigenvalues) * c**2)))
    sides_of("S4.invariance", *variations)

    # S6. Five triplets in four dimensions under a Gaussian kernel.
    points = normal[:2, :, :4].reshape(-1, 4)[:15]
    gram = jnp.exp(-jnp.sum((points[:, None, :] - points[None, :, :]) ** 2, axis=2) / 4)
    found = contrastive.kernel_contrastive(gram, 2)
    form = gram[:, :5] @ (gram[10:] - gram[5:10])
    plain = jnp.linalg.eigh((form + form.T) / 2)[1][:, :2]
    triplet = [5 * losses.linear(*jnp.split(gram @ a, 3)) for a in (found.coefficients, plain)]
    sides_of("S6.optimum", *((value, jnp.sum(found.eigenvalues)) for value in triplet))

    # S7. Linear functions of four inputs, fewer than points, so that the kernel is singular.
    beta, ridge, kernel = problems.INVARIANCE, problems.RIDGE, x @ x.T
    best = eigenmaps.vicreg_optimum(joint, kernel, k, invariance=beta, ridge=ridge)
    unpenalised = eigenmaps.vicreg_like_loss(joint, best.embeddings, invariance=beta)
    penalty = ridge * jnp.sum(best.coefficients * best.embeddings)
    predicted = k - jnp.sum(jnp.maximum(best.eigenvalues, 0) ** 2)
    sides_of("S7.optimum", *((unpenalised + weight * penalty, predicted) for weight in (2, 1)))

    # S8.
    smooth = eigenmaps.laplacian_eigenmaps(joint, k)
    values, vectors = jnp.linalg.eigh(jnp.diag(mass) - joint)
    energies = [eigenmaps.graph_energy(joint, z) for z in (smooth.embeddings, np.sqrt(n) * vectors[:, :k])]
    sides_of("S8.optimum", *((energy, 2 * n * jnp.sum(values[1 : k + 1])) for energy in energies))
    return sides
