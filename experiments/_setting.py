"""What the NTK experiments share: encoders by name, views of images, triplets of two classes."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np

from theorykit import data, encoders, losses, similarity

# Rows are scaled to |x| = sqrt d (`data.to_sphere`), so that every layer, the first included, sees entries of order 1.


@cache
def encoder(name: str, width: int, features: int):
    """`relu-2` is an MLP of depth 2, `relu-cnn-3` a CNN of depth 3 on 8 x 8 images; one object per setting.

    One object, because compiled programs are kept per encoder: a second one would compile everything again.
    """
    activation, *kind, depth = name.split("-")
    if kind == ["cnn"]:
        return encoders.CNN(width, features, (8, 8, 1), depth=int(depth), activation=activation)
    return encoders.MLP(width, features, depth=int(depth), activation=activation)


# Losses of two views, by the similarity they use. The linear loss takes its negatives from the next pair.
def _shifted_linear(za, zb, *, similarity):
    return losses.linear(za, zb, jnp.roll(zb, 1, axis=0), similarity=similarity)


_COSINE, _DOT = {"similarity": similarity.cosine}, {"similarity": similarity.dot}
COSINE_LOSSES = {
    "InfoNCE": partial(losses.info_nce, **_COSINE),
    "NT-Xent": partial(losses.nt_xent, **_COSINE),
    "logistic": partial(losses.logistic, **_COSINE),
    "linear": partial(_shifted_linear, **_COSINE),
}
DOT_LOSSES = {
    "InfoNCE": partial(losses.info_nce, **_DOT),
    "logistic": partial(losses.logistic, **_DOT),
    "spectral": losses.spectral,
    "Barlow Twins": losses.barlow_twins,
    "VICReg": losses.vicreg,
}


def rows(name: str, key, count: int):
    """`count` rows of a data set, drawn without replacement, with |x| = sqrt d."""
    images = data.load(name).inputs
    chosen = np.asarray(jax.random.permutation(key, len(images)))[:count]
    return data.to_sphere(jnp.asarray(images[chosen]))


def views(key, count: int, **strengths):
    """Two augmented views of `count` digits, with |x| = sqrt d."""
    pairs = data.digit_views(key, count, **strengths)
    return data.to_sphere(pairs.a), data.to_sphere(pairs.b)


def triplets(key, count: int, classes=(0, 1)):
    """Anchors, positives and negatives (count, 64) of two classes of digits: the negative is a view of the other class.

    With two classes the leading growth mode of the linear loss is the contrast between them, well apart from the rest.
    """
    images, labels = data.digits()
    half = count // 2
    for_rows, for_a, for_b = jax.random.split(key, 3)
    order = np.asarray(jax.random.permutation(for_rows, len(labels)))
    chosen = np.concatenate([order[labels[order] == c][:half] for c in classes])
    strengths = {"shift": 1, "rotation": 15, "noise": 0.1, "mask": 0.1}  # the defaults of `data.digit_views`
    a, b = (data.to_sphere(data.augment(k, jnp.asarray(images[chosen]), **strengths)) for k in (for_a, for_b))
    return a, b, jnp.roll(b, half, axis=0)
