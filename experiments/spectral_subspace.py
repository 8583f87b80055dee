r"""N6, N7: with an orthonormal last layer a contrastive encoder is a PCA of its random features.

The encoder is f(x) = W^T h(x) with W^T W = I_z, h = phi(V x / sqrt d) / sqrt M for two layers and the last hidden layer
over the square root of its size for deeper ones. The linear triplet loss is then a quadratic form,

    L = mean f(a).(f(x-) - f(x+)) = Tr(W^T C W),     C = sym[H^T (H^- - H^+)] / n,

and the bottom eigenspace U_0 of C = C(0), of dimension z, minimises it. C is M x M, of rank 2n at most, never formed.
Three statements, each measured with W from a random start:

    V fixed      W ends in U_0, to the tolerance of the descent. Descent never leaves the span of W(0) and the rows of
                 H, so it runs in that space, of z + 2n dimensions, in float64.
    V trained    C(t) drifts: ||C(t) - C(0)||_F grows as t and falls as 1 / M, t being learning rate times steps. W
                 settles on the bottom eigenspace U(t) of C(t) in a time of order ln(M) / gap; then (Davis, Kahan)

                     ||sin Theta(W(t), U_0)||_F <= 2 ||C(t) - C(0)||_F / gap,     gap = lambda_{z+1} - lambda_z of C(0).

                 The bound says nothing from sqrt z on ("vacuous"); such points are left out of its verdict. It is loose
                 by a factor of 20 to 30, since most of the drift stays inside U_0: the eigenvalues there grow. What
                 leaves U_0 is R = (I - U_0 U_0^T) C(t) U_0, with the sharper bound

                     ||sin Theta(U(t), U_0)||_F <= ||R||_F / delta,   delta = lambda_{z+1}(t) - max eig U_0^T C(t) U_0.

    gap          the bound grows as 1 / gap, and where the gap closes no eigenspace is left to be found, V fixed or not.

How far is far: distances are compared with those of random subspaces, about sqrt z (the null).

After the first measurement. Both bounds are those of U(t), and W that had not settled lay outside: at gaps near 0.01 of
the Gaussian series, and (residual bound) for ReLU at width 64. So points at which W cannot have settled in the time are
left out, and the residual bound is a claim at the largest width alone.

Controls. (1) Without orthogonality: the loss then has no minimum, so the norm is held, Tr W^T W = z. All columns of W
turn to one eigenvector, and the distance ||W W^T - U_0 U_0^T||_F / sqrt 2, which is ||sin Theta||_F for orthonormal W,
stays large. (2) Narrow networks lose the subspace, at a time proportional to M: no one width is the limit at all times.
(3) A gap closed on purpose: quarter turns of a plane map the Gaussian data and the features onto themselves.
(4) For the laws of the drift: V learns faster in proportion to M; and the time before W has settled.

Data: triplets of three classes of digits (the negative is of another class), z = 2; Gaussian vectors with three strong
directions, seen twice through noise.
"""

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import threadpoolctl
from tqdm import tqdm

from experiments import _setting, _subspace
from experiments._side_by_side import side_by_side
from theorykit import data, results, verify
from theorykit.spectral import compare, stiefel

PCA = "Anil, Esser, Ghoshdastidar (arXiv 2403.08673)"
DAVIS_KAHAN = "Davis, Kahan 1970; in the form of Yu, Wang, Samworth 2015 (arXiv 1405.0680), theorem 2"
RESIDUAL = "Davis, Kahan 1970 (doi:10.1137/0707001), the sin Theta theorem with a residual"
DRIFT = "derivation; arXiv 2403.08673 states the upper bound O(t / sqrt M)"


@dataclasses.dataclass(frozen=True)
class Series:
    """Data and encoder, its widths (channels of a CNN), and a descent, with steps below 1 / (spread of C)."""

    data: str
    encoder: str
    widths: tuple[int, ...]
    steps: int
    learning_rate: float

    @property
    def name(self) -> str:
        return f"{self.data}.{self.encoder}"

    @property
    def pixels(self) -> int:
        """Rows of W for each channel of a CNN; 0 for an MLP."""
        return 64 if "flat" in self.encoder else 0

    @property
    def shallow(self) -> bool:
        """One dense hidden layer: N6. Everything else is N7."""
        return self.encoder.endswith("-2") and not self.pixels


