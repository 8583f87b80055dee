"""N1: the kernel of a wide encoder at initialisation approaches its limit as one over the root of the width."""

import matplotlib.pyplot as plt
import numpy as np

from paper_figures import style

EXPERIMENT = "ntk_width"
LAW = "prediction $M^{-1/2}$"
ACTIVATIONS = {"relu": "ReLU", "tanh": "tanh", "erf": "erf", "gelu": "GELU"}


def draw(result):
    """Errors on their predicted laws, the controls off them; beside them the fitted exponents."""
    arrays, config = result.arrays, result.config
    fig, (left, right) = plt.subplots(1, 2, figsize=(style.DOUBLE, 3.7), width_ratios=(1.5, 1))

    style.log_axis(left)
    style.widths_axis(left, np.concatenate(list(config.widths.values())), "width $M$ (units or channels per layer)")
    looks = {name: style.series(index) for index, name in enumerate(config.widths)}
    for name, widths in config.widths.items():
        error = arrays[f"error/{name}"]
        style.band(left, widths, error, linestyle="", **looks[name])
        style.law(left, widths, -0.5, style.centre(widths, error), None if left.get_legend_handles_labels()[1] else LAW)
    controlled = str(arrays["control of"])
    widths = config.widths[controlled]
    copied, standard = arrays["error/copied-units"], arrays["error/standard"].mean(axis=0)
    style.band(left, widths, copied, **style.control(0))
    style.note(left, widths[-1], 1.05 * copied[:, -1].mean(), f"control: copies of {config.independent} units")
    left.legend(loc="lower left")
    left.set_ylim(top=1.0)
    left.text(
        0.99,
        0.99,
        f"control: standard parametrisation\noff this scale, {standard[0]:,.0f} to {standard[-1]:,.0f} ↑",
        **{"transform": left.transAxes, "ha": "right", "va": "top", "color": style.CONTROL, "fontsize": 7},
    )
    left.set_ylabel("relative error of the kernel")
    left.set_title("a  The kernel approaches its limit")

    verdicts = [v for v in result.verdicts if v.control_of in (None, f"N1.{controlled}")]
    words = [_describe(v.claim.removeprefix("N1."), controlled) for v in verdicts]
    marks = [looks.get(v.claim.removeprefix("N1.")) for v in verdicts]
    marks = [look or style.control(i) for i, look in zip((0,) * len(looks) + (0, 1), marks, strict=True)]
    style.verdict_marks(right, verdicts, words, "fitted exponent", styles=marks)
    right.set_title("b  at the predicted rate")
    style.caption(
        fig,
        f"""N1. Relative error of the empirical kernel at initialisation, dimensionless: its distance in Frobenius norm
        from the kernel of the infinitely wide network, on {config.points} inputs ({config.data}) with {config.features}
        outputs. a: points (names beside b) are means over {config.seeds} seeds, each the root mean square of
        {config.draws} initialisations; bands are 95% intervals; dashed lines have the predicted slope and a fitted
        height. Grey: {_describe(controlled, "")} with one assumption broken. b: fitted exponents with 99.9% intervals;
        the strip is what counts as agreement, −1/2 ± {config.margin:.3f}.""",
    )
    return fig


def _describe(name, controlled):
    if name.startswith(f"{controlled}."):
        return "control: " + name.removeprefix(f"{controlled}.").replace("-", " ")
    activation, *kind, depth = name.split("-")
    return f"{ACTIVATIONS[activation]}{' CNN' if kind else ''}, {depth} layers"
