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
from experiments._training import checkpoints, parameters

VARIANTS = ("standard", "guided", "shallow", "misguided", "joint")  # a Config names the first few, see `check_variants`


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
    guidance, joint, mixed = (
        jnp.asarray(name in which, jnp.float32) for which in (("guided", "misguided"), ("joint",), ("misguided",))
    )
    return models.Variant(guidance, joint, mixed, gates)


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
        models.check_memory(config.size, task, hs, keys, variant, config.steps, _mesh(len(keys)))


def blank(config, kept):
    """Zeros in the form of what is kept of trained pairs and networks, see `_kept`."""
    levels, lengths = len(config.levels), [models.row_length(config.size, task) for task in (None, *config.conditional)]
    if kept == "rows":
        counts = [(len(variants) * levels,) for variants in (pairs_of(config), *[config.variants] * len(lengths[1:]))]
    else:
        all_steps = [config.pair_steps, *[config.steps] * len(lengths[1:])]
        counts = [(len(checkpoints_of(config, steps)), levels) for steps in all_steps]
    of_pairs, *of_networks = (jnp.zeros((*count, length)) for count, length in zip(counts, lengths, strict=True))
    return of_pairs, dict(zip(config.conditional, of_networks, strict=True))


def checkpoints_of(config, steps):
    """Numbers of steps after which standard members are kept; the last ones are all of them."""
    return (*(step for step in config.checkpoints if step < steps), steps)


def _kept(run, levels):
    """Rows of all members at the end, and of the standard ones, the first, at checkpoints (checkpoints, levels)."""
    along = np.asarray(run.metrics)[:, :levels]
    return {"rows": np.asarray(run.params), "along": along}


def train_pairs(config, seed):
    """CLIP pairs of all variants and levels, rows (members, numbers), and along training, see `_kept`."""
    hs, keys, variant = members(config, seed, pairs_of(config))
    run = clip.train_clip(
        config.size,
        hs,
        keys,
        head=models.HEAD,
        steps=config.pair_steps,
        candidates=evaluation.CANDIDATES,
        guidance=variant.guidance if "guided" in config.variants else None,
        mixed=variant.mixed,
        gates=variant.gates,
        metrics=clip.to_rows,
        metric_steps=checkpoints_of(config, config.pair_steps),
        mesh=_mesh(len(keys)),
        **checkpoints(f"pairs-{seed}-training", len(keys) * config.pair_steps),
    )
    return _kept(run._replace(params=clip.to_rows(run.params)), len(config.levels))


def train_network(config, seed, task, pairs):
    """Members of a task as in `train_pairs`; without pairs, an empty result, and a compiled program."""
    hs, keys, variant = members(config, seed, config.variants)
    fresh = clip.start(config.size, models.HEAD, keys)[models.GIVEN[task]]
    encoder = fresh
    if pairs is not None:
        # The joint members, the last, begin with the encoders from which the standard pairs began.
        trained = jax.vmap(models.tree_of(config.size))(pairs)[models.GIVEN[task]]
        encoder = jax.tree.map(lambda new, a: jnp.concatenate([a, new[len(a) :]]), fresh, trained)
    run = models.train(
        config.size,
        task,
        hs,
        keys,
        variant,
        encoder,
        config.steps,
        compile_only=pairs is None,
        mesh=_mesh(len(keys)),
        metrics=parameters,
        metric_steps=(0,) if pairs is None else checkpoints_of(config, config.steps),
        **({} if pairs is None else checkpoints(f"{task}-{seed}-training", len(keys) * config.steps)),
    )
    return _kept(run, len(config.levels))
