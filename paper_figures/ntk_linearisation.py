"""N5: the gradient flow with the kernel at initialisation predicts the embeddings of the trained network."""

import matplotlib.pyplot as plt
import numpy as np

from paper_figures import style
from theorykit.ntk.gradient_flow import FINISHED

EXPERIMENT = "ntk_linearisation"
CLAIM, CONTROL = "cosine InfoNCE", "linear dot"
ACTIVATIONS = {"relu": "ReLU", "tanh": "tanh"}
PARTS = ("training", "held-out")
FLOOR = {"color": style.COLOURS[5], "marker": ""}
FLOOR_TEXT = "#2F6F94"  # that colour, dark enough for letters


def draw(result):
    """One row for each activation: the gap against the width, the gap in time where measured, the exponents."""
    config = result.config
    in_time = len(config.times) > 1
    rows = len(config.activations)
    ratios = (1.25, 1, 0.8) if in_time else (1.25, 0.8)
    size = (style.DOUBLE, 1.5 + 2.2 * rows)
    fig, axes = plt.subplots(rows, len(ratios), figsize=size, width_ratios=ratios, squeeze=False)
    for row, activation in zip(axes, config.activations, strict=True):
        _widths(row[0], result, activation)
        if in_time:
            row[1].sharey(row[0])
            _times(row[1], result, activation)
        row[0].set_ylim(top=5 * row[0].get_ylim()[1])  # room for a text
        _exponents(row[-1], result, activation)
    last = "c" if in_time else "b"
    titles = ("The flow predicts wide networks", *("at every time",) * in_time, "fitted exponents")
    for letter, ax, title in zip("abc", axes[0], titles, strict=False):
        ax.set_title(f"{letter}  {title}")
    for ax in axes[:-1].flat:
        ax.set_xlabel("")
    later = "b: training points at all measured times; light blue, the floor of the widest. " * in_time
    style.caption(
        fig,
        f"""N5. Relative distance in Frobenius norm, dimensionless, between the embeddings of trained networks and the
        gradient flow in function space with the kernel at initialisation: {config.pairs} training and {config.heldout}
        held-out pairs of augmented digits, two layers, {config.features} outputs, cosine InfoNCE. Time is learning rate
        × steps. a: at time {config.times[-1]:g}; means over {config.seeds} seeds with 95% bands, points as named beside
        {last}. Dashed: the slowest predicted fall, through the first point; measurements should not rise above it.
        Floor: what finite steps alone contribute, after extrapolation from steps of {config.learning_rate:g} and
        {config.learning_rate / 2:g}; it should lie below a quarter of the gap. {later}{last}: fitted exponents with
        99.9% intervals; the strip is what counts as agreement, at most −1/2. Controls, grey: the linear dot-product
        loss, at the time at which descent at the initial kernel has grown to a root mean square
        $|f|={config.growth:g}\\,\\sqrt{{M}}$, {_ends(result)}, and the floor without extrapolation.
        {_solved(result)}""",
    )
    return fig


def _of_every_flow(result, name):
    """All values of one array per flow, over series, activations, seeds and widths."""
    return np.concatenate([values.ravel() for key, values in result.arrays.items() if key.startswith(name)])


def _ends(result):
    ends = np.concatenate([result.arrays[f"end/{CONTROL}/{activation}"] for activation in result.config.activations])
    return f"at $t={ends.min():.0f}$ to {ends.max():.0f}"


def _solved(result):
    """How the flows were solved: all finished or how many did not, at which tolerance, in how many steps."""
    status, rtol, atol, steps = (_of_every_flow(result, f"solver/{n}/") for n in ("status", "rtol", "atol", "accepted"))
    finished = "All flows" if (status == FINISHED).all() else f"{(status == FINISHED).sum()} of {status.size} flows"
    return (
        f"{finished} were solved to the end with relative tolerance {rtol.max():.2g} and absolute tolerance at most "
        f"{atol.max():.2g} in every step, in {steps.min():.0f} to {steps.max():.0f} steps."
    )


def _widths(ax, result, activation):
    arrays, widths = result.arrays, result.arrays["widths"]
    style.log_axis(ax)
    style.widths_axis(ax, widths, "width $M$ (hidden units)")
    for index, part in enumerate(PARTS):
        style.band(ax, widths, arrays[f"gap/{part}/{CLAIM}/{activation}"][..., -1], **style.series(index))
        controlled = arrays[f"gap/{part}/{CONTROL}/{activation}"][..., -1]
        style.band(ax, widths, controlled, **_control(index))
    first = _mean(arrays[f"gap/training/{CLAIM}/{activation}"][:, 0, -1])
    style.law(ax, widths, -0.5, (widths[0], first))
    style.note(ax, widths[-1], first, "bound $M^{-1/2}$", color=style.THEORY)
    plain = arrays[f"plain/training/{CLAIM}/{activation}"][..., -1]
    style.band(ax, widths, plain, color=style.CONTROL, linestyle=":", marker="")
    style.note(ax, widths[1], np.quantile(plain[:, 1], 0.1), "not extrapolated", above=False)
    floor = arrays[f"floor/training/{CLAIM}/{activation}"][..., -1]
    style.band(ax, widths, floor, **FLOOR)
    style.note(ax, widths[-1], _mean(floor[:, -1]), "floor: finite steps", color=FLOOR_TEXT)
    style.corner(ax, "control: linear dot-product loss")
    ax.set_ylabel(f"{ACTIVATIONS[activation]}: relative gap")


def _times(ax, result, activation):
    arrays, config = result.arrays, result.config
    ax.set_xscale("log")
    style.log_axis(ax)
    for index in range(len(config.widths)):
        gap = arrays[f"gap/training/{CLAIM}/{activation}"][:, index]
        look = {"color": style.shade(index, len(config.widths)), "marker": "o", "label": f"{config.widths[index]:,}"}
        style.band(ax, config.times, gap, **look)
    style.band(ax, config.times, arrays[f"floor/training/{CLAIM}/{activation}"][:, -1], **FLOOR)
    ax.legend(
        title="width $M$", loc="upper left", title_fontsize=style.FONT_SIZE - 1, labelspacing=0.2, handlelength=1.4
    )
    ax.set_xticks(config.times, [f"{time:g}" for time in config.times])
    ax.minorticks_off()
    ax.set_xlabel("time $t$")


def _exponents(ax, result, activation):
    chosen = {name: [_verdict(result, f"N5.{part}.{activation}{name}") for part in PARTS] for name in ("", ".control")}
    verdicts = chosen[""] + chosen[".control"]
    looks = [style.series(0), style.series(1), _control(0), _control(1)]
    names = [*PARTS, *(f"{part},\nlinear dot" for part in PARTS)]
    style.verdict_marks(ax, verdicts, names, "fitted exponent", styles=looks)


def _verdict(result, name):
    return next(v for v in result.verdicts if v.claim == name)


def _control(index):
    return style.control() | {"marker": style.MARKERS[index]}


def _mean(samples):
    return np.exp(np.mean(np.log(samples)))
