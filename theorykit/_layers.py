r"""The two layers with weights, dense and convolutional, in NTK or standard parametrisation; see `encoders`."""

import math
from collections.abc import Sequence

import flax.linen as nn
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Shaped

PARAMETRISATIONS = ("ntk", "standard")
PADDINGS = ("SAME", "VALID", "CIRCULAR")


class NoInfiniteKernel(ValueError):
    """The architecture has no infinite-width kernel that the library can compute."""


class Weighted(nn.Module, kw_only=True):
    """What layers and encoders share: the conventions of their weights. Each class documents these attributes."""

    use_bias: bool = False
    parametrisation: str = "ntk"
    weight_std: float = 1.0
    bias_std: float = 1.0
    precision: str = "highest"

    def __post_init__(self):
        check_choice("parametrisation", self.parametrisation, PARAMETRISATIONS)
        if not (math.isfinite(self.weight_std) and self.weight_std > 0):
            raise ValueError(
                f"weight_std must be positive and finite and is {self.weight_std}: 1.0 is the usual choice."
            )
        if not (math.isfinite(self.bias_std) and self.bias_std >= 0):
            raise ValueError(
                f"bias_std must be finite and at least 0 and is {self.bias_std}: use_bias=False has no bias."
            )
        super().__post_init__()

    @nn.nowrap
    def scale(self, fan_in: int) -> float:
        """What multiplies the product with a kernel: weight_std / √fan_in, or 1 in standard parametrisation."""
        return self.weight_std / math.sqrt(fan_in) if self.parametrisation == "ntk" else 1.0

    @property
    def bias_scale(self) -> float:
        """What multiplies a bias: bias_std, or 1 in standard parametrisation."""
        return self.bias_std if self.parametrisation == "ntk" else 1.0

    @nn.nowrap
    def conventions(self) -> dict:
        """These attributes, for a layer inside an encoder."""
        names = ("use_bias", "parametrisation", "weight_std", "bias_std", "precision")
        return {name: getattr(self, name) for name in names}

    @nn.nowrap
    def _kernel(self, shape: tuple[int, ...], dtype: jnp.dtype) -> Array:
        std = 1.0 if self.parametrisation == "ntk" else self.weight_std / math.sqrt(math.prod(shape[:-1]))
        return parameter(self, "kernel", shape, dtype, std)

    @nn.nowrap
    def _add_bias(self, y: Array) -> Array:
        if not self.use_bias:
            return y
        std = 1.0 if self.parametrisation == "ntk" else self.bias_std
        bias = parameter(self, "bias", y.shape[-1:], y.dtype, std)
        return y + self.bias_scale * bias.reshape((1,) * (y.ndim - 1) + (-1,))

    @nn.nowrap
    def limit_bias(self) -> float | None:
        """The bias of the infinitely wide encoder; an error where there is no such encoder."""
        if self.parametrisation != "ntk":
            raise NoInfiniteKernel(
                "In standard parametrisation the neural tangent kernel grows in proportion to the width and has no "
                'limit. Use parametrisation="ntk" (the same random function at initialisation, hence the same '
                "Gaussian-process kernel), or ntk.empirical_ntk at a finite width."
            )
        return self.bias_std if self.use_bias else None


class Dense(Weighted):
    r"""Dense layer, y = scale · x W + bias_scale · b, in NTK or standard parametrisation.

    Parameters
    ----------
    features
        Number of outputs.
    use_bias
        Whether the layer has a bias.
    parametrisation
        "ntk" or "standard", see the module's equations.
    weight_std, bias_std
        Standard deviations of the weights (before division by √fan_in) and of the bias; dimensionless.
    precision
        Precision of the matrix product, as in `jax.lax.dot`.

    Notes
    -----
    Parameters are ``kernel`` (in, features) and, with a bias, ``bias`` (features,).
    """

    features: int

    def __post_init__(self):
        check_counts(self, "features")
        super().__post_init__()

    @nn.compact
    def __call__(self, x: Shaped[Array, "*batch d"]) -> Shaped[Array, "*batch z"]:
        """Apply the layer to the last axis of x."""
        _check_floating(x)
        kernel = self._kernel((x.shape[-1], self.features), x.dtype)
        return self._add_bias(self.scale(x.shape[-1]) * jnp.dot(x, kernel, precision=self.precision))


