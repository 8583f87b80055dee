r"""How far the kernel moves along training.

    change(t) = ||K_t - K_0||_F / ||K_0||_F,    K_t the empirical kernel of the parameters after t updates

beside it what explains the change: the smallest embedding norm (a cosine loss has gradients of size 1/|f|, so a point
that shrinks towards the origin is moved fast), the largest one (growth under losses that are unbounded below) and the
distance ||theta_t - theta_0|| that the parameters travelled.
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from theorykit import training
from theorykit.ntk.empirical import check_points, empirical_ntk

_ROOM = 16  # snapshots at least; as many as the experiments take, and few parameters' worth of memory


class Drift(NamedTuple):
    """What `kernel_drift` measured after `steps` updates; every array has one entry per measured step, (m,).

    Attributes
    ----------
    steps
        Numbers of updates: those asked for that the run reached.
    change
        ||K_t - K_0||_F / ||K_0||_F, dimensionless.
    smallest, largest
        Smallest and largest embedding norm over the points.
    travelled
        ||theta_t - theta_0||, Euclidean over all parameters.
    losses
        (number of updates,) the loss before each update.
    status
        "finished" or "diverged", as `training.train` reports it.
    """

    steps: np.ndarray
    change: np.ndarray
    smallest: np.ndarray
    largest: np.ndarray
    travelled: np.ndarray
    losses: np.ndarray
    status: str


def relative_change(kt: Float[Array, "..."], k0: Float[Array, "..."]) -> Float[Array, ""]:
    """||kt - k0||_F / ||k0||_F of two kernels of the same shape, whatever their layout.

    Parameters
    ----------
    kt, k0
        Kernels, of any one shape.

    Returns
    -------
    A scalar, dimensionless; infinite or NaN where k0 is 0.

    Raises
    ------
    ValueError
        If the shapes differ.

    Source: definition.
    """
    if kt.shape != k0.shape:
        raise ValueError(f"The kernels have shapes {kt.shape} and {k0.shape}: evaluate both on the same points.")
    return _norm(kt - k0) / _norm(k0)


def _norm(kernel):
    """Frobenius norm without squares out of range: kernels of diverging runs pass 1e19, whose square float32 lacks."""
    largest = jnp.max(jnp.abs(kernel))
    return largest * jnp.linalg.norm((kernel / jnp.where(largest > 0, largest, 1)).ravel())


def kernel_drift(
    apply: Callable,
    objective: Callable,
    params: Any,
    data: Any,
    *,
    points: Shaped[Array, "m ..."],
    optimizer: Any,
    steps: int,
    at: Sequence[int],
    memory: int = 2**30,
) -> Drift:
    """Train by the ordinary loop on the full batch and measure the kernel after the given numbers of updates.

    Parameters
    ----------
    apply, params
        Encoder and its initial parameters, see `empirical_ntk`.
    objective, data
        What is minimised, (params, data) -> scalar: ``training.objective(apply, losses.info_nce)`` with data =
        (xa, xb).
    points
        Where the kernel is evaluated, (m, ...).
    optimizer, steps
        As in `training.train`.
    at
        Numbers of updates at which to measure, at least one, increasing, within 0..steps. The parameters at these
        steps are kept until the end.
    memory
        As in `empirical_ntk`.

    Returns
    -------
    Drift

    Raises
    ------
    ValueError, TypeError
        As `training.train` and `empirical_ntk`, before any training.

    Source: definition.
    """
    at = tuple(at)
    if not at or any(late <= early for early, late in pairwise(at)) or not 0 <= at[0] <= at[-1] <= steps:
        raise ValueError(
            f"at = {at} must hold one or more numbers that increase from 0 to steps = {steps}: correct it."
        )
    check_points(apply, params, points)
    run = training.train(
        objective,
        params,
        data,
        optimizer=optimizer,
        steps=steps,
        metrics=_snapshot,
        metric_steps=at,
        progress=False,
    )
    reached = len(run.metric_steps)
    # Room for a number of snapshots that many calls share, so that one compiled program measures all of them.
    room = max(_ROOM, 2 ** (len(at) - 1).bit_length())
    fill = lambda leaf: np.pad(leaf, [(0, room - reached)] + [(0, 0)] * (leaf.ndim - 1))  # noqa: E731
    snapshots = jax.tree.map(fill, jax.device_get(run.metrics))
    columns = _measure(apply, memory, params, snapshots, np.int32(reached), points)
    return Drift(
        np.asarray(run.metric_steps),
        *np.asarray(columns, np.float64)[:, :reached],
        np.asarray(run.losses),
        run.status,
    )


@partial(jax.jit, static_argnums=(0, 1))
def _measure(apply, memory, initial, snapshots, count, points):
    """Change of the kernel, smallest and largest embedding norm, distance travelled, at the first `count` snapshots."""
    room = jax.tree.leaves(snapshots)[0].shape[0]

    def measure(row, carry):
        # Row 0 is the start: its kernel comes from the same code as the others, so that no change reads as exactly 0.
        start, table = carry
        at_row = lambda leaf: jax.lax.dynamic_index_in_dim(leaf, jnp.maximum(row - 1, 0), keepdims=False)  # noqa: E731
        now = jax.tree.map(lambda leaf, first: jnp.where(row == 0, first, at_row(leaf)), snapshots, initial)
        kernel, norms = empirical_ntk(apply, now, points, memory=memory), jnp.linalg.norm(apply(now, points), axis=-1)
        start = jnp.where(row == 0, kernel, start)
        squares = jax.tree.map(lambda a, b: jnp.sum((a - b) ** 2), now, initial)
        travelled = jnp.sqrt(sum(jax.tree.leaves(squares)))
        found = jnp.stack([relative_change(kernel, start), norms.min(), norms.max(), travelled])
        return start, table.at[:, row].set(found)

    kernel = jax.eval_shape(partial(empirical_ntk, apply, memory=memory), initial, points)
    start = jnp.zeros(kernel.shape, kernel.dtype)
    _, table = jax.lax.fori_loop(0, count + 1, measure, (start, jnp.full((4, room + 1), jnp.nan, kernel.dtype)))
    return table[:, 1:]


def _snapshot(params):
    """The parameters themselves: measured afterwards, so that training compiles once for all kernels."""
    return params
