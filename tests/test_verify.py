"""The checks themselves: exponents recovered, coverage, error rates, roles, dtypes, invariances, bad input."""

import functools
import math

import numpy as np
import pytest
from hypothesis import settings
from scipy import stats

from theorykit import verify
from theorykit.verify import Claim, agreement, bound, identity, rate, separation, slope_fit

CLAIM = Claim("N1.slope", "the error falls like M**-1/2", "derivation")
CONTROL = Claim("N1.slope.control", "the same with one weight shared", "derivation", "control", "N1.slope")
FINDING = Claim("N4.dot", "a dot product moves the kernel", "a source", "finding")
WIDTHS = np.array([64.0, 128.0, 256.0, 512.0])
ABSCISSAE = {"power": WIDTHS, "exponential": np.array([0.0, 0.5, 1.5, 2.5]), "logarithmic": WIDTHS}
SEEDS = [3, 5, 8]
quick = settings(max_examples=40, deadline=None, derandomize=True, database=None)


def within_binomial(hits, draws, probability, sigmas=4.0):
    """Is a count what `probability` predicts, to the tail of `sigmas` standard errors (exact for rare events)?"""
    tail = stats.norm.sf(sigmas)
    low, high = stats.binom.ppf([tail, 1 - tail], draws, probability)
    return low <= hits <= high


def sample_of_law(law, rng, seeds, *, slope=-0.5, slope_spread=0.0, noise=0.0):
    """(seeds, points) of C_s + (slope + d_s) u + noise in the law's coordinates, autocorrelated inside each seed."""
    slopes = slope + slope_spread * rng.standard_normal((seeds, 1))
    walk = np.cumsum(noise * rng.standard_normal((seeds, WIDTHS.size)), axis=1)
    line = rng.standard_normal((seeds, 1)) + slopes * coordinates(law)[None, :] + walk
    return line if law == "logarithmic" else np.exp(line)


def power_law(rng, seeds, **more):
    """(seeds, points) of C_s M**(slope + d_s) exp(noise)."""
    return sample_of_law("power", rng, seeds, **more)


def coordinates(law):
    return ABSCISSAE[law] if law == "exponential" else np.log(ABSCISSAE[law])


def spread_of_slope(u, noise):
    """Standard deviation of a slope fitted to a random walk: the fit's weights on cumulative sums of steps."""
    centred = u - np.mean(u)
    return noise * math.sqrt(np.sum(np.cumsum((centred / np.sum(centred**2))[::-1]) ** 2))


@functools.cache
def spread_quantiles(seeds):
    return np.sqrt(stats.chi2.ppf((np.arange(40000) + 0.5) / 40000, seeds - 1) / (seeds - 1))


def outcome_rates(seeds, offset, margin, level):
    """(supported, refuted) rates of `agreement` for Gaussian replicates of spread 1, their mean `offset` from the law.

    Averaged over the quantiles of the sample variance, given which the mean is still Gaussian.
    """
    half = stats.t.ppf((1 + level) / 2, seeds - 1) * spread_quantiles(seeds) / math.sqrt(seeds)
    upper, lower = (sign * (margin - half) - offset for sign in (1, -1))
    inside = stats.norm.cdf(upper * math.sqrt(seeds)) - stats.norm.cdf(lower * math.sqrt(seeds))
    above = stats.norm.sf((margin + half - offset) * math.sqrt(seeds))
    below = stats.norm.cdf((-margin - half - offset) * math.sqrt(seeds))
    return float(np.mean(np.maximum(inside, 0.0))), float(np.mean(above + below))


# Laws


