r"""N9: along rays from the origin, trained ReLU networks and regression with their kernel become linear; how fast?

The measure is the relative second difference of g(r) = f(r u), at steps in proportion to r,

    D(r) = ||g(2r) - 2 g(3r/2) + g(r)|| / ||g(2r) - g(r)||,      norms over random directions u,

0 where g is linear. Radii are in units of the data's: |x| = r sqrt d, data have r <= 1. Targets are quadratic forms.

Prediction [derivation]. With biases a ReLU kernel is homogeneous in (x, 1), so f(r u) = r h(1/r) along a ray. The
regressor is a sum of kernels Theta(x, x_i), which are smooth functions of 1/r away from the direction of x_i; hence
g(r) = r h_0 + h_1 + h_2 / r + ..., the second difference falls as 1/r while the first one grows as r, and

    D ~ r^{-2}      NTK regression, at any depth, and for GELU: smoothness does no harm, x Phi(x) -> relu(x) far out.

A network also keeps what the data do not determine of its random function f_0 at the start. A hidden unit has its kink
at r = -b / (w.u), with a density 1/(pi r^2) at large r: M / (2 pi r) kinks lie between r and 2r, and each has the share
|b| / sqrt M in the second difference, with a random sign. So that falls as r^{-1/2} only, at any width, and

    D ~ r^{-3/2}    networks, until M / r < 1: beyond its last kink, at a median radius of M / (pi ln 2), one of two
                    layers is exactly linear.

Both are faster than 1/r, the source's bound. In the limit of infinite width D follows for networks too, with nothing
fitted, from f(x) = f_0(x) + a(x).(y - f_0(X)), a(x) = Theta(x, X) Theta(X, X)^{-1}, f_0 the Gaussian process.

Controls. Radii inside the data: g follows its target, quadratic, where D = 1/6 at all r. Erf units: they saturate, so g
tends to a constant as h_1 + h_2 / r; relative to its change that is never linear, D -> 1/3. Without biases a ReLU
network is homogeneous itself, f(r u) = r f(u), and D = 0 at all r: a claim of its own, with biases as its control.

Source: Xu, Zhang, Li, Du, Kawarabayashi, Jegelka 2021 (arXiv 2009.11848), theorem 1; exponents: derivation.
"""

import dataclasses
import math
from collections.abc import Mapping
from functools import cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from theorykit import encoders, results, training, verify
from theorykit.ntk import infinite

SOURCE = "Xu et al. 2021 (arXiv 2009.11848), theorem 1; exponents: derivation"
DERIVED = "derivation"
MAIN, SMOOTH, FREE = "relu-2", "erf-2", "relu-2-free"  # biases throughout, but for the last
STEPS, SECOND, FIRST = np.array([1.0, 1.5, 2.0]), np.array([1.0, -2.0, 1.0]), np.array([-1.0, 0.0, 1.0])
# Fits use radii up to INSIDE, so that 2r is inside the data, and from OUTSIDE on, where 1/r is a small number.
INSIDE, OUTSIDE = 0.5, 8.0
# Momentum makes each step count ten times. Stable while step size times eigenvalue of the kernel / n stays below 3.8.
OPTIMIZER = optax.sgd(0.3, momentum=0.9)
# In units of the kernel's mean eigenvalue: keeps rounding errors in float64 small, and next to nothing else.
RIDGE = 1e-8


@dataclasses.dataclass(frozen=True)
class Config:
    """Architectures are activation-depth; `networks` gives their widths."""

    kernels: tuple[str, ...] = ("relu-2", "relu-3", "gelu-2")
    networks: Mapping[str, int] = dataclasses.field(default_factory=lambda: {"relu-2": 1024, "relu-3": 256})
    dimension: int = 4
    points: int = 40
    directions: int = 32
    radii: tuple[float, ...] = tuple(2.0**k for k in range(-5, 8))
    seeds: int = 16
    steps: int = 800
    margin: float = results.threshold(0.25, "half of the distance between the exponents -2 and -3/2")
    curve: float = results.threshold(0.5, "regression alone deviates by less than a tenth of what networks do")
    saturated: float = results.threshold(0.05, "tells 1/3 from 1/6 of a quadratic function and from 0 of a linear one")


