r"""Time, memory and accuracy of randomised PCA and CCA beside scikit-learn's randomised PCA and a dense CCA.

    python -m benchmarks.spectral --preset quick

The data have a covariance that is known exactly: X = U diag(s) V^T + mean with columns of discrete cosine transforms as
U and V. So every contestant's error is measured against the truth: the sine of the largest angle to the true span, and
the largest relative error of a variance or correlation. scikit-learn runs twice: with its default number of power
iterations, and with the fewest of a list that reach the accuracy asked for. All take the same numpy array in float32.
Memory beyond the data is measured in fresh processes that load the data from a file.
"""

import multiprocessing
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.fft
import scipy.linalg
import tyro
from sklearn.decomposition import PCA as SklearnPCA
from tqdm import tqdm

from benchmarks import _timing
from theorykit.spectral import cca, pca

ACCURACY = 1e-4
MOST_MEMORY = 2  # GiB beyond the data
POWERS = (10, 15, 20, 25, 30, 40, 60)  # power iterations tried to reach the accuracy; the default is 7
COLUMNS = 128  # of the data, made at a time


class Plan(NamedTuple):
    """What a preset measures."""

    n: int
    d: int
    k: int
    views: tuple[int, int]  # dimensions of the two views for CCA
    spectra: tuple[str, ...]
    budget: _timing.Budget


QUICK = Plan(
    n=50_000,
    d=3072,
    k=32,
    views=(1536, 1536),  # the two halves of such data
    spectra=("gap", "power law"),
    budget=_timing.Budget(visits=3, visit_seconds=0.0, patience=120.0),
)
PLANS = {
    "smoke": QUICK._replace(
        n=600, d=200, k=4, views=(70, 60), budget=_timing.Budget(visits=2, visit_seconds=0.0, patience=10.0)
    ),
    "quick": QUICK,
    "full": QUICK._replace(views=(3072, 3072), budget=_timing.Budget(visits=7, visit_seconds=0.0, patience=600.0)),
}


class Truth(NamedTuple):
    """Data and what is to be found in them."""

    x: np.ndarray
    values: np.ndarray  # (k,) variances, or correlations
    basis: np.ndarray  # (d, k) components, or directions (not orthonormal)


def spectrum(name: str, d: int, k: int) -> np.ndarray:
    """Variances: k that stand out by a factor of 2 from a slow decay, or a power law 1/i without any gap."""
    i = np.arange(1, d + 1.0)
    return 1 / i if name == "power law" else np.r_[np.geomspace(1, 0.1, k), 0.05 * i[: d - k] ** -0.5]


def turned_cosines(d: int, rng: np.random.Generator) -> np.ndarray:
    """An orthogonal matrix (d, d): cosines with rows of random sign, in random order."""
    return (rng.choice([-1.0, 1.0], d)[:, None] * scipy.fft.idct(np.eye(d), axis=0, norm="ortho"))[
        :, rng.permutation(d)
    ]


