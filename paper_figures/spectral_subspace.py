"""N6, N7: with an orthonormal last layer a contrastive encoder finds the bottom eigenspace of its random features."""

import math

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import NullFormatter

from paper_figures import style

EXPERIMENT = "spectral_subspace"
NAMES = {
    "tanh-2": "tanh",
    "relu-2": "ReLU",
    "tanh-3": "depth 3",
    "tanh-4": "depth 4",
    "tanh-5": "depth 5",
    "tanh-flat-2": "CNN",
    "tanh-flat-3": "CNN, depth 3",
}
DISTANCE = "$\\|\\sin\\Theta(W,U_0)\\|_F$"
# Distances with V fixed lie far below; the axes end where those with V trained do.
LOWEST, HIGHEST = 2e-3, 60.0


def draw(result):
    """Distance against width, time and gap; the drift; deeper encoders; how much further off random subspaces are."""
    arrays, config = result.arrays, result.config
    fig, ((widths, times, drift), (gaps, deep, ratios)) = plt.subplots(2, 3, figsize=(style.DOUBLE, 5.9))
    first, gaussian = config.series[0], next(s for s in config.series if s.data == "gaussian")
    shallow = [s for s in config.series if s.data == "digits" and s.shallow]
    deeper = [s for s in config.series if s.steps and not s.shallow]  # some have V fixed only
    _widths(widths, arrays, config, shallow)
    widths.set_title("a  Wide networks keep $U_0$")
    _times(times, arrays, config, first)
    times.set_title("b  found, then left slowly")
    _drift(drift, arrays, config, first)
    drift.set_title("c  $C$ drifts as $t/M$")
    _gaps(gaps, arrays, config, gaussian)
    gaps.set_title("d  eigengap, Gaussian data")
    if deeper:
        _deeper(deep, arrays, config, deeper)
        deep.set_title("e  beyond two layers")
    else:
        deep.set_axis_off()
    _ratios(ratios, arrays, config)
    ratios.set_title("f  chance is further")
    style.caption(
        fig,
        f"""N6, N7. Distance of the learned span of $W$ from $U_0$, the bottom eigenspace of $C$ at the start: linear
        triplet loss, $W^TW=I$, $z={config.features}$, {config.triplets} triplets of three classes of digits or Gaussian
        vectors (d), $V$ trained too; time $t$ is learning rate × steps. Grey: random subspaces, and above them the
        region in which a bound says nothing. Dashed: Davis-Kahan bound $2\\,\\|C(t)-C(0)\\|_F$ / eigengap; thin: the
        bound with the residual; medians over seeds. a: at $t={first.steps * first.learning_rate:g}$; median eigengaps
        {_range(arrays, first)}{_unit(arrays, config)}. b: the bound is drawn from the time $t_0$ on at which $W$ has
        settled; rings: Grassmann distance, the norm of the angles; dotted, $V$ fixed, median. c: drift since $t_0$;
        line of slope 1. d: width {gaussian.widths[-1]:,}, marks are seeds; crosses: gap closed exactly, at the left
        edge, where $W$ ends at a random angle. e: for the CNN channels × pixels; median eigengaps
        {_range(arrays, *deeper)}. f: median of {config.draws:,} random subspaces over $W$, marks are seeds; dashed: the
        factor {config.factor:g} between claims and controls. Controls, grey: norm in place of orthogonality, width
        {first.widths[0]}, learning rate of $V$ in proportion to $M$, closed gap. Means over {config.seeds} seeds with
        95% intervals.""",
    )
    return fig


def _range(arrays, *several):
    """Smallest and largest median eigengap of some series; none where all have V fixed only."""
    gaps = [np.median(arrays[f"{series.name}/gap"], axis=0) for series in several]
    return f"{min(map(np.min, gaps)):.2g} to {max(map(np.max, gaps)):.2g}" if gaps else "not measured"


def _unit(arrays, config):
    """What the caption says of rows h / |h|, and of the cosine of f."""
    unit = [arrays[f"{series.name}/cosine/fixed"][:, -1, -1] for series in config.series if series.unit]
    if not unit:
        return ""
    return (
        "; $h/|h|$: hidden layers of unit length, whose loss is a quadratic form in $W$ as well. Star: with the cosine "
        f"of $f$, which is none, $V$ fixed; distances {np.min(unit):.2f} to {np.max(unit):.2f} over seeds"
    )


