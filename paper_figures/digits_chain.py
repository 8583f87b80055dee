"""Digits: estimates of the chain on labelled digits and on halves, with the laws and bounds that need no unknowns."""

import matplotlib.pyplot as plt
import numpy as np

from paper_figures import style

EXPERIMENT = "digits_chain"
LAW = {"color": style.THEORY, "linestyle": style.DASHES, "linewidth": 0.9, "marker": "", "zorder": 4}
THIN = {"color": style.THEORY, "linewidth": 0.6, "marker": ""}
TIGHT = {"labelspacing": 0.2, "handlelength": 1.6, "handletextpad": 0.5}


def draw(result):
    """Labelled digits along training (a), information of halves (b), retrieval against its bounds (c), prompts (d)."""
    arrays, config = result.arrays, result.config
    fig, ((labelled, information), (retrieval, prompts)) = plt.subplots(2, 2, figsize=(style.DOUBLE, 5.4))
    _labelled(labelled, arrays, config)
    labelled.set_title("a  Labels as texts: $S$ along training")
    _information(information, arrays, config)
    information.set_title("b  Halves: a lower bound of $I$")
    _retrieval(retrieval, arrays, config)
    retrieval.set_title("c  Halves: retrieval among $N$")
    _prompts(prompts, arrays, config)
    prompts.set_title("d  Labels of left halves, zero-shot")
    style.caption(
        fig,
        f"""Digits, in nats: estimates on held-out rows of {config.folds} folds. The weight decay was chosen on
        them. Bands, 95%: bootstrap over folds and
        held-out rows in b and for the level of all prompts in d, Student's t over folds elsewhere. a: $S$, which is
        here the log-loss of zero-shot labels, against the excess of L1 among $K$ candidates, every fold at
        {len(config.labelled_steps) - 1} steps
        of training; between $S$ = excess (dashed) and $(1+(2B-1)/(K-1))$ times it (lines in colour), as the theory
        demands. Grey: L1 itself in place of its excess, $K=8$. b: $\\ln N-R_N$ of encoders of the two halves trained
        with $K$ candidates; dashed: the cap $\\ln N$; thin: $H$(label). Grey: trained on unmatched pairs. c: $R_N$ of
        encoders trained with 64 candidates, below $(N-1)/(K-1)$ times $R_K$, $K=2$ and 9, dashed, and above $\\ln2$
        times the error of the first hit; grey: $R_2$ without the factor. d: log-loss with $M$ right halves of training
        rows as prompts of each class, averaged as exponentials or as similarities; levels: all prompts and a linear
        probe of the left half's embedding. Grey: trained on unmatched pairs; thin: chance.""",
    )
    return fig


def _labelled(ax, arrays, config):
    ax.set_xscale("log")
    style.log_axis(ax)
    at = lambda what, k: arrays[f"labelled/{what}/whole"][:, 1:, k].ravel()  # noqa: E731
    points = {"linestyle": "", "markersize": 2.5, "alpha": 0.7}
    x = np.geomspace(at("excess", 0).min(), at("excess", len(config.labelled_candidates) - 1).max(), 100)
    ax.plot(x, x, **LAW)
    for i, k in enumerate(config.labelled_candidates):
        look = style.series(i)
        ax.plot(at("excess", i), at("sufficiency", i), **look | points, label=f"$K={k}$")
        factor = np.median(arrays["labelled/factor/whole"][..., i])
        inside = x[x <= at("excess", i).max()]
        ax.plot(inside, factor * inside, color=look["color"], linewidth=0.9, marker="")
    middle = config.labelled_candidates.index(8)
    ax.plot(at("risk", middle), at("sufficiency", middle), **style.control() | points, label="$R_8$, no excess")
    ax.set_ylim(0.6 * at("sufficiency", 0).min(), 200)
    ax.legend(loc="upper left", ncols=2, **TIGHT)
    ax.set(xlabel="excess of L1, $R_K-\\min R_K$", ylabel="$S$")


def _information(ax, arrays, config):
    n = np.array(config.negatives) + 1
    ax.plot(n, np.log(n), **LAW)
    for i, k in enumerate(config.trained_with):
        _bootstrapped(ax, n, arrays, f"K={k}", style.series(i) | {"label": f"trained with $K={k}$"})
    _bootstrapped(ax, n, arrays, "unmatched", style.control() | {"label": "unmatched pairs"})
    entropy = np.log(10)  # to three digits: classes of digits are nearly equally frequent
    ax.axhline(entropy, **THIN)
    ax.text(n[0], entropy, "$H$(label)", va="bottom", fontsize=style.FONT_SIZE - 1)
    style.widths_axis(ax, n, "candidates $N$")
    ax.set_ylim(-4.2, None)
    ax.legend(loc="lower right", ncols=2, **TIGHT)
    ax.set_ylabel("$\\ln N-R_N$")


def _bootstrapped(ax, n, arrays, variant, look):
    low, high = np.log(n) - arrays[f"interval/loss/{variant}"][::-1]
    ax.plot(n, np.log(n) - arrays[f"halves/loss/{variant}"].mean(axis=0), zorder=3, **look)
    ax.fill_between(n, low, high, color=look["color"], alpha=0.22, linewidth=0, zorder=2)


def _retrieval(ax, arrays, config):
    n = np.array(config.negatives) + 1
    style.log_axis(ax)
    loss = arrays["halves/loss/K=64"]
    style.band(ax, n, loss, label="log-loss $R_N$", **style.series(0))
    style.band(ax, n, np.log(2) * arrays["halves/error/K=64"], label="error x $\\ln2$", **style.series(1))
    for k in (2, 9):
        first = config.negatives.index(k - 1)
        shown = n >= k
        ax.plot(n[shown], (n[shown] - 1) / (k - 1) * loss[:, first].mean(), **LAW)
    ax.plot(n, np.full(len(n), loss[:, 0].mean()), **style.control() | {"label": "$R_2$"})
    style.widths_axis(ax, n, "candidates $N$")
    ax.legend(loc="upper left", **TIGHT)
    ax.set_ylabel("on held-out halves")


def _prompts(ax, arrays, config):
    style.log_axis(ax)
    m = np.array(config.prompts)
    for i, average in enumerate(("exponentials", "similarities")):
        style.band(ax, m, arrays[f"halves/prompts/{average}/K=64"], label=average, **style.series(i))
        if i == 0:
            style.band(ax, m, arrays[f"halves/prompts/{average}/unmatched"], label="unmatched pairs", **style.control())
    low, high = arrays["interval/zero_shot/K=64"]
    ax.axhspan(low, high, color=style.COLOURS[0], alpha=0.15, linewidth=0)
    levels = ("all prompts", "halves/zero_shot/K=64", 0, "bottom"), ("linear probe", "halves/probe/labels", 2, "top")
    for text, name, colour, place in levels:
        value = arrays[name].mean()
        ax.axhline(value, color=style.COLOURS[colour], linewidth=0.9, marker="")
        ax.text(m[0], value, text, va=place, fontsize=style.FONT_SIZE - 1)
    ax.axhline(np.log(10), **THIN)
    style.widths_axis(ax, m, "prompts $M$ of each class")
    ax.legend(loc="upper right", bbox_to_anchor=(1, 0.78), **TIGHT)
    ax.set_ylim(0.25, 4)
    ax.set_ylabel("log-loss of labels")
