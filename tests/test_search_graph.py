"""Search by a graph: what it finds, that it does not depend on batches, masks, and every degenerate input."""

import re
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from theorykit.search import _beam, _transform
from theorykit.search.exact import knn
from theorykit.search.graph import build_graph, extend, query_graph

KEY = jax.random.key(0)
METRICS = ("l2", "ip", "cosine")


def clusters(n, d, seed=0):
    """Overlapping clusters of dimension 4."""
    generator = np.random.default_rng(seed)
    centres = generator.normal(size=(8, d))
    bases = generator.normal(size=(8, 4, d))
    which = generator.integers(0, 8, n)
    rows = centres[which] + np.einsum("ni,nid->nd", generator.normal(size=(n, 4)), bases[which])
    return (rows + 0.05 * generator.normal(size=(n, d))).astype(np.float32)


DATA = clusters(2500, 16)
BASE, QUERIES = DATA[:2400], DATA[2400:]


@cache
def graph_of(metric, storage="int8"):
    return build_graph(BASE, metric=metric, key=KEY, storage=storage)


@cache
def truth_of(metric):
    return knn(BASE, QUERIES, 10, metric=metric)


def recall(found, truth):
    """Part of the answers no farther than the last true neighbour, a rounding forgiven."""
    last = np.asarray(truth.distances)[:, -1:]
    return np.mean(np.asarray(found.distances) <= last + 1e-5 * np.abs(last))


def same(found, truth):
    np.testing.assert_array_equal(found.ids, truth.ids)
    np.testing.assert_array_equal(found.distances, truth.distances)


@pytest.mark.slow
@pytest.mark.parametrize("metric", METRICS)
def test_nearly_all_neighbours_are_found_and_their_distances_are_the_exact_ones(metric):
    found, truth = query_graph(graph_of(metric), QUERIES, 10), truth_of(metric)
    # The key is fixed, so this is no matter of luck; a search that begins at random finds about a tenth.
    assert recall(found, truth) >= 0.98
    ids, distances = np.asarray(found.ids), np.asarray(found.distances)
    for own, own_distances, true, true_distances in zip(ids, distances, *map(np.asarray, truth[::-1]), strict=True):
        assert len(set(own)) == 10 and (np.diff(own_distances) >= 0).all()
        common = np.isin(own, true)
        np.testing.assert_array_equal(own_distances[common], true_distances[np.isin(true, own)])


@pytest.mark.slow
@pytest.mark.parametrize("metric", ["ip", pytest.param("l2", marks=pytest.mark.slow)])
def test_a_beam_that_holds_all_rows_finds_exactly_what_exact_search_finds(metric):
    base = BASE[:200]
    same(
        query_graph(build_graph(base, metric=metric, degree=8, key=KEY), QUERIES[:8], 12, beam=200),
        knn(base, QUERIES[:8], 12, metric=metric),
    )


@pytest.mark.slow
def test_a_wider_beam_finds_more_and_one_of_many_phases_that_holds_all_rows_everything():
    graph, truth = build_graph(BASE, degree=4, key=KEY), truth_of("l2")
    recalls = [recall(query_graph(graph, QUERIES, 10, beam=beam), truth) for beam in (8, 48)]
    assert recalls[0] < recalls[1]
    same(query_graph(graph, QUERIES[:8], 10, beam=2400), knn(BASE, QUERIES[:8], 10))
    mask = np.arange(2400) % 3 > 0
    same(query_graph(graph, QUERIES[:8], 10, beam=2400, mask=mask), knn(BASE, QUERIES[:8], 10, mask=mask))


@pytest.mark.slow
def test_bfloat16_codes_find_as_much():
    graph = graph_of("l2", "bfloat16")
    assert graph.codes.dtype == jnp.bfloat16
    assert recall(query_graph(graph, QUERIES, 10), truth_of("l2")) >= 0.98


@pytest.mark.slow
def test_the_answer_is_the_same_in_every_batch():
    graph = graph_of("cosine")
    whole = query_graph(graph, QUERIES, 10)
    order = np.random.default_rng(1).permutation(100)
    same(query_graph(graph, QUERIES[order], 10), jax.tree.map(lambda array: array[order], whole))
    same(query_graph(graph, QUERIES[3:4], 10), jax.tree.map(lambda array: array[3:4], whole))
    same(query_graph(graph, QUERIES[95:], 10), jax.tree.map(lambda array: array[95:], whole))


