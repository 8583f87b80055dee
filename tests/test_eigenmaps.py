"""VICReg-like optima and Laplacian eigenmaps: values, gradients, references; degenerate joints, graphs and kernels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compilation import quickly
from finite_joints import CLOSE, K, N, generator

from theorykit import losses
from theorykit.spectral.contrastive import spectral_optimum
from theorykit.spectral.eigenmaps import (
    graph_energy,
    laplacian_eigenmaps,
    vicreg_like_loss,
    vicreg_optimum,
)

D = 4
BETA, RIDGE = 0.4, 0.02


def normal(seed, *shape):
    return jnp.asarray(generator(9, seed).standard_normal(shape))


def symmetric(weights):
    return weights + weights.T


def dense(rng):
    return symmetric(rng.gamma(0.5, size=(N, N)))


def isolated(rng):
    """Two points in no pair."""
    weights = rng.gamma(0.5, size=(N, N))
    weights[:2], weights[:, :2] = 0, 0
    return symmetric(weights)


def disconnected(rng):
    weights = np.zeros((N, N))
    weights[:3, :3], weights[3:, 3:] = rng.gamma(1.0, size=(2, 3, 3))
    return symmetric(weights)


def ring(rng):
    """Eigenvalues in pairs."""
    return symmetric(np.roll(np.eye(N), 1, axis=0))


GRAPHS = {f.__name__: f for f in (dense, isolated, disconnected, ring)}
every_graph = pytest.mark.parametrize("kind", GRAPHS)


def joints(kind):
    for seed in range(4):
        graph = GRAPHS[kind](generator(seed))
        yield jnp.asarray(graph / graph.sum())


def features(kind, seed):
    """Rows whose Gram matrix is the kernel: of full rank, or linear functions of D inputs, fewer than points."""
    return normal(seed, N, N) if kind == "full rank" else normal(seed, N, D)


def total_loss(joint, coefficients, gram, beta, ridge):
    """The loss of functions sum_i k(., x_i) coefficients_i, penalty included."""
    psi = gram @ coefficients
    return vicreg_like_loss(joint, psi, invariance=beta) + 2 * ridge * jnp.sum(coefficients * psi)


loss_of = jax.jit(total_loss)
optimum = jax.jit(
    lambda joint, gram, beta, ridge: vicreg_optimum(joint, gram, K, invariance=beta, ridge=ridge),
)
losses_of_weights = jax.jit(
    jax.vmap(
        lambda w, joint, x: vicreg_like_loss(joint, x @ w, invariance=BETA) + 2 * RIDGE * jnp.sum(w * w),
        in_axes=(0, None, None),
    )
)
gradient_in_weights = jax.jit(
    jax.grad(
        lambda w, joint, x, beta, ridge: vicreg_like_loss(joint, x @ w, invariance=beta) + 2 * ridge * jnp.sum(w * w)
    )
)


# ---------------------------------------------------------------- VICReg-like


def test_vicreg_like_loss_equals_its_naive_loops(x64):
    joint, psi = next(joints("isolated")), normal(0, N, K)
    p, f = np.asarray(joint), np.asarray(psi)
    invariance = sum(p[a, b] * np.sum((f[a] - f[b]) ** 2) for a in range(N) for b in range(N))
    moment = sum(p[a].sum() * np.outer(f[a], f[a]) for a in range(N))
    expected = BETA * invariance + np.sum((moment - np.eye(K)) ** 2)
    np.testing.assert_allclose(vicreg_like_loss(joint, psi, invariance=BETA), expected, **CLOSE)


@every_graph
@pytest.mark.parametrize("kernel", ["full rank", "linear"])
def test_vicreg_optimum_attains_its_loss_and_is_stationary(x64, kind, kernel):
    for seed, joint in enumerate(joints(kind)):
        x = features(kernel, seed)
        gram = x @ x.T
        for ridge in (0.0, RIDGE, 0.3):
            best = optimum(joint, gram, BETA, ridge)
            # Eigenvalues of K spread by up to 6e4 here, and weights reach 50: digits are lost to 1e-11 at worst.
            np.testing.assert_allclose(loss_of(joint, best.coefficients, gram, BETA, ridge), best.loss, rtol=1e-9)
            weights = x.T @ best.coefficients
            np.testing.assert_allclose(x @ weights, best.embeddings, atol=1e-9)
            np.testing.assert_allclose(gradient_in_weights(weights, joint, x, BETA, ridge), 0, atol=1e-9)


@every_graph
def test_no_weights_beat_the_vicreg_optimum(x64, kind):
    for seed, joint in enumerate(joints(kind)):
        x = features("linear", seed)
        best = optimum(joint, x @ x.T, BETA, RIDGE)
        weights = x.T @ best.coefficients
        steps = jnp.asarray([1e-3, 0.1, 1.0])[:, None, None, None] * normal(seed, 1, 8, D, K)
        tried = weights[None] + steps.reshape(-1, D, K)
        assert np.all(losses_of_weights(tried, joint, x) >= best.loss - 1e-12)


@every_graph
def test_free_embeddings_have_the_eigenvalues_of_the_normalised_joint(x64, kind):
    for joint in joints(kind):
        best = optimum(joint, jnp.eye(N), BETA, 0.0)
        mass = np.asarray(joint.sum(1))
        root = np.where(mass > 0, 1 / np.sqrt(np.where(mass > 0, mass, 1)), 0)
        held = mass > 0
        adjacency = (np.asarray(joint) * root[:, None] * root[None, :])[np.ix_(held, held)]
        expected = np.sort((1 - BETA) + BETA * np.linalg.eigvalsh(adjacency))[::-1][:K]
        np.testing.assert_allclose(best.eigenvalues, expected, **CLOSE)


def test_invariance_one_and_no_penalty_give_the_spectral_optimum(x64):
    for joint in joints("dense"):
        best, spectral = optimum(joint, jnp.eye(N), 1.0, 0.0), spectral_optimum(joint, K)
        np.testing.assert_allclose(best.loss, K + spectral.loss, **CLOSE)
        scores = spectral.fa @ spectral.fa.T
        np.testing.assert_allclose(best.embeddings @ best.embeddings.T, scores, rtol=1e-9, atol=1e-9)


def test_a_strong_penalty_leaves_nothing(x64):
    joint, x = next(joints("dense")), features("linear", 0)
    best = optimum(joint, x @ x.T, BETA, 1e3)
    assert best.loss == K and not np.any(best.embeddings) and np.all(best.eigenvalues < 0)


def test_dimensions_beyond_the_rank_of_the_kernel_are_empty(x64):
    joint, x = next(joints("dense")), normal(0, N, 1)
    best = optimum(joint, x @ x.T, BETA, 0.0)
    assert np.isfinite(best.eigenvalues[0]) and np.all(np.isneginf(best.eigenvalues[1:]))
    assert not np.any(best.embeddings[:, 1:])
    np.testing.assert_allclose(loss_of(joint, best.coefficients, x @ x.T, BETA, 0.0), best.loss, **CLOSE)


def test_points_without_mass_take_the_values_of_the_function(x64):
    joint, x = next(joints("isolated")), features("linear", 1)
    best = optimum(joint, x @ x.T, BETA, RIDGE)
    w = x.T @ best.coefficients
    assert np.any(np.abs(best.embeddings[:2]) > 1e-3)
    np.testing.assert_allclose(best.embeddings[:2], x[:2] @ w, rtol=1e-9)
    np.testing.assert_allclose(best.coefficients[:2], 0, atol=1e-12)


# ---------------------------------------------------------------- Laplacian eigenmaps


eigenmaps = jax.jit(laplacian_eigenmaps, static_argnums=1)
energy_of = jax.jit(graph_energy)


@every_graph
def test_energy_equals_its_double_loop_and_the_trace(x64, kind):
    graph, z = GRAPHS[kind](generator(0)), normal(0, N, K)
    f = np.asarray(z)
    loops = sum(graph[i, j] * np.sum((f[i] - f[j]) ** 2) for i in range(N) for j in range(N))
    trace = 2 * np.trace(f.T @ (np.diag(graph.sum(1)) - graph) @ f)
    np.testing.assert_allclose(energy_of(jnp.asarray(graph), z), [loops], **CLOSE)
    np.testing.assert_allclose(trace, loops, **CLOSE)


def test_energy_is_the_invariance_of_vicreg_over_the_listed_edges(x64):
    a, b = generator(1).integers(0, N, (2, 20))
    graph = np.zeros((N, N))
    np.add.at(graph, (a, b), 1)
    z = normal(0, N, K)
    listed = losses.vicreg(z[a], z[b], invariance=20.0, variance=0.0, covariance=0.0)
    np.testing.assert_allclose(energy_of(jnp.asarray(graph), z), listed, **CLOSE)


@every_graph
def test_eigenmaps_are_centred_white_and_attain_their_energy(x64, kind):
    for seed in range(4):
        graph = jnp.asarray(GRAPHS[kind](generator(seed)))
        best = eigenmaps(graph, K)
        np.testing.assert_allclose(best.embeddings.T @ best.embeddings, N * np.eye(K), atol=1e-11)
        np.testing.assert_allclose(jnp.sum(best.embeddings, axis=0), 0, atol=1e-12)
        laplacian = np.diag(np.asarray(graph).sum(1)) - np.asarray(graph)
        ranked = np.linalg.eigvalsh(laplacian)
        scale = 2 * N * ranked[-1]
        np.testing.assert_allclose(best.eigenvalues, ranked[1 : K + 1], atol=1e-13 * scale)
        np.testing.assert_allclose(energy_of(graph, best.embeddings), best.energy, atol=1e-12 * scale)


@every_graph
def test_no_centred_white_embedding_beats_the_eigenmaps(x64, kind):
    for seed in range(4):
        graph = jnp.asarray(GRAPHS[kind](generator(seed)))
        best = eigenmaps(graph, K)
        for trial in range(20):
            free = np.asarray(normal(100 * seed + trial, N, K))
            z = np.sqrt(N) * np.linalg.qr(free - free.mean(axis=0))[0]
            assert energy_of(graph, jnp.asarray(z)) >= best.energy - 1e-10


def test_every_further_component_has_an_eigenvalue_zero(x64):
    graph = jnp.asarray(disconnected(generator(0)))
    best = eigenmaps(graph, K)
    assert abs(best.eigenvalues[0]) < 1e-12 < best.eigenvalues[1]
    signs = np.sign(np.asarray(best.embeddings[:, 0]))
    assert np.all(signs[:3] == signs[0]) and np.all(signs[3:] == -signs[0])


def test_negative_weights_are_ranked_without_the_constant(x64):
    graph = jnp.asarray(-dense(generator(0)))  # every eigenvalue but that of the constant is negative
    best = eigenmaps(graph, K)
    laplacian = np.diag(np.asarray(graph).sum(1)) - np.asarray(graph)
    ranked = np.linalg.eigvalsh(laplacian)
    np.testing.assert_allclose(best.eigenvalues, ranked[:K], atol=1e-12)
    np.testing.assert_allclose(energy_of(graph, best.embeddings), best.energy, **CLOSE)
    assert best.energy < 2 * N * np.sum(ranked[1 : K + 1]) - 1  # lambda_2 and on is not the minimum here


def test_a_graph_without_edges_has_no_energy(x64):
    best = eigenmaps(jnp.zeros((N, N)), K)
    np.testing.assert_allclose(best.energy, 0, atol=1e-12)
    np.testing.assert_allclose(best.embeddings.T @ best.embeddings, N * np.eye(K), atol=1e-12)
    np.testing.assert_allclose(jnp.sum(best.embeddings, axis=0), 0, atol=1e-12)


def test_eigenmaps_do_not_depend_on_the_unit_of_the_weights(x64):
    graph = jnp.asarray(dense(generator(0)))
    best, small = eigenmaps(graph, K), eigenmaps(1e-30 * graph, K)
    np.testing.assert_allclose(small.eigenvalues, 1e-30 * best.eigenvalues, rtol=1e-10, atol=0)


# ---------------------------------------------------------------- types and bad input


def test_single_precision_stays_single():
    graph = jnp.asarray(dense(generator(0)), jnp.float32)
    joint, eye = graph / jnp.sum(graph), jnp.eye(N, dtype=jnp.float32)
    found = quickly(
        lambda joint, graph, eye: (
            vicreg_optimum(joint, eye, K, invariance=BETA, ridge=0),
            laplacian_eigenmaps(graph, K),
            vicreg_like_loss(joint, eye, invariance=1),
        ),
        joint,
        graph,
        eye,
    )
    assert all(leaf.dtype == jnp.float32 and np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(found))


JOINT, SKEW = np.full((2, 2), 0.25, np.float32), np.asarray([[0, 1], [0, 0]], np.float32)


def solve(joint=JOINT, gram=JOINT, k=1, **settings):
    settings = {"invariance": 0.5, "ridge": 0.1} | settings
    return vicreg_optimum(jnp.asarray(joint, jnp.float32), jnp.asarray(gram, jnp.float32), k, **settings)


BAD = {
    "joint of counts": (lambda: solve(joint=np.ones((2, 2))), "divide by its sum"),
    "joint not symmetric": (lambda: solve(joint=SKEW), "both orders of a pair"),
    "gram not symmetric": (lambda: solve(gram=SKEW), "symmetrise it"),
    "gram of other points": (lambda: solve(gram=np.eye(3)), "over the same n points"),
    "k": (lambda: solve(k=3), "from 1 to 2"),
    "ridge": (lambda: solve(ridge=-1.0), "ridge is -1.0; give a finite number"),
    "invariance": (lambda: solve(invariance=np.inf), "invariance is inf"),
    "psi": (
        lambda: vicreg_like_loss(jnp.asarray(JOINT), jnp.ones((3, 1)), invariance=1.0),
        "one row for each point",
    ),
    "energy": (lambda: graph_energy(jnp.asarray(JOINT), jnp.ones((3, 1))), r"\(n, n\) and \(n, k\)"),
    "graph not symmetric": (lambda: laplacian_eigenmaps(jnp.asarray(SKEW), 1), "symmetrise it"),
    "graph with NaN": (lambda: laplacian_eigenmaps(jnp.full((3, 3), jnp.nan), 1), "NaN or infinity"),
    "too many dimensions": (lambda: laplacian_eigenmaps(jnp.asarray(JOINT), 2), "from 1 to 1"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named_with_its_remedy(as_users_run, case):
    call, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        call()


def test_arrays_of_numpy_and_integers_are_refused(as_users_run):
    with pytest.raises(TypeError, match="pass a JAX array"):
        laplacian_eigenmaps(JOINT, 1)
    with pytest.raises(TypeError, match="real floating point"):
        graph_energy(jnp.eye(2, dtype=int), jnp.ones((2, 1)))
