"""T1, T2, T3, T6: contrastive risk, sufficiency and what encoders lose, as identities over random finite joints."""

import matplotlib.pyplot as plt
import numpy as np

from experiments.surrogate_identity import DIVERGENCES, excess
from paper_figures import style

EXPERIMENT = "surrogate_identity"
ROUNDING = 1e-17  # drawn in place of 0
PREDICTED = {"color": style.THEORY, "linestyle": style.DASHES, "linewidth": 0.9, "marker": "", "zorder": 4}
QUANTILES = (0.05, 0.5, 0.95)


def draw(result):
    """Relative errors of the identities; Excess_K up to Suff; the gap; its coefficient; information; encoders."""
    fig, axes = plt.subplot_mosaic(
        [["errors", "rise", "gap"], ["errors", "coefficient", "information"]],
        figsize=(style.DOUBLE, 4.9),
        width_ratios=(1.0, 1, 1),
    )
    arrays, config = result.arrays, result.config
    _errors(axes["errors"], result)
    _rise(axes["rise"], arrays)
    _gap(axes["gap"], arrays)
    _coefficient(axes["coefficient"], arrays)
    _information(axes["information"], arrays)
    sets = np.isfinite(arrays["enumerated/gap"]).sum()
    style.caption(
        fig,
        f"""T1, T2, T3, T6. {config.joints:,} random joints with alphabets of 2 to 6 and 2 to 4 symbols, half of them
        with empty cells, random scores, float64; nats. a: largest relative error of each identity (blue); the strip is
        what counts as equal. T1, T6.minimiser: gradient of the risk at its minimum; T2: Suff = Excess$_K$ + gap$_K$
        with the gap enumerated over all sets of $K$ candidates, {sets:,} cases; T3: limit of $K\\,$gap$_K$,
        extrapolated from the two largest $K$; T6: forms of an encoder's loss (var: variational, Bregman; $\\chi^2$; JS:
        Jensen-Shannon), heads, pairs of encoders, spectral loss. b to e: median over joints and the range from 5% to
        95%. b: excess risk as a share of the sufficiency. c: what is missing; line of slope −1, height fitted. d: $K$
        times what is missing over $\\frac{{1}}{{2}}E_{{pq}}(r-w)^2$. e: information that $K$ candidates miss over its
        bound $\\ln(1+\\chi^2/K)$. Controls, grey: see the labels; in a the same check with one assumption broken.""",
    )
    return fig


def _names():
    short = {"KL": "KL", "chi-square": r"$\chi^2$", "Jensen-Shannon": "JS"}
    names = {
        "T1.minimiser": "T1 minimiser",
        "T2.identity": "T2 identity",
        "T2.normalised": "T2 normalised",
        "T3.coefficient": "T3 coefficient",
        "T6.minimiser": "T6 minimiser",
    }
    for f in DIVERGENCES:
        names |= {f"T6.variational.{f}": f"T6 var, {short[f]}", f"T6.bregman.{f}": f"T6 Bregman, {short[f]}"}
    return names | {"T6.heads": "T6 heads", "T6.limit": "T6 limit", "T6.pair": "T6 pair", "T6.spectral": "T6 spectral"}


def _errors(ax, result):
    verdicts, names = {v.claim: v for v in result.verdicts}, _names()
    for row, name in enumerate(names):
        for claim, look in ((name, style.series(0)), (f"{name}.control", style.control())):
            v = verdicts[claim]
            at = max(v.measured, ROUNDING) if np.isfinite(v.measured) else ROUNDING
            ax.plot([at], [row], **look | {"linestyle": "", "markersize": 4.5})
            if not v.as_expected:
                ax.plot([at], [row], marker="o", markersize=10, mfc="none", mec="#CC0000", linestyle="")
        # The strip of each row ends at its own threshold: that of the coefficient is wider.
        limit = verdicts[name].margin
        ax.fill_betweenx([row - 0.5, row + 0.5], ROUNDING, limit, color="#E3E3E3", linewidth=0, zorder=0)
    ax.set_xscale("log")
    ax.set_xlim(ROUNDING, 30)
    ax.set_xticks(10.0 ** np.arange(-16, 1, 4))
    ax.set_yticks(range(len(names)), names.values())
    ax.tick_params(axis="y", length=0)
    ax.grid(False, axis="y")
    ax.set_ylim(len(names) - 0.5, -0.7)
    ax.set_xlabel("largest relative error")
    ax.text(2e-2, 0.5, "controls", color=style.CONTROL, ha="right", va="center", fontsize=style.FONT_SIZE - 1)
    ax.set_title("a  Identities hold to rounding")


