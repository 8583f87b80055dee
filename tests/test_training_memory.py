"""The estimate of a training's memory against the compiler's own account, and the refusal of what does not fit."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AbstractMesh
from test_training import ADAM, MOMENTUM, contrast, jitter, regression, squared_error

from theorykit import losses, similarity
from theorykit._training_step import Program, advance, start
from theorykit.encoders import MLP, Transformer
from theorykit.training import check_memory, memory_bytes, train

# The compiler may keep fewer arrays than the trace, by recomputing, or more at once, by copying; nothing promises how
# many. Measured: 0.7 to 1.0 of its account for transformers. A factor of two tells what fits from what does not.
FACTOR = 2.0


def clip_of(encoder, members):
    """A pair of encoders, or `members` of them at once."""

    def one(params, batch):
        views = (encoder.apply(params[name], batch[name]) for name in ("image", "text"))
        return losses.clip(*views, similarity=similarity.log_softmax_product)

    if members is None:
        return one
    return lambda params, batch: jnp.sum(jax.vmap(one, (0, None))(params, batch))


def shapes_of(encoder, members, n, *shape):
    data = {name: jax.ShapeDtypeStruct((n, *shape), jnp.float32) for name in ("image", "text")}
    params = {name: jax.eval_shape(encoder.init, jax.random.key(0), x) for name, x in data.items()}
    if members is not None:
        params = jax.tree.map(lambda a: jax.ShapeDtypeStruct((members, *a.shape), a.dtype), params)
    return params, data


@pytest.mark.slow
@pytest.mark.parametrize(
    ("encoder", "members", "n", "batch_size", "shape"),
    [
        (Transformer(32, 8, tokens=(4, 8), depth=1), None, 1000, 64, (4, 8)),
        (Transformer(16, 8, tokens=(8, 8), depth=1), 6, 64, 32, (8, 8)),
        (MLP(64, 8, depth=3), None, 200_000, 64, (12,)),
        (MLP(64, 8, depth=3), None, 4096, None, (12,)),
    ],
    ids=["transformers", "members", "data", "full batch"],
)
def test_the_estimate_is_the_compilers_account_within_a_factor(encoder, members, n, batch_size, shape):
    loss, (params, data) = clip_of(encoder, members), shapes_of(encoder, members, n, *shape)
    estimate = memory_bytes(loss, params, data, optimizer=ADAM, batch_size=batch_size)
    program = Program(loss, ADAM, batch_size, None, None)
    key = jax.eval_shape(lambda: jax.random.key(0))
    state = start.eval_shape(program, params, data, key)
    account = advance.lower(program, state, data, key, 0).compile().memory_analysis()
    account = account.argument_size_in_bytes + account.output_size_in_bytes + account.temp_size_in_bytes
    assert 1 / FACTOR < estimate / account < FACTOR, (estimate, account)


def test_the_estimate_counts_what_must_be_there():
    """With an empty forward pass: the data, and in two states parameters, gradient, two moments, a count and a step."""
    params, data = jnp.zeros(1000), jnp.zeros((500, 2))
    estimate = memory_bytes(lambda p, batch: jnp.sum(p), params, data, optimizer=ADAM)
    state = 4 * 1000 * 4 + 3 * 4  # and the loss
    assert 4 * 1000 + 2 * state <= estimate <= 4 * 1000 + 2 * state + 1100 * 4  # and at most a residual


def test_batches_augmentation_and_momentum_are_counted():
    params, data = regression(n=50)
    plain = memory_bytes(squared_error, params, data, optimizer=ADAM)
    drawn = memory_bytes(squared_error, params, data, optimizer=ADAM, batch_size=10, augment=jitter)
    larger = memory_bytes(squared_error, params, data, optimizer=ADAM, batch_size=50, augment=jitter)
    queue = memory_bytes(contrast, params, data, optimizer=ADAM, momentum_encoder=MOMENTUM._replace(queue_size=1000))
    assert drawn < larger and plain + 2 * 1000 * 3 * 4 <= queue


def test_on_a_mesh_the_batch_is_divided_and_the_state_is_not():
    params, data = regression()
    of = partial(memory_bytes, squared_error, params, data, optimizer=ADAM, batch_size=4)
    one, two, four = (of(mesh=AbstractMesh((devices,), ("rows",))) for devices in (1, 2, 4))
    assert one == of()
    batch = 4 * (3 + 1) * 4  # rows of three numbers and a target; and residuals
    assert one - two == 2 * (two - four) >= batch / 2


def test_shapes_alone_are_enough_and_nothing_is_compiled():
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: compiled.append(event) if "backend_compile" in event else None
    )
    params, data = regression()
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), (params, data))
    given = memory_bytes(squared_error, params, data, optimizer=ADAM, batch_size=2)
    assert memory_bytes(squared_error, *shapes, optimizer=ADAM, batch_size=2) == given
    huge = jax.ShapeDtypeStruct((10**9, 3), jnp.float32), jax.ShapeDtypeStruct((10**9,), jnp.float32)
    more = memory_bytes(squared_error, shapes[0], dict(zip("xy", huge, strict=True)), optimizer=ADAM, batch_size=2)
    assert more - given == pytest.approx(10**9 * (4 * 4 + 2 * 4), rel=1e-6)  # and the order of the rows, in two states
    assert not compiled


def test_numpy_in_double_precision_counts_as_what_it_becomes():
    params, data = regression()
    wide = jax.tree.map(lambda a: np.asarray(a, np.float64), (params, data))
    assert memory_bytes(squared_error, *wide, optimizer=ADAM) == memory_bytes(
        squared_error, params, data, optimizer=ADAM
    )


def test_what_does_not_fit_is_refused_with_both_numbers():
    params, data = regression()
    needed = check_memory(squared_error, params, data, optimizer=ADAM, batch_size=2)
    assert needed == memory_bytes(squared_error, params, data, optimizer=ADAM, batch_size=2)
    assert check_memory(squared_error, params, data, optimizer=ADAM, memory=needed, batch_size=2) == needed
    huge = {"x": jax.ShapeDtypeStruct((2**40, 3), jnp.float32), "y": jax.ShapeDtypeStruct((2**40,), jnp.float32)}
    message = (
        r"needs about (\d+)\.\d\d GiB \(parameters 0\.00 GiB, data 16384\.00 GiB\) and \d+\.\d\d GiB are free: take"
    )
    with pytest.raises(MemoryError, match=message) as caught:
        check_memory(squared_error, params, huge, optimizer=ADAM)
    assert int(re.search(message, str(caught.value))[1]) >= 16384
    with pytest.raises(MemoryError, match=r"0\.00 GiB are allowed: .*smaller batch"):
        check_memory(squared_error, params, data, optimizer=ADAM, memory=needed - 1)


def test_a_loss_that_training_would_refuse_is_refused_here_too():
    params, data = regression()
    for function in (memory_bytes, check_memory):
        with pytest.raises(ValueError, match=r"loss returned float32\[7\], not one floating-point number"):
            function(lambda p, batch: batch["y"], params, data, optimizer=optax.sgd(0.1))


def test_the_estimate_is_made_of_the_shapes_that_training_has():
    """The queue and the order of the rows are in the state that `train` returns."""
    params, data = regression()
    run = train(
        contrast, params, data, optimizer=ADAM, steps=1, batch_size=2, key=jax.random.key(0), momentum_encoder=MOMENTUM
    )
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(run.state)) + sum(a.nbytes for a in jax.tree.leaves(data))
    assert held <= memory_bytes(contrast, params, data, optimizer=ADAM, batch_size=2, momentum_encoder=MOMENTUM)
