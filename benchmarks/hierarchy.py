r"""Message passing on the hierarchical model against a straightforward PyTorch version, both on the CPU.

    python -m benchmarks.hierarchy --preset quick

The peer runs the same recursions over all nodes of a layer at once, and passes the edges of a layer in two ways:

    logsumexp    torch.logsumexp of kernel plus message, S^2 exponentials for each edge
    products     logarithm of a matrix product of the exponentials below the largest, S for each edge, as in the code
                 published with Oko, Lin, Cai, Mei (arXiv 2501.04641), which goes from node to node

Each is timed with all threads and with one: on a machine with other work, threads that wait for each other can cost a
factor of ten. The faster of the two counts. The three tasks take turns with their peers, on the same kernels and
samples, in float32:

    similarity   s* of pairs, both trees towards the root
    denoising    image leaves from noisy ones, the text given: both trees towards the root, the image's back
    next token   all positions of the text, the image given: both towards the root, the text's back

With --published FOLDER, a checkout of that code (github.com/willcai7/Multimodal-GHM), its own belief propagation takes
part in the similarity: NumPy, in float64, node by node, all samples of a batch at once.

Every value must agree with the peer's to the rounding of float32, or the benchmark fails. PyTorch is no dependency of
the library: install it beside it (pip install torch), or only theorykit is timed.
"""

import importlib.util
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from tqdm import tqdm

from benchmarks import _pytorch, _timing
from theorykit.surrogate import hierarchy

LEAST_RATIO = 5.0  # of the throughputs, at the paper's scale
NOISE, SIGMA = 0.1, 1.0
# Messages pass 2 x depth layers, each with sums of `arity` logarithms and of S terms; logarithms are at most about
# depth x ln(1 / smallest entry) = depth x 12 in size. Relative to values of order 1.
TERM = 12.0


class Case(NamedTuple):
    """One size: S, L, m of both trees, and samples of a batch."""

    alphabet: int
    depth: int
    arity: int
    batch: int


class Plan(NamedTuple):
    """What a preset measures."""

    targets: tuple[Case, ...]
    cases: tuple[Case, ...]  # further ones
    budget: _timing.Budget


# 81 + 81 leaves, in batches of the paper's size and of one that leaves less to the overhead of a call.
PAPER = tuple(Case(10, 4, 3, batch) for batch in (1024, 128))
LARGE = PAPER[0]._replace(batch=8192)
PLANS = {
    "smoke": Plan((), (Case(3, 2, 2, 16),), _timing.Budget(visits=2, visit_seconds=0.0, patience=5.0)),
    "quick": Plan(
        PAPER,
        (LARGE,),
        _timing.Budget(visits=7, visit_seconds=0.3, patience=10.0),
    ),
    "full": Plan(
        PAPER,
        (LARGE, Case(32, 3, 4, 256), Case(3, 8, 2, 256)),
        _timing.Budget(visits=20, visit_seconds=1.0, patience=60.0),
    ),
}


class Problem(NamedTuple):
    """A hierarchy, samples of it, and noisy images."""

    h: hierarchy.Hierarchy
    image: jax.Array
    text: jax.Array
    noisy: jax.Array


def draw(case: Case) -> Problem:
    """What both sides compute with."""
    for_kernels, for_samples, for_noise = jax.random.split(jax.random.key(case.depth), 3)
    h = hierarchy.random_hierarchy(for_kernels, case.alphabet, case.depth, case.arity, NOISE)
    _, image, text = hierarchy.sample(h, for_samples, case.batch)
    return Problem(h, image, text, image + SIGMA * jax.random.normal(for_noise, image.shape))


def ours(problem: Problem) -> dict[str, Callable[[], jax.Array]]:
    """The library's functions, checks of their input included."""
    h, image, text, noisy = problem
    return {
        "similarity": lambda: hierarchy.similarity(h, image, text),
        "denoising": lambda: hierarchy.denoise(h, noisy, SIGMA, given=text),
        "next token": lambda: hierarchy.next_token(h, text, image=image),
    }


def by_logsumexp(log_kernel, h):
    """ln(M e^h) for the logarithms of a layer's kernels, (m, S, S), and h (parents, m, S, n)."""
    import torch

    return torch.logsumexp(log_kernel[..., None] + h[:, :, None], dim=3)


def by_products(log_kernel, h):
    """The same up to a constant for each node, which no posterior sees."""
    import torch

    return torch.log(torch.exp(log_kernel) @ torch.exp(h - h.amax(dim=2, keepdim=True)))


PUBLISHED = "similarity, published code"
PASSES = {"logsumexp": by_logsumexp, "products": by_products}


