r"""The kernel from Gram matrices of layer inputs and backpropagated signals, without a Jacobian.

For a linear layer y = s x W (s a constant such as 1/sqrt(fan_in)) the gradient of output o with respect to W is an outer
product of the layer's input h and the signal delta^o = d f_o / d y, so the layer's share of the kernel is

    K(x_i, x_j)[o, p] += s^2  sum_{a, b}  <h_ia, h_jb>  <delta^o_ia, delta^p_jb>,

where a and b run over the positions at which the layer is applied: one for a dense layer on vectors, the tokens of a
sequence, the pixels of a convolution (h is then the patch), and over the calls when one layer is used several times. The
cost per pair of points is z^2 M instead of z^2 M fan_in, and nothing of the size of the parameters is formed.

How the layers are found: `apply` runs once under flax's method interceptor. Each call of a dense or convolutional layer is
matched to the leaves of `params` by object identity, so any wrapper around a flax module works as long as it hands its
parameters through. A leaf that is also used anywhere else (tied weights, a penalty) is detected on the jaxpr and left to
the Jacobian; so are all other leaves (layer norms, embeddings) and every leaf of a function that is no flax module.

Source: derivation (outer-product form of a linear layer's gradient).
"""

import itertools
import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from theorykit import encoders


class Share(NamedTuple):
    """What one leaf of the parameters contributes, for a block of points.

    A kernel has inputs (n, P, f) and signals (z, n, P, u); a bias has no inputs and signals (z, n, u), already summed over
    positions. The layer's constant is folded into the signals.
    """

    inputs: jax.Array | None
    signals: jax.Array


class _Call(NamedTuple):
    """One use of a layer: the leaves it reads, how its inputs become rows (n, P, f), and the constants on W and b."""

    kernel: int
    bias: int | None
    rows: Callable[[jax.Array], jax.Array]
    scale: float
    bias_scale: float


def _dense_rows(x):
    return x.reshape(x.shape[0], -1, x.shape[-1])


def _patches(x, kernel_size, strides, padding, dilation=(1, 1)):
    """The convolution's inputs at every position: (n, positions, channels * height * width of the kernel)."""
    if padding == "CIRCULAR":
        pads = jax.lax.padtype_to_pads(x.shape[1:3], kernel_size, strides, "SAME")
        x, padding = jnp.pad(x, ((0, 0), *pads, (0, 0)), mode="wrap"), "VALID"
    patches = jax.lax.conv_general_dilated_patches(
        x,
        kernel_size,
        strides,
        padding,
        rhs_dilation=dilation,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision=jax.lax.Precision.HIGHEST,
    )
    return _dense_rows(patches)


def _layer(module, x):
    """(rows, scale, bias_scale) of a layer that the outer-product form covers, else None."""
    if isinstance(module, encoders.Dense):
        return _dense_rows, module.scale(x.shape[-1]), module.bias_scale
    if isinstance(module, encoders.Conv):
        geometry = {"kernel_size": module.kernel_size, "strides": module.strides, "padding": module.padding}
        fan_in = math.prod(module.kernel_size) * x.shape[-1]
        return partial(_patches, **geometry), module.scale(fan_in), module.bias_scale
    if isinstance(module, nn.Dense):
        return _dense_rows, 1.0, 1.0
    if isinstance(module, nn.Conv):
        geometry = _flax_geometry(module, x)
        return None if geometry is None else (partial(_patches, **geometry), 1.0, 1.0)
    return None


def _flax_geometry(module, x):
    """Keyword arguments of `_patches` for a plain two-dimensional flax convolution; None for all others."""

    def pair(value):
        return (1, 1) if value is None else (value, value) if isinstance(value, int) else tuple(value)

    plain = module.feature_group_count == 1 and module.mask is None and pair(module.input_dilation) == (1, 1)
    if not plain or x.ndim != 4 or module.padding not in ("SAME", "VALID", "CIRCULAR"):
        return None
    dilation = pair(module.kernel_dilation)
    if module.padding == "CIRCULAR" and dilation != (1, 1):
        return None
    return {
        "kernel_size": tuple(module.kernel_size),
        "strides": pair(module.strides),
        "padding": module.padding,
        "dilation": dilation,
    }


