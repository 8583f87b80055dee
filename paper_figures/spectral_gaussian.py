"""S9 and S10: linear CLIP and InfoNCE on Gaussian views reach their closed-form optima, at a rate that is known."""

import matplotlib.pyplot as plt
import numpy as np

from paper_figures import style

EXPERIMENT = "spectral_gaussian"
PREDICTED = {"color": style.THEORY, "linestyle": style.DASHES, "linewidth": 0.9, "marker": "", "zorder": 4}
POINTS = {"linestyle": ""}
TIGHT = {"labelspacing": 0.2, "handlelength": 1.4, "handletextpad": 0.5}


def draw(result):
    """Top: CLIP's weights, their distance from the limit, its directions. Bottom: InfoNCE's strengths; both limits."""
    arrays, config = result.arrays, result.config
    fig, axes = plt.subplots(2, 3, figsize=(style.DOUBLE, 5.0))
    _weights(axes[0, 0], arrays)
    _rate(axes[0, 1], arrays)
    _angles(axes[0, 2], arrays)
    _strengths(axes[1, 0], arrays)
    _approach(axes[1, 1], arrays)
    _limits(axes[1, 2], arrays)
    rows = config.rows * config.steps
    style.caption(
        fig,
        f"""S9 and S10. Linear encoders trained by stochastic descent on {rows:,} fresh pairs of views in four
        dimensions, {config.seeds} seeds, means with 95% bands. $K$ is the number of candidates. a: canonical weights of
        CLIP's scores in units of the canonical correlations; the limit is 1; dashed: exact optimum at that $K$. b: its
        distance from the limit; lines: exact; rings: trained; dashed: $K^{{-1}}$, height fitted. c: largest principal
        angle to the canonical directions, the larger one of both views; black: median and 0.1% quantile
        of random planes. d: strength of InfoNCE's modes at $K={config.candidates[-1]}$ against
        $r=\\mathrm{{Var}}(x-x^{{+}})/2\\mathrm{{Var}}(x)$; dashed: the limit. e: strength of a single surviving mode in
        units of the limit; dashed: exact. f: loss minus $\\ln K$ of one mode in the limit, by integration; dashed:
        closed form. Controls, grey: strong correlation, beyond $1/\\sqrt{{2}}$; latents that are not Gaussian.""",
    )
    return fig


def _candidates_axis(ax, arrays):
    style.widths_axis(ax, arrays["candidates"], "candidates $K$")


def _weights(ax, arrays):
    k = arrays["candidates"]
    for mode, rho in enumerate((0.5, 0.4)):
        label = rf"$\rho={rho}$"
        style.band(ax, k, arrays["clip/weights/gaussian"][..., mode], label=label, **style.series(mode) | POINTS)
        ax.plot(k, arrays["exact/clip/gaussian"][:, mode], **PREDICTED)
    strong = style.control(0) | POINTS
    style.band(ax, k, arrays["clip/weights/strong"][..., 0], label=r"$\rho=0.9$", **strong)
    ax.plot(k, arrays["exact/clip/strong"][:, 0], **PREDICTED)
    other = style.control(1) | POINTS
    style.band(ax, k, arrays["clip/weights/other"][..., 0], label=r"$\rho=0.5$, two-valued", **other)
    ax.axhline(1, color=style.THEORY, linewidth=0.7, marker="")
    _candidates_axis(ax, arrays)
    ax.legend(**TIGHT)
    ax.set_ylabel(r"canonical weight / $\rho$")
    ax.set_title("a  CLIP's weights tend to $\\rho$ …")