def _quantiles(ax, x, values, **look):
    low, middle, high = np.quantile(values, QUANTILES, axis=0)
    (line,) = ax.plot(x, middle, **look)
    ax.fill_between(x, low, high, color=line.get_color(), alpha=0.22, linewidth=0)


def _candidates(ax, arrays, first=1):
    k = arrays["candidates"][first:]
    ax.set_xscale("log")
    ax.set_xlabel("candidates $K$")
    return k, np.s_[:, first:]


def _rise(ax, arrays):
    k, shown = _candidates(ax, arrays, 0)
    lost = arrays["sufficiency"][:, None]
    _quantiles(ax, k, (excess(arrays, over="conditional") / lost)[shown], **style.control())
    _quantiles(ax, k, (excess(arrays) / lost)[shown], **style.series(0))
    ax.axhline(1, **PREDICTED)
    ax.set_ylim(-0.75, 1.25)
    ax.text(1e4, 1.03, "Suff", ha="right", va="bottom", fontsize=style.FONT_SIZE - 1)
    style.corner(ax, "over $\\ln P(y|x)$, not\nthe minimiser", top=False)
    ax.set_ylabel("Excess$_K$ / Suff")
    ax.set_title("b  Excess rises to Suff (T3)")


def _gap(ax, arrays):
    k, shown = _candidates(ax, arrays)
    style.log_axis(ax)
    gap = (arrays["sufficiency"][:, None] - excess(arrays))[shown] / arrays["sufficiency"][:, None]
    _quantiles(ax, k, gap, **style.series(0))
    large = k[-arrays["growing/gap"].shape[1] :]
    ax.plot(large, arrays["growing/gap"][2], **style.control())
    style.law(ax, large, -1.0, style.centre(large, gap[:, -len(large) :]))
    style.note(ax, k[-1], np.median(gap[:, -2]), "$K^{-1}$", color=style.THEORY)
    style.note(ax, k[-1], arrays["growing/gap"][2, -1], "control: $X=Y$\non $2K$ symbols", above=False)
    ax.set_ylabel("gap$_K$ / Suff")
    ax.set_title("c  The gap: $1/K$ (T3)")


def _coefficient(ax, arrays):
    k, shown = _candidates(ax, arrays)
    style.log_axis(ax)
    scaled = (k * (arrays["sufficiency"][:, None] - excess(arrays))[shown]) / arrays["coefficient"][:, None]
    control = arrays["coefficient"] / arrays["under P"]
    _quantiles(ax, k, scaled * control[:, None], **style.control())
    _quantiles(ax, k, scaled, **style.series(0))
    ax.axhline(1, **PREDICTED)
    style.corner(ax, "mean under $P$", top=False)
    ax.set_ylabel(r"$K\,$gap$_K$ / $\frac{1}{2}E_{pq}(r-w)^2$")
    ax.set_title("d  … with this coefficient")


def _information(ax, arrays):
    k, shown = _candidates(ax, arrays)
    missing = arrays["information"][:, None] - (np.log(arrays["candidates"]) - arrays["risk/best"])
    bound = np.log1p(arrays["chi2"][:, None] / arrays["candidates"])
    miscounted = missing[shown] + np.log(k / (k - 1))
    _quantiles(ax, k, miscounted / bound[shown], **style.control())
    _quantiles(ax, k, (missing / bound)[shown], **style.series(0))
    ax.axhline(1, **PREDICTED)
    ax.axhline(0, **PREDICTED)
    ax.set_ylim(-0.2, 4)
    ax.text(k[-1], 0.1, "between 0 and 1", ha="right", va="bottom", fontsize=style.FONT_SIZE - 1)
    style.corner(ax, "$\\ln(K-1)$ for $\\ln\\,K$")
    ax.set_ylabel(r"$(I-I_K)\,/\,\ln(1+\chi^2/K)$")
    ax.set_title("e  Missed nats (T1)")
