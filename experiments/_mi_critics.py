"""Critics trained by the ordinary loop.

On Gaussian pairs: two encoders and a bilinear critic by InfoNCE, networks of both inputs by MINE, NWJ and the
interpolated bound. On a finite family, X = Y with noise: a table s[x, y] by each of the four.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments._side_by_side import BRIEFLY, side_by_side
from experiments._training import finished
from theorykit import _random, encoders, similarity, training
from theorykit.surrogate import mutual_information as mi
from theorykit.surrogate.risk import optimal_score

DIMENSION = 4
# Training: steps of `PAIRS` fresh pairs; InfoNCE in groups of `GROUP`, critics of both inputs on the first `BOTH`.
PAIRS, GROUP, BOTH = 64, 8, 24
WEIGHT = 0.5  # alpha of the interpolated bound
TRAINED_AT = (0.6, 0.9)  # I = 0.89 below ln 8, I = 3.32 above
# Finite family: Y is X, uniform, but with this chance a fresh symbol. One noise for each correlation: same runs.
SYMBOLS, NOISES = 8, (0.5, 0.1)
WIDTH, FEATURES = 32, 8
SEPARABLE = encoders.MLP(WIDTH, FEATURES, depth=3, activation="gelu")
CONCATENATED = encoders.MLP(WIDTH, 1, depth=2, activation="gelu")
# Objectives of the networks of both inputs, from the scores of a batch and MINE's ln a; then those of the tables. The
# critic of NWJ is 1 + network: from s = 0, negatives count 1/e of what they should at first, and 300 steps do not do.
OBJECTIVES = {
    "mine": mi.estimate_mine,
    "nwj": lambda scores, _: mi.estimate_nwj(scores + 1),
    "interpolated": lambda scores, _: mi.estimate_interpolated(scores, WEIGHT),
}
TABLES = OBJECTIVES | {
    "nwj": lambda scores, _: mi.estimate_nwj(scores),
    "info_nce": lambda scores, _: mi.estimate_info_nce(scores),
}


def draw(key, rho, *shape):
    """Gaussian pairs of correlation rho, coordinate by coordinate."""
    x, noise = _random.normal(key, (2, *shape))
    return x, rho * x + jnp.sqrt(1 - rho * rho) * noise


def noisy_copy(noise):
    """Joint of X = Y with noise on `SYMBOLS` symbols."""
    return ((1 - noise) * jnp.eye(SYMBOLS) + noise / SYMBOLS) / SYMBOLS


# Params and pairs have a leading axis of runs: all seeds of one correlation after the other.


def _separable(params, x, y):
    za, zb = jax.vmap(SEPARABLE.apply)(params, jnp.stack([x, y]))
    return similarity.pairwise(similarity.dot, za, zb)


def _bilinear(matrix, x, y):
    return similarity.pairwise(similarity.dot, x @ matrix, y)


def _concatenated(params, x, y):
    """Scores of all networks of both inputs, one after the other."""
    return jax.vmap(lambda p: mi.concatenated_scores(CONCATENATED.apply, p, x[:BOTH], y[:BOTH]))(params)


def _groups(score, params, x, y):
    """Scores of the pairs in groups of K."""
    x, y = (z.reshape(-1, GROUP, DIMENSION) for z in (x, y))
    return jax.vmap(score, (None, 0, 0))(params, x, y)


def _values(objectives, scores, log_average):
    """Mean of each objective over the scores of its own critic."""
    return {name: jnp.mean(f(s, log_average)) for (name, f), s in zip(objectives.items(), scores, strict=True)}


def _table_scores(tables, x, y):
    """(tables, groups, K, K): a table is the bilinear critic of symbols as unit vectors."""
    x, y = (jax.nn.one_hot(z, SYMBOLS).reshape(-1, GROUP, SYMBOLS) for z in (x, y))
    return jax.vmap(lambda table: jax.vmap(partial(_bilinear, table))(x, y))(tables)


def _loss(params, pairs):
    """Sum over runs and critics: they share no parameter, so each is trained as if alone."""

    def one(params, x, y, symbols):
        scores = jnp.stack([_groups(score, params[name], x, y) for name, score in _INFO_NCE.items()])
        info_nce = len(_INFO_NCE) * jnp.mean(mi.estimate_info_nce(scores))
        both = _values(OBJECTIVES, _concatenated(params["concatenated"], x, y), params["log_average"])
        tables = _values(TABLES, _table_scores(params["tables"], *symbols), params["log_average_of_table"])
        return -sum([info_nce, *both.values(), *tables.values()])

    return jnp.sum(jax.vmap(one)(params, *pairs))


_INFO_NCE = {"separable": _separable, "bilinear": _bilinear}


def _fresh(key, data):
    """Gaussian x and y, and symbols x and y; the runs have the leading axis."""
    runs = data["rho"].shape[0]
    one, two = jax.random.split(key)
    # A symbol, another, and whether the other is taken: one draw, since each costs compilation.
    symbols, other, chance = _random.uniform(one, (3, runs, PAIRS))
    changed = jnp.where(chance < data["noise"][:, None], other, symbols)
    pairs = draw(two, data["rho"][:, None, None], runs, PAIRS, DIMENSION)
    return *pairs, tuple((SYMBOLS * z).astype(jnp.int32) for z in (symbols, changed))


@jax.jit(compiler_options=BRIEFLY)
def _start(keys):
    def one(key):
        one, two = jax.random.split(key)
        networks = jax.vmap(lambda k: SEPARABLE.init(k, jnp.zeros((1, DIMENSION))))(jax.random.split(one))
        both = CONCATENATED.init(two, jnp.zeros((1, 2 * DIMENSION)))
        zero = jnp.zeros(())
        return {
            "separable": networks,
            "bilinear": jnp.eye(DIMENSION),
            # The three objectives begin at the same network.
            "concatenated": jax.tree.map(lambda leaf: jnp.stack([leaf] * len(OBJECTIVES)), both),
            "tables": jnp.zeros((len(TABLES), SYMBOLS, SYMBOLS)),
            "log_average": zero,
            "log_average_of_table": zero,
        }

    return jax.vmap(one)(keys)


def _exactly(noise, tables):
    """Exact value of each bound, for the table trained by it, for that of InfoNCE, and for ln r; (bounds, 3)."""
    joint = noisy_copy(noise)
    bounds = {
        "mine": mi.donsker_varadhan,
        "nwj": mi.nwj,
        "interpolated": lambda p, s: mi.interpolated(p, s, GROUP - 1, WEIGHT),
        "info_nce": lambda p, s: mi.info_nce(p, s, GROUP),
    }
    last, best = tables[list(TABLES).index("info_nce")], optimal_score(joint)
    found = []
    for own, (name, bound) in zip(tables, bounds.items(), strict=True):
        compared = jnp.stack([own, last, best + (name == "nwj")])
        found.append(jax.vmap(partial(bound, joint))(compared))
    return jnp.stack(found)


def _evaluate(config, params, untrained, data):
    """Mean over fresh batches of what each critic of each run reaches; the tables exactly."""

    def one(params, untrained, rho, x, y, _):
        exact = lambda _, x, y: mi.gaussian_log_ratio(x, y, rho)  # noqa: E731
        found = {
            name: mi.estimate_info_nce(_groups(score, params.get(name), x, y))
            for name, score in (_INFO_NCE | {"exact": exact}).items()
        }
        for end, p in (("", params), ("_untrained", untrained)):
            values = _values(OBJECTIVES, _concatenated(p["concatenated"], x, y), p["log_average"])
            found |= {f"{name}{end}": value for name, value in values.items()}
        log_ratio = exact(None, x[:BOTH], y[:BOTH])
        found["own"] = jnp.diagonal(log_ratio)
        found["interpolated_exact"] = mi.estimate_interpolated(log_ratio, WEIGHT)
        return jax.tree.map(jnp.mean, found)

    def batch(key):
        return jax.vmap(one)(params, untrained, data["rho"], *_fresh(key, data))

    values = jax.lax.map(batch, jax.random.split(jax.random.key(5), config.evaluations))
    values = jax.tree.map(lambda value: jnp.mean(value, axis=0), values)
    return values | {"tables": jax.vmap(_exactly)(data["noise"], params["tables"])}


def trained(config):
    """trained/<critic> (seeds, rho): what it reaches on fresh pairs; own: the mean log ratio of these pairs.

    trained/tables (seeds, noises, bounds in the order of `TABLES`, 3): see `_exactly`.
    """
    data = {
        "rho": jnp.repeat(jnp.asarray(TRAINED_AT), config.seeds),
        "noise": jnp.repeat(jnp.asarray(NOISES), config.seeds),
    }
    untrained = _start(jax.random.split(jax.random.key(3, impl="rbg"), len(data["rho"])))
    train = partial(
        training.train,
        _loss,
        untrained,
        data,
        optimizer=optax.adam(optax.cosine_decay_schedule(config.learning_rate, config.steps)),
        steps=config.steps,
        key=jax.random.key(4),
        augment=_fresh,
        progress=False,
    )
    evaluate = jax.jit(partial(_evaluate, config), compiler_options=BRIEFLY).lower(untrained, untrained, data)
    # While the critics are trained, what measures them is compiled.
    run, evaluate = side_by_side(lambda function: function(), [(train,), (evaluate.compile,)])
    values = evaluate(finished(run, "the training").params, untrained, data)
    by_seed = lambda v: np.asarray(v).reshape(len(TRAINED_AT), config.seeds, *v.shape[1:]).swapaxes(0, 1)  # noqa: E731
    return {f"trained/{name}": by_seed(value) for name, value in values.items()}
