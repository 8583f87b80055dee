"""Message passing against enumeration of all latent states, exact sampling, zeros, layout and bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats
from compilation import quickly

from theorykit.surrogate import _message_passing, hierarchy
from theorykit.surrogate.hierarchy import Hierarchy

# float64, logarithms of sums of at most a few hundred products: the figure asked for.
CLOSE = {"rtol": 1e-12, "atol": 1e-12}
PRIOR = (0.5, 0.2, 0.3)


def small(kind):
    """S = 3, L = 2, m = 2 and a prior that is not uniform: 81 images, 81 texts."""
    h = hierarchy.random_hierarchy(
        jax.random.key(1), 3, 2, 2, 0.0 if kind == "permutations" else 0.4, prior=jnp.asarray(PRIOR)
    )
    if kind == "zeros":  # a third of the entries, never the largest of a row
        kernels = [np.array(k) for k in h[:2]]
        for k in kernels:
            k[np.arange(3) == np.argmin(k, axis=-1, keepdims=True)] = 0.0
        h = Hierarchy(*(jnp.asarray(k / k.sum(axis=-1, keepdims=True)) for k in kernels), h.prior)
    return h


KINDS = ("noisy", "zeros", "permutations")


# Functions of the module, since a compiled program belongs to its function.
def draw(h, key):
    return hierarchy.sample(h, key, 20)


def posterior(h, image, text):
    return hierarchy.root_posterior(h, image=image, text=text)


def all_scores(h, image, text):
    return hierarchy.similarities(h, image, text), hierarchy.similarity(h, image, text[::-1])


def denoise_image(h, z, sigma, given):
    return hierarchy.leaf_posterior(h, z, sigma, given=given), hierarchy.denoise(h, z, sigma, given=given)


def denoise_text(h, z, sigma, given):
    options = {"modality": "text", "given": given}
    return hierarchy.leaf_posterior(h, z, sigma, **options), hierarchy.denoise(h, z, sigma, **options)


def tokens(h, text, image):
    return hierarchy.next_token(h, text, image=image)


def classes_of(h, image, prompts):
    return hierarchy.zero_shot(h, image), hierarchy.zero_shot(h, image, prompts=prompts)


def with_root(h):
    """P(root, image, text), summed over the states of all inner nodes, (3, 81, 81)."""
    tables = []
    for kernels in (np.asarray(h.image), np.asarray(h.text)):
        (first, second), (left, right) = kernels
        tables.append(np.einsum("sa,sb,ac,ad,be,bf->scdef", first, second, left, right, left, right).reshape(3, 81))
    return np.einsum("s,sx,sy->sxy", PRIOR, *tables)


def everything():
    return hierarchy.all_leaves(3, 4)


def quotient(a, b):
    """a / b, NaN for 0 / 0."""
    return np.divide(a, b, out=np.full(np.broadcast_shapes(a.shape, b.shape), np.nan), where=b > 0)


def log(p):
    return np.log(p, out=np.full(p.shape, -np.inf), where=p > 0)


@pytest.mark.parametrize("kind", KINDS)
def test_the_enumerated_joint_sums_over_all_inner_states(x64, kind):
    h = small(kind)
    np.testing.assert_allclose(hierarchy.enumerate_joint(h), with_root(h).sum(axis=0), **CLOSE)


@pytest.mark.parametrize("kind", KINDS)
def test_the_root_posterior_is_that_of_enumeration(x64, kind):
    h, table, leaves = small(kind), with_root(small(kind)), everything()
    for axis, name in ((2, "image"), (1, "text")):
        one = table.sum(axis=axis)
        found = np.exp(quickly(posterior, h, *((leaves, None) if name == "image" else (None, leaves))))
        np.testing.assert_allclose(found, quotient(one, one.sum(axis=0)).T, **CLOSE)
    x, y = np.divmod(np.arange(0, 81 * 81, 7), 81)
    found = np.exp(quickly(posterior, h, leaves[x], leaves[y]))
    np.testing.assert_allclose(found, quotient(table, table.sum(axis=0))[:, x, y].T, **CLOSE)


@pytest.mark.parametrize("kind", KINDS)
def test_the_similarity_is_the_log_density_ratio(x64, kind):
    h, leaves = small(kind), everything()
    joint = with_root(h).sum(axis=0)
    expected = log(quotient(quotient(joint, joint.sum(axis=1)[:, None]), joint.sum(axis=0)[None, :]))
    expected[np.isnan(quotient(joint, joint.sum(axis=1)[:, None] * joint.sum(axis=0)[None, :]))] = np.nan
    every, paired = quickly(all_scores, h, leaves, leaves)
    np.testing.assert_allclose(every, expected, **CLOSE)
    np.testing.assert_allclose(paired, np.diag(expected[:, ::-1]), **CLOSE)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sigma", [0.1, 1.5])
def test_denoising_gives_the_law_and_the_mean_of_every_leaf(x64, kind, sigma):
    h, table, leaves = small(kind), with_root(small(kind)).sum(axis=0), everything()
    generator = np.random.default_rng(0)
    drawn = quickly(draw, h, jax.random.key(0))
    for modality, joint, clean in (("image", table, drawn.image), ("text", table.T, drawn.text)):
        z = np.asarray(clean) + sigma * generator.standard_normal(clean.shape)
        squares = ((z[:, None, :] - np.asarray(leaves)[None]) ** 2).sum(axis=2) / (2 * sigma**2)
        given = drawn.text if modality == "image" else drawn.image
        other = np.ravel_multi_index(np.asarray(given).T, (3,) * 4)
        for known, prior in ((None, joint.sum(axis=1)[None]), (given, joint[:, other].T)):
            law = scipy.special.softmax(log(prior) - squares, axis=1)  # (20, 81)
            per_symbol = np.stack([law @ (np.asarray(leaves) == a) for a in range(3)], axis=2)
            function = denoise_image if modality == "image" else denoise_text
            found, mean = quickly(function, h, jnp.asarray(z), jnp.asarray(sigma), known)
            np.testing.assert_allclose(found, per_symbol, **CLOSE)
            np.testing.assert_allclose(mean, law @ np.asarray(leaves), **CLOSE)


@pytest.mark.parametrize("kind", KINDS)
def test_the_next_token_has_its_law_given_those_before(x64, kind):
    h, table = small(kind), with_root(small(kind)).sum(axis=0)
    drawn = quickly(draw, h, jax.random.key(0))
    image = np.ravel_multi_index(np.asarray(drawn.image).T, (3,) * 4)
    for known, joint in ((None, np.tile(table.sum(axis=0), (20, 1))), (drawn.image, table[image])):
        found = np.exp(quickly(tokens, h, drawn.text, known))
        texts = joint.reshape(20, 3, 3, 3, 3)
        for j in range(4):
            begun = texts.sum(axis=tuple(range(j + 2, 5)))[(np.arange(20), *np.asarray(drawn.text).T[:j])]
            np.testing.assert_allclose(found[:, j], begun / begun.sum(axis=1, keepdims=True), **CLOSE)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_zero_shot_is_the_law_of_the_first_leaf_and_prompts_average_the_ratio(x64, kind):
    h, joint, leaves = small(kind), with_root(small(kind)).sum(axis=0), everything()
    images, classes = joint.sum(axis=1), joint.sum(axis=0).reshape(3, 27).sum(axis=1)
    truth = quotient(joint.reshape(81, 3, 27).sum(axis=2), images[:, None])
    prompts = hierarchy.sample_prompts(h, jax.random.key(0), 5)
    assert bool(jnp.all(prompts[:, :, 0] == jnp.arange(3, dtype=jnp.int32)[:, None]))
    chosen = np.ravel_multi_index(np.moveaxis(np.asarray(prompts), 2, 0), (3,) * 4)
    ratio = quotient(joint[:, chosen], (images[:, None, None] * joint.sum(axis=0)[chosen][None]))
    weights = classes * ratio.mean(axis=2)
    exact, found = (np.exp(part) for part in quickly(classes_of, h, leaves, prompts))
    np.testing.assert_allclose(exact, truth, **CLOSE)
    np.testing.assert_allclose(found, quotient(weights, weights.sum(axis=1, keepdims=True)), **CLOSE)


def test_trees_of_different_depth_and_arity_agree_with_enumeration(x64):
    h = hierarchy.random_hierarchy(jax.random.key(2), 3, (2, 1), (2, 3), 0.3)
    assert (h.image.shape, h.text.shape) == ((2, 2, 3, 3), (1, 3, 3, 3))
    joint = np.asarray(hierarchy.enumerate_joint(h))
    assert joint.shape == (81, 27)
    expected = np.log(joint / joint.sum(axis=1, keepdims=True) / joint.sum(axis=0, keepdims=True))
    found = quickly(hierarchy.similarities, h, everything(), hierarchy.all_leaves(3, 3))
    np.testing.assert_allclose(found, expected, **CLOSE)


# What 10^6 tests would pass once: a key fixes the draw, so the test itself has no noise.
SURPRISE = 1e-6


def chi_square_is_likely(counts, expected):
    """Pearson's test, with cells of fewer than five expected merged into one."""
    rare = expected < 5
    counts = np.append(counts[~rare], counts[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    used = expected > 0
    assert np.all(counts[~used] == 0)
    statistic = np.sum((counts[used] - expected[used]) ** 2 / expected[used])
    return statistic < scipy.stats.chi2.isf(SURPRISE, used.sum() - 1)


@pytest.mark.parametrize("kind", ["noisy", "zeros"])
def test_samples_have_the_enumerated_law(x64, kind):
    h, n = small(kind), 2**16
    drawn = hierarchy.sample(h, jax.random.key(3), n)
    assert chi_square_is_likely(np.bincount(drawn.root, minlength=3), n * np.asarray(PRIOR))
    x, y = (np.ravel_multi_index(np.asarray(leaves).T, (3,) * 4) for leaves in drawn[1:])
    counts = np.bincount(81 * x + y, minlength=81**2)
    table = with_root(h).sum(axis=0).reshape(-1)
    assert chi_square_is_likely(counts, n * table)
    assert not chi_square_is_likely(
        counts, n * with_root(small("permutations")).sum(axis=0).reshape(-1) / 2 + n * table / 2
    )


def test_prompts_have_the_law_of_texts_given_their_first_leaf(x64):
    h, n = small("zeros"), 2**14
    texts = with_root(h).sum(axis=(0, 1)).reshape(3, 27)
    prompts = np.moveaxis(np.asarray(hierarchy.sample_prompts(h, jax.random.key(4), n)), 2, 0)
    for c, chosen in enumerate(np.ravel_multi_index(prompts[1:], (3,) * 3)):
        counts = np.bincount(chosen, minlength=27)
        assert chi_square_is_likely(counts, n * texts[c] / texts[c].sum())


# Zeros, extremes, layout ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_at_zero_p_clean_text_overrules_noise_that_contradicts_it():
    # In float32 the text's root is e^-400 and less as likely as others for the noisy image alone.
    h = hierarchy.random_hierarchy(jax.random.key(5), 10, 2, 2, 0.0)
    drawn = quickly(draw, h, jax.random.key(6))
    others = jnp.roll(drawn.image, 1, axis=0).astype(jnp.float32)
    _, found = quickly(denoise_image, h, others, jnp.asarray(0.05, jnp.float32), drawn.text)
    np.testing.assert_array_equal(found, drawn.image.astype(jnp.float32))
    logs = quickly(tokens, h, drawn.text, drawn.image)
    assert not bool(jnp.any(jnp.isnan(logs)))
    np.testing.assert_array_equal(jnp.argmax(logs, axis=2), drawn.text)


def test_what_the_hierarchy_cannot_produce_has_no_posterior(x64):
    h = small("permutations")
    found = quickly(posterior, h, everything(), None)
    assert int(jnp.sum(jnp.any(jnp.isnan(found), axis=1))) == 81 - 3


@pytest.mark.slow
@pytest.mark.parametrize("spread", [1.0, 100.0, 5000.0])
@pytest.mark.parametrize("zeros", [0.0, 0.6])
def test_sums_of_exponentials_are_exact_however_far_apart(x64, spread, zeros):
    generator = np.random.default_rng(0)
    kernel = generator.dirichlet(np.ones(5), (2, 4)) * (generator.uniform(size=(2, 4, 5)) >= zeros)
    h = spread * generator.standard_normal((2, 5, 3, 7))
    expected = scipy.special.logsumexp(h[:, None], axis=2, b=kernel[:, :, :, None, None]) - h.max(axis=1, keepdims=True)
    found = _message_passing.through(jnp.asarray(kernel), jnp.asarray(h))
    np.testing.assert_allclose(found, expected, **CLOSE)
    a, b = spread * generator.standard_normal((3, 5)), spread * generator.standard_normal((4, 5))
    expected = scipy.special.logsumexp(a[:, None] + b[None], axis=2)
    np.testing.assert_allclose(_message_passing.log_products(jnp.asarray(a), jnp.asarray(b)), expected, **CLOSE)


@pytest.mark.slow
def test_single_precision_keeps_five_digits_at_the_size_of_the_paper():
    with jax.enable_x64(True):
        h = hierarchy.random_hierarchy(jax.random.key(7), 10, 4, 3, 0.1)
        drawn = quickly(draw, h, jax.random.key(8))
        z = np.asarray(drawn.image) + np.random.default_rng(0).standard_normal(drawn.image.shape)

    def answers(dtype):
        narrow = jax.tree.map(lambda k: jnp.asarray(np.asarray(k), dtype), h)
        x, y = drawn[1:]
        scores, _ = quickly(all_scores, narrow, x, y)
        _, means = quickly(denoise_image, narrow, jnp.asarray(z, dtype), jnp.asarray(1.0, dtype), y)
        return [np.asarray(part, float) for part in (scores, means)]

    with jax.enable_x64(True):
        exact = answers(jnp.float64)
    rounded = answers(jnp.float32)
    # Log-likelihoods of a node pass through 4 layers, each with sums of 3 messages and of 10 terms: 4 x (3 + 10) eps
    # relative to logarithms of up to about ln(1 / smallest entry) = 12 for every layer.
    room = 4 * 13 * 12 * np.finfo(np.float32).eps
    for wide, narrow in zip(exact, rounded, strict=True):
        assert np.max(np.abs(wide - narrow) / np.maximum(np.abs(wide), 1)) < room


def test_hierarchies_of_one_key_differ_in_p_only(x64):
    key = jax.random.key(9)
    clean, half, full = (hierarchy.random_hierarchy(key, 4, 2, 3, p) for p in (0.0, 0.5, 1.0))
    for k0, k5, k1 in zip(clean[:2], half[:2], full[:2], strict=True):
        np.testing.assert_allclose(k5, (k0 + k1) / 2, **CLOSE)
        np.testing.assert_array_equal(np.sort(k0, axis=-1)[..., -1], 1.0)
        np.testing.assert_array_equal(k0.sum(axis=2), 1.0)
        np.testing.assert_array_equal(k0, np.broadcast_to(k0[:, :1], k0.shape))  # one permutation for all ranks
        assert np.min(np.std(k1, axis=1)) > 0  # and noise of its own for each
    flat = hierarchy.random_hierarchy(key, 4, 2, 3, 1.0, spread=0.0)
    np.testing.assert_allclose(flat.image, 0.25, **CLOSE)


def scores_at(p):
    h = hierarchy.random_hierarchy(jax.random.key(1), 3, 2, 2, p, prior=jnp.asarray(PRIOR))
    return hierarchy.similarities(h, everything()[::9], everything()[::9])


def scores_at_all(levels):
    return jax.vmap(scores_at)(levels)


@pytest.mark.slow
def test_message_passing_maps_over_p(x64):
    levels = jnp.asarray([0.1, 0.7])
    for p, found in zip(levels, quickly(scores_at_all, levels), strict=True):
        np.testing.assert_allclose(found, quickly(scores_at, p), **CLOSE)


# Bad input ------------------------------------------------------------------------------------------------------------


def kernels(*shape):
    return jnp.full((*shape, shape[-1]), 1 / shape[-1], jnp.float32)


GOOD = Hierarchy(kernels(2, 2, 3), kernels(2, 2, 3))
LEAVES, NOISY = jnp.zeros((5, 4), jnp.int32), jnp.zeros((5, 4), jnp.float32)


@pytest.mark.parametrize(
    ("h", "words"),
    [
        (GOOD._replace(prior=jnp.asarray([0.5, 0.5, 0.0], jnp.float32)), "prior is zero at symbol 2.*leave the symbol"),
        (GOOD._replace(prior=jnp.asarray([0.5, 0.2, 0.2], jnp.float32)), "prior sums to 0.89.*divide"),
        (GOOD._replace(prior=jnp.ones(2, jnp.float32) / 2), r"prior has shape \(2,\).*3 symbols"),
        (GOOD._replace(text=GOOD.text.at[1, 0, 2].mul(0.9)), r"row \(1, 0, 2\) of text sums to 0.9.*divide"),
        (GOOD._replace(image=GOOD.image.at[0, 0, 0, 0].set(jnp.nan)), "image holds.*not finite"),
        (GOOD._replace(image=GOOD.image.at[0, 0, 0].set(jnp.asarray([-1.0, 1.0, 1.0]))), "negative.*give prob"),
        (GOOD._replace(image=kernels(2, 2, 4)), "4 symbols and text 3.*one alphabet"),
        (GOOD._replace(image=GOOD.image[0]), r"shape \(2, 3, 3\).*\(depth, arity, S, S\)"),
    ],
)
def test_parameters_that_are_no_hierarchy_are_refused(as_users_run, h, words):
    with pytest.raises(ValueError, match=words):
        hierarchy.sample(h, jax.random.key(0), 2)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: hierarchy.root_posterior(GOOD, image=LEAVES + 3), ValueError, "symbols 3 to 3.*alphabet 0..2.*recode"),
        (lambda: hierarchy.root_posterior(GOOD, text=LEAVES - 1), ValueError, "symbols -1 to -1, outside"),
        (
            lambda: hierarchy.root_posterior(GOOD, image=LEAVES[:, :3]),
            ValueError,
            r"depth 2 and arity 2 has 4.*\(n, 4\)",
        ),
        (lambda: hierarchy.root_posterior(GOOD, image=LEAVES.astype(float)), TypeError, "whole numbers"),
        (lambda: hierarchy.root_posterior(GOOD), ValueError, "neither image nor text.*give one"),
        (lambda: hierarchy.similarity(GOOD, LEAVES, LEAVES[:2]), ValueError, "5 images and 2 texts.*similarities"),
        (lambda: hierarchy.next_token(GOOD, LEAVES, image=LEAVES[:2]), ValueError, "give pairs"),
        (lambda: hierarchy.denoise(GOOD, NOISY, 0.0), ValueError, "sigma is 0.0; give the positive"),
        (lambda: hierarchy.denoise(GOOD, NOISY, -1.0), ValueError, "sigma is -1.0"),
        (lambda: hierarchy.denoise(GOOD, NOISY * jnp.nan, 1.0), ValueError, "NaN or infinite"),
        (lambda: hierarchy.denoise(GOOD, LEAVES, 1.0), TypeError, "cast"),
        (lambda: hierarchy.denoise(GOOD, NOISY, 1.0, modality="sound"), ValueError, "'image' or 'text'"),
        (lambda: hierarchy.denoise(GOOD, NOISY, 1.0, given=LEAVES[:1]), ValueError, "5 and 1 rows"),
        (lambda: hierarchy.zero_shot(GOOD, LEAVES, prompts=LEAVES), ValueError, r"\(3, M, leaves\)"),
        (lambda: hierarchy.sample_prompts(GOOD, jax.random.key(0), 0), ValueError, "at least one text"),
        (lambda: hierarchy.sample(GOOD, jax.random.key(0), 0), ValueError, "at least one sample"),
        (lambda: hierarchy.sample(tuple(GOOD), jax.random.key(0), 2), TypeError, r"give Hierarchy\(image, text\)"),
        (lambda: hierarchy.random_hierarchy(jax.random.key(0), 3, 2, 2, 1.5), ValueError, "noise is 1.5.*0 to 1"),
        (lambda: hierarchy.random_hierarchy(jax.random.key(0), 3, 0, 2, 0.5), ValueError, "depth 0"),
        (lambda: hierarchy.all_leaves(10, 9), ValueError, "too many to list"),
    ],
)
def test_bad_input_is_refused_with_cause_and_remedy(as_users_run, call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_a_class_without_texts_is_refused(as_users_run):
    kernel = jnp.asarray([[0.0, 1.0], [0.0, 1.0]], jnp.float32)[None, None]
    with pytest.raises(ValueError, match="class 0 has probability zero"):
        hierarchy.sample_prompts(Hierarchy(kernel, kernel), jax.random.key(0), 2)


def test_a_hierarchy_too_large_to_enumerate_is_refused_with_its_size():
    h = Hierarchy(kernels(2, 2, 10), kernels(2, 3, 10))
    with pytest.raises(ValueError, match=r"4 and 9 leaves over 10 symbols make a table of 1e\+13 cells.*6.71e\+07"):
        hierarchy.enumerate_joint(h)
