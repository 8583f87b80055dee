r"""N8: on a target that needs features a finite network beats its tangent kernel; on a linear target it does not.

Inputs are uniform on the sphere |x| = sqrt d, u is a random unit vector, both targets have variance 1:

    feature target   y = ((u.x)^2 - 1) / sqrt(2 (d - 1) / (d + 2))    a harmonic of degree 2, information exponent 2
    linear target    y = u.x                                          a harmonic of degree 1

Prediction for kernels [derivation]. Harmonics of degree k span N_k dimensions: N_1 = d, N_2 = d (d + 1) / 2 - 1. A
kernel that is fixed before u is drawn predicts inside a space of n dimensions, whatever the labels, the ridge or the
stopping time. The part of degree k of that space has at most n dimensions too, and a harmonic rotated at random has on
average the share n / N_k of its square in n dimensions. So at every n, d and ridge

    E_u [test error / variance of the target] >= 1 - n / N_k:    linear targets need n ~ d, quadratic ones n ~ d^2 / 2

(the limit of large d: Ghorbani, Mei, Misiakiewicz, Montanari 2021, arXiv 1904.12191). Prediction for the network: it
can turn its hidden weights towards u, one direction, for which n ~ d ln d samples are enough (Ben Arous, Gheissari,
Jagannath 2021, arXiv 2003.10409, for online SGD at information exponent 2). So at n = N_2 / 2, as d grows, its error
falls, at the parametric rate as d / n ~ 1 / d, while that of kernels tends to a constant. On the linear target nobody
beats 1 - n/d: n < d noiseless labels say nothing of the rest of u. There, at n = N_1 / 2, the network has the same room
below the kernel as on the feature target, and nothing to win it with.

After the first measurement, where the kernel's error fell as d^(-0.27) at the small d used here: the whole curve of the
infinite kernel follows from its spectrum, with nothing to fit (`experiments._learning_curve`). It falls as d^(-0.24)
from d = 12 to 32, since d + 1 of the n samples go to lower degrees, and it is a claim of its own now.

The network. Two layers, ReLU, no bias, width M, in NTK parametrisation; its function at the start is taken off, and

    h(x) = alpha (f(theta, x) - f(theta_0, x)),      loss = mean (h - y)^2 / (2 alpha^2)

(Chizat, Oyallon, Bach 2019, arXiv 1812.07956). The networks here differ in alpha only. For every alpha the flow in
function space starts as that of the kernel K_0; alpha sets how far the weights must travel until h reaches y.

    alpha = M^(-1/2)   mean-field scale, "the network" of the claims: h is a mean over units, so the weights must move
                       by their own size and ||K_T - K_0|| / ||K_0|| is of order 1 or more, at any width;
    alpha = 1          NTK parametrisation: the kernel moves because the width is finite, by order M^(-1/2);
    alpha = M^(1/2)    lazy: the kernel stays, and the network is regression with K_0. This is the control.

Everybody has the same validation set: the network to choose when to stop, kernels to choose the ridge (from one that
float32 cannot tell from none up to a prediction of zero). Test errors are against targets without label noise, in units
of their variance. The after-kernel is the empirical kernel of the stopped network, on the same training set.
"""

import dataclasses
import math
from collections.abc import Mapping
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import threadpoolctl
from tqdm import tqdm

from experiments import _learning_curve, _setting
from theorykit import data, results, training, verify
from theorykit.ntk import empirical, infinite, relative_change

SOURCE = "Arora et al. 2019 (arXiv 1904.11955): finite networks are more accurate than the infinite-width NTK"
BOUND = "derivation (share of a rotated harmonic in n dimensions); its limit of large d: arXiv 1904.12191"
CURVE = "Simon et al. 2023 (arXiv 2110.03922); Canatar, Bordelon, Pehlevan 2021 (arXiv 2006.13198)"
MOVEMENT = "Chizat, Oyallon, Bach 2019 (arXiv 1812.07956); after-kernel: Long 2021 (arXiv 2105.10585)"
GROWTH = "derivation from n ~ d ln d (Ben Arous et al. 2021, arXiv 2003.10409) and the parametric rate d / n"

DEGREES = {"feature": 2, "linear": 1}
TARGETS = tuple(DEGREES)
# alpha = M^exponent.
MEAN_FIELD, LAZY = -0.5, 0.5
# The claims are made at half the samples that a kernel needs: its error is then at least 1/2 on either target.
SHARE = 0.5


