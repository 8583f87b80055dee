"""Small problems with closed-form optima, for `spectral_optima`: their data, losses and predictions.

A problem is a loss of parameters and data of one instance. All problems and instances are trained as one sum: their
parameters are separate, so descent on the sum is descent on each, and it compiles once. In the second half of the
instances, the controls, one assumption of the closed form is broken.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from theorykit import losses
from theorykit.similarity import dot
from theorykit.spectral import contrastive, eigenmaps

POINTS, DIMENSION = 8, 3  # values that a view takes; dimension of the embeddings
PAIRS = 24  # unordered pairs that a batch lists
ALPHABET = 3  # points of the problems with free scores, whose batches of two are enumerated
TRIPLETS, FEATURES = 5, 2  # of the kernel problem
INPUTS = 4  # of linear encoders
INVARIANCE, RIDGE = 0.4, 0.02  # beta and lambda of the VICReg-like loss
# Least distance of the eigenvalues that are kept from the others: descent takes steps in proportion to its inverse.
GAP = 0.05
# Step sizes under Nesterov momentum 0.9, at most half of those at which one of 256 draws diverged or oscillated.
RATES = {"S1": 0.5, "S3": 0.1, "S4": 1.0, "S6": 0.2, "S7": 0.01, "S8": 0.2, "S11": 0.5, "S15": 0.1}
CLASSES = 3
# What is compared as a subspace: the dimension of the space that its constraints leave, and its own.
SPANS = {
    "S1": (INPUTS, 1),
    "S3": (POINTS, DIMENSION),
    "S6": (3 * TRIPLETS, FEATURES),
    "S7": (INPUTS, DIMENSION),  # linear functions of the inputs
    "S8": (POINTS - 1, DIMENSION),  # centred
}


def draw(seed: int, count: int) -> tuple[dict, dict]:
    """Parameters and data of 2 `count` instances, the second half controls: trees by problem, instances leading."""
    drawn = [_instance(np.random.default_rng((seed, i)), i >= count) for i in range(2 * count)]
    return jax.tree.map(lambda *leaves: jnp.asarray(np.stack(leaves)), *drawn)


def _instance(rng, broken):
    broken = float(broken)
    one_way = _listed(rng, both_orders=False)
    pairs, inputs = _separated_pairs(rng)
    small, other = (rng.dirichlet(5 * np.ones(ALPHABET**2)) for _ in range(2))
    params = {
        "S1": [rng.standard_normal((3, INPUTS)), rng.standard_normal((2, 3))],
        "S3": 0.3 * rng.standard_normal((POINTS, DIMENSION)),
        "S4": {name: np.zeros((ALPHABET, ALPHABET)) for name in ("spectral", "logistic", "info_nce")},
        "S6": rng.standard_normal((TRIPLETS * 3, FEATURES)),
        "S7": 0.3 * rng.standard_normal((INPUTS, DIMENSION)),
        "S8": rng.standard_normal((POINTS, DIMENSION)),
        "S11": 0.3 * rng.standard_normal((POINTS, 2)),
        # Two runs, one of them with unequal sizes of f and g, which descent conserves.
        "S15": [
            np.array([[[1.0]], [[2.0]]]) * 0.3 * rng.standard_normal((2, POINTS, DIMENSION)),
            np.array([[[1.0]], [[0.5]]]) * 0.3 * rng.standard_normal((2, POINTS, DIMENSION)),
        ],
    }
    data = {
        "S1": _covariance(rng) | {"broken": broken},
        "S3": one_way if broken else pairs,
        "S4": {"joint": small, "second": other if broken else small, "broken": broken},
        "S6": {"points": _separated_points(rng), "broken": broken},
        "S7": pairs | {"inputs": inputs, "broken": broken},
        "S8": pairs | {"broken": broken},
        "S11": {
            "prior": rng.dirichlet(5 * np.ones(CLASSES)),
            "conditionals": rng.dirichlet(0.5 * np.ones(POINTS), size=CLASSES),
        },
        "S15": one_way,
    }
    return params, data


def _covariance(rng):
    """Triplets and their contrastive covariance at a random linear map, in units of its leading eigenvalue."""
    while True:
        x = rng.standard_normal((POINTS, INPUTS)) * rng.uniform(0.3, 1.5, INPUTS)
        p = x + 0.3 * rng.standard_normal(x.shape)
        negatives = np.stack([np.delete(x, i, axis=0) for i in range(POINTS)])
        w = rng.standard_normal((2, INPUTS)) / np.sqrt(INPUTS)
        near, far = (x - p) @ w.T, (x[:, None] - negatives) @ w.T
        odds = np.exp((np.sum(near**2, axis=1)[:, None] - np.sum(far**2, axis=2)) / 2)
        weights = odds / (1 + np.sum(odds, axis=1, keepdims=True))
        apart, together = x[:, None] - negatives, x - p
        covariance = np.einsum("ij,ijd,ije->de", weights, apart, apart)
        covariance -= np.einsum("ij,id,ie->de", weights, together, together)
        values = np.linalg.eigvalsh(covariance)
        if values[-1] - max(values[-2], 0) > GAP * values[-1]:
            return {"x": x, "p": p, "covariance": covariance / values[-1], "scale": values[-1]}


def _separated_points(rng):
    """S6: kernel features of points, anchors, positives and negatives in turn, whose form has an eigengap."""
    while True:
        inputs = rng.standard_normal((TRIPLETS * 3, INPUTS))
        values, vectors = np.linalg.eigh(np.exp(-np.sum((inputs[:, None] - inputs) ** 2, axis=2) / INPUTS))
        points = vectors * np.sqrt(np.maximum(values, 0))
        anchors, positives, negatives = np.split(points, 3)
        form = anchors.T @ (negatives - positives)
        values = np.linalg.eigvalsh((form + form.T) / 2)
        if values[FEATURES] - values[FEATURES - 1] > GAP:
            return points


def _separated_pairs(rng):
    """S7, S8: pairs, and inputs of linear encoders, so that both problems have an eigengap."""
    while True:
        pairs, inputs = _listed(rng, both_orders=True), rng.standard_normal((POINTS, INPUTS))
        joint = pairs["a"].T @ pairs["b"] / len(pairs["a"])
        root = np.sqrt(joint.sum(1))
        basis, scale, _ = np.linalg.svd(root[:, None] * inputs, full_matrices=False)
        adjacency = joint / np.where(root > 0, root, 1)[:, None] / np.where(root > 0, root, 1)
        moment = INVARIANCE * basis.T @ adjacency @ basis - np.diag(RIDGE / np.maximum(scale, 1e-6) ** 2)
        moment = np.linalg.eigvalsh(moment)[::-1] + 1 - INVARIANCE
        # In units of the mean mass of a point.
        smooth = POINTS * np.linalg.eigvalsh(np.diag(joint.sum(1)) - joint)
        gaps = moment[DIMENSION - 1] - max(moment[DIMENSION], 0), smooth[DIMENSION + 1] - smooth[DIMENSION]
        # S7 descends in w, not in embeddings: at a speed in proportion to the least second moment of the inputs too.
        if min(gaps) > GAP and scale[-1] ** 2 > 2 * GAP:
            return pairs, inputs


def _listed(rng, both_orders):
    """A batch of pairs as one-hot rows a and b; in both orders, or one way with different marginals."""
    while True:
        weights = rng.gamma(0.5, size=(POINTS, POINTS)).ravel()
        a, b = np.divmod(rng.choice(POINTS**2, size=PAIRS * (2 - both_orders), p=weights / weights.sum()), POINTS)
        if both_orders:
            a, b = np.concatenate([a, b]), np.concatenate([b, a])
        a, b = np.eye(POINTS)[a], np.eye(POINTS)[b]
        mass = np.sqrt(np.outer(a.sum(0), b.sum(0)))
        values = np.linalg.svd((a.T @ b) / np.where(mass > 0, mass, 1), compute_uv=False)
        if both_orders:
            values = np.linalg.eigvalsh((a.T @ b) / np.where(mass > 0, mass, 1))[::-1]
        if values[DIMENSION - 1] - max(values[DIMENSION], 0) > GAP:
            return {"a": a, "b": b}


def _rank_one(layers, data):
    """S1: a deep linear net of layers of unit norm, weights alpha fixed; broken: weights that move with the net."""
    first, second = (layer / jnp.linalg.norm(layer) for layer in layers)
    w = second @ first
    a, p = data["x"] @ w.T, data["p"] @ w.T
    moving = contrastive.pair_loss(a, p, contrastive.others(a), phi=jnp.log1p, psi=jnp.exp) / data["scale"]
    return _either(data, -jnp.trace(w @ data["covariance"] @ w.T) / 2, moving)


def _spectral(f, data):
    """S3: free embeddings; broken (by the data): pairs one way, so that the views differ in their marginals."""
    return losses.spectral(data["a"] @ f, data["b"] @ f)


def _free_scores(tables, data):
    """S4: one table of scores for each loss; broken: negatives that are no independent draws of the marginal.

    For the logistic loss and InfoNCE these come from another joint; for the spectral loss batches of two pairs have
    the positive of an anchor, i = j, among its negatives.
    """
    joint, second = (data[name].reshape(ALPHABET, ALPHABET) for name in ("joint", "second"))
    chances = jnp.outer(joint, second).ravel()
    # All batches of two pairs, as one-hot rows: (views, batches, pairs, points).
    unit = np.eye(ALPHABET)
    a, b = jnp.asarray(unit[np.indices((ALPHABET,) * 4).reshape(2, 2, -1).transpose(1, 2, 0)])

    def expected(loss, s):
        return chances @ jax.vmap(partial(loss, similarity=dot))(a @ s, b)

    spectral = contrastive.spectral_loss(joint, tables["spectral"], jnp.asarray(unit))
    return (
        _either(data, spectral, expected(losses.spectral, tables["spectral"]))
        + expected(losses.logistic, tables["logistic"])
        + expected(losses.info_nce, tables["info_nce"])
    )


def _triplets(w, data):
    """S6: orthonormal kernel features; broken: features of unit norm that need not be orthogonal."""
    x, p, n = jnp.split(data["points"] @ _features(w, data), 3)
    return TRIPLETS * losses.linear(x, p, n)


def _features(w, data):
    return _either(data, _orthonormal(w), _unit(w))


def _second_moment(w, data):
    """S7: a linear encoder with weight decay; broken: a centred second moment, which is a covariance."""
    f = data["inputs"] @ w
    a, b = data["a"] @ f, data["b"] @ f
    mean = jnp.mean(a, axis=0)
    gap = a.T @ a / len(a) - _either(data, 0.0, jnp.outer(mean, mean)) - jnp.eye(DIMENSION)
    return INVARIANCE * _invariance(a, b) + jnp.sum(gap**2) + 2 * RIDGE * jnp.sum(w**2)


def _white(z, data):
    """S8: white free embeddings of all points, over the listed edges; broken: not centred."""
    z = _whitened(z, data)
    return _invariance(data["a"] @ z, data["b"] @ z)


def _whitened(z, data):
    return jnp.sqrt(float(POINTS)) * _orthonormal(z - _either(data, jnp.mean(z, axis=0), 0.0))


def _orthonormal(w):
    """Gram-Schmidt, twice: as exact as a QR decomposition for these few columns (see `one_by_one` for why not that)."""
    columns = []
    for column in w.T:
        for previous in 2 * columns:
            column -= (previous @ column) * previous
        columns.append(column / jnp.linalg.norm(column))
    return jnp.stack(columns, axis=1)


def _unit(columns):
    return columns / jnp.linalg.norm(columns, axis=0, keepdims=True)


def _classes(f, data):
    """S11: the contrastive loss of classes."""
    return collision(data["prior"], data["conditionals"], f).unsupervised


def _two_encoders(views, data):
    """S15: two runs, each with one encoder for each view."""
    runs = jax.vmap(lambda f, g: losses.spectral(data["a"] @ f, data["b"] @ g))(*views)
    return jnp.sum(runs)


def _either(data, sound, broken):
    return (1 - data["broken"]) * sound + data["broken"] * broken


def _invariance(a, b):
    """E |a - b|^2, the first term of `losses.vicreg` (the others, times 0, would take long to compile)."""
    return jnp.sum((a - b) ** 2) / len(a)


def logistic(margins):
    """The logistic loss with l(0) = 1."""
    return jax.nn.softplus(-margins) / np.log(2)


def collision(prior, conditionals, f, loss=logistic):
    return contrastive.class_collision(prior, conditionals, f, loss=loss)


LOSSES = {
    "S1": _rank_one,
    "S3": _spectral,
    "S4": _free_scores,
    "S6": _triplets,
    "S7": _second_moment,
    "S8": _white,
    "S11": _classes,
    "S15": _two_encoders,
}


def values(params: dict, data: dict) -> dict:
    """Losses of all instances, each (instances,)."""
    return {name: jax.vmap(loss)(params[name], data[name]) for name, loss in LOSSES.items()}


def total(params: dict, data: dict) -> jax.Array:
    """What is trained: all losses, times their step sizes, summed."""
    return sum(RATES[name] * jnp.sum(value) for name, value in values(params, data).items())


def one_by_one(function, instances):
    """`jax.vmap(function)`, one instance after the other.

    On the CPU a program with several decompositions of batches can hang: each waits for threads of the pool in which
    the others wait. Decompositions of single matrices take no further threads.
    """
    return jax.lax.map(function, instances)


def predictions(data: dict) -> dict:
    """What the closed forms say of all instances, instances leading, by problem and quantity."""
    return one_by_one(_predicted, data)


def _predicted(data):
    vector = jnp.linalg.eigh(data["S1"]["covariance"])[1][:, -1]
    joint = {name: data[name]["a"].T @ data[name]["b"] / len(data[name]["a"]) for name in ("S3", "S7", "S8", "S15")}
    best = contrastive.spectral_optimum(joint["S3"], DIMENSION)
    kernel = contrastive.pair_kernel(data["S4"]["joint"].reshape(ALPHABET, ALPHABET))
    points, inputs = data["S6"]["points"], data["S7"]["inputs"]
    triplets = contrastive.kernel_contrastive(points @ points.T, FEATURES)
    moment = eigenmaps.vicreg_optimum(joint["S7"], inputs @ inputs.T, DIMENSION, invariance=INVARIANCE, ridge=RIDGE)
    smooth = eigenmaps.laplacian_eigenmaps(joint["S8"], DIMENSION)
    two = contrastive.cross_spectral_optimum(joint["S15"], DIMENSION)
    return {
        "S1": {"gram": jnp.outer(vector, vector), "span": vector[:, None]},
        "S3": {
            "loss": best.loss,
            "gram": _gram(_weighted(best.fa, data["S3"]["a"])),
            "span": _unit(_weighted(best.fa, data["S3"]["a"])),
        },
        "S4": {"spectral": kernel, "logistic": jnp.log(kernel), "info_nce": _centred(jnp.log(kernel))},
        "S6": {
            "loss": triplets.loss,
            "gram": _gram(points @ points.T @ triplets.coefficients),
            "span": points.T @ triplets.coefficients,
        },
        "S7": {
            "loss": moment.loss,
            "gram": _gram(moment.embeddings),
            "span": _unit(_weighted(moment.embeddings, data["S7"]["a"])),
        },
        "S8": {"loss": smooth.energy, "gram": _gram(smooth.embeddings), "span": smooth.embeddings / np.sqrt(POINTS)},
        "S15": {"loss": two.loss, "scores": _scores(two.fa, two.fb, data["S15"])},
    }


def spans(params: dict, data: dict) -> dict:
    """Orthonormal bases of what one instance of each problem of SPANS has learnt, (rows, dimension) each.

    S1: the leading direction of inputs; S6: feature space; S3, S7, S8: embeddings of all points, S3 and S7 as rows of
    sqrt(p).
    """
    w = params["S1"][1] @ params["S1"][0]
    # The larger eigenvector of the symmetric 2 x 2 matrix W W^T, by its angle.
    moment = w @ w.T
    angle = jnp.arctan2(2 * moment[0, 1], moment[0, 0] - moment[1, 1]) / 2
    return {
        "S1": _orthonormal(w.T @ jnp.stack([jnp.cos(angle), jnp.sin(angle)])[:, None]),
        "S3": _orthonormal(_weighted(params["S3"], data["S3"]["a"])),
        "S6": _orthonormal(params["S6"]),
        "S7": _orthonormal(_weighted(data["S7"]["inputs"] @ params["S7"], data["S7"]["a"])),
        "S8": _orthonormal(params["S8"] - jnp.mean(params["S8"], axis=0)),
    }


def reached(params: dict, data: dict) -> dict:
    """The same of the trained parameters; of S15 for both runs, with F, F F^T and the projector, instances leading."""
    return one_by_one(lambda instance: _reached(*instance), (params, data))


def _reached(params, data):
    first, second = (layer / jnp.linalg.norm(layer) for layer in params["S1"])
    tables, batch = params["S4"], data["S15"]
    f = jax.vmap(lambda f: _weighted(f, batch["a"]))(params["S15"][0])
    basis = jnp.stack([jnp.linalg.qr(run)[0] for run in f])
    return {
        "S1": {"gram": first.T @ second.T @ second @ first},
        "S3": {"gram": _gram(_weighted(params["S3"], data["S3"]["a"]))},
        "S4": {
            "spectral": tables["spectral"],
            "logistic": tables["logistic"],
            "info_nce": _centred(tables["info_nce"]),
        },
        "S6": {"gram": _gram(data["S6"]["points"] @ _features(params["S6"], data["S6"]))},
        "S7": {"gram": _gram(data["S7"]["inputs"] @ params["S7"])},
        "S8": {"gram": _gram(_whitened(params["S8"], data["S8"]))},
        "S15": {
            "scores": jax.vmap(lambda f, g: _scores(f, g, batch))(*params["S15"]),
            "coordinates": f,
            "gram": f @ f.transpose(0, 2, 1),
            "projector": basis @ basis.transpose(0, 2, 1),
        },
        "S11": collision(data["S11"]["prior"], data["S11"]["conditionals"], params["S11"])._asdict(),
    }


def _weighted(f, view):
    """Rows sqrt(p(a)) f(a)."""
    return jnp.sqrt(jnp.mean(view, axis=0))[:, None] * f


def _gram(rows):
    return rows @ rows.T


def _scores(f, g, batch):
    return _weighted(f, batch["a"]) @ _weighted(g, batch["b"]).T


def _centred(scores):
    """InfoNCE leaves a constant for each anchor open."""
    return scores - jnp.mean(scores, axis=1, keepdims=True)
