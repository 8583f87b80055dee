"""N8: a finite network beats its tangent kernel where features are needed, and only there, because its kernel moves."""

import matplotlib.pyplot as plt
import numpy as np

from paper_figures import style

EXPERIMENT = "ntk_features"
SERIES = {
    "infinite": ("infinite NTK", style.series(1) | {"linestyle": ""}),
    "initial": ("NTK at initialisation", style.series(4)),
    "lazy": ("control: lazy network", style.control(0)),
    "after-net": ("NTK after training", style.series(2)),
    "net": ("network", style.series(0)),
}
PREDICTED = {"color": style.THEORY, "linestyle": style.DASHES, "linewidth": 0.9, "marker": "", "zorder": 4}
REACH, BEYOND = "#EEEEEE", "out of reach of kernels"
SHARE = 0.5  # of the samples that a kernel needs, where panels c and d are measured
POWERS = {-0.75: "M^{-3/4}", -0.5: "M^{-1/2}", -0.25: "M^{-1/4}", 0.0: "1", 0.25: "M^{1/4}", 0.5: "M^{1/2}"}


def draw(result):
    """Learning curves on both targets; at half a kernel's samples, the error against the kernel's movement and d."""
    arrays, config = result.arrays, result.config
    fig, ((feature, linear), (scale, growth)) = plt.subplots(2, 2, figsize=(style.DOUBLE, 6.2), height_ratios=(1.25, 1))
    linear.sharey(feature)
    for ax, target in ((feature, "feature"), (linear, "linear")):
        _curves(ax, arrays, target)
    feature.legend(loc="lower left")
    feature.set_ylim(0.02, 1.3)
    feature.set_title("a  Feature target: the network needs fewer samples")
    linear.text(0.03, 0.03, BEYOND, fontsize=7, transform=linear.transAxes)
    linear.set_title("b  control, linear target: no such gain")
    _movement(scale, arrays, config)
    if config.dimensions:
        _growth(growth, arrays, config)
    else:
        growth.set_axis_off()
    half = round(SHARE * arrays["needed/feature"])
    style.caption(
        fig,
        f"""N8. Test error in units of the target's variance. Inputs uniform on the sphere in $d={config.dimension}$
        dimensions; targets quadratic (a, c, d) or linear (b) in one hidden direction, with $N=d(d+1)/2-1$ or $N=d$
        independent functions of that degree; label noise of standard deviation {config.noise:g}. Two-layer ReLU
        networks of width $M={config.width}$ and output scale $\\alpha$: the network has $\\alpha=M^{{-1/2}}$, the
        lazy one $M^{{1/2}}$. One validation set chooses stopping times and ridges. Grey: errors below $1-n/N$,
        which no kernel fixed before training reaches on average. Dashed: predictions; for the infinite NTK from its
        spectrum, nothing fitted; in d for the network the slope $-1$, height fitted. c: $n=N/2={half}$, dots are seeds;
        d: $n=N/2$. Means over {config.seeds} seeds with 95% intervals.""",
    )
    return fig


def _curves(ax, arrays, target):
    """Every method against n, with the bound for kernels."""
    style.log_axis(ax)
    n, needed = arrays[f"n/{target}"], arrays[f"needed/{target}"]
    style.widths_axis(ax, n, "training samples $n$")
    for name, (label, look) in SERIES.items():
        style.band(ax, n, arrays[f"error/{name}/{target}"], label=label, **look)
    ax.plot(
        arrays[f"predicted/n/{target}"],
        arrays[f"predicted/{target}"],
        **PREDICTED,
        label="infinite NTK, predicted",
    )
    grid = needed * np.linspace(0, 1, 400)[:-1]
    ax.fill_between(grid, 0, 1 - grid / needed, color=REACH, linewidth=0, zorder=0)
    ax.axvline(needed, color=style.THEORY, linewidth=0.7, marker="", zorder=1)
    ax.annotate(
        f"$N={needed}$",
        (needed, 0.02),
        (3, 0),
        xycoords=("data", "axes fraction"),
        textcoords="offset points",
        rotation=90,
        ha="left",
        va="bottom",
        fontsize=7,
    )
    ax.set_ylabel("test error")
    ax.set_xlim(0.85 * n[0], 1.15 * max(n[-1], needed))


def _movement(ax, arrays, config):
    """Test error against the relative change of the kernel, one group of points for each output scale."""
    change, error = arrays["scale/change"], arrays["scale/error"]
    ax.set_xscale("log")
    for column, exponent in enumerate(config.exponents):
        other = {"color": style.COLOURS[5], "marker": "o"}
        look = {-0.5: style.series(0), 0.5: style.control(0)}.get(exponent, other) | {"linestyle": ""}
        x, y = change[:, column], error[:, column]
        ax.plot(x, y, **look | {"marker": ".", "markersize": 3, "alpha": 0.5})
        ax.plot([x.mean()], [y.mean()], **look | {"markersize": 6, "markeredgewidth": 0.5, "mec": "w"})
        name = rf"$\alpha={POWERS[exponent]}$" if exponent == max(config.exponents) else f"${POWERS[exponent]}$"
        place = (x.mean(), 0.03)
        ax.text(*place, name, fontsize=7, ha="center", color="k" if look["color"] == other["color"] else look["color"])
    kernel = arrays["error/infinite/feature"][:, config.shares["feature"].index(SHARE)]
    ax.axhline(kernel.mean(), color=SERIES["infinite"][1]["color"], linewidth=1.3, marker="")
    ax.text(
        0.99,
        kernel.mean() + 0.01,
        "infinite NTK",
        color=SERIES["infinite"][1]["color"],
        fontsize=7,
        ha="right",
        va="bottom",
        transform=ax.get_yaxis_transform(),
    )
    ax.axhspan(0, 1 - SHARE, color=REACH, linewidth=0, zorder=0)
    ax.text(
        0.01,
        1 - SHARE - 0.01,
        BEYOND,
        fontsize=7,
        ha="left",
        va="top",
        transform=ax.get_yaxis_transform(),
    )
    ax.set_ylim(0, 1.1)
    ax.set_xlabel("relative change of the kernel")
    ax.set_ylabel("test error")
    ax.set_title("c  The more the kernel moves, the larger the gain")


def _growth(ax, arrays, config):
    """Test error at half the samples that a kernel needs, against the dimension."""
    style.log_axis(ax)
    style.widths_axis(ax, config.dimensions, "dimension $d$")
    for name in ("infinite", "net"):
        label, look = SERIES[name]
        style.band(ax, config.dimensions, arrays[f"growth/{name}"], label=label, **look | {"linestyle": ""})
    ax.plot(config.dimensions, arrays["growth/predicted"], **PREDICTED)
    style.law(ax, config.dimensions, -1.0, style.centre(config.dimensions, arrays["growth/net"]))
    ax.legend(loc="lower left")
    ax.set_ylabel("test error at $n=N/2$")
    ax.set_title("d  and the larger the dimension")
