r"""Conditional denoisers and next-token decoders: transformers that see one modality through an embedding of the other.

The condition is softmax(f), f the embedding of the given modality by the encoder of a CLIP pair with the softmax head;
it is the first token, so that every token sees it. A member is an encoder and a network of one of two tasks,

    denoising     given the text y: noisy leaves z = x + SIGMA N(0, 1) in, all tokens see each other; a law of each
                  image leaf out, whose mean is the answer; loss (mean - x)^2, averaged over leaves
    next_token    given the image x: the leaves y_1 .. y_(T-1) in, each token sees those on its left; laws of
                  y_1 .. y_T out; loss -ln of the law at y_j, averaged over leaves

with the losses of `hierarchy.Losses`. A noisy leaf comes in as softmax_a(-(z - a)^2 / (2 SIGMA^2)), a clean one as a
unit vector: a law of its symbol in both cases.

What may differ between members of one program: keys, hierarchies, and the numbers of `Variant`.

    joint      0: the encoder stays as it is; 1: it is trained with the network
    guidance   weight of the message-supervised loss: the cross-entropy of linear read-outs of the states after block
               b < B, at each leaf, with the upward message of the leaf's ancestor in layer L - ceil(b L / B): the law
               of the ancestor given the leaves below it that the task has shown so far, under a uniform prior. The
               last block is supervised by the task itself. The weight of guided members is 1, see `_task_members`.
    mixed      0: the messages are those of the sample; 1: those of another sample of the batch
    gates      (B,) of the residual branches of each block, of encoder and network

Source: Oko, Lin, Cai, Mei (arXiv 2501.04641) for the tasks and the kinds of training.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from experiments import _hierarchy_clip as clip
from experiments._side_by_side import BRIEFLY, one_object
from experiments._training import finished, one_thread, room
from theorykit import encoders, training
from theorykit.surrogate import hierarchy

HEAD = "softmax"
SIGMA = 1.0  # one step between symbols
GIVEN = {"denoising": "text", "next_token": "image"}


class Variant(NamedTuple):
    """What distinguishes members on one hierarchy; arrays (members, ...)."""

    guidance: jax.Array
    joint: jax.Array
    mixed: jax.Array
    gates: jax.Array


@one_object
def network(size: clip.Size, task: str) -> encoders.TokenTransformer:
    """The transformer of a task: the condition, then the leaves that it may see."""
    denoising = task == "denoising"
    return encoders.TokenTransformer(
        size.width,
        size.alphabet,
        tokens=(size.leaves + denoising, clip.encoder(size, HEAD).features + size.alphabet),
        depth=size.blocks,
        heads=size.heads,
        mlp_ratio=size.mlp_ratio,
        parametrisation="standard",
        prefix=None if denoising else 0,
    )


def answers(size, task, params, given, seen, gates, joint=1.0):
    """Logits (n, T, S) of each leaf, and the states (blocks + 1, n, T, width) that they come from, of one member.

    given (n, T) are the leaves of the other modality; seen is what the network sees of its own, see `shown`.
    """
    f = clip.encoder(size, HEAD).apply(params["encoder"], clip.one_hot(given, size.alphabet), gates=gates)
    still = jax.lax.stop_gradient(f)
    condition = jax.nn.softmax(still + joint * (f - still))
    # Condition and leaves have input numbers of their own.
    first = jnp.pad(condition, ((0, 0), (0, size.alphabet)))[:, None]
    leaves = jnp.pad(seen, ((0, 0), (0, 0), (condition.shape[1], 0)))
    tokens = jnp.concatenate([first, leaves], axis=1)
    skipped = int(task == "denoising")  # the condition has no answer there; the decoder's first answer is y_1
    net = network(size, task)
    logits, kept = net.apply(params["network"], tokens[:, : net.tokens[0]], gates=gates, mutable="intermediates")
    (stream,) = kept["intermediates"]["states"]
    return logits[:, skipped:], stream[:, :, skipped:]


def shown(size, task, samples, noisy):
    """What the network sees of its own modality, laws of the leaves (n, T, S)."""
    if task == "next_token":
        return clip.one_hot(samples.text, size.alphabet)
    symbols = jnp.arange(size.alphabet, dtype=noisy.dtype)
    return jax.nn.softmax(-((noisy[..., None] - symbols) ** 2) / (2 * SIGMA**2), axis=-1)


def losses(size, task, samples, logits):
    """The task's loss of each sample, (n,), as in `hierarchy.Losses`."""
    if task == "next_token":
        law = jax.nn.log_softmax(logits, axis=-1)
        return -jnp.mean(jnp.sum(law * clip.one_hot(samples.text, size.alphabet), axis=-1), axis=-1)
    symbols = jnp.arange(size.alphabet, dtype=logits.dtype)
    mean = jnp.einsum("nts,s->nt", jax.nn.softmax(logits, axis=-1), symbols)
    return jnp.mean((mean - samples.image) ** 2, axis=-1)


# Messages -------------------------------------------------------------------------------------------------------------


def upward(kernels, laws):
    """Laws of the nodes of all layers, the root's first, given likelihoods (..., T, S) of the leaves.

    A node's law is that under a uniform prior for it, given the leaves below: (..., m^l, S) in layer l. For clean
    leaves these are `hierarchy.beliefs`. Here in probabilities, which products of a few leaves do not underflow: in log
    space a step of training would take both branches of every choice of `_message_passing` for all members.
    """
    found = []
    for layer in kernels[::-1]:
        below = laws.reshape(*laws.shape[:-2], -1, layer.shape[0], laws.shape[-1])
        of_parent = jnp.prod(jnp.einsum("iab,...vib->...via", layer, below), axis=-2)
        laws = of_parent / jnp.sum(of_parent, axis=-1, keepdims=True)
        found.append(laws)
    return found[::-1]


