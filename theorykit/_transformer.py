r"""The blocks that `encoders.Transformer` and `encoders.TokenTransformer` share, and which token sees which."""

import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Shaped

from theorykit._layers import Dense, Weighted, parameter


def blocks(
    module: Weighted,
    x: Shaped[Array, "n t numbers"],
    activation: Callable[[Array], Array],
    gates: Float[Array, " depth"] | None,
    prefix: int | None,
) -> Float[Array, "n t width"]:
    """Embed tokens, add positions, pass the blocks and the last layer norm; called in the module's compact method.

    Parameters
    ----------
    module
        The transformer: its attributes are the sizes, its parameters are made here.
    x
        Tokens.
    activation
        The nonlinearity of the blocks' MLPs.
    gates
        What multiplies the two residual branches of each block; None for ones.
    prefix
        As in `sees`; None where every token sees every token.

    Returns
    -------
    The tokens after the last layer norm.
    """

    def dense(features: int, name: str) -> Dense:
        return Dense(features, name=name, **module.conventions())

    _check_gates(gates, module.depth)
    n, tokens, _ = x.shape
    mask = None if prefix is None else sees(tokens, prefix)
    # Tokens of all samples as rows of one matrix: the gradient of a kernel then sums over one axis and not over two,
    # for which the compiler would copy the transpose of every hidden layer.
    h = dense(module.width, "embed")(x.reshape(n * tokens, -1))
    if module.learn_positions:
        # Entries of standard deviation 1, the scale of the embedded tokens where inputs have |x| = √d.
        positions = parameter(module, "positions", (tokens, module.width), h.dtype, 1.0)
        h = (h.reshape(n, tokens, -1) + positions[None]).reshape(h.shape)
    states = [h]
    for block in range(module.depth):
        gate = None if gates is None else jnp.asarray(gates[block], h.dtype)
        u = norm(h, f"norm_attention_{block}")
        roles = (dense(module.width, f"{role}_{block}")(u) for role in ("query", "key", "value"))
        query, key, value = (a.reshape(n, tokens, module.width) for a in roles)
        mixed = attention(query, key, value, module.heads, module.precision, mask).reshape(h.shape)
        h = _add(h, gate, dense(module.width, f"out_{block}")(mixed))
        u = dense(module.mlp_ratio * module.width, f"mlp_in_{block}")(norm(h, f"norm_mlp_{block}"))
        h = _add(h, gate, dense(module.width, f"mlp_out_{block}")(activation(u)))
        states.append(h)
    if module.is_mutable_collection("intermediates"):
        module.sow("intermediates", "states", jnp.stack(states).reshape(-1, n, tokens, module.width))
    return norm(h, "norm_head").reshape(n, tokens, module.width)


def norm(h: Float[Array, "rows width"], name: str) -> Float[Array, "rows width"]:
    """A layer norm over the width, with a learned scale and shift."""
    # flax promotes to at least float32 by a call that strict promotion refuses for float64.
    with jax.numpy_dtype_promotion("standard"):
        return nn.LayerNorm(param_dtype=h.dtype, name=name)(h)


def attention(
    query: Float[Array, "n t width"],
    key: Float[Array, "n t width"],
    value: Float[Array, "n t width"],
    heads: int,
    precision: str,
    mask: Bool[np.ndarray, "t t"] | None = None,
) -> Float[Array, "n t width"]:
    r"""Softmax attention, each head on its share of the width; where the mask is false, the weight is exactly zero.

    o_i = Σ_j e_ij v_j / Σ_j e_ij with e_ij = exp(q_i·k_j / √d - max). The division comes after the sum, on arrays of
    size tokens × width and not tokens²: with 81 tokens that halves the time of attention and its gradient.
    """
    q, k, v = (a.reshape(*a.shape[:2], heads, -1) for a in (query / math.sqrt(query.shape[-1] // heads), key, value))
    logits = jnp.einsum("nihd,njhd->nhij", q, k, precision=precision)
    if mask is not None:
        logits = jnp.where(mask[None, None], logits, -jnp.inf)
    # The maximum cancels in the quotient, so that it is a constant for derivatives of every order.
    weights = jnp.exp(logits - jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True)))
    totals = jnp.sum(weights, axis=-1).swapaxes(1, 2)[..., None]
    mixed = jnp.einsum("nhij,njhd->nihd", weights, v, precision=precision) / totals
    return mixed.reshape(value.shape)


def sees(tokens: int, prefix: int) -> Bool[np.ndarray, "t t"]:
    """Whether token i (row) sees token j: where j <= i, and everywhere within the prefix."""
    place = np.arange(tokens)
    return (place[None, :] <= place[:, None]) | (place[None, :] < prefix)


def _add(h, gate, branch):
    return h + branch if gate is None else h + gate * branch


def _check_gates(gates, depth):
    if gates is not None and jnp.shape(gates) != (depth,):
        raise ValueError(
            f"gates have shape {jnp.shape(gates)}: pass one number for each of the {depth} blocks, shape ({depth},); "
            "for members with gates of their own, vmap over them."
        )
