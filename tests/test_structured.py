"""Every way of computing the kernel agrees with the naive J Jᵀ, whatever `apply` is made of."""

import itertools
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compilation import quickly

from theorykit.encoders import CNN, MLP, Conv, Dense, Transformer
from theorykit.ntk import empirical_ntk, structured
from theorykit.ntk.empirical import METHODS

# Relative, in float64: what the contract of the module promises. Rounding is 1e-15 here.
TOLERANCE = 1e-10


def points(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def started(module, x):
    """(apply, params, x) with generic parameters in float64: no bias is 0 and no scale is 1."""
    with jax.numpy_dtype_promotion("standard"):  # the parameters of flax's own layers start in float32
        shapes = jax.eval_shape(module.init, jax.random.key(1), x)
    generator = np.random.default_rng(2)
    return module.apply, jax.tree.map(lambda leaf: jnp.asarray(generator.normal(size=leaf.shape)), shapes), x


def naive(apply, params, x):
    """The full Jacobian, contracted."""
    jacobian = jax.jacrev(apply)(params, x)
    j = jnp.concatenate([leaf.reshape(*leaf.shape[:2], -1) for leaf in jax.tree.leaves(jacobian)], axis=-1)
    return jnp.einsum("iom,jpm->ijop", j, j, precision="highest")


def check(apply, params, x, uncovered=()):
    """All methods agree; the leaves left to the Jacobian are those whose path holds one of the given words."""

    def kernels(params, x):
        found = {method: empirical_ntk(apply, params, x, method=method) for method in METHODS}
        return found | {"naive": naive(apply, params, x)}

    found = quickly(kernels, params, x)
    size = np.linalg.norm(found["naive"])
    assert size > 0
    for (name, left), (other, right) in itertools.combinations(found.items(), 2):
        gap = np.linalg.norm(np.asarray(left) - np.asarray(right)) / size
        assert gap < TOLERANCE, f"{name} and {other} differ by {gap:.1e}"
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    left_over = {path for leaf, path in enumerate(paths) if leaf not in shapes_of_shares(apply, params, x)}
    assert left_over == {path for path in paths if any(word in path for word in uncovered)}


def shapes_of_shares(apply, params, x):
    return jax.eval_shape(partial(structured.shares, apply), params, x)


ALL = ("",)  # occurs in every path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("depth", "activation", "use_bias", "parametrisation"),
    [
        (1, "relu", False, "ntk"),
        (1, "tanh", True, "standard"),
        (2, "relu", True, "ntk"),
        (2, "erf", False, "standard"),
        (3, "tanh", True, "ntk"),
        (3, "gelu", True, "standard"),
        (4, "identity", False, "ntk"),
        (4, "relu", True, "standard"),
    ],
)
def test_methods_agree_on_perceptrons(x64, depth, activation, use_bias, parametrisation):
    settings = {"use_bias": use_bias, "parametrisation": parametrisation, "weight_std": 1.3, "bias_std": 0.7}
    encoder = MLP(7, 3, depth=depth, activation=activation, **settings)
    check(*started(encoder, points(5, 4)))


class Convolutions(nn.Module):
    """Two convolutions with the given attributes and a dense layer."""

    kind: type
    options: tuple

    @nn.compact
    def __call__(self, x):
        for _ in range(2):
            x = jnp.tanh(self.kind(3, **dict(self.options))(x))
        return Dense(2)(x.reshape(x.shape[0], -1))


def convolutions(kind, **options):
    return Convolutions(kind, tuple(options.items()))


@pytest.mark.slow
@pytest.mark.parametrize("pooling", ["average", "flatten"])
def test_methods_agree_on_convolutional_encoders(x64, pooling):
    check(*started(CNN(3, 2, (4, 3, 2), pooling=pooling, use_bias=True, weight_std=1.2), points(3, 24)))


@pytest.mark.slow
@pytest.mark.parametrize("padding", ["SAME", "VALID", "CIRCULAR"])
def test_methods_agree_on_strided_convolutions(x64, padding):
    module = convolutions(Conv, kernel_size=(3, 2), strides=(2, 1), padding=padding, use_bias=True)
    check(*started(module, points(3, 7, 5, 2)))