@pytest.mark.parametrize("exponent", [-1.0, -0.5, 0.0, 2.0])
@pytest.mark.parametrize("law", ["power", "exponential", "logarithmic"])
def test_a_noise_free_law_is_recovered_exactly(law, exponent):
    x = np.array([1.0, 2.0, 3.0, 5.0, 8.0])
    scale = np.array([0.5, 1.0, 4.0])
    line = exponent * (x if law == "exponential" else np.log(x))
    y = scale[:, None] + line[None, :] if law == "logarithmic" else scale[:, None] * np.exp(line)[None, :]
    fit = slope_fit(x, y, law=law, level=0.95)
    np.testing.assert_allclose(fit.slopes, exponent, rtol=0, atol=1e-13)
    constants = scale if law == "logarithmic" else np.log(scale)
    np.testing.assert_allclose(fit.intercept, np.mean(constants), rtol=0, atol=1e-13)
    np.testing.assert_allclose(fit.residuals, 0.0, atol=1e-13)
    verdict = rate(CLAIM, x, y, exponent, margin=1e-12, law=law)
    assert verdict.outcome == "supported"
    assert [part["dropped"] for part in verdict.details["trend"]] == [1, 2]
    np.testing.assert_allclose([part["slope"] for part in verdict.details["trend"]], exponent, rtol=0, atol=1e-13)
    assert rate(CLAIM, x, y, exponent + 0.1, margin=0.05, law=law).outcome == "refuted"


def test_the_trend_shows_a_law_that_holds_only_in_the_limit():
    widths = 2.0 ** np.arange(4, 13)
    y = (1 / widths + 1 / widths**2)[None, :] * np.array([1.0, 2.0])[:, None]
    verdict = rate(CLAIM, widths, y, -1.0, margin=0.5)
    slopes = [verdict.measured] + [part["slope"] for part in verdict.details["trend"]]
    assert slopes[0] < slopes[-1] - 1e-3 < -1.0 and np.all(np.diff(slopes) > 0)
    assert verdict.details["largest_residual"] > 1e-3 and verdict.details["r2"] < 1
    assert verdict.details["fit_range"] == [16.0, 4096.0]


def test_each_seed_may_have_its_own_abscissae():
    x = np.array([[1.0, 2.0, 4.0, 8.0], [3.0, 9.0, 27.0, 81.0]])
    fit = slope_fit(x, x**1.5, law="power", level=0.95)
    np.testing.assert_allclose(fit.slopes, 1.5, rtol=1e-13)


# Intervals


@pytest.mark.parametrize("seeds", SEEDS)
@pytest.mark.parametrize("level", [0.95, 0.999])
def test_the_interval_of_a_mean_covers_at_its_level(seeds, level):
    draws = 200000
    samples = 3.0 + np.random.default_rng(seeds).standard_normal((seeds, draws))
    mean, low, high = verify.interval(samples, level)
    np.testing.assert_allclose(mean, samples.mean(axis=0), rtol=1e-12)
    assert within_binomial(np.sum((low <= 3.0) & (high >= 3.0)), draws, level)


@pytest.mark.parametrize("law", ABSCISSAE)
@pytest.mark.parametrize("seeds", SEEDS)
@pytest.mark.parametrize("slope_spread", [0.0, 0.2])
def test_the_interval_of_a_slope_covers_whatever_the_correlation_inside_a_seed(law, seeds, slope_spread):
    rng, draws = np.random.default_rng([seeds, 1]), 600
    samples = (sample_of_law(law, rng, seeds, slope_spread=slope_spread, noise=0.3) for _ in range(draws))
    fits = [slope_fit(ABSCISSAE[law], y, law=law, level=0.95) for y in samples]
    assert within_binomial(sum(fit.low <= -0.5 <= fit.high for fit in fits), draws, 0.95)


@pytest.mark.parametrize("seeds", SEEDS)
def test_a_difference_covers_paired_and_unpaired(seeds):
    rng, draws = np.random.default_rng([seeds, 2]), 600
    hits = {True: 0, False: 0}
    for _ in range(draws):
        shared = 5.0 * rng.standard_normal(seeds)  # a seed-level effect that only pairing removes
        a, b = 1.0 + rng.standard_normal((2, seeds)) * np.array([[1.0], [1.5]]) + np.array([[0.7], [0.0]])
        paired = separation(CLAIM, a + shared, b + shared, level=0.95)
        unpaired = separation(CLAIM, a, b, paired=False, level=0.95)
        for key, verdict in ((True, paired), (False, unpaired)):
            hits[key] += verdict.low <= 0.7 <= verdict.high
    assert within_binomial(hits[True], draws, 0.95)
    assert within_binomial(hits[False], draws, 0.95)


