"""Members of the learned tasks: one for each kind of training, level of p and seed; those of a seed are an ensemble.

Members stand with variants first, then levels. The variants at one level share the hierarchy, the first parameters and
the uniform numbers of the batches, so that their differences are paired; levels and seeds share nothing.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from experiments import _hierarchy_clip as clip
from experiments import _task_evaluation as evaluation
from experiments import _task_models as models
from experiments._training import checkpoints

VARIANTS = ("standard", "guided", "shallow", "joint")  # a Config names the first few, see `check_variants`


def check_variants(variants):
    """Raise ValueError unless these are the first of `VARIANTS`: arrays and parameters are indexed by that order."""
    if not variants or tuple(variants) != VARIANTS[: len(variants)]:
        raise ValueError(f"variants are {tuple(variants)}: give the first one or more of {VARIANTS}, in this order")


def pairs_of(config):
    """Variants of CLIP pairs, whose own task has no joint form."""
    return tuple(name for name in config.variants if name != "joint")


def keys_of(seed, levels, what):
    """Keys (levels,) of a seed, for one purpose."""
    base = jax.random.fold_in(jax.random.fold_in(jax.random.key(60), seed), what)
    return jax.vmap(partial(jax.random.fold_in, base))(jnp.arange(levels))


def hierarchies(config, seed):
    """Kernels of their own at each level, (levels, ...): replicates are seeds and levels."""
    return clip.hierarchies(config.size, keys_of(seed, len(config.levels), 0), config.levels)


def members(config, seed, variants):
    """Hierarchies and keys of all members, and their `Variant`; variants at one level share hierarchy and key."""
    count = len(config.levels)
    tile = lambda a: jnp.tile(a, (len(variants),) + (1,) * (a.ndim - 1))  # noqa: E731
    numbers = [_variant(config, name) for name in variants]
    variant = jax.tree.map(lambda *a: jnp.repeat(jnp.stack(a), count, axis=0), *numbers)
    keys = keys_of(seed, count, 1)
    return jax.tree.map(tile, hierarchies(config, seed)), jnp.concatenate([keys] * len(variants)), variant


def _variant(config, name):
    blocks = config.size.blocks
    gates = jnp.zeros(blocks).at[0].set(1.0) if name == "shallow" else jnp.ones(blocks)
    # Guidance 1: plain sum of two losses, both of order one; never tuned.
    return models.Variant(*(jnp.asarray(name == which, jnp.float32) for which in ("guided", "joint")), gates)


def gates_of(config, variants):
    """Gates of each variant, (variants, blocks)."""
    return jnp.stack([_variant(config, name).gates for name in variants])


def _mesh(members):
    """A mesh of as many devices as the members can be divided over, if there are several."""
    devices = max(n for n in range(1, len(jax.devices()) + 1) if members % n == 0)
    return None if devices == 1 else jax.make_mesh((devices,), ("members",), devices=jax.devices()[:devices])


def check_memory(config):
    """Raise MemoryError if the largest ensembles, those of the tasks with all variants, do not fit."""
    for task in config.conditional:
        hs, keys, variant = members(config, 0, config.variants)
        models.check_memory(config.size, task, hs, keys, variant, config.steps)


def blank(config):
    """Rows of zeros in the form of trained pairs and networks."""
    levels = len(config.levels)
    of_pairs = jnp.zeros((len(pairs_of(config)) * levels, models.row_length(config.size)))
    rows = {task: models.row_length(config.size, task) for task in config.conditional}
    return of_pairs, {task: jnp.zeros((len(config.variants) * levels, length)) for task, length in rows.items()}


def train_pairs(config, seed):
    """CLIP pairs of all variants and levels, rows (members, numbers)."""
    hs, keys, variant = members(config, seed, pairs_of(config))
    run = clip.train_clip(
        config.size,
        hs,
        keys,
        head=models.HEAD,
        steps=config.pair_steps,
        candidates=evaluation.CANDIDATES,
        guidance=variant.guidance if "guided" in config.variants else None,
        gates=variant.gates,
        mesh=_mesh(len(keys)),
        **checkpoints(f"pairs-{seed}-training", len(keys) * config.pair_steps),
    )
    return np.asarray(clip.to_rows(run.params))


def train_network(config, seed, task, pairs):
    """Members of a task; without pairs, an empty result, and a compiled program."""
    hs, keys, variant = members(config, seed, config.variants)
    fresh = clip.start(config.size, models.HEAD, keys)[models.GIVEN[task]]
    encoder = fresh
    if pairs is not None:
        # The joint members, the last, begin with the encoders from which the standard pairs began.
        trained = jax.vmap(models.tree_of(config.size))(pairs)[models.GIVEN[task]]
        encoder = jax.tree.map(lambda new, a: jnp.concatenate([a, new[len(a) :]]), fresh, trained)
    rows = models.train(
        config.size,
        task,
        hs,
        keys,
        variant,
        encoder,
        config.steps,
        compile_only=pairs is None,
        mesh=_mesh(len(keys)),
        **({} if pairs is None else checkpoints(f"{task}-{seed}-training", len(keys) * config.steps)),
    )
    return np.asarray(rows)