@dataclasses.dataclass(frozen=True)
class Config:
    """Shares are numbers of samples in units of N_k, so of what a kernel needs; exponents are those of alpha in M."""

    dimension: int = 32
    shares: Mapping[str, tuple[float, ...]] = dataclasses.field(
        default_factory=lambda: dict.fromkeys(TARGETS, (SHARE,))
    )
    exponents: tuple[float, ...] = (MEAN_FIELD, LAZY)  # at n = N/2; elsewhere these two
    dimensions: tuple[int, ...] = ()  # for the error at n = N/2 against d
    width: int = 128
    noise: float = 0.1  # standard deviation on labels of variance 1: small, yet enough for a ridge to have a use
    seeds: int = 16
    steps: int = 400  # time 4000, with OPTIMIZER: lazy networks fit their labels to 0.3% at n = N_2 / 2, 3% at n = N_2
    validation: int = 500
    test: int = 1000
    advantage: float = results.threshold(
        0.25, "half of the 1/2 that the bound for kernels leaves, at n = N/2, to a perfect learner"
    )
    curve: float = results.threshold(
        0.15, "tells the predicted curve, 0.7 at n = N/2, from the bound 0.5 and from 1, where nothing is learnt"
    )
    moved: float = results.threshold(0.1, "the change by 10% at which N3 calls a kernel moved")
    fall: float = results.threshold(0.5, "half-way from the predicted d^-1 to no fall, which is predicted for kernels")


_SWEEP = (-0.75, MEAN_FIELD, -0.25, 0.0, 0.25, LAZY)
PRESETS = {
    "smoke": Config(seeds=10, steps=200),
    "quick": Config(
        shares={"feature": (1 / 8, 1 / 4, 1 / 2, 1.0, 2.0), "linear": (1 / 4, 1 / 2, 1.0, 2.0, 4.0)},
        exponents=_SWEEP,
        dimensions=(12, 16, 24, 32),
    ),
    "full": Config(
        dimension=48,
        shares={"feature": (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0, 2.0), "linear": (1 / 8, 1 / 4, 1 / 2, 1.0, 2.0, 4.0)},
        exponents=_SWEEP,
        dimensions=(12, 16, 24, 32, 48, 64),
        seeds=24,
        steps=1000,
        validation=1000,
        test=2000,
    ),
}

# Gradient descent with momentum 0.9 is stable while step size times eigenvalue stays below 3.8, and no eigenvalue of
# K_T / n exceeds the mean of K_T(x, x). That is 1 at the start. Where h has the size of y it is 2 |y| / (alpha sqrt M)
# or more, because 2 |a_m relu(w_m)| <= a_m^2 + relu(w_m)^2, and not far above it where the two have grown together:
# steps are shortened by alpha sqrt M where that is below 1. Momentum makes each step count ten times.
OPTIMIZER = optax.sgd(1.0, momentum=0.9)
# In units of the kernel's trace: from float32's resolution to predictions below 1% of the labels.
RIDGES = np.logspace(-7, 2, 19)
# Stopping times, geometric: with 400 to 1000 steps each is 37 to 44% later than the last.
SNAPSHOTS = 20


def dimension_of_degree(target: str, d: int) -> int:
    """N_k, the number of spherical harmonics of the target's degree: the samples that a kernel needs."""
    return d if target == "linear" else d * (d + 1) // 2 - 1


