"""N2 and N4: the losses under which the kernel of a wide encoder stays where it was, and the one under which not."""

import matplotlib.pyplot as plt
import numpy as np

from experiments import ntk_constancy
from experiments.ntk_constancy import CONTROL
from paper_figures import style

EXPERIMENT = "ntk_constancy"
ACTIVATIONS = {"relu": "ReLU", "tanh": "tanh"}


# Places in the series of colours and markers: a loss of both kinds looks the same in both.
COSINE = {"cos InfoNCE": 0, "cos logistic": 1, "cos NT-Xent": 2, "cos linear": 3}
DOT = {"dot InfoNCE": 0, "dot logistic": 1, "dot NT-Xent": 2, "dot VICReg": 3, "dot spectral": 4, "dot Barlow Twins": 5}
LOOKS = {name: style.series(place) for name, place in (COSINE | DOT).items()}
# Two-sided InfoNCE: in its colour, for there are more losses than colours, with a marker of its own.
LOOKS |= {f"{kind} CLIP": style.series(0) | {"marker": "<"} for kind in ("cos", "dot")}


def draw(result):
    """One row for each activation: fall with the width and change in time, cosine and dot losses; the exponents."""
    arrays, config = result.arrays, result.config
    rows = len(config.activations)
    size = (style.DOUBLE, 1.4 + 2.5 * rows)
    fig, axes = plt.subplots(rows, 5, figsize=size, width_ratios=(1, 1, 1, 1, 0.8), squeeze=False)
    cosine, dot = [f"cos {name}" for name in config.cosine], [f"dot {name}" for name in config.dot]
    for row, activation in zip(axes, config.activations, strict=True):
        for ax, series in ((row[0], cosine), (row[1], dot)):
            _widths(ax, result, activation, series)
        _times(row[2], result, activation, cosine)
        _dot_times(row[3], result, activation, dot)
        _level(row[:4])
        row[0].set_ylabel(f"{ACTIVATIONS[activation]}: change of the kernel")
        _exponents(row[4], result, activation, cosine + dot)
    titles = ("Cosine", "Dot", "Cosine, time", "Dot, time", "Exponents")
    for letter, ax, title in zip("abcde", axes[0], titles, strict=True):
        ax.set_title(f"{letter}  {title}")
    axes[0, 0].legend(loc="lower left", handlelength=1.6, borderaxespad=0.2)
    for ax in axes[:-1].flat:
        ax.set_xlabel("")
    smallest = min(arrays[f"smallest/{name}/{a}"].min() for name in cosine for a in config.activations)
    style.caption(
        fig,
        f"""N2, N4. Relative change of the empirical kernel in Frobenius norm, dimensionless, on {config.pairs} pairs of
        augmented digits; two layers, {config.features} outputs, gradient descent with learning rate
        {config.learning_rate:g} (VICReg and spectral: slower). Means over {config.seeds} seeds with 95% bands; points
        as named beside e. a, b: cosine losses and dot-product losses bounded below, after {config.steps} steps; dashed,
        the slowest predicted fall, through the first point: measurements should not rise above it. Grey: the control,
        the linear dot-product loss at the time at which descent at the initial kernel has grown to a root mean square
        $|f|={config.growth:g}\\,\\sqrt{{M}}$. c: width {config.long_width:,}; the change should be constant over the
        shaded times, in which it is fitted (not claimed for the linear loss, which still moves); grey: the control,
        InfoNCE of dot products, moves on. d: dot losses at width {_shown(config):,}, each up to its last measured time,
        learning rate × steps (nothing is claimed of their saturation). e: exponents of a and b with 99.9% intervals;
        the strip is what counts as agreement, at most −1/2. Under cosine losses the smallest embedding norm seen was
        {smallest:.2g}.""",
    )
    return fig


def _widths(ax, result, activation, series):
    arrays, widths = result.arrays, result.config.widths
    style.log_axis(ax)
    style.widths_axis(ax, widths[:: -(-len(widths) // 3)], "width $M$ (units)")
    for name in series:
        change = arrays[f"change/{name}/{activation}"][..., -1]
        style.band(ax, widths, change, **LOOKS[name])
        label = "bound $M^{-1/2}$" if name == series[0] else None
        style.law(ax, widths, -0.5, (widths[0], np.exp(np.log(change[:, 0]).mean())), label)
    style.band(ax, widths, arrays[f"change/{CONTROL}/{activation}"][..., -1], **style.control())
    style.corner(ax, "control: linear dot")


def _times(ax, result, activation, series):
    arrays, config = result.arrays, result.config
    steps = arrays["long steps"]
    times = config.learning_rate * steps[steps > 0]
    ax.set_xscale("log")
    style.log_axis(ax)
    window = config.learning_rate * np.array(config.long_steps)
    ax.axvspan(window[0], window[-1], color="#E3E3E3", lw=0, zorder=0)
    late = np.isin(steps, config.long_steps)
    for name in series:
        change = arrays[f"long/{name}/{activation}"]
        style.band(ax, times, change[:, steps > 0], **LOOKS[name])
        style.law(ax, window, 0, style.centre(window, change[:, late]))
    style.band(ax, times, arrays[f"long/dot InfoNCE/{activation}"][:, steps > 0], **style.control(1))
    style.corner(ax, "control:\ndot InfoNCE")
    ax.set_xlabel("time $t$")


def _shown(config):
    """The swept width nearest to that of the long runs."""
    return min(config.widths, key=lambda width: abs(np.log(width / config.long_width)))


def _dot_times(ax, result, activation, series):
    arrays, config = result.arrays, result.config
    steps, column = arrays["steps"], config.widths.index(_shown(config))
    ax.set_xscale("log")
    style.log_axis(ax)
    for name in series:
        times = ntk_constancy.rate_of(config, name) * steps[steps > 0]
        style.band(ax, times, arrays[f"change/{name}/{activation}"][:, column, steps > 0], **LOOKS[name])
    ax.set_xlabel("time $t$")


def _level(axes):
    """One range of changes for the panels of a row, with room for a text on top; labels only on the left."""
    low, high = zip(*(ax.get_ylim() for ax in axes), strict=True)
    for ax in axes:
        ax.set_ylim(min(low), 3 * max(high))
        ax.tick_params(axis="y", labelleft=ax is axes[0], which="both")


def _exponents(ax, result, activation, series):
    claims = [
        f"{'N2' if name.startswith('cos') else 'N4'}.fall.{name[4:]}.{activation}".replace(" ", "-") for name in series
    ]
    claims.append(f"{claims[0]}.control")  # the same measurement is the control of all
    verdicts = [next(v for v in result.verdicts if v.claim == claim) for claim in claims]
    styles = [*(LOOKS[name] for name in series), style.control()]
    style.verdict_marks(ax, verdicts, [*series, CONTROL], "exponent in $M$", styles=styles)
    ax.locator_params(axis="x", nbins=2)  # the panel is narrow
