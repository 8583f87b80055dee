r"""Kernels of infinitely wide encoders, by neural-tangents: the only file that imports it.

As the widths grow, the tangent kernel at initialisation of an encoder in NTK parametrisation tends to Θ(x, x') I_z, and
its outputs tend to a Gaussian process with covariance Σ(x, x') I_z. A dense layer maps Σ to Σ' = σ_w² Σ + σ_b² and Θ to
σ_w² Θ + Σ'; an activation φ maps Σ to E φ(u) φ(u') and Θ to Θ E φ'(u) φ'(u'), with (u, u') Gaussian of covariance Σ;
convolutions do the same for pairs of positions.

Σ is the same in standard parametrisation, which draws the same functions, and `infinite_nngp` takes both. Θ of standard
parametrisation is left out on purpose. There a layer's weights add fan_in / σ_w² times what they add in NTK
parametrisation, and its bias 1 / σ_b² times, so that Θ grows with the width. Divided by the width it tends to what the
weights behind the first layer add, as if the first layer and the biases were frozen: no statement here is about that.

This file translates `encoder.infinite_layers()` into neural-tangents' layers, and computes in float64 and in blocks of
bounded memory, whatever the dtype of the inputs.

neural-tangents 0.6.5, its last release, imports names that JAX has since moved and an experimental module that needs
TensorFlow. `neural_tangents()` lends it those names for the time of its import and takes them back.

Sources: Jacot, Gabriel, Hongler 2018 (arXiv 1806.07572); Lee et al. 2018 (arXiv 1711.00165) for Σ; Novak et al. 2020
(arXiv 1912.02803) for the package.
"""

import contextlib
import functools
import importlib
import math
import sys
import types
import warnings
from collections.abc import Callable, Iterator

import flax.linen as nn
import jax
import jax.extend.core
import jax.extend.linear_util  # neural-tangents reaches it as an attribute of jax.extend
import jax.interpreters.ad
import jax.numpy as jnp
import numpy as np
import scipy.special
from jaxtyping import Array, Float, Shaped

from theorykit import encoders

# Working memory of one block. Small beside any machine's memory, large enough that the fixed cost of a call vanishes.
BLOCK_BYTES = 2**28
# Float64 arrays of a block's size that are alive at once in a kernel's evaluation: by XLA's own count from 1 for an MLP
# of ReLU units to 14 for a CNN of GELU units.
BLOCK_ARRAYS = 14
# Terms of tanh's Hermite series, also the points of the quadrature that gives its coefficients; cost is linear in it.
# Measured relative error of E φ'(u) φ'(u): below 1e-13 at pre-activation variance 1, 1e-11 at 2, 1e-7 at 4, 5e-6 at 6.
HERMITE_TERMS = 256
# Largest share of a function's mean square that the last quarter of the series may hold. The error is at most 4 times
# that share (tested), so each layer's expectations are within 1e-5 of their value at x = x', or refused.
HERMITE_TAIL = 2.5e-6


def infinite_ntk(
    encoder: nn.Module, x1: Shaped[Array, "n1 ..."], x2: Shaped[Array, "n2 ..."] | None = None
) -> Float[Array, "n1 n2"]:
    r"""Tangent kernel of the infinitely wide encoder, the scalar Θ of the full kernel Θ(x, x') I_z.

    Θ(x_i, x'_j) = lim Σ_θ ∂f_o(x_i)/∂θ ∂f_o(x'_j)/∂θ as all widths grow, the same for every output o.

    Parameters
    ----------
    encoder
        An MLP or CNN in NTK parametrisation, or any module with a method `infinite_layers` like theirs.
    x1, x2
        Inputs, (n1, ...) and (n2, ...), of one dtype, float32 or float64; x2 = None means x1. Values, not tracers: the
        function runs block by block and is not for use inside jit.

    Returns
    -------
    kernel
        (n1, n2), dimensionless, in the dtype of the inputs; exactly symmetric if x2 is None. Computed in float64, to
        rounding, but for two: ReLU's is accurate to 1e-7 where inputs are nearly parallel, because the angle between
        them is then the square root of a difference; tanh's to 1e-5 a layer or much better, see `HERMITE_TERMS`.

    Raises
    ------
    NoInfiniteKernel
        The encoder has no such limit: a transformer, or standard parametrisation.
    ValueError
        Inputs that do not fit the encoder or each other, that are empty or not finite, or that saturate tanh so far
        that its series has not converged.
    TypeError
        Inputs that are not floating-point, or of two dtypes.
    ImportError
        neural-tangents is not installed.

    Source
    ------
    Jacot, Gabriel, Hongler 2018, theorem 1; Arora et al. 2019 (arXiv 1904.11955) for convolutions.
    """
    return _infinite(encoder, x1, x2, "ntk")


