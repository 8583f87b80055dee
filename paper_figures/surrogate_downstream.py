"""D1 to D5: each downstream loss against the sufficiency that equals or bounds it."""

import matplotlib.pyplot as plt
import numpy as np

from experiments import _downstream as problems
from experiments import surrogate_downstream as experiment
from paper_figures import style

EXPERIMENT = "surrogate_downstream"
SMALLEST = 1e-6  # nats; what is smaller is drawn there
PREDICTED = {"color": style.THEORY, "linestyle": style.DASHES, "linewidth": 0.9, "marker": "", "zorder": 4}
DRAWN = 400  # instances, of each panel
FEW = 60  # where each is a line, or three large marks


def draw(result):
    """Identities: tokens, denoising, retrieval, dropped factor. Bounds: labels, one noise level, counts, first hit."""
    arrays, config = result.arrays, result.config
    fig, axes = plt.subplots(3, 3, figsize=(style.DOUBLE, 7.4))
    for ax, panel in zip(
        axes.flat, (_tokens, _integral, _levels, _labels, _retrieval, _factors, _first, _dropped, _pairs), strict=True
    ):
        panel(ax, arrays)
    level, tail, labels, sharp, growth, first = (
        next(v.details["tightness_max"] for v in result.verdicts if v.claim == name)
        for name in ("D2.level", "D2.tail", "D3.labels", "D4.sharp", "D4.growth", "D4.first")
    )
    style.caption(
        fig,
        f"""D1 to D5, exact, in nats. {config.instances:,} joints of {problems.SIZE} images and texts (dense,
        concentrated, with zeros, few partners, hierarchies), scores from near $\\ln\\,r$ to far; at most {DRAWN} drawn
        per series. Dashed: equality or bound; points should lie on it (a, b, h) or below it. Grey: controls. a: excess
        of next tokens; control: $S^{{x|y}}$ as abscissa. b: excess of denoising, integrated over the signal-to-noise
        ratio $g$, {config.denoised} joints, a third with empty cells; control: $S^{{y|x}}$. c: the same excess at one
        $g$, as a fraction of its bounds ($D$: diameter); faint: {FEW} joints, bold: the largest of all; control:
        $S^{{y|x}}$ as bound. d: zero-shot labels; control: the root of the hierarchy as label. e: excess of retrieval
        among $N$, by listing all candidates ($N=3$, on the line), against $K\\geq\\,N$, and against $S^{{y|x}}$;
        control: $N>K$. f: $S$ in units of the excess risk with two candidates against its upper bounds, with $B$ the
        largest of $r$ and $w$, and $1/B'$ the least of $w$ (bounds beyond $10^9$ not drawn); control: $B$ in place of
        $2B$. g: excess error of the first hit among $N$; control: images as candidates. h: $S$, tokens and labels
        after dropping a factor, against its information, {FEW} joints; control: dependent factors. i: relative change
        of all losses as the encoders
        $f,g$ become $Pf,P^{{-T}}g$; control: only $f$ changes. Largest value over bound: {level:.3f} and {tail:.3f}
        (c), {labels:.3f} (d), {sharp:.4f} (f), {growth:.2f} ($(N-1)/(K-1)$, not drawn), {first:.2f} (g).""",
    )
    return fig


def _scatter(ax, x, y, look, *, label=None):
    x, y = np.ravel(x), np.ravel(y)
    kept = np.random.default_rng(0).permutation(x.size)[:DRAWN]
    marks = look | {"linestyle": "", "markersize": 2.2, "alpha": 0.55}
    ax.plot(np.maximum(x[kept], SMALLEST), np.maximum(y[kept], SMALLEST), label=label, **marks)


def _losses(ax, low=SMALLEST, high=20.0):
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.plot([low / 2, high], [low / 2, high], **PREDICTED)
    ax.set_xlim(low / 2, high)
    ax.set_ylim(low / 2, high)
    ax.set_xticks(10.0 ** np.arange(np.log10(low), 2, 2))
    ax.set_yticks(10.0 ** np.arange(np.log10(low), 2, 2))


