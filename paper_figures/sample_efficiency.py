"""E: excess of CLIP and of zero-shot labels against the number of samples, on three laws and by three encoders."""

import matplotlib.pyplot as plt
import numpy as np

from experiments import sample_efficiency as experiment
from paper_figures import style
from theorykit import verify

EXPERIMENT = "sample_efficiency"
LAWS = {
    "hierarchy": ("hierarchy", style.series(0)),
    "permuted": ("fresh orders", style.series(1)),
    "star": ("star", style.series(2)),
    "unmatched": ("control: unmatched", style.control(0)),
}
SHORT = {"zero_shot": "labels", "next_token": "next tokens", "denoising": "denoising"}
TIGHT = {"labelspacing": 0.2, "handlelength": 1.6, "handletextpad": 0.5}
LEVEL = {"color": style.THEORY, "linestyle": style.DASHES, "linewidth": 0.9, "marker": ""}
END = {"linewidth": 0.9, "linestyle": ":", "marker": ""}


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
    kinds.set_title("c  On the hierarchy, by encoder")
    _exponents(exponents, arrays, config)
    exponents.set_title("d  Exponents")
    tasks = ", ".join(SHORT[task] for task in config.tasks)
    known = ", ".join(f"{arrays[f'information/{law}'].mean():.2f}" for law in ("hierarchy", "permuted", "star"))
    style.caption(
        fig,
        f"""E. {config.alphabet} symbols, {config.arity**config.depth} leaves, p = {config.noise}; {config.steps}
        steps of {config.batch} of n stored pairs, {config.seeds} seeds with kernels of their own, means with 95%
        bands, at the checkpoint of least validation loss. a, b: exact excess among 4 candidates, both directions, each
        on its own law: the hierarchy; its leaves in a fresh order for every image and text; stars with the same
        root-leaf information. I(image; text) is {known} nats. Thin line: trained on fresh orders, tested on the
        hierarchy; lower dashed line: the excess there of the best score of fresh orders; upper one: of a constant score
        ({arrays["constant"].mean():.2f} nats). Dotted: the hierarchy at the end of training, overfitted where n is
        small. Grey: images and texts of different samples. c: CLIP (bands) and {tasks} (thin); dotted: CLIP at
        the end. d: fitted exponents with 99.9% intervals over seeds, from the n on where the excess on the hierarchy is
        below that of a constant score; dashed: the exponent claimed.""",
    )
    return fig


def _name(kind):
    return "MLP" if kind == experiment.MLP else kind


def _mean(values):
    return np.exp(np.mean(np.log(values), axis=0))


def _constant(ax, arrays, x):
    level = _mean(arrays["constant"])
    ax.axhline(level, **LEVEL)
    style.note(ax, x, level, "constant score", color=style.THEORY)


def _laws(ax, arrays, config, kind):
    style.log_axis(ax)
    n = config.samples[kind]
    style.widths_axis(ax, n, "samples $n$")
    for law, (label, look) in LAWS.items():
        style.band(ax, n, arrays[f"excess/{kind}/{law}/best"], label=label, **look)
    ax.plot(n, _mean(arrays[f"on_tree/{kind}"]), color=style.COLOURS[1], linewidth=0.7, marker="")
    ax.plot(n, _mean(arrays[f"excess/{kind}/hierarchy/end"]), color=style.COLOURS[0], **END)
    ax.axhline(_mean(arrays["floor"]), **LEVEL)
    _constant(ax, arrays, n[-1])
    ax.set_ylabel("excess, nats")


def _kinds(ax, arrays, config):
    style.log_axis(ax)
    for index, (kind, n) in enumerate(config.samples.items()):
        look = style.series(index)
        style.band(ax, n, arrays[f"excess/{kind}/hierarchy/best"], label=_name(kind), **look)
        for task, line in zip(config.tasks, ("-", "--", "-."), strict=False):
            ax.plot(n, _mean(arrays[f"{task}/{kind}/hierarchy"]), line, color=look["color"], linewidth=0.8, marker="")
        ax.plot(n, _mean(arrays[f"excess/{kind}/hierarchy/end"]), color=look["color"], **END)
    style.widths_axis(ax, config.mlp, "samples $n$")
    _constant(ax, arrays, config.mlp[-1])
    ax.legend(loc="lower left", **TIGHT)
    ax.set_ylabel("excess, nats")


def _exponents(ax, arrays, config):
    names, row = [], 0
    for kind, counts in config.samples.items():
        chosen = experiment.fitted(config, arrays, kind)
        tasks = [(task + "/{}/{}", SHORT[task]) for task in config.tasks]
        for loss, task in (("excess/{}/{}/best", "CLIP"), *tasks):
            for law, (_, look) in LAWS.items():
                values = arrays[loss.format(kind, law)][:, chosen]
                fit = verify.slope_fit(np.array(counts)[chosen], values, law="power", level=verify.LEVEL)
                ax.plot([fit.low, fit.high], [row, row], color=look["color"], linewidth=1.6, marker="")
                ax.plot([fit.slope], [row], **look | {"linestyle": ""})
                names.append(f"{_name(kind)}, {task}" if law == "hierarchy" else "")
                row += 1
        # Of tasks it is claimed for the MLP only.
        begin, others = row - (1 + len(tasks)) * len(LAWS), len(tasks) * len(LAWS)
        claimed = [begin - 0.5, row - (0 if kind == experiment.MLP else others) - 0.5]
        ax.plot([-experiment.claimed(config, kind)] * 2, claimed, **LEVEL)
    ax.set_yticks(range(row), names)
    ax.tick_params(axis="y", length=0)
    ax.grid(False, axis="y")
    ax.set_ylim(row - 0.5, -0.5)
    ax.set_xlabel("exponent of $n$")
