r"""S12: contrastive learning inverts the generator, for which temperatures, and from which starts.

Latents are uniform on the unit sphere of R^d, z~ given z is von Mises-Fisher with concentration kappa, x = g(z) with g
injective; the encoder f has unit embeddings and minimises InfoNCE at temperature tau. Zimmermann et al.: as the number
K of candidates grows, with tau = 1 / kappa, h = f o g is linear and orthogonal.

Sharper [derivation]. Given K candidates the posterior of the partner is the softmax of ln p(z~ | z) / p(z~), for every
K >= 2, and scores are determined by it up to a term c(z). So h attains the minimum, at every K, exactly if

    h(z).h(z~) / tau = kappa z.z~ + c(z),     where z~ = z gives c = 1 / tau - kappa:
    h(z).h(z~) = tau kappa z.z~ + 1 - tau kappa

for all z, z~. With d outputs that needs tau kappa = 1, and h is orthogonal. With an output more it can also be had for
tau kappa < 1: h is affine, sqrt(tau kappa) times an orthogonal map, plus a constant vector. Otherwise no encoder
attains the posterior, and what the minimiser does is another matter:

    tau kappa < 1, d outputs   a sphere cannot shrink within itself. Measured: at 1/8 it is folded and a direction is
                               lost, with 8 candidates or more; not with 2, and not at 1/2.
    tau kappa > 1              for large tau the loss is ln K - (1 - 1/K) (E h.h~ - |E h|^2) / tau + ..., which is
                               minimised by the orthogonal maps: degree 1 is the leading non-constant eigenspace of the
                               kernel p(z~ | z). So a matched temperature is enough but not needed, as is measured.

Where it does not reach. The theorem is about minimisers. The degree of a map of the sphere cannot change while its
embeddings, before they are normalised, stay away from zero. The encoder here, tanh without biases at the start, begins
close to a linear map, whose degree is that of a rotation. Embeddings that begin in a half-space, by an offset on the
outputs, have degree zero, and descent then often ends in a fold also at tau kappa = 1; the figure counts how often.
"""

import dataclasses
from functools import cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from theorykit import encoders, losses, results, similarity, training, verify
from theorykit.data import latents
from theorykit.spectral import compare

SOURCE = "Zimmermann et al. 2021 (arXiv 2102.08850), theorem 2"
DERIVED = "derivation from the posterior of the positive pair; setting of arXiv 2102.08850"

# tau kappa of the mismatched temperatures, and the concentration, over kappa, of a marginal that is not uniform.
SHARP, FLAT, SKEWED = 1 / 8, 4.0, 1.0


class Case(NamedTuple):
    """One training: tau kappa, outputs beyond d, the marginal's kappa_0 / kappa, candidates K, offset at the start."""

    ratio: float = 1.0
    extra: int = 0
    marginal: float = 0.0
    candidates: int = 64
    offset: float = 0.0


