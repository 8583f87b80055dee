r"""The infinite-width kernel as a predictor: which loss, activation and width does the function-space flow describe?

    d f / dt = -Theta grad_f L(f),      f(0) = embeddings of the network at initialisation

with the kernel Theta of the infinitely wide encoder: nothing is measured on the network but its start, and nothing is
fitted. Compared are the Gram matrices G = F F^T after training, of the training points and of held-out points:

    error(M) = ||G_net - G_flow|| / min(||G_net - G_start||, ||G_net||),       1 - CKA(G_net, G_flow)

with Frobenius norms, in units of the better of two trivial predictions: the Gram matrix before training, and zero. So 0
is perfect and 1 is useless; "predicted" means below a quarter.

Prediction [derivation]. The network's kernel is Theta + D with D of order M^{-1/2} at initialisation (N1); in training
it changes by order 1/M, or M^{-1/2} at most (N2, N4). The flow is a smooth function of its kernel, so error ~ M^{-1/2};
CKA is the cosine of an angle, so 1 - CKA is quadratic in it, ~ M^{-1}.

Controls. "output layer": the kernel of that layer alone, as if the hidden one did not learn; the error does not fall.
"another start": a draw of the Gaussian process that is the law of f(0) in the limit, hence another infinitely wide
network; the Gram matrix depends on the start, and this does not predict it. "linear dot": that loss, at the time when
the kernel has moved (N3), |f| = growth x sqrt(M) in the flow. The kernel of the other nonlinearity is shown too, and is
no control: it is about as good as the right one until M^{-1/2} has fallen below the distance of the two kernels. From
the *mean* of the process, f(0) = 0, nothing is predicted: it is a stationary point of every loss here.

Networks of all losses, activations and widths are trained in one run, each with its own step size. f(t) is extrapolated
from two descents, 2 f_{eta/2} - f_eta, as in `ntk_linearisation`. The same extrapolation of descent in function space
at the fixed kernel, against the flow, is the floor of the error. The flows of all losses are solved as one, side by
side as outputs of one function; that of the linear loss in closed form.

Source: Jacot et al. 2018 (arXiv 1806.07572), Lee et al. 2019 (arXiv 1902.06720) for the flow; rates: derivation.
"""

import dataclasses
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from experiments import _setting
from theorykit import results, training, verify
from theorykit.ntk import gradient_flow, infinite
from theorykit.spectral import compare

SOURCE = "Jacot et al. 2018 (arXiv 1806.07572); Lee et al. 2019 (arXiv 1902.06720); rate: derivation from N1, N2, N4"
LOSSES = {f"cosine {name}": loss for name, loss in _setting.COSINE_LOSSES.items()}
LOSSES |= {f"dot {name}": loss for name, loss in _setting.DOT_LOSSES.items()}
# Time of training: the flow then has changed the Gram matrix by a fifth to several times its size, and steps are still
# well within stability. Under VICReg it is before deviations reach 1: from there on they slide along the hinge's kink,
# where gradient descent rattles and the flow's steps shrink to nothing.
TIMES = dict.fromkeys(("cosine InfoNCE", "cosine NT-Xent", "cosine CLIP"), 10.0)
TIMES |= dict.fromkeys(("cosine linear", "dot InfoNCE", "dot NT-Xent", "dot CLIP"), 4.0)
TIMES |= {"cosine logistic": 6.0, "dot logistic": 3.0, "dot Barlow Twins": 1.0, "dot VICReg": 0.3, "dot spectral": 0.2}
OTHER = {"relu": "tanh", "tanh": "relu"}
PARTS = ("training", "held-out")
AT_ONCE = 8  # seeds trained in one program, which bounds its memory


@dataclasses.dataclass(frozen=True)
class Config:
    """Digits as pairs of augmented views; the last `heldout` of a seed's pairs are not trained on."""

    losses: tuple[str, ...] = tuple(LOSSES)
    activations: tuple[str, ...] = ("relu", "tanh")
    widths: tuple[int, ...] = (128, 512, 2048)
    seeds: int = 32
    pairs: int = 8
    heldout: int = 4
    features: int = 8
    steps: int = 12  # of the longer steps; twice as many of the shorter ones
    growth: float = 0.3
    slope_margin: float = results.threshold(0.25, "half-way from M^(-1/2) to no fall and to the next order, 1/M")
    cka_margin: float = results.threshold(0.5, "twice that of the error: 1 - CKA is its square")
    predicted: float = results.threshold(0.25, "an error of a quarter leaves out a sixteenth of the squared change")


