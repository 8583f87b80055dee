"""The function-space flow with the infinite-width kernel predicts trained Gram matrices: loss x activation x width."""

from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import Rectangle

from paper_figures import style
from theorykit import verify

EXPERIMENT = "ntk_prediction"
ACTIVATIONS = {"relu": "ReLU", "tanh": "tanh"}
LINEAR = "linear dot"
FAMILIES = ("cosine", "dot")
# One for each loss, the same under cosine and dot products.
LOSSES = ("InfoNCE", "NT-Xent", "logistic", "spectral", "Barlow Twins", "VICReg", "CLIP", "linear")
MARKERS = dict(zip(LOSSES, (*style.MARKERS, "<", ">"), strict=True))
ROW = 0.3  # inches, for two lines of text
PREDICTED, NOT = "#BFE6D8", "#F7D9B5"  # pale green and pale orange
GREY = {"color": style.CONTROL, "linestyle": ":", "marker": ""}
BLUE = {"color": style.COLOURS[5], "marker": ""}


class Cell(NamedTuple):
    """One entry of the table: means over seeds on training points, `high` the upper end of the gate's interval.

    error is in units of the better trivial prediction, relative in units of ||G_net||, misalignment is 1 - CKA.
    """

    loss: str
    activation: str
    width: int
    error: float
    high: float
    predicted: bool
    relative: float
    misalignment: float


def cells(result) -> list[Cell]:
    """Loss x activation x width -> predicted or not; the last loss is the control. Runs that diverged are left out."""
    arrays, found = result.arrays, []
    error, relative, misalignment = (arrays[name] for name in ("error/flow/training", "relative", "cka/flow"))
    for (a, r, c), _ in np.ndenumerate(error[0].swapaxes(1, 2)):
        samples = error[:, a, c, r]
        if not np.isfinite(samples).all():  # its verdicts, which are then inconclusive, show it
            continue
        loss = (*result.config.losses, LINEAR)[r]
        activation, width = result.config.activations[a], result.config.widths[c]
        mean, _, high = map(float, verify.interval(samples, verify.LEVEL))
        other = (float(np.mean(values[:, a, c, r])) for values in (relative, misalignment))
        found.append(Cell(loss, activation, width, mean, high, high < result.config.predicted, *other))
    return found


def table(result) -> str:
    """The table of `cells` as text, for a terminal or a paper."""
    head = ("loss", "activation", "width", "error", "at most", "predicted", "of |G|", "1 - CKA")
    lines = ["{:<20}{:<12}{:>6}{:>8}{:>9}{:>11}{:>8}{:>10}".format(*head)]
    for cell in cells(result):
        words = cell._replace(predicted="yes" if cell.predicted else "no")
        lines.append("{:<20}{:<12}{:>6}{:>8.3f}{:>9.3f}{:>11}{:>8.3f}{:>10.2g}".format(*words))
    return "\n".join(lines)


def draw(result):
    """The table above; below, the error against the width for each activation, and 1 - CKA."""
    config = result.config
    count = len(config.activations)
    fig = plt.figure(figsize=(style.DOUBLE, 4.6 + ROW * len(config.losses)))
    grid = fig.add_gridspec(2, count + 1, height_ratios=(ROW * len(config.losses) + 0.6, 2.3))
    _table(fig.add_subplot(grid[0, :]), result)
    panels = [fig.add_subplot(grid[1, column]) for column in range(count + 1)]
    for letter, (a, activation), ax in zip("bc", enumerate(config.activations), panels, strict=False):
        _errors(ax, result, a)
        ax.set_title(f"{letter}  {ACTIVATIONS[activation]}")
        if a:
            ax.sharey(panels[0])
    panels[0].set_ylabel("error of the Gram matrix")
    _cka(panels[-1], result)
    panels[-1].set_title(f"{'bcd'[count]}  alignment")
    letters = ", ".join("bc"[:count])
    times = ", ".join(f"{loss} {result.arrays['times'][0, 0, 0, i]:g}" for i, loss in enumerate(config.losses))
    style.caption(
        fig,
        f"""N5 with the kernel of infinite width. Gram matrices of trained networks against those of the gradient flow
        in function space from the network's own start, with the infinite-width NTK; two layers, {config.features}
        outputs, {config.pairs} training pairs of augmented digits, {config.seeds} seeds. a: Frobenius error in units of
        that of the better trivial prediction, the Gram matrix before training or zero; means over seeds. Finite steps
        account for {_share_of_steps(result.arrays):.0%} of it at most, in the mean over seeds of a cell. Check mark:
        below {config.predicted:g} with 99.9% confidence; under it, 1 − CKA of both Gram matrices. Exponents with 99.9%
        intervals, predicted $-1/2$. Last row, a control: linear dot loss when the kernel has moved. {letters}:
        geometric means over seeds with 95% bands, markers of a. Dashed: $M^{{-1/2}}$ and, on the right, $M^{{-1}}$,
        heights fitted. Means over the losses: dotted, controls, the flow from another start and with the kernel of the
        output layer only; light blue, with that of the other nonlinearity. {"bcd"[count]}: 1 − CKA, likewise. Times,
        learning rate × steps: {times}.""",
    )
    return fig