@dataclasses.dataclass(frozen=True)
class Config:
    """The laws of the drift are checked on the first series, the gap at the largest width of the Gaussian one."""

    series: tuple[Series, ...] = (
        Series("digits", "tanh-2", (128, 256, 512, 1024, 2048, 4096), 64, 12.5),
        Series("digits", "relu-2", (128, 512, 4096), 64, 12.5),
        Series("gaussian", "tanh-2", (128, 512, 4096), 64, 4.7),
        Series("digits", "tanh-3", (128, 384, 1024), 25, 24.0),
        Series("digits", "tanh-flat-2", (8, 32, 128), 24, 21.0),
    )
    shrinks: tuple[float, ...] = (0.5, 0.7, 0.8, 0.9, 0.95, 1.0)  # of direction 2, elsewhere 0.5; 1 closes the gap
    features: int = 2
    triplets: int = 48  # with half as many the gap falls to 0.003 in some seeds, and W needs the longer to settle
    seeds: int = 6
    snapshots: tuple[float, ...] = (0.0, 0.08, 0.15, 0.25, 0.37, 0.5, 0.6, 0.7, 0.85, 1.0)  # shares of the steps
    settled: float = 0.5  # share of the steps after which W has found U(t), so that f has its final size
    linear: float = 1.0  # the laws of the drift hold for t << M: widths from this many times t on
    fixed_steps: int = 2000
    tolerance: float = 1e-10  # norm of the gradient with V fixed; gaps are 1e-2, so that distances come to 1e-8
    draws: int = 1000  # of the null: the least that the level of the gate allows
    pictured: int = 60  # digits of each class in the pictures
    factor: float = results.threshold(10.0, "the null is at least ten times further away, as the statement asks")
    fixed_factor: float = results.threshold(1e6, "distances of 1e-8, with two orders of room for a small gap")
    width_margin: float = results.threshold(0.2, "tells the exponent -1 from the -1/2 of the known upper bound")
    time_margin: float = results.threshold(0.1, "curvature of second order in t / M, at t = M / 5")


_TANH, _GAUSSIAN = ("digits", "tanh-2"), ("gaussian", "tanh-2")
PRESETS = {
    # One width of all programs, so that they are compiled once.
    "smoke": Config(
        series=(Series(*_TANH, (128, 512, 1024, 2048), 48, 15.0), Series(*_GAUSSIAN, (2048,), 48, 4.0)),
        shrinks=(0.5, 1.0),
        linear=0.7,
        snapshots=(0.0, 0.15, 0.25, 0.37, 0.5, 0.6, 0.8, 1.0),
        fixed_steps=1200,
        pictured=20,
    ),
    "quick": Config(),
    "full": Config(
        series=(
            Series(*_TANH, (128, 256, 512, 1024, 2048, 4096, 8192, 16384), 160, 10.0),
            Series("digits", "relu-2", (128, 256, 1024, 4096, 16384), 160, 10.0),
            Series(*_GAUSSIAN, (128, 256, 1024, 4096, 16384), 160, 4.0),
            Series("digits", "tanh-3", (128, 384, 1024, 2048), 54, 15.0),
            Series("digits", "tanh-flat-2", (8, 32, 128, 512), 54, 15.0),
            Series("digits", "tanh-flat-3", (8, 32, 256), 40, 15.0),
        ),
        seeds=12,
    ),
}


def run(config: Config) -> dict[str, np.ndarray]:
    """<series>/<measure>, (seeds, widths) at the end of training or (seeds, widths, times) along it.

    Also <series>/norm/... (control without orthogonality, widest only), <first series>/fast/... (control of the laws)
    and <gaussian>/turned/... with shrinks in place of widths. null (draws,), picture/...
    """
    arrays, tasks = {}, []
    for series in config.series:
        tasks.append((series, "", [{"width": width} for width in series.widths]))
        tasks.append((series, "/norm", [{"width": series.widths[-1], "constrained": False}]))
        if series.data == "gaussian":
            shrunk = [{"width": series.widths[-1], "shrink": shrink} for shrink in config.shrinks]
            tasks.append((series, "/turned", shrunk))
    first = config.series[0]
    tasks.append((first, "/fast", [{"width": m, "faster": m / first.widths[0]} for m in linear_widths(config)]))
    cells = [(f"{series.name}{kind}", partial(_sweep, config, series, cells)) for series, kind, cells in tasks]
    cells += [("picture", partial(_pictures, config)), ("null", partial(_null, config))]
    with tqdm(desc="spectral_subspace", total=len(cells), disable=None) as bar:

        def work(name, measure):
            found = results.part(name.replace("/", "-"), measure)
            bar.update()
            return (
                {f"{name}/{key}": value for key, value in found.items()} if isinstance(found, dict) else {name: found}
            )

        with threadpoolctl.threadpool_limits(1):  # small eigenproblems, on which threads get into each other's way
            for found in side_by_side(work, cells):
                arrays |= found
    return arrays


