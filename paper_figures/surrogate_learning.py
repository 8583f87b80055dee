"""L: excess risk, sufficiency and downstream losses of a pair of transformers along its training, exactly."""

import matplotlib.pyplot as plt
import numpy as np

from experiments import surrogate_learning as experiment
from experiments._hierarchy_clip import HEADS
from paper_figures import style
from theorykit import verify

EXPERIMENT = "surrogate_learning"
PREDICTED = {"color": style.THEORY, "linestyle": style.DASHES, "linewidth": 0.9, "marker": "", "zorder": 4}
SHOWN = experiment.SHOWN  # the K of training of the panels that show one
AMONG = experiment.COUNTS.index(64)  # K of the excess that panel d shows
MARKS = {"linestyle": "", "markersize": 3, "alpha": 0.6}


def draw(result):
    """Sum of excess and gap, factor, downstream losses; K of training, N of retrieval, errors of the identities.

    Below: heads, and gaps from draws.
    """
    arrays, config = result.arrays, result.config
    heights = {"height_ratios": (1, 1, 0.3)}  # three bars below
    fig, axes = plt.subplot_mosaic("abc;def;ggh", figsize=(style.DOUBLE, 6.4), gridspec_kw=heights)
    panels = (_sum, _factor, _tasks, _candidates, _retrieval, _errors, _heads, _draws)
    for ax, panel in zip(axes.values(), panels, strict=True):
        panel(ax, config, arrays)
    kept, frozen = (np.max(experiment.fractions(arrays, -2)), np.min(experiment.fractions(arrays, -1)))
    levels = " and ".join(f"{p:g}" for p in config.levels)
    style.caption(
        fig,
        f"""Exact losses, in nats, of learned scores on the 256 images and 256 texts of a hierarchy (alphabet 4, depth
        2, arity 2; noise $p$ = {levels}), at {len(config.checkpoints)} checkpoints of {config.steps} steps,
        {config.seeds} seeds (bands: 95%), for K = {", ".join(map(str, experiment.TRAINED))} candidates in training.
        Dashed: laws and bounds. Grey: controls. a: $S^{{y|x}}$ on the sum of $\\mathrm{{Excess}}_2$ and gap, which is
        summed over all candidates; one seed, p = {config.levels[0]:g}. b: $S$ (both directions) in units of
        $\\mathrm{{Excess}}_K$, with the bound $1+(2B-1)/(K-1)$; control: $1+1/K$. c: next tokens and integrated
        denoising lie on the line, labels below; control: the root as label. d: excess with 64 candidates, for each
        $K$ of training; crosses: with the text encoder of the start. e: the same after training, of retrieval among
        $N$, its limit $S$ and from $N=K$ on the bound $(N-1)/(K-1)\\,\\mathrm{{Excess}}_K$; control:
        $\\mathrm{{Excess}}_K$. f: errors of the identities (a, c), in units of the largest side, and what is required
        (in float32 and in units of the side itself, denoising reaches {_own(arrays):.1g}). g: excess with
        {experiment.TRAINED[SHOWN]} candidates after training with as many, for three
        heads{f" at p = {config.compared:g}" if config.compared else ""}; dots: seeds. h: the gap of
        {" and ".join(map(str, experiment.SAMPLED))} candidates from draws ({config.batches} times {config.drawn:,}
        candidates for each score) over $S-\\mathrm{{Excess}}_K$; dots: one seed at all checkpoints and $p$, bars: 99.9%
        of their mean; control: half as many candidates. Training leaves at most {kept:.2f} of the losses of the
        start; with the text encoder of the start at least {frozen:.2f} are left.""",
    )
    return fig


def _legend(ax, place, **options):
    ax.legend(loc=place, handlelength=1.4, borderpad=0.1, labelspacing=0.3, columnspacing=0.8, **options)


def _steps(ax, config):
    # Checkpoints thin out; the first is 0.
    ax.set_xscale("symlog", linthresh=config.checkpoints[1])
    ax.set_xticks(config.checkpoints, [str(step) for step in config.checkpoints])
    ax.set_xlabel("step")