FLAX_CONVOLUTIONS = {
    "plain": {"kernel_size": (3, 3)},
    "a circular stride": {"kernel_size": (3, 3), "strides": 2, "padding": "CIRCULAR"},
    "circular and dilated": {"kernel_size": (2, 3), "kernel_dilation": (1, 2), "padding": "CIRCULAR"},
    "reflected": {"kernel_size": (3, 2), "padding": "REFLECT"},
    "padded by a number": {"kernel_size": (2, 2), "padding": 1, "strides": (2, 1)},
    "padded by pairs and dilated inside": {"kernel_size": (3, 3), "padding": ((1, 0), (2, 1)), "input_dilation": 2},
    "one spatial axis over two leading ones": {"kernel_size": 3},
    "causal": {"kernel_size": (2,), "padding": "CAUSAL", "kernel_dilation": 2},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FLAX_CONVOLUTIONS)
def test_methods_agree_on_flax_convolutions(x64, name):
    check(*started(convolutions(nn.Conv, **FLAX_CONVOLUTIONS[name]), points(3, 6, 6, 2)))


@pytest.mark.slow
@pytest.mark.parametrize("order", ["gram", "gradient"])
def test_both_orders_of_summing_over_positions_agree(x64, order):
    # 2 positions and wide layers favour Gram matrices over positions; 25 positions and narrow layers gradients.
    options = {"kernel_size": (2, 1), "padding": "SAME"}
    apply, params, x = started(
        convolutions(Conv, **options), points(3, *((2, 1, 30) if order == "gram" else (5, 5, 1)))
    )
    shares = shapes_of_shares(apply, params, x)
    leaves = [leaf.ndim for leaf in jax.tree.leaves(params)]
    kept_by_position = [shares[leaf].inputs is not None for leaf, ndim in enumerate(leaves) if ndim == 4]
    assert kept_by_position[0] == (order == "gram")
    check(apply, params, x)


@pytest.mark.slow
def test_methods_agree_on_transformers(x64):
    encoder = Transformer(4, 2, tokens=(3, 2), depth=1, heads=2, mlp_ratio=2, use_bias=True)
    check(*started(encoder, points(4, 6)), uncovered=("norm", "positions"))


class Everything(nn.Module):
    """Tokens and pixels: an embedding table, a convolution, a layer norm, dense layers on sequences and vectors."""

    @nn.compact
    def __call__(self, x):
        table = nn.Embed(5, 3)(jnp.arange(5) % 5)
        weights = jax.nn.softmax(nn.Dense(5)(x.reshape(x.shape[0], -1, 4)))
        tokens = nn.LayerNorm(param_dtype=x.dtype)(jnp.matmul(weights, table))
        image = nn.Conv(2, (2, 2))(x.reshape(x.shape[0], 4, 4, 1))
        flat = jnp.concatenate([tokens.reshape(x.shape[0], -1), image.reshape(x.shape[0], -1)], axis=-1)
        return nn.Dense(2, use_bias=False)(flat)


@pytest.mark.slow
def test_methods_agree_on_a_plain_flax_model(x64):
    with jax.numpy_dtype_promotion("standard"):  # flax's layer norm promotes
        check(*started(Everything(), points(3, 16)), uncovered=("LayerNorm", "Embed"))


class Words(nn.Module):
    """Whole-number inputs, and an embedding table that is used again at the output."""

    @nn.compact
    def __call__(self, x):
        table = nn.Embed(6, 4)
        return table.attend(jnp.tanh(nn.Dense(4)(table(x)))).mean(1)


def test_a_table_tied_to_the_output_by_attend_is_left_to_the_jacobian(x64):
    check(*started(Words(), jnp.asarray([[0, 1, 2], [3, 3, 5], [4, 0, 0]])), uncovered=("embedding",))


class Tied(nn.Module):
    """One layer at several places, on tokens and on vectors."""

    @nn.compact
    def __call__(self, x):
        layer = nn.Dense(4)
        tokens = jnp.tanh(layer(jnp.tanh(layer(x.reshape(x.shape[0], 3, 4)))))
        return nn.Dense(2)(layer(tokens.mean(1)))


def test_a_layer_called_several_times_is_summed_over_its_calls(x64):
    check(*started(Tied(), points(4, 12)))


