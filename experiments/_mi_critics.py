"""Critics of Gaussian pairs trained by the ordinary loop: two encoders, bilinear, and one network of both inputs."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

from theorykit import encoders, similarity, training
from theorykit.surrogate import mutual_information as mi

DIMENSION = 4
# Training: steps of `PAIRS` fresh pairs; InfoNCE in groups of `GROUP`, the critic of both inputs on the first `BOTH`.
PAIRS, GROUP, BOTH = 64, 8, 24
TRAINED_AT = (0.6, 0.9)  # I = 0.89 below ln 8, I = 3.32 above
WIDTH, FEATURES = 32, 8
SEPARABLE = encoders.MLP(WIDTH, FEATURES, depth=3, activation="gelu")
CONCATENATED = encoders.MLP(WIDTH, 1, depth=3)


def draw(key, rho, *shape):
    """Gaussian pairs of correlation rho, coordinate by coordinate."""
    x, noise = jax.random.normal(key, (2, *shape))
    return x, rho * x + jnp.sqrt(1 - rho * rho) * noise


# Params and pairs have a leading axis of runs: all seeds of one correlation after the other.


def _separable(params, x, y):
    za, zb = SEPARABLE.apply(params["x"], x), SEPARABLE.apply(params["y"], y)
    return similarity.pairwise(similarity.dot, za, zb)


def _bilinear(matrix, x, y):
    return similarity.pairwise(similarity.dot, x @ matrix, y)


def _concatenated(params, x, y):
    return mi.concatenated_scores(CONCATENATED.apply, params, x[:BOTH], y[:BOTH])


def _groups(score, params, x, y):
    """Scores of the pairs in groups of K."""
    x, y = (z.reshape(-1, GROUP, DIMENSION) for z in (x, y))
    return jax.vmap(score, (None, 0, 0))(params, x, y)


def _loss(params, pairs):
    """Sum over runs and critics: they share no parameter, so each is trained as if alone."""

    def one(params, x, y):
        bounds = [jnp.mean(mi.estimate_info_nce(_groups(s, params[n], x, y))) for n, s in _INFO_NCE.items()]
        mine = mi.estimate_mine(_concatenated(params["concatenated"], x, y), params["log_average"])
        return -(sum(bounds) + mine)

    return jnp.sum(jax.vmap(one)(params, *pairs))


_INFO_NCE = {"separable": _separable, "bilinear": _bilinear}


def _fresh(key, data):
    runs = data["rho"].shape[0]
    return draw(key, data["rho"][:, None, None], runs, PAIRS, DIMENSION)


@jax.jit
def _start(keys):
    def one(key):
        a, b, c = jax.random.split(key, 3)
        x = jnp.zeros((1, DIMENSION))
        networks = {"x": SEPARABLE.init(a, x), "y": SEPARABLE.init(b, x)}
        both = CONCATENATED.init(c, jnp.zeros((1, 2 * DIMENSION)))
        zero = jnp.zeros(())
        return {
            "separable": networks,
            "bilinear": jnp.eye(DIMENSION),
            "concatenated": both,
            "log_average": zero,
        }

    return jax.vmap(one)(keys)


def _evaluate(config, params, untrained, rho):
    """Mean over fresh batches of what each critic of each run reaches."""

    def one(params, untrained, rho, x, y):
        exact = lambda _, x, y: mi.gaussian_log_ratio(x, y, rho)  # noqa: E731
        found = {
            name: mi.estimate_info_nce(_groups(score, params.get(name), x, y))
            for name, score in (_INFO_NCE | {"exact": exact}).items()
        }
        for name, p in (("mine", params), ("mine_untrained", untrained)):
            found[name] = mi.estimate_mine(_concatenated(p["concatenated"], x, y), p["log_average"])
        found["own"] = jnp.diagonal(exact(None, x[:BOTH], y[:BOTH]))
        return jax.tree.map(jnp.mean, found)

    def batch(key):
        return jax.vmap(one)(params, untrained, rho, *_fresh(key, {"rho": rho}))

    values = jax.lax.map(batch, jax.random.split(jax.random.key(5), config.evaluations))
    return jax.tree.map(lambda value: jnp.mean(value, axis=0), values)


def trained(config):
    """trained/<critic> (seeds, rho): what it reaches on fresh pairs; own: the mean log ratio of these pairs."""
    rho = jnp.repeat(jnp.asarray(TRAINED_AT), config.seeds)
    untrained = _start(jax.random.split(jax.random.key(3), len(rho)))
    done = training.train(
        _loss,
        untrained,
        {"rho": rho},
        optimizer=optax.adam(optax.cosine_decay_schedule(config.learning_rate, config.steps)),
        steps=config.steps,
        key=jax.random.key(4),
        augment=_fresh,
        progress=False,
    )
    if done.status != "finished":
        raise RuntimeError(f"training diverged after {done.steps} steps: lower learning_rate")
    values = jax.jit(partial(_evaluate, config))(done.params, untrained, rho)
    return {f"trained/{name}": np.asarray(v).reshape(len(TRAINED_AT), -1).T for name, v in values.items()}
