"""Models of the experiments on hierarchies: what they see, what trains them, and their losses against exact laws."""

import dataclasses
import functools
import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compilation import quickly

from experiments import _hierarchy_clip as clip
from experiments import _hierarchy_exact as exact
from experiments import _sample_sets as sets
from experiments import _sampled_gap as sampled
from experiments import _task_evaluation as evaluation
from experiments import _task_members as members
from experiments import _task_models as models
from experiments import _task_prompts as prompts
from theorykit import similarity
from theorykit.surrogate import bounds, downstream, hierarchy, risk

TASKS = ("denoising", "next_token")
SIZE = clip.Size(alphabet=3, depth=2, arity=2, width=8, blocks=2, heads=2, batch=8)
S, T, K = SIZE.alphabet, SIZE.leaves, evaluation.CANDIDATES
# float64: some dozen roundings of logarithms and sums of numbers of order one to ten.
CLOSE = {"rtol": 1e-12, "atol": 1e-12}


@pytest.fixture(autouse=True)
def ordinary_promotion():
    """Experiments run under JAX's ordinary promotion rules, as `make figures` runs them."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


@functools.cache
def tree():
    return quickly(lambda key: hierarchy.random_hierarchy(key, S, SIZE.depth, SIZE.arity, 0.3), jax.random.key(1))


@functools.cache
def pairs():
    return clip.start(SIZE, models.HEAD, jax.random.split(jax.random.key(4), 1))


@functools.cache
def networks(task):
    """Parameters (1, ...) of an untrained member."""
    start = lambda keys, encoder: models.start(SIZE, task, keys, encoder)  # noqa: E731
    return quickly(start, jax.random.split(jax.random.key(5), 1), pairs()[models.GIVEN[task]])


def one(tree):
    return jax.tree.map(lambda a: a[0], tree)


def leaves_of(key, n):
    return jax.random.randint(jax.random.key(key), (n, T), 0, S)


def assert_same(found, expected):
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_upward_messages_are_beliefs_for_clean_leaves_and_what_enumeration_gives_for_any_likelihoods(x64):
    top, low = kernels = tree().text
    laws = np.random.default_rng(0).gamma(1.0, size=(5, T, S))
    laws[:2, 1:] = 1.0  # hidden leaves
    clean = leaves_of(6, 8)
    upward = lambda laws: models.upward(kernels, laws)  # noqa: E731
    found, of_clean = quickly(lambda: [upward(jnp.asarray(laws)), upward(jax.nn.one_hot(clean, S))])
    beliefs = map(jnp.exp, quickly(lambda: hierarchy.beliefs(kernels, clean)))
    below = [np.einsum("ai,aj,ni,nj->na", *low, laws[:, 2 * v], laws[:, 2 * v + 1]) for v in range(2)]
    above = np.einsum("sa,sb,ai,aj,bk,bl,ni,nj,nk,nl->ns", *top, *low, *low, *laws.swapaxes(0, 1), optimize=True)
    weights = above[:, None], np.stack(below, axis=1)
    expected = *(w / w.sum(axis=-1, keepdims=True) for w in weights), *beliefs
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **CLOSE), (*found, *of_clean), expected)


def test_messages_of_the_decoder_hide_the_leaf_and_those_after_it(x64):
    size, h = dataclasses.replace(SIZE, blocks=3), tree()  # block 1 holds the layer below the root, block 2 the root
    seen = jax.nn.one_hot(leaves_of(6, 4), S)
    hidden = jnp.stack([seen.at[:, j:].set(1.0) for j in range(T)])
    changed = jnp.stack([seen, *(seen.at[:, j:].set(jnp.roll(seen[:, j:], 1, axis=2)) for j in range(T))])
    messages = jax.vmap(lambda seen: models.messages(size, "next_token", h, seen))
    (plain, *others), (of_root, of_parents) = quickly(lambda: (messages(changed), models.upward(h.text, hidden)))
    np.testing.assert_allclose(plain[:, :, 0], 1 / S, **CLOSE)
    for j in range(T):
        np.testing.assert_allclose(plain[:, :, j], [of_parents[j, :, j // 2], of_root[j, :, 0]], **CLOSE)
        assert_same(others[j][:, :, : j + 1], plain[:, :, : j + 1])


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_answers_depend_on_what_the_task_shows_and_on_nothing_else(task):
    given, seen = leaves_of(7, 2), jax.nn.softmax(jax.random.normal(jax.random.key(8), (2, T, S)))
    # As it is, then with one leaf changed, then with another condition.
    seens = jnp.stack([seen, *(seen.at[:, j].set(jnp.roll(seen[:, j], 1, axis=1)) for j in range(T)), seen])
    givens = jnp.stack([given] * (T + 1) + [(given + 1) % S])
    gates, params = jnp.ones(SIZE.blocks), one(networks(task))
    answer = jax.vmap(lambda given, seen: models.answers(SIZE, task, params, given, seen, gates))
    (plain, *others), states = quickly(answer, givens, seens)
    assert plain.shape == (2, T, S) and states.shape[1:] == (SIZE.blocks + 1, 2, T, SIZE.width)
    # Hidden tokens have weights of exactly zero: no bit may change.
    reached = np.asarray([np.any(np.asarray(other != plain), axis=(0, 2)) for other in others])
    may_see = np.triu(np.ones((T, T), bool), 1) if task == "next_token" else np.ones((T, T), bool)
    np.testing.assert_array_equal(reached[:T], may_see)
    assert reached[T].all()


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_only_joint_training_has_a_gradient_in_the_encoder(task):
    given, noisy = leaves_of(7, 4), jax.random.normal(jax.random.key(8), (4, T))
    samples = hierarchy.Sample(given[:, 0], leaves_of(9, 4), leaves_of(9, 4))
    seen = models.shown(SIZE, task, samples, noisy)

    def loss(params, joint):
        logits, _ = models.answers(SIZE, task, params, given, seen, jnp.ones(SIZE.blocks), joint)
        return jnp.mean(models.losses(SIZE, task, samples, logits))

    each = lambda params: jax.lax.map(lambda joint: jax.value_and_grad(loss)(params, joint), jnp.arange(2.0))  # noqa: E731
    values, gradients = quickly(each, one(networks(task)))
    assert values[0] == values[1]
    still, moved = (jnp.concatenate([a[i].ravel() for a in jax.tree.leaves(gradients["encoder"])]) for i in range(2))
    assert not jnp.any(still) and jnp.any(moved)
    assert_same(*(jax.tree.map(lambda a, i=i: a[i], gradients["network"]) for i in range(2)))


@pytest.mark.slow
@pytest.mark.parametrize("task", [None, "denoising"])
def test_rows_hold_every_number_of_a_member(task):
    params = pairs() if task is None else networks(task)
    rows = clip.to_rows(params)
    assert rows.shape == (1, models.row_length(SIZE, task))
    assert models.row_length(SIZE, task) == sum(a.size for a in jax.tree.leaves(one(params)))
    assert_same(models.tree_of(SIZE, task)(rows[0]), one(params))


@pytest.mark.slow
def test_losses_of_exact_laws_are_bayes_losses_and_classification_by_root_posteriors_is_by_the_best_score(x64):
    def found_and_expected(h, key):
        samples = hierarchy.sample(h, key, 3 * K + 2)  # two pairs are left over by groups
        noisy = samples.image + models.SIGMA * jax.random.normal(key, samples.image.shape)
        bayes = hierarchy.bayes_losses(h, samples, noisy, models.SIGMA, candidates=K)
        tokens = hierarchy.next_token(h, samples.text, image=samples.image)
        law = hierarchy.leaf_posterior(h, noisy, models.SIGMA, given=samples.text)
        f, g = hierarchy.root_posterior(h, image=samples.image), hierarchy.root_posterior(h, text=samples.text)
        score, texts = hierarchy.similarities(h, samples.image, samples.text), hierarchy.sample_prompts(h, key, 3)
        words = hierarchy.root_posterior(h, text=texts.reshape(-1, T)).reshape(S, 3, S)
        classes = evaluation.classes(h)
        return {
            # A constant on all logits is no part of the law.
            "denoising": (models.losses(SIZE, "denoising", samples, jnp.log(law) + 2.0), bayes.denoising),
            "next_token": (models.losses(SIZE, "next_token", samples, tokens + 2.0), bayes.next_token),
            "softmax": (clip.clip_in_groups("softmax", K, 0.0, f, g), bayes.contrastive),
            "dot": (clip.clip_in_groups("dot", K, 0.0, score, jnp.eye(len(score))), bayes.contrastive),
            "evaluation": (evaluation.contrastive(f[:-2], g[:-2]), bayes.contrastive),
            "classes": (classes, jnp.sum(exact.first_leaf(hierarchy.enumerate_joint(h), S), axis=1)),
            "classify": (evaluation.classify(f, words, classes), hierarchy.zero_shot(h, samples.image, prompts=texts)),
        }

    for name, (found, expected) in quickly(found_and_expected, tree(), jax.random.key(2)).items():
        np.testing.assert_allclose(found, expected, **CLOSE, err_msg=name)


@pytest.mark.slow
def test_prompts_that_are_the_whole_population_have_its_coefficient_and_its_excess(x64):
    n, pool, classes, rng = 3, 8, 2, np.random.default_rng(0)
    prior = np.array([0.3, 0.7])
    of_text = np.repeat(prior / pool, pool)  # all texts of a class are as likely, and so are all images
    joint = rng.gamma(2.0, size=(n, classes * pool))
    for _ in range(200):  # Sinkhorn: converges by a constant factor a step
        joint *= of_text / joint.sum(axis=0)
        joint /= n * joint.sum(axis=1, keepdims=True)
    label = np.repeat(np.eye(classes), pool, axis=1) * of_text
    truth = np.log(n * joint.reshape(n, classes, pool).sum(axis=2))
    f, g = rng.normal(size=(n, 3)), rng.normal(size=(classes, pool, 3))
    members = jnp.stack([f, f]), jnp.stack([g, np.broadcast_to(g[:, :1], g.shape)])  # of the second all are alike

    def both(label, joint, f, g):
        score = similarity.pairwise(similarity.log_softmax_product, f, g.reshape(-1, 3))
        exact = downstream.prompt_coefficient(label, joint, score), downstream.zero_shot(label, joint, score).log_loss
        return prompts.curves(jnp.asarray(truth), jnp.asarray(prior), *members), exact

    found, (b, log_loss) = quickly(both, *map(jnp.asarray, (label, joint, f, g)))
    # The variance of a pool has pool - 1 degrees of freedom.
    np.testing.assert_allclose(found["b"][0], pool / (pool - 1) * b, **CLOSE)
    np.testing.assert_allclose(found["limit"][0], log_loss.excess, **CLOSE)
    np.testing.assert_allclose(found["b"][1], 0.0, atol=1e-12)
    np.testing.assert_allclose(found["excess"][1], found["limit"][1], **CLOSE)


@pytest.mark.slow
def test_exact_losses_of_tables_are_those_of_the_chain():
    size = dataclasses.replace(SIZE, depth=1)
    hs = clip.hierarchies(size, jax.random.key(1), [0.3])
    with jax.enable_x64(True):
        table = jax.random.normal(jax.random.key(2), (S**2, S**2))

        def best_and_chain(h):
            joint = hierarchy.enumerate_joint(h)
            return risk.optimal_score(joint), bounds.chain(joint, table, K, side="both")

        best, chain = quickly(best_and_chain, one(exact.in_precision(hs, np.float64)))
        tables = jnp.stack([best, table])
    found = exact.exact_tables(hs, tables[None], (K,))
    best, other = ({name: value[0, i] for name, value in found.items()} for i in range(2))
    # The quadrature of the risks is right to about 1e-13, and an excess is a difference of two.
    for name in ("risk", "excess", "sufficiency"):
        np.testing.assert_allclose(np.squeeze(other[name]), getattr(chain, name), rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(np.sum(other["tokens"]), other["forward"], rtol=1e-10)
    np.testing.assert_allclose(other["forward"] + other["reverse"], other["sufficiency"], rtol=1e-10)
    assert other["excess"][0] <= other["sufficiency"] and other["zero_shot"] <= other["forward"]
    for name in ("excess", "sufficiency", "tokens", "zero_shot"):
        np.testing.assert_allclose(best[name], 0.0, atol=1e-12)


def test_the_sum_over_members_has_the_value_and_the_gradient_of_a_plain_sum(x64):
    w, c, x = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(((3, 4), (3,), (3, 5, 4))))
    params, batch = {"w": w, "c": c}, {"x": x, "count": jnp.arange(3)}

    def loss(params, batch):
        return jnp.sum(jnp.tanh(batch["x"] @ params["w"]) ** 2) + params["c"] ** 3 * batch["count"]

    totals = clip.sum_over_members(loss), lambda *both: jnp.sum(jax.vmap(loss)(*both))
    of_each = [jax.value_and_grad(lambda params, total=total: 2.5 * total(params, batch)) for total in totals]
    found, expected = quickly(lambda params: [total(params) for total in of_each], params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **CLOSE), found, expected)


@pytest.mark.slow
def test_members_of_equal_key_and_noise_see_equal_batches():
    hs = quickly(lambda key: clip.hierarchies(SIZE, key, [0.3, 0.3, 0.3, 0.6]), jax.random.key(1))
    keys = jax.random.split(jax.random.key(2), 2)[jnp.asarray([0, 0, 1, 0])]
    variant = models.Variant(jnp.arange(4.0), jnp.zeros(4), jnp.zeros(4), jnp.ones((4, SIZE.blocks)))
    data = {"key": jax.random.key_data(keys), "hierarchy": hs, "variant": variant}
    draw = models._batches(SIZE, "denoising", True)
    batches = quickly(lambda keys: jax.vmap(lambda key: draw(key, data))(keys), jax.random.split(jax.random.key(3)))
    shared = {name: value for name, value in batches.items() if name != "variant"}
    assert_same(*(jax.tree.map(lambda a, i=i: a[:, i], shared) for i in range(2)))
    samples = batches["samples"]
    for other in (samples.text[0, 2], samples.text[0, 3], samples.text[1, 0]):  # key, noise, step
        assert np.any(other != samples.text[0, 0])
    assert_same(samples.root[:, 3], samples.root[:, 0])  # members of one key are paired also where the noise differs


def test_mixed_messages_are_those_of_another_sample_of_the_batch():
    messages = np.random.default_rng(0).random((2, SIZE.batch, T, S), np.float32)
    assert_same(clip.mixed(jnp.float32(0.0), messages), messages)
    assert_same(clip.mixed(jnp.float32(1.0), messages)[:, 1:], messages[:, :-1])


def test_gaps_from_draws_are_those_of_a_list_of_all_candidates():
    random = np.random.default_rng(0)
    law, table, k = random.gamma(2.0, size=(3, 4)), random.normal(size=(3, 4)), 3
    law /= law.sum()
    p, q = law.sum(axis=1), law.sum(axis=0)
    lists = np.indices((4,) * k).reshape(k, -1)
    model = np.exp(table) / (np.exp(table) @ q)[:, None]
    true, said = (ratio[:, lists].mean(axis=1) for ratio in (law / p[:, None] / q[None, :], model))
    exact = p @ (true * np.log(true / said)) @ np.prod(q[lists], axis=0)
    found = [sampled.gap(law, table, k, 2048, [seed]) for seed in range(32)]
    error = np.std(found, ddof=1) / math.sqrt(len(found))
    assert error < exact / 50
    assert abs(np.mean(found) - exact) < 4 * error


@pytest.mark.slow
def test_excesses_along_training_are_those_of_the_measurement_of_the_same_members():
    h = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32)[None], tree())
    rows, keys = clip.to_rows(pairs())[:, None], jax.random.key_data(jax.random.split(jax.random.key(7), 1))
    cell = evaluation.Cell(h, h, h, rows, {}, keys)
    whole = evaluation.measure(SIZE, cell, {"pairs": jnp.ones((1, SIZE.blocks))}, 8 * K, 8, 8)
    found = evaluation.along(SIZE, h, h, rows, {}, keys, 8 * K, 8)
    assert set(found) == {"contrastive", "zero_shot"}
    for task, excess in found.items():
        # float32: differences of losses of order one.
        np.testing.assert_allclose(excess, whole[task] - whole[f"bayes/{task}"][:, None], atol=1e-5)


def test_groups_of_stored_pairs_hold_none_twice_and_batches_use_all_equally_often():
    numbers, counts = jnp.broadcast_to(jnp.arange(32)[:, None], (3, 32, 1)), jnp.asarray([4, 8, 32])
    keys = jax.random.key_data(jax.random.split(jax.random.key(0), 3))
    data, draw = ((numbers, numbers), counts, jnp.zeros(3), keys), sets._batches(SIZE)
    found = quickly(lambda keys: jax.vmap(lambda key: draw(key, data))(keys), jax.random.split(jax.random.key(1), 50))
    image, text, _ = found
    assert_same(image, text)  # partners stay together
    rows = np.asarray(image).reshape(50, 3, SIZE.batch)
    assert np.all(np.diff(np.sort(rows.reshape(50, 3, -1, K))) > 0)
    for of_member, count in zip(rows.swapaxes(0, 1), counts, strict=True):
        used = np.stack([np.bincount(batch, minlength=32) for batch in of_member])
        assert np.all(used[:, :count] == SIZE.batch // count) if count <= SIZE.batch else np.all(used <= 1)
        assert np.all(used[:, :count].any(axis=0)) and not used[:, count:].any()


@pytest.mark.slow
def test_members_are_trained_alone_and_as_their_variant_says():
    variants, task = ("standard", "standard", "guided", "shallow", "misguided", "joint"), "denoising"
    config = SimpleNamespace(size=SIZE, levels=(0.3,))
    hs, keys, variant = members.members(config, 0, variants)
    encoder = clip.start(SIZE, models.HEAD, keys)[models.GIVEN[task]]
    train = functools.partial(models.train, SIZE, task, hs, keys, variant, steps=5, progress=False)
    rows = train(encoder=encoder).params
    assert_same((rows, rows[0]), (train(encoder=encoder).params, rows[1]))
    assert np.all(np.isfinite(rows)) and len({np.asarray(row).tobytes() for row in rows}) == len(variants) - 1
    begun = quickly(lambda keys, encoder: models.start(SIZE, task, keys, encoder), keys, encoder)
    for i, name in enumerate(variants):
        old, new = jax.tree.map(lambda a, i=i: a[i], begun), models.tree_of(SIZE, task)(rows[i])
        moved = jax.tree.map(lambda a, b: float(jnp.max(jnp.abs(a - b))), old, new)
        assert (max(jax.tree.leaves(moved["encoder"])) > 0) == (name == "joint")
        assert (moved["read_out"] > 0) == (name in ("guided", "misguided"))
        # Another compilation of the start rounds otherwise; a step of Adam moves by about the learning rate.
        second = [most for part, most in moved["network"]["params"].items() if part.endswith("_1")]
        assert (max(jax.tree.leaves(second)) > SIZE.learning_rate / 100) == (name != "shallow")
    with pytest.raises(RuntimeError, match=r"training of denoising diverged: update 1 .* Lower the learning rate"):
        train(encoder=jax.tree.map(lambda a: 1e30 * a, encoder))  # its layer norms overflow
    with pytest.raises(ValueError, match="finite"):
        train(encoder=jax.tree.map(lambda a: a * jnp.nan, encoder))


def test_what_does_not_fit_together_is_named_before_any_training():
    keys = jax.random.split(jax.random.key(2), 2)
    train = functools.partial(clip.train_clip, SIZE, None, keys, head="softmax", steps=5)  # no need of hierarchies
    for candidates in (3, 16, jnp.asarray([4, 3])):
        with pytest.raises(ValueError, match="give divisors of the batch of 8 pairs"):
            train(candidates=candidates)
    fine = {"samples": {"mlp": (8, 16)}, "batch": 8, "validation": 8}
    sets.check(SimpleNamespace(**fine))
    for change, message in (
        ({"samples": {"mlp": (8, 12)}}, "give powers of two, at least 4"),
        ({"samples": {"mlp": (2, 8)}}, "give powers of two, at least 4"),
        ({"batch": 6}, "batch is 6: give a multiple of the 4 pairs"),
        ({"validation": 0}, "validation is 0: give a multiple of the 4 pairs"),
    ):
        with pytest.raises(ValueError, match=message):
            sets.check(SimpleNamespace(**fine | change))
