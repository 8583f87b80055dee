"""Laws of the inner nodes of one tree, each given the leaves below it."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from theorykit.surrogate import _hierarchy_passes as passes
from theorykit.surrogate._hierarchy_model import check_laws, check_leaves, from_nodes


def beliefs(kernels: Float[Array, "L m S S"], leaves: Int[Array, "n leaves"]) -> tuple[Float[Array, "n nodes S"], ...]:
    r"""Laws of all inner nodes of one tree, each given the leaves below it: the messages towards the root.

    .. math:: b_v(a) = \frac{P(x_{below\,v} | v = a)}{\sum_b P(x_{below\,v} | v = b)}, \qquad
              P(x_{below\,v} | v = a) = \prod_{i=1}^{m} \sum_b M_i[a, b] \, P(x_{below\,v_i} | v_i = b)

    The law of a node under a uniform prior of its own, whatever the law of the root: up to a constant, what the leaves
    below a node say of everything else.

    Parameters
    ----------
    kernels : (L, m, S, S)
        Edge kernels of the tree, h.image or h.text.
    leaves : (n, m^L)
        Clean leaves.

    Returns
    -------
    Log-probabilities in nats, (n, m^l, S) for each layer l from the root, l = 0, to the parents of the leaves,
    l = L - 1; nodes from left to right, so that the ancestor of leaf v in layer l is node v // m^(L - l). NaN for nodes
    whose leaves no symbol can produce.

    Raises
    ------
    TypeError, ValueError
        For kernels that are no rows of laws, and for leaves of a wrong number, dtype or symbol.

    Source
    ------
    Pearl (Probabilistic Reasoning in Intelligent Systems, 1988); Mei (arXiv 2404.18444), where networks approximate
    these messages layer by layer.
    """
    _check_kernels(kernels, "beliefs")
    check_leaves(leaves, kernels, "beliefs", "leaves")
    return _beliefs(kernels, leaves)


def _check_kernels(kernels, where):
    if not isinstance(kernels, jax.Array) or not jnp.issubdtype(kernels.dtype, jnp.floating):
        kind = kernels.dtype if isinstance(kernels, jax.Array) else type(kernels).__name__
        raise TypeError(f"{where}: kernels are {kind}; give the floating-point kernels of one tree, h.image or h.text")
    if kernels.ndim != 4 or not kernels.size or kernels.shape[2] != kernels.shape[3]:
        raise ValueError(f"{where}: kernels have shape {kernels.shape}; give (depth, arity, S, S), h.image or h.text")
    if not isinstance(kernels, jax.core.Tracer):
        check_laws(where, "kernels", np.asarray(kernels))


@jax.jit
def _beliefs(kernels, leaves):
    # A node's evidence is the sum of what its children say, which the pass to the root has found for all of them.
    said = [jnp.sum(messages, axis=0) for messages in passes.evidence(kernels, leaves)[1]]  # (S, m^l, n)
    return tuple(jax.nn.log_softmax(_nodes_in_order(h, kernels[:layer]), axis=2) for layer, h in enumerate(said))


def _nodes_in_order(h, above):
    """(S, m^l, n) -> (n, m^l, S), nodes from left to right, with the kernels above the nodes."""
    if not len(above):
        return jnp.transpose(h, (2, 1, 0))
    return from_nodes(jnp.swapaxes(h.reshape(len(h), above.shape[1], -1, h.shape[-1]), 0, 1), above)