PRESETS = {
    "smoke": Config(kernels=("relu-2",), networks={"relu-2": 1024}, steps=400),
    "quick": Config(),
    "full": Config(
        kernels=("relu-2", "relu-3", "relu-4", "gelu-2"),
        networks={"relu-2": 4096, "relu-3": 512, "relu-4": 256},
        directions=64,
        seeds=32,
        steps=2000,
    ),
}


class Data(NamedTuple):
    """Inputs (seeds, n, d), labels (seeds, n) and points of rays (seeds, directions, radii, 3, d), in float64."""

    x: np.ndarray
    y: np.ndarray
    directions: np.ndarray
    rays: np.ndarray


def run(config: Config) -> dict[str, np.ndarray]:
    """kernel/<architecture> and network/<architecture> hold D (seeds, radii), and predicted/network from OUTSIDE on.

    scaled/<architecture> is f(r u) / r of networks with and without biases (seeds, directions, radii, 3). kinks
    (seeds, directions) is the radius of the last kink; linear/beyond and linear/before (2, seeds, directions) are
    2 g(3r/2) / r and (g(r) + g(2r)) / r beyond it and from the edge of the data on.
    """
    data = _draw(config)
    arrays = {"radii": np.array(config.radii)}
    for name in tqdm((*config.kernels, SMOOTH), desc="ntk_extrapolation: regression", disable=None):
        arrays[f"kernel/{name}"] = results.part(f"kernel-{name}", partial(_regression, config, name, data))
    networks = {**config.networks, SMOOTH: config.networks[MAIN], FREE: config.networks[MAIN]}
    for name, width in tqdm(networks.items(), desc="ntk_extrapolation: networks", disable=None):
        found = results.part(f"network-{name}", partial(_network, config, name, width, data))
        arrays[f"network/{name}"], arrays[f"loss/{name}"] = _deviation(found["rays"]), found["loss"]
        if name in (MAIN, FREE):
            arrays[f"scaled/{name}"] = found["rays"] / (np.array(config.radii)[:, None] * STEPS)
        if name == MAIN:
            arrays |= {key: found[key] for key in ("kinks", "linear/beyond", "linear/before")}
    arrays["predicted/network"] = results.part("predicted", partial(_predicted, config, data))
    return arrays


def _draw(config):
    """Another data set, target and set of directions for each seed."""
    rng = np.random.default_rng(0)

    def directions(count):
        u = rng.normal(size=(config.seeds, count, config.dimension))
        return u / np.linalg.norm(u, axis=-1, keepdims=True)

    unit = math.sqrt(config.dimension)
    x = unit * rng.uniform(size=(config.seeds, config.points, 1)) * directions(config.points)
    form = rng.normal(size=(config.seeds, config.dimension, config.dimension))
    y = np.einsum("sni,sij,snj->sn", x, form, x)
    u = unit * directions(config.directions)
    rays = u[:, :, None, None] * (np.array(config.radii)[:, None] * STEPS)[..., None]
    return Data(x, y / np.std(y, axis=1, keepdims=True), u, rays)


@cache
def _encoder(name, width):
    activation, depth, *free = name.split("-")
    return encoders.MLP(width, 1, depth=int(depth), activation=activation, use_bias=not free)


def _deviation(values):
    """D (seeds, radii) of values (seeds, directions, radii, 3)."""
    return np.sqrt(np.mean((values @ SECOND) ** 2, axis=1) / np.mean((values @ FIRST) ** 2, axis=1))


def _weights(encoder, points, x):
    """a(x) of regression, (points, n): predictions are a.y."""
    kernel = np.asarray(infinite.infinite_ntk(encoder, jnp.concatenate([points, x]), jnp.asarray(x)))
    own = kernel[len(points) :]
    return np.linalg.solve(own + RIDGE * np.trace(own) / len(x) * np.eye(len(x)), kernel[: len(points)].T).T