@pytest.mark.slow
def test_inside_jit_a_graph_is_an_argument_and_the_answer_the_same():
    graph = graph_of("cosine")
    same(jax.jit(partial(query_graph, k=10))(graph, QUERIES), query_graph(graph, QUERIES, 10))


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_a_search_is_lowered_for_accelerators_with_exact_products(platform):
    program = export.export(jax.jit(partial(query_graph, k=10)), platforms=[platform])(graph_of("cosine"), QUERIES)
    text = program.mlir_module()
    products = re.findall(r"stablehlo\.dot_general.*", text)
    assert len(products) == 2 and all("precision = [HIGHEST, HIGHEST]" in line for line in products)
    # Only the candidates, k and 16 more, are sorted.
    sorts = re.findall(r'"stablehlo\.sort".*?\}\) : \(tensor<64x(\d+)x', text, re.DOTALL)
    assert sorts == ["26"]
    assert [str(shape.shape) for shape in program.out_avals] == ["(100, 10)"] * 2


def test_the_table_of_a_graph_holds_the_codes_of_its_entry_points():
    graph = graph_of("cosine")
    np.testing.assert_array_equal(graph.table.T, np.asarray(graph.codes, np.float32)[np.asarray(graph.entries)])


def test_a_graph_is_a_pytree_of_arrays_with_a_metric():
    leaves, structure = jax.tree.flatten(graph_of("ip"))
    assert all(isinstance(leaf, jax.Array) for leaf in leaves)
    assert jax.tree.unflatten(structure, leaves).metric == "ip"


def test_distances_are_exact_integers_whatever_is_computed_together():
    codes = _transform.encode(jnp.asarray(BASE), "l2", "int8")
    integers, factor = _transform.integer_queries(jnp.asarray(QUERIES), codes.centre, codes.steps, codes.finest, "l2")
    found = _transform.integer_distances(integers, factor, codes.codes.T, codes.half_norms[None])
    products = np.asarray(integers, np.int64) @ np.asarray(codes.codes, np.int64).T
    half_norms = np.round(np.asarray(codes.half_norms)[None] * np.asarray(factor)).astype(np.int64)
    np.testing.assert_array_equal(np.asarray(found), half_norms - products)
    assert np.abs(products).max() < _transform.EXACT


@pytest.mark.parametrize("scale", [1e-12, 1e-3, 1e12])
def test_integer_distances_have_the_order_of_the_distances_at_every_scale(scale):
    base, queries = jnp.asarray(BASE * np.float32(scale)), jnp.asarray(QUERIES * np.float32(scale))
    codes = _transform.encode(base, "l2", "int8")
    integers, factor = _transform.integer_queries(queries, codes.centre, codes.steps, codes.finest, "l2")
    found = _transform.integer_distances(integers, factor, codes.codes.T, codes.half_norms[None])
    true = np.sum((BASE[None].astype(np.float64) - QUERIES[:, None]) ** 2, -1)
    # Both up to a factor and a constant of each query. Rounding to 255 codes moves a row by a 400th of its range.
    for own, wanted in zip(np.asarray(found, np.float64), true, strict=True):
        assert np.corrcoef(own, wanted)[0, 1] > 0.999


@pytest.mark.slow
def test_a_mask_for_all_queries_or_for_each_hides_rows_but_not_the_way_through_them():
    graph, generator = graph_of("l2"), np.random.default_rng(2)
    for mask in (generator.random(2400) < 0.3, generator.random((100, 2400)) < 0.3):
        found, truth = query_graph(graph, QUERIES, 10, beam=64, mask=mask), knn(BASE, QUERIES, 10, mask=mask)
        assert np.take_along_axis(np.broadcast_to(mask, (100, 2400)), np.asarray(found.ids), axis=1).all()
        assert recall(found, truth) >= 0.98


@pytest.mark.slow
def test_where_few_rows_pass_the_mask_they_are_compared_exactly():
    graph, generator = graph_of("l2"), np.random.default_rng(3)
    mask = generator.random(2400) < 0.05
    same(query_graph(graph, QUERIES[:8], 10, mask=mask), knn(BASE, QUERIES[:8], 10, mask=mask))
    same(
        query_graph(graph_of("cosine"), QUERIES[:8], 10, mask=mask),
        knn(BASE, QUERIES[:8], 10, metric="cosine", mask=mask),
    )
    each = generator.random((8, 2400)) < np.where(np.arange(8) % 2, 0.05, 0.5)[:, None]
    found = query_graph(graph, QUERIES[:8], 10, mask=each)
    odd = jax.tree.map(lambda array: array[1::2], found)
    same(odd, knn(BASE, QUERIES[1:8:2], 10, mask=each[1::2]))
    even = jax.tree.map(lambda array: array[::2], found)
    same(even, query_graph(graph, QUERIES[:8:2], 10, mask=each[::2]))


