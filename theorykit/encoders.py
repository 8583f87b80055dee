r"""Encoders: multilayer perceptrons, a small CNN and small transformers, as flax.linen modules.

Every encoder maps a batch to embeddings, one per row: ``params = encoder.init(key, x)`` and
``encoder.apply(params, x)`` of shape (n, features); `TokenTransformer` gives one output per token instead. All weights
live in two layers, `Dense` and `Conv`, in one of two parametrisations:

    "ntk"        y = (weight_std / √fan_in) x·W + bias_std b,    W, b ~ N(0, 1)
    "standard"   y = x·W + b,    W ~ N(0, weight_std² / fan_in),    b ~ N(0, bias_std²)

Both draw the same function at initialisation; they differ in what a gradient step does. Under "ntk" the neural tangent
kernel has a limit as the width grows, under "standard" it grows in proportion to the width.

Parameters take the dtype of the input that `init` sees: float32 data give float32 parameters, float64 data (inside
``jax.enable_x64(True)``) give float64 parameters, and embeddings keep that dtype. Matrix products run at precision
"highest" unless the attribute says otherwise, because recent GPUs and TPUs multiply float32 matrices in TF32 or
bfloat16, whose relative error of 1e-3 can be as large as the effects of width that the theorems predict.

Sources: Jacot, Gabriel, Hongler 2018 (arXiv 1806.07572) for the NTK parametrisation; Vaswani et al. 2017
(arXiv 1706.03762) and Xiong et al. 2020 (arXiv 2002.04745) for the pre-norm transformer.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from theorykit import _transformer
from theorykit._layers import Conv, Dense, NoInfiniteKernel, Weighted, check_choice, check_counts

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "relu": jax.nn.relu,
    "tanh": jnp.tanh,
    "erf": jax.scipy.special.erf,
    # x Φ(x) with the normal distribution function Φ, not its tanh approximation: the kernel's closed form is for this.
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "identity": lambda x: x,
}
POOLINGS = ("average", "flatten")


# The vocabulary of `infinite_layers`: one entry per operation, from the input to the embedding.


class DenseLayer(NamedTuple):
    """Dense layer; `bias_std` is None without a bias."""

    weight_std: float
    bias_std: float | None


class ConvLayer(NamedTuple):
    """Two-dimensional convolution of stride 1 with SAME padding; `bias_std` is None without a bias."""

    kernel_size: tuple[int, int]
    weight_std: float
    bias_std: float | None


class ActivationLayer(NamedTuple):
    """Pointwise nonlinearity, by its name in `ACTIVATIONS`."""

    name: str


class ImageLayer(NamedTuple):
    """Inputs are images of this (height, width, channels)."""

    shape: tuple[int, int, int]


class PoolLayer(NamedTuple):
    """From positions to one vector, by a name in `POOLINGS`."""

    kind: str


Layer = DenseLayer | ConvLayer | ActivationLayer | ImageLayer | PoolLayer


class MLP(Weighted):
    r"""Multilayer perceptron; with depth 2 the encoder f(x) = M^{-1/2} W^T φ(V x / √d) of the NTK literature.

    Parameters
    ----------
    width
        Hidden width M, or one width per hidden layer (depth - 1 of them).
    features
        Embedding dimension z.
    depth
        Number of dense layers: 2 is one hidden layer, 1 a linear map (which uses no width).
    activation
        "relu", "tanh", "erf", "gelu" (exact, x Φ(x)) or "identity"; none follows the last layer.
    use_bias, parametrisation, weight_std, bias_std, precision
        As in `Dense`, the same for every layer.

    Raises
    ------
    ValueError
        Width or depth below 1, a number of widths other than depth - 1, an unknown activation or parametrisation.

    Notes
    -----
    Input (n, d), output (n, features). Layers are named dense_0, dense_1, ... from the input.
    """

    width: int | Sequence[int]
    features: int
    depth: int = 2
    activation: str = "relu"

    def __post_init__(self):
        check_counts(self, "depth", "features")
        check_counts(self, width=self.depth - 1)
        check_choice("activation", self.activation, ACTIVATIONS)
        super().__post_init__()

    @nn.compact
    def __call__(self, x: Shaped[Array, "n ..."]) -> Shaped[Array, "n z"]:
        """Embed a batch of rows."""
        if x.ndim != 2:
            raise ValueError(f"MLP expects a batch of rows, shape (n, d), and got {x.shape}: flatten each input first.")
        hidden = _per_layer(self.width, self.depth - 1)
        for layer, width in enumerate((*hidden, self.features)):
            x = ACTIVATIONS[self.activation](x) if layer > 0 else x
            x = Dense(width, name=f"dense_{layer}", **self.conventions())(x)
        return x

    @nn.nowrap
    def infinite_layers(self) -> tuple[Layer, ...]:
        """Layers of the infinitely wide network, from the input on.

        Raises
        ------
        NoInfiniteKernel
            In standard parametrisation, where the NTK grows with the width.
        """
        dense = DenseLayer(self.weight_std, self.limit_bias())
        return (dense, *((self.depth - 1) * (ActivationLayer(self.activation), dense)))


class CNN(Weighted):
    r"""Convolutional encoder: (convolution, activation) × (depth - 1), pooling, dense layer.

    Convolutions have stride 1 and SAME padding, so every hidden layer keeps the image's height and width.

    Parameters
    ----------
    channels
        Hidden channels, or one number per convolution (depth - 1 of them).
    features
        Embedding dimension z.
    image_shape
        (height, width, channels) of an input image.
    depth
        Number of layers with weights: depth - 1 convolutions and the dense layer; at least 2.
    kernel_size
        (height, width) of the convolutions, in pixels.
    pooling
        "average" (mean over positions) or "flatten" (the dense layer sees all positions). Both have an infinite-width
        kernel; that of "average" needs memory in proportion to (height · width)² per pair of images.
    activation, use_bias, parametrisation, weight_std, bias_std, precision
        As in `MLP`, the same for every layer.

    Raises
    ------
    ValueError
        Channels below 1, depth below 2, a number of channels other than depth - 1, unknown names, or an input that
        does not have image_shape.

    Notes
    -----
    Input (n, height · width · channels) or (n, height, width, channels), output (n, features). Layers are named conv_0,
    conv_1, ... and head.
    """

    channels: int | Sequence[int]
    features: int
    image_shape: Sequence[int]
    depth: int = 3
    kernel_size: Sequence[int] = (3, 3)
    pooling: str = "average"
    activation: str = "relu"

    def __post_init__(self):
        check_counts(self, "depth", "features", image_shape=3, kernel_size=2)
        if self.depth < 2:
            raise ValueError("A CNN has depth at least 2 (one convolution and the dense layer): use MLP for depth 1.")
        check_counts(self, channels=self.depth - 1)
        check_choice("pooling", self.pooling, POOLINGS)
        check_choice("activation", self.activation, ACTIVATIONS)
        super().__post_init__()

    @nn.compact
    def __call__(self, x: Shaped[Array, "n ..."]) -> Shaped[Array, "n z"]:
        """Embed a batch of images."""
        x = _unflatten(x, self.image_shape, "CNN", "image_shape (height, width, channels)")
        for layer, channels in enumerate(_per_layer(self.channels, self.depth - 1)):
            conv = Conv(channels, kernel_size=self.kernel_size, name=f"conv_{layer}", **self.conventions())
            x = ACTIVATIONS[self.activation](conv(x))
        x = jnp.mean(x, axis=(1, 2)) if self.pooling == "average" else x.reshape(x.shape[0], -1)
        return Dense(self.features, name="head", **self.conventions())(x)

    @nn.nowrap
    def infinite_layers(self) -> tuple[Layer, ...]:
        """Layers of the network with infinitely many channels, from the input on.

        Raises
        ------
        NoInfiniteKernel
            In standard parametrisation, where the NTK grows with the number of channels.
        """
        bias_std = self.limit_bias()
        conv = ConvLayer(self.kernel_size, self.weight_std, bias_std)
        hidden = (self.depth - 1) * (conv, ActivationLayer(self.activation))
        return (ImageLayer(self.image_shape), *hidden, PoolLayer(self.pooling), DenseLayer(self.weight_std, bias_std))


class _OnTokens(Weighted):
    """What the two transformers share: sizes, and their blocks. Each class documents these attributes."""

    width: int
    features: int
    tokens: Sequence[int] = (8, 8)
    depth: int = 2
    heads: int = 4
    mlp_ratio: int = 4
    learn_positions: bool = True
    activation: str = "gelu"

    def __post_init__(self):
        check_counts(self, "width", "features", "depth", "heads", "mlp_ratio", tokens=2)
        if self.width % self.heads:
            raise ValueError(
                f"heads = {self.heads} does not divide width = {self.width}: make width a multiple of heads."
            )
        check_choice("activation", self.activation, ACTIVATIONS)
        super().__post_init__()

    @nn.nowrap
    def _blocks(self, x: Array, gates: Array | None, prefix: int | None) -> Array:
        """Inputs, flat or shaped -> tokens after the last layer norm, (n, number of tokens, width)."""
        x = _unflatten(x, self.tokens, type(self).__name__, "tokens (number of tokens, numbers per token)")
        return _transformer.blocks(self, x, ACTIVATIONS[self.activation], gates, prefix)

    @nn.nowrap
    def infinite_layers(self) -> tuple[Layer, ...]:
        """Raise: softmax attention has no closed-form infinite-width kernel.

        With logits divided by √(width / heads) the attention weights stay random however wide a head is. A Gaussian
        limit needs infinitely many heads, and its kernel is an expectation over a softmax without a closed form
        (Hron et al. 2020, arXiv 2006.10540).

        Raises
        ------
        NoInfiniteKernel
            Always.
        """
        raise NoInfiniteKernel(
            "The transformer has no closed-form infinite-width kernel: its softmax attention stays random as the width "
            "grows. Use ntk.empirical_ntk at a finite width, or an MLP or CNN."
        )


class Transformer(_OnTokens):
    r"""Pre-norm transformer encoder: embed, (attention, MLP) × depth, layer norm, mean over tokens, dense layer.

    h ← h + g Attention(LN h), then h ← h + g MLP(LN h), with attention softmax(q·k / √(width / heads)) v in each head
    and a gate g for each block, 1 unless `gates` are given.

    Parameters
    ----------
    width
        Token dimension inside the network.
    features
        Embedding dimension z.
    tokens
        (number of tokens, numbers per token) of an input; the digits are 8 tokens, the rows, of 8 pixels.
    depth
        Number of blocks.
    heads
        Number of attention heads; divides the width.
    mlp_ratio
        Hidden width of a block's MLP, in units of the width.
    learn_positions
        Whether a learned vector is added at each position. Without it the encoder ignores the order of tokens.
    activation, use_bias, parametrisation, weight_std, bias_std, precision
        As in `MLP`, for every projection. Layer norms have a learned scale and shift in both parametrisations.

    Raises
    ------
    ValueError
        A size below 1, a width that heads does not divide, unknown names, an input that does not have shape tokens, or
        gates that are not one number for each block.

    Notes
    -----
    Input (n, number of tokens · numbers per token) or (n, number of tokens, numbers per token), output (n, features).
    ``encoder.apply(params, x, gates)`` multiplies both branches of block b by gates[b]: (1, 0) is the network of one
    block, so that networks of several depths share one program. ``encoder.apply(params, x, mutable="intermediates")``
    also returns {"intermediates": {"states": (s,)}} with s of shape (depth + 1, n, number of tokens, width): the tokens
    h after the embedding and after each block. It has no closed-form infinite-width kernel, see `infinite_layers`.
    """

    @nn.compact
    def __call__(self, x: Shaped[Array, "n ..."], gates: Float[Array, " depth"] | None = None) -> Shaped[Array, "n z"]:
        """Embed a batch of token sequences."""
        h = self._blocks(x, gates, prefix=None)
        return Dense(self.features, name="head", **self.conventions())(jnp.mean(h, axis=1))


class TokenTransformer(_OnTokens):
    r"""Pre-norm transformer with one output per token: the blocks of `Transformer`, layer norm, dense layer.

    Parameters
    ----------
    width, features, tokens, depth, heads, mlp_ratio, learn_positions
        As in `Transformer`, with `features` outputs for each token.
    activation, use_bias, parametrisation, weight_std, bias_std, precision
        As in `MLP`.
    prefix
        None: every token sees every token. k: the first k tokens see each other, and token i ≥ k sees tokens 0 to i,
        itself included, as in a prefix language model; 0 is purely causal.

    Raises
    ------
    ValueError
        As `Transformer`, and a prefix below 0 or above the number of tokens.

    Notes
    -----
    Input as for `Transformer`, output (n, number of tokens, features). Gates and hidden states are those of
    `Transformer`, and so are the names of the parameters.

    Source: Liu et al. 2018 (arXiv 1801.10198) for the decoder; Raffel et al. 2020 (arXiv 1910.10683), section 3.2, for
    the mask with a fully visible prefix.
    """

    prefix: int | None = None

    def __post_init__(self):
        super().__post_init__()
        if isinstance(self.prefix, bool) or not isinstance(self.prefix, int | None):
            raise TypeError(f"prefix must be a whole number or None and is {self.prefix!r}: pass a Python int.")
        if self.prefix is not None and not 0 <= self.prefix <= self.tokens[0]:
            raise ValueError(
                f"prefix is {self.prefix} with {self.tokens[0]} tokens: pass 0 to {self.tokens[0]}, or None."
            )

    @nn.compact
    def __call__(
        self, x: Shaped[Array, "n ..."], gates: Float[Array, " depth"] | None = None
    ) -> Shaped[Array, "n t z"]:
        """One output for each token of each sequence."""
        return Dense(self.features, name="head", **self.conventions())(self._blocks(x, gates, self.prefix))


def _per_layer(sizes: int | Sequence[int], layers: int) -> Sequence[int]:
    return layers * (sizes,) if isinstance(sizes, int) else sizes


def _unflatten(x: Array, shape: tuple[int, ...], encoder: str, meaning: str) -> Array:
    """Rows or already shaped inputs -> (n, *shape)."""
    if x.ndim < 1 or x.shape[1:] not in ((math.prod(shape),), shape):
        raise ValueError(
            f"{encoder} expects inputs of shape (n, {math.prod(shape)}) or (n, {', '.join(map(str, shape))}), from its "
            f"{meaning} = {shape}, and got {x.shape}: reshape the inputs or change that attribute."
        )
    return x.reshape(-1, *shape)
