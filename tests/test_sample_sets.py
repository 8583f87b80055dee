"""Laws of the sample-efficiency experiment: matched stars, leaves in random and in fixed orders, sizes refused."""

import itertools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import _sample_sets as sets
from theorykit import surrogate
from theorykit.surrogate import risk

LEAVES = list(itertools.product(range(2), repeat=3))  # in the order of the rows of a joint: the last runs fastest


@pytest.fixture
def joint():
    """P(x, y) of three leaves of two symbols each, without any symmetry."""
    table = np.random.default_rng(0).random((8, 8))
    return table / table.sum()


@pytest.fixture(scope="module")
def pairs_of_trees():
    """Hierarchy and star at three noises, drawn from three keys."""
    return [sets.hierarchies(tree_config(p), jax.random.key(seed)) for seed, p in enumerate((0.02, 0.1, 0.2))]


def tree_config(noise):
    return SimpleNamespace(alphabet=3, depth=2, arity=2, noise=noise)


def information_by_loops(tree):
    """I(root; leaf), mean over leaves of both modalities, from sums over symbols on the way to each leaf."""
    found = []
    for kernels in (np.asarray(tree.image, np.float64), np.asarray(tree.text, np.float64)):
        depth, arity, symbols = kernels.shape[:3]
        for path in itertools.product(range(arity), repeat=depth):
            law = np.zeros((symbols, symbols))
            for way in itertools.product(range(symbols), repeat=depth + 1):
                steps = zip(kernels, path, itertools.pairwise(way), strict=True)
                law[way[0], way[-1]] += np.prod([layer[rank][step] for layer, rank, step in steps]) / symbols
            independent = np.outer(law.sum(axis=1), law.sum(axis=0))
            found.append(np.sum(law * np.log(law / independent)))
    return np.mean(found)


def test_a_leaf_of_the_star_says_as_much_of_the_root_as_one_of_the_hierarchy(pairs_of_trees):
    for tree, star in pairs_of_trees:
        assert star.image.shape[:2] == (1, 4)
        # Kernels are float32, and logarithms of small probabilities multiply their rounding of 6e-8 by about ten.
        assert information_by_loops(star) == pytest.approx(information_by_loops(tree), abs=1e-6)


def test_information_of_root_and_leaf_is_that_of_sums_over_symbols(pairs_of_trees):
    for trees in pairs_of_trees:
        for tree in trees:
            # Rows of kernels sum to one up to float32.
            assert sets.root_leaf_information(tree) == pytest.approx(information_by_loops(tree), abs=1e-6)


def test_leaves_in_random_orders_have_the_mean_law_over_all_pairs_of_orders(joint):
    expected = np.zeros_like(joint)
    orders = list(itertools.permutations(range(3)))
    for (i, x), (j, y) in itertools.product(enumerate(LEAVES), repeat=2):
        for of_x, of_y in itertools.product(orders, repeat=2):
            to = LEAVES.index(tuple(x[k] for k in of_x)), LEAVES.index(tuple(y[k] for k in of_y))
            expected[to] += joint[i, j] / len(orders) ** 2
    np.testing.assert_allclose(sets.permuted(joint, 2), expected, rtol=1e-12)


def test_leaves_in_random_orders_keep_their_law_in_any_other_order(joint):
    fresh = sets.permuted(joint, 2)
    np.testing.assert_allclose(sets.reordered(fresh, 2, (1, 2, 0)), fresh, rtol=1e-12)
    np.testing.assert_allclose(sets.permuted(fresh, 2), fresh, rtol=1e-12)


def test_leaves_in_a_fixed_order_carry_their_probability_along(joint):
    order = (2, 0, 1)  # not its own inverse
    found = sets.reordered(joint, 2, order)
    for (i, x), (j, y) in itertools.product(enumerate(LEAVES), repeat=2):
        to = LEAVES.index(tuple(x[k] for k in order)), LEAVES.index(tuple(y[k] for k in order))
        assert found[to] == joint[i, j]


def test_the_order_as_it_was_and_an_order_with_its_inverse_change_nothing(joint):
    np.testing.assert_array_equal(sets.reordered(joint, 2, (0, 1, 2)), joint)
    order = (2, 0, 1)
    there = sets.reordered(joint, 2, order)
    assert np.any(there != joint)
    np.testing.assert_array_equal(sets.reordered(there, 2, np.argsort(order)), joint)


def test_a_hierarchy_that_says_less_of_its_root_than_any_star_is_refused():
    with pytest.raises(ValueError, match=r"no star matches at noise 0\.95\. Lower the noise"):
        sets.hierarchies(tree_config(0.95), jax.random.key(0))


@pytest.mark.parametrize("samples", [{"mlp": (64, 96)}, {"mlp": (64,), "transformer": (2,)}])
def test_numbers_of_samples_that_do_not_fill_groups_are_refused(samples):
    with pytest.raises(ValueError, match="give powers of two, at least 4"):
        sets.check(SimpleNamespace(samples=samples, batch=8, validation=8))


@pytest.mark.parametrize("sizes", [{"batch": 6}, {"batch": 0}, {"validation": 10}])
def test_batches_and_validation_pairs_that_leave_a_part_of_a_group_are_refused(sizes):
    config = SimpleNamespace(**{"samples": {"mlp": (64,)}, "batch": 8, "validation": 8} | sizes)
    with pytest.raises(ValueError, match=f"{next(iter(sizes))} is .* give a multiple of the 4 pairs"):
        sets.check(config)


def test_sizes_that_fill_groups_are_accepted():
    assert sets.check(SimpleNamespace(samples={"mlp": (4, 64)}, batch=8, validation=12)) is None


@pytest.mark.slow
def test_tasks_follow_the_score(x64, joint):
    tasks = ("zero_shot", "next_token", "denoising")
    tables = jnp.asarray(np.stack([risk.optimal_score(jnp.asarray(joint)), np.random.default_rng(1).random((8, 8))]))
    joints = jnp.asarray(np.stack([joint, joint]))
    excess = sets.exactly(joints, tables, 2, sets.least_risks(joints), tasks)
    np.testing.assert_allclose(excess[0], 0, atol=1e-13)
    _, label, token, error = excess[1]
    forward, reverse = surrogate.sufficiency(joints[1], tables[1]), surrogate.sufficiency(joints[1].T, tables[1].T)
    np.testing.assert_allclose(3 * token, forward, rtol=1e-12)
    assert 0 < label < forward
    assert 0 < error < reverse / 2  # symbols 0 and 1: the diameter is 1