def test_a_mask_that_leaves_nothing_finds_nothing():
    found = query_graph(graph_of("l2"), QUERIES[:8], 3, mask=np.zeros(2400, bool))
    assert (np.asarray(found.ids) == -1).all() and np.isinf(found.distances).all()
    inside = jax.jit(partial(query_graph, k=3))(graph_of("l2"), QUERIES[:8], mask=np.zeros(2400, bool))
    assert (np.asarray(inside.ids) == -1).all() and np.isinf(inside.distances).all()


@pytest.mark.parametrize(
    ("n", "metric"),
    [(0, "l2"), (1, "cosine"), (5, "ip"), pytest.param(2, "l2")],
)
@pytest.mark.slow
def test_more_neighbours_than_rows_are_all_rows_and_then_nothing(n, metric):
    graph = build_graph(BASE[:n], metric=metric, degree=4, key=KEY)
    found = query_graph(graph, QUERIES[:3], 7)
    same(found, knn(BASE[:n], QUERIES[:3], 7, metric=metric))
    assert (np.asarray(found.ids[:, n:]) == -1).all()


def test_no_queries_are_no_answers():
    found = query_graph(graph_of("l2"), QUERIES[:0], 3)
    assert found.distances.shape == found.ids.shape == (0, 3)


@pytest.mark.parametrize("metric", ["l2", pytest.param("ip", marks=pytest.mark.slow)])
def test_equal_rows_are_all_found_and_the_lower_ids_come_first(metric):
    base = np.broadcast_to(np.float32([1.0, -2.0, 0.5]), (64, 3))
    found = query_graph(build_graph(base, metric=metric, degree=4, key=KEY), base[:2], 5, beam=64)
    same(found, knn(base, base[:2], 5, metric=metric))
    np.testing.assert_array_equal(found.ids, np.broadcast_to(np.arange(5), (2, 5)))


@pytest.mark.slow
def test_duplicates_of_many_rows_leave_a_search_its_way():
    base = np.repeat(BASE[:60], 40, axis=0)
    found = query_graph(build_graph(base, degree=8, key=KEY), QUERIES[:50], 10)
    assert recall(found, knn(base, QUERIES[:50], 10)) >= 0.98


@pytest.mark.slow
def test_zero_vectors_are_at_distance_one_under_cosine():
    base = BASE[:64].copy()
    base[::4] = 0
    queries = np.concatenate([QUERIES[:3], np.zeros((1, 16), np.float32)])
    found = query_graph(build_graph(base, metric="cosine", degree=8, key=KEY), queries, 64)
    same(found, knn(base, queries, 64, metric="cosine"))
    np.testing.assert_array_equal(np.asarray(found.distances)[-1], 1.0)


@pytest.mark.slow
def test_one_dimension_is_enough():
    base = np.random.default_rng(4).normal(size=(300, 1))
    same(query_graph(build_graph(base, degree=4, key=KEY), base[:5], 4), knn(base, base[:5], 4))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [np.float64, np.float16, np.int8, jnp.bfloat16])
def test_any_real_dtype_strided_or_read_only_is_accepted(dtype):
    base = (10 * BASE[:64]).astype(dtype)[::2]
    base.setflags(write=False)
    graph = build_graph(base, degree=4, key=KEY)
    assert graph.base.dtype == jnp.float32
    same(query_graph(graph, base[:4], 3, beam=32), knn(base, base[:4], 3))


@pytest.mark.slow
@pytest.mark.parametrize("metric", ["ip", *(pytest.param(name, marks=pytest.mark.slow) for name in ("l2", "cosine"))])
def test_new_rows_are_found_like_old_ones_and_the_old_graph_stays(metric):
    old = build_graph(BASE[:1500], metric=metric, degree=16, key=KEY)
    before = jax.tree.map(np.asarray, old)
    graph = extend(old, BASE[1500:], key=KEY)
    jax.tree.map(np.testing.assert_array_equal, old, before)
    assert graph.base.shape == BASE.shape and graph.neighbours.shape == (2400, 16)
    truth = knn(BASE, QUERIES, 10, metric=metric)
    assert recall(query_graph(graph, QUERIES, 10), truth) >= 0.97


