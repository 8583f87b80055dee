"""Losses against naive loops, finite differences, closed forms, invariances and limits; stability; bad input."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from theorykit import losses
from theorykit.losses import LOSSES, barlow_twins, clip, info_nce, linear, logistic, nt_xent, spectral, vicreg
from theorykit.similarity import cosine, dot

# ---------------------------------------------------------------- naive definitions: Python numbers, double loops


def s_dot(a, b):
    return math.fsum(x * y for x, y in zip(a, b, strict=True))


def s_cosine(a, b):
    return s_dot(a, b) / math.sqrt(s_dot(a, a) * s_dot(b, b))


def naive_linear(za, zp, zn, s=s_dot):
    return sum(sum(s(a, x) for x in xs) / len(xs) - s(a, p) for a, p, xs in zip(za, zp, zn, strict=True)) / len(za)


def naive_logistic(za, zb, s=s_dot, tau=1.0):
    n, total = len(za), 0.0
    for i in range(n):
        for j in range(n):
            score = s(za[i], zb[j]) / tau
            total += math.log1p(math.exp(-score)) / n if i == j else math.log1p(math.exp(score)) / (n * (n - 1))
    return total


def naive_info_nce(za, zb, s=s_cosine, tau=1.0, negatives=()):
    total, candidates = 0.0, [*zb, *negatives]
    for i, a in enumerate(za):
        weights = [math.exp(s(a, c) / tau) for c in candidates]
        total -= math.log(weights[i] / math.fsum(weights)) / len(za)
    return total


def naive_nt_xent(za, zb, s=s_cosine, tau=1.0, negatives=()):
    n, views, total = len(za), [*za, *zb, *negatives], 0.0
    for i in range(2 * n):
        weights = [math.exp(s(views[i], v) / tau) for v in views]
        total -= math.log(weights[(i + n) % (2 * n)] / math.fsum(w for j, w in enumerate(weights) if j != i)) / (2 * n)
    return total


def naive_clip(za, zb, s=s_cosine, tau=1.0):
    return (naive_info_nce(za, zb, s, tau) + naive_info_nce(zb, za, s, tau)) / 2


def naive_spectral(za, zb, s=s_dot):
    n = len(za)
    attraction = sum(s(za[i], zb[i]) for i in range(n)) / n
    return sum(s(a, b) ** 2 for a in za for b in zb) / n**2 - 2 * attraction


def centred_columns(x):
    columns = [[row[j] for row in x] for j in range(len(x[0]))]
    return [[v - math.fsum(c) / len(c) for v in c] for c in columns]


def naive_barlow_twins(za, zb, redundancy=5e-3):
    total, b = 0.0, centred_columns(zb)
    for i, u in enumerate(centred_columns(za)):
        for j, v in enumerate(b):
            total += (1 - s_cosine(u, v)) ** 2 if i == j else redundancy * s_cosine(u, v) ** 2
    return total


def naive_vicreg(za, zb, invariance=25.0, variance=25.0, covariance=1.0):
    n, z = len(za), len(za[0])
    total = invariance * sum((x - y) ** 2 for a, b in zip(za, zb, strict=True) for x, y in zip(a, b, strict=True)) / n
    for columns in (centred_columns(za), centred_columns(zb)):
        for i, u in enumerate(columns):
            for j, v in enumerate(columns):
                sigma = s_dot(u, v) / (n - 1)
                if i == j:
                    total += variance * max(0.0, 1.0 - math.sqrt(sigma + 1e-4)) / z
                else:
                    total += covariance * sigma**2 / z
    return total


SIMILARITY = {"dot": (dot, s_dot), "cosine": (cosine, s_cosine)}
NAIVE = {"logistic": naive_logistic, "info_nce": naive_info_nce, "nt_xent": naive_nt_xent, "clip": naive_clip}


def scored(loss, naive, s, with_temperature=True):
    """A loss and its naive form as functions of (za, zb, temperature), under one similarity."""
    if with_temperature:
        return lambda a, b, tau: loss(a, b, similarity=s[0], temperature=tau), lambda a, b, tau: naive(a, b, s[1], tau)
    return lambda a, b, tau: loss(a, b, similarity=s[0]), lambda a, b, tau: naive(a, b, s[1])


# Every loss of two views, with dot and with cosine where it has a similarity.
TWO_VIEWS = {f"{k}-{s}": scored(LOSSES[k], f, pair) for k, f in NAIVE.items() for s, pair in SIMILARITY.items()}
TWO_VIEWS |= {f"spectral-{s}": scored(spectral, naive_spectral, pair, False) for s, pair in SIMILARITY.items()}
TWO_VIEWS |= {
    "barlow_twins": (lambda a, b, tau: barlow_twins(a, b), lambda a, b, tau: naive_barlow_twins(a, b)),
    "vicreg": (lambda a, b, tau: vicreg(a, b), lambda a, b, tau: naive_vicreg(a, b)),
}
SCORES = [name for name in TWO_VIEWS if "-" in name]


def with_queue(loss, s):
    return lambda a, b, c, tau: loss(a, b, similarity=s[0], temperature=tau, negatives=c)


# Every loss that takes negatives beside the two views, as functions of (za, zb, negatives, temperature).
BESIDE = {f"linear-{k}": lambda a, b, c, tau, s=s: linear(a, b, c, similarity=s[0]) for k, s in SIMILARITY.items()}
BESIDE |= {f"{f.__name__}-queue-{k}": with_queue(f, s) for f in (info_nce, nt_xent) for k, s in SIMILARITY.items()}
every_loss = pytest.mark.parametrize("name", TWO_VIEWS)
N, Z = 5, 3  # one shape for most tests, so that each loss is compiled once


@functools.cache
def compiled(name):
    """(za, zb, temperature) -> (loss, (gradient a, gradient b)); compiled once per dtype and shape."""
    if name in BESIDE:
        return jax.jit(jax.value_and_grad(BESIDE[name], (0, 1, 2)))
    return jax.jit(jax.value_and_grad(TWO_VIEWS[name][0], (0, 1)))


def evaluate(name, za, zb, tau=0.7, beside=()):  # a temperature other than 1, so that a forgotten one shows
    return compiled(name)(za, zb, *beside, jnp.asarray(tau, za.dtype))


def rows(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape)


def views(seed=0, n=N, z=Z, dtype=None):
    """Two correlated views, in the widest enabled dtype; their deviations lie on both sides of VICReg's hinge."""
    a = 0.6 * rows(seed, n, z) * np.linspace(0.5, 3.0, z)
    return jnp.asarray(a, dtype), jnp.asarray(a + 0.3 * rows(seed + 1, n, z), dtype)


