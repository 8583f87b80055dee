"""Infinite-width kernels: against closed forms, quadrature and naive sums, and as limits of finite encoders."""

import itertools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from theorykit.encoders import ACTIVATIONS, CNN, MLP, Dense, NoInfiniteKernel, Transformer
from theorykit.ntk import infinite
from theorykit.ntk.infinite import infinite_nngp, infinite_ntk

# Of two numbers that should agree to rounding: one rounding for each of a few hundred operations.
ROUNDING = {"float32": 1e-6, "float64": 1e-10}


def rows(n=5, d=16, dtype="float64", seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(n, d)), dtype)


# Expectations of φ(u) φ(v) and φ'(u) φ'(v), for (u, v) Gaussian with covariance c and variances q, p.


def relu_expectations(c, q, p):
    """Cho and Saul 2009, the arc-cosine kernels of degree 1 and 0."""
    angle = np.arccos(np.clip(c / np.sqrt(q * p), -1, 1))
    first = np.sqrt(q * p) * (np.sin(angle) + (np.pi - angle) * np.cos(angle)) / (2 * np.pi)
    return first, (np.pi - angle) / (2 * np.pi)


def erf_expectations(c, q, p):
    """Williams 1997, and its derivative in c."""
    product = (1 + 2 * q) * (1 + 2 * p)
    return 2 / np.pi * np.arcsin(2 * c / np.sqrt(product)), 4 / np.pi / np.sqrt(product - 4 * c**2)


def identity_expectations(c, q, p):
    return c, 1.0


def by_quadrature(fn, derivative):
    """The trapezoidal rule, whose error for analytic functions of a Gaussian falls exponentially in 1 / step."""
    points = np.linspace(-9, 9, 361)
    weights = np.exp(-(points**2) / 2) * (points[1] - points[0]) / np.sqrt(2 * np.pi)

    def expectations(c, q, p):
        correlation = np.clip(c / np.sqrt(q * p), -1, 1)
        u = np.sqrt(q) * points[:, None]
        v = np.sqrt(p) * (correlation * points[:, None] + np.sqrt(1 - correlation**2) * points[None])
        return tuple(weights @ (f(u) * f(v)) @ weights for f in (fn, derivative))

    return expectations


def gelu_derivative(u):
    return scipy.special.ndtr(u) + u * np.exp(-(u**2) / 2) / np.sqrt(2 * np.pi)


EXPECTATIONS = {
    "relu": relu_expectations,
    "erf": erf_expectations,
    "identity": identity_expectations,
    "tanh": by_quadrature(np.tanh, lambda u: 1 / np.cosh(u) ** 2),
    "gelu": by_quadrature(lambda u: u * scipy.special.ndtr(u), gelu_derivative),
}


def mlp_recursion(encoder, x):
    """(NNGP, NTK) of an MLP, entry by entry."""
    x = np.asarray(x, np.float64)
    weight, bias = encoder.weight_std**2, encoder.bias_std**2 * encoder.use_bias
    nngp = weight * x @ x.T / x.shape[1] + bias
    ntk = nngp.copy()
    for _ in range(encoder.depth - 1):
        variance, previous = np.diag(nngp).copy(), nngp.copy()
        for i, j in np.ndindex(nngp.shape):
            moment, slope = EXPECTATIONS[encoder.activation](previous[i, j], variance[i], variance[j])
            nngp[i, j] = weight * moment + bias
            ntk[i, j] = nngp[i, j] + weight * slope * ntk[i, j]
    return nngp, ntk


