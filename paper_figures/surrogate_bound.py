"""T2', T4, T5: three readings of "the sufficiency is at most the contrastive loss", with their constants."""

import matplotlib.pyplot as plt
import numpy as np

from experiments.surrogate_bound import EXACT, FAR, FLAT, GROWING, MASSES, NEAR, extremal_law
from paper_figures import style

EXPERIMENT = "surrogate_bound"
PREDICTED = {"color": style.THEORY, "linestyle": style.DASHES, "linewidth": 0.9, "marker": "", "zorder": 4}
DOTS = {"linestyle": "", "markersize": 2, "alpha": 0.3, "rasterized": True}
SMALL = style.FONT_SIZE - 1


def draw(result):
    """Top: S against the excess and its constants. Bottom: the raw risk, and X = Y."""
    fig, axes = plt.subplot_mosaic(
        [["a"] * 3 + ["b"] * 3, ["c"] * 2 + ["d"] * 2 + ["e"] * 2], figsize=(style.DOUBLE, 5.0)
    )
    arrays, config = result.arrays, result.config
    _excess(axes["a"], arrays)
    _order(axes["b"], arrays)
    _flat(axes["c"], arrays)
    _raw(axes["d"], arrays)
    _identical(axes["e"], arrays)
    over = arrays["random/ratio"] - 1
    loose = {name: np.median((arrays[f"random/{name}"] - 1) / over) for name in ("floor", "ceiling")}
    below = np.mean(arrays["random/sufficiency"] > arrays["random/risk"])
    style.caption(
        fig,
        f"""T2', T4, T5. {config.joints:,} random joints, alphabets of 2 to 6 and 2 to 4 symbols, random scores, exact
        risks in float64. $B$ bounds $r$ and $w$, $1/B'$ bounds $w$ from below. a: by how much the sufficiency $S$
        exceeds the excess risk of $K$ candidates, and the two guaranteed constants; medians and ranges from 5% to
        95%. They are loose by {loose["floor"]:,.0f} (with $B'$) and {loose["ceiling"]:.1f} (without) in the median.
        Grey: the latter at $B=1$. b: the same against $(K-1)/B$; dashed: the extremal scores, in the limit of large
        $B$ and small distance from the best score; squares: such scores, $w$ within {100 * NEAR:g}% of $r$,
        $B=2,8,64$; grey: within {100 * FAR:g}%. c: constant scores, {config.flat} joints on 24 symbols; the curve
        has $e^I={EXACT}$. d: random scores; vermilion: at $K=\\lceil B'e^I\\rceil$. $S$ exceeds the raw risk in
        {100 * below:.0f}% of all cases, all left of the line; grey: constant scores with $K=\\lceil e^I\\rceil-1$.
        T5, e: $X=Y$ uniform on $N$ symbols, constant score; dashed: $\\ln\\,N/\\ln\\,K$; grey: two clusters of
        $N/2$ symbols.""",
    )
    return fig


def _band(ax, k, values, text, at, **look):
    low, middle, high = np.quantile(values, (0.05, 0.5, 0.95), axis=0)
    ax.plot(k, middle, **look)
    ax.fill_between(k, low, high, color=look["color"], alpha=0.2, linewidth=0)
    ax.text(k[at], 1.6 * high[at], text, color=look["color"], fontsize=SMALL, ha="left", va="bottom")


def _excess(ax, arrays):
    k = arrays["candidates"]
    ax.set_xscale("log")
    style.log_axis(ax)
    _band(ax, k, arrays["random/floor"] - 1, "guaranteed, $B$ and $B'$", 2, **style.series(3))
    _band(ax, k, arrays["random/ceiling"] - 1, "guaranteed, $B$ alone", 2, **style.series(2))
    _band(ax, k, arrays["random/ratio"] - 1, "", 0, **style.series(0))
    ax.plot(k, np.median(arrays["random/ceiling at 1"], axis=0) - 1, **style.control())
    ax.text(k[-3], 2e-4, "measured", color=style.COLOURS[0], fontsize=SMALL, ha="right")
    style.corner(ax, "control: $B=1$, dotted", top=False)
    ax.set_ylim(1e-6, 1e7)
    ax.set(xlabel="candidates $K$", ylabel="$S\\,/\\,$Excess$_K-1$")
    ax.set_title("a  $S\\leq C\\,$Excess$_K$ needs $C>1$ (T4)")


