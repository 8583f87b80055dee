"""Downstream losses against the sufficiency that bounds or equals them, against loops and sampling."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from theorykit.surrogate import denoisers, downstream
from theorykit.surrogate import joint as joints
from theorykit.surrogate.information_loss import model_conditional, sufficiency
from theorykit.surrogate.risk import contrastive_risk, excess_risk, optimal_score

NX, NC, SIZES = 4, 3, (2, 3)
NY = 6


def draw(seed, deviation=1.0, zeros=0.0):
    one, two = jax.random.split(jax.random.key(seed))
    return joints.random_joint(one, NX, NY, zeros=zeros), deviation * jax.random.normal(two, (NX, NY))


def labelled(seed, deviation=1.0):
    chain = joints.random_labelled(jax.random.key(seed), NC, NY, NX)
    score = deviation * jax.random.normal(jax.random.key(seed + 1), (NX, NY))
    return chain.label_text, chain.text_image.T, score


@pytest.mark.slow
@pytest.mark.parametrize("zeros", [0.0, 0.4])
@pytest.mark.parametrize("sizes", [SIZES, (6,), (3, 1, 2)])
def test_excesses_of_all_tokens_sum_to_the_sufficiency(x64, sizes, zeros):
    for seed in range(5):
        joint, score = draw(seed, zeros=zeros)
        found = downstream.next_token(joint, score, sizes)
        assert found.excess.shape == (len(sizes),) and jnp.all(found.excess >= 0)
        np.testing.assert_allclose(jnp.sum(found.excess), sufficiency(joint, score), rtol=1e-12)
        entropy = -jnp.sum(jnp.where(joint > 0, joint * jnp.log(joint / joint.sum(1)[:, None]), 0.0))
        np.testing.assert_allclose(jnp.sum(found.bayes), entropy, rtol=1e-12)


@pytest.mark.slow
def test_the_order_of_tokens_is_that_of_ravel_multi_index(x64):
    joint, score = draw(0)
    model, found = np.asarray(model_conditional(joint, score)), downstream.next_token(joint, score, SIZES)
    risks = np.zeros(2)
    for x, y in itertools.product(range(NX), range(NY)):
        first, _ = np.unravel_index(y, SIZES)
        prefix = sum(model[x, np.ravel_multi_index((first, t), SIZES)] for t in range(SIZES[1]))
        risks -= float(joint[x, y]) * np.log([prefix, model[x, y] / prefix])
    np.testing.assert_allclose(found.risk, risks, rtol=1e-12)


@pytest.mark.slow
def test_zero_shot_excess_is_bounded_by_the_sufficiency_along_a_markov_chain(x64):
    for seed in range(20):
        label_text, joint, score = labelled(seed, deviation=3.0)
        found, bound = downstream.zero_shot(label_text, joint, score), sufficiency(joint, score)
        assert 0 <= found.log_loss.excess <= bound
        assert 0 <= found.error.excess <= jnp.sqrt(2 * found.log_loss.excess)
        best = downstream.zero_shot(label_text, joint, optimal_score(joint))
        assert best.log_loss.excess < 1e-14 and best.error.excess == 0
        np.testing.assert_allclose(best.log_loss.risk, found.log_loss.bayes, rtol=1e-12)


@pytest.mark.slow
def test_labels_that_are_no_function_of_the_text_break_the_bound(x64):
    # The label is the image itself, the text knows nothing of it.
    joint = jnp.full((2, 2), 0.25)
    label_text, label_image = jnp.full((2, 2), 0.25), jnp.eye(2) / 2
    found = downstream.zero_shot(label_text, joint, jnp.zeros((2, 2)), label_image=label_image)
    assert sufficiency(joint, jnp.zeros((2, 2))) == 0
    np.testing.assert_allclose(found.log_loss.excess, np.log(2), rtol=1e-12)


@pytest.mark.slow
def test_many_prompts_approach_all_texts_as_predicted(x64):
    label_text, joint, score = labelled(3, deviation=0.5)
    limit = downstream.zero_shot(label_text, joint, score).log_loss.excess
    b = downstream.prompt_coefficient(label_text, joint, score)
    estimate = downstream.zero_shot_with_prompts(label_text, joint, score, 64, key=jax.random.key(0), samples=20_000)
    # The next term is of order 1/M^2.
    error = 4 * estimate.standard_error + 10 * abs(b) / 64**2
    assert abs(estimate.value - limit - b / 64) < error < abs(b) / 64 / 2
    other = downstream.zero_shot_with_prompts(
        label_text, joint, score, 64, key=jax.random.key(0), samples=2000, average="similarities"
    )
    assert abs(other.value - estimate.value) > 4 * (other.standard_error + estimate.standard_error)


@pytest.mark.slow
def test_one_prompt_agrees_with_all_choices_of_prompts(x64):
    label_text, joint, score = labelled(5)
    prompts = np.asarray(label_text / label_text.sum(1)[:, None])
    classes, given_text = np.asarray(label_text.sum(1)), np.asarray(label_text / label_text.sum(0)[None, :])
    truth = np.asarray(joint) @ given_text.T
    known = truth / truth.sum(1)[:, None]
    total = 0.0
    for chosen in itertools.product(range(NY), repeat=NC):
        chance = np.prod([prompts[c, y] for c, y in enumerate(chosen)])
        model = classes * np.exp(np.asarray(score)[:, chosen])
        model /= model.sum(1, keepdims=True)
        total += chance * np.sum(truth * np.log(known / model))
    found = downstream.zero_shot_with_prompts(label_text, joint, score, 1, key=jax.random.key(1), samples=20_000)
    assert abs(found.value - total) < 4 * found.standard_error


@pytest.mark.parametrize("candidates", [1, 2, 3])
def test_retrieval_error_agrees_with_all_candidates(x64, candidates):
    joint, score = draw(1)
    score = jnp.round(score)  # ties
    q, missed = np.asarray(joint.sum(0)), 0.0
    for x, y in itertools.product(range(NX), range(NY)):
        for others in itertools.product(range(NY), repeat=candidates - 1):
            scores = np.asarray(score)[x, [y, *others]]
            wins = (scores[0] == scores.max()) / np.sum(scores == scores.max())
            missed += float(joint[x, y]) * np.prod(q[list(others)]) * (1 - wins)
    found = downstream.retrieval(joint, score, candidates)
    np.testing.assert_allclose(found.error.risk, missed, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(found.log_loss.risk, contrastive_risk(joint, score, candidates))


def test_retrieval_excess_error_obeys_pinsker(x64):
    for seed in range(10):
        joint, score = draw(seed, zeros=0.3)
        for candidates in (2, 10, 1000):
            found = downstream.retrieval(joint, score, candidates)
            assert -1e-12 <= found.error.excess <= jnp.sqrt(2 * excess_risk(joint, score, candidates))


POINTS = (-1.0, 0.2, 0.9, 2.5)


@pytest.mark.slow
@pytest.mark.parametrize("zeros", [0.0, 0.4])
def test_integrated_excess_of_denoising_is_the_reverse_sufficiency(x64, zeros):
    joint, score = draw(2, zeros=zeros)
    found = denoisers.integrated_denoising(joint, score, jnp.array(POINTS))
    np.testing.assert_allclose(found, sufficiency(joint.T, score.T), rtol=1e-9)
    assert abs(sufficiency(joint, score) - found) > 1e-2  # the other direction is another number


@pytest.mark.slow
def test_denoising_agrees_with_sampling(x64):
    joint, score = draw(3)
    points, g, n = jnp.array(POINTS), 0.7, 200_000
    pair, noise = jax.random.split(jax.random.key(0))
    x, y = jnp.divmod(jax.random.choice(pair, NX * NY, (n,), p=joint.ravel()), NY)
    z = jnp.sqrt(g) * points[x] + jax.random.normal(noise, (n,))
    log_noise = -((z[:, None] - jnp.sqrt(g) * points[None, :]) ** 2) / 2
    exact = denoisers.denoising(joint, score, points, g)
    for prior, wanted in ((jnp.log(joint), exact.bayes), (jnp.log(joint.sum(1))[:, None] + score, exact.risk)):
        estimate = jax.nn.softmax(log_noise + prior.T[y], axis=1) @ points
        errors = (points[x] - estimate) ** 2
        assert abs(errors.mean() - wanted) < 4 * errors.std() / np.sqrt(n)
    assert exact.excess <= (POINTS[-1] - POINTS[0]) ** 2 / 2 * sufficiency(joint.T, score.T)


def test_without_signal_the_error_is_the_variance_given_the_partner_and_with_much_signal_none(x64):
    joint, score = draw(4)
    points = jnp.array(POINTS)
    weak, strong = (denoisers.denoising(joint, score, points, g) for g in (1e-12, 1e4))
    conditional = joint / joint.sum(0)[None, :]
    mean = points @ conditional
    variance = joint.sum(0) @ (points**2 @ conditional - mean**2)
    np.testing.assert_allclose(weak.bayes, variance, rtol=1e-5)
    assert abs(strong.bayes) < 1e-12 and strong.excess < 1e-12


def test_bad_input_is_named(x64, as_users_run):
    label_text, joint, score = labelled(0)
    with pytest.raises(ValueError, match="multiply to 4, not to ny = 6"):
        downstream.next_token(joint, score, (2, 2))
    with pytest.raises(ValueError, match="different laws of y"):
        downstream.zero_shot(label_text[:, ::-1], joint, score)
    with pytest.raises(ValueError, match="6 symbols y, the other 5"):
        downstream.zero_shot(label_text, joint[:, :5] / joint[:, :5].sum(), score[:, :5])
    with pytest.raises(ValueError, match="at least 1 and 2"):
        downstream.zero_shot_with_prompts(label_text, joint, score, 0, key=jax.random.key(0), samples=9)
    with pytest.raises(ValueError, match="give 'exponentials'"):
        downstream.zero_shot_with_prompts(
            label_text, joint, score, 1, key=jax.random.key(0), samples=9, average="scores"
        )
    with pytest.raises(ValueError, match="different finite numbers"):
        denoisers.denoising(joint, score, jnp.zeros(NX), 1.0)
    with pytest.raises(ValueError, match="give a positive number"):
        denoisers.denoising(joint, score, jnp.array(POINTS), 0.0)
    with pytest.raises(ValueError, match="one number to each of 4"):
        denoisers.integrated_denoising(joint, score, jnp.array(POINTS[:3]))
