"""Squared-distance losses, kernel features, class collision and exact InfoNCE: naive loops, batches, bad input."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compilation import quickly
from finite_joints import CLOSE, K, N, generator, normal

from theorykit import losses
from theorykit.spectral.contrastive import (
    class_collision,
    contrastive_covariance,
    cross_spectral_optimum,
    kernel_contrastive,
    normalised_adjacency,
    others,
    pair_kernel,
    pair_loss,
    pair_spectrum,
    pair_weights,
    spectral_loss,
    spectral_optimum,
)

SEEDS = range(5)


# ---------------------------------------------------------------- losses of squared distances


FORMS = {
    "InfoNCE": (jnp.log1p, jnp.exp),
    "plain": (lambda x: x, lambda x: x),
    "quadratic": (lambda x: x**2, jax.nn.softplus),
    "soft triplet": (lambda x: x, jax.nn.softplus),
}


def minus_half_squared_distance(a, b):
    return -jnp.sum((a - b) ** 2) / 2


def test_others_leaves_out_the_anchor():
    x = jnp.asarray([[1.0], [2.0], [3.0]])
    np.testing.assert_array_equal(others(x)[:, :, 0], [[2, 3], [1, 3], [1, 2]])


def test_info_nce_is_a_loss_of_squared_distances(x64):
    za, zp = normal(0, N, K), normal(1, N, K)
    both = quickly(
        lambda za, zp: (
            pair_loss(za, zp, others(zp), phi=jnp.log1p, psi=jnp.exp),
            N * losses.info_nce(za, zp, similarity=minus_half_squared_distance),
        ),
        za,
        zp,
    )
    np.testing.assert_allclose(*both, **CLOSE)


def test_contrastive_covariance_equals_its_naive_double_loop(x64):
    x, p, weights = normal(0, N, 2), normal(1, N, 2), jnp.abs(normal(2, N, N - 1))
    n, expected = others(x), np.zeros((2, 2))
    for i, j in itertools.product(range(N), range(N - 1)):
        far, near = np.asarray(x[i] - n[i, j]), np.asarray(x[i] - p[i])
        expected += float(weights[i, j]) * (np.outer(far, far) - np.outer(near, near))
    np.testing.assert_allclose(contrastive_covariance(weights, x, p, n), expected, **CLOSE)


@pytest.mark.parametrize("form", FORMS)
def test_gradient_is_that_of_the_trace_of_the_contrastive_covariance(x64, form):
    phi, psi = FORMS[form]

    def loss(w, x, p):
        return pair_loss(x @ w.T, p @ w.T, others(x @ w.T), phi=phi, psi=psi)

    @jax.jit
    def both(w, x, p):
        weights = pair_weights(x @ w.T, p @ w.T, others(x @ w.T), phi=phi, psi=psi)
        trace = jax.grad(lambda w: -jnp.trace(contrastive_covariance(weights, x @ w.T, p @ w.T, others(x @ w.T))) / 2)
        return jax.grad(loss)(w, x, p), -w @ contrastive_covariance(weights, x, p, others(x)), trace(w)

    for seed in SEEDS:
        x = normal(seed, N, 4)
        left, of_inputs, of_trace = both(0.5 * normal(seed + 20, 2, 4), x, x + 0.3 * normal(seed + 10, N, 4))
        np.testing.assert_allclose(left, of_inputs, **CLOSE)
        np.testing.assert_allclose(left, of_trace, **CLOSE)


def test_equal_points_have_no_contrastive_covariance(x64):
    x = jnp.ones((N, 2))
    assert not np.any(contrastive_covariance(jnp.ones((N, N - 1)), x, x, others(x)))


def test_deep_linear_nets_of_unit_norm_do_not_pass_the_leading_eigenvalue(x64):
    half = normal(0, 4, 4)
    covariance = half + half.T
    values, vectors = np.linalg.eigh(np.asarray(covariance))
    for seed in range(200):
        layers = [np.asarray(normal(10 * seed + layer, 4, 4)) for layer in range(3)]
        w = functools.reduce(np.matmul, [layer / np.linalg.norm(layer) for layer in layers])
        assert np.trace(w @ np.asarray(covariance) @ w.T) <= values[-1] + 1e-12
    reached = np.outer(np.eye(4)[0], vectors[:, -1])
    np.testing.assert_allclose(np.trace(reached @ np.asarray(covariance) @ reached.T), values[-1], **CLOSE)


# ---------------------------------------------------------------- kernel contrastive


def gaussian_kernel(points):
    return jnp.exp(-jnp.sum((points[:, None, :] - points[None, :, :]) ** 2, axis=2) / 2)


GRAMS = {
    "full rank": lambda seed: gaussian_kernel(normal(seed, 3 * N, 3)),
    "repeated points": lambda seed: gaussian_kernel(jnp.tile(normal(seed, N, 3), (3, 1))[np.arange(3 * N) % 7]),
    "linear": lambda seed: (lambda z: z @ z.T)(normal(seed, 3 * N, 4)),
}
best_features = jax.jit(kernel_contrastive, static_argnums=1)


@pytest.mark.parametrize("kind", GRAMS)
def test_kernel_features_are_orthonormal_and_reach_the_eigenvalue_sum(x64, kind):
    for seed in SEEDS:
        gram = GRAMS[kind](seed)
        best = best_features(gram, 2)
        a = np.asarray(best.coefficients)
        # Rounding of the Gram matrix counts relative to its smallest eigenvalue that is kept: largest over smallest is
        # at most 1.1e3 here, times eps 2e-13.
        np.testing.assert_allclose(a.T @ np.asarray(gram) @ a, np.eye(2), atol=1e-9)
        f = gram @ best.coefficients
        value = N * losses.linear(f[:N], f[N : 2 * N], f[2 * N :])
        np.testing.assert_allclose(value, best.loss, rtol=1e-9)
        np.testing.assert_allclose(best.loss, jnp.sum(best.eigenvalues), **CLOSE)


@pytest.mark.parametrize("kind", GRAMS)
def test_no_orthonormal_features_beat_the_kernel_optimum(x64, kind):
    gram = GRAMS[kind](1)
    best = best_features(gram, 2)
    values, vectors = np.linalg.eigh(np.asarray(gram))
    kept = values > 1e-9 * values[-1]
    points = vectors[:, kept] * np.sqrt(values[kept])
    for seed in range(50):
        w = np.linalg.qr(np.asarray(normal(seed, points.shape[1], 2)))[0]
        x, p, n = np.split(points @ w, 3)
        assert np.sum(x * (n - p)) >= best.loss - 1e-10


def test_linear_kernel_gives_the_eigenvalues_of_the_primal_problem(x64):
    for seed in SEEDS:
        z = normal(seed, 3 * N, 4)
        x, p, n = jnp.split(z, 3)
        cross = np.asarray(x.T @ (n - p))
        expected = np.linalg.eigvalsh((cross + cross.T) / 2)
        best = best_features(z @ z.T, 4)
        np.testing.assert_allclose(best.eigenvalues, expected, rtol=1e-9, atol=1e-10)
        assert best.negative == np.sum(expected < 0)


def test_equal_positives_and_negatives_give_loss_zero(x64):
    z = normal(0, N, 3)
    points = jnp.concatenate([z, z[::-1], z[::-1]])
    best = best_features(points @ points.T, 3)
    np.testing.assert_allclose(best.eigenvalues, 0, atol=1e-12)
    a = best.coefficients
    np.testing.assert_allclose(a.T @ (points @ points.T) @ a, np.eye(3), atol=1e-9)
    assert best.negative == 0


def test_more_features_than_negative_eigenvalues_do_worse_inside_the_span_than_outside(x64):
    z = normal(2, 3 * N, 4)
    best = best_features(z @ z.T, 4)
    assert best.negative == 2  # of these points
    fewer = best_features(z @ z.T, 2)
    assert fewer.loss < best.loss  # features that vanish on the points would give the loss of `fewer`


# ---------------------------------------------------------------- class collision


MARGIN_LOSSES = {
    "logistic, base 2": lambda m: jax.nn.softplus(-m) / math.log(2),
    "hinge": lambda m: jax.nn.relu(1 - m),
    "exponential": lambda m: jnp.exp(-m),
    "logistic, base e": lambda m: jax.nn.softplus(-m),
}


def classes(seed, count=3):
    rng = generator(5, seed)
    return jnp.asarray(rng.dirichlet(np.ones(count))), jnp.asarray(rng.dirichlet(0.5 * np.ones(N), size=count))


@functools.cache
def collision_of(name):
    return jax.jit(functools.partial(class_collision, loss=MARGIN_LOSSES[name]))


def test_class_collision_equals_its_naive_loops(x64):
    prior, conditionals = classes(0)
    f = normal(0, N, 2)
    found = collision_of("hinge")(prior, conditionals, f)
    rho, d, s = np.asarray(prior), np.asarray(conditionals), np.asarray(f @ f.T)
    unsupervised = supervised = 0.0
    for c, e in itertools.product(range(3), repeat=2):
        for x in range(N):
            gap = sum((d[c, y] - d[e, y]) * s[x, y] for y in range(N))
            supervised += (c != e) * rho[c] * rho[e] * d[c, x] * max(0.0, 1 - gap)
            for y, w in itertools.product(range(N), repeat=2):
                unsupervised += rho[c] * rho[e] * d[c, x] * d[c, y] * d[e, w] * max(0.0, 1 - s[x, y] + s[x, w])
    collision = np.sum(rho**2)
    expected = supervised / (1 - collision), unsupervised, collision, (unsupervised - collision) / (1 - collision)
    np.testing.assert_allclose(found, expected, **CLOSE)


@pytest.mark.parametrize("name", MARGIN_LOSSES)
def test_mean_classifier_is_bounded_by_the_contrastive_loss(x64, name):
    for seed in range(40):
        found = collision_of(name)(*classes(seed), 10 ** ((seed % 5) / 2 - 1.5) * normal(seed, N, 2))
        assert found.supervised <= found.bound * (1 + 1e-12)


@pytest.mark.parametrize("name", MARGIN_LOSSES)
def test_bound_is_tight_for_embeddings_that_are_constant_on_classes(x64, name):
    prior, _ = classes(1)
    conditionals = jnp.kron(jnp.eye(3), jnp.full((1, 2), 0.5))
    found = collision_of(name)(prior, conditionals, jnp.repeat(normal(0, 3, 2), 2, axis=0))
    np.testing.assert_allclose(found.supervised, found.bound, **CLOSE)


def test_bound_without_the_loss_at_zero_fails_for_the_natural_logarithm(x64):
    found = collision_of("logistic, base e")(*classes(2), 0.01 * normal(0, N, 2))
    assert found.supervised > (found.unsupervised - found.collision) / (1 - found.collision)


def test_a_class_without_mass_does_not_matter(x64):
    prior, conditionals = classes(3, count=2)
    wider = jnp.concatenate([prior, jnp.zeros(1)]), jnp.concatenate([conditionals, conditionals[:1]])
    f = normal(0, N, 2)
    hinge = collision_of("hinge")
    np.testing.assert_allclose(hinge(*wider, f), hinge(prior, conditionals, f), **CLOSE)


# ---------------------------------------------------------------- types and bad input


def test_single_precision_stays_single():
    joint = jnp.asarray(generator(0).dirichlet(np.ones(N)), jnp.float32)
    joint = (joint[:, None] + joint[None, :]) / (2 * N)
    f = jnp.ones((N, 2), jnp.float32)
    found = quickly(
        lambda joint, f: (
            spectral_optimum(joint, 2),
            cross_spectral_optimum(joint, 2),
            kernel_contrastive(jnp.eye(N, dtype=jnp.float32), 2)[:3],
            pair_weights(f, f, others(f), phi=jnp.log1p, psi=jnp.exp),
        ),
        joint,
        f,
    )
    assert all(leaf.dtype == jnp.float32 and np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(found))


JOINT = np.full((2, 2), 0.25, np.float32)
PAIR = np.zeros((2, 1), np.float32)
BAD = {
    "joint of counts": (lambda: normalised_adjacency(jnp.ones((2, 2))), ValueError, "divide by its sum"),
    "negative": (lambda: pair_kernel(jnp.asarray([[1.5, -0.5]])), ValueError, "negative or not finite"),
    "NaN": (lambda: pair_kernel(jnp.asarray([[np.nan, 1.0]])), ValueError, "negative or not finite"),
    "vector": (lambda: pair_kernel(jnp.ones(2) / 2), ValueError, r"give probabilities of pairs, \(n, m\)"),
    "integers": (lambda: pair_kernel(jnp.eye(2, dtype=int)), TypeError, "real floating point"),
    "NumPy": (lambda: pair_kernel(JOINT), TypeError, "pass a JAX array"),
    "not symmetric": (lambda: pair_spectrum(jnp.asarray([[0.5, 0.5], [0.0, 0.0]])), ValueError, "take \\(P"),
    "not square": (lambda: pair_spectrum(jnp.asarray([[0.5, 0.5]])), ValueError, "one encoder"),
    "k = 0": (lambda: spectral_optimum(jnp.asarray(JOINT), 0), ValueError, "from 1 to 2"),
    "k too large": (lambda: cross_spectral_optimum(jnp.asarray([[0.5, 0.5]]), 2), ValueError, "from 1 to 1"),
    "embeddings": (
        lambda: spectral_loss(jnp.asarray(JOINT), jnp.ones((3, 1)), jnp.ones((2, 1))),
        ValueError,
        "one row for each point",
    ),
    "one row": (lambda: others(jnp.ones((1, 2))), ValueError, "at least two rows"),
    "negatives": (
        lambda: pair_loss(jnp.asarray(PAIR), jnp.asarray(PAIR), jnp.asarray(PAIR), phi=jnp.log1p, psi=jnp.exp),
        ValueError,
        "as `others`",
    ),
    "weights": (
        lambda: contrastive_covariance(jnp.ones((2, 2)), jnp.asarray(PAIR), jnp.asarray(PAIR), jnp.ones((2, 1, 1))),
        ValueError,
        "one for each",
    ),
    "not in threes": (lambda: kernel_contrastive(jnp.eye(4), 1), ValueError, "3 n rows"),
    "asymmetric Gram": (lambda: kernel_contrastive(jnp.triu(jnp.ones((3, 3))), 1), ValueError, "symmetrise it"),
    "infinite Gram": (lambda: kernel_contrastive(jnp.full((3, 3), jnp.inf), 1), ValueError, "NaN or infinity"),
    "h beyond the rank": (lambda: kernel_contrastive(jnp.ones((3, 3)), 2), ValueError, "ask for fewer"),
    "one class": (
        lambda: class_collision(jnp.ones(1), jnp.ones((1, 2)) / 2, jnp.asarray(PAIR), loss=jnp.exp),
        ValueError,
        "give two classes",
    ),
    "prior": (
        lambda: class_collision(jnp.ones(2), jnp.ones((2, 2)) / 2, jnp.asarray(PAIR), loss=jnp.exp),
        ValueError,
        "prior sums to 2",
    ),
    "classes": (
        lambda: class_collision(jnp.ones(2) / 2, jnp.ones((2, 3)) / 3, jnp.asarray(PAIR), loss=jnp.exp),
        ValueError,
        "do not match",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named_with_its_remedy(as_users_run, case):
    call, error, message = BAD[case]
    with pytest.raises(error, match=message):
        call()