def _sum(ax, config, arrays):
    """Of the first level, and the first seed."""
    style.log_axis(ax)
    _steps(ax, config)
    a = {name: arrays[f"double/{name}"][0] for name in ("S", "excess", "gap")}
    ax.plot(config.checkpoints, a["S"], label="$S^{y|x}$", **style.series(0) | {"linestyle": "", "markersize": 6})
    ax.plot(config.checkpoints, a["excess"], label="$\\mathrm{Excess}_2$", **style.series(1))
    ax.plot(config.checkpoints, a["gap"], label="gap", **style.series(2))
    ax.plot(config.checkpoints, a["excess"] + a["gap"], label="sum", **PREDICTED)
    _legend(ax, "lower left")
    ax.set_ylabel("nats")
    ax.set_title("a  $S$ is excess and gap")


def _factor(ax, config, arrays):
    style.log_axis(ax)
    _steps(ax, config)
    at = np.s_[0, SHOWN, :, :-1]
    bound = experiment.upper(arrays)[at] / arrays["excess"][at]
    ratio = arrays["sufficiency"][at][..., None] / arrays["excess"][at]
    for i, k in enumerate(experiment.COUNTS[:3]):
        style.band(ax, config.checkpoints, ratio[..., i], label=f"$K={k}$", **style.series(i))
        ax.plot(config.checkpoints, np.mean(bound[..., i], axis=0), **PREDICTED)
        ax.axhline(1 + 1 / k, label="control" if i == 0 else None, **style.control() | {"marker": "", "linewidth": 0.9})
    ax.set_ylim(0.95, 60)
    _legend(ax, "upper left", ncols=2)
    ax.set_ylabel("$S\\,/\\,\\mathrm{Excess}_K$")
    ax.set_title("b  The factor")


def _tasks(ax, config, arrays):
    ax.set_xscale("log")
    ax.set_yscale("log")
    forward = arrays["forward"]
    for name, look, label in (
        ("zero_shot_root", style.control(), "control: root"),
        ("zero_shot", style.series(2), "labels"),
    ):
        ax.plot(np.ravel(forward), np.ravel(arrays[name]), label=label, **look | MARKS)
    ax.plot(np.ravel(forward), np.ravel(np.sum(arrays["tokens"], axis=-1)), label="tokens", **style.series(0) | MARKS)
    denoised = (np.ravel(arrays[f"denoising/double/{name}"]) for name in ("S reverse", "integral"))
    ax.plot(*denoised, label="denoising", **style.series(1) | MARKS)
    ends = [1e-3, 2.0]
    ax.plot(ends, ends, **PREDICTED)
    _legend(ax, "upper left", handletextpad=0.1)
    ax.set_xlabel("$S$ of the task's direction")
    ax.set_ylabel("excess of the task")
    ax.set_title("c  Downstream losses")


def _candidates(ax, config, arrays):
    style.log_axis(ax)
    _steps(ax, config)
    excess = arrays["excess"][0, ..., AMONG]
    for i, k in enumerate(experiment.TRAINED):
        style.band(ax, config.checkpoints, excess[i, :, :-1], label=f"$K={k}$", **style.series(i))
        last = np.full(config.seeds, config.checkpoints[-1])
        marks = style.control() | {"linestyle": "", "markersize": 4}
        ax.plot(last, excess[i, :, -1], label="control" if i == 0 else None, **marks)
    _legend(ax, "lower left")
    ax.set_ylabel("$\\mathrm{Excess}_{64}$")
    ax.set_title(f"d  $K$ of training, $p={config.levels[0]:g}$")


def _retrieval(ax, config, arrays):
    ax.set_xscale("log", base=2)
    style.log_axis(ax)
    counts, last = np.array(experiment.COUNTS), np.s_[0, :, :, -2]
    for i, k in enumerate(experiment.TRAINED):
        style.band(ax, counts, arrays["excess"][last][i], label=f"$K={k}$", **style.series(i))
        limit = float(np.exp(np.mean(np.log(arrays["sufficiency"][last][i]))))
        ax.plot(counts[-1] * 2.0, limit, **style.series(i) | {"markersize": 6, "linestyle": ""})
    ax.annotate("$S$", (counts[-1] * 2.0, limit), (0, -11), textcoords="offset points", ha="center")
    for i, k in enumerate(experiment.TRAINED):
        own = float(np.exp(np.mean(np.log(arrays["excess"][last][i, :, experiment.COUNTS.index(k)]))))
        fine = np.geomspace(k, 5 * k)
        ax.plot(fine, (fine - 1) / (k - 1) * own, **PREDICTED)
        grey = style.control() | {"marker": "", "linewidth": 0.9}
        ax.plot([k, counts[-1]], [own, own], label="control" if i == 0 else None, **grey)
    ax.set_xticks(counts, [str(n) for n in counts])
    # Room for the legend below the series.
    ax.set_ylim(bottom=np.min(arrays["excess"][last]) / 3)
    _legend(ax, "lower right", ncols=2)
    ax.set_xlabel("$N$ of retrieval")
    ax.set_ylabel("$\\mathrm{Excess}_N$")
    ax.set_title("e  $N$ of retrieval")


