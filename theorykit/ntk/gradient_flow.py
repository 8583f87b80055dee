"""Gradient flow in function space: what training does when the kernel stays where it was at initialisation.

Let f(X) in R^(n x z) be the embeddings of n points and K the neural tangent kernel,
K[i, j, o, p] = <d f_o(x_i)/d theta, d f_p(x_j)/d theta>. Gradient flow d theta/dt = -grad_theta L(f(X)) moves the
embeddings by

    d f_o(x_i)/dt = - sum_{j, p} K[i, j, o, p] dL/df_p(x_j),

and any other point the same way, through its cross kernel with the training points. With K held fixed this is a closed,
in general nonlinear, differential equation in the embeddings. Gradient descent with learning rate eta has reached the
time t = eta s after s steps. `flow` takes two views, `flow_stacked` one stacked set of points (three views, say).

Solver. Tsit5 (explicit, order 5) with an adaptive step. Stability lets an explicit method take about lambda T / 3
steps, lambda being the largest eigenvalue of K Hess L along the path. Gradient descent needs eta lambda < 2 for the
same reason, so a flow that predicts S of its stable steps costs at most about 2 S / 3 steps of the solver: where the
flow is stiff, training has paid for it already. Measured on InfoNCE (dot product, temperature 1, n z = 256, lambda T
= 400): Tsit5 needs 190 steps at rtol 1.5e-8; Dopri8 halves the steps and doubles their price; the implicit Kvaerno5
takes over 1000 times as long. Stiffness without bound occurs where an embedding shrinks to zero under cosine
similarity: the curvature grows like 1/|f|^2. There the flow itself ends, |f| reaching 0 at a finite time, and the
implicit solver got less than 1% further. Hence there is no choice of solver; the status and `last_time` say where the
solve stopped.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from theorykit.ntk._finite import all_finite

Values = Float[Array, "..."] | Float[np.ndarray, "..."]  # shapes are checked by hand, with messages that help

FINISHED = 0
MAX_STEPS = 1
DIVERGED = 2
SINGULAR = 3

# Stable gradient descent of S steps costs at most about 2 S / 3 solver steps (see above): enough for S = 20,000.
_DEFAULT_MAX_STEPS = 2**14

# Tells apart the two reasons for which a step becomes too short. A blow-up of f' = f^p has by then grown by about
# eps^(-1/(p - 1)): tenfold for p up to about 5 in float32 and 14 in float64.
_GROWN = 10.0


class Flow(NamedTuple):
    """Embeddings of two views along the function-space gradient flow.

    Attributes
    ----------
    times : (t,) the times asked for.
    fa, fb : (t, n, z) embeddings of the two views; NaN at times that were not reached.
    heldout : (t, m, z) embeddings of the held-out points, or None; NaN at times that were not reached.
    status : () integer, one of FINISHED, MAX_STEPS, DIVERGED, SINGULAR of this module. Only FINISHED means that every
        time was reached. DIVERGED: the step fell below the resolution of time after the embeddings had grown tenfold
        (root mean square), as in a blow-up in finite time or an overflow. SINGULAR: it did so without such growth,
        where the gradient of the loss is not smooth or not finite.
    last_time : () the last time that the solver reached; all requested times up to it have values.
    rtol, atol : () tolerances of the local error: its root mean square, entry by entry in units of atol + rtol |f|, is
        at most 1 in every accepted step, for the views and for the held-out points.
    accepted, rejected : () numbers of solver steps.
    """

    times: Float[Array, " t"]
    fa: Float[Array, "t n z"]
    fb: Float[Array, "t n z"]
    heldout: Float[Array, "t m z"] | None
    status: Int[Array, ""]
    last_time: Float[Array, ""]
    rtol: Float[Array, ""]
    atol: Float[Array, ""]
    accepted: Int[Array, ""]
    rejected: Int[Array, ""]

    def describe(self) -> str:
        """Say in words how the solve ended, how far it came and at which tolerance."""
        return _describe(self)


class StackedFlow(NamedTuple):
    """Embeddings of one set of points along the flow: `Flow` with one array f, (t, n, z), in place of fa and fb."""

    times: Float[Array, " t"]
    f: Float[Array, "t n z"]
    heldout: Float[Array, "t m z"] | None
    status: Int[Array, ""]
    last_time: Float[Array, ""]
    rtol: Float[Array, ""]
    atol: Float[Array, ""]
    accepted: Int[Array, ""]
    rejected: Int[Array, ""]

    def describe(self) -> str:
        """Say in words how the solve ended, how far it came and at which tolerance."""
        return _describe(self)


def flow(
    kernel: tuple[Values, Values, Values],
    loss: Callable,
    embeddings: tuple[Values, Values],
    times: Values,
    *,
    cross: tuple[Values, Values] | None = None,
    heldout0: Values | None = None,
    rtol: float | Float[Array, ""] | None = None,
    atol: float | Float[Array, ""] | None = None,
    max_steps: int = _DEFAULT_MAX_STEPS,
) -> Flow:
    """Solve the gradient flow of a loss of two views at a fixed kernel.

    With g_a = dL/dfa and g_b = dL/dfb,

        dfa/dt = -(K_aa g_a + K_ab g_b),   dfb/dt = -(K_ab^T g_a + K_bb g_b),   dfh/dt = -(K_ha g_a + K_hb g_b).

    Works under `jax.jit`, where shapes are still checked and values are not. The compiled solver is kept for each
    (loss, shapes, dtype, max_steps), so pass the same function object again, not a new lambda.

    Parameters
    ----------
    kernel : (aa, ab, bb), each (n, n, z, z), or (n, n) meaning that kernel times the identity of the outputs. ab has
        the points of view a in its rows. A full block is copied once into a matrix of the same size.
    loss : maps (fa, fb), both (n, z), to a scalar: the loss as it is trained, a mean if training takes the mean.
    embeddings : (fa0, fb0), both (n, z), at time 0.
    times : (t,) increasing, from any time >= 0 on; learning rate times steps. At 0 the initial values return exactly.
        The solver restarts at each time, which costs about four steps: ask for those that are needed.
    cross : (ha, hb), each (m, n, z, z) or (m, n): the kernel between m held-out points and the two views.
    heldout0 : (m, z) embeddings of the held-out points at time 0. They are carried along and do not act back; their
        error is controlled too, so they can shorten the steps.
    rtol : relative tolerance of a step; default eps^(2/3), 3.7e-11 in float64 and 2.4e-5 in float32. The estimate of
        the error is a difference of rounded numbers, with relative noise of about eps/rtol: 0.5% in float32 then.
    atol : absolute tolerance of a step; default rtol times the root mean square of the initial embeddings (times 1 if
        these are 0), so that the solve does not depend on their unit.
    max_steps : solver steps, accepted or not, from one time to the next, after which the solve stops with status
        MAX_STEPS.

    Returns
    -------
    Flow, with a status: times that were not reached hold NaN, never an extrapolation.

    Raises
    ------
    ValueError : shapes that do not match, views of different length, values that are not finite, times that do not
        increase, a diagonal block that is not symmetric, cross without heldout0 or the reverse.
    TypeError : mixed or unsupported dtypes, a loss that cannot be called or hashed.

    Source: Jacot, Gabriel and Hongler 2018 (arXiv 1806.07572), section 4, for the flow at a fixed kernel; the form for
    two views follows by stacking them.
    """
    return Flow(*_flow(kernel, loss, embeddings, times, cross, heldout0, rtol, atol, max_steps))


def flow_stacked(
    kernel: Values,
    loss: Callable,
    embeddings: Values,
    times: Values,
    *,
    cross: Values | None = None,
    heldout0: Values | None = None,
    rtol: float | Float[Array, ""] | None = None,
    atol: float | Float[Array, ""] | None = None,
    max_steps: int = _DEFAULT_MAX_STEPS,
) -> StackedFlow:
    """Solve the gradient flow df/dt = -K grad L(f) of a loss of one stacked set of points.

    For losses of more than two views: stack them (anchor, positive, negative) along the points; the loss splits them.
    As `flow`, with kernel (n, n, z, z) or (n, n), loss a function of f (n, z), embeddings (n, z) and cross (m, n, z, z)
    or (m, n). Returns StackedFlow. Raises as `flow`. Source: as `flow`.
    """
    cross = None if cross is None else (cross,)
    return StackedFlow(*_flow((kernel,), loss, (embeddings,), times, cross, heldout0, rtol, atol, max_steps))


def _flow(blocks, loss, views, times, cross, heldout0, rtol, atol, max_steps):
    blocks, views, times = jax.tree.map(jnp.asarray, (blocks, views, times))
    if (cross is None) != (heldout0 is None):
        missing = "cross" if cross is None else "heldout0"
        raise ValueError(
            f"held-out points need both cross and heldout0, but {missing} is missing: pass both or neither"
        )
    if cross is not None:
        cross, heldout0 = jax.tree.map(jnp.asarray, (cross, heldout0))
    check_problem(blocks, loss, views, times, cross, heldout0, max_steps)
    dtype = views[0].dtype
    if rtol is None:
        rtol = float(jnp.finfo(dtype).eps) ** (2 / 3)
    for name, value in (("rtol", rtol), ("atol", atol)):
        if value is not None and not isinstance(value, jax.core.Tracer) and not 0 < value < np.inf:
            raise ValueError(f"{name} is {value}: pass a positive finite tolerance, or None for the default")
    rtol = jnp.asarray(rtol, dtype)
    scale = jnp.sqrt(sum(jnp.mean(f**2) for f in views) / len(views))
    scale = jnp.where(scale > 0, scale, jnp.ones_like(scale))
    atol = rtol * scale if atol is None else jnp.asarray(atol, dtype)
    times = times.astype(dtype)
    return _solve(blocks, cross, views, heldout0, times, rtol, atol, scale, loss=loss, max_steps=max_steps)


@functools.partial(jax.jit, static_argnames=("loss", "max_steps"))
def _solve(blocks, cross, views, heldout0, times, rtol, atol, scale, *, loss, max_steps):
    """Integrate k views whose kernel is given by the k (k + 1) / 2 blocks of its upper triangle, row by row."""
    value = jax.eval_shape(loss, *views)
    if getattr(value, "shape", None) != ():
        raise ValueError(f"the loss must return a scalar, got {value}: take the mean over the batch")
    k = len(views)
    pairs = [(r, s) for r in range(k) for s in range(r, k)]
    upper = dict(zip(pairs, blocks, strict=True))
    gradient = jax.grad(loss, argnums=tuple(range(k)))

    def velocity(_, state, args):
        upper, cross = args
        g = gradient(*state[0])
        rows = ([upper[r, s] if r <= s else upper[s, r].T for s in range(k)] for r in range(k))
        moved = tuple(-sum(map(_product, row, g)) for row in rows)
        return moved, None if cross is None else -sum(map(_product, cross, g))

    upper, cross = jax.tree.map(kernel_matrix, (upper, cross))

    # Solving from one requested time to the next makes each of them the end of a controlled step, and needs neither the
    # interpolation nor the host callback of diffrax's SaveAt(ts=...), so the flow lowers for any platform.
    def advance(carry, end):
        time, state, status, accepted, rejected = carry
        running = status == FINISHED
        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(velocity),
            diffrax.Tsit5(),
            t0=time,
            t1=jnp.where(running, end, time),
            dt0=None,
            y0=state,
            args=(upper, cross),
            saveat=diffrax.SaveAt(t1=True),
            stepsize_controller=_ResolvedSteps(rtol=rtol, atol=atol, norm=_worst_rms),
            max_steps=max_steps,
            throw=False,
        )
        time, state = jax.tree.map(lambda saved: saved[0], (solution.ts, solution.ys))
        bounded = jnp.sqrt(sum(jnp.mean(f**2) for f in state[0]) / k) < _GROWN * scale
        short = jnp.where(bounded, SINGULAR, DIVERGED)
        ended = jnp.where(solution.result == diffrax.RESULTS.max_steps_reached, MAX_STEPS, short)
        ended = jnp.where(solution.result == diffrax.RESULTS.successful, FINISHED, ended)
        status = jnp.where(running, ended, status).astype(jnp.int32)
        values = jax.tree.map(lambda f: jnp.where(status == FINISHED, f, jnp.full_like(f, jnp.nan)), state)
        accepted += solution.stats["num_accepted_steps"].astype(jnp.int32)
        rejected += solution.stats["num_rejected_steps"].astype(jnp.int32)
        return (time, state, status, accepted, rejected), values

    zero = jnp.zeros((), jnp.int32)
    start = (jnp.zeros((), times.dtype), (views, heldout0), zero + FINISHED, zero, zero)
    (last_time, _, status, accepted, rejected), (fs, heldout) = jax.lax.scan(advance, start, times)
    return times, *fs, heldout, status, last_time, rtol, atol, accepted, rejected


def kernel_matrix(block):
    """Lay a full kernel out as a matrix of (point, output) pairs: its product is then a plain, fast one."""
    if block.ndim == 2:
        return block
    n, m, z, _ = block.shape
    return block.transpose(0, 2, 1, 3).reshape(n * z, m * z)


def _product(matrix, g):
    """Apply a kernel, as kernel_matrix returns it, to g (m, z)."""
    if matrix.shape[1] == g.shape[0]:  # one number for each pair of points; with z = 1 the two layouts coincide
        return jnp.matmul(matrix, g, precision="highest")
    return jnp.matmul(matrix, g.reshape(-1), precision="highest").reshape(-1, g.shape[1])


class _ResolvedSteps(diffrax.PIDController):
    """A PID controller that ends the solve once time cannot resolve the step.

    The `dtmin` of diffrax is not used: a step of just that length is accepted whatever its error.
    """

    def adapt_step_size(self, *args):
        *decision, result = super().adapt_step_size(*args)
        keep, start, end = decision[:3]
        # A rejected step becomes at least a tenth shorter; below 5 units in the last place rounding can undo that.
        too_short = ~keep & (end - start <= 8 * jnp.finfo(start.dtype).eps * start)
        return *decision, diffrax.RESULTS.where(too_short, diffrax.RESULTS.dt_min_reached, result)


def _worst_rms(scaled):
    """Norm of the error: the views and the held-out points each keep the tolerance, however many there are."""
    views, heldout = scaled
    parts = [sum(jnp.mean(f**2) for f in views) / len(views)]
    if heldout is not None and heldout.size:
        parts.append(jnp.mean(heldout**2))
    worst = jnp.sqrt(functools.reduce(jnp.maximum, parts))
    # An overflow gives infinity over infinity. NaN would pass into the step size, and the solve would never end.
    return jnp.where(jnp.isnan(worst), jnp.inf, worst)


def _describe(path):
    status = int(path.status)
    work = (
        f"{int(path.accepted)} steps accepted and {int(path.rejected)} rejected at rtol {float(path.rtol):.2g}, "
        f"atol {float(path.atol):.2g}"
    )
    where = f"at t = {float(path.last_time):g} of {float(path.times[-1]):g}"
    ends = {
        FINISHED: f"finished at t = {float(path.times[-1]):g}",
        MAX_STEPS: f"stopped {where}: max_steps used up. Raise max_steps or shorten times; if that hardly moves the "
        "end, the flow is singular there (under cosine similarity: an embedding that shrinks to zero)",
        DIVERGED: f"diverged {where}: the embeddings grew more than tenfold and no step is short enough to follow. Is "
        "the loss bounded below?",
        SINGULAR: f"singular {where}: the embeddings stayed bounded, but the gradient of the loss is not smooth or not "
        "finite there",
    }
    return f"{ends[status]}; {work}"


def relative_rounding(dtype):
    """Relative rounding granted to a kernel: a sum over P parameters errs by sqrt(P) eps, sqrt(eps) up to P = 1/eps."""
    return float(jnp.finfo(dtype).eps) ** 0.5


@jax.jit
def _asymmetry(kernel):
    transposed = kernel.transpose((1, 0) if kernel.ndim == 2 else (1, 0, 3, 2))
    return jnp.max(jnp.abs(kernel - transposed)), jnp.max(jnp.abs(kernel))


def _check_kernel(name, block, rows, columns, z, symmetric):
    if block.shape not in ((rows, columns), (rows, columns, z, z)):
        raise ValueError(
            f"{name} has shape {block.shape}, but the embeddings ask for ({rows}, {columns}, {z}, {z}), or "
            f"({rows}, {columns}) for that kernel times the identity: compute it on the same points and outputs"
        )
    if symmetric and block.size and not isinstance(block, jax.core.Tracer):
        with jax.ensure_compile_time_eval():  # a constant, though a caller may be traced
            gap, size = (float(x) for x in _asymmetry(block))
        if gap > relative_rounding(block.dtype) * size:
            raise ValueError(
                f"{name} is not symmetric (K[i, j, o, p] and K[j, i, p, o] differ by {gap:.2g}, largest entry "
                f"{size:.2g}): check the order of its axes, or symmetrise it if only rounding is the cause"
            )


def check_problem(blocks, loss, views, times, cross, heldout0, max_steps):
    """Raise for whatever cannot be solved: shapes and dtypes always, values where they are known (not under jit)."""
    if not callable(loss) or getattr(loss, "__hash__", None) is None:
        raise TypeError(f"the loss must be a hashable function, got {type(loss).__name__}: wrap it in a function")
    if max_steps < 1:
        raise ValueError(f"max_steps is {max_steps}: allow at least one step")
    names = ("kernel aa", "kernel ab", "kernel bb") if len(views) == 2 else ("kernel",)
    arrays = dict(zip(names, blocks, strict=True))
    arrays |= dict(zip(("fa0", "fb0") if len(views) == 2 else ("embeddings",), views, strict=True))
    if cross is not None:
        arrays |= {f"cross {name}": c for name, c in zip(("ha", "hb"), cross, strict=False)} | {"heldout0": heldout0}
    dtypes = {name: array.dtype for name, array in arrays.items()}
    if len(set(dtypes.values())) > 1 or next(iter(dtypes.values())) not in (jnp.float32, jnp.float64):
        listed = ", ".join(f"{name} {dtype}" for name, dtype in dtypes.items())
        raise TypeError(f"the flow needs one dtype, float32 or float64, but got {listed}: cast with astype")
    for name, array in (arrays | {"times": times}).items():
        if not isinstance(array, jax.core.Tracer) and not all_finite(array):
            raise ValueError(f"{name} holds NaN or infinity: find out where it arises before starting the flow")
    if any(f.ndim != 2 or not f.size for f in views) or len({f.shape for f in views}) > 1:
        shapes = " and ".join(str(f.shape) for f in views)
        raise ValueError(f"embeddings have shapes {shapes}, but each must be the same (n, z) with one row per pair")
    n, z = views[0].shape
    for name, block in zip(names, blocks, strict=True):
        _check_kernel(name, block, n, n, z, symmetric=name != "kernel ab")
    if cross is not None:
        if heldout0.ndim != 2 or heldout0.shape[1] != z:
            raise ValueError(f"heldout0 has shape {heldout0.shape}, but must be (m, {z}) like the training embeddings")
        for name, block in zip(("cross ha", "cross hb"), cross, strict=False):
            _check_kernel(name, block, heldout0.shape[0], n, z, symmetric=False)
    if times.ndim != 1 or not times.size:
        raise ValueError(f"times has shape {times.shape}: pass a list of times, (t,), with at least one")
    if not isinstance(times, jax.core.Tracer):
        clock = np.asarray(times)
        if clock[0] < 0 or np.any(np.diff(clock) <= 0):
            raise ValueError("times must be >= 0 and increase strictly: sort them and drop repeats")