def _null(config):
    # Random subspaces of more dimensions are further apart: the smallest space gives the strictest null.
    smallest = min(series.widths[0] * max(series.pixels, 1) for series in config.series)
    null = compare.null_distances(jax.random.key(0), smallest, config.features, config.draws)
    return np.asarray(null, np.float64)


def linear_widths(config: Config) -> list[int]:
    """Widths of the first series at which the laws of the drift are checked."""
    series = config.series[0]
    return [width for width in series.widths if width >= config.linear * series.steps * series.learning_rate]


def steps(config: Config, series: Series) -> list[int]:
    """Numbers of updates after which a network is measured."""
    return [round(share * series.steps) for share in config.snapshots]


def _sweep(config, series, cells):
    found = [_cell(config, series, seed, **cell) for seed in range(config.seeds) for cell in cells]
    table = {name: np.array([cell[name] for cell in found]) for name in found[0]}
    return {name: values.reshape(config.seeds, len(cells), *values.shape[1:]) for name, values in table.items()}


def _cell(config, series, seed, width, shrink=0.5, faster=1.0, constrained=True):
    """All measures of one network."""
    run, w, rows, _ = _train(config, series, seed, width, shrink, faster, constrained)
    z, ended = config.features, int(run.status) in (stiefel.FINISHED, stiefel.CONVERGED)
    values, vectors = _subspace.spectrum(rows[0])
    u, gap = vectors[:, :z], values[z] - values[z - 1]
    settled = config.snapshots.index(config.settled)
    now, turned = _subspace.spectrum(rows[-1])
    left, inside = _subspace.leaving(rows[-1], u)
    drift = np.array([_subspace.difference(factor, rows[0]) for factor in rows])
    found = {
        "distance": [_subspace.distance(w_t, u) for w_t in w],
        "current": _subspace.distance(w[-1], turned[:, :z]),
        "drift": drift,
        "since": [_subspace.difference(factor, rows[settled]) for factor in rows[settled + 1 :]],
        "limit": 2 * drift[-1] / max(gap, np.finfo(float).tiny),
        "sharp": left / (now[z] - inside) if now[z] > inside else np.inf,
        "loss": float(run.loss),
        "trace": np.trace(w[-1].T @ _subspace.apply(rows[-1], w[-1])),
        "trace_at_start": np.trace(w[-1].T @ _subspace.apply(rows[0], w[-1])),
    }
    found = {name: np.where(ended, value, np.nan) for name, value in found.items()}
    times = np.asarray(run.metric_times, np.float64)
    return found | {"fixed": _fixed(config, series, rows[0], w[0], u, constrained), "gap": gap, "times": times}


def _train(config, series, seed, width, shrink=0.5, faster=1.0, constrained=True):
    """The joint descent: its run, W and the factor of C at the snapshots in float64, the hidden layers at the start."""
    # Units with both weights zero stay so and leave the network of the others, but for the factor 1 / sqrt M. Thus all
    # widths of two layers are one compiled program.
    units = series.widths[-1] if series.shallow else width
    encoder, views = (
        _setting.encoder(series.encoder, units, config.features),
        _subspace.views(series.data, seed, config.triplets, shrink),
    )
    layers = dict(_setting.initial(encoder, _setting.cell_key(seed, width), views[0])["params"])
    w = np.array(layers.pop(max(layers))["kernel"], np.float64)
    size = len(w) * width // units
    w[:size], w[size:] = np.linalg.qr(w[:size])[0], 0
    if series.data == "gaussian" and shrink == 1:
        layers = _subspace.turned_features(layers)
    layers = jax.tree.map(lambda kernel: np.where(np.arange(units) < width, kernel, np.float32(0)), layers)
    start = w if constrained else w.reshape(-1, 1) / math.sqrt(config.features)
    loss, snapshot = _subspace.problem(encoder, constrained)
    given = (views, layers, np.float32(math.sqrt(faster)), np.float32(units / width))
    run = stiefel.stiefel_descent(
        loss,
        np.float32(start),
        jax.tree.map(np.zeros_like, layers),
        given,
        steps=series.steps,
        learning_rate=series.learning_rate,
        metrics=snapshot,
        metric_steps=steps(config, series),
    )
    w, rows = (np.asarray(a, np.float64) for a in run.metrics)
    return run, w[:, :size], rows[:, :, :size], layers