def infinite_nngp(
    encoder: nn.Module, x1: Shaped[Array, "n1 ..."], x2: Shaped[Array, "n2 ..."] | None = None
) -> Float[Array, "n1 n2"]:
    r"""Covariance of one output of the infinitely wide encoder at initialisation, Σ(x_i, x'_j) = E f_o(x_i) f_o(x'_j).

    Parameters
    ----------
    encoder
        As in `infinite_ntk`, but in either parametrisation: both draw the same function.
    x1, x2
        As in `infinite_ntk`.

    Returns
    -------
    kernel
        (n1, n2), in the units of a squared embedding; dtype and accuracy as in `infinite_ntk`.

    Raises
    ------
    NoInfiniteKernel
        The encoder has no such limit: a transformer.
    ValueError, TypeError, ImportError
        As in `infinite_ntk`.

    Source
    ------
    Lee et al. 2018 (arXiv 1711.00165); Novak et al. 2019 (arXiv 1810.05148) for convolutions.
    """
    if isinstance(encoder, encoders.Weighted) and encoder.parametrisation == "standard":
        encoder = encoder.clone(parametrisation="ntk")
    return _infinite(encoder, x1, x2, "nngp")


@functools.cache
def neural_tangents() -> types.ModuleType:
    """Import neural-tangents on a JAX that has moved the names it imports, without TensorFlow.

    Returns
    -------
    module
        The package neural_tangents; its `experimental` module is not imported. No name stays behind in JAX.

    Raises
    ------
    ImportError
        neural-tangents is not installed.
    """
    if sys.modules.get("neural_tangents") is not None:
        return sys.modules["neural_tangents"]
    try:
        with _lent_names():
            package = importlib.import_module("neural_tangents")
    except ModuleNotFoundError as error:
        if error.name not in ("neural_tangents", "frozendict"):
            raise
        raise ImportError(
            f"Infinite-width kernels need the package {error.name}, which is not installed: pip install "
            '"theorykit[infinite]". pip brings TensorFlow along, which nothing here uses; uv leaves it out, given '
            "--override with the lines of override-dependencies in theorykit's pyproject.toml."
        ) from error
    # The empty stand-in, so that a later `import neural_tangents.experimental` finds the real one.
    del package.experimental
    return package


@contextlib.contextmanager
def _lent_names() -> Iterator[None]:
    """The names that neural-tangents 0.6.5 imports and JAX has moved, for the time of its import."""
    util = types.ModuleType("jax.util")
    util.safe_zip = lambda *sequences: list(zip(*sequences, strict=True))
    util.safe_map = lambda f, *sequences: [f(*group) for group in zip(*sequences, strict=True)]
    moved = ("ClosedJaxpr", "Jaxpr", "JaxprEqn", "Literal", "Primitive", "Var", "jaxpr_as_fun")
    attributes = [(jax.core, name, getattr(jax.extend.core, name)) for name in moved]
    # A key of its tables of rules; JAX no longer has this primitive, so any unused one does.
    attributes.append((jax.interpreters.ad, "zeros_like_p", jax.extend.core.Primitive("zeros_like")))
    modules = {"jax.util": util, "neural_tangents.experimental": types.ModuleType("neural_tangents.experimental")}

    missing = [(owner, name, value) for owner, name, value in attributes if name not in vars(owner)]
    absent = {name: module for name, module in modules.items() if name not in sys.modules}
    for owner, name, value in missing:
        setattr(owner, name, value)
    sys.modules.update(absent)
    try:
        yield
    finally:
        for owner, name, _ in missing:
            delattr(owner, name)
        for name in absent:
            del sys.modules[name]


