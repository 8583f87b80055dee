"""The momentum encoder of the training loop, and its queue of keys."""

import itertools
from collections import deque

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_training import MOMENTUM, SGD, assert_identical, contrast, embed, regression, stochastic

from theorykit.training import MomentumEncoder, train


@pytest.mark.parametrize("queue_size", [3, 17])
def test_queue_and_momentum_match_a_python_loop_with_a_deque(x64, queue_size):
    params, data = regression(dtype=np.float64)
    decay, steps = 0.7, 4
    encoder = MomentumEncoder(decay, queue_size, embed)
    run = train(contrast, params, data, optimizer=SGD, steps=steps, momentum_encoder=encoder)

    p = q = jax.tree.map(jnp.asarray, params)
    evaluate = jax.jit(jax.value_and_grad(contrast))
    state = SGD.init(p)
    queue = deque(maxlen=queue_size)
    for _ in range(-(-queue_size // 7)):
        queue.extend(embed(q, data))
    losses = []
    for _ in range(steps):
        keys = embed(q, data)
        value, gradient = evaluate(p, data, keys, jnp.stack(list(queue)))
        updates, state = SGD.update(gradient, state, p)
        p = optax.apply_updates(p, updates)
        q = jax.tree.map(lambda a, b: decay * a + (1.0 - decay) * b, q, p)
        queue.extend(keys)
        losses.append(value)

    # A few dozen roundings a step, not amplified by gradient descent.
    tolerance = 1000 * np.finfo(np.float64).eps
    np.testing.assert_allclose(run.losses, jnp.stack(losses), rtol=0, atol=tolerance)
    np.testing.assert_allclose(run.state.queue, jnp.stack(list(queue)), rtol=0, atol=tolerance)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=tolerance), run.state.averaged, q)
    np.testing.assert_allclose(run.state.keys, embed(q, data), rtol=0, atol=tolerance)


def test_the_queue_takes_the_keys_of_each_batch_in_order():
    states = [stochastic(steps, metric_steps=[0]).state for steps in range(5)]
    queue = deque(states[0].queue, maxlen=5)
    for before, after in itertools.pairwise(states):
        queue.extend(before.keys)
        assert_identical(jnp.stack(list(queue)), after.queue)


def test_the_first_queue_holds_embeddings_of_the_data_by_the_initial_encoder():
    params, data = regression()
    run = train(
        contrast, params, data, optimizer=SGD, steps=0, momentum_encoder=MOMENTUM, batch_size=2, key=jax.random.key(0)
    )
    distance = np.abs(np.asarray(run.state.queue)[:, None] - np.asarray(embed(params, data))[None]).max(axis=-1)
    assert run.state.queue.shape == (5, 3)
    np.testing.assert_array_equal(distance.min(axis=1), 0.0)


@pytest.mark.parametrize(("decay", "expected"), [(0.0, "now"), (1.0, "initial")])
def test_the_extreme_decays_give_the_current_and_the_initial_encoder(decay, expected):
    params, data = regression()
    encoder = MomentumEncoder(decay, 4, embed)
    run = train(contrast, params, data, optimizer=SGD, steps=5, momentum_encoder=encoder)
    assert_identical(run.state.averaged, run.params if expected == "now" else jax.tree.map(jnp.asarray, params))
