"""Rows of stored samples: a random bijection, by which any two rows are as likely to meet as any other two."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from experiments._hierarchy_clip import shuffled_rows

DRAWS = 20_000
# Of a correct sampler, over all tests of this file, less than one in a hundred fails; keys are fixed.
LEVEL = 1e-4


@pytest.fixture(scope="module")
def drawn():
    """Rows (draws, 8) for three counts, by one program: counts are traced."""

    def of_count(count):
        return jax.lax.map(lambda key: shuffled_rows(key, count, 8), jax.random.split(jax.random.key(1), DRAWS))

    counts = jnp.asarray([4, 8, 16])
    return dict(zip([4, 8, 16], np.asarray(jax.jit(lambda c: jax.lax.map(of_count, c))(counts)), strict=True))


def test_rows_of_a_batch_are_different_ones_until_all_are_used(drawn):
    for count, rows in drawn.items():
        assert rows.min() == 0 and rows.max() == count - 1
        used = min(count, 8)
        assert np.all(np.diff(np.sort(rows[:, :used])) > 0)
        np.testing.assert_array_equal(rows[:, used:], rows[:, : 8 - used])


def test_all_pairs_of_rows_are_equally_likely_in_all_places_of_a_group(drawn):
    for count, rows in drawn.items():
        for i in range(4):
            for j in range(i):
                table = np.bincount(rows[:, i] * count + rows[:, j], minlength=count**2).reshape(count, count)
                assert stats.chisquare(table[~np.eye(count, dtype=bool)]).pvalue > LEVEL, (count, i, j)


def test_rows_of_one_residue_are_negatives_of_each_other_as_often_as_by_chance(drawn):
    same = np.mean(drawn[16][:, 0] % 4 == drawn[16][:, 1] % 4)
    chance = 3 / 15
    assert abs(same - chance) < stats.norm.isf(LEVEL / 2) * np.sqrt(chance * (1 - chance) / DRAWS)
