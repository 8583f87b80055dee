"""F: messages of message passing in the states of trained, supervised and untrained transformers, block by block."""

import matplotlib.pyplot as plt
import numpy as np

from paper_figures import style

EXPERIMENT = "message_probes"
LOOKS = {"CLIP": style.series(0), "guided": style.series(2), "untrained": style.control(0)}
LABELS = {"CLIP": "CLIP", "guided": "supervised by messages", "untrained": "control: untrained"}
PANELS = (
    ("decoded", 1, "a  Parents of leaves, decoded"),
    ("decoded", 0, "b  Root, decoded"),
    ("share", 1, "c  Explained by parents"),
    ("share", 0, "d  Explained by the root"),
)


def draw(result):
    """Decoded beliefs (a, b) and shares of the states that they explain (c, d), after each block."""
    arrays, config = result.arrays, result.config
    fig, axes = plt.subplots(2, 2, figsize=(style.DOUBLE, 4.8))
    for ax, (measure, level, title) in zip(axes.flat, PANELS, strict=True):
        _panel(ax, arrays, measure, level)
        ax.set_title(title)
    axes[1, 1].legend(loc="upper left")
    size = config.size
    style.caption(
        fig,
        f"""F. {size.alphabet} symbols, trees of depth {size.depth} and arity {size.arity}, p = {config.noise}, width
        {size.width}, {size.blocks} blocks, {config.steps} steps; means over {config.seeds} seeds and both modalities
        with 95% bands, averages over the exact law of the leaves. a, b: what linear read-outs of a leaf's state miss of
        the logarithmic beliefs of its parent and of the root, $1-R^2$ on leaves that did not fit them: of the parent in
        a, of the tree in b. c, d: what is left of the states' variance at a leaf's place beside linear functions of
        those beliefs; in d also of
        the embedding. The axes are upside down: higher is better. Dotted line: random labels, the least over networks
        of what they miss in b, after the last block, and leave in c, after block 1, and in d, of the embedding; in c
        random functions of the parent's leaves, which leave less after CLIP training too.""",
    )
    return fig


def _panel(ax, arrays, measure, level):
    style.log_axis(ax)
    blocks = arrays[f"{measure}/CLIP/beliefs"].shape[2]
    places, ticks = np.arange(blocks), ["embedded", *(f"block {b}" for b in range(1, blocks))]
    embedding = measure == "share" and level == 0
    for network, look in LOOKS.items():
        values = arrays[f"{measure}/{network}/beliefs"][..., level].mean(axis=1)
        style.band(ax, places, 1 - values, label=LABELS[network], **look)
        if embedding:
            output = 1 - arrays[f"embedding/{network}/beliefs"].mean(axis=1)[:, None]
            style.band(ax, [blocks], output, **look | {"linestyle": ""})
    random = {("decoded", 0): "decoded", ("share", 1): "share", ("share", 0): "embedding"}.get((measure, level))
    if random:
        least = min(1 - arrays[f"{random}/{network}/permuted"].mean() for network in LOOKS)
        ax.axhline(least, color=style.CONTROL, linestyle=":", linewidth=0.9, marker="")
        style.note(ax, blocks - 1 + embedding, least, "random labels")
    ax.set_xticks([*places, blocks] if embedding else places, [*ticks, "output"] if embedding else ticks)
    ax.invert_yaxis()
    ax.set_ylabel("missed, $1-R^2$" if measure == "decoded" else "not explained")
