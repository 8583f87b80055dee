r"""S13: PCA cannot tell sources of equal variance apart; shape, changing scales and memory can.

Observations x = g(s) of independent sources of mean 0 and variance 1. The mean correlation coefficient (MCC) matches
recovered features and sources one to one, as well as possible.

PCA sees variances only. Under an orthogonal mixing it finds the eigenvectors of the sampling noise: for n samples
sqrt(n) (C - I) tends to a symmetric Gaussian matrix, of variance 1 off the diagonal and E s^4 - 1 on it [derivation].
That predicts its MCC, which does not grow with n. It lies above that of a random rotation where E s^4 - 1 > 2: the
noise of heavy-tailed sources has a weak preference for their axes.

What does separate sources, each with its control:

    FastICA        non-Gaussian sources, linear mixing. The linear reference of all that follows.
    TCL            time-contrastive learning: scales change from segment to segment. Features from which a multinomial
                   logistic regression tells the segment are linear in q(s), here |s| for Laplace sources. Linear ICA
                   on the features then gives every |s_i|. Control: scales that do not change.
    PCL            permutation-contrastive learning: sources with memory. A logistic regression tells (x_t, x_t-1) from
                   (x_t, x_t'), with a logit that is a sum over features. Each feature is then a monotone function of
                   one source, so its MCC is one of ranks. Controls: no memory, and a Gaussian one.

Both are trained on a linear mixing and on a mildly nonlinear one of two layers, with bends of width 1/3 in units of
the sources. For autoregressive Laplace sources the logit is, with features h and numbers m, e, b, c, k to be learnt,

    sum_i [ (m_i h_i(x_t) + e_i)^2 - |h_i(x_t) - b_i h_i(x_t-1) + c_i| ] + k,

the form of the source: the absolute value is exact, the square stands for minus the logarithm of the density of s_t.

Where it does not reach. TCL gives |s|, never the sign. FastICA, also as TCL's last step, has poorer local optima: the
best of a few starts by its own contrast is taken. PCL finds its way slowly: at half the step size used here about one
training in sixteen still mixes two sources when it ends, at five sources and 400 steps one in six, after 1000 steps one
in eighty; and a linear encoder, which a linear mixing would allow, stayed mixed in two of three trial runs. So the
encoder has a hidden layer in all cases.
"""

import dataclasses
import warnings
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import threadpoolctl
from scipy.optimize import linear_sum_assignment
from scipy.stats import rankdata

from experiments._side_by_side import BRIEFLY
from theorykit import encoders, results, training, verify
from theorykit.data import latents, sources
from theorykit.spectral import compare

NOISE = "derivation (central limit theorem of the sample covariance)"
ICA = "Comon 1994 (Signal Processing 36); FastICA: Hyvarinen, Oja 2000 (Neural Networks 13)"
TCL = "Hyvarinen, Morioka 2016 (arXiv 1605.06336), theorem 1"
PCL = "Hyvarinen, Morioka 2017 (AISTATS, PMLR 54), theorem 1"

# Logarithms of the scales lie within 1.5 of each other's middle, so scales differ by up to exp(3); the memory is that
# of the source's simulations.
SPREAD, MEMORY = 1.5, 0.7
SHARPNESS = 3.0  # of the nonlinear mixing
RATES = {"tcl": 0.04, "pcl": 0.06}  # first step sizes of Adam; see above
# Of FastICA: about one start in fifty ends with two sources mixed; it converges in about ten iterations.
STARTS, ITERATIONS = 3, 40


@dataclasses.dataclass(frozen=True)
class Config:
    """Numbers of sources, of segments and of times in each, and of steps."""

    sources: int = 4
    segments: int = 64
    length: int = 64
    seeds: int = 10
    steps: int = 400
    draws: int = 12  # sets of `seeds` draws for PCA alone, which needs no training
    references: int = 3  # the same for FastICA and PCA in place of TCL and PCL
    unrecovered: float = results.threshold(
        0.05, "one random rotation of four sources in two hundred comes this close, of five fewer"
    )
    unexplained: float = results.threshold(0.05, "the same distance from a perfect R^2 as from a perfect MCC")
    noise: float = results.threshold(0.05, "a quarter of the way from PCA's prediction to recovery")


