"""What the figures share: means, laws, verdict marks and captions are drawn as they say."""

import importlib
import sys
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest

from theorykit import verify

sys.path.insert(0, str(Path(__file__).parent.parent))
style = importlib.import_module("paper_figures.style")


@pytest.fixture
def ax():
    with matplotlib.rc_context():
        matplotlib.use("Agg")
        style.use()
        figure, axes = plt.subplots()
        yield axes
        plt.close(figure)


def test_band_draws_the_geometric_mean_on_a_logarithmic_axis_and_the_plain_mean_elsewhere(ax):
    samples = np.array([[1.0, 10.0], [4.0, 1000.0]])
    style.band(ax, [1, 2], samples)
    style.log_axis(ax)
    style.band(ax, [1, 2], samples)
    plain, *_, geometric = (line.get_ydata() for line in ax.lines if line.get_linewidth() > 1)
    np.testing.assert_allclose(plain, [2.5, 505.0])
    np.testing.assert_allclose(geometric, [2.0, 100.0])


def test_band_leaves_out_points_that_a_seed_did_not_reach(ax):
    style.band(ax, [1, 2, 3], np.array([[1.0, 2.0, np.nan], [1.0, 3.0, 4.0]]))
    np.testing.assert_array_equal(ax.lines[0].get_xdata(), [1, 2])


def test_law_goes_through_its_anchor_with_the_predicted_slope(ax):
    x = np.array([2.0, 8.0, 32.0])
    y = np.array([[3.0, 1.0, 0.5], [2.0, 1.5, 0.7]])
    style.law(ax, x, -0.5, style.centre(x, y))
    drawn_x, drawn_y = np.log(ax.lines[0].get_data())
    np.testing.assert_allclose(np.diff(drawn_y) / np.diff(drawn_x), -0.5)
    np.testing.assert_allclose(np.mean(drawn_y), np.mean(np.log(y)))


def test_only_a_verdict_that_is_not_as_expected_gets_a_ring(ax):
    claims = [verify.Claim(name, "the number is one", "derivation") for name in "ab"]
    verdicts = [
        verify.agreement(claim, value, 1.0, margin=0.5, deterministic=True)
        for claim, value in zip(claims, (1.2, 3.0), strict=True)
    ]
    style.verdict_marks(ax, verdicts, ["a", "b"], "number", styles=[style.series(0), style.series(1)])
    rings = [line.get_xdata()[0] for line in ax.lines if line.get_markerfacecolor() == "none"]
    assert rings == [3.0]
    (strip,) = ax.patches
    np.testing.assert_allclose([strip.get_x(), strip.get_x() + strip.get_width()], [0.5, 1.5])
    assert ax.get_xlim()[0] < 0.5 and ax.get_xlim()[1] > 3.0


@pytest.mark.slow
def test_caption_stays_inside_the_figure_and_is_kept_whole(ax):
    text = "many words of a caption, " * 20
    style.caption(ax.figure, text)
    ax.figure.canvas.draw()
    box = ax.figure._supxlabel.get_window_extent()
    assert box.x0 > 0 and box.x1 < ax.figure.bbox.width and box.y0 >= 0
    assert ax.figure.get_label() == text.strip()


def test_widths_axis_shows_the_measured_widths_but_never_more_than_eight(ax):
    style.widths_axis(ax, [64, 256, 64, 1024], "width")
    assert [label.get_text() for label in ax.get_xticklabels()] == ["64", "256", "1,024"]
    style.widths_axis(ax, 2 ** np.arange(4, 17), "width")
    assert len(ax.get_xticklabels()) <= 8
