"""Every theorem at the smoke preset: each claim supported, each control and finding refuted, and drawn."""

import importlib

import jax
import matplotlib
import matplotlib.pyplot as plt
import pytest

from experiments import ORDER
from paper_figures import FIGURES, style
from paper_figures.__main__ import experiments_of
from theorykit import results

matplotlib.use("Agg")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return tmp_path_factory.mktemp("results")


@pytest.fixture(autouse=True)
def ordinary_promotion():
    """Experiments run under JAX's ordinary promotion rules, as `make figures` runs them."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


@pytest.mark.parametrize("name", ORDER)
def test_every_verdict_of_the_experiment_is_as_expected(name, store):
    result = results.run(name, "smoke", root=store)
    missed = [f"{v.claim}: {v.outcome}, {v.measured} [{v.low}, {v.high}]" for v in result.verdicts if not v.as_expected]
    assert result.verdicts
    assert not missed


@pytest.mark.parametrize("name", ORDER)
def test_every_control_is_checked_like_its_claim(name, store):
    verdicts = {v.claim: v for v in results.run(name, "smoke", root=store).verdicts}
    for control in verdicts.values():
        if control.control_of is not None:
            claim = verdicts[control.control_of]
            left, right = (
                (v.kind, v.predicted, v.margin, v.details.get("side"), v.details.get("law")) for v in (claim, control)
            )
            assert left == right, control.claim


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_is_drawn_from_its_results(name, store):
    script = importlib.import_module(f"paper_figures.{name}")
    found = [results.run(experiment, "smoke", root=store) for experiment in experiments_of(script)]
    with matplotlib.rc_context():
        style.use()
        figure = script.draw(*found)
        empty = [ax.get_title(loc="left") for ax in figure.axes if ax.axison and not ax.has_data() and not ax.texts]
        caption = figure.get_label()
        plt.close(figure)
    assert figure.axes and not empty
    assert len(caption) > 100  # what is drawn, with sizes


@pytest.mark.parametrize("name", ORDER)
def test_every_experiment_has_the_three_presets(name):
    assert {"smoke", "quick", "full"} <= set(importlib.import_module(f"experiments.{name}").PRESETS)
