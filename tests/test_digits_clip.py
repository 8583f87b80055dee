"""Losses of held-out digits against sums written out, and bootstrap intervals against draws one by one."""

import itertools

import numpy as np
import pytest

from experiments import _digits_clip as clip

RNG = np.random.default_rng(0)
TABLE = RNG.normal(size=(5, 5))


def loss_and_error(table, i, others):
    odds = [np.exp(table[i, j] - table[i, i]) for j in others]
    return np.log(1 + sum(odds)), float(max(odds) >= 1)


def blocks_of_two(others):
    """The ways to cut four rows into two pairs."""
    first, *rest = others
    return [((first, j), tuple(k for k in rest if k != j)) for j in rest]


def test_all_other_rows_as_negatives_give_the_full_loss_and_error():
    log_loss, error = clip.candidate_losses(TABLE, (4,), 3, seed=0)
    expected = [loss_and_error(TABLE, i, [j for j in range(5) if j != i]) for i in range(5)]
    np.testing.assert_allclose(np.stack([log_loss[:, 0], error[:, 0]], axis=1), expected, rtol=1e-12)


def test_blocks_of_one_negative_are_every_other_row_once():
    log_loss, error = clip.candidate_losses(TABLE, (1, 4), 2, seed=0)
    expected = [np.mean([loss_and_error(TABLE, i, [j]) for j in range(5) if j != i], axis=0) for i in range(5)]
    np.testing.assert_allclose(np.stack([log_loss[:, 0], error[:, 0]], axis=1), expected, rtol=1e-12)


def test_blocks_of_two_negatives_are_disjoint():
    found = np.stack([part[:, 0] for part in clip.candidate_losses(TABLE, (2, 4), 1, seed=0)], axis=1)
    for i, value in enumerate(found):
        cuts = blocks_of_two([j for j in range(5) if j != i])
        possible = [np.mean([loss_and_error(TABLE, i, block) for block in cut], axis=0) for cut in cuts]
        assert any(np.allclose(value, one, rtol=1e-12) for one in possible)


def test_a_tie_with_a_negative_is_an_error():
    assert np.all(clip.candidate_losses(np.zeros((3, 3)), (2,), 1, seed=0)[1] == 1)


def test_all_other_labels_as_negatives_give_the_loss_over_all_classes():
    labels = np.array([0, 2, 2, 1, 0])
    scores = TABLE[:, :3]
    expected = np.mean([np.log(np.exp(row).sum()) - row[label] for row, label in zip(scores, labels, strict=True)])
    assert clip.distinct_losses(scores, labels, 2, 3, seed=0) == pytest.approx(expected, rel=1e-12)


def test_fewer_labels_as_negatives_are_drawn_evenly_and_never_that_of_the_row():
    labels, draws = np.array([0, 1, 3]), 2000
    scores = TABLE[:3, :4]
    values = [
        [np.log1p(np.exp(row[[*others]] - row[label]).sum()) for others in itertools.combinations(rest, 2)]
        for row, label in zip(scores, labels, strict=True)
        for rest in [[c for c in range(4) if c != label]]
    ]
    # Rows and draws are independent: five deviations of their mean.
    error = np.sqrt(np.mean(np.var(values, axis=1)) / (draws * len(labels)))
    assert abs(clip.distinct_losses(scores, labels, 2, draws, seed=0) - np.mean(values)) < 5 * error


def classified_by_loops(log_w, chosen, labels, frequency, average):
    """Losses and hits; chosen: the texts of each class."""
    losses, hits = [], []
    for row, label in zip(log_w, labels, strict=True):
        if average == "similarities":
            odds = [q * np.exp(np.mean([row[t] for t in texts])) for q, texts in zip(frequency, chosen, strict=True)]
        else:
            odds = [q * np.mean([np.exp(row[t]) for t in texts]) for q, texts in zip(frequency, chosen, strict=True)]
        losses.append(-np.log(odds[label] / sum(odds)))
        hits.append(float(np.argmax(odds) == label))
    return losses, hits


@pytest.mark.parametrize("average", ["exponentials", "similarities"])
@pytest.mark.parametrize("prompts", [None, 3])
def test_classification_by_prompts_is_bayes_rule_on_pooled_scores(average, prompts):
    rng = np.random.default_rng(1)
    log_w, of_texts, labels = rng.normal(size=(4, 9)), np.array([0, 1, 2, 0, 1, 2, 0, 0, 1]), np.array([0, 2, 1, 1])
    frequency = np.array([0.5, 0.3, 0.2])
    texts = [np.flatnonzero(of_texts == c) for c in range(3)]
    if prompts is not None:
        draw = np.random.default_rng(2)
        texts = [draw.choice(one, prompts) for one in texts]
    found = clip.by_prompts(log_w, of_texts, labels, frequency, average, prompts, np.random.default_rng(2))
    np.testing.assert_allclose(found, classified_by_loops(log_w, texts, labels, frequency, average), rtol=1e-12)


def test_bootstrap_redraws_folds_and_then_rows_in_each():
    losses = np.random.default_rng(3).normal(size=(3, 6, 2))
    rng, means = np.random.default_rng(4), []
    for _ in range(50):
        folds = rng.integers(3, size=3)
        means.append(np.mean([losses[fold][rng.integers(6, size=6)].mean(axis=0) for fold in folds], axis=0))
    expected = np.quantile(means, (0.05, 0.95), axis=0)
    np.testing.assert_allclose(clip.bootstrap(losses, 50, 4, 0.9), expected, rtol=1e-12)


def test_folds_hold_every_digit_out_at_most_once_and_train_on_all_others():
    found = clip.folds(8)
    held = np.concatenate([fold.heldout for fold in found])
    assert len(np.unique(held)) == len(held) == 1797 - 1797 % 8
    for fold in found:
        np.testing.assert_array_equal(np.sort(np.concatenate(fold)), np.sort(held))
