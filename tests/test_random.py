"""Draws of many axes at once are those of jax.random."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from theorykit import _random


@pytest.mark.parametrize("shape", [(), (5,), (3, 4), (2, 3, 4, 5), (2, 0, 3)])
@pytest.mark.parametrize("name", ["normal", "uniform"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_draw_is_that_of_jax_random(name, shape, dtype):
    key = jax.random.key(3)
    ours, theirs = (getattr(module, name)(key, shape, dtype) for module in (_random, jax.random))
    assert ours.shape == shape and ours.dtype == dtype
    np.testing.assert_array_equal(ours, theirs)