def _own(arrays):
    """Largest relative error of denoising in float32, each checkpoint in its own units."""
    a, b = (arrays[f"denoising/single/{name}"] for name in ("integral", "S reverse"))
    return np.max(np.abs(a - b) / np.maximum(a, b))


def _errors(ax, config, arrays):
    ax.set_yscale("log")
    _steps(ax, config)
    # As the verdict has it: in units of the largest side of all checkpoints. Late losses are a thousandth of the first.
    worst = lambda a, b: np.max(np.abs(a - b), axis=0) / max(np.max(a), np.max(b))  # noqa: E731
    for part, look, label, required in (
        ("single", style.series(1), "float32", config.single),
        ("double", style.series(0), "float64", config.exact),
    ):
        a = {
            name: arrays[f"{part}/{name}"]
            for name in ("risk", "excess", "gap", "gap reverse", "S", "S reverse", "tokens")
        }
        sums = [1 + value / a["risk"] for value in (a["S"], a["excess"] + a["gap"], a["excess"] + a["gap reverse"])]
        if part == "single":
            ax.plot(config.checkpoints, worst(sums[0], sums[2]), label="control", **style.control())
            ax.plot(config.checkpoints, worst(a["tokens"], a["S reverse"]), **style.control(1))
        # Where both sides agree to the last bit, the point is drawn at half a rounding.
        least = np.finfo(np.float32 if part == "single" else np.float64).eps / 2
        ax.plot(config.checkpoints, np.maximum(worst(sums[0], sums[1]), least), label=f"sum, {label}", **look)
        tokens = np.maximum(worst(a["tokens"], a["S"]), least)
        ax.plot(config.checkpoints, tokens, label=f"tokens, {label}", **look | {"marker": "s", "linestyle": "-."})
        a = {name: arrays[f"denoising/{part}/{name}"] for name in ("integral", "S reverse")}
        denoised = np.maximum(worst(a["integral"], a["S reverse"]), least)
        ax.plot(config.checkpoints, denoised, label=f"denoising, {label}", **look | {"marker": "^", "linestyle": ":"})
        ax.axhline(required, **PREDICTED)
    ax.set_ylim(1e-17, 1e12)
    _legend(ax, "upper left", ncols=2, fontsize="xx-small")
    ax.set_ylabel("error / largest side")
    ax.set_title("f  Identities")


def _heads(ax, config, arrays):
    ax.set_title("g  Heads")
    if "heads/excess" not in arrays:  # not compared at this preset
        ax.set_axis_off()
        return
    excess = arrays["heads/excess"][..., SHOWN]
    ax.barh(list(HEADS), np.mean(excess, axis=1), color=style.series(0)["color"], alpha=0.4)
    for i, of_head in enumerate(excess):
        ax.plot(of_head, np.full(len(of_head), i), color=style.THEORY, marker="o", linestyle="", markersize=2)
    ax.set_xlabel(f"$\\mathrm{{Excess}}_{{{experiment.COUNTS[SHOWN]}}}$, nats")


def _draws(ax, config, arrays):
    ax.set_title("h  The gap, from draws")
    rows = []
    for which, look in (("gap", style.series(2)), ("half", style.control())):
        for i, k in enumerate(experiment.SAMPLED):
            found = experiment.quotients(arrays, which)[:, :, i]
            y = len(rows)
            of_steps = np.ravel(np.mean(found, axis=-1))
            ax.plot(of_steps, np.full(of_steps.size, y), **look | {"linestyle": "", "markersize": 2, "alpha": 0.6})
            _, low, high = verify.interval(np.mean(found, axis=(0, 1)), verify.LEVEL)
            ax.plot([low, high], [y, y], color=style.THEORY, linewidth=1.6, marker="")
            rows.append(f"$K={k}$" if which == "gap" else f"control, {k}")
    ax.axvline(1, **PREDICTED)
    ax.set_yticks(range(len(rows)), rows)
    ax.set_xlabel("gap / ($S-$excess)")