def peers(problem: Problem) -> dict[str, dict[str, Callable[[], Any]]]:
    """Each task by PyTorch, in each of PASSES and on each number of threads."""
    import torch

    def with_threads(function, threads):
        torch.set_num_threads(threads)
        with torch.inference_mode():
            return function()

    found: dict[str, dict[str, Callable[[], Any]]] = {}
    for way, through in PASSES.items():
        for task, function in peer(problem, through).items():
            for threads in _pytorch.THREADS:
                name = f"{task}, {_pytorch.name(threads)}, {way}"
                found.setdefault(task, {})[name] = partial(with_threads, function, threads)
    return found


def peer(problem: Problem, through: Callable) -> dict[str, Callable[[], Any]]:
    """The library's functions in PyTorch: messages (parents, m, S, n), all edges of a layer by `through`."""
    import torch

    log_image, log_text = (torch.log(torch.from_numpy(np.array(kernels))) for kernels in problem.h[:2])
    arity, symbols = log_image.shape[1:3]
    # Samples last: this is what PyTorch is fastest with, in both ways.
    image, text, noisy = (
        torch.from_numpy(np.array(leaves).T.copy()).reshape(-1, arity, len(leaves)) for leaves in problem[1:]
    )
    log_prior = torch.full((symbols, 1), -float(np.log(symbols)))

    def known(log_kernels, leaves):  # messages of clean leaves
        ranks, states = torch.arange(arity)[:, None, None], torch.arange(symbols)[:, None]
        return log_kernels[-1][ranks, states, leaves[:, :, None]]

    def towards_root(log_kernels, messages):
        found = [messages]
        for layer in log_kernels.flip(0)[1:]:
            h = found[-1].sum(dim=1)
            found.append(through(layer, h.reshape(-1, arity, *h.shape[1:])))
        return found[-1].sum(dim=1)[0], found[::-1]

    def towards_leaves(log_kernels, messages, root, causal):
        t = root[None]
        for layer, q in zip(log_kernels, messages, strict=True):
            others = torch.zeros_like(q)
            for i in range(arity):
                for j in range(arity):
                    if j < i or (j > i and not causal):
                        others[:, i] += q[:, j]
            t = through(layer.transpose(1, 2), t[:, None] + others).flatten(0, 1)
        return t

    def posterior(log_kernels, leaves):
        return torch.log_softmax(log_prior + towards_root(log_kernels, known(log_kernels, leaves))[0], dim=0)

    def similarity():
        return torch.logsumexp(posterior(log_image, image) + posterior(log_text, text) - log_prior, dim=0)

    def denoising():
        values = torch.arange(symbols, dtype=noisy.dtype)
        seen = -((noisy[:, :, None] - values[:, None]) ** 2) / (2 * SIGMA**2)
        _, messages = towards_root(log_image, through(log_image[-1], seen))
        t = towards_leaves(log_image, messages, posterior(log_text, text), False)
        return (values @ torch.softmax(seen.flatten(0, 1) + t, dim=1)).T

    def next_token():
        _, messages = towards_root(log_text, known(log_text, text))
        t = towards_leaves(log_text, messages, posterior(log_image, image), True)
        return torch.log_softmax(t, dim=1).permute(2, 0, 1)

    return {"similarity": similarity, "denoising": denoising, "next token": next_token}


def published(folder: Path, case: Case, problem: Problem) -> Callable[[], np.ndarray]:
    """The similarity by the code published with the paper."""
    path = folder / "src" / "ghmclip" / "data" / "data_random_GHM.py"
    if not path.is_file():
        raise SystemExit(f"{path} is missing: give the folder of a checkout of github.com/willcai7/Multimodal-GHM")
    spec = importlib.util.spec_from_file_location("published_hierarchy", path)
    code = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(code)
    prior = np.full(case.alphabet, 1 / case.alphabet)

    def tree(kernels, leaves):
        edges = [
            [layer[rank] for _ in range(case.arity**depth) for rank in range(case.arity)]
            for depth, layer in enumerate(np.asarray(kernels, np.float64))
        ]
        settings = {"n_layer": case.depth, "n_child": case.arity, "variable_type": case.alphabet, "p_y": prior}
        found = code.GHMTree(**settings, transition=edges, batch_size=case.batch)
        found.T_value[-1] = list(np.asarray(leaves).T)  # in place of the leaves that it drew
        found.build_tree()
        return found

    trees = tree(problem.h.image, problem.image), tree(problem.h.text, problem.text)

    def similarity():
        image, text = (one.BP_CLS() for one in trees)
        return np.log(np.sum(image * text, axis=0) * case.alphabet)

    return similarity


