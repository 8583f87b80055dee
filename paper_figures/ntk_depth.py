"""N7: the kernel of deeper encoders stays put under a cosine loss as the width grows."""

import matplotlib.pyplot as plt
import numpy as np

from paper_figures import style

EXPERIMENT = "ntk_depth"
CLAIM, CONTROL = "fixed rate", "rate proportional to width"
ACTIVATIONS = {"relu": "ReLU", "tanh": "tanh"}


def draw(result):
    """Change of the kernel per architecture, each below its bound, the controls above; beside it the exponents."""
    arrays, config = result.arrays, result.config
    fig, (left, right) = plt.subplots(1, 2, figsize=(style.DOUBLE, 3.9), width_ratios=(1.5, 1))

    style.log_axis(left)
    widths = {name: arrays[f"widths/{name}"] for name in config.architectures}
    style.widths_axis(left, np.concatenate(list(widths.values())), "width $M$ (units or channels per layer)")
    looks = {name: style.series(index) for index, name in enumerate(config.architectures)}
    for name, look in looks.items():
        controlled = arrays[f"change/{CONTROL}/{name}"]
        style.band(left, widths[name], controlled, **style.control() | {"marker": look["marker"]})
        change = arrays[f"change/{CLAIM}/{name}"]
        style.band(left, widths[name], change, **look)
        first = widths[name][0], np.exp(np.log(change[:, 0]).mean())
        style.law(left, widths[name], -0.5, first, None if left.get_legend_handles_labels()[1] else "bound $M^{-1/2}$")
    left.legend(loc="lower left")
    style.corner(left, "controls: learning rate ∝ width")
    left.set_ylim(top=2 * left.get_ylim()[1])  # room for that text
    left.set_ylabel("relative change of the kernel")
    left.set_title("a  Deep kernels, too, move less when wider")

    verdicts = sorted(result.verdicts, key=lambda v: v.role != "claim")
    names = [v.claim.removeprefix("N7.").removesuffix(".control") for v in verdicts]
    marks = [
        looks[name] if v.role == "claim" else style.control() | {"marker": looks[name]["marker"]}
        for v, name in zip(verdicts, names, strict=True)
    ]
    words = [_describe(name) if v.role == "claim" else "control" for v, name in zip(verdicts, names, strict=True)]
    style.verdict_marks(right, verdicts, words, "fitted exponent", styles=marks)
    right.set_title("b  at least as fast as predicted")
    smallest = min(arrays[f"smallest/{CLAIM}/{name}"].min() for name in config.architectures)
    style.caption(
        fig,
        f"""N7. Relative change of the empirical kernel in Frobenius norm, dimensionless, on {config.pairs} pairs of
        augmented digits with {config.features} outputs, after {config.steps} steps of gradient descent (learning rate
        {config.learning_rate:g}) on cosine InfoNCE. a: means over {config.seeds} seeds with 95% bands; the points are
        named beside b. Dashed: the slowest predicted fall, through the first point; measurements should not rise above
        it. The smallest embedding norm seen was {smallest:.2g}. Controls, grey: the same architectures with a learning
        rate of {config.rate_per_unit:g} per unit of the width, {config.rate_per_channel:g} per channel. b: fitted
        exponents with 99.9% intervals; the strip is what counts as agreement, at most −1/2.""",
    )
    return fig


def _describe(name):
    activation, *kind, depth = name.split("-")
    return f"{ACTIVATIONS[activation]}{' CNN' if kind else ''}, {depth} layers"
