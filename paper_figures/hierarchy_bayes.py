"""H: Bayes risks of four tasks on the hierarchical model against p, with exact values and limits."""

import math

import matplotlib.pyplot as plt
import numpy as np

from paper_figures import style

EXPERIMENT = "hierarchy_bayes"
EXACT = {"color": style.THEORY, "linestyle": style.DASHES, "linewidth": 0.9, "marker": "", "zorder": 4}
CEILING = {"color": style.THEORY, "linewidth": 0.6, "marker": ""}
TIGHT = {"labelspacing": 0.2, "handlelength": 1.6, "handletextpad": 0.5}
LARGE, SMALL = style.series(0), style.series(1) | {"linestyle": ""}
PANELS = (
    ("contrastive", "a  Contrastive, both directions", "Bayes risk, nats"),
    ("zero_shot", "b  Zero-shot label", "Bayes risk, nats"),
    ("denoising", "c  Denoising, text given", "mean squared error"),
    ("next_token", "d  Next token, image given", "Bayes risk, nats per token"),
)


def draw(result):
    """One panel for each task: large trees, small ones with their exact risks, the wrong tree, limits."""
    arrays, config = result.arrays, result.config
    fig, axes = plt.subplots(2, 2, figsize=(style.DOUBLE, 4.8))
    size = f"$S={config.alphabet}$, {config.arity**config.depth} leaves"
    for ax, (task, title, label) in zip(axes.flat, PANELS, strict=True):
        style.band(ax, config.levels, arrays[task], label=size, **LARGE)
        style.band(ax, config.levels, arrays[f"{task}/permuted"], label="wrong tree", **style.control(0))
        style.band(ax, config.small_levels, arrays[f"small/{task}"], label="$S=3$, 4 leaves", **SMALL)
        if task == "denoising":
            _denoising(ax, arrays, config)
        else:
            ax.plot(config.small_levels, arrays[f"exact/{task}"].mean(axis=0), **EXACT, label="exact")
            ax.axhline({"contrastive": 2 * math.log(4)}.get(task, math.log(config.alphabet)), **CEILING)
        ax.set(xlabel="noise of the edges $p$", ylabel=label, xlim=(-0.01, None))
        ax.set_ylim(bottom=0)
        ax.set_title(title)
    limit = arrays["limit/uniform"]
    _limit(axes[0, 0], limit, config)
    axes[0, 1].legend(loc="center right", bbox_to_anchor=(1, 0.6), **TIGHT)
    style.caption(
        fig,
        f"""H. Bayes risks by message passing on trees of depth {config.depth} and arity {config.arity} over
        {config.alphabet} symbols (blue), and on trees of depth 2 and arity 2 over 3 symbols with a prior that is not
        uniform (red), where the exact risk is known (dashed). {config.seeds} seeds with kernels of their own,
        {config.samples:,} and {config.small_samples:,} samples each, means with 95% bands. a: $K=4$ candidates; dashed
        level: the limit $2E\\ln(1+\\mathrm{{Bin}}(3,1/S))$ at $p=0$, measured with {limit.size} seeds. Thin lines:
        nothing known, $2\\ln4$ in a and $\\ln S$ for $S={config.alphabet}$ in b and d. c: per leaf, noise of one step
        between symbols. Controls, grey: the same recursion with the leaves permuted, so along a wrong tree; in c also
        with the text of another sample.""",
    )
    return fig


def _denoising(ax, arrays, config):
    series = {"alone": ("$S=3$, without text", style.series(2)), "other": ("$S=3$, another's text", style.control(1))}
    for what, (label, look) in series.items():
        style.band(ax, config.small_levels, arrays[f"small/denoising/{what}"], label=label, **look)
    ax.set_ylim(0, 1.3)  # room for the legend
    ax.legend(*(side[-2:] for side in ax.get_legend_handles_labels()), loc="upper left", **TIGHT)


def _limit(ax, measured, config):
    """The measured risk at p = 0 on the line of its limit."""
    k = np.arange(4)
    chances = [math.comb(3, int(i)) * (1 / config.alphabet) ** i * (1 - 1 / config.alphabet) ** (3 - i) for i in k]
    ax.axhline(2 * np.sum(chances * np.log1p(k)), **EXACT)
    style.band(ax, [0.0], measured[:, None], **LARGE)
    ax.text(ax.get_xlim()[1], 2 * math.log(4), "chance ", ha="right", va="bottom", fontsize=7)
