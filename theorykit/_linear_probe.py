"""The solvers of `theorykit.evaluate.linear_probe`, in float64; see there for the problem."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

METHODS = ("logistic", "ridge")
# In the coordinates of `_logistic` the Hessian is at most about 1 where descent starts: a gradient of this size then
# leaves the loss within eps / 2 of its minimum.
_GRADIENT = float(np.sqrt(np.finfo(np.float64).eps))
# Ten classes of digits that a plane separates take about 500 steps at a penalty of 1e-5, and more below.
_MOST_STEPS = 2000


def fit(x: np.ndarray, labels: np.ndarray, penalty: float, classes: int, method: str):
    """Weights (d, c) and offset (c,), in float64, and whether the solver converged."""
    solver = {"logistic": _logistic, "ridge": _ridge}[method]
    # The solvers and optax mix Python numbers and arrays, under JAX's ordinary rules whatever the caller's.
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        weights, offset, size = solver(jnp.asarray(x, jnp.float64), jnp.asarray(labels), penalty, classes)
        return np.asarray(weights), np.asarray(offset), float(size) <= _GRADIENT


@partial(jax.jit, static_argnums=3)
def _ridge(x, labels, penalty, classes):
    mean = jnp.mean(x, axis=0)
    targets = jax.nn.one_hot(labels, classes, dtype=x.dtype)
    frequency = jnp.mean(targets, axis=0)
    u, s, vt = jnp.linalg.svd(x - mean, full_matrices=False)
    # Directions that are zero to rounding (numpy.linalg.matrix_rank's rule) have no weight, also where lambda = 0.
    alive = s > max(x.shape) * jnp.finfo(x.dtype).eps * s[0]
    gains = jnp.where(alive, s / jnp.where(alive, s * s + x.shape[0] * penalty, 1), 0)
    weights = _product(vt.T, gains[:, None] * _product(u.T, targets - frequency))
    return weights, frequency - _product(mean, weights), 0.0


@partial(jax.jit, static_argnums=3)
def _logistic(x, labels, penalty, classes):
    mean = jnp.mean(x, axis=0)
    u, s, vt = jnp.linalg.svd(x - mean, full_matrices=False)
    # At zero weights the Hessian is Cov(x) (I - 11^T / c) / c + lambda, for the offset (I - 11^T / c) / c: these
    # scales make both 1 or less. Directions outside the rows' span have no weight at the minimum.
    scale = 1 / jnp.sqrt(s**2 / (x.shape[0] * classes) + penalty)
    rows = u * (s * scale)

    def loss(parameters):
        weights, offset = parameters
        logits = _product(rows, weights) + classes**0.5 * offset
        fitted = jnp.mean(optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels))
        return fitted + penalty / 2 * jnp.sum((scale[:, None] * weights) ** 2)

    optimizer = optax.lbfgs()
    value_and_grad = optax.value_and_grad_from_state(loss)

    def unfinished(carry):
        _, _, size, step = carry
        return (size > _GRADIENT) & (step < _MOST_STEPS)

    def advance(carry):
        parameters, state, _, step = carry
        value, gradient = value_and_grad(parameters, state=state)
        updates, state = optimizer.update(gradient, state, parameters, value=value, grad=gradient, value_fn=loss)
        size = optax.tree.norm(optax.tree.get(state, "grad"))
        return optax.apply_updates(parameters, updates), state, size, step + 1

    zero = (jnp.zeros((len(s), classes), x.dtype), jnp.zeros(classes, x.dtype))
    start = (zero, optimizer.init(zero), jnp.asarray(jnp.inf, x.dtype), 0)
    (weights, offset), _, size, _ = jax.lax.while_loop(unfinished, advance, start)
    weights = _product(vt.T, scale[:, None] * weights)
    return weights, classes**0.5 * offset - _product(mean, weights), size


def _product(a, b):
    return jnp.matmul(a, b, precision="highest")
