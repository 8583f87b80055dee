"""Mutual information: bounds against their slacks and limits, estimators against exact means by enumeration, errors."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compilation import quickly

from theorykit import encoders
from theorykit.surrogate import joint as joints
from theorykit.surrogate import mutual_information as mi
from theorykit.surrogate.information_loss import sufficiency
from theorykit.surrogate.risk import contrastive_risk, optimal_score

NX, NY = 4, 3
CLOSE = {"rtol": 1e-11, "atol": 1e-12}  # float64: sums of some thousand terms of order 1
ESTIMATORS = {
    "InfoNCE": mi.estimate_info_nce,
    "DV": mi.estimate_donsker_varadhan,
    "NWJ": mi.estimate_nwj,
    "MINE": lambda s: mi.estimate_mine(s, 0.3),
    "interpolated": lambda s: mi.estimate_interpolated(s, 0.4),
}


def draw(seed, deviation=1.0, zeros=0.3):
    one, two = jax.random.split(jax.random.key(seed))
    return joints.random_joint(one, NX, NY, zeros=zeros), deviation * jax.random.normal(two, (NX, NY))


def batches(joint, score, n):
    """Scores of every batch of n pairs, (batches, n, n), and their probabilities."""
    x, y = np.divmod(np.arange(joint.size), joint.shape[1])
    chosen = np.array(list(itertools.product(range(joint.size), repeat=n)))
    chances = np.prod(np.asarray(joint).reshape(-1)[chosen], axis=1)
    return jnp.asarray(np.asarray(score)[x[chosen][:, :, None], y[chosen][:, None, :]]), chances


def by_listing(joint, score, candidates, weight):
    """The interpolated bound as a sum over x and all candidates."""
    joint, score = np.asarray(joint), np.asarray(score)
    p, q, total = joint.sum(1), joint.sum(0), 1.0
    for x in range(NX):
        for ys in itertools.product(range(NY), repeat=candidates):
            m = np.mean(np.exp(score[x, list(ys)]))
            v = np.exp(score[x, ys[0]]) / (weight * m + 1 - weight)
            others = np.prod(q[list(ys[1:])])
            total += others * (joint[x, ys[0]] * np.log(v) - p[x] * q[ys[0]] * v)
    return total


def gaussian_batches(seed, rho, *shape):
    x, noise = jax.random.normal(jax.random.key(seed), (2, *shape))
    return jax.vmap(lambda x, y: mi.gaussian_log_ratio(x, y, rho))(x, rho * x + math.sqrt(1 - rho**2) * noise)


@pytest.mark.slow
def test_slacks_are_what_the_bounds_lose(x64):
    for seed, deviation in enumerate((0.1, 1.0, 10.0)):
        joint, score = draw(seed, deviation)
        information = joints.mutual_information(joint)
        close = {"rtol": 1e-12, "atol": 1e-12 * deviation}
        np.testing.assert_allclose(
            information - mi.donsker_varadhan(joint, score), mi.donsker_varadhan_slack(joint, score), **close
        )
        np.testing.assert_allclose(information - mi.nwj(joint, score), mi.nwj_slack(joint, score), **close)


@pytest.mark.slow
def test_what_dv_loses_is_the_sufficiency_and_a_divergence_of_the_rows(x64):
    joint, score = draw(3)
    p, q = joints.marginals(joint)
    z = jnp.exp(score) @ q
    rows = jnp.sum(p * jnp.log(p @ z / z))
    np.testing.assert_allclose(mi.donsker_varadhan_slack(joint, score), sufficiency(joint, score) + rows, **CLOSE)


def test_the_optima_reach_the_information_and_their_slack_keeps_its_digits(x64):
    joint, direction = draw(4)
    best, information = optimal_score(joint), joints.mutual_information(joint)
    np.testing.assert_allclose(mi.donsker_varadhan(joint, best + 7), information, **CLOSE)
    np.testing.assert_allclose(mi.nwj(joint, best + 1), information, **CLOSE)
    np.testing.assert_allclose(mi.interpolated(joint, best, 4, 0.0), information, **CLOSE)
    # To second order NWJ loses E_P u^2 / 2 and DV the same less the mean: Var_P u / 2.
    mean, square = jnp.sum(joint * direction), jnp.sum(joint * direction**2)
    for size in (1e-4, 1e-6):
        step = size**2 / 2
        np.testing.assert_allclose(mi.nwj_slack(joint, best + 1 + size * direction), step * square, rtol=10 * size)
        slack = mi.donsker_varadhan_slack(joint, best + size * direction)
        np.testing.assert_allclose(slack, step * (square - mean**2), rtol=10 * size)


def test_info_nce_is_ln_k_minus_the_risk_and_capped(x64):
    joint = joints.identical(20)
    for k in (1, 2, 8):
        found = mi.info_nce(joint, optimal_score(joint), k)
        np.testing.assert_allclose(found, math.log(k) - contrastive_risk(joint, optimal_score(joint), k), **CLOSE)
        assert found <= math.log(k)
    assert mi.donsker_varadhan(joint, optimal_score(joint)) > math.log(8)


@pytest.mark.parametrize("weight", [0.0, 0.3, 0.9])
@pytest.mark.parametrize("candidates", [1, 2, 4])
def test_the_interpolated_bound_is_its_definition(x64, candidates, weight):
    joint, score = draw(5, 2.0)
    np.testing.assert_allclose(
        mi.interpolated(joint, score, candidates, weight), by_listing(joint, score, candidates, weight), **CLOSE
    )


def test_the_interpolated_bound_is_nwj_and_info_nce_at_its_ends(x64):
    joint, score = draw(6, 2.0)
    np.testing.assert_allclose(mi.interpolated(joint, score, 9, 0.0), mi.nwj(joint, score + 1), **CLOSE)
    near = mi.interpolated(joint, score, 9, 1 - 1e-9)
    np.testing.assert_allclose(near, mi.interpolated(joint, score, 9, 1.0), atol=1e-7)
    assert mi.interpolated(joint, score, 9, 1.0) == mi.info_nce(joint, score, 9)


def test_the_interpolated_bound_passes_ln_k_over_alpha_but_not_one_more(x64):
    joint = joints.identical(200)
    score = jnp.where(joint > 0, 40.0, -jnp.inf)
    found = mi.interpolated(joint, score, 2, 0.5)
    assert math.log(4) + 0.9 < found < math.log(4) + 1


@pytest.mark.slow
def test_scores_beyond_the_grid_of_the_interpolated_bound_raise_and_are_nan_inside_jit(x64, as_users_run):
    # float32: e^-67.4 is eps e^4 times the smallest normal number; float64: 140 nats for the nodes, 45 for the ends.
    for dtype, fits, beyond in ((jnp.float32, 67.0, (68.0, 84.0, 95.0)), (jnp.float64, 90.0, (100.0, 300.0, 720.0))):
        joint, score = (z.astype(dtype) for z in draw(18, zeros=0.0))
        joint /= jnp.sum(joint)
        inside = jax.jit(lambda p, s: mi.interpolated(p, s, 4, 0.5))
        at = [score.at[0, 0].set(largest) for largest in (fits, *beyond)]
        # Nodes are rounded by eps of their logarithm, which is at most that of the largest score and the ends.
        rtol = 10 * float(jnp.finfo(dtype).eps) * (fits + 45)
        expected = by_listing(joint.astype(float), at[0].astype(float), 4, 0.5)
        for bound in (inside, lambda p, s: mi.interpolated(p, s, 4, 0.5)):
            np.testing.assert_allclose(bound(joint, at[0]), expected, rtol=rtol)
        for s in at[1:]:
            assert jnp.isnan(inside(joint, s))
            with pytest.raises(ValueError, match="beyond the grid"):
                mi.interpolated(joint, s, 4, 0.5)


@pytest.mark.slow
def test_the_variance_of_the_interpolated_bound_stays_bounded_and_that_of_nwj_does_not(x64):
    # X = Y on N symbols: only which of four pairs are equal counts; N (N - 1) ... / N^4 of the draws for each pattern.
    patterns = np.array(
        [p for p in itertools.product(range(4), repeat=4) if all(p[i] <= max((-1, *p[:i])) + 1 for i in range(4))]
    )
    same = patterns[:, :, None] == patterns[:, None, :]
    kinds = patterns.max(axis=1) + 1
    limit = (math.sqrt(math.log(6) ** 2 + 4 / math.e**2) + math.sqrt(6)) ** 2
    for n in (4, 64, 1024):
        chances = np.array([math.perm(n, k) / n**4 for k in kinds])
        np.testing.assert_allclose(chances.sum(), 1)
        scores = jnp.asarray(np.where(same, math.log(n), -np.inf))
        variances = []
        for values in (mi.estimate_interpolated(scores, 0.5), mi.estimate_nwj(scores + 1)):
            mean = chances @ np.asarray(values)
            variances.append(chances @ (np.asarray(values) - mean) ** 2)
        assert variances[0] <= limit
        np.testing.assert_allclose(variances[1], mi.nwj_variance(joints.identical(n), 4), rtol=1e-9)


def test_many_candidates_bring_the_interpolated_bound_to_a_limit_at_the_rate_one_over_k(x64):
    joint, score = draw(7)
    values = [mi.interpolated(joint, score, k, 0.5) for k in (10**4, 2 * 10**4, 4 * 10**4)]
    np.testing.assert_allclose((values[1] - values[0]) / (values[2] - values[1]), 2, rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("n", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_means_of_the_estimators_over_all_batches_are_the_exact_values(x64, n):
    joint, score = draw(8)
    joint, score = joints.random_joint(jax.random.key(8), 3, 2), score[:3, :2]
    scores, chances = batches(joint, score, n)
    exact = {
        mi.estimate_info_nce: mi.info_nce(joint, score, n),
        mi.estimate_nwj: mi.nwj(joint, score),
        ESTIMATORS["MINE"]: mi.nwj(joint, score + 0.7),
        ESTIMATORS["interpolated"]: mi.interpolated(joint, score, n - 1, 0.4),
        lambda s: mi.estimate_interpolated(s, 1.0): mi.info_nce(joint, score, n - 1),
    }
    for estimator, expected in exact.items():
        np.testing.assert_allclose(chances @ np.asarray(estimator(scores)), expected, **CLOSE)
    assert chances @ np.asarray(mi.estimate_donsker_varadhan(scores)) > mi.donsker_varadhan(joint, score)


@pytest.mark.parametrize("n", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_the_variance_of_nwj_over_all_batches_is_its_closed_form(x64, n):
    joint = joints.random_joint(jax.random.key(9), 2, 3)
    scores, chances = batches(joint, optimal_score(joint) + 1, n)
    values = np.asarray(mi.estimate_nwj(scores))
    mean = chances @ values
    np.testing.assert_allclose(mean, joints.mutual_information(joint), **CLOSE)
    np.testing.assert_allclose(chances @ (values - mean) ** 2, mi.nwj_variance(joint, n), **CLOSE)


@pytest.mark.slow
def test_the_gradient_of_mine_is_unbiased_and_that_of_dv_is_not(x64):
    joint, score = joints.random_joint(jax.random.key(10), 2, 2), draw(10)[1][:2, :2]
    product = np.outer(*map(np.asarray, joints.marginals(joint)))
    log_average = float(jnp.log(jnp.sum(jnp.asarray(product) * jnp.exp(score))))
    x, y = np.divmod(np.arange(4), 2)
    chosen = np.array(list(itertools.product(range(4), repeat=2)))
    chances = jnp.asarray(np.prod(np.asarray(joint).reshape(-1)[chosen], axis=1))
    rows, columns = x[chosen][:, :, None], y[chosen][:, None, :]

    def mean(estimator):
        return quickly(jax.grad(lambda s: chances @ estimator(s[rows, columns])), score)

    population = jax.grad(lambda s: mi.donsker_varadhan(joint, s))(score)
    np.testing.assert_allclose(mean(lambda s: mi.estimate_mine(s, log_average)), population, **CLOSE)
    assert np.max(np.abs(mean(mi.estimate_donsker_varadhan) - population)) > 0.01


def test_a_moving_average_is_the_average_of_the_denominators_and_carries_no_gradient(x64):
    scores = jax.random.normal(jax.random.key(11), (4, 4))
    off = np.exp(np.asarray(scores))[~np.eye(4, dtype=bool)].mean()
    np.testing.assert_allclose(mi.moving_average(0.5, scores, 0.9), np.log(0.9 * np.exp(0.5) + 0.1 * off), **CLOSE)
    np.testing.assert_allclose(mi.moving_average(0.5, scores, 0.0), np.log(off), **CLOSE)
    assert mi.moving_average(0.5, scores, 1.0) == 0.5
    np.testing.assert_array_equal(jax.grad(lambda s: mi.moving_average(0.5, s, 0.9))(scores), 0)
    np.testing.assert_allclose(
        mi.estimate_mine(scores, jnp.log(jnp.asarray(off))), mi.estimate_donsker_varadhan(scores), **CLOSE
    )


@pytest.mark.slow
@pytest.mark.parametrize("estimator", ESTIMATORS.values(), ids=ESTIMATORS)
def test_leading_axes_are_batches_and_rejected_negatives_cost_nothing(x64, estimator):
    scores = jax.random.normal(jax.random.key(12), (2, 3, 4, 4))
    found = estimator(scores)
    assert found.shape == (2, 3)
    np.testing.assert_allclose(found[1, 2], estimator(scores[1, 2]), **CLOSE)
    alone = jnp.where(jnp.eye(4, dtype=bool), scores[0, 0], -jnp.inf)
    found = estimator(alone)
    assert found == jnp.inf if estimator is mi.estimate_donsker_varadhan else jnp.isfinite(found)  # denominator 0
    assert estimator(alone.at[0, 0].set(-jnp.inf)) == -jnp.inf


def test_a_pair_that_is_ruled_out_makes_every_bound_minus_infinity(x64):
    joint, score = draw(13, zeros=0.0)
    for s in (score.at[0, 0].set(-jnp.inf), jnp.full_like(score, -jnp.inf)):
        for bound in (mi.donsker_varadhan, mi.nwj, lambda p, s: mi.interpolated(p, s, 3, 0.5)):
            assert bound(joint, s) == -jnp.inf
        assert mi.donsker_varadhan_slack(joint, s) == mi.nwj_slack(joint, s) == jnp.inf


@pytest.mark.slow
def test_the_gaussian_critic_is_the_log_ratio_and_its_moments_are_closed_forms(x64):
    rho = 0.3
    grid = jnp.linspace(-9.0, 9.0, 401)
    density = jnp.exp(-grid * grid / 2) / math.sqrt(2 * math.pi) * (grid[1] - grid[0])
    log_ratio = mi.gaussian_log_ratio(grid[:, None], grid[:, None], rho)
    product = density[:, None] * density[None, :]
    joint = product * jnp.exp(log_ratio)
    np.testing.assert_allclose(jnp.sum(joint * log_ratio), mi.gaussian_information(rho, 1), **CLOSE)
    np.testing.assert_allclose(jnp.sum(joint * jnp.exp(log_ratio)) - 1, mi.gaussian_chi_square(rho, 1), **CLOSE)
    found = mi.nwj_variance(joint / jnp.sum(joint), 5)
    np.testing.assert_allclose(found, mi.gaussian_nwj_variance(rho, 1, 5), rtol=1e-9)
    # Coordinates are independent: log ratios add up.
    x, y = jax.random.normal(jax.random.key(14), (2, 6, 3))
    parts = sum(mi.gaussian_log_ratio(x[:, i : i + 1], y[:, i : i + 1], rho) for i in range(3))
    np.testing.assert_allclose(mi.gaussian_log_ratio(x, y, rho), parts, **CLOSE)


@pytest.mark.slow
def test_info_nce_of_strongly_correlated_gaussians_is_what_was_measured_before():
    # rho = 0.9, d = 4: known to three digits by another program; 5 standard errors, and half of the last digit.
    for k, expected in ((2, 0.643), (8, 1.779), (64, 2.815), (512, 3.224)):
        found = mi.over_batches(mi.estimate_info_nce(gaussian_batches(15, 0.9, 8192 // k, k, 4)))
        assert abs(found.value - expected) < 5 * found.standard_error + 5e-4
        assert 0 < found.standard_error < 0.03


def test_concatenated_scores_put_the_pairs_on_the_diagonal():
    x, y = jax.random.normal(jax.random.key(16), (2, 3, 2))
    scores = mi.concatenated_scores(lambda _, rows: rows[:, :1] + 10 * rows[:, 3:], None, x, y)
    np.testing.assert_allclose(scores, x[:, :1] + 10 * y[:, 1:].T, rtol=1e-6)
    network = encoders.MLP(4, 1)
    params = network.init(jax.random.key(0), jnp.zeros((1, 4)))
    assert mi.concatenated_scores(network.apply, params, x, y).shape == (3, 3)


def test_everything_runs_inside_jit(x64):
    joint, score = draw(17)
    bounds = lambda p, s: (mi.donsker_varadhan(p, s), mi.nwj(p, s), mi.interpolated(p, s, 3, 0.5))  # noqa: E731
    np.testing.assert_allclose(jnp.stack(quickly(bounds, joint, score)), jnp.stack(bounds(joint, score)), **CLOSE)


@pytest.mark.parametrize("estimator", ESTIMATORS.values(), ids=ESTIMATORS)
def test_bad_scores_raise(as_users_run, estimator):
    with pytest.raises(TypeError, match="JAX array"):
        estimator(np.zeros((2, 2)))
    with pytest.raises(TypeError, match="floating-point"):
        estimator(jnp.zeros((2, 2), int))
    for shape in ((2,), (2, 3), (0, 0)):
        with pytest.raises(ValueError, match="pairs"):
            estimator(jnp.zeros(shape))
    for value in (jnp.nan, jnp.inf):
        with pytest.raises(ValueError, match="NaN"):
            estimator(jnp.full((2, 2), value))


def test_bad_settings_raise(as_users_run):
    joint, square = joints.identical(3), jnp.zeros((3, 3))
    bad = {
        "weight": (lambda: mi.interpolated(joint, square, 2, 1.5), lambda: mi.estimate_interpolated(square, -0.1)),
        "beyond the grid": (lambda: mi.interpolated(joint, square + 1e3, 2, 0.5),),
        "decay": (lambda: mi.moving_average(0.0, square, 2.0),),
        "two batches": (lambda: mi.over_batches(jnp.zeros(1)), lambda: mi.over_batches(square)),
        "correlation": (lambda: mi.gaussian_information(1.0, 2), lambda: mi.gaussian_log_ratio(square, square, -2.0)),
        "dimension": (lambda: mi.gaussian_chi_square(0.5, 0),),
        "at least 2": (lambda: mi.nwj_variance(joint, 1), lambda: mi.gaussian_nwj_variance(0.5, 2, 1)),
        "rows of one length": (lambda: mi.gaussian_log_ratio(square, square[:, :2], 0.5),),
        "row i of both": (lambda: mi.concatenated_scores(lambda _, z: z, None, square, square[:2]),),
        "features=1": (lambda: mi.concatenated_scores(lambda _, z: z, None, square, square),),
        "candidates": (lambda: mi.info_nce(joint, square, 0), lambda: mi.interpolated(joint, square, 0, 0.5)),
        "sums to": tuple(
            lambda f=f: f(2 * joint, square)
            for f in (mi.donsker_varadhan, mi.donsker_varadhan_slack, mi.nwj, mi.nwj_slack)
        ),
    }
    for message, calls in bad.items():
        for call in calls:
            with pytest.raises(ValueError, match=message):
                call()
