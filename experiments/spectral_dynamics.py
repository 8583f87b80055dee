r"""S5 and S2: linear encoders learn one mode at a time, and lose those along which augmentation outweighs the data.

S5, stepwise learning (`theorykit.spectral.stepwise`). Gradient descent on ||C - I||_F^2 from a small random start
learns mode j, which is the j-th largest eigenvalue of C, at tau_j = -ln(s_j(0)^2 g_j) / (8 g_j), and ends at
W^T W = V diag(1/g) V^T. Three kinds of data, all scaled to g_1 = 1: synthetic pairs with a prescribed spectrum, also
negative; augmented digits, centred; and random ReLU features of these, where the prediction is made in kernel form:
from the kernel of the views and their initial embeddings alone, and the end is compared on held-out images. Controls:
a start of size 0.1, and eigenvalues 1% apart. The closed form of the curves is exact from an aligned start, and checked
there against the flow, solved adaptively. Descent with steps of length eta lags behind the flow by the fraction
2 eta g of the time, 0.5% of the fastest mode: this is what is left of the differences.

What is left out by the theory is of relative order s^(1 - ratio), with the ratio of neighbouring eigenvalues. So the
draw of digits is the one of several whose eigenvalues are most separated, and the start is very small, which float64
allows. The loss is Barlow Twins without centring and normalisation: the two agree on embeddings that are normalised
already (`stepwise.moment_loss`). With normalisation the scale of W plays no role, and has no steps to predict.

S2, dimensional collapse (`theorykit.spectral.collapse`). Gradient flow on InfoNCE is dW/dt = W X exactly. With X frozen
W(t) = W_0 e^{X t}; two layers conserve W_1 W_1^T - W_2^T W_2, and s_1^2 - s_2^2 of every mode if they are aligned. Each
is checked against a flow that does not use the closed form; each control breaks one assumption: the weights of the
softmax, a frozen X, no weight decay, alignment. The last claim is about training, where X moves: two directions of the
data get an augmentation that makes X negative there at the start, and W loses two singular values. Its control has a
weaker augmentation, with no negative eigenvalue. Few samples make this slow: the softmax saturates, alpha_ii -> 1, and
X shrinks as a whole. With 24 samples one run in twelve still had such a direction at time 60; it was lost by time 300.

Source: Simon et al. 2023 (arXiv 2303.15438); Jing et al. 2022 (arXiv 2110.09348).
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from experiments import _collapse, _modes, _setting
from theorykit import data, results, training, verify
from theorykit.spectral import stepwise

STEPWISE = "Simon et al. 2023 (arXiv 2303.15438)"
KERNEL = f"{STEPWISE}; inverse-free kernel form: derivation"
COLLAPSE = "Jing et al. 2022 (arXiv 2110.09348)"
SETS = ("synthetic", "digits", "kernel")
SNAPSHOTS = 160
AFTER = 1.3  # training ends at this multiple of the last predicted time


@dataclasses.dataclass(frozen=True)
class Config:
    """Eigenvalues are those of G with g_1 = 1; sizes are standard deviations of the entries of W_0."""

    seeds: int = 8
    spectrum: tuple[float, ...] = (1.0, 1 / 2, 1 / 4, 1 / 8, -0.1, -0.2, -0.3, -0.4)
    unseparated: tuple[float, ...] = (1.0, 0.99, 0.98, 0.97, 0.96, 0.95, -0.1, -0.2)
    synthetic_outputs: int = 6  # two more than there are modes to learn
    synthetic_start: float = 1e-4
    draws: int = 8
    pairs: int = 128
    heldout: int = 64
    outputs: int = 3
    start: float = 1e-16  # the eigenvalues of digits are closer to each other
    large: float = 0.1
    learning_rate: float = 0.0025  # 2 eta g_1 = 0.5%, a quarter of the margin of the times; 1% at the smoke preset
    flow_samples: int = 32
    samples: int = 64
    inputs: int = 6
    weak: float = 0.3  # standard deviation of the augmentation; that of the data is 1
    strong: float = 2.5  # along two axes: X is about 2 - 2.5^2 < 0 there at the start
    mild: float = 0.7  # the control: 2 - 0.7^2 > 0
    decay: float = 0.1
    flow_time: float = 0.4
    collapse_start: float = 0.3
    collapse_time: float = 30.0
    collapse_rate: float = 0.05
    times_margin: float = results.threshold(0.02, "the accuracy asked for where eigenvalues are separated")
    final_margin: float = results.threshold(0.02, "as for the times; the modes of a Gram matrix, relative to its norm")
    identity: float = results.threshold(1e-9, "three digits above the tolerance of the adaptive flow")
    vanished: float = results.threshold(0.05, "a singular value that has lost 95% of its share has vanished")


PRESETS = {
    "smoke": Config(draws=4, pairs=96, heldout=32, learning_rate=0.005, flow_samples=16),
    "quick": Config(),
    "full": Config(seeds=16, draws=32, pairs=512, heldout=256, outputs=4, learning_rate=0.001, samples=256),
}


def run(config: Config) -> dict[str, np.ndarray]:
    """<what>/<series>, seeds first; `_learn`, `_form` and the functions of `_collapse` say which."""
    with jax.enable_x64(True):
        arrays = {}
        for name in SETS:
            arrays |= results.part(name, partial(_stepwise, config, name))
        arrays |= results.part("unseparated", partial(_stepwise, config, "unseparated"))
        arrays |= results.part("form", partial(_form, config))
        arrays |= results.part("flows", partial(_collapse.flows, config))
        return arrays | results.part("collapse", partial(_collapse.trained, config))


def _stepwise(config, name):
    """Train from a small start, and from a large one as the control."""
    pairs = _pairs(config, name)
    if name == "unseparated":
        return _learn(config, name, pairs, config.synthetic_start, name)
    small = config.synthetic_start if name == "synthetic" else config.start
    found = _learn(config, name, pairs, small, name) | _learn(config, name, pairs, config.large, f"{name}.large")
    return found | _modes.kernel_form(config, pairs) if name == "kernel" else found


def _pairs(config, name):
    """Two views (n, m) with g_1 = 1, and held-out inputs (q, m)."""
    if name == "synthetic":
        return _prescribed(config.spectrum)
    if name == "unseparated":
        return _prescribed(config.unseparated)
    # The statement is about separated eigenvalues: of several draws, the one whose eigenvalues are most so.
    draws = [_digits(config, name, draw) for draw in range(config.draws)]
    spectra = [np.linalg.eigvalsh(a.T @ b + b.T @ a)[::-1][: config.outputs + 1] for a, b, _ in draws]
    return draws[int(np.argmin([np.max(g[1:] / g[:-1]) for g in spectra]))]


def _digits(config, name, draw):
    """Views of digits, or ReLU features of them, centred; as many features as pixels, to share a compiled program."""
    views = data.digit_views(jax.random.key(draw), config.pairs + config.heldout)
    a, b = np.asarray(views.a, np.float64), np.asarray(views.b, np.float64)
    if name == "kernel":
        weights = np.random.default_rng(draw).standard_normal((a.shape[1], a.shape[1])) / np.sqrt(a.shape[1])
        a, b = np.maximum(a @ weights, 0), np.maximum(b @ weights, 0)
    a, b, heldout = a[: config.pairs], b[: config.pairs], a[config.pairs :]
    mean = (a.mean(axis=0) + b.mean(axis=0)) / 2
    a, b, heldout = a - mean, b - mean, heldout - mean
    scale = np.sqrt(np.linalg.eigvalsh(a.T @ b + b.T @ a)[-1] / (2 * len(a)))
    return a / scale, b / scale, heldout / scale


def _prescribed(eigenvalues):
    """Pairs with exactly these eigenvalues: a = z + e, b = z - e, whose parts z and e are uncorrelated."""
    g, m = np.array(eigenvalues), len(eigenvalues)
    rng = np.random.default_rng(11)
    parts = np.linalg.qr(rng.standard_normal((4 * m, 2 * m)))[0] * np.sqrt(4 * m)
    rotation = np.linalg.qr(rng.standard_normal((m, m)))[0]
    opposed = -min(g.min(), 0)  # G = cov z - cov e
    z = parts[:, :m] * np.sqrt(g + opposed) @ rotation.T
    e = parts[:, m:] * np.sqrt(opposed) @ rotation.T
    return z + e, z - e, z


def _loss_of_all_starts(w, views):
    """Sum over the starts of their losses, so that one descent trains them all: w (seeds, d, m)."""
    za, zb = ((x @ w.reshape(-1, w.shape[-1]).T).reshape(-1, *w.shape[:2]) for x in views)
    return jnp.sum(jax.vmap(stepwise.moment_loss, in_axes=1)(za, zb))


def _learn(config, name, pairs, size, label):
    """Train; learning times (seeds, k), curves (seeds, t, k), their predictions, and the final error (seeds,)."""
    a, b, heldout = pairs
    outputs = config.outputs if name in SETS[1:] else config.synthetic_outputs
    w0 = size * _modes.starts(config, outputs, pairs)
    g, initial, gram = _predict(name, pairs, w0)
    tau = -np.log(initial**2 * g) / (8 * g)
    steps = int(np.ceil(AFTER * tau.max() / config.learning_rate))
    run = training.train(
        _loss_of_all_starts,
        w0,
        (a, b),
        optimizer=_setting.descent(config.learning_rate),
        steps=steps,
        metrics=_collapse.itself,
        metric_steps=np.unique(np.linspace(0, steps, SNAPSHOTS + 1).astype(int)).tolist(),
        progress=False,
    )
    w, times = np.asarray(run.metrics), config.learning_rate * np.asarray(run.metric_steps)
    moment = (a.T @ b + b.T @ a) / (2 * len(a))
    curves = np.linalg.eigvalsh(w @ moment @ w.swapaxes(2, 3))[..., ::-1].swapaxes(0, 1)[..., : len(g)]
    f = heldout @ w[-1].swapaxes(1, 2) if name == "kernel" else w[-1].swapaxes(1, 2)
    trained = f @ f.swapaxes(1, 2)
    predicted = partial(stepwise.sizes, jnp.asarray(times), jnp.asarray(g))
    found = {
        "times": times,
        "eigenvalues": g,
        "predicted_tau": tau,
        "tau": np.array([[_crossing(times, mode) for mode in curve.T] for curve in curves]),
        "curves": curves,
        "predicted_curves": np.stack([g * predicted(jnp.asarray(s)) ** 2 for s in initial]),
        "final": np.linalg.norm(trained - gram, axis=(1, 2)) / np.linalg.norm(gram),
    }
    if label in SETS:
        found |= {"null": _modes.null(gram, len(g)), "shuffled": _modes.shuffled(trained, gram)}
    return {f"{what}/{label}": values for what, values in found.items()}


def _predict(name, pairs, w0):
    """Eigenvalues (k,), initial sizes (seeds, k), final Gram matrix: of the weights, or of held-out embeddings."""
    a, b, heldout = pairs
    if name == "kernel":
        views = np.concatenate([a, b])
        found = stepwise.kernel_modes(jnp.asarray(views @ views.T), w0.shape[1])
        initial = [stepwise.kernel_initial_sizes(views @ w.T, found.coefficients) for w in w0]
        f = stepwise.kernel_embedding(jnp.asarray(heldout @ views.T), found.coefficients, found.eigenvalues**-0.5)
        gram = f @ f.T
    else:
        moment = stepwise.cross_moment(jnp.asarray(a), jnp.asarray(b))
        positive = int(np.sum(np.linalg.eigvalsh(moment) > 0))
        found = stepwise.modes(moment, min(w0.shape[1], positive))
        initial = [stepwise.initial_sizes(w, found.directions) for w in w0]
        gram = stepwise.weight_gram(found.directions, found.eigenvalues**-0.5)
    return np.asarray(found.eigenvalues), np.stack(initial), np.asarray(gram)


def _crossing(times, learned):
    """Time at which a mode passes 1/2. Its logit is linear in time by the theory, and is interpolated linearly."""
    above = np.flatnonzero(learned >= 0.5)
    if not above.size or above[0] == 0:
        return np.nan
    around = slice(above[0] - 1, above[0] + 1)
    return np.interp(0.0, np.log(learned[around] / (1 - learned[around])), times[around])


def _form(config):
    """Eigenvalues of C (seeds, t, k) along the adaptive flow from an aligned and another start, and in closed form."""
    a, b, _ = _prescribed(config.spectrum)
    k, m = sum(g > 0 for g in config.spectrum), len(config.spectrum)
    other = config.large * np.random.default_rng(21).standard_normal((config.seeds, k, m))
    times = np.linspace(0.0, 20.0, 21)
    aligned, moment, predicted = _form_problem(a, b, other, times)
    starts = jnp.concatenate([aligned, other])
    w = np.asarray(_collapse.adaptive_flow(_velocity, starts, jnp.stack([moment] * 2 * config.seeds), times))
    aligned, other = np.split(np.linalg.eigvalsh(w @ np.asarray(moment) @ w.swapaxes(2, 3)), 2)
    return {"form/aligned": aligned, "form/other": other, "form/predicted": predicted}


@jax.jit
def _form_problem(a, b, other, times):
    """An aligned start of the same sizes as `other`, the cross-moment, and what the aligned modes do."""
    moment, k = stepwise.cross_moment(a, b), other.shape[1]
    found = stepwise.modes(moment, k)
    initial = jax.vmap(stepwise.initial_sizes, (0, None))(other, found.directions)
    aligned = jnp.linalg.qr(other[:, :, :k])[0] * initial[:, None, :] @ found.directions.T
    s = jax.vmap(stepwise.sizes, (None, None, 0))(times, found.eigenvalues, initial)
    return aligned, moment, jnp.sort(found.eigenvalues * s**2, axis=-1)


def _velocity(w, moment):
    """Minus the gradient of the loss, without the closed form."""
    residual = lambda w: w @ moment @ w.T - jnp.eye(len(w))  # noqa: E731
    return -jax.grad(lambda w: jnp.sum(residual(w) ** 2))(w)


def verdicts(config: Config, arrays: dict[str, np.ndarray]) -> list[verify.Verdict]:
    """S5: form, times, curves, end; S2: drift, frozen flow, conservation, modes, collapse; each with its control."""
    found = _identity(
        config,
        *("S5.form", "from an aligned start the modes follow their closed form", STEPWISE),
        (arrays["form/aligned"], arrays["form/predicted"]),
        ("the same sizes, not aligned", arrays["form/other"], arrays["form/predicted"]),
    )
    found += _identity(
        config,
        *("S5.kernel", "eigenvalues, sizes at the start and the end in kernel form are those of features", KERNEL),
        (arrays["kernel form/kernel"], arrays["kernel form/features"]),
        ("P swaps views of different samples", arrays["kernel form/other"], arrays["kernel form/features"]),
    )
    for name in SETS:
        controls = {f"{name}.large": f"a start of size {config.large:g}"}
        close = {"unseparated": "eigenvalues 1% apart"}
        found += _within(config, arrays, name, "times", controls | close if name == "synthetic" else controls)
        found += _within(config, arrays, name, "curves", close if name == "synthetic" else controls)
        found += _within(config, arrays, name, "final", controls)
        found += _chance(arrays, name)
    found += _identity(
        config,
        *("S2.drift", "gradient flow is dW/dt = W X", COLLAPSE),
        (arrays["gradient/softmax"], arrays["gradient/loss"]),
        ("uniform weights in place of the softmax", arrays["gradient/uniform"], arrays["gradient/loss"]),
    )
    found += _identity(
        config,
        *("S2.frozen", "with X frozen, W(t) = W_0 exp(X t)", COLLAPSE),
        (arrays["weights/frozen"], arrays["weights/predicted"]),
        ("X moves with W", arrays["weights/moving"], arrays["weights/predicted"]),
    )
    found += _identity(
        config,
        *("S2.conserved", "two layers conserve W_1 W_1^T - W_2^T W_2 while X moves", COLLAPSE),
        _along(arrays["conserved/flow"]),
        ("weight decay", *_along(arrays["conserved/decay"])),
    )
    found += _identity(
        config,
        *(
            "S2.modes",
            "two aligned layers: each mode in closed form, s_1^2 - s_2^2 conserved",
            f"{COLLAPSE}; derivation",
        ),
        (arrays["modes/aligned"], arrays["modes/predicted"]),
        ("layers that are not aligned", arrays["modes/other"], arrays["modes/predicted"]),
    )
    return found + _vanishing(config, arrays)


def _along(kept):
    """Values at all times, and the first one at all times."""
    return kept, np.broadcast_to(kept[:, :1], kept.shape)


def _identity(config, name, statement, source, sides, control):
    why, *broken = control
    claim = verify.Claim(name, statement, source)
    other = verify.Claim(f"{name}.control", f"{statement}: {why}", source, "control", name)
    return [verify.identity(claim, *sides, rtol=config.identity), verify.identity(other, *broken, rtol=config.identity)]


def _within(config, arrays, name, what, controls):
    """The largest error over modes and starts: the theory is about each of them, so no average hides one."""
    margin = config.final_margin if what == "final" else config.times_margin
    source = KERNEL if name == "kernel" else STEPWISE
    statement = {
        "times": "modes are learned at the predicted times",
        "curves": "the eigenvalues of C follow the predicted curves, error as a share of tau",
        "final": "the Gram matrix at the end of training is the predicted one",
    }[what]

    def check(claim, label):
        if what == "times":
            errors = arrays[f"tau/{label}"] / arrays[f"predicted_tau/{label}"] - 1
        elif what == "curves":
            # A curve is steepest at 1/2, with slope 2 g: in these units a shift by x tau changes it by up to x.
            steepest = 2 * arrays[f"eigenvalues/{label}"] * arrays[f"predicted_tau/{label}"]
            errors = (arrays[f"curves/{label}"] - arrays[f"predicted_curves/{label}"]) / steepest[:, None]
        else:
            errors = arrays[f"final/{label}"]
        largest = np.max(np.abs(errors))
        return verify.agreement(claim, largest, 0.0, margin=margin, side="at_most", deterministic=True)

    claim = verify.Claim(f"S5.{what}.{name}", f"{statement}, {name}: largest error of {config.seeds} starts", source)
    found = [check(claim, name)]
    for label, why in controls.items():
        kind = label.split(".")[-1]
        control = verify.Claim(f"{claim.name}.{kind}", f"{claim.statement}: {why}", source, "control", claim.name)
        found.append(check(control, label))
    return found


def _chance(arrays, name):
    """Beside the prediction, chance: the same eigenvalues along random modes."""
    statement = (
        f"the Gram matrix at the end is nearer to the predicted one than 99.9% of those along random modes, {name}"
    )
    claim = verify.Claim(f"S5.null.{name}", statement, KERNEL if name == "kernel" else STEPWISE)
    why = "its rows and columns shuffled"
    control = verify.Claim(f"{claim.name}.control", f"{statement}: {why}", claim.source, "control", claim.name)
    return [
        verify.separation(c, arrays[f"{what}/{name}"], null=arrays[f"null/{name}"], direction="less")
        for c, what in ((claim, "final"), (control, "shuffled"))
    ]


def _vanishing(config, arrays):
    def check(claim, label):
        singular = arrays[f"collapse/singular/{label}"][:, -1]
        lost, kept = singular[:, -_collapse.VANISHING], singular[:, -_collapse.VANISHING - 1]
        return verify.agreement(claim, lost / kept, 0.0, margin=config.vanished, side="at_most")

    statement = (
        f"{_collapse.VANISHING} negative eigenvalues of X at the start: as many singular values of W vanish in training"
    )
    claim = verify.Claim("S2.collapse", statement, COLLAPSE)
    why = "a weaker augmentation, no negative eigenvalue"
    control = verify.Claim("S2.collapse.control", f"{statement}: {why}", COLLAPSE, "control", claim.name)
    return [check(claim, "strong"), check(control, "mild")]
