"""What `stepwise` computes, each function compiled as a whole: called operation by operation, each is a program.

The mathematics and the checks are in `stepwise`.
"""

import jax
import jax.numpy as jnp


def product(a, b):
    return jnp.matmul(a, b, precision="highest")


@jax.jit
def moment(a, b):
    half = product(a.T, b) / (2 * a.shape[0])
    return half + half.T


@jax.jit
def modes(moment):
    """Eigenvalues and eigenvectors of G, the learned ones first."""
    values, vectors = jnp.linalg.eigh(moment)
    return values[::-1], vectors[:, ::-1]


@jax.jit
def triangle(a, b):
    """|R_jj| of A B = Q R."""
    return jnp.abs(jnp.diagonal(jnp.linalg.qr(product(a, b), mode="r")))


@jax.jit
def sizes(times, eigenvalues, initial):
    decayed = jnp.exp(-8 * times[:, None] * eigenvalues[None, :])
    return initial[None, :] / jnp.sqrt(decayed + (1 - decayed) * (eigenvalues * initial**2)[None, :])


@jax.jit
def weight_gram(directions, scales):
    return product(directions * (scales * scales)[None, :], directions.T)


@jax.jit
def kernel_modes(gram):
    """Eigenvalues of K, ascending, and of K_G, with the coefficients of all modes; where g <= 0 these mean nothing."""
    points = gram.shape[0]
    values, vectors = jnp.linalg.eigh(gram)
    root = product(vectors * jnp.sqrt(jnp.maximum(values, 0))[None, :], vectors.T)
    swapped = jnp.roll(root, points // 2, axis=0)  # P K^{1/2}
    g, u = jnp.linalg.eigh(product(root, swapped) / points)
    g, u = g[::-1], u[:, ::-1]
    return values, g, product(swapped, u) / (points * jnp.where(g > 0, g, 1))[None, :]


@jax.jit
def kernel_embedding(cross, coefficients, scales):
    return product(cross, coefficients) * scales[None, :]
