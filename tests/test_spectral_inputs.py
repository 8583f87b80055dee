"""Complex numbers, NaN and infinity at the entry points of `spectral`: refused, or handed on as NaN."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from theorykit.spectral import cca, collapse, contrastive, eigenmaps, gaussian, stepwise, stiefel
from theorykit.spectral._checks import check_values

N, M = 6, 3


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


X, Y, Z = normal(0, N, M), normal(1, N, M), normal(2, M, M)
EYE, TIMES, HALF = np.eye(M, dtype=np.float32), np.ones(2, np.float32), np.full(2, 0.5, np.float32)
GRAM = X @ X.T
JOINT = np.full((N, N), 1 / N**2, np.float32)
WEIGHTS = np.full((N, N), 1 / N, np.float32)
TRIPLETS = X, Y, np.repeat(Y[None, 1:], N, axis=0)
PAIR_FORM = {"phi": jnp.log1p, "psi": jnp.exp}


def descend(w0):
    return stiefel.stiefel_descent(lambda w: jnp.sum(w[0]), w0, steps=1, learning_rate=0.1)


# Predictions from data: function, good arguments. Each array in turn is spoilt.
REFUSING = {
    "kernel_cca": (lambda kx, ky: cca.kernel_cca(kx, ky, 1, ridge=0.1), (GRAM, GRAM)),
    "stiefel_descent": (descend, (EYE[:, :2],)),
    "grassmann_distance": (stiefel.grassmann_distance, (EYE[:, :2], EYE[:, 1:])),
    "normalised_adjacency": (contrastive.normalised_adjacency, (JOINT,)),
    "pair_kernel": (contrastive.pair_kernel, (JOINT,)),
    "pair_spectrum": (contrastive.pair_spectrum, (JOINT,)),
    "spectral_optimum": (lambda p: contrastive.spectral_optimum(p, 1), (JOINT,)),
    "cross_spectral_optimum": (lambda p: contrastive.cross_spectral_optimum(p, 1), (JOINT,)),
    "kernel_contrastive": (lambda k: contrastive.kernel_contrastive(k, 1), (GRAM,)),
    "class_collision": (
        lambda prior, given: contrastive.class_collision(prior, given, jnp.ones((N, 1)), loss=jnp.exp),
        (HALF, JOINT[:2] * N),
    ),
    "vicreg_optimum": (lambda p, k: eigenmaps.vicreg_optimum(p, k, 1, invariance=0.5, ridge=0.1), (JOINT, GRAM)),
    "laplacian_eigenmaps": (lambda graph: eigenmaps.laplacian_eigenmaps(graph, 1), (JOINT,)),
    "cross_moment": (stepwise.cross_moment, (X, Y)),
    "modes": (lambda g: stepwise.modes(g, 1), (EYE,)),
    "initial_sizes": (stepwise.initial_sizes, (Z, EYE[:, :2])),
    "learning_times": (stepwise.learning_times, (HALF, HALF)),
    "kernel_modes": (lambda k: stepwise.kernel_modes(k, 1), (np.eye(4, dtype=np.float32),)),
    "kernel_initial_sizes": (stepwise.kernel_initial_sizes, (X, Y[:, :2])),
    "drift_matrix": (collapse.drift_matrix, (X, Y, WEIGHTS)),
    "frozen_flow": (collapse.frozen_flow, (Z, EYE, TIMES)),
    "info_nce_strengths": (gaussian.info_nce_strengths, (HALF,)),
    "info_nce_optimum": (lambda s, c: gaussian.info_nce_optimum(s, c, 1), (EYE, EYE)),
    "info_nce_shift": (gaussian.info_nce_shift, (HALF,)),
    "clip_optimum": (lambda a, b, c: gaussian.clip_optimum(a, b, c, 1), (EYE, EYE, EYE / 2)),
    "clip_shift": (gaussian.clip_shift, (HALF,)),
}
# Losses, velocities and formulas, which are differentiated and integrated, mostly inside jit.
HANDING_ON = {
    "retract_qr": (stiefel.retract_qr, (EYE[:, :2], Z[:, :2])),
    "retract_cayley": (stiefel.retract_cayley, (EYE[:, :2], Z[:, :2])),
    "pair_loss": (lambda *z: contrastive.pair_loss(*z, **PAIR_FORM), TRIPLETS),
    "graph_energy": (eigenmaps.graph_energy, (JOINT, X)),
    "moment_loss": (stepwise.moment_loss, (X, Y)),
    "velocity": (stepwise.velocity, (Z, EYE)),
    "sizes": (stepwise.sizes, (TIMES, HALF, HALF)),
    "weight_gram": (stepwise.weight_gram, (Z[:, :2], HALF)),
    "kernel_embedding": (stepwise.kernel_embedding, (GRAM, X[:, :2], HALF)),
    "squared_distance_loss": (collapse.squared_distance_loss, (X, Y)),
    "two_layer_velocity": (collapse.two_layer_velocity, (Z, Z, EYE)),
    "conserved": (collapse.conserved, (Z, Z)),
    "two_layer_modes": (collapse.two_layer_modes, (TIMES, -HALF, HALF, HALF / 2)),
    "info_nce_limit": (gaussian.info_nce_limit, (Z, EYE, EYE)),
    "info_nce_correction": (gaussian.info_nce_correction, (HALF, HALF)),
    "clip_limit": (gaussian.clip_limit, (Z, EYE, EYE, EYE)),
}


def spoilt(arguments, number):
    """The arguments with that number in the middle of one of them, for each of them."""
    for i, array in enumerate(arguments):
        bad = array.astype(np.result_type(array, np.complex64) if isinstance(number, complex) else array.dtype)
        bad[tuple(n // 2 for n in bad.shape)] = number
        yield [jnp.asarray(bad if i == j else other) for j, other in enumerate(arguments)]


@pytest.mark.usefixtures("as_users_run")
@pytest.mark.parametrize("name", REFUSING)
def test_predictions_refuse_numbers_that_are_not_real_and_finite(name):
    function, good = REFUSING[name]
    for number in (np.nan, np.inf):
        for arguments in spoilt(good, number):
            with pytest.raises(ValueError, match=r"NaN|not finite"):
                function(*arguments)
    for arguments in spoilt(good, 1j):
        with pytest.raises(TypeError, match=r"complex"):
            function(*arguments)


@pytest.mark.parametrize("name", HANDING_ON)
def test_formulas_hand_on_a_nan(name):
    function, good = HANDING_ON[name]
    for arguments in spoilt(good, np.nan):
        assert any(np.any(np.isnan(leaf)) for leaf in jax.tree.leaves(function(*arguments)))


@pytest.mark.parametrize("retraction", stiefel.RETRACTIONS)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_step_that_is_not_finite_leaves_no_entry_finite(retraction, bad):
    retract = stiefel.RETRACTIONS[retraction]
    w = jnp.asarray(np.linalg.qr(normal(3, 5, 2))[0])
    for step in (jnp.full_like(w, bad), jnp.zeros_like(w).at[3, 0].set(bad), jnp.zeros_like(w).at[3, 1].set(bad)):
        assert np.all(np.isnan(retract(w, step)))


def test_bases_that_are_not_orthonormal_have_no_grassmann_distance():
    good = jnp.asarray(np.linalg.qr(normal(3, 5, 2))[0])
    for bad in (1.01 * good, jnp.asarray(normal(4, 5, 2))):
        for pair, name in (((bad, good), "u"), ((good, bad), "v")):
            with pytest.raises(ValueError, match=rf"columns of {name} are not orthonormal; pass orthonormal_basis"):
                stiefel.grassmann_distance(*pair)
            assert np.isnan(jax.jit(stiefel.grassmann_distance)(*pair))


def test_checks_of_values_leave_nothing_in_a_program_and_compile_nothing(caplog):
    def check(x):
        check_values("check", x=x)
        return x

    x = jnp.asarray(normal(5, 7, 5))  # a shape of its own
    assert not jax.make_jaxpr(check)(x).eqns
    with jax.log_compiles():
        check(x)
        assert "Compiling" not in caplog.text
        jax.jit(lambda x: x + 1)(x)  # the control
    assert "Compiling" in caplog.text