class Conv(Weighted):
    r"""Two-dimensional convolution of (n, height, width, channels), in NTK or standard parametrisation.

    y[h, w, o] = scale · Σ_{a,b,c} x[s h + a, t w + b, c] W[a, b, c, o] + bias_scale · b[o] with strides (s, t) and
    fan_in = kernel height · kernel width · channels.

    Parameters
    ----------
    features
        Number of output channels.
    kernel_size, strides
        (height, width) of the window and of its steps, in pixels.
    padding
        "SAME" (zeros, output of height ⌈height / s⌉), "VALID" (none) or "CIRCULAR" (as SAME, the image wraps round).
    use_bias, parametrisation, weight_std, bias_std, precision
        As in `Dense`.

    Notes
    -----
    Parameters are ``kernel`` (kernel height, kernel width, channels, features) and, with a bias, ``bias`` (features,).
    """

    features: int
    kernel_size: Sequence[int] = (3, 3)
    strides: Sequence[int] = (1, 1)
    padding: str = "SAME"

    def __post_init__(self):
        check_counts(self, "features", kernel_size=2, strides=2)
        check_choice("padding", self.padding, PADDINGS)
        super().__post_init__()

    @nn.compact
    def __call__(self, x: Shaped[Array, "n ..."]) -> Shaped[Array, "n h w z"]:
        """Apply the convolution to a batch of images."""
        _check_floating(x)
        if x.ndim != 4:
            raise ValueError(
                f"Conv expects images of shape (n, height, width, channels) and got {x.shape}: "
                "reshape the batch, with one channel axis even for grey images."
            )
        kernel = self._kernel((*self.kernel_size, x.shape[-1], self.features), x.dtype)
        padding = self.padding
        if padding == "CIRCULAR":
            pads = lax.padtype_to_pads(x.shape[1:3], self.kernel_size, self.strides, "SAME")
            x, padding = jnp.pad(x, ((0, 0), *pads, (0, 0)), mode="wrap"), "VALID"
        numbers = ("NHWC", "HWIO", "NHWC")
        y = lax.conv_general_dilated(
            x, kernel, self.strides, padding, dimension_numbers=numbers, precision=self.precision
        )
        return self._add_bias(self.scale(math.prod(kernel.shape[:-1])) * y)


def parameter(module: nn.Module, name: str, shape: tuple[int, ...], dtype: jnp.dtype, std: float) -> Array:
    """A Gaussian parameter; a stored one of another shape is an error that says what the input should have been."""
    if module.has_variable("params", name):
        stored = jnp.shape(module.get_variable("params", name))
        if stored != shape:
            raise ValueError(
                f"{'/'.join(module.path)} holds a {name} of shape {stored}, and this input with these settings needs "
                f"{shape}: pass inputs of the shape that init saw, or call init again."
            )
    return module.param(name, nn.initializers.normal(std), shape, dtype)


def _check_floating(x: Array) -> None:
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(
            f"Encoders take floating-point inputs, which set the dtype of the parameters, and got {x.dtype}: "
            "convert them first, for instance with x.astype(jnp.float32)."
        )


def check_choice(name: str, value: str, known: Sequence[str] | dict) -> None:
    if value not in known:
        raise ValueError(f"Unknown {name} {value!r}: choose one of {', '.join(known)}.")


def check_counts(module: nn.Module, *names: str, **lengths: int) -> None:
    """Names hold a count; lengths[name] is how many counts name holds. Lists become tuples: modules stay hashable."""
    for name in names:
        _check_count(name, getattr(module, name))
    for name, length in lengths.items():
        values = getattr(module, name)
        if isinstance(values, int) and name in ("width", "channels"):
            _check_count(name, values)
            continue
        if not isinstance(values, Sequence) or len(values) != length:
            raise ValueError(
                f"{name} needs {length} whole numbers and got {values!r}: pass a tuple of {length} of them."
            )
        for value in values:
            _check_count(name, value)
        setattr(module, name, tuple(values))


def _check_count(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be a whole number of at least 1 and is {value!r}: pass a Python int.")
    if value < 1:
        raise ValueError(f"{name} must be at least 1 and is {value}: pass a positive whole number.")
