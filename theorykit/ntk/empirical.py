r"""The empirical neural tangent kernel of any encoder, in bounded memory, on one device or many.

    K(x_i, x_j)[o, p] = sum_theta  d f_o(x_i) / d theta  *  d f_p(x_j) / d theta

Three implementations that agree to rounding: `structured` (Gram matrices of layer inputs and backpropagated signals;
what its layers do not cover goes to the Jacobian), `jacobian` (leaf by leaf) and `products` (a reverse and a forward pass
per column). See the modules `structured` and `jacobian` for the algebra.

Blocks: the rows of the kernel are split into blocks of points, the columns likewise, and the points of one pair of blocks
keep their layer inputs and signals within `memory` bytes. Row blocks are processed once; column blocks are recomputed for
every row block, and of a symmetric kernel only the upper half is computed.
"""

import math
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float

from theorykit.ntk import jacobian, structured

METHODS = ("structured", "jacobian", "products")


class _Blocks(NamedTuple):
    """Points per block of rows and of columns."""

    rows: int
    columns: int


def empirical_ntk(
    apply: Callable,
    params: Any,
    x1: Float[Array, "n1 ..."],
    x2: Float[Array, "n2 ..."] | None = None,
    *,
    method: str = "structured",
    memory: int = 2**30,
    mesh: Mesh | None = None,
) -> Float[Array, "n1 n2 z z"]:
    r"""Full neural tangent kernel, K[i, j, o, p] = <d f_o(x1_i) / d theta, d f_p(x2_j) / d theta>.

    Parameters
    ----------
    apply
        apply(params, x) -> (n, z), acting on each row of x by itself (no batch statistics). Compiled once per function
        object: pass ``encoder.apply``, not a fresh lambda per call.
    params
        Pytree of floating-point arrays, as ``encoder.init`` returns it.
    x1, x2
        Points, one per leading index; x2 = None means x1 with itself.
    method
        "structured" for flax modules built from dense and convolutional layers (anything else in them is handled too, by
        the Jacobian), "jacobian" or "products" for checks and for functions that are no flax module.
    memory
        Bytes that layer inputs, signals and Jacobians of one pair of blocks may take, beside the kernel itself and the
        temporary copies of the compiler (in all about twice this).
    mesh
        A one-dimensional mesh of devices over which the rows of the kernel are sharded; same result as on one device.

    Returns
    -------
    Array of shape (n1, n2, z, z), in the units of f squared.

    Raises
    ------
    ValueError
        Points of different shapes, empty or non-finite input, an unknown method, an output that is not (n, z), a mesh with
        more than one axis.
    TypeError
        Parameters that are not floating-point arrays.

    Notes
    -----
    Products run at precision "highest": relative error about sqrt(fan_in) * eps of the dtype.

    Source: derivation; the two other methods follow Novak et al. (2022, arXiv 2206.08720).
    """
    _check_inputs(apply, params, x1, x2, method, mesh)
    symmetric = x2 is None
    x2 = x1 if symmetric else x2
    devices = 1 if mesh is None else mesh.size
    blocks = _block_sizes(apply, params, x1, x2, method, memory, -(-x1.shape[0] // devices))
    if mesh is None:
        return _kernel(apply, params, x1, x2, method, blocks, symmetric)
    return _sharded_kernel(apply, params, _pad(x1, devices), x2, method, blocks, mesh)[: x1.shape[0]]


def two_view(apply: Callable, params: Any, xa: Float[Array, "n ..."], xb: Float[Array, "n ..."], **options):
    """Kernel blocks (aa, ab, bb) of two views, each (n, n, z, z), as `flow` takes them.

    Parameters
    ----------
    apply, params, **options
        As in `empirical_ntk`.
    xa, xb
        The two views of the same n examples.

    Raises
    ------
    ValueError
        If the views differ in shape.
    """
    if xa.shape != xb.shape:
        raise ValueError(
            f"The two views must have the same shape and have {xa.shape} and {xb.shape}: pass one row of each view per example."
        )
    n = xa.shape[0]
    kernel = empirical_ntk(apply, params, jnp.concatenate([xa, xb]), **options)
    return kernel[:n, :n], kernel[:n, n:], kernel[n:, n:]


def ntk_vector_product(
    apply: Callable, params: Any, x1: Float[Array, "n1 ..."], x2: Float[Array, "n2 ..."], vector: Float[Array, "n2 z"]
) -> Float[Array, "n1 z"]:
    """Matrix-free product sum_{j, p} K(x1_i, x2_j)[o, p] vector[j, p] = J(x1) J(x2)^T vector.

    One reverse pass over x2 and one forward pass over x1; the kernel is never formed. For iterative solvers and spectra.

    Raises
    ------
    ValueError
        As `empirical_ntk`, and if the vector is not (n2, z).
    """
    _check_inputs(apply, params, x1, x2, "products", None)
    expected = jax.eval_shape(apply, params, x2).shape
    if vector.shape != expected:
        raise ValueError(f"vector must have the shape {expected} of apply(params, x2) and has {vector.shape}.")
    return _vector_product(apply, params, x1, x2, vector)


@partial(jax.jit, static_argnames="apply")
def _vector_product(apply, params, x1, x2, vector):
    return jacobian.vector_product(apply, params, x1, x2, vector)


@partial(jax.jit, static_argnames=("apply", "method", "blocks", "symmetric"))
def _kernel(apply, params, x1, x2, method, blocks, symmetric):
    return _blocked(apply, params, x1, x2, method, blocks, symmetric)


@partial(jax.jit, static_argnames=("apply", "method", "blocks", "mesh"))
def _sharded_kernel(apply, params, x1, x2, method, blocks, mesh):
    (axis,) = mesh.axis_names
    whole, rows = PartitionSpec(), PartitionSpec(axis)

    def shard(params, x1, x2):
        return _blocked(apply, params, x1, x2, method, blocks, symmetric=False)

    # check_vma: the scans over blocks start from constants, which the check would want marked as varying.
    sharded = jax.shard_map(shard, mesh=mesh, in_specs=(whole, rows, whole), out_specs=rows, check_vma=False)
    return sharded(params, x1, x2)


def _blocked(apply, params, x1, x2, method, blocks, symmetric):
    """The kernel from pairs of blocks; (n1, n2, z, z)."""
    (n1, n2), same = (x1.shape[0], x2.shape[0]), symmetric or x1 is x2
    if blocks.rows >= n1 and blocks.columns >= n2:
        left = _features(apply, params, x1, method)
        right = left if same else _features(apply, params, x2, method)
        return _pair(apply, params, left, right, method).transpose(1, 3, 0, 2)
    row_blocks, column_blocks = _split(x1, blocks.rows), _split(x2, blocks.columns)
    row_starts = jnp.arange(row_blocks.shape[0]) * blocks.rows
    column_ends = (jnp.arange(column_blocks.shape[0]) + 1) * blocks.columns

    def row(start_and_block):
        start, block = start_and_block
        left = _features(apply, params, block, method)

        def compute(points):
            return _pair(apply, params, left, _features(apply, params, points, method), method)

        def column(end_and_points):
            end, points = end_and_points
            if not symmetric:
                return compute(points)
            shape = jax.eval_shape(compute, points)
            return jax.lax.cond(end > start, compute, lambda _: jnp.zeros(shape.shape, shape.dtype), points)

        return jax.lax.map(column, (column_ends, column_blocks))

    parts = jax.lax.map(row, (row_starts, row_blocks))  # (R, C, z, rows, z, columns)
    z = parts.shape[2]
    kernel = parts.transpose(0, 3, 1, 5, 2, 4).reshape(-1, column_blocks.shape[0] * blocks.columns, z, z)[:n1, :n2]
    if not symmetric:
        return kernel
    upper = (jnp.arange(n1)[:, None] <= jnp.arange(n2)[None])[:, :, None, None]
    return jnp.where(upper, kernel, kernel.transpose(1, 0, 3, 2))


def _features(apply, params, x, method):
    """What one block of points keeps while its partners go by."""
    return (structured.shares(apply, params, x) if method == "structured" else {}), x


def _pair(apply, params, left, right, method):
    """One block of the kernel, (z, rows, z, columns)."""
    (shares1, x1), (shares2, x2) = left, right
    if method == "products":
        return jacobian.by_products(apply, params, x1, x2)
    uncovered = [leaf for leaf in range(len(jax.tree.leaves(params))) if leaf not in shares1]
    parts = [structured.contract(shares1, shares2)] if shares1 else []
    parts += [jacobian.leafwise(apply, params, uncovered, x1, x2)] if uncovered else []
    return sum(parts[1:], parts[0])


def _block_sizes(apply, params, x1, x2, method, memory, rows) -> _Blocks:
    """Blocks whose layer inputs, signals and Jacobians fit into `memory`."""
    columns = x2.shape[0]
    if method == "products":
        return _Blocks(rows, columns)  # the points go through one by one already
    leaves, tree = jax.tree.flatten(params)
    shapes = tuple((leaf.shape, jnp.result_type(leaf)) for leaf in leaves)
    per_point = _bytes_per_point(apply, tree, shapes, x1.shape[1:], x1.dtype, method)
    points = max(2, int(memory // per_point))
    if rows + columns <= points:
        return _Blocks(rows, columns)
    # A column block's features are recomputed once per row block: rows get three quarters of the points, which is
    # within a third of the least possible recomputation and leaves columns long enough for full matrix products.
    row_block = min(rows, max(1, 3 * points // 4))
    column_block = min(columns, max(1, points - row_block))
    return _Blocks(_even(rows, row_block), _even(columns, column_block))


@lru_cache(maxsize=256)
def _bytes_per_point(apply, tree, shapes, point_shape, dtype, method) -> int:
    """What one point of a block keeps in memory, from shapes alone; cached, since tracing costs more than small kernels."""
    leaves = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
    params, point = jax.tree.unflatten(tree, leaves), jax.ShapeDtypeStruct((1, *point_shape), dtype)
    kept = jax.eval_shape(lambda p, x: structured.shares(apply, p, x), params, point) if method == "structured" else {}
    structured_bytes = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(kept))
    z = jax.eval_shape(apply, params, point).shape[-1]
    others = [z * leaf.size * leaf.dtype.itemsize for i, leaf in enumerate(leaves) if i not in kept]
    # vjp holds one more copy of the signals (before the constants are folded in) and the activations' derivatives.
    return max(1, 2 * structured_bytes + max(others, default=0))


def _even(total, block):
    """The block size that splits `total` into the same number of blocks with the least padding."""
    return -(-total // -(-total // block))


def _pad(x, multiple):
    """Repeat the last point until the number of points is a multiple."""
    return jnp.concatenate([x, jnp.repeat(x[-1:], -x.shape[0] % multiple, axis=0)])


def _split(x, block):
    padded = _pad(x, block)
    return padded.reshape(-1, block, *x.shape[1:])


def _check_inputs(apply, params, x1, x2, method, mesh):
    if method not in METHODS:
        raise ValueError(f"Unknown method {method!r}: choose one of {', '.join(METHODS)}.")
    if mesh is not None and len(mesh.axis_names) != 1:
        raise ValueError(
            f"The rows are sharded over a mesh of one axis and this one has {mesh.axis_names}: reshape it."
        )
    leaves = jax.tree.leaves(params)
    if not leaves or any(not jnp.issubdtype(jnp.result_type(leaf), jnp.floating) for leaf in leaves):
        raise TypeError(
            "params must be a non-empty pytree of floating-point arrays: drop counters and other statistics."
        )
    for name, x in (("x1", x1), ("x2", x2)):
        if x is None:
            continue
        if x.shape[0] == 0 or x.shape[1:] != x1.shape[1:]:
            raise ValueError(
                f"{name} has shape {x.shape}, x1 {x1.shape}: pass at least one point and points of one shape in both."
            )
        _check_finite(name, x)
    for leaf in leaves:
        _check_finite("params", leaf)
    out = jax.eval_shape(apply, params, x1).shape
    if len(out) != 2 or out[0] != x1.shape[0]:
        raise ValueError(
            f"apply(params, x) must return one embedding per point, shape ({x1.shape[0]}, z), and returns {out}: reshape it."
        )


def _check_finite(name, x):
    """Concrete arrays only: inside jit the values are not there to be looked at."""
    if not isinstance(x, jax.core.Tracer) and not bool(np.isfinite(np.asarray(x)).all()):
        raise ValueError(f"{name} has entries that are not finite: remove those points, or look at what made them.")