def _infinite(encoder: nn.Module, x1: Array, x2: Array | None, kind: str) -> Array:
    layers = _layers(encoder)
    symmetric = x2 is None
    x1 = _checked(x1, "x1", layers)
    x2 = x1 if symmetric else _checked(x2, "x2", layers)
    if x1.dtype != x2.dtype:
        raise TypeError(f"x1 is {x1.dtype} and x2 is {x2.dtype}: convert one to the dtype of the other.")
    if math.prod(x1.shape[1:]) != math.prod(x2.shape[1:]):
        raise ValueError(f"x1 has inputs of shape {x1.shape[1:]} and x2 of {x2.shape[1:]}: they must be the same.")
    kernel = _kernel(layers)
    side = _block_side(layers)
    out = np.empty((len(x1), len(x2)))
    # float64 throughout: near parallel inputs ReLU's kernel has the square root of the rounding error, 3e-4 in float32.
    # The strict promotion rules that a caller may have set are not what neural-tangents was written for.
    with (
        jax.enable_x64(True),
        jax.default_matmul_precision("highest"),
        jax.numpy_rank_promotion("allow"),
        jax.numpy_dtype_promotion("standard"),
    ):
        rows, columns = _blocks(x1, side), _blocks(x2, side)
        for i, (first, a) in enumerate(rows):
            for j, (second, b) in enumerate(columns):
                if not symmetric or i <= j:
                    part = out[first, second]
                    part[:] = np.asarray(kernel(a, b, kind))[: part.shape[0], : part.shape[1]]
    if symmetric:
        out = np.triu(out) + np.triu(out, 1).T
    if not np.isfinite(out).all():
        raise ValueError(
            "The kernel is not finite: pre-activations are so large that tanh's series has not converged, or overflow. "
            "Scale the inputs to |x| = √d (data.to_sphere) or lower weight_std and bias_std."
        )
    return jnp.asarray(out.astype(x1.dtype))


def _layers(encoder: nn.Module) -> tuple[encoders.Layer, ...]:
    if not hasattr(encoder, "infinite_layers"):
        raise encoders.NoInfiniteKernel(
            f"{type(encoder).__name__} has no method infinite_layers, so its infinite-width kernel is unknown: use "
            "encoders.MLP or encoders.CNN, or ntk.empirical_ntk at a finite width."
        )
    return encoder.infinite_layers()


def _checked(x: Array, name: str, layers: tuple[encoders.Layer, ...]) -> np.ndarray:
    """Inputs as a NumPy array, so that float64 computation does not depend on the caller's x64 setting."""
    x = np.asarray(x)
    if not np.issubdtype(x.dtype, np.floating):
        raise TypeError(f"{name} is {x.dtype}: pass floating-point inputs, for instance {name}.astype(jnp.float32).")
    image = next((layer.shape for layer in layers if isinstance(layer, encoders.ImageLayer)), None)
    fits = x.ndim == 2 if image is None else x.ndim >= 1 and x.shape[1:] in ((math.prod(image),), image)
    if not fits:
        wanted = "(n, d)" if image is None else f"(n, {math.prod(image)}) or (n, {', '.join(map(str, image))})"
        raise ValueError(f"{name} has shape {x.shape} and the encoder takes {wanted}: reshape the inputs.")
    if x.size == 0:
        raise ValueError(f"{name} has shape {x.shape}, without any number: pass at least one input.")
    if not np.isfinite(x).all():
        raise ValueError(f"{name} holds values that are not finite: remove or replace those rows first.")
    return x


