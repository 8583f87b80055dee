"""K2: nearest digits in learned embeddings as pictures, classification by neighbours, recall, intrinsic dimension."""

import matplotlib.pyplot as plt
import numpy as np

from paper_figures import style

EXPERIMENT = "search_embeddings"
SHOWN = {"learned": "learned", "pixels": "pixels", "untrained": "control: untrained"}
WRONG = "#CC0000"
LOOKS = {
    "learned": style.series(0),
    "pixels": style.series(1),
    "PCA": style.series(2),
    "untrained": style.control(),
}


def draw(result):
    """Neighbours as pictures above; below accuracy, recall, the estimate of dimension, and difficulty."""
    arrays, config = result.arrays, result.config
    fig = plt.figure(figsize=(style.DOUBLE, 6.6))
    above, below = fig.add_gridspec(2, 1, height_ratios=(1.5, 1))
    places = above.subgridspec(1, len(SHOWN))
    for column, (letter, (kind, title)) in enumerate(zip("abc", SHOWN.items(), strict=True)):
        ax = fig.add_subplot(places[column])
        _pictures(ax, arrays, config, kind)
        ax.set_title(f"{letter}  {title}", color=style.CONTROL if kind == "untrained" else "black")
    panels = {"classes": _accuracy, "recall": _recall, "dimension": _estimate, "difficulty": _difficulty}
    places = below.subgridspec(1, len(panels))
    for column, (letter, (title, panel)) in enumerate(zip("defg", panels.items(), strict=True)):
        ax = fig.add_subplot(places[column])
        panel(ax, arrays, config)
        ax.set_title(f"{letter}  {title}")
    digits, (near, wide) = 1797 - config.heldout, config.ambient
    style.caption(
        fig,
        f"""K2. A contrastive encoder ({config.features} outputs, no labels) trained on augmented views of {digits:,}
        digits; queries are views of {config.heldout} other digits. a to c: a query of each of {config.pictured} classes
        (left) and its {config.shown} nearest rows among two views of each digit, by exact search; red
        frames: another class. d: share of the queries classified by the vote of {config.k} neighbours; points are
        {config.seeds} seeds, bars their mean. e: share of the nearest among {config.views * digits:,} rows
        ({config.views} views of each digit, learned embeddings) that a graph search misses. f: dimension estimated from
        distances to {config.neighbours} neighbours, as many Gaussian rows of dimension $D$ in $R^{{{near}}}$; dashed:
        equality; horizontal lines: the digits. g: misses with beam {config.beams[0]} against the estimate; ring: the
        highest dimension in $R^{{{wide}}}$, where the same rows are as hard. Controls, grey: an untrained encoder
        (c, d), edges to random rows (e, g), noise in all directions (f). Bands: 95% over {config.graph_seeds} seeds;
        points where a seed misses nothing are left out.""",
    )
    return fig


def _pictures(ax, arrays, config, kind):
    """One row of pictures for each query; a gap of two pixels sets the query apart."""
    queries = arrays["picture/queries"].reshape(-1, 8, 8)
    near = arrays[f"picture/{kind}/images"].reshape(len(queries), config.shown, 8, 8)
    wrong = arrays[f"picture/{kind}/labels"] != arrays["picture/labels"][:, None]
    for i, query in enumerate(queries):
        for j, image in enumerate((query, *near[i])):
            x, y = 10 * j + 3 * (j > 0), 10 * i
            ax.imshow(image, cmap="gray_r", extent=(x, x + 8, y + 8, y), interpolation="nearest")
            if j > 0 and wrong[i, j - 1]:
                ax.plot(
                    [x - 0.5, x + 8.5, x + 8.5, x - 0.5, x - 0.5],
                    [y - 0.5, y - 0.5, y + 8.5, y + 8.5, y - 0.5],
                    color=WRONG,
                    marker="",
                    linewidth=1.2,
                )
    ax.set_xlim(-1, 10 * config.shown + 12)
    ax.set_ylim(10 * len(queries) - 1, -1)
    ax.set_xticks([4, 13 + 5 * config.shown - 1], ["query", f"{config.shown} nearest"])
    ax.set_yticks([])
    ax.tick_params(length=0)
    ax.grid(False)
    ax.spines[:].set_visible(False)


