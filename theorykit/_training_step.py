"""The compiled part of theorykit.training: one step, and a loop over a chunk of steps. See there for the equations."""

import math
from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, PyTree

# Slots of the loss buffer, hence the longest chunk: at 10 microseconds a step, the least that a step costs on a CPU,
# the host is asked once in 10 ms, a hundred times the cost of asking.
LONGEST_CHUNK = 1024
# Independent streams of random numbers, folded into the run's key.
_ORDER, _AUGMENT, _WARM_UP = range(3)


class MomentumEncoder(NamedTuple):
    """A slowly moving copy of the encoder that makes keys, and a queue of its latest keys (MoCo).

    The queue starts full: before the first update the encoder at the initial parameters encodes
    ceil(queue_size / rows of keys) batches, drawn as in training but from a random stream of their own. So every
    negative, at every step, is the embedding of a sample of the data, and the loss has one form throughout.

    Attributes
    ----------
    decay
        m in [0, 1] of q <- m q + (1 - m) p. With 0 the keys come from the current parameters, with 1 from the initial
        ones for ever.
    queue_size
        Number of keys kept, at least 1. The keys of the current batch are not among them.
    encode
        (params, batch) -> keys of shape (rows, z), jit-compatible.

    Source
    ------
    He, Fan, Wu, Xie and Girshick, "Momentum contrast for unsupervised visual representation learning", CVPR 2020,
    section 3.2 and algorithm 1.
    """

    decay: float
    queue_size: int
    encode: Callable


class State(NamedTuple):
    """All that the next update needs, besides the arguments of `train`.

    Attributes
    ----------
    step
        Number t of updates done.
    params
        p_t.
    optimizer_state
        s_t.
    loss, gradient
        L_t and g_t at p_t on the batch B_t, from which update t + 1 is made.
    order
        (n,) the permutation of the rows in the current epoch; None for the full batch.
    averaged, keys, queue
        q_t, k_t (rows, z) and Q_t (queue_size, z), oldest key first; None without a momentum encoder.
    """

    step: Array
    params: PyTree
    optimizer_state: PyTree
    loss: Array | None = None
    gradient: PyTree = None
    order: Array | None = None
    averaged: PyTree = None
    keys: Array | None = None
    queue: Array | None = None


class Program(NamedTuple):
    """What is compiled in: functions are compared by identity."""

    loss: Callable
    optimizer: optax.GradientTransformation
    batch_size: int | None
    augment: Callable | None
    momentum_encoder: MomentumEncoder | None
    mesh: Mesh | None = None


def _batch(program: Program, data, key, step, order):
    """The batch B_step, and the permutation of its epoch."""
    if program.batch_size is not None:
        size, n = program.batch_size, order.shape[0]
        epoch, place = step // (n // size), step % (n // size)

        def shuffled():
            return jax.random.permutation(jax.random.fold_in(jax.random.fold_in(key, _ORDER), epoch), rows)

        rows = jnp.arange(n, dtype=order.dtype)
        order = lax.cond(place == 0, shuffled, lambda: order)
        taken = lax.dynamic_slice_in_dim(order, place * size, size)
        data = jax.tree.map(lambda a: jnp.take(a, taken, axis=0, mode="clip"), data)
    if program.augment is not None:
        data = program.augment(jax.random.fold_in(jax.random.fold_in(key, _AUGMENT), step), data)
    if program.mesh is not None:
        data = jax.tree_util.tree_map_with_path(partial(_spread, program.mesh), data)
    return data, order


def _spread(mesh, path, leaf):
    """An array of the batch, its rows divided among the devices."""
    if jnp.ndim(leaf) == 0:
        return leaf
    if leaf.shape[0] % mesh.size:
        raise ValueError(
            f"batch{jax.tree_util.keystr(path)} has {leaf.shape[0]} rows, which the {mesh.size} devices of the mesh do "
            f"not divide. Make the rows a multiple of {mesh.size}, or take a mesh of fewer devices."
        )
    return lax.with_sharding_constraint(leaf, NamedSharding(mesh, PartitionSpec(*mesh.axis_names)))


def _everywhere(mesh, tree):
    """The same values on every device."""
    return tree if mesh is None else lax.with_sharding_constraint(tree, NamedSharding(mesh, PartitionSpec()))


def _encode(program: Program, params, batch):
    keys = program.momentum_encoder.encode(params, batch)
    if jnp.ndim(keys) != 2:
        raise ValueError(
            f"momentum_encoder.encode returned keys of shape {jnp.shape(keys)}. Return one key a row: (rows, z)."
        )
    return keys


def _scalar(program: Program, batch, more, params):
    """The loss, checked to be one."""
    value = jnp.asarray(program.loss(params, batch, *more))
    if value.shape != () or not jnp.issubdtype(value.dtype, jnp.floating):
        raise ValueError(
            f"loss returned {value.dtype}{list(value.shape)}, not one floating-point number. "
            "Return a scalar, for example the mean over the batch."
        )
    return value


