"""Whether the numbers of a tree are finite, asked before long work."""

import jax
import jax.numpy as jnp
import numpy as np


def all_finite(tree) -> bool:
    """Whether concrete arrays hold neither NaN nor infinity; also while a function that closes over them is traced."""
    leaves = jax.tree.leaves(tree)
    if all(leaf.devices() == {jax.devices("cpu")[0]} for leaf in leaves if isinstance(leaf, jax.Array)):
        return all(bool(np.isfinite(np.asarray(leaf)).all()) for leaf in leaves)  # nothing to compile, nothing copied
    with jax.ensure_compile_time_eval():
        return bool(_on_device(leaves))


@jax.jit
def _on_device(leaves):
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in leaves]).all()
