"""S2 in numbers: flows of one and two linear layers, adaptive and in closed form, and training until collapse."""

from functools import partial

import diffrax
import jax
import jax.numpy as jnp
import numpy as np

from experiments import _setting
from theorykit import training
from theorykit.spectral import collapse

VANISHING = 2  # axes with the strong augmentation
# The adaptive flows are solved to more digits than the 1e-9 to which identities are checked.
SOLVER = diffrax.PIDController(rtol=1e-12, atol=1e-15)
MAX_STEPS = 2**14


@partial(jax.jit, static_argnums=0)
def adaptive_flow(velocity, start, args, times):
    """Solve dy/dt = velocity(y, args) for a batch of problems; not-a-number where a solve does not finish."""

    def solve(start, args):
        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(lambda _, y, args: velocity(y, args)),
            diffrax.Tsit5(),
            t0=0.0,
            t1=times[-1],
            dt0=None,
            y0=start,
            args=args,
            saveat=diffrax.SaveAt(ts=times),
            stepsize_controller=SOLVER,
            max_steps=MAX_STEPS,
            throw=False,
        )
        finished = solution.result == diffrax.RESULTS.successful
        return jax.tree.map(lambda y: jnp.where(finished, y, jnp.nan), solution.ys)

    return jax.vmap(solve)(start, args)


def _anchors(config, samples, noise):
    """Anchors of unit variance and their augmentations, (seeds, samples, inputs) each.

    The noise of the augmentation has standard deviation `noise` along the last axes of a random frame, `weak` along the
    others. Draws are NumPy's here: for few numbers its generator saves seconds of compiling JAX's.
    """
    rng = np.random.default_rng(31)
    strengths = np.full(config.inputs, config.weak)
    strengths[-VANISHING:] = noise
    a, moved = rng.standard_normal((2, config.seeds, samples, config.inputs))
    return a, a + (moved * strengths) @ _frames(rng, config).swapaxes(1, 2)


def _frames(rng, config):
    return np.linalg.qr(rng.standard_normal((config.seeds, config.inputs, config.inputs)))[0]


def _force(w, problem):
    """Minus the gradient on W, without the closed form: of the quadratic loss at the present or at frozen weights."""
    a, b, alpha, frozen = problem
    alpha = jnp.where(frozen, alpha, collapse.softmax_weights(a @ w.T, b @ w.T))

    def loss(w):
        z = a @ w.T
        apart = jnp.sum((z[:, None] - z[None]) ** 2, axis=2) * (1 - jnp.eye(len(a)))
        moved = jnp.sum((b @ w.T - z) ** 2, axis=1)
        return (jnp.sum((1 - jnp.diagonal(alpha)) * moved) - jnp.sum(alpha * apart)) / (2 * len(a))

    return -jax.grad(loss)(w)


def _force_on_layers(layers, problem):
    """The same on two layers by the chain rule, with weight decay; the second one may be held."""
    *single, decay, held = problem
    w1, w2 = layers
    _, pull = jax.vjp(lambda w1, w2: w2 @ w1, w1, w2)
    push1, push2 = pull(_force(w2 @ w1, single))
    return push1 - decay * w1, jnp.where(held, 0.0, push2 - decay * w2)


# Flows of two layers: whether X is frozen, whether there is weight decay, whether the second layer is held at I, and
# whether the singular vectors of the first one are those of X and of the second.
CASES = {
    "frozen": (True, False, True, False),
    "moving": (False, False, True, False),
    "flow": (False, False, False, False),
    "decay": (False, True, False, False),
    "aligned": (True, False, False, True),
    "other": (True, False, False, False),
}


