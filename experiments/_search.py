"""What the search experiments share: counts of the work a program does, data of known dimension, recall.

XLA's own count takes the body of a loop once, however often it runs. Here a program is traced and executed again with
one counter for each body of a loop and each branch; what a body costs follows from the shapes of its operations. So
loops whose length depends on the data are counted as they ran.
"""

import dataclasses
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core
from jax.sharding import Mesh, PartitionSpec

from experiments._side_by_side import BRIEFLY
from theorykit import search

# Elementwise operations count one for each number they make, reductions one for each that they take in less those that
# they give, both on floats only; a product of matrices counts a multiplication and an addition for each term. That is
# XLA's convention. Comparisons and selections are left out.
ELEMENTWISE = {
    "abs",
    "add",
    "add_any",
    "div",
    "integer_pow",
    "max",
    "min",
    "mul",
    "neg",
    "round",
    "sqrt",
    "square",
    "sub",
}
REDUCTIONS = {"reduce_max", "reduce_min", "reduce_sum"}
TIE = 1e-5  # distances closer than that, relatively, count as tied
DIRECT = 64  # rows are compared directly in blocks of so many queries


class Work(NamedTuple):
    """Floating-point operations of one execution; over a mesh those of each device, as arrays."""

    products: Any  # of matrix products
    arithmetic: Any  # of everything else


def instrumented(function: Callable, *arrays: Any) -> Callable:
    """A compiled function of the same arguments that returns its answer and its `Work`.

    Parameters
    ----------
    function
        Arrays or trees of arrays in and out, able to run inside `jax.jit`.
    *arrays
        Arguments of the shapes that it will be called with.
    """
    traced, form = jax.make_jaxpr(function, return_shape=True)(*arrays)
    structure, sites, costs = jax.tree.structure(form), {}, []
    _collect(traced.jaxpr, sites, costs)
    products, arithmetic = np.array(costs, dtype=object).T  # Python's integers do not overflow

    @partial(jax.jit, compiler_options=BRIEFLY)
    def program(*arrays):
        return _execute(traced.jaxpr, traced.consts, jax.tree.leaves(arrays), sites)

    def counted(*arrays):
        values, executed = program(*arrays)
        # Over a mesh there is one row of counters for each device beside those of the program around.
        times = np.asarray(executed).astype(object)
        return jax.tree.unflatten(structure, values), Work(times @ products, times @ arithmetic)

    return counted


def _bodies(equation):
    """Programs inside an equation that may run other than once, or hold such ones."""
    name, params = equation.primitive.name, equation.params
    if name == "while":
        return [params["body_jaxpr"]]  # what a condition computes is left out: it compares counters
    if name == "cond":
        return list(params["branches"])
    if name.startswith(("scatter", "reduce")):  # how two numbers are combined
        return []
    return [params[key] for key in ("jaxpr", "call_jaxpr") if key in params]


def _open(jaxpr):
    return (jaxpr.jaxpr, jaxpr.consts) if isinstance(jaxpr, core.ClosedJaxpr) else (jaxpr, ())


def _collect(jaxpr, sites, costs):
    """Number every body and add up what one run of it costs without the bodies inside."""
    if id(jaxpr) in sites:  # traced once and used at several places: its runs are added
        return
    sites[id(jaxpr)] = len(costs)
    costs.append((sum(map(_products, jaxpr.eqns)), sum(map(_arithmetic, jaxpr.eqns))))
    for equation in jaxpr.eqns:
        for body in _bodies(equation):
            _collect(_open(body)[0], sites, costs)


def _products(equation):
    if equation.primitive.name != "dot_general":
        return 0
    (contracted, _), _ = equation.params["dimension_numbers"]
    shape = equation.invars[0].aval.shape
    return 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(shape[axis] for axis in contracted)


def _arithmetic(equation):
    name, made = equation.primitive.name, equation.outvars[0].aval if equation.outvars else None
    if name not in ELEMENTWISE | REDUCTIONS or not jnp.issubdtype(made.dtype, jnp.floating):
        return 0
    size = math.prod(made.shape)
    return size if name in ELEMENTWISE else math.prod(equation.invars[0].aval.shape) - size


def _execute(jaxpr, consts, values, sites):
    """Results, and how often each body ran."""
    known = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *values), strict=True))
    executed = jnp.zeros((len(sites),), jnp.int32).at[sites[id(jaxpr)]].set(1)

    def read(variable):
        return variable.val if isinstance(variable, core.Literal) else known[variable]

    for equation in jaxpr.eqns:
        inputs, bodies = [read(variable) for variable in equation.invars], _bodies(equation)
        if bodies:
            # By name: what one program calls may be a primitive of another name in another version.
            results, inside = _INSIDE.get(equation.primitive.name, _call)(equation.params, bodies, inputs, sites)
            executed = executed + inside
        else:
            results = equation.primitive.bind(*inputs, **equation.params)
            results = results if equation.primitive.multiple_results else [results]
        known |= zip(equation.outvars, results, strict=True)
    return [read(variable) for variable in jaxpr.outvars], executed


def _inner(body, values, sites):
    jaxpr, consts = _open(body)
    return _execute(jaxpr, consts, values, sites)


