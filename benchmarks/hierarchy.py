r"""Message passing on the hierarchical model against a straightforward PyTorch version, both on the CPU.

    python -m benchmarks.hierarchy --preset quick

The peer runs the same recursions in log space over all nodes of a layer at once, each edge by torch.logsumexp over the
child's symbols. It is timed with all threads and with one, and the faster of the two counts: on a machine with other
work, threads that wait for each other can cost it a factor of ten. The three tasks take turns with their peers, on the
same kernels and samples, in float32:

    similarity   s* of pairs, both trees towards the root
    denoising    image leaves from noisy ones, the text given: both trees towards the root, the image's back
    next token   all positions of the text, the image given: both towards the root, the text's back

Every value must agree with the peer's to the rounding of float32, or the benchmark fails. PyTorch is no dependency of
the library: install it beside it (pip install torch), or only theorykit is timed.
"""

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

    target: Case
    cases: tuple[Case, ...]
    budget: _timing.Budget


PAPER = Case(10, 4, 3, 1024)  # 81 + 81 leaves
PLANS = {
    "smoke": Plan(Case(3, 2, 2, 16), (), _timing.Budget(visits=2, visit_seconds=0.0, patience=5.0)),
    "quick": Plan(
        PAPER,
        (PAPER._replace(batch=128), PAPER._replace(batch=8192)),
        _timing.Budget(visits=7, visit_seconds=0.3, patience=10.0),
    ),
    "full": Plan(
        PAPER,
        (*(PAPER._replace(batch=n) for n in (128, 8192)), Case(32, 3, 4, 256), Case(3, 8, 2, 256)),
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


def peers(problem: Problem) -> dict[str, Callable[[], Any]]:
    """The same by PyTorch: messages (n, nodes, S), every edge by logsumexp."""
    import torch

    log_image, log_text = (torch.log(torch.from_numpy(np.array(kernels))) for kernels in problem.h[:2])
    image, text = (torch.from_numpy(np.array(leaves)).long() for leaves in (problem.image, problem.text))
    noisy = torch.from_numpy(np.array(problem.noisy))
    symbols = log_image.shape[-1]
    log_prior = torch.full((symbols,), -float(np.log(symbols)))

    def known(log_kernels, leaves):  # messages of clean leaves (n, m^(L-1), m, S)
        arity = log_kernels.shape[1]
        of_rank = leaves.reshape(len(leaves), -1, arity)
        columns = log_kernels[-1].transpose(1, 2)  # rank, child, parent
        return columns[torch.arange(arity), of_rank]

    def towards_root(log_kernels, messages):
        found = [messages]
        for layer in log_kernels.flip(0)[1:]:
            h = found[-1].sum(dim=2)
            h = h.reshape(len(h), -1, len(layer), 1, symbols)
            found.append(torch.logsumexp(layer + h, dim=-1))
        return found[-1].sum(dim=2)[:, 0], found[::-1]

    def towards_leaves(log_kernels, messages, root, causal):
        t = root[:, None]
        for layer, q in zip(log_kernels, messages, strict=True):
            others = torch.zeros_like(q)
            for i in range(q.shape[2]):
                for j in range(q.shape[2]):
                    if j < i or (j > i and not causal):
                        others[:, :, i] += q[:, :, j]
            u = t[:, :, None] + others
            t = torch.logsumexp(layer.transpose(1, 2) + u[:, :, :, None], dim=-1)
            t = t.reshape(len(t), -1, symbols)
        return t

    def posterior(log_kernels, leaves):
        return torch.log_softmax(log_prior + towards_root(log_kernels, known(log_kernels, leaves))[0], dim=1)

    def similarity():
        return torch.logsumexp(posterior(log_image, image) + posterior(log_text, text) - log_prior, dim=1)

    def denoising():
        values = torch.arange(symbols, dtype=noisy.dtype)
        seen = -((noisy[:, :, None] - values) ** 2) / (2 * SIGMA**2)
        by_rank = seen.reshape(len(seen), -1, log_image.shape[1], 1, symbols)
        _, messages = towards_root(log_image, torch.logsumexp(log_image[-1] + by_rank, dim=-1))
        root = posterior(log_text, text)
        return torch.softmax(seen + towards_leaves(log_image, messages, root, False), dim=2) @ values

    def next_token():
        _, messages = towards_root(log_text, known(log_text, text))
        return torch.log_softmax(towards_leaves(log_text, messages, posterior(log_image, image), True), dim=2)

    def with_threads(function, threads):
        torch.set_num_threads(threads)
        with torch.inference_mode():
            return function()

    functions = {"similarity": similarity, "denoising": denoising, "next token": next_token}
    return {
        f"{name}, {_pytorch.name(threads)}": partial(with_threads, function, threads)
        for name, function in functions.items()
        for threads in _pytorch.THREADS
    }


def measure(case: Case, budget: _timing.Budget, compare: bool) -> dict[str, Any]:
    """Times of one case, the check that both sides agree, and the ratios."""
    load, problem = _timing.load(), draw(case)
    contestants = {f"{name}, theorykit": function for name, function in ours(problem).items()}
    if compare:
        contestants |= peers(problem)
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
        for name in ours(problem):
            own, *others = (samples[f"{name}, {who}"] for who in ("theorykit", *map(_pytorch.name, _pytorch.THREADS)))
            fastest = min(others, key=lambda peer: statistics.median(peer.wall))
            found["differences"][name] = check(name, case, own.value, fastest.value)
            found["ratios"][name] = _timing.ratio(fastest.wall, own.wall)
    return found


def check(name: str, case: Case, value: jax.Array, peer: Any) -> float:
    """Largest difference of the two sides; raises where it is more than rounding."""
    own, other = np.asarray(value), peer.numpy()
    if own.shape != other.shape:
        raise AssertionError(f"{_title(case)}, {name}: shapes {own.shape} and {other.shape} differ")
    difference = float(np.max(np.abs(own - other)))
    size = max(1.0, float(np.max(np.abs(other))))
    room = 2 * case.depth * (case.arity + case.alphabet) * case.depth * TERM * float(jnp.finfo(jnp.float32).eps)
    if not difference <= room * size:
        raise AssertionError(f"{_title(case)}, {name}: values differ from PyTorch's by {difference:.2g}")
    return difference


def run(plan: Plan) -> dict[str, Any]:
    """Everything that a preset measures."""
    start = time.perf_counter()
    compare = _pytorch.available()
    if not compare:
        print(_pytorch.MISSING)
    cases = [
        measure(case, plan.budget, compare) for case in tqdm((plan.target, *plan.cases), desc="hierarchy", unit="case")
    ]
    targets = [
        _timing.target(
            f"{name}, {_title(plan.target)}: throughput of theorykit over PyTorch's at least {LEAST_RATIO:g}",
            LEAST_RATIO,
            ratio,
            at_least=True,
        )
        for name, ratio in cases[0].get("ratios", {}).items()
        if plan.target == PAPER  # a batch of tiny trees measures the overhead of a call
    ]
    return {
        "settings": {**plan.budget._asdict(), "dtype": "float32", "noise": NOISE, "sigma": SIGMA},
        "peer": _pytorch.about(),
        "cases": cases,
        "seconds": time.perf_counter() - start,
        "targets": targets,
    }


def _title(case):
    leaves = case.arity**case.depth
    return f"S {case.alphabet}, depth {case.depth}, arity {case.arity}, {leaves} + {leaves} leaves, batch {case.batch}"


def main(preset: Literal["smoke", "quick", "full"] = "quick", output: Path = _timing.RESULTS) -> None:
    """Measure, print what matters and write the JSON file.

    Parameters
    ----------
    preset
        smoke: seconds, only to see that it works; quick: two minutes on two cores; full: many minutes.
    output
        Folder of the JSON file.
    """
    content = run(PLANS[preset])
    path = _timing.write("hierarchy", preset, output, content)
    for case in content["cases"]:
        print(_title(Case(*(case[field] for field in Case._fields))))
        for name, one in case["contestants"].items():
            each = 1e6 / one["samples_per_second"]
            cpu = 1e6 * one["cpu_seconds"]["median"] / case["batch"]
            print(f"  {name}: {each:.2f} us a sample ({cpu:.2f} us of processor)")
    _timing.print_targets(content["targets"])
    print(f"{content['seconds']:.0f} s in all, written to {path}")


if __name__ == "__main__":
    tyro.cli(main)
