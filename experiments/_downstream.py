"""Random joints, scores and labels of `surrogate_downstream`, drawn one by one by NumPy; retrieval by enumeration."""

import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

# Images and texts are pairs of ternary symbols: one shape for all, so that one program measures every instance.
SYMBOLS, TOKENS = 3, (3, 3)
SIZE = SYMBOLS**2
KINDS = ("dense", "concentrated", "with zeros", "few partners", "hierarchy")
# Distances of a score from the optimum, in nats per pair: from where S is about 1e-4 to where it is several nats.
NEAREST, FARTHEST = 1e-2, 3.0


class Instance(NamedTuple):
    """One joint with a score, labels of the text, and labels that are none of the text.

    Parameters
    ----------
    joint, score : (9, 9)
    label_text, label_image : (2, 9, 9)
        P(c, y) and P(c, x). First a label with c - y - x Markov: the text itself, a merger of texts, a noisy one, or
        the first text leaf of a hierarchy. Second the root of the hierarchy; for other kinds the first label again.
    """

    joint: np.ndarray
    score: np.ndarray
    label_text: np.ndarray
    label_image: np.ndarray


def kinds(count: int) -> np.ndarray:
    """Kind of every instance, (count,), in turn."""
    return np.arange(count) % len(KINDS)


def draw(count: int) -> Instance:
    """Stacked instances: the fields of `Instance` with a leading axis."""
    drawn = [_instance(np.random.default_rng((1, i)), KINDS[kind]) for i, kind in enumerate(kinds(count))]
    return Instance(*(np.stack(field) for field in zip(*drawn, strict=True)))


def distant_score(rng: np.random.Generator, joint: np.ndarray) -> np.ndarray:
    """A score at a random distance from ln r: noise, a wrong temperature (or sign), or favourites; and c(x)."""
    distance, shift = np.exp(rng.uniform(np.log(NEAREST), np.log(FARTHEST), size=2))
    ratio = joint / np.where(joint > 0, joint.sum(axis=1)[:, None] * joint.sum(axis=0)[None, :], 1.0)
    # Mixed with independence, so that scores are finite where P = 0 and yet reach small S.
    mixed = min(distance**2, 0.1)
    score = np.log((1 - mixed) * ratio + mixed)
    fault = rng.integers(3)
    if fault == 0:
        score = score + distance * rng.standard_normal(joint.shape)
    elif fault == 1:
        score = (1 - distance) * score
    else:
        score = score + 2 * distance * np.eye(joint.shape[1])[rng.integers(joint.shape[1], size=joint.shape[0])]
    # What forward losses do not see, and reverse ones do; of a size of its own.
    return score + shift * rng.standard_normal((joint.shape[0], 1))


def factors(count: int, *, independent: bool) -> np.ndarray:
    """Joints (count, 9, 9) of x = (a, b) and y = (a', b'), every other with zeros; dependent factors are any joint."""
    rng = np.random.default_rng(2)
    if not independent:
        return _tables(rng, (count,), SIZE)
    pairs = _tables(rng, (count, 2), SYMBOLS)
    return np.einsum("nac,nbd->nabcd", pairs[:, 0], pairs[:, 1]).reshape(count, SIZE, SIZE)


def _tables(rng, shape, size):
    """Random laws (*shape, size, size); in every other of the first axis about a third of the cells is empty."""
    weights = rng.gamma(0.5, size=(*shape, size, size))
    kept = (rng.uniform(size=weights.shape) > 0.4) | np.eye(size, dtype=bool)
    kept[::2] = True
    return weights * kept / np.sum(weights * kept, axis=(-2, -1), keepdims=True)


def embeddings(count: int, dimension: int) -> tuple[np.ndarray, ...]:
    """Embeddings f, g (count, 9, d), a matrix P and its inverse (count, d, d), of condition at most e^2."""
    rng = np.random.default_rng(3)
    f, g = rng.standard_normal((2, count, SIZE, dimension)) / dimension**0.25
    left, right = (np.linalg.qr(rng.standard_normal((count, dimension, dimension)))[0] for _ in range(2))
    stretch = np.exp(rng.uniform(-1, 1, size=(count, 1, dimension)))
    return f, g, (left * stretch) @ right, right.swapaxes(1, 2) @ (left / stretch).swapaxes(1, 2)