def _call(params, bodies, inputs, sites):
    return _inner(bodies[0], inputs, sites)


def _scan(params, bodies, inputs, sites):
    first, carried = params["num_consts"], params["num_carry"]
    consts, carry, rows = inputs[:first], inputs[first : first + carried], inputs[first + carried :]

    def step(state, row):
        results, inside = _inner(bodies[0], [*consts, *state[1], *row], sites)
        return (state[0] + inside, results[:carried]), results[carried:]

    start = (jnp.zeros((len(sites),), jnp.int32), carry)
    (executed, carry), rows = lax.scan(step, start, rows, params["length"], params["reverse"])
    return [*carry, *rows], executed


def _while(params, bodies, inputs, sites):
    first, second = params["cond_nconsts"], params["body_nconsts"]
    asked, consts, carry = inputs[:first], inputs[first : first + second], inputs[first + second :]

    def go_on(state):
        return core.jaxpr_as_fun(params["cond_jaxpr"])(*asked, *state[1])[0]

    def step(state):
        results, inside = _inner(bodies[0], [*consts, *state[1]], sites)
        return state[0] + inside, results

    executed, carry = lax.while_loop(go_on, step, (jnp.zeros((len(sites),), jnp.int32), carry))
    return carry, executed


def _cond(params, bodies, inputs, sites):
    index, *values = inputs
    return lax.switch(index, [lambda *values, body=body: _inner(body, values, sites) for body in bodies], *values)


def _shard_map(params, bodies, inputs, sites):
    mesh = params["mesh"]

    def on_device(*values):
        found, executed = _inner(bodies[0], values, sites)
        return *found, executed[None]

    divided = jax.shard_map(
        on_device,
        mesh=mesh,
        in_specs=tuple(params["in_specs"]),
        out_specs=(*params["out_specs"], PartitionSpec(mesh.axis_names)),
        check_vma=params["check_vma"],
    )
    *found, executed = divided(*inputs)
    return found, executed


_INSIDE = {"scan": _scan, "while": _while, "cond": _cond, "shard_map": _shard_map}


def over_devices(n: int, d: int, queries: int, k: int, counts: Sequence[int]) -> np.ndarray:
    """Operations of products, (meshes,), of the busiest device when `search.knn` runs over so many host devices.

    In a process of its own, since jax fixes their number at its start.
    """
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={max(counts)}"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", __name__, json.dumps([n, d, queries, k, list(counts)])]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the search over {max(counts)} host devices failed:\n{done.stderr}")
    return np.array(json.loads(done.stdout.splitlines()[-1]), np.float64)


def _on_devices(n, d, queries, k, counts):
    base, points = (jnp.asarray(rows) for rows in gaussian(0, n, queries, d, d))
    products = []
    for count in counts:
        mesh = Mesh(np.array(jax.devices()[:count]), ("rows",))
        _, work = instrumented(partial(search.knn, k=k, mesh=mesh), base, points)(base, points)
        products.append(int(np.max(work.products)))
    return products


def gaussian(seed: int, n: int, queries: int, dimension: int, d: int, noise: float = 0.0):
    """Rows (n, d) and queries: a standard normal of the given dimension, turned into d dimensions; NumPy float32.

    noise is the deviation of what is added in all d directions.
    """
    generator = np.random.default_rng([seed, n, dimension])
    # Before the frame, so that they are the same for every d.
    latents = generator.standard_normal((n + queries, dimension), np.float32)
    rows = latents @ np.linalg.qr(generator.standard_normal((d, dimension)))[0].astype(np.float32).T
    rows += noise * generator.standard_normal(rows.shape, np.float32)
    return rows[:n], rows[n:]


def random_edges(graph: search.Graph, seed: int) -> search.Graph:
    """The same graph with edges to rows drawn at random: what is left of a search without neighbourhoods."""
    n, degree = graph.neighbours.shape
    edges = np.random.default_rng(seed).integers(0, n, (n, degree), np.int32)
    return dataclasses.replace(graph, neighbours=jnp.asarray(edges))


def recall(found: np.ndarray, exact: np.ndarray) -> float:
    """Share of the distances found, (q, k), that are no larger than the k-th true one; ties are forgiven."""
    found, exact = np.asarray(found), np.asarray(exact)
    return float(np.mean(found <= exact[:, found.shape[1] - 1 :][:, :1] * (1 + TIE)))


def stacked(found: Sequence[dict[str, Any]]) -> dict[str, np.ndarray]:
    """Arrays of every seed, stacked by name."""
    return {name: np.stack([np.asarray(one[name]) for one in found]) for name in found[0]}


def direct_distances(base: np.ndarray, queries: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """|q - x|^2 in float64, (queries, k)."""
    parts = []
    for start in range(0, len(queries), DIRECT):
        own, found = queries[start : start + DIRECT], base[ids[start : start + DIRECT]]
        parts.append(np.sum((own[:, None].astype(np.float64) - found) ** 2, axis=-1))
    return np.concatenate(parts)


if __name__ == "__main__":
    print(json.dumps(_on_devices(*json.loads(sys.argv[1]))))
