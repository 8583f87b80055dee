"""Risks of four learned tasks against p, and what they lose against Bayes."""

import matplotlib.pyplot as plt
import numpy as np

from experiments import _task_members as members
from experiments import _task_verdicts as judged
from paper_figures import style

EXPERIMENT = "learned_tasks"
BAYES = {"color": style.THEORY, "linestyle": style.DASHES, "linewidth": 0.9, "marker": ""}
NORMAL = 1.96  # standard errors to either end of a 95% interval
UNITS = {
    "contrastive": "nats, two-sided",
    "zero_shot": "nats",
    "denoising": "mean square",
    "next_token": "nats a token",
}


def draw(result):
    """A column for each task: risks, excesses, and excesses along training."""
    arrays, config, size = result.arrays, result.config, result.config.size
    tasks = judged.measured_tasks(arrays)
    fig, axes = plt.subplots(3, len(tasks), figsize=(style.DOUBLE, 6.6), squeeze=False)
    for letter, task, (above, below, along) in zip("abcd", tasks, axes.T, strict=False):
        _risks(above, below, config, arrays, task)
        above.set_title(f"{letter}  {judged.NAMES[task].capitalize()}")
        _along(along, config, arrays, task)
    axes[1, 0].set_ylabel("excess over Bayes")
    axes[2, 0].set_ylabel("excess, standard")
    handles = {text: line for ax in axes[0] for line, text in zip(*ax.get_legend_handles_labels(), strict=True)}
    names = [name for name in ("Bayes", *members.VARIANTS, "control") if name in handles]
    fig.legend([handles[name] for name in names], names, loc="outside upper center", ncols=len(names))
    style.caption(
        fig,
        f"""Learned tasks on hierarchies of {size.alphabet} symbols, depth {size.depth} and arity {size.arity}:
        transformers of {size.blocks} blocks and width {size.width}, {config.pair_steps:,} steps (pairs) and
        {config.steps:,} (others) of {size.batch} fresh samples. Above: risks on {config.samples:,} held-out samples,
        bars: 95% of the Bayes risk by its standard error; middle: what they lose against message passing on the same
        samples. Zero-shot: {config.pool:,} prompts of each class. Shallow: one block. Joint: encoder and network
        trained together, the others with a frozen encoder from a pair. Misguided: supervised by messages of other
        samples, a placebo. Control: standard members told of another sample, in b with prompts of another class.
        Below: excess of standard members along training on {config.samples // 2:,} held-out samples, the same at all
        steps, means over {_levels(config)}; grey: on samples of another hierarchy. 95% bands over
        {config.seeds} seeds; kernels are drawn afresh for each seed and $p$. {_order(arrays)}""",
    )
    return fig


def _levels(config):
    return "$p$ = " + ", ".join(f"{p:g}" for p in config.levels)


def _risks(above, below, config, arrays, task):
    bayes, excess = arrays[f"bayes/{task}"], arrays[f"excess/{task}/value"]
    for index, name in enumerate(members.VARIANTS[: excess.shape[1]]):
        look = style.series(index) if name != judged.PLACEBO else style.control(1)
        if name != judged.PLACEBO:  # above it would hide the standard one
            style.band(above, config.levels, bayes + excess[:, index], label=name, **look)
        else:
            above.plot([], [], label=name, **look)
        style.band(below, config.levels, excess[:, index], **look)
    mixed = bayes + arrays[f"mixed/{task}"]
    style.band(above, config.levels, mixed, label="control", **style.control())
    error = np.sqrt(np.sum(arrays[f"bayes/{task}/error"] ** 2, axis=0)) / len(bayes)
    bars = {"yerr": NORMAL * error, "capsize": 2, "elinewidth": 0.9, "label": "Bayes", "zorder": 5}
    above.errorbar(config.levels, bayes.mean(axis=0), **BAYES, **bars)
    below.axhline(0, **BAYES)
    above.set_ylim(bottom=0)
    for ax in (above, below):
        ax.set_xticks(config.levels, [f"{p:g}" for p in config.levels])
    below.set_xlabel("noise of the edges $p$")
    above.set_ylabel(UNITS[task])


def _along(ax, config, arrays, task):
    steps = members.checkpoints_of(config, config.steps if task in config.conditional else config.pair_steps)
    style.log_axis(ax)
    for what, look in (("foreign", style.control()), ("value", style.series(judged.STANDARD))):
        style.band(ax, steps, arrays[f"along/{task}/{what}"].mean(axis=2), **look)
    ax.set_xscale("symlog", linthresh=steps[1])
    ax.set_xticks(steps[::-2], [str(step) for step in steps[::-2]])  # all of them would overlap
    ax.minorticks_off()
    ax.set_xlabel("step")


def _order(arrays):
    """The expected order, in words."""
    parts = {}
    for (task, first, second), ends in judged.ordering(arrays, style.LEVEL).items():
        mean, low, high = (1000 * end for end in ends)
        parts.setdefault(f"{second} less {first}", []).append(
            f"{judged.NAMES[task]} {mean:.1f} ({low:.1f} to {high:.1f})"
        )
    said = "; ".join(f"{what}: {', '.join(found)}" for what, found in parts.items())
    return (
        f"Differences of excesses in thousandths, 95% over hierarchies of all seeds and $p$: {said}." if parts else ""
    )