def test_welch_misses_as_often_as_its_docstring_says_in_the_worst_case():
    rng, draws = np.random.default_rng(13), 1000
    misses = 0
    for _ in range(draws):
        verdict = separation(CLAIM, 3.0 * rng.standard_normal(3), rng.standard_normal(8), paired=False)
        misses += not verdict.low <= 0.0 <= verdict.high
    assert within_binomial(misses, draws, 0.01)


def test_welch_agrees_with_scipy():
    rng = np.random.default_rng(3)
    a, b = rng.standard_normal(4), 5 * rng.standard_normal(7)
    verdict = separation(CLAIM, a, b, paired=False, level=0.99)
    expected = stats.ttest_ind(a, b, equal_var=False).confidence_interval(0.99)
    np.testing.assert_allclose([verdict.low, verdict.high], [expected.low, expected.high], rtol=1e-12)


@pytest.mark.parametrize("shared", [0.0, 2.0])
def test_the_interval_of_the_worst_slack_covers_at_least_at_its_level(shared):
    rng, draws = np.random.default_rng(4), 500
    slack = np.array([0.5, 0.6, 2.0])
    hits = 0
    for _ in range(draws):
        noise = rng.standard_normal((5, 3)) + shared * rng.standard_normal((5, 1))
        verdict = bound(CLAIM, 1.0 - slack[None, :] + noise, 1.0, level=0.95)
        hits += verdict.low <= 0.5 <= verdict.high
    assert hits >= stats.binom.ppf(stats.norm.sf(4.0), draws, 0.95)


def test_identical_replicates_collapse_to_the_point_and_are_marked():
    mean, low, high = verify.interval(np.full((3, 2), 0.1), 0.95)
    assert np.all(mean == 0.1) and np.all(low == 0.1) and np.all(high == 0.1)
    verdict = agreement(CLAIM, [0.1, 0.1, 0.1], 0.1, margin=0.0)
    assert verdict.outcome == "supported" and verdict.details["zero_spread"]
    assert "identical replicates" in verify.table([verdict])
    equal = separation(CLAIM, [1.0, 1.0], [1.0, 1.0], paired=False)
    assert equal.outcome == "refuted" and equal.low == equal.high == 0.0


def test_huge_values_do_not_overflow():
    samples = np.array([1.0, 2.0, 3.0])
    scaled = verify.interval(samples * 2.0**1000, 0.95)
    np.testing.assert_array_equal(np.ldexp(scaled, -1000), verify.interval(samples, 0.95))
    _, low, high = verify.interval([-1.5e308, 1.5e308], 0.999)
    assert (low, high) == (-math.inf, math.inf)
    assert agreement(CLAIM, [-1.5e308, 1.5e308], 0.0, margin=1.0).outcome == "inconclusive"


# Error rates at the level of the gate. With t = 31.6, 8.6, 5.4 for 3, 5, 8 seeds, the offset and margin are in units of
# the spread between seeds; `outcome_rates` predicts how often each outcome comes out.

SCENARIOS = {
    "right law, precise": (0.0, 20.0),
    "right law, at 3 spreads": (0.0, 3.0),
    "wrong law, precise": (60.0, 20.0),
    "wrong law, near": (6.0, 1.0),
    "at the edge of the margin": (3.0, 3.0),
    "right law, lost in noise": (0.0, 0.01),
    "wrong law, lost in noise": (0.03, 0.01),
}


@pytest.mark.parametrize("seeds", SEEDS)
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_outcomes_come_at_the_predicted_rates(seeds, scenario):
    (offset, margin), draws = SCENARIOS[scenario], 400
    rng = np.random.default_rng([seeds, [*SCENARIOS].index(scenario)])
    outcomes = [
        agreement(CLAIM, 7.0 + offset + rng.standard_normal(seeds), 7.0, margin=margin).outcome for _ in range(draws)
    ]
    supported, refuted = outcome_rates(seeds, offset, margin, verify.LEVEL)
    assert within_binomial(outcomes.count("supported"), draws, supported)
    assert within_binomial(outcomes.count("refuted"), draws, refuted)
    assert refuted <= 0.001 or offset > margin  # a false "refuted" is rarer than 1 - level
    assert supported <= 0.0005 or offset < margin  # a false "supported" is rarer than half of that


