"""Risks of four learned tasks against p, and what they lose against Bayes."""

import matplotlib.pyplot as plt

from experiments import learned_tasks as experiment
from paper_figures import style

EXPERIMENT = "learned_tasks"
BAYES = {"color": style.THEORY, "linestyle": style.DASHES, "linewidth": 0.9, "marker": ""}
UNITS = {
    "contrastive": "nats, two-sided",
    "zero_shot": "nats",
    "denoising": "mean square",
    "next_token": "nats a token",
}


def draw(result):
    """A column for each task: risks above, excesses below."""
    arrays, config, size = result.arrays, result.config, result.config.size
    tasks = experiment.measured_tasks(arrays)
    fig, axes = plt.subplots(2, len(tasks), figsize=(style.DOUBLE, 4.6), sharex=True, squeeze=False)
    for letter, task, (above, below) in zip("abcd", tasks, axes.T, strict=False):
        bayes, excess = arrays[f"bayes/{task}"], arrays[f"excess/{task}/value"]
        for index, name in enumerate(experiment.VARIANTS[: excess.shape[1]]):
            style.band(above, config.levels, bayes + excess[:, index], label=name, **style.series(index))
            style.band(below, config.levels, excess[:, index], **style.series(index))
        mixed = bayes + arrays[f"mixed/{task}"]
        style.band(above, config.levels, mixed, label="control", **style.control())
        above.plot(config.levels, bayes.mean(axis=0), **BAYES, label="Bayes", zorder=5)
        below.axhline(0, **BAYES)
        above.set_ylim(bottom=0)
        above.set_title(f"{letter}  {experiment.NAMES[task].capitalize()}")
        below.set_xlabel("noise of the edges $p$")
        above.set_ylabel(UNITS[task])
    axes[1, 0].set_ylabel("excess over Bayes")
    handles = {text: line for ax in axes[0] for line, text in zip(*ax.get_legend_handles_labels(), strict=True)}
    names = [name for name in ("Bayes", *experiment.VARIANTS, "control") if name in handles]
    fig.legend([handles[name] for name in names], names, loc="outside upper center", ncols=len(names))
    style.caption(
        fig,
        f"""Learned tasks on hierarchies of {size.alphabet} symbols, depth {size.depth} and arity {size.arity}:
        transformers of {size.blocks} blocks and width {size.width}, {config.pair_steps:,} steps (pairs) and
        {config.steps:,} (others) of {size.batch} fresh samples. Above: risks on {config.samples:,} held-out samples;
        below: what they lose against message passing on the same samples. Zero-shot: {config.pool:,} prompts of each
        class. Shallow: one block. Joint: encoder and network trained together, the others with a frozen encoder from a
        pair. Control: standard members told of another sample, in b with prompts of another class. 95% bands over
        {config.seeds} seeds; kernels are drawn afresh for each seed and $p$. {_order(arrays)}""",
    )
    return fig


def _order(arrays):
    """The expected order, in words."""
    parts = {}
    for (task, first, second), ends in experiment.ordering(arrays, style.LEVEL).items():
        mean, low, high = (1000 * end for end in ends)
        parts.setdefault(f"{second} less {first}", []).append(
            f"{experiment.NAMES[task]} {mean:.1f} ({low:.1f} to {high:.1f})"
        )
    said = "; ".join(f"{what}: {', '.join(found)}" for what, found in parts.items())
    return (
        f"Differences of excesses in thousandths, 95% over hierarchies of all seeds and $p$: {said}." if parts else ""
    )
