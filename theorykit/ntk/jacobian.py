r"""The kernel of any function: Jacobian contraction leaf by leaf, and products with vectors.

    K(x_i, x_j)[o, p] = sum_leaves  <d f_o(x_i) / d leaf, d f_p(x_j) / d leaf>

`leafwise` forms the Jacobian of one leaf for one block of points at a time, so memory is bounded by one leaf's block:
points * z * leaf size. `by_products` never forms a Jacobian: column (j, p) is J(x) (J(x_j)^T e_p), a reverse and a forward
pass. Both hold for any `apply` that treats rows independently.

Source: the three ways of contracting are compared by Novak, Sohl-Dickstein, Schoenholz (2022, arXiv 2206.08720).
"""

import jax
import jax.numpy as jnp


def leaf_jacobian(apply, params, leaf: int, x):
    """Jacobian of one leaf, flattened: (z, n, leaf size)."""
    leaves, tree = jax.tree.flatten(params)

    def single(value, point):
        changed = [*leaves[:leaf], value, *leaves[leaf + 1 :]]
        return apply(jax.tree.unflatten(tree, changed), point[None])[0]

    jacobian = jax.vmap(jax.jacrev(single), in_axes=(None, 0), out_axes=1)(leaves[leaf], x)
    return jacobian.reshape(*jacobian.shape[:2], -1)


def leafwise(apply, params, leaves, x1, x2):
    """The sum over the given leaves (positions in jax.tree.leaves), shape (z, n1, z, n2)."""
    total = None
    for leaf in leaves:
        left = leaf_jacobian(apply, params, leaf, x1)
        right = left if x2 is x1 else leaf_jacobian(apply, params, leaf, x2)
        (z, n1, size), n2 = left.shape, right.shape[1]
        part = jnp.matmul(left.reshape(z * n1, size), right.reshape(z * n2, size).T, precision="highest")
        part = part.reshape(z, n1, z, n2)
        total = part if total is None else total + part
    return total


def by_products(apply, params, x1, x2):
    """Every column by a reverse and a forward pass, shape (z, n1, z, n2)."""

    def column(point, cotangent):
        _, pullback = jax.vjp(lambda p: apply(p, point[None])[0], params)
        return jax.jvp(lambda p: apply(p, x1), (params,), pullback(cotangent))[1]

    z = jax.eval_shape(apply, params, x2).shape[-1]
    basis = jnp.eye(z, dtype=jax.tree.leaves(params)[0].dtype)
    columns = jax.lax.map(lambda point: jax.vmap(lambda e: column(point, e))(basis), x2)
    return columns.transpose(3, 2, 1, 0)


def vector_product(apply, params, x1, x2, vector):
    """J(x1) (J(x2)^T v): (n2, z) -> (n1, z), with one reverse and one forward pass over all points."""
    _, pullback = jax.vjp(lambda p: apply(p, x2), params)
    return jax.jvp(lambda p: apply(p, x1), (params,), pullback(vector))[1]
