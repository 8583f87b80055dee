"""Messages towards the root against enumeration of all states of all nodes, layout, limits and bad input."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from theorykit.surrogate import hierarchy

# float64, logarithms of sums of at most a few dozen products, as for the other answers of message passing.
CLOSE = {"rtol": 1e-12, "atol": 1e-12}
SHAPES = ((3, 2, 2), (2, 1, 3), (2, 3, 2))  # alphabet, depth, arity: all leaves can be listed


def tree(alphabet, depth, arity, noise=0.4):
    return hierarchy.random_hierarchy(jax.random.key(3), alphabet, depth, arity, noise).image


def by_enumeration(kernels, leaves):
    """ln P(node | leaves below), with explicit sums over all states of all nodes below, in NumPy."""
    kernels = np.asarray(kernels)
    depth, arity, symbols = kernels.shape[:3]

    def likelihood(layer, below):
        """P(leaves below | node) for a node of this layer, (S,)."""
        if layer == depth:
            return np.eye(symbols)[below[0]]
        parts = below.reshape(arity, -1)
        total = np.zeros(symbols)
        for states in itertools.product(range(symbols), repeat=arity):
            chance = np.prod([kernels[layer, i][:, b] for i, b in enumerate(states)], axis=0)
            total += chance * np.prod([likelihood(layer + 1, part)[b] for part, b in zip(parts, states, strict=True)])
        return total

    found = []
    for layer in range(depth):
        groups = leaves.reshape(len(leaves), arity**layer, -1)
        table = np.array([[likelihood(layer, below) for below in row] for row in groups])
        found.append(np.log(table / table.sum(axis=2, keepdims=True)))
    return found


@pytest.mark.parametrize("shape", SHAPES)
def test_every_node_has_the_law_that_enumeration_gives(shape, x64):
    kernels = tree(*shape)
    leaves = hierarchy.all_leaves(shape[0], shape[2] ** shape[1])[::5]
    found, expected = hierarchy.beliefs(kernels, leaves), by_enumeration(kernels, np.asarray(leaves))
    assert len(found) == shape[1]
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, **CLOSE)


def test_the_root_is_believed_as_by_root_posterior_under_a_uniform_prior(x64):
    h = hierarchy.random_hierarchy(jax.random.key(4), 3, 2, 2, 0.3)
    text = hierarchy.all_leaves(3, 4)
    np.testing.assert_allclose(
        hierarchy.beliefs(h.text, text)[0][:, 0], hierarchy.root_posterior(h, text=text), **CLOSE
    )


def test_the_law_of_the_root_does_not_enter(x64):
    key, prior = jax.random.key(4), jnp.asarray((0.5, 0.2, 0.3))
    even, uneven = (hierarchy.random_hierarchy(key, 3, 2, 2, 0.3, prior=law) for law in (None, prior))
    leaves = hierarchy.all_leaves(3, 4)
    for one, other in zip(*(hierarchy.beliefs(h.image, leaves) for h in (even, uneven)), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_node_depends_on_the_leaves_below_it_only(x64):
    kernels = tree(2, 3, 2)
    leaves = hierarchy.all_leaves(2, 8)
    changed = leaves.at[:, 4:6].set(1 - leaves[:, 4:6])  # below node 2 of layer 2, node 1 of layer 1, and the root
    for layer, (one, other) in enumerate(
        zip(hierarchy.beliefs(kernels, leaves), hierarchy.beliefs(kernels, changed), strict=True)
    ):
        above = np.arange(2**layer) == 4 // 2 ** (3 - layer)
        np.testing.assert_array_equal(one[:, ~above], other[:, ~above])
        assert np.all(np.max(np.abs(one - other), axis=(0, 2))[above] > 0.01)


def test_without_noise_every_node_is_known_and_impossible_leaves_give_nan(x64):
    kernels = tree(3, 2, 2, noise=0.0)
    inverse = jnp.argmax(kernels[:, 0], axis=1)  # all ranks of a layer use one permutation
    roots = jnp.arange(3)
    parents = jnp.argsort(inverse[0])[roots]
    leaves = jnp.repeat(jnp.argsort(inverse[1])[parents][:, None], 4, axis=1)
    of_root, of_parents = hierarchy.beliefs(kernels, leaves)
    np.testing.assert_array_equal(jnp.argmax(of_root[:, 0], axis=1), roots)
    np.testing.assert_array_equal(jnp.max(of_root, axis=2), 0.0)
    np.testing.assert_array_equal(jnp.argmax(of_parents, axis=2), jnp.stack([parents, parents], axis=1))
    broken = leaves.at[:, 0].set((leaves[:, 0] + 1) % 3)
    of_root, of_parents = hierarchy.beliefs(kernels, broken)
    assert np.all(np.isnan(of_root)) and np.all(np.isnan(of_parents[:, 0]))
    np.testing.assert_array_equal(jnp.max(of_parents[:, 1], axis=1), 0.0)


def test_many_trees_go_through_vmap():
    keys = jax.random.split(jax.random.key(5))
    h = jax.vmap(lambda key: hierarchy.random_hierarchy(key, 3, 2, 2, 0.3))(keys)
    leaves = hierarchy.all_leaves(3, 4)
    found = jax.vmap(lambda kernels: hierarchy.beliefs(kernels, leaves))(h.text)
    for i in range(2):
        for one, other in zip(found, hierarchy.beliefs(h.text[i], leaves), strict=True):
            # float32: logarithms of a few roundings each, of numbers of order ten.
            np.testing.assert_allclose(one[i], other, rtol=0, atol=64 * np.finfo(np.float32).eps)


def test_bad_input_is_named(as_users_run):
    kernels, leaves = tree(3, 2, 2), hierarchy.all_leaves(3, 4)
    with pytest.raises(TypeError, match=r"kernels are ndarray; give .* h\.image or h\.text"):
        hierarchy.beliefs(np.asarray(kernels), leaves)
    with pytest.raises(TypeError, match="kernels are Hierarchy"):
        hierarchy.beliefs(hierarchy.Hierarchy(kernels, kernels), leaves)
    with pytest.raises(ValueError, match=r"kernels have shape \(2, 3, 3\); give \(depth, arity, S, S\)"):
        hierarchy.beliefs(kernels[0], leaves)
    with pytest.raises(ValueError, match=r"row \(.*\) of kernels sums to 2.* divide by the sum"):
        hierarchy.beliefs(2 * kernels, leaves)
    with pytest.raises(TypeError, match="leaves is float32; leaves are symbols"):
        hierarchy.beliefs(kernels, leaves.astype(jnp.float32))
    with pytest.raises(ValueError, match=r"4 leaves: give \(n, 4\)"):
        hierarchy.beliefs(kernels, leaves[:, :3])
    with pytest.raises(ValueError, match=r"outside the alphabet 0\.\.2; recode"):
        hierarchy.beliefs(kernels, leaves + 1)
