"""The checks one by one: identity, agreement, bound, separation; their invariances, records and errors."""

import json
import math
import subprocess
import sys

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_verify import CLAIM, CONTROL, FINDING, WIDTHS, not_finite_verdicts, power_law, quick, within_binomial

from theorykit import verify
from theorykit.verify import Claim, agreement, bound, identity, rate, separation, slope_fit

# Identity


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16, np.complex64, np.longdouble])
def test_rounding_passes_and_more_than_rounding_fails_in_every_dtype(dtype):
    values = np.linspace(-3.0, 2.0, 11).astype(dtype)
    real = values.real.dtype
    eps = float(np.nextafter(np.ones((), real), np.full((), 2.0).astype(real)) - np.ones((), real))
    verdict = identity(CLAIM, values, values)
    assert verdict.measured == 0.0 and verdict.outcome == "supported"
    assert verdict.margin == min(1024 * eps, math.sqrt(eps)) < 0.1
    for factor, outcome in ((0.5, "supported"), (2.0, "refuted")):
        wide = values.astype(np.result_type(dtype, np.float64))
        shifted = wide * (1 + factor * verdict.margin)
        assert identity(CLAIM, values, shifted).outcome == outcome  # judged by the coarser dtype of the two
        assert identity(CLAIM, shifted, values).outcome == outcome


def test_jax_arrays_are_accepted():
    values = jnp.arange(4, dtype=jnp.bfloat16)
    assert identity(CLAIM, values, values).details["dtype"] == "bfloat16"
    assert agreement(CLAIM, values, jnp.float32(1.5), margin=20.0).outcome == "supported"


@pytest.mark.parametrize("dtype", [np.int8, np.uint64, np.int64, np.bool_])
def test_integers_and_booleans_must_be_exactly_equal(dtype):
    top = True if dtype is np.bool_ else np.iinfo(dtype).max
    left, right = np.array([0, 1, top], dtype), np.array([0, 1, top], dtype)
    assert identity(CLAIM, left, right).outcome == "supported"
    right[0] = 1
    verdict = identity(CLAIM, left, right)
    assert verdict.outcome == "refuted" and verdict.measured == 1 / int(top) and verdict.margin == 0.0


def test_an_identity_of_zeros_of_huge_and_of_tiny_entries_is_judged():
    assert identity(CLAIM, np.zeros(3), np.zeros(3)).measured == 0.0
    assert identity(CLAIM, np.zeros(3), [0.0, 0.0, 1e-300]).outcome == "refuted"
    assert identity(CLAIM, [1.7e308], [-1.7e308]).measured == 2.0
    assert identity(CLAIM, [5e-324], [5e-324]).outcome == "supported"


@quick
@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=8), st.integers(-60, 60), st.integers(0, 10**6))
def test_an_identity_ignores_order_sides_and_scale(entries, power, seed):
    left = np.array(entries)
    right = left + np.random.default_rng(seed).standard_normal(left.size)
    verdict = identity(CLAIM, left, right)
    assert identity(CLAIM, right, left).measured == verdict.measured
    assert identity(CLAIM, left[::-1], right[::-1]).measured == verdict.measured
    assert identity(CLAIM, np.ldexp(left, power), np.ldexp(right, power)).measured == verdict.measured


# Agreement: relative and paired


def test_relative_and_paired_predictions_are_compared_seed_by_seed():
    predicted = np.array([1.0, 10.0, 100.0])
    exact = agreement(CLAIM, 1.05 * predicted, predicted, margin=0.1, relative=True)
    assert exact.outcome == "supported" and exact.predicted == 1.0
    np.testing.assert_allclose(exact.measured, 1.05, rtol=1e-14)
    paired = agreement(CLAIM, predicted + 0.5, predicted, margin=1.0)
    assert paired.outcome == "supported" and (paired.measured, paired.predicted) == (0.5, 0.0)
    assert agreement(CLAIM, predicted + 0.5, float(predicted.mean()), margin=1.0).outcome == "inconclusive"
    np.testing.assert_allclose(agreement(CLAIM, [4.0, 4.0], 2.0, margin=0.1, relative=True).measured, 2.0)


