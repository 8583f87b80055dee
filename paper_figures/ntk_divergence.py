"""N3: under the linear dot-product loss every kernel moves in the end, at a time logarithmic in the width."""

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

from experiments import ntk_divergence
from paper_figures import style
from theorykit import verify

EXPERIMENT = "ntk_divergence"
ACTIVATIONS = {"relu": "ReLU", "tanh": "tanh"}
TIGHT = {"handlelength": 0.8, "handletextpad": 0.5, "labelspacing": 0.2}
POINTS = {"linestyle": "", "markersize": 3.2}
DIVERGES = "relu"  # the activation whose descent becomes unstable, and the one shown run by run


def draw(result):
    """Every run in time, against the grown embedding and against the predicted time; below, laws in the width."""
    arrays, config = result.arrays, result.config
    fig, axes = plt.subplots(2, 3, figsize=(style.DOUBLE, 5.3))
    shown = DIVERGES if DIVERGES in config.activations else config.activations[0]
    _runs(axes[0, 0], config, arrays, shown)
    _collapse(axes[0, 1], config, arrays, shown)
    _times(axes[0, 2], config, arrays, shown)
    _law(axes[1, 0], result)
    _norm(axes[1, 1], result)
    _clock(axes[1, 2], result)
    style.caption(
        fig,
        f"""N3. Gradient descent on the linear dot-product loss from {config.triplets} triplets of two classes of
        digits, one output, two layers, learning rate {config.learning_rate:g}, {config.seeds} seeds. Time is learning
        rate × steps. Top row: {ACTIVATIONS[shown]}, a line or a point for every run. a: relative change of the kernel;
        $t^{{*}}$ is the time at which it passes {config.moved:.0%}. b: the same runs against the size that descent at
        the initial kernel $K_0$ predicts for the embeddings, over $\\sqrt{{M}}$: one curve for all widths and seeds. c:
        $t^{{*}}$ against the time at which that size reaches the curve of b at {config.moved:.0%} (dashed: equal; its
        one constant is fitted); open: descent diverges. d: logarithm of that size at $t^{{*}}$, shifted by one fitted
        constant for each activation; e: largest embedding at $t^{{*}}$; f: $t^{{*}}$, with the law
        $\\ln(M)/2\\rho$ of the mean growth rate $\\rho$ and one fitted height, for ReLU also divergence (open) and the
        lag between them. d to f: means over seeds with 95% bands, predicted laws dashed, slopes with 99.9% intervals.
        In f starts differ, which d takes off; with $2\\rho t^{{*}}+2\\ln|P_u f_0|$ in place of d, $P_u$ the leading
        eigenspace, slopes are {_projected(result)}. {_ends(result)} Controls, grey: fixed targets in place of the
        second view's embeddings (a to d), $|f|$ at $t=0$ (e).""",
    )
    return fig


def _projected(result):
    """Slopes of the projected form, of every activation: a report, whether or not the experiment claims it."""
    found = []
    for activation in result.config.activations:
        _, moved = ntk_divergence.growth_until(result.config, result.arrays, "linear", activation)
        y = ntk_divergence.projected(result.arrays, "linear", activation, moved)
        if np.isfinite(y).all():
            fit = verify.slope_fit(result.config.widths, y, law="logarithmic", level=verify.LEVEL)
            found.append(f"{fit.slope:.2f} [{fit.low:.2f}, {fit.high:.2f}] ({ACTIVATIONS[activation]})")
    return " and ".join(found)


def _ends(result):
    """How many runs diverged by the end, for each activation."""
    last, found = result.arrays["linear/times"][-1], []
    for activation in result.config.activations:
        diverged = result.arrays[f"linear/diverged/{activation}"] <= last
        found.append(f"{diverged.sum()} of {diverged.size} ({ACTIVATIONS[activation]})")
    return f"Runs that have diverged by $t={last:g}$: {', '.join(found)}."


def _runs(ax, config, arrays, activation):
    ax.set_yscale("log")
    times = arrays["linear/times"]
    for index in range(len(config.widths)):
        _lines(ax, arrays["targets/times"], arrays[f"targets/change/{activation}"][:, index], style.CONTROL)
        _lines(ax, times, arrays[f"linear/change/{activation}"][:, index], _shade(config, index))
    _threshold(ax, config)
    ax.set(xlim=(0, times[-1]), xlabel="time $t$", ylabel="change of the kernel")
    style.corner(ax, "control: fixed targets", top=False)
    ax.set_title("a  Every kernel moves …")