def _legend(ax, place="upper left"):
    ax.legend(loc=place, handletextpad=0.1, borderpad=0.1, labelspacing=0.3, markerscale=1.6, handlelength=1.4)


def _tokens(ax, arrays):
    tokens = np.sum(arrays["tokens"], axis=1)
    _losses(ax)
    _scatter(ax, arrays["S reverse"], tokens, style.control(), label="control: reverse")
    _scatter(ax, arrays["S"], tokens, style.series(0))
    _legend(ax)
    ax.set_xlabel("$S^{y|x}$")
    ax.set_ylabel("excess of next tokens")
    ax.set_title("a  Next tokens (D1)")


def _integral(ax, arrays):
    _losses(ax)
    _scatter(ax, arrays["D2/S"], arrays["D2/integral"], style.control() | {"markersize": 4}, label="control: forward")
    _scatter(ax, arrays["D2/S reverse"], arrays["D2/integral"], style.series(1))
    _legend(ax)
    ax.set_xlabel("$S^{x|y}$")
    ax.set_ylabel("integrated excess")
    ax.set_title("b  Denoising (D2)")


def _levels(ax, arrays):
    above, _, shown = experiment.revealed(arrays)
    ratios, profile = arrays["D2/ratios"][shown], arrays["D2/profile"][:, shown]
    half_square = (experiment.POINTS[-1] - experiment.POINTS[0]) ** 2 / 2
    x = ratios * 2 * half_square
    ax.set_xscale("log")
    style.log_axis(ax)
    for limit, look, label in (
        (arrays["D2/S"][:, None] * half_square, style.control(), "control: forward $S$"),
        (arrays["D2/S reverse"][:, None] * half_square, style.series(1), "$(D^2/2)\\,S^{x|y}$"),
        (above[:, shown] * half_square, style.series(2), "$(D^2/4)\\int_g^\\infty$"),
    ):
        fraction = profile / limit
        ax.plot(x, np.max(fraction, axis=0), label=label, **look | {"markevery": 20})
        ax.plot(x, fraction[:FEW].T, color=look["color"], linewidth=0.3, alpha=0.35, marker="", zorder=1)
    ax.axhline(1, **PREDICTED)
    ax.set_ylim(1e-5, 3e2)
    _legend(ax, "lower left")
    ax.set_xlabel("$g\\,D^2$")
    ax.set_ylabel("excess / bound")
    ax.set_title("c  At one level (D2)")


def _labels(ax, arrays):
    _losses(ax)
    rooted = arrays["kind"] == problems.KINDS.index("hierarchy")
    _scatter(ax, arrays["S"][rooted], arrays["labels"][rooted, 1], style.control(), label="control: root")
    _scatter(ax, arrays["S"], arrays["labels"][:, 0], style.series(2))
    _legend(ax, "lower right")
    ax.set_xlabel("$S^{y|x}$")
    ax.set_ylabel("excess of zero-shot labels")
    ax.set_title("d  Zero-shot labels (D3)")


def _retrieval(ax, arrays):
    excess, (fewer, more) = arrays["excess"], experiment.pairs_of_counts()
    _losses(ax)
    _scatter(ax, excess[:, more[1]], excess[:, more[0]], style.control(), label="control: $N>K$")
    _scatter(ax, excess[:, fewer[1]], excess[:, fewer[0]], style.series(5), label="$N<K$")
    _scatter(ax, np.broadcast_to(arrays["S"][:, None], excess.shape), excess, style.series(2), label="against $S$")
    listed = excess[:, experiment.COUNTS.index(experiment.LISTED)]
    _scatter(ax, listed, arrays["lists"], style.series(0), label="$N=K$, listed")
    _legend(ax)
    ax.set_xlabel("$\\mathrm{Excess}_K$, or $S^{y|x}$")
    ax.set_ylabel("excess among $N$")
    ax.set_title("e  Retrieval among $N$ (D4)")


