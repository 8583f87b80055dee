"""Learned tasks on an accelerator: risks of four tasks against the edge noise p, with Bayes, and throughput.

    python -m benchmarks.learned_gpu --preset paper

Runs the experiment `learned_tasks` at its preset paper (10 symbols, depth 4, arity 3, four values of p) and writes its
figure a as numbers: for each task and p the Bayes risk, the excess of each kind of training over it on the same
samples, and 95% intervals of both by the standard errors of the samples, over all seeds. Several devices share the
members of an ensemble. The experiment is kept in the ordinary store: what was trained is not trained again, and a
killed run goes on from its checkpoints. Memory is estimated before anything is trained, and a run that does not fit is
refused. Throughput is measured apart, on short trainings of the same ensembles after their compilation.
"""

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from benchmarks import _timing
from experiments import _task_members as members
from experiments import learned_tasks
from theorykit import results

NORMAL = 1.96  # standard errors to either end of a 95% interval
MOST_BELOW = 4.0  # paired standard errors by which a trained risk may lie below Bayes
NEAR, REFERENCE = 0.03, 0.2  # nats between a standard pair and Bayes, and the p where that is asked
# Steps of the short trainings: seconds on an accelerator at the preset paper, where one takes some ten milliseconds.
STEPS = {"smoke": 20, "paper": 200}
# Shorter than the experiment's own preset of this name, which must decide about claims.
SMOKE = dataclasses.replace(learned_tasks.PRESETS["smoke"], seeds=2, pair_steps=40, samples=512, images=64, pool=64)


def figure(config: learned_tasks.Config, arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    """Risks against p: for each task Bayes, and the excess of each variant, lists over `config.levels`."""
    found = {}
    for task in (task for task in learned_tasks.TASKS if f"bayes/{task}" in arrays):
        value, error = (arrays[f"excess/{task}/{end}"] for end in ("value", "error"))
        bayes, of_bayes = arrays[f"bayes/{task}"], arrays[f"bayes/{task}/error"]
        variants = config.variants[: value.shape[1]] if task in config.conditional else members.pairs_of(config)
        found[task] = {
            "bayes": _interval(bayes, of_bayes),
            "excess": {name: _interval(value[:, i], error[:, i]) for i, name in enumerate(variants)},
            "risk": {name: (bayes + value[:, i]).mean(axis=0).tolist() for i, name in enumerate(variants)},
        }
    return found


def _interval(value, error):
    """Means over seeds (seeds, levels), their 95% intervals for these seeds, and each seed's."""
    mean, spread = value.mean(axis=0), NORMAL * np.sqrt(np.sum(error**2, axis=0)) / len(error)
    return {
        "mean": mean.tolist(),
        "low": (mean - spread).tolist(),
        "high": (mean + spread).tolist(),
        "seeds": value.tolist(),
    }


def throughput(config: learned_tasks.Config, steps: int) -> dict[str, Any]:
    """Members' steps and samples a second of each training program, compilation told apart."""
    short = dataclasses.replace(config, pair_steps=steps, steps=steps, checkpoints=())
    rows, pairs = _speed(config, len(members.pairs_of(config)), steps, lambda: members.train_pairs(short, 0))
    found = {"pairs": pairs}
    for task in config.conditional:

        def train(task=task):
            return members.train_network(short, 0, task, jnp.asarray(rows))

        found[task] = _speed(config, len(config.variants), steps, train)[1]
    return found


def _speed(config, variants, steps, train: Callable[[], dict[str, np.ndarray]]):
    begin = time.perf_counter()
    rows = train()["rows"]
    first = time.perf_counter() - begin
    train()
    seconds = time.perf_counter() - begin - first
    count = variants * len(config.levels)
    return rows, {
        "members": count,
        "steps": steps,
        "seconds": seconds,
        "compile_seconds": first - seconds,
        "member_steps_per_second": count * steps / seconds,
        "samples_per_second": count * steps * config.size.batch / seconds,
    }


def targets(config: learned_tasks.Config, arrays: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    """No risk below Bayes, and standard pairs close to it where the issue asks."""
    below = [
        -(arrays[f"excess/{task}/value"] / arrays[f"excess/{task}/error"]).ravel()
        for task in learned_tasks.TASKS
        if f"excess/{task}/value" in arrays
    ]
    statement = f"standard errors by which a trained risk lies below Bayes, at most {MOST_BELOW:g}"
    at, standard = config.levels.index(REFERENCE), config.variants.index("standard")
    close = f"standard pairs at p = {REFERENCE:g}: nats above Bayes, at most {NEAR:g}"
    return [
        _timing.target(statement, MOST_BELOW, _worst(np.concatenate(below)), at_least=False),
        _timing.target(close, NEAR, _worst(arrays["excess/contrastive/value"][:, standard, at]), at_least=False),
    ]


def _worst(values):
    """The largest is judged: the statements are on every member."""
    return {"median": float(values.max()), "low": float(values.min()), "high": float(values.max())}


def main(preset: Literal["smoke", "paper"] = "paper", output: Path = _timing.RESULTS) -> None:
    """Run, print what matters and write the JSON file.

    Parameters
    ----------
    preset
        smoke: a minute on any machine, one p and one kind of training, only to see that it works; paper: hours on an
        accelerator.
    output
        Folder of the JSON file.
    """
    if preset != "smoke" and jax.default_backend() == "cpu":
        raise SystemExit(
            "learned_gpu: JAX sees no accelerator, and this preset would take weeks without one; install JAX for "
            "yours, or run python -m experiments learned_tasks --preset full"
        )
    start = time.perf_counter()
    if preset == "smoke":
        config = SMOKE
        arrays = learned_tasks.run(config)
    else:
        config = learned_tasks.PRESETS[preset]
        arrays = {name: np.array(value) for name, value in results.run("learned_tasks", preset).arrays.items()}
    seconds = time.perf_counter() - start
    content = {
        "settings": dataclasses.asdict(config),
        "figure": figure(config, arrays),
        "throughput": throughput(config, STEPS[preset]),
        "run_seconds": seconds,  # of what was not in the store already
        "targets": targets(config, arrays),
    }
    path = _timing.write("learned_gpu", preset, output, content)
    for task, found in content["figure"].items():
        for i, p in enumerate(config.levels):
            lost = ", ".join(
                f"{name} +{one['mean'][i]:.4f} ({one['low'][i]:.4f} to {one['high'][i]:.4f})"
                for name, one in found["excess"].items()
            )
            print(f"{task}, p = {p:g}: Bayes {found['bayes']['mean'][i]:.4f}, {lost}")
    for name, one in content["throughput"].items():
        print(f"{name}: {one['member_steps_per_second']:.4g} steps of a member a second")
    _timing.print_targets(content["targets"])
    print(f"{seconds:.0f} s for the experiment, written to {path}")


if __name__ == "__main__":
    tyro.cli(main)
