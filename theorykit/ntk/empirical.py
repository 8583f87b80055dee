r"""The empirical neural tangent kernel of any encoder, in bounded memory, on one device or many.

    K(x_i, x_j)[o, p] = sum_theta  d f_o(x_i) / d theta  *  d f_p(x_j) / d theta

Three implementations that agree to rounding: `structured` (Gram matrices of layer inputs and backpropagated signals;
what its layers do not cover goes to the Jacobian), `jacobian` (a few leaves at a time) and `products` (a reverse and a
forward pass per column). See the modules `structured` and `jacobian` for the algebra.

Parts and blocks: the kernel is the sum of a structured part and of one part per group of leaves that need a Jacobian.
In each part the rows are split into blocks of points, the columns likewise, such that what a pair of blocks needs fits
into `memory` bytes. Row blocks are processed once; column blocks are recomputed for every row block, and of a symmetric
kernel only the upper half is computed.
"""

from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Shaped

from theorykit.ntk import jacobian, structured
from theorykit.ntk._finite import all_finite

METHODS = ("structured", "jacobian", "products")


class _Part(NamedTuple):
    """A summand of the kernel: leaves for the Jacobian, None for all that `structured` covers; points per block."""

    leaves: tuple[int, ...] | None
    rows: int
    columns: int