def _regression(config, name, data):
    encoder = _encoder(name, 1)
    with jax.enable_x64(True):
        values = [
            _weights(encoder, rays.reshape(-1, config.dimension), x) @ y
            for x, y, rays in zip(data.x, data.y, data.rays, strict=True)
        ]
    return _deviation(np.stack(values).reshape(data.rays.shape[:-1]))


def _predicted(config, data):
    """D of trained networks of infinite width, (seeds, radii from OUTSIDE on)."""
    encoder, outside = _encoder(MAIN, 1), np.array(config.radii) >= OUTSIDE
    second, first = (np.empty((config.seeds, outside.sum())) for _ in range(2))
    for seed, (x, y, rays) in enumerate(zip(data.x, data.y, data.rays[:, :, outside], strict=True)):
        points = rays.reshape(-1, config.dimension)
        with jax.enable_x64(True):
            a = _weights(encoder, points, x)
            process = np.asarray(infinite.infinite_nngp(encoder, jnp.concatenate([points, x])))
        # Of the covariance of f_0(x) - a(x).f_0(X) only the blocks of three points on a ray are needed.
        a, shape = a.reshape(-1, 3, len(x)), rays.shape[:2]
        own = np.stack([process[i : i + 3, i : i + 3] for i in range(0, len(points), 3)])
        mixed = a @ process[: len(points), len(points) :].reshape(-1, 3, len(x)).swapaxes(1, 2)
        covariance = own - mixed - mixed.swapaxes(1, 2) + a @ process[len(points) :, len(points) :] @ a.swapaxes(1, 2)
        for weights, square in ((SECOND, second), (FIRST, first)):
            values = (a @ y @ weights) ** 2 + np.einsum("i,pij,j->p", weights, covariance, weights)
            square[seed] = np.mean(values.reshape(shape), axis=0)
    return np.sqrt(second / first)


def _network(config, name, width, data):
    """Values on the rays and the last loss; for the main network also both sides of linearity at its kinks."""
    encoder = _encoder(name, width)
    x, y = (jnp.asarray(values, jnp.float32) for values in (data.x, data.y))
    start = _initial(encoder, config.seeds, x[0])
    done = training.train(_loss(encoder), start, (x, y), optimizer=OPTIMIZER, steps=config.steps, progress=False)
    if done.status != "finished":
        raise RuntimeError(f"training diverged after {done.steps} steps: lower the step size of OPTIMIZER")
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), done.params)
    found = {"rays": _values(encoder, params, data.rays), "loss": np.asarray(done.losses[-1]) / config.seeds}
    return found | _sides(encoder, params, data.directions) if name == MAIN else found


def _sides(encoder, params, directions):
    """Last kink of each ray, and both sides of g(r) + g(2r) = 2 g(3r/2) beyond it and from the edge of the data on."""
    layer = params["params"]["dense_0"]
    slopes = directions @ layer["kernel"] / math.sqrt(directions.shape[-1])
    kinks = np.max(-layer["bias"][:, None] / slopes, axis=-1)
    # Past the kink by more than rounding.
    radii = np.stack([1.001 * kinks, np.ones_like(kinks)], axis=-1)
    g = _values(encoder, params, (radii[..., None] * STEPS)[..., None] * directions[:, :, None, None])
    left, right = 2 * g[..., 1] / radii, (g[..., 0] + g[..., 2]) / radii
    named = {f"linear/{where}": np.stack([left, right])[..., i] for i, where in enumerate(("beyond", "before"))}
    return {"kinks": kinks} | named


def _values(encoder, params, points):
    """Outputs in float64 at points (seeds, ..., d), shaped (seeds, ...)."""
    with jax.enable_x64(True):
        rows = points.reshape(len(points), -1, points.shape[-1])
        return np.asarray(_outputs(encoder, params, rows)).reshape(points.shape[:-1])


@partial(jax.jit, static_argnums=(0, 1))
def _initial(encoder, seeds, x):
    return jax.vmap(encoder.init, in_axes=(0, None))(jax.random.split(jax.random.key(0), seeds), x)


