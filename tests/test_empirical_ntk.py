"""The empirical kernel: blocks, identities that any kernel obeys, closed forms, memory, and bad input."""

import itertools
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compilation import quickly

from theorykit.encoders import CNN, MLP, Transformer
from theorykit.ntk import empirical, empirical_ntk, ntk_vector_product, two_view


def points(*shape, seed=0, dtype=None):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def relative(found, expected):
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


def ntk(apply, params, *x, **options):
    """empirical_ntk, compiled quickly."""
    return quickly(lambda params, *x: empirical_ntk(apply, params, *x, **options), params, *x)


class Mixed(nn.Module):
    """Leaves of both kinds: dense layers, and a scale and a shift that only the Jacobian covers."""

    @nn.compact
    def __call__(self, x):
        h = jnp.tanh(nn.Dense(6, param_dtype=x.dtype)(x))
        scale, shift = (self.param(name, nn.initializers.normal(1.0), (6,), x.dtype) for name in ("scale", "shift"))
        return nn.Dense(3, param_dtype=x.dtype)(h * scale[None] + shift[None])


def mixed(n=7, dtype=jnp.float64):
    x, module = points(n, 4, dtype=dtype), Mixed()
    return module.apply, module.init(jax.random.key(0), x), x


def blocks_of(apply, params, x1, x2, method, memory):
    parts = empirical._parts(apply, params, x1, x2, method, memory, x1.shape[0])
    return [(part.rows, part.columns) for part in parts]


# Rounding differs between orders of summation; 1e-12 is a thousand roundings in float64.
ROUNDING = 1e-12


@pytest.mark.slow
@pytest.mark.parametrize("method", ["structured", "jacobian"])
@pytest.mark.parametrize("memory", [1, 2500, 6000])
def test_blocks_do_not_change_the_kernel(x64, method, memory):
    apply, params, x = mixed()
    other = points(5, 4, seed=1)
    assert (7, 7) not in blocks_of(apply, params, x, x, method, memory)[:1]
    if memory == 1:
        assert set(blocks_of(apply, params, x, x, method, memory)) == {(1, 1)}

    def kernels(params, x, other, memory):
        pairs = ((x, None), (x, other), (other, x))
        return [empirical_ntk(apply, params, *pair, method=method, memory=memory) for pair in pairs]

    whole = quickly(partial(kernels, memory=2**30), params, x, other)
    for split, expected in zip(quickly(partial(kernels, memory=memory), params, x, other), whole, strict=True):
        assert relative(split, expected) < ROUNDING


@pytest.mark.slow
@pytest.mark.parametrize("memory", [2500, 2**30])
def test_the_symmetric_kernel_is_the_general_one_on_equal_points(x64, memory):
    apply, params, x = mixed()
    symmetric = ntk(apply, params, x, memory=memory)
    assert relative(symmetric, ntk(apply, params, x, x + 0, memory=memory)) < ROUNDING
    assert relative(symmetric, symmetric.transpose(1, 0, 3, 2)) < ROUNDING


def test_kernels_of_swapped_points_are_transposes(x64):
    apply, params, x = mixed()
    other = points(5, 4, seed=1)
    forth, back = ntk(apply, params, x, other), ntk(apply, params, other, x)
    assert relative(forth, back.transpose(1, 0, 3, 2)) < ROUNDING


def test_the_kernel_is_positive_semidefinite(x64):
    # 25 points and 3 outputs, 75 rows, of a function with 63 parameters: the kernel is singular.
    apply, params, _ = mixed()
    rank = sum(leaf.size for leaf in jax.tree.leaves(params))
    kernel = np.asarray(ntk(apply, params, points(25, 4))).transpose(0, 2, 1, 3).reshape(75, 75)
    spectrum = np.linalg.eigvalsh((kernel + kernel.T) / 2)
    assert abs(spectrum[: 75 - rank]).max() < 75 * np.finfo(np.float64).eps * spectrum[-1]
    assert spectrum[-1] > 0


@pytest.mark.slow
def test_the_kernel_is_a_sum_over_leaves(x64):
    apply, params, x = mixed()
    leaves, tree = jax.tree.flatten(params)
    total = 0
    for chosen in range(len(leaves)):

        def of_one(leaf, x, chosen=chosen):
            return apply(jax.tree.unflatten(tree, [*leaves[:chosen], leaf, *leaves[chosen + 1 :]]), x)

        total = total + ntk(of_one, leaves[chosen], x)
    assert relative(total, ntk(apply, params, x)) < ROUNDING


