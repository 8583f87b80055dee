r"""The kernel of any function: Jacobian contraction leaf by leaf, and products with vectors.

    K(x_i, x_j)[o, p] = sum_leaves  <d f_o(x_i) / d leaf, d f_p(x_j) / d leaf>

`of_leaves` forms the Jacobian of a few leaves for one block of points, and `contract` multiplies two of them, so memory
is bounded by points * z * leaf size and the activations. `by_products` never forms a Jacobian: column (j, p) is
J(x) (J(x_j)^T e_p), a reverse and a forward pass. Both hold for any `apply` that treats rows independently.

Source: the three ways of contracting are compared by Novak, Sohl-Dickstein, Schoenholz (2022, arXiv 2206.08720).
"""

import math

import jax
import jax.numpy as jnp
from jax.extend.core import jaxprs_in_params

# Up to this many outputs the kernel of a block with itself is computed as its upper half.
_SYMMETRIC_OUTPUTS = 8


def groups(leaves, params) -> list[tuple[int, ...]]:
    """Split leaves (positions in jax.tree.leaves) into groups no larger than the largest leaf: a few passes for all."""
    sizes = [leaf.size for leaf in jax.tree.leaves(params)]
    limit = max((sizes[leaf] for leaf in leaves), default=0)
    found, room = [], 0
    for leaf in leaves:
        if sizes[leaf] > room:
            found, room = [*found, ()], limit
        found[-1] += (leaf,)
        room -= sizes[leaf]
    return found


def of_leaves(apply, params, chosen: tuple[int, ...], x):
    """Jacobian of the chosen leaves (positions in jax.tree.leaves), flattened: (z, n, size of these leaves)."""
    leaves, tree = jax.tree.flatten(params)

    def single(values, point):
        changed = list(leaves)
        for leaf, value in zip(chosen, values, strict=True):
            changed[leaf] = value
        return apply(jax.tree.unflatten(tree, changed), point[None])[0]

    values = [leaves[leaf] for leaf in chosen]
    jacobians = jax.vmap(jax.jacrev(single), in_axes=(None, 0), out_axes=1)(values, x)
    return jnp.concatenate([jacobian.reshape(*jacobian.shape[:2], -1) for jacobian in jacobians], axis=-1)


def cost(apply, params, chosen: tuple[int, ...], x) -> int:
    """Bytes that a point needs in `of_leaves`, from shapes alone; x is a single point, (1, ...)."""
    leaves = [jax.tree.leaves(params)[leaf] for leaf in chosen]
    jacobian = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
    closed = jax.make_jaxpr(apply)(params, x)
    # Forward and backward pass hold each intermediate array at most once, the backward pass for all outputs together.
    per_point = closed.out_avals[0].shape[-1] * (jacobian + _intermediates(closed.jaxpr))
    return 3 * per_point // 2  # copies of the compiler: none with jaxlib 0.10.2, up to 0.3 of the whole with 0.12.0


def _intermediates(jaxpr) -> int:
    """Bytes of all arrays that a program computes."""
    inner = sum(_intermediates(part) for equation in jaxpr.eqns for part in jaxprs_in_params(equation.params))
    outputs = [variable.aval for equation in jaxpr.eqns for variable in equation.outvars]
    return inner + sum(math.prod(aval.shape) * aval.dtype.itemsize for aval in outputs)


def contract(left, right):
    """(z, n1, m), (z, n2, m) -> (z, n1, z, n2) as one matrix product; of an array with itself, outputs o <= p only.

    The symmetric form needs (z + 1) / (2 z) of the products. It is left out for many outputs, whose z^2 / 2 small
    products take longer to compile (2.3 s for z = 32, 0.3 s for z = 8) than they save.
    """
    (z, n1, m), n2 = left.shape, right.shape[1]
    if right is left and z <= _SYMMETRIC_OUTPUTS:
        upper = {(o, p): jnp.matmul(left[o], left[p].T, precision="highest") for o in range(z) for p in range(o, z)}
        full = [[upper[o, p] if o <= p else upper[p, o].T for p in range(z)] for o in range(z)]
        return jnp.stack([jnp.stack(row, axis=1) for row in full])
    product = jnp.matmul(left.reshape(z * n1, m), right.reshape(z * n2, m).T, precision="highest")
    return product.reshape(z, n1, z, n2)


def by_products(apply, params, x1, x2):
    """Every column by a reverse and a forward pass, shape (z, n1, z, n2)."""

    def column(point, cotangent):
        _, pullback = jax.vjp(lambda p: apply(p, point[None])[0], params)
        return jax.jvp(lambda p: apply(p, x1), (params,), pullback(cotangent))[1]

    out = jax.eval_shape(apply, params, x2)
    basis = jnp.eye(out.shape[-1], dtype=out.dtype)
    columns = jax.lax.map(lambda point: jax.vmap(lambda e: column(point, e))(basis), x2)
    return columns.transpose(3, 2, 1, 0)


def vector_product(apply, params, x1, x2, vector):
    """J(x1) (J(x2)^T v): (n2, z) -> (n1, z), with one reverse and one forward pass over all points."""
    _, pullback = jax.vjp(lambda p: apply(p, x2), params)
    return jax.jvp(lambda p: apply(p, x1), (params,), pullback(vector))[1]