PRESETS = {
    "smoke": Config(losses=("cosine InfoNCE", "dot InfoNCE"), activations=("tanh",), widths=(64, 256, 1024)),
    "quick": Config(seeds=48),  # of 32 seeds the interval of cosine linear under ReLU was too wide to decide
    "full": Config(widths=(128, 512, 2048, 8192), seeds=64, steps=20),
}


def run(config: Config) -> dict[str, np.ndarray]:
    """error/<series>/<part> and cka/<series> (seeds, activations, widths, losses); the last loss is the linear one.

    cka is 1 - CKA on training points, relative the flow's error there in units of ||G_net||, floor/<part> the error of
    finite steps; gradient/start and gradient/mean (groups of seeds, losses, points, outputs).
    """
    points, groups = _points(config), []
    for first in tqdm(range(0, config.seeds, AT_ONCE), desc="ntk_prediction", disable=None):
        group = partial(_group, config, np.arange(first, first + AT_ONCE), points[first : first + AT_ONCE])
        groups.append(results.part(f"seeds-{first}", group))
    arrays = {name: np.concatenate([group[name] for group in groups]) for name in groups[0]}
    return {"widths": np.array(config.widths)} | arrays


def _group(config, seeds, points):
    """All arrays of some seeds."""
    cells = tuple((activation, width) for activation in config.activations for width in config.widths)
    encoders = tuple(_setting.encoder(f"{activation}-2", width, config.features) for activation, width in cells)
    losses, n = tuple(LOSSES[name] for name in config.losses), config.pairs
    # The same weights for each activation and each loss.
    start = len(config.activations) * _initial(config, seeds, points[0])
    everything = jax.tree.map(lambda a: jnp.broadcast_to(a, (len(losses) + 1, *a.shape)), start)
    before = np.asarray(_embed(encoders, everything, points)[0])

    kernels = {name: _infinite(infinite.infinite_ntk, f"{name}-2", points) for name in OTHER}
    processes = {name: _infinite(infinite.infinite_nngp, f"{name}-2", points) for name in config.activations}
    own = np.stack([kernels[activation] for activation, _ in cells], axis=1)  # (seeds, cells, points, points)
    other = np.stack([kernels[OTHER[activation]] for activation, _ in cells], axis=1)
    # The part of the kernel that belongs to the output layer is the covariance of the process.
    covariance = np.stack([processes[activation] for activation, _ in cells], axis=1)
    draw = _draw(covariance, config.features, seeds)

    goals = config.growth * np.sqrt([width for _, width in cells])
    times = np.empty((len(seeds), len(cells), len(losses) + 1), np.float32)
    times[..., :-1] = [TIMES[name] for name in config.losses]
    times[..., -1] = _Linear(own, before, n).reaching(goals)
    trained = _train(encoders, losses, everything, points, times, config.steps, n)

    setups = {"flow": (own, before), "output layer": (covariance, before), "other nonlinearity": (other, before)}
    setups |= {"another start": (own, draw)}
    predicted = {
        name: np.concatenate(
            [_flows(config.losses, n, kernel, f0), _Linear(kernel, f0, n).at(times[..., -1])[:, :, None]], axis=2
        )
        for name, (kernel, f0) in setups.items()
    }
    predicted["untrained"] = np.broadcast_to(before[:, :, None], trained.shape)
    stepped = _descents(losses, own, before, times[..., :-1], config.steps, n)
    shape = (len(seeds), len(config.activations), len(config.widths), -1)
    arrays = {"times": times.reshape(shape)}
    for part, rows in zip(PARTS, (slice(2 * n), slice(2 * n, None)), strict=True):
        grams = {name: _gram(f[..., rows, :]) for name, f in predicted.items()}
        reached = _gram(trained[..., rows, :])
        size = _norm(reached)
        unit = np.minimum(size, _norm(reached - grams["untrained"]))
        for name, gram in grams.items():
            arrays[f"error/{name}/{part}"] = (_norm(reached - gram) / unit).reshape(shape)
            if part == PARTS[0]:
                arrays[f"cka/{name}"] = _misalignment(reached, gram).reshape(shape)
        if part == PARTS[0]:
            arrays["relative"] = (_norm(reached - grams["flow"]) / size).reshape(shape)
        floor = _norm(_gram(stepped[..., rows, :]) - grams["flow"][:, :, :-1])
        arrays[f"floor/{part}"] = (floor / unit[..., :-1]).reshape(shape)
    for name, f in (("start", before[0, 0, : 2 * n]), ("mean", np.zeros_like(before[0, 0, : 2 * n]))):
        arrays[f"gradient/{name}"] = np.asarray(_gradients(losses, n, f))[None]
    return arrays


