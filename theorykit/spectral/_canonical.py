r"""Leading canonical pairs of two large views, by a preconditioned block method that forms no covariance.

With A = X_c^T X_c + s I, B = Y_c^T Y_c + s I, C = X_c^T Y_c and s = (n - 1) r, the canonical pairs solve

.. math:: C b = \rho A a, \qquad C^T a = \rho B b, \qquad a^T A a = b^T B b = 1.

Preconditioner. A block Krylov space of each Gram operator gives Ritz pairs (theta_i, q_i) and, from the trace, the mean
mu of the eigenvalues outside; P = sum_i q_i q_i^T / (theta_i + s) + (I - Q Q^T) / (mu + s) is nearly A^-1 where the
spectrum outside is flat beside mu + s. In coordinates a = P^(1/2) alpha the metric P^(1/2) A P^(1/2) is well
conditioned.

Iteration. In these coordinates both sides hold a basis; the canonical pairs of the two spaces (a small dense problem)
leave the residuals C b - rho A a and C^T a - rho B b, which become the next block of either basis. That is a block
Davidson method with thick restarts; one step is one pass over both views with two blocks. With P = A^-1 it is block
Golub-Kahan-Lanczos on the whitened cross-covariance.

Cost. Each step takes four products of n x d with the block, and the preconditioner 2 BLOCKS products with each view. A
dense solver takes three Gram matrices, as much as d / block steps and more: this one pays where d is large beside
the number of steps times the block, or where d x d matrices do not fit.

Source: derivation. Davidson 1975 (J. Comput. Phys. 17) and Knyazev 2001 (SIAM J. Sci. Comput. 23) for preconditioned
residuals; Golub and Zha 1995 for canonical pairs by iteration; Wedin 1972 (BIT 12) for the angle.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import threadpoolctl

from theorykit.spectral import _krylov

# At rounding, a step that lowers the residuals by less than a tenth is the last. Before, the steps after a restart can
# take off as little as a third.
_LITTLE = 0.9


class Pairs(NamedTuple):
    """Leading pairs: values (k,), x (dx, k) and y (dy, k) with a^T A a = 1, and what is known of their error."""

    values: np.ndarray
    x: jax.Array
    y: jax.Array
    residuals: np.ndarray
    angle: float
    status: int
    steps: int


class _Root(NamedTuple):
    """P^(1/2) = rest I + Q diag(inside - rest) Q^T, and the spread of the eigenvalues of A that it removes."""

    basis: jax.Array
    inside: jax.Array
    rest: jax.Array
    condition: float


class _Space(NamedTuple):
    """One view's basis with its images: own = P^(1/2) A P^(1/2) basis, from_other = P^(1/2) C P_y^(1/2) (y's basis)."""

    basis: jax.Array
    own: jax.Array
    from_other: jax.Array


def _preconditioner(view, mean, total, k, key, ridge) -> _Root:
    d = mean.shape[0]
    eps = float(jnp.finfo(mean.dtype).eps)

    def product(block):
        return _krylov.products((view,), (mean,), (block,))[0]

    found = _krylov.ritz_space(
        product,
        d,
        k,
        # In the range of the operator, so that weights get no part where the view has no variance.
        lambda columns: _within_range(product(_krylov.random_orthonormal(key, d, columns, mean.dtype))),
        mean.dtype,
        tolerance=0.0,  # the whole space is wanted, not k of its vectors
        max_steps=_krylov.BLOCKS,
        floor=eps**0.5,  # the part of a residual that is rounding, eps, is then at most sqrt(eps) of it
    )
    values = found.values[: found.vectors.shape[1]]
    columns = round(float(jnp.sum(found.vectors**2)))  # those that are not 0
    # What is left of the trace may be rounding only: then the view has no variance outside, and weights stay inside.
    left = total - values.sum()
    mean_left = left / (d - columns) if d > columns and left > _krylov.ROUNDING_EPS * eps * total else 0.0
    floor = d * eps * values[0]
    inside = np.where(values + ridge > floor, 1 / np.sqrt(np.maximum(values + ridge, floor)), 0)
    rest = 1 / np.sqrt(mean_left + ridge) if mean_left + ridge > 0 else 0.0
    smallest = min([*(values + ridge)[inside > 0], *([mean_left + ridge] if rest > 0 else [])])
    dtype = mean.dtype
    return _Root(
        found.vectors, jnp.asarray(inside, dtype), jnp.asarray(rest, dtype), float((values[0] + ridge) / smallest)
    )


def _within_range(images):
    """Orthonormal columns that span a block of images, as far as they do not depend on each other."""
    nothing = jnp.zeros_like(images[:, :1])
    floor = jnp.max(jnp.linalg.norm(images, axis=0)) * jnp.finfo(images.dtype).eps ** 0.5
    return _krylov.orthonormalise(images, nothing, nothing, floor)


@jax.jit
def _root(basis, inside, rest, block):
    """P^(1/2) times a block."""
    inner = jnp.matmul(basis.T, block, precision="highest")
    return rest * block + jnp.matmul(basis, (inside - rest)[:, None] * inner, precision="highest")


def _images(views, means, roots, ridge, blocks):
    """The four products of P_x^(1/2) and P_y^(1/2) with A, C and B, in one pass over the rows."""
    weights = tuple(_root(*root[:3], block) for root, block in zip(roots, blocks, strict=True))
    seen = _krylov.products(views, means, weights)
    columns = blocks[0].shape[1]
    spaces = []
    for side, (root, block, weight, product) in enumerate(zip(roots, blocks, weights, seen, strict=True)):
        halves = product[:, :columns], product[:, columns:]
        own = halves[side] + jnp.asarray(ridge, product.dtype) * weight
        spaces.append(_Space(block, _root(*root[:3], own), _root(*root[:3], halves[1 - side])))
    return spaces


@partial(jax.jit, static_argnames="width")
def _to_pairs(spaces, left, right, values, width):
    """Both spaces in coordinates of their canonical pairs, with the residuals of the first pairs."""
    rotations = (left, right)
    rotated, residuals = [], []
    for space, mine, other in zip(spaces, rotations, rotations[::-1], strict=True):
        space = _Space(
            jnp.matmul(space.basis, mine, precision="highest"),
            jnp.matmul(space.own, mine, precision="highest"),
            jnp.matmul(space.from_other, other, precision="highest"),
        )
        residuals.append(space.from_other[:, :width] - space.own[:, :width] * values[None, :width])
        rotated.append(space)
    return rotated, residuals, [jnp.linalg.norm(r, axis=0) for r in residuals]


def _whiten(gram, eps):
    """W with W^T gram W = I; zero columns for directions that depend on the others to rounding."""
    values, vectors = np.linalg.eigh((gram + gram.T) / 2)
    real = values > len(values) * eps * max(values[-1], 0)
    return vectors * np.where(real, 1 / np.sqrt(np.where(real, values, 1)), 0)[None, :]


def leading_pairs(
    views: tuple,
    means: tuple[jax.Array, jax.Array],
    totals: tuple[float, float],
    k: int,
    key: Any,
    *,
    ridge: float,
    tolerance: float,
    max_steps: int,
) -> Pairs:
    """Find the k leading canonical pairs; `totals` are the traces of the Gram matrices, `ridge` is s.

    Statuses as `leading` of `_krylov`. The residuals are norms in whitened coordinates, for which P^(1/2) stands in;
    divided by the root of the least metric that a block has met, they estimate the true norm from above.
    """
    dims, dtype = [mean.shape[0] for mean in means], means[0].dtype
    eps = float(jnp.finfo(dtype).eps)
    columns = min(_krylov.width(k, min(dims)), min(dims))
    space = _krylov.BLOCKS * columns
    keys = jax.random.split(key, 4)
    with threadpoolctl.threadpool_limits(1):
        roots = [
            _preconditioner(*each, k, one, ridge) for *each, one in zip(views, means, totals, keys[:2], strict=True)
        ]
        blocks = [_krylov.random_orthonormal(one, d, columns, dtype) for one, d in zip(keys[2:], dims, strict=True)]
        x_images, y_images = _krylov.products(views, means, tuple(blocks))
        blocks = [_within_range(images) for images in (x_images[:, :columns], y_images[:, columns:])]
        spaces = [_Space(*[jnp.zeros((d, space), dtype)] * 3) for d in dims]
        condition = max(root.condition for root in roots)
        size, previous, least = 0, np.inf, 1.0
        for steps in range(1, max_steps + 1):
            new = _images(views, means, roots, ridge, blocks)
            for side in new:
                metric = np.asarray(_krylov.inner(side.basis, side.own), np.float64)
                metric = np.linalg.eigvalsh((metric + metric.T) / 2)
                least = min([least, *metric[metric > columns * eps * metric[-1]]])
            spaces = _krylov.put(spaces, new, size)
            size += columns
            whitening = [
                _whiten(np.asarray(_krylov.inner(s.basis, s.own), np.float64)[:size, :size], eps) for s in spaces
            ]
            cross = np.asarray(_krylov.inner(spaces[0].basis, spaces[0].from_other), np.float64)[:size, :size]
            left, values, right = np.linalg.svd(whitening[0].T @ cross @ whitening[1])
            rotations = [
                _krylov.padded(w @ r, (space, space), dtype) for w, r in zip(whitening, (left, right.T), strict=True)
            ]
            spaces, residuals, norms = _to_pairs(
                spaces, *rotations, _krylov.padded(values, (space,), dtype), width=columns
            )
            norms = np.sqrt(sum(np.asarray(norm, np.float64) ** 2 for norm in norms) / least)
            # Products with a Gram operator err by eps times its largest eigenvalue. Where that reaches the least one,
            # the metric is not known and no residual means anything.
            resolved = _krylov.ROUNDING_EPS * eps * condition < least
            rounding = eps * (condition / least) ** 0.5  # of these products in whitened coordinates
            angle = _angle(values, norms, k) if resolved else np.inf
            worst = float(norms[: k + 1].max())
            at_rounding = not resolved or (worst <= _krylov.ROUNDING_EPS * rounding and worst >= _LITTLE * previous)
            status = _krylov.CONVERGED if angle <= tolerance else _krylov.ROUNDING if at_rounding else _krylov.MAX_STEPS
            if status != _krylov.MAX_STEPS or steps == max_steps:
                break
            previous = worst
            if size + columns > space:
                size = space // columns // 2 * columns
            spaces = _krylov.keep(spaces, size)
            blocks = [
                _krylov.orthonormalise(residual, s.basis, s.own, jnp.asarray(rounding, dtype))
                for residual, s in zip(residuals, spaces, strict=True)
            ]
    weights = [_root(*root[:3], s.basis[:, :k]) for root, s in zip(roots, spaces, strict=True)]
    return Pairs(np.minimum(values[:k], 1), *weights, norms[:k], angle, status, steps)


def _angle(values, norms, k):
    """Wedin's bound, pair by pair; a pair with residual r has at most |r| / gap outside the leading space."""
    beyond = values[k] + norms[k] if k < len(norms) else 0.0
    gaps = values[:k] - beyond
    return float(np.linalg.norm(norms[:k] / gaps)) if gaps[-1] > 0 else float("inf")