PRESETS = {
    "smoke": Config(),
    "quick": Config(length=128, steps=1000, draws=24, references=8),
    "full": Config(sources=5, segments=128, length=128, seeds=16, steps=4000, draws=16, references=8),
}


def run(config: Config) -> dict[str, np.ndarray]:
    """Errors 1 - MCC of every method on every kind of data.

    unrecovered/<method>/<data> is (seeds,), or more where nothing is trained; unexplained/<data>, (seeds,),
    is 1 - R^2 of the best affine map from TCL features to |s|; pca/predicted and pca/rotations, (4000,), are MCCs of
    the sampling noise and of random rotations.
    """
    arrays = {}
    for name, function in {"linear": _linear, "tcl": _tcl, "pcl": _pcl}.items():
        # On cores that others use as well, two threads of LAPACK wait for each other ten times as long as they work.
        with threadpoolctl.threadpool_limits(1):
            arrays |= results.part(name, partial(function, config))
    return arrays


def _linear(config):
    """PCA of equal and of unequal variances, and FastICA of sources with and without a shape."""
    d, key = config.sources, jax.random.key(13)
    equal = [s for i in range(config.draws) for s in _independent(config, jax.random.fold_in(key, i))]
    one_set = equal[: config.seeds]
    spread = [s * np.geomspace(0.5, 2, d) for s in one_set]
    # An orthogonal mixing does not change what PCA finds, up to rounding, so none is made.
    found = {
        "unrecovered/pca/equal": _unrecovered([_principal(s) for s in equal], equal),
        "unrecovered/pca/unequal": _unrecovered([_principal(s) for s in spread], one_set),
    }
    # A Laplace variable of variance 1 has E s^4 = 6, a Gaussian one 3, whose noise has no preferred axes.
    found |= {"pca/predicted": _noise_correlations(d, 6.0), "pca/rotations": _noise_correlations(d, 3.0)}
    for i, shape in enumerate(("laplace", "gaussian")):
        draw = partial(_independent, config, shape=shape)
        found |= _references(shape, config, jax.random.fold_in(key, config.draws + i), draw, linear=True)
    return found


def _tcl(config):
    """Sources whose scales change, linearly and nonlinearly mixed, and stationary ones."""
    for_sources, for_mixing, for_start, for_batches = jax.random.split(jax.random.key(14), 4)
    sizes = (config.segments, config.length, config.sources)
    draw = _every_seed(lambda key: sources.modulated_sources(key, *sizes, spread=SPREAD).values, config.seeds)
    changing, steady = draw(for_sources), _independent(config, for_sources)
    data = {
        "linear": (changing, _mix(for_mixing, changing, linear=True)),
        "nonlinear": (changing, _mix(for_mixing, changing, linear=False)),
        "stationary": (steady, _mix(for_mixing, steady, linear=True)),
    }
    encoder, loss, _ = _programs(config.sources)
    head = {"weight": jnp.zeros((config.sources, config.segments)), "bias": jnp.zeros(config.segments)}
    x, start = _replicates(encoder, data, head, for_start)
    done = _train(
        loss,
        start,
        (x, jnp.repeat(jnp.arange(config.segments), config.length)),
        config.steps,
        RATES["tcl"],
        key=for_batches,
    )
    found = {}
    for (name, (truth, _)), features in zip(data.items(), _features(encoder, done, x, len(data)), strict=True):
        sizes = np.abs(truth)
        found[f"unrecovered/tcl/{name}"] = _unrecovered([_fast_ica(h) for h in features], sizes)
        found[f"unexplained/{name}"] = np.array([_unexplained(h, s) for h, s in zip(features, sizes, strict=True)])
    return found | _references("tcl", config, jax.random.key(24), draw, np.abs)