def _collapse(ax, config, arrays, activation):
    ax.set_xscale("log")
    ax.set_yscale("log")
    for series in ("targets", "linear"):
        for index, width in enumerate(config.widths):
            size = arrays[f"{series}/linearised/{activation}"][:, index] / np.sqrt(width)
            change = arrays[f"{series}/change/{activation}"][:, index]
            _lines(ax, size, change, style.CONTROL if series == "targets" else _shade(config, index))
    _threshold(ax, config)
    ax.set(xlim=(1e-2, 1e4), xlabel=r"predicted $|f|/\sqrt{M}$")
    ax.tick_params(axis="y", labelleft=False)
    for index, width in enumerate(config.widths):
        ax.plot([], color=_shade(config, index), marker="", label=f"{width:,}")
    ax.legend(
        title="width $M$",
        loc="lower right",
        ncols=1 + len(config.widths) // 5,
        labelspacing=0.2,
        handlelength=1.2,
        title_fontsize=style.FONT_SIZE - 1,
    )
    ax.set_title(r"b  … once $|f|\sim\sqrt{M}$ …")


def _threshold(ax, config):
    """The change that defines t*, and the same range of changes in both panels that show it."""
    ax.axhline(config.moved, color=style.THEORY, linewidth=0.6)
    ax.text(0.02, config.moved, f"{config.moved:.0%}", transform=ax.get_yaxis_transform(), va="bottom", fontsize=7)
    ax.set_ylim(2e-5, 5)


def _times(ax, config, arrays, activation):
    ax.set_xscale("log")
    ax.set_yscale("log")
    constant = None
    for series in ("linear", "targets"):
        y, moved = ntk_divergence.growth_until(config, arrays, series, activation)
        if constant is None:
            constant = np.nanmean(y - np.log(config.widths))
        for index, width in enumerate(config.widths):
            predicted = _time_of(arrays, series, activation, index, (constant + np.log(width)) / 2)
            if series == "targets":
                ax.plot(predicted, moved[:, index], **style.control() | POINTS)
                continue
            ax.plot(predicted, moved[:, index], color=_shade(config, index), marker="o", **POINTS)
            after = arrays[f"linear/diverged/{activation}"][:, index]
            ax.plot(predicted, after, color=_shade(config, index), marker="o", mfc="none", mew=0.7, **POINTS)
    ends = np.array(ax.get_xlim())
    if activation == DIVERGES:
        ax.plot([], color=_shade(config, 1), marker="o", mfc="none", mew=0.7, label="divergence", **POINTS)
    ax.plot([], label="control: fixed targets", **style.control() | POINTS)
    ax.legend(loc="lower right", **TIGHT)
    ax.set_ylim(bottom=ends[0] / 3)
    ax.plot(ends, ends, color=style.THEORY, linestyle=style.DASHES, linewidth=0.9, marker="", zorder=4)
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(ScalarFormatter())
        axis.set_minor_formatter(NullFormatter())
    ax.set_xlabel("predicted $t^{*}$")
    ax.set_ylabel("measured $t^{*}$")
    ax.set_title("c  … at the predicted time")


def _time_of(arrays, series, activation, width, level):
    """Times, (seeds,), at which the logarithm of the linearised descent passes the level."""
    sizes = np.maximum.accumulate(np.log(arrays[f"{series}/linearised/{activation}"][:, width]), axis=-1)
    return np.array([np.interp(level, size, arrays[f"{series}/times"]) for size in sizes])


def _law(ax, result):
    config, arrays = result.config, result.arrays
    style.widths_axis(ax, config.widths, "width $M$")
    law = np.log(np.array(config.widths) / config.widths[0])
    for index, activation in enumerate(config.activations):
        claim, _ = _verdicts(result, f"N3.time.{activation}")
        y, _ = ntk_divergence.growth_until(config, arrays, "linear", activation)
        style.band(ax, config.widths, y - np.nanmean(y - law), linestyle="", **_look(index), label=_slope(claim))
        targets, _ = ntk_divergence.growth_until(config, arrays, "targets", activation)
        style.band(ax, config.widths, targets - np.nanmean(targets[:, 0]), **style.control(index))
    _dashed(ax, config.widths, law)
    ax.set_ylim(-0.75 * law[-1], 1.75 * law[-1])
    style.corner(ax, "control: fixed targets ↑")
    ax.set_ylabel(r"$2\,\ln|f|$ predicted at $t^{*}$")
    ax.legend(loc="lower right", **TIGHT)
    ax.set_title(r"d  So $t^{*}$ grows as $\ln M$")


