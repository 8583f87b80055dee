"""Data of the search benchmarks: clusters of low intrinsic dimension, learned embeddings of digits, rows of a file."""

from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from theorykit import data, encoders, losses, training
from theorykit.similarity import cosine

# Rows of a cluster, and the dimension in which they spread: what learned embeddings look like. Every cluster lies on
# its own linear subspace, so that no projection of the whole set makes it easy.
ROWS_PER_CLUSTER, INTRINSIC = 1000, 12
# Deviation of a centre's coordinates: centres are then about as far apart as a cluster is wide, so that clusters touch
# but fill no common blob.
SEPARATION = 0.4
NOISE = 0.05  # in all directions; it keeps rows off their subspaces
BLOCK = 65_536  # rows drawn at once
VIEWS, STEPS = 16, 1000  # views of a digit to learn from, and steps of training
TIES = 1e-5  # of a squared distance: float32 sums of some hundred squares in another order differ by less


class Data(NamedTuple):
    """Rows to search, and queries that are none of them; float32."""

    base: np.ndarray
    queries: np.ndarray


def clustered(n: int, d: int, queries: int, seed: int = 0) -> Data:
    """Draw rows and queries from one mixture: centre + spread * basis @ normal + noise."""
    generator = np.random.default_rng(seed)
    clusters = max(1, n // ROWS_PER_CLUSTER)
    intrinsic = min(INTRINSIC, d)
    centres = (SEPARATION * generator.standard_normal((clusters, d))).astype(np.float32)
    # Columns of length about 1, so that a cluster has deviation 1 along each of its directions.
    bases = (generator.standard_normal((clusters, intrinsic, d)) * np.sqrt(intrinsic / d)).astype(np.float32)
    spread = np.exp(0.3 * generator.standard_normal(clusters)).astype(np.float32)
    weights = generator.dirichlet(np.full(clusters, 5.0))  # unequal sizes

    def draw(count):
        rows = np.empty((count, d), np.float32)
        for start in range(0, count, BLOCK):
            part = rows[start : start + BLOCK]
            which = generator.choice(clusters, len(part), p=weights)
            latent = generator.standard_normal((len(part), intrinsic), np.float32) * spread[which, None]
            part[:] = generator.standard_normal((len(part), d), np.float32) * NOISE + centres[which]
            for cluster in np.unique(which):  # a product per cluster instead of a basis per row
                mine = which == cluster
                part[mine] += latent[mine] @ bases[cluster]
        return rows

    return Data(draw(n), draw(queries))


@cache
def digits(n: int, d: int, queries: int) -> Data:
    """Embeddings, by an encoder that contrastive training taught, of views of the digits; queries are of other digits.

    Two thirds of the digits are learned from and make the rows; the queries are views of the rest.
    """
    images, _ = data.digits()
    order = np.random.default_rng(0).permutation(len(images))
    train, rest = np.split(order, [2 * len(order) // 3])

    def views(which, count, key):
        every = np.resize(which, count)
        return data.to_sphere(data.augment(key, jnp.asarray(images[every]), shift=1, rotation=15, noise=0.1, mask=0.1))

    one, two, three, four = jax.random.split(jax.random.key(0), 4)
    pairs = views(train, VIEWS * len(train), one).reshape(VIEWS, len(train), -1).swapaxes(0, 1)
    encoder = encoders.MLP(256, d, depth=3, use_bias=True, parametrisation="standard")

    def two_views(key, batch):
        first, step = jax.random.randint(key, (2, len(batch)), 0, VIEWS)
        second = (first + 1 + step % (VIEWS - 1)) % VIEWS
        return tuple(jnp.take_along_axis(batch, at[:, None, None], axis=1)[:, 0] for at in (first, second))

    learnt = training.train(
        training.objective(encoder.apply, partial(losses.info_nce, similarity=cosine, temperature=0.2)),
        jax.jit(encoder.init)(two, pairs[:, 0]),
        pairs,
        optimizer=optax.adam(3e-3),
        steps=STEPS,
        batch_size=256,
        key=two,
        augment=two_views,
        progress=False,
    )

    @jax.jit
    def embed(x):
        z = encoder.apply(learnt.params, x)
        return z / jnp.linalg.norm(z, axis=1, keepdims=True)

    return Data(np.asarray(embed(views(train, n, three))), np.asarray(embed(views(rest, queries, four))))


def from_file(path: Path, queries: int) -> Data:
    """Rows of an .npy or .fvecs file; the queries are drawn among them and taken out."""
    if path.suffix == ".npy":
        rows = np.load(path, mmap_mode="r")
    elif path.suffix == ".fvecs":  # every row is its length, int32, and its float32 numbers
        numbers = np.memmap(path, np.float32, mode="r")
        d = int(numbers[:1].view(np.int32)[0]) if len(numbers) else 0
        if d < 1 or len(numbers) % (d + 1):
            raise ValueError(f"{path} is no .fvecs file of rows of one length; write float32 rows with np.save")
        rows = numbers.reshape(-1, d + 1)[:, 1:]
    else:
        raise ValueError(f"{path} ends in {path.suffix!r}; give rows as .npy or .fvecs")
    if rows.ndim != 2 or len(rows) <= queries:
        raise ValueError(f"{path} has shape {rows.shape}; give (n, d) with more than {queries} rows, which are queries")
    asked = np.zeros(len(rows), bool)
    asked[np.random.default_rng(0).choice(len(rows), queries, replace=False)] = True
    return Data(np.asarray(rows[~asked], np.float32, "C"), np.asarray(rows[asked], np.float32, "C"))


def recall(distances: np.ndarray, last: np.ndarray) -> float:
    """Part of the answers no farther than the last true neighbour, ties forgiven."""
    return float(np.mean(distances <= last[:, None] * (1 + TIES)))