@pytest.mark.slow
@pytest.mark.parametrize("depth", [2, 3, 4])
def test_a_relu_net_without_bias_is_homogeneous(x64, depth):
    # f(x; c θ) = c^depth f, so ∂f/∂θ scales as c^(depth - 1); f(s x) = s f, so K(s x, t x') = s t K(x, x').
    encoder, x = MLP(6, 2, depth=depth), points(5, 3)
    params, c = encoder.init(jax.random.key(0), x), 1.7
    kernel = ntk(encoder.apply, params, x)
    scaled = ntk(encoder.apply, jax.tree.map(lambda leaf: c * leaf, params), x)
    assert relative(scaled, c ** (2 * depth - 2) * kernel) < ROUNDING
    assert relative(ntk(encoder.apply, params, 2.5 * x, 0.3 * x), 2.5 * 0.3 * kernel) < ROUNDING
    # Euler's identity, layer by layer: f_o is homogeneous of degree 1 in each kernel, so J θ = depth f.
    tangent = jax.jvp(lambda p: encoder.apply(p, x), (params,), (params,))[1]
    assert relative(tangent, depth * encoder.apply(params, x)) < ROUNDING


@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_two_layers_follow_the_explicit_formula(x64, activation):
    # K(x, x') = Σ_m φ(u_m) φ(u'_m) / M · I + x·x' / (d M) · Σ_m φ'(u_m) φ'(u'_m) w_m w_mᵀ,  u_m = v_m·x / √d.
    n, d, width, z = 4, 3, 6, 2
    phi = {"relu": lambda u: max(u, 0.0), "tanh": np.tanh}[activation]
    slope = {"relu": lambda u: float(u > 0), "tanh": lambda u: 1 - np.tanh(u) ** 2}[activation]
    encoder, x = MLP(width, z, activation=activation), points(n, d)
    params = encoder.init(jax.random.key(0), x)
    v, w = (np.asarray(params["params"][name]["kernel"]) for name in ("dense_0", "dense_1"))
    u = np.asarray(x) @ v / np.sqrt(d)
    expected = np.zeros((n, n, z, z))
    for i, j, m in np.ndindex(n, n, width):
        expected[i, j] += phi(u[i, m]) * phi(u[j, m]) / width * np.eye(z)
        inner = float(np.dot(x[i], x[j])) / (d * width)
        expected[i, j] += inner * slope(u[i, m]) * slope(u[j, m]) * np.outer(w[m], w[m])
    assert relative(ntk(encoder.apply, params, x), expected) < ROUNDING


def test_a_linear_map_has_the_kernel_of_its_inputs(x64):
    encoder, x, other = MLP(1, 2, depth=1, use_bias=True), points(4, 3), points(5, 3, seed=1)
    params = encoder.init(jax.random.key(0), x)
    expected = (np.asarray(x) @ np.asarray(other).T / 3 + 1)[:, :, None, None] * np.eye(2)
    assert relative(ntk(encoder.apply, params, x, other), expected) < ROUNDING


@pytest.mark.slow
def test_two_view_gives_the_blocks_of_the_two_views(x64):
    apply, params, xa = mixed(4)
    xb = points(4, 4, seed=1)
    expected = [ntk(apply, params, *pair) for pair in ((xa, xa), (xa, xb), (xb, xb))]
    for memory in (2**30, 2500):
        blocks = two_view(apply, params, xa, xb, memory=memory)
        for block, alone in zip(blocks, expected, strict=True):
            assert relative(block, alone) < ROUNDING


def test_the_vector_product_contracts_the_kernel(x64):
    apply, params, x = mixed()
    other, vector = points(5, 4, seed=1), points(5, 3, seed=2)
    expected = np.einsum("ijop,jp->io", ntk(apply, params, x, other), vector)
    assert relative(ntk_vector_product(apply, params, x, other, vector), expected) < ROUNDING
    # The quadratic form is a squared norm.
    assert float(jnp.sum(vector * ntk_vector_product(apply, params, other, other, vector))) > 0


