"""The training loop against closed forms, plain Python loops, and itself after interruptions."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from theorykit import training
from theorykit.training import MomentumEncoder, train

# The problems. Optimisers are made once, since the compiled loop is found again by their identity.

ADAM = optax.adam(0.05)
SGD = optax.sgd(0.1)
NOISY = optax.chain(optax.add_noise(0.01, 0.55, jax.random.key(7)), optax.sgd(0.1, momentum=0.9))


def regression(n=7, z=3, dtype=np.float32):
    rng = np.random.default_rng(0)
    data = {"x": rng.normal(size=(n, z)).astype(dtype), "y": rng.normal(size=n).astype(dtype)}
    params = {"w": rng.normal(size=z).astype(dtype), "b": np.zeros((), dtype)}
    return params, data


def squared_error(params, batch):
    residual = jnp.tanh(jnp.dot(batch["x"], params["w"])) + params["b"] - batch["y"]
    return jnp.mean(residual**2)


def jitter(key, batch):
    return batch | {"x": batch["x"] + 0.1 * jax.random.normal(key, batch["x"].shape, batch["x"].dtype)}


def embed(params, batch):
    return batch["x"] * params["w"][None]


def contrast(params, batch, keys, queue):
    query = embed(params, batch)
    positive = jnp.sum(query * keys, axis=-1)
    negative = jax.nn.logsumexp(jnp.dot(query, queue.T), axis=-1)
    return jnp.mean(jnp.logaddexp(negative, positive) - positive) + squared_error(params, batch)


def norm(params):
    return {"norm": optax.tree.norm(params), "w": params["w"]}


def plain(steps, **more):
    return train(squared_error, *regression(), optimizer=ADAM, steps=steps, metrics=norm, **more)


def stochastic(steps, **more):
    """Everything at once: Adam, mini-batches, augmentation, momentum encoder, metrics."""
    more = {"metrics": norm, "metric_steps": range(0, steps + 1, 4), "key": jax.random.key(3)} | more
    return train(
        contrast,
        *regression(),
        optimizer=ADAM,
        steps=steps,
        batch_size=2,
        augment=jitter,
        momentum_encoder=MOMENTUM,
        **more,
    )


MOMENTUM = MomentumEncoder(decay=0.9, queue_size=5, encode=embed)


def assert_identical(a, b):
    """Equal in structure, dtype and every bit."""

    def same(p, q):
        if isinstance(p, int | str):
            assert p == q
            return
        if jnp.issubdtype(p.dtype, jax.dtypes.prng_key):
            p, q = jax.random.key_data(p), jax.random.key_data(q)
        assert p.dtype == q.dtype and p.shape == q.shape and np.asarray(p).tobytes() == np.asarray(q).tobytes()

    jax.tree.map(same, a, b)


# What the loop computes


def test_gradient_descent_on_a_quadratic_matches_the_closed_form(x64):
    """p_t = p* + (I - r A)^t (p_0 - p*) for the loss p'Ap/2 - b'p."""
    rng = np.random.default_rng(1)
    rotation = np.linalg.qr(rng.normal(size=(4, 4)))[0]
    eigenvalues = np.array([0.1, 0.5, 1.0, 2.0])
    matrix = rotation @ np.diag(eigenvalues) @ rotation.T
    vector, p0 = rng.normal(size=4), rng.normal(size=4)

    def quadratic(p, batch):
        a, b = batch["a"], batch["b"]
        return 0.5 * jnp.dot(p, jnp.dot(a, p)) - jnp.dot(b, p)

    steps, rate = 50, 0.4
    run = train(
        quadratic,
        p0,
        {"a": matrix, "b": vector},
        optimizer=optax.sgd(rate),
        steps=steps,
        metrics=lambda p: p,
        metric_steps=range(steps + 1),
    )
    solution = np.linalg.solve(matrix, vector)
    decay = (1.0 - rate * eigenvalues) ** np.arange(steps + 1)[:, None]
    expected = solution + (decay * (rotation.T @ (p0 - solution))) @ rotation.T
    np.testing.assert_allclose(run.metrics, expected, rtol=0, atol=1e-12)
    losses = [0.5 * p @ matrix @ p - vector @ p for p in expected[:-1]]
    np.testing.assert_allclose(run.losses, losses, rtol=0, atol=1e-12)
    assert run.params.dtype == run.losses.dtype == jnp.float64
    assert run.status == "finished" and run.steps == steps


@pytest.mark.parametrize("optimizer", [SGD, ADAM], ids=["sgd", "adam"])
def test_the_loop_equals_a_plain_python_loop(x64, optimizer):
    """Equal to rounding: inside one program the compiler may contract a multiplication and an addition."""
    params, data = regression(dtype=np.float64)
    steps = 20
    run = train(squared_error, params, data, optimizer=optimizer, steps=steps)
    p = jax.tree.map(jnp.asarray, params)
    evaluate = jax.jit(jax.value_and_grad(squared_error))
    state, losses = optimizer.init(p), []
    for _ in range(steps):
        value, gradient = evaluate(p, data)
        with jax.numpy_dtype_promotion("standard"):  # which Adam needs
            updates, state = optimizer.update(gradient, state, p)
        p = optax.apply_updates(p, updates)
        losses.append(value)
    # About ten roundings a step, and a step amplifies the errors so far at most by 1 + rate * curvature < 2 at first
    # and contracts them near the minimum: 20 * 10 roundings with a factor of 10 to spare.
    tolerance = 2000 * np.finfo(np.float64).eps
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=tolerance), run.params, p)
    np.testing.assert_allclose(run.losses, jnp.stack(losses), rtol=0, atol=tolerance)


def test_zero_steps_return_the_initial_parameters():
    params, data = regression()
    run = train(squared_error, params, data, optimizer=SGD, steps=0, metrics=norm, metric_steps=[0])
    assert_identical(run.params, jax.tree.map(jnp.asarray, params))
    assert run.losses.shape == (0,) and run.metrics["w"].shape == (1, 3) and run.status == "finished"
    np.testing.assert_allclose(run.state.loss, squared_error(params, data), rtol=1e-6)


def test_a_batch_of_all_rows_is_gradient_descent_in_another_order(x64):
    params, data = regression(dtype=np.float64)
    full = train(squared_error, params, data, optimizer=SGD, steps=10)
    shuffled = train(squared_error, params, data, optimizer=SGD, steps=10, batch_size=7, key=jax.random.key(0))
    # Only the order of a sum of 7 terms differs; gradient descent on this loss contracts.
    np.testing.assert_allclose(full.losses, shuffled.losses, rtol=0, atol=10 * 7 * np.finfo(np.float64).eps)


def visited_rows(n, batch_size, steps, key):
    """(steps, n) how often each row was in each batch: the loss sums p over the rows, so an update subtracts counts."""
    run = train(
        lambda p, rows: jnp.sum(p[rows]),
        np.zeros(n, np.float32),
        np.arange(n),
        optimizer=optax.sgd(1.0),
        steps=steps,
        batch_size=batch_size,
        key=key,
        metrics=lambda p: p,
        metric_steps=range(steps + 1),
    )
    return -np.diff(run.metrics, axis=0)


def test_an_epoch_visits_each_row_once_in_a_fresh_order():
    counts = visited_rows(6, 2, 9, jax.random.key(0)).reshape(3, 3, 6)
    np.testing.assert_array_equal(counts.sum(axis=2), 2)
    np.testing.assert_array_equal(counts.sum(axis=1), 1)
    assert not np.array_equal(counts[0], counts[1]) or not np.array_equal(counts[1], counts[2])


def test_an_epoch_drops_the_remainder_and_repeats_nothing():
    counts = visited_rows(7, 3, 40, jax.random.key(1)).reshape(20, 2, 7).sum(axis=1)
    assert set(np.unique(counts)) == {0.0, 1.0}
    np.testing.assert_array_equal(counts.sum(axis=1), 6)
    # The row left out is drawn anew: the chance that one of 7 is in all of 20 epochs is 7 (6/7)^20 = 0.3, that the
    # same row is left out in all of them 7^-19.
    assert np.any(counts[0] != counts, axis=1).any()


def test_augmentation_has_a_new_key_at_every_step():
    def only_noise(params, batch):
        return jnp.sum(params * batch)

    run = train(
        only_noise,
        np.zeros(3, np.float32),
        np.zeros((1, 3), np.float32),
        optimizer=optax.sgd(1.0),
        steps=6,
        key=jax.random.key(0),
        augment=lambda key, batch: jax.random.normal(key, (3,)),
        metrics=lambda p: p,
        metric_steps=range(7),
    )
    noise = -np.diff(run.metrics, axis=0)
    assert len(np.unique(noise)) == 18


# What must not change the results


def test_the_length_of_the_chunks_changes_nothing(monkeypatch):
    runs = [stochastic(23)]
    # One step at a time; then doubling without end, so that the only bounds are those of the buffer and the metrics.
    for seconds, longest in [(0.0, 1024), (np.inf, 1024), (np.inf, 5)]:
        monkeypatch.setattr(training, "_CHUNK_SECONDS", seconds)
        monkeypatch.setattr(training, "LONGEST_CHUNK", longest)
        runs.append(stochastic(23))
    for run in runs[1:]:
        assert_identical(runs[0], run)


def test_metric_steps_change_nothing_and_see_the_state_after_that_many_updates():
    every, some = stochastic(9, metric_steps=range(10)), stochastic(9, metric_steps=np.array([0, 5, 9]))
    assert_identical(every[:2], some[:2])
    assert_identical(jax.tree.map(lambda a: a[jnp.array([0, 5, 9])], every.metrics), some.metrics)
    assert some.metric_steps.tolist() == [0, 5, 9] and some.metrics["norm"].shape == (3,)
    assert_identical(every.metrics["w"][5], stochastic(5, metric_steps=[0]).params["w"])
    assert_identical(every.metrics["w"][-1], every.params["w"])


def test_more_steps_continue_the_same_run():
    short, long = stochastic(6), stochastic(11)
    assert_identical(short.losses, long.losses[:6])


def test_nothing_is_compiled_again_for_other_seeds_lengths_and_values():
    compiled, traces = [], []
    # A listener cannot be taken back; this one only counts.
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: compiled.append(event) if "backend_compile" in event else None
    )

    def counted(params, batch):
        traces.append(1)
        return squared_error(params, batch)

    def counted_norm(params):
        traces.append(1)
        return norm(params)

    def once(seed, steps, metric_steps):
        params, data = regression()
        params["b"] = np.float32(seed)
        train(
            counted,
            params,
            data,
            optimizer=ADAM,
            steps=steps,
            batch_size=3,
            key=jax.random.key(seed),
            metrics=counted_norm,
            metric_steps=metric_steps,
        )

    once(0, 4, [0, 4])
    first = len(compiled), len(traces)
    assert min(first) > 0
    once(1, 9, [3, 8])
    once(2, 1, [1])
    assert (len(compiled), len(traces)) == first


def test_the_callers_arrays_stay_valid_and_apart():
    params, data = regression()
    device = jax.tree.map(jnp.asarray, params)
    before = jax.tree.map(jnp.copy, device)
    train(squared_error, device, data, optimizer=SGD, steps=3)
    assert_identical(device, before)
    run = train(squared_error, params, data, optimizer=SGD, steps=0)
    params["w"][:] = 9.0
    assert_identical(run.params, before)


# Divergence


def test_a_diverging_run_stops_at_the_last_state_with_finite_loss():
    """p <- p + exp(p) with loss exp(p): the parameter is still finite when the loss overflows."""

    def growing(p, batch):
        return jnp.exp(p[0]) + 0.0 * jnp.sum(batch)

    run = train(
        growing,
        np.zeros(1, np.float32),
        np.zeros((1, 1), np.float32),
        optimizer=optax.sgd(-1.0),
        steps=50,
        metrics=lambda p: p,
        metric_steps=[0, 1, 50],
    )
    p, path = np.float32(0.0), []
    with np.errstate(over="ignore"):
        while np.isfinite(np.exp(p)):
            path.append(p)
            p = p + np.exp(p)
    assert np.isfinite(p) and run.status == "diverged"
    assert run.steps == int(run.state.step) == len(path) - 1 and run.losses.shape == (run.steps,)
    np.testing.assert_allclose(run.losses, np.exp(path[:-1]), rtol=1e-5)
    np.testing.assert_allclose(run.params[0], path[-1], rtol=1e-5)
    assert np.isfinite(run.state.loss)
    assert run.metric_steps.tolist() == [0, 1] and run.metrics.shape == (2, 1)


def test_a_gradient_that_is_not_finite_stops_the_run():
    """The square root at 0 has a finite value and an infinite slope: one update of size 1 leads from 1 to 0."""

    def root(p, batch):
        return jnp.sqrt(p[0]) + 0.0 * jnp.sum(batch)

    run = train(root, np.ones(1, np.float32), np.zeros((1, 1), np.float32), optimizer=optax.sgd(2.0), steps=5)
    assert run.status == "diverged" and run.steps == 0 and run.params.tolist() == [1.0]


def test_a_run_that_starts_with_an_infinite_loss_does_no_step():
    def infinite(p, batch):
        return jnp.sum(p) / jnp.sum(batch)

    run = train(
        infinite,
        np.ones(1, np.float32),
        np.zeros((1, 1), np.float32),
        optimizer=SGD,
        steps=5,
        metrics=lambda p: p,
        metric_steps=[0],
    )
    assert run.status == "diverged" and run.steps == int(run.state.step) == 0
    assert run.losses.shape == (0,) and run.metrics.shape == (0, 1) and run.params.tolist() == [1.0]


@pytest.mark.slow
def test_a_diverged_run_resumes_as_diverged(tmp_path):
    def quartic(p, batch):
        return jnp.sum(p**4) + 0.0 * jnp.sum(batch)

    def diverging(**more):
        return train(
            quartic, np.full(1, 4.0, np.float32), np.zeros((1, 1), np.float32), optimizer=SGD, steps=90, **more
        )

    alone = diverging()
    first, again = (diverging(checkpoint=tmp_path, checkpoint_every=1) for _ in range(2))
    assert alone.status == "diverged" and 0 < alone.steps < 90
    assert_identical(alone[:2], first[:2])
    assert first.status == again.status == "diverged"
    assert_identical(first[:4], again[:4])


def test_compiler_options_change_how_it_is_compiled_and_not_what_is_learnt():
    params, data = regression()
    plain, optioned = (
        train(squared_error, params, data, optimizer=SGD, steps=5, compiler_options=options)
        for options in ({}, {"xla_cpu_multi_thread_eigen": False, "xla_backend_optimization_level": 0})
    )
    np.testing.assert_allclose(plain.losses, optioned.losses, rtol=1e-6)
    with pytest.raises(Exception, match="No such compile option: 'no_such_option'"):
        train(squared_error, params, data, optimizer=SGD, steps=5, compiler_options={"no_such_option": 1})