def third(*shape):
    return jnp.asarray(rows(7, *(shape or (N, Z))))


# ---------------------------------------------------------------- definitions


@every_loss
def test_loss_equals_its_naive_double_loop(x64, name):
    za, zb = views()
    value, _ = evaluate(name, za, zb)
    np.testing.assert_allclose(value, TWO_VIEWS[name][1](za.tolist(), zb.tolist(), 0.7), rtol=1e-12)
    assert value.shape == () and value.dtype == za.dtype


@settings(max_examples=6, deadline=None, database=None, derandomize=True)
@given(n=st.integers(2, 6), z=st.integers(1, 4), q=st.integers(0, 3), tau=st.floats(0.1, 3.0))
def test_naive_loops_agree_for_every_shape_and_temperature(n, z, q, tau):
    @jax.jit
    def values(za, zb, negatives, tau):
        others = [LOSSES[name](za, zb, similarity=cosine, temperature=tau) for name in ("nt_xent", "clip", "logistic")]
        return [*(loss(za, zb, temperature=tau, negatives=negatives) for loss in (info_nce, nt_xent)), *others]

    with jax.enable_x64(True):
        za, zb = views(n + 10 * z, n, z)
        queue = jnp.asarray(rows(q, q, z))
        a, b = za.tolist(), zb.tolist()
        expected = [f(a, b, tau=tau, negatives=queue.tolist()) for f in (naive_info_nce, naive_nt_xent)]
        expected += [f(a, b, s_cosine, tau) for f in (naive_nt_xent, naive_clip, naive_logistic)]
        # atol: a loss near 0 is the logarithm of a ratio near 1, so its error is absolute
        np.testing.assert_allclose(values(za, zb, queue, jnp.asarray(tau)), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("s", SIMILARITY)
def test_linear_loss_equals_its_naive_loop_for_one_and_for_many_negatives(x64, s):
    za, zp = views()
    zn = third(N, 4, Z)
    similarity, naive = SIMILARITY[s]
    loss = jax.jit(functools.partial(linear, similarity=similarity))
    expected = naive_linear(za.tolist(), zp.tolist(), zn.tolist(), naive)
    np.testing.assert_allclose(loss(za, zp, zn), expected, rtol=1e-12)
    expected = naive_linear(za.tolist(), zp.tolist(), zn[:, :1].tolist(), naive)
    np.testing.assert_allclose(loss(za, zp, zn[:, 0]), expected, rtol=1e-12)


@pytest.mark.slow
def test_weights_of_barlow_twins_and_vicreg_multiply_their_own_terms(x64):
    za, zb = views()
    a, b = za.tolist(), zb.tolist()
    got = jax.vmap(lambda w: barlow_twins(za, zb, redundancy=w))(jnp.asarray([0.0, 0.3]))
    np.testing.assert_allclose(got, [naive_barlow_twins(a, b, w) for w in (0.0, 0.3)], rtol=1e-12)
    got = jax.vmap(lambda w: vicreg(za, zb, invariance=w[0], variance=w[1], covariance=w[2]))(jnp.eye(3))
    np.testing.assert_allclose(got, [naive_vicreg(a, b, *w) for w in np.eye(3).tolist()], rtol=1e-12)
    assert np.all(np.asarray(got) > 0)  # the data reach every term


def test_registry_holds_each_two_view_loss_under_its_name():
    assert all(getattr(losses, name) is loss for name, loss in LOSSES.items())
    assert {name.split("-")[0] for name in TWO_VIEWS} == set(LOSSES)


# ---------------------------------------------------------------- gradients


@pytest.mark.parametrize("name", [*TWO_VIEWS, *BESIDE])
def test_gradient_equals_central_differences(x64, name):
    beside = [third()] if name in BESIDE else []
    point = jnp.stack([*views(), *beside])
    value, gradient = evaluate(name, *point[:2], beside=beside)
    loss = functools.partial(BESIDE[name] if beside else TWO_VIEWS[name][0], tau=0.7)
    step = 1e-5
    moves = step * jnp.eye(point.size).reshape(-1, *point.shape)
    along = jax.jit(jax.vmap(lambda move: loss(*(point + move))))
    difference = (along(moves) - along(-moves)) / (2 * step)
    # Rounding about 100 eps |L| / step = 2e-9 |L|; truncation step^2 / 6 = 2e-11 times a third derivative of order |L|.
    atol = 4e-9 * max(1.0, abs(float(value)))
    np.testing.assert_allclose(jnp.stack(gradient).ravel(), difference, rtol=0, atol=atol)


@pytest.mark.slow
def test_gradients_equal_their_closed_forms(x64):
    """Linear: (n - p)/n. InfoNCE and logistic: weights (probability - label) on the other view. Spectral: by hand."""
    za, zb = views()
    scores, label = za @ zb.T, jnp.eye(N)
    np.testing.assert_allclose(jax.grad(linear)(za, zb, third()), (third() - zb) / N, rtol=1e-14)
    softmax = (jax.nn.softmax(scores / 0.7, axis=1) - label) / (0.7 * N)
    sigmoid = jnp.where(label == 1, 1 / N, 1 / (N * (N - 1))) * (jax.nn.sigmoid(scores / 0.7) - label) / 0.7
    square = 2 * scores / N**2 - 2 * label / N
    for name, weight in (("info_nce-dot", softmax), ("logistic-dot", sigmoid), ("spectral-dot", square)):
        _, gradient = evaluate(name, za, zb)
        np.testing.assert_allclose(gradient[0], weight @ zb, rtol=1e-12, atol=1e-15)
        np.testing.assert_allclose(gradient[1], weight.T @ za, rtol=1e-12, atol=1e-15)


@pytest.mark.slow
def test_plain_compiled_and_mapped_gradients_agree(x64):
    first, second = views(0), views(1)
    loss = functools.partial(info_nce, temperature=0.7)
    mapped = jax.jit(jax.vmap(jax.grad(loss)))(*(jnp.stack(side) for side in zip(first, second, strict=True)))
    for (za, zb), got in zip((first, second), mapped, strict=True):
        np.testing.assert_allclose(got, evaluate("info_nce-cosine", za, zb)[1][0], rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(jax.grad(loss)(*first), mapped[0], rtol=1e-12, atol=1e-15)


def test_temperature_can_be_learned(x64):
    za, zb = views()
    slope = jax.jit(jax.grad(lambda tau: clip(za, zb, temperature=tau)))(jnp.asarray(0.5))
    step = 1e-5
    difference = (evaluate("clip-cosine", za, zb, 0.5 + step)[0] - evaluate("clip-cosine", za, zb, 0.5 - step)[0]) / (
        2 * step
    )
    np.testing.assert_allclose(slope, difference, rtol=4e-9)  # as for the central differences above


# ---------------------------------------------------------------- identities and invariances


@pytest.mark.parametrize("name", [*SCORES, "linear"])
def test_losses_of_scores_are_invariant_to_rotation(x64, name):
    rotation = jnp.asarray(scipy.stats.ortho_group.rvs(Z, random_state=0))
    points = [*views(), third()] if name == "linear" else views()
    loss = linear if name == "linear" else lambda za, zb: evaluate(name, za, zb)[0]
    np.testing.assert_allclose(loss(*(x @ rotation for x in points)), loss(*points), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", [name for name in SCORES if name.endswith("cosine")])
def test_cosine_losses_ignore_lengths_so_the_gradient_is_orthogonal_and_dot_losses_do_not(x64, name):
    """<f, grad_f L> = <W, grad_W L> for a linear last layer f = h W: under cosine gradient flow conserves |W|."""
    za, zb = views()
    lengths = jnp.asarray(np.exp(rows(2, N, 1)))
    value, (da, db) = evaluate(name, za, zb)
    np.testing.assert_allclose(evaluate(name, za * lengths, zb / lengths)[0], value, rtol=1e-12)
    np.testing.assert_allclose(dot(za, da), 0.0, atol=1e-15)
    np.testing.assert_allclose(dot(zb, db), 0.0, atol=1e-15)
    _, (da, db) = evaluate(name.replace("cosine", "dot"), za, zb)
    assert abs(float(jnp.sum(dot(za, da) + dot(zb, db)))) > 1e-3


@every_loss
def test_order_of_the_pairs_does_not_matter_but_the_pairing_does(x64, name):
    za, zb = views()
    order = jnp.asarray([3, 0, 4, 1, 2])
    value = float(evaluate(name, za, zb)[0])
    np.testing.assert_allclose(evaluate(name, za[order], zb[order])[0], value, rtol=1e-12)
    assert abs(float(evaluate(name, za, zb[order])[0]) - value) > 1e-3


@pytest.mark.parametrize("loss", [info_nce, clip, nt_xent, logistic])
def test_softmax_losses_do_not_see_a_shift_of_all_scores_and_the_logistic_loss_does(x64, loss):
    za, zb = views()
    change = loss(za, zb, similarity=lambda a, b: dot(a, b) + 3.0) - loss(za, zb, similarity=dot)
    assert (abs(float(change)) < 1e-13) == (loss is not logistic)  # scores below 100, a few eps of them


@pytest.mark.parametrize("loss", [info_nce, clip, nt_xent])
def test_a_single_candidate_gives_exactly_zero(x64, loss):
    value, gradient = jax.jit(jax.value_and_grad(loss))(*views(n=1))
    assert float(value) == 0.0
    np.testing.assert_array_equal(gradient, 0.0)


@pytest.mark.slow
def test_equal_scores_give_exactly_the_logarithm_of_the_number_of_candidates(x64):
    same = jnp.full((N, Z), 0.3)
    for name, candidates in (("info_nce", N), ("clip", N), ("nt_xent", 2 * N - 1)):
        for s in SIMILARITY:
            assert float(evaluate(f"{name}-{s}", same, same)[0]) == pytest.approx(math.log(candidates), rel=1e-15)
    for name, candidates in (("info_nce-queue-cosine", 2 * N), ("nt_xent-queue-cosine", 3 * N - 1)):
        value, _ = evaluate(name, same, same, beside=[same])
        assert float(value) == pytest.approx(math.log(candidates), rel=1e-15)
    assert float(evaluate("logistic-dot", 0 * same, same)[0]) == pytest.approx(2 * math.log(2), rel=1e-15)


def test_a_queue_is_the_batch_form_with_the_other_candidates_appended(x64):
    za, zb = views(n=6)
    halves = [(za[:3], zb[:3], zb[3:]), (za[3:], zb[3:], zb[:3])]
    parts = [info_nce(a, b, temperature=0.5, negatives=queue) for a, b, queue in halves]
    np.testing.assert_allclose((parts[0] + parts[1]) / 2, info_nce(za, zb, temperature=0.5), rtol=1e-13)
    assert float(info_nce(za, zb, negatives=jnp.zeros((0, Z)))) == float(info_nce(za, zb))


def test_clip_is_the_mean_of_the_two_directions_and_keeps_the_sides_of_an_asymmetric_similarity(x64):
    za, zb = views()
    for name in ("dot", "cosine"):
        forth, back = evaluate(f"info_nce-{name}", za, zb)[0], evaluate(f"info_nce-{name}", zb, za)[0]
        np.testing.assert_allclose(evaluate(f"clip-{name}", za, zb)[0], (forth + back) / 2, rtol=1e-14)
    m = third(Z, Z)
    got = clip(za, zb, similarity=lambda a, b: a @ m @ b)
    np.testing.assert_allclose(got, clip(za @ m, zb, similarity=dot), rtol=1e-13)


@settings(max_examples=20, deadline=None, database=None, derandomize=True)
@given(seed=st.integers(0, 99), log_tau=st.floats(-8, 1))
def test_info_nce_times_temperature_tends_to_the_margin_of_the_best_candidate(seed, log_tau):
    """max <= tau logsumexp(. / tau) <= max + tau ln K, so the gap to the limit lies in [0, tau ln K]."""
    tau = 10.0**log_tau
    with jax.enable_x64(True):
        za, zb = views(seed)
        scores = np.asarray(za) @ np.asarray(zb).T
        gap = tau * float(evaluate("info_nce-dot", za, zb, tau)[0]) - np.mean(scores.max(1) - np.diag(scores))
    assert -1e-13 <= gap <= tau * math.log(N) + 1e-13  # scores are below 100: a few eps of them


@pytest.mark.parametrize(("n", "z"), [(6, 3), (3, 6)])
def test_spectral_loss_attains_its_bound_and_never_passes_it(x64, n, z):
    r = min(n, z)
    u = jnp.asarray(np.linalg.qr(rows(0, max(n, z), r))[0])
    u = u if n >= z else u.T
    np.testing.assert_allclose(spectral(np.sqrt(n) * u, np.sqrt(n) * u), -r, rtol=1e-13)
    if n <= z:  # unit vectors, orthogonal to each other
        np.testing.assert_allclose(spectral(u, u, similarity=cosine), 1 / r - 2, rtol=1e-13)
    scales = jnp.logspace(-1, 1, 60)[:, None, None]
    za, zb = (scales * jnp.stack(side) for side in zip(*(views(seed, n, z) for seed in range(60)), strict=True))
    assert float(jnp.min(jax.vmap(spectral)(za, zb))) >= -r
    assert float(jnp.min(jax.vmap(functools.partial(spectral, similarity=cosine))(za, zb))) >= 1 / r - 2


def test_spectral_loss_without_the_diagonal_is_unbounded_below_and_with_it_is_not(x64):
    """The trap: along f_1 = c e_1 the average over i != j is 0 whatever c, so nothing stops the attraction."""
    for c in (1.0, 10.0, 1e3):
        f = jnp.zeros((N, Z)).at[0, 0].set(c)
        scores = f @ f.T
        sampled = jnp.sum(jnp.where(jnp.eye(N, dtype=bool), 0.0, scores**2)) / (N * (N - 1)) - 2 * jnp.trace(scores) / N
        np.testing.assert_allclose(sampled, -2 * c**2 / N, rtol=1e-14)
        np.testing.assert_allclose(evaluate("spectral-dot", f, f)[0], (c**2 / N) ** 2 - 2 * c**2 / N, rtol=1e-13)
        assert float(evaluate("spectral-dot", f, f)[0]) >= -min(N, Z)


def test_linear_loss_has_no_minimum_under_dot_but_lies_within_two_under_cosine(x64):
    za, zp = views()
    assert float(linear(za, zp, -zp)) < 0
    np.testing.assert_allclose(linear(10 * za, 10 * zp, -10 * zp), 100 * linear(za, zp, -zp), rtol=1e-13)
    np.testing.assert_allclose(linear(za, za, -za, similarity=cosine), -2.0, rtol=1e-15)


def test_barlow_twins_ignores_scale_and_shift_of_every_dimension(x64):
    za, zb = views()
    moved = za * jnp.asarray([[1e3, 2.0, 1e-6]]) + 5.0, zb * 7.0 - jnp.asarray([[1.0, 2.0, 3.0]])
    # Dimension 3 has size 1e-6 on an offset of 5: its relative error is eps times that ratio, 1e-9.
    np.testing.assert_allclose(evaluate("barlow_twins", *moved)[0], evaluate("barlow_twins", za, zb)[0], rtol=1e-8)


def test_whitened_equal_views_have_zero_loss(x64):
    """With an identity covariance both losses are at their minimum: sqrt(1 + eps) >= 1 clears VICReg's hinge."""
    raw = rows(0, N, Z)
    white = jnp.asarray(np.sqrt(N - 1) * np.linalg.qr(raw - raw.mean(0))[0])
    for name in ("barlow_twins", "vicreg"):  # squares of correlations that are 0 to a few eps
        assert float(evaluate(name, white, white)[0]) == pytest.approx(0.0, abs=1e-28)