def denoised(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Joints and scores (count, 3, 3) for denoising; of three joints one has empty cells, and one two x only."""
    joints, scores = [], []
    for i in range(count):
        rng = np.random.default_rng((4, i))
        joint = rng.dirichlet(np.full(SYMBOLS**2, 1.0)).reshape(SYMBOLS, SYMBOLS)
        if i % 3 == 1:
            joint *= (rng.uniform(size=joint.shape) > 0.4) | np.eye(SYMBOLS, dtype=bool)
        if i % 3 == 0:
            # Almost fair coins: where Pinsker's inequality, and with it the bound at one noise level, is tight.
            q, lean = rng.dirichlet(np.full(SYMBOLS, 5.0)), 0.1 * rng.standard_normal(SYMBOLS)
            joint = np.stack([q * (1 + lean), np.zeros(SYMBOLS), q * (1 - lean)]) / 2
        joints.append(joint / joint.sum())
        scores.append(distant_score(rng, joints[-1]))
    return np.stack(joints), np.stack(scores)


def excess_over_lists(joint, score, negatives, candidates):
    """Excess log-loss of finding the partner, by listing all candidates: E KL(chances, under P and by the score)."""
    lists = jnp.asarray(list(itertools.product(range(joint.shape[1]), repeat=candidates)))
    # Chance of a list, with the partner at each of its places.
    others = jnp.prod(negatives[lists], axis=1)[:, None] / negatives[lists]
    with_partner = joint[:, lists] * others[None] / candidates  # (x, lists, place)
    total = jnp.sum(with_partner, axis=2, keepdims=True)
    true = with_partner / jnp.where(total > 0, total, 1.0)
    log_true = jnp.log(jnp.where(true > 0, true, 1.0))
    return jnp.sum(jnp.where(true > 0, with_partner * (log_true - jax.nn.log_softmax(score[:, lists], axis=2)), 0.0))


def _instance(rng, kind):
    if kind == "hierarchy":
        joint, label_text, label_image = _hierarchy(rng)
    else:
        joint = _joint(rng, kind)
        given_text = _labels(rng)
        label_text, label_image = (np.stack([given_text @ law] * 2) for law in (np.diag(joint.sum(axis=0)), joint.T))
    return Instance(joint, distant_score(rng, joint), label_text, label_image)


def _joint(rng, kind):
    if kind == "few partners":
        # Nearly X = Y, or two equally likely texts for each image, where D4.sharp is tight.
        partners = np.eye(SIZE) + rng.integers(2) * np.roll(np.eye(SIZE), 1, axis=1)
        weights = partners + np.exp(rng.uniform(np.log(1e-6), np.log(0.1)))
    else:
        # Dense joints up to nearly independent ones, of ratios r near 1.
        shape = np.exp(rng.uniform(0, np.log(100))) if kind == "dense" else 0.3 if kind == "concentrated" else 1.0
        weights = rng.gamma(shape, size=(SIZE, SIZE))
        if kind == "with zeros":
            weights *= (rng.uniform(size=weights.shape) > 0.4) | np.eye(SIZE, dtype=bool)
    return weights / weights.sum()


def _labels(rng):
    """P(c|y), (9, 9); classes that do not occur are rows of zeros."""
    which = rng.integers(3)
    if which == 0:  # the text itself, for which the bound is an equality
        return np.eye(SIZE)
    if which == 1:
        return np.eye(SIZE)[:, rng.integers(4, size=SIZE)]
    return rng.dirichlet(np.full(SIZE, 0.2), size=SIZE).T


def _hierarchy(rng):
    """Two trees of depth 1 with a common root: P(x, y) and the joints of the labels with text and image."""
    flip = np.exp(rng.uniform(np.log(0.05), np.log(0.6)))
    given_root = []
    for _ in range(2):
        noise = np.exp(rng.standard_normal((2, SYMBOLS, SYMBOLS)))
        order = np.eye(SYMBOLS)[rng.permutation(SYMBOLS)]
        one, two = (1 - flip) * order + flip * noise / noise.sum(axis=2, keepdims=True)
        given_root.append((one[:, :, None] * two[:, None, :]).reshape(SYMBOLS, SIZE))
    image, text = given_root
    prior = rng.dirichlet(np.full(SYMBOLS, 3.0))
    joint = np.einsum("s,sx,sy->xy", prior, image, text)
    leaf = np.zeros((SIZE, SIZE))
    for first, second in itertools.product(range(SYMBOLS), repeat=2):
        leaf[first, first * SYMBOLS + second] = 1
    label_text, label_image = np.zeros((2, 2, SIZE, SIZE))
    label_text[0], label_image[0] = leaf * joint.sum(axis=0), leaf @ joint.T
    label_text[1, :SYMBOLS], label_image[1, :SYMBOLS] = prior[:, None] * text, prior[:, None] * image
    return joint, label_text, label_image
