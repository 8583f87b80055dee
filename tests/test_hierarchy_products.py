"""Messages by products of probabilities against those in log space, and when which of them is used."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compilation import quickly

from theorykit.surrogate import _hierarchy_passes as passes
from theorykit.surrogate import _message_products as products
from theorykit.surrogate import hierarchy

# (S, L, m, samples): with and without tables, a root whose children are leaves, one child.
SHAPES = [(3, 3, 2, 40), (3, 3, 2, 1), (4, 1, 3, 80), (4, 1, 3, 5), (2, 3, 3, 9), (5, 2, 1, 20)]


def answers(tree, leaves, noisy, root):
    log_law, found = passes.predicted(tree, leaves, root)
    logs = [jax.nn.log_softmax(one, axis=0) for one in (passes.likelihood(tree, leaves), found)]
    sigma = jnp.asarray(0.7, noisy.dtype)
    return (
        *logs,
        log_law,
        *(passes.denoised(tree, noisy, sigma, root, of) for of in (passes.law, passes.mean_symbol)),
    )


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
def test_products_and_logarithms_give_the_same_messages(x64, shape):
    symbols, depth, arity, n = shape
    h = hierarchy.random_hierarchy(jax.random.key(0), symbols, depth, arity, 0.4)
    _, leaves, _ = hierarchy.sample(h, jax.random.key(1), n)
    tree = products.tree(h.image, n)
    assert bool(tree.bounded)
    assert (tree.together is None) == (symbols**arity > n * arity ** (depth - 1))
    root = jax.nn.log_softmax(jax.random.normal(jax.random.key(2), (symbols, n)), axis=0)
    noisy = leaves.astype(float) + jax.random.normal(jax.random.key(3), leaves.shape)
    ways = (tree._replace(bounded=jnp.asarray(way)) for way in (True, False))
    for one, other in zip(*(quickly(answers, way, leaves, noisy, root) for way in ways), strict=True):
        # Laws and their logarithms; sums of at most a few dozen terms.
        np.testing.assert_allclose(one, other, rtol=1e-12, atol=1e-12)


def smallest(entry, dtype):
    """Kernels (2, 3, 2, 2) with this smallest entry."""
    row = np.asarray([[1 - entry, entry], [0.5, 0.5]])
    return jnp.asarray(np.broadcast_to(row, (2, 3, 2, 2)), dtype)


def test_small_entries_and_zeros_are_left_to_logarithms(x64):
    # ln(tiny S^2 / eps) / (m + 1) is -17.5 in single precision and -167.5 in double.
    for dtype, exponent in ((jnp.float32, -17.5), (jnp.float64, -167.5)):
        for away, expected in ((0.5, True), (-0.5, False)):
            assert bool(products.tree(smallest(np.exp(exponent + away), dtype), 1).bounded) == expected
        assert not bool(products.tree(smallest(0.0, dtype), 1).bounded)


@pytest.mark.slow
def test_at_the_smallest_entries_products_lose_nothing():
    """Every text of the tree whose rare symbol is as rare as products allow, in single precision."""
    with jax.enable_x64(True):
        wide = smallest(np.exp(-17.0), jnp.float64)
        exact = hierarchy.Hierarchy(wide, wide, None)
        texts = jnp.asarray(list(itertools.product(range(2), repeat=9)), jnp.int32)
        expected = [np.asarray(f(exact, texts)) for f in (of_root, of_tokens)]
    narrow = smallest(np.exp(-17.0), jnp.float32)
    assert bool(products.tree(narrow, len(texts)).bounded)
    for f, wide in zip((of_root, of_tokens), expected, strict=True):
        found = np.asarray(f(hierarchy.Hierarchy(narrow, narrow, None), texts), float)
        # Logarithms of up to 9 x 17 that a few dozen roundings, of entries and of sums, change.
        assert np.max(np.abs(found - wide)) < 64 * 9 * np.finfo(np.float32).eps


def of_root(h, texts):
    return hierarchy.root_posterior(h, text=texts)


def of_tokens(h, texts):
    return hierarchy.next_token(h, texts)


def test_a_leaf_outside_the_alphabet_is_no_number_under_jit():
    h = hierarchy.random_hierarchy(jax.random.key(0), 3, 2, 2, 0.4)
    _, leaves, _ = hierarchy.sample(h, jax.random.key(1), 8)
    for wrong in (3, -1):
        found = quickly(of_root, h, leaves.at[5, 2].set(wrong))
        np.testing.assert_array_equal(jnp.any(jnp.isnan(found), axis=1), np.arange(8) == 5)


def test_the_mean_of_weights_is_that_of_their_law(x64):
    for symbols in (1, 2, 5):
        weights = jnp.asarray(np.random.default_rng(symbols).random((2, symbols, 3, 4)))
        expected = np.average(np.broadcast_to(np.arange(symbols)[:, None, None], weights.shape), 1, weights)
        np.testing.assert_allclose(passes.mean_symbol(weights), expected, rtol=1e-14)