def run(config: Config) -> dict[str, np.ndarray]:
    """Errors of each method and changes of the kernel.

    needed/<target> is N_k. Along n: n/<target> (points,), error/<method>/<target> and change/<network>/<target> (seeds,
    points). At n = N/2: scale/error and scale/change (seeds, exponents), growth/<method> (seeds, dimensions).
    """
    arrays = {f"needed/{target}": np.array(dimension_of_degree(target, config.dimension)) for target in TARGETS}
    columns = {}

    def point(target, d, n, exponents):
        return results.part(f"{target}-{d}-{n}", partial(_point, config, target, d, n, exponents))

    tasks = [(target, config.dimension, share) for target in TARGETS for share in config.shares[target]]
    tasks += [("feature", d, SHARE) for d in config.dimensions if d != config.dimension]
    for target, d, share in tqdm(tasks, desc="ntk_features", disable=None):
        n = round(share * dimension_of_degree(target, d))
        centre = (target, share) == ("feature", SHARE)
        if d != config.dimension:  # only the network and the infinite kernel are compared there
            columns[d] = _named(point(target, d, n, (MEAN_FIELD,)), (MEAN_FIELD,))
            continue
        exponents = config.exponents if centre else (MEAN_FIELD, LAZY)
        found = point(target, d, n, exponents)
        if centre:
            columns[d] = _named(found, exponents)
            arrays |= {"scale/error": found["error"], "scale/change": found["change"]}
        for name, values in ({"n": np.array(n)} | _named(found, exponents)).items():
            arrays.setdefault(f"{name}/{target}", []).append(values)
    for method in ("net", "infinite"):
        for d in config.dimensions:
            arrays.setdefault(f"growth/{method}", []).append(columns[d][f"error/{method}"])
    arrays = {name: np.stack(value, axis=-1) if isinstance(value, list) else value for name, value in arrays.items()}

    def predicted(target, d, n):
        encoder, degree = _setting.encoder("relu-2", config.width, 1), DEGREES[target]
        return _learning_curve.predicted_error(encoder, d, degree, n, config.noise, RIDGES)

    for target in TARGETS:
        n = np.geomspace(arrays[f"n/{target}"][0], arrays[f"n/{target}"][-1], 40)  # smooth to the eye
        arrays |= {f"predicted/n/{target}": n, f"predicted/{target}": predicted(target, config.dimension, n)}
    halves = {d: [SHARE * dimension_of_degree("feature", d)] for d in (config.dimension, *config.dimensions)}
    arrays["predicted/half"] = predicted("feature", config.dimension, halves[config.dimension])[0]
    arrays["growth/predicted"] = np.array([predicted("feature", d, halves[d])[0] for d in config.dimensions])
    return arrays


def _named(point, exponents):
    """The kernels, the network and the lazy network of a point, each (seeds,)."""
    named = {"error/infinite": point["infinite"], "error/initial": point["initial"]}
    for exponent, name in ((MEAN_FIELD, "net"), (LAZY, "lazy")):
        if exponent in exponents:
            column = exponents.index(exponent)
            named |= {f"{what}/{name}": point[what][:, column] for what in ("error", "change")}
            named[f"error/after-{name}"] = point["after"][:, column]
    return named


def _point(config, target, d, n, exponents):
    """Errors of both kernels (seeds,); of networks errors, those of after-kernels, and changes (seeds, exponents)."""
    encoder = _setting.encoder("relu-2", config.width, 1)
    most = round(max(config.shares[target]) * dimension_of_degree(target, d))
    x, clean, noise, start = _draws(config, encoder, target, d, most + config.validation + config.test)
    # Training sets are nested: those of a smaller n are the first rows of a larger one.
    x, held_out = x[:, :n], x[:, most:]
    labels = clean + config.noise * noise
    labels, check = labels[:, :n], labels[:, most : most + config.validation]
    truth = clean[:, most + config.validation :]

    alphas = jnp.asarray([config.width**exponent for exponent in exponents])
    rates = jnp.minimum(1.0, alphas * math.sqrt(config.width))  # see OPTIMIZER
    stopped, predictions = _networks(encoder, config.steps, start, alphas, rates, x, labels, held_out, check)
    found = {name: np.full((config.seeds, len(exponents)), np.nan) for name in ("after", "change")}
    found |= {name: np.empty(config.seeds) for name in ("infinite", "initial")}
    found["error"] = _test_error(predictions, truth).T
    for seed in range(config.seeds):
        train, both = x[seed], jnp.concatenate([x[seed], held_out[seed]])

        def kernel(params, index, points, train=train):
            params = jax.tree.map(lambda leaf: jnp.asarray(leaf[index]), params)
            return empirical.empirical_ntk(encoder.apply, params, points, train)[:, :, 0, 0]

        def error(kernel, seed=seed):
            return _test_error(_regression(kernel, labels[seed], check[seed]), truth[seed])

        initial = kernel(start, seed, both)
        found["initial"][seed] = error(initial)
        found["infinite"][seed] = error(infinite.infinite_ntk(encoder, both, train))
        for column, exponent in enumerate(exponents):
            # Of the other scales only the kernel's movement is wanted: the training set is enough for that.
            regressed = exponent in (MEAN_FIELD, LAZY)
            after = kernel(stopped, (column, seed), both if regressed else train)
            found["change"][seed, column] = relative_change(after[:n], initial[:n])
            if regressed:
                found["after"][seed, column] = error(after)
    return found


