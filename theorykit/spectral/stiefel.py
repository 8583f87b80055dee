r"""Descent over matrices with orthonormal columns, and jointly over Euclidean parameters.

    minimise L(W, theta)   over   W in R^(m x k) with W^T W = I_k  (the Stiefel manifold),   theta free.

With G = dL/dW the gradient on the manifold is its tangential part, and a step of length a follows it and comes back by
a retraction R, a curve on the manifold with the right velocity at 0:

    X = G - W sym(W^T G),      W <- R_W(-a X),      theta <- theta - a dL/dtheta.

    "qr"      R_W(X) = Q of W + X = Q R, the diagonal of R positive
    "cayley"  R_W(X) = (I - A/2)^-1 (I + A/2) W,   A = P X W^T - W X^T P,   P = I - W W^T / 2,   so that A W = X

Both agree with the exponential map exp(A) W of the canonical metric: "cayley" to second order for every X, "qr" to
first order, and to second order as a subspace where W^T X = 0. That is so for every loss of span W alone (W^T G is then
symmetric), that is, for descent on the Grassmann manifold.

Step control. The length starts at the learning rate and is halved until the loss does not pass its lowest value so far
by more than rounding, and either it has fallen enough (Armijo's condition) or the slope at the end of the step says so.
The second tells near a minimum, where values differ by rounding only. Then the length may double again, up to the
learning rate. So the loss does not rise, whatever the learning rate, and a run that cannot go on says so by its status.
Where no step was shortened the run is plain descent, and learning rate times steps is its time.

Sources: Absil, Mahony, Sepulchre, "Optimization Algorithms on Matrix Manifolds", 2008, for the gradient, the QR
retraction and Armijo's condition on a manifold; Hager, Zhang 2005 (doi:10.1137/030601880) for the slope at the end;
Wen, Yin 2013 (doi:10.1007/s10107-012-0584-1) for the Cayley transform at low rank; Edelman, Arias, Smith 1998 (arXiv
physics/9806030) for the exponential map.
"""

import operator
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from theorykit.spectral import compare

Matrix = Array | np.ndarray
Scalar = float | int | Float[Array, ""]  # traced where it is swept

FINISHED = 0
CONVERGED = 1
STALLED = 2
NOT_FINITE = 3
_RUNNING = -1

_MEANING = {
    FINISHED: "finished all updates",
    CONVERGED: "converged: the gradient is within the tolerance",
    STALLED: "stalled: no step down to sqrt(eps) of the learning rate lowers the loss. Lower the rate, or check the "
    "gradient: it may not be the loss's own",
    NOT_FINITE: "stopped: the loss or its gradient is not finite, at the start or after a step however short",
}

# Share of the tangent line's decrease that a step must reach (Nocedal, Wright, "Numerical Optimization", 3.1). On a
# quadratic both conditions then hold up to 1 - 1e-4 of the length at which descent becomes unstable.
_SHARE = 1e-4
# A loss that sums some thousand terms of one size is known to about this many units in the last place of the largest
# value met (independent roundings grow as the square root); within them it neither rises nor falls.
_ROUNDING_ULP = 64.0


class StiefelRun(NamedTuple):
    """What `stiefel_descent` returns; under `jax.vmap` every array has the mapped axis in front.

    Attributes
    ----------
    w : (m, k) the matrix after the last update, with orthonormal columns.
    params : the Euclidean parameters after the last update; None without.
    loss, gradient_norm : () the loss there, and sqrt(||X||_F^2 + ||dL/dtheta||^2).
    losses : (steps,) the loss before each update; NaN for updates that were not made.
    rates : (steps,) length of each update, at most the learning rate; 0 for updates that were not made.
    metrics : what `metrics` returned, stacked along a new leading axis (c, ...); None without.
    metric_steps : (c,) updates made when it was called: those asked for, or fewer where the run had ended before.
    metric_times : (c,) sum of the step lengths by then.
    steps : () updates made.
    status : () integer, FINISHED, CONVERGED, STALLED or NOT_FINITE of this module.
    """

    w: Float[Array, "m k"]
    params: PyTree
    loss: Float[Array, ""]
    gradient_norm: Float[Array, ""]
    losses: Float[Array, " s"]
    rates: Float[Array, " s"]
    metrics: PyTree
    metric_steps: Int[Array, " c"]
    metric_times: Float[Array, " c"]
    steps: Int[Array, ""]
    status: Int[Array, ""]

    def describe(self) -> str:
        """Say in words how the run ended and where."""
        return (
            f"{_MEANING[int(self.status)]}; {int(self.steps)} updates, loss {float(self.loss):.6g}, "
            f"norm of the gradient {float(self.gradient_norm):.2g}"
        )


