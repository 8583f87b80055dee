"""Why answers of exact search are proved: bounds, reduced precision, and products that need no margin."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exact_neighbours import KINDS, METRICS, check, data, scale
from jax import export

from theorykit.search import _scan, exact, knn, knn_graph


@pytest.mark.slow
def test_copies_by_the_thousand_are_proved_without_a_second_pass():
    # Numbers of few bits, such as pixels, tie all the time; their products are exact, and no margin is needed.
    generator = np.random.default_rng(10)
    base = generator.integers(0, 2, size=(2500, 4)).astype(np.float32) / 16
    queries = generator.integers(0, 2, size=(24, 4)).astype(np.float32) / 16
    assert without_proof(base, queries, 3, "l2") == 0
    assert without_proof(base, queries, 3, "ip") == 0
    # The control: other fractions are rounded, and copies lie within every margin.
    assert without_proof(base / 3, queries / 3, 3, "l2") == 24
    check(knn(base / 3, queries / 3, 3), base / 3, queries / 3, 3, "l2")


@pytest.mark.slow
@pytest.mark.parametrize("metric", METRICS)
def test_ordinary_data_need_no_second_pass(metric):
    for d in (5, 64):
        base, queries = data(11, 2500, 64, d, "normal")
        assert without_proof(base, queries, 3, metric) <= 1


def without_proof(base, queries, k, metric):
    """Number of queries that the products alone do not settle."""
    (n, d), q = base.shape, len(queries)
    n_padded, q_padded, sizes = exact.plan(n, q, d, k, exact.MEMORY)
    assert sizes.block and q_padded == sizes.chunk

    def proved(rows, queries):
        if metric == "cosine":
            rows, queries = _scan.unit_rows(rows), _scan.unit_rows(queries)
        frame = _scan._frames(rows, queries, jnp.int32(n), jnp.arange(n_padded) < n, metric, sizes)[0]
        parts = queries, None, None, frame.shift, frame.exact
        return _scan._by_blocks(rows, frame, *parts, reduced=sizes.reduced, k=k, metric=metric, plan=sizes)[2]

    return int(np.sum(~jax.jit(proved)(exact.padded(base, n_padded), exact.padded(queries, q_padded))[:q]))


@pytest.mark.slow
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("kind", ["normal", "halves"])
@pytest.mark.parametrize("reduced", [False, True])
def test_bounds_lie_below_the_distances_and_not_far_below(metric, kind, reduced):
    # The margin is what the proof rests on: never passed, and small against what it has to separate.
    base, queries = data(12, 2048, 8, 64, "normal")
    if kind == "halves":
        # Halfway between numbers of bfloat16, rounded towards zero: in the product with itself all errors add up.
        base = np.where(base[:1024] > 0, np.float32(1 + 2.0**-8), np.float32(-1 - 2.0**-8))
        base = np.concatenate([base, -base])  # the centre is zero
        queries = base[:8]
    sizes = _scan.Plan(8, 2048, 1, 16, reduced=reduced)
    if metric == "cosine":
        base, queries = (_scan.unit_rows(jnp.asarray(x)) for x in (base, queries))
    base, queries = jnp.asarray(base), jnp.asarray(queries)

    def bounds(x, q):
        frame = _scan._frames(x, q, jnp.int32(2048), jnp.ones(2048, bool), metric, sizes)[0]
        products = _scan._product(x - frame.centre[None], _scan._columns(q - frame.centre[None], reduced), reduced)
        return (2 if metric == "l2" else 1) * (frame.half[:, None] - products + frame.shift[None])

    slack = np.asarray(_scan.pair_distances(metric, queries[:, None], base[None]) - jax.jit(bounds)(base, queries).T)
    # Twice the sum of both margins at most: here d + p + 12 units of each squared norm, and twice as many roundings and
    # two parts in 256 where factors are rounded to bfloat16.
    unit = 4 * scale(base, queries, metric)
    most = unit * ((64 + 14 + 30) * 2.0**-24 if not reduced else 2.0**-7 * 1.01 + (128 + 14 + 30) * 2.0**-24)
    # Numbers of few bits make exact products in float32, and need no margin.
    assert slack.min() >= 0 if kind == "halves" else slack.min() > 0
    assert slack.max() < most
    # The control: with bfloat16 the slack is far beyond what float32 needs.
    if kind == "normal":
        assert (slack.max() > unit * 2.0**-12) == reduced


def reduce(monkeypatch):
    """Have products of bfloat16 come first, whatever the processor and the size."""
    monkeypatch.setattr(exact, "REDUCED_FROM", 0)
    monkeypatch.setattr(exact, "_multiplies_bfloat16", lambda: True)


@pytest.mark.slow
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("kind", KINDS)
def test_products_of_bfloat16_give_the_same_answer(metric, kind, monkeypatch):
    base, queries = data(13, 2500, 40, 5, kind)
    expected = knn(base, queries, 3, metric=metric)
    reduce(monkeypatch)
    assert exact.plan(2500, 40, 5, 3, exact.MEMORY)[2].reduced
    jax.tree.map(np.testing.assert_array_equal, knn(base, queries, 3, metric=metric), expected)


@pytest.mark.slow
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("kind", "reduced"), [("integers", False), ("normal", True)])
def test_rows_that_are_not_padded_give_the_same_answer(metric, kind, reduced, monkeypatch):
    # The last tile reaches back by more than half, and by whole blocks; the mask leaves few rows in some places.
    base, queries = data(16, 2752, 40, 5, kind)
    mask = np.random.default_rng(16).random(2752) < np.linspace(0.01, 0.5, 2752)
    expected = [knn(base, queries, 3, metric=metric, mask=mask), knn_graph(base[:2560], 3, metric=metric)]
    each = knn(base, queries, 3, metric=metric, mask=np.tile(mask, (40, 1)))
    if reduced:
        reduce(monkeypatch)
    monkeypatch.setattr(exact, "COPIED", 0)
    assert exact.plan(2752, 40, 5, 3, exact.MEMORY)[0] == 2752
    found = [knn(base, queries, 3, metric=metric, mask=mask), knn_graph(base[:2560], 3, metric=metric)]
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    jax.tree.map(np.testing.assert_array_equal, each, expected[0])
    found = knn(base, queries, 3, metric=metric, mask=np.tile(mask, (40, 1)))
    jax.tree.map(np.testing.assert_array_equal, found, expected[0])


@pytest.mark.slow
@pytest.mark.parametrize("metric", METRICS)
def test_products_of_bfloat16_prove_most_answers(metric, monkeypatch):
    base, queries = data(11, 2500, 64, 16, "normal")
    reduce(monkeypatch)
    assert without_proof(base, queries, 3, metric) <= 3


@pytest.mark.parametrize(
    ("work", "units", "reduced"), [(2**33, True, True), (2**33, False, False), (2**32, True, False)]
)
def test_products_of_bfloat16_are_for_processors_that_have_them_and_for_much_work(work, units, reduced, monkeypatch):
    monkeypatch.setattr(exact, "_multiplies_bfloat16", lambda: units)
    assert exact.plan(2**16, work // 2**23, 2**7, 10, exact.MEMORY)[2].reduced == reduced
    assert not exact.plan(2**16, work // 2**23, 2**7, 10, exact.MEMORY, masked=True)[2].reduced


def test_products_of_bfloat16_stand_in_the_layout_that_is_fast(monkeypatch):
    # Both factors as they are, in bfloat16, summed in float32: the compiler converts others to float32 first.
    base, queries = (jnp.asarray(x) for x in data(0, 2500, 24, 5, "normal"))
    reduce(monkeypatch)
    text = jax.jit(lambda x, q: knn(x, q, 3)).lower(base, queries).as_text()
    (product,) = [line for line in text.splitlines() if "stablehlo.dot_general" in line and "bf16" in line]
    assert "contracting_dims = [1] x [0]" in product
    assert "(tensor<2048x5xbf16>, tensor<5x64xbf16>) -> tensor<2048x64xf32>" in product


def test_groups_of_minima_hold_the_least_ones():
    # Few values, so that groups tie at the border.
    generator = np.random.default_rng(15)
    lows = jnp.asarray(generator.integers(0, 30, size=(64, 5)).astype(np.float32))
    groups = lows.reshape(16, 4, 5).min(axis=1)
    values, blocks = _scan._least(lows, groups, m=9)
    np.testing.assert_array_equal(values, _scan._least(lows, m=9)[0])
    np.testing.assert_array_equal(np.take_along_axis(np.asarray(lows).T, np.asarray(blocks), axis=1), values)
    assert all(len(set(row)) == 9 for row in np.asarray(blocks).tolist())


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
@pytest.mark.parametrize("metric", METRICS)
def test_products_are_of_reduced_precision_on_accelerators_and_the_rest_is_not(platform, metric):
    base, queries = (jnp.asarray(x) for x in data(0, 2500, 24, 5, "normal"))
    lowered = export.export(jax.jit(lambda x, q: knn(x, q, 3, metric=metric)), platforms=[platform])(base, queries)
    (reduced,) = [line for line in products(lowered) if "HIGHEST" not in line]
    assert "[HIGH, HIGH]" in reduced and "2048x5xf32" in reduced
    here = export.export(jax.jit(lambda x, q: knn(x, q, 3, metric=metric)), platforms=["cpu"])(base, queries)
    assert all("HIGHEST" in line for line in products(here))


def products(exported):
    return [line for line in exported.mlir_module().splitlines() if "stablehlo.dot_general" in line]


@pytest.mark.slow
def test_reduced_precision_gives_the_same_answer(monkeypatch):
    # What an accelerator does, by hand: factors rounded to the 11 bits of TF32, and its margin.
    def rounded(x):
        return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=10)

    base, queries = data(13, 2500, 64, 5, "normal")
    expected = knn(base, queries, 3)
    monkeypatch.setattr(_scan, "_product", lambda x, q, _: jnp.matmul(rounded(x), rounded(q).T, precision="highest"))
    monkeypatch.setattr(_scan, "_precision", lambda: (jnp.float32(2.0**-9), jnp.float32(2), jnp.bool_(False)))
    jax.clear_caches()
    jax.tree.map(np.testing.assert_array_equal, knn(base, queries, 3), expected)
    assert without_proof(base, queries, 3, "l2") < 32
    jax.clear_caches()
