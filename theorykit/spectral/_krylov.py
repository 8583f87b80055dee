r"""Block Krylov methods on products with data that are read in blocks of rows.

`products` computes A Q with A = X_c^T X_c, the Gram operator of centred data, in one pass over the rows: each block
is centred, multiplied by Q and, while it is still in cache, its transpose by the result. Nothing of the size of the
data or of A is ever stored. A `jax.Array` is read where it lies. A numpy array, memory-mapped or not, stays on the host
and is handed over block by block.

`leading` finds the leading eigenpairs of such an operator: Rayleigh-Ritz in a block Krylov space, which grows by one
block, the residuals of the leading Ritz vectors, with each pass, and shrinks to its best Ritz vectors when it is full
(a thick restart). With the same number of passes its space contains that of subspace iteration, the usual randomised
method, whose error falls by a fixed factor per pass where that of a Krylov space falls like a Chebyshev polynomial.

The basis is kept in Ritz coordinates. Then the entries of T = Q^T A Q that decide on the last, small eigenvalues are
products of small numbers, and rounding disturbs each eigenvalue in proportion to its own size rather than the largest.

Source: Halko, Martinsson and Tropp 2011 (arXiv 0909.4061) for random starts; Musco and Musco 2015 (arXiv 1504.05477)
for block Krylov spaces; Wu and Simon 2000 (SIAM J. Matrix Anal. Appl. 22) for thick restarts; Davis and Kahan 1970
(SIAM J. Numer. Anal. 7) for the bound on the angle.
"""

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import threadpoolctl

CONVERGED = 0
ROUNDING = 1
MAX_STEPS = 2

# Bytes of one block of rows: it must stay in cache between its two products. Measured on two cores with 3,072 columns:
# 3 to 12 MB run alike, 60 MB takes 1.6 times as long.
_BLOCK_BYTES = 2**23
# Columns beyond k that the block holds: they let the gap after k be seen and cost little. The usual choice is 5 to 10.
_OVERSAMPLING = 8
# Blocks that the basis holds. A restart costs some of the convergence; with 8 blocks the small dense eigenproblem
# still takes a fraction of a pass.
BLOCKS = 8
# Smaller side of the matrices that one thread decomposes.
_SMALL = 1024
# Below this many eps, relative to the largest eigenvalue, rounding competes with convergence.
ROUNDING_EPS = 10


class Leading(NamedTuple):
    """Leading eigenpairs of a positive semidefinite operator, with what is known of their error.

    values (k,) decreasing; vectors (d, k) orthonormal; residuals (k,) ``|A v - theta v| / theta_1``; angle () bound on
    the sine of the largest angle to the true span; status; steps, the number of products.
    """

    values: np.ndarray
    vectors: jax.Array
    residuals: np.ndarray
    angle: float
    status: int
    steps: int