@pytest.mark.parametrize("dtype", [np.uint8, np.bool_, np.float16, ml_dtypes.bfloat16])
def test_narrow_dtypes_are_subtracted_and_averaged_in_float64(dtype):
    a, b = np.array([0, 1, 1, 1], dtype), np.array([1, 1, 1, 1], dtype)
    for verdict in (agreement(CLAIM, a, b, margin=9.0), separation(CLAIM, a, b), separation(CLAIM, a, b, paired=False)):
        assert verdict.measured == -0.25
    fit = slope_fit(
        np.arange(1, 4, dtype=np.uint8), np.array([[3, 2, 1], [1, 2, 3]], np.uint8), law="exponential", level=0.9
    )
    np.testing.assert_allclose(fit.slopes, [-math.log(3) / 2, math.log(3) / 2], rtol=1e-14)


# Bounds


def test_a_bound_reports_its_slack_and_how_loose_it_is():
    value = np.array([1.0, 2.0, 4.0])
    verdict = bound(CLAIM, value, 1000 * value)
    assert verdict.outcome == "supported" and verdict.measured == verdict.low == verdict.high == 999.0
    details = verdict.details
    assert (details["tightness_max"], details["tightness_median"]) == (1e-3, 1e-3)
    assert (details["violations"], details["points"], details["worst_point"]) == (0, 3, 0)
    np.testing.assert_allclose(details["loose"], 1000.0)
    assert "loose by 1e+03" in verify.table([verdict])


def test_one_violated_point_refutes_a_bound_and_a_margin_forgives_it():
    value, limit = np.array([0.5, 1.2, 0.5]), np.array([1.0, 1.0, 0.0])
    verdict = bound(CLAIM, value, limit)
    assert verdict.outcome == "refuted" and verdict.measured == -0.5
    assert (verdict.details["violations"], verdict.details["worst_point"]) == (2, 2)
    assert bound(CLAIM, value, limit, margin=0.5).outcome == "supported"
    assert bound(CLAIM, [-1.0], [0.0]).details["loose"] is None  # no ratio without a positive limit
    assert bound(CLAIM, [1e200], [1e-200]).details["tightness_max"] == math.inf


def test_an_equality_up_to_rounding_does_not_violate_a_bound():
    limit = np.array([1e-8, 1.0, 1e8])
    for dtype, error, outcome in [
        (np.float64, 1e-14, "supported"),
        (np.float64, 1e-11, "refuted"),
        (np.float32, 1e-5, "supported"),
        (np.float32, 1e-3, "refuted"),
    ]:
        for point in range(3):  # the tolerance is relative to each point, small ones included
            value = limit.copy()
            value[point] *= 1 + error
            assert bound(CLAIM, value.astype(dtype), limit).outcome == outcome
    assert bound(CLAIM, [3], [2]).outcome == "refuted"


def test_a_replicated_bound_needs_every_point_to_hold():
    rng = np.random.default_rng(5)
    noise = 0.01 * rng.standard_normal((5, 4))
    value = np.array([0.0, 0.2, 0.5, 0.7])[None, :] + noise
    assert bound(CLAIM, value, 1.0).outcome == "supported"
    assert bound(CLAIM, value, np.array([1.0, 1.0, 1.0, 0.5])).outcome == "refuted"
    assert bound(CLAIM, value, np.array([1.0, 1.0, 1.0, 0.7])).outcome == "inconclusive"
    assert bound(CLAIM, value, value + 0.1).outcome == "supported"
    assert bound(CLAIM, value, 1.0).details["seeds"] == 5


# Separation and null distributions


def test_a_separation_is_strict_and_has_a_direction():
    a, b = np.array([2.0, 2.5, 3.0]), np.array([1.0, 1.5, 2.0])
    assert separation(CLAIM, a, b).outcome == "supported"
    assert separation(CLAIM, b, a).outcome == "refuted"
    assert separation(CLAIM, b, a, direction="less").outcome == "supported"
    assert separation(CLAIM, a, b, margin=1.0).outcome == "refuted"  # more than 1, and it is exactly 1
    assert separation(CLAIM, a, b, margin=0.99).outcome == "supported"


def test_an_effect_of_zero_is_refuted_only_with_a_margin():
    rng = np.random.default_rng(6)
    a, b = 1e-3 * rng.standard_normal((2, 5))
    assert separation(CLAIM, a, b).outcome == "inconclusive"
    assert separation(CLAIM, a, b, margin=0.1).outcome == "refuted"


