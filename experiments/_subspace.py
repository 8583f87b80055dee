"""The quadratic form Tr(W^T C W) of an encoder with last layer W, and Gaussian triplets with a set gap.

C = B^T S B with S = [[0, I], [I, 0]] / (2n) is never formed. The rows of B (2n, M) are the features of n anchors and,
below them, those of their negatives less their positives, so that C = sym[A^T D] / n. Its algebra is in float64 and
NumPy: the matrices are small or thin, and their sizes many.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from experiments import _setting
from experiments._side_by_side import one_object
from theorykit import data, losses

# Of the five sets of classes tried at first, the one with the largest gap after the second eigenvalue.
CLASSES = (0, 1, 6)
# Variances of the three strong directions of the Gaussian data; standard deviation of the other directions and of the
# noise between two views.
STRONG, WEAK = np.array([2.0, 1.0, 1.0]), 0.1


def swap(rows):
    """S B, for B or anything else with 2n rows."""
    return np.roll(rows, len(rows) // 2, axis=0) / len(rows)


def apply(rows, w):
    """C W."""
    return rows.T @ swap(rows @ w)


def spectrum(rows):
    """Eigenvalues of C, ascending, and eigenvectors (M, .), both without the null space outside the rows of B."""
    q, r = np.linalg.qr(rows.T)
    values, vectors = np.linalg.eigh(r @ swap(r.T))
    return values, q @ vectors


def difference(now, start):
    """||C(t) - C(0)||_F, from the difference D of the factors so that nothing cancels: D^T S B_t + B_0^T S D.

    Its square is the sum of the products of the entries of [D; B_0][D; B_0]^T and S[B_t; D][B_t; D]^T S, whose blocks
    come from three products of thin matrices.
    """
    moved = now - start
    inner, cross, first = moved @ moved.T, start @ moved.T, start @ start.T

    def swapped(block):
        return np.roll(block, len(block) // 2, axis=(0, 1)) / len(block) ** 2

    square = np.sum(inner * swapped(first + cross + cross.T + inner)) + np.sum(first * swapped(inner))
    return math.sqrt(max(square + 2 * np.sum(cross.T * swapped(cross + inner)), 0.0))


def distance(w, u):
    """||W W^T - U U^T||_F / sqrt 2 for orthonormal U: ||sin Theta||_F where W is orthonormal too, accurate near 0."""
    a = u.T @ w
    b = w - u @ a
    inside, across, outside = a @ a.T - np.eye(len(a)), a @ (b.T @ b) @ a.T, b.T @ b
    return math.sqrt((np.sum(inside**2) + 2 * np.trace(across) + np.sum(outside**2)) / 2)


def leaving(rows, u):
    """||(I - U U^T) C U||_F, and the largest eigenvalue of U^T C U."""
    image = apply(rows, u)
    inner = u.T @ image
    return np.linalg.norm(image - u @ inner), np.linalg.eigvalsh(inner)[-1]


@partial(jax.jit, static_argnums=0)
def components(encoder, weights, x, anchors):
    """Embeddings of x (n, z), and the mean over the anchors of the gradients of the outputs (z, d)."""
    gradients = jax.vmap(jax.jacrev(lambda point: encoder.apply(weights, point[None])[0]))(anchors)
    return encoder.apply(weights, x), jnp.mean(gradients, axis=0)


@one_object
def quadratic(constrained):
    """Tr(W^T C W) and a snapshot of W, for `stiefel_descent` with C as its data."""

    def loss(w, c):
        w = snapshot(w, c)
        return jnp.sum(w * jnp.matmul(c, w, precision="highest"))

    def snapshot(w, c):
        return matrix(w, w.size // len(c), constrained)

    return loss, snapshot


@one_object
def problem(encoder, constrained):
    """Loss and snapshot for `stiefel_descent`; one pair for each encoder, because compiled programs are kept by them.

    Their data: views, hidden layers V_0 at the start, s, r. The parameters are U of V = V_0 + s U, which multiplies V's
    learning rate by s^2. Both are those of a network with 1/r of the units if the others are zero.
    """

    def parts(w, moves, given):
        views, layers, scale, ratio = given
        layers = jax.tree.map(lambda start, move: start + scale * move, layers, moves)
        return matrix(w, encoder.features, constrained), layers, jnp.concatenate(views), ratio

    def loss(*arguments):
        w, layers, x, ratio = parts(*arguments)
        return ratio * losses.linear(*jnp.split(encoder.apply(params(layers, w), x), 3))

    def snapshot(*arguments):
        w, layers, x, ratio = parts(*arguments)

        def features(point):  # f is linear in W, so that h is the derivative of an output
            return jax.grad(lambda w: encoder.apply(params(layers, w), point[None])[0, 0])(w)[:, 0]

        anchors, positives, negatives = jnp.split(jnp.sqrt(ratio) * jax.vmap(features)(x), 3)
        return w, jnp.concatenate([anchors, negatives - positives])

    return loss, snapshot


def matrix(w, z, constrained):
    """W itself; or, where only its norm is held, from the unit vector of its entries."""
    return w if constrained else math.sqrt(z) * w.reshape(-1, z)


def params(layers, w):
    """Parameters of the encoder with W as its last layer."""
    last = "head" if "conv_0" in layers else f"dense_{len(layers)}"
    return {"params": {**layers, last: {"kernel": w}}}


def views(kind, seed, count, shrink=None):
    """Anchors, positives and negatives, (count, 64) each, of one seed."""
    if kind == "digits":
        return _setting.triplets(seed, 2 * count // len(CLASSES), CLASSES)  # which counts two classes
    return turned(seed, count, shrink)


@one_object
def turned(seed, count, shrink):
    """Gaussian triplets with |x| = sqrt d that quarter turns of the plane of directions 1 and 2 map onto themselves.

    The negative is a view of another sample. Direction 2 is then multiplied by `shrink`. At 1 both directions have one
    eigenvalue, up to the random features; `turned_features` makes those symmetric too.
    """
    rng = np.random.default_rng(seed)
    x, for_a, for_b = rng.standard_normal((3, count // 4, 64))
    x[:, 3:] *= WEAK
    # The moments of anchor and positive less negative are set to those of the population, in the plane as a whole, so
    # that every seed has a gap of about the same size.
    found = np.mean(x * (x - np.roll(x, 1, axis=0)), axis=0)[:3]
    found[1:] = np.mean(found[1:])
    x[:, :3] *= np.sqrt(STRONG / found)
    a, b = x + WEAK * for_a, x + WEAK * for_b
    shrunk = np.where(np.arange(64) == 2, shrink, 1.0)
    return tuple(data.to_sphere(np.float32(_turns(x) * shrunk)) for x in (a, b, np.roll(b, 1, axis=0)))


def turned_features(layers):
    """Hidden layer of a two-layer encoder, a quarter of its units kept and followed by their turns."""
    kernel = np.asarray(layers["dense_0"]["kernel"])
    return {"dense_0": {"kernel": _turns(kernel.T[: kernel.shape[1] // 4]).T}}


def _turns(x):
    """Rows, and their images under one, two and three quarter turns of the plane of directions 1 and 2."""
    found = [x]
    for _ in range(3):
        x = x.copy()
        x[:, 1], x[:, 2] = -x[:, 2], x[:, 1].copy()
        found.append(x)
    return np.concatenate(found)
