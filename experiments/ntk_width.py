r"""N1: at initialisation the empirical kernel approaches its infinite-width limit at the rate M^{-1/2}.

    error(M) = ( E ||K_M - Theta x I_z||_F^2 )^{1/2} / ||Theta x I_z||_F

K_M is the full kernel (n, n, z, z) of an encoder of width M, Theta the infinite-width kernel of the same
architecture, and the mean is over initialisations. With two layers K_M is a mean of M independent terms with
expectation Theta x I_z, so error(M)^2 is exactly proportional to 1/M, at every width; deeper networks and CNNs have
corrections of order 1/M^2. Those of a ReLU CNN are large at few channels (exponent -0.55 over 16 to 144 channels),
so the CNN here has tanh units.

The full preset goes to 65,536 units for two layers. Deeper networks have weights of M^2 entries, so depth 4 stops at
4,096 (two hidden matrices of 64 MiB; at 65,536 each would take 16 GiB), and the CNN at 1,024 channels, whose 3 x 3
filters take 36 MiB.

Controls, each breaking one assumption of that mean:
copied units   the M hidden units are copies of a fixed number of independent ones: the error stops falling;
standard       weights without the factor 1/sqrt(fan_in) outside: the kernel grows with M instead of converging.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from experiments import _setting
from theorykit import encoders, results, verify
from theorykit.ntk import empirical, infinite

SOURCE = "Jacot et al. 2018 (arXiv 1806.07572); rate: derivation (variance of a mean over M units)"


@dataclasses.dataclass(frozen=True)
class Config:
    """Widths are hidden units per layer, or channels for a CNN."""

    data: str = "digits"
    points: int = 8
    features: int = 2
    widths: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    independent: int = 32
    seeds: int = 16
    draws: int = 16  # initialisations per seed, under the root mean square
    margin: float = results.threshold(
        1 / 12, "half the distance from 1/2 to the next simple exponents, 1/3 and 2/3: tells them apart"
    )


def _widths(two_layer, deep, channels):
    shallow = {f"{activation}-2": two_layer for activation in ("relu", "tanh", "erf", "gelu")}
    return shallow | {"relu-4": deep, "tanh-flat-3": channels}


PRESETS = {
    "smoke": Config(widths={"relu-2": (64, 256, 1024), "tanh-2": (64, 256, 1024)}),
    "quick": Config(widths=_widths((64, 256, 1024, 4096), (128, 512, 1024), (16, 48, 96)), seeds=32),
    "full": Config(
        widths=_widths(
            tuple(2**k for k in range(6, 17)), tuple(2**k for k in range(6, 13)), tuple(2**k for k in range(4, 11))
        ),
        seeds=64,
    ),
}
CONTROLS = ("copied-units", "standard")


def run(config: Config) -> dict[str, np.ndarray]:
    """error/<architecture> (seeds, widths), error/<control>, and widths/<architecture>."""
    arrays = {}
    x = _setting.rows(config.data, jax.random.key(0), config.points)
    for name, widths in tqdm(config.widths.items(), desc="ntk_width", disable=None):
        arrays[f"widths/{name}"] = np.array(widths)
        limit = _limit(_setting.encoder(name, 1, config.features), x, config.features)
        arrays[f"error/{name}"] = results.part(name, lambda n=name, w=widths, k=limit: _errors(config, n, w, k, x))
    two_layer = next(iter(config.widths))
    limit = _limit(_setting.encoder(two_layer, 1, config.features), x, config.features)
    for control in CONTROLS:
        arrays[f"error/{control}"] = results.part(
            control, lambda c=control: _errors(config, two_layer, config.widths[two_layer], limit, x, c)
        )
    arrays["control of"] = np.array(two_layer)
    return arrays


def _limit(encoder, x, features):
    return infinite.infinite_ntk(encoder, x)[:, :, None, None] * jnp.eye(features, dtype=x.dtype)


def _errors(config, name, widths, limit, x, control=None):
    """Root mean square of the relative error over the draws of each seed, (seeds, widths)."""
    errors = np.empty((config.seeds, len(widths)))
    for column, width in enumerate(widths):
        encoder = _setting.encoder(name, width, config.features)
        if control == "standard":
            encoder = encoders.MLP(width, config.features, activation=encoder.activation, parametrisation="standard")
        # A key of its own for every draw: seeds, draws and widths are independent.
        keys = jax.random.split(jax.random.fold_in(jax.random.key(0), width), config.seeds * config.draws)

        def squared_error(key, encoder=encoder):
            params = encoder.init(key, x)
            if control == "copied-units":
                params = _copied(params, config.independent)
            kernel = empirical.empirical_ntk(encoder.apply, params, x)
            return jnp.sum((kernel - limit) ** 2) / jnp.sum(limit**2)

        squares = jax.jit(lambda keys, function=squared_error: jax.lax.map(function, keys))(keys)
        errors[:, column] = np.sqrt(np.mean(squares.reshape(config.seeds, config.draws), axis=1))
    return errors


def _copied(params, independent):
    """Hidden units replaced by copies of the first `independent` ones."""
    hidden, output = params["params"]["dense_0"]["kernel"], params["params"]["dense_1"]["kernel"]
    source = jnp.arange(hidden.shape[1]) % independent
    return {"params": {"dense_0": {"kernel": hidden[:, source]}, "dense_1": {"kernel": output[source]}}}


def verdicts(config: Config, arrays: dict[str, np.ndarray]) -> list[verify.Verdict]:
    """One rate per architecture, and the two controls against the first of them."""

    def check(claim, name, series):
        return verify.rate(claim, arrays[f"widths/{name}"], arrays[f"error/{series}"], -0.5, margin=config.margin)

    def statement(name):
        return f"the root mean square relative error of the kernel at initialisation falls as M^(-1/2), {name}"

    found = [check(verify.Claim(f"N1.{name}", statement(name), SOURCE), name, name) for name in config.widths]
    two_layer = str(arrays["control of"])
    for claim in found[:]:
        name = claim.claim.removeprefix("N1.")
        found += [
            check(
                verify.Claim(
                    f"{claim.claim}.{control}", f"{statement(two_layer)}, {control}", SOURCE, "control", claim.claim
                ),
                two_layer,
                control,
            )
            for control in (CONTROLS if name == two_layer else CONTROLS[:1])
        ]
    return found