def _run(apply, params, x, on_call):
    """Run apply; on_call(ordinal, module, inputs, proceed) -> output stands in for every layer that `_layer` covers.

    jit is switched off while tracing: a jitted `apply` would otherwise be traced in its own scope (the taps would leak) or
    come out of jax's cache without calling the layers at all. The caller's own jit compiles the result as a whole.
    """
    ordinal = itertools.count()

    def interceptor(proceed, args, kwargs, context):
        candidate = context.method_name == "__call__" and len(args) == 1 and not kwargs and args[0].ndim >= 2
        if candidate and _layer(context.module, args[0]):
            return on_call(next(ordinal), context.module, args[0], lambda: proceed(*args))
        return proceed(*args, **kwargs)

    with jax.disable_jit(), nn.intercept_methods(interceptor):
        return apply(params, x)


def _probe(apply, params, x) -> dict[int, tuple[_Call, jax.ShapeDtypeStruct]]:
    """Ordinal -> the call and its output's shape, for the calls whose leading axis is the batch."""
    found = {}
    leaves, tree = jax.tree.flatten(params)

    def traced(leaves, x):
        index = {id(leaf): position for position, leaf in enumerate(leaves)}

        def on_call(ordinal, module, inputs, proceed):
            output = proceed()
            kernel = index.get(id(module.get_variable("params", "kernel")))
            if kernel is not None and inputs.shape[0] == x.shape[0]:
                bias = index.get(id(module.get_variable("params", "bias"))) if module.use_bias else None
                call = _Call(kernel, bias, *_layer(module, inputs))
                found[ordinal] = call, jax.ShapeDtypeStruct(output.shape, output.dtype)
            return output

        return _run(apply, jax.tree.unflatten(tree, leaves), x, on_call)

    jax.eval_shape(traced, leaves, x)
    return found


def _plan(apply, params, x):
    """The calls that can be tapped (ordinal -> call, output shape) and the leaves that they cover entirely."""
    found = _probe(apply, params, x)
    # An axis of another meaning may have the batch's length by accident; it does not grow with the batch.
    one_more = jax.ShapeDtypeStruct((x.shape[0] + 1, *x.shape[1:]), x.dtype)
    grows = _probe(apply, params, one_more)
    found = {ordinal: value for ordinal, value in found.items() if ordinal in grows}
    covered = {leaf for call, _ in found.values() for leaf in (call.kernel, call.bias) if leaf is not None}
    return found, covered - _read_beside(apply, params, x, found)


def _read_beside(apply, params, x, found) -> set[int]:
    """Leaves that the computation still reads when every tapped call is replaced by a free variable."""
    leaves, tree = jax.tree.flatten(params)

    def cut(leaves, x, free):
        inputs_seen = []

        def on_call(ordinal, module, inputs, proceed):
            if ordinal not in found:
                return proceed()
            inputs_seen.append(inputs)
            return free[ordinal]

        return _run(apply, jax.tree.unflatten(tree, leaves), x, on_call), inputs_seen

    jaxpr = jax.make_jaxpr(cut)(leaves, x, {ordinal: shape for ordinal, (_, shape) in found.items()}).jaxpr
    read = {id(v) for equation in jaxpr.eqns for v in equation.invars} | {id(v) for v in jaxpr.outvars}
    return {i for i, variable in enumerate(jaxpr.invars[: len(leaves)]) if id(variable) in read}