def _order(ax, arrays):
    k = arrays["candidates"]
    ax.set_xscale("log")
    style.log_axis(ax)
    n = ((k - 1) / arrays["random/B"][:, None]).ravel()
    order = np.argsort(n)
    ax.plot(n, arrays["random/ratio"].ravel() - 1, **style.series(0) | DOTS)
    ax.plot(n[order], arrays["random/ceiling"].ravel()[order] - 1, color=style.COLOURS[2], marker="", linewidth=0.8)
    for row in range(len(MASSES)):  # near the best score, then far from it
        at = (k - 1) / arrays["local/B"][row]
        ax.plot(at, arrays["local/ratio"][row] - 1, **style.series(1) | {"linestyle": "", "zorder": 5})
        far = arrays["local/ratio"][len(MASSES) + row] - 1
        ax.plot((k - 1) / arrays["local/B"][len(MASSES) + row], far, **style.control() | {"linestyle": ""})
    line = np.geomspace(n.min() / 3, n.max(), 200)
    wide = 1e6  # a B so large that only n counts
    missing = extremal_law(wide, line * wide + 1)
    ax.plot(line, missing / (1 - missing), **PREDICTED)
    ax.set_ylim(1e-6, 1e4)
    ax.text(0.3, 400, "guaranteed", color=style.COLOURS[2], fontsize=SMALL)
    ax.text(60, 0.08, "extremal", color=style.COLOURS[1], fontsize=SMALL)
    ax.text(0.2, 1e-3, "random joints", color=style.COLOURS[0], fontsize=SMALL)
    style.corner(ax, "crosses: far from\nthe best score")
    ax.set(xlabel="$(K-1)/B$", ylabel="$S\\,/\\,$Excess$_K-1$")
    ax.set_title("b  The order $B/K$ is right")


def _flat(ax, arrays):
    for kind, look in (("flat", style.series(0) | DOTS), ("sweep", style.series(1) | {"markersize": 2.5})):
        lost = arrays[f"{kind}/sufficiency"][:, None]
        x, y = arrays[f"{kind}/candidates"] / np.exp(lost), lost / arrays[f"{kind}/risk"]
        ax.plot(x.ravel(), y.ravel(), **look)
    ax.axhline(1, **PREDICTED)
    ax.axvline(1, **PREDICTED)
    ax.set(xlim=(0.4, 2.4), ylim=(0.7, 1.5), xlabel="$K/e^I$", ylabel="$S/R_K$")
    ax.text(1.05, 1.42, "holds from $K=e^I$ on", fontsize=SMALL)
    ax.set_title("c  Raw risk, $s=0$ (T2')")


def _raw(ax, arrays):
    ax.set_xscale("log")
    least = (np.exp(arrays["information"]) * arrays["random/B'"])[:, None]
    share = arrays["random/sufficiency"] / arrays["random/risk"]
    ax.plot((arrays["candidates"] / least).ravel(), share.ravel(), **style.series(0) | DOTS)
    at = arrays["enough"] / least[:, 0]
    ax.plot(at, arrays["threshold/sufficiency"] / arrays["threshold/risk"], **style.series(1) | DOTS)
    lost = arrays["flat/sufficiency"]
    fewer = arrays["flat/candidates"][:, 0] / np.exp(lost)
    ax.plot(fewer, lost / arrays["flat/risk"][:, 0], **style.control() | DOTS | {"alpha": 1, "zorder": 5})
    ax.axhline(1, **PREDICTED)
    ax.axvline(1, **PREDICTED)
    ax.set(xlabel="$K/(B'e^I)$", ylabel="$S/R_K$")
    ax.text(1.5, 0.94 * ax.get_ylim()[1], "holds from\n$K=B'e^I$ on", fontsize=SMALL, va="top")
    ax.set_title("d  Raw risk (T2')")


def _identical(ax, arrays):
    ax.set_xscale("log")
    for row, k in enumerate(FLAT):
        ax.plot(GROWING, arrays["growing/symbols"][row], **style.series(row) | {"linestyle": ""}, label=f"$K={k}$")
        ax.plot(GROWING, np.log(GROWING) / np.log(k), **PREDICTED)
    ax.plot(GROWING, arrays["growing/clusters"][0], **style.control(), label="clusters")
    ax.legend(loc="upper left", labelspacing=0.2, handlelength=1.2)
    ax.set_ylim(0, 60)
    ax.set(xlabel="symbols $N$", ylabel="$S\\,/\\,$Excess$_K$")
    ax.set_title("e  No constant: $X=Y$")
