"""MI: estimates and bounds of mutual information against its exact value, caps, gap, variance, trained critics."""

import matplotlib.pyplot as plt
import numpy as np

from paper_figures import style

EXPERIMENT = "mi_bounds"
PREDICTED = {"color": style.THEORY, "linestyle": style.DASHES, "linewidth": 0.9, "marker": "", "zorder": 4}
POINTS = {"linestyle": ""}
TIGHT = {"labelspacing": 0.2, "handlelength": 1.4, "handletextpad": 0.5, "frameon": True, "edgecolor": "none"}
CANDIDATES = (2, 8, 64, 512)


def draw(result):
    """Top: Gaussian pairs with the exact critic, and finite joints. Bottom: variance, and trained critics."""
    arrays, config = result.arrays, result.config
    fig, axes = plt.subplots(2, 2, figsize=(style.DOUBLE, 5.4))
    _estimates(axes[0, 0], arrays)
    _gap(axes[0, 1], arrays)
    _variance(axes[1, 0], arrays)
    _trained(axes[1, 1], arrays)
    style.caption(
        fig,
        f"""MI, in nats. a: estimates with the exact critic from {config.pairs:,} Gaussian pairs in four dimensions,
        {config.seeds} seeds, means with 95% bands; dashed: $I$ and the caps $\\ln K$. DV in batches of two, grey, is no
        lower bound. b: what the best InfoNCE lacks on {config.joints} random joints, against the bound
        $\\ln(1+\\chi^2/K)$, dashed; grey: a constant score. c: variance of estimates of batches of four with the exact
        critic, {config.batches:,} batches for each of {config.seeds} seeds; dashed: the closed form of NWJ; grey:
        InfoNCE, below $\\ln^2 K$, dotted line. Where the law leaves the Gaussian points, its mass is in pairs too rare
        to be drawn. d: critics trained for {config.steps:,} steps, {config.seeds} seeds each; above:
        Gaussian pairs, $\\rho=0.6$ and $0.9$, dashed the exact $I$, grey a bilinear critic and NWJ before training;
        below: tables for $X=Y$ on 8 symbols, replaced by chance with probability 0.5 and 0.1, line: the bound at
        $\\ln r$, grey: the table trained by InfoNCE in each bound.""",
    )
    return fig


def _estimates(ax, arrays):
    information = arrays["gaussian/information"]
    top = 1.08 * information[-1]
    ax.plot([0, top], [0, top], **PREDICTED)
    for index, k in enumerate(CANDIDATES):
        colour = style.shade(index, len(CANDIDATES))
        look = {"color": colour, "marker": style.MARKERS[index]}
        ax.axhline(np.log(k), **PREDICTED | {"color": colour, "zorder": 1})
        style.band(ax, information, arrays["gaussian/info_nce"][..., index], label=f"InfoNCE, $K={k}$", **look)
    style.band(ax, information, arrays["gaussian/nwj"], label="NWJ", **style.series(1) | POINTS)
    style.band(ax, information, arrays["gaussian/donsker_varadhan"], label="DV, 512", **style.series(3) | POINTS)
    style.band(ax, information, arrays["gaussian/donsker_varadhan_small"], label="DV, 2", **style.control())
    ax.set(xlim=(0, top), ylim=(0, 1.95 * top), xlabel="exact $I$", ylabel="estimate, exact critic")
    ax.legend(ncols=2, loc="upper right", **TIGHT)
    ax.set_title(r"a  InfoNCE stays below $\ln K$")


def _gap(ax, arrays):
    ax.set_xscale("log")
    ax.set_yscale("log")
    ratios = []
    for index, k in enumerate(CANDIDATES):
        ratio = arrays["exact/chi_square"] / k
        ratios.append(ratio)
        gap = arrays["exact/information"] - arrays["exact/best"][:, index]
        constant = style.control() | POINTS | {"markersize": 2.0, "alpha": 0.5}
        ax.plot(ratio, arrays["exact/information"], **constant, label="constant score" if index == 0 else None)
        look = {"color": style.shade(index, len(CANDIDATES)), "marker": style.MARKERS[index]} | POINTS
        ax.plot(ratio, gap, **look | {"markersize": 2.5}, label=f"best, $K={k}$")
    x = np.geomspace(np.min(ratios), np.max(ratios), 200)
    ax.plot(x, np.log1p(x), **PREDICTED, label=r"$\ln(1+\chi^2/K)$")
    ax.set(ylim=(1e-7, None), xlabel=r"$\chi^2/K$", ylabel="$I-I_K$")
    ax.legend(loc="lower right", **TIGHT)
    ax.set_title(r"b  What finite $K$ costs")


