"""S5 beside `spectral_dynamics`: starts, the kernel form against features, and chance for Gram matrices."""

import jax.numpy as jnp
import numpy as np

from theorykit.spectral import stepwise

NULL_DRAWS = 2000  # 1000 are the least at the level of the gate
SHUFFLES = 16  # orders that the control averages over, so that no lucky one decides


def starts(config, outputs, pairs):
    """Weights (seeds, d, m) of unit size at the start."""
    draws = [np.random.default_rng([s, 7]).standard_normal((outputs, pairs[0].shape[1])) for s in range(config.seeds)]
    return jnp.asarray(np.stack(draws))


def null(gram, k):
    """Relative errors (draws,) of Gram matrices with the k eigenvalues of the predicted one, along random modes."""
    values = np.linalg.eigvalsh(gram)[::-1][:k]
    draws = np.random.default_rng(13).standard_normal((NULL_DRAWS, len(gram), k))
    # |A - B|^2 = 2 |A|^2 - 2 Tr AB, where Tr AB has the squared cosines between modes.
    cosines = np.linalg.qr(draws)[0][:, :k] ** 2
    return np.sqrt(np.maximum(2 - 2 * (cosines @ values @ values) / np.sum(values**2), 0))


def shuffled(trained, gram):
    """Relative errors (seeds,) of the trained Gram matrices in other orders of rows and columns, means over those."""
    orders = np.random.default_rng(14).permuted(np.tile(np.arange(len(gram)), (SHUFFLES, 1)), axis=1)
    errors = [np.linalg.norm(trained[:, order][:, :, order] - gram, axis=(1, 2)) for order in orders]
    return np.mean(errors, axis=0) / np.linalg.norm(gram)


def kernel_form(config, pairs):
    """Eigenvalues, sizes at the start and embeddings of held-out points in kernel form, and of features; (entries,).

    For the control the second views are in another order, so that P swaps views of different samples.
    """
    a, b, heldout = pairs
    n = len(a)
    outputs, w0 = config.outputs, starts(config, config.outputs, pairs)
    found, views = {}, np.concatenate([a, b])
    for name, order in (("kernel", np.arange(2 * n)), ("other", np.r_[:n, n + 1 : 2 * n, n])):
        x = views[order]
        modes = stepwise.kernel_modes(jnp.asarray(x @ x.T), outputs)
        scales = jnp.asarray(np.asarray(modes.eigenvalues) ** -0.5)
        f = np.asarray(stepwise.kernel_embedding(jnp.asarray(heldout @ x.T), modes.coefficients, scales))
        sizes = [stepwise.kernel_initial_sizes(x @ w.T, modes.coefficients) for w in w0]
        found[name] = modes.eigenvalues, sizes, f @ f.T
    modes = stepwise.modes(stepwise.cross_moment(jnp.asarray(a), jnp.asarray(b)), outputs)
    f = heldout @ np.asarray(modes.directions) * np.asarray(modes.eigenvalues) ** -0.5
    found["features"] = modes.eigenvalues, [stepwise.initial_sizes(w, modes.directions) for w in w0], f @ f.T
    sizes = [np.max(np.abs(part)) for part in found["features"]]
    return {
        f"kernel form/{name}": np.concatenate([np.ravel(np.asarray(v) / s) for v, s in zip(parts, sizes, strict=True)])
        for name, parts in found.items()
    }