def _points(config):
    """View a, view b, held-out pairs likewise, (seeds, points, coordinates), with |x|^2 = number of coordinates.

    In coordinates of their own span, which are fewer: Gaussian weights have the same law under rotations of inputs.
    """
    each = config.pairs + config.heldout
    a, b = (view.reshape(config.seeds, each, -1) for view in _setting.views(0, config.seeds * each))
    n = config.pairs
    points = np.concatenate([a[:, :n], b[:, :n], a[:, n:], b[:, n:]], axis=1)
    spanned = np.stack([np.linalg.qr(rows.T, mode="r").T for rows in points.astype(np.float64)])
    return jnp.asarray(spanned * np.sqrt(spanned.shape[2] / points.shape[2]), jnp.float32)


@partial(jax.jit, static_argnums=0)
def _initial(config, seeds, x):
    """Parameters of one network for each width, seeds leading, as a list of trees.

    Weights are iid, so the hidden units of one wide network, dealt out to the widths, are independent networks.
    """
    whole = _setting.encoder(f"{config.activations[0]}-2", sum(config.widths), config.features)
    params = jax.vmap(lambda seed: whole.init(_setting.cell_key(seed, whole.width), x))(seeds)["params"]
    ends = np.cumsum(config.widths)[:-1]
    hidden = jnp.split(params["dense_0"]["kernel"], ends, axis=2)
    output = jnp.split(params["dense_1"]["kernel"], ends, axis=1)
    return [
        {"params": {"dense_0": {"kernel": v}, "dense_1": {"kernel": w}}} for v, w in zip(hidden, output, strict=True)
    ]


@partial(jax.jit, static_argnums=0)
def _embed(encoders, params, points):
    """Embeddings (losses, seeds, cells, points, outputs) of networks with losses and seeds leading."""
    found = [
        jax.vmap(lambda each, apply=encoder.apply: jax.vmap(apply)(each, points))(tree)
        for encoder, tree in zip(encoders, params, strict=True)
    ]
    return jnp.stack(found, axis=2)


def _infinite(kind, name, points):
    """An infinite kernel between the points of each seed, (seeds, points, points)."""
    encoder = _setting.encoder(name, 1, 1)
    return np.stack([kind(encoder, x) for x in jnp.asarray(points)])


def _draw(covariance, features, seeds):
    """A draw of the Gaussian process with independent outputs, (seeds, cells, points, features)."""
    values, vectors = np.linalg.eigh(covariance)
    noise = np.random.default_rng(seeds).normal(size=(*covariance.shape[:-1], features))
    return (vectors @ (np.sqrt(np.maximum(values, 0))[..., None] * noise)).astype(np.float32)


def _train(encoders, losses, params, points, times, steps, n):
    """Embeddings of all points after training, (seeds, cells, losses, points, outputs)."""
    objective, reached = _objective(encoders, (*losses, _setting.LINEAR_DOT), n), []
    for count in (steps, 2 * steps):
        batch = (points[:, : 2 * n], jnp.asarray(times / count))
        done = training.train(objective, params, batch, optimizer=_setting.descent(1.0), steps=count, progress=False)
        if done.status != "finished":
            raise RuntimeError(f"training diverged after {done.steps} of {count} steps: take more of them")
        reached.append(np.asarray(_embed(encoders, done.params, points)))
    return np.moveaxis(2 * reached[1] - reached[0], 0, 2)


