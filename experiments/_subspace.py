"""The quadratic form Tr(W^T C W) of an encoder with last layer W, its networks, Gaussian triplets with a set gap.

C = B^T S B with S = [[0, I], [I, 0]] / (2n) is never formed. The rows of B (2n, M) are the features of n anchors and,
below them, those of their negatives less their positives, so that C = sym[A^T D] / n. Its algebra is in float64 and
NumPy: the matrices are small or thin, and their sizes many.
"""

import dataclasses
import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import _setting
from experiments._side_by_side import BRIEFLY, one_object
from theorykit import data, encoders, losses, similarity
from theorykit.spectral import compare, stiefel

# Of the five sets of classes tried at first, the one with the largest gap after the second eigenvalue.
CLASSES = (0, 1, 6)
# Variances of the three strong directions of the Gaussian data; standard deviation of the other directions and of the
# noise between two views.
STRONG, WEAK = np.array([2.0, 1.0, 1.0]), 0.1


@dataclasses.dataclass(frozen=True)
class Series:
    """Data and encoder, its widths (channels of a CNN), and a descent, with steps below 1 / (spread of C).

    No steps: with V fixed only. `unit`: the hidden layer is h / |h|.
    """

    data: str
    encoder: str
    widths: tuple[int, ...]
    steps: int
    learning_rate: float
    unit: bool = False

    @property
    def name(self) -> str:
        return f"{self.data}.{self.encoder}{'.unit' if self.unit else ''}"

    @property
    def pixels(self) -> int:
        """Rows of W for each channel of a CNN; 1 for an MLP."""
        return 64 if "flat" in self.encoder else 1

    @property
    def shallow(self) -> bool:
        """One dense hidden layer: N6. Everything else is N7."""
        return self.encoder.endswith("-2") and self.pixels == 1


class Network(NamedTuple):
    """An encoder at the start.

    Units with both weights zero stay so and leave the network of the others, but for the factor 1 / sqrt M. Thus all
    widths of two layers are one compiled program, of `ratio` times the width.
    """

    encoder: encoders.MLP | encoders.CNN
    unit: bool
    views: tuple
    layers: dict
    w: np.ndarray  # orthonormal, float64
    size: int  # rows of W that are not zero
    ratio: np.float32


def network(series, seed, width, features, triplets, shrink=0.5):
    """Network of one seed and width, with its triplets."""
    units = series.widths[-1] if series.shallow else width
    encoder, triples = _setting.encoder(series.encoder, units, features), views(series.data, seed, triplets, shrink)
    layers = dict(_setting.initial(encoder, _setting.cell_key(seed, width), triples[0])["params"])
    w = np.array(layers.pop(max(layers))["kernel"], np.float64)
    size = len(w) * width // units
    w[:size], w[size:] = np.linalg.qr(w[:size])[0], 0
    if series.data == "gaussian" and shrink == 1:
        layers = turned_features(layers)
    layers = jax.tree.map(lambda kernel: np.where(np.arange(units) < width, kernel, np.float32(0)), layers)
    ratio = 1.0 if series.unit else units / width  # h / |h| is without the factor
    return Network(encoder, series.unit, triples, layers, w, size, np.float32(ratio))


def hidden_at_start(network):
    """Hidden layers h of anchors, positives and negatives, (n, M) each, where V is not trained."""
    *_, hidden = problem(network.encoder, True, network.unit)
    given = (network.views, network.layers, np.float32(1), network.ratio)
    found = _briefly(hidden)(np.float32(network.w), jax.tree.map(np.zeros_like, network.layers), given)
    return np.split(np.asarray(found, np.float64)[:, : network.size], 3)


@one_object
def _briefly(function):
    return jax.jit(function, compiler_options=BRIEFLY)


def train(config, series, network, faster=1.0, constrained=True):
    """The joint descent: its run, W (t, M, z) and B (t, 2n, M) at the snapshots in float64."""
    loss, snapshot, _ = problem(network.encoder, constrained, network.unit)
    run = stiefel.stiefel_descent(
        loss,
        np.float32(vector(network.w, constrained)),
        jax.tree.map(np.zeros_like, network.layers),
        (network.views, network.layers, np.float32(math.sqrt(faster)), network.ratio),
        steps=series.steps,
        learning_rate=series.learning_rate,
        metrics=snapshot,
        metric_steps=steps(config, series),
    )
    w, rows = (np.asarray(a, np.float64) for a in run.metrics)
    return run, w[:, : network.size], rows[:, :, : network.size]


def fixed(config, series, rows, w, u, constrained):
    """Distances to U_0 along the descent with V fixed, and at its end."""
    basis, first, small = in_span(w, rows, constrained)
    run = _descend(config, series, *quadratic(constrained), first, small.T @ swap(small))
    return np.array([distance(w_t, basis.T @ u) for w_t in np.asarray(run.metrics)])


def fixed_alone(config, series, network, constrained):
    """The same where V is not trained elsewhere."""
    rows = factor(*hidden_at_start(network))
    return fixed(config, series, rows, network.w, spectrum(rows)[1][:, : config.features], constrained)


