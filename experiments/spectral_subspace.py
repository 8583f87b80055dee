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

With h / |h| in place of h ("unit") the same holds for the C of those rows. The loss is then not the cosine of f, which
is no quadratic form in W: trained with that one, and V fixed, W ends elsewhere, and its distance is shown.

After the first measurement. Both bounds are those of U(t), and W that had not settled lay outside: at gaps near 0.01 of
the Gaussian series, and (residual bound) for ReLU at width 64. So the Davis-Kahan bound is checked from the time on at
which W must have settled, and the residual bound where W has come to U(t). At depths 4 and 5 the former is vacuous by
then, but for a few points.

Controls. (1) Without orthogonality: the loss then has no minimum, so the norm is held, Tr W^T W = z. All columns of W
turn to one eigenvector, and the distance ||W W^T - U_0 U_0^T||_F / sqrt 2, which is ||sin Theta||_F for orthonormal W,
stays large. (2) Narrow networks lose the subspace, at a time proportional to M: no one width is the limit at all times.
(3) A gap closed on purpose: quarter turns of a plane map the Gaussian data and the features onto themselves.
(4) For the laws of the drift: V learns faster in proportion to M; and the time before W has settled. (5) For the
Davis-Kahan bound: W as at the start, since without orthogonality the drift makes it vacuous in deeper networks.

