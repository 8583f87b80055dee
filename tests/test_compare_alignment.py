"""Centred kernel alignment: the definition, what changes nothing and what does, digits, where it is 0/0."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparing import close, gram, haar, invertible, normal

from theorykit.spectral.compare import (
    kernel_cka,
    linear_cka,
)


def naive_hsic(k, l, debiased):
    """Sums over distinct samples for the unbiased estimate, as in Song et al.; centring matrices for the plain one."""
    n = len(k)
    if not debiased:
        h = np.eye(n) - 1 / n
        return np.trace(k @ h @ l @ h)
    pairs, triples, quadruples = (list(itertools.permutations(range(n), m)) for m in (2, 3, 4))
    return (
        np.mean([k[i, j] * l[i, j] for i, j in pairs])
        + np.mean([k[i, j] * l[q, r] for i, j, q, r in quadruples])
        - 2 * np.mean([k[i, j] * l[i, q] for i, j, q in triples])
    )


def naive_cka(k, l, debiased):
    k, l = (np.asarray(a, np.float64) for a in (k, l))
    return naive_hsic(k, l, debiased) / np.sqrt(naive_hsic(k, k, debiased) * naive_hsic(l, l, debiased))


@pytest.mark.slow
@pytest.mark.parametrize("debiased", [False, True])
@pytest.mark.parametrize(("p", "q", "double"), [(1, 3, True), (3, 12, True), (2, 3, False), (12, 3, False)])
def test_cka_is_its_definition(p, q, double, debiased):
    with jax.enable_x64(double):
        x, y = normal(1, 7, p), normal(2, 7, q)
        y = y.at[:, 0].add(x[:, 0])
        expected = naive_cka(gram(x), gram(y), debiased)
        close(linear_cka(x, y, debiased=debiased), expected)
        close(kernel_cka(gram(x), gram(y), debiased=debiased), expected)


@pytest.mark.slow
@pytest.mark.parametrize("debiased", [False, True])
@pytest.mark.parametrize("p", [3, 40])
def test_linear_cka_ignores_shift_rotation_and_scale_but_sees_other_linear_maps(x64, p, debiased):
    x, y = normal(1, 20, p), normal(2, 20, 4)
    y = y + x[:, :4] if p >= 4 else y + x @ normal(3, 3, 4)
    value = linear_cka(x, y, debiased=debiased)
    moved = -3 * x @ haar(4, p) + normal(5, 1, p)
    close(linear_cka(moved, 0.1 * y @ haar(6, 4), debiased=debiased), value)
    close(linear_cka(y, x, debiased=debiased), value)
    close(linear_cka(x, moved, debiased=debiased), 1.0)
    assert abs(linear_cka(x @ invertible(7, p), y, debiased=debiased) - value) > 1e-3
    assert linear_cka(x @ invertible(7, p), x, debiased=debiased) < 0.99


@pytest.mark.slow
@pytest.mark.parametrize("debiased", [False, True])
def test_kernel_cka_ignores_scale_and_additive_terms_but_sees_other_changes(x64, debiased):
    k, l, a = gram(normal(1, 9, 4)), gram(normal(2, 9, 4)), normal(3, 9)
    value = kernel_cka(k, l, debiased=debiased)
    close(kernel_cka(5 * k + a[:, None] + a[None, :], l, debiased=debiased), value)
    order = jnp.asarray(np.random.default_rng(0).permutation(9))
    close(kernel_cka(k[order][:, order], l[order][:, order], debiased=debiased), value)
    assert abs(kernel_cka(k[order][:, order], l, debiased=debiased) - value) > 1e-3
    assert abs(kernel_cka(k * k, l, debiased=debiased) - value) > 1e-3


def test_debiased_cka_ignores_the_diagonal_and_plain_cka_does_not(x64):
    k, l = gram(normal(1, 9, 4)), gram(normal(2, 9, 4))
    other = k + jnp.diag(jnp.abs(normal(3, 9)))
    close(kernel_cka(other, l, debiased=True), kernel_cka(k, l, debiased=True))
    assert abs(kernel_cka(other, l) - kernel_cka(k, l)) > 1e-3


def test_over_all_orders_of_the_samples_debiased_cka_has_mean_zero_and_plain_cka_has_not(x64):
    # An exact null for any data: of unrelated samples, every order is as likely.
    n = 5
    k, l = gram(normal(1, n, 2)), gram(normal(2, n, 3))
    orders = jnp.asarray(list(itertools.permutations(range(n))))
    for debiased in (True, False):
        values = jax.jit(
            jax.vmap(lambda o, debiased=debiased: kernel_cka(k[o][:, o], l, debiased=debiased), in_axes=0)
        )(orders)
        h = np.eye(n) - 1 / n
        parts = [np.trace(h @ a) / np.linalg.norm(h @ a @ h) for a in (np.asarray(k), np.asarray(l))]
        close(jnp.mean(values), 0.0 if debiased else np.prod(parts) / (n - 1))


@pytest.mark.slow
@pytest.mark.parametrize("debiased", [False, True])
@pytest.mark.parametrize("p", [3, 40])
def test_a_large_mean_costs_cka_no_more_digits_than_the_features_lost(p, debiased):
    # Steps of 1/256 at a mean of 1000 are exact in float32, so both inputs are the same features but for a shift.
    x, y = (jnp.round(normal(i, 20, p) * 256) / 256 for i in (1, 2))
    close(linear_cka(x + 1000, y + 1000, debiased=debiased), linear_cka(x, y, debiased=debiased))


@pytest.mark.slow
@pytest.mark.parametrize("debiased", [False, True])
@pytest.mark.parametrize("p", [3, 40])
def test_constant_features_have_no_cka_but_one_constant_column_is_ignored(p, debiased):
    x, y = normal(1, 20, p), normal(2, 20, 3)
    constant = jnp.full_like(x, 0.1)
    for pair in [(constant, y), (y, constant)]:
        with pytest.raises(ValueError, match="CKA is 0/0"):
            linear_cka(*pair, debiased=debiased)
        assert jnp.isnan(jax.jit(linear_cka, static_argnames="debiased")(*pair, debiased=debiased))
        with pytest.raises(ValueError, match="CKA is 0/0"):
            kernel_cka(gram(pair[0]), gram(pair[1]), debiased=debiased)
    wider = jnp.concatenate([x, constant], axis=1)
    close(linear_cka(wider, y, debiased=debiased), linear_cka(x, y, debiased=debiased))


@pytest.mark.slow
@pytest.mark.parametrize(("n", "double"), [(5, False), (200, False), (37, True)])
def test_debiased_cka_of_features_that_relate_no_pairs_is_refused(n, double):
    with jax.enable_x64(double):
        # One sample differs from the others: only the diagonal of the kernel knows of it.
        lonely, y = jnp.full((n, 2), 0.3).at[n // 2].set(1.7), normal(1, n, 2)
        assert 0 < linear_cka(lonely, y) < 1
        with pytest.raises(ValueError, match="first representation relates all pairs"):
            linear_cka(lonely, y, debiased=True)
        with pytest.raises(ValueError, match="CKA is 0/0"):
            kernel_cka(jnp.eye(n), gram(y), debiased=True)