@partial(jax.jit, static_argnums=0)
def _outputs(encoder, params, points):
    return jax.vmap(lambda params, points: encoder.apply(params, points)[:, 0])(params, points)


@cache
def _loss(encoder):
    """Sum over independent networks."""

    def loss(params, batch):
        x, y = batch
        return jnp.sum(jnp.mean((_outputs(encoder, params, x) - y) ** 2, axis=1)) / 2

    return loss


def verdicts(config: Config, arrays: dict[str, np.ndarray]) -> list[verify.Verdict]:
    """Exponents of regression and of networks, the network's curve, and three exact or limiting statements."""
    found = []
    for name in config.kernels:
        statement = f"NTK regression deviates from linearity as r^-2, {name}"
        found += _exponent(config, arrays, f"kernel.{name}", statement, f"kernel/{name}", f"kernel/{SMOOTH}", -2.0)
    for name in config.networks:
        statement = f"trained networks deviate from linearity as r^(-3/2), {name}"
        found += _exponent(config, arrays, f"network.{name}", statement, f"network/{name}", f"network/{SMOOTH}", -1.5)
    return found + _curve(config, arrays) + _saturation(config, arrays) + _exact(arrays)


def _claim(name, statement, source=SOURCE):
    return verify.Claim(f"N9.{name}", statement, source)


def _control(of, kind, why):
    return verify.Claim(f"{of.name}.{kind}", f"{of.statement}: {why}", of.source, "control", of.name)


def _exponent(config, arrays, name, statement, key, smooth, exponent):
    def check(claim, key, chosen):
        return verify.rate(claim, arrays["radii"][chosen], arrays[key][:, chosen], exponent, margin=config.margin)

    inside, outside = arrays["radii"] <= INSIDE, arrays["radii"] >= OUTSIDE
    claim = _claim(name, statement)
    return [
        check(claim, key, outside),
        check(_control(claim, "inside", "at radii inside the data"), key, inside),
        check(_control(claim, "erf", "units that saturate"), smooth, outside),
    ]


def _curve(config, arrays):
    """At the geometric middle of the radii outside."""
    outside = arrays["radii"] >= OUTSIDE
    middle = outside.sum() // 2

    def check(claim, key):
        values = arrays[key][:, outside][:, middle]
        predicted = arrays["predicted/network"][:, middle]
        return verify.agreement(claim, values, predicted, margin=config.curve, relative=True)

    radius = arrays["radii"][outside][middle]
    claim = _claim("curve", f"at r = {radius:g} networks deviate as the infinitely wide ones, {MAIN}", DERIVED)
    return [check(claim, f"network/{MAIN}"), check(_control(claim, "regression", "NTK regression"), f"kernel/{MAIN}")]


def _saturation(config, arrays):
    def check(claim, key):
        return verify.agreement(claim, arrays[key][:, -1], 1 / 3, margin=config.saturated)

    claim = _claim("saturation", f"NTK regression with {SMOOTH} is never linear: D -> 1/3 at large r", DERIVED)
    return [check(claim, f"kernel/{SMOOTH}"), check(_control(claim, "relu", MAIN), f"kernel/{MAIN}")]


def _exact(arrays):
    """Homogeneity without biases, and linearity beyond the last kink with them."""

    def homogeneous(claim, key):
        values = arrays[key]
        return verify.identity(claim, values, np.broadcast_to(values[..., :1, :1], values.shape))

    claim = _claim("homogeneous", "trained ReLU networks without biases are homogeneous, f(r u) = r f(u)")
    found = [
        homogeneous(claim, f"scaled/{FREE}"),
        homogeneous(_control(claim, "biases", "with biases"), f"scaled/{MAIN}"),
    ]
    claim = _claim("kinks", "beyond the last kink of a ray trained ReLU networks are exactly linear", DERIVED)
    control = _control(claim, "before", "from the edge of the data on")
    for check, where in ((claim, "beyond"), (control, "before")):
        found.append(verify.identity(check, *arrays[f"linear/{where}"]))
    return found