Data: triplets of three classes of digits (the negative is of another class), z = 2; Gaussian vectors with three strong
directions, seen twice through noise.
"""

import dataclasses
import math
from functools import partial

import jax
import numpy as np
import threadpoolctl
from tqdm import tqdm

from experiments import _setting, _subspace
from experiments._side_by_side import side_by_side
from experiments._subspace import Series
from theorykit import data, results, verify

PCA = "Anil, Esser, Ghoshdastidar (arXiv 2403.08673)"
DAVIS_KAHAN = "Davis, Kahan 1970; in the form of Yu, Wang, Samworth 2015 (arXiv 1405.0680), theorem 2"
RESIDUAL = "Davis, Kahan 1970 (doi:10.1137/0707001), the sin Theta theorem with a residual"
COSINE = ("cosine", "with the cosine of f itself")
DRIFT = "derivation; arXiv 2403.08673 states the upper bound O(t / sqrt M)"


@dataclasses.dataclass(frozen=True)
class Config:
    """The laws of the drift are checked on the first series, the gap at the largest width of the Gaussian one."""

    series: tuple[Series, ...] = (
        Series("digits", "tanh-2", (128, 256, 512, 1024, 2048, 4096), 64, 12.5),
        Series("digits", "relu-2", (128, 512, 4096), 64, 12.5),
        Series("digits", "tanh-2", (128, 512, 4096), 64, 5.0, unit=True),
        Series("gaussian", "tanh-2", (128, 512, 4096), 64, 4.7),
        Series("digits", "tanh-3", (128, 384, 1024), 25, 24.0),
        Series("digits", "tanh-4", (128, 1024), 24, 28.0),
        Series("digits", "tanh-5", (128, 1024), 20, 40.0),
        Series("digits", "tanh-flat-2", (8, 32, 128), 24, 21.0),
    )
    shrinks: tuple[float, ...] = (0.7, 0.8, 0.9, 0.95, 1.0)  # of direction 2, elsewhere 0.5; 1 closes the gap
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
    near: float = results.threshold(0.01, "W on U(t) to a hundredth; since a first run also of the measured distance")
    width_margin: float = results.threshold(0.2, "tells the exponent -1 from the -1/2 of the known upper bound")
    time_margin: float = results.threshold(0.1, "curvature of second order in t / M, at t = M / 5")


_TANH, _GAUSSIAN = ("digits", "tanh-2"), ("gaussian", "tanh-2")
PRESETS = {
    # One width of all programs, so that they are compiled once; that is also why N7 has V fixed only.
    "smoke": Config(
        series=(
            Series(*_TANH, (128, 512, 1024, 2048), 48, 15.0),
            Series(*_GAUSSIAN, (2048,), 48, 4.0),
            Series("digits", "tanh-3", (128,), 0, 15.0),
        ),
        shrinks=(1.0,),
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
            Series(*_TANH, (128, 256, 1024, 4096, 16384), 160, 4.0, unit=True),
            Series(*_GAUSSIAN, (128, 256, 1024, 4096, 16384), 160, 4.0),
            Series("digits", "tanh-3", (128, 384, 1024, 2048), 54, 15.0),
            Series("digits", "tanh-4", (128, 1024, 2048), 40, 16.8),
            Series("digits", "tanh-5", (128, 1024, 2048), 40, 20.0),
            Series("digits", "tanh-flat-2", (8, 32, 128, 512), 54, 15.0),
            Series("digits", "tanh-flat-3", (8, 32, 256), 40, 15.0),
        ),
        seeds=12,
    ),
}


def run(config: Config) -> dict[str, np.ndarray]:
    """<series>/<measure>, (seeds, widths) at the end of training or (seeds, widths, times) along it.

    Also <series>/norm/... (control without orthogonality, widest only), <first series>/fast/... (control of the laws),
    <unit series>/cosine/... and <gaussian>/turned/... with shrinks in place of widths. null (draws,), picture/...
    """
    arrays, cells = {}, []

    def sweep(series, kind, settings, measure=_cell):
        cells.append((f"{series.name}{kind}", partial(_sweep, config, series, measure, settings)))

    for series in config.series:
        widest = {"width": series.widths[-1]}
        sweep(series, "", [{"width": width} for width in series.widths])
        sweep(series, "/norm", [widest | {"constrained": False}])
        if series.unit:
            sweep(series, "/cosine", [widest], _subspace.with_cosine)
        if series.data == "gaussian":
            sweep(series, "/turned", [widest | {"shrink": shrink} for shrink in config.shrinks])
    first = config.series[0]
    sweep(first, "/fast", [{"width": m, "faster": m / first.widths[0]} for m in linear_widths(config)])
    cells += [("picture", partial(_pictures, config)), ("null", partial(_subspace.null, config))]
    with tqdm(desc="spectral_subspace", total=len(cells), disable=None) as bar:

        def work(name, measure):
            found = results.part(name.replace("/", "-"), measure)
            bar.update()
            named = found.items() if isinstance(found, dict) else ()
            return {f"{name}/{key}": value for key, value in named} or {name: found}

        with threadpoolctl.threadpool_limits(1):  # small eigenproblems, on which threads get into each other's way
            for found in side_by_side(work, cells):
                arrays |= found
    return arrays


def linear_widths(config: Config) -> list[int]:
    """Widths of the first series at which the laws of the drift are checked."""
    series = config.series[0]
    return [width for width in series.widths if width >= config.linear * series.steps * series.learning_rate]


def _sweep(config, series, measure, settings):
    found = [measure(config, series, seed, **setting) for seed in range(config.seeds) for setting in settings]
    table = {name: np.array([cell[name] for cell in found]) for name in found[0]}
    return {name: values.reshape(config.seeds, len(settings), *values.shape[1:]) for name, values in table.items()}


def _cell(config, series, seed, width, shrink=0.5, faster=1.0, constrained=True):
    """All measures of one network."""
    network = _subspace.network(series, seed, width, config.features, config.triplets, shrink)
    if not series.steps:
        return {"fixed": _subspace.fixed_alone(config, series, network, constrained)}
    run, w, rows = _subspace.train(config, series, network, faster, constrained)
    z = config.features
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
        "limit": 2 * drift / max(gap, np.finfo(float).tiny),
        "sharp": left / (now[z] - inside) if now[z] > inside else np.inf,
        "loss": float(run.loss),
        "trace": np.trace(w[-1].T @ _subspace.apply(rows[-1], w[-1])),
        "trace_at_start": np.trace(w[-1].T @ _subspace.apply(rows[0], w[-1])),
    }
    if constrained:
        found["grassmann"] = _subspace.grassmann(w, u)
    found = {name: np.where(_subspace.ended(run), value, np.nan) for name, value in found.items()}
    if faster == 1:  # with V fixed its rate is without effect
        found["fixed"] = _subspace.fixed(config, series, rows[0], w[0], u, constrained)
    return found | {"gap": gap, "times": np.asarray(run.metric_times, np.float64)}


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
        network = _subspace.network(series, 0, width, z, config.triplets)
        run, w, rows = _subspace.train(config, series, network, constrained=constrained)
        u = _subspace.spectrum(rows[0])[1][:, :z]
        left, _, right = np.linalg.svd(w[-1].T @ u)
        for kind, matrix, hidden in (
            ("predicted", u, network.layers),
            ("learned", w[-1] @ left @ right, jax.tree.map(np.add, network.layers, run.params)),
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
    statement = f"{statement}, {series.encoder}{' with h / |h|' if series.unit else ''} on {series.data}"
    if control is None:
        return verify.Claim(name, statement, source)
    return verify.Claim(f"{name}.{control[0]}", f"{statement}: {control[1]}", source, "control", name)


def _distances(config, arrays, series):
    def of(measure, kind=""):
        return arrays[f"{series.name}{kind}/{measure}"]

    norm, closed = ("norm", "norm in place of orthogonality"), ("closed", "with the gap closed on purpose")
    widest, found = series.widths[-1], []

    def far(claim, distance, factor):  # in every seed
        found.append(verify.separation(claim, factor * np.max(distance), null=arrays["null"], direction="less"))

    factor = config.fixed_factor
    words = ("fixed", f"V fixed: chance is {factor:g} times further from U_0, in every seed, at every width", PCA)
    far(_claim(series, *words), of("fixed")[..., -1], factor)
    far(_claim(series, *words, norm), of("fixed", "/norm")[:, -1, -1], factor)
    if series.data == "gaussian":
        far(_claim(series, *words, closed), of("fixed", "/turned")[:, -1, -1], factor)
    if series.unit:
        far(_claim(series, *words, COSINE), of("fixed", "/cosine")[:, -1, -1], factor)
    if not series.steps:
        return found

    factor = config.factor
    words = ("null", f"V trained: chance is {factor:g} times further from U_0, in every seed, at width {widest}", PCA)
    far(_claim(series, *words), of("distance")[:, -1, -1], factor)
    far(_claim(series, *words, norm), of("distance", "/norm")[:, -1, -1], factor)
    if len(series.widths) > 1:
        narrow = ("narrow", f"at width {series.widths[0]}")
        far(_claim(series, *words, narrow), of("distance")[:, 0, -1], factor)
    if series.data == "gaussian":
        far(_claim(series, *words, closed), of("distance", "/turned")[:, -1, -1], factor)
    if series.unit:
        found += _quadratic(series, of, "trace", "/cosine", COSINE)
    return found + _davis_kahan(config, series, of, norm) + _residual(config, series, of, norm)


def _davis_kahan(config, series, of, norm):
    """The bound at every snapshot of every width, from when W has settled, unless it is vacuous."""

    def points(kinds):
        """Distances, bounds, which of them decide, and which W has settled: (seeds, widths, times)."""
        measures = ("distance", "limit", "times", "gap")
        value, bound, time, gap = (np.concatenate([of(m, kind) for kind in kinds], axis=1) for m in measures)
        # W starts at a tangent of about sqrt M from U(t), which shrinks as exp(-2 gap t).
        rows = series.widths[-1] * series.pixels
        settled = 2 * gap[:, :, None] * time >= math.log(math.sqrt(rows) / config.near)
        # Not-a-number, from a failed run, stays and decides nothing.
        return value, bound, settled & ~(bound >= math.sqrt(config.features)), settled

    value, bound, kept, settled = points(["", "/turned"] if series.data == "gaussian" else [""])
    if not kept.any():  # vacuous throughout, as in deep narrow networks: there is nothing to decide
        return []
    judged, after = (np.sum(which[:, : len(series.widths)], axis=(0, 2)) for which in (kept, settled))
    gaps = np.median(of("gap"), axis=0)
    shares = ", ".join(f"{few} of {all_}" for few, all_ in zip(judged, after, strict=True))
    statement = (
        f"V trained: W is within the Davis-Kahan bound of U_0 at all times once settled, at widths "
        f"{_subspace.listed(series.widths)} ({shares} points, at the others it is vacuous; median eigengaps "
        f"{_subspace.listed(gaps, '.2g')})"
    )
    words = ("limit", statement, DAVIS_KAHAN)
    about = {
        "widths": list(series.widths),
        "settled": after.tolist(),
        "judged": judged.tolist(),
        "eigengaps": gaps.tolist(),
    }
    claim = verify.bound(_claim(series, *words), value[kept], bound[kept])
    found = [claim._replace(details=claim.details | about)]
    start = np.broadcast_to(value[:, :, :1], value.shape)[kept]
    found.append(verify.bound(_claim(series, *words, ("start", "W as at the start")), start, bound[kept]))
    if series.shallow:  # for the others the bound of this control is vacuous
        value, bound, kept, _ = points(["/norm"])
        found.append(verify.bound(_claim(series, *words, norm), value[kept], bound[kept]))
    return found


def _residual(config, series, of, norm):
    """The sharper bound at the end, at every width, where W has come to U(t)."""
    near = ~(of("current") > config.near)  # not-a-number decides nothing
    near[:, -1] = True
    statement = (
        f"V trained: W is within the residual bound of U_0, at width {series.widths[-1]} and where W is near U(t), in "
        f"{_subspace.listed(np.sum(near, axis=0))} of {config.seeds} seeds at widths {_subspace.listed(series.widths)}"
    )
    words = ("sharp", statement, RESIDUAL)
    return [
        verify.bound(_claim(series, *words), of("distance")[..., -1][near], of("sharp")[near]),
        verify.bound(_claim(series, *words, norm), of("distance", "/norm")[:, -1, -1], of("sharp", "/norm")[:, -1]),
    ]


def _quadratic(series, of, broken, kind, control):
    """The loss as a quadratic form, and the same with an assumption broken."""
    found = []
    for trace, where, why in (("trace", "", None), (broken, kind, control)):
        claim = _claim(series, "quadratic", "the triplet loss is Tr(W^T C W)", "derivation", why)
        loss, trace = (np.float32(of(measure, where)[:, -1]) for measure in ("loss", trace))
        found.append(verify.identity(claim, loss, trace))
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

    found += _quadratic(series, of, "trace_at_start", "", ("start", "with C at the start of training"))

    widths, settled = linear_widths(config), config.snapshots.index(config.settled)
    end, columns = series.steps * series.learning_rate, [series.widths.index(width) for width in widths]
    words = ("width", f"the drift of C once W has settled, until t = {end:g}, is in proportion to 1 / M", DRIFT)
    fast = ("fast", "V learns faster in proportion to M")
    for kind, chosen, control in (("", columns, None), ("/fast", slice(None), fast)):
        # Shortened steps do not reach the time of the statement. In the control they belong to the broken assumption.
        reached = np.isclose(of("times", kind)[:, chosen, -1], end) | bool(kind)
        since = np.where(reached, of("since", kind)[:, chosen, -1], np.nan)
        found.append(verify.rate(_claim(series, *words, control), widths, since, -1.0, margin=config.width_margin))

    statement = f"the drift of C once W has settled is in proportion to the time since, at width {widths[-1]}"
    times, early = of("times")[:, -1], ("early", "before W has settled, since the start")
    after = times[:, settled + 1 :] - times[:, settled : settled + 1], of("since")[:, -1]
    before = times[:, 1 : settled + 1], of("drift")[:, -1, 1 : settled + 1]
    for (elapsed, drift), control in ((after, None), (before, early)):
        found.append(
            verify.rate(
                _claim(series, "time", statement, DRIFT, control), elapsed, drift, 1.0, margin=config.time_margin
            )
        )
    return found