def _draws(config, encoder, target, d, rows):
    """Inputs (seeds, rows, d), targets and unit noise (seeds, rows), and initial parameters with seeds leading."""
    for_inputs, for_directions, for_noise, for_weights = jax.random.split(jax.random.key(d), 4)
    x = data.to_sphere(jax.random.normal(for_inputs, (config.seeds * rows, d))).reshape(config.seeds, rows, d)
    directions = data.to_sphere(jax.random.normal(for_directions, (config.seeds, d))) / math.sqrt(d)
    z = jnp.einsum("snd,sd->sn", x, directions, precision="highest")
    y = z if target == "linear" else (z**2 - 1) / math.sqrt(2 * (d - 1) / (d + 2))
    params = jax.vmap(encoder.init, in_axes=(0, None))(jax.random.split(for_weights, config.seeds), x[0, :1])
    return x, y, jax.random.normal(for_noise, y.shape), params


def _networks(encoder, steps, start, alphas, rates, x, labels, held_out, check):
    """Parameters (alphas, seeds, ...) and test predictions (alphas, seeds, m), each at its best time for validation."""
    grid = (len(alphas), len(x))

    def spread(tree):  # one network for each scale and seed, all on one axis
        return jax.tree.map(lambda a: jnp.broadcast_to(a, (*grid, *a.shape[1:])).reshape(-1, *a.shape[1:]), tree)

    params, points = spread(start), spread(held_out)
    scale = jnp.repeat(alphas, len(x))[:, None]
    # alpha (f - f_0) fits y where f fits y / alpha + f_0.
    goals = spread(labels) / scale + _outputs(encoder, params, spread(x))
    times = np.unique(np.geomspace(1, steps, SNAPSHOTS).round().astype(int))
    done = training.train(
        _loss(encoder),
        params,
        (spread(x), goals, jnp.repeat(rates, len(x))),
        optimizer=OPTIMIZER,
        steps=steps,
        metrics=_snapshot,
        metric_steps=[0, *times.tolist()],
        progress=False,
    )
    if done.status != "finished":
        raise RuntimeError(f"training diverged after {done.steps} steps: lower the step size of OPTIMIZER")
    offset = _outputs(encoder, params, points)
    outputs = [
        scale * (_outputs(encoder, jax.tree.map(lambda leaf, m=m: leaf[m], done.metrics), points) - offset)
        for m in range(len(done.metric_steps))
    ]
    predictions, chosen = np.stack(outputs), check.shape[1]
    best = np.argmin(np.mean((predictions[..., :chosen] - np.asarray(spread(check))) ** 2, axis=-1), axis=0)
    rows = np.arange(len(best))
    stopped = jax.tree.map(lambda leaf: np.asarray(leaf)[best, rows].reshape(*grid, *leaf.shape[2:]), done.metrics)
    return stopped, predictions[best, rows, chosen:].reshape(*grid, -1)


@cache
def _loss(encoder):
    """Losses of independent networks, (h - y)^2 / (2 alpha^2) = (f - goal)^2 / 2, times their step sizes, summed."""

    def loss(params, batch):
        inputs, goals, rates = batch
        errors = _outputs(encoder, params, inputs) - goals
        return jnp.sum(rates * jnp.mean(errors**2, axis=1)) / 2

    return loss


@partial(jax.jit, static_argnames="encoder")
def _outputs(encoder, params, x):
    return jax.vmap(lambda params, x: encoder.apply(params, x)[:, 0])(params, x)


def _snapshot(params):
    return params


def _regression(kernel, labels, check):
    """Test predictions of kernel ridge regression, the ridge chosen on the validation set.

    kernel (n + validation + test, n): the rows of the training set first. labels (n,), check (validation,).
    """
    kernel, labels, check = (np.asarray(array, np.float64) for array in (kernel, labels, check))
    n = len(labels)
    # On cores that others use as well, two threads of LAPACK wait for each other ten times as long as they work.
    with threadpoolctl.threadpool_limits(1):
        values, vectors = np.linalg.eigh(kernel[:n])
    loadings = (vectors.T @ labels)[:, None] / (np.maximum(values, 0)[:, None] + RIDGES * np.trace(kernel[:n]))
    predictions = kernel[n:] @ (vectors @ loadings)
    best = np.argmin(np.mean((predictions[: len(check)] - check[:, None]) ** 2, axis=0))
    return predictions[len(check) :, best]


