r"""How far the kernel moves along training.

    change(t) = ||K_t - K_0||_F / ||K_0||_F,    K_t the empirical kernel of the parameters after t updates

beside it what explains the change: the smallest embedding norm (a cosine loss has gradients of size 1/|f|, so a point that
shrinks towards the origin is moved fast), the largest one (growth under losses that are unbounded below) and the distance
||theta_t - theta_0|| that the parameters travelled.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from theorykit import training
from theorykit.ntk.empirical import empirical_ntk


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


def relative_change(kt: Float[Array, "*kernel"], k0: Float[Array, "*kernel"]) -> Float[Array, ""]:
    """||kt - k0||_F / ||k0||_F of two kernels of the same shape, whatever their layout.

    Raises
    ------
    ValueError
        If the shapes differ.
    """
    if kt.shape != k0.shape:
        raise ValueError(f"The kernels have shapes {kt.shape} and {k0.shape}: evaluate both on the same points.")
    return jnp.linalg.norm(kt.ravel() - k0.ravel()) / jnp.linalg.norm(k0.ravel())


def kernel_drift(
    apply: Callable,
    loss: Callable,
    params: Any,
    views: Sequence[Float[Array, "n ..."]],
    *,
    optimizer: Any,
    steps: int,
    at: Sequence[int],
    points: Float[Array, "m ..."] | None = None,
    memory: int = 2**30,
) -> Drift:
    """Train by the ordinary loop on the full batch and measure the kernel after the given numbers of updates.

    Parameters
    ----------
    apply, params
        Encoder and its initial parameters, see `empirical_ntk`.
    loss
        Embeddings of the views in, scalar out, such as ``losses.info_nce``; see `training.objective`.
    views
        Inputs of the views, each (n, ...), row i of each belonging together.
    optimizer, steps
        As in `training.train`.
    at
        Numbers of updates at which to measure, increasing, within 0..steps.
    points
        Where the kernel is evaluated; the first view by default.
    memory
        As in `empirical_ntk`.

    Returns
    -------
    Drift

    Raises
    ------
    ValueError
        As `training.train` and `empirical_ntk`.
    """
    points = views[0] if points is None else points
    start = empirical_ntk(apply, params, points, memory=memory)
    run = training.train(
        training.objective(apply, loss),
        params,
        tuple(views),
        optimizer=optimizer,
        steps=steps,
        metrics=_snapshot,
        metric_steps=at,
        progress=False,
    )
    rows = []
    for m in range(len(run.metric_steps)):
        now = jax.tree.map(lambda leaf, m=m: jnp.asarray(leaf[m]), run.metrics)
        norms = jnp.linalg.norm(apply(now, points), axis=-1)
        change = relative_change(empirical_ntk(apply, now, points, memory=memory), start)
        rows.append([change, norms.min(), norms.max(), _distance(now, params)])
    columns = np.array(rows, dtype=np.float64).reshape(-1, 4).T
    return Drift(np.asarray(run.metric_steps), *columns, np.asarray(run.losses), run.status)


def _snapshot(params):
    """The parameters themselves: measured afterwards, so that training compiles once for all kernels."""
    return params


@jax.jit
def _distance(left, right):
    squares = jax.tree.map(lambda a, b: jnp.sum((a - b) ** 2), left, right)
    return jnp.sqrt(sum(jax.tree.leaves(squares)))
