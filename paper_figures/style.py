"""One look for all figures, and the marks that they share.

The colours are those of Okabe and Ito, which stay apart for all common forms of colour blindness. Measurements have
colours and bands, predicted laws are black dashed lines, controls are grey and dotted. Every random part of
Matplotlib's output is fixed, so that the same results give the same bytes.

Source of the colours: Okabe, Ito 2008, Color Universal Design.
"""

from collections.abc import Sequence

import matplotlib as mpl
import numpy as np
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.textpath import TextPath
from matplotlib.ticker import LogFormatterSciNotation, MaxNLocator, NullFormatter

from theorykit import verify

# Inches: the column and the text width of a two-column page of letter size with one-inch margins.
SINGLE, DOUBLE = 3.25, 6.75
# Blue, vermilion, green, purple, orange, sky blue. Yellow is left out, too pale on white, and black is the theory's.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "D", "^", "v", "P")
CONTROL_MARKERS = ("X", "*", "p")
THEORY, CONTROL = "#000000", "#6E6E6E"
DASHES = (0, (4, 2))  # of every predicted law
# Figures show 95% intervals; the gate of the verdicts uses its own level.
LEVEL = 0.95
FONT_SIZE = 8.0
MARGIN = 0.02  # beside captions, in units of the figure's width


def use() -> None:
    """Set Matplotlib's parameters for all figures drawn from now on."""
    mpl.rcdefaults()
    mpl.rcParams.update(
        {
            "figure.figsize": (DOUBLE, 3.0),
            "figure.constrained_layout.use": True,
            "savefig.dpi": 250,
            # Fonts that Matplotlib ships: the same on every machine.
            "font.family": "sans-serif",
            "font.sans-serif": ["DejaVu Sans"],
            "mathtext.fontset": "dejavusans",
            "font.size": FONT_SIZE,
            "axes.titlesize": FONT_SIZE + 1,
            "axes.titlelocation": "left",
            "axes.labelsize": FONT_SIZE,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.linewidth": 0.6,
            "axes.prop_cycle": cycler(color=COLOURS, marker=MARKERS),
            "axes.axisbelow": True,
            "axes.grid": True,
            "grid.color": "#E6E6E6",
            "grid.linewidth": 0.5,
            "xtick.labelsize": FONT_SIZE - 1,
            "ytick.labelsize": FONT_SIZE - 1,
            "xtick.minor.size": 0,
            "ytick.minor.size": 0,
            "lines.linewidth": 1.3,
            "lines.markersize": 3.5,
            "lines.markeredgewidth": 0.0,
            "legend.fontsize": FONT_SIZE - 1,
            "legend.frameon": False,
            "legend.handlelength": 2.4,
            # Text stays text, and identifiers are not drawn at random.
            "pdf.fonttype": 42,
            "svg.fonttype": "none",
            "svg.hashsalt": "theorykit",
        }
    )


def series(index: int) -> dict[str, object]:
    """Colour and marker of the series of this number, for `band` and `verdict_marks`."""
    return {"color": COLOURS[index % len(COLOURS)], "marker": MARKERS[index % len(MARKERS)]}


def shade(index: int, count: int) -> tuple[float, ...]:
    """Colour of number `index` of `count` ordered series, such as widths: from light and green to dark and violet."""
    # The light end of viridis is too pale on white.
    return mpl.colormaps["viridis"](0.8 * (1 - index / max(count - 1, 1)))


def control(index: int = 0) -> dict[str, object]:
    """Look of the control series of this number: grey, dotted, with markers of its own."""
    return {"color": CONTROL, "marker": CONTROL_MARKERS[index % len(CONTROL_MARKERS)], "linestyle": ":"}


def band(ax: Axes, x: Sequence[float], samples: np.ndarray, **options) -> None:
    """Mean over seeds as a line with its 95% interval as a band; every seed as a faint line where there are few.

    On a logarithmic axis the mean is the geometric one and the interval that of the logarithm, which is what a fitted
    slope sees.

    Parameters
    ----------
    ax
        Set its scales before, since they decide which mean is drawn.
    x
        (points,), one abscissa per column.
    samples
        (seeds, points), one row per seed; points where not all seeds are finite are left out.
    **options
        For the line, such as ``label`` and ``**series(0)`` or ``**control()``.
    """
    x, samples = np.asarray(x, float), np.asarray(samples, float)
    logarithmic = ax.get_yscale() == "log"
    drawable = np.all(np.isfinite(samples) & ((samples > 0) | (not logarithmic)), axis=0)
    if not drawable.any():  # its verdict, which is then inconclusive, is what shows it
        return
    x, samples = x[drawable], samples[:, drawable]
    if len(samples) == 1:  # as at the preset smoke of some experiments: no interval
        ax.plot(x, samples[0], zorder=3, **options)
        return
    values = np.log(samples) if logarithmic else samples
    mean, low, high = verify.interval(values, LEVEL)
    back = np.exp if logarithmic else np.asarray
    (line,) = ax.plot(x, back(mean), zorder=3, **options)
    ax.fill_between(x, back(low), back(high), color=line.get_color(), alpha=0.22, linewidth=0, zorder=2)
    if len(samples) <= 8:  # more lines than that are a second, blurred band
        ax.plot(x, samples.T, color=line.get_color(), linewidth=0.4, alpha=0.5, marker="", zorder=2)


