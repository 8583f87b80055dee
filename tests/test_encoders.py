"""Encoders: shapes, parametrisations, layers against naive formulas, and refusals of bad input."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from theorykit import _layers, _transformer, encoders
from theorykit.encoders import CNN, MLP, Conv, Dense, NoInfiniteKernel, Transformer

SMALL = [
    MLP(6, 3),
    MLP((5, 4), 3, depth=3, activation="tanh", use_bias=True),
    MLP(1, 3, depth=1),
    CNN(4, 3, (4, 4, 1), use_bias=True),
    CNN((4, 2), 3, (4, 2, 2), pooling="flatten", activation="erf"),
    Transformer(8, 3, tokens=(4, 4), depth=1, heads=2, use_bias=True),
]
NAMES = [type(encoder).__name__ + str(i) for i, encoder in enumerate(SMALL)]


def rows(n: int = 5, d: int = 16, dtype: str = "float32"):
    return jnp.asarray(np.random.default_rng(0).normal(size=(n, d)), dtype)


@functools.cache
def _initialised(encoder, shape, dtype):
    # One compiled program for all tests, not one for each small operation.
    return jax.jit(encoder.init)(jax.random.key(1), jnp.ones(shape, dtype))


def initialised(encoder, x):
    return _initialised(encoder, x.shape, x.dtype.name)


@pytest.mark.parametrize("encoder", SMALL, ids=NAMES)
@pytest.mark.parametrize("parametrisation", _layers.PARAMETRISATIONS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_parameters_and_embeddings_take_the_dtype_of_the_input(encoder, parametrisation, dtype):
    with jax.enable_x64(dtype == "float64"):
        encoder = encoder.clone(parametrisation=parametrisation)
        embeddings, params = jax.eval_shape(encoder.init_with_output, jax.random.key(1), rows(dtype=dtype))
        assert embeddings.shape == (5, 3) and embeddings.dtype == dtype
        assert {str(leaf.dtype) for leaf in jax.tree.leaves(params)} == {dtype}


@pytest.mark.slow
@pytest.mark.parametrize("encoder", SMALL, ids=NAMES)
def test_each_row_is_embedded_alone(encoder):
    x = rows()
    params = initialised(encoder, x)
    apply = jax.jit(encoder.apply)
    together = apply(params, x)
    alone = jnp.concatenate([apply(params, x[i : i + 1]) for i in range(len(x))])
    # The same sums of at most 64 terms, perhaps in another order: a few roundings of values of order 1.
    np.testing.assert_allclose(together, alone, atol=64 * np.finfo(np.float32).eps)


@pytest.mark.parametrize("encoder", SMALL, ids=NAMES)
def test_equal_encoders_hash_alike(encoder):
    assert encoder == encoder.clone() and hash(encoder) == hash(encoder.clone())
    assert encoder != encoder.clone(features=4)


def test_the_same_key_draws_the_same_parameters():
    x = rows()
    first, second = (MLP(6, 3, use_bias=True).init(jax.random.key(1), x) for _ in range(2))
    assert jax.tree.all(jax.tree.map(np.array_equal, first, second))


def test_lists_from_a_configuration_file_become_tuples():
    assert MLP([5, 4], 3, depth=3) == MLP((5, 4), 3, depth=3)
    assert CNN([4, 2], 3, [4, 4, 1]) == CNN((4, 2), 3, (4, 4, 1))


def test_two_layer_mlp_is_the_formula_of_the_theory(x64):
    x = rows(dtype="float64")
    params = initialised(MLP(6, 3), x)
    v, w = (np.asarray(params["params"][name]["kernel"]) for name in ("dense_0", "dense_1"))
    expected = np.maximum(np.asarray(x) @ v / np.sqrt(16), 0) @ w / np.sqrt(6)
    np.testing.assert_allclose(MLP(6, 3).apply(params, x), expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("name", "formula"),
    [
        ("relu", lambda u: np.maximum(u, 0)),
        ("tanh", np.tanh),
        ("erf", scipy.special.erf),
        ("gelu", lambda u: u * scipy.special.ndtr(u)),
        ("identity", lambda u: u),
    ],
)
def test_activations_are_the_functions_they_are_named_after(x64, name, formula):
    u = np.linspace(-6, 6, 101)
    np.testing.assert_allclose(encoders.ACTIVATIONS[name](jnp.asarray(u)), formula(u), rtol=1e-12, atol=1e-15)


@pytest.mark.slow
@pytest.mark.parametrize("layer", [Dense(7, use_bias=True), Conv(7, kernel_size=(3, 2), use_bias=True)])
def test_a_layer_is_its_scale_times_the_kernel_plus_its_bias_scale_times_the_bias(x64, layer):
    layer = layer.clone(weight_std=1.5, bias_std=0.3)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 4, 5)))
    params = initialised(layer, x)
    kernel, bias = params["params"]["kernel"], params["params"]["bias"]
    fan_in = kernel.size // 7
    unscaled = layer.clone(parametrisation="standard")
    assert unscaled.scale(fan_in) == 1.0 and unscaled.bias_scale == 1.0
    same = {"params": {"kernel": layer.scale(fan_in) * kernel, "bias": layer.bias_scale * bias}}
    np.testing.assert_allclose(layer.apply(params, x), unscaled.apply(same, x), rtol=1e-12)
    assert layer.scale(fan_in) == pytest.approx(1.5 / np.sqrt(fan_in)) and layer.bias_scale == 0.3


@pytest.mark.parametrize("parametrisation", _layers.PARAMETRISATIONS)
def test_both_parametrisations_draw_the_same_function(parametrisation):
    layer = Dense(4096, use_bias=True, parametrisation=parametrisation, weight_std=1.5, bias_std=0.5)
    x = jnp.ones((1, 9))
    y = layer.apply(layer.init(jax.random.key(2), x), x)
    # Var y = weight_std² |x|²/d + bias_std² = 2.5; a sample variance of 4096 Gaussians is within 4 standard errors.
    assert jnp.var(y) == pytest.approx(2.5, abs=4 * 2.5 * np.sqrt(2 / 4096))


def naive_convolution(x, kernel, strides, padding):
    """Every output by its sum, in a padded image of zeros or of copies."""
    n, height, width, _ = x.shape
    a, b, _, features = kernel.shape
    s, t = strides
    out = [-(-height // s), -(-width // t)]
    if padding == "VALID":
        out, top, left = [(height - a) // s + 1, (width - b) // t + 1], 0, 0
    else:
        top = max((out[0] - 1) * s + a - height, 0) // 2
        left = max((out[1] - 1) * t + b - width, 0) // 2
    y = np.zeros((n, *out, features))
    for h, w, i, j in np.ndindex(*out, a, b):
        row, column = h * s + i - top, w * t + j - left
        if padding == "CIRCULAR":
            row, column = row % height, column % width
        if 0 <= row < height and 0 <= column < width:
            y[:, h, w] += x[:, row, column] @ kernel[i, j]
    return y


@pytest.mark.parametrize("padding", _layers.PADDINGS)
@pytest.mark.parametrize(
    ("size", "kernel_size", "strides"), [((5, 4), (3, 3), (1, 1)), ((5, 6), (2, 3), (1, 2)), ((6, 3), (3, 2), (2, 1))]
)
def test_convolution_is_the_naive_sum(x64, size, kernel_size, strides, padding):
    layer = Conv(2, kernel_size=kernel_size, strides=strides, padding=padding, parametrisation="standard")
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=(2, *size, 3)), rng.normal(size=(*kernel_size, 3, 2))
    y = layer.apply({"params": {"kernel": jnp.asarray(kernel)}}, jnp.asarray(x))
    np.testing.assert_allclose(y, naive_convolution(x, kernel, strides, padding), atol=1e-12)


@pytest.mark.slow
def test_cnn_with_average_pooling_and_one_position_is_an_mlp(x64):
    x = rows(dtype="float64")
    cnn, mlp = CNN(6, 3, (1, 1, 16), kernel_size=(1, 1), use_bias=True), MLP(6, 3, depth=3, use_bias=True)
    params = initialised(mlp, x)["params"]
    moved = {name: dict(params[old]) for name, old in zip(("conv_0", "conv_1", "head"), params, strict=True)}
    for name in ("conv_0", "conv_1"):
        moved[name]["kernel"] = moved[name]["kernel"][None, None]
    np.testing.assert_allclose(cnn.apply({"params": moved}, x), mlp.apply({"params": params}, x), rtol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("encoder", "shape"), [(CNN(4, 3, (4, 2, 2)), (4, 2, 2)), (Transformer(8, 3, tokens=(4, 4)), (4, 4))]
)
def test_flat_and_shaped_inputs_give_the_same_embeddings(encoder, shape):
    x = rows()
    params = initialised(encoder, x)
    apply = jax.jit(encoder.apply)
    np.testing.assert_array_equal(apply(params, x), apply(params, x.reshape(-1, *shape)))


@pytest.mark.slow
def test_without_positions_the_transformer_ignores_the_order_of_tokens(x64):
    x = rows(dtype="float64")
    for learn_positions in (False, True):
        encoder = Transformer(8, 3, tokens=(4, 4), learn_positions=learn_positions)
        params = initialised(encoder, x)
        apply = jax.jit(encoder.apply)
        change = jnp.abs(apply(params, x) - apply(params, x.reshape(5, 4, 4)[:, ::-1])).max()
        assert (change < 1e-12) == (not learn_positions)


def test_attention_is_the_softmax_average_of_values_in_each_head(x64):
    q, k, v = jnp.asarray(np.random.default_rng(0).normal(size=(3, 2, 3, 4)))
    out = np.asarray(_transformer.attention(q, k, v, 2, "highest"))
    for n, head in np.ndindex(2, 2):
        part = np.s_[2 * head : 2 * head + 2]
        logits = np.asarray(q)[n, :, part] @ np.asarray(k)[n, :, part].T / np.sqrt(2)
        expected = scipy.special.softmax(logits, axis=1) @ np.asarray(v)[n, :, part]
        np.testing.assert_allclose(out[n, :, part], expected, rtol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("encoder", SMALL, ids=NAMES)
def test_every_parameter_has_a_finite_gradient_that_is_not_all_zero(encoder):
    x = rows()
    params = initialised(encoder, x)
    gradient = jax.jit(jax.grad(lambda p: jnp.sum(encoder.apply(p, x) ** 2)))(params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        # A key's bias shifts all logits of a query alike, which the softmax does not see.
        invisible = "key_" in str(path) and "bias" in str(path)
        assert jnp.isfinite(leaf).all()
        assert invisible or jnp.abs(leaf).max() > 0, path


@pytest.mark.parametrize("encoder", SMALL, ids=NAMES)
def test_matrix_products_ask_for_the_highest_precision(encoder):
    x = rows()
    params = jax.eval_shape(encoder.init, jax.random.key(1), x)
    jaxpr = str(jax.make_jaxpr(encoder.apply)(params, x))
    products = jaxpr.count("dot_general[") + jaxpr.count("conv_general_dilated[")
    assert (
        0
        < products
        == jaxpr.count("precision=(Precision.HIGHEST, Precision.HIGHEST)") + jaxpr.count("precision=HIGHEST")
    )


def test_infinite_layers_read_like_the_architecture():
    dense, relu = encoders.DenseLayer(1.0, None), encoders.ActivationLayer("relu")
    assert MLP(6, 3, depth=3).infinite_layers() == (dense, relu, dense, relu, dense)
    conv = encoders.ConvLayer((3, 3), 1.0, 0.5)
    layers = CNN(4, 3, (4, 4, 1), depth=2, use_bias=True, bias_std=0.5).infinite_layers()
    image, pool = encoders.ImageLayer((4, 4, 1)), encoders.PoolLayer("average")
    assert layers == (image, conv, relu, pool, encoders.DenseLayer(1.0, 0.5))


def test_encoders_without_an_infinite_kernel_say_why_and_what_to_use():
    with pytest.raises(NoInfiniteKernel, match=r"softmax attention.*ntk\.empirical_ntk"):
        Transformer(8, 3).infinite_layers()
    for encoder in (MLP(6, 3, parametrisation="standard"), CNN(4, 3, (4, 4, 1), parametrisation="standard")):
        with pytest.raises(NoInfiniteKernel, match=r'grows in proportion to the width.*parametrisation="ntk"'):
            encoder.infinite_layers()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: MLP(0, 3), "width must be at least 1 and is 0"),
        (lambda: MLP((4, -1), 3, depth=3), "width must be at least 1 and is -1"),
        (lambda: MLP((4, 4), 3), "width needs 1 whole numbers"),
        (lambda: MLP(4, 0), "features must be at least 1"),
        (lambda: MLP(4, 3, depth=0), "depth must be at least 1"),
        (lambda: MLP(4, 3, activation="swish"), "Unknown activation 'swish': choose one of relu, tanh, erf, gelu"),
        (lambda: MLP(4, 3, parametrisation="mup"), "Unknown parametrisation 'mup': choose one of ntk, standard"),
        (lambda: MLP(4, 3, weight_std=0.0), "weight_std must be positive"),
        (lambda: MLP(4, 3, bias_std=float("nan")), "bias_std must be finite"),
        (lambda: CNN(0, 3, (4, 4, 1)), "channels must be at least 1"),
        (lambda: CNN(4, 3, (4, 4)), "image_shape needs 3 whole numbers"),
        (lambda: CNN(4, 3, (4, 4, 1), depth=1), "depth at least 2.*use MLP"),
        (lambda: CNN(4, 3, (4, 4, 1), pooling="max"), "Unknown pooling 'max'"),
        (lambda: CNN(4, 3, (4, 4, 1), activation="swish"), "Unknown activation 'swish': choose one of relu"),
        (lambda: Conv(4, padding="FULL"), "Unknown padding 'FULL'"),
        (lambda: Conv(4, strides=(0, 1)), "strides must be at least 1"),
        (lambda: Transformer(0, 3), "width must be at least 1 and is 0"),
        (lambda: Transformer(8, 3, activation="swish"), "Unknown activation 'swish': choose one of relu"),
        (lambda: Transformer(10, 3, heads=4), "heads = 4 does not divide width = 10"),
        (lambda: Transformer(8, 3, tokens=(0, 8)), "tokens must be at least 1"),
    ],
)
def test_impossible_architectures_are_refused_before_any_work(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize(
    ("encoder", "x", "message"),
    [
        (MLP(4, 3), np.ones((2, 4, 4)), r"MLP expects a batch of rows, shape \(n, d\), and got \(2, 4, 4\)"),
        (CNN(4, 3, (4, 4, 1)), np.ones((2, 15)), r"\(n, 16\) or \(n, 4, 4, 1\).*got \(2, 15\)"),
        (Transformer(8, 3), np.ones((2, 4, 16)), r"\(n, 64\) or \(n, 8, 8\).*got \(2, 4, 16\)"),
        (Conv(4), np.ones((2, 16)), r"Conv expects images.*got \(2, 16\)"),
    ],
)
def test_inputs_of_the_wrong_shape_are_refused(encoder, x, message):
    with pytest.raises(ValueError, match=message):
        encoder.init(jax.random.key(0), jnp.asarray(x, jnp.float32))


def test_inputs_of_another_size_than_at_initialisation_are_refused():
    encoder = MLP(4, 3)
    params = encoder.init(jax.random.key(0), rows(d=16))
    with pytest.raises(ValueError, match=r"dense_0 holds a kernel of shape \(16, 4\).*needs \(8, 4\)"):
        encoder.apply(params, rows(d=8))


@pytest.mark.parametrize("encoder", SMALL, ids=NAMES)
def test_integer_inputs_are_refused(encoder):
    with pytest.raises(TypeError, match=r"floating-point inputs.*int32"):
        encoder.init(jax.random.key(0), jnp.ones((2, 16), jnp.int32))


def test_a_truth_value_is_not_a_size():
    with pytest.raises(TypeError, match=r"width must be a whole number of at least 1 and is True"):
        MLP(True, 3)
