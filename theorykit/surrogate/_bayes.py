"""Bayes losses and risks of a hierarchy, and what a trained model loses against them."""

import warnings
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Key

from theorykit.surrogate import _hierarchy_inference as inference
from theorykit.surrogate import _hierarchy_passes as passes
from theorykit.surrogate._hierarchy_model import (
    Hierarchy,
    Sample,
    check_hierarchy,
    check_leaves,
    check_sigma,
    sample_unchecked,
    to_nodes,
)
from theorykit.surrogate.risk import Estimate

# Standard errors below the Bayes risk from which on chance is no explanation: one run in 30,000.
_TOO_FAR = 4
# Two programs of one loss differ by the roundings of some thousand terms; as in `verify.identity`.
_ROUNDING_ULP = 2**10


class Losses(NamedTuple):
    """Loss of the Bayes predictor on each sample.

    Parameters
    ----------
    contrastive : (n // K,)
        Of each group of K consecutive pairs: the mean over the group of both directions' log-loss, added, in nats.
    zero_shot : (n,)
        -ln P(y_1 | x), the log-loss of the text's first leaf given the image, in nats. It is that of the first token.
    denoising : (n,)
        Squared error of E[x | z, y], mean over the image's leaves.
    next_token : (n,)
        -ln P(y_j | y_1 .. y_(j-1), x), mean over the text's leaves, in nats.
    """

    contrastive: Float[Array, " groups"]
    zero_shot: Float[Array, " n"]
    denoising: Float[Array, " n"]
    next_token: Float[Array, " n"]


class Risks(NamedTuple):
    """Bayes risks: the expectations of `Losses`, each with the standard error of its estimate."""

    contrastive: Estimate
    zero_shot: Estimate
    denoising: Estimate
    next_token: Estimate


def bayes_losses(
    h: Hierarchy,
    samples: Sample,
    noisy: Float[Array, "n image_leaves"],
    sigma: inference.Sigma,
    *,
    candidates: int = 4,
) -> Losses:
    r"""Losses of the Bayes predictors of four tasks on given samples, to be paired with those of a trained model.

    The contrastive loss is that of CLIP among K candidates: in each group of K consecutive pairs every image seeks its
    text and every text its image by the score s*.

    .. math:: \frac1K \sum_{i=1}^{K} \Big[ \ln \sum_{j=1}^{K} e^{s^*(x_i, y_j)} + \ln \sum_{j=1}^{K} e^{s^*(x_j, y_i)}
              - 2 s^*(x_i, y_i) \Big]

    Parameters
    ----------
    h : Hierarchy
    samples : Sample
        n pairs; those left over by groups of K count in the other tasks.
    noisy : (n, leaves)
        The images with noise, image + sigma N(0, 1).
    sigma : scalar
        Standard deviation of that noise.
    candidates : int
        K, from 1 to n.

    Returns
    -------
    Losses

    Raises
    ------
    TypeError, ValueError
        As `leaf_posterior` and `next_token`, and for K outside 1..n.

    Source
    ------
    Oko, Lin, Cai, Mei (arXiv 2501.04641) for the four tasks.
    """
    where = "bayes_losses"
    inference.check_denoising(h, noisy, sigma, "image", samples.text, where)
    check_leaves(samples.image, h.image, where, "image")
    n = samples.text.shape[0]
    if samples.image.shape[0] != n:
        raise ValueError(f"{where}: {samples.image.shape[0]} images and {n} texts; give pairs")
    if not 1 <= candidates <= n:
        raise ValueError(f"{where}: candidates is {candidates}; give 1 to {n}, the number of pairs, or more pairs")
    return _losses(h, samples, noisy, jnp.asarray(sigma, noisy.dtype), candidates)