def test_a_statistic_is_separated_from_chance_only_beyond_the_null_quantile():
    null = np.random.default_rng(7).permutation(np.arange(1000.0))
    assert separation(CLAIM, 1000.0, null=null).outcome == "supported"
    assert separation(CLAIM, 999.0, null=null).outcome == "refuted"  # the largest draw is not beyond itself
    assert separation(CLAIM, -1.0, null=null, direction="less").outcome == "supported"
    close = separation(CLAIM, [-5.0, -5.0, -5.0], null=null, direction="less")
    assert close.outcome == "supported" and close.measured == 5.0 and close.details["p_value"] == 1 / 1001
    assert separation(CLAIM, [400.0, 500.0, 1600.0], null=null).outcome == "inconclusive"
    assert separation(CLAIM, [400.0, 401.0, 402.0], null=null).outcome == "refuted"


@quick
@given(st.integers(100, 400), st.sampled_from([0.5, 0.9, 0.95, 0.99]), st.integers(0, 10**6))
def test_passing_the_null_quantile_is_a_small_p_value(draws, level, seed):
    rng = np.random.default_rng(seed)
    null = np.round(rng.standard_normal(draws), 1)  # rounded: ties
    statistic = np.round(rng.standard_normal(20), 1)
    for direction, sign in (("greater", 1), ("less", -1)):
        beyond = sign * statistic > sign * verify.null_quantile(null, level, direction=direction)
        small = verify.null_p_value(statistic, null, direction=direction) <= (1 - level) * (1 + 1e-9)
        np.testing.assert_array_equal(beyond, small)


def test_chance_passes_its_own_quantile_and_interval_at_the_level():
    rng, repeats, level = np.random.default_rng(8), 1000, 0.95
    outside = beyond = 0
    for _ in range(repeats):
        null, fresh = rng.standard_normal(99), rng.standard_normal()
        low, high = verify.null_interval(null, level)
        outside += not low <= fresh <= high
        beyond += fresh > verify.null_quantile(null, level)
    # A fresh draw passes rank k of n with probability (n + 1 - k) / (n + 1): 5 / 100, and 2 / 100 on either side.
    assert within_binomial(beyond, repeats, 0.05)
    assert within_binomial(outside, repeats, 0.04)


# Invariances


@quick
@given(st.floats(1e-3, 1e3), st.floats(1e-3, 1e3), st.integers(0, 10**6))
def test_scales_of_x_and_y_change_no_power_law(scale_x, scale_y, seed):
    y = power_law(np.random.default_rng(seed), 4, noise=0.1)
    fit = slope_fit(WIDTHS, y, law="power", level=0.95)
    other = slope_fit(scale_x * WIDTHS, scale_y * y, law="power", level=0.95)
    np.testing.assert_allclose(
        [other.slope, other.low, other.high], [fit.slope, fit.low, fit.high], rtol=1e-9, atol=1e-11
    )
    np.testing.assert_allclose(other.r2, fit.r2, rtol=1e-9)


@quick
@given(st.permutations(range(5)), st.permutations(range(4)), st.integers(0, 10**6))
def test_the_order_of_seeds_and_of_points_changes_nothing(seeds, points, seed):
    rng = np.random.default_rng(seed)
    y = power_law(rng, 5, noise=0.3)
    a, b = rng.standard_normal((2, 5))
    seeds, points = np.array(seeds), np.array(points)
    pairs = [
        (rate(CLAIM, WIDTHS, y, -0.5, margin=0.2), rate(CLAIM, WIDTHS[points], y[seeds][:, points], -0.5, margin=0.2)),
        (agreement(CLAIM, a, b, margin=1.0), agreement(CLAIM, a[seeds], b[seeds], margin=1.0)),
        (separation(CLAIM, a, b, paired=False), separation(CLAIM, a[seeds], b, paired=False)),
        (bound(CLAIM, y, 1.0), bound(CLAIM, y[seeds][:, points], 1.0)),
    ]
    for one, other in pairs:
        assert one.outcome == other.outcome
        np.testing.assert_allclose(
            [one.measured, one.low, one.high], [other.measured, other.low, other.high], rtol=1e-9, atol=1e-11
        )


# Text and JSON


def every_kind():
    rng = np.random.default_rng(9)
    yield identity(CLAIM, np.ones(3, np.float32), np.ones(3, np.float32))
    yield agreement(CONTROL, [1.0, 2.0], [1.0, 3.0], margin=1.0, relative=True)
    yield bound(FINDING, rng.standard_normal((3, 4)), np.float32(9.0))
    yield rate(CLAIM, WIDTHS, power_law(rng, 3, noise=0.1), -0.5, margin=0.2, side="at_most")
    yield separation(CLAIM, 1, null=np.arange(2000))._replace(experiment="ntk_width", preset="smoke")


