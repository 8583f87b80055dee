r"""The kernel from Gram matrices of layer inputs and backpropagated signals, without a Jacobian.

For a linear layer y = s x W (s a constant such as 1/sqrt(fan_in)) the gradient of output o with respect to W is an
outer product of the layer's input h and the signal delta^o = d f_o / d y, so the layer's share of the kernel is

    K(x_i, x_j)[o, p] += s^2  sum_{a, b}  <h_ia, h_jb>  <delta^o_ia, delta^p_jb>,

where a and b run over the positions at which the layer is applied: one for a dense layer on vectors, the tokens of a
sequence, the pixels of a convolution (h is then the patch), and over the calls when one layer is used several times.
The cost per pair of points is z^2 M instead of z^2 M fan_in, and nothing of the size of the parameters is formed. With
many positions the layer's own gradient, summed over them first, is cheaper: then that is what is kept (`_summed`).

How the layers are found: `apply` runs on a single point under flax's method interceptor, so every leading axis of a
layer's input counts positions; points are then batched by `jax.vmap`. Each call of a dense or convolutional layer is
matched to the leaves of `params` by object identity, so any wrapper around a flax module works as long as it hands its
parameters through. A leaf that is also used anywhere else (tied weights, a penalty, a layer inside remat, vmap or grad)
is detected on the jaxpr and left to the Jacobian; so are all other leaves (layer norms, embeddings), layers that only
look like a plain dense or convolutional one, and every leaf of a function that is no flax module.

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
from flax.linen.linear import canonicalize_padding
from jax.extend.core import get_opaque_trace_state

from theorykit import encoders
from theorykit.ntk import jacobian


class Share(NamedTuple):
    """What one leaf of the parameters contributes, for a block of points.

    A kernel has inputs (n, P, f) and signals (z, n, P, u), or, where `_summed` finds it cheaper, no inputs and its own
    gradient (z, n, f u). A bias has no inputs and signals (z, n, u) summed over positions. The layer's constant is
    folded into the signals.
    """

    inputs: jax.Array | None
    signals: jax.Array


class _Call(NamedTuple):
    """One use of a layer: its leaves, how its input becomes rows (P, f), the constants on W and b, and its output."""

    kernel: int
    bias: int | None
    rows: Callable[[jax.Array], jax.Array]
    scale: float
    bias_scale: float
    output: jax.ShapeDtypeStruct


def _dense_rows(x):
    return x.reshape(-1, x.shape[-1])


def _patches(x, kernel_size, strides, padding, wrap=None, dilation=None, input_dilation=None):
    """A convolution's inputs at every position: (positions, channels * kernel size); wrap is a mode of jnp.pad."""
    rank = len(kernel_size)
    x = x.reshape(-1, *x.shape[-rank - 1 :])
    if wrap is not None:
        x, padding = jnp.pad(x, ((0, 0), *padding, (0, 0)), mode=wrap), "VALID"
    spatial = tuple(range(1, rank + 1))
    numbers = jax.lax.ConvDimensionNumbers(
        (0, rank + 1, *spatial), (rank + 1, rank, *range(rank)), (0, rank + 1, *spatial)
    )
    patches = jax.lax.conv_general_dilated_patches(
        x,
        kernel_size,
        strides,
        padding,
        lhs_dilation=input_dilation,
        rhs_dilation=dilation,
        dimension_numbers=numbers,
        precision=jax.lax.Precision.HIGHEST,
    )
    return _dense_rows(patches)


def _layer(module, x):
    """(rows, scale, bias_scale) of a layer that the outer-product form covers, else None.

    Exact types: a subclass may compute something else from the same parameters.
    """
    kind = type(module)
    if kind is encoders.Dense:
        return _dense_rows, module.scale(x.shape[-1]), module.bias_scale
    if kind is encoders.Conv:
        padding, wrap = module.padding, None
        if padding == "CIRCULAR":
            padding, wrap = jax.lax.padtype_to_pads(x.shape[-3:-1], module.kernel_size, module.strides, "SAME"), "wrap"
        rows = partial(_patches, kernel_size=module.kernel_size, strides=module.strides, padding=padding, wrap=wrap)
        return rows, module.scale(math.prod(module.kernel_size) * x.shape[-1]), module.bias_scale
    if kind is nn.Dense and _unchanged(module, "dot_general", "dot_general_cls", "promote_dtype"):
        return _dense_rows, 1.0, 1.0
    if kind is nn.Conv and module.feature_group_count == 1:
        plain = _unchanged(module, "mask", "conv_general_dilated", "conv_general_dilated_cls", "promote_dtype")
        return (_flax_patches(module), 1.0, 1.0) if plain else None
    return None


def _unchanged(module, *names):
    """Whether these attributes, which replace parts of the layer's arithmetic, have their defaults."""
    return all(getattr(module, name) is getattr(type(module), name) for name in names)