def _block_side(layers: tuple[encoders.Layer, ...]) -> int:
    """Inputs per side of a block, from the kernel entries that a pair of inputs needs."""
    image = next((layer.shape for layer in layers if isinstance(layer, encoders.ImageLayer)), (1, 1, 1))
    positions = image[0] * image[1]
    entries = positions**2 if encoders.PoolLayer("average") in layers else positions
    return max(1, math.isqrt(BLOCK_BYTES // (BLOCK_ARRAYS * np.dtype(np.float64).itemsize * entries)))


def _blocks(x: np.ndarray, side: int) -> list[tuple[slice, Array]]:
    """Blocks of one size, hence one compilation: the last is filled up with copies of the first input."""
    side = math.ceil(len(x) / math.ceil(len(x) / side))
    starts = range(0, len(x), side)
    parts = [x[start : start + side] for start in starts]
    filled = [np.concatenate([part, np.repeat(x[:1], side - len(part), axis=0)]) for part in parts]
    return [(slice(start, start + side), jnp.asarray(p, jnp.float64)) for start, p in zip(starts, filled, strict=True)]


@functools.lru_cache(maxsize=64)  # compiled kernels of the most recent architectures
def _kernel(layers: tuple[encoders.Layer, ...]) -> Callable[[Array, Array, str], Array]:
    stax = neural_tangents().stax
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        translated = [_translate(stax, layer) for layer in layers if not isinstance(layer, encoders.ImageLayer)]
    _, _, kernel_fn = stax.serial(*translated)
    image = next((layer.shape for layer in layers if isinstance(layer, encoders.ImageLayer)), None)

    @functools.partial(jax.jit, static_argnums=2)
    def kernel(x1: Array, x2: Array, kind: str) -> Array:
        if image is not None:
            x1, x2 = x1.reshape(-1, *image), x2.reshape(-1, *image)
        return kernel_fn(x1, x2, kind)

    return kernel


def _translate(stax: types.ModuleType, layer: encoders.Layer) -> tuple:
    # The number of outputs or channels of an infinite layer is not used by its kernel, hence 1.
    match layer:
        case encoders.DenseLayer(weight_std, bias_std):
            return stax.Dense(1, weight_std, bias_std)
        case encoders.ConvLayer(kernel_size, weight_std, bias_std):
            return stax.Conv(1, kernel_size, (1, 1), "SAME", weight_std, bias_std)
        case encoders.PoolLayer("average"):
            return stax.GlobalAvgPool()
        case encoders.PoolLayer("flatten"):
            return stax.Flatten()
        case encoders.ActivationLayer(name):
            return _activation(stax, name)
    raise encoders.NoInfiniteKernel(f"No infinite-width kernel for the layer {layer!r}: use ntk.empirical_ntk.")


def _activation(stax: types.ModuleType, name: str) -> tuple:
    match name:
        case "relu":
            return stax.Relu()
        case "erf":
            return stax.Erf()
        case "gelu":
            return stax.Gelu(approximate=False)
        case "identity":
            return stax.Identity()
        case "tanh":
            # Not stax.ElementwiseNumerical: it divides by the variance, which is 0 on a blank patch of an image, and
            # its quadrature in two dimensions costs the square of this series' terms per pair of inputs.
            return stax.Elementwise(jnp.tanh, _mehler(jnp.tanh), _mehler(lambda u: 1.0 - jnp.tanh(u) ** 2))
    raise encoders.NoInfiniteKernel(f"No infinite-width kernel for the activation {name!r}: use ntk.empirical_ntk.")


@functools.cache
def _hermite_rule() -> tuple[np.ndarray, np.ndarray]:
    """Points t and the matrix that maps φ(t) to Hermite coefficients: E φ(t) h_k(t), t ~ N(0, 1), h_k orthonormal."""
    points, weights = scipy.special.roots_hermitenorm(HERMITE_TERMS)
    h = np.ones((HERMITE_TERMS, HERMITE_TERMS))
    h[1] = points
    for k in range(1, HERMITE_TERMS - 1):
        h[k + 1] = (points * h[k] - math.sqrt(k) * h[k - 1]) / math.sqrt(k + 1)
    return points, h * (weights / weights.sum())


def _mehler(fn: Callable[[Array], Array]) -> Callable[[Array, Array, Array], Array]:
    r"""E fn(u) fn(v) for Gaussian u, v, as a function of their covariance and variances.

    With a_k(q) = E fn(√q t) h_k(t), Mehler's formula gives Σ_k a_k(q) a_k(q') ρ^k, ρ the correlation. The coefficients
    belong to single inputs; a pair costs one polynomial. At ρ = 1 the sum is the Gauss-Hermite rule for E fn².
    """

    def coefficients(variance: Array) -> Array:
        points, matrix = _hermite_rule()
        a = jnp.asarray(matrix) @ fn(jnp.sqrt(variance) * jnp.asarray(points))
        tail = jnp.sum(a[-(HERMITE_TERMS // 4) :] ** 2)
        # Not-a-number where the series has not converged: the caller turns it into an error.
        return jnp.where(tail <= HERMITE_TAIL * jnp.sum(a**2), a, jnp.nan)

    def expectation(covariance: Array, variance1: Array, variance2: Array) -> Array:
        product = variance1 * variance2
        # At variance 0 only the constant term is left, whatever the correlation.
        correlation = jnp.where(product > 0, covariance / jnp.sqrt(jnp.where(product > 0, product, 1.0)), 0.0)
        correlation = jnp.clip(correlation, -1.0, 1.0)

        def horner(total: Array, terms: tuple[Array, Array]) -> tuple[Array, None]:
            return total * correlation + terms[0] * terms[1], None

        terms = (coefficients(variance1), coefficients(variance2))
        return jax.lax.scan(horner, jnp.zeros_like(correlation), terms, reverse=True)[0]

    return expectation