def _inputs(program: Program, state: State, data, key):
    """What the loss sees at the state's step: the batch, and keys and queue of a momentum encoder; and the order."""
    batch, order = _batch(program, data, key, state.step, state.order)
    if program.momentum_encoder is None:
        return batch, (), order
    return batch, (_encode(program, state.averaged, batch), state.queue), order


def _evaluate(program: Program, state: State, data, key) -> State:
    """The state with the loss, the gradient and the keys of its own step."""
    batch, more, order = _inputs(program, state, data, key)
    loss, gradient = jax.value_and_grad(partial(_scalar, program, batch, more))(state.params)
    keys = more[0] if more else None
    loss, gradient, keys = _everywhere(program.mesh, (loss, gradient, keys))
    return state._replace(loss=loss, gradient=gradient, order=order, keys=keys)


def residuals(program: Program, state: State, data, key):
    """A batch, and what the backward pass keeps of the forward pass: for their shapes."""
    batch, more, _ = _inputs(program, state, data, key)
    return batch, jax.vjp(partial(_scalar, program, batch, more), state.params)


def _update(program: Program, state: State) -> State:
    """One update from an evaluated state."""
    with _promotion_for_optax():
        updates, optimizer_state = program.optimizer.update(state.gradient, state.optimizer_state, state.params)
        params = optax.apply_updates(state.params, updates)
    averaged, queue = state.averaged, state.queue
    if program.momentum_encoder is not None:
        decay, size = float(program.momentum_encoder.decay), program.momentum_encoder.queue_size
        averaged = jax.tree.map(lambda q, p: decay * q + (1.0 - decay) * p, averaged, params)
        queue = _push(queue, state.keys, size)
    return state._replace(params=params, optimizer_state=optimizer_state, averaged=averaged, queue=queue)


def _promotion_for_optax():
    """Adam and others combine a whole-number count with floats, which a user's strict promotion would refuse."""
    return jax.numpy_dtype_promotion("standard")


def _push(queue, keys, size):
    """The newest `size` rows, oldest first, as collections.deque(maxlen=size) keeps them."""
    return jnp.concatenate([queue, keys])[-size:]


def _choose(condition, new, old):
    return jax.tree.map(partial(jnp.where, condition), new, old)


@partial(jax.jit, static_argnames="program")
def start(program: Program, params, data, key) -> State:
    """The state before the loss at the initial parameters is known: step -1."""
    order = averaged = queue = None
    if program.batch_size is not None:
        order = jnp.arange(jax.tree.leaves(data)[0].shape[0], dtype=jnp.int32)
    if program.momentum_encoder is not None:
        averaged = params
        queue = _warm_up(program, params, data, key, order)
    with _promotion_for_optax():
        optimizer_state = program.optimizer.init(params)
    state = State(jnp.int32(-1), params, optimizer_state, order=order, averaged=averaged, queue=queue)
    known = jax.eval_shape(partial(_evaluate, program), state, data, key)
    blank = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), (known.loss, known.gradient, known.keys))
    return state._replace(loss=blank[0], gradient=blank[1], keys=blank[2])


def _warm_up(program: Program, params, data, key, order):
    """A full queue of keys made by the initial encoder."""
    key = jax.random.fold_in(key, _WARM_UP)

    def encoded(order, step):
        batch, order = _batch(program, data, key, step, order)
        return order, _encode(program, params, batch)

    rows = jax.eval_shape(encoded, order, jnp.int32(0))[1].shape[0]
    size = program.momentum_encoder.queue_size
    _, keys = lax.scan(encoded, order, jnp.arange(math.ceil(size / rows), dtype=jnp.int32))
    return keys.reshape(-1, keys.shape[-1])[-size:]


def _advance(program: Program, state: State, data, key, stop):
    """Go on until `stop` updates are done, at most LONGEST_CHUNK further; the state, losses, and whether it failed.

    From step -1 the first pass makes no update and only evaluates. So the loss is compiled once, in this loop.
    """
    begin = state.step

    def going(carry):
        state, _, failed = carry
        return (state.step < stop) & ~failed

    def one(carry):
        state, losses, _ = carry
        moved = _choose(state.step >= 0, _update(program, state), state)
        candidate = _evaluate(program, moved._replace(step=state.step + 1), data, key)
        decisive = (candidate.params, candidate.loss, candidate.gradient, candidate.keys)
        good = jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(decisive)]).all()
        # The slot of a pass that fails, or that only evaluates, is never read.
        losses = losses.at[state.step - begin].set(state.loss)
        # A branch, not a selection of every leaf: with those the compiler takes four times as long.
        return lax.cond(good, lambda new, old: new, lambda new, old: old, candidate, state), losses, ~good

    losses = jnp.zeros(LONGEST_CHUNK, state.loss.dtype)
    return lax.while_loop(going, one, (state, losses, jnp.asarray(False)))


@cache
def advance_by(options: tuple[tuple[str, str | bool | int | float], ...]) -> Callable:
    """`_advance`, compiled with options of XLA; the same object for the same ones, so that it compiles once."""
    return jax.jit(_advance, static_argnames="program", compiler_options=dict(options) or None)


advance = advance_by(())


@partial(jax.jit, static_argnums=0)
def measure(metrics, params):
    return metrics(params)