@cache
def _objective(encoders, losses, n):
    """Sum of the losses of independent networks, each times its step size."""

    def objective(params, batch):
        points, rates = batch
        return _total(losses, _embed(encoders, params, points), rates, n)

    return objective


def _total(losses, f, rates, n):
    """f (losses, seeds, cells, points, outputs), rates (seeds, cells, losses)."""
    values = [jax.vmap(jax.vmap(lambda f, loss=loss: loss(f[:n], f[n : 2 * n])))(f[i]) for i, loss in enumerate(losses)]
    return jnp.sum(jnp.stack(values, axis=-1) * rates)


@partial(jax.jit, static_argnums=(0, 1))
def _solve(names, n, kernel, f0, ends):
    """Flows of all losses, (seeds, cells, losses, points, outputs), each at its own time of training."""

    def side_by_side(f):
        parts = jnp.split(f, len(names), axis=1)
        return sum(TIMES[name] * LOSSES[name](g[:n], g[n : 2 * n]) for name, g in zip(names, parts, strict=True))

    def one(kernel, f0, times):
        end = gradient_flow.flow_stacked(kernel, side_by_side, jnp.tile(f0, (1, len(names))), times)
        return jnp.stack(jnp.split(end.f[0], len(names), axis=1))

    return jax.vmap(jax.vmap(one))(kernel, f0, ends)


def _flows(names, n, kernel, f0):
    # A time for each problem, all 1: with one for all, XLA's simplifier goes round in circles and says so.
    return np.asarray(_solve(names, n, kernel, f0, np.ones((*f0.shape[:2], 1), f0.dtype)))


@partial(jax.jit, static_argnums=(0, 5))
def _descend(losses, kernel, start, rates, steps, n):
    """Descent in function space at the fixed kernel, (seeds, cells, losses, points, outputs)."""
    gradient = jax.grad(lambda f: _total(losses, f, rates, n))
    f = jnp.broadcast_to(start[None], (len(losses), *start.shape))
    step = lambda _, f: f - jnp.einsum("scij,lscjz->lsciz", kernel, gradient(f), precision="highest")  # noqa: E731
    return jnp.moveaxis(jax.lax.fori_loop(0, steps, step, f), 0, 2)


def _descents(losses, kernel, f0, times, steps, n):
    kernel, f0 = jnp.asarray(kernel), jnp.asarray(f0)
    once, twice = (np.asarray(_descend(losses, kernel, f0, times / count, count, n)) for count in (steps, 2 * steps))
    return 2 * twice - once


class _Linear:
    """Flow of the linear loss, L = f^T A f / 2 with A acting on points only, in closed form: exp(-K A t) f(0)."""

    def __init__(self, kernel, f0, n):
        a = np.zeros(kernel.shape[-2:])
        a[: 2 * n, : 2 * n] = _quadratic(n)
        self.values, self.vectors = np.linalg.eig(-kernel.astype(np.float64) @ a)
        self.amplitudes = np.linalg.solve(self.vectors, f0.astype(self.vectors.dtype))
        self.n = n

    def at(self, times):
        """Embeddings (seeds, cells, points, outputs) at times (seeds, cells)."""
        grown = np.exp(self.values * times[..., None])[..., None] * self.amplitudes
        return np.real(self.vectors @ grown).astype(np.float32)

    def reaching(self, goals):
        """Times (seeds, cells) at which the root mean square |f| of the training points is the goal, by bisection."""

        def small(times):
            f = self.at(times)[..., : 2 * self.n, :]
            return np.sqrt(np.mean(np.sum(f**2, axis=-1), axis=-1)) < goals

        low = np.zeros(self.values.shape[:2])
        high = low + 1
        while small(high).any():
            high = np.where(small(high), 2 * high, high)
        for _ in range(24):  # float32's resolution
            middle = (low + high) / 2
            low, high = np.where(small(middle), middle, low), np.where(small(middle), high, middle)
        return high


@cache
def _quadratic(n):
    hessian = jax.jit(jax.hessian(lambda f: _setting.LINEAR_DOT(*jnp.split(f[:, None], 2))))
    return np.asarray(hessian(jnp.zeros(2 * n)))