def measure(case: Case, budget: _timing.Budget, compare: bool, folder: Path | None = None) -> dict[str, Any]:
    """Times of one case, the check that both sides agree, and the ratios."""
    load, problem = _timing.load(), draw(case)
    contestants = {f"{name}, theorykit": function for name, function in ours(problem).items()}
    others = peers(problem) if compare else {}
    for of_task in others.values():
        contestants |= of_task
    if folder is not None:
        contestants[PUBLISHED] = published(folder, case, problem)
    samples = _timing.interleave(contestants, budget, _title(case))
    found: dict[str, Any] = {**case._asdict(), "load": [load, _timing.load()]}
    found["contestants"] = {
        name: {
            "seconds": _timing.summary(one.wall),
            "cpu_seconds": _timing.summary(one.cpu),
            "samples_per_second": case.batch / _timing.summary(one.wall)["median"],
        }
        for name, one in samples.items()
    }
    if compare:
        found |= {"differences": {}, "ratios": {}}
    for task, of_task in others.items():
        own = samples[f"{task}, theorykit"]
        found["differences"][task] = max(check(task, case, own.value, samples[name].value) for name in of_task)
        walls = {way: [samples[name].wall for name in of_task if name.endswith(way)] for way in PASSES}
        found["ratios"][task] = {way: _timing.ratio(min(walls[way], key=statistics.median), own.wall) for way in PASSES}
    if folder is not None:
        own, other = samples["similarity, theorykit"], samples[PUBLISHED]
        check("similarity", case, own.value, other.value)
        found["published"] = _timing.ratio(other.wall, own.wall)
    return found


def check(name: str, case: Case, value: jax.Array, peer: Any) -> float:
    """Largest difference of the two sides; raises where it is more than rounding."""
    own, other = np.asarray(value), np.asarray(peer)
    if own.shape != other.shape:
        raise AssertionError(f"{_title(case)}, {name}: shapes {own.shape} and {other.shape} differ")
    difference = float(np.max(np.abs(own - other)))
    size = max(1.0, float(np.max(np.abs(other))))
    room = 2 * case.depth * (case.arity + case.alphabet) * case.depth * TERM * float(jnp.finfo(jnp.float32).eps)
    if not difference <= room * size:
        raise AssertionError(f"{_title(case)}, {name}: values differ from PyTorch's by {difference:.2g}")
    return difference


def run(plan: Plan, folder: Path | None = None) -> dict[str, Any]:
    """Everything that a preset measures, with the published code where its folder is given."""
    start = time.perf_counter()
    compare = _pytorch.available()
    if not compare:
        print(_pytorch.MISSING)
    cases = [
        measure(case, plan.budget, compare, folder)
        for case in tqdm((*plan.targets, *plan.cases), desc="hierarchy", unit="case")
    ]
    targets = [
        _timing.target(
            f"{task}, {_title(case)}: throughput of theorykit over that of {peer} at least {LEAST_RATIO:g}",
            LEAST_RATIO,
            ratio,
            at_least=True,
        )
        for case, measured in zip(plan.targets, cases, strict=False)  # the other cases have no figure to reach
        for task, peer, ratio in _ratios(measured)
    ]
    return {
        "settings": {**plan.budget._asdict(), "dtype": "float32", "noise": NOISE, "sigma": SIGMA},
        "peer": _pytorch.about(),
        "cases": cases,
        "seconds": time.perf_counter() - start,
        "targets": targets,
    }


def _ratios(measured):
    for task, ratios in measured.get("ratios", {}).items():
        for way in PASSES:
            yield task, f"PyTorch by {way}", ratios[way]
    if "published" in measured:
        yield "similarity", "the published code", measured["published"]


def _title(case):
    leaves = case.arity**case.depth
    return f"S {case.alphabet}, depth {case.depth}, arity {case.arity}, {leaves} + {leaves} leaves, batch {case.batch}"


def main(
    preset: Literal["smoke", "quick", "full"] = "quick",
    output: Path = _timing.RESULTS,
    published: Path | None = None,
) -> None:
    """Measure, print what matters and write the JSON file.

    Parameters
    ----------
    preset
        smoke: seconds, only to see that it works; quick: two minutes on two cores; full: many minutes.
    output
        Folder of the JSON file.
    published
        Checkout of the code published with the paper, as a further peer.
    """
    content = run(PLANS[preset], published)
    path = _timing.write("hierarchy", preset, output, content)
    for case in content["cases"]:
        print(_title(Case(*(case[field] for field in Case._fields))))
        for name, one in case["contestants"].items():
            each = 1e6 / one["samples_per_second"]
            cpu = 1e6 * one["cpu_seconds"]["median"] / case["batch"]
            print(f"  {name}: {each:.2f} us a sample ({cpu:.2f} us of processor)")
        if "published" in case:
            print(f"  the published code's time over theorykit's, similarity: {case['published']['median']:.3g}")
    _timing.print_targets(content["targets"])
    print(f"{content['seconds']:.0f} s in all, written to {path}")


if __name__ == "__main__":
    tyro.cli(main)