def flows(config):
    """Both sides of S2's identities, seeds first: what flows do, named after their case, and what the theory says."""
    a, b = _anchors(config, config.flow_samples, config.strong)
    rng, times = np.random.default_rng(32), np.linspace(0.0, config.flow_time, 6)
    shared, left, turned = (_frames(rng, config) for _ in range(3))
    s1, s2 = rng.uniform(0.1, 0.5, (2, config.seeds, config.inputs))
    uniform = np.full((len(a), a.shape[1], a.shape[1]), 1 / a.shape[1])
    eigenvalues, basis = np.linalg.eigh(_drifts(a, b, uniform))
    first = {flag: u * s1[:, None, :] @ basis.swapaxes(1, 2) for flag, u in ((True, shared), (False, turned))}
    eye = np.broadcast_to(np.eye(config.inputs), shared.shape)
    second = {True: eye, False: left * s2[:, None, :] @ shared.swapaxes(1, 2)}
    gradient, alpha, drift, frozen, modes = _closed_forms(first[False], a, b, times, eigenvalues, s1, s2)
    found = {
        "gradient/loss": -gradient,
        "gradient/softmax": first[False] @ drift,
        "gradient/uniform": first[False] @ _drifts(a, b, uniform),
        "weights/predicted": frozen,
        "modes/predicted": np.sort(np.square(modes), axis=-1)[..., ::-1],
    }
    frozen, decayed, held, aligned = (list(flags) for flags in zip(*CASES.values(), strict=True))
    per_case = lambda flags: np.repeat(np.array(flags), config.seeds)  # noqa: E731
    problem = (
        *(np.concatenate([views] * len(CASES)) for views in (a, b)),
        np.concatenate([alpha if flag else uniform for flag in held]),
        per_case(frozen),
        config.decay * per_case(decayed),
        per_case(held),
    )
    starts = tuple(np.concatenate([w[flag] for flag in flags]) for w, flags in ((first, aligned), (second, held)))
    layers = [np.split(np.asarray(w), len(CASES)) for w in adaptive_flow(_force_on_layers, starts, problem, times)]
    for case, w1, w2 in zip(CASES, *layers, strict=True):
        if case in ("frozen", "moving"):
            found[f"weights/{case}"] = w1
        elif case in ("flow", "decay"):
            found[f"conserved/{case}"] = jax.vmap(jax.vmap(collapse.conserved))(w1, w2)
        else:
            found[f"modes/{case}"] = np.linalg.svd(np.stack([w1, w2]), compute_uv=False) ** 2
    return found


_drifts = jax.jit(jax.vmap(collapse.drift_matrix))


@jax.jit
def _closed_forms(w, a, b, times, eigenvalues, s1, s2):
    """Gradient of the loss, softmax weights, X, the frozen flow, and modes of two aligned layers, for all seeds."""
    loss = lambda w, a, b: collapse.squared_distance_loss(a @ w.T, b @ w.T)  # noqa: E731
    alpha = jax.vmap(lambda w, a, b: collapse.softmax_weights(a @ w.T, b @ w.T))(w, a, b)
    drift = jax.vmap(collapse.drift_matrix)(a, b, alpha)
    frozen = jax.vmap(collapse.frozen_flow, (0, 0, None))(w, drift, times)
    modes = jax.vmap(collapse.two_layer_modes, (None, 0, 0, 0))(times, eigenvalues, s1, s2)
    return jax.vmap(jax.grad(loss))(w, a, b), alpha, drift, frozen, modes


def trained(config):
    """Train; singular values of W (seeds, t, m), eigenvalues of X at the start (seeds, m), W if X stayed frozen."""
    found = {}
    for label, noise in (("strong", config.strong), ("mild", config.mild)):
        a, b = _anchors(config, config.samples, noise)
        w0 = config.collapse_start * np.random.default_rng(33).standard_normal((config.seeds, *[config.inputs] * 2))
        steps = round(config.collapse_time / config.collapse_rate)
        run = training.train(
            _contrastive_loss_of_all_seeds,
            w0,
            (a.swapaxes(0, 1), b.swapaxes(0, 1)),
            optimizer=_setting.descent(config.collapse_rate),
            steps=steps,
            metrics=itself,
            metric_steps=np.unique(np.geomspace(1, steps, 40).astype(int)).tolist(),
            progress=False,
        )
        times = config.collapse_rate * np.asarray(run.metric_steps)
        drift, frozen = _frozen(w0, a, b, times)
        found |= {
            "collapse/times": times,
            f"collapse/singular/{label}": np.linalg.svd(np.asarray(run.metrics), compute_uv=False).swapaxes(0, 1),
            f"collapse/frozen/{label}": np.linalg.svd(np.asarray(frozen), compute_uv=False),
            f"collapse/drift/{label}": np.linalg.eigvalsh(np.asarray(drift)),
        }
    return found


@jax.jit
def _frozen(w0, a, b, times):
    """X at the start, and the weights if it stayed."""
    alpha = jax.vmap(lambda w, a, b: collapse.softmax_weights(a @ w.T, b @ w.T))(w0, a, b)
    drift = jax.vmap(collapse.drift_matrix)(a, b, alpha)
    return drift, jax.vmap(collapse.frozen_flow, (0, 0, None))(w0, drift, times)


def itself(params):
    return params


def _contrastive_loss_of_all_seeds(w, views):
    za, zb = (jnp.einsum("nsm,sdm->snd", x, w, precision="highest") for x in views)
    return jnp.sum(jax.vmap(collapse.squared_distance_loss)(za, zb))
