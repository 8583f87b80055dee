"""Losses of trained members and of Bayes on the same held-out samples, and their paired differences.

A cell is a pair of hierarchies, that of the samples and that of training, with members of all variants. Without shift
the two are the same. The zero-shot classifier has no training of its own: P_s(c|x) ~ P(c) mean_m e^s(x, y_cm), with
prompts and P(c) of the training hierarchy. With the softmax head this is a product with the mean of softmaxes.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import _hierarchy_clip as clip
from experiments import _task_models as models
from experiments import _task_prompts as prompts
from theorykit.surrogate import hierarchy
from theorykit.surrogate._zero_shot import _classes

CANDIDATES = 4


class Cell(NamedTuple):
    """What is compared; arrays have a leading axis of cells.

    Parameters
    ----------
    test, train, other : Hierarchy
        Of the samples, of training, and one that has nothing to do with either.
    pairs : (variants, numbers) of CLIP pairs
    networks : {task: (variants, numbers)}
    key : key data
    """

    test: hierarchy.Hierarchy
    train: hierarchy.Hierarchy
    other: hierarchy.Hierarchy
    pairs: jax.Array
    networks: dict
    key: jax.Array


def contrastive(f, g):
    """Loss of each group of `CANDIDATES` pairs from embeddings (n, F), as in `hierarchy.bayes_losses`."""
    return clip.clip_in_groups(models.HEAD, CANDIDATES, 0.0, f, g)


def classes(h):
    """P(c), the law of the first leaf of a text."""
    return _classes(h)


def classify(f, prompts, prior):
    """ln P_s(c|x), (n, S), from embeddings f (n, F) and those of the prompts (S, M, F), exponentials averaged."""
    means = jnp.log(jnp.mean(jax.nn.softmax(prompts, axis=-1), axis=1))
    pooled = jax.scipy.special.logsumexp(jax.nn.log_softmax(f, axis=-1)[:, None] + means[None], axis=-1)
    return jax.nn.log_softmax(jnp.log(prior)[None] + pooled, axis=-1)


@functools.partial(jax.jit, static_argnames=("size", "n", "images", "pool"))
def measure(size, cells, gates, n, images, pool):
    """Losses by name in every cell, (cells, variants, n) of trained members and (cells, n) of Bayes.

    <task>: of trained members. mixed/<task>: of the first variant, with what it is given taken from another sample, or
    prompts of another class. bayes/<task>, train/<task>, other/<task>: Bayes losses by the three hierarchies.
    prompts/<what>: what `_task_prompts.curves` returns, for the first images, and a pool of prompts of each class.
    """

    def one(cell):
        keys = jax.random.split(jax.random.wrap_key_data(cell.key), 3)
        samples = hierarchy.sample(cell.test, keys[0], n)
        noisy = samples.image + models.SIGMA * jax.random.normal(keys[1], samples.image.shape)
        # One after the other, here and below, since one program for all takes longer to compile.
        three = jax.tree.map(lambda *parts: jnp.stack(parts), cell.test, cell.train, cell.other)
        bayes = jax.lax.map(
            lambda h: hierarchy.bayes_losses(h, samples, noisy, models.SIGMA, candidates=CANDIDATES), three
        )
        found = {
            f"{who}/{task}": values[i]
            for task, values in bayes._asdict().items()
            for i, who in enumerate(("bayes", "train", "other"))
        }
        pairs = jax.vmap(models.tree_of(size))(cell.pairs)
        texts = hierarchy.sample_prompts(cell.train, keys[2], pool).reshape(-1, size.leaves)
        f = clip.embed(size, models.HEAD, pairs, "image", samples.image, gates["pairs"])
        g = clip.embed(size, models.HEAD, pairs, "text", jnp.concatenate([samples.text, texts]), gates["pairs"])
        g, words = g[:, :n], g[:, n:].reshape(len(g), size.alphabet, pool, -1)
        # The last member is the first once more, with texts of other samples or prompts of other classes.
        mixed = jnp.stack([*g, jnp.roll(g[0], CANDIDATES, axis=0)])
        found |= _split("contrastive", jax.lax.map(lambda z: contrastive(*z), (jnp.concatenate([f, f[:1]]), mixed)))
        prior = classes(cell.train)
        mixed = jnp.stack([*words, jnp.roll(words[0], 1, axis=0)])
        law = jax.lax.map(lambda z: classify(*z, prior), (jnp.concatenate([f, f[:1]]), mixed))
        found |= _split("zero_shot", -jnp.take_along_axis(law, samples.text[None, :, :1], axis=2)[..., 0])
        truth = hierarchy.zero_shot(cell.test, samples.image[:images])
        curves = prompts.curves(truth, prior, f[:, :images], words)
        found |= {f"prompts/{name}": value for name, value in curves.items()}
        for task, rows in cell.networks.items():
            found |= _split(task, _conditional(size, task, rows, gates[task], samples, noisy))
        return found

    return jax.lax.map(one, cells)


@functools.partial(jax.jit, static_argnames=("size", "n", "pool"))
def along(size, tests, trains, pairs, networks, keys, n, pool):
    """Losses less those of Bayes by `tests` on the same samples, (cells, checkpoints, n), of one member by name.

    tests, trains : Hierarchy (cells, ...) of the samples, and of training, which gives the prompts
    pairs, networks : rows (cells, checkpoints, numbers), and by task; the networks have all their blocks
    """

    def one(cell):
        test, train, pairs, networks, key = cell
        keys = jax.random.split(jax.random.wrap_key_data(key), 3)
        samples = hierarchy.sample(test, keys[0], n)
        noisy = samples.image + models.SIGMA * jax.random.normal(keys[1], samples.image.shape)
        bayes = hierarchy.bayes_losses(test, samples, noisy, models.SIGMA, candidates=CANDIDATES)
        prior, texts = classes(train), hierarchy.sample_prompts(train, keys[2], pool).reshape(-1, size.leaves)

        def of_pair(row):
            pair = jax.tree.map(lambda a: a[None], models.tree_of(size)(row))
            f = clip.embed(size, models.HEAD, pair, "image", samples.image)[0]
            g = clip.embed(size, models.HEAD, pair, "text", jnp.concatenate([samples.text, texts]))[0]
            law = classify(f, g[n:].reshape(size.alphabet, pool, -1), prior)
            return contrastive(f, g[:n]), -jnp.take_along_axis(law, samples.text[:, :1], axis=1)[:, 0]

        found = dict(zip(("contrastive", "zero_shot"), jax.lax.map(of_pair, pairs), strict=True))
        for task, rows in networks.items():
            blank = jnp.ones((len(rows), size.blocks))
            found[task] = _conditional(size, task, rows, blank, samples, noisy)[:-1]
        return {task: losses - getattr(bayes, task)[None] for task, losses in found.items()}

    return jax.lax.map(one, (tests, trains, pairs, networks, keys))


def _conditional(size, task, rows, gates, samples, noisy):
    """Losses (variants + 1, n)."""
    seen, given = models.shown(size, task, samples, noisy), getattr(samples, models.GIVEN[task])

    def loss(member):
        row, gates, mixed = member
        told = jnp.where(mixed, jnp.roll(given, 1, axis=0), given)
        logits, _ = models.answers(size, task, models.tree_of(size, task)(row), told, seen, gates)
        return models.losses(size, task, samples, logits)

    rows, gates = (jnp.concatenate([a, a[:1]]) for a in (rows, gates))
    return jax.lax.map(loss, (rows, gates, jnp.arange(len(rows)) == len(rows) - 1))


def _split(task, losses):
    return {task: losses[:-1], f"mixed/{task}": losses[-1]}


def differences(found, tasks, reference="bayes"):
    """Paired excesses of trained members over Bayes, by `hierarchy.paired_excess`.

    <task>/value, <task>/error (cells, variants).
    """
    summary = {}
    for task in tasks:
        trained, bayes = found[task], found[f"{reference}/{task}"]
        pairs = [
            [hierarchy.paired_excess(one, of_cell) for one in members]
            for members, of_cell in zip(trained, bayes, strict=True)
        ]
        summary[f"{task}/value"] = np.array([[float(e.value) for e in row] for row in pairs])
        summary[f"{task}/error"] = np.array([[float(e.standard_error) for e in row] for row in pairs])
    return summary
