r"""N7: constancy under a cosine loss beyond two layers, for MLPs of depth 3 to 5 and a small CNN.

    change(M) = ||K_t - K_0||_F / ||K_0||_F    after gradient descent on cosine InfoNCE to a fixed time t

falls at least as fast as M^{-1/2}, as it does for two layers (N2). The paper expects this ("possibly hold") without
proof; here it is a measurement, one-sided.

Control: a learning rate that grows in proportion to the width. Every weight then moves by an amount of order one, the
time t is no longer fixed as M grows, and the kernel moves however wide the network is. (The linear dot-product loss,
the control of `ntk_constancy`, needs |f| << sqrt M at the start and a kernel that stays finite while |f| grows to it;
in deep networks the kernel moves so early that this leaves no room at these widths.)

The CNN has tanh units and no pooling. A ReLU CNN at 16 to 64 channels gave the exponent -0.5 +- 0.3 (standard deviation
over seeds), which decides nothing, and average pooling makes the embeddings of different digits nearly parallel.

The full preset stops at 4,096 units and 512 channels: a hidden matrix has M^2 entries, 64 MiB there and 16 GiB at
65,536, depth 5 has three of them, and training holds parameters, gradients and snapshots of each.

Source: Anil, Esser, Ghoshdastidar (arXiv 2403.08673), stated there as an expectation; measurement.
"""

import dataclasses

import numpy as np
from tqdm import tqdm

from experiments import _setting
from experiments._side_by_side import side_by_side
from theorykit import results, verify
from theorykit.ntk import drift

SOURCE = "Anil, Esser, Ghoshdastidar (arXiv 2403.08673), an expectation there; measurement"
SERIES = ("fixed rate", "rate proportional to width")


@dataclasses.dataclass(frozen=True)
class Config:
    """Widths are hidden units per layer, or channels for a CNN; digits as pairs of augmented views."""

    architectures: tuple[str, ...] = ("tanh-3", "relu-3", "relu-4", "relu-5", "tanh-flat-3")
    widths: tuple[int, ...] = (128, 512, 1024)
    channels: tuple[int, ...] = (8, 20, 48)
    seeds: int = 16
    pairs: int = 8
    features: int = 4
    learning_rate: float = 0.5
    steps: int = 30
    rate_per_unit: float = 0.05  # of the control, for MLPs: 13 times the fixed rate at width 128
    rate_per_channel: float = 0.25  # of the control, for CNNs: 4 times the fixed rate at 8 channels
    margin: float = results.threshold(0.0, "the statement is one-sided: at least as fast as M^(-1/2)")


PRESETS = {
    "smoke": Config(architectures=("tanh-3",), seeds=12),
    "quick": Config(),
    "full": Config(widths=(128, 256, 512, 1024, 2048, 4096), channels=(32, 64, 128, 256, 512), seeds=24, steps=200),
}


def run(config: Config) -> dict[str, np.ndarray]:
    """<measure>/<series>/<architecture> (seeds, widths) at the end of training, and widths/<architecture>."""
    arrays = {}
    for name in tqdm(config.architectures, desc="ntk_depth", disable=None):
        widths = config.channels if "flat" in name else config.widths
        arrays[f"widths/{name}"] = np.array(widths)
        for series in SERIES:
            label = f"{name}-{series}".replace(" ", "_")
            arrays |= results.part(label, lambda n=name, w=widths, s=series: _sweep(config, n, w, s))
    return arrays


def _sweep(config, name, widths, series):
    change, smallest = np.empty((2, config.seeds, len(widths)))

    def measure(seed, column):
        views, width, rate = _setting.views(seed, config.pairs), widths[column], config.learning_rate
        encoder = _setting.encoder(name, width, config.features)
        if series == SERIES[1]:
            rate = width * (config.rate_per_channel if "flat" in name else config.rate_per_unit)
        found = drift.kernel_drift(
            encoder.apply,
            _setting.objective(encoder.apply, (_setting.COSINE_LOSSES["InfoNCE"],)),
            _setting.initial(encoder, _setting.cell_key(seed, width), views[0]),
            _setting.with_loss(views, 0, rate),  # one compiled program for both rates
            points=views[0],
            optimizer=_setting.descent(1.0),
            steps=config.steps,
            at=[0, config.steps],
        )
        finished = found.status == "finished"
        change[seed, column] = found.change[-1] if finished else np.nan
        smallest[seed, column] = found.smallest.min()

    side_by_side(measure, np.ndindex(change.shape))
    measured = {"change": change, "smallest": smallest}
    return {f"{measure}/{series}/{name}": values for measure, values in measured.items()}


def verdicts(config: Config, arrays: dict[str, np.ndarray]) -> list[verify.Verdict]:
    """One fall per architecture, each with its control."""
    found = []
    for name in config.architectures:
        statement = f"the kernel's change at a fixed time falls at least as M^(-1/2) under cosine InfoNCE, {name}"
        claim = verify.Claim(f"N7.{name}", statement, SOURCE)
        why = "with a learning rate proportional to the width"
        control = verify.Claim(f"N7.{name}.control", f"{statement}: {why}", SOURCE, "control", claim.name)
        for one, series in ((claim, SERIES[0]), (control, SERIES[1])):
            change = arrays[f"change/{series}/{name}"]
            found.append(verify.rate(one, arrays[f"widths/{name}"], change, -0.5, margin=config.margin, side="at_most"))
    return found
