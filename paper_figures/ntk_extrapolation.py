"""N9: along rays from the origin ReLU networks and their NTK regression become linear, at different rates."""

import matplotlib.pyplot as plt
import numpy as np

from paper_figures import style

EXPERIMENT = "ntk_extrapolation"
NAMES = {"relu": "ReLU", "gelu": "GELU", "erf": "erf"}
CONTROL, MAIN = "erf-2", "relu-2"
OUTSIDE = 8.0  # where fits begin
EXPONENTS = {"kernel": (-2.0, "$r^{-2}$"), "network": (-1.5, "$r^{-3/2}$")}


def draw(result):
    """Deviation from linearity against the radius, and the fitted exponents: regression above, networks below."""
    config = result.config
    fig, axes = plt.subplots(2, 2, figsize=(style.DOUBLE, 6.4), width_ratios=(1.25, 0.8), sharex="col")
    rows = {"kernel": config.kernels, "network": tuple(config.networks)}
    for (left, right), (kind, architectures) in zip(axes, rows.items(), strict=True):
        _deviations(left, result, kind, architectures)
        _exponents(right, result, kind, architectures)
    axes[0, 0].sharey(axes[1, 0])
    axes[1, 0].set_xlabel("radius $r$, in units of the data's")
    axes[0, 0].set_title("a  NTK regression becomes linear as $r^{-2}$")
    axes[1, 0].set_title("b  Networks keep the kinks of their start: $r^{-3/2}$")
    axes[0, 1].set_title("c  fitted exponents, $r\\geq8$")
    widths = ", ".join(f"{width:,} ({_name(name)})" for name, width in config.networks.items())
    last, expected = np.median(result.arrays["kinks"]), config.networks[MAIN] / (np.pi * np.log(2))
    style.caption(
        fig,
        f"""N9. Relative second difference $D(r)=|g(2r)-2g(3r/2)+g(r)|/|g(2r)-g(r)|$ of predictors $g(r)=f(ru)$ along
        rays, root mean squares over {config.directions} random directions $u$: 0 where $f$ is linear. Trained on
        {config.points} points with $r\\leq1$ (grey) in {config.dimension} dimensions, targets quadratic, where
        $D=1/6$. a: kernel regression with the infinite-width NTK; b: networks of width {widths}, with biases, after
        {config.steps:,} steps of gradient descent with momentum. Geometric means over {config.seeds} seeds with 95%
        bands. Dashed: predicted slopes, height fitted; in b for ReLU, 2 layers, the deviation of infinitely wide
        networks, nothing fitted. Beyond its last kink, at a median radius of {last:.0f}, at the start predicted as
        $M/(\\pi\\,\\ln2)={expected:.0f}$, that network is exactly linear. c: fits with 99.9% intervals; strips are what
        counts as agreement. Controls, grey: erf units, which saturate ($D\\to1/3$ in a), and radii inside the data.""",
    )
    return fig


def _deviations(ax, result, kind, architectures):
    arrays, radii = result.arrays, result.arrays["radii"]
    ax.set_xscale("log", base=2)
    style.log_axis(ax)
    ax.axvspan(radii[0], 1, color="#F0F0F0", lw=0, zorder=0)
    far = radii >= OUTSIDE
    exponent, label = EXPONENTS[kind]
    for index, name in enumerate(architectures):
        style.band(ax, radii, arrays[f"{kind}/{name}"], label=_name(name), **style.series(index))
        if kind == "network" and name == MAIN:
            _curve(ax, radii[far], arrays["predicted/network"])
        else:
            style.law(ax, radii[far], exponent, style.centre(radii[far], arrays[f"{kind}/{name}"][:, far]))
    style.band(ax, radii, arrays[f"{kind}/{CONTROL}"], label=f"control: {_name(CONTROL)}", **style.control())
    highest = max(np.max(arrays[f"{kind}/{name}"][:, far][:, 1]) for name in architectures)
    style.note(ax, radii[-1], highest, f"predicted: {label}", color=style.THEORY)
    ax.text(0.02, 0.03, "inside the data", transform=ax.transAxes, fontsize=style.FONT_SIZE - 1, color=style.CONTROL)
    ax.set_ylabel("deviation from linearity $D$")
    ax.legend(loc="lower left", bbox_to_anchor=(0.0, 0.08))


def _curve(ax, radii, predicted):
    mean = np.exp(np.mean(np.log(predicted), axis=0))
    ax.plot(radii, mean, color=style.THEORY, linestyle=style.DASHES, linewidth=0.9, marker="", zorder=4)


def _exponents(ax, result, kind, architectures):
    chosen = [(f"N9.{kind}.{name}", _name(name), style.series(i)) for i, name in enumerate(architectures)]
    chosen += [
        (f"{claim}.inside", f"{name},\ninside", style.control() | {"marker": look["marker"]})
        for claim, name, look in chosen
    ]
    chosen.append((f"N9.{kind}.{architectures[0]}.erf", _name(CONTROL), style.control()))
    verdicts = [next(v for v in result.verdicts if v.claim == claim) for claim, _, _ in chosen]
    names, looks = ([entry[i] for entry in chosen] for i in (1, 2))
    style.verdict_marks(ax, verdicts, names, "fitted exponent", styles=looks)


def _name(architecture):
    activation, depth = architecture.split("-")
    return f"{NAMES[activation]}, {depth} layers"
