"""E: excess of CLIP and of zero-shot labels against the number of samples, on three laws and by three encoders."""

import matplotlib.pyplot as plt
import numpy as np

from paper_figures import style
from theorykit import verify

EXPERIMENT = "sample_efficiency"
LAWS = {
    "hierarchy": ("hierarchy", style.series(0)),
    "permuted": ("fresh orders", style.series(1)),
    "star": ("star", style.series(2)),
    "unmatched": ("control: unmatched", style.control(0)),
}
TIGHT = {"labelspacing": 0.2, "handlelength": 1.6, "handletextpad": 0.5}
FLOOR = {"color": style.THEORY, "linestyle": style.DASHES, "linewidth": 0.9, "marker": ""}


def draw(result):
    """CLIP on all laws by the transformer (a) and the MLP (b), kinds of encoders (c), exponents (d)."""
    arrays, config = result.arrays, result.config
    fig, ((transformer, mlp), (kinds, exponents)) = plt.subplots(2, 2, figsize=(style.DOUBLE, 5.2))
    if config.transformer:
        _laws(transformer, arrays, config, "transformer")
        transformer.set_title("a  Transformer, CLIP")
    else:
        transformer.set_axis_off()
    _laws(mlp, arrays, config, "mlp")
    mlp.set_title("b  MLP, CLIP")
    mlp.legend(loc="lower left", **TIGHT)
    _kinds(kinds, arrays, config)
    kinds.set_title("c  On the hierarchy: end and best checkpoint")
    _exponents(exponents, arrays, config)
    exponents.set_title("d  Exponents, end of training")
    style.caption(
        fig,
        f"""E. {config.alphabet} symbols, {config.arity**config.depth} leaves, p = {config.noise}; {config.steps}
        steps of {config.batch} of n stored pairs, {config.seeds} seeds with kernels of their own, means with 95%
        bands. a, b: exact excess among 4 candidates, both directions, at the end of training, each on its own law:
        the hierarchy; its leaves in a fresh order for every image and text; stars with the same root-leaf
        information. Thin line: trained on fresh orders, tested on the hierarchy; dashed: the excess there of the best
        score of fresh orders. Grey: trained on images and texts of different samples. c: the excess of CLIP (lines)
        and of zero-shot labels (thin) at the end; dotted: CLIP at the checkpoint of least validation loss. d: fitted
        exponents of the excess with 99.9% intervals over seeds, in the range of n drawn above.""",
    )
    return fig


def _laws(ax, arrays, config, kind):
    style.log_axis(ax)
    n = config.samples[kind]
    style.widths_axis(ax, n, "samples $n$")
    for law, (label, look) in LAWS.items():
        style.band(ax, n, arrays[f"excess/{kind}/{law}/end"], label=label, **look)
    crossed = np.exp(np.mean(np.log(arrays[f"on_tree/{kind}/permuted/end"]), axis=0))
    ax.plot(n, crossed, color=style.COLOURS[1], linewidth=0.7, marker="")
    ax.axhline(np.exp(np.mean(np.log(arrays["floor"]))), **FLOOR)
    ax.set_ylabel("excess, nats")


def _kinds(ax, arrays, config):
    style.log_axis(ax)
    for index, (kind, n) in enumerate(config.samples.items()):
        look = style.series(index)
        style.band(ax, n, arrays[f"excess/{kind}/hierarchy/end"], label={"mlp": "MLP"}.get(kind, kind), **look)
        for name, line in (("zero_shot/{}/hierarchy/end", "-"), ("excess/{}/hierarchy/best", ":")):
            mean = np.exp(np.mean(np.log(arrays[name.format(kind)]), axis=0))
            ax.plot(n, mean, color=look["color"], linewidth=0.8, linestyle=line, marker="")
    if config.transformer:
        one = arrays["excess/transformer/one layer/end"]
        style.band(ax, config.transformer[1:2], one, label="one layer", **style.series(3) | {"linestyle": ""})
    style.widths_axis(ax, config.mlp, "samples $n$")
    ax.legend(loc="upper right", **TIGHT)
    ax.set_ylabel("excess, nats")


def _exponents(ax, arrays, config):
    names, row = [], 0
    for kind, n in config.samples.items():
        for loss, task in (("excess", "CLIP"), ("zero_shot", "labels")):
            for law, (_, look) in LAWS.items():
                fit = verify.slope_fit(n, arrays[f"{loss}/{kind}/{law}/end"], law="power", level=verify.LEVEL)
                ax.plot([fit.low, fit.high], [row, row], color=look["color"], linewidth=1.6, marker="")
                ax.plot([fit.slope], [row], **look | {"linestyle": ""})
                names.append(f"{'MLP' if kind == 'mlp' else kind}, {task}" if law == "hierarchy" else "")
                row += 1
    ax.axvline(-config.exponent, color=style.THEORY, linestyle=style.DASHES, linewidth=0.9, marker="")
    ax.set_yticks(range(row), names)
    ax.tick_params(axis="y", length=0)
    ax.grid(False, axis="y")
    ax.set_ylim(row - 0.5, -0.5)
    ax.set_xlabel("exponent of $n$")