def cnn_recursion(encoder, x):
    """(NNGP, NTK) of a CNN with zero padding, position by position."""
    height, width, channels = encoder.image_shape
    positions = list(np.ndindex(height, width))
    index = {position: k for k, position in enumerate(positions)}
    offsets = [
        (a - encoder.kernel_size[0] // 2, b - encoder.kernel_size[1] // 2) for a, b in np.ndindex(*encoder.kernel_size)
    ]
    weight, bias = encoder.weight_std**2, encoder.bias_std**2 * encoder.use_bias
    pixels = np.asarray(x).reshape(len(x), len(positions), channels)
    nngp = np.einsum("ipc,jqc->ijpq", pixels, pixels) / channels
    ntk = np.zeros_like(nngp)

    def convolve(kernel):
        out = np.zeros_like(kernel)
        for (p, at), (q, other) in itertools.product(enumerate(positions), repeat=2):
            for dh, dw in offsets:
                first, second = (at[0] + dh, at[1] + dw), (other[0] + dh, other[1] + dw)
                if first in index and second in index:
                    out[:, :, p, q] += weight * kernel[:, :, index[first], index[second]] / len(offsets)
        return out

    for _ in range(encoder.depth - 1):
        nngp, ntk = convolve(nngp) + bias, convolve(ntk)
        ntk = ntk + nngp
        variance = np.einsum("iipp->ip", nngp).copy()
        for i, j, p, q in np.ndindex(nngp.shape):
            moments = EXPECTATIONS[encoder.activation](nngp[i, j, p, q], variance[i, p], variance[j, q])
            nngp[i, j, p, q] = moments[0]
            ntk[i, j, p, q] *= moments[1]
    pool = "ijpq->ij" if encoder.pooling == "average" else "ijpp->ij"
    count = len(positions) ** 2 if encoder.pooling == "average" else len(positions)
    nngp = weight * np.einsum(pool, nngp) / count + bias
    return nngp, weight * np.einsum(pool, ntk) / count + nngp


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    "encoder",
    [
        MLP(4, 2, depth=1, use_bias=True, bias_std=0.7),
        MLP(4, 2, depth=2),
        MLP(4, 2, depth=3, use_bias=True, weight_std=1.3, bias_std=0.4),
        MLP(4, 2, depth=5, weight_std=1.4),
        MLP(4, 2, depth=2, activation="erf"),
        MLP(4, 2, depth=3, activation="erf", use_bias=True),
        MLP(4, 2, depth=4, activation="identity", use_bias=True),
        MLP(4, 2, depth=3, activation="tanh", use_bias=True, bias_std=0.5),
        MLP(4, 2, depth=3, activation="gelu", use_bias=True, weight_std=1.2),
    ],
    ids=lambda encoder: f"{encoder.activation}{encoder.depth}",
)
def test_mlp_kernels_are_the_closed_forms(encoder, dtype):
    with jax.enable_x64(dtype == "float64"):
        x = rows(dtype=dtype)
        nngp, ntk = mlp_recursion(encoder, x)
        between = ~np.eye(len(x), dtype=bool)
        # On the diagonal ReLU's angle is the square root of a difference that rounding leaves at up to 10 eps, in the
        # reference as well; it enters divided by π, once in each layer.
        diagonal = 1e-7 if encoder.activation == "relu" and dtype == "float64" else ROUNDING[dtype]
        for computed, expected in ((infinite_nngp(encoder, x), nngp), (infinite_ntk(encoder, x), ntk)):
            assert computed.dtype == dtype
            np.testing.assert_allclose(computed[between], expected[between], rtol=ROUNDING[dtype], atol=ROUNDING[dtype])
            np.testing.assert_allclose(np.diag(computed), np.diag(expected), rtol=diagonal)