def from_coordinates(coordinates: np.ndarray, n: int, order: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """Rows sqrt(n - 1) U coordinates + mean in float32, U the cosines of n points but the constant, in this order."""
    x = np.empty((n, coordinates.shape[1]), np.float32)
    for j in range(0, x.shape[1], COLUMNS):
        part = coordinates[:, j : j + COLUMNS]
        waves = np.zeros((n, part.shape[1]))
        waves[1 : len(part) + 1] = np.sqrt(n - 1) * part
        x[order, j : j + COLUMNS] = (
            scipy.fft.idct(waves, axis=0, norm="ortho", overwrite_x=True) + mean[j : j + COLUMNS]
        )
    return x


def pca_data(name: str, n: int, d: int, k: int) -> Truth:
    """Data with sample covariance V diag(variances) V^T, but for the rounding to float32."""
    rng = np.random.default_rng(0)
    variances, v = spectrum(name, d, k), turned_cosines(d, rng)
    x = from_coordinates(np.sqrt(variances)[:, None] * v.T, n, rng.permutation(n), rng.standard_normal(d))
    return Truth(x, variances[:k], v[:, :k])


def cca_data(n: int, dims: tuple[int, int], k: int) -> tuple[Truth, Truth]:
    """Two views with known canonical pairs, unrelated to their principal components, whose variances are 1/i."""
    rng = np.random.default_rng(1)
    dx, dy = dims
    rho = np.zeros(min(dims))
    rho[: 2 * k] = np.linspace(0.95, 0.05, 2 * k)
    order, truths = rng.permutation(n), []
    for view, d in enumerate(dims):
        # Waves 1 to dx are the variates of x; those of y are rho of the same and the rest of its own waves.
        latent = np.zeros((dx + dy, d))
        own = view * dx + np.arange(d)
        latent[own, np.arange(d)] = 1.0
        if view:
            shared = np.arange(len(rho))
            latent[shared, shared], latent[dx + shared, shared] = rho, np.sqrt(1 - rho**2)
        turn, v, roots = turned_cosines(d, rng), turned_cosines(d, rng), np.arange(1, d + 1.0) ** -0.5
        x = from_coordinates(latent @ (turn * roots[None, :]) @ v.T, n, order, rng.standard_normal(d))
        truths.append(Truth(x, rho[:k], (v / roots[None, :]) @ turn[:k].T))
    return truths[0], truths[1]


def sine(found: Any, truth: np.ndarray) -> float:
    """Sine of the largest angle between two spans."""
    u, v = (np.linalg.qr(np.asarray(basis, np.float64))[0] for basis in (found, truth))
    return float(np.linalg.norm(u - v @ (v.T @ u), 2))


def error(basis: Any, values: Any, truth: Truth) -> dict[str, float]:
    """How far the span and the values are from the truth."""
    relative = np.abs(np.asarray(values, np.float64) / truth.values - 1)
    return {"angle": sine(basis, truth.basis), "values": float(relative.max())}


def theorykit_pca(x: np.ndarray | jax.Array, k: int) -> pca.PCA:
    return pca.pca(x, k, method="randomised", key=jax.random.key(0), tolerance=ACCURACY)


def sklearn_pca(x: np.ndarray, k: int, power: int | Literal["auto"]) -> SklearnPCA:
    return SklearnPCA(k, svd_solver="randomized", iterated_power=power, random_state=0).fit(x)


def theorykit_cca(x: np.ndarray, y: np.ndarray, k: int) -> cca.CCA:
    return cca.cca(x, y, k, method="randomised", key=jax.random.key(0), tolerance=ACCURACY)


def dense_cca(x: np.ndarray, y: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What one writes by hand: the three covariances and their Cholesky factors."""
    x, y = x - x.mean(0), y - y.mean(0)
    sxx, syy, sxy = x.T @ x, y.T @ y, x.T @ y
    lx, ly = (scipy.linalg.cholesky(s, lower=True) for s in (sxx, syy))
    white = scipy.linalg.solve_triangular(lx, scipy.linalg.solve_triangular(ly, sxy.T, lower=True).T, lower=True)
    u, rho, vt = scipy.linalg.svd(white)
    a, b = (
        scipy.linalg.solve_triangular(factor, w, lower=True, trans="T")
        for factor, w in ((lx, u[:, :k]), (ly, vt[:k].T))
    )
    return a, b, rho[:k]


def enough(found: dict[str, float]) -> bool:
    return found["angle"] <= ACCURACY and found["values"] <= ACCURACY


def measure_pca(name: str, plan: Plan, folder: Path) -> dict[str, Any]:
    """Time all solvers on one spectrum in turn; then each alone, in a fresh process, for its memory."""
    load = _timing.load()
    truth = pca_data(name, plan.n, plan.d, plan.k)
    x, k = truth.x, plan.k
    start = time.perf_counter()
    jax.block_until_ready(theorykit_pca(x, k))
    first = time.perf_counter() - start
    tried, power = {}, None
    for candidate in ("auto", *POWERS):
        fitted = sklearn_pca(x, k, candidate)
        tried[str(candidate)] = error(fitted.components_.T, fitted.explained_variance_, truth)
        if enough(tried[str(candidate)]):
            power = candidate
            break
    contestants: dict[str, Callable] = {
        "theorykit": lambda: theorykit_pca(x, k),
        "scikit-learn": lambda: sklearn_pca(x, k, "auto"),
    }
    if power not in (None, "auto"):
        contestants["scikit-learn, accurate"] = lambda: sklearn_pca(x, k, power)
    on_device = jnp.asarray(x)
    contestants["theorykit, on device"] = lambda: theorykit_pca(on_device, k)
    samples = _timing.interleave(contestants, plan.budget, name)
    found = {}
    for title, sampled in samples.items():
        value = sampled.value
        ours = title.startswith("theorykit")
        basis, values = (
            (value.components, value.variances) if ours else (value.components_.T, value.explained_variance_)
        )
        found[title] = _times(sampled) | {"error": error(basis, values, truth)}
        if ours:
            found[title] |= {"status": int(value.status), "steps": int(value.steps), "bound": float(value.angle)}
    found["theorykit"]["compile_seconds"] = first - found["theorykit"]["seconds"]["median"]
    path = folder / "x.npy"
    np.save(path, x)
    for title in ("theorykit", "scikit-learn"):
        found[title]["alone"] = run_alone(measure_alone, title, [path], k)
    accurate = "scikit-learn" if power == "auto" else "scikit-learn, accurate" if power else None
    peers = [title for title in found if title.startswith("scikit-learn")]
    return {
        "spectrum": name,
        "load": [load, _timing.load()],
        "sklearn_errors_by_power_iterations": tried,
        "sklearn_power_iterations": power,
        "accurate_peer": accurate,
        "contestants": found,
        "times_faster": {peer: _timing.ratio(samples[peer].wall, samples["theorykit"].wall) for peer in peers},
        "times_less_cpu": {peer: _timing.ratio(samples[peer].cpu, samples["theorykit"].cpu) for peer in peers},
    }


def _times(sampled):
    return {"seconds": _timing.summary(sampled.wall), "cpu_seconds": _timing.summary(sampled.cpu)}


def measure_cca(plan: Plan, folder: Path) -> dict[str, Any]:
    """Randomised CCA beside the dense one; scikit-learn has no randomised CCA."""
    load = _timing.load()
    truths, k = cca_data(plan.n, plan.views, plan.k), plan.k
    x, y = (truth.x for truth in truths)
    samples = _timing.interleave(
        {"theorykit": lambda: theorykit_cca(x, y, k), "dense": lambda: dense_cca(x, y, k)},
        plan.budget._replace(visits=1),
        "cca",
    )
    ours, dense = samples["theorykit"].value, samples["dense"].value
    found = {}
    for title, (a, b, rho) in (
        ("theorykit", (ours.x_weights, ours.y_weights, ours.correlations)),
        ("dense", dense),
    ):
        errors = [error(basis, rho, truth) for basis, truth in zip((a, b), truths, strict=True)]
        worst = {name: max(one[name] for one in errors) for name in errors[0]}
        found[title] = _times(samples[title]) | {"error": worst}
    found["theorykit"] |= {"status": int(ours.status), "steps": int(ours.steps), "bound": float(ours.angle)}
    paths = [folder / "x.npy", folder / "y.npy"]
    for path, view in zip(paths, (x, y), strict=True):
        np.save(path, view)
    for title in ("theorykit", "dense"):
        found[title]["alone"] = run_alone(measure_alone, title, paths, k)
    return {
        "views": list(plan.views),
        "load": [load, _timing.load()],
        "contestants": found,
        "times_faster": {"dense": _timing.ratio(samples["dense"].wall, samples["theorykit"].wall)},
    }


def run_alone(function: Callable, *arguments: Any) -> Any:
    """Call a function of this module in a fresh interpreter."""
    with ProcessPoolExecutor(max_workers=1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def measure_alone(title: str, paths: list[Path], k: int) -> dict[str, int]:
    """Peak memory beyond interpreter and data, compilation included; one view is for PCA, two are for CCA."""
    jax.block_until_ready(jnp.zeros(()))  # the backend
    data = [np.load(path) for path in paths]
    before = _timing.peak_resident()
    if title == "theorykit":
        jax.block_until_ready((theorykit_pca if len(data) == 1 else theorykit_cca)(*data, k))
    elif title == "dense":
        dense_cca(*data, k)
    else:
        sklearn_pca(*data, k, "auto")
    return {"data_bytes": sum(array.nbytes for array in data), "increase_bytes": _timing.peak_resident() - before}


def run(plan: Plan) -> dict[str, Any]:
    """Everything that a preset measures."""
    start = time.perf_counter()
    content: dict[str, Any] = {
        "settings": {
            **plan.budget._asdict(),
            "n": plan.n,
            "d": plan.d,
            "k": plan.k,
            "dtype": "float32",
            "accuracy": ACCURACY,
            "power_iterations_tried": list(POWERS),
        },
        "pca": [],
    }
    steps = tqdm(total=len(plan.spectra) + 1, desc="spectral", unit="case")
    with tempfile.TemporaryDirectory() as folder:
        for name in plan.spectra:
            steps.set_postfix_str(name)
            content["pca"].append(measure_pca(name, plan, Path(folder)))
            steps.update()
        steps.set_postfix_str("cca")
        content["cca"] = measure_cca(plan, Path(folder))
        steps.update()
    steps.close()
    content["seconds"] = time.perf_counter() - start
    content["targets"] = targets(content)
    return content


def targets(content: dict[str, Any]) -> list[dict[str, Any]]:
    """The figures to reach."""

    def at_most(statement, limit, value):
        return _timing.target(statement, limit, {"median": value, "low": value, "high": value}, at_least=False)

    found = []
    for case in [*content["pca"], content["cca"]]:
        title = f"PCA, {case['spectrum']}" if "spectrum" in case else "CCA"
        ours = case["contestants"]["theorykit"]
        for name, value in ours["error"].items():
            found.append(at_most(f"{title}: error of the {name} at most {ACCURACY:g}", ACCURACY, value))
        memory = ours["alone"]["increase_bytes"] / 2**30
        found.append(at_most(f"{title}: below {MOST_MEMORY} GiB beyond the data", MOST_MEMORY, memory))
        # scikit-learn has no randomised CCA; how the dense one compares is reported and no figure to reach.
        for peer, quotient in case["times_faster"].items() if "spectrum" in case else ():
            accuracy = case["contestants"][peer]["error"]["angle"]
            statement = f"{title}: faster than {peer} (whose angle is {accuracy:.1g})"
            found.append(_timing.target(statement, 1.0, quotient, at_least=True))
    return found


def main(preset: Literal["smoke", "quick", "full"] = "quick", output: Path = _timing.RESULTS) -> None:
    """Measure, print what matters and write the JSON file.

    Parameters
    ----------
    preset
        smoke: seconds, only to see that it works; quick: the figures to reach; full: more visits and wider views.
    output
        Folder of the JSON file.
    """
    content = run(PLANS[preset])
    path = _timing.write("spectral", preset, output, content)
    for case in [*content["pca"], content["cca"]]:
        print(case.get("spectrum", "cca"))
        for name, found in case["contestants"].items():
            memory = f"{found['alone']['increase_bytes'] / 2**20:8.0f} MiB" if "alone" in found else ""
            errors = f"angle {found['error']['angle']:.1e}, values {found['error']['values']:.1e}"
            print(f"    {name:24s} {found['seconds']['median']:9.3f} s   {errors} {memory}")
    _timing.print_targets(content["targets"])
    print(f"{content['seconds']:.0f} s in all, written to {path}")


if __name__ == "__main__":
    tyro.cli(main)