def shares(apply, params, x) -> dict[int, Share]:
    """Each covered leaf's share for the points x, keyed by the leaf's position in jax.tree.leaves(params).

    jit-compatible. `apply` must treat the rows of x independently (no batch statistics).
    """
    try:
        found, covered = _plan(apply, params, x)
    except jax.errors.UnexpectedTracerError:
        # A transformation inside apply (remat, scan over layers) hides the layers: all leaves go to the Jacobian.
        return {}
    if not covered:
        return {}

    def tapped(perturbations):
        inputs_seen = {}

        def on_call(ordinal, _, inputs, proceed):
            if ordinal not in found:
                return proceed()
            inputs_seen[ordinal] = inputs
            return proceed() + perturbations[ordinal]

        return _run(apply, params, x, on_call), inputs_seen

    zeros = {ordinal: jnp.zeros(shape.shape, shape.dtype) for ordinal, (_, shape) in found.items()}
    out, pullback, inputs_seen = jax.vjp(tapped, zeros, has_aux=True)
    z = out.shape[-1]
    # Rows are independent, so one pullback of e_o on every row gives delta^o of every row.
    cotangents = jnp.broadcast_to(jnp.eye(z, dtype=out.dtype)[:, None], (z, *out.shape))
    (signals,) = jax.vmap(pullback)(cotangents)
    calls = {ordinal: call for ordinal, (call, _) in found.items()}
    return _collect(calls, covered, inputs_seen, signals)


def _collect(calls, covered, inputs_seen, signals) -> dict[int, Share]:
    """Join the calls of each leaf along the positions."""
    rows, deltas, biases = {}, {}, {}
    for ordinal, call in calls.items():
        delta = signals[ordinal]
        delta = delta.reshape(*delta.shape[:2], -1, delta.shape[-1])
        if call.kernel in covered:
            rows.setdefault(call.kernel, []).append(call.rows(inputs_seen[ordinal]))
            deltas.setdefault(call.kernel, []).append(delta * call.scale)
        if call.bias in covered:
            biases.setdefault(call.bias, []).append(jnp.sum(delta, axis=2) * call.bias_scale)
    kernels = {i: Share(jnp.concatenate(rows[i], 1), jnp.concatenate(deltas[i], 2)) for i in rows}
    return kernels | {i: Share(None, sum(parts)) for i, parts in biases.items()}


def contract(left: dict[int, Share], right: dict[int, Share]) -> jax.Array:
    """The sum over leaves of the Gram products, shape (z, n1, z, n2): outputs first, as the matrix products leave it."""
    total = None
    for leaf, share in left.items():
        part = _bias_part(share, right[leaf]) if share.inputs is None else _kernel_part(share, right[leaf])
        total = part if total is None else total + part
    return total


def _gram(a, b):
    """(z, n1, m), (z, n2, m) -> (z, n1, z, n2) as one matrix product."""
    (z, n1, m), n2 = a.shape, b.shape[1]
    return jnp.matmul(a.reshape(z * n1, m), b.reshape(z * n2, m).T, precision="highest").reshape(z, n1, z, n2)


def _bias_part(left, right):
    return _gram(left.signals, right.signals)


def _kernel_part(left, right):
    (n1, positions1, fan_in), (n2, positions2, _) = left.inputs.shape, right.inputs.shape
    z, units = left.signals.shape[0], left.signals.shape[-1]
    if positions1 == positions2 == 1:
        inputs = jnp.matmul(left.inputs[:, 0], right.inputs[:, 0].T, precision="highest")
        return _gram(left.signals[:, :, 0], right.signals[:, :, 0]) * inputs[None, :, None, :]
    # Two orders of summation, equal in exact arithmetic: Gram matrices over pairs of positions, or this layer's own
    # gradient summed over positions first. The cheaper one is known from the shapes.
    by_gram = n1 * n2 * positions1 * positions2 * (fan_in + z * z * (units + 1))
    by_gradient = fan_in * units * z * (n1 * positions1 + n2 * positions2 + n1 * n2 * z)
    if by_gram < by_gradient:
        inputs = jnp.einsum("iaf,jbf->iajb", left.inputs, right.inputs, precision="highest")
        signals = jnp.einsum("oiau,pjbu->oiapjb", left.signals, right.signals, precision="highest")
        return jnp.einsum("iajb,oiapjb->oipj", inputs, signals, precision="highest")
    gradients = [
        jnp.einsum("iaf,oiau->oifu", s.inputs, s.signals, precision="highest").reshape(z, -1, fan_in * units)
        for s in (left, right)
    ]
    return _gram(*gradients)
