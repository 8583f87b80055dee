"""The command lines of the experiments and of the figures."""

import importlib
import json
import re
import sys
from pathlib import Path

import pytest

pytest_plugins = ("toy_experiment",)

# They live beside the tests, not in the installed package.
sys.path.insert(0, str(Path(__file__).parent.parent))
experiments_main = importlib.import_module("experiments.__main__").main
figures_main = importlib.import_module("paper_figures.__main__").main

FIGURE = """
import matplotlib.pyplot as plt
EXPERIMENT = "toy"
def draw(result):
    figure, axes = plt.subplots()
    axes.plot(result.arrays["values"], label="α")
    axes.legend()
    return figure
"""


def experiments(*words):
    return experiments_main(words, package="toyexperiments")


def test_run_says_what_it_computed_and_what_it_found(toy, capsys):
    assert experiments("run", "--preset", "smoke") == 0
    assert re.search(r"toy smoke: computing\ntoy smoke: computed, [\d.]+ s\n", capsys.readouterr().out)
    assert experiments("run", "--preset", "smoke", "--names", "toy") == 0
    assert re.fullmatch(r"toy smoke: from the store, [\d.]+ s\n", capsys.readouterr().out)


def test_run_goes_on_after_a_failure_and_reports_it_at_the_end(toy, capsys):
    toy.write("toyexperiments/broken.py", toy.experiment.replace('return {"values"', '1 / 0\n    return {"values"'))
    toy.write("toyexperiments/__init__.py", "ORDER = ('broken', 'toy')\n")
    assert experiments("run", "--preset", "smoke") == 1
    said = capsys.readouterr()
    assert "broken smoke: failed" in said.out and "toy smoke: computed" in said.out
    assert said.err.rstrip().endswith("FAILED broken: ZeroDivisionError: division by zero")
    assert experiments("verify", "--preset", "smoke") == 1
    assert not (toy.root / "verdicts.json").exists()


def test_unknown_names_and_presets_are_refused_with_the_valid_ones(toy, capsys):
    assert experiments("run", "--names", "tow") == 2
    assert "no experiment tow: choose from toy" in capsys.readouterr().err
    assert experiments("run", "--preset", "tiny") == 1
    said = capsys.readouterr().err
    assert "no preset 'tiny': choose one of smoke, quick" in said and "Traceback" not in said


def test_verify_prints_the_table_writes_the_list_and_fails_when_a_verdict_is_not_as_expected(toy, capsys):
    assert experiments("verify", "--preset", "smoke") == 0
    assert "2 verdicts, 2 as expected" in capsys.readouterr().out
    assert [v["claim"] for v in json.loads((toy.root / "verdicts.json").read_text())] == ["T1", "T1.shifted"]
    toy.edit("results.threshold(0.5", "results.threshold(2.5")
    assert experiments("verify", "--preset", "smoke") == 1
    assert [v["as_expected"] for v in json.loads((toy.root / "verdicts.json").read_text())] == [True, False]
    assert toy.computed() == 3


def test_list_shows_experiments_with_their_presets(toy, capsys):
    assert experiments("list") == 0
    assert capsys.readouterr().out == "toy: smoke, quick\n"


def figures(toy, *words):
    return figures_main(words, package="toyfigures", experiments="toyexperiments", output=toy.folder / "pictures")


@pytest.fixture
def toy_with_figure(toy):
    toy.write("toyfigures/__init__.py", "FIGURES = ('one',)\n")
    toy.write("toyfigures/one.py", FIGURE)
    toy.write("toyfigures/style.py", "import matplotlib\ndef use():\n    matplotlib.rcParams['lines.linewidth'] = 3\n")
    matplotlib = pytest.importorskip("matplotlib")
    with matplotlib.rc_context():
        yield toy


def test_a_figure_is_drawn_from_the_store_and_redrawn_byte_for_byte(toy_with_figure):
    toy = toy_with_figure
    toy.run()
    pictures = []
    for _ in range(2):
        assert figures(toy, "--preset", "smoke") == 0
        pictures.append({path.name: path.read_bytes() for path in (toy.folder / "pictures").iterdir()})
    assert pictures[0].keys() == {"one.pdf", "one.png"}
    assert pictures[0] == pictures[1]
    assert b"CreationDate" not in pictures[0]["one.pdf"]
    assert sys.modules["matplotlib"].rcParams["lines.linewidth"] == 3
    assert toy.computed() == 3


def test_a_figure_never_computes(toy_with_figure, capsys):
    assert figures(toy_with_figure, "--preset", "smoke", "--names", "one") == 1
    assert "make figure NAME=toy PRESET=smoke" in capsys.readouterr().err
    assert figures(toy_with_figure, "--names", "two") == 2
    assert "no figure two: choose from one" in capsys.readouterr().err
    assert toy_with_figure.computed() == 0
