"""Exact search against brute force in float64, and every line of its contract."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jax import export

from theorykit.search import _inputs, _scan, exact, knn, knn_graph, rerank

METRICS = ["l2", "ip", "cosine"]
# Distances come from sums of d exact products in float32, and from unit vectors in float32 for cosine.
ROUNDING = 40 * float(np.finfo(np.float32).eps)


def all_distances(base, queries, metric):
    """The definition, in float64."""
    base, queries = (np.asarray(x).astype(np.float64) for x in (base, queries))
    if metric == "ip":
        return -queries @ base.T
    if metric == "l2":
        return np.sum((queries[:, None] - base[None]) ** 2, axis=2)
    a, b = (x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-300) for x in (queries, base))
    return 1 - a @ b.T


def scale(base, queries, metric):
    """Sizes of the numbers whose rounding the distances carry."""
    if metric == "cosine" or not len(base) or not len(queries):
        return 1.0
    return max(np.linalg.norm(np.asarray(x).astype(np.float64), axis=1).max() for x in (base, queries)) ** 2


def check(found, base, queries, k, metric, mask=None, own=False):
    """Shapes, dtypes, order, ties and values of an answer; ids are optimal up to rounding, and exact for integers."""
    n, q = len(base), len(queries)
    assert found.distances.shape == found.ids.shape == (q, k)
    assert found.distances.dtype == jnp.float32 and found.ids.dtype == jnp.int32
    distances, ids = np.asarray(found.distances), np.asarray(found.ids)
    truth = all_distances(base, queries, metric).reshape(q, n)
    if mask is not None:
        truth = np.where(np.broadcast_to(mask, (q, n)), truth, np.inf)
    if own:
        truth = np.where(np.eye(n, dtype=bool), np.inf, truth)
    tolerance = ROUNDING * scale(base, queries, metric)
    best = np.sort(truth, axis=1)[:, :k]
    best = np.pad(best, ((0, 0), (0, k - best.shape[1])), constant_values=np.inf)
    np.testing.assert_array_equal(np.isinf(best), ids == -1)
    np.testing.assert_array_equal(np.isinf(distances), ids == -1)
    np.testing.assert_allclose(distances, best, rtol=ROUNDING, atol=tolerance)
    there = ids >= 0
    if n:
        # The distance belongs to the row that is named, and no row is named twice.
        named = np.take_along_axis(truth, np.where(there, ids, 0), axis=1)
        np.testing.assert_allclose(named[there], distances[there], rtol=ROUNDING, atol=tolerance)
    for row, fine in zip(ids, there, strict=True):
        assert len(set(row[fine])) == fine.sum()
    # Ascending, and equal distances in the order of ids.
    a, b = distances[:, :-1], distances[:, 1:]
    assert np.all((a < b) | ((a == b) & ((ids[:, :-1] < ids[:, 1:]) | (ids[:, 1:] == -1))))
    integral = all(np.issubdtype(np.asarray(x).dtype, np.integer) for x in (base, queries))
    if integral and metric != "cosine" and k <= n:
        expected = np.argsort(truth, axis=1, kind="stable")[:, :k]
        np.testing.assert_array_equal(ids, np.where(np.isinf(best), -1, expected))


def data(seed, n, q, d, kind):
    generator = np.random.default_rng(seed)
    if kind == "integers":
        return (generator.integers(-3, 4, size=(m, d)).astype(np.int8) for m in (n, q))
    both = generator.normal(size=(n + q, d))
    if kind == "duplicates":
        both = both[generator.integers(0, 1 + (n + q) // 4, size=n + q)]
    if kind == "far away":
        both = both + 1000.0
    if kind == "one outlier" and n:
        both[0] *= 1e4
    if kind == "equal":
        both[:] = both[:1]
    if kind == "zeros":
        both[generator.random(n + q) < 0.5] = 0
    return both[:n].astype(np.float32), both[n:].astype(np.float32)


KINDS = ["normal", "integers", "duplicates", "far away", "one outlier", "equal", "zeros"]


# Compilation takes the time: two buckets of queries, and few of rows. 24 queries go by blocks, in one tile or in two;
# few queries, and many neighbours, are compared directly.
@settings(deadline=None, max_examples=60)
@given(
    metric=st.sampled_from(METRICS),
    kind=st.sampled_from(KINDS),
    n=st.sampled_from([0, 1, 2, 17, 64, 300]),
    q=st.sampled_from([0, 5, 24]),
    d=st.just(5),
    k=st.just(3),
    masked=st.sampled_from(["no", "rows"]),
    seed=st.integers(0, 2**31),
)
@pytest.mark.slow
@example(metric="l2", kind="integers", n=2500, q=20, d=5, k=3, masked="no", seed=0)
@example(metric="cosine", kind="zeros", n=2500, q=20, d=5, k=3, masked="each", seed=0)
@example(metric="ip", kind="equal", n=600, q=24, d=1, k=3, masked="each", seed=0)
@example(metric="l2", kind="normal", n=600, q=1, d=1, k=1, masked="each", seed=0)
@example(metric="ip", kind="integers", n=300, q=24, d=5, k=200, masked="rows", seed=0)
@example(metric="l2", kind="integers", n=2500, q=5, d=5, k=3, masked="each", seed=0)
@example(metric="l2", kind="duplicates", n=17, q=8, d=5, k=70, masked="no", seed=0)
def test_the_answer_is_that_of_brute_force(metric, kind, n, q, d, k, masked, seed):
    base, queries = data(seed, n, q, d, kind)
    generator = np.random.default_rng(seed)
    mask = {"no": None, "rows": generator.random(n) < 0.5, "each": generator.random((q, n)) < 0.5}[masked]
    check(knn(base, queries, k, metric=metric, mask=mask), base, queries, k, metric, mask)


@settings(deadline=None, max_examples=12)
@given(
    metric=st.sampled_from(METRICS),
    kind=st.sampled_from(KINDS),
    n=st.sampled_from([1, 2, 64]),
    seed=st.integers(0, 2**31),
)
@pytest.mark.slow
@example(metric="l2", kind="integers", n=600, seed=0)
def test_a_row_is_no_neighbour_of_itself(metric, kind, n, seed):
    base, _ = data(seed, n, 1, 5, kind)
    check(knn_graph(base, 3, metric=metric), base, base, 3, metric, own=True)


@pytest.mark.slow
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_answer_does_not_depend_on_batching_or_memory(metric, kind):
    # Forty and twenty go by blocks, seven are compared directly.
    base, queries = data(3, 2500, 40, 5, kind)
    whole = knn(base, queries, 3, metric=metric)
    parts = [knn(base, queries[i:j], 3, metric=metric) for i, j in ((0, 7), (7, 14), (14, 20), (20, 40))]
    small = knn(base, queries, 3, metric=metric, memory=2**20)
    for name in whole._fields:
        np.testing.assert_array_equal(getattr(whole, name), np.concatenate([getattr(part, name) for part in parts]))
        np.testing.assert_array_equal(getattr(whole, name), getattr(small, name))


@pytest.mark.slow
@pytest.mark.parametrize("metric", METRICS)
def test_the_answer_is_the_first_of_all_reranked_rows(metric):
    # Bit for bit: what `exact` calls exact.
    base, queries = data(4, 600, 24, 5, "duplicates")
    everything = rerank(base, queries, np.tile(np.arange(600), (24, 1)), metric=metric)
    found = knn(base, queries, 10, metric=metric)
    np.testing.assert_array_equal(found.ids, everything.ids[:, :10])
    np.testing.assert_array_equal(found.distances, everything.distances[:, :10])


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int32", "int64", "float16", "bfloat16", "float64"])
def test_every_dtype_and_layout_is_searched(dtype):
    base, queries = data(5, 64, 7, 5, "integers")
    kind = jnp.bfloat16 if dtype == "bfloat16" else dtype
    strided = np.asfortranarray(np.abs(base).astype(kind))[::-1][::-1]
    strided.flags.writeable = False
    expected = knn(np.abs(base).astype(np.float32), queries, 3)
    found = knn(strided, queries, 3)
    np.testing.assert_array_equal(found.ids, expected.ids)
    np.testing.assert_array_equal(found.distances, expected.distances)


def test_jax_arrays_and_numpy_arrays_give_the_same():
    base, queries = data(6, 600, 7, 5, "normal")
    for a, b in zip(knn(base, queries, 3), knn(jnp.asarray(base), jnp.asarray(queries), 3), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("metric", ["l2", *(pytest.param(name, marks=pytest.mark.slow) for name in METRICS[1:])])
def test_search_works_inside_jit(metric):
    base, queries = (jnp.asarray(x) for x in data(7, 600, 24, 5, "normal"))
    outside = knn(base, queries, 3, metric=metric), knn_graph(base, 3, metric=metric)
    inside = jax.jit(lambda x, q: (knn(x, q, 3, metric=metric), knn_graph(x, 3, metric=metric)))(base, queries)
    jax.tree.map(np.testing.assert_array_equal, inside, outside)
    ranked = jax.jit(lambda x, q, ids: rerank(x, q, ids, metric=metric))(base, queries, outside[0].ids[:, ::-1])
    jax.tree.map(np.testing.assert_array_equal, ranked, outside[0])


@pytest.mark.slow
def test_search_works_while_doubles_are_on(x64):
    base, queries = data(8, 600, 24, 5, "normal")
    check(knn(base, queries, 3), base, queries, 3, "l2")
    check(knn_graph(base.astype(np.float64), 3, metric="cosine"), base, base, 3, "cosine", own=True)


@pytest.mark.parametrize("metric", METRICS)
def test_huge_and_tiny_vectors_keep_their_order(metric):
    base, queries = data(9, 600, 24, 5, "normal")
    expected = knn(base, queries, 3, metric=metric)
    for factor in (2.0**40, 2.0**-30):
        found = knn(base * np.float32(factor), queries * np.float32(factor), 3, metric=metric)
        np.testing.assert_array_equal(found.ids, expected.ids)
        power = 1.0 if metric == "cosine" else factor**2
        np.testing.assert_array_equal(found.distances, expected.distances * np.float32(power))


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


def test_a_program_serves_a_bucket_of_shapes():
    for n in (2100, 2300, 4000):
        knn(*data(0, n, 5, 3, "normal"), 2)
    before = _scan.nearest._cache_size()
    for n, q in ((2200, 6), (2500, 8), (4095, 3)):
        knn(*data(1, n, q, 3, "normal"), 2)
    assert _scan.nearest._cache_size() == before


@pytest.mark.parametrize("n", [1, 63, 64, 65, 2048, 2049, 100_000, 10**6])
@pytest.mark.parametrize("q", [1, 9, 512, 513, 2000, 10**6])
@pytest.mark.parametrize("memory", [2**25, 2**28])
def test_plans_cover_their_input_and_waste_little(n, q, memory):
    rows, queries, sizes = exact.plan(n, q, 128, 10, memory)
    assert rows >= n and queries >= q
    assert queries % sizes.chunk == 0
    # A large base is not copied: the last tile reaches back.
    assert rows % sizes.tile == 0 or (sizes.whole and rows == n >= sizes.tile and n % max(1, sizes.block) == 0)
    assert rows <= max(64, 2 * n if n <= 2048 else n + max(2047, n / 15))
    assert queries <= 1.25 * q + 64
    if sizes.block:
        assert sizes.tile % sizes.block == 0 and sizes.blocks < rows // sizes.block


def test_a_million_rows_stream_within_the_memory_that_is_allowed():
    n, q, sizes = exact.plan(10**6, 2000, 128, 10, exact.MEMORY)
    shapes = [jax.ShapeDtypeStruct((m, 128), jnp.float32) for m in (n, q)]
    counts = jax.ShapeDtypeStruct((2,), jnp.int32)
    lowered = _scan.nearest.lower(*shapes, counts, None, None, None, k=10, metric="l2", plan=sizes)
    memory = lowered.compile().memory_analysis()
    # Beside the chunk: bounds and masks of all rows, and answers.
    assert memory.temp_size_in_bytes <= exact.MEMORY + 16 * n + 64 * 2 * 10 * q
    assert memory.temp_size_in_bytes + 2 * shapes[0].size * 4 < 2 * 2**30


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


def test_candidates_are_ranked_once_each():
    base, queries = data(14, 64, 3, 5, "normal")
    ids = np.array([[5, -1, 7, 5], [-1, -1, -1, -1], [0, 63, 1, 2]])
    found = rerank(base, queries, ids)
    assert found.ids[1].tolist() == [-1] * 4
    assert sorted(found.ids[0].tolist()) == [-1, -1, 5, 7]
    check(rerank(base, queries[:1], np.arange(64)[None]), base, queries[:1], 64, "l2")


BAD = [
    ({"k": 0}, ValueError, "k is 0; ask for at least 1"),
    ({"k": 2.0}, TypeError, "k is a float"),
    ({"k": True}, TypeError, "k is a bool"),
    ({"metric": "l1"}, ValueError, "metric is 'l1'; the metrics are"),
    ({"queries": np.zeros((2, 3), np.float32)}, ValueError, "base has rows of 5 numbers and queries of 3"),
    ({"queries": np.zeros(5, np.float32)}, ValueError, r"queries has shape \(5,\); rows are \(n, d\).*x\[None\]"),
    ({"base": np.zeros((3, 0), np.float32)}, ValueError, r"base has shape \(3, 0\)"),
    ({"base": "rows"}, TypeError, "base is a str"),
    ({"base": np.zeros((3, 5), bool)}, TypeError, "base has dtype bool"),
    ({"base": np.zeros((3, 5), complex)}, TypeError, "base has dtype complex128"),
    ({"mask": np.ones(9, np.int8)}, TypeError, "mask is int8; pass a boolean"),
    ({"mask": np.ones(8, bool)}, ValueError, r"mask has shape \(8,\); give \(9,\).*or \(2, 9\)"),
    ({"memory": 1000}, ValueError, "8 queries at once.* need [0-9]+ bytes and memory is 1000; allow more"),
]


@pytest.mark.parametrize(("bad", "error", "message"), BAD)
def test_bad_input_is_refused_with_cause_and_remedy(bad, error, message, as_users_run):
    arguments = {"base": np.ones((9, 5), np.float32), "queries": np.ones((2, 5), np.float32), "k": 1} | bad
    with pytest.raises(error, match=f"knn: {message}"):
        knn(**arguments)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e300])
@pytest.mark.parametrize("which", ["base", "queries"])
@pytest.mark.parametrize("place", [np.asarray, jnp.asarray])
def test_the_first_bad_row_is_named(value, which, place):
    with jax.enable_x64(True):
        arguments = {"base": np.ones((9, 5)), "queries": np.ones((9, 5))}
        arguments[which][3:5, 2] = value
        arguments = {name: place(x) for name, x in arguments.items()}
        with pytest.raises(
            ValueError, match=f"knn: {which}: row 3 holds a NaN, an infinity or a number beyond float32"
        ):
            knn(**arguments, k=1)


@pytest.mark.slow
def test_rows_whose_distances_overflow_are_refused_but_not_for_cosine():
    base = np.ones((3, 5), np.float32)
    base[1] = 1e30
    with pytest.raises(ValueError, match=r"knn: base: row 1 holds 1e\+30.*divide base and queries by one number"):
        knn(base, base, 1)
    check(knn(base, base, 3, metric="cosine"), base, base, 3, "cosine")
    limit = np.float32(_inputs.largest_entry(5) * 0.999)
    extreme = np.outer([limit, -limit, 0], np.ones(5)).astype(np.float32)
    for metric in ("l2", "ip"):
        assert np.all(np.isfinite(knn(extreme, extreme, 3, metric=metric).distances))


@pytest.mark.parametrize(
    ("ids", "error", "message"),
    [
        (np.zeros((2, 3)), TypeError, "ids are float64; pass an integer array"),
        (np.zeros(3, int), ValueError, r"ids have shape \(3,\); give \(2, c\)"),
        (np.full((2, 1), 9), ValueError, "ids lie between 9 and 9; rows are 0 to 8"),
        (np.full((2, 1), -2), ValueError, "ids lie between -2 and -2"),
        (np.full((2, 1), 2**40), ValueError, "ids lie between"),
    ],
)
def test_ids_that_name_no_row_are_refused(ids, error, message, as_users_run):
    with pytest.raises(error, match=f"rerank: {message}"):
        rerank(np.ones((9, 5), np.float32), np.ones((2, 5), np.float32), ids)
