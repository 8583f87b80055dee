"""`make figures` and `make report`: computing, drawing and judging in one go."""

import base64
import importlib
import re
import sys
from pathlib import Path

import pytest

pytest_plugins = ("toy_experiment",)

sys.path.insert(0, str(Path(__file__).parent.parent))
regenerate_main = importlib.import_module("regenerate").main
report_main = importlib.import_module("paper_figures.report").main

FIGURE = """
import matplotlib.pyplot as plt
from paper_figures import style
EXPERIMENT = "toy"
def draw(result):
    figure, axes = plt.subplots()
    axes.plot(result.arrays["values"])
    style.caption(figure, 'three values, & their "caption"')
    return figure
"""


@pytest.fixture
def toy_with_figure(toy):
    toy.write("toyfigures/__init__.py", "FIGURES = ('one',)\n")
    toy.write("toyfigures/one.py", FIGURE)
    with pytest.importorskip("matplotlib").rc_context():
        yield toy


def call(main, toy, *words):
    package = {"figures" if main is regenerate_main else "package": "toyfigures"}
    return main(words, experiments="toyexperiments", output=toy.folder / "pictures", **package)


def test_each_figure_is_drawn_when_its_experiment_is_done_and_the_table_comes_last(toy_with_figure, capsys):
    assert call(regenerate_main, toy_with_figure, "--preset", "smoke") == 0
    order = re.findall(r"computed|drawn|2 verdicts, 2 as expected", capsys.readouterr().out)
    assert order == ["computed", "drawn", "2 verdicts, 2 as expected"]
    assert (toy_with_figure.root / "verdicts.json").exists()


def test_one_figure_comes_with_its_own_verdicts(toy_with_figure, capsys):
    assert call(regenerate_main, toy_with_figure, "--preset", "smoke", "--names", "one") == 0
    assert "2 verdicts, 2 as expected" in capsys.readouterr().out
    assert not (toy_with_figure.root / "verdicts.json").exists()  # a list of all would look complete
    assert call(regenerate_main, toy_with_figure, "--names", "two") == 2
    assert "no figure two: choose from one" in capsys.readouterr().err


def test_a_figure_is_drawn_again_where_its_results_or_its_code_changed(toy_with_figure, capsys):
    toy = toy_with_figure
    picture = toy.folder / "pictures/one.png"

    def done():
        assert call(regenerate_main, toy, "--preset", "smoke") == 0
        return re.findall(r"one smoke: (drawn|as it was)", capsys.readouterr().out)

    assert done() == ["drawn"]
    first = picture.read_bytes()
    assert done() == ["as it was"]
    picture.with_suffix(".pdf").unlink()
    assert done() == ["drawn"] and picture.read_bytes() == first
    toy.edit("results.threshold(0.5", "results.threshold(0.6")  # the same arrays, other verdicts
    assert done() == ["drawn"]
    toy.write("toyfigures/one.py", FIGURE.replace("values", "squares"))
    assert done() == ["drawn"] and picture.read_bytes() != first
    assert done() == ["as it was"]


def test_a_file_in_place_of_the_folder_of_figures_is_named(toy_with_figure, capsys):
    toy_with_figure.write("pictures", "not a folder")
    assert call(regenerate_main, toy_with_figure, "--preset", "smoke") == 2
    said = capsys.readouterr()
    assert "the folder of the figures cannot be made" in said.err and "pictures" in said.err
    assert "computing" not in said.out


def test_figures_are_drawn_even_if_a_verdict_is_not_as_expected(toy_with_figure):
    toy_with_figure.edit("results.threshold(0.5", "results.threshold(2.5")
    for words in ((), ("--names", "one")):
        assert call(regenerate_main, toy_with_figure, "--preset", "smoke", *words) == 1
    assert (toy_with_figure.folder / "pictures/one.pdf").exists()


def test_a_broken_figure_or_experiment_does_not_stop_the_others(toy_with_figure, capsys):
    toy = toy_with_figure
    toy.write("toyfigures/__init__.py", "FIGURES = ('absent', 'broken', 'one')\n")
    toy.write("toyfigures/broken.py", FIGURE.replace('"toy"', '"broken"'))
    toy.write("toyexperiments/broken.py", toy.experiment.replace('return {"values"', '1 / 0\n    return {"values"'))
    toy.write("toyexperiments/__init__.py", "ORDER = ('broken', 'toy')\n")
    assert call(regenerate_main, toy, "--preset", "smoke") == 1
    assert "2 verdicts, 2 as expected" in capsys.readouterr().out
    assert sorted(path.stem for path in (toy.folder / "pictures").iterdir()) == ["one", "one"]


def test_the_report_is_one_page_with_verdicts_figures_captions_and_environment(toy_with_figure, capsys):
    toy = toy_with_figure
    assert call(report_main, toy, "--preset", "smoke") == 1
    assert "make figure NAME=toy PRESET=smoke" in capsys.readouterr().err
    toy.run()
    pages = []
    for _ in range(2):
        assert call(report_main, toy, "--preset", "smoke") == 0
        pages.append((toy.folder / "pictures/report.html").read_text(encoding="utf-8"))
    page = pages[0]
    assert pages[1] == page
    assert "2 of 2 verdicts as expected" in page and "T1.shifted" in page and "the mean is one" in page
    assert 'alt="three values, &amp; their &quot;caption&quot;"' in page
    assert b"<svg" in base64.b64decode(re.search(r"base64,([^\"]+)", page)[1])
    assert toy.run().path.name in page and "jax " in page
    # Nothing is loaded from elsewhere.
    assert re.findall(r"(?:src|href)=\"(?!data:)", page) == []