@pytest.mark.slow
@pytest.mark.parametrize("method", empirical.METHODS)
def test_float32_errs_by_rounding_only(method):
    # A chain of 2 · depth products, each a sum of up to `width` terms whose roundings add up like √width at random.
    depth, width = 3, 256
    encoder, x = MLP(width, 2, depth=depth), points(6, 16, dtype=jnp.float32)
    params = encoder.init(jax.random.key(0), x)
    single = empirical_ntk(encoder.apply, params, x, method=method)
    with jax.enable_x64(True):
        exact = empirical_ntk(encoder.apply, *jax.tree.map(lambda leaf: leaf.astype(jnp.float64), (params, x)))
    assert single.dtype == jnp.float32
    assert relative(single, exact) < 2 * depth * width**0.5 * np.finfo(np.float32).eps


@pytest.mark.slow
def test_the_kernel_is_a_function_like_any_other_under_transformations(x64):
    apply, params, x = mixed(4)
    kernel = empirical_ntk(apply, params, x)
    assert relative(quickly(lambda p, x: empirical_ntk(apply, p, x), params, x), kernel) < ROUNDING
    # What a jitted function closes over is concrete, and may still not be looked at by tracing code.
    assert relative(quickly(lambda x: empirical_ntk(apply, params, x), x), kernel) < ROUNDING
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), params)
    both = quickly(jax.vmap(lambda p: empirical_ntk(apply, p, x, memory=2500)), stacked)
    assert relative(both[0], kernel) < ROUNDING

    def size(params, method):
        return jnp.sum(empirical_ntk(apply, params, x, method=method) ** 2)

    gradients = [quickly(jax.grad(partial(size, method=method)), params) for method in ("structured", "jacobian")]
    left, right = (jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(g)]) for g in gradients)
    assert relative(left, right) < 1e-10


def test_the_kernel_is_compiled_once_for_equal_shapes():
    encoder, x = MLP(8, 2), points(4, 3, dtype=jnp.float32)
    params = encoder.init(jax.random.key(0), x)
    empirical_ntk(encoder.apply, params, x)
    compiled = empirical._kernel._cache_size()
    empirical_ntk(encoder.apply, jax.tree.map(lambda leaf: 2 * leaf, params), x + 1)
    assert empirical._kernel._cache_size() == compiled


def plain(params, x):
    """A small convolutional network without flax."""
    h = x.reshape(-1, 8, 8, 1)
    for kernel in params[:-1]:
        numbers = ("NHWC", "HWIO", "NHWC")
        h = jnp.tanh(jax.lax.conv_general_dilated(h, kernel, (1, 1), "SAME", dimension_numbers=numbers))
    return jnp.matmul(h.mean((1, 2)), params[-1])