def project_tangent(w: Float[Matrix, "m k"], g: Float[Matrix, "m k"]) -> Float[Array, "m k"]:
    r"""Tangential part of a matrix, which of a Euclidean gradient is the gradient on the manifold.

    .. math:: X = G - W \tfrac12 (W^\top G + G^\top W)

    Parameters
    ----------
    w : (m, k), orthonormal columns.
    g : (m, k), any matrix.

    Returns
    -------
    (m, k), with W^T X skew-symmetric. It is the nearest tangent vector in Frobenius norm.

    Source: Absil, Mahony, Sepulchre 2008, equation 3.35.
    """
    inner = _matmul(w.T, g)
    return g - _matmul(w, (inner + inner.T) / 2)


def retract_qr(w: Float[Matrix, "m k"], tangent: Float[Matrix, "m k"]) -> Float[Array, "m k"]:
    """Q of W + X = Q R with a positive diagonal of R: the step, made orthonormal again column by column.

    Parameters
    ----------
    w : (m, k), orthonormal columns, k <= m.
    tangent : (m, k), tangent at w.

    Returns
    -------
    (m, k), orthonormal columns; w itself for a step 0. NaN in every entry for a step that is not
    finite, of which Q may be finite in part or as a whole.

    Source: Absil, Mahony, Sepulchre 2008, example 4.1.3.
    """
    q, r = jnp.linalg.qr(w + tangent)
    q = q * jnp.where(jnp.diagonal(r) < 0, -1, 1).astype(q.dtype)[None, :]
    return jnp.where(jnp.all(jnp.isfinite(w + tangent)), q, jnp.nan)


def retract_cayley(w: Float[Matrix, "m k"], tangent: Float[Matrix, "m k"]) -> Float[Array, "m k"]:
    r"""Cayley transform of the rotation whose velocity at w is the tangent vector.

    .. math:: R = W + U (I - \tfrac12 V^\top U)^{-1} V^\top W, \qquad U = [P X, W], \quad V = [W, -P X], \quad
              P = I - \tfrac12 W W^\top

    Parameters, Returns
    -------------------
    As for :func:`retract_qr`. It solves one system of size 2k, and no orthonormalisation of m rows.

    Source: Wen, Yin 2013, lemma 4; P X in place of G makes it start along X.
    """
    k = w.shape[1]
    half = tangent - _matmul(w, _matmul(w.T, tangent)) / 2
    u, v = jnp.concatenate([half, w], axis=1), jnp.concatenate([w, -half], axis=1)
    system = jnp.eye(2 * k, dtype=u.dtype) - _matmul(v.T, u) / 2
    y = w + _matmul(u, jnp.linalg.solve(system, _matmul(v.T, w)))
    # One step of Newton's method for the nearest orthonormal matrix. The transform is orthonormal up to rounding, and
    # without this the rounding of every step would add to that of the last.
    return _matmul(y, 1.5 * jnp.eye(k, dtype=y.dtype) - _matmul(y.T, y) / 2)


RETRACTIONS = {"qr": retract_qr, "cayley": retract_cayley}


def grassmann_distance(u: Float[Matrix, "m k"], v: Float[Matrix, "m k"]) -> Float[Array, ""]:
    r"""Length of the shortest path between two subspaces, the norm of their principal angles.

    .. math:: d(U, V) = \Big( \sum_i \theta_i^2 \Big)^{1/2}

    Parameters
    ----------
    u, v : (m, k), orthonormal columns.

    Returns
    -------
    Radians, at most (pi / 2) sqrt k. Use it in the `metrics` of `stiefel_descent`.

    Source: Edelman, Arias, Smith 1998, section 4.3.
    """
    return jnp.linalg.norm(compare.principal_angles(jnp.asarray(u), jnp.asarray(v)))