def messages(size, task, h, seen):
    """What each block but the last is to hold at each leaf, (blocks - 1, n, T, S)."""
    leaves, kernels = size.leaves, h.image if task == "denoising" else h.text
    place = jnp.arange(leaves)
    if task == "next_token":  # on the way to leaf j, the leaves from j on say nothing
        known = place[None, :] < place[:, None]
        seen = jnp.where(known[None, :, :, None], seen[:, None], 1.0)
    found, wanted = upward(kernels, seen), []
    for block in range(1, size.blocks):
        layer = size.depth - math.ceil(block * size.depth / size.blocks)
        ancestor = place // (leaves // size.arity**layer)
        laws = found[layer]
        wanted.append(laws[:, place, ancestor] if task == "next_token" else laws[:, ancestor])
    return jnp.stack(wanted)


# Training -------------------------------------------------------------------------------------------------------------


@one_object
def _loss(size, task, guided):
    to_tree = tree_of(size, task)

    def one(row, batch):
        params, variant = to_tree(row), batch["variant"]
        logits, stream = answers(size, task, params, batch["given"], batch["seen"], variant.gates, variant.joint)
        value = jnp.mean(losses(size, task, batch["samples"], logits))
        if not guided:
            return value
        read_out = params["read_out"]
        told = jnp.einsum("bntw,bws->bnts", stream[1:-1], read_out[:, :-1]) + read_out[:, -1][:, None, None]
        missed = -jnp.mean(jnp.sum(batch["messages"] * jax.nn.log_softmax(told, axis=-1), axis=-1))
        return value + variant.guidance * missed

    return clip.sum_over_members(one)


@one_object
def _batches(size, task, guided):
    def one(step, data):
        for_samples, for_noise = jax.random.split(jax.random.fold_in(jax.random.wrap_key_data(data["key"]), step))
        h = data["hierarchy"]
        samples = hierarchy.sample(h, for_samples, size.batch)
        noisy = samples.image + SIGMA * jax.random.normal(for_noise, samples.image.shape)
        seen = shown(size, task, samples, noisy)
        variant = data["variant"]
        batch = {"variant": variant, "samples": samples, "given": getattr(samples, GIVEN[task]), "seen": seen}
        return batch | {"messages": clip.mixed(variant.mixed, messages(size, task, h, seen))} if guided else batch

    return lambda key, data: jax.vmap(functools.partial(one, jax.random.bits(key)))(data)


def start(size, task, keys, encoder):
    """Parameters (members, ...): the given encoders, a network and read-outs for each key."""
    net = network(size, task)
    nothing = jnp.zeros((size.blocks - 1, size.width + 1, size.alphabet))
    one = lambda key: {"network": net.init(key, jnp.zeros((1, *net.tokens))), "read_out": nothing}  # noqa: E731
    return jax.lax.map(one, keys) | {"encoder": encoder}


def tree_of(size, task=None):
    """From a row of numbers to the parameters of a member: of a task, or without one of a CLIP pair."""
    return _form(size, task)[1]


def row_length(size, task=None):
    """How many numbers such a row holds."""
    return len(_form(size, task)[0])


@one_object
def _form(size, task):
    keys = jax.random.split(jax.random.key(0), 1)

    def form():
        pair = clip.initial(size, HEAD, keys)
        return pair if task is None else start(size, task, keys, pair[GIVEN[task]])

    return ravel_pytree(jax.tree.map(lambda a: jnp.zeros(a.shape[1:], a.dtype), jax.eval_shape(form)))


def _arguments(size, task, hs, keys, variant, params, steps):
    data = {"key": jax.random.key_data(keys), "hierarchy": hs, "variant": variant}
    optimizer = clip.adam(size.learning_rate, size.warm_up, steps)
    # Messages only where a member is supervised by them.
    guided = size.blocks > 1 and bool(jnp.any(variant.guidance > 0))
    settings = {"optimizer": optimizer, "augment": _batches(size, task, guided)}
    return (_loss(size, task, guided), params, data), settings


def check_memory(size, task, hs, keys, variant, steps, mesh=None):
    """Raise MemoryError, with an estimate, if the training of these members does not fit; from shapes alone."""
    fresh = lambda keys: start(size, task, keys, clip.initial(size, HEAD, keys)[GIVEN[task]])  # noqa: E731
    rows = jax.eval_shape(lambda keys: clip.to_rows(fresh(keys)), keys)
    (loss, *arrays), settings = _arguments(size, task, hs, keys, variant, rows, steps)
    training.check_memory(loss.seen, *arrays, memory=room(), mesh=mesh, **settings)


def train(size, task, hs, keys, variant, encoder, steps, *, compile_only=False, **options):
    """Train the members; the Run, with their parameters as rows (members, numbers), see `tree_of`.

    Members with equal keys begin with equal networks, and see the same uniform numbers.

    Raises
    ------
    RuntimeError
        If it diverges.
    """
    rows = clip.to_rows(jax.jit(start, static_argnums=(0, 1), compiler_options=BRIEFLY)(size, task, keys, encoder))
    arrays, settings = _arguments(size, task, hs, keys, variant, rows, steps)
    # Of the steps; what a member draws follows from its own key as well.
    key = jax.random.key(0)
    settings |= {"settings": {**dataclasses.asdict(size), "task": task, "all steps": steps}}
    done = 0 if compile_only else steps
    run = training.train(*arrays, steps=done, key=key, compiler_options=one_thread(), **settings, **options)
    return finished(run, f"the training of {task}", options.get("checkpoint"))
