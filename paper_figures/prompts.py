"""D3 with M prompts: the excess is a + b/M; averages of similarities tend elsewhere."""

import matplotlib.pyplot as plt
import numpy as np

from experiments import prompts as experiment
from paper_figures import style

EXPERIMENT = "prompts"
PREDICTED = {"color": style.THEORY, "linestyle": style.DASHES, "linewidth": 0.9, "marker": "", "zorder": 4}
NAMES = {"optimal": "score $\\ln\\,r$", "noisy": "with noise", "sure": "sure of one text"}


def draw(result):
    """The law in M (a), its coefficient (b), and exponentials against similarities (c)."""
    arrays, config = result.arrays, result.config
    which = np.array(experiment.kinds(config))
    fig, (law, coefficient, averages) = plt.subplots(1, 3, figsize=(style.DOUBLE, 3.1))
    _law(law, arrays, which)
    _coefficient(coefficient, arrays, which)
    _averages(averages, arrays, which == "optimal")
    style.caption(
        fig,
        f"""D3 with $M$ prompts of each class. {config.joints} joints of each kind of score, {experiment.NX} images,
        {experiment.NY} texts, {experiment.NC} classes; exact for every $M$ except where sampled; half of the joints
        of imperfect scores have empty cells. a: distance of the excess log-loss from that of all texts, $a$, in units
        of $|b|$; dashed: $1/M$, nothing fitted; grey: the excess
        itself, $a$ not subtracted. b: $M$ times that distance, extrapolated to many prompts, against $b$; dashed:
        equality; grey: without the variance of the normaliser. Where a score is sure of a class because of one text,
        $b<0$ and few prompts are better than many. c: the score $\\ln\\,r$, for which $a=0$: averages of exponentials
        (exact; ring: sampled) and of similarities ({config.samples:,} sampled sets of prompts for each joint), which
        tend to the excess of $P(c)\\,e^{{E[s|c]}}$; dashed: $b/M$, and that limit with its term of order $1/M$. Bands:
        95% intervals over joints.""",
    )
    return fig


def _law(ax, arrays, which):
    prompts = arrays["prompts"]
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    size = np.abs(arrays["b"])[:, None]
    for index, (kind, name) in enumerate(NAMES.items()):
        chosen = which == kind
        distance = np.abs(arrays["excess"] - arrays["limit"][:, None]) / size
        style.band(ax, prompts, distance[chosen], label=name, **style.series(index))
    noisy = which == "noisy"
    style.band(ax, prompts, (arrays["excess"] / size)[noisy], label="control", **style.control())
    ax.plot(prompts, 1 / prompts, **PREDICTED)
    style.widths_axis(ax, prompts[::2], "prompts $M$")
    ax.legend(loc="lower left")
    ax.set_ylabel("$|\\mathrm{excess}-a|\\,/\\,|b|$")
    ax.set_title("a  Excess: $a+b/M$")


def _coefficient(ax, arrays, which):
    measured = experiment.extrapolated(arrays)
    marks = {"linestyle": "", "markersize": 2.8, "alpha": 0.6}
    ax.plot(arrays["b first"], measured, label="control", **style.control() | marks)
    for index, kind in enumerate(NAMES):
        ax.plot(arrays["b"][which == kind], measured[which == kind], **style.series(index) | marks)
    ends = np.array([np.min(measured), np.max(measured)])
    ax.plot(ends, ends, **PREDICTED)
    ax.set_xlim(1.15 * ends[0] - 0.1, 1.15 * max(ends[1], np.quantile(arrays["b first"], 0.9)) + 0.1)
    ax.legend(loc="upper left")
    ax.set_xlabel("predicted $b$ (nats)")
    ax.set_ylabel("$M\\,(\\mathrm{excess}-a)$, large $M$")
    ax.set_title("b  The coefficient")


def _averages(ax, arrays, optimal):
    prompts = arrays["prompts"][:6]
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    style.band(ax, prompts, arrays["excess"][optimal][:, :6], label="exponentials", **style.series(0))
    for average, look in (
        ("exponentials", {"color": style.COLOURS[0], "marker": "o", "mfc": "none", "mew": 1.0, "markersize": 7}),
        ("similarities", style.series(1) | {"markersize": 5}),
    ):
        means = np.exp(np.mean(np.log(arrays[average]), axis=0))
        label = average if average == "similarities" else None
        ax.plot(experiment.SAMPLED[average], means, linestyle="", label=label, zorder=5, **look)
    fine = np.geomspace(prompts[1], prompts[-1], 60)

    def mean(limit, b):
        """Geometric mean over joints, as of the points."""
        return np.exp(np.mean(np.log(limit[optimal, None] + b[optimal, None] / fine), axis=0))

    ax.plot(fine, mean(0 * arrays["b"], arrays["b"]), **PREDICTED)
    ax.plot(fine, mean(arrays["limit similar"], arrays["b similar"]), **PREDICTED)
    style.widths_axis(ax, prompts, "prompts $M$")
    ax.legend(loc="lower left")
    ax.set_ylabel("excess log-loss (nats)")
    ax.set_title("c  What to average")