# (encoder or apply, points, MiB of memory, method, whether symmetric). Used, beside two kernels, with jaxlib 0.10.2 on
# a CPU: two layers 58%, depth 4 49%, Jacobian 59%, convolutions 64%, plain function 29%; with 0.12.0 Jacobian 85%.
WIDE = {
    "two layers": (MLP(4096, 4), 48, 4, "structured", False),
    "two layers, symmetric": (MLP(4096, 4), 48, 4, "structured", True),
    "depth 4": (MLP(1024, 4, depth=4, use_bias=True), 48, 4, "structured", False),
    "jacobian": (MLP(256, 4, depth=3), 48, 16, "jacobian", False),
    "convolutions": (CNN(32, 4, (8, 8, 1)), 32, 8, "structured", False),
    "attention": (Transformer(32, 4, depth=1), 24, 4, "structured", False),
    "plain function": (plain, 32, 2, "structured", True),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", WIDE)
def test_the_compiled_program_keeps_within_its_memory(name):
    model, n, mebibytes, method, symmetric = WIDE[name]
    x, memory = points(n, 64, dtype=jnp.float32), mebibytes * 2**20
    if model is plain:
        apply, params = model, [points(*shape, dtype=jnp.float32) for shape in ((3, 3, 1, 16), (3, 3, 16, 16), (16, 4))]
    else:
        apply, params = model.apply, jax.eval_shape(model.init, jax.random.key(0), x)
    parts = empirical._parts(apply, params, x, x, method, memory, n)
    assert any(part.rows < n for part in parts)
    sizes = empirical._kernel.lower(apply, params, x, x, parts, symmetric).compile().memory_analysis()
    # The blocks before and after they are put in order are two copies of the kernel. Below a quarter the bound would
    # be met by waste: too many blocks.
    assert memory / 4 <= sizes.temp_size_in_bytes <= memory + 2 * sizes.output_size_in_bytes


def untouched(params, x):
    pytest.fail("the encoder was called before its arguments were checked")


X = np.ones((3, 2), np.float32)
W = {"w": np.ones((2, 2), np.float32)}


def linear(params, x):
    return jnp.matmul(x, params["w"])


BAD = {
    "an unknown method": (lambda x: empirical_ntk(untouched, W, x, method="fast"), ValueError, "choose one of"),
    "no points": (lambda x: empirical_ntk(untouched, W, x[:0]), ValueError, "at least one point"),
    "points of other shape": (lambda x: empirical_ntk(untouched, W, x, x[:, :1]), ValueError, "points of one shape"),
    "NaN in x1": (lambda x: empirical_ntk(untouched, W, x * jnp.nan), ValueError, "x1 has entries.*not finite"),
    "infinity in x2": (lambda x: empirical_ntk(untouched, W, x, x / 0), ValueError, "x2 has entries.*not finite"),
    "NaN parameters": (lambda x: empirical_ntk(untouched, {"w": x * jnp.nan}, x), ValueError, "params has entries"),
    "counters": (lambda x: empirical_ntk(untouched, {"n": jnp.arange(2)}, x), TypeError, "drop counters"),
    "statistics": (lambda x: empirical_ntk(untouched, {"params": W, "batch_stats": W}, x), ValueError, "batch_stats"),
    "no parameters": (lambda x: empirical_ntk(untouched, {}, x), TypeError, "non-empty"),
    "numbers": (lambda x: empirical_ntk(untouched, {"w": 1.0}, x), TypeError, "floating-point arrays"),
    "an unhashable apply": (lambda x: empirical_ntk(Unhashable(), W, x), TypeError, "cannot be hashed"),
    "two outputs": (lambda x: empirical_ntk(lambda p, x: (x, x), W, x), TypeError, "return that alone"),
    "whole outputs": (lambda x: empirical_ntk(lambda p, x: x.astype(int), W, x), TypeError, "floating-point array"),
    "one number per point": (
        lambda x: empirical_ntk(lambda p, x: x[:, 0], W, x),
        ValueError,
        "one embedding per point",
    ),
    "a mean over points": (
        lambda x: empirical_ntk(lambda p, x: x.mean(0, keepdims=True), W, x),
        ValueError,
        "one embedding per point",
    ),
    "a mesh of two axes": (
        lambda x: empirical_ntk(untouched, W, x, mesh=jax.make_mesh((1, 1), ("a", "b"))),
        ValueError,
        "mesh of one axis",
    ),
    "views of different length": (lambda x: two_view(untouched, W, x, x[:2]), ValueError, "must have the same shape"),
    "a short vector": (lambda x: ntk_vector_product(linear, W, x, x, x[:2]), ValueError, r"\(3, 2\)"),
    "a vector with NaN": (lambda x: ntk_vector_product(linear, W, x, x, x * jnp.nan), ValueError, "vector has entries"),
    "a half vector": (
        lambda x: ntk_vector_product(linear, W, x, x, x.astype(jnp.float16)),
        TypeError,
        "cast it with astype",
    ),
}


class Unhashable:
    __hash__ = None

    def __call__(self, params, x):
        return untouched(params, x)


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named_before_any_work(name):
    call, kind, message = BAD[name]
    with pytest.raises(kind, match=message):
        call(jnp.asarray(X))


def test_all_errors_say_what_to_do():
    # Every message has a cause and, after a colon, a remedy.
    for call, kind, _ in BAD.values():
        with pytest.raises(kind) as caught:
            call(jnp.asarray(X))
        assert ": " in str(caught.value)


@pytest.mark.parametrize(("n", "block"), [*itertools.product([1, 7, 12], [1, 2, 5, 12])])
def test_blocks_are_evened_out_without_adding_one(n, block):
    block = min(n, block)
    even = empirical._even(n, block)
    assert even <= block
    assert -(-n // even) == -(-n // block)
