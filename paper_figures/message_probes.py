"""F: messages of message passing in the states of trained, supervised and untrained transformers, block by block."""

import string

import matplotlib.pyplot as plt
import numpy as np

from paper_figures import style

EXPERIMENT = "message_probes"
LOOKS = {"CLIP": style.series(0), "guided": style.series(2), "untrained": style.control(0)}
LABELS = {"CLIP": "CLIP", "guided": "supervised by messages", "untrained": "control: untrained"}


def draw(result):
    """Decoded beliefs (above) and shares of the states that they explain (below), after each block; parents to root."""
    arrays, config = result.arrays, result.config
    size = config.size
    fig, axes = plt.subplots(2, size.depth, figsize=(style.DOUBLE, 4.8), squeeze=False)
    levels = list(reversed(range(size.depth)))
    panels = [(measure, level) for measure in ("decoded", "share") for level in levels]
    for ax, letter, (measure, level) in zip(axes.flat, string.ascii_lowercase, panels, strict=False):
        _panel(ax, arrays, measure, level)
        whose = {0: "root", size.depth - 1: "parents"}.get(level, f"level {level}")
        ax.set_title(
            f"{letter}  {whose.capitalize()}, decoded" if measure == "decoded" else f"{letter}  Explained by {whose}"
        )
    axes[1, -1].legend(loc="upper left")
    style.caption(
        fig,
        f"""F. {size.alphabet} symbols, trees of depth {size.depth} and arity {size.arity}, p = {config.noise}, width
        {size.width}, {size.blocks} blocks, {config.steps} steps; means over {config.seeds} seeds and both modalities
        with 95% bands, averages over the exact law of the leaves. Above: what linear read-outs of a leaf's state miss
        of the logarithmic beliefs of its ancestors, from its parent to the root, $1-R^2$ on configurations of the
        leaves below the ancestor that did not fit them. Below: what is left of the states' variance at a leaf's place
        beside linear functions of those beliefs; by the root also of the embedding. The axes are upside down: higher is
        better. Dotted line: random labels, the least over networks of what they miss above, after any block, and leave
        below, of the states after block 1 by random functions of the parent's leaves, which leave less after CLIP
        training too, and of the embedding by the root.""",
    )
    return fig


def _panel(ax, arrays, measure, level):
    style.log_axis(ax)
    blocks, depth = arrays[f"{measure}/CLIP/beliefs"].shape[2:]
    places, ticks = np.arange(blocks), ["embedded", *(f"block {b}" for b in range(1, blocks))]
    if depth > 2:  # narrower panels
        ticks = [str(b) for b in range(blocks)]
        ax.set_xlabel("after block")
    embedding = measure == "share" and level == 0
    for network, look in LOOKS.items():
        values = arrays[f"{measure}/{network}/beliefs"][..., level].mean(axis=1)
        style.band(ax, places, 1 - values, label=LABELS[network], **look)
        if embedding:
            output = 1 - arrays[f"embedding/{network}/beliefs"].mean(axis=1)[:, None]
            style.band(ax, [blocks], output, **look | {"linestyle": ""})
    random = {("decoded", level): "decoded", ("share", depth - 1): "share", ("share", 0): "embedding"}
    if name := random.get((measure, level)):
        found = [1 - arrays[f"{name}/{network}/permuted"] for network in LOOKS]
        least = np.min([v.mean(axis=(0, 1))[:, level] if measure == "decoded" else v.mean() for v in found])
        ax.axhline(least, color=style.CONTROL, linestyle=":", linewidth=0.9, marker="")
        style.note(ax, blocks - 1 + embedding, least, "random labels")
    ax.set_xticks([*places, blocks] if embedding else places, [*ticks, "output"] if embedding else ticks)
    ax.invert_yaxis()
    ax.set_ylabel("missed, $1-R^2$" if measure == "decoded" else "not explained")