def _factors(ax, arrays):
    ratio, two = arrays["S"] / arrays["excess"][:, 0], np.s_[:, 0]  # K = 2
    ax.set_xscale("log")
    ax.set_yscale("log")
    for bound, look, label in (
        (experiment.loose_factor(arrays), style.series(4), "$1+4B^3B'/K$"),
        (experiment.sharp_factor(arrays, "half"), style.control(), "control: $1+(B-1)/(K-1)$"),
        (experiment.sharp_factor(arrays), style.series(3), "$1+(2B-1)/(K-1)$"),
    ):
        _scatter(ax, bound[two], ratio, look, label=label)
    ax.plot([1, 30], [1, 30], **PREDICTED)
    ax.set_xlim(0.8, 1e9)
    ax.set_ylim(0.9, 200)
    ax.set_xticks(10.0 ** np.arange(0, 10, 2))
    _legend(ax, "upper right")
    ax.set_xlabel("upper bound, $K=2$")
    ax.set_ylabel("$S\\,/\\,\\mathrm{Excess}_K$")
    ax.set_title("f  Constants of T4")


def _first(ax, arrays):
    _losses(ax, 1e-4, 5)
    root = np.sqrt(2 * np.maximum(arrays["excess"], 0))
    made = arrays["misses"] > 1e-12  # most scores rank as ln r does: rounding is left out
    _scatter(ax, root[made[:, 1]], arrays["misses"][:, 1][made[:, 1]], style.control(), label="control: images")
    _scatter(ax, root[made[:, 0]], arrays["misses"][:, 0][made[:, 0]], style.series(0))
    ax.set_xticks(10.0 ** np.arange(-4, 1))
    ax.set_yticks(10.0 ** np.arange(-4, 1))
    _legend(ax)
    ax.set_xlabel("$(2\\,\\mathrm{Excess}_N)^{1/2}$")
    ax.set_ylabel("excess error of first hit")
    ax.set_title("g  First hit (D4)")


def _dropped(ax, arrays):
    _losses(ax, 1e-3, 2)
    for which, looks in (("dependent", [style.control(i) for i in range(3)]), ("independent", None)):
        prefix, looks = f"D5/{which}", looks or [style.series(i) for i in (0, 1, 2)]
        lost = arrays[f"{prefix}/information"]
        values = (arrays[f"{prefix}/S"], arrays[f"{prefix}/tokens"][:, 1], arrays[f"{prefix}/labels"])
        for name, value, look, size in zip(("$S$", "tokens", "labels"), values, looks, (4.5, 3, 1.5), strict=True):
            label = name if which == "independent" else None
            marks = look | {"linestyle": "", "markersize": size, "alpha": 0.7, "label": label}
            ax.plot(lost[:FEW], value[:FEW], **marks)
    _legend(ax, "lower right")
    ax.set_xticks(10.0 ** np.arange(-3, 1))
    ax.set_yticks(10.0 ** np.arange(-3, 1))
    ax.set_xlabel("information of the factor")
    ax.set_ylabel("loss")
    ax.set_title("h  A factor dropped (D5)")


def _pairs(ax, arrays):
    given = arrays["D5/pair/given"]
    ax.set_xscale("log")
    bins = np.geomspace(1e-17, 10, 55)
    for which, label, look in (
        ("one side", "control", {"color": style.CONTROL, "histtype": "step", "linestyle": ":", "linewidth": 1.3}),
        ("changed", "both encoders", {"color": style.COLOURS[0]}),
    ):
        size = np.maximum(np.abs(given), np.abs(arrays[f"D5/pair/{which}"]))
        change = np.abs(arrays[f"D5/pair/{which}"] - given) / np.where(size > 0, size, 1)
        change = np.clip(change.ravel(), bins[0], bins[-1])
        ax.hist(change, bins, weights=np.full(change.size, 1 / change.size), label=label, **look)
    ax.legend(loc="upper center")
    ax.set_xticks(10.0 ** np.arange(-16, 1, 4))
    ax.set_xlabel("relative change of a loss")
    ax.set_ylabel("share")
    ax.set_title("i  Encoders changed (D5)")