def test_verdicts_survive_json_unchanged():
    verdicts = list(every_kind())
    text = verify.to_json(verdicts)
    assert verify.from_json(text) == verdicts
    rows = json.loads(text, parse_constant=pytest.fail)
    assert [row["claim"] for row in rows] == [verdict.claim for verdict in verdicts]


def test_numbers_that_are_not_finite_are_standard_json_and_come_back():
    verdict = agreement(CLAIM, [math.nan, math.inf], 1.0, margin=1.0)
    verdict = verdict._replace(details=verdict.details | {"list": [math.inf, -math.inf, {"deep": 1.0}]})
    text = verify.to_json([verdict])
    json.loads(text, parse_constant=pytest.fail)  # called for NaN and Infinity, which JSON does not have
    (back,) = verify.from_json(text)
    assert math.isnan(back.measured) and back.details == verdict.details
    assert back._replace(measured=0.0) == verdict._replace(measured=0.0)


def test_the_table_is_aligned_and_shows_failures():
    verdicts = [*every_kind(), *not_finite_verdicts(CONTROL, math.nan)]
    lines = verify.table(verdicts).splitlines()
    assert max(map(len, lines[: lines.index("")])) <= 120
    start = lines[0].index("outcome")
    for verdict in verdicts:
        assert any(line[start:].startswith(verdict.outcome) and line.split()[1] == verdict.claim for line in lines)
    failed = [verdict for verdict in verdicts if not verdict.as_expected]
    assert sum(line.startswith("FAIL  ") for line in lines) == len(failed)
    assert "FAIL N1.slope.control: inconclusive, expected refuted" in "\n".join(lines)
    assert "ntk_width (smoke)" in lines
    for predicted in ("<= 0.0001221", "1 ± 1", ">= 0", "<= -0.5 + 0.2", "> 0"):
        assert any(line.endswith("  " + predicted) for line in lines)
    assert lines[-1] == f"{len(verdicts)} verdicts, {len(verdicts) - len(failed)} as expected, {len(failed)} not"
    assert verify.table([]) == "no verdicts"


def test_a_long_name_does_not_push_the_table_beyond_its_width():
    claim = Claim("N1." + 90 * "x", "s", "s")
    verdict = agreement(claim, [-1.2345e-100, 1.2345e-100], -1.2345e-100, margin=1.2345e-101, side="at_least")
    row = verify.table([verdict]).splitlines()[2]
    assert len(row) <= 120 and "…" in row