@pytest.mark.parametrize("depth", [2, 3, 5])
def test_relu_kernel_of_parallel_inputs_has_no_angle(depth, x64):
    x = rows(2)
    x = jnp.concatenate([x, 2 * x])
    # Without an angle Σ halves in each layer and Θ = Σ + Θ / 2: depth terms, each Σ_0 / 2^(depth - 1).
    expected = depth / 2 ** (depth - 1) * jnp.einsum("id,id->i", x[:2], x[2:]) / 16
    np.testing.assert_allclose(jnp.diag(infinite_ntk(MLP(4, 2, depth=depth), x[:2], x[2:])), expected, rtol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("pooling", ["average", "flatten"])
@pytest.mark.parametrize(("activation", "use_bias"), [("relu", True), ("erf", False)])
def test_cnn_kernels_are_the_naive_sums_over_positions(pooling, activation, use_bias, x64):
    encoder = CNN(4, 2, (3, 2, 2), pooling=pooling, activation=activation, use_bias=use_bias, weight_std=1.2)
    x = rows(3, 12)
    nngp, ntk = cnn_recursion(encoder, x)
    # ReLU's diagonal terms (p = q, i = j) as above.
    rtol = 1e-7 if activation == "relu" else ROUNDING["float64"]
    np.testing.assert_allclose(infinite_nngp(encoder, x), nngp, rtol=rtol)
    np.testing.assert_allclose(infinite_ntk(encoder, x), ntk, rtol=rtol)


def test_a_cnn_of_one_position_is_an_mlp(x64):
    x = rows()
    for pooling in ("average", "flatten"):
        cnn = CNN(4, 2, (1, 1, 16), kernel_size=(1, 1), pooling=pooling, activation="gelu", use_bias=True)
        mlp = MLP(4, 2, depth=3, activation="gelu", use_bias=True)
        np.testing.assert_allclose(infinite_ntk(cnn, x), infinite_ntk(mlp, x), rtol=1e-10)


def empirical(encoder, x, key):
    """Full kernel of a finite encoder by its Jacobian, (n, n, z, z)."""
    params = encoder.init(key, x)
    leaves = jax.tree.leaves(jax.jacrev(encoder.apply)(params, x))
    jacobian = jnp.concatenate([leaf.reshape(*leaf.shape[:2], -1) for leaf in leaves], axis=2)
    return jnp.einsum("iop,jqp->ijoq", jacobian, jacobian, precision="highest")


@pytest.mark.slow
@pytest.mark.parametrize(
    "encoder",
    [
        MLP(32, 2),
        MLP(32, 2, use_bias=True, weight_std=1.3, bias_std=0.6),
        MLP(32, 2, activation="tanh"),
        MLP(32, 2, activation="gelu", use_bias=True),
        CNN(16, 2, (2, 2, 1), depth=2, use_bias=True),
        CNN(16, 2, (2, 2, 1), depth=2, pooling="flatten", use_bias=True),
    ],
    ids=["relu", "relu-bias", "tanh", "gelu-bias", "cnn-average", "cnn-flatten"],
)
def test_one_hidden_layer_has_the_infinite_kernel_on_average_at_any_width(encoder):
    # With one hidden layer the tangent kernel is a mean over independent units, so its expectation is the limit.
    x, seeds = rows(2, 4, dtype="float32"), 256
    kernels = jax.jit(jax.vmap(lambda key: empirical(encoder, x, key)))(jax.random.split(jax.random.key(0), seeds))
    expected = np.asarray(infinite_ntk(encoder, x))[:, :, None, None] * np.eye(2)
    error = np.std(kernels, axis=0, ddof=1) / np.sqrt(seeds)
    # 10 distinct entries: all within 4.5 standard errors but for one set in 10^4.
    assert np.all(np.abs(np.mean(kernels, axis=0) - expected) < 4.5 * error)
    # The test can fail: the sampled kernels tell the limit from one that is 20% off.
    assert np.any(np.abs(np.mean(kernels, axis=0) - 1.2 * expected) > 4.5 * error)


@pytest.mark.slow
@pytest.mark.parametrize("encoder", [MLP(1024, 2, depth=3, use_bias=True), CNN(256, 2, (2, 2, 1), use_bias=True)])
def test_a_wide_deep_encoder_is_within_a_few_inverse_root_widths(encoder):
    x = rows(3, 4, dtype="float32")
    width = encoder.width if isinstance(encoder, MLP) else encoder.channels
    limit = np.asarray(infinite_ntk(encoder, x))[:, :, None, None] * np.eye(2)
    measured = np.asarray(jax.jit(lambda key: empirical(encoder, x, key))(jax.random.key(0)))
    # Each layer adds a relative fluctuation of order width^-1/2.
    assert np.linalg.norm(measured - limit) < encoder.depth / np.sqrt(width) * np.linalg.norm(limit)


@pytest.mark.slow
@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
@pytest.mark.parametrize("encoder", [MLP(4, 2, depth=3), CNN(4, 2, (4, 4, 1), pooling="flatten")])
def test_blank_inputs_have_a_zero_kernel_without_biases(encoder, activation):
    x = rows(2, dtype="float32").at[0].set(0.0)
    kernel = infinite_ntk(encoder.clone(activation=activation), x)
    np.testing.assert_array_equal(kernel[0], 0.0)
    assert kernel[1, 1] > 0


def test_blank_patches_leave_the_kernel_of_tanh_finite():
    x = rows(3, dtype="float32").reshape(3, 4, 4).at[:, :3, :3].set(0.0).reshape(3, 16)
    kernel = np.asarray(infinite_ntk(CNN(4, 2, (4, 4, 1), activation="tanh"), x), np.float64)
    assert np.linalg.eigvalsh(kernel).min() > 0


@pytest.mark.slow
@pytest.mark.parametrize("variance", [0.01, 1.0, 2.0, 4.0, 6.0])
def test_the_hermite_series_is_within_four_times_its_tail_of_the_expectation(variance, x64):
    points, matrix = infinite._hermite_rule()
    functions = ((jnp.tanh, np.tanh), (lambda u: 1 / jnp.cosh(u) ** 2, lambda u: 1 / np.cosh(u) ** 2))
    for fn, reference in functions:
        coefficients = matrix @ reference(np.sqrt(variance) * points)
        tail = np.sum(coefficients[-len(points) // 4 :] ** 2) / np.sum(coefficients**2)
        assert tail <= infinite.HERMITE_TAIL
        for correlation in (1.0, 0.9, 0.0, -0.5):
            arguments = (correlation * variance, variance, variance)
            expected = by_quadrature(reference, reference)(*arguments)[0]
            scale = by_quadrature(reference, reference)(variance, variance, variance)[0]
            error = abs(float(infinite._mehler(fn)(*map(jnp.float64, arguments))) - expected) / scale
            # Beside the tail, the rounding of sums of HERMITE_TERMS terms.
            assert error <= 4 * tail + infinite.HERMITE_TERMS * np.finfo(np.float64).eps


def test_the_hermite_rule_is_orthonormal():
    points, matrix = infinite._hermite_rule()
    weights = matrix[0]
    h = matrix / weights[None]
    kept = slice(0, len(points) // 2)
    np.testing.assert_allclose((h[kept] * weights[None]) @ h[kept].T, np.eye(len(points) // 2), atol=1e-11)


def test_saturated_tanh_is_refused():
    with pytest.raises(ValueError, match=r"tanh's series has not converged.*Scale the inputs"):
        infinite_ntk(MLP(4, 2, activation="tanh"), 10 * rows(dtype="float32"))


@pytest.mark.slow
@pytest.mark.parametrize("encoder", [MLP(4, 2, depth=3, use_bias=True), CNN(4, 2, (4, 4, 1), activation="gelu")])
def test_blocks_give_the_kernel_of_one_block(encoder, monkeypatch, x64):
    a, b = rows(7), rows(5, seed=1)
    whole = [infinite_ntk(encoder, a), infinite_ntk(encoder, a, b)]
    # Memory for 3 x 3 pairs: 7 rows are then 3 blocks of 3, the last filled up, and 5 rows 2 blocks.
    layers = encoder.infinite_layers()
    monkeypatch.setattr(infinite, "BLOCK_BYTES", 9 * infinite.BLOCK_BYTES // infinite._block_side(layers) ** 2)
    assert infinite._block_side(layers) == 3
    blocked = [infinite_ntk(encoder, a), infinite_ntk(encoder, a, b)]
    for one, many in zip(whole, blocked, strict=True):
        np.testing.assert_allclose(many, one, rtol=1e-7)  # ReLU's diagonal; see above


def test_the_kernel_of_inputs_with_themselves_is_symmetric_and_positive():
    x = rows(9, dtype="float32")
    for kernel in (infinite_ntk, infinite_nngp):
        values = np.asarray(kernel(MLP(4, 2, depth=3), x))
        np.testing.assert_array_equal(values, values.T)
        assert np.linalg.eigvalsh(values.astype(np.float64)).min() > 0
        np.testing.assert_allclose(values, kernel(MLP(4, 2, depth=3), x, x), rtol=1e-6)


def test_relu_without_biases_is_homogeneous_and_blind_to_rotations(x64):
    x = rows()
    encoder = MLP(4, 2, depth=3)
    rotation = jnp.asarray(np.linalg.qr(np.random.default_rng(2).normal(size=(16, 16)))[0])
    turned = jnp.matmul(x, rotation, precision="highest")
    np.testing.assert_allclose(infinite_ntk(encoder, 3 * x, x), 3 * infinite_ntk(encoder, x), rtol=1e-7)
    np.testing.assert_allclose(infinite_ntk(encoder, turned), infinite_ntk(encoder, x), rtol=1e-7)


def test_the_number_of_outputs_and_the_width_do_not_enter():
    x = rows(dtype="float32")
    np.testing.assert_array_equal(infinite_ntk(MLP(4, 2), x), infinite_ntk(MLP(9, 7), x))


def test_flat_and_shaped_images_give_the_same_kernel():
    x = rows(dtype="float32")
    encoder = CNN(4, 2, (4, 2, 2), pooling="flatten")
    np.testing.assert_array_equal(infinite_ntk(encoder, x, x.reshape(5, 4, 2, 2)), infinite_ntk(encoder, x, x))


@pytest.mark.parametrize(
    "encoder",
    [
        MLP(8, 2, use_bias=True, weight_std=1.3, bias_std=0.6, parametrisation="standard"),
        CNN(4, 2, (2, 2, 1), depth=2, use_bias=True, weight_std=0.8, bias_std=0.6, parametrisation="standard"),
    ],
)
def test_the_gaussian_process_of_standard_parametrisation_is_the_one_of_ntk_parametrisation(encoder):
    x, seeds = rows(2, 4, dtype="float32"), 4096
    expected = np.asarray(infinite_nngp(encoder, x))
    np.testing.assert_array_equal(expected, infinite_nngp(encoder.clone(parametrisation="ntk"), x))
    # The covariance of outputs: with one hidden layer a mean over independent units, hence the limit at any width.
    outputs = jax.jit(jax.vmap(lambda key: encoder.init_with_output(key, x)[0]))(
        jax.random.split(jax.random.key(0), seeds)
    )
    products = np.einsum("sio,sjo->sij", outputs, outputs) / 2
    error = np.std(products, axis=0, ddof=1) / np.sqrt(seeds)
    # 3 distinct entries: all within 4.5 standard errors but for one set in 5 10^4; a kernel 20% off is told apart.
    assert np.all(np.abs(np.mean(products, axis=0) - expected) < 4.5 * error)
    assert np.any(np.abs(np.mean(products, axis=0) - 1.2 * expected) > 4.5 * error)


@pytest.mark.parametrize(
    ("encoder", "message"),
    [
        (Transformer(8, 2), r"softmax attention.*ntk\.empirical_ntk"),
        (MLP(4, 2, parametrisation="standard"), "standard parametrisation"),
        (Dense(4), r"Dense has no method infinite_layers.*ntk\.empirical_ntk"),
    ],
)
def test_an_encoder_without_a_limit_is_refused(encoder, message):
    with pytest.raises(NoInfiniteKernel, match=message):
        infinite_ntk(encoder, rows(dtype="float32"))


@pytest.mark.parametrize(
    ("encoder", "x1", "x2", "error", "message"),
    [
        (MLP(4, 2), np.ones((3, 4)), np.ones((3, 5)), ValueError, r"x1 has inputs of shape \(4,\) and x2 of \(5,\)"),
        (MLP(4, 2), np.ones((3, 4, 4)), None, ValueError, r"x1 has shape \(3, 4, 4\) and the encoder takes \(n, d\)"),
        (CNN(4, 2, (4, 4, 1)), np.ones((3, 15)), None, ValueError, r"x1 has shape \(3, 15\).*\(n, 4, 4, 1\)"),
        (MLP(4, 2), np.ones((3, 4)), np.full((2, 4), np.nan), ValueError, "x2 holds values that are not finite"),
        (MLP(4, 2), np.ones((0, 4)), None, ValueError, "at least one input"),
        (MLP(4, 2), np.ones((3, 4), np.int32), None, TypeError, "x1 is int32"),
        (MLP(4, 2), np.ones((3, 4)), np.ones((3, 4), np.float32), TypeError, "x1 is float64 and x2 is float32"),
    ],
)
def test_bad_inputs_are_refused(x64, encoder, x1, x2, error, message):
    with pytest.raises(error, match=message):
        infinite_ntk(encoder, jnp.asarray(x1), None if x2 is None else jnp.asarray(x2))


def test_a_missing_package_is_named_with_the_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "neural_tangents", None)
    infinite.neural_tangents.cache_clear()
    with pytest.raises(
        ImportError, match=r'neural_tangents, which is not installed: pip install "theorykit\[infinite\]"'
    ):
        infinite.neural_tangents()


@pytest.mark.slow
def test_importing_neural_tangents_needs_no_tensorflow_and_leaves_jax_as_it_was():
    script = """
import sys, jax, jax.core, jax.extend.core, jax.interpreters.ad, jax.numpy as jnp
sys.modules.update(tensorflow=None, tf2jax=None)  # importing either would now fail
from theorykit.ntk import infinite
before = set(vars(jax)), set(vars(jax.core)), set(vars(jax.interpreters.ad))
package = infinite.neural_tangents()
assert package.__version__ == "0.6.5" and infinite.neural_tangents() is package
assert (set(vars(jax.core)), set(vars(jax.interpreters.ad))) == before[1:]
assert "util" not in set(vars(jax)) - before[0] and "jax.util" not in sys.modules
assert "neural_tangents.experimental" not in sys.modules
# What the benchmarks compare with still runs once the names are gone.
apply = lambda params, x: jnp.tanh(x @ params)
for implementation in (1, 2):
    kernel = package.empirical_ntk_fn(apply, trace_axes=(), vmap_axes=0, implementation=implementation)
    assert kernel(jnp.ones((2, 3)), None, jnp.ones((3, 1))).shape == (2, 2, 1, 1)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
