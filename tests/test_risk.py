"""The contrastive risk: integral, enumeration and loops against each other, limits, gradients, sampling, bad input."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from theorykit.surrogate import joint as joints
from theorykit.surrogate import risk as risks
from theorykit.surrogate.risk import contrastive_risk, contrastive_risk_by_enumeration

NX, NY = 4, 3  # one shape for most tests: one compilation
EXACT = 1e-12  # the figure to reach, relative to the size of risk and scores


def draw(seed, deviation=1.0, zeros=0.3):
    one, two = jax.random.split(jax.random.key(seed))
    return joints.random_joint(one, NX, NY, zeros=zeros), deviation * jax.random.normal(two, (NX, NY))


def loops(joint, score, candidates):
    """The definition: every tuple of negatives, Python numbers."""
    joint, score = np.asarray(joint), np.asarray(score)
    q, terms = joint.sum(axis=0), []
    for x, y in itertools.product(range(joint.shape[0]), range(joint.shape[1])):
        for others in itertools.product(range(joint.shape[1]), repeat=candidates - 1):
            chance = joint[x, y] * math.prod(q[z] for z in others)
            if chance > 0:
                top = max(score[x, z] for z in (y, *others))
                total = math.fsum(math.exp(score[x, z] - top) for z in (y, *others))
                terms.append(chance * (top + math.log(total) - score[x, y]))
    return math.fsum(terms)


gradient_of_integral = jax.jit(jax.grad(contrastive_risk, argnums=1))
gradient_of_sum = jax.jit(jax.grad(contrastive_risk_by_enumeration, argnums=1), static_argnums=2)


def close(found, wanted, size=1.0):
    np.testing.assert_allclose(found, wanted, rtol=EXACT, atol=EXACT * size)


# ---------------------------------------------------------------- values


@pytest.mark.slow
@settings(max_examples=8, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([0.1, 3.0, 30.0]), st.sampled_from([0.0, 0.5]))
def test_integral_and_enumeration_are_the_definition(seed, deviation, zeros):
    with jax.enable_x64(True):
        joint, score = draw(seed, deviation, zeros)
        for candidates in (2, 4):
            naive = loops(joint, score, candidates)
            close(contrastive_risk(joint, score, candidates), naive)
            close(contrastive_risk_by_enumeration(joint, score, candidates), naive)
        both = loops(joint, score, 3) + loops(joint.T, score.T, 3)
        close(contrastive_risk(joint, score, 3, side="both"), both)
        close(contrastive_risk_by_enumeration(joint, score, 3, side="both"), both)


@pytest.mark.slow
@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([1.0, 20.0, 100.0]), st.sampled_from([2, 20, 60]))
def test_widely_spread_scores_and_more_candidates_agree_with_enumeration(seed, deviation, candidates):
    with jax.enable_x64(True):
        joint, score = draw(seed, deviation)
        close(
            contrastive_risk(joint, score, candidates),
            contrastive_risk_by_enumeration(joint, score, candidates),
        )


def test_equal_scores_give_log_k_for_any_number_of_candidates(x64):
    joint, score = draw(0)
    for candidates in (1, 2, 1000, 10**6, 10**12):
        close(contrastive_risk(joint, 0 * score + 3, candidates), math.log(candidates))
    with jax.enable_x64(False):  # whole numbers beyond int32 as well
        single = contrastive_risk(jnp.float32(joint), jnp.zeros((NX, NY), jnp.float32), 10**12)
    np.testing.assert_allclose(single, math.log(10**12), rtol=100 * np.finfo(np.float32).eps)


def test_two_symbols_with_the_binomial_sum_at_ten_thousand_candidates(x64):
    # One row, two symbols: K - 1 negatives of which n are the second, n binomial.
    q, gap, candidates = 0.3, 4.0, 10_000
    n = np.arange(candidates)
    weights = scipy.stats.binom.pmf(n, candidates - 1, q)
    first = np.log(1 + (candidates - 1 - n) + n * np.exp(gap))
    second = np.log(np.exp(gap) + (candidates - 1 - n) + n * np.exp(gap)) - gap
    found = contrastive_risk(jnp.array([[1 - q, q]]), jnp.array([[0.0, gap]]), candidates)
    # The binomial weights of SciPy are good to about 1e-12 relative at this size.
    np.testing.assert_allclose(found, (1 - q) * weights @ first + q * weights @ second, rtol=1e-11)


def test_one_candidate_leaves_nothing_to_find(x64):
    joint, score = draw(1, 50.0)
    for s in (score, jnp.full_like(score, -jnp.inf)):
        for side in ("x", "both"):
            assert float(contrastive_risk(joint, s, 1, side=side)) == 0
            assert float(contrastive_risk_by_enumeration(joint, s, 1, side=side)) == 0
    assert np.all(np.asarray(gradient_of_integral(joint, score, 1)) == 0)


def test_minus_infinity_is_harmless_off_the_support_and_infinite_on_it(x64):
    joint, score = draw(2, zeros=1.0)
    masked = jnp.where(joint > 0, score, -jnp.inf)
    assert int(jnp.sum(joint == 0)) > 0
    for candidates in (2, 5):
        close(contrastive_risk(joint, masked, candidates), loops(joint, masked, candidates))
        close(contrastive_risk_by_enumeration(joint, masked, candidates), loops(joint, masked, candidates))
    x, y = (int(i[0]) for i in np.nonzero(np.asarray(joint)))
    for s in (score.at[x, y].set(-jnp.inf), score.at[x].set(-jnp.inf)):
        assert float(contrastive_risk(joint, s, 2)) == math.inf
        assert float(jax.jit(contrastive_risk)(joint, s, 2)) == math.inf
        assert float(contrastive_risk_by_enumeration(joint, s, 2)) == math.inf


def test_scores_of_empty_rows_and_columns_are_never_looked_at(x64):
    joint, score = draw(3)
    row_and_column = joint.at[1].set(0).at[:, 2].set(0)
    row_and_column = row_and_column / jnp.sum(row_and_column)
    kept = np.ix_([0, 2, 3], [0, 1])
    wanted = loops(np.asarray(row_and_column)[kept], np.asarray(score)[kept], 4)
    for other in (0.0, 1e6, -jnp.inf, jnp.nan):
        s = score.at[1].set(other).at[:, 2].set(other)
        close(contrastive_risk(row_and_column, s, 4), wanted)
        gradient = np.asarray(gradient_of_integral(row_and_column, s, 4))
        assert np.all(gradient[1] == 0) and np.all(gradient[:, 2] == 0) and np.all(np.isfinite(gradient))


def test_adding_a_function_of_the_given_variable_changes_nothing(x64):
    joint, score = draw(4)
    shift = jnp.array([700.0, -700.0, 3.0, 0.0])[:, None]  # exponentials of these overflow and vanish
    for candidates in (2, 10**6):
        wanted = contrastive_risk(joint, score, candidates)
        # Subtracting scores of 700 costs 700 eps.
        np.testing.assert_allclose(contrastive_risk(joint, score + shift, candidates), wanted, rtol=1e-12)


def test_float32_is_as_exact_as_its_precision():
    with jax.enable_x64(True):
        joint, score = draw(5, 3.0)
        wanted = [float(contrastive_risk(joint, score, k)) for k in (2, 10**6)]
    # 100 roundings: sums over the table and the nodes, and scores of size 10 that are differences.
    tolerance = 100 * np.finfo(np.float32).eps
    for candidates, value in zip((2, 10**6), wanted, strict=True):
        found = contrastive_risk(jnp.float32(joint), jnp.float32(score), candidates)
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(found, value, rtol=tolerance)


def test_the_distance_from_its_limit_falls_as_one_over_k_up_to_a_million(x64):
    # R_K - log K tends to E_p log Z - E_P s, as the mean over the candidates tends to Z; distance c/K + O(1/K^2).
    joint, score = draw(6)
    q = jnp.sum(joint, axis=0)
    limit = jnp.sum(joint * (jnp.log(jnp.exp(score) @ q)[:, None] - score))
    gaps = [float(contrastive_risk(joint, score, k)) - math.log(k) - float(limit) for k in (10**5, 10**6)]
    # The next order is 1/K relative, and rounding of R (1e-14) is 1e-8 of a gap of order 1e-6.
    assert gaps[0] / gaps[1] == pytest.approx(10, rel=1e-4)


# ---------------------------------------------------------------- theorems


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([0.0, 0.5, 1.0]))
def test_the_log_ratio_is_the_minimum_and_its_risk_gives_a_lower_bound_of_information(seed, zeros):
    with jax.enable_x64(True):
        joint, score = draw(seed, 2.0, zeros)
        information, square = float(joints.mutual_information(joint)), float(joints.chi_square(joint))
        below = -EXACT
        previous = 0.0
        for candidates in (1, 2, 7, 10**3):
            bound = math.log(candidates) - float(risks.minimal_risk(joint, candidates))
            assert bound - previous >= below  # I_K does not fall
            assert below <= information - bound <= math.log1p(square / candidates) - below
            previous = bound
        excess = [float(risks.excess_risk(joint, score, k)) for k in (2, 7, 10**3)]
        assert excess[0] >= below and all(b - a >= below for a, b in itertools.pairwise(excess))


@pytest.mark.parametrize("side", ["x", "both"])
def test_at_the_log_ratio_the_gradient_vanishes(x64, side):
    joint, _ = draw(7, zeros=0.0)
    for candidates in (2, 1000):
        gradient = jax.grad(lambda s, k=candidates: contrastive_risk(joint, s, k, side=side))(
            risks.optimal_score(joint)
        )
        close(gradient, jnp.zeros((NX, NY)))


def test_identical_symbols_and_the_log_ratio_leave_the_collisions(x64):
    # The positive scores alike with every negative that equals it: E log(1 + Bin(K - 1, 1/N)).
    n, candidates = 3, 5
    collisions = [math.comb(4, k) / n**4 * (n - 1) ** (4 - k) * math.log(1 + k) for k in range(5)]
    close(risks.minimal_risk(joints.identical(n), candidates), math.fsum(collisions))
    close(risks.minimal_risk(joints.identical(n), candidates, side="both"), 2 * math.fsum(collisions))


def test_the_log_ratio_rules_out_pairs_that_never_meet_and_is_neutral_elsewhere(x64):
    score = risks.optimal_score(jnp.array([[0.5, 0.0, 0.0], [0.25, 0.25, 0.0]]))
    assert float(score[0, 1]) == -math.inf
    assert np.all(np.asarray(score[:, 2]) == 0)


# ---------------------------------------------------------------- derivatives and transformations


@settings(max_examples=6, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([1.0, 10.0, 100.0]))
def test_the_gradient_is_that_of_the_enumeration(seed, deviation):
    with jax.enable_x64(True):
        joint, score = draw(seed, deviation)
        for candidates in (2, 5):
            found = gradient_of_integral(joint, score, candidates)
            wanted = gradient_of_sum(joint, score, candidates)
            close(found, wanted)
            np.testing.assert_allclose(jnp.sum(found, axis=1), 0, atol=EXACT)  # invariance under c(x)


@pytest.mark.parametrize("candidates", [3, 10**6])
def test_the_gradient_through_jit_is_that_of_finite_differences(x64, candidates):
    joint, score = draw(8)
    value = jax.jit(lambda s: contrastive_risk(joint, s, candidates, side="both"))
    gradient = jax.jit(jax.grad(value))(score)
    direction = jax.random.normal(jax.random.key(9), score.shape)
    step = 1e-4
    # Error step^2 times the third derivative, plus rounding of values of size 25 over the step: below 1e-8 together.
    difference = (value(score + step * direction) - value(score - step * direction)) / (2 * step)
    np.testing.assert_allclose(jnp.sum(gradient * direction), difference, atol=1e-7)


def test_forward_mode_and_the_hessian_agree_with_the_enumeration(x64):
    joint, score = draw(10)
    direction = jax.random.normal(jax.random.key(11), score.shape)
    exact, oracle = (
        lambda s: contrastive_risk(joint, s, 3),
        lambda s: contrastive_risk_by_enumeration(joint, s, 3),
    )
    along = jax.jit(lambda s: jax.jvp(exact, (s,), (direction,))[1])(score)
    close(along, jnp.sum(jax.jit(jax.grad(oracle))(score) * direction))
    close(jax.jit(jax.hessian(exact))(score), jax.jit(jax.hessian(oracle))(score))


def test_vmap_over_joints_scores_and_candidates_is_a_loop(x64):
    tables, scores = (jnp.stack(each) for each in zip(*(draw(i, 10.0**i) for i in range(3)), strict=True))
    counts = jnp.array([2, 100, 10**6])
    found = jax.jit(jax.vmap(contrastive_risk))(tables, scores, counts)
    each = [contrastive_risk(t, s, int(k)) for t, s, k in zip(tables, scores, counts, strict=True)]
    np.testing.assert_allclose(found, jnp.stack(each), rtol=EXACT)
    gradients = jax.jit(jax.vmap(gradient_of_integral))(tables, scores, counts)
    alone = gradient_of_integral(tables[2], scores[2], counts[2])
    close(gradients[2], alone)


def test_one_step_of_descent_lowers_the_risk(x64):
    joint, score = draw(12)
    value, gradient = jax.value_and_grad(contrastive_risk, argnums=1)(joint, score, 10**4)
    close(value, contrastive_risk(joint, score, 10**4))
    assert float(contrastive_risk(joint, score - 0.1 * gradient, 10**4)) < float(value)


def test_derivatives_in_the_joint_or_the_count_are_refused(x64):
    joint, score = draw(13)
    with pytest.raises(NotImplementedError, match="joint"):
        jax.grad(contrastive_risk)(joint, score, 3)
    with pytest.raises(NotImplementedError, match="candidates"):
        jax.grad(contrastive_risk, argnums=2)(joint, score, 3.0)


@pytest.mark.parametrize("symbols", [64, 512])
def test_value_and_gradient_take_a_few_tables_and_a_block_of_nodes_in_memory(x64, symbols):
    table = jax.ShapeDtypeStruct((512, symbols), jnp.float64)
    program = jax.jit(jax.value_and_grad(contrastive_risk, argnums=1))
    found = program.lower(table, table, jax.ShapeDtypeStruct((), jnp.float64)).compile().memory_analysis()
    # A block of nodes is 4 MiB; compiled, four of them are alive at once (17 MiB and 20 MiB in all were found), and one
    # more is left to other compilers. Four tables: joint, scores and gradient, inside the loop and after. Blocks of 32
    # nodes whatever the size of the table would take 132 MiB for the larger one.
    assert found.temp_size_in_bytes < 5 * 2**22 + 4 * 8 * 512 * symbols


# ---------------------------------------------------------------- sampling


def test_sampling_agrees_within_its_standard_error(x64):
    joint, score = draw(14)
    for side in ("x", "both"):
        found = risks.contrastive_risk_by_sampling(joint, score, 8, key=jax.random.key(0), samples=20_000, side=side)
        exact = float(contrastive_risk(joint, score, 8, side=side))
        # Four standard errors: exceeded by chance once in 15 000 keys, and the key is fixed.
        assert abs(float(found.value) - exact) < 4 * float(found.standard_error)
        assert float(found.standard_error) < 0.02


def test_sampling_draws_many_candidates_from_many_symbols_in_little_memory(x64):
    # A number for every sample, candidate and symbol would be half a gigabyte for a block of samples.
    joint = joints.identical(64)
    score = jnp.zeros_like(joint)
    sample = jax.jit(lambda: risks.contrastive_risk_by_sampling(joint, score, 4096, key=jax.random.key(0), samples=300))
    assert sample.lower().compile().memory_analysis().temp_size_in_bytes < 2**28


@pytest.mark.slow
def test_sampling_in_blocks_and_with_one_candidate_or_infinite_loss(x64, monkeypatch):
    joint, score = draw(15)
    whole = risks.contrastive_risk_by_sampling(joint, score, 6, key=jax.random.key(1), samples=50)
    monkeypatch.setattr(risks, "_SAMPLED_SCORES", 6 * 7)
    risks._sample.clear_cache()
    blocks = risks.contrastive_risk_by_sampling(joint, score, 6, key=jax.random.key(1), samples=50)
    risks._sample.clear_cache()
    np.testing.assert_allclose(whole.value, blocks.value, rtol=EXACT)
    nowhere = jnp.full_like(score, -jnp.inf)
    for candidates, s, loss in ((1, score, 0), (1, nowhere, 0), (6, nowhere, math.inf)):
        found = risks.contrastive_risk_by_sampling(joint, s, candidates, key=jax.random.key(1), samples=50)
        assert float(found.value) == loss


# ---------------------------------------------------------------- bad input


def functions():
    yield lambda *a, **k: contrastive_risk(*a, **k)
    yield lambda *a, **k: contrastive_risk_by_enumeration(*a, **k)
    yield lambda *a, **k: risks.contrastive_risk_by_sampling(*a, key=jax.random.key(0), samples=4, **k)
    yield lambda *a, **k: risks.excess_risk(*a, **k)


GOOD = jnp.full((2, 3), 1 / 6)
ZERO = jnp.zeros((2, 3))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((GOOD * 2, ZERO, 2), ValueError, "sums to 2.*divide"),
        ((GOOD.at[0, 0].set(-0.1), ZERO, 2), ValueError, "negative"),
        ((GOOD.at[0, 0].set(jnp.nan), ZERO, 2), ValueError, "not finite"),
        ((GOOD, jnp.zeros((3, 2)), 2), ValueError, r"score has shape \(3, 2\)"),
        ((GOOD, jnp.zeros(3), 2), ValueError, "score has shape"),
        ((GOOD, np.zeros((2, 3), np.float32), 2), TypeError, r"jnp\.asarray"),
        ((GOOD, jnp.zeros((2, 3), jnp.float16), 2), TypeError, "dtype float16"),
        ((GOOD, ZERO.at[0, 0].set(jnp.nan), 2), ValueError, "NaN"),
        ((GOOD, ZERO.at[0, 0].set(jnp.inf), 2), ValueError, r"\+inf"),
        ((GOOD, ZERO, 0), ValueError, "whole number of at least 1"),
        ((GOOD, ZERO, 2.5), ValueError, "whole number"),
        ((GOOD, ZERO, math.inf), ValueError, "whole number"),
        ((GOOD, ZERO, jnp.array([2, 3])), ValueError, "use jax.vmap"),
    ],
)
def test_bad_input_is_refused_with_its_cause(as_users_run, arguments, error, message):
    for function in functions():
        with pytest.raises(error, match=message):
            function(*arguments)


def test_an_unknown_side_and_too_few_samples_are_refused(as_users_run):
    for function in functions():
        with pytest.raises(ValueError, match="side is 'y'"):
            function(GOOD, ZERO, 2, side="y")
    with pytest.raises(ValueError, match="at least two"):
        risks.contrastive_risk_by_sampling(GOOD, ZERO, 2, key=jax.random.key(0), samples=1)


def test_enumeration_refuses_what_it_cannot_list_and_counts_that_are_arrays(as_users_run):
    with pytest.raises(ValueError, match="use contrastive_risk"):
        contrastive_risk_by_enumeration(GOOD, ZERO, 10**4)
    with pytest.raises(TypeError, match="Python int"):
        contrastive_risk_by_enumeration(GOOD, ZERO, jnp.array(3))
    with pytest.raises(TypeError, match="Python int"):
        risks.contrastive_risk_by_sampling(GOOD, ZERO, jnp.array(3), key=jax.random.key(0), samples=4)


def test_a_score_that_only_looks_like_minus_infinity_is_refused_instead_of_running_for_ever(x64):
    joint, score = draw(16)
    x, y = (int(i[0]) for i in np.nonzero(np.asarray(joint)))
    far = score.at[x, y].set(-1e30)
    with pytest.raises(ValueError, match="give -inf"):
        contrastive_risk(joint, far, 2)
    assert math.isnan(float(jax.jit(contrastive_risk)(joint, far, 2)))
    assert math.isnan(float(jax.jit(contrastive_risk)(joint, score.at[x, y].set(jnp.nan), 2)))