@pytest.mark.slow
def test_new_rows_far_from_the_old_ones_are_found_too():
    far = BASE[:300] + np.float32(100)
    graph = extend(build_graph(BASE[:1500], degree=16, key=KEY), far, key=KEY)
    truth = knn(np.concatenate([BASE[:1500], far]), QUERIES + np.float32(100), 10)
    assert recall(query_graph(graph, QUERIES + np.float32(100), 10), truth) >= 0.97


@pytest.mark.slow
def test_extending_by_nothing_by_one_row_and_from_nothing_is_defined():
    graph = build_graph(BASE[:64], degree=4, key=KEY)
    assert extend(graph, BASE[:0], key=KEY) is graph
    one = extend(graph, BASE[:1], key=KEY)
    np.testing.assert_array_equal(query_graph(one, BASE[:3], 5).ids[0, :2], [0, 64])
    grown = extend(build_graph(BASE[:0], degree=4, key=KEY), BASE[:5], key=KEY)
    same(query_graph(grown, QUERIES[:3], 5), knn(BASE[:5], QUERIES[:3], 5))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"k": 0}, ValueError, "k is 0; ask for at least 1"),
        ({"k": 2.0}, TypeError, "k is a float"),
        ({"beam": 0}, ValueError, "beam is 0; give the number of rows to visit"),
        ({"queries": QUERIES[:, :5]}, ValueError, "rows of 16 numbers and queries of 5"),
        ({"queries": QUERIES[0]}, ValueError, "queries has shape"),
        ({"queries": QUERIES.astype(complex)}, TypeError, "queries has dtype complex"),
        ({"queries": np.where(np.arange(100)[:, None] == 7, np.nan, QUERIES)}, ValueError, "row 7 holds a NaN"),
        ({"mask": np.ones(3, bool)}, ValueError, "mask has shape"),
        ({"mask": np.ones(2400)}, TypeError, "mask is float64"),
    ],
)
@pytest.mark.usefixtures("as_users_run")
def test_a_query_that_cannot_be_answered_is_an_error_that_says_why(change, error, message):
    arguments = {"queries": QUERIES, "k": 3, **change}
    with pytest.raises(error, match=message):
        query_graph(graph_of("l2"), **arguments)


def test_visits_are_the_nearest_different_rows_not_yet_visited():
    generator = np.random.default_rng(5)
    n = 50
    ids = generator.integers(0, n, (6, 96)).astype(np.int32)
    keys = (1000 + ids * 7 % 31).astype(np.int32)  # a key for each row, with ties between rows
    keys[generator.random(ids.shape) < 0.2] = _beam.NONE
    picks = np.asarray(_beam._picks(jnp.asarray(keys), jnp.asarray(ids), n))
    for own, own_keys, own_ids in zip(picks, keys, ids, strict=True):
        # The minima of the stripes, taken once each.
        stripes = [min((key, i) for key, i in zip(own_keys[s::32], own_ids[s::32], strict=True)) for s in range(32)]
        order = sorted({pair for pair in stripes if pair[0] < _beam.VISITED})
        np.testing.assert_array_equal(own, [i for _, i in order][: _beam.WIDTH])


def test_a_cut_keeps_the_nearest_rows_once_with_their_visits():
    ids = jnp.asarray([[4, 2, 4, 7, 9, 2, 10, 10]], jnp.int32)
    keys = jnp.asarray([[50, 30 | _beam.VISITED, 50, 70, 10, _beam.NONE, _beam.NONE, _beam.NONE]], jnp.int32)
    kept_keys, kept_ids = _beam._cut(keys, ids, None, (3, 0), 5, 10)
    np.testing.assert_array_equal(kept_ids[0, :3], [9, 2, 4])
    np.testing.assert_array_equal(kept_keys[0], [10, 30 | _beam.VISITED, 50, _beam.NONE, _beam.NONE])
    mask = jnp.asarray([False] * 7 + [True] * 3)
    kept_keys, kept_ids = _beam._cut(keys, ids, mask, (1, 2), 4, 10)
    np.testing.assert_array_equal(kept_ids[0, :3], [9, 9, 7])
    np.testing.assert_array_equal(kept_keys[0], [10, 10, 70, _beam.NONE])
