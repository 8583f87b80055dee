"""The order of the kinds of training, judged on made-up excesses: lawful ones, reversed ones, merged roots, noise."""

import dataclasses

import numpy as np
import pytest

from experiments import _task_verdicts as judged
from experiments import learned_tasks
from experiments._task_members import VARIANTS

QUICK = learned_tasks.PRESETS["quick"]
FULL = learned_tasks.PRESETS["full"]
LAWFUL = {"guided": 0.01, "standard": 0.02, "misguided": 0.02, "shallow": 0.04, "joint": 0.03}


def arrays_of(config, excesses):
    """Excesses by kind with 5% of noise, the same for all kinds, and 0.3% of their own."""
    rng = np.random.default_rng(0)
    shape = (config.seeds, len(config.levels))
    arrays = {}
    for task in judged.TASKS:
        common = np.exp(0.05 * rng.standard_normal(shape))
        of_kinds = [excesses[kind] * common * np.exp(0.003 * rng.standard_normal(shape)) for kind in VARIANTS]
        arrays[f"excess/{task}/value"] = np.stack(of_kinds, axis=1)
        arrays[f"other/{task}/value"] = -np.ones((config.seeds, len(VARIANTS), len(config.levels)))
        arrays[f"mixed/{task}"] = np.ones(shape)
        arrays[f"bayes/{task}"] = np.ones(shape)
    return arrays


def outcomes(config, arrays):
    return {verdict.claim: verdict.outcome for verdict in judged.order(config, arrays)}


def claims(config, arrays):
    return {name: outcome for name, outcome in outcomes(config, arrays).items() if not name.endswith(".control")}


def test_above_depth_two_all_neighbours_of_all_tasks_are_judged():
    found = outcomes(FULL, arrays_of(FULL, LAWFUL))
    names = [f"{what}.{task}" for what in ("LT.guided", "LT.shallow") for task in judged.TASKS]
    assert [found[name] for name in names] == ["supported"] * 8
    assert [found[f"{name}.control"] for name in names] == ["refuted"] * 8


@pytest.mark.parametrize("config", [QUICK, FULL], ids=["depth 2", "depth 3"])
@pytest.mark.parametrize(
    ("first", "second", "name"), [("guided", "standard", "guided"), ("standard", "shallow", "shallow")]
)
def test_neighbours_in_the_other_order_are_refuted(config, first, second, name):
    turned = LAWFUL | {first: LAWFUL[second], second: LAWFUL[first]}
    found = claims(config, arrays_of(config, turned))
    ordered = [outcome for claim, outcome in found.items() if claim.startswith(f"LT.{name}.") and "close" not in claim]
    assert ordered and set(ordered) == {"refuted"}


def test_what_a_merged_root_costs_at_little_noise_does_not_decide_the_order_of_deep_trees():
    """At p = 0.1 a pair that merges two roots loses ten times as much as any other, of whatever kind it is."""
    equal = dict.fromkeys(VARIANTS, 0.02)
    arrays = arrays_of(FULL, equal)
    for task in judged.TASKS:
        arrays[f"excess/{task}/value"][:, VARIANTS.index("standard"), FULL.levels.index(0.1)] *= 10
    found = claims(FULL, arrays)
    assert {found[f"LT.guided.{task}"] for task in judged.TASKS} == {"refuted"}
    quick = arrays_of(QUICK, equal)
    for task in judged.TASKS:  # at depth 2 every level counts
        quick[f"excess/{task}/value"][:, VARIANTS.index("standard"), QUICK.levels.index(0.1)] *= 10
    assert claims(QUICK, quick)["LT.guided.contrastive"] == "inconclusive"


def test_an_excess_below_zero_decides_nothing():
    arrays = arrays_of(FULL, LAWFUL)
    arrays["excess/zero_shot/value"][0, VARIANTS.index("guided"), 1] = -1e-4
    found = claims(FULL, arrays)
    assert found["LT.guided.zero_shot"] == "inconclusive"
    assert found["LT.guided.contrastive"] == "supported"


def test_the_stars_have_the_leaves_of_the_trees_and_keep_a_symbol_as_often_as_their_paths():
    stars = learned_tasks.PRESETS["stars"]
    assert stars.size.leaves == QUICK.size.leaves
    assert dataclasses.replace(stars.size, depth=2, arity=2) == QUICK.size
    assert np.allclose(1 - np.array(stars.levels), (1 - np.array(QUICK.levels)) ** 2, atol=0.011)