def _pcl(config):
    """Autoregressive sources, linearly and nonlinearly mixed; Gaussian ones, and ones without memory."""
    for_sources, for_mixing, for_start, for_batches = jax.random.split(jax.random.key(15), 4)
    draw = partial(sources.autocorrelated_sources, count=config.segments * config.length, dim=config.sources)
    laplace, normal = (
        _every_seed(partial(draw, memory=MEMORY, shape=shape), config.seeds) for shape in ("laplace", "gaussian")
    )
    heavy, gaussian = laplace(for_sources), normal(for_sources)
    memoryless = _independent(config, for_sources)
    data = {
        "linear": (heavy, _mix(for_mixing, heavy, linear=True)),
        "nonlinear": (heavy, _mix(for_mixing, heavy, linear=False)),
        "gaussian": (gaussian, _mix(for_mixing, gaussian, linear=True)),
        "memoryless": (memoryless, _mix(for_mixing, memoryless, linear=True)),
    }
    encoder, _, loss = _programs(config.sources)
    zero, one = jnp.zeros(config.sources), jnp.ones(config.sources)
    x, start = _replicates(encoder, data, {"m": one, "e": zero, "b": one, "c": zero, "k": jnp.zeros(())}, for_start)
    done = _train(
        loss, start, (x[1:], x[:-1]), config.steps, RATES["pcl"], key=for_batches, augment=_with_unrelated_times
    )
    found = {}
    for (name, (truth, _)), features in zip(data.items(), _features(encoder, done, x, len(data)), strict=True):
        found[f"unrecovered/pcl/{name}"] = _unrecovered(_ranks(features), _ranks(truth))
    return found | _references("pcl", config, jax.random.key(25), laplace, _ranks)


def _ranks(series):
    return rankdata(series, axis=1)


def _references(name, config, key, draw, known=np.asarray, *, linear=False):
    """FastICA and PCA on mixed sources of their own; of the sources and of what is found `known` is compared."""
    found = {"fastica": [], "pca": []}
    for set_key in jax.random.split(key, config.references):
        for_sources, for_mixing = jax.random.split(set_key)
        sources = draw(for_sources)
        mixed = _mix(for_mixing, sources, linear=linear)
        for method, separate in (("fastica", _fast_ica), ("pca", _principal)):
            found[method].append(_unrecovered(known(np.stack([separate(x) for x in mixed])), known(sources)))
    return {f"unrecovered/{method}/{name}": np.concatenate(values) for method, values in found.items()}


@cache
def _programs(d):
    """Encoder, TCL loss and PCL loss of replicates, which lie on the second axis of the data and first of parameters.

    The losses are summed. Gradients are then those of each replicate, and Adam acts on each number by itself.
    """
    encoder = encoders.MLP(64, d, depth=2, activation="relu", use_bias=True, parametrisation="standard", bias_std=0.0)

    def tcl(params, batch):
        def one(params, x, segments):
            logits = jnp.matmul(encoder.apply(params["encoder"], x), params["weight"]) + params["bias"][None]
            return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, segments))

        return jnp.sum(jax.vmap(one, (0, 1, None))(params, *batch))

    def pcl(params, batch):
        def one(params, *times):
            now, before, other = (encoder.apply(params["encoder"], x) for x in times)

            def logit(then):
                kept = jnp.abs(now - params["b"][None] * then + params["c"][None])
                return jnp.sum((params["m"][None] * now + params["e"][None]) ** 2 - kept, axis=1) + params["k"]

            return jnp.mean(jax.nn.softplus(-logit(before))) + jnp.mean(jax.nn.softplus(logit(other)))

        return jnp.sum(jax.vmap(one, (0, 1, 1, 1))(params, *batch))

    return encoder, tcl, pcl


def _with_unrelated_times(key, pairs):
    """(x_t, x_t-1) with a third part, x at a time drawn from the batch."""
    now, before = pairs
    return now, before, jnp.roll(before, jax.random.randint(key, (), 1, len(before)), axis=0)


def _train(loss, start, data, steps, rate, **options):
    """Parameters after Adam on mini-batches, at a rate that falls to zero along a cosine."""
    optimizer = optax.adam(optax.cosine_decay_schedule(rate, steps))
    done = training.train(
        loss, start, data, optimizer=optimizer, steps=steps, batch_size=256, progress=False, **options
    )
    if done.status != "finished":
        raise RuntimeError(f"training diverged after {done.steps} steps: lower its rate, {rate}, in RATES")
    return done.params


