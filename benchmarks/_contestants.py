r"""The ways to compute a full kernel that `benchmarks.ntk` compares, each ready to run.

    theorykit            theorykit.ntk.empirical_ntk, by layer-wise Gram matrices
    nt jacobian          neural-tangents, implementation 1: Jacobian contraction, vmap_axes = 0
    nt products          implementation 2: kernel-vector products, vmap_axes = 0
    nt products batch    implementation 2 with vmap_axes = None: products with whole batches
    jacrev               vmap(jacrev(f)) and one einsum per leaf, what one writes by hand

Implementation 1 without vmap_axes is left out: it costs n times as much memory and is slower. All take the same ReLU
network, points and JAX, and all products run at precision "highest". Peers are compiled beforehand; theorykit is called
as a user calls it, checks of its input included. A peer that by XLA's own count needs more memory than the limit goes
in blocks of points, halved until it fits, of which only those on and above the diagonal are computed.
"""

import functools
import time
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from theorykit import data, encoders, ntk

PIXELS = 64  # inputs like the digits: 64 numbers with |x| = sqrt(64)
LIMIT = 12 * 2**30  # bytes that a contestant's program may take
TOLERANCE = 1e-5  # relative Frobenius difference in float32; the rounding of its sums is about 1e-7 to 1e-6
IMPLEMENTATIONS = {"nt jacobian": (1, 0), "nt products": (2, 0), "nt products batch": (2, None)}
PEERS = (*IMPLEMENTATIONS, "jacrev")


class Case(NamedTuple):
    """One kernel: a network of `depth` layers and `width`, n points, z outputs."""

    depth: int
    width: int
    n: int
    z: int
    least: float | None = None  # figure to reach: times faster than the best of neural-tangents
    memory: bool = False  # whether each contestant also runs alone, in a fresh process that records its peak
    peers: tuple[str, ...] = PEERS


class Contestant(NamedTuple):
    """A way to compute the kernel, ready to run."""

    run: Callable[[], Any]
    block: int  # points per block, n when it goes in one piece
    compile_seconds: float
    compiled_bytes: int  # temporary and output memory, by XLA's count


class ValuesDiffer(RuntimeError):
    """Two contestants do not compute the same kernel, so their times cannot be compared."""


@functools.lru_cache(maxsize=1)  # contestants share one copy; the next case frees it
def inputs(case: Case) -> tuple[Callable, Any, jax.Array]:
    """The network's apply, its parameters and the points."""
    encoder = encoders.MLP(width=case.width, features=case.z, depth=case.depth)
    x = data.to_sphere(jax.random.normal(jax.random.key(0), (case.n, PIXELS)))
    return encoder.apply, jax.jit(encoder.init)(jax.random.key(1), x), x


def neural_tangents_kernel(apply: Callable, implementation: int, vmap_axes: int | None) -> Callable:
    """One of neural-tangents' full kernels as a function of parameters and two sets of points."""
    package = ntk.infinite.neural_tangents()
    # Not the bound method itself: neural-tangents looks into the signature for keywords of its own.
    kernel = package.empirical_ntk_fn(
        lambda params, x: apply(params, x), trace_axes=(), vmap_axes=vmap_axes, implementation=implementation
    )
    return lambda params, x1, x2: kernel(x1, x2, params)


def jacrev_kernel(apply: Callable) -> Callable:
    """Jacobians of all parameters and their product, leaf by leaf."""

    def jacobian(params, x):
        return jax.vmap(jax.jacrev(lambda p, point: apply(p, point[None])[0]), (None, 0))(params, x)

    def kernel(params, x1, x2):
        left = jacobian(params, x1)
        right = left if x2 is None else jacobian(params, x2)
        pairs = zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True)
        flat = [(a.reshape(*a.shape[:2], -1), b.reshape(*b.shape[:2], -1)) for a, b in pairs]
        return sum(jnp.einsum("iot,jpt->ijop", a, b) for a, b in flat)

    return kernel


def build(case: Case, name: str, limit: int = LIMIT) -> Contestant:
    """Compile one contestant for one kernel, in blocks of points where one piece would take more than `limit` bytes."""
    apply, params, x = inputs(case)
    if name == "theorykit":
        start = time.perf_counter()
        program = jax.jit(lambda p, q: ntk.empirical_ntk(apply, p, q)).lower(params, x).compile()
        seconds = time.perf_counter() - start
        return Contestant(lambda: ntk.empirical_ntk(apply, params, x), case.n, seconds, _bytes(program))
    kernel = jacrev_kernel(apply) if name == "jacrev" else neural_tangents_kernel(apply, *IMPLEMENTATIONS[name])
    block, start = case.n, time.perf_counter()
    program = compile_kernel(kernel, params, x, None)
    if _bytes(program) <= limit:
        seconds = time.perf_counter() - start
        return Contestant(lambda: program(params, x, None), block, seconds, _bytes(program))
    while _bytes(program) > limit:
        if block == 1:
            raise MemoryError(f"{name} needs more than {limit / 2**30:.3g} GiB for a pair of points in {case}")
        block, start = -(-block // 2), time.perf_counter()
        program = compile_kernel(kernel, params, x[:block], x[:block])
    diagonal = compile_kernel(kernel, params, x[:block], None)
    seconds = time.perf_counter() - start
    return Contestant(lambda: _blocked(program, diagonal, params, x, block), block, seconds, _bytes(program))


def compile_kernel(kernel: Callable, params: Any, x1: jax.Array, x2: jax.Array | None) -> Any:
    """The kernel as a compiled program of (params, x1, x2)."""
    # neural-tangents was written neither for the strict promotion rules that a caller may have set nor for this JAX.
    with (
        warnings.catch_warnings(action="ignore", category=DeprecationWarning),
        jax.default_matmul_precision("highest"),
        jax.numpy_rank_promotion("allow"),
        jax.numpy_dtype_promotion("standard"),
    ):
        return jax.jit(kernel).lower(params, x1, x2).compile()


def _bytes(program) -> int:
    counted = program.memory_analysis()
    return counted.temp_size_in_bytes + counted.output_size_in_bytes


def _blocked(program, diagonal, params, x, block):
    """The kernel from the blocks on and above the diagonal; the last block is filled up with its last point."""
    n = x.shape[0]
    padded = jnp.concatenate([x, jnp.repeat(x[-1:], -n % block, axis=0)])
    parts = jnp.split(padded, padded.shape[0] // block)
    rows: list[list[np.ndarray]] = []
    for i, left in enumerate(parts):
        mirrored = [rows[j][i].transpose(1, 0, 3, 2) for j in range(i)]
        above = [np.asarray(program(params, left, right)) for right in parts[i + 1 :]]
        rows.append([*mirrored, np.asarray(diagonal(params, left, None)), *above])
    return np.concatenate([np.concatenate(row, axis=1) for row in rows])[:n, :n]


def difference(kernel: Any, reference: Any) -> float:
    """Relative difference in the Frobenius norm, |K - K'| / |K'|."""
    a, b = (np.asarray(values, np.float64) for values in (kernel, reference))
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def check(error: float, what: str, case: Case) -> None:
    if not error <= TOLERANCE:  # also where it is not a number
        raise ValuesDiffer(
            f"{what} and theorykit differ by {error:.2g} relative, more than {TOLERANCE}, in {case}: one is wrong"
        )
