"""N6: the learned components as images and as coordinates of digits, beside the predicted ones."""

import matplotlib.pyplot as plt
import numpy as np

from paper_figures import style

EXPERIMENT = "spectral_subspace"
CLASSES = (0, 1, 6)


def draw(result):
    """Images above, embeddings below: predicted, learned, learned without orthogonality, and a narrow network."""
    arrays, config = result.arrays, result.config
    series, z = config.series[0], config.features
    wide, narrow = f"M={series.widths[-1]:,}", f"M={series.widths[0]}"
    columns = (
        ("predicted", "wide/predicted", None),
        ("learned", "wide/learned", "wide/predicted"),
        ("norm held only", "norm/learned", "norm/predicted"),
        (f"narrow, ${narrow}$", "narrow/learned", "narrow/predicted"),
    )
    fig, axes = plt.subplots(2, len(columns), figsize=(style.DOUBLE, 4.1), height_ratios=(1, 1.7))
    for letter, (title, case, reference), (above, below) in zip("abcd", columns, axes.T, strict=True):
        images = arrays[f"picture/{case}/images"].reshape(z, 8, 8)
        limit = np.max(np.abs(arrays[f"picture/{reference or case}/images"]))
        gap = np.full((8, 1), np.nan)  # drawn as nothing
        row = np.concatenate([part for image in images for part in (image, gap)][:-1], axis=1)
        above.imshow(row, cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="nearest")
        above.set_xticks(3.5 + 9 * np.arange(z), [f"no. {k + 1}" for k in range(z)])
        above.set_yticks([])
        above.tick_params(length=0)
        above.grid(False)
        above.spines[:].set_visible(False)
        above.set_title(f"{letter}  {title}", color=style.CONTROL if letter in "cd" else "black")
        _embeddings(below, arrays, case, reference)
        below.set_xlabel("component 1")
    axes[1, 0].set_ylabel("component 2")
    axes[1, 0].legend(loc="upper right", handletextpad=0.1, labelspacing=0.2, borderaxespad=0)
    style.caption(
        fig,
        f"""N6. Two-layer tanh networks of width ${wide}$ (a to c) and ${narrow}$ (d). Above: components as images of
        8 × 8 pixels, the mean over the training anchors of an output's gradient; red positive, blue negative, on the
        scale of the prediction. Below: {config.pictured} digits of each of three classes, embedded by both components.
        a: bottom eigenvectors of $C$ at the start, from random features alone. b: $V$ and $W$ trained together until
        $t={series.steps * series.learning_rate:g}$, turned within the span of $W$ towards the prediction, which the
        loss does not see; grey rings are the prediction. Controls: with only the norm of $W$ held, both outputs learn
        one component (c); in a narrow network the features, and with them the components, have moved (d, rings: its
        own prediction). One seed.""",
    )
    return fig


def _embeddings(ax, arrays, case, reference):
    points, labels = arrays[f"picture/{case}/embeddings"], arrays["picture/labels"]
    if reference:
        rings = arrays[f"picture/{reference}/embeddings"]
        ax.plot(*rings[:, :2].T, linestyle="", marker="o", markersize=4, mfc="none", mec="#9A9A9A", mew=0.4, zorder=2)
    for index, digit in enumerate(CLASSES):
        ax.plot(
            *points[labels == digit, :2].T, label=str(digit), **style.series(index) | {"linestyle": "", "markersize": 2}
        )
