"""The left and right halves of digits as two modalities: views of them, pairs of encoders, CCA, what they retrieve."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments._training import finished, parameters
from theorykit import data, encoders, evaluate, losses, similarity, training
from theorykit.ntk import infinite
from theorykit.spectral import cca, compare, pca

LOSSES = {"spectral": losses.spectral, "CLIP": partial(losses.clip, similarity=similarity.dot)}
KS = (1, 5)
# Share of its random function that an encoder starts from. From zero the product of two embeddings has no gradient, and
# what is left of a random function would hide what is learnt.
START = 0.1
MOMENTUM = 0.9  # every step counts ten times


def halves(config, seed: int, n: int):
    """Left and right halves (rows, 32), in float64: n training rows, then the validation and the held-out ones.

    Centred over the training rows, at mean square 1 there. The later rows are the same for every n.
    """
    later = config.validation + config.heldout
    views = (half[np.r_[later : later + n, :later]] for half in _draw(seed, later + max(config.candidates)))
    return tuple((v - v[:n].mean(0)) / v[:n].std() for v in views)


@cache
def _draw(seed, count):
    pairs = data.digit_halves(jax.random.key(seed), count)
    return np.asarray(pairs.a, np.float64), np.asarray(pairs.b, np.float64)


def whitened(rows, n: int, components: int):
    """Leading principal components of the first n rows, at unit variance there, in float32."""
    rows = jnp.asarray(rows, jnp.float32)
    model = pca.pca(rows[:n], components)
    return np.asarray(pca.transform(model, rows)) / np.sqrt(model.variances)


def unmatched(rows, n: int, seed: int):
    """The n training rows of one view in another order."""
    return np.concatenate([rows[:n][np.random.default_rng(seed).permutation(n)], rows[n:]])


def gaussian(a, b, n: int, seed: int):
    """Gaussian pairs with the covariance of whitened views, whitened themselves."""
    drawn = data.gaussian_pairs(jax.random.fold_in(jax.random.key(seed), 1), n, cross=a[:n].T @ b[:n] / (n - 1))
    return tuple(whitened(v, n, v.shape[1]) for v in (drawn.a, drawn.b))


@cache
def encoder(width: int, features: int):
    """A wide ReLU encoder, or for width 0 a linear one; without biases, so that a linear one is a matrix."""
    return encoders.MLP(max(width, 1), features, depth=2 if width else 1, use_bias=False)


def train(encoder, loss: str, a, b, rate: float, steps: list[int]):
    """Train one pair of encoders for each leading entry of a and b (runs, n, d): what `embed` needs, by step."""
    forms, draws = jax.eval_shape(encoder.init, jax.random.key(0), a[0, :1]), np.random.default_rng(0)
    # In NTK parametrisation every weight is N(0, 1).
    start = {
        side: jax.tree.map(lambda form: draws.standard_normal((len(a), *form.shape), np.float32), forms)
        for side in "ab"
    }
    done = training.train(
        _objective(encoder, loss),
        start,
        (start, a, b),
        optimizer=_descent(rate),
        steps=steps[-1],
        metrics=parameters,
        metric_steps=steps,
        progress=False,
    )
    found = jax.device_get(finished(done, f"{loss} training").metrics)
    return [(jax.tree.map(lambda leaf, m=m: leaf[m], found), start) for m in range(len(steps))]


@partial(jax.jit, static_argnums=0)
def embed(encoder, learnt, a, b):
    """Embeddings of both views by all pairs of encoders, (runs, rows, z) each."""
    return jax.vmap(partial(_embed, encoder))(*learnt, a, b)


def _embed(encoder, params, start, a, b):
    def one(params, start, x):
        return encoder.apply(params, x) - (1 - START) * encoder.apply(start, x)

    return one(params["a"], start["a"], a), one(params["b"], start["b"], b)


@cache
def _objective(encoder, loss):
    """Summed losses of independent pairs of encoders, of embeddings that are centred over the batch."""

    def one(params, start, a, b):
        return LOSSES[loss](*(f - jnp.mean(f, axis=0) for f in _embed(encoder, params, start, a, b)))

    def value(params, batch):
        return jnp.sum(jax.vmap(one)(params, *batch))

    return value


@cache
def _descent(rate):
    return optax.sgd(rate, momentum=MOMENTUM)


def recall(config, fa, fb):
    """Recall at KS on validation and on held-out rows (2, ks), in the canonical coordinates of the training rows.

    Encoders are determined up to (P f, P^-T g), which cosines of raw embeddings are not invariant under.
    """
    return np.asarray(_recalls(config.pairs, config.validation, np.float32(fa), np.float32(fb)))


@partial(jax.jit, static_argnums=(0, 1))
def _recalls(n, validation, fa, fb):
    model = cca.cca(fa[:n], fb[:n], fa.shape[1])
    u, v = cca.transform(model, fa[n:], fb[n:])
    parts = (slice(validation), slice(validation, None))
    return jnp.stack([evaluate.recall_at(u[rows], v[rows], KS) for rows in parts])


def best(recalls) -> int:
    """Index of the setting that retrieves best on the validation rows, by the last of KS, which counts most rows."""
    return int(np.argmax([recall[0, -1] for recall in recalls]))


def bases(config, pair):
    """Orthonormal bases of the centred embeddings of the held-out rows, by view."""
    return [_basis(f[config.pairs + config.validation :]) for f in pair]


def overlaps(learnt, predicted):
    """Spectrum overlap with each prediction, averaged over views: bases [view] and [prediction][view] -> an array."""
    return np.mean([_overlaps(u, jnp.stack(vs)) for u, *vs in zip(learnt, *predicted, strict=True)], axis=0)


def random_overlaps(config, halves, seed: int, predicted):
    """Overlap of random wide encoders, (draws,), at the best ridge: predicted[ridge][view] as from `closed_forms`.

    By NumPy, since the program of `embed` would be compiled anew for their number.
    """
    rng, draws = np.random.default_rng((7, seed)), -(-config.null_encoders // config.seeds)
    shares = []
    for view, half in enumerate(halves):
        x = np.float32(half[config.pairs + config.validation :])
        hidden = x @ rng.standard_normal((draws, x.shape[1], config.width), np.float32)
        f = np.maximum(hidden, 0, out=hidden) @ rng.standard_normal((draws, config.width, config.features), np.float32)
        f = np.float64(f - f.mean(axis=1, keepdims=True))
        # |U^T V|^2 / z for orthonormal bases U of f and V of each prediction, without U.
        inside = np.concatenate([np.asarray(pair[view]) for pair in predicted], axis=1).T @ f
        inside = inside.reshape(draws, len(predicted), -1, config.features)
        inverse = np.linalg.inv(f.swapaxes(1, 2) @ f)
        shares.append(np.sum((inside @ inverse[:, None]) * inside, axis=(2, 3)) / config.features)
    return np.max(np.mean(shares, axis=0), axis=1)


@jax.jit
def _basis(f):
    return compare.orthonormal_basis(f - jnp.mean(f, axis=0))


@jax.jit
def _overlaps(u, predicted):
    return jax.vmap(partial(compare.spectrum_overlap, u))(predicted)


def closed_forms(config, encoder, seed: int):
    """CCA and kernel CCA at every ridge, in float64, on digits and on unmatched pairs.

    By (method, views): the index `chosen` on the validation rows, its `recall` (ks,), and `bases` by ridge and view.
    """
    n, embedded, found = config.pairs, {}, {}
    a, b = halves(config, seed, n)
    order, ridges = unmatched(np.arange(len(a)), n, seed), np.array(config.ridges)
    with jax.enable_x64(True):
        kernels = [np.asarray(infinite.infinite_ntk(encoder, jnp.asarray(v), jnp.asarray(v[:n]))) for v in (a, b)]
        for view, rows in (("digits", np.arange(len(a))), ("unmatched", order)):
            embedded["CCA", view] = _cca(a, b[rows], config.features, n, ridges)
            gram = kernels[1][rows][:, rows[:n]]
            embedded["kernel CCA", view] = _kernel_cca(kernels[0], gram, config.features, n, ridges)
    for case, (fa, fb) in embedded.items():
        pairs = list(zip(np.float32(fa), np.float32(fb), strict=True))
        recalls = [recall(config, *pair) for pair in pairs]
        chosen = best(recalls)
        found[case] = {
            "chosen": chosen,
            "recall": recalls[chosen][1],
            "bases": [bases(config, pair) for pair in pairs],
        }
    return found


# Ridges one after another, not as a batch: batched decompositions side by side in one program can wait for each other's
# threads for ever on a machine with few cores (seen with jaxlib 0.10.2 on two).
@partial(jax.jit, static_argnums=(2, 3))
def _cca(a, b, features, n, ridges):
    def one(ridge):
        return cca.transform(cca.cca(a[:n], b[:n], features, ridge=ridge), a, b)

    return jax.lax.map(one, ridges)


@partial(jax.jit, static_argnums=(2, 3))
def _kernel_cca(ka, kb, features, n, ridges):
    def one(ridge):
        return cca.kernel_transform(cca.kernel_cca(ka[:n], kb[:n], features, ridge=ridge), ka, kb)

    return jax.lax.map(one, ridges)