class UsedBeside(nn.Module):
    """A kernel that its layer shares with the rest of the model."""

    @nn.compact
    def __call__(self, x):
        layer = nn.Dense(4, name="shared")
        h = jnp.tanh(layer(x))
        kernel = self.variables["params"]["shared"]["kernel"]
        return nn.Dense(2)(h) + jnp.sum(jnp.matmul(h, kernel.T), axis=1, keepdims=True)


def test_a_kernel_used_outside_its_layer_is_left_to_the_jacobian(x64):
    check(*started(UsedBeside(), points(4, 3)), uncovered=("['shared']['kernel']",))


class Rescaled(nn.Dense):
    """A subclass with the parameters of nn.Dense and another function."""

    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features), self.param_dtype)
        return jnp.matmul(x, kernel / jnp.linalg.norm(kernel, axis=0, keepdims=True))


def doubled(*operands, **options):
    return 2 * jax.lax.dot_general(*operands, **options)


def cubed(*arrays, dtype):
    return [None if array is None else array**3 for array in arrays]


LOOK_ALIKES = {
    "a subclass": Rescaled(4, use_bias=False),
    "another product": nn.Dense(4, dot_general=doubled),
    "another rounding": nn.Dense(4, promote_dtype=cubed),
    "normalised weights": nn.WeightNorm(nn.Dense(4)),
    "remat": nn.remat(nn.Dense)(4),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LOOK_ALIKES)
def test_layers_that_only_look_dense_are_left_to_the_jacobian(x64, name):
    with jax.numpy_dtype_promotion("standard"):  # flax's WeightNorm promotes
        module = nn.Sequential([jnp.sin, LOOK_ALIKES[name], jnp.tanh, nn.Dense(2)])
        check(*started(module, points(4, 3)), uncovered=("layers_1",))


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"feature_group_count": 2}, {"mask": np.tril(np.ones((1, 3, 2, 4)))}])
def test_grouped_and_masked_convolutions_are_left_to_the_jacobian(x64, options):
    module = nn.Sequential([nn.Conv(4, (1, 3), **options), lambda h: jnp.tanh(h).mean((1, 2)), nn.Dense(2)])
    check(*started(module, points(3, 2, 3, 2)), uncovered=("layers_0",))


def test_a_layer_that_rounds_to_another_dtype_is_left_to_the_jacobian(x64):
    with jax.numpy_dtype_promotion("standard"):  # what the layer's dtype is for
        module = nn.Sequential([nn.Dense(4, dtype=jnp.float32), jnp.tanh, nn.Dense(2, dtype=jnp.float64)])
        apply, params, x = started(module, points(4, 3))
        gap = empirical_ntk(apply, params, x) - empirical_ntk(apply, params, x, method="jacobian")
        assert float(jnp.abs(gap).max()) < TOLERANCE  # 1e-8 if the layer's input were taken as it came
        assert not shapes_of_shares(apply, params, x)


def scaled_by_an_interceptor(apply):
    def interceptor(proceed, args, kwargs, context):
        return 2 * proceed(*args, **kwargs) if isinstance(context.module, nn.Dense) else proceed(*args, **kwargs)

    def wrapped(params, x):
        with nn.intercept_methods(interceptor):
            return apply(params, x)

    return wrapped


def in_a_scan(apply, steps):
    """A recurrent network with f(h, x_t) -> h as its cell."""

    def wrapped(params, x):
        def step(h, _):
            return apply(params, jnp.concatenate([h, x], -1)), None

        return jax.lax.scan(step, jnp.zeros((x.shape[0], 2), x.dtype), length=steps)[0]

    return wrapped


