r"""Sum-product message passing on the trees of a hierarchy, in log space: towards the root and back to the leaves.

With e_v the log-evidence at a leaf v (clean: 0 at its symbol and -inf elsewhere; noisy: -(z_v - a)^2 / (2 sigma^2)),
i(v) the rank of v among its parent's children and l(v) its layer,

    towards the root     h_v = sum over children c of q_c (at a leaf: e_v),     q_v = ln(M_v e^{h_v})
    back to the leaves   t_v = ln(M_v^T e^{t_parent + sum over siblings w of q_w}),   t_root = ln prior + other evidence
    posterior of a node  P(v | all evidence) = softmax(t_v + h_v)

The siblings are summed from the left and from the right: they are combined, the own message is never subtracted from a
total, which would be -inf - -inf where kernels have zeros. With the siblings on the left alone, t_v at a leaf is the
law of its symbol given all leaves to the left of it, for all leaves in one pass.

Messages count up to a constant for each node, so that the largest entry is subtracted at every step. Arrays are
(m, S, m^l, n): rank, symbol, parent, sample, see `to_nodes`.

Source: Pearl (Probabilistic Reasoning in Intelligent Systems, 1988), Mei (arXiv 2404.18444) for the two passes.
"""

import math

import jax
import jax.numpy as jnp


def through(kernel: jax.Array, h: jax.Array) -> jax.Array:
    r"""ln(M e^h) for the kernels (m, A, B) of a layer and h (m, B, nodes, n), up to one constant for each node.

    The sum is a matrix product of exponentials below the node's largest. Terms that underflow there are below a
    rounding of the result, unless all terms of an entry are small, and that takes kernels with zeros or nearly so. In
    this case the sums are done again in log space. Without any positive term an entry is -inf.
    """
    best = jnp.max(h, axis=1, keepdims=True)
    h = h - jnp.where(best > -jnp.inf, best, 0.0)
    log_kernel = jnp.log(kernel)
    total = jnp.einsum("iab,ibrn->iarn", kernel, jnp.exp(h), precision="highest")

    def in_log_space():
        def add(sum_, term):
            row, h = term  # one symbol b: (m, A) and (m, nodes, n)
            return jnp.logaddexp(sum_, row[:, :, None, None] + h[:, None]), None

        start = jnp.full_like(total, -jnp.inf)
        return jax.lax.scan(add, start, (jnp.moveaxis(log_kernel, 2, 0), jnp.moveaxis(h, 1, 0)))[0]

    smallest = jnp.min(jnp.where(kernel > 0, log_kernel, 0.0))
    return _log_unless_underflown(total, h, smallest, kernel.shape[2], in_log_space)


def log_products(a: jax.Array, b: jax.Array) -> jax.Array:
    """ln(e^a e^b^T) of a (..., n, S) and b (..., k, S) -> (..., n, k), by one matrix product where that is exact."""
    tops = [jnp.max(part, axis=-1, keepdims=True) for part in (a, b)]
    tops = [jnp.where(top > -jnp.inf, top, 0.0) for top in tops]
    a, b = a - tops[0], b - tops[1]
    total = jnp.einsum("...is,...js->...ij", jnp.exp(a), jnp.exp(b), precision="highest")

    def in_log_space():
        def add(sum_, term):
            return jnp.logaddexp(sum_, term[0][..., :, None] + term[1][..., None, :]), None

        return jax.lax.scan(add, jnp.full_like(total, -jnp.inf), (jnp.moveaxis(a, -1, 0), jnp.moveaxis(b, -1, 0)))[0]

    smallest = jnp.min(jnp.where(b > -jnp.inf, b, 0.0))
    logs = _log_unless_underflown(total, a, smallest, a.shape[-1], in_log_space)
    return logs + tops[0] + jnp.swapaxes(tops[1], -1, -2)


def _log_unless_underflown(total, h, smallest, terms, in_log_space):
    """ln total, unless a term e^{h + smallest} left the range of normal numbers where that would count."""
    info = jnp.finfo(total.dtype)
    tiny = float(info.tiny)

    def small_sums():
        # Sums may also be small because no term is positive at all.
        gone = jnp.any((h > -jnp.inf) & (h + smallest < jnp.log(jnp.asarray(tiny, h.dtype))))
        return jax.lax.cond(gone, in_log_space, lambda: jnp.log(total))

    # Terms that are lost sum up to less than a rounding of anything above this.
    least = terms * tiny / float(info.eps)
    # Not `<`: a NaN, from leaves that cannot be, must not hide the others.
    return jax.lax.cond(~(jnp.min(total, initial=jnp.inf) >= least), small_sums, lambda: jnp.log(total))


