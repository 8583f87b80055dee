"""S1, S3, S4, S6 to S8, S11, S14: closed-form optima of contrastive losses, exactly and as training finds them."""

import matplotlib.pyplot as plt
import numpy as np

from experiments._spectral_problems import DIMENSION, POINTS
from experiments.spectral_optima import EXACT, LEADING, TRAINED, gap_to_limit
from paper_figures import style
from theorykit import verify

EXPERIMENT = "spectral_optima"
PROBLEMS = ("S3", "S6", "S7", "S8")
ROUNDING = 1e-17  # drawn in place of 0
PREDICTED = {"color": style.THEORY, "linestyle": style.DASHES, "linewidth": 0.9, "marker": ""}


def draw(result):
    """Relative errors of all identities; descent to the optimum; distances; class collision; the limit of InfoNCE."""
    config = result.config
    fig, axes = plt.subplot_mosaic(
        [["errors", "descent", "span"], ["errors", "collision", "limit"]],
        figsize=(style.DOUBLE, 5.0),
        width_ratios=(1.15, 1, 1),
    )
    _errors(axes["errors"], result)
    _descent(axes["descent"], result)
    _span(axes["span"], result.arrays)
    _collision(axes["collision"], result.arrays)
    _limit(axes["limit"], result.arrays)
    style.caption(
        fig,
        f"""S1, S3, S4, S6, S7, S8, S11, S14. Finite joints of positive pairs over {POINTS} points, embeddings in
        {DIMENSION} dimensions, float64. a: largest relative error of each identity over {config.joints} random joints
        (blue; some without mass at some points, disconnected, or with repeated or few positive eigenvalues), and
        between closed form and training over {config.instances} instances (vermilion); the strip, up to
        $10^{{{np.log10(config.exact):.0f}}}$, is what counts as equal. Controls, grey crosses: the same with one
        assumption broken. b: relative excess of the trained loss over its predicted optimum (S3 spectral, S6 triplets
        on kernel features, S7 VICReg-like, S8 eigenmaps); geometric means over {config.instances} instances with 95%
        bands; grey: controls. c: projector distance from the trained span to the one of the closed form (S4:
        relative distance of scores), dots; grey crosses: before training; black: from the 0.1% quantile to the
        largest of {result.arrays["S3.distance/null"].size:,} random subspaces (S4: closed forms of other joints). d:
        loss of the mean classifier against the class-collision bound, logistic to base 2 with $\\ell(0)=1$,
        {config.embeddings:,} random embeddings and {config.instances} trained ones; grey: natural logarithm,
        $\\ell(0)=\\ln\\,2$. Points should lie below the line. e: distance of exact InfoNCE with $K$ candidates, less
        $\\ln\\,K$, from its limit; {config.risks} joints; the line has slope −1, height fitted. Grey: scores with a
        heavy tail.""",
    )
    return fig


def _errors(ax, result):
    verdicts = {v.claim: v for v in result.verdicts}
    names = [*EXACT, *TRAINED]
    for row, name in enumerate(names):
        look = style.series(0 if name in EXACT else 1)
        for claim, marks in ((name, look), (f"{name}.control", style.control() | {"linestyle": ""})):
            v = verdicts[claim]
            ax.plot([max(v.measured, ROUNDING)], [row], **marks | {"linestyle": "", "markersize": 4.5})
            if not v.as_expected:
                ax.plot([v.measured], [row], marker="o", markersize=10, mfc="none", mec="#CC0000", linestyle="")
    ax.axhline(len(EXACT) - 0.5, color="#BBBBBB", linewidth=0.6, marker="")
    ax.set_xscale("log")
    ax.set_xlim(ROUNDING, 30)
    ax.set_xticks(10.0 ** np.arange(-16, 1, 4))
    ax.axvspan(ROUNDING, result.config.exact, color="#E3E3E3", lw=0, zorder=0)
    ax.axvline(result.config.exact, **PREDICTED)
    ax.set_yticks(range(len(names)), names)
    ax.tick_params(axis="y", length=0)
    ax.grid(False, axis="y")
    ax.set_ylim(len(names) - 0.5, -0.7)
    ax.set_xlabel("largest relative error")
    for row, text, colour in ((0, "exact", 0), (len(EXACT), "trained", 1)):
        ax.text(2e-10, row, text, color=style.COLOURS[colour], ha="right", va="center", fontsize=style.FONT_SIZE - 1)
    ax.text(0.02, 0, "controls", color=style.CONTROL, ha="right", va="center", fontsize=style.FONT_SIZE - 1)
    ax.set_title("a  Closed forms hold to rounding")


