"""The contrastive risk against the batch loss that it is the mean of, and its limit of infinitely many candidates."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compilation import quickly
from finite_joints import CLOSE, N, expected_over_batches, generator, normal, on_scores, rectangular

from theorykit import losses
from theorykit.spectral.contrastive import pair_kernel
from theorykit.surrogate import contrastive_risk, limiting_risk

SEEDS = range(5)


@jax.jit
def risk_of(joint, scores, candidates):
    """R_K - ln K."""
    return contrastive_risk(joint, scores, candidates) - jnp.log(jnp.asarray(candidates, joint.dtype))


limit_of = jax.jit(limiting_risk)


@pytest.mark.parametrize("candidates", [1, 2, 3])
def test_exact_risk_is_the_mean_of_the_batch_loss(x64, candidates):
    joint, scores = rectangular(4), 3 * normal(0, 3, 2)
    mean = quickly(lambda s: expected_over_batches(joint, candidates, on_scores(losses.info_nce, s)), scores)
    np.testing.assert_allclose(risk_of(joint, scores, candidates), mean - math.log(candidates), **CLOSE)


def test_exact_risk_covers_points_without_mass_and_wide_scores(x64):
    joint = jnp.asarray([[0.5, 0.0], [0.5, 0.0], [0.0, 0.0]])
    for spread in (0.0, 30.0, 190.0):
        scores = jnp.asarray([[0.0, spread], [spread, 0.0], [0.0, 0.0]])
        np.testing.assert_allclose(risk_of(joint, scores, 5), 0, atol=1e-13)  # one partner: always found by chance
    joint = jnp.asarray([[0.5, 0.0], [0.0, 0.5]])
    found = risk_of(joint, 190 * jnp.eye(2), 4)
    # With 0 to 3 further copies of the partner: E ln(1 + B), B binomial(3, 1/2), less ln 4.
    expected = (3 * math.log(2) + 3 * math.log(3) + math.log(4)) / 8 - math.log(4)
    np.testing.assert_allclose(found, expected, **CLOSE)


def test_exact_risk_approaches_its_limit_in_proportion_to_the_number_of_candidates(x64):
    joint, scores = rectangular(5, (4, 4)), normal(1, 4, 4)
    limit = limit_of(joint, scores)
    gaps = [float(risk_of(joint, scores, k) - limit) for k in (10**4, 2 * 10**4, 10**6)]
    np.testing.assert_allclose(gaps[0] / gaps[1], 2, rtol=1e-3)
    np.testing.assert_allclose(gaps[0] / gaps[2], 100, rtol=1e-3)


def test_limit_is_least_at_the_pointwise_mutual_information(x64):
    joint = rectangular(6, (4, 4))
    best = jnp.log(pair_kernel(joint))
    information = jnp.sum(joint * best)
    np.testing.assert_allclose(limit_of(joint, best + normal(0, 4, 1)), -information, **CLOSE)
    assert all(limit_of(joint, best + normal(s, 4, 4)) > -information for s in SEEDS)


def test_single_precision_stays_single_also_with_wide_scores():
    joint = jnp.asarray(generator(0).dirichlet(np.ones(N)), jnp.float32)
    joint = (joint[:, None] + joint[None, :]) / (2 * N)
    found = risk_of(joint, jnp.zeros_like(joint), 4)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, 0, atol=1e-5)
    uniform, wide = jnp.full((2, 2), 0.25, jnp.float32), jnp.asarray([[0.0, 100.0], [0.0, 0.0]], jnp.float32)
    # ln of the mean of e^100 and 1, less the mean of 100 and 0; nothing for the other row.
    np.testing.assert_allclose(limit_of(uniform, wide), (100 - math.log(2) - 50) / 2, rtol=1e-6)


def test_a_limit_rules_out_what_the_score_does_and_checks_its_arguments(as_users_run):
    joint = jnp.asarray([[0.5, 0.0], [0.0, 0.5]])
    never = jnp.asarray([[0.0, -jnp.inf], [-jnp.inf, 0.0]])
    np.testing.assert_allclose(limiting_risk(joint, never), -math.log(2), rtol=1e-6)
    assert limiting_risk(joint, never[::-1]) == jnp.inf
    with pytest.raises(ValueError, match="at least 1"):
        contrastive_risk(joint, joint, 0)
    with pytest.raises(ValueError, match="one score to each cell"):
        limiting_risk(joint, jnp.ones((2, 3)))