def _variance(ax, arrays):
    style.log_axis(ax)
    grey = style.control() | {"linewidth": 0.8}
    for index, (family, label) in enumerate((("gaussian", "Gaussian"), ("symbols", "$X=Y$"))):
        information = arrays[f"variance/{family}/information"]
        ax.plot(information, arrays[f"variance/{family}/law"], **PREDICTED)
        look = style.series(index) | POINTS
        style.band(ax, information, arrays[f"variance/{family}/nwj"], label=f"NWJ, {label}", **look)
        low = style.control(index) | {"linewidth": grey["linewidth"]}
        style.band(ax, information, arrays[f"variance/{family}/info_nce"], label=f"InfoNCE, {label}", **low)
    ax.axhline(np.log(4) ** 2, color=style.CONTROL, linestyle=":", linewidth=0.9, marker="")
    ax.set(xlabel="exact $I$", ylabel="variance of a batch, nats$^2$")
    ax.set_ylim(top=1e3)
    ax.legend(loc="upper left", **TIGHT)
    ax.set_title(r"c  NWJ: $e^{2I}$, or $e^{I}$ at best")


def _trained(ax, arrays):
    grey = style.control()
    names = {
        "exact": ("InfoNCE, exact critic", style.series(2)),
        "separable": ("InfoNCE, two encoders", style.series(0)),
        "bilinear": ("InfoNCE, bilinear", grey),
        "interpolated_exact": ("interpolated, exact", style.series(2)),
        "interpolated": ("interpolated", style.series(4)),
        "mine": ("MINE", style.series(1)),
        "nwj": ("NWJ", style.series(3)),
        "nwj_untrained": ("NWJ, untrained", style.control(1)),
    }
    information = -2 * np.log1p(-(np.array([0.6, 0.9]) ** 2))
    for row, (name, (_, look)) in enumerate(names.items()):
        for value in arrays[f"trained/{name}"].T:
            ax.plot(value, np.full(len(value), row), **look | POINTS | {"markersize": 4, "alpha": 0.6})
    # Tables: the bounds in the order of the array; the exact optimum of each as a short line.
    tables, first = arrays["trained/tables"], len(names)
    labels = ("MINE", "NWJ", "interpolated", "InfoNCE")
    for row in range(len(labels)):
        for noise in range(tables.shape[1]):
            own, other, best = tables[:, noise, row].T
            place = np.full(len(own), first + row)
            ax.plot(other, place, **grey | POINTS | {"markersize": 3, "alpha": 0.5})
            ax.plot(own, place, **style.series(0) | POINTS | {"markersize": 4, "alpha": 0.6})
            ax.plot(best[:1].repeat(2), first + row + np.array([-0.45, 0.45]), **PREDICTED | {"linestyle": "-"})
    for value in information:
        ax.plot([value, value], [-0.75, first - 0.5], **PREDICTED)
    ax.plot([np.log(8)] * 2, [-0.75, first - 0.5], color=style.THEORY, linestyle=":", linewidth=0.9, marker="")
    ax.axhline(first - 0.5, color=style.THEORY, linewidth=0.5, marker="")
    for x, text in ((information[0], "$I$"), (information[1], "$I$"), (np.log(8), r"$\ln K$")):
        ax.text(x, -0.75, text, ha="center", va="bottom", fontsize=style.FONT_SIZE - 1)
    ticks = [label for label, _ in names.values()] + [f"table, {label}" for label in labels]
    ax.set_yticks(range(len(ticks)), ticks, fontsize=style.FONT_SIZE - 1)
    ax.set_ylim(len(ticks) - 0.5, -0.75)
    ax.grid(False, axis="y")
    ax.set_xlabel(r"nats")
    ax.set_title("d  Trained critics\n")
