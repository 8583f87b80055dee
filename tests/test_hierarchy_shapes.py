"""Message passing on trees of other depths and arities against sums over all inner states, and in blocks of rows."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from compilation import quickly

from theorykit.surrogate import _hierarchy_inference as inference
from theorykit.surrogate import _hierarchy_passes as passes
from theorykit.surrogate import hierarchy

# float64, logarithms of sums of at most a few hundred products: the figure asked for.
CLOSE = {"rtol": 1e-12, "atol": 1e-12}
ROWS, SIGMA = 10, 0.7
# Alphabet, depths and arities of image and text. With two children each has one sibling; only from three on there is
# one with siblings on both sides, and only from depth two on that happens to inner nodes as well.
SHAPES = [
    pytest.param((3, (1, 1), (3, 4)), id="three symbols, three children to see, four to read"),
    pytest.param((2, (2, 3), (3, 2)), id="arity 3 to see, depth 3 to read", marks=pytest.mark.slow),
    pytest.param((2, (3, 2), (2, 3)), id="depth 3 to see, arity 3 to read", marks=pytest.mark.slow),
]


def drawn_from(shape):
    """A hierarchy with a prior that is not uniform, samples of it, and their images with noise."""
    alphabet, depths, arities = shape
    weights = np.arange(1.0, alphabet + 1)

    def draw(prior):
        h = hierarchy.random_hierarchy(jax.random.key(1), alphabet, depths, arities, 0.4, prior=prior)
        drawn = hierarchy.sample(h, jax.random.key(2), ROWS)
        noise = jax.random.normal(jax.random.key(3), drawn.image.shape)
        return h, drawn.image, drawn.text, drawn.image.astype(float) + SIGMA * noise

    return quickly(draw, jnp.asarray(weights / weights.sum()))


def given_root(kernels):
    """P(leaves | root), (S, S^leaves), with one sum over the states of all inner nodes, in NumPy."""
    numbers, parents, factors = itertools.count(1), [0], []
    for layer in np.asarray(kernels):
        children = [(next(numbers), parent, kernel) for parent in parents for kernel in layer]
        factors += [part for child, parent, kernel in children for part in (kernel, [parent, child])]
        parents = [child for child, *_ in children]
    return np.einsum(*factors, [0, *parents]).reshape(kernels.shape[-1], -1)


def enumerated(h):
    return np.einsum("s,sx,sy->xy", np.asarray(h.prior), given_root(h.image), given_root(h.text))


def answers(h, image, text, noisy):
    return [
        (
            hierarchy.leaf_posterior(h, noisy, SIGMA, given=given),
            hierarchy.denoise(h, noisy, SIGMA, given=given),
            hierarchy.next_token(h, text, image=None if given is None else image),
        )
        for given in (None, text)
    ]


def expected_leaves(images, noisy, alphabet):
    """Law of every leaf given noisy ones, of rows (n, nx) of weights of whole images: (n, leaves, S)."""
    leaves = np.indices((alphabet,) * noisy.shape[1]).reshape(noisy.shape[1], -1).T
    squares = ((noisy[:, None, :] - leaves[None]) ** 2).sum(axis=2) / (2 * SIGMA**2)
    law = scipy.special.softmax(np.log(images) - squares, axis=1)
    return np.stack([law @ (leaves == a) for a in range(alphabet)], axis=2)


def expected_tokens(rows, text, alphabet):
    """Law of every token given those before, of rows (n, ny) of weights of whole texts: (n, leaves, S)."""
    tables, laws = rows.reshape(len(rows), *(alphabet,) * text.shape[1]), []
    for j in range(text.shape[1]):
        begun = tables.sum(axis=tuple(range(j + 2, tables.ndim)))[(np.arange(len(rows)), *text.T[:j])]
        laws.append(begun / begun.sum(axis=1, keepdims=True))
    return np.stack(laws, axis=1)


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
def test_every_answer_is_that_of_enumeration_at_any_depth_arity_and_alphabet(x64, shape):
    h, image, text, noisy = drawn_from(shape)
    joint, alphabet = enumerated(h), shape[0]
    np.testing.assert_allclose(quickly(hierarchy.enumerate_joint, h), joint, **CLOSE)
    alone, given = quickly(answers, h, image, text, noisy)
    image, text, noisy = (np.asarray(part) for part in (image, text, noisy))
    x, y = (np.ravel_multi_index(part.T, (alphabet,) * part.shape[1]) for part in (image, text))
    for found, images, texts in (
        (alone, np.tile(joint.sum(axis=1), (ROWS, 1)), np.tile(joint.sum(axis=0), (ROWS, 1))),
        (given, joint[:, y].T, joint[x]),
    ):
        law = expected_leaves(images, noisy, alphabet)
        leaves, means, tokens = found
        np.testing.assert_allclose(leaves, law, **CLOSE)
        np.testing.assert_allclose(means, law @ np.arange(float(alphabet)), **CLOSE)
        np.testing.assert_allclose(np.exp(tokens), expected_tokens(texts, text, alphabet), **CLOSE)


# Blocks ---------------------------------------------------------------------------------------------------------------

BLOCK = 4


@pytest.fixture
def in_blocks(monkeypatch):
    """Calls a function of the library with few rows to a block; returns what it returns and the blocks of each loop."""

    def call(function, program, *arrays):
        loops, loop = [], jax.lax.map

        def counted(f, parts):
            loops.append({len(part) for part in jax.tree.leaves(parts)})
            return loop(f, parts)

        with monkeypatch.context() as patch:
            patch.setattr(passes, "_ROWS", BLOCK)
            patch.setattr(passes, "_block_bytes", lambda: 1)
            patch.setattr(jax.lax, "map", counted)
            program.clear_cache()
            found = quickly(lambda *parts: function(*parts), *arrays)
        program.clear_cache()
        return found, loops

    return call


@pytest.mark.slow
@pytest.mark.parametrize(
    ("function", "program", "loops"),
    [
        (lambda h, x, y, z: hierarchy.root_posterior(h, image=x, text=y), inference._root_posterior, 1),
        (lambda h, x, y, z: hierarchy.similarities(h, x[:9], y), inference._similarities, 2),
        (lambda h, x, y, z: hierarchy.denoise(h, z, SIGMA), inference._denoise, 1),
        (lambda h, x, y, z: hierarchy.leaf_posterior(h, z, SIGMA, given=y), inference._leaf_posterior, 1),
        (lambda h, x, y, z: hierarchy.next_token(h, y, image=x), inference._next_token, 1),
    ],
    ids=["root", "scores", "denoising alone", "leaves given the text", "tokens given the image"],
)
def test_blocks_of_rows_give_what_all_rows_at_once_give(x64, in_blocks, function, program, loops):
    arrays = drawn_from((3, (1, 2), (3, 2)))
    whole = np.asarray(quickly(function, *arrays))
    blocks, found = in_blocks(function, program, *arrays)
    assert found == [{3}] * loops  # of 9 and of 10 rows, in three blocks of 3 or 4
    np.testing.assert_allclose(blocks, whole, **CLOSE)
    # The rows differ, so that rows out of order would be seen.
    assert len(np.unique(whole.reshape(len(whole), -1), axis=0)) > BLOCK
