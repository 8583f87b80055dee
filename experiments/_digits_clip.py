"""CLIP on digits, in one ensemble: folds, training of many pairs of encoders at once, scores, risks of held-out rows.

A fold is a held-out part of the digits; the others train. Folds share no held-out digit. Members of an ensemble are
folds times variants; their parameters and data have a leading axis of members and nothing in common.
"""

from functools import cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments._clip_encoders import clip
from experiments._training import finished, parameters
from theorykit import data, encoders, similarity, training


class Fold(NamedTuple):
    """Rows of `data.digits()`: those that train, and those held out."""

    train: np.ndarray
    heldout: np.ndarray


def folds(count: int, seed: int = 60) -> list[Fold]:
    """All digits in random order in `count` parts of one size, each held out once; what is left over is not used."""
    total = len(data.digits().labels)
    order = np.random.default_rng(seed).permutation(total)[: total - total % count].reshape(count, -1)
    return [Fold(np.delete(order, i, axis=0).ravel(), order[i]) for i in range(count)]


def halves(rows):
    """Left and right halves (n, 32) of digits, centred at one half."""
    images = data.digits().inputs[rows].reshape(-1, 8, 8) - 0.5
    return images[:, :, :4].reshape(-1, 32), images[:, :, 4:].reshape(-1, 32)


def images(rows):
    """Images (n, 64), centred at one half."""
    return data.digits().inputs[rows] - 0.5


def one_hot(labels):
    """Labels as text: unit vectors (n, 10)."""
    return np.eye(10, dtype=np.float32)[labels]


@cache
def encoder_pair(width: int, features: int, text_depth: int):
    """ReLU encoders of image and text; text of depth 1 is a table of embeddings for unit vectors."""
    conventions = {"parametrisation": "standard", "activation": "relu"}
    return tuple(encoders.MLP(width, features, depth=depth, **conventions) for depth in (3, text_depth))


def train(config, pair, x, y, candidates, *, steps, seed):
    """Parameters of all members after each number of `steps`, as host arrays with that leading axis.

    x, y : (members, n, d) training pairs; candidates : (members,) K, the batch is cut into groups of K pairs.
    """
    members, n = x.shape[:2]
    run = training.train(
        _objective(pair),
        _start(pair, jax.random.split(jax.random.key(seed, impl="rbg"), members), x[0, :1], y[0, :1]),
        # Rows lead; the number of candidates is repeated for each of them.
        (x.swapaxes(0, 1), y.swapaxes(0, 1), np.tile(np.asarray(candidates, np.int32), (n, 1))),
        optimizer=_optimizer(config.learning_rate, config.decay, steps[-1]),
        steps=steps[-1],
        batch_size=config.batch,
        key=jax.random.key(seed + 1),
        metrics=parameters,
        metric_steps=steps,
    )
    return jax.device_get(finished(run, "the training").metrics)


@partial(jax.jit, static_argnums=0)
def embed(pair, params, x, y):
    """Embeddings (members, rows, z) of both modalities."""
    return tuple(jax.vmap(e.apply)(params[side], v) for e, side, v in zip(pair, "xy", (x, y), strict=True))


def scores(za, zb):
    """s(x_i, y_j) = f(x_i).g(y_j), (members, n, m), in float64."""
    return np.asarray(za, np.float64) @ np.asarray(zb, np.float64).swapaxes(1, 2)


@partial(jax.jit, static_argnums=0)
def _start(pair, keys, x, y):
    def one(key):
        keys = jax.random.split(key)
        return {side: e.init(k, v) for e, side, k, v in zip(pair, "xy", keys, (x, y), strict=True)}

    return jax.vmap(one)(keys)


@cache
def _objective(pair):
    """Summed CLIP losses of independent members, each in groups of its own number of candidates."""

    def one(params, x, y, candidates):
        za, zb = (e.apply(params[side], v) for e, side, v in zip(pair, "xy", (x, y), strict=True))
        rows = jnp.arange(len(x), dtype=candidates.dtype)
        group = rows // candidates
        table = similarity.pairwise(similarity.dot, za, zb)
        return clip(jnp.where(group[:, None] == group[None, :], table, -jnp.inf))

    def value(params, batch):
        x, y, candidates = batch
        return jnp.sum(jax.vmap(one, in_axes=(0, 1, 1, 0))(params, x, y, candidates[0]))

    return value


