"""S5 and S2: linear encoders learn one mode at a time, at predicted times, and lose those that augmentation drowns."""

import matplotlib.pyplot as plt
import numpy as np

from experiments import spectral_dynamics
from paper_figures import style

EXPERIMENT = "spectral_dynamics"
TITLES = {"synthetic": "a  Prescribed spectrum", "digits": "b  Digits", "kernel": "c  ReLU kernel"}
PREDICTED = {"color": style.THEORY, "linestyle": style.DASHES, "linewidth": 0.9, "marker": "", "zorder": 4}
STARTS = {"linestyle": "", "markersize": 3.2}
IDENTITIES = {
    "S5.form": "modes, closed form",
    "S5.kernel": "kernel form",
    "S2.drift": "gradient is $-WX$",
    "S2.frozen": "$W_0e^{Xt}$",
    "S2.conserved": "layers conserve",
    "S2.modes": "aligned layers",
}


def draw(result):
    """Curves of the modes for three kinds of data; their learning times; collapse; the identities."""
    arrays, config = result.arrays, result.config
    fig, axes = plt.subplots(2, 3, figsize=(style.DOUBLE, 5.0))
    for ax, name in zip(axes[0], spectral_dynamics.SETS, strict=True):
        _curves(ax, arrays, name)
    axes[0, 0].set_ylabel("eigenvalues of $C$")
    _times(axes[1, 0], config, arrays)
    _collapse(axes[1, 1], config, arrays)
    _identities(axes[1, 2], result)
    style.caption(
        fig,
        f"""S5 and S2. a to c: eigenvalues of $C=WGW^T$ while $\\|C-I\\|_F^2$ is minimised by gradient descent from
        {config.seeds} starts of size {config.synthetic_start:g} (a) and {config.start:g} (b, c); one start with
        markers, the others as thin lines; dashed: predicted, nothing fitted. Time is learning rate × steps, learning
        rate {config.learning_rate:g}, $g_1=1$. b, c: {config.pairs} pairs of digits, {config.outputs} outputs; c
        is predicted from the kernel alone. d: errors of the learning times of every mode and start; the strip ends at
        {config.times_margin:.0%}; grey: a start of size {config.large:g}, and eigenvalues 1% apart. e:
        singular values of a linear encoder trained on InfoNCE; two directions have augmentations of {config.strong:g}
        standard deviations of the data; means over seeds with 95% bands; dashed: with $X$ frozen at the start; grey,
        control: augmentations of {config.mild:g}. f: relative errors of the identities; a control breaks one assumption
        of each: alignment, the pairs of views, the softmax weights, a frozen $X$, no weight decay, alignment.""",
    )
    return fig


def _curves(ax, arrays, name):
    times, curves = arrays[f"times/{name}"], arrays[f"curves/{name}"]
    for mode in range(curves.shape[2]):
        look = style.series(mode)
        ax.plot(times, curves[1:, :, mode].T, color=look["color"], linewidth=0.4, alpha=0.5, marker="")
        ax.plot(times, curves[0, :, mode], markevery=8, label=f"${arrays[f'eigenvalues/{name}'][mode]:.2g}$", **look)
        ax.plot(times, arrays[f"predicted_curves/{name}"][0, :, mode], **PREDICTED)
    ax.legend(title="$g_j$", loc="lower right", title_fontsize=style.FONT_SIZE - 1, labelspacing=0.2, handlelength=1.2)
    ax.set_xlabel("time $t$")
    ax.set_title(TITLES[name])


def _times(ax, config, arrays):
    ax.set_xscale("log")
    ax.set_yscale("log")
    for label, look in (("synthetic.large", 0), ("digits.large", 0), ("kernel.large", 0), ("unseparated", 1)):
        name = {"synthetic.large": f"start {config.large:g}", "unseparated": "1% apart"}.get(label)
        x, y = arrays[f"predicted_tau/{label}"], arrays[f"tau/{label}"]
        ax.plot(x.ravel(), _off(x, y), label=name, **style.control(look) | STARTS)
    for index, name in enumerate(spectral_dynamics.SETS):
        x, y = arrays[f"predicted_tau/{name}"], arrays[f"tau/{name}"]
        ax.plot(x.ravel(), _off(x, y), label=name, **style.series(index) | STARTS)
    ax.axhspan(1e-6, config.times_margin, color="#E3E3E3", lw=0, zorder=0)
    ax.legend(loc="lower left", labelspacing=0.2, handletextpad=0.2, handlelength=1, ncols=1)
    ax.set(ylim=(1e-6, 2), xlabel=r"predicted $\tau_j$", ylabel=r"$|$measured / predicted $-1|$")
    ax.set_title("d  Learning times")


def _off(predicted, measured):
    return np.abs(measured / predicted - 1).ravel()


def _collapse(ax, config, arrays):
    ax.set_xscale("log")
    style.log_axis(ax)
    times, inputs = arrays["collapse/times"], config.inputs
    for mode in range(inputs):
        lost = mode >= inputs - 2
        style.band(ax, times, arrays["collapse/singular/strong"][..., mode], **style.series(lost) | {"marker": ""})
        if lost:
            style.band(ax, times, arrays["collapse/singular/mild"][..., mode], **style.control() | {"marker": ""})
            frozen = arrays["collapse/frozen/strong"]
            seen = np.all(
                frozen[..., mode] > 1e-12 * frozen[..., 0], axis=0
            )  # below that, a singular value is rounding
            ax.plot(times[seen], np.exp(np.log(frozen[:, seen, mode]).mean(axis=0)), **PREDICTED)
    ax.set(ylim=(1e-4, 10), xlabel="time $t$", ylabel="singular values of $W$")
    ax.text(0.03, 0.03, "strong:\n2 of 6 vanish", transform=ax.transAxes, color=style.COLOURS[1], fontsize=7)
    ax.text(0.03, 0.97, "control: weaker", transform=ax.transAxes, color=style.CONTROL, fontsize=7, va="top")
    ax.set_title("e  Collapse")


def _identities(ax, result):
    ax.set_xscale("log")
    found = {verdict.claim: verdict.measured for verdict in result.verdicts}
    for row, name in enumerate(IDENTITIES):
        ax.plot(found[name], row, **style.series(0) | {"markersize": 4.5})
        ax.plot(found[f"{name}.control"], row, **style.control() | {"markersize": 4.5})
    low = min(found[name] for name in IDENTITIES) / 10
    ax.axvspan(low, result.config.identity, color="#E3E3E3", lw=0, zorder=0)
    ax.set_yticks(range(len(IDENTITIES)), IDENTITIES.values())
    ax.set(xlim=(low, 10), ylim=(len(IDENTITIES) - 0.5, -0.5), xlabel="relative error")
    ax.tick_params(axis="y", length=0)
    ax.set_title("f  Identities")
    style.corner(ax, "controls")