def _name(series):
    return NAMES[series.encoder] + (", $h/|h|$" if series.unit else "")


def _look(config, series):
    """One colour and marker in all panels; a colour that comes again has another marker."""
    index = config.series.index(series)
    again = index // len(style.COLOURS)
    return style.series(index) | {"marker": style.MARKERS[(index + again) % len(style.MARKERS)]}


def _frame(ax, arrays, config):
    """Logarithmic distance with the null, and the region in which a bound says nothing."""
    style.log_axis(ax)
    most = math.sqrt(config.features)
    ax.axhspan(np.min(arrays["null"]), most, color=style.CONTROL, alpha=0.45, linewidth=0, zorder=1)
    ax.axhspan(most, 5 * HIGHEST, color="#F1F1F1", linewidth=0, zorder=0)
    ax.set_ylim(LOWEST, HIGHEST)


def _bounded(ax, arrays, series, widths, look):
    """Distances at the end against the width, with both bounds in the same colour."""
    name, plain = series.name, {"color": look["color"], "marker": ""}
    style.band(ax, widths, arrays[f"{name}/distance"][..., -1], label=_name(series), **look)
    ax.plot(widths, np.median(arrays[f"{name}/limit"][..., -1], axis=0), linestyle=style.DASHES, linewidth=0.9, **plain)
    ax.plot(widths, np.median(arrays[f"{name}/sharp"], axis=0), linewidth=0.6, **plain)