def stiefel_descent(
    loss: Callable,
    w0: Float[Matrix, "m k"],
    params: PyTree = None,
    data: PyTree = None,
    *,
    steps: int,
    learning_rate: Scalar,
    retraction: str = "qr",
    tolerance: Scalar = 0.0,
    metrics: Callable | None = None,
    metric_steps: Sequence[int] = (),
) -> StiefelRun:
    """Minimise a loss over matrices with orthonormal columns, and over Euclidean parameters if there are any.

    The compiled program is kept for each (loss, metrics, retraction, steps, shapes): pass the same function objects
    again, and arrays through `data` rather than in a closure. Works under `jax.jit` and `jax.vmap`.

    Parameters
    ----------
    loss : loss(w), loss(w, params), loss(w, data) or loss(w, params, data), whichever of the two are given; returns a
        scalar of the dtype of w.
    w0 : (m, k) starting point, orthonormal columns, k <= m.
    params : tree of floating-point arrays, trained by plain descent with the same step length.
    data : tree of arrays, not trained.
    steps : largest number of updates, >= 0.
    learning_rate : largest step length, > 0. Near the minimum of Tr(W^T C W), whose gradient is 2 C W, descent needs no
        shorter step while it is below 1 / (largest eigenvalue of C minus the smallest).
    retraction : "qr" or "cayley".
    tolerance : norm of the gradient at which to stop, >= 0. At 0 the run stops where the gradient is exactly 0, at a
        saddle too.
    metrics : called with the arguments of `loss`, returns a tree of floating-point arrays.
    metric_steps : numbers of updates after which to call it, increasing, within 0..steps.

    Returns
    -------
    StiefelRun, with a status. Every state in it is finite; a step that leads to a value that is not finite is shortened
    like one that raises the loss.

    Raises
    ------
    ValueError : w0 that is not a tall matrix or not orthonormal, values that are not finite, an unknown retraction,
        steps, rates or tolerances out of range, metrics without metric_steps or the reverse, a loss that is no scalar.
    TypeError : w0, params or a loss of another than one floating-point dtype, or functions that cannot be hashed.

    Source: Absil, Mahony, Sepulchre 2008, algorithm 1 (line search on a manifold).
    """
    w0 = jnp.asarray(w0)
    params, data = jax.tree.map(jnp.asarray, (params, data))
    at = [operator.index(step) for step in metric_steps]
    _check_point(w0, params)
    _check_options(steps, retraction, metrics, at, learning_rate=learning_rate, tolerance=tolerance)
    program = _Program(loss, metrics, retraction, steps)
    try:
        hash(program)
    except TypeError as error:
        raise TypeError(f"loss or metrics cannot be hashed ({error}): pass plain functions") from error
    stops = jnp.asarray([*at, steps], jnp.int32)
    rate, tolerance = jnp.asarray(learning_rate, w0.dtype), jnp.asarray(tolerance, w0.dtype)
    run = _descend(program, w0, params, data, rate, tolerance, stops)
    # The last stop is the end of the run, measured or not.
    head = jax.tree.map(lambda rows: rows[: len(at)], (run.metrics, run.metric_steps, run.metric_times))
    return run._replace(metrics=head[0], metric_steps=head[1], metric_times=head[2])


class _Program(NamedTuple):
    loss: Callable
    metrics: Callable | None
    retraction: str
    steps: int


class _Point(NamedTuple):
    """A point with what is known there: loss, directions of steepest ascent, squared norm of the gradient."""

    w: Array
    params: PyTree
    loss: Array
    tangent: Array
    gradient: PyTree
    square: Array

    def finite(self):
        return jnp.isfinite(self.loss) & jnp.isfinite(self.square)


class _State(NamedTuple):
    point: _Point
    lowest: Array  # loss so far
    scale: Array  # largest |loss| so far
    rate: Array  # length of the last step
    losses: Array
    rates: Array
    step: Array
    status: Array


