r"""N2 and N4: which losses leave the kernel of a wide contrastive encoder where it was.

    change(M, t) = ||K_t - K_0||_F / ||K_0||_F    after gradient descent to the time t = learning rate x steps

N2 Under cosine losses the change at a fixed time falls at least as fast as M^{-1/2}, and saturates in t. Reason
(derivation): |d cos / d a| <= 1/|a|, and the loss does not change under W -> cW, so the flow conserves ||W||_F. N4
The same fall is checked one by one for dot-product losses that are bounded below. That "a dot product makes the
kernel move however wide the network" does not hold for them; it is listed as a finding.

Control: the linear dot-product loss, which is unbounded below. At a fixed finite time its change is of order 1/M too
(its embeddings grow at a rate that does not depend on M; see `ntk_divergence`), so the fixed time shows nothing. It
is measured after the number of steps at which its linearised descent f <- f - eta K_0 A f has grown to |f| = growth x
sqrt(M), a time logarithmic in M; there the change does not fall with M, and the same check must refute.

Not claimed: saturation under the linear cosine loss. Its change still grew at t = 400, with exponents of t of 0.35
[0.16, 0.54] (tanh) and 0.26 [0.15, 0.37] (ReLU) at width 512 over 12 seeds, and went on growing at a tenth of the
learning rate; it is drawn beside the others.

Source: Anil, Esser, Ghoshdastidar (arXiv 2403.08673) for constancy under cosine losses; derivation for the rest.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from experiments import _setting
from experiments._claims import pair
from experiments._side_by_side import side_by_side
from theorykit import results, verify
from theorykit.ntk import drift

COSINE = tuple(_setting.COSINE_LOSSES)
DOT = tuple(_setting.DOT_LOSSES)
CONTROL = "linear dot"


@dataclasses.dataclass(frozen=True)
class Config:
    """Digits as pairs of augmented views; full-batch gradient descent."""

    activations: tuple[str, ...] = ("tanh", "relu")
    cosine: tuple[str, ...] = COSINE
    dot: tuple[str, ...] = DOT
    widths: tuple[int, ...] = (128, 512, 2048)
    seeds: int = 10
    pairs: int = 16
    features: int = 4
    learning_rate: float = 0.5
    steps: int = 200
    long_width: int = 512
    long_steps: tuple[int, ...] = (200, 400, 800)
    growth: float = 0.2
    slope_margin: float = results.threshold(0.0, "the statement is one-sided: at least as fast as M^(-1/2)")
    blanket_margin: float = results.threshold(0.25, "half-way between no fall and the fall that N2 states")
    saturation_margin: float = results.threshold(
        0.25, "saturated means less than a quarter of the exponent 1 of a kernel that moves at constant speed"
    )
    travel_margin: float = results.threshold(1 / 6, "a third of the exponent 1/2 of the control")


PRESETS = {
    "smoke": Config(
        activations=("tanh",),
        cosine=("InfoNCE",),
        dot=("InfoNCE", "Barlow Twins"),
        seeds=8,
        steps=100,
        long_width=128,
        long_steps=(100, 200, 400),
    ),
    "quick": Config(),
    "full": Config(widths=tuple(2**k for k in range(8, 17, 2)), seeds=24),
}
# VICReg's published weights multiply its curvature by 25, the spectral loss is quartic in the embeddings: at the common
# rate both would leave the regime in which descent follows the flow.
_SLOWER = {"VICReg": 25.0, "spectral": 5.0}
_MEASURED = ("change", "smallest", "largest", "travelled")


def run(config: Config) -> dict[str, np.ndarray]:
    """<measure>/<series>/<activation> (seeds, widths, steps), series as "cos InfoNCE"; long runs; scale identity."""
    arrays = {"widths": np.array(config.widths), "steps": np.array(_measured_steps(config))}
    arrays |= {"long steps": np.array(_late_steps(config))}
    cells = len(config.activations) * len(_cells(config))
    with tqdm(total=cells, desc="ntk_constancy", disable=None) as bar:
        for activation in config.activations:
            arrays |= results.part(activation, lambda a=activation: _activation(config, a, bar))
    return arrays | results.part("rescaled", lambda: _rescaled(config))


def _cells(config):
    """(series, seed, column of the width); column -1 stands for the long run."""
    cells = [(series, *cell) for series in _all_series(config) for cell in np.ndindex(config.seeds, len(config.widths))]
    cells += [(series, seed, -1) for series in _long_series(config) for seed in range(config.seeds)]
    # One of each kind first: two at a time, they compile different programs.
    first = [(series, 0, column) for series in (CONTROL, cells[0][0]) for column in range(len(config.widths))]
    return sorted(cells, key=lambda cell: cell not in first)


def rate_of(config: Config, series: str) -> float:
    """Learning rate of a series such as "dot VICReg"; its time is this rate times steps."""
    return config.learning_rate / _SLOWER.get(series.removeprefix("dot "), 1.0)


def _all_series(config):
    return [f"cos {name}" for name in config.cosine] + [f"dot {name}" for name in config.dot] + [CONTROL]


def _long_series(config):
    return [f"cos {name}" for name in config.cosine] + ["dot InfoNCE"]


def _measured_steps(config):
    return sorted({0, *(int(s) for s in np.geomspace(1, config.steps, 8).round())})


def _late_steps(config):
    return sorted({*(s for s in _measured_steps(config) if s <= config.long_steps[-1]), *config.long_steps})


def _losses(config):
    """Losses in the order of the series."""
    cosine = [_setting.COSINE_LOSSES[name] for name in config.cosine]
    return (*cosine, *(_setting.DOT_LOSSES[name] for name in config.dot), _setting.LINEAR_DOT)


def _start(config, activation, width, seed):
    """Encoder, initial parameters and views: new data for every seed, new parameters for every seed and width."""
    encoder = _setting.encoder(f"{activation}-2", width, config.features)
    views = _setting.views(seed, config.pairs)
    return encoder, _setting.initial(encoder, _setting.cell_key(seed, width), views[0]), views


def _drift(config, activation, series, width, seed, at):
    encoder, params, views = _start(config, activation, width, seed)
    rate = rate_of(config, series)
    if series == CONTROL:
        at = [0, _setting.steps_of_growth(encoder, params, views, rate, config.growth)]
    return drift.kernel_drift(
        encoder.apply,
        _setting.objective(encoder.apply, _losses(config)),
        params,
        _setting.with_loss(views, _all_series(config).index(series), rate),
        points=views[0],
        optimizer=_setting.descent(1.0),
        steps=at[-1],
        at=at,
    )


def _activation(config, activation, bar):
    at = {series: 2 if series == CONTROL else len(_measured_steps(config)) for series in _all_series(config)}
    shape = (config.seeds, len(config.widths))
    measured = {series: np.full((len(_MEASURED), *shape, points), np.nan) for series, points in at.items()}
    taken = {series: np.zeros(shape) for series in at}
    late = {series: [None] * config.seeds for series in _long_series(config)}

    def measure(series, seed, column):
        if column < 0:
            found = _drift(config, activation, series, config.long_width, seed, _late_steps(config))
            late[series][seed] = found.change
        else:
            found = _drift(config, activation, series, config.widths[column], seed, _measured_steps(config))
            reached = len(found.steps)  # fewer than asked for after a divergence: the rest stays not-a-number
            measured[series][:, seed, column, :reached] = [getattr(found, name) for name in _MEASURED]
            taken[series][seed, column] = found.steps[-1]
        bar.update()

    side_by_side(measure, _cells(config))
    arrays = {f"long/{series}/{activation}": np.array(changes) for series, changes in late.items()}
    for series, values in measured.items():
        key = f"{series}/{activation}"
        arrays |= {f"{name}/{key}": value for name, value in zip(_MEASURED, values, strict=True)}
        arrays[f"taken/{key}"] = taken[series]
    return arrays


def _rescaled(config):
    """Losses of W and of 2W in float64, (seeds,): equal under cosine, not under the dot product."""
    values = {series: np.empty((config.seeds, 2)) for series in ("cos InfoNCE", "dot InfoNCE")}
    for seed in range(config.seeds):
        encoder, params, views = _start(config, config.activations[0], config.widths[0], seed)
        value = _setting.objective(encoder.apply, _losses(config))
        with jax.enable_x64(True):
            params, views = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), (params, views))
            twice = {"params": params["params"] | {"dense_1": {"kernel": 2 * params["params"]["dense_1"]["kernel"]}}}
            for series, found in values.items():
                batch = _setting.with_loss(views, _all_series(config).index(series), 1.0)
                found[seed] = [jax.jit(value)(p, batch) for p in (params, twice)]
    return {f"rescaled/{series}": found for series, found in values.items()}


def verdicts(config: Config, arrays: dict[str, np.ndarray]) -> list[verify.Verdict]:
    """Fall with the width loss by loss, saturation, travel, scale invariance; each with its control."""
    found = []
    for activation in config.activations:
        found += _fall(config, arrays, activation) + _saturation(config, arrays, activation)
        found += _blanket(config, arrays, activation) + _travel(config, arrays, activation)
    return found + _scale(arrays)


AEG = "Anil, Esser, Ghoshdastidar (arXiv 2403.08673), N2; exponent of the check: derivation"
HERE = "derivation and measurement (N4)"


def _pair(check, name, statement, source, claimed, control, why):
    """A claim and its control: the same check on another series."""
    return pair(check, name, statement, source, (claimed,), (why, (control,)))


def _fall(config, arrays, activation):
    def check(claim, series):
        change = arrays[f"change/{series}/{activation}"][..., -1]
        return verify.rate(claim, config.widths, change, -0.5, margin=config.slope_margin, side="at_most")

    found = []
    for series in _all_series(config)[:-1]:
        cosine = series.startswith("cos")
        found += _pair(
            check,
            f"{'N2' if cosine else 'N4'}.fall.{series[4:]}.{activation}".replace(" ", "-"),
            f"the kernel's change at a fixed time falls at least as M^(-1/2) under {series}, {activation}",
            AEG if cosine else HERE,
            series,
            CONTROL,
            "linear dot loss at the time when |f| has grown to a fixed multiple of sqrt M",
        )
    return found


def _saturation(config, arrays, activation):
    late = np.isin(arrays["long steps"], config.long_steps)

    def check(claim, series):
        change = arrays[f"long/{series}/{activation}"][:, late]
        return verify.rate(claim, config.long_steps, change, 0.0, margin=config.saturation_margin, side="at_most")

    found = []
    for name in (name for name in config.cosine if name != "linear"):
        found += _pair(
            check,
            f"N2.saturation.{name}.{activation}",
            f"the kernel's change saturates in time under cosine {name}, {activation}, width {config.long_width}",
            AEG,
            f"cos {name}",
            "dot InfoNCE",
            "InfoNCE of dot products",
        )
    return found


def _blanket(config, arrays, activation):
    change = arrays[f"change/dot InfoNCE/{activation}"][..., -1]
    claim = verify.Claim(
        f"N4.blanket.{activation}",
        f"read as a blanket statement: under a dot-product loss the kernel's change does not fall with the width "
        f"(InfoNCE, {activation})",
        "a reading of arXiv 2403.08673, which states that there are such cases",
        "finding",
    )
    return [verify.rate(claim, config.widths, change, 0.0, margin=config.blanket_margin, side="at_least")]


def _travel(config, arrays, activation):
    def check(claim, series):
        travelled = arrays[f"travelled/{series}/{activation}"][..., -1]
        return verify.rate(claim, config.widths, travelled, 0.0, margin=config.travel_margin)

    return _pair(
        check,
        f"N4.travel.{activation}",
        f"||theta_t - theta_0|| under Barlow Twins does not depend on the width, {activation}",
        HERE,
        "dot Barlow Twins",
        CONTROL,
        "linear dot loss at the time when |f| has grown to a fixed multiple of sqrt M",
    )


def _scale(arrays):
    def check(claim, series):
        return verify.identity(claim, *arrays[f"rescaled/{series}"].T)

    return _pair(
        check,
        "N2.scale",
        "a cosine loss is the same for W and 2W",
        "derivation",
        "cos InfoNCE",
        "dot InfoNCE",
        "dot products",
    )