MATCHED = Case()
FOLDED = Case(SHARP)
AFFINE = Case(SHARP, extra=1)
NON_UNIFORM = Case(marginal=SKEWED)
OFFSET = Case(offset=3.0)  # longer than the embeddings at the start, which are then all in one half-space
_BASIC = (MATCHED, FOLDED, AFFINE, Case(FLAT), NON_UNIFORM)


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes and the grids of the sweeps, both of them empty at the smoke preset."""

    dimension: int = 3
    concentration: float = 5.0
    ratios: tuple[float, ...] = ()  # tau kappa, with and without the extra output
    candidates: tuple[int, ...] = ()
    seeds: int = 8
    steps: int = 400
    batch: int = 128
    rows: int = 4096  # for the comparison; the standard error of R^2 is then far below the margins
    unexplained: float = results.threshold(0.01, "the source calls it inverted where R^2 is 99% and more")
    distance: float = results.threshold(0.05, "a tenth of that of the untrained encoder")
    scale: float = results.threshold(0.1, "tells tau kappa = 1/8 from its neighbours in the sweep, a factor 2 away")
    law: float = results.threshold(0.1, "a tenth of the predicted exponent 1; without the law it is 0")

    def cases(self) -> tuple[Case, ...]:
        """All trainings, those of equal K side by side."""
        sweep = [Case(ratio, extra) for extra in (0, 1) for ratio in self.ratios]
        sweep += [Case(ratio, candidates=k) for ratio in (1.0, SHARP) for k in self.candidates]
        sweep += [NON_UNIFORM._replace(candidates=min(self.candidates)), OFFSET] if self.candidates else []
        return tuple(sorted(dict.fromkeys((*_BASIC, *sweep)), key=lambda case: case.candidates))


_RATIOS = (1 / 8, 1 / 4, 1 / 2, 1.0, 2.0, 4.0, 8.0)
PRESETS = {
    "smoke": Config(),
    "quick": Config(ratios=_RATIOS, candidates=(2, 8, 64, 128), steps=1000),
    "full": Config(
        dimension=5,
        concentration=8.0,
        ratios=_RATIOS,
        candidates=(2, 8, 64, 512),
        seeds=12,
        steps=6000,
        batch=512,
    ),
}

RATE = 0.03  # Adam's first step size; 0.01 and 0.02 invert the generator as well, later
# Two layers with bends of width 1/5: the best affine map from x to z leaves about 6% of the variance.
GENERATOR = {"depth": 2, "sharpness": 5.0}


def run(config: Config) -> dict[str, np.ndarray]:
    """Three measures of h = f o g: unexplained, distance and scale, each (seeds, cases) in the order of config.cases().

    unexplained is 1 - R^2 of the best affine map from h to z; distance is from the orthogonal maps and scale the mean
    squared singular value, both of the best affine map from z to h. untrained/<measure> is that of the initial encoder,
    observations/<measure> that of x in place of h, (seeds,).
    """
    cases = config.cases()
    encoder, loss, pairs = _program(config.dimension, cases, config.concentration, config.batch)
    sizes = (config.dimension, config.rows, config.seeds)
    points, generator, observed, start = _prepare(encoder, sizes, SKEWED * config.concentration, jax.random.key(12))
    # The offset goes along the first output.
    bias = jnp.asarray([case.offset for case in cases])[:, None, None] * jnp.eye(1, config.dimension + 1)[None]
    params = jax.tree.map(lambda a: jnp.broadcast_to(a, (len(cases), *a.shape)), start)
    params["params"]["dense_1"] = params["params"]["dense_1"] | {"bias": params["params"]["dense_1"]["bias"] + bias}
    done = training.train(
        loss,
        params,
        generator,
        optimizer=optax.adam(optax.cosine_decay_schedule(RATE, config.steps)),
        steps=config.steps,
        key=jax.random.key(13),
        augment=pairs,
        progress=False,
    )
    if done.status != "finished":
        raise RuntimeError(f"training diverged after {done.steps} steps: lower RATE")
    masks = jnp.asarray(_masks(config.dimension, cases))
    column = cases.index(MATCHED)
    # Of the untrained encoders the matched case is enough; the observations stand in for embeddings as one case more.
    which = np.array([int(case.marginal > 0) for case in cases])
    h = _embeddings(encoder, done.params, masks, observed[which])
    untrained = _embeddings(encoder, params, masks, observed[which])[column]
    found = _measure(points[np.append(which, [0, 0])], jnp.concatenate([h, untrained[None], observed[:1]]))
    arrays = {}
    for name, values in found.items():
        *trained, untrained, observations = np.asarray(values)
        arrays |= {
            name: np.stack(trained, axis=1),
            f"untrained/{name}": untrained,
            f"observations/{name}": observations,
        }
    return arrays


@partial(jax.jit, static_argnums=(0, 1))
def _prepare(encoder, sizes, marginal, key):
    """Points (2, rows, d) of either marginal, generators, observations (2, seeds, rows, d + 1), initial parameters."""
    d, rows, seeds = sizes
    for_points, for_generators, for_start = jax.random.split(key, 3)
    drawn = latents.sphere_pairs(for_points, 2 * rows, d, concentration=0.0, marginal=marginal)
    points = jnp.stack([drawn.b[:rows], drawn.a[rows:]])  # of independent pairs
    draw = partial(latents.smooth_generator, dim=d, outputs=d + 1, **GENERATOR)
    generators = jax.vmap(draw)(jax.random.split(for_generators, seeds))
    x = jax.vmap(latents.generate, (0, None))(generators, points[0])
    generator = {"map": generators, "mean": jnp.mean(x, axis=1), "deviation": jnp.std(x, axis=1)}
    observed = jax.vmap(lambda z: jax.vmap(_observe, (0, None))(generator, z))(points)
    start = jax.vmap(encoder.init, (0, None))(jax.random.split(for_start, seeds), x[0, :1])
    return points, generator, observed, start


def _observe(generator, z):
    """Observations with mean 0 and deviation 1 in every coordinate."""
    return (latents.generate(generator["map"], z) - generator["mean"][None]) / generator["deviation"][None]


def _masks(d, cases):
    """Encoders have d + 1 outputs, (cases, d + 1). Without the extra one the last is held at zero."""
    return np.array([[1.0] * d + [float(case.extra)] for case in cases], np.float32)


@cache
def _program(d, cases, concentration, batch):
    """Encoder, loss and batches for the trainings of all cases and seeds at once; parameters are (cases, seeds, ...).

    The losses are summed. Gradients are then those of each training, and Adam acts on each number by itself.
    """
    encoder = encoders.MLP(
        32, d + 1, depth=2, activation="tanh", use_bias=True, parametrisation="standard", bias_std=0.0
    )
    marginals = np.unique([case.marginal for case in cases])
    which = np.searchsorted(marginals, [case.marginal for case in cases])
    masks = jnp.asarray(_masks(d, cases))

    def pairs(key, generator):
        """New pairs for every step, (marginals, seeds, batch, d + 1); cases share them."""
        keys = jax.random.split(key, (len(marginals), generator["mean"].shape[0]))

        def one(key, generator, marginal):
            drawn = latents.sphere_pairs(key, batch, d, concentration=concentration, marginal=marginal * concentration)
            return _observe(generator, drawn.a), _observe(generator, drawn.b)

        return jax.vmap(jax.vmap(one, (0, 0, None)), (0, None, 0))(keys, generator, jnp.asarray(marginals))

    def loss(params, views):
        a, b = (_embeddings(encoder, params, masks, view[which]) for view in views)
        total = 0.0
        for candidates in sorted({case.candidates for case in cases}):
            chosen = [i for i, case in enumerate(cases) if case.candidates == candidates]
            # The batch falls into groups of K pairs, and each compares within itself only.
            za, zb = (z[chosen[0] : chosen[-1] + 1].reshape(len(chosen), -1, candidates, d + 1) for z in (a, b))
            temperatures = jnp.asarray([cases[i].ratio / concentration for i in chosen])
            groups = jax.vmap(lambda u, v, t: losses.info_nce(u, v, temperature=t), (0, 0, None))
            total += jnp.sum(jax.vmap(groups)(za, zb, temperatures)) * (candidates / batch)
        return total

    return encoder, loss, pairs


@partial(jax.jit, static_argnums=0)
def _embeddings(encoder, params, masks, x):
    """Embeddings (cases, seeds, rows, d + 1); used in the loss too."""

    def embed(params, mask, x):
        return similarity.normalise(encoder.apply(params, x) * mask[None])

    return jax.vmap(jax.vmap(embed, (0, None, 0)))(params, masks, x)


@jax.jit
def _measure(z, h):
    """The three measures of embeddings (cases, seeds, rows, d + 1) of latents (cases, rows, d), (cases, seeds) each."""

    def one(z, h):
        # A column of zeros gives both directions one shape, so that the fit is compiled once.
        z = jnp.pad(z, ((0, 0), (0, 1)))
        matrices, _, r2 = jax.vmap(compare.linear_fit)(jnp.stack([z, h]), jnp.stack([h, z]))
        # A matrix (d, d + 1) has the singular values of its triangular factor, which is square.
        square = jnp.linalg.qr(matrices[0, :-1].T)[1]
        return {
            "unexplained": 1 - r2[1],
            "distance": compare.distance_from_orthogonality(square),
            "scale": jnp.sum(square**2) / square.shape[0],
        }

    return jax.lax.map(lambda pair: jax.vmap(one, (None, 0))(*pair), (z, h))


def verdicts(config: Config, arrays: dict[str, np.ndarray]) -> list[verify.Verdict]:
    """Linear, orthogonal, at which temperatures and scales; with sweeps also at two candidates, and the scale's law."""
    cases = config.cases()

    def of(name, case):
        return arrays[name][:, cases.index(case)]

    def linear(claim, unexplained):
        return verify.agreement(claim, unexplained, 0.0, margin=config.unexplained, side="at_most")

    def orthogonal(claim, distance):
        return verify.agreement(claim, distance, 0.0, margin=config.distance, side="at_most")

    def scaled(claim, case, ratio):
        return verify.agreement(claim, of("scale", case) / ratio, 1.0, margin=config.scale)

    def law(claim, ratios):
        scale = np.stack([of("scale", Case(ratio, extra=1)) for ratio in ratios], axis=1)
        return verify.rate(claim, np.array(ratios), scale, 1.0, margin=config.law)

    def claim(name, statement, source=SOURCE):
        return verify.Claim(f"S12.{name}", f"{statement}: {where[name]}", source)

    def control(name, broken, statement, source=SOURCE):
        return verify.Claim(f"S12.{name}.{broken}", f"{statement}: {why[broken]}", source, "control", f"S12.{name}")

    matched, sharp = "tau kappa = 1, uniform latents", f"tau kappa = {SHARP:g}"
    where = {
        "linear": matched,
        "orthogonal": matched,
        "flat": f"tau kappa = {FLAT:g}",
        "candidates": f"{matched}, the smallest K",
        "candidates.linear": f"{matched}, the smallest K",
    }
    where |= dict.fromkeys(("sharp", "scale"), f"{sharp}, d + 1 outputs") | {"law": "tau kappa <= 1, d + 1 outputs"}
    why = {
        "mismatch": f"{sharp}, d outputs",
        "marginal": "latents that are not uniform",
        "untrained": "untrained encoder",
    }
    why |= {"observations": "x in place of f(x)", "flat": f"tau kappa = {FLAT:g}, scale against tau kappa"}
    why |= {"beyond": "tau kappa >= 1, d + 1 outputs"}
    is_linear = f"the best affine map from f(g(z)) to z leaves at most {config.unexplained:.0%} of the variance"
    is_orthogonal = "the best affine map from z to f(g(z)) is orthogonal up to a scale"
    has_scale = "the squared scale of f o g is tau kappa"
    found = [
        linear(claim("linear", is_linear), of("unexplained", MATCHED)),
        linear(control("linear", "mismatch", is_linear), of("unexplained", FOLDED)),
        linear(control("linear", "marginal", is_linear), of("unexplained", NON_UNIFORM)),
        linear(control("linear", "observations", is_linear), arrays["observations/unexplained"]),
        orthogonal(claim("orthogonal", is_orthogonal), of("distance", MATCHED)),
        orthogonal(control("orthogonal", "mismatch", is_orthogonal), of("distance", FOLDED)),
        orthogonal(control("orthogonal", "marginal", is_orthogonal), of("distance", NON_UNIFORM)),
        orthogonal(control("orthogonal", "untrained", is_orthogonal), arrays["untrained/distance"]),
        orthogonal(claim("flat", is_orthogonal, DERIVED), of("distance", Case(FLAT))),
        orthogonal(control("flat", "mismatch", is_orthogonal, DERIVED), of("distance", FOLDED)),
        orthogonal(claim("sharp", is_orthogonal, DERIVED), of("distance", AFFINE)),
        orthogonal(control("sharp", "mismatch", is_orthogonal, DERIVED), of("distance", FOLDED)),
        scaled(claim("scale", has_scale, DERIVED), AFFINE, SHARP),
        scaled(control("scale", "mismatch", has_scale, DERIVED), FOLDED, SHARP),
        scaled(control("scale", "flat", has_scale, DERIVED), Case(FLAT), FLAT),
    ]
    if config.candidates:
        fewest = {"candidates": min(config.candidates)}
        found += [
            orthogonal(claim("candidates", is_orthogonal, DERIVED), of("distance", MATCHED._replace(**fewest))),
            orthogonal(
                control("candidates", "marginal", is_orthogonal, DERIVED),
                of("distance", NON_UNIFORM._replace(**fewest)),
            ),
            linear(claim("candidates.linear", is_linear, DERIVED), of("unexplained", MATCHED._replace(**fewest))),
            linear(
                control("candidates.linear", "marginal", is_linear, DERIVED),
                of("unexplained", NON_UNIFORM._replace(**fewest)),
            ),
            law(claim("law", has_scale, DERIVED), [r for r in config.ratios if r <= 1]),
            law(control("law", "beyond", has_scale, DERIVED), [r for r in config.ratios if r >= 1]),
        ]
    return found
