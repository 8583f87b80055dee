"""The constants C of S <= C Excess_K: the integrals of their proof, where they are attained, limits, bad input."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compilation import quickly

from theorykit.surrogate import bounds, information_loss
from theorykit.surrogate import joint as joints
from theorykit.surrogate.bounds import ceiling_factor, chain, extremes, floor_factor

NX, NY = 4, 3
COUNTS = np.array([2.0, 3, 4, 6, 9, 17, 65, 1025])


def cases(count, deviation):
    """Joints with empty cells, finite scores."""
    rng = np.random.default_rng(round(10 * deviation))
    weights = (rng.gamma(0.5, size=(count, NX, NY)) + 0.01) * (rng.uniform(size=(count, NX, NY)) > 0.2)
    weights += 0.01 * np.eye(NX, NY) + 0.01 * np.eye(NX, NY, -1)
    scores = deviation * rng.standard_normal((count, NX, NY))
    return jnp.asarray(weights / weights.sum(axis=(1, 2), keepdims=True)), jnp.asarray(scores)


def chains(joint, score):
    at = lambda p, s: jax.lax.map(lambda k: chain(p, s, k), jnp.asarray(COUNTS))  # noqa: E731
    return quickly(jax.vmap(at), joint, score)


@pytest.mark.slow
@pytest.mark.parametrize("deviation", [0.3, 3.0])
def test_both_factors_bound_the_ratio_and_the_excess_grows_at_most_in_proportion(x64, deviation):
    joint, score = cases(60, deviation)
    found = chains(joint, score)
    ceiling, inverse_floor = jax.vmap(extremes)(joint, score)
    over = jax.vmap(jax.vmap(ceiling_factor, (None, 0)), (0, None))(ceiling, jnp.asarray(COUNTS))
    across = jax.vmap(jax.vmap(floor_factor, (None, None, 0)), (0, 0, None))(
        ceiling, inverse_floor, jnp.asarray(COUNTS)
    )
    np.testing.assert_allclose(found.factor, over, rtol=1e-14)
    assert np.all(over <= np.asarray(across) * (1 + 1e-14))
    lost = np.asarray(found.sufficiency)
    # Risks of order 10 with roundings of 1e-15, in units of S.
    room = 1e-13 / lost
    assert np.all(found.ratio <= np.asarray(found.factor) * (1 + room))
    share = np.asarray(found.excess) / lost
    assert np.all(np.diff(share / (COUNTS - 1)[None, :], axis=1) <= room[:, 1:])
    assert np.all(np.diff(share, axis=1) >= -room[:, 1:])


@pytest.mark.slow
def test_excess_and_sufficiency_are_the_integrals_of_the_proof(x64):
    joint, score = (np.asarray(a)[0] for a in cases(1, 1.0))
    p, q = joint.sum(axis=1), joint.sum(axis=0)
    r, w = (
        np.asarray(joints.density_ratio(jnp.asarray(joint))),
        np.asarray(information_loss.model_ratio(jnp.asarray(joint), jnp.asarray(score))),
    )
    # Gauss-Legendre with 60 nodes: the integrand is analytic in t but for singularities beyond [0, 1], where w_t = 0.
    nodes, weights = np.polynomial.legendre.leggauss(60)
    t = (nodes + 1) / 2
    for k in (2, 3, 4):
        drawn = np.array(list(itertools.product(range(NY), repeat=k)))
        chance = np.prod(q[drawn], axis=1)
        r_k, w_k = r[:, drawn], w[:, drawn]  # (x, lists, K)
        c = (w_k[..., 0] * r_k[..., 1] - w_k[..., 1] * r_k[..., 0]) ** 2
        excess = lost = 0.0
        for at, weight in zip(t, weights / 2, strict=True):
            w_t = (1 - at) * r_k + at * w_k
            pair = p @ (c / (w_t[..., 0] * w_t[..., 1]) * chance)
            each = p[:, None] * c / (w_t[..., 0] * w_t[..., 1] * w_t.sum(axis=-1)) * chance
            excess += weight * at * (k - 1) / 2 * each.sum()
            lost += weight * at / 2 * pair.sum()
        found = chain(jnp.asarray(joint), jnp.asarray(score), k)
        np.testing.assert_allclose([excess, lost], [found.excess, found.sufficiency], rtol=1e-9)


@pytest.mark.slow
def test_two_candidates_need_twice_the_bound(x64):
    # Each x has two y of ratio B and no others, and the score errs a little between them.
    n, error = 16, 1e-3
    joint = jnp.kron(jnp.eye(n), jnp.ones((1, 2))) / (2 * n)
    score = jnp.where(joint > 0, jnp.tile(jnp.array([error, -error]), n)[None, :], -jnp.inf)
    found = chain(joint, score, 2)
    np.testing.assert_allclose(extremes(joint, score)[0], n * (1 + error), rtol=1e-5)
    np.testing.assert_allclose(found.ratio, found.factor, rtol=2 * error)
    assert found.ratio < found.factor


def test_a_model_that_rules_out_what_never_happens_has_a_finite_factor(x64):
    joint = jnp.array([[0.3, 0.2, 0.0], [0.1, 0.1, 0.3]])
    score = jnp.array([[0.3, -0.2, -jnp.inf], [0.1, 0.0, 0.5]])
    ceiling, inverse_floor = extremes(joint, score)
    assert inverse_floor == jnp.inf and floor_factor(ceiling, inverse_floor, 8) == jnp.inf
    found = chain(joint, score, 8)
    assert found.ratio <= found.factor < jnp.inf


@pytest.mark.slow
def test_extremes_look_at_pairs_of_both_marginals_only(x64):
    joint = jnp.array([[0.3, 0.2, 0.0], [0.1, 0.4, 0.0], [0.0, 0.0, 0.0]])
    score = jnp.array([[0.3, -0.2, 50.0], [0.1, 0.0, -50.0], [9.0, -9.0, 0.0]])
    inner = extremes(joint[:2, :2], score[:2, :2])
    np.testing.assert_allclose(extremes(joint, score), inner, rtol=1e-14)


def test_one_candidate_bounds_nothing(x64):
    one = jnp.array(1.5)
    assert ceiling_factor(one, 1) == jnp.inf
    assert floor_factor(one, one, 1) == jnp.inf


def test_bad_input_is_named(x64, as_users_run):
    with pytest.raises(ValueError, match="at least 1"):
        ceiling_factor(jnp.array(0.5), 4)
    with pytest.raises(ValueError, match="inverse_floor is"):
        floor_factor(jnp.array(2.0), jnp.array(0.5), 4)
    with pytest.raises(TypeError, match="pass a JAX array"):
        ceiling_factor(2.0, 4)
    for candidates in (0, 2.5):
        with pytest.raises(ValueError, match="give a whole number of at least 1"):
            ceiling_factor(jnp.array(2.0), candidates)
        with pytest.raises(ValueError, match="give a whole number of at least 1"):
            floor_factor(jnp.array(2.0), jnp.array(2.0), candidates)
    with pytest.raises(ValueError, match="sums to"):
        bounds.extremes(2 * joints.identical(2), jnp.zeros((2, 2)))
