"""What the tests of closed-form optima share: random draws, random joints, exact means over batches."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

from theorykit.similarity import dot

N, K = 6, 3  # one shape for most tests, so that each function is compiled once
CLOSE = {"rtol": 1e-10, "atol": 1e-12}  # float64: sums of some hundred terms of order 1


def generator(*seed):
    return np.random.default_rng(seed)


def normal(seed, *shape):
    return jnp.asarray(generator(7, seed).standard_normal(shape))


def pair_batch(joint):
    """All pairs of points as batches of one, with their probabilities."""
    a, b = np.divmod(np.arange(joint.size), joint.shape[1])
    return a, b, joint.reshape(-1)


def expected_over_batches(joint, size, loss):
    """Mean of loss(rows a, rows b) over batches of `size` independent positive pairs."""
    a, b, p = pair_batch(joint)
    chosen = np.array(list(itertools.product(range(len(a)), repeat=size)))
    values = jax.vmap(loss)(jnp.asarray(a[chosen]), jnp.asarray(b[chosen]))
    return jnp.sum(jnp.prod(p[jnp.asarray(chosen)], axis=1) * values)


def on_scores(loss, s):
    """A batch loss of a table of scores: f(a) = s[a], g(b) = e_b."""
    unit = jnp.eye(s.shape[1], dtype=s.dtype)
    return lambda a, b: loss(s[a], unit[b], similarity=dot)


def rectangular(seed, shape=(3, 2)):
    weights = generator(3, seed).gamma(2.0, size=shape)
    return jnp.asarray(weights / weights.sum())
