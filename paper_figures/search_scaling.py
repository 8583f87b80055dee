"""K1: operations of exact and graph search against their laws, and recall against the beam and the number of rows."""

import matplotlib.pyplot as plt
import numpy as np

from paper_figures import style

EXPERIMENT = "search_scaling"
GRAPH, EXACT = style.series(1), style.series(0)


def draw(result):
    """Operations against N and against the law; misses against the beam and against N."""
    arrays, config = result.arrays, result.config
    fig, axes = plt.subplots(2, 2, figsize=(style.DOUBLE, 4.9))
    (rows, law), (beam, size) = axes
    _rows(rows, arrays, config)
    _law(law, arrays, config)
    _beam(beam, arrays, config)
    _size(size, arrays, config)
    titles = (
        "Exact search grows as $N$, a graph does not",
        "exact search: $2\\,N\\,d\\,Q/P$",
        "recall",
        "recall at one beam",
    )
    for letter, ax, title in zip("abcd", axes.flat, titles, strict=True):
        ax.set_title(f"{letter}  {title}")
    over = f"$P$ devices: the one that has most to do, ${max(config.rows):,}$ rows in all. " if config.devices else ""
    memory = ", ".join(
        f"{held / 2**20:.0f} MiB against {naive / 2**20:,.0f} for all products at once ($N={n:,}$, $Q={q:,}$)"
        for (n, _, q), held, naive in zip(
            config.memory_sizes, arrays["memory/exact"], arrays["memory/at once"], strict=True
        )
    )
    work = arrays["exact/work"].mean(axis=0)
    style.caption(
        fig,
        f"""K1. Floating-point operations of matrix products, counted as they are executed, loops included; no times.
        Gaussian rows of dimension {config.dimension} in $R^d$, $d={config.d}$, $Q={config.queries}$ queries,
        $k={config.k}$, degree $R={config.degree}$; means over {config.seeds} seeds with 95% bands. a: each kind of
        search with its law, dashed: $2\\,N\\,d\\,Q$, and $2\\,d\\,Q\\,(E+{config.beam}\\,R)$ for beam {config.beam}
        with $E$ entry points. b: what exact search computes beside $2\\,N\\,d\\,Q/P$, relatively, one size changed at a
        time; the strip is where the claim fails. {over}Control, grey: graph search. c: share of the nearest rows that a
        search misses, $N={max(config.rows):,}$; dashed: the slowest fall claimed, fitted in height. d: the same at beam
        {config.beam}; the strip is where a claim of recall {config.recall:g} fails. Controls, grey: the same graphs
        with edges to random rows. Memory of the compiled exact
        search beyond arguments and results: {memory}. Its arithmetic outside products (minima, the comparison of the
        winners) is {np.min(work[:, 1] / work[:, 0]):.2f} to {np.max(work[:, 1] / work[:, 0]):.2f} of the products.""",
    )
    return fig


def _rows(ax, arrays, config):
    n = np.array(config.rows)
    style.log_axis(ax)
    style.widths_axis(ax, n, "rows $N$")
    exact = arrays["exact/work"][:, : len(n), 0]
    graph = arrays["graph/work"][..., 0]
    style.band(ax, n, exact, **EXACT)
    style.band(ax, n, graph, **GRAPH)
    per_row = 2.0 * config.d * config.queries
    style.law(ax, n, 1.0, (n[0], per_row * n[0]))
    predicted = per_row * (np.mean(arrays["entries"], axis=0) + config.beam * config.degree)
    ax.plot(n, predicted, color=style.THEORY, linestyle=style.DASHES, linewidth=0.9, marker="", zorder=4)
    style.note(ax, n[-1], 0.62 * exact[:, -1].mean(), "exact   ", color=EXACT["color"], above=False)
    style.note(ax, n[-1], predicted[-1], "graph", color=GRAPH["color"], above=False)
    ax.set_ylim(bottom=0.6 * min(exact.min(), graph.min()))
    ax.set_ylabel("operations")


def _law(ax, arrays, config):
    """Operations beside those of the law as a share of them, against the factor by which one size was changed."""
    style.log_axis(ax)
    points = arrays["points"].astype(float)
    beside = arrays["exact/work"][..., 0].mean(axis=0) / (2 * np.prod(points, axis=1)) - 1
    factors = points / points[0]
    for index, name in enumerate("NdQ"):
        others = np.delete(factors, index, axis=1)
        here = np.all(others == 1, axis=1)
        if np.sum(here) > 1:
            order = np.argsort(factors[here, index])
            x, y = factors[here, index][order], beside[here][order]
            ax.plot(x, y, label=f"${name}$", **style.series((0, 2, 4)[index]))
    longest = len(config.rows)
    if config.devices:
        parts = np.array(config.devices)
        share = 2.0 * max(config.rows) * config.d * config.queries / parts
        ax.plot(parts, arrays["devices/products"] / share - 1, label="devices $P$", **style.series(3))
    graph = np.abs(arrays["graph/work"][..., 0].mean(axis=0) / (2 * np.prod(points[:longest], axis=1)) - 1)
    ax.plot(factors[:longest, 0], graph, **style.control())
    style.note(ax, factors[longest - 1, 0], graph[0], "control: graph search", above=False)
    ax.set_ylim(top=2)
    ax.axhspan(config.overhead, 2, color="#E3E3E3", lw=0, zorder=0)
    ax.set_ylim(bottom=0.15 * beside.min())
    ax.set_xscale("log", base=2)
    widest = int(np.log2(max([*factors.ravel(), *config.devices])))
    ax.set_xticks(2.0 ** np.arange(widest + 1), [f"×{2**power}" for power in range(widest + 1)])
    ax.legend(loc="lower left", ncols=4, columnspacing=1, handlelength=1.4)
    ax.set_xlabel("factor of the size named, or $P$")
    ax.set_ylabel("beside the law, share")


def _beam(ax, arrays, config):
    style.log_axis(ax)
    ax.set_xscale("log")
    beams = np.array(config.beams)
    missed = 1 - arrays["beam/recall"]
    style.band(ax, beams, missed, **GRAPH)
    style.band(ax, beams, 1 - arrays["beam/random"], **style.control())
    middle = style.centre(beams, missed)
    style.law(ax, beams, -config.fall, middle)
    end = middle[1] * middle[0] / beams[-1]
    style.note(ax, beams[-1], 1.4 * end, "at least $1/$beam", color=style.THEORY)
    ax.set_xticks(beams, [str(beam) for beam in beams])
    ax.minorticks_off()
    ax.set_xlabel("beam (rows visited)")
    ax.set_ylabel(f"$1-$recall@{config.k}")
    style.note(ax, beams[-1], 1 - arrays["beam/random"][:, -1].mean(), "control: random edges", above=False)


def _size(ax, arrays, config):
    style.log_axis(ax)
    n = np.array(config.rows)
    style.widths_axis(ax, n, "rows $N$")
    style.band(ax, n, 1 - arrays["graph/recall"], **GRAPH)
    style.band(ax, n, 1 - arrays["graph/random"], **style.control())
    ax.set_ylim(top=1.4)
    ax.axhspan(1 - config.recall, 1.4, color="#E3E3E3", lw=0, zorder=0)
    style.note(ax, n[-1], 1 - config.recall, f"recall below {config.recall:g}", color=style.THEORY)
    ax.set_ylabel(f"$1-$recall@{config.k}, beam {config.beam}")
