"""Building a search graph: every step against a naive one, determinism, connectivity, memory, and bad input."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from theorykit.search import _nn_descent, _optimise, _resources, _transform
from theorykit.search.exact import knn_graph
from theorykit.search.graph import build_graph, extend, query_graph

KEY = jax.random.key(0)
GENERATOR = np.random.default_rng(0)
# A surface in 12 dimensions, of few rows; n is a multiple of every degree in use.
ROWS = np.tanh(GENERATOR.normal(size=(1536, 3)) @ GENERATOR.normal(size=(3, 12))).astype(np.float32)


def descend(rows, k, key=KEY, exact=False):
    return np.asarray(_nn_descent.nearest_lists(jnp.asarray(rows), k, key, exact=exact, tell=lambda what: None))


def share(lists, truth):
    """Part of the true neighbours that the lists hold."""
    return np.mean([len(np.intersect1d(own, true)) / len(true) for own, true in zip(lists, truth, strict=True)])


def random_lists(n, k, missing=0.0):
    """Different rows for each row, itself excluded, n at the end for none."""
    lists = np.array([GENERATOR.permutation(np.delete(np.arange(n), i))[:k] for i in range(n)], np.int32)
    lists[np.sort(GENERATOR.random(lists.shape) < missing, axis=1)] = n
    return lists


@pytest.fixture
def small_leaves(monkeypatch):
    """Trees of several levels and blocks that do not divide the rows, at a size that is quick."""
    monkeypatch.setattr(_nn_descent, "LEAF", 64)
    monkeypatch.setattr(_nn_descent, "BLOCK", 640)
    jax.clear_caches()
    yield
    jax.clear_caches()


@pytest.mark.slow
@pytest.mark.usefixtures("small_leaves")
def test_nn_descent_finds_the_neighbours_that_exact_search_finds():
    for n in (1536, 1025):  # a multiple of the leaf and of the degree, and neither
        truth = np.asarray(knn_graph(ROWS[:n], 16).ids)
        lists = descend(ROWS[:n], 16)
        assert lists.shape == (n, 16) and (lists != np.arange(n)[:, None]).all() and (lists < n).all()
        assert all(len(set(own)) == 16 for own in lists)
        assert share(lists, truth) >= 0.95
    again = descend(ROWS[:n], 16)
    np.testing.assert_array_equal(again, lists)
    assert (descend(ROWS[:n], 16, jax.random.key(1)) != lists).any()


@pytest.mark.slow
@pytest.mark.usefixtures("small_leaves")
def test_nn_descent_of_equal_rows_gives_lists_without_repetition():
    lists = descend(np.ones((300, 4), np.float32), 8)
    assert all(len(set(own)) == 8 for own in lists) and (lists < 300).all()
    assert (lists != np.arange(300)[:, None]).all()


def test_leaves_of_a_tree_are_full_and_hold_every_row_once():
    for n in (64, 100):
        order = np.asarray(_nn_descent._tree(jnp.asarray(ROWS[:n]), KEY, leaves=8))
        assert len(order) % 8 == 0 and len(order) - n < 8
        np.testing.assert_array_equal(np.sort(order), np.arange(len(order)))
    # Rows on a line: a leaf is an interval of it.
    order = np.asarray(_nn_descent._tree(jnp.asarray(ROWS[:64, :1]), KEY, leaves=8)).reshape(8, 8)
    ends = sorted((ROWS[leaf, 0].min(), ROWS[leaf, 0].max()) for leaf in order)
    assert all(one[1] <= two[0] for one, two in itertools.pairwise(ends))


def test_reverse_lists_hold_those_that_hold_a_row_by_rank_and_number():
    lists = random_lists(40, 6, missing=0.2)
    found = np.asarray(_nn_descent.reverse_lists(jnp.asarray(lists), 5))
    for row in range(40):
        wanted = sorted((rank, source) for source, rank in zip(*np.nonzero(lists == row), strict=True))
        wanted = [source for _, source in wanted][:5]
        np.testing.assert_array_equal(found[row], wanted + [40] * (5 - len(wanted)))


@pytest.mark.parametrize("missing", [0.0, 0.3])
def test_pruning_keeps_the_edges_with_the_fewest_detours(missing):
    n, k, degree = 40, 9, 5
    lists = random_lists(n, k, missing)
    found = np.asarray(_optimise.prune(jnp.asarray(lists), jnp.asarray(lists), degree))
    for row, own in enumerate(lists):
        order = []
        for rank, target in enumerate(own):
            detours = sum(target in lists[between] for between in own[:rank] if between < n)
            order.append((target == n, detours, rank))
        wanted = [own[i] for i in sorted(range(k), key=order.__getitem__)[:degree]]
        np.testing.assert_array_equal(found[row], wanted)


def test_merging_keeps_the_better_half_then_reverse_edges_then_the_rest():
    n = 40
    for degree in (5, 6):
        edges, back = random_lists(n, degree, 0.2), random_lists(n, 4, 0.4)
        found = np.asarray(_optimise.merge_reverse(jnp.asarray(edges), jnp.asarray(back)))
        half = (degree + 1) // 2
        for own, reverse, result in zip(edges, back, found, strict=True):
            wanted = []
            for target in (*own[:half], *reverse, *own[half:]):
                if target < n and target not in wanted:
                    wanted.append(target)
            wanted = wanted[:degree]
            np.testing.assert_array_equal(result, wanted + [n] * (degree - len(wanted)))


def reached(edges, entries):
    """Naive: rows that a path leads to."""
    known, new = set(entries), list(entries)
    while new:
        for target in edges[new.pop()]:
            if target < len(edges) and target not in known:
                known.add(target)
                new.append(target)
    return known


@pytest.mark.parametrize("entry_points", [2, 64])
def test_every_row_is_connected_and_the_unreachable_ones_were_counted(entry_points):
    # Edges only to lower numbers: from the first rows no path leads up.
    lists = np.minimum(GENERATOR.integers(0, 400, (400, 6)), np.arange(400)[:, None]).astype(np.int32)
    lists[:3] = 400
    entries = np.arange(entry_points, dtype=np.int32)
    before = reached(lists, entries)
    np.testing.assert_array_equal(
        np.flatnonzero(_optimise.reachable(jnp.asarray(lists), jnp.asarray(entries))), sorted(before)
    )
    found = _optimise.connect(jnp.asarray(lists), jnp.asarray(entries))
    assert found.unreachable == 400 - len(before)
    assert len(reached(np.asarray(found.edges), np.asarray(found.entries))) == 400
    np.testing.assert_array_equal(found.edges[:, :3], lists[:, :3])
    np.testing.assert_array_equal(found.entries[:entry_points], entries)


def test_a_connected_graph_is_left_as_it_is():
    ring = np.stack([(np.arange(20) + 1) % 20, np.full(20, 20)], axis=1).astype(np.int32)
    found = _optimise.connect(jnp.asarray(ring), jnp.asarray([3], jnp.int32))
    np.testing.assert_array_equal(found.edges, ring)
    assert found.unreachable == 0 and found.entries.tolist() == [3]


def test_euclidean_rows_have_the_order_of_the_metric():
    rows, query = ROWS[:50], GENERATOR.normal(size=12)
    for metric, wanted in (("l2", np.sum((rows - query) ** 2, 1)), ("ip", -rows @ query)):
        turned = np.asarray(_transform.euclidean(jnp.asarray(rows), metric), np.float64)
        shifted = query - rows.mean(axis=0) if metric == "l2" else np.append(query, 0.0)
        np.testing.assert_array_equal(np.argsort(np.sum((turned - shifted) ** 2, 1)), np.argsort(wanted))
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    unit[7] = 0
    turned = np.asarray(_transform.euclidean(jnp.asarray(unit), "cosine"))
    # Half the squared distance is 1 - cos, and 1 where one of two is zero.
    np.testing.assert_allclose(
        0.5 * np.sum((turned[7] - turned) ** 2, 1), np.where(np.arange(50) == 7, 0, 1), atol=1e-6
    )


def test_codes_are_within_half_a_step_of_the_rows():
    rows = np.concatenate([ROWS, np.full((1536, 1), 3.0, np.float32)], axis=1)  # one coordinate is constant
    codes = _transform.encode(jnp.asarray(rows), "l2", "int8")
    steps = (rows.max(axis=0) - rows.min(axis=0)) / 254
    error = np.abs(np.asarray(codes.centre) + np.asarray(codes.codes, np.float32) * steps - rows)
    assert (error <= 0.5 * steps + 1e-6).all()
    assert float(codes.steps.max()) == 1.0 and float(codes.steps[-1]) == 0.0


@pytest.mark.slow
@pytest.mark.usefixtures("small_leaves")
def test_a_build_follows_from_the_key_and_shows_no_progress_unless_asked(capsys):
    graphs = [build_graph(ROWS, degree=8, key=jax.random.key(seed), exact=False) for seed in (0, 0, 1)]
    jax.tree.map(np.testing.assert_array_equal, graphs[0], graphs[1])
    assert (np.asarray(graphs[0].neighbours) != np.asarray(graphs[2].neighbours)).any()
    assert capsys.readouterr().err == ""
    build_graph(ROWS, degree=8, key=KEY, exact=False, progress=True)
    shown = capsys.readouterr().err
    assert "building a search graph" in shown
    edges, n = np.asarray(graphs[0].neighbours), len(ROWS)
    assert edges.shape == (n, 8) and (edges != np.arange(n)[:, None]).all()
    assert all(len(set(own[own < n])) == np.sum(own < n) for own in edges)
    truth = knn_graph(ROWS, 10).ids
    found = query_graph(graphs[0], ROWS, 11).ids  # itself and ten more
    assert share(np.asarray(found)[:, 1:], np.asarray(truth)) >= 0.95


@pytest.mark.slow
def test_a_build_that_cannot_fit_is_refused_with_numbers():
    with pytest.raises(
        MemoryError, match=r"1,536 rows of dimension 12 with degree 8 need about 0\.00 GiB and 0\.00 GiB"
    ):
        build_graph(ROWS, degree=8, key=KEY, memory=1000)
    with pytest.raises(MemoryError, match=r"extend: 1,546 rows"):
        extend(build_graph(ROWS, degree=8, key=KEY), ROWS[:10], key=KEY, memory=1000)
    assert _resources.build_bytes(10**6, 128, 32, 32) < 6 * 2**30
    assert _resources.free_bytes() is None or _resources.free_bytes() > 0


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"metric": "l1"}, ValueError, "metric is 'l1'; the metrics are"),
        ({"degree": 1}, ValueError, "degree is 1; a search graph needs at least 2"),
        ({"degree": 8.0}, TypeError, "degree is a float"),
        ({"storage": "int4"}, ValueError, "storage is 'int4'"),
        ({"key": 0}, TypeError, "key is 0; pass one key"),
        ({"base": ROWS[0]}, ValueError, r"base has shape \(12,\)"),
        ({"base": ROWS > 0}, TypeError, "base has dtype bool"),
        ({"base": np.where(np.arange(1536)[:, None] == 5, np.inf, ROWS)}, ValueError, "row 5 holds a NaN, an infinity"),
        ({"base": ROWS * np.float32(1e30)}, ValueError, "overflow"),
    ],
)
@pytest.mark.usefixtures("as_users_run")
def test_a_build_that_makes_no_sense_is_an_error_that_says_why(change, error, message):
    arguments = {"base": ROWS, "key": KEY, **change}
    with pytest.raises(error, match=message):
        build_graph(arguments.pop("base"), **arguments)


@pytest.mark.usefixtures("as_users_run")
def test_rows_of_another_dimension_and_builds_inside_jit_are_refused():
    with pytest.raises(ValueError, match="rows of 12 numbers and queries of 5"):
        extend(build_graph(ROWS[:20], degree=4, key=KEY), ROWS[:5, :5], key=KEY)
    with pytest.raises(ValueError, match=r"built outside jax\.jit"):
        jax.jit(lambda rows: build_graph(rows, key=KEY))(ROWS)


@pytest.mark.slow
@pytest.mark.usefixtures("small_leaves")
def test_in_float64_a_graph_and_its_answers_are_the_same():
    built = build_graph(ROWS, degree=8, key=KEY, exact=False)
    found = query_graph(built, ROWS[:8], 3)
    with jax.enable_x64(True):
        again = build_graph(ROWS, degree=8, key=jax.random.key(0), exact=False)
        np.testing.assert_array_equal(again.neighbours, built.neighbours)
        jax.tree.map(np.testing.assert_array_equal, query_graph(again, ROWS[:8].astype(np.float64), 3), found)
        assert extend(again, ROWS[:5], key=jax.random.key(1)).base.dtype == jnp.float32
