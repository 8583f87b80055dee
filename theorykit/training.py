"""The one training loop: any optax optimiser, full batch or mini-batch, metrics, a momentum encoder, checkpoints.

With t updates done, parameters p_t, optimiser state s_t and batch B_t, one step is

    L_t          = loss(p_t, B_t),     g_t = d L_t / d p_t
    u_t, s_{t+1} = optimizer.update(g_t, s_t, p_t)
    p_{t+1}      = p_t + u_t

so optax.sgd(r) on the full batch is gradient descent, p_{t+1} = p_t - r g_t. With a momentum encoder (He et al. 2020,
algorithm 1) the loss also sees keys k_t, which carry no gradient, and a queue Q_t of earlier keys:

    k_t     = encode(q_t, B_t),        L_t = loss(p_t, B_t, k_t, Q_t)
    q_{t+1} = m q_t + (1 - m) p_{t+1}, q_0 = p_0
    Q_{t+1} = the newest queue_size rows of (Q_t, k_t)

The loop runs in chunks, but nothing depends on their lengths: a chunk is one compiled while loop whose last step is an
argument, and all random numbers come from the run's key and the step.
"""

import itertools
import operator
import os
import time
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from functools import lru_cache
from types import MappingProxyType
from typing import NamedTuple, SupportsIndex

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Key, PyTree
from tqdm import tqdm

from theorykit._training_memory import check_memory, memory_bytes
from theorykit._training_step import LONGEST_CHUNK, MomentumEncoder, Program, State, advance_by, measure, start

__all__ = ["MomentumEncoder", "Run", "State", "check_memory", "memory_bytes", "objective", "train"]

# The chunk length follows the speed of the steps, so that the progress bar moves about once a second.
_CHUNK_SECONDS = 1.0


class Run(NamedTuple):
    """What `train` returns.

    Attributes
    ----------
    params
        The parameters after `steps` updates.
    losses
        (steps,) the loss before each update, L_0 to L_{steps - 1}, all finite.
    metrics
        What `metrics` returned, stacked along a new leading axis of length m; None without metrics.
    metric_steps
        (m,) int32, the steps at which they were measured: those asked for that the run reached.
    steps
        Number of updates done.
    status
        "finished", or "diverged": update `steps` + 1 would have led to a parameter, a loss, a gradient or a key that is
        not finite, and was not made.
    state
        The state after `steps` updates.
    """

    params: PyTree
    losses: Array
    metrics: PyTree
    metric_steps: Array
    steps: int
    status: str
    state: State