def _descent(ax, result):
    arrays, count = result.arrays, result.config.instances
    steps = arrays["steps"][1:]
    ax.set_xscale("log")
    style.log_axis(ax)
    for index, problem in enumerate(PROBLEMS):
        excess = np.maximum(np.abs(arrays[f"excess/{problem}"][:, 1:]), ROUNDING)
        look = {"linestyle": ":", "color": style.CONTROL, "marker": "", "linewidth": 0.9}
        ax.plot(steps, np.exp(np.mean(np.log(excess[count:]), axis=0)), **look)
        style.band(ax, steps, excess[:count], label=problem, **style.series(index) | {"markersize": 2.5})
    ax.set_ylim(ROUNDING / 10, 30)
    ax.legend(loc="lower left")
    style.corner(ax, "controls")
    ax.set_xlabel("descent steps")
    ax.set_ylabel("relative excess loss")
    ax.set_title("b  Descent reaches them")


def _span(ax, arrays):
    ax.set_xscale("log")
    for row, problem in enumerate(LEADING):
        trained, untrained, null = (arrays[f"{problem}.distance/{w}"] for w in ("trained", "untrained", "null"))
        marks = {"linestyle": "", "alpha": 0.6, "zorder": 3}
        ax.plot(np.maximum(trained, ROUNDING), np.full(len(trained), row), **style.series(1) | marks)
        ax.plot(untrained, np.full(len(untrained), row - 0.2), **style.control() | marks | {"alpha": 0.3})
        chance = verify.null_quantile(null, verify.LEVEL, direction="less"), null.max()
        ax.plot(chance, [row + 0.2] * 2, color=style.THEORY, linewidth=1.0, marker="|", markeredgewidth=1.0)
    ax.set_xlim(ROUNDING, 10)
    ax.set_xticks(10.0 ** np.arange(-16, 1, 4))
    ax.set_yticks(range(len(LEADING)), LEADING)
    ax.tick_params(axis="y", length=0)
    ax.grid(False, axis="y")
    ax.set_ylim(len(LEADING) - 0.5, -0.7)
    for row, text, colour in ((0, "untrained", style.CONTROL), (1, "chance", style.THEORY)):
        ax.text(1e-2, row, text, color=colour, ha="right", va="center", fontsize=style.FONT_SIZE - 1)
    ax.text(1e-14, 1, "trained", color=style.COLOURS[1], va="center", fontsize=style.FONT_SIZE - 1)
    ax.set_xlabel("distance to closed form")
    ax.set_title("c  Nearer than chance")


def _collision(ax, arrays):
    for which, look in (
        ("base e", style.control() | {"linestyle": "", "markersize": 2, "alpha": 0.5}),
        ("base 2", style.series(0) | {"linestyle": "", "markersize": 2, "alpha": 0.6}),
        ("trained", style.series(1) | {"linestyle": "", "markersize": 4}),
    ):
        tau = arrays[f"S11/{which}/collision"]
        limit = (arrays[f"S11/{which}/unsupervised"] - tau) / (1 - tau)
        ax.plot(limit, arrays[f"S11/{which}/supervised"], label=None, **look)
    line = np.array([0.0, 3.0])
    ax.plot(line, line, **PREDICTED, zorder=4)
    ax.set_xlim(0, 2.5)
    ax.set_ylim(0, 1.6)
    ax.text(1.32, 1.5, "control", color=style.CONTROL, ha="right", va="top", fontsize=style.FONT_SIZE - 1)
    ax.text(2.45, 0.1, "trained", color=style.COLOURS[1], ha="right", fontsize=style.FONT_SIZE - 1)
    ax.text(2.45, 0.25, "random", color=style.COLOURS[0], ha="right", fontsize=style.FONT_SIZE - 1)
    ax.set_xlabel(r"$(L_\mathrm{un}-\tau)/(1-\tau)$")
    ax.set_ylabel(r"$L_\mathrm{sup}$")
    ax.set_title("d  Class collision (S11)")


def _limit(ax, arrays):
    candidates = arrays["candidates"]
    style.log_axis(ax)
    style.widths_axis(ax, candidates[::2], "candidates $K$")
    gaps = gap_to_limit(arrays, "bounded")
    style.band(ax, candidates, gaps, **style.series(0))
    style.band(ax, candidates, gap_to_limit(arrays, "heavy"), **style.control())
    style.law(ax, candidates, -1.0, style.centre(candidates, gaps))
    style.note(ax, candidates[-1], 2 * gaps[:, -2].mean(), "$1/K$", color=style.THEORY)
    style.corner(ax, "heavy tail")
    ax.set_ylabel(r"$|R_K-\ln K-R_\infty|$")
    ax.set_title("e  Limit of InfoNCE (S14)")
