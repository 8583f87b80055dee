"""Transformers on tokens: who sees whom, gates of blocks, hidden states, and refusals."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compilation import quickly

from theorykit.encoders import NoInfiniteKernel, TokenTransformer, Transformer

TOKENS, NUMBERS, DEPTH = 5, 3, 2
SIZES = {"tokens": (TOKENS, NUMBERS), "depth": DEPTH, "heads": 2, "mlp_ratio": 2}
POOLED = Transformer(8, 4, **SIZES)
EACH = TokenTransformer(8, 4, **SIZES)
EPS32 = float(np.finfo(np.float32).eps)


def sequences(n=2, dtype="float32"):
    return jnp.asarray(np.random.default_rng(0).normal(size=(n, TOKENS, NUMBERS)), dtype)


@functools.cache
def params_of(encoder, dtype="float32"):
    return quickly(encoder.init, jax.random.key(1), jnp.ones((1, TOKENS, NUMBERS), dtype))


def apply(encoder, *more, params=None):
    return quickly(encoder.apply, params_of(encoder) if params is None else params, *more)


def may_see(prefix):
    """Row i: which tokens output i may depend on, spelled out."""
    if prefix is None:
        return [[True] * TOKENS for _ in range(TOKENS)]
    return [[(i < prefix and j < prefix) or j <= i for j in range(TOKENS)] for i in range(TOKENS)]


@pytest.mark.parametrize("prefix", [None, 0, 1, 3, TOKENS])
def test_a_changed_token_reaches_exactly_the_outputs_that_may_see_it(prefix):
    encoder = EACH.clone(prefix=prefix)
    params, x = params_of(EACH), sequences()
    changed = jnp.stack([x, *(x.at[:, j].add(1.0) for j in range(TOKENS))])
    plain, *others = quickly(jax.vmap(encoder.apply, (None, 0)), params, changed)
    # Weights of hidden tokens are exactly zero, so that outputs which may not change do not change in any bit.
    reached = np.asarray([np.any(np.asarray(other != plain), axis=(0, 2)) for other in others]).T
    np.testing.assert_array_equal(reached, may_see(prefix))


def test_a_prefix_of_all_tokens_hides_nothing():
    everything, x = EACH.clone(prefix=TOKENS), sequences()
    # The same sums; only the compiler may order them otherwise.
    np.testing.assert_allclose(apply(everything, x), apply(EACH, x), atol=64 * EPS32)


def test_a_masked_network_has_finite_gradients():
    encoder, x = EACH.clone(prefix=0), 30 * sequences()  # logits far apart
    gradient = quickly(jax.grad(lambda p: jnp.sum(encoder.apply(p, x) ** 2)), params_of(EACH))
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(gradient))


def test_both_transformers_have_the_same_parameters_and_the_pooled_one_is_the_mean_of_the_other():
    assert jax.tree.all(jax.tree.map(np.array_equal, params_of(POOLED), params_of(EACH)))
    # The last layer is linear: the mean over tokens may be taken before or after it.
    tokens, pooled = apply(EACH, sequences()), apply(POOLED, sequences())
    assert tokens.shape == (2, TOKENS, 4) and tokens.dtype == jnp.float32
    np.testing.assert_allclose(jnp.mean(tokens, axis=1), pooled, atol=64 * EPS32)


def test_parameters_have_the_names_that_stored_ones_have():
    per_block = ("norm_attention", "query", "key", "value", "out", "norm_mlp", "mlp_in", "mlp_out")
    names = {"embed", "positions", "norm_head", "head", *(f"{role}_{i}" for role in per_block for i in range(DEPTH))}
    assert set(params_of(POOLED)["params"]) == names


def test_the_transformer_is_its_formula(x64):
    """h <- h + Attention(LN h), h <- h + MLP(LN h), written out with NumPy in float64."""
    params, x = params_of(POOLED, "float64"), sequences(dtype="float64")
    p, width = jax.tree.map(np.asarray, params["params"]), 8

    def dense(name, u):
        return u @ p[name]["kernel"] / np.sqrt(u.shape[-1])

    def norm(name, u):
        centred = u - u.mean(-1, keepdims=True)
        return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6) * p[name]["scale"] + p[name]["bias"]

    def heads(u):
        return u.reshape(2, TOKENS, 2, width // 2).transpose(0, 2, 1, 3)

    h = dense("embed", np.asarray(x)) + p["positions"]
    for i in range(DEPTH):
        q, k, v = (heads(dense(f"{role}_{i}", norm(f"norm_attention_{i}", h))) for role in ("query", "key", "value"))
        weights = np.exp(q @ k.transpose(0, 1, 3, 2) / np.sqrt(width // 2))
        mixed = (weights / weights.sum(-1, keepdims=True) @ v).transpose(0, 2, 1, 3).reshape(h.shape)
        h = h + dense(f"out_{i}", mixed)
        u = dense(f"mlp_in_{i}", norm(f"norm_mlp_{i}", h))
        h = h + dense(f"mlp_out_{i}", np.asarray(jax.nn.gelu(jnp.asarray(u), approximate=False)))
    expected = dense("head", norm("norm_head", h).mean(1))
    # flax takes the variance as a difference of two means: a few more roundings than here.
    np.testing.assert_allclose(apply(POOLED, x, params=params), expected, atol=1e-12)


@pytest.mark.parametrize("encoder", [POOLED, EACH.clone(prefix=2)], ids=["pooled", "each token"])
def test_gates_one_and_zero_are_the_network_of_one_block(encoder):
    params, x = params_of(encoder), sequences()
    shallow = encoder.clone(depth=1)
    kept = {"params": {name: value for name, value in params["params"].items() if not name.endswith("_1")}}
    gated = apply(encoder, x, jnp.asarray([1.0, 0.0]), params=params)
    # A branch times zero adds exactly nothing.
    np.testing.assert_array_equal(gated, apply(shallow, x, params=kept))


def test_gates_of_one_change_nothing_and_no_gates_cost_nothing():
    x, ones = sequences(), jnp.ones(DEPTH)
    np.testing.assert_array_equal(apply(POOLED, x), apply(POOLED, x, ones))

    def operations(*more):
        return len(jax.make_jaxpr(POOLED.apply)(params_of(POOLED), x, *more).eqns)

    assert operations() < operations(ones)


def test_members_of_different_depth_share_one_program():
    x, gates = sequences(), jnp.asarray([[1.0, 1.0], [1.0, 0.0], [0.0, 0.5]])
    together = quickly(jax.vmap(POOLED.apply, (None, None, 0)), params_of(POOLED), x, gates)
    for member, gate in zip(together, gates, strict=True):
        np.testing.assert_allclose(member, apply(POOLED, x, gate), atol=64 * EPS32)


def test_a_gate_has_the_gradient_of_the_output_along_its_branches(x64):
    params, x, at = params_of(POOLED, "float64"), sequences(dtype="float64"), jnp.asarray([0.7, 0.3])

    def value(gates):
        return jnp.sum(POOLED.apply(params, x, gates) ** 2)

    gradient, step = quickly(jax.grad(value), at), 1e-6
    for i in range(DEPTH):
        moved = [quickly(value, at.at[i].add(sign * step)) for sign in (1, -1)]
        # A central difference: error of order step² and eps / step.
        np.testing.assert_allclose(gradient[i], (moved[0] - moved[1]) / (2 * step), rtol=1e-7)


@pytest.mark.parametrize("encoder", [POOLED, EACH], ids=["pooled", "each token"])
def test_states_are_the_tokens_after_the_embedding_and_after_each_block(encoder):
    params, x = params_of(encoder), sequences()
    out, sown = quickly(functools.partial(encoder.apply, mutable="intermediates"), params, x)
    (states,) = sown["intermediates"]["states"]
    assert states.shape == (DEPTH + 1, 2, TOKENS, 8)
    np.testing.assert_allclose(out, apply(encoder, x), atol=64 * EPS32)
    inside = params["params"]
    embedded = jnp.einsum("ntd,dw->ntw", x, inside["embed"]["kernel"], precision="highest") / np.sqrt(NUMBERS)
    np.testing.assert_allclose(states[0], embedded + inside["positions"][None], atol=16 * EPS32)
    # With the later blocks switched off, the last state is that after the first ones.
    for blocks in range(DEPTH):
        gates = jnp.asarray([float(b < blocks) for b in range(DEPTH)])
        _, gated = quickly(functools.partial(encoder.apply, mutable="intermediates"), params, x, gates)
        np.testing.assert_allclose(gated["intermediates"]["states"][0][-1], states[blocks], atol=64 * EPS32)
    normed = states[-1] - jnp.mean(states[-1], axis=-1, keepdims=True)
    normed = normed / jnp.sqrt(jnp.mean(normed**2, axis=-1, keepdims=True) + 1e-6)
    read = jnp.einsum("ntw,wz->ntz", normed, inside["head"]["kernel"], precision="highest") / np.sqrt(8)
    read = read if encoder is EACH else jnp.mean(read, axis=1)
    np.testing.assert_allclose(out, read, atol=64 * EPS32)


def test_states_are_sown_only_when_asked_for():
    assert set(params_of(POOLED)) == {"params"}
    jaxpr = jax.make_jaxpr(POOLED.apply)(params_of(POOLED), sequences())
    assert all(var.aval.shape != (DEPTH + 1, 2 * TOKENS, 8) for eqn in jaxpr.eqns for var in eqn.outvars)


def test_without_positions_outputs_follow_the_order_of_the_tokens():
    encoder, x = EACH.clone(learn_positions=False), sequences()
    order = jnp.asarray([3, 0, 4, 1, 2])
    permuted = apply(encoder, x[:, order])
    np.testing.assert_allclose(permuted, apply(encoder, x)[:, order], atol=64 * EPS32)
    with_positions = apply(EACH, x[:, order]) - apply(EACH, x)[:, order]
    assert float(jnp.abs(with_positions).max()) > 0.1


def test_flat_inputs_are_tokens_in_a_row():
    x = sequences()
    np.testing.assert_array_equal(apply(EACH, x), apply(EACH, x.reshape(2, -1)))


def test_impossible_prefixes_are_refused(as_users_run):
    for prefix in (-1, TOKENS + 1):
        with pytest.raises(ValueError, match=rf"prefix is {prefix} with 5 tokens: pass 0 to 5, or None"):
            EACH.clone(prefix=prefix)
    for prefix in (1.5, True):
        with pytest.raises(TypeError, match="prefix must be a whole number or None"):
            EACH.clone(prefix=prefix)


def test_gates_that_are_not_one_per_block_are_refused(as_users_run):
    for gates in (jnp.ones(3), jnp.ones((4, DEPTH)), jnp.float32(1.0)):
        with pytest.raises(ValueError, match=r"one number for each of the 2 blocks, shape \(2,\).*vmap"):
            jax.eval_shape(POOLED.apply, params_of(POOLED), sequences(), gates)


def test_it_has_no_infinite_kernel_and_checks_its_sizes():
    with pytest.raises(NoInfiniteKernel, match=r"softmax attention.*ntk\.empirical_ntk"):
        EACH.infinite_layers()
    with pytest.raises(ValueError, match="heads = 3 does not divide width = 8"):
        EACH.clone(heads=3)
    with pytest.raises(ValueError, match=r"TokenTransformer expects inputs of shape \(n, 15\) or \(n, 5, 3\)"):
        jax.eval_shape(EACH.apply, params_of(EACH), jnp.ones((2, 14)))