def _fixed(config, series, rows, w, u, constrained):
    """Distances to U_0 along the descent with V fixed, and at its end."""
    basis = np.linalg.qr(np.concatenate([w, rows.T], axis=1))[0]
    start = np.eye(basis.shape[1], config.features)  # the columns of W(0) came first
    small = rows @ basis
    loss, snapshot = _subspace.quadratic(constrained)
    with jax.enable_x64(True):
        run = stiefel.stiefel_descent(
            loss,
            jnp.asarray(start if constrained else start.reshape(-1, 1) / math.sqrt(config.features)),
            None,
            jnp.asarray(small.T @ _subspace.swap(small)),
            steps=config.fixed_steps,
            learning_rate=series.learning_rate,
            tolerance=config.tolerance,
            metrics=snapshot,
            metric_steps=[*steps(config, series), config.fixed_steps],
        )
    return np.array([_subspace.distance(w_t, basis.T @ u) for w_t in np.asarray(run.metrics)])


def _pictures(config):
    """First series and seed: pixel images (z, 64) and embeddings of digits (n, z) by predicted and learned components.

    An image is the mean over the anchors of a component's gradient. Learned W are turned within their span towards U_0,
    since the loss does not see that turn.
    """
    series, z = config.series[0], config.features
    images, labels = data.digits()
    shown = np.concatenate([np.flatnonzero(labels == c)[: config.pictured] for c in _subspace.CLASSES])
    x, anchors = data.to_sphere(images[shown]), _subspace.views(series.data, 0, config.triplets)[0]
    encoder = _setting.encoder(series.encoder, series.widths[-1], z)
    found = {"labels": labels[shown]}
    for case, width, constrained in (
        ("wide", series.widths[-1], True),
        ("narrow", series.widths[0], True),
        ("norm", series.widths[-1], False),
    ):
        run, w, rows, layers = _train(config, series, 0, width, constrained=constrained)
        u = _subspace.spectrum(rows[0])[1][:, :z]
        left, _, right = np.linalg.svd(w[-1].T @ u)
        for kind, matrix, hidden in (
            ("predicted", u, layers),
            ("learned", w[-1] @ left @ right, jax.tree.map(np.add, layers, run.params)),
        ):
            padded = np.zeros((series.widths[-1], z), np.float32)
            padded[:width] = matrix * math.sqrt(series.widths[-1] / width)
            embedded, gradients = _subspace.components(encoder, _subspace.params(hidden, padded), x, anchors)
            found[f"{case}/{kind}/embeddings"] = np.asarray(embedded)
            found[f"{case}/{kind}/images"] = np.asarray(gradients)
    return found


def verdicts(config: Config, arrays: dict[str, np.ndarray]) -> list[verify.Verdict]:
    """Distances of all series against the null and the bounds; of the first one the laws of the drift too."""
    found = []
    for series in config.series:
        found += _distances(config, arrays, series)
    return found + _first(config, arrays, config.series[0])


def _claim(series, measure, statement, source, control=None):
    """Claim on a series, or its control: a name and why it should fail."""
    name = f"{'N6' if series.shallow else 'N7'}.{measure}.{series.name}"
    statement = f"{statement}, {series.encoder} on {series.data}"
    if control is None:
        return verify.Claim(name, statement, source)
    return verify.Claim(f"{name}.{control[0]}", f"{statement}: {control[1]}", source, "control", name)