@partial(jax.jit, static_argnums=0)
def _descend(program, w0, params, data, longest, tolerance, stops):
    retract = RETRACTIONS[program.retraction]
    eps = float(jnp.finfo(w0.dtype).eps)

    def arguments(w, params):
        return [w, *(tree for tree in (params, data) if tree is not None)]

    def judge(point):
        return jnp.where(jnp.sqrt(point.square) <= tolerance, CONVERGED, _RUNNING)

    def evaluate(w, params):
        trained = (0,) if params is None else (0, 1)
        value, (gradient, *rest) = jax.value_and_grad(program.loss, trained)(*arguments(w, params))
        tangent = project_tangent(w, gradient)
        square = sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves((tangent, rest)))
        return _Point(w, params, value, tangent, rest[0] if rest else None, square)

    def update(state):
        point = state.point
        ceiling = state.lowest + _ROUNDING_ULP * eps * state.scale

        def shorten(trial):
            rate = trial[0] / 2
            moved = jax.tree.map(lambda p, g: p - rate * g, point.params, point.gradient)
            found = evaluate(retract(point.w, -rate * point.tangent), moved)
            fallen = found.loss <= point.loss - _SHARE * rate * point.square
            falling = _inner(found, point) >= (2 * _SHARE - 1) * point.square
            return rate, found, found.finite() & (found.loss <= ceiling) & (fallen | falling)

        def unsettled(trial):
            rate, _, fine = trial
            # A learning rate too long by 1/sqrt(eps) (3000 in float32) is a mistake, and still shorter steps change
            # the loss by so little that a wrong gradient would hide in its rounding.
            return ~fine & (rate > eps**0.5 * longest)

        first = 2 * jnp.minimum(2 * state.rate, longest)  # `shorten` halves it
        rate, found, fine = jax.lax.while_loop(unsettled, shorten, (first, point, False))
        kept = jax.tree.map(partial(jnp.where, fine), found, point)
        ended = jnp.where(found.finite(), STALLED, NOT_FINITE)
        return state._replace(
            point=kept,
            lowest=jnp.minimum(state.lowest, kept.loss),
            scale=jnp.maximum(state.scale, jnp.abs(kept.loss)),
            rate=rate,
            losses=state.losses.at[state.step].set(jnp.where(fine, point.loss, jnp.nan)),
            rates=state.rates.at[state.step].set(jnp.where(fine, rate, 0 * rate)),
            step=state.step + fine.astype(jnp.int32),
            status=jnp.where(fine, judge(kept), ended).astype(jnp.int32),
        )

    def advance(state, stop):
        state = jax.lax.while_loop(lambda s: (s.status == _RUNNING) & (s.step < stop), update, state)
        measured = None if program.metrics is None else program.metrics(*arguments(*state.point[:2]))
        return state, (measured, state.step, jnp.sum(state.rates))

    value = jax.eval_shape(program.loss, *arguments(w0, params))
    if getattr(value, "shape", None) != ():
        raise ValueError(f"the loss must return a scalar, got {value}: take the mean over the samples")
    if value.dtype != w0.dtype:
        raise TypeError(f"the loss has dtype {value.dtype}, w0 {w0.dtype}: give w0, params and data in one dtype")
    start = evaluate(w0, params)
    blank = jnp.zeros(max(program.steps, 1), w0.dtype)  # the unused update must have a place, even if none is made
    status = jnp.where(start.finite(), judge(start), NOT_FINITE).astype(jnp.int32)
    zero = jnp.zeros((), jnp.int32)
    state = _State(start, start.loss, jnp.abs(start.loss), longest, blank * jnp.nan, blank, zero, status)
    state, (measured, at, times) = jax.lax.scan(advance, state, stops)
    point, status = state.point, jnp.where(state.status == _RUNNING, FINISHED, state.status)
    made = [a[: program.steps] for a in (state.losses, state.rates)]
    ends = (*made, measured, at, times, state.step, status)
    return StiefelRun(point.w, point.params, point.loss, jnp.sqrt(point.square), *ends)


def _inner(found, point):
    """Product of the gradients at both ends of a step; its part normal to the manifold at the end drops out."""
    pairs = ((found.tangent, found.gradient), (point.tangent, point.gradient))
    return sum(jax.tree.leaves(jax.tree.map(lambda a, b: jnp.sum(a * b), *pairs)))


def _matmul(a, b):
    return jnp.matmul(a, b, precision="highest")


def _check_point(w, params):
    if w.ndim != 2 or not 1 <= w.shape[1] <= w.shape[0]:
        raise ValueError(f"w0 has shape {w.shape}: give (m, k) with 1 <= k <= m, one orthonormal column per output")
    for path, leaf in jax.tree_util.tree_leaves_with_path({"w0": w, "params": params}):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        if not jnp.issubdtype(leaf.dtype, jnp.floating) or leaf.dtype != w.dtype:
            raise TypeError(f"{name} has dtype {leaf.dtype}: give w0 and params in one floating-point dtype")
        if _concrete(leaf) and not np.isfinite(np.asarray(leaf)).all():
            raise ValueError(f"{name} has entries that are not finite: replace them before the descent")
    if _concrete(w):
        error = float(jnp.max(jnp.abs(_matmul(w.T, w) - jnp.eye(w.shape[1], dtype=w.dtype))))
        # Half of the digits: rounding stays far below it, and a basis of other origin far above.
        if error > float(jnp.finfo(w.dtype).eps) ** 0.5:
            raise ValueError(
                f"the columns of w0 are not orthonormal (W^T W differs from I by {error:.2g}): pass "
                "spectral.compare.orthonormal_basis(w0)"
            )


def _check_options(steps, retraction, metrics, at, *, learning_rate, tolerance):
    if operator.index(steps) < 0:
        raise ValueError(f"steps is {steps}: pass the number of updates, 0 or more")
    if retraction not in RETRACTIONS:
        raise ValueError(f"retraction is {retraction!r}: use one of {sorted(RETRACTIONS)}")
    if _concrete(learning_rate) and not 0 < learning_rate < np.inf:
        raise ValueError(f"learning_rate is {learning_rate}: pass a positive finite step length")
    if _concrete(tolerance) and not 0 <= tolerance < np.inf:
        raise ValueError(f"tolerance is {tolerance}: pass a finite norm of the gradient, 0 to use all steps")
    if (metrics is None) != (not at):
        raise ValueError("metrics and metric_steps go together: pass both or neither")
    if any(late <= early for early, late in pairwise(at)) or (at and not 0 <= at[0] <= at[-1] <= steps):
        raise ValueError(f"metric_steps {at} must increase and stay within 0..{steps}: correct them")


def _concrete(value):
    return not isinstance(value, jax.core.Tracer)
