"""What several losses are made of: cross-entropy, centring, and the checks of settings and of further negatives."""

import jax
import jax.numpy as jnp
import numpy as np

from theorykit.similarity import check_array


def cross_entropy(logits):
    """Mean negative log-probability of candidate i in row i."""
    return -jnp.mean(jnp.diagonal(jax.nn.log_softmax(logits, axis=-1)))


def centre(x):
    """Subtract the batch mean of every dimension."""
    # The mean of n equal numbers is rounded, and a normalisation would blow that rounding up to unit size. Subtracting
    # the first row beforehand changes nothing in exact arithmetic and leaves exact zeros of a constant dimension.
    shifted = x - jax.lax.stop_gradient(x[:1])
    return shifted - jnp.mean(shifted, axis=0, keepdims=True)


def sum_off_diagonal_squares(matrix):
    return jnp.sum(jnp.where(jnp.eye(matrix.shape[0], dtype=bool), 0.0, matrix * matrix))


def setting(loss, za, **named):
    """A temperature (> 0) or a weight (>= 0) in the dtype of the embeddings; checked unless it is traced."""
    ((name, value),) = named.items()
    if not isinstance(value, jax.core.Tracer):
        number = np.asarray(value, za.dtype)
        if not (0 < number < np.inf or (number == 0 and name != "temperature")):
            least = "> 0" if name == "temperature" else ">= 0"
            raise ValueError(f"{loss}: {name} is {value}; give a finite number {least} in {za.dtype}")
    return jnp.asarray(value, za.dtype)


def with_negatives(loss, candidates, negatives):
    """Candidates and below them the further negatives, if there are any, checked."""
    if negatives is None:
        return candidates
    check_array(loss, "negatives", negatives, like=candidates)
    if negatives.ndim != 2 or negatives.shape[1] != candidates.shape[1]:
        raise ValueError(f"{loss}: negatives have shape {negatives.shape}; give rows, (q, {candidates.shape[1]})")
    return jnp.concatenate([candidates, negatives])