def _norm(ax, result):
    config, arrays = result.config, result.arrays
    style.log_axis(ax)
    style.widths_axis(ax, config.widths, "width $M$")
    for index, activation in enumerate(config.activations):
        largest = arrays[f"linear/largest/{activation}"]
        _, moved = ntk_divergence.growth_until(config, arrays, "linear", activation)
        reached = ntk_divergence.largest_at(arrays, activation, moved)
        claim, _ = _verdicts(result, f"N3.norm.{activation}")
        style.band(ax, config.widths, reached, linestyle="", **_look(index), label=_slope(claim))
        style.law(ax, config.widths, 0.5, style.centre(config.widths, reached))
        style.band(ax, config.widths, largest[..., 0], **style.control(index))
    ax.set_ylabel(r"largest $|f|$")
    style.note(ax, config.widths[-1], largest[:, -1, 0].mean() * 1.2, "control: $t=0$")
    ax.legend(loc="center right", **TIGHT)
    ax.set_title(r"e  and $|f|$ at $t^{*}$ as $\sqrt{M}$")


def _clock(ax, result):
    """t* itself and the time of divergence against the width; the lag between them."""
    config, arrays = result.config, result.arrays
    style.widths_axis(ax, config.widths, "width $M$")
    logs = np.log(np.array(config.widths)) - np.mean(np.log(config.widths))
    for index, activation in enumerate(config.activations):
        _, moved = ntk_divergence.growth_until(config, arrays, "linear", activation)
        rates, diverged = (arrays[f"linear/{name}/{activation}"] for name in ("rate", "diverged"))
        label = "$t^{*}$" if len(config.activations) == 1 else f"$t^{{*}}$, {ACTIVATIONS[activation]}"
        style.band(ax, config.widths, moved, linestyle="", **_look(index), label=label)
        _dashed(ax, config.widths, moved.mean() + np.mean(1 / (2 * rates)) * logs)
        if activation != DIVERGES:
            continue
        style.band(ax, config.widths, diverged, linestyle="", **_look(index) | {"mfc": "none", "mew": 0.7})
        _dashed(ax, config.widths, diverged.mean() + np.mean(1 / (2 * rates)) * logs)
        lag, (claim, _) = diverged - moved, _verdicts(result, f"N3.lag.{DIVERGES}")
        style.band(ax, config.widths, lag, **_look(index) | {"marker": "", "linestyle": "-"})
        _dashed(ax, config.widths, lag.mean() + 0 * logs)
        style.note(ax, config.widths[-1], diverged[:, -1].mean() + 1.5, "divergence", color=_look(index)["color"])
        note = f"lag, slope × $2\\rho$: {_slope(claim, name=False)}"
        style.note(ax, config.widths[-1], lag[:, -1].mean(), note, color=_look(index)["color"], above=False)
    ax.set_ylim(0, 1.35 * ax.get_ylim()[1])
    ax.set_ylabel("time $t$")
    ax.legend(loc="upper left", **TIGHT)
    ax.set_title("f  $t^{*}$ itself, divergence")


def _dashed(ax, widths, law):
    ax.plot(widths, law, color=style.THEORY, linestyle=style.DASHES, linewidth=0.9, marker="", zorder=4)


def _verdicts(result, name):
    return [v for v in result.verdicts if name in (v.claim, v.control_of)]


def _slope(verdict, name=True):
    slope = f"{verdict.measured:.2f} ± {(verdict.high - verdict.low) / 2:.2f}".replace("-", "−")
    return f"{ACTIVATIONS[verdict.claim.rsplit('.', 1)[1]]}: slope {slope}" if name else slope


def _look(index):
    """Look of an activation: the colours of the widths' shades are left out."""
    return style.series(index + 1)


def _shade(config, index):
    return style.shade(index, len(config.widths))


def _lines(ax, x, samples, color):
    """One thin line for every run, from the first step on; x (points,) or one row per run."""
    for one_x, one in zip(np.broadcast_to(x, samples.shape), samples, strict=True):
        ax.plot(one_x[1:], one[1:], color=color, linewidth=0.5, alpha=0.8, marker="")
