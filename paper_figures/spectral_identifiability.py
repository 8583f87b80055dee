"""S12, S13: when contrastive learning inverts the generator, and what separates sources of equal variance."""

import matplotlib.pyplot as plt
import numpy as np

from experiments.spectral_identifiability import FOLDED, MATCHED, OFFSET, Case
from paper_figures import style

EXPERIMENTS = ("spectral_identifiability", "spectral_sources")
# Above the axis, what is compared; then the data, and whether it is a claim.
ROWS = (
    ("FastICA", "fastica/laplace", True),
    ("  Gaussian sources", "fastica/gaussian", False),
    ("  PCA instead", "pca/laplace", False),
    ("TCL", "tcl/linear", True),
    ("  scales do not change", "tcl/stationary", False),
    ("TCL, nonlinear mixing", "tcl/nonlinear", True),
    ("  FastICA instead", "fastica/tcl", False),
    ("  PCA instead", "pca/tcl", False),
    ("PCL", "pcl/linear", True),
    ("  Gaussian memory", "pcl/gaussian", False),
    ("  no memory", "pcl/memoryless", False),
    ("PCL, nonlinear mixing", "pcl/nonlinear", True),
    ("  FastICA instead", "fastica/pcl", False),
    ("  PCA instead", "pca/pcl", False),
)
LOWEST = 1e-5  # of panels a and b, with room for their legends
FOLD = 0.3  # half the distance of a map that loses one of three directions, sqrt(1/3)


def draw(sphere, sources):
    """Above, f(g(z)) against K and tau kappa; below, PCA against its prediction, and the MCC of all methods."""
    config = sphere.config
    fig = plt.figure(figsize=(style.DOUBLE, 6.2))
    upper, lower = fig.subfigures(2, 1, height_ratios=(1, 1.25))
    panels = upper.subplots(1, 3)
    if config.ratios:
        _candidates(panels[0], sphere)
        _temperatures(panels[1], sphere)
        _scale(panels[2], sphere)
    else:
        for ax in panels:
            ax.set_axis_off()
    left, right = lower.subplots(1, 2, width_ratios=(1, 1.3))
    _noise(left, sources.arrays)
    _recovered(right, sources)
    style.caption(
        fig,
        f"""S12 (a to c). Latents uniform on the sphere in $d={config.dimension}$ dimensions, partners von Mises-Fisher
        of concentration $\\kappa={config.concentration:g}$, InfoNCE at temperature $\\tau$ with $K$ candidates (64 in b
        and c), {config.steps} steps. Distance: of the best affine map from latents to embeddings from the orthogonal
        maps, after scaling; a fold loses one direction. Dash-dotted, open marks: $1-R^2$ of the best affine map back.
        {_explained(sphere)} {_folds(sphere)} S13 (d, e).
        {sources.config.sources} sources of variance 1,
        {sources.config.segments * sources.config.length} times. d:
        {sources.arrays["unrecovered/pca/equal"].size} draws; curves: eigenvectors of the sampling noise, and
        random rotations. e: mean correlation coefficient with the sources (FastICA), their absolute values (TCL), by
        ranks (PCL); linear mixing unless said otherwise; shaded: recovered; grey: controls; dots: seeds, at most
        {sources.config.seeds} shown. Bands: means over {config.seeds} seeds with 95% intervals; thin lines: seeds.""",
    )
    return fig


def _explained(sphere):
    """Shares of variance at the matched temperature."""
    column = sphere.config.cases().index(MATCHED)
    learnt = 1 - np.mean(sphere.arrays["unexplained"][:, column])
    observed = 1 - np.mean(sphere.arrays["observations/unexplained"])
    return (
        f"At $\\tau\\kappa=1$ embeddings explain {100 * learnt:.2f}% of the latents' variance by an affine map, "
        f"observations {100 * observed:.0f}%."
    )


def _folds(sphere):
    """What became of starts in a half-space, if the preset has them."""
    cases = sphere.config.cases()
    if OFFSET not in cases:
        return ""
    distance = sphere.arrays["distance"][:, cases.index(OFFSET)]
    count = int(np.sum(distance > FOLD))
    return f"Of {len(distance)} starts with embeddings in a half-space, {count} fold at $\\tau\\kappa=1$."


def _columns(sphere, name, cases):
    """(seeds, cases) of one measure."""
    every = sphere.config.cases()
    return sphere.arrays[name][:, [every.index(case) for case in cases]]


def _untrained(ax, sphere, side):
    """Level of the untrained encoder, with its name on one side."""
    level = np.exp(np.mean(np.log(sphere.arrays["untrained/distance"])))
    ax.axhline(level, color=style.CONTROL, linewidth=0.8, linestyle="-", marker="")
    place = {"ha": side, "va": "top", "transform": ax.get_yaxis_transform()}
    ax.text({"left": 0.02, "right": 0.98}[side], 0.9 * level, "untrained", color=style.CONTROL, fontsize=7, **place)


def _unexplained(ax, x, samples, look):
    """1 - R^2 of the best affine map back to the latents, thinner and with open marks beside the distance."""
    style.band(ax, x, samples, **look | {"linestyle": "-.", "linewidth": 0.7, "mfc": "none", "mew": 0.7})


