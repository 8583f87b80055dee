"""What the NTK experiments share: encoders by name, views of images, triplets of two classes."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments._side_by_side import BRIEFLY, one_object
from theorykit import data, encoders, losses, similarity
from theorykit.ntk import empirical

# Rows are scaled to |x| = sqrt d (`data.to_sphere`), so that every layer, the first included, sees entries of order 1.


@one_object
def encoder(name: str, width: int, features: int):
    """`relu-2` is an MLP of depth 2, `relu-cnn-3` a CNN of depth 3 on 8 x 8 images, `relu-flat-3` one without pooling.

    One object per setting, because compiled programs are kept per encoder: a second one would compile everything again.
    """
    activation, *kind, depth = name.split("-")
    if kind:
        pooling = {"cnn": "average", "flat": "flatten"}[kind[0]]
        return encoders.CNN(width, features, (8, 8, 1), depth=int(depth), activation=activation, pooling=pooling)
    return encoders.MLP(width, features, depth=int(depth), activation=activation)


def cell_key(seed: int, width: int):
    """Key of the initial parameters: seeds and widths are independent draws, and none is shared with the data."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), width), 1)


@partial(jax.jit, static_argnums=0, compiler_options=BRIEFLY)
def initial(encoder, key, x):
    """Initial parameters; compiled as a whole, which is faster than flax's eager init."""
    return encoder.init(key, x)


# Losses of two views, by the similarity they use. The linear loss takes its negatives from the next pair.
def _shifted_linear(za, zb, *, similarity):
    return losses.linear(za, zb, jnp.roll(zb, 1, axis=0), similarity=similarity)


_COSINE, _DOT = {"similarity": similarity.cosine}, {"similarity": similarity.dot}
COSINE_LOSSES = {
    "InfoNCE": partial(losses.info_nce, **_COSINE),
    "NT-Xent": partial(losses.nt_xent, **_COSINE),
    "CLIP": partial(losses.clip, **_COSINE),
    "logistic": partial(losses.logistic, **_COSINE),
    "linear": partial(_shifted_linear, **_COSINE),
}
DOT_LOSSES = {
    "InfoNCE": partial(losses.info_nce, **_DOT),
    "NT-Xent": partial(losses.nt_xent, **_DOT),
    "CLIP": partial(losses.clip, **_DOT),
    "logistic": partial(losses.logistic, **_DOT),
    "spectral": losses.spectral,
    "Barlow Twins": losses.barlow_twins,
    "VICReg": losses.vicreg,
}

LINEAR_DOT = partial(_shifted_linear, **_DOT)


@one_object
def objective(apply, choice: tuple):
    """(params, (xa, xb, rate, which)) -> rate x one of the losses: a compiled program serves all losses and rates.

    `rate` and `which` are arrays of equal entries, since training wants data by rows: see `with_loss`.
    """

    def value(params, batch):
        *views, rate, which = batch
        embeddings = jnp.split(apply(params, jnp.concatenate(views)), len(views))
        return rate[0] * jax.lax.switch(which[0], choice, *embeddings)

    return value


def with_loss(two_views, which: int, rate: float):
    """Data of `objective`; the optimiser is then descent at rate 1."""
    n = len(two_views[0])
    return (*two_views, jnp.full(n, rate), jnp.full(n, which))


@one_object
def descent(rate: float):
    """Gradient descent; one object per rate, because compiled programs are kept per optimiser."""
    return optax.sgd(rate)


def rows(name: str, key, count: int):
    """`count` rows of a data set, drawn without replacement, with |x| = sqrt d."""
    images = data.load(name).inputs
    chosen = np.asarray(jax.random.permutation(key, len(images)))[:count]
    return data.to_sphere(jnp.asarray(images[chosen]))


@one_object
def views(seed: int, count: int):
    """Two augmented views of `count` digits, with |x| = sqrt d; another draw for every seed."""
    pairs = data.digit_views(jax.random.key(seed), count)
    return data.to_sphere(pairs.a), data.to_sphere(pairs.b)


@one_object
def triplets(seed: int, count: int, classes=(0, 1)):
    """Anchors, positives and negatives (count, 64) of two classes of digits: the negative is a view of the other class.

    With two classes the leading growth mode of the linear loss is the contrast between them, well apart from the rest.
    """
    images, labels = data.digits()
    half = count // 2
    for_rows, for_a, for_b = jax.random.split(jax.random.key(seed), 3)
    order = np.asarray(jax.random.permutation(for_rows, len(labels)))
    chosen = np.concatenate([order[labels[order] == c][:half] for c in classes])
    # Weaker than the defaults of `data.digit_views`: a view is then closer to its own class than to the other's, which
    # sets the leading growth rate apart from the second one (about four times it).
    strengths = {"shift": 0.5, "rotation": 10, "noise": 0.1, "mask": 0}
    a, b = (data.to_sphere(data.augment(k, jnp.asarray(images[chosen]), **strengths)) for k in (for_a, for_b))
    return a, b, jnp.roll(b, half, axis=0)


@partial(jax.jit, static_argnums=0, compiler_options=BRIEFLY)
def at_start(apply, params, points):
    """Embeddings (n, z) of a network and its kernel (n, n, z, z), in one program."""
    return apply(params, points), empirical.empirical_ntk(apply, params, points)


def steps_of_growth(encoder, params, two_views, rate: float, growth: float) -> int:
    """Steps after which linearised descent on the linear dot loss has root mean square |f| = growth x sqrt(width).

    Descent at a fixed kernel, f <- f - rate K_0 A f. By then the parameters of a network of any width have moved by a
    fixed fraction, at a time that grows as the logarithm of the width.
    """
    f, kernel = at_start(encoder.apply, params, jnp.concatenate(two_views))
    return steps_until(growth * np.sqrt(width_of(encoder)), f, kernel, rate)


def steps_until(size: float, f, kernel, rate: float) -> int:
    """Steps of f <- f - rate K A f from embeddings (n, z), kernel (n, n, z, z), until root mean square |f| = size."""
    n, z = f.shape
    kernel = np.asarray(kernel, np.float64).transpose(0, 2, 1, 3).reshape(n * z, n * z)
    step, flat, taken = np.eye(n * z) - rate * kernel @ _quadratic(n, z), np.asarray(f, np.float64).ravel(), 0
    while np.linalg.norm(flat) < size * np.sqrt(n):
        flat, taken = step @ flat, taken + 1
    return taken


def width_of(encoder) -> int:
    """Hidden units, or channels of a CNN."""
    return encoder.channels if isinstance(encoder, encoders.CNN) else encoder.width


@one_object
def _quadratic(n, z):
    """A of the linear dot loss L = f^T A f / 2 over the n stacked points of both views, (n z, n z)."""
    hessian = jax.jit(jax.hessian(lambda f: LINEAR_DOT(*jnp.split(f.reshape(n, z), 2))))
    return np.asarray(hessian(jnp.zeros(n * z)), np.float64)
