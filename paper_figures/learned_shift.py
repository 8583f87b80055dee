"""Learned tasks under a shift of p, in both modalities and in one, beside the mis-specified Bayes answers."""

import matplotlib.pyplot as plt

from experiments import _task_verdicts as judged
from paper_figures import style

EXPERIMENT = "learned_tasks"
MISSPECIFIED = {"color": style.THEORY, "linestyle": style.DASHES, "linewidth": 0.9, "marker": "", "zorder": 4}
TITLES = {"both": "both shifted", "image": "image shifted", "text": "text shifted"}


def draw(result):
    """A row for each kind of shift, a column for each task: excess over Bayes of the shifted hierarchy."""
    arrays, config = result.arrays, result.config
    tasks, kinds = judged.measured_tasks(arrays), tuple(judged.KINDS)
    shape = (len(kinds), len(tasks))
    fig, axes = plt.subplots(*shape, figsize=(style.DOUBLE, 5.8), sharex=True, sharey="col", squeeze=False)
    for row, kind in enumerate(kinds):
        for column, task in enumerate(tasks):
            ax = axes[row, column]
            excess = arrays[f"shift/{kind}/excess/{task}/value"]
            for index, name in judged.shown(excess.shape[1]):
                style.band(ax, config.shifted, excess[:, index], label=name, **style.series(index))
            ax.plot(config.shifted, arrays[f"shift/{kind}/train/{task}/value"].mean(axis=0), **MISSPECIFIED)
            ax.axvline(judged.REFERENCE, color=style.CONTROL, linestyle=":", linewidth=0.8)
            if row == 0:
                ax.set_title(f"{'abcd'[column]}  {judged.NAMES[task].capitalize()}")
            if row == len(kinds) - 1:
                ax.set_xlabel("$p$ of the samples")
            if column == 0:
                ax.set_ylabel(f"{TITLES[kind]}\nexcess over Bayes")
    handles = {text: line for ax in axes[0] for line, text in zip(*ax.get_legend_handles_labels(), strict=True)}
    (dashed,) = axes[0, 0].plot([], [], **MISSPECIFIED)
    handles = {"Bayes of training": dashed} | handles
    fig.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=len(handles))
    style.caption(
        fig,
        f"""Distribution shift. Members trained at $p={judged.REFERENCE}$ (dotted line) are tested on
        {config.samples:,} samples of hierarchies with the same permutations and noise kernels but another $p$, in both
        trees or in one. What they lose against Bayes of the shifted hierarchy, nats and, for denoising, mean square.
        Dashed: the mis-specified Bayes, exact message passing with the $p$ of training; it is what perfect learning at
        that $p$ gives. Means over {config.seeds} seeds with 95% bands.""",
    )
    return fig
