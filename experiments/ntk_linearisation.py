r"""N5: the function-space gradient flow with the kernel at initialisation predicts the trained network.

    d f / dt = -K_0 grad_f L(f)        (nonlinear in f, both views, held-out points through K_0(x_test, X))

is solved adaptively and compared with the embeddings f(t) of the network trained by gradient flow, on the training
pairs and on held-out pairs:

    gap(M) = ||f(t) - f_flow(t)||_F / ||f_flow(t)||_F

falls at least as fast as M^{-1/2} while the kernel stays put (cosine InfoNCE). Descent with steps of length eta
follows the network's flow with an error of order eta, which would hide the gap of wide networks; so f(t) is
extrapolated from two descents, 2 f_{eta/2} - f_eta, with an error of order eta^2. What is left of it is measured as
the floor: the same extrapolation of descent in function space at the fixed kernel, against the flow. The flow is
singular where an embedding reaches 0 under cosine similarity; with z = 8 outputs none comes near it, and a solve that
does not finish is reported as not-a-number.

Control: the linear dot-product loss at the time at which its linearised descent has grown to |f| = growth x sqrt(M),
where the kernel has moved (N3): the gap does not fall with the width.

The tolerances at which the flows were solved, their steps and their status are kept with the results. The full preset
stops at 16,384 units: with tanh the gap falls as 1/M, from 1e-4 at 4,096 when first measured, and beyond 16,384 it
would no longer lie above the rounding of embeddings in float32, 5e-7, by the factor that the floor claims for each run.

Source: Jacot et al. 2018 (arXiv 1806.07572), Lee et al. 2019 (arXiv 1902.06720) for the linearisation; the flow of two
views and its check: derivation.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from experiments import _setting
from experiments._side_by_side import side_by_side
from experiments._training import parameters
from theorykit import results, training, verify
from theorykit.ntk import gradient_flow

SOURCE = "Jacot et al. 2018 (arXiv 1806.07572); Lee et al. 2019 (arXiv 1902.06720); two views: derivation"
SERIES = ("cosine InfoNCE", "linear dot")
LOSSES = (_setting.COSINE_LOSSES["InfoNCE"], _setting.LINEAR_DOT)
PARTS = ("training", "held-out")
SOLVER = ("status", "rtol", "atol", "accepted", "rejected")  # what is kept of every flow


@dataclasses.dataclass(frozen=True)
class Config:
    """Digits as pairs of augmented views; the last `heldout` of the pairs are not trained on."""

    activations: tuple[str, ...] = ("tanh", "relu")
    widths: tuple[int, ...] = (256, 1024, 4096)
    seeds: int = 16
    pairs: int = 12
    heldout: int = 6
    features: int = 8
    learning_rate: float = 0.04
    times: tuple[float, ...] = (1.0, 3.0, 10.0)
    growth: float = 0.2
    slope_margin: float = results.threshold(0.0, "the statement is one-sided: at least as fast as M^(-1/2)")
    floor_margin: float = results.threshold(0.0, "the floor lies below a quarter of the gap, for every run")


PRESETS = {
    "smoke": Config(
        activations=("tanh",), widths=(128, 512, 2048), seeds=10, pairs=6, heldout=3, learning_rate=0.08, times=(10.0,)
    ),
    "quick": Config(),
    "full": Config(widths=(256, 1024, 4096, 16384), seeds=24, learning_rate=0.02),
}


def run(config: Config) -> dict[str, np.ndarray]:
    """gap/<part>/<series>/<activation> (seeds, widths, times), floor/... and plain/... likewise.

    end/<series>/<activation> (seeds, widths) is the last time, solver/<what>/<series>/<activation> likewise how the
    flow was solved.
    """
    arrays = {"widths": np.array(config.widths), "times": np.array(config.times)}
    cells = len(config.activations) * len(SERIES) * config.seeds * len(config.widths)
    with tqdm(total=cells, desc="ntk_linearisation", disable=None) as bar:
        for activation in config.activations:
            arrays |= results.part(activation, lambda a=activation: _activation(config, a, bar))
    return arrays


def _activation(config, activation, bar):
    shape = (len(SERIES), config.seeds, len(config.widths))
    # The control has one time.
    measured = np.full((3, len(PARTS), *shape, len(config.times)), np.nan)
    ends, solver = np.empty(shape), np.empty((len(SOLVER), *shape))

    def measure(series, seed, column):
        found = _cell(config, activation, SERIES[series], seed, config.widths[column])
        times = found[0].shape[-1]
        measured[:, :, series, seed, column, :times] = found[:3]
        ends[series, seed, column], solver[:, series, seed, column] = found[3:]
        bar.update()

    # One of each kind first: two at a time, they compile different programs.
    side_by_side(measure, sorted(np.ndindex(shape), key=lambda cell: (cell[1] > 0, cell[2])))
    arrays = {}
    for i, series in enumerate(SERIES):
        key, times = f"{series}/{activation}", len(config.times) if i == 0 else 1
        arrays[f"end/{key}"] = ends[i]
        arrays |= {f"solver/{name}/{key}": values[i] for name, values in zip(SOLVER, solver, strict=True)}
        for kind, name in enumerate(("gap", "floor", "plain")):
            arrays |= {f"{name}/{part}/{key}": measured[kind, j, i, ..., :times] for j, part in enumerate(PARTS)}
    return arrays


def _cell(config, activation, series, seed, width):
    """Gap, floor and floor without extrapolation, each (parts, times), of one network; last time; how it was solved."""
    encoder = _setting.encoder(f"{activation}-2", width, config.features)
    a, b = _setting.views(seed, config.pairs + config.heldout)
    n = config.pairs
    views = (a[:n], b[:n])
    points = jnp.concatenate([*views, a[n:], b[n:]])
    params = _setting.initial(encoder, _setting.cell_key(seed, width), a)
    whole = _setting.at_start(encoder.apply, params, points)
    embeddings, kernel = map(np.asarray, whole)  # sliced on the host, where nothing has to be compiled
    loss, times, longest = LOSSES[SERIES.index(series)], np.array(config.times), config.learning_rate
    if series == "linear dot":
        # Its gap is of order one, so longer steps do, and its time is several times longer.
        longest = 4 * config.learning_rate
        start = embeddings[: 2 * n], kernel[: 2 * n, : 2 * n]
        times = np.array([longest * _setting.steps_until(config.growth * np.sqrt(width), *start, longest)])
    predicted = gradient_flow.flow(
        (kernel[:n, :n], kernel[:n, n : 2 * n], kernel[n : 2 * n, n : 2 * n]),
        loss,
        (embeddings[:n], embeddings[n : 2 * n]),
        times.astype(embeddings.dtype),
        cross=(kernel[2 * n :, :n], kernel[2 * n :, n : 2 * n]),
        heldout0=embeddings[2 * n :],
    )
    solved = [np.asarray(getattr(predicted, name)) for name in SOLVER]
    flow = np.concatenate([predicted.fa, predicted.fb, predicted.heldout], axis=1)
    network, descent = [], []
    for rate in (longest, longest / 2):
        steps = np.rint(times / rate).astype(int)
        network.append(_train(encoder, loss, params, views, points, rate, steps))
        descent.append(_descent(loss, whole[1], whole[0], rate, steps, n))
    parts = (slice(2 * n), slice(2 * n, None))
    followed = (2 * network[1] - network[0], 2 * descent[1] - descent[0], descent[1])
    return *(np.stack([_gap(f, flow, rows) for rows in parts]) for f in followed), times[-1], solved


def _train(encoder, loss, params, views, points, rate, steps):
    """Embeddings after the given numbers of updates, (times, points, z); not-a-number after a divergence."""
    run = training.train(
        _setting.objective(encoder.apply, LOSSES),
        params,
        _setting.with_loss(views, LOSSES.index(loss), rate),
        optimizer=_setting.descent(1.0),
        steps=int(steps[-1]),
        metrics=parameters,
        metric_steps=steps.tolist(),
        progress=False,
    )
    found = np.full((len(steps), len(points), encoder.features), np.nan, np.float32)
    for m in range(len(run.metric_steps)):
        found[m] = _embed(encoder.apply, run.metrics, points, m)
    return found


@partial(jax.jit, static_argnums=0)
def _embed(apply, stacked, points, m):
    return apply(jax.tree.map(lambda leaf: leaf[m], stacked), points)


def _descent(loss, kernel, start, rate, steps, n):
    """Descent in function space at a fixed kernel: what finite steps alone change."""
    stages, f, done = [], start, 0
    for step in steps:
        f, done = _advance(loss, kernel, f, rate, int(step) - done, n), int(step)
        stages.append(f)
    return np.stack(stages)


@partial(jax.jit, static_argnums=(0, 5))
def _advance(loss, kernel, f, rate, count, n):
    gradient = jax.grad(lambda f: loss(f[:n], f[n : 2 * n]))
    update = lambda _, f: f - rate * jnp.einsum("ijop,jp->io", kernel, gradient(f), precision="highest")  # noqa: E731
    return jax.lax.fori_loop(0, count, update, f)


def _gap(reached, flow, rows):
    difference = np.linalg.norm((reached - flow)[:, rows], axis=(1, 2))
    return difference / np.linalg.norm(flow[:, rows], axis=(1, 2))


def verdicts(config: Config, arrays: dict[str, np.ndarray]) -> list[verify.Verdict]:
    """The fall of the gap on training and held-out points, and the floor below it; each with its control."""
    found = []
    for activation in config.activations:
        for part in PARTS:
            found += _fall(config, arrays, activation, part)
        found += _floor(config, arrays, activation)
    return found


def _fall(config, arrays, activation, part):
    def check(claim, series):
        gap = arrays[f"gap/{part}/{series}/{activation}"][..., -1]
        return verify.rate(claim, arrays["widths"], gap, -0.5, margin=config.slope_margin, side="at_most")

    statement = (
        f"the gap between trained embeddings and the flow falls at least as M^(-1/2), {part} points, {activation}"
    )
    claim = verify.Claim(f"N5.{part}.{activation}", statement, SOURCE)
    why = "linear dot loss at the time when the kernel has moved"
    control = verify.Claim(f"{claim.name}.control", f"{statement}: {why}", SOURCE, "control", claim.name)
    return [check(claim, SERIES[0]), check(control, SERIES[1])]


def _floor(config, arrays, activation):
    """The gap is not that of finite steps: the floor of every run against a quarter of its gap, at the last time."""
    key = f"training/{SERIES[0]}/{activation}"

    def check(claim, floor):
        limit = arrays[f"gap/{key}"][..., -1].ravel() / 4
        return verify.bound(claim, floor[..., -1].ravel(), limit, margin=config.floor_margin)

    statement = f"finite steps account for less than a quarter of the gap, {activation}"
    claim = verify.Claim(f"N5.floor.{activation}", statement, "derivation (Richardson extrapolation)")
    why = "without the extrapolation"
    control = verify.Claim(f"{claim.name}.control", f"{statement}: {why}", claim.source, "control", claim.name)
    return [check(claim, arrays[f"floor/{key}"]), check(control, arrays[f"plain/{key}"])]
