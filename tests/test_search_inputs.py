"""Whatever comes in is answered as exact search answers it, or refused by a message that names what is wrong."""

import itertools
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from theorykit.search import build_graph, extend, knn, knn_graph, query_graph, rerank

KEY = jax.random.key(0)
D, DEGREE, QUERIES = 3, 8, 6
# Few shapes, since every one compiles programs of its own; numbers of rows at multiples of the degree, and none, one,
# fewer than edges, and one more than a multiple.
SHAPES = ((0, "l2"), (1, "cosine"), (DEGREE, "l2"), (2 * DEGREE, "cosine"), (2 * DEGREE + 1, "ip"))
DTYPES = (np.float32, np.float64, np.float16, jnp.bfloat16, np.int8, np.uint8, np.int32)
KINDS = ("normal", "copies", "equal", "zeros among them")
LAYOUTS = ("plain", "strided", "column-major", "read-only", "jax")
SEEDS = st.integers(0, 2**32 - 1)


@pytest.fixture(scope="module", autouse=True)
def quick_programs():
    """Programs are small and run once or twice: compiling them well would take most of the time."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def rows_of(kind, n, seed, d=D):
    """Numbers that every dtype holds exactly, positive and small, so that arrays of two dtypes are the same rows."""
    generator = np.random.default_rng(seed)
    rows = generator.integers(0, 64, (n, d))
    if kind == "copies":
        rows = rows[generator.integers(0, max(n // 4, 1), n)]
    if kind == "equal":
        rows[:] = rows[:1]
    if kind == "zeros among them":
        rows[generator.random(n) < 0.4] = 0
    return rows.astype(np.float32)


def as_given(rows, dtype, layout):
    """The same rows in another dtype and laid out otherwise."""
    rows = rows.astype(dtype)
    if layout == "strided":
        wide = np.zeros((2 * rows.shape[0], 2 * rows.shape[1]), dtype)
        wide[::2, ::2] = rows
        return wide[::2, ::2]
    if layout == "column-major":
        return np.asfortranarray(rows)
    if layout == "read-only":
        rows.setflags(write=False)
    return jnp.asarray(rows) if layout == "jax" and rows.dtype != np.float64 else rows


def masks_of(kind, n, q, seed):
    generator = np.random.default_rng(seed)
    if kind == "none passes":
        return np.zeros(n, bool)
    if kind == "rows":
        return generator.random(n) < 0.5
    if kind == "each":  # for the first query nothing
        return (generator.random((q, n)) < 0.5) & (np.arange(q) > 0)[:, None]
    return None


def same(found, truth):
    np.testing.assert_array_equal(found.ids, truth.ids)
    np.testing.assert_array_equal(found.distances, truth.distances)
    assert found.distances.dtype == jnp.float32 and found.ids.dtype == jnp.int32


@cache
def graph_of(kind, shape, seed):
    n, metric = shape
    return build_graph(rows_of(kind, n, seed), metric=metric, degree=DEGREE, key=KEY)


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(SHAPES),
    st.sampled_from(KINDS),
    *[st.sampled_from(DTYPES), st.sampled_from(LAYOUTS)] * 2,
    st.sampled_from([0, 1, QUERIES]),
    st.sampled_from([2, 2 * DEGREE + 2]),  # few, and more than there are
    SEEDS,
)
@example((0, "l2"), "normal", np.float32, "plain", np.float32, "plain", QUERIES, 2, 0)
@example((1, "cosine"), "zeros among them", np.int8, "strided", np.float16, "read-only", QUERIES, 18, 4)
@example((16, "cosine"), "zeros among them", np.float64, "column-major", np.uint8, "jax", QUERIES, 18, 0)
@example((17, "ip"), "copies", jnp.bfloat16, "read-only", np.int32, "strided", 0, 2, 0)
@pytest.mark.slow
def test_any_rows_are_found_by_a_graph_as_exact_search_finds_them(
    shape, kind, dtype, layout, query_dtype, query_layout, q, k, seed
):
    n, metric = shape
    rows, queries = rows_of(kind, n, seed), rows_of("normal", QUERIES, seed + 1)[:q]
    base, asked = as_given(rows, dtype, layout), as_given(queries, query_dtype, query_layout)
    graph = build_graph(base, metric=metric, degree=DEGREE, key=KEY)
    truth = knn(rows, queries, k, metric=metric)
    same(query_graph(graph, asked, k, beam=max(n, 1)), truth)
    same(knn(base, asked, k, metric=metric), truth)
    ids, distances = np.asarray(truth.ids), np.asarray(truth.distances)
    assert ids.shape == distances.shape == (q, k)
    assert (ids[:, n:] == -1).all() and np.isinf(distances[:, n:]).all() and (ids[:, :n] >= 0).all()
    if metric == "cosine" and n and q:
        zero = ~rows.any(axis=1)
        assert (distances[(ids >= 0) & zero[ids]] == 1).all()


@settings(max_examples=10, deadline=None)
@given(
    st.sampled_from(KINDS),
    st.sampled_from(["none passes", "rows", "each"]),
    st.lists(st.integers(0, QUERIES), max_size=3),
    st.integers(0, 3),
)
@example("copies", "none passes", [1, 3], 0)
@example("normal", "each", [0, 1, 2], 1)
@pytest.mark.slow
def test_answers_do_not_depend_on_batches_whatever_the_mask(kind, mask, cuts, seed):
    shape = SHAPES[-1]
    n, metric = shape
    graph, rows, queries = graph_of(kind, shape, seed), rows_of(kind, n, seed), rows_of("normal", QUERIES, 5)
    mask = masks_of(mask, n, QUERIES, seed)
    whole = query_graph(graph, queries, 2, beam=n, mask=mask)
    same(whole, knn(rows, queries, 2, metric=metric, mask=mask))
    ends = [0, *sorted(cuts), QUERIES]
    for start, end in itertools.pairwise(ends):
        own = mask if mask is None or mask.ndim == 1 else mask[start:end]
        part = query_graph(graph, queries[start:end], 2, beam=n, mask=own)
        same(part, jax.tree.map(lambda array, s=start, e=end: array[s:e], whole))


@settings(max_examples=6, deadline=None)
@given(st.sampled_from(KINDS), st.sampled_from(DTYPES), st.sampled_from(LAYOUTS), SEEDS)
@example("equal", np.float16, "strided", 0)
@pytest.mark.slow
def test_a_graph_that_was_extended_finds_what_exact_search_finds(kind, dtype, layout, seed):
    old, new = rows_of(kind, DEGREE, seed), rows_of(kind, DEGREE, seed + 1)
    graph = extend(build_graph(old, degree=DEGREE, key=KEY), as_given(new, dtype, layout), key=KEY)
    queries = rows_of("normal", QUERIES, seed + 2)
    same(query_graph(graph, queries, 18, beam=2 * DEGREE), knn(np.concatenate([old, new]), queries, 18))


@cache
def small_graph():
    return graph_of("normal", SHAPES[2], 0)


CALLS = {
    "build_graph: base": lambda rows: build_graph(rows, key=KEY),
    "query_graph: queries": lambda rows: query_graph(small_graph(), rows, 2),
    "extend: rows": lambda rows: extend(small_graph(), rows, key=KEY),
    "knn: base": lambda rows: knn(rows, np.zeros((2, D), np.float32), 2),
    "knn: queries": lambda rows: knn(np.zeros((2, D), np.float32), rows, 2),
    "knn_graph: base": lambda rows: knn_graph(rows, 2),
    "rerank: base": lambda rows: rerank(rows, rows, np.zeros((len(rows), 1), np.int32)),
}


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(sorted(CALLS)),
    st.sets(st.integers(0, 11), min_size=1, max_size=4),
    st.integers(0, D - 1),
    st.sampled_from([np.nan, np.inf, -np.inf]),
    st.sampled_from([np.float32, np.float64, np.float16, jnp.bfloat16]),
    st.sampled_from(LAYOUTS),
)
def test_the_first_row_that_is_no_vector_of_numbers_is_named(call, bad, column, value, dtype, layout):
    rows = rows_of("normal", 12, 0)
    rows[sorted(bad), column] = value
    with pytest.raises(
        ValueError, match=f"^{call}: row {min(bad)} holds a NaN, an infinity or a number beyond float32"
    ):
        CALLS[call](as_given(rows, dtype, layout))


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(["query_graph", "extend", "knn", "rerank"]), st.integers(1, 40).filter(lambda d: d != D))
@pytest.mark.usefixtures("as_users_run")
def test_rows_of_two_dimensions_are_refused(call, d):
    rows, others = rows_of("normal", 4, 0), rows_of("normal", 4, 0, d)
    calls = {
        "query_graph": lambda: query_graph(small_graph(), others, 2),
        "extend": lambda: extend(small_graph(), others, key=KEY),
        "knn": lambda: knn(rows, others, 2),
        "rerank": lambda: rerank(rows, others, np.zeros((4, 1), np.int32)),
    }
    with pytest.raises(
        ValueError, match=f"{call}: base has rows of {D} numbers and queries of {d}; both must come from"
    ):
        calls[call]()


@settings(max_examples=20, deadline=None)
@given(
    st.sampled_from(sorted(CALLS)),
    st.sampled_from([np.complex64, bool, "U3", object]),
    st.sampled_from([(4, D), (4,), (2, 2, D), (4, 0)]),
)
@pytest.mark.usefixtures("as_users_run")
def test_what_is_no_matrix_of_real_numbers_is_refused(call, dtype, shape):
    real = shape != (4, D)
    error, message = (ValueError, "has shape") if real else (TypeError, "has dtype")
    with pytest.raises(error, match=f"^{call} {message}"):
        CALLS[call](np.ones(shape, np.float32 if real else dtype))


def test_entries_whose_squares_overflow_are_judged_one_by_one():
    # The sum of squares, which is asked first, says nothing here; cosine takes every float32.
    base = np.full((5, 3), 1e30, np.float32)
    assert knn(base, base[:1], 2, metric="cosine").ids.tolist() == [[0, 1]]
    with pytest.raises(ValueError, match="base: row 0 holds 1e"):
        knn(base, base[:1], 2)
    base[3, 1] = np.nan
    with pytest.raises(ValueError, match="base: row 3 holds a NaN"):
        knn(base, base[:1], 2, metric="cosine")
