"""What a training run will hold: an estimate made before anything is compiled."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AbstractMesh, Mesh
from jaxtyping import PyTree

from theorykit._memory import free_bytes
from theorykit._training_step import MomentumEncoder, Program, residuals, start


def memory_bytes(
    loss: Callable,
    params: PyTree,
    data: PyTree,
    *,
    optimizer: optax.GradientTransformation,
    batch_size: int | None = None,
    augment: Callable | None = None,
    momentum_encoder: MomentumEncoder | None = None,
    mesh: Mesh | AbstractMesh | None = None,
) -> int:
    """Estimate of the bytes that `train` holds at its peak, on each device, from shapes alone: nothing is compiled.

        data + 2 · state + (batch + residuals) / devices
        state = parameters, gradient, optimiser's state, order of the rows, ...

    Two states, because a step keeps the last one until the next is known to be finite. Residuals are what the backward
    pass keeps of the forward pass, by the trace of `jax.vjp`. The compiler may recompute some of them and needs room
    for a few arrays while it works, so the estimate is of the right size and not exact. On a mesh the batch is divided,
    and so is a full batch without augmentation, which is the data.

    Parameters
    ----------
    loss, params, data, optimizer, batch_size, augment, momentum_encoder, mesh
        As in `train`. Parameters and data may also be trees of `jax.ShapeDtypeStruct`, so that nothing large need
        exist yet, and the mesh may be an `AbstractMesh`.

    Returns
    -------
    Bytes.

    Source
    ------
    Derivation.
    """
    program = Program(loss, optimizer, batch_size, augment, momentum_encoder)
    params, data = (jax.tree.map(_shaped, tree) for tree in (params, data))
    key = jax.eval_shape(partial(jax.random.key, 0))
    state = start.eval_shape(program, params, data, key)
    batch, kept = jax.eval_shape(partial(residuals, program), state, data, key)
    # The full batch without augmentation is the data themselves.
    drawn = batch_size is not None or augment is not None
    whole, divided = (data, (batch, kept)) if drawn else (None, (data, kept))
    devices = 1 if mesh is None else mesh.size
    return _bytes(whole) + 2 * _bytes(state) + -(-_bytes(divided) // devices)


def check_memory(
    loss: Callable,
    params: PyTree,
    data: PyTree,
    *,
    optimizer: optax.GradientTransformation,
    memory: int | None = None,
    **settings: object,
) -> int:
    """The estimate of `memory_bytes`, or MemoryError where it is more than there is: to be called before `train`.

    Parameters
    ----------
    loss, params, data, optimizer
        As in `train`; parameters and data may also be trees of `jax.ShapeDtypeStruct`.
    memory
        Bytes allowed; None for what is free on the first device. Where that is not known, nothing is refused.
    **settings
        batch_size, augment, momentum_encoder and mesh of `train`.

    Returns
    -------
    The estimate in bytes.

    Raises
    ------
    MemoryError
        With both numbers and what would make the run smaller.
    """
    needed = memory_bytes(loss, params, data, optimizer=optimizer, **settings)
    have = free_bytes() if memory is None else memory
    if have is not None and needed > have:
        sizes = {"parameters": _bytes(jax.tree.map(_shaped, params)), "data": _bytes(jax.tree.map(_shaped, data))}
        parts = ", ".join(f"{name} {_gib(size)}" for name, size in sizes.items())
        raise MemoryError(
            f"This training needs about {_gib(needed)} ({parts}) and {_gib(have)} are "
            f"{'free' if memory is None else 'allowed'}: take a smaller batch, fewer members at once, a smaller "
            "preset, or a machine with more memory."
        )
    return needed


def _shaped(leaf) -> jax.ShapeDtypeStruct:
    # Python numbers and arrays of numpy as train will hold them: float64 becomes float32 unless x64 is on.
    dtype = leaf.dtype if hasattr(leaf, "dtype") else np.asarray(leaf).dtype
    return jax.ShapeDtypeStruct(jnp.shape(leaf), jax.dtypes.canonicalize_dtype(dtype, allow_extended_dtype=True))


def _bytes(tree) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _gib(count: int) -> str:
    return f"{count / 2**30:.2f} GiB"