def clean(kernels: jax.Array, leaves: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Messages q of leaves (m, nodes, n) whose symbols are known, and their sums over siblings, (S, nodes, n)."""
    # A product with a unit vector copies a column exactly, and faster than a gather does on a CPU.
    symbols = jax.nn.one_hot(leaves, kernels.shape[-1], axis=1, dtype=kernels.dtype)
    columns = jnp.einsum("iab,ibrn->iarn", kernels[-1], symbols, precision="highest")
    q = jnp.log(columns)
    # One logarithm of a product instead of a sum of m, where no product can underflow.
    smallest = jnp.min(jnp.where(kernels[-1] > 0, kernels[-1], 1.0))
    safe = len(columns) * jnp.log(smallest) > math.log(jnp.finfo(kernels.dtype).tiny)
    return q, jax.lax.cond(safe, lambda: jnp.log(jnp.prod(columns, axis=0)), lambda: _sum(q))


def noisy_evidence(kernels: jax.Array, leaves: jax.Array, sigma: jax.Array) -> jax.Array:
    """Log-evidence (m, S, nodes, n) of leaves (m, nodes, n) seen with Gaussian noise, without the term of z^2."""
    symbols = jnp.arange(kernels.shape[-1], dtype=kernels.dtype)[None, :, None, None]
    return symbols * (leaves[:, None] - symbols / 2) / sigma**2


def noisy_weights(kernels: jax.Array, leaves: jax.Array, sigma: jax.Array) -> jax.Array:
    """The same as weights of the symbols, one for the nearest: e^(evidence - that of the nearest)."""
    symbols = jnp.arange(kernels.shape[-1], dtype=kernels.dtype)[None, :, None, None]
    nearest = jnp.clip(jnp.round(leaves), 0, kernels.shape[-1] - 1)[:, None]
    return jnp.exp((symbols - nearest) * ((leaves[:, None] - (symbols + nearest) / 2) * (1 / sigma**2)))


def to_root(kernels: jax.Array, messages: jax.Array, h: jax.Array | None = None) -> tuple[jax.Array, list[jax.Array]]:
    """Log-likelihood of the root, (S, n), and the messages of all edges, the first layer's first.

    Takes the messages of the leaves and, if they are known already, their sums over siblings.
    """
    found = [messages]
    h = _sum(messages) if h is None else h  # (S, nodes, n)
    for layer in kernels[-2::-1]:
        by_rank = h.reshape(len(h), len(layer), -1, h.shape[-1])
        found.append(through(layer, jnp.swapaxes(by_rank, 0, 1)))
        h = _sum(found[-1])
    return h[:, 0], found[::-1]


def to_leaves(kernels: jax.Array, messages: list[jax.Array], root: jax.Array, *, causal: bool) -> jax.Array:
    """What all other leaves, or those on the left, say of each leaf: t, (m, S, nodes, n); root is ln P of (S, n)."""
    t = root[:, None]
    for layer, q in zip(kernels, messages, strict=True):
        t = through(jnp.swapaxes(layer, 1, 2), t[None] + _others(q, causal))
        last, t = t, jnp.swapaxes(t, 0, 1).reshape(t.shape[1], -1, t.shape[-1])
    return last


def first_leaf(kernels: jax.Array, root: jax.Array) -> jax.Array:
    """Law of the first leaf, (S, n) up to a constant for each sample, for a law of the root of that shape."""
    t = root[None, :, None]
    for layer in kernels:
        t = through(jnp.swapaxes(layer[:1], 1, 2), t)
    return t[0, :, 0]


def _sum(q):
    # Written out: XLA does not vectorise a logarithm that is fused into a reduction.
    total = q[0]
    for part in q[1:]:
        total = total + part
    return total


def _others(q, causal):
    """Sums over the siblings on the left, and on the right unless causal, for each rank."""
    left, right = [jnp.zeros_like(q[0])], [jnp.zeros_like(q[0])]
    for i in range(len(q) - 1):
        left.append(left[-1] + q[i])
        right.append(right[-1] + q[len(q) - 1 - i])
    if causal:
        return jnp.stack(left)
    return jnp.stack([a + b for a, b in zip(left, right[::-1], strict=True)])