WRAPPERS = {
    "jit": (lambda f: jax.jit(f), ()),
    "permuted rows": (lambda f: lambda p, x: f(p, x[::-1])[::-1], ()),
    "vmap over points": (lambda f: lambda p, x: jax.vmap(lambda row: f(p, row[None])[0])(x), ALL),
    "vmap over vectors": (lambda f: lambda p, x: jax.vmap(lambda row: f(p, row))(x), ALL),
    "remat": (lambda f: jax.checkpoint(f), ALL),
    "remat over a closure": (lambda f: lambda p, x: jax.checkpoint(lambda x: f(p, x))(x), ALL),
    "cond": (
        lambda f: (
            lambda p, x: jax.lax.cond(jax.tree.leaves(p)[0].sum() > 0, lambda x: f(p, x), lambda x: -f(p, 2 * x), x)
        ),
        ALL,
    ),
    "gradient": (lambda f: lambda p, x: jax.grad(lambda x: (f(p, x) ** 2).sum())(x), ALL),
    "tangent": (lambda f: lambda p, x: jax.jvp(lambda x: f(p, x), (x,), (x**2,))[1], ALL),
    "interceptor": (scaled_by_an_interceptor, ALL),
    "scaled parameters": (lambda f: lambda p, x: f(jax.tree.map(lambda leaf: leaf**2, p), x), ALL),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", WRAPPERS)
def test_methods_agree_on_a_wrapped_apply(x64, name):
    wrap, uncovered = WRAPPERS[name]
    apply, params, x = started(nn.Sequential([nn.Dense(4), jnp.tanh, nn.Dense(2)]), points(4, 3))
    check(wrap(apply), params, x, uncovered)


def test_a_recurrent_cell_is_summed_over_its_steps(x64):
    apply, params, _ = started(nn.Dense(2), points(4, 5))
    check(in_a_scan(apply, 3), params, points(4, 3))


def test_a_jitted_apply_from_the_cache_is_still_seen_and_still_works(x64):
    apply, params, x = started(nn.Sequential([nn.Dense(4), jnp.tanh, nn.Dense(2)]), points(4, 3))
    traces = []

    @jax.jit
    def jitted(params, x):
        traces.append(x.shape)
        return apply(params, x)

    before = jitted(params, x)
    check(jitted, params, x)
    traces.clear()
    np.testing.assert_array_equal(jitted(params, x), before)
    assert not traces


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["flattened", "tokens first", "vmap over tokens"])
def test_tokens_may_be_laid_out_in_any_way(x64, layout):
    apply, params, x = started(nn.Sequential([nn.Dense(4), jnp.tanh, nn.Dense(2)]), points(4, 3, 5))
    wrapped = {
        "flattened": lambda p, x: apply(p, x.reshape(-1, 5)).reshape(x.shape[0], 3, 2).mean(1),
        "tokens first": lambda p, x: apply(p, x.swapaxes(0, 1)).mean(0),
        "vmap over tokens": lambda p, x: jax.vmap(lambda t: apply(p, t), in_axes=1)(x).mean(0),
    }[layout]
    check(wrapped, params, x, uncovered=ALL if layout == "vmap over tokens" else ())


@pytest.mark.slow
@pytest.mark.parametrize("n", [1, 4, 5])
def test_an_axis_may_have_the_length_of_the_batch(x64, n):
    # 4 tokens first, 4 features inside, and a layer on 1 row of constants: none of them is the batch.
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            h = jnp.tanh(nn.Dense(4)(x.reshape(x.shape[0], 4, 2).swapaxes(0, 1)))
            shift = nn.Dense(2)(jnp.ones((1, 3), x.dtype))
            return nn.Dense(2)(h.mean(0)) + shift

    check(*started(Model(), points(n, 8)))


class Sum(nn.Module):
    """A module whose only argument is no array."""

    @nn.compact
    def __call__(self, pair):
        return nn.Dense(3)(jnp.tanh(pair[0] + pair[1]))


def test_modules_may_take_any_argument(x64):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return Sum()((x, nn.Dense(4)(x)))

    check(*started(Model(), points(3, 4)))


@pytest.mark.slow
def test_two_encoders_in_one_tree_of_parameters(x64):
    left, params_left, x = started(MLP(4, 2, use_bias=True), points(4, 3))
    right, params_right, _ = started(nn.Sequential([nn.Dense(3), jnp.tanh, nn.Dense(2)]), points(4, 3, seed=5))

    def both(params, x):
        return left(params["left"], x) * 2 + right(params["right"], x) * left(params["left"], 1 - x)

    check(both, {"left": params_left, "right": params_right}, x)


def test_a_plain_function_needs_no_flax(x64):
    def apply(params, x):
        hidden = jnp.tanh(jnp.matmul(x, params["in"]) + params["shift"][None])
        return jnp.matmul(hidden, params["out"]) * params["scale"]

    params = {"in": points(3, 5), "shift": points(5), "out": points(5, 2), "scale": points()}
    check(apply, params, points(4, 3), uncovered=ALL)
