"""Probes, retrieval, alignment and uniformity against scikit-learn, naive loops and closed forms; ties; bad input."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression, RidgeClassifier
from sklearn.neighbors import KNeighborsClassifier

from theorykit import data, evaluate
from theorykit.evaluate import accuracy, alignment, knn_probe, linear_probe, recall_at, scores, uniformity
from theorykit.similarity import cosine, dot


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


@pytest.fixture(scope="module")
def digits():
    images, labels = data.digits()
    return jnp.asarray(images[:400]), jnp.asarray(labels[:400])


# ---------------------------------------------------------------- linear probe


@pytest.mark.slow
@pytest.mark.parametrize("penalty", [1e-1, 1e-3])
def test_logistic_probe_has_the_weights_of_scikit_learn(digits, penalty):
    x, labels = digits
    probe = linear_probe(x, labels, penalty=penalty)
    peer = LogisticRegression(C=1 / (len(x) * penalty), tol=1e-8, max_iter=5000)
    peer.fit(np.asarray(x, np.float64), labels)
    assert probe.status == "converged"
    # The loss is strongly convex: each is off by its gradient, 1e-8 where both stop, over the penalty. Ours is rounded
    # to float32 besides.
    np.testing.assert_allclose(probe.weights.T, peer.coef_, rtol=1e-6, atol=2 * 1.5e-8 / penalty)


@pytest.mark.slow
@pytest.mark.parametrize("penalty", [1e-2, 1e-5])
def test_logistic_probe_is_stationary(digits, penalty):
    x, labels = digits
    probe = linear_probe(x, labels, penalty=penalty)

    def gradients(w, b):
        logits = np.asarray(x, np.float64) @ w + b
        p = np.exp(logits - logits.max(1, keepdims=True))
        residual = p / p.sum(1, keepdims=True) - np.eye(10)[labels]
        return np.asarray(x, np.float64).T @ residual / len(x) + penalty * w, residual.mean(0)

    w, b = (np.asarray(a, np.float64) for a in (probe.weights, probe.offset))
    # Results are rounded to float32: the Hessian, at most |x|^2 / 2, turns that into a gradient.
    rounding = np.finfo(np.float32).eps * np.linalg.norm(w) * np.mean(np.sum(np.asarray(x) ** 2, 1))
    assert probe.status == "converged"
    assert max(np.linalg.norm(g) for g in gradients(w, b)) < rounding


@pytest.mark.slow
def test_logistic_probe_does_not_mind_the_scale_of_columns():
    # Columns over six orders of magnitude, with a penalty that hardly counts: predictions are those of unit columns.
    x, labels = normal(0, 120, 4), jnp.arange(120) % 3
    x = x + jax.nn.one_hot(labels, 4)
    scales = jnp.array([1e-3, 1.0, 1e3, 1.0])
    plain, scaled = (linear_probe(v, labels, penalty=1e-12) for v in (x, x * scales[None]))
    assert plain.status == scaled.status == "converged"
    np.testing.assert_allclose(scores(scaled, x * scales[None]), scores(plain, x), atol=1e-3)


@pytest.mark.parametrize("rows", [400, 40])
def test_ridge_probe_predicts_as_scikit_learn(digits, rows):
    x, labels = digits[0][:rows], digits[1][:rows]
    probe = linear_probe(x, labels, penalty=1e-2, method="ridge")
    peer = RidgeClassifier(alpha=rows * 1e-2).fit(np.asarray(x, np.float64), labels)
    # The peer codes a class as +1 and the others as -1, which doubles all scores and lowers them by 1.
    expected = (peer.decision_function(np.asarray(digits[0])) + 1) / 2
    np.testing.assert_allclose(scores(probe, digits[0]), expected, atol=2e-5)


def test_ridge_probe_without_penalty_interpolates_with_the_least_weights(x64):
    x, labels = normal(1, 12, 30).astype(jnp.float64), jnp.arange(12) % 2
    probe = linear_probe(x, labels, penalty=0, method="ridge")
    targets = np.eye(2)[labels]
    np.testing.assert_allclose(scores(probe, x), targets, atol=1e-12)
    centred = np.asarray(x) - np.mean(np.asarray(x), axis=0)
    np.testing.assert_allclose(probe.weights, np.linalg.pinv(centred) @ (targets - targets.mean(0)), atol=1e-12)


@pytest.mark.parametrize("method", ["logistic", "ridge"])
def test_constant_columns_get_no_weight(method):
    x = jnp.concatenate([normal(2, 120, 3), jnp.full((120, 1), 7.0)], axis=1)
    probe = linear_probe(x, jnp.arange(120) % 3, penalty=1e-3, method=method)
    assert np.all(np.abs(probe.weights[3]) < 1e-6)
    assert probe.status == "converged"


def test_a_probe_that_ran_out_of_steps_says_so(monkeypatch):
    from theorykit import _linear_probe

    monkeypatch.setattr(_linear_probe, "_MOST_STEPS", 3)
    probe = linear_probe(normal(3, 20, 2), jnp.arange(20) % 2, penalty=1e-4)
    _linear_probe._logistic.clear_cache()
    assert probe.status == "not converged"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"penalty": 0.0}, "grow for ever"),
        ({"penalty": -1.0, "method": "ridge"}, "penalty is -1"),
        ({"penalty": math.nan}, "penalty is nan"),
        ({"method": "svm"}, "choose from logistic, ridge"),
        ({"labels": jnp.zeros(6, int)}, "two classes or more"),
        ({"labels": jnp.array([0, 0, 0, 2, 2, 2])}, "none empty"),
        ({"labels": jnp.array([0, 1, 0, 1, 0, -1])}, "one class 0, 1"),
        ({"x": jnp.full((6, 2), jnp.inf)}, "row 0 of x is not finite"),
        ({"x": jnp.zeros((6, 0))}, "not empty"),
    ],
)
def test_linear_probe_refuses(change, message, as_users_run):
    arguments = {"x": normal(0, 6, 2), "labels": jnp.arange(6) % 2, "penalty": 0.1} | change
    with pytest.raises(ValueError, match=message):
        linear_probe(arguments.pop("x"), arguments.pop("labels"), **arguments)


# ---------------------------------------------------------------- neighbours and accuracy


@pytest.mark.parametrize("k", [1, 5, 20])
def test_knn_votes_are_those_of_scikit_learn(digits, k):
    x, labels = digits
    votes = knn_probe(x[:300], labels[:300], x[300:], k)
    peer = KNeighborsClassifier(k, metric="cosine", algorithm="brute").fit(x[:300], labels[:300])
    np.testing.assert_allclose(votes / k, peer.predict_proba(x[300:]), atol=1e-6)


def test_neighbours_that_tie_for_the_last_place_share_it():
    # Similarities to the query (1, 0): 2, then three times 1, then 0. Two places are left for the three that tie.
    x = jnp.array([[2.0, 0.0], [1.0, 3.0], [1.0, -5.0], [1.0, 0.0], [0.0, 1.0]])
    votes = knn_probe(x, jnp.array([0, 1, 1, 2, 3]), jnp.array([[1.0, 0.0]]), 3, similarity=dot)
    np.testing.assert_allclose(votes, [[1.0, 4 / 3, 2 / 3, 0.0]], rtol=1e-6)


def test_votes_do_not_depend_on_the_order_of_rows(digits):
    x, labels = (jnp.concatenate([a[:50], a[:50]]) for a in digits)  # every row twice: ties everywhere
    order = jax.random.permutation(jax.random.key(0), 100)
    votes = knn_probe(x, labels, digits[0][50:90], 3)
    np.testing.assert_allclose(knn_probe(x[order], labels[order], digits[0][50:90], 3), votes, atol=1e-5)
    np.testing.assert_allclose(jnp.sum(votes, axis=1), 3, rtol=1e-6)


def test_accuracy_of_tied_scores_is_that_of_a_random_choice():
    table = jnp.array([[1.0, 1.0, 0.0], [0.0, 2.0, 1.0], [3.0, 3.0, 3.0], [1.0, 0.0, 0.0]])
    assert accuracy(table, jnp.array([0, 1, 2, 1])) == pytest.approx((1 / 2 + 1 + 1 / 3 + 0) / 4)


def test_accuracy_of_undefined_scores_is_undefined():
    assert np.isnan(accuracy(jnp.array([[1.0, 0.0], [jnp.nan, 0.0]]), jnp.array([0, 0])))


@pytest.mark.parametrize("k", [0, 5, True, 1.0])
def test_a_number_of_neighbours_out_of_range_is_refused(k, as_users_run):
    with pytest.raises(ValueError, match="whole number from 1 to 4"):
        knn_probe(normal(0, 4, 2), jnp.arange(4) % 2, normal(1, 3, 2), k)


def test_probes_refuse_arrays_that_do_not_fit(as_users_run):
    x, labels = normal(0, 4, 2), jnp.arange(4) % 2
    with pytest.raises(ValueError, match="embed both alike"):
        knn_probe(x, labels, normal(1, 3, 5), 1)
    with pytest.raises(TypeError, match="cast one of them"):
        knn_probe(x, labels, x.astype(jnp.bfloat16), 1)
    with pytest.raises(ValueError, match="each of 4 rows"):
        knn_probe(x, labels[:3], x, 1)
    with pytest.raises(TypeError, match="whole numbers"):
        knn_probe(x, labels.astype(jnp.float32), x, 1)
    with pytest.raises(TypeError, match=r"outside jax\.jit"):
        jax.jit(lambda labels: accuracy(x, labels))(labels)
    with pytest.raises(ValueError, match="beyond the 2 classes"):
        accuracy(x, jnp.array([0, 1, 2, 0]))
    with pytest.raises(ValueError, match="scores have shape"):
        accuracy(jnp.zeros((0, 3)), jnp.zeros(0, int))


# ---------------------------------------------------------------- retrieval


def naive_recall(za, zb, k, similarity):
    """Expectation over the order of ties, one anchor at a time; ties are equal scores."""
    total = 0.0
    for i, a in enumerate(za):
        row = [float(similarity(a, b)) for b in zb]
        above, tied = sum(s > row[i] for s in row), sum(s == row[i] for s in row)
        total += sum(place < k for place in range(above, above + tied)) / tied
    return total / len(za)


# Small whole numbers have exact dot products, and many of them tie.
grid = st.lists(st.lists(st.integers(-2, 2), min_size=2, max_size=2), min_size=6, max_size=6)


@settings(max_examples=40, deadline=None)
@given(st.tuples(grid, grid))
def test_recall_is_the_naive_expectation_over_ties(views):
    za, zb = (jnp.asarray(v, jnp.float32) for v in views)
    ks = tuple(range(1, len(za) + 1))
    expected = [naive_recall(np.asarray(za), np.asarray(zb), k, lambda a, b: a @ b) for k in ks]
    np.testing.assert_allclose(recall_at(za, zb, ks, similarity=dot), expected, atol=1e-6)


def test_recall_without_ties_counts_sorted_candidates():
    za, zb = normal(0, 200, 6), normal(0, 200, 6) + normal(1, 200, 6)
    table = np.asarray(za, np.float64) @ np.asarray(zb, np.float64).T
    table /= np.linalg.norm(za, axis=1)[:, None] * np.linalg.norm(zb, axis=1)[None]
    found = np.argsort(-table, axis=1)
    for k in (1, 5, 50):
        expected = np.mean([i in found[i, :k] for i in range(200)])
        assert recall_at(za, zb, k) == pytest.approx(expected)


def test_recall_under_any_similarity_agrees_with_the_naive_loop():
    za, zb = normal(0, 30, 3), normal(0, 30, 3) + normal(1, 30, 3)

    def near(a, b):
        return -jnp.sum((a - b) ** 2)

    expected = naive_recall(za, zb, 2, near)
    assert recall_at(za, zb, 2, similarity=near) == pytest.approx(expected)


@pytest.mark.parametrize("n", [7, 200])
def test_collapsed_embeddings_retrieve_at_chance(n):
    z = jnp.broadcast_to(normal(0, 1, 33), (n, 33))
    assert recall_at(z, z, 3) == pytest.approx(3 / n)
    # Also where the collapse is complete only up to rounding.
    wobble = jnp.where(jnp.arange(n)[:, None] % 2, jnp.float32(1 + 2**-23), jnp.float32(1))
    assert recall_at(z, z * wobble, 3) == pytest.approx(3 / n)


def test_recall_of_unrelated_views_is_chance():
    found = [recall_at(normal(2 * s, 200, 8), normal(2 * s + 1, 200, 8), 5) for s in range(20)]
    # 4000 draws with probability 1/40: five standard errors.
    assert np.mean(found) == pytest.approx(1 / 40, abs=5 * math.sqrt(1 / 40 / 4000))


def test_recall_rises_with_k_to_one():
    found = recall_at(normal(0, 50, 4), normal(1, 50, 4), (1, 2, 5, 10, 50))
    assert all(a <= b for a, b in itertools.pairwise(found.tolist()))
    assert found[-1] == 1


def test_recall_does_not_depend_on_a_rotation_or_on_the_block_size(monkeypatch):
    za, zb = normal(0, 60, 5), normal(0, 60, 5) + normal(1, 60, 5)
    whole = recall_at(za, zb, (1, 3, 9))
    rotation = jnp.linalg.qr(normal(2, 5, 5))[0]
    np.testing.assert_allclose(recall_at(za @ rotation, zb @ rotation, (1, 3, 9)), whole)
    monkeypatch.setattr(evaluate, "_BLOCK", 60 * 7)  # seven rows at once, and a remainder of four
    evaluate._ranks.clear_cache()
    np.testing.assert_allclose(recall_at(za, zb, (1, 3, 9)), whole)
    evaluate._ranks.clear_cache()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32, jnp.float64])
def test_recall_of_every_dtype_is_that_of_its_values(dtype, x64):
    za, zb = normal(0, 40, 4).astype(dtype), normal(1, 40, 4).astype(dtype)
    expected = recall_at(za.astype(jnp.float64), zb.astype(jnp.float64), 3)
    assert recall_at(za, zb, 3) == pytest.approx(float(expected), abs=1e-6)


def test_recall_inside_jit_of_embeddings_that_diverged_is_undefined():
    z = normal(0, 5, 3)
    found = jax.jit(lambda a, b: recall_at(a, b, 1))
    assert found(z, z) == 1
    assert np.isnan(found(z, z.at[2, 1].set(jnp.nan)))
    assert np.isnan(jax.jit(lambda a: recall_at(a, a, 1, similarity=dot))(z * 1e30))


def test_recall_refuses(as_users_run):
    z = normal(0, 5, 3)
    with pytest.raises(ValueError, match="row i of both"):
        recall_at(z, z[:4], 1)
    with pytest.raises(ValueError, match="whole number from 1 to 5"):
        recall_at(z, z, (1, 6))
    with pytest.raises(ValueError, match="row 2 of zb is not finite"):
        recall_at(z, z.at[2, 0].set(jnp.inf), 1)
    with pytest.raises(TypeError, match="pass a JAX array"):
        recall_at(np.asarray(z), z, 1)


# ---------------------------------------------------------------- alignment and uniformity


def naive_uniformity(z, t):
    u = [[v / math.sqrt(sum(w * w for w in row)) for v in row] for row in np.asarray(z, np.float64).tolist()]
    pairs = itertools.combinations(u, 2)
    kernel = [math.exp(-t * sum((a - b) ** 2 for a, b in zip(x, y, strict=True))) for x, y in pairs]
    return math.log(math.fsum(kernel) / len(kernel))


@pytest.mark.parametrize("t", [0.5, 2, 30.0])
def test_uniformity_is_the_naive_mean_over_pairs(t):
    z = normal(0, 23, 4)
    assert uniformity(z, t=t) == pytest.approx(naive_uniformity(z, t), rel=1e-5)


@pytest.mark.slow
def test_uniformity_between_its_limits():
    point = jnp.broadcast_to(normal(0, 1, 5), (9, 5))
    assert uniformity(point) == pytest.approx(0, abs=1e-5)
    poles = jnp.array([[0.0, 2.0], [0.0, -3.0]])
    assert uniformity(poles, t=100) == pytest.approx(-400)  # e^-400 is no float32
    # Uniform on the circle: E exp(-2 t (1 - cos)) = e^(-2t) I_0(2t).
    angles = jnp.linspace(0, 2 * jnp.pi, 400, endpoint=False)
    circle = jnp.stack([jnp.cos(angles), jnp.sin(angles)], axis=1)
    # The pairs i = j, one in 400, are left out of the mean.
    expected = (400 * float(jax.scipy.special.i0e(4.0)) - 1) / 399
    assert uniformity(circle) == pytest.approx(math.log(expected), rel=1e-5)


def test_alignment_is_the_naive_mean():
    za, zb = normal(0, 11, 4), normal(1, 11, 4)
    u, v = (np.asarray(z) / np.linalg.norm(z, axis=1)[:, None] for z in (za, zb))
    assert alignment(za, zb) == pytest.approx(np.mean(np.sum((u - v) ** 2, 1)), rel=1e-6)
    assert alignment(za, 3 * za) == pytest.approx(0, abs=1e-12)
    assert alignment(za, -za) == pytest.approx(4, rel=1e-6)


def test_alignment_and_cosine_say_the_same():
    za, zb = normal(0, 11, 4), normal(1, 11, 4)
    assert alignment(za, zb) == pytest.approx(2 - 2 * float(jnp.mean(cosine(za, zb))), rel=1e-5)


def test_alignment_and_uniformity_are_differentiable():
    z = normal(0, 6, 3)
    slope = jax.grad(lambda a: alignment(a, z) + uniformity(a))(normal(1, 6, 3))
    assert np.all(np.isfinite(slope)) and np.any(slope != 0)


def test_alignment_and_uniformity_refuse():
    z = normal(0, 5, 3)
    with pytest.raises(ValueError, match="row 3 of zb is zero"):
        alignment(z, z.at[3].set(0.0))
    with pytest.raises(ValueError, match="two rows or more"):
        uniformity(z[:1])
    with pytest.raises(ValueError, match="finite t > 0"):
        uniformity(z, t=0)