def _rate(ax, arrays):
    ax.set_xscale("log")
    style.log_axis(ax)
    for name, label, look in (("gaussian", r"$\rho=0.5$", style.series(0)), ("strong", r"$\rho=0.9$", style.control())):
        distance = np.abs(arrays[f"large/clip/{name}"] - 1)
        ax.plot(arrays["large"], distance, label=label, **look)
        if name == "gaussian":
            style.law(ax, arrays["large"], -1.0, style.centre(arrays["large"], distance))
        trained = np.abs(arrays[f"clip/weights/{name}"][..., 0].mean(axis=0) - 1)
        ax.plot(arrays["candidates"], trained, **look | POINTS | {"mfc": "none", "mew": 0.8, "markersize": 5})
        ax.plot(arrays["candidates"], np.abs(arrays[f"exact/clip/{name}"][:, 0] - 1), **look | {"marker": ""})
    ax.legend(loc="lower left", **TIGHT)
    ax.set(xlabel="candidates $K$", ylabel=r"$|$weight$/\rho-1|$")
    ax.set_title(r"b  … as $1/K$ if $\rho<1/\sqrt{2}$")


def _angles(ax, arrays):
    style.log_axis(ax)
    k = arrays["candidates"]
    style.band(ax, k, arrays["clip/angle/gaussian"], label="Gaussian", **style.series(0))
    style.band(ax, k, arrays["clip/angle/other"], label="not Gaussian", **style.control())
    for share in (0.5, 0.001):
        ax.axhline(
            np.quantile(arrays["null/angle"], share), color=style.THEORY, linewidth=0.7, linestyle=":", marker=""
        )
    _candidates_axis(ax, arrays)
    ax.legend(loc="center right", **TIGHT)
    ax.set_ylabel("largest principal angle")
    ax.set_title("c  Directions of CCA")


def _strengths(ax, arrays):
    r = np.linspace(0.15, 1.7, 200)
    ax.plot(r, np.maximum(2 / (np.sqrt(1 + 8 * r) - 1) - 1, 0), **PREDICTED)
    runs = {"gaussian": (0.8, 0.5, 0.2, -0.3), "single": (0.7, -0.2, -0.4, -0.6), "other": (0.8, 0.5, 0.2, -0.3)}
    looks = {"gaussian": style.series(0), "single": style.series(1), "other": style.control()}
    labels = {"gaussian": "Gaussian, three survive", "single": "Gaussian, one survives", "other": "two-valued latents"}
    for name, rho in runs.items():
        u = arrays[f"info_nce/strengths/{name}"][:, -1].mean(axis=0)
        ax.plot(1 - np.array(rho), u, label=labels[name], **looks[name] | POINTS | {"markersize": 4.5})
    ax.axvline(1, color=style.THEORY, linewidth=0.6, marker="")
    ax.legend(**TIGHT)
    ax.set(xlabel="$r$", ylabel="strength $u$")
    ax.set_title(r"d  InfoNCE: $r\geq1$ collapses")


def _approach(ax, arrays):
    k, limit = arrays["candidates"], 2 / (np.sqrt(1 + 8 * 0.3) - 1) - 1
    style.band(ax, k, arrays["info_nce/strengths/single"][..., 0] / limit, **style.series(1) | POINTS)
    ax.plot(k, arrays["exact/info_nce/single"][:, 0], **PREDICTED)
    ax.axhline(1, color=style.THEORY, linewidth=0.7, marker="")
    _candidates_axis(ax, arrays)
    ax.set_ylabel("strength / limit, $r=0.3$")
    ax.set_title("e  Approach to the limit")


def _limits(ax, arrays):
    sizes = (0.2, 0.5, 0.8, 1.1)
    for index, (kind, label) in enumerate((("clip", "CLIP, weight $m$"), ("info_nce", "InfoNCE, strength $u$"))):
        look = POINTS | {"markersize": 4.5}
        ax.plot(sizes, arrays[f"integral/{kind}/closed"], **PREDICTED)
        ax.plot(sizes, arrays[f"integral/{kind}/gaussian"], label=label, **style.series(index) | look)
        name = "two-valued latents" if index == 0 else None
        ax.plot(sizes, arrays[f"integral/{kind}/other"], label=name, **style.control() | look)
    ax.legend(**TIGHT)
    ax.set(xlabel="$m$ or $u$", ylabel=r"loss $-\ln K$, nats")
    ax.set_title("f  Limits by integration")