def _distances(config, arrays, series):
    def of(measure, kind=""):
        return arrays[f"{series.name}{kind}/{measure}"]

    norm, closed = ("norm", "norm in place of orthogonality"), ("closed", "with the gap closed on purpose")
    widest, limit = series.widths[-1], math.sqrt(config.features)
    found = []

    def far(claim, distance, factor):  # in every seed
        found.append(verify.separation(claim, factor * np.max(distance), null=arrays["null"], direction="less"))

    if series.shallow:
        factor = config.fixed_factor
        words = ("fixed", f"V fixed: chance is {factor:g} times further from U_0, in every seed, at every width", PCA)
        far(_claim(series, *words), of("fixed")[..., -1], factor)
        far(_claim(series, *words, norm), of("fixed", "/norm")[:, -1, -1], factor)
        if series.data == "gaussian":
            far(_claim(series, *words, closed), of("fixed", "/turned")[:, -1, -1], factor)

    factor = config.factor
    words = ("null", f"V trained: chance is {factor:g} times further from U_0, in every seed, at width {widest}", PCA)
    far(_claim(series, *words), of("distance")[:, -1, -1], factor)
    far(_claim(series, *words, norm), of("distance", "/norm")[:, -1, -1], factor)
    if len(series.widths) > 1:
        narrow = ("narrow", f"at width {series.widths[0]}")
        far(_claim(series, *words, narrow), of("distance")[:, 0, -1], factor)
    if series.data == "gaussian":
        far(_claim(series, *words, closed), of("distance", "/turned")[:, -1, -1], factor)

    def within(words, measure, value, bound):
        found.append(verify.bound(_claim(series, *words), value, bound))
        value, bound = of("distance", "/norm")[:, -1, -1], of(measure, "/norm")[:, -1]
        found.append(verify.bound(_claim(series, *words, norm), value, bound))

    if series.shallow:  # for the others the bound is vacuous at nearly all of these widths
        kinds = ["", "/turned"] if series.data == "gaussian" else [""]
        value, time = (np.concatenate([of(m, kind)[..., -1].ravel() for kind in kinds]) for m in ("distance", "times"))
        bound, gap = (np.concatenate([of(m, kind).ravel() for kind in kinds]) for m in ("limit", "gap"))
        # W starts at a tangent of about sqrt M from U(t), which shrinks as exp(-2 gap t): by then to 1%.
        settled = 2 * gap * time >= math.log(100 * math.sqrt(widest))
        kept = settled & ~(bound >= limit)  # not-a-number, from a failed run, stays and decides nothing
        words = (
            f"W is within the Davis-Kahan bound of U_0 ({np.sum(~kept)} of {bound.size} points vacuous or not settled)"
        )
        within(("limit", f"V trained: {words}", DAVIS_KAHAN), "limit", value[kept], bound[kept])
    words = ("sharp", f"V trained: W is within the residual bound of U_0, at width {widest}", RESIDUAL)
    within(words, "sharp", of("distance")[:, -1, -1], of("sharp")[:, -1])
    return found


def _first(config, arrays, series):
    """W on the current eigenspace, the loss as a quadratic form, the drift against width and time."""

    def of(measure, kind=""):
        return arrays[f"{series.name}{kind}/{measure}"]

    found = []
    words = ("current", "W is ten times nearer to the current eigenspace U(t) than to U_0", PCA)
    for kind, control in (("", None), ("/norm", ("norm", "norm in place of orthogonality"))):
        near, away = of("current", kind)[:, -1], of("distance", kind)[:, -1, -1]
        claim = _claim(series, *words, control)
        found.append(verify.separation(claim, config.factor * near, away, direction="less"))

    words = ("quadratic", "the triplet loss is Tr(W^T C W)", "derivation")
    for measure, control in (("trace", None), ("trace_at_start", ("start", "with C at the start of training"))):
        left = np.float32(of("loss")[:, -1])
        found.append(verify.identity(_claim(series, *words, control), left, np.float32(of(measure)[:, -1])))

    widths, settled = linear_widths(config), config.snapshots.index(config.settled)
    end, columns = series.steps * series.learning_rate, [series.widths.index(width) for width in widths]
    words = ("width", f"the drift of C once W has settled, until t = {end:g}, is in proportion to 1 / M", DRIFT)
    fast = ("fast", "V learns faster in proportion to M")
    for kind, chosen, control in (("", columns, None), ("/fast", slice(None), fast)):
        # Shortened steps do not reach the time of the statement. In the control they belong to the broken assumption.
        reached = np.isclose(of("times", kind)[:, chosen, -1], end) | bool(kind)
        since = np.where(reached, of("since", kind)[:, chosen, -1], np.nan)
        found.append(verify.rate(_claim(series, *words, control), widths, since, -1.0, margin=config.width_margin))

    words = (
        "time",
        f"the drift of C once W has settled is in proportion to the time since, at width {widths[-1]}",
        DRIFT,
    )
    times, early = of("times")[:, -1], ("early", "before W has settled, since the start")
    after = times[:, settled + 1 :] - times[:, settled : settled + 1], of("since")[:, -1]
    before = times[:, 1 : settled + 1], of("drift")[:, -1, 1 : settled + 1]
    for (elapsed, drift), control in ((after, None), (before, early)):
        found.append(verify.rate(_claim(series, *words, control), elapsed, drift, 1.0, margin=config.time_margin))
    return found