def _gram(f):
    return np.einsum("...ik,...jk->...ij", f, f, dtype=np.float64)


def _norm(matrices):
    return np.linalg.norm(matrices, axis=(-2, -1))


def _misalignment(left, right):
    """1 - CKA of stacked Gram matrices."""
    with jax.enable_x64(True):
        square = left.shape[-2:]
        pairs = (jnp.asarray(a).reshape(-1, *square) for a in (left, right))
        return 1 - np.asarray(_cka(*pairs)).reshape(left.shape[:-2])


@jax.jit
def _cka(left, right):
    return jax.vmap(compare.kernel_cka)(left, right)


@partial(jax.jit, static_argnums=(0, 1))
def _gradients(losses, n, f):
    return jnp.stack([jax.grad(lambda f, loss=loss: loss(f[:n], f[n:]))(f) for loss in losses])


def verdicts(config: Config, arrays: dict[str, np.ndarray]) -> list[verify.Verdict]:
    """The stationary mean; for each activation and loss the rate, and whether the widest network is predicted."""
    found = []
    claims = _claims("mean", "f = 0, the mean of the process, is stationary under every loss", "at a network's start")
    for claim, where in zip(claims, ("mean", "start"), strict=True):
        gradient = arrays[f"gradient/{where}"]
        found.append(verify.identity(claim, gradient, np.zeros_like(gradient)))
    for a, activation in enumerate(config.activations):
        for i, loss in enumerate(config.losses):
            found += _cell(config, arrays, a, i, f"{loss.replace(' ', '-')}.{activation}", f"{loss}, {activation}")
        found += _pooled(config, arrays, a, activation)
    return found


def _claims(name, statement, why):
    claim = verify.Claim(f"N5.limit.{name}", statement, SOURCE)
    return claim, verify.Claim(f"{claim.name}.control", f"{statement}: {why}", SOURCE, "control", claim.name)


def _cell(config, arrays, a, i, name, where):
    """Rate and prediction of one loss and activation; under dot InfoNCE also the linear loss as a control."""

    def rate(claim, series, i):
        error = arrays[f"error/{series}/training"][:, a, :, i]
        return verify.rate(claim, arrays["widths"], error, -0.5, margin=config.slope_margin)

    def below(claim, series, i):
        error = arrays[f"error/{series}/training"][:, a, -1, i]
        return verify.agreement(claim, error, config.predicted, margin=0.0, side="at_most")

    falls = "the error of the flow with the infinite-width kernel falls as M^(-1/2)"
    small = "for the widest network that error is below a quarter of a trivial prediction's"
    found = []
    for check, kind, statement, series, why in (
        (rate, "rate", falls, "output layer", "kernel of the output layer alone"),
        (below, "predicted", small, "another start", "from another start"),
    ):
        claim, control = _claims(f"{kind}.{name}", f"{statement}, {where}", why)
        found += [check(claim, "flow", i), check(control, series, i)]
        if config.losses[i] == "dot InfoNCE":
            moved = f"{statement}, {where}: linear loss when the kernel has moved"
            control = verify.Claim(f"{claim.name}.linear", moved, SOURCE, "control", claim.name)
            found.append(check(control, "flow", -1))
    return found


def _pooled(config, arrays, a, activation):
    """Rates of geometric means over the losses: error on held-out points, and 1 - CKA."""
    found = []
    for name, text, key, exponent, margin in (
        ("heldout", "error on held-out points", "error/{}/held-out", -0.5, config.slope_margin),
        ("cka", "1 - CKA of the Gram matrices", "cka/{}", -1.0, config.cka_margin),
    ):
        statement = f"the {text} falls as M^({exponent:g}), mean over the losses, {activation}"
        claims = _claims(f"{name}.{activation}", statement, "kernel of the output layer alone")
        for claim, series in zip(claims, ("flow", "output layer"), strict=True):
            values = np.exp(np.mean(np.log(arrays[key.format(series)][:, a, :, :-1]), axis=-1))
            found.append(verify.rate(claim, arrays["widths"], values, exponent, margin=margin))
    return found