def _accuracy(ax, arrays, config):
    for row, (kind, look) in enumerate(LOOKS.items()):
        values = arrays[f"digits/accuracy/{kind}"]
        ax.plot(values, np.full(len(values), row), linestyle="", alpha=0.5, color=look["color"], marker=look["marker"])
        ax.plot([values.mean()], [row], linestyle="", marker="|", markersize=12, mew=1.4, color=look["color"])
    for tick, kind in zip(ax.set_yticks(range(len(LOOKS)), LOOKS), LOOKS, strict=True):
        if kind == "untrained":
            tick.label1.set_color(style.CONTROL)
    ax.set_ylim(len(LOOKS) - 0.5, -0.5)
    ax.tick_params(axis="y", length=0)
    ax.grid(False, axis="y")
    ax.set_xlabel("accuracy")


def _recall(ax, arrays, config):
    ax.set_xscale("log")
    style.log_axis(ax)
    missed = 1 - arrays["digits/recall/graph"]
    style.band(ax, config.beams, missed, **LOOKS["learned"])
    style.band(ax, config.beams, 1 - arrays["digits/recall/random"], **style.control())
    ax.set_xticks(config.beams, [str(beam) for beam in config.beams])
    ax.minorticks_off()
    ax.set_xlabel("beam")
    ax.set_ylabel(f"$1-$recall@{config.k}")


def _estimate(ax, arrays, config):
    own, d = _sets(arrays, config)
    ax.set_xscale("log")
    style.log_axis(ax)
    style.law(ax, d, 1.0, (d[0], d[0]))
    style.band(ax, d, arrays["gaussian/filled"][:, own], **style.control())
    style.band(ax, d, arrays["gaussian/dimension"][:, own], **style.series(3))
    for kind in ("learned", "pixels"):
        value = arrays[f"digits/dimension/{kind}"].mean()
        ax.axhline(value, color=LOOKS[kind]["color"], linewidth=0.9)
        style.note(ax, d[(len(d) - 1) // 2], value, kind, color=LOOKS[kind]["color"], above=kind == "learned")
    _octaves(ax.xaxis, d)
    _octaves(ax.yaxis, [*d, config.ambient[0]])
    ax.set_xlabel("dimension $D$")
    ax.set_ylabel("estimate")


def _difficulty(ax, arrays, config):
    own, _ = _sets(arrays, config)
    estimates = arrays["gaussian/dimension"].mean(axis=0)
    ax.set_xscale("log")
    style.log_axis(ax)
    missed = 1 - arrays["gaussian/graph"]
    style.band(ax, estimates[own], missed[:, own], **style.series(3))
    style.band(ax, estimates[own], 1 - arrays["gaussian/random"][:, own], **style.control())
    wide = np.setdiff1d(np.arange(len(estimates)), own)
    ax.plot(
        estimates[wide],
        missed[:, wide].mean(axis=0),
        linestyle="",
        marker="o",
        markersize=7,
        mfc="none",
        mec="black",
        mew=1,
    )
    learned = 1 - arrays["digits/recall/graph"][:, 0]
    ax.plot(
        [arrays["digits/dimension/learned"].mean()], [learned.mean()], linestyle="", markersize=6, **LOOKS["learned"]
    )
    ax.annotate(
        "learned",
        (arrays["digits/dimension/learned"].mean(), learned.mean()),
        (5, -3),
        textcoords="offset points",
        color=LOOKS["learned"]["color"],
        fontsize=style.FONT_SIZE - 1,
    )
    _octaves(ax.xaxis, estimates)
    ax.set_xlabel("estimated dimension")
    ax.set_ylabel(f"$1-$recall@{config.k}, beam {config.beams[0]}")


def _octaves(axis, values):
    """Ticks at the powers of two inside the range of the values, on a logarithmic axis."""
    powers = 2 ** np.arange(np.ceil(np.log2(min(values))), np.floor(np.log2(max(values))) + 1)
    axis.set_ticks(powers, [f"{power:g}" for power in powers])
    axis.set_ticks([], minor=True)


def _sets(arrays, config):
    """Places of the Gaussian sets in the first of the spaces, and their dimensions."""
    own = np.flatnonzero(arrays["sets"][:, 1] == config.ambient[0])
    return own, arrays["sets"][own, 0]