def width(k: int, d: int) -> int:
    """Columns of a block for k eigenpairs in dimension d; d itself where a few blocks would fill the space anyway."""
    block = -8 * (-(k + _OVERSAMPLING) // 8)  # products run best on multiples of 8
    return d if d <= 3 * block else block


def _rows(views) -> int:
    return max(1, _BLOCK_BYTES // sum(view.shape[1] * view.dtype.itemsize for view in views))


def _pieces(views) -> Iterator[tuple]:
    """The data where they lie, or the blocks of rows that are handed over from the host."""
    n = views[0].shape[0]
    if all(isinstance(view, jax.Array) for view in views):
        yield views
        return
    rows = _rows(views)
    for start in range(0, n, rows):
        yield tuple(view[start : start + rows] for view in views)


def _accumulate(one_block, total, views):
    """Add one_block(rows of the views) over all blocks of rows."""
    n, rows = views[0].shape[0], _rows(views)

    def add(total, block):
        return jax.tree.map(jnp.add, total, one_block(block))

    def step(i, total):
        return add(total, tuple(jax.lax.dynamic_slice_in_dim(view, i * rows, rows) for view in views))

    whole = n // rows
    total = jax.lax.fori_loop(0, whole, step, total) if whole else total
    return add(total, tuple(view[whole * rows :] for view in views)) if n % rows else total


def _over_pieces(function, total, views, *arguments):
    """Apply a compiled sum piece by piece, with one piece at work and the next one on its way."""
    for piece in _pieces(views):
        new = function(total, piece, *arguments)
        jax.block_until_ready(total)  # else the host would run ahead and hold copies of every block at once
        total = new
    return total


@jax.jit
def _add_sums(total, piece, shift):
    return _accumulate(lambda block: jnp.sum(block[0] - shift[None, :], axis=0), total, piece)


@jax.jit
def _add_squares(total, piece, mean):
    return _accumulate(lambda block: jnp.sum((block[0] - mean[None, :]) ** 2), total, piece)


@jax.jit
def _add_products(total, piece, means, bases):
    def one_block(block):
        centred = [part - mean[None, :] for part, mean in zip(block, means, strict=True)]
        seen = [jnp.matmul(c, q, precision="highest") for c, q in zip(centred, bases, strict=True)]
        # Without the barrier XLA on CPU turns (C Q)^T into Q^T C^T, whose product is several times slower.
        scores = jax.lax.optimization_barrier(jnp.concatenate(seen, axis=1))
        return tuple(jnp.matmul(scores.T, c, precision="highest") for c in centred)

    return _accumulate(one_block, total, piece)


def moments(x: Any, centre: bool) -> tuple[jax.Array, jax.Array]:
    """Mean of the rows, 0 if not centred, and the sum of the squares of all entries beyond it.

    The mean is taken relative to the first row: a constant feature then has exactly its mean, and a mean much larger
    than the spread does not cost digits.
    """
    first = jnp.asarray(x[0])
    zero = jnp.zeros_like(first)
    mean = first + _over_pieces(_add_sums, zero, (x,), first) / x.shape[0] if centre else zero
    return mean, _over_pieces(_add_squares, zero[0], (x,), mean)


def products(views: tuple, means: tuple, bases: tuple) -> tuple[jax.Array, ...]:
    """For each view i the product ``C_i^T [C_1 Q_1, C_2 Q_2, ...]``, C centred, in one pass over the rows."""
    columns = sum(q.shape[1] for q in bases)
    total = tuple(jnp.zeros((columns, q.shape[0]), q.dtype) for q in bases)
    return tuple(product.T for product in _over_pieces(_add_products, total, views, means, bases))


@jax.jit
def orthonormalise(block, basis, dual, floor):
    """Orthonormal columns that span the block beyond the basis, where dual^T basis = I.

    Twice, since once loses digits to cancellation. With floor > 0, columns become 0 of which no more than that is left
    beyond the basis and the columns before: being rounding, they would leave the range of the operator. With floor = 0
    such columns are completed by arbitrary ones.
    """
    lengths = jnp.linalg.norm(block, axis=0)
    block = block / jnp.maximum(lengths, jnp.finfo(block.dtype).tiny)[None, :]
    for _ in range(2):
        inside = jnp.matmul(dual.T, block, precision="highest")
        block, r = jnp.linalg.qr(block - jnp.matmul(basis, inside, precision="highest"))
        lengths *= jnp.abs(jnp.diagonal(r))
        block = jnp.where(((lengths > floor) | (floor == 0))[None, :], block, 0)
    return block


@jax.jit
def _to_ritz(basis, image, rotation, values):
    """Basis and image in Ritz coordinates, with the residuals."""
    basis = jnp.matmul(basis, rotation, precision="highest")
    image = jnp.matmul(image, rotation, precision="highest")
    residual = image - basis * values[None, :]
    return basis, image, residual, jnp.linalg.norm(residual, axis=0)


@jax.jit
def put(arrays, blocks, size):
    """Put a block behind the first `size` columns of each array."""
    return jax.tree.map(lambda a, b: jax.lax.dynamic_update_slice_in_dim(a, b, size, axis=1), arrays, blocks)


@jax.jit
def keep(arrays, size):
    """Set all but the first `size` columns to 0."""
    return jax.tree.map(lambda a: jnp.where(jnp.arange(a.shape[1])[None, :] < size, a, jnp.zeros_like(a)), arrays)


@jax.jit
def inner(left, right):
    """Inner products of the columns."""
    return jnp.matmul(left.T, right, precision="highest")


def leading(
    product: Callable[[jax.Array], jax.Array], d: int, k: int, key: Any, dtype: Any, *, tolerance: float, max_steps: int
) -> Leading:
    """Find the k leading eigenpairs of a positive semidefinite operator on R^d from its products with blocks.

    It stops as CONVERGED when the bound on the angle to the true span is at most `tolerance`; as ROUNDING when the
    residuals have stopped to fall at the rounding of the products while the bound is still larger, as it is where
    values k and k + 1 are equal or nearly so; as MAX_STEPS after so many products.

    The bound: a Ritz vector with residual r_j has at most ``|r_j| / (theta_j - lambda_(k+1))`` outside the leading
    eigenspace, lambda_(k+1) being at most theta_(k+1) + |r_(k+1)| unless the random start missed an eigenvector,
    which happens with probability 0.
    """
    found = ritz_space(
        product,
        d,
        k,
        lambda columns: random_orthonormal(key, d, columns, dtype),
        dtype,
        tolerance=tolerance,
        max_steps=max_steps,
    )
    return found._replace(values=found.values[:k], vectors=found.vectors[:, :k])


def ritz_space(product, d, k, start, dtype, *, tolerance, max_steps, floor=0.0) -> Leading:
    """As `leading`, but with all Ritz pairs of the final space; start(columns) gives the first, orthonormal block.

    With `floor` > 0, what is left of residuals below that part of the largest value does not extend the basis, which
    then has columns of 0.
    """
    block_width = width(k, d)
    space = min(BLOCKS * block_width, d // block_width * block_width)
    whole = block_width == d
    block = jnp.eye(d, dtype=dtype) if whole else start(block_width)
    basis = image = jnp.zeros((d, space), dtype)
    size, previous, eps = 0, np.inf, float(jnp.finfo(dtype).eps)
    with threadpoolctl.threadpool_limits(1):  # all its dense problems are small: see few_threads
        for steps in range(1, max_steps + 1):
            basis, image = put((basis, image), (block, product(block)), size)
            size += block_width
            small = np.asarray(inner(basis, image), np.float64)[:size, :size]
            values, rotation = np.linalg.eigh((small + small.T) / 2)
            values, rotation = np.maximum(values[::-1], 0), rotation[:, ::-1]
            rotate = padded(rotation, (space, space), dtype), padded(values, (space,), dtype)
            basis, image, residual, norms = _to_ritz(basis, image, *rotate)
            norms = np.asarray(norms, np.float64)[:size]
            angle = _angle(values, norms, k)
            worst = float(norms[: k + 1].max())
            at_rounding = worst <= ROUNDING_EPS * eps * values[0] and worst >= previous / 2
            status = CONVERGED if angle <= tolerance else ROUNDING if at_rounding or whole else MAX_STEPS
            if status != MAX_STEPS or steps == max_steps:
                break
            previous = worst
            if size + block_width > space:
                size = max(space // block_width // 2, 1) * block_width
            basis, image = keep((basis, image), size)
            # Leading pairs first, but for those that have converged beyond the floor.
            chosen = np.argsort(norms <= floor * values[0], kind="stable")[:block_width]
            block = orthonormalise(residual[:, chosen], basis, basis, jnp.asarray(floor * values[0], dtype))
    residuals = norms[:k] / values[0] if values[0] > 0 else np.zeros(k)
    return Leading(values, basis[:, :size], residuals, angle, status, steps)


def few_threads(matrix) -> contextlib.AbstractContextManager:
    """One thread for the decomposition of a matrix that one thread does in about a second, all for larger ones.

    On a busy machine LAPACK's threads wait for each other: a matrix of 8,000 x 500 took 30 times as long with two.
    """
    return threadpoolctl.threadpool_limits(1) if min(matrix.shape) <= _SMALL else contextlib.nullcontext()


@partial(jax.jit, static_argnums=(1, 2, 3))
def random_orthonormal(key, d, columns, dtype):
    """Orthonormal columns that span a uniformly random subspace."""
    return jnp.linalg.qr(jax.random.normal(key, (d, columns), dtype))[0]


def padded(array: np.ndarray, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """The array with zeros behind it: every step then has the same shapes, and its programs are compiled once."""
    return jnp.asarray(np.pad(array, [(0, m - n) for m, n in zip(shape, array.shape, strict=True)]), dtype)


def _angle(values, norms, k):
    if k == len(values):  # the whole space
        return 0.0
    gaps = values[:k] - values[k] - norms[k]
    return float(np.linalg.norm(norms[:k] / gaps)) if gaps[-1] > 0 else float("inf")


def describe(found: Any) -> str:
    """Say in words how a solver ended; for results with the fields status, steps, angle and residuals."""
    if int(found.steps) == 0:
        return "solved densely"
    bound = f"angle to the true span at most {float(found.angle):.2g}, largest residual {np.max(found.residuals):.2g}"
    return {
        CONVERGED: f"converged after {int(found.steps)} passes: {bound}",
        ROUNDING: f"stopped at the rounding of the dtype after {int(found.steps)} passes: {bound}, more than was asked "
        "for. Choose k at a larger gap, raise tolerance, use float64 or, for CCA, a larger ridge",
        MAX_STEPS: f"not converged: max_steps used up after {int(found.steps)} passes: {bound}. Raise max_steps or "
        "tolerance, or choose k at a gap",
    }[int(found.status)]
