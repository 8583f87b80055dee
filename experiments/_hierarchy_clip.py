r"""Ensembles of CLIP encoder pairs on hierarchies: one program trains all members, by the ordinary loop.

A member is a pair of transformers with a hierarchy of its own; all arrays have a leading axis of members. Members share
no parameter and the loss is their sum, so that Adam, which acts on each parameter apart, trains each as if alone.

    size = Size()                                       sizes of trees, networks and batches, see there
    hs = hierarchies(size, key, ps)                     Hierarchy (members, ...); one key: they differ in p only
    start(size, head, keys)                             params {"image", "text", "log_scale", "read_out"} (members, ...)
    train_clip(size, hs, keys, head=, steps=, ...)      training.Run; Run.params (members, ...)
    embed(size, head, params, modality, leaves, gates)  (members, n, features), leaves (n, T) or (members, n, T)
    states(size, head, params, modality, leaves, gates) (members, blocks + 1, n, T, width), the residual stream
    scores(size, head, params, image, text, gates)      (members, n, k); for "cosine" times the learned scale
    score_table(size, head, params, gates)              (members, S^T, S^T), in the order of `enumerate_joint`
    encoder(size, head), one_hot(leaves, S), ancestors(size, kernels, leaves): the parts
    sum_over_members(one), shuffled_rows(key, count, batch), adam(rate, warm_up, steps)  for other ensembles

Members of one program may differ in key, hierarchy, guidance, gates and candidates (K of the loss). The head makes a
program of its own, and so does whether there is guidance.
Members with equal keys start at the same parameters and see the same uniform numbers: their differences are paired.

The loss of a member, with K candidates in groups of K consecutive pairs of its batch as in `hierarchy.bayes_losses`:

    mean over i of  ln sum_{j in group} e^s(x_i, y_j) + ln sum_{j in group} e^s(x_j, y_i) - 2 s(x_i, y_i)

plus, if guided, guidance times the mean cross-entropy, over leaves, blocks and modalities, of linear read-outs of the
states after block b with the beliefs of the leaf's ancestor in layer L - ceil(b L / blocks): each block is to hold the
messages of one level, and the last those of the root (Mei, arXiv 2404.18444, for networks that pass messages).

Measured at p = 0.2 with the default size, K = 4, fresh samples and 8 starts, exact excess over the Bayes risk of 1.760
nats on the joint of 256 x 256: head "softmax" 0.026 to 0.030 after 300 steps; "dot" (MLPs twice as wide) 0.08 to 0.10.
With S features instead of `width`, one of 8 starts merges two roots and stays at 0.51. A step takes 2 to 3 ms of one
core for each member; compiling takes 8 s.

`_hierarchy_exact.exact_tables(hs, tables, candidates)` measures tables exactly. Training works on one array of all
parameters of a member, see `to_rows`: an array for each weight matrix takes four times as long to compile.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

from experiments._clip_encoders import (
    HEADS,
    MODALITIES,
    Size,
    clip,
    clip_in_groups,
    embed,
    encoder,
    initial,
    one_hot,
    pairwise,
    score_table,
    scores,
    start,
    states,
)
from experiments._side_by_side import one_object
from experiments._training import LONG, finished, one_thread, parameters, room
from theorykit import training
from theorykit.surrogate import hierarchy

__all__ = [
    "HEADS",
    "MODALITIES",
    "Size",
    "adam",
    "ancestors",
    "clip",
    "clip_in_groups",
    "embed",
    "encoder",
    "hierarchies",
    "initial",
    "mixed",
    "one_hot",
    "pairwise",
    "score_table",
    "scores",
    "shuffled_rows",
    "start",
    "states",
    "sum_over_members",
    "to_rows",
    "train_clip",
]


# Of `shuffled_rows`. Each halves what is left of the differences between pairs: 20% after 4.
ROUNDS = 8


def hierarchies(size, key, ps):
    """Hierarchies of edge noises ps (members,), all of one key, or each of its own, keys (members,)."""
    ps = jnp.asarray(ps, jnp.result_type(float))
    draw = lambda k, p: hierarchy.random_hierarchy(k, size.alphabet, size.depth, size.arity, p)  # noqa: E731
    return jax.vmap(draw)(jnp.broadcast_to(key, ps.shape), ps)


def train_clip(
    size,
    hs,
    keys,
    *,
    head,
    steps,
    candidates=4,
    guidance=None,
    mixed=None,
    gates=None,
    metrics=None,
    metric_steps=(),
    **options,
):
    """Train a pair of encoders for each member on fresh samples; the Run, with arrays (members, ...).

    Parameters
    ----------
    hs, keys : (members, ...)
        Hierarchies and PRNG keys.
    head : a name in `HEADS`.
    candidates : int or (members,)
        K of the loss, divisors of the batch. For an array all scores of a batch are computed, for one number only those
        within groups.
    guidance : (members,), optional
        Weights of the message-supervised loss.
    mixed : (members,), optional
        0 or 1: with 1 a member is supervised by the messages of other samples, which tell it nothing.
    gates : (members, blocks), optional
        Of the residual branches of each block, see `encoders.Transformer`.
    metrics, metric_steps, **options
        As in `training.train`: params (members, ...) -> arrays; checkpoint, checkpoint_every, mesh.
    """
    members, guided = keys.shape[0], guidance is not None
    data = {"key": jax.random.key_data(keys), "hierarchy": hs}
    same = candidates if isinstance(candidates, int) else None
    if same is None:
        data["candidates"] = jnp.asarray(candidates, jnp.int32)
    if any(k < 1 or size.batch % k for k in np.ravel(candidates).tolist()):
        raise ValueError(f"candidates are {candidates}; give divisors of the batch of {size.batch} pairs")
    if guided:
        data["guidance"] = jnp.asarray(guidance, jnp.float32)
        data["mixed"] = jnp.zeros(members) if mixed is None else jnp.asarray(mixed, jnp.float32)
    if gates is not None:
        data["gates"] = jnp.asarray(gates, jnp.float32)
    loss, rows = _loss(size, head, guided, same), to_rows(start(size, head, keys))
    optimizer, augment = adam(size.learning_rate, size.warm_up, steps), _batches(size, guided)
    if members * steps >= LONG:
        mesh = options.get("mesh")
        training.check_memory(loss.seen, rows, data, optimizer=optimizer, augment=augment, memory=room(), mesh=mesh)
    done = training.train(
        loss,
        rows,
        data,
        optimizer=optimizer,
        steps=steps,
        key=jax.random.key(0),  # of the steps; what a member draws follows from its own key as well
        augment=augment,
        metrics=None if metrics is None else _of_rows(metrics, size, head),
        metric_steps=metric_steps,
        settings={**dataclasses.asdict(size), "head": head, "candidates": candidates, "all steps": steps},
        compiler_options=one_thread(),
        **options,
    )
    done = finished(done, "the training of CLIP pairs", options.get("checkpoint"))
    return done._replace(params=_of_rows(parameters, size, head)(done.params))


@jax.jit
def to_rows(params):
    """Tree of arrays (members, ...) -> (members, numbers): a step on one array is compiled several times faster."""
    return jax.vmap(lambda one: ravel_pytree(one)[0])(params)


@one_object
def _to_tree(size, head):
    """The way back, for one member."""
    form = jax.eval_shape(functools.partial(initial, size, head), jax.random.split(jax.random.key(0), 1))
    return ravel_pytree(jax.tree.map(lambda a: jnp.zeros(a.shape[1:], a.dtype), form))[1]


@one_object
def _of_rows(metrics, size, head):
    return jax.jit(lambda rows: metrics(jax.vmap(_to_tree(size, head))(rows)))


def sum_over_members(one):
    """(params, batch) -> sum of the scalars one(params of a member, its batch), with a fast gradient on every backend.

    A CPU takes the members one after the other, value and gradient at once: what a member's backward pass needs then
    stays in the cache, and a step takes half of the time that `jax.vmap` takes.

    Its attribute `seen` is for `training.check_memory`: the same sum with what the backward pass of one member keeps,
    which the loop over members hides from estimates.
    """
    if jax.default_backend() != "cpu":
        plain = lambda params, batch: jnp.sum(jax.vmap(one)(params, batch))  # noqa: E731
        plain.seen = plain
        return plain

    # Compiled parts are traced once, while the loop that holds them is traced three times.
    value, both = jax.jit(one), jax.jit(jax.value_and_grad(one))

    @jax.custom_vjp
    def total(params, batch):
        return jnp.sum(jax.lax.map(lambda member: value(*member), (params, batch)))

    def forward(params, batch):
        values, gradients = jax.lax.map(lambda member: both(*member), (params, batch))
        return jnp.sum(values), gradients

    total.defvjp(forward, lambda gradients, g: (jax.tree.map(lambda a: g * a, gradients), None))
    total.seen = lambda *both: total(*both) + one(*jax.tree.map(lambda a: a[0], both))
    return total


@one_object
def _loss(size, head, guided, candidates):
    net, to_tree = encoder(size, head), _to_tree(size, head)

    def one(row, batch):
        params = to_tree(row)
        embedded, missed = [], 0.0
        for side, modality in enumerate(MODALITIES):
            x, gates = one_hot(batch[modality], size.alphabet), batch.get("gates")
            if guided:
                z, kept = net.apply(params[modality], x, gates=gates, mutable="intermediates")
                (stream,) = kept["intermediates"]["states"]
                missed += _missed(stream[1:], params["read_out"][side], batch[f"beliefs_{modality}"]) / 2
            else:
                z = net.apply(params[modality], x, gates=gates)
            embedded.append(z)
        if candidates is None:
            table = pairwise(head, params["log_scale"], *embedded)
            group = jnp.arange(size.batch) // batch["candidates"]
            loss = clip(jnp.where(group[:, None] == group[None, :], table, -jnp.inf))
        else:
            loss = jnp.mean(clip_in_groups(head, candidates, params["log_scale"], *embedded))
        return loss + batch["guidance"] * missed if guided else loss

    return sum_over_members(one)


def _missed(stream, read_out, beliefs):
    """Mean cross-entropy of read-outs (blocks, width + 1, S) of states (blocks, n, T, width) with beliefs."""
    logits = jnp.einsum("bntw,bws->bnts", stream, read_out[:, :-1]) + read_out[:, -1][:, None, None]
    return -jnp.mean(jnp.sum(beliefs * jax.nn.log_softmax(logits, axis=-1), axis=-1))


def ancestors(size, kernels, leaves):
    """Probabilities (blocks, n, T, S) of the ancestor of every leaf (n, T) that each block is to hold."""
    found, layers = hierarchy.beliefs(kernels, leaves), range(1, size.blocks + 1)
    wanted = [size.depth - math.ceil(block * size.depth / size.blocks) for block in layers]
    return jnp.stack([jnp.exp(jnp.repeat(found[l], size.leaves // size.arity**l, axis=1)) for l in wanted])


def mixed(by, messages):
    """Messages (blocks, n, ...) of each sample, or where `by` is 1 of the one before it."""
    return jnp.where(by > 0, jnp.roll(messages, 1, axis=1), messages)


@one_object
def _batches(size, guided):
    def one(step, data):
        key = jax.random.fold_in(jax.random.wrap_key_data(data["key"]), step)
        _, image, text = hierarchy.sample(data["hierarchy"], key, size.batch)
        batch = {name: data[name] for name in ("candidates", "guidance", "gates") if name in data}
        batch |= {"image": image, "text": text}
        if guided:
            for modality in MODALITIES:
                kernels = getattr(data["hierarchy"], modality)
                batch[f"beliefs_{modality}"] = mixed(data["mixed"], ancestors(size, kernels, batch[modality]))
        return batch

    every = jax.jit(jax.vmap(one, (None, 0)))  # traced once
    return lambda key, data: every(jax.random.bits(key), data)


def shuffled_rows(key, count, batch):
    """Rows (batch,) of the first `count`, a power of two: pi(j mod count), pi a random permutation, by a few integers.

    A round multiplies by an odd number and adds another, which carries low bits upwards, and adds the upper half of the
    bits to the lower one: each is a bijection modulo a power of two. A group of K has K different rows if
    count >= K, as negatives must be no copies of the positive pair, and every two rows are as likely to meet as any
    other two: after `ROUNDS` rounds the frequencies of pairs deviate by 1.5% at most, seen for 4 to 32 rows. A sort of
    random numbers for each member would take longer than the step.
    """
    last = count.astype(jnp.uint32) - 1  # all ones
    half = (jax.lax.population_count(last) + 1) // 2
    rows = jnp.arange(batch, dtype=jnp.uint32) & last
    for factor, first in jax.random.bits(key, (ROUNDS, 2), jnp.uint32):
        rows = (rows * (factor | 1) + first) & last
        rows ^= rows >> half
    return rows.astype(jnp.int32)


@one_object
def adam(learning_rate, warm_up, steps):
    """Adam with a linear warm-up, of at most a quarter of the steps, and cosine decay; one object for each setting."""
    return optax.adam(optax.warmup_cosine_decay_schedule(0.0, learning_rate, min(warm_up, steps // 4), steps))