def _replicates(encoder, data, head, key):
    """Observations (times, data * seeds, d) and as many initial parameters; the seeds start alike on all data."""
    x = jnp.asarray(np.concatenate([mixed for _, mixed in data.values()]).swapaxes(0, 1), jnp.float32)
    seeds = x.shape[1] // len(data)
    params = {"encoder": _initial(encoder, jax.random.split(key, seeds), x[:1, 0])}
    params |= jax.tree.map(lambda a: jnp.broadcast_to(a, (seeds, *a.shape)), head)
    return x, jax.tree.map(lambda a: jnp.concatenate([a] * len(data)), params)


@partial(jax.jit, static_argnums=0, compiler_options=BRIEFLY)
def _initial(encoder, keys, x):
    return jax.vmap(encoder.init, (0, None))(keys, x)


@partial(jax.jit, static_argnums=0)
def _apply(encoder, params, x):
    return jax.vmap(encoder.apply, (0, 1))(params, x)


def _features(encoder, params, x, sets):
    """Features (sets, seeds, times, d)."""
    features = np.asarray(_apply(encoder, params["encoder"], x))
    return features.reshape(sets, -1, *features.shape[1:])


def _every_seed(draw, seeds):
    """From key -> sources (times, d) to key -> sources (seeds, times, d), compiled once."""
    compiled = jax.jit(jax.vmap(draw), compiler_options=BRIEFLY)
    return lambda key: np.asarray(compiled(jax.random.split(key, seeds)))


def _independent(config, key, shape="laplace"):
    """Sources (seeds, times, d) without memory, whose law does not change."""
    return _independent_draw(config.segments * config.length, config.sources, shape, config.seeds)(key)


@cache
def _independent_draw(count, d, shape, seeds):
    return _every_seed(lambda key: sources.independent_sources(key, count, d, shape=shape), seeds)


def _mix(key, sources, *, linear):
    """Mixed observations (seeds, times, d), whitened. Both mixings have the same matrices."""
    x = np.asarray(_observe(key, jnp.asarray(sources, jnp.float32), jnp.asarray(linear)), np.float64)
    return np.stack([np.sqrt(len(v)) * _principal(v) for v in x])


@partial(jax.jit, compiler_options=BRIEFLY)
def _observe(key, sources, linear):
    draw = partial(latents.smooth_generator, dim=sources.shape[2], sharpness=SHARPNESS)
    generators = jax.vmap(draw)(jax.random.split(key, sources.shape[0]))
    # With slope 1 on either side the nonlinearity is the identity.
    generators = generators._replace(leak=jnp.where(linear, 1.0, generators.leak))
    return jax.vmap(latents.generate)(generators, sources)


def _principal(x):
    """Principal components (times, d), of equal length."""
    x = np.asarray(x, np.float64)
    return np.linalg.svd(x - x.mean(axis=0), full_matrices=False)[0]


def _noise_correlations(d, kurtosis, draws=4000):
    """MCC of the eigenvectors of symmetric Gaussian noise, of variance 1 and, on the diagonal, kurtosis - 1."""
    lower = np.tril(np.random.default_rng(13).standard_normal((draws, d, d)))
    noise = np.tril(lower, -1) + np.swapaxes(np.tril(lower, -1), 1, 2) + np.sqrt(kurtosis - 1) * lower * np.eye(d)
    return np.array([np.mean(v[linear_sum_assignment(-v)]) for v in np.abs(np.linalg.eigh(noise)[1])])


def _fast_ica(x):
    """Independent components (times, d): of a few starts the one with the largest contrast."""
    from sklearn.decomposition import fastica  # it takes a second to import
    from sklearn.exceptions import ConvergenceWarning

    def contrast(s):
        # E ln cosh of a standard normal variable is 0.3746; ln cosh s = logaddexp(s, -s) - ln 2.
        return np.sum((np.mean(np.logaddexp(s, -s), axis=0) - np.log(2) - 0.3746) ** 2)

    # Whitened here: the solver's own whitening loses a component where white data come in, whose singular vectors are
    # arbitrary and can have entries that are exactly zero, of which it takes the sign.
    white = np.sqrt(len(x)) * _principal(x)
    found = []
    for start in range(STARTS):
        with warnings.catch_warnings():
            # Gaussian data have no optimum to converge to, which is what their control shows.
            warnings.simplefilter("ignore", ConvergenceWarning)
            found.append(fastica(white, whiten=False, random_state=start, max_iter=ITERATIONS, tol=1e-3)[2])
    return max(found, key=contrast)