def bayes_risks(
    h: Hierarchy,
    key: Key[Array, ""],
    samples: int,
    *,
    candidates: int = 4,
    sigma: inference.Sigma = 1.0,
    block: int = 256,
    mesh: Mesh | None = None,
) -> Risks:
    r"""Bayes risks of four tasks by message passing on fresh samples, in blocks of bounded memory.

    .. math:: \hat R = \frac1n \sum_i \ell_i, \qquad se^2 = \frac{1}{n (n - 1)} \sum_i (\ell_i - \hat R)^2

    with the losses of `bayes_losses`, independent over samples, and over groups of K for the contrastive one. Each loss
    is exact, so the only error is that of the mean; it is unbiased.

    Parameters
    ----------
    h : Hierarchy
        May be traced: `jax.lax.map` over many hierarchies is one program. `jax.vmap` works too and is slower.
    key : PRNG key
        Fixes the samples, for a given block.
    samples : int
        n, at least two groups.
    candidates : int
        K >= 1 of the contrastive risk.
    sigma : scalar
        Standard deviation of the noise to be removed from images.
    block : int
        Samples that are held at once on each device, rounded up to a multiple of K. The arrays of a block take about
        10 x block x leaves x S numbers.
    mesh : Mesh, optional
        A one-dimensional mesh of devices that share the blocks; same result as on one device.

    Returns
    -------
    Risks

    Raises
    ------
    TypeError, ValueError
        As `check_hierarchy`; for K < 1, fewer than two groups, a block below 1, sigma <= 0, and a mesh of several axes.
    """
    where = "bayes_risks"
    check_hierarchy(h, where)
    check_sigma(sigma, where)
    if candidates < 1 or block < 1:
        raise ValueError(f"{where}: candidates is {candidates} and block {block}; give at least 1 of each")
    if samples < 2 * candidates:
        raise ValueError(
            f"{where}: {samples} samples are less than two groups of {candidates} candidates, which a standard error "
            f"needs; give at least {2 * candidates}"
        )
    if mesh is not None and len(mesh.axis_names) != 1:
        raise ValueError(f"{where}: the mesh has the axes {mesh.axis_names}; reshape it to one")
    size = -(-block // candidates) * candidates
    sigma = jnp.asarray(sigma, h.image.dtype)
    if mesh is not None:
        # With explicit axes, which jax.make_mesh gives, shardings would be a part of the types here.
        mesh = Mesh(mesh.devices, mesh.axis_names)
        h, key, sigma = jax.device_put((h, key, sigma), NamedSharding(mesh, PartitionSpec()))
    return _risks(h, key, sigma, samples, candidates, size, mesh)


def paired_excess(trained: Float[Array, " n"], bayes: Float[Array, " n"]) -> Estimate:
    r"""What a trained model loses against Bayes on the same samples: mean and standard error of the differences.

    .. math:: \Delta = \frac1n \sum_i (\ell_i - \ell^*_i), \qquad
              se^2 = \frac{1}{n (n - 1)} \sum_i (\ell_i - \ell^*_i - \Delta)^2

    No model has a lower expected loss than Bayes. A mean that lies below zero by more than four standard errors, and by
    more than rounding, is a fault of the program: it is returned as it is, with a warning.

    Parameters
    ----------
    trained, bayes : (n,)
        Losses of both on the same n >= 2 independent samples (groups, for the contrastive loss).

    Returns
    -------
    Estimate, in the unit of the losses.

    Raises
    ------
    ValueError
        For different shapes or fewer than two samples.

    Warns
    -----
    RuntimeWarning
        If the mean is too far below zero.
    """
    if trained.shape != bayes.shape or trained.ndim != 1 or trained.size < 2:
        raise ValueError(
            f"paired_excess: losses have shapes {trained.shape} and {bayes.shape}; give both on the same two or more "
            "samples, (n,)"
        )
    difference = trained - bayes
    found = Estimate(jnp.mean(difference), jnp.std(difference, ddof=1) / np.sqrt(trained.size).astype(trained.dtype))
    if isinstance(difference, jax.core.Tracer):
        return found
    rounding = _ROUNDING_ULP * float(jnp.finfo(bayes.dtype).eps) * float(jnp.mean(jnp.abs(bayes)))
    # A loss of -inf leaves no standard error.
    endless = float(found.value) == -np.inf
    if endless or float(found.value) < -_TOO_FAR * float(found.standard_error) - rounding:
        away = -float(found.value) / max(float(found.standard_error), float(jnp.finfo(bayes.dtype).tiny))
        warnings.warn(
            f"the trained risk is {-float(found.value):.3g} below the Bayes risk, {away:.3g} standard errors: no model "
            "can be. Most likely the model sees what it has to predict (a target among its inputs, clean leaves with "
            "the noisy ones, tokens from the right), or the two were not measured alike (other samples, kernels, "
            "number of candidates, sigma, or a sum where the other is a mean)",
            RuntimeWarning,
            stacklevel=2,
        )
    return found


# ---------------------------------------------------------------------------------------------------------------------


@jax.jit(static_argnames="candidates")
def _losses(h, samples, noisy, sigma, candidates):
    prior = passes.log_prior(h)
    image_tree, text_tree = passes.trees(h, len(samples.text))
    of_image = passes.likelihood(image_tree, samples.image)
    log_law, of_text = passes.predicted(text_tree, samples.text, prior + of_image)  # (m, S, nodes, n)

    groups = samples.text.shape[0] // candidates
    posteriors = (jax.nn.log_softmax(prior + one, axis=0).T for one in (of_image, of_text))
    image, text = (p[: groups * candidates].reshape(groups, candidates, -1) for p in posteriors)
    scores = passes.scores(h, image, text)  # (groups, K, K)
    partner = jnp.diagonal(scores, axis1=1, axis2=2)
    sums = (jax.scipy.special.logsumexp(scores, axis=axis) for axis in (1, 2))
    contrastive = jnp.mean(sum(sums) - 2 * partner, axis=1)

    tokens = jax.nn.one_hot(to_nodes(samples.text, h.text), h.text.shape[-1], axis=1, dtype=bool)
    missed = -jnp.sum(jnp.where(tokens, log_law, 0.0), axis=1)  # (m, nodes, n)

    means = passes.denoised(image_tree, noisy, sigma, prior + of_text, passes.mean_symbol)
    clean = to_nodes(samples.image, h.image).astype(noisy.dtype)
    error = jnp.mean((means - clean) ** 2, axis=(0, 1))
    return Losses(contrastive, missed[0, 0], error, jnp.mean(missed, axis=(0, 1)))


class _Moments(NamedTuple):
    """Number, mean and sum of squared distances from it, of the losses of a block."""

    count: Array
    mean: Array
    squares: Array


@partial(jax.jit, static_argnames=("samples", "candidates", "size", "mesh"))
def _risks(h, key, sigma, samples, candidates, size, mesh):
    devices = 1 if mesh is None else mesh.size
    blocks = -(-samples // (size * devices)) * devices
    # The last block may hold more than is asked for, and blocks that fill up the mesh hold nothing.
    wanted = np.clip(samples - size * np.arange(blocks, dtype=np.int64), 0, size).astype(np.int32)

    def moments(h, key, sigma, block):
        number, wanted = block
        for_sample, for_noise = jax.random.split(jax.random.fold_in(key, number))
        drawn = sample_unchecked(h, for_sample, size)
        noise = jax.random.normal(for_noise, drawn.image.shape, h.image.dtype)
        losses = _losses(h, drawn, drawn.image.astype(h.image.dtype) + sigma * noise, sigma, candidates)
        return jax.tree.map(_moments, losses, Losses(wanted // candidates, wanted, wanted, wanted))

    def share(h, key, sigma, part):
        return jax.lax.map(partial(moments, h, key, sigma), part)

    every = (jnp.arange(blocks, dtype=jnp.int32), jnp.asarray(wanted))
    if mesh is None:
        return Risks(*map(_estimate, share(h, key, sigma, every)))
    whole, parts = PartitionSpec(), PartitionSpec(*mesh.axis_names)
    # check_vma: the scans inside start from constants, which the check would want marked as varying.
    spread = jax.shard_map(share, mesh=mesh, in_specs=(whole, whole, whole, parts), out_specs=parts, check_vma=False)
    found = jax.lax.with_sharding_constraint(spread(h, key, sigma, every), NamedSharding(mesh, whole))
    return Risks(*map(_estimate, found))


def _moments(losses, count):
    used = jnp.arange(losses.shape[0], dtype=count.dtype) < count
    number = jnp.maximum(count, 1).astype(losses.dtype)
    mean = jnp.sum(jnp.where(used, losses, 0.0)) / number
    return _Moments(count.astype(losses.dtype), mean, jnp.sum(jnp.where(used, (losses - mean) ** 2, 0.0)))


def _estimate(blocks):
    """Chan, Golub, LeVeque 1983: moments of all from those of blocks, without large numbers that cancel."""
    total = jnp.sum(blocks.count)
    mean = jnp.sum(blocks.count / total * blocks.mean)
    squares = jnp.sum(blocks.squares) + jnp.sum(blocks.count * (blocks.mean - mean) ** 2)
    return Estimate(mean, jnp.sqrt(squares / (total - 1) / total))