@cache
def _optimizer(rate, decay, steps):
    return optax.adamw(optax.cosine_decay_schedule(rate, steps), weight_decay=decay)


# Losses on held-out pairs ---------------------------------------------------------------------------------------------


def candidate_losses(table, negatives, draws: int, seed: int):
    """Log-loss and error of finding the partner of each row among K candidates, (n, counts) each.

    The K - 1 `negatives` are other rows without repeats. In `draws` random orders of all other rows of each row, means
    are over disjoint blocks of the largest number of them; each number divides the next one, so that a larger block
    is made of smaller ones, and inequalities between their losses hold for this sample, not only for its law.

    table : (n, n) scores, partners on the diagonal.
    """
    rng, n = np.random.default_rng(seed), len(table)
    own, used = np.diagonal(table)[:, None], negatives[-1]
    log_loss, error = np.zeros((n, len(negatives))), np.zeros((n, len(negatives)))
    for _ in range(draws):
        order = rng.random((n, n))
        np.fill_diagonal(order, 2.0)  # the row itself comes last, and is left out
        order = np.argsort(order, axis=1)[:, :used]
        margin = np.take_along_axis(table, order, axis=1) - own
        odds = np.exp(margin)
        for at, count in enumerate(negatives):
            log_loss[:, at] += np.log1p(odds.reshape(n, -1, count).sum(axis=2)).mean(axis=1)
            error[:, at] += (margin.reshape(n, -1, count).max(axis=2) >= 0).mean(axis=1)
    return log_loss / draws, error / draws


def distinct_losses(table, labels, negatives: int, draws: int, seed: int):
    """Mean log-loss of finding the label of each row among `negatives` other labels without repeats.

    table : (n, classes) scores.
    """
    rng, (n, classes) = np.random.default_rng(seed), table.shape
    others = np.arange(classes)[None, :] != labels[:, None]
    odds = np.exp(table - table[np.arange(n), labels][:, None])[others].reshape(n, -1)
    chosen = [rng.permuted(odds, axis=1)[:, :negatives].sum(axis=1) for _ in range(draws)]
    return np.mean(np.log1p(chosen))


def by_prompts(log_w, prompt_labels, labels, frequency, average: str, prompts: int | None, rng):
    """Log-loss (rows,) and hit (rows,) of classification by M texts of each class, all of them for None.

    log_w : (rows, texts) scores of held-out images with training texts.
    """
    pooled = np.empty((len(log_w), len(frequency)))
    for c in range(len(frequency)):
        chosen = np.flatnonzero(prompt_labels == c)
        chosen = chosen if prompts is None else rng.choice(chosen, prompts, replace=True)
        of_class = log_w[:, chosen]
        mean = of_class.mean(axis=1) if average == "similarities" else _log_mean_exp(of_class)
        pooled[:, c] = np.log(frequency[c]) + mean
    return classified(pooled, labels)


def classified(logits, labels):
    """Log-loss and hits (rows,) of the law softmax(logits)."""
    log_law = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    rows = np.arange(len(labels))
    return -log_law[rows, labels], (np.argmax(logits, axis=1) == labels).astype(float)


def _log_mean_exp(values):
    return np.logaddexp.reduce(values, axis=1) - np.log(values.shape[1])


def bootstrap(losses, draws: int, seed: int, level: float):
    """Percentile interval (2, ...) of the mean of losses (folds, rows, ...): folds are redrawn, then rows in each."""
    rng, (count, rows) = np.random.default_rng(seed), losses.shape[:2]
    weights = np.zeros((draws, count, rows))
    for weight in weights:
        for fold in rng.integers(count, size=count):
            weight[fold] += np.bincount(rng.integers(rows, size=rows), minlength=rows)
    means = np.tensordot(weights / (count * rows), losses, axes=2)
    tail = (1 - level) / 2
    return np.quantile(means, (tail, 1 - tail), axis=0)
