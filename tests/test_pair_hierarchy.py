"""The hierarchy with siblings drawn together: message passing against enumeration, and against a factorised guess."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from compilation import quickly

from theorykit.surrogate import hierarchy, pair_hierarchy

CLOSE = {"rtol": 1e-12, "atol": 1e-12}  # float64, sums of 81 products


@pytest.fixture
def h(x64):
    drawn = pair_hierarchy.random_pair_hierarchy(jax.random.key(0), 3, 2)
    return drawn._replace(prior=jnp.asarray([0.5, 0.2, 0.3]))


def all_leaves():
    return np.indices((3,) * 4).reshape(4, -1).T


def test_every_pair_has_one_parent(h):
    owners = np.asarray(h.kernels > 0).sum(axis=1)
    np.testing.assert_array_equal(owners, 1)
    np.testing.assert_array_equal(np.asarray(h.kernels > 0).sum(axis=(2, 3)), 3)


def test_the_enumerated_law_sums_over_all_inner_states(h):
    top, low = np.asarray(h.kernels)
    expected = np.einsum("s,sab,acd,bef->scdef", np.asarray(h.prior), top, low, low).reshape(3, 81)
    np.testing.assert_allclose(pair_hierarchy.enumerate_joint(h), expected, **CLOSE)


@pytest.mark.parametrize("kind", ["hidden", "noisy"])
def test_posteriors_are_those_of_enumeration(h, kind):
    joint, leaves = np.asarray(pair_hierarchy.enumerate_joint(h)), all_leaves()
    drawn = pair_hierarchy.sample(h, jax.random.key(1), 12)
    generator = np.random.default_rng(2)
    if kind == "hidden":
        seen = jnp.asarray(generator.uniform(size=(12, 4)) < 0.5)
        evidence = pair_hierarchy.evidence(drawn.leaves, 3, seen=seen)
    else:  # far apart, so that the likeliest symbols of two siblings may be no pair
        evidence = jnp.asarray(1000 * generator.standard_normal((12, 4, 3)))
    likelihood = np.asarray(evidence)[:, np.arange(4), leaves].sum(axis=2)  # (12, 81)
    support = joint.sum(axis=0) > 0
    top = np.max(np.where(support, likelihood, -np.inf), axis=1, keepdims=True)
    weights = joint[None] * np.where(support, np.exp(np.minimum(likelihood - top, 0)), 0)[:, None]  # (12, 3, 81)
    weights /= weights.sum(axis=(1, 2), keepdims=True)
    np.testing.assert_allclose(
        np.exp(quickly(pair_hierarchy.root_posterior, h, evidence)), weights.sum(axis=2), **CLOSE
    )
    per_symbol = np.stack([weights.sum(axis=1) @ (leaves == a) for a in range(3)], axis=2)
    np.testing.assert_allclose(np.exp(quickly(pair_hierarchy.leaf_posterior, h, evidence)), per_symbol, **CLOSE)


def factorised(h):
    """The hierarchy whose siblings are independent given their parent, with the same law of each child."""
    kernels = jnp.stack([jnp.sum(h.kernels, axis=3), jnp.sum(h.kernels, axis=2)], axis=1)
    return hierarchy.Hierarchy(kernels, kernels, h.prior)


def guessed_and_exact(h):
    """P(root | leaves) of all leaves that can be: by message passing that factorises, and by enumeration."""
    joint, leaves = np.asarray(pair_hierarchy.enumerate_joint(h)), all_leaves()
    possible = joint.sum(axis=0) > 0
    guess = quickly(
        lambda text: hierarchy.root_posterior(factorised(h), text=text), jnp.asarray(leaves[possible], jnp.int32)
    )
    return np.exp(guess), (joint[:, possible] / joint[:, possible].sum(axis=0)).T


def test_messages_that_factorise_miss_what_siblings_say_together(h):
    found, exact = guessed_and_exact(h)
    # Two siblings fix their parent. One law for each child leaves the root open, and often names another.
    np.testing.assert_array_equal(np.sort(exact, axis=1), [[0, 0, 1]] * len(exact))
    assert np.all(np.max(np.abs(found - exact), axis=1) > 0.01)
    assert np.mean(np.argmax(found, axis=1) != np.argmax(exact, axis=1)) > 0.1


def test_messages_that_factorise_are_exact_where_the_siblings_do(h):
    # The control of the test above: the same guess, for pairs that are products of the same laws of each child.
    left, right = (jnp.sum(h.kernels, axis=axis) for axis in (3, 2))
    found, exact = guessed_and_exact(h._replace(kernels=left[:, :, :, None] * right[:, :, None, :]))
    np.testing.assert_allclose(found, exact, **CLOSE)


def test_clean_leaves_fix_the_root(h):
    drawn = pair_hierarchy.sample(h, jax.random.key(1), 50)
    found = quickly(pair_hierarchy.root_posterior, h, pair_hierarchy.evidence(drawn.leaves, 3))
    np.testing.assert_array_equal(jnp.argmax(found, axis=1), drawn.root)
    np.testing.assert_allclose(jnp.max(found, axis=1), 0.0, **CLOSE)


def test_samples_have_the_enumerated_law(h):
    n, expected = 2**14, np.asarray(pair_hierarchy.enumerate_joint(h)).reshape(-1)
    drawn = pair_hierarchy.sample(h, jax.random.key(3), n)
    cells = np.ravel_multi_index((drawn.root, *np.asarray(drawn.leaves).T), (3,) * 5)
    counts, likely = np.bincount(cells, minlength=expected.size), n * expected >= 5
    assert np.all(counts[expected == 0] == 0)
    statistic = np.sum((counts - n * expected)[likely] ** 2 / (n * expected)[likely])
    # At most as many degrees of freedom as cells; one key in a million would pass the bound.
    assert statistic < scipy.stats.chi2.isf(1e-6, likely.sum())


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (
            lambda h: pair_hierarchy.sample(h._replace(kernels=h.kernels * 0.9), jax.random.key(0), 2),
            "sum to 1.*divide",
        ),
        (lambda h: pair_hierarchy.sample(h._replace(prior=jnp.asarray([0.5, 0.5, 0.0])), jax.random.key(0), 2), "zero"),
        (lambda h: pair_hierarchy.sample(h._replace(prior=jnp.ones(2)), jax.random.key(0), 2), "each of 3 symbols"),
        (
            lambda h: pair_hierarchy.sample(h._replace(kernels=h.kernels[0]), jax.random.key(0), 2),
            r"\(depth, S, S, S\)",
        ),
        (lambda h: pair_hierarchy.sample(h, jax.random.key(0), 0), "at least one"),
        (lambda h: pair_hierarchy.root_posterior(h, jnp.zeros((2, 3, 3))), r"takes float64 of \(n, 4, 3\)"),
        (lambda h: pair_hierarchy.evidence(jnp.full((2, 4), 3, jnp.int32), 3), "3 to 3, outside the alphabet 0..2"),
        (lambda h: pair_hierarchy.random_pair_hierarchy(jax.random.key(0), 1, 2), "alphabet 1"),
        (
            lambda h: pair_hierarchy.enumerate_joint(h._replace(kernels=jnp.tile(h.kernels, (2, 1, 1, 1)))),
            "16 leaves over 3 symbols make",
        ),
    ],
)
def test_bad_input_is_refused_with_cause_and_remedy(as_users_run, h, call, words):
    with pytest.raises(ValueError, match=words):
        call(h)