def _test_error(predictions, truth):
    """Mean square error over mean square of the target, both on the test set: the noise of its draw largely cancels."""
    predictions, truth = np.asarray(predictions, np.float64), np.asarray(truth, np.float64)
    return np.mean((predictions - truth) ** 2, axis=-1) / np.mean(truth**2, axis=-1)


def verdicts(config: Config, arrays: dict[str, np.ndarray]) -> list[verify.Verdict]:
    """The network against its kernels, the kernels' bound, the kernel's movement, the after-kernel, and growth in d."""
    needed = arrays["needed/feature"]

    def at_half(name, target="feature"):
        return arrays[f"{name}/{target}"][:, config.shares[target].index(SHARE)]

    def against_kernels(claim, name, target="feature"):
        # Against whichever kernel is better in that seed: to the kernels' advantage.
        kernels = np.minimum(at_half("error/infinite", target), at_half("error/initial", target))
        network = at_half(f"error/{name}", target)
        return verify.separation(claim, network, kernels, margin=config.advantage, direction="less")

    def bounded(claim, name):
        below = arrays["n/feature"] < needed
        error = arrays[f"error/{name}/feature"][:, below]
        limit = np.broadcast_to(1 - arrays["n/feature"][below] / needed, error.shape)
        return verify.bound(claim, limit, error)

    def on_curve(claim, name):
        return verify.agreement(claim, at_half(f"error/{name}"), arrays["predicted/half"], margin=config.curve)

    def moved(claim, name):
        change = at_half(f"change/{name}")
        return verify.separation(claim, change, np.zeros_like(change), margin=config.moved)

    def after(claim, name):
        before = at_half("error/initial")
        return verify.separation(claim, at_half(f"error/{name}"), before, margin=config.advantage, direction="less")

    def growth(claim, name):
        dimensions, error = np.array(config.dimensions), arrays[f"growth/{name}"]
        return verify.rate(claim, dimensions, error, -1.0, margin=config.fall, side="at_most")

    def claim(name, statement, source):
        return verify.Claim(f"N8.{name}", statement, source)

    def control(of, name, statement, source):
        return verify.Claim(f"N8.{of}.{name}", statement, source, "control", f"N8.{of}")

    where = f"d = {config.dimension}, n = N/2"
    beats = "the network's test error lies below that of the infinite NTK and of the kernel at initialisation"
    bound = "the test error is at least 1 - n/N at all n < N"
    curve = "the test error is that predicted from the spectrum of the infinite NTK"
    changed = "the kernel on the training set moves by more than 10%"
    better = "regression with the kernel after training beats that with the kernel at initialisation"
    falls = "at n = N/2, so n ~ d^2 / 4, the test error falls at least as d^(-1/2)"
    found = [
        against_kernels(claim("network", f"{beats}: feature target, {where}", SOURCE), "net"),
        against_kernels(control("network", "linear", f"{beats}: linear target, {where}", SOURCE), "net", "linear"),
        against_kernels(control("network", "lazy", f"{beats}: feature target, {where}, lazy scale", SOURCE), "lazy"),
        bounded(claim("bound.infinite", f"{bound}, infinite NTK", BOUND), "infinite"),
        bounded(control("bound.infinite", "network", f"{bound}, network", BOUND), "net"),
        bounded(claim("bound.initial", f"{bound}, kernel at initialisation", BOUND), "initial"),
        bounded(control("bound.initial", "after", f"{bound}, kernel after training", BOUND), "after-net"),
        on_curve(claim("curve", f"{curve}: infinite NTK, {where}", CURVE), "infinite"),
        on_curve(control("curve", "network", f"{curve}: network, {where}", CURVE), "net"),
        moved(claim("moved", f"{changed}: {where}", MOVEMENT), "net"),
        moved(control("moved", "lazy", f"{changed}: {where}, lazy scale", MOVEMENT), "lazy"),
        after(claim("after-kernel", f"{better}: {where}", MOVEMENT), "after-net"),
        after(control("after-kernel", "lazy", f"{better}: {where}, lazy scale", MOVEMENT), "after-lazy"),
    ]
    if config.dimensions:
        found += [
            growth(claim("growth", f"{falls}, network", GROWTH), "net"),
            growth(control("growth", "infinite", f"{falls}, infinite NTK", GROWTH), "infinite"),
        ]
    return found