def with_cosine(config, series, seed, width):
    """The same for the cosine of f itself, and at the end that loss beside Tr(W^T C W)."""
    start = network(series, seed, width, config.features, config.triplets)
    hidden = hidden_at_start(start)
    rows = factor(*hidden)
    # W(0) in the span of the anchors: elsewhere f is so small that descent on its direction stalls.
    w = np.linalg.qr(hidden[0].T @ (hidden[0] @ start.w))[0]
    basis, first, small = in_span(w, np.concatenate(hidden))
    run = _descend(config, series, true_cosine, w_alone, first, np.stack(np.split(small, 3)))
    u = basis.T @ spectrum(rows)[1][:, : config.features]
    end = basis @ np.asarray(run.w)
    found = {
        "fixed": [distance(w_t, u) for w_t in np.asarray(run.metrics)],
        "loss": float(run.loss),
        "trace": np.trace(end.T @ apply(rows, end)),
    }
    return {name: np.where(ended(run), value, np.nan) for name, value in found.items()}


def _descend(config, series, loss, snapshot, w, given):
    """Descent in float64 with V fixed."""
    with jax.enable_x64(True):
        return stiefel.stiefel_descent(
            loss,
            jnp.asarray(w),
            None,
            jnp.asarray(given),
            steps=config.fixed_steps,
            learning_rate=series.learning_rate,
            tolerance=config.tolerance,
            metrics=snapshot,
            metric_steps=[*steps(config, series), config.fixed_steps],
        )


def ended(run):
    """Whether the descent used up its steps or converged."""
    return int(run.status) in (stiefel.FINISHED, stiefel.CONVERGED)


def steps(config, series):
    """Numbers of updates after which a network is measured; with V fixed only those of the first series."""
    return [round(share * (series.steps or config.series[0].steps)) for share in config.snapshots]


def factor(anchors, positives, negatives):
    """B (2n, M) from the hidden layers."""
    return np.concatenate([anchors, negatives - positives])


def vector(w, constrained):
    """W, or the unit vector of its entries: see `matrix`."""
    return w if constrained else w.reshape(-1, 1) / math.sqrt(w.shape[1])


def in_span(w, rows, constrained=True):
    """Basis of the span of W and the rows, W in it to start with, and the rows in it: V fixed never leaves it."""
    basis = np.linalg.qr(np.concatenate([w, rows.T], axis=1))[0]
    first = np.eye(basis.shape[1], w.shape[1])  # up to signs, since the columns of W came first
    return basis, vector(first, constrained), rows @ basis


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


def grassmann(w, u):
    """Grassmann distances (t,) of orthonormal W(t), (t, M, z), from U, in coordinates of their joint span."""
    inside = u.T @ w
    joint = np.concatenate([inside, np.linalg.qr(w - u @ inside, "r")], axis=1)
    with jax.enable_x64(True):  # W is orthonormal to float32 only
        return np.asarray(_grassmann(jnp.asarray(np.linalg.qr(joint)[0])))


@partial(jax.jit, compiler_options=BRIEFLY)
def _grassmann(joint):
    u = jnp.eye(*joint.shape[1:], dtype=joint.dtype)
    return jax.lax.map(lambda w: stiefel.grassmann_distance(u, w), joint)


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


def true_cosine(w, hidden):
    """The triplet loss with the cosine of f = W^T h, for `stiefel_descent` with the (3, n, M) hidden layers."""
    return losses.linear(*jnp.matmul(hidden, w, precision="highest"), similarity=similarity.cosine)


def w_alone(w, _):
    """A snapshot of W."""
    return w


@one_object
def problem(encoder, constrained, unit):
    """Loss and snapshot for `stiefel_descent`; one pair for each encoder, because compiled programs are kept by them.

    Third, the hidden layers (3n, M) of anchors, positives and negatives; h / |h| if `unit`.

    Their data: views, hidden layers V_0 at the start, s, r. The parameters are U of V = V_0 + s U, which multiplies V's
    learning rate by s^2. Both are those of a network with 1/r of the units if the others are zero.
    """

    def parts(w, moves, given):
        views, layers, scale, ratio = given
        layers = jax.tree.map(lambda start, move: start + scale * move, layers, moves)
        return matrix(w, encoder.features, constrained), layers, jnp.concatenate(views), ratio

    def embed(layers, w, x):
        f = encoder.apply(params(layers, w), x)
        return f / lengths(encoder, layers, x)[:, None] if unit else f

    def loss(*arguments):
        w, layers, x, ratio = parts(*arguments)
        return ratio * losses.linear(*jnp.split(embed(layers, w, x), 3))

    def hidden(*arguments):
        w, layers, x, ratio = parts(*arguments)

        def features(point):  # f is linear in W, so that h is the derivative of an output
            return jax.grad(lambda w: embed(layers, w, point[None])[0, 0])(w)[:, 0]

        return jnp.sqrt(ratio) * jax.vmap(features)(x)

    def snapshot(*arguments):
        anchors, positives, negatives = jnp.split(hidden(*arguments), 3)
        return parts(*arguments)[0], jnp.concatenate([anchors, negatives - positives])

    return loss, snapshot, hidden


def lengths(encoder, layers, x):
    """|h| of an MLP's last hidden layer, (n,)."""
    before = encoder.clone(features=encoder.width, depth=encoder.depth - 1)
    h = encoders.ACTIVATIONS[encoder.activation](before.apply({"params": layers}, x))
    return jnp.linalg.norm(h, axis=1) / math.sqrt(encoder.width)


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


def null(config):
    """Distances of random subspaces, (draws,)."""
    # Random subspaces of more dimensions are further apart: the smallest space gives the strictest null.
    smallest = min(series.widths[0] * series.pixels for series in config.series)
    null = compare.null_distances(jax.random.key(0), smallest, config.features, config.draws)
    return np.asarray(null, np.float64)


def listed(numbers, form=""):
    """Numbers in words of a statement."""
    return ", ".join(f"{number:{form}}" for number in numbers)