def _widths(ax, arrays, config, shallow):
    _frame(ax, arrays, config)
    for series in shallow:
        _bounded(ax, arrays, series, series.widths, _look(config, series))
    widths = shallow[0].widths
    style.widths_axis(ax, widths[:: -(-len(widths) // 4)], "width $M$")
    norm = np.mean(arrays[f"{shallow[0].name}/norm/distance"][:, :, -1])
    ax.plot([widths[-1]], [norm], **style.control())
    style.note(ax, 1.3 * widths[-1], norm, "norm only", above=False)
    for series in shallow:
        if series.unit:
            # Beside the other control, which lies at the same height.
            cosine = np.mean(arrays[f"{series.name}/cosine/fixed"][:, -1, -1])
            ax.plot([0.7 * series.widths[-1]], [cosine], **style.control(1))
    style.corner(ax, "bounds vacuous")
    ax.set_ylabel(DISTANCE)
    ax.legend(loc="lower left")


def _times(ax, arrays, config, series):
    _frame(ax, arrays, config)
    columns, settled = range(0, len(series.widths), -(-len(series.widths) // 4)), config.snapshots.index(config.settled)
    times = np.median(arrays[f"{series.name}/times"], axis=0)
    for rank, column in enumerate(columns):
        look = {"color": style.shade(rank, len(columns)), "marker": "o", "label": f"{series.widths[column]:,}"}
        style.band(ax, times[column], arrays[f"{series.name}/distance"][:, column], **look)
        bound = np.median(arrays[f"{series.name}/limit"][:, column], axis=0)
        plain = {"color": look["color"], "marker": "", "linestyle": style.DASHES, "linewidth": 0.9}
        ax.plot(times[column, settled:], bound[settled:], **plain)
        angles = np.median(arrays[f"{series.name}/grassmann"][:, column], axis=0)
        rings = {"color": look["color"], "marker": "o", "mfc": "none", "mew": 0.6, "markersize": 6, "linestyle": ""}
        ax.plot(times[column], angles, **rings)
    # At full length of the steps; the last entry is the end of a longer run.
    nominal = series.steps * series.learning_rate * np.array(config.snapshots)
    fixed = np.median(arrays[f"{series.name}/fixed"][:, 0, :-1], axis=0)
    ax.plot(nominal, fixed, **style.control() | {"marker": "", "label": f"{series.widths[0]}, $V$ fixed"})
    ax.set_xlabel("time $t$")
    ax.set_ylim(top=5 * HIGHEST)  # room for the legend
    ax.legend(title="width $M$", loc="upper right", ncols=2, title_fontsize=7, labelspacing=0.2, columnspacing=1)


def _drift(ax, arrays, config, series):
    ax.set_xscale("log")
    style.log_axis(ax)
    settled = config.snapshots.index(config.settled)

    def since(kind):
        times, found = arrays[f"{series.name}{kind}/times"], arrays[f"{series.name}{kind}/since"]
        return np.median(times[..., settled + 1 :] - times[..., settled : settled + 1], axis=0), found

    elapsed, found = since("")
    for column, width in enumerate(series.widths):
        look = {"color": style.shade(column, len(series.widths)), "marker": "o"}
        style.band(ax, elapsed[column] / width, found[:, column], **look)
    x = elapsed[-1] / series.widths[-1]
    style.law(ax, [x[0], elapsed[0, -1] / series.widths[0]], 1.0, style.centre(x, found[:, -1]))
    elapsed, found = since("/fast")
    widths = series.widths[-found.shape[1] :]
    for column, width in enumerate(widths):
        style.band(ax, elapsed[column] / width, found[:, column], **style.control())
    ax.set_ylim(top=4 * np.max(found))
    style.note(ax, elapsed[0, -1] / widths[0], np.max(found), "rate of $V\\propto M$")
    ax.set_xlabel("$(t-t_0)/M$")
    ax.set_ylabel("$\\|C(t)-C(t_0)\\|_F$")


def _gaps(ax, arrays, config, series):
    _frame(ax, arrays, config)
    ax.set_xscale("log")
    turned = f"{series.name}/turned"
    closed = arrays[f"{turned}/distance"][:, -1, -1]

    def open_gaps(measure):  # those of the other panels are the first
        return np.concatenate(
            [arrays[f"{series.name}/{measure}"][:, -1:], arrays[f"{turned}/{measure}"][:, :-1]], axis=1
        )

    gap, limit, distance = open_gaps("gap"), open_gaps("limit")[..., -1], open_gaps("distance")[..., -1]
    ax.plot(gap.ravel(), distance.ravel(), **_look(config, series) | {"linestyle": ""})
    # One line for all seeds: gap times limit is twice the drift.
    ends = np.array([gap.min(), gap.max()])
    ax.plot(ends, np.median(gap * limit) / ends, color=style.THEORY, linestyle=style.DASHES, linewidth=0.9, marker="")
    edge = 0.5 * gap.min()
    ax.plot(np.full(len(closed), edge), closed, **style.control() | {"linestyle": ""})
    style.note(ax, 2 * edge, closed.min(), "closed", above=False)
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.set_xticks([0.003, 0.01, 0.03], ["0.003", "0.01", "0.03"])
    ax.set_xlabel("eigengap $\\lambda_{z+1}-\\lambda_z$")
    ax.set_ylabel(DISTANCE)


def _deeper(ax, arrays, config, deeper):
    _frame(ax, arrays, config)
    sizes = [np.array(series.widths) * series.pixels for series in deeper]
    for series, size in zip(deeper, sizes, strict=True):
        _bounded(ax, arrays, series, size, _look(config, series))
    style.widths_axis(ax, [sizes[0][0], sizes[0][-1], sizes[-1][-1]], "rows of $W$")
    ax.legend(loc="lower left", ncols=2, columnspacing=1)


def _ratios(ax, arrays, config):
    ax.set_xscale("log")

    def row(series, kind="", width=-1):
        return np.median(arrays["null"]) / arrays[f"{series.name}{kind}/distance"][:, width, -1]

    first, gaussian = config.series[0], next(s for s in config.series if s.data == "gaussian")
    rows = [
        (f"{_name(s)}{', Gauss.' if s is gaussian else ''}", _look(config, s), row(s)) for s in config.series if s.steps
    ]
    rows += [
        (f"width {first.widths[0]}", style.control(0), row(first, width=0)),
        ("norm only", style.control(1), row(first, "/norm")),
        ("closed gap", style.control(2), row(gaussian, "/turned")),
    ]
    for height, (_, look, values) in enumerate(rows):
        ax.plot(values, np.full(len(values), height), **look | {"linestyle": ""})
    ax.axvline(config.factor, color=style.THEORY, linestyle=style.DASHES, linewidth=0.9)
    for tick, (_, look, _) in zip(ax.set_yticks(range(len(rows)), [name for name, *_ in rows]), rows, strict=True):
        if look["color"] == style.CONTROL:
            tick.label1.set_color(style.CONTROL)
    ax.set_ylim(len(rows) - 0.5, -0.5)
    ax.tick_params(axis="y", length=0)
    ax.grid(False, axis="y")
    ax.set_xlabel("null / distance of $W$")