def law(ax: Axes, x: Sequence[float], exponent: float, anchor: tuple[float, float], label: str | None = None) -> None:
    """Predicted power law y = y_0 (x / x_0)^exponent as a dashed line over the range of x.

    Parameters
    ----------
    anchor
        (x_0, y_0), a point that the line goes through. Only the exponent is predicted.
    label
        Entry of the legend; none by default, for the second and further lines of one law.
    """
    x = np.array([np.min(x), np.max(x)], float)
    y = anchor[1] * (x / anchor[0]) ** exponent
    ax.plot(x, y, color=THEORY, linestyle=DASHES, linewidth=0.9, marker="", label=label, zorder=4)


def centre(x: Sequence[float], samples: np.ndarray) -> tuple[float, float]:
    """Anchor of a `law` fitted in height only: the geometric means of x, (points,), and samples, (seeds, points)."""
    return float(np.exp(np.mean(np.log(x)))), float(np.exp(np.mean(np.log(samples))))


def widths_axis(ax: Axes, widths: Sequence[float], label: str) -> None:
    """Logarithmic horizontal axis with the measured widths, powers of two or four, as its ticks."""
    widths = np.unique(np.asarray(widths))
    ax.set_xscale("log", base=2)
    # At most eight labels fit into a panel.
    shown = widths[:: -(-len(widths) // 8)]
    ax.set_xticks(shown, [f"{width:,}" for width in shown])
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.set_xlabel(label)


def log_axis(ax: Axes) -> None:
    """Logarithmic vertical axis, with labels between the decades where it spans less than one and a half of them."""
    ax.set_yscale("log")
    ax.yaxis.set_minor_formatter(LogFormatterSciNotation(minor_thresholds=(1.5, 0.5)))


def verdict_marks(
    ax: Axes, verdicts: Sequence[verify.Verdict], names: Sequence[str], label: str, *, styles: Sequence[dict]
) -> None:
    """Every verdict as a point with the interval of the gate; the accepted range of the claims as a shaded strip.

    Claims should lie inside the strip, controls outside. A verdict that is not as expected gets a red ring. In the
    colours and markers of another panel's series, the names serve as that panel's legend.

    Parameters
    ----------
    verdicts
        Of one prediction, margin and side, from top to bottom.
    names
        What to write beside each of them.
    label
        Of the horizontal axis: the measured quantity.
    styles
        Colour and marker of each of them, from `series` and `control`.
    """
    first = verdicts[0]
    side = first.details["side"]
    for row, (v, look) in enumerate(zip(verdicts, styles, strict=True)):
        ax.plot([v.low, v.high], [row, row], color=look["color"], linewidth=1.6, marker="", solid_capstyle="butt")
        ax.plot([v.measured], [row], color=look["color"], marker=look["marker"], markersize=4.5, linestyle="")
        if not v.as_expected:  # data that are not finite have no measured value: an empty ring on the prediction
            at = v.measured if np.isfinite(v.measured) else v.predicted
            ax.plot([at], [row], marker="o", markersize=10, mfc="none", mec="#CC0000", mew=1.2, linestyle="")
    left, right = ax.get_xlim()
    low = left if side == "at_most" else first.predicted - first.margin
    high = right if side == "at_least" else first.predicted + first.margin
    # The strip is always seen whole, with as much room again beside it.
    left, right = min(left, low - (high - low) / 2), max(right, high + (high - low) / 2)
    ax.axvspan(
        left if side == "at_most" else low, right if side == "at_least" else high, color="#E3E3E3", lw=0, zorder=0
    )
    ax.axvline(first.predicted, color=THEORY, linestyle=DASHES, linewidth=0.9, zorder=1)
    ax.set_xlim(left, right)
    for tick, look in zip(ax.set_yticks(range(len(verdicts)), names), styles, strict=True):
        if look["color"] == CONTROL:
            tick.label1.set_color(CONTROL)
    ax.set_ylim(len(verdicts) - 0.5, -0.5)
    ax.tick_params(axis="y", length=0)
    ax.grid(False, axis="y")
    ax.spines["left"].set_visible(False)
    ax.xaxis.set_major_locator(MaxNLocator(nbins=4))
    ax.set_xlabel(label)


def note(ax: Axes, x: float, y: float, text: str, *, color: str = CONTROL, above: bool = True) -> None:
    """Write a series' name beside its end, at (x, y) in the data's coordinates, right-aligned."""
    offset = (0, 4) if above else (0, -4)
    place = "bottom" if above else "top"
    ax.annotate(
        text, (x, y), offset, textcoords="offset points", ha="right", va=place, color=color, fontsize=FONT_SIZE - 1
    )


def corner(ax: Axes, text: str, *, top: bool = True) -> None:
    """Write what the grey series are into a corner on the right, above or below all series."""
    y, place = (0.99, "top") if top else (0.02, "bottom")
    ax.text(0.99, y, text, transform=ax.transAxes, ha="right", va=place, color=CONTROL, fontsize=FONT_SIZE - 1)


def caption(fig: Figure, text: str) -> None:
    """Write the caption below the panels, broken to the figure's width, and keep it for the report.

    Parameters
    ----------
    text
        What is shown, sample sizes, units, what the band is; no space inside $...$.
    """
    size = FONT_SIZE - 1
    lines, full = [""], 72 * fig.get_figwidth() * (1 - 2 * MARGIN)
    for word in text.split():
        longer = f"{lines[-1]} {word}".lstrip()
        if TextPath((0, 0), longer, size=size).get_extents().width > full:
            lines.append(word)
        else:
            lines[-1] = longer
    # A super-label, because the layout makes room for it.
    fig.supxlabel("\n".join(lines), x=MARGIN, ha="left", fontsize=size, color="#333333", linespacing=1.35)
    fig.set_label(" ".join(text.split()))