_correlation = jax.jit(compare.mean_correlation)
_fit = jax.jit(compare.linear_fit)


def _unrecovered(features, sources):
    """1 - MCC of every seed."""
    pairs = zip(features, sources, strict=True)
    return np.array([1 - float(_correlation(*(jnp.asarray(a, jnp.float32) for a in pair)).value) for pair in pairs])


def _unexplained(x, y):
    return 1 - float(_fit(jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.float32)).r2)


def verdicts(config: Config, arrays: dict[str, np.ndarray]) -> list[verify.Verdict]:
    """PCA against its prediction; FastICA, TCL and PCL against sources, each beside what it cannot do."""

    def claim(name, statement, source):
        return verify.Claim(f"S13.{name}", statement, source)

    def control(of, name, statement, source):
        return verify.Claim(f"S13.{of}.{name}", statement, source, "control", f"S13.{of}")

    def recovered(claim, data):
        return verify.agreement(claim, arrays[f"unrecovered/{data}"], 0.0, margin=config.unrecovered, side="at_most")

    def as_noise(claim, data):
        return verify.agreement(
            claim, 1 - arrays[f"unrecovered/pca/{data}"], np.mean(arrays["pca/predicted"]), margin=config.noise
        )

    def mapped(claim, data):
        return verify.agreement(claim, arrays[f"unexplained/{data}"], 0.0, margin=config.unexplained, side="at_most")

    noise = "the MCC of PCA is that of the eigenvectors of the sampling noise"
    ica, tcl, pcl = (f"1 - MCC of {what} is small" for what in ("FastICA", "TCL with |s|", "PCL by ranks"))
    linear, bent = "linear mixing", "nonlinear mixing"
    affine = "|s| is an affine map of the TCL features"
    return [
        as_noise(claim("pca", f"{noise}: equal variances", NOISE), "equal"),
        as_noise(control("pca", "unequal", f"{noise}: variances that differ", NOISE), "unequal"),
        recovered(claim("ica", f"{ica}: Laplace sources, {linear}", ICA), "fastica/laplace"),
        recovered(control("ica", "gaussian", f"{ica}: Gaussian sources, {linear}", ICA), "fastica/gaussian"),
        recovered(control("ica", "pca", f"{ica}: PCA in its place", ICA), "pca/laplace"),
        mapped(claim("tcl.map", f"{affine}: {linear}", TCL), "linear"),
        mapped(control("tcl.map", "stationary", f"{affine}: {linear}, scales that do not change", TCL), "stationary"),
        recovered(claim("tcl.linear", f"{tcl}: {linear}", TCL), "tcl/linear"),
        recovered(
            control("tcl.linear", "stationary", f"{tcl}: {linear}, scales that do not change", TCL), "tcl/stationary"
        ),
        recovered(claim("tcl.nonlinear", f"{tcl}: {bent}", TCL), "tcl/nonlinear"),
        recovered(control("tcl.nonlinear", "fastica", f"{tcl}: {bent}, FastICA in its place", TCL), "fastica/tcl"),
        recovered(control("tcl.nonlinear", "pca", f"{tcl}: {bent}, PCA in its place", TCL), "pca/tcl"),
        recovered(claim("pcl.linear", f"{pcl}: {linear}", PCL), "pcl/linear"),
        recovered(control("pcl.linear", "gaussian", f"{pcl}: {linear}, Gaussian memory", PCL), "pcl/gaussian"),
        recovered(control("pcl.linear", "memoryless", f"{pcl}: {linear}, no memory", PCL), "pcl/memoryless"),
        recovered(claim("pcl.nonlinear", f"{pcl}: {bent}", PCL), "pcl/nonlinear"),
        recovered(control("pcl.nonlinear", "fastica", f"{pcl}: {bent}, FastICA in its place", PCL), "fastica/pcl"),
        recovered(control("pcl.nonlinear", "pca", f"{pcl}: {bent}, PCA in its place", PCL), "pca/pcl"),
    ]