def _share_of_steps(arrays):
    """Largest share of finite steps in the error of a loss, activation and width."""
    return np.max(_mean(arrays["floor/training"] / arrays["error/flow/training"][..., :-1]))


def _table(ax, result):
    """One block of columns for each activation: the widths, and the exponent."""
    arrays, config = result.arrays, result.config
    rows, columns = (*config.losses, LINEAR), len(config.widths) + 1.6
    ax.set_xlim(-0.25, len(config.activations) * columns)
    ax.set_ylim(len(rows) - 0.45, -1.7)
    for a, activation in enumerate(config.activations):
        left, error = a * columns, arrays["error/flow/training"][:, a]
        _write(ax, left + len(config.widths) / 2, -1.4, ACTIVATIONS[activation], weight="bold")
        for c, width in enumerate(config.widths):
            _write(ax, left + c + 0.5, -0.78, f"$M={width}$")
        _write(ax, left + columns - 0.85, -0.78, "exponent")
        for r in range(len(rows)):
            if np.isfinite(error[:, :, r]).all():
                fit = verify.slope_fit(arrays["widths"], error[:, :, r], law="power", level=verify.LEVEL)
                slope = f"{fit.slope:.2f} ± {fit.high - fit.slope:.2f}".replace("-", "−")
                _write(ax, left + columns - 0.85, r, slope)
    for cell in cells(result):
        left = config.activations.index(cell.activation) * columns + config.widths.index(cell.width)
        r = rows.index(cell.loss)
        ax.add_patch(Rectangle((left, r - 0.47), 0.97, 0.94, color=PREDICTED if cell.predicted else NOT, lw=0))
        _write(ax, left + 0.5, r - 0.2, f"{cell.error:.2f} {'✓' if cell.predicted else '✗'}")
        _write(ax, left + 0.5, r + 0.24, f"{cell.misalignment:.1g}", fontsize=style.FONT_SIZE - 2)
    for r, look in enumerate([_look(loss) for loss in config.losses] + [style.control()]):
        ax.plot([-0.13], [r], markersize=4.5, **look | {"linestyle": ""})
    ax.set_yticks(range(len(rows)), rows)
    ax.get_yticklabels()[-1].set_color(style.CONTROL)
    ax.set_xticks([])
    ax.tick_params(axis="y", length=0)
    ax.grid(False)
    ax.spines[:].set_visible(False)
    ax.set_title("a  Is the trained Gram matrix predicted? Error (0 perfect, 1 trivial), and 1 − CKA")


def _write(ax, x, y, text, **options):
    ax.text(x, y, text, **{"ha": "center", "va": "center", "fontsize": style.FONT_SIZE - 0.5} | options)


def _look(loss):
    """Cosine losses blue, dot losses vermilion; every loss with its own marker."""
    family, name = loss.split(maxsplit=1)
    return {"color": style.COLOURS[FAMILIES.index(family)], "marker": MARKERS[name]}


def _errors(ax, result, a):
    arrays, config, widths = result.arrays, result.config, result.arrays["widths"]
    style.log_axis(ax)
    style.widths_axis(ax, widths, "width $M$")
    error = arrays["error/flow/training"][:, a]
    for i, loss in enumerate(config.losses):
        ax.plot(widths, _mean(error[:, :, i]), linewidth=0.9, **_look(loss))
    style.law(ax, widths, -0.5, style.centre(widths, _pooled(error)))
    style.band(ax, widths, error[:, :, -1], **style.control())
    style.band(ax, widths, _pooled(arrays["error/other nonlinearity/training"][:, a]), **BLUE)
    for name, text in (("another start", "another start"), ("output layer", "output layer only")):
        samples = _pooled(arrays[f"error/{name}/training"][:, a])
        style.band(ax, widths, samples, **GREY)
        if a == 0:  # the second panel has the same series
            style.note(ax, widths[-1], _mean(samples)[-1], text, above=False)


def _cka(ax, result):
    arrays, config, widths = result.arrays, result.config, result.arrays["widths"]
    style.log_axis(ax)
    style.widths_axis(ax, widths, "width $M$")
    for a, activation in enumerate(config.activations):
        values = _pooled(arrays["cka/flow"][:, a])
        style.band(ax, widths, values, label=ACTIVATIONS[activation], **style.series(2 + a))
        style.law(ax, widths, -1.0, style.centre(widths, values))
        for name in ("output layer", "untrained"):
            style.band(ax, widths, _pooled(arrays[f"cka/{name}"][:, a]), **GREY)
    ax.set_ylim(top=5 * ax.get_ylim()[1])  # room for a text
    style.corner(ax, "output layer only,\nbefore training")
    ax.legend(loc="lower left")
    ax.set_ylabel("1 − CKA")


def _pooled(error):
    """Geometric mean over the losses but the linear one, (seeds, widths)."""
    return np.exp(np.mean(np.log(error[:, :, :-1]), axis=-1))


def _mean(samples):
    return np.exp(np.mean(np.log(samples), axis=0))