def train(
    loss: Callable,
    params: PyTree,
    data: PyTree,
    *,
    optimizer: optax.GradientTransformation,
    steps: int,
    batch_size: int | None = None,
    key: Key[Array, ""] | None = None,
    augment: Callable | None = None,
    metrics: Callable | None = None,
    metric_steps: Iterable[SupportsIndex] = (),
    momentum_encoder: MomentumEncoder | None = None,
    checkpoint: str | os.PathLike | None = None,
    checkpoint_every: int | None = None,
    settings: Mapping[str, object] = MappingProxyType({}),
    mesh: Mesh | None = None,
    compiler_options: Mapping[str, str | bool | int | float] = MappingProxyType({}),
    progress: bool = True,
) -> Run:
    """Minimise a loss by `steps` updates of an optax optimiser.

        p_{t+1} = p_t + u_t,    (u_t, s_{t+1}) = optimizer.update(d loss(p_t, B_t) / d p_t, s_t, p_t)

    The loop is compiled once for the same `loss`, `optimizer`, `augment`, `metrics` and `momentum_encoder` objects and
    the same shapes: make them once, outside a loop over seeds. The data are an argument of the compiled program.

    A run stops before the first update that leads to a parameter, a loss, a gradient or a key that is not finite; it
    then has the status "diverged" and keeps the state before that update, whose loss is finite. If the loss at the
    initial `params` is not finite, it keeps those, with 0 steps. This is checked inside the compiled loop. To know that
    the last state is good too, the loss is evaluated once more than there are updates.

    Parameters
    ----------
    loss
        (params, batch) -> scalar, or (params, batch, keys, queue) -> scalar with a momentum encoder; jit-compatible.
        `batch` is `data`, restricted to the rows of the batch and augmented.
    params
        Tree of floating-point arrays, the initial parameters. The caller's arrays stay valid.
    data
        Tree of arrays, all with the same leading axis n.
    optimizer
        Any optax gradient transformation whose update needs gradients, state and parameters only.
    steps
        Number of updates, >= 0.
    batch_size
        Rows in a batch, 1 to n; None for the full batch in the order given. Each epoch goes through a fresh random
        permutation of the rows in floor(n / batch_size) batches, so no row comes twice in an epoch; the
        n mod batch_size rows that are left over at the end of the permutation are skipped in that epoch.
    key
        Random key, needed for mini-batches and for augmentation.
    augment
        (key, batch) -> batch, jit-compatible, with a new key for every step.
    metrics
        params -> tree of arrays, jit-compatible. The results are moved to the host as they come.
    metric_steps
        Numbers of updates after which `metrics` is called: increasing, from 0 (the initial parameters) to `steps`.
    momentum_encoder
        Key encoder and queue; see MomentumEncoder.
    checkpoint, checkpoint_every
        A folder, and the number of steps between checkpoints; one more is written at the end. Called again with the
        same arguments, `train` goes on from the newest checkpoint, and on the same machine with the same versions gives
        the same parameters, losses and metrics, bit for bit, as a run without interruption. `steps` may grow
        from call to call. Parameters, data, key, batch size, momentum encoder and the form of the optimiser's state are
        compared with those of the checkpoint, and `settings`. Only the newest checkpoint is kept.
    settings
        What else a checkpoint must agree on, such as {"learning_rate": 1e-3}: the code of functions and the
        hyperparameters of an optimiser cannot be compared. Values are compared as text; an error names those that
        differ.
    mesh
        A one-dimensional mesh of devices for data parallelism: every array of the batch is divided along its leading
        axis, whose length the number of devices must divide; parameters and optimiser's state are on all devices. The
        result is that of one device to rounding, since sums over the batch are taken in another order.
    compiler_options
        Options of XLA for the compiled loop. With {"xla_cpu_multi_thread_eigen": False} a CPU multiplies matrices by
        one thread: faster for small matrices (width 32: by a quarter), and for several trainings side by side.
    progress
        Draw a progress bar with the loss, if stderr is a terminal.

    Returns
    -------
    Run
        Parameters, losses of shape (steps,), metrics, status and state.

    Raises
    ------
    ValueError, TypeError
        On arguments that do not fit together, data or parameters that are not finite, and a checkpoint that belongs to
        another run or cannot be written or read; before anything is compiled.

    Source
    ------
    Derivation: the definition of an optax update. Mini-batches without replacement within an epoch: Bottou, "Curiously
    fast convergence of some stochastic gradient descent algorithms", 2009. Momentum encoder: He et al. 2020.
    """
    # With explicit axes, which jax.make_mesh gives, shardings would be a part of the types that the loss sees.
    mesh = None if mesh is None else Mesh(mesh.devices, mesh.axis_names)
    program = Program(loss, optimizer, batch_size, augment, momentum_encoder, mesh)
    advance = advance_by(tuple(sorted(compiler_options.items())))
    wanted = [_integer("A metric step", m) for m in metric_steps]
    _check_arguments(program, steps, key, metrics, wanted, checkpoint, checkpoint_every)
    _check_arrays(params, data, batch_size)
    # A copy, so that nothing that the caller later does to arrays of numpy reaches the result.
    params, data = jax.tree.map(jnp.array, params), jax.tree.map(jnp.asarray, data)
    # Without mini-batches and augmentation no number is drawn from the key.
    key = jax.random.key(0) if key is None else key
    params, data, key = _placed(program, params, data, key)

    expected = start.eval_shape(program, params, data, key)
    losses = np.zeros(steps, expected.loss.dtype)
    form = None if metrics is None else measure.eval_shape(metrics, params)
    table = jax.tree.map(lambda a: np.zeros((len(wanted), *a.shape), a.dtype), form)

    with _open(checkpoint, program, params, data, key, expected, settings) as store:
        found = store.newest(steps, wanted) if store else None
        state = start(program, params, data, key)
        if found is None:
            step = measured = 0
            state, _, failed = advance(program, state, data, key, 0)
        else:
            step, measured, failed = found, bisect_right(wanted, found), False
            # The slices are views: what is known of losses and metrics goes where it belongs.
            known = (losses[:step], _head(table, measured))
            state, *stored = store.restore(step, (state, *known))
            jax.tree.map(np.copyto, known, tuple(stored))
        saved, length = step, 1
        with tqdm(desc="training", total=steps, initial=step, unit="step", disable=None if progress else True) as bar:
            while True:
                bar.update(step - bar.n)
                bar.set_postfix_str(f"loss {float(state.loss):.4g}")
                if not failed and measured < len(wanted) and wanted[measured] == step:
                    row = jax.device_get(measure(metrics, state.params))
                    jax.tree.map(lambda a, b, i=measured: np.copyto(a[i, ...], b), table, row)
                    measured += 1
                over = failed or step == steps
                if store and step > saved and (over or step % checkpoint_every == 0):
                    store.save(step, wanted[:measured], (state, losses[:step], _head(table, measured)))
                    saved = step
                if over:
                    break
                stop = min(steps, step + length)
                if measured < len(wanted):
                    stop = min(stop, wanted[measured])
                if store:
                    stop = min(stop, step - step % checkpoint_every + checkpoint_every)
                begun = time.monotonic()
                state, chunk, failed = advance(program, state, data, key, stop)
                begin, step = step, int(state.step)
                losses[begin:step] = np.asarray(chunk)[: step - begin]
                faster = time.monotonic() - begun < _CHUNK_SECONDS / 2
                length = min(2 * length, LONGEST_CHUNK) if faster else max(length // 2, 1)

    # device_put, unlike jnp.asarray, compiles nothing for a new length.
    return Run(
        params=state.params,
        losses=jax.device_put(losses[:step]),
        metrics=jax.device_put(_head(table, measured)),
        metric_steps=jax.device_put(np.asarray(wanted[:measured], np.int32)),
        steps=step,
        status="diverged" if failed else "finished",
        state=state._replace(step=jax.device_put(np.int32(step))),
    )


@lru_cache(maxsize=256)
def objective(apply: Callable, loss: Callable) -> Callable:
    """What `train` minimises for a loss of embeddings: (params, views) -> loss(f(view_1), f(view_2), ...).

    Parameters
    ----------
    apply
        (params, x) -> (n, z), acting on rows; all views go through it as one batch.
    loss
        As many embeddings in as there are views, scalar out, such as `losses.info_nce`.

    Returns
    -------
    Callable
        The same object for the same two arguments, so that `train` compiles once.
    """

    def value(params, views):
        embeddings = apply(params, jnp.concatenate(views))
        return loss(*jnp.split(embeddings, len(views)))

    return value


def _placed(program, params, data, key):
    """On the devices of the mesh: the rows of a full batch divided, all else everywhere."""
    if program.mesh is None:
        return params, data, key
    whole = NamedSharding(program.mesh, PartitionSpec())
    by_rows = NamedSharding(program.mesh, PartitionSpec(*program.mesh.axis_names))
    divided = program.batch_size is None and len(jax.tree.leaves(data)[0]) % program.mesh.size == 0
    params, key = jax.device_put((params, key), whole)
    return params, jax.device_put(data, by_rows if divided else whole), key


def _head(table, rows):
    return jax.tree.map(lambda a: a[:rows], table)


def _open(checkpoint, program, params, data, key, state, settings):
    """The store of checkpoints, or a context without one."""
    if checkpoint is None:
        return nullcontext()
    from theorykit._checkpoint import Checkpoints, digest, shapes  # orbax takes longer to import than jax

    encoder = program.momentum_encoder
    setting = {
        "the shapes of params": shapes(params),
        "the shapes of data": shapes(data),
        "batch_size": str(program.batch_size),
        "momentum_encoder": "None" if encoder is None else f"decay {encoder.decay}, queue_size {encoder.queue_size}",
        "the shapes of the state (they follow from the optimizer)": shapes(state),
        "the values of params (digest)": digest(params),
        "the values of data (digest)": digest(data),
        "key": digest(key),
    }
    return Checkpoints(checkpoint, {name: str(value) for name, value in settings.items()} | setting)


def _integer(name, value) -> int:
    try:
        return operator.index(value)
    except TypeError as error:
        raise TypeError(f"{name} must be a whole number, not {value!r}. Round it first.") from error


def _check_arguments(program, steps, key, metrics, wanted, checkpoint, checkpoint_every):
    if _integer("steps", steps) < 0:
        raise ValueError(f"steps is {steps}. Pass the number of updates, 0 or more.")
    if (metrics is None) != (not wanted):
        raise ValueError("metrics and metric_steps go together. Pass both or neither.")
    if any(late <= early for early, late in itertools.pairwise(wanted)):
        raise ValueError(f"metric_steps {wanted} do not increase. Pass them sorted and without repeats.")
    if wanted and not 0 <= wanted[0] <= wanted[-1] <= steps:
        raise ValueError(
            f"metric_steps {wanted} leave the range 0 to steps={steps}. Drop those outside or train longer."
        )
    if key is None and (program.batch_size is not None or program.augment is not None):
        raise ValueError("Mini-batches and augmentation draw random numbers. Pass key, for example jax.random.key(0).")
    if (checkpoint is None) != (checkpoint_every is None):
        raise ValueError("checkpoint (a folder) and checkpoint_every (steps) go together. Pass both or neither.")
    if checkpoint_every is not None and _integer("checkpoint_every", checkpoint_every) < 1:
        raise ValueError(f"checkpoint_every is {checkpoint_every}. Pass the steps between checkpoints, 1 or more.")
    if program.mesh is not None and len(program.mesh.axis_names) != 1:
        raise ValueError(
            f"Batches are divided over a mesh of one axis and this one has {program.mesh.axis_names}. Reshape it."
        )
    encoder = program.momentum_encoder
    if encoder is not None and not 0.0 <= encoder.decay <= 1.0:
        raise ValueError(f"The decay of the momentum encoder is {encoder.decay}. Pass a number from 0 to 1.")
    if encoder is not None and _integer("queue_size", encoder.queue_size) < 1:
        raise ValueError(f"queue_size is {encoder.queue_size}. Pass the number of keys to keep, 1 or more.")
    try:
        hash((program, metrics))
    except TypeError as error:
        raise TypeError(
            f"A function or the optimizer cannot be hashed ({error}), so its compiled loop could not be found again. "
            "Pass plain functions, and arrays through params or data."
        ) from error


def _check_arrays(params, data, batch_size):
    named = {
        name: [(name + jax.tree_util.keystr(path), np.asarray(leaf)) for path, leaf in _leaves(tree)]
        for name, tree in (("params", params), ("data", data))
    }
    for name, leaves in named.items():
        if not leaves:
            raise ValueError(f"{name} holds no array. Pass a tree with at least one.")
        for path, leaf in leaves:
            floating = jnp.issubdtype(leaf.dtype, jnp.floating)
            if name == "params" and not floating:
                raise TypeError(f"{path} has dtype {leaf.dtype}. Parameters are floating-point; keep the rest in data.")
            if floating and not np.isfinite(leaf).all():
                count = int((~np.isfinite(leaf)).sum())
                raise ValueError(f"{path} has {count} entries that are not finite. Remove or replace them.")
    for path, leaf in named["data"]:
        if leaf.ndim == 0:
            raise ValueError(f"{path} is a scalar. Every array of data needs a leading axis of samples.")
    lengths = {path: leaf.shape[0] for path, leaf in named["data"]}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"The leading axes of data differ: {lengths}. Give every array one row for each sample.")
    n = next(iter(lengths.values()))
    if n == 0:
        raise ValueError("data has no rows. Pass at least one sample.")
    if batch_size is not None and not 1 <= _integer("batch_size", batch_size) <= n:
        raise ValueError(
            f"batch_size is {batch_size}, but data has {n} rows. Pass 1 to {n}, or None for the full batch."
        )


def _leaves(tree):
    return jax.tree_util.tree_flatten_with_path(tree)[0]
