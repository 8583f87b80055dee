"""Zero-shot classification by trained CLIP pairs with M prompts: the law a + b/M, its coefficient, what to average."""

import matplotlib.pyplot as plt
import numpy as np

from experiments import _task_verdicts as judged
from experiments._task_members import pairs_of
from experiments._task_prompts import counts
from paper_figures import style

EXPERIMENT = "learned_tasks"
PREDICTED = {"color": style.THEORY, "linestyle": style.DASHES, "linewidth": 0.9, "marker": "", "zorder": 4}


def draw(result):
    """The law in M (a), its coefficient (b), exponentials against similarities (c)."""
    arrays, config = result.arrays, result.config
    fig, (law, coefficient, averages) = plt.subplots(1, 3, figsize=(style.DOUBLE, 3.1))
    standard = judged.STANDARD
    found = {name.removeprefix("prompts/"): a for name, a in arrays.items() if name.startswith("prompts/")}
    m = np.array(counts(config.pool))
    _law(law, m, {name: a[:, :, standard] for name, a in found.items()}, config)
    _coefficient(coefficient, found, config)
    _averages(averages, m, {name: a[:, :, standard] for name, a in found.items()}, config)
    style.caption(
        fig,
        f"""Zero-shot classification with $M$ prompts of each class, drawn from pools of $Q={config.pool}$, by CLIP
        pairs trained at noise $p$; excess over the exact $P(c|x)$, mean over {config.images} images and $Q/M$ sets of
        prompts. a: standard pairs; dashed: $a+b(1/M-1/Q)$ with $b$ from the variances of $e^s$ over the prompts,
        nothing fitted. b: coefficient fitted to $M\\geq{judged.ASYMPTOTIC}$ against $b$, one point for each seed,
        level and kind of pair, those of a seed and level share kernels and prompts; dashed: equality; the asymptote of
        $p<{judged.REFERENCE}$ needs more prompts; grey: standard pairs, each prompt given twice. c: averages of
        exponentials and of similarities at $p={judged.REFERENCE}$; with two prompts similarities are better.
        {config.seeds} seeds, 95% bands.""",
    )
    return fig


def _law(ax, m, found, config):
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    fine = np.geomspace(m[0], m[-1], 60)
    for index, level in enumerate(config.levels):
        style.band(ax, m, found["excess"][:, index], label=f"$p={level:g}$", **style.series(index))
        predicted = found["limit"][:, index, None] + found["b"][:, index, None] * (1 / fine - 1 / config.pool)
        ax.plot(fine, np.exp(np.mean(np.log(np.maximum(predicted, 1e-9)), axis=0)), **PREDICTED)
    style.widths_axis(ax, m[::2], "prompts $M$")
    ax.legend(loc="upper right")
    ax.set_ylabel("excess log-loss (nats)")
    ax.set_title("a  Excess: $a+b/M$")


def _coefficient(ax, found, config):
    marks = {"linestyle": "", "markersize": 3.2, "alpha": 0.7}
    fitted = judged.coefficient(found["excess"], found["limit"], config.pool)  # (seeds, levels, variants)
    twice = judged.coefficient(judged.repeated(found["excess"]), found["limit"], config.pool)
    standard, held = judged.STANDARD, np.array(config.levels) >= judged.REFERENCE
    control = [a[:, held, standard].ravel() for a in (found["b"], twice)]
    ax.plot(*control, label="control", **style.control() | marks)
    for index, name in enumerate(pairs_of(config)):
        if name == judged.PLACEBO:
            continue
        ax.plot(found["b"][..., index].ravel(), fitted[..., index].ravel(), label=name, **style.series(index) | marks)
    ends = np.array([0, 1.05 * max(np.max(found["b"]), np.max(fitted), np.max(control))])
    ax.plot(ends, ends, **PREDICTED)
    ax.set(xlim=ends, ylim=ends)
    ax.legend(loc="lower right")
    ax.set_xlabel("predicted $b$ (nats)")
    ax.set_ylabel("fitted coefficient of $1/M$")
    ax.set_title("b  The coefficient")


def _averages(ax, m, found, config):
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    level = config.levels.index(judged.REFERENCE)
    style.band(ax, m, found["excess"][:, level], label="exponentials", **style.series(0))
    style.band(ax, m, found["similar"][:, level], label="similarities", **style.series(1))
    style.widths_axis(ax, m[::2], "prompts $M$")
    ax.legend(loc="upper right")
    ax.set_ylabel("excess log-loss (nats)")
    ax.set_title(f"c  What to average, $p={judged.REFERENCE}$")