def empirical_ntk(
    apply: Callable,
    params: Any,
    x1: Shaped[Array, "n1 ..."],
    x2: Shaped[Array, "n2 ..."] | None = None,
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
        "structured" for flax modules built from dense and convolutional layers (anything else in them is handled too,
        by the Jacobian), "jacobian" or "products" for checks and for functions that are no flax module.
    memory
        Bytes that what a pair of blocks keeps and computes may take, beside the kernel itself, and copies of it that
        the compiler makes. A pair of points is the least. "products" does not use it: it holds one pass over x1.
    mesh
        A one-dimensional mesh of devices over which the rows of the kernel are sharded; same result as on one device.
        `memory` is then per device. If the number of devices does not divide n1, each holds the whole result at the
        end.

    Returns
    -------
    Array of shape (n1, n2, z, z), in the units of f squared.

    Raises
    ------
    ValueError
        Points of different shapes, empty or non-finite input, running statistics among the parameters, an unknown
        method, an output that is not (n, z), a mesh with more than one axis.
    TypeError
        Parameters that are not floating-point arrays, an output that is not one such array, an apply that cannot be
        hashed.

    Notes
    -----
    Products run at precision "highest", in `apply` too unless it asks for another one: relative error about
    sqrt(fan_in) * eps of the dtype.

    Source: derivation; the two other methods follow Novak et al. (2022, arXiv 2206.08720).
    """
    x1, x2, symmetric = jnp.asarray(x1), jnp.asarray(x1 if x2 is None else x2), x2 is None
    _check_settings(method, mesh)
    check_points(apply, params, x1, x2)
    devices = 1 if mesh is None else mesh.size
    parts = _parts(apply, params, x1, x2, method, memory, -(-x1.shape[0] // devices))
    if mesh is None:
        return _kernel(apply, params, x1, x2, parts, symmetric)
    # With explicit axes, which jax.make_mesh gives, shardings would be a part of the types here and of the result's.
    mesh = Mesh(mesh.devices, mesh.axis_names)
    params, x1, x2 = jax.device_put((params, x1, x2), NamedSharding(mesh, PartitionSpec()))
    rows = jax.device_put(_pad(x1, devices), NamedSharding(mesh, PartitionSpec(*mesh.axis_names)))
    return _sharded_kernel(apply, params, rows, x2, parts, mesh, x1.shape[0])


def two_view(
    apply: Callable, params: Any, xa: Shaped[Array, "..."], xb: Shaped[Array, "..."], **options: Any
) -> tuple[Float[Array, "n n z z"], Float[Array, "n n z z"], Float[Array, "n n z z"]]:
    """Kernel blocks (aa, ab, bb) of two views, each (n, n, z, z), as `flow` takes them.

    Parameters
    ----------
    apply, params
        As in `empirical_ntk`.
    xa, xb
        The two views of the same n examples, (n, ...) each.
    **options
        method, memory and mesh of `empirical_ntk`.

    Returns
    -------
    K(xa, xa), K(xa, xb) and K(xb, xb).

    Raises
    ------
    ValueError
        If the views differ in shape, and as `empirical_ntk`.

    Source: derivation.
    """
    if xa.shape != xb.shape:
        raise ValueError(
            f"The two views must have the same shape and have {xa.shape} and {xb.shape}: "
            "pass one row of each view per example."
        )
    n = xa.shape[0]
    kernel = empirical_ntk(apply, params, jnp.concatenate([xa, xb]), **options)
    return kernel[:n, :n], kernel[:n, n:], kernel[n:, n:]


def ntk_vector_product(
    apply: Callable, params: Any, x1: Shaped[Array, "n1 ..."], x2: Shaped[Array, "n2 ..."], vector: Float[Array, "..."]
) -> Float[Array, "n1 z"]:
    """Matrix-free product sum_{j, p} K(x1_i, x2_j)[o, p] vector[j, p] = J(x1) J(x2)^T vector.

    One reverse pass over x2 and one forward pass over x1; the kernel is never formed. For iterative solvers and
    spectra.

    Parameters
    ----------
    apply, params, x1, x2
        As in `empirical_ntk`.
    vector
        One number per point of x2 and output, (n2, z).

    Returns
    -------
    Array of shape (n1, z), in the units of f squared times those of the vector.

    Raises
    ------
    ValueError
        As `empirical_ntk`, and if the vector is not a finite (n2, z).
    TypeError
        As `empirical_ntk`, and if the vector has another dtype than the embeddings.

    Source: as `empirical_ntk`.
    """
    x1, x2, vector = jnp.asarray(x1), jnp.asarray(x2), jnp.asarray(vector)
    out = check_points(apply, params, x1, x2)
    expected = (x2.shape[0], out.shape[-1])
    if vector.shape != expected:
        raise ValueError(
            f"vector has shape {vector.shape}: pass one number per point of x2 and output of apply, {expected}."
        )
    if vector.dtype != out.dtype:
        raise TypeError(f"vector has dtype {vector.dtype} and the embeddings {out.dtype}: cast it with astype.")
    _check_finite("vector", vector)
    return _vector_product(apply, params, x1, x2, vector)


@partial(jax.jit, static_argnames="apply")
def _vector_product(apply, params, x1, x2, vector):
    with jax.default_matmul_precision("highest"):
        return jacobian.vector_product(apply, params, x1, x2, vector)


@partial(jax.jit, static_argnames=("apply", "parts", "symmetric"))
def _kernel(apply, params, x1, x2, parts, symmetric):
    return _sum_of_parts(apply, params, x1, x2, parts, symmetric)


@partial(jax.jit, static_argnames=("apply", "parts", "mesh", "n1"))
def _sharded_kernel(apply, params, x1, x2, parts, mesh, n1):
    (axis,) = mesh.axis_names
    whole, rows = PartitionSpec(), PartitionSpec(axis)

    def shard(params, x1, x2):
        return _sum_of_parts(apply, params, x1, x2, parts, symmetric=False)

    # check_vma: the scans over blocks start from constants, which the check would want marked as varying.
    sharded = jax.shard_map(shard, mesh=mesh, in_specs=(whole, rows, whole), out_specs=rows, check_vma=False)
    kernel = sharded(params, x1, x2)
    if n1 == x1.shape[0]:
        return kernel
    # An axis that the devices do not divide cannot stay sharded.
    return jax.lax.with_sharding_constraint(kernel, NamedSharding(mesh, whole))[:n1]


def _sum_of_parts(apply, params, x1, x2, parts, symmetric):
    with jax.default_matmul_precision("highest"):
        if parts is None:
            return jacobian.by_products(apply, params, x1, x2).transpose(1, 3, 0, 2)
        kernels = [_blocked(apply, params, x1, x2, part, symmetric) for part in parts]
        return sum(kernels[1:], kernels[0])


def _blocked(apply, params, x1, x2, part, symmetric):
    """One part of the kernel from pairs of blocks; (n1, n2, z, z)."""
    n1, n2 = x1.shape[0], x2.shape[0]

    def features(points):
        """What one block of points keeps while its partners go by."""
        if part.leaves is None:
            return structured.shares(apply, params, points)
        return jacobian.of_leaves(apply, params, part.leaves, points)

    contract = structured.contract if part.leaves is None else jacobian.contract  # (z, rows, z, columns)
    if part.rows >= n1 and part.columns >= n2:
        left = features(x1)
        return contract(left, left if symmetric else features(x2)).transpose(1, 3, 0, 2)
    row_blocks, column_blocks = _split(x1, part.rows), _split(x2, part.columns)
    row_starts = jnp.arange(row_blocks.shape[0]) * part.rows
    column_ends = (jnp.arange(column_blocks.shape[0]) + 1) * part.columns

    def row(start_and_block):
        start, block = start_and_block
        left = features(block)

        def compute(points):
            return contract(left, features(points))

        def column(end_and_points):
            end, points = end_and_points
            if not symmetric:
                return compute(points)
            shape = jax.eval_shape(compute, points)
            return jax.lax.cond(end > start, compute, lambda _: jnp.zeros(shape.shape, shape.dtype), points)

        return jax.lax.map(column, (column_ends, column_blocks))

    blocks = jax.lax.map(row, (row_starts, row_blocks))  # (R, C, z, rows, z, columns)
    z = blocks.shape[2]
    kernel = blocks.transpose(0, 3, 1, 5, 2, 4).reshape(-1, column_blocks.shape[0] * part.columns, z, z)[:n1, :n2]
    if not symmetric:
        return kernel
    upper = (jnp.arange(n1)[:, None] <= jnp.arange(n2)[None])[:, :, None, None]
    return jnp.where(upper, kernel, kernel.transpose(1, 0, 3, 2))


def _parts(apply, params, x1, x2, method, memory, rows) -> tuple[_Part, ...] | None:
    """The parts of the kernel, each with blocks that fit into `memory`; None for products."""
    if method == "products":
        return None
    costs = _costs(apply, *_signature(params, x1), method)
    return tuple(_Part(leaves, *_block_sizes(*bytes_, memory, rows, x2.shape[0])) for leaves, *bytes_ in costs)


def _block_sizes(per_point, per_pair, memory, rows, columns) -> tuple[int, int]:
    """Points per block of rows and of columns."""

    def split(points):
        # A column block is recomputed once per row block: rows get three quarters of the points, which is within a
        # third of the least possible recomputation and leaves columns long enough for full matrix products.
        row_block = min(rows, max(1, 3 * points // 4))
        return row_block, min(columns, max(1, points - row_block))

    def fits(row_block, column_block):
        return per_point * (row_block + column_block) + per_pair * row_block * column_block <= memory

    if fits(rows, columns):
        return rows, columns
    points = max(2, min(rows + columns, int(memory // per_point)))
    while points > 2 and not fits(*split(points)):
        points = 3 * points // 4
    row_block, column_block = split(points)
    return _even(rows, row_block), _even(columns, column_block)


def _signature(params, x):
    """What is known of parameters and points before they have values; hashable."""
    leaves, tree = jax.tree.flatten(params)
    return tree, tuple((leaf.shape, jnp.result_type(leaf)) for leaf in leaves), x.shape[1:], x.dtype


def _from_signature(tree, shapes, point_shape, dtype, points):
    params = jax.tree.unflatten(tree, [jax.ShapeDtypeStruct(*shape) for shape in shapes])
    return params, jax.ShapeDtypeStruct((points, *point_shape), dtype)


# Both are cached, since tracing costs more than a small kernel.


@lru_cache(maxsize=256)
def _output(apply, *signature):
    """What apply returns for two points."""
    return jax.eval_shape(apply, *_from_signature(*signature, 2))


@lru_cache(maxsize=256)
def _costs(apply, tree, shapes, point_shape, dtype, method):
    """(leaves, bytes per point, bytes per pair of points) of each part, from shapes alone."""
    params, point = _from_signature(tree, shapes, point_shape, dtype, 1)
    costs, covered = [], set()
    if method == "structured":
        covered, *needs = structured.cost(apply, params, point)
        costs += [(None, *needs)] if covered else []
    rest = [leaf for leaf in range(len(shapes)) if leaf not in covered]
    for group in jacobian.groups(rest, params):
        costs.append((group, jacobian.cost(apply, params, group, point), 0))
    return tuple(costs)


def _even(total, block):
    """The block size that splits `total` into the same number of blocks with the least padding."""
    return -(-total // -(-total // block))


def _pad(x, multiple):
    """Repeat the last point until the number of points is a multiple."""
    return jnp.concatenate([x, jnp.repeat(x[-1:], -x.shape[0] % multiple, axis=0)])


def _split(x, block):
    padded = _pad(x, block)
    return padded.reshape(-1, block, *x.shape[1:])


def _check_settings(method, mesh):
    if method not in METHODS:
        raise ValueError(f"Unknown method {method!r}: choose one of {', '.join(METHODS)}.")
    if mesh is not None and len(mesh.axis_names) != 1:
        raise ValueError(
            f"The rows are sharded over a mesh of one axis and this one has {mesh.axis_names}: reshape it."
        )


def check_points(apply, params, x1, x2=None) -> jax.ShapeDtypeStruct:
    """Raise for what has no kernel, as `empirical_ntk` says; otherwise what apply returns for two points."""
    x2 = x1 if x2 is None else x2
    try:
        hash(apply)
    except TypeError as error:
        raise TypeError(
            f"apply cannot be hashed ({error}), so its compiled kernel could not be found again: "
            "pass a plain function, and give modules tuples in place of lists."
        ) from error
    leaves = jax.tree.leaves(params)
    if not leaves or any(
        not hasattr(leaf, "shape") or not jnp.issubdtype(jnp.result_type(leaf), jnp.floating) for leaf in leaves
    ):
        raise TypeError(
            "params must be a non-empty pytree of floating-point arrays: drop counters and other statistics."
        )
    if isinstance(params, Mapping) and "batch_stats" in params:
        raise ValueError("params holds batch_stats, which are no parameters: let apply close over them.")
    if x1.ndim == 0 or x2.ndim == 0 or x1.shape[1:] != x2.shape[1:] or not x1.size or not x2.size:
        raise ValueError(
            f"x1 has shape {x1.shape} and x2 {x2.shape}: pass at least one point, along the leading axis, and points "
            "of one shape in both."
        )
    _check_finite("x1", x1)
    if x2 is not x1:
        _check_finite("x2", x2)
    _check_finite("params", params)
    out = _output(apply, *_signature(params, x1))
    if not isinstance(out, jax.ShapeDtypeStruct) or not jnp.issubdtype(out.dtype, jnp.floating):
        raise TypeError(f"apply(params, x) must return one floating-point array and returns {out}: return that alone.")
    if len(out.shape) != 2 or out.shape[0] != 2:
        raise ValueError(
            f"apply(params, x) must return one embedding per point, (n, z), and for two points returns {out.shape}: "
            "reshape it."
        )
    return out


def _check_finite(name, tree):
    """Concrete arrays only: inside jit the values are not there to be looked at."""
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(tree)):
        return
    if not all_finite(tree):
        raise ValueError(f"{name} has entries that are not finite: remove those points, or look at what made them.")
