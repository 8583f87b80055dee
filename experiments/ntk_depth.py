r"""N7: constancy under a cosine loss beyond two layers, for MLPs of depth 3 to 5 and a small CNN.

    change(M) = ||K_t - K_0||_F / ||K_0||_F    after gradient descent on cosine InfoNCE to a fixed time t

falls at least as fast as M^{-1/2}, as it does for two layers (N2). The paper expects this ("possibly hold") without proof;
here it is a measurement. In a deep network the change has contributions of order M^{-1/2} from the hidden layers' own
features, so the slope may be closer to -1/2 than the -1 of two smooth layers; the check is one-sided.

Control: the linear dot-product loss at the time at which its linearised descent has grown to |f| = growth x sqrt(M); see
`ntk_constancy`.

Source: Anil, Esser, Ghoshdastidar (arXiv 2403.08673), stated there as an expectation; measurement.
"""

import dataclasses

import numpy as np
from tqdm import tqdm

from experiments import _setting
from theorykit import results, training, verify
from theorykit.ntk import drift

SOURCE = "Anil, Esser, Ghoshdastidar (arXiv 2403.08673), an expectation there; measurement"
SERIES = ("cosine InfoNCE", "linear dot")


@dataclasses.dataclass(frozen=True)
class Config:
    """Widths are hidden units per layer, or channels for a CNN; digits as pairs of augmented views."""

    architectures: tuple[str, ...] = ("tanh-3", "relu-3", "relu-4", "relu-5", "relu-cnn-3")
    widths: tuple[int, ...] = (128, 256, 512, 1024)
    channels: tuple[int, ...] = (32, 64, 128)
    seeds: int = 12
    pairs: int = 8
    features: int = 4
    learning_rate: float = 0.5
    steps: int = 100
    growth: float = 0.5
    margin: float = results.threshold(0.0, "the statement is one-sided: at least as fast as M^(-1/2)")


PRESETS = {
    "smoke": Config(architectures=("tanh-3",), widths=(128, 512, 1024), steps=50),
    "quick": Config(),
    "full": Config(widths=(128, 256, 512, 1024, 2048, 4096), channels=(32, 64, 128, 256, 512), seeds=16, steps=200),
}


def run(config: Config) -> dict[str, np.ndarray]:
    """<measure>/<series>/<architecture> (seeds, widths) at the end of training, and widths/<architecture>."""
    arrays = {}
    for name in tqdm(config.architectures, desc="ntk_depth", disable=None):
        widths = config.channels if "cnn" in name else config.widths
        arrays[f"widths/{name}"] = np.array(widths)
        for series in SERIES:
            label = f"{name}-{series}".replace(" ", "_")
            arrays |= results.part(label, lambda n=name, w=widths, s=series: _sweep(config, n, w, s))
    return arrays


def _sweep(config, name, widths, series):
    change, smallest, taken = np.empty((3, config.seeds, len(widths)))
    for seed in range(config.seeds):
        views = _setting.views(seed, config.pairs)
        for column, width in enumerate(widths):
            encoder = _setting.encoder(name, width, config.features)
            params = _setting.initial(encoder, _setting.cell_key(seed, width), views[0])
            loss, steps = _setting.COSINE_LOSSES["InfoNCE"], config.steps
            if series == "linear dot":
                loss = _setting.LINEAR_DOT
                steps = _setting.steps_of_growth(encoder, params, views, config.learning_rate, config.growth)
            found = drift.kernel_drift(
                encoder.apply,
                training.objective(encoder.apply, loss),
                params,
                views,
                points=views[0],
                optimizer=_setting.descent(config.learning_rate),
                steps=steps,
                at=[0, steps],
            )
            finished = found.status == "finished"
            change[seed, column] = found.change[-1] if finished else np.nan
            smallest[seed, column] = found.smallest.min()
            taken[seed, column] = len(found.losses)
    measured = {"change": change, "smallest": smallest, "taken": taken}
    return {f"{measure}/{series}/{name}": values for measure, values in measured.items()}


def verdicts(config: Config, arrays: dict[str, np.ndarray]) -> list[verify.Verdict]:
    """One fall per architecture, each with its control."""
    found = []
    for name in config.architectures:
        statement = f"the kernel's change at a fixed time falls at least as M^(-1/2) under cosine InfoNCE, {name}"
        claim = verify.Claim(f"N7.{name}", statement, SOURCE)
        why = "linear dot loss at the time when |f| has grown to a fixed multiple of sqrt M"
        control = verify.Claim(f"N7.{name}.control", f"{statement}: {why}", SOURCE, "control", claim.name)
        for one, series in ((claim, SERIES[0]), (control, SERIES[1])):
            change = arrays[f"change/{series}/{name}"]
            found.append(verify.rate(one, arrays[f"widths/{name}"], change, -0.5, margin=config.margin, side="at_most"))
    return found
