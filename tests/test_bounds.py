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
    np.testing.assert_allclose(found.floor_factor, across, rtol=1e-14)
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


@pytest.mark.slow
def test_extremes_look_at_pairs_of_both_marginals_only(x64):
    joint = jnp.array([[0.3, 0.2, 0.0], [0.1, 0.4, 0.0], [0.0, 0.0, 0.0]])
    score = jnp.array([[0.3, -0.2, 50.0], [0.1, 0.0, -50.0], [9.0, -9.0, 0.0]])
    inner = extremes(joint[:2, :2], score[:2, :2])
    np.testing.assert_allclose(extremes(joint, score), inner, rtol=1e-14)


# Functions of the module, since a compiled program belongs to its function. K is traced: one program for all K.
def chain_of(joint, score, candidates):
    return chain(joint, score, candidates), ceiling_and_floor(joint, score, candidates)


def chain_of_both_sides(joint, score, candidates):
    found = chain(joint, score, candidates, side="both")
    sides = (ceiling_and_floor(p, s, candidates) for p, s in ((joint, score), (joint.T, score.T)))
    return found, tuple(map(jnp.maximum, *sides))


def ceiling_and_floor(joint, score, candidates):
    ceiling, inverse_floor = extremes(joint, score)
    return ceiling_factor(ceiling, candidates), floor_factor(ceiling, inverse_floor, candidates)


def one_case():
    joint, score = (a[0] for a in cases(1, 0.3))
    assert joint[0, 0] > 0
    return joint, score


@pytest.mark.parametrize("function", [chain_of, chain_of_both_sides])
def test_the_chain_has_the_factors_of_its_extremes_and_one_candidate_leaves_all_in_the_gap(x64, function):
    joint, score = one_case()
    found, (ceiling, floor) = quickly(function, joint, score, jnp.asarray(9.0))
    np.testing.assert_allclose([found.factor, found.floor_factor], [ceiling, floor], rtol=1e-14)
    # Risks of order one: the excess errs by a few roundings.
    assert found.sufficiency <= found.factor * found.excess + 1e-13 <= found.floor_factor * found.excess + 2e-13
    one, _ = quickly(function, joint, score, jnp.asarray(1.0))
    assert one.risk == one.minimum == one.excess == 0
    assert one.gap == one.sufficiency == found.sufficiency > 0
    assert one.factor == one.floor_factor == one.upper == jnp.inf and jnp.isnan(one.ratio)


def test_a_model_that_rules_out_what_never_happens_has_a_finite_factor(x64):
    joint = jnp.array([[0.3, 0.2, 0.0], [0.1, 0.1, 0.3]])
    score = jnp.array([[0.3, -0.2, -jnp.inf], [0.1, 0.0, 0.5]])
    ceiling, inverse_floor = extremes(joint, score)
    assert inverse_floor == jnp.inf and floor_factor(ceiling, inverse_floor, 8) == jnp.inf
    found, _ = quickly(chain_of, joint, score, jnp.asarray(8.0))
    assert found.ratio <= found.factor < jnp.inf


@pytest.mark.parametrize("candidates", [1.0, 2.0, 1000.0])
@pytest.mark.parametrize("excluded", [(0, 0), 0], ids=["a pair", "all of a row"])
def test_a_chain_that_rules_out_what_happens_is_infinite_and_not_undefined(x64, candidates, excluded):
    joint, score = one_case()
    found, _ = quickly(chain_of, joint, score.at[excluded].set(-jnp.inf), jnp.asarray(candidates))
    assert found.sufficiency == found.gap == found.upper == found.floor_factor == jnp.inf
    assert found.risk == found.excess == (0 if candidates == 1 else jnp.inf) and jnp.isfinite(found.minimum)
    assert jnp.isinf(found.factor) == (candidates == 1) and jnp.isnan(found.ratio)


def test_the_gap_grows_without_bound_as_a_score_comes_to_rule_out_what_happens(x64):
    # A score that falls by d loses P d in S, and in the excess that of the lists with another candidate only: what
    # remains are lists of K times the pair, P q^(K-1).
    joint, score = one_case()
    gaps = [quickly(chain_of, joint, score.at[0, 0].set(-d), jnp.asarray(3.0))[0].gap for d in (30.0, 60.0)]
    # Up to e^-30 of the other candidates' share, and roundings of a risk of order ten over the difference.
    np.testing.assert_allclose(gaps[1] - gaps[0], 30 * joint[0, 0] * jnp.sum(joint[:, 0]) ** 2, rtol=1e-11)


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
