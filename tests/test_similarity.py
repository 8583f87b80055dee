"""Similarities: values, gradients, scale invariance over the whole range of float32, zero vectors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from theorykit import losses
from theorykit.similarity import check_views, cosine, dot, log_softmax_product, normalise, pairwise

EPS32 = float(np.finfo(np.float32).eps)


def rows(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape)


def test_dot_and_cosine_agree_with_numpy(x64):
    a, b = rows(0, 4, 2, 5), rows(1, 4, 2, 5)
    norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    inner = np.einsum("ijz,ijz->ij", a, b)
    np.testing.assert_allclose(dot(jnp.asarray(a), jnp.asarray(b)), inner, rtol=1e-13, atol=1e-14)
    np.testing.assert_allclose(cosine(jnp.asarray(a), jnp.asarray(b)), inner / norms, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("s", [dot, cosine, log_softmax_product])
def test_fast_paths_of_pairwise_agree_with_vmap(x64, s):
    a, b = jnp.asarray(rows(0, 4, 3)), jnp.asarray(rows(1, 6, 3))
    by_vmap = pairwise(lambda u, v: s(u, v), a, b)  # not recognised, hence vmapped
    np.testing.assert_allclose(pairwise(s, a, b), by_vmap, rtol=1e-13, atol=1e-14)
    assert by_vmap.shape == (4, 6)


@pytest.mark.parametrize("s", [dot, cosine, log_softmax_product, lambda u, v: jnp.sum(u - v)])
def test_an_empty_second_batch_gives_no_columns(s):
    assert pairwise(s, jnp.ones((3, 2)), jnp.ones((0, 2))).shape == (3, 0)


def test_scores_of_an_asymmetric_similarity_are_not_transposed(x64):
    a, b = jnp.asarray(rows(0, 3, 2)), jnp.asarray(rows(1, 4, 2))
    expected = np.asarray(a)[:, None, 0] - np.asarray(b)[None, :, 1]
    np.testing.assert_array_equal(pairwise(lambda u, v: u[0] - v[1], a, b), expected)


def test_gradient_of_cosine_is_its_closed_form(x64):
    a, b = jnp.asarray(rows(0, 5)), jnp.asarray(rows(1, 5))
    length = jnp.linalg.norm(a)
    expected = (b / jnp.linalg.norm(b) - cosine(a, b) * a / length) / length
    gradient = jax.grad(cosine)(a, b)
    np.testing.assert_allclose(gradient, expected, rtol=1e-13, atol=1e-15)
    assert abs(float(dot(a, gradient))) < 1e-15
    assert float(jnp.linalg.norm(gradient)) <= 1 / float(length)  # what keeps the kernel of wide nets constant


def test_curvature_of_cosine_survives_at_equal_directions(x64):
    """At b = 2 a the gradient is 0 and the Hessian -(I - u u^T) / |a|^2; a clip to [-1, 1] would erase it."""
    a = jnp.asarray(rows(11, 20, 3))
    u = np.asarray(a / jnp.linalg.norm(a, axis=1, keepdims=True))
    expected = (u[:, :, None] * u[:, None, :] - np.eye(3)[None]) / np.sum(np.asarray(a) ** 2, axis=1)[:, None, None]
    hessians = jax.jit(jax.vmap(jax.hessian(cosine)))(a, 2 * a)
    np.testing.assert_allclose(hessians, expected, rtol=1e-12, atol=1e-13 * float(np.abs(expected).max()))


def test_second_derivative_of_normalise_is_its_closed_form(x64):
    """With P = I - u u^T: d^2 u_i = -(u_j P_ik + u_k P_ij + u_i P_jk) / |a|^2, so stopping the scale loses nothing."""
    a = jnp.asarray(rows(2, 4))
    length = jnp.linalg.norm(a)
    u = a / length
    p = jnp.eye(4) - jnp.outer(u, u)
    expected = -(jnp.einsum("j,ik->ijk", u, p) + jnp.einsum("k,ij->ijk", u, p) + jnp.einsum("i,jk->ijk", u, p))
    np.testing.assert_allclose(jax.jit(jax.hessian(normalise))(a), expected / length**2, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("power", [-100, -1, 1, 100])
def test_normalise_is_bitwise_invariant_to_powers_of_two(power):
    a = jnp.asarray(rows(3, 4, 5), jnp.float32)
    np.testing.assert_array_equal(normalise(a * jnp.float32(2.0**power)), normalise(a))


@pytest.mark.parametrize("length", [1e-30, 1e4, 1e30])
def test_direction_and_gradient_survive_extreme_lengths_in_float32(length):
    """|a|^2 leaves float32 at both ends; the gradient is that of the unit vector divided by the length."""
    a, b = jnp.asarray(rows(4, 5), jnp.float32), jnp.asarray(rows(5, 5), jnp.float32)
    scale = jnp.float32(length)
    # z + 4 roundings in each of the two evaluations that are compared
    tolerance = 2 * (5 + 4) * EPS32
    np.testing.assert_allclose(normalise(a * scale), normalise(a), rtol=tolerance)
    gradient, reference = jax.grad(cosine)(a * scale, b), jax.grad(cosine)(a, b)
    np.testing.assert_allclose(gradient * scale, reference, rtol=0, atol=tolerance / float(jnp.linalg.norm(a)))


def test_zero_vectors_have_cosine_zero_and_all_derivatives_zero():
    zero, b = jnp.zeros(4), jnp.asarray(rows(6, 4), jnp.float32)
    assert float(cosine(zero, b)) == 0.0
    assert float(cosine(zero, zero)) == 0.0
    for derivative in (jax.grad(cosine), jax.grad(cosine, argnums=1), jax.hessian(cosine), jax.jacfwd(cosine)):
        np.testing.assert_array_equal(jax.jit(derivative)(zero, b), 0.0)


@pytest.mark.slow
def test_a_zero_row_leaves_the_gradients_of_other_rows_alone(x64):
    a = jnp.asarray(rows(7, 3, 4)).at[1].set(0.0)
    weights = jnp.asarray(rows(8, 3, 4))
    gradient = jax.grad(lambda x: jnp.sum(weights * normalise(x)))(a)
    keep = jnp.asarray([0, 2])
    alone = jax.grad(lambda x: jnp.sum(weights[keep] * normalise(x)))(a[keep])
    np.testing.assert_array_equal(gradient[1], 0.0)
    np.testing.assert_allclose(gradient[keep], alone, rtol=1e-14)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_non_finite_vectors_stay_visible(bad):
    a = jnp.asarray([bad, 1.0, 0.0], jnp.float32)
    assert not np.isfinite(float(cosine(a, jnp.ones(3))))


def test_compiled_and_mapped_calls_agree_with_plain_ones(x64):
    a, b = jnp.asarray(rows(9, 3, 4, 2)), jnp.asarray(rows(10, 3, 5, 2))
    mapped = jax.jit(jax.vmap(lambda u, v: pairwise(cosine, u, v)))(a, b)
    for i in range(3):
        np.testing.assert_allclose(mapped[i], pairwise(cosine, a[i], b[i]), rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize(
    ("a", "b", "s", "error", "message"),
    [
        (np.ones((2, 3), np.float32), np.ones((2, 4), np.float32), dot, ValueError, "rows of one length"),
        (np.ones(3, np.float32), np.ones((2, 3), np.float32), dot, ValueError, r"\(n, z\)"),
        (np.ones((2, 3), np.int32), np.ones((2, 3), np.int32), cosine, TypeError, "cast them"),
        (np.ones((2, 3), np.float32), np.ones((2, 3), np.float16), cosine, TypeError, "cast one"),
        (np.ones((2, 3), np.float32), np.ones((2, 3), np.float32), jnp.multiply, ValueError, "must return a scalar"),
    ],
)
def test_bad_batches_and_similarities_are_named(as_users_run, a, b, s, error, message):
    with pytest.raises(error, match=message):
        pairwise(s, jnp.asarray(a), jnp.asarray(b))


def test_plain_lists_and_integers_are_refused(as_users_run):
    with pytest.raises(TypeError, match=r"jnp\.asarray\(a\)"):
        pairwise(dot, [[1.0]], [[1.0]])
    with pytest.raises(TypeError, match="cast them"):
        normalise(jnp.arange(3))


F32 = np.ones((3, 2), np.float32)


@pytest.mark.parametrize(
    ("za", "zb", "error", "message"),
    [
        (F32, F32[:2], ValueError, "row i of both"),
        (F32, F32[:, :1], ValueError, "row i of both"),
        (F32[0], F32[0], ValueError, r"embeddings are \(n, z\)"),
        (F32[None], F32[None], ValueError, "vmap over further axes"),
        (F32[:1], F32[:1], ValueError, "at least 2 sample"),
        (F32[:, :0], F32[:, :0], ValueError, "1 dimension"),
        (F32, F32.astype(np.float16), TypeError, "zb has dtype float16.*cast one"),
        (F32.astype(np.int32), F32, TypeError, "za has dtype int32.*cast them"),
        (F32.astype(np.complex64), F32, TypeError, "za has dtype complex64.*cast them"),
    ],
)
def test_views_that_do_not_match_are_named_at_trace_time(za, zb, error, message):
    with pytest.raises(error, match=message) as caught:
        jax.eval_shape(lambda a, b: check_views("loss", least=2, za=a, zb=b), jnp.asarray(za), jnp.asarray(zb))
    assert str(caught.value).startswith("loss: za has" if "zb has" not in message else "loss: zb has")


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
def test_views_of_every_float_dtype_pass(dtype):
    check_views("loss", za=jnp.ones((1, 1), dtype), zb=jnp.ones((1, 1), dtype))
    assert float(cosine(jnp.ones(2, dtype), -jnp.ones(2, dtype))) == pytest.approx(
        -1, abs=4 * float(jnp.finfo(dtype).eps)
    )


def naive_log_softmax_product(a, b):
    """By its definition, in float64."""
    p, q = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in (np.asarray(a, float), np.asarray(b, float)))
    return np.log(p @ q.T)


def test_log_softmax_product_is_its_definition(x64):
    a, b = rows(12, 4, 5), rows(13, 6, 5)
    scores = pairwise(log_softmax_product, jnp.asarray(a), jnp.asarray(b))
    np.testing.assert_allclose(scores, naive_log_softmax_product(a, b), rtol=1e-13, atol=1e-14)
    row = log_softmax_product(jnp.asarray(a), jnp.asarray(b[:4]))
    np.testing.assert_allclose(row, jnp.diagonal(scores), rtol=1e-13, atol=1e-14)


def test_log_softmax_product_ignores_constants_and_is_at_most_zero(x64):
    a, b = jnp.asarray(rows(14, 3, 4)), jnp.asarray(rows(15, 3, 4))
    scores = pairwise(log_softmax_product, a, b)
    shifted = pairwise(log_softmax_product, a + 100.0, b - 7.0)
    # Entries of size 100 have roundings of 100 eps.
    np.testing.assert_allclose(shifted, scores, atol=4 * 100 * np.finfo(np.float64).eps)
    assert float(scores.max()) <= 0.0


@pytest.mark.parametrize("gap", [50.0, 200.0, 1e4, 1e30])
def test_softmaxes_of_disjoint_support_give_no_logarithm_of_zero(gap):
    """softmax (gap, 0) and (0, gap): the product is 2 e^-gap, which leaves float32 beyond a gap of 104."""
    a, b = jnp.asarray([[gap, 0.0]], jnp.float32), jnp.asarray([[0.0, gap]], jnp.float32)

    def score(a):
        return pairwise(log_softmax_product, a, b)[0, 0]

    value, gradient = jax.value_and_grad(score)(a)
    np.testing.assert_allclose(value, np.log(2.0) - np.float32(gap), rtol=4 * EPS32)
    # d/da = weights of the sum (1/2, 1/2) less softmax(a) = (1, 0).
    np.testing.assert_allclose(gradient, [[-0.5, 0.5]], atol=4 * EPS32)


def test_the_gradient_of_log_softmax_product_is_its_closed_form(x64):
    a, b = jnp.asarray(rows(16, 3, 4)), jnp.asarray(rows(17, 5, 4))
    weights = jnp.asarray(rows(18, 3, 5))
    gradient = jax.grad(lambda a: jnp.sum(weights * pairwise(log_softmax_product, a, b)))(a)
    p, q = np.asarray(jax.nn.softmax(a)), np.asarray(jax.nn.softmax(b))
    posterior = p[:, None] * q[None] / (p @ q.T)[:, :, None]
    expected = np.sum(np.asarray(weights)[:, :, None] * (posterior - p[:, None]), axis=1)
    np.testing.assert_allclose(gradient, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("loss", [losses.clip, losses.info_nce])
def test_contrastive_losses_accept_log_softmax_product_at_any_scale(loss):
    z = jnp.asarray(rows(19, 4, 3), jnp.float32)
    scores = naive_log_softmax_product(z, z)
    expected = float(np.mean(np.log(np.exp(scores).sum(1)) - np.diagonal(scores)))
    # Sums of 3 and of 4 terms and a logarithm, of numbers of order one.
    assert float(loss(z, z, similarity=log_softmax_product)) == pytest.approx(expected, abs=16 * EPS32)
    value, gradient = jax.value_and_grad(lambda z: loss(z, z, similarity=log_softmax_product))(1e6 * z)
    assert np.isfinite(float(value)) and bool(jnp.isfinite(gradient).all())