def test_the_module_is_light_to_import():
    code = "import sys, theorykit.verify; sys.exit('jax' in sys.modules or 'scipy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# Bad input


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Claim("", "s", "s"), "name"),
        (lambda: Claim("n", " ", "s"), "statement"),
        (lambda: Claim("n", "s", ""), "source"),
        (lambda: Claim("n", "s", "s", "theorem"), "use one of"),
        (lambda: Claim("n", "s", "s", "control"), "name the claim"),
        (lambda: Claim("n", "s", "s", "control", "n"), "name the claim"),
        (lambda: Claim("n", "s", "s", "claim", "m"), "leave it out"),
        (lambda: identity(CLAIM, [1.0], [1.0, 2.0]), "shape"),
        (lambda: identity(CLAIM, [], []), "nothing was measured"),
        (lambda: identity(CLAIM, [1.0], [1.0], rtol=1.0), "rtol < 1"),
        (lambda: identity(CLAIM, [1.0], [1.0], rtol=math.nan), "rtol"),
        (lambda: identity(CLAIM, [1], [1], rtol=0.1), "exactly"),
        (lambda: agreement(CLAIM, [1.0], 1.0, margin=1.0), "two seeds or more"),
        (lambda: agreement(CLAIM, 1.0, 1.0, margin=1.0), "declare it deterministic"),
        (lambda: agreement(CLAIM, [1.0, 2.0], 1.0, margin=1.0, deterministic=True), "one number"),
        (lambda: agreement(CLAIM, [1.0, 2.0], [1.0, 2.0, 3.0], margin=1.0), "one value for each of 2 seeds"),
        (lambda: agreement(CLAIM, [1.0, 2.0], math.nan, margin=1.0), "finite number"),
        (lambda: agreement(CLAIM, [1.0, 2.0], 0.0, margin=1.0, relative=True), "relative=False"),
        (lambda: agreement(CLAIM, [1.0, 2.0], -1.0, margin=1.0, relative=True, side="at_most"), "relative=False"),
        (lambda: agreement(CLAIM, [1.0, 2.0], 0.0, margin=-1.0), "finite number >= 0"),
        (lambda: agreement(CLAIM, [1.0, 2.0], 0.0, margin=math.inf), "finite number >= 0"),
        (lambda: agreement(CLAIM, [1.0, 2.0], 0.0, margin=1.0, level=1.0), "level"),
        (lambda: agreement(CLAIM, [1.0, 2.0], 0.0, margin=1.0, side="below"), "side"),
        (lambda: bound(CLAIM, 1.0, 2.0), r"give \(points,\)"),
        (lambda: bound(CLAIM, [[1.0, 2.0]], 2.0), "add seeds"),
        (lambda: bound(CLAIM, [1.0, 2.0], [1.0, 2.0, 3.0]), "limit has shape"),
        (lambda: rate(CLAIM, [1.0, 2.0, 3.0], [[1.0, 2.0, 3.0]], 1.0, margin=0.1), "two seeds or more"),
        (lambda: rate(CLAIM, [1.0, 2.0], np.ones((3, 2)), 1.0, margin=0.1), "3 distinct x"),
        (lambda: rate(CLAIM, [1.0, 2.0, 2.0], np.ones((3, 3)), 1.0, margin=0.1), "3 distinct x"),
        (lambda: rate(CLAIM, [1.0, 2.0, 3.0], np.zeros((2, 3)), 1.0, margin=0.1), "y holds values <= 0"),
        (lambda: rate(CLAIM, [0.0, 2.0, 3.0], np.ones((2, 3)), 1.0, margin=0.1), "x holds values <= 0"),
        (lambda: rate(CLAIM, [math.nan, 2.0, 3.0], np.ones((2, 3)), 1.0, margin=0.1), "finite abscissae"),
        (lambda: rate(CLAIM, [1.0, 2.0], np.ones((2, 3)), 1.0, margin=0.1), "x has shape"),
        (lambda: rate(CLAIM, [1.0, 2.0, 3.0], np.ones((2, 3)), math.inf, margin=0.1), "finite number"),
        (lambda: rate(CLAIM, [1.0, 2.0, 3.0], np.ones((2, 3)), 1.0, margin=0.1, law="cubic"), "law"),
        (lambda: slope_fit([1.0, 2.0, 3.0], np.full((2, 3), math.nan), law="power", level=0.95), "not finite"),
        (lambda: verify.interval([1.0], 0.95), "two seeds"),
        (lambda: verify.interval([1.0, math.nan], 0.95), "not finite"),
        (lambda: separation(CLAIM, [1.0, 2.0]), "either b"),
        (lambda: separation(CLAIM, [1.0, 2.0], [1.0, 2.0], null=np.ones(1000)), "either b"),
        (lambda: separation(CLAIM, [1.0, 2.0], [1.0, 2.0, 3.0]), "paired=False"),
        (lambda: separation(CLAIM, [1.0, 2.0], [1.0, 2.0], direction="up"), "direction"),
        (lambda: separation(CLAIM, 1.0, null=np.ones(999)), "1000 draws or more"),
        (lambda: verify.null_interval(np.ones(39), 0.95), "40 draws or more"),
        (lambda: verify.null_p_value(1.0, np.ones((2, 2))), "null has shape"),
        (lambda: verify.from_json("[{}]"), "recompute"),
        (lambda: verify.from_json("{"), "recompute"),
        (lambda: verify.from_json("3"), "recompute"),
        (lambda: verify.from_json(verify.to_json([*every_kind()]).replace('"supported"', '"refuted"')), "contradicts"),
    ],
)
def test_bad_input_is_refused_with_cause_and_remedy(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: identity(CLAIM, ["a"], ["a"]), "give numbers"),
        (lambda: agreement(CLAIM, [1j, 2j], 1.0, margin=1.0), "real numbers"),
        (lambda: verify.to_json(next(every_kind())), r"to_json\(\[verdict\]\)"),
    ],
)
def test_wrong_types_are_refused_with_cause_and_remedy(call, message):
    with pytest.raises(TypeError, match=message):
        call()


def test_a_deterministic_measurement_has_a_point_for_an_interval():
    x = np.array([1.0, 2.0, 4.0, 8.0])
    for y in (x**2, x[None, :] ** 2):
        verdict = rate(CLAIM, x, y, 2.0, margin=1e-9, deterministic=True)
        assert verdict.outcome == "supported" and verdict.low == verdict.high and not verdict.details["zero_spread"]
    with pytest.raises(ValueError, match="declared deterministic"):
        rate(CLAIM, x, np.ones((2, 4)), 2.0, margin=1.0, deterministic=True)