def assert_rates_are_judged_as_predicted(draw, x, fitted, noise, predicted, *, law, seeds, draws=400):
    """Outcomes of `rate` come as often as for Gaussian slopes about `fitted`; returns the two predicted rates."""
    margin = 0.2
    spread = spread_of_slope(np.log(x) if law != "exponential" else x, noise)
    outcomes = [rate(CLAIM, x, draw(), predicted, margin=margin, law=law).outcome for _ in range(draws)]
    supported, refuted = outcome_rates(seeds, (fitted - predicted) / spread, margin / spread, verify.LEVEL)
    assert within_binomial(outcomes.count("supported"), draws, supported)
    assert within_binomial(outcomes.count("refuted"), draws, refuted)
    return supported, refuted


@pytest.mark.parametrize("law", ABSCISSAE)
@pytest.mark.parametrize("seeds", SEEDS)
@pytest.mark.parametrize("slope", [-0.5, 0.0, -0.3])
def test_rates_are_judged_as_often_as_predicted(law, seeds, slope):
    # The right law, a law far from it, and one at the edge of the margin.
    noise, rng = 0.03, np.random.default_rng([seeds, round(10 * abs(slope))])
    supported, refuted = assert_rates_are_judged_as_predicted(
        lambda: sample_of_law(law, rng, seeds, slope=slope, noise=noise),
        ABSCISSAE[law], slope, noise, -0.5, law=law, seeds=seeds,
    )  # fmt: skip
    assert refuted <= 0.001 or slope == 0.0  # a false "refuted" is rarer than 1 - level
    assert supported <= 0.0005 or slope != 0.0  # a false "supported" is rarer than half of that
    if seeds == 8:  # enough seeds for this noise: the verdicts are the right ones
        assert slope != -0.5 or supported > 0.999
        assert slope != 0.0 or refuted > 0.999


WRONG_FORMS = {"exponential as power": ("power", lambda x: -x), "root as logarithm": ("logarithmic", np.sqrt)}


@pytest.mark.parametrize("form", WRONG_FORMS)
@pytest.mark.parametrize("seeds", SEEDS)
def test_a_law_of_another_form_is_judged_by_its_slope_over_the_range_and_the_trend_gives_it_away(form, seeds):
    judged, curve = WRONG_FORMS[form]
    x, noise, rng = 4.0 ** np.arange(1, 5), 0.01, np.random.default_rng([seeds, 7])

    def draw(points=slice(None)):
        walk = np.cumsum(noise * rng.standard_normal((seeds, x.size)), axis=1)
        line = rng.standard_normal((seeds, 1)) + curve(x)[None, :] + walk
        return (np.exp(line) if judged == "power" else line)[:, points]

    def slope(points):
        return np.polyfit(np.log(x[points]), curve(x[points]), 1)[0]

    everywhere, upper = slope(slice(None)), slope(slice(1, None))
    judge = functools.partial(assert_rates_are_judged_as_predicted, law=judged, seeds=seeds)
    # A prediction that is right for the range by accident is supported, although no law of this form holds.
    assert judge(draw, x, everywhere, noise, everywhere)[0] > 0.99
    # Any other is refuted, and so is the accidental one without the smallest point: that is what the trend shows.
    assert judge(draw, x, everywhere, noise, everywhere + 1.0)[1] > 0.99
    assert judge(lambda: draw(slice(1, None)), x[1:], upper, noise, everywhere)[1] > 0.99
    (part,) = rate(CLAIM, x, draw(), everywhere, margin=0.2, law=judged).details["trend"]
    assert abs(part["slope"] - upper) < 0.2 < abs(part["slope"] - everywhere)


