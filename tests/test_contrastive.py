"""Spectra of finite joints and the spectral loss: identities, gradients, batch losses; degenerate joints."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compilation import quickly
from finite_joints import CLOSE, K, N, expected_over_batches, generator, normal, on_scores, rectangular

from theorykit import losses
from theorykit.spectral.contrastive import (
    cross_spectral_optimum,
    normalised_adjacency,
    pair_kernel,
    pair_spectrum,
    spectral_loss,
    spectral_optimum,
)

SEEDS = range(5)


def symmetric(weights):
    return (weights + weights.T) / (2 * weights.sum())


def dense(rng):
    return symmetric(rng.gamma(0.5, size=(N, N)))


def without_mass(rng):
    weights = rng.gamma(0.5, size=(N, N))
    empty = rng.permutation(N)[:2]
    weights[empty], weights[:, empty] = 0, 0
    return symmetric(weights)


def disconnected(rng):
    weights = np.zeros((N, N))
    weights[: N // 2, : N // 2], weights[N // 2 :, N // 2 :] = rng.gamma(1.0, size=(2, N // 2, N // 2))
    order = rng.permutation(N)
    return symmetric(weights[np.ix_(order, order)])


def ring(rng):
    """The walk on a ring: eigenvalues in pairs, and half of them negative."""
    step = np.roll(np.eye(N), 1, axis=0)
    order = rng.permutation(N)
    return symmetric(step[np.ix_(order, order)])


def bipartite(rng):
    """Pairs always join the two halves: the spectrum is symmetric about 0."""
    weights = np.zeros((N, N))
    weights[: N // 2, N // 2 :] = rng.gamma(1.0, size=(N // 2, N // 2))
    return symmetric(weights)


def identical(rng):
    """Both views are the same point: every eigenvalue is 1."""
    return np.diag(rng.dirichlet(np.ones(N)))


JOINTS = {f.__name__: f for f in (dense, without_mass, disconnected, ring, bipartite, identical)}
every_joint = pytest.mark.parametrize("kind", JOINTS)
compiled = {f.__name__: jax.jit(f) for f in (normalised_adjacency, pair_kernel, pair_spectrum, spectral_loss)}
compiled |= {f.__name__: jax.jit(f, static_argnums=1) for f in (spectral_optimum, cross_spectral_optimum)}
loss_of_one = jax.jit(lambda joint, f: spectral_loss(joint, f, f))
gradient_of_one = jax.jit(jax.grad(lambda joint, f: spectral_loss(joint, f, f), argnums=1))


def joints(kind):
    for seed in SEEDS:
        yield jnp.asarray(JOINTS[kind](generator(seed)))


# ---------------------------------------------------------------- joints of positive pairs


@every_joint
def test_adjacency_has_largest_singular_value_one(x64, kind):
    for joint in joints(kind):
        adjacency, mass = np.asarray(compiled["normalised_adjacency"](joint)), np.asarray(joint.sum(1))
        for a, b in itertools.product(range(N), repeat=2):
            expected = joint[a, b] / math.sqrt(mass[a] * mass[b]) if mass[a] * mass[b] else 0.0
            np.testing.assert_allclose(adjacency[a, b], expected, **CLOSE)
        np.testing.assert_allclose(np.linalg.norm(adjacency, 2), 1, **CLOSE)


@every_joint
def test_eigenfunctions_are_orthonormal_and_expand_the_positive_pair_kernel(x64, kind):
    for joint in joints(kind):
        values, functions, marginal = compiled["pair_spectrum"](joint)
        count = int(np.sum(np.asarray(marginal) > 0))
        gram = np.asarray(functions.T @ (marginal[:, None] * functions))
        np.testing.assert_allclose(gram, np.diag(np.arange(N) < count), **CLOSE)
        kernel = compiled["pair_kernel"](joint)
        np.testing.assert_allclose((functions * values[None, :]) @ functions.T, kernel, rtol=1e-9, atol=1e-9)
        assert np.all(np.diff(np.asarray(values)[:count]) <= 0) and not np.any(values[count:])


@every_joint
def test_constants_are_eigenfunctions_of_eigenvalue_one(x64, kind):
    for joint in joints(kind):
        marginal = jnp.sum(joint, axis=1)
        np.testing.assert_allclose(compiled["pair_kernel"](joint) @ marginal, marginal > 0, **CLOSE)


def test_a_connected_joint_has_a_constant_first_eigenfunction(x64):
    for joint in joints("dense"):
        values, functions, _ = compiled["pair_spectrum"](joint)
        np.testing.assert_allclose(jnp.abs(functions[:, 0]), np.ones(N), **CLOSE)
        assert values[1] < 1 - 1e-6


def test_every_connected_component_has_an_eigenvalue_one(x64):
    for joint in joints("disconnected"):
        values = compiled["pair_spectrum"](joint).eigenvalues
        np.testing.assert_allclose(values[:2], 1, **CLOSE)
        assert values[2] < 1 - 1e-6


@every_joint
def test_variation_over_pairs_is_read_off_the_eigenvalues(x64, kind):
    for seed, joint in enumerate(joints(kind)):
        values, functions, marginal = compiled["pair_spectrum"](joint)
        g = normal(seed, N)
        c = functions.T @ (marginal * g)
        variation = jnp.sum(joint * (g[:, None] - g[None, :]) ** 2)
        np.testing.assert_allclose(variation, jnp.sum((2 - 2 * values) * c**2), **CLOSE)


@pytest.mark.parametrize("factor", ["none", "by anchor"])
@pytest.mark.parametrize("loss", [losses.logistic, losses.info_nce])
def test_log_of_the_pair_kernel_is_stationary_for_the_batch_loss(x64, loss, factor):
    joint = rectangular(0)
    shift = normal(0, 3, 1) if factor == "by anchor" else jnp.zeros((3, 1))
    gradient = jax.jit(jax.grad(lambda s: expected_over_batches(joint, 2, on_scores(loss, s))))
    found = gradient(jnp.log(pair_kernel(joint)) + shift)
    if factor == "none" or loss is losses.info_nce:
        np.testing.assert_allclose(found, 0, atol=1e-14)
    else:  # the logistic loss fixes the factor as well
        assert np.max(np.abs(found)) > 1e-3


def test_the_pair_kernel_is_stationary_for_the_spectral_loss(x64):
    joint = rectangular(1)
    gradient = jax.jit(jax.grad(lambda s: spectral_loss(joint, s, jnp.eye(2))))
    np.testing.assert_allclose(gradient(pair_kernel(joint)), 0, atol=1e-14)


# ---------------------------------------------------------------- the spectral loss


def test_spectral_loss_is_the_batch_loss_of_the_listed_pairs(x64):
    a, b = generator(1).integers(0, (4, 5), (9, 2)).T  # with repeats, and a point without mass
    counts = np.zeros((4, 5))
    np.add.at(counts, (a, b), 1)
    assert counts.max() > 1 and not counts.sum(axis=0).all()
    f, g = normal(0, 4, K), normal(1, 5, K)
    both = quickly(lambda f, g: (spectral_loss(jnp.asarray(counts / 9), f, g), losses.spectral(f[a], g[b])), f, g)
    np.testing.assert_allclose(*both, **CLOSE)


@every_joint
def test_spectral_loss_is_a_factorisation_error(x64, kind):
    for seed, joint in enumerate(joints(kind)):
        f, g, root = normal(seed, N, K), normal(seed + 50, N, K), jnp.sqrt(jnp.sum(joint, axis=1))[:, None]
        adjacency = compiled["normalised_adjacency"](joint)
        error = jnp.sum((adjacency - (root * f) @ (root * g).T) ** 2) - jnp.sum(adjacency**2)
        np.testing.assert_allclose(compiled["spectral_loss"](joint, f, g), error, **CLOSE)


@every_joint
def test_spectral_optimum_attains_its_loss_and_is_stationary(x64, kind):
    for joint in joints(kind):
        best = compiled["spectral_optimum"](joint, K)
        np.testing.assert_allclose(loss_of_one(joint, best.fa), best.loss, **CLOSE)
        np.testing.assert_allclose(gradient_of_one(joint, best.fa), 0, atol=1e-12)
        reference = np.sort(np.linalg.eigvalsh(np.asarray(compiled["normalised_adjacency"](joint))))[::-1][:K]
        np.testing.assert_allclose(best.loss, -np.sum(np.maximum(reference, 0) ** 2), **CLOSE)


@every_joint
def test_no_embedding_beats_the_spectral_optimum(x64, kind):
    for seed, joint in enumerate(joints(kind)):
        best = compiled["spectral_optimum"](joint, K)
        for trial in range(5):
            step = normal(100 * seed + trial, N, K)
            for size in (1e-3, 0.1, 1.0):
                assert loss_of_one(joint, best.fa + size * step) >= best.loss - 1e-13


def test_dimensions_beyond_the_positive_eigenvalues_stay_empty(x64):
    joint = next(joints("bipartite"))
    best = spectral_optimum(joint, N)
    positive = int(np.sum(np.asarray(best.eigenvalues) > 1e-12))
    assert positive == N // 2
    np.testing.assert_allclose(best.fa[:, positive:], 0, atol=1e-7)  # the square root of a rounded zero
    np.testing.assert_allclose(loss_of_one(joint, best.fa), best.loss, **CLOSE)


@every_joint
def test_two_encoders_reach_the_singular_values(x64, kind):
    for seed, joint in enumerate(joints(kind)):
        best = compiled["cross_spectral_optimum"](joint, K)
        value = compiled["spectral_loss"](joint, best.fa, best.fb)
        np.testing.assert_allclose(value, best.loss, **CLOSE)
        assert best.loss <= compiled["spectral_optimum"](joint, K).loss + 1e-12
        change = 0.1 * normal(seed, N, K)
        assert compiled["spectral_loss"](joint, best.fa + change, best.fb) >= best.loss - 1e-13


def test_two_encoders_of_unequal_alphabets_factorise_the_joint(x64):
    joint = rectangular(2, (5, 3))
    best = cross_spectral_optimum(joint, 3)
    np.testing.assert_allclose(best.fa @ best.fb.T, pair_kernel(joint), **CLOSE)


def test_encoders_are_determined_up_to_an_invertible_map(x64):
    joint = rectangular(3, (5, 4))
    best, p = compiled["cross_spectral_optimum"](joint, 2), np.asarray(normal(1, 2, 2))
    f, g = np.asarray(best.fa), np.asarray(best.fb)
    moved = f @ p.T, g @ np.linalg.inv(p)
    np.testing.assert_allclose(compiled["spectral_loss"](joint, *map(jnp.asarray, moved)), best.loss, **CLOSE)
    assert np.max(np.abs(moved[0] @ moved[0].T - f @ f.T)) > 0.1  # the Gram matrix is not determined