def _candidates(ax, sphere):
    candidates = sphere.config.candidates
    ax.set_yscale("log")
    style.widths_axis(ax, candidates, "candidates $K$")
    for base, label, look in (
        (MATCHED, r"$\tau\kappa=1$", style.series(0)),
        (FOLDED, r"$\tau\kappa=1/8$", style.control()),
    ):
        cases = [base._replace(candidates=k) for k in candidates]
        style.band(ax, candidates, _columns(sphere, "distance", cases), label=label, **look)
        _unexplained(ax, candidates, _columns(sphere, "unexplained", cases), look)
    _untrained(ax, sphere, "left")
    ax.set_ylim(LOWEST, 2)
    ax.set_ylabel("distance; $1-R^2$ (open)")
    ax.legend(loc="lower left")
    ax.set_title("a  Matched: at every $K$")


def _temperatures(ax, sphere):
    ratios = sphere.config.ratios
    ax.set_yscale("log")
    _ratio_axis(ax, ratios)
    for extra, label, look in ((1, "$d+1$ outputs", style.series(1)), (0, "$d$ outputs", style.series(0))):
        cases = [Case(ratio, extra) for ratio in ratios]
        style.band(ax, ratios, _columns(sphere, "distance", cases), label=label, **look)
        _unexplained(ax, ratios, _columns(sphere, "unexplained", cases), look)
    _untrained(ax, sphere, "right")
    ax.set_ylim(LOWEST, 2)
    ax.legend(loc="lower left")
    ax.set_title("b  Too sharp: one output more")


def _scale(ax, sphere):
    ratios = np.asarray(sphere.config.ratios)
    ax.set_yscale("log", base=2)
    _ratio_axis(ax, ratios)
    for extra, look in ((1, style.series(1)), (0, style.control())):
        scale = _columns(sphere, "scale", [Case(ratio, extra) for ratio in ratios])
        style.band(ax, ratios, scale, label=f"$d{'+1' * extra}$ outputs", **look | {"linestyle": "" if extra else ":"})
    ax.plot(
        ratios,
        np.minimum(ratios, 1),
        color=style.THEORY,
        linestyle=style.DASHES,
        linewidth=0.9,
        marker="",
        zorder=4,
        label=r"$\min(\tau\kappa,1)$",
    )
    ax.set_yticks([1 / 16, 1 / 8, 1 / 4, 1 / 2, 1], ["1/16", "1/8", "1/4", "1/2", "1"])
    ax.set_ylabel("squared scale")
    ax.legend(loc="lower right")
    ax.set_title(r"c  and the scale is $\sqrt{\tau\kappa}$")


def _ratio_axis(ax, ratios):
    ax.set_xscale("log", base=2)
    ax.set_xticks(ratios, [f"{r:g}" if r >= 1 else f"1/{1 / r:g}" for r in ratios])
    ax.set_xlabel(r"$\tau\kappa$")


def _noise(ax, arrays):
    """Distributions of PCA's MCC."""
    bins = np.linspace(0.5, 1, 26)
    for name, look in (("equal", style.COLOURS[0]), ("unequal", style.CONTROL)):
        ax.hist(1 - arrays[f"unrecovered/pca/{name}"], bins, density=True, color=look, alpha=0.45)
    middle = (bins[1:] + bins[:-1]) / 2
    for name, colour, dashes in (("predicted", style.THEORY, style.DASHES), ("rotations", style.COLOURS[1], "-")):
        density = np.histogram(arrays[f"pca/{name}"], bins, density=True)[0]
        ax.plot(middle, density, color=colour, linestyle=dashes, linewidth=1.0, marker="")
    ax.set_ylim(0, 11)
    ax.set_xlabel("MCC of PCA")
    ax.set_ylabel("density")
    for i, (text, colour) in enumerate(
        (
            ("equal variances", style.COLOURS[0]),
            ("predicted: sampling noise", style.THEORY),
            ("random rotations", style.COLOURS[1]),
            ("control: unequal", style.CONTROL),
        )
    ):
        ax.text(0.03, 0.97 - 0.08 * i, text, color=colour, fontsize=7, va="top", transform=ax.transAxes)
    ax.set_title("d  PCA sees only sampling noise")


def _recovered(ax, sources):
    """MCC of every method on every kind of data, seed by seed."""
    limit = 1 - sources.config.unrecovered
    ax.axvspan(limit, 1, color="#E3E3E3", lw=0, zorder=0)
    for row, (_, data, is_claim) in enumerate(ROWS):
        mcc = 1 - sources.arrays[f"unrecovered/{data}"]
        look = style.series(0 if data.startswith("fastica") else 2 if data.startswith("tcl") else 3)
        look = look if is_claim else style.control()
        ax.plot(
            mcc[: sources.config.seeds],
            np.full(len(mcc), row)[: sources.config.seeds],
            ".",
            color=look["color"],
            alpha=0.45,
            markersize=3.5,
        )
        ax.plot([mcc.mean()], [row], color=look["color"], marker=look["marker"], markersize=4.5, linestyle="")
    for tick, (_, _, is_claim) in zip(ax.set_yticks(range(len(ROWS)), [row[0] for row in ROWS]), ROWS, strict=True):
        tick.label1.set_color(style.THEORY if is_claim else style.CONTROL)
    ax.set_ylim(len(ROWS) - 0.5, -0.5)
    ax.set_xlim(0, 1.02)
    ax.tick_params(axis="y", length=0)
    ax.grid(False, axis="y")
    ax.set_xlabel("MCC")
    ax.set_title("e  Shape, scales, memory separate")
