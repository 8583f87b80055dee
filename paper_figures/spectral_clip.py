"""S9: contrastive training on two modalities against CCA and kernel CCA, and what they retrieve."""

import matplotlib.pyplot as plt
import numpy as np

from paper_figures import style
from theorykit import verify

EXPERIMENT = "spectral_clip"
METHODS = ("CCA", "linear CLIP", "wide CLIP", "wide spectral", "kernel CCA")
PREDICTED = {"color": style.THEORY, "linestyle": style.DASHES, "linewidth": 0.9, "marker": "", "zorder": 4}
NULL = "#E9E9E9"


def draw(result):
    """Linear encoders against CCA (a, b), wide ones against kernel CCA (c), retrieval by all (d)."""
    arrays, config = result.arrays, result.config
    fig, ((angles, candidates), (steps, recall)) = plt.subplots(2, 2, figsize=(style.DOUBLE, 5.6))
    _angles(angles, arrays)
    angles.set_title("a  Linear encoders against canonical subspaces")
    if len(config.candidates) > 1:
        _candidates(candidates, arrays)
        candidates.set_title("b  CLIP nears CCA on Gaussian views")
    else:
        candidates.set_axis_off()
    _steps(steps, arrays)
    steps.set_title("c  Wide encoders against kernel CCA")
    _recall(recall, arrays, config)
    recall.set_title("d  Retrieval of the other half")
    later = "b: relative error of learnt scores with $K$ training pairs; Gaussian views: same covariance. "
    style.caption(
        fig,
        f"""S9. Left and right halves of digits as two modalities, {config.features} outputs, {config.pairs} training
        pairs that are all candidates of each other. a: principal angles between learnt and canonical subspaces of
        {config.components} whitened components; prediction 0, which the spectral loss reaches to
        {np.degrees(arrays["angles/spectral/digits"].max()):.0e} degrees; grey area: 95% of random subspaces.
        {later * (len(config.candidates) > 1)}c: overlap of the subspaces of held-out embeddings (1: equal), at the
        ridges that fit best; ReLU encoders of width {config.width}, kernel: NTK; grey area: 95% of
        {arrays["null/overlap"].size:,} random encoders. d: recall among {config.heldout}
        held-out rows in canonical coordinates; stopping times and ridges chosen on {config.validation} others.
        Controls, grey: trained on unmatched pairs; dashed in d: chance. Means over
        {config.seeds} seeds with 95% intervals.""",
    )
    return fig


def _angles(ax, arrays):
    component = np.arange(1, arrays["null/angles"].shape[1] + 1)
    low, high = np.degrees(np.quantile(arrays["null/angles"], (0.025, 0.975), axis=0))
    ax.fill_between(component, low, high, color=NULL, linewidth=0, zorder=0)
    ax.plot(component, np.zeros(len(component)), **PREDICTED, label="CCA")

    def band(loss, views, **look):
        style.band(ax, component, np.degrees(arrays[f"angles/{loss}/{views}"].mean(axis=1)), **look)

    band("spectral", "digits", label="spectral loss", **style.series(2) | {"linestyle": ""})
    band("CLIP", "digits", label="CLIP", **style.series(0))
    band("CLIP", "unmatched", label="control: CLIP, unmatched", **style.control(0))
    ax.set_xticks(component)
    ax.set_ylim(-3, 93)
    ax.set_yticks((0, 30, 60, 90))
    ax.legend(loc="upper left")
    ax.set_xlabel("principal angle, by size")
    ax.set_ylabel("angle (degrees)")


def _candidates(ax, arrays):
    style.log_axis(ax)
    style.widths_axis(ax, arrays["candidates"], "candidates $K$")
    style.band(ax, arrays["candidates"], arrays["sweep/Gaussian"], label="CLIP, Gaussian views", **style.series(5))
    style.band(ax, arrays["candidates"], arrays["sweep/digits"], label="CLIP, digits", **style.series(0))
    ax.legend(loc="lower left")
    ax.set_ylabel("relative error of scores")


def _steps(ax, arrays):
    steps = arrays["steps"][1:]

    def band(kind, encoders, **look):
        style.band(ax, steps, np.max(arrays[f"overlap/{kind}/{encoders}"], axis=-1)[:, 1:], **look)

    ax.set_xscale("log")
    band("kernel", "wide spectral/digits", label="spectral, with kernel CCA", **style.series(2))
    band("linear", "wide spectral/digits", label="spectral, with CCA", **style.series(4))
    band("kernel", "wide CLIP/digits", label="CLIP, with kernel CCA", **style.series(0))
    band("kernel", "wide spectral/unmatched", label="control: spectral, unmatched", **style.control(0))
    low, high = np.quantile(arrays["null/overlap"], (0.025, 0.975))
    ax.axhspan(low, high, color=NULL, linewidth=0, zorder=0)
    style.note(ax, steps[-1], low, "untrained, with kernel CCA", above=False)
    ax.axhline(1, **PREDICTED)
    ax.set_xticks(steps, [f"{step:,}" for step in steps])
    ax.minorticks_off()
    ax.set_ylim(0.28, 1.42)
    ax.set_yticks((0.4, 0.6, 0.8, 1.0))
    ax.legend(loc="upper left", labelspacing=0.2)
    ax.set_xlabel("training steps")
    ax.set_ylabel("subspace overlap")


def _recall(ax, arrays, config):
    style.log_axis(ax)
    places = np.arange(len(METHODS))
    for column, (k, look) in enumerate(((1, style.series(1)), (5, style.series(0)))):
        for view, shift, marks in (
            ("digits", 0.0, look | {"label": f"recall@{k}"}),
            ("unmatched", 0.0, style.control(column) | {"linestyle": "", "label": f"control, recall@{k}"}),
        ):
            samples = np.stack([arrays[f"recall/{method}/{view}"][:, column] for method in METHODS], axis=1)
            mean, low, high = verify.interval(samples, style.LEVEL)
            # A mean of few hits can have an interval that reaches below zero: cut where the axis ends.
            error = (mean - np.maximum(low, 1e-4), high - mean)
            ax.errorbar(places + shift, mean, error, **marks | {"linestyle": "", "elinewidth": 1.0})
        ax.axhline(k / config.heldout, **PREDICTED)
    ax.set_ylim(0.4 / config.heldout, 1.9)
    ax.set_xticks(places, [method.replace(" ", "\n") for method in METHODS])
    ax.set_xlim(-0.5, len(METHODS) - 0.5)
    ax.grid(False, axis="x")
    ax.legend(loc="upper left", ncols=2, columnspacing=1.0, handletextpad=0.2)
    ax.set_ylabel("recall on held-out rows")