@pytest.mark.parametrize("seeds", SEEDS)
def test_noise_never_confirms_a_rate_a_bound_or_a_separation(seeds):
    # Each false decision has a probability of at most 0.001; 4 standard errors above the mean allow a few of them.
    rng, draws = np.random.default_rng([seeds, 6]), 400
    allowed = stats.binom.ppf(stats.norm.cdf(4.0), draws, 0.001)
    decided = {"rate": 0, "bound": 0, "separation": 0, "unpaired": 0}
    for _ in range(draws):
        noise = rng.standard_normal((2, seeds, 4))
        decided["rate"] += rate(CLAIM, WIDTHS, np.exp(noise[0]), 0.0, margin=0.01).outcome != "inconclusive"
        decided["bound"] += bound(CLAIM, noise[0], 0.0).outcome != "inconclusive"
        a, b = noise[:, :, 0]
        decided["separation"] += separation(CLAIM, a, b).outcome != "inconclusive"
        decided["unpaired"] += separation(CLAIM, a, b, paired=False).outcome != "inconclusive"
    assert all(count <= allowed for count in decided.values()), decided


# Decisions and roles


@pytest.mark.parametrize(
    ("side", "outcomes"),
    [
        ("equal", ["refuted", "supported", "supported", "supported", "refuted"]),
        ("at_most", ["supported", "supported", "supported", "supported", "refuted"]),
        ("at_least", ["refuted", "supported", "supported", "supported", "supported"]),
    ],
)
def test_a_point_is_judged_by_its_side_and_the_margin_is_closed(side, outcomes):
    for measured, outcome in zip([-1.5, -1.0, 0.0, 1.0, 1.5], outcomes, strict=True):
        verdict = agreement(CLAIM, measured, 0.0, margin=1.0, side=side, deterministic=True)
        assert verdict.outcome == outcome
        assert verdict.low == verdict.high == verdict.measured == measured


@pytest.mark.parametrize("side", ["equal", "at_most", "at_least"])
@pytest.mark.parametrize("centre", np.linspace(-3.0, 3.0, 13))
def test_an_interval_is_judged_by_inclusion_and_disjointness(side, centre):
    verdict = agreement(CLAIM, centre + np.array([-0.1, 0.1]), 0.0, margin=1.0, side=side, level=0.9)
    low, high = verdict.low, verdict.high
    fits = {"equal": low >= -1 and high <= 1, "at_most": high <= 1, "at_least": low >= -1}[side]
    misses = {"equal": high < -1 or low > 1, "at_most": low > 1, "at_least": high < -1}[side]
    assert verdict.outcome == ("supported" if fits else "refuted" if misses else "inconclusive")
    assert low < centre < high


@pytest.mark.parametrize("claim", [CLAIM, CONTROL, FINDING])
@pytest.mark.parametrize("outcome", ["supported", "refuted", "inconclusive"])
def test_what_is_expected_follows_from_the_role(claim, outcome):
    measured = {"supported": [0.0, 0.0], "refuted": [9.0, 9.0], "inconclusive": [-9.0, 9.0]}[outcome]
    verdict = agreement(claim, measured, 0.0, margin=1.0)
    assert verdict.outcome == outcome
    expected = {"claim": "supported", "control": "refuted", "finding": "refuted"}
    assert verdict.as_expected == (outcome == expected[claim.role])
    assert (verdict.claim, verdict.role, verdict.control_of) == (claim.name, claim.role, claim.control_of)
    assert (verdict.experiment, verdict.preset) == (None, None)


def not_finite_verdicts(claim, bad):
    sweep = np.array([[1.0, 2.0, bad], [1.0, 2.0, 3.0]])
    yield identity(claim, [1.0, bad], [1.0, bad])
    yield agreement(claim, [1.0, bad], 1.0, margin=1.0)
    yield agreement(claim, [1.0, 1.0], [1.0, bad], margin=1.0)
    yield bound(claim, [0.0, bad], 1.0)
    yield bound(claim, sweep, 1.0)
    yield rate(claim, [1.0, 2.0, 3.0], sweep, 1.0, margin=1.0)
    yield separation(claim, [1.0, bad], [0.0, 0.0])
    yield separation(claim, 1.0, null=np.append(np.zeros(1999), bad))


@pytest.mark.parametrize("claim", [CLAIM, CONTROL, FINDING])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_data_that_are_not_finite_never_pass(claim, bad):
    for verdict in not_finite_verdicts(claim, bad):
        assert verdict.outcome == "inconclusive" and not verdict.as_expected
        assert "not finite" in verdict.details["reason"]
        assert math.isnan(verdict.measured) and (verdict.low, verdict.high) == (-math.inf, math.inf)
