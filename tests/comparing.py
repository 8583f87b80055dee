"""Inputs that the tests of comparisons share."""

import jax.numpy as jnp
import numpy as np


def normal(seed, *shape):
    """Standard normal numbers in the default float dtype."""
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.result_type(float))


def haar(seed, d, k=None):
    """Orthonormal columns in a random direction, (d, k); square unless k is given."""
    columns = np.linalg.qr(np.random.default_rng(seed).normal(size=(d, k or d)))[0]
    return jnp.asarray(columns, jnp.result_type(float))


def gram(x):
    """The linear kernel."""
    return jnp.matmul(x, x.T, precision="highest")


def invertible(seed, p):
    """A matrix with singular values from 1 to 4, far from orthogonal and well conditioned."""
    return haar(seed, p) @ jnp.diag(jnp.linspace(1.0, 4.0, p)) @ haar(seed + 1, p)


def close(a, b, ulps=100):
    """Equal up to a number of roundings of numbers of size 1: each value here comes from sums of some tens of terms."""
    a, b = np.asarray(a), np.asarray(b)
    if a.dtype.kind == "i":
        return np.testing.assert_array_equal(a, b)
    np.testing.assert_allclose(a, b, rtol=0, atol=ulps * np.finfo(a.dtype).eps * max(1.0, np.max(np.abs(b), initial=0)))
