r"""Training of a CLIP pair of transformers by training.train against PyTorch's, both on the CPU.

    python -m benchmarks.training --preset quick

Each side trains two transformers, one for images and one for texts, on stored pairs of the hierarchical model as
one-hot tokens: two blocks, four heads, an MLP of four times the width, batches of 128 pairs, the CLIP loss in groups
of K = 4 candidates under inner products, Adam, float32. The peer is what one would write in PyTorch: modules with one
product for queries, keys and values, scaled_dot_product_attention, the fused Adam, eager execution. Both sides are
timed with products of matrices by all threads and by one, and of each the faster counts.

A call of either side is a whole training of a given number of steps: for theorykit that includes the checks of the
input and one evaluation more than steps. Compilation is timed apart, as the first call less a later one. Before the
clock runs, both sides train from the same parameters on the same full batch: their losses must agree to the rounding of
float32, or the benchmark fails. PyTorch is no dependency of the library: install it beside it (pip install torch), or
only theorykit is timed.
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
import optax
import tyro
from tqdm import tqdm

from benchmarks import _pytorch, _timing
from theorykit import encoders, losses, similarity, training
from theorykit.surrogate import hierarchy

LEAST_RATIO = 1.0  # of the throughputs: not slower; the aim is AIM
AIM = 1.5
NOISE, RATE = 0.3, 1e-3
# Epochs of eight batches: shuffling is part of training and its cost per step is small, as it would be with more.
BATCHES = 8
ONE_THREAD = "theorykit, products by one thread"
OWN = {"theorykit": {}, ONE_THREAD: {"xla_cpu_multi_thread_eigen": False}}  # compiler options
CHECKED = 5  # steps that both sides make on the same batch


class Case(NamedTuple):
    """One size: S, L, m of both trees, sizes of the transformers, pairs in a batch, and steps of one call."""

    alphabet: int
    depth: int
    arity: int
    width: int
    batch: int
    steps: int
    blocks: int = 2
    heads: int = 4
    candidates: int = 4

    @property
    def tokens(self) -> int:
        return self.arity**self.depth


class Plan(NamedTuple):
    """What a preset measures."""

    cases: tuple[Case, ...]
    budget: _timing.Budget


# Steps so that a call takes a second or more, and 20 at least: the one evaluation more is then below 5% of it.
CASES = (
    Case(10, 3, 2, 32, 128, 200),
    Case(10, 3, 2, 128, 128, 50),
    Case(10, 4, 3, 32, 128, 20),
    Case(10, 4, 3, 128, 128, 20),
)
PLANS = {
    "smoke": Plan((Case(3, 2, 2, 8, 8, 3),), _timing.Budget(visits=2, visit_seconds=0.0, patience=5.0)),
    "quick": Plan(CASES, _timing.Budget(visits=7, visit_seconds=0.0, patience=60.0)),
    "full": Plan(CASES, _timing.Budget(visits=20, visit_seconds=2.0, patience=300.0)),
}


class Problem(NamedTuple):
    """Encoder, its parameters for both modalities, and pairs as one-hot tokens (n, tokens, S)."""

    encoder: encoders.Transformer
    params: dict[str, Any]
    data: dict[str, np.ndarray]


def draw(case: Case) -> Problem:
    """What both sides train, and on what."""
    for_kernels, for_samples, *for_params = jax.random.split(jax.random.key(0), 4)
    h = hierarchy.random_hierarchy(for_kernels, case.alphabet, case.depth, case.arity, NOISE)
    _, image, text = hierarchy.sample(h, for_samples, BATCHES * case.batch)
    one_hot = np.eye(case.alphabet, dtype=np.float32)
    data = {"image": one_hot[np.asarray(image)], "text": one_hot[np.asarray(text)]}
    encoder = encoders.Transformer(
        case.width,
        case.alphabet,
        tokens=(case.tokens, case.alphabet),
        depth=case.blocks,
        heads=case.heads,
        parametrisation="standard",
    )
    init = jax.jit(encoder.init)
    params = {name: init(key, jnp.asarray(data[name][:1])) for name, key in zip(data, for_params, strict=True)}
    return Problem(encoder, params, data)


def ours(case: Case, problem: Problem) -> Callable[..., training.Run]:
    """Train by the library: (data, steps, **batches) -> run."""
    clip = partial(losses.clip, similarity=similarity.dot)

    def loss(params, batch):
        groups = (
            problem.encoder.apply(params[name], batch[name]).reshape(-1, case.candidates, case.alphabet)
            for name in ("image", "text")
        )
        return jnp.mean(jax.vmap(clip)(*groups))

    return partial(_train, loss, problem.params, optax.adam(RATE))


def _train(loss, params, optimizer, data, steps, **batches):
    run = training.train(loss, params, data, optimizer=optimizer, steps=steps, progress=False, **batches)
    if run.status != "finished":
        raise AssertionError(f"the training of theorykit {run.status} after {run.steps} steps")
    return run


def peer(case: Case, problem: Problem) -> Callable[..., list[float]]:
    """The same by PyTorch: (data, steps, batch) -> losses; the parameters go on from call to call."""
    import torch
    from torch import nn
    from torch.nn import functional

    width, heads = case.width, case.heads

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm_attention, self.norm_mlp = (nn.LayerNorm(width, eps=1e-6) for _ in range(2))  # flax's epsilon
            self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
            self.mlp_in, self.mlp_out = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

        def forward(self, h):
            n, tokens, _ = h.shape
            q, k, v = self.qkv(self.norm_attention(h)).view(n, tokens, 3, heads, -1).permute(2, 0, 3, 1, 4)
            mixed = functional.scaled_dot_product_attention(q, k, v)
            h = h + self.out(mixed.transpose(1, 2).reshape(n, tokens, width))
            return h + self.mlp_out(functional.gelu(self.mlp_in(self.norm_mlp(h))))

    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Linear(case.alphabet, width, bias=False)
            self.positions = nn.Parameter(torch.empty(case.tokens, width))
            self.blocks = nn.Sequential(*(Block() for _ in range(case.blocks)))
            self.norm_head = nn.LayerNorm(width, eps=1e-6)
            self.head = nn.Linear(width, case.alphabet, bias=False)

        def forward(self, x):
            h = self.blocks(self.embed(x) + self.positions)
            return self.head(self.norm_head(h).mean(dim=1))

    model = nn.ModuleDict({name: Encoder() for name in ("image", "text")})
    with torch.no_grad():
        for name, module in model.items():
            _copy(torch, module, problem.params[name]["params"])
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE, fused=True)

    def step(image, text):
        a, b = (
            model[name](x).view(-1, case.candidates, case.alphabet) for name, x in (("image", image), ("text", text))
        )
        scores = torch.bmm(a, b.transpose(1, 2))
        right = torch.arange(case.candidates).repeat(len(scores))
        rows, columns = (
            functional.cross_entropy(s.reshape(-1, case.candidates), right) for s in (scores, scores.transpose(1, 2))
        )
        loss = (rows + columns) / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    def train(data, steps, batch, threads):
        torch.set_num_threads(threads)
        image, text = (torch.from_numpy(data[name]) for name in ("image", "text"))
        found = []
        while len(found) < steps:
            order = torch.randperm(len(image)) if batch < len(image) else torch.arange(len(image))
            for rows in order.split(batch)[: steps - len(found)]:
                found.append(step(image[rows], text[rows]))
        return found

    return train


def _copy(torch, module, params):
    """The library's parameters into PyTorch's modules; a Linear holds the transpose of a kernel."""

    def linear(target, *kernels):
        target.weight.copy_(torch.from_numpy(np.concatenate([np.asarray(one["kernel"]) for one in kernels], axis=1).T))

    linear(module.embed, params["embed"])
    module.positions.copy_(torch.from_numpy(np.array(params["positions"])))
    for i, block in enumerate(module.blocks):
        linear(block.qkv, *(params[f"{role}_{i}"] for role in ("query", "key", "value")))
        for name in ("out", "mlp_in", "mlp_out"):
            linear(getattr(block, name), params[f"{name}_{i}"])
    linear(module.head, params["head"])


def measure(case: Case, budget: _timing.Budget, compare: bool) -> dict[str, Any]:
    """Times of one case, the check that both sides agree, and the ratio."""
    load, problem = _timing.load(), draw(case)
    train = ours(case, problem)
    found: dict[str, Any] = {**case._asdict(), "tokens": case.tokens}
    others = {}
    if compare:
        found["difference"] = check(case, problem, train)
        other = peer(case, problem)
        others = {
            _pytorch.name(threads): partial(other, problem.data, case.steps, case.batch, threads)
            for threads in _pytorch.THREADS
        }

    def run(options):
        batches = {"batch_size": case.batch, "key": jax.random.key(1)}
        return train(problem.data, case.steps, compiler_options=options, **batches).losses

    begin = time.perf_counter()
    run({})
    first = time.perf_counter() - begin
    own = {name: partial(run, options) for name, options in OWN.items()}
    own[ONE_THREAD]()  # compiled
    samples = _timing.interleave(own | others, budget, _title(case))
    found |= {
        "compile_seconds": first - statistics.median(samples["theorykit"].wall),
        "load": [load, _timing.load()],
    }
    found["contestants"] = {
        name: {
            "seconds_per_step": _timing.summary([wall / case.steps for wall in one.wall]),
            "cpu_seconds_per_step": _timing.summary([cpu / case.steps for cpu in one.cpu]),
            "steps_per_second": case.steps / statistics.median(one.wall),
            "samples_per_second": case.batch * case.steps / statistics.median(one.wall),
        }
        for name, one in samples.items()
    }
    if compare:
        fastest, mine = (min(some, key=lambda name: statistics.median(samples[name].wall)) for some in (others, own))
        found |= {"fastest_peer": fastest, "fastest_own": mine}
        found["ratio"] = _timing.ratio(samples[fastest].wall, samples[mine].wall)
    return found


def check(case: Case, problem: Problem, train: Callable[..., training.Run]) -> float:
    """Largest difference of the losses of both sides on one batch; raises where it is more than rounding."""
    batch = {name: rows[: case.batch] for name, rows in problem.data.items()}
    own = np.asarray(train(batch, CHECKED).losses)
    other = np.asarray(peer(case, problem)(batch, CHECKED, case.batch, 1))
    difference = float(np.max(np.abs(own - other)))
    # Sums of up to 4 width terms in every layer, about ten layers, scores of order sqrt(width) at the start. Adam
    # divides gradients by their own size: an update of RATE may have either sign where a gradient is all rounding, and
    # the loss moves by RATE times the size of those gradients, again rounding.
    room = 10 * 4 * case.width * float(jnp.finfo(jnp.float32).eps) * max(1.0, float(other.max()))
    if not difference <= room:
        raise AssertionError(f"{_title(case)}: the losses {own} differ from PyTorch's {other} by {difference:.2g}")
    return difference


def run(plan: Plan) -> dict[str, Any]:
    """Everything that a preset measures."""
    start = time.perf_counter()
    compare = _pytorch.available()
    if not compare:
        print(_pytorch.MISSING)
    cases = [measure(case, plan.budget, compare) for case in tqdm(plan.cases, desc="training", unit="case")]
    targets = [
        _timing.target(
            f"{_title(case)}: throughput of theorykit over PyTorch's at least {LEAST_RATIO:g}, aim {AIM:g}",
            LEAST_RATIO,
            found["ratio"],
            at_least=True,
        )
        for case, found in zip(plan.cases, cases, strict=True)
        if "ratio" in found and case in CASES  # a few steps of a tiny network measure the overhead of a call
    ]
    return {
        "settings": {**plan.budget._asdict(), "dtype": "float32", "noise": NOISE, "rate": RATE},
        "peer": _pytorch.about(),
        "cases": cases,
        "seconds": time.perf_counter() - start,
        "targets": targets,
    }


def _title(case):
    return f"S {case.alphabet}, {case.tokens} + {case.tokens} tokens, width {case.width}, batch {case.batch}"


def main(preset: Literal["smoke", "quick", "full"] = "quick", output: Path = _timing.RESULTS) -> None:
    """Measure, print what matters and write the JSON file.

    Parameters
    ----------
    preset
        smoke: seconds, only to see that it works; quick: a few minutes on two cores; full: many minutes.
    output
        Folder of the JSON file.
    """
    content = run(PLANS[preset])
    path = _timing.write("training", preset, output, content)
    for case in content["cases"]:
        print(f"{_title(Case(*(case[field] for field in Case._fields)))}: compiled in {case['compile_seconds']:.1f} s")
        for name, one in case["contestants"].items():
            cpu = 1e3 * one["cpu_seconds_per_step"]["median"]
            print(
                f"  {name}: {one['steps_per_second']:.4g} steps/s, {one['samples_per_second']:.5g} pairs/s "
                f"({cpu:.3g} ms of processor a step)"
            )
    _timing.print_targets(content["targets"])
    print(f"{content['seconds']:.0f} s in all, written to {path}")


if __name__ == "__main__":
    tyro.cli(main)
