"""Exact search against brute force in float64, and every line of its contract."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exact_neighbours import KINDS, METRICS, check, data
from hypothesis import example, given, settings
from hypothesis import strategies as st

from theorykit.search import _inputs, _scan, exact, knn, knn_graph, rerank


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
