"""Programs are lowered for TPU and CUDA without the machine, with full precision in every product of a kernel."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import export

from theorykit import losses, ntk, training
from theorykit._training_step import Program, advance, start
from theorykit.encoders import CNN, MLP, Transformer
from theorykit.ntk.empirical import METHODS

PLATFORMS = ["tpu", "cuda"]


def points(*shape):
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)


def lower(function, platform, *arguments):
    """The StableHLO text of a function for a platform."""
    exported = export.export(jax.jit(function), platforms=[platform])(*arguments)
    assert exported.platforms == (platform,)
    return exported.mlir_module()


def precisions(text):
    """The pairs of precisions that the program's products ask for; a default one is not always printed."""
    products = re.findall(r"stablehlo\.(?:dot_general|dot|convolution)\b.*", text)
    named = [tuple(re.findall(r"\b(DEFAULT|HIGH|HIGHEST)\b", product)) for product in products]
    assert products
    return {pair or ("DEFAULT", "DEFAULT") for pair in named}


# The second factor of the product that cuts an image into patches is a constant of zeros and ones: exact in bfloat16.
PATCHES = ("HIGHEST", "DEFAULT")
FULL = ("HIGHEST", "HIGHEST")


class Plain(nn.Module):
    """Layers that ask for no precision of their own."""

    @nn.compact
    def __call__(self, x):
        h = nn.LayerNorm()(nn.Conv(4, (3, 3))(x.reshape(-1, 8, 8, 1)))
        return nn.Dense(2)(jnp.tanh(h).reshape(x.shape[0], -1))


MODELS = {
    "perceptron": MLP(16, 2, depth=3, use_bias=True),
    "convolutions": CNN(4, 2, (8, 8, 1)),
    "transformer": Transformer(8, 2, depth=1),
    "flax": Plain(),
}


def prepared(name):
    x = points(6, 64)
    return MODELS[name].apply, jax.eval_shape(MODELS[name].init, jax.random.key(0), x), x


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", MODELS)
def test_kernels_are_lowered_at_full_precision(name, method, platform):
    apply, params, x = prepared(name)

    def kernel(params, x):
        # In blocks and at once.
        return [ntk.empirical_ntk(apply, params, x, method=method, memory=memory) for memory in (1, 2**30)]

    found = precisions(lower(kernel, platform, params, x))
    assert found <= ({FULL, PATCHES} if method == "structured" and name in ("convolutions", "flax") else {FULL})


@pytest.mark.parametrize("platform", PLATFORMS)
def test_vector_products_are_lowered_at_full_precision(platform):
    apply, params, x = prepared("flax")
    text = lower(lambda p, x, v: ntk.ntk_vector_product(apply, p, x, x, v), platform, params, x, points(6, 2))
    assert precisions(text) == {FULL}


@pytest.mark.parametrize("platform", PLATFORMS)
def test_the_check_of_precision_can_fail(platform):
    x = points(4, 4)
    assert precisions(lower(jnp.matmul, platform, x, x)) == {("DEFAULT", "DEFAULT")}
    low = MLP(16, 2, precision="default")
    params = jax.eval_shape(low.init, jax.random.key(0), x)
    text = lower(lambda p, x: ntk.empirical_ntk(low.apply, p, x), platform, params, x)
    assert ("DEFAULT", "DEFAULT") in precisions(text)


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("batch_size", [None, 2])
def test_training_is_lowered(platform, batch_size):
    apply, params, x = prepared("perceptron")
    program = Program(training.objective(apply, losses.info_nce), optax.adam(1e-2), batch_size, None, None)
    data, key = (x, x + 1), jax.random.key(0)
    state = jax.eval_shape(lambda p, data, key: start(program, p, data, key), params, data, key)
    text = lower(lambda *args: advance(program, *args), platform, state, data, key, 3)
    assert "stablehlo.while" in text
    assert precisions(text) == {FULL}


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("name", ["linear", *losses.LOSSES])
def test_losses_and_their_gradients_are_lowered_at_full_precision(name, platform):
    loss = getattr(losses, name)
    views = 3 if name == "linear" else 2
    text = lower(jax.value_and_grad(loss, argnums=tuple(range(views))), platform, *[points(6, 3)] * views)
    assert precisions(text) == {FULL}


@pytest.mark.parametrize("platform", PLATFORMS)
def test_the_flow_is_lowered_at_full_precision(platform):
    n, z = 4, 2
    full, f = points(n, n, z, z), points(n, z)

    def solve(aa, ab, bb, fa, fb, times):
        solved = ntk.flow((aa, ab, bb), losses.spectral, (fa, fb), times)
        return solved.fa, solved.fb, solved.status

    text = lower(solve, platform, full, full, full, f, f, jnp.linspace(0.0, 1.0, 3))
    assert "stablehlo.while" in text
    assert precisions(text) == {FULL}