def _flax_patches(module):
    """`_patches` with the geometry of a flax convolution of any rank."""
    size = (module.kernel_size,) if isinstance(module.kernel_size, int) else tuple(module.kernel_size)

    def each(value):
        value = 1 if value is None else value
        return (value,) * len(size) if isinstance(value, int) else tuple(value)

    dilation = each(module.kernel_dilation)
    padding, wrap = canonicalize_padding(module.padding, len(size)), None
    if padding in ("CIRCULAR", "REFLECT"):
        wrap = {"CIRCULAR": "wrap", "REFLECT": "reflect"}[padding]
        spans = [(k - 1) * d + 1 for k, d in zip(size, dilation, strict=True)]
        padding = tuple(((span - 1) // 2, span // 2) for span in spans)
    elif padding == "CAUSAL":  # one spatial axis only, as flax checks
        padding = ((dilation[0] * (size[0] - 1), 0),)
    return partial(
        _patches,
        kernel_size=size,
        strides=each(module.strides),
        padding=padding,
        wrap=wrap,
        dilation=dilation,
        input_dilation=each(module.input_dilation),
    )


def _run(apply, params, point, on_call):
    """Run apply on one point; on_call(ordinal, module, input, proceed) -> output stands in for every layer of `_layer`.

    jit is switched off while tracing: a jitted `apply` would otherwise be traced in its own scope or come out of jax's
    cache without calling the layers at all. The caller's own jit compiles the result as a whole. (Scans are unrolled by
    that: long ones are better served by the Jacobian.) Layers in the scope of another transformation (remat, vmap,
    grad, cond) run as they are: what enters them cannot be carried out of it.
    """
    ordinal = itertools.count()
    outside = get_opaque_trace_state()

    def interceptor(proceed, args, kwargs, context):
        reachable = context.method_name == "__call__" and len(args) == 1 and not kwargs
        # Another interceptor between this one and the layer could change what the layer computes.
        reachable = reachable and proceed is context.orig_method and get_opaque_trace_state() == outside
        if reachable and isinstance(args[0], jax.Array) and _layer(context.module, args[0]):
            return on_call(next(ordinal), context.module, args[0], lambda: proceed(*args))
        return proceed(*args, **kwargs)

    with jax.disable_jit(), nn.intercept_methods(interceptor):
        return apply(params, point[None])


def _probe(apply, params, point) -> dict[int, _Call]:
    """Ordinal -> the call, for the layers whose kernel is a leaf of the parameters."""
    found = {}
    leaves, tree = jax.tree.flatten(params)

    def traced(leaves, point):
        index = {id(leaf): position for position, leaf in enumerate(leaves)}

        def on_call(ordinal, module, inputs, proceed):
            output = proceed()
            weights = module.get_variable("params", "kernel")
            bias = index.get(id(module.get_variable("params", "bias"))) if module.use_bias else None
            # A layer that computes in another dtype rounds its input and its kernel first.
            if id(weights) in index and inputs.dtype == weights.dtype == output.dtype:
                shape = jax.ShapeDtypeStruct(output.shape, output.dtype)
                found[ordinal] = _Call(index[id(weights)], bias, *_layer(module, inputs), shape)
            return output

        return _run(apply, jax.tree.unflatten(tree, leaves), point, on_call)

    jax.eval_shape(traced, leaves, point)
    return found


def _read_beside(apply, params, point, calls) -> set[int]:
    """Leaves that the computation still reads when every tapped call is replaced by a free variable."""
    leaves, tree = jax.tree.flatten(params)

    def cut(leaves, point, free):
        inputs_seen = []

        def on_call(ordinal, module, inputs, proceed):
            if ordinal not in calls:
                return proceed()
            inputs_seen.append(inputs)
            return free[ordinal]

        return _run(apply, jax.tree.unflatten(tree, leaves), point, on_call), inputs_seen

    jaxpr = jax.make_jaxpr(cut)(leaves, point, {ordinal: call.output for ordinal, call in calls.items()}).jaxpr
    read = {id(v) for equation in jaxpr.eqns for v in equation.invars} | {id(v) for v in jaxpr.outvars}
    return {i for i, variable in enumerate(jaxpr.invars[: len(leaves)]) if id(variable) in read}


def shares(apply, params, x) -> dict[int, Share]:
    """Each covered leaf's share for the points x, keyed by the leaf's position in jax.tree.leaves(params).

    jit-compatible. `apply` must treat the rows of x independently (no batch statistics).
    """
    return {leaf: _summed(share) for leaf, share in _by_position(apply, params, x).items()}


def cost(apply, params, x) -> tuple[set[int], int, int]:
    """The covered leaves, and the bytes that a point and a pair of points need in `shares` and `contract`.

    From shapes alone; x is a single point, (1, ...).
    """
    by_position = jax.eval_shape(partial(_by_position, apply), params, x)
    kept = jax.eval_shape(partial(shares, apply), params, x)
    # While the shares are made both forms are there, or a copy of the signals before the constants are folded in.
    point = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves((by_position, kept)))
    pairs = [
        share.inputs.shape[1] ** 2 * (1 + share.signals.shape[0] ** 2) * share.signals.dtype.itemsize
        for share in kept.values()
        if share.inputs is not None and share.inputs.shape[1] > 1
    ]
    return set(kept), point, max(pairs, default=0)


def _by_position(apply, params, x) -> dict[int, Share]:
    """The shares before any sum over the positions of a kernel."""
    point = jax.ShapeDtypeStruct(x.shape[1:], x.dtype)
    calls = _probe(apply, params, point)
    covered = {leaf for call in calls.values() for leaf in (call.kernel, call.bias) if leaf is not None}
    covered -= _read_beside(apply, params, point, calls)
    if not covered:
        return {}

    def single(point):
        def tapped(perturbations):
            inputs_seen = {}

            def on_call(ordinal, _, inputs, proceed):
                if ordinal not in calls:
                    return proceed()
                inputs_seen[ordinal] = inputs
                return proceed() + perturbations[ordinal]

            return _run(apply, params, point, on_call), inputs_seen

        zeros = {ordinal: jnp.zeros(call.output.shape, call.output.dtype) for ordinal, call in calls.items()}
        out, pullback, inputs_seen = jax.vjp(tapped, zeros, has_aux=True)
        (signals,) = jax.vmap(pullback)(jnp.eye(out.shape[-1], dtype=out.dtype)[:, None])
        return _collect(calls, covered, inputs_seen, signals)

    inputs, signals = jax.vmap(single, out_axes=(0, 1))(x)
    return {leaf: Share(inputs.get(leaf), signals[leaf]) for leaf in signals}


def _collect(calls, covered, inputs_seen, signals):
    """Join the calls of each leaf along the positions: leaf -> inputs (P, f), leaf -> signals (z, P, u) or (z, u)."""
    rows, deltas, biases = {}, {}, {}
    for ordinal, call in calls.items():
        delta = signals[ordinal]
        delta = delta.reshape(delta.shape[0], -1, delta.shape[-1])
        if call.kernel in covered:
            rows.setdefault(call.kernel, []).append(call.rows(inputs_seen[ordinal]))
            deltas.setdefault(call.kernel, []).append(delta * call.scale)
        if call.bias in covered:
            biases.setdefault(call.bias, []).append(jnp.sum(delta, axis=1) * call.bias_scale)
    inputs = {leaf: jnp.concatenate(parts) for leaf, parts in rows.items()}
    kernels = {leaf: jnp.concatenate(parts, 1) for leaf, parts in deltas.items()}
    return inputs, kernels | {leaf: sum(parts[1:], parts[0]) for leaf, parts in biases.items()}


def _summed(share: Share) -> Share:
    """The share with its sum over positions done, where that is the cheaper order of the two.

    A pair of points costs P^2 (f + z^2 (u + 1)) by Gram matrices over pairs of positions, z^2 f u by gradients.
    """
    if share.inputs is None or share.inputs.shape[1] == 1:
        return share
    (z, n, positions, units), fan_in = share.signals.shape, share.inputs.shape[-1]
    if positions**2 * (fan_in + z**2 * (units + 1)) < z**2 * fan_in * units:
        return share
    gradient = jnp.einsum("iaf,oiau->oifu", share.inputs, share.signals, precision="highest")
    return Share(None, gradient.reshape(z, n, fan_in * units))


def contract(left: dict[int, Share], right: dict[int, Share]) -> jax.Array:
    """The sum over leaves of the Gram products, (z, n1, z, n2): outputs first, as the matrix products leave it."""
    parts = [_product(share, right[leaf]) for leaf, share in left.items()]
    return sum(parts[1:], parts[0])


def _product(left, right):
    if left.inputs is None:
        return jacobian.contract(left.signals, right.signals)
    if left.inputs.shape[1] == 1:
        inputs = jnp.matmul(left.inputs[:, 0], right.inputs[:, 0].T, precision="highest")
        signals = left.signals[:, :, 0]
        others = signals if right.signals is left.signals else right.signals[:, :, 0]
        return jacobian.contract(signals, others) * inputs[None, :, None, :]
    inputs = jnp.einsum("iaf,jbf->iajb", left.inputs, right.inputs, precision="highest")
    signals = jnp.einsum("oiau,pjbu->oiapjb", left.signals, right.signals, precision="highest")
    return jnp.einsum("iajb,oiapjb->oipj", inputs, signals, precision="highest")
